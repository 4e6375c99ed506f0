"""The three steps between the large products of a block: modulate, add_gated, and both in one pass.

Shapes: x and update [B,N,C]; shift, scale, gate [B,F,C] in fp32, one row for each of F latent frames. Tokens
belong to rows in equal runs (frame after frame), or as `index` int [N] says: for tokens in block order it is
the frame of each token. LayerNorm with an affine (weight, bias) is modulate with shift = bias and
scale = weight - 1, F = 1. Statistics and modulation are fp32, results in the type of x.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from torch import Tensor

from kernels.modulate import reference


def modulate(x: Tensor, shift: Tensor, scale: Tensor, *, index: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """LayerNorm of x without affine, times (1 + scale), plus shift."""
    _check(x, index, shift, scale)
    if backend(x, shift, scale) == "reference":
        return reference.modulate(x, shift, scale, index, eps)
    from kernels.modulate import triton_impl

    _, out = triton_impl.launch(x, None, None, shift, scale, index, eps)
    assert out is not None
    return out


def add_gated(x: Tensor, gate: Tensor | None, update: Tensor, *, index: Tensor | None = None) -> Tensor:
    """x + gate * update; without a gate x + update."""
    _check(x, index, *(() if gate is None else (gate,)))
    if backend(x, update, gate) == "reference":
        return reference.add_gated(x, gate, update, index)
    from kernels.modulate import triton_impl

    summed, _ = triton_impl.launch(x, gate, update, None, None, index, 0.0)
    assert summed is not None
    return summed


def add_gated_modulate(
    x: Tensor,
    gate: Tensor | None,
    update: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    index: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """(y, modulate(y, shift, scale)) with y = add_gated(x, gate, update), reading x and update once.

    gate, shift and scale have the same F.
    """
    _check(x, index, shift, scale, *(() if gate is None else (gate,)))
    if backend(x, update, gate, shift, scale) == "reference":
        y = reference.add_gated(x, gate, update, index)
        return y, reference.modulate(y, shift, scale, index, eps)
    from kernels.modulate import triton_impl

    summed, out = triton_impl.launch(x, gate, update, shift, scale, index, eps)
    assert summed is not None and out is not None
    return summed, out


def backend(x: Tensor, *others: Tensor | None) -> Literal["triton", "reference"]:
    """What runs: the kernel on CUDA, the reference elsewhere, for gradients, and for types it does not have."""
    tensors = [x, *(other for other in others if other is not None)]
    trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    fits = x.dtype in (torch.float16, torch.bfloat16, torch.float32) and all(t.stride(-1) == 1 for t in tensors)
    return "triton" if x.is_cuda and fits and not trained and importlib.util.find_spec("triton") else "reference"


def _check(x: Tensor, index: Tensor | None, *rows: Tensor) -> None:
    b, n, c = x.shape
    frames = {row.shape[1] for row in rows}
    if any(row.shape[0] != b or row.shape[2] != c for row in rows) or len(frames) > 1:
        raise ValueError(f"modulation of shapes {[tuple(row.shape) for row in rows]} does not fit x {tuple(x.shape)}")
    if index is not None and index.shape != (n,):
        raise ValueError(f"index: shape {tuple(index.shape)}, wanted one row for each of {n} tokens")
    if index is None and any(n % count for count in frames):
        raise ValueError(f"{n} tokens do not divide into {frames} frames; give an index")
