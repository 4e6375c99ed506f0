"""A folder of videos with captions -> a cache of encoded clips, the same that `films` makes of drawn films.

Captions stand beside the videos (`walk.mp4`, `walk.txt`) or in a Parquet table with the columns `file` and `caption`.
Every video is brought to one frame rate and one size (scaled to cover it, cut in the middle) and split into clips of
equal length; what is left at its end is dropped. A shard is named by the content of its video and by the cut, so a
cache grows, resumes and takes changed captions without encoding anything again.

ffmpeg runs as a child process with a time limit. It reads the video through a link with a name of its own, with the
demuxer that the file's first bytes call for, and may open nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.digest import file_sha256
from model.errors import InputError
from model.pixels import encode_frames
from model.train.films import write_shard
from model.vae import VAE

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")
LIMIT_S = 600.0
"""Seconds a video may take to decode up to its next clip."""


@dataclass(frozen=True)
class Cut:
    """How clips are cut: frames, frames per second and size in pixels."""

    frames: int
    fps: float
    height_px: int
    width_px: int


def captioned_videos(folder: Path, table: Path | None = None) -> list[tuple[Path, str]]:
    """The videos in `folder` by name with their captions, from `table` or from text files beside them.

    Raises InputError that lists every video without a caption and every caption without a video.
    """
    videos = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not videos:
        raise InputError(f"{folder}: holds no videos ({', '.join(SUFFIXES)})")
    captions = _sidecars(videos) if table is None else _read_table(table)
    problems = [f"{video.name}: has no caption" for video in videos if not captions.get(video.name)]
    names = {video.name for video in videos}
    problems += [f"{name}: is captioned but not in the folder" for name in sorted(captions.keys() - names)]
    if problems:
        raise InputError("\n  ".join([f"{folder}: videos and captions do not match", *problems]))
    return [(video, captions[video.name]) for video in videos]


def _sidecars(videos: list[Path]) -> dict[str, str]:
    files = {video.name: video.with_suffix(".txt") for video in videos}
    return {name: " ".join(file.read_text(encoding="utf-8").split()) for name, file in files.items() if file.is_file()}


def _read_table(table: Path) -> dict[str, str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = pq.read_table(table, columns=["file", "caption"]).to_pydict()
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise InputError(f"{table}: is no Parquet table with the columns file and caption ({error})") from error
    return {str(name): " ".join(str(text or "").split()) for name, text in zip(*columns.values(), strict=True)}


def build_clips(
    vae: VAE, folder: Path, videos: list[tuple[Path, str]], cut: Cut, log: Callable[[str], None] = print
) -> int:
    """Encode the videos into the cache `folder`; returns how many clips it holds. Raises InputError."""
    folder.mkdir(parents=True, exist_ok=True)
    total, wanted = 0, set()
    for number, (video, caption) in enumerate(videos, 1):
        name = f"{file_sha256(video)[:24]}-{cut.height_px}x{cut.width_px}-{cut.frames}-{cut.fps:g}"
        shard = folder / f"{name}.safetensors"
        captions = shard.with_suffix(".json")
        wanted.add(shard)
        if not shard.exists():
            clips = [encode_frames(vae, clip).half().cpu() for clip in read_clips(video, cut)]
            if not clips:
                seconds = cut.frames / cut.fps
                raise InputError(f"{video}: is shorter than one clip of {cut.frames} frames ({seconds:.1f} s)")
            captions.write_text(json.dumps([caption] * len(clips)))
            write_shard(shard, {"latents": torch.stack(clips)})
        count = len(json.loads(captions.read_text()))
        captions.write_text(json.dumps([caption] * count))
        total += count
        log(f"{number}/{len(videos)} {video.name}: {count} clips")
    for stale in set(folder.glob("*.safetensors")) - wanted:
        stale.unlink()
    return total


def read_clips(video: Path, cut: Cut) -> Iterator[Tensor]:
    """Consecutive clips uint8 [frames,h,w,3]. Raises InputError for what is no video or cannot be decoded."""
    size = f"{cut.width_px}:{cut.height_px}"
    filters = f"fps={cut.fps},scale={size}:force_original_aspect_ratio=increase:flags=area,crop={size}"
    with tempfile.TemporaryDirectory() as bench, tempfile.TemporaryFile() as said:
        (Path(bench) / "input").symlink_to(video.resolve())
        child = subprocess.Popen(
            [_ffmpeg(), "-hide_banner", "-v", "error", "-nostdin", "-protocol_whitelist", "file,pipe",
             "-f", _demuxer(video), "-i", "file:input", "-map", "0:v:0", "-vf", filters,
             "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"],
            cwd=bench, stdout=subprocess.PIPE, stderr=said,
        )  # fmt: skip
        try:
            yield from _clips(child, cut)
            if child.wait(LIMIT_S) != 0:
                said.seek(0)
                raise InputError(f"{video}: cannot be decoded: {said.read().decode(errors='replace').strip()[-500:]}")
        finally:
            child.kill()
            child.wait()


def _clips(child: subprocess.Popen[bytes], cut: Cut) -> Iterator[Tensor]:
    shape = (cut.frames, cut.height_px, cut.width_px, 3)
    assert child.stdout is not None
    while True:
        # A child that hangs is ended; its stdout then ends too.
        watch = threading.Timer(LIMIT_S, child.kill)
        watch.start()
        data = child.stdout.read(int(np.prod(shape)))
        watch.cancel()
        if len(data) < np.prod(shape):
            return
        yield torch.from_numpy(np.frombuffer(data, np.uint8).reshape(shape).copy())


def _demuxer(video: Path) -> str:
    """The name of ffmpeg's demuxer for a file, by its first bytes."""
    with video.open("rb") as file:
        head = file.read(12)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mov"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    raise InputError(f"{video}: is no MP4, MOV, MKV, WebM or AVI, whatever its name says")


def _ffmpeg() -> str:
    import imageio_ffmpeg

    named = os.environ.get("LONGTAKE_FFMPEG")
    found = shutil.which(named) if named else imageio_ffmpeg.get_ffmpeg_exe()
    if found is None:
        raise InputError(f"LONGTAKE_FFMPEG: {named} is no executable")
    return found
