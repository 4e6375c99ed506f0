"""Linears with quantised weights: int8 as it is stored, or fp8 made when the weights are loaded.

int8 is symmetric for each output row, scale = max|w| / 127, every Linear but `final_layer.linear`. Files hold
`weight_int8` [out,in], `weight_scale` [out] and a bf16 `bias` in place of `weight` and `bias`. How products are made
is another matter (`Products`):

- "weight_only": in the type of the input, int8 widened tile by tile: saves memory, not arithmetic. Any device. Every
  Linear that files would hold as int8.
- "int8", "fp8": the input is rounded too, with one scale for each row, and the large Linears of the blocks multiply
  in that type: faster where the chip is (int8: compute capability 8.0, fp8: 8.9). Small Linears stay as they are.
"""

from __future__ import annotations

import re
from typing import Literal

import torch
from torch import Tensor, nn

from kernels.dispatch import capability
from kernels.linear.api import Activations, linear_quantised, linear_weight_only, quantise_weight_fp8
from kernels.linear.reference import quantise_rows
from model.errors import InputError

Products = Literal["weight_only", "int8", "fp8"]

_KEPT_IN_FULL = "final_layer.linear"
# The Linears over video tokens: all else costs next to nothing, and modulation wants its digits.
_LARGE = re.compile(r"blocks\.\d+\.(attn\.(qkv|proj)|cross_attn\.(q_linear|proj)|ffn\.w[123])")


class QuantLinear(nn.Module):
    """A Linear with int8 weights. Holds buffers only: it does not train, and passes no gradient.

    `activations`: torch.int8 where the input is rounded too, None for weight-only.
    """

    weight_int8: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight_int8: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.activations: torch.dtype | None = None
        self.register_buffer("weight_int8", weight_int8)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Activations) -> Tensor:
        if self.activations is None and isinstance(x, Tensor):
            return linear_weight_only(x, self.weight_int8, self.weight_scale, self.bias)
        return linear_quantised(x, self.weight_int8, self.weight_scale, self.bias)


class Fp8Linear(nn.Module):
    """A Linear with fp8 (e4m3) weights and inputs. Not stored in files."""

    weight_fp8: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight_fp8: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.activations = torch.float8_e4m3fn
        self.register_buffer("weight_fp8", weight_fp8)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Activations) -> Tensor:
        return linear_quantised(x, self.weight_fp8, self.weight_scale, self.bias)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out,in] -> int8 [out,in] and fp32 scale [out]. A row of zeros gets scale 1."""
    return quantise_rows(weight, torch.int8)


@torch.no_grad()
def quantize_(model: nn.Module) -> None:
    """Replace the Linears of `model` by weight-only int8 ones, in place. On the meta device this only makes the
    structure that int8 files fill."""
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or path == _KEPT_IN_FULL:
            continue
        model.set_submodule(path, QuantLinear(*quantize_weight(module.weight), _small_bias(module)))


@torch.no_grad()
def choose_products_(model: nn.Module, products: Products) -> None:
    """Let the Linears of `model` (the large ones, but for "weight_only") multiply in another type, in place.

    Raises InputError where that cannot be: fp8 needs weights in floating point, and on CUDA compute capability 8.9.
    """
    check_products(products, next(model.parameters()).device)
    for path in [path for path, _ in model.named_modules()]:
        choose_product_(model, path, products)


def check_products(products: Products, device: torch.device) -> None:
    """Raise InputError where a device cannot multiply like that."""
    if products != "fp8" or device.type != "cuda":
        return
    able = capability(torch.empty(0, device=device))
    if able < (8, 9):
        raise InputError(f"products: fp8 needs compute capability 8.9, this GPU has {able}")


@torch.no_grad()
def choose_product_(model: nn.Module, path: str, products: Products) -> None:
    """What `choose_products_` does to one module, which may be one that stays as it is."""
    module = model.get_submodule(path)
    is_concerned = path != _KEPT_IN_FULL if products == "weight_only" else _LARGE.fullmatch(path) is not None
    if not is_concerned or not isinstance(module, (nn.Linear, QuantLinear, Fp8Linear)):
        return
    if isinstance(module, nn.Linear) and products == "fp8":
        model.set_submodule(path, Fp8Linear(*quantise_weight_fp8(module.weight), _small_bias(module)))
        return
    if isinstance(module, nn.Linear):
        module = QuantLinear(*quantize_weight(module.weight), _small_bias(module))
        model.set_submodule(path, module)
    if not isinstance(module, QuantLinear) or products == "fp8":
        raise InputError(f"products: {path} is a {type(module).__name__} and cannot multiply in {products}")
    module.activations = torch.int8 if products == "int8" else None


def _small_bias(linear: nn.Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)
