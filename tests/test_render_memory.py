"""A render with the least memory that a card can do with, by the real command on a local cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.orchestrator import with_precision, workers_part
from pipeline.memory import LEAST
from pipeline.records import unseal
from pipeline.spec import Memory
from tests.test_render_film import render, storyboard


@pytest.mark.ray
@pytest.mark.slow
def test_a_film_in_int8_with_networks_in_turn(tiny_checkpoint: Path, tmp_path: Path, address: str) -> None:
    film = storyboard(tiny_checkpoint) | {"refinement": "chained", "memory": LEAST.model_dump()}
    film["shots"] = film["shots"][:1]
    (tmp_path / "film.yaml").write_text(yaml.safe_dump(film))
    done = render(tmp_path, "film.yaml", "--address", address)
    assert done.code == 0, done.err
    assert "float32, weights weight_only, 1 thread(s) each" in done.err
    assert (tmp_path / "out/short.mp4").stat().st_size > 1000
    assert unseal((tmp_path / "renders/short/numerics.json").read_bytes())["precision"] == "weight_only"
    stored = render(tmp_path, "film.yaml", "--precision", "stored", "--address", address)
    assert stored.code == 2
    assert "precision: weight_only, now stored" in stored.err


def test_the_workers_part_of_the_record_is_what_the_farm_compares() -> None:
    workers = {"device": "cuda NVIDIA H100"}
    pinned = with_precision(workers, Memory(precision="int8"))
    assert pinned == {"device": "cuda NVIDIA H100", "precision": "int8"}
    assert workers_part(pinned | {"gang_size": 2}) == workers
