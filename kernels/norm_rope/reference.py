"""RMSNorm over the head size and rotary in plain torch: the meaning of the operation, and its CPU implementation.

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
    return rotate(normed, table if index is None else table[index.long()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Pairs (even, odd) of x [B,H,N,D] turned by the angles of table [N,D/2,2], in at least fp32."""
    work = torch.promote_types(x.dtype, torch.float32)
    pairs, turns = x.to(work).unflatten(-1, (-1, 2)), table.to(work)
    if not torch.compiler.is_compiling():
        # As a product of complex numbers: several times faster on a CPU than with the pairs taken apart.
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns))
        return turned.flatten(-2).to(x.dtype)
    # The compiler has no code for complex numbers, and fuses this into one loop.
    (even, odd), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def block_means(x: Tensor, block: int) -> Tensor:
    """fp32 means [B,H,n,D] over runs of `block` tokens."""
    return x.unflatten(2, (-1, block)).to(torch.promote_types(x.dtype, torch.float32)).mean(3)
