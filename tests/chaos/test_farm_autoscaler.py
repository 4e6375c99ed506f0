"""A farm under Ray's autoscaler: its fake provider makes nodes of raylets on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.chaos.farm_place import FarmPlace, patiently, write_film
from tests.chaos.stage import LIMIT_S, ROOT, until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
MOST_NODES = 2


def config(gcs_address: str) -> dict[str, Any]:
    """Of a head without CPUs and up to `MOST_NODES` nodes of one CPU and one logical GPU, which go after three idle
    seconds.
    """
    node = {"resources": {"CPU": 1, "GPU": 1, "object_store_memory": 100_000_000}, "node_config": {},
            "min_workers": 0, "max_workers": MOST_NODES}  # fmt: skip
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "fake", "max_workers": MOST_NODES, "idle_timeout_minutes": 0.05, "upscaling_speed": 10.0,
        # By its path: under its own name Ray wants defaults from a file that its wheel leaves out.
        "provider": {"type": "external", "module": PROVIDER, "gcs_address": gcs_address, "head_node_id": HEAD_ID,
                     "launch_multiple": True, "use_node_id_as_ip": True, "disable_node_updaters": True,
                     "disable_launch_config_check": True},
        "available_node_types": {"gpu": node, "ray.head.default": head}, "head_node_type": "ray.head.default",
        "auth": {}, "file_mounts": {}, "cluster_synced_files": [], "file_mounts_sync_continuously": False,
        "rsync_exclude": [], "rsync_filter": [], "initialization_commands": [], "setup_commands": [],
        "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }  # fmt: skip


@contextlib.contextmanager
def autoscaled(folder: Path) -> Iterator[str]:
    """A head with the autoscaler; its address. (Ray's own AutoscalingCluster begins and ends with `ray stop`.)"""
    port, client_port = free_port(), free_port()
    sockets = tempfile.mkdtemp(prefix="as-", dir="/tmp")  # the paths of sockets have to be short
    address = f"127.0.0.1:{port}"
    (folder / "autoscaler.json").write_text(json.dumps(config(address)))
    own = {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_worker_prestart": "0", "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    }  # fmt: skip
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0", "--num-gpus=0",
        "--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=false",
        f"--ray-client-server-port={client_port}", "--min-worker-port=0", "--max-worker-port=0",
        "--object-store-memory=100000000", "--include-log-monitor=false", f"--temp-dir={sockets}",
        f"--autoscaling-config={folder / 'autoscaler.json'}",
    ]  # fmt: skip
    head = patiently(lambda: start_head(command, os.environ | own, folder / "head.log"))
    try:
        yield address
    finally:
        end_tree(head)
        shutil.rmtree(sockets, ignore_errors=True)


def start_head(command: list[str], environment: dict[str, str], log: Path) -> psutil.Popen:
    """Wait until it runs; RuntimeError with its log if it has ended instead."""
    with log.open("w") as out:
        head = psutil.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    until(lambda: "Ray runtime started" in log.read_text() or head.poll() is not None, "the head runs")
    if head.poll() is not None:
        raise RuntimeError(log.read_text())
    return head


def end_tree(head: psutil.Popen) -> None:
    """End Ray's processes and the nodes that the autoscaler has made."""
    for process in [*head.children(recursive=True), head] if head.poll() is None else []:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    head.wait(30)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def nodes(gcs: Any) -> int:
    """How many nodes there are beside the head."""
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    found = gcs.get_all_node_info(timeout=60).values()
    return sum(info.state == GcsNodeInfo.ALIVE and not info.is_head_node for info in found)


def test_machines_come_when_a_render_wants_them_and_go_when_none_does(
    tmp_path: Path, tiny_checkpoint: Path, films: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CHAOS")  # the other cluster's faults
    write_film(tmp_path, tiny_checkpoint, "usual")
    with autoscaled(tmp_path) as address:
        from ray._raylet import GcsClient

        gcs = GcsClient(address=address)
        place = FarmPlace(tmp_path, address)
        start = ("farm", "start", "--farm-store", str(place.books), "--idle", "1s")
        for words in (start, ("submit", "usual.yaml", "--store", "renders/scaled"), ("render", "usual.yaml")):
            refused = place.start(*words)
            said = refused.communicate(timeout=LIMIT_S)[1]
            assert refused.returncode == 2 and "no workers yet" in said, "the machines that may come have GPUs"
        place.ask(*start, "--device", "cpu")
        assert nodes(gcs) == 0, "nobody wants anything"
        render_id = place.submit("usual", "scaled")
        until(lambda: nodes(gcs), "a machine comes")
        place.rest(render_id)
        assert place.film_sha256("scaled") == films["usual"]
        until(lambda: nodes(gcs) == 0, "the machines go")
        place.ask("farm", "stop")
