"""The steps between the large products of a block: norm and modulation, the gated residual, and both in one pass.

Shapes: x and update [B,N,C]; shift, scale, gate [B,F,C] in fp32, one row for each of F latent frames. Tokens
belong to rows in equal runs (frame after frame), or as `index` int [N] says: for tokens in block order it is
the frame of each token. Statistics and modulation are fp32, results in the type of x.

A normed result that only quantised Linears read can be made as QuantisedRows, from the fp32 row: `quantise` is then
torch.int8 or torch.float8_e4m3fn, and there are no gradients.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kernels.dispatch import needs_gradients, takes_kernel
from kernels.linear import reference as linear_reference
from kernels.linear.api import Activations, QuantisedRows
from kernels.modulate import reference


def modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    index: Tensor | None = None,
    eps: float = 1e-6,
    quantise: torch.dtype | None = None,
) -> Activations:
    """LayerNorm of x without affine, times (1 + scale), plus shift."""
    _check(x, index, shift, scale)
    if backend(x, shift, scale, makes=quantise) == "reference":
        return _modulated(x, shift, scale, index, eps, quantise)
    return _activations(x, _modulate(x, None, None, shift, scale, index, eps, False, quantise), quantise)


def add_gated(x: Tensor, gate: Tensor | None, update: Tensor, *, index: Tensor | None = None) -> Tensor:
    """x + gate * update; without a gate x + update."""
    _check(x, index, *(() if gate is None else (gate,)))
    if backend(x, update, gate) == "reference":
        return reference.add_gated(x, gate, update, index)
    return _modulate(x, gate, update, None, None, index, 0.0, False, None)[0]


def add_gated_modulate(
    x: Tensor,
    gate: Tensor | None,
    update: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    index: Tensor | None = None,
    eps: float = 1e-6,
    quantise: torch.dtype | None = None,
) -> tuple[Tensor, Activations]:
    """(y, modulate(y, shift, scale)) with y = add_gated(x, gate, update), reading x and update once.

    gate, shift and scale have the same F.
    """
    _check(x, index, shift, scale, *(() if gate is None else (gate,)))
    if backend(x, update, gate, shift, scale, makes=quantise) == "reference":
        y = reference.add_gated(x, gate, update, index)
        return y, _modulated(y, shift, scale, index, eps, quantise)
    made = _modulate(x, gate, update, shift, scale, index, eps, False, quantise)
    return made[0], _activations(x, made, quantise)


def add_gated_norm(
    x: Tensor,
    gate: Tensor,
    update: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    index: Tensor | None = None,
    eps: float = 1e-6,
    quantise: torch.dtype | None = None,
) -> tuple[Tensor, Activations]:
    """(y, LayerNorm of y with weight and bias [C]) with y = add_gated(x, gate, update)."""
    _check(x, index, gate)
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} do not fit x {tuple(x.shape)}")
    if backend(x, update, gate, weight, bias, makes=quantise) == "reference":
        y = reference.add_gated(x, gate, update, index)
        if quantise is None:
            return y, reference.layer_norm(y, weight, bias, eps)
        return y, _quantised(reference.layer_norm(y, weight, bias, eps, torch.float32), quantise, x.dtype)
    made = _modulate(x, gate, update, bias, weight, index, eps, True, quantise)
    return made[0], _activations(x, made, quantise)


def backend(
    x: Tensor, *others: Tensor | None, makes: torch.dtype | None = None
) -> Literal["triton", "reference"]:
    """What runs: the kernel where Triton runs, the reference elsewhere, for gradients, and for types it does not
    have."""
    return "triton" if takes_kernel(x, *others, makes=makes) and not needs_gradients(x, *others) else "reference"


@torch.library.custom_op("longtake::modulate", mutates_args=())
def _modulate(
    x: Tensor,
    gate: Tensor | None,
    update: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    index: Tensor | None,
    eps: float,
    affine: bool,
    quantise: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel as an operator of torch.compile: the sum, its norm, and the norm's scale; empty if not wanted."""
    from kernels.modulate import triton_impl

    made = triton_impl.launch(x, gate, update, shift, scale, index, eps, affine=affine, quantise=quantise)
    summed, out, row_scale = (x.new_empty(0) if tensor is None else tensor for tensor in made)
    return summed, out, row_scale


@_modulate.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, update, shift, *_, quantise = arguments
    summed = x.new_empty(0 if update is None else x.shape)
    out = x.new_empty(0) if shift is None else x.new_empty(x.shape, dtype=quantise or x.dtype)
    return summed, out, x.new_empty(0) if quantise is None else x.new_empty(x.shape[:2], dtype=torch.float32)


def _activations(x: Tensor, made: tuple[Tensor, Tensor, Tensor], quantise: torch.dtype | None) -> Activations:
    return made[1] if quantise is None else QuantisedRows(made[1], made[2], x.dtype)


def _modulated(
    x: Tensor, shift: Tensor, scale: Tensor, index: Tensor | None, eps: float, quantise: torch.dtype | None
) -> Activations:
    if quantise is None:
        return reference.modulate(x, shift, scale, index, eps)
    return _quantised(reference.modulate(x, shift, scale, index, eps, torch.float32), quantise, x.dtype)


@torch.no_grad()
def _quantised(normed: Tensor, quantise: torch.dtype, dtype: torch.dtype) -> QuantisedRows:
    return QuantisedRows(*linear_reference.quantise_rows(normed, quantise), dtype)


def _check(x: Tensor, index: Tensor | None, *rows: Tensor) -> None:
    b, n, c = x.shape
    frames = {row.shape[1] for row in rows}
    if any(row.shape[0] != b or row.shape[2] != c for row in rows) or len(frames) > 1:
        raise ValueError(f"modulation of shapes {[tuple(row.shape) for row in rows]} does not fit x {tuple(x.shape)}")
    if index is not None and index.shape != (n,):
        raise ValueError(f"index: shape {tuple(index.shape)}, wanted one row for each of {n} tokens")
    if index is None and any(n % count for count in frames):
        raise ValueError(f"{n} tokens do not divide into {frames} frames; give an index")
