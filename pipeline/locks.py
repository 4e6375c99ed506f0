"""Locked shots: what stands for them, and how it is found again under other code and another checkpoint.

Contract: pure. A task's id holds the checkpoint, the settings it brings and the recipe version; what a person
ordered is less than that. `order_digest` is the hash of the order alone: prompts, seed, take, redo, sizes, places
in time, and the same of all inputs. A lock maps order digests to the tasks that were committed for them, so
a later plan takes those instead of its own. An order that was changed since has another digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import SettingError
from pipeline.facts import ShotLock
from pipeline.tasks import Task, TaskKind, canonical_json

LOCKABLE: tuple[TaskKind, ...] = ("segment", "window", "encode")
NOT_ORDERED = frozenset({"weights", "schedule", "guidance", "negative_text", "checkpoint", "condition_latents"})
"""Parameters that come with the checkpoint, the quality and the code, not with the shot."""


def order_digest(kind: TaskKind, params: Mapping[str, Any], inputs: Sequence[str]) -> str:
    """The hash of what was ordered. `inputs`: the order digests of the task's inputs, by position."""
    value: Any = [kind, _ordered(params, inputs)]
    if kind == "source":
        value.append(list(inputs))
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _ordered(value: Any, inputs: Sequence[str]) -> Any:
    """A parameter with positions of inputs replaced by their digests: other inputs may come and go."""
    if isinstance(value, list | tuple):
        return [_ordered(item, inputs) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {
        name: inputs[item] if name in ("input", "text") and isinstance(item, int) else _ordered(item, inputs)
        for name, item in value.items()
        if name not in NOT_ORDERED
    }


def lock_shot(
    shot_id: str, tasks: Mapping[str, Task], done: Mapping[str, object], locks: Mapping[str, ShotLock]
) -> ShotLock:
    """What is to stand for a shot of a plan: its segments, and the windows and units made of locked ones alone.

    Raises SettingError if the shot is not there or not all of that is committed (`done`).
    """
    locked = {task_id for lock in locks.values() for task_id in lock.tasks.values()}
    digests: dict[str, str] = {}
    found: dict[str, Task] = {}
    for task in tasks.values():
        digests[task.id] = order_digest(task.kind, task.params, [digests[i] for i in task.inputs])
        is_own = task.kind == "segment" and task.shot_id == shot_id
        is_made_of_locked = task.kind in ("window", "encode") and _pictures(task, tasks) <= locked
        if is_own or is_made_of_locked:
            found[task.id] = task
            locked.add(task.id)
    left = [task.label for task in found.values() if task.id not in done]
    if not found:
        raise SettingError("has no segments in this render", field="SHOT", value=shot_id)
    if left:
        remedy = "Render it first."
        raise SettingError(f"is not finished ({', '.join(left)} to do)", field="SHOT", value=shot_id, remedy=remedy)
    labels = {task.label: digests[task.id] for task in found.values() if task.kind != "encode"}
    return ShotLock({digests[task_id]: task_id for task_id in found}, labels)


def _pictures(task: Task, tasks: Mapping[str, Task]) -> set[str]:
    """The inputs that the task's pictures come from."""
    return {i for i in task.inputs if tasks[i].kind in ("segment", "window")}
