"""Linear layers with quantised weights in plain torch: the meaning, and the path without CUDA.

Legend: M rows of x (all leading dimensions), K inputs, N outputs. Weights are symmetric with one scale for each
output: weight = weight_q * weight_scale[:, None].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_INT8 = 127.0
LARGEST_FP8 = 448.0

# Bytes of expanded weight that exist at a time: they stay in the processor's cache.
_EXPANDED_BYTES = 8 * 2**20
# The same on a GPU, where a product of fewer outputs would not fill the card.
_EXPANDED_BYTES_CUDA = 32 * 2**20


def quantise_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [...,K] -> values [...,K] in `dtype` (int8 or fp8 e4m3), and fp32 scale [...] = max|x| / largest; a row of
    zeros gets 1."""
    fp8 = dtype == torch.float8_e4m3fn
    largest = LARGEST_FP8 if fp8 else LARGEST_INT8
    rows = x.float()
    scale = rows.abs().amax(-1) / largest
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    scaled = (rows / scale[..., None]).clamp(-largest, largest)
    return (scaled if fp8 else scaled.round()).to(dtype), scale


def multiply(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Rows values [M,K] with scale [M] times weight [N,K] of the same type; sums are exact for int8, fp32 for fp8."""
    # int8: 2^24 is passed from K = 1041 on, fp32 would round.
    work = torch.float64 if weight.dtype == torch.int8 else torch.float32
    product = values.to(work) @ weight.to(work).t()
    out = product.float() * scale[:, None] * weight_scale.float()
    return (out if bias is None else out + bias.float()).to(dtype)


def linear_weight_only(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [M,K] times int8 weight [N,K], expanded a few rows at a time; the scale is applied to the product."""
    step = max(1, _EXPANDED_BYTES // (weight.shape[1] * x.element_size()))
    out = torch.cat([F.linear(x, part.to(x.dtype)) for part in weight.split(step)], dim=1)
    out = out * weight_scale.to(x.dtype)
    return out if bias is None else out + bias.to(x.dtype)


def linear_expanded(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The same for many rows on a GPU, where it costs next to nothing to bring a part of the weight to the type of x:
    the product, by far the longer, is then torch's own. The scale goes into the part."""
    (m, k), n = x.shape, weight.shape[0]
    step = min(n, max(1, _EXPANDED_BYTES_CUDA // (k * x.element_size())))
    out, room = x.new_empty(m, n), x.new_empty(step, k)
    for first in range(0, n, step):
        part = slice(first, min(n, first + step))
        wide = torch.mul(weight[part], weight_scale[part, None].float(), out=room[: part.stop - first])
        if bias is None:
            torch.mm(x, wide.t(), out=out[:, part])
        else:
            torch.addmm(bias[part].to(x.dtype), x, wide.t(), out=out[:, part])
    return out
