"""RMSNorm of q or k over the head size, 3-D rotary, and the block means that gating wants, in one pass."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels.dispatch import needs_gradients, takes_kernel
from kernels.norm_rope import reference


def norm_rope(
    x: Tensor,
    weight: Tensor,
    table: Tensor | None,
    *,
    index: Tensor | None = None,
    eps: float = 1e-6,
    block: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x [B,H,N,D], any strides with D innermost -> (out [B,H,N,D], means).

    weight [D]. table [P,D/2,2] fp32, contiguous: cosine and sine for each pair (even, odd) of values; None
    leaves rotary out. index int [N]: the row of each token, which lets tokens stand in any order; without it
    token i has row i. `block`: also the fp32 means [B,H,N/block,D] over runs of `block` tokens of the output
    (a power of two). ValueError where shapes do not fit.
    """
    n, d = x.shape[2:]
    if block is not None and (n % block or block & (block - 1)):
        raise ValueError(f"block: {n} tokens do not divide into blocks of {block}, or it is no power of two")
    if table is not None and (d % 2 or table.shape[1:] != (d // 2, 2)):
        raise ValueError(f"table: shape {tuple(table.shape)}, wanted [positions, {d // 2}, 2]")
    if table is not None and (table.shape[0] < n if index is None else index.shape != (n,)):
        raise ValueError(f"table and index do not give each of {n} tokens a row")
    if backend(x, weight, table) == "triton":
        out, means = _norm_rope(x, weight, table, index, eps, block)
        return out, None if block is None else means
    out = reference.norm_rope(x, weight, None if table is None else table[:n] if index is None else table, index, eps)
    return out, None if block is None else reference.block_means(out, block)


def backend(x: Tensor, weight: Tensor, table: Tensor | None) -> Literal["triton", "reference"]:
    """What runs: the kernel where Triton runs, the reference elsewhere, for gradients, and for types it does not
    have."""
    fits = takes_kernel(x, weight) and (table is None or (table.dtype == torch.float32 and table.is_contiguous()))
    return "triton" if fits and not needs_gradients(x, weight) else "reference"


@torch.library.custom_op("longtake::norm_rope", mutates_args=())
def _norm_rope(
    x: Tensor, weight: Tensor, table: Tensor | None, index: Tensor | None, eps: float, block: int | None
) -> tuple[Tensor, Tensor]:
    """The kernel as an operator of torch.compile; the means are empty where none are wanted."""
    from kernels.norm_rope import triton_impl

    out, means = triton_impl.norm_rope(x, weight, table, index, eps, block)
    return out, x.new_empty(0, dtype=torch.float32) if means is None else means


@_norm_rope.register_fake
def _(
    x: Tensor, weight: Tensor, table: Tensor | None, index: Tensor | None, eps: float, block: int | None
) -> tuple[Tensor, Tensor]:
    b, h, n, d = x.shape
    means = (0,) if block is None else (b, h, n // block, d)
    return x.new_empty(b, n, h, d).transpose(1, 2), x.new_empty(means, dtype=torch.float32)
