"""A farm's books as its event loop uses them: under a lease, one entry after another, through outages of their store.

Whoever asks for something is answered after a few seconds even if the store is not: what was asked stays in line, and
happens once the store takes it. A farm whose books cannot be read, or are another farm's, is there and says so; it
takes over as soon as it can. One that has lost its lease has to end (`on_lost`): the other one has its renders.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, TypeVar

from pipeline.errors import LeaseLost, LongtakeError, SettingError, TransientError, UserError
from pipeline.lease import LeaseHeld, place_of
from pipeline.ledger import Ledger
from pipeline.records import seal
from pipeline.store import Store
from pipeline.submissions import (
    Entry,
    SubmissionBook,
    SubmissionState,
    UsageBook,
    entry_to_json,
    load_price,
    put_price,
)

log = logging.getLogger("longtake.farm")
T = TypeVar("T")

AGAIN_S = 10.0
"""Between two tries, and between two heartbeats."""
ANSWER_S = 10.0
"""Whoever waits for a store that fails is told so after this."""

WATCH_S = 45.0
"""Books are opened within this, if it is to work: a farm on another host was watched for its heartbeat meanwhile."""

Decide = Callable[[SubmissionState | None], Entry | None]
"""What to write of a render, seen as it stands when its turn to be written has come; None for nothing. May raise."""


class FarmBooks:
    """`on_lost` is called when another farm has taken over, and is to end this process. `price_hour` is kept in the
    books; where it is None, what they have stays.
    """

    def __init__(self, store: Store, on_lost: Callable[[], None], price_hour: float | None = None) -> None:
        self._store, self._on_lost, self._given_price = store, on_lost, price_hour
        self._ledger = Ledger(store, outage_s=0.0)
        self._book = SubmissionBook(store)
        self._problem: LongtakeError | None = None
        self._pending: set[asyncio.Task[Any]] = set()
        self._writing, self._opened, self._wanted = asyncio.Lock(), asyncio.Event(), asyncio.Event()
        self._tries = 0
        """How often opening has failed."""
        self.usage = UsageBook()
        self.price_hour = 0.0
        """Of one worker, once the books are open; 0 where none is known."""

    @property
    def states(self) -> Mapping[str, SubmissionState]:
        """Every submission by render id; replaced, never changed."""
        return self._book.states

    @property
    def are_open(self) -> bool:
        """Whether the lease is held and everything was read."""
        return self._opened.is_set()

    async def open(self) -> None:
        """Take the lease and read everything; tried until it works."""
        while (problem := await self._fails(self._open)) is not None:
            self._problem, self._tries = problem, self._tries + 1
            self._wanted.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), AGAIN_S)
        self._problem = None
        self._opened.set()

    def _open(self) -> None:
        if not self._ledger.epoch:
            try:
                self._ledger.take_lease()
            except LeaseHeld as error:
                raise self._refusal() from error
        book = SubmissionBook(self._store)
        book.load()
        self.usage = UsageBook.load(self._store)
        if self._given_price is not None:
            self._ledger.check_lease()
            put_price(self._store, self._given_price)
        self.price_hour = load_price(self._store)
        if self._given_price is None and self.price_hour:
            log.warning("no --price was given: a worker costs %g an hour, as the books say", self.price_hour)
        self._book = book

    def check_counted(self, most_cost: float | None) -> None:
        """Raise SettingError for a budget where no price is known: nothing is spent that is not counted."""
        if most_cost is not None and not self.price_hour:
            remedy = "`longtake farm stop`, then `longtake farm start --price P` on the same books: they keep it."
            raise SettingError("the farm knows no price", field="--max-cost", value=most_cost, remedy=remedy)

    async def when_open(self) -> None:
        """Raises why they cannot be opened, after another try; what may pass by itself only after a while."""
        since_s, tries = time.monotonic(), self._tries
        self._wanted.set()
        while not self.are_open:
            if self._tries > tries and isinstance(self._problem, UserError):
                raise self._problem
            waited_s = time.monotonic() - since_s
            if waited_s > (WATCH_S if self._problem is None else ANSWER_S):
                why = self._problem or f"no answer for {waited_s:.0f} s"
                raise TransientError(f"the farm cannot open its books at {self._store.url} yet: {why}")
            await asyncio.sleep(0.05)

    async def write(self, render_id: str, decide: Decide) -> None:
        """Durable when it returns, however long the store takes: a farm that ended instead would take the work of all
        its renders along.
        """
        async with self._writing:
            entry = decide(self.states.get(render_id))
            if entry is not None:
                # What is no record at all is refused here: it would be tried for ever, and all others wait behind it.
                seal(entry_to_json(entry))
                await self._until_it_works(lambda: self._add(render_id, entry))

    def _add(self, render_id: str, entry: Entry) -> None:
        self._ledger.check_lease()
        self._book.add(render_id, entry)

    async def ask(self, render_id: str, decide: Decide) -> None:
        """`write` for somebody who waits."""
        await self.soon(self.write(render_id, decide))

    async def soon(self, work: Coroutine[Any, Any, T]) -> T:
        """Work that writes, for somebody who waits: TransientError if it takes long. It goes on all the same."""
        task = asyncio.get_running_loop().create_task(work)
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)
        done, _ = await asyncio.wait({task}, timeout=ANSWER_S)
        if done:
            return task.result()
        task.add_done_callback(_tell_refusal)
        why = self._problem or f"no answer for {ANSWER_S:.0f} s"
        message = f"the farm's books at {self._store.url} cannot be written now ({why})"
        raise TransientError(f"{message}; what was asked happens as soon as they can, unless the farm ends before")

    async def beat(self) -> None:
        """Heartbeats, for ever."""
        while True:
            await asyncio.sleep(AGAIN_S)
            await self._fails(self._ledger.renew_lease)

    async def keep(self) -> None:
        """What was used, written down now and then: a farm that is killed forgets the last seconds."""
        written = UsageBook()
        while True:
            await asyncio.sleep(AGAIN_S)
            now = self.usage.copied()
            if now != written and not await self._fails(partial(now.put, self._store)):
                written = now

    async def close(self) -> None:
        """The last words of a farm that is stopped; one whose store does not take them is stopped all the same."""
        for last in (partial(self.usage.copied().put, self._store), self._ledger.release_lease):
            try:
                await asyncio.wait_for(self._fails(last), ANSWER_S)
            except TimeoutError:
                log.warning("the books at %s do not answer: the last seconds of usage may be missing", self._store.url)

    async def _until_it_works(self, call: Callable[[], object]) -> None:
        while (problem := await self._fails(call)) is not None:
            self._problem = problem
            await asyncio.sleep(AGAIN_S)
        self._problem = None

    async def _fails(self, call: Callable[[], object]) -> LongtakeError | None:
        try:
            await asyncio.to_thread(call)
        except LeaseLost as error:
            log.error("the farm ends here: %s", error)
            self._on_lost()
            raise
        except LongtakeError as error:
            log.warning("the books at %s, tried again: %s", self._store.url, error)
            return error
        except Exception as error:
            # Nothing that a file system comes up with is worth the work of all renders.
            log.exception("the books at %s, tried again", self._store.url)
            return TransientError(f"{type(error).__name__}: {error}")
        return None

    def _refusal(self) -> SettingError:
        holder = self._ledger.holder()
        message = f"another farm keeps its books here ({place_of(holder) if holder else 'gone by now'})"
        remedy = "Submit to that one, or stop it (`longtake farm stop`)."
        return SettingError(message, field="--farm-store", value=self._store.url, remedy=remedy)


def _tell_refusal(task: asyncio.Task[Any]) -> None:
    """Of something that was refused when nobody waited for it any more."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("what was asked for a while ago was refused: %s", error)
