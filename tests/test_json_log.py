"""Logs for machines: every line is JSON and says what it is about."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.orchestrator import Story
from cluster.worker_log import WorkerLog
from pipeline.store import LocalStore
from pipeline.story import log_path


@pytest.fixture
def worker_log() -> Iterator[WorkerLog]:
    handler = WorkerLog()
    yield handler
    logging.getLogger().removeHandler(handler)
    logging.captureWarnings(False)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_workers_lines_name_their_render_task_and_attempt(
    worker_log: WorkerLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LONGTAKE_LOG", "json")
    log, store = logging.getLogger("longtake.worker"), LocalStore(tmp_path)
    with worker_log.attempt(store, log_path("segment-0123", 2, 7)):
        log.info("step %d", 3)
        try:
            raise ValueError("no\nluck")
        except ValueError:
            log.exception("failed")
    log.info("between orders")
    step, failed, between = lines(capsys)
    assert step["message"] == "step 3" and step["level"] == "INFO" and step["logger"] == "longtake.worker"
    assert (step["render"], step["task"], step["attempt"]) == (store.url, "segment-0123", 2)
    assert failed["level"] == "ERROR" and "Traceback" in failed["message"] and "no\nluck" in failed["message"]
    assert step["time"] > 1.7e9 and step["host"] and step["pid"]
    assert "task" not in between and "render" not in between


def test_a_renders_events_are_lines_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    story = Story("s3://films/one")
    story.tell("committed", task="segment-0123")
    assert lines(capsys) == []
    monkeypatch.setenv("LONGTAKE_LOG", "json")
    story.tell("committed", task="segment-0123")
    story.tell("failed", task="window-4", host="node-7", message="out of memory")
    done, failed = lines(capsys)
    assert (done["event"], done["render"], done["task"]) == ("committed", "s3://films/one", "segment-0123")
    assert (failed["level"], failed["host"]) == ("WARNING", "node-7")
    assert len(story.events) == 3


def test_people_get_the_same_lines_as_before(
    worker_log: WorkerLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LONGTAKE_LOG", raising=False)
    store, path = LocalStore(tmp_path), log_path("segment-0123", 1, 7)
    with worker_log.attempt(store, path):
        logging.getLogger("longtake.worker").info("step 3")
    assert capsys.readouterr().out == ""
    worker_log.settle()
    assert b"INFO longtake.worker step 3" in store.read(path)
