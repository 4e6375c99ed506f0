"""Denoising that can be stopped, saved and gone on with: what an actor hangs into the model's loop after each
step.

A saved state is one safetensors file below `partials/<task id>/` with `latents` (as the loop handed them out)
and `step`, the number of steps done; going on from it gives the same bits as never having stopped.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from actors.base import ActorContext, read_tensors, write_tensors
from model.sampling import (
    Schedule,
    base_schedule,
    distilled_schedule,
    enhance_hf_schedule,
    refinement_schedule,
)
from pipeline.errors import Interrupted
from pipeline.params import ScheduleParams
from pipeline.tasks import Order

SAVE_EVERY_S = 30.0
"""A kill loses at most this much of a long denoising, and one step."""


def make_schedule(params: ScheduleParams) -> Schedule:
    """The schedule that a task's parameters name."""
    steps, shift = params["steps"], params["shift"]
    match params["name"]:
        case "base":
            return base_schedule(steps, shift)
        case "distilled":
            return distilled_schedule(steps, shift)
        case "enhance_hf":
            return enhance_hf_schedule(steps, shift)
        case "refinement":
            return refinement_schedule(steps, params["t_thresh"], shift)


@dataclass(frozen=True)
class Saved:
    """A state to go on from: `latents` after `step` steps."""

    step: int
    latents: Tensor


def load_saved(context: ActorContext, order: Order, scratch: Path) -> Saved | None:
    """The order's partial, None if it has none. Raises CorruptArtifact; the machine then starts afresh."""
    if order.partial is None:
        return None
    tensors = read_tensors(context, (order.partial,), scratch)
    return Saved(int(tensors["step"]), tensors["latents"])


class StepWatch:
    """Called after each step: reports, saves when it is time, stops when asked."""

    def __init__(self, context: ActorContext, order: Order, steps: int) -> None:
        self._context, self._order, self._steps = context, order, steps
        self._saved_s = time.monotonic()

    def __call__(self, steps_done: int, latents: Tensor) -> None:
        self._context.report(steps_done, 0)
        stopping = self._context.stop.is_set()
        if steps_done < self._steps and (stopping or time.monotonic() - self._saved_s >= SAVE_EVERY_S):
            self._save(steps_done, latents)
        if stopping:
            raise Interrupted(f"stopped after step {steps_done} of {self._steps}")

    def _save(self, steps_done: int, latents: Tensor) -> None:
        order = self._order
        path = f"partials/{order.task.id}/{order.attempt:04d}-{order.epoch}-{steps_done:04d}.safetensors"
        tensors = {"latents": latents, "step": torch.tensor(steps_done)}
        self._context.saved(write_tensors(self._context, path, tensors), steps_done)
        self._saved_s = time.monotonic()
