"""Reading pictures, films and sound that somebody else made, and checking films that we made.

A file's format is decided by its first bytes, never by its name; ffmpeg is told that format and may open no
other file or address. What cannot be used is refused with InputFileError before anything expensive starts.

Frames are uint8 [n,h,w,3] RGB, upright, of square pixels, whole (not fields), in the standard range of brightness
and in bt709's primaries where the film is HDR. Times are seconds after the film's first frame.
"""

from __future__ import annotations

import bisect
import re
import stat
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import ffmpeg as ffmpeg_python
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.errors import InputFileError, MediaError
from pipeline.media_child import Child, Ffmpeg, Workbench, run, workbench
from pipeline.params import Fit

Frames = NDArray[np.uint8]

LARGEST_PICTURE_PX = 64_000_000
"""More pixels than this in one picture or frame are refused: 8k film has 33 million."""

LATE_S = Fraction(1, 400)
"""A frame this much late counts as on time: Matroska rounds time stamps to milliseconds, and moments counted
from a film's end carry the rounding of two of them."""

_PROBE_LIMIT_S = 600.0
_PROBE_BYTES = 64 << 20
_BATCH_FRAMES = 16


@dataclass(frozen=True)
class MediaInfo:
    """What `probe` found. `times_s` are the exact times of the frames after the first one's; sizes are as shown:
    upright, in square pixels.
    """

    kind: Literal["image", "video", "audio"]
    codec: str
    width_px: int = 0
    height_px: int = 0
    fps: Fraction | None = None
    times_s: tuple[Fraction, ...] = ()
    duration_s: Fraction = Fraction(0)
    has_audio: bool = False
    tick_s: Fraction = Fraction(0)
    """How finely the file can say when a frame is shown: a Matroska file to the millisecond."""

    @property
    def frame_count(self) -> int:
        """Number of frames that a decoder shows."""
        return len(self.times_s)

    def keeps(self, fps: Fraction) -> bool:
        """Whether every frame stands where a constant rate of `fps` puts it, to within a tick."""
        return all(abs(t - i / fps) <= self.tick_s for i, t in enumerate(self.times_s))


# ---------------------------------------------------------------------------------------------- sniffing

_PICTURES = ("PNG", "JPEG", "WEBP")
_STILL_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"avif")
"""Of pictures in the container of films; a film's decoder would show one tile of them."""
_TAKEN = "PNG, JPEG or WebP; MP4, MOV, MKV, WebM, AVI or MPEG-TS; WAV, FLAC, MP3, Ogg or AAC"


def sniff(path: Path) -> str:
    """The format of a file by its first bytes: a Pillow format or the name of an ffmpeg demuxer.

    Raises InputFileError when it cannot be read or is none of the formats taken.
    """
    try:
        # Opening a pipe that nobody writes to would wait for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise _refused(path, "cannot be read: it is a folder, a pipe or a device", "Name a file.")
        with path.open("rb") as file:
            head = file.read(564)
    except OSError as error:
        remedy = "Name a file that exists and is readable."
        raise _refused(path, f"cannot be read: {error.strerror}", remedy) from error
    found = _picture_format(head) or _demuxer(head)
    if head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS:
        raise _refused(path, "is a HEIC or AVIF picture", "Save it as PNG, JPEG or WebP.")
    if found is None:
        what = "is neither a picture, a film nor a sound file, whatever its name says" if head else "is empty"
        raise _refused(path, what, f"Take {_TAKEN}.")
    return found


def _picture_format(head: bytes) -> str | None:
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    return "WEBP" if head[:4] == b"RIFF" and head[8:12] == b"WEBP" else None


def _demuxer(head: bytes) -> str | None:
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mov"
    if head[:4] == b"RIFF":
        return {b"AVI ": "avi", b"WAVE": "wav"}.get(head[8:12])
    if len(head) > 376 and head[0] == head[188] == head[376] == 0x47:
        return "mpegts"
    if head[:2] in (b"\xff\xf1", b"\xff\xf9"):
        return "aac"
    if head[:3] == b"ID3" or (head[:1] == b"\xff" and head[1:2] in (b"\xfb", b"\xfa", b"\xf3", b"\xf2")):
        return "mp3"
    return {b"\x1a\x45\xdf\xa3": "matroska", b"OggS": "ogg", b"fLaC": "flac"}.get(head[:4])


def _refused(path: Path, what: str, remedy: str, value: object = None) -> InputFileError:
    return InputFileError(what, field=str(path), value=value, remedy=remedy)


def open_input(bench: Workbench, path: Path, name: str = "input") -> Any:
    """The ffmpeg-python input node for a film or sound file: forced demuxer, safe name, no other protocol."""
    demuxer = sniff(path)
    if demuxer in _PICTURES:
        raise _refused(path, "is a picture, not a film or sound", "Name a film or a sound.")
    return ffmpeg_python.input(
        bench.link(path, name), format=demuxer, protocol_whitelist="file,pipe", max_pixels=LARGEST_PICTURE_PX
    )


# ----------------------------------------------------------------------------------------------- probing


def probe(path: Path, ffmpeg: Ffmpeg) -> MediaInfo:
    """Find out everything about a picture, film or sound. A film is decoded once: its frames are counted.

    Raises InputFileError when the file cannot be used, saying why.
    """
    if sniff(path) in _PICTURES:
        height_px, width_px, _ = read_image(path).shape
        return MediaInfo("image", sniff(path).lower(), width_px, height_px)
    try:
        streams = _decode_streams(path, ffmpeg)
        if streams[0].head.get("media_type") == "audio":
            decode_sound(path, ffmpeg)
    except MediaError as error:
        remedy = "Make a clean copy of it, or export it again."
        raise _refused(path, f"cannot be decoded ({first_cause(error)})", remedy) from error
    by_kind = {stream.head.get("media_type", ""): stream for stream in streams}
    if "video" in by_kind:
        shown, stored = streams[0], streams[1]
        return _film_info(path, shown, stored.head["codec_id"], "audio" in by_kind)
    return _sound_info(path, by_kind["audio"])


def first_cause(error: MediaError) -> str:
    """What ffmpeg complained of first, without the names and addresses of its parts; the rest follows from it."""
    return re.sub(r"\[[^\]]*\] *", "", str(error).partition("\n")[0])


@dataclass
class Stream:
    """One stream as ffmpeg's framecrc lists it: header fields; (pts, duration) of each packet in seconds."""

    head: dict[str, str]
    packets: list[tuple[Fraction, Fraction]]

    @property
    def tick_s(self) -> Fraction:
        """The stream's time base."""
        return Fraction(self.head["tb"])


def _decode_streams(path: Path, ffmpeg: Ffmpeg) -> list[Stream]:
    """Film: its decoded frames, its stored packets, then its sound's. Sound alone: its packets."""
    with workbench() as bench:
        source = open_input(bench, path)
        film, sound = source["V:0?"], source["a:0?"]
        listing = ffmpeg_python.output(
            film,
            film,
            sound,
            "pipe:1",
            format="framecrc",
            fps_mode="passthrough",
            enc_time_base="demux",
            **{"c": "copy", "c:v:0": "rawvideo", "bsf:v:1": "setts=pts=N:dts=N"},
        )
        with Child(ffmpeg, listing, bench, limit_s=_PROBE_LIMIT_S) as child:
            text = child.read(_PROBE_BYTES)
            if len(text) == _PROBE_BYTES:
                raise MediaError("it has too many packets to list")
            child.finish()
            if child.last_words():
                raise MediaError(child.last_words())
        return parse_framecrc(text.decode(errors="replace"))


def decode_sound(path: Path, ffmpeg: Ffmpeg) -> None:
    """Decode the first sound of a file from end to end. MediaError where that fails."""
    with workbench() as bench:
        run(
            ffmpeg,
            open_input(bench, path)["a:0"].output("pipe:1", format="null"),
            bench,
            limit_s=_PROBE_LIMIT_S,
        )


def parse_framecrc(text: str) -> list[Stream]:
    """The streams in what the framecrc muxer printed: `#key stream: value` and `stream, dts, pts, ...`."""
    heads: dict[int, dict[str, str]] = defaultdict(dict)
    packets: dict[int, list[tuple[Fraction, Fraction]]] = defaultdict(list)
    for line in text.splitlines():
        if line.startswith("#"):
            name, _, value = line[1:].partition(":")
            key, _, index = name.rpartition(" ")
            if index.isdigit():
                heads[int(index)][key] = value.strip()
        else:
            number, _, pts, length = line.split(",")[:4]
            tick = Fraction(heads[int(number)]["tb"])
            packets[int(number)].append((int(pts) * tick, int(length) * tick))
    return [Stream(heads[i], packets[i]) for i in sorted(heads)]


def _film_info(path: Path, shown: Stream, codec: str, has_audio: bool) -> MediaInfo:
    if not shown.packets:
        raise _refused(path, "holds no frame that can be decoded", "Export it again.")
    width_px, height_px = _square_size(path, shown)
    first_s = shown.packets[0][0]
    times_s = tuple(pts - first_s for pts, _ in shown.packets)
    if any(a >= b for a, b in pairwise(times_s)):
        raise _refused(path, "has time stamps that run backwards", "Export it again.")
    last_s = shown.packets[-1][1]
    fps = _rate(times_s, shown.tick_s) or (1 / last_s if last_s else None)
    info = MediaInfo("video", codec, width_px, height_px, fps, times_s, Fraction(0), has_audio, shown.tick_s)
    # At a constant rate the last frame's length is known better than the file's ticks can say.
    constant = fps is not None and info.keeps(fps)
    return replace(info, duration_s=times_s[-1] + (1 / fps if fps and (constant or not last_s) else last_s))


def _square_size(path: Path, shown: Stream) -> tuple[int, int]:
    """Width and height of a film whose pixels are made square: of some cameras they are wider or narrower."""
    width_px, height_px = (int(n) for n in shown.head["dimensions"].split("x"))
    above, below = map(int, shown.head.get("sar", "1/1").split("/"))
    if above and below:
        width_px = max(1, round(width_px * Fraction(above, below)))
    if width_px * height_px > LARGEST_PICTURE_PX:
        raise _too_large(path, f"{width_px}x{height_px}")
    return width_px, height_px


def _rate(times_s: Sequence[Fraction], tick_s: Fraction) -> Fraction | None:
    """Frames a second over the whole film, snapped to n or n*1000/1001 where the time stamps allow it."""
    if len(times_s) < 2:
        return None
    steps, span_s = len(times_s) - 1, times_s[-1] - times_s[0]
    measured = steps / span_s
    for scale in (Fraction(1), Fraction(1000, 1001)):
        snapped = round(measured / scale) * scale
        if snapped and abs(steps / snapped - span_s) <= tick_s:
            return snapped
    return measured.limit_denominator(1001)


def _sound_info(path: Path, sound: Stream) -> MediaInfo:
    if not sound.packets:
        raise _refused(path, "holds no sound that can be decoded", "Export it again.")
    last_s, length_s = sound.packets[-1]
    duration_s = last_s + length_s - max(Fraction(0), sound.packets[0][0])
    return MediaInfo("audio", sound.head["codec_id"], duration_s=duration_s, has_audio=True)


def verify_video(
    path: Path, *, frames: int, size_px: tuple[int, int], fps: Fraction, ffmpeg: Ffmpeg
) -> MediaInfo:
    """Decode a film of ours. MediaError unless it has exactly these frames, this (height, width) and rate."""
    info = probe(path, ffmpeg)
    found = (info.frame_count, (info.height_px, info.width_px))
    if found != (frames, size_px) or not info.keeps(fps):
        raise MediaError(
            f"the file has {found[0]} frames of {found[1]} at {info.fps} frames/s, "
            f"not {frames} of {size_px} at {fps}"
        )
    return info


# ----------------------------------------------------------------------------------------------- reading


def read_image(path: Path) -> Frames:
    """A PNG, JPEG or WebP as uint8 [h,w,3]: upright, what is transparent on black.

    Raises InputFileError when it is damaged, animated or larger than LARGEST_PICTURE_PX.
    """
    kind = sniff(path)
    if kind not in _PICTURES:
        raise _refused(path, "is not a picture", "Take a PNG, JPEG or WebP.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=[kind]) as picture:
                _check_picture(path, picture)
                picture.verify()
            with Image.open(path, formats=[kind]) as picture:
                return _upright_rgb(picture)
    except Image.DecompressionBombError as error:
        raise _too_large(path) from error
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError) as error:
        remedy = "Open it in an image editor and save it again."
        raise _refused(path, f"is damaged ({error})", remedy) from error


def _check_picture(path: Path, picture: Image.Image) -> None:
    if picture.width * picture.height > LARGEST_PICTURE_PX:
        raise _too_large(path, f"{picture.width}x{picture.height}")
    # Several pictures in one JPEG are a photograph and its previews or depth; the photograph comes first.
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        raise _refused(path, "is animated", "Save the one picture that is meant.")


def _too_large(path: Path, size: str | None = None) -> InputFileError:
    remedy = f"Make it smaller than {LARGEST_PICTURE_PX // 1_000_000} million pixels."
    return _refused(path, "is too large", remedy, size)


_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF's orientation what sets a picture upright."""


def _upright_rgb(picture: Image.Image) -> Frames:
    # Not by ImageOps.exif_transpose: it also writes the EXIF data again, and what cameras write is often damaged.
    turn = _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
    upright = picture if turn is None else picture.transpose(turn)
    if upright.mode.startswith("I;16"):
        grey = (np.asarray(upright).astype(np.uint32) * 255 + 32767) // 65535
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if "A" in upright.getbands() or "transparency" in upright.info:
        with_alpha = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", with_alpha.size, (0, 0, 0, 255)), with_alpha)
    return np.asarray(upright.convert("RGB"), dtype=np.uint8).copy()


def shown_at(times_s: Sequence[Fraction], at_s: Sequence[Fraction]) -> list[int]:
    """For each moment the index of the frame on screen then; before the first frame, the first."""
    return [max(0, bisect.bisect_right(times_s, t + LATE_S) - 1) for t in at_s]


def tail_times_s(info: MediaInfo, frames: int, fps: Fraction, *, path: Path) -> list[Fraction]:
    """The moments of the last `frames` frames of a film shown at `fps`; the last is the film's last frame.

    Raises InputFileError when the film is shorter than that.
    """
    last_s = info.times_s[-1]
    needed_s = (frames - 1) / Fraction(fps)
    if needed_s > last_s + LATE_S:
        remedy = f"{frames} frames at {float(fps):g} frames/s take {float(needed_s):.3f} s."
        raise _refused(path, "is too short to continue", remedy, f"{float(info.duration_s):.3f} s")
    return [max(Fraction(0), last_s - (frames - 1 - k) / Fraction(fps)) for k in range(frames)]


def read_video_at(
    path: Path, at_s: Sequence[Fraction], ffmpeg: Ffmpeg, *, info: MediaInfo | None = None
) -> Iterator[Frames]:
    """The frames on screen at the ascending moments `at_s`, in batches uint8 [n,h,w,3] of the film's size.

    Chosen by the film's time stamps, so a film of 24 frames/s or of no constant rate is resampled rightly.
    `info` is the film's probe where the caller has it. Raises InputFileError where decoding fails.
    """
    info = info or probe(path, ffmpeg)
    wanted = shown_at(info.times_s, at_s)
    if info.kind != "video" or wanted != sorted(wanted):
        raise ValueError("frames are read from a film, at moments in ascending order")
    batch: list[Frames] = []
    for frame, repeats in _decoded(path, info, wanted, ffmpeg):
        batch += [frame] * repeats
        if len(batch) >= _BATCH_FRAMES:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def _decoded(path: Path, info: MediaInfo, wanted: list[int], ffmpeg: Ffmpeg) -> Iterator[tuple[Frames, int]]:
    """Each wanted frame with the number of times it is wanted; the child ends after the last of them."""
    if not wanted:
        return
    shape, repeats, coding = (info.height_px, info.width_px, 3), Counter(wanted), _first_coding(path, ffmpeg)
    with workbench() as bench:
        decoding = _decoding(open_input(bench, path), info, wanted, coding)
        with Child(ffmpeg, decoding, bench) as child:
            for index in range(wanted[0], wanted[-1] + 1):
                data = child.read(shape[0] * shape[1] * 3)
                if len(data) < shape[0] * shape[1] * 3:
                    what = f"ends before its frame {index} ({child.last_words()})"
                    raise _refused(path, what, "Export it again.")
                if index in repeats:
                    yield np.frombuffer(data, np.uint8).reshape(shape), repeats[index]
            child.finish()


@dataclass(frozen=True)
class _Coding:
    """What a frame says of itself, in ffmpeg's words; `unknown` where it says nothing."""

    is_interlaced: bool
    matrix: str
    primaries: str
    transfer: str


_CODING = re.compile(
    r" i:([PTB]) .*\] color_range:\S+ color_space:(\S+) color_primaries:(\S+) color_trc:(\S+)", re.DOTALL
)
"""In the two lines that ffmpeg's showinfo prints of a frame."""


def _first_coding(path: Path, ffmpeg: Ffmpeg) -> _Coding:
    """How the first frame of a film is coded. Raises InputFileError where ffmpeg does not say."""
    with workbench() as bench:
        first = open_input(bench, path)["V:0"].filter("trim", end_frame=1)
        # Side data may be longer than what is kept of a child's words.
        told = first.filter("sidedata", mode="delete").filter("showinfo", checksum=0)
        listing = told.output("pipe:1", format="null", map_metadata=-1)
        with Child(ffmpeg, listing, bench, level="info") as child:
            try:
                child.finish()
            except MediaError as error:
                what = f"cannot be decoded ({first_cause(error)})"
                raise _refused(path, what, "Export it again.") from error
            found = _CODING.search(child.last_words(100))
    if found is None:
        raise _refused(path, "has a first frame of which ffmpeg says nothing", "Export it again.")
    return _Coding(found[1] != "P", *found.groups()[1:])


_HDR = ("smpte2084", "arib-std-b67")
_HDR_WHITE_NITS = 203
"""What ITU-R BT.2408 calls white in HDR: faces and paper lie below, lamps and glints above."""


def _decoding(source: Any, info: MediaInfo, wanted: list[int], coding: _Coding) -> Any:
    frames = source["V:0"]
    if coding.is_interlaced:
        # Before any frame is left out: a field's gaps are filled from the frames around it.
        frames = frames.filter("bwdif", mode="send_frame", deint="interlaced")
    frames = frames.filter("trim", start_frame=wanted[0], end_frame=wanted[-1] + 1)
    if coding.transfer in _HDR:
        frames = _to_standard_range(frames, coding)
    # Players take large films for bt709 where they do not say; ffmpeg takes bt601.
    is_large = max(info.height_px, info.width_px) >= 1280 or min(info.height_px, info.width_px) >= 720
    matrix = {"in_color_matrix": "bt709"} if coding.matrix == "unknown" and is_large else {}
    # Not the fast path: rounded the same way on every processor.
    flags = "bicubic+accurate_rnd+full_chroma_int+bitexact"
    exact = frames.filter("scale", info.width_px, info.height_px, flags=flags, **matrix)
    return exact.filter("format", "rgb24").output("pipe:1", format="rawvideo", fps_mode="passthrough")


def _to_standard_range(frames: Any, coding: _Coding) -> Any:
    """HDR frames as RGB for an ordinary screen: white a little below full, what is brighter pressed into the rest."""
    said = {
        "colorspace": "bt2020nc" if coding.matrix == "unknown" else coding.matrix,
        "color_primaries": "bt2020" if coding.primaries == "unknown" else coding.primaries,
    }
    light = frames.filter("setparams", **said).filter("zscale", transfer="linear", npl=_HDR_WHITE_NITS)
    light = light.filter("format", "gbrpf32le").filter("zscale", primaries="bt709")
    pressed = light.filter("tonemap", tonemap="mobius", desat=0)
    return pressed.filter("zscale", transfer="bt709", matrix="gbr", range="full").filter("format", "gbrp")


# ------------------------------------------------------------------------------------------------ sizing


def fit(frames: Frames, height_px: int, width_px: int, how: Fit | None) -> Frames:
    """Frames uint8 [n,h,w,3] at exactly this size; without `how` they must have it already.

    `crop` covers the size and cuts what hangs over, `pad` shows everything between black bars, both centred;
    `scale` stretches. Lanczos, antialiased. Frames of the right size are returned as they are.
    """
    if frames.shape[1:3] == (height_px, width_px):
        return frames
    if how is None:
        raise ValueError(f"frames of {frames.shape[1:3]} where ({height_px}, {width_px}) was planned")
    return np.stack([_fit_one(Image.fromarray(frame), height_px, width_px, how) for frame in frames])


def _fit_one(picture: Image.Image, height_px: int, width_px: int, how: Fit) -> Frames:
    size = (width_px, height_px)
    if how == "scale":
        return np.asarray(picture.resize(size, Image.Resampling.LANCZOS))
    if how == "crop":
        return np.asarray(ImageOps.fit(picture, size, Image.Resampling.LANCZOS))
    return np.asarray(ImageOps.pad(picture, size, Image.Resampling.LANCZOS, color=(0, 0, 0)))
