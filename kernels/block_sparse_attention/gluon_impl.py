"""Block-sparse attention for Hopper in Gluon: the forward pass over blocks of 64 x 64 tokens.

A program stays on its multiprocessor and takes two neighbouring query blocks of one head after the other two, each with
its own list of key blocks, its own group of four warps and its own warp that copies (TMA). A step takes two blocks of
the list: while a group computes exponentials, its product with the values of the step before and the products of the
other group keep the tensor cores busy.

Keys and values of one head at 720p are larger than the second-level cache. All programs go through their ascending
lists at once, so that a key block is read from memory for one of them and found in cache by the others: as long as they
stay together. They therefore wait for each other before each pair of query blocks. It is a matter of speed alone: a
program that has waited in vain goes on.

The legend is that of `triton_impl`. Importing this module needs Triton, running it a GPU of compute capability 9.0.
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

from kernels.block_sparse_attention.triton_impl import LOG2_E, MAX_LOGIT_BOUND, row_view
from kernels.hopper import GROUPS, OPTIONS, REGISTERS, descriptor, load_tile

BLOCK = 64
ROOM = 3  # pairs of blocks, of keys or of values, that a group has in shared memory: 32 KiB each at D 128
PATIENCE = 500  # questions, of about a microsecond, whether the others have come as far


@gluon.jit
def _load_pair(
    source, row, col, first, second, tiles, here, free, turn,
    BLOCK: gl.constexpr, D: gl.constexpr, ROOM: gl.constexpr,
):  # fmt: skip
    """Two blocks into the place of the `turn`-th pair."""
    place = turn % ROOM
    mbarrier.wait(free.index(place), (turn // ROOM + 1) & 1)
    mbarrier.expect(here.index(place), 2 * BLOCK * D * 2)
    load_tile(source, [row + first * BLOCK, col], here.index(place), tiles.index(2 * place))
    load_tile(source, [row + second * BLOCK, col], here.index(place), tiles.index(2 * place + 1))


@gluon.jit
def _place(work, heads, blocks, GROUP: gl.constexpr):
    """Batch element, head and query block of a group. Where the number of blocks is odd, the last is computed twice, to
    the same bits."""
    halves = (blocks + 1) // 2
    head = work // halves
    return head // heads, head % heads, gl.minimum(work % halves * 2 + GROUP, blocks - 1)


@gluon.jit
def _copy(
    q, k, v, kept, counts, finished, q_tile, tiles, q_here, q_free, here, free,
    q_batch, q_head, q_col, k_batch, k_head, k_col, v_batch, v_head, v_col, heads, blocks, width, works,
    BLOCK: gl.constexpr, D: gl.constexpr, ROOM: gl.constexpr, PATIENCE: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """The query block, then the listed blocks: keys are one pair ahead of values."""
    turn, rounds = 0, 0
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        b, h, block = _place(work, heads, blocks, GROUP)
        k_row, v_row = b * k_batch + h * k_head, b * v_batch + h * v_head
        line = (b * heads + h).to(gl.int64) * blocks + block
        near = kept + line * width
        count = gl.load(counts + line)
        # A list of an odd length begins with one block, which stands twice and counts once.
        single = count % 2
        first, second = gl.load(near), gl.load(near + 1 - single)
        wanted, asked = 2 * gl.num_programs(0) * rounds, 0
        while (gl.load(finished, volatile=True) < wanted) & (asked < PATIENCE):
            asked += 1
        mbarrier.wait(q_free, (rounds + 1) & 1)
        mbarrier.expect(q_here, BLOCK * D * 2)
        load_tile(q, [b * q_batch + h * q_head + block * BLOCK, h * q_col], q_here, q_tile)
        _load_pair(k, k_row, h * k_col, first, second, tiles, here, free, turn, BLOCK, D, ROOM)
        turn += 1
        for at in range(2 - single, count, 2):
            next_first, next_second = gl.load(near + at), gl.load(near + at + 1)
            _load_pair(k, k_row, h * k_col, next_first, next_second, tiles, here, free, turn, BLOCK, D, ROOM)
            _load_pair(v, v_row, h * v_col, first, second, tiles, here, free, turn + 1, BLOCK, D, ROOM)
            turn += 2
            first, second = next_first, next_second
        _load_pair(v, v_row, h * v_col, first, second, tiles, here, free, turn, BLOCK, D, ROOM)
        turn, rounds = turn + 1, rounds + 1
        gl.atomic_add(finished, 1, sem="relaxed")


@gluon.jit
def _attend(
    out, lse, counts, q_tile, tiles, q_here, q_free, here, free, o_stride, o_batch, o_head, o_col, heads, blocks, works,
    scale_log2, shift_log2,
    BLOCK: gl.constexpr, D: gl.constexpr, ROOM: gl.constexpr, TYPE: gl.constexpr, FIXED_SHIFT: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """One group of four warps: one query block after the other over its list."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    nothing = gl.zeros([BLOCK, BLOCK], gl.float32, scores_layout)
    turn, rounds = 0, 0
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        b, h, block = _place(work, heads, blocks, GROUP)
        line = (b * heads + h).to(gl.int64) * blocks + block
        count = gl.load(counts + line)
        acc = gl.zeros([BLOCK, D], gl.float32, out_layout)
        mbarrier.wait(q_here, rounds & 1)
        place = turn % ROOM
        mbarrier.wait(here.index(place), turn // ROOM & 1)
        one = warpgroup_mma(q_tile, tiles.index(2 * place).permute((1, 0)), nothing, use_acc=False, is_async=True)
        two = warpgroup_mma(q_tile, tiles.index(2 * place + 1).permute((1, 0)), nothing, use_acc=False, is_async=True)
        one, two = warpgroup_mma_wait(0, [one, two])
        mbarrier.arrive(free.index(place), count=1)
        if FIXED_SHIFT:
            top = gl.zeros([BLOCK], gl.float32, row_layout) + shift_log2
        else:
            top = gl.maximum(gl.max(one, 1), gl.max(two, 1)) * scale_log2
        p_one = gl.exp2(one * scale_log2 - top[:, None])
        p_two = gl.exp2(two * scale_log2 - top[:, None]) * (1 - count % 2).to(gl.float32)
        mass = gl.sum(p_one, 1) + gl.sum(p_two, 1)
        near_one, near_two = gl.convert_layout(p_one.to(TYPE), p_layout), gl.convert_layout(p_two.to(TYPE), p_layout)
        turn += 1
        mbarrier.wait(here.index(turn % ROOM), turn // ROOM & 1)
        for _ in range(2, count, 2):
            keys, values = turn % ROOM, (turn + 1) % ROOM
            one = warpgroup_mma(q_tile, tiles.index(2 * keys).permute((1, 0)), nothing, use_acc=False, is_async=True)
            two = warpgroup_mma(
                q_tile, tiles.index(2 * keys + 1).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            mbarrier.wait(here.index(values), (turn + 1) // ROOM & 1)
            acc = warpgroup_mma(near_one, tiles.index(2 * values), acc, is_async=True)
            acc = warpgroup_mma(near_two, tiles.index(2 * values + 1), acc, is_async=True)
            one, two = warpgroup_mma_wait(2, [one, two])
            mbarrier.arrive(free.index(keys), count=1)
            if FIXED_SHIFT:
                p_one = gl.exp2(one * scale_log2 - shift_log2)
                p_two = gl.exp2(two * scale_log2 - shift_log2)
                mass += gl.sum(p_one, 1) + gl.sum(p_two, 1)
            else:
                higher = gl.maximum(top, gl.maximum(gl.max(one, 1), gl.max(two, 1)) * scale_log2)
                p_one = gl.exp2(one * scale_log2 - higher[:, None])
                p_two = gl.exp2(two * scale_log2 - higher[:, None])
                shrink = gl.exp2(top - higher)
                mass = mass * shrink + gl.sum(p_one, 1) + gl.sum(p_two, 1)
                top = higher
            next_one = gl.convert_layout(p_one.to(TYPE), p_layout)
            next_two = gl.convert_layout(p_two.to(TYPE), p_layout)
            # Waiting here and not where it is read keeps ptxas from moving exponentials behind the next line.
            mbarrier.wait(here.index((turn + 2) % ROOM), (turn + 2) // ROOM & 1)
            acc, near_one, near_two, next_one, next_two = warpgroup_mma_wait(
                0, [acc, near_one, near_two, next_one, next_two]
            )
            mbarrier.arrive(free.index(values), count=1)
            if not FIXED_SHIFT:
                acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, out_layout))[:, None]
            near_one, near_two = next_one, next_two
            turn += 2
        mbarrier.arrive(q_free, count=1)
        place = turn % ROOM
        acc = warpgroup_mma(near_one, tiles.index(2 * place), acc, is_async=True)
        acc = warpgroup_mma(near_two, tiles.index(2 * place + 1), acc, is_async=True)
        acc, near_one, near_two = warpgroup_mma_wait(0, [acc, near_one, near_two])
        mbarrier.arrive(free.index(place), count=1)
        turn, rounds = turn + 1, rounds + 1
        acc = acc / gl.convert_layout(mass, gl.SliceLayout(1, out_layout))[:, None]
        first_row = b.to(gl.int64) * o_batch + h * o_head + block * BLOCK
        rows = first_row + gl.arange(0, BLOCK, gl.SliceLayout(1, out_layout))
        cols = h * o_col + gl.arange(0, D, gl.SliceLayout(0, out_layout))
        gl.store(out + rows[:, None] * o_stride + cols[None, :], acc.to(TYPE))
        gl.store(lse + line * BLOCK + gl.arange(0, BLOCK, row_layout), top + gl.log2(mass))


@gluon.jit
def forward_kernel(
    q, k, v, out, lse, kept, counts, finished,
    q_batch, q_head, q_col, k_batch, k_head, k_col, v_batch, v_head, v_col, o_stride, o_batch, o_head, o_col,
    heads, blocks, width, works, scale_log2, shift_log2,
    BLOCK: gl.constexpr, D: gl.constexpr, ROOM: gl.constexpr, TYPE: gl.constexpr, FIXED_SHIFT: gl.constexpr,
    PATIENCE: gl.constexpr, COMPUTING: gl.constexpr, COPYING: gl.constexpr,
):  # fmt: skip
    """`works` pairs of query blocks over their lists of key blocks."""
    q_tiles = gl.allocate_shared_memory(TYPE, [2, BLOCK, D], q.layout)
    tiles_0 = gl.allocate_shared_memory(TYPE, [2 * ROOM, BLOCK, D], k.layout)
    tiles_1 = gl.allocate_shared_memory(TYPE, [2 * ROOM, BLOCK, D], k.layout)
    q_here = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    here_0 = gl.allocate_shared_memory(gl.int64, [ROOM, 1], mbarrier.MBarrierLayout())
    here_1 = gl.allocate_shared_memory(gl.int64, [ROOM, 1], mbarrier.MBarrierLayout())
    free_0 = gl.allocate_shared_memory(gl.int64, [ROOM, 1], mbarrier.MBarrierLayout())
    free_1 = gl.allocate_shared_memory(gl.int64, [ROOM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_here.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
    for i in gl.static_range(ROOM):
        mbarrier.init(here_0.index(i), count=1)
        mbarrier.init(here_1.index(i), count=1)
        mbarrier.init(free_0.index(i), count=1)
        mbarrier.init(free_1.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_attend, (
                out, lse, counts, q_tiles.index(0), tiles_0, q_here.index(0), q_free.index(0), here_0, free_0,
                o_stride, o_batch, o_head, o_col, heads, blocks, works, scale_log2, shift_log2,
                BLOCK, D, ROOM, TYPE, FIXED_SHIFT, 0,
            )),
            (_attend, (
                out, lse, counts, q_tiles.index(1), tiles_1, q_here.index(1), q_free.index(1), here_1, free_1,
                o_stride, o_batch, o_head, o_col, heads, blocks, works, scale_log2, shift_log2,
                BLOCK, D, ROOM, TYPE, FIXED_SHIFT, 1,
            )),
            (_copy, (
                q, k, v, kept, counts, finished, q_tiles.index(0), tiles_0, q_here.index(0), q_free.index(0),
                here_0, free_0, q_batch, q_head, q_col, k_batch, k_head, k_col, v_batch, v_head, v_col,
                heads, blocks, width, works, BLOCK, D, ROOM, PATIENCE, 0,
            )),
            (_copy, (
                q, k, v, kept, counts, finished, q_tiles.index(1), tiles_1, q_here.index(1), q_free.index(1),
                here_1, free_1, q_batch, q_head, q_col, k_batch, k_head, k_col, v_batch, v_head, v_col,
                heads, blocks, width, works, BLOCK, D, ROOM, PATIENCE, 1,
            )),
        ],
        [4, 1, 1],
        [COMPUTING, COPYING, COPYING],
    )  # fmt: skip


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, counts: Tensor, bound: float | None
) -> tuple[Tensor, Tensor]:
    """As `triton_impl.launch_forward`, for bf16 and rows as TMA wants them. No list may be empty; it is fast where they
    are equally long."""
    b, h, n, d = q.shape
    out = torch.empty(b, n, h, d, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse2 = torch.empty(b, h, n, dtype=torch.float32, device=q.device)
    fixed = bound is not None and bound <= MAX_LOGIT_BOUND
    shift = bound * LOG2_E if bound is not None and fixed else 0.0
    rq, rk, rv, ro = (row_view(x) for x in (q, k, v, out))
    blocks = n // BLOCK
    works = b * h * triton.cdiv(blocks, GROUPS)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    finished = torch.zeros(1, dtype=torch.int32, device=q.device)
    forward_kernel[(min(works, processors),)](
        *(descriptor(*view.matrix(), (BLOCK, d)) for view in (rq, rk, rv)), out, lse2, kept, counts, finished,
        *rq.strides()[1:], *rk.strides()[1:], *rv.strides()[1:], *ro.strides(),
        h, blocks, kept.shape[-1], works, d**-0.5 * LOG2_E, shift,
        BLOCK=BLOCK, D=d, ROOM=ROOM, TYPE=gl.bfloat16, FIXED_SHIFT=fixed, PATIENCE=PATIENCE,
        **REGISTERS, **OPTIONS,
    )  # fmt: skip
    return out, lse2
