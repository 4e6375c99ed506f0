"""Who gets which worker: the farm's policy on its own, and with real machines under a simulated clock."""

from __future__ import annotations

import heapq
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise

import pytest

from pipeline.events import (
    AssignRole,
    Commit,
    Committed,
    Dispatch,
    Event,
    Fault,
    Finish,
    ReturnWorker,
    StopRequested,
    TaskFailed,
    TaskProduced,
    Tick,
    WorkerLent,
    WorkerReady,
)
from pipeline.facts import CheckpointFacts, Facts
from pipeline.farm import Borrower, Growth, Lender, Load, Needs, Queued, gangs_wanted, lend, open_next, workers_wanted
from pipeline.ledger import LedgerState
from pipeline.machine import Machine
from pipeline.plan import plan_film
from pipeline.spec import parse_spec
from pipeline.tasks import Produced, Role, Task

ROLES: tuple[Role, ...] = ("text", "chain", "refine", "media")


def loads(checkpoint: str = "a") -> dict[Role, Load]:
    return {role: Load(checkpoint, role) for role in ROLES}


def worker(name: str, role: Role | None = None, checkpoint: str = "a", **more: object) -> Lender:
    load = Load(checkpoint, role) if role else None
    return Lender(name, f"node-of-{name}", load=load, **more)  # type: ignore[arg-type]


def render(name: str, ready: Mapping[str, int] | None = None, *, checkpoint: str = "a", **more: object) -> Borrower:
    """A render with so many tasks ready; `path_s` and `work_s` are a long film's unless said otherwise."""
    path_s, work_s = more.pop("path_s", 10.0), more.pop("work_s", 1000.0)
    needs = Needs(ready or {}, more.pop("ahead", {}), path_s, work_s)  # type: ignore[arg-type]
    return Borrower(name, loads=loads(checkpoint), needs=needs, **more)  # type: ignore[arg-type]


def lent(workers: list[Lender], *renders: Borrower, now_s: float = 0.0, load_s: float = 60.0) -> dict[str, str]:
    """`render role` by worker."""
    grants = lend(now_s, workers, renders, lambda load: load_s)
    return {grant.worker_id: f"{grant.render_id} {grant.role}{' ahead' * (grant.kind is None)}" for grant in grants}


# Whose turn it is


def test_higher_priority_goes_first_whatever_has_to_be_loaded() -> None:
    low, high = render("low", {"window": 5}, priority=10), render("high", {"window": 5}, checkpoint="b", priority=11)
    assert lent([worker("w", "refine")], low, high) == {"w": "high refine"}


def test_equals_get_equal_shares_and_owners_before_their_renders() -> None:
    workers = [worker(f"w{number}", "refine") for number in range(8)]
    two = lent(workers, *(render(name, {"window": 9}, owner=name) for name in ("a", "b")))
    assert sorted(two.values()) == ["a refine"] * 4 + ["b refine"] * 4
    mine = [render(f"mine{number}", {"window": 9}, owner="me") for number in range(3)]
    split = list(lent(workers, *mine, render("yours", {"window": 9}, owner="you")).values())
    assert split.count("yours refine") == 4
    assert {split.count(f"mine{number} refine") for number in range(3)} == {1, 2}


def test_a_freed_worker_goes_to_the_equal_that_has_fewer() -> None:
    busy = [worker("b1", "refine", render_id="a"), worker("b2", "refine", render_id="a")]
    workers = [*busy, worker("b3", "refine", render_id="b"), worker("w", "refine")]
    assert lent(workers, render("a", {"window": 9}), render("b", {"window": 9})) == {"w": "b refine"}


def test_a_render_never_has_more_workers_than_its_cap() -> None:
    workers = [worker("w0", "refine", render_id="a"), *(worker(f"w{number}", "refine") for number in range(1, 5))]
    assert lent(workers, render("a", {"window": 9}, ahead={"refine": 9}, most_workers=3)).keys() == {"w1", "w2"}


def test_a_paused_render_and_a_draining_worker_get_nothing() -> None:
    assert lent([worker("w", "refine")], render("a", {"window": 9}, paused=True)) == {}
    assert lent([worker("w", "refine", draining=True)], render("a", {"window": 9})) == {}


def test_the_equal_that_would_miss_its_done_by_goes_first() -> None:
    hurried = render("hurried", {"window": 9}, done_by_s=600.0, submitted_s=2.0)
    assert lent([worker("w", "refine")], render("a", {"window": 9}), hurried) == {"w": "hurried refine"}
    in_time = replace(hurried, done_by_s=1e6)
    assert lent([worker("w", "refine")], render("a", {"window": 9}), in_time) == {"w": "a refine"}


def test_a_chain_as_long_as_everything_else_together_goes_before_a_fair_share() -> None:
    workers = [worker("w1", "chain", render_id="long"), worker("w2", "chain", render_id="x"), worker("w3", "chain")]
    short = [render(f"short{number}", {"segment": 1}, work_s=100.0) for number in range(2)]
    long_take = render("long", {"segment": 1}, path_s=900.0, work_s=1000.0)
    assert lent(workers, *short, long_take) == {"w3": "long chain"}
    assert lent(workers, *short, render("long", {"segment": 1}, path_s=300.0)) == {"w3": "short0 chain"}


# Inside a render


def test_texts_then_the_chain_then_units_then_windows() -> None:
    ready = {"text": 1, "segment": 1, "encode": 1, "window": 1}
    workers = [worker("c", "chain"), worker("r1", "refine"), worker("r2", "refine"), worker("t", "text")]
    all_four = lent(workers, render("a", ready))
    assert all_four == {"t": "a text", "c": "a chain", "r1": "a refine", "r2": "a refine"}
    assert lent([worker("w")], render("a", ready)) == {"w": "a text"}
    assert lent([worker("w")], render("a", {**ready, "text": 0})) == {"w": "a chain"}
    assert lent([worker("w", "refine")], render("a", {"encode": 1, "window": 1})) == {"w": "a refine"}


# Gangs

TOGETHER = {**loads(), "chain": Load("a", "chain", gang=2)}
"""What workers of a render that wants gangs of two have loaded."""


def test_segments_go_to_a_gang_of_the_renders_size_and_it_does_nothing_for_others() -> None:
    ready, ahead = {"segment": 1, "window": 1}, {"chain": 1, "refine": 1}
    wants = replace(render("a", ready, ahead=ahead, gang=2), loads=TOGETHER)
    assert lent([worker("g", size=2), worker("w")], wants) == {"g": "a chain", "w": "a refine"}
    alone = lent([worker("w1"), worker("w2")], wants)
    assert alone["w1"] == "a refine" and not any("chain" in what for what in alone.values()), "not even loaded ahead"
    assert lent([worker("g", size=3)], wants) == {}
    assert lent([worker("g", size=2)], render("b", ready, ahead=ahead)) == {}
    text = replace(wants, needs=Needs({"text": 1}, ahead, 10.0, 1000.0))
    assert lent([worker("g", size=2)], text) == {"g": "a text"}, "where there is nobody else"
    assert lent([worker("g", size=2), worker("w")], text)["w"] == "a text"


def test_a_gang_counts_as_its_members() -> None:
    wants = replace(render("a", {"segment": 1}, gang=2, most_workers=2), loads=TOGETHER)
    busy = worker("w", "refine", render_id="a")
    assert lent([worker("g", size=2)], wants) == {"g": "a chain"}
    assert lent([worker("g", size=2), busy], wants) == {}
    assert workers_wanted(0, [replace(wants, most_workers=None, needs=Needs({}, {"chain": 3}, 1.0, 1.0))]) == 6


def test_gangs_are_wanted_while_segments_are_left_and_nobody_of_higher_priority_waits() -> None:
    wants = render("a", ahead={"chain": 3}, gang=2, priority=50)
    assert gangs_wanted([wants, render("b", priority=50)]) == {2: 3}
    assert gangs_wanted([replace(wants, most_workers=5)]) == {2: 2}
    assert gangs_wanted([wants, render("b", priority=51)]) == {}
    assert gangs_wanted([wants, render("b", priority=51, work_s=0.0)]) == {2: 3}
    assert gangs_wanted([replace(wants, paused=True)]) == {}
    assert gangs_wanted([render("a", ahead={"refine": 9}, gang=2)]) == {}


def test_a_film_is_made_by_its_gang_and_by_others_beside_it() -> None:
    farm = SimulatedFarm({"g": worker("g", size=2), "w": worker("w")}, 10.0)
    farm.add("a", film(1, 60), gang=2, loads=TOGETHER)
    farm.add("b", film(1, 10))
    farm.run()
    of_a = [name for kind, name in farm.ran if kind == "segment"]
    assert of_a.count("g") == 12 and of_a.count("w") == 2
    assert ("window", "w") in farm.ran


# What is loaded


def test_a_worker_keeps_its_role_where_an_equal_can_use_it() -> None:
    both = render("a", {"window": 1}), render("b", {"segment": 1}, submitted_s=1.0)
    assert lent([worker("w", "chain")], *both) == {"w": "b chain"}
    assert lent([worker("w", "chain")], *both, load_s=0.0) == {"w": "a refine"}


def test_it_is_loaded_anew_for_an_equal_that_has_waited_ten_times_the_loading() -> None:
    both = render("a", {"window": 1}, checkpoint="b"), render("b", {"segment": 1})
    busy = worker("w1", "chain", render_id="c", until_s=1e6)
    spare = render("c", owner="", work_s=1.0)
    assert lent([worker("w", "chain"), busy], *both, spare, now_s=599.0)["w"] == "b chain"
    assert lent([worker("w", "chain"), busy], *both, spare, now_s=601.0)["w"] == "a refine"


def test_it_is_loaded_anew_at_once_for_an_equal_that_has_not_its_share() -> None:
    mine = [worker(f"w{number}", "refine", render_id="a", until_s=1e6) for number in range(7)]
    other = render("b", {"window": 9}, checkpoint="b", owner="you")
    assert lent([*mine, worker("w", "refine")], render("a", {"window": 9}, owner="me"), other) == {"w": "b refine"}


def test_nothing_is_loaded_while_a_worker_that_has_it_comes_back_sooner() -> None:
    busy = worker("c", "chain", render_id="a", until_s=50.0)
    needs = render("a", {"segment": 1})
    assert lent([busy, worker("w", "refine")], needs) == {}
    assert lent([replace(busy, until_s=70.0), worker("w", "refine")], needs) == {"w": "a chain"}
    assert lent([replace(busy, until_s=-70.0), worker("w", "refine")], needs) == {"w": "a chain"}, "overdue"
    two = render("a", {"segment": 2})
    assert lent([busy, worker("w", "refine")], two) == {"w": "a chain"}


def test_idle_workers_load_ahead_what_will_be_needed_and_no_more() -> None:
    workers = [worker("c", "chain", render_id="a", until_s=1e6), *(worker(f"w{number}") for number in range(4))]
    ahead = render("a", ahead={"chain": 1, "refine": 3})
    assert sorted(lent(workers, ahead).values()) == ["a refine ahead"] * 3
    loaded = [workers[0], *(worker(f"w{number}", "refine") for number in range(3)), worker("w3")]
    assert lent(loaded, ahead) == {}


def test_a_worker_that_came_back_unused_is_not_offered_again_at_once() -> None:
    refused = render("a", {"window": 1}, not_before_s={"w": 2.0})
    assert lent([worker("w", "refine")], refused, now_s=1.0) == {}
    assert lent([worker("w", "refine")], refused, now_s=2.0) == {"w": "a refine"}


def test_a_film_pinned_to_other_numerics_gets_no_worker_that_computes_differently() -> None:
    pinned = render("a", {"window": 2}, ahead={"refine": 2}, numerics="h100")
    assert lent([worker("w", "refine", numerics="a100")], pinned) == {}
    assert lent([worker("w", "refine", numerics="h100")], pinned) == {"w": "a refine"}


# Machines


def test_chains_go_to_stable_machines_and_refinement_to_spot_ones() -> None:
    workers = [worker("spot", spot=True), worker("stable")]
    assert lent(workers, render("a", {"segment": 1, "window": 1})) == {"stable": "a chain", "spot": "a refine"}
    assert lent(workers, render("a", {"window": 1})) == {"spot": "a refine"}
    assert lent([workers[0]], render("a", {"segment": 1})) == {"spot": "a chain"}


def test_a_chain_moves_to_a_stable_machine_that_came_later() -> None:
    workers = [worker("spot", "chain", spot=True), worker("stable")]
    assert lent(workers, render("a", {"segment": 1}))["stable"] == "a chain"


# What is opened, what is asked for


def test_two_renders_a_worker_are_open_the_most_important_first() -> None:
    queue = [Queued("a", submitted_s=1), Queued("b", submitted_s=2), Queued("c", priority=90, submitted_s=3)]
    assert open_next(9, queue, [], 1, 0) == "c"
    assert open_next(9, queue[:2], [render("c", priority=90)], 1, 0) == "a"
    assert open_next(9, queue[1:2], [render("c", priority=90), render("a")], 1, 0) == ""
    assert open_next(9, queue[1:2], [render("c", priority=90), render("a")], 1, idle=1) == "b"
    assert open_next(9, queue[2:], [render("a"), render("b")], 1, 0) == "c", "it does not wait for lesser ones"


def test_nothing_starts_before_its_time_and_owners_take_turns() -> None:
    assert open_next(9, [Queued("a", start_after_s=10)], [], 2, 2) == ""
    assert open_next(10, [Queued("a", start_after_s=10)], [], 2, 2) == "a"
    queue = [Queued("a2", owner="a", submitted_s=1), Queued("b1", owner="b", submitted_s=2)]
    assert open_next(9, queue, [render("a1", owner="a")], 4, 0) == "b1"


def test_demand_is_what_can_be_used_and_ends_with_the_work() -> None:
    assert workers_wanted(2, [render("a", {"text": 1}, ahead={"chain": 1, "refine": 7})]) == 2 + 8
    assert workers_wanted(0, [render("a", ahead={"refine": 7}, most_workers=3)]) == 3
    assert workers_wanted(0, [render("a", work_s=0.0), render("b", {"window": 5}, paused=True)]) == 0


# With real machines


@lru_cache
def film(shots: int, seconds: int) -> Mapping[str, Task]:
    written = [{"id": f"s{number}", "duration": f"{seconds}s", "prompt": "a"} for number in range(shots)]
    spec = parse_spec(json.dumps({"title": "Simulated", "shots": written}))
    return plan_film(spec, Facts(CheckpointFacts("pocket", "d" * 64))).tasks


@dataclass
class SimulatedFarm:
    """Workers that sleep for each task's expected time, machines whose ledger always answers."""

    workers: dict[str, Lender]
    load_s: float = 0.0
    now_s: float = 0.0
    machines: dict[str, Machine] = field(default_factory=dict)
    borrowers: dict[str, Borrower] = field(default_factory=dict)
    done: dict[str, float] = field(default_factory=dict)
    tasks: int = 0
    loadings: int = 0
    ran: list[tuple[str, str]] = field(default_factory=list)
    """Kind of each task, and who had it."""
    heap: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    count: int = 0

    def add(self, name: str, tasks: Mapping[str, Task], **more: object) -> None:
        self.machines[name] = Machine(tasks, LedgerState(), epoch=1)
        about = {"loads": loads(), **more}
        self.borrowers[name] = Borrower(name, **about)  # type: ignore[arg-type]
        self.feed(name, Tick(self.now_s))

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.heap, (self.now_s + delay_s, self.count, action))

    def feed(self, name: str, event: Event) -> None:
        for command in self.machines[name].handle(event):
            match command:
                case AssignRole():
                    self.loadings += 1
                    self.workers[command.worker_id].load = self.borrowers[name].loads[command.role]
                    ready = WorkerReady(0.0, command.worker_id, command.role)
                    self.at(self.load_s, lambda event=ready: self.feed(name, replace(event, now_s=self.now_s)))  # type: ignore[misc]
                case Dispatch():
                    order = command.order
                    self.tasks += 1
                    self.ran.append((order.task.kind, command.worker_id))
                    self.workers[command.worker_id].until_s = self.now_s + order.task.work
                    made = TaskProduced(0.0, command.worker_id, order.task.id, order.attempt, 1, Produced(()))
                    self.at(order.task.work, lambda event=made: self.feed(name, replace(event, now_s=self.now_s)))  # type: ignore[misc]
                case Commit():
                    self.feed(name, Committed(self.now_s, command.record))
                case ReturnWorker():
                    self.workers[command.worker_id].render_id = ""
                case Finish():
                    assert command.exit_code == 0
                    self.done[name] = self.now_s
        self.borrowers[name].needs = self.machines[name].needs()

    def run(self) -> float:
        """Until all films are there; the makespan."""
        while len(self.done) < len(self.machines):
            self.lend()
            assert self.heap, "nothing runs, and films are missing"
            self.now_s, _, action = heapq.heappop(self.heap)
            action()
        return self.now_s

    def lend(self) -> None:
        renders = [self.borrowers[name] for name in self.machines if name not in self.done]
        for grant in lend(self.now_s, list(self.workers.values()), renders, lambda load: self.load_s):
            lender, render = self.workers[grant.worker_id], self.borrowers[grant.render_id]
            loaded = lender.load == render.loads[grant.role]
            lender.render_id, render.served_s = grant.render_id, self.now_s
            lender.until_s = self.now_s + self.load_s * (not loaded)
            node = lender.node_id
            self.feed(grant.render_id, WorkerLent(self.now_s, grant.worker_id, node, grant.role, loaded))


def simulated(workers: int, load_s: float = 0.0) -> SimulatedFarm:
    return SimulatedFarm({f"w{number:02}": worker(f"w{number:02}") for number in range(workers)}, load_s)


def bound_s(films: list[Mapping[str, Task]], workers: int) -> float:
    """max(critical path, work / workers) + the longest task."""
    from pipeline.graph import ranks_s

    path_s = max(max(ranks_s(tasks).values()) for tasks in films)
    work_s = sum(task.work for tasks in films for task in tasks.values())
    return max(path_s, work_s / workers) + max(task.work for tasks in films for task in tasks.values())


@pytest.mark.parametrize("workers", [1, 2, 7, 64])
@pytest.mark.parametrize("films", [((1, 120),), ((12, 10),), ((1, 120), (6, 10), (2, 30)), ((1, 90), *[(1, 10)] * 9)])
def test_the_makespan_is_within_a_task_of_the_best_possible(workers: int, films: tuple[tuple[int, int], ...]) -> None:
    farm = simulated(workers)
    plans = [film(*shape) for shape in films]
    for number, tasks in enumerate(plans):
        farm.add(f"r{number}", tasks, submitted_s=number)
    assert farm.run() <= bound_s(plans, workers)
    assert farm.tasks == sum(len(tasks) for tasks in plans)


def test_one_worker_loads_each_role_once_for_a_long_take() -> None:
    farm = simulated(1, load_s=60.0)
    farm.add("a", film(1, 120))
    farm.run()
    assert farm.loadings == 3, "text, chain, refine"


def test_renders_of_one_checkpoint_hand_loaded_workers_on() -> None:
    farm = simulated(2, load_s=60.0)
    for number in range(4):
        farm.add(f"r{number}", film(1, 30), submitted_s=number)
    farm.run()
    # Alone each film takes three loadings a worker.
    assert farm.loadings <= 8


def test_an_urgent_render_comes_in_after_at_most_a_task() -> None:
    farm = simulated(2)
    farm.add("slow", film(1, 120))
    longest_s = max(task.work for task in film(1, 120).values())
    farm.at(700.0, lambda: farm.add("urgent", film(1, 10), priority=90))
    while "urgent" not in farm.done:
        farm.lend()
        farm.now_s, _, action = heapq.heappop(farm.heap)
        action()
    alone = simulated(2)
    alone.add("urgent", film(1, 10))
    assert farm.done["urgent"] - 700.0 <= alone.run() + longest_s + 1
    farm.run()


def test_lending_costs_far_less_than_a_task() -> None:
    """64 workers and 64 open renders; the bar is 5 ms a task on a quiet machine."""
    farm = simulated(64)
    for number in range(64):
        farm.add(f"r{number}", film(1, 30), owner=f"o{number % 5}", submitted_s=number)
    begun_s = time.process_time()
    farm.run()
    assert (time.process_time() - begun_s) / farm.tasks < 0.02


# The machine and lent workers


def lent_machine() -> Machine:
    machine = Machine(film(1, 10), LedgerState(), epoch=1)
    machine.handle(Tick(0.0))
    return machine


def kinds(commands: list[object]) -> list[str]:
    return [type(command).__name__ for command in commands if type(command).__name__ != "Journal"]


def text_of() -> Task:
    return next(task for task in film(1, 10).values() if task.kind == "text")


def test_a_lent_worker_loads_runs_one_task_and_goes_back() -> None:
    machine, task = lent_machine(), text_of()
    assert kinds(machine.handle(WorkerLent(1.0, "w", "n", "text", loaded=False))) == ["AssignRole"]
    assert kinds(machine.handle(WorkerReady(2.0, "w", "text"))) == ["Dispatch"]
    produced = machine.handle(TaskProduced(3.0, "w", task.id, 1, 1, Produced(())))
    assert kinds(produced) == ["Commit"], "it is not given back before the commit"
    record = next(command.record for command in produced if isinstance(command, Commit))
    assert kinds(machine.handle(Committed(3.0, record))) == ["ReturnWorker"]
    assert kinds(machine.handle(WorkerLent(4.0, "w", "n", "chain", loaded=True))) == ["Dispatch"], "and comes again"


def test_a_lent_worker_with_nothing_to_do_goes_back_at_once() -> None:
    assert kinds(lent_machine().handle(WorkerLent(1.0, "w", "n", "refine", loaded=True))) == ["ReturnWorker"]


def test_a_lent_worker_whose_task_failed_goes_back_and_the_task_is_not_offered_while_it_pauses() -> None:
    machine = lent_machine()
    task, texts = text_of(), machine.needs().ready["text"]
    machine.handle(WorkerLent(1.0, "w", "n", "text", loaded=True))
    assert machine.needs().ready["text"] == texts - 1
    fault = Fault("transient", "no")
    assert "ReturnWorker" in kinds(machine.handle(TaskFailed(2.0, "w", task.id, 1, 1, fault)))
    assert machine.needs().ready["text"] == texts - 1
    for second in range(3, 10):
        machine.handle(Tick(float(second)))
    assert machine.needs().ready["text"] == texts


def test_a_stopping_render_needs_nobody() -> None:
    machine = lent_machine()
    machine.handle(WorkerLent(1.0, "w", "n", "text", loaded=True))
    machine.handle(StopRequested(2.0, 75))
    assert not machine.needs().ready
    assert machine.needs().work_s > 0


def test_what_is_left_shrinks_to_nothing_with_the_film() -> None:
    farm = simulated(3)
    farm.add("a", film(2, 10))
    before = farm.machines["a"].needs()
    windows = sum(task.kind == "window" for task in film(2, 10).values())
    assert before.ahead == {"chain": 2, "refine": windows}
    rests = [before.path_s]
    while farm.heap or not farm.done:
        farm.lend()
        if not farm.heap:
            break
        farm.now_s, _, action = heapq.heappop(farm.heap)
        action()
        rests.append(farm.machines["a"].needs().path_s)
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(rests))
    after = farm.machines["a"].needs()
    assert (after.path_s, round(after.work_s, 6), sum(after.ahead.values())) == (0.0, 0.0, 0)


@pytest.mark.parametrize(("most", "limit_s"), [(1000, 20.0), (64, 400.0), (2, 400.0)])
def test_a_cluster_that_may_not_grow_to_all_that_is_wanted_grows_as_far_as_it_may(most: int, limit_s: float) -> None:
    """An autoscaler that starts nothing if not all can be had, and a minute later what was asked for is there."""
    growth, slots, coming = Growth(), 0, dict[float, int]()
    for now_s in range(int(limit_s)):
        slots = max([slots, *(count for at_s, count in coming.items() if at_s <= now_s)])
        asked = growth.ask(now_s, 500, slots)
        assert asked <= 500
        if slots < asked <= most:
            coming.setdefault(now_s + min(60.0, limit_s / 2), asked)
    assert slots == min(most, 500)


def test_what_is_asked_of_an_autoscaler_is_withdrawn_with_the_queue() -> None:
    growth = Growth()
    assert growth.ask(0.0, 8, 0) == 8
    assert growth.ask(1.0, 3, 8) == 3
    assert growth.ask(2.0, 0, 8) == 0
    assert growth.ask(3.0, 9, 8) == 9
