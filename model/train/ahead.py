"""Batches drawn ahead of the steps that need them, in processes of their own.

A GPU learns from films faster than one core draws them. A batch depends on the number of its step alone, so a run is
the same however many processes draw for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

Batch = TypeVar("Batch")

_MOST = 14
_EACH_AHEAD = 3


class Ahead(Generic[Batch]):
    """Gives `draw(step)` for each of `steps`, in their order. `draw` must not touch a GPU."""

    def __init__(self, draw: Callable[[int], Batch], steps: Sequence[int], device: str) -> None:
        self.draw, self.steps = draw, iter(steps)
        count = processes_for(device)
        self.drawn: Iterator[Batch] | None = None
        if count and steps:
            loader = DataLoader(
                _Drawn(draw), batch_size=None, sampler=steps, num_workers=count, prefetch_factor=_EACH_AHEAD
            )
            self.drawn = iter(loader)

    def take(self, step: int) -> Batch:
        """The batch of `step`. ValueError if it is not the next one."""
        if step != (due := next(self.steps, None)):
            raise ValueError(f"step {step} was asked for, {due} comes next")
        return self.draw(step) if self.drawn is None else next(self.drawn)


class _Drawn(Dataset[Batch]):
    def __init__(self, draw: Callable[[int], Batch]) -> None:
        self.draw = draw

    def __getitem__(self, step: int) -> Batch:
        return self.draw(step)


def processes_for(device: str) -> int:
    """How many processes draw for a training on `device`: none for one on the cores that they would take."""
    return min(_MOST, max(1, (os.cpu_count() or 1) - 2)) if device.startswith("cuda") else 0
