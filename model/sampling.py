"""Schedules and the one denoising loop for text, image, continuation and refinement.

Flow matching: x_sigma = (1 - sigma) * x0 + sigma * noise, timestep = 1000 * sigma. The network predicts x0 -
noise, so an Euler step from sigma to sigma' adds (sigma - sigma') * prediction.

Legend: B batch, T/H/W latent frames/rows/columns, L text tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from model.dit import CondCache, DiT
from model.errors import InputError, NumericsError

OnStep = Callable[[int, Tensor], None]

_TRAINING_STEPS = 1000
_LAST_SIGMA = 0.001
_DISTILLED_GRID = 50
_HIGH_FREQUENCY_TIMESTEPS = tuple(range(500, 0, -50))
_GUIDANCE_EPS = 1e-8


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Noise levels of a loop: a timestep (0..1000) for each step; one sigma more, the last is 0."""

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.sigmas) != len(self.timesteps) + 1 or not self.timesteps:
            raise InputError(f"schedule: {len(self.sigmas)} sigmas for {len(self.timesteps)} timesteps")

    @property
    def steps(self) -> int:
        return len(self.timesteps)


@dataclasses.dataclass(frozen=True)
class TextCondition:
    """Encoded prompts: text [B,1,L,C], mask [B,L]; guidance other than 1 needs the negative pair."""

    text: Tensor
    mask: Tensor
    negative_text: Tensor | None = None
    negative_mask: Tensor | None = None


def base_schedule(steps: int, shift: float) -> Schedule:
    """Sigmas evenly spaced from 1 to 0.001, shifted; final 0."""
    _check_steps(steps, least=2)
    even = (1 + (_LAST_SIGMA - 1) * i / (steps - 1) for i in range(steps))
    return _schedule([_shifted(sigma, shift) for sigma in even])


def distilled_schedule(steps: int, shift: float) -> Schedule:
    """`steps` of the 50 sigmas 1, 0.98, ..., 0.02, evenly spread and shifted; for few-step weights."""
    _check_steps(steps, least=1)
    if steps > _DISTILLED_GRID:
        raise InputError(f"steps: {steps} is more than the {_DISTILLED_GRID} distilled levels")
    chosen = (math.floor(i * _DISTILLED_GRID / steps) for i in range(steps))
    return _schedule([_shifted(1 - i / _DISTILLED_GRID, shift) for i in chosen])


def enhance_hf_schedule(steps: int, shift: float) -> Schedule:
    """The base schedule above timestep 500, then 500, 450, ..., 50: more work on fine detail."""
    low = [t / _TRAINING_STEPS for t in _HIGH_FREQUENCY_TIMESTEPS]
    high = [sigma for sigma in base_schedule(steps, shift).sigmas if sigma > low[0]]
    return _schedule(high + low)


def refinement_schedule(steps: int, t_thresh: float, shift: float) -> Schedule:
    """Start at sigma `t_thresh`, go on with the levels of the base schedule below it."""
    if not 0 < t_thresh < 1:
        raise InputError(f"t_thresh: {t_thresh} is not between 0 and 1")
    low = [sigma for sigma in base_schedule(steps, shift).sigmas if 0 < sigma < t_thresh]
    return _schedule([t_thresh, *low])


@torch.no_grad()
def denoise(
    dit: DiT,
    latents: Tensor,
    schedule: Schedule,
    text: TextCondition,
    *,
    guidance: float,
    num_cond_latents: int = 0,
    use_cond_cache: bool = True,
    cache_on_host: bool = False,
    start_step: int = 0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoise latents [B,16,T,H,W]; the first `num_cond_latents` frames are clean conditions and come back
    unchanged.

    guidance 1 runs the prompt alone; otherwise CFG-zero with the negative prompt first in the batch.
    `use_cond_cache` runs the conditions once instead of at every step (guidance then weighs the noise frames
    only), and keeps what comes of it on the device or in host memory: the same bits. To resume, pass latents
    after `start_step` steps. on_step(steps_done, latents) is called after each step; what it raises ends the
    loop. Raises NumericsError if the result is not finite, InputError for requests that do not fit.
    """
    _check_request(latents, schedule, text, guidance, num_cond_latents, start_step)
    latents = latents.to(device=dit.device, dtype=torch.float32)
    conditions, noisy = latents[:, :, :num_cond_latents], latents[:, :, num_cond_latents:]
    prompts = _batch_prompts(text, guidance, dit.device)
    cache = None
    if num_cond_latents and use_cond_cache:
        cache = dit.build_cond_cache(conditions, on_host=cache_on_host)
    for step in range(start_step, schedule.steps):
        prediction = _predict(dit, conditions, noisy, schedule.timesteps[step], prompts, guidance, cache)
        noisy = noisy + (schedule.sigmas[step] - schedule.sigmas[step + 1]) * prediction
        if on_step is not None:
            on_step(step + 1, torch.cat([conditions, noisy], dim=2))
    if not bool(torch.isfinite(noisy).all()):
        raise NumericsError("denoised latents hold NaN or Inf")
    return torch.cat([conditions, noisy], dim=2)


def cfg_zero(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Guidance from a rescaled unconditional prediction: u*s + g*(c - u*s), s = <c,u>/|u|^2 per sample."""
    c, u = conditional.flatten(1), unconditional.flatten(1)
    scale = (c * u).sum(1) / (u.square().sum(1) + _GUIDANCE_EPS)
    anchor = unconditional * scale.view(-1, *[1] * (unconditional.ndim - 1))
    return anchor + guidance * (conditional - anchor)


def _predict(
    dit: DiT,
    conditions: Tensor,
    noisy: Tensor,
    timestep: float,
    prompts: tuple[Tensor, Tensor],
    guidance: float,
    cache: CondCache | None,
) -> Tensor:
    """The network's prediction x0 - noise for the noise frames [B,16,T,H,W]."""
    cond_frames = 0 if cache is not None else conditions.shape[2]
    latents = torch.cat([conditions, noisy], dim=2) if cond_frames else noisy
    timesteps = torch.full((latents.shape[0], latents.shape[2]), timestep, device=latents.device)
    timesteps[:, :cond_frames] = 0
    if not cond_frames:
        timesteps = timesteps[:, 0]
    if guidance == 1:
        out: Tensor = dit(latents, timesteps, *prompts, num_cond_latents=cond_frames, cond_cache=cache)
    else:
        twice = torch.cat([latents, latents])
        out = dit(twice, torch.cat([timesteps] * 2), *prompts, num_cond_latents=cond_frames, cond_cache=cache)
        unconditional, conditional = out.chunk(2)
        out = cfg_zero(conditional, unconditional, guidance)
    return out[:, :, cond_frames:]


def _batch_prompts(text: TextCondition, guidance: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """States and mask for the network's batch: the prompt, or the negative prompt and the prompt."""
    if guidance == 1 or text.negative_text is None or text.negative_mask is None:
        return text.text.to(device), text.mask.to(device)
    states = torch.cat([text.negative_text, text.text]).to(device)
    return states, torch.cat([text.negative_mask, text.mask]).to(device)


def _schedule(sigmas: list[float]) -> Schedule:
    return Schedule((*sigmas, 0.0), tuple(sigma * _TRAINING_STEPS for sigma in sigmas))


def _shifted(sigma: float, shift: float) -> float:
    return shift * sigma / (1 + (shift - 1) * sigma)


def _check_steps(steps: int, least: int) -> None:
    if steps < least:
        raise InputError(f"steps: {steps} is too few, wanted at least {least}")


def _check_request(
    latents: Tensor, schedule: Schedule, text: TextCondition, guidance: float, num_cond: int, start_step: int
) -> None:
    if not 0 <= num_cond < latents.shape[2]:
        raise InputError(f"num_cond_latents: {num_cond} is not in 0..{latents.shape[2] - 1}")
    if not 0 <= start_step <= schedule.steps:
        raise InputError(f"start_step: {start_step} is not in 0..{schedule.steps}")
    if guidance != 1 and (text.negative_text is None or text.negative_mask is None):
        raise InputError(f"guidance: {guidance} needs a negative prompt")
    if text.text.shape[0] != latents.shape[0]:
        raise InputError(f"text: {text.text.shape[0]} prompts for a batch of {latents.shape[0]}")
