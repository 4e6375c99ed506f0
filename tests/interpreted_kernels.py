"""Kernels in Triton's interpreter, against references in fp64. Run by tests/test_kernels_interpreted.py in a
process of its own with TRITON_INTERPRET=1, which must be set before Triton is first imported.

Types are fp32 and fp16: the interpreter is wrong for bf16. Outputs are poisoned: `torch.empty` is filled with
NaN (deterministic fill), so that what a kernel does not write is seen.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kernels.block_sparse_attention import api as bsa_api
from kernels.block_sparse_attention import triton_impl as bsa
from kernels.linear import api as linear_api
from kernels.linear import reference as linear_reference
from kernels.linear import triton_impl as linear
from kernels.modulate import api as modulate_api
from kernels.modulate import reference as modulate_reference
from kernels.modulate import triton_impl as modulate
from kernels.norm_rope import api as norm_rope_api
from kernels.norm_rope import reference as norm_rope_reference
from kernels.norm_rope import triton_impl as norm_rope
from kernels.swiglu import api as swiglu_api
from kernels.swiglu import reference as swiglu_reference
from kernels.swiglu import triton_impl as swiglu

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/test_kernels_interpreted.py"
torch.utils.deterministic.fill_uninitialized_memory = True
torch.use_deterministic_algorithms(True)

GOLDEN = Path(__file__).parent / "golden"


def seeded(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(out: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((out.double() - wanted).abs().max() / wanted.abs().max())


def test_memory_is_poisoned():
    assert torch.empty(1000).isnan().all()


# -- block-sparse attention -------------------------------------------------------------------------------


def lists(b: int, h: int, n_q: int, n_k: int, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ascending lists of 1..longest blocks; entries beyond a row's count are out of range."""
    generator = torch.Generator().manual_seed(7)
    counts = torch.randint(1, longest + 1, (b, h, n_q), generator=generator, dtype=torch.int32)
    kept = torch.rand(b, h, n_q, n_k, generator=generator).argsort(-1)
    past = torch.arange(n_k) >= counts[..., None]
    kept = kept.masked_fill(past, n_k + 10**6).sort(-1).values[..., :longest]
    return kept.int().contiguous(), counts


def attend(q, k, v, kept, counts, block_q: int, block_k: int, descriptors: bool, bound: float | None = None):
    """out and the natural logarithm of the sums of exponentials."""
    tiles = bsa.Tiles(block_q, block_k, descriptors)
    out, lse2 = bsa.launch_forward(q, k, v, kept, counts, tiles, bound)
    return out, lse2 * math.log(2)


def gradients(q, k, v, kept, counts, block_q: int, block_k: int, descriptors: bool, d_out):
    tiles = bsa.Tiles(block_q, block_k, descriptors)
    out, lse2 = bsa.launch_forward(q, k, v, kept, counts, tiles, None)
    return bsa.launch_backward(q, k, v, kept, counts, out, lse2, d_out, tiles)


def reference_attention(q, k, v, kept, counts, block_q: int, block_k: int):
    """fp64 out and lse over the listed blocks."""
    n_k = k.shape[2] // block_k
    real = torch.arange(kept.shape[-1]) < counts[..., None]
    seen = torch.zeros(*kept.shape[:3], n_k + 1, dtype=torch.bool)
    seen.scatter_(-1, torch.where(real, kept, n_k).long(), True)
    mask = seen[..., :n_k].repeat_interleave(block_q, 2).repeat_interleave(block_k, 3)
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def golden_tensors(*names: str) -> list[torch.Tensor]:
    with safe_open(GOLDEN / "cases.safetensors", "pt") as file:
        return [file.get_tensor(name) for name in names]


@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize(
    ("case", "sparsity", "cdf_threshold"),
    [
        ("topk", 0.5, None),
        ("topk_high", 0.75, None),
        ("cdf", None, 0.35),
        ("cdf_topk", 0.75, 0.45),
        ("cross_shape", 0.5, None),
    ],
)
def test_golden_block_sparse_attention(monkeypatch, case, sparsity, cdf_threshold, descriptors):
    monkeypatch.setattr(bsa_api, "has_descriptors", lambda x: descriptors)
    q, k, v, wanted = golden_tensors("bsa.q", "bsa.k", "bsa.v", f"bsa.{case}.out")
    grid_q = (4, 8, 8) if case == "cross_shape" else (8, 8, 8)
    q = q[:, :, : wanted.shape[2]]
    assert bsa_api.backend(q, k, v) == ("triton_tma" if descriptors else "triton")
    choice = {"sparsity": sparsity, "cdf_threshold": cdf_threshold}
    out = bsa_api.block_sparse_attention(q, k, v, grid_q, (8, 8, 8), **choice)
    assert (out - wanted).abs().max() < 5e-6


def test_gradients_of_the_public_call_are_those_of_the_reference(monkeypatch):
    q, k, v = (seeded(1, 2, n, 16, seed=s).requires_grad_() for s, n in enumerate((64, 128, 128)))
    weight = seeded(1, 2, 64, 16, seed=9)

    def loss() -> torch.Tensor:
        out = bsa_api.attend_in_block_order(q, k, v, sparsity=0.5, block_q=16, block_k=32)
        return (out * weight).sum()

    got = torch.autograd.grad(loss(), (q, k, v))
    compiled = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(), (q, k, v))
    monkeypatch.setattr(bsa_api, "takes_kernel", lambda *tensors: False)
    for one, same, other in zip(got, compiled, torch.autograd.grad(loss(), (q, k, v)), strict=True):
        assert relative_error(one, other.double()) < 3e-6
        assert torch.equal(one, same)


def test_operators_keep_their_promises_to_the_compiler():
    """Shapes, types and strides that are foretold are those that come, and no output is an input."""
    q, k, v = (seeded(1, 2, 64, 16, seed=s) for s in range(3))
    x, rows = seeded(2, 6, 8), [seeded(2, 3, 8, seed=s) for s in range(3)]
    weight, scale = linear_reference.quantise_rows(seeded(5, 8), torch.int8)
    checks = ("test_schema", "test_faketensor")
    for operator, arguments in (
        (bsa_api._attend, (q, k, v, None, None, 2, None, 16, 16, None)),
        (bsa_api._attend, (q, k, v, None, None, 1, 0.4, 16, 16, 9.0)),
        (norm_rope_api._norm_rope, (q, seeded(16), None, None, 1e-6, 16)),
        (norm_rope_api._norm_rope, (q, seeded(16), seeded(64, 8, 2), torch.arange(64), 1e-6, None)),
        (modulate_api._modulate, (x, rows[0], x.flip(0), rows[1], rows[2], None, 1e-6, False, None)),
        (modulate_api._modulate, (x, None, None, rows[1], rows[2], None, 1e-6, False, torch.int8)),
        (modulate_api._modulate, (x, rows[0], x.flip(0), seeded(8), seeded(8), None, 1e-6, True, None)),
        (modulate_api._modulate, (x, None, x.flip(0), None, None, None, 0.0, False, None)),
        (swiglu_api._swiglu, (x, x.flip(0))),
        (swiglu_api._swiglu_quantised, (x, x.flip(0), torch.int8)),
        (linear_api._quantise_rows, (x, torch.int8)),
        (linear_api._multiply_int8, (weight, scale, weight, scale, None, torch.float32)),
        (linear_api._weight_only, (x[0], weight, scale, None)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=checks)


# -- attention over lists -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize("bound", [None, 12.0])
def test_attention_over_listed_blocks(dtype, descriptors, bound):
    q, k, v = (seeded(2, 2, n, 32, dtype=dtype, seed=s) for s, n in enumerate((3 * 16, 5 * 32, 5 * 32)))
    kept, counts = lists(2, 2, 3, 5, 4)
    out, lse = attend(q, k, v, kept, counts, 16, 32, descriptors, bound)
    wanted, wanted_lse = reference_attention(q.double(), k.double(), v.double(), kept, counts, 16, 32)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-3
    assert relative_error(out, wanted) < tolerance
    assert relative_error(lse, wanted_lse) < tolerance


def test_attention_survives_logits_that_overflow_without_a_maximum():
    q, k, v = (seeded(1, 1, 32, 16, seed=s) for s in range(3))
    kept, counts = (
        torch.tensor([[[[0, 1], [0, 1]]]], dtype=torch.int32),
        torch.full((1, 1, 2), 2, dtype=torch.int32),
    )
    out, _ = attend(60 * q, k, v, kept, counts, 16, 16, False, bound=1e4)
    wanted, _ = reference_attention(60 * q.double(), k.double(), v.double(), kept, counts, 16, 16)
    assert relative_error(out, wanted) < 1e-4


@pytest.mark.parametrize(("size", "descriptors"), [(16, True), (24, False)])
def test_attention_reads_slices_of_a_fused_projection_in_place(size, descriptors):
    fused = seeded(2, 64, 3, 2, size)
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    assert bsa.row_view(v).tensor.data_ptr() == v.data_ptr()
    kept, counts = lists(2, 2, 4, 4, 3)
    out, _ = attend(q, k, v, kept, counts, 16, 16, descriptors)
    wanted, _ = reference_attention(q.double(), k.double(), v.double(), kept, counts, 16, 16)
    assert relative_error(out, wanted) < 2e-6
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("size", "descriptors"), [(16, True), (24, False)])
def test_gradients_of_attention(size, descriptors):
    q, k, v = (seeded(1, 2, n, size, seed=s) for s, n in enumerate((3 * 16, 4 * 32, 4 * 32)))
    kept, counts = lists(1, 2, 3, 4, 3)
    counts[0, 0] = 1  # some key blocks are seen by nobody
    weight = seeded(1, 2, 48, size, seed=9)
    got = gradients(q, k, v, kept, counts, 16, 32, descriptors, weight)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    wanted, _ = reference_attention(*exact, kept, counts, 16, 32)
    for one, other in zip(got, torch.autograd.grad((wanted * weight.double()).sum(), exact), strict=True):
        assert relative_error(one, other) < 3e-6


def test_gradient_that_is_one_number_everywhere():
    q, k, v = (seeded(1, 1, 32, 16, seed=s) for s in range(3))
    kept, counts = lists(1, 1, 2, 2, 2)
    got = gradients(q, k, v, kept, counts, 16, 16, True, torch.ones(()).expand(1, 1, 32, 16))[2]
    exact = v.double().requires_grad_()
    wanted, _ = reference_attention(q.double(), k.double(), exact, kept, counts, 16, 16)
    assert relative_error(got, torch.autograd.grad(wanted.sum(), exact)[0]) < 2e-6


def test_block_means():
    x = seeded(2, 48, 2, 24).transpose(1, 2)
    wanted = x.double().unflatten(2, (-1, 16)).mean(3)
    assert relative_error(bsa.block_means(x, 16), wanted) < 1e-6


@pytest.mark.parametrize(("n_q", "n_k", "top"), [(1, 1, 1), (17, 70, 5), (5, 130, 130)])
def test_top_blocks_are_chosen_in_ascending_order(n_q, n_k, top):
    q, k = seeded(1, 2, n_q, 24), seeded(1, 2, n_k, 24, seed=1)
    kept, counts = bsa.choose_blocks(q, k, top=top, cdf_threshold=None)
    wanted = (q.double() @ k.double().transpose(-1, -2)).topk(top, dim=-1).indices.sort(-1).values
    assert kept.dtype == torch.int32
    assert torch.equal(kept.long(), wanted)
    assert (counts == top).all()


def test_equal_scores_keep_exactly_the_wanted_number():
    q, k = torch.ones(1, 1, 3, 16), torch.ones(1, 1, 40, 16)
    kept, _ = bsa.choose_blocks(q, k, top=7, cdf_threshold=None)
    assert torch.equal(kept[0, 0], torch.arange(7, dtype=torch.int32).expand(3, 7))
    kept, counts = bsa.choose_blocks(q, k, top=1, cdf_threshold=0.26)
    assert (counts == 10).all()
    assert torch.equal(kept[0, 0], torch.arange(10, dtype=torch.int32).expand(3, 10))


@pytest.mark.parametrize(("top", "threshold"), [(1, 0.5), (6, 0.3), (1, 0.0), (1, 1.5)])
def test_blocks_by_cumulative_mass(top, threshold):
    q, k = 2 * seeded(1, 2, 9, 16), seeded(1, 2, 37, 16, seed=1)
    kept, counts = bsa.choose_blocks(q, k, top=top, cdf_threshold=threshold)
    mass, order = (q.double() @ k.double().transpose(-1, -2) / 4).softmax(-1).sort(-1, descending=True)
    wanted = (mass.cumsum(-1) <= threshold).sum(-1).clamp(min=top)
    assert torch.equal(counts.long(), wanted)
    for row, count, best in zip(
        kept.view(-1, kept.shape[-1]), wanted.flatten(), order.view(-1, 37), strict=True
    ):
        assert torch.equal(row[:count].long(), best[:count].sort().values)


def test_transposed_lists_name_each_pair_once():
    kept, counts = lists(2, 2, 5, 6, 4)
    queries, starts = bsa.transpose_lists(kept, counts, 6)
    for head in range(4):
        near, length = kept.view(4, 5, 4)[head], counts.view(4, 5)[head]
        wanted = sorted((int(near[i, j]), i) for i in range(5) for j in range(int(length[i])))
        got = [
            (key, int(queries[head, p]))
            for key in range(6)
            for p in range(starts[head, key], starts[head, key + 1])
        ]
        assert got == wanted


def test_descriptors_are_refused_where_rows_do_not_fit():
    assert bsa.fits_descriptors(seeded(1, 2, 16, 64))
    assert not bsa.fits_descriptors(seeded(1, 2, 16, 48))
    assert not bsa.fits_descriptors(seeded(1, 16, 2 * 64 + 1)[..., 1:].unflatten(-1, (2, 64)).transpose(1, 2))
    assert bsa_api.backend(*(seeded(1, 2, 64, 48),) * 3) == "triton"
    assert bsa_api.backend(*(seeded(1, 2, 64, 64).bfloat16(),) * 3) == "reference"  # wrong in the interpreter
    assert bsa_api.backend(*(seeded(1, 2, 64, 64),) * 3, block_q=8) == "reference"


# -- norm_rope, modulate, swiglu --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("size", "block"), [(32, 16), (24, None)])
def test_norm_and_rotary_with_an_index_of_positions(dtype, size, block):
    tokens = 48 if block else 37
    x = seeded(2, tokens, 3, 9, size, dtype=dtype)[:, :, 1].transpose(1, 2)
    weight = 1 + 0.1 * seeded(size, seed=1)
    angles = seeded(50, size // 2, seed=2)
    table = torch.stack((angles.cos(), angles.sin()), -1)
    index = torch.randperm(50, generator=torch.Generator().manual_seed(3))[:tokens].int()
    out, means = norm_rope.norm_rope(x, weight, table, index, 1e-6, block)
    wanted = norm_rope_reference.norm_rope(x.double(), weight.double(), table.double(), index, 1e-6)
    assert relative_error(out, wanted) < (1e-6 if dtype == torch.float32 else 2e-3)
    if block:
        assert relative_error(means, norm_rope_reference.block_means(out.double(), block)) < 1e-6


def test_norm_and_rotary_without_index_and_norm_without_rotary():
    x, weight = seeded(1, 2, 19, 16), 1 + 0.1 * seeded(16, seed=1)
    angles = seeded(19, 8, seed=2)
    table = torch.stack((angles.cos(), angles.sin()), -1)
    for rows in (table, None):
        out, means = norm_rope.norm_rope(x, weight, rows, None, 1e-6, None)
        exact = None if rows is None else rows.double()
        wanted = norm_rope_reference.norm_rope(x.double(), weight.double(), exact, None, 1e-6)
        assert means is None
        assert relative_error(out, wanted) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_gated_residual_and_modulation(dtype, indexed, gated):
    b, n, c, frames = 2, 12, 72, 3
    x = 5 + seeded(b, n, 2 * c, dtype=dtype)[..., c:]
    update = seeded(b, n, c, dtype=dtype, seed=1)
    gate, shift, scale = (seeded(b, frames, 4 * c, seed=2)[..., i * c : (i + 1) * c] for i in range(3))
    index = torch.randint(0, frames, (n,), generator=torch.Generator().manual_seed(3)) if indexed else None
    gate = gate if gated else None
    y, out, _ = modulate.launch(x, gate, update, shift, scale, index, 1e-6)
    exact_gate = torch.ones(b, 1, c).double() if gate is None else gate.double()
    wanted_y = modulate_reference.add_gated(x.double(), exact_gate, update.double(), index if gated else None)
    wanted = modulate_reference.modulate(y.double(), shift.double(), scale.double(), index, 1e-6)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3
    assert relative_error(y, wanted_y) < tolerance
    assert relative_error(out, wanted) < tolerance
    _, alone, _ = modulate.launch(y, None, None, shift, scale, index, 1e-6)
    assert torch.equal(alone, out)
    only, nothing, _ = modulate.launch(x, gate, update, None, None, index, 0.0)
    assert torch.equal(only, y)
    assert nothing is None


def test_layer_norm_keeps_its_digits_beside_a_large_mean():
    x = 1000 + seeded(1, 2, 100)
    zero = torch.zeros(1, 1, 100)
    _, out, _ = modulate.launch(x, None, None, zero, zero, None, 1e-6)
    assert (
        relative_error(out, modulate_reference.modulate(x.double(), zero.double(), zero.double(), None, 1e-6))
        < 1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_swiglu_of_halves_of_one_product(dtype):
    both = 4 * seeded(2, 3, 2 * 2100, dtype=dtype)
    a, b = both.chunk(2, dim=-1)
    wanted = swiglu_reference.swiglu(a.double(), b.double())
    assert relative_error(swiglu.swiglu(a, b), wanted) < (1e-6 if dtype == torch.float32 else 1e-3)


def test_gated_residual_and_norm_with_weight_and_bias():
    x, update, gate = 3 + seeded(2, 7, 40), seeded(2, 7, 40, seed=1), seeded(2, 1, 80, seed=2)[..., 40:]
    weight, bias = seeded(40, seed=3).half(), seeded(40, seed=4).half()
    y, out = modulate_api.add_gated_norm(x, gate, update, weight, bias)
    wanted_y = x.double() + gate.double() * update.double()
    assert relative_error(y, wanted_y) < 1e-6
    assert relative_error(out, modulate_reference.layer_norm(y.double(), weight, bias, 1e-6)) < 1e-6


def assert_rows(values: torch.Tensor, scale: torch.Tensor, wanted: torch.Tensor) -> None:
    """int8 rows stand for `wanted` (fp64) as closely as they can."""
    exact = wanted.abs().amax(-1) / 127
    assert relative_error(scale, torch.where(exact > 0, exact, 1.0)) < 1e-5
    assert ((values.double() * scale.double()[..., None] - wanted).abs() <= 0.501 * scale[..., None] + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_quantised_as_they_are_made(dtype):
    b, n, c = 2, 12, 72
    x, update = 5 + seeded(b, n, c, dtype=dtype), seeded(b, n, c, dtype=dtype, seed=1)
    gate, shift, scale = seeded(b, 3, 3 * c, seed=2).chunk(3, dim=-1)
    index = torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(3))
    kwargs = {"index": index, "quantise": torch.int8}
    y, rows = modulate_api.add_gated_modulate(x, gate, update, shift, scale, **kwargs)
    wanted = modulate_reference.modulate(y.double(), shift.double(), scale.double(), index, 1e-6)
    assert rows.dtype == dtype
    assert_rows(rows.values, rows.scale, wanted)
    alone = modulate_api.modulate(y, shift, scale, **kwargs)
    assert torch.equal(alone.values, rows.values)
    weight, bias = seeded(c, seed=4), seeded(c, seed=5)
    y, rows = modulate_api.add_gated_norm(x, gate, update, weight, bias, **kwargs)
    assert_rows(rows.values, rows.scale, modulate_reference.layer_norm(y.double(), weight, bias, 1e-6))
    a, other = 4 * seeded(3, 2 * 2100, dtype=dtype).view(1, 3, -1).chunk(2, dim=-1)[0], seeded(1, 3, 2100).to(dtype)
    a[0, 1] = 0
    rows = swiglu_api.swiglu_quantised(a, other, torch.int8)
    assert_rows(rows.values, rows.scale, swiglu_reference.swiglu(a.double(), other.double()))


def test_fp8_rows_are_those_of_the_reference_but_where_the_interpreter_is_wrong():
    x = seeded(5, 70)
    (values, scale), (wanted, wanted_scale) = (
        module.quantise_rows(x, torch.float8_e4m3fn) for module in (linear, linear_reference)
    )
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-6, atol=0)
    # It forgets the carry where rounding reaches a power of two; the public calls take the reference there.
    sure = wanted.float().frexp().mantissa.abs() != 0.5
    assert sure.float().mean() > 0.7
    assert torch.equal(values.float()[sure], wanted.float()[sure])
    assert torch.equal(linear_api.quantise_rows(x, torch.float8_e4m3fn).values.float(), wanted.float())


# -- linear -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_quantised_as_in_the_reference(dtype):
    x = seeded(5, 2 * 70, dtype=dtype)[:, 70:].clone(memory_format=torch.preserve_format)
    x[2] = 0
    values, scales = linear.quantise_rows(x, torch.int8)
    wanted, wanted_scales = linear_reference.quantise_rows(x, torch.int8)
    torch.testing.assert_close(scales, wanted_scales, rtol=1e-6, atol=0)
    # A value beside a half may round either way where the quotient differs in its last bit.
    assert (values.int() - wanted.int()).abs().max() <= 1
    assert (values != wanted).float().mean() < 0.01
    assert int(values.abs().max()) == 127


@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize(("m", "n", "k", "bias"), [(37, 40, 80, True), (130, 130, 72, False)])
def test_int8_product_is_exact_before_scaling(m, n, k, bias, descriptors):
    x, (weight, scale) = seeded(m, k), linear_reference.quantise_rows(seeded(n, k, seed=1), torch.int8)
    offset = seeded(n, seed=2) if bias else None
    values, x_scale = linear.quantise_rows(x, torch.int8)
    out = linear.multiply_int8(values, x_scale, weight, scale, offset, x.dtype, descriptors=descriptors)
    wanted = values.double() @ weight.double().t() * x_scale.double()[:, None] * scale.double()
    assert relative_error(out, wanted + (0 if offset is None else offset.double())) < 1e-6
    full = x.double() @ (weight.double() * scale.double()[:, None]).t()
    assert relative_error(out, full + (0 if offset is None else offset.double())) < 0.02


def test_a_weight_is_read_in_int8_for_few_rows_and_expanded_for_many(monkeypatch):
    weight, scale = linear_reference.quantise_rows(seeded(40, 32, seed=1), torch.int8)
    monkeypatch.setattr(linear_api, "MANY_ROWS", 64)
    expanded, expand = [], linear_reference.linear_expanded
    monkeypatch.setattr(linear_reference, "linear_expanded", lambda *a: expanded.append(a[0].shape) or expand(*a))
    for rows, runs in ((linear_api.MANY_ROWS // 2 - 1, "triton_tma"), (linear_api.MANY_ROWS // 2, "expanded")):
        x = seeded(2, rows, 32)
        assert linear_api.backend(x, weight) == runs
        wanted = x.double() @ (weight.double() * scale.double()[:, None]).t()
        assert relative_error(linear_api.linear_weight_only(x, weight, scale), wanted) < 2e-6
    assert expanded == [(linear_api.MANY_ROWS, 32)]
    assert linear_api.backend(linear_api.quantise_rows(x, torch.int8), weight) == "triton_tma"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize(("m", "n", "k", "bias"), [(37, 40, 80, True), (130, 130, 72, False)])
def test_weight_only_product(m, n, k, bias, descriptors, dtype):
    x = seeded(m, k, dtype=dtype)
    weight, scale = linear_reference.quantise_rows(seeded(n, k, seed=1), torch.int8)
    offset = seeded(n, seed=2).to(torch.bfloat16) if bias else None
    out = linear.linear_weight_only(x, weight, scale, offset, descriptors=descriptors)
    wanted = x.double() @ (weight.double() * scale.double()[:, None]).t()
    wanted = wanted + (0 if offset is None else offset.double())
    assert relative_error(out, wanted) < (2e-6 if dtype == torch.float32 else 1e-3)
