"""The story of a task, and the log that a worker keeps of an attempt."""

from __future__ import annotations

import fcntl
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import worker_log
from cluster.worker_log import LINE_CHARS, BoundedText, WorkerLog
from pipeline.errors import StoreError
from pipeline.journal import (
    AttemptFailed,
    AttemptStarted,
    Invalidated,
    JournalEntry,
    PartialSaved,
    StartedOver,
)
from pipeline.store import LocalStore
from pipeline.story import log_path, task_stories
from pipeline.tasks import ArtifactFile, CommitRecord


def history(*entries: JournalEntry) -> list[tuple[float, JournalEntry]]:
    return [(100.0 + 10 * index, entry) for index, entry in enumerate(entries)]


def begin(attempt: int, epoch: int = 1) -> AttemptStarted:
    return AttemptStarted("segment-1", attempt, epoch, f"w{attempt}", "n1", "gpu7")


def test_every_attempt_is_told_with_its_host_times_and_end() -> None:
    partial = ArtifactFile("p", "partials/segment-1/p", 1, "0" * 64)
    told = history(
        begin(1),
        PartialSaved("segment-1", 1, 1, 8, partial),
        AttemptFailed("segment-1", 1, 1, "transient", "hiccup", "n1", "tail"),
        begin(2),
        begin(3, epoch=2),
        begin(4, epoch=3),
    )
    record = CommitRecord("segment-1", 3, 2, (), {}, seconds=61.0, host="gpu7", committed_at_s=400.0)
    attempts = task_stories(told, {"segment-1": record}, live_epoch=3)["segment-1"].attempts
    assert [one.ending for one in attempts] == ["transient", "unknown", "committed", "running"]
    first, _, third, _ = attempts
    assert (first.host, first.started_at_s, first.ended_at_s, first.saved_steps) == ("gpu7", 100.0, 120.0, 8)
    assert (first.message, first.log) == ("hiccup", log_path("segment-1", 1, 1))
    assert (third.ended_at_s, third.seconds) == (400.0, 61.0)


def test_a_commit_found_bad_later_is_told_as_such() -> None:
    told = history(begin(1), Invalidated("segment-1", 1, 1, "a bit flipped"), begin(2, epoch=2))
    endings = [(one.ending, one.message) for one in task_stories(told, {}, 2)["segment-1"].attempts]
    assert endings == [("invalidated", "a bit flipped"), ("running", "")]


def test_what_was_before_starting_over_is_not_told() -> None:
    assert task_stories(history(begin(1), StartedOver(2)), {}, None) == {}


# The worker's log


@pytest.fixture
def log() -> Iterator[WorkerLog]:
    logging.captureWarnings(False)  # taken by a log of another test, they would not come to this one
    made = WorkerLog()
    yield made
    logging.getLogger().removeHandler(made)
    logging.captureWarnings(False)


def test_the_log_of_an_attempt_holds_its_lines_warnings_and_traceback_and_no_others(
    log: WorkerLog, tmp_path: Path
) -> None:
    store, speaker = LocalStore(tmp_path), logging.getLogger("longtake.worker")
    speaker.info("before")
    with log.attempt(store, "logs/segment-1/0001-1.log"):
        speaker.info("step 3")
        warnings.warn("numbers get large", stacklevel=1)
        try:
            raise ZeroDivisionError("the moon")
        except ZeroDivisionError:
            speaker.exception("failed")
    speaker.info("after")
    log.settle()
    text = store.read("logs/segment-1/0001-1.log").decode()
    assert "step 3" in text
    assert "numbers get large" in text
    assert "ZeroDivisionError: the moon" in text
    assert "before" not in text
    assert "after" not in text
    assert "after" in log.tail()


def test_macos_says_where_an_open_file_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    def tell(handle: int, command: int, room: bytes) -> bytes:
        assert (handle, command) == (2, 50)
        return "/private/tmp/lt-1/Bühne.err".encode().ljust(len(room), b"\0")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_GETPATH", 50, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", tell)
    assert worker_log._path_of(2) == Path("/private/tmp/lt-1/Bühne.err")


def test_what_children_write_to_stderr_is_kept_where_stderr_is_a_file(log: WorkerLog, tmp_path: Path) -> None:
    store, kept = LocalStore(tmp_path / "store"), os.dup(2)
    with (tmp_path / "stderr").open("wb") as file:
        file.write(b"long ago\n")
        file.flush()
        os.dup2(file.fileno(), 2)
        try:
            with log.attempt(store, "logs/a/0001-1.log"):
                os.system("echo from a child >&2")
        finally:
            os.dup2(kept, 2)
            os.close(kept)
    log.settle()
    text = store.read("logs/a/0001-1.log").decode()
    assert "from a child" in text
    assert "long ago" not in text


def test_the_log_is_there_before_the_attempt_ends(
    log: WorkerLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.worker_log.FLUSH_S", 0.02)
    store, written = LocalStore(tmp_path), threading.Event()
    put = store.put_replace

    def put_and_tell(path: str, source: bytes | Path) -> None:
        put(path, source)
        written.set()

    monkeypatch.setattr(store, "put_replace", put_and_tell)
    with log.attempt(store, "logs/a/0001-1.log"):
        logging.getLogger("longtake.worker").info("step 3")
        assert written.wait(30)
        assert b"step 3" in store.read("logs/a/0001-1.log")


def test_a_store_that_does_not_take_the_log_does_not_harm_the_attempt(
    log: WorkerLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, source: bytes | Path) -> None:
        raise StoreError("503")

    store = LocalStore(tmp_path)
    monkeypatch.setattr(store, "put_replace", refuse)
    with log.attempt(store, "logs/a/0001-1.log"):
        pass
    log.settle()


def test_an_answer_does_not_wait_for_a_slow_store_and_the_next_attempt_does(
    log: WorkerLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, answers = LocalStore(tmp_path), threading.Event()
    put = store.put_replace

    def put_slowly(path: str, source: bytes | Path) -> None:
        assert answers.wait(30)
        put(path, source)

    monkeypatch.setattr(store, "put_replace", put_slowly)
    with log.attempt(store, "logs/a/0001-1.log"):
        logging.getLogger("longtake.worker").info("step 3")
    assert store.head("logs/a/0001-1.log") is None
    answers.set()
    with log.attempt(store, "logs/a/0002-1.log"):
        assert b"step 3" in store.read("logs/a/0001-1.log")


def test_a_long_log_keeps_its_beginning_and_its_end() -> None:
    text = BoundedText(head_bytes=100, tail_bytes=200)
    for number in range(1000):
        text.add(f"line {number}")
    kept = text.text()
    assert kept.startswith("line 0\n")
    assert kept.endswith("line 999")
    assert "lines left out" in kept
    assert len(kept) < 400
    text.add("x" * 10 * LINE_CHARS)
    assert len(text.text()) < 400
