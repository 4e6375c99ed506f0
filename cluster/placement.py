"""How many workers of which size a render gets. Pure: resources in, numbers out.

One worker for each GPU; on CPUs one for each group of `threads` cores. The thread count changes how sums are
split and so belongs to the numerics record: its default is 1 on every CPU, whatever the number of cores, so
that a film does not depend on the machine it was started on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import SettingError

Device = Literal["cpu", "cuda"]
GPU_HOST_THREADS = 4


@dataclass(frozen=True)
class Placement:
    """What each of `workers` workers reserves in Ray, and how it computes."""

    device: Device
    dtype: str
    workers: int
    threads: int
    num_cpus: float
    num_gpus: float


def place_workers(
    resources: Mapping[str, float], *, device: str, workers: int | None, threads: int | None, useful: int
) -> Placement:
    """Split a cluster's `resources` (Ray's names: CPU, GPU) into workers; `useful` is how many the plan can
    keep busy.

    Raises SettingError if the cluster has not what was asked for.
    """
    gpus = int(resources.get("GPU", 0))
    if device == "cuda" and not gpus:
        raise SettingError("the cluster has no GPU", field="--device", value=device, remedy="Use --device cpu or auto.")
    if device != "cpu" and gpus:
        return _on_gpus(gpus, workers, threads or GPU_HOST_THREADS, useful)
    return _on_cpus(int(resources.get("CPU", 0)), workers, threads or 1, useful)


def _on_gpus(gpus: int, workers: int | None, threads: int, useful: int) -> Placement:
    if workers is not None and workers > gpus:
        raise SettingError(
            f"the cluster has {gpus} GPUs",
            field="--workers",
            value=workers,
            remedy="One worker needs one GPU.",
        )
    return Placement("cuda", "bfloat16", workers or min(gpus, useful), threads, num_cpus=1.0, num_gpus=1.0)


def _on_cpus(cpus: int, workers: int | None, threads: int, useful: int) -> Placement:
    fitting = max(cpus // threads, 1)
    if workers is not None and workers > fitting:
        remedy = f"{fitting} of {threads} threads fit."
        raise SettingError(f"the cluster has {cpus} CPU cores", field="--workers", value=workers, remedy=remedy)
    return Placement(
        "cpu",
        "float32",
        workers or max(min(fitting, useful), 1),
        threads,
        num_cpus=float(threads),
        num_gpus=0.0,
    )
