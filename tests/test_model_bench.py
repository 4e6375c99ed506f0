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
    assert len(rows) == len(bench.FORWARDS)
    assert all(row.result.startswith("refused: error 2.1e-02") and row.met is False for row in rows)


def test_sizes_are_those_of_the_real_films():
    tokens = {size.name.split(",")[0]: size.tokens for size in bench.FORWARDS}
    assert tokens == {"480p": 37_440, "720p window": 168_960}


def test_benchmark_runs_the_size_it_names():
    cached = dataclasses.replace(bench.FORWARDS[4], noise=(4, 16, 16), cond_frames=4)
    dit = bench.random_dit(SMALL, cached.attention, "cpu", torch.float32)
    assert bench.forward_call(dit, cached)().shape == (1, 16, 4, 16, 16)
    whole = dataclasses.replace(cached, cached=False)
    assert bench.forward_call(dit, whole)().shape == (1, 16, 8, 16, 16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it says without a GPU")
def test_full_size_says_that_it_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["model.bench", "--size", "full"])
    assert bench.main() == 2
    assert "nothing was measured" in capsys.readouterr().err
