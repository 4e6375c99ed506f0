"""Machines that go: without a word, with notice, several at once, all of them."""

from __future__ import annotations

import os
import signal
import time

import pytest

from pipeline.journal import PartialSaved
from tests.chaos.conftest import Raylets, raylet_of
from tests.chaos.stage import Stage, until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def test_when_the_chains_node_is_lost_the_hand_off_comes_back_from_the_store(stage: Stage, cluster: Raylets) -> None:
    stage.faults({"point": "step", "match": "one/segment/1", "do": "hold"}, start_limit_s=10.0)
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
    stage.faults({"point": "step", "match": "window", "do": "hold", "times": 2}, start_limit_s=10.0)
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


@pytest.mark.parametrize("deadline_s", [30.0, 120.0])
def test_a_node_that_will_be_taken_away_gets_nothing_new_and_is_charged_nothing(
    stage: Stage, cluster: Raylets, deadline_s: float
) -> None:
    stage.faults({"point": "step", "match": "one/window/0", "do": "sleep", "seconds": 2.0, "times": 1000})
    run = stage.start("--workers", "2")
    order = run.wait_for("dispatched", "one/window/0")
    (attempt,) = stage.attempts("one/window/0")
    drain(cluster, attempt.node_id, deadline_s)
    told = run.wait_for("node_draining")
    if deadline_s == 120.0:
        stage.write_faults([], {})  # as fast as ever: done long before the deadline
    run.finish()
    sent = [e for e in run.events if e["event"] == "dispatched" and e["time"] > told["time"]]
    assert not [e for e in sent if e["worker"] == order["worker"]], "nothing new goes there"
    if deadline_s == 30.0:
        saved = [entry for entry in stage.history if isinstance(entry, PartialSaved)]
        assert [entry.task_id for entry in saved] == [order["task"]], "saved, and gone on with elsewhere"
        assert {entry.kind for entry in stage.failures("one/window/0")} == {"interrupted"}
    else:
        assert stage.tried_again() == set(), "the running one finishes"
    stage.check()


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
    killed.process.wait()
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
        os.kill(raylet.pid, signal.SIGCONT)
    run.finish()
    assert len(stage.attempts("one/segment/0")) == 2
    stage.check()


def test_when_the_whole_cluster_is_gone_another_one_goes_on_from_the_store(stage: Stage) -> None:
    first = Raylets()
    first.fill(1)
    stage.faults({"point": "step", "match": "window", "do": "hold"})
    stage.address, address = first.address, stage.address
    run = stage.start("--workers", "1")
    stage.held()
    kept = stage.committed()
    for node in (first.cluster.head_node, *first.nodes):
        for processes in node.all_processes.values():
            for process in processes:
                process.process.kill()
    until(lambda: run.process.poll() is not None, "the driver ends by itself", 120)
    assert run.process.returncode != 0
    stage.address = address
    stage.faults()
    stage.render("--workers", "1")
    assert kept.items() <= stage.committed().items()
    stage.check()
