"""Modules that make room on the card while something else computes there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def set_aside(module: nn.Module) -> Iterator[None]:
    """Keep a frozen module in host memory for as long as the block lasts, and bring it back where it was afterwards.

    Its tensors on the device are given up, not only copied. On a CPU they move as well, from memory to memory: the
    path is the same one, and nobody who holds the old tensors notices a difference in their values.
    """
    device = next(module.parameters()).device
    _move(module, torch.device("cpu"))
    try:
        yield
    finally:
        _move(module, device)


def _move(module: nn.Module, device: torch.device) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.to(device, copy=True)
