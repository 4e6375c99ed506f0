"""The network through the kernels in Triton's interpreter. Run by tests/test_kernels_interpreted.py in a process of
its own with TRITON_INTERPRET=1, as interpreted_kernels.py is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from interpreted_kernels import GOLDEN, golden_tensors, seeded
from safetensors.torch import load_file

from kernels.block_sparse_attention import triton_impl as bsa
from kernels.linear import triton_impl as linear
from kernels.modulate import api as modulate_api
from kernels.modulate import triton_impl as modulate
from kernels.norm_rope import triton_impl as norm_rope
from kernels.swiglu import triton_impl as swiglu
from model.config import BlockSparseConfig, DiTConfig
from model.dit import DiT
from model.quantize import choose_products_


@pytest.fixture
def launches(monkeypatch) -> dict[str, int]:
    """How often each kernel is launched."""
    counts: dict[str, int] = {}

    def counted(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def counting(*args: object, **kwargs: object) -> object:
            counts[name] = counts.get(name, 0) + 1
            return call(*args, **kwargs)

        return counting

    for module, name in (
        (bsa, "launch_forward"),
        (bsa, "choose_blocks"),
        (norm_rope, "norm_rope"),
        (modulate, "launch"),
        (swiglu, "swiglu"),
        (swiglu, "swiglu_quantised"),
        (linear, "quantise_rows"),
        (linear, "multiply_int8"),
    ):
        monkeypatch.setattr(module, name, counted(f"{module.__name__.split('.')[1]}.{name}", getattr(module, name)))
    return counts


def golden_dit(attention: str) -> DiT:
    model = DiT(DiTConfig.from_json(GOLDEN / "dit_config.json"), attention).requires_grad_(False)
    model.load_state_dict(load_file(GOLDEN / "dit.safetensors"))
    return model


@pytest.mark.parametrize(
    ("case", "num_cond", "bounded"), [("model_bsa", 0, True), ("model_bsa_cond", 4, False)]
)
def test_golden_network_with_block_sparse_attention(launches, monkeypatch, case, num_cond, bounded):
    """With conditions the modulation, which takes the interpreter most of the time, is the reference's."""
    if num_cond:
        monkeypatch.setattr(modulate_api, "takes_kernel", lambda *tensors, makes: False)
    model = golden_dit("block_sparse")
    if bounded:
        model.bound_logits()
        assert 0 < model.blocks[0].attn.logit_bound < bsa.MAX_LOGIT_BOUND
    x, t, text, mask, wanted = golden_tensors("model_bsa.x", f"{case}.t", "dense.y", "dense.mask", f"{case}.out")
    out = model(x, t, text[:1], mask[:1], num_cond_latents=num_cond)
    assert (out - wanted).abs().max() < 5e-6
    # Two layers; conditions and noise attend apart. Norms: q and k of video and text. Modulation: before and after
    # attention, after the text, after the FFN, and in the last layer.
    parts = 2 if num_cond else 1
    assert launches["block_sparse_attention.launch_forward"] == 2 * parts
    assert launches["block_sparse_attention.choose_blocks"] == 2 * parts
    assert launches["norm_rope.norm_rope"] == 8
    assert launches.get("modulate.launch", 0) == (0 if num_cond else 9)
    assert launches["swiglu.swiglu"] == 2


def tiny_dit(attention: str) -> DiT:
    torch.manual_seed(0)
    sparse = BlockSparseConfig(sparsity=0.5)
    config = DiTConfig(
        hidden_size=32, depth=1, num_heads=2, caption_channels=8, adaln_tembed_dim=16, bsa_params=sparse
    )
    return DiT(config, attention).requires_grad_(False)


def tiny_inputs(frames: int) -> tuple[torch.Tensor, ...]:
    """Latents of `frames` x 4 x 4 tokens, timestep, text and its mask."""
    return seeded(1, 16, frames, 8, 8), torch.tensor([300.0]), seeded(1, 1, 5, 8), torch.ones(1, 5, dtype=torch.long)


def test_condition_cache_serves_the_kernels_as_conditions_in_the_sequence_do():
    model = tiny_dit("block_sparse")
    x, t, *text = tiny_inputs(8)
    whole = model(x, torch.tensor([[0.0] * 4 + [300.0] * 4]), *text, num_cond_latents=4)
    cache = model.build_cond_cache(x[:, :, :4])
    assert cache.layers[0].means is not None
    out = model(x[:, :, 4:], t, *text, cond_cache=cache)
    assert (out - whole[:, :, 4:]).abs().max() < 5e-6


def test_int8_network_quantises_within_the_kernels_that_make_its_activations(launches):
    model, inputs = tiny_dit("dense"), tiny_inputs(3)
    wanted = model(*inputs)
    launches.clear()
    choose_products_(model, "int8")
    error = (model(*inputs) - wanted).square().mean().sqrt()
    assert 0 < error < 0.05 * wanted.std()
    # Of the inputs of seven Linears only what attention returns (to video, and to the text) is quantised by itself.
    assert launches["linear.multiply_int8"] == 7
    assert launches["linear.quantise_rows"] == 2
    assert launches["swiglu.swiglu_quantised"] == 1


@pytest.mark.parametrize("attention", ["dense", "block_sparse"])
def test_network_of_kernels_compiles_without_graph_breaks(launches, attention):
    model, inputs = tiny_dit(attention), tiny_inputs(4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        wanted = model(*inputs)
        before = dict(launches)
        torch.testing.assert_close(compiled(*inputs), wanted, atol=1e-5, rtol=0)
    assert launches == {name: 2 * count for name, count in before.items()}
    assert ("block_sparse_attention.launch_forward" in launches) == (attention == "block_sparse")
