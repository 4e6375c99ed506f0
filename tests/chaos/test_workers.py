"""Workers that hang or crawl, and an ffmpeg that crashes, hangs, or writes less than it should."""

from __future__ import annotations

import os

import pytest

from pipeline.media import find_ffmpeg
from tests.chaos.stage import Stage

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

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
    "writes a short file": 'head -c 300000 | "{ffmpeg}" "$@"; exit 0',
}


@pytest.mark.parametrize("what", sorted(ACTIONS))
def test_an_ffmpeg_that_fails_is_tried_again_with_its_last_words_kept(stage: Stage, what: str) -> None:
    script, real = stage.folder / "ffmpeg", find_ffmpeg().path
    action = ACTIONS[what].format(ffmpeg=real)
    script.write_text(BROKEN.format(what=what, mark=stage.folder / "broken", action=action, ffmpeg=real))
    os.chmod(script, 0o755)
    stage.faults(ffmpeg_limit_s=20.0)
    run = stage.render("--workers", "1", LONGTAKE_FFMPEG=str(script))
    (label,) = stage.tried_again()
    assert label.startswith("unit/")
    (failure,) = stage.failures(label)
    assert failure.kind == "transient"
    if what != "writes a short file":
        assert "the last words of ffmpeg" in failure.message
    assert not [e for e in run.events if e["event"] == "worker_lost"]
    stage.check()


def test_a_worker_without_progress_is_replaced_and_its_node_avoided_after_three_times(stage: Stage) -> None:
    stage.faults()
    nodes: list[str] = []
    bad = {"point": "order", "match": "segment", "do": "hold", "times": 3}
    stage.faults(bad, timeouts={"segment_s": 8.0})
    run = stage.render("--workers", "1")
    recycled = [e for e in run.events if e["event"] == "worker_recycled"]
    assert recycled and all("no progress" in e["reason"] for e in recycled)
    nodes += [failure.node_id for label in ("one/segment/0",) for failure in stage.failures(label)]
    assert nodes
    stage.check()


def test_a_straggler_that_moves_is_left_alone(stage: Stage) -> None:
    slow = {"point": "step", "match": "one/segment/0", "do": "sleep", "seconds": 3.0, "times": 8}
    stage.faults(slow, timeouts={"segment_s": 20.0})
    run = stage.render("--workers", "1")
    assert not [e for e in run.events if e["event"] in ("worker_recycled", "worker_lost")]
    assert stage.tried_again() == set()
    stage.check()
