"""Frames into units: each unit of a film is encoded once, by itself, so that units join by stream copy.

Every unit of a film has the same settings, starts with a key frame, has closed groups of pictures of a fixed
length, one time scale and no trace of the machine that made it. The same frames give the same bytes: encoder
threads are fixed and part of the numerics record. Colours are converted to bt709 in limited range, and tagged
as such; ffv1 keeps the RGB it is given.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ffmpeg as ffmpeg_python
import numpy as np

from pipeline.errors import MediaError, SettingError
from pipeline.media_child import LIMIT_S, Child, Ffmpeg, Workbench, encoder_names, run, workbench
from pipeline.media_read import Frames, Stream, parse_framecrc
from pipeline.params import CodecParams
from pipeline.spec_values import AUDIO_RATE_HZ

ENCODER_THREADS = 2
"""Part of the numerics record: x264 and x265 give other bytes with another number."""

GOP_FRAMES = 48
"""Longest distance between key frames; every unit starts with one."""

LEAST_TICKS = 12_000
"""A film's time scale has at least so many ticks a second."""

REORDER_FRAMES: Mapping[str, int] = {"h264": 2, "hevc": 2, "av1": 0, "prores": 0, "ffv1": 0}
"""How many frames decoding runs ahead of showing: B frames with one level of pyramid, or none."""

_ENCODERS: Mapping[str, tuple[str, ...]] = {
    "h264": ("libx264",),
    "hevc": ("libx265",),
    "av1": ("libsvtav1", "libaom-av1"),
    "prores": ("prores_ks",),
    "ffv1": ("ffv1",),
}
"""In order of preference; the binary decides, and its version is in the numerics record."""


def choose_encoder(codec: str, ffmpeg: Ffmpeg) -> str:
    """The encoder that this ffmpeg has for a codec of the storyboard. SettingError where it has none."""
    for name in _ENCODERS[codec]:
        if name in encoder_names(ffmpeg):
            return name
    raise SettingError(
        f"this ffmpeg cannot encode {codec}",
        field="LONGTAKE_FFMPEG",
        value=ffmpeg.path,
        remedy=f"Take an ffmpeg with {' or '.join(_ENCODERS[codec])}, or another output.codec.",
    )


def ticks_per_second(fps: Fraction) -> int:
    """The film's time scale: a multiple of the frame rate's numerator, so every frame has whole ticks."""
    return fps.numerator * -(-LEAST_TICKS // fps.numerator)


def encoder_args(codec: CodecParams, threads: int, ffmpeg: Ffmpeg) -> dict[str, Any]:
    """ffmpeg's options for one codec: quality, closed groups of fixed length, fixed threads."""
    encoder, gop = choose_encoder(codec["codec"], ffmpeg), GOP_FRAMES
    crf = {} if codec["crf"] is None else {"crf": codec["crf"]}
    x26x = f"keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0:bframes=3"
    own: dict[str, dict[str, Any]] = {
        "libx264": {
            "preset": "medium",
            "x264-params": f"{x26x}:b-pyramid=normal:threads={threads}",
        },
        "libx265": {
            "preset": "medium",
            "x265-params": f"{x26x}:b-pyramid=1:pools={threads}:frame-threads=1:info=0:log-level=error",
        },
        "libsvtav1": {"preset": 8, "g": gop, "svtav1-params": f"lp={threads}:irefresh-type=2:scd=0"},
        "libaom-av1": {"cpu-used": 6, "g": gop, "keyint_min": gop, "b:v": 0, "lag-in-frames": 25},
        "prores_ks": {"profile:v": 3, "vendor": "apl0"},
        "ffv1": {"level": 3, "g": 1, "slices": 4, "slicecrc": 1},
    }
    # Without this tag Apple's players do not take hevc.
    tag = {"tag:v": "hvc1"} if encoder == "libx265" and codec["container"] != "mkv" else {}
    return {"c:v": encoder, "threads": threads, **crf, **tag, **own[encoder]}


def muxer_args(container: str, ticks: int) -> dict[str, Any]:
    """Options that make time stamps exact, `ticks` a second, and the bytes a function of the frames alone."""
    if container == "mkv":
        # Decoding times before zero are not stored; shifting everything for their sake would start late.
        return {"format": "matroska", "fflags": "+bitexact", "avoid_negative_ts": "disabled"}
    return {
        "format": container,
        "fflags": "+bitexact",
        "video_track_timescale": ticks,
        # Edit lists count in movie ticks: whole ones for frames and for sound samples alike.
        "movie_timescale": math.lcm(ticks, AUDIO_RATE_HZ),
    }


def _to_bt709(frames: Any, pix_fmt: str) -> Any:
    """RGB to the unit's pixel format; a format that stays RGB keeps its full range."""
    stays_rgb = pix_fmt.startswith(("gbr", "bgr", "rgb"))
    if not stays_rgb:
        exact = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp+bitexact"
        frames = frames.filter("scale", flags=exact, in_range="pc", out_range="tv", out_color_matrix="bt709")
    return frames.filter("format", pix_fmt).filter(
        "setparams",
        range="pc" if stays_rgb else "tv",
        colorspace="gbr" if stays_rgb else "bt709",
        color_primaries="bt709",
        color_trc="bt709",
    )


@dataclass(frozen=True)
class Unit:
    """An encoded piece of a film, and how many frames it shows."""

    path: Path
    frames: int


class FrameEncoder:
    """Streams frames into one unit. The file appears at `out` when `close` has counted its frames.

    Use as a context manager; left by an exception, it kills ffmpeg and leaves no file.
    """

    def __init__(
        self,
        out: Path,
        *,
        height_px: int,
        width_px: int,
        fps: Fraction,
        codec: CodecParams,
        ffmpeg: Ffmpeg,
        threads: int = ENCODER_THREADS,
        limit_s: float = LIMIT_S,
    ) -> None:
        """Start ffmpeg. `limit_s`: seconds it may go without taking a frame. Sizes must suit the codec."""
        if "420" in codec["pix_fmt"] and (height_px % 2 or width_px % 2):
            raise ValueError(f"{codec['pix_fmt']} needs even sides, not {width_px}x{height_px}")
        self._out, self._shape, self._fps, self._ffmpeg = out, (height_px, width_px, 3), fps, ffmpeg
        self._reorder, self._frames = REORDER_FRAMES[codec["codec"]], 0
        self._name = f"unit.{codec['container']}"
        self._held = workbench(beside=out)
        self._bench = self._held.__enter__()
        try:
            encoding = self._encoding(codec, threads)
            self._child = Child(ffmpeg, encoding, self._bench, limit_s=limit_s, feeds=True)
        except BaseException:
            self._held.__exit__(None, None, None)
            raise

    def _encoding(self, codec: CodecParams, threads: int) -> Any:
        size, rate = f"{self._shape[1]}x{self._shape[0]}", f"{self._fps.numerator}/{self._fps.denominator}"
        frames = ffmpeg_python.input(
            "pipe:0",
            format="rawvideo",
            pix_fmt="rgb24",
            s=size,
            framerate=rate,
            protocol_whitelist="file,pipe",
        )
        return _to_bt709(frames, codec["pix_fmt"]).output(
            f"file:{self._name}",
            **encoder_args(codec, threads, self._ffmpeg),
            **muxer_args(codec["container"], ticks_per_second(self._fps)),
            **{"flags:v": "+bitexact", "pix_fmt": codec["pix_fmt"]},
            # ffmpeg takes a rate near 120 or 240 for exactly that, and would move frames or drop some.
            fps_mode="passthrough",
            enc_time_base=f"{self._fps.denominator}/{self._fps.numerator}",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    def abandon(self) -> None:
        """Stop ffmpeg if it still runs and remove what is not finished. Harmless after `close`."""
        self._child.__exit__(None, None, None)
        self._held.__exit__(None, None, None)

    def write(self, frames: Frames) -> None:
        """Append frames uint8 [n,h,w,3]. Raises MediaError when ffmpeg fails or hangs."""
        if frames.dtype != np.uint8 or frames.shape[1:] != self._shape:
            raise ValueError(f"frames are uint8 [n,{self._shape}], not {frames.dtype} {frames.shape}")
        for frame in frames:
            self._child.write(memoryview(frame.tobytes()))
        self._frames += len(frames)

    def close(self) -> Unit:
        """Finish the file, count its frames, and move it to `out`. Raises MediaError when any is missing."""
        self._child.finish()
        check_timing(self._bench, self._name, self._frames, self._fps, self._ffmpeg)
        os.replace(self._bench.path / self._name, self._out)
        self.abandon()
        return Unit(self._out, self._frames)


def check_timing(
    bench: Workbench, name: str, frames: int, fps: Fraction, ffmpeg: Ffmpeg, *, limit_s: float = LIMIT_S
) -> None:
    """MediaError unless the file's film has `frames` frames and each stands at its time. Decodes nothing, but reads all
    of the file, within `limit_s`.
    """
    demuxer = "matroska" if name.endswith(".mkv") else "mov"
    ours = ffmpeg_python.input(f"file:{name}", format=demuxer, protocol_whitelist="file,pipe")
    film = stored_packets(bench, ours, ffmpeg, limit_s=limit_s)[0]
    exact = film.tick_s if demuxer == "matroska" else 0
    at_s = sorted(pts for pts, _ in film.packets)
    if len(at_s) != frames:
        raise MediaError(f"{frames} frames were given and {len(at_s)} are in the file")
    late = [i for i, pts in enumerate(at_s) if abs(pts - i / fps) > exact]
    if late:
        raise MediaError(f"frame {late[0]} stands at {at_s[late[0]]} s, not {late[0] / fps} s")


def stored_packets(bench: Workbench, source: Any, ffmpeg: Ffmpeg, *, limit_s: float) -> list[Stream]:
    """Packets of the film, then of the sound, of a file of ours given as an input node."""
    # Matroska stores no decoding times, and ffmpeg refuses its own guesses: only their order matters here.
    ordered = {"c": "copy", "bsf:v": "setts=pts=PTS:dts=N-1000000000"}
    listing = ffmpeg_python.output(source["v:0"], source["a:0?"], "pipe:1", format="framecrc", **ordered)
    return parse_framecrc(run(ffmpeg, listing, bench, limit_s=limit_s, most_bytes=256 << 20).decode())
