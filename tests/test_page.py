"""The report page: whole in one file, escaped, and right in a real browser."""

from __future__ import annotations

import html
import io
import json
import re
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
from pipeline.page import MOST_ROWS, render_page
from pipeline.plots import WIDE, Bar, Mark, bar_chart, clock, curve_plot, seam_map
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
        self.named: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        self.named += [(tag, value or "") for name, value in attrs if name in ("alt", "aria-label")]
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
    assert [source[:23] for source in reader.loads] == ["data:image/jpeg;base64,"] * len(inspection.tiles)
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
    # The contact sheet's first sky, the drift curves' blue, a visible seam's red, a window's purple bar.
    assert count(shown, inspection.tiles[0].frame[4, 4]) > 1_000
    assert count(shown, (52, 88, 168)) > 500
    assert count(shown, (179, 38, 30)) > 200
    assert count(shown, (122, 78, 168)) > 1_000
    assert (shown.sum(axis=2) == 765).mean() > 0.3


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_on_a_phone_a_tablet_and_a_desk_nothing_runs_over_the_edge_and_plots_can_be_read(
    inspection: Inspection, tmp_path: Path
) -> None:
    assert BROWSER is not None
    known = replace(inspection.known, title="word " * 40 + "unbroken" * 40)
    shown = html.escape(render_page(replace(inspection, known=known)))
    frames = "".join(f'<iframe style="width:{w}px;height:900px" srcdoc="{shown}"></iframe>' for w in (375, 768, 1280))
    page = tmp_path / "frames.html"
    page.write_text(f"<meta charset=utf-8><style>iframe{{border:0}}</style>{frames}<script>{MEASURE}</script>")
    flags = ["headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "dump-dom"]
    command = [BROWSER, *(f"--{flag}" for flag in flags), f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    dom = subprocess.run(command, check=True, capture_output=True, timeout=120, text=True).stdout
    found = json.loads(dom.split("<pre>")[1].split("</pre>")[0])
    assert [(width, over) for width, over, _ in found] == [(375, 0), (768, 0), (1280, 0)]
    assert min(size_px for *_, size_px in found) >= 9


# Of each frame: its width, how far it scrolls sideways, and the smallest writing of its plots, in pixels.
MEASURE = """
onload = () => {
  const pre = document.createElement("pre")
  pre.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement
    const sizes = [...page.querySelectorAll("svg")].map(
      svg => parseFloat(getComputedStyle(svg.querySelector("text")).fontSize)
        * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)
    return [frame.clientWidth, root.scrollWidth - root.clientWidth, Math.min(...sizes)]
  }))
  document.body.replaceChildren(pre)
}
"""


def count(shown: np.ndarray, colour: tuple[int, int, int] | np.ndarray) -> int:
    """Pixels of about a colour."""
    return int((np.abs(shown - np.array(colour)).max(axis=2) < 8).sum())


# -------------------------------------------------------------------------------- for whoever reads the page


def test_pictures_and_plots_say_what_they_show(inspection: Inspection) -> None:
    reader = read(render_page(inspection))
    assert reader.seen["img"] + reader.seen["svg"] == len(reader.named)
    assert ("img", "Frame at 0:00.2 of shot one") in reader.named
    assert ("svg", "colour distance over the film") in reader.named
    # A unit at each plot's upright axis, and one at the axis of time.
    for unit, plots in (("L*", 3), ("picture heights/s", 1), ("z-score", 1), ("time in the film (min:s)", 12)):
        assert reader.text.count(unit) == plots, unit


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb` (WCAG 2.2)."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_writing_and_marks_stand_off_the_paper_in_light_and_dark(inspection: Inspection) -> None:
    style = render_page(inspection).split("<style>")[1].split("</style>")[0]
    light, dark = (dict(re.findall(r"--(\w+):(#\w{6})", part)) for part in re.findall(r":root{(.*?)}", style, re.S))
    assert light.keys() == dark.keys()
    assert set(re.findall(r"#\w{3,6}", re.sub(r":root{.*?}", "", style, flags=re.S))) == set()
    for colours in (light, dark):
        paper = luminance(colours.pop("paper"))
        colours.pop("rule")
        for name, colour in colours.items():
            low, high = sorted((luminance(colour), paper))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, colour)


def test_on_paper_it_is_light_and_no_table_is_cut_off(inspection: Inspection) -> None:
    style = render_page(inspection).split("<style>")[1].split("</style>")[0]
    assert "@media screen and (prefers-color-scheme:dark)" in style
    assert ".wide{overflow:visible}" in style.split("@media print")[1]


def test_joins_of_a_film_of_which_nothing_is_known_are_no_reproach(inspection: Inspection) -> None:
    assert '<b class="bad">1</b><span class="faint">hard joins nobody planned' in render_page(inspection)
    foreign = render_page(replace(inspection, known=Known(), seams=[]))
    assert '<b>2</b><span class="faint">hard joins found' in foreign


def test_the_seams_that_stand_out_are_told_of_however_many_there_are(inspection: Inspection) -> None:
    last = max(inspection.seams, key=lambda seam: seam.kind == "segment")
    many = [replace(last, frame=frame) for frame in range(3 * MOST_ROWS)]
    worst = replace(last, frame=3 * MOST_ROWS, score=77.7, verdict="visible")
    reader = read(render_page(replace(inspection, seams=[*many, worst])))
    assert "77.7" in reader.text
    assert any(f"and {2 * MOST_ROWS + 1} more that stand out less" in text for text in reader.text)


def test_a_plot_reaches_to_the_end_of_the_film_and_names_it_to_the_nearest_second() -> None:
    # A long film's curve ends with the mean over its last frames, its levels with the last frame.
    drawn = curve_plot(np.array([10.0, 50.0]), np.array([1.0, 2.0]), [(51.0, 60.0, 2.0)], 1.0, words="x", unit="y")
    assert max(float(x) for x in re.findall(r'x2="([\d.]+)"', drawn)) == 352
    assert ">1:00<" in drawn
    assert [clock(time_s) for time_s in (9.94, 20.97, 59.4, 59.6)] == ["9.9 s", "0:21", "0:59", "1:00"]


def test_marks_of_a_long_film_are_drawn_only_as_close_as_they_can_be_told_apart() -> None:
    times_s, score = np.linspace(0, 28_800, 1000), np.zeros(1000)
    marks = [Mark(k * 2.8, 1.0, "good", "unseen") for k in range(10_000)]
    marks[5_000] = Mark(14_000, 15.0, "bad", "worst")
    marks += [Mark(14_000, 99.0, "cut", "cut")]
    drawn = seam_map(times_s, score, marks, 8.0)
    assert WIDE // 5 < drawn.count("<circle") <= WIDE // 4
    assert "worst" in drawn
    assert ">cut<" not in drawn


def test_tasks_that_run_side_by_side_are_not_drawn_over_each_other() -> None:
    hosts = [f"raycluster-film-worker-gpu-group-{k}" for k in range(2)]
    bars = [Bar(host, k * 5.0, k * 5.0 + 10.0, "window", f"{host}/{k}") for host in hosts for k in range(4)]
    # One whose worker took it up before the task before it was committed: no second lane for that.
    bars.append(Bar("film a", 0.0, 10.0, "film", "a"))
    bars.append(Bar("film a", 9.5, 20.0, "film", "b"))
    drawn = bar_chart(bars)
    rows = Counter(re.findall(r'y="(\d+)" width', drawn))
    assert sorted(rows.values()) == [2, 2, 2, 2, 2]
    names = re.findall(r'class="right">([^<]+)<', drawn)
    assert len(set(names)) == 4


def test_a_night_between_two_runs_does_not_make_the_bars_thin() -> None:
    runs = [(0.0, 40.0), (45.0, 100.0), (50_000.0, 50_060.0), (50_070.0, 50_100.0)]
    drawn = bar_chart([Bar("window a", *run, "window", "a") for run in runs])
    assert "nothing ran for 13:51:40" in drawn and drawn.count("nothing ran") == 1
    assert "less pauses (dashed)" in drawn and ">3:20<" in drawn
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height', drawn)]
    assert min(widths) > 100
    through = bar_chart([Bar("window a", *run, "window", "a") for run in runs[:2]])
    assert "nothing ran" not in through and ">1:40<" in through
