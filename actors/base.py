"""What every actor gets and hands back, and the one place where model errors become pipeline errors.

An actor is a plain class: `setup(context)` loads the models of its role, `run(order)` computes one task and
returns what it wrote under its attempt name, `close()` lets the models go. It never commits. One thread at a
time uses an actor; only `context.stop` and `context.report` cross threads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from actors.gang import Gang
from model import errors as model_errors
from model.manifest import is_checkpoint
from pipeline.errors import (
    CheckpointFault,
    CorruptArtifact,
    DeviceError,
    Interrupted,
    MediaError,
    OutOfMemory,
    PermanentError,
    QualityError,
    StoreFull,
)
from pipeline.media_child import Ffmpeg
from pipeline.params import MediaParams, WeightsParams, media_file
from pipeline.spec import Memory
from pipeline.store import Store
from pipeline.tasks import ArtifactFile, Order, Produced, Role

CARD_REMEDY = (
    "If nothing else uses the card, it is too small for this role: `longtake plan` says what each role needs, and "
    "`memory: {precision: weight_only, networks: in_turn, condition_cache: host}` in the storyboard makes it less."
)


@dataclass(frozen=True)
class ActorContext:
    """Everything an actor may depend on besides its order."""

    store: Store
    checkpoint_path: Path
    role: Role
    weights: WeightsParams | None
    """What the role's denoising tasks run with; None for roles without a DiT, or where nothing is left to
    denoise.
    """
    device: str
    dtype: torch.dtype
    ffmpeg: Ffmpeg
    encoder_threads: int
    scratch_path: Path
    """A folder of the worker's own; each order gets a fresh folder below it."""
    memory: Memory = field(default_factory=Memory)
    """What the transformer's weights become, and what leaves the device while it denoises."""
    gang: Gang | None = None
    """The other members, where each segment is computed by several processes together."""
    stop: Event = field(default_factory=Event)
    report: Callable[[int, int], None] = lambda steps, frames: None
    """Told the running order's steps and frames done so far."""
    saved: Callable[[ArtifactFile, int], None] = lambda partial, steps: None
    """Told of a denoising state saved under `partials/`, and its steps."""


class Actor(Protocol):
    """The interface of every actor."""

    def setup(self, context: ActorContext) -> None:
        """Load the role's models. Raises CheckpointFault, OutOfMemory."""

    def run(self, order: Order) -> Produced:
        """Compute one task. Raises errors of pipeline.errors only for what is foreseen."""

    def close(self) -> None:
        """Let the models go."""


@contextlib.contextmanager
def mapped_errors() -> Iterator[None]:
    """Turn errors of the model room and of torch into the pipeline's."""
    try:
        yield
    except model_errors.CheckpointError as error:
        raise CheckpointFault(str(error)) from error
    except model_errors.NumericsError as error:
        raise QualityError(str(error)) from error
    except model_errors.Interrupted as error:
        raise Interrupted(str(error)) from error
    except model_errors.ModelError as error:
        # The plan made this request, so a refusal by the model is a mistake of the plan and cannot pass.
        raise PermanentError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"{error} {CARD_REMEDY}") from error
    except MemoryError as error:
        raise OutOfMemory(str(error)) from error
    except RuntimeError as error:
        # What torch, Triton, cuBLAS, cuDNN and NCCL raise.
        raise DeviceError(f"{type(error).__name__}: {error}") from error
    except (OSError, MediaError) as error:
        if not is_full(error):
            raise
        raise StoreFull(f"no space left in the worker's scratch folder: {error}") from error


def is_full(error: OSError | MediaError) -> bool:
    """Whether a full disk is behind it; ffmpeg says so only in words."""
    if isinstance(error, MediaError):
        return os.strerror(errno.ENOSPC) in str(error)
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def check_same_checkpoint(folder: Path, digest: str) -> None:
    """Whether this machine has the checkpoint that was planned with, after which all that is computed is named.

    Raises CheckpointFault.
    """
    with mapped_errors():
        if is_checkpoint(folder, digest):
            return
    message = f"on {socket.gethostname()} is another one than was planned with ({digest[:12]}...)"
    remedy = "Put the same files there on every machine; if they were replaced meanwhile, run the command again."
    raise CheckpointFault(message, field="checkpoint", value=str(folder), remedy=remedy)


@contextlib.contextmanager
def scratch_folder(context: ActorContext) -> Iterator[Path]:
    """A folder that is gone afterwards, whatever happens."""
    context.scratch_path.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=context.scratch_path))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def order_inputs(context: ActorContext, order: Order, scratch: Path) -> list[dict[str, Tensor]]:
    """The tensors of each input artifact, by position in the task's inputs."""
    return [read_tensors(context, order.inputs[task_id], scratch) for task_id in order.task.inputs]


def open_media(context: ActorContext, media: MediaParams, scratch: Path) -> Path:
    """A file that the user named, by its content. Raises CorruptArtifact if the store has it no longer."""
    path = media_file(media)
    found = context.store.head(path)
    if found is None:
        raise CorruptArtifact(f"{path}: not in the store; run the same command again to put it there")
    file = ArtifactFile(Path(path).name, path, found.size_bytes, media["sha256"])
    return context.store.open_local(file, scratch)


def merged_loras(context: ActorContext, weights: WeightsParams, scratch: Path) -> list[tuple[Path, float]]:
    """The LoRA files that `weights` merges, in order, with their strengths."""
    return [
        (
            open_media(context, lora["media"], scratch)
            if lora["media"]
            else context.checkpoint_path / str(lora["file"]),
            lora["strength"],
        )
        for lora in weights["loras"]
    ]


def read_tensors(context: ActorContext, files: tuple[ArtifactFile, ...], scratch: Path) -> dict[str, Tensor]:
    """The tensors of an input's safetensors file, its bytes verified. Raises CorruptArtifact."""
    file = next(file for file in files if file.name.endswith(".safetensors"))
    local = context.store.open_local(file, scratch)
    try:
        # A copy in memory: the file may be a hard link into the store and must never be written through a
        # map.
        return {name: tensor.clone() for name, tensor in load_file(local).items()}
    except (SafetensorError, OSError) as error:
        raise CorruptArtifact(f"{file.path}: unreadable: {error}", file.path) from error


def write_tensors(context: ActorContext, path: str, tensors: Mapping[str, Tensor]) -> ArtifactFile:
    """Put tensors as one safetensors file into the store at `path`."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return context.store.write_attempt(path, save(contiguous))


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._start_s


def produced(
    files: tuple[ArtifactFile, ...], watch: Stopwatch, measures: Mapping[str, float] | None = None
) -> Produced:
    """The answer to an order."""
    return Produced(files, dict(measures or {}), watch.seconds(), socket.gethostname())


def check_stop(context: ActorContext) -> None:
    """Raise Interrupted if a stop was asked for."""
    if context.stop.is_set():
        raise Interrupted()
