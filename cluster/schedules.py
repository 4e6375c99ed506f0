"""`longtake schedule ...`: order renders that come again, look at them, and have what is due rendered.

Runs are rendered in this process, one after another, unless a farm does it (`Runner`). A run that was
interrupted here goes on with the next `run-now` or `tick`. One whose orchestrator is lost goes on in the same process,
or, where that is lost with it, with the next `tick`: from what is committed, no more than `MOST_LOST` times in a row.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from cluster.ask import is_finished, running, stop
from cluster.places import open_ledger
from cluster.probe import with_home
from cluster.recipe import RECIPE_FILE, load_recipe, make_plan
from cluster.render import STOP_CODES, RenderRequest, render, stopping
from pipeline.cron import parse_cron
from pipeline.errors import (
    CorruptArtifact,
    Interrupted,
    LongtakeError,
    LostError,
    OrchestratorLost,
    SettingError,
    TransientError,
)
from pipeline.lease import LeaseHeld, last_holder, place_of, refuse_if_live, this_process, unreleased
from pipeline.recurring import (
    Added,
    Definition,
    Entry,
    Overlap,
    Removed,
    Run,
    Skipped,
    State,
    check_definition,
    claim_by_hand,
)
from pipeline.rows import read_rows
from pipeline.schedule_log import ScheduleLog, schedule_ids
from pipeline.schedule_turn import REPLACED, Runner, RunOutcome, advance
from pipeline.spec import Storyboard, load_template
from pipeline.store import Store, open_store

WATCH_S = 30.0
"""How long a process on another host is watched for its heartbeat."""
MOST_LOST = 3
"""How often since its last commit a run may lose its orchestrator and still be gone on with."""
LOST_PAUSE_S = 30.0
"""Before this process goes on after such a loss: a machine that ran out of memory gets time to have some again."""
AGAIN = 75
"""Exit code of what goes on when the same command is run again."""


class UnderWay(LongtakeError):
    """Another process renders this run, and says how it ends."""

    exit_code = 0


class HereRunner:
    """Renders in this process. What has been submitted has ended."""

    def __init__(self) -> None:
        self._outcomes: dict[str, RunOutcome] = {}

    def submit(self, run: Run) -> None:
        """Render it to its end, and again where its orchestrator was lost. Raises Interrupted if it is stopped,
        UnderWay if another process is at it: then it has not been submitted.
        """
        store, early, last = open_store(run.store_url), 0, ""
        while run.id not in self._outcomes:
            check_nobody_renders(run)
            lost = early + lost_since_commit(store)
            if lost > MOST_LOST:
                message = f"its orchestrator was lost {lost} times, and nothing was committed in between"
                self._outcomes[run.id] = RunOutcome(1, f"{message}{last}")
                return
            leases = len(unreleased(store))
            try:
                self._outcomes[run.id] = RunOutcome(render_here(run), "")
            except OrchestratorLost as error:
                # One that died before it took the lease has left no trace in the store.
                early = early + 1 if len(unreleased(store)) == leases else 0
                last = f"; the last time: {error}"
                print(f"{run.id}: {error}", flush=True)
                with stopping():
                    time.sleep(LOST_PAUSE_S)

    def outcome(self, run: Run) -> RunOutcome | None:
        """Known for what was rendered, or found finished, by this process."""
        return self._outcomes.get(run.id)

    def cancel(self, run: Run) -> None:
        """Stop the process that renders it, and wait for that. What has its film by then is over."""
        store = open_store(run.store_url)
        if store.head(RECIPE_FILE) is None:
            return
        plan = make_plan(load_recipe(store), open_ledger(store).load().overrides)
        if is_finished(store, plan) if running(store) is None else stop(store, plan, "cancel"):
            # To put the film in its place, which that process may not have come to.
            self.submit(run)


def render_here(run: Run) -> int:
    """Render it in this process; the exit code. Raises Interrupted, UnderWay, OrchestratorLost."""
    written = run.storyboard().as_written()
    with tempfile.TemporaryDirectory() as folder:
        film = Path(folder) / "storyboard.yaml"
        film.write_text(yaml.safe_dump(written, allow_unicode=True, sort_keys=False))
        code = render(RenderRequest(storyboard=film, store=run.store_url))
    if code in (LongtakeError.exit_code, SettingError.exit_code):
        # Perhaps because another one has begun just before, or has taken over.
        check_nobody_renders(run)
    if code in STOP_CODES.values():
        raise Interrupted(f"{run.id} was stopped; the next turn goes on with it", code)
    return code


def lost_since_commit(store: Store) -> int:
    """How many orchestrators of a render that nobody renders now were lost after the last that committed anything."""
    lost = unreleased(store)
    if len(lost) <= MOST_LOST:
        return len(lost)
    commits = open_ledger(store).load().commits.values()
    last = max((record.epoch for record in commits), default=0)
    return sum(epoch > last for epoch in lost)


def check_nobody_renders(run: Run) -> None:
    """Raise UnderWay while another process renders a run; one elsewhere is watched for its heartbeat."""
    store = open_store(run.store_url)
    holder = last_holder(store)
    if holder is None:
        return
    try:
        refuse_if_live(store, holder, this_process(), watch_s=WATCH_S, sleep=time.sleep)
    except LeaseHeld as error:
        raise UnderWay(f"{run.id} is being rendered by {place_of(holder)}") from error


def add_schedule(
    place: str,
    name: str,
    film: Path,
    *,
    cron: str,
    time_zone: str,
    overlap: Overlap,
    rows: Path | None,
    renders: str,
) -> int:
    """Put a storyboard on the schedule; every film it will ever order is checked now."""
    definition = Definition(
        id=name,
        cron=parse_cron(cron, time_zone),
        storyboard=with_checkpoint(with_home(load_template(film))),
        # A farm, or a clock elsewhere, has another folder to be in.
        renders=_open(renders, "--renders").url,
        overlap=overlap,
        rows=read_rows(rows) if rows is not None else (),
        folder=str(Path.cwd()),
    )
    now_s = time.time()
    check_files(check_definition(definition, now_s))

    def add(state: State) -> Entry:
        if state.definition is not None:
            remedy = f"`longtake schedule remove {name}` first; its history stays."
            raise SettingError("is on the schedule already", field="schedule", value=name, remedy=remedy)
        return Added(now_s, definition)

    _append(ScheduleLog(_open(place), name), add)
    print(f"{name}: next {_moment(_next_s(definition, now_s), definition)}")
    return 0


def with_checkpoint(template: Mapping[str, Any]) -> dict[str, Any]:
    """The template, with a checkpoint folder of this machine by its whole path."""
    name = template.get("checkpoint")
    is_folder = isinstance(name, str) and name != "pocket" and Path(name).expanduser().is_dir()
    return {**template, "checkpoint": str(Path(str(name)).expanduser().resolve())} if is_folder else dict(template)


def check_files(films: Iterable[Storyboard]) -> None:
    """Raise SettingError for a file that a film names and that is not there."""
    names = {name for film in films for name in (*film.media_paths(), *(lora.file for lora in film.loras))}
    for name in sorted(names):
        if not Path(name).is_file():
            remedy = "Paths are taken from the folder of this command; whoever renders has to reach them, too."
            raise SettingError("is not there", field="storyboard", value=name, remedy=remedy)


def remove_schedule(place: str, name: str) -> int:
    """Take it off; its history stays, and a run that is there goes on."""

    def remove(state: State) -> Entry:
        if state.definition is None:
            raise _unknown(name)
        return Removed(time.time())

    _append(ScheduleLog(_open(place), name), remove)
    print(f"{name}: removed")
    return 0


def run_now(place: str, name: str, runner: Runner | None) -> int:
    """A run outside the schedule; or the one that is there already, if it has not begun. Exit code of the run.

    Without a runner it is only claimed: whoever has the schedule's clock renders it.
    """
    log = _known(_open(place), name)
    state = log.state
    is_there = bool(state.open_runs and not state.open_runs[0].submitted)
    if not is_there:
        _append(log, lambda state: claim_by_hand(state, time.time()))
    run = log.state.open_runs[-1]
    _say_other_name(run)
    if runner is None:
        print(f"{run.id}: {'is asked for already; ' if is_there else ''}the farm takes it at its next turn")
        return 0
    try:
        advance(log, time.time(), runner)
    except UnderWay as error:
        print(error)
        return 0
    before, run = run, log.state.runs[run.number]
    if run.same_name != before.same_name:
        _say_other_name(run)
    if (ended := run.ended) is None:
        print(f"{run.id}: {'submitted' if run.submitted else 'waits for the run before it'}")
        return 0
    print(f"{run.id}: exit code {ended.exit_code}{': ' if ended.message else ''}{ended.message}")
    return ended.exit_code


def tick(place: str, name: str | None, runner: Runner) -> int:
    """What is due now, of one schedule or of all. Exit code of the first that failed; AGAIN if that was an error which
    may pass: then the run stays open, and the next tick goes on with it.
    """
    store, failed = _open(place), 0
    for schedule_id in [name] if name is not None else schedule_ids(store):
        try:
            code = _tick_one(store, schedule_id, runner)
        except CorruptArtifact as error:
            print(f"{schedule_id}: {error}")
            code = error.exit_code
        except (TransientError, LostError) as error:
            print(f"{schedule_id}: {error}")
            code = AGAIN
        failed = failed or code
    return failed


def _tick_one(store: Store, schedule_id: str, runner: Runner) -> int:
    log = _known(store, schedule_id)
    before, failed = log.state, 0
    try:
        advance(log, time.time(), runner)
    except (Interrupted, TransientError, LostError):
        raise
    except LongtakeError as error:
        print(f"{schedule_id}: {error}")
        failed = error.exit_code
    for run in log.state.runs.values():
        if before.runs.get(run.number) != run:
            _say_other_name(run)
            print(f"{run.id}: {_standing(run)}")
            code = run.ended.exit_code if run.ended else 0
            # One that made room for another has not failed, and its own process has said how it ended.
            failed = failed or (0 if code == REPLACED.exit_code else code)
    return failed


def _say_other_name(run: Run) -> None:
    if run.same_name > 1:
        print(f"{run.id}: an earlier run has a film {run.film}; this one's is {run.storyboard().output.path}")


def print_schedules(place: str, name: str | None, *, as_json: bool) -> int:
    """All schedules, or the history of one."""
    store = _open(place)
    if name is None:
        rows = [_summary(ScheduleLog(store, schedule_id)) for schedule_id in schedule_ids(store)]
    else:
        rows = _history(_known(store, name))
    if as_json:
        print(json.dumps(rows))
    elif rows:
        _print_table(rows)
    else:
        print(f"nothing in {store.url}" if name is None else f"{name}: no run yet")
    return 0


def _open(place: str, flag: str = "--schedules") -> Store:
    with _of_schedules(None, flag):
        return open_store(place)


@contextmanager
def _of_schedules(place: str | None, flag: str = "--schedules") -> Iterator[None]:
    """What is wrong with a store, told of the flag that named it."""
    try:
        yield
    except SettingError as error:
        if error.field != "--store":
            raise
        raise SettingError(error.message, field=flag, value=place or error.value, remedy=error.remedy) from error


def _known(store: Store, name: str) -> ScheduleLog:
    """The log of a schedule that is or was there. Raises SettingError."""
    log = ScheduleLog(store, name)
    with _of_schedules(store.url):
        log.refresh()
    if not log.entries:
        raise _unknown(name)
    return log


def _unknown(name: str) -> SettingError:
    remedy = "`longtake schedule list` shows what is."
    return SettingError("is not on the schedule", field="schedule", value=name, remedy=remedy)


def _append(log: ScheduleLog, make: Callable[[State], Entry]) -> None:
    """Append what the present state makes of it; again if somebody else was first."""
    with _of_schedules(log.store.url):
        log.refresh()
        while not log.append(make(log.state)):
            pass


def _summary(log: ScheduleLog) -> dict[str, Any]:
    try:
        state = log.refresh()
    except CorruptArtifact as error:
        return {"schedule": log.id, "state": f"damaged: {error}"}
    definition, now_s = state.definition, time.time()
    if definition is None:
        return {"schedule": log.id, "state": "removed", "runs": len(state.runs)}
    next_s = None if state.exhausted else _next_s(definition, max(now_s, state.since_s))
    return {
        "schedule": log.id,
        "state": "used up" if state.exhausted else "running" if state.open_runs else "waiting",
        "cron": definition.cron.expression,
        "zone": definition.cron.time_zone,
        "overlap": definition.overlap,
        "next": _moment(next_s, definition),
        "runs": len(state.runs),
    }


def _history(log: ScheduleLog) -> list[dict[str, Any]]:
    rows: list[tuple[float, dict[str, Any]]] = []
    for run in log.state.runs.values():
        row: dict[str, Any] = {
            "tick": _moment(run.claim.tick_s, run.definition),
            "run": run.id,
            "state": _standing(run),
            "store": run.store_url,
        }
        rows.append((run.claim.at_s, row))
    definition = next(entry.definition for entry in log.entries if isinstance(entry, Added))
    for entry in log.entries:
        if isinstance(entry, Skipped):
            skipped = {"tick": _moment(entry.tick_s, definition), "run": "", "state": "skipped", "store": ""}
            rows.append((entry.at_s, skipped))
    return [row for _, row in sorted(rows, key=lambda row: row[0])]


def _standing(run: Run) -> str:
    if run.ended is not None:
        word = "done" if run.ended.exit_code == 0 else f"exit code {run.ended.exit_code}"
        return f"{word}: {run.ended.message}" if run.ended.message else word
    return "running" if run.submitted else "claimed"


def _next_s(definition: Definition, now_s: float) -> float:
    return next(definition.cron.after(now_s))


def _moment(time_s: float | None, definition: Definition) -> str:
    if time_s is None:
        return ""
    return definition.cron.local(time_s).strftime("%Y-%m-%d %H:%M %Z")


def _print_table(rows: list[dict[str, Any]]) -> None:
    names = list({name: None for row in rows for name in row})
    lines = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(names))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
