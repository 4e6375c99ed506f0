"""The parity command: passes on the official tensors, and notices what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.parity import main, run_parity

GOLDEN = Path(__file__).parent / "golden"


def smaller_copy(folder: Path, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """A golden folder with some of the cases, and its tensors for changing."""
    for file in GOLDEN.iterdir():
        if file.name != "cases.safetensors":
            shutil.copy(file, folder / file.name)
    tensors = load_file(GOLDEN / "cases.safetensors")
    return {name: value for name, value in tensors.items() if name.startswith(prefixes)}


def test_every_golden_case_passes(capsys):
    assert main([str(GOLDEN)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith(", 0 beyond tolerance")
    cases = {line.split()[0] for line in lines[1:-1]}
    assert set(json.loads((GOLDEN / "cases.json").read_text())) <= cases
    assert {"dense", "model_bsa", "vae", "sched.shift12.50.base"} <= cases


def test_deviation_beyond_tolerance_fails(tmp_path, capsys):
    tensors = smaller_copy(tmp_path, ("rope.", "dense."))
    tensors["dense.out"][0, 0, 0, 0, 0] += 1e-5
    save_file(tensors, tmp_path / "cases.safetensors")
    assert main([str(tmp_path)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("FAIL")]
    assert [line.split()[:2] for line in failed] == [["dense", "out"]]


def test_nan_wrong_shape_and_unknown_cases_fail(tmp_path):
    tensors = smaller_copy(tmp_path, ("rope.", "sched.shift1.8."))
    tensors["rope.q_out"][0, 0, 0, 0] = float("nan")
    tensors["sched.shift1.8.base.sigmas"] = torch.zeros(3)
    tensors["surprise.out"] = torch.zeros(1)
    save_file(tensors, tmp_path / "cases.safetensors")
    failed = {finding.case for finding in run_parity(tmp_path) if not finding.passed}
    assert failed == {"rope", "sched.shift1.8.base", "surprise"}


def test_settings_of_the_folder_are_used(tmp_path):
    tensors = smaller_copy(tmp_path, ("bsa.topk.", "bsa.q", "bsa.k", "bsa.v"))
    save_file(tensors, tmp_path / "cases.safetensors")
    assert all(finding.passed for finding in run_parity(tmp_path))
    settings = json.loads((GOLDEN / "cases.json").read_text())
    settings["bsa.topk"]["sparsity"] = 0.75
    (tmp_path / "cases.json").write_text(json.dumps(settings))
    assert not any(finding.passed for finding in run_parity(tmp_path))


@pytest.mark.parametrize("missing", ["cases.json", "cases.safetensors", "dit.safetensors", "dit_config.json"])
def test_folder_that_cannot_be_read_is_an_error_of_its_own(tmp_path, capsys, missing):
    save_file(smaller_copy(tmp_path, ("dense.",)), tmp_path / "cases.safetensors")
    (tmp_path / missing).unlink()
    assert main([str(tmp_path)]) == 2
    assert missing in capsys.readouterr().err
