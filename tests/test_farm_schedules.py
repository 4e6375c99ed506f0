"""Schedules whose clock is a farm: what is due is in its books once, and how it ended is in the schedule's log."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from cluster.farm_schedules import OWNER, FarmRunner, FarmSchedules, schedules_place
from pipeline.cron import Cron
from pipeline.errors import SettingError, TransientError
from pipeline.recurring import Added, Definition, Ended, Run
from pipeline.schedule_log import ScheduleLog
from pipeline.store import LocalStore
from pipeline.submissions import Changed, Phase, Submission, SubmissionState, Submitted, apply_entry

HOUR_S = 3600.0


class Books:
    """A farm's books, and the two of its calls that schedules use."""

    def __init__(self) -> None:
        self.states: dict[str, SubmissionState] = {}
        self.calls: list[str] = []

    def submit(self, submission: Submission) -> None:
        self.calls.append(submission.render_id)
        self.states[submission.render_id] = apply_entry(None, Submitted(0.0, submission))

    def change(self, render_id: str, phase: Phase, exit_code: int = 130) -> None:
        self.states[render_id] = apply_entry(self.states[render_id], Changed(0.0, phase, "", exit_code))


@pytest.fixture
def books() -> Books:
    return Books()


@pytest.fixture
def schedules(tmp_path: Path, tiny_checkpoint: Path, books: Books) -> FarmSchedules:
    """One schedule, `news`, that ticks at full hours from second 1 on."""
    film = {"checkpoint": str(tiny_checkpoint), "shots": [{"duration": "2s", "prompt": "a circle, ${counter}"}]}
    definition = Definition("news", Cron("0 * * * *", "UTC"), film, str(tmp_path / "renders"), "replace")
    store = LocalStore(tmp_path / "books" / "schedules")
    ScheduleLog(store, "news").append(Added(1.0, definition))
    return FarmSchedules(store, FarmRunner(books, books.submit, books.change))


def log_of(tmp_path: Path) -> ScheduleLog:
    log = ScheduleLog(LocalStore(tmp_path / "books" / "schedules"), "news")
    log.refresh()
    return log


def test_what_is_due_is_submitted_once_under_its_runs_name(
    schedules: FarmSchedules, books: Books, tmp_path: Path
) -> None:
    schedules.turn(HOUR_S - 1)
    assert books.calls == []
    for _ in range(2):
        schedules.turn(HOUR_S)
    assert books.calls == ["news-19700101t010000z-1"]
    [state] = books.states.values()
    assert state.submission.owner == OWNER
    assert state.submission.store_url == str(tmp_path / "renders" / books.calls[0])
    books.change(books.calls[0], "failed", 4)
    schedules.turn(HOUR_S + 60)
    assert [entry.exit_code for entry in log_of(tmp_path).entries if isinstance(entry, Ended)] == [4]


def test_a_farm_that_died_after_submitting_submits_nothing_twice(
    schedules: FarmSchedules, books: Books, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*entry: Any) -> bool:
        raise TransientError("killed here")

    real, calls = ScheduleLog.append, []

    def append(log: ScheduleLog, entry: Any) -> bool:
        calls.append(entry)
        return die() if len(calls) == 2 else real(log, entry)

    monkeypatch.setattr(ScheduleLog, "append", append)
    schedules.turn(HOUR_S)
    assert len(books.calls) == 1 and len(log_of(tmp_path).entries) == 2, "claimed and submitted, not written down"
    FarmSchedules(
        LocalStore(tmp_path / "books" / "schedules"), FarmRunner(books, books.submit, books.change)
    ).turn(HOUR_S + 10)
    assert len(books.calls) == 1
    [run] = log_of(tmp_path).state.runs.values()
    assert run.submitted


def test_a_run_that_is_replaced_is_cancelled_first(schedules: FarmSchedules, books: Books) -> None:
    schedules.turn(HOUR_S)
    schedules.turn(2 * HOUR_S)
    assert books.states[books.calls[0]].phase == "cancelled"
    assert len(books.calls) == 2


def test_a_paused_run_is_neither_over_nor_submitted_again(
    schedules: FarmSchedules, books: Books, tmp_path: Path
) -> None:
    schedules.turn(HOUR_S)
    books.change(books.calls[0], "paused", 75)
    schedules.turn(HOUR_S + 60)
    assert len(books.calls) == 1 and len(log_of(tmp_path).state.open_runs) == 1


def test_a_film_the_farm_cannot_render_ends_its_run_with_the_reason(
    schedules: FarmSchedules, books: Books, tmp_path: Path
) -> None:
    log = log_of(tmp_path)
    assert log.state.definition is not None
    broken = replace(log.state.definition, id="broken", storyboard={
        "shots": [{"duration": "2s", "prompt": "a", "image": "/nowhere.png"}]})
    ScheduleLog(LocalStore(tmp_path / "books" / "schedules"), "broken").append(Added(1.0, broken))
    schedules.turn(HOUR_S)
    other = ScheduleLog(LocalStore(tmp_path / "books" / "schedules"), "broken")
    other.refresh()
    [ended] = [entry for entry in other.entries if isinstance(entry, Ended)]
    assert ended.exit_code == SettingError.exit_code and "nowhere.png" in ended.message
    assert books.calls == ["news-19700101t010000z-1"], "the others go on"


def test_a_schedule_that_breaks_in_a_way_nobody_foresaw_holds_up_no_other(
    schedules: FarmSchedules, books: Books, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition = log_of(tmp_path).state.definition
    assert definition is not None
    store = LocalStore(tmp_path / "books" / "schedules")
    ScheduleLog(store, "broken").append(Added(1.0, replace(definition, id="broken")))
    real = FarmRunner.submit

    def submit(runner: FarmRunner, run: Run) -> None:
        if run.definition.id == "broken":
            raise KeyError("nobody foresaw this")
        real(runner, run)

    monkeypatch.setattr(FarmRunner, "submit", submit)
    schedules.turn(HOUR_S)
    assert books.calls == ["news-19700101t010000z-1"], "it comes after the broken one"


def test_a_run_by_hand_is_left_to_the_farm(
    schedules: FarmSchedules, books: Books, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = schedules_place(str(tmp_path / "books"))
    assert main(["schedule", "run-now", "news", "--farm", "--schedules", place]) == 0
    assert "farm" in capsys.readouterr().out and books.calls == []
    schedules.turn(2.0)
    assert len(books.calls) == 1
