"""What a film of the drawn world shows: the colour, outline and direction of its largest moving shape.

Written from the description of that world and apart from the code that draws it, so that a mistake there is not
repeated here: what stands still is the backdrop (median over time), what differs from it is a shape. Its colour is
the nearest of those a person would name, its outline is told by how the radius of its contour varies with the
angle, its direction by the way of its centre. The picture is a torus: what leaves on one side comes back on the other.

Pixels in, words out: no model, no torch. About 0.7 ms a frame at 64x96. A film should show its shape move by more
than its own width; after four seconds the slow ones have.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
Floats = NDArray[np.float32]
Waves = NDArray[np.complex64]

COLOURS = {
    "red": (220, 25, 30),
    "orange": (245, 130, 20),
    "yellow": (250, 230, 45),
    "green": (20, 155, 45),
    "blue": (25, 55, 225),
    "purple": (130, 30, 175),
    "pink": (255, 130, 190),
    "white": (250, 250, 250),
    "black": (10, 10, 15),
    "grey": (128, 128, 128),
    "brown": (110, 65, 30),
    "cyan": (60, 200, 220),
}
"""Names by sRGB; the last four are never wanted and keep what has no colour from being given one."""

PIECE_FRAMES = 93
"""The backdrop is looked for in pieces of this length: a long chain may change it slowly."""

LEAST_DISTANCE = 14.0
"""Lab distance to the backdrop from which a pixel belongs to a shape."""

LEAST_AREA, MOST_AREA = 0.012, 0.3
"""Of the picture: smaller spots are flakes and noise, what is larger is the backdrop itself."""

LEAST_SPEED = 0.05
"""Picture heights a second below which a shape stands still."""

LEAST_SHARE = 1 / 3
"""Of the frames that must agree on a colour or an outline for it to be named."""

OUTLINES = {3: ("triangle", 0.07), 4: ("square", 0.04), 5: ("star", 0.03)}
"""How often the radius of an outline goes up and down in a circle, and the least amplitude, as a share of the mean.

Ideal ones have 0.28 (equilateral triangle), 0.14 (square) and 0.32 (five-pointed star whose inner corners lie at 0.45
of its radius). An autoencoder rounds corners and fills notches: what is left of a small star is a pentagon, which has
0.086, and that blurred. What has less of all three is a circle.
"""

MOST_REST = 0.2
"""Amplitude of everything in an outline that does not belong to its kind, above which it is of no kind. Blurred shapes
have 0.03 to 0.13, blots 0.15 to 0.35.
"""

LEAST_STEADINESS = 0.75
"""How much of an outline's amplitude is the same throughout a second: above 0.8 for shapes, below 0.7 for blots."""

_STEP_S = 0.4
_WAVES = 8
_ENLARGED = 4
_ANGLES = 64


@dataclass(frozen=True)
class Verdict:
    """Names, or None where there is none; `shares` of the frames that say so: colour and outline."""

    colour: str | None
    shape: str | None
    direction: str | None
    shares: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Sightings:
    """What was seen in each frame: a colour, an outline (None where no shape was found or told), and the centre
    in picture heights (x to the right, y down; NaN where there is no shape).
    """

    fps: float
    aspect: float
    colours: Sequence[str | None]
    shapes: Sequence[str | None]
    centres: Floats

    def verdict(self, start: int = 0, stop: int | None = None) -> Verdict:
        """What frames [start, stop) show on the whole."""
        colour, colour_share = _most(self.colours[start:stop])
        shape, shape_share = _most(self.shapes[start:stop])
        direction = _direction(self.centres[start:stop], self.fps, self.aspect)
        return Verdict(colour, shape, direction, (colour_share, shape_share))


def look(frames: Frames, fps: float = 15.0) -> Sightings:
    """See the largest moving shape in each of the frames uint8 [F,h,w,3]."""
    seen: list[_Seen | None] = []
    pieces = max(1, round(len(frames) / PIECE_FRAMES))
    for piece in np.array_split(frames, pieces):
        seen += _look_at_piece(piece)
    height, width = frames.shape[1:3]
    centres = np.array([(math.nan, math.nan) if s is None else s.centre for s in seen], np.float32) / height
    waves = np.array([np.full(_WAVES, np.nan) if s is None else s.waves for s in seen])
    colours = [None if s is None else s.colour for s in seen]
    return Sightings(fps, width / height, colours, _outlines(waves, fps), centres)


@dataclass(frozen=True)
class _Seen:
    """One frame's shape; the centre in pixels."""

    colour: str
    waves: Waves
    centre: tuple[float, float]


def _look_at_piece(frames: Frames) -> list[_Seen | None]:
    lab = _to_lab(frames)
    distances = _length(lab - _backdrop(lab))
    return [_look_at_frame(picture, distance) for picture, distance in zip(lab, distances, strict=True)]


def _to_lab(frames: Frames) -> Floats:
    """CIELAB, L* 0 to 100, of frames [F,h,w,3]."""
    stacked = np.ascontiguousarray(frames).reshape(-1, frames.shape[2], 3).astype(np.float32) / 255
    lab = cv2.cvtColor(stacked, cv2.COLOR_RGB2LAB).reshape(frames.shape)
    return np.asarray(lab, np.float32)


def _length(vectors: Floats) -> Floats:
    """Of the vectors [...,3]."""
    return np.sqrt(np.einsum("...c,...c->...", vectors, vectors))


def _backdrop(lab: Floats) -> Floats:
    """[h,w,3]: the median over time, and once more without what differs from it: a slow shape may cover a place half of
    the time.
    """
    some = lab[:: max(1, len(lab) // 31)]
    backdrop = _medians(some)
    differs = (_length(some - backdrop) > LEAST_DISTANCE).astype(np.uint8)
    covered = np.stack([cv2.dilate(mask, np.ones((5, 5), np.uint8)) for mask in differs]) > 0
    again = (covered.mean(0) > 0.1) & (covered.mean(0) < 0.9)
    backdrop[again] = _medians(some[:, again], covered[:, again])
    return backdrop


def _medians(values: Floats, left_out: NDArray[np.bool_] | None = None) -> Floats:
    """Lower medians over the first axis of [F,...,3], without the frames `left_out` [F,...]."""
    count = np.full(values.shape[1:-1], len(values)) if left_out is None else (~left_out).sum(0)
    if left_out is not None:
        values = np.where(left_out[..., None], np.inf, values)
    ordered = np.sort(np.moveaxis(values, 0, -1), axis=-1)
    return np.take_along_axis(ordered, ((count - 1) // 2)[..., None, None], axis=-1)[..., 0]


def _look_at_frame(lab: Floats, distance: Floats) -> _Seen | None:
    """The largest shape of a frame [h,w,3] whose pixels have these distances [h,w] to the backdrop."""
    height, width = distance.shape
    mask = (distance > LEAST_DISTANCE).astype(np.uint8)
    if not LEAST_AREA * mask.size < mask.sum() < MOST_AREA * mask.size:
        return None
    across, down = _centre(mask)
    # The shape moves to the middle, where the picture's edges do not cut it.
    shift = (height // 2 - round(down), width // 2 - round(across))
    mask = np.roll(mask, shift, (0, 1))
    blob = _largest(mask)
    if blob is None:
        return None
    across, down = _centre(blob)
    centre = ((across - shift[1]) % width, (down - shift[0]) % height)
    core = _core(blob)
    colour = np.median(np.roll(lab, shift, (0, 1))[core], axis=0)
    strength = np.roll(distance, shift, (0, 1)) * blob
    inside = max(float(np.median(strength[core])), LEAST_DISTANCE)
    return _Seen(_colour_name(colour), _waves(strength / inside), centre)


def _centre(mask: NDArray[np.uint8]) -> tuple[float, float]:
    """Mean place (x, y) on the torus: the direction of the mean of points on a circle."""
    places = []
    for axis in (0, 1):
        profile = mask.sum(axis=axis, dtype=np.float64)
        turn = np.exp(2j * np.pi * np.arange(len(profile)) / len(profile))
        places.append(float(np.angle((profile * turn).sum()) / (2 * np.pi) % 1.0) * len(profile))
    return places[0], places[1]


def _largest(mask: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """The largest connected part with its holes filled."""
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    largest = max(contours, key=cv2.contourArea)
    if cv2.contourArea(largest) < LEAST_AREA * mask.size:
        return None
    blob = np.zeros_like(mask)
    cv2.drawContours(blob, [largest], -1, 1, cv2.FILLED)
    return blob


def _core(blob: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The pixels farthest from the edge: shapes have a darker rim."""
    depth = cv2.distanceTransform(cv2.copyMakeBorder(blob, 1, 1, 1, 1, cv2.BORDER_CONSTANT), cv2.DIST_L2, 3)
    depth = depth[1:-1, 1:-1]
    return np.asarray(depth >= 0.6 * depth.max())


_NAMES = tuple(COLOURS)
_NAMED = _to_lab(np.array([[list(COLOURS.values())]], np.uint8)[0][None])[0, 0]


def _colour_name(lab: Floats) -> str:
    """The nearest named colour. Lightness counts half: light and shade change it more than the hue."""
    apart = (_NAMED - lab) * np.array([0.5, 1.0, 1.0], np.float32)
    return _NAMES[int(np.linalg.norm(apart, axis=1).argmin())]


def _waves(strength: Floats) -> Waves:
    """How the radius of a shape's outline varies with the angle: entry k is the complex amplitude of what turns k times
    in a circle, as a share of the mean radius. `strength` [h,w]: 1 inside the shape, 0 outside.
    """
    ys, xs = np.nonzero(strength)
    patch = strength[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].clip(0, 1)
    patch = cv2.copyMakeBorder(patch, 2, 2, 2, 2, cv2.BORDER_CONSTANT)
    large = cv2.resize(patch, None, fx=_ENLARGED, fy=_ENLARGED, interpolation=cv2.INTER_CUBIC)
    contours, _ = cv2.findContours((large > 0.5).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not contours:
        return np.full(_WAVES, np.nan, np.complex64)
    contour = max(contours, key=cv2.contourArea)
    moments = cv2.moments(contour)
    arms = contour[:, 0, :] - np.array([moments["m10"], moments["m01"]]) / max(moments["m00"], 1e-6)
    angles = np.arctan2(arms[:, 1], arms[:, 0])
    order = np.argsort(angles)
    even = np.linspace(-np.pi, np.pi, _ANGLES, endpoint=False)
    radii = np.interp(even, angles[order], np.hypot(arms[:, 0], arms[:, 1])[order], period=2 * np.pi)
    spectrum = np.fft.rfft(radii)[:_WAVES]
    return np.asarray(2 * spectrum / spectrum[0].real, np.complex64)


def _outlines(waves: Waves, fps: float) -> list[str | None]:
    """The outline in each frame, from its amplitudes [F,k] averaged over a second: shapes do not turn, so what belongs
    to the outline stays and what the pixel grid, flakes and blur add goes.
    """
    near = np.ones(min(len(waves), max(1, round(fps))))
    there = ~np.isnan(waves[:, 0])
    known = np.where(there[:, None], waves, 0)
    count = np.maximum(np.convolve(there, near, "same"), 1)[:, None]
    steady = np.abs(np.stack([np.convolve(wave, near, "same") for wave in known.T], 1)) / count
    power = np.stack([np.convolve(wave, near, "same") for wave in (np.abs(known) ** 2).T], 1) / count
    return [_kind(*pair) if found else None for *pair, found in zip(steady, power, there, strict=True)]


def _kind(steady: Floats, power: Floats) -> str | None:
    """The outline that belongs to amplitudes [k], averaged with their phases, and their mean squares [k]; None for a
    blot, whose outline wavers or is of no kind.
    """
    strengths = {wave: float(steady[wave]) / least for wave, (_, least) in OUTLINES.items()}
    wave = max(strengths, key=lambda k: strengths[k])
    is_circle = strengths[wave] < 1.0
    others = [k for k in range(2, _WAVES) if is_circle or k % wave]
    if power[others].sum() > MOST_REST**2:
        return None
    if is_circle:
        return "circle"
    return OUTLINES[wave][0] if steady[wave] ** 2 >= LEAST_STEADINESS**2 * power[wave] else None


def _most(names: Sequence[str | None]) -> tuple[str | None, float]:
    """The most frequent name and its share of all frames."""
    counts = Counter(name for name in names if name is not None)
    if not counts:
        return None, 0.0
    name, count = counts.most_common(1)[0]
    share = count / len(names)
    return (name if share >= LEAST_SHARE else None), share


def _direction(centres: Floats, fps: float, aspect: float) -> str | None:
    """Left, right, up or down: the median way over `_STEP_S`, the shorter one round the torus."""
    step = max(1, round(_STEP_S * fps))
    ways = centres[step:] - centres[:-step]
    ways = ways[~np.isnan(ways).any(axis=1)]
    if len(ways) < LEAST_SHARE * len(centres):
        return None
    size = np.array([aspect, 1.0], np.float32)
    across, down = np.median((ways + size / 2) % size - size / 2, axis=0) * fps / step
    if max(abs(across), abs(down)) < LEAST_SPEED or min(abs(across), abs(down)) > 0.5 * max(abs(across), abs(down)):
        return None
    if abs(across) > abs(down):
        return "right" if across > 0 else "left"
    return "down" if down > 0 else "up"
