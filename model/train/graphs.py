"""Steps of a training on a GPU, recorded once for each shape and replayed.

The bundled network is so small that launching its kernels takes several times as long as running them. A CUDA graph
launches all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn


class Replayed:
    """Calls `compute(module, setting, *inputs)` -> loss, as a graph for each setting and shapes of inputs.

    Gradients flow to the parameters of `module` and to inputs that want one. A loss must be used, backward included,
    before the next call.
    """

    def __init__(self, module: nn.Module, compute: Callable[..., Tensor]) -> None:
        self.module, self.compute = module, compute
        self.recorded: dict[tuple[Any, ...], Callable[..., Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, setting: int, *inputs: Tensor) -> Tensor:
        key = (setting, *((tuple(x.shape), x.dtype, x.requires_grad) for x in inputs))
        if key not in self.recorded:
            like = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
            made = torch.cuda.make_graphed_callables(_Call(self.module, self.compute, setting), like, pool=self.pool)
            self.recorded[key] = cast("Callable[..., Tensor]", made)
        return self.recorded[key](*inputs)


class _Call(nn.Module):
    def __init__(self, module: nn.Module, compute: Callable[..., Tensor], setting: int) -> None:
        super().__init__()
        self.module, self.compute, self.setting = module, compute, setting

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.compute(self.module, self.setting, *inputs)
