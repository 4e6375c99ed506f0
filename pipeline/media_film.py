"""Units into a film: joined by stream copy, with sound, a recipe and the AI-generated mark.

No frame is decoded or encoded again, none is lost or doubled at a seam: each unit's place is counted in
frames, and the finished file is checked. The same units give the same bytes. A film says in plain words that
it is AI-generated (`comment`), and how it was made (`longtake_recipe`, JSON); the recipe can be left out or
stripped, the mark cannot.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import ffmpeg as ffmpeg_python

from pipeline.errors import InputFileError, MediaError
from pipeline.media_child import Ffmpeg, Workbench, run, workbench
from pipeline.media_encode import (
    REORDER_FRAMES,
    Unit,
    check_timing,
    muxer_args,
    stored_packets,
    ticks_per_second,
)
from pipeline.media_read import decode_sound, first_cause, open_input, probe
from pipeline.params import CodecParams
from pipeline.spec_values import AUDIO_RATE_HZ

AI_MARK = "AI-generated video, made with longtake (digital source type: trainedAlgorithmicMedia)"
"""Stands in every film's `comment`."""

RECIPE_KEY = "longtake_recipe"
RECIPE_LIMIT_BYTES = 4 << 20

_JOIN_LIMIT_S = 1800.0
"""For writing a film, and for reading it again: an hour of ffv1 has some 100 GB."""


def concatenate(
    units: Sequence[Unit],
    out: Path,
    *,
    fps: Fraction,
    codec: CodecParams,
    ffmpeg: Ffmpeg,
    title: str = "",
    recipe: str | None = None,
    soundtrack: Path | None = None,
) -> int:
    """Join units, in order, into the film `out`; the number of its frames.

    `recipe`: JSON text, or None to leave it out. `soundtrack`: a file with sound, padded with silence or cut
    at the film's end (flac in mkv, else aac). Raises MediaError when the film does not come out frame for
    frame, InputFileError when the soundtrack has no sound.
    """
    if soundtrack is not None:
        _check_sound(soundtrack, ffmpeg)
    tags = {"title": title, "comment": AI_MARK, RECIPE_KEY: recipe or ""}
    frames = sum(unit.frames for unit in units)
    name = f"film.{codec['container']}"
    with workbench(beside=out) as bench:
        streams = [_joined(units, bench, fps)]
        if soundtrack is not None:
            streams.append(_sound(bench, soundtrack, frames / fps))
        film = _tagged(bench, streams, len(streams), name, tags, _exact_times(fps, codec) | _sound_args(name))
        run(ffmpeg, film, bench, limit_s=_JOIN_LIMIT_S)
        check_timing(bench, name, frames, fps, ffmpeg, limit_s=_JOIN_LIMIT_S)
        os.replace(bench.path / name, out)
    return frames


def film_so_far(
    units: Sequence[Unit], out: Path, *, fps: Fraction, codec: CodecParams, ffmpeg: Ffmpeg
) -> int:
    """Join the units that are there, from the first on, into a playable film without sound; its frames.

    `out` is replaced in one step, so that a player never opens half a file.
    """
    return concatenate(units, out, fps=fps, codec=codec, ffmpeg=ffmpeg)


def _joined(units: Sequence[Unit], bench: Workbench, fps: Fraction) -> Any:
    """The input node that plays the units one after the other.

    ffmpeg keeps each unit's start in microseconds. Lengths are therefore differences of rounded starts:
    adding rounded lengths would drift by a frame within some ten thousand short units.
    """
    starts_us = [round(1_000_000 * n / fps) for n in accumulate((u.frames for u in units), initial=0)]
    lines = ["ffconcat version 1.0"]
    for index, unit in enumerate(units):
        name = f"{index:06d}{unit.path.suffix}"
        bench.link(unit.path, name)
        length_us = starts_us[index + 1] - starts_us[index]
        lines += [f"file {name}", f"duration {length_us // 1_000_000}.{length_us % 1_000_000:06d}"]
    listing = bench.write("units.txt", "\n".join(lines) + "\n")
    return ffmpeg_python.input(listing, format="concat", safe=1, protocol_whitelist="file,pipe")["v:0"]


def _exact_times(fps: Fraction, codec: CodecParams) -> dict[str, Any]:
    """Stream copy with every packet's time counted in frames: decoding order is packet order, and showing
    order what the units say, rounded to whole frames. At a seam ffmpeg's own guess may be off."""
    tick, ahead = f"{fps.denominator}/{fps.numerator}", REORDER_FRAMES[codec["codec"]]
    counted = f"setts=time_base={tick}:prescale=1:pts=PTS:dts=N-{ahead}:duration=1"
    return {"c:v": "copy", "bsf:v": counted, **muxer_args(codec["container"], ticks_per_second(fps))}


def _tagged(
    bench: Workbench,
    streams: Sequence[Any],
    inputs: int,
    name: str,
    tags: Mapping[str, str],
    args: Mapping[str, Any],
) -> Any:
    """The output node that writes `streams` to `name` with exactly these tags, its index at the front.

    `inputs`: how many files the streams come from.
    """
    meta = ffmpeg_python.input(bench.write("tags.txt", _tags_text(tags)), format="ffmetadata")
    flags = {} if name.endswith(".mkv") else {"movflags": "+faststart+use_metadata_tags"}
    # Only what is mapped becomes an input; `v?` maps the no streams that the tags have.
    nodes = [*streams, meta["v?"]]
    return ffmpeg_python.output(*nodes, f"file:{name}", map_metadata=inputs, map_chapters=-1, **args, **flags)


def _sound_args(name: str) -> dict[str, Any]:
    own = {"c:a": "flac"} if name.endswith(".mkv") else {"c:a": "aac", "b:a": "192k"}
    return {**own, "flags:a": "+bitexact"}


def _check_sound(path: Path, ffmpeg: Ffmpeg) -> None:
    if not probe(path, ffmpeg).has_audio:
        raise InputFileError("has no sound", field=str(path), remedy="Name a soundtrack, or leave it out.")


def check_soundtrack(path: Path, container: str, ffmpeg: Ffmpeg) -> None:
    """Whether a film in this container can have the first sound of this file. Raises InputFileError.

    The sound is decoded to its end, and its beginning is made what `concatenate` makes of it.
    """
    try:
        decode_sound(path, ffmpeg)
    except MediaError as error:
        what, remedy = "has sound that cannot be decoded", "Make a clean copy of it, or export it again."
        raise InputFileError(f"{what} ({first_cause(error)})", field=str(path), remedy=remedy) from error
    try:
        with workbench() as bench:
            tried = _sound(bench, path, Fraction(1, 2))
            args = _sound_args(f"film.{container}")
            run(ffmpeg, tried.output("pipe:1", format="null", **args), bench)
    except MediaError as error:
        what, remedy = "has sound that no film can have", "Mix it down: ffmpeg -i SOUND -ac 2 STEREO.wav"
        raise InputFileError(f"{what} ({first_cause(error)})", field=str(path), remedy=remedy) from error


def _sound(bench: Workbench, path: Path, length_s: Fraction) -> Any:
    """The soundtrack at AUDIO_RATE_HZ, exactly as long as the film."""
    sound = open_input(bench, path, "sound")["a:0"].filter("aresample", AUDIO_RATE_HZ, first_pts=0)
    return sound.filter("apad").filter("atrim", end_sample=round(length_s * AUDIO_RATE_HZ))


# ------------------------------------------------------------------------------------------------- tags


def _tags_text(tags: Mapping[str, str]) -> str:
    """ffmpeg's metadata file. A file, because a long recipe does not fit on a command line."""
    # ffmpeg takes a line that ends in a backslash to go on in the next one, escaped or not: such a value comes last.
    ordered = sorted(tags.items(), key=lambda tag: tag[1].endswith("\\"))
    lines = [f"{key}={_escaped(value)}" for key, value in ordered if value]
    return "\n".join([";FFMETADATA1", *lines])


def read_tags(film: Path, ffmpeg: Ffmpeg) -> dict[str, str]:
    """The film's own tags, keys in lower case. InputFileError where it cannot be read."""
    with workbench() as bench:
        listing = open_input(bench, film)["t?"].output("pipe:1", format="ffmetadata")
        try:
            text = run(ffmpeg, listing, bench, most_bytes=2 * RECIPE_LIMIT_BYTES).decode(errors="replace")
        except MediaError as error:
            remedy = "Name a finished film."
            raise InputFileError(f"cannot be read ({error})", field=str(film), remedy=remedy) from error
    # Values escape `=;#\` and line ends with a backslash; sections in brackets belong to single streams.
    whole = re.split(r"^\[", text, maxsplit=1, flags=re.MULTILINE)[0]
    pairs = re.findall(r"^((?:\\.|[^\\=\n;#])+)=((?:\\.|[^\\\n])*)$", whole, flags=re.MULTILINE | re.DOTALL)
    return {_plain(key).lower(): _plain(value) for key, value in pairs}


def _escaped(plain: str) -> str:
    # Where one of these two stands ffmpeg ends the value.
    return re.sub(r"([=;#\\\n])", r"\\\1", re.sub(r"[\0\r]", " ", plain))


def _plain(escaped: str) -> str:
    return re.sub(r"\\(.)", r"\1", escaped, flags=re.DOTALL)


def read_recipe(film: Path, ffmpeg: Ffmpeg) -> str:
    """The recipe a film carries: the JSON text of an object. InputFileError when it has none."""
    text = read_tags(film, ffmpeg).get(RECIPE_KEY)
    if text is None:
        remedy = "Name a film of longtake that was not stripped, or its storyboard."
        raise InputFileError("carries no recipe", field=str(film), remedy=remedy)
    try:
        sound = len(text) <= RECIPE_LIMIT_BYTES and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        sound = False
    if not sound:
        remedy = "Render from the storyboard instead."
        raise InputFileError("carries a damaged recipe", field=str(film), remedy=remedy)
    return text


def strip(film: Path, out: Path, ffmpeg: Ffmpeg) -> None:
    """Write the film without its recipe to `out`. Picture, sound, title and AI-generated mark stay.

    Raises InputFileError for a file that is not a film of longtake.
    """
    tags = read_tags(film, ffmpeg)
    if tags.get("comment") != AI_MARK:
        raise InputFileError("is not a film of longtake", field=str(film), remedy="Name one of its films.")
    kept = {key: value for key, value in tags.items() if key in ("title", "comment")}
    with workbench(beside=out) as bench:
        name, source = f"film.{_container(film)}", open_input(bench, film)
        tick_s = stored_packets(bench, source, ffmpeg, limit_s=_JOIN_LIMIT_S)[0].tick_s
        args = {"c": "copy", **muxer_args(_container(film), tick_s.denominator)}
        copied = _tagged(bench, [source["v:0"], source["a:0?"]], 1, name, kept, args)
        run(ffmpeg, copied, bench, limit_s=_JOIN_LIMIT_S)
        os.replace(bench.path / name, out)


def _container(film: Path) -> str:
    with film.open("rb") as file:
        head = file.read(12)
    if head[4:8] != b"ftyp":
        return "mkv"
    return "mov" if head[8:12] == b"qt  " else "mp4"
