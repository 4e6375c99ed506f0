"""A farm's books through outages of their store and beside another farm, and what a farm answers meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.farm import Farm, FarmSettings, _Open
from cluster.farm_books import FarmBooks
from pipeline.errors import LeaseLost, SettingError, StoreError, StoreFull, TransientError
from pipeline.farm import Borrower
from pipeline.lease import Owner
from pipeline.ledger import Ledger
from pipeline.store import LocalStore
from pipeline.submissions import Adjusted, Changed, Hook, Phase, Submission, SubmissionBook, SubmissionState, Submitted

ELSEWHERE = Owner("other-host/boot/space", 1, "mark")


class Trouble(LocalStore):
    """A folder whose writes of entries fail with `error`, or hang, until it is mended; `broken` breaks reading, too."""

    error: Exception | None = None
    broken = False

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.answers = threading.Event()
        self.answers.set()

    def create_if_absent(self, path: str, data: bytes) -> bool:
        if path.startswith("submissions/"):
            self.answers.wait(30)
            if self.error is not None:
                raise self.error
        return super().create_if_absent(path, data)

    def list(self, prefix: str = "") -> Any:
        if self.broken:
            raise StoreError("no answer")
        return super().list(prefix)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.farm_books.AGAIN_S", 0.02)
    monkeypatch.setattr("cluster.farm_books.ANSWER_S", 0.5)


@pytest.fixture
def store(tmp_path: Path) -> Trouble:
    return Trouble(tmp_path)


def order(**more: Any) -> Submission:
    return Submission("a", "/renders/a", {"spec": {"title": "A"}}, **more)


def submitted(state: SubmissionState | None) -> Submitted:
    return Submitted(1.0, order())


def read(store: LocalStore) -> dict[str, str]:
    book = SubmissionBook(LocalStore(store.root))
    book.load()
    return {render_id: state.phase for render_id, state in book.states.items()}


async def opened(
    store: LocalStore, on_lost: Callable[[], None] = lambda: None, price_hour: float | None = None
) -> FarmBooks:
    books = FarmBooks(store, on_lost, price_hour)
    await books.open()
    return books


async def eventually(holds: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < until_s
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "error",
    [StoreError("no answer"), StoreFull("no space"), SettingError("no permission", field="--store"), OSError("odd")],
)
def test_what_the_store_does_not_take_is_written_once_it_does(store: Trouble, error: Exception) -> None:
    async def told() -> None:
        books = await opened(store)
        store.error = error
        with pytest.raises(TransientError, match="cannot be written now"):
            await books.ask("a", submitted)
        await eventually(lambda: books._problem is not None)
        with pytest.raises(TransientError, match=rf"now \(.*{error.args[0]}.*as soon as they can"):
            await books.ask("a", lambda state: None)
        assert read(store) == {}
        store.error = None
        await eventually(lambda: read(store) == {"a": "queued"})
        assert books.states["a"].phase == "queued"

    asyncio.run(told())


def test_a_store_that_hangs_is_said_too_and_nothing_is_written_twice(store: Trouble) -> None:
    async def told() -> None:
        books = await opened(store)
        store.answers.clear()
        once = lambda state: None if state else Submitted(1.0, order())  # noqa: E731
        for _ in range(2):
            with pytest.raises(TransientError, match="no answer for"):
                await books.ask("a", once)
        store.answers.set()
        await books.ask("a", once)
        assert len(store.list("submissions/a")) == 1

    asyncio.run(told())


def test_books_that_cannot_be_read_are_tried_again_and_said(store: Trouble) -> None:
    async def waits() -> None:
        books, store.broken = FarmBooks(store, lambda: None), True
        opening = asyncio.create_task(books.open())
        with pytest.raises(TransientError, match=r"cannot open its books .* yet: no answer"):
            await books.when_open()
        store.broken = False
        await opening
        await books.when_open()

    asyncio.run(waits())


def test_books_whose_reading_hangs_are_said_too(store: Trouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.farm_books.WATCH_S", 0.3)
    answers = threading.Event()
    monkeypatch.setattr(store, "list", lambda prefix="": answers.wait(30) and [])

    async def waits() -> None:
        books = FarmBooks(store, lambda: None)
        opening = asyncio.create_task(books.open())
        with pytest.raises(TransientError, match="no answer for"):
            await books.when_open()
        answers.set()
        await opening

    asyncio.run(waits())


def test_a_second_farm_is_refused_at_once_and_takes_over_when_the_first_has_ended(store: Trouble) -> None:
    async def both() -> None:
        first = await opened(store)
        await first.ask("a", submitted)
        second = FarmBooks(LocalStore(store.root), lambda: None)
        opening = asyncio.create_task(second.open())
        with pytest.raises(SettingError, match="another farm keeps its books here"):
            await second.when_open()
        await first.close()
        await opening
        assert second.states["a"].phase == "queued"

    asyncio.run(both())


def test_whoever_asks_a_refused_farm_hears_how_it_is_now(store: Trouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.farm_books.AGAIN_S", 60.0)
    monkeypatch.setattr("cluster.farm_books.ANSWER_S", 10.0)

    async def both() -> None:
        first = await opened(store)
        second = FarmBooks(LocalStore(store.root), lambda: None)
        opening = asyncio.create_task(second.open())
        for _ in range(2):
            with pytest.raises(SettingError, match="another farm keeps its books here"):
                await second.when_open()
        await first.close()
        await second.when_open()
        await opening

    asyncio.run(both())


def test_a_farm_whose_books_were_taken_over_ends_and_writes_nothing(store: Trouble) -> None:
    async def loses() -> None:
        ended: list[str] = []
        books = await opened(store, lambda: ended.append("ended"))
        # Its process lives, but another host saw no heartbeat.
        Ledger(store, owner=ELSEWHERE).take_lease(watch_s=0.0)
        with pytest.raises(LeaseLost):
            await books.beat()
        with pytest.raises(LeaseLost):
            await books.write("a", submitted)
        assert ended == ["ended", "ended"] and read(store) == {}

    asyncio.run(loses())


def test_an_order_that_is_no_record_is_refused_and_holds_up_no_other(store: Trouble) -> None:
    async def asks() -> None:
        books = await opened(store)
        with pytest.raises(UnicodeEncodeError):
            await books.ask("b", lambda state: Submitted(1.0, Submission("b", "/renders/b", {}, "\udcff")))
        await books.ask("a", submitted)
        assert read(store) == {"a": "queued"}

    asyncio.run(asks())


def test_two_orders_at_the_same_time_are_one(store: Trouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.farm_books.ANSWER_S", 10.0)

    async def both() -> None:
        farm = farm_on(await opened(store))
        answers = await asyncio.gather(farm._submit(order()), farm._submit(order()))
        assert sorted(known for _, known in answers) == [False, True]
        other = Submission("a", "/renders/a", {"spec": {"title": "B"}})
        with pytest.raises(SettingError, match="another version of it"):
            await farm._submit(other)
        assert len(store.list("submissions/a")) == 1

    asyncio.run(both())


def test_a_farm_is_stopped_whatever_its_books_do(store: Trouble, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stops() -> None:
        second = farm_on(FarmBooks(LocalStore(store.root), lambda: None))
        farm = farm_on(await opened(store))
        await second._stop()
        for trouble in (lambda *about: time.sleep(1.0), lambda *about: store.head("../x")):
            monkeypatch.setattr(store, "put_replace", trouble)
            await farm._stop()
        (lease,) = [file.path for file in store.list("lease") if file.path.endswith(".released")]
        assert lease

    asyncio.run(stops())


# A farm's answers


def farm_on(books: FarmBooks) -> Farm:
    """A farm without Ray: its answers, on these books."""
    farm = Farm.__new__(Farm)
    farm._books, farm._settings, farm._open, farm._wake = books, FarmSettings("books"), {}, asyncio.Event()
    farm._stopping, farm._events, farm._tasks, farm._held_back, farm._telling = False, {}, set(), set(), set()
    farm._pool = SimpleNamespace(  # type: ignore[assignment]
        hands={}, nodes={}, lenders=list, problem="", close=lambda: None, form=lambda gangs: None, asked=[],
        resize=lambda wanted, most: farm._pool.asked.append(wanted),  # type: ignore[attr-defined]
    )  # fmt: skip
    farm._metrics = SimpleNamespace(count_cost=lambda cost: None)  # type: ignore[assignment]
    return farm


def test_one_store_has_one_open_render_whatever_it_is_called(store: Trouble) -> None:
    async def asks() -> None:
        farm = farm_on(await opened(store))
        await farm._submit(order())
        twin = Submission("b", "/renders/a", {"spec": {"title": "A"}})
        with pytest.raises(SettingError, match="--store: a works there"):
            await farm._submit(twin)
        await farm._change("a", "cancelled")
        assert (await farm._submit(twin))[0].phase == "queued"
        with pytest.raises(SettingError, match="--store: b works there"):
            await farm._change("a", "queued")

    asyncio.run(asks())


def test_what_a_repeated_order_wishes_otherwise_is_said(store: Trouble) -> None:
    async def asks() -> None:
        farm = farm_on(await opened(store))
        await farm._submit(order())
        assert (await farm._submit(order()))[0].message == ""
        row, known = await farm._submit(order(priority=90, done_by_s=5.0))
        assert known and row.priority == 50
        assert row.message.startswith("--priority, --done-by as before")

    asyncio.run(asks())


class Running:
    """An open render that ends when it is told to and its own store lets it."""

    def __init__(self) -> None:
        self.render_id, self.saved, self.stopped = "a", asyncio.Event(), list[int]()

    async def run(self) -> Any:
        await self.saved.wait()
        return SimpleNamespace(exit_code=self.stopped[-1] if self.stopped else 0, message="it was stopped")

    async def stop(self, exit_code: int) -> None:
        self.stopped.append(exit_code)

    def take_events(self, cursor: int) -> tuple[list[Any], int]:
        return [], cursor

    def summary(self) -> None: ...


async def carrying(books: FarmBooks) -> tuple[Farm, Running, Coroutine[Any, Any, None]]:
    await books.write("a", submitted)
    await books.write("a", lambda state: Changed(2.0, "running"))
    farm, render = farm_on(books), Running()
    farm._open["a"] = one = _Open(render, Borrower("a"), None)  # type: ignore[arg-type]
    return farm, render, farm._carry(one, False)


def test_a_pause_is_written_before_what_runs_has_ended(store: Trouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.farm.SAVE_LIMIT_S", 0.2)

    async def pauses() -> None:
        farm, render, carry = await carrying(await opened(store))
        ends = asyncio.create_task(carry)
        row = await farm._change("a", "paused")
        assert (row.phase, row.message) == ("running", "is being paused: what it has is saved")
        assert render.stopped == [75] and read(store) == {"a": "paused"}, "a farm that starts now leaves it alone"
        with pytest.raises(SettingError, match="still ending"):
            await farm._change("a", "queued")
        render.saved.set()
        await ends
        assert (await farm._describe("a")).phase == "paused"
        assert len(store.list("submissions/a")) == 3, "nothing is written twice"

    asyncio.run(pauses())


def test_a_pause_stops_the_work_even_where_it_cannot_be_written_yet(store: Trouble) -> None:
    async def pauses() -> None:
        farm, render, carry = await carrying(await opened(store))
        ends = asyncio.create_task(carry)
        store.error = StoreError("no answer")
        with pytest.raises(TransientError, match="cannot be written now"):
            await farm._change("a", "paused")
        assert render.stopped == [75] and read(store) == {"a": "running"}
        assert (await farm._describe("a")).message == "is being paused: what it has is saved"
        store.error = None
        render.saved.set()
        await ends
        assert read(store) == {"a": "paused"}

    asyncio.run(pauses())


def test_what_is_to_be_paused_is_not_begun_while_the_books_do_not_take_it(store: Trouble) -> None:
    async def pauses() -> None:
        farm = farm_on(await opened(store))
        await farm._submit(order())
        assert [one.render_id for one in farm._queue()] == ["a"]
        store.error = StoreError("no answer")
        with pytest.raises(TransientError, match="cannot be written now"):
            await farm._change("a", "paused")
        assert farm._queue() == []
        store.error = None
        await eventually(lambda: read(store) == {"a": "paused"})
        assert (await farm._change("a", "queued")).phase == "queued"
        assert [one.render_id for one in farm._queue()] == ["a"]

    asyncio.run(pauses())


@pytest.mark.parametrize("phase", ["approval", "failed", "cancelled"])
def test_what_waits_for_a_person_is_not_paused_but_can_be_cancelled(store: Trouble, phase: Phase) -> None:
    async def asks() -> None:
        farm = farm_on(await opened(store))
        await farm._books.write("a", submitted)
        await farm._books.write("a", lambda state: Changed(2.0, phase))
        assert (await farm._change("a", "paused")).phase == phase
        assert (await farm._change("a", "cancelled")).phase == "cancelled"

    asyncio.run(asks())


def test_a_film_that_is_done_before_its_pause_is_done(store: Trouble) -> None:
    async def pauses() -> None:
        farm, render, carry = await carrying(await opened(store))
        ends = asyncio.create_task(carry)
        render.stop = lambda exit_code: asyncio.sleep(0, render.saved.set())  # type: ignore[method-assign]
        assert (await farm._change("a", "paused")).phase == "done"
        await ends
        assert read(store) == {"a": "done"}

    asyncio.run(pauses())


# Money


async def ended_with(store: LocalStore, price_hour: float, *entries: Submitted | Changed) -> None:
    """Books that a farm with this price has left."""
    books = await opened(store, price_hour=price_hour)
    for entry in entries:
        await books.write("a", lambda state, entry=entry: entry)  # type: ignore[misc]
    await books.close()


def test_a_farm_goes_on_with_the_price_that_its_books_keep(store: Trouble, caplog: pytest.LogCaptureFixture) -> None:
    async def spends() -> None:
        await ended_with(store, 3.6, Submitted(1.0, order(most_cost=5.0)), Changed(2.0, "running"))
        farm, render = farm_on(await opened(store)), Running()
        assert "a worker costs 3.6 an hour" in caplog.text
        assert (await farm._hello()).price_hour == 3.6
        render.loads, render.needs, render.numerics = {}, None, None  # type: ignore[attr-defined]
        farm._open["a"] = one = _Open(render, Borrower("a"), None)  # type: ignore[arg-type]
        farm._use("a", busy_s=4999.0)
        farm._look_at_renders()
        assert one.ending is None
        farm._use("a", busy_s=1.0)
        farm._look_at_renders()
        assert (one.ending, one.why) == ("paused", "5.00 are spent; --max-cost is 5.00")

    asyncio.run(spends())


def test_a_farm_that_is_given_a_price_leaves_it_to_the_next_one(store: Trouble) -> None:
    async def follow() -> None:
        for given, found in ((None, 0.0), (3.6, 3.6), (None, 3.6), (4.5, 4.5), (None, 4.5), (0.0, 0.0), (None, 0.0)):
            books = await opened(store, price_hour=given)
            assert books.price_hour == found
            other = FarmBooks(LocalStore(store.root), lambda: None, 9.0)
            opening = asyncio.create_task(other.open())
            with pytest.raises(SettingError, match="another farm"):
                await other.when_open()
            opening.cancel()
            await books.close()

    asyncio.run(follow())


@pytest.mark.parametrize("phase", ["queued", "running"])
def test_nothing_that_has_a_budget_is_begun_where_no_price_is_known(store: Trouble, phase: Phase) -> None:
    async def refuses() -> None:
        await ended_with(store, 3.6, Submitted(1.0, order(most_cost=5.0)), Changed(2.0, phase))
        farm = farm_on(await opened(store, price_hour=0.0))
        farm._turn()
        assert farm._open == {} and farm._pool.asked == [0]  # type: ignore[attr-defined]
        await eventually(lambda: read(store) == {"a": "paused"} and not farm._held_back)
        row = await farm._describe("a")
        assert "--max-cost: the farm knows no price (got 5.0)" in row.message and row.exit_code == 75
        assert "`longtake farm start --price P`" in row.message and row.message.endswith("`longtake resume a`")
        for asked in (farm._change("a", "queued"), farm._adjust("a", Adjusted(3.0, most_cost=9.0))):
            with pytest.raises(SettingError, match="knows no price"):
                await asked
        assert read(store) == {"a": "paused"}
        # Without a budget nothing has to be counted.
        assert (await farm._submit(order()))[0].phase == "queued"

    asyncio.run(refuses())


def test_a_budget_goes_on_with_the_next_farm_that_has_a_price(store: Trouble) -> None:
    async def goes_on() -> None:
        await ended_with(store, 0.0, Submitted(1.0, order(most_cost=5.0)), Changed(2.0, "paused", "no price", 75))
        farm = farm_on(await opened(store, price_hour=3.6))
        assert (await farm._change("a", "queued")).phase == "queued"
        farm._refuse_uncounted()
        assert [one.render_id for one in farm._queue()] == ["a"]

    asyncio.run(goes_on())


# Hooks


def test_who_watches_hears_that_a_hook_failed(store: Trouble) -> None:
    hook = Hook(("done",), command=("sh", "-c", "sleep 0.5; echo first >&2; echo no route >&2; exit 3"))

    async def watches() -> None:
        farm, render, carry = await carrying(await opened(store))
        await farm._books.write("a", lambda state: Submitted(1.0, order(hooks=(hook,))))
        await farm._books.write("a", lambda state: Changed(2.0, "running"))
        ends = asyncio.create_task(carry)
        render.saved.set()
        while (row := (await farm._follow("a", 0)).row).phase == "running":
            await asyncio.sleep(0.01)
        assert (row.phase, row.message, row.exit_code) == ("done", "its hook failed: sh: exit status 3, no route", 0)
        await ends
        book = SubmissionBook(LocalStore(store.root))
        book.load()
        assert book.states["a"].note == row.message and book.states["a"].since_s == row.since_s
        assert (await farm._submit(order()))[0].message == row.message, "it is done, and attached to"

    asyncio.run(watches())


def test_a_hook_that_hangs_holds_up_nobody_who_watches(store: Trouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.farm.HOOKS_S", 0.2)

    async def watches() -> None:
        farm = farm_on(await opened(store))
        await farm._books.write("a", submitted)
        await farm._books.write("a", lambda state: Changed(2.0, "done", "", 0))
        farm._telling.add("a")
        assert (await farm._follow("a", 0)).row.phase == "done"

    asyncio.run(watches())
