"""What each role needs of a card's memory, and of the host's, before anything runs.

Contract: pure arithmetic on a plan and the sizes of its networks. All is in bf16, as on GPUs, and estimated; what was
measured of it stands in docs/kernels.md. The formulas follow what `model.footprint` counts when the real network runs
without memory, and are held to that by a test. With E = 2 bytes a number, W the width, F that of the feed-forward part,
N tokens to denoise, M tokens in the condition cache, P = min(N, 40960), B samples at once (2 with guidance):

    cache       2 E W layers M
    attention   E W B (4 N + 2 (M + N)), while it is made E W B (3 N + 2 (M + N) + 5 P);
                up to 40960 tokens E W B (8 N + 2 (M + N)), without a cache E W B 8 N
    feed-forward   E B (3 N W + P (3 F + W)), from the second part on E B (4 N W + min(P, N - P) (3 F + W))
    decoding    125 bytes for each pixel and unit of the VAE's base width

What a role has at most is its weights and the larger of a pass (cache, and the larger of attention and feed-forward)
and of decoding a latent frame. Left out: the CUDA context (about 0.5 GB), scratch of libraries, fragments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.facts import REFINE_GRANULARITY, RenderFacts
from pipeline.spec import Memory
from pipeline.tasks import Role, Task
from pipeline.times import format_bytes

NUMBER_BYTES = 2
PART_TOKENS = 40_960
DECODE_BYTES = 125
"""For each pixel of a frame and unit of the VAE's base width."""
LEAST = Memory(precision="weight_only", networks="in_turn", condition_cache="host")
"""The setting that needs least of a card."""


@dataclass(frozen=True)
class NetworkSizes:
    """The networks of a checkpoint, by default the official ones. Widths in channels, weights in numbers."""

    width: int = 4096
    depth: int = 48
    heads: int = 32
    ffn: int = 11_008
    caption: int = 4096
    timestep: int = 512
    frequencies: int = 256
    channels: int = 16
    patch: int = 2
    is_int8: bool = False
    """The transformer's files are int8."""
    text_weights: int = 5_680_910_336
    vae_weights: int = 126_892_531
    vae_width: int = 96


@dataclass(frozen=True)
class RoleMemory:
    """Bytes that a role needs: `weights` of its transformer or text encoder, `vae`, `cache` of conditions, what a
    `denoising` pass and `decoding` hold beside them, and at most at once on the `card` and in the `host`'s memory.
    """

    role: Role
    weights: int
    vae: int
    cache: int
    denoising: int
    decoding: int
    card: int
    host: int

    def describe(self) -> str:
        """In one line for a person; what is nothing is left out."""
        names = ("weights", "vae", "cache", "denoising", "decoding")
        parts = ", ".join(f"{name} {format_bytes(getattr(self, name))}" for name in names if getattr(self, name))
        host = f", host {format_bytes(self.host)}" if self.host else ""
        return f"{self.role}: card {format_bytes(self.card)}{host} ({parts})"


@dataclass(frozen=True)
class _Pass:
    """Tokens to denoise and in the cache, samples at once, and whether attention is block-sparse."""

    tokens: int
    cached: int
    samples: int
    is_sparse: bool


def needs(tasks: Iterable[Task], sizes: NetworkSizes, render: RenderFacts, memory: Memory) -> tuple[RoleMemory, ...]:
    """What the roles that these tasks have need at most. `media` can be done by all roles with a VAE."""
    tasks = list(tasks)
    pictures = [task for task in tasks if task.kind in ("segment", "window")]
    most_px = max((task.params["height_px"] * task.params["width_px"] for task in pictures), default=0)
    vae, decoding = sizes.vae_weights * NUMBER_BYTES, DECODE_BYTES * sizes.vae_width * most_px
    found = []
    if any(task.role == "text" for task in tasks):
        text = sizes.text_weights * NUMBER_BYTES
        found.append(RoleMemory("text", text, 0, 0, 0, 0, text, 0))
    by_role: dict[Role, list[_Pass]] = {}
    for task in pictures:
        by_role.setdefault(task.role, []).append(_pass_of(task, render, sizes.patch))
    for role, passes in by_role.items():
        found.append(_role(role, passes, sizes, memory, vae, decoding))
    if any(task.role == "media" for task in tasks):
        found.append(RoleMemory("media", 0, vae, 0, 0, decoding, vae + decoding, 0))
    return tuple(found)


def _role(
    role: Role, passes: Iterable[_Pass], sizes: NetworkSizes, memory: Memory, vae: int, decoding: int
) -> RoleMemory:
    weights = transformer_bytes(sizes, memory)
    on_card, waits = memory.condition_cache == "card", memory.networks == "in_turn"
    each = {one: (cache_bytes(sizes, one.cached), pass_bytes(sizes, one)) for one in passes}
    cache, denoising = max(each.values(), key=lambda pair: pair[1] + (pair[0] if on_card else 0))
    most_cache = max(kept for kept, _ in each.values())
    page_locked = max(page_locked_bytes(sizes, one.cached) for one in each)
    turn = weights + denoising + (cache if on_card else 0)
    card = max(turn, vae + decoding) if waits else max(turn + vae, weights + vae + decoding)
    host = (0 if on_card else page_locked) + (weights + vae if waits else 0)
    return RoleMemory(role, weights, vae, most_cache, denoising, decoding, card, host)


def _pass_of(task: Task, render: RenderFacts, patch: int) -> _Pass:
    params = task.params
    cell_px = render.vae_spatial * patch
    space = (params["height_px"] // cell_px) * (params["width_px"] // cell_px)
    if task.kind == "segment":
        cached = _latents(params["condition_frames"], render)
        samples = 2 if params["guidance"] > 1 else 1
    else:
        given = 0 if params["condition"] is None else params["condition"]["frames"]
        cached = math.ceil(_latents(given, render) / REFINE_GRANULARITY) * REFINE_GRANULARITY
        samples = 1
    latents = params["noise"]["count"] - cached
    return _Pass(latents * space, cached * space, samples, params["weights"]["attention"] == "block_sparse")


def _latents(frames: int, render: RenderFacts) -> int:
    return 1 + -(-(frames - 1) // render.vae_temporal) if frames else 0


def cache_bytes(sizes: NetworkSizes, tokens: int) -> int:
    """Keys and values of so many tokens, all layers."""
    return 2 * NUMBER_BYTES * sizes.width * sizes.depth * tokens


def page_locked_bytes(sizes: NetworkSizes, tokens: int) -> int:
    """Of the host's memory for the same: torch makes page-locked blocks as large as the next power of two, and each
    layer's keys and values are one each.
    """
    block = NUMBER_BYTES * sizes.width * tokens
    return 2 * sizes.depth * (1 << (block - 1).bit_length() if block else 0)


def pass_bytes(sizes: NetworkSizes, one: _Pass) -> int:
    """What a forward pass holds at most beside weights and cache."""
    n, m, part = one.tokens, one.cached, min(one.tokens, PART_TOKENS)
    row = NUMBER_BYTES * one.samples * sizes.width
    if n > PART_TOKENS:
        attention = row * (2 * (m + n) + 3 * n + max(n, 5 * part))
    else:
        attention = row * (8 * n + (2 * (m + n) if m else 0))
    wide = NUMBER_BYTES * one.samples * (3 * sizes.ffn + sizes.width)
    feed_forward = max(row * 3 * n + wide * part, row * 4 * n + wide * min(part, n - part))
    rotary = 4 * n * (sizes.width // sizes.heads) * (2 if one.is_sparse else 1)
    return max(attention, feed_forward) + rotary


def transformer_bytes(sizes: NetworkSizes, memory: Memory) -> int:
    """Weights of one role's transformer under this precision."""
    w, head = sizes.width, sizes.width // sizes.heads
    values = sizes.patch**2 * sizes.channels
    large = [(3 * w, w, 1), (w, w, 1), (w, w, 1), (w, w, 1), (sizes.ffn, w, 0), (sizes.ffn, w, 0), (w, sizes.ffn, 0)]
    small = [(6 * w, sizes.timestep, 1), (2 * w, w, 1)]
    once = [
        (sizes.timestep, sizes.frequencies, 1), (sizes.timestep, sizes.timestep, 1),
        (w, sizes.caption, 1), (w, w, 1), (2 * w, sizes.timestep, 1),
    ]  # fmt: skip
    plain = sizes.depth * (4 * head + 2 * w) + (values * w + w) + (values * w + values)
    small_are_int8 = sizes.is_int8 or memory.precision == "weight_only"
    large_are_8_bit = small_are_int8 or memory.precision in ("int8", "fp8")
    large_bytes = sizes.depth * sum(_linear_bytes(*linear, narrow=large_are_8_bit) for linear in large)
    rest = [*(sizes.depth * small), *once]
    return NUMBER_BYTES * plain + large_bytes + sum(_linear_bytes(*linear, narrow=small_are_int8) for linear in rest)


def _linear_bytes(rows: int, columns: int, bias: int, *, narrow: bool) -> int:
    """A Linear; in 8 bits it has an fp32 scale for each row."""
    weight = rows * columns + 4 * rows if narrow else NUMBER_BYTES * rows * columns
    return weight + NUMBER_BYTES * bias * rows


def too_small(found: Iterable[RoleMemory], least: Mapping[Role, RoleMemory], card_bytes: int) -> list[str]:
    """For each role that a card of this size cannot do, in words, what it needs and whether LEAST would help."""
    lines = []
    for need in found:
        if need.card <= card_bytes:
            continue
        other = least[need.role].card
        line = f"{need.role} does not fit on a card of {card_bytes / 1e9:g} GB: about {format_bytes(need.card)}"
        if other < need.card:
            setting = "memory: {" + ", ".join(f"{name}: {value}" for name, value in LEAST.model_dump().items()) + "}"
            verdict = "which fits" if other <= card_bytes else "which does not fit either"
            line += f"; with `{setting}` it is about {format_bytes(other)}, {verdict}"
        lines.append(line)
    return lines
