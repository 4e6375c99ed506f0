"""One segment, or one refinement window: a request in, latents out. Usable without anything above this room.

Every number comes with the request; nothing is read from render.json here. Noise comes from seeds, one for
each latent frame, so a request gives the same latents wherever it runs under the same numerics.

    python -m model.generate --checkpoint DIR --prompt "a red circle" --out clip.mp4        (see model/clip.py)

Legend: T/H/W latent frames/rows/columns; frames are uint8 [n,h,w,3]; text states [1,L,C] with mask [L] are
those of one prompt.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from model.dit import Attention, DiT
from model.errors import InputError
from model.noise import draw_noise
from model.offload import Turns
from model.pixels import decode_frames, encode_frames, encode_resampled
from model.sampling import OnStep, Schedule, TextCondition, denoise
from model.vae import VAE

__all__ = [
    "Models",
    "RefineLayout",
    "RefineRequest",
    "Refined",
    "SegmentRequest",
    "decode_frames",
    "generate_segment",
    "load_models",
    "refine_layout",
    "refine_window",
]

# Block-sparse attention works on blocks of four latent frames.
_REFINE_GRANULARITY = 4


@dataclasses.dataclass(frozen=True)
class Models:
    """The networks of a role, and where and in which type they run.

    For cards with little memory, without any change of results: with `turns` DiT and VAE are on the device one after
    the other, and `cache_on_host` keeps in host memory what the DiT remembers of the conditions.
    """

    dit: DiT
    vae: VAE
    device: torch.device
    dtype: torch.dtype
    turns: Turns | None = None
    cache_on_host: bool = False


@dataclasses.dataclass(frozen=True)
class SegmentRequest:
    """One segment, which begins with its conditions: `cond_frames`, encoded here, and after them `cond_latents`
    [16,k,H,W], taken as they are. Their latents together say what it is: none, text to video; 1, image to video;
    more, a continuation.

    `noise_seeds`: one for each of the segment's latent frames, those of the conditions included (and unused).
    To go on after an interruption give `start_step` and `resume`, the latents [1,16,T,H,W] that on_step saw
    after that step.
    """

    text: Tensor
    text_mask: Tensor
    height_px: int
    width_px: int
    segment_frames: int
    noise_seeds: Sequence[int]
    schedule: Schedule
    guidance: float
    negative_text: Tensor | None = None
    negative_mask: Tensor | None = None
    cond_frames: Tensor | None = None
    cond_latents: Tensor | None = None
    start_step: int = 0
    resume: Tensor | None = None
    on_step: OnStep | None = None


@dataclasses.dataclass(frozen=True)
class RefineRequest:
    """One refinement window: stage-one frames to latents of a larger, usually faster clip.

    `times`: for each refined frame, the stage-one time it shows, in frames of `stage_one`. `cond_frames`:
    refined frames that the window begins with (they are among those of `times`). `noise_seeds`: one for each
    latent frame of the padded window, see refine_layout. `spatial_only`: the frame rate stays, so times must
    be whole. `resume` as in SegmentRequest.
    """

    stage_one: Tensor
    times: Sequence[float]
    height_px: int
    width_px: int
    noise_seeds: Sequence[int]
    text: Tensor
    text_mask: Tensor
    schedule: Schedule
    cond_frames: Tensor | None = None
    spatial_only: bool = False
    start_step: int = 0
    resume: Tensor | None = None
    on_step: OnStep | None = None


@dataclasses.dataclass(frozen=True)
class RefineLayout:
    """A padded window: `front_frames` repeats of its first frame, the frames, `back_frames` of the last."""

    cond_latents: int
    noise_latents: int
    front_frames: int
    back_frames: int

    @property
    def latents(self) -> int:
        return self.cond_latents + self.noise_latents


@dataclasses.dataclass(frozen=True)
class Refined:
    """Refined latents fp32 [16,T,H,W], padding included, and the decoded frames that are padding."""

    latents: Tensor
    front_frames: int
    back_frames: int


def load_models(
    folder: str | Path,
    *,
    role_loras: Sequence[tuple[str | Path, float]] = (),
    attention: Attention = "dense",
    device: torch.device | str,
    dtype: torch.dtype,
) -> Models:
    """The networks of a checkpoint folder, a role's LoRAs (file, strength) merged into the weights."""
    from model.checkpoint import load_dit, load_vae

    dit = load_dit(folder, device=device, dtype=dtype, loras=role_loras, attention=attention)
    return Models(dit, load_vae(folder, device=device, dtype=dtype), torch.device(device), dtype)


def generate_segment(models: Models, request: SegmentRequest) -> Tensor:
    """Latents fp32 [16,T,H,W] of one segment, T = 1 + (segment_frames - 1) / 4; conditions are their first
    frames.

    Raises InputError for a request that does not fit the model, NumericsError, and whatever on_step raises.
    """
    vae = models.vae
    frames = _latent_count("segment_frames", request.segment_frames, vae.temporal_factor)
    shape = _latent_shape(vae, frames, request.height_px, request.width_px, request.noise_seeds)
    num_cond = _condition_count(vae, request, shape)
    if request.resume is not None:
        latents = _resumed(request.resume, shape)
    else:
        latents = draw_noise(request.noise_seeds, *shape[1:2], *shape[3:]).to(models.device)
        if num_cond:
            latents[0, :, :num_cond] = _condition_latents(vae, request)
    text = _condition(request.text, request.text_mask, request.negative_text, request.negative_mask)
    return _denoise(models, request, latents, text, guidance=request.guidance, num_cond_latents=num_cond)[0]


def refine_window(models: Models, request: RefineRequest) -> Refined:
    """Refine one window: encode the resampled frames, add noise up to the first level of the schedule,
    denoise.

    Raises as generate_segment does.
    """
    size = (request.height_px, request.width_px)
    _check_refine(request)
    num_cond_frames = 0 if request.cond_frames is None else len(request.cond_frames)
    layout = refine_layout(len(request.times), num_cond_frames, models.vae.temporal_factor)
    shape = _latent_shape(models.vae, layout.latents, *size, request.noise_seeds)
    if request.resume is not None:
        latents = _resumed(request.resume, shape)
    else:
        latents = _refinement_start(models, request, layout)
    text = _condition(request.text, request.text_mask, None, None)
    latents = _denoise(models, request, latents, text, guidance=1, num_cond_latents=layout.cond_latents)
    return Refined(latents[0], layout.front_frames, layout.back_frames)


def refine_layout(frames: int, cond_frames: int, temporal_factor: int = 4) -> RefineLayout:
    """Padding of a window of `frames` refined frames, the first `cond_frames` of which are given.

    Condition and noise part are each filled to whole blocks of four latents. Without conditions the first
    latent holds one frame only; the official code reckons with four there and drops up to three frames, here
    another block is added for them.
    """
    if not 0 <= cond_frames < frames:
        raise InputError(
            f"cond_frames: {cond_frames} refined conditions do not leave a rest of {frames} frames"
        )
    cond_latents = _fill(1 + math.ceil((cond_frames - 1) / temporal_factor)) if cond_frames else 0
    front = 1 + temporal_factor * (cond_latents - 1) - cond_frames if cond_frames else 0
    rest = frames - cond_frames
    # The first frame of a clip has a latent of its own.
    noise_latents = _fill(
        math.ceil((rest if cond_frames else rest - 1) / temporal_factor) + (not cond_frames)
    )
    total = 1 + temporal_factor * (cond_latents + noise_latents - 1)
    return RefineLayout(cond_latents, noise_latents, front, total - front - frames)


def mix_noise(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """The flow-matching state at noise level sigma: (1 - sigma) * clean + sigma * noise."""
    return (1 - sigma) * clean + sigma * noise


def _denoise(
    models: Models,
    request: SegmentRequest | RefineRequest,
    latents: Tensor,
    text: TextCondition,
    *,
    guidance: float,
    num_cond_latents: int,
) -> Tensor:
    with models.turns.denoising() if models.turns else nullcontext():
        return denoise(
            models.dit,
            latents,
            request.schedule,
            text,
            guidance=guidance,
            num_cond_latents=num_cond_latents,
            cache_on_host=models.cache_on_host,
            start_step=request.start_step,
            on_step=request.on_step,
        )


def _refinement_start(models: Models, request: RefineRequest, layout: RefineLayout) -> Tensor:
    """Starting latents [1,16,T,H,W]: the encoded window with noise, after the encoded conditions."""
    size = (request.height_px, request.width_px)
    times = (
        [request.times[0]] * layout.front_frames + [*request.times] + [request.times[-1]] * layout.back_frames
    )
    clean = encode_resampled(models.vae, request.stage_one, times, *size)
    noise = draw_noise(request.noise_seeds, clean.shape[0], *clean.shape[2:]).to(clean.device)
    latents = mix_noise(clean[None], noise, request.schedule.sigmas[0])
    if request.cond_frames is not None:
        padding = request.cond_frames[:1].expand(layout.front_frames, -1, -1, -1)
        latents[0, :, : layout.cond_latents] = encode_frames(
            models.vae, torch.cat([padding, request.cond_frames])
        )
    return latents


def _condition_count(vae: VAE, request: SegmentRequest, shape: tuple[int, ...]) -> int:
    """How many latents of `shape` [1,16,T,H,W] are given."""
    count, latents = 0, request.cond_latents
    if request.cond_frames is not None:
        _check_frames("cond_frames", request.cond_frames, request.height_px, request.width_px)
        count = _latent_count("cond_frames", len(request.cond_frames), vae.temporal_factor)
    if latents is not None:
        if latents.ndim != 4 or latents[:, :1].shape != (shape[1], 1, *shape[3:]):
            raise InputError(f"cond_latents: {tuple(latents.shape)}, wanted [{shape[1]},k,{shape[3]},{shape[4]}]")
        count += latents.shape[1]
    if count >= shape[2]:
        raise InputError(f"conditions: {count} latents leave nothing of {shape[2]} to generate")
    return count


def _condition_latents(vae: VAE, request: SegmentRequest) -> Tensor:
    """The latents [16,k,H,W] that the segment begins with, on the device of the VAE."""
    device = next(vae.parameters()).device
    parts = [] if request.cond_frames is None else [encode_frames(vae, request.cond_frames)]
    parts += [] if request.cond_latents is None else [request.cond_latents.to(device, torch.float32)]
    return torch.cat(parts, dim=1)


def _condition(
    text: Tensor, mask: Tensor, negative: Tensor | None, negative_mask: Tensor | None
) -> TextCondition:
    if text.ndim != 3 or mask.ndim != 1:
        raise InputError(
            f"text: states {tuple(text.shape)} and mask {tuple(mask.shape)}, wanted [1,L,C] and [L]"
        )
    if negative is None or negative_mask is None:
        return TextCondition(text[None], mask[None])
    return TextCondition(text[None], mask[None], negative[None], negative_mask[None])


def _latent_shape(
    vae: VAE, frames: int, height_px: int, width_px: int, seeds: Sequence[int]
) -> tuple[int, ...]:
    factor = vae.spatial_factor
    for name, value in (("height_px", height_px), ("width_px", width_px)):
        if value <= 0 or value % (2 * factor):
            raise InputError(f"{name}: {value} is no positive multiple of {2 * factor}")
    if len(seeds) != frames:
        raise InputError(f"noise_seeds: {len(seeds)} seeds for {frames} latent frames")
    return 1, vae.config.z_dim, frames, height_px // factor, width_px // factor


def _latent_count(name: str, frames: int, factor: int) -> int:
    if frames < 1 or (frames - 1) % factor:
        raise InputError(f"{name}: {frames} is not 1 plus a multiple of {factor}")
    return 1 + (frames - 1) // factor


def _check_frames(name: str, frames: Tensor, height_px: int, width_px: int) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 4 or tuple(frames.shape[1:]) != (height_px, width_px, 3):
        raise InputError(
            f"{name}: {frames.dtype} {tuple(frames.shape)}, wanted uint8 [n,{height_px},{width_px},3]"
        )


def _check_refine(request: RefineRequest) -> None:
    _check_frames("stage_one", request.stage_one, *request.stage_one.shape[1:3])
    if request.cond_frames is not None:
        _check_frames("cond_frames", request.cond_frames, request.height_px, request.width_px)
    if request.spatial_only and any(time != int(time) for time in request.times):
        raise InputError("times: must be whole frames where only the size is refined")


def _resumed(resume: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(resume.shape) != shape:
        raise InputError(f"resume: latents {tuple(resume.shape)}, wanted {shape}")
    return resume


def _fill(latents: int) -> int:
    return math.ceil(latents / _REFINE_GRANULARITY) * _REFINE_GRANULARITY


if __name__ == "__main__":
    from model.clip import main

    sys.exit(main())
