"""LayerNorm with modulation, alone or fused with the gated residual before it: a few rows for each program.

Rows of 4096 values stay in registers between the statistics and the result, so that each tensor is read and
written once. So does the modulation, which is fp32 and as wide as a row: it is read again only where the latent frame
changes. Mean and variance are fp32, the variance from the differences to the mean.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import launch_options
from kernels.linear.triton_impl import quantise_row, row_quantisation

_RUN = 4
OPTIONS = launch_options(warps=8, stages=1)


@triton.jit
def modulate_kernel(
    x, gate, update, shift, scale, index, summed, out, row_scale,
    x_batch, x_row, u_batch, u_row, m_batch, m_row, tokens, run, eps,
    RUN: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr,
    AFFINE: tl.constexpr, INDEXED: tl.constexpr, TYPE: tl.constexpr,
    QUANTISED: tl.constexpr, LARGEST: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """RUN tokens. summed and out are contiguous [B,N,C]; gate, shift and scale are [B,F,C] of the same strides, but
    with AFFINE shift and scale are bias and weight [C]."""
    first, b = tl.program_id(0) * RUN, tl.program_id(1).to(tl.int64)
    last = tl.minimum(first + RUN, tokens)
    cols = tl.arange(0, WIDE)
    real = cols < C
    gates = tl.zeros([WIDE], tl.float32)
    factor = tl.zeros([WIDE], tl.float32)
    offset = tl.zeros([WIDE], tl.float32)
    if NORM and AFFINE:
        factor = tl.load(scale + cols, mask=real, other=0.0).to(tl.float32)
        offset = tl.load(shift + cols, mask=real, other=0.0).to(tl.float32)
    x_at = x + b * x_batch + cols
    following = tl.load(x_at + first.to(tl.int64) * x_row, mask=real, other=0.0)
    if ADD:
        u_at = update + b * u_batch + cols
        following_update = tl.load(u_at + first.to(tl.int64) * u_row, mask=real, other=0.0)
    known = -1
    for token in range(first, last):
        # The next token's row is asked for before this one is worked on; after the last, that one again.
        value = following.to(tl.float32)
        ahead = tl.minimum(tl.zeros([], tl.int32) + token + 1, last - 1).to(tl.int64)
        following = tl.load(x_at + ahead * x_row, mask=real, other=0.0)
        if ADD:
            more = following_update.to(tl.float32)
            following_update = tl.load(u_at + ahead * u_row, mask=real, other=0.0)
        if GATED or (NORM and not AFFINE):
            if INDEXED:
                frame = tl.load(index + token).to(tl.int32)
            else:
                frame = token // run
            if frame != known:
                modulation = b * m_batch + frame.to(tl.int64) * m_row + cols
                if GATED:
                    gates = tl.load(gate + modulation, mask=real, other=0.0).to(tl.float32)
                if NORM and not AFFINE:
                    factor = 1 + tl.load(scale + modulation, mask=real, other=0.0).to(tl.float32)
                    offset = tl.load(shift + modulation, mask=real, other=0.0).to(tl.float32)
                known = frame
        here = (b * tokens + token) * C + cols
        if ADD:
            if GATED:
                more = more * gates
            # The stream is rounded before it is normalised: the next block reads it rounded.
            stream = (value + more).to(TYPE)
            tl.store(summed + here, stream, mask=real)
            value = stream.to(tl.float32)
        if NORM:
            centred = tl.where(real, value - tl.sum(value, 0) / C, 0.0)
            root = tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)
            result = offset + centred * root * factor
            if QUANTISED:
                small, largest = quantise_row(result, LARGEST, FP8)
                tl.store(out + here, small, mask=real)
                tl.store(row_scale + b * tokens + token, largest)
            else:
                tl.store(out + here, result.to(TYPE), mask=real)


def launch(
    x: Tensor,
    gate: Tensor | None,
    update: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    index: Tensor | None,
    eps: float,
    *,
    affine: bool = False,
    quantise: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(x + gate * update, its modulated LayerNorm, the scale of its rows). The first is None without `update`, the
    second without `shift`, the third without `quantise`. x and update [B,N,C] with C innermost; with `affine` shift
    and scale are the bias and weight [C] of the norm."""
    b, n, c = x.shape
    rows = [values for values in ((gate,) if affine else (gate, shift, scale)) if values is not None]
    if len({values.stride() for values in rows}) > 1:
        gate, shift, scale = (None if values is None else values.contiguous() for values in (gate, shift, scale))
        rows = [values.contiguous() for values in rows]
    frames, (m_batch, m_row) = (rows[0].shape[1], rows[0].stride()[:2]) if rows else (1, (0, 0))
    summed = None if update is None else torch.empty(b, n, c, dtype=x.dtype, device=x.device)
    out = None if shift is None else torch.empty(b, n, c, dtype=quantise or x.dtype, device=x.device)
    row_scale = None if quantise is None else torch.empty(b, n, dtype=torch.float32, device=x.device)
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    modulate_kernel[(triton.cdiv(n, _RUN), b)](
        x, gate, update, shift, scale, index, summed, out, row_scale,
        x.stride(0), x.stride(1), 0 if update is None else update.stride(0), 0 if update is None else update.stride(1),
        m_batch, m_row, n, n // frames, eps,
        RUN=_RUN, C=c, WIDE=triton.next_power_of_2(c), ADD=update is not None, GATED=gate is not None,
        NORM=shift is not None, AFFINE=affine, INDEXED=index is not None and frames > 1, TYPE=types[x.dtype],
        QUANTISED=quantise is not None, **row_quantisation(quantise or torch.int8), **OPTIONS,
    )  # fmt: skip
    return summed, out, row_scale
