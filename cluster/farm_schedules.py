"""A farm's schedules: what is due is submitted to it like any other render, under the run's own name.

They are kept beside the farm's books, at `<books>/schedules`. Whoever else looks at the same schedules, another farm or
`longtake schedule tick`, does no harm: a run is claimed once.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import yaml

from cluster.farm_books import FarmBooks
from cluster.farm_commands import Wishes, submission_of
from cluster.preflight import check_before_rendering
from cluster.render import RenderRequest, prepare, put_media
from pipeline.errors import LongtakeError
from pipeline.recurring import Run
from pipeline.schedule_log import ScheduleLog, schedule_ids
from pipeline.schedule_turn import RunOutcome, advance
from pipeline.store import Store
from pipeline.submissions import Phase, Submission

log = logging.getLogger("longtake.farm")
TURN_S = 10.0
OWNER = "schedule"


class FarmRunner:
    """`submit` and `change` are the farm's. Called in a thread, not in the farm's loop."""

    def __init__(
        self,
        book: FarmBooks,
        submit: Callable[[Submission], object],
        change: Callable[[str, Phase], object],
    ) -> None:
        self._book, self._submit, self._change = book, submit, change

    def submit(self, run: Run) -> None:
        """Queue it, if it is not in the books already. Raises UserError for a film that cannot be rendered here."""
        if run.id in self._book.states:
            return
        with tempfile.TemporaryDirectory() as folder:
            film = Path(folder) / "storyboard.yaml"
            film.write_text(yaml.safe_dump(run.storyboard().as_written(), allow_unicode=True, sort_keys=False))
            prepared = prepare(RenderRequest(film, run.store_url))
        check_before_rendering(prepared.recipe, prepared.plan, prepared.store, prepared.left, gang_size=1)
        put_media(prepared.plan, prepared.store)
        self._submit(submission_of(prepared, Wishes(owner=OWNER, render_id=run.id)))

    def outcome(self, run: Run) -> RunOutcome | None:
        """Its end. One that was paused has not ended: a person resumes or cancels it."""
        state = self._book.states.get(run.id)
        if state is None or state.phase not in ("done", "failed", "cancelled"):
            return None
        code = 0 if state.phase == "done" else state.exit_code
        return RunOutcome(1 if code is None else code, state.message)

    def cancel(self, run: Run) -> None:
        """Stop it; what is committed is kept."""
        if run.id in self._book.states:
            self._change(run.id, "cancelled")


class FarmSchedules:
    """All schedules of a farm, read once and then only on."""

    def __init__(self, store: Store, runner: FarmRunner) -> None:
        self._store, self._runner = store, runner
        self._logs: dict[str, ScheduleLog] = {}

    def turn(self, now_s: float) -> None:
        """One turn of each; what cannot be done now is said in the log and tried again. Raises nothing."""
        try:
            names = schedule_ids(self._store)
        except LongtakeError as error:
            log.warning("schedules cannot be read: %s", error)
            return
        for name in names:
            try:
                advance(self._logs.setdefault(name, ScheduleLog(self._store, name)), now_s, self._runner)
            except LongtakeError as error:
                log.warning("schedule %s: %s", name, error)
            except Exception:
                # A storyboard that nobody foresaw: neither the other schedules nor the farm end for it.
                log.exception("schedule %s: tried again", name)


def schedules_place(books: str) -> str:
    """Where the schedules of a farm with these books are."""
    return f"{books.rstrip('/')}/schedules"
