"""Flicker, and frames that are no film: black, flat, frozen, noise, a single frame that flashes up.

Thresholds are those of the gate where it has the same one (pipeline/quality.py). Definitions stand in
docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.measure import Floats
from pipeline.quality import FLAT_LEVELS, STILL_LEVELS

FaultKind = Literal["black", "flat", "frozen", "noise", "flash"]

BLACK_LEVEL = 8.0
FROZEN_S = 1.0
"""A picture that stands still for less is a slow moment, or a film of fewer frames shown at a higher rate."""

NOISE_COHERENCE = 0.5
"""Neighbouring pixels of a picture correlate above 0.8, those of noise hardly."""

FLASH_LEVELS = 12.0


@dataclass(frozen=True)
class Fault:
    """Frames [start, stop) of the film, at `time_s`, for `seconds`."""

    kind: FaultKind
    start: int
    stop: int
    time_s: float
    seconds: float


def flicker(table: Mapping[str, Floats]) -> float:
    """Mean |L[t] - (L[t-1] + L[t+1]) / 2| of the mean lightness L*: what goes up and comes down again."""
    lightness = table["lightness_mean"]
    if len(lightness) < 3:
        return 0.0
    return float(np.abs(lightness[1:-1] - (lightness[:-2] + lightness[2:]) / 2).mean())


def find_faults(table: Mapping[str, Floats]) -> list[Fault]:
    """Every run of faulty frames, in order."""
    is_flat = table["deviation"] < FLAT_LEVELS
    is_black = is_flat & (table["level"] < BLACK_LEVEL)
    is_still = table["pixels"] < STILL_LEVELS
    is_still[:1] = False
    flashes = np.append(table["flash"][1:] > FLASH_LEVELS, False)
    marks: dict[FaultKind, NDArray[np.bool_]] = {
        "black": is_black,
        "flat": is_flat & ~is_black,
        "frozen": is_still & ~is_flat,
        "noise": table["coherence"] < NOISE_COHERENCE,
        "flash": flashes,
    }
    faults = [fault for kind, mark in marks.items() for fault in _runs(kind, mark, table["time_s"])]
    return sorted((f for f in faults if f.kind != "frozen" or f.seconds >= FROZEN_S), key=lambda f: f.start)


def _runs(kind: FaultKind, mark: NDArray[np.bool_], times_s: Floats) -> list[Fault]:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mark.astype(np.int8), [0]))))
    step_s = float(np.median(np.diff(times_s))) if len(times_s) > 1 else 0.0
    return [
        Fault(kind, int(a), int(b), float(times_s[a]), float(times_s[b - 1] - times_s[a] + step_s))
        for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]
