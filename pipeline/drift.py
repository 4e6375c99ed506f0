"""Drift: what a film loses or gains from its beginning to its end.

For every measure M of `DRIFT_MEASURES`: |mean of M over the first 15 % - mean over the last 15 %|, and the
slope of the least-squares line through M over time. Formulas stand in docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.measure import DRIFT_MEASURES, Floats

END_SHARE = 0.15


@dataclass(frozen=True)
class Drift:
    """Of one measure. `change` = |first - last|, in the measure's unit; the slope is per minute."""

    first: float
    last: float
    change: float
    slope_per_minute: float


def measure_drift(table: Mapping[str, Floats], frames: slice | None = None) -> dict[str, Drift]:
    """The drift of each measure over the film, or over some of its frames (one shot).

    `motion` leaves out the first frame, which nothing leads to.
    """
    part = frames or slice(None)
    times_s = table["time_s"][part]
    return {name: _drift(times_s, table[name][part], name) for name in DRIFT_MEASURES}


def _drift(times_s: Floats, values: Floats, name: str) -> Drift:
    if name == "motion" and len(values) > 1:
        times_s, values = times_s[1:], values[1:]
    ends = max(1, round(END_SHARE * len(values)))
    first, last = float(values[:ends].mean()), float(values[-ends:].mean())
    return Drift(first, last, abs(first - last), slope_per_minute(times_s, values))


def slope_per_minute(times_s: Floats, values: Floats) -> float:
    """Of the least-squares line; 0 for a single moment."""
    centred = times_s - times_s.mean()
    weight = float((centred**2).sum())
    return 60.0 * float((centred * (values - values.mean())).sum()) / weight if weight else 0.0


def curve(times_s: Floats, values: Floats, points: int = 240) -> tuple[Floats, Floats]:
    """At most `points` means over equal runs of frames: what a plot of a long film shows."""
    edges = np.linspace(0, len(values), min(points, len(values)) + 1).astype(int)
    counts = np.diff(edges)
    return np.add.reduceat(times_s, edges[:-1]) / counts, np.add.reduceat(values, edges[:-1]) / counts
