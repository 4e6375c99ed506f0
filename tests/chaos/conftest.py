"""Fixtures of the fault suite: one cluster of several raylets, the fault-free film, a stage for each test.

Each test goes on with a render that has its texts: loading the model for them takes longer than all else together.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from cluster.film_page import PAGE
from tests.chaos.farm_place import patiently, render_alone
from tests.chaos.flaky_server import FlakyServer
from tests.chaos.stage import HOOKS, RENDER, ROOT, Stage, storyboard

NODES = 2


class Raylets:
    """A cluster on this machine: a head without CPUs, where drivers and orchestrators are, and nodes of one CPU."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "include_log_monitor": False}
        self.cluster: Any = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))

    @property
    def address(self) -> str:
        address: str = self.cluster.gcs_address
        return address

    @property
    def head(self) -> str:
        """The id of the node that drivers join."""
        node_id: str = self.cluster.head_node.node_id
        return node_id

    @property
    def nodes(self) -> list[Any]:
        return [node for node in self.cluster.worker_nodes if raylet_of(node).poll() is None]

    def fill(self, nodes: int) -> None:
        """As many nodes as this, at least."""
        while len(self.nodes) < nodes:
            patiently(lambda: self.cluster.add_node(num_cpus=1))

    def add_tight_node(self, spare_bytes: int) -> None:
        """A node whose raylet kills for memory as soon as the machine uses so much more than now."""
        from ray._common.utils import get_system_memory
        from ray._private.utils import get_used_memory

        share = (get_used_memory() + spare_bytes) / get_system_memory()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_memory_usage_threshold", str(share))
            patiently(lambda: self.cluster.add_node(num_cpus=1))

    def kill(self, *node_ids: str) -> None:
        """SIGKILL these nodes' raylets, and with each its object store, at once."""
        doomed = [raylet_of(node) for node in self.nodes if node.node_id in node_ids]
        for raylet in doomed:
            os.kill(raylet.pid, signal.SIGKILL)
        for raylet in doomed:
            raylet.wait(30)

    def end(self) -> None:
        """SIGKILL every process of every node."""
        for node in (self.cluster.head_node, *self.cluster.worker_nodes):
            for processes in node.all_processes.values():
                for process in processes:
                    process.process.kill()
                    process.process.wait(30)


def raylet_of(node: Any) -> Any:
    return node.all_processes["raylet"][0].process


@pytest.fixture(scope="session")
def chaos_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture(scope="session")
def s3() -> Iterator[FlakyServer]:
    """A real S3 server on loopback behind a server that can be told to misbehave; the environment names it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with FlakyServer(host, port) as flaky, pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": flaky.url, "AWS_ALLOW_HTTP": "true",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        urllib.request.urlopen(urllib.request.Request(f"{flaky.url}/renders", method="PUT")).close()
        yield flaky
    server.stop()


@pytest.fixture(scope="session")
def cluster(chaos_folder: Path, s3: FlakyServer) -> Iterator[Raylets]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "PYTHONPATH": f"{HOOKS}:{ROOT}", "CHAOS": str(chaos_folder), "RAY_enable_worker_prestart": "0",
            "RAY_prestart_worker_first_driver": "0", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0", "RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "3000",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        raylets = Raylets()
        yield raylets
        raylets.cluster.shutdown()


@dataclass(frozen=True)
class FaultFree:
    """What nothing happened to: the film's sha256, and folders of the storyboard and its render, at its end and when
    only its texts were there.
    """

    film_sha256: str
    finished: Path
    begun: Path


@pytest.fixture(scope="session")
def fault_free(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, chaos_folder: Path, cluster: Raylets
) -> FaultFree:
    cluster.fill(NODES)
    stages = []
    for name in ("finished", "begun"):
        stage = Stage(tmp_path_factory.mktemp(name), chaos_folder, address=cluster.address)
        stage.write(storyboard(tiny_checkpoint))
        stages.append(stage)
    finished, begun = stages
    finished.faults()
    finished.render("--workers", "1")
    begun.faults({"point": "role", "match": "chain", "do": "hold"})
    run = begun.start("--workers", "1")
    begun.held()
    run.process.terminate()
    run.finish(75)
    # Of the same film, so the tests' renders need not measure it again.
    shutil.copy(finished.folder / RENDER / PAGE, begun.folder / RENDER)
    film_sha256 = sha256((finished.folder / "film.mp4").read_bytes()).hexdigest()
    return FaultFree(film_sha256, finished.folder, begun.folder)


@pytest.fixture(scope="session")
def films(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, chaos_folder: Path, cluster: Raylets
) -> dict[str, str]:
    """sha256 of the film of each title that farms render, as it is made without a farm when nothing happens."""
    cluster.fill(1)
    folder = tmp_path_factory.mktemp("alone")
    Stage(folder, chaos_folder).faults()
    return render_alone(folder, tiny_checkpoint, cluster.address)


@pytest.fixture
def stage(
    tmp_path: Path, tiny_checkpoint: Path, fault_free: FaultFree, chaos_folder: Path, cluster: Raylets
) -> Iterator[Stage]:
    cluster.fill(NODES)
    stage = Stage(tmp_path, chaos_folder, fault_free.film_sha256, cluster.address, {cluster.head})
    stage.write(storyboard(tiny_checkpoint))
    stage.copy(fault_free.begun)
    stage.faults()
    yield stage
    stage.close()


@pytest.fixture
def finished(stage: Stage, fault_free: FaultFree) -> Stage:
    """The stage of a render that has come to its end."""
    stage.copy(fault_free.finished)
    return stage


@pytest.fixture
def bucket(s3: FlakyServer) -> str:
    """The address of a render of its own in the S3 server."""
    return f"s3://renders/{secrets.token_hex(4)}"
