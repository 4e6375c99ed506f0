"""LayerNorm with per-frame scale and shift, and the gated residual, in plain torch: the meaning, and what runs on a
CPU.

Legend: B batch, N tokens, C channels, F rows of modulation (latent frames, or 1 for all).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def modulate(
    x: Tensor, shift: Tensor, scale: Tensor, index: Tensor | None, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """LayerNorm of x [B,N,C] without affine, times (1 + scale), plus shift [B,F,C]; in at least fp32, back in the
    type of x (or `dtype`)."""
    normed = F.layer_norm(x.to(_work(x)), (x.shape[-1],), eps=eps)
    return _scaled(shift, normed, 1 + scale, index).to(dtype or x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm of x [B,N,C] with weight and bias [C], in at least fp32, back in the type of x (or `dtype`)."""
    work = _work(x)
    return F.layer_norm(x.to(work), weight.shape, weight.to(work), bias.to(work), eps).to(dtype or x.dtype)


def add_gated(x: Tensor, gate: Tensor | None, update: Tensor, index: Tensor | None) -> Tensor:
    """x + gate * update, in at least fp32, back in the type of x; without a gate x + update."""
    if gate is None:
        return x + update
    work = _work(x)
    return _scaled(x.to(work), update.to(work), gate, index).to(x.dtype)


def _scaled(offset: Tensor, x: Tensor, factor: Tensor, index: Tensor | None) -> Tensor:
    """offset + x * factor; offset [B,N,C] or, like factor, [B,F,C]: a row for equal runs of tokens, or by index."""
    frames, whole = factor.shape[1], (x.shape[0], x.shape[1], x.shape[2])
    if index is not None and frames > 1:
        rows = factor.index_select(1, index)
        return torch.addcmul(offset if offset.shape == x.shape else offset.index_select(1, index), x, rows)
    # Runs are seen as a dimension of their own, along which a row is read again and again from the cache.
    runs = (whole[0], frames, whole[1] // frames, whole[2])
    offset = offset.view(runs) if offset.shape == x.shape else offset[:, :, None]
    return torch.addcmul(offset, x.view(runs), factor[:, :, None]).view(whole)


def _work(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
