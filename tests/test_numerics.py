"""The numerics record, what is made the same on all machines instead, and how a worker sets torch up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from actors import numerics
from actors.numerics import describe_numerics
from kernels.dispatch import dense_attention
from pipeline.ledger import compare_numerics

ROOT = Path(__file__).parent.parent


def test_a_worker_computes_fp32_in_fp32_and_lets_no_clock_choose_whatever_its_environment_says(
    tmp_path: Path,
) -> None:
    """In a process of its own: torch reads the environment when it is imported."""
    code = f"""
import torch
import cluster.worker
from cluster.job import WorkerSettings
from cluster.worker import Worker
cluster.worker.ray = None  # asked for a node, it would start a cluster; what is looked at here comes before that
torch.backends.cudnn.benchmark = True
before = torch.backends.cuda.matmul.allow_tf32
worker = Worker(WorkerSettings("{tmp_path}", "/somewhere", "0", "cpu", "float32", 1, None, 1, None))
worker.greet()
cudnn = torch.backends.cudnn
print(before, torch.backends.cuda.matmul.allow_tf32, cudnn.benchmark, cudnn.deterministic)
worker.dismiss()
"""
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.split() == ["True", "False", "False", "True"]


@pytest.mark.parametrize("chosen", [{}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}], ids=["nobody", "somebody"])
def test_a_worker_on_a_gpu_has_its_memory_mapped_by_pages_unless_somebody_chose_otherwise(
    tmp_path: Path, chosen: dict[str, str]
) -> None:
    """In a process of its own: torch reads the environment once. No GPU is touched."""
    code = f"""
from cluster.job import WorkerSettings
from cluster.worker import Worker
worker = Worker(WorkerSettings("{tmp_path}", "/somewhere", "0", "cuda", "bfloat16", 1, None, 1, None))
import torch
print(torch._C._accelerator_getAllocatorSettings())
worker.dismiss()
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_ALLOC_CONF")}
    environment |= {"PYTHONPATH": str(ROOT), **chosen}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.strip() == chosen.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def test_whatever_of_a_worker_may_change_a_bit_is_in_the_record() -> None:
    about = {"dtype": "float32", "threads": 1, "encoder_threads": 1, "gang_size": 1}
    record = describe_numerics("cpu", ffmpeg=None, **about)  # type: ignore[arg-type]
    for changed in ({"dtype": "bfloat16"}, {"threads": 2}, {"encoder_threads": 2}, {"gang_size": 2}):
        other = describe_numerics("cpu", ffmpeg=None, **about | changed)  # type: ignore[arg-type]
        assert [difference.split(":")[0] for difference in compare_numerics(record, other)] == list(changed)
    assert {"recipe", "device", "attention_backend", "ffmpeg"} <= record.keys()
    assert {"torch", "transformers", "tokenizers", "numpy", "pillow", "triton"} <= record["libraries"].keys()


def test_torch_is_asked_which_dense_attention_it_takes() -> None:
    assert dense_attention("cpu", torch.float32) == "flash"
    with sdpa_kernel(SDPBackend.MATH):
        assert dense_attention("cpu", torch.float32) == "math"


def test_on_a_hopper_card_dense_attention_in_bf16_is_our_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("kernels.dispatch.dense_of_torch", lambda device, dtype: "torch's")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    assert [dense_attention("cuda", t) for t in (torch.bfloat16, torch.float16)] == ["gluon", "torch's"]
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 9))
    assert dense_attention("cuda", torch.bfloat16) == "torch's"


@pytest.mark.parametrize("variable", numerics.CPU_CHOICES)
def test_on_a_cpu_the_record_holds_what_chooses_algorithms(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """`MKL_CBWR=COMPATIBLE` changes the bits of a product, and torch says AVX512 all the same."""
    for name in numerics.CPU_CHOICES:
        monkeypatch.delenv(name, raising=False)
    before = describe_numerics("cpu", "float32", 1, None, 1, gang_size=1)
    monkeypatch.setenv(variable, "X")
    after = describe_numerics("cpu", "float32", 1, None, 1, gang_size=1)
    assert compare_numerics(before, after)


def test_cpus_are_told_apart_by_their_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
    kinds = []
    arm = "CPU implementer\t: 0x41\nCPU variant\t: 0x0\nCPU part\t: {}\n"
    x86 = "vendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: {}\n"
    cpus = {
        "graviton2": ("aarch64", arm.format("0xd0c")),
        "grace": ("aarch64", arm.format("0xd4f")),
        "genoa": ("x86_64", x86.format("AuthenticAMD", 25, 17) + "model name\t: AMD EPYC 9654 96-Core Processor\n"),
        "sapphire rapids": ("x86_64", x86.format("GenuineIntel", 6, 143) + "model name\t: Intel(R) Xeon(R)\n"),
    }
    for name, (machine, said) in cpus.items():
        (tmp_path / name).write_text(f"processor\t: 0\n{said}\n" * 2)
        monkeypatch.setattr(numerics, "CPU_INFORMATION", tmp_path / name)
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        kinds.append(numerics.device_kind("cpu"))
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.setattr("platform.mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    said = subprocess.CompletedProcess([], 0, stdout="Apple M2 Pro\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: said)
    kinds.append(numerics.device_kind("cpu"))
    assert kinds == [
        "cpu aarch64 DEFAULT 0x41 0xd0c",
        "cpu aarch64 DEFAULT 0x41 0xd4f",
        "cpu x86_64 DEFAULT AuthenticAMD 25 17",
        "cpu x86_64 DEFAULT GenuineIntel 6 143",
        "cpu arm64 DEFAULT Apple M2 Pro, macOS 15.1",
    ]


def test_on_a_gpu_the_record_holds_cuda_s_versions_and_what_chooses_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(device: str = "cuda") -> dict[str, Any]:
        return describe_numerics(device, "bfloat16", 4, None, 1, gang_size=1)

    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: 92000)
    monkeypatch.setattr("actors.numerics.dense_attention", lambda device, dtype: f"gluon, {device}, {dtype}")
    monkeypatch.setattr("actors.numerics.dense_of_torch", lambda device, dtype: f"cudnn, {device}, {dtype}")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = record()
    versions = {"toolkit": "13.0", "cudnn": 92000, "dense_attention": "gluon, cuda, torch.bfloat16"}
    versions["torch_attention"] = "cudnn, cuda, torch.bfloat16"  # of the text
    assert (before["device"], before["cuda"]) == ("cuda NVIDIA H100 80GB HBM3", versions)
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: 91000)
    assert record() != before, "another cuDNN in the library path"
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: 92000)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert record() != before
    assert "cuda" not in record("cpu")
