"""Where the pace of a kind of worker comes from: what `longtake calibrate` left, `render.json`, or what is published.
Loads neither torch nor ray.

Calibrations lie in $XDG_CACHE_HOME/longtake/calibrations/<digest of the checkpoint>/<kind of worker>.json (~/.cache by
default); a file from another machine may be put there. A kind of worker is `cpu` or a GPU's short name, such as `h200`.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

from pipeline.errors import SettingError
from pipeline.facts import CheckpointFacts
from pipeline.pace import GPUS, Pace, measured, role_bytes, with_weights

GPU_INFORMATION = Path("/proc/driver/nvidia/gpus")


def find_pace(checkpoint: CheckpointFacts, device: str, gpu_type: str | None = None) -> Pace:
    """The pace of `gpu_type`, else of this machine's `device` (`cpu`, `cuda`). Raises SettingError for a GPU type of
    which nothing is known.
    """
    kind = gpu_type or ("cpu" if device == "cpu" else local_gpu())
    calibrated = load_pace(checkpoint.digest, kind)
    if calibrated is not None:
        return calibrated
    device = device if gpu_type is None else "cuda"
    known = gpu_type or (kind if kind in GPUS else "h800")
    pace = measured(checkpoint.render.task_seconds, device, known)
    if kind not in ("cpu", known) and not pace.of_checkpoint:
        unknown = f"nothing is known of {kind}, `longtake calibrate` measures it"
        pace = replace(pace, basis=f"{pace.basis}; {unknown}")
    folder = Path(checkpoint.path)
    return with_weights(pace, role_bytes(folder)) if checkpoint.path and folder.is_dir() else pace


def load_pace(digest: str, kind: str) -> Pace | None:
    """What was calibrated for this checkpoint on this kind of worker. Raises SettingError for a damaged file."""
    path = pace_file(digest, kind)
    try:
        return Pace.from_json(json.loads(path.read_text())["pace"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "Remove it, or run `longtake calibrate` again."
        raise SettingError("is no calibration", field=str(path), remedy=remedy) from error


def pace_file(digest: str, kind: str) -> Path:
    """Where the calibration of a checkpoint on a kind of worker lies."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "longtake" / "calibrations" / digest[:32] / f"{short_name(kind)}.json"


def short_name(gpu: str) -> str:
    """`NVIDIA H200` -> `h200`, `NVIDIA A100-SXM4-80GB` -> `a100`, `NVIDIA GeForce RTX 4090` -> `rtx4090`."""
    words = [word for word in re.split(r"[^a-z0-9]+", gpu.lower()) if word not in ("nvidia", "geforce", "tesla", "")]
    number = next((place for place, word in enumerate(words) if re.search(r"\d", word)), 0)
    return "".join(words[: number + 1]) or "gpu"


def local_gpu() -> str:
    """The short name of this machine's first GPU, `cuda` where that cannot be read."""
    for path in sorted(GPU_INFORMATION.glob("*/information")):
        for line in path.read_text().splitlines():
            if line.startswith("Model:"):
                return short_name(line.removeprefix("Model:"))
    return "cuda"
