"""The media role: user files to condition frames, latents to encoded units, units to the film. No DiT.

The chain and refine roles hold a VAE too and run the same orders through `run_media`.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from actors.base import (
    ActorContext,
    Stopwatch,
    check_stop,
    mapped_errors,
    open_media,
    order_inputs,
    produced,
    scratch_folder,
    write_tensors,
)
from actors.frames import blend, decode_range, layer_frames
from model.checkpoint import load_vae
from model.vae import VAE
from pipeline.media_encode import FrameEncoder, Unit
from pipeline.media_film import concatenate
from pipeline.media_read import Frames, fit, read_image, read_video_at
from pipeline.params import EncodeParams, FilmParams, SourceParams, blend_weights
from pipeline.quality import FrameGate
from pipeline.tasks import ArtifactFile, Order, Produced

BATCH_FRAMES = 16
"""Frames that are fitted and handed to the encoder at a time: bounds the memory, whatever the unit's length.
"""


class MediaActor:
    """Holds the VAE. Orders: `source`, `encode`, `film`."""

    def setup(self, context: ActorContext) -> None:
        self._context = context
        with mapped_errors():
            self._vae: VAE | None = load_vae(
                context.checkpoint_path, device=context.device, dtype=context.dtype
            )

    def run(self, order: Order) -> Produced:
        assert self._vae is not None
        with mapped_errors(), scratch_folder(self._context) as scratch:
            return run_media(self._context, self._vae, order, scratch)

    def close(self) -> None:
        self._vae = None


def run_media(context: ActorContext, vae: VAE, order: Order, scratch: Path) -> Produced:
    """Run an order that needs no DiT."""
    match order.task.kind:
        case "source":
            return run_source(context, vae, order, scratch)
        case "encode":
            return run_encode(context, vae, order, scratch)
        case "film":
            return run_film(context, order, scratch)
        case kind:
            raise ValueError(f"the role {context.role} does not run {kind} orders")


def run_source(context: ActorContext, vae: VAE, order: Order, scratch: Path) -> Produced:
    """Make condition frames ready: `frames` uint8 [n,h,w,3]."""
    watch, params = Stopwatch(), cast(SourceParams, order.task.params)
    size = params["height_px"], params["width_px"]
    if params["kind"] == "shot":
        frame = params["frame"]
        assert frame is not None
        latents = order_inputs(context, order, scratch)[0]["latents"]
        frames = torch.cat(list(decode_range(vae, latents, frame, frame + 1)))
    else:
        frames = torch.from_numpy(fit(_user_frames(context, params, scratch), *size, "crop"))
    file = write_tensors(context, f"{order.attempt_path}/source.safetensors", {"frames": frames})
    return produced((file,), watch)


def _user_frames(context: ActorContext, params: SourceParams, scratch: Path) -> Frames:
    """The picture, or the film's frames at the wanted times: uint8 [n,h,w,3] of the file's own size."""
    assert params["media"] is not None
    path = open_media(context, params["media"], scratch)
    if params["kind"] == "image":
        return read_image(path)[None]
    times_s = [Fraction(time_s) for time_s in params["times_s"]]
    return np.concatenate(list(read_video_at(path, times_s, context.ffmpeg)))


def run_encode(context: ActorContext, vae: VAE, order: Order, scratch: Path) -> Produced:
    """Decode a unit's frames straight into the encoder: exactly `frames` of exactly the output's size."""
    watch, params = Stopwatch(), cast(EncodeParams, order.task.params)
    inputs = order_inputs(context, order, scratch)
    path = scratch / f"unit.{params['codec']['container']}"
    shown = unit_frames(vae, inputs, params)
    with FrameEncoder(
        path,
        height_px=params["height_px"],
        width_px=params["width_px"],
        fps=Fraction(*params["fps"]),
        codec=params["codec"],
        ffmpeg=context.ffmpeg,
        threads=context.encoder_threads,
    ) as encoder:
        written, gate = 0, FrameGate()
        while batch := list(islice(shown, BATCH_FRAMES)):
            check_stop(context)
            frames = np.stack([frame.numpy() for frame in batch])
            gate.add(frames)
            encoder.write(_fitted(frames, params))
            written += len(batch)
            context.report(0, written)
        gate.check(order.task.label)
        encoder.close()
    if written != params["frames"]:
        raise ValueError(f"the unit's layers show {written} frames, the plan says {params['frames']}")
    file = context.store.write_attempt(f"{order.attempt_path}/{path.name}", path)
    return produced((file,), watch, {"frames": float(written), **gate.measures()})


def unit_frames(vae: VAE, inputs: list[dict[str, Tensor]], params: EncodeParams) -> Iterator[Tensor]:
    """The unit's frames in order, uint8 [h,w,3], at the decoded size."""
    layers = [layer_frames(vae, inputs, layer) for layer in params["layers"]]
    if params["blend"] is None:
        return layers[0]
    weights = blend_weights(params["blend"], params["frames"])
    return (blend(first, second, weight) for first, second, weight in zip(*layers, weights, strict=True))


def _fitted(frames: Frames, params: EncodeParams) -> Frames:
    if params["fit"] is None:
        return frames
    return fit(frames, params["height_px"], params["width_px"], params["fit"])


def run_film(context: ActorContext, order: Order, scratch: Path) -> Produced:
    """Join the units by stream copy, with the soundtrack and the metadata."""
    watch, params = Stopwatch(), cast(FilmParams, order.task.params)
    units = [
        Unit(_local_unit(context, order.inputs[task_id][0], scratch / str(index)), frames)
        for index, (task_id, frames) in enumerate(zip(order.task.inputs, params["unit_frames"], strict=True))
    ]
    path = scratch / f"film.{params['codec']['container']}"
    soundtrack = params["soundtrack"]
    concatenate(
        units,
        path,
        soundtrack=open_media(context, soundtrack, scratch) if soundtrack else None,
        fps=Fraction(*params["fps"]),
        codec=params["codec"],
        title=params["title"],
        recipe=params["recipe"],
        ffmpeg=context.ffmpeg,
    )
    file = context.store.write_attempt(f"{order.attempt_path}/{path.name}", path)
    return produced((file,), watch, {"frames": float(sum(params["unit_frames"]))})


def _local_unit(context: ActorContext, file: ArtifactFile, folder: Path) -> Path:
    """A unit's verified bytes; units have the same names, so each gets a folder of its own."""
    folder.mkdir()
    return context.store.open_local(file, folder)
