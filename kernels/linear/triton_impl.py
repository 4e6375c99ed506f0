"""Quantisation of rows, and products with int8 weights, in Triton.

Legend: x [M,K], weight [N,K], both with K innermost. `quantised_kernel` multiplies int8 with int8 in int32;
`weight_only_kernel` widens the int8 tile in registers and multiplies in the type of x, so that the wide
weight never exists in memory. Scales and bias are applied to the accumulator.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.dispatch import capability, launch_options
from kernels.linear.reference import LARGEST_FP8, LARGEST_INT8

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

# Tiles (rows of x, outputs, inputs) and launch options; the larger ones need Hopper's shared memory. On compute
# capability 10 the largest of them spills.
Config = tuple[dict[str, int], dict[str, int]]
QUANTISED_TMA: Config = ({"BM": 128, "BN": 256, "BK": 128}, launch_options(warps=8, stages=3))
QUANTISED_TMA_10: Config = ({"BM": 128, "BN": 128, "BK": 128}, launch_options(warps=8, stages=3))
QUANTISED: Config = ({"BM": 128, "BN": 128, "BK": 64}, launch_options(warps=8, stages=3))
WEIGHT_ONLY_TMA: Config = ({"BM": 128, "BN": 128, "BK": 64}, launch_options(warps=8, stages=3))
WEIGHT_ONLY: Config = ({"BM": 128, "BN": 128, "BK": 32}, launch_options(warps=8, stages=3))
_GROUP = 8
ROW_OPTIONS = launch_options(warps=8, stages=1)


@triton.jit
def quantise_row(value, LARGEST: tl.constexpr, FP8: tl.constexpr):
    """A row of fp32 values, zero where it is padding -> its values as int8 or fp8, and its scale max|x| / LARGEST."""
    scale = tl.max(tl.abs(value), 0) / LARGEST
    scale = tl.where(scale > 0, scale, 1.0)
    value = tl.minimum(tl.maximum(value / scale, -LARGEST), LARGEST)
    if FP8:
        small = value.to(tl.float8e4nv)
    else:
        # Adding 1.5 * 2^23 leaves no bits for a fraction: the hardware rounds half to even.
        small = ((value + 12582912.0) - 12582912.0).to(tl.int8)
    return small, scale


@triton.jit
def quantise_kernel(
    x, values, scales, x_row, K: tl.constexpr, WIDE: tl.constexpr, LARGEST: tl.constexpr, FP8: tl.constexpr
):  # fmt: skip
    """One row: scale = max|x| / LARGEST, values = round(x / scale) (half to even)."""
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    real = cols < K
    value = tl.load(x + row * x_row + cols, mask=real, other=0.0).to(tl.float32)
    small, scale = quantise_row(value, LARGEST, FP8)
    tl.store(values + row * K + cols, small, mask=real)
    tl.store(scales + row, scale)


@triton.jit
def _place(program, m_tiles, n_tiles, GROUP: tl.constexpr):
    """Tile (m, n) of a program: GROUP rows of tiles at a time, so that neighbours share weights in cache."""
    span = GROUP * n_tiles
    first = program // span * GROUP
    height = tl.minimum(m_tiles - first, GROUP)
    return first + program % span % height, program % span // height


@triton.jit
def _load_tile(
    source, row, col, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """Tile [ROWS,COLS] of a contiguous [rows,cols]; zero outside."""
    if TMA:
        tile = source.load([row, col])
    else:
        r, c = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
        at = source + r.to(tl.int64)[:, None] * cols + c[None, :]
        tile = tl.load(at, mask=(r < rows)[:, None] & (c < cols)[None, :], other=0)
    return tile


@triton.jit
def quantised_kernel(
    x, weight, x_scale, weight_scale, bias, out, m, n, k,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr,
    TMA: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """out [M,N] = (x @ weight^T) * x_scale[:, None] * weight_scale + bias, sums in int32."""
    m_tile, n_tile = _place(tl.program_id(0), tl.cdiv(m, BM), tl.cdiv(n, BN), GROUP)
    acc = tl.zeros([BM, BN], tl.int32)
    for start in range(0, k, BK):
        x_tile = _load_tile(x, m_tile * BM, start, m, k, BM, BK, TMA)
        w_tile = _load_tile(weight, n_tile * BN, start, n, k, BN, BK, TMA)
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, out_dtype=tl.int32)
    rows, cols = m_tile * BM + tl.arange(0, BM), n_tile * BN + tl.arange(0, BN)
    rs = tl.load(x_scale + rows, mask=rows < m, other=0.0)
    cs = tl.load(weight_scale + cols, mask=cols < n, other=0.0)
    result = acc.to(tl.float32) * rs[:, None] * cs[None, :]
    if BIAS:
        result += tl.load(bias + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    there = out + rows.to(tl.int64)[:, None] * n + cols[None, :]
    tl.store(there, result.to(TYPE), mask=(rows < m)[:, None] & (cols < n)[None, :])


@triton.jit
def weight_only_kernel(
    x, weight, weight_scale, bias, out, m, n, k,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr,
    TMA: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """out [M,N] = (x @ weight^T) * weight_scale + bias.

    The product is made transposed: the widened weight is the operand that may come from registers.
    """
    m_tile, n_tile = _place(tl.program_id(0), tl.cdiv(m, BM), tl.cdiv(n, BN), GROUP)
    acc = tl.zeros([BN, BM], tl.float32)
    for start in range(0, k, BK):
        w_tile = _load_tile(weight, n_tile * BN, start, n, k, BN, BK, TMA)
        x_tile = _load_tile(x, m_tile * BM, start, m, k, BM, BK, TMA)
        acc = tl.dot(w_tile.to(TYPE), tl.trans(x_tile), acc, input_precision="ieee")
    rows, cols = m_tile * BM + tl.arange(0, BM), n_tile * BN + tl.arange(0, BN)
    result = acc * tl.load(weight_scale + cols, mask=cols < n, other=0.0)[:, None]
    if BIAS:
        result += tl.load(bias + cols, mask=cols < n, other=0.0).to(tl.float32)[:, None]
    there = out + rows.to(tl.int64)[:, None] * n + cols[None, :]
    tl.store(there, tl.trans(result.to(TYPE)), mask=(rows < m)[:, None] & (cols < n)[None, :])


def row_quantisation(dtype: torch.dtype) -> dict[str, Any]:
    """Constants of `quantise_row` for values of `dtype`, int8 or fp8 e4m3."""
    fp8 = dtype == torch.float8_e4m3fn
    return {"LARGEST": LARGEST_FP8 if fp8 else LARGEST_INT8, "FP8": fp8}


def quantise_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `reference.quantise_rows`, in one pass; x [M,K] with K innermost."""
    m, k = x.shape
    values = torch.empty(m, k, dtype=dtype, device=x.device)
    scales = torch.empty(m, dtype=torch.float32, device=x.device)
    quantise_kernel[(m,)](
        x, values, scales, x.stride(0), K=k, WIDE=triton.next_power_of_2(k), **row_quantisation(dtype), **ROW_OPTIONS
    )
    return values, scales


def fits_descriptors(x: Tensor, weight: Tensor) -> bool:
    """TMA wants 16-byte aligned bases and rows."""
    return all(t.data_ptr() % 16 == 0 and t.shape[1] * t.element_size() % 16 == 0 for t in (x, weight))


def multiply_int8(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype,
    *, descriptors: bool,
) -> Tensor:  # fmt: skip
    """int8 values [M,K] with scale [M], int8 weight [N,K] with scale [N], bias [N] -> [M,N] in `dtype`."""
    values = values.contiguous()
    descriptors = descriptors and fits_descriptors(values, weight)
    large = QUANTISED_TMA_10 if capability(values)[0] == 10 else QUANTISED_TMA
    tensors = (scale, weight_scale.float(), bias)
    config = large if descriptors else QUANTISED
    return _launch(quantised_kernel, values, weight, tensors, dtype, config, descriptors)


def linear_weight_only(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, *, descriptors: bool
) -> Tensor:
    """x [M,K], int8 weight [N,K], scale [N], bias [N] -> [M,N] in the type of x."""
    x = x.contiguous()
    config = WEIGHT_ONLY_TMA if descriptors and fits_descriptors(x, weight) else WEIGHT_ONLY
    tensors = (weight_scale.float(), bias)
    return _launch(weight_only_kernel, x, weight, tensors, x.dtype, config, config is WEIGHT_ONLY_TMA)


def _launch(
    kernel: Any, x: Tensor, weight: Tensor, tensors: tuple[Tensor | None, ...], dtype: torch.dtype, config: Config,
    descriptors: bool,
) -> Tensor:  # fmt: skip
    (m, k), n = x.shape, weight.shape[0]
    tiles, options = config
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    sources: list[Any] = [x, weight.contiguous()]
    if descriptors:
        blocks = ([tiles["BM"], tiles["BK"]], [tiles["BN"], tiles["BK"]])
        sources = [TensorDescriptor.from_tensor(t, block) for t, block in zip(sources, blocks, strict=True)]
    grid = (triton.cdiv(m, tiles["BM"]) * triton.cdiv(n, tiles["BN"]),)
    kernel[grid](
        *sources, *tensors, out, m, n, k,
        **tiles, GROUP=_GROUP, BIAS=tensors[-1] is not None, TMA=descriptors, TYPE=_TYPES[dtype], **options,
    )  # fmt: skip
    return out
