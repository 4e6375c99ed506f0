"""How much work a plan is and how much it will store, before anything runs.

Contract: pure arithmetic on tasks. Seconds are those of the facts' pace (pipeline/pace.py), scaled by pixels and by
forward passes; how they add up on a number of workers is for pipeline/forecast.py to say. An estimate promises nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from pipeline.facts import Facts, RenderFacts
from pipeline.pace import PUBLISHED_ENCODE_FRAMES, PUBLISHED_REFINED_PX, PUBLISHED_STAGE_ONE_PX, Pace
from pipeline.plan_checks import nearest_size
from pipeline.tasks import Task

TEXT_BYTES = 4 << 20
BITS_PER_PX = {"h264": 0.12, "hevc": 0.08, "av1": 0.06, "prores": 4.5, "ffv1": 10.0}
SPARE_BYTES = 64 << 20
COPIES = 1.5
"""The film lies there as units, as film, and as film so far; attempts that fail leave something, too."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of the workers named in `basis`, and bytes in the store."""

    basis: str
    total_s: float
    """Work of all tasks together."""
    critical_path_s: float
    """The longest chain of tasks that wait for each other: no number of workers is faster."""
    disk_bytes: int
    bytes_by_task: Mapping[str, int]

    def needed_bytes(self, left: Iterable[Task]) -> int:
        """Space to have free before these tasks begin; asking a little too much beats a full disk."""
        return math.ceil(SPARE_BYTES + COPIES * sum(self.bytes_by_task[task.id] for task in left))


def with_work(tasks: Mapping[str, Task], facts: Facts) -> dict[str, Task]:
    """The same tasks with `work` filled in."""
    pace, render = facts.pace, facts.checkpoint.render
    return {name: replace(task, work=_seconds(task, pace, render)) for name, task in tasks.items()}


def estimate(tasks: Mapping[str, Task], facts: Facts) -> Estimate:
    """Of tasks that have their `work`, upstream before downstream."""
    stored = {name: _stored_bytes(task, tasks, facts.checkpoint.render) for name, task in tasks.items()}
    return Estimate(
        facts.pace.basis,
        sum(task.work for task in tasks.values()),
        critical_path_s(tasks),
        sum(stored.values()),
        stored,
    )


def critical_path_s(tasks: Mapping[str, Task]) -> float:
    """Seconds of the longest chain of `tasks` that wait for each other; inputs that are not among them are there."""
    after: dict[str, float] = {}
    for task in tasks.values():
        after[task.id] = task.work + max((after[i] for i in task.inputs if i in after), default=0.0)
    return max(after.values(), default=0.0)


def _seconds(task: Task, pace: Pace, render: RenderFacts) -> float:
    base, is_measured = pace.of(task.kind)
    if task.kind == "segment":
        return base * _px_share(task, render, is_measured) * _forwards(task) / _draft_forwards(render)
    if task.kind == "window":
        return base * _px_share(task, render, is_measured)
    if task.kind == "encode":
        # From the first latent on, whatever is shown of them.
        decoded: int = sum(max(stop for _, stop, _ in layer["ranges"]) for layer in task.params["layers"])
        return base * _px_share(task, render, is_measured) * decoded / PUBLISHED_ENCODE_FRAMES
    return base


def _px_share(task: Task, render: RenderFacts, is_measured: bool) -> float:
    """The task's pixels over those of the picture that its base figure is for."""
    is_refined = task.kind in ("window", "encode")
    base_px = PUBLISHED_REFINED_PX if is_refined else PUBLISHED_STAGE_ONE_PX
    if is_measured:
        width, height = map(int, render.default_aspect.split(":"))
        base = nearest_size(render.refined_sizes if is_refined else render.stage_one_sizes, height / width)
        base_px = base.height_px * base.width_px
    return float(task.params["height_px"] * task.params["width_px"] / base_px)


def _forwards(task: Task) -> int:
    return int(task.params["schedule"]["steps"]) * (2 if task.params["guidance"] > 1 else 1)


def _draft_forwards(render: RenderFacts) -> int:
    draft = render.quality.draft
    return draft.steps * (2 if draft.guidance > 1 else 1)


def _stored_bytes(task: Task, tasks: Mapping[str, Task], render: RenderFacts) -> int:
    params = task.params
    if task.kind == "text":
        return TEXT_BYTES
    if task.kind == "film":
        return sum(_stored_bytes(tasks[name], tasks, render) for name in task.inputs)
    picture = int(params["height_px"] * params["width_px"])
    if task.kind == "encode":
        return int(params["frames"] * picture * BITS_PER_PX[params["codec"]["codec"]] / 8)
    if task.kind == "source":
        return max(1, len(params["times_s"])) * picture * 3
    latents = params["noise"]["count"]
    stored = latents * render.latent_channels * 4 * picture // render.vae_spatial**2
    tail = params["tail_frames"] if task.kind == "segment" else _length(params["tail"])
    return int(stored + tail * picture * 3)


def _length(part: list[int] | None) -> int:
    return part[1] - part[0] if part else 0
