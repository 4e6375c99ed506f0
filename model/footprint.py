"""What a forward pass holds of a card's memory, without a card: `python -m model.footprint`. Nothing is measured.

The real network runs on tensors that have shapes and no memory, with the kernels' results in place of the kernels, and
the bytes of all that lives are counted: weights, condition cache, and whatever a pass has at once. It is what torch's
allocator would be asked for, in units of 512 bytes. Not in it: what kernels need while they run (the lists of blocks
that sparse attention sees, 0.06 GB for 168,960 tokens; scratch of cuBLAS), what the allocator loses to fragments, and
the CUDA context, about half a GB.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.bench import OFFICIAL
from model.config import DiTConfig, VAEConfig
from model.dit import Attention, CondCache, DiT, Memory
from model.quantize import Products, choose_products_
from model.vae import VAE

GRAIN_BYTES = 512
TEXT_TOKENS = 512
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Pass:
    """A forward pass: latent frames and rows and columns of tokens, of which `cond` frames are clean and in a cache."""

    name: str
    latents: int
    grid: tuple[int, int]
    cond: int
    attention: Attention = "block_sparse"
    batch: int = 1


PASSES = (
    Pass("480p segment, draft", 24, (30, 52), 4, "dense"),
    Pass("480p segment, full (guidance)", 24, (30, 52), 4, "dense", batch=2),
    Pass("720p window, refinement: parallel", 48, (44, 80), 0),
    Pass("720p window, refinement: chained", 48, (44, 80), 8),
)


@dataclass(frozen=True)
class Footprint:
    """Bytes on the card: weights, condition cache, and at most at once, those included."""

    weights: int
    cache: int
    peak: int


def footprint(
    config: DiTConfig, size: Pass, *, products: Products | None, cache: Literal["card", "host"] = "card"
) -> Footprint:
    """Of one forward pass in bf16."""
    with torch.no_grad(), Living() as living, _FlashAttention():
        network = _on_meta(lambda: DiT(config, size.attention))
        if products is not None:
            choose_products_(network, products)
        weights = living.now
        kept = _cache(network, size, cache)
        beside = living.now - weights
        living.peak = living.now
        _call(network, size, kept)
        return Footprint(weights, beside, living.peak)


def vae_footprint(config: VAEConfig, height_px: int, width_px: int) -> int:
    """Bytes on the card at most while a clip of this size is decoded, a latent frame at a time; weights included."""
    with torch.no_grad(), Living() as living:
        vae = _on_meta(lambda: VAE(config))
        living.peak = living.now
        shape = (1, config.z_dim, 1, height_px // vae.spatial_factor, width_px // vae.spatial_factor)
        for _ in vae.decode_stream(torch.empty(shape, dtype=torch.bfloat16, device="meta") for _ in range(3)):
            pass
        return living.peak


class Living(TorchDispatchMode):
    """Counts the bytes that tensors on the meta device have: `now`, and `peak`, the most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._seen:
            self._seen[key] = -(-storage.nbytes() // GRAIN_BYTES) * GRAIN_BYTES
            self.now += self._seen[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._seen.pop(key)


class _FlashAttention(TorchFunctionMode):
    """Attention with the results that flash attention has: torch's own way on the meta device makes all scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query: Tensor = args[0]
        batch, heads, tokens, size = query.shape
        _sums = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        return query.new_empty(batch, tokens, heads, size).transpose(1, 2)


def _on_meta(make: Callable[[], Network]) -> Network:
    """In bf16."""
    with torch.device("meta"):
        return make().to(torch.bfloat16).requires_grad_(False)


def _cache(network: DiT, size: Pass, place: Literal["card", "host"]) -> CondCache | None:
    """A condition cache of the right size; in host memory it is one number, shown again and again."""
    if not size.cond:
        return None

    def tensor(wanted: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if place == "host":
            return torch.zeros(1, dtype=dtype).expand(wanted)
        return torch.empty(wanted, dtype=dtype, device="meta")

    heads, width = network.config.num_heads, network.config.head_dim
    tokens = size.cond * size.grid[0] * size.grid[1]
    shape, blocks = (1, heads, tokens, width), (1, heads, tokens // 64, width)
    layers = []
    for _ in network.blocks:
        means = tensor(blocks, torch.float32) if size.attention == "block_sparse" else None
        layers.append(Memory(tensor(shape, torch.bfloat16), tensor(shape, torch.bfloat16), means))
    return CondCache(tuple(layers), (size.cond, *size.grid), size.attention)


def _call(network: DiT, size: Pass, cache: CondCache | None) -> None:
    batch, frames = size.batch, size.latents - size.cond
    inputs = (
        torch.empty(batch, 16, frames, 2 * size.grid[0], 2 * size.grid[1], device="meta"),
        torch.empty(batch, device="meta"),
        torch.empty(batch, 1, TEXT_TOKENS, network.config.caption_channels, dtype=torch.bfloat16, device="meta"),
        torch.empty(batch, TEXT_TOKENS, device="meta"),
    )
    network(*inputs, cond_cache=cache)


def main() -> None:
    """Print what each pass of the official network holds, in GB."""
    argparse.ArgumentParser(prog="python -m model.footprint", description=main.__doc__).parse_args()
    print("bf16, computed from shapes, not measured; GB on the card at most, weights and cache included:")
    print(f"{'pass':<36} {'stored':>7} {'weight_only':>12} {'+ cache on the host':>20} {'cache':>6}")
    ways: tuple[tuple[Products | None, Literal["card", "host"]], ...]
    ways = ((None, "card"), ("weight_only", "card"), ("weight_only", "host"))
    for size in PASSES:
        found = [footprint(OFFICIAL, size, products=products, cache=place) for products, place in ways]
        stored, small, least = (one.peak / 1e9 for one in found)
        print(f"{size.name:<36} {stored:>7.1f} {small:>12.1f} {least:>20.1f} {found[0].cache / 1e9:>6.1f}", flush=True)
    config = VAEConfig((0.0,) * 16, (1.0,) * 16)
    for name, height_px, width_px in (("480p", 480, 832), ("720p", 704, 1280)):
        print(f"VAE decoding {name}, alone on the card: {vae_footprint(config, height_px, width_px) / 1e9:.1f}")


if __name__ == "__main__":
    main()
