"""The gate of a SwiGLU network: silu(a) * b."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from torch import Tensor

from kernels.swiglu import reference


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b for two tensors [..., C] of one shape and type, which may be halves of one product."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"a is {a.dtype} {tuple(a.shape)}, b is {b.dtype} {tuple(b.shape)}: they must agree")
    if backend(a, b) == "reference":
        return reference.swiglu(a, b)
    from kernels.swiglu import triton_impl

    return triton_impl.swiglu(a, b)


def backend(a: Tensor, b: Tensor) -> Literal["triton", "reference"]:
    """What runs: the kernel on CUDA, the reference elsewhere, for gradients, and for types it does not have."""
    trained = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    fits = a.dtype in (torch.float16, torch.bfloat16, torch.float32) and a.stride(-1) == b.stride(-1) == 1
    return "triton" if a.is_cuda and fits and not trained and importlib.util.find_spec("triton") else "reference"
