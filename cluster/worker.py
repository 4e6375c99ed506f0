"""A Ray actor around the actors of one machine slot: takes roles, runs orders, reports progress, stops when
asked.

Nothing it calls is allowed to raise into Ray: what goes wrong comes back as a `Failed` with the fault, the
host and the last log lines, so that an exception from Ray itself always means that the process or its machine
is gone. Orders run one at a time; progress and stop have a concurrency group of their own, because a
running synchronous call cannot be interrupted from outside.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from cluster.job import Failed, Greeting, Serves, Standing, WorkerSettings
from cluster.scratch import make_folder, own_prefix
from cluster.worker_log import WorkerLog
from pipeline.events import fault_of
from pipeline.media_child import find_ffmpeg
from pipeline.params import WeightsParams
from pipeline.spec import Memory
from pipeline.store import open_store
from pipeline.store_meter import STORE_MEASURE, Meter, MeteredStore
from pipeline.story import log_path
from pipeline.tasks import ArtifactFile, Order, Produced, Role

if TYPE_CHECKING:
    from actors.base import ActorContext
    from actors.gang import Gang, MeetingPlace

log = logging.getLogger("longtake.worker")
SIDE_GROUP = "progress"
"""Concurrency group of `progress`, `stop` and `dismiss`; the other methods wait for each other."""
T = TypeVar("T")


class Worker:
    """See the module's docstring. Made into a Ray actor by `worker_class`."""

    def __init__(self, settings: WorkerSettings) -> None:
        _ignore_termination()
        if settings.device == "cuda":
            fit_networks_in_turn()
        self._settings = settings
        self._log = WorkerLog()
        self._store = MeteredStore(open_store(settings.store_url), Meter())
        self._scratch_path = make_folder(settings.scratch_root or tempfile.gettempdir(), own_prefix("lt-work-"))
        self._stop = threading.Event()
        self._standing = Standing()
        self._actor: Any = None
        self._meeting: MeetingPlace | None = None
        self._gang: Gang | None = None

    def greet(self) -> Greeting | Failed:
        """Import the libraries and say which ones they are."""
        return self._guarded(self._greet)

    def assume(
        self, role: Role, weights: WeightsParams | None, memory: Memory, serves: Serves | None = None
    ) -> Role | Failed:
        """Let the present role's models go and load those of `role`; `weights` say which, for roles with a
        DiT, and `memory` how they are kept. With `serves`, for that render from now on.
        """
        if failed := self._guarded(lambda: self._serve(serves)):
            return failed
        return self._guarded(lambda: self._assume(role, weights, memory))

    def open_meeting(self) -> str | Failed:
        """Of a gang's first member: where the others meet it."""
        return self._guarded(self._open_meeting)

    def join_gang(self, rank: int, address: str) -> int | Failed:
        """Become member `rank` of the gang that meets at `address`; returns when all are there."""
        return self._guarded(lambda: self._join_gang(rank, address))

    def _serve(self, serves: Serves | None) -> None:
        """Work for that render from now on, with the models that are loaded."""
        settings = self._settings
        if serves is None or serves == Serves(
            settings.store_url, settings.checkpoint_path, settings.checkpoint_digest
        ):
            return
        self._settings = replace(self._settings, **vars(serves))
        # Models that are loaded keep the store they were given, so it is that one that turns to the other render.
        self._store.point_at(open_store(serves.store_url))

    def run(self, order: Order, serves: Serves | None = None) -> Produced | Failed:
        """Compute one order, of the render that is to be served if one is named."""
        self._stop.clear()
        self._standing = Standing(order.task.id, order.attempt)
        if failed := self._guarded(lambda: self._serve(serves)):
            self._standing = Standing()
            return failed
        path = log_path(order.task.id, order.attempt, order.epoch)
        try:
            # A store of its own: what the log costs is not the order's. The log of a gang is its first member's; of
            # the others the last lines come with their failures.
            leads = self._gang is None or self._gang.leads
            with self._log.attempt(open_store(self._settings.store_url), path) if leads else nullcontext():
                answer = self._guarded(lambda: self._run(order))
            if isinstance(answer, Failed):
                # Whoever hears of it looks there, and the process may be ended at once.
                self._log.settle()
            return answer
        finally:
            self._standing = Standing()

    def _run(self, order: Order) -> Produced:
        task = order.task
        log.info("%s, %s, attempt %d", task.label, task.id, order.attempt)
        log.info("host %s, process %d, device %s", socket.gethostname(), os.getpid(), self._settings.device)
        if order.partial is not None:
            log.info("goes on from %s", order.partial.path)
        waited_s = self._store.meter.seconds
        produced: Produced = self._actor.run(order)
        waited_s = self._store.meter.seconds - waited_s
        produced = replace(produced, measures={**produced.measures, STORE_MEASURE: waited_s})
        log.info("produced %d bytes in %.2f s", sum(file.size_bytes for file in produced.files), produced.seconds)
        return produced

    def progress(self) -> Standing:
        """How far the running order is."""
        return self._standing

    def stop(self) -> None:
        """Ask the running order to save its state and end."""
        self._stop.set()

    def dismiss(self) -> None:
        """Clean up; the process is about to be ended."""
        shutil.rmtree(self._scratch_path, ignore_errors=True)
        self._log.settle()

    def _guarded(self, action: Callable[[], T]) -> T | Failed:
        """The worker boundary: the one place that catches everything."""
        try:
            return action()
        except BaseException as error:
            log.exception("failed: %s", self._standing.task_id or "changing role")
            where = f"host {socket.gethostname()}, process {os.getpid()}"
            fault = fault_of(error, f"{where}\n{self._log.tail()}")
            return Failed(fault, self._standing.partial, self._standing.partial_steps)

    def _greet(self) -> Greeting:
        from actors.numerics import describe_numerics, settle_numerics

        settings = self._settings
        set_threads(settings.threads)
        settle_numerics()
        numerics = describe_numerics(
            settings.device,
            settings.dtype,
            settings.threads,
            settings.ffmpeg,
            settings.encoder_threads,
            settings.gang_size,
        )
        node_id = ray.get_runtime_context().get_node_id()
        return Greeting(node_id, socket.gethostname(), os.getpid(), numerics)

    def _open_meeting(self) -> str:
        from actors.gang import MeetingPlace

        self._meeting = MeetingPlace(ray.util.get_node_ip_address())
        return self._meeting.address

    def _join_gang(self, rank: int, address: str) -> int:
        from actors.gang import join_gang

        settings = self._settings
        self._gang = join_gang(rank, settings.gang_size, self._meeting or address, settings.device)
        return rank

    def _assume(self, role: Role, weights: WeightsParams | None, memory: Memory) -> Role:
        from actors import make_actor
        from actors.base import check_same_checkpoint

        if self._actor is not None:
            self._actor.close()
            self._actor = None
            gc.collect()
        check_same_checkpoint(Path(self._settings.checkpoint_path), self._settings.checkpoint_digest)
        actor = make_actor(role)
        actor.setup(self._context(role, weights, memory))
        self._actor = actor
        return role

    def _context(self, role: Role, weights: WeightsParams | None, memory: Memory) -> ActorContext:
        import torch

        from actors.base import ActorContext

        settings = self._settings
        return ActorContext(
            store=self._store,
            checkpoint_path=Path(settings.checkpoint_path),
            role=role,
            weights=weights,
            device=settings.device,
            dtype=getattr(torch, settings.dtype),
            ffmpeg=find_ffmpeg(settings.ffmpeg),
            encoder_threads=settings.encoder_threads,
            scratch_path=self._scratch_path,
            memory=memory,
            gang=self._gang if role == "chain" else None,
            stop=self._stop,
            report=self._report,
            saved=self._saved,
        )

    def _report(self, steps: int, frames: int) -> None:
        log.info("%d steps, %d frames", steps, frames)
        now = self._standing
        self._standing = Standing(now.task_id, now.attempt, steps, frames, now.partial, now.partial_steps)

    def _saved(self, partial: ArtifactFile, steps: int) -> None:
        log.info("saved step %d as %s", steps, partial.path)
        now = self._standing
        self._standing = Standing(now.task_id, now.attempt, now.steps, now.frames, partial, steps)


def _ignore_termination() -> None:
    """A SIGTERM to a whole process group must reach the orchestrator as a stop, not end the worker under an
    order.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def fit_networks_in_turn() -> None:
    """Have torch map a card's memory page by page; before torch is imported, and unless somebody has chosen otherwise.

    By itself it takes it in blocks of the sizes that were asked for. What the text encoder or the transformer leave is
    then of little use to the VAE, and a card that is large enough for each of them runs out of memory all the same.
    """
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def set_threads(threads: int) -> None:
    """Let torch compute with so many threads and no others: their number is part of the numerics record."""
    import torch

    torch.set_num_threads(threads)
    with contextlib.suppress(RuntimeError):
        # Can be set only before the first parallel work of the process.
        torch.set_num_interop_threads(1)


def worker_class() -> Any:
    """The Ray actor class. Retries belong to the machine, so Ray restarts and retries nothing."""
    return ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={SIDE_GROUP: 2})(Worker)
