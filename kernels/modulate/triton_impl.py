"""LayerNorm with modulation, alone or fused with the gated residual before it: one row for each program.

Rows of 4096 values stay in registers between the statistics and the result, so that each tensor is read and
written once. Mean and variance are fp32, the variance from the differences to the mean.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {"num_warps": 4, "num_stages": 1}


@triton.jit
def modulate_kernel(
    x, gate, update, shift, scale, index, summed, out,
    x_batch, x_row, u_batch, u_row, tokens, frames, run, eps,
    C: tl.constexpr, WIDE: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr,
    INDEXED: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """One token. summed and out are contiguous [B,N,C]; gate, shift and scale contiguous fp32 [B,F,C]."""
    token, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, WIDE)
    real = cols < C
    if INDEXED:
        frame = tl.load(index + token).to(tl.int64)
    else:
        frame = token // run
    modulation = (b * frames + frame) * C + cols
    here = (b * tokens + token) * C + cols
    value = tl.load(x + b * x_batch + token * x_row + cols, mask=real, other=0.0).to(tl.float32)
    if ADD:
        more = tl.load(update + b * u_batch + token * u_row + cols, mask=real, other=0.0).to(tl.float32)
        if GATED:
            more = more * tl.load(gate + modulation, mask=real, other=0.0)
        # The stream is rounded before it is normalised: the next block reads it rounded.
        stream = (value + more).to(TYPE)
        tl.store(summed + here, stream, mask=real)
        value = stream.to(tl.float32)
    if NORM:
        centred = tl.where(real, value - tl.sum(value, 0) / C, 0.0)
        root = tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)
        factor = 1 + tl.load(scale + modulation, mask=real, other=0.0)
        offset = tl.load(shift + modulation, mask=real, other=0.0)
        tl.store(out + here, (offset + centred * root * factor).to(TYPE), mask=real)


def launch(
    x: Tensor,
    gate: Tensor | None,
    update: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    index: Tensor | None,
    eps: float,
) -> tuple[Tensor | None, Tensor | None]:
    """(x + gate * update, its modulated LayerNorm); the first without `update`, the second without `shift` is
    None. x and update [B,N,C] with C innermost."""
    b, n, c = x.shape
    rows = next((values for values in (shift, gate) if values is not None), None)
    frames = 1 if rows is None else rows.shape[1]
    summed = None if update is None else torch.empty(b, n, c, dtype=x.dtype, device=x.device)
    out = None if shift is None else torch.empty(b, n, c, dtype=x.dtype, device=x.device)
    gate, shift, scale = (None if v is None else v.float().contiguous() for v in (gate, shift, scale))
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    modulate_kernel[(n, b)](
        x, gate, update, shift, scale, index, summed, out,
        x.stride(0), x.stride(1), 0 if update is None else update.stride(0), 0 if update is None else update.stride(1),
        n, frames, n // frames, eps,
        C=c, WIDE=triton.next_power_of_2(c), ADD=update is not None, GATED=gate is not None,
        NORM=shift is not None, INDEXED=index is not None, TYPE=types[x.dtype], **OPTIONS,
    )  # fmt: skip
    return summed, out
