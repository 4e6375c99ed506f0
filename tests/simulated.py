"""A simulated world for one render: a disk, workers, nodes and a clock that one seed drives.

The real plan, machine, carrier and ledger run in it. The world plays everything else and breaks it: it
crashes the driver before and after any store operation, starts a second driver in the middle of one, loses
workers and nodes, lets lost workers go on and answer late, delays, doubles and reorders events, loses the
store's answers, fills the disk, flips bits, tears records, lets the clock jump, asks renders to stop, and lets
people pause, cancel and retry them, have parts made again, pick takes, lock shots, come with another checkpoint,
collect garbage, and start over.

What must hold is checked as it happens (`World.require`) and at the end (`World.check_end`).
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar

from cluster.collect import collect
from pipeline.carrier import carry_out
from pipeline.errors import LongtakeError, SettingError, StoreError, StoreFull
from pipeline.events import (
    Asked,
    Event,
    Fault,
    NodeDraining,
    Progress,
    RoleFailed,
    StopRequested,
    TaskFailed,
    TaskProduced,
    Tick,
    WorkerJoined,
    WorkerLost,
    WorkerReady,
    fault_of,
)
from pipeline.facts import CheckpointFacts, Facts, Overrides, ShotLock
from pipeline.garbage import Garbage, find_garbage
from pipeline.journal import (
    AttemptStarted,
    JournalEntry,
    RedoRequested,
    RequestTaken,
    ShotLocked,
    ShotUnlocked,
    TakePicked,
    TaskReset,
    entry_from_json,
)
from pipeline.lease import Owner, lease_path
from pipeline.ledger import Ledger, LedgerState
from pipeline.locks import lock_shot
from pipeline.machine import Budgets, Machine, Timeouts
from pipeline.plan import Plan, plan_film
from pipeline.records import TornRecord, commit_from_json, unseal
from pipeline.requests import Request, RequestKind, entries_for, new_requests, put_request
from pipeline.spec import parse_spec
from pipeline.store import Store, StoredFile, check_artifact, corrupt
from pipeline.tasks import ArtifactFile, Order, Produced, Role, Task

T = TypeVar("T")
TICK_S = 5.0
REQUESTS: tuple[RequestKind, ...] = (
    "pause", "cancel", "retry", "redo", "redo", "redo", "pick", "lock", "lock", "unlock",
)  # fmt: skip
Plot = RequestKind | Literal["fresh", "gc", ""]
SECOND_ACTS: tuple[Plot, ...] = ("pick", "lock", "gc")
"""Plots that begin when the film is there."""
ASKED_AFTER = 3
"""Commits after which the person of a world with a plot asks."""
LIMIT_S = 500_000.0
MOST_RUNS = 120
TIMEOUTS = Timeouts(text_s=100, source_s=100, segment_s=150, window_s=150, encode_s=100, film_s=100, load_s=200)


class Violation(AssertionError):
    """Something that must always hold did not."""


class Crash(BaseException):
    """The process that was using the store is gone."""


@dataclass
class Troubles:
    """How likely each kind of trouble is, at each place where it can happen; `left` bounds them all."""

    left: int = 40
    crash: float = 0.0
    store_error: float = 0.0
    lost_answer: float = 0.0
    full: float = 0.0
    second_driver: float = 0.0
    worker_loss: float = 0.0
    node_loss: float = 0.0
    zombie: float = 0.0
    hang: float = 0.0
    task_fault: float = 0.0
    load_fault: float = 0.0
    short_write: float = 0.0
    bit_flip: float = 0.0
    torn_record: float = 0.0
    late: float = 0.0
    twice: float = 0.0
    clock_jump: float = 0.0
    stop: float = 0.0
    drain: float = 0.0
    quality: float = 0.0
    asked: float = 0.0
    fresh: float = 0.0
    afterthought: float = 0.0
    gc: float = 0.0
    checkpoint: float = 0.0

    @staticmethod
    def draw(rng: random.Random) -> Troubles:
        """Some kinds of trouble, more or less of each."""
        troubles = Troubles(left=rng.choice([5, 15, 40]))
        rates = {
            "crash": 0.02, "store_error": 0.03, "lost_answer": 0.03, "full": 0.003, "second_driver": 0.004,
            "worker_loss": 0.05, "node_loss": 0.3, "zombie": 0.5, "hang": 0.03, "task_fault": 0.05,
            "load_fault": 0.1, "short_write": 0.03, "bit_flip": 0.02, "torn_record": 0.02, "late": 0.1,
            "twice": 0.1, "clock_jump": 0.02, "stop": 0.01, "drain": 0.3, "quality": 0.02,
            "asked": 0.02, "fresh": 0.2, "afterthought": 0.4, "gc": 0.004, "checkpoint": 0.2,
        }  # fmt: skip
        for name, rate in rates.items():
            if rng.random() < 0.4:
                setattr(troubles, name, rate * rng.choice([0.5, 1.0, 2.0]))
        return troubles


@dataclass(frozen=True)
class Version:
    """What a plan of one film depends on: the checkpoint, and the overrides in a form that can be a key."""

    checkpoint: int = 0
    redo: tuple[tuple[str, int], ...] = ()
    picked: tuple[tuple[str, int], ...] = ()
    locks: tuple[tuple[str, tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]], ...] = ()

    @staticmethod
    def of(overrides: Overrides, checkpoint: int) -> Version:
        locks = (
            (shot_id, tuple(sorted(lock.tasks.items())), tuple(sorted(lock.labels.items())))
            for shot_id, lock in sorted(overrides.locks.items())
        )
        redo, picked = sorted(overrides.redo.items()), sorted(overrides.picked.items())
        return Version(checkpoint, tuple(redo), tuple(picked), tuple(locks))

    def facts(self) -> Facts:
        locks = {shot_id: ShotLock(dict(tasks), dict(labels)) for shot_id, tasks, labels in self.locks}
        checkpoint = CheckpointFacts("pocket", "def"[self.checkpoint] * 64)
        return Facts(checkpoint, redo=dict(self.redo), picked=dict(self.picked), locks=locks)


@lru_cache(maxsize=256)
def plan_of(number: int, version: Version) -> Plan:
    """One of a few dozen small films. SettingError where a lock and what was asked since do not go together."""
    rng = random.Random(number)
    shots: list[dict[str, object]] = []
    for position in range(rng.choice([1, 1, 2, 3])):
        name = f"shot{position}"
        shot: dict[str, object] = {"id": name, "duration": f"{rng.choice([3, 6, 11, 16])}s", "prompt": name}
        if position and rng.random() < 0.3:
            shot["continue"] = "previous"
        elif position and rng.random() < 0.3:
            shot["frame_of"] = {"shot": "shot0", "frame": "last"}
        elif position and rng.random() < 0.4:
            shot["transition"] = {"crossfade": "1s"}
        shots.append(shot)
    refinement = rng.choice(["parallel", "parallel", "chained", "none"])
    spec = {"title": f"film {number}", "refinement": refinement, "shots": shots}
    return plan_film(parse_spec(json.dumps(spec)), version.facts())


def artifact_of(task_id: str, inputs: Iterable[bytes]) -> bytes:
    """What a simulated worker computes: a function of the task and of the bytes of its inputs."""
    digest = hashlib.sha256(task_id.encode())
    for data in inputs:
        digest.update(data)
    return f"{task_id} {digest.hexdigest()}".encode()


def task_of(commit_path: str) -> str:
    """The task whose commit record lies at a path."""
    return commit_path.removeprefix("commits/").partition(".")[0]


def true_artifacts(plan: Plan, before: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """The artifact of every task of a plan without faults; what is locked in it was made `before`."""
    made: dict[str, bytes] = {}
    for task in plan.tasks.values():
        fresh = artifact_of(task.id, (made[input_id] for input_id in task.inputs))
        made[task.id] = before[task.id] if task.locked else fresh
    return made


def _needed(plan: Plan) -> set[str]:
    """The film's task and all it needs; what only locked tasks would need is not made again."""
    needed, queue = set[str](), [plan.film_task_id]
    while queue:
        task = plan.tasks[queue.pop()]
        if task.id not in needed:
            needed.add(task.id)
            queue += () if task.locked else task.inputs
    return needed


class SimStore(Store):
    """The world's disk as one process sees it; `actor` is None for the checker, who is never disturbed."""

    def __init__(self, world: World, actor: Actor | None) -> None:
        self.url = "simulated"
        self._world, self._actor = world, actor

    def write_attempt(self, path: str, source: bytes | Path) -> ArtifactFile:
        assert isinstance(source, bytes)
        self._run(path, lambda: self._world.put(path, source))
        return ArtifactFile(path.rsplit("/", 1)[-1], path, len(source), hashlib.sha256(source).hexdigest())

    def create_if_absent(self, path: str, data: bytes) -> bool:
        return self._run(path, lambda: self._world.create(path, data, self._actor))

    def put_replace(self, path: str, source: bytes | Path) -> None:
        assert isinstance(source, bytes)
        self._run(path, lambda: self._world.put(path, source))

    def copy(self, from_path: str, path: str) -> None:
        self._run(path, lambda: self._world.put(path, self._get(from_path)))

    def read(self, path: str) -> bytes:
        return self._run(path, lambda: self._get(path))

    def read_range(self, path: str, start: int, length: int) -> bytes:
        return self.read(path)[start : start + length]

    def open_local(self, artifact: ArtifactFile, scratch: Path) -> Path:
        raise NotImplementedError("simulated workers read with read_artifact")

    def read_artifact(self, artifact: ArtifactFile) -> bytes:
        """What an actor does through `open_local`: bytes compared with their record."""
        try:
            data = self.read(artifact.path)
        except FileNotFoundError:
            raise corrupt(artifact.path, "the file is gone") from None
        check_artifact(artifact, hashlib.sha256(data).hexdigest(), len(data))
        return data

    def digest(self, path: str) -> tuple[str, int]:
        data = self.read(path)
        return hashlib.sha256(data).hexdigest(), len(data)

    def list(self, prefix: str = "") -> list[StoredFile]:
        def files() -> list[StoredFile]:
            inside = f"{prefix.rstrip('/')}/"
            found = (path for path in self._world.files if not prefix or path.startswith(inside))
            return [StoredFile(path, len(self._world.files[path]), 0.0) for path in sorted(found)]

        return self._run(prefix, files)

    def head(self, path: str) -> StoredFile | None:
        def look() -> StoredFile | None:
            data = self._world.files.get(path)
            return None if data is None else StoredFile(path, len(data), 0.0)

        return self._run(path, look)

    def delete(self, path: str) -> None:
        self._run(path, lambda: self._world.delete(path))

    def free_bytes(self) -> None:
        return None

    def _get(self, path: str) -> bytes:
        if path not in self._world.files:
            raise FileNotFoundError(path)
        return self._world.files[path]

    def _run(self, path: str, operation: Callable[[], T]) -> T:
        if self._actor is None:
            return operation()
        self._world.boundary(self._actor, path, acknowledged=False)
        result = operation()
        self._world.boundary(self._actor, path, acknowledged=True)
        return result


@dataclass(eq=False)
class Person:
    """Somebody who runs a command that holds the lease for a moment, and runs it again when it crashes."""

    world: World

    def run(self, command: Callable[[Ledger], None]) -> None:
        """Run it to its end; what is refused (SettingError) is given up."""
        for _ in range(MOST_RUNS):
            self.world.full = False
            store = SimStore(self.world, self)
            ledger = Ledger(
                store, clock=lambda: self.world.time_s, sleep=self.world.sleep, owner=Owner("person", 0)
            )
            try:
                command(ledger)
            except (Crash, LongtakeError) as error:
                self.world.trace(f"a person's command ended: {type(error).__name__} {error}")
                if isinstance(error, SettingError):
                    return
            else:
                return
        self.world.require(False, "a person's command does not end")


@dataclass(eq=False)
class Worker:
    """A simulated worker. `gone`: its driver has been told that it is lost. `dead`: it does nothing more."""

    name: str
    node: str
    driver: Driver
    world: World
    dead: bool = False
    gone: bool = False
    hung: bool = False
    order: Order | None = None
    stop_asked: bool = False

    def __post_init__(self) -> None:
        self.store = SimStore(self.world, self)

    def load(self, role: Role) -> None:
        fault = self.world.strikes("load_fault")
        self.world.after(self.world.rng.uniform(1, 20), lambda: self._loaded(role, fault))

    def _loaded(self, role: Role, fault: bool) -> None:
        if self.dead:
            return
        now = self.world.now
        if fault:
            failure = Fault("transient", "the device is busy")
            self.tell(lambda: RoleFailed(now(), self.name, role, failure))
        else:
            self.tell(lambda: WorkerReady(now(), self.name, role))

    def begin(self, order: Order) -> None:
        self.world.require(self.order is None or self.hung, f"{self.name} got a second order")
        self.order, self.stop_asked = order, False
        if self.world.strikes("hang"):
            self.hung = True
            return
        self.world.after(self.world.rng.uniform(0.5, 5), lambda: self.step(order, {}, 0))

    def step(self, order: Order, inputs: dict[str, bytes], done: int) -> None:
        """Read the inputs, then three steps that may save, then write and answer."""
        if self.dead or self.order is not order:
            return
        if self.world.strikes("worker_loss"):
            self.world.lose_worker(self)
            if self.dead:
                return
        try:
            self._advance(order, inputs, done)
        except Crash:
            self.world.lose_worker(self, certainly=True)
        except LongtakeError as error:
            self.fail(order, fault_of(error))

    def _advance(self, order: Order, inputs: dict[str, bytes], done: int) -> None:
        if not inputs:
            inputs = {i: self.store.read_artifact(files[0]) for i, files in order.inputs.items()}
            if order.partial is not None:
                done = max(done, int(self.store.read_artifact(order.partial).decode().split()[1]))
        if self.stop_asked:
            self._stop(order, done)
        elif self.world.strikes("task_fault"):
            self.fail(order, Fault("transient", "the device hiccuped", "last lines"))
        elif self.world.strikes("quality") and order.task.kind in ("segment", "window"):
            self.fail(order, Fault("quality", "grey", exit_code=4))
        elif done < 3:
            self._denoise(order, inputs, done + 1)
        else:
            self._produce(order, inputs)

    def _denoise(self, order: Order, inputs: dict[str, bytes], done: int) -> None:
        now, rng = self.world.now, self.world.rng
        partial = self._save(order, done) if rng.random() < 0.3 else None
        self.tell(lambda: Progress(now(), self.name, order.task.id, order.attempt, done, 0, partial))
        self.world.after(rng.uniform(0.5, 8), lambda: self.step(order, inputs, done))

    def _save(self, order: Order, done: int) -> ArtifactFile:
        path = f"partials/{order.task.id}/{order.attempt:04d}-{order.epoch}-{done}.bin"
        return self.store.write_attempt(path, f"{order.task.id} {done}".encode())

    def _stop(self, order: Order, done: int) -> None:
        partial, now = self._save(order, done), self.world.now
        self.order = None
        failure = Fault("interrupted", "stopped on request")
        self.tell(
            lambda: TaskFailed(now(), self.name, order.task.id, order.attempt, order.epoch, failure, partial, done)
        )

    def _produce(self, order: Order, inputs: Mapping[str, bytes]) -> None:
        data = artifact_of(order.task.id, (inputs[input_id] for input_id in order.task.inputs))
        file = self.store.write_attempt(f"{order.attempt_path}/out.bin", data)
        if self.world.strikes("short_write"):
            self.world.files[file.path] = data[:-1]
        produced, now = Produced((file,), {"frames": 80.0}, 10.0, self.node), self.world.now
        self.order = None
        self.tell(lambda: TaskProduced(now(), self.name, order.task.id, order.attempt, order.epoch, produced))

    def fail(self, order: Order, fault: Fault) -> None:
        now = self.world.now
        self.order = None
        self.tell(lambda: TaskFailed(now(), self.name, order.task.id, order.attempt, order.epoch, fault))

    def tell(self, event: Callable[[], Event]) -> None:
        """Send the driver an event: soon, or late, or twice."""
        rng = self.world.rng
        self.world.after(rng.uniform(0, 0.2), lambda: self.driver.feed(event()))
        if self.world.strikes("late"):
            self.world.after(rng.uniform(5, 300), lambda: self.driver.feed(event()))
        if self.world.strikes("twice"):
            self.world.after(rng.uniform(0, 2), lambda: self.driver.feed(event()))


class Driver:
    """One run of the command: takes the lease, loads, and carries the machine's commands out."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.name = f"driver{number}"
        self.dead = self.busy = False
        self.outcome: tuple[int, str] | None = None
        self.workers: dict[str, Worker] = {}
        self.hired = 0
        self.lost_nodes: set[str] = set()
        self.version = Version(world.checkpoint)
        self.loaded: set[str] = set()
        self.committed: set[str] = set()
        self.heard: set[str] = set()
        self.inbox: deque[Event] = deque()
        self.machine: Machine | None = None
        self.store = SimStore(world, self)
        self.ledger = Ledger(self.store, clock=lambda: world.time_s, sleep=world.sleep, owner=Owner(self.name, number))

    @property
    def superseded(self) -> bool:
        """Whether a later lease was taken, were it by a driver that crashed in the same moment."""
        return lease_path(self.ledger.epoch + 1) in self.world.files

    def start(self, *, retry: bool, fresh: bool) -> None:
        """Run the command. `retry`: forgive what was charged to tasks first, as a person would ask."""
        self._guard(lambda: self._start(retry, fresh))

    def _start(self, retry: bool, fresh: bool) -> None:
        epoch = self.ledger.take_lease(watch_s=0, fresh=fresh)
        state = self.ledger.load()
        self.ledger.pin_numerics({"torch": "1"})
        self.version = Version.of(state.overrides, self.world.checkpoint)
        tasks = self.world.plan(self.version).tasks
        if retry:
            labels = {task.id: task.label for task in tasks.values()}
            failed = [TaskReset(i, labels.get(i, "")) for i in state.logs if i not in state.commits]
            self.ledger.journal(failed)
            for entry in failed:
                state.apply(entry)
        budgets = Budgets(quality=50, invalidations=50)
        self.machine = Machine(tasks, state, epoch=epoch, timeouts=TIMEOUTS, budgets=budgets)
        self.loaded = set(state.commits)
        self.world.trace(f"{self.name} started, {len(state.commits)} of {len(tasks)} committed")
        self.feed_now(Tick(self.world.now()))
        for index in range(self.world.workers if self.outcome is None else 0):
            self.hire(f"{self.name}.node{index % self.world.nodes}")
        self.tick()

    def tick(self) -> None:
        """Once every few seconds; now and then the clock jumps or somebody asks it to stop."""
        if self.dead or self.outcome is not None:
            return
        if self.world.strikes("clock_jump"):
            self.world.offset_s += self.world.rng.choice([-3600.0, 3600.0])
        if self.world.strikes("asked"):
            self.world.ask(self.world.rng.choice(REQUESTS))
        if not self.busy and self.world.strikes("gc"):
            self.world.collect_garbage()
        if not self.busy:
            self._guard(self.hear)
        if self.world.strikes("stop"):
            code = self.world.rng.choice([75, 130])
            self.world.after(0, lambda: self.feed(StopRequested(self.world.now(), code)))
        self.feed(Tick(self.world.now()))
        self.world.after(TICK_S, self.tick)

    def hear(self) -> None:
        """Look for requests, as the orchestrator does; an answer that is lost is asked for again."""
        try:
            found = new_requests(self.store, self.ledger.epoch, self.heard)
        except (StoreError, StoreFull):
            return
        for request in found:
            self.heard.add(request.id)
            self.world.after(0, lambda request=request: self.feed(Asked(self.world.now(), request)))  # type: ignore[misc]

    def feed(self, event: Event) -> None:
        """Handle an event and those that came before it; if this driver is in the middle of another, after that."""
        if self.dead or self.outcome is not None:
            return
        self.inbox.append(event)
        if not self.busy:
            self._guard(self._take_inbox)

    def _take_inbox(self) -> None:
        while self.inbox and self.outcome is None:
            self.feed_now(self.inbox.popleft())

    def feed_now(self, event: Event) -> None:
        queue = [event]
        while queue and self.outcome is None:
            assert self.machine is not None
            commands = self.machine.handle(replace(queue.pop(0), now_s=self.world.now()))
            queue += carry_out(commands, self.ledger, self, self.world.now)

    def _guard(self, action: Callable[[], None]) -> None:
        self.busy = True
        try:
            action()
        except Crash:
            self.die()
        except LongtakeError as error:
            self.finish(error.exit_code, str(error))
        finally:
            self.busy = False

    def die(self) -> None:
        """The process is gone; its workers are gone with it, at once or after what they were doing."""
        self.world.trace(f"{self.name} crashed")
        self.dead = True
        for worker in self.workers.values():
            worker.dead = not self.world.strikes("zombie")

    # Hands

    def hire(self, node: str) -> None:
        """A worker on this node or, if it was taken away, on the one that came in its place."""
        while node in self.lost_nodes:
            node += "+"
        self.hired += 1
        worker = Worker(f"{self.name}.w{self.hired}", node, self, self.world)
        self.workers[worker.name] = worker
        self.world.after(
            self.world.rng.uniform(0.1, 3),
            lambda: worker.tell(
                lambda: WorkerJoined(self.world.now(), worker.name, worker.node, spot=self.world.is_spot(node))
            ),
        )

    def assign_role(self, worker_id: str, role: Role) -> None:
        self.workers[worker_id].load(role)

    def dispatch(self, worker_id: str, order: Order) -> None:
        self.world.check_dispatch(self, order)
        self.world.trace(f"{self.name}: {order.task.label} #{order.attempt} -> {worker_id}")
        self.workers[worker_id].begin(order)

    def recycle(self, worker_id: str, reason: str) -> None:
        worker = self.workers[worker_id]
        stalled = "no progress" in reason or "not loaded" in reason
        self.world.require(worker.hung or not stalled, f"{worker_id} recycled though it works: {reason}")
        worker.dead = worker.gone = True
        self.hire(worker.node)

    def stop_orders(self, worker_ids: tuple[str, ...]) -> None:
        for worker_id in worker_ids:
            self.workers[worker_id].stop_asked = True

    def refresh(self) -> None:
        self.world.refreshes += 1

    def replan(self, cause: str) -> None:
        assert self.machine is not None
        self.version = Version.of(self.machine.overrides, self.version.checkpoint)
        self.machine.replace_plan(self.world.plan(self.version).tasks)

    def note(self, message: str, warning: bool) -> None:
        self.world.trace(f"{self.name}: {message}")

    def finish(self, exit_code: int, message: str) -> None:
        self.world.trace(f"{self.name} finished: {exit_code} {message}")
        fenced = "another orchestrator" in message or "by somebody else" in message
        self.world.require(not fenced or self.superseded, f"fenced by nobody: {message}")
        self.outcome = (exit_code, message)
        for worker in self.workers.values():
            worker.dead = not self.world.strikes("zombie")


Actor = Driver | Worker | Person


@dataclass
class World:
    """One seed's world. `crash_at`: crash at exactly this store boundary of the run and nowhere else.

    `plot`: what a person asks for when the first few tasks are committed; `fresh`: pause, then start over. The
    plots of SECOND_ACTS begin when the film is there: another take is picked; a shot is locked and another
    checkpoint comes; another checkpoint comes, what the film does not need any more is deleted, and the first
    checkpoint comes back.
    """

    seed: int
    crash_at: int | None = None
    verbose: bool = False
    plot: Plot = ""
    files: dict[str, bytes] = field(default_factory=dict)
    time_s: float = 0.0
    offset_s: float = 0.0
    boundaries: int = 0
    act_boundary: int = 0
    """Where the second act began."""
    refreshes: int = 0
    full: bool = False
    tainted: set[str] = field(default_factory=set)
    """Tasks whose bytes or records the world damaged, with what depends on them: to be rendered again."""
    checkpoint: int = 0
    plans: dict[Version, Plan] = field(default_factory=dict)
    """Every plan there has been."""
    truth: dict[str, bytes] = field(default_factory=dict)
    """The fault-free artifact of every task of these plans."""
    collected: set[str] = field(default_factory=set)
    """Files that were deleted as garbage."""
    journalled: set[tuple[str, int, int]] = field(default_factory=set)
    happened: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.film = self.rng.randrange(40)
        self.workers = self.rng.choice([1, 2, 3, 5])
        self.nodes = self.rng.choice([1, 2, 3])
        self.troubles = Troubles.draw(self.rng) if self.crash_at is None else Troubles(left=0)
        self.drivers: list[Driver] = []
        self.requests: list[tuple[int, Request]] = []
        """Those a person has left, with the epoch they are addressed to."""
        self._plot_due = bool(self.plot) and self.plot not in SECOND_ACTS
        self._acts = [self._second_act, self._third_act] if self.plot in SECOND_ACTS else []
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._events = 0
        self._nesting = 0

    # Time

    def now(self) -> float:
        """The clock as the driver sees it."""
        return self.time_s + self.offset_s

    def sleep(self, seconds: float) -> None:
        self.time_s += seconds

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self._events += 1
        heapq.heappush(self._queue, (self.time_s + seconds, self._events, action))

    def step(self) -> bool:
        """Let the next thing happen; False if nothing will."""
        if not self._queue:
            return False
        due_s, _, action = heapq.heappop(self._queue)
        self.time_s = max(self.time_s, due_s)
        self.require(self.time_s < LIMIT_S, "the render does not end")
        action()
        return True

    # Trouble

    def is_spot(self, node: str) -> bool:
        """Some nodes may be taken away at any time, and say so. (All are.)"""
        return random.Random(f"{self.seed} {node}").random() < 0.5

    def strikes(self, trouble: str) -> bool:
        rate: float = getattr(self.troubles, trouble)
        if not rate or not self.troubles.left or self.rng.random() >= rate:
            return False
        self.troubles.left -= 1
        self.happened[trouble] += 1
        self.trace(f"! {trouble}")
        return True

    def boundary(self, actor: Actor, path: str, *, acknowledged: bool) -> None:
        """Between two steps of the store: anything may break here."""
        self.boundaries += 1
        if self.boundaries == self.crash_at or self.strikes("crash"):
            raise Crash
        if isinstance(actor, Driver) and not acknowledged and not self._nesting and self.strikes("second_driver"):
            self._second_driver()
        if isinstance(actor, Driver) and not acknowledged and not self._nesting and self.strikes("gc"):
            self._nesting += 1
            self.collect_garbage()
            self._nesting -= 1
        if acknowledged:
            if self.strikes("lost_answer"):
                raise StoreError(f"{path}: the answer was lost")
            return
        self.full = self.full or self.strikes("full")
        if self.full:
            raise StoreFull(f"no space left for {path}")
        if self.strikes("store_error"):
            raise StoreError(f"{path}: 503 slow down")
        if self.strikes("bit_flip"):
            self._damage("attempts/", flip=True)
        if self.strikes("torn_record"):
            self._damage("commits/", flip=False)

    def _second_driver(self) -> None:
        """Another run of the command takes over in the middle of this one's operation and works a while."""
        self._nesting += 1
        self.begin_driver(retry=False)
        for _ in range(self.rng.randrange(200)):
            if not self.step():
                break
        self._nesting -= 1

    # People

    def ask(self, kind: RequestKind) -> None:
        """A person leaves a request for whoever renders now; what the command would refuse is not asked."""
        driver = self.drivers[-1]
        state = self._look()
        try:
            entries = self._wish(kind, self.plan(Version.of(state.overrides, driver.version.checkpoint)), state)
        except SettingError as error:
            self.trace(f"{kind} refused: {error}")
            return
        request = Request(f"{len(self.requests):04d}", kind, entries)
        self.trace(f"somebody asks: {kind} {entries}")
        self.happened[f"{kind} asked"] += 1
        if driver.ledger.epoch:
            put_request(SimStore(self, None), driver.ledger.epoch, request)
            self.requests.append((driver.ledger.epoch, request))

    def _look(self) -> LedgerState:
        return Ledger(SimStore(self, None), owner=Owner("checker", 0)).load()

    def _wish(self, kind: RequestKind, plan: Plan, state: LedgerState) -> tuple[JournalEntry, ...]:
        """What the commands make of it, see cluster.ask and cluster.versions."""
        shot_id = self.rng.choice([shot.id for shot in plan.shots])
        match kind:
            case "redo":
                tasks = plan.tasks.values()
                free = [t.label for t in tasks if t.kind in ("segment", "window") and not t.locked]
                if not free:
                    raise SettingError("everything is locked")
                return (RedoRequested(self.rng.choice(free), 1, "again", asked=True),)
            case "pick":
                if shot_id in state.locks:
                    raise SettingError("is locked in the take it has")
                return (TakePicked(shot_id, self.rng.choice([1, 2])),)
            case "lock":
                lock = lock_shot(shot_id, plan.tasks, state.commits, state.locks)
                return (ShotLocked(shot_id, lock.tasks, lock.labels),)
            case "unlock":
                if not state.locks:
                    raise SettingError("is not locked")
                return (ShotUnlocked(self.rng.choice(sorted(state.locks))),)
        return ()

    def take_in_late(self) -> None:
        """What nobody has heard of before its render ended, the person's own command journals."""

        def take_in(ledger: Ledger) -> None:
            state = ledger.load()
            late = [r for epoch, r in self.requests if r.id not in state.requests and r.kind not in ("pause", "cancel")]
            if not late:
                return
            epoch = ledger.take_lease(watch_s=0)
            state = ledger.load()
            for request in late:
                entries = entries_for(request, state, self._tasks(state), epoch)
                if entries:
                    ledger.journal(entries)
                for entry in entries:
                    state.apply(entry)
            ledger.release_lease()

        Person(self).run(take_in)

    def _tasks(self, state: LedgerState) -> list[Task]:
        """The plan's tasks; without the locks where it cannot be made with them."""
        try:
            plan = self.plan(Version.of(state.overrides, self.checkpoint))
        except SettingError:
            plan = self.plan(Version.of(replace(state.overrides, locks={}), self.checkpoint))
        return list(plan.tasks.values())

    def unlock(self) -> None:
        """What the message asks for when a lock and a redo or pick that came at the same time contradict."""

        def give_up_locks(ledger: Ledger) -> None:
            ledger.take_lease(watch_s=0)
            locks = sorted(ledger.load().locks)
            if locks:
                ledger.journal([ShotUnlocked(shot_id) for shot_id in locks])
            ledger.release_lease()

        Person(self).run(give_up_locks)

    def collect_garbage(self, *, orphans: bool | None = None) -> None:
        """`longtake gc`, beside whoever renders: what it finds, it takes the lease for."""
        with_orphans = self.rng.random() < 0.5 if orphans is None else orphans

        def look(state: LedgerState, epoch: int) -> Garbage:
            needed = [task.id for task in self._tasks(state)]
            files = SimStore(self, None).list()
            return find_garbage(files, state, needed, (), epoch, orphans=with_orphans)

        def run(ledger: Ledger) -> None:
            found = collect(ledger.store, ledger, look, watch_s=0)
            self.trace(f"garbage: {len(found.files)} files, {len(found.orphans)} orphans")

        Person(self).run(run)

    def _think_again(self) -> None:
        """The film is there, and somebody wants something else of it."""
        self.ask(self.rng.choice(["pick", "lock", "redo", "unlock"]))
        if self.rng.random() < 0.5:
            self.checkpoint = self.rng.randrange(3)
        self.take_in_late()

    def _second_act(self) -> None:
        self.act_boundary = self.boundaries
        if self.plot == "pick":
            self.ask("pick")
        if self.plot == "lock":
            self.ask("lock")
            self.require(bool(self.requests), "nothing was locked")
        if self.plot != "pick":
            self.checkpoint = 1
        self.take_in_late()

    def _third_act(self) -> None:
        if self.plot == "gc":
            self.collect_garbage(orphans=True)
            self.checkpoint = 0

    def _check_requests(self, state: LedgerState, ledger: Ledger) -> None:
        """Every request was taken in once, and every redo that was asked for raised its generation once."""
        history = [entry for _, entry in ledger.history()]
        taken = [entry.request_id for entry in history if isinstance(entry, RequestTaken)]
        self.require(len(taken) == len(set(taken)), "a request was taken in twice")
        wished = [entry for _, request in self.requests for entry in request.entries]
        for kind in (TakePicked, ShotLocked):
            wanted = Counter(entry.shot_id for entry in wished if isinstance(entry, kind))
            found = Counter(entry.shot_id for entry in history if isinstance(entry, kind))
            self.require(wanted == found, f"{kind.__name__}: asked {wanted}, written {found}")
        asked = sum(isinstance(entry, RedoRequested) for entry in wished)
        redone = [entry for entry in history if isinstance(entry, RedoRequested)]
        self.require(asked == sum(entry.asked for entry in redone), "a redo was lost or done twice")
        # One that is being taken over may still write down a redo that its successor does not know of; both then
        # give the same generation, and the part is made again once for both who asked.
        if not state.cut and not self.happened["second_driver"]:
            counts = Counter(entry.scope for entry in redone)
            self.require(counts == Counter(state.redo), "generations and redos differ in number")
        for record in state.commits.values():
            self.require(record.epoch >= state.cut, "something from before starting over counts")

    def _damage(self, folder: str, *, flip: bool) -> None:
        """Flip a bit of an artifact, or shorten a record, of something committed."""
        committed = sorted({task_of(path) for path in self.commit_paths()})
        if not committed:
            return
        task_id = self.rng.choice(committed)
        path = next(path for path in self.commit_paths() if task_of(path) == task_id)
        if flip:
            path = commit_from_json(unseal(self.files[path])).files[0].path
        if path not in self.files:
            return  # a record that does not count any more, and whose bytes are collected
        data = self.files[path]
        cut = self.rng.randrange(len(data))
        self.files[path] = data[:cut] + bytes([data[cut] ^ 1]) + data[cut + 1 :] if flip else data[:cut]
        self.trace(f"damaged {path}")
        self.tainted.add(task_id)
        self.spread_taint()

    def spread_taint(self) -> None:
        """To all that depends on something tainted, in all plans that drivers have had: an order of a plan that
        was replaced may still have been committed.
        """
        for plan in self.plans.values():
            for task in plan.tasks.values():
                if not task.locked and self.tainted.intersection(task.inputs):
                    self.tainted.add(task.id)

    def plan(self, version: Version) -> Plan:
        """The plan under a version; from now on it is one of those that there have been."""
        if version not in self.plans:
            plan = plan_of(self.film, version)
            self.truth |= true_artifacts(plan, self.truth)
            self.plans[version] = plan
            self.spread_taint()
        return self.plans[version]

    def lose_worker(self, worker: Worker, *, certainly: bool = False) -> None:
        """It dies, alone or with its node; or it is only thought dead and goes on."""
        if not certainly and self.strikes("drain"):
            deadline_s = self.rng.choice([None, 30.0, 120.0])
            worker.driver.lost_nodes.add(worker.node)
            worker.driver.feed(NodeDraining(self.now(), worker.node, deadline_s))
            self.after(deadline_s or 60.0, lambda: self._lose_node(worker.driver, worker.node))
        elif self.strikes("node_loss"):
            self._lose_node(worker.driver, worker.node)
        else:
            worker.gone = True
            worker.dead = certainly or not self.strikes("zombie")
            self._report_lost(worker, node_lost=False)

    def _lose_node(self, driver: Driver, node: str) -> None:
        driver.lost_nodes.add(node)
        for worker in driver.workers.values():
            if worker.node == node and not worker.gone:
                worker.gone = worker.dead = True
                self._report_lost(worker, node_lost=True)

    def _report_lost(self, worker: Worker, *, node_lost: bool) -> None:
        driver, name = worker.driver, worker.name
        event = WorkerLost(self.now(), name, "connection lost", node_lost)
        self.after(self.rng.uniform(0.1, 30), lambda: driver.feed(event))
        self.after(self.rng.uniform(1, 60), lambda: driver.hire(worker.node))

    # The disk

    def put(self, path: str, data: bytes) -> None:
        self.files[path] = data

    def create(self, path: str, data: bytes, actor: Actor | None) -> bool:
        if path in self.files:
            return False
        if path.startswith("journal/"):
            entries = map(entry_from_json, unseal(data)["entries"])
            self.journalled.update(
                (entry.task_id, entry.attempt, entry.epoch) for entry in entries if isinstance(entry, AttemptStarted)
            )
        if path.startswith("commits/"):
            self._check_commit(data)
            if isinstance(actor, Driver):
                actor.committed.add(task_of(path))
            if self._plot_due and len(self.commit_paths()) >= ASKED_AFTER:
                self._plot_due = False
                self.after(0, lambda: self.ask("pause" if self.plot == "fresh" else self.plot or "pause"))
        self.files[path] = data
        return True

    def delete(self, path: str) -> None:
        self.require(not path.startswith("commits/"), f"{path}: a commit was deleted")
        self.files.pop(path, None)
        self.collected.add(path)

    def commit_paths(self) -> list[str]:
        """Commit records that can be read, later generations first."""
        found = []
        for path in (path for path in self.files if path.startswith("commits/")):
            try:
                unseal(self.files[path])
            except TornRecord:
                continue
            found.append(path)
        return sorted(found, reverse=True)

    # What must hold

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            raise Violation(what)

    def _check_commit(self, data: bytes) -> None:
        """Bytes that are whole and right, of an attempt that was journalled, on inputs that are committed."""
        record = commit_from_json(unseal(data))
        for file in record.files:
            found = self.files.get(file.path, b"")
            if file.path in self.collected and not found:
                # The commit of one that was taken over by `gc` in this very moment: found missing when it is used.
                self.happened["commit without bytes"] += 1
                self.tainted.add(record.task_id)
                self.spread_taint()
                continue
            self.require(len(found) == file.size_bytes, f"{file.path} was committed short")
        for input_id in record.inputs_sha256:
            known = f"commits/{input_id}.json" in self.files or input_id in self.tainted
            self.require(known, f"{record.task_id} was committed before its input {input_id}")

    def check_dispatch(self, driver: Driver, order: Order) -> None:
        """Journalled before it is sent; nothing committed is done again."""
        if driver.superseded:
            return  # one that has lost its lease without knowing it yet: harmless, see check_end
        self.require(not order.task.locked, f"{order.task.label} is locked and was sent")
        found = (order.task.id, order.attempt, order.epoch) in self.journalled
        self.require(found, f"{order.task.label} was sent before it was journalled")
        # A commit that a driver being taken over had begun may land after its successor has looked.
        known = driver.loaded | driver.committed
        again = order.task.id in known and order.task.id not in self.tainted
        self.require(not again, f"{order.task.label} is committed and was sent again")

    def check_end(self) -> None:
        """The film is the fault-free one, everything is there, and the ledger agrees with the bytes."""
        ledger = Ledger(SimStore(self, None), owner=Owner("checker", 0))
        state = ledger.load()
        self._check_requests(state, ledger)
        plan = self.plan(Version.of(state.overrides, self.checkpoint))
        for task_id, record in state.commits.items():
            if task_id not in self.tainted:
                data = self.files[record.files[0].path]
                self.require(data == self.truth[task_id], f"{task_id} differs from the fault-free one")
        missing = _needed(plan) - set(state.commits) - self.tainted
        self.require(not missing, f"forgotten: {sorted(missing)}")
        for problem in ledger.verify().problems:
            self.require(problem.task_id in self.tainted, f"verify: {problem}")

    # Running

    def begin_driver(self, *, retry: bool, fresh: bool = False) -> None:
        driver = Driver(self, len(self.drivers) + 1)
        self.drivers.append(driver)
        driver.start(retry=retry, fresh=fresh)

    def run(self) -> World:
        """Run the command again and again until the film is there; then check."""
        retry = False
        for run in range(MOST_RUNS):
            self.full = False
            fresh = (self.plot == "fresh" and run == 1) or (run > 0 and self.strikes("fresh"))
            if run > 0 and self.strikes("checkpoint"):
                self.checkpoint = self.rng.randrange(3)
            self.begin_driver(retry=retry, fresh=fresh)
            while not (self.drivers[-1].dead or self.drivers[-1].outcome) and self.step():
                pass
            code, message = self.drivers[-1].outcome or (137, "crashed")
            self.take_in_late()
            if "was ordered otherwise" in message:
                self.unlock()
            if self.strikes("gc"):
                self.collect_garbage()
            if code == 0 and not self._film_missing():
                if self._acts:
                    self._acts.pop(0)()
                elif not self.strikes("afterthought"):
                    break
                else:
                    self._think_again()
            retry = "longtake retry" in message
            self.time_s += self.rng.uniform(1, 100)
        self.require(code == 0, f"no film after {MOST_RUNS} runs, last: {code} {message}")
        self._let_zombies_end()
        self.check_end()
        if self.tainted:
            self._repair()
        return self

    def _film_missing(self) -> bool:
        """Whether what was asked late has made the film another one."""
        state = self._look()
        try:
            plan = self.plan(Version.of(state.overrides, self.checkpoint))
        except SettingError:
            self.unlock()
            return True
        # A record that was damaged counts here: that is found, and made good, when somebody looks.
        recorded = {task_of(path) for path in self.files if path.startswith("commits/")}
        return plan.film_task_id not in recorded

    def _let_zombies_end(self) -> None:
        """Drivers that were taken over, and workers thought lost, do what they still can."""
        while self.step():
            pass
        for driver in self.drivers:
            self.require(driver.dead or driver.outcome is not None, f"{driver.name} never ended")

    def _repair(self) -> None:
        """What `longtake verify` and another run do: afterwards every byte is right."""
        self.troubles.left, self.full = 0, False  # somebody made room
        fixer = Ledger(SimStore(self, None), owner=Owner("fixer", 0))
        fixer.take_lease(watch_s=0)
        fixer.load()
        fixer.apply_verification(fixer.verify())
        self.begin_driver(retry=True)
        while self.drivers[-1].outcome is None and self.step():
            pass
        self.require((self.drivers[-1].outcome or (1, ""))[0] == 0, "not repaired")
        self.tainted.clear()
        self.check_end()

    def trace(self, line: str) -> None:
        if self.verbose:
            print(f"{self.time_s:10.2f} {line}")
