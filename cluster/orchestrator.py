"""A thin carrier around the machine: an async Ray actor that feeds it events and carries its commands out.

It decides nothing about tasks. It knows Ray (workers, their answers, their deaths) and keeps that from the
rest: whatever Ray raises becomes a `WorkerLost` event in `lost_worker`, the one place that knows Ray's
exceptions. Commands go through `pipeline.carrier`, strictly in order. All ledger and store calls run in one
thread, one after another; the event loop stays free for progress, stop and whoever follows.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import ray
from ray import exceptions as ray_errors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.crash import record_crash
from cluster.door import RAY_LOSSES, Door
from cluster.drain import draining_nodes, spot_nodes
from cluster.film_page import PAGE, is_page_of, start_page
from cluster.job import Failed, Greeting, News, Outcome, RenderJob
from cluster.json_log import is_json_wanted, log_event
from cluster.metrics import LOOK_S, Meters, ray_instrument
from cluster.publish import Publisher
from cluster.recipe import RECIPE_FILE, make_plan
from pipeline import events as ev
from pipeline.carrier import asks_ledger, carry_out
from pipeline.errors import LongtakeError, NumericsMismatch, StoreError, first_line
from pipeline.ledger import Ledger
from pipeline.machine import Machine
from pipeline.params import WeightsParams
from pipeline.plan import Plan
from pipeline.report import RenderState
from pipeline.requests import Request, mark_taken, new_requests
from pipeline.spec import Memory
from pipeline.store import open_store
from pipeline.store_meter import Meter, MeteredStore
from pipeline.story import log_path
from pipeline.tasks import CommitRecord, Order, Produced, Role

T = TypeVar("T")
NOT_SHOWN = (LongtakeError, OSError, ValueError)
"""What may go wrong with what people look at, such as a full temporary folder, and harms no render."""

TICK_S = 1.0
POLL_S = 0.5
POLL_LIMIT_S = 20.0
HEARTBEAT_S = 10.0
REQUESTS_S = 2.0
DRAIN_S = 2.0
FATE_LOOK_S, FATE_LIMIT_S = 0.5, 30.0
START_LIMIT_S = 300.0
DISMISS_LIMIT_S = 2.0
STORE_LOOK_S, STORE_LIMIT_S = 0.5, 5.0
"""Once somebody has asked to stop, a call to the ledger may take so long; a second time it is not waited for."""
FAILED_STARTS = 5
"""How often in a row one worker may fail to start before the render is given up, if no other worker is there."""
MOST_PAUSE_S = 300.0
"""Between two starts of a worker that fails again and again while others are at work."""


def start_pause_s(failures: int) -> float:
    """How long to wait with the start of a worker in whose place so many in a row have failed."""
    return min(2.0 ** min(failures, 16), MOST_PAUSE_S) if failures else 0.0


@dataclass
class Member:
    """One worker."""

    worker_id: str
    door: Door
    host: str = ""
    """Where it is, once it has greeted."""
    failures: int = 0
    """How often in a row it, or those before it in its place, did not start or did not take a role."""


@dataclass
class Story:
    """Events for whoever follows the render; those it has seen are dropped. `render`: its store's address.

    `tell` may be called in any thread: the list stays the same one, and no other thread comes between a step on it.
    """

    render: str = ""
    meters: Meters | None = None
    first: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)

    def tell(self, event: str, **content: Any) -> None:
        told = {"event": event, "time": round(time.time(), 3), **content}
        self.events.append(told)
        if is_json_wanted():
            log_event(told, self.render)
        if self.meters is not None:
            self.meters.event(told)

    def since(self, cursor: int) -> tuple[list[dict[str, Any]], int]:
        del self.events[: max(cursor - self.first, 0)]
        self.first = max(cursor, self.first)
        events = list(self.events)
        return events, self.first + len(events)


class Orchestrator:
    """One render. `run` returns when it is over; `follow` and `stop` may be called meanwhile."""

    def __init__(self, job: RenderJob, meters: Meters | None = None) -> None:
        self._job = job
        self._meters = meters
        self._story = Story(job.store_url, meters)
        self._store = MeteredStore(open_store(job.store_url), Meter())
        self._given_up = threading.Event()
        """Set once the store is not waited for any more."""
        say = partial(self._story.tell, "waiting")
        self._ledger = Ledger(self._store, on_wait=lambda why: say(message=why), sleep=self._pause)
        self._io = ThreadPoolExecutor(1, "ledger")
        self._queue: asyncio.Queue[ev.Event] = asyncio.Queue()
        self._members: dict[str, Member] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._commits: dict[str, CommitRecord] = {}
        self._machine: Machine | None = None
        self._weights: Mapping[str, WeightsParams] = {}
        self._memory = job.recipe.spec.memory
        self._recorded = False
        self._started = 0
        self._replan_wanted = False
        self._numerics_told = False
        self._stops: list[tuple[float, int]] = []
        self._finish: ev.Finish | None = None
        self._outcome: Outcome | None = None
        self._over = asyncio.Event()

    async def run(self) -> Outcome:
        """Render until there is an outcome. Raises nothing."""
        try:
            outcome = await self._render()
        except LongtakeError as error:
            outcome = Outcome(error.exit_code, str(error))
        except Exception as error:
            outcome = Outcome(1, f"unexpected {type(error).__name__}: {record_crash(error)}")
        if self._given_up.is_set():
            message = "stopped while the store did not answer: nothing more was saved; the same command continues"
            outcome = Outcome(self._stops[-1][1], message)
        await self._close()
        self._outcome = outcome
        self._story.tell("finished", exit_code=outcome.exit_code, message=outcome.message)
        self._over.set()
        return outcome

    async def follow(self, cursor: int, wait_s: float) -> News:
        """News since `cursor`, after at most `wait_s`. Safe to call again after a lost answer."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._over.wait(), wait_s)
        outcome = self._outcome
        events, after = self._story.since(cursor)
        summary = self._machine.progress(time.monotonic()) if self._machine else None
        return News(events, after, summary, outcome)

    async def stop(self, exit_code: int) -> None:
        """Stop in order: running denoising saves its state. A second call does not wait for that."""
        self._stops.append((time.monotonic(), exit_code))
        self._put(ev.StopRequested(time.monotonic(), exit_code))

    # The loop

    async def _render(self) -> Outcome:
        plan = await self._io_call(self._open)
        self._publisher = Publisher(self._store, self._job.recipe, plan, self._job.settings.ffmpeg)
        self._weights = plan.weights
        self._spawn(self._tick())
        self._spawn(self._heartbeat())
        self._spawn(self._watch_requests())
        self._spawn(self._watch_nodes())
        if self._meters is not None:
            self._spawn(self._measure(self._meters))
        await self._handle(ev.Tick(time.monotonic()))
        if self._finish is None:
            self._hire(plan)
        while self._finish is None:
            event = await self._queue.get()
            await self._handle(event)
            if isinstance(event, ev.Asked):
                await self._answer(event.request)
        if self._finish.exit_code == 0:
            await self._io_call(self._record_order)
        if self._recorded and not self._given_up.is_set():
            await self._publish_end(self._finish)
        film = self._commits.get(self._publisher.plan.film_task_id)
        return Outcome(self._finish.exit_code, self._finish.message, film)

    def _open(self) -> Plan:
        """Take the lease, read the ledger, plan: everything that has to be true before the first event."""
        epoch = self._ledger.take_lease(fresh=self._job.fresh)
        state = self._ledger.load()
        plan = make_plan(self._job.recipe, state.overrides)
        # The inputs of tasks are verified when they are used; the film is nobody's input.
        self._ledger.drop_if_damaged(state, plan.film_task_id)
        self._commits = dict(state.commits)
        if self._store.head(RECIPE_FILE) is None:
            self._record_order()
        self._machine = Machine(plan.tasks, state, epoch=epoch, deadline_s=self._job.deadline_s)
        for problem in state.problems:
            self._story.tell("note", message=problem, warning=True)
        return plan

    def _record_order(self) -> None:
        """From now on `recipe.json` says that this is what is rendered here.

        In the place of another recipe not before a worker was found to compute like the record that the render is
        pinned to: a render that is refused leaves the folder as the one before it did.
        """
        if not self._recorded:
            self._job.recipe.put(self._store)
            self._recorded = True

    def _hire(self, plan: Plan) -> None:
        left = sum(task_id not in self._commits for task_id in plan.tasks)
        how = {"precision": self._memory.precision, **asdict(self._job.placement)}
        self._story.tell("started", tasks=len(plan.tasks), left=left, **how)
        for size in self._job.placement.crews:
            self._spawn(self._start_worker(size))

    async def _handle(self, event: ev.Event) -> None:
        """Feed one event and what its commands lead to.

        Stamped when it is handled: what piled up while the store did not answer must not pass for time in which
        an order that was only just sent has been silent.
        """
        assert self._machine is not None
        pending = [event]
        while pending and self._finish is None:
            commands = self._machine.handle(replace(pending.pop(0), now_s=time.monotonic()))
            if not commands:
                continue
            carry = partial(carry_out, commands, self._ledger, self, time.monotonic)
            try:
                led_to = await self._io_call(carry) if asks_ledger(commands) else carry()
            except LongtakeError as error:
                led_to = [ev.LedgerFailed(time.monotonic(), ev.fault_of(error))]
            for outcome in led_to:
                self._tell_commit(outcome)
            if self._replan_wanted:
                await self._replan()
            pending += led_to

    async def _replan(self) -> None:
        """Plan again under the ledger's new overrides; in the loop, where nobody else touches the machine."""
        assert self._machine is not None
        self._replan_wanted = False
        state = await self._io_call(self._ledger.load)
        self._publisher.plan = plan = make_plan(self._job.recipe, state.overrides)
        self._machine.replace_plan(plan.tasks)

    def _tell_commit(self, event: ev.Event) -> None:
        if isinstance(event, ev.Committed):
            record = event.record
            self._commits[record.task_id] = record
            seconds = round(record.seconds, 3)
            self._story.tell("committed", task=record.task_id, seconds=seconds, host=record.host)
        elif isinstance(event, ev.CommitRefused):
            self._story.tell("commit_refused", task=event.task_id, message=event.fault.message)

    # The machine's hands: called in the ledger's thread or in the loop, none of them waits (see pipeline.carrier.Hands)

    def assign_role(self, worker_id: str, role: Role) -> None:
        self._later(lambda: self._with(worker_id, lambda member: self._assign(member, role)))

    def dispatch(self, worker_id: str, order: Order) -> None:
        self._later(lambda: self._with(worker_id, lambda member: self._dispatch(member, order)))

    def recycle(self, worker_id: str, reason: str) -> None:
        self._story.tell("worker_recycled", worker=worker_id, reason=reason)
        self._later(lambda: self._replace(worker_id))

    def return_worker(self, worker_id: str) -> None:
        """Only renders of a farm have workers to give back."""

    def stop_orders(self, worker_ids: tuple[str, ...]) -> None:
        for member in [self._members[name] for name in worker_ids if name in self._members]:
            with contextlib.suppress(*RAY_LOSSES):
                member.door.stop()

    def refresh(self) -> None:
        self._later(lambda: self._spawn(self._publish()))

    def replan(self, cause: str) -> None:
        self._story.tell("replanned", cause=cause)
        self._replan_wanted = True

    def note(self, message: str, warning: bool) -> None:
        self._story.tell("note", message=message, warning=warning)

    def finish(self, exit_code: int, message: str) -> None:
        self._finish = ev.Finish(exit_code, message)

    # Workers

    def _with(self, worker_id: str, work: Callable[[Member], Coroutine[Any, Any, None]]) -> None:
        """Start `work` on a worker; one that is gone meanwhile has been reported as lost."""
        if worker_id in self._members:
            self._spawn(work(self._members[worker_id]))

    async def _start_worker(self, size: int, failures: int = 0) -> None:
        """Start one worker of `size` processes, compare their numerics with the render's, and let it join. After
        `failures` in a row in its place it gets time: its GPU may be broken.
        """
        await asyncio.sleep(start_pause_s(failures))
        self._started += 1
        worker_id = f"w{self._started}"
        member = Member(worker_id, Door(self._job.settings, self._job.placement, size), failures=failures)
        self._members[worker_id] = member
        try:
            greetings = await asyncio.wait_for(member.door.greet(), START_LIMIT_S)
        except TimeoutError:
            self._wait_for_place(worker_id, size)
            return
        except RAY_LOSSES as error:
            if worker_id in self._members:
                self._start_again(member, f"a worker did not start: {first_line(error)}")
            return
        if not isinstance(greetings, Failed):
            await self._welcome(member, greetings)
        elif greetings.fault.kind == "user":
            self._put(ev.LedgerFailed(time.monotonic(), greetings.fault))
        else:
            self._start_again(member, f"a worker did not start: {greetings.fault.message}")

    async def _welcome(self, member: Member, greetings: tuple[Greeting, ...]) -> None:
        first = greetings[0]
        try:
            mixed = await self._io_call(lambda: self._pin(*(greeting.numerics for greeting in greetings)))
        except NumericsMismatch as error:
            if not self._has_company(member):
                self._put(ev.LedgerFailed(time.monotonic(), ev.fault_of(error)))
                return
            # One that came in the middle, to a machine that computes differently: that ends no render either.
            self._start_again(member, f"a worker on {first.host} is left out: {error}")
            return
        except LongtakeError as error:
            self._put(ev.LedgerFailed(time.monotonic(), ev.fault_of(error)))
            return
        member.host = first.host
        for difference in sorted(mixed):
            self._story.tell("note", message=f"mixed numerics: {difference}", warning=True)
        processes = {"process": first.pid, "gang": [[greeting.host, greeting.pid] for greeting in greetings[1:]]}
        self._story.tell("worker_joined", worker=member.worker_id, host=first.host, **processes)
        about, roles = (member.worker_id, member.door.node_id), self._job.placement.roles_of(member.door.size)
        spot = False
        with contextlib.suppress(*RAY_LOSSES):
            spot = not (await asyncio.to_thread(spot_nodes)).isdisjoint(member.door.node_ids)
        self._put(ev.WorkerJoined(time.monotonic(), *about, roles=roles, host=first.host, spot=spot))

    def _pin(self, *members: Mapping[str, Any]) -> set[str]:
        """How a worker's processes differ from the record that the render is pinned to, if that is allowed."""
        mixed = set[str]()
        for numerics in members:
            record = with_precision(numerics, self._memory)
            mixed |= set(self._ledger.pin_numerics(record, allow_mixed=self._job.allow_mixed))
            if not self._numerics_told:
                self._numerics_told = True
                self._story.tell("numerics", record=record)
        self._record_order()
        return mixed

    def _wait_for_place(self, worker_id: str, size: int) -> None:
        """A cluster that has lost machines may have no place for a worker for hours: nobody's failure."""
        self._dismiss(worker_id)
        reason = f"no worker has started for {START_LIMIT_S:.0f} s: the cluster has no free place; waiting for one"
        self._story.tell("note", message=reason, warning=True)
        self._spawn(self._start_worker(size))

    def _start_again(self, member: Member, reason: str) -> None:
        """Of eight GPUs one may be broken: as long as others compute, that ends no render."""
        self._dismiss(member.worker_id)
        failures = member.failures + 1
        if failures >= FAILED_STARTS and not self._has_company(member):
            self._put(ev.LedgerFailed(time.monotonic(), ev.Fault("permanent", reason)))
            return
        self._story.tell("note", message=reason, warning=True)
        # On its own: for days of failures one start would wait within the other.
        self._spawn(self._start_worker(member.door.size, failures))

    def _has_company(self, member: Member) -> bool:
        """Whether another worker, of its size or larger, is at work."""
        others = (other for other in self._members.values() if other is not member and other.host)
        return any(other.door.size >= member.door.size for other in others)

    async def _assign(self, member: Member, role: Role) -> None:
        self._story.tell("role", worker=member.worker_id, role=role)
        answer = await self._ask(member, member.door.assume(role, self._weights.get(role), self._memory))
        if isinstance(answer, Failed):
            # The machine has a worker replaced that could not take its role.
            member.failures += 1
            self._put(ev.RoleFailed(time.monotonic(), member.worker_id, role, answer.fault))
        elif answer is not None:
            member.failures = 0
            self._story.tell("ready", worker=member.worker_id, role=role)
            self._put(ev.WorkerReady(time.monotonic(), member.worker_id, role))

    async def _dispatch(self, member: Member, order: Order) -> None:
        task, worker_id = order.task, member.worker_id
        self._story.tell("dispatched", task=task.id, label=task.label, worker=worker_id, attempt=order.attempt)
        poll = asyncio.create_task(self._poll(member, order))
        try:
            answer = await self._ask(member, member.door.run(order))
        finally:
            poll.cancel()
        about = (time.monotonic(), worker_id, task.id, order.attempt, order.epoch)
        if isinstance(answer, Failed):
            about_log = {"log": log_path(task.id, order.attempt, order.epoch)}
            what = {"label": task.label, "host": member.host, "kind": answer.fault.kind}
            self._story.tell("failed", task=task.id, **what, message=answer.fault.message, **about_log)
            self._put(ev.TaskFailed(*about, answer.fault, answer.partial, answer.steps))
            self._retire(member)
        elif isinstance(answer, Produced):
            self._put(ev.TaskProduced(*about, answer))

    async def _poll(self, member: Member, order: Order) -> None:
        """Ask for progress now and then, while the order runs."""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                # Not by `wait_for`, which in Python 3.11 forgets that it was cancelled if the answer comes just then.
                async with asyncio.timeout(POLL_LIMIT_S):
                    now = await member.door.progress()
            except (TimeoutError, *RAY_LOSSES):
                # Silence is no progress: the machine's own limits decide what that means.
                continue
            if now.task_id == order.task.id:
                about = (time.monotonic(), member.worker_id, now.task_id, now.attempt)
                self._put(ev.Progress(*about, now.steps, now.frames))
                if now.partial is not None:
                    self._put(ev.Progress(*about, now.partial_steps, now.frames, now.partial))

    async def _ask(self, member: Member, call: Coroutine[Any, Any, T]) -> T | None:
        """The answer to a call, or None if the worker was lost instead (and is being replaced)."""
        try:
            return await call
        except RAY_LOSSES as error:
            if member.worker_id in self._members:
                await self._lose(member, await fate_of(member.door, error))
            return None

    async def _lose(self, member: Member, error: BaseException) -> None:
        """Tell the machine that a worker is gone, unless it has been ended meanwhile, and replace it."""
        event = await asyncio.to_thread(lost_worker, time.monotonic(), member, error)
        if member.worker_id in self._members:
            about = {"worker": member.worker_id, "host": member.host}
            self._story.tell("worker_lost", **about, reason=event.reason)
            self._put(event)
            self._replace(member.worker_id)

    def _retire(self, member: Member) -> None:
        """Replace a worker that is of no use any more, after what it has answered is told."""
        if member.door.broken and member.worker_id in self._members:
            self._story.tell("worker_recycled", worker=member.worker_id, reason=member.door.broken)
            # Whatever it has been given since is not to blame.
            self._put(ev.WorkerLost(time.monotonic(), member.worker_id, member.door.broken, node_lost=True))
            self._replace(member.worker_id)

    def _replace(self, worker_id: str) -> None:
        member = self._dismiss(worker_id)
        if member is not None:
            self._spawn(self._start_worker(member.door.size, member.failures))

    def _dismiss(self, worker_id: str) -> Member | None:
        """End a worker's processes; whatever they still answer is ignored. None if it has been ended before."""
        member = self._members.pop(worker_id, None)
        if member is not None:
            member.door.end()
        return member

    # Housekeeping

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._put(ev.Tick(time.monotonic()))

    async def _measure(self, meters: Meters) -> None:
        """Tell Prometheus how things stand."""
        while True:
            if self._machine is not None:
                meters.look(self._machine.progress(time.monotonic()), time.monotonic())
            await asyncio.sleep(LOOK_S)

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                await self._io_call(self._ledger.renew_lease)
            except LongtakeError as error:
                self._put(ev.LedgerFailed(time.monotonic(), ev.fault_of(error)))

    async def _watch_requests(self) -> None:
        """Look for what people ask for in the store; a store that does not answer now is asked again."""
        known: set[str] = set()
        while True:
            await asyncio.sleep(REQUESTS_S)
            with contextlib.suppress(LongtakeError):
                for request in await self._io_call(lambda: new_requests(self._store, self._ledger.epoch, known)):
                    known.add(request.id)
                    self._put(ev.Asked(time.monotonic(), request))

    async def _watch_nodes(self) -> None:
        """Pass preemption notices on, each once; a head that does not answer now is asked again."""
        told: set[str] = set()
        while True:
            with contextlib.suppress(*RAY_LOSSES):
                for node_id, left_s in (await asyncio.to_thread(draining_nodes)).items():
                    if node_id not in told:
                        self._story.tell("node_draining", node=node_id, seconds_left=left_s)
                    for place_id in self._places_on(node_id) - told:
                        told.add(place_id)
                        self._put(ev.NodeDraining(time.monotonic(), place_id, left_s))
            await asyncio.sleep(DRAIN_S)

    def _places_on(self, node_id: str) -> set[str]:
        """What goes with a node: itself, and every gang that has a member on it."""
        doors = [member.door for member in self._members.values()]
        return {node_id} | {door.node_id for door in doors if node_id in door.node_ids}

    async def _answer(self, request: Request) -> None:
        """Tell whoever asked; if that fails they find it in the journal."""
        self._story.tell("asked", request=request.kind)
        with contextlib.suppress(LongtakeError):
            await self._io_call(lambda: mark_taken(self._store, self._ledger.epoch, request.id))

    async def _publish(self) -> None:
        """Write what a person looks at; a failure there never harms the render."""
        try:
            await asyncio.to_thread(self._publisher.refresh, dict(self._commits))
        except NOT_SHOWN as error:
            self._story.tell("note", message=f"not refreshed: {error}", warning=True)

    async def _publish_end(self, finish: ev.Finish) -> None:
        state: RenderState = "done" if finish.exit_code == 0 else "failed"
        if finish.exit_code in (75, 130):
            state = "stopped"
        try:
            await asyncio.to_thread(self._publisher.conclude, dict(self._commits), state, finish.message)
            film = self._commits.get(self._publisher.plan.film_task_id)
            if film is not None and not await asyncio.to_thread(is_page_of, self._store, film):
                await self._measure_film()
        except NOT_SHOWN as error:
            # The film is committed: what people look at beside it must not turn that into a failure.
            self._story.tell("note", message=f"not refreshed: {error}", warning=True)

    async def _measure_film(self) -> None:
        """Make the page about the film. No worker is held for it, and whoever asks to stop does not wait for it."""
        await self._end_workers()
        process = await asyncio.to_thread(start_page, self._store.url, self._job.settings.ffmpeg)
        ending = asyncio.create_task(asyncio.to_thread(process.communicate))
        stopped = asyncio.create_task(self._stop_wanted())
        try:
            await asyncio.wait({ending, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            process.kill()
            stopped.cancel()
        _, complaint = await ending
        if process.returncode:
            said = complaint.strip().splitlines() or ["no reason given"]
            reason = "stopped" if process.returncode < 0 else said[-1]
            message = f"{PAGE} was not made ({reason}); the same command makes it"
            self._story.tell("note", message=message, warning=True)

    async def _stop_wanted(self) -> None:
        while not isinstance(await self._queue.get(), ev.StopRequested):
            pass

    async def _close(self) -> None:
        for task in list(self._background):
            task.cancel()
        await self._end_workers()
        with contextlib.suppress(LongtakeError):
            if self._ledger.epoch and not self._given_up.is_set():
                await self._io_call(self._ledger.release_lease)

    async def _end_workers(self) -> None:
        for member in list(self._members.values()):
            with contextlib.suppress(*RAY_LOSSES, asyncio.TimeoutError):
                await asyncio.wait_for(member.door.dismiss(), DISMISS_LIMIT_S)
            self._dismiss(member.worker_id)

    def _put(self, event: ev.Event) -> None:
        self._queue.put_nowait(event)

    def _later(self, action: Callable[[], None]) -> None:
        """Run in the event loop, from whichever thread."""
        self._loop.call_soon_threadsafe(action)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[None]) -> None:
        """A background task that breaks must not leave the render waiting for ever."""
        self._background.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            message = f"unexpected {type(error).__name__}: {record_crash(error)}"
            self._put(ev.LedgerFailed(time.monotonic(), ev.Fault("permanent", message)))

    async def _io_call(self, call: Callable[[], T]) -> T:
        """The answer of a call to the ledger or the store, made after those before it.

        Raises StoreError if somebody has asked to stop and it does not come: the patience of `Ledger` is not theirs.
        What the call still writes is ours to write, for as long as the process is there.
        """
        self._loop = asyncio.get_running_loop()
        began_s, answer = time.monotonic(), self._loop.run_in_executor(self._io, call)
        while not (await asyncio.wait({answer}, timeout=STORE_LOOK_S))[0]:
            if self._is_given_up(began_s):
                self._given_up.set()
                answer.cancel()
                raise StoreError("the store has not answered since the stop was asked for")
        return answer.result()

    def _pause(self, seconds: float) -> None:
        """Between two tries of the ledger's; ends them where nobody waits any more, so that no thread lingers."""
        if self._given_up.wait(seconds):
            raise StoreError("the store is not waited for any longer")

    def _is_given_up(self, began_s: float) -> bool:
        """Whether a call that has had no answer since then is not waited for any longer."""
        if not self._stops:
            return False
        asked_s = max(began_s, self._stops[0][0])
        return len(self._stops) > 1 or time.monotonic() - asked_s > STORE_LIMIT_S


async def fate_of(door: Door, error: BaseException) -> BaseException:
    """What Ray says of a worker whose connection broke, as soon as it knows: its process died, or its node.

    That a node is gone shows only after several health checks without an answer, 15 s by Ray's own settings; until
    then a lost node looks like a worker that died, which would be charged.
    """
    fate, until_s = error, time.monotonic() + FATE_LIMIT_S
    while isinstance(fate, ray_errors.ActorUnavailableError) and time.monotonic() < until_s:
        await asyncio.sleep(FATE_LOOK_S)
        try:
            await asyncio.wait_for(door.answers(), POLL_LIMIT_S)
            break
        except TimeoutError:
            continue
        except RAY_LOSSES as later:
            fate = later
    return fate


def lost_worker(now_s: float, member: Member, error: BaseException) -> ev.WorkerLost:
    """The one place where Ray's exceptions become an event.

    An unavailable actor counts as lost: its order may or may not have been executed, which the ledger and the
    attempt's own folder make harmless.
    """
    match error:
        case ray_errors.OutOfMemoryError():
            return ev.WorkerLost(now_s, member.worker_id, "killed because the node ran out of memory")
        case ray_errors.NodeDiedError():
            return ev.WorkerLost(now_s, member.worker_id, "its node died", node_lost=True)
        case ray_errors.ObjectLostError():
            return ev.WorkerLost(now_s, member.worker_id, "its answer was lost with a node", node_lost=True)
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    node_lost = not alive.issuperset(member.door.node_ids)
    return ev.WorkerLost(now_s, member.worker_id, first_line(error), node_lost)


def with_precision(numerics: Mapping[str, Any], memory: Memory) -> dict[str, Any]:
    """A worker's numerics record with what the render has made of the weights."""
    return {**numerics, "precision": memory.precision}


def workers_part(numerics: Mapping[str, Any]) -> dict[str, Any]:
    """What in a render's numerics record, or a worker's, says how the worker computes: not what the render makes of the
    weights, nor how many compute its segments together.
    """
    return {name: value for name, value in numerics.items() if name not in ("precision", "gang_size")}


class MeteredOrchestrator(Orchestrator):
    """A render on its own, which tells Prometheus how it is. A farm does that for its renders."""

    def __init__(self, job: RenderJob) -> None:
        super().__init__(job, Meters(ray_instrument))


def orchestrator_class() -> Any:
    """The Ray actor class; it holds no GPU and hardly any CPU.

    It lives on the driver's node: the two need each other anyway, so no other machine's end can take it along.
    Strictly: for an actor that asks for no resources Ray takes a mere preference as none and picks any node.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": 100, "scheduling_strategy": here}
    return ray.remote(num_cpus=0, **options)(MeteredOrchestrator)
