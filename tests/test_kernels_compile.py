"""What the compiler makes of the kernels, for cards that this machine need not have.

All kernels, sizes and cards: `python -m kernels.compile_gate`. Here each kernel once, for Hopper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton.backends.nvidia")
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels import compile_gate
from kernels.attention import gluon_impl as dense
from kernels.block_sparse_attention import gluon_impl as sparse
from kernels.linear import gluon_impl as linear

# Every launch says whether products and sums are fused; Triton warns where one leaves it to a default that changes.
pytestmark = pytest.mark.filterwarnings("error:TRITON_DEFAULT_FP_FUSION")
CASES = {case.name: case for case in compile_gate.cases()}
HOPPER = [
    "dense, heads of 128, fixed shift",
    "dense, heads of 64, running maximum",
    "block-sparse (gluon), heads of 128, fixed shift",
    "block-sparse (gluon), heads of 128, running maximum",
    "int8 product (gluon)",
    "forward, fixed shift (tma)",
    "backward dq (tma)",
    "backward dk dv (tma)",
    "choose blocks, top",
    "norm_rope, means",
    "add_gated_modulate",
    "swiglu",
    "add_gated_norm",
    "add_gated_modulate, i8",
    "swiglu, fp8e4nv",
    "quantise rows, fp8e4nv",
    "int8 product (tma)",
    "weight-only int8 (tma)",
]


@pytest.mark.parametrize("name", HOPPER)
def test_hopper_gets_wgmma_and_bulk_copies_without_spills(name):
    assert compile_gate.compile_case(CASES[name], 90).faults(CASES[name], 90) == []


@pytest.mark.parametrize(
    ("name", "capability"), [("forward, running maximum (pointers)", 80), ("weight-only int8 (pointers)", 89)]
)
def test_older_cards_compile_without_spills(name, capability):
    assert compile_gate.compile_case(CASES[name], capability).faults(CASES[name], capability) == []


@pytest.mark.parametrize(
    ("name", "capability"), [("int8 product (tma), 10.0", 100), ("forward, fixed shift (tma)", 120)]
)
def test_newer_cards_compile_without_spills_in_the_shared_memory_they_have(name, capability):
    assert compile_gate.compile_case(CASES[name], capability).faults(CASES[name], capability) == []


Launches = list[tuple[tuple[int, ...], bool]]


class Hopper:
    """What Triton asks of the driver until a kernel is to run."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Launches of the kernels in Gluon are compiled with all that is theirs, and then do not run: grids, and whether
    there is a binary."""
    seen: Launches = []

    class Compiled:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **options: Any) -> None:
                seen.append((grid, bool(self.kernel.warmup(*args, grid=grid, **options).asm["cubin"])))

            return launch

    for module, name in ((dense, "attention_kernel"), (sparse, "forward_kernel"), (linear, "multiply_kernel")):
        monkeypatch.setattr(module, name, Compiled(getattr(module, name)))
    card = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(driver, "_active", Hopper())
    return seen


def test_kernels_in_gluon_are_launched_as_they_want_it(compiled: Launches):
    q, k, v = (torch.zeros(2, n, 3, 128, dtype=torch.bfloat16).transpose(1, 2) for n in (320, 640, 640))
    for bound in (11.5, None, 100.0):
        assert dense.attend(q, k, v, bound).shape == q.shape
    kept, counts = torch.zeros(2, 3, 5, 4, dtype=torch.int32), torch.full((2, 3, 5), 4, dtype=torch.int32)
    out, sums = sparse.launch_forward(q, k, v, kept, counts, 11.5)
    assert out.shape == q.shape and sums.shape == (2, 3, 320)
    x, weight = torch.zeros(300, 272, dtype=torch.int8), torch.zeros(776, 272, dtype=torch.int8)
    for bias in (torch.zeros(776, dtype=torch.bfloat16), None):
        assert linear.multiply(x, torch.ones(300), weight, torch.ones(776), bias, torch.bfloat16).shape == (300, 776)
    # 3 x 128 queries of six heads; 3 pairs of blocks of six heads; 3 x 4 tiles.
    assert compiled == [((3, 6), True)] * 3 + [((18,), True)] + [((12,), True)] * 2


def test_faults_are_found():
    figures = compile_gate.Figures(registers=255, spills=8, shared_bytes=100 * 1024, wgmma=0, bulk_copies=0)
    case = CASES["forward, fixed shift (tma)"]
    assert len(figures.faults(case, 90)) == 3
    assert len(figures.faults(case, 89)) == 3  # too much shared memory, and wgmma is not asked for


def test_products_that_wait_for_each_other_are_found():
    """One that is waited for at once, and so is what stands in the machine code where ptxas gives up."""
    case = CASES["weight-only int8 (tma)"]
    figures = compile_gate.compile_case(case, 90)
    assert figures.in_turn and figures.faults(case, 90) == []
    assert "waits" in figures.faults(dataclasses.replace(case, overlapped=True), 90)[0]


def test_spills_are_read_off_the_binary():
    case = CASES["add_gated_modulate"]
    assert any("spills" in fault for fault in compile_gate.compile_case(case, 90, maxnreg=32).faults(case, 90))
