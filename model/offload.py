"""Two networks of a role that are on the device one after the other: the other one waits in host memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class Guest:
    """A frozen module whose home is host memory, and which comes to a device for a while.

    What it holds on the device when this is made, and after each visit, is given up. On a CPU the tensors move as well,
    from memory to memory: there is one path, and nobody notices a difference in their values.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        self._home = [(tensor, tensor.data.cpu()) for tensor in (*module.parameters(), *module.buffers())]
        self.leave()

    def come(self) -> None:
        """Be on the device."""
        for tensor, home in self._home:
            tensor.data = home.to(self._device, copy=True)

    def leave(self) -> None:
        """Be in host memory."""
        for tensor, home in self._home:
            tensor.data = home


class Turns:
    """The VAE is on the device, but for the time in which the transformer denoises."""

    def __init__(self, dit: nn.Module, vae: nn.Module, device: torch.device) -> None:
        self._dit, self._vae = Guest(dit, device), Guest(vae, device)
        self._vae.come()

    @contextlib.contextmanager
    def denoising(self) -> Iterator[None]:
        """The transformer's turn."""
        self._vae.leave()
        try:
            self._dit.come()
            yield
        finally:
            self._dit.leave()
            self._vae.come()
