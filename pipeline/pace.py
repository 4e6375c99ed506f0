"""How fast one kind of worker is: seconds of each kind of task, and of what comes before and after tasks.

Contract: values and pure arithmetic. A pace is, in this order of trust: `calibrated` (`longtake calibrate` on that
hardware), `measured` (`task_seconds` in the checkpoint's `render.json`) or `published`.

Published figures are those of LongCat-Video on one H800 with FlashAttention-3 (report, table 2): 93 frames at 480x832
with 16 distilled steps 61.3 s; refined to 189 frames at 704x1280 with sparse attention 142.0 s, so a window is the
difference. Texts, sources, encodes and the film are our own rough figures. Another GPU's seconds are the H800's divided
by the ratio of the dense bf16 peaks in `GPUS`: large products and attention dominate, and arithmetic bounds them.
That is a little slow for an H200, whose memory is 1.4 times as fast as an H800's, which counts for nothing here, and
too fast for cards on which the models do not fit beside each other (L4, A10G) or FlashAttention-3 does not run (those,
A100, L40S).

Peaks and memory are those of NVIDIA's data sheets, SXM where there is one; of an A10G, which only AWS has, those of the
data sheet that AWS publishes. A data sheet that gives a peak with sparsity alone (L4: 242) means half of that without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import SettingError
from pipeline.tasks import Role

PUBLISHED_SECONDS = {"text": 1.0, "source": 3.0, "segment": 61.3, "window": 80.7, "encode": 12.0, "film": 5.0}
PUBLISHED_STAGE_ONE_PX = 480 * 832
PUBLISHED_REFINED_PX = 704 * 1280
PUBLISHED_ENCODE_FRAMES = 173
"""Decoded for a unit that shows 160: those before its first one, too."""

GpuType = Literal["h200", "h100", "h800", "b200", "a100", "l40s", "l4", "a10g"]


@dataclass(frozen=True)
class Gpu:
    """What is known of one kind of GPU."""

    bf16_tflops: int
    """Dense peak."""
    memory_gb: int
    """As it is sold."""


GPUS: Mapping[str, Gpu] = {
    "h200": Gpu(989, 141),
    "h100": Gpu(989, 80),
    "h800": Gpu(989, 80),
    "b200": Gpu(2250, 180),
    "a100": Gpu(312, 80),
    "l40s": Gpu(362, 48),
    "l4": Gpu(121, 24),
    "a10g": Gpu(70, 24),
}
"""All that plans and manifests know, by GpuType. The machines that carry them are in cluster/manifests/hardware.py,
prices in pipeline/prices.py.
"""

OFFICIAL_BYTES: Mapping[Role, int] = {
    "text": 22_000_000_000,
    "chain": 27_700_000_000,
    "refine": 27_700_000_000,
    "media": 500_000_000,
}
"""Weights that each role reads: UMT5 as released, a role's DiT in bf16 as `checkpoint convert` writes it, the VAE."""

# Our own assumptions about a cluster that nobody has calibrated.
NODE_S = 300.0
"""From asking for a machine to Ray running on it: boot, image."""
FETCH_BYTES_PER_S = 1e9
"""From object storage to a node's disk, digests checked on the way; once for each node."""
READ_BYTES_PER_S = 2e9
"""From a node's disk into a GPU."""
START_S, JOIN_S, LOAD_S = 8.0, 6.0, 2.0
"""The command and its session; a worker's process and libraries; a role's code."""


@dataclass(frozen=True)
class Pace:
    """One kind of worker with one checkpoint. Every figure is in seconds and may be changed alone."""

    basis: str
    """Where the figures come from, for people."""
    seconds: Mapping[str, float] = field(default_factory=lambda: dict(PUBLISHED_SECONDS))
    """By kind of task, from its order to its commit."""
    of_checkpoint: bool = False
    """`seconds` hold for draft quality and the default size of the checkpoint; else for the published pictures."""
    speed: float = 1.0
    """What the published seconds are divided by; those of the checkpoint's own kinds are not."""
    start_s: float = START_S
    """From the command to workers being asked for."""
    join_s: float = JOIN_S
    """From a worker being asked for to its first role, on a node that is there."""
    load_s: Mapping[str, float] = field(default_factory=dict)
    """By role, from a node's disk."""
    fetch_s: Mapping[str, float] = field(default_factory=dict)
    """By role, from the weights' origin to the disk of a node that has not got them."""
    finish_s: float = 0.0
    finish_s_per_frame: float = 0.0
    """From the film's commit to the end of the command; the second for each frame of the film."""

    def of(self, kind: str) -> tuple[float, bool]:
        """Seconds of a kind of task, and whether they hold for the checkpoint's default size."""
        if kind in self.seconds:
            return self.seconds[kind], self.of_checkpoint
        return PUBLISHED_SECONDS[kind] / self.speed, False

    def to_json(self) -> dict[str, Any]:
        """JSON-able; `from_json` reads it back."""
        return vars(self) | {name: dict(getattr(self, name)) for name in ("seconds", "load_s", "fetch_s")}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Pace:
        """What `to_json` wrote."""
        return cls(**value)


def published(gpu_type: str = "h800") -> Pace:
    """The official checkpoint on a kind of GPU. Raises SettingError for one that nothing is known of."""
    if gpu_type not in GPUS:
        raise SettingError(
            "no times are known for it",
            field="--gpu-type",
            value=gpu_type,
            remedy=f"Known are {', '.join(GPUS)}; `longtake calibrate` on such a machine makes others known.",
        )
    speed = GPUS[gpu_type].bf16_tflops / GPUS["h800"].bf16_tflops
    same = "taken as they are" if speed == 1 else f"divided by {speed:.2f}"
    basis = "published for one H800" if gpu_type == "h800" else f"published for one H800, {same}"
    seconds = {kind: value / speed for kind, value in PUBLISHED_SECONDS.items()}
    return with_weights(Pace(basis, seconds, speed=speed), OFFICIAL_BYTES)


def measured(task_seconds: Mapping[str, Mapping[str, float]], device: str, gpu_type: str = "h800") -> Pace:
    """What `render.json` says of a device kind (`cpu`, `cuda`), and the published figures for what it leaves out."""
    pace = published(gpu_type)
    if device not in task_seconds:
        return pace
    return replace(pace, basis=f"measured on {device}", seconds=task_seconds[device], of_checkpoint=True)


def with_weights(pace: Pace, role_bytes: Mapping[Role, int]) -> Pace:
    """The pace with loading and fetching worked out from the bytes each role reads."""
    load_s: dict[str, float] = {role: LOAD_S + size / READ_BYTES_PER_S for role, size in role_bytes.items()}
    fetch_s: dict[str, float] = {role: size / FETCH_BYTES_PER_S for role, size in role_bytes.items()}
    return replace(pace, load_s=load_s, fetch_s=fetch_s)


def role_bytes(folder: Path) -> dict[Role, int]:
    """Bytes of weights that each role reads from a checkpoint folder."""

    def size(*parts: str) -> int:
        return sum(file.stat().st_size for part in parts for file in (folder / part).rglob("*.safetensors"))

    def dit(role: str) -> int:
        return size(f"roles/{role}") or size("dit", "lora")

    vae = size("vae")
    return {"text": size("text_encoder"), "chain": dit("draft") + vae, "refine": dit("refine") + vae, "media": vae}
