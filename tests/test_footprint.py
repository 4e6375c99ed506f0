"""The arithmetic of a card's memory is that of the real networks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from cluster.probe import network_sizes
from model.bench import OFFICIAL
from model.config import DiTConfig, VAEConfig
from model.dit import DiT
from model.footprint import PASSES, Footprint, Living, Pass, footprint, vae_footprint
from model.quantize import choose_products_, quantize_
from pipeline.arithmetic import grid_of
from pipeline.facts import CheckpointFacts, Facts, RenderFacts
from pipeline.memory import (
    DECODE_BYTES,
    LEAST,
    NetworkSizes,
    RoleMemory,
    cache_bytes,
    needs,
    too_small,
    transformer_bytes,
)
from pipeline.plan import Plan, plan_film
from pipeline.spec import Memory, parse_spec
from tests.tiny_checkpoint import make_checkpoint

FIRST = Pass("480p, the first segment", 24, (30, 52), 0, "dense")
STORED = Memory()


def official_plan(refinement: str, quality: str = "draft") -> Plan:
    text = f"refinement: {refinement}\nquality: {quality}\nshots: [{{duration: 15s, prompt: a red circle}}]"
    return plan_film(parse_spec(text), Facts(CheckpointFacts("", "0" * 64)))


def needs_of(plan: Plan, memory: Memory, sizes: NetworkSizes | None = None) -> dict[str, RoleMemory]:
    return {role.role: role for role in needs(plan.tasks.values(), sizes or NetworkSizes(), RenderFacts(), memory)}


@pytest.mark.parametrize("products", [None, "weight_only", "int8", "fp8"])
def test_weights_are_as_large_as_the_networks_own(products: str | None) -> None:
    with torch.device("meta"):
        network = DiT(dataclasses.replace(OFFICIAL, depth=3)).bfloat16()
    if products:
        choose_products_(network, products)  # type: ignore[arg-type]
    held = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    memory = Memory(precision=products or "stored")  # type: ignore[arg-type]
    assert transformer_bytes(NetworkSizes(depth=3), memory) == held


def test_int8_files_are_counted_as_they_are() -> None:
    with torch.device("meta"):
        network = DiT(dataclasses.replace(OFFICIAL, depth=3)).bfloat16()
    quantize_(network)
    held = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    assert transformer_bytes(NetworkSizes(depth=3, is_int8=True), STORED) == held


@pytest.mark.parametrize("memory", [STORED, LEAST], ids=["as stored", "least"])
@pytest.mark.parametrize("size", [FIRST, *PASSES], ids=lambda size: size.name)
def test_a_role_needs_what_the_real_network_holds(size: Pass, memory: Memory) -> None:
    """At the official width, with fewer layers: what a layer holds at once does not depend on their number."""
    depth = 2
    plan = official_plan("chained" if "chained" in size.name else "parallel", "full" if size.batch == 2 else "draft")
    one = {
        name: task for name, task in plan.tasks.items()
        if task.kind in ("segment", "window") and _fits(task.params, size, task.kind)
    }  # fmt: skip
    assert one
    found = needs(one.values(), NetworkSizes(depth=depth), RenderFacts(), memory)[0]
    products = None if memory.precision == "stored" else "weight_only"
    place = memory.condition_cache
    seen = footprint(dataclasses.replace(OFFICIAL, depth=depth), size, products=products, cache=place)
    held = found.weights + found.denoising + (found.cache if place == "card" else 0)
    assert seen.peak == pytest.approx(held, rel=0.04)


def _fits(params: dict[str, object], size: Pass, kind: str) -> bool:
    grid = grid_of(RenderFacts())
    conditions = {0: 0, 4: grid.condition_frames, 8: grid.refined_condition}[size.cond]
    if kind == "segment":
        return size.attention == "dense" and params["condition_frames"] == conditions
    given = params["condition"]
    frames = given["frames"] if isinstance(given, dict) else 0
    return size.attention == "block_sparse" and frames == conditions


def test_cache_is_as_large_as_the_networks_own() -> None:
    config = DiTConfig(hidden_size=64, depth=2, num_heads=2, caption_channels=8, adaln_tembed_dim=16)
    cache = DiT(config).bfloat16().build_cond_cache(torch.zeros(1, 16, 2, 8, 12, dtype=torch.bfloat16))
    held = sum(memory.keys.nbytes + memory.values.nbytes for memory in cache.layers)
    assert cache_bytes(NetworkSizes(width=64, depth=2), 2 * 4 * 6) == held


def test_a_cache_in_the_host_s_memory_takes_what_torch_makes_of_its_blocks() -> None:
    """`PowerOf2Ceil` in ATen/core/CachingHostAllocator.h: 4 x 30 x 52 tokens are 51 MB a block and take 64 MiB."""
    needed = needs_of(official_plan("chained"), LEAST)
    weights = needed["chain"].weights + needed["chain"].vae
    assert needed["chain"].host == weights + 96 * 2**26
    assert needed["refine"].host == weights + 96 * 2**28
    assert needs_of(official_plan("parallel"), LEAST)["refine"].host == weights, "no cache"


@pytest.mark.parametrize(("height_px", "width_px"), [(480, 832), (704, 1280)])
def test_decoding_needs_what_the_real_vae_holds(height_px: int, width_px: int) -> None:
    config = VAEConfig((0.0,) * 16, (1.0,) * 16)
    estimated = DECODE_BYTES * config.base_dim * height_px * width_px + 2 * NetworkSizes().vae_weights
    assert vae_footprint(config, height_px, width_px) == pytest.approx(estimated, rel=0.03)


def test_counting_follows_what_lives() -> None:
    with Living() as living:
        first = torch.empty(1000, dtype=torch.int8, device="meta")
        view = first[:10]
        del first
        assert living.now == 1024, "a view keeps all of it, in whole grains"
        second = view.clone()
        del view
        assert (living.now, living.peak) == (512, 1536)
        assert second.is_meta


def test_text_encoder_is_as_large_as_the_official_one() -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        config = UMT5Config(vocab_size=256_384, d_model=4096, d_kv=64, d_ff=10_240, num_layers=24, num_heads=64)
        network = UMT5EncoderModel(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == NetworkSizes().text_weights


@pytest.mark.parametrize("refinement", ["parallel", "chained"])
@pytest.mark.parametrize("quality", ["draft", "full"])
def test_the_least_setting_stays_below_23_gb_and_64_of_the_host(refinement: str, quality: str) -> None:
    found = needs_of(official_plan(refinement, quality), LEAST)
    assert set(found) == {"text", "chain", "refine", "media"}
    assert all(role.card < 23e9 for role in found.values())
    assert all(role.host < 64e9 for role in found.values())


@pytest.mark.parametrize("without", ["precision", "networks", "condition_cache"])
def test_each_part_of_the_least_setting_is_needed(without: str) -> None:
    others = {name: value for name, value in LEAST.model_dump().items() if name != without}
    found = needs_of(official_plan("chained"), Memory(**others))
    assert max(role.card for role in found.values()) > 23e9


def test_too_small_cards_are_named_with_what_helps() -> None:
    plan = official_plan("chained")
    found, least = needs_of(plan, STORED), needs_of(plan, LEAST)
    chain, refine = too_small(found.values(), least, 24_000_000_000)  # type: ignore[arg-type]
    assert chain.startswith("chain does not fit on a card of 24 GB: about 38.")
    assert "precision: weight_only, networks: in_turn, condition_cache: host" in refine
    assert refine.endswith("which fits")
    assert too_small(found.values(), least, 16_000_000_000)[-1].endswith("which does not fit either")  # type: ignore[arg-type]
    assert too_small(found.values(), least, 80_000_000_000) == []  # type: ignore[arg-type]


def test_sizes_are_read_from_the_checkpoints_files(tmp_path: Path) -> None:
    sizes = network_sizes(str(make_checkpoint(tmp_path / "tiny")))
    assert (sizes.width, sizes.depth, sizes.heads, sizes.is_int8) == (64, 1, 1, False)
    from model.checkpoint import load_dit, load_text, load_vae

    here = {"device": "cpu", "dtype": torch.bfloat16}
    dit, vae = load_dit(tmp_path / "tiny", **here), load_vae(tmp_path / "tiny", **here)
    assert transformer_bytes(sizes, STORED) == sum(parameter.nbytes for parameter in dit.parameters())
    assert sizes.vae_weights == sum(parameter.numel() for parameter in vae.parameters())
    text = load_text(tmp_path / "tiny", **here)._model
    assert sizes.text_weights == sum(parameter.numel() for parameter in text.parameters())


def test_the_whole_network_is_the_sum_of_its_layers() -> None:
    config = dataclasses.replace(OFFICIAL, depth=2)
    seen: Footprint = footprint(config, FIRST, products="weight_only")
    assert seen.weights == pytest.approx(transformer_bytes(NetworkSizes(depth=2), LEAST), rel=1e-3)
    assert seen.cache == 0
