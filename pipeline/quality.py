"""What is measured on decoded frames, and what is no film: one flat colour, or a picture that stands still.

The gate looks at a unit while it streams by; nothing is kept but the frame before. Numbers that are not
finite are stopped earlier, where the model makes them. Levels are 0..255.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import QualityError

Frames = NDArray[np.uint8]

FLAT_LEVELS = 1.0
"""A frame whose pixels deviate less than this from each other shows nothing."""

STILL_LEVELS = 0.01
"""Mean change below which a frame repeats the one before. Decoded film that seems still changes more."""

STILL_LEAST_FRAMES = 24
"""Shorter units may stand still."""

_LOOK_PX = 1 << 16


@dataclass
class FrameGate:
    """Sums over the frames of one unit; `add` each batch, then `check`."""

    frames: int = 0
    flat_frames: int = 0
    still_frames: int = 0
    """Frames that repeat the one before them."""
    level_sum: float = 0.0
    change_sum: float = 0.0
    _before: NDArray[np.int16] | None = None

    def add(self, frames: Frames) -> None:
        """Look at frames uint8 [n,h,w,3], in order; at about 65000 pixels of each."""
        step = max(1, round((frames.shape[1] * frames.shape[2] / _LOOK_PX) ** 0.5))
        for frame in frames[:, ::step, ::step].astype(np.int16):
            self.frames += 1
            self.level_sum += float(frame.mean())
            self.flat_frames += bool(frame.std(axis=(0, 1)).max() < FLAT_LEVELS)
            if self._before is not None:
                change = float(np.abs(frame - self._before).mean())
                self.change_sum += change
                self.still_frames += change < STILL_LEVELS
            self._before = frame

    def measures(self) -> dict[str, float]:
        """Mean level, mean change from frame to frame, and the shares of flat and of still frames."""
        pairs = max(1, self.frames - 1)
        return {
            "level_mean": self.level_sum / max(1, self.frames),
            "change_mean": self.change_sum / pairs,
            "flat_share": self.flat_frames / max(1, self.frames),
            "still_share": self.still_frames / pairs,
        }

    def check(self, label: str) -> None:
        """QualityError when no frame shows anything, or a unit of some length never moves."""
        if self.frames and self.flat_frames == self.frames:
            level = self.level_sum / self.frames
            colour = "black" if level < 8 else "one flat colour"
            raise QualityError(f"{label}: all {self.frames} frames are {colour}")
        if self.frames >= STILL_LEAST_FRAMES and self.still_frames == self.frames - 1:
            raise QualityError(f"{label}: the picture stands still for all {self.frames} frames")
