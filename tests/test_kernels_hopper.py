"""The kernels in Gluon, which no interpreter knows, on a card of compute capability 9.0: odd sizes, outputs poisoned,
twice the same bits. Speed is `python -m kernels.bench`'s matter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import api as dense
from kernels.bench import Accuracy, compare, poisoned
from kernels.block_sparse_attention import api as sparse
from kernels.dispatch import has_gluon
from kernels.linear import api as linear

if not (torch.cuda.is_available() and has_gluon(torch.cuda.get_device_capability())):
    pytest.skip("needs a GPU of compute capability 9.0", allow_module_level=True)
from kernels.block_sparse_attention import gluon_impl as hopper_sparse
from kernels.block_sparse_attention import triton_impl as triton_sparse
from kernels.linear import triton_impl as triton_linear


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").bfloat16()


def inputs(batch: int, heads: int, queries: int, keys: int, size: int, scale: float = 1.0) -> list[Tensor]:
    q = F.rms_norm(normal(batch, queries, heads, size), (size,)) * scale
    k = F.rms_norm(normal(batch, keys, heads, size, seed=1), (size,))
    return [x.transpose(1, 2) for x in (q, k, normal(batch, keys, 3, heads, size, seed=2)[:, :, 1])]


def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[3] ** -0.5
    return (scores if hidden is None else scores.masked_fill(hidden, -math.inf)).softmax(-1) @ v


def accuracy(out: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Accuracy:
    return compare(out, attend(q, k, v, hidden), attend(q.double(), k.double(), v.double(), hidden))


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(128, 128), (129, 255), (1000, 1337), (4096, 384), (200, 129)])
@pytest.mark.parametrize("bounded", [True, False])
def test_dense_attention(queries: int, keys: int, size: int, bounded: bool):
    q, k, v = inputs(2, 3, queries, keys, size)
    assert dense.backend(q, k, v) == "gluon"
    bound = 1.01 * size**0.5 if bounded else None
    with poisoned():
        out, again = (dense.attend(q, k, v, logit_bound=bound) for _ in range(2))
    assert torch.equal(out, again) and accuracy(out, q, k, v).admitted


def test_dense_attention_with_logits_of_hundreds():
    q, k, v = inputs(1, 2, 500, 700, 128, scale=30.0)
    assert accuracy(dense.attend(q, k, v), q, k, v).admitted


def test_dense_attention_reads_nothing_beyond_a_tensor_and_takes_rows_that_are_not_aligned():
    """Keys that end within a larger tensor whose rest is no number, and one that begins at an odd address."""
    q, k, v = inputs(1, 2, 300, 300, 128)
    wide = torch.full((3, 1, 2, 512, 128), math.nan, device="cuda", dtype=torch.bfloat16)
    for place, x in zip(wide, (q, k, v), strict=True):
        place[:, :, :300] = x
    out = dense.attend(*(x[:, :, :300] for x in wide))
    assert torch.equal(out, dense.attend(q, k, v))
    odd = torch.empty(q.numel() + 1, device="cuda", dtype=torch.bfloat16)[1:].view(q.shape).copy_(q)
    assert torch.equal(dense.attend(odd, k, v), out)


@pytest.mark.parametrize(("size", "sparsity"), list(itertools.product([64, 128], [0.0, 0.5, 0.9, 0.99])))
@pytest.mark.parametrize(("q_blocks", "k_blocks"), [(1, 1), (5, 9), (4, 24), (300, 41)])
@pytest.mark.parametrize("bounded", [True, False])
def test_block_sparse_attention(size: int, sparsity: float, q_blocks: int, k_blocks: int, bounded: bool):
    q, k, v = inputs(2, 3, 64 * q_blocks, 64 * k_blocks, size)
    assert sparse.backend(q, k, v) == "gluon"
    bound = 1.01 * size**0.5 if bounded else None
    with poisoned():
        out, again = (sparse.attend_in_block_order(q, k, v, sparsity=sparsity, logit_bound=bound) for _ in range(2))
    kept, _ = sparse._choose(q, k, None, None, sparse.reference.blocks_to_keep(k_blocks, sparsity), None, 64, 64)
    hidden = torch.ones(2, 3, q_blocks, k_blocks, dtype=torch.bool, device="cuda").scatter_(-1, kept.long(), False)
    hidden = hidden.repeat_interleave(64, 2).repeat_interleave(64, 3)
    assert torch.equal(out, again) and accuracy(out, q, k, v, hidden).admitted


def test_waiting_for_the_others_changes_no_bit_and_sums_are_those_of_the_triton_kernel(monkeypatch: pytest.MonkeyPatch):
    q, k, v = inputs(1, 3, 64 * 1200, 64 * 64, 128)
    means = triton_sparse.block_means(q, 64), triton_sparse.block_means(k, 64)
    kept, counts = triton_sparse.choose_blocks(*means, top=2, cdf_threshold=None)
    for bound in (11.5, None):
        out, sums = hopper_sparse.launch_forward(q, k, v, kept, counts, bound)
        with monkeypatch.context() as impatient:
            impatient.setattr(hopper_sparse, "PATIENCE", 0)
            again = hopper_sparse.launch_forward(q, k, v, kept, counts, bound)
        assert torch.equal(out, again[0]) and torch.equal(sums, again[1])
        _, wanted = triton_sparse.launch_forward(q, k, v, kept, counts, triton_sparse.Tiles(64, 64, True), bound)
        torch.testing.assert_close(sums, wanted, atol=1e-4, rtol=1e-5)


def test_a_single_head_and_a_single_pair_of_blocks():
    q, k, v = inputs(1, 1, 64, 128, 128)
    assert accuracy(sparse.attend_in_block_order(q, k, v, sparsity=0.0, logit_bound=11.5), q, k, v).admitted


@pytest.mark.parametrize("bound", [None, 11.5])
def test_operators_are_what_the_compiler_is_told(bound: float | None):
    """Types, shapes and strides of results, and no graph breaks."""
    q, k, v = inputs(1, 2, 256, 320, 128)
    torch.library.opcheck(torch.ops.longtake.attention, (q, k, v, bound), test_utils=("test_schema", "test_faketensor"))
    sparsely = (q, k, v, None, None, 2, None, 64, 64, bound)
    operator = torch.ops.longtake.block_sparse_attention
    torch.library.opcheck(operator, sparsely, test_utils=("test_schema", "test_faketensor"))
    weight, scale, _ = linear.quantise_rows(normal(264, 272), torch.int8)
    values, row_scale, _ = linear.quantise_rows(normal(130, 272), torch.int8)
    product = (values, row_scale, weight, scale, None, torch.bfloat16)
    torch.library.opcheck(torch.ops.longtake.multiply_int8, product, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda *x: dense.attend(*x, logit_bound=bound), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), dense.attend(q, k, v, logit_bound=bound))


def test_gradients_follow_the_forward_pass():
    exact = [x.double().requires_grad_() for x in inputs(1, 2, 640, 1280, 128)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    sparse.attend_in_block_order(*rounded, sparsity=0.8).double().square().sum().backward()
    kept, _ = sparse._choose(*rounded[:2], None, None, sparse.reference.blocks_to_keep(20, 0.8), None, 64, 64)
    hidden = torch.ones(1, 2, 10, 20, dtype=torch.bool, device="cuda").scatter_(-1, kept.long(), False)
    attend(*exact, hidden.repeat_interleave(64, 2).repeat_interleave(64, 3)).square().sum().backward()
    for x, y in zip(rounded, exact, strict=True):
        assert x.grad is not None and y.grad is not None
        assert (x.grad.double() - y.grad).norm() < 0.01 * y.grad.norm()


def test_int8_sums_are_the_integers_of_the_triton_kernel():
    weight, scale, _ = linear.quantise_rows(normal(1032, 4096, seed=1), torch.int8)
    x = linear.quantise_rows(normal(777, 4096), torch.int8)
    wanted = triton_linear.multiply_int8(x.values, x.scale, weight, scale, None, x.dtype, descriptors=True)
    assert torch.equal(linear.linear_quantised(x, weight, scale), wanted)
    alone = linear.QuantisedRows(x.values[::1000], x.scale[::1000], x.dtype)  # one row, of some stride
    assert torch.equal(linear.linear_quantised(alone, weight, scale), wanted[:1])


@pytest.mark.parametrize(("m", "k", "n"), [(1, 16, 8), (129, 272, 264), (1000, 4096, 776), (3000, 512, 12288)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
def test_int8_products_are_exact_up_to_the_last_rounding(m: int, k: int, n: int, dtype: torch.dtype, biased: bool):
    weight, scale, _ = linear.quantise_rows(normal(n, k, seed=1), torch.int8)
    x = linear.quantise_rows(normal(m, k).to(dtype), torch.int8)
    bias = normal(n, seed=2) if biased else None
    assert linear.backend(x, weight) == "gluon"
    with poisoned():
        out = linear.linear_quantised(x, weight, scale, bias)
    wanted = (x.values.double() @ weight.double().T) * x.scale.double()[:, None] * scale.double()
    wanted = wanted if bias is None else wanted + bias.double()
    torch.testing.assert_close(out.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-5 * float(wanted.abs().max()))
