"""`longtake pick`, `lock` and `unlock`: which take of a shot the film shows, and which shots stay as they are."""

from __future__ import annotations

from dataclasses import replace

from cluster.ask import ask, new_request, say
from cluster.places import open_ledger, open_render
from cluster.recipe import Recipe, load_recipe, make_plan
from pipeline.errors import SettingError
from pipeline.facts import Overrides
from pipeline.journal import ShotLocked, ShotUnlocked, TakePicked
from pipeline.ledger import LedgerState
from pipeline.locks import lock_shot
from pipeline.plan import Plan
from pipeline.store import Store


def print_pick(place: str, store: str | None, shot_id: str, take: int, *, as_json: bool) -> int:
    """Have the film show this take of the shot from now on."""
    render = open_render(place, store)
    recipe, state = whole_film(render), open_ledger(render).load()
    overrides = state.overrides
    _check_shot(make_plan(recipe, overrides), shot_id)
    if shot_id in state.locks:
        remedy = f"`longtake unlock` {shot_id} first."
        raise SettingError("is locked in the take it has", field="SHOT", value=shot_id, remedy=remedy)
    picked = Overrides(overrides.redo, {**overrides.picked, shot_id: take}, overrides.locks)
    plan = make_plan(recipe, picked)
    made = [task for task in plan.tasks.values() if task.kind == "segment" and task.shot_id == shot_id]
    done = sum(task.id in state.commits for task in made)
    ask(render, new_request("pick", [TakePicked(shot_id, take)]), plan)
    said = f"shows take {take} of {shot_id} from now on; {done} of its {len(made)} segments are there"
    return say(render, "picked", f"{said}, `longtake render` makes the film with it", as_json, done=done)


def print_lock(place: str, store: str | None, shot_id: str, *, as_json: bool) -> int:
    """Keep the shot as it is, whatever code and checkpoint come."""
    render = open_render(place, store)
    state = open_ledger(render).load()
    plan = make_plan(whole_film(render), state.overrides)
    _check_shot(plan, shot_id)
    lock = lock_shot(shot_id, plan.tasks, state.commits, state.locks)
    ask(render, new_request("lock", [ShotLocked(shot_id, lock.tasks, lock.labels)]), plan)
    said = f"keeps {shot_id} as it is: {len(lock.tasks)} tasks stand, whatever code and checkpoint come"
    return say(render, "locked", said, as_json, tasks=sorted(lock.tasks.values()))


def print_unlock(place: str, store: str | None, shot_id: str, *, as_json: bool) -> int:
    """Plan the shot like any other again."""
    render = open_render(place, store)
    state = open_ledger(render).load()
    if shot_id not in state.locks:
        remedy = f"Locked are: {', '.join(state.locks) or 'none'}."
        raise SettingError("is not locked", field="SHOT", value=shot_id, remedy=remedy)
    # Planned without its lock: one that no longer fits its storyboard must be possible to undo.
    plan = make_plan(whole_film(render), _without(state, shot_id))
    ask(render, new_request("unlock", [ShotUnlocked(shot_id)]), plan)
    return say(render, "unlocked", f"no longer locks {shot_id}", as_json)


def whole_film(store: Store) -> Recipe:
    """The order of the render in this store, for all its shots to the end."""
    return replace(load_recipe(store), until="film", shots=None, takes=1)


def _without(state: LedgerState, shot_id: str) -> Overrides:
    overrides = state.overrides
    return replace(overrides, locks={name: lock for name, lock in overrides.locks.items() if name != shot_id})


def _check_shot(plan: Plan, shot_id: str) -> None:
    names = [shot.id for shot in plan.shots]
    if shot_id not in names:
        remedy = f"Shots are: {', '.join(names)}."
        raise SettingError("is no shot of this render", field="SHOT", value=shot_id, remedy=remedy)
