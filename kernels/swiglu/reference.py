"""silu(a) * b in plain torch: the meaning of the operation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b, each step in the type of a."""
    return F.silu(a) * b
