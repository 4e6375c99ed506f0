"""The report page: whole in one file, escaped, and right in a real browser."""

from __future__ import annotations

import io
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import media
from pipeline.inspection import Inspection, Known, Shot, TaskTiming, inspect_film
from pipeline.measure import DRIFT_MEASURES
from pipeline.page import render_page
from pipeline.seams import Seam
from tests.joined_films import draw, joined_pieces, joins_of
from tests.test_inspect import encode

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "img", "line", "circle", "polyline"}


@pytest.fixture(scope="module")
def inspection(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    pieces = joined_pieces(3, 2, ("scene",))
    frames = sum(piece.frames for piece in pieces)
    film = encode(draw(pieces), tmp_path_factory.mktemp("page") / "film.mp4")
    first, second = sorted(joins_of(pieces))
    known = Known(
        title="A circle & <script>alert(1)</script>",
        seams=[Seam(first, "cut"), Seam(second, "window"), Seam(second + 20, "segment")],
        shots=[Shot("one", 0, first), Shot("two", first, frames)],
        timings=[
            TaskTiming("segment", "one/0", "worker-a", 3.0, 103.0),
            TaskTiming("window", "one/window/0", "worker-b", 5.0, 108.0),
        ],
    )
    return inspect_film(film, media.find_ffmpeg(), known)


class Reader(HTMLParser):
    """Checks that elements close, and gathers what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: Counter[str] = Counter()
        self.loads: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


def test_the_page_loads_nothing_and_runs_nothing(inspection: Inspection) -> None:
    reader = read(render_page(inspection))
    assert reader.open == []
    assert [source[:23] for source in reader.loads] == ["data:image/jpeg;base64,"]
    assert not {"script", "link", "iframe", "object"} & set(reader.seen)


def test_a_title_is_text_and_never_markup(inspection: Inspection) -> None:
    reader = read(render_page(inspection))
    assert "A circle & <script>alert(1)</script>" in reader.text


def test_the_page_shows_drift_seams_faults_and_timings(inspection: Inspection) -> None:
    reader = read(render_page(inspection))
    words = " ".join(reader.text)
    for heading in ("Contact sheet", "Drift", "Drift within each shot", "Seam map", "Faults", "Timings"):
        assert heading in words
    assert reader.seen["polyline"] == len(DRIFT_MEASURES) + 1
    assert reader.seen["rect"] == 2
    assert "one/window/0" in words


def test_a_cut_between_shots_is_meant_and_any_other_seam_is_judged(inspection: Inspection) -> None:
    verdicts = {seam.kind: seam.verdict for seam in inspection.seams}
    assert verdicts == {"cut": "visible", "window": "visible", "segment": "unseen"}
    words = " ".join(read(render_page(inspection)).text)
    assert "meant" in words
    assert "1 of 2" in words


def test_the_same_inspection_gives_the_same_page(inspection: Inspection) -> None:
    assert render_page(inspection) == render_page(replace(inspection))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_shows_the_page(inspection: Inspection, tmp_path: Path) -> None:
    assert BROWSER is not None
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(render_page(inspection), encoding="utf-8")
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "hide-scrollbars"]
    flags += ["disable-background-networking", "disable-component-update", "disable-sync"]
    flags += [f"user-data-dir={tmp_path / 'profile'}", "window-size=1200,3600", f"screenshot={picture}"]
    command = [BROWSER, *(f"--{flag}" for flag in flags), page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    shown = np.asarray(Image.open(io.BytesIO(picture.read_bytes())).convert("RGB")).astype(int)
    assert shown.shape == (3600, 1200, 3)
    # The contact sheet's dark paper, the drift curves' blue, a visible seam's red, a window's purple bar.
    assert count(shown, (24, 24, 27)) > 20_000
    assert count(shown, (52, 88, 168)) > 500
    assert count(shown, (179, 38, 30)) > 200
    assert count(shown, (122, 78, 168)) > 1_000
    assert (shown.sum(axis=2) == 765).mean() > 0.3


def count(shown: np.ndarray, colour: tuple[int, int, int]) -> int:
    """Pixels of about a colour."""
    return int((np.abs(shown - np.array(colour)).max(axis=2) < 8).sum())
