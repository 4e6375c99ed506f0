"""LayerNorm with per-frame scale and shift, and the gated residual, in plain torch: the meaning.

Legend: B batch, N tokens, C channels, F rows of modulation (latent frames, or 1 for all).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rows_of(values: Tensor, tokens: int, index: Tensor | None) -> Tensor:
    """[B,F,C] -> [B,N,C]: row index[i] for token i, or equal runs of tokens for each row."""
    if index is not None:
        return values[:, index.long()]
    return values.repeat_interleave(tokens // values.shape[1], dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, index: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of x [B,N,C] without affine, times (1 + scale), plus shift [B,F,C]; fp32, back in x's type."""
    work = torch.promote_types(x.dtype, torch.float32)
    n = x.shape[1]
    normed = F.layer_norm(x.to(work), (x.shape[-1],), eps=eps)
    return (rows_of(shift, n, index) + normed * (1 + rows_of(scale, n, index))).to(x.dtype)


def add_gated(x: Tensor, gate: Tensor | None, update: Tensor, index: Tensor | None) -> Tensor:
    """x + gate * update in fp32, back in the type of x; without a gate x + update."""
    if gate is None:
        return x + update
    work = torch.promote_types(x.dtype, torch.float32)
    return (x.to(work) + rows_of(gate, x.shape[1], index) * update.to(work)).to(x.dtype)
