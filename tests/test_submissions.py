"""What a farm remembers and what its commands decide without a cluster."""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.cli import main
from cluster.cli_farm import is_farmed
from cluster.download import download_film
from cluster.farm import UNUSED_S, Farm, FarmSettings
from cluster.farm_books import FarmBooks
from cluster.farm_commands import Cluster, Wishes, _not_taken, parse_hook, price_of, submission_of
from cluster.farm_events import KEPT_RENDERS, Events, forget_ended
from cluster.farm_hooks import call_hooks
from cluster.farm_metrics import FarmMetrics
from cluster.farm_pool import Hand
from cluster.metrics import METRICS
from cluster.orchestrator import Member
from cluster.render import Prepared
from pipeline.errors import CorruptArtifact, LeaseLost, SettingError
from pipeline.events import PhaseProgress, ProgressSummary
from pipeline.farm import Borrower, Lender, Load, Needs
from pipeline.ledger import LedgerState
from pipeline.store import LocalStore
from pipeline.submissions import (
    Adjusted,
    Changed,
    Hook,
    Submission,
    SubmissionBook,
    SubmissionState,
    Submitted,
    Usage,
    UsageBook,
    render_id_of,
    same_order,
)
from pipeline.tasks import CommitRecord
from tests.rendered import recipe_of, render_into


def submission(render_id: str = "a", **more: Any) -> Submission:
    fields = {"store_url": "/renders/a", "recipe": {"spec": {"title": "A"}, "written_at": "now"}}
    return Submission(render_id, **{**fields, **more})  # type: ignore[arg-type]


def loaded(folder: Path) -> SubmissionBook:
    book = SubmissionBook(LocalStore(folder))
    book.load()
    return book


# The book


def test_a_farm_that_starts_again_knows_its_queue(tmp_path: Path) -> None:
    book, hook = loaded(tmp_path), Hook(("done",), command=("true",))
    book.add("a", Submitted(1.0, submission(hooks=(hook,), most_cost=3.0)))
    book.add("a", Changed(2.0, "running"))
    book.add("a", Adjusted(3.0, priority=90))
    book.add("b", Submitted(4.0, submission("b")))
    book.add("b", Changed(5.0, "failed", "no", 1))
    again = loaded(tmp_path)
    assert again.states == book.states
    a, b = again.states["a"], again.states["b"]
    assert (a.phase, a.submission.priority, a.submission.most_cost, a.submission.hooks) == ("running", 90, 3.0, (hook,))
    assert (b.phase, b.message, b.exit_code, b.is_open) == ("failed", "no", 1, False)
    again.add("b", Submitted(6.0, submission("b")))
    assert loaded(tmp_path).states["b"].phase == "queued"


def test_the_states_can_be_walked_through_while_an_entry_is_written(tmp_path: Path) -> None:
    book = loaded(tmp_path)
    book.add("a", Submitted(1.0, submission()))
    walking = iter(book.states.items())
    book.add("b", Submitted(2.0, submission("b")))
    assert [render_id for render_id, _ in walking] == ["a"] and list(book.states) == ["a", "b"]


def test_events_are_kept_of_open_renders_and_of_the_last_others() -> None:
    events = {str(number): Events() for number in range(KEPT_RENDERS + 5)}
    forget_ended(events, {"0", "3"})
    assert list(events) == ["0", "3", *map(str, range(5, KEPT_RENDERS + 5))]


def test_an_entry_of_another_farm_is_never_overwritten(tmp_path: Path) -> None:
    one, other = loaded(tmp_path), loaded(tmp_path)
    one.add("a", Submitted(1.0, submission()))
    with pytest.raises(LeaseLost, match="another farm"):
        other.add("a", Submitted(2.0, submission()))
    assert loaded(tmp_path).states["a"].submitted_at_s == 1.0
    assert "a" not in other.states


def test_an_entry_that_is_not_whole_is_not_believed(tmp_path: Path) -> None:
    loaded(tmp_path).add("a", Submitted(1.0, submission()))
    path = tmp_path / "submissions" / "a" / "000001.json"
    path.write_bytes(path.read_bytes().replace(b'"priority":50', b'"priority":99'))
    with pytest.raises(CorruptArtifact):
        loaded(tmp_path)


def test_a_clock_that_is_set_back_keeps_no_worker_from_a_render(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = SimpleNamespace(unix_s=1e9, own_s=50.0)
    clock = SimpleNamespace(time=lambda: now.unix_s, monotonic=lambda: now.own_s)
    monkeypatch.setattr("cluster.farm.time", clock)
    lender, lent = Lender("w", "n", load=Load("c", "refine")), list[str]()
    farm, hand = Farm.__new__(Farm), Hand(lender, Member("w", SimpleNamespace(serves=None)))  # type: ignore[arg-type]
    farm._settings = FarmSettings("books")
    needs = Needs({"window": 1}, path_s=1.0, work_s=1.0)
    borrower = Borrower("a", loads={"refine": Load("c", "refine")}, needs=needs)
    render = SimpleNamespace(lend=lambda grant, *more: lent.append(grant.worker_id))
    farm._open = {"a": SimpleNamespace(borrower=borrower, serves=None, render=render)}  # type: ignore[dict-item]
    farm._pool = SimpleNamespace(hands={"w": hand}, lenders=lambda: [lender], end_if_leaving=lambda hand: None)  # type: ignore[assignment]
    farm._books = FarmBooks(LocalStore(tmp_path), lambda: None)
    farm._wake, farm._load_s = asyncio.Event(), {Load("c", "refine"): 1.0}
    farm.returned("w", "a", used=False)
    farm._lend()
    assert not lent, "not at once"
    now.unix_s, now.own_s = now.unix_s - 3600.0, now.own_s + UNUSED_S
    farm._lend()
    assert lent == ["w"]


@pytest.mark.parametrize("render_id", ["../../evil", "", "A", "a/b", "-a", "a" * 64])
def test_ids_are_file_names_and_nothing_else(render_id: str) -> None:
    with pytest.raises(SettingError, match="id"):
        submission(render_id)


@pytest.mark.parametrize("priority", [-1, 101])
def test_priorities_are_from_0_to_100(priority: int) -> None:
    with pytest.raises(SettingError, match="priority"):
        submission(priority=priority)


def test_one_store_is_one_render_however_it_is_called() -> None:
    assert render_id_of("Two Shots!", "/a") == render_id_of("Two Shots!", "/a")
    assert render_id_of("Two Shots!", "/a") != render_id_of("Two Shots!", "/b")
    assert render_id_of("Two Shots!", "/a").startswith("two-shots-")
    assert submission(render_id_of("é" * 99, "/a")).render_id.startswith("film-")


def test_the_same_order_is_the_same_whenever_and_however_urgently_it_is_given() -> None:
    later = {"spec": {"title": "A"}, "written_at": "later"}
    assert same_order(submission(), submission(recipe=later, priority=90))
    assert not same_order(submission(), submission(recipe={"spec": {"title": "B"}}))


def test_usage_survives_and_adds_up_by_owner(tmp_path: Path) -> None:
    book, store = UsageBook(), LocalStore(tmp_path)
    book.of("a", "ann").busy_s += 10.0
    book.of("b", "ann").lost_s += 5.0
    book.of("c", "bob").loading_s += 1.0
    book.of("").idle_s += 7.0
    book.put(store)
    owners = UsageBook.load(store).by_owner()
    assert owners["ann"] == Usage("ann", busy_s=10.0, lost_s=5.0)
    assert (owners["bob"].loading_s, owners[""].idle_s) == (1.0, 7.0)
    (tmp_path / "usage.json").write_bytes(b"{}")
    with pytest.raises(CorruptArtifact):
        UsageBook.load(store)


# Commands


def test_a_submission_carries_what_the_farm_needs_to_plan_it_again(tmp_path: Path) -> None:
    recipe, store = recipe_of({"id": "one", "duration": "6s"}), LocalStore(tmp_path)
    plan = render_into(store, recipe)
    made = submission_of(Prepared(recipe, store, plan, LedgerState()), Wishes(owner="ann", priority=70))
    assert (made.owner, made.priority, made.store_url) == ("ann", 70, str(tmp_path))
    assert type(recipe).from_json(json.loads(json.dumps(made.recipe))) == recipe


def test_hooks_are_commands_or_addresses_for_some_occasions_or_all() -> None:
    assert parse_hook("failed,paused=notify --loud") == Hook(("failed", "paused"), command=("notify", "--loud"))
    assert parse_hook("https://example.org/?a=b") == Hook(
        ("done", "failed", "paused", "approval"), url="https://example.org/?a=b"
    )
    assert parse_hook("env A=b notify").command == ("env", "A=b", "notify")
    with pytest.raises(SettingError):
        parse_hook("done=")


@pytest.mark.parametrize("text", ["finished=true", "done,lost=true", "done=cat >> told", "true && true"])
def test_a_hook_for_no_occasion_or_for_a_shell_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="--on-event"):
        parse_hook(text)


def test_a_farm_that_runs_says_which_wishes_it_was_not_started_with(tmp_path: Path) -> None:
    settings = FarmSettings(str(tmp_path / "books"), most_workers=2, price_hour=1.0)
    assert _not_taken(settings, store=str(tmp_path / "books"), most_workers=2, price_hour=None) == []
    assert _not_taken(settings) == []
    other = _not_taken(settings, store=str(tmp_path / "x"), device="cuda", most_workers=1, price_hour=3.5, idle_s=5.0)
    assert other == ["--workers", "--idle", "--price", "--device", "--farm-store"]
    assert price_of(settings) == "a worker costs 1 an hour (--price, kept in its books)"
    assert price_of(replace(settings, price_hour=0.0)) == "no price is known: --max-cost is not taken"


def test_a_farms_render_is_meant_where_a_cluster_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def farmed(place: str, address: str | None = None) -> bool:
        return is_farmed(argparse.Namespace(place=place, address=address))

    assert farmed("short-1a2b", "127.0.0.1:6379") and not farmed("short-1a2b")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert farmed("short-1a2b")
    assert not farmed("folder") and not farmed("renders/short") and not farmed("s3://b/short")


def test_a_farm_command_without_a_cluster_says_what_is_missing_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    Path("film.yaml").write_text("shots: [{duration: 2s, prompt: a red circle}]\n")
    assert main(["submit", "film.yaml"]) == 2
    assert "RAY_ADDRESS" in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["film.yaml"]
    with pytest.raises(SettingError, match="RAY_ADDRESS"):
        _ = Cluster().found
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert Cluster().found == "10.0.0.1:6379"
    assert Cluster("h:1").found == "h:1"


def test_an_open_cluster_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster.cli", "list", "--address", "10.255.255.1:6379"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "token" in done.stderr


# Download


@pytest.fixture
def finished(tmp_path: Path) -> tuple[LocalStore, bytes]:
    store = LocalStore(tmp_path / "render")
    plan = render_into(store, recipe_of({"id": "one", "duration": "6s"}))
    return store, plan.tasks[plan.film_task_id].label.encode()


def test_a_film_is_fetched_once_and_whole(finished: tuple[LocalStore, bytes], tmp_path: Path) -> None:
    store, film = finished
    target = download_film(store, tmp_path / "film.mp4")
    assert target.read_bytes() == film
    before = target.stat().st_mtime_ns
    assert download_film(store, target).stat().st_mtime_ns == before, "it is there already"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["film.mp4"]


def test_a_download_goes_on_where_it_stopped(
    finished: tuple[LocalStore, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, film = finished
    monkeypatch.setattr("cluster.download.PIECE_BYTES", 2)
    read, starts = LocalStore.read_range, list[int]()

    def breaks(self: LocalStore, path: str, start: int, length: int) -> bytes:
        starts.append(start)
        if start == 2 and len(starts) == 2:
            raise KeyboardInterrupt
        return read(self, path, start, length)

    monkeypatch.setattr(LocalStore, "read_range", breaks)
    with pytest.raises(KeyboardInterrupt):
        download_film(store, tmp_path / "film.mp4")
    assert not (tmp_path / "film.mp4").exists()
    download_film(store, tmp_path / "film.mp4")
    assert starts[:3] == [0, 2, 2]
    assert (tmp_path / "film.mp4").read_bytes() == film


def test_a_download_of_a_film_that_is_shorter_than_its_record_ends(
    finished: tuple[LocalStore, bytes], tmp_path: Path
) -> None:
    store, film = finished
    (path,) = (file.path for file in store.list("attempts") if file.path.startswith("attempts/film"))
    store.put_replace(path, film[:-1])
    with pytest.raises(SettingError, match="shorter than its record"):
        download_film(store, tmp_path / "film.mp4")


def test_a_film_that_is_not_there_is_not_downloaded(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "render")
    render_into(store, recipe_of({"id": "one", "duration": "6s"}), only=lambda task: task.kind == "text")
    with pytest.raises(SettingError, match="no film yet"):
        download_film(store, tmp_path / "film.mp4")


def test_approval_orders_the_rest_of_the_film() -> None:
    coarse = submission(recipe={"spec": {"title": "A"}, "until": "stage-one"}, priority=70)
    whole = submission(recipe={"spec": {"title": "A"}, "until": "film"}, priority=70)
    assert coarse.ends_for_approval
    assert not whole.ends_for_approval
    assert coarse.approved() == whole
    assert whole.approved() == whole


# Hooks and metrics


def test_hooks_are_told_and_a_broken_one_harms_nobody(tmp_path: Path) -> None:
    told = list[dict[str, Any]]()

    class Web(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    save = f"import sys; open({str(tmp_path / 'said')!r}, 'w').write(sys.stdin.read())"
    hooks = (
        Hook(("failed",), command=("/no/such/command",)),
        Hook(("failed",), command=("false", "--token", "secret")),
        Hook(("failed",), url="http://user:secret@example.org:nonsense/secret"),
        Hook(("failed",), command=(sys.executable, "-c", save)),
        Hook(("failed",), url=f"http://127.0.0.1:{server.server_port}/"),
        Hook(("done",), command=(sys.executable, "-c", f"open({str(tmp_path / 'never')!r}, 'w')")),
    )
    state = SubmissionState(submission(hooks=hooks, owner="ann"), 1.0, "failed", 2.0, "no", 1)
    why = call_hooks(state)
    assert not (tmp_path / "never").exists()
    server.shutdown()
    assert why.split("; ")[:2] == [
        "/no/such/command: [Errno 2] No such file or directory: '/no/such/command'",
        "false: exit status 1",
    ]
    assert why.split("; ")[2].startswith("example.org:nonsense: nonnumeric port")
    assert "secret" not in why and len(why.split("; ")) == 3
    assert (told[0]["event"], told[0]["render"], told[0]["exit_code"]) == ("failed", "a", 1)
    assert json.loads((tmp_path / "said").read_text()) == told[0]
    assert call_hooks(replace(state, phase="done")) == "" and len(told) == 1


def test_metrics_count_without_naming_renders() -> None:
    calls = list[tuple[str, str, float, dict[str, str]]]()

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getattr__(self, kind: str) -> Any:
            return lambda value, tags: calls.append((self.name, kind, value, tags))

    metrics = FarmMetrics(Recorder)
    record = CommitRecord("segment-1", 1, 1, (), {}, {"frames": 93})
    metrics.count_task("segment", 61.0, record)
    metrics.count_task("window", 5.0, None)
    state = SubmissionState(submission("secret-film"), 1.0)
    workers = [Lender("w1", "n", render_id="a"), Lender("w2", "n")]
    progress = [ProgressSummary(1.0, {"window": PhaseProgress(total=9, done=2, running=1)})] * 2
    metrics.show([state, replace(state, phase="running")], workers, progress)
    metrics.show([], workers, [])
    metrics.count_lost()
    assert ("longtake_frames_total", "inc", 93, {"stage": "segment"}) in calls
    assert ("longtake_retries_total", "inc", 1, {"stage": "window"}) in calls
    assert ("longtake_gpu_busy_fraction", "set", 0.5, {}) in calls
    assert ("longtake_renders", "set", 1, {"phase": "queued"}) in calls
    of_windows = ("longtake_tasks_waiting", {"stage": "window"})
    waiting = [value for name, _, value, tags in calls if (name, tags) == of_windows]
    assert waiting == [12, 0], "those of renders that have ended are taken back"
    assert ("longtake_tasks_running", "set", 2, {"stage": "window"}) in calls
    metrics.count_cost(2.0)
    assert {name for name, *_ in calls} == METRICS.keys() - {"longtake_worker_seconds_total"}
    for name, _, _, tags in calls:
        assert tuple(tags) == METRICS[name].labels
        assert "secret-film" not in tags.values()
