"""What is measured on every frame of a film while it streams by: colour, sharpness, motion, change.

A `FilmMeter` is given frames in order and keeps numbers, never pictures, except for the frame before. Colour
and change are measured on a look of at most LOOK_PX on the longer side, sharpness on the frame itself.
Formulas and sources stand in docs/metrics.md.

Legend: frames uint8 [h,w,3] RGB; Lab is CIELAB (D65), L 0..100; flow [h,w,2] in pixels of the look.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.media import Frames

Floats = NDArray[np.float64]
Picture = NDArray[np.float32]

LOOK_PX = 160
"""Longer side of what colour and change are measured on."""

LEAST_LOOK_PX = 12
"""Of either side: the search for motion needs so many."""

REFERENCE_S = 3.0
"""The first seconds, whose mean colour histogram every later frame is compared with."""

DRIFT_MEASURES: Mapping[str, str] = {
    "lightness_mean": "L*",
    "lightness_spread": "L*",
    "a_mean": "a*",
    "a_spread": "a*",
    "b_mean": "b*",
    "b_spread": "b*",
    "saturation": "0..1",
    "sharpness": "levels",
    "contrast": "L*",
    "motion": "picture heights/s",
    "colour_distance": "Lab units",
}
"""Measures that a film should keep, with their units."""

CHANGES: Mapping[str, str] = {
    "pixels": "levels",
    "structure": "1 - SSIM",
    "colour": "Lab units",
    "flow": "levels",
}
"""Measures of the change from one frame to the next, with their units."""

FAULT_MEASURES = ("level", "deviation", "coherence", "flash")

HEADINGS = 8
"""Directions that motion is sorted into, each pixel's shared between the two nearest ones."""

_BINS = 64
_LAB_RANGES = ((0.0, 100.0), (-110.0, 110.0), (-110.0, 110.0))
_SSIM_C1, _SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_SSIM_WINDOW = (7, 7)


@dataclass
class _Seen:
    """What is kept of the frame before."""

    rgb: Picture
    luma: NDArray[np.uint8]
    cumulative: Floats
    flow_back: Picture | None


@dataclass
class FilmMeter:
    """Give every frame to `add`, in order; `table` has a column of one value a frame for each measure.

    A change stands at the frame it leads to; the first frame's changes are 0, and so is `flow` of the second.
    """

    _columns: dict[str, array[float]] = field(default_factory=dict)
    """Eight bytes a value, for films of hours."""
    _headings: array[float] = field(default_factory=lambda: array("d"))
    _time_s: float = 0.0
    """Of the frame before."""
    _seen: _Seen | None = None
    _rgb_before_last: Picture | None = None
    _reference: list[Floats] = field(default_factory=list)

    def add(self, frame: Frames, time_s: float) -> None:
        """Measure the next frame uint8 [h,w,3]; `time_s` seconds after the first one."""
        rgb = _look(frame)
        lab = cv2.cvtColor(rgb / np.float32(255), cv2.COLOR_RGB2LAB)
        luma = cv2.cvtColor(np.rint(rgb).astype(np.uint8), cv2.COLOR_RGB2GRAY)
        now = _Seen(rgb, luma, cumulative_histogram(lab), None)
        row = {**_colour(lab), "sharpness": sharpness(frame), **_fault_measures(rgb, luma)}
        row |= self._changes(now, time_s)
        row["flash"] = self._flash(rgb)
        row["colour_distance"] = self._colour_distance(now.cumulative, time_s)
        self._rgb_before_last = self._seen.rgb if self._seen else None
        self._seen, self._time_s = now, time_s
        self._headings.extend(headings(now.flow_back))
        for name, value in {"time_s": time_s, **row}.items():
            self._columns.setdefault(name, array("d")).append(value)

    def table(self) -> dict[str, Floats]:
        """The columns: `time_s`, DRIFT_MEASURES, CHANGES and FAULT_MEASURES, each float64 [frames]."""
        names = ("time_s", *DRIFT_MEASURES, *CHANGES, *FAULT_MEASURES)
        return {name: np.array(self._columns.get(name, ())) for name in names}

    @property
    def headings(self) -> Floats:
        """The motion in each of HEADINGS directions, [frames, HEADINGS]: pixels of the look a frame, mean over it."""
        return np.array(self._headings).reshape(-1, HEADINGS)

    def _changes(self, now: _Seen, time_s: float) -> dict[str, float]:
        before = self._seen
        if before is None:
            return {**dict.fromkeys(CHANGES, 0.0), "motion": 0.0}
        now.flow_back = _flow(now.luma, before.luma)
        step_s = max(1e-6, time_s - self._time_s)
        length = float(np.hypot(now.flow_back[..., 0], now.flow_back[..., 1]).mean())
        return {
            "pixels": float(np.abs(now.rgb - before.rgb).mean()),
            "structure": 1.0 - similarity(before.luma, now.luma),
            "colour": colour_distance(before.cumulative, now.cumulative),
            "flow": 0.0 if before.flow_back is None else _surprise(before, now.luma),
            "motion": length / len(now.luma) / step_s,
        }

    def _flash(self, rgb: Picture) -> float:
        """How much more the frame before differs from both its neighbours than they do from each other, in
        levels; stands at the frame after the one that flashes."""
        if self._seen is None or self._rgb_before_last is None:
            return 0.0
        own = min(_difference(self._seen.rgb, rgb), _difference(self._seen.rgb, self._rgb_before_last))
        return max(0.0, own - _difference(rgb, self._rgb_before_last))

    def _colour_distance(self, cumulative: Floats, time_s: float) -> float:
        """Distance to the mean histogram of the first REFERENCE_S seconds, as far as they have gone by."""
        if time_s <= REFERENCE_S or not self._reference:
            self._reference.append(cumulative)
        if len(self._reference) > 1 and time_s > REFERENCE_S:
            self._reference = [np.mean(self._reference, axis=0)]
        reference = self._reference[0] if len(self._reference) == 1 else np.mean(self._reference, axis=0)
        return colour_distance(reference, cumulative)


def _look(frame: Frames) -> Picture:
    """The frame as float32 [h,w,3] in levels, made small by averaging areas."""
    height_px, width_px = frame.shape[:2]
    scale = min(1.0, LOOK_PX / max(height_px, width_px))
    size = (max(LEAST_LOOK_PX, round(width_px * scale)), max(LEAST_LOOK_PX, round(height_px * scale)))
    small = frame if size == (width_px, height_px) else cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    return np.asarray(small, dtype=np.float32)


def _difference(a: Picture, b: Picture) -> float:
    return float(np.abs(a - b).mean())


def _colour(lab: Picture) -> dict[str, float]:
    """Mean and spread (standard deviation) of each channel, saturation, contrast; Lab float32 [h,w,3]."""
    mean, spread = (values.ravel() for values in cv2.meanStdDev(lab))
    chroma = cv2.magnitude(lab[..., 1], lab[..., 2])
    length = np.maximum(cv2.magnitude(chroma, lab[..., 0]), np.float32(1e-6))
    dark, bright = np.percentile(lab[..., 0], (5, 95))
    return {
        "lightness_mean": float(mean[0]),
        "lightness_spread": float(spread[0]),
        "a_mean": float(mean[1]),
        "a_spread": float(spread[1]),
        "b_mean": float(mean[2]),
        "b_spread": float(spread[2]),
        "saturation": float((chroma / length).mean()),
        "contrast": float(bright - dark),
    }


def sharpness(frame: Frames) -> float:
    """Standard deviation of the Laplacian of the luma of a frame uint8 [h,w,3], in levels."""
    luma = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    return float(cv2.Laplacian(luma, cv2.CV_32F).std())


def cumulative_histogram(lab: Picture) -> Floats:
    """Of Lab float32 [h,w,3]: for each channel the share of pixels up to each of 64 levels, [3,64]."""
    rows = []
    for channel, (low, high) in enumerate(_LAB_RANGES):
        counts = cv2.calcHist([lab], [channel], None, [_BINS], [low, high + 1e-3]).ravel()
        rows.append(np.cumsum(counts) / lab[..., 0].size)
    return np.array(rows)


def colour_distance(a: Floats, b: Floats) -> float:
    """Between cumulative histograms [3,64]: the 1-Wasserstein distance of each channel, as the length of the
    three, in Lab units."""
    widths = np.array([(high - low) / _BINS for low, high in _LAB_RANGES])
    return float(np.linalg.norm(np.abs(a - b).sum(axis=1) * widths))


def similarity(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Mean SSIM of two lumas uint8 [h,w] over uniform windows of 7 x 7."""
    x, y = a.astype(np.float32), b.astype(np.float32)
    mean_x, mean_y = cv2.blur(x, _SSIM_WINDOW), cv2.blur(y, _SSIM_WINDOW)
    var_x = cv2.blur(x * x, _SSIM_WINDOW) - mean_x**2
    var_y = cv2.blur(y * y, _SSIM_WINDOW) - mean_y**2
    both = cv2.blur(x * y, _SSIM_WINDOW) - mean_x * mean_y
    ratio = (2 * mean_x * mean_y + _SSIM_C1) * (2 * both + _SSIM_C2)
    return float((ratio / ((mean_x**2 + mean_y**2 + _SSIM_C1) * (var_x + var_y + _SSIM_C2))).mean())


def _flow(now: NDArray[np.uint8], before: NDArray[np.uint8]) -> Picture:
    """Where each pixel of `now` was in `before`: now[y,x] = before[y + flow_y, x + flow_x]; [h,w,2]."""
    return np.asarray(_flow_search().calc(now, before, None), dtype=np.float32)


@cache
def _flow_search() -> cv2.DISOpticalFlow:
    """Made once: it keeps its buffers, and nothing of one pair of pictures for the next."""
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    search.setFinestScale(1)
    return search


def headings(flow_back: Picture | None) -> Floats:
    """The length of the flow [h,w,2] by direction, mean over the picture: [HEADINGS]; 0 without one."""
    if flow_back is None:
        return np.zeros(HEADINGS)
    length, angle = cv2.cartToPolar(-flow_back[..., 0], -flow_back[..., 1])
    place = angle * np.float32(HEADINGS / (2 * np.pi))
    first = np.floor(place)
    share = place - first
    index = first.astype(np.int64) % HEADINGS
    sums = np.bincount(index.ravel(), ((1 - share) * length).ravel(), HEADINGS)
    sums += np.bincount(((index + 1) % HEADINGS).ravel(), (share * length).ravel(), HEADINGS)
    return np.asarray(sums / length.size)


def _surprise(before: _Seen, luma: NDArray[np.uint8]) -> float:
    """Mean difference, in levels, of the luma from what the frame before becomes if its motion goes on."""
    assert before.flow_back is not None
    carried = _pull(before.flow_back, before.flow_back)
    expected = _pull(before.luma.astype(np.float32), carried)
    return float(np.abs(expected - luma).mean())


def _pull(picture: Picture, flow: Picture) -> Picture:
    """picture[y + flow_y, x + flow_x] for every pixel, bilinear, the edge repeated."""
    x, y = _pixel_places(*flow.shape[:2])
    pulled = cv2.remap(picture, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(pulled, dtype=np.float32)


@cache
def _pixel_places(height_px: int, width_px: int) -> tuple[Picture, Picture]:
    """x and y of every pixel, [h,w] each."""
    x, y = np.meshgrid(np.arange(width_px, dtype=np.float32), np.arange(height_px, dtype=np.float32))
    return x, y


def _fault_measures(rgb: Picture, luma: NDArray[np.uint8]) -> dict[str, float]:
    """Mean level; greatest deviation of a channel; correlation of neighbouring pixels (noise has none)."""
    centred = luma.astype(np.float64) - luma.mean()
    variance = float((centred**2).mean())
    across = float((centred[:, 1:] * centred[:, :-1]).mean())
    down = float((centred[1:] * centred[:-1]).mean())
    return {
        "level": float(rgb.mean()),
        "deviation": float(cv2.meanStdDev(rgb)[1].max()),
        "coherence": 1.0 if variance < 1.0 else (across + down) / 2 / variance,
    }
