"""Hostile input by the thousand: `python -m tests.fuzz --inputs 100000`.

What comes from outside (storyboards, pictures, films, sounds, names) is made by hypothesis: from nothing, and by
damaging real ones. Each door may take an input or refuse it with the project's own error; anything else (another
exception, more than a few seconds, a name outside the folder) ends the run with exit code 1 and the input.
"""

from __future__ import annotations

import argparse
import io
import pickle
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from PIL import Image

from pipeline.errors import InputFileError, SettingError, SpecError
from pipeline.facts import CheckpointFacts, Facts
from pipeline.media_child import find_ffmpeg
from pipeline.media_read import LARGEST_PICTURE_PX, probe, read_image, sniff
from pipeline.plan import plan_film
from pipeline.spec import parse_spec
from pipeline.store import check_path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MOST_S = 5.0
"""For one input; a busy machine may take ten times what a quiet one does."""


# Inputs


def damaged(whole: list[bytes]) -> SearchStrategy[bytes]:
    """Real files with pieces changed, taken out, doubled and put in."""
    edit = st.tuples(st.floats(0, 1), st.sampled_from("xdpi"), st.binary(min_size=1, max_size=12))

    def apply(file: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
        for place, kind, piece in edits:
            at = int(place * len(file))
            if kind == "x":
                file = file[:at] + piece + file[at + len(piece) :]
            elif kind == "d":
                file = file[:at] + file[at + 8 * len(piece) :]
            elif kind == "p":
                file = file[:at] + file[at // 2 : at] + file[at:]
            else:
                file = file[:at] + piece + file[at:]
        return file

    return st.builds(apply, st.sampled_from(whole), st.lists(edit, max_size=6))


WORDS = st.sampled_from([
    "shots", "title", "prompt", "duration", "continue", "previous", "frame_of", "transition", "crossfade", "output",
    "path", "size", "fps", "codec", "image", "video", "soundtrack", "loras", "file", "strength", "seed", "12s", "0s",
    "-1s", "1e400", "9999999h", "NaN", ".inf", "~", "1/0", "16:9", "1280x704", "720p", "../../etc", "/etc/passwd",
    "http://127.0.0.1/", "concat:a|b", "!!python/object/apply:os.system", "&a", "*a", "<<:", "h264", "ffv1",
])  # fmt: skip
VALUES: SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)


def storyboards() -> SearchStrategy[str]:
    files = [path.read_bytes() for path in sorted(EXAMPLES.glob("*.yaml"))]
    shot = st.fixed_dictionaries(
        {"prompt": st.text(max_size=30) | WORDS | VALUES, "duration": WORDS | VALUES},
        optional=dict.fromkeys(("id", "image", "video", "frame_of", "transition", "continue", "seed"), VALUES),
    )
    made = st.fixed_dictionaries(
        {"shots": st.lists(shot, max_size=4) | VALUES},
        optional=dict.fromkeys(("title", "seed", "output", "loras", "look", "quality", "refinement"), VALUES),
    )
    return st.one_of(
        damaged(files).map(lambda data: data.decode("utf-8", "replace")),
        made.map(lambda value: yaml.safe_dump(value, allow_unicode=True)),
        st.text(max_size=200),
        st.lists(WORDS, max_size=30).map(" ".join),
    )


def pictures() -> list[bytes]:
    found = []
    for form in ("PNG", "JPEG", "WEBP"):
        for mode in ("RGB", "L"):
            file = io.BytesIO()
            Image.linear_gradient("L").resize((40, 30)).convert(mode).save(file, form)
            found.append(file.getvalue())
    return [*found, bomb(60_000, 60_000), bomb(20_000, 3_000)]


def bomb(width_px: int, height_px: int) -> bytes:
    """A PNG of a few bytes that says it is this large."""
    header = width_px.to_bytes(4, "big") + height_px.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    pixels = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


DISGUISES = [
    b"ffconcat version 1.0\nfile /etc/passwd\n",
    b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    b"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
    b'<?xml version="1.0"?><MPD><Period><BaseURL>file:///etc/passwd</BaseURL></Period></MPD>',
    b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", b"%!PS-Adobe\nrun\n", b"[playlist]\nFile1=/etc/passwd\n",
    pickle.dumps({"latents": [1.0]}), b"PK\x03\x04" + bytes(60),
]  # fmt: skip
"""Files that make some other file be read, or code be run, by whoever trusts their name."""
HEADS = [
    b"", b"\0\0\0\x18ftypisom", b"RIFF\0\0\0\0AVI ", b"\x1a\x45\xdf\xa3", b"OggS", b"fLaC", b"ID3\x04",
    b"G" + bytes(187),
]  # fmt: skip
"""How the formats begin that are taken."""


# Doors


def take_storyboard(text: str) -> bool:
    """Read it and, if it is one, plan it; whether it was taken."""
    try:
        spec = parse_spec(text)
        if spec.media_paths() or spec.loras:
            return True
        plan = plan_film(spec, Facts(CheckpointFacts("pocket", "d" * 64))) if len(spec.shots) < 50 else None
    except (SpecError, SettingError):
        return False
    assert plan is None or plan.film_frames > 0
    return True


def take_picture(data: bytes, folder: Path) -> bool:
    path = folder / "picture"
    path.write_bytes(data)
    try:
        frame = read_image(path)
    except InputFileError:
        return False
    assert frame.ndim == 3 and frame.shape[0] * frame.shape[1] <= LARGEST_PICTURE_PX
    return True


def look_at_head(data: bytes, folder: Path) -> bool:
    path = folder / "film.mp4"
    path.write_bytes(data)
    try:
        kind = sniff(path)
    except InputFileError:
        return False
    assert kind not in ("concat", "hls", "dash", "image2", "lavfi"), "a format that opens other files"
    return True


def probe_film(data: bytes, folder: Path) -> bool:
    """Through ffmpeg itself: slow, so few of these."""
    path = folder / "film.mp4"
    path.write_bytes(data)
    try:
        probe(path, find_ffmpeg())
    except InputFileError:
        return False
    return True


def take_name(name: str, folder: Path) -> bool:
    root = (folder / "render").resolve()
    try:
        place = root / check_path(name)
    except SettingError:
        return False
    assert place.resolve().is_relative_to(root) and place != root, "outside of the folder"
    return True


def names() -> SearchStrategy[str]:
    part = st.sampled_from(["..", ".", "", "a", "a.b", "~", "\0", "C:", "\\", "é", "%2e%2e", "-", "a" * 129, "/"])
    return st.text(max_size=40) | st.lists(part | st.text("abc./\\", max_size=6), max_size=5).map("/".join)


# Runs


def run(strategy: SearchStrategy[Any], door: Callable[[Any], bool], inputs: int) -> tuple[int, int]:
    """(inputs, how many were taken). Raises what a door raised that it may not, with the input."""
    seen = [0, 0]

    @settings(
        max_examples=inputs, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck), derandomize=True,
    )  # fmt: skip
    @given(strategy)
    def feed(value: Any) -> None:
        began_s = time.process_time()
        seen[0] += 1
        seen[1] += door(value)
        assert time.process_time() - began_s < MOST_S, "took too long"

    feed()
    return seen[0], seen[1]


def run_all(inputs: int) -> dict[str, tuple[int, int]]:
    """All doors: half of the inputs are storyboards."""
    films = st.builds(lambda head, rest: head + rest, st.sampled_from(HEADS), st.binary(max_size=400))
    stills = damaged(pictures()) | st.binary(max_size=200)
    with TemporaryDirectory() as name:
        folder = Path(name)
        return {
            "storyboards": run(storyboards(), take_storyboard, inputs // 2),
            "pictures": run(stills, lambda d: take_picture(d, folder), inputs // 5),
            "heads": run(damaged(DISGUISES) | films, lambda d: look_at_head(d, folder), inputs // 5),
            "films": run(damaged(DISGUISES) | films, lambda d: probe_film(d, folder), max(10, inputs // 1000)),
            "names": run(names(), lambda n: take_name(n, folder), inputs // 10),
        }


def main(arguments: list[str] | None = None) -> int:
    """Run as many inputs as asked for; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    options = parser.parse_args(arguments)
    began_s = time.perf_counter()
    found = run_all(options.inputs)
    for door, (inputs, taken) in found.items():
        print(f"{door}: {inputs} inputs, {taken} taken, the others refused")
    print(f"{sum(n for n, _ in found.values())} inputs in {time.perf_counter() - began_s:.0f} s, nothing wrong")
    return 0


if __name__ == "__main__":
    sys.exit(main())
