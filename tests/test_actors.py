"""Actors without a cluster: plain classes that are given orders as the orchestrator would give them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import wave
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from actors import make_actor
from actors.base import ActorContext, mapped_errors
from actors.denoising import load_models
from actors.frames import blend, merged_latents, piece_frames
from cluster.probe import probe_facts
from cluster.recipe import Recipe, make_plan
from model import errors as model_errors
from model.checkpoint import load_vae
from model.pixels import encode_frames
from model.vae import VAE
from pipeline.errors import (
    CheckpointFault,
    CorruptArtifact,
    DeviceError,
    Interrupted,
    OutOfMemory,
    QualityError,
    StoreFull,
)
from pipeline.facts import CheckpointFacts, Facts, MediaFacts, load_render_facts
from pipeline.media import FrameEncoder, find_ffmpeg, probe, verify_video
from pipeline.plan import Plan
from pipeline.spec import Memory, Storyboard, parse_spec
from pipeline.store import LocalStore, open_store
from pipeline.tasks import ArtifactFile, Order, Produced, Role, Task

SPEC: dict[str, Any] = {
    "title": "Actors",
    "seed": 3,
    "output": {"crf": 45},
    "shots": [{"id": "one", "duration": "7s", "prompt": "a red circle moves left"}],
}


class Studio:
    """Runs a plan's tasks one after the other, in this process."""

    def __init__(self, root: Path, checkpoint: Path, spec: Mapping[str, Any], **facts: Any) -> None:
        self.store, self.checkpoint, self.scratch = LocalStore(root / "store"), checkpoint, root / "scratch"
        self.spec: Storyboard = parse_spec(json.dumps(spec))
        known = CheckpointFacts(str(checkpoint), "0" * 64, load_render_facts(checkpoint))
        self.plan: Plan = make_plan(Recipe(self.spec, Facts(checkpoint=known, **facts)))
        self.done: dict[str, Produced] = {}
        self.orders = 0

    def context(self, role: Role, **more: Any) -> ActorContext:
        return ActorContext(
            store=open_store(self.store.url),
            checkpoint_path=self.checkpoint,
            role=role,
            weights=self.plan.weights.get(role),
            device="cpu",
            dtype=torch.float32,
            ffmpeg=find_ffmpeg(),
            encoder_threads=1,
            scratch_path=self.scratch,
            **more,
        )

    def order(self, task: Task, **changes: Any) -> Order:
        self.orders += 1
        inputs = {name: self.done[name].files for name in task.inputs}
        order = Order(task, self.orders, 1, inputs, f"attempts/{task.id}/{self.orders:04d}-1")
        return dataclasses.replace(order, **changes)

    def run(self, task: Task, role: Role | None = None, **more: Any) -> Produced:
        actor = make_actor(role or task.role)
        actor.setup(self.context(role or task.role, **more))
        return actor.run(self.order(task))

    def run_all(self, *kinds: str) -> None:
        for task in self.plan.tasks.values():
            if task.kind in kinds and task.id not in self.done:
                self.done[task.id] = self.run(task)

    def tensors(self, task_id: str) -> dict[str, torch.Tensor]:
        return load_file(self.store.open_local(self.done[task_id].files[0], self.scratch))

    def of(self, kind: str) -> list[Task]:
        return [task for task in self.plan.tasks.values() if task.kind == kind]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Studio:
    """A refined film of two windows, rendered up to its windows."""
    torch.set_num_threads(1)
    made = Studio(tmp_path_factory.mktemp("studio"), tiny_checkpoint, SPEC)
    made.run_all("text", "segment", "window")
    return made


@pytest.fixture(scope="module")
def vae(tiny_checkpoint: Path) -> VAE:
    return load_vae(tiny_checkpoint, device="cpu", dtype=torch.float32)


def test_text_is_one_prompt_with_its_mask(studio: Studio) -> None:
    tensors = studio.tensors(studio.of("text")[0].id)
    assert tensors["text"].shape[0] == 1
    assert tensors["text"].shape[1:2] == tensors["mask"].shape
    assert 1 < int(tensors["mask"].sum()) < 10


def test_segments_hand_their_last_latents_forward_and_the_frame_before_them(studio: Studio, vae: VAE) -> None:
    before, after = (studio.tensors(task.id) for task in studio.of("segment"))
    assert before["latents"].shape == (16, 24, 4, 8)
    assert (before["tail"].shape, before["tail"].dtype) == ((13, 32, 64, 3), torch.uint8)
    assert torch.equal(after["latents"][:, 1:4], before["latents"][:, -3:])
    assert torch.equal(after["latents"][:, :1], encode_frames(vae, before["tail"][:1]))


def test_a_segment_is_the_same_on_the_actor_that_made_the_one_before(studio: Studio) -> None:
    """Elsewhere they are made by an actor each: the chain may stay or move."""
    actor = make_actor("chain")
    actor.setup(studio.context("chain"))
    for task in studio.of("segment"):
        assert actor.run(studio.order(task)).files[0].sha256 == studio.done[task.id].files[0].sha256


@pytest.mark.parametrize(("frames", "handed"), [(97, "latents"), (98, "frames")])
def test_a_shot_that_continues_one_that_is_trimmed_begins_with_its_last_shown_frames(
    tmp_path: Path, tiny_checkpoint: Path, vae: VAE, frames: int, handed: str
) -> None:
    shots = [{"id": "a", "duration": f"{frames}f", "prompt": "a star"}]
    shots.append({"id": "b", "duration": "9f", "prompt": "a red star", "continue": "previous"})
    studio = Studio(tmp_path, tiny_checkpoint, {**SPEC, "refinement": "none", "shots": shots})
    assert studio.plan.shots[1].goes_on_from == handed
    studio.run_all("text", "segment")
    first, second, third = (studio.tensors(task.id)["latents"] for task in studio.of("segment"))
    # Frame 93 is the second segment's 13th, and so begins its latent 4. The last 13 frames shown begin in the first.
    shown = torch.cat([piece_frames(vae, {"latents": first}, 0, 93), piece_frames(vae, {"latents": second}, 13, 93)])
    last = shown[frames - 13 : frames]
    if handed == "latents":
        assert torch.equal(third[:, 1:4], torch.cat([first[:, 22:24], second[:, 4:5]], dim=1))
        assert torch.allclose(third[:, :1], encode_frames(vae, last[:1]), atol=1e-2)
    else:
        # Pieces of clips are decoded by other sums, so that a pixel may be rounded the other way.
        assert torch.allclose(third[:, :4], encode_frames(vae, last), atol=1e-2)


def test_the_tail_is_the_end_of_what_the_latents_decode_to(studio: Studio, vae: VAE) -> None:
    tensors = studio.tensors(studio.of("segment")[0].id)
    tail = piece_frames(vae, tensors, 80, 93)
    decoded = piece_frames(vae, {"latents": tensors["latents"]}, 80, 93)
    assert torch.equal(tail, tensors["tail"])
    assert (tail.int() - decoded.int()).abs().max() <= 1


def test_windows_refine_to_the_planned_latents(studio: Studio) -> None:
    for task in studio.of("window"):
        latents = studio.tensors(task.id)["latents"]
        assert latents.shape == (16, task.params["latents"], 8, 16)
        assert latents.dtype == torch.float32


@pytest.mark.parametrize("role", ["media", "chain", "refine"])
def test_units_are_the_same_bytes_on_whatever_role_encodes_them(studio: Studio, role: Role) -> None:
    task = studio.of("encode")[0]
    produced = studio.run(task, role)
    reference = studio.done.setdefault(task.id, produced)
    assert produced.files[0].sha256 == reference.files[0].sha256
    info = probe(studio.store.open_local(produced.files[0], studio.scratch), find_ffmpeg())
    assert info.frame_count == task.params["frames"] == produced.measures["frames"]
    assert (info.height_px, info.width_px) == (64, 128)


def test_the_film_has_every_planned_frame(studio: Studio) -> None:
    studio.run_all("encode", "film")
    film = studio.done[studio.plan.film_task_id]
    path = studio.store.open_local(film.files[0], studio.scratch)
    assert studio.plan.film_frames == 210
    verify_video(path, frames=210, size_px=(64, 128), fps=Fraction(30), ffmpeg=find_ffmpeg())


def test_scratch_is_empty_after_each_order(studio: Studio) -> None:
    studio.run(studio.of("text")[0])
    assert not list(studio.scratch.iterdir())


def test_progress_counts_steps_and_frames(studio: Studio) -> None:
    seen: list[tuple[int, int]] = []
    studio.run(studio.of("segment")[0], report=lambda steps, frames: seen.append((steps, frames)))
    assert seen == [(step, 0) for step in range(1, 17)]
    seen.clear()
    task = studio.of("encode")[0]
    studio.run(task, "media", report=lambda steps, frames: seen.append((steps, frames)))
    assert [frames for _, frames in seen][-1] == task.params["frames"]


def _stop_after(steps: int, stop: Event) -> Callable[[int, int], None]:
    def report(done: int, frames: int) -> None:
        if done == steps:
            stop.set()

    return report


@pytest.mark.parametrize("kind", ["segment", "window"])
def test_a_stopped_denoising_goes_on_from_its_saved_step_bit_for_bit(studio: Studio, kind: str) -> None:
    task = studio.of(kind)[1]
    stop, saved = Event(), []
    context = studio.context(
        task.role,
        stop=stop,
        report=_stop_after(2, stop),
        saved=lambda file, steps: saved.append((file, steps)),
    )
    actor = make_actor(task.role)
    actor.setup(context)
    with pytest.raises(Interrupted):
        actor.run(studio.order(task))
    ((partial, steps),) = saved
    assert steps == 2
    assert partial.path.startswith(f"partials/{task.id}/")

    steps_done: list[int] = []
    resumed = make_actor(task.role)
    resumed.setup(studio.context(task.role, report=lambda done, frames: steps_done.append(done)))
    produced = resumed.run(studio.order(task, partial=partial))
    assert steps_done[0] == 3
    assert produced.files[0].sha256 == studio.done[task.id].files[0].sha256


def test_long_denoising_saves_every_so_often(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.denoising.SAVE_EVERY_S", 0.0)
    saved: list[int] = []
    studio.run(studio.of("segment")[0], saved=lambda file, steps: saved.append(steps))
    assert saved == list(range(1, 16))


def test_a_damaged_saved_state_is_reported_as_corrupt(studio: Studio) -> None:
    task = studio.of("segment")[0]
    partial = studio.store.write_attempt(f"partials/{task.id}/0001-1-0002.safetensors", b"not tensors")
    actor = make_actor("chain")
    actor.setup(studio.context("chain"))
    with pytest.raises(CorruptArtifact):
        actor.run(studio.order(task, partial=dataclasses.replace(partial, sha256="0" * 64)))


def test_an_input_with_other_bytes_than_recorded_is_refused(studio: Studio) -> None:
    task = studio.of("window")[0]
    order = studio.order(task)
    name = task.inputs[1]
    lie = tuple(dataclasses.replace(file, sha256="0" * 64) for file in order.inputs[name])
    actor = make_actor("refine")
    actor.setup(studio.context("refine"))
    with pytest.raises(CorruptArtifact):
        actor.run(dataclasses.replace(order, inputs={**order.inputs, name: lie}))


def test_a_full_disk_fails_loudly_and_leaves_no_short_file(studio: Studio) -> None:
    task = studio.of("segment")[0]
    actor = make_actor("chain")
    actor.setup(studio.context("chain"))
    order = studio.order(task)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StoreFull):
            actor.run(order)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not studio.store.list(order.attempt_path)
    assert not list(studio.scratch.iterdir())


def test_a_segment_that_shows_one_flat_colour_is_refused(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    def grey(vae: object, latents: torch.Tensor, start: int, stop: int) -> Any:
        yield torch.full((stop - start, 32, 64, 3), 127, dtype=torch.uint8)

    monkeypatch.setattr("actors.chain.decode_range", grey)
    with pytest.raises(QualityError, match=r"one/segment/0.*flat"):
        studio.run(studio.of("segment")[0])


@pytest.mark.parametrize(
    ("raised", "mapped"),
    [
        (model_errors.CheckpointError("x", ["dit.a: missing"]), CheckpointFault),
        (model_errors.NumericsError("x"), QualityError),
        (torch.OutOfMemoryError("x"), OutOfMemory),
        (MemoryError(), OutOfMemory),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), DeviceError),
        (torch.distributed.DistBackendError("NCCL error"), DeviceError),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), DeviceError),
    ],
)
def test_model_errors_become_pipeline_errors(raised: Exception, mapped: type[Exception]) -> None:
    with pytest.raises(mapped), mapped_errors():
        raise raised


def test_merged_overlaps_are_equal_from_both_sides() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = ({"latents": torch.randn(16, 48, 2, 2, generator=generator)} for _ in range(2))
    to_later = {"input": 1, "here": 41, "there": 1, "count": 6, "earlier": False}
    to_earlier = {"input": 0, "here": 1, "there": 41, "count": 6, "earlier": True}
    left = merged_latents([a, b], 0, [to_later])  # type: ignore[list-item]
    right = merged_latents([a, b], 1, [to_earlier])  # type: ignore[list-item]
    assert torch.equal(left[:, 41:47], right[:, 1:7])
    assert torch.equal(left[:, :41], a["latents"][:, :41])
    assert (left[:, 41] - a["latents"][:, 41]).abs().mean() < (left[:, 41] - b["latents"][:, 1]).abs().mean()


def test_a_crossfade_mixes_and_rounds() -> None:
    black, white = torch.zeros(2, 2, 3, dtype=torch.uint8), torch.full((2, 2, 3), 255, dtype=torch.uint8)
    assert torch.equal(blend(black, white, 0.0), black)
    assert torch.equal(blend(black, white, 1.0), white)
    assert set(blend(black, white, 0.5).flatten().tolist()) == {128}


def test_an_image_shot_starts_from_the_image(tmp_path: Path, tiny_checkpoint: Path) -> None:
    picture = tmp_path / "start.png"
    Image.fromarray(np.full((40, 80, 3), (200, 30, 60), np.uint8)).save(picture)
    spec = {**SPEC, "refinement": "none", "shots": [{**SPEC["shots"][0], "image": str(picture)}]}
    sha256 = hashlib.sha256(picture.read_bytes()).hexdigest()
    media = {str(picture): MediaFacts(str(picture), sha256, "image", 80, 40)}
    studio = Studio(tmp_path, tiny_checkpoint, spec, media=media)
    for name, path in studio.plan.media.items():
        studio.store.write_attempt(name, Path(path))
    studio.run_all("text", "source")
    (source,) = studio.of("source")
    frames = studio.tensors(source.id)["frames"]
    assert frames.shape == (1, 32, 64, 3)
    assert frames[0, 5, 5].tolist() == [200, 30, 60]
    studio.run_all("segment")
    assert studio.tensors(studio.of("segment")[0].id)["latents"].shape == (16, 24, 4, 8)


IN_HOST = Memory(networks="in_turn", condition_cache="host")


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Studio:
    """A film whose second window is conditioned on the first, rendered up to its windows."""
    made = Studio(tmp_path_factory.mktemp("chained"), tiny_checkpoint, {**SPEC, "refinement": "chained"})
    made.run_all("text", "segment", "window")
    return made


@pytest.mark.parametrize("kind", ["segment", "window"])
def test_where_networks_and_conditions_lie_changes_no_byte(chained: Studio, kind: str) -> None:
    conditioned = chained.of(kind)[1]
    again = chained.run(conditioned, memory=IN_HOST)
    assert [file.sha256 for file in again.files] == [file.sha256 for file in chained.done[conditioned.id].files]
    context = chained.context(conditioned.role, memory=IN_HOST)
    assert context.weights is not None
    models = load_models(context, context.weights)
    assert models.turns is not None and models.cache_on_host


@pytest.mark.parametrize("precision", ["weight_only", "int8", "fp8"])
def test_precision_changes_a_segment_by_rounding_alone(studio: Studio, precision: Any) -> None:
    first = studio.of("segment")[0]
    as_stored = studio.tensors(first.id)["latents"]
    made = studio.run(first, memory=Memory(precision=precision))
    latents = load_file(studio.store.open_local(made.files[0], studio.scratch / precision))["latents"]
    error = (latents - as_stored).square().mean().sqrt() / as_stored.std()
    assert 0 < error < (0.05 if precision == "fp8" else 0.02)


def test_a_missing_lora_file_is_a_checkpoint_fault(tmp_path: Path, tiny_checkpoint: Path) -> None:
    studio = Studio(tmp_path, tiny_checkpoint, SPEC)
    weights: Any = {
        **studio.plan.weights["chain"],
        "loras": [{"file": "lora/no.safetensors", "media": None, "strength": 1.0}],
    }
    context = dataclasses.replace(studio.context("chain"), weights=weights)
    with pytest.raises(CheckpointFault, match=r"no\.safetensors"):
        make_actor("chain").setup(context)


EVERY_WAY: dict[str, dict[str, Any]] = {
    "a video continued, then its shot continued, at 24 fps in another shape with sound": {
        "output": {"crf": 45, "fps": 24, "size": "96x96", "fit": "pad", "soundtrack": "sound.wav"},
        "shots": [
            {"id": "on", "duration": "2s", "prompt": "a star", "video": "before.mkv"},
            {"id": "further", "duration": "5s", "prompt": "a red star", "continue": "previous"},
        ],
    },
    "chained refinement from an image, and a frame of that faded in": {
        "refinement": "chained",
        "output": {"crf": 45},
        "shots": [
            {"id": "still", "duration": "7s", "prompt": "a star", "image": "start.png"},
            {"id": "later", "duration": "1s", "prompt": "a circle", "frame_of": {"shot": "still", "at": "1s"},
             "transition": {"crossfade": "10f"}},
        ],
    },
}  # fmt: skip


def _make_media(folder: Path) -> None:
    """before.mkv: 1.5 s at 24 frames/s; start.png; sound.wav: one second of a tone."""
    colours = np.random.default_rng(0).integers(0, 255, (36, 1, 1, 3), np.uint8)
    frames = np.broadcast_to(colours, (36, 48, 80, 3))
    codec: Any = {"codec": "ffv1", "pix_fmt": "yuv444p", "crf": None, "container": "mkv"}
    with FrameEncoder(
        folder / "before.mkv", height_px=48, width_px=80, fps=Fraction(24), codec=codec, ffmpeg=find_ffmpeg()
    ) as encoder:
        encoder.write(frames)
        encoder.close()
    Image.fromarray(np.full((40, 80, 3), (200, 30, 60), np.uint8)).save(folder / "start.png")
    tone = (8000 * np.sin(np.arange(44100) / 20)).astype("<i2")
    with wave.open(str(folder / "sound.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(44100)
        file.writeframes(tone.tobytes())


@pytest.mark.slow
@pytest.mark.parametrize("way", EVERY_WAY)
def test_every_way_to_begin_a_shot_ends_in_the_planned_frames(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.chdir(tmp_path)
    _make_media(tmp_path)
    spec = {"title": "Ways", "seed": 3, "checkpoint": str(tiny_checkpoint), **EVERY_WAY[way]}
    facts = probe_facts(parse_spec(json.dumps(spec)), device="cpu")
    studio = Studio(tmp_path, tiny_checkpoint, spec, media=facts.media)
    for name, path in studio.plan.media.items():
        studio.store.write_attempt(name, Path(path))
    studio.run_all("text", "source", "segment", "window", "encode", "film")
    film = studio.store.open_local(studio.done[studio.plan.film_task_id].files[0], studio.scratch)
    size_px = (96, 96) if "96x96" in str(spec) else (64, 128)
    info = verify_video(
        film, frames=studio.plan.film_frames, size_px=size_px, fps=studio.plan.fps, ffmpeg=find_ffmpeg()
    )
    assert info.has_audio == ("soundtrack" in spec["output"])
    assert studio.plan.film_frames == (168 if "96x96" in str(spec) else 230)


def test_artifacts_name_the_bytes_they_are(studio: Studio) -> None:
    for produced in studio.done.values():
        file: ArtifactFile = produced.files[0]
        assert studio.store.digest(file.path) == (file.sha256, file.size_bytes)
