"""Machines that go: without a word, with notice, several at once, all of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pipeline.journal import PartialSaved
from tests.chaos.conftest import Raylets, raylet_of
from tests.chaos.stage import Event, Run, Stage, until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def test_when_the_chains_node_is_lost_the_hand_off_comes_back_from_the_store(stage: Stage, cluster: Raylets) -> None:
    stage.faults({"point": "step", "match": "one/segment/1", "do": "hold"})
    run = stage.start("--workers", "2")
    (held,) = stage.held()
    cluster.kill(held["node"])
    run.wait_for("worker_lost")
    stage.release()
    run.finish()
    assert "one/segment/1" in stage.tried_again()
    assert "one/segment/0" not in stage.tried_again()
    assert {entry.kind for entry in stage.failures("one/segment/1")} == {"lost"}, "not charged"
    stage.check()


def test_two_nodes_lost_at_once_in_refinement_cost_what_ran_there(stage: Stage, cluster: Raylets) -> None:
    cluster.fill(3)
    stage.faults({"point": "step", "match": "window", "do": "hold", "times": 2})
    run = stage.start("--workers", "3")
    held = stage.held(2)
    before = stage.committed()
    cluster.kill(*(one["node"] for one in held))
    until(lambda: sum(e["event"] == "worker_lost" for e in run.events) >= 2, "both are noticed")
    stage.release()
    run.finish()
    assert {one["label"] for one in held} <= stage.tried_again()
    sent_again = {e["task"] for e in run.events if e["event"] == "dispatched" and e["attempt"] > 1}
    assert not any(f"commits/{task}.json" in before for task in sent_again)
    stage.check()


def test_a_node_with_two_minutes_left_finishes_what_it_has_and_gets_nothing_new(stage: Stage, cluster: Raylets) -> None:
    stage.faults({"point": "step", "match": "one/window/0", "do": "hold"})
    run = stage.start("--workers", "2")
    (held,) = stage.held()
    with drained(cluster, held["node"], 120.0):
        order, told = run.wait_for("dispatched", "one/window/0"), run.wait_for("node_draining", held["node"])
        stage.release()
        run.finish()
    assert_nothing_new(run, order, told)
    assert stage.tried_again() == set()
    stage.check()


def test_a_node_with_half_a_minute_left_saves_its_step_and_another_one_goes_on(stage: Stage, cluster: Raylets) -> None:
    stage.faults({"point": "step", "match": "one/window/0", "do": "until_stopped"})
    run = stage.start("--workers", "2")
    (held,) = stage.held()
    with drained(cluster, held["node"], 30.0):
        order, told = run.wait_for("dispatched", "one/window/0"), run.wait_for("node_draining", held["node"])
        run.finish()
    assert_nothing_new(run, order, told)
    saved = [entry for entry in stage.history if isinstance(entry, PartialSaved)]
    assert [(entry.task_id, entry.steps) for entry in saved] == [(order["task"], 1)]
    assert {entry.kind for entry in stage.failures("one/window/0")} == {"interrupted"}, "not charged"
    first, second = stage.attempts("one/window/0")
    assert first.node_id != second.node_id
    stage.check()


@contextmanager
def drained(cluster: Raylets, node_id: str, deadline_s: float) -> Iterator[None]:
    """A node with a preemption notice, which is gone in the end."""
    drain(cluster, node_id, deadline_s)
    try:
        yield
    finally:
        cluster.kill(node_id)


def assert_nothing_new(run: Run, order: Event, told: Event) -> None:
    sent = [e for e in run.events if e["event"] == "dispatched" and e["time"] > told["time"]]
    assert sent and not [e for e in sent if e["worker"] == order["worker"]], "nothing new goes there"


def drain(cluster: Raylets, node_id: str, deadline_s: float) -> None:
    """Ray's own preemption notice."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    deadline_ms = int((time.time() + deadline_s) * 1000)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = GcsClient(address=cluster.address).drain_node(node_id, reason, "taken away", deadline_ms)
    assert accepted, why


def test_a_killed_driver_takes_nothing_along_and_the_same_command_goes_on(stage: Stage) -> None:
    stage.faults({"point": "step", "match": "one/window/0", "do": "hold"})
    killed = stage.start("--workers", "1")
    stage.held()
    kept = stage.committed()
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.process.wait(30)
    stage.orchestrators_gone()
    stage.faults()
    run = stage.render("--workers", "1")
    assert kept.items() <= stage.committed().items()
    assert not {e["task"] for e in run.events if e["event"] == "dispatched"} & {
        path.removeprefix("commits/").removesuffix(".json") for path in kept
    }
    stage.check()


def test_a_zombie_that_answers_late_changes_nothing(stage: Stage, cluster: Raylets) -> None:
    """A node stops answering with a worker on it that goes on, and writes other bytes in the end."""
    stage.faults(
        {"point": "step", "match": "one/segment/0", "do": "hold"},
        {"point": "predict", "match": "one/segment/0", "do": "spoil"},
    )
    run = stage.start("--workers", "2")
    (held,) = stage.held()
    (node,) = [node for node in cluster.nodes if node.node_id == held["node"]]
    raylet = raylet_of(node)
    os.kill(raylet.pid, signal.SIGSTOP)
    try:
        run.wait_for("worker_lost")
        run.wait_for("committed", stage.task_of("one/segment/0"))
        late = stage.attempts("one/segment/0")[0]
        stage.release()
        path = f"attempts/{late.task_id}/{late.attempt:04d}-{late.epoch}"
        until(lambda: stage.store.list(path), "the zombie has written")
    finally:
        cluster.kill(held["node"])
    run.finish()
    assert len(stage.attempts("one/segment/0")) == 2
    stage.check()


def test_when_the_whole_cluster_is_gone_another_one_goes_on_from_the_store(stage: Stage) -> None:
    first = Raylets()
    first.fill(1)
    stage.faults({"point": "step", "match": "window", "do": "hold"})
    stage.address, address = first.address, stage.address
    stage.heads.add(first.head)
    try:
        run = stage.start("--workers", "1")
        stage.held()
        kept = stage.committed()
    finally:
        first.end()
    until(lambda: run.process.poll() is not None, "the driver ends by itself")
    assert run.process.returncode != 0
    stage.address = address
    stage.orchestrators_gone()
    stage.faults()
    stage.render("--workers", "1")
    assert kept.items() <= stage.committed().items()
    stage.check()
