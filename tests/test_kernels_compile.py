"""What the compiler makes of the kernels, for cards that this machine need not have.

All kernels, sizes and cards: `python -m kernels.compile_gate`. Here each kernel once, for Hopper.
"""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("triton.backends.nvidia")
from kernels import compile_gate

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
