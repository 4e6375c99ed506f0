"""On the path of every process of a render under test: does at named points what the test has written down.

The environment variable CHAOS names a folder with `faults.json`, read anew at each point:

    points     list of {point, match, do, times, node}: at `point`, of a task whose label contains `match` (and on
               that node), do it, at most `times` times (1) over all processes
    settings   {timeouts, ffmpeg_limit_s, request_limit_s, watch_s, versions, host}; read when a process first imports
               what they are about. `host`: what a process takes its machine to be. `watch_s`: how long it watches a
               heartbeat
    clock_s    seconds by which the orchestrator's clocks are off

Points: `role` (a worker is to take a role, which is the label), `order` (a worker begins), `predict` (the network
has answered), `step` (a denoising step is done), `written` (the artifact is in the store, the answer not sent),
`commit` and `committed` (in the orchestrator, before and after the record). What can be done: kill, hold (until the
file `release` is there), until_stopped (hold until the worker is asked to stop), sleep, oom, cuda (from now on every
answer of the network in this process is a CUDA error), nan, spoil, swell (take memory until killed).

Each orchestrator leaves a file `orchestrator-<process>` with the id of its node.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time
import types
from pathlib import Path

FOLDER = Path(os.environ.get("CHAOS", "/nonexistent"))


def faults() -> dict:
    try:
        return json.loads((FOLDER / "faults.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


LABEL = "CHAOS_LABEL"
"""The environment variable that says what a process works on: Ray sends a worker's class with these functions by value,
so a variable of this module would be another one there.
"""


BROKEN = "CHAOS_BROKEN"
"""The environment variable of a process whose CUDA context is lost."""


def settings() -> dict:
    return faults().get("settings", {})


def reach(point: str, label: str, latents=None, stop=None) -> None:
    """Do what is written down for this point of this task."""
    for number, fault in enumerate(faults().get("points", [])):
        if fault["point"] != point or fault.get("match", "") not in label:
            continue
        if fault.get("node", node_id()) != node_id() or not claim(number, fault.get("times", 1)):
            continue
        act(fault, label, latents, stop)


def node_id() -> str:
    import ray

    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""


def claim(number: int, times: int) -> bool:
    for count in range(times):
        try:
            os.close(os.open(FOLDER / f"claim-{number}-{count}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        return True
    return False


def act(fault: dict, label: str, latents, stop) -> None:
    match fault["do"]:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hold":
            hold(label, (FOLDER / "release").exists)
        case "until_stopped":
            hold(label, stop.is_set)
        case "sleep":
            time.sleep(fault["seconds"])
        case "nan":
            latents.fill_(float("nan"))
        case "spoil":
            latents.add_(0.25)
        case "oom":
            import torch

            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB (simulated)")
        case "cuda":
            os.environ[BROKEN] = "1"
        case "swell":
            swell(fault["most_bytes"])


def swell(most_bytes: int) -> None:
    """Take memory until the system has had enough of it."""
    taken, piece_bytes = [], 32 * 1024 * 1024
    while len(taken) * piece_bytes < most_bytes:
        taken.append(bytearray(os.urandom(4096)) * (piece_bytes // 4096))
        time.sleep(0.02)
    time.sleep(60.0)


def hold(label: str, is_over) -> None:
    about = {"pid": os.getpid(), "label": label, "node": node_id()}
    (FOLDER / f".held-{os.getpid()}").write_text(json.dumps(about))
    (FOLDER / f".held-{os.getpid()}").rename(FOLDER / f"held-{os.getpid()}")
    while not is_over():
        time.sleep(0.05)


# What is wrapped, by module


def in_worker(module: types.ModuleType) -> None:
    run, assume = module.Worker._run, module.Worker._assume

    def wrapped_assume(self, role, *about):
        reach("role", role)
        return assume(self, role, *about)

    module.Worker._assume = wrapped_assume

    def wrapped(self, order):
        os.environ[LABEL] = order.task.label
        reach("order", order.task.label)
        produced = run(self, order)
        reach("written", order.task.label)
        return produced

    module.Worker._run = wrapped


def in_denoising(module: types.ModuleType) -> None:
    call = module.StepWatch.__call__

    def wrapped(self, steps_done, latents):
        reach("step", self._order.task.label, stop=self._context.stop)
        call(self, steps_done, latents)

    module.StepWatch.__call__ = wrapped


def in_sampling(module: types.ModuleType) -> None:
    predict = module._predict

    def wrapped(*arguments):
        prediction = predict(*arguments)
        reach("predict", os.environ.get(LABEL, ""), prediction)
        if BROKEN in os.environ:
            import torch

            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered (simulated)")
        return prediction

    module._predict = wrapped


def in_ledger(module: types.ModuleType) -> None:
    commit, take_lease = module.Ledger.commit, module.Ledger.take_lease
    take_lease.__kwdefaults__["watch_s"] = settings().get("watch_s", take_lease.__kwdefaults__["watch_s"])

    def wrapped(self, record):
        reach("commit", record.task_id)
        record = commit(self, record)
        reach("committed", record.task_id)
        return record

    module.Ledger.commit = wrapped


def in_lease(module: types.ModuleType) -> None:
    if host := settings().get("host"):
        own = module.this_process
        module.this_process = lambda: module.Owner(host, own().pid, own().mark)


def in_machine(module: types.ModuleType) -> None:
    limits = settings().get("timeouts", {})
    whole = module.Timeouts
    module.Timeouts = lambda: whole(**limits)


def in_media_child(module: types.ModuleType) -> None:
    module.LIMIT_S = settings().get("ffmpeg_limit_s", module.LIMIT_S)
    module.Child.__init__.__kwdefaults__["limit_s"] = module.LIMIT_S


def in_object_store(module: types.ModuleType) -> None:
    module.REQUEST_LIMIT_S = settings().get("request_limit_s", module.REQUEST_LIMIT_S)


def in_numerics(module: types.ModuleType) -> None:
    own = module._version
    module._version = lambda library: settings().get("versions", {}).get(library) or own(library)


def in_orchestrator(module: types.ModuleType) -> None:
    begin = module.Orchestrator.__init__

    def wrapped(self, *arguments):
        (FOLDER / f"orchestrator-{os.getpid()}").write_text(node_id())
        begin(self, *arguments)

    module.Orchestrator.__init__ = wrapped
    off = types.SimpleNamespace(
        time=lambda: time.time() + faults().get("clock_s", 0.0),
        monotonic=lambda: time.monotonic() + faults().get("clock_s", 0.0),
    )
    module.time = off


WRAPPERS = {
    "cluster.worker": in_worker,
    "actors.denoising": in_denoising,
    "model.sampling": in_sampling,
    "pipeline.ledger": in_ledger,
    "pipeline.lease": in_lease,
    "pipeline.machine": in_machine,
    "pipeline.media_child": in_media_child,
    "pipeline.object_store": in_object_store,
    "actors.numerics": in_numerics,
    "cluster.orchestrator": in_orchestrator,
}


class Loader(importlib.abc.Loader):
    """The real loader, and the wrapper afterwards."""

    def __init__(self, real: importlib.abc.Loader, name: str) -> None:
        self._real, self._name = real, name

    def create_module(self, spec):
        return self._real.create_module(spec)

    def exec_module(self, module) -> None:
        self._real.exec_module(module)
        WRAPPERS[self._name](module)

    def __getattr__(self, name: str):
        return getattr(self._real, name)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that are wrapped."""

    def find_spec(self, name, path, target=None):
        if name not in WRAPPERS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = Loader(spec.loader, name)
        return spec


if "CHAOS" in os.environ:
    sys.meta_path.insert(0, Finder())
