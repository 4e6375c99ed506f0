"""The refine role: windows of stage-one frames to refined latents."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from actors.base import (
    ActorContext,
    Stopwatch,
    order_inputs,
    produced,
    write_tensors,
)
from actors.denoising import StepWatch, load_saved, make_schedule
from actors.frames import decode_range, gather_pieces
from model.generate import Models, RefineRequest, refine_window
from pipeline.params import WindowParams, noise_seeds, window_times
from pipeline.tasks import Order, Produced


def run_window(context: ActorContext, models: Models, order: Order, scratch: Path) -> Produced:
    """Refine one window; latents fp32 [16,L,H,W] with padding and, if chained, the decoded tail."""
    watch, params = Stopwatch(), cast(WindowParams, order.task.params)
    inputs = order_inputs(context, order, scratch)
    schedule = make_schedule(params["schedule"])
    saved = load_saved(context, order, scratch)
    text = inputs[params["text"]]
    request = RefineRequest(
        stage_one=gather_pieces(models.vae, inputs, params["stage_one"]),
        times=window_times(params),
        height_px=params["height_px"],
        width_px=params["width_px"],
        cond_frames=_condition(params, inputs),
        noise_seeds=noise_seeds(params["noise"]),
        text=text["text"],
        text_mask=text["mask"],
        schedule=schedule,
        spatial_only=params["spatial_only"],
        start_step=saved.step if saved else 0,
        resume=saved.latents if saved else None,
        on_step=StepWatch(context, order, schedule.steps),
    )
    latents = refine_window(models, request).latents
    tensors = {"latents": latents.float().cpu()}
    if params["tail"] is not None:
        start, stop = params["tail"]
        tensors["tail"] = torch.cat(list(decode_range(models.vae, latents, start, stop)))
    file = write_tensors(context, f"{order.attempt_path}/window.safetensors", tensors)
    return produced((file,), watch, {"frames": float(params["frames"])})


def _condition(params: WindowParams, inputs: list[dict[str, Tensor]]) -> Tensor | None:
    """The refined frames that come before the window, uint8 [n,h,w,3]."""
    condition = params["condition"]
    return None if condition is None else inputs[condition["input"]][condition["name"]]
