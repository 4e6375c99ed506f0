"""What the compiler makes of the kernels, without a GPU.

`python -m kernels.compile_gate [--sweep] [--only NAME] [--capability 90]`: every kernel is compiled at its
real size for compute capabilities 8.0, 8.9, 9.0, 10.0 and 12.0 with the ptxas that comes with Triton. The gate
fails (exit code 1) where a kernel spills registers or wants more shared memory than the card has, where a
descriptor is not a TMA bulk copy or, on 9.0, a matrix product not a wgmma, and where ptxas made products of a kernel in
Gluon wait for each other. `--sweep` also tries stages and register limits of the attention and prints them without
judging: they are the figures behind the launch options.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

CAPABILITIES = (80, 89, 90, 100, 120)
_WITH_DESCRIPTORS = (90, 100, 120)
# Shared memory that one block may have, CUDA C++ Programming Guide, technical specifications.
_SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# Types of quantised rows, their constants, and the cards that have them.
_QUANTISED: tuple[tuple[str, dict[str, Any], tuple[int, ...]], ...] = (
    ("i8", {"LARGEST": 127.0, "FP8": False}, CAPABILITIES),
    ("fp8e4nv", {"LARGEST": 448.0, "FP8": True}, CAPABILITIES[1:]),
)
_CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel at one size. `types`: signature of the arguments that are not constexprs, in their order."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    capabilities: tuple[int, ...] = CAPABILITIES
    products: bool = False
    descriptors: bool = False
    overlapped: bool = False  # products run beside other work


@dataclasses.dataclass(frozen=True)
class Figures:
    """What came out. `spills`: bytes of local memory and stack of a thread. `in_turn`: a warp group waits after each of
    its products (ptxas has this done where it cannot follow what becomes of their registers)."""

    registers: int
    spills: int
    shared_bytes: int
    wgmma: int
    bulk_copies: int
    in_turn: bool = False

    def faults(self, case: Case, capability: int) -> list[str]:
        found = [f"spills {self.spills} bytes"] if self.spills else []
        if self.shared_bytes > _SHARED_BYTES[capability]:
            found.append(f"{self.shared_bytes} bytes of shared memory")
        if capability == 90 and case.products and not self.wgmma:
            found.append("no wgmma")
        if self.in_turn and case.overlapped:
            found.append("each product waits for the one before")
        if case.descriptors and not self.bulk_copies:
            found.append("no bulk copy")
        return found


def compile_case(case: Case, capability: int, **options: Any) -> Figures:
    """Compile and read the figures off the binary. Raises what Triton raises."""
    signature = {name: case.types.get(name, "constexpr") for name in case.kernel.arg_names}
    # Pointers and strides are multiples of 16 at the real sizes, as the launcher would find.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*")
        or (kind.startswith("i") and (name in ("n", "k") or name.endswith(("stride", "batch", "head", "col", "row"))))
    }
    kind = GluonASTSource if isinstance(case.kernel, GluonJITFunction) else ASTSource
    source = kind(case.kernel, signature, case.constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={**case.options, **options})
    usage = _resource_usage(compiled.asm["cubin"])
    products, waits = _products_and_waits(compiled.asm["cubin"]) if capability == 90 and case.products else (0, 0)
    ptx = compiled.asm["ptx"]
    return Figures(
        registers=usage["REG"],
        spills=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        bulk_copies=len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        in_turn=0 < products <= waits,
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    text = _dump(cubin, "--dump-resource-usage")
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def _products_and_waits(cubin: bytes) -> tuple[int, int]:
    """Instructions of the machine code: matrix products of warp groups, and waits for them."""
    text = _dump(cubin, "--dump-sass")
    return len(re.findall(r"\b[HIQ]GMMA\.", text)), text.count("WARPGROUP.DEPBAR")


def _dump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def _dense_attention() -> Iterator[Case]:
    from triton.experimental.gluon import language as gl

    from kernels import hopper
    from kernels.attention import gluon_impl as dense

    kernel = dense.attention_kernel
    for d, fixed in itertools.product((128, 64), (True, False)):
        few, many = (
            f"tensordesc<bf16[{rows}, {d}],{hopper.tile_layout(rows, d)!r}>" for rows in (dense.QUERIES, dense.KEYS)
        )
        types = {"q": few, "k": many, "v": many, "out": "*bf16"}
        types |= {"scale_log2": "fp32", "shift_log2": "fp32"}
        sizes = {"BQ": dense.QUERIES, "BK": dense.KEYS, "D": d, "STAGES": dense.STAGES, "TYPE": gl.bfloat16}
        sizes |= {"FIXED_SHIFT": fixed, **hopper.REGISTERS}
        types |= {name: "i32" for name in kernel.arg_names if name not in types and name not in sizes}
        name = f"dense, heads of {d}, {'fixed shift' if fixed else 'running maximum'}"
        yield Case(name, kernel, types, sizes, hopper.OPTIONS, (90,), True, True, True)


def _hopper_products() -> Iterator[Case]:
    from triton.experimental.gluon import language as gl

    from kernels import hopper
    from kernels.linear import gluon_impl as linear

    shapes = {"x": (linear.ROWS, linear.STEP), "weight": (linear.COLUMNS, linear.STEP)}
    types = {arg: f"tensordesc<i8[{r}, {c}],{hopper.tile_layout(r, c, gl.int8)!r}>" for arg, (r, c) in shapes.items()}
    layout = hopper.tile_layout(linear.ROWS, linear.COLUMNS, gl.bfloat16)
    types["out"] = f"tensordesc<bf16[{linear.ROWS}, {linear.COLUMNS}],{layout!r}>"
    types |= {"x_scale": "*fp32", "weight_scale": "*fp32", "bias": "*bf16", "m": "i32", "n": "i32", "k": "i32"}
    sizes = {"BM": linear.ROWS, "BN": linear.COLUMNS, "BK": linear.STEP, "STAGES": linear.STAGES, "BAND": linear.BAND}
    sizes |= {"BIAS": True, "TYPE": gl.bfloat16, **hopper.REGISTERS}
    yield Case("int8 product (gluon)", linear.multiply_kernel, types, sizes, hopper.OPTIONS, (90,), True, True, True)


def _hopper_block_sparse() -> Iterator[Case]:
    from triton.experimental.gluon import language as gl

    from kernels import hopper
    from kernels.block_sparse_attention import gluon_impl as bsa

    kernel = bsa.forward_kernel
    for d, fixed in itertools.product((128, 64), (True, False)):
        tile = f"tensordesc<bf16[{bsa.BLOCK}, {d}],{hopper.tile_layout(bsa.BLOCK, d)!r}>"
        types = {"q": tile, "k": tile, "v": tile, "out": "*bf16", "lse": "*fp32", "kept": "*i32", "counts": "*i32"}
        types |= {"finished": "*i32", "scale_log2": "fp32", "shift_log2": "fp32"}
        sizes = {"BLOCK": bsa.BLOCK, "D": d, "ROOM": bsa.ROOM, "TYPE": gl.bfloat16, "FIXED_SHIFT": fixed}
        sizes |= {"PATIENCE": bsa.PATIENCE, **hopper.REGISTERS}
        types |= {name: "i32" for name in kernel.arg_names if name not in types and name not in sizes}
        name = f"block-sparse (gluon), heads of {d}, {'fixed shift' if fixed else 'running maximum'}"
        yield Case(name, kernel, types, sizes, hopper.OPTIONS, (90,), True, True, True)


def _attention(descriptors: bool) -> Iterator[Case]:
    from kernels.block_sparse_attention import triton_impl as bsa

    tile = "tensordesc<bf16[64, 128]>" if descriptors else "*bf16"
    strides = {f"{x}_{part}": "i32" for x in "qkvog" for part in ("stride", "batch", "head", "col")}
    lists = {
        "lse": "*fp32",
        "delta": "*fp32",
        "kept": "*i32",
        "counts": "*i32",
        "queries": "*i32",
        "starts": "*i32",
    }
    numbers = {"heads": "i32", "width": "i32", "q_blocks": "i32", "pairs": "i32"}
    scales = {"scale": "fp32", "scale_log2": "fp32", "shift_log2": "fp32"}
    tensors = {
        **dict.fromkeys(("q", "k", "v", "out", "d_out"), tile),
        "dq": "*bf16",
        "dk": "*bf16",
        "dv": "*bf16",
    }
    every = {**tensors, **lists, **strides, **numbers, **scales}
    sizes = {"BQ": 64, "BK": 64, "D": 128, "WIDE": 128, "TYPE": triton.language.bfloat16, "TMA": descriptors}
    capabilities = _WITH_DESCRIPTORS if descriptors else (80, 89, 90)
    kind = "tma" if descriptors else "pointers"
    for name, kernel, more, options in (
        ("forward, fixed shift", bsa.forward_kernel, {"FIXED_SHIFT": True}, bsa.FORWARD_OPTIONS),
        ("forward, running maximum", bsa.forward_kernel, {"FIXED_SHIFT": False}, bsa.FORWARD_OPTIONS),
        ("backward dq", bsa.dq_kernel, {}, bsa.BACKWARD_OPTIONS),
        ("backward dk dv", bsa.dkv_kernel, {}, bsa.BACKWARD_OPTIONS),
    ):
        types = {arg: every[arg] for arg in kernel.arg_names if arg in every}
        yield Case(f"{name} ({kind})", kernel, types, {**sizes, **more}, options, capabilities, True, descriptors)


def _gating() -> Iterator[Case]:
    from kernels.block_sparse_attention import triton_impl as bsa

    numbers = dict.fromkeys(("first_head", "first_row", "rows", "n_q", "n_k", "room", "width", "top"), "i32")
    every = dict.fromkeys(("q_means", "k_means", "scores"), "*fp32") | dict.fromkeys(("kept", "counts"), "*i32")
    every |= numbers | {"threshold": "fp32", "scale_log2": "fp32"}
    kernel = bsa.scores_kernel
    types = {arg: every[arg] for arg in kernel.arg_names if arg in every}
    sizes = {**bsa.SCORE_TILE, "D": 128}
    yield Case("scores of block means", kernel, types, sizes, bsa.SCORE_OPTIONS, (80, 89, 90, 120))
    yield Case("scores of block means, 10.0", kernel, types, sizes, bsa.SCORE_OPTIONS_10, (100,))
    kernel = bsa.choose_kernel
    types = {arg: every[arg] for arg in kernel.arg_names if arg in every}
    for mass in (False, True):
        name = "choose blocks, mass" if mass else "choose blocks, top"
        yield Case(name, kernel, types, {"NK": 4096, "WRITE": True, "MASS": mass}, bsa.CHOOSE_OPTIONS)


def _rows() -> Iterator[Case]:
    """norm_rope, modulate and swiglu at the width of the real model."""
    from kernels.modulate import triton_impl as modulate
    from kernels.norm_rope import triton_impl as norm_rope
    from kernels.swiglu import triton_impl as swiglu

    bf16 = triton.language.bfloat16
    kernel = norm_rope.norm_rope_kernel
    types = dict.fromkeys(kernel.arg_names[:15], "i32")
    types |= {
        "x": "*bf16",
        "weight": "*bf16",
        "out": "*bf16",
        "table": "*fp32",
        "means": "*fp32",
        "index": "*i32",
    }
    types["eps"] = "fp32"
    sizes = {"TOKENS": 64, "AT_ONCE": 1, "HEADS": 8, "D": 128, "WIDE": 128, "TYPE": bf16}
    for indexed in (True, False):
        name = "norm_rope, index, means" if indexed else "norm_rope, means"
        flags = {"ROTATE": True, "INDEXED": indexed, "MEANS": True}
        yield Case(name, kernel, types, {**sizes, **flags}, norm_rope.OPTIONS)

    yield from _modulations(modulate)

    types = {"a": "*bf16", "b": "*bf16", "out": "*bf16", "a_row": "i32", "b_row": "i32", "columns": "i32"}
    sizes = {"ROWS": 1, "COLUMNS": 4096, "TYPE": bf16}
    yield Case("swiglu", swiglu.swiglu_kernel, types | {"rows": "i32"}, sizes, swiglu.OPTIONS)
    kernel = swiglu.swiglu_quantised_kernel
    for kind, quantised, capabilities in _QUANTISED:
        types |= {"values": f"*{kind}", "scales": "*fp32"}
        wanted = {arg: types[arg] for arg in kernel.arg_names if arg in types}
        sizes = {"C": 11008, "WIDE": 16384, **quantised}
        yield Case(f"swiglu, {kind}", kernel, wanted, sizes, swiglu.QUANTISED_OPTIONS, capabilities)


def _modulations(modulate: Any) -> Iterator[Case]:
    kernel = modulate.modulate_kernel
    types = dict.fromkeys(kernel.arg_names[:17], "i32") | {"eps": "fp32", "index": "*i32", "row_scale": "*fp32"}
    types |= dict.fromkeys(("x", "update", "summed", "out"), "*bf16")
    types |= dict.fromkeys(("gate", "shift", "scale"), "*fp32")
    sizes = {"RUN": 4, "C": 4096, "WIDE": 4096, "NORM": True, "INDEXED": True, "TYPE": triton.language.bfloat16}
    sizes |= {"AFFINE": False, "QUANTISED": False, "LARGEST": 127.0, "FP8": False}
    for add in (False, True):
        name = "add_gated_modulate" if add else "modulate"
        yield Case(name, kernel, types, {**sizes, "ADD": add, "GATED": add}, modulate.OPTIONS)
    sizes |= {"ADD": True, "GATED": True}
    affine = types | {"shift": "*bf16", "scale": "*bf16"}
    yield Case("add_gated_norm", kernel, affine, {**sizes, "AFFINE": True}, modulate.OPTIONS)
    for kind, quantised, capabilities in _QUANTISED:
        constants, small = {**sizes, **quantised, "QUANTISED": True}, types | {"out": f"*{kind}"}
        yield Case(f"add_gated_modulate, {kind}", kernel, small, constants, modulate.OPTIONS, capabilities)


def _linear() -> Iterator[Case]:
    from kernels.linear import triton_impl as linear

    bf16 = triton.language.bfloat16
    for kind, quantised, capabilities in _QUANTISED:
        types = {"x": "*bf16", "values": f"*{kind}", "scales": "*fp32", "x_row": "i32"}
        sizes = {"K": 4096, "WIDE": 4096, **quantised}
        yield Case(f"quantise rows, {kind}", linear.quantise_kernel, types, sizes, linear.ROW_OPTIONS, capabilities)
    # Newer cards take pointers only for rows that are not aligned.
    for kernel, name, x_type, (tiles, options), capabilities in (
        (linear.quantised_kernel, "int8 product (tma)", "i8", linear.QUANTISED_TMA, (90, 120)),
        (linear.quantised_kernel, "int8 product (tma), 10.0", "i8", linear.QUANTISED_TMA_10, (100,)),
        (linear.quantised_kernel, "int8 product (pointers)", "i8", linear.QUANTISED, (80, 89, 90)),
        (linear.weight_only_kernel, "weight-only int8 (tma)", "bf16", linear.WEIGHT_ONLY_TMA, _WITH_DESCRIPTORS),
        (linear.weight_only_kernel, "weight-only int8 (pointers)", "bf16", linear.WEIGHT_ONLY, (80, 89, 90)),
    ):
        descriptors = "(tma)" in name
        types = dict.fromkeys(("m", "n", "k"), "i32")
        types |= {"x_scale": "*fp32", "weight_scale": "*fp32", "bias": "*bf16", "out": "*bf16"}
        types |= {"x": f"*{x_type}", "weight": "*i8"}
        if descriptors:
            types["x"] = f"tensordesc<{x_type}[{tiles['BM']}, {tiles['BK']}]>"
            types["weight"] = f"tensordesc<i8[{tiles['BN']}, {tiles['BK']}]>"
        types = {arg: types[arg] for arg in kernel.arg_names if arg in types}
        sizes = {**tiles, "GROUP": 8, "BIAS": True, "TMA": descriptors, "TYPE": bf16}
        yield Case(name, kernel, types, sizes, options, capabilities, True, descriptors)


def cases() -> list[Case]:
    gluon = [*_dense_attention(), *_hopper_block_sparse(), *_hopper_products()]
    return [*gluon, *_attention(True), *_attention(False), *_gating(), *_rows(), *_linear()]


def _line(case: Case, capability: int, options: dict[str, Any]) -> tuple[str, list[str]]:
    """A row of the table, and what is wrong with it."""
    figures = compile_case(case, capability, **options)
    used = {**case.options, **options}
    text = (
        f"| {case.name} | {capability} | {used['num_warps']} | {used['num_stages']} "
        f"| {used.get('maxnreg', '-')} | {figures.registers} | {figures.spills} | {figures.shared_bytes / 1024:.1f} "
        f"| {figures.wgmma} | {figures.bulk_copies} |"
    )
    return text, figures.faults(case, capability)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="also stages 1-2 and maxnreg 128/168 of the attention")
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    parser.add_argument("--capability", type=int, choices=CAPABILITIES, help="only this one")
    arguments = parser.parse_args()
    print(f"Triton {triton.__version__}")
    print("| kernel | sm | warps | stages | maxnreg | registers | spilled bytes | shared KiB | wgmma | bulk copies |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    bad = []
    for case in cases():
        for capability in case.capabilities:
            if arguments.only not in case.name or arguments.capability not in (None, capability):
                continue
            text, faults = _line(case, capability, {})
            print(text, flush=True)
            bad += [f"{case.name}, sm_{capability}: {fault}" for fault in faults]
            if arguments.sweep and capability == 90 and case.descriptors and not case.overlapped:
                for stages in (1, 2):
                    for limit in ({}, {"maxnreg": 128}, {"maxnreg": 168}):
                        print(_line(case, 90, {"num_stages": stages, **limit})[0], flush=True)
    print("\n".join(bad) if bad else "no spills; wgmma and bulk copies where they belong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
