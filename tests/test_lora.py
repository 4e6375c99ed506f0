"""LoRA files: golden result, both layouts, bad files, and adapters that train and are written in the same
format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import DiTConfig
from model.dit import DiT
from model.errors import CheckpointError
from model.lora import attach_trainable_lora, detach_trainable_lora, load_lora, merge_lora, save_lora

GOLDEN = Path(__file__).parent / "golden"
TARGETS = ["attn.qkv", "cross_attn.kv_linear", "ffn.w1", "adaLN_modulation.1", "final_layer.linear"]


@pytest.fixture(scope="module")
def cases() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "cases.safetensors")


@pytest.fixture
def dit() -> DiT:
    model = DiT(DiTConfig.from_json(GOLDEN / "dit_config.json"))
    model.load_state_dict(load_file(GOLDEN / "dit.safetensors"))
    return model


def forward(model: DiT, cases: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(*(cases[f"dense.{name}"] for name in ("x", "t", "y", "mask")))


def test_merged_lora_matches_golden(cases, dit):
    merge_lora(dit, load_lora(GOLDEN / "lora.safetensors"), 1.0)
    assert (forward(dit, cases) - cases["lora.out"]).abs().max() < 5e-6


def test_strength_scales_the_change_of_the_weights(dit):
    lora = load_lora(GOLDEN / "lora.safetensors")
    before = dit.get_parameter("blocks.1.attn.qkv.weight").detach().clone()
    merge_lora(dit, lora, 0.25)
    change = dit.get_parameter("blocks.1.attn.qkv.weight").detach() - before
    torch.testing.assert_close(change, 0.25 * lora.layers["blocks.1.attn.qkv"].delta(), atol=1e-6, rtol=0)


def test_split_file_equals_its_plain_form():
    split = load_lora(GOLDEN / "lora.safetensors").layers["blocks.0.attn.qkv"]
    downs = split.down.chunk(3)
    whole = torch.cat([up @ down for up, down in zip(split.ups, downs, strict=True)])
    torch.testing.assert_close(split.delta(), 0.5 * whole)
    assert split.shape == (384, 128)


def test_adapters_start_as_the_model_itself_and_only_they_train(cases, dit):
    wanted = forward(dit, cases)
    added = attach_trainable_lora(dit, TARGETS, rank=4, alpha=2)
    assert torch.equal(forward(dit, cases), wanted)
    assert {id(p) for p in dit.parameters() if p.requires_grad} == {id(p) for p in added}
    dit(*(cases[f"dense.{name}"] for name in ("x", "t", "y", "mask"))).square().mean().backward()
    assert all(parameter.grad is not None for parameter in added)


def test_trained_adapters_are_saved_and_merged_with_the_same_result(cases, dit, tmp_path):
    base = forward(dit, cases)
    added = attach_trainable_lora(dit, TARGETS, rank=4, alpha=2)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in added:
            parameter.add_(0.05 * torch.randn_like(parameter))
    adapted = forward(dit, cases)
    save_lora(dit, tmp_path / "own.safetensors")
    detach_trainable_lora(dit)
    assert torch.equal(forward(dit, cases), base)
    lora = load_lora(tmp_path / "own.safetensors")
    assert len(lora.layers["blocks.0.attn.qkv"].ups) == 3
    assert len(lora.layers["blocks.0.ffn.w1"].ups) == 1
    merge_lora(dit, lora, 1.0)
    assert (adapted - base).abs().max() > 1e-2
    torch.testing.assert_close(forward(dit, cases), adapted, atol=2e-5, rtol=0)


def test_written_keys_are_those_of_the_official_files(dit, tmp_path):
    official = load_file(GOLDEN / "lora.safetensors")
    attach_trainable_lora(dit, ["attn.qkv", "final_layer.linear"], rank=8, alpha=4)
    save_lora(dit, tmp_path / "own.safetensors", dtype=torch.bfloat16)
    written = load_file(tmp_path / "own.safetensors")
    assert written
    for key, value in written.items():
        assert value.shape == official[key].shape, key


def test_target_that_matches_nothing_is_refused(dit):
    with pytest.raises(ValueError, match=r"attn\.nothing"):
        attach_trainable_lora(dit, ["attn.qkv", "attn.nothing"], rank=4, alpha=2)


def test_lora_for_another_model_changes_nothing_and_names_every_layer(dit):
    small = DiT(DiTConfig(hidden_size=64, depth=1, num_heads=1, caption_channels=8, adaln_tembed_dim=16))
    before = {name: value.clone() for name, value in small.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        merge_lora(small, load_lora(GOLDEN / "lora.safetensors"), 1.0)
    text = "\n".join(caught.value.problems)
    assert "blocks.1.attn.qkv: no such layer" in text
    assert "blocks.0.attn.qkv: weight is (192, 64), the LoRA is for (384, 128)" in text
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


def test_broken_files_are_named(tmp_path):
    official = load_file(GOLDEN / "lora.safetensors")
    key = next(key for key in official if key.endswith("lora_up.blocks.1.weight"))
    save_file(
        {**{k: v for k, v in official.items() if k != key}, "stray": torch.zeros(1)},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(CheckpointError) as caught:
        load_lora(tmp_path / "a.safetensors")
    assert caught.value.problems[0] == "stray: is not a LoRA key"
    assert "wanted either lora_up.weight or lora_up.blocks" in caught.value.problems[1]
    (tmp_path / "b.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        load_lora(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        load_lora(tmp_path / "missing.safetensors")
