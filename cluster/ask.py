"""`longtake pause`, `cancel`, `retry`: what a person asks of a render, whether it runs or not.

A request goes through the store alone (see `pipeline.requests`): the orchestrator that runs takes it in within
seconds, wherever it is. Where none runs, the lease is taken here and the same is journalled. What is printed
is what was found to have happened, never what was hoped for.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from cluster.places import open_ledger, open_render
from cluster.recipe import load_recipe, make_plan
from pipeline.errors import SettingError, TransientError
from pipeline.journal import JournalEntry, TaskReset
from pipeline.lease import LeaseHolder, lives, this_process
from pipeline.ledger import LedgerState
from pipeline.limits import Budgets, given_up
from pipeline.plan import Plan
from pipeline.requests import Request, RequestKind, entries_for, is_marked_taken, put_request
from pipeline.store import Store

LOOK_S = 0.5
ANSWER_S = 30.0
"""How long a running orchestrator may take to notice; it looks every two seconds."""
END_S = 120.0
"""How long it may then take to end: saving, committing, the last report."""


@dataclass(frozen=True)
class Taken:
    """A request was taken in: by the orchestrator of `epoch`, or here. `entries`: what was journalled here."""

    by: Literal["orchestrator", "here"]
    epoch: int
    entries: tuple[JournalEntry, ...] = ()


def new_request(kind: RequestKind, entries: Sequence[JournalEntry] = ()) -> Request:
    """A request with an id of its own, later ones after earlier ones."""
    return Request(f"{time.time_ns() // 1_000_000:014d}-{secrets.token_hex(4)}", kind, tuple(entries))


def running(store: Store) -> LeaseHolder | None:
    """Who renders here as far as can be told without watching: one elsewhere counts until it says otherwise."""
    holder = open_ledger(store).holder()
    return None if holder is None or lives(holder, this_process()) is False else holder


def ask(store: Store, request: Request, plan: Plan, *, answer_s: float = ANSWER_S) -> Taken:
    """Have the request taken in exactly once. Raises SettingError, LostError or StoreError if it could not be.

    After `answer_s` without an answer the lease is taken, which watches whether the other still lives.
    """
    holder, waited_s = running(store), 0.0
    if holder is None:
        with or_nothing("asked", store):
            return _take_in_here(store, request, plan, None)
    with or_nothing("asked", store):
        put_request(store, holder.epoch, request)
    while waited_s < answer_s and running(store) is not None:
        if is_marked_taken(store, holder.epoch, request.id):
            return Taken("orchestrator", holder.epoch)
        time.sleep(LOOK_S)
        waited_s += LOOK_S
    if request.id in open_ledger(store).load().requests:
        return Taken("orchestrator", holder.epoch)
    try:
        return _take_in_here(store, request, plan, holder)
    except SettingError as error:
        raise TransientError(f"asked, but nobody has answered: {error.message}; it may still be noticed") from error


@contextmanager
def or_nothing(done: str, store: Store) -> Iterator[None]:
    """A store that takes no writes, or that another render holds: said with its place, and that nothing was `done`."""
    try:
        yield
    except SettingError as error:
        message = f"nothing was {done}: {error.message}"
        raise SettingError(message, field="--store", value=store.url, remedy=error.remedy) from error


def _take_in_here(store: Store, request: Request, plan: Plan, holder: LeaseHolder | None) -> Taken:
    """Under the lease; one that a running orchestrator took in just before is found in its journal."""
    ledger = open_ledger(store)
    epoch = ledger.take_lease()
    try:
        state = ledger.load()
        if request.id in state.requests:
            return Taken("orchestrator", holder.epoch if holder else epoch)
        entries = entries_for(request, state, plan.tasks.values(), epoch)
        ledger.journal(entries)
    finally:
        ledger.release_lease()
    return Taken("here", epoch, entries)


def print_pause(place: str, store: str | None, *, as_json: bool) -> int:
    """Have a running render save and stop; 0 if nothing runs afterwards."""
    render = open_render(place, store)
    plan = make_plan(load_recipe(render), open_ledger(render).load().overrides)
    if running(render) is None:
        done = is_finished(render, plan)
        said = "is finished" if done else "is not running; `longtake render` goes on with it"
        return say(render, "finished" if done else "not running", said, as_json)
    return _stop(render, plan, "pause", as_json)


def print_cancel(place: str, store: str | None, *, as_json: bool) -> int:
    """Stop a render at once and have it down as cancelled, running or not; what is committed stays."""
    render = open_render(place, store)
    plan = make_plan(load_recipe(render), open_ledger(render).load().overrides)
    if running(render) is None and is_finished(render, plan):
        return say(render, "finished", "is finished: there is nothing to cancel", as_json)
    return _stop(render, plan, "cancel", as_json)


def stop(render: Store, plan: Plan, kind: Literal["pause", "cancel"]) -> bool:
    """Have the render end, and wait for that; whether it is finished. Raises as `ask`, and TransientError if that takes
    too long.
    """
    taken = ask(render, new_request(kind), plan)
    waited_s = 0.0
    while taken.by == "orchestrator" and (holder := running(render)) is not None and holder.epoch == taken.epoch:
        if waited_s >= END_S:
            raise TransientError(f"{render.url}: the {kind} was taken in, but the render has not ended yet")
        time.sleep(LOOK_S)
        waited_s += LOOK_S
    return is_finished(render, plan)


def _stop(render: Store, plan: Plan, kind: Literal["pause", "cancel"], as_json: bool) -> int:
    if stop(render, plan, kind):
        return say(render, "finished", f"was finished before the {kind}", as_json)
    if kind == "pause":
        return say(render, "paused", "is paused; `longtake render` goes on with it", as_json)
    kept = "what is committed is kept; `longtake render` goes on with it"
    return say(render, "cancelled", f"is cancelled; {kept}", as_json)


def print_retry(place: str, store: str | None, *, as_json: bool) -> int:
    """Give tasks that failed new budgets; 0 also where there were none."""
    render = open_render(place, store)
    state = open_ledger(render).load()
    plan = make_plan(load_recipe(render), state.overrides)
    failed = failed_tasks(plan, state)
    taken = ask(render, new_request("retry"), plan)
    if taken.by == "here":
        reset = [entry.task_id for entry in taken.entries if isinstance(entry, TaskReset)]
        goes_on = "`longtake render` goes on"
    else:
        reset, goes_on = failed, "the running render goes on with them"
    labels = [plan.tasks[task_id].label for task_id in reset if task_id in plan.tasks]
    names = f" ({', '.join(labels)})" if labels else ""
    said = f"has new budgets for {len(reset)} tasks{names}; {goes_on}" if reset else "has no failed tasks"
    return say(render, "retry", said, as_json, tasks=labels)


def failed_tasks(plan: Plan, state: LedgerState) -> list[str]:
    """Tasks that will not be tried again by themselves."""
    budgets = Budgets()
    return [
        task.id
        for task in plan.tasks.values()
        if task.id not in state.commits
        and (log := state.logs.get(task.id)) is not None
        and given_up(log, budgets, state.refusals.get(task.label, 0))
    ]


def is_finished(store: Store, plan: Plan) -> bool:
    """Whether the film of this plan is there."""
    return plan.film_task_id in open_ledger(store).load().commits


def say(store: Store, state: str, what: str, as_json: bool, **content: object) -> int:
    if as_json:
        print(json.dumps({"store": store.url, "state": state, "message": f"{store.url} {what}", **content}))
    else:
        print(f"{store.url} {what}")
    return 0
