"""Dense attention in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T D^-1/2) v by whichever of its ways torch takes; q [B,H,Nq,D], k and v [B,H,Nk,D]."""
    return F.scaled_dot_product_attention(q, k, v)
