"""The studies' own mechanisms: what each variant hands on, fixes or merges, and that a study goes on where it was."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.generate import Models, RefineRequest, refine_window
from model.pixels import frames_to_video, video_to_frames
from pipeline.params import noise_seeds
from tests.studies import handoff, refinement
from tests.studies.films import Studio, cached, films, markdown, mean_of, open_studio
from tests.studies.handoff import Ended, colours_of, pull_colours
from tests.studies.refinement import VARIANTS, Refinery
from tests.test_actors import Studio as Renderer

WINDOWS = 3


@pytest.fixture(scope="module")
def studio(tiny_checkpoint: Path) -> Studio:
    return open_studio(tiny_checkpoint, "fp32")


@pytest.fixture(scope="module")
def refinery(studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> Refinery:
    frames = studio.grid.segment_frames + (WINDOWS - 1) * studio.grid.new_frames
    source = torch.Generator().manual_seed(0)
    stage_one = torch.randint(0, 256, (frames, *studio.stage_one_px, 3), dtype=torch.uint8, generator=source)
    return Refinery(studio, studio.load_refine(), stage_one, "film", WINDOWS, tmp_path_factory.mktemp("film"))


@pytest.fixture(scope="module")
def chain_models(studio: Studio) -> Models:
    return studio.load_chain()


def overlap(refinery: Refinery, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What two neighbouring windows hold of the frames they share."""
    hop, count = refinery.grid.window_hop_latents, refinery.grid.merge_latents
    return left[:, :, hop + 1 : hop + 1 + count], right[:, :, 1 : 1 + count]


@pytest.mark.parametrize("variant", ["chained", "shared, pixels", "anchored", "anchored, both"])
def test_every_way_shows_each_frame_of_the_film_once(refinery: Refinery, variant: str) -> None:
    shown = [len(frames[start:stop]) for frames, start, stop in VARIANTS[variant][0](refinery)]
    seams = list(refinement.seams_of(refinery, variant))
    assert sum(shown) == (WINDOWS - 1) * refinery.grid.window_hop + refinery.grid.window_reach + 1
    # A mixed overlap begins earlier than its middle, which is what counts as its seam.
    expected = [12, 12] if variant == "shared, pixels" else [0, 0]
    assert [seam - sum(shown[: i + 1]) for i, seam in enumerate(seams)] == expected


def test_neighbours_in_lockstep_hold_the_same_where_they_overlap_and_alone_they_do_not(refinery: Refinery) -> None:
    states = refinery.lockstep()
    left, right = overlap(refinery, states[0], states[1])
    assert torch.equal(left, right)
    alone_left, alone_right = overlap(refinery, refinery.shared(0), refinery.shared(1))
    assert not torch.allclose(alone_left, alone_right, atol=1e-3)
    assert not torch.allclose(states[0], refinery.shared(0), atol=1e-3)


def test_shared_noise_is_the_same_where_windows_overlap_and_independent_noise_is_not(refinery: Refinery) -> None:
    assert torch.equal(*overlap(refinery, refinery.noise(0, 0), refinery.noise(1, 0)))
    own = [refinery.noise(i, 0, own=True) for i in (0, 1)]
    assert not torch.equal(*overlap(refinery, *own))


def test_one_step_after_another_is_what_all_steps_at_once_are(refinery: Refinery) -> None:
    x = refinery.start(0)
    for number in range(refinery.schedule.steps):
        x = refinery.step(x, number)
    assert torch.allclose(x, refinery.shared(0), atol=1e-5)


def test_a_window_between_two_keeps_the_latents_of_its_right_neighbour(refinery: Refinery) -> None:
    tail = refinery.shared_frames(0)[refinery.tail]
    _, right = overlap(refinery, refinery.shared(1), refinery.shared(2))
    front = refinery.grid.window_shape(len(tail)).front_latents
    held = refinery.between(1, tail, right)[:, :, front:]
    free = refinery.between(1, tail, None)[:, :, front:]
    assert torch.equal(*overlap(refinery, held, refinery.shared(2)))
    assert not torch.allclose(*overlap(refinery, free, refinery.shared(2)), atol=1e-3)
    # What is held is seen by the frames before it: those in the same block of tokens at least, whatever else the
    # block-sparse attention picks.
    before = refinery.grid.window_hop_latents + 1
    assert not torch.equal(held[:, :, :before], free[:, :, :before])


def test_a_window_in_a_chain_begins_with_the_latents_of_the_refined_frames(refinery: Refinery) -> None:
    tail = refinery.shared_frames(0)[refinery.tail]
    x, given = refinery.start_after(1, tail)
    assert given == 8
    assert torch.equal(refinery.between(1, tail, None)[:, :, :given], x[:, :, :given])


def test_a_window_in_a_chain_is_the_one_that_the_renderer_makes(refinery: Refinery) -> None:
    studio, grid = refinery.studio, refinery.grid
    tail = refinery.shared_frames(0)[refinery.tail]
    shape = grid.window_shape(len(tail))
    first = grid.window_hop_latents - shape.front_latents
    noise = {"seed": 0, "noise_id": "film", "stage": "two", "first_latent": first, "count": shape.latents, "redo": 0}
    text = studio.condition("")
    request = RefineRequest(
        stage_one=refinery.stage_one[grid.new_frames : grid.new_frames + grid.segment_frames],
        times=[min(j / grid.ratio, grid.segment_frames - 1.0) for j in range(shape.frames)],
        height_px=studio.refined_px[0],
        width_px=studio.refined_px[1],
        cond_frames=tail,
        noise_seeds=noise_seeds(noise),
        text=text.text[0],
        text_mask=text.mask[0],
        schedule=refinery.schedule,
    )
    rendered = refine_window(refinery.models, request)
    assert torch.equal(rendered.latents, refinery.between(1, tail, None)[0])
    assert rendered.front_frames == refinery.padding(len(tail))


# ------------------------------------------------------------------------------------------------------ the hand-off


@pytest.fixture(scope="module")
def ended(studio: Studio, chain_models: Models) -> Ended:
    x = torch.randn(1, 16, studio.grid.segment_latents, *studio.latent_px(studio.stage_one_px))
    video = handoff.decode(chain_models, x)
    return Ended(x, video, colours_of(video[:, :, :45]))


def test_truncated_levels_are_darker_by_half_a_level_and_rounded_ones_are_not() -> None:
    video = torch.linspace(-0.9, 0.9, 4000).view(1, 1, 1, 40, 100).expand(1, 3, 1, 40, 100)
    darker = (frames_to_video(handoff.truncate(video)) - video).mean() * 127.5
    rounded = (frames_to_video(video_to_frames(video)) - video).mean() * 127.5
    assert darker == pytest.approx(-0.5, abs=0.02)
    assert rounded == pytest.approx(0.0, abs=0.02)


def test_latents_are_handed_on_as_they_are_but_for_the_first(ended: Ended, chain_models: Models) -> None:
    given = handoff.latents(chain_models, ended, 13)
    assert given.shape[2] == 4
    assert torch.equal(given[:, :, 1:], ended.latents[:, :, -3:])
    # Of one frame and of thirteen: convolutions of other sizes may sum in another order.
    torch.testing.assert_close(given[:, :, :1], handoff.pixels(chain_models, ended, 13)[:, :, :1], atol=1e-4, rtol=1e-4)


def test_every_hand_off_conditions_the_segment_that_follows(
    studio: Studio, chain_models: Models, tmp_path: Path
) -> None:
    handed: list[torch.Tensor] = []

    def marked(models: Models, ended: Ended, count: int) -> torch.Tensor:
        handed.append(torch.full((1, 16, 4, *ended.latents.shape[3:]), 0.25))
        return handed[-1]

    new = list(handoff.chain(studio, chain_models, "a red circle", "film", 200, marked, tmp_path / "marked"))
    plain = list(handoff.chain(studio, chain_models, "a red circle", "film", 200, handoff.pixels, tmp_path / "plain"))
    assert [len(frames) for frames in new] == [93, 80, 27]
    assert len(handed) == 2
    assert torch.equal(new[0], plain[0])
    assert not torch.equal(new[1], plain[1])


@pytest.mark.parametrize("variant", ["latents", "pixels"])
def test_the_renderer_hands_on_what_the_study_calls_latents(
    studio: Studio, chain_models: Models, tiny_checkpoint: Path, tmp_path: Path, variant: str
) -> None:
    prompt, hand_on = "a red circle", handoff.VARIANTS[variant]
    list(handoff.chain(studio, chain_models, prompt, "film", 200, hand_on, tmp_path / "study"))
    studied = [load_file(file)["latents"] for file in sorted((tmp_path / "study").glob("*.safetensors"))]
    shot = {"id": "film", "duration": "200f", "prompt": prompt}
    spec = {"seed": 0, "refinement": "none", "output": {"aspect": "1:1"}, "shots": [shot]}
    renderer = Renderer(tmp_path, tiny_checkpoint, spec)
    renderer.run_all("text", "segment")
    rendered = [renderer.tensors(task.id)["latents"] for task in renderer.of("segment")]
    kept = studied[0].shape[2]
    same = [torch.equal(a[0], b[:, -kept:]) for a, b in zip(studied, rendered, strict=True)]
    assert same == ([True] * 3 if variant == "latents" else [True, False, False])


def test_the_anchor_pulls_colours_as_far_as_its_strength_says(ended: Ended) -> None:
    video = ended.video[:, :, -13:] * 0.3
    wanted = handoff.Colours(torch.tensor([55.0, 4.0, -3.0]), colours_of(video).spread * 0.9)
    before = colours_of(video)
    half, whole = (colours_of(pull_colours(video, wanted, strength)) for strength in (0.5, 1.0))
    assert torch.allclose(pull_colours(video, wanted, 0.0), video, atol=1e-5)
    assert torch.allclose(whole.mean, wanted.mean, atol=0.3)
    assert torch.allclose(half.mean, (before.mean + wanted.mean) / 2, atol=0.3)
    assert torch.allclose(whole.spread, wanted.spread, rtol=0.03)


# ------------------------------------------------------------------------------------------------- figures and files


def test_a_study_goes_on_where_it_was(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--checkpoint", str(tiny_checkpoint), "--films", "2", "--minutes", "0.15", "--dtype", "fp32"]
    command += ["--out", str(tmp_path), "--variants", "pixels", "truncated"]
    handoff.main(command)
    first = capsys.readouterr().out
    files = sorted(tmp_path.rglob("*.json"))
    assert len(files) == 4
    stamps = [file.stat().st_mtime_ns for file in files[1:]]
    segments = sorted((files[0].parent / "pixels").glob("*.safetensors"))
    assert len(segments) == 2
    kept_stamp = segments[0].stat().st_mtime_ns
    files[0].unlink()
    segments[1].unlink()
    handoff.main(command)
    assert capsys.readouterr().out == first
    assert [file.stat().st_mtime_ns for file in files[1:]] == stamps
    assert segments[0].stat().st_mtime_ns == kept_stamp
    assert segments[1].exists()
    assert "| truncated |" in first


def test_a_result_that_could_not_be_made_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> dict[str, float]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        cached(tmp_path / "a" / "b.json", fail)
    assert cached(tmp_path / "a" / "b.json", lambda: {"x": 1.0}) == {"x": 1.0}
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": 1.0}


def test_a_mean_has_the_interval_of_students_t() -> None:
    mean = mean_of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean.value, mean.low) == pytest.approx((3.0, 3.0 - 2.776 * math.sqrt(2.5 / 5)))
    assert mean_of([1.0]).high == math.inf


def test_the_refinement_table_compares_with_the_chained_film_and_with_the_inside() -> None:
    def result(score: float) -> dict[str, object]:
        seam = {"score": score, "around": score + 1, "inside": 1.0, "verdict": "unseen"}
        drift = {name: {"change": 0.5} for name in ("colour_distance", "sharpness")}
        return {"seams": [seam, {**seam, "score": score + 0.2}], "sharpness": 10.0, "drift": drift}

    text = refinement.table({"chained": [result(1.0)] * 2, "lockstep": [result(1.5)] * 2})
    chained, lockstep = (line.split(" | ") for line in text.splitlines()[2:])
    assert chained[4:7] == ["", "", "0.10 [-0.08, 0.28]"]
    assert lockstep[4] == "0.50 [0.50, 0.50]"
    assert lockstep[8] == "1.00 [1.00, 1.00]"


def test_the_hand_off_table_compares_seams_and_drift_with_pixels() -> None:
    def result(score: float, drift: float) -> dict[str, object]:
        seam = {"score": score, "inside": 2.0, "verdict": "faint"}
        names = ("colour_distance", "saturation", "sharpness", "contrast")
        return {
            "seams": [seam, {**seam, "score": score + 0.2, "verdict": "unseen"}],
            "drift": {name: {"change": drift} for name in names},
            "ends": {"lightness_mean": [50.0, 49.0]},
            "right": dict.fromkeys(handoff.MEASURES, 0.5),
        }

    text = handoff.table({"pixels": [result(5.0, 2.0)] * 2, "latents": [result(3.0, 1.5)] * 2})
    pixels, latents = (line.split(" | ") for line in text.splitlines()[2:])
    assert pixels[6:10] == ["", "2 of 4", "3.10 [2.92, 3.28]", ""]
    assert latents[1] == "-1.00 [-1.00, -1.00]"
    assert [latents[6], latents[9]] == ["-0.50 [-0.50, -0.50]", "-2.00 [-2.00, -2.00]"]
    assert latents[10] == "50 / 50 / 50 |"


def test_films_of_a_study_do_not_depend_on_how_many_there_are() -> None:
    assert [film.prompt for film in films(2)] == [film.prompt for film in films(5)][:2]
    assert markdown(["a"], [["1"]]) == "| a |\n| --- |\n| 1 |"
