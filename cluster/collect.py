"""`longtake gc`: delete what nothing needs, or say what that would be.

Holds the lease meanwhile: refused beside a running render, and a render that is started is refused until it is
over. What a commit refers to is deleted only with --orphans, after the commit was ended in the journal, so that
a crash at any point leaves nothing that counts without its bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from cluster.ask import or_nothing, running
from cluster.places import open_ledger, open_render
from cluster.recipe import load_recipe, make_plan
from cluster.versions import whole_film
from pipeline.errors import UserError
from pipeline.garbage import Garbage, by_folder, find_garbage
from pipeline.lease import refuse_if_live, this_process
from pipeline.ledger import Ledger, LedgerState
from pipeline.store import Store
from pipeline.times import format_bytes

CHECK_EVERY = 100
"""Files deleted between two looks at the lease."""


def print_collection(place: str, store: str | None, *, dry_run: bool, orphans: bool, as_json: bool) -> int:
    """Delete what nothing needs, or with `dry_run` only say it. Raises SettingError beside a running render."""
    render = open_render(place, store)
    load_recipe(render)
    ledger = open_ledger(render)
    if dry_run:
        holder = running(render)
        if holder is not None:
            refuse_if_live(render, holder, this_process(), watch_s=0.0, sleep=time.sleep)
        last = ledger.holder()
        garbage = _look(render, ledger.load(), last.epoch + 1 if last else 1, orphans=orphans)
    else:
        garbage = collect(render, ledger, lambda state, epoch: _look(render, state, epoch, orphans=orphans))
    _tell(render, garbage, dry_run=dry_run, as_json=as_json)
    return 0


def collect(
    render: Store, ledger: Ledger, look: Callable[[LedgerState, int], Garbage], *, watch_s: float = 30.0
) -> Garbage:
    """Delete what `look` finds in the state under our epoch, in an order that a crash may end anywhere."""
    with or_nothing("deleted", render):
        epoch = ledger.take_lease(watch_s=watch_s)
    try:
        garbage = look(ledger.load(), epoch)
        if garbage.orphans:
            ledger.journal(garbage.orphans)
        for number, file in enumerate(garbage.files):
            if number % CHECK_EVERY == 0:
                ledger.check_lease()
            render.delete(file.path)
    finally:
        ledger.release_lease()
    return garbage


def _look(render: Store, state: LedgerState, epoch: int, *, orphans: bool) -> Garbage:
    film = whole_film(render)
    plans = [make_plan(film, state.overrides), make_plan(replace(film, until="stage-one"), state.overrides)]
    # A preview that can no longer be planned (its shot is gone from the storyboard) needs nothing.
    with suppress(UserError):
        plans.append(make_plan(load_recipe(render), state.overrides))
    needed = {task_id for plan in plans for task_id in plan.tasks}
    media = {path for plan in plans for path in plan.media}
    return find_garbage(render.list(), state, needed, media, epoch, orphans=orphans)


def _tell(render: Store, garbage: Garbage, *, dry_run: bool, as_json: bool) -> None:
    folders = by_folder(garbage.files)
    ended = [entry.task_id for entry in garbage.orphans]
    if as_json:
        names = [file.path for file in garbage.files]
        content = {"dry_run": dry_run, "size_bytes": garbage.size_bytes, "files": names, "orphans": ended}
        print(json.dumps({"store": render.url, **content}))
        return
    for folder, (count, size_bytes) in folders.items():
        print(f"  {folder}: {count} files, {format_bytes(size_bytes)}")
    if ended:
        verb = "would be forgotten" if dry_run else "are forgotten"
        print(f"  {len(ended)} finished tasks that no present plan needs {verb}: {', '.join(ended)}")
    verb = "may be deleted" if dry_run else "deleted"
    print(f"{render.url}: {len(garbage.files)} files, {format_bytes(garbage.size_bytes)} {verb}")
