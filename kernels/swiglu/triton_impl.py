"""silu(a) * b, computed in fp32 and rounded once, or quantised by rows. Rows may be slices of a wider product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import launch_options
from kernels.linear.triton_impl import quantise_row, row_quantisation

_ROWS, _COLUMNS = 1, 4096
OPTIONS = launch_options(warps=8, stages=1)
QUANTISED_OPTIONS = launch_options(warps=8, stages=1)


@triton.jit
def _gated(a, b, cols, real):
    gate = tl.load(a + cols, mask=real, other=0.0).to(tl.float32)
    value = tl.load(b + cols, mask=real, other=0.0).to(tl.float32)
    return gate / (1 + tl.exp(-gate)) * value


@triton.jit
def swiglu_kernel(
    a, b, out, a_row, b_row, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    """One program: COLUMNS values of each of ROWS rows, which are asked for at once; out is contiguous."""
    first, cols = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    real = (row < rows) & (cols < columns)[None, :]
    value = _gated(a + row * a_row, b + row * b_row, cols[None, :], real)
    tl.store(out + row * columns + cols[None, :], value.to(TYPE), mask=real)


@triton.jit
def swiglu_quantised_kernel(
    a, b, values, scales, a_row, b_row,
    C: tl.constexpr, WIDE: tl.constexpr, LARGEST: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """One program: one row, whose largest value must be known before the first is written."""
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    real = cols < C
    small, scale = quantise_row(_gated(a + row * a_row, b + row * b_row, cols, real), LARGEST, FP8)
    tl.store(values + row * C + cols, small, mask=real)
    tl.store(scales + row, scale)


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """a and b [..., C] whose leading dimensions can be flattened -> contiguous [..., C]."""
    flat_a, flat_b = a.flatten(0, -2), b.flatten(0, -2)
    rows, columns = flat_a.shape
    out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    swiglu_kernel[(triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))](
        flat_a, flat_b, out, flat_a.stride(0), flat_b.stride(0), rows, columns,
        ROWS=_ROWS, COLUMNS=_COLUMNS, TYPE=types[a.dtype], **OPTIONS,
    )  # fmt: skip
    return out


def swiglu_quantised(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """a and b [..., C] as above -> values [..., C] in `dtype` (int8 or fp8 e4m3), fp32 scale [...]."""
    flat_a, flat_b = a.flatten(0, -2), b.flatten(0, -2)
    rows, columns = flat_a.shape
    values = torch.empty(a.shape, dtype=dtype, device=a.device)
    scales = torch.empty(a.shape[:-1], dtype=torch.float32, device=a.device)
    swiglu_quantised_kernel[(rows,)](
        flat_a, flat_b, values, scales, flat_a.stride(0), flat_b.stride(0),
        C=columns, WIDE=triton.next_power_of_2(columns), **row_quantisation(dtype), **QUANTISED_OPTIONS,
    )  # fmt: skip
    return values, scales
