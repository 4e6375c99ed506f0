"""A farm that is used from elsewhere: through the dashboard of its cluster, as for Ray jobs, and by a webhook."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.farm_place import FarmPlace, patiently, sha256_of, write_film
from tests.chaos.stage import ROOT, until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@contextmanager
def dashboard() -> Iterator[str]:
    """Of a cluster: a head that computes nothing but takes jobs, and a worker node."""
    from ray.cluster_utils import Cluster

    # Alone on this machine: by a job's `auto` Ray means the cluster that was started last.
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": 0, "include_log_monitor": False}
    made = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
    try:
        patiently(lambda: made.add_node(num_cpus=2))
        yield f"http://{made.head_node.address_info['webui_url']}"
    finally:
        made.shutdown()


@contextmanager
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An address, and what was sent there."""
    received: list[dict[str, Any]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/json"
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.alone
def test_a_film_is_submitted_followed_and_fetched_through_the_dashboard(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_worker_niceness", "0")
    # Jobs take the cluster's `python`.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    write_film(tmp_path, tiny_checkpoint, "soon")
    with webhook() as (url, received), dashboard() as address:
        place = FarmPlace(tmp_path, address)
        place.ask("farm", "start", "--farm-store", str(place.books), "--device", "cpu", "--workers", "1")
        hook = ("--on-event", f"done,failed={url}")
        render_id = place.submit("soon", "soon", "--farm-store", str(place.books), *hook)
        assert render_id in place.ask("watch", render_id)
        status = json.loads(place.ask("status", render_id, "--json"))
        assert status["phase"] == "done"
        assert "one/window/1" in place.ask("logs", render_id)
        assert place.ask("watch", "nobody", code=2) == "", "what is wrong is said on stderr"
        to = tmp_path / "fetched.mp4"
        assert place.ask("download", render_id, "--to", str(to)).strip() == str(to)
        until(lambda: received, "the webhook is called", 60)
    assert sha256_of(to) == place.film_sha256("soon")
    [event] = received
    assert event["event"] == "done" and event["render"] == render_id
