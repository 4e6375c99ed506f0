"""The benchmark of the network: exactness comes before speed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kernels.bench import Accuracy
from model import bench
from model.config import BlockSparseConfig, DiTConfig

SMALL = DiTConfig(
    hidden_size=64, depth=3, num_heads=2, caption_channels=16, adaln_tembed_dim=16,
    bsa_params=BlockSparseConfig(sparsity=0.5),
)  # fmt: skip


@pytest.mark.parametrize("size", bench.FORWARDS, ids=lambda size: f"{size.name} {size.products}")
def test_eager_torch_is_as_exact_as_itself(size):
    accuracy = bench.forward_accuracy(size, "cpu", SMALL)
    assert accuracy.kernel == accuracy.eager
    # bf16 has eight bits, int8 seven for each row, fp8 three; some blocks at the border are chosen otherwise.
    assert 1e-4 < accuracy.eager < 0.3


def test_inexact_networks_get_no_speed(monkeypatch):
    monkeypatch.setattr(bench, "forward_accuracy", lambda *of: Accuracy(kernel=0.021, eager=0.01))
    monkeypatch.setattr(bench, "seconds", lambda *of, **more: pytest.fail("was timed"))
    rows = list(bench.forward_rows("cpu", SMALL))
    assert len(rows) == len(bench.FORWARDS) + 1
    assert all(row.result.startswith("refused: error 2.1e-02") and row.met is False for row in rows[:-1])
    assert rows[-1].what.startswith("VAE decoding")


def test_sizes_are_those_of_the_real_films():
    tokens = {size.name.split(",")[0]: size.tokens for size in bench.FORWARDS}
    assert tokens == {"480p": 37_440, "720p window": 168_960}


def test_benchmark_runs_the_size_it_names():
    cached = dataclasses.replace(bench.FORWARDS[4], noise=(4, 16, 16), cond_frames=4)
    dit = bench.random_dit(SMALL, cached.attention, "cpu", torch.float32)
    assert bench.forward_call(dit, cached)().shape == (1, 16, 4, 16, 16)
    wanted = bench.forward_call(dit, cached)()
    assert torch.equal(bench.forward_call(dit, dataclasses.replace(cached, on_host=True))(), wanted)


def test_each_target_of_the_whole_network_has_its_rows():
    targets = {(size.name.split(",")[0], size.products): (size.wanted_s, size.wanted_gb) for size in bench.FORWARDS}
    assert targets == {
        ("480p", None): (3.0, None),
        ("480p", "int8"): (2.5, None),
        ("480p", "fp8"): (2.5, None),
        ("480p", "weight_only"): (None, 23.0),
        ("720p window", None): (8.4, None),
        ("720p window", "int8"): (6.0, None),
        ("720p window", "fp8"): (6.0, None),
        ("720p window", "weight_only"): (None, 23.0),
    }


def test_one_network_that_cannot_be_measured_leaves_the_others_their_rows(monkeypatch):
    def accuracy(size, device, config):
        if size.products == "fp8":
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore lines")
        return Accuracy(kernel=1.0, eager=0.0)

    monkeypatch.setattr(bench, "forward_accuracy", accuracy)
    monkeypatch.setattr(bench, "seconds", lambda *of, **more: 1.0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    rows = list(bench.forward_rows("cpu", SMALL))
    failed = [row for row in rows if row.result == "failed: OutOfMemoryError: CUDA out of memory."]
    assert len(failed) == 2 and all("fp8" in row.what and row.met is False for row in failed)
    assert len(rows) == len(bench.FORWARDS) + 1


@pytest.mark.parametrize("repeats", ["0", "-1", "x"])
def test_no_repeats_are_refused(monkeypatch, capsys, repeats):
    monkeypatch.setattr("sys.argv", ["model.bench", f"--repeats={repeats}"])
    with pytest.raises(SystemExit) as caught:
        bench.main()
    assert caught.value.code == 2
    assert "--repeats" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it says without a GPU")
def test_full_size_says_that_it_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["model.bench", "--size", "full"])
    assert bench.main() == 2
    assert "nothing was measured" in capsys.readouterr().err
