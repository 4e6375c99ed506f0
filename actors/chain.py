"""The chain role: segments, each conditioned on the last latents of the one before."""

from __future__ import annotations

from collections.abc import Sequence
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
from actors.frames import decode_range, gather_latents, gather_pieces, video_frames
from model.generate import Models, SegmentRequest, generate_segment
from model.vae import VAE
from pipeline.params import PieceParams, SegmentParams, noise_seeds
from pipeline.quality import FrameGate
from pipeline.tasks import Order, Produced


def run_segment(context: ActorContext, models: Models, order: Order, scratch: Path) -> Produced:
    """Denoise one segment; latents fp32 [16,T,H,W] and, if a successor wants it, the decoded tail uint8
    [n,h,w,3]. Of a gang the first member alone has files to show.
    """
    watch, params = Stopwatch(), cast(SegmentParams, order.task.params)
    inputs = order_inputs(context, order, scratch)
    schedule = make_schedule(params["schedule"])
    saved = load_saved(context, order, scratch)
    negative = None if params["negative_text"] is None else inputs[params["negative_text"]]
    text = inputs[params["text"]]
    frames, latents_before = conditions(models.vae, inputs, params)
    request = SegmentRequest(
        text=text["text"],
        text_mask=text["mask"],
        negative_text=None if negative is None else negative["text"],
        negative_mask=None if negative is None else negative["mask"],
        height_px=params["height_px"],
        width_px=params["width_px"],
        segment_frames=params["segment_frames"],
        cond_frames=frames,
        cond_latents=latents_before,
        noise_seeds=noise_seeds(params["noise"]),
        schedule=schedule,
        guidance=params["guidance"],
        start_step=saved.step if saved else 0,
        resume=saved.latents if saved else None,
        on_step=StepWatch(context, order, schedule.steps),
    )
    latents = generate_segment(models, request)
    if context.gang is not None and not context.gang.leads:
        return produced((), watch)
    tail, measures = look_at(models.vae, latents, order.task.label, params)
    tensors = {"latents": latents.float().cpu()} | ({"tail": tail} if len(tail) else {})
    file = write_tensors(context, f"{order.attempt_path}/segment.safetensors", tensors)
    return produced((file,), watch, measures)


def conditions(
    vae: VAE, inputs: Sequence[dict[str, Tensor]], params: SegmentParams
) -> tuple[Tensor | None, Tensor | None]:
    """What the segment begins with: frames to encode, and the latents that follow them as they are."""
    pieces, latents = params["conditions"], params["condition_latents"]
    if not pieces:
        return None, None
    if not latents:
        return gather_pieces(vae, inputs, pieces), None
    # A clip's first latent holds one frame alone, and no latent of the segment before does; so that one is encoded.
    first: PieceParams = {**pieces[0], "stop": pieces[0]["start"] + 1}
    return gather_pieces(vae, inputs, [first]), gather_latents(inputs, latents)


def look_at(vae: VAE, latents: Tensor, label: str, params: SegmentParams) -> tuple[Tensor, dict[str, float]]:
    """Decode a segment once: its last `tail_frames` frames, and what the gate measures on its new frames.

    Raises QualityError here rather than when the film is encoded: a new seed for this segment may help.
    """
    gate, kept = FrameGate(), []
    stop = video_frames(vae, latents.shape[1])
    position = params["condition_frames"]
    for frames in decode_range(vae, latents, position, stop):
        gate.add(frames.numpy())
        position += len(frames)
        overlap = min(len(frames), position - (stop - params["tail_frames"]))
        if overlap > 0:
            kept.append(frames[len(frames) - overlap :])
    gate.check(label)
    measures = {"frames": float(gate.frames), **gate.measures()}
    return torch.cat(kept) if kept else torch.empty(0), measures
