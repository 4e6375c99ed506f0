"""What the official network needs of a card's memory, by arithmetic: `python -m model.footprint`. Nothing is measured.

Weights are counted on the meta device. The condition cache holds k and v of each layer in bf16 for the clean
frames (13 at 480p, 26 at 720p). The widest rows are those that the feed-forward part has at once for all tokens
of one sample: its gate and its product, in bf16. A forward pass has more than these, so what is printed is a
lower bound: a card that holds less cannot run it, one that holds more may.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from model.bench import OFFICIAL
from model.config import DiTConfig
from model.dit import DiT
from model.quantize import quantize_

BF16_BYTES = 2


@dataclass(frozen=True)
class Pass:
    """A forward pass: latent frames and rows and columns of tokens, of which `cond` frames are clean."""

    name: str
    latents: int
    grid: tuple[int, int]
    cond: int


PASSES = (
    Pass("480p segment, 93 frames, 13 of them clean", 24, (30, 52), 4),
    Pass("720p window, 189 frames", 48, (44, 80), 0),
    Pass("720p window after 26 clean frames", 56, (44, 80), 8),
)


def weight_bytes(config: DiTConfig, *, int8: bool) -> int:
    """Of one role's DiT. What is not stored as int8 is bf16."""
    with torch.device("meta"):
        network = DiT(config)
        if int8:
            quantize_(network)
    full = sum(parameter.numel() for parameter in network.parameters()) * BF16_BYTES
    return full + sum(buffer.numel() * buffer.element_size() for buffer in network.buffers())


def tokens(size: Pass) -> int:
    """Tokens of one sample, clean ones included."""
    return size.latents * size.grid[0] * size.grid[1]


def cache_bytes(config: DiTConfig, size: Pass) -> int:
    """k and v of the clean frames, all layers."""
    return 2 * BF16_BYTES * config.hidden_size * config.depth * size.cond * size.grid[0] * size.grid[1]


def widest_bytes(config: DiTConfig, size: Pass) -> int:
    """The feed-forward part's gate and product of all tokens that are denoised."""
    own = tokens(size) - size.cond * size.grid[0] * size.grid[1]
    with torch.device("meta"):
        network = DiT(dataclasses.replace(config, depth=1))
    width = len(network.get_parameter("blocks.0.ffn.w1.weight"))
    return 2 * BF16_BYTES * width * own


def table(config: DiTConfig = OFFICIAL) -> list[tuple[str, int, float, float, float, float]]:
    """Rows: pass, tokens, and GB of cache and widest rows, and of the least for bf16 and int8 weights."""
    weights = [weight_bytes(config, int8=int8) for int8 in (False, True)]
    rows = []
    for size in PASSES:
        own = cache_bytes(config, size), widest_bytes(config, size)
        least = [(weight + sum(own)) / 1e9 for weight in weights]
        rows.append((size.name, tokens(size), own[0] / 1e9, own[1] / 1e9, least[0], least[1]))
    return rows


def main() -> None:
    """Print the table."""
    sizes = [weight_bytes(OFFICIAL, int8=int8) / 1e9 for int8 in (False, True)]
    print(f"weights of a role: {sizes[0]:.1f} GB in bf16, {sizes[1]:.1f} GB in int8")
    print("computed, not measured; at least so many GB:")
    print(f"{'pass':<42} {'tokens':>8} {'cache':>6} {'widest':>7} {'bf16':>6} {'int8':>6}")
    for name, count, cache, widest, bf16, int8 in table():
        print(f"{name:<42} {count:>8,} {cache:>6.1f} {widest:>7.1f} {bf16:>6.1f} {int8:>6.1f}")


if __name__ == "__main__":
    main()
