"""Dense attention for Hopper in Gluon, Triton's language below its own.

A program has 128 queries of one head. One warp copies tiles of keys and values into shared memory (TMA); two groups of
four warps have 64 queries each, and while one computes exponentials, products of the other keep the tensor cores busy.
Each group also overlaps its own: the product with the values of a tile runs while the exponentials of the next tile
are computed. Softmax statistics and accumulators are fp32.

No read leaves a tensor and no row needs a mask. The first tile of keys begins at key 0 and counts only as far as the
others leave over; the last queries are computed twice where they do not fill a tile, to the same bits.

Legend: B batch, H heads, D head size, Nq/Nk queries and keys. Importing this module needs Triton, running it a GPU of
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
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.block_sparse_attention.triton_impl import LOG2_E, MAX_LOGIT_BOUND, Rows, fits_descriptors, row_view
from kernels.hopper import GROUPS, OPTIONS, REGISTERS, descriptor, load_tile

QUERIES, KEYS = 64, 128  # of one group of warps, of a tile
# Tiles of keys and of values in shared memory, 32 KiB each at D 128, beside 32 KiB of queries.
STAGES = 2


@gluon.jit
def _copy(
    q, k, v, q_tiles, k_tiles, v_tiles, q_here, k_here, k_free, v_here, v_free,
    q_row, q_at, k_row, k_at, v_row, v_at, first, tiles,
    BQ: gl.constexpr, BK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The queries, then tile after tile of keys and values, each as soon as its place is free."""
    mbarrier.expect(q_here, 2 * BQ * D * 2)
    load_tile(q, [q_row, q_at], q_here, q_tiles.index(0))
    load_tile(q, [q_row + BQ, q_at], q_here, q_tiles.index(1))
    start = 0
    for i in range(tiles):
        stage, turn = i % STAGES, (i // STAGES + 1) & 1
        mbarrier.wait(k_free.index(stage), turn)
        mbarrier.expect(k_here.index(stage), BK * D * 2)
        load_tile(k, [k_row + start, k_at], k_here.index(stage), k_tiles.index(stage))
        mbarrier.wait(v_free.index(stage), turn)
        mbarrier.expect(v_here.index(stage), BK * D * 2)
        load_tile(v, [v_row + start, v_at], v_here.index(stage), v_tiles.index(stage))
        start = first + i * BK


@gluon.jit
def _attend(
    out, o_stride, o_row, o_at, q_tiles, k_tiles, v_tiles, q_here, k_here, k_free, v_here, v_free,
    scale_log2, shift_log2, first, tiles,
    BQ: gl.constexpr, BK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, TYPE: gl.constexpr,
    FIXED_SHIFT: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One group of four warps: its BQ queries over all tiles."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    nothing = gl.zeros([BQ, BK], gl.float32, scores_layout)
    acc = gl.zeros([BQ, D], gl.float32, out_layout)
    queries = q_tiles.index(GROUP)
    mbarrier.wait(q_here, 0)
    mbarrier.wait(k_here.index(0), 0)
    scores = warpgroup_mma(queries, k_tiles.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, [scores])
    mbarrier.arrive(k_free.index(0), count=1)
    counts = (gl.arange(0, BK, gl.SliceLayout(0, scores_layout)) < first)[None, :]
    if FIXED_SHIFT:
        top = gl.zeros([BQ], gl.float32, row_layout) + shift_log2
    else:
        top = gl.max(gl.where(counts, scores, float("-inf")), 1) * scale_log2
    p = gl.where(counts, gl.exp2(scores * scale_log2 - top[:, None]), 0.0)
    mass = gl.sum(p, 1)
    near = gl.convert_layout(p.to(TYPE), p_layout)
    # Keys are one tile ahead of values.
    stage, turn, v_stage, v_turn = 1 % STAGES, 1 // STAGES, 0, 0
    mbarrier.wait(k_here.index(stage), turn, pred=tiles > 1)
    for i in range(1, tiles):
        scores = warpgroup_mma(queries, k_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(v_here.index(v_stage), v_turn)
        acc = warpgroup_mma(near, v_tiles.index(v_stage), acc, is_async=True)
        scores = warpgroup_mma_wait(1, [scores])
        mbarrier.arrive(k_free.index(stage), count=1)
        if FIXED_SHIFT:
            p = gl.exp2(scores * scale_log2 - shift_log2)
            mass += gl.sum(p, 1)
        else:
            higher = gl.maximum(top, gl.max(scores, 1) * scale_log2)
            p = gl.exp2(scores * scale_log2 - higher[:, None])
            shrink = gl.exp2(top - higher)
            mass = mass * shrink + gl.sum(p, 1)
            top = higher
        following = gl.convert_layout(p.to(TYPE), p_layout)
        stage, turn = (i + 1) % STAGES, (i + 1) // STAGES & 1
        # Waiting here and not at the head of the loop keeps ptxas from moving exponentials behind the next line (which
        # only the benchmark would show).
        mbarrier.wait(k_here.index(stage), turn, pred=i + 1 < tiles)
        acc, near, following = warpgroup_mma_wait(0, [acc, near, following])
        mbarrier.arrive(v_free.index(v_stage), count=1)
        if not FIXED_SHIFT:
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, out_layout))[:, None]
        near = following
        v_stage, v_turn = i % STAGES, i // STAGES & 1
    mbarrier.wait(v_here.index(v_stage), v_turn)
    acc = warpgroup_mma(near, v_tiles.index(v_stage), acc, is_async=True)
    acc, near = warpgroup_mma_wait(0, [acc, near])
    acc = acc / gl.convert_layout(mass, gl.SliceLayout(1, out_layout))[:, None]
    rows = o_row + GROUP * BQ + gl.arange(0, BQ, gl.SliceLayout(1, out_layout)).to(gl.int64)
    cols = o_at + gl.arange(0, D, gl.SliceLayout(0, out_layout))
    gl.store(out + rows[:, None] * o_stride + cols[None, :], acc.to(TYPE))


@gluon.jit
def attention_kernel(
    q, k, v, out,
    q_batch, q_head, q_col, k_batch, k_head, k_col, v_batch, v_head, v_col, o_stride, o_batch, o_head, o_col,
    heads, n_q, n_k, scale_log2, shift_log2,
    BQ: gl.constexpr, BK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, TYPE: gl.constexpr,
    FIXED_SHIFT: gl.constexpr, COMPUTING: gl.constexpr, COPYING: gl.constexpr,
):  # fmt: skip
    """One program: 2 BQ queries of one head over all keys."""
    block, head = gl.program_id(0), gl.program_id(1)
    b, h = head // heads, head % heads
    tiles = (n_k + BK - 1) // BK
    first = n_k - (tiles - 1) * BK
    row = gl.minimum(block * 2 * BQ, n_q - 2 * BQ)
    q_tiles = gl.allocate_shared_memory(TYPE, [2, BQ, D], q.layout)
    k_tiles = gl.allocate_shared_memory(TYPE, [STAGES, BK, D], k.layout)
    v_tiles = gl.allocate_shared_memory(TYPE, [STAGES, BK, D], v.layout)
    q_here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_here, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_here.index(i), count=1)
        mbarrier.init(v_here.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()
    o_row = b.to(gl.int64) * o_batch + h * o_head + row
    gl.warp_specialize(
        [
            (_attend, (
                out, o_stride, o_row, h * o_col, q_tiles, k_tiles, v_tiles, q_here, k_here, k_free, v_here, v_free,
                scale_log2, shift_log2, first, tiles, BQ, BK, D, STAGES, TYPE, FIXED_SHIFT, 0,
            )),
            (_attend, (
                out, o_stride, o_row, h * o_col, q_tiles, k_tiles, v_tiles, q_here, k_here, k_free, v_here, v_free,
                scale_log2, shift_log2, first, tiles, BQ, BK, D, STAGES, TYPE, FIXED_SHIFT, 1,
            )),
            (_copy, (
                q, k, v, q_tiles, k_tiles, v_tiles, q_here, k_here, k_free, v_here, v_free,
                b * q_batch + h * q_head + row, h * q_col, b * k_batch + h * k_head, h * k_col,
                b * v_batch + h * v_head, h * v_col, first, tiles, BQ, BK, D, STAGES,
            )),
        ],
        [4, 1],
        [COMPUTING, COPYING],
    )  # fmt: skip


def attend(q: Tensor, k: Tensor, v: Tensor, bound: float | None) -> Tensor:
    """softmax(q k^T D^-1/2) v: q [B,H,Nq,D], k and v [B,H,Nk,D] in bf16 -> [B,H,Nq,D], a view of [B,Nq,H,D].

    At least 128 queries and 128 keys. `bound` promises |q.k| D^-1/2 <= bound and does without a running maximum where
    that is exact enough.
    """
    b, h, n, d = q.shape
    out = torch.empty(b, n, h, d, dtype=q.dtype, device=q.device).transpose(1, 2)
    fixed = bound is not None and bound <= MAX_LOGIT_BOUND
    shift = bound * LOG2_E if bound is not None and fixed else 0.0
    rq, rk, rv, ro = *(_readable(x) for x in (q, k, v)), row_view(out)
    attention_kernel[(triton.cdiv(n, GROUPS * QUERIES), b * h)](
        *(descriptor(*view.matrix(), (rows, d)) for view, rows in ((rq, QUERIES), (rk, KEYS), (rv, KEYS))), out,
        *rq.strides()[1:], *rk.strides()[1:], *rv.strides()[1:], *ro.strides(),
        h, n, k.shape[2], d**-0.5 * LOG2_E, shift,
        BQ=QUERIES, BK=KEYS, D=d, STAGES=STAGES, TYPE=gl.bfloat16, FIXED_SHIFT=fixed,
        **REGISTERS, **OPTIONS,
    )  # fmt: skip
    return out


def _readable(x: Tensor) -> Rows:
    """Rows that TMA can read; a copy where those of x are not aligned."""
    view = row_view(x)
    return view if fits_descriptors(view.tensor) else row_view(view.tensor.clone(memory_format=torch.contiguous_format))
