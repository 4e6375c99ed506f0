"""Speed of the kernels at the sizes of the real model: `python -m kernels.bench [--only NAME]`. Needs a GPU.

Each kernel is first compared with fp64 on random inputs, its output poisoned beforehand, beside the same
computation in eager bf16. A kernel whose error is above twice eager bf16's gets no speed, and the command
fails. Ratios compare times of one run on one card. `python -m model.bench --size full` prints these rows and those of
the whole network.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention import api as attention
from kernels.attention import reference as attention_reference
from kernels.block_sparse_attention import reference as bsa_reference
from kernels.dispatch import capability, dense_attention, dense_of_torch, has_gluon
from kernels.linear import api as linear
from kernels.linear import reference as linear_reference
from kernels.modulate import api as modulate
from kernels.modulate import reference as modulate_reference
from kernels.norm_rope import api as norm_rope
from kernels.norm_rope import reference as norm_rope_reference
from kernels.swiglu import api as swiglu

DEVICE = "cuda"
HEADS, SIZE, WIDTH, INNER = 32, 128, 4096, 11008
TOKENS_480P, TOKENS_720P = 24 * 30 * 52, 48 * 44 * 80
SPARSITY, BLOCK = 0.9375, 64
TEXT_ROWS = 512
# Batch, heads, queries, keys and head size with which the errors of dense attention are found.
DENSE_SHAPES = (
    (1, HEADS, TOKENS_480P, TOKENS_480P, SIZE),
    (2, 3, 1000, 1337, SIZE),
    (2, 3, 129, 255, SIZE),
    (1, 2, 4096, 128, 64),
    (3, 2, 333, 777, 64),
)
ALLOWED_ERROR_RATIO = 2.0
LEAST_CAPABILITY = (8, 0)
_CHECKED_ROWS = 64
_WAIT_CYCLES = 2_000_000  # about a millisecond


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. `wanted`: the target as words; `met`: None where there is none."""

    what: str
    result: str
    wanted: str = ""
    met: bool | None = None

    def text(self) -> str:
        verdict = {None: "", True: "met", False: "missed"}[self.met]
        return f"| {self.what} | {self.result} | {self.wanted} | {verdict} |"


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Largest errors against fp64, relative to its largest value."""

    kernel: float
    eager: float

    @property
    def admitted(self) -> bool:
        return self.kernel <= ALLOWED_ERROR_RATIO * self.eager  # False for NaN

    def text(self) -> str:
        return f"error {self.kernel:.1e}, eager bf16 {self.eager:.1e}"


def compare(kernel: Tensor, eager: Tensor, exact: Tensor) -> Accuracy:
    """Accuracy of two results against an fp64 one."""
    largest = exact.abs().max()
    errors = [float((out.double() - exact).abs().max() / largest) for out in (kernel, eager)]
    return Accuracy(*errors)


def refusal(what: str, accuracy: Accuracy) -> Row:
    """The row of a kernel that is not exact enough: it has no speed."""
    return Row(what, f"refused: {accuracy.text()}", f"at most {ALLOWED_ERROR_RATIO:g} x eager", False)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New tensors are full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Deterministic algorithms fill what `torch.empty` returns: it is their default.
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a call on the card, without the time that the host takes to launch it."""
    for _ in range(min(3, repeats)):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The card waits while the host puts the whole call into its queue.
        torch.cuda._sleep(_WAIT_CYCLES)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.float32).to(dtype)


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 2 GiB."""
    source = torch.empty(2**30, dtype=torch.int16, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() * 2 / seconds(lambda: target.copy_(source))


# -- block-sparse attention -------------------------------------------------------------------------------


def attention_rows() -> Iterator[Row]:
    from kernels.block_sparse_attention import triton_impl as bsa

    q, k, v = (F.rms_norm(normal(1, HEADS, TOKENS_720P, SIZE, seed=s), (SIZE,)) for s in range(3))
    descriptors = torch.cuda.get_device_capability() >= (9, 0)
    blocks = TOKENS_720P // BLOCK
    top = bsa_reference.blocks_to_keep(blocks, SPARSITY)
    flops = 4 * HEADS * SIZE * TOKENS_720P * top * BLOCK
    means = bsa.block_means(q, BLOCK), bsa.block_means(k, BLOCK)
    kept, counts = bsa.choose_blocks(*means, top=top, cdf_threshold=None)
    bound = _bound(SIZE)

    ways = _ways(q, k, v, kept, counts, bsa.Tiles(BLOCK, BLOCK, descriptors))
    fastest: float | None = None
    shifts = (("fixed shift", bound), ("running maximum", None))
    for (name, attend), (shift, limit) in itertools.product(ways.items(), shifts):
        what = f"block-sparse attention forward, {TOKENS_720P} tokens, sparsity {SPARSITY}, {name}, {shift}"
        with poisoned():
            accuracy = _attention_accuracy(attend(limit)[0], q, k, v, kept)
        if not accuracy.admitted:
            yield refusal(what, accuracy)
            continue
        time = seconds(functools.partial(attend, limit))
        rate = flops / time / 1e12
        yield Row(what, f"{time * 1e3:.1f} ms, {rate:.0f} TFLOP/s; {accuracy.text()}", "400 TFLOP/s", rate >= 400)
        fastest = time if fastest is None else min(time, fastest)
    if fastest is None:
        return
    yield _flash_row(q, k, v, fastest)
    yield _flex_row(q, k, v, kept, counts, fastest)
    yield from _gating_rows(q, k, top, fastest)


def _ways(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, counts: Tensor, tiles: Any
) -> dict[str, Callable[[float | None], tuple[Tensor, Tensor]]]:
    """What can compute the forward pass here, under the bound that it is given."""
    from kernels.block_sparse_attention import triton_impl as bsa

    ways: dict[str, Callable[[float | None], tuple[Tensor, Tensor]]] = {}
    if has_gluon(capability(q)):
        from kernels.block_sparse_attention import gluon_impl

        ways["gluon"] = lambda limit: gluon_impl.launch_forward(q, k, v, kept, counts, limit)
    for stages in (2, 3):
        options = {**bsa.FORWARD_OPTIONS, "num_stages": stages}
        launch = functools.partial(bsa.launch_forward, q, k, v, kept, counts, tiles, options=options)
        ways[f"triton, stages {stages}"] = lambda limit, launch=launch: launch(bound=limit)  # type: ignore[misc]
    return ways


def _attention_accuracy(out: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Accuracy:
    """On query blocks drawn from the real run: all heads, first and last blocks among them."""
    blocks = torch.randint(0, kept.shape[2], (_CHECKED_ROWS,), generator=torch.Generator().manual_seed(1)).tolist()
    heads = [i % HEADS for i in range(_CHECKED_ROWS)]
    blocks[0], blocks[-1] = 0, kept.shape[2] - 1
    results: dict[torch.dtype, list[Tensor]] = {torch.float64: [], torch.bfloat16: []}
    for head, block in zip(heads, blocks, strict=True):
        rows = (kept[0, head, block].long()[:, None] * BLOCK + torch.arange(BLOCK, device=DEVICE)).flatten()
        for dtype, parts in results.items():
            query = q[0, head, block * BLOCK : (block + 1) * BLOCK].to(dtype)
            near_k, near_v = k[0, head, rows].to(dtype), v[0, head, rows].to(dtype)
            parts.append((query @ near_k.T * SIZE**-0.5).softmax(-1) @ near_v)
    seen = [out[0, h, b * BLOCK : (b + 1) * BLOCK] for h, b in zip(heads, blocks, strict=True)]
    return compare(torch.stack(seen), torch.stack(results[torch.bfloat16]), torch.stack(results[torch.float64]))


def _flash_row(q: Tensor, k: Tensor, v: Tensor, fastest: float) -> Row:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        dense = seconds(lambda: F.scaled_dot_product_attention(q, k, v), repeats=3)
    ratio = dense / fastest
    return Row("the same beside dense flash attention", f"{ratio:.1f} x its speed", "10 x", ratio >= 10)


def _flex_row(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, counts: Tensor, fastest: float) -> Row:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    wide = F.pad(kept, (0, k.shape[2] // BLOCK - kept.shape[-1]))
    nothing = torch.zeros_like(counts), torch.zeros_like(wide)
    mask = BlockMask.from_kv_blocks(*nothing, counts, wide, BLOCK_SIZE=BLOCK)
    flex = torch.compile(flex_attention)
    options: Any = {"BLOCK_M": BLOCK, "BLOCK_N": BLOCK}
    with torch.no_grad():
        time = seconds(lambda: flex(q, k, v, block_mask=mask, kernel_options=options), repeats=5)
    ratio = time / fastest
    return Row("the same beside FlexAttention, same blocks", f"{ratio:.1f} x its speed", "2 x", ratio >= 2)


def _gating_rows(q: Tensor, k: Tensor, top: int, attention: float) -> Iterator[Row]:
    from kernels.block_sparse_attention import triton_impl as bsa

    q_means, k_means = bsa.block_means(q, BLOCK), bsa.block_means(k, BLOCK)
    kept, _ = bsa.choose_blocks(q_means, k_means, top=top, cdf_threshold=None)
    scores = q_means[0, -1].double() @ k_means[0, -1].double().T
    best = scores.topk(top).values.sum(-1)
    got = scores.gather(-1, kept[0, -1].long()).sum(-1)
    # Ties and rounding may swap blocks at the border; the mass of what is kept may not suffer.
    loss = float(((best - got) / best.abs()).max())
    if not loss < 1e-4:
        yield Row("gating", f"refused: the blocks kept lose {loss:.1e} of the best score", "1e-4", False)
        return
    time = seconds(lambda: bsa.choose_blocks(q_means, k_means, top=top, cdf_threshold=None))
    pooling = seconds(lambda: (bsa.block_means(q, BLOCK), bsa.block_means(k, BLOCK)))
    share = time / attention
    result = f"{time * 1e3:.2f} ms, {share:.1%} of attention"
    yield Row("gating, means from norm_rope", result, "10 %", share <= 0.10)
    share = (time + pooling) / attention
    yield Row("gating with its own block means", f"{(time + pooling) * 1e3:.2f} ms, {share:.1%}", "10 %", share <= 0.10)


# -- dense attention --------------------------------------------------------------------------------------


def dense_rows() -> Iterator[Row]:
    """The kernel at 480p beside what torch takes. It has to be exact enough at odd sizes too."""
    q, k, v = _dense_inputs(1, HEADS, TOKENS_480P, TOKENS_480P, SIZE)
    flops = 4 * HEADS * SIZE * TOKENS_480P**2
    plain = seconds(lambda: attention_reference.attend(q, k, v), repeats=10)
    name = dense_of_torch("cuda", torch.bfloat16)
    what = f"dense attention, {TOKENS_480P} tokens"
    yield Row(f"{what}, torch ({name})", f"{plain * 1e3:.1f} ms, {flops / plain / 1e12:.0f} TFLOP/s")
    if attention.backend(q, k, v) != "gluon":
        return
    for shift, bounded in (("fixed shift", True), ("running maximum", False)):
        accuracies = [_dense_accuracy(*shape, bounded) for shape in DENSE_SHAPES]
        refused = [accuracy for accuracy in accuracies if not accuracy.admitted]
        if refused:
            yield refusal(f"{what}, gluon, {shift}", refused[0])
            continue
        bound = _bound(SIZE) if bounded else None
        time = seconds(lambda bound=bound: attention.attend(q, k, v, logit_bound=bound), repeats=10)  # type: ignore[misc]
        result = f"{time * 1e3:.1f} ms, {flops / time / 1e12:.0f} TFLOP/s, {plain / time:.2f} x torch's speed"
        yield Row(f"{what}, gluon, {shift}", f"{result}; {accuracies[0].text()}")


def _bound(size: int) -> float:
    """After RMSNorm no logit exceeds D^1/2 (weights of one); a little more for the rounding to bf16."""
    return 1.01 * size**0.5


def _dense_inputs(batch: int, heads: int, queries: int, keys: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """As a layer has them: rows [B,N,H,D] of norms, and values that are a part of a fused product."""
    q = F.rms_norm(normal(batch, queries, heads, size), (size,))
    k = F.rms_norm(normal(batch, keys, heads, size, seed=1), (size,))
    v = normal(batch, keys, 3, heads, size, seed=2)[:, :, 2]
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _dense_accuracy(batch: int, heads: int, queries: int, keys: int, size: int, bounded: bool) -> Accuracy:
    """The first and the last queries of the first and the last head."""
    q, k, v = _dense_inputs(batch, heads, queries, keys, size)
    with poisoned():
        out = attention.attend(q, k, v, logit_bound=_bound(size) if bounded else None)
    rows = torch.cat([torch.arange(min(256, queries)), torch.arange(max(0, queries - 256), queries)]).to(DEVICE)
    seen = [(0, 0), (batch - 1, heads - 1)]
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        near = [(q[at][rows].to(dtype), k[at].to(dtype), v[at].to(dtype)) for at in seen]
        results.append(torch.stack([(a @ b.T * size**-0.5).softmax(-1) @ c for a, b, c in near]))
    return compare(torch.stack([out[at][rows] for at in seen]), *results)


# -- passes over rows -------------------------------------------------------------------------------------


def bandwidth_row(what: str, accuracy: Accuracy, call: Callable[[], object], moved_bytes: int, copy: float) -> Row:
    """A kernel that should be limited by memory alone: its share of the bandwidth of a copy."""
    if not accuracy.admitted:
        return refusal(what, accuracy)
    time = seconds(call)
    rate = moved_bytes / time
    result = f"{time * 1e3:.3f} ms, {rate / 1e12:.2f} TB/s, {rate / copy:.0%} of copy; {accuracy.text()}"
    return Row(what, result, "75 % of copy", rate >= 0.75 * copy)


def row_rows() -> Iterator[Row]:
    copy = copy_bandwidth()
    yield Row("copy (read + write)", f"{copy / 1e12:.2f} TB/s")
    for tokens in (TOKENS_480P, TOKENS_720P):
        yield _norm_rope_row(tokens, copy)
        yield from _modulate_rows(tokens, copy)
        yield _swiglu_row(tokens, copy)


def _norm_rope_row(tokens: int, copy: float) -> Row:
    x = normal(1, tokens, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)[0]
    weight = 1 + normal(SIZE, seed=1) / 10
    angles = 100 * normal(tokens, SIZE // 2, dtype=torch.float32, seed=2)
    table = torch.stack((angles.cos(), angles.sin()), -1).contiguous()
    index = torch.randperm(tokens, device=DEVICE).int()
    block = BLOCK if tokens % BLOCK == 0 else None
    with poisoned(), torch.no_grad():
        out, _ = norm_rope.norm_rope(x, weight, table, index=index, block=block)
    some = slice(tokens - 512, tokens)
    exact = norm_rope_reference.norm_rope(x[:, :, some].double(), weight.double(), table.double(), index[some], 1e-6)
    eager = norm_rope_reference.norm_rope(x[:, :, some], weight, table, index[some], 1e-6)
    accuracy = compare(out[:, :, some], eager, exact)
    name = "norm_rope, with means" if block else "norm_rope"
    with torch.no_grad():
        return bandwidth_row(
            f"{name}, {tokens} tokens",
            accuracy,
            lambda: norm_rope.norm_rope(x, weight, table, index=index, block=block),
            2 * tokens * WIDTH * 2,
            copy,
        )


def _modulate_rows(tokens: int, copy: float) -> Iterator[Row]:
    x, update = normal(1, tokens, WIDTH), normal(1, tokens, WIDTH, seed=1)
    frames = 48 if tokens == TOKENS_720P else 24
    shift, scale, gate = (normal(1, frames, WIDTH, dtype=torch.float32, seed=s) for s in (2, 3, 4))
    index = (torch.arange(tokens, device=DEVICE) * frames // tokens).int()
    some = slice(tokens - 512, tokens)
    with poisoned():
        out = modulate.modulate(x, shift, scale, index=index)
        summed, both = modulate.add_gated_modulate(x, gate, update, shift, scale, index=index)
    assert isinstance(out, Tensor) and isinstance(both, Tensor)
    part, more, at = x[:, some], update[:, some], index[some]
    exact = modulate_reference.modulate(part.double(), shift.double(), scale.double(), at, 1e-6)
    eager = modulate_reference.modulate(part, shift, scale, at, 1e-6)
    yield bandwidth_row(
        f"modulate, {tokens} tokens",
        compare(out[:, some], eager, exact),
        lambda: modulate.modulate(x, shift, scale, index=index),
        2 * tokens * WIDTH * 2,
        copy,
    )
    exact_sum = modulate_reference.add_gated(part.double(), gate.double(), more.double(), at)
    exact = modulate_reference.modulate(exact_sum, shift.double(), scale.double(), at, 1e-6)
    eager_sum = modulate_reference.add_gated(part, gate, more, at)
    eager = modulate_reference.modulate(eager_sum, shift, scale, at, 1e-6)
    accuracy = compare(summed[:, some], eager_sum, exact_sum)
    after = compare(both[:, some], eager, exact)
    yield bandwidth_row(
        f"add_gated_modulate, {tokens} tokens",
        accuracy if not accuracy.admitted else after,
        lambda: modulate.add_gated_modulate(x, gate, update, shift, scale, index=index),
        4 * tokens * WIDTH * 2,
        copy,
    )


def _swiglu_row(tokens: int, copy: float) -> Row:
    a, b = normal(tokens, 2 * WIDTH).chunk(2, dim=1)
    with poisoned():
        out = swiglu.swiglu(a, b)
    some = slice(tokens - 2048, tokens)
    exact = F.silu(a[some].double()) * b[some].double()
    accuracy = compare(out[some], F.silu(a[some]) * b[some], exact)
    moved = 3 * tokens * WIDTH * 2
    return bandwidth_row(f"swiglu, {tokens} tokens", accuracy, lambda: swiglu.swiglu(a, b), moved, copy)


# -- linear -----------------------------------------------------------------------------------------------


def linear_rows() -> Iterator[Row]:
    """Products of the FFN at 480p beside bf16's. Quantisation itself is not an error of a kernel: exact here
    means fp64 with the same quantised weights (and activations)."""
    x, weight = normal(TOKENS_480P, WIDTH), normal(INNER, WIDTH, seed=1) / WIDTH**0.5
    plain = seconds(lambda: F.linear(x, weight))
    flops = 2 * x.numel() * INNER
    yield Row("linear bf16, 37440 x 4096 x 11008", f"{plain * 1e3:.2f} ms, {flops / plain / 1e12:.0f} TFLOP/s")
    int8, fp8 = linear.quantise_rows(weight, torch.int8)[:2], linear.quantise_weight_fp8(weight)
    yield _linear_row("int8 W8A8", x, int8, plain, activations=torch.int8)
    yield _linear_row("fp8", x, fp8, plain, activations=torch.float8_e4m3fn)
    yield _linear_row("weight-only int8", x, int8, plain)
    few = x[:TEXT_ROWS]
    yield _linear_row("weight-only int8", few, int8, seconds(lambda: F.linear(few, weight)))


def _linear_row(
    name: str, x: Tensor, weight: tuple[Tensor, Tensor], plain: float, *, activations: torch.dtype | None = None
) -> Row:
    """A product of x with a quantised weight beside that of bf16, which takes `plain` seconds."""
    values, scale = weight
    call = linear.linear_weight_only if activations is None else linear.linear_quantised
    runs = linear.backend(x if activations is None else linear.quantise_rows(x, activations), values)
    what = f"linear {name}, {x.shape[0]} x {WIDTH} x {INNER}, backend {runs}"
    with poisoned():
        out = call(x, values, scale)
    some = slice(x.shape[0] - 256, x.shape[0])
    wide = values.double() * scale.double()[:, None]
    inputs = x[some].double()
    if activations is not None:
        rows = linear_reference.quantise_rows(x[some], activations)
        inputs = rows[0].double() * rows[1].double()[:, None]
    accuracy = compare(out[some], F.linear(inputs.bfloat16(), wide.bfloat16()), inputs @ wide.T)
    if not accuracy.admitted:
        return refusal(what, accuracy)
    time = seconds(functools.partial(call, x, values, scale))
    return Row(what, f"{time * 1e3:.2f} ms, {plain / time:.2f} x bf16's speed; {accuracy.text()}")


PARTS: Mapping[str, Callable[[], Iterator[Row]]] = {
    "dense": dense_rows,
    "attention": attention_rows,
    "rows": row_rows,
    "linear": linear_rows,
}


def rows(only: str | None = None) -> Iterator[Row]:
    """The rows of all parts of the table, or of one."""
    for name, part in PARTS.items():
        if only in (None, name):
            yield from guarded(name, part())


def guarded(what: str, part: Iterator[Row]) -> Iterator[Row]:
    """The rows of a part; the last one says why there are no more, if it ends in an error."""
    try:
        yield from part
    except Exception as error:
        # Whatever it is, out of memory or a kernel that does not compile, must not cost the other parts their rows.
        first_line = (str(error).strip().splitlines() or [""])[0]
        yield Row(what, f"failed: {type(error).__name__}: {first_line[:200]}", met=False)


def lacking() -> str | None:
    """Why nothing can be measured here; None where it can."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU and found none"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    found = torch.cuda.get_device_capability()
    if found < LEAST_CAPABILITY:
        return f"needs a GPU of compute capability 8.0 or more and found {found[0]}.{found[1]}"
    return None


def print_table(command: str, table: Iterator[Row]) -> int:
    """Print a line about chip, versions, date and command, and the table; 1 if anything was refused or failed."""
    import triton

    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, ", end="")
    print(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, ", end="")
    print(f"dense attention: {dense_attention('cuda', torch.bfloat16)}, {datetime.date.today()}, `{command}`")
    print("| what | result | target | |\n|---|---|---|---|")
    missed = False
    for row in table:
        print(row.text(), flush=True)
        missed |= row.result.startswith(("refused", "failed"))
    return 1 if missed else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=tuple(PARTS), help="only this part")
    arguments = parser.parse_args()
    if reason := lacking():
        print(f"kernels.bench {reason}: nothing was measured", file=sys.stderr)
        return 2
    only = f" --only {arguments.only}" if arguments.only else ""
    return print_table(f"python -m kernels.bench{only}", rows(arguments.only))


if __name__ == "__main__":
    sys.exit(main())
