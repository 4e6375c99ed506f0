"""Workers that hang or crawl, and an ffmpeg that crashes, hangs, or writes less than it should."""

from __future__ import annotations

import os

import psutil
import pytest

from pipeline.journal import AttemptFailed, AttemptStarted
from pipeline.media import find_ffmpeg
from tests.chaos.conftest import Raylets
from tests.chaos.stage import Stage

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
GIB = 1024**3

BROKEN = """#!/bin/sh
# Once, in the first encode, it {what}; ever after it is ffmpeg.
case "$*" in *rawvideo*libx264*|*libx264*)
    if mkdir "{mark}" 2>/dev/null; then
        echo "the last words of ffmpeg" >&2
        {action}
    fi;;
esac
exec "{ffmpeg}" "$@"
"""
ACTIONS = {
    "crashes": "exit 1",
    "hangs": "exec sleep 600",
    "writes a short file": 'head -c 100000 | "{ffmpeg}" "$@"; exit 0',
}


@pytest.mark.parametrize("what", sorted(ACTIONS))
def test_an_ffmpeg_that_fails_is_tried_again_with_its_last_words_kept(stage: Stage, what: str) -> None:
    script, real = stage.folder / "ffmpeg", find_ffmpeg().path
    action = ACTIONS[what].format(ffmpeg=real)
    script.write_text(BROKEN.format(what=what, mark=stage.folder / "broken", action=action, ffmpeg=real))
    os.chmod(script, 0o755)
    stage.faults(ffmpeg_limit_s=15.0)
    run = stage.render("--workers", "1", LONGTAKE_FFMPEG=str(script))
    (label,) = stage.tried_again()
    assert label.startswith("unit/")
    (failure,) = stage.failures(label)
    assert failure.kind == "transient"
    if what != "writes a short file":
        assert "the last words of ffmpeg" in failure.message
    assert not [e for e in run.events if e["event"] == "worker_lost"]
    stage.check()


@pytest.mark.alone
def test_a_worker_that_is_killed_for_its_memory_costs_its_task_alone(stage: Stage, cluster: Raylets) -> None:
    """By Ray's own monitor, on a node that has 2 GiB to spare."""
    if psutil.virtual_memory().available < 6 * GIB:
        pytest.skip("this machine has less than 6 GiB to spare")
    cluster.kill(*(node.node_id for node in cluster.nodes))
    cluster.add_tight_node(2 * GIB)
    stage.faults({"point": "step", "match": "one/segment/0", "do": "swell", "most_bytes": 4 * GIB})
    try:
        run = stage.render("--workers", "1")
    finally:
        cluster.kill(*(node.node_id for node in cluster.nodes))
    (lost,) = [e for e in run.events if e["event"] == "worker_lost"]
    assert "memory" in lost["reason"]
    assert [failure.kind for failure in stage.failures("one/segment/0")] == ["died"], "not charged"
    assert stage.tried_again() == {"one/segment/0"}
    stage.check()


def test_a_worker_without_progress_is_replaced_and_its_task_goes_to_another_node(stage: Stage) -> None:
    stage.faults({"point": "step", "match": "one/segment/0", "do": "hold"}, timeouts={"segment_s": 20.0})
    run = stage.render("--workers", "2")
    (recycled,) = [e for e in run.events if e["event"] == "worker_recycled"]
    assert "no progress" in recycled["reason"]
    first, second = stage.attempts("one/segment/0")
    assert first.node_id != second.node_id
    assert [failure.kind for failure in stage.failures("one/segment/0")] == ["stalled"]
    assert stage.tried_again() == {"one/segment/0"}
    stage.check()


def test_a_straggler_that_moves_is_left_alone(stage: Stage) -> None:
    slow = {"point": "step", "match": "one/segment/0", "do": "sleep", "seconds": 5.0, "times": 5}
    stage.faults(slow, timeouts={"segment_s": 20.0})
    run = stage.render("--workers", "1")
    assert not [e for e in run.events if e["event"] in ("worker_recycled", "worker_lost")]
    assert stage.tried_again() == set()
    stage.check()


def test_a_node_where_three_orders_in_a_row_fail_is_avoided(stage: Stage, cluster: Raylets) -> None:
    """Whatever is begun there runs out of memory."""
    bad, before = cluster.nodes[0].node_id, len(stage.history)
    stage.faults({"point": "order", "do": "oom", "node": bad, "times": 99})
    run = stage.render("--workers", "2")
    assert any("3 times in a row: avoided" in str(event) for event in run.events)
    now = stage.history[before:]
    begun = [entry for entry in now if isinstance(entry, AttemptStarted) and entry.node_id == bad]
    failed = [entry for entry in now if isinstance(entry, AttemptFailed)]
    assert len(begun) == len(failed) == 3
    stage.check()
