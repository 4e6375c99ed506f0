"""Linear layers with quantised weights. None of them trains: there are no gradients.

Shapes: x [..., K], weight [N,K] contiguous, weight_scale [N] (weight = weight_q * scale by output row), bias [N]
or None; returns [..., N] in the type of x. `backend` says what runs.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from torch import Tensor

from kernels.linear import reference

Backend = Literal["triton_tma", "triton", "scaled_mm", "reference"]


@torch.no_grad()
def linear_int8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """int8 weight, and x quantised to int8 with one scale for each row: integer products, exact sums."""
    _check(x, weight, weight_scale, torch.int8)
    rows, chosen = x.flatten(0, -2), backend(x, weight)
    if chosen == "reference":
        return reference.linear_quantised(rows, weight, weight_scale, bias).unflatten(0, x.shape[:-1])
    from kernels.linear import triton_impl

    tma = chosen == "triton_tma"
    return triton_impl.linear_int8(rows, weight, weight_scale, bias, descriptors=tma).unflatten(0, x.shape[:-1])


@torch.no_grad()
def linear_fp8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """fp8 (e4m3) weight, and x quantised to fp8 with one scale for each row."""
    _check(x, weight, weight_scale, torch.float8_e4m3fn)
    rows = x.flatten(0, -2)
    if backend(x, weight) == "reference":
        return reference.linear_quantised(rows, weight, weight_scale, bias).unflatten(0, x.shape[:-1])
    from kernels.linear import triton_impl

    values, scale = triton_impl.quantise_rows(rows, fp8=True)
    # Row-wise scaling gives bf16 only; other types are cast from it.
    out = torch._scaled_mm(
        values,
        weight.t(),
        scale_a=scale[:, None],
        scale_b=weight_scale.float()[None, :],
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
    )
    return out.to(x.dtype).unflatten(0, x.shape[:-1])


@torch.no_grad()
def linear_weight_only(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """int8 weight, products in the type of x; the wide weight never exists as a whole."""
    _check(x, weight, weight_scale, torch.int8)
    rows, chosen = x.flatten(0, -2), backend(x, weight)
    if chosen == "reference":
        return reference.linear_weight_only(rows, weight, weight_scale, bias).unflatten(0, x.shape[:-1])
    from kernels.linear import triton_impl

    tma = chosen == "triton_tma"
    out = triton_impl.linear_weight_only(rows, weight, weight_scale, bias, descriptors=tma)
    return out.unflatten(0, x.shape[:-1])


def quantise_weight_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N,K] -> fp8 e4m3 [N,K] and fp32 scale [N]."""
    return reference.quantise_rows(weight, fp8=True)


def backend(x: Tensor, weight: Tensor) -> Backend:
    """What runs for x and this weight.

    int8: the Triton kernels on CUDA, with TMA descriptors from compute capability 9.0 on. fp8: cuBLAS
    (`torch._scaled_mm`) from 8.9 on, where K and N are multiples of 16. The reference elsewhere.
    """
    kernel_type = x.dtype in (torch.float16, torch.bfloat16, torch.float32)
    if not (x.is_cuda and kernel_type and x.stride(-1) == 1 and importlib.util.find_spec("triton")):
        return "reference"
    capability = torch.cuda.get_device_capability(x.device)
    if weight.dtype == torch.int8:
        return "triton_tma" if capability >= (9, 0) else "triton"
    fits = all(size % 16 == 0 for size in weight.shape)
    return "scaled_mm" if capability >= (8, 9) and fits else "reference"


def _check(x: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> None:
    if weight.dtype != dtype or weight.shape[1] != x.shape[-1] or weight_scale.shape != weight.shape[:1]:
        raise ValueError(
            f"weight {weight.dtype} {tuple(weight.shape)} with scale {tuple(weight_scale.shape)} does not fit "
            f"x {tuple(x.shape)}; wanted {dtype} [outputs, inputs] and one scale for each output"
        )
