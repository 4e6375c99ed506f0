"""Fine-tuning on a folder of videos: every command of docs/fine-tuning.md once, at toy size, from clips to the
weights of a render; and what is refused.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from model.checkpoint import load_dit
from model.errors import InputError
from model.lora import load_lora
from model.train.__main__ import main as train
from model.train.clips import Cut, build_clips, captioned_videos, read_clips
from model.train.curve import Curve, read_points
from model.train.dit import draw_batch, flow_loss
from model.train.films import Cache
from model.train.finetune import PreparedPrompts, checkpoint_generator
from tests.test_train import awake, quiet, stop_after

PAGE = Path(__file__).resolve().parent.parent / "docs" / "fine-tuning.md"
COLOURS = {"dawn": (200, 90, 40), "dusk": (40, 60, 160)}
CUT = Cut(frames=9, fps=15.0, height_px=32, width_px=32)


def write_video(file: Path, colour: tuple[int, int, int], frames: int = 20) -> None:
    """A bar of a colour that moves over black, 64x48 at 15 fps."""
    writer = imageio_ffmpeg.write_frames(str(file), (64, 48), fps=15, quality=9, macro_block_size=1)
    writer.send(None)
    for index in range(frames):
        frame = np.zeros((48, 64, 3), np.uint8)
        frame[:, 2 * index : 2 * index + 12] = colour
        writer.send(frame)
    writer.close()


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two captioned videos, of which each is cut into two clips of 9 frames."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, colour in COLOURS.items():
        write_video(folder / f"{name}.mp4", colour)
        (folder / f"{name}.txt").write_text(f"a bar at {name}\n")
    return folder


class Echo:
    """An autoencoder whose calls are counted, in the place of a slow one."""

    temporal_factor, spatial_factor = 4, 8

    def __init__(self) -> None:
        self.calls = 0
        self.weight = torch.zeros(1)

    def parameters(self):
        return iter([self.weight])

    def encode_stream(self, chunks):
        self.calls += 1
        video = torch.cat(list(chunks), 2)
        yield video.mean(1, keepdim=True)[:, :, ::4, ::8, ::8].expand(-1, 16, -1, -1, -1)


def test_clips_have_the_size_length_and_colour_they_should(videos: Path) -> None:
    clips = list(read_clips(videos / "dawn.mp4", CUT))
    assert [tuple(clip.shape) for clip in clips] == [(9, 32, 32, 3)] * 2
    bar = clips[0][4].reshape(-1, 3).float()
    assert (bar[bar.sum(1) > 150].mean(0) - torch.tensor([200.0, 90.0, 40.0])).abs().max() < 30
    assert not torch.equal(clips[0], clips[1])


def test_a_cache_grows_and_takes_new_captions_without_encoding_again(videos: Path, tmp_path: Path) -> None:
    vae, cache = Echo(), tmp_path / "clips_9"
    assert build_clips(vae, cache, captioned_videos(videos)[:1], CUT, quiet) == 2
    assert build_clips(vae, cache, captioned_videos(videos), CUT, quiet) == 4
    assert vae.calls == 4
    (videos / "dawn.txt").write_text("another caption")
    build_clips(vae, cache, captioned_videos(videos), CUT, quiet)
    assert vae.calls == 4
    loaded = Cache(cache)
    assert {loaded.caption(index) for index in range(len(loaded))} == {"another caption", "a bar at dusk"}
    assert not loaded.cover(0, 3).any()
    assert loaded.steady(0)


def test_captions_may_come_in_a_table(videos: Path, tmp_path: Path) -> None:
    table = tmp_path / "captions.parquet"
    pq.write_table(pa.table({"file": ["dusk.mp4", "dawn.mp4"], "caption": ["two", "one"], "more": [1, 2]}), table)
    assert [(video.name, caption) for video, caption in captioned_videos(videos, table)] == [
        ("dawn.mp4", "one"),
        ("dusk.mp4", "two"),
    ]


def test_what_does_not_match_or_decode_is_named(videos: Path, tmp_path: Path) -> None:
    (videos / "dawn.txt").unlink()
    with pytest.raises(InputError, match=r"dawn\.mp4: has no caption"):
        captioned_videos(videos)
    table = tmp_path / "captions.parquet"
    pq.write_table(pa.table({"file": ["dusk.mp4", "noon.mp4"], "caption": ["a", "b"]}), table)
    with pytest.raises(InputError, match=r"(?s)dawn\.mp4: has no.*noon\.mp4: is captioned but not"):
        captioned_videos(videos, table)
    (videos / "dusk.mp4").write_bytes(b"no film at all")
    with pytest.raises(InputError, match=r"dusk\.mp4: is no MP4"):
        list(read_clips(videos / "dusk.mp4", CUT))
    broken = (videos / "dawn.mp4").read_bytes()
    (videos / "dawn.mp4").write_bytes(broken[: len(broken) // 3])
    with pytest.raises(InputError, match=r"dawn\.mp4: cannot be decoded"):
        list(read_clips(videos / "dawn.mp4", CUT))


def test_a_video_shorter_than_a_clip_is_refused(videos: Path, tmp_path: Path) -> None:
    cut = Cut(frames=93, fps=15.0, height_px=32, width_px=32)
    with pytest.raises(InputError, match="shorter than one clip of 93 frames"):
        build_clips(Echo(), tmp_path / "clips", captioned_videos(videos), cut, quiet)


def test_gradient_checkpointing_changes_no_gradient(tiny_checkpoint: Path, videos: Path, tmp_path: Path) -> None:
    build_clips(Echo(), tmp_path / "clips", captioned_videos(videos), CUT, quiet)
    cache = Cache(tmp_path / "clips")
    generator = awake(checkpoint_generator(tiny_checkpoint, ["a bar at dawn", "a bar at dusk"], "cpu"))
    generator.dit.requires_grad_(True)
    gradients = []
    for checkpointing in (False, True):
        generator.dit.gradient_checkpointing = checkpointing
        generator.dit.zero_grad()
        batch = draw_batch(cache, random.Random(3), 2, 3)
        flow_loss(generator, batch, torch.Generator().manual_seed(0)).backward()
        gradients.append({name: p.grad.clone() for name, p in generator.dit.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_prompts_are_encoded_once(tiny_checkpoint: Path) -> None:
    generator = checkpoint_generator(tiny_checkpoint, ["a red circle"], "cpu")
    assert isinstance(generator.prompter, PreparedPrompts)
    states, mask = generator.prompter(["", "a red circle", ""])
    assert len(states) == len(mask) == 3
    assert torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[1])


def test_a_curve_goes_on_from_the_saved_step(tmp_path: Path) -> None:
    curve = Curve(tmp_path / "dit.losses", 0)
    for step, loss in ((50, 2.0), (100, 1.0), (150, float("nan"))):
        curve.add(step, loss)
    again = Curve(tmp_path / "dit.losses", 100)
    again.add(150, 0.5)
    assert read_points(tmp_path / "dit.losses.csv") == [(50, 2.0), (100, 1.0), (150, 0.5)]
    drawn = np.asarray(Image.open(tmp_path / "dit.losses.png"))
    assert (np.abs(drawn.astype(int) - (52, 88, 168)).max(axis=2) < 8).sum() > 300


# ------------------------------------------------------------------------------------ the page, command by command

CHECKPOINT = "checkpoints/LongCat-Video"
TOY = {
    "my-clips": "videos",
    "--frames 93": "--frames 9",
    "--size 480x832": "--size 32x32",
    "--steps 2000": "--steps 2",
    "--steps 500": "--steps 2",
    "--sheet-every 250": "--sheet-every 1",
    "--rank 64": "--rank 2",
}


def commands_of_the_page() -> list[str]:
    """Every command in the page's code blocks, continued lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "model.train"]:
        monkeypatch.setattr("sys.argv", ["model.train", *words[3:], "--device", "cpu"])
        train()
        return
    assert words[0] == "longtake"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", *words[1:]],
        env=environment | {"PYTHONPATH": str(PAGE.parent.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.ray
def test_every_command_of_the_page_runs(
    tiny_checkpoint: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(videos.parent)
    commands = commands_of_the_page()
    assert [c.split()[3] if c.startswith("python") else c.split()[1] for c in commands] == [
        "clips",
        "lora",
        "plan",
        "render",
        "distill",
        "distill",
    ]
    storyboard = re.search(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert storyboard is not None
    text = storyboard[1].replace(CHECKPOINT, str(tiny_checkpoint)).replace("duration: 20s", "duration: 1s")
    Path("film.yaml").write_text(text)
    for command in commands:
        for real, toy in TOY.items():
            command = command.replace(real, toy)
        run(command.replace(CHECKPOINT, str(tiny_checkpoint)), monkeypatch)
    assert len(list(Path().glob("**/dawn*.mp4"))) > 1, "besides the clip there is a film"
    for name in ("dawn-and-dusk", "cfg_step_lora"):
        lora = load_lora(Path("run/lora") / f"{name}.safetensors")
        assert any(bool(up.any()) for layer in lora.layers.values() for up in layer.ups), name
        load_dit(tiny_checkpoint, device="cpu", dtype=torch.float32, loras=[(f"run/lora/{name}.safetensors", 1.0)])
    assert Path("run/dawn-and-dusk.losses.png").is_file()
    assert sorted(file.name for file in Path("run/sheets").glob("dawn-and-dusk_*.png"))
    assert json.loads(next(Path("run/clips_9").glob("*.json")).read_text())


@pytest.mark.slow
def test_a_lora_resumes_exactly(
    tiny_checkpoint: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = "python -m model.train {} --folder run --frames 9 --checkpoint " + str(tiny_checkpoint)
    run(command.format("clips") + " --videos videos --size 32x32", monkeypatch)
    lora = command.format("lora") + " --steps 4 --rank 2 --name {}"
    run(lora.format("whole"), monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr("model.train.loop.Plan.save_every", 2)
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(lora.format("parted"), patch)
    run(lora.format("parted"), monkeypatch)
    whole, parted = (Path(f"run/lora/{name}.safetensors").read_bytes() for name in ("whole", "parted"))
    assert whole == parted
