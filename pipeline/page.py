"""The report page: one HTML file that loads nothing, not even a script.

Contract: pure, the same inspection gives the same bytes. Contact sheet, drift curves, seam map, faults and, of
a render, its tasks' timings. A Content-Security-Policy in the page forbids every outside resource.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby

import numpy as np

from pipeline.drift import END_SHARE, Drift, curve
from pipeline.inspection import Inspection, TaskTiming
from pipeline.measure import DRIFT_MEASURES, Floats
from pipeline.plots import Bar, Mark, bar_chart, clock, curve_plot, seam_map
from pipeline.report import jpeg
from pipeline.seams import VISIBLE_Z, SeamScore
from pipeline.times import timecode

MOST_ROWS = 200
"""Rows of a table before the rest is only counted; `longtake inspect` writes all of them into inspection.json."""

_LEAST_SPANS = {
    "saturation": 0.05,
    "sharpness": 2.0,
    "motion": 0.05,
    "colour_distance": 2.0,
}
_LEAST_SPAN_LAB = 4.0

_STYLE = """
:root{color-scheme:light dark;--paper:#ffffff;--ink:#1c1c22;--faint:#6d6d78;--rule:#dedee4;--curve:#3458a8;
--window:#7a4ea8;--good:#2a7d46;--warn:#a56200;--bad:#b3261e}
@media screen and (prefers-color-scheme:dark){:root{--paper:#17171b;--ink:#e8e8ec;--faint:#a2a2ae;--rule:#3c3c46;
--curve:#86a8f0;--window:#b592e0;--good:#63c285;--warn:#e0a040;--bad:#f2857c}}
*{box-sizing:border-box}body{margin:0;font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);
overflow-wrap:anywhere}
main{max-width:1180px;margin:0 auto;padding:24px 28px 60px}h1{font-size:26px;margin:0 0 2px}
h2{font-size:18px;margin:36px 0 10px;border-bottom:1px solid var(--rule);padding-bottom:4px}
h3{font-size:13px;margin:16px 0 4px;font-weight:600}p{margin:4px 0 10px;max-width:78ch}.faint{color:var(--faint)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px;margin-top:16px}
.card{border:1px solid var(--rule);border-radius:8px;padding:10px 14px}.card b{display:block;font-size:22px}
.plots,.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(320px,100%),1fr));gap:14px 22px}
.sheet{grid-template-columns:repeat(auto-fill,minmax(140px,1fr));gap:8px}figure{margin:0}
figcaption{display:flex;justify-content:space-between;gap:8px;font-size:12px}figcaption span{white-space:nowrap}
figure h3{margin:0}
img,svg{display:block;width:100%;height:auto}svg text{font-size:11px;fill:var(--faint)}
.right{text-anchor:end}.middle{text-anchor:middle}.axis{stroke:var(--faint)}
.curve{fill:none;stroke:var(--curve);stroke-width:1.4}
.level{stroke:var(--bad);stroke-width:2}.limit{stroke:var(--bad);stroke-dasharray:5 4}
.stem{stroke:currentColor;stroke-width:1.5}circle{fill:currentColor}
.good{color:var(--good)}.warn{color:var(--warn)}.bad{color:var(--bad)}.cut{color:var(--faint)}
rect.text,rect.source{fill:var(--faint)}rect.segment{fill:var(--curve)}rect.window{fill:var(--window)}
rect.encode{fill:var(--good)}rect.film{fill:var(--ink)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{text-align:right;padding:3px 10px;border-bottom:1px solid var(--rule)}
th{font-weight:600;color:var(--faint)}td:first-child,th:first-child{text-align:left}
td:not(:first-child){white-space:nowrap}
.wide{overflow-x:auto}.wide svg{min-width:960px}
@media print{main{padding:0 1px}.wide{overflow:visible}.wide svg{min-width:0}th,td{font-size:9px;padding:2px 4px;
white-space:normal!important}
h2,h3{break-after:avoid}figure,svg,tr,.card{break-inside:avoid}}
"""


def render_page(inspection: Inspection) -> str:
    """The page's HTML."""
    title = inspection.known.title or inspection.film
    sections = [
        _head(inspection, title),
        _contact_sheet(inspection),
        _drift(inspection),
        _seams(inspection),
        _faults(inspection),
        _timings(inspection.known.timings),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _head(inspection: Inspection, title: str) -> str:
    info = inspection.info
    fps = f"{float(info.fps):g}" if info.fps else "?"
    facts = (
        f"{info.width_px} x {info.height_px}, {fps} frames/s, {info.frame_count} frames, "
        f"{timecode(float(info.duration_s))}, {info.codec}"
    )
    visible = sum(seam.verdict == "visible" for seam in _seams_proper(inspection))
    joins = len(_unplanned(inspection))
    lasting = max(inspection.drift, key=lambda name: _relative(name, inspection.drift[name]))
    known = len(_seams_proper(inspection))
    planned = bool(inspection.known.shots)
    cards = [
        _card("seams that stand out", f"{visible} of {known}" if known else "none known", visible > 0),
        _card("hard joins nobody planned" if planned else "hard joins found", str(joins), planned and joins > 0),
        _card("faults", str(len(inspection.faults)), bool(inspection.faults)),
        _card("flicker", f"{inspection.flicker:.3f} L*", False),
        _card(f"largest drift: {_words(lasting)}", _with_unit(lasting, inspection.drift[lasting].change), False),
    ]
    film = f"{escape(inspection.film)} · " if title != inspection.film else ""
    return f'<h1>{escape(title)}</h1><p class="faint">{film}{facts}</p><div class="cards">{"".join(cards)}</div>'


def _seams_proper(inspection: Inspection) -> list[SeamScore]:
    """Those that nobody is meant to see."""
    return [seam for seam in inspection.seams if seam.kind != "cut"]


def _unplanned(inspection: Inspection) -> list[int]:
    """Frames of the joins that were found and are no cut of the film."""
    cuts = [seam.frame for seam in inspection.seams if seam.kind == "cut"]
    return [j.frame for j in inspection.joins if all(abs(j.frame - cut) > 2 for cut in cuts)]


def _card(words: str, value: str, is_bad: bool) -> str:
    style = ' class="bad"' if is_bad else ""
    return f'<div class="card"><b{style}>{escape(value)}</b><span class="faint">{escape(words)}</span></div>'


def _contact_sheet(inspection: Inspection) -> str:
    pictures = []
    for tile in inspection.tiles:
        data, time, shot = base64.b64encode(jpeg(tile.frame)).decode(), timecode(tile.time_s), escape(tile.shot_id)
        alt = f"Frame at {time}" + (f" of shot {shot}" if shot else "")
        caption = f"<figcaption>{shot} <span class=faint>{time}</span></figcaption>"
        pictures.append(f'<figure><img alt="{alt}" src="data:image/jpeg;base64,{data}">{caption}</figure>')
    return f'<h2>Contact sheet</h2><div class="sheet">{"".join(pictures)}</div>'


# ------------------------------------------------------------------------------------------------- drift


def _words(name: str) -> str:
    return name.replace("_", " ")


def _with_unit(name: str, value: float) -> str:
    unit = DRIFT_MEASURES[name]
    return f"{value:.3g}" if unit == "0..1" else f"{value:.3g} {unit}"


def _least_span(name: str) -> float:
    return _LEAST_SPANS.get(name, _LEAST_SPAN_LAB)


def _relative(name: str, drift: Drift) -> float:
    return drift.change / _least_span(name)


def _drift(inspection: Inspection) -> str:
    table, last_s = inspection.table, float(inspection.table["time_s"][-1])
    plots = []
    for name, drift in inspection.drift.items():
        times_s, values = curve(table["time_s"], table[name])
        ends = [(0.0, END_SHARE * last_s, drift.first), ((1 - END_SHARE) * last_s, last_s, drift.last)]
        caption = f"{_words(name)} <span class=faint>{escape(DRIFT_MEASURES[name])}, drift {drift.change:.3g}, "
        caption += f"{drift.slope_per_minute:+.3g} a minute</span>"
        words, unit = f"{_words(name)} over the film", DRIFT_MEASURES[name]
        plot = curve_plot(times_s, values, ends, _least_span(name), words=words, unit=unit)
        plots.append(f"<figure><h3>{caption}</h3>{plot}</figure>")
    explained = (
        "Each measure over the film. The red lines are its means over the first and the last 15 %; drift is the "
        "difference between them."
    )
    return f'<h2>Drift</h2><p>{explained}</p><div class="plots">{"".join(plots)}</div>{_shots(inspection)}'


def _shots(inspection: Inspection) -> str:
    if len(inspection.known.shots) < 2:
        return ""
    names = list(DRIFT_MEASURES)
    rows = [
        [shot.id, *(f"{inspection.shot_drift[shot.id][name].change:.3g}" for name in names)]
        for shot in inspection.known.shots
    ]
    return "<h2>Drift within each shot</h2>" + _table(["shot", *map(_words, names)], rows)


# ------------------------------------------------------------------------------------------------- seams

_STYLES = {"unseen": "good", "faint": "warn", "visible": "bad"}


def _seams(inspection: Inspection) -> str:
    table = inspection.table
    score = _largest(inspection.found.score)
    marks = [
        Mark(
            seam.time_s,
            seam.score,
            "cut" if seam.kind == "cut" else _STYLES[seam.verdict],
            f"{timecode(seam.time_s)} {seam.kind}: {seam.verdict}, z {seam.score:.1f} ({_words(seam.measure)})",
        )
        for seam in inspection.seams
    ]
    planned = {seam.frame for seam in inspection.seams}
    marks += [
        Mark(join.time_s, 99.0, "bad", f"{timecode(join.time_s)} found: {join.kind}")
        for join in inspection.joins
        if all(abs(join.frame - frame) > 2 for frame in planned)
    ]
    explained = (
        "How much the change to each frame stands out against the second around it (robust z-score, the largest "
        "of six measures). Marks are seams: green ones are unseen, amber ones faint, red ones visible; cuts between "
        "shots are grey; crossfades are meant to stand out and have none. "
        f"The dashed line is z = {VISIBLE_Z:g}. Rank is the share of the film's other frames that stand out less."
    )
    times_s = np.interp(np.linspace(0, len(table["time_s"]) - 1, len(score)), *_indexed(table["time_s"]))
    drawn = seam_map(times_s, score, marks, VISIBLE_Z)
    drawn = f'<div class="wide">{drawn}</div>'
    return f"<h2>Seam map</h2><p>{explained}</p>{drawn}{_seam_table(inspection)}{_join_table(inspection)}"


def _indexed(values: Floats) -> tuple[Floats, Floats]:
    return np.arange(len(values), dtype=np.float64), values


def _largest(values: Floats, points: int = 1000) -> Floats:
    """The largest value of each of at most `points` equal runs: a peak is never averaged away."""
    edges = np.linspace(0, len(values), min(points, len(values)) + 1).astype(int)[:-1]
    return np.asarray(np.maximum.reduceat(values, edges))


def _seam_table(inspection: Inspection) -> str:
    if not inspection.seams:
        return "<p class=faint>No seams are known of this film.</p>"
    names = list(inspection.seams[0].z)
    shown = sorted(inspection.seams, key=lambda seam: (seam.kind == "cut", -seam.score))[:MOST_ROWS]
    rows = [
        [
            timecode(seam.time_s),
            str(seam.frame),
            seam.kind,
            "meant" if seam.kind == "cut" else seam.verdict,
            f"{seam.score:.1f}",
            f"{seam.rank:.0%}",
            *(f"{seam.z[name]:.1f}" for name in names),
        ]
        for seam in sorted(shown, key=lambda seam: seam.frame)
    ]
    heads = ["time", "frame", "kind", "verdict", "z", "rank", *map(_words, names)]
    left_out = len(inspection.seams) - len(shown)
    return f"<h3>Known seams</h3>{_table(heads, rows)}{_left_out(left_out, ' that stand out less')}"


def _join_table(inspection: Inspection) -> str:
    rows = [[timecode(join.time_s), str(join.frame), join.kind, f"{join.strength:.1f}"] for join in inspection.joins]
    if not rows:
        return "<p class=faint>No hard join was found by looking alone.</p>"
    return "<h3>Hard joins found by looking alone</h3>" + _table(["time", "frame", "kind", "strength"], rows)


# ---------------------------------------------------------------------------------------- faults, timings


def _faults(inspection: Inspection) -> str:
    rows = [
        [timecode(fault.time_s), f"{fault.start} to {fault.stop - 1}", fault.kind, f"{fault.seconds:.2f} s"]
        for fault in inspection.faults
    ]
    if not rows:
        return "<h2>Faults</h2><p class=faint>No black, flat, frozen, noisy or flashing frame.</p>"
    return "<h2>Faults</h2>" + _table(["time", "frames", "kind", "length"], rows)


def _timings(timings: Sequence[TaskTiming]) -> str:
    if not timings:
        return ""
    first_s = min(timing.finished_at_s - timing.seconds for timing in timings)
    bars = [
        Bar(
            f"{timing.kind} {timing.host}",
            timing.finished_at_s - timing.seconds - first_s,
            timing.finished_at_s - first_s,
            timing.kind,
            f"{timing.label}: {timing.seconds:.2f} s on {timing.host}",
        )
        for timing in timings
    ]
    rows = [
        [timing.label, timing.kind, timing.host, f"{timing.seconds:.2f} s"]
        for timing in sorted(timings, key=lambda timing: timing.finished_at_s)
    ]
    return (
        f'<h2>Timings</h2><div class="wide">{bar_chart(bars)}</div>{_kind_table(timings)}'
        f"<h3>Each task</h3>{_table(['task', 'kind', 'host', 'time'], rows)}"
    )


def _kind_table(timings: Iterable[TaskTiming]) -> str:
    rows = []
    for kind, group in groupby(sorted(timings, key=lambda timing: timing.kind), key=lambda t: t.kind):
        seconds = [timing.seconds for timing in group]
        mean_s = sum(seconds) / len(seconds)
        rows.append([kind, str(len(seconds)), clock(sum(seconds)), f"{mean_s:.2f} s", f"{max(seconds):.2f} s"])
    return _table(["kind", "tasks", "in all", "mean", "longest"], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows[:MOST_ROWS])
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return table + _left_out(len(rows) - MOST_ROWS)


def _left_out(count: int, which: str = "") -> str:
    if count <= 0:
        return ""
    return f"<p class=faint>and {count} more{which}; `longtake inspect` writes all into inspection.json</p>"
