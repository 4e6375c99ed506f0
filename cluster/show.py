"""`longtake plan`, `status` and `verify`: what a person wants to know, without Ray and without torch.

`status` and `verify` read the store alone: they work while a render runs, after it, and when its cluster is
gone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.places import open_render
from cluster.progress import PHASES, format_seconds
from cluster.recipe import Recipe, load_recipe, make_plan
from cluster.render import RenderRequest, prepare
from pipeline.lease import lives, this_process
from pipeline.ledger import Ledger, LedgerState
from pipeline.plan import Plan, Until
from pipeline.store import Store


def print_plan(storyboard: Path, store: str | None, *, until: Until, shots: list[str] | None, as_json: bool) -> int:
    """Every task of the render, what is committed already, and the expected time."""
    prepared = prepare(RenderRequest(storyboard, store, until=until, shots=shots))
    plan, done = prepared.plan, prepared.done
    if as_json:
        print(json.dumps({**plan.to_json(), "store": prepared.store.url, "committed": sorted(done)}))
        return 0
    print(plan.describe())
    if done:
        left_s = sum(task.work for task in plan.tasks.values() if task.id not in done)
        print(f"{len(done)} of {len(plan.tasks)} tasks are committed in {prepared.store.url}, ", end="")
        print(f"{format_seconds(left_s)} of work left")
    return 0


def _done(plan: Plan, state: LedgerState) -> set[str]:
    return {task_id for task_id in plan.tasks if task_id in state.commits}


def print_status(place: str, store: str | None, *, as_json: bool) -> int:
    """How far the render is, from its store."""
    render = open_render(place, store)
    recipe, state = load_recipe(render), Ledger(render).load()
    status = describe_status(render, recipe, state)
    if as_json:
        print(json.dumps(status))
        return 0
    print(f"{status['title']}: {status['state']}, {status['store']}")
    for phase in status["phases"]:
        running = f", {phase['running']} begun" if phase["running"] else ""
        spent = f", {format_seconds(phase['seconds'])} of work" if phase["seconds"] else ""
        print(f"  {PHASES[phase['kind']]:<11} {phase['done']}/{phase['total']}{running}{spent}")
    for failure in status["failures"]:
        print(f"  {failure['task']}: {failure['kind']}: {failure['message']}")
    if status["film"]:
        print(f"  film: {status['film']}")
    return 0


def describe_status(store: Store, recipe: Recipe, state: LedgerState) -> dict[str, Any]:
    """JSON-able: state, counts by kind of task, failures that nothing has made good yet, the film's place."""
    plan = make_plan(recipe, state.overrides)
    done = _done(plan, state)
    film = state.commits.get(plan.film_task_id)
    holder = _holder(store)
    return {
        "title": recipe.spec.title,
        "store": store.url,
        "state": _state(state, holder, finished=film is not None),
        "holder": holder,
        "tasks": len(plan.tasks),
        "committed": len(done),
        "phases": _phases(plan, state, live=holder["live"]),
        "failures": _failures(plan, state, done),
        "redo": state.redo,
        "mixed": list(state.mixed),
        "film": f"{store.url}/{film.files[0].path}" if film else None,
        "output": plan.output_path,
        "checked_at": round(time.time(), 3),
    }


def _state(state: LedgerState, holder: Mapping[str, Any], *, finished: bool) -> str:
    if finished:
        return "finished"
    if holder["live"]:
        return "running"
    if kind := state.stopped[1]:
        return {"pause": "paused", "cancel": "cancelled"}[kind] + ", `longtake render` goes on"
    return "stopped, the same command continues"


def _holder(store: Store) -> dict[str, Any]:
    """Who renders here, as far as can be told; a holder elsewhere is live until it says otherwise."""
    holder = Ledger(store).holder()
    if holder is None:
        return {"live": False}
    owner = holder.owner
    live = lives(holder, this_process()) is not False
    return {"live": live, "epoch": holder.epoch, "host": owner.host.split("/")[0], "pid": owner.pid}


def _phases(plan: Plan, state: LedgerState, *, live: bool) -> list[dict[str, Any]]:
    """Counts and seconds for each kind of task that the plan has."""
    phases = []
    for kind in PHASES:
        names = [task.id for task in plan.tasks.values() if task.kind == kind]
        done = [state.commits[name] for name in names if name in state.commits]
        open_ = [name for name in names if name not in state.commits and _is_open(state, name)]
        seconds = round(sum(record.seconds for record in done), 1)
        running = len(open_) if live else 0
        counts = {"total": len(names), "done": len(done), "running": running, "seconds": seconds}
        phases.append({"kind": kind, **counts})
    return [phase for phase in phases if phase["total"]]


def _is_open(state: LedgerState, task_id: str) -> bool:
    """Whether an attempt has begun whose end nobody has written down."""
    return task_id in state.logs and state.logs[task_id].open is not None


def _failures(plan: Plan, state: LedgerState, done: set[str]) -> list[dict[str, Any]]:
    failures = []
    for task in plan.tasks.values():
        log = state.logs.get(task.id)
        if log is not None and log.last_failure is not None and task.id not in done:
            failures.append({"task": task.label or task.id, **asdict(log.last_failure)})
    return failures


def print_verification(place: str, store: str | None, *, as_json: bool) -> int:
    """Read every committed byte and compare it with its record; 1 if any differ."""
    render = open_render(place, store)
    load_recipe(render)
    found = Ledger(render).verify()
    if as_json:
        print(json.dumps({"store": render.url, **asdict(found)}))
    else:
        for problem in found.problems:
            print(f"{problem.path or problem.task_id}: {problem.what}")
        verdict = "all as recorded" if not found.problems else f"{len(found.invalid)} tasks will be rendered again"
        print(f"{render.url}: {found.files} files, {found.size_bytes:,} bytes, {verdict}")
    return 1 if found.problems else 0
