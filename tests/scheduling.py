"""How well the farm schedules, with stand-in workers that sleep in simulated time: `python -m tests.scheduling`.

The real policy and the real machines decide; tasks take their planned times on an H200. Prints Markdown tables: the
makespan against its bound, max(critical path, work / workers) + the longest task, for 1 to 64 workers and 1 to 20
renders, and what deciding costs, with many tasks and many renders as well. `--plot FILE` draws one of them as SVG.
Exit code 1 if a bound is broken.
"""

from __future__ import annotations

import argparse
import heapq
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.farm import Borrower, Queued, open_next
from pipeline.graph import ranks_s
from pipeline.plots import Bar, bar_chart
from pipeline.tasks import Task
from tests.test_farm import SimulatedFarm, film, worker

WORKERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
LOAD_S = 16.0
"""27.7 GB from a node's disk at 2 GB/s, and a role's code (pipeline/pace.py)."""
QUEUES: Mapping[str, tuple[int, tuple[int, int]]] = {
    "1,000 renders of 12 s": (1000, (1, 12)),
    "20 renders of 60 shots": (20, (60, 16)),
}
"""How many renders, and the film of each."""
DRAWN = "a take and 60 shots", 8
STYLE = """<style>text{font:11px sans-serif;fill:#57606a}.right{text-anchor:end}.middle{text-anchor:middle}
.text{fill:#8250df}.chain{fill:#cf222e}.refine{fill:#0969da}.media{fill:#1a7f37}</style>"""

# Name -> films as (shots, seconds of each shot).
LOADS: Mapping[str, Sequence[tuple[int, int]]] = {
    "1 take of 5 min": [(1, 300)],
    "1 film of 60 shots": [(60, 5)],
    "2 takes of 5 min": [(1, 300)] * 2,
    "a take and 60 shots": [(1, 300), (60, 5)],
    "5 films of 12 shots": [(12, 8)] * 5,
    "10 takes of 1 min": [(1, 60)] * 10,
    "20 mixed": [(1, 300), (60, 5), *[(1, 60)] * 6, *[(6, 8)] * 6, *[(1, 10)] * 6],
    "20 films of 60 shots": [(60, 5)] * 20,
}


@dataclass
class QueuedFarm(SimulatedFarm):
    """A farm with submissions: renders are planned and opened as its policy says."""

    queue: dict[str, tuple[Queued, Mapping[str, Task]]] = field(default_factory=dict)
    decided_s: float = 0.0
    """Processor seconds of the whole run: policy, machines, and this simulation."""
    bars: list[Bar] | None = None
    """What each worker did, if that is wanted."""

    def submit(self, name: str, tasks: Mapping[str, Task], owner: str = "") -> None:
        """Queue a render."""
        self.queue[name] = Queued(name, owner, submitted_s=float(len(self.queue))), tasks

    def run(self) -> float:
        """Until all films are there; the makespan."""
        began_s, films = time.process_time(), len(self.queue)
        while len(self.done) < films:
            self._open()
            self.lend()
            self._note()
            assert self.heap, "nothing runs, and films are missing"
            self.now_s, _, action = heapq.heappop(self.heap)
            action()
            self._note()
        self.decided_s = time.process_time() - began_s
        return self.now_s

    def _open(self) -> None:
        while name := open_next(self.now_s, self._queued(), self._running(), len(self.workers), self._idle()):
            entry, tasks = self.queue.pop(name)
            self.add(name, tasks, owner=entry.owner, submitted_s=entry.submitted_s)

    def _queued(self) -> list[Queued]:
        return [entry for entry, _ in self.queue.values()]

    def _running(self) -> list[Borrower]:
        return [self.borrowers[name] for name in self.machines if name not in self.done]

    def _idle(self) -> int:
        """Free workers for which nothing that is open has a task."""
        free = sum(not one.render_id for one in self.workers.values())
        return free - sum(sum(render.needs.ready.values()) for render in self._running())

    def _note(self) -> None:
        """Draw what workers have begun since the last look."""
        for name, one in self.workers.items() if self.bars is not None else ():
            if one.render_id and one.load and one.until_s > self.now_s and self._drawn.get(name) != one.until_s:
                self._drawn[name] = one.until_s
                words = f"{one.render_id} {one.load.role}"
                self.bars.append(Bar(name, self.now_s, one.until_s, one.load.role, words))

    def __post_init__(self) -> None:
        self._drawn: dict[str, float] = {}


def bound_s(films: Sequence[Mapping[str, Task]], workers: int) -> float:
    """max(critical path, work / workers) + the longest task."""
    path_s = max(max(ranks_s(tasks).values()) for tasks in films)
    work_s = sum(task.work for tasks in films for task in tasks.values())
    return max(path_s, work_s / workers) + max(task.work for tasks in films for task in tasks.values())


def scheduled(
    films: Sequence[Mapping[str, Task]], workers: int, load_s: float = 0.0, *, draw: bool = False
) -> QueuedFarm:
    """A farm that has made these films, submitted at once by three owners."""
    crew = {name: worker(name) for name in (f"w{number:02}" for number in range(workers))}
    farm = QueuedFarm(crew, load_s, bars=[] if draw else None)
    for number, tasks in enumerate(films):
        farm.submit(f"r{number:04}", tasks, owner=f"o{number % 3}")
    farm.run()
    return farm


def films_of(load: str) -> list[Mapping[str, Task]]:
    """The films of one of LOADS."""
    return [film(*shape) for shape in LOADS[load]]


def makespans(load_s: float) -> tuple[list[str], bool, float, float]:
    """Table lines; whether each makespan is within its bound; the most seconds a task and share of a makespan that
    deciding took.
    """
    lines = ["| | " + " | ".join(map(str, WORKERS)) + " |", "|---|" + "---|" * len(WORKERS)]
    within, most_s, most_share = True, 0.0, 0.0
    for load in LOADS:
        films, cells = films_of(load), []
        for workers in WORKERS:
            farm, limit_s = scheduled(films, workers, load_s), bound_s(films, workers)
            within &= farm.now_s <= limit_s + 1e-6
            most_s = max(most_s, farm.decided_s / farm.tasks)
            most_share = max(most_share, farm.decided_s / farm.now_s)
            cells.append(f"{farm.now_s / limit_s:.2f}")
        lines.append(f"| {load} | " + " | ".join(cells) + " |")
    return lines, within, most_s, most_share


def queues() -> list[str]:
    """Table lines about many tasks and many renders on 64 workers."""
    lines = ["| queued | tasks | simulated in, processor | a task | makespan over bound |", "|---|---|---|---|---|"]
    for name, (count, shape) in QUEUES.items():
        films = [film(*shape)] * count
        farm = scheduled(films, 64)
        each_ms, share = 1000 * farm.decided_s / farm.tasks, farm.now_s / bound_s(films, 64)
        lines.append(f"| {name} | {farm.tasks:,} | {farm.decided_s:.1f} s | {each_ms:.2f} ms | {share:.3f} |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; 1 if a makespan is beyond its bound."""
    parser = argparse.ArgumentParser(prog="python -m tests.scheduling", description=__doc__)
    parser.add_argument("--plot", type=Path, help="draw what 8 workers do with a long take and a film of 60 shots")
    options = parser.parse_args(arguments)
    if options.plot:
        bars = scheduled(films_of(DRAWN[0]), DRAWN[1], LOAD_S, draw=True).bars or []
        svg = bar_chart(sorted(bars, key=lambda bar: bar.row))
        svg = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f">{STYLE}", 1)
        options.plot.write_text(svg + "\n")
    free, within, most_s, most_share = makespans(0.0)
    print("Makespan over bound, roles loaded at once:\n", *free, sep="\n")
    print(f"\nDeciding took at most {1000 * most_s:.2f} ms a task and {100 * most_share:.3f} % of a makespan.\n")
    loading, _, _, _ = makespans(LOAD_S)
    print(f"The same with {LOAD_S:.0f} s to load a role, which the bound knows nothing of:\n", *loading, sep="\n")
    print("\nMany at once, 64 workers:\n", *queues(), sep="\n")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
