"""What a person asks of a render through its store: pause, cancel, retry, redo, pick, lock, unlock.

A request is a file, created once under `requests/<epoch>/`: it is addressed to the orchestrator that holds
this epoch, so one that nobody noticed can never stop a later run. That orchestrator looks for requests every
few seconds, takes each in once (`RequestTaken` is journalled in one write with all that follows from it) and
then leaves a mark for whoever waits. Where nobody renders, the command takes the lease and journals the same
entries itself; a request that was taken in meanwhile changes nothing the second time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.journal import (
    JournalEntry,
    RedoRequested,
    RequestTaken,
    TaskReset,
    entry_from_json,
    entry_to_json,
)
from pipeline.ledger import LedgerState
from pipeline.records import TornRecord, seal, unseal
from pipeline.store import Store
from pipeline.tasks import Task

RequestKind = Literal["pause", "cancel", "retry", "redo", "pick", "lock", "unlock"]
STOP_CODES: dict[RequestKind, int] = {"pause": 75, "cancel": 130}
"""Exit codes of a render that a request ended: as after SIGTERM (to be gone on with), as after Ctrl-C."""


@dataclass(frozen=True)
class Request:
    """One request. `entries`: what is to be journalled for redo, pick, lock and unlock."""

    id: str
    kind: RequestKind
    entries: tuple[JournalEntry, ...] = ()


def put_request(store: Store, epoch: int, request: Request) -> None:
    """Leave the request for the orchestrator of this epoch; nothing happens if it lies there already."""
    entries = [entry_to_json(entry) for entry in request.entries]
    store.create_if_absent(_path(epoch, request.id), seal({"kind": request.kind, "entries": entries}))


def new_requests(store: Store, epoch: int, known: set[str]) -> list[Request]:
    """The requests to this epoch that are not `known` yet. Left out: one that cannot be read, one with entries of
    another version, and one that is gone since it was listed, because whoever took the lease meanwhile has collected
    the garbage.
    """
    found = []
    for file in store.list(_folder(epoch)):
        request_id, _, suffix = file.path.rpartition("/")[2].rpartition(".")
        if suffix != "json" or request_id in known:
            continue
        try:
            value = unseal(store.read(file.path))
            entries = tuple(entry_from_json(entry) for entry in value["entries"])
            found.append(Request(request_id, value["kind"], entries))
        except (TornRecord, FileNotFoundError, KeyError, TypeError):
            continue
    return found


def mark_taken(store: Store, epoch: int, request_id: str) -> None:
    """Tell whoever waits that the request was taken in. Nothing is decided by the mark."""
    store.put_replace(f"{_folder(epoch)}/{request_id}.taken", b"")


def is_marked_taken(store: Store, epoch: int, request_id: str) -> bool:
    """Whether the mark is there."""
    return store.head(f"{_folder(epoch)}/{request_id}.taken") is not None


def entries_for(request: Request, state: LedgerState, tasks: Iterable[Task], epoch: int) -> tuple[JournalEntry, ...]:
    """What taking the request in writes, in one piece; empty if it was taken in before.

    `tasks`: the plan's. A redo gets the generation after the present one even if that rose since it was asked.
    """
    if request.id in state.requests:
        return ()
    taken: list[JournalEntry] = [RequestTaken(request.id, request.kind, epoch)]
    if request.kind == "retry":
        taken += resets(tasks, state)
    for entry in request.entries:
        if isinstance(entry, RedoRequested):
            entry = replace(entry, generation=state.redo.get(entry.scope, 0) + 1)
        taken.append(entry)
    return tuple(taken)


def resets(tasks: Iterable[Task], state: LedgerState) -> list[TaskReset]:
    """New budgets for all tasks that are not committed and were charged with anything."""
    return [
        TaskReset(task.id, task.label)
        for task in tasks
        if task.id not in state.commits and task.id in state.logs and state.logs[task.id].charged
    ]


def _folder(epoch: int) -> str:
    return f"requests/{epoch:08d}"


def _path(epoch: int, request_id: str) -> str:
    return f"{_folder(epoch)}/{request_id}.json"
