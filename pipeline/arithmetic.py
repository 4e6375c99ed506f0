"""The numbers of segments, windows and frame grids, all derived from the checkpoint's `RenderFacts`.

Contract: pure functions of whole numbers. With the official facts: segments of 93 frames that begin 80 apart,
windows that begin 160 refined frames apart, 48 latents each, six latents of overlap to merge, and a change of
window 21 frames after a window begins.

One grid for a take: refined frame g shows stage-one time g / ratio; latent m of the take holds frames
4m-3..4m, latent 0 frame 0. Window i begins at refined frame i * window_hop.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from pipeline.facts import REFINE_GRANULARITY, RenderFacts


@dataclass(frozen=True)
class WindowShape:
    """How many latents a window has, and which frames they hold.

    `front_latents` of padding come first (vae_temporal frames each); `frames` are the frames after them,
    conditions included.
    """

    latents: int
    front_latents: int
    frames: int


@dataclass(frozen=True)
class Grid:
    """The numbers of one checkpoint."""

    segment_frames: int
    condition_frames: int
    ratio: int
    """Refined frames for each stage-one frame."""
    temporal: int
    """Frames in one latent."""

    @property
    def new_frames(self) -> int:
        """Stage-one frames that a continuation segment adds; also the distance of windows in stage-one
        frames.
        """
        return self.segment_frames - self.condition_frames

    @property
    def segment_latents(self) -> int:
        return latents_of(self.segment_frames, self.temporal)

    @property
    def new_latents(self) -> int:
        return self.new_frames // self.temporal

    @property
    def window_hop(self) -> int:
        """Refined frames from the beginning of one window to that of the next."""
        return self.ratio * self.new_frames

    @property
    def window_hop_latents(self) -> int:
        return self.window_hop // self.temporal

    @property
    def window_reach(self) -> int:
        """Last refined frame of a window whose stage-one time lies in the window's own stage-one frames."""
        return self.ratio * (self.segment_frames - 1)

    @property
    def merge_latents(self) -> int:
        """Latents that two neighbouring windows share: all that the earlier reaches, but the later's latent
        0.
        """
        return self.window_reach // self.temporal - self.window_hop_latents

    @property
    def merged_handover(self) -> int:
        """Frame of a window, relative to its beginning, from which its own unit shows: where the last latent of the
        overlap begins. By then both decoders have gone through the same latents for so long that what they saw before
        no longer shows (docs/refinement.md)."""
        return self.temporal * max(self.merge_latents - 1, 0) + 1

    @property
    def refined_condition(self) -> int:
        """Refined frames that condition a window which goes on from others: those whose stage-one times lie in the
        condition frames; a whole number of latents."""
        return self.ratio * (self.condition_frames - 1) + 1

    def window_shape(self, condition_frames: int) -> WindowShape:
        """Padding as refinement does it: conditions and noise each fill whole blocks of REFINE_GRANULARITY
        latents.
        """
        given = _fill(latents_of(condition_frames, self.temporal)) if condition_frames else 0
        padding = self.temporal * (given - 1) + 1 - condition_frames if given else 0
        noise = _fill(-(-(self.window_reach + 1 - condition_frames) // self.temporal))
        latents = given + noise
        frames = self.temporal * (latents - 1) + 1 - padding
        return WindowShape(latents, padding // self.temporal, frames)

    def segment_count(self, frames: int, *, continues: bool) -> int:
        """Segments that make `frames` (> 0) stage-one frames, the first one new or a continuation."""
        first = self.new_frames if continues else self.segment_frames
        return 1 + max(0, -(-(frames - first) // self.new_frames))

    def window_count(self, frames: int) -> int:
        """Windows that show refined frames [0, frames) of a take."""
        return 1 + max(0, -(-(frames - self.ratio * self.segment_frames) // self.window_hop))


def grid_of(facts: RenderFacts) -> Grid:
    """The grid of a checkpoint."""
    ratio = facts.refined_fps // facts.stage_one_fps
    return Grid(facts.segment_frames, facts.condition_frames, ratio, facts.vae_temporal)


def latents_of(frames: int, temporal: int) -> int:
    """Latents of a clip of `frames` frames: one for the first frame, then one for each `temporal`."""
    return 1 - (-(frames - 1) // temporal)


def conformed_frame(output_frame: int, ratio: Fraction) -> int:
    """The native frame that an output frame shows: the one nearest in time, the earlier of two.

    `ratio` is the native rate over the output rate.
    """
    return -((ratio.denominator - 2 * output_frame * ratio.numerator) // (2 * ratio.denominator))


def _fill(latents: int) -> int:
    return -(-latents // REFINE_GRANULARITY) * REFINE_GRANULARITY
