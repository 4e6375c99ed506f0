"""Measures the model room: `python -m model.bench`.

Autoencoder: decodes the same latents with the same random weights through this project's code, whole clip
and streaming, and through diffusers' `AutoencoderKLWan` (a test dependency), in turns within one run, and
prints the best of each and the ratio.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from model.config import VAEConfig
from model.vae import VAE

FRAMES, HEIGHT_PX, WIDTH_PX = 93, 128, 192


def small_config() -> VAEConfig:
    """The size that the comparison is stated for: base_dim 8, dim_mult [1,2,4,4], one residual block."""
    return VAEConfig(latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16, base_dim=8, num_res_blocks=1)


def diffusers_twin(vae: VAE) -> Callable[[Tensor], Tensor]:
    """diffusers' decoder with the weights of `vae`. The config's statistics must be 0 and 1: diffusers leaves
    them out.
    """
    from diffusers import AutoencoderKLWan

    twin = AutoencoderKLWan(
        base_dim=vae.config.base_dim,
        z_dim=vae.config.z_dim,
        dim_mult=list(vae.config.dim_mult),
        num_res_blocks=vae.config.num_res_blocks,
        temperal_downsample=list(vae.config.temperal_downsample),
    )
    twin.load_state_dict(vae.state_dict())
    return lambda latents: twin.eval().decode(latents).sample


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    """The shortest of `repeats` runs after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.no_grad()
def bench_vae_decode(repeats: int = 3) -> dict[str, float]:
    """Seconds to decode FRAMES frames: ours whole, ours streaming, diffusers; and the largest difference of a
    pixel.
    """
    torch.manual_seed(0)
    vae = VAE(small_config()).eval()
    latents = torch.randn(1, 16, (FRAMES - 1) // 4 + 1, HEIGHT_PX // 8, WIDTH_PX // 8)
    oracle = diffusers_twin(vae)
    return {
        "whole_s": best_seconds(lambda: vae.decode(latents), repeats),
        "stream_s": best_seconds(lambda: [None for _ in vae.decode_stream(latents)], repeats),
        "diffusers_s": best_seconds(lambda: oracle(latents), repeats),
        "max_difference": float((vae.decode(latents) - oracle(latents)).abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model.bench", description="Measure the model's parts.")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, of which the fastest counts")
    result = bench_vae_decode(parser.parse_args().repeats)
    print(f"VAE decode, {FRAMES} frames {HEIGHT_PX}x{WIDTH_PX}, base_dim 8, {torch.get_num_threads()} threads")
    for name in ("whole", "stream", "diffusers"):
        seconds = result[f"{name}_s"]
        print(f"  {name:10} {seconds:7.2f} s  {FRAMES / seconds:7.1f} frames/s")
    print(f"  {result['diffusers_s'] / result['whole_s']:.1f} times as fast as diffusers (wanted: 3)")
    print(f"  largest difference {result['max_difference']:.1e}")


if __name__ == "__main__":
    main()
