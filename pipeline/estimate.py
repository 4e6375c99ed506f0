"""How long a plan will take and how much it will store, before anything runs.

Contract: pure arithmetic on tasks. Seconds come from the checkpoint's measured `task_seconds` for the device
kind, else from the published figures of LongCat-Video on one H800 (93 frames at 480x832 with 16 distilled
steps: 61.3 s; refining 189 frames at 704x1280: 142.0 - 61.3 s; report, table 2), scaled by pixels and by
forward passes. Figures for texts, sources, encodes and the film are our own rough ones. An estimate promises
nothing.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from pipeline.facts import Facts, RenderFacts
from pipeline.plan_checks import nearest_size
from pipeline.tasks import Task

PUBLISHED_SECONDS = {"text": 1.0, "source": 3.0, "segment": 61.3, "window": 80.7, "encode": 12.0, "film": 5.0}
PUBLISHED_STAGE_ONE_PX = 480 * 832
PUBLISHED_REFINED_PX = 704 * 1280
PUBLISHED_ENCODE_FRAMES = 160
TEXT_BYTES = 4 << 20
BITS_PER_PX = {"h264": 0.12, "hevc": 0.08, "av1": 0.06, "prores": 4.5, "ffv1": 10.0}
WORKER_COUNTS = (1, 2, 4, 8, 16)
SPARE_BYTES = 64 << 20
COPIES = 1.5
"""The film lies there as units, as film, and as film so far; attempts that fail leave something, too."""


@dataclass(frozen=True)
class Estimate:
    """Seconds on the workers assumed in `basis`, and bytes in the store."""

    basis: str
    total_s: float
    """Work of all tasks together."""
    critical_path_s: float
    """The longest chain of tasks that wait for each other: no number of workers is faster."""
    makespan_s: Mapping[int, float]
    """Seconds until the film, for numbers of workers; loading and changes of role left out."""
    disk_bytes: int
    bytes_by_task: Mapping[str, int]

    def needed_bytes(self, left: Iterable[Task]) -> int:
        """Space to have free before these tasks begin; asking a little too much beats a full disk."""
        return math.ceil(SPARE_BYTES + COPIES * sum(self.bytes_by_task[task.id] for task in left))


def with_work(tasks: Mapping[str, Task], facts: Facts) -> dict[str, Task]:
    """The same tasks with `work` filled in."""
    measured = facts.checkpoint.render.task_seconds.get(facts.device, {})
    return {
        name: replace(task, work=_seconds(task, measured, facts.checkpoint.render))
        for name, task in tasks.items()
    }


def estimate(tasks: Mapping[str, Task], facts: Facts) -> Estimate:
    """Of tasks that have their `work`, upstream before downstream."""
    measured = facts.device in facts.checkpoint.render.task_seconds
    basis = f"measured on {facts.device}" if measured else "published for one H800, scaled"
    ranks = _ranks(tasks)
    stored = {name: _stored_bytes(task, tasks, facts.checkpoint.render) for name, task in tasks.items()}
    return Estimate(
        basis,
        sum(task.work for task in tasks.values()),
        max(ranks.values(), default=0.0),
        {count: _makespan(tasks, ranks, count) for count in WORKER_COUNTS},
        sum(stored.values()),
        stored,
    )


def _seconds(task: Task, measured: Mapping[str, float], render: RenderFacts) -> float:
    base = measured.get(task.kind, PUBLISHED_SECONDS[task.kind])
    is_measured = task.kind in measured
    if task.kind == "segment":
        return base * _px_share(task, render, is_measured) * _forwards(task) / _draft_forwards(render)
    if task.kind == "window":
        return base * _px_share(task, render, is_measured)
    if task.kind == "encode":
        decoded = len(task.params["layers"]) * int(task.params["frames"])
        return base * decoded / PUBLISHED_ENCODE_FRAMES
    return base


def _px_share(task: Task, render: RenderFacts, is_measured: bool) -> float:
    """The task's pixels over those of the picture that its base figure is for."""
    is_window = task.kind == "window"
    base_px = PUBLISHED_REFINED_PX if is_window else PUBLISHED_STAGE_ONE_PX
    if is_measured:
        width, height = map(int, render.default_aspect.split(":"))
        base = nearest_size(render.refined_sizes if is_window else render.stage_one_sizes, height / width)
        base_px = base.height_px * base.width_px
    return float(task.params["height_px"] * task.params["width_px"] / base_px)


def _forwards(task: Task) -> int:
    return int(task.params["schedule"]["steps"]) * (2 if task.params["guidance"] > 1 else 1)


def _draft_forwards(render: RenderFacts) -> int:
    draft = render.quality.draft
    return draft.steps * (2 if draft.guidance > 1 else 1)


def _ranks(tasks: Mapping[str, Task]) -> dict[str, float]:
    """For each task, the seconds from its beginning to the end of the film at the earliest."""
    after = dict.fromkeys(tasks, 0.0)
    for name in reversed(list(tasks)):
        after[name] += tasks[name].work
        for upstream in tasks[name].inputs:
            after[upstream] = max(after[upstream], after[name])
    return after


def _makespan(tasks: Mapping[str, Task], ranks: Mapping[str, float], workers: int) -> float:
    """List scheduling by rank on equal workers."""
    waiting = {name: len(task.inputs) for name, task in tasks.items()}
    users: dict[str, list[str]] = {name: [] for name in tasks}
    for name, task in tasks.items():
        for upstream in task.inputs:
            users[upstream].append(name)
    ready = [(-ranks[name], name) for name, count in waiting.items() if count == 0]
    heapq.heapify(ready)
    running: list[tuple[float, str]] = []
    now = 0.0
    while ready or running:
        while ready and len(running) < workers:
            _, name = heapq.heappop(ready)
            heapq.heappush(running, (now + tasks[name].work, name))
        now, done = heapq.heappop(running)
        for name in users[done]:
            waiting[name] -= 1
            if waiting[name] == 0:
                heapq.heappush(ready, (-ranks[name], name))
    return now


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
