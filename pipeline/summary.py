"""What a person sees of a render: counts and seconds for each kind of task, and the expected rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.crew import Job, Worker
from pipeline.events import PhaseProgress
from pipeline.graph import TaskGraph
from pipeline.tasks import CommitRecord, Task, TaskKind


@dataclass
class Tally:
    """What the finished tasks of one kind have cost."""

    work_s: float = 0.0
    seconds: float = 0.0
    frames: int = 0

    def add(self, task: Task, record: CommitRecord) -> None:
        """Count one committed task."""
        self.work_s += task.work
        self.seconds += record.seconds
        self.frames += int(record.measures.get("frames", 0))


def phase_progress(kind: TaskKind, graph: TaskGraph, jobs: Iterable[Job], tally: Tally) -> PhaseProgress:
    """One kind of task."""
    tasks = [task for task in graph.tasks.values() if task.kind == kind]
    running = [job for job in jobs if job.order.task.kind == kind]
    return PhaseProgress(
        total=len(tasks),
        done=sum(task.id not in graph.wanted for task in tasks),
        running=len(running),
        failed=sum(task.id in graph.dead for task in tasks),
        frames=tally.frames + sum(job.frames for job in running),
        work_total_s=sum(task.work for task in tasks),
        work_done_s=tally.work_s,
        seconds_spent=tally.seconds,
    )


def activity(worker: Worker, tasks: Mapping[str, Task]) -> str:
    """What a worker is doing, in a few words."""
    if worker.loading_since_s is not None:
        return f"loading {worker.role}"
    if worker.task_id is None:
        return f"idle ({worker.role})" if worker.role else "idle"
    task = tasks.get(worker.task_id)
    return (task.label if task else "") or worker.task_id


def expected_rest_s(graph: TaskGraph, tallies: Mapping[TaskKind, Tally], workers: int) -> float | None:
    """Expected seconds left: all work over all workers, but no shorter than the longest chain.

    The plan's seconds are scaled by what tasks of the same kind have taken. None before anything was measured.
    """
    spent_s = sum(tally.seconds for tally in tallies.values())
    work_s = sum(tally.work_s for tally in tallies.values())
    if not spent_s or not work_s or not workers:
        return None
    chains_s: defaultdict[str, float] = defaultdict(float)
    total_s = 0.0
    for task_id in graph.wanted - graph.dead:
        task = graph.tasks[task_id]
        tally = tallies.get(task.kind)
        pace = tally.seconds / tally.work_s if tally and tally.work_s else spent_s / work_s
        total_s += task.work * pace
        if task_id in graph.chain_of:
            chains_s[graph.chain_of[task_id]] += task.work * pace
    return max([total_s / workers, *chains_s.values()])
