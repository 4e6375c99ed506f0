"""Renders without workers: a store in which tasks of a plan are committed with small artifacts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from cluster.recipe import Recipe, make_plan
from pipeline.facts import CheckpointFacts, Facts
from pipeline.journal import AttemptStarted
from pipeline.ledger import Ledger, LedgerState
from pipeline.plan import Plan
from pipeline.records import artifact_sha256
from pipeline.spec import parse_spec
from pipeline.store import Store
from pipeline.tasks import CommitRecord, Task


def recipe_of(*shots: Mapping[str, Any], checkpoint: str = "d", **spec: Any) -> Recipe:
    """A recipe for shots of the official checkpoint; `checkpoint` is a digit of its digest."""
    written = [{"prompt": f"a {shot['id']}", **shot} for shot in shots]
    storyboard = parse_spec(json.dumps({"title": "Rendered", "shots": written, **spec}))
    return Recipe(storyboard, Facts(checkpoint=CheckpointFacts("/somewhere", checkpoint * 64)))


def render_into(store: Store, recipe: Recipe, *, only: Callable[[Task], bool] = lambda task: True) -> Plan:
    """What a render leaves behind: the recipe, and a commit of each task of its plan that it still had to do."""
    recipe.put(store)
    ledger = Ledger(store)
    ledger.take_lease()
    state = ledger.load()
    plan = make_plan(recipe, state.overrides)
    for task in plan.tasks.values():
        if task.id not in state.commits and only(task):
            _commit(ledger, state, task)
    ledger.release_lease()
    return plan


def _commit(ledger: Ledger, state: LedgerState, task: Task) -> None:
    attempt = state.logs[task.id].attempts + 1 if task.id in state.logs else 1
    ledger.journal([AttemptStarted(task.id, attempt, ledger.epoch, "w1", "n1", "gpu7")])
    path = f"attempts/{task.id}/{attempt:04d}-{ledger.epoch}/out.bin"
    file = ledger.store.write_attempt(path, task.label.encode())
    inputs = {i: artifact_sha256(state.commits[i].files) for i in task.inputs if i in state.commits}
    record = CommitRecord(task.id, attempt, ledger.epoch, (file,), inputs, seconds=2.0, host="gpu7")
    state.commits[task.id] = ledger.commit(record)


def with_checkpoint(recipe: Recipe, digit: str) -> Recipe:
    """The same order for another checkpoint."""
    checkpoint = replace(recipe.facts.checkpoint, digest=digit * 64)
    return replace(recipe, facts=replace(recipe.facts, checkpoint=checkpoint))
