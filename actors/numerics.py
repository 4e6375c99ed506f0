"""The numerics record: everything that can change a bit of the film besides the plan.

A render pins it when it starts and refuses to go on under another one, unless asked to.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from kernels.dispatch import backend_of
from pipeline.media_child import find_ffmpeg
from pipeline.tasks import RECIPE_VERSION

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "triton")


def describe_numerics(
    device: str, dtype: str, threads: int, ffmpeg: str | None, encoder_threads: int, gang_size: int
) -> dict[str, Any]:
    """The record of this process, JSON-able. `gang_size`: how many compute each segment of the render together."""
    return {
        "recipe": RECIPE_VERSION,
        "device": device_kind(device),
        "dtype": dtype,
        "attention_backend": backend_of(device),
        "threads": threads,
        "gang_size": gang_size,
        "libraries": {name: _version(name) for name in LIBRARIES},
        "ffmpeg": find_ffmpeg(ffmpeg).version,
        "encoder_threads": encoder_threads,
    }


def device_kind(device: str) -> str:
    """What the kernels are chosen by: the GPU's model, or the CPU's vector instructions."""
    if device == "cuda":
        return f"cuda {torch.cuda.get_device_name()}"
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "absent"
