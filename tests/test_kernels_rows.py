"""norm_rope, modulate, swiglu and the quantised Linears without a GPU: what the public calls mean."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from kernels import bench
from kernels.block_sparse_attention import api as bsa
from kernels.linear import api as linear
from kernels.linear import reference as linear_reference
from kernels.modulate import api as modulate
from kernels.norm_rope import api as norm_rope
from kernels.norm_rope import reference as norm_rope_reference
from kernels.swiglu import api as swiglu
from model import dit as model

without_triton_skipped = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="there is no Triton for this system"
)


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_block_order_makes_each_block_a_run_of_tokens():
    grid = (4, 8, 12)
    order = bsa.block_order(grid)
    assert torch.equal(order.sort().values, torch.arange(384))
    t, h, w = order // 96, order % 96 // 12, order % 12
    block = (h // 4 * 3 + w // 4) + 6 * (t // 4)
    assert torch.equal(block, torch.arange(384) // 64)


def test_attention_in_block_order_is_that_in_token_order():
    grid = (4, 8, 8)
    q, k, v = (seeded(2, 2, 256, 16, seed=s) for s in range(3))
    order = bsa.block_order(grid)
    wanted = bsa.block_sparse_attention(q, k, v, grid, grid, sparsity=0.5)
    fused = torch.stack([x[:, :, order] for x in (q, k, v)]).permute(1, 3, 0, 2, 4).contiguous()
    out = bsa.attend_in_block_order(*fused.permute(2, 0, 3, 1, 4), sparsity=0.5)
    torch.testing.assert_close(out, wanted[:, :, order], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="do not divide"):
        bsa.attend_in_block_order(q[:, :, 1:], k, v, sparsity=0.5)
    with pytest.raises(ValueError, match="must be given"):
        bsa.attend_in_block_order(q, k, v, sparsity=None)


def test_norm_rope_in_any_token_order_is_norm_then_rotation():
    grid, size = (2, 4, 8), 16
    weight, x = 1 + seeded(size) / 10, seeded(2, 3, 64, size, seed=1)
    table = model.rotary_table(3, *grid, size, torch.device("cpu"))
    normed = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    even, odd, cos, sin = normed[..., ::2], normed[..., 1::2], *table.double().unbind(-1)
    wanted = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).float()
    out, means = norm_rope.norm_rope(x, weight, table)
    assert means is None
    torch.testing.assert_close(out, wanted, atol=2e-6, rtol=0)
    order = bsa.block_order(grid, (2, 4, 4))
    out, means = norm_rope.norm_rope(x[:, :, order], weight, table, index=order, block=32)
    torch.testing.assert_close(out, wanted[:, :, order], atol=2e-6, rtol=0)
    torch.testing.assert_close(means, out.unflatten(2, (2, 32)).mean(3))
    for bad in ({"block": 48}, {"index": order[:3]}):
        with pytest.raises(ValueError):
            norm_rope.norm_rope(x, weight, table, **bad)


def test_compiled_and_eager_rotation_agree():
    x, table = seeded(1, 2, 24, 8), model.rotary_table(0, 2, 3, 4, 8, torch.device("cpu"))
    compiled = torch.compile(norm_rope_reference.rotate, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, table), norm_rope_reference.rotate(x, table), atol=1e-6, rtol=0)


def test_modulation_and_gated_residual_in_any_token_order():
    x, update = seeded(2, 12, 8), seeded(2, 12, 8, seed=1)
    gate, shift, scale = seeded(2, 3, 24, seed=2).chunk(3, dim=-1)
    rows = torch.arange(12) // 4
    y = x.double() + gate.double()[:, rows] * update.double()
    normed = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    wanted = normed * (1 + scale.double()[:, rows]) + shift.double()[:, rows]
    close = {"atol": 2e-6, "rtol": 2e-6}
    torch.testing.assert_close(modulate.add_gated(x, gate, update), y.float(), **close)
    torch.testing.assert_close(modulate.modulate(y.float(), shift, scale), wanted.float(), **close)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    out = modulate.add_gated_modulate(x[:, order], gate, update[:, order], shift, scale, index=order // 4)
    torch.testing.assert_close(out, (y[:, order].float(), wanted[:, order].float()), **close)
    with pytest.raises(ValueError, match="give an index"):
        modulate.modulate(x[:, 1:], shift, scale)
    with pytest.raises(ValueError, match="does not fit"):
        modulate.modulate(x, shift[..., 1:], scale)


def test_norm_with_weight_and_bias_after_the_gated_residual():
    x, weight, bias, update = 3 + seeded(2, 5, 8), seeded(8, seed=1), seeded(8, seed=2), seeded(2, 5, 8, seed=3)
    gate = seeded(2, 1, 8, seed=4)
    y, out = modulate.add_gated_norm(x, gate, update, weight, bias)
    torch.testing.assert_close(y, x + gate * update)
    torch.testing.assert_close(out, F.layer_norm(x + gate * update, (8,), weight, bias, 1e-6))
    with pytest.raises(ValueError, match="do not fit"):
        modulate.add_gated_norm(x, gate, update, weight[1:], bias)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_rows_are_quantised_from_what_the_steps_give_in_fp32(dtype):
    x, update, row = seeded(2, 6, 8).bfloat16(), seeded(2, 6, 8, seed=1).bfloat16(), seeded(2, 1, 8, seed=2)
    y = modulate.add_gated(x, row, update)
    normed = modulate.modulate(y.float(), row, row)
    wanted = linear.quantise_rows(normed, dtype)
    summed, rows = modulate.add_gated_modulate(x, row, update, row, row, quantise=dtype)
    alone = modulate.modulate(y, row, row, quantise=dtype)
    assert torch.equal(summed, y)
    for got in (rows, alone):
        assert got.dtype == torch.bfloat16
        assert torch.equal(got.values.float(), wanted.values.float())
        assert torch.equal(got.scale, wanted.scale)
    gated = swiglu.swiglu_quantised(x, update, dtype)
    assert torch.equal(gated.scale, linear.quantise_rows(F.silu(x.float()) * update.float(), dtype).scale)
    weight = linear.quantise_rows(seeded(5, 8, seed=5), dtype)
    out = linear.linear_quantised(rows, weight.values, weight.scale)
    assert out.dtype == torch.bfloat16
    unfused = linear.linear_quantised(normed, weight.values, weight.scale)
    torch.testing.assert_close(out, unfused.bfloat16())


def test_gradients_pass_through_the_public_calls():
    x, gate, weight = (seeded(*s).double().requires_grad_() for s in ((1, 4, 6), (1, 2, 6), (6,)))

    def steps(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y, out = modulate.add_gated_modulate(x, gate, x.flip(1), gate, gate.flip(1))
        normed, _ = norm_rope.norm_rope(swiglu.swiglu(y, out)[:, None], weight, None)
        return normed

    assert torch.autograd.gradcheck(steps, (x, gate, weight))


def test_swiglu_refuses_halves_that_differ():
    with pytest.raises(ValueError, match="must agree"):
        swiglu.swiglu(seeded(2, 3), seeded(2, 4))


@pytest.mark.parametrize("kind", ["int8", "fp8", "weight_only"])
def test_quantised_linears_are_close_to_the_linear(kind):
    x, weight, bias = seeded(2, 3, 64), seeded(48, 64, seed=1), seeded(48, seed=2)
    quantised = linear.quantise_rows(weight, torch.float8_e4m3fn if kind == "fp8" else torch.int8)[:2]
    call = linear.linear_weight_only if kind == "weight_only" else linear.linear_quantised
    out, wanted = call(x, *quantised, bias), F.linear(x, weight, bias)
    assert out.shape == wanted.shape
    # fp8 has three bits of mantissa, int8 seven bits for each row.
    assert (out - wanted).norm() / wanted.norm() < (0.05 if kind == "fp8" else 0.015)
    with pytest.raises(ValueError, match="does not fit"):
        call(x[..., 1:], *quantised, bias)


def test_weight_only_expands_a_few_rows_at_a_time(monkeypatch):
    x, (weight, scale) = seeded(5, 64), linear_reference.quantise_rows(seeded(48, 64, seed=1), torch.int8)
    whole = linear.linear_weight_only(x, weight, scale)
    monkeypatch.setattr(linear_reference, "_EXPANDED_BYTES", 7 * 64 * 4)
    largest = []
    plain = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w: largest.append(w.shape[0]) or plain(x, w))
    torch.testing.assert_close(linear.linear_weight_only(x, weight, scale), whole)
    assert max(largest) == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_a_weight_expanded_in_parts_gives_the_product_with_the_whole(monkeypatch, dtype, biased):
    monkeypatch.setattr(linear_reference, "_EXPANDED_BYTES_CUDA", 7 * 64 * dtype.itemsize)
    x, (weight, scale) = seeded(50, 64).to(dtype), linear_reference.quantise_rows(seeded(48, 64, seed=1), torch.int8)
    bias = seeded(48, seed=2) if biased else None
    out = linear_reference.linear_expanded(x, weight, scale, bias)
    wanted = F.linear(x.double(), weight.double() * scale.double()[:, None], None if bias is None else bias.double())
    assert out.dtype == dtype
    assert ((out - wanted).norm() / wanted.norm()).item() < (1e-6 if dtype == torch.float32 else 4e-3)


def test_int8_sums_are_exact_where_fp32_would_round():
    x = (200 * seeded(8, 20_000)).round().clamp(-127, 127)
    x[:, 0] = 127
    weight = (200 * seeded(8, 20_000, seed=1)).round().clamp(-127, 127) + x
    weight = weight.clamp(-127, 127).to(torch.int8)
    out = linear.linear_quantised(x, weight, torch.ones(8))
    assert torch.equal(out, (x.double() @ weight.double().t()).float())


def test_benchmark_gives_no_speed_to_an_inexact_kernel(capsys):
    exact = seeded(64).double()
    eager, wrong = exact.bfloat16(), exact.bfloat16() * 1.05
    assert bench.compare(eager, eager, exact).admitted
    assert not bench.compare(eager * float("nan"), eager, exact).admitted
    accuracy = bench.compare(wrong, eager, exact)
    row = bench.bandwidth_row("copying", accuracy, lambda: pytest.fail("was timed"), 1, 1.0)
    assert row.result.startswith("refused")
    assert row.met is False


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it says without a GPU")
def test_benchmark_says_that_it_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["kernels.bench"])
    assert bench.main() == 2
    assert capsys.readouterr().err == "kernels.bench needs a CUDA GPU and found none: nothing was measured\n"


@without_triton_skipped
def test_benchmark_says_that_a_gpu_is_too_old_or_triton_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert bench.lacking() == "needs a GPU of compute capability 8.0 or more and found 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert bench.lacking() is None
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert bench.lacking() == "needs Triton, which is not installed"


@without_triton_skipped
def test_a_part_that_fails_costs_the_table_no_other_row_and_the_command_its_success(monkeypatch, capsys):
    def broken():
        yield bench.Row("first", "1 ms")
        raise RuntimeError("does not compile\nat line 3")

    monkeypatch.setattr(bench, "PARTS", {"broken": broken, "whole": lambda: iter([bench.Row("last", "2 ms")])})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(bench, "dense_attention", lambda device, dtype: "cudnn")
    assert bench.print_table("a command", bench.rows()) == 1
    head, *table = capsys.readouterr().out.splitlines()
    assert head.startswith("a card, torch ") and "dense attention: cudnn, " in head and head.endswith("`a command`")
    assert table[2:] == [
        "| first | 1 ms |  |  |",
        "| broken | failed: RuntimeError: does not compile |  | missed |",
        "| last | 2 ms |  |  |",
    ]
    assert bench.print_table("a command", bench.rows("whole")) == 0
