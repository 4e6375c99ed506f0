"""RMSNorm over the head size and rotary in plain torch: the meaning of the operation.

Legend: B batch, H heads, N tokens, D head size, P rows of the rotary table, n blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_rope(x: Tensor, weight: Tensor, table: Tensor | None, index: Tensor | None, eps: float) -> Tensor:
    """x [B,H,N,D] normalised over D, times weight [D], pairs (even, odd) rotated; statistics in fp32.

    table [P,D/2,2]: cosine and sine; token i uses row index[i], or row i. The rotation is computed on the
    normalised value in the type of x, as the network was trained.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    normed = F.rms_norm(x.to(work), weight.shape, weight.to(work), eps).to(x.dtype)
    if table is None:
        return normed
    rows = (table if index is None else table[index.long()]).to(work)
    cos, sin = rows[..., 0], rows[..., 1]
    even, odd = normed.to(work).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def block_means(x: Tensor, block: int) -> Tensor:
    """fp32 means [B,H,n,D] over runs of `block` tokens."""
    return x.unflatten(2, (-1, block)).to(torch.promote_types(x.dtype, torch.float32)).mean(3)
