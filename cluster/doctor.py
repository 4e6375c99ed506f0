"""`longtake doctor`: is everything there that a render on this machine needs? One line for each finding; exit
1 if one is bad.
"""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.errors import LongtakeError, first_line

MIN_FREE_BYTES = 1 << 30
GPU_DEVICE = Path("/dev/nvidia0")
"""There wherever NVIDIA's driver is loaded, whether torch can use it or not."""


def print_diagnosis() -> int:
    """Run every check and print what it found."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("python", _python),
        ("libraries", _libraries),
        ("kernels", _kernels_package),
        ("ffmpeg", _ffmpeg),
        ("devices", _devices),
        ("checkpoint", _checkpoint),
        ("disk", _disk),
    ]
    failures = 0
    for name, check in checks:
        try:
            print(f"ok    {name:<11} {check()}")
        except LongtakeError as error:
            failures += 1
            print(f"BAD   {name:<11} {error}")
    return 1 if failures else 0


def _python() -> str:
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        raise LongtakeError(f"{platform.python_version()}, wanted 3.11 or 3.12")
    return platform.python_version()


def _libraries() -> str:
    try:
        return ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "transformers", "numpy"))
    except PackageNotFoundError as error:
        raise LongtakeError(f"{error.name} is not installed; install longtake with its dependencies") from error


def _kernels_package() -> str:
    """A package of the same name from elsewhere would be imported in the place of ours."""
    import kernels

    ours = Path(__file__).resolve().parent.parent / "kernels"
    if Path(str(kernels.__file__)).resolve().parent != ours:
        raise LongtakeError(f"{kernels.__file__} hides longtake's kernels; uninstall the package `kernels`")
    return "ours"


def _ffmpeg() -> str:
    from pipeline.media_child import find_ffmpeg

    found = find_ffmpeg()
    return f"{found.version} at {found.path}"


def _devices() -> str:
    import torch

    from cluster.session import usable_cores
    from kernels.dispatch import dense_attention

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if not names and GPU_DEVICE.exists():
        raise LongtakeError(f"there is a GPU that torch {torch.__version__} cannot use: {_why_no_gpu()}")
    try:
        attention = f"; dense attention: {dense_attention('cuda', torch.bfloat16)}" if names else ""
    except RuntimeError as error:
        raise LongtakeError(f"torch {torch.__version__} cannot compute on {names[0]}: {first_line(error)}") from error
    return f"{usable_cores()} CPU cores; GPUs: {', '.join(names) or 'none'}{attention}"


def _why_no_gpu() -> str:
    import torch

    try:
        torch.empty(0, device="cuda")
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return "no reason is given"


def _checkpoint() -> str:
    from cluster.preflight import check_checkpoint
    from cluster.probe import probe_checkpoint

    facts = probe_checkpoint("pocket")
    check_checkpoint(facts)
    return f"pocket, digest {facts.digest[:16]}"


def _disk() -> str:
    free_bytes = shutil.disk_usage(Path.cwd()).free
    if free_bytes < MIN_FREE_BYTES:
        raise LongtakeError(f"{free_bytes >> 20} MB free here, a render wants at least {MIN_FREE_BYTES >> 20} MB")
    return f"{free_bytes / 1e9:.0f} GB free in {Path.cwd()}"
