"""The farm on real Ray: a head and nodes on this machine, each a raylet with one logical GPU, and the real commands.

Each test finds a farm that runs and one node; whatever happens in it, its films are those of `longtake render`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.cli import main
from pipeline.lease import Owner
from pipeline.ledger import Ledger
from pipeline.records import unseal
from pipeline.store import LocalStore
from tests.chaos.farm_place import (
    PRICE,
    TITLES,
    FarmPlace,
    events_of,
    farm_process,
    finish,
    patiently,
    sha256_of,
    write_film,
)
from tests.chaos.stage import HOOKS, ROOT, Stage, until
from tests.tiny_checkpoint import make_checkpoint

JOIN_LIMIT_S = 60.0
"""From a node's being ready to its first task. On a quiet machine it takes a few seconds (docs/cluster.md); here two
suites may share it.
"""

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
SLOW = {"point": "order", "do": "sleep", "seconds": 2.0, "times": 1000}
"""Each task takes two seconds more, so that people come in between."""


class Place(FarmPlace):
    """With the cluster itself, and the faults that its workers meet."""

    def __init__(self, folder: Path, cluster: Any) -> None:
        super().__init__(folder, cluster.gcs_address)
        self.cluster = cluster
        self.hooks = Stage(folder, folder)

    def farm_process(self) -> psutil.Process:
        raylet = self.cluster.head_node.all_processes["raylet"][0].process
        return until(lambda: farm_process(raylet.pid), "the farm's process")  # type: ignore[no-any-return]

    def add_node(self) -> str:
        return patiently(lambda: self.cluster.add_node(num_cpus=1, num_gpus=1)).node_id  # type: ignore[no-any-return]

    @property
    def node_ids(self) -> list[str]:
        return [node.node_id for node in self.cluster.worker_nodes]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("farm")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "PYTHONPATH": f"{HOOKS}:{ROOT}", "CHAOS": str(folder), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0",
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_worker_prestart": "0", "RAY_prestart_worker_first_driver": "0",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "include_log_monitor": False}
        raylets = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        yield Place(folder, raylets)
        raylets.shutdown()


@pytest.fixture
def place(ground: Place, tiny_checkpoint: Path) -> Iterator[Place]:
    for title in TITLES:
        write_film(ground.folder, tiny_checkpoint, title)
    if not ground.node_ids:
        ground.add_node()
    ground.hooks.faults()
    ground.start_farm()
    yield ground
    ground.hooks.release()


def drain(place: Place, node_id: str) -> None:
    """Ray's own preemption notice."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    deadline_ms = int((time.time() + 600) * 1000)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = GcsClient(address=place.address).drain_node(node_id, reason, "taken away", deadline_ms)
    assert accepted, why


def test_three_renders_outlive_their_submitter_and_the_farm_and_end_by_priority(
    place: Place, films: dict[str, str]
) -> None:
    place.hooks.faults({"point": "step", "match": "segment/0", "do": "hold"})
    ids = {"late": place.submit("late", "late", "--priority", "10")}
    (held,) = place.hooks.held()
    kept, attempts = place.commits("late"), len(place.attempts("late"))
    ids["usual"] = place.submit("usual", "usual")
    soon = ("submit", "soon.yaml", "--store", "renders/soon", "--priority", "90")
    submitter = place.start(*soon, "--watch", "--owner", "ann")
    assert submitter.stdout is not None
    ids["soon"] = submitter.stdout.readline().split()[0]
    submitter.send_signal(signal.SIGKILL)
    submitter.communicate()
    assert "submitted before" in place.ask(*soon), "the same again attaches"

    place.farm_process().kill()
    until(lambda: not psutil.pid_exists(held["pid"]), "the farm's workers end with it")
    place.rest(*ids.values())
    ended_s = [max(at_s for at_s, _ in place.attempts(title)) for title in ("soon", "usual", "late")]
    assert ended_s == sorted(ended_s)
    place.check_nothing_redone("late", kept, attempts)
    assert {title: place.film_sha256(title) for title in TITLES} == films
    assert ": done: `longtake download" in place.ask("watch", ids["soon"]), "exit code 0"
    usage = json.loads(place.ask("usage", "--json"))
    assert usage["ann"]["busy_s"] > 0 and usage["ann"]["cost"] > 0


def test_a_node_that_joins_is_used_and_one_that_is_drained_gets_nothing_new(
    place: Place, films: dict[str, str]
) -> None:
    (first,) = place.node_ids
    place.hooks.faults({"point": "step", "match": "window/0", "do": "hold"})
    ids = [place.submit(title, f"moved-{title}") for title in ("usual", "soon")]
    (held,) = place.hooks.held()
    assert held["node"] == first
    second, ready_s = place.add_node(), time.time()
    stores = [f"moved-{title}" for title in ("usual", "soon")]

    def attempts_on(node_id: str) -> list[tuple[str, str]]:
        return [(name, one.task_id) for name in stores for _, one in place.attempts(name) if one.node_id == node_id]

    until(lambda: attempts_on(second), "the new node works")
    first_task_s = min(at_s for name in stores for at_s, one in place.attempts(name) if one.node_id == second) - ready_s
    print(f"the new node had its first task {first_task_s:.1f} s after it was ready")
    assert first_task_s < JOIN_LIMIT_S
    seen = place.folder / "seen"
    with seen.open("w") as out:
        watching = place.start("watch", ids[0], "--json", out=out)
        drain(place, first)
        until(lambda: events_of(seen, "node_draining"), "the notice has come")
        before = attempts_on(first)
        place.hooks.release()
        place.rest(*ids)
        finish(watching)
    assert attempts_on(first) == before, "the running task was finished, and nothing new was sent there"
    assert {title: place.film_sha256(f"moved-{title}") for title in ("usual", "soon")} == {
        title: films[title] for title in ("usual", "soon")
    }
    until(lambda: not psutil.pid_exists(held["pid"]), "the drained node's worker is ended")
    (gone,) = [node for node in place.cluster.worker_nodes if node.node_id == first]
    place.cluster.remove_node(gone)


def test_a_gang_of_the_farm_dies_as_one_and_its_film_is_that_of_a_gang_alone(place: Place, tmp_path: Path) -> None:
    film = write_film(tmp_path, make_checkpoint(tmp_path / "two-heads", heads=2), "usual")
    film = film.rename(place.folder / "together.yaml")
    alone = [sys.executable, "-m", "cluster.cli", "render", str(film), "--gang", "2", "--store", "alone"]
    local = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    finish(subprocess.Popen(alone, cwd=tmp_path, env=local, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    second = place.add_node()
    place.hooks.faults({"point": "step", "match": "segment/1", "do": "kill"})
    place.rest(place.submit("together", "together", "--gang", "2"))
    assert place.film_sha256("together") == sha256_of(tmp_path / "out/usual.mp4")
    assert unseal(place.store("together").read("numerics.json"))["gang_size"] == 2
    segments = [one for _, one in place.attempts("together") if "segment" in place.label_of("together", one.task_id)]
    assert len(segments) == 3, "the one whose member was killed, once more"
    assert all(one.node_id == "+".join(sorted(place.node_ids)) for one in segments), "a member on each node"
    assert segments[-1].worker_id != segments[0].worker_id, "all of the gang went with its member"
    windows = [one for _, one in place.attempts("together") if "window" in place.label_of("together", one.task_id)]
    assert {one.node_id for one in windows} <= set(place.node_ids), "everything else is done alone"
    (added,) = [node for node in place.cluster.worker_nodes if node.node_id == second]
    place.cluster.remove_node(added)


def test_a_render_is_paused_stops_at_its_cost_goes_on_and_is_downloaded(place: Place, films: dict[str, str]) -> None:
    place.hooks.faults(SLOW)
    render_id = place.submit("usual", "paid")
    until(lambda: place.commits("paid"), "it has begun")
    assert "paused" in place.ask("pause", render_id)
    assert place.state(render_id).phase == "paused"
    place.ask("watch", render_id, code=75)
    kept, attempts = place.commits("paid"), len(place.attempts("paid"))

    spent = json.loads(place.ask("usage", "--by", "render", "--json"))[render_id]["cost"]
    assert "queued" in place.ask("resume", render_id, "--max-cost", str(spent + 1.0 * PRICE / 3600))
    place.rest(render_id, phase="paused")
    assert "--max-cost" in place.state(render_id).message
    assert len(place.attempts("paid")) <= attempts + 1, "at most one task for each worker beyond"

    place.hooks.faults()
    place.ask("resume", render_id, "--max-cost", "100")
    assert ": done: `longtake download" in place.ask("watch", render_id), "exit code 0"
    place.check_nothing_redone("paid", kept, attempts)
    place.ask("download", render_id, "--to", "paid.mp4")
    assert sha256_of(place.folder / "paid.mp4") == films["usual"]


def test_a_cancelled_render_stops_and_wrong_words_are_refused(place: Place) -> None:
    place.hooks.faults(SLOW)
    render_id = place.submit("late", "given-up")
    until(lambda: place.attempts("given-up"), "it has begun")
    assert "cancelled" in place.ask("cancel", render_id)
    kept = len(place.attempts("given-up"))
    place.ask("watch", render_id, code=130)
    place.ask("priority", render_id, "101", code=2)
    place.ask("status", "../../evil", code=2)
    assert len(place.attempts("given-up")) == kept
    (row,) = [row for row in json.loads(place.ask("list", "--json")) if row["render_id"] == render_id]
    assert (row["phase"], row["workers"]) == ("cancelled", 0)


def test_a_stopped_farm_is_followed_by_another_on_the_same_books(place: Place, films: dict[str, str]) -> None:
    place.hooks.faults(SLOW)
    render_id = place.submit("late", "handed-on", "--max-cost", "100", "--on-event", "done=/no/such/hook")
    until(lambda: place.commits("handed-on"), "it has begun")
    place.ask("farm", "stop")
    kept, attempts = place.commits("handed-on"), len(place.attempts("handed-on"))
    place.ask("list", code=2)
    place.hooks.faults()
    told = place.ask("farm", "start", "--farm-store", str(place.books), "--device", "cpu")
    assert f"a worker costs {PRICE} an hour" in told and f"a worker costs {PRICE} an hour" in place.ask("list")
    place.rest(render_id)
    assert "its hook failed: /no/such/hook: [Errno 2]" in place.ask("watch", render_id)
    place.check_nothing_redone("handed-on", kept, attempts)
    assert place.film_sha256("handed-on") == films["late"]


def test_a_farm_that_lost_its_books_is_left_alone_and_goes_on_when_it_has_them_again(place: Place) -> None:
    store, before = LocalStore(place.books), place.farm_process().pid
    Ledger(store, owner=Owner("another-host/boot/space", 1)).take_lease(watch_s=0.0)
    other = Ledger(store)
    other.take_lease(watch_s=0.0)
    until(lambda: place.farm_process().pid != before, "it has started again")
    # It is there and refuses; whoever wants a farm does not end it for that.
    place.ask("farm", "start", "--farm-store", str(place.books), "--device", "cpu", code=2)
    place.ask("list", code=2)
    other.release_lease()
    place.rest(place.submit("soon", "given-back"))


def test_a_schedule_beside_the_farms_books_has_its_films_made(
    place: Place, films: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place.folder)
    where = ("--schedules", str(place.books / "schedules"))
    assert main(["schedule", "add", "nightly", "soon.yaml", "--cron", "0 0 1 1 *", "--time-zone", "UTC", *where]) == 0
    assert main(["schedule", "run-now", "nightly", "--farm", *where]) == 0
    capsys.readouterr()

    def ended() -> dict[str, str] | None:
        assert main(["schedule", "list", "nightly", "--json", *where]) == 0
        (run,) = json.loads(capsys.readouterr().out)
        return run if run["state"] not in ("claimed", "running") else None

    run = until(ended, "the run has ended")
    assert run["state"] == "done"
    assert place.film_sha256(run["run"]) == films["soon"]
