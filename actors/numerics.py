"""The numerics record: everything that can change a bit of the film besides the plan.

A render pins it when it starts and refuses to go on under another one, unless asked to. What need not differ between
machines is made the same instead (`settle_numerics`).
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kernels.dispatch import backend_of, dense_attention, dense_of_torch
from pipeline.media_child import find_ffmpeg
from pipeline.tasks import RECIPE_VERSION

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "triton")
CPU_INFORMATION = Path("/proc/cpuinfo")
CUDA_CHOICES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUBLASLT_WORKSPACE_SIZE",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "TORCH_CUDNN_USE_HEURISTIC_MODE_B",
)
"""Variables of the environment by which cuBLAS and cuDNN choose among algorithms that sum in different orders."""

CPU_CHOICES = (
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "OPENBLAS_CORETYPE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
)
"""The same for CPUs: MKL on x86-64, OpenBLAS and oneDNN (which may compute fp32 in bf16 then) on ARM."""


def settle_numerics() -> None:
    """Have torch compute alike everywhere, whatever the environment says: fp32 in fp32 (in NVIDIA's images it is TF32,
    by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE), and with no algorithm of cuDNN that was chosen by its time, or that sums in
    another order each time.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def describe_numerics(
    device: str, dtype: str, threads: int, ffmpeg: str | None, encoder_threads: int, gang_size: int
) -> dict[str, Any]:
    """The record of this process, JSON-able. `gang_size`: how many compute each segment of the render together."""
    record = {
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
    if device == "cuda":
        return {**record, "cuda": _describe_cuda(dtype)}
    chosen = {name: os.environ[name] for name in CPU_CHOICES if name in os.environ}
    return {**record, "cpu": chosen} if chosen else record


def _describe_cuda(dtype: str) -> dict[str, Any]:
    """What torch computes with on a GPU: its wheels' versions do not say it, and cuDNN may be another than theirs."""
    # Torch's own way serves attention to the text also where the kernel of this project has that to the video.
    attention = {
        "dense_attention": dense_attention("cuda", getattr(torch, dtype)),
        "torch_attention": dense_of_torch("cuda", getattr(torch, dtype)),
    }
    chosen = {name: os.environ[name] for name in CUDA_CHOICES if name in os.environ}
    cudnn: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return {"toolkit": torch.version.cuda, "cudnn": cudnn, **attention, **chosen}


def device_kind(device: str) -> str:
    """What the kernels are chosen by: the GPU's model, or the CPU's vector instructions and its model. MKL takes others
    for each maker and cuts products by the size of caches, OpenBLAS and Apple's library have others for each core, and
    the latter changes with macOS.
    """
    if device == "cuda":
        return f"cuda {torch.cuda.get_device_name()}"
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_core()}"


def _core() -> str:
    """The CPU's model: `Apple M2 Pro, macOS 15.1`; on Linux `AuthenticAMD 25 17` (maker, family, model), or the numbers
    of maker and core, `0x41 0xd4f`.
    """
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return f"{said.strip()}, macOS {platform.mac_ver()[0]}"
    said = CPU_INFORMATION.read_text()
    if x86 := re.findall(r"^(?:vendor_id|cpu family|model)\s*: (\S+)", said, re.MULTILINE):
        return " ".join(x86[:3])
    return " ".join(sorted(set(re.findall(r"^CPU (?:implementer|part)\s*: (\S+)", said, re.MULTILINE))))


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "absent"
