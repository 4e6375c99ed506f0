"""Between pixels and latents: 8-bit frames in, normalised latents out, and back.

Frames are uint8 [n,h,w,3]; video is [B,3,F,h,w] in [-1,1]; latents are [16,T,H,W] (no batch) with T = 1 +
(F-1)/4 frames in time. Clips go through the VAE in pieces of bounded size, so memory does not grow with their
length, and in one piece where they are small, which is faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import InputError
from model.vae import VAE

# Frames times pixels that one pass through the VAE may hold: few enough for a small clip's activations to stay in
# the processor's cache (2.6 times as fast as a whole clip of 189 frames at 128x192, in a thirtieth of the memory).
_PIXELS_AT_ONCE = 200_000


def frames_to_video(frames: Tensor) -> Tensor:
    """uint8 [n,h,w,3] -> fp32 [1,3,n,h,w] in [-1,1]."""
    return (frames.float() / 127.5 - 1).permute(3, 0, 1, 2)[None]


def video_to_frames(video: Tensor) -> Tensor:
    """[1,3,n,h,w] in [-1,1] -> uint8 [n,h,w,3], rounded to the nearest level (cutting off would darken by
    half a level).
    """
    levels = ((video[0].float() + 1) * 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(1, 2, 3, 0).contiguous()


@torch.no_grad()
def encode_frames(vae: VAE, frames: Tensor) -> Tensor:
    """uint8 [1+4k,h,w,3] -> normalised latents fp32 [16,1+k,H,W], the mean of the posterior, on the device of
    the VAE.
    """
    times = [float(i) for i in range(len(frames))]
    return encode_resampled(vae, frames, times, frames.shape[1], frames.shape[2])


@torch.no_grad()
def encode_resampled(
    vae: VAE, frames: Tensor, times: Sequence[float], height_px: int, width_px: int
) -> Tensor:
    """Encode resample_frames of 1+4k `times`, in pieces: normalised latents fp32 [16,1+k,H,W]."""
    parameter = next(vae.parameters())
    pieces = _pieces(len(times), vae.temporal_factor, height_px * width_px)
    chunks = (
        resample_frames(frames.to(parameter.device), times[piece], height_px, width_px).to(parameter.dtype)
        for piece in pieces
    )
    return torch.cat(list(vae.encode_stream(chunks)), dim=2)[0].float()


@torch.no_grad()
def decode_frames(vae: VAE, latents: Tensor, drop_first: int = 0) -> Iterator[Tensor]:
    """Normalised latents [16,T,H,W] -> frames uint8 [f,h,w,3] in pieces, on the CPU."""
    parameter = next(vae.parameters())
    pixels = latents.shape[2] * latents.shape[3] * vae.spatial_factor**2
    step = max(1, _PIXELS_AT_ONCE // (pixels * vae.temporal_factor))
    z = latents[None].to(parameter.device, parameter.dtype)
    for video in vae.decode_stream(z[:, :, i : i + step] for i in range(0, z.shape[2], step)):
        frames = video_to_frames(video).cpu()
        skipped = min(drop_first, len(frames))
        drop_first -= skipped
        if skipped < len(frames):
            yield frames[skipped:]


def resample_frames(frames: Tensor, times: Sequence[float], height_px: int, width_px: int) -> Tensor:
    """Frames uint8 [m,h,w,3] at `times` (in frames, 0..m-1) and another size: fp32
    [1,3,len(times),height,width] in [-1,1].

    Bilinear in space with corners aligned, then linear in time.
    """
    if not times or min(times) < 0 or max(times) > len(frames) - 1:
        raise InputError(
            f"times: {min(times, default=None)}..{max(times, default=None)} outside 0..{len(frames) - 1}"
        )
    at = torch.tensor(times, dtype=torch.float64)
    before = at.floor().long().clamp(max=max(len(frames) - 2, 0))
    weight = (at - before).float().to(frames.device).view(-1, 1, 1, 1)
    first, last = int(before.min()), min(int(before.max()) + 2, len(frames))
    near = frames[first:last].permute(0, 3, 1, 2).float()
    if near.shape[2:] != (height_px, width_px):
        near = F.interpolate(near, (height_px, width_px), mode="bilinear", align_corners=True)
    near = near / 255
    index = (before - first).to(frames.device)
    following = (index + 1).clamp(max=len(near) - 1)
    mixed = near[index] * (1 - weight) + near[following] * weight
    return (mixed * 2 - 1).transpose(0, 1)[None]


def _pieces(frames: int, factor: int, pixels: int) -> list[slice]:
    """Cut 1+factor*k frames into a first piece of 1+factor*j frames and further pieces of factor*j frames."""
    if (frames - 1) % factor:
        raise InputError(f"frames: {frames} is not 1 plus a multiple of {factor}")
    step = factor * max(1, _PIXELS_AT_ONCE // (pixels * factor))
    starts = [0, *range(1 + step, frames, step)]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], frames], strict=True)]
