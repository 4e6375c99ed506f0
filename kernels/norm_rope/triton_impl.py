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

_TOKENS = 64
_ROWS, _HEADS = 64, 32  # rows (of all heads together) at a time, and heads at most
OPTIONS = {"num_warps": 8, "num_stages": 1}


@triton.jit
def norm_rope_kernel(
    x, weight, table, index, out, means,
    x_stride, x_batch, x_head, out_stride, out_batch, out_head,
    tokens, heads, eps,
    TOKENS: tl.constexpr, AT_ONCE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    ROTATE: tl.constexpr, INDEXED: tl.constexpr, MEANS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens, AT_ONCE of them at a time, of HEADS heads of one batch element."""
    group, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    cols, head = tl.arange(0, WIDE), group * HEADS + tl.arange(0, HEADS)
    real_col, real_head = (cols < D)[None, None, :], (head < heads)[None, :, None]
    x_at = x + b * x_batch + head.to(tl.int64)[None, :, None] * x_head + cols[None, None, :]
    out_at = out + b * out_batch + head.to(tl.int64)[None, :, None] * out_head + cols[None, None, :]
    scale = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)
    total = tl.zeros([AT_ONCE, HEADS, WIDE], tl.float32)
    for first in range(0, TOKENS, AT_ONCE):
        row = tile * TOKENS + first + tl.arange(0, AT_ONCE)
        real = (row < tokens)[:, None, None] & real_head & real_col
        far = row.to(tl.int64)[:, None, None]
        value = tl.load(x_at + far * x_stride, mask=real, other=0.0).to(tl.float32)
        root = tl.rsqrt(tl.sum(value * value, 2) / D + eps)
        value = (value * root[:, :, None] * scale[None, None, :]).to(TYPE).to(tl.float32)
        if ROTATE:
            if INDEXED:
                at = tl.load(index + row, mask=row < tokens, other=0).to(tl.int64)
            else:
                at = row.to(tl.int64)
            # A pair of columns holds cosine and sine of one pair of values.
            known = (row < tokens)[:, None] & (cols < D)[None, :]
            turn = tl.load(table + at[:, None] * D + cols[None, :], mask=known, other=0.0)
            cos, sin = tl.split(turn.reshape(AT_ONCE, 1, WIDE // 2, 2))
            even, odd = tl.split(value.reshape(AT_ONCE, HEADS, WIDE // 2, 2))
            value = tl.join(even * cos - odd * sin, even * sin + odd * cos).reshape(AT_ONCE, HEADS, WIDE)
        rounded = value.to(TYPE)
        tl.store(out_at + far * out_stride, rounded, mask=real)
        if MEANS:
            total += rounded.to(tl.float32)
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
    means = None if block is None else torch.empty(b, h, n // block, d, dtype=torch.float32, device=x.device)
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    norm_rope_kernel[(triton.cdiv(h, together), triton.cdiv(n, tokens), b)](
        x, weight, table, index, out, means,
        x.stride(2), x.stride(0), x.stride(1), out.stride(2), out.stride(0), out.stride(1),
        n, h, eps,
        TOKENS=tokens, AT_ONCE=min(tokens, _ROWS // together), HEADS=together, D=d, WIDE=triton.next_power_of_2(d),
        ROTATE=table is not None, INDEXED=index is not None, MEANS=block is not None, TYPE=types[x.dtype],
        **OPTIONS,
    )  # fmt: skip
    return out, means
