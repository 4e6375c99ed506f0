"""The gate of a SwiGLU network: silu(a) * b."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels.dispatch import needs_gradients, takes_kernel
from kernels.linear import reference as linear_reference
from kernels.linear.api import QuantisedRows
from kernels.swiglu import reference


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b for two tensors [..., C] of one shape and type, which may be halves of one product."""
    _check(a, b)
    return reference.swiglu(a, b) if backend(a, b) == "reference" else _swiglu(a, b)


@torch.no_grad()
def swiglu_quantised(a: Tensor, b: Tensor, dtype: torch.dtype) -> QuantisedRows:
    """silu(a) * b quantised by rows to `dtype` (int8 or float8_e4m3fn), from fp32 without rounding to the type of a."""
    _check(a, b)
    if backend(a, b, makes=dtype) == "reference":
        values, scale = linear_reference.quantise_rows(reference.swiglu(a.float(), b.float()), dtype)
    else:
        values, scale = _swiglu_quantised(a, b, dtype)
    return QuantisedRows(values, scale, a.dtype)


def backend(a: Tensor, b: Tensor, *, makes: torch.dtype | None = None) -> Literal["triton", "reference"]:
    """What runs: the kernel where Triton runs, the reference elsewhere, for gradients, and for types it does not
    have."""
    return "triton" if takes_kernel(a, b, makes=makes) and not needs_gradients(a, b) else "reference"


@torch.library.custom_op("longtake::swiglu", mutates_args=())
def _swiglu(a: Tensor, b: Tensor) -> Tensor:
    from kernels.swiglu import triton_impl

    return triton_impl.swiglu(a, b)


@_swiglu.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape)


@torch.library.custom_op("longtake::swiglu_quantised", mutates_args=())
def _swiglu_quantised(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    from kernels.swiglu import triton_impl

    return triton_impl.swiglu_quantised(a, b, dtype)


@_swiglu_quantised.register_fake
def _(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape, dtype=dtype), a.new_empty(a.shape[:-1], dtype=torch.float32)


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"a is {a.dtype} {tuple(a.shape)}, b is {b.dtype} {tuple(b.shape)}: they must agree")
