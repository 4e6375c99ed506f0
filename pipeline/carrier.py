"""Carrying out the machine's commands: the ledger's here, the workers' through `Hands`.

The one place that fixes the order in which things become durable, used by the orchestrator and by the
simulation alike. Commands run strictly in order; if the ledger fails, the rest of them is not begun and the
machine is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from pipeline.errors import CorruptArtifact, LeaseLost, StoreError, StoreFull, UserError, WorkerLost
from pipeline.events import (
    AssignRole,
    Command,
    Commit,
    CommitRefused,
    Committed,
    Dispatch,
    Event,
    Finish,
    Journal,
    LedgerFailed,
    Note,
    RecycleWorker,
    Refresh,
    Replan,
    ReturnWorker,
    StopWorkers,
    fault_of,
)
from pipeline.ledger import Ledger
from pipeline.tasks import Order, Role


class Hands(Protocol):
    """What reaches the workers and the person. None of these waits: answers come back as events."""

    def assign_role(self, worker_id: str, role: Role) -> None:
        """Have the worker load a role."""

    def dispatch(self, worker_id: str, order: Order) -> None:
        """Send the worker an order."""

    def recycle(self, worker_id: str, reason: str) -> None:
        """Kill the worker's process and start another one, under a new id."""

    def return_worker(self, worker_id: str) -> None:
        """Give a lent worker back to its farm."""

    def stop_orders(self, worker_ids: tuple[str, ...]) -> None:
        """Ask the running orders of these workers to save their state and stop."""

    def refresh(self) -> None:
        """Write contact sheet, report and film so far again."""

    def replan(self, cause: str) -> None:
        """Plan again under the ledger's overrides and hand the tasks to `Machine.replace_plan`."""

    def note(self, message: str, warning: bool) -> None:
        """Log a line."""

    def finish(self, exit_code: int, message: str) -> None:
        """The render has ended."""


def carry_out(
    commands: Sequence[Command], ledger: Ledger, hands: Hands, now: Callable[[], float]
) -> list[Event]:
    """Carry the commands out, in order; the events that this led to are to be handled next.

    Waits for the ledger (through store outages, see `Ledger`), never for a worker.
    """
    events: list[Event] = []
    for command in commands:
        try:
            event = _carry_out(command, ledger, hands, now)
        except (LeaseLost, StoreError, StoreFull, UserError) as error:
            return [*events, LedgerFailed(now(), fault_of(error))]
        if event is not None:
            events.append(event)
    return events


def asks_ledger(commands: Sequence[Command]) -> bool:
    """Whether carrying these out waits for the ledger."""
    return any(isinstance(command, Journal | Commit) for command in commands)


def _carry_out(command: Command, ledger: Ledger, hands: Hands, now: Callable[[], float]) -> Event | None:
    match command:
        case Journal():
            ledger.journal(command.entries)
        case Commit():
            return _commit(command, ledger, now)
        case AssignRole():
            hands.assign_role(command.worker_id, command.role)
        case Dispatch():
            hands.dispatch(command.worker_id, command.order)
        case RecycleWorker():
            hands.recycle(command.worker_id, command.reason)
        case ReturnWorker():
            hands.return_worker(command.worker_id)
        case StopWorkers():
            hands.stop_orders(command.worker_ids)
        case Refresh():
            hands.refresh()
        case Replan():
            hands.replan(command.cause)
        case Note():
            hands.note(command.message, command.warning)
        case Finish():
            hands.finish(command.exit_code, command.message)
    return None


def _commit(command: Commit, ledger: Ledger, now: Callable[[], float]) -> Event:
    record = command.record
    try:
        return Committed(now(), ledger.commit(record))
    except (CorruptArtifact, WorkerLost) as error:
        return CommitRefused(now(), record.task_id, record.attempt, record.epoch, fault_of(error))
