"""The cluster goes, a new one comes, nothing is made again: for one render as one job, as the RayJob manifest has it,
and for a farm.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from cluster.cli import main
from tests.chaos.farm_place import FarmPlace, finish, patiently, sha256_of, write_film
from tests.chaos.stage import HOOKS, LIMIT_S, ROOT, Stage

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@contextmanager
def cluster(*, graceful: bool = False) -> Iterator[str]:
    """A cluster as the manifests make it: a head that computes nothing, and a worker node. In the end every process of
    it gets SIGKILL, or first SIGTERM, all at once.
    """
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "include_log_monitor": False}
    made = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
    try:
        patiently(lambda: made.add_node(num_cpus=2))
        yield made.address
    finally:
        for node in made.list_all_nodes():
            node.kill_all_processes(check_alive=False, allow_graceful=graceful)


def entrypoint(film: Path, store: Path, address: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The manifest's entrypoint, with what a pod has put in: its paths, its Ray, no GPU here."""
    capsys.readouterr()
    assert main(["manifest", "rayjob", str(film), "--gpus", "1", "--store", "s3://films/one"]) == 0
    _, job = yaml.safe_load_all(capsys.readouterr().out)
    pod = {"/film/storyboard.yaml": str(film), "s3://films/one": str(store), "auto": address, "cuda": "cpu"}
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:2] == ["longtake", "render"] and pod.keys() <= set(words)
    return [pod.get(word, word) for word in words[1:]]


def test_a_job_and_a_farm_go_on_in_a_new_cluster_when_theirs_is_lost_or_suspended(
    tmp_path: Path,
    tiny_checkpoint: Path,
    films: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {"PYTHONPATH": f"{HOOKS}:{ROOT}", "CHAOS": str(tmp_path), "RAY_worker_niceness": "0"}.items():
        monkeypatch.setenv(name, value)
    film, store = write_film(tmp_path, tiny_checkpoint, "usual"), tmp_path / "renders" / "job"
    write_film(tmp_path, tiny_checkpoint, "soon")
    hooks = Stage(tmp_path, tmp_path)
    kept: dict[str, dict[str, bytes]] = {}
    attempts: dict[str, int] = {}

    def go_on(address: str) -> tuple[FarmPlace, subprocess.Popen[str]]:
        """The farm on its books, and the job's own entrypoint."""
        place = FarmPlace(tmp_path, address)
        place.ask("farm", "start", "--farm-store", str(place.books), "--device", "cpu", "--workers", "1")
        return place, place.start_words(entrypoint(film, store, address, capsys))

    def check_nothing_redone(place: FarmPlace) -> None:
        for name in kept:
            place.check_nothing_redone(name, kept[name], attempts[name])

    for held, graceful in (("window/0", False), ("window/1", True)):
        hooks.faults({"point": "step", "match": held, "do": "hold", "times": 2})
        with cluster(graceful=graceful) as address:
            place, job = go_on(address)
            render_id = place.submit("soon", "farmed")
            hooks.held(2)
            check_nothing_redone(place)
            for name in ("job", "farmed"):
                kept[name], attempts[name] = place.commits(name), len(place.attempts(name))
            if graceful:
                # As Kueue suspends a job: its pods, the driver's too, are asked to end.
                job.terminate()
        job.communicate(timeout=LIMIT_S)
        assert job.returncode not in (0, 2), "it has not come to its end, and is started again"
        assert place.state(render_id).phase == "running"
    hooks.faults()
    with cluster() as address:
        place, job = go_on(address)
        finish(job)
        place.rest(render_id)
    check_nothing_redone(place)
    assert sha256_of(tmp_path / "out/usual.mp4") == films["usual"]
    assert place.film_sha256("farmed") == films["soon"]
