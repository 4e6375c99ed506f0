"""Linear layers with quantised weights. None of them trains: there are no gradients.

Shapes: x [..., K], weight [N,K] contiguous, weight_scale [N] (weight = weight_q * scale by output row), bias [N]
or None; returns [..., N]. Activations are quantised with one scale for each row, by `quantise_rows` or within the
kernel that makes them (modulate, swiglu). `backend` says what runs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import INTERPRETED, capability, has_descriptors, has_gluon, takes_kernel
from kernels.linear import reference

Backend = Literal["gluon", "triton_tma", "triton", "scaled_mm", "expanded", "reference"]
QUANTISED_TYPES = (torch.int8, torch.float8_e4m3fn)

# A weight-only product of so many rows is limited by computing, where torch's own kernels are the fastest; one of fewer
# by reading the weight, which the Triton kernel reads in int8.
MANY_ROWS = 2048


class QuantisedRows(NamedTuple):
    """Activations with one scale for each row: values [..., K] in int8 or fp8 (e4m3), fp32 scale [...], and the type
    that stands for (and that a product of them has)."""

    values: Tensor
    scale: Tensor
    dtype: torch.dtype


Activations = Tensor | QuantisedRows


@torch.no_grad()
def quantise_rows(x: Tensor, dtype: torch.dtype) -> QuantisedRows:
    """x [..., K] by rows in `dtype` (int8 or float8_e4m3fn): scale = max|x| / largest value, a row of zeros gets 1."""
    if dtype not in QUANTISED_TYPES:
        raise ValueError(f"dtype: {dtype}, wanted one of {QUANTISED_TYPES}")
    values, scale = _quantise_rows(x, dtype) if takes_kernel(x, makes=dtype) else reference.quantise_rows(x, dtype)
    return QuantisedRows(values, scale, x.dtype)


@torch.no_grad()
def linear_quantised(
    x: Activations, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """A product in the type of the weight, int8 or fp8 (e4m3), to which the rows of x are brought if they are not
    quantised already. int8 sums are exact."""
    rows = quantise_rows(x, weight.dtype) if isinstance(x, Tensor) else x
    _check(rows.values, weight, weight_scale)
    if rows.values.dtype != weight.dtype or rows.scale.shape != rows.values.shape[:-1]:
        raise ValueError(f"x: {rows.values.dtype} with scale {tuple(rows.scale.shape)}, the weight is {weight.dtype}")
    values, scale, chosen = rows.values.flatten(0, -2), rows.scale.flatten(), backend(rows, weight)
    if chosen == "reference":
        out = reference.multiply(values, scale, weight, weight_scale, bias, rows.dtype)
    elif chosen == "scaled_mm":
        out = _multiply_fp8(values, scale, weight, weight_scale, bias).to(rows.dtype)
    else:
        out = _multiply_int8(values, scale, weight, weight_scale, bias, rows.dtype)
    return out.unflatten(0, rows.values.shape[:-1])


@torch.no_grad()
def linear_weight_only(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """int8 weight, products in the type of x; at most a part of the weight exists in that type."""
    _check(x, weight, weight_scale)
    if weight.dtype != torch.int8:
        raise ValueError(f"weight: {weight.dtype}, wanted int8")
    call = _weight_only if takes_kernel(x) else reference.linear_weight_only
    out: Tensor = call(x.flatten(0, -2), weight, weight_scale, bias)
    return out.unflatten(0, x.shape[:-1])


def quantise_weight_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N,K] -> fp8 e4m3 [N,K] and fp32 scale [N]."""
    return reference.quantise_rows(weight, torch.float8_e4m3fn)


def backend(x: Activations, weight: Tensor) -> Backend:
    """What runs for these activations and this weight; activations that are a tensor are those of a weight-only product
    where the weight is int8.

    int8: the kernel for Hopper in Gluon where both are int8, K is a multiple of 16, N of 8 and the result 16 bits wide;
    else the Triton kernels where Triton runs, with TMA descriptors where the device has them (and rows are 16-byte
    aligned); weight-only from MANY_ROWS on: torch's product with parts of the weight, "expanded". fp8: cuBLAS
    (`torch._scaled_mm`) from compute capability 8.9 on, where K and N are multiples of 16. The reference elsewhere.
    """
    values = x if isinstance(x, Tensor) else x.values
    if weight.dtype == torch.int8:
        if not takes_kernel(values.new_empty(0, dtype=x.dtype)):
            return "reference"
        if isinstance(x, Tensor) and x.numel() >= MANY_ROWS * x.shape[-1]:
            return "expanded"
        if not isinstance(x, Tensor) and _fits_gluon(values, weight, x.dtype):
            return "gluon"
        return "triton_tma" if has_descriptors(values) else "triton"
    fits = values.is_cuda and not INTERPRETED and all(size % 16 == 0 for size in weight.shape)
    return "scaled_mm" if fits and capability(values) >= (8, 9) else "reference"


def _fits_gluon(values: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    n, k = weight.shape
    wide = dtype in (torch.bfloat16, torch.float16)
    return wide and k % 16 == 0 and n % 8 == 0 and has_gluon(capability(values))


def _multiply_fp8(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    # Row-wise scaling gives bf16 only.
    return torch._scaled_mm(
        values,
        weight.t(),
        scale_a=scale[:, None],
        scale_b=weight_scale.float()[None, :],
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
    )


@torch.library.custom_op("longtake::quantise_rows", mutates_args=())
def _quantise_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    from kernels.linear import triton_impl

    values, scale = triton_impl.quantise_rows(x.flatten(0, -2), dtype)
    return values.view(x.shape), scale.view(x.shape[:-1])


@_quantise_rows.register_fake
def _(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("longtake::multiply_int8", mutates_args=())
def _multiply_int8(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if _fits_gluon(values, weight, dtype):
        from kernels.linear import gluon_impl

        return gluon_impl.multiply(values, scale, weight, weight_scale, bias, dtype)
    from kernels.linear import triton_impl

    tma = has_descriptors(values)
    return triton_impl.multiply_int8(values, scale, weight, weight_scale, bias, dtype, descriptors=tma)


@_multiply_int8.register_fake
def _(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return values.new_empty(values.shape[0], weight.shape[0], dtype=dtype)


@torch.library.custom_op("longtake::linear_weight_only", mutates_args=())
def _weight_only(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    if backend(x, weight) == "expanded":
        return reference.linear_expanded(x, weight, weight_scale, bias)
    from kernels.linear import triton_impl

    return triton_impl.linear_weight_only(x, weight, weight_scale, bias, descriptors=has_descriptors(x))


@_weight_only.register_fake
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _check(x: Tensor, weight: Tensor, weight_scale: Tensor) -> None:
    fits = weight.dtype in QUANTISED_TYPES and weight.shape[1] == x.shape[-1] and weight_scale.shape == weight.shape[:1]
    if not fits:
        raise ValueError(
            f"weight {weight.dtype} {tuple(weight.shape)} with scale {tuple(weight_scale.shape)} does not fit "
            f"x {tuple(x.shape)}; wanted int8 or fp8 [outputs, inputs] and one scale for each output"
        )
