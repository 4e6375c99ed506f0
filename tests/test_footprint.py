"""The arithmetic of a card's memory is that of the real network."""

from __future__ import annotations

import torch

from model.config import DiTConfig
from model.dit import DiT
from model.footprint import PASSES, Pass, cache_bytes, tokens, weight_bytes, widest_bytes
from model.quantize import quantize_

SMALL = DiTConfig(hidden_size=64, depth=2, num_heads=2, caption_channels=8, adaln_tembed_dim=16)
CLEAN = Pass("", 3, (4, 6), 2)


def test_the_cache_is_as_large_as_the_networks_own() -> None:
    network = DiT(SMALL).bfloat16()
    cache = network.build_cond_cache(torch.zeros(1, 16, CLEAN.cond, 8, 12, dtype=torch.bfloat16))
    held = sum(memory.keys.nbytes + memory.values.nbytes for memory in cache.layers)
    assert cache_bytes(SMALL, CLEAN) == held


def test_the_weights_are_as_large_as_the_networks_own() -> None:
    network = DiT(SMALL).bfloat16()
    assert weight_bytes(SMALL, int8=False) == sum(parameter.nbytes for parameter in network.parameters())
    quantize_(network)
    stored = [*network.parameters(), *network.buffers()]
    assert weight_bytes(SMALL, int8=True) == sum(tensor.nbytes for tensor in stored)


def test_the_widest_rows_are_what_the_feed_forward_part_makes() -> None:
    network, seen = DiT(SMALL).bfloat16(), []
    for name in ("w1", "w3"):
        network.get_submodule(f"blocks.0.ffn.{name}").register_forward_hook(lambda m, i, out: seen.append(out.nbytes))
    latents = torch.zeros(1, 16, CLEAN.latents - CLEAN.cond, 8, 12, dtype=torch.bfloat16)
    text, mask = torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16), torch.ones(1, 4, dtype=torch.int64)
    network(latents, torch.tensor([500.0]), text, mask)
    assert widest_bytes(SMALL, CLEAN) == sum(seen)


def test_the_passes_are_those_of_the_official_sizes() -> None:
    assert [tokens(size) for size in PASSES] == [37_440, 168_960, 197_120]
