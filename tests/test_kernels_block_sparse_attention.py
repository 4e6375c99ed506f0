"""Block-sparse attention: golden outputs, and its meaning on small grids."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from kernels.block_sparse_attention import api, reference
from kernels.block_sparse_attention.api import block_sparse_attention

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    tensors = load_file(GOLDEN / "cases.safetensors")
    return {name: value for name, value in tensors.items() if name.startswith("bsa.")}


def random_qkv(tokens: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 2, tokens, 16, generator=generator) for _ in range(3))


@pytest.mark.parametrize(
    ("case", "sparsity", "cdf_threshold"),
    [("topk", 0.5, None), ("topk_high", 0.75, None), ("cdf", None, 0.35), ("cdf_topk", 0.75, 0.45)],
)
def test_matches_golden(golden, case, sparsity, cdf_threshold):
    grid = (8, 8, 8)
    q, k, v = (golden[f"bsa.{name}"] for name in "qkv")
    out = block_sparse_attention(q, k, v, grid, grid, sparsity=sparsity, cdf_threshold=cdf_threshold)
    assert (out - golden[f"bsa.{case}.out"]).abs().max() < 5e-6


def test_queries_may_cover_another_grid_than_keys(golden):
    q, k, v = (golden[f"bsa.{name}"] for name in "qkv")
    out = block_sparse_attention(q[:, :, :256], k, v, (4, 8, 8), (8, 8, 8), sparsity=0.5)
    assert (out - golden["bsa.cross_shape.out"]).abs().max() < 5e-6


def test_zero_sparsity_is_dense_attention():
    q, k, v = random_qkv(8 * 4 * 8)
    out = block_sparse_attention(q, k, v, (8, 4, 8), (8, 4, 8), sparsity=0.0)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=1e-6, rtol=0)


def test_equals_dense_attention_under_the_mask_of_kept_blocks():
    grid, chunk = (8, 8, 8), (4, 4, 4)
    q, k, v = random_qkv(512)
    coarse = [F.interpolate(x.view(4, 8, 8, 8, 16).permute(0, 4, 1, 2, 3), scale_factor=0.25) for x in (q, k)]
    q, k = (F.interpolate(x, scale_factor=4).permute(0, 2, 3, 4, 1).reshape(2, 2, 512, 16) for x in coarse)
    blocks = [reference.to_blocks(x, grid, chunk) for x in (q, k, v)]
    means = (reference.block_means(x) for x in blocks[:2])
    kept, valid = reference.choose_blocks(*means, sparsity=0.7, cdf_threshold=0.6)
    seen = torch.zeros(2, 2, 8, 8, dtype=torch.bool).scatter(-1, kept, valid)
    assert 1 <= int(seen.sum(-1).min()) < int(seen.sum(-1).max()) <= 8
    mask = seen.repeat_interleave(64, -1).repeat_interleave(64, -2)
    q_b, k_b, v_b = (x.flatten(2, 3) for x in blocks)
    wanted = F.scaled_dot_product_attention(q_b, k_b, v_b, attn_mask=mask).view(2, 2, 8, 64, 16)
    out = block_sparse_attention(q, k, v, grid, grid, sparsity=0.7, cdf_threshold=0.6)
    torch.testing.assert_close(out, reference.from_blocks(wanted, grid, chunk), atol=1e-6, rtol=0)


def test_keeps_at_least_one_block_where_the_share_rounds_to_none():
    q, k, v = random_qkv(128)
    out = block_sparse_attention(q, k, v, (4, 4, 8), (4, 4, 8), sparsity=0.9375)
    assert torch.isfinite(out).all()
    strict = block_sparse_attention(q, k, v, (4, 4, 8), (4, 4, 8), sparsity=None, cdf_threshold=0.0)
    torch.testing.assert_close(out, strict)


def test_blocks_round_trip():
    tokens = torch.randn(1, 2, 4 * 8 * 12, 3)
    blocks = reference.to_blocks(tokens, (4, 8, 12), (2, 4, 4))
    assert blocks.shape == (1, 2, 12, 32, 3)
    assert torch.equal(reference.from_blocks(blocks, (4, 8, 12), (2, 4, 4)), tokens)


def test_gathering_in_several_parts_changes_nothing(monkeypatch):
    q, k, v = random_qkv(512)
    whole = block_sparse_attention(q, k, v, (8, 8, 8), (8, 8, 8), sparsity=0.5)
    monkeypatch.setattr(reference, "_GATHER_BYTES", 1)
    torch.testing.assert_close(
        block_sparse_attention(q, k, v, (8, 8, 8), (8, 8, 8), sparsity=0.5), whole, atol=1e-6, rtol=0
    )


def test_gradients_reach_queries_keys_and_values():
    q, k, v = (x.double().requires_grad_() for x in random_qkv(64))
    grid, chunk = (4, 4, 4), (2, 2, 4)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return block_sparse_attention(q, k, v, grid, grid, sparsity=0.5, chunk_q=chunk, chunk_k=chunk)

    attend(q, k, v).square().sum().backward()
    direction = torch.randn(v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = {"q": q.detach(), "k": k.detach(), "v": v.detach()}
    for name, leaf in (("q", q), ("k", k), ("v", v)):
        up, down = (
            attend(**{**inputs, name: inputs[name] + sign * 1e-6 * direction}).square().sum()
            for sign in (1, -1)
        )
        assert float((up - down) / 2e-6) == pytest.approx(float((leaf.grad * direction).sum()), rel=1e-4)


def test_grid_that_does_not_divide_is_refused():
    q, k, v = random_qkv(6 * 4 * 4)
    with pytest.raises(ValueError, match=r"\(6, 4, 4\).*does not divide"):
        block_sparse_attention(q, k, v, (6, 4, 4), (6, 4, 4), sparsity=0.5)
    with pytest.raises(ValueError, match="do not fill"):
        block_sparse_attention(q, k, v, (4, 4, 4), (4, 4, 4), sparsity=0.5)
    with pytest.raises(ValueError, match="must be given"):
        block_sparse_attention(q, k, v, (6, 4, 4), (6, 4, 4), sparsity=None)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton for this system")
def test_what_a_hopper_card_runs():
    """The kernel in Gluon takes lists of one length, in bf16; the rest is said to be the Triton kernel's."""
    q = torch.empty(1, 2, 256, 128, dtype=torch.bfloat16, device="meta")
    assert api.backend(q, q, q) == "gluon"
    assert api.backend(q, q, q, cdf_threshold=0.9) == "triton_tma"
    assert api.backend(q, q, q, block_k=128) == api.backend(*[q.half()] * 3) == "triton_tma"
