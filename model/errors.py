"""Errors of the model room.

    ModelError
    |-- CheckpointError   a folder or file is not a usable checkpoint; .problems lists each finding by name
    |-- InputError        the caller asked for something impossible (shape, range, combination)
    |-- NumericsError     the result holds NaN or Inf
    `-- Interrupted       a stop was asked for between two denoising steps; carries what is needed to go on

Callers above this room (actors) map them to their own tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class ModelError(Exception):
    """Anything the model room raises on purpose."""


class CheckpointError(ModelError):
    """A checkpoint that cannot be used. `problems` has one line for each finding."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems: list[str] = list(problems)
        super().__init__("\n  ".join([message, *self.problems]))


class InputError(ModelError):
    """A request that cannot be met, with the field, the value and what would be right."""


class NumericsError(ModelError):
    """A result with NaN or Inf."""


class Interrupted(ModelError):
    """A stop was requested; `steps_done` steps are in `latents`, resume with start_step=steps_done."""

    def __init__(self, steps_done: int, latents: Tensor) -> None:
        self.steps_done = steps_done
        self.latents = latents
        super().__init__(f"stopped after {steps_done} denoising steps")
