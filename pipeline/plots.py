"""Small pictures for the report page as inline SVG: curves over time, marks along the film, bars of tasks.

Every function gives one `<svg>` element that scales with the page and needs nothing but itself; `words` say what it
shows to who cannot see it. Numbers that are not finite are refused by the caller: what is plotted was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import accumulate

from pipeline.measure import Floats
from pipeline.times import hms

WIDTH, HEIGHT = 360, 130
WIDE, ROW = 1120, 18
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 8, 8, 20
_MARK_PX = 4
PAUSE_SHARE = 0.5
"""Of the time in which tasks ran: what a pause has to exceed to be left out."""


@dataclass(frozen=True)
class Mark:
    """A place along the film: `time_s`, how high it reaches, a CSS class for its colour, words to show."""

    time_s: float
    height: float
    style: str
    words: str


@dataclass(frozen=True)
class Bar:
    """One stretch of work from `start_s` to `stop_s` in row `row`."""

    row: str
    start_s: float
    stop_s: float
    style: str
    words: str


def curve_plot(
    times_s: Floats,
    values: Floats,
    ends: Sequence[tuple[float, float, float]],
    least_span: float,
    *,
    words: str,
    unit: str,
) -> str:
    """A curve; `ends` are level lines (from_s, to_s, level). The scale spans at least `least_span`."""
    low, high = float(values.min()), float(values.max())
    spare = max(0.0, least_span - (high - low)) / 2 + 0.06 * max(high - low, least_span)
    low, high = low - spare, high + spare
    last_s = max(float(times_s[-1]), *(stop_s for _, stop_s, _ in ends), 1e-6)
    across, down = _scales(WIDTH, HEIGHT, last_s, low, high)
    points = " ".join(f"{across(t):.1f},{down(v):.1f}" for t, v in zip(times_s, values, strict=True))
    levels = "".join(_line(across(a), down(y), across(b), down(y), "level") for a, b, y in ends)
    body = _axes(WIDTH, HEIGHT, last_s, low, high, unit) + f'<polyline class="curve" points="{points}"/>' + levels
    return _svg(WIDTH, HEIGHT, body, words)


def seam_map(times_s: Floats, score: Floats, marks: Sequence[Mark], threshold: float) -> str:
    """How much each moment stands out, as a curve, with a mark for every seam; heights are cut at the top.

    Of marks too close together to be told apart only the highest is drawn, a cut only where there is no other.
    """
    last_s = max(float(times_s[-1]), 1e-6)
    top = 2.5 * threshold
    across, down = _scales(WIDE, 190, last_s, 0.0, top)
    points = " ".join(f"{across(t):.1f},{down(min(max(v, 0.0), top)):.1f}" for t, v in zip(times_s, score, strict=True))
    clear: dict[int, Mark] = {}
    for mark in sorted(marks, key=lambda mark: (mark.style != "cut", mark.height)):
        clear[int(across(mark.time_s)) // _MARK_PX] = mark
    stems = "".join(
        f'<g class="{escape(mark.style)}"><title>{escape(mark.words)}</title>'
        + _line(across(mark.time_s), down(0), across(mark.time_s), down(_between(mark.height, top)), "stem")
        + f'<circle cx="{across(mark.time_s):.1f}" cy="{down(_between(mark.height, top)):.1f}" r="{_MARK_PX}"/></g>'
        for mark in clear.values()
    )
    limit = _line(across(0), down(threshold), across(last_s), down(threshold), "limit")
    axes = _axes(WIDE, 190, last_s, 0.0, top, "z-score")
    body = axes + f'<polyline class="curve" points="{points}"/>' + limit + stems
    return _svg(WIDE, 190, body, "How much each moment of the film stands out, with its seams")


def _between(height: float, top: float) -> float:
    return min(max(height, 0.04 * top), top)


def bar_chart(bars: Sequence[Bar]) -> str:
    """Work over time, one row for each worker in the order of first appearance, more where its work overlaps."""
    bars, pauses = _without_pauses(bars)
    lanes = _lanes(bars)
    last_s = max((bar.stop_s for bar in bars), default=0.0) or 1.0
    height = _TOP + ROW * len(lanes) + _BOTTOM
    left = 180
    scale = (WIDE - left - _RIGHT) / last_s
    body = ""
    for i, (row, lane) in enumerate(lanes):
        body += f'<text x="{left - 8}" y="{_TOP + ROW * i + 13}" class="right">{escape(_shortened(row))}</text>'
        for bar in lane:
            x, width = left + bar.start_s * scale, max(1.0, (bar.stop_s - bar.start_s) * scale - 0.5)
            y = _TOP + ROW * i + 2
            body += f'<rect class="{escape(bar.style)}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 4}">'
            body += f"<title>{escape(bar.words)}</title></rect>"
    for at_s, length_s in pauses:
        x = left + at_s * scale
        body += f'<g><title>nothing ran for {hms(length_s)}</title>{_line(x, _TOP, x, height - _BOTTOM, "limit")}</g>'
    words = "time since the first task began" + (", less pauses (dashed)" if pauses else "")
    body += _time_axis(words, last_s, left, WIDE, height)
    return _svg(WIDE, height, body, "Tasks over time")


def _without_pauses(bars: Sequence[Bar]) -> tuple[list[Bar], list[tuple[float, float]]]:
    """The bars moved together where nothing ran for more than PAUSE_SHARE of the time in which something did, as over
    night, and (where, how long) of each such pause.
    """
    ordered = sorted(bars, key=lambda bar: bar.start_s)
    ended_s = list(accumulate((bar.stop_s for bar in ordered), max))
    gaps_s = [max(0.0, bar.start_s - before_s) for bar, before_s in zip(ordered[1:], ended_s, strict=False)]
    ran_s = (ended_s[-1] - ordered[0].start_s if bars else 0.0) - sum(gaps_s)
    left_out_s, moved, pauses = 0.0, ordered[:1], []
    for bar, gap_s in zip(ordered[1:], gaps_s, strict=True):
        if gap_s > PAUSE_SHARE * ran_s:
            left_out_s += gap_s
            pauses.append((bar.start_s - left_out_s, gap_s))
        moved.append(replace(bar, start_s=bar.start_s - left_out_s, stop_s=bar.stop_s - left_out_s))
    return moved, pauses


def _lanes(bars: Sequence[Bar]) -> list[tuple[str, list[Bar]]]:
    """The bars of each row, in as many lanes as it takes to show them all; a row's further lanes are named ""."""
    rows: dict[str, list[list[Bar]]] = {bar.row: [] for bar in bars}
    for bar in sorted(bars, key=lambda bar: bar.start_s):
        # A task ends when it is committed, a moment after its worker began with the next.
        begins_s = bar.start_s + 0.1 * (bar.stop_s - bar.start_s)
        lane = next((lane for lane in rows[bar.row] if lane[-1].stop_s <= begins_s), None)
        if lane is None:
            rows[bar.row].append(lane := [])
        lane.append(bar)
    return [(row if i == 0 else "", lane) for row, lanes in rows.items() for i, lane in enumerate(lanes)]


def _shortened(text: str, most: int = 25) -> str:
    """Without its middle where it is long: hosts of a cluster differ at either end."""
    return text if len(text) <= most else f"{text[: most - 11]}…{text[-10:]}"


def clock(seconds: float) -> str:
    """`m:ss` to the nearest second, or tenths of seconds below ten."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"


class _Scale:
    def __init__(self, start: float, stop: float, low: float, high: float) -> None:
        self.start, self.low = start, low
        self.factor = (stop - start) / (high - low)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) * self.factor


def _scales(width: int, height: int, last_s: float, low: float, high: float) -> tuple[_Scale, _Scale]:
    return _Scale(_LEFT, width - _RIGHT, 0.0, last_s), _Scale(height - _BOTTOM, _TOP, low, high)


def _axes(width: int, height: int, last_s: float, low: float, high: float, unit: str) -> str:
    floor = height - _BOTTOM
    body = _line(_LEFT, floor, width - _RIGHT, floor, "axis") + _line(_LEFT, _TOP, _LEFT, floor, "axis")
    for value, y in ((low, floor), (high, _TOP + 9)):
        body += f'<text x="{_LEFT - 5}" y="{y}" class="right">{value:.3g}</text>'
    middle = (_TOP + floor) // 2
    body += f'<text x="11" y="{middle}" class="middle" transform="rotate(-90 11 {middle})">{escape(unit)}</text>'
    return body + _time_axis("time in the film", last_s, _LEFT, width, height)


def _time_axis(words: str, last_s: float, left: int, width: int, height: int) -> str:
    y, unit = height - 5, "s" if last_s < 10 else "min:s"
    body = f'<text x="{left}" y="{y}">0</text>'
    body += f'<text x="{(left + width - _RIGHT) // 2}" y="{y}" class="middle">{words} ({unit})</text>'
    return body + f'<text x="{width - _RIGHT}" y="{y}" class="right">{clock(last_s)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _svg(width: int, height: int, body: str, words: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(words)}">{body}</svg>'
