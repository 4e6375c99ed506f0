"""How a render will go on a number of workers: the real machine, run against a clock that jumps.

Contract: pure. The machine decides here as it does in a render; workers, nodes and the store are stand-ins that take
the seconds of a `Pace`. Nothing fails but spot nodes, which are taken away at moments drawn from an exponential
distribution, so a forecast promises nothing.

A node has the weights of a role after it fetched them once; workers of the node that want them meanwhile wait for the
same fetch. A cluster is held, and paid for, from the asking for its first node to the end of the command. What a spot
node denoises when it goes is saved, as after a notice, SAVE_S before; other tasks begin again, and another node is
asked for at once.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from pipeline.crew import SAVE_S
from pipeline.estimate import critical_path_s
from pipeline.events import (
    AssignRole,
    Command,
    Commit,
    Committed,
    Dispatch,
    Event,
    Finish,
    TaskProduced,
    Tick,
    WorkerJoined,
    WorkerLost,
    WorkerReady,
)
from pipeline.ledger import LedgerState
from pipeline.machine import Machine
from pipeline.pace import Pace
from pipeline.tasks import CommitRecord, Order, Produced, Role, Task, TaskKind

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
DRAWS = ((1000, 5), (3000, 3))
"""How often the moments at which spot nodes go are drawn anew, by the number of tasks; once for still more: chance
evens out over a long film, and each course takes its seconds.
"""
SAVED: tuple[TaskKind, ...] = ("segment", "window")
"""Kinds that go on from their last saved step."""


@dataclass(frozen=True)
class Fleet:
    """The workers of a forecast. `node_s`: seconds until a node is there; 0 for one that is. `has_weights`: on disk.

    `stable`: how many are on nodes that stay, None for all. Each other node is taken away after `life_s` on average.
    """

    workers: int
    per_node: int = 8
    node_s: float = 0.0
    has_weights: bool = True
    stable: int | None = None
    life_s: float = math.inf

    @property
    def spot(self) -> int:
        """How many workers are on nodes that may be taken away."""
        return 0 if self.stable is None else max(0, self.workers - self.stable)

    def node_of(self, place: int) -> str:
        """The node on which the n-th worker is; those on stable nodes come first."""
        stable = self.workers - self.spot
        return f"n{place // self.per_node}" if place < stable else f"s{(place - stable) // self.per_node}"


@dataclass(frozen=True)
class Stretch:
    """What a worker did from when to when: ran a task, or loaded a role (`task_id` is empty then)."""

    worker: int
    start_s: float
    stop_s: float
    role: Role
    task_id: str = ""


@dataclass(frozen=True)
class Phase:
    """One kind of task: when its first began, when its last was committed, and how many workers had it at once."""

    kind: TaskKind
    tasks: int
    work_s: float
    start_s: float
    stop_s: float
    most_workers: int


@dataclass(frozen=True)
class Forecast:
    """One render on one fleet. Seconds count from the command."""

    fleet: Fleet
    makespan_s: float
    """Until the command ends."""
    ready_s: float
    """Until the first task began: nodes, weights, processes, loading."""
    finish_s: float
    """From the film's commit to the end."""
    critical_path_s: float
    work_s: float
    stretches: tuple[Stretch, ...]
    phases: tuple[Phase, ...]
    nodes_lost: float = 0.0
    """Spot nodes that were taken away; on average, where several courses were drawn."""
    slowest_s: float = 0.0
    """The longest makespan of all that were drawn."""
    draws: int = 1

    @property
    def busy(self) -> float:
        """Share of the workers' time, from the command to its end, in which they run tasks."""
        return self.work_s / (self.fleet.workers * self.makespan_s) if self.makespan_s else 0.0

    @property
    def workers_used(self) -> int:
        """Workers that ran any task."""
        return len({stretch.worker for stretch in self.stretches if stretch.task_id})

    def staff(self) -> dict[Role, float]:
        """Workers by role, on average over the time in which tasks ran; loading counts for the role loaded."""
        span_s = self.makespan_s - self.finish_s - self.ready_s
        spent_s: Counter[Role] = Counter()
        for stretch in self.stretches:
            spent_s[stretch.role] += max(0.0, stretch.stop_s - max(stretch.start_s, self.ready_s))  # type: ignore[assignment]
        return {role: seconds / span_s for role, seconds in spent_s.items()} if span_s > 0 else {}

    def limit(self) -> str:
        """What keeps it from being faster, in words."""
        run_s = self.makespan_s - self.ready_s - self.finish_s
        if run_s <= self.ready_s:
            return "starting: nodes, weights, loading"
        if self.critical_path_s >= 0.8 * run_s:
            return "the chain: tasks that wait for each other"
        return "the number of workers"

    def on(self, fleet: Fleet) -> Forecast | None:
        """The same render on that fleet, where it is known to go the same way: of a fleet that nobody takes away, the
        last workers never had anything to do, and both have all the others. None if that cannot be said.

        Workers of such a fleet come at once and are asked in order of their places. The first that finds nothing to do
        leaves everything as it is, so the next one finds as little, and the machine counts workers by role: one
        without a role counts for nobody.
        """
        used = 1 + max((stretch.worker for stretch in self.stretches), default=-1)
        idle = self.fleet.workers > used
        if not idle or fleet.workers < used or fleet.spot or self.fleet.spot:
            return None
        return replace(self, fleet=fleet) if replace(fleet, workers=self.fleet.workers) == self.fleet else None

    def cost(self, price_per_hour: float, spot_price_per_hour: float | None = None) -> float:
        """Of holding all workers to the end; the prices are those of one, on a stable and on a spot node."""
        spot_price = price_per_hour if spot_price_per_hour is None else spot_price_per_hour
        rate = (self.fleet.workers - self.fleet.spot) * price_per_hour + self.fleet.spot * spot_price
        return rate * self.makespan_s / 3600


def forecast(
    tasks: Mapping[str, Task], commits: Mapping[str, CommitRecord], pace: Pace, fleet: Fleet, film_frames: int = 0
) -> Forecast:
    """Run the rest of a render. `tasks` have their `work`; `commits` are what is done already.

    With spot nodes several times: the course of median length.
    """
    left = len(tasks) - len(commits)
    several = next((draws for most, draws in DRAWS if left <= most), 1)
    draws = several if fleet.spot and fleet.life_s < math.inf else 1
    courses = [_Simulation(tasks, commits, pace, fleet, draw).run(film_frames) for draw in range(draws)]
    courses.sort(key=lambda one: one.makespan_s)
    lost = sum(one.nodes_lost for one in courses) / draws
    return replace(courses[draws // 2], nodes_lost=lost, slowest_s=courses[-1].makespan_s, draws=draws)


def smallest(done_in: Callable[[int], float], limit_s: float, most: int) -> int | None:
    """The least number of workers that are done within `limit_s`, up to `most`; None if that many are not."""
    if done_in(most) > limit_s:
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if done_in(middle) <= limit_s else (middle, high)
    return high


@dataclass(frozen=True)
class _NodeTaken:
    """The `incarnation`-th machine of a spot node is taken away, and these workers with it."""

    now_s: float
    node: str
    places: Sequence[int]
    incarnation: int


class _Simulation:
    def __init__(
        self, tasks: Mapping[str, Task], commits: Mapping[str, CommitRecord], pace: Pace, fleet: Fleet, draw: int = 0
    ) -> None:
        self._tasks, self._pace, self._fleet = tasks, pace, fleet
        self._left = {name: task for name, task in tasks.items() if name not in commits}
        self._machine = Machine(tasks, LedgerState(commits=dict(commits)), epoch=1)
        self._due: list[tuple[float, int, Event | _NodeTaken]] = []
        self._now_s, self._told, self._over = 0.0, 0, False
        self._draw = draw
        self._cached_s: dict[tuple[str, Role], float] = {}
        self._stretches: list[Stretch] = []
        self._roles: dict[str, Role] = {}
        self._nodes: dict[str, str] = {}
        """Of workers that are there."""
        self._doing: dict[str, int] = {}
        """Worker -> its last stretch."""
        self._saved_s: Counter[str] = Counter()
        """Of a task's work: what was done before its node was taken away."""
        self._nodes_lost = 0

    def run(self, film_frames: int) -> Forecast:
        self._feed(Tick(0.0))
        places: defaultdict[str, list[int]] = defaultdict(list)
        for place in range(self._fleet.workers):
            places[self._fleet.node_of(place)].append(place)
        for node, on_it in places.items():
            self._ask_for(node, on_it, self._pace.start_s, incarnation=0)
        while self._due and not self._over:
            self._now_s, _, event = heapq.heappop(self._due)
            if isinstance(event, WorkerJoined):
                self._nodes[event.worker_id] = event.node_id
            elif isinstance(event, WorkerReady | TaskProduced) and event.worker_id not in self._nodes:
                # Its node was taken away meanwhile.
                continue
            elif isinstance(event, _NodeTaken):
                self._take_away(event)
                continue
            self._feed(event)
        return self._forecast(film_frames)

    def _ask_for(self, node: str, places: Sequence[int], at_s: float, incarnation: int) -> None:
        """The workers of a node, from when it is there until it is taken away. A worker is `place.incarnation`."""
        there_s, spot = at_s + self._fleet.node_s, node.startswith("s")
        joined_s, node_id = there_s + self._pace.join_s, f"{node}.{incarnation}"
        for place in places:
            self._later(joined_s, WorkerJoined(joined_s, f"{place}.{incarnation}", node_id, spot=spot))
        if spot and self._fleet.life_s < math.inf:
            life_s = random.Random(f"{self._draw} {node_id}").expovariate(1 / self._fleet.life_s)
            taken_s = max(joined_s, there_s + life_s - SAVE_S)
            self._later(taken_s, _NodeTaken(taken_s, node, places, incarnation))

    def _take_away(self, taken: _NodeTaken) -> None:
        self._nodes_lost += 1
        for place in taken.places:
            worker = f"{place}.{taken.incarnation}"
            del self._nodes[worker]
            if worker in self._doing:
                at = self._doing.pop(worker)
                stretch = self._stretches[at]
                if stretch.stop_s > self._now_s:
                    self._stretches[at] = replace(stretch, stop_s=self._now_s)
                    if stretch.task_id and self._tasks[stretch.task_id].kind in SAVED:
                        self._saved_s[stretch.task_id] += self._now_s - stretch.start_s  # type: ignore[assignment]
            self._feed(WorkerLost(self._now_s, worker, "taken away", node_lost=True))
        self._ask_for(taken.node, taken.places, self._now_s, taken.incarnation + 1)

    def _feed(self, event: Event) -> None:
        pending = [event]
        while pending:
            for command in self._machine.handle(pending.pop(0)):
                if answer := self._carry_out(command):
                    pending.append(answer)

    def _carry_out(self, command: Command) -> Event | None:
        match command:
            case AssignRole():
                self._load(command.worker_id, command.role)
            case Dispatch():
                self._work(command.worker_id, command.order)
            case Commit():
                return Committed(self._now_s, command.record)
            case Finish():
                self._over = True
        return None

    def _load(self, worker: str, role: Role) -> None:
        there_s = self._now_s
        if not self._fleet.has_weights:
            place = (self._nodes[worker], role)
            there_s = self._cached_s.setdefault(place, self._now_s + self._pace.fetch_s.get(role, 0.0))
        ready_s = max(self._now_s, there_s) + self._pace.load_s.get(role, 0.0)
        self._roles[worker] = role
        self._begin(worker, Stretch(_place_of(worker), self._now_s, ready_s, role))
        self._later(ready_s, WorkerReady(ready_s, worker, role))

    def _work(self, worker: str, order: Order) -> None:
        done_s = self._now_s + order.task.work - self._saved_s[order.task.id]
        self._begin(worker, Stretch(_place_of(worker), self._now_s, done_s, self._roles[worker], order.task.id))
        produced = Produced((), {}, order.task.work, worker)
        self._later(done_s, TaskProduced(done_s, worker, order.task.id, order.attempt, order.epoch, produced))

    def _begin(self, worker: str, stretch: Stretch) -> None:
        self._doing[worker] = len(self._stretches)
        self._stretches.append(stretch)

    def _later(self, at_s: float, event: Event | _NodeTaken) -> None:
        self._told += 1
        heapq.heappush(self._due, (at_s, self._told, event))

    def _forecast(self, film_frames: int) -> Forecast:
        ran = [stretch for stretch in self._stretches if stretch.task_id]
        finish_s = self._pace.finish_s + self._pace.finish_s_per_frame * film_frames
        return Forecast(
            fleet=self._fleet,
            makespan_s=max((stretch.stop_s for stretch in ran), default=self._pace.start_s) + finish_s,
            ready_s=min((stretch.start_s for stretch in ran), default=self._pace.start_s),
            finish_s=finish_s,
            critical_path_s=critical_path_s(self._left),
            work_s=sum(task.work for task in self._left.values()),
            stretches=tuple(self._stretches),
            phases=self._phases(ran),
            nodes_lost=self._nodes_lost,
        )

    def _phases(self, ran: list[Stretch]) -> tuple[Phase, ...]:
        by_kind: defaultdict[TaskKind, list[Stretch]] = defaultdict(list)
        for stretch in ran:
            by_kind[self._tasks[stretch.task_id].kind].append(stretch)
        return tuple(
            Phase(
                kind,
                len({one.task_id for one in of_kind}),
                sum(one.stop_s - one.start_s for one in of_kind),
                min(one.start_s for one in of_kind),
                max(one.stop_s for one in of_kind),
                _most_at_once(of_kind),
            )
            for kind, of_kind in by_kind.items()
        )


def _place_of(worker: str) -> int:
    return int(worker.partition(".")[0])


def _most_at_once(stretches: list[Stretch]) -> int:
    turns = sorted([(one.start_s, 1) for one in stretches] + [(one.stop_s, -1) for one in stretches])
    return max(accumulate(change for _, change in turns))
