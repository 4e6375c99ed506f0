"""How often a task may fail and how long it may be silent, and what follows from its history."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.events import Fault
from pipeline.journal import TaskLog
from pipeline.tasks import TaskKind


@dataclass(frozen=True)
class Budgets:
    """How often something may fail before it is given up."""

    transient: int = 3
    """Retries of a task after transient failures and stalls."""
    quality: int = 2
    """Redos of a task with a new recorded seed after the gate refused its output."""
    deaths: int = 10
    """Attempts of a task in a row that took their process or the whole render with them."""
    invalidations: int = 5
    """How often a task's committed bytes may be found bad."""
    node: int = 3
    """Failures in a row on a node before it is avoided."""
    loads: int = 5
    """Failures in a row to load a role before the render is given up: one that nobody has loaded yet, or with no other
    worker at work.
    """


@dataclass(frozen=True)
class Timeouts:
    """Seconds without any progress after which a worker is recycled, by kind of task; and others."""

    text_s: float = 900.0
    source_s: float = 900.0
    segment_s: float = 1800.0
    window_s: float = 1800.0
    encode_s: float = 900.0
    film_s: float = 1800.0
    load_s: float = 3600.0
    stop_s: float = 10.0
    """Grace for running orders after StopRequested."""
    refresh_s: float = 10.0
    """At most one Refresh in this time."""
    outage_s: float = 3600.0
    """How long workers may get no answer from the store before the render is given up."""

    def of(self, kind: TaskKind) -> float:
        """The limit for one kind of task."""
        limit: float = getattr(self, f"{kind}_s")
        return limit


def given_up(log: TaskLog, budgets: Budgets, refusals: int = 0) -> Fault | None:
    """Why a task's history forbids another attempt, None if it does not.

    `refusals`: how often the gate had the task's scope made again; each time it is another task.
    """
    last = log.last_failure.message if log.last_failure else "the render died with it"
    if log.transient > budgets.transient:
        return Fault("permanent", f"failed {log.transient} times, last: {last}")
    if log.deaths > budgets.deaths:
        return Fault("permanent", f"took its process with it {log.deaths} times, last: {last}")
    if log.quality and refusals >= budgets.quality:
        return Fault("quality", f"refused by the gate {refusals + 1} times: {last}", exit_code=4)
    if log.went_bad > budgets.invalidations:
        return Fault("permanent", f"its bytes went bad in the store {log.went_bad} times")
    if log.last_failure and log.last_failure.kind == "permanent":
        return Fault("permanent", last)
    return None
