"""What the machine is told (events) and what it wants done (commands). Frozen values, no behaviour.

Every event carries `now_s`, the orchestrator's clock; the machine has no other. Use a monotonic clock.
Commands are carried out in the order given, each one durable before the next is begun.

A worker id names one incarnation of a worker: after a restart it joins under a new id. Events may come late,
twice or in another order; the machine ignores what does not speak of the current attempt.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline import errors
from pipeline.journal import FaultKind, JournalEntry
from pipeline.requests import Request
from pipeline.tasks import ArtifactFile, CommitRecord, Order, Produced, Role, TaskKind

ALL_ROLES: tuple[Role, ...] = ("text", "chain", "refine", "media")


@dataclass(frozen=True)
class Fault:
    """Why something failed, as far as the machine has to know."""

    kind: FaultKind
    message: str
    log_tail: str = ""
    exit_code: int = 1
    """What the command line returns if the render ends because of it."""
    artifact_path: str = ""
    """For `corrupt`: the path of the bad file in the render's folder (`attempts/<task id>/...`)."""


_FAULT_KINDS: tuple[tuple[type[BaseException], FaultKind], ...] = (
    (errors.UserError, "user"),
    (errors.StoreFull, "full"),
    (errors.CorruptArtifact, "corrupt"),
    (errors.StoreError, "store"),
    (errors.OutOfMemory, "memory"),
    (errors.DeviceError, "device"),
    (errors.TransientError, "transient"),
    (errors.LostError, "lost"),
    (errors.QualityError, "quality"),
    (errors.Interrupted, "interrupted"),
    (errors.PermanentError, "permanent"),
)


def fault_of(error: BaseException, log_tail: str = "") -> Fault:
    """The fault an exception stands for. What is outside the project's tree is `transient`: it is retried."""
    kind: FaultKind = next((kind for base, kind in _FAULT_KINDS if isinstance(error, base)), "transient")
    message = str(error) if isinstance(error, errors.LongtakeError) else f"{type(error).__name__}: {error}"
    code = getattr(error, "exit_code", 1)
    return Fault(kind, message, log_tail, exit_code=code, artifact_path=getattr(error, "path", "") or "")


# Events


@dataclass(frozen=True)
class WorkerJoined:
    """A worker is there and idle. `role` if it comes with one loaded; `roles` are those it can take. `spot`: on a
    machine that may be taken away.
    """

    now_s: float
    worker_id: str
    node_id: str
    role: Role | None = None
    roles: tuple[Role, ...] = ALL_ROLES
    host: str = ""
    spot: bool = False


@dataclass(frozen=True)
class WorkerLent:
    """A farm lends a worker, in this role, for one task; ReturnWorker gives it back, at once if there is nothing for
    it. It may come again under the same id.
    """

    now_s: float
    worker_id: str
    node_id: str
    role: Role
    loaded: bool
    """Whether it has the role's models; if not, loading them is ordered first."""
    host: str = ""


@dataclass(frozen=True)
class WorkerReady:
    """The worker has loaded the role it was assigned."""

    now_s: float
    worker_id: str
    role: Role


@dataclass(frozen=True)
class RoleFailed:
    """The worker could not load the role it was assigned."""

    now_s: float
    worker_id: str
    role: Role
    fault: Fault


@dataclass(frozen=True)
class WorkerLost:
    """The worker is gone. `node_lost`: with its node (taken away, preempted), so that nothing is charged."""

    now_s: float
    worker_id: str
    reason: str
    node_lost: bool = False


@dataclass(frozen=True)
class NodeDraining:
    """The node will be taken away, in `deadline_s` seconds if that is known. Nothing new is sent there."""

    now_s: float
    node_id: str
    deadline_s: float | None = None


@dataclass(frozen=True)
class Progress:
    """An order moved on. `steps` and `frames` count from the task's start; `partial` if state was saved."""

    now_s: float
    worker_id: str
    task_id: str
    attempt: int
    steps: int = 0
    frames: int = 0
    partial: ArtifactFile | None = None


@dataclass(frozen=True)
class TaskProduced:
    """The worker wrote its files and is idle again. Nothing is done before it is committed."""

    now_s: float
    worker_id: str
    task_id: str
    attempt: int
    epoch: int
    produced: Produced


@dataclass(frozen=True)
class TaskFailed:
    """The order ended without a result; the worker is idle. `partial` and `steps` if state was saved."""

    now_s: float
    worker_id: str
    task_id: str
    attempt: int
    epoch: int
    fault: Fault
    partial: ArtifactFile | None = None
    steps: int = 0


@dataclass(frozen=True)
class Committed:
    """The record that now stands for the task (its own attempt's, or one that was there before)."""

    now_s: float
    record: CommitRecord


@dataclass(frozen=True)
class CommitRefused:
    """The ledger did not take the record: the files are short or missing, or the attempt was given up."""

    now_s: float
    task_id: str
    attempt: int
    epoch: int
    fault: Fault


@dataclass(frozen=True)
class LedgerFailed:
    """The ledger cannot be written any more: lease lost, disk full, too long an outage. Ends the render."""

    now_s: float
    fault: Fault


@dataclass(frozen=True)
class StopRequested:
    """SIGTERM (75) or Ctrl-C (130). A second one does not wait for running orders."""

    now_s: float
    exit_code: int


@dataclass(frozen=True)
class Asked:
    """A person's request was found in the store."""

    now_s: float
    request: Request


@dataclass(frozen=True)
class Tick:
    """Time has passed. Wanted every second or so, at least every 30."""

    now_s: float


Event = (
    WorkerJoined
    | WorkerLent
    | WorkerReady
    | RoleFailed
    | WorkerLost
    | NodeDraining
    | Progress
    | TaskProduced
    | TaskFailed
    | Committed
    | CommitRefused
    | LedgerFailed
    | StopRequested
    | Asked
    | Tick
)


# Commands


@dataclass(frozen=True)
class Journal:
    """`ledger.journal(entries)`, durable before the next command."""

    entries: tuple[JournalEntry, ...]


@dataclass(frozen=True)
class AssignRole:
    """Load the role (dropping the one before); answer with WorkerReady or RoleFailed."""

    worker_id: str
    role: Role


@dataclass(frozen=True)
class Dispatch:
    """Send the order; answer with Progress..., then TaskProduced, TaskFailed or WorkerLost."""

    worker_id: str
    order: Order


@dataclass(frozen=True)
class Commit:
    """`ledger.commit(record)`; answer with Committed, CommitRefused or LedgerFailed."""

    record: CommitRecord


@dataclass(frozen=True)
class RecycleWorker:
    """Kill the worker's process and start another in its place; it joins under a new id."""

    worker_id: str
    reason: str


@dataclass(frozen=True)
class ReturnWorker:
    """The farm has the worker back: it has nothing more to do here."""

    worker_id: str


@dataclass(frozen=True)
class StopWorkers:
    """Ask the running orders of these workers to save their state and stop (TaskFailed, `interrupted`)."""

    worker_ids: tuple[str, ...]


@dataclass(frozen=True)
class Refresh:
    """Write what a person looks at again: contact sheet, report, film so far."""


@dataclass(frozen=True)
class Replan:
    """An override was journalled: plan again and go on with `machine.replace_plan(tasks)`.

    Nothing is sent before that. `cause`: the task or the request that led to it.
    """

    cause: str


@dataclass(frozen=True)
class Note:
    """A line for the log, and for the person if it is a warning."""

    message: str
    warning: bool = False


@dataclass(frozen=True)
class Finish:
    """The render ends with this exit code. Comes once and last."""

    exit_code: int
    message: str


Command = (
    Journal
    | AssignRole
    | Dispatch
    | Commit
    | RecycleWorker
    | ReturnWorker
    | StopWorkers
    | Refresh
    | Replan
    | Note
    | Finish
)


@dataclass(frozen=True)
class PhaseProgress:
    """One kind of task: how many there are, are done, run, have failed for good."""

    total: int = 0
    done: int = 0
    running: int = 0
    failed: int = 0
    frames: int = 0
    """Frames reported by finished and running orders of this run."""
    work_total_s: float = 0.0
    """Expected seconds on the plan's reference worker, of all tasks."""
    work_done_s: float = 0.0
    seconds_spent: float = 0.0
    """Measured seconds of the tasks done (this run's and those found committed)."""

    @property
    def waiting(self) -> int:
        """How many are neither done nor running, and may still be."""
        return max(0, self.total - self.done - self.running - self.failed)


@dataclass(frozen=True)
class ProgressSummary:
    """What a progress display needs. `eta_s` is None until something has been measured."""

    elapsed_s: float
    phases: dict[TaskKind, PhaseProgress] = field(default_factory=dict)
    workers: dict[str, str] = field(default_factory=dict)
    """For each worker, what it is doing, in a few words."""
    eta_s: float | None = None
    waiting: str = ""
    """Why nothing is being sent, if that is so (store outage, stop requested)."""
