"""The render's state machine: handle(event) -> commands. Pure: no I/O, no Ray, no clock but the events' own.

What it holds to:

- A task runs when all its inputs are committed; one order at a time for each worker; an attempt is journalled
  before its order is sent; only what the ledger answered with a record is done.
- Events that do not speak of the current attempt (late, twice, of a worker given up) change nothing.
- Failures are counted by the journal's fold (`TaskLog`), so they count the same after a restart. A task given
  up takes its dependants with it; what does not depend on it is still done; a user's fault or a full disk
  ends the render as soon as running orders have.
- A person's request is taken in once, in one write with all that follows from it. After a change of the plan
  nothing is sent before the new plan is there.
- Time passes only as fast as events come: a gap between two events counts at most `MAX_GAP_S`, so a clock
  that jumps or a machine that slept causes no timeout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.crew import Crew, Job, Worker
from pipeline.events import (
    ALL_ROLES,
    Asked,
    AssignRole,
    Command,
    Commit,
    CommitRefused,
    Committed,
    Dispatch,
    Event,
    Fault,
    Finish,
    Journal,
    LedgerFailed,
    NodeDraining,
    Note,
    Progress,
    ProgressSummary,
    RecycleWorker,
    Refresh,
    Replan,
    ReturnWorker,
    RoleFailed,
    StopRequested,
    StopWorkers,
    TaskFailed,
    TaskProduced,
    Tick,
    WorkerJoined,
    WorkerLent,
    WorkerLost,
    WorkerReady,
    fault_of,
)
from pipeline.facts import Overrides
from pipeline.farm import Needs
from pipeline.graph import TaskGraph
from pipeline.journal import (
    CHARGED,
    AttemptFailed,
    AttemptStarted,
    FaultKind,
    Invalidated,
    JournalEntry,
    PartialSaved,
    RedoRequested,
    TaskLog,
)
from pipeline.ledger import LedgerState, dependants_of
from pipeline.limits import Budgets, Timeouts, given_up
from pipeline.records import artifact_sha256
from pipeline.requests import STOP_CODES, Request, entries_for
from pipeline.schedule import LONG_CHAIN, ROLES_FOR_KIND, Demand, Staff, choose_role, kinds_of, must_leave_for_chain
from pipeline.summary import Tally, activity, expected_rest_s, phase_progress
from pipeline.tasks import ArtifactFile, CommitRecord, Order, Role, Task, TaskKind

__all__ = ["ROLES_FOR_KIND", "Budgets", "Machine", "Timeouts", "fault_of"]

MAX_GAP_S = 30.0
RETRY_PAUSE_S = 2.0
"""Doubles with every failure charged to the task."""
OUTAGE_PAUSE_S = 5.0
"""Doubles with every store failure in a row, up to MAX_OUTAGE_PAUSE_S."""
MAX_OUTAGE_PAUSE_S = 300.0


@dataclass
class _Outage:
    """The store does not answer the workers."""

    since_s: float
    until_s: float
    failures: int = 1


@dataclass
class _Ending:
    """Nothing new is sent; the render ends when the running orders have."""

    exit_code: int
    message: str
    until_s: float | None
    """End then in any case; None: wait for the running orders however long they take."""


@dataclass
class _Out:
    """What one event leads to. Entries come first: writing ahead is always safe."""

    entries: list[JournalEntry] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)

    def flush(self) -> list[Command]:
        journal: list[Command] = [Journal(tuple(self.entries))] if self.entries else []
        return journal + self.commands


class Machine:
    """One render. `tasks`: the plan's, in topological order. `state`: as loaded under this `epoch`."""

    def __init__(
        self,
        tasks: Mapping[str, Task],
        state: LedgerState,
        *,
        epoch: int,
        budgets: Budgets | None = None,
        timeouts: Timeouts | None = None,
        deadline_s: float | None = None,
    ) -> None:
        """`deadline_s`: after so many seconds the run saves and stops, to be gone on with."""
        self.epoch = epoch
        self._deadline_s = deadline_s
        self._budgets, self._timeouts = budgets or Budgets(), timeouts or Timeouts()
        self._commits, self._state = dict(state.commits), state
        self._crew = Crew(self._budgets.node)
        self._jobs: dict[str, Job] = {}
        self._committing: dict[str, CommitRecord] = {}
        self._not_before_s: dict[str, float] = {}
        self._failures: dict[str, Fault] = {}
        self._load_failures = 0
        self._loaded: set[Role] = set()
        """Roles that some worker has loaded in this run."""
        self._outage: _Outage | None = None
        self._ending: _Ending | None = None
        self._finished = False
        self._replanning = False
        self._clock_s, self._last_now_s = 0.0, float("nan")
        self._refreshed_s, self._refresh_due = float("-inf"), False
        self._demand: Demand | None = None
        self._tallies: dict[TaskKind, Tally] = {}
        self._out = _Out()
        self.replace_plan(tasks)

    def replace_plan(self, tasks: Mapping[str, Task]) -> None:
        """Go on with this plan (at the start, and after Replan). Orders that it still holds go on."""
        self._replanning = False
        self._failures = {task_id: fault for task_id, fault in self._failures.items() if task_id in tasks}
        self._end_orders([job for task_id, job in self._jobs.items() if task_id not in tasks])
        self._graph = TaskGraph(tasks, self._commits)
        self._graph.taken = {task_id for task_id in (*self._jobs, *self._committing) if task_id in tasks}
        self._graph.rebuild()
        self._tallies = {}
        for task_id in self._graph.done:
            self._tally(task_id, self._commits[task_id])
        for task_id in list(self._graph.wanted):
            if fault := self._given_up(task_id):
                self._give_up(task_id, fault)

    def _end_orders(self, jobs: Sequence[Job]) -> None:
        """Have these orders save their state and stop."""
        jobs = [job for job in jobs if not job.asked_to_stop]
        for job in jobs:
            job.asked_to_stop = True
        if jobs:
            self._do(StopWorkers(tuple(job.worker_id for job in jobs)))

    def handle(self, event: Event) -> list[Command]:
        """Take one event in. The commands are to be carried out in order, each durable before the next.

        Call it once with Tick at the start: a render with nothing left to do finishes there.
        """
        # A ledger that fails under the last commands keeps Finish from being carried out: say it again.
        if self._finished and not isinstance(event, LedgerFailed):
            return []
        self._advance(event.now_s)
        match event:
            case WorkerJoined():
                self._on_joined(event)
            case WorkerLent():
                self._on_lent(event)
            case WorkerReady():
                self._on_ready(event)
            case RoleFailed():
                self._on_role_failed(event)
            case WorkerLost():
                self._on_lost(event)
            case NodeDraining():
                self._on_draining(event)
            case Progress():
                self._on_progress(event)
            case TaskProduced():
                self._on_produced(event)
            case TaskFailed():
                self._on_failed(event)
            case Committed():
                self._on_committed(event.record)
            case CommitRefused():
                self._on_refused(event)
            case LedgerFailed():
                self._on_ledger_failed(event.fault)
            case StopRequested():
                self._stop(event.exit_code, "stopped on request")
            case Asked():
                self._on_asked(event.request)
            case Tick():
                self._on_tick()
        if not self._finished:
            self._schedule()
            self._give_back()
            self._conclude()
        out, self._out = self._out, _Out()
        return out.flush()

    # Time

    def _advance(self, now_s: float) -> None:
        gap_s = now_s - self._last_now_s
        self._last_now_s = now_s
        if gap_s > 0:
            self._clock_s += min(gap_s, MAX_GAP_S)

    def _on_tick(self) -> None:
        for job in list(self._jobs.values()):
            silent_s, limit_s = self._clock_s - job.alive_s, self._timeouts.of(job.order.task.kind)
            if silent_s > limit_s:
                fault = Fault("stalled", f"no progress for {silent_s:.0f} s")
                self._recycle(job.worker_id, f"{job.order.task.id}: {fault.message}", fault)
        for worker in list(self._crew.workers.values()):
            since_s = worker.loading_since_s
            if since_s is not None and self._clock_s - since_s > self._timeouts.load_s:
                self._recycle(worker.worker_id, f"role {worker.role} not loaded in {self._timeouts.load_s:.0f} s")
                self._charge_load(worker, Fault("stalled", f"role {worker.role} was not loaded in time"))
        self._save_on_draining_nodes()
        self._refresh()
        if self._deadline_s is not None and self._clock_s >= self._deadline_s and self._ending is None:
            self._stop(75, "the run's deadline has passed; the same command goes on")

    def _refresh(self) -> None:
        if self._refresh_due and self._clock_s - self._refreshed_s >= self._timeouts.refresh_s:
            self._refreshed_s, self._refresh_due = self._clock_s, False
            self._do(Refresh())

    # Workers

    def _on_joined(self, event: WorkerJoined) -> None:
        roles = tuple(role for role in ALL_ROLES if role in event.roles)
        self._crew.join(Worker(event.worker_id, event.node_id, roles, event.role, event.host, event.spot))

    def _on_lent(self, event: WorkerLent) -> None:
        worker = Worker(event.worker_id, event.node_id, (event.role,), event.role, event.host, lent=True)
        self._crew.join(worker)
        if not event.loaded and self._crew.workers.get(event.worker_id) is worker:
            self._assign(worker, event.role)

    def _give_back(self) -> None:
        """Lent workers that had their task, or get none, go back to the farm."""
        for worker in [worker for worker in self._crew.workers.values() if worker.lent and worker.free]:
            self._crew.give_back(worker.worker_id)
            self._do(ReturnWorker(worker.worker_id))

    def _on_ready(self, event: WorkerReady) -> None:
        worker = self._crew.workers.get(event.worker_id)
        if worker is not None and worker.role == event.role and worker.loading_since_s is not None:
            worker.loading_since_s = None
            self._load_failures = 0
            self._loaded.add(event.role)

    def _on_role_failed(self, event: RoleFailed) -> None:
        worker = self._crew.workers.get(event.worker_id)
        if worker is None or worker.loading_since_s is None or worker.role != event.role:
            return
        if event.fault.kind == "interrupted":
            worker.loading_since_s, worker.role = None, None
            return
        self._recycle(worker.worker_id, f"role {event.role} failed: {event.fault.message}")
        self._charge_load(worker, event.fault)

    def _charge_load(self, worker: Worker, fault: Fault) -> None:
        """A role that was loaded before can be loaded: what fails then is one worker's GPU, and there may be others."""
        self._load_failures += 1
        self._charge_node(worker.node_id)
        final = fault.kind in ("user", "permanent", "full", "corrupt")
        has_company = any(other.role and other.loading_since_s is None for other in self._crew.workers.values())
        is_alone_in_it = worker.role in self._loaded and has_company
        if final or (self._load_failures >= self._budgets.loads and not is_alone_in_it):
            self._end(fault.exit_code, f"workers cannot be made ready: {fault.message}")
        else:
            self._note(f"a worker on {worker.node_id} could not be made ready: {fault.message}", warning=True)

    def _on_lost(self, event: WorkerLost) -> None:
        worker = self._crew.remove(event.worker_id)
        if worker is None:
            return
        kind: FaultKind = "lost" if event.node_lost or self._crew.is_draining(worker.node_id) else "died"
        self._note(f"worker {worker.worker_id} on {worker.node_id} lost: {event.reason}", warning=True)
        if worker.loading_since_s is not None and kind == "died":
            self._charge_load(worker, Fault("died", event.reason))
        job = self._job_of(worker)
        if job is not None:
            self._end_attempt(job, Fault(kind, event.reason))

    def _recycle(self, worker_id: str, reason: str, fault: Fault | None = None) -> None:
        worker = self._crew.remove(worker_id)
        if worker is None:
            return
        self._do(RecycleWorker(worker_id, reason))
        job = self._job_of(worker)
        if job is not None and fault is not None:
            self._end_attempt(job, fault)

    def _job_of(self, worker: Worker) -> Job | None:
        job = self._jobs.get(worker.task_id or "")
        return job if job is not None and job.worker_id == worker.worker_id else None

    def _on_draining(self, event: NodeDraining) -> None:
        until_s = None if event.deadline_s is None else self._clock_s + event.deadline_s
        self._crew.drain(event.node_id, until_s)
        self._save_on_draining_nodes()

    def _save_on_draining_nodes(self) -> None:
        ending = self._crew.ending_nodes(self._clock_s)
        self._end_orders([job for job in self._jobs.values() if job.node_id in ending])

    # Orders

    def _current(self, worker_id: str, task_id: str, attempt: int) -> Job | None:
        """The job an event speaks of, None if that attempt is not under way (any more)."""
        job = self._jobs.get(task_id)
        if job is None or job.worker_id != worker_id or job.order.attempt != attempt:
            return None
        return job

    def _on_progress(self, event: Progress) -> None:
        job = self._current(event.worker_id, event.task_id, event.attempt)
        if job is None:
            return
        if event.steps > job.steps or event.frames > job.frames:
            job.steps, job.frames = max(job.steps, event.steps), max(job.frames, event.frames)
            job.alive_s = self._clock_s
        self._save_partial(job, event.partial, event.steps)

    def _save_partial(self, job: Job, partial: ArtifactFile | None, steps: int) -> None:
        log = self._log(job.order.task.id)
        if partial is None or partial == log.partial or steps < log.partial_steps:
            return
        self._write(PartialSaved(job.order.task.id, job.order.attempt, self.epoch, steps, partial))

    def _on_produced(self, event: TaskProduced) -> None:
        job = self._current(event.worker_id, event.task_id, event.attempt)
        if job is None or event.epoch != self.epoch:
            self._ignore(event)
            return
        if not self._inputs_stand(job.order):
            self._crew.release(event.task_id)
            self._end_attempt(job, Fault("lost", "an input was found corrupt meanwhile"))
            return
        del self._jobs[event.task_id]
        record = CommitRecord(
            task_id=event.task_id,
            attempt=event.attempt,
            epoch=self.epoch,
            files=event.produced.files,
            inputs_sha256={i: artifact_sha256(files) for i, files in job.order.inputs.items()},
            measures=event.produced.measures,
            seconds=event.produced.seconds,
            host=event.produced.host,
        )
        self._committing[event.task_id] = record
        self._do(Commit(record))

    def _inputs_stand(self, order: Order) -> bool:
        return all(
            input_id in self._commits and self._commits[input_id].files == files
            for input_id, files in order.inputs.items()
        )

    def _on_failed(self, event: TaskFailed) -> None:
        job = self._current(event.worker_id, event.task_id, event.attempt)
        if job is None or event.epoch != self.epoch:
            self._ignore(event)
            return
        self._save_partial(job, event.partial, event.steps)
        if event.fault.kind in ("memory", "device"):
            # What the process still holds is likely to be what it lacked, and a CUDA error stays with its process:
            # only a fresh one can do better.
            self._recycle(event.worker_id, f"{event.task_id}: {event.fault.message}", event.fault)
            return
        self._crew.release(event.task_id)
        self._end_attempt(job, event.fault)

    def _ignore(self, event: TaskProduced | TaskFailed) -> None:
        if event.task_id not in self._committing and event.task_id not in self._graph.done:
            self._note(f"{event.task_id}: late answer of attempt {event.attempt} ignored")

    # Commits

    def _on_committed(self, record: CommitRecord) -> None:
        task_id = record.task_id
        if task_id not in self._committing:
            return
        del self._committing[task_id]
        self._crew.succeeded(self._crew.release(task_id))
        self._outage = None
        if not self._chain_stands(record):
            self._write(Invalidated(task_id, record.attempt, record.epoch, "an input was found corrupt"))
            self._graph.give_back(task_id)
            return
        self._commits[task_id] = record
        if task_id not in self._graph.tasks:
            return
        task = self._graph.tasks[task_id]
        self._graph.finish(task_id)
        self._tally(task_id, record)
        self._refresh_due |= task.kind in ("encode", "film")
        self._refresh()

    def _chain_stands(self, record: CommitRecord) -> bool:
        return all(
            input_id in self._commits and artifact_sha256(self._commits[input_id].files) == sha256
            for input_id, sha256 in record.inputs_sha256.items()
        )

    def _on_refused(self, event: CommitRefused) -> None:
        record = self._committing.get(event.task_id)
        if record is None or (record.attempt, record.epoch) != (event.attempt, event.epoch):
            return
        del self._committing[event.task_id]
        node_id = self._crew.release(event.task_id)
        # The attempt's own files are short or missing: its fault, not that of an input.
        kind: FaultKind = "transient" if event.fault.kind == "corrupt" else event.fault.kind
        fault = Fault(kind, f"not committed: {event.fault.message}", exit_code=event.fault.exit_code)
        self._close_attempt(event.task_id, event.attempt, node_id, fault)

    def _on_ledger_failed(self, fault: Fault) -> None:
        # Nothing may be written any more, so what is under way is left as it is: open attempts.
        if self._jobs:
            self._do(StopWorkers(tuple(job.worker_id for job in self._jobs.values())))
        self._out.entries.clear()
        self._finish(fault.exit_code, fault.message)

    # Failures

    def _end_attempt(self, job: Job, fault: Fault) -> None:
        del self._jobs[job.order.task.id]
        self._close_attempt(job.order.task.id, job.order.attempt, job.node_id, fault)

    def _close_attempt(self, task_id: str, attempt: int, node_id: str, fault: Fault) -> None:
        bad_task_id = self._owner_of(fault.artifact_path) if fault.kind == "corrupt" else ""
        if fault.kind == "corrupt" and not bad_task_id:
            fault = Fault("transient", fault.message, fault.log_tail)
        self._write(AttemptFailed(task_id, attempt, self.epoch, fault.kind, fault.message, node_id, fault.log_tail))
        if fault.kind in (*CHARGED, "died"):
            self._charge_node(node_id)
        if fault.kind == "corrupt":
            self._on_corrupt(task_id, attempt, bad_task_id, fault)
        if fault.kind == "store":
            self._on_outage(fault)
        if task_id not in self._graph.tasks:
            return
        if final := self._given_up(task_id) or self._final(fault):
            self._give_up(task_id, final)
            return
        if fault.kind == "quality":
            # Not given back: under the plan that Replan asks for it is another task.
            self._redo(task_id, fault)
            return
        charged = self._log(task_id).transient
        pause_s = RETRY_PAUSE_S * 2**charged if fault.kind in CHARGED else 0.0
        self._not_before_s[task_id] = self._clock_s + pause_s
        self._graph.give_back(task_id)

    def _charge_node(self, node_id: str) -> None:
        if self._crew.failed(node_id):
            self._note(f"node {node_id} failed {self._budgets.node} times in a row: avoided", warning=True)

    def _final(self, fault: Fault) -> Fault | None:
        """The fault itself if it may not be retried at all."""
        return fault if fault.kind in ("user", "full", "permanent") else None

    def _given_up(self, task_id: str) -> Fault | None:
        """Why the task's history forbids another attempt, None if it does not."""
        log = self._state.logs.get(task_id)
        if log is None:
            return None
        return given_up(log, self._budgets, self._state.refusals.get(self._scope(task_id), 0))

    def _give_up(self, task_id: str, fault: Fault) -> None:
        task = self._graph.tasks[task_id]
        self._failures[task_id] = fault
        self._graph.kill(task_id)
        self._note(f"{task.label or task_id} given up: {fault.message}", warning=True)
        if fault.kind in ("user", "full"):
            self._end(fault.exit_code, f"{task.label or task_id}: {fault.message}")

    def _redo(self, task_id: str, fault: Fault) -> None:
        for scope in self._noise_behind(task_id):
            generation = self._state.redo.get(scope, 0) + 1
            self._write(RedoRequested(scope, generation, fault.message))
        self._replan(task_id)

    def _noise_behind(self, task_id: str) -> list[str]:
        """The scopes that get new noise when the gate refuses a task: its own, and those of the windows that a unit
        shows, since encoding the same latents again would show the same.
        """
        task = self._graph.tasks[task_id]
        shown = task.inputs if task.kind == "encode" else ()
        windows = [input_id for input_id in shown if self._graph.tasks[input_id].kind == "window"]
        return [self._scope(one) for one in (task_id, *windows)]

    def _scope(self, task_id: str) -> str:
        """The plan's name for the piece of noise behind a task."""
        return self._graph.tasks[task_id].label or task_id

    def _replan(self, cause: str) -> None:
        self._replanning = True
        self._do(Replan(cause))

    def _owner_of(self, path: str) -> str:
        """The task whose artifact or saved state lies at this path, "" if that is not known."""
        folder, _, rest = path.partition("/")
        task_id = rest.partition("/")[0]
        if folder == "attempts" and task_id in self._commits:
            return task_id
        log = self._state.logs.get(task_id)
        if folder == "partials" and log is not None and log.partial is not None:
            return task_id
        return ""

    def _on_corrupt(self, task_id: str, attempt: int, bad_task_id: str, fault: Fault) -> None:
        self._note(f"corrupt: {fault.message}; rendering it again", warning=True)
        if fault.artifact_path.startswith("partials/"):
            self._write(PartialSaved(task_id, attempt, self.epoch, 0, None))
            return
        bad = dependants_of({bad_task_id: fault.message}, self._commits)
        for invalid_id, reason in bad.items():
            record = self._commits.pop(invalid_id)
            self._write(Invalidated(invalid_id, record.attempt, record.epoch, reason))
        self._graph.undo(bad)
        if any(task_id in self._graph.tasks and self._graph.tasks[task_id].locked for task_id in bad):
            # A lock without its bytes is over: the plan has a task that can be run instead.
            self._replan(bad_task_id)
        if bad_task_id in self._graph.tasks and (final := self._given_up(bad_task_id)):
            self._give_up(bad_task_id, final)

    def _on_outage(self, fault: Fault) -> None:
        if self._outage is None:
            self._outage = _Outage(self._clock_s, self._clock_s)
        elif self._clock_s >= self._outage.until_s:
            self._outage.failures += 1
        pause_s = min(MAX_OUTAGE_PAUSE_S, OUTAGE_PAUSE_S * 2 ** (self._outage.failures - 1))
        self._outage.until_s = max(self._outage.until_s, self._clock_s + pause_s)
        self._note(f"the store does not answer ({fault.message}); waiting {pause_s:.0f} s", warning=True)
        if self._clock_s - self._outage.since_s > self._timeouts.outage_s:
            self._end(1, f"the store has not answered for too long: {fault.message}")

    # Scheduling

    def _schedule(self) -> None:
        if self._replanning or self._ending is not None or (self._outage and self._clock_s < self._outage.until_s):
            return
        if not any(worker.free for worker in self._crew.workers.values()):
            return
        usable = self._crew.usable()
        self._demand = None
        # Counted once: on a large cluster most workers are free at the end, and each looks at all the others.
        staff, stable = Counter[Role | None](), Counter[Role | None]()
        for (role, spot), number in Counter((worker.role, worker.spot) for worker in usable).items():
            staff[role] += number
            stable[role] += 0 if spot else number
        asked_in_vain: set[tuple[object, ...]] = set()
        for worker in usable:
            if not worker.free:
                continue
            likeness = (worker.role, worker.roles, worker.spot, worker.lent, worker.used)
            if likeness in asked_in_vain:
                continue
            told = len(self._out.commands)
            counts = (staff,) if worker.spot else (staff, stable)
            for count in counts:
                count[worker.role] -= 1
            self._employ(worker, staff, stable, usable)
            for count in counts:
                count[worker.role] += 1
            if len(self._out.commands) > told:
                asked_in_vain.clear()
            elif worker.role is None or not any(self._graph.ready_of[kind] for kind in kinds_of(worker.role, staff)):
                # Nothing has changed, so the next one like it would find as little. Where a task was passed over it
                # might: on another node.
                asked_in_vain.add(likeness)

    def _employ(self, worker: Worker, roles: Staff, stable: Staff, usable: Sequence[Worker]) -> None:
        if worker.used:
            return
        if must_leave_for_chain(worker.role, worker.roles, roles, self._graph.ready("segment")):
            self._assign(worker, "chain")
            return
        for kind in kinds_of(worker.role, roles) if worker.role else ():
            task_id = self._graph.take(kind, lambda task_id: self._eligible(task_id, worker, usable))
            if task_id is not None:
                self._dispatch(worker, self._graph.tasks[task_id])
                return
        if worker.lent:
            return
        demand = self._current_demand()
        long = LONG_CHAIN // 2 if worker.role == "chain" else LONG_CHAIN
        if not worker.spot and demand.segments >= long * demand.chain:
            roles = {**roles, "chain": stable.get("chain", 0)}
        role = choose_role(worker.role, worker.roles, roles, demand)
        if role is not None and role != worker.role:
            self._assign(worker, role)

    def _current_demand(self) -> Demand:
        """Worked out once for all workers that are free after an event: it walks all chains."""
        if self._demand is None:
            left = self._graph.left
            media = left["source"] + left["encode"] + left["film"]
            chains = self._graph.live_chains(len(self._crew.workers))
            running = sum(job.order.task.kind == "segment" for job in self._jobs.values())
            self._demand = Demand(min(1, left["text"]), chains, left["window"], media, left["segment"] - running)
        return self._demand

    def _assign(self, worker: Worker, role: Role) -> None:
        worker.role, worker.loading_since_s = role, self._clock_s
        self._do(AssignRole(worker.worker_id, role))

    def _eligible(self, task_id: str, worker: Worker, usable: Sequence[Worker]) -> bool:
        """Not while the task pauses, and not where it failed last if somebody elsewhere can take it."""
        if self._clock_s < self._not_before_s.get(task_id, 0.0):
            return False
        log = self._state.logs.get(task_id)
        if log is None or worker.node_id not in log.failed_nodes[-1:]:
            return True
        roles = ROLES_FOR_KIND[self._graph.tasks[task_id].kind]
        return not any(peer.role in roles and peer.node_id != worker.node_id for peer in usable)

    def _dispatch(self, worker: Worker, task: Task) -> None:
        log = self._log(task.id)
        order = Order(
            task=task,
            attempt=log.attempts + 1,
            epoch=self.epoch,
            inputs={input_id: self._commits[input_id].files for input_id in task.inputs},
            attempt_path=f"attempts/{task.id}/{log.attempts + 1:04d}-{self.epoch}",
            partial=log.partial,
        )
        self._write(AttemptStarted(task.id, order.attempt, self.epoch, worker.worker_id, worker.node_id, worker.host))
        self._jobs[task.id] = Job(order, worker.worker_id, worker.node_id, self._clock_s)
        worker.task_id, worker.used = task.id, worker.lent
        self._do(Dispatch(worker.worker_id, order))

    # What people ask for

    def _on_asked(self, request: Request) -> None:
        entries = entries_for(request, self._state, self._graph.tasks.values(), self.epoch)
        for entry in entries:
            self._write(entry)
        if not entries:
            return
        self._note(f"{request.kind} asked for")
        match request.kind:
            case "pause":
                self._stop(STOP_CODES["pause"], "paused on request; `longtake render` goes on")
            case "cancel":
                self._stop(STOP_CODES["cancel"], "cancelled on request; what is committed is kept", grace_s=0.0)
            case "retry":
                self._revive()
            case _:
                self._replan(request.id)

    def _revive(self) -> None:
        """Tasks given up may be tried again."""
        self._failures.clear()
        self._not_before_s.clear()
        self._graph.killed.clear()
        self._graph.rebuild()

    # The end

    def _stop(self, exit_code: int, message: str, grace_s: float | None = None) -> None:
        first = self._ending is None or self._ending.until_s is None
        grace_s = self._timeouts.stop_s if grace_s is None and first else grace_s or 0.0
        self._ending = _Ending(exit_code, message, self._clock_s + grace_s)
        if first and self._jobs:
            self._do(StopWorkers(tuple(job.worker_id for job in self._jobs.values())))

    def _end(self, exit_code: int, message: str) -> None:
        if self._ending is None:
            self._ending = _Ending(exit_code, message, None)

    def _conclude(self) -> None:
        if self._committing or self._replanning:
            return
        if not self._graph.wanted:
            self._finish(0, "done")
        elif self._ending is not None:
            late = self._ending.until_s is not None and self._clock_s >= self._ending.until_s
            if late:
                for job in list(self._jobs.values()):
                    self._end_attempt(job, Fault("interrupted", "did not stop in time"))
            if not self._jobs:
                self._finish(self._ending.exit_code, self._ending.message)
        elif not self._jobs and not self._graph.alive_left():
            self._finish_failed()

    def _finish_failed(self) -> None:
        task_id, fault = next(iter(self._failures.items()))
        others = f" (and {len(self._failures) - 1} more)" if len(self._failures) > 1 else ""
        task = self._graph.tasks.get(task_id)
        label = (task.label if task else "") or task_id
        self._finish(fault.exit_code, f"{label}: {fault.message}{others}. `longtake retry` gives it a new budget")

    def _finish(self, exit_code: int, message: str) -> None:
        if self._refresh_due:
            self._do(Refresh())
        self._finished = True
        self._do(Finish(exit_code, message))

    # What a farm wants to know

    def needs(self) -> Needs:
        """What lent workers could do here now, and how much is left. Nothing while nothing may be sent."""
        waiting = self._replanning or self._finished or self._ending is not None
        if waiting or (self._outage and self._clock_s < self._outage.until_s):
            return Needs(path_s=self._graph.path_s(), work_s=self._graph.work_s)
        ready = self._graph.ready_of.copy()
        for task_id, until_s in self._not_before_s.items():
            if self._clock_s < until_s and self._graph.is_ready(task_id):
                ready[self._graph.tasks[task_id].kind] -= 1
        for worker in self._crew.workers.values():
            if worker.lent and worker.role is not None and worker.loading_since_s is not None:
                self._reserve(worker.role, ready)
        ahead: dict[Role, int] = {"chain": self._graph.chains_left(), "refine": self._graph.left["window"]}
        return Needs(ready, ahead, self._graph.path_s(), self._graph.work_s)

    def _reserve(self, role: Role, ready: Counter[TaskKind]) -> None:
        """What a lent worker that still loads will take does not count as something nobody has."""
        kind = next((kind for kind in kinds_of(role, {}) if ready[kind] > 0), None)
        if kind is not None:
            ready[kind] -= 1

    # What a person sees

    @property
    def overrides(self) -> Overrides:
        """What is journalled so far: what to plan under."""
        return replace(self._state, commits=self._commits).overrides

    def _tally(self, task_id: str, record: CommitRecord) -> None:
        task = self._graph.tasks[task_id]
        self._tallies.setdefault(task.kind, Tally()).add(task, record)

    def progress(self, now_s: float) -> ProgressSummary:
        """What to show a person. Counts every task of the plan; elapsed time is this run's."""
        kinds = dict.fromkeys(task.kind for task in self._graph.tasks.values())
        jobs, tallies = self._jobs.values(), self._tallies
        workers = self._crew.workers
        return ProgressSummary(
            self._clock_s,
            {kind: phase_progress(kind, self._graph, jobs, tallies.get(kind, Tally())) for kind in kinds},
            {name: activity(worker, self._graph.tasks) for name, worker in workers.items()},
            expected_rest_s(self._graph, tallies, len(workers)),
            self._waiting(),
        )

    def _waiting(self) -> str:
        if self._ending is not None:
            return self._ending.message
        if self._outage is not None and self._clock_s < self._outage.until_s:
            return f"the store does not answer, next try in {self._outage.until_s - self._clock_s:.0f} s"
        return "" if self._crew.workers else "no worker yet"

    # Writing

    def _log(self, task_id: str) -> TaskLog:
        return self._state.logs.setdefault(task_id, TaskLog())

    def _write(self, entry: JournalEntry) -> None:
        self._state.apply(entry)
        self._out.entries.append(entry)

    def _do(self, command: Command) -> None:
        self._out.commands.append(command)

    def _note(self, message: str, *, warning: bool = False) -> None:
        self._do(Note(message, warning))
