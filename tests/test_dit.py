"""The diffusion transformer: golden outputs, and what conditions, cache, text and training may assume of
it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kernels.block_sparse_attention.api import block_order
from kernels.norm_rope.reference import rotate
from model import dit as dit_module
from model.config import BlockSparseConfig, DiTConfig
from model.dit import DiT, rotary_table
from model.errors import CheckpointError, InputError
from model.quantize import choose_products_

GOLDEN = Path(__file__).parent / "golden"
ONE_FORWARD = 5e-6

TINY = DiTConfig(hidden_size=32, depth=2, num_heads=2, caption_channels=8, adaln_tembed_dim=16)


@pytest.fixture(scope="module")
def cases() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "cases.safetensors")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "dit.safetensors")


@pytest.fixture(scope="module")
def dit(weights) -> DiT:
    return build(weights)


def build(weights: dict[str, torch.Tensor], attention: str = "dense", **changes: object) -> DiT:
    config = dataclasses.replace(DiTConfig.from_json(GOLDEN / "dit_config.json"), **changes)
    model = DiT(config, attention=attention).requires_grad_(False)
    model.load_state_dict(weights, strict=True)
    return model


def tiny_dit(seed: int = 0, **changes: object) -> DiT:
    torch.manual_seed(seed)
    return DiT(dataclasses.replace(TINY, **changes))


def tiny_inputs(batch: int = 1, frames: int = 3, text_tokens: int = 5) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 16, frames, 4, 4, generator=generator)
    text = torch.randn(batch, 1, text_tokens, 8, generator=generator)
    return latents, torch.full((batch,), 500.0), text, torch.ones(batch, text_tokens, dtype=torch.long)


def test_rotary_embedding_matches_golden(cases):
    table = rotary_table(0, 5, 4, 6, 64, torch.device("cpu"))
    assert (rotate(cases["rope.q"], table) - cases["rope.q_out"]).abs().max() < ONE_FORWARD
    assert (rotate(cases["rope.k"], table) - cases["rope.k_out"]).abs().max() < ONE_FORWARD


@pytest.mark.parametrize(
    ("zero_pad", "wanted"), [(True, "dense.out"), (False, "dense.out_other_text_padding")]
)
def test_forward_matches_golden_in_both_text_paddings(cases, weights, zero_pad, wanted):
    model = build(weights, text_tokens_zero_pad=zero_pad)
    out = model(*(cases[f"dense.{name}"] for name in ("x", "t", "y", "mask")))
    assert out.dtype == torch.float32
    assert (out - cases[wanted]).abs().max() < ONE_FORWARD


def test_conditions_in_the_sequence_match_golden(cases, dit):
    text, mask = cases["dense.y"][:1], cases["dense.mask"][:1]
    out = dit(cases["cond.x"], cases["cond.t"], text, mask, num_cond_latents=2)
    assert (out - cases["cond.out"]).abs().max() < ONE_FORWARD


def test_cache_of_one_serves_a_batch_of_two_and_matches_golden(cases, dit):
    cache = dit.build_cond_cache(cases["kv.cond_x"])
    table = rotary_table(0, *cache.grid, dit.config.head_dim, torch.device("cpu"))
    for i, layer in enumerate(cache.layers):
        assert (layer.keys - rotate(cases[f"kv.k.{i}"], table)).abs().max() < ONE_FORWARD
        assert (layer.values - cases[f"kv.v.{i}"]).abs().max() < ONE_FORWARD
    out = dit(cases["kv.x"], cases["kv.t"], cases["dense.y"], cases["dense.mask"], cond_cache=cache)
    assert (out - cases["kv.out"]).abs().max() < ONE_FORWARD


@pytest.mark.parametrize(("case", "num_cond"), [("model_bsa", 0), ("model_bsa_cond", 4)])
def test_block_sparse_forward_matches_golden(cases, weights, case, num_cond):
    model = build(weights, attention="block_sparse")
    text, mask = cases["dense.y"][:1], cases["dense.mask"][:1]
    out = model(cases["model_bsa.x"], cases[f"{case}.t"], text, mask, num_cond_latents=num_cond)
    assert (out - cases[f"{case}.out"]).abs().max() < ONE_FORWARD


@pytest.mark.parametrize("attention", ["dense", "block_sparse"])
def test_cache_and_conditions_in_the_sequence_agree(cases, weights, attention):
    model = build(weights, attention=attention)
    x, text, mask = cases["model_bsa.x"], cases["dense.y"][:1], cases["dense.mask"][:1]
    timestep = torch.tensor([[0.0] * 4 + [400.0] * 4])
    whole = model(x, timestep, text, mask, num_cond_latents=4)
    cache = model.build_cond_cache(x[:, :, :4])
    out = model(x[:, :, 4:], torch.tensor([400.0]), text, mask, cond_cache=cache)
    assert (out - whole[:, :, 4:]).abs().max() < ONE_FORWARD


@pytest.mark.parametrize("attention", ["dense", "block_sparse"])
@pytest.mark.parametrize("products", [None, "int8"])
@pytest.mark.parametrize("kept", ["nothing", "cache", "sequence"])
def test_many_tokens_are_computed_in_parts_with_the_same_result(cases, weights, monkeypatch, attention, products, kept):
    model = build(weights, attention=attention)
    if products:
        choose_products_(model, products)
    x, text, mask = cases["model_bsa.x"], cases["dense.y"], cases["dense.mask"]
    x = x.expand(len(text), -1, -1, -1, -1)
    times = torch.full((len(x), 8), 400.0)
    times[:, :4] = 0
    cache = model.build_cond_cache(x[:1, :, :4])
    calls = {
        "nothing": lambda: model(x, times[:, 4], text, mask),
        "cache": lambda: model(x[:, :, 4:], times[:, 4], text, mask, cond_cache=cache),
        "sequence": lambda: model(x, times, text, mask, num_cond_latents=4),
    }
    whole = calls[kept]()
    seen = []
    for name in ("attn.qkv", "cross_attn.q_linear", "ffn.w1"):
        model.get_submodule(f"blocks.0.{name}").register_forward_hook(lambda m, i, out: seen.append(out.shape[1]))
    monkeypatch.setattr(dit_module, "PART_TOKENS", 64)
    with torch.no_grad():
        out = calls[kept]()
    assert max(seen) == 64
    assert len(seen) > 3
    # A row that is quantised by itself has the digits that it has among others; sums of floats need not.
    torch.testing.assert_close(out, whole, atol=ONE_FORWARD if products is None else 2e-3, rtol=0)


@pytest.mark.parametrize("attention", ["dense", "block_sparse"])
def test_parts_compile_as_one_graph(cases, weights, monkeypatch, attention):
    monkeypatch.setattr(dit_module, "PART_TOKENS", 64)
    model = build(weights, attention=attention)
    x, text, mask = cases["model_bsa.x"], cases["dense.y"][:1], cases["dense.mask"][:1]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        call = (x[:, :, 4:], torch.tensor([400.0]), text, mask)
        cache = model.build_cond_cache(x[:, :, :4])
        wanted = model(*call, cond_cache=cache)
        torch.testing.assert_close(compiled(*call, cond_cache=cache), wanted, atol=1e-5, rtol=0)


def test_cache_holds_what_is_needed_and_nothing_beside_it(cases, dit):
    cache = dit.build_cond_cache(cases["kv.cond_x"])
    kept = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == sum(tensor.nbytes for tensor in kept)


def test_cache_in_host_memory_gives_the_same_bits(cases, dit):
    inputs = [cases[name] for name in ("kv.x", "kv.t", "dense.y", "dense.mask")]
    there, here = (dit.build_cond_cache(cases["kv.cond_x"], on_host=host) for host in (True, False))
    assert torch.equal(dit(*inputs, cond_cache=there), dit(*inputs, cond_cache=here))


@pytest.mark.parametrize("part_tokens", [16, 4096])
def test_each_layer_brings_its_part_of_a_cache_from_another_device(cases, weights, monkeypatch, part_tokens):
    model = build(weights)
    cache = model.build_cond_cache(cases["kv.cond_x"])
    elsewhere = model.to("meta")
    inputs = [cases[name].to("meta") for name in ("kv.x", "kv.t", "dense.y", "dense.mask")]
    monkeypatch.setattr(dit_module, "PART_TOKENS", part_tokens)
    with torch.no_grad():
        assert elsewhere(*inputs, cond_cache=cache).is_meta
    assert not any(layer.keys.is_meta for layer in cache.layers)


def test_conditions_see_neither_text_nor_noise():
    model = tiny_dit()
    latents, _, text, mask = tiny_inputs()
    timestep = torch.tensor([[0.0, 700.0, 700.0]])
    out = model(latents, timestep, text, mask, num_cond_latents=1)
    other = latents.clone()
    other[:, :, 1:] += 1
    changed = model(other, timestep, text + 1, mask, num_cond_latents=1)
    torch.testing.assert_close(changed[:, :, :1], out[:, :, :1], atol=1e-6, rtol=0)
    assert (changed[:, :, 1:] - out[:, :, 1:]).abs().max() > 1e-3


def test_noise_sees_conditions_and_text():
    model = tiny_dit()
    latents, _, text, mask = tiny_inputs()
    timestep = torch.tensor([[0.0, 700.0, 700.0]])
    out = model(latents, timestep, text, mask, num_cond_latents=1)[:, :, 1:]
    other = latents.clone()
    other[:, :, :1] += 1
    assert (model(other, timestep, text, mask, num_cond_latents=1)[:, :, 1:] - out).abs().max() > 1e-4
    assert (model(latents, timestep, text + 1, mask, num_cond_latents=1)[:, :, 1:] - out).abs().max() > 1e-4


def test_padded_text_is_ignored_without_zero_padding_and_counts_with_it():
    latents, timestep, text, mask = tiny_inputs(batch=2)
    mask[0, 3:] = 0
    other = text.clone()
    other[0, :, 3:] += 5
    for zero_pad in (True, False):
        model = tiny_dit(text_tokens_zero_pad=zero_pad)
        out = model(latents, timestep, text, mask)
        torch.testing.assert_close(model(latents, timestep, other, mask), out, atol=1e-6, rtol=0)
        short = model(latents[:1], timestep[:1], text[:1, :, :3], mask[:1, :3])
        assert ((short - out[:1]).abs().max() < 1e-5) == (not zero_pad)


def test_one_timestep_for_all_frames_equals_the_same_one_for_each():
    model = tiny_dit()
    latents, timestep, text, mask = tiny_inputs(batch=2)
    each = model(latents, timestep[:, None].expand(2, 3), text, mask)
    torch.testing.assert_close(model(latents, timestep, text, mask), each, atol=1e-6, rtol=0)


def test_a_single_latent_frame_uses_dense_attention():
    model = tiny_dit()
    inputs = tiny_inputs(frames=1)
    dense = model(*inputs)
    model.attention = "block_sparse"
    assert torch.equal(model(*inputs), dense)


def test_gradient_checkpointing_changes_no_gradient():
    model = tiny_dit()
    inputs = tiny_inputs()
    gradients = []
    for flag in (False, True):
        model.gradient_checkpointing = flag
        model.zero_grad()
        model(*inputs).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_gradients_flow_through_block_sparse_attention():
    chunk = (1, 1, 2)
    model = tiny_dit(
        bsa_params=BlockSparseConfig(sparsity=0.5, chunk_3d_shape_q=chunk, chunk_3d_shape_k=chunk)
    )
    model.attention = "block_sparse"
    model(*tiny_inputs()).square().mean().backward()
    assert model.get_parameter("blocks.0.attn.qkv.weight").grad.abs().min(dim=1).values.count_nonzero() > 90


def test_training_works_after_an_inference_mode_call():
    model = tiny_dit()
    inputs = tiny_inputs(frames=2)
    with torch.inference_mode():
        model(*inputs)
    model(*inputs).mean().backward()


def test_start_weights_predict_zero_and_learn():
    model = tiny_dit()
    model.init_weights()
    inputs = tiny_inputs()
    assert model(*inputs).abs().max() == 0
    target = torch.randn_like(inputs[0])
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = (model(*inputs) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_runs_in_bfloat16_close_to_fp32(cases, weights):
    model = build(weights).bfloat16()
    out = model(*(cases[f"dense.{name}"] for name in ("x", "t", "y", "mask")))
    assert out.dtype == torch.float32
    error = (out - cases["dense.out"]).square().mean().sqrt()
    assert 0 < error < 0.03 * cases["dense.out"].std()


def test_official_size_builds_on_the_meta_device_without_buffers():
    config = DiTConfig(hidden_size=4096, depth=48, num_heads=32, caption_channels=4096)
    with torch.device("meta"):
        model = DiT(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 13.5e9 < count < 13.7e9
    assert config.ffn_dim == 11008
    assert not list(model.buffers())


def sparse_dit() -> DiT:
    model = tiny_dit(bsa_params=BlockSparseConfig(sparsity=0.5))
    model.attention = "block_sparse"
    return model


def sparse_inputs(frames: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 16, frames, 8, 16, generator=generator)
    text = torch.randn(1, 1, 5, 8, generator=generator)
    return latents, torch.tensor([500.0]), text, torch.ones(1, 5, dtype=torch.long)


@pytest.mark.parametrize("zero_pad", [True, False])
@pytest.mark.parametrize("attention", ["dense", "block_sparse"])
@pytest.mark.parametrize("conditions", ["none", "in the sequence", "cached"])
def test_compiles_as_one_graph(attention, conditions, zero_pad):
    torch._dynamo.reset()
    model = tiny_dit(bsa_params=BlockSparseConfig(sparsity=0.5), text_tokens_zero_pad=zero_pad)
    model.attention = attention
    latents, timestep, text, mask = sparse_inputs(8)
    kwargs: dict[str, object] = {}
    if conditions == "in the sequence":
        timestep, kwargs = torch.tensor([[0.0] * 4 + [500.0] * 4]), {"num_cond_latents": 4}
    elif conditions == "cached":
        kwargs, latents = {"cond_cache": model.build_cond_cache(latents[:, :, :4])}, latents[:, :, 4:]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        wanted = model(latents, timestep, text, mask, **kwargs)
        out = compiled(latents, timestep, text, mask, **kwargs)
    torch.testing.assert_close(out, wanted, atol=2e-6, rtol=0)


def test_tokens_are_put_into_block_order_once(monkeypatch):
    made = []
    monkeypatch.setattr("model.dit.block_order", lambda *of: made.append(of) or block_order(*of))
    model = sparse_dit()
    repacked = []
    monkeypatch.setattr(
        "kernels.block_sparse_attention.reference.from_blocks", lambda *of: repacked.append(of)
    )
    model(*sparse_inputs(8))
    assert len(made) == 1
    assert not repacked


@pytest.mark.parametrize(("num_cond", "frames"), [(1, 2), (4, 5), (8, 9)])
def test_parts_that_do_not_divide_keep_their_order_and_all_tokens_their_place(num_cond, frames):
    """A single frame of noise, or of conditions, attends densely: with one block kept of all it is all dense."""
    model = tiny_dit(bsa_params=BlockSparseConfig(sparsity=0.0))
    inputs = sparse_inputs(frames)
    timestep = torch.tensor([[0.0] * num_cond + [500.0] * (frames - num_cond)])
    dense = model(inputs[0], timestep, *inputs[2:], num_cond_latents=num_cond)
    model.attention = "block_sparse"
    out = model(inputs[0], timestep, *inputs[2:], num_cond_latents=num_cond)
    torch.testing.assert_close(out, dense, atol=2e-6, rtol=0)
    cache = model.build_cond_cache(inputs[0][:, :, :num_cond])
    out = model(inputs[0][:, :, num_cond:], timestep[:, num_cond:], *inputs[2:], cond_cache=cache)
    torch.testing.assert_close(out, dense[:, :, num_cond:], atol=2e-6, rtol=0)


def test_no_logit_passes_the_bound_of_the_norms(monkeypatch):
    model = sparse_dit().requires_grad_(False)
    for block in model.blocks:
        for norm in (block.attn.q_norm, block.attn.k_norm):
            norm.weight.copy_(1 + torch.randn(16, generator=torch.Generator().manual_seed(3)))
    model.bound_logits()
    seen = []

    def look(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: float) -> torch.Tensor:
        seen.append((float((q @ k.transpose(-1, -2)).abs().max()) * 16**-0.5, options["logit_bound"]))
        return v

    monkeypatch.setattr("model.dit.attend_in_block_order", look)
    model(*sparse_inputs(8))
    assert len(seen) == 2
    monkeypatch.setattr("model.dit.attend", look)
    model.attention = "dense"
    model(*sparse_inputs(8))
    assert len(seen) == 4
    assert all(0.1 * bound < largest < bound for largest, bound in seen)
    assert DiT(TINY).blocks[0].attn.logit_bound is None  # nothing is promised of weights that nobody looked at


def test_requests_that_do_not_fit_are_refused():
    model = tiny_dit()
    latents, timestep, text, mask = tiny_inputs()
    with pytest.raises(InputError, match="3 channels"):
        model(latents[:, :3], timestep, text, mask)
    with pytest.raises(InputError, match="4x3"):
        model(latents[..., :3], timestep, text, mask)
    with pytest.raises(InputError, match="num_cond_latents: 4"):
        model(latents, timestep, text, mask, num_cond_latents=4)
    model.attention = "block_sparse"
    with pytest.raises(InputError, match=r"\(3, 2, 2\).*does not divide"):
        model(latents, timestep, text, mask)
    with pytest.raises(InputError, match="does not fit"):
        tiny_dit()(latents, timestep, text, mask, cond_cache=tiny_dit().build_cond_cache(latents[..., :2]))
    model.attention = "dense"
    cache = model.build_cond_cache(latents[:, :, :1])
    model.attention = "block_sparse"
    with pytest.raises(InputError, match="was made for dense"):
        model(latents[:, :, :1], timestep, text, mask, cond_cache=cache)


def test_configuration_ignores_unknown_keys_and_names_bad_ones():
    values = TINY.to_json() | {"_class_name": "X", "enable_flashattn2": True}
    assert DiTConfig.from_json(values) == TINY
    del values["depth"]
    values["num_heads"] = "two"
    with pytest.raises(CheckpointError) as caught:
        DiTConfig.from_json(values)
    assert caught.value.problems == ["depth: missing, wanted int", "num_heads: 'two' is not int"]
    with pytest.raises(CheckpointError, match="no multiple"):
        dataclasses.replace(TINY, num_heads=3)
    with pytest.raises(CheckpointError, match="must be the same"):
        BlockSparseConfig(chunk_3d_shape_k=(2, 4, 4))
