"""The machine: who does what when, what failures cost, what late events change, how a render ends."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import pytest

from pipeline.errors import (
    DeviceError,
    Interrupted,
    LeaseLost,
    MediaError,
    OutOfMemory,
    QualityError,
    SpecError,
    StoreError,
    StoreFull,
)
from pipeline.errors import WorkerLost as WorkerLostError
from pipeline.events import (
    Asked,
    AssignRole,
    Command,
    Commit,
    CommitRefused,
    Committed,
    Dispatch,
    Event,
    Fault,
    Finish,
    Journal,
    LedgerFailed,
    NodeDraining,
    Note,
    Progress,
    RecycleWorker,
    Refresh,
    Replan,
    RoleFailed,
    StopRequested,
    StopWorkers,
    TaskFailed,
    TaskProduced,
    Tick,
    WorkerJoined,
    WorkerLost,
    WorkerReady,
    fault_of,
)
from pipeline.journal import (
    AttemptFailed,
    AttemptStarted,
    Invalidated,
    JournalEntry,
    PartialSaved,
    RedoRequested,
    RequestTaken,
    TaskReset,
)
from pipeline.ledger import LedgerState
from pipeline.machine import Budgets, Machine, Timeouts
from pipeline.requests import Request
from pipeline.store import corrupt
from pipeline.tasks import ArtifactFile, CommitRecord, Order, Produced, Role, Task, TaskKind

C = TypeVar("C")
ROLE_OF: dict[TaskKind, Role] = {
    "text": "text",
    "source": "media",
    "segment": "chain",
    "window": "refine",
    "encode": "media",
    "film": "media",
}


def task(kind: TaskKind, name: str, inputs: Iterable[Task] = (), priority: int = 0) -> Task:
    ids = tuple(task.id for task in inputs)
    params = {"name": name}
    task_id = Task.identify(kind, params, ids)
    return Task(task_id, kind, ROLE_OF[kind], params, ids, label=name, priority=priority, work=10.0)


def film(chains: int = 1, segments: int = 3, *, refinement: str = "parallel") -> dict[str, Task]:
    """A film of several takes, of the plan's shape: windows over segments, units over windows."""
    prompt, empty = task("text", "prompt"), task("text", "empty")
    made = [prompt, empty]
    units: list[Task] = []
    for chain in "abcdefghijklmnop"[:chains]:
        steps: list[Task] = []
        windows: list[Task] = []
        for index in range(segments):
            before = steps[-1:]
            steps.append(task("segment", f"{chain}/segment/{index}", [prompt, *before], index - segments))
        for index in range(segments if refinement != "none" else 0):
            before = windows[-1:] if refinement == "chained" else []
            inputs = [empty, *steps[max(0, index - 1) : index + 1], *before]
            windows.append(task("window", f"{chain}/window/{index}", inputs, index))
        shown = windows or steps
        for index in range(segments):
            near = shown[max(0, index - 1) : index + 2] if refinement == "parallel" else shown[index : index + 1]
            units.append(task("encode", f"{chain}/unit/{index}", near, index))
        made += [*steps, *windows]
    made += [*units, task("film", "film", units)]
    return {one.id: one for one in made}


def artifact(path: str, content: str = "0") -> ArtifactFile:
    return ArtifactFile(path.rsplit("/", 1)[-1], path, 4, content * 64)


class Studio:
    """Carries a machine's commands out at once, except orders: those wait until the test answers them."""

    def __init__(
        self,
        tasks: Mapping[str, Task],
        state: LedgerState | None = None,
        *,
        epoch: int = 1,
        auto_ready: bool = True,
        **options: Any,
    ) -> None:
        self.tasks = tasks
        self.machine = Machine(tasks, state or LedgerState(), epoch=epoch, **options)
        self.now_s = 0.0
        self.auto_ready = auto_ready
        self.commands: list[Command] = []
        self.running: dict[str, tuple[str, Order]] = {}
        """Label -> (worker, order)."""
        self.commits: dict[str, CommitRecord] = {}
        self.feed(Tick(0.0))

    def feed(self, *events: Event) -> list[Command]:
        """Handle events and all that follows; the commands since."""
        queue, since = list(events), len(self.commands)
        while queue:
            commands = self.machine.handle(queue.pop(0))
            self.commands += commands
            for command in commands:
                queue += self._answer(command)
        return self.commands[since:]

    def _answer(self, command: Command) -> list[Event]:
        match command:
            case AssignRole() if self.auto_ready:
                return [WorkerReady(self.now_s, command.worker_id, command.role)]
            case Dispatch():
                self.running[command.order.task.label] = (command.worker_id, command.order)
            case Commit():
                self.commits[command.record.task_id] = command.record
                return [Committed(self.now_s, command.record)]
        return []

    def join(self, *workers: str, **options: Any) -> list[Command]:
        """Workers `name` on node `name`, or `name@node`."""
        pairs = [(name.partition("@")[0], name.partition("@")[2] or name) for name in workers]
        return self.feed(*(WorkerJoined(self.now_s, name, node, **options) for name, node in pairs))

    def wait(self, seconds: float) -> list[Command]:
        """Time passes, in ticks."""
        since = len(self.commands)
        while seconds > 0:
            self.now_s += min(seconds, 5.0)
            seconds -= 5.0
            self.feed(Tick(self.now_s))
        return self.commands[since:]

    def produced(self, label: str) -> TaskProduced:
        worker, order = self.running.pop(label)
        done = Produced((artifact(f"{order.attempt_path}/out.bin"),), {"frames": 80.0}, 20.0, "host")
        return TaskProduced(self.now_s, worker, order.task.id, order.attempt, order.epoch, done)

    def done(self, *labels: str) -> list[Command]:
        """These orders succeed."""
        since = len(self.commands)
        for label in labels:
            self.feed(self.produced(label))
        return self.commands[since:]

    def fails(self, label: str, fault: Fault, **options: Any) -> list[Command]:
        worker, order = self.running.pop(label)
        return self.feed(TaskFailed(self.now_s, worker, order.task.id, order.attempt, order.epoch, fault, **options))

    def run(self, seconds: Callable[[Order], float] = lambda order: 1.0) -> Finish:
        """Let everything succeed, each order after its time, until the end."""
        due: dict[str, float] = {}
        while not (finished := self.of(Finish)):
            assert self.running, "nothing runs and it has not ended"
            for label, (_, order) in self.running.items():
                due.setdefault(label, self.now_s + seconds(order))
            label = min(self.running, key=lambda label: due[label])
            self.now_s = max(self.now_s, due.pop(label))
            self.done(label)
        return finished[0]

    def of(self, kind: type[C]) -> list[C]:
        return [command for command in self.commands if isinstance(command, kind)]

    @property
    def dispatched(self) -> list[tuple[str, str]]:
        return [(command.worker_id, command.order.task.label) for command in self.of(Dispatch)]

    @property
    def roles(self) -> list[tuple[str, Role]]:
        return [(command.worker_id, command.role) for command in self.of(AssignRole)]

    @property
    def entries(self) -> list[JournalEntry]:
        return [entry for command in self.of(Journal) for entry in command.entries]

    def id_of(self, label: str) -> str:
        return next(task.id for task in self.tasks.values() if task.label == label)

    def failures(self) -> list[AttemptFailed]:
        return [entry for entry in self.entries if isinstance(entry, AttemptFailed)]

    def state(self) -> LedgerState:
        """What the next run finds in the ledger."""
        state = LedgerState(commits=dict(self.commits))
        for entry in self.entries:
            state.apply(entry)
            if isinstance(entry, Invalidated):
                state.commits.pop(entry.task_id, None)
        return state


def alone_with_the_prompt() -> Studio:
    """One worker, and nothing that it could do but one text task."""
    tasks = film()
    empty = next(task_id for task_id, task in tasks.items() if task.label == "empty")
    record = CommitRecord(empty, 1, 1, (artifact(f"attempts/{empty}/0001-1/out.bin"),), {})
    studio = Studio(tasks, LedgerState({empty: record}))
    studio.join("w1")
    return studio


HICCUP = Fault("transient", "hiccup", "last lines")


def kinds(commands: Sequence[Command], *wanted: type[Command]) -> list[Command]:
    return [command for command in commands if isinstance(command, wanted)]


# Who does what


def test_one_worker_does_text_then_the_whole_chain_then_changes_role_once() -> None:
    studio = Studio(film(chains=2))
    studio.join("w1")
    assert studio.run().exit_code == 0
    assert studio.roles == [("w1", "text"), ("w1", "chain"), ("w1", "refine")]
    order = [label for _, label in studio.dispatched]
    segments = [label for label in order if "segment" in label]
    assert order[2 : 2 + len(segments)] == segments
    assert order[-1] == "film"
    assert len(order) == len(set(order)) == len(studio.tasks)


def test_the_first_units_are_encoded_before_the_last_windows_are_refined() -> None:
    studio = Studio(film(segments=6))
    studio.join("w1")
    studio.run()
    order = [label for _, label in studio.dispatched]
    assert order.index("a/unit/0") < order.index("a/window/5")


def test_without_refinement_a_lone_worker_encodes_as_it_goes() -> None:
    studio = Studio(film(segments=4, refinement="none"))
    studio.join("w1")
    studio.run()
    order = [label for _, label in studio.dispatched]
    assert order.index("a/unit/0") < order.index("a/segment/3")
    assert studio.roles == [("w1", "text"), ("w1", "chain")]


def test_refiners_start_while_the_chain_runs_and_the_chain_worker_joins_them() -> None:
    studio = Studio(film(segments=8))
    studio.join("w1", "w2", "w3")
    studio.run(lambda order: {"segment": 10.0, "window": 30.0}.get(order.task.kind, 1.0))
    order = [label for _, label in studio.dispatched]
    assert order.index("a/window/0") < order.index("a/segment/3")
    chain_workers = {worker for worker, label in studio.dispatched if "segment" in label}
    assert len(chain_workers) == 1
    assert (chain_workers.pop(), "refine") in studio.roles


def test_the_chain_never_waits_for_refinement() -> None:
    studio = Studio(film(segments=12))
    studio.join("w1", "w2")
    started: dict[str, float] = {}

    def seconds(order: Order) -> float:
        started.setdefault(order.task.label, studio.now_s)
        return 10.0 if order.task.kind == "segment" else 7.0

    studio.run(seconds)
    steps = [started[f"a/segment/{index}"] for index in range(12)]
    assert [later - earlier for earlier, later in itertools.pairwise(steps)] == [10.0] * 11


def test_chains_of_several_takes_run_side_by_side() -> None:
    studio = Studio(film(chains=3))
    studio.join("w1", "w2", "w3", "w4")
    studio.done("prompt", "empty")
    assert {"a/segment/0", "b/segment/0", "c/segment/0"} <= set(studio.running)


def test_a_chained_window_starts_when_its_segments_and_the_window_before_are_there() -> None:
    studio = Studio(film(segments=4, refinement="chained"))
    studio.join("w1", "w2")
    studio.done("prompt", "empty", "a/segment/0")
    assert "a/window/0" in studio.running
    studio.done("a/segment/1")
    assert "a/window/1" not in studio.running
    studio.done("a/window/0")
    studio.done("a/unit/0")
    assert "a/window/1" in studio.running


def test_workers_load_roles_before_there_is_work_for_them() -> None:
    studio = Studio(film())
    studio.join("w1", "w2", "w3")
    assert studio.roles == [("w1", "text"), ("w2", "chain"), ("w3", "refine")]


def test_a_worker_that_can_do_little_gets_what_it_can_do() -> None:
    studio = Studio(film())
    studio.join("gpu")
    studio.join("cpu", roles=("text", "media"))
    studio.run()
    assert {label for worker, label in studio.dispatched if worker == "cpu"} <= {
        "prompt", "empty", "film", *(f"a/unit/{index}" for index in range(3))
    }  # fmt: skip


def chain_workers(studio: Studio) -> list[str]:
    """Who had the chain's segments, in order, each only where it changed."""
    had = [worker for worker, label in studio.dispatched if "segment" in label]
    return [worker for worker, _ in itertools.groupby(had)]


@pytest.mark.parametrize("stable_first", [True, False])
def test_the_chain_is_done_where_no_machine_is_taken_away(stable_first: bool) -> None:
    studio = Studio(film(segments=8))
    if stable_first:
        studio.join("stable")
    studio.join("s1", "s2", spot=True)
    if not stable_first:
        studio.join("stable")
    studio.run(lambda order: {"segment": 10.0, "window": 30.0}.get(order.task.kind, 1.0))
    assert chain_workers(studio)[-1] == "stable"
    assert {label for worker, label in studio.dispatched if worker != "stable"} & {"a/segment/1"} == set()
    assert {worker for worker, label in studio.dispatched if "window" in label} >= {"s1", "s2"}


def test_spot_machines_take_the_chains_that_are_too_many_for_the_others() -> None:
    studio = Studio(film(chains=3))
    studio.join("stable")
    studio.join("s1", "s2", spot=True)
    studio.done("prompt", "empty")
    assert {studio.running[f"{chain}/segment/0"][0] for chain in "abc"} == {"stable", "s1", "s2"}


def test_the_chain_goes_to_a_spot_machine_when_the_stable_one_is_lost_and_back_to_the_next() -> None:
    studio = Studio(film(segments=9))
    studio.join("stable")
    studio.join("s1", "s2", spot=True)
    studio.done("prompt", "empty", "a/segment/0", "a/segment/1")
    studio.feed(WorkerLost(studio.now_s, "stable", "gone", node_lost=True))
    studio.done("a/window/0")
    studio.done("a/segment/2")
    studio.join("next")
    studio.done("a/segment/3")
    studio.run()
    *_, first, spot, last = chain_workers(studio)
    assert (first, last) == ("stable", "next") and spot in ("s1", "s2")


def test_a_chain_does_not_wait_for_a_stable_machine_that_only_encodes() -> None:
    studio = Studio(film())
    studio.join("head", roles=("text", "media"))
    studio.join("s1", spot=True)
    studio.run()
    assert chain_workers(studio) == ["s1"]


def test_a_lost_chain_worker_is_replaced_by_a_refiner() -> None:
    studio = Studio(film(segments=6))
    studio.join("w1", "w2", "w3")
    studio.done("prompt", "empty", "a/segment/0", "a/segment/1", "a/segment/2")
    chain_worker, _ = studio.running["a/segment/3"]
    studio.feed(WorkerLost(studio.now_s, chain_worker, "gone", node_lost=True))
    refining = next(label for label in studio.running if "window" in label)
    refiner, _ = studio.running[refining]
    studio.done(refining)
    assert studio.roles[-1] == (refiner, "chain")
    assert studio.running["a/segment/3"][0] == refiner


def test_only_what_the_film_still_needs_is_run() -> None:
    before = Studio(film())
    before.join("w1")
    before.run()
    film_id = before.id_of("film")
    windows = {i: record for i, record in before.commits.items() if before.tasks[i].kind in ("window", "encode")}
    assert Studio(before.tasks, LedgerState({film_id: before.commits[film_id]})).of(Finish)[0].exit_code == 0
    resumed = Studio(before.tasks, LedgerState(windows))
    resumed.join("w1")
    assert resumed.run().exit_code == 0
    assert [label for _, label in resumed.dispatched] == ["film"]


def test_a_finished_render_ends_without_workers() -> None:
    before = Studio(film())
    before.join("w1")
    before.run()
    after = Studio(before.tasks, before.state(), epoch=2)
    assert after.commands == [Finish(0, "done")]


def test_a_hundred_workers_and_ten_thousand_tasks_take_milliseconds_an_event() -> None:
    studio = Studio(film(chains=16, segments=208))
    assert len(studio.tasks) > 9_900
    began_s = time.process_time()
    studio.join(*(f"w{index}" for index in range(100)))
    for _ in range(300):
        studio.done(next(iter(studio.running)))
    assert (time.process_time() - began_s) / 300 < 0.03


# Orders


def test_an_attempt_is_journalled_before_its_order_is_sent() -> None:
    studio = Studio(film(chains=2))
    commands = studio.join("w1", "w2", "w3")
    for place, command in enumerate(commands):
        if isinstance(command, Dispatch):
            started = AttemptStarted(command.order.task.id, 1, 1, command.worker_id, command.worker_id)
            journals = [entry for entry in commands[:place] if isinstance(entry, Journal)]
            assert any(started in journal.entries for journal in journals)


def test_an_order_carries_its_inputs_and_a_folder_of_its_own() -> None:
    studio = Studio(film(), epoch=7)
    studio.join("w1")
    studio.done("prompt", "empty")
    _, order = studio.running["a/segment/0"]
    assert order.inputs == {studio.id_of("prompt"): studio.commits[studio.id_of("prompt")].files}
    assert order.attempt_path == f"attempts/{order.task.id}/0001-7"
    studio.fails("a/segment/0", HICCUP)
    studio.wait(10)
    assert studio.running["a/segment/0"][1].attempt_path == f"attempts/{order.task.id}/0002-7"


def test_a_worker_waits_for_its_commit_before_its_next_order() -> None:
    studio = Studio(film())
    studio.join("w1")
    studio.done("prompt", "empty")
    commands = studio.machine.handle(studio.produced("a/segment/0"))
    record = next(command.record for command in commands if isinstance(command, Commit))
    assert not kinds(commands, Dispatch, AssignRole)
    after = studio.machine.handle(Committed(0.0, record))
    assert [command.order.task.label for command in after if isinstance(command, Dispatch)] == ["a/segment/1"]


def test_a_saved_state_is_journalled_and_handed_to_the_next_attempt() -> None:
    studio = Studio(film())
    studio.join("w1")
    studio.done("prompt", "empty")
    worker, order = studio.running["a/segment/0"]
    saved = artifact(f"partials/{order.task.id}/8.bin")
    progress = Progress(1.0, worker, order.task.id, 1, steps=8, partial=saved)
    studio.feed(progress, progress)
    assert [entry for entry in studio.entries if isinstance(entry, PartialSaved)] == [
        PartialSaved(order.task.id, 1, 1, 8, saved)
    ]
    studio.feed(WorkerLost(2.0, worker, "gone", node_lost=True))
    studio.join("w2")
    assert studio.running["a/segment/0"][1].partial == saved
    resumed = Studio(studio.tasks, studio.state(), epoch=2)
    resumed.join("w3")
    assert resumed.running["a/segment/0"][1].partial == saved


def test_a_saved_state_that_is_corrupt_is_dropped() -> None:
    studio = Studio(film())
    studio.join("w1")
    studio.done("prompt", "empty")
    worker, order = studio.running["a/segment/0"]
    path = f"partials/{order.task.id}/8.bin"
    studio.feed(Progress(1.0, worker, order.task.id, 1, steps=8, partial=artifact(path)))
    studio.fails("a/segment/0", fault_of(corrupt(path, "flipped")))
    assert studio.running["a/segment/0"][1].partial is None
    assert studio.state().logs[order.task.id].transient == 0


# Events that are late, double or out of order


def test_every_event_twice_gives_the_same_film() -> None:
    class Doubled(Studio):
        def feed(self, *events: Event) -> list[Command]:
            return super().feed(*(event for event in events for _ in range(2)))

    studio = Doubled(film(chains=2))
    studio.join("w1", "w2")
    assert studio.run().exit_code == 0
    labels = [label for _, label in studio.dispatched]
    assert len(labels) == len(set(labels)) == len(studio.tasks)
    assert len(studio.of(Commit)) == len(studio.tasks)
    assert len(studio.of(Finish)) == 1


def test_a_late_answer_of_an_attempt_given_up_is_ignored_with_a_line() -> None:
    studio = Studio(film())
    studio.join("w1")
    studio.done("prompt", "empty")
    worker, _ = studio.running["a/segment/0"]
    late = studio.produced("a/segment/0")
    studio.feed(WorkerLost(1.0, worker, "gone"))
    studio.join("w2")
    commands = studio.feed(late)
    assert not kinds(commands, Commit)
    assert "late answer of attempt 1 ignored" in str(kinds(commands, Note))
    assert studio.running["a/segment/0"][1].attempt == 2


@pytest.mark.parametrize("change", [{"epoch": 9}, {"attempt": 9}, {"worker_id": "w9"}, {"task_id": "text-9"}])
def test_an_answer_that_does_not_speak_of_the_attempt_under_way_changes_nothing(
    change: dict[str, Any],
) -> None:
    studio = Studio(film())
    studio.join("w1")
    produced = studio.produced("prompt")
    failed = TaskFailed(0.0, "w1", produced.task_id, 1, 1, HICCUP)
    for event in (produced, failed):
        assert not kinds(studio.feed(dataclasses.replace(event, **change)), Commit, Journal, Dispatch)


def test_a_worker_that_is_gone_does_not_come_back_under_its_name() -> None:
    studio = Studio(film())
    studio.feed(WorkerLost(0.0, "w1", "gone"))
    assert not studio.join("w1")
    assert not studio.feed(WorkerReady(0.0, "w1", "text"))


# Failures


def test_transient_failures_are_retried_after_pauses_three_times_and_then_end_the_render() -> None:
    studio = alone_with_the_prompt()
    for failure in range(4):
        assert studio.running["prompt"][1].attempt == failure + 1
        studio.fails("prompt", HICCUP)
        assert "prompt" not in studio.running, "not at once"
        studio.wait(60)
    assert "prompt" not in studio.running
    finish = studio.of(Finish)[0]
    assert finish.exit_code == 1
    assert "prompt" in finish.message
    assert "hiccup" in finish.message
    assert "longtake retry" in finish.message


def test_a_worker_that_ran_out_of_memory_is_replaced_and_its_task_charged() -> None:
    studio = alone_with_the_prompt()
    studio.fails("prompt", fault_of(OutOfMemory("CUDA out of memory")))
    (recycled,) = studio.of(RecycleWorker)
    assert "out of memory" in recycled.reason
    assert [entry.kind for entry in studio.failures()] == ["memory"]
    assert studio.state().logs[studio.id_of("prompt")].transient == 1
    studio.join("w2")
    studio.wait(10)
    assert studio.running["prompt"][1].attempt == 2


def test_a_worker_whose_gpu_failed_is_replaced_before_it_fails_at_everything_else() -> None:
    studio = alone_with_the_prompt()
    studio.fails("prompt", fault_of(DeviceError("AcceleratorError: CUDA error: an illegal memory access")))
    (recycled,) = studio.of(RecycleWorker)
    assert "illegal memory access" in recycled.reason
    assert [entry.kind for entry in studio.failures()] == ["device"]
    assert studio.state().logs[studio.id_of("prompt")].transient == 1
    studio.wait(60)
    assert not studio.running, "nothing is sent to a process that cannot compute any more"
    studio.join("w2")
    studio.wait(10)
    assert studio.running["prompt"][1].attempt == 2


def test_what_was_charged_is_remembered_by_the_next_run() -> None:
    state = LedgerState()
    for epoch in range(1, 5):
        studio = Studio(film(), state, epoch=epoch)
        studio.join("w1")
        studio.fails("prompt", HICCUP)
        state = studio.state() if epoch == 1 else merge(state, studio)
    again = Studio(film(), state, epoch=5)
    assert "prompt" in again.of(Note)[0].message
    again.join("w1")
    again.done("empty")
    assert again.of(Finish)[0].exit_code == 1
    assert "prompt" not in again.running


def merge(state: LedgerState, studio: Studio) -> LedgerState:
    """The machine keeps its entries in the state it was given, as the ledger does in the store."""
    state.commits.update(studio.commits)
    return state


def test_a_task_that_kills_the_whole_render_again_and_again_is_given_up() -> None:
    state = LedgerState()
    for epoch in range(1, 30):
        studio = Studio(film(), state, epoch=epoch)
        studio.join("w1")
        if "prompt" not in studio.running:
            break
    assert epoch == 12, "ten deaths are the budget"
    studio.done("empty")
    assert "took its process with it 11 times" in studio.of(Finish)[0].message


def test_lost_nodes_and_interruptions_are_never_charged() -> None:
    studio = Studio(film())
    for number in range(40):
        studio.join(f"w{number}")
        worker, _ = studio.running["prompt"]
        if number % 2:
            studio.fails("prompt", Fault("interrupted", "preempted"))
            worker, _ = studio.running["prompt"]
        studio.feed(WorkerLost(studio.now_s, worker, "preempted", node_lost=True))
    studio.join("last")
    assert studio.running["prompt"][1].attempt == 61
    assert studio.run().exit_code == 0


def test_a_users_fault_is_not_retried_and_ends_the_render_with_its_code() -> None:
    studio = Studio(film())
    studio.join("w1", "w2")
    commands = studio.fails("prompt", fault_of(SpecError("too long", field="shots[0].prompt")))
    finish = kinds(commands, Finish)[0]
    assert isinstance(finish, Finish)
    assert finish.exit_code == 2
    assert "too long" in finish.message


def test_what_does_not_depend_on_a_failed_task_is_still_done() -> None:
    studio = Studio(film(chains=2))
    studio.join("w1", "w2")
    studio.done("prompt", "empty")
    studio.fails("a/segment/0", Fault("permanent", "cannot pass"))
    finish = studio.run()
    assert finish.exit_code == 1
    assert "a/segment/0" in finish.message
    done = {studio.tasks[task_id].label for task_id in studio.commits}
    assert {"b/segment/2", "b/window/2", "b/unit/2"} <= done
    assert not any(label.startswith("a/") for label in done)


def test_running_orders_finish_and_are_committed_before_a_failed_render_ends() -> None:
    studio = Studio(film(chains=2))
    studio.join("w1", "w2")
    studio.done("prompt", "empty")
    studio.fails("a/segment/0", fault_of(SpecError("no")))
    assert not studio.of(Finish)
    commands = studio.done("b/segment/0")
    assert kinds(commands, Commit)
    assert kinds(commands, Finish)


def test_a_task_goes_elsewhere_after_a_failure() -> None:
    studio = Studio(film(segments=2))
    studio.join("w1@one")
    studio.done("prompt", "empty", "a/segment/0")
    studio.done("a/segment/1")
    studio.join("w2@two")
    first, _ = studio.running["a/window/0"]
    studio.fails("a/window/0", HICCUP)
    studio.done("a/window/1")
    studio.wait(10)
    assert studio.running["a/window/0"][0] != first


def test_a_node_that_fails_three_times_in_a_row_is_avoided_as_long_as_there_are_others() -> None:
    studio = Studio(film(chains=8, segments=1))
    studio.join("bad@bad", "w2@good")
    studio.done("prompt", "empty")
    failed = 0
    while failed < 3:
        label = next(label for label, (worker, _) in studio.running.items() if worker == "bad")
        studio.fails(label, HICCUP)
        failed += 1
    assert "bad" not in {worker for worker, _ in studio.running.values()}
    assert "avoided" in str(studio.of(Note))
    studio.wait(60)
    assert studio.run().exit_code == 0
    alone = alone_with_the_prompt()
    for _ in range(3):
        alone.fails("prompt", HICCUP)
        alone.wait(60)
    assert alone.run().exit_code == 0


def test_a_worker_without_progress_is_recycled_and_its_task_moved() -> None:
    studio = Studio(film(), timeouts=Timeouts(segment_s=100))
    studio.join("w1@one", "w2@two")
    studio.done("prompt", "empty")
    worker, order = studio.running["a/segment/0"]
    studio.wait(90)
    studio.feed(Progress(studio.now_s, worker, order.task.id, 1, steps=1))
    studio.wait(90)
    studio.feed(Progress(studio.now_s, worker, order.task.id, 1, steps=1))
    assert not studio.of(RecycleWorker)
    studio.wait(20)
    assert studio.of(RecycleWorker)[0].worker_id == worker
    assert studio.failures()[0].kind == "stalled"
    studio.wait(20)
    assert studio.running["a/segment/0"][0] != worker


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0, 86400.0])
def test_a_clock_that_jumps_causes_no_timeout(jump_s: float) -> None:
    studio = Studio(film(), timeouts=Timeouts(text_s=100))
    studio.join("w1")
    studio.wait(20)
    studio.now_s += jump_s
    studio.wait(20)
    assert not studio.of(RecycleWorker)
    studio.wait(100)
    assert studio.of(RecycleWorker), "but time still passes"


def test_a_role_that_does_not_load_is_tried_on_another_worker_and_then_given_up() -> None:
    studio = Studio(film(), auto_ready=False)
    for number in range(5):
        studio.join(f"w{number}")
        studio.feed(RoleFailed(0.0, f"w{number}", "text", Fault("transient", "device busy")))
    assert len(studio.of(RecycleWorker)) == 5
    assert "device busy" in studio.of(Finish)[0].message
    loading = Studio(film(), auto_ready=False, timeouts=Timeouts(load_s=60))
    loading.join("w1")
    loading.wait(70)
    assert loading.of(RecycleWorker)[0].worker_id == "w1"


def test_a_gpu_on_which_nothing_loads_ends_no_render_as_long_as_others_compute() -> None:
    studio = Studio(film(chains=3))
    studio.join("good")
    studio.done("prompt", "empty")
    assert studio.roles[-1] == ("good", "chain")
    studio.auto_ready = False
    broken = Fault("device", "CUDA error: uncorrectable ECC error")
    for number in range(20):
        studio.join(f"bad{number}")
        assert studio.roles[-1] == (f"bad{number}", "chain")
        studio.feed(RoleFailed(0.0, f"bad{number}", "chain", broken))
    assert len(studio.of(RecycleWorker)) == 20 and not studio.of(Finish)
    studio.join("bad")
    studio.feed(WorkerLost(0.0, "good", "its node died", node_lost=True), RoleFailed(0.0, "bad", "chain", broken))
    assert "ECC" in studio.of(Finish)[0].message, "nobody is left"


def test_a_checkpoint_that_cannot_be_used_ends_the_render_as_the_users_fault() -> None:
    studio = Studio(film(), auto_ready=False)
    studio.join("w1")
    studio.feed(RoleFailed(0.0, "w1", "text", Fault("user", "no such tensor", exit_code=2)))
    assert studio.of(Finish)[0].exit_code == 2


def test_a_refused_commit_costs_the_attempt() -> None:
    studio = alone_with_the_prompt()
    commands = studio.machine.handle(studio.produced("prompt"))
    record = next(command.record for command in commands if isinstance(command, Commit))
    short = fault_of(corrupt(record.files[0].path, "short"))
    refused = CommitRefused(1.0, record.task_id, 1, 1, short)
    studio.feed(refused, refused)
    assert [entry.kind for entry in studio.failures()] == ["transient"]
    studio.wait(10)
    assert studio.running["prompt"][1].attempt == 2


def test_an_artifact_found_corrupt_is_rendered_again_with_all_that_came_of_it() -> None:
    studio = Studio(film(segments=2))
    studio.join("w1")
    studio.done("prompt", "empty", "a/segment/0", "a/segment/1")
    bad = studio.commits[studio.id_of("a/segment/0")]
    studio.fails("a/window/0", fault_of(corrupt(bad.files[0].path, "flipped")))
    invalidated = {entry.task_id for entry in studio.entries if isinstance(entry, Invalidated)}
    assert invalidated == {studio.id_of("a/segment/0"), studio.id_of("a/segment/1")}
    assert studio.run().exit_code == 0
    again = [label for _, label in studio.dispatched]
    assert [again.count(label) for label in ("prompt", "a/segment/0", "a/segment/1", "a/window/0")] == [
        1,
        2,
        2,
        2,
    ]
    assert all(entry.kind == "corrupt" for entry in studio.failures())


def test_a_result_of_inputs_found_corrupt_meanwhile_is_not_committed() -> None:
    studio = Studio(film(segments=3))
    studio.join("w1", "w2", "w3")
    studio.done("prompt", "empty", "a/segment/0")
    bad = studio.commits[studio.id_of("a/segment/0")]
    studio.fails("a/window/0", fault_of(corrupt(bad.files[0].path, "flipped")))
    commands = studio.done("a/segment/1")
    assert not kinds(commands, Commit)
    assert studio.run().exit_code == 0


def test_a_store_that_does_not_answer_pauses_everything_and_charges_nobody() -> None:
    studio = Studio(film())
    studio.join("w1")
    outage = fault_of(StoreError("503"))
    for _ in range(6):
        label = next(iter(studio.running))
        studio.fails(label, outage)
        assert not studio.running
        assert "store does not answer" in studio.machine.progress(studio.now_s).waiting
        studio.wait(301)
    assert studio.state().logs[studio.id_of("prompt")].transient == 0
    assert studio.run().exit_code == 0


def test_a_store_that_never_answers_again_ends_the_render() -> None:
    studio = Studio(film())
    studio.join("w1")
    for _ in range(100):
        if studio.of(Finish):
            break
        if studio.running:
            studio.fails(next(iter(studio.running)), fault_of(StoreError("503")))
        studio.wait(60)
    assert studio.of(Finish)[0].exit_code == 1
    assert studio.now_s > 3600


def test_a_full_disk_ends_the_render_and_the_same_command_goes_on() -> None:
    studio = Studio(film())
    studio.join("w1")
    studio.done("prompt")
    studio.fails("empty", fault_of(StoreFull("no space left")))
    assert studio.of(Finish)[0].exit_code == 1
    assert "no space left" in studio.of(Finish)[0].message
    again = Studio(studio.tasks, studio.state(), epoch=2)
    again.join("w1")
    assert again.run().exit_code == 0
    assert ("w1", "prompt") not in again.dispatched


@pytest.mark.parametrize("error", [LeaseLost("taken over"), StoreFull("no space"), StoreError("no answer")])
def test_a_ledger_that_cannot_be_written_ends_the_render_without_another_entry(error: Exception) -> None:
    studio = Studio(film())
    studio.join("w1")
    commands = studio.feed(LedgerFailed(1.0, fault_of(error)))
    assert not kinds(commands, Journal, Commit, Dispatch)
    assert commands == [StopWorkers(("w1",)), Finish(1, str(error))]


def test_a_ledger_that_fails_under_the_last_commands_does_not_swallow_the_end() -> None:
    studio = Studio(film())
    studio.join("w1")
    commands = studio.fails("prompt", fault_of(StoreFull("no space")))
    assert [type(command) for command in commands] == [Journal, Note, Finish]
    assert studio.feed(LedgerFailed(1.0, fault_of(StoreFull("no space")))) == [Finish(1, "no space")]


def test_output_refused_by_the_gate_is_planned_again_with_a_recorded_generation() -> None:
    first = film(segments=1)
    studio = Studio(first)
    studio.join("w1")
    studio.done("prompt", "empty")
    refused = fault_of(QualityError("grey"))
    studio.fails("a/segment/0", refused)
    assert studio.of(Replan) == [Replan(studio.id_of("a/segment/0"))]
    assert RedoRequested("a/segment/0", 1, "grey") in studio.entries
    assert not studio.running, "nothing before there is a new plan"
    assert studio.machine.overrides.redo == {"a/segment/0": 1}
    prompt, empty = (task for task in first.values() if task.kind == "text")
    segment = task("segment", "a/segment/0", [prompt], priority=1)
    changed = dataclasses.replace(segment, id=segment.id + "-redo")
    studio.tasks = {one.id: one for one in (prompt, empty, changed)}
    studio.machine.replace_plan(studio.tasks)
    studio.feed(Tick(1.0))
    assert studio.running["a/segment/0"][1].task is changed
    assert studio.run().exit_code == 0


def test_a_unit_that_the_gate_refuses_gives_its_windows_new_noise() -> None:
    """Encoding the same latents again would show the same picture."""
    studio = Studio(film(segments=2))
    studio.join("w1")
    studio.done("prompt", "empty", "a/segment/0", "a/segment/1", "a/window/0", "a/window/1")
    studio.fails("a/unit/0", fault_of(QualityError("grey")))
    assert studio.machine.overrides.redo == {"a/unit/0": 1, "a/window/0": 1, "a/window/1": 1}
    assert studio.of(Replan) == [Replan(studio.id_of("a/unit/0"))]


def refuse_generation(studio: Studio, generation: int) -> list[Command]:
    """The gate refuses the chain's only segment; under the new plan it is another task."""
    commands = studio.fails("a/segment/0", fault_of(QualityError("grey")))
    if studio.machine.overrides.redo.get("a/segment/0") == generation:
        prompt, empty = (one for one in film(segments=1).values() if one.label in ("prompt", "empty"))
        changed = dataclasses.replace(task("segment", "a/segment/0", [prompt]), id=f"segment-redo{generation}")
        studio.tasks = {one.id: one for one in (prompt, empty, changed)}
        studio.machine.replace_plan(studio.tasks)
        studio.feed(Tick(studio.now_s))
    return commands


def test_the_gate_has_a_task_made_again_twice_and_then_the_render_fails_with_its_code() -> None:
    studio = Studio(film(segments=1))
    studio.join("w1")
    studio.done("prompt", "empty")
    refuse_generation(studio, 1)
    refuse_generation(studio, 2)
    refuse_generation(studio, 3)
    finish = studio.of(Finish)[0]
    assert finish.exit_code == 4
    assert "refused by the gate 3 times: grey" in finish.message
    again = Studio(studio.tasks, studio.state(), epoch=2)
    assert again.of(Finish)[0].exit_code == 4, "and the next run does not begin it again"


def test_a_redo_by_a_person_gives_the_gate_its_budget_back() -> None:
    state = LedgerState()
    for generation in (1, 2):
        state.apply(RedoRequested("a/segment/0", generation, "grey"))
    assert state.refusals == {"a/segment/0": 2}
    state.apply(RedoRequested("a/segment/0", 3, "on request", asked=True))
    assert (state.refusals, state.redo) == ({"a/segment/0": 0}, {"a/segment/0": 3})


# What people ask for


def asked(studio: Studio, kind: Any, *entries: JournalEntry, request_id: str = "r1") -> list[Command]:
    return studio.feed(Asked(studio.now_s, Request(request_id, kind, entries)))


def test_a_pause_lets_orders_save_and_ends_as_a_stop_does() -> None:
    studio = Studio(film())
    studio.join("w1")
    commands = asked(studio, "pause")
    assert RequestTaken("r1", "pause", 1) in studio.entries
    assert kinds(commands, StopWorkers) and not kinds(commands, Finish)
    saved = artifact("partials/x/8.bin")
    commands = studio.fails("prompt", fault_of(Interrupted()), partial=saved, steps=8)
    assert kinds(commands, Finish)[0].exit_code == 75  # type: ignore[attr-defined]
    assert studio.state().stopped == (1, "pause")


def test_a_cancel_waits_for_nobody_and_charges_nobody() -> None:
    studio = Studio(film())
    studio.join("w1")
    commands = asked(studio, "cancel")
    assert kinds(commands, Finish)[0].exit_code == 130  # type: ignore[attr-defined]
    assert [failure.kind for failure in studio.failures()] == ["interrupted"]
    assert studio.state().stopped == (1, "cancel")


def test_a_retry_revives_what_was_given_up_while_the_rest_goes_on() -> None:
    studio = Studio(film(chains=2, segments=1))
    studio.join("w1@n", "w2@n")
    studio.done("prompt", "empty")
    for _ in range(4):
        studio.fails("a/segment/0", HICCUP)
        studio.wait(60)
    assert "a/segment/0" not in studio.running, "given up"
    asked(studio, "retry")
    assert TaskReset(studio.id_of("a/segment/0"), "a/segment/0") in studio.entries
    assert "a/segment/0" in studio.running
    assert studio.run().exit_code == 0


def test_a_request_that_comes_twice_is_taken_in_once() -> None:
    studio = Studio(film(segments=1))
    redo = RedoRequested("a/segment/0", 1, "on request", asked=True)
    asked(studio, "redo", redo)
    asked(studio, "redo", redo)
    assert studio.machine.overrides.redo == {"a/segment/0": 1}
    again = Studio(film(segments=1), studio.state(), epoch=2)
    asked(again, "redo", redo)
    assert not again.entries, "nor by the next run"


def test_a_redo_takes_the_next_generation_even_if_it_rose_since_it_was_asked() -> None:
    state = LedgerState()
    state.apply(RedoRequested("a/segment/0", 4, "grey"))
    studio = Studio(film(segments=1), state)
    asked(studio, "redo", RedoRequested("a/segment/0", 1, "on request", asked=True))
    assert studio.machine.overrides.redo == {"a/segment/0": 5}


def test_after_a_redo_nothing_is_sent_before_the_new_plan_is_there_and_what_it_lacks_is_stopped() -> None:
    studio = Studio(film(segments=2))
    studio.join("w1")
    studio.done("prompt", "empty")
    worker, order = studio.running["a/segment/0"]
    commands = asked(studio, "redo", RedoRequested("a/segment/0", 1, "on request", asked=True))
    assert kinds(commands, Replan) == [Replan("r1")]
    studio.join("w2")
    assert not studio.of(Dispatch)[3:], "only the two texts and the segment were sent"
    kept = {one.id: one for one in studio.tasks.values() if one.kind == "text"}
    changed = dataclasses.replace(order.task, id="segment-redo")
    studio.tasks = {**kept, changed.id: changed}
    studio.machine.replace_plan(studio.tasks)
    commands = studio.feed(Tick(studio.now_s))
    assert StopWorkers((worker,)) in commands
    studio.fails("a/segment/0", fault_of(Interrupted()))
    assert studio.running["a/segment/0"][1].task is changed


def test_a_locked_task_whose_bytes_are_gone_is_planned_anew_and_never_run() -> None:
    tasks = film(segments=1)
    segment = next(one for one in tasks.values() if one.kind == "segment")
    tasks[segment.id] = dataclasses.replace(segment, locked=True)
    record = CommitRecord(segment.id, 1, 1, (artifact(f"attempts/{segment.id}/0001-1/out.bin"),), {})
    studio = Studio(tasks, LedgerState({segment.id: record}))
    studio.join("w1")
    studio.done("prompt", "empty") if "prompt" in studio.running else studio.done("empty")
    bad = fault_of(corrupt(record.files[0].path, "a bit flipped"))
    commands = studio.fails("a/window/0", bad)
    assert kinds(commands, Replan) == [Replan(segment.id)]
    assert "a/segment/0" not in studio.running


def test_a_run_saves_and_stops_at_its_deadline() -> None:
    studio = Studio(film(), deadline_s=60.0)
    studio.join("w1")
    studio.wait(55)
    assert not studio.of(StopWorkers)
    studio.wait(30)
    finish = studio.of(Finish)[0]
    assert finish.exit_code == 75
    assert "deadline" in finish.message


def test_within_the_deadline_a_lost_machine_may_cost_any_number_of_attempts() -> None:
    studio = Studio(film(), deadline_s=10_000.0)
    for number in range(40):
        studio.join(f"w{number}")
        worker, _ = studio.running["prompt"]
        studio.feed(WorkerLost(studio.now_s, worker, "preempted", node_lost=True))
    studio.join("last")
    assert studio.running["prompt"][1].attempt == 41
    assert studio.run().exit_code == 0


def test_faults_of_exceptions() -> None:
    expected = {
        "user": SpecError("x"),
        "full": StoreFull("x"),
        "store": StoreError("x"),
        "transient": MediaError("x"),
        "memory": OutOfMemory("x"),
        "device": DeviceError("x"),
        "lost": WorkerLostError("x"),
        "quality": QualityError("x"),
        "interrupted": Interrupted(),
    }
    assert {kind: fault_of(error).kind for kind, error in expected.items()} == {kind: kind for kind in expected}
    assert fault_of(ZeroDivisionError("x")) == Fault("transient", "ZeroDivisionError: x")
    assert fault_of(QualityError("x")).exit_code == 4


# Stops and nodes that go away


@pytest.mark.parametrize("code", [75, 130])
def test_a_stop_lets_orders_save_and_ends_with_its_code(code: int) -> None:
    studio = Studio(film())
    studio.join("w1", "w2")
    studio.done("prompt", "empty")
    commands = studio.feed(StopRequested(1.0, code))
    worker, order = studio.running["a/segment/0"]
    assert commands == [StopWorkers((worker,))]
    saved = artifact(f"partials/{order.task.id}/8.bin")
    commands = studio.fails("a/segment/0", fault_of(Interrupted()), partial=saved, steps=8)
    assert kinds(commands, Finish) == [Finish(code, "stopped on request")]
    assert studio.state().logs[order.task.id].partial == saved
    assert studio.state().logs[order.task.id].transient == 0


def test_a_stop_waits_ten_seconds_and_a_second_one_does_not_wait() -> None:
    for second in (False, True):
        studio = Studio(film())
        studio.join("w1")
        studio.feed(StopRequested(0.0, 130))
        assert not studio.of(Finish)
        if second:
            studio.feed(StopRequested(0.0, 130))
        else:
            studio.wait(10)
        assert studio.of(Finish)[0].exit_code == 130
        assert studio.failures()[0].kind == "interrupted"


def test_what_is_produced_during_a_stop_is_committed() -> None:
    studio = Studio(film())
    studio.join("w1")
    studio.feed(StopRequested(0.0, 75))
    studio.done("prompt")
    assert studio.of(Finish)[0].exit_code == 75
    assert studio.id_of("prompt") in studio.commits


def test_nothing_new_is_sent_to_a_draining_node_and_nothing_there_is_charged() -> None:
    studio = Studio(film(segments=4))
    studio.join("w1@spot", "w2@kept")
    studio.done("prompt", "empty")
    worker, _ = studio.running["a/segment/0"]
    node = {"w1": "spot", "w2": "kept"}[worker]
    studio.feed(NodeDraining(studio.now_s, node, deadline_s=120.0))
    assert not studio.of(StopWorkers), "there is time"
    studio.wait(95)
    assert not studio.of(StopWorkers)
    studio.wait(10)
    assert studio.of(StopWorkers) == [StopWorkers((worker,))]
    studio.fails("a/segment/0", fault_of(Interrupted()))
    assert studio.running["a/segment/0"][0] != worker
    studio.feed(WorkerLost(studio.now_s, worker, "preempted"))
    assert studio.run().exit_code == 0
    assert {entry.kind for entry in studio.failures()} == {"interrupted"}
    assert worker not in {name for name, _ in studio.dispatched[3:]}


def test_a_draining_node_that_dies_costs_nothing() -> None:
    studio = Studio(film())
    studio.join("w1")
    studio.feed(NodeDraining(0.0, "w1"), WorkerLost(1.0, "w1", "killed"))
    assert studio.failures()[0].kind == "lost"
    assert studio.state().logs[studio.id_of("prompt")].deaths == 0


# What a person sees


def test_refreshes_follow_commits_of_encodes_but_not_more_often_than_allowed() -> None:
    studio = Studio(film(segments=8), timeouts=Timeouts(refresh_s=10))
    studio.join("w1")
    studio.run(lambda order: 2.0)
    times = len(studio.of(Refresh))
    assert 2 <= times <= 5
    assert isinstance(studio.commands[-2], Refresh), "the last one shows everything"


def test_progress_counts_phases_and_estimates_the_rest() -> None:
    studio = Studio(film(segments=3))
    assert studio.machine.progress(0.0).waiting == "no worker yet"
    studio.join("w1")
    studio.done("prompt", "empty", "a/segment/0")
    worker, order = studio.running["a/segment/1"]
    studio.feed(Progress(1.0, worker, order.task.id, 1, steps=4, frames=40))
    summary = studio.machine.progress(studio.now_s)
    segment = summary.phases["segment"]
    assert (segment.total, segment.done, segment.running, segment.failed) == (3, 1, 1, 0)
    assert segment.frames == 80 + 40
    assert (segment.work_total_s, segment.work_done_s, segment.seconds_spent) == (30.0, 10.0, 20.0)
    assert summary.workers == {"w1": "a/segment/1"}
    left = 12 - 3
    assert summary.eta_s == pytest.approx(left * 20.0)


def test_progress_of_a_chain_cannot_be_hurried_by_more_workers() -> None:
    studio = Studio(film(segments=10))
    studio.join(*(f"w{index}" for index in range(50)))
    studio.done("prompt", "empty", "a/segment/0")
    eta_s = studio.machine.progress(0.0).eta_s
    assert eta_s == pytest.approx(9 * 20.0)


def test_budgets_are_what_the_page_promises() -> None:
    assert (Budgets().transient, Budgets().quality, Budgets().node) == (3, 2, 3)
