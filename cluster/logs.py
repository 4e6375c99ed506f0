"""`longtake logs`: the story of a render's tasks, from its store alone, with the workers' full logs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cluster.ask import running
from cluster.places import open_ledger, open_render
from cluster.progress import format_seconds
from cluster.recipe import load_recipe, make_plan
from pipeline.errors import SettingError
from pipeline.plan import Plan
from pipeline.store import Store
from pipeline.story import AttemptStory, TaskStory, task_stories


def print_logs(place: str, store: str | None, name: str | None, *, as_json: bool) -> int:
    """A line for each attempt; with `name` (a task's id or label) that task's attempts with their full logs."""
    render = open_render(place, store)
    recipe, ledger = load_recipe(render), open_ledger(render)
    state = ledger.load()
    plan, live = make_plan(recipe, state.overrides), running(render)
    stories = task_stories(ledger.history(), state.commits, live.epoch if live else None)
    chosen = _chosen(plan, stories, name)
    labels = {task.id: task.label or task.id for task in plan.tasks.values()}
    if as_json:
        logs = {one.log: _read(render, one) for story in chosen for one in story.attempts} if name else {}
        print(json.dumps(_as_json(render, chosen, labels, logs)))
        return 0
    for story in chosen:
        print(f"{labels.get(story.task_id, '(not in the present plan)')}  {story.task_id}")
        for attempt in story.attempts:
            print(f"  {attempt_line(attempt)}")
            if name:
                print(_indented(_read(render, attempt) or attempt.log_tail or "(no log was kept)"))
    return 0


def _chosen(plan: Plan, stories: Mapping[str, TaskStory], name: str | None) -> list[TaskStory]:
    """The stories asked for: the plan's tasks in its order, then those it no longer has."""
    ids = [*plan.tasks, *(task_id for task_id in stories if task_id not in plan.tasks)]
    if name is not None:
        ids = [i for i in ids if i == name or (i in plan.tasks and plan.tasks[i].label == name)]
    chosen = [stories[task_id] for task_id in ids if task_id in stories]
    if name is not None and not ids:
        remedy = "Name it by its id or label, as `longtake plan` prints them."
        raise SettingError("no such task in this render", field="TASK", value=name, remedy=remedy)
    return chosen or [TaskStory(task_id) for task_id in ids if name is not None]


def attempt_line(attempt: AttemptStory) -> str:
    """`#2 24 Nov 13:31:16 on gpu7 (w3): transient after 12s: out of memory`."""
    begun = time.strftime("%d %b %H:%M:%S", time.localtime(attempt.started_at_s))
    where = f"{attempt.host or 'node ' + attempt.node_id[:8]} ({attempt.worker_id})"
    took = f" after {format_seconds(attempt.ended_at_s - attempt.started_at_s)}" if attempt.ended_at_s else ""
    saved = f", step {attempt.saved_steps} saved" if attempt.saved_steps else ""
    ending = "its end was not written down" if attempt.ending == "unknown" else attempt.ending
    message = f": {attempt.message}" if attempt.message else ""
    return f"#{attempt.attempt} {begun} on {where}: {ending}{took}{saved}{message}"


def _read(store: Store, attempt: AttemptStory) -> str:
    try:
        return store.read(attempt.log).decode(errors="replace").rstrip()
    except FileNotFoundError:
        return ""


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _as_json(
    store: Store, chosen: list[TaskStory], labels: Mapping[str, str], logs: Mapping[str, str]
) -> dict[str, Any]:
    def attempt(one: AttemptStory) -> dict[str, Any]:
        return asdict(one) | ({"text": logs[one.log]} if one.log in logs else {})

    def task(story: TaskStory) -> dict[str, Any]:
        attempts = [attempt(one) for one in story.attempts]
        return {"task": story.task_id, "label": labels.get(story.task_id), "attempts": attempts}

    return {"store": store.url, "tasks": [task(story) for story in chosen]}
