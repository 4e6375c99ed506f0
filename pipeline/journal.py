"""What the ledger's journal says, and what follows from it for one task.

Entries are written before the thing they speak of happens, so that a task which kills its worker, or the
whole render, is remembered by the next run. `TaskLog` is the fold of all entries about one task; the machine
applies the entries it writes to its own logs, so a resumed render counts as the interrupted one did.

Entries are frozen and JSON-able (`entry_to_json`, `entry_from_json`). Times are put in by the ledger, for people only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.tasks import ArtifactFile

FaultKind = Literal[
    "user",
    "transient",
    "memory",
    "device",
    "store",
    "full",
    "lost",
    "died",
    "stalled",
    "interrupted",
    "corrupt",
    "quality",
    "permanent",
]
"""Why an attempt ended without a result.

    user         a person has to change something; never retried
    transient    charged to the task's budget
    memory       host or device memory ran out; charged, and the worker's process is recycled
    device       a GPU, or a library on it, failed; charged, and the worker's process is recycled
    store        the store does not answer; waited out, not charged
    full         no space left; the render ends, everything committed is kept
    lost         the node is gone or was taken away; not charged
    died         the worker's process died on a live node; counted, see `TaskLog.deaths`
    stalled      no progress in time; the worker was recycled; charged
    interrupted  a stop was asked for; not charged
    corrupt      an input's bytes differ from their record; the input is rendered again, not charged
    quality      the gate refused the output
    permanent    cannot pass by itself
"""
CHARGED: tuple[FaultKind, ...] = ("transient", "memory", "device", "stalled")
"""What counts against a task's budget of retries."""


@dataclass(frozen=True)
class AttemptStarted:
    """An order is about to be sent. Durable before it is."""

    task_id: str
    attempt: int
    epoch: int
    worker_id: str
    node_id: str
    host: str = ""
    """The machine's name, for people."""


@dataclass(frozen=True)
class AttemptFailed:
    """An attempt ended without a commit."""

    task_id: str
    attempt: int
    epoch: int
    kind: FaultKind
    message: str
    node_id: str = ""
    log_tail: str = ""


@dataclass(frozen=True)
class PartialSaved:
    """A denoising state was saved; the next attempt goes on from there. `steps` are done.

    `partial` None: the state saved before cannot be used, begin again.
    """

    task_id: str
    attempt: int
    epoch: int
    steps: int
    partial: ArtifactFile | None


@dataclass(frozen=True)
class Invalidated:
    """The commit made by this attempt does not count any more (its bytes, or those it came from, are bad)."""

    task_id: str
    attempt: int
    epoch: int
    reason: str


@dataclass(frozen=True)
class RedoRequested:
    """From now on the plan gives `scope` (the plan's name for a piece of noise) this redo generation."""

    scope: str
    generation: int
    reason: str
    asked: bool = False
    """By a person, not by the quality gate: the gate's budget begins anew."""


@dataclass(frozen=True)
class TaskReset:
    """A person asked for the task to be tried again: everything charged so far is forgiven."""

    task_id: str
    scope: str = ""
    """The task's redo scope: what the gate refused there is forgiven, too."""


@dataclass(frozen=True)
class RequestTaken:
    """A person's request (`pipeline.requests`) was taken in; what it leads to stands in the same write."""

    request_id: str
    kind: str
    epoch: int


@dataclass(frozen=True)
class StartedOver:
    """A person asked to start over: nothing committed or journalled before this epoch counts any more.

    Written in the epoch's lease, not in the journal; `Ledger.history` puts it where it belongs.
    """

    epoch: int


@dataclass(frozen=True)
class TakePicked:
    """From now on the film shows this take of the shot; takes are counted from 1."""

    shot_id: str
    take: int


@dataclass(frozen=True)
class ShotLocked:
    """From now on these tasks stand for the shot's, whatever code and checkpoint would make of it now."""

    shot_id: str
    tasks: Mapping[str, str]
    """By what was ordered (`pipeline.locks.order_digest`): the id of the task that made it."""
    labels: Mapping[str, str]
    """By label of a segment or window among them, what was ordered."""


@dataclass(frozen=True)
class ShotUnlocked:
    """The lock of the shot is over."""

    shot_id: str


@dataclass(frozen=True)
class NumericsMixed:
    """The render goes on under another numerics record, because a person allowed it."""

    differences: tuple[str, ...]


TaskEntry = AttemptStarted | AttemptFailed | PartialSaved | Invalidated | TaskReset
"""What is about one task."""
JournalEntry = (
    TaskEntry
    | RedoRequested
    | RequestTaken
    | StartedOver
    | TakePicked
    | ShotLocked
    | ShotUnlocked
    | NumericsMixed
)

_KINDS: dict[str, type[Any]] = {
    "attempt": AttemptStarted,
    "failed": AttemptFailed,
    "partial": PartialSaved,
    "invalidated": Invalidated,
    "redo": RedoRequested,
    "reset": TaskReset,
    "request": RequestTaken,
    "pick": TakePicked,
    "lock": ShotLocked,
    "unlock": ShotUnlocked,
    "mixed": NumericsMixed,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def entry_to_json(entry: JournalEntry) -> dict[str, Any]:
    """The entry as a JSON object; `entry` names its type."""
    fields = dict(vars(entry))
    if isinstance(entry, PartialSaved) and entry.partial is not None:
        fields["partial"] = vars(entry.partial)
    return {"entry": _NAMES[type(entry)], **fields}


def entry_from_json(value: Mapping[str, Any]) -> JournalEntry:
    """The entry that `entry_to_json` wrote. Raises KeyError or TypeError for anything else."""
    fields = {name: content for name, content in value.items() if name != "entry"}
    kind = _KINDS[value["entry"]]
    if kind is PartialSaved and fields["partial"] is not None:
        fields["partial"] = ArtifactFile(**fields["partial"])
    if kind is NumericsMixed:
        fields["differences"] = tuple(fields["differences"])
    entry: JournalEntry = kind(**fields)
    return entry


@dataclass
class TaskLog:
    """The fold of the journal for one task."""

    attempts: int = 0
    """The highest attempt number handed out."""
    transient: int = 0
    """Failures charged to the budget (transient, memory, stalled)."""
    quality: int = 0
    deaths: int = 0
    """Attempts since the last sign of life that took their process, or the whole render, with them.

    Charged when the attempt starts and taken back when it ends in any other way, so that an attempt whose end
    nobody could write down stays charged.
    """
    open: tuple[int, int] | None = None
    """(attempt, epoch) that has started and of which no end is known."""
    partial: ArtifactFile | None = None
    partial_steps: int = 0
    invalidated: set[tuple[int, int]] = field(default_factory=set)
    """(attempt, epoch) of commits that do not count."""
    went_bad: int = 0
    """How often that happened since the task was last reset."""
    failed_nodes: tuple[str, ...] = ()
    """Nodes where it failed since it was last invalidated or reset, oldest first."""
    last_failure: AttemptFailed | None = None

    @property
    def charged(self) -> bool:
        """Whether there is anything to forgive."""
        return bool(self.transient or self.quality or self.deaths or self.went_bad or self.last_failure)

    def apply(self, entry: TaskEntry) -> None:
        """Take one entry in, in the journal's order."""
        match entry:
            case AttemptStarted():
                self.attempts = max(self.attempts, entry.attempt)
                self.deaths += 1
                self.open = (entry.attempt, entry.epoch)
            case AttemptFailed():
                self._apply_failure(entry)
            case PartialSaved():
                self.deaths = 0
                self.partial, self.partial_steps = entry.partial, entry.steps
            case Invalidated():
                self.invalidated.add((entry.attempt, entry.epoch))
                self.went_bad += 1
                self.partial, self.partial_steps = None, 0
                self.transient = self.quality = self.deaths = 0
                self.failed_nodes = ()
            case TaskReset():
                self.transient = self.quality = self.deaths = self.went_bad = 0
                self.failed_nodes, self.last_failure = (), None

    def _apply_failure(self, entry: AttemptFailed) -> None:
        if self.open == (entry.attempt, entry.epoch):
            self.open = None
        self.last_failure = entry
        if entry.kind in CHARGED:
            self.transient += 1
        if entry.kind == "quality":
            self.quality += 1
        if entry.kind in (*CHARGED, "died") and entry.node_id:
            self.failed_nodes = (*self.failed_nodes, entry.node_id)
        if entry.kind == "lost":
            self.deaths = max(0, self.deaths - 1)
        elif entry.kind != "died":
            self.deaths = 0
