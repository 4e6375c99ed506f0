"""The story of each task, told by the journal and the commit records: attempts, hosts, times, ends.

Contract: pure. What nobody wrote down is said to be unknown, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pipeline.journal import (
    AttemptFailed,
    AttemptStarted,
    FaultKind,
    Invalidated,
    JournalEntry,
    PartialSaved,
    StartedOver,
)
from pipeline.tasks import CommitRecord

Ending = Literal["running", "unknown", "committed", "invalidated"] | FaultKind
"""How an attempt ended. `unknown`: its render ended without writing it down. `invalidated`: it was committed, and
its bytes, or those it was computed from, were found bad later."""


@dataclass
class AttemptStory:
    """One attempt. Times are Unix times by the orchestrator's clock."""

    attempt: int
    epoch: int
    host: str
    node_id: str
    worker_id: str
    started_at_s: float
    ended_at_s: float | None = None
    ending: Ending = "running"
    message: str = ""
    log_tail: str = ""
    saved_steps: int = 0
    seconds: float | None = None
    """What the worker measured; only of a committed attempt."""
    log: str = ""
    """Path of the worker's full log in the store."""


@dataclass
class TaskStory:
    """Everything that was tried for one task, oldest first."""

    task_id: str
    attempts: list[AttemptStory] = field(default_factory=list)


def log_path(task_id: str, attempt: int, epoch: int) -> str:
    """Where a worker keeps the log of an attempt."""
    return f"logs/{task_id}/{attempt:04d}-{epoch}.log"


def task_stories(
    history: Iterable[tuple[float, JournalEntry]], commits: Mapping[str, CommitRecord], live_epoch: int | None
) -> dict[str, TaskStory]:
    """By task id. `commits`: those that count. `live_epoch`: of the orchestrator that runs, None if none does."""
    stories: dict[str, TaskStory] = {}
    for at_s, entry in history:
        match entry:
            case AttemptStarted():
                story = stories.setdefault(entry.task_id, TaskStory(entry.task_id))
                story.attempts.append(_begin(at_s, entry))
            case AttemptFailed() | PartialSaved() | Invalidated():
                found = _find(stories.get(entry.task_id), entry.attempt, entry.epoch)
                if found is not None:
                    _go_on(found, at_s, entry)
            case StartedOver():
                stories.clear()
    for task_id, story in stories.items():
        record = commits.get(task_id)
        for attempt in story.attempts:
            _conclude(attempt, record, live_epoch)
    return stories


def _begin(at_s: float, entry: AttemptStarted) -> AttemptStory:
    path = log_path(entry.task_id, entry.attempt, entry.epoch)
    return AttemptStory(entry.attempt, entry.epoch, entry.host, entry.node_id, entry.worker_id, at_s, log=path)


def _find(story: TaskStory | None, attempt: int, epoch: int) -> AttemptStory | None:
    attempts = story.attempts if story else []
    return next((one for one in attempts if (one.attempt, one.epoch) == (attempt, epoch)), None)


def _go_on(story: AttemptStory, at_s: float, entry: AttemptFailed | PartialSaved | Invalidated) -> None:
    match entry:
        case PartialSaved():
            story.saved_steps = entry.steps
        case Invalidated():
            story.ending, story.message = "invalidated", entry.reason
        case AttemptFailed():
            story.ended_at_s, story.ending = at_s, entry.kind
            story.message, story.log_tail = entry.message, entry.log_tail


def _conclude(story: AttemptStory, record: CommitRecord | None, live_epoch: int | None) -> None:
    if story.ending != "running":
        return
    if record is not None and (record.attempt, record.epoch) == (story.attempt, story.epoch):
        story.ending, story.ended_at_s, story.seconds = "committed", record.committed_at_s, record.seconds
        story.host = story.host or record.host
    elif story.epoch != live_epoch:
        story.ending = "unknown"
