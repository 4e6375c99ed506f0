"""Products of int8 rows for Hopper in Gluon, Triton's language below its own.

A program stays on its multiprocessor and makes tile after tile of 128 x 256 results. One warp copies tiles of x and of
the weight into shared memory (TMA), up to STAGES steps ahead and into the next tile while the results of the last are
still being written; two groups of four warps have 64 rows each. Results leave by TMA too, which knows where the matrix
ends: no tile needs a mask.

Legend: x [M,K], weight [N,K], both int8 with K innermost. Importing this module needs Triton, running it a GPU of
compute capability 9.0.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.hopper import GROUPS, OPTIONS, REGISTERS, descriptor, load_tile, store_tile

ROWS, COLUMNS, STEP = 64, 256, 128  # of a group of warps, outputs of a tile, inputs of a step
STAGES = 3
BAND = 16  # rows of tiles that are made together, so that neighbours share weights in cache
TYPES = {torch.int8: gl.int8, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def _place(tile, m_tiles, n_tiles, BAND: gl.constexpr):
    span = BAND * n_tiles
    first = tile // span * BAND
    height = gl.minimum(m_tiles - first, BAND)
    return first + tile % span % height, tile % span // height


@gluon.jit
def _copy(
    x, weight, x_tiles, w_tiles, here, free, m_tiles, n_tiles, k,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr,
):  # fmt: skip
    """Steps of one tile after the other, each as soon as its place is free."""
    step = 0
    for tile in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        m_tile, n_tile = _place(tile, m_tiles, n_tiles, BAND)
        for start in range(0, k, BK):
            stage = step % STAGES
            mbarrier.wait(free.index(stage), (step // STAGES + 1) & 1)
            mbarrier.expect(here.index(stage), (2 * BM + BN) * BK)
            load_tile(weight, [n_tile * BN, start], here.index(stage), w_tiles.index(stage))
            load_tile(x, [m_tile * 2 * BM, start], here.index(stage), x_tiles.index(2 * stage))
            load_tile(x, [m_tile * 2 * BM + BM, start], here.index(stage), x_tiles.index(2 * stage + 1))
            step += 1


@gluon.jit
def _multiply(
    out, out_tile, x_scale, weight_scale, bias, x_tiles, w_tiles, here, free, m_tiles, n_tiles, m, n, k,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr,
    BIAS: gl.constexpr, TYPE: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One group of four warps: BM rows of each tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    step = 0
    for tile in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        m_tile, n_tile = _place(tile, m_tiles, n_tiles, BAND)
        acc = gl.zeros([BM, BN], gl.int32, layout)
        for start in range(0, k, BK):
            stage = step % STAGES
            mbarrier.wait(here.index(stage), step // STAGES & 1)
            w_tile = w_tiles.index(stage).permute((1, 0))
            acc = warpgroup_mma(x_tiles.index(2 * stage + GROUP), w_tile, acc, is_async=True)
            # The product of this step runs on; that of the step before is done with its tiles.
            acc = warpgroup_mma_wait(1, [acc])
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1, pred=start > 0)
            step += 1
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1)
        row, col = (2 * m_tile + GROUP) * BM, n_tile * BN
        rows = row + gl.arange(0, BM, gl.SliceLayout(1, layout))
        cols = col + gl.arange(0, BN, gl.SliceLayout(0, layout))
        row_scale = gl.load(x_scale + rows, mask=rows < m, other=0.0)
        col_scale = gl.load(weight_scale + cols, mask=cols < n, other=0.0)
        result = acc.to(gl.float32) * row_scale[:, None] * col_scale[None, :]
        if BIAS:
            result += gl.load(bias + cols, mask=cols < n, other=0.0).to(gl.float32)[None, :]
        tma.store_wait(0)
        out_tile.index(GROUP).store(result.to(TYPE))
        fence_async_shared()
        store_tile(out, [row, col], out_tile.index(GROUP))
    tma.store_wait(0)


@gluon.jit
def multiply_kernel(
    x, weight, out, x_scale, weight_scale, bias, m, n, k,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr,
    BIAS: gl.constexpr, TYPE: gl.constexpr, COMPUTING: gl.constexpr, COPYING: gl.constexpr,
):  # fmt: skip
    """out [M,N] = (x @ weight^T) * x_scale[:, None] * weight_scale + bias."""
    m_tiles, n_tiles = (m + 2 * BM - 1) // (2 * BM), (n + BN - 1) // BN
    x_tiles = gl.allocate_shared_memory(gl.int8, [2 * STAGES, BM, BK], x.layout)
    w_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BN, BK], weight.layout)
    out_tile = gl.allocate_shared_memory(TYPE, [2, BM, BN], out.layout)
    here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(here.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (
                out, out_tile, x_scale, weight_scale, bias, x_tiles, w_tiles, here, free, m_tiles, n_tiles, m, n, k,
                BM, BN, BK, STAGES, BAND, BIAS, TYPE, 0,
            )),
            (_multiply, (
                out, out_tile, x_scale, weight_scale, bias, x_tiles, w_tiles, here, free, m_tiles, n_tiles, m, n, k,
                BM, BN, BK, STAGES, BAND, BIAS, TYPE, 1,
            )),
            (_copy, (x, weight, x_tiles, w_tiles, here, free, m_tiles, n_tiles, k, BM, BN, BK, STAGES, BAND)),
        ],
        [4, 1],
        [COMPUTING, COPYING],
    )  # fmt: skip


def multiply(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """int8 values [M,K] with scale [M], int8 weight [N,K] with scale [N], bias [N] -> [M,N] in bf16 or fp16.

    K is a multiple of 16, N of 8.
    """
    values, weight = (_aligned(matrix) for matrix in (values, weight))
    (m, k), n = values.shape, weight.shape[0]
    out = torch.empty(m, n, dtype=dtype, device=values.device)
    tiles = triton.cdiv(m, GROUPS * ROWS) * triton.cdiv(n, COLUMNS)
    processors = torch.cuda.get_device_properties(values.device).multi_processor_count
    weight_scale = weight_scale.float()
    multiply_kernel[(min(tiles, processors),)](
        _descriptor(values, ROWS, STEP), _descriptor(weight, COLUMNS, STEP), _descriptor(out, ROWS, COLUMNS),
        scale, weight_scale, weight_scale if bias is None else bias, m, n, k,
        BM=ROWS, BN=COLUMNS, BK=STEP, STAGES=STAGES, BAND=BAND,
        BIAS=bias is not None, TYPE=TYPES[dtype],
        **REGISTERS, **OPTIONS,
    )  # fmt: skip
    return out


def _aligned(matrix: Tensor) -> Tensor:
    """Its rows side by side, from an address that TMA takes."""
    matrix = matrix.contiguous()
    return matrix if matrix.data_ptr() % 16 == 0 else matrix.clone()


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    # What torch calls the stride of a single row is anything.
    return descriptor(matrix, matrix.shape, matrix.shape[1], (rows, columns), TYPES[matrix.dtype])
