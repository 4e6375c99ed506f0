"""`longtake schedule ...` as a person uses it. What renders stands aside here; the rest is real."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import main
from cluster.recipe import Recipe, load_recipe, make_plan
from cluster.render import RenderRequest
from pipeline.errors import OrchestratorLost, StoreError
from pipeline.facts import CheckpointFacts, Facts
from pipeline.journal import AttemptStarted
from pipeline.lease import this_process
from pipeline.ledger import Ledger
from pipeline.records import seal
from pipeline.spec import parse_spec
from pipeline.store import LocalStore
from pipeline.tasks import CommitRecord
from tests.test_requests import Orchestrator

FILM = "title: ${date}\nseed: ${counter}\nshots:\n  - {duration: 2s, prompt: 'a ${colour} circle'}\n"


class Renderer:
    """Ends every render with the next exit code, and keeps what was asked."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.stores: list[str | None] = []
        self.films: list[dict[str, Any]] = []

    def __call__(self, request: RenderRequest) -> int:
        self.stores.append(request.store)
        self.films.append(yaml.safe_load(request.storyboard.read_text()))
        return self.codes.pop(0) if self.codes else 0


@pytest.fixture
def renderer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Renderer:
    """An empty working folder with a template and a table, and a renderer."""
    monkeypatch.chdir(tmp_path)
    Path("film.yaml").write_text(FILM)
    Path("rows.csv").write_text("colour\nred\nblue\n")
    made = Renderer()
    monkeypatch.setattr("cluster.schedules.render", made)
    return made


def add(*more: str) -> int:
    flags = ["--cron", "30 2 * * *", "--time-zone", "Europe/Berlin", "--rows", "rows.csv"]
    return main(["schedule", "add", "news", "film.yaml", *flags, *more])


def listed(capsys: pytest.CaptureFixture[str], *name: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["schedule", "list", *name, "--json"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return rows


def test_a_schedule_is_added_run_listed_and_removed(renderer: Renderer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "list"]) == 0
    assert capsys.readouterr().out == f"nothing in {Path.cwd()}/schedules\n"
    assert add("--renders", "elsewhere") == 0
    assert "02:30" in capsys.readouterr().out
    assert main(["schedule", "list", "news"]) == 0
    assert capsys.readouterr().out == "news: no run yet\n"
    assert main(["schedule", "run-now", "news"]) == 0
    assert main(["schedule", "run-now", "news"]) == 0
    assert [film["shots"][0]["prompt"][0]["prompt"] for film in renderer.films] == ["a red circle", "a blue circle"]
    assert [film["seed"] for film in renderer.films] == [1, 2]
    here = f"{Path.cwd()}/elsewhere/news-"
    assert all(str(store).startswith(here) for store in renderer.stores), "a farm is elsewhere"
    assert main(["schedule", "run-now", "news"]) == 2, "the table has two rows"
    [row] = listed(capsys)
    assert (row["schedule"], row["state"], row["runs"]) == ("news", "used up", 2)
    assert [run["state"] for run in listed(capsys, "news")] == ["done", "done"]
    assert main(["schedule", "remove", "news"]) == 0
    assert listed(capsys)[0]["state"] == "removed"
    assert len(listed(capsys, "news")) == 2, "history stays"


def test_a_second_run_of_a_day_says_where_its_film_is(
    renderer: Renderer, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("film.yaml").write_text(FILM + "output: {path: 'films/${schedule}-${date}.mp4'}\n")
    assert add() == 0
    capsys.readouterr()
    assert main(["schedule", "run-now", "news"]) == main(["schedule", "run-now", "news"]) == 0
    first, second = [film["output"]["path"] for film in renderer.films]
    assert second == first.replace(".mp4", "-2.mp4")
    assert f"an earlier run has a film {first}; this one's is {second}" in capsys.readouterr().out
    assert len(set(renderer.stores)) == 2


def test_a_run_that_was_stopped_goes_on_under_the_same_name(
    renderer: Renderer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert add() == 0
    renderer.codes = [75, 130, 0]
    assert main(["schedule", "run-now", "news"]) == 75
    assert [run["state"] for run in listed(capsys, "news")] == ["claimed"]
    assert main(["schedule", "tick"]) == 130
    assert main(["schedule", "run-now", "news"]) == 0
    assert len(set(renderer.stores)) == 1 and len(renderer.stores) == 3
    assert [run["state"] for run in listed(capsys, "news")] == ["done"]


def test_a_run_that_failed_says_so_and_the_next_is_another(
    renderer: Renderer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert add() == 0
    renderer.codes = [4, 0]
    assert main(["schedule", "run-now", "news"]) == 4
    assert main(["schedule", "run-now", "news"]) == 0
    assert [run["state"] for run in listed(capsys, "news")] == ["exit code 4", "done"]


def test_a_tick_renders_what_is_due_and_nothing_twice(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = 1_795_700_000.0
    monkeypatch.setattr("cluster.schedules.time.time", lambda: now_s)
    assert add() == 0
    assert main(["schedule", "tick"]) == 0 and renderer.films == []
    now_s += 3 * 86400
    assert main(["schedule", "tick"]) == 0
    assert main(["schedule", "tick", "news"]) == 0
    assert len(renderer.films) == 1, "three nights missed, one run"
    [run] = listed(capsys, "news")
    assert run["tick"].endswith("02:30 CET")


@pytest.mark.parametrize("lost", ["render", "schedule"])
def test_a_tick_that_an_error_ended_which_may_pass_is_told_from_one_that_failed(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    def unanswered(*_: Any) -> Any:
        raise StoreError("the store does not answer")

    now_s = 1_795_700_000.0
    monkeypatch.setattr("cluster.schedules.time.time", lambda: now_s)
    assert add() == 0
    now_s += 86400
    with monkeypatch.context() as broken:
        if lost == "render":
            broken.setattr("cluster.schedules.render", unanswered)
        else:
            broken.setattr("cluster.schedules.ScheduleLog.refresh", unanswered)
        assert main(["schedule", "tick", "news"]) == 75
    assert "does not answer" in capsys.readouterr().out
    renderer.codes = [1]
    assert main(["schedule", "tick", "news"]) == 1
    assert main(["schedule", "tick", "news"]) == 0, "the run has ended"
    assert [run["state"] for run in listed(capsys, "news")] == ["exit code 1"]


class Losing:
    """Loses the orchestrator of each render, as told: "lease" after it has taken the lease, "start" before it has,
    "commit" after it has committed a task, too. Afterwards renders end well.
    """

    def __init__(self, *losses: str) -> None:
        self.losses = list(losses)
        self.stores: list[str] = []

    def __call__(self, request: RenderRequest) -> int:
        assert request.store is not None
        self.stores.append(request.store)
        if not self.losses:
            return 0
        if (loss := self.losses.pop(0)) != "start":
            lose_orchestrator(Path(request.store), commits=loss == "commit")
        raise OrchestratorLost("the orchestrator is gone (out of memory)")


def lose_orchestrator(folder: Path, *, commits: bool = False) -> None:
    """What one leaves that was killed."""
    ledger = Ledger(LocalStore(folder), owner=replace(this_process(), pid=1, mark="another"))
    epoch = ledger.take_lease()
    if commits:
        ledger.load()
        ledger.journal([AttemptStarted(f"t{epoch}", 1, epoch, "w1", "here")])
        ledger.commit(CommitRecord(f"t{epoch}", 1, epoch, (), {}))


@pytest.mark.parametrize(
    ("losses", "tries", "code"),
    [
        (["lease"], 2, 0),
        (["lease", "start", "lease"], 4, 0),
        (["lease"] * 4, 4, 1),
        (["start"] * 4, 4, 1),
        (["lease"] * 3 + ["commit"] + ["lease"] * 3, 8, 0),
        (["commit"] + ["lease"] * 4, 5, 1),
    ],
)
def test_a_run_whose_orchestrator_is_lost_goes_on_in_its_store_and_is_given_up_where_nothing_comes_of_it(
    renderer: Renderer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    losses: list[str],
    tries: int,
    code: int,
) -> None:
    losing = Losing(*losses)
    monkeypatch.setattr("cluster.schedules.render", losing)
    monkeypatch.setattr("cluster.schedules.LOST_PAUSE_S", 0.0)
    assert add() == 0
    assert main(["schedule", "run-now", "news"]) == code
    assert len(losing.stores) == tries and len(set(losing.stores)) == 1
    [run] = listed(capsys, "news")
    assert run["state"] == "done" if code == 0 else "lost 4 times" in run["state"] and "out of memory" in run["state"]
    assert main(["schedule", "tick", "news"]) == 0
    assert len(losing.stores) == tries, "it has ended"


@pytest.mark.parametrize(("lost", "code"), [(3, 0), (4, 1)])
def test_a_run_whose_whole_process_was_lost_goes_on_with_the_next_tick_and_is_given_up_as_well(
    renderer: Renderer, capsys: pytest.CaptureFixture[str], lost: int, code: int
) -> None:
    assert add() == 0
    assert main(["schedule", "run-now", "news", "--farm"]) == 0, "claimed, and not begun"
    [run] = listed(capsys, "news")
    for _ in range(lost):
        lose_orchestrator(Path(run["store"]))
    assert main(["schedule", "tick"]) == code
    assert renderer.stores == ([run["store"]] if code == 0 else [])
    [run] = listed(capsys, "news")
    assert run["state"] == "done" if code == 0 else "exit code 1: its orchestrator was lost 4 times" in run["state"]


def test_a_stop_between_a_loss_and_the_next_try_leaves_the_run_to_the_next_tick(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cluster.schedules.render", Losing("lease"))
    monkeypatch.setattr("cluster.schedules.time.sleep", lambda _: signal.raise_signal(signal.SIGTERM))
    assert add() == 0
    assert main(["schedule", "run-now", "news"]) == 75
    assert [run["state"] for run in listed(capsys, "news")] == ["claimed"]
    assert main(["schedule", "tick"]) == 0


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_that_another_process_renders_is_stopped_before_it_is_replaced(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], finished: bool
) -> None:
    now_s = datetime(2026, 11, 26, 12, tzinfo=UTC).timestamp()
    monkeypatch.setattr("cluster.schedules.time.time", lambda: now_s)
    assert add("--cron", "30 2,14 * * *", "--overlap", "replace") == 0
    now_s, renderer.codes = datetime(2026, 11, 27, 2, tzinfo=UTC).timestamp(), [75]
    assert main(["schedule", "tick"]) == 75
    [first] = listed(capsys, "news")
    store = LocalStore(Path(first["store"]))
    spec = parse_spec(json.dumps({"shots": [{"duration": "2s", "prompt": "a red circle"}]}))
    Recipe(spec, Facts(checkpoint=CheckpointFacts("/somewhere", "0" * 64))).put(store)
    other = Orchestrator(store, answers=True)
    if finished:
        film_id = make_plan(load_recipe(store), other.ledger.load().overrides).film_task_id
        other.ledger.journal([AttemptStarted(film_id, 1, 1, "w1", "here")])
        other.ledger.commit(CommitRecord(film_id, 1, 1, (), {}))
    now_s += 12 * 3600
    other.start()
    try:
        assert main(["schedule", "tick"]) == 0, "to be replaced is no failure"
    finally:
        other.over.set()
        other.join()
    assert [request.kind for request in other.heard] == ["cancel"]
    one, two = listed(capsys, "news")
    stores = [one["store"], two["store"]]
    assert renderer.stores[1:] == stores[not finished :], "a film that is there is put in its place"
    assert one["state"] == ("done" if finished else "exit code 130: replaced before it ended")
    assert two["state"] == "done"
    name = renderer.films[-1].get("output", {}).get("path")
    assert name == ("2026-11-27-2.mp4" if finished else None), "the name that the film's title gives it is taken"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["remove", "news"], ["news", "not on the schedule"]),
        (["run-now", "news"], ["news", "not on the schedule"]),
        (["tick", "news"], ["news", "not on the schedule"]),
        (["list", "../../evil"], ["../../evil"]),
        (["add", "../../evil", "film.yaml", "--cron", "0 0 * * *", "--time-zone", "UTC"], ["../../evil"]),
        (["add", "n", "film.yaml", "--cron", "0 0 * *", "--time-zone", "UTC"], ["--cron", "0 0 * *"]),
        (["add", "n", "film.yaml", "--cron", "0 0 * * *", "--time-zone", "Berlin"], ["--time-zone", "Berlin"]),
        (["add", "n", "film.yaml", "--cron", "0 0 * * *", "--time-zone", "UTC"], ["${colour}", "counter"]),
        (["add", "n", "none.yaml", "--cron", "0 0 * * *", "--time-zone", "UTC"], ["none.yaml"]),
        (["add", "n", "date.yaml", "--cron", "0 0 * * *", "--time-zone", "UTC"], ["date.yaml", "quotes"]),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    renderer: Renderer, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    Path("date.yaml").write_text("title: 2026-11-26\nshots:\n  - {duration: 2s, prompt: a}\n")
    assert main(["schedule", *arguments]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not Path("schedules").exists() and renderer.films == []


def test_files_are_those_of_the_folder_in_which_it_was_added(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = Path.cwd()
    shot = {"duration": "2s", "prompt": "a ${colour} circle", "image": "${colour}.png"}
    film = {"checkpoint": "weights", "shots": [shot], "output": {"path": "out.mp4", "soundtrack": "~/wind.wav"}}
    monkeypatch.setenv("HOME", str(here))
    Path("film.yaml").write_text(yaml.safe_dump(film))
    Path("weights").mkdir()
    places = ["--schedules", str(here / "schedules"), "--renders", str(here / "renders")]
    Path("red.png").touch()
    for missing in ("blue.png", "wind.wav"):
        assert add(*places) == 2, "every file of every run is looked for"
        assert str(here / missing) in capsys.readouterr().err
        Path(missing).touch()
    assert add(*places) == 0
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert main(["schedule", "run-now", "news", *places[:2]]) == 0
    [made] = renderer.films
    assert (made["shots"][0]["image"], made["checkpoint"]) == (str(here / "red.png"), str(here / "weights"))
    assert made["output"] == {**made["output"], "path": "out.mp4", "soundtrack": str(here / "wind.wav")}


def test_a_damaged_schedule_is_shown_and_holds_up_no_other(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cluster.schedules.time.time", lambda: 1_795_700_000.0)
    assert add() == 0
    for name, text in (("a", "torn"), ("lease", seal({"epoch": 1}).decode())):
        Path("schedules", name).mkdir()
        Path("schedules", name, "00000001.json").write_text(text)
    rows = {row["schedule"]: row["state"] for row in listed(capsys)}
    assert rows["news"] == "waiting"
    assert all("no entry of a schedule" in rows[name] and "--schedules" in rows[name] for name in ("a", "lease"))
    assert main(["schedule", "list", "lease"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setattr("cluster.schedules.time.time", lambda: 1_795_800_000.0)
    assert main(["schedule", "tick"]) == 1
    assert len(renderer.films) == 1


@pytest.mark.parametrize(
    ("flag", "place", "words"),
    [
        ("--schedules", "", "is empty"),
        ("--renders", "", "is empty"),
        ("--schedules", "ftp://x", "unknown kind"),
        ("--schedules", "film.yaml", "Not a directory"),
    ],
)
def test_a_place_that_cannot_be_is_told_with_its_flag(
    renderer: Renderer, capsys: pytest.CaptureFixture[str], flag: str, place: str, words: str
) -> None:
    assert add(flag, place) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"longtake: {flag}: ") and words in error and place in error


def test_adding_twice_is_refused(renderer: Renderer, capsys: pytest.CaptureFixture[str]) -> None:
    assert (add(), add()) == (0, 2)
    assert "remove news" in capsys.readouterr().err


@pytest.mark.parametrize("begins", ["before", "meanwhile", "takes over"])
@pytest.mark.parametrize("command", [["tick"], ["run-now", "news"]])
def test_a_run_that_another_process_renders_is_left_to_it(
    renderer: Renderer, capsys: pytest.CaptureFixture[str], command: list[str], begins: str
) -> None:
    assert add() == 0
    assert main(["schedule", "run-now", "news", "--farm"]) == 0, "claimed, and not begun"
    run = capsys.readouterr().out.split("\n")[1].partition(":")[0]
    other = Ledger(LocalStore(Path.cwd() / "renders" / run))

    def refused(request: RenderRequest) -> int:
        if begins != "before":
            other.take_lease()
        return 2 if begins == "meanwhile" else 1

    if begins == "before":
        other.take_lease()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluster.schedules.render", refused)
        assert main(["schedule", *command]) == 0
    assert f"{run} is being rendered by process" in capsys.readouterr().out
    assert [row.get("exit_code") for row in listed(capsys, "news")] == [None], "it has not ended"
    other.release_lease()
    assert main(["schedule", *command]) == 0
    assert len(renderer.films) == 1 and renderer.stores == [other.store.url]
