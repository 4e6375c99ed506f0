"""How many workers of which size a render gets. Pure: resources in, numbers out.

One worker for each GPU; on CPUs one for each group of `threads` cores. Where segments are computed by a gang, each
chain that can use one gets a gang of so many workers, and what is left over does everything but segments. The
thread count changes how sums are split and so belongs to the numerics record: its default is 1 on every CPU,
whatever the number of cores, so that a film does not depend on the machine it was started on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.errors import SettingError
from pipeline.events import ALL_ROLES
from pipeline.tasks import Role

Device = Literal["cpu", "cuda"]
GPU_HOST_THREADS = 4


@dataclass(frozen=True)
class Placement:
    """What each of `workers` workers reserves in Ray, and how it computes."""

    device: Device
    dtype: str
    workers: int
    """Processes, those in gangs included."""
    threads: int
    num_cpus: float
    num_gpus: float
    gang_size: int = 1
    """Processes that compute each segment together."""
    gangs: int = 0
    """How many gangs there are; 0 where each worker computes segments alone."""

    @property
    def crews(self) -> list[int]:
        """The size of each worker as the machine sees it, gangs first."""
        singles = self.workers - self.gangs * self.gang_size
        return [self.gang_size] * self.gangs + [1] * singles

    def roles_of(self, size: int) -> tuple[Role, ...]:
        """What a worker of so many processes may do: segments are for gangs where there are any."""
        return tuple(role for role in ALL_ROLES if role != "chain" or size == self.gang_size)


def place_workers(
    resources: Mapping[str, float],
    *,
    device: str,
    workers: int | None,
    threads: int | None,
    useful: int,
    gang_size: int = 1,
    chains: int = 1,
) -> Placement:
    """Split a cluster's `resources` (Ray's names: CPU, GPU) into workers; `useful` is how many the plan can
    keep busy, `chains` how many of its chains can run side by side.

    Raises SettingError if the cluster has not what was asked for.
    """
    gpus = cuda_gpus(resources)
    if device == "cuda" and not gpus:
        raise SettingError("the cluster has no GPU", field="--device", value=device, remedy="Use --device cpu or auto.")
    if gang_size > 1:
        # A gang for each chain, beside those that refine what the chains have made.
        useful += gang_size * chains
    if device == "auto":
        device = device_for(resources)
    if device == "cuda":
        place = _on_gpus(gpus, workers, threads or GPU_HOST_THREADS, useful)
    else:
        place = _on_cpus(int(resources.get("CPU", 0)), workers, threads or 1, useful)
    return place if gang_size == 1 else _with_gangs(place, gang_size, chains)


def cuda_gpus(resources: Mapping[str, float]) -> int:
    """GPUs that CUDA runs on. Ray counts that of each Apple machine as well, and names its type by the chip."""
    # As "accelerator_type:M2-Pro".
    types = {name.removeprefix("accelerator_type:"): nodes for name, nodes in resources.items()}
    apples = sum(nodes for name, nodes in types.items() if re.fullmatch(r"M\d(-\w+)?", name))
    return max(int(resources.get("GPU", 0) - apples), 0)


def device_for(resources: Mapping[str, float]) -> Device:
    """What the workers of a cluster compute on if nobody says it.

    Raises SettingError for one that has no workers yet. Those that its autoscaler starts may have GPUs, which Ray does
    not tell: on their processors a film would take weeks.
    """
    if cuda_gpus(resources):
        return "cuda"
    if resources.get("CPU", 0) > 0:
        return "cpu"
    remedy = (
        "Say what they will compute on: `longtake farm start --device cuda`, or `longtake render` with `--device cuda` "
        "and `--workers N`, which waits for them."
    )
    raise SettingError("the cluster has no workers yet", field="--device", value="auto", remedy=remedy)


def _with_gangs(place: Placement, gang_size: int, chains: int) -> Placement:
    gangs = min(chains, place.workers // gang_size)
    if not gangs:
        remedy = f"There is room for {place.workers} worker(s); a gang needs as many as it has members."
        raise SettingError("has no room", field="--gang", value=gang_size, remedy=remedy)
    return replace(place, gang_size=gang_size, gangs=gangs)


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
