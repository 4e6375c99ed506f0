"""Renders whose segments are computed by a gang, on a cluster of several raylets."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pipeline.records import unseal
from tests.test_render_film import digest, finish, render, start, storyboard, wait_for
from tests.tiny_checkpoint import make_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.alone]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of three raylets: a head without work, and two with room for one member each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield cluster.gcs_address
    finally:
        cluster.shutdown()


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two shots of a checkpoint with two heads. Many steps, so that a segment lasts for seconds."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("two-heads"), heads=2)
    facts = json.loads((checkpoint / "render.json").read_text())
    draft = {"steps": 50, "loras": [{"file": "lora/cfg_step_lora.safetensors"}]}
    (checkpoint / "render.json").write_text(json.dumps(facts | {"quality": {"draft": draft}}))
    return storyboard(checkpoint)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, film: dict[str, Any], address: str) -> Path:
    """A folder in which a gang has rendered the film, first its coarse stage alone."""
    folder = tmp_path_factory.mktemp("gang-film")
    (folder / "film.yaml").write_text(yaml.safe_dump(film))
    coarse = render(folder, "film.yaml", "--gang", "2", "--address", address, "--until", "stage-one", "--json")
    assert coarse.code == 0, coarse.err
    (joined,) = [event for event in coarse.events if event["event"] == "worker_joined"]
    assert len(joined["gang"]) == 1, "the machine sees one worker"
    assert not any(map(psutil.pid_exists, (joined["process"], joined["gang"][0][1])))
    return folder


def test_the_gang_is_part_of_the_numerics_record(uninterrupted: Path, address: str) -> None:
    assert unseal((uninterrupted / "renders/short/numerics.json").read_bytes())["gang_size"] == 2
    alone = render(uninterrupted, "film.yaml", "--address", address)
    assert alone.code == 2
    assert "gang_size" in alone.err


@pytest.mark.timeout(1200)
def test_a_lost_member_is_a_lost_gang_and_costs_its_segment_alone(
    uninterrupted: Path, film: dict[str, Any], address: str, tmp_path: Path
) -> None:
    whole = render(uninterrupted, "film.yaml", "--gang", "2", "--address", address)
    assert whole.code == 0, whole.err

    (tmp_path / "film.yaml").write_text(yaml.safe_dump(film))
    process = start(tmp_path, "film.yaml", "--gang", "2", "--address", address)
    joined = wait_for(process, lambda event: event["event"] == "worker_joined")
    first, ((_, second),) = joined["process"], joined["gang"]
    order = wait_for(process, lambda event: event["event"] == "dispatched" and "segment" in event["label"])
    os.kill(second, signal.SIGSTOP)
    time.sleep(4.0)  # what was done before that is committed by now, on a busy machine too
    if (tmp_path / f"renders/short/commits/{order['task']}.json").exists():
        os.kill(second, signal.SIGCONT)
        order = wait_for(process, lambda event: event["event"] == "dispatched" and "segment" in event["label"])
    os.kill(second, signal.SIGKILL)
    done = finish(process)
    assert done.code == 0, done.err
    lost = [event for event in done.events if event["event"] == "worker_lost"]
    assert [event["worker"] for event in lost] == [joined["worker"]], "once, for the whole gang"
    again = [event["task"] for event in done.events if event["event"] == "dispatched"]
    assert order["task"] in again
    assert not psutil.pid_exists(first), "the member that was left is ended, too"
    assert digest(tmp_path / "out/short.mp4") == digest(uninterrupted / "out/short.mp4")
