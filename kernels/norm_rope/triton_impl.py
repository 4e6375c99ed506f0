"""RMSNorm, rotary and block means in one pass over q or k.

A program holds some tokens of HEADS neighbouring heads at a time: their rows lie side by side in memory, and share a
row of the rotary table. Statistics, rotation and means are fp32; the normalised value is rounded to the type of x
before it is rotated, as in the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import launch_options

_TOKENS = 32  # of a program that makes no means
# Rows (of all heads together) at a time, and heads at most. With fewer of them than a program has threads, a row of the
# rotary table is read by each thread that wants it, and no thread waits for another.
_ROWS, _HEADS = 8, 8
OPTIONS = launch_options(warps=4, stages=1)


@triton.jit
def _rows_of_table(
    table, index, row, tokens,
    D: tl.constexpr, WIDE: tl.constexpr, ROTATE: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """The rows [.., WIDE] of the rotary table that the tokens `row` have: cosine and sine of a pair side by side."""
    cols = tl.arange(0, WIDE)
    real = row < tokens
    if not ROTATE:
        turn = tl.zeros([row.shape[0], WIDE], tl.float32)
    else:
        if INDEXED:
            at = tl.load(index + row, mask=real, other=0).to(tl.int64)
        else:
            at = row.to(tl.int64)
        turn = tl.load(table + at[:, None] * D + cols[None, :], mask=real[:, None] & (cols < D)[None, :], other=0.0)
    return turn


@triton.jit
def norm_rope_kernel(
    x, weight, table, index, out, means,
    x_stride, x_batch, x_head, out_stride, out_batch, out_head,
    tokens, heads, eps,
    TOKENS: tl.constexpr, AT_ONCE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    ROTATE: tl.constexpr, INDEXED: tl.constexpr, MEANS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens, AT_ONCE of them at a time, of HEADS heads of one batch element.

    What the next tokens need is asked for before these are computed.
    """
    group, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    cols, head = tl.arange(0, WIDE), group * HEADS + tl.arange(0, HEADS)
    here = (head < heads)[None, :, None] & (cols < D)[None, None, :]
    x_at = x + b * x_batch + head.to(tl.int64)[None, :, None] * x_head + cols[None, None, :]
    out_at = out + b * out_batch + head.to(tl.int64)[None, :, None] * out_head + cols[None, None, :]
    scale = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)
    total = tl.zeros([AT_ONCE, HEADS, WIDE], tl.float32)
    end = tl.minimum(tokens, (tile + 1) * TOKENS)
    row = tile * TOKENS + tl.arange(0, AT_ONCE)
    read = tl.load(x_at + row.to(tl.int64)[:, None, None] * x_stride, mask=(row < end)[:, None, None] & here, other=0.0)
    turn = _rows_of_table(table, index, row, end, D, WIDE, ROTATE, INDEXED)
    for _ in range(0, TOKENS, AT_ONCE):
        after = row + AT_ONCE
        real = (after < end)[:, None, None] & here
        next_read = tl.load(x_at + after.to(tl.int64)[:, None, None] * x_stride, mask=real, other=0.0)
        next_turn = _rows_of_table(table, index, after, end, D, WIDE, ROTATE, INDEXED)
        value = read.to(tl.float32)
        root = tl.rsqrt(tl.sum(value * value, 2) / D + eps)
        value = (value * root[:, :, None] * scale[None, None, :]).to(TYPE).to(tl.float32)
        if ROTATE:
            cos, sin = tl.split(turn.reshape(AT_ONCE, 1, WIDE // 2, 2))
            even, odd = tl.split(value.reshape(AT_ONCE, HEADS, WIDE // 2, 2))
            value = tl.join(even * cos - odd * sin, even * sin + odd * cos).reshape(AT_ONCE, HEADS, WIDE)
        rounded = value.to(TYPE)
        tl.store(out_at + row.to(tl.int64)[:, None, None] * out_stride, rounded, mask=(row < end)[:, None, None] & here)
        if MEANS:
            total += rounded.to(tl.float32)
        row, read, turn = after, next_read, next_turn
    if MEANS:
        line = (b * heads + head)[:, None] * tl.num_programs(1) + tile
        place = means + line * D + cols[None, :]
        tl.store(place, tl.sum(total, 0) / TOKENS, mask=(head < heads)[:, None] & (cols < D)[None, :])


def norm_rope(
    x: Tensor, weight: Tensor, table: Tensor | None, index: Tensor | None, eps: float, block: int | None
) -> tuple[Tensor, Tensor | None]:
    """As `kernels.norm_rope.api.norm_rope`. x [B,H,N,D] with D innermost; the output is a view of [B,N,H,D]."""
    b, h, n, d = x.shape
    out = torch.empty(b, n, h, d, dtype=x.dtype, device=x.device).transpose(1, 2)
    tokens = _TOKENS if block is None else block
    together = min(_HEADS, triton.next_power_of_2(h))
    at_once = min(tokens, max(1, _ROWS // together))
    means = None if block is None else torch.empty(b, h, n // block, d, dtype=torch.float32, device=x.device)
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    norm_rope_kernel[(triton.cdiv(h, together), triton.cdiv(n, tokens), b)](
        x, weight, table, index, out, means,
        x.stride(2), x.stride(0), x.stride(1), out.stride(2), out.stride(0), out.stride(1),
        n, h, eps,
        TOKENS=tokens, AT_ONCE=at_once, HEADS=together, D=d, WIDE=triton.next_power_of_2(d),
        ROTATE=table is not None, INDEXED=index is not None, MEANS=block is not None, TYPE=types[x.dtype],
        **OPTIONS,
    )  # fmt: skip
    return out, means
