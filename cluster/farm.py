"""The farm: a detached, named Ray actor that carries many renders at once on workers that they share.

It decides nothing about tasks (each render's machine does) and nothing about who gets which worker
(`pipeline.farm` does): it keeps the queue, opens renders, lends workers, counts what they use, and keeps the pool at
the size that is wanted. Everything it has to remember is in its own store (`pipeline.submissions`) and in the renders'
ledgers, so Ray may restart it anywhere at any time; workers end with the process that started them and are started
again.

Ray calls its methods in threads; all state belongs to one event loop in a thread of its own, so that it works on after
a restart without anybody calling.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Container, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import ray

from cluster.ask import ask, new_request
from cluster.farm_books import FarmBooks
from cluster.farm_events import Events, forget_ended
from cluster.farm_hooks import call_hooks
from cluster.farm_metrics import FarmMetrics
from cluster.farm_pool import Hand, Pool
from cluster.farm_schedules import TURN_S as SCHEDULES_S
from cluster.farm_schedules import FarmRunner, FarmSchedules, schedules_place
from cluster.farmed_render import FarmedRender
from cluster.job import Outcome, RenderJob, Serves, WorkerSettings
from cluster.metrics import LOOK_S, ray_instrument
from cluster.placement import GPU_HOST_THREADS, Placement
from cluster.recipe import RECIPE_FILE, Recipe, load_recipe, make_plan
from cluster.session import NAMESPACE
from pipeline.errors import SettingError, TransientError
from pipeline.events import ProgressSummary
from pipeline.facts import CheckpointFacts
from pipeline.farm import Borrower, Lender, Load, Queued, gangs_wanted, lend, open_next, workers_wanted
from pipeline.ledger import Ledger
from pipeline.media_encode import ENCODER_THREADS
from pipeline.store import open_store
from pipeline.submissions import (
    Adjusted,
    Changed,
    Phase,
    Submission,
    SubmissionState,
    Submitted,
    UsageBook,
    check_render_id,
    same_order,
    wishes_that_differ,
)
from pipeline.tasks import CommitRecord, TaskKind

log = logging.getLogger("longtake.farm")
T = TypeVar("T")

ACTOR_NAME = "farm"
TURN_S = 1.0
"""At most so long between two looks at everything; changes are looked at as they come."""
UNUSED_S = 2.0
"""A worker that came back unused is not offered to the same render before that."""
MOST_WAITING = 64
"""Calls that wait in threads, for stores, hooks and report pages. By itself a loop has six threads on two cores, and as
many hooks that hang would hold up the books.
"""
CALL_LIMIT_S = 120.0
SAVE_LIMIT_S = 60.0
HOOKS_S = 5.0
"""So long whoever watches waits at the end, to hear of a hook that fails."""
FIRST_LOAD_S = {"cuda": 60.0, "cpu": 2.0}
"""Expected until a loading has been measured."""


@dataclass(frozen=True)
class FarmSettings:
    """What a farm is started with."""

    store_url: str
    """Where it keeps its books."""
    device: str = "cpu"
    """What workers compute on: cuda or cpu."""
    slots: str = "CPU"
    """The resource of a node that is counted to see how many workers it takes: GPU or CPU."""
    threads: int | None = None
    most_workers: int | None = None
    idle_s: float = 120.0
    """A worker that nobody has needed for so long is ended."""
    price_hour: float | None = None
    """Of one worker. None: that of the books stays; 0: none is known."""
    ffmpeg: str | None = None

    @property
    def placement(self) -> Placement:
        """What one worker reserves. `workers` says nothing here: the queue decides."""
        if self.device == "cuda":
            return Placement("cuda", "bfloat16", 1, self.threads or GPU_HOST_THREADS, 1.0, 1.0)
        threads = self.threads or 1
        gpus = 1.0 if self.slots == "GPU" else 0.0
        return Placement("cpu", "float32", 1, threads, float(threads), gpus)


@dataclass(frozen=True)
class Row:
    """One render as the farm shows it. Times are Unix times."""

    render_id: str
    title: str
    owner: str
    phase: Phase
    priority: int
    submitted_at_s: float
    since_s: float
    store_url: str
    workers: int
    message: str
    exit_code: int | None
    done: int = 0
    tasks: int = 0
    eta_s: float | None = None


@dataclass(frozen=True)
class FarmNews:
    """What a render's watcher is told: events since a cursor, progress while it runs, and where it stands."""

    events: list[dict[str, Any]]
    cursor: int
    summary: ProgressSummary | None
    row: Row


@dataclass
class _Open:
    """A render that is open."""

    render: FarmedRender
    borrower: Borrower
    serves: Serves
    cursor: int = 0
    ending: Phase | None = None
    """What it is to be once it has stopped, if somebody asked."""
    why: str = ""
    told: set[str] = field(default_factory=set)
    """Draining nodes that it knows of."""


class Farm:
    """The actor. Public methods may be called at any time, again after a lost answer, and raise LongtakeError."""

    def __init__(self, settings: FarmSettings) -> None:
        self._settings = settings
        self._store = open_store(settings.store_url)
        self._books = FarmBooks(self._store, lambda: os._exit(1), settings.price_hour)
        self._open: dict[str, _Open] = {}
        self._events: dict[str, Events] = {}
        self._held_back: set[str] = set()
        """To be paused or cancelled, which is not written down yet: not to be begun."""
        self._telling: set[str] = set()
        """Ended, and their hooks may not have."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._load_s: dict[Load, float] = {}
        self._pace: dict[TaskKind, tuple[float, float]] = {}
        self._stopping = False
        self._metrics = FarmMetrics(ray_instrument)
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(MOST_WAITING, "farm"))
        threading.Thread(target=self._run_loop, name="farm", daemon=True).start()

    # What is asked from outside, in Ray's threads

    def hello(self) -> FarmSettings:
        """Returns when the farm has read its books, with the price they keep."""
        return self._call(self._hello())

    def submit(self, submission: Submission) -> tuple[Row, bool]:
        """Queue a render; its row, and whether it was there already: the same order again attaches to it.

        One that has ended, or was paused, is queued again; SettingError for another order while it is open.
        """
        return self._call(self._submit(submission))

    def rows(self) -> list[Row]:
        """All renders, those that wait or run first, in the order in which they would be opened."""
        return self._call(self._rows())

    def describe(self, render_id: str) -> Row:
        """One render."""
        return self._call(self._describe(render_id))

    def follow(self, render_id: str, cursor: int) -> FarmNews:
        """News of a render since `cursor` (0: the last ones)."""
        return self._call(self._follow(render_id, cursor))

    def change(self, render_id: str, phase: Phase) -> Row:
        """Pause, queue again (resume) or cancel a render. Returns when that is written down."""
        return self._call(self._change(render_id, phase))

    def adjust(self, render_id: str, entry: Adjusted) -> Row:
        """Another priority, budget or deadline; the running run feels all but the deadline."""
        return self._call(self._adjust(render_id, entry))

    def usage(self) -> UsageBook:
        """What was used so far."""
        return self._call(self._get_usage())

    def stop(self) -> None:
        """Save what runs, end the workers, want nothing. The queue stays for the next farm on the same books."""
        self._call(self._stop())

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_LIMIT_S)
        except TimeoutError as error:
            message = f"the farm has not answered for {CALL_LIMIT_S:.0f} s; what was asked of it may still happen"
            raise TransientError(message) from error

    # The loop

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        except BaseException:
            # Without its loop the actor is an empty shell: end, and Ray starts it again.
            log.exception("the farm's loop has ended")
            os._exit(1)

    async def _main(self) -> None:
        self._wake = asyncio.Event()
        settings = self._settings
        self._pool = Pool(
            self._worker_settings("", CheckpointFacts("", "")),
            settings.placement,
            slots=settings.slots,
            idle_s=settings.idle_s,
            changed=self._wake.set,
            spawn=self._spawn,
        )
        await self._books.open()
        self._spawn(self._pool.watch())
        self._spawn(self._books.beat())
        self._spawn(self._books.keep())
        self._spawn(self._show())
        self._spawn(self._keep_schedules())
        while True:
            self._turn()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), TURN_S)
            self._wake.clear()

    def _turn(self) -> None:
        """Look at everything once."""
        if self._stopping:
            return
        self._refuse_uncounted()
        # First what a worker waits for.
        self._look_at_renders()
        self._pool.form(gangs_wanted(one.borrower for one in self._open.values()))
        self._lend()
        self._open_renders()
        due = sum(entry.start_after_s <= time.time() for entry in self._queue())
        wanted = workers_wanted(due, [one.borrower for one in self._open.values()])
        self._pool.resize(wanted, self._settings.most_workers)

    def _worker_settings(self, store_url: str, checkpoint: CheckpointFacts) -> WorkerSettings:
        place = self._settings.placement
        return WorkerSettings(
            store_url=store_url or self._settings.store_url,
            checkpoint_path=checkpoint.path,
            checkpoint_digest=checkpoint.digest,
            device=place.device,
            dtype=place.dtype,
            threads=place.threads,
            ffmpeg=self._settings.ffmpeg,
            encoder_threads=ENCODER_THREADS,
            scratch_root=None,
        )

    # Renders

    def _queue(self) -> list[Queued]:
        """What waits for its turn; renders that ran when the farm was last there come first of their priority."""
        return [
            Queued(
                render_id,
                state.submission.owner,
                state.submission.priority,
                state.submitted_at_s if state.phase == "queued" else 0.0,
                state.submission.start_after_s,
            )
            for render_id, state in self._books.states.items()
            if state.is_open and render_id not in self._open and render_id not in self._held_back
        ]

    def _refuse_uncounted(self) -> None:
        """Begin nothing that has a budget where no price is known, and ask for no workers for it."""
        for queued in self._queue():
            try:
                self._books.check_counted(self._books.states[queued.render_id].submission.most_cost)
            except SettingError as error:
                self._held_back.add(queued.render_id)
                self._spawn(self._refuse(queued.render_id, f"{error} Then `longtake resume {queued.render_id}`"))

    async def _refuse(self, render_id: str, why: str) -> None:
        end = Changed(time.time(), "paused", why, 75)
        self._telling.add(render_id)
        await self._books.write(render_id, lambda state: end if state and state.is_open else None)
        self._held_back.discard(render_id)
        await self._tell_hooks(render_id)

    def _open_renders(self) -> None:
        lenders = self._pool.lenders()
        # As many as there will be workers, so that the first ones do not wait for the cluster to grow.
        slots = sum(node.slots for node in self._pool.nodes.values() if not node.draining)
        most = self._settings.most_workers or slots
        idle = sum(not worker.render_id and not worker.draining for worker in lenders)
        while render_id := open_next(
            time.time(), self._queue(), [one.borrower for one in self._open.values()], min(most, slots), idle
        ):
            self._open_render(render_id)
            idle -= 1

    def _open_render(self, render_id: str) -> None:
        state = self._books.states[render_id]
        submission = state.submission
        recipe = Recipe.from_json(submission.recipe)
        settings = replace(
            self._worker_settings(submission.store_url, recipe.facts.checkpoint), gang_size=submission.gang
        )
        job = RenderJob(
            submission.store_url,
            recipe,
            self._settings.placement,
            settings,
            allow_mixed=submission.allow_mixed,
            deadline_s=submission.deadline_s,
        )
        borrower = Borrower(
            render_id,
            submission.owner,
            submission.priority,
            state.submitted_at_s,
            _on_own_clock(submission.done_by_s),
            submission.most_workers,
            submission.gang,
            served_s=time.monotonic(),
        )
        serves = Serves(settings.store_url, settings.checkpoint_path, settings.checkpoint_digest)
        self._open[render_id] = one = _Open(FarmedRender(render_id, job, self), borrower, serves)
        self._spawn(self._carry(one, state.phase == "queued"))

    async def _carry(self, one: _Open, is_new: bool) -> None:
        """A render from here to its outcome."""
        render_id = one.render.render_id
        if is_new and one.ending is None:
            await self._books.write(render_id, lambda state: Changed(time.time(), "running"))
        outcome = await one.render.run()
        self._collect(one)
        goes_on = self._stopping and outcome.exit_code == 75 and one.ending is None
        if not goes_on:
            phase, message = one.ending or _phase_of(outcome), one.why or outcome.message
            if outcome.exit_code == 0:
                phase, message = "done", ""
                if self._books.states[render_id].submission.ends_for_approval:
                    phase, message = "approval", f"stage one is there; `longtake resume {render_id}` refines it"
            end = Changed(time.time(), phase, message, outcome.exit_code)
            self._telling.add(render_id)
            # What was asked for is written down already.
            await self._books.write(render_id, lambda state: None if state and state.phase == phase else end)
        del self._open[render_id]
        forget_ended(self._events, self._open)
        for hand in list(self._pool.hands.values()):
            if hand.lender.render_id == render_id:
                # Lent at the last moment, and not used.
                self._free(hand)
        self._wake.set()
        if not goes_on:
            await self._tell_hooks(render_id)

    async def _tell_hooks(self, render_id: str) -> None:
        if why := await asyncio.to_thread(call_hooks, self._books.states[render_id]):
            # Whatever a person has changed meanwhile stays.
            await self._books.write(render_id, lambda state: state.with_failed_hook(why) if state else None)
        self._telling.discard(render_id)

    def _look_at_renders(self) -> None:
        """Take in what the renders need now, and stop those that have spent what they may."""
        for one in self._open.values():
            render, borrower = one.render, one.borrower
            self._collect(one)
            self._tell_of_drains(one)
            borrower.loads, borrower.needs, borrower.numerics = render.loads, render.needs, render.numerics
            state = self._books.states[render.render_id]
            borrower.priority = state.submission.priority
            borrower.done_by_s = _on_own_clock(state.submission.done_by_s)
            most_cost, spent = state.submission.most_cost, self._books.usage.of(render.render_id, borrower.owner).cost
            if most_cost is not None and spent >= most_cost and one.ending is None:
                one.ending, one.why = "paused", f"{spent:.2f} are spent; --max-cost is {most_cost:.2f}"
            if one.ending is not None:
                borrower.paused = True
                # What runs now is the last task of each worker: it is finished, nothing new is begun.
                if one.why and not self._held(render.render_id):
                    self._spawn(render.stop(75))

    def _tell_of_drains(self, one: _Open) -> None:
        for node_id, node in self._pool.nodes.items():
            if node.draining and node_id not in one.told:
                one.told.add(node_id)
                one.render.drain(node_id, node.left_s)

    def _held(self, render_id: str) -> int:
        return sum(hand.lender.size for hand in self._pool.hands.values() if hand.lender.render_id == render_id)

    def _collect(self, one: _Open) -> None:
        events, one.cursor = one.render.take_events(one.cursor)
        self._events.setdefault(one.render.render_id, Events()).add(events)

    # Lending

    def _lend(self) -> None:
        lenders: list[Lender] = self._pool.lenders()
        borrowers = [one.borrower for one in self._open.values()]
        for grant in lend(time.monotonic(), lenders, borrowers, self._expected_load_s):
            hand, one = self._pool.hands[grant.worker_id], self._open[grant.render_id]
            load = one.borrower.loads[grant.role]
            self._count_idle(hand)
            hand.lender.render_id = grant.render_id
            hand.lender.until_s = time.monotonic() + self._expected_load_s(load)
            one.borrower.served_s = time.monotonic()
            hand.member.door.serves = one.serves
            one.render.lend(grant, replace(hand.member), hand.numerics, hand.lender.load == load)

    def _expected_load_s(self, load: Load) -> float:
        return self._load_s.get(load, FIRST_LOAD_S[self._settings.device])

    def _free(self, hand: Hand) -> None:
        hand.lender.render_id, hand.since_s = "", time.monotonic()
        self._pool.end_if_leaving(hand)
        self._wake.set()

    def _count_idle(self, hand: Hand) -> None:
        self._books.usage.of("").idle_s += (time.monotonic() - hand.since_s) * hand.lender.size
        hand.since_s = time.monotonic()

    # What the renders tell (`farmed_render.FarmSide`)

    def needs_changed(self) -> None:
        self._wake.set()

    def loading(self, worker_id: str) -> None:
        if hand := self._pool.hands.get(worker_id):
            hand.lender.load = None
            if one := self._open.get(hand.lender.render_id):
                # So that others wait for it rather than load the same.
                grant = one.render.grant_of(worker_id)
                hand.lender.load = one.borrower.loads[grant.role]
                hand.lender.until_s = time.monotonic() + self._expected_load_s(hand.lender.load)

    def loaded(self, worker_id: str, load: Load, seconds: float) -> None:
        self._load_s[load] = seconds
        if hand := self._pool.hands.get(worker_id):
            self._use(hand.lender.render_id, loading_s=seconds * hand.lender.size)

    def working(self, worker_id: str, kind: TaskKind, expected_s: float) -> None:
        if hand := self._pool.hands.get(worker_id):
            spent_s, planned_s = self._pace.get(kind, (1.0, 1.0))
            hand.lender.until_s = time.monotonic() + expected_s * spent_s / planned_s

    def worked(
        self, render_id: str, size: int, kind: TaskKind, expected_s: float, seconds: float, record: CommitRecord | None
    ) -> None:
        spent_s = seconds * size
        self._use(render_id, busy_s=spent_s if record else 0.0, lost_s=0.0 if record else spent_s)
        if record is not None and expected_s > 0:
            spent_s, planned_s = self._pace.get(kind, (0.0, 0.0))
            self._pace[kind] = spent_s + seconds, planned_s + expected_s
        self._metrics.count_task(kind, seconds, record)

    def returned(self, worker_id: str, render_id: str, used: bool) -> None:
        if hand := self._pool.hands.get(worker_id):
            self._free(hand)
            if not used and (one := self._open.get(render_id)):
                one.borrower.not_before_s = {**one.borrower.not_before_s, worker_id: time.monotonic() + UNUSED_S}

    def lost(self, worker_id: str, reason: str) -> None:
        log.warning("worker %s is ended: %s", worker_id, reason)
        self._metrics.count_lost()
        self._pool.end(worker_id)

    def _use(self, render_id: str, *, busy_s: float = 0.0, loading_s: float = 0.0, lost_s: float = 0.0) -> None:
        state = self._books.states.get(render_id)
        usage = self._books.usage.of(render_id, state.submission.owner if state else "")
        cost = (busy_s + loading_s + lost_s) / 3600 * self._books.price_hour
        usage.busy_s += busy_s
        usage.loading_s += loading_s
        usage.lost_s += lost_s
        usage.cost += cost
        self._metrics.count_cost(cost)

    # Answers

    async def _hello(self) -> FarmSettings:
        await self._books.when_open()
        return replace(self._settings, price_hour=self._books.price_hour)

    async def _submit(self, submission: Submission) -> tuple[Row, bool]:
        await self._books.when_open()
        self._books.check_counted(submission.most_cost)
        render_id, known = submission.render_id, False

        def decide(state: SubmissionState | None) -> Submitted | None:
            nonlocal known
            known = state is not None and self._is_there(state, submission)
            if not known:
                self._check_store(submission)
            return None if known else Submitted(time.time(), submission)

        await self._books.ask(render_id, decide)
        self._wake.set()
        row, state = self._row(render_id), self._books.states[render_id]
        if known and state.is_open and (kept := wishes_that_differ(state.submission, submission)):
            remedy = "`longtake priority` and `resume` change what can be changed"
            row = replace(row, message=f"{', '.join(kept)} as before: {remedy}")
        return row, known

    def _is_there(self, state: SubmissionState, submission: Submission) -> bool:
        """Whether nothing is to be done for this order. Raises SettingError where it cannot be taken."""
        same, render_id = same_order(state.submission, submission), submission.render_id
        if state.is_open and not same:
            remedy = f"`longtake cancel {render_id}` first; what is committed is kept."
            raise SettingError("another version of it is queued or runs", field="ID", value=render_id, remedy=remedy)
        if same and (state.is_open or state.phase in ("done", "approval")):
            return True
        if render_id in self._open:
            raise _still_ending(render_id)
        return False

    def _check_store(self, submission: Submission) -> None:
        """Raise SettingError if another open render works in its store: the two would lock each other out."""
        for other_id, state in self._books.states.items():
            busy = state.is_open or other_id in self._open
            if busy and other_id != submission.render_id and state.submission.store_url == submission.store_url:
                remedy = f"`longtake watch {other_id}` follows it; another film wants another --store."
                place = submission.store_url
                raise SettingError(f"{other_id} works there", field="--store", value=place, remedy=remedy)

    async def _rows(self) -> list[Row]:
        await self._books.when_open()
        rows = [self._row(render_id) for render_id in self._books.states]
        order = ("running", "queued", "approval", "paused", "failed", "cancelled", "done")
        return sorted(rows, key=lambda row: (order.index(row.phase), -row.priority, row.submitted_at_s))

    async def _describe(self, render_id: str) -> Row:
        await self._books.when_open()
        return self._row(self._known(render_id))

    async def _follow(self, render_id: str, cursor: int) -> FarmNews:
        await self._books.when_open()
        if not self._books.states[self._known(render_id)].is_open:
            # Whoever watches goes with this answer.
            await _gone(render_id, self._telling, HOOKS_S)
        if (one := self._open.get(render_id)) is not None:
            self._collect(one)
        events, after = self._events.get(render_id, Events()).since(cursor)
        return FarmNews(events, after, one.render.summary() if one else None, self._row(render_id))

    async def _change(self, render_id: str, phase: Phase) -> Row:
        await self._books.when_open()
        self._known(render_id)
        if phase == "queued":
            await self._queue_again(render_id)
        else:
            await self._end_early(render_id, phase)
        self._wake.set()
        return self._row(render_id)

    async def _queue_again(self, render_id: str) -> None:
        def decide(state: SubmissionState | None) -> Submitted | None:
            if state is None or state.is_open:
                return None
            if render_id in self._open:
                raise _still_ending(render_id)
            order = state.submission
            self._books.check_counted(order.most_cost)
            self._check_store(order)
            return Submitted(time.time(), order.approved() if state.phase == "approval" else order)

        state = self._books.states[render_id]
        if state.phase == "failed":
            await self._io(lambda: give_new_budgets(state.submission.store_url))
        await self._books.ask(render_id, decide)

    async def _end_early(self, render_id: str, phase: Phase) -> None:
        """Pause or cancel: what runs is stopped at once, and the wish written down before that has come to its end, so
        that no farm begins with it again.
        """
        exit_code = {"paused": 75, "cancelled": 130}[phase]

        def decide(state: SubmissionState | None) -> Changed | None:
            # Only what is under way can be paused: an approval, or a failure, is not forgotten for it.
            if state is None or state.phase in (phase, "done") or (phase == "paused" and not state.is_open):
                return None
            return Changed(time.time(), phase, "on request", exit_code)

        async def end() -> None:
            try:
                await self._books.write(render_id, decide)
            finally:
                self._held_back.discard(render_id)

        # At once: before the next turn, which may begin it.
        self._held_back.add(render_id)
        if (one := self._open.get(render_id)) is not None:
            one.ending, one.borrower.paused = phase, True
            await one.render.stop(exit_code)
        await self._books.soon(end())
        await _gone(render_id, self._open, SAVE_LIMIT_S)

    async def _adjust(self, render_id: str, entry: Adjusted) -> Row:
        await self._books.when_open()
        self._books.check_counted(entry.most_cost)
        await self._books.ask(self._known(render_id), lambda state: entry)
        self._wake.set()
        return self._row(render_id)

    async def _get_usage(self) -> UsageBook:
        await self._books.when_open()
        for hand in self._pool.hands.values():
            if hand.greeted and not hand.lender.render_id:
                self._count_idle(hand)
        return self._books.usage.copied()

    async def _stop(self) -> None:
        self._stopping = True
        if not self._books.are_open:
            return
        for one in list(self._open.values()):
            one.borrower.paused = True
            await one.render.stop(75)
        await asyncio.gather(*(_gone(render_id, self._open, SAVE_LIMIT_S) for render_id in self._open))
        self._pool.close()
        await self._books.close()

    def _known(self, render_id: str) -> str:
        if check_render_id(render_id) not in self._books.states:
            remedy = "`longtake list` shows what there is."
            raise SettingError("the farm has no such render", field="ID", value=render_id, remedy=remedy)
        return render_id

    def _row(self, render_id: str) -> Row:
        state, one = self._books.states[render_id], self._open.get(render_id)
        submission = state.submission
        row = Row(
            render_id,
            submission.title,
            submission.owner,
            state.phase,
            submission.priority,
            state.submitted_at_s,
            state.since_s,
            submission.store_url,
            self._held(render_id),
            state.note,
            state.exit_code,
        )
        if one and one.ending:
            row = replace(row, phase="running", message=f"is being {one.ending}: what it has is saved", exit_code=None)
        summary = one.render.summary() if one else None
        if summary is None:
            return row
        phases = summary.phases.values()
        done, tasks = sum(phase.done for phase in phases), sum(phase.total for phase in phases)
        return replace(row, done=done, tasks=tasks, eta_s=summary.eta_s, message=self._waits_for(one) or row.message)

    def _waits_for(self, one: _Open | None) -> str:
        """Why an open render gets no worker, where that is not plain."""
        lenders = self._pool.lenders()
        if not lenders and self._pool.problem:
            return f"no worker could be started: {self._pool.problem}"
        if one is None or self._held(one.render.render_id):
            return ""
        if one.borrower.gang > (places := self._pool.places()):
            return f"waits for a gang of {one.borrower.gang}: there is room for {places} worker(s)"
        if one.borrower.numerics is None:
            return ""
        if lenders and all(worker.numerics != one.borrower.numerics for worker in lenders):
            return "waits for workers with the numerics it was begun with (--allow-mixed takes any)"
        return ""

    # Housekeeping

    async def _show(self) -> None:
        """Tell Prometheus how things stand."""
        while True:
            progress = [summary for one in self._open.values() if (summary := one.render.summary())]
            self._metrics.show(self._books.states.values(), self._pool.lenders(), progress)
            await asyncio.sleep(LOOK_S)

    async def _keep_schedules(self) -> None:
        """Have what is due submitted. In a thread: planning a film takes a while."""
        place = open_store(schedules_place(self._settings.store_url))
        schedules = FarmSchedules(place, FarmRunner(self._books, self.submit, self.change))
        while not self._stopping:
            await asyncio.to_thread(schedules.turn, time.time())
            await asyncio.sleep(SCHEDULES_S)

    async def _io(self, call: Callable[[], T]) -> T:
        return await asyncio.to_thread(call)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the farm has to start again: %s", error, exc_info=error)
            os._exit(1)


def _on_own_clock(unix_s: float | None) -> float | None:
    """A moment as the monotonic clock has it now. Lending goes by that one: a clock that is set back by an hour would
    keep workers from renders for as long.
    """
    return None if unix_s is None else unix_s - time.time() + time.monotonic()


async def _gone(render_id: str, among: Container[str], limit_s: float) -> None:
    """Wait until it is not among them any more, for at most so long."""
    until_s = time.monotonic() + limit_s
    while render_id in among and time.monotonic() < until_s:
        await asyncio.sleep(0.1)


def _still_ending(render_id: str) -> SettingError:
    return SettingError("is still ending", field="ID", value=render_id, remedy="Try again in a few seconds.")


def give_new_budgets(store_url: str) -> None:
    """What `longtake retry` does: tasks that were given up may be tried again. Nothing without a render there."""
    store = open_store(store_url)
    if store.head(RECIPE_FILE) is not None:
        plan = make_plan(load_recipe(store), Ledger(store).load().overrides)
        ask(store, new_request("retry"), plan)


def _phase_of(outcome: Outcome) -> Phase:
    """Of a render that ended by itself, or because somebody asked through its store."""
    return {0: "done", 75: "paused", 130: "cancelled"}.get(outcome.exit_code, "failed")  # type: ignore[return-value]


def farm_actor(settings: FarmSettings) -> Any:
    """Start the farm, or get the one that runs. It outlives whoever calls this."""
    options = {
        "name": ACTOR_NAME,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": -1,
        "max_concurrency": 100,
        # Beside Ray's own head processes, which is where a cluster's stable machine is.
        "resources": {"node:__internal_head__": 0.001},
    }
    return ray.remote(Farm).options(**options).remote(settings)


def running_farm() -> Any:
    """The farm of the cluster this process is connected to. Raises SettingError if there is none."""
    try:
        return ray.get_actor(ACTOR_NAME, namespace=NAMESPACE)
    except ValueError:
        remedy = "`longtake farm start` starts one; `longtake submit` does so, too."
        raise SettingError("there is no farm in this cluster", field="--address", remedy=remedy) from None
