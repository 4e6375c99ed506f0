"""What a farm tells Prometheus for all its renders together: METRICS, less what its price says better."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import get_args

from cluster.metrics import METRICS, OF_A_RENDER_ALONE, Instrument
from pipeline.events import ProgressSummary
from pipeline.farm import Lender
from pipeline.submissions import Phase, SubmissionState
from pipeline.tasks import CommitRecord, TaskKind


class FarmMetrics:
    """One farm's. `make` builds an instrument for a name of METRICS."""

    def __init__(self, make: Callable[[str], Instrument]) -> None:
        self._instruments = {name: make(name) for name in METRICS.keys() - OF_A_RENDER_ALONE}

    def count_task(self, stage: TaskKind, seconds: float, record: CommitRecord | None) -> None:
        """A task has ended; without a record it came to nothing."""
        labels = {"stage": str(stage), "outcome": "committed" if record else "lost"}
        self._instruments["longtake_task_seconds"].observe(max(seconds, 1e-6), labels)
        if record is None:
            self._instruments["longtake_retries_total"].inc(1, {"stage": str(stage)})
        elif frames := record.measures.get("frames", 0):
            self._instruments["longtake_frames_total"].inc(frames, {"stage": str(stage)})

    def count_cost(self, cost: float) -> None:
        """Money was spent."""
        if cost > 0:
            self._instruments["longtake_cost_total"].inc(cost, {})

    def count_lost(self) -> None:
        """A worker was lost."""
        self._instruments["longtake_workers_lost_total"].inc(1, {})

    def show(
        self,
        renders: Iterable[SubmissionState],
        workers: Iterable[Lender],
        progress: Iterable[ProgressSummary],
    ) -> None:
        """How things stand; `progress` of the renders that are open."""
        phases = Counter(state.phase for state in renders)
        for phase in get_args(Phase):
            self._instruments["longtake_renders"].set(phases[phase], {"phase": phase})
        busy: Counter[bool] = Counter()
        for worker in workers:
            busy[bool(worker.render_id)] += worker.size
        for state, count in (("busy", busy[True]), ("idle", busy[False])):
            self._instruments["longtake_workers"].set(count, {"state": state})
        self._instruments["longtake_gpu_busy_fraction"].set(busy[True] / max(1, busy.total()), {})
        waiting: Counter[str] = Counter()
        running: Counter[str] = Counter()
        for summary in progress:
            for stage, phase in summary.phases.items():
                waiting[stage] += phase.waiting
                running[stage] += phase.running
        for stage in get_args(TaskKind):
            # Those of a render that has ended are set, too.
            self._instruments["longtake_tasks_waiting"].set(waiting[stage], {"stage": stage})
            self._instruments["longtake_tasks_running"].set(running[stage], {"stage": stage})
