"""silu(a) * b, computed in fp32 and rounded once. Rows may be slices of a wider product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 2048
OPTIONS = {"num_warps": 4, "num_stages": 1}


@triton.jit
def swiglu_kernel(a, b, out, a_row, b_row, columns, COLUMNS: tl.constexpr, TYPE: tl.constexpr):
    """One program: COLUMNS values of one row; out is contiguous."""
    row, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = cols < columns
    gate = tl.load(a + row * a_row + cols, mask=real, other=0.0).to(tl.float32)
    value = tl.load(b + row * b_row + cols, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row * columns + cols, (gate / (1 + tl.exp(-gate)) * value).to(TYPE), mask=real)


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """a and b [..., C] whose leading dimensions can be flattened -> contiguous [..., C]."""
    flat_a, flat_b = a.flatten(0, -2), b.flatten(0, -2)
    rows, columns = flat_a.shape
    out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    swiglu_kernel[(rows, triton.cdiv(columns, _COLUMNS))](
        flat_a, flat_b, out, flat_a.stride(0), flat_b.stride(0), columns,
        COLUMNS=_COLUMNS, TYPE=types[a.dtype], **OPTIONS,
    )  # fmt: skip
    return out
