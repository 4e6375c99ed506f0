"""Block-sparse attention in Triton: gating, forward and backward, over tokens already in block order.

Legend: B batch, H heads, D head size, Nq/Nk tokens, BQ/BK tokens of a block (a power of two, at least 16),
nq/nk blocks, m the longest list. Tensors q, k, v are [B,H,N,D] with any strides that a row view can express
(see `row_view`): both [B,H,N,D] and a slice of a fused [B,N,3,H,D] projection are read where they lie.

Tiles are moved by TMA through descriptors made on the host (`descriptors=True`, compute capability 9.0 and
above), or through plain pointers. Softmax statistics and accumulators are fp32; the type of the products is
that of q. Importing this module needs Triton, running it a GPU or TRITON_INTERPRET=1.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.dispatch import capability, launch_options

LOG2_E = math.log2(math.e)
_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

# A fixed shift b leaves probabilities of at least exp(-2b): they must stay normal numbers in fp32 and bf16.
MAX_LOGIT_BOUND = 40.0

# Launch options; the alternatives' registers and times are in docs/kernels.md.
FORWARD_OPTIONS = launch_options(warps=4, stages=2)
BACKWARD_OPTIONS = launch_options(warps=8, stages=1)

# Gating: tiles of scores, how many scores are in memory at a time (32 MiB, less than the cache of a large GPU), and the
# launch options. The running sum in `choose_kernel` has 16 bits for a count.
SCORE_TILE = {"ROWS": 64, "COLUMNS": 64, "STEP": 32}
_SCORES = 2**23
_MOST_KEY_BLOCKS = 2**15
SCORE_OPTIONS = launch_options(warps=4, stages=2)
SCORE_OPTIONS_10 = launch_options(warps=4, stages=3)  # on compute capability 10 two stages spill
PASS_OPTIONS = launch_options(warps=4, stages=3)  # of the small kernels beside these: block means, delta
CHOOSE_OPTIONS = launch_options(warps=4, stages=1)


@triton.jit
def _load_rows(source, row, col, stride, ROWS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr):
    """Tile [ROWS, WIDE] whose first element is (row, col); columns from D on are zero."""
    if TMA:
        tile = source.load([row, col])
    else:
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)
        cols = tl.arange(0, WIDE)
        places = source + rows[:, None] * stride + col + cols[None, :]
        if D == WIDE:
            tile = tl.load(places)
        else:
            tile = tl.load(places, mask=cols[None, :] < D, other=0.0)
    return tile


@triton.jit
def _store_rows(
    target, row, col, stride, tile, ROWS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr
):
    if TMA:
        target.store([row, col], tile)
    else:
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)
        cols = tl.arange(0, WIDE)
        tl.store(target + rows[:, None] * stride + col + cols[None, :], tile, mask=cols[None, :] < D)


@triton.jit
def forward_kernel(
    q, k, v, out, lse, kept, counts,
    q_stride, q_batch, q_head, q_col,
    k_stride, k_batch, k_head, k_col,
    v_stride, v_batch, v_head, v_col,
    o_stride, o_batch, o_head, o_col,
    heads, width, scale_log2, shift_log2,
    BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, TYPE: tl.constexpr,
    FIXED_SHIFT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One program: one query block of one head over its list of key blocks."""
    block, head = tl.program_id(0), tl.program_id(1)
    b, h = head // heads, head % heads
    q_row = b * q_batch + h * q_head + block * BQ
    k_row, k_at = b * k_batch + h * k_head, h * k_col
    v_row, v_at = b * v_batch + h * v_head, h * v_col
    line = head.to(tl.int64) * tl.num_programs(0) + block
    near = kept + line * width
    count = tl.load(counts + line)
    q_tile = _load_rows(q, q_row, h * q_col, q_stride, BQ, D, WIDE, TMA)
    if FIXED_SHIFT:
        top = tl.zeros([BQ], tl.float32) + shift_log2
    else:
        top = tl.full([BQ], float("-inf"), tl.float32)
    mass = tl.zeros([BQ], tl.float32)
    acc = tl.zeros([BQ, WIDE], tl.float32)
    index = tl.load(near)
    for j in range(count):
        # The next index is asked for a whole tile before it is needed.
        following = tl.load(near + j + 1, mask=j + 1 < count, other=0)
        k_tile = _load_rows(k, k_row + index * BK, k_at, k_stride, BK, D, WIDE, TMA)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        v_tile = _load_rows(v, v_row + index * BK, v_at, v_stride, BK, D, WIDE, TMA)
        if FIXED_SHIFT:
            p = tl.exp2(scores * scale_log2 - shift_log2)
            mass += tl.sum(p, 1)
        else:
            higher = tl.maximum(top, tl.max(scores, 1) * scale_log2)
            p = tl.exp2(scores * scale_log2 - higher[:, None])
            shrink = tl.exp2(top - higher)
            mass = mass * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None]
            top = higher
        acc = tl.dot(p.to(TYPE), v_tile, acc, input_precision="ieee")
        index = following
    acc = acc / mass[:, None]
    _store_rows(out, b * o_batch + h * o_head + block * BQ, h * o_col, o_stride, acc.to(TYPE), BQ, D, WIDE, TMA)
    tl.store(lse + line * BQ + tl.arange(0, BQ), top + tl.log2(mass))


@triton.jit
def delta_kernel(
    out, d_out, delta,
    o_stride, o_batch, o_head, o_col,
    g_stride, g_batch, g_head, g_col,
    heads, BQ: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """delta = sum over D of out * d_out, fp32 [B*H, Nq]."""
    block, head = tl.program_id(0), tl.program_id(1)
    b, h = head // heads, head % heads
    o = _load_rows(out, b * o_batch + h * o_head + block * BQ, h * o_col, o_stride, BQ, D, WIDE, False)
    g = _load_rows(d_out, b * g_batch + h * g_head + block * BQ, h * g_col, g_stride, BQ, D, WIDE, False)
    line = head.to(tl.int64) * tl.num_programs(0) + block
    tl.store(delta + line * BQ + tl.arange(0, BQ), tl.sum(o.to(tl.float32) * g.to(tl.float32), 1))


@triton.jit
def dq_kernel(
    q, k, v, d_out, lse, delta, dq, kept, counts,
    q_stride, q_batch, q_head, q_col,
    k_stride, k_batch, k_head, k_col,
    v_stride, v_batch, v_head, v_col,
    g_stride, g_batch, g_head, g_col,
    heads, width, scale, scale_log2,
    BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, TYPE: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Gradient of one query block. dq is contiguous [B,H,Nq,D]."""
    block, head = tl.program_id(0), tl.program_id(1)
    b, h = head // heads, head % heads
    k_row, k_at = b * k_batch + h * k_head, h * k_col
    v_row, v_at = b * v_batch + h * v_head, h * v_col
    line = head.to(tl.int64) * tl.num_programs(0) + block
    near = kept + line * width
    count = tl.load(counts + line)
    q_tile = _load_rows(q, b * q_batch + h * q_head + block * BQ, h * q_col, q_stride, BQ, D, WIDE, TMA)
    g_tile = _load_rows(d_out, b * g_batch + h * g_head + block * BQ, h * g_col, g_stride, BQ, D, WIDE, TMA)
    rows = tl.arange(0, BQ)
    top = tl.load(lse + line * BQ + rows)
    mean = tl.load(delta + line * BQ + rows)
    acc = tl.zeros([BQ, WIDE], tl.float32)
    for j in range(count):
        index = tl.load(near + j)
        k_tile = _load_rows(k, k_row + index * BK, k_at, k_stride, BK, D, WIDE, TMA)
        v_tile = _load_rows(v, v_row + index * BK, v_at, v_stride, BK, D, WIDE, TMA)
        p = tl.exp2(tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale_log2 - top[:, None])
        dp = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee")
        ds = p * (dp - mean[:, None])
        acc = tl.dot(ds.to(TYPE), k_tile, acc, input_precision="ieee")
    _store_rows(dq + line * BQ * D, 0, 0, D, (acc * scale).to(TYPE), BQ, D, WIDE, False)


@triton.jit
def dkv_kernel(
    q, k, v, d_out, lse, delta, dk, dv, queries, starts,
    q_stride, q_batch, q_head, q_col,
    k_stride, k_batch, k_head, k_col,
    v_stride, v_batch, v_head, v_col,
    g_stride, g_batch, g_head, g_col,
    heads, q_blocks, pairs, scale, scale_log2,
    BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, TYPE: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Gradients of one key block from the query blocks that see it. dk and dv are contiguous [B,H,Nk,D].

    The query blocks of key block j are queries[head, starts[head, j] : starts[head, j + 1]].
    """
    block, head = tl.program_id(0), tl.program_id(1)
    b, h = head // heads, head % heads
    q_row, q_at = b * q_batch + h * q_head, h * q_col
    g_row, g_at = b * g_batch + h * g_head, h * g_col
    k_tile = _load_rows(k, b * k_batch + h * k_head + block * BK, h * k_col, k_stride, BK, D, WIDE, TMA)
    v_tile = _load_rows(v, b * v_batch + h * v_head + block * BK, h * v_col, v_stride, BK, D, WIDE, TMA)
    first = tl.load(starts + head * (tl.num_programs(0) + 1) + block)
    last = tl.load(starts + head * (tl.num_programs(0) + 1) + block + 1)
    far = queries + head.to(tl.int64) * pairs
    rows = tl.arange(0, BQ)
    dk_acc = tl.zeros([BK, WIDE], tl.float32)
    dv_acc = tl.zeros([BK, WIDE], tl.float32)
    for j in range(first, last):
        index = tl.load(far + j)
        line = (head.to(tl.int64) * q_blocks + index) * BQ
        q_tile = _load_rows(q, q_row + index * BQ, q_at, q_stride, BQ, D, WIDE, TMA)
        g_tile = _load_rows(d_out, g_row + index * BQ, g_at, g_stride, BQ, D, WIDE, TMA)
        top = tl.load(lse + line + rows)
        mean = tl.load(delta + line + rows)
        # Transposed scores: p and ds come out with keys in rows, as both products want them.
        p = tl.exp2(tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * scale_log2 - top[None, :])
        dv_acc = tl.dot(p.to(TYPE), g_tile, dv_acc, input_precision="ieee")
        dp = tl.dot(v_tile, tl.trans(g_tile), input_precision="ieee")
        ds = p * (dp - mean[None, :])
        dk_acc = tl.dot(ds.to(TYPE), q_tile, dk_acc, input_precision="ieee")
    line = head.to(tl.int64) * tl.num_programs(0) + block
    _store_rows(dk + line * BK * D, 0, 0, D, (dk_acc * scale).to(TYPE), BK, D, WIDE, False)
    _store_rows(dv + line * BK * D, 0, 0, D, dv_acc.to(TYPE), BK, D, WIDE, False)


@triton.jit
def means_kernel(
    x,
    means,
    stride,
    batch,
    head_rows,
    head_col,
    heads,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Mean over the tokens of each block, fp32 [B*H, n, D]."""
    block, head = tl.program_id(0), tl.program_id(1)
    b, h = head // heads, head % heads
    tile = _load_rows(x, b * batch + h * head_rows + block * BLOCK, h * head_col, stride, BLOCK, D, WIDE, False)
    cols = tl.arange(0, WIDE)
    line = head.to(tl.int64) * tl.num_programs(0) + block
    tl.store(means + line * D + cols, tl.sum(tile.to(tl.float32), 0) / BLOCK, mask=cols < D)


@triton.jit
def scores_kernel(
    q_means, k_means, scores,
    first_head, first_row, rows, n_q, n_k, room,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One program: the products of ROWS means of queries with COLUMNS means of keys, of head `first_head` + program 2.

    `scores` [heads, rows, room] begins with row `first_row` of the first head.
    """
    here = tl.program_id(2)
    head = first_head + here
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real_row, real_col = row < rows, col < n_k
    q_at = q_means + (head.to(tl.int64) * n_q + first_row + row)[:, None] * D
    k_at = k_means + (head.to(tl.int64) * n_k + col)[:, None] * D
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, D, STEP):
        dims = start + tl.arange(0, STEP)
        q_tile = tl.load(q_at + dims[None, :], mask=real_row[:, None] & (dims < D)[None, :], other=0.0)
        k_tile = tl.load(k_at + dims[None, :], mask=real_col[:, None] & (dims < D)[None, :], other=0.0)
        acc = tl.dot(q_tile, tl.trans(k_tile), acc, input_precision="tf32x3")
    at = scores + (here.to(tl.int64) * rows + row)[:, None] * room + col[None, :]
    tl.store(at, acc, mask=real_row[:, None] & real_col[None, :])


@triton.jit
def choose_kernel(
    scores, kept, counts,
    first_head, first_row, rows, n_q, n_k, room, width, top, threshold, scale_log2,
    NK: tl.constexpr, MASS: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """One program: the ascending list of key blocks that one query block keeps, from its row of `scores`.

    The k-th largest score is found bit by bit: no sort. Equal scores at the border are kept in order of their index.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, NK)
    present = columns < n_k
    mine = scores + (head.to(tl.int64) * rows + row) * room
    score = tl.load(mine + columns, mask=present, other=float("-inf"))
    # Order-preserving integers: the sign bit is flipped, and all bits of negative numbers.
    bits = score.to(tl.int32, bitcast=True)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000
    order = tl.where(present, order, tl.zeros_like(order))
    wanted = top
    if MASS:
        p = tl.exp2((score - tl.max(score, 0)) * scale_log2)
        p = p / tl.sum(p, 0)
        border = tl.zeros([], tl.uint32)
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(32):
            trial = border | bit
            mass = tl.sum(tl.where(order >= trial, p, 0.0), 0)
            border = tl.where(mass > threshold, trial, border)
            bit = bit >> 1
        above = (order > border) & present
        at_border = tl.max(tl.where(order == border, p, 0.0), 0)
        rest = threshold - tl.sum(tl.where(above, p, 0.0), 0)
        equal_ones = tl.where(at_border > 0, rest / tl.where(at_border > 0, at_border, 1.0), 0.0)
        within = tl.sum(above.to(tl.int32), 0) + equal_ones.to(tl.int32)
        wanted = tl.minimum(tl.maximum(top, within), n_k)
    line = (first_head + head).to(tl.int64) * n_q + first_row + row
    tl.store(counts + line, wanted)
    if WRITE:
        border = tl.zeros([], tl.uint32)
        bit = tl.full([], 0x80000000, tl.uint32)
        found = tl.full([], -1, tl.int32)
        # The lower bits matter only while more than wanted lie at or above the border.
        while (bit > 0) & (found != wanted):
            trial = border | bit
            here = tl.sum((order >= trial).to(tl.int32), 0)
            border = tl.where(here >= wanted, trial, border)
            found = tl.where(here >= wanted, here, found)
            bit = bit >> 1
        above = order > border
        equal = (order == border) & present
        short = wanted - tl.sum(above.to(tl.int32), 0)
        # One running sum counts both kinds: how many lie above in the low half, how many at the border in the high.
        counted = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
        nth_equal = counted >> 16
        keep = above | (equal & (nth_equal <= short))
        place = (counted & 0xFFFF) + tl.minimum(nth_equal, short) - 1
        tl.store(kept + line * width + place, columns, mask=keep)


class Rows(NamedTuple):
    """A tensor [B,H,N,D] seen as rows: (b, h, n, d) is at row b*batch + h*head + n, column h*col + d."""

    tensor: Tensor
    stride: int
    batch: int
    head: int
    col: int

    def strides(self) -> tuple[int, int, int, int]:
        return self.stride, self.batch, self.head, self.col

    def matrix(self) -> tuple[Tensor, tuple[int, int], int]:
        """The tensor, how many rows and columns it is read as, and the stride of rows."""
        b, h, n, d = self.tensor.shape
        height = (b - 1) * self.batch + (h - 1) * self.head + n
        return self.tensor, (height, (h - 1) * self.col + d), self.stride

    def descriptor(self, rows: int) -> TensorDescriptor:
        """TMA descriptor of tiles of `rows` rows and D columns."""
        tensor, shape, stride = self.matrix()
        return TensorDescriptor(tensor, list(shape), [stride, 1], [rows, tensor.shape[3]])


def row_view(x: Tensor) -> Rows:
    """Rows of x [B,H,N,D], copied only if its strides are not those of rows."""
    (b, h, n, _), (batch, head, token, inner) = x.shape, x.stride()
    beside = h > 1 and head < token
    odd = inner != 1 or (b > 1 and batch % token) or (h > 1 and not beside and head % token)
    if odd or n == 1:
        x = x.contiguous()
        return Rows(x, x.stride(2), x.stride(0) // x.stride(2), x.stride(1) // x.stride(2), 0)
    return Rows(
        x,
        token,
        batch // token if b > 1 else 0,
        0 if beside or h == 1 else head // token,
        head if beside else 0,
    )


def fits_descriptors(*tensors: Tensor) -> bool:
    """TMA wants 16-byte aligned bases and row strides, and here a head size that is a power of two."""
    for x in tensors:
        rows, size = row_view(x), x.element_size()
        aligned = rows.tensor.data_ptr() % 16 == 0 and rows.stride * size % 16 == 0
        if not aligned or x.shape[3] & (x.shape[3] - 1) or x.shape[3] * size < 16:
            return False
    return True


def block_means(x: Tensor, block: int) -> Tensor:
    """x [B,H,N,D] in block order -> fp32 means [B,H,N/block,D]."""
    b, h, n, d = x.shape
    means = torch.empty(b, h, n // block, d, dtype=torch.float32, device=x.device)
    rows = row_view(x)
    means_kernel[(n // block, b * h)](
        rows.tensor, means, *rows.strides(), h, BLOCK=block, D=d, WIDE=triton.next_power_of_2(d), **PASS_OPTIONS
    )
    return means


def choose_blocks(q_means: Tensor, k_means: Tensor, *, top: int, cdf_threshold: float | None) -> tuple[Tensor, Tensor]:
    """Ascending int32 lists kept [B,H,nq,m] and their lengths counts [B,H,nq] from block means [B,H,n,D].

    `top` blocks for each query block, or with `cdf_threshold` at least these. Entries beyond a row's count
    are zero. A threshold costs one synchronisation with the host: m depends on the data.
    """
    b, h, n_q, _ = q_means.shape
    counts = torch.empty(b, h, n_q, dtype=torch.int32, device=q_means.device)
    if cdf_threshold is None:
        kept = torch.empty(b, h, n_q, top, dtype=torch.int32, device=q_means.device)
        _choose(q_means, k_means, kept, counts, top, None, write=True)
        return kept, counts
    _choose(q_means, k_means, counts, counts, top, cdf_threshold, write=False)
    width = int(counts.max())
    kept = torch.zeros(b, h, n_q, width, dtype=torch.int32, device=q_means.device)
    _choose(q_means, k_means, kept, counts, top, cdf_threshold, write=True)
    return kept, counts


def _choose(
    q_means: Tensor,
    k_means: Tensor,
    kept: Tensor,
    counts: Tensor,
    top: int,
    cdf: float | None,
    *,
    write: bool,
) -> None:
    """Fill `counts`, and with `write` `kept`: some query blocks at a time, so that their scores stay in cache."""
    b, h, n_q, d = q_means.shape
    n_k = k_means.shape[2]
    if n_k > _MOST_KEY_BLOCKS:
        raise ValueError(f"k: {n_k} blocks, at most {_MOST_KEY_BLOCKS} can be chosen from")
    q_means, k_means = q_means.contiguous(), k_means.contiguous()
    tile = SCORE_TILE["ROWS"]
    room = triton.cdiv(n_k, 32) * 32
    some = min(n_q, max(tile, _SCORES // room // tile * tile))
    together = min(b * h, max(1, _SCORES // (some * room)))
    scores = torch.empty(together, some, room, dtype=torch.float32, device=q_means.device)
    score_options = SCORE_OPTIONS_10 if capability(q_means)[0] == 10 else SCORE_OPTIONS
    for head, row in itertools.product(range(0, b * h, together), range(0, n_q, some)):
        heads, rows = min(together, b * h - head), min(some, n_q - row)
        scores_kernel[(triton.cdiv(rows, tile), triton.cdiv(n_k, SCORE_TILE["COLUMNS"]), heads)](
            q_means, k_means, scores, head, row, rows, n_q, n_k, room, **SCORE_TILE, D=d, **score_options
        )
        choose_kernel[(rows, heads)](
            scores, kept, counts,
            head, row, rows, n_q, n_k, room, kept.shape[-1], top, 0.0 if cdf is None else cdf, d**-0.5 * LOG2_E,
            NK=triton.next_power_of_2(n_k), MASS=cdf is not None, WRITE=write, **CHOOSE_OPTIONS,
        )  # fmt: skip


def transpose_lists(kept: Tensor, counts: Tensor, n_k: int) -> tuple[Tensor, Tensor]:
    """For each key block the query blocks that see it: queries int32 [B*H, nq*m], starts int32 [B*H, nk+1].

    Ascending, so that sums over them are made in the same order each time.
    """
    b, h, n_q, m = kept.shape
    real = torch.arange(m, device=kept.device) < counts[..., None]
    keys = torch.where(real, kept, n_k).view(b * h, n_q * m)
    queries = keys.argsort(dim=1, stable=True).div_(m, rounding_mode="floor").int()
    seen = torch.zeros(b * h, n_k + 1, dtype=torch.int64, device=kept.device)
    seen.scatter_add_(1, keys.long(), torch.ones_like(keys, dtype=torch.int64))
    starts = torch.zeros(b * h, n_k + 1, dtype=torch.int32, device=kept.device)
    starts[:, 1:] = seen[:, :n_k].cumsum(1)
    return queries, starts


class Tiles(NamedTuple):
    """Sizes shared by the kernels of one call."""

    block_q: int
    block_k: int
    descriptors: bool

    def constants(self, q: Tensor) -> dict[str, Any]:
        d = q.shape[3]
        sizes = {"BQ": self.block_q, "BK": self.block_k, "D": d, "WIDE": max(16, triton.next_power_of_2(d))}
        return {**sizes, "TYPE": _TYPES[q.dtype], "TMA": self.descriptors}

    def source(self, rows: Rows, block: int) -> Tensor | TensorDescriptor:
        return rows.descriptor(block) if self.descriptors else rows.tensor


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, counts: Tensor, tiles: Tiles, bound: float | None,
    options: dict[str, int] = FORWARD_OPTIONS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over the listed blocks: out [B,H,Nq,D] (a view of [B,Nq,H,D]), and the logarithm to base 2 of the
    sums of exponentials, fp32 [B,H,Nq].

    `bound` promises |q.k| D^-1/2 <= bound and does without a running maximum where that is exact enough (at most
    MAX_LOGIT_BOUND, not in fp16).
    """
    b, h, n, d = q.shape
    out = torch.empty(b, n, h, d, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse2 = torch.empty(b, h, n, dtype=torch.float32, device=q.device)
    fixed = bound is not None and bound <= MAX_LOGIT_BOUND and q.dtype != torch.float16
    shift = bound * LOG2_E if bound is not None and fixed else 0.0
    rq, rk, rv, ro = (row_view(x) for x in (q, k, v, out))
    forward_kernel[(n // tiles.block_q, b * h)](
        tiles.source(rq, tiles.block_q), tiles.source(rk, tiles.block_k), tiles.source(rv, tiles.block_k),
        tiles.source(ro, tiles.block_q), lse2, kept, counts,
        *rq.strides(), *rk.strides(), *rv.strides(), *ro.strides(),
        h, kept.shape[-1], d**-0.5 * LOG2_E, shift,
        **tiles.constants(q), FIXED_SHIFT=fixed, **options,
    )  # fmt: skip
    return out, lse2


def launch_backward(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, counts: Tensor, out: Tensor, lse2: Tensor, d_out: Tensor,
    tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, contiguous."""
    b, h, n_q, d = q.shape
    q_blocks, k_blocks = n_q // tiles.block_q, k.shape[2] // tiles.block_k
    # A gradient can come with stride 0 (that of a sum): rows cannot express it.
    rq, rk, rv, ro, rg = (row_view(x) for x in (q, k, v, out, d_out.contiguous()))
    sizes = tiles.constants(q)
    delta = torch.empty_like(lse2)
    delta_kernel[(q_blocks, b * h)](
        ro.tensor, rg.tensor, delta, *ro.strides(), *rg.strides(), h,
        BQ=tiles.block_q, D=d, WIDE=sizes["WIDE"], **PASS_OPTIONS,
    )  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    sources = [
        tiles.source(rows, block)
        for rows, block in (
            (rq, tiles.block_q),
            (rk, tiles.block_k),
            (rv, tiles.block_k),
            (rg, tiles.block_q),
        )
    ]
    strides = (*rq.strides(), *rk.strides(), *rv.strides(), *rg.strides())
    scales = (d**-0.5, d**-0.5 * LOG2_E)
    dq_kernel[(q_blocks, b * h)](
        *sources,
        lse2,
        delta,
        dq,
        kept,
        counts,
        *strides,
        h,
        kept.shape[-1],
        *scales,
        **sizes,
        **BACKWARD_OPTIONS,
    )
    queries, starts = transpose_lists(kept, counts, k_blocks)
    dkv_kernel[(k_blocks, b * h)](
        *sources, lse2, delta, dk, dv, queries, starts, *strides,
        h, q_blocks, queries.shape[1], *scales, **sizes, **BACKWARD_OPTIONS,
    )  # fmt: skip
    return dq, dk, dv
