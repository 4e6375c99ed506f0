"""Why a task of a plan is still to do: new, changed, found bad, failed, or just not made yet.

Contract: pure. `before` is the plan of the same place as it was last rendered; slots are compared by label.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.graph import TaskGraph
from pipeline.journal import TaskLog
from pipeline.ledger import LedgerState
from pipeline.limits import Budgets, given_up
from pipeline.tasks import RECIPE_VERSION, Task

Tasks = Mapping[str, Task]
_IN_WORDS = {
    "checkpoint": "the checkpoint changed",
    "weights.checkpoint": "the checkpoint changed",
    "weights.loras": "the LoRAs changed",
    "conditions": "it goes on from other frames",
    "condition_latents": "it goes on from other frames",
    "noise.redo": "to be made again with new noise",
    "noise.seed": "the seed changed",
    "noise.noise_id": "another take or shot",
}


def left_to_do(tasks: Tasks, state: LedgerState) -> list[Task]:
    """The tasks that will be run, in the plan's order: not those that only committed ones need."""
    wanted = TaskGraph(tasks, state.commits).wanted
    return [task for task in tasks.values() if task.id in wanted]


def reasons(
    tasks: Tasks, state: LedgerState, before: Tasks | None, version_before: int = RECIPE_VERSION
) -> dict[str, str]:
    """For each task that will be run, in a few words, why."""
    slots = {f"{task.kind} {task.label}": task for task in (before or {}).values()}
    changes = _Changes(tasks, state, before or {}, slots, version_before)
    return {task.id: _reason(task, changes) for task in left_to_do(tasks, state)}


@dataclass(frozen=True)
class _Changes:
    """The plan, what the ledger says, and the plan before, also by kind and label."""

    tasks: Tasks
    state: LedgerState
    before: Tasks
    slots: Tasks
    version_before: int


def _reason(task: Task, known: _Changes) -> str:
    state = known.state
    log = state.logs.get(task.id)
    if log is not None and (found := _from_history(log, state.refusals.get(task.label, 0))):
        return found
    if known.version_before != RECIPE_VERSION:
        return f"longtake computes differently now (recipe {known.version_before}, now {RECIPE_VERSION})"
    was = known.slots.get(f"{task.kind} {task.label}")
    if was is not None and was.id != task.id and was.id in state.commits:
        return "; ".join(dict.fromkeys(_differences(was, task, known.before, known.tasks))) or "it changed"
    if was is None and known.before:
        return "new"
    return "not made yet"


def _from_history(log: TaskLog, refusals: int) -> str:
    """What the journal says about earlier attempts, "" if there were none."""
    if fault := given_up(log, Budgets(), refusals):
        return f"given up: {fault.message}; `longtake retry` gives it a new budget"
    if log.went_bad:
        return "its bytes, or those it was computed from, were found bad"
    if log.last_failure is not None:
        return f"attempt {log.attempts} ended: {log.last_failure.kind}: {log.last_failure.message}"
    return "begun, not finished" if log.attempts else ""


def _differences(was: Task, now: Task, before: Tasks, tasks: Tasks) -> Iterator[str]:
    for name in _changed_params(was.params, now.params):
        yield _IN_WORDS.get(name, f"{name} changed")
    for old_id, new_id in zip(was.inputs, now.inputs, strict=False):
        if old_id == new_id or new_id not in tasks:
            continue
        kind, label = tasks[new_id].kind, tasks[new_id].label
        if kind == "text" and old_id in before and before[old_id].params["prompt"] != tasks[new_id].params["prompt"]:
            yield "the prompt changed"
        elif kind != "text":
            yield f"computed from {label}, which is made again"
    if len(was.inputs) != len(now.inputs):
        yield "it needs other inputs"


def _changed_params(was: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of what differs; positions of inputs are not told."""
    for name in sorted({*was, *now}):
        old, new = was.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _changed_params(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}"
