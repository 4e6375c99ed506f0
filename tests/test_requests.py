"""What people ask of a render: requests in the store, and the commands that leave them, without a cluster."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.ask import ask, new_request, running
from cluster.cli import main
from cluster.recipe import Recipe, make_plan
from pipeline.errors import TransientError
from pipeline.facts import CheckpointFacts, Facts
from pipeline.journal import AttemptFailed, AttemptStarted, RedoRequested, RequestTaken, ShotLocked, TaskReset
from pipeline.lease import Owner
from pipeline.ledger import Ledger, LedgerState
from pipeline.plan import Plan
from pipeline.records import seal
from pipeline.requests import Request, entries_for, is_marked_taken, mark_taken, new_requests, put_request
from pipeline.spec import parse_spec
from pipeline.store import LocalStore

REDO = RedoRequested("one/segment/0", 1, "on request", asked=True)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """The store of a render that nobody has begun yet."""
    opened = LocalStore(tmp_path / "render")
    shots = [{"id": "one", "duration": "12s", "prompt": "a red circle"}]
    spec = parse_spec(json.dumps({"title": "Asked", "shots": shots}))
    Recipe(spec, Facts(checkpoint=CheckpointFacts("/somewhere", "0" * 64))).put(opened)
    return opened


def plan_of(store: LocalStore) -> Plan:
    from cluster.recipe import load_recipe

    return make_plan(load_recipe(store), Ledger(store).load().overrides)


def fail(store: LocalStore, label: str, times: int) -> str:
    """A run in which a task failed so often, and which ended; the task's id."""
    task = next(task for task in plan_of(store).tasks.values() if task.label == label)
    ledger = Ledger(store)
    ledger.take_lease()
    for attempt in range(1, times + 1):
        ledger.journal([AttemptStarted(task.id, attempt, ledger.epoch, "w1", "n1", "gpu7")])
        ledger.journal([AttemptFailed(task.id, attempt, ledger.epoch, "transient", "hiccup", "n1", "last lines")])
    ledger.release_lease()
    return task.id


# Requests in the store


def test_a_request_is_found_once_by_the_epoch_it_is_addressed_to(store: LocalStore) -> None:
    request = Request("0001", "redo", (REDO,))
    put_request(store, 3, request)
    assert new_requests(store, 3, set()) == [request]
    assert new_requests(store, 3, {"0001"}) == []
    assert new_requests(store, 4, set()) == [], "a later run is not asked"
    assert not is_marked_taken(store, 3, "0001")
    mark_taken(store, 3, "0001")
    assert is_marked_taken(store, 3, "0001")
    assert new_requests(store, 3, set()) == [request], "the mark is no request"


def test_a_request_that_cannot_be_read_is_left_out(store: LocalStore) -> None:
    put_request(store, 1, Request("0001", "pause"))
    file = store.root / "requests/00000001/0001.json"
    file.write_bytes(file.read_bytes()[:-3])
    assert new_requests(store, 1, set()) == []


@pytest.mark.parametrize("entry", [{"entry": "of-another-version"}, {"entry": "reset", "unknown": 1}, {}])
def test_a_request_of_another_version_is_left_out_and_ends_no_render(
    store: LocalStore, entry: dict[str, object]
) -> None:
    store.create_if_absent("requests/00000001/0001.json", seal({"kind": "retry", "entries": [entry]}))
    put_request(store, 1, Request("0002", "pause"))
    assert new_requests(store, 1, set()) == [Request("0002", "pause")]


def test_a_request_that_was_collected_while_the_folder_was_read_is_no_error(store: LocalStore) -> None:
    put_request(store, 1, Request("0001", "pause"))

    class Collected(LocalStore):
        def read(self, path: str) -> bytes:
            self.delete(path)
            return super().read(path)

    assert new_requests(Collected(store.root), 1, set()) == []


def test_what_a_request_writes_is_empty_the_second_time() -> None:
    state = LedgerState()
    entries = entries_for(Request("0001", "redo", (REDO,)), state, (), 2)
    assert entries == (RequestTaken("0001", "redo", 2), REDO)
    for entry in entries:
        state.apply(entry)
    assert entries_for(Request("0001", "redo", (REDO,)), state, (), 3) == ()


# Asking


def test_where_nobody_renders_the_request_is_journalled_at_once(store: LocalStore) -> None:
    taken = ask(store, Request("0001", "redo", (REDO,)), plan_of(store))
    assert (taken.by, taken.entries[1:]) == ("here", (REDO,))
    assert Ledger(store).load().redo == {"one/segment/0": 1}
    assert running(store) is None, "the lease was given back"


class Orchestrator(threading.Thread):
    """Holds the lease as this process does, and takes requests in after a while; or never."""

    def __init__(self, store: LocalStore, *, answers: bool) -> None:
        super().__init__()
        self.ledger = Ledger(store)
        self.ledger.take_lease()
        self.answers, self.over = answers, threading.Event()
        self.heard: list[Request] = []

    def run(self) -> None:
        while not self.over.is_set():
            for request in new_requests(self.ledger.store, self.ledger.epoch, {one.id for one in self.heard}):
                self.heard.append(request)
                if self.answers:
                    self.ledger.journal(entries_for(request, self.ledger.load(), (), self.ledger.epoch))
                    mark_taken(self.ledger.store, self.ledger.epoch, request.id)
                    if request.kind in ("pause", "cancel"):
                        self.ledger.release_lease()
            time.sleep(0.05)


def test_a_running_render_is_asked_through_its_store(store: LocalStore) -> None:
    orchestrator = Orchestrator(store, answers=True)
    orchestrator.start()
    try:
        taken = ask(store, Request("0001", "redo", (REDO,)), plan_of(store))
        assert (taken.by, taken.epoch) == ("orchestrator", 1)
        assert Ledger(store).load().redo == {"one/segment/0": 1}
    finally:
        orchestrator.over.set()
        orchestrator.join()


def test_a_running_render_that_does_not_answer_is_reported_and_not_overruled(store: LocalStore) -> None:
    orchestrator = Orchestrator(store, answers=False)
    orchestrator.start()
    try:
        with pytest.raises(TransientError, match="nobody has answered"):
            ask(store, new_request("pause"), plan_of(store), answer_s=1.0)
    finally:
        orchestrator.over.set()
        orchestrator.join()
    assert Ledger(store).load().requests == {}


def test_a_request_to_a_render_that_died_is_journalled_by_the_one_who_asks(store: LocalStore) -> None:
    dead = Ledger(store, owner=Owner("", 1, "long gone"))
    dead.take_lease()
    put_request(store, 1, Request("0001", "redo", (REDO,)))
    dead.journal([RequestTaken("0001", "redo", 1), REDO])
    dead.release_lease()
    taken = ask(store, Request("0001", "redo", (REDO,)), plan_of(store))
    assert (taken.by, taken.entries) == ("here", ()) or taken.by == "orchestrator"
    assert Ledger(store).load().redo == {"one/segment/0": 1}, "not a second time"


# The commands


def test_pausing_what_does_not_run_says_so(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pause", store.url]) == 0
    assert "is not running" in capsys.readouterr().out


def test_a_running_render_is_paused_and_its_status_says_so(
    store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    orchestrator = Orchestrator(store, answers=True)
    orchestrator.start()
    try:
        assert main(["pause", store.url, "--json"]) == 0
    finally:
        orchestrator.over.set()
        orchestrator.join()
    assert json.loads(capsys.readouterr().out)["state"] == "paused"
    assert main(["status", store.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"].startswith("paused")
    Ledger(store).take_lease()
    assert main(["status", store.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "running", "a later run is not paused"


def test_cancelling_what_does_not_run_is_remembered(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cancel", store.url]) == 0
    assert "is cancelled" in capsys.readouterr().out
    assert main(["status", store.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"].startswith("cancelled")


def test_retry_gives_new_budgets_and_names_the_tasks(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    task_id = fail(store, "one/segment/0", 4)
    assert main(["retry", store.url]) == 0
    said = capsys.readouterr().out
    assert "one/segment/0" in said
    assert "`longtake render` goes on" in said
    log = Ledger(store).load().logs[task_id]
    assert (log.transient, log.last_failure, log.attempts) == (0, None, 4)
    assert main(["retry", store.url]) == 0
    assert "no failed tasks" in capsys.readouterr().out


def test_retry_forgives_bytes_that_went_bad_and_refusals_of_the_gate(store: LocalStore) -> None:
    state = LedgerState()
    task = next(task for task in plan_of(store).tasks.values() if task.kind == "segment")
    state.apply(AttemptStarted(task.id, 1, 1, "w", "n"))
    state.apply(AttemptFailed(task.id, 1, 1, "quality", "grey", "n"))
    state.apply(RedoRequested(task.label, 1, "grey"))
    for entry in entries_for(Request("0001", "retry"), state, [task], 1):
        state.apply(entry)
    assert state.refusals == {}
    assert not state.logs[task.id].charged
    assert TaskReset(task.id, task.label) not in entries_for(Request("0002", "retry"), state, [task], 1)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The folder cannot be written: by its mode, or for root, whom modes do not stop, by a mount."""
    root = os.geteuid() == 0
    if root and subprocess.run(["mount", "--bind", "-o", "ro", folder, folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    if not root:
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode & 0o555)
    try:
        yield
    finally:
        if root:
            subprocess.run(["umount", folder], check=True)
        else:
            for path in (folder, *folder.rglob("*")):
                path.chmod(path.stat().st_mode | 0o200)


@pytest.mark.parametrize("running", [False, True])
def test_a_request_to_a_store_that_cannot_be_written_was_not_asked(
    store: LocalStore, capsys: pytest.CaptureFixture[str], running: bool
) -> None:
    fail(store, "one/segment/0", 4)
    ask(store, new_request("lock", [ShotLocked("one", {}, {})]), plan_of(store))
    if running:
        Ledger(store).take_lease()
    with read_only(store.root):
        for command in (["cancel", store.url], ["retry", store.url], ["unlock", store.url, "one"]):
            assert main(command) == 2
            said = capsys.readouterr()
            assert said.out == ""
            for word in ("--store: nothing was asked", store.url, "must be a writable folder"):
                assert word in said.err
        assert main(["pause", store.url]) == (2 if running else 0)
        assert ("nothing was asked" in capsys.readouterr().err) is running
        assert main(["gc", store.url]) == 2
        assert "nothing was deleted" in capsys.readouterr().err


# Logs


def test_logs_tell_every_attempt_and_show_what_its_worker_wrote(
    store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    task_id = fail(store, "one/segment/0", 2)
    store.put_replace(f"logs/{task_id}/0002-1.log", b"12:00:00 INFO step 3\nTraceback: out of memory\n")
    assert main(["logs", store.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["one/segment/0", "#1", "#2"]
    assert "on gpu7 (w1): transient" in lines[1]
    assert "hiccup" in lines[1]
    assert main(["logs", store.url, "one/segment/0"]) == 0
    text = capsys.readouterr().out
    assert "Traceback: out of memory" in text
    assert "last lines" in text, "the journal's tail where no log was kept"
    assert main(["logs", store.url, task_id, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["tasks"][0]["attempts"]
    assert told[1]["text"].endswith("out of memory")


def test_logs_of_an_unknown_task_are_a_wrong_argument(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", store.url, "two/segment/9"]) == 2
    assert "two/segment/9" in capsys.readouterr().err
