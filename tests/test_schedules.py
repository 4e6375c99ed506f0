"""Schedules: when they tick, what they do about it, and that no crash loses or doubles a run."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cron import Cron, parse_cron
from pipeline.errors import CorruptArtifact, InputFileError, SettingError, SpecError, TransientError
from pipeline.recurring import (
    Added,
    Claimed,
    Definition,
    Ended,
    Overlap,
    Removed,
    Run,
    Skipped,
    Submitted,
    check_definition,
    claim_by_hand,
    entry_from_json,
    entry_to_json,
    values_of,
)
from pipeline.rows import read_rows
from pipeline.schedule_log import ScheduleLog, schedule_ids
from pipeline.schedule_turn import RunOutcome, advance
from pipeline.store import LocalStore

HOUR_S = 3600.0
FILM: dict[str, Any] = {"shots": [{"duration": "2s", "prompt": "a red circle on ${date}"}]}
LASTING: dict[str, Any] = {"shots": [{"duration": "${s}", "prompt": "a red circle"}]}


def at(text: str, zone: str = "UTC") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


def ticks(expression: str, zone: str, since: str, count: int) -> list[str]:
    cron = parse_cron(expression, zone)
    found = itertools.islice(cron.after(at(since, zone)), count)
    return [cron.local(tick_s).strftime("%Y-%m-%d %H:%M %Z") for tick_s in found]


# When


def test_a_time_that_the_clock_jumps_over_ticks_right_after_the_jump() -> None:
    assert ticks("30 2 * * *", "Europe/Berlin", "2026-03-28 00:00", 3) == [
        "2026-03-28 02:30 CET",
        "2026-03-29 03:00 CEST",
        "2026-03-30 02:30 CEST",
    ]


def test_a_time_that_the_clock_shows_twice_ticks_once() -> None:
    assert ticks("30 2 * * *", "Europe/Berlin", "2026-10-24 12:00", 3) == [
        "2026-10-25 02:30 CEST",
        "2026-10-26 02:30 CET",
        "2026-10-27 02:30 CET",
    ]


def test_every_half_hour_goes_by_elapsed_time_through_a_clock_change() -> None:
    cron = parse_cron("*/30 * * * *", "America/New_York")
    found = list(itertools.islice(cron.after(at("2026-11-01 04:00")), 8))
    assert [b - a for a, b in itertools.pairwise(found)] == [1800.0] * 7


def test_the_leap_day_ticks_every_four_years() -> None:
    assert ticks("0 12 29 2 *", "Asia/Tokyo", "2026-01-01 00:00", 2) == ["2028-02-29 12:00 JST", "2032-02-29 12:00 JST"]


def test_time_zones_with_odd_offsets_and_both_sides_of_midnight() -> None:
    assert ticks("15 0 * * MON", "Asia/Kathmandu", "2026-11-26 00:00", 1) == ["2026-11-30 00:15 +0545"]
    cron = parse_cron("15 0 * * MON", "Asia/Kathmandu")
    assert next(cron.after(at("2026-11-26 00:00"))) == at("2026-11-29 18:30")


def test_time_zones_are_there_where_the_system_has_none() -> None:
    code = "from pipeline.cron import parse_cron; parse_cron('0 0 * * *', 'Europe/Berlin')"
    environment = {"PYTHONTZPATH": "", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["*/7 * * * *", "30 2 * * *", "0 0 1 * *", "15 */5 * * 1-5", "0 3 29 2 *"]),
    st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe"]),
    st.integers(1_700_000_000, 1_900_000_000),
    st.integers(0, 40 * 86400),
)
def test_the_last_tick_is_the_last_of_all_in_between(expression: str, zone: str, after: int, span: int) -> None:
    cron = parse_cron(expression, zone)
    every = list(itertools.takewhile(lambda tick_s: tick_s <= after + span, cron.after(after)))
    assert cron.last(after, after + span) == (every[-1] if every else None)


def test_years_without_a_look_are_caught_up_fast() -> None:
    cron = parse_cron("* * * * *", "Europe/Berlin")
    assert cron.last(at("2016-01-01 00:00"), at("2026-11-26 12:00")) == at("2026-11-26 12:00")
    rare = parse_cron("0 12 29 2 *", "UTC")
    assert rare.last(at("2016-01-01 00:00"), at("2026-11-26 12:00")) == at("2024-02-29 12:00")


@pytest.mark.parametrize(
    ("expression", "zone", "field"),
    [
        ("30 2 * *", "UTC", "--cron"),
        ("0 30 2 * * *", "UTC", "--cron"),
        ("61 2 * * *", "UTC", "--cron"),
        ("0 0 31 2 *", "UTC", "--cron"),
        ("@daily", "UTC", "--cron"),
        ("", "UTC", "--cron"),
        ("0 0 * * *\n", "Mars/Olympus", "--time-zone"),
        ("0 0 * * *", "../../etc/passwd", "--time-zone"),
        ("0 0 * * *", "", "--time-zone"),
    ],
)
def test_what_never_ticks_is_refused(expression: str, zone: str, field: str) -> None:
    with pytest.raises(SettingError) as refused:
        parse_cron(expression, zone)
    assert refused.value.field == field


# What


class Farm:
    """Renders nothing: knows what it was asked for, and can fail at any call."""

    def __init__(self) -> None:
        self.submitted: list[str] = []
        self.cancelled: list[str] = []
        self.ended: dict[str, RunOutcome] = {}

    def submit(self, run: Run) -> None:
        if run.id not in self.submitted:
            self.submitted.append(run.id)

    def outcome(self, run: Run) -> RunOutcome | None:
        return self.ended.get(run.id)

    def cancel(self, run: Run) -> None:
        self.cancelled.append(run.id)
        self.ended.setdefault(run.id, RunOutcome(130, "cancelled"))

    def finish(self, run_id: str, exit_code: int = 0) -> None:
        self.ended[run_id] = RunOutcome(exit_code, "")


def define(overlap: Overlap = "skip", **changes: Any) -> Definition:
    return replace(Definition("news", Cron("0 * * * *", "UTC"), FILM, "renders", overlap), **changes)


@pytest.fixture
def started(tmp_path: Path) -> Callable[..., ScheduleLog]:
    """A log with a schedule that ticks at every full hour, from 00:30 on."""

    def make(overlap: Overlap = "skip", **changes: Any) -> ScheduleLog:
        log = ScheduleLog(LocalStore(tmp_path), "news")
        assert log.append(Added(at("2026-11-26 00:30"), define(overlap, **changes)))
        return log

    return make


def run_name(hour: int, counter: int) -> str:
    return f"news-20261126t{hour:02d}0000z-{counter}"


def test_nothing_happens_before_the_first_tick(started: Any) -> None:
    log, farm = started(), Farm()
    advance(log, at("2026-11-26 00:59:59"), farm)
    assert farm.submitted == [] and len(log.entries) == 1


def test_a_tick_is_one_run_however_often_one_looks(started: Any) -> None:
    log, farm = started(), Farm()
    for second in range(3):
        advance(log, at(f"2026-11-26 01:00:0{second}"), farm)
    assert farm.submitted == [run_name(1, 1)]
    farm.finish(run_name(1, 1))
    advance(log, at("2026-11-26 01:30"), farm)
    [run] = log.state.runs.values()
    assert run.ended is not None and run.ended.exit_code == 0
    advance(log, at("2026-11-26 02:00"), farm)
    assert farm.submitted == [run_name(1, 1), run_name(2, 2)]


def test_missed_ticks_are_made_up_for_by_one_run_for_the_last(started: Any) -> None:
    log, farm = started(), Farm()
    advance(log, at("2026-11-26 09:20"), farm)
    assert farm.submitted == [run_name(9, 1)]


def test_skip_lets_a_tick_pass_while_a_run_is_there(started: Any) -> None:
    log, farm = started("skip"), Farm()
    for hour in (1, 2, 3):
        advance(log, at(f"2026-11-26 0{hour}:00"), farm)
    assert farm.submitted == [run_name(1, 1)]
    assert [type(entry) for entry in log.entries] == [Added, Claimed, Submitted, Skipped, Skipped]
    farm.finish(run_name(1, 1))
    advance(log, at("2026-11-26 04:00"), farm)
    assert farm.submitted[-1] == run_name(4, 2), "a tick that passed has no number"


def test_queue_runs_them_one_after_another(started: Any) -> None:
    log, farm = started("queue"), Farm()
    for hour in (1, 2, 3):
        advance(log, at(f"2026-11-26 0{hour}:00"), farm)
    assert farm.submitted == [run_name(1, 1)]
    for hour in (1, 2):
        farm.finish(run_name(hour, hour))
        advance(log, at("2026-11-26 03:10"), farm)
        assert farm.submitted == [run_name(done, done) for done in range(1, hour + 2)]


def test_replace_stops_the_run_that_is_there_and_then_starts_the_next(started: Any) -> None:
    log, farm = started("replace"), Farm()
    slow = Farm()
    slow.cancel = lambda run: slow.cancelled.append(run.id)  # type: ignore[method-assign]
    advance(log, at("2026-11-26 01:00"), slow)
    advance(log, at("2026-11-26 02:00"), slow)
    advance(log, at("2026-11-26 02:01"), slow)
    assert slow.cancelled == [run_name(1, 1)], "asked once"
    assert slow.submitted == [run_name(1, 1)], "not beside each other"
    slow.finish(run_name(1, 1), 130)
    advance(log, at("2026-11-26 02:02"), slow)
    assert slow.submitted == [run_name(1, 1), run_name(2, 2)]
    assert farm.submitted == []


def test_of_several_that_wait_only_the_last_replaces(started: Any) -> None:
    log = started("replace")
    for counter, hour in enumerate((1, 2, 3), 1):
        log.append(Claimed(at(f"2026-11-26 0{hour}:00"), at(f"2026-11-26 0{hour}:00"), counter))
    farm = Farm()
    advance(log, at("2026-11-26 03:10"), farm)
    assert farm.submitted == [run_name(3, 3)]
    assert [entry.exit_code for entry in log.entries if isinstance(entry, Ended)] == [130, 130]


def test_a_removed_schedule_ticks_no_more_and_its_run_goes_on(started: Any) -> None:
    log, farm = started(), Farm()
    advance(log, at("2026-11-26 01:00"), farm)
    log.append(Removed(at("2026-11-26 01:10")))
    farm.finish(run_name(1, 1))
    advance(log, at("2026-11-26 05:00"), farm)
    assert farm.submitted == [run_name(1, 1)]
    assert log.state.open_runs == []


def test_a_schedule_added_again_counts_anew_and_keeps_its_history(started: Any) -> None:
    log, farm = started("queue"), Farm()
    advance(log, at("2026-11-26 01:00"), farm)
    log.append(Removed(at("2026-11-26 01:10")))
    log.append(Added(at("2026-11-26 01:20"), define("queue", renders="elsewhere")))
    advance(log, at("2026-11-26 02:00"), farm)
    first, second = log.state.runs.values()
    assert (first.store_url, second.store_url) == (f"renders/{run_name(1, 1)}", f"elsewhere/{run_name(2, 1)}")
    farm.finish(run_name(1, 1))
    advance(log, at("2026-11-26 02:10"), farm)
    assert farm.submitted[-1] == run_name(2, 1)


def test_by_hand_counts_and_takes_no_tick(started: Any) -> None:
    log, farm = started(), Farm()
    assert log.append(claim_by_hand(log.state, at("2026-11-26 00:40:30")))
    advance(log, at("2026-11-26 00:40:31"), farm)
    assert farm.submitted == ["news-20261126t004030z-1"]
    with pytest.raises(SettingError, match="one run at a time"):
        claim_by_hand(log.state, at("2026-11-26 00:41"))
    farm.finish("news-20261126t004030z-1")
    advance(log, at("2026-11-26 01:00"), farm)
    assert farm.submitted[-1] == run_name(1, 2)


def films(log: ScheduleLog) -> list[str | None]:
    return [run.storyboard().output.path for run in log.state.runs.values()]


@pytest.mark.parametrize(
    ("film", "first", "second", "other_day"),
    [
        ({"output": {"path": "v1.0/${date}"}}, "v1.0/2026-11-26", "v1.0/2026-11-26-2", "v1.0/2026-11-27"),
        ({"output": {"path": "${date}.mkv"}}, "2026-11-26.mkv", "2026-11-26-2.mkv", "2026-11-27.mkv"),
        ({"title": "On ${date}", "output": {"codec": "prores"}}, None, "on-2026-11-26-2.mov", None),
    ],
)
def test_a_second_run_of_a_day_leaves_the_first_ones_film(
    started: Any, film: dict[str, Any], first: str | None, second: str, other_day: str | None
) -> None:
    log, farm = started(storyboard={**FILM, **film}), Farm()
    for day, hour, exit_code in ((26, 1, 1), (26, 2, 0), (26, 3, 4), (26, 4, 0), (27, 0, 0)):
        now_s = at(f"2026-11-{day} {hour:02d}:30")
        assert log.append(Skipped(now_s, now_s)) and log.append(claim_by_hand(log.state, now_s))
        advance(log, now_s, farm)
        farm.finish(farm.submitted[-1], exit_code)
        advance(log, now_s, farm)
    assert films(log) == [first, first, second, second, other_day], "a run that failed leaves its name"


@pytest.mark.parametrize("path", ["latest.mp4", "${schedule}.mp4"])
def test_a_film_whose_name_never_differs_is_the_latest(started: Any, path: str) -> None:
    log, farm = started(storyboard={**FILM, "title": "On ${date}", "output": {"path": path}}), Farm()
    for hour in (1, 2):
        advance(log, at(f"2026-11-26 0{hour}:00"), farm)
        farm.finish(run_name(hour, hour))
        advance(log, at(f"2026-11-26 0{hour}:00"), farm)
    assert len(set(films(log))) == 1 and len(films(log)) == 2


def test_names_are_told_apart_while_runs_wait_and_after_the_schedule_was_added_again(started: Any) -> None:
    film = {**FILM, "output": {"path": "${date}.mp4"}}
    log = started("queue", storyboard=film)
    for minute in (31, 32):
        assert log.append(claim_by_hand(log.state, at(f"2026-11-26 00:{minute}")))
    assert log.append(Removed(at("2026-11-26 00:33")))
    assert log.append(Added(at("2026-11-26 00:34"), define("queue", storyboard=film)))
    assert log.append(claim_by_hand(log.state, at("2026-11-26 00:35")))
    assert films(log) == ["2026-11-26.mp4", "2026-11-26-2.mp4", "2026-11-26-3.mp4"]


def test_a_run_that_replaces_another_takes_its_films_name(started: Any) -> None:
    log = started("replace", storyboard={**FILM, "output": {"path": "${date}.mp4"}})
    for minute in (31, 32):
        assert log.append(claim_by_hand(log.state, at(f"2026-11-26 00:{minute}")))
    assert films(log) == ["2026-11-26.mp4"] * 2


def test_a_run_that_ends_before_it_is_cancelled_keeps_its_film(started: Any) -> None:
    log, farm = started("replace", storyboard={**FILM, "output": {"path": "${date}.mp4"}}), Farm()
    advance(log, at("2026-11-26 01:00"), farm)
    assert log.append(claim_by_hand(log.state, at("2026-11-26 01:20")))
    farm.finish(run_name(1, 1))
    advance(log, at("2026-11-26 01:21"), farm)
    assert len(farm.submitted) == 2
    assert films(log) == ["2026-11-26.mp4", "2026-11-26-2.mp4"]


@pytest.mark.parametrize(("ends_with", "second"), [(0, "2026-11-26-2.mp4"), (130, "2026-11-26.mp4")])
def test_a_run_that_has_begun_unsaid_is_stopped_before_another_takes_its_place(
    started: Any, ends_with: int, second: str
) -> None:
    log, farm = started("replace", storyboard={**FILM, "output": {"path": "${date}.mp4"}}), Farm()
    for hour, minute in ((1, 0), (1, 20)):
        now_s = at(f"2026-11-26 0{hour}:{minute:02d}")
        assert log.append(Skipped(now_s, now_s)) and log.append(claim_by_hand(log.state, now_s))
    first, _ = log.state.runs.values()
    farm.submit(first)
    if ends_with == 0:
        farm.finish(first.id)
    advance(log, now_s, farm)
    assert farm.cancelled == [first.id]
    assert [entry.exit_code for entry in log.entries if isinstance(entry, Ended)] == [ends_with]
    assert films(log) == ["2026-11-26.mp4", second]


def test_a_film_that_cannot_be_ordered_ends_its_run_with_the_reason(started: Any) -> None:
    class Strict(Farm):
        def submit(self, run: Run) -> None:
            raise InputFileError("is not there", field="start.png")

    log = started()
    advance(log, at("2026-11-26 01:00"), Strict())
    [ended] = [entry for entry in log.entries if isinstance(entry, Ended)]
    assert ended.exit_code == 2 and "start.png" in ended.message


# Crashes


class Crash(Exception):
    pass


class Killed:
    """A farm and a log behind which the process dies at the n-th call."""

    def __init__(self, farm: Farm, log: ScheduleLog, calls: int) -> None:
        self.farm, self.left = farm, calls
        self._append = log.append
        log.append = self.append  # type: ignore[method-assign]

    def _live(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Crash

    def append(self, entry: Any) -> bool:
        self._live()
        done = self._append(entry)
        self._live()
        return done

    def submit(self, run: Run) -> None:
        self._live()
        self.farm.submit(run)
        self._live()

    def outcome(self, run: Run) -> RunOutcome | None:
        return self.farm.outcome(run)

    def cancel(self, run: Run) -> None:
        self._live()
        self.farm.cancel(run)
        self._live()


@pytest.mark.parametrize("overlap", ["skip", "queue", "replace"])
@pytest.mark.parametrize("calls", range(12))
def test_a_crash_anywhere_neither_loses_nor_doubles_a_run(
    started: Any, tmp_path: Path, overlap: Overlap, calls: int
) -> None:
    started(overlap)
    farm, uncut = Farm(), Farm()
    times = [at(f"2026-11-26 0{hour}:0{minute}") for hour in (1, 2) for minute in (0, 1)]
    for index, now_s in enumerate(times):
        log = ScheduleLog(LocalStore(tmp_path), "news")
        try:
            log.refresh()
            advance(log, now_s, Killed(farm, log, calls) if index == 2 else farm)
        except Crash:
            pass
    advance(ScheduleLog(LocalStore(tmp_path), "news"), times[-1], farm)
    other = ScheduleLog(LocalStore(tmp_path / "uncut"), "news")
    other.append(Added(at("2026-11-26 00:30"), define(overlap)))
    for now_s in (*times, times[-1]):
        advance(other, now_s, uncut)
    assert (farm.submitted, set(farm.cancelled)) == (uncut.submitted, set(uncut.cancelled))
    found = ScheduleLog(LocalStore(tmp_path), "news").refresh()
    assert [run.id for run in found.runs.values()] == [run.id for run in other.state.runs.values()]
    assert [run.id for run in found.open_runs] == [run.id for run in other.state.open_runs]


@pytest.mark.parametrize("calls", range(7))
def test_a_crash_around_the_end_of_a_run_that_was_rendered_here_leaves_it_to_the_next_look(
    started: Any, tmp_path: Path, calls: int
) -> None:
    class Here(Farm):
        """Renders at once, and knows of nothing that another process rendered."""

        def submit(self, run: Run) -> None:
            self.finish(run.id)

    started()
    with contextlib.suppress(Crash):
        log, here = ScheduleLog(LocalStore(tmp_path), "news"), Here()
        advance(log, at("2026-11-26 01:00"), Killed(here, log, calls))
    log = ScheduleLog(LocalStore(tmp_path), "news")
    advance(log, at("2026-11-26 01:01"), Here())
    [run] = log.state.runs.values()
    assert run.ended is not None and run.ended.exit_code == 0


def test_two_that_look_at_once_make_one_run(started: Any, tmp_path: Path) -> None:
    started()
    farm, now_s = Farm(), at("2026-11-26 01:00")
    one, two = ScheduleLog(LocalStore(tmp_path), "news"), ScheduleLog(LocalStore(tmp_path), "news")
    one.refresh(), two.refresh()
    assert one.append(Claimed(now_s, now_s, 1))
    assert not two.append(Claimed(now_s, now_s, 1))
    advance(two, now_s, farm)
    advance(one, now_s, farm)
    assert farm.submitted == [run_name(1, 1)] and len(one.entries) == 3


def test_a_cluster_out_of_reach_is_tried_again_at_the_next_turn(started: Any) -> None:
    class Away(Farm):
        def submit(self, run: Run) -> None:
            raise TransientError("no answer")

    log, farm = started(), Farm()
    with pytest.raises(TransientError):
        advance(log, at("2026-11-26 01:00"), Away())
    advance(log, at("2026-11-26 01:01"), farm)
    assert farm.submitted == [run_name(1, 1)]


def test_an_entry_that_is_not_whole_is_reported(started: Any, tmp_path: Path) -> None:
    started()
    file = tmp_path / "news" / "00000001.json"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CorruptArtifact, match="00000001"):
        ScheduleLog(LocalStore(tmp_path), "news").refresh()


def test_every_entry_reads_back(started: Any, tmp_path: Path) -> None:
    log, farm = started("replace", rows=({"who": "Ann"}, {"who": "Bob"})), Farm()
    for hour in range(1, 4):
        advance(log, at(f"2026-11-26 0{hour}:00"), farm)
    log.append(Skipped(1.0, 2.0))
    log.append(Removed(3.0))
    assert {type(entry).__name__ for entry in log.entries} >= {"Added", "Claimed", "Submitted", "CancelAsked", "Ended"}
    assert [entry_from_json(entry_to_json(entry)) for entry in log.entries] == log.entries
    again = ScheduleLog(LocalStore(tmp_path), "news")
    assert again.refresh() == log.state
    assert schedule_ids(LocalStore(tmp_path)) == ["news"]


# Templates


def test_variables_are_the_ticks_date_there_the_number_and_the_row() -> None:
    film = {
        "title": "${city} ${date} ${time} #${counter}",
        "seed": "${counter}",
        "shots": [{"duration": "${seconds}", "prompt": "a ${colour} circle, price $5"}],
    }
    rows = ({"city": "Oslo", "seconds": 3, "colour": "red: bright"}, {"city": "Rome", "seconds": 4, "colour": "x"})
    definition = define(storyboard=film, rows=rows, cron=Cron("30 0 * * *", "Asia/Tokyo"))
    run = Run(1, definition, Claimed(0.0, at("2026-11-26 00:30", "Asia/Tokyo"), 1))
    spec = run.storyboard()
    assert spec.title == "Oslo 2026-11-26 0030 #1"
    assert spec.seed == 1
    assert spec.shots[0].prompt[0].prompt == "a red: bright circle, price $5"
    assert spec.shots[0].duration.seconds == 3
    assert values_of(definition, Claimed(0.0, 0.0, 2))["city"] == "Rome"


def test_a_table_that_is_used_up_ends_the_schedule(started: Any) -> None:
    log, farm = started(rows=({"who": "Ann"},)), Farm()
    for hour in (1, 2):
        advance(log, at(f"2026-11-26 0{hour}:00"), farm)
        farm.finish(run_name(1, 1))
    assert farm.submitted == [run_name(1, 1)] and log.state.exhausted
    with pytest.raises(SettingError, match="used up"):
        claim_by_hand(log.state, at("2026-11-26 03:00"))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"id": "../../evil"}, "evil"),
        ({"id": "x" * 41}, "x" * 41),
        ({"storyboard": {"shots": [{"duration": "2s", "prompt": "${who}"}]}}, "${who}"),
        ({"rows": ({"counter": 1},)}, "counter"),
        ({"renders": "renders/${date}"}, "--renders"),
        ({"rows": ({"s": "2s"}, {"s": "-2s"}), "storyboard": LASTING}, "run 2"),
    ],
)
def test_a_schedule_that_would_fail_at_night_is_refused_by_day(changes: dict[str, Any], word: str) -> None:
    with pytest.raises((SettingError, SpecError)) as refused:
        check_definition(define(**changes), at("2026-11-26 00:00"))
    assert word in str(refused.value)


def test_run_ids_are_names_of_a_store() -> None:
    run = Run(1, define(id="x" * 40), Claimed(0.0, at("2026-11-26 00:30"), 9999))
    from pipeline.tasks import NAME_PATTERN

    assert NAME_PATTERN.fullmatch(run.id)


# Tables


def test_rows_of_a_csv_are_texts_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('﻿city,seconds,zip,share\n"Oslo, N",3,0150,0.5\nRome,4,00118,1.25\n', encoding="utf-8")
    assert read_rows(path) == (
        {"city": "Oslo, N", "seconds": 3, "zip": "0150", "share": 0.5},
        {"city": "Rome", "seconds": 4, "zip": "00118", "share": 1.25},
    )


def test_rows_of_a_parquet_file_keep_their_types(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"city": ["Oslo"], "seconds": [3], "zip": ["0150"], "day": [datetime(2026, 11, 26).date()]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet") == ({"city": "Oslo", "seconds": 3, "zip": "0150", "day": "2026-11-26"},)


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.csv", "city\n"), ("a.csv", "city,b\nO,\n"), ("a.csv", "city\nO,5\n"), ("a.txt", "x"), ("a.parquet", "x")],
)
def test_a_table_that_makes_no_films_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputFileError) as refused:
        read_rows(tmp_path / name)
    assert name in str(refused.value)
    with pytest.raises(InputFileError):
        read_rows(tmp_path / "none.csv")
