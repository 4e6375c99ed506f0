"""int8 weights: symmetric for each output row, scale = max|w| / 127, every Linear but `final_layer.linear`.

Files hold `weight_int8` [out,in], `weight_scale` [out] and a bf16 `bias` in place of `weight` and `bias`.
Products are computed in the type of the input with weights expanded on the fly: int8 saves memory, not
arithmetic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_KEPT_IN_FULL = "final_layer.linear"
_LARGEST = 127


class QuantLinear(nn.Module):
    """A Linear with int8 weights. Holds buffers only: it does not train."""

    weight_int8: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight_int8: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight_int8", weight_int8)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_int8.to(x.dtype) * self.weight_scale.to(x.dtype)[:, None]
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out,in] -> int8 [out,in] and fp32 scale [out]. A row of zeros gets scale 1."""
    rows = weight.float()
    scale = rows.abs().amax(dim=1) / _LARGEST
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (rows / scale[:, None]).round().clamp(-_LARGEST, _LARGEST).to(torch.int8), scale


@torch.no_grad()
def quantize_(model: nn.Module) -> None:
    """Replace the Linears of `model` in place. On the meta device this only makes the structure that int8
    files fill."""
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or path == _KEPT_IN_FULL:
            continue
        bias = None if module.bias is None else module.bias.detach().to(torch.bfloat16)
        model.set_submodule(path, QuantLinear(*quantize_weight(module.weight), bias))
