"""RMSNorm, rotary and block means in one pass over q or k.

A program holds TOKENS tokens of one head after another, so that it reads their rows of the rotary table once
for HEADS heads. Statistics, rotation and means are fp32; the normalised value is rounded to the type of x
before it is rotated, as in the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS, _HEADS = 64, 8
OPTIONS = {"num_warps": 8, "num_stages": 1}


@triton.jit
def norm_rope_kernel(
    x, weight, table, index, out, means,
    x_stride, x_batch, x_head, out_stride, out_batch, out_head,
    tokens, heads, eps,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    ROTATE: tl.constexpr, INDEXED: tl.constexpr, MEANS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens of HEADS heads of one batch element."""
    tile, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, cols = tile * TOKENS + tl.arange(0, TOKENS), tl.arange(0, WIDE)
    real = (rows < tokens)[:, None] & (cols < D)[None, :]
    scale = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)
    if ROTATE:
        if INDEXED:
            at = tl.load(index + rows, mask=rows < tokens, other=0).to(tl.int64)
        else:
            at = rows.to(tl.int64)
        # A pair of columns holds cosine and sine of one pair of values.
        turn = tl.load(table + at[:, None] * D + cols[None, :], mask=real, other=0.0)
        cos, sin = tl.split(turn.reshape(TOKENS, WIDE // 2, 2))
    first, last = group * HEADS, tl.minimum(group * HEADS + HEADS, heads)
    here = x + b * x_batch + rows.to(tl.int64)[:, None] * x_stride + cols[None, :]
    there = (
        out + b * out_batch + first.to(tl.int64) * out_head + rows.to(tl.int64)[:, None] * out_stride + cols[None, :]
    )
    following = tl.load(here + first.to(tl.int64) * x_head, mask=real, other=0.0)
    for h in range(first, last):
        # The next head is asked for before this one is worked on; after the last, that one again.
        value = following.to(tl.float32)
        ahead = tl.minimum(tl.zeros([], tl.int32) + h + 1, last - 1).to(tl.int64)
        following = tl.load(here + ahead * x_head, mask=real, other=0.0)
        root = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
        value = (value * root[:, None] * scale[None, :]).to(TYPE).to(tl.float32)
        if ROTATE:
            even, odd = tl.split(value.reshape(TOKENS, WIDE // 2, 2))
            value = tl.join(even * cos - odd * sin, even * sin + odd * cos).reshape(TOKENS, WIDE)
        rounded = value.to(TYPE)
        tl.store(there, rounded, mask=real)
        there += out_head
        if MEANS:
            mean = tl.sum(rounded.to(tl.float32), 0) / TOKENS
            line = (b * heads + h) * tl.num_programs(0) + tile
            tl.store(means + line * D + cols, mean, mask=cols < D)


def norm_rope(
    x: Tensor, weight: Tensor, table: Tensor | None, index: Tensor | None, eps: float, block: int | None
) -> tuple[Tensor, Tensor | None]:
    """As `kernels.norm_rope.api.norm_rope`. x [B,H,N,D] with D innermost; the output is a view of [B,N,H,D]."""
    b, h, n, d = x.shape
    out = torch.empty(b, n, h, d, dtype=x.dtype, device=x.device).transpose(1, 2)
    tokens = _TOKENS if block is None else block
    means = None if block is None else torch.empty(b, h, n // block, d, dtype=torch.float32, device=x.device)
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    norm_rope_kernel[(triton.cdiv(n, tokens), triton.cdiv(h, _HEADS), b)](
        x, weight, table, index, out, means,
        x.stride(2), x.stride(0), x.stride(1), out.stride(2), out.stride(0), out.stride(1),
        n, h, eps,
        TOKENS=tokens, HEADS=_HEADS, D=d, WIDE=triton.next_power_of_2(d),
        ROTATE=table is not None, INDEXED=index is not None, MEANS=block is not None, TYPE=types[x.dtype],
        **OPTIONS,
    )  # fmt: skip
    return out, means
