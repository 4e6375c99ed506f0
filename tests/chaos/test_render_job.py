"""One render as one job, as the RayJob manifest has it: the cluster goes, a new one comes, nothing is made again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from cluster.cli import main
from tests.chaos.farm_place import FarmPlace, patiently, sha256_of, write_film
from tests.chaos.stage import HOOKS, ROOT, Stage

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@contextmanager
def cluster() -> Iterator[str]:
    """A cluster as the manifests make it: a head that computes nothing, and a worker. Killed at the end."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "include_log_monitor": False}
    made = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
    try:
        patiently(lambda: made.add_node(num_cpus=1))
        yield made.address
    finally:
        for node in made.list_all_nodes():
            node.kill_all_processes(check_alive=False, allow_graceful=False)


def entrypoint(film: Path, store: Path, address: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The manifest's entrypoint, with what a pod has put in: its paths, its Ray, no GPU here."""
    capsys.readouterr()
    assert main(["manifest", "rayjob", str(film), "--gpus", "1", "--store", "s3://films/one"]) == 0
    _, job = yaml.safe_load_all(capsys.readouterr().out)
    pod = {"/film/storyboard.yaml": str(film), "s3://films/one": str(store), "auto": address, "cuda": "cpu"}
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:2] == ["longtake", "render"] and pod.keys() <= set(words)
    return [pod.get(word, word) for word in words[1:]]


def test_a_new_cluster_goes_on_where_the_lost_one_was(
    tmp_path: Path,
    tiny_checkpoint: Path,
    films: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {"PYTHONPATH": f"{HOOKS}:{ROOT}", "CHAOS": str(tmp_path), "RAY_worker_niceness": "0"}.items():
        monkeypatch.setenv(name, value)
    film, store = write_film(tmp_path, tiny_checkpoint, "usual"), tmp_path / "renders" / "job"
    hooks = Stage(tmp_path, tmp_path)
    hooks.faults({"point": "step", "match": "window/0", "do": "hold"})
    with cluster() as address:
        place = FarmPlace(tmp_path, address)
        first = place.start_words(entrypoint(film, store, address, capsys))
        hooks.held()
        kept, attempts = place.commits("job"), len(place.attempts("job"))
    first.communicate(timeout=600)
    assert first.returncode not in (0, 2), "a job that has lost its cluster has failed, and is tried again"
    hooks.faults()
    with cluster() as address:
        again = place.start_words(entrypoint(film, store, address, capsys))
        _, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    place.check_nothing_redone("job", kept, attempts)
    assert sha256_of(tmp_path / "out/usual.mp4") == films["usual"]
