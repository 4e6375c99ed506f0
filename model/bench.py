"""Measures the model room: `python -m model.bench [--size small|full]`.

small, on the CPU, at the bundled checkpoint's size. Autoencoder: decodes the same latents with the same random
weights through this project's code, whole clip and streaming, and through diffusers' `AutoencoderKLWan` (a test
dependency), in turns within one run, and prints the best of each and the ratio. Refinement: one step of a padded
window with dense and with block-sparse attention, in turns.

full, on a CUDA GPU: all rows of docs/kernels.md. First those of `python -m kernels.bench`, then forward passes
of the 13.6 B network with random weights, in bf16 and quantised, with the peak of the card's memory. Two layers of it
are first compared with fp64 beside the same network in eager torch on the CPU; where the error is above twice that
one's no speed is printed, and the command fails. A row that cannot be measured says why; the others come all the same.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels.bench import Accuracy, Row, compare, guarded, lacking, print_table, refusal, seconds
from kernels.bench import rows as kernel_rows
from model.config import BlockSparseConfig, DiTConfig, VAEConfig
from model.dit import Attention, CondCache, DiT
from model.quantize import Products, choose_products_
from model.vae import VAE

FRAMES, HEIGHT_PX, WIDTH_PX = 93, 128, 192

OFFICIAL = DiTConfig(hidden_size=4096, depth=48, num_heads=32, caption_channels=4096)
BUNDLED = DiTConfig(
    hidden_size=256, depth=6, num_heads=4, caption_channels=128, adaln_tembed_dim=128, frequency_embedding_size=128,
    text_tokens_zero_pad=False, bsa_params=BlockSparseConfig(sparsity=0.75),
)  # fmt: skip
_TEXT_TOKENS = 512
DECODING = "VAE decoding, 4 latent frames of 704x1280, alone on the card"


@dataclasses.dataclass(frozen=True)
class Forward:
    """One measured forward pass. Latents (frames, rows, columns) of the noise and frames of conditions, which are in
    a cache, on the card or in host memory; `wanted_s`, `wanted_gb` (of the card's memory): the target, where there is
    one."""

    name: str
    attention: Attention
    products: Products | None
    noise: tuple[int, int, int]
    cond_frames: int = 0
    on_host: bool = False
    wanted_s: float | None = None
    wanted_gb: float | None = None

    @property
    def tokens(self) -> int:
        return (self.noise[0] + self.cond_frames) * self.noise[1] * self.noise[2] // 4


_SEGMENT, _WINDOW = (20, 60, 104), (40, 88, 160)
FORWARDS = (
    Forward("480p", "dense", None, (24, 60, 104), wanted_s=3.0),
    Forward("480p", "dense", "int8", (24, 60, 104), wanted_s=2.5),
    Forward("480p", "dense", "fp8", (24, 60, 104), wanted_s=2.5),
    Forward("480p, cache in host memory", "dense", "weight_only", _SEGMENT, 4, on_host=True, wanted_gb=23.0),
    Forward("720p window", "block_sparse", None, _WINDOW, 8, wanted_s=8.4),
    Forward("720p window", "block_sparse", "int8", _WINDOW, 8, wanted_s=6.0),
    Forward("720p window", "block_sparse", "fp8", _WINDOW, 8, wanted_s=6.0),
    Forward(
        "720p window, cache in host memory", "block_sparse", "weight_only", _WINDOW, 8, on_host=True, wanted_gb=23.0
    ),
)


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


@torch.no_grad()
def bench_refinement(repeats: int = 3) -> dict[str, float]:
    """Seconds of a refinement step of the bundled checkpoint's size (48 x 8 x 12 tokens), dense and block-sparse."""
    torch.manual_seed(0)
    dit = DiT(BUNDLED).eval()
    latents, text = torch.randn(1, 16, 48, HEIGHT_PX // 8, WIDTH_PX // 8), torch.randn(1, 1, 16, 128)
    times: dict[str, float] = {}
    for _ in range(repeats):
        for attention in ("dense", "block_sparse"):
            dit.attention = attention
            name = f"{attention}_s"
            call = lambda: dit(latents, torch.tensor([500.0]), text, torch.ones(1, 16))  # noqa: E731
            times[name] = min(times.get(name, float("inf")), best_seconds(call, 1))
    return times


def random_dit(config: DiTConfig, attention: Attention, device: str, dtype: torch.dtype) -> DiT:
    """The network with torch's own start values, drawn on the device in the type wanted: there is no larger copy."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        with torch.device(device):
            dit = DiT(config, attention).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    dit.bound_logits()
    return dit


def forward_call(dit: DiT, size: Forward) -> Callable[[], Tensor]:
    """The forward pass of random inputs, its condition cache (of random keys: only their size matters) made ready."""
    generator = torch.Generator().manual_seed(1)
    frames, rows, columns = size.noise
    latents = torch.randn(1, 16, frames, rows, columns, generator=generator).to(dit.device)
    text = torch.randn(1, 1, _TEXT_TOKENS, dit.config.caption_channels, generator=generator).to(dit.device)
    timestep = torch.tensor([500.0], device=dit.device)
    inputs = latents, timestep, text, torch.ones(1, _TEXT_TOKENS, device=dit.device)
    cache: CondCache | None = None
    if size.cond_frames:
        conditions = torch.randn(1, 16, size.cond_frames, rows, columns, generator=generator)
        cache = dit.build_cond_cache(conditions.to(dit.device), on_host=size.on_host)
    return lambda: dit(*inputs, cond_cache=cache)


@torch.no_grad()
def forward_accuracy(size: Forward, device: str, config: DiTConfig) -> Accuracy:
    """Two layers at a small size: on the device, beside eager bf16 on the CPU, both against fp64 without quantisation.

    Rounding to int8 or fp8 is in both; what is held against the kernels is what they add to it.
    """
    small = dataclasses.replace(size, noise=(8, 16, 16), cond_frames=4 if size.cond_frames else 0)
    network, exact = _exact(small.attention, small.noise, small.cond_frames, device, config)
    host = copy.deepcopy(network)
    if size.products is not None:
        choose_products_(host, size.products)
    eager = forward_call(host, small)()
    out = forward_call(host.to(device), small)()
    return compare(out.cpu(), eager, exact)


@functools.lru_cache(maxsize=1)
def _exact(
    attention: Attention, noise: tuple[int, int, int], cond_frames: int, device: str, config: DiTConfig
) -> tuple[DiT, Tensor]:
    """Two layers in bf16 on the CPU, and what they make in fp64 (where no kernel runs)."""
    host = random_dit(dataclasses.replace(config, depth=2), attention, "cpu", torch.bfloat16)
    small = Forward("", attention, None, noise, cond_frames)
    return host, forward_call(copy.deepcopy(host).to(device).double(), small)().double().cpu()


def forward_rows(device: str = "cuda", config: DiTConfig = OFFICIAL) -> Iterator[Row]:
    """A row for each of FORWARDS, and one for the VAE."""
    for size in FORWARDS:
        what = f"DiT forward, {size.name}, {size.tokens} tokens, {size.attention}, {size.products or 'bf16'}"
        yield from guarded(what, _forward_row(what, size, device, config))
        torch.cuda.empty_cache()
    yield from guarded(DECODING, _decoding_row(device))


@torch.no_grad()
def _forward_row(what: str, size: Forward, device: str, config: DiTConfig) -> Iterator[Row]:
    accuracy = forward_accuracy(size, device, config)
    if not accuracy.admitted:
        yield refusal(what, accuracy)
        return
    dit = random_dit(config, size.attention, device, torch.bfloat16)
    if size.products is not None:
        choose_products_(dit, size.products)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    time_s = seconds(forward_call(dit, size), repeats=2)
    peak_gb = torch.cuda.max_memory_allocated() / 1e9
    result = f"{time_s:.2f} s, peak {peak_gb:.1f} GB; {accuracy.text()}"
    if size.wanted_s is not None:
        yield Row(what, result, f"{size.wanted_s} s", time_s <= size.wanted_s)
    elif size.wanted_gb is not None:
        yield Row(what, result, f"below {size.wanted_gb:g} GB", peak_gb < size.wanted_gb)
    else:
        yield Row(what, result)


@torch.no_grad()
def _decoding_row(device: str) -> Iterator[Row]:
    """The other half of the memory target: networks in turn, so the VAE has the card to itself."""
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    vae = VAE(VAEConfig((0.0,) * 16, (1.0,) * 16)).to(device, torch.bfloat16).eval()
    latents = torch.randn(1, 16, 4, *_WINDOW[1:]).to(device, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    time_s = seconds(lambda: [None for _ in vae.decode_stream(latents)], repeats=2)
    peak_gb = torch.cuda.max_memory_allocated() / 1e9
    yield Row(DECODING, f"{time_s:.2f} s, peak {peak_gb:.1f} GB", "below 23 GB", peak_gb < 23.0)


def print_small(repeats: int) -> None:
    result = bench_vae_decode(repeats)
    print(f"VAE decode, {FRAMES} frames {HEIGHT_PX}x{WIDTH_PX}, base_dim 8, {torch.get_num_threads()} threads")
    for name in ("whole", "stream", "diffusers"):
        seconds = result[f"{name}_s"]
        print(f"  {name:10} {seconds:7.2f} s  {FRAMES / seconds:7.1f} frames/s")
    print(f"  {result['diffusers_s'] / result['whole_s']:.1f} times as fast as diffusers (wanted: 3)")
    print(f"  largest difference {result['max_difference']:.1e}")
    times = bench_refinement(repeats)
    print("refinement step, 48x8x12 tokens, 6 layers of width 256, sparsity 0.75")
    for name, time_s in times.items():
        print(f"  {name.removesuffix('_s'):12} {time_s:6.2f} s")
    print(f"  block-sparse is {times['dense_s'] / times['block_sparse_s']:.2f} times as fast as dense")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m model.bench", description="Measure the model's parts.")
    parser.add_argument("--repeats", type=_positive, default=3, help="small: runs of each, of which the fastest counts")
    parser.add_argument("--size", choices=("small", "full"), default="small", help="full needs a CUDA GPU")
    options = parser.parse_args()
    if options.size == "small":
        print_small(options.repeats)
        return 0
    if reason := lacking():
        print(f"--size full {reason}: nothing was measured", file=sys.stderr)
        return 2
    return print_table("python -m model.bench --size full", itertools.chain(kernel_rows(), forward_rows()))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
