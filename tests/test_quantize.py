"""int8: golden layer, size of the rounding error, and a whole network from int8 files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.config import DiTConfig
from model.dit import DiT
from model.errors import CheckpointError, InputError
from model.lora import load_lora, merge_lora
from model.quantize import QuantLinear, choose_products_, quantize_, quantize_weight

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def cases() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "cases.safetensors")


@pytest.fixture
def dit() -> DiT:
    model = DiT(DiTConfig.from_json(GOLDEN / "dit_config.json"))
    model.load_state_dict(load_file(GOLDEN / "dit.safetensors"))
    return model


def test_quantising_gives_the_official_integers_and_scales(cases, dit):
    weight_int8, scale = quantize_weight(dit.get_parameter("blocks.0.attn.qkv.weight"))
    assert torch.equal(weight_int8, cases["int8.weight_int8"])
    torch.testing.assert_close(scale, cases["int8.weight_scale"], atol=0, rtol=1e-6)


def test_layer_matches_golden(cases, dit):
    bias = dit.get_parameter("blocks.0.attn.qkv.bias").detach().bfloat16()
    layer = QuantLinear(cases["int8.weight_int8"], cases["int8.weight_scale"], bias)
    assert (layer(cases["int8.x"]) - cases["int8.out"]).abs().max() < 5e-6


def test_rounding_error_is_at_most_half_a_step():
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    weight_int8, scale = quantize_weight(weight)
    assert weight_int8.abs().max() == 127
    assert ((weight_int8 * scale[:, None] - weight).abs() <= scale[:, None] * 0.501).all()


def test_every_linear_but_the_last_is_quantised(dit):
    quantize_(dit)
    linears = [path for path, module in dit.named_modules() if isinstance(module, torch.nn.Linear)]
    assert linears == ["final_layer.linear"]


def test_int8_files_fill_a_model_built_on_the_meta_device(cases, dit):
    quantize_(dit)
    with torch.device("meta"):
        empty = DiT(dit.config)
    quantize_(empty)
    empty.load_state_dict(dit.state_dict(), strict=True, assign=True)
    inputs = [cases[f"dense.{name}"] for name in ("x", "t", "y", "mask")]
    out = empty(*inputs)
    assert torch.equal(out, dit(*inputs))
    error = (out - cases["dense.out"]).square().mean().sqrt()
    assert 0 < error < 0.05 * cases["dense.out"].std()


def test_merging_a_lora_into_int8_weights_is_refused(dit):
    quantize_(dit)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.qkv: is a QuantLinear"):
        merge_lora(dit, load_lora(GOLDEN / "lora.safetensors"), 1.0)


@pytest.mark.parametrize("stored", ["float", "int8"])
@pytest.mark.parametrize("products", ["weight_only", "int8", "fp8"])
def test_large_linears_multiply_in_the_type_chosen(cases, dit, stored, products):
    if stored == "int8":
        quantize_(dit)
    if (stored, products) == ("int8", "fp8"):
        with pytest.raises(InputError, match="is a QuantLinear and cannot multiply in fp8"):
            choose_products_(dit, products)
        return
    choose_products_(dit, products)
    wanted = {"weight_only": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[products]
    names = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.proj", "ffn.w1", "ffn.w2", "ffn.w3")
    assert all(dit.get_submodule(f"blocks.1.{name}").activations == wanted for name in names)
    small = dit.get_submodule("blocks.1.adaLN_modulation.1")
    assert isinstance(small, QuantLinear if stored == "int8" or products == "weight_only" else torch.nn.Linear)
    assert isinstance(dit.get_submodule("final_layer.linear"), torch.nn.Linear)
    with torch.no_grad():
        out = dit(*(cases[f"dense.{name}"] for name in ("x", "t", "y", "mask")))
    error = (out - cases["dense.out"]).square().mean().sqrt() / cases["dense.out"].std()
    assert 0 < error < (0.12 if products == "fp8" else 0.05)


def test_activations_that_two_linears_share_are_quantised_once(cases, dit, monkeypatch):
    from kernels.linear import reference

    choose_products_(dit, "int8")
    shapes, plain = [], reference.quantise_rows
    monkeypatch.setattr(reference, "quantise_rows", lambda x, dtype: shapes.append(x.shape[-1]) or plain(x, dtype))
    with torch.no_grad():
        dit(*(cases[f"dense.{name}"] for name in ("x", "t", "y", "mask")))
    # In each layer: for qkv, proj, q_linear, proj, for w1 and w3 together, and for w2.
    assert len(shapes) == 2 * 6
