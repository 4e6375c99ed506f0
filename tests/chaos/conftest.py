"""Fixtures of the fault suite: one cluster of several raylets, the fault-free film, a stage for each test."""

from __future__ import annotations

import os
import secrets
import signal
import urllib.request
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.flaky_server import FlakyServer
from tests.chaos.stage import HOOKS, ROOT, Stage, storyboard

NODES = 2


class Raylets:
    """A cluster on this machine: a head without CPUs, where drivers and orchestrators are, and nodes of one CPU."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "include_log_monitor": False}
        self.cluster: Any = Cluster(initialize_head=True, head_node_args=head)

    @property
    def address(self) -> str:
        address: str = self.cluster.gcs_address
        return address

    @property
    def nodes(self) -> list[Any]:
        return [node for node in self.cluster.worker_nodes if raylet_of(node).poll() is None]

    def fill(self, nodes: int) -> None:
        """As many nodes as this, at least."""
        while len(self.nodes) < nodes:
            self.cluster.add_node(num_cpus=1)

    def kill(self, *node_ids: str) -> None:
        """SIGKILL these nodes' raylets, and with each its object store, at once."""
        for node in self.nodes:
            if node.node_id in node_ids:
                os.kill(raylet_of(node).pid, signal.SIGKILL)


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
            "RAY_worker_niceness": "0",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        raylets = Raylets()
        yield raylets
        raylets.cluster.shutdown()


@pytest.fixture(scope="session")
def film_sha256(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, chaos_folder: Path, cluster: Raylets
) -> str:
    """Of the film that nothing happened to."""
    cluster.fill(NODES)
    folder = tmp_path_factory.mktemp("film")
    stage = Stage(folder, chaos_folder, address=cluster.address)
    stage.write(storyboard(tiny_checkpoint))
    stage.faults()
    stage.render()
    return sha256((folder / "film.mp4").read_bytes()).hexdigest()


@pytest.fixture
def stage(
    tmp_path: Path, tiny_checkpoint: Path, film_sha256: str, chaos_folder: Path, cluster: Raylets
) -> Iterator[Stage]:
    cluster.fill(NODES)
    stage = Stage(tmp_path, chaos_folder, film_sha256, cluster.address)
    stage.write(storyboard(tiny_checkpoint))
    stage.faults()
    yield stage
    stage.close()


@pytest.fixture
def bucket(s3: FlakyServer) -> str:
    """The address of a render of its own in the S3 server."""
    return f"s3://renders/{secrets.token_hex(4)}"
