"""The actor of the roles that denoise, and denoising that can be stopped, saved and gone on with.

A saved state is one safetensors file below `partials/<task id>/` with `latents` (as the loop handed them out)
and `step`, the number of steps done; going on from it gives the same bits as never having stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from actors.base import (
    ActorContext,
    mapped_errors,
    merged_loras,
    read_tensors,
    scratch_folder,
    write_tensors,
)
from actors.media import run_media
from model.checkpoint import load_dit, load_vae
from model.generate import Models
from model.offload import Turns
from model.sampling import (
    Schedule,
    base_schedule,
    distilled_schedule,
    enhance_hf_schedule,
    refinement_schedule,
)
from pipeline.errors import Interrupted
from pipeline.params import ScheduleParams, WeightsParams
from pipeline.tasks import Order, Produced, TaskKind

SAVE_EVERY_S = 30.0
"""A kill loses at most this much of a long denoising, and one step."""


Compute = Callable[[ActorContext, Models, Order, Path], Produced]
"""Runs one denoising order with the role's models; the path is a scratch folder."""


class DenoisingActor:
    """Holds a role's DiT and the VAE. Orders: `kind`, which `compute` runs, and what the media role does."""

    def __init__(self, kind: TaskKind, compute: Compute) -> None:
        self._kind, self._compute = kind, compute
        self._models: Models | None = None

    def setup(self, context: ActorContext) -> None:
        self._context = context
        self._models = None if context.weights is None else load_models(context, context.weights)
        if self._models is not None and context.gang is not None and self._kind == "segment":
            with mapped_errors():
                context.gang.split(self._models.dit)

    def run(self, order: Order) -> Produced:
        models = self._models
        assert models is not None, f"the {self._context.role} role was set up without weights"
        with mapped_errors(), scratch_folder(self._context) as scratch:
            if order.task.kind == self._kind:
                return self._compute(self._context, models, order, scratch)
            return run_media(self._context, models.vae, order, scratch)

    def close(self) -> None:
        self._models = None


def load_models(context: ActorContext, weights: WeightsParams) -> Models:
    """The DiT of a role with its LoRAs merged in, and the VAE."""
    memory = context.memory
    with scratch_folder(context) as scratch, mapped_errors():
        dit = load_dit(
            context.checkpoint_path,
            device=context.device,
            dtype=context.dtype,
            loras=merged_loras(context, weights, scratch),
            attention=weights["attention"],
            products=None if memory.precision == "stored" else memory.precision,
            role=context.role,
        )
        vae = load_vae(context.checkpoint_path, device=context.device, dtype=context.dtype)
        device = torch.device(context.device)
        turns = Turns(dit, vae, device) if memory.networks == "in_turn" else None
        return Models(dit, vae, device, context.dtype, turns, cache_on_host=memory.condition_cache == "host")


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
        context, gang = self._context, self._context.gang
        leads = gang is None or gang.leads
        if leads:
            context.report(steps_done, 0)
        stopping = context.stop.is_set() if gang is None else gang.agree(context.stop.is_set())
        late = stopping or time.monotonic() - self._saved_s >= SAVE_EVERY_S
        if leads and steps_done < self._steps and late:
            self._save(steps_done, latents)
        if stopping:
            raise Interrupted(f"stopped after step {steps_done} of {self._steps}")

    def _save(self, steps_done: int, latents: Tensor) -> None:
        order = self._order
        path = f"partials/{order.task.id}/{order.attempt:04d}-{order.epoch}-{steps_done:04d}.safetensors"
        tensors = {"latents": latents, "step": torch.tensor(steps_done)}
        self._context.saved(write_tensors(self._context, path, tensors), steps_done)
        self._saved_s = time.monotonic()
