"""What a person does to a real render, and Ray's preemption notice: the wiring that only a cluster shows."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import main
from cluster.manifests.description import MARKET_TYPE, SPOT
from tests.test_render_film import digest, finish, render, start, storyboard, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What a command prints with --json."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.timeout(600)
def test_a_render_is_paused_gone_on_with_and_made_again_in_part(
    tmp_path: Path,
    tiny_checkpoint: Path,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "film.yaml").write_text(yaml.safe_dump(storyboard(tiny_checkpoint)))
    process = start(tmp_path, "film.yaml", "--address", address)
    order = wait_for(process, lambda event: event["event"] == "dispatched" and "segment" in event["label"])
    assert said(capsys, "pause", "film.yaml")["state"] == "paused"
    paused = finish(process)
    assert paused.code == 75, paused.err
    assert "paused on request" in paused.err
    assert said(capsys, "status", "film.yaml")["state"].startswith("paused")
    (told,) = said(capsys, "logs", "film.yaml", order["task"])["tasks"]
    assert told["attempts"][0]["host"]
    assert order["label"] in told["attempts"][0]["text"]

    rest = render(tmp_path, "film.yaml", "--address", address)
    assert rest.code == 0, rest.err
    first = digest(tmp_path / "out/short.mp4")
    status = said(capsys, "status", "film.yaml")
    assert status["store_use"]["orchestrator"]["seconds"] > 0
    assert status["store_use"]["tasks"]["seconds"] > 0

    plan = said(capsys, "plan", "film.yaml", "--redo", "0:00-0:01", "--refine-only")
    again = render(tmp_path, "film.yaml", "--redo", "0:00-0:01", "--refine-only", "--json", "--address", address)
    assert again.code == 0, again.err
    ran = {event["task"] for event in again.events if event["event"] == "dispatched"}
    assert ran == set(plan["to_do"]), "plan says exactly what render does"
    assert not any("segment" in event.get("label", "") for event in again.events)
    assert digest(tmp_path / "out/short.mp4") != first


@pytest.fixture
def raylets() -> Iterator[tuple[str, str]]:
    """A cluster of two raylets that this process has joined: its address, and the id of the node that works.

    An actor runs there, as a worker does: a node with nothing to do ends as soon as it is drained.
    """
    import ray
    from ray.cluster_utils import Cluster

    class Busy:
        """Defined here, so that it travels by value: workers do not know the tests' modules."""

        def where(self) -> str:
            node_id: str = ray.get_runtime_context().get_node_id()
            return node_id

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1, labels={MARKET_TYPE: SPOT})
        ray.init(address=cluster.address, log_to_driver=False)
        busy = ray.remote(num_cpus=1)(Busy).remote()
        assert ray.get(busy.where.remote(), timeout=120) == node.node_id
        yield cluster.gcs_address, node.node_id
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.parametrize("deadline_s", [120.0, None])
def test_the_preemption_notice_of_a_real_raylet_is_noticed(
    raylets: tuple[str, str], deadline_s: float | None
) -> None:
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    from cluster.drain import draining_nodes, spot_nodes

    address, node_id = raylets
    assert spot_nodes() == {node_id}, "by the label that the manifests give"
    assert draining_nodes() == {}
    deadline_ms = 0 if deadline_s is None else int((time.time() + deadline_s) * 1000)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = GcsClient(address=address).drain_node(node_id, reason, "taken away", deadline_ms)
    assert accepted, why
    until_s = time.monotonic() + 30
    while node_id not in draining_nodes() and time.monotonic() < until_s:
        time.sleep(0.1)
    left_s = draining_nodes()[node_id]
    if deadline_s is None:
        assert left_s is None
    else:
        assert left_s is not None and 60 < left_s <= deadline_s
