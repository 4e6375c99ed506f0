"""Evaluation: right and wrong renderers get what they deserve, intervals are Wilson's, the real command repeats."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.cli import main
from cluster.evaluate import load_renderer
from model import evaluate as evaluation
from model import world
from model.checkpoint import load_vae
from model.evaluate import MEASURES, Renderer, Sampling, Share, drawn_frames, table, wanted_films
from model.generate import Models, SegmentRequest, generate_segment
from model.pixels import decode_frames
from model.sampling import distilled_schedule
from model.train.__main__ import main as train
from model.train.dit import new_generator
from model.train.loop import Plan, Training
from model.train.pack import write_vae
from model.train.vae import new_vae
from pipeline.facts import load_render_facts
from tests.test_judge import POCKET

SAMPLING = Sampling(distilled_schedule(2, 8.0), 1.0)


class Draughtsman(Renderer):
    """Draws what prompts say instead of generating it; `spoil` changes the shape first, from a moment on."""

    def __init__(self, spoil: dict[str, str] | None = None, after_s: float = 0.0) -> None:
        super().__init__(None, None, SAMPLING)  # type: ignore[arg-type]
        object.__setattr__(self, "_spoil", (spoil or {}, after_s))
        object.__setattr__(self, "_wanted", {wanted.prompt: wanted for wanted in wanted_films(64, 0)})

    def segment(self, prompt: str, name: str, conditions: torch.Tensor | None = None) -> torch.Tensor:
        return self.chain(prompt, name, 93)

    def chain(self, prompt: str, name: str, frames: int) -> torch.Tensor:
        spoil, after_s = self._spoil  # type: ignore[attr-defined]
        film = self._wanted[prompt].film  # type: ignore[attr-defined]
        drawn, _ = drawn_frames(film, SAMPLING, frames)
        spoilt = replace(film, scene=replace(film.scene, movers=(replace(film.scene.movers[0], **spoil),)))
        start = round(after_s * SAMPLING.fps)
        return torch.cat([drawn[:start], drawn_frames(spoilt, SAMPLING, frames)[0][start:]])


def quiet(_: str) -> None:
    pass


def test_prompts_are_the_64_unseen_combinations() -> None:
    wanted = wanted_films(64, seed=3)
    assert len({w.prompt.replace("slowly", "quickly") for w in wanted}) == 64
    assert all(world.is_held_out(w.mover) for w in wanted)
    assert wanted_films(5, seed=3) == wanted[:5]
    assert wanted_films(5, seed=4) != wanted[:5]


def test_who_draws_what_the_prompt_says_gets_full_marks() -> None:
    result = evaluation.measure_text(Draughtsman(), 6, 0, None, quiet)
    assert [result[name]["share"] for name in (*MEASURES, "all three")] == [1.0] * 4
    kept = evaluation.measure_image(Draughtsman(), 3, 0, None, quiet)
    assert kept["kept"]["share"] == 1.0


@pytest.mark.parametrize(("measure", "spoil"), [("colour", {"colour": "white"}), ("shape", {"kind": "star"})])
def test_who_draws_something_else_is_marked_wrong_in_that_alone(measure: str, spoil: dict[str, str]) -> None:
    unspoilt = {"colour": "white", "shape": "star"}[measure]
    wanted = [w for w in wanted_films(8, 0) if unspoilt not in w.prompt]
    result = evaluation.measure_text(Draughtsman(spoil), 8, 0, None, quiet)
    assert result[measure]["right"] == 8 - len(wanted)
    assert all(result[name]["share"] == 1.0 for name in MEASURES if name != measure)


def test_an_object_that_is_lost_on_the_way_is_not_kept() -> None:
    lost = evaluation.measure_image(Draughtsman({"colour": "white"}, after_s=2.0), 2, 0, None, quiet)
    assert lost["kept"]["share"] == 0.0


def test_a_chain_tells_the_minute_in_which_it_was_lost() -> None:
    result = evaluation.measure_chains(Draughtsman({"colour": "white"}, after_s=60.0), 1, 2.0, 0, None, quiet)
    assert [minute["colour"]["share"] for minute in result["by minute"]] == [1.0, 0.0]
    assert result["colour"]["share"] == 0.0
    assert result["shape"]["share"] == 1.0


def test_a_chain_hands_its_last_latents_on_and_the_frame_before_them(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, made = [], []

    def watched(models: Models, request: SegmentRequest) -> torch.Tensor:
        requests.append(request)
        made.append(generate_segment(models, request))
        return made[-1]

    monkeypatch.setattr(evaluation, "generate_segment", watched)
    renderer = load_renderer(tiny_checkpoint, load_render_facts(tiny_checkpoint), "cpu")
    film = renderer.chain("a red circle", "chain", 100)
    first, second = requests
    assert first.cond_frames is first.cond_latents is None
    assert torch.equal(second.cond_frames, film[80:81])
    assert torch.equal(second.cond_latents, made[0][:, -3:])
    assert torch.equal(film[93:], torch.cat(list(decode_frames(renderer.models.vae, made[1])))[13:20])


def test_the_autoencoder_is_measured_everywhere_and_inside_shapes() -> None:
    vae = load_vae(POCKET, device="cpu", dtype=torch.float32)
    models = Models(None, vae, torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
    renderer = Renderer(models, None, replace(SAMPLING, segment_frames=9))  # type: ignore[arg-type]
    result = evaluation.measure_vae(renderer, 2, 0, None, quiet)
    assert 20 < result["inside_db"]["value"] < result["all_db"]["value"] < 45


def test_intervals_are_wilsons() -> None:
    low, high = Share(8, 10).interval
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Share(64, 64).interval[1] == 1.0
    assert Share(64, 64).interval[0] == pytest.approx(0.9434, abs=1e-4)


def test_the_table_says_which_bars_are_met() -> None:
    text = evaluation.measure_text(Draughtsman({"kind": "star"}), 4, 0, None, quiet)
    lines = {line.split()[0]: line for line in table({"text": text}).splitlines() if line.startswith("  ")}
    assert lines["colour"].endswith("95 %  met")
    assert lines["shape"].endswith("85 %  short")


def test_a_place_that_cannot_be_written_is_named_before_measuring(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cluster.evaluate.load_renderer", lambda *_: pytest.fail("it was begun"))
    (tmp_path / "file").touch()
    (tmp_path / "result" / "evaluation.json").mkdir(parents=True)
    for out in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "result", Path("/proc/results")):
        assert main(["evaluate", str(tiny_checkpoint), "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert "--out: cannot be written" in said and str(out) in said


def test_a_checkpoint_that_is_none_leaves_no_folder_for_its_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(tmp_path), "--out", str(tmp_path / "new" / "results")]) == 2
    assert "checkpoint" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_repeats_itself(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    results = []
    for out in ("a", "b"):
        command = ["evaluate", str(tiny_checkpoint), "--clips", "1", "--chains", "1", "--minutes", "0.15"]
        assert main([*command, "--out", out, "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out))
        for sheet in ("text_1.png", "image_1.png", "chain_1.png", "vae_1.png", "evaluation.json"):
            assert (tmp_path / out / sheet).is_file()
    first, second = ({k: v for k, v in result.items() if k != "seconds"} for result in results)
    assert first == second
    assert first["text"]["colour"]["total"] == 1
    assert (tmp_path / "a" / "chain_1.png").read_bytes() == (tmp_path / "b" / "chain_1.png").read_bytes()


@pytest.mark.slow
def test_a_state_of_training_is_measured_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(steps=1, rate=1e-3, final_rate=1e-3)
    Training(new_generator(64, 1, 1), plan).save(tmp_path / "dit.safetensors")
    write_vae(new_vae(4, 0), tmp_path / "checkpoint")
    sizes = ["--width", "64", "--depth", "1", "--frames", "9", "--steps", "2", "--clips", "1", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["model.train", "evaluate", "--folder", str(tmp_path), *sizes])
    train()
    result = json.loads((tmp_path / "evaluation_dit" / "evaluation.json").read_text())
    assert result["text"]["colour"]["total"] == result["image"]["kept"]["total"] == 1
    assert (tmp_path / "evaluation_dit" / "text_1.png").is_file()
