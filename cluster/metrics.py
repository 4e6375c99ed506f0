"""What an orchestrator tells Prometheus, through Ray's own exporter (`ray.util.metrics`).

METRICS is the whole vocabulary; the dashboard in `cluster/manifests/grafana.json` shows it. Labels are stages,
states and kinds, never renders, tasks or workers: their number must not grow with what is rendered. In
Prometheus every name begins with `ray_`.

Ray forgets a gauge that is not set any more. A farm knows a price and counts costs; for renders without one the
dashboard multiplies `longtake_worker_seconds_total` by a price that its reader types in. `Meters` is what a render of
its own tells; a farm speaks for all its renders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pipeline.events import ProgressSummary

LOOK_S = 5.0
BUCKETS_S = [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 90.0, 120.0, 180.0, 300.0, 600.0, 1200.0, 3600.0]
STATES = ("busy", "loading", "idle")


@dataclass(frozen=True)
class Described:
    """One metric."""

    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()


METRICS: Mapping[str, Described] = {
    "longtake_task_seconds": Described(
        "histogram", "Seconds of each task, by how it ended: committed, lost.", ("stage", "outcome")
    ),
    "longtake_frames_total": Described("counter", "Frames denoised, refined or encoded.", ("stage",)),
    "longtake_retries_total": Described("counter", "Tasks that came to nothing.", ("stage",)),
    "longtake_workers_lost_total": Described("counter", "Workers whose process or machine went away."),
    "longtake_tasks_waiting": Described("gauge", "Tasks that are neither done nor running.", ("stage",)),
    "longtake_tasks_running": Described("gauge", "Tasks that workers have.", ("stage",)),
    "longtake_workers": Described("gauge", "Workers by what they do.", ("state",)),
    "longtake_worker_seconds_total": Described("counter", "Seconds of all workers by what they did.", ("state",)),
    "longtake_renders": Described("gauge", "Renders of a farm in each phase.", ("phase",)),
    "longtake_gpu_busy_fraction": Described("gauge", "Share of a farm's workers that compute."),
    "longtake_cost_total": Described("counter", "What a farm's renders have cost, by its price."),
}


OF_A_RENDER = tuple(METRICS)[:8]
"""What a render without a farm tells."""
OF_A_RENDER_ALONE = ("longtake_worker_seconds_total",)
"""What a farm does not: it knows a price, and the dashboard adds this to its costs."""


class Instrument(Protocol):
    """What is used of Ray's Counter, Gauge and Histogram."""

    def inc(self, value: float, tags: dict[str, str]) -> None: ...

    def set(self, value: float, tags: dict[str, str]) -> None: ...

    def observe(self, value: float, tags: dict[str, str]) -> None: ...


class Meters:
    """The metrics of one render. `make` builds an instrument for a name of METRICS."""

    def __init__(self, make: Callable[[str], Instrument]) -> None:
        self._instruments = {name: make(name) for name in OF_A_RENDER}
        self._frames: dict[str, int] = {}
        self._looked_s: float | None = None

    def event(self, event: Mapping[str, Any]) -> None:
        """Something happened, as the orchestrator tells it."""
        match event["event"]:
            case "committed":
                labels = {"stage": stage_of(event["task"]), "outcome": "committed"}
                self._of("longtake_task_seconds").observe(event["seconds"], labels)
            case "failed":
                self._of("longtake_retries_total").inc(1, {"stage": stage_of(event["task"])})
            case "worker_lost":
                self._of("longtake_workers_lost_total").inc(1, {})

    def look(self, summary: ProgressSummary, now_s: float) -> None:
        """Where things stand now; what has passed since the last look is counted as if it had been so."""
        for stage, phase in summary.phases.items():
            labels = {"stage": str(stage)}
            self._of("longtake_tasks_waiting").set(phase.waiting, labels)
            self._of("longtake_tasks_running").set(phase.running, labels)
            new = phase.frames - self._frames.get(stage, 0)
            if new > 0:
                self._of("longtake_frames_total").inc(new, labels)
                self._frames[stage] = phase.frames
        passed_s = 0.0 if self._looked_s is None else max(0.0, now_s - self._looked_s)
        self._looked_s = now_s
        for state, count in count_states(summary.workers).items():
            self._of("longtake_workers").set(count, {"state": state})
            if count and passed_s:
                self._of("longtake_worker_seconds_total").inc(count * passed_s, {"state": state})

    def _of(self, name: str) -> Instrument:
        return self._instruments[name]


def stage_of(task_id: str) -> str:
    """The kind of task that an id names: ids are `<kind>-<digits>`."""
    return task_id.rpartition("-")[0]


def count_states(workers: Mapping[str, str]) -> dict[str, int]:
    """How many workers are in each state, by what `ProgressSummary.workers` says of each."""
    counts = dict.fromkeys(STATES, 0)
    for activity in workers.values():
        word = activity.split(" ")[0]
        counts[word if word in ("loading", "idle") else "busy"] += 1
    return counts


def ray_instrument(name: str) -> Instrument:
    """Ray's instrument for a name of METRICS."""
    from ray.util.metrics import Counter, Gauge, Histogram

    described = METRICS[name]
    common = {"description": described.text, "tag_keys": described.labels}
    made: Any
    if described.kind == "histogram":
        made = Histogram(name, boundaries=BUCKETS_S, **common)
    else:
        made = (Counter if described.kind == "counter" else Gauge)(name, **common)
    instrument: Instrument = made
    return instrument
