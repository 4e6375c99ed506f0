"""Media: what is read, what is refused, and that no frame is lost between a unit and the film."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import subprocess
import sys
import time
import wave
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import ffmpeg as ffmpeg_python
import numpy as np
import psutil
import pytest
from PIL import Image

from pipeline import media
from pipeline.errors import InputFileError, MediaError, SettingError
from pipeline.media_child import LIMIT_S, Child, run, workbench
from pipeline.media_encode import encoder_args
from pipeline.media_read import open_input
from pipeline.params import CodecParams
from pipeline.spec import CODECS
from pipeline.spec_values import parse_rate

NTSC = Fraction(30000, 1001)
PAIRS = [(codec, container) for codec, row in CODECS.items() for container in row.containers]
RATES = [Fraction(30), Fraction(15), Fraction(24), NTSC]
UNITS = (1, 7, 1, 50, 2)


@pytest.fixture(scope="session")
def ff() -> media.Ffmpeg:
    return media.find_ffmpeg()


def params(codec: str, container: str) -> CodecParams:
    row = CODECS[codec]
    return {"codec": codec, "pix_fmt": row.pix_fmt, "crf": row.crf, "container": container}


def numbered(first: int, count: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Frames that carry their number as sixteen light or dark blocks, over a pattern that moves."""
    bits = (np.arange(first, first + count)[:, None] >> np.arange(16)) & 1
    blocks = np.where(bits, 210, 30).astype(np.uint8).reshape(-1, 4, 4)
    frames = blocks.repeat(height // 4, axis=1).repeat(width // 4, axis=2)[..., None].repeat(3, axis=3)
    for index in range(count):
        frames[index, :, (3 * (first + index)) % width, 0] += 30
    return frames


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers that frames carry."""
    _, height, width, _ = frames.shape
    centres = frames[:, height // 8 :: height // 4, width // 8 :: width // 4].mean(axis=3) > 120
    return [int((frame.ravel() << np.arange(16)).sum()) for frame in centres]


def numbers_in(film: Path, ff: media.Ffmpeg) -> list[int]:
    info = media.probe(film, ff)
    return [n for frames in media.read_video_at(film, info.times_s, ff, info=info) for n in numbers(frames)]


def encode(
    out: Path, frames: np.ndarray, ff: media.Ffmpeg, codec: CodecParams | None = None, fps: Fraction = NTSC
) -> media.Unit:
    _, height, width, _ = frames.shape
    codec = codec or params("h264", "mp4")
    with media.FrameEncoder(
        out, height_px=height, width_px=width, fps=fps, codec=codec, ffmpeg=ff
    ) as encoder:
        encoder.write(frames[:3])
        encoder.write(frames[3:])
        return encoder.close()


def encode_units(
    folder: Path, codec: CodecParams, fps: Fraction, ff: media.Ffmpeg, sizes: tuple[int, ...] = UNITS
) -> list[media.Unit]:
    starts = np.cumsum((0, *sizes))
    return [
        encode(folder / f"{i}.{codec['container']}", numbered(int(starts[i]), n), ff, codec, fps)
        for i, n in enumerate(sizes)
    ]


def raw_ffmpeg(ff: media.Ffmpeg, *args: object) -> bytes:
    """What ffmpeg prints, for making odd inputs and for looking at films with other eyes."""
    command = [ff.path, "-nostdin", "-v", "error", "-y", *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout


def write_click(path: Path, at_s: float, length_s: float, rate: int = 44100) -> Path:
    """A sound that is silent until `at_s` and a tone from then on."""
    t = np.arange(round(length_s * rate)) / rate
    tone = np.where(t >= at_s, np.sin(2 * np.pi * 440 * t) * 12000, 0).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(tone.tobytes())
    return path


def fake_ffmpeg(folder: Path, script: str) -> media.Ffmpeg:
    path = folder / "ffmpeg"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return media.Ffmpeg(str(path), "fake")


# ------------------------------------------------------------------------------------------ the binary


def test_the_bundled_ffmpeg_is_found_and_encodes_every_codec_of_the_table(ff: media.Ffmpeg) -> None:
    assert os.path.isabs(ff.path)
    assert ff.version
    for codec in CODECS:
        assert media.choose_encoder(codec, ff)


def test_a_setting_that_names_no_ffmpeg_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tmp_path / "plain"
    plain.write_text("not a program")
    for wrong in (str(tmp_path / "missing"), str(plain), sys.executable):
        with pytest.raises(SettingError, match="ffmpeg"):
            media.find_ffmpeg(wrong)
        monkeypatch.setenv("LONGTAKE_FFMPEG", wrong)
        with pytest.raises(SettingError, match="LONGTAKE_FFMPEG"):
            media.find_ffmpeg()


def test_an_ffmpeg_without_the_encoder_is_refused(tmp_path: Path) -> None:
    poor = fake_ffmpeg(tmp_path, "printf ' ------\\n V....D libx264 H.264\\n'")
    assert media.choose_encoder("h264", poor) == "libx264"
    with pytest.raises(SettingError, match="hevc"):
        media.choose_encoder("hevc", poor)


def test_a_hanging_ffmpeg_is_killed_with_its_children(tmp_path: Path) -> None:
    hangs = fake_ffmpeg(tmp_path, "sleep 60 & sleep 60")
    began = time.monotonic()
    with workbench() as bench, Child(hangs, _nothing(), bench, limit_s=0.3) as child:
        with pytest.raises(MediaError, match=r"no progress for 0\.3 s"):
            child.read(1)
        # A killed process that waits for a core is still there for a moment.
        while _running_in_group(child.pid) and time.monotonic() - began < 10:
            time.sleep(0.05)
        assert not _running_in_group(child.pid)
    assert time.monotonic() - began < 10


def _running_in_group(group: int) -> list[int]:
    """Ids of the processes of a group that run; one that is dead and not yet reaped does not."""
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def test_an_encoder_that_stops_reading_is_killed(tmp_path: Path) -> None:
    hangs = fake_ffmpeg(
        tmp_path, "case $* in *-encoders*) echo '------'; echo ' V libx264';; *) sleep 60;; esac"
    )
    out = tmp_path / "unit.mp4"
    encoder = media.FrameEncoder(
        out, height_px=512, width_px=512, fps=NTSC, codec=params("h264", "mp4"), ffmpeg=hangs, limit_s=0.3
    )
    with encoder, pytest.raises(MediaError, match="no progress"):
        encoder.write(np.zeros((2, 512, 512, 3), np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["ffmpeg"]


def test_what_ffmpeg_said_last_is_in_the_error(tmp_path: Path) -> None:
    fails = fake_ffmpeg(tmp_path, "for i in $(seq 99); do echo line $i >&2; done; exit 3")
    expected = pytest.raises(MediaError, match=r"exited with 3: (.|\n)*line 99")
    with workbench() as bench, Child(fails, _nothing(), bench) as child, expected:
        child.finish()


def _nothing() -> object:
    import ffmpeg

    return ffmpeg.input("none").output("none")


# --------------------------------------------------------------------------------------------- reading


def test_probe_tells_a_film_from_its_frames_not_from_its_name(ff: media.Ffmpeg, tmp_path: Path) -> None:
    made = encode(tmp_path / "unit.mp4", numbered(0, 10), ff)
    for name in ("-i.txt", "concat:a|b.mp4", "frame%03d.png", "http:x.m3u8"):
        odd = tmp_path / name
        odd.write_bytes(made.path.read_bytes())
        info = media.probe(odd, ff)
        assert (info.kind, info.codec, info.width_px, info.height_px) == ("video", "h264", 64, 64)
        assert (info.fps, info.frame_count, info.duration_s) == (NTSC, 10, 10 / NTSC)
        assert not info.has_audio


def test_probe_reads_sound(ff: media.Ffmpeg, tmp_path: Path) -> None:
    info = media.probe(write_click(tmp_path / "a.bin", 0.5, 1.5), ff)
    assert (info.kind, info.codec, info.has_audio) == ("audio", "pcm_s16le", True)
    assert float(info.duration_s) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.mp4", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"),
        ("script.mkv", b"ffconcat version 1.0\nfile /etc/passwd\n"),
        ("page.mp4", b"<?xml version='1.0'?><MPD></MPD>"),
        ("text.wav", b"hello"),
        ("empty.mp4", b""),
        ("half.mp4", b"\0\0\0\x20ftypisom" + b"\0" * 100),
        ("half.mkv", b"\x1a\x45\xdf\xa3" + b"\0" * 100),
    ],
)
def test_files_that_are_no_film_are_refused(
    ff: media.Ffmpeg, tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputFileError, match=name) as caught:
        media.probe(tmp_path / name, ff)
    assert caught.value.remedy


def test_a_missing_file_and_a_folder_are_refused(ff: media.Ffmpeg, tmp_path: Path) -> None:
    for path in (tmp_path / "missing.mp4", tmp_path):
        with pytest.raises(InputFileError, match="cannot be read"):
            media.probe(path, ff)


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_a_film_cut_short_is_refused(ff: media.Ffmpeg, tmp_path: Path, container: str) -> None:
    whole = encode(
        tmp_path / f"a.{container}", numbered(0, 60), ff, params("h264", container)
    ).path.read_bytes()
    (tmp_path / "short").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(InputFileError, match="cannot be decoded"):
        media.probe(tmp_path / "short", ff)


def test_a_pipe_and_a_device_are_refused_and_not_waited_for(ff: media.Ffmpeg, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "pipe.mp4", Path("/dev/zero")):
        with pytest.raises(InputFileError, match="a pipe or a device"):
            media.probe(path, ff)


def test_sound_that_cannot_be_decoded_is_refused(ff: media.Ffmpeg, tmp_path: Path) -> None:
    raw_ffmpeg(ff, "-i", write_click(tmp_path / "a.wav", 0.1, 2), "-c:a", "aac", tmp_path / "a.m4a")
    assert media.probe(tmp_path / "a.m4a", ff).codec == "aac"
    content = bytearray((tmp_path / "a.m4a").read_bytes())
    start = content.index(b"mdat") + 4
    content[start + 800 : start + 2000] = b"\x5a" * 1200
    (tmp_path / "bad.m4a").write_bytes(content)
    with pytest.raises(InputFileError, match="cannot be decoded"):
        media.probe(tmp_path / "bad.m4a", ff)


def test_a_film_of_24_frames_is_resampled_by_its_time_stamps(ff: media.Ffmpeg, tmp_path: Path) -> None:
    film = encode(tmp_path / "a.mp4", numbered(0, 48), ff, fps=Fraction(24)).path
    at_s = [Fraction(k, 15) for k in range(30)]
    frames = np.concatenate(list(media.read_video_at(film, at_s, ff)))
    assert frames.dtype == np.uint8
    assert numbers(frames) == [int(k * 24 / 15 + 1e-9) for k in range(30)]


def test_a_film_of_varying_rate_shows_what_is_on_screen(ff: media.Ffmpeg, tmp_path: Path) -> None:
    film = encode(tmp_path / "a.mp4", numbered(0, 30), ff, fps=Fraction(30)).path
    slow = tmp_path / "b.mkv"
    # Frames 0-9 at 30 frames/s, then one every half second.
    late = "setts=pts=if(lt(N\\,10)\\,N\\,10+15*(N-10))/30/TB:dts=N"
    intra = tmp_path / "i.mp4"
    raw_ffmpeg(ff, "-i", film, "-c:v", "libx264", "-bf", 0, intra)
    raw_ffmpeg(ff, "-i", intra, "-c", "copy", "-bsf:v", late, slow)
    info = media.probe(slow, ff)
    assert info.frame_count == 30
    assert not info.keeps(Fraction(30))
    at_s = [Fraction(n, 10) for n in (0, 1, 2, 4, 8, 9, 13, 14)]
    got = numbers(np.concatenate(list(media.read_video_at(slow, at_s, ff))))
    assert got == [0, 3, 6, 10, 10, 11, 11, 12]


def test_the_last_frames_of_a_film_end_with_its_last(ff: media.Ffmpeg, tmp_path: Path) -> None:
    film = encode(tmp_path / "a.mkv", numbered(0, 40), ff, params("ffv1", "mkv"), Fraction(30)).path
    info = media.probe(film, ff)
    assert info.duration_s == Fraction(40, 30)
    at_s = media.tail_times_s(info, 13, Fraction(15), path=film)
    assert numbers(np.concatenate(list(media.read_video_at(film, at_s, ff, info=info)))) == [
        *range(15, 40, 2)
    ]
    with pytest.raises(InputFileError, match="too short"):
        media.tail_times_s(info, 21, Fraction(15), path=film)


def test_a_turned_film_is_read_upright(ff: media.Ffmpeg, tmp_path: Path) -> None:
    wide = np.zeros((5, 64, 96, 3), np.uint8)
    wide[:, :, :48, 0] = 220
    film = encode(tmp_path / "a.mp4", wide, ff).path
    turned = tmp_path / "turned.mp4"
    raw_ffmpeg(ff, "-display_rotation:v:0", "90", "-i", film, "-c", "copy", turned)
    info = media.probe(turned, ff)
    assert (info.height_px, info.width_px) == (96, 64)
    (frames,) = media.read_video_at(turned, [Fraction(0)], ff)
    top, bottom = frames[0, :40, :, 0].mean(), frames[0, -40:, :, 0].mean()
    assert abs(top - bottom) > 150


def test_a_film_of_wide_pixels_is_read_as_it_is_shown(
    ff: media.Ffmpeg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = np.zeros((5, 64, 96, 3), np.uint8)
    wide[:, :, :48] = 220
    film, odd = encode(tmp_path / "a.mp4", wide, ff).path, tmp_path / "odd.mp4"
    raw_ffmpeg(ff, "-i", film, "-c", "copy", "-bsf:v", "h264_metadata=sample_aspect_ratio=4/3", odd)
    assert (media.probe(odd, ff).height_px, media.probe(odd, ff).width_px) == (64, 128)
    (frames,) = media.read_video_at(odd, [Fraction(0)], ff)
    assert frames.shape == (1, 64, 128, 3)
    assert frames[0, :, :60].min() > 180 > 60 > frames[0, :, 68:].max()
    raw_ffmpeg(ff, "-i", film, "-c", "copy", "-bsf:v", "h264_metadata=sample_aspect_ratio=16/1", odd)
    monkeypatch.setattr("pipeline.media_read.LARGEST_PICTURE_PX", 1536 * 64 - 1)
    with pytest.raises(InputFileError, match="too large"):
        media.probe(odd, ff)


def write_patches(path: Path, colours: list[tuple[int, int, int]], ff: media.Ffmpeg, filters: str) -> Path:
    """Three frames, 720 lines high, of patches 32 pixels wide: RGB through `filters`, without loss."""
    picture = np.array(colours, np.uint8).repeat(32, axis=0)[None].repeat(720, axis=0)
    Image.fromarray(picture).save(path.with_suffix(".png"))
    still = ("-loop", 1, "-i", path.with_suffix(".png"), "-frames:v", 3)
    raw_ffmpeg(ff, *still, "-vf", filters, "-c:v", "ffv1", path)
    return path


def patches(film: Path, ff: media.Ffmpeg) -> np.ndarray:
    """The patches of a film's first frame, [n,3]."""
    (frames,) = media.read_video_at(film, [Fraction(0)], ff)
    return frames[0, 360, 16::32].astype(int)


@pytest.mark.parametrize("transfer", ["arib-std-b67", "smpte2084"])
def test_a_film_in_hdr_is_read_as_an_ordinary_screen_shows_it(
    ff: media.Ffmpeg, tmp_path: Path, transfer: str
) -> None:
    dark = [(0, 0, 0), (60, 60, 60), (120, 120, 120), (110, 80, 60), (120, 20, 20), (20, 120, 20), (20, 20, 120)]
    light = [(180, 180, 180), (255, 255, 255)]
    colours = f"tin=bt709:pin=bt709:min=gbr:rin=full:t={transfer}:p=bt2020:m=2020_ncl:r=limited:npl=203"
    filters = f"format=gbrp,zscale={colours},format=yuv444p10le"
    film = write_patches(tmp_path / "a.mkv", [*dark, *light], ff, filters)
    shown = patches(film, ff)
    np.testing.assert_allclose(shown[: len(dark)], dark, atol=4)
    assert 150 < shown[-2].min() <= shown[-2].max() < 200 < shown[-1].min() <= shown[-1].max() < 230
    assert (patches(film, ff) == shown).all()


@pytest.mark.parametrize(
    ("said", "height", "matrix"),
    [("unknown", 720, "bt709"), ("smpte170m", 720, "bt601"), ("bt709", 720, "bt709"), ("unknown", 64, "bt601")],
)
def test_a_large_film_that_does_not_say_its_colours_is_taken_for_bt709(
    ff: media.Ffmpeg, tmp_path: Path, said: str, height: int, matrix: str
) -> None:
    colours = [(200, 40, 40), (40, 200, 40), (40, 40, 200)] * 8
    coded = f"crop=h={height},scale=out_color_matrix={matrix}:out_range=tv,format=yuv444p"
    filters = f"{coded},setparams=colorspace={said}:range=tv"
    film = write_patches(tmp_path / "a.mkv", colours, ff, filters)
    (frames,) = media.read_video_at(film, [Fraction(0)], ff)
    np.testing.assert_allclose(frames[0, 32, 16::32], colours, atol=3)


@pytest.mark.parametrize("first", ["tff", "bff"])
def test_an_interlaced_film_is_read_as_whole_frames(ff: media.Ffmpeg, tmp_path: Path, first: str) -> None:
    """A bar that moves by 16 pixels from field to field stands in one place in each frame that is read."""
    fields = np.zeros((24, 64, 480, 3), np.uint8)
    for index, field in enumerate(fields):
        field[:, 16 * index : 16 * index + 32] = 220
    plain = encode(tmp_path / "a.mkv", fields, ff, params("ffv1", "mkv"), Fraction(50)).path
    woven = f"tinterlace=mode=interleave_{'top' if first == 'tff' else 'bottom'},setfield={first}"
    raw_ffmpeg(ff, "-i", plain, "-vf", woven, "-c:v", "ffv1", "-flags", "+ildct+ilme", tmp_path / "b.mkv")
    info = media.probe(tmp_path / "b.mkv", ff)
    assert (info.frame_count, info.fps) == (12, Fraction(25))
    frames = np.concatenate(list(media.read_video_at(tmp_path / "b.mkv", info.times_s, ff, info=info)))
    assert len(frames) == 12
    for index, frame in enumerate(frames):
        lit = frame[8:56, :, 1].mean(axis=0)
        assert lit[32 * index + 4 : 32 * index + 28].min() > 180, "the frame stands where its first field does"
        assert lit[32 * index + 34 :].max(initial=0) < 40, "nothing of its second field is in it"
    part = np.concatenate(list(media.read_video_at(tmp_path / "b.mkv", info.times_s[5:7], ff, info=info)))
    assert (part == frames[5:7]).all()


# -------------------------------------------------------------------------------------------- pictures


def test_pictures_are_upright_opaque_and_eight_bit(tmp_path: Path) -> None:
    red_left = Image.new("RGB", (40, 20))
    red_left.paste((250, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the picture is on the right: turn by a quarter
    red_left.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    turned = media.read_image(tmp_path / "turned.jpg")
    assert turned.shape == (40, 20, 3)
    assert turned[5, 10, 0] > 200 > turned[35, 10, 0]

    Image.new("RGBA", (4, 4), (200, 100, 50, 128)).save(tmp_path / "glass.png")
    np.testing.assert_allclose(media.read_image(tmp_path / "glass.png")[0, 0], (100, 50, 25), atol=1)

    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert (media.read_image(tmp_path / "deep.png") == 128).all()

    red_left.save(tmp_path / "named.txt", format="WEBP", lossless=True)
    assert (media.read_image(tmp_path / "named.txt") == np.asarray(red_left)).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_picture_with_damaged_exif_data_is_read_and_turned(tmp_path: Path, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    # The resolution, a fraction, says that it is text.
    data = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02")
    Image.new("RGB", (40, 20)).save(tmp_path / "photo", form, exif=data)
    assert media.read_image(tmp_path / "photo").shape == (40, 20, 3)


def test_a_photograph_with_previews_is_read(tmp_path: Path, ff: media.Ffmpeg) -> None:
    photo, preview = Image.new("RGB", (64, 48), "red"), Image.new("RGB", (16, 12), "blue")
    photo.save(tmp_path / "photo.jpg", format="MPO", save_all=True, append_images=[preview])
    assert media.probe(tmp_path / "photo.jpg", ff).width_px == 64
    assert media.read_image(tmp_path / "photo.jpg")[0, 0, 0] > 200


def test_pictures_that_cannot_be_used_are_refused(tmp_path: Path, ff: media.Ffmpeg) -> None:
    for side in (9000, 30000):
        header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        (tmp_path / f"bomb{side}.png").write_bytes(start + struct.pack(">I", 0) + b"IDAT")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    (tmp_path / "drawing.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    pictures[0].save(tmp_path / "moving.webp", save_all=True, append_images=pictures[1:])
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(600))
    reasons = {
        "photo.heic": "HEIC",
        "bomb9000.png": "too large",
        "bomb30000.png": "too large",
        "cut.png": "damaged",
        "drawing.png": "neither",
        "moving.webp": "animated",
    }
    for name, reason in reasons.items():
        with pytest.raises(InputFileError, match=reason) as caught:
            media.probe(tmp_path / name, ff)
        assert str(tmp_path / name) in str(caught.value)
        assert caught.value.remedy


def test_fit_gives_the_exact_size() -> None:
    frames = np.zeros((2, 60, 120, 3), np.uint8)
    frames[:, :, 30:90] = 200
    assert media.fit(frames, 60, 120, None) is frames
    crop, pad, scale = (media.fit(frames, 64, 64, how) for how in ("crop", "pad", "scale"))
    assert crop.shape == pad.shape == scale.shape == (2, 64, 64, 3)
    assert (crop[:, 20:40, 5:59] == 200).all()
    assert (pad[:, :15] == 0).all()
    assert (pad[:, 20:44, 20:44] == 200).all()
    assert (scale[:, :, 20:44] == 200).all()
    assert (scale[:, :, :10] == 0).all()
    with pytest.raises(ValueError, match="planned"):
        media.fit(frames, 64, 64, None)


# ------------------------------------------------------------------------------------------- encoding


@pytest.mark.parametrize(("codec", "container"), PAIRS)
def test_the_same_frames_give_the_same_bytes(
    ff: media.Ffmpeg, tmp_path: Path, codec: str, container: str
) -> None:
    made = [
        encode(tmp_path / f"{n}.{container}", numbered(0, 20), ff, params(codec, container)).path
        for n in ("first", "second")
    ]
    assert hashlib.sha256(made[0].read_bytes()).digest() == hashlib.sha256(made[1].read_bytes()).digest()
    assert numbers_in(made[0], ff) == list(range(20))


def test_colours_are_converted_to_bt709_and_tagged(ff: media.Ffmpeg, tmp_path: Path) -> None:
    red = np.zeros((3, 64, 64, 3), np.uint8)
    red[..., 0] = 255
    unit = encode(tmp_path / "red.mp4", red, ff).path
    planes = np.frombuffer(raw_ffmpeg(ff, "-i", unit, "-f", "rawvideo", "-pix_fmt", "yuv420p", "-"), np.uint8)
    first = planes[: 64 * 64 * 3 // 2]
    y, cb, cr = first[: 64 * 64], first[64 * 64 : 64 * 80], first[64 * 80 :]
    # Red in bt709, limited range: 16 + 219 * 0.2126, 128 - 224 * 0.2126 / 1.8556, 128 + 112.
    np.testing.assert_allclose((y.mean(), cb.mean(), cr.mean()), (62.6, 102.3, 240), atol=1.5)
    (back,) = media.read_video_at(unit, [Fraction(0)], ff)
    np.testing.assert_allclose(back.reshape(-1, 3).mean(axis=0), (255, 0, 0), atol=3)
    said = subprocess.run([ff.path, "-i", unit], capture_output=True, text=True).stderr
    assert "yuv420p(tv, bt709" in said


def test_frames_that_do_not_fit_are_refused(ff: media.Ffmpeg, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="even"):
        encode(tmp_path / "a.mp4", np.zeros((1, 63, 64, 3), np.uint8), ff)
    out = tmp_path / "b.mp4"
    codec = params("h264", "mp4")
    with media.FrameEncoder(out, height_px=64, width_px=64, fps=NTSC, codec=codec, ffmpeg=ff) as encoder:
        with pytest.raises(ValueError, match="uint8"):
            encoder.write(np.zeros((1, 64, 64, 3), np.float32))
        with pytest.raises(ValueError, match="uint8"):
            encoder.write(np.zeros((1, 32, 64, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_a_unit_without_frames_is_an_error(ff: media.Ffmpeg, tmp_path: Path) -> None:
    with pytest.raises(MediaError):
        encode(tmp_path / "a.mp4", np.zeros((0, 64, 64, 3), np.uint8), ff)
    assert list(tmp_path.iterdir()) == []


def test_encoder_threads_are_fixed_for_every_codec(ff: media.Ffmpeg) -> None:
    for codec, container in PAIRS:
        assert encoder_args(params(codec, container), 3, ff)["threads"] == 3


# ---------------------------------------------------------------------------------------------- films


@pytest.mark.parametrize(
    ("codec", "container", "fps"),
    [("h264", "mp4", fps) for fps in RATES]
    + [(codec, container, RATES[-1 - i % 4]) for i, (codec, container) in enumerate(PAIRS) if i],
)
def test_every_frame_of_the_film_carries_its_number(
    ff: media.Ffmpeg, tmp_path: Path, codec: str, container: str, fps: Fraction
) -> None:
    units = encode_units(tmp_path, params(codec, container), fps, ff)
    film, twin = tmp_path / f"film.{container}", tmp_path / f"twin.{container}"
    made = media.concatenate(units, film, fps=fps, codec=params(codec, container), ffmpeg=ff)
    assert made == sum(UNITS)
    info = media.verify_video(film, frames=made, size_px=(64, 64), fps=fps, ffmpeg=ff)
    assert info.fps == fps
    assert numbers_in(film, ff) == list(range(made))
    media.film_so_far(units, twin, fps=fps, codec=params(codec, container), ffmpeg=ff)
    assert film.read_bytes() == twin.read_bytes()


def test_four_hundred_units_of_one_frame_do_not_drift(ff: media.Ffmpeg, tmp_path: Path) -> None:
    for codec, container in (("h264", "mp4"), ("ffv1", "mkv")):
        unit = encode(tmp_path / f"one.{container}", numbered(0, 1), ff, params(codec, container))
        film = tmp_path / f"film.{container}"
        made = media.concatenate([unit] * 400, film, fps=NTSC, codec=params(codec, container), ffmpeg=ff)
        media.verify_video(film, frames=made, size_px=(64, 64), fps=NTSC, ffmpeg=ff)


def test_reading_a_film_again_may_take_as_long_as_writing_it(
    ff: media.Ffmpeg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits_s: list[float] = []

    def timed(*arguments: Any, limit_s: float = 0.0, **more: Any) -> bytes:
        limits_s.append(limit_s)
        return run(*arguments, limit_s=limit_s, **more)

    unit = encode(tmp_path / "a.mp4", numbered(0, 3), ff)
    monkeypatch.setattr("pipeline.media_encode.run", timed)
    monkeypatch.setattr("pipeline.media_film.run", timed)
    media.concatenate([unit], tmp_path / "film.mp4", fps=NTSC, codec=params("h264", "mp4"), ffmpeg=ff)
    writing_s, reading_s = limits_s
    assert reading_s == writing_s > LIMIT_S


@pytest.mark.parametrize("rate", ["119.88", "121", "44729/187"])
def test_a_film_of_an_unusual_rate_has_each_frame_at_its_time(ff: media.Ffmpeg, tmp_path: Path, rate: str) -> None:
    fps, codec = parse_rate(rate), params("h264", "mp4")
    unit = encode(tmp_path / "a.mp4", numbered(0, 60), ff, codec, fps)
    media.concatenate([unit, unit], tmp_path / "film.mp4", fps=fps, codec=codec, ffmpeg=ff)
    media.verify_video(tmp_path / "film.mp4", frames=120, size_px=(64, 64), fps=fps, ffmpeg=ff)


def test_a_unit_that_lost_frames_stops_the_film(ff: media.Ffmpeg, tmp_path: Path) -> None:
    unit = encode(tmp_path / "a.mp4", numbered(0, 10), ff)
    lying = [media.Unit(unit.path, 11), unit]
    with pytest.raises(MediaError, match="21 frames were given and 20"):
        media.concatenate(lying, tmp_path / "film.mp4", fps=NTSC, codec=params("h264", "mp4"), ffmpeg=ff)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    with pytest.raises(MediaError, match="not 11 of"):
        media.verify_video(unit.path, frames=11, size_px=(64, 64), fps=NTSC, ffmpeg=ff)
    with pytest.raises(MediaError, match="not 10 of"):
        media.verify_video(unit.path, frames=10, size_px=(64, 64), fps=Fraction(24), ffmpeg=ff)


@pytest.mark.parametrize("container", ["mp4", "mov"])
def test_a_player_can_start_before_the_file_has_arrived(
    ff: media.Ffmpeg, tmp_path: Path, container: str
) -> None:
    codec = params("h264", container)
    units = encode_units(tmp_path, codec, NTSC, ff, (3, 4))
    media.concatenate(units, tmp_path / "film", fps=NTSC, codec=codec, ffmpeg=ff)
    content = (tmp_path / "film").read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize(("codec", "container"), [("h264", "mp4"), ("prores", "mov"), ("ffv1", "mkv")])
@pytest.mark.parametrize("length_s", [0.9, 3.0])
def test_sound_starts_with_the_film_and_ends_with_it(
    ff: media.Ffmpeg, tmp_path: Path, codec: str, container: str, length_s: float
) -> None:
    units = encode_units(tmp_path, params(codec, container), Fraction(30), ff)
    sound, film = write_click(tmp_path / "sound", 0.5, length_s), tmp_path / f"film.{container}"
    for out in (film, tmp_path / "twin"):
        media.concatenate(
            units,
            out,
            fps=Fraction(30),
            codec=params(codec, container),
            ffmpeg=ff,
            soundtrack=sound,
            title="x",
        )
    assert film.read_bytes() == (tmp_path / "twin").read_bytes()
    assert media.verify_video(film, frames=61, size_px=(64, 64), fps=Fraction(30), ffmpeg=ff).has_audio
    heard = np.frombuffer(raw_ffmpeg(ff, "-i", film, "-map", "0:a", "-f", "s16le", "-ac", 1, "-"), "<i2")
    assert len(heard) == pytest.approx(61 / 30 * 48000, abs=1024)
    loud = np.flatnonzero(np.abs(heard.astype(int)) > 3000)
    assert loud[0] / 48000 == pytest.approx(0.5, abs=0.005)
    assert loud[-1] / 48000 == pytest.approx(min(length_s, 61 / 30), abs=0.03)


def test_a_soundtrack_without_sound_is_refused(ff: media.Ffmpeg, tmp_path: Path) -> None:
    unit = encode(tmp_path / "a.mp4", numbered(0, 3), ff)
    with pytest.raises(InputFileError, match="no sound"):
        media.concatenate(
            [unit], tmp_path / "f.mp4", fps=NTSC, codec=params("h264", "mp4"), ffmpeg=ff, soundtrack=unit.path
        )


@pytest.mark.parametrize(("codec", "container"), [("h264", "mp4"), ("prores", "mov"), ("hevc", "mkv")])
@pytest.mark.parametrize("with_sound", [False, True])
def test_a_film_carries_its_recipe_until_stripped_and_the_mark_for_ever(
    ff: media.Ffmpeg, tmp_path: Path, codec: str, container: str, with_sound: bool
) -> None:
    recipe = json.dumps({"prompt": "a=b; #[x]\\ \n é 'q' \"", "long": "word " * 40_000})
    units = encode_units(tmp_path, params(codec, container), NTSC, ff, (5, 9))
    film, bare = tmp_path / "film", tmp_path / "bare"
    sound = write_click(tmp_path / "sound", 0, 0.3) if with_sound else None
    media.concatenate(
        units,
        film,
        fps=NTSC,
        codec=params(codec, container),
        ffmpeg=ff,
        title="T;1",
        recipe=recipe,
        soundtrack=sound,
    )
    assert media.read_recipe(film, ff) == recipe
    media.strip(film, bare, ff)
    for path in (film, bare):
        assert media.read_tags(path, ff)["comment"] == media.AI_MARK
        assert media.read_tags(path, ff)["title"] == "T;1"
        assert "AI-generated" in media.AI_MARK
    with pytest.raises(InputFileError, match="no recipe"):
        media.read_recipe(bare, ff)
    assert b"prompt" not in bare.read_bytes()
    before, after = media.probe(film, ff), media.probe(bare, ff)
    assert (before.times_s, before.has_audio) == (after.times_s, after.has_audio)
    assert numbers_in(bare, ff) == list(range(14))


def test_ffmpeg_is_told_the_format_that_a_file_was_recognised_by_and_opens_nothing_else(
    ff: media.Ffmpeg, tmp_path: Path
) -> None:
    film = encode(tmp_path / "playlist.m3u8", numbered(0, 3), ff, params("h264", "mp4")).path
    with workbench() as bench:
        words = ffmpeg_python.compile(open_input(bench, film)["V:0"].output("pipe:1", format="null"))
    told = words[: words.index("-i")]
    assert told[told.index("-f") + 1] == "mov" and told[told.index("-protocol_whitelist") + 1] == "file,pipe"
    assert not any("playlist" in word for word in words)


@pytest.mark.parametrize(
    ("title", "kept"), [("C:\\", "C:\\"), ("a\\\n\\", "a\\\n\\"), ("a\0b\rc", "a b c"), ("a=\\\\", "a=\\\\")]
)
def test_no_title_takes_the_mark_or_the_recipe_away(ff: media.Ffmpeg, tmp_path: Path, title: str, kept: str) -> None:
    unit, film = encode(tmp_path / "a.mp4", numbered(0, 3), ff), tmp_path / "film.mp4"
    how = {"fps": NTSC, "codec": params("h264", "mp4"), "ffmpeg": ff}
    media.concatenate([unit], film, **how, title=title, recipe='{"a": 1}')  # type: ignore[arg-type]
    tags = media.read_tags(film, ff)
    assert (tags["comment"], tags["title"], media.read_recipe(film, ff)) == (media.AI_MARK, kept, '{"a": 1}')


def test_a_damaged_recipe_and_a_foreign_film_are_refused(ff: media.Ffmpeg, tmp_path: Path) -> None:
    unit = encode(tmp_path / "a.mp4", numbered(0, 3), ff)
    with pytest.raises(InputFileError, match="no recipe"):
        media.read_recipe(unit.path, ff)
    with pytest.raises(InputFileError, match="not a film of longtake"):
        media.strip(unit.path, tmp_path / "b.mp4", ff)
    for wrong in ("{", "[1]", '"text"'):
        film = tmp_path / "film.mp4"
        media.concatenate([unit], film, fps=NTSC, codec=params("h264", "mp4"), ffmpeg=ff, recipe=wrong)
        with pytest.raises(InputFileError, match="damaged recipe"):
            media.read_recipe(film, ff)
    (tmp_path / "text.mp4").write_text("not a film")
    with pytest.raises(InputFileError):
        media.read_recipe(tmp_path / "text.mp4", ff)
