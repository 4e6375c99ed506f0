"""Seams: how far a known one stands out against its own neighbourhood, and where unknown hard joins are.

A seam at frame t is the change from frame t-1 to frame t. `stand_out` gives each frame's change as a robust
z-score against the changes within NEIGHBOURHOOD_S around it; the same numbers for frames without a seam are
what a seam is compared with. Formulas and measured figures stand in docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from pipeline.measure import CHANGES, Floats

SeamKind = Literal["segment", "window", "cut", "given"]
Verdict = Literal["unseen", "faint", "visible"]

NEIGHBOURHOOD_S = 1.0
"""To each side of a seam; at least LEAST_REACH frames."""

LEAST_REACH = 8
GAP_FRAMES = 2
"""Frames to each side of a seam that do not count as its neighbourhood: a change of motion touches two."""

FAINT_Z, VISIBLE_Z = 3.5, 8.0
VISIBLE_RATIO = 1.25
"""A visible seam's change is also this much larger than the 90th percentile of its neighbours'."""

LASTING_S = 0.5
"""How much film on each side tells whether colour or sharpness changed for good."""

LASTING = ("lasting_colour", "lasting_sharpness")

# What no eye sees and no codec keeps: the least spread a neighbourhood is given, in each measure's unit.
_LEAST_SPREAD = {
    "pixels": 0.05,
    "structure": 5e-4,
    "colour": 0.02,
    "flow": 0.05,
    "lasting_colour": 0.05,
    "lasting_sharpness": 0.005,
}
_LEAST_LEVEL = {
    "pixels": 0.25,
    "structure": 2e-3,
    "colour": 0.1,
    "flow": 0.25,
    "lasting_colour": 0.2,
    "lasting_sharpness": 0.02,
}
_CHUNK_FRAMES = 4096

CUT_Z, CUT_RATIO, CUT_FLOW_RATIO = 8.0, 1.8, 1.5
TURN_FRAMES = 5
TURN_SHARE, TURN_CLEARNESS = 1.0, 2.0
APART_S = 0.3
"""Joins closer together than this are one."""


@dataclass(frozen=True)
class Seam:
    """A place known to be a seam: `frame` is the first frame after it."""

    frame: int
    kind: SeamKind


@dataclass(frozen=True)
class SeamScore:
    """`z` of each measure at the seam, the largest as `score`, its `measure`, and the share of the film's other
    frames that stand out less (`rank`, 0..1)."""

    frame: int
    time_s: float
    kind: SeamKind
    z: Mapping[str, float]
    score: float
    measure: str
    rank: float
    verdict: Verdict


@dataclass(frozen=True)
class Join:
    """A hard join that was found: a cut, or motion that turns at once. `strength` is 1 where it only just counts."""

    frame: int
    time_s: float
    kind: Literal["cut", "motion"]
    strength: float


@dataclass(frozen=True)
class StandOut:
    """For each measure and frame [frames]: the z-score, and the change over its neighbours' 90th percentile."""

    z: Mapping[str, Floats]
    ratio: Mapping[str, Floats]

    @property
    def score(self) -> Floats:
        """The largest z of each frame."""
        return np.asarray(np.max(np.stack(list(self.z.values())), axis=0))


def reach_frames(times_s: Floats) -> int:
    """Frames in NEIGHBOURHOOD_S."""
    return max(LEAST_REACH, round(NEIGHBOURHOOD_S / _step_s(times_s)))


def _step_s(times_s: Floats) -> float:
    return float(np.median(np.diff(times_s))) if len(times_s) > 1 else 1.0


def stand_out(table: Mapping[str, Floats]) -> StandOut:
    """Of every frame of a film, by the columns of `FilmMeter.table`."""
    times_s = table["time_s"]
    reach = reach_frames(times_s)
    lasting = max(3, round(LASTING_S / _step_s(times_s)))
    lab = np.stack([table[f"{name}_mean"] for name in ("lightness", "a", "b")], axis=1)
    detail = np.log(np.maximum(table["sharpness"], 1e-3))[:, None]
    scored = {name: _score(table[name], name, reach, GAP_FRAMES, first=1 + (name == "flow")) for name in CHANGES}
    for name, values in zip(LASTING, (lab, detail), strict=True):
        scored[name] = _score(_lasting_change(values, lasting), name, 3 * lasting, lasting, first=1)
    z = {name: pair[0] for name, pair in scored.items()}
    # A turn of the motion shows where the new motion is first seen: one frame later.
    z["flow"] = np.maximum(z["flow"], np.append(z["flow"][1:], 0.0))
    return StandOut(z, {name: pair[1] for name, pair in scored.items()})


def _score(column: Floats, name: str, reach: int, gap: int, first: int) -> tuple[Floats, Floats]:
    """z and ratio of each value against those `gap`+1 to `reach` away; values before `first` do not count."""
    padded = np.full(len(column) + 2 * reach, np.nan)
    padded[reach + first : reach + len(column)] = column[first:]
    offsets = np.arange(-reach, reach + 1)
    windows = sliding_window_view(padded, 2 * reach + 1)
    z, ratio = np.zeros(len(column)), np.zeros(len(column))
    for start in range(0, len(column), _CHUNK_FRAMES):
        part = slice(start, min(start + _CHUNK_FRAMES, len(column)))
        around = windows[part][:, np.abs(offsets) > gap]
        z[part], ratio[part] = _against(column[part], around, name)
    z[:first], ratio[:first] = 0.0, 0.0
    return z, ratio


def _against(values: Floats, around: Floats, name: str) -> tuple[Floats, Floats]:
    known = np.isfinite(around).sum(axis=1) >= LEAST_REACH // 2
    around = np.where(known[:, None], around, 0.0)
    middle = quantile(around, 0.5)
    spread = 1.4826 * quantile(np.abs(around - middle[:, None]), 0.5)
    spread = np.maximum(spread, 0.05 * middle) + _LEAST_SPREAD[name]
    high = quantile(around, 0.9) + _LEAST_LEVEL[name]
    return np.where(known, (values - middle) / spread, 0.0), np.where(known, values / high, 0.0)


def quantile(rows: Floats, share: float) -> Floats:
    """Of each row [n,k], between neighbours in proportion, NaN left out; every row has a number.

    What numpy's nanmedian and nanpercentile give, which walk over the rows one by one.
    """
    ordered = np.sort(rows, axis=1)  # NaN comes last
    place = share * (np.isfinite(ordered).sum(axis=1) - 1)
    low = np.floor(place).astype(np.intp)
    each = np.arange(len(rows))
    below, above = ordered[each, low], ordered[each, np.ceil(place).astype(np.intp)]
    return np.asarray(below + (above - below) * (place - low))


def _lasting_change(values: Floats, frames: int) -> Floats:
    """Distance between the medians of the `frames` frames [n,c] from t on and of those before t; [n]."""
    change = np.zeros(len(values))
    if len(values) >= 2 * frames:
        medians = np.median(sliding_window_view(values, frames, axis=0), axis=-1)
        steps = np.linalg.norm(medians[frames:] - medians[:-frames], axis=1)
        change[frames : len(values) - frames + 1] = steps
    return change


def score_seams(table: Mapping[str, Floats], seams: Sequence[Seam], found: StandOut) -> list[SeamScore]:
    """Each known seam of the film; one outside of it is a ValueError."""
    frames = len(table["time_s"])
    if any(not 0 < seam.frame < frames for seam in seams):
        raise ValueError(f"a seam outside of the film's {frames} frames")
    apart = np.ones(frames, bool)
    apart[0] = False
    for seam in seams:
        apart[max(0, seam.frame - GAP_FRAMES) : seam.frame + GAP_FRAMES + 1] = False
    others = found.score[apart]
    return [_score_seam(table, seam, found, others) for seam in seams]


def _score_seam(table: Mapping[str, Floats], seam: Seam, found: StandOut, others: Floats) -> SeamScore:
    t = seam.frame
    z = {name: float(column[t]) for name, column in found.z.items()}
    measure = max(z, key=z.__getitem__)
    is_large = max(float(column[t]) for column in found.ratio.values()) >= VISIBLE_RATIO
    verdict: Verdict = "unseen"
    if z[measure] >= FAINT_Z:
        verdict = "visible" if z[measure] >= VISIBLE_Z and is_large else "faint"
    rank = float((others < z[measure]).mean()) if len(others) else 0.0
    return SeamScore(t, float(table["time_s"][t]), seam.kind, z, z[measure], measure, rank, verdict)


def find_joins(table: Mapping[str, Floats], headings: Floats, found: StandOut) -> list[Join]:
    """Hard joins of a film nobody described: cuts, jumps, and motion that turns from one frame to the next.

    `headings` [frames, HEADINGS] is `FilmMeter.headings`. A single frame that flashes up is no join.
    """
    strength = np.minimum(found.z["pixels"] / CUT_Z, found.ratio["pixels"] / CUT_RATIO)
    strength = np.minimum(strength, found.ratio["flow"] / CUT_FLOW_RATIO)
    times_s, apart = table["time_s"], max(3, round(APART_S / _step_s(table["time_s"])))
    joins = [
        Join(t, float(times_s[t]), "cut", float(strength[t]))
        for t in _peaks(strength, apart)
        if not _is_flash(table, t)
    ]
    turning = turns(headings)
    for t in _peaks(turning, TURN_FRAMES):
        if all(abs(t - join.frame) > TURN_FRAMES for join in joins):
            joins.append(Join(t, float(times_s[t]), "motion", float(turning[t])))
    return sorted(joins, key=lambda join: join.frame)


def _is_flash(table: Mapping[str, Floats], t: int) -> bool:
    near = table["flash"][t : t + 2]
    return bool(near.max() > 0.5 * table["pixels"][t])


def turns(headings: Floats) -> Floats:
    """How much the motion after each frame differs from that before it; 1 only just counts as a turn.

    Compared are the medians over TURN_FRAMES frames of the motion by direction: as a share of the motion, and
    in relation to how much the motion varies on either side.
    """
    frames, k = len(headings), TURN_FRAMES
    strength = np.zeros(frames)
    if frames < 2 * k + 2:
        return strength
    windows = sliding_window_view(headings, k, axis=0)
    medians = np.median(windows, axis=-1)
    vary = np.abs(windows - medians[..., None]).sum(axis=1).mean(axis=1)
    # Flow at index i leads from frame i-1 to i. Before frame t: t-k..t-1; after it: t+1..t+k; flow 0 is none.
    before, after = slice(1, frames - 2 * k), slice(k + 2, frames - k + 1)
    apart = np.abs(medians[after] - medians[before]).sum(axis=1)
    whole = np.maximum(medians[after].sum(axis=1), medians[before].sum(axis=1)) + 0.02
    clear = apart / (vary[after] + vary[before] + 1e-3)
    strength[k + 1 : frames - k] = np.minimum(apart / whole / TURN_SHARE, clear / TURN_CLEARNESS)
    return strength


def _peaks(strength: Floats, apart: int) -> list[int]:
    """Places of at least 1, the strongest first, none within `apart` of a stronger one."""
    peaks: list[int] = []
    candidates: NDArray[np.intp] = np.flatnonzero(strength >= 1.0)
    for t in sorted(candidates.tolist(), key=lambda i: -float(strength[i])):
        if all(abs(t - peak) > apart for peak in peaks):
            peaks.append(t)
    return peaks
