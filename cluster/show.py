"""`longtake plan`, `status` and `verify`: what a person wants to know, without Ray and without torch.

`status` and `verify` read the store alone: they work while a render runs, after it, and when its cluster is
gone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cluster.outlook import Cluster, look_ahead
from cluster.places import open_ledger, open_render
from cluster.probe import UNKNOWN_DIGEST, role_memory
from cluster.progress import PHASES, format_seconds
from cluster.recipe import Recipe, load_recipe, make_plan
from cluster.render import Prepared, RenderRequest, prepare
from pipeline.changes import reasons
from pipeline.errors import LongtakeError, SettingError, UserError
from pipeline.lease import lives, this_process
from pipeline.ledger import LedgerState, Verification
from pipeline.pace import GPUS
from pipeline.plan import Plan
from pipeline.redo import describe_redo
from pipeline.store import Store
from pipeline.store_meter import tasks_use
from pipeline.tasks import RECIPE_VERSION, Task
from pipeline.times import format_bytes


def print_plan(request: RenderRequest, cluster: Cluster | None = None, card_gb: float | None = None) -> int:
    """Every task of the render, what is committed already, what will be made and why, memory, time, space and, on a
    `cluster`, cost. `card_gb`: of the cards to compare the memory with; default: those of the cluster's GPU type.
    """
    prepared = prepare(request)
    outlook = look_ahead(prepared.plan, prepared.state.commits, prepared.recipe.facts.pace, cluster)
    plan, left = prepared.plan, prepared.left
    done = _done(plan, prepared.state)
    why = reasons(plan.tasks, prepared.state, *_rendered_before(prepared))
    checkpoint = prepared.recipe.facts.checkpoint
    gpu = GPUS.get(cluster.gpu_type) if cluster and card_gb is None else None
    card_gb = gpu.memory_gb if gpu else card_gb
    memory, warnings = role_memory(plan.tasks.values(), checkpoint, prepared.recipe.spec.memory, card_gb)
    if cluster and gpu:
        warnings = [f"--gpu-type {cluster.gpu_type}: {line}" for line in warnings]
    needed_bytes, free_bytes = plan.estimate.needed_bytes(left), prepared.store.free_bytes()
    if request.as_json:
        redo = None if prepared.redo is None else asdict(prepared.redo)
        space = {"needed_bytes": needed_bytes if left else 0, "free_bytes": free_bytes}
        extra = {"committed": sorted(done), "to_do": why, "redo": redo, "space": space}
        extra["memory"] = {"roles": [asdict(role) for role in memory], "too_small": warnings}
        print(json.dumps({**plan.to_json(), "store": prepared.store.url, **extra, "outlook": outlook.to_json()}))
        return 0
    print(plan.describe())
    if checkpoint.digest == UNKNOWN_DIGEST:
        print(f"warning: {prepared.recipe.spec.checkpoint} is not here: its numbers are known, the task ids are not")
    if prepared.redo is not None and prepared.before_redo is not None:
        print("\n".join(describe_redo(prepared.redo, prepared.before_redo, plan)))
    if prepared.state.commits:
        left_s = sum(task.work for task in left)
        print(f"{len(done)} of {len(plan.tasks)} tasks are committed in {prepared.store.url}, ", end="")
        print(f"{format_seconds(left_s)} of work left")
        _print_reasons(plan, why)
    print("memory of each role on a GPU, in bf16 (estimated):")
    print("\n".join([f"  {role.describe()}" for role in memory] + [f"warning: {text}" for text in warnings]))
    if left:
        print("\n".join(outlook.describe()))
        free = "" if free_bytes is None else f", {format_bytes(free_bytes)} are free"
        print(f"space: {format_bytes(needed_bytes)} are needed{free} in {prepared.store.url}")
    return 0


def _rendered_before(prepared: Prepared) -> tuple[Mapping[str, Task] | None, int]:
    """The tasks as this place was last rendered, and the recipe version then; for `reasons`."""
    try:
        before = load_recipe(prepared.store)
    except SettingError:
        return None, RECIPE_VERSION
    try:
        return make_plan(before, prepared.state.overrides).tasks, before.recipe_version
    except UserError:
        # What was rendered cannot be planned any more (a shot it names is locked otherwise, ...).
        return None, before.recipe_version


def _print_reasons(plan: Plan, why: Mapping[str, str]) -> None:
    labels: dict[str, list[str]] = {}
    for task_id, reason in why.items():
        labels.setdefault(reason, []).append(plan.tasks[task_id].label)
    for reason, names in labels.items():
        print(f"to do, {reason}: {', '.join(names)}")


def _done(plan: Plan, state: LedgerState) -> set[str]:
    return {task_id for task_id in plan.tasks if task_id in state.commits}


def print_status(place: str, store: str | None, *, as_json: bool) -> int:
    """How far the render is, from its store."""
    render = open_render(place, store)
    recipe, state = load_recipe(render), open_ledger(render).load()
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
    for name, value in (("takes picked", status["picked"]), ("locked", status["locked"])):
        if value:
            print(f"  {name}: {', '.join(value if isinstance(value, list) else map(' '.join, value.items()))}")
    for who, use in status["store_use"].items():
        if use:
            print(f"  waited for the store: {who} {use['seconds']:.1f} s, {100 * use['share']:.1f} %")
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
        "picked": {shot_id: str(take) for shot_id, take in state.picked.items()},
        "locked": sorted(state.locks),
        "store_use": {
            "orchestrator": _last_report(store).get("store", {}).get("orchestrator"),
            "tasks": tasks_use(state.commits[task_id] for task_id in done),
        },
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


def _last_report(store: Store) -> dict[str, Any]:
    """What the last run has written for people; nothing is decided by it."""
    try:
        report: dict[str, Any] = json.loads(store.read("report.json"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return report


def _holder(store: Store) -> dict[str, Any]:
    """Who renders here, as far as can be told; a holder elsewhere is live until it says otherwise."""
    holder = open_ledger(store).holder()
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
    """Read every committed byte and compare it with its record; 1 if any differ.

    What is found is journalled, so that the next render makes it again, with what was computed from it.
    """
    render = open_render(place, store)
    load_recipe(render)
    found = open_ledger(render).verify()
    unnoted = _note_invalid(render, found) if found.invalid else ""
    if as_json:
        print(json.dumps({"store": render.url, "not_noted": unnoted, **asdict(found)}))
    else:
        for problem in found.problems:
            print(f"{problem.path or problem.task_id}: {problem.what}")
        again = f"are bad, which could not be noted: {unnoted}" if unnoted else "will be rendered again"
        verdict = f"{len(found.invalid)} tasks {again}" if found.problems else "all as recorded"
        print(f"{render.url}: {found.files} files, {found.size_bytes:,} bytes, {verdict}")
    return 1 if found.problems else 0


def _note_invalid(render: Store, found: Verification) -> str:
    """Journal the findings; why that could not be, or ""."""
    ledger = open_ledger(render)
    try:
        ledger.take_lease()
        ledger.apply_verification(found)
        ledger.release_lease()
    except LongtakeError as error:
        return str(error)
    return ""
