"""The Ray session of one command: a private local cluster, or a connection to a running one.

A local session has its own short temporary folder (socket paths must stay under 108 bytes, on macOS under 104), a small
object store (frames never travel through it), no dashboard and a token of its own, and it ends with the command.
Which clusters may be joined is `cluster.access`'s to say.

Raises SettingError for an address that cannot be used.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.access import check_address, check_listens, has_token, write_token
from cluster.scratch import make_folder
from pipeline.errors import SettingError, first_line

NAMESPACE = "longtake"
OBJECT_STORE_BYTES = 100 * 1024 * 1024
START_ATTEMPTS = 4
NODES_LOOK_S, NODES_LIMIT_S = 5.0, 1800.0
_FOLDER_PREFIX = "lt-"
# "<folder>/session_<date>_<time>_<microseconds>_<pid>/sockets/plasma_store" has to fit into 107 bytes with a process
# number of seven digits; on macOS, where it has five, into 103.
MAX_TEMP_BYTES = 23


@dataclass(frozen=True)
class Session:
    """A connection to a cluster: its resources by Ray's names, and a local cluster's own folder."""

    resources: dict[str, float]
    scratch_path: str | None


@contextlib.contextmanager
def open_session(
    address: str | None, *, cpus: int, gpus: int = 0, insecure: bool = False
) -> Iterator[Session]:
    """Start a local cluster of `cpus` slots, or join the one at `address`, which gets time to have `gpus`."""
    with local_session(cpus) if address is None else _joined_session(address, gpus, insecure) as session:
        yield session


@contextlib.contextmanager
def local_session(cpus: int) -> Iterator[Session]:
    """A private cluster on this machine, gone when the context ends."""
    folder = make_folder(_temp_root(), _FOLDER_PREFIX)
    try:
        with _environment(_local_environment(folder)):
            yield from _connected(
                str(folder),
                # Not the cluster that RAY_ADDRESS may name: that is joined by saying so.
                address="local",
                num_cpus=cpus,
                # Ray would count Apple's as a GPU; the models here know none but NVIDIA's.
                num_gpus=0 if sys.platform == "darwin" else None,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(folder),
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _joined_session(address: str, gpus: int, insecure: bool) -> Iterator[Session]:
    check_address(address, insecure=insecure)
    check_listens(address)
    try:
        yield from _connected(None, gpus=gpus, address=address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        message = f"cannot join the cluster: {first_line(error)}"
        remedy = "Check `ray status` there."
        if os.environ.get("RAY_AUTH_MODE") != "token":
            remedy += " A cluster that asks for a token wants RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH here, too."
        raise SettingError(message, field="--address", value=address, remedy=remedy) from error


def _connected(scratch_path: str | None, *, gpus: int = 0, **options: Any) -> Iterator[Session]:
    import ray

    # Ray prints deaths of workers to our stdout, which belongs to the film's path or the events.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        _init_patiently(namespace=NAMESPACE, log_to_driver=False, logging_level="CRITICAL", **options)
        try:
            yield Session(wait_for_gpus(gpus, ray.cluster_resources), scratch_path)
        finally:
            ray.shutdown()


def wait_for_gpus(
    gpus: int,
    look: Callable[[], dict[str, float]],
    *,
    limit_s: float = NODES_LIMIT_S,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, float]:
    """The cluster's resources, once they hold `gpus` GPUs or the time is over.

    The nodes of a new cluster come one after another, minutes apart, and a render counts its workers once. If only some
    have come when the time is over, the others are counted in: the render begins, and workers wait for their places.
    """
    waited_s = 0.0
    while (resources := dict(look())).get("GPU", 0.0) < gpus and waited_s < limit_s:
        sleep(NODES_LOOK_S)
        waited_s += NODES_LOOK_S
    return resources | {"GPU": max(resources["GPU"], float(gpus))} if resources.get("GPU") else resources


def _init_patiently(**options: Any) -> None:
    """ray.init, again where the machine was too busy for Ray's own fixed start-up limit of 30 s."""
    import ray

    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(**options)
            return
        except Exception as error:
            # Ray has no type of its own for this.
            ray.shutdown()
            if "timed out during startup" not in str(error) or attempt == START_ATTEMPTS - 1:
                raise


def _local_environment(folder: Path) -> dict[str, str]:
    """What Ray's own processes read from the environment. A caller's choice of authentication wins."""
    values = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # A busy machine may take minutes to start an interpreter; giving up earlier would only start over.
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # One interpreter for each worker is enough: no idle ones in reserve.
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
    }
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "token" and not has_token():
        write_token(folder / "token")
        values |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    return values


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _temp_root() -> str:
    root = tempfile.gettempdir()
    return root if len(os.fsencode(root)) <= MAX_TEMP_BYTES else "/tmp"


def usable_cores() -> int:
    """CPU cores that this process may use; all of the machine where that cannot be asked (macOS)."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
