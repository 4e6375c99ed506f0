"""The quality gate by the real command: a checkpoint that draws nothing is tried again under recorded new seeds,
twice, and then ends the render with exit code 4. A whole render leaves the report page.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pipeline.ledger import Ledger
from pipeline.store import open_store
from tests.test_render_film import finish, render, start

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def write(folder: Path, checkpoint: Path) -> None:
    shot = {"id": "one", "duration": "1s", "prompt": "a red circle moves left"}
    storyboard = {"title": "Gate", "checkpoint": str(checkpoint), "refinement": "none", "shots": [shot]}
    (folder / "film.yaml").write_text(yaml.safe_dump(storyboard))


@pytest.fixture
def broken_checkpoint(tiny_checkpoint: Path, tmp_path: Path):
    """The tiny checkpoint with another last layer of its autoencoder: `value` in all of its weights and biases."""

    def make(value: float) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.copytree(tiny_checkpoint, folder)
        file = folder / "vae" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        for name in ("decoder.conv_out.weight", "decoder.conv_out.bias"):
            tensors[name] = torch.full_like(tensors[name], value)
        save_file(tensors, file, metadata={"format": "pt"})
        return folder

    return make


def test_a_film_without_a_picture_is_redone_twice_and_ends_with_code_4(
    broken_checkpoint, tmp_path: Path, address: str
) -> None:
    write(tmp_path, broken_checkpoint(0.0))
    done = render(tmp_path, "film.yaml", "--json", "--address", address)
    assert done.code == 4, done.err
    assert "one flat colour" in done.err
    sent = [event for event in done.events if event["event"] == "dispatched" and "segment" in event["label"]]
    assert len(sent) == 3
    state = Ledger(open_store(str(tmp_path / "renders/gate"))).load()
    assert state.redo == {"one/segment/0": 2}
    again = render(tmp_path, "film.yaml", "--address", address)
    assert again.code == 4, "the budget stays used up"
    assert not (tmp_path / "out").exists()


def test_a_render_ends_with_its_report_page(tiny_checkpoint: Path, tmp_path: Path, address: str) -> None:
    write(tmp_path, tiny_checkpoint)
    done = render(tmp_path, "film.yaml", "--address", address)
    assert done.code == 0, done.err
    page = (tmp_path / "renders/gate/report.html").read_text(encoding="utf-8")
    for words in ("Gate", "Contact sheet", "Drift", "Timings", "one/segment/0"):
        assert words in page
    made = (tmp_path / "renders/gate/report.html").stat().st_mtime_ns
    assert render(tmp_path, "film.yaml", "--address", address).code == 0
    assert (tmp_path / "renders/gate/report.html").stat().st_mtime_ns == made, "what is there is not measured again"


def test_whoever_stops_a_render_does_not_wait_for_its_report_page(
    tiny_checkpoint: Path, tmp_path: Path, address: str
) -> None:
    write(tmp_path, tiny_checkpoint)
    process = start(tmp_path, "film.yaml")
    while not (measuring := _measuring_the_film(process)):
        assert process.poll() is None
        time.sleep(0.05)
    measuring[0].suspend()  # for ever, as far as this render can tell
    until_s = time.monotonic() + 60
    while _workers(process):
        assert time.monotonic() < until_s, "no worker is held for a page"
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    done = finish(process)
    assert done.code == 0, "the film was there"
    assert "report.html was not made (stopped)" in done.err + done.out
    assert not (tmp_path / "renders/gate/report.html").exists()
    assert list((tmp_path / "renders/gate/films").iterdir())
    assert render(tmp_path, "film.yaml", "--address", address).code == 0
    assert (tmp_path / "renders/gate/report.html").exists()


def _workers(process: subprocess.Popen[str]) -> list[str]:
    titles = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            titles += [title for title in child.cmdline()[:1] if title.startswith("ray::Worker")]
    return titles


def _measuring_the_film(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found += [child] if "cluster.film_page" in child.cmdline() else []
    return found
