"""Starting noise that depends on names only: each latent frame has its own generator.

Frames are drawn one by one in fp64 on the CPU (fp32 draws differ between CPU generations) and cast to fp32,
so neither the device, nor the order, nor how frames are grouped changes them, and overlapping windows share
the noise of the frames they share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def draw_noise(seeds: Sequence[int], channels: int, height: int, width: int) -> Tensor:
    """Normal noise fp32 [1,channels,len(seeds),height,width] on the CPU; seeds 0..2^63-1, latent sizes."""
    frames = [_draw_frame(seed, (channels, height, width)) for seed in seeds]
    return torch.stack(frames, dim=1)[None]


def named_seeds(name: str, count: int) -> list[int]:
    """One seed for each latent frame, from `name`, so that neighbouring names share no noise."""
    digests = (hashlib.sha256(f"{name}/{index}".encode()).digest() for index in range(count))
    return [int.from_bytes(digest[:8], "big") >> 1 for digest in digests]


def _draw_frame(seed: int, shape: tuple[int, int, int]) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").float()
