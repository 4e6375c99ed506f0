"""The ledger: leases, journal, commits that happen once, damage that is found, numerics, outages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import lease
from pipeline.errors import CorruptArtifact, LeaseLost, NumericsMismatch, SettingError, StoreError, WorkerLost
from pipeline.journal import (
    AttemptFailed,
    AttemptStarted,
    Invalidated,
    JournalEntry,
    NumericsMixed,
    PartialSaved,
    RedoRequested,
    RequestTaken,
    ShotLocked,
    ShotUnlocked,
    TakePicked,
    TaskLog,
    TaskReset,
    entry_from_json,
    entry_to_json,
)
from pipeline.lease import LeaseHolder, Owner, beat_path
from pipeline.ledger import Ledger, compare_numerics
from pipeline.records import TornRecord, artifact_sha256, commit_to_json, seal, unseal
from pipeline.store import LocalStore, open_store
from pipeline.tasks import ArtifactFile, CommitRecord

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    opened = open_store(tmp_path / "render")
    assert isinstance(opened, LocalStore)
    return opened


def _ledger(store: LocalStore, host: str = "here", *, fresh: bool = False, **options: Any) -> Ledger:
    """A ledger of a host of its own, with the lease taken."""
    ledger = Ledger(store, owner=Owner(host, 1), **options)
    ledger.take_lease(watch_s=0, fresh=fresh)
    return ledger


def _begin(ledger: Ledger, task_id: str, attempt: int = 1) -> None:
    ledger.journal([AttemptStarted(task_id, attempt, ledger.epoch, "w1", "n1")])


def _produce(
    ledger: Ledger,
    task_id: str,
    data: bytes = b"data",
    inputs: tuple[CommitRecord, ...] = (),
    attempt: int = 1,
) -> CommitRecord:
    """The record of an attempt whose file is in the store, not committed yet."""
    path = f"attempts/{task_id}/{attempt:04d}-{ledger.epoch}/out.bin"
    file = ledger.store.write_attempt(path, data)
    digests = {record.task_id: artifact_sha256(record.files) for record in inputs}
    return CommitRecord(task_id, attempt, ledger.epoch, (file,), digests)


def _commit(ledger: Ledger, task_id: str, *inputs: CommitRecord, attempt: int = 1) -> CommitRecord:
    _begin(ledger, task_id, attempt)
    return ledger.commit(_produce(ledger, task_id, task_id.encode(), inputs, attempt))


def _damage(store: LocalStore, path: str, change: Callable[[bytes], bytes]) -> None:
    file = store.root / path
    file.write_bytes(change(file.read_bytes()))


def _flip(data: bytes) -> bytes:
    return data[:3] + bytes([data[3] ^ 1]) + data[4:]


def _cut(data: bytes) -> bytes:
    return data[:-5]


# Records


@given(st.binary(max_size=40), st.data())
def test_any_change_of_a_sealed_record_is_noticed(noise: bytes, data: st.DataObject) -> None:
    sealed = seal({"task_id": "segment-1", "noise": noise.hex()})
    place = data.draw(st.integers(0, len(sealed) - 1))
    bit = data.draw(st.integers(0, 7))
    flipped = sealed[:place] + bytes([sealed[place] ^ (1 << bit)]) + sealed[place + 1 :]
    for changed in (flipped, sealed[:place], sealed + noise if noise else b""):
        with pytest.raises(TornRecord):
            unseal(changed)


FILE = ArtifactFile("p.bin", "partials/segment-1/p.bin", 4, "0" * 64)
ENTRIES: list[JournalEntry] = [
    AttemptStarted("segment-1", 1, 2, "w1", "n1"),
    AttemptFailed("segment-1", 1, 2, "transient", "why", "n1", "last lines"),
    PartialSaved("segment-1", 1, 2, 8, FILE),
    PartialSaved("segment-1", 1, 2, 0, None),
    Invalidated("segment-1", 1, 2, "flipped"),
    RedoRequested("a/segment/0", 1, "grey"),
    TaskReset("segment-1", "a/segment/0"),
    RequestTaken("r1", "pause", 3),
    TakePicked("a", 2),
    ShotLocked("a", {"0" * 64: "segment-1"}, {"a/segment/0": "0" * 64}),
    ShotUnlocked("a"),
    NumericsMixed(("torch: 1, now 2",)),
]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: type(entry).__name__)
def test_journal_entries_survive_the_store(entry: JournalEntry) -> None:
    assert entry_from_json(unseal(seal(entry_to_json(entry)))) == entry


# The lease


def test_a_live_process_on_this_host_is_not_taken_over(store: LocalStore) -> None:
    Ledger(store).take_lease()
    with pytest.raises(SettingError, match="another render is writing here"):
        Ledger(store).take_lease()


def test_a_process_that_died_on_this_host_is_taken_over_at_once(store: LocalStore) -> None:
    script = (
        "import sys; from pipeline.store import open_store; from pipeline.ledger import Ledger\n"
        "print(Ledger(open_store(sys.argv[1])).take_lease())"
    )
    done = subprocess.run([sys.executable, "-c", script, store.url], cwd=ROOT, capture_output=True, check=True)
    assert done.stdout == b"1\n"
    slept: list[float] = []
    assert Ledger(store, sleep=slept.append).take_lease() == 2
    assert not slept


def test_without_proc_a_holder_lives_as_long_as_its_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on macOS: neither is a live render taken over, nor a dead one waited for."""
    monkeypatch.setattr(lease, "PROC", tmp_path / "nowhere")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    me = lease.this_process()
    owner = replace(me, pid=child.pid, mark=lease._process_mark(child.pid))

    def found(owner: Owner) -> bool | None:
        return lease.lives(LeaseHolder(1, owner, 0.0, False), me)

    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert found(owner) and found(me)
    assert found(replace(owner, mark="Thu Jan 1 00:00:00 2026")) is False, "another process with its number"
    child.communicate(b"\n")
    assert found(owner) is False


def test_without_proc_a_process_that_has_ended_and_is_not_yet_reaped_is_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(lease, "PROC", tmp_path / "nowhere")
    child = subprocess.Popen([sys.executable, "-c", "print(1)"], stdout=subprocess.PIPE)
    assert child.stdout is not None
    while child.stdout.read(1):
        pass
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert lease._process_mark(child.pid) == ""
    child.communicate()


def test_a_holder_elsewhere_is_live_only_if_its_heartbeat_moves(store: LocalStore) -> None:
    first = _ledger(store, "there")

    def beat(seconds: float) -> None:
        first.renew_lease()

    with pytest.raises(SettingError, match="there"):
        Ledger(store, owner=Owner("here", 1), sleep=beat).take_lease(watch_s=5)
    slept: list[float] = []
    assert Ledger(store, owner=Owner("here", 1), sleep=slept.append).take_lease(watch_s=5) == 2
    assert sum(slept) == 5
    assert store.head(beat_path(1)) is not None


def test_a_stray_file_among_the_leases_is_none(store: LocalStore) -> None:
    for name in ("note.json", "00000009.json.bak", "000000099.json"):
        store.put_replace(f"lease/{name}", b"x")
    ledger = Ledger(store)
    assert ledger.holder() is None
    assert ledger.take_lease() == 1


@pytest.mark.parametrize("lost", [{1}, {2}, {1, 2}])
def test_a_lease_is_ours_though_the_answer_to_our_asking_was_lost(tmp_path: Path, lost: set[int]) -> None:
    class Mute(LocalStore):
        asked = 0

        def create_if_absent(self, path: str, data: bytes) -> bool:
            made, self.asked = super().create_if_absent(path, data), self.asked + 1
            if self.asked in lost:
                raise StoreError("no answer")
            return made

    store = Mute(tmp_path)
    ledger = Ledger(store, outage_s=0.0)
    for _ in lost:
        with pytest.raises(StoreError):
            ledger.take_lease()
    assert ledger.take_lease() == 1
    with pytest.raises(SettingError, match="another render"):
        Ledger(store).take_lease()
    with pytest.raises(SettingError, match="another render"):
        ledger.take_lease()


def test_a_released_lease_is_taken_without_waiting(store: LocalStore) -> None:
    _ledger(store, "there").release_lease()
    slept: list[float] = []
    assert Ledger(store, owner=Owner("here", 1), sleep=slept.append).take_lease() == 2
    assert not slept


def test_who_was_taken_over_can_neither_journal_nor_commit_nor_beat(store: LocalStore) -> None:
    first = _ledger(store, "first")
    _begin(first, "text-1")
    record = _produce(first, "text-1")
    _ledger(store, "second")
    for write in (
        lambda: first.commit(record),
        lambda: first.journal([TaskReset("text-1")]),
        first.renew_lease,
        lambda: first.pin_numerics({}),
    ):
        with pytest.raises(LeaseLost, match="taken over"):
            write()
    assert Ledger(store).load().commits == {}


def test_nothing_is_written_without_a_lease(store: LocalStore) -> None:
    with pytest.raises(LeaseLost, match="no lease"):
        Ledger(store).journal([TaskReset("text-1")])


def test_a_store_that_overwrites_instead_of_creating_is_refused(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overwrite(path: str, data: bytes) -> bool:
        store.put_replace(path, data)
        return True

    monkeypatch.setattr(store, "create_if_absent", overwrite)
    with pytest.raises(SettingError, match="conditional writes"):
        Ledger(store).take_lease()


# The journal


def test_a_new_ledger_rebuilds_everything_from_the_store(store: LocalStore) -> None:
    ledger = _ledger(store)
    text = _commit(ledger, "text-1")
    ledger.journal(
        [
            AttemptStarted("segment-1", 1, 1, "w1", "n1"),
            PartialSaved("segment-1", 1, 1, 8, FILE),
            AttemptFailed("segment-1", 1, 1, "transient", "hiccup", "n1"),
            RedoRequested("a/segment/0", 2, "grey"),
        ]
    )
    state = Ledger(store).load()
    assert state.commits == {"text-1": text}
    assert state.redo == {"a/segment/0": 2}
    log = state.logs["segment-1"]
    assert (log.attempts, log.transient, log.partial, log.open) == (1, 1, FILE, None)
    assert log.last_failure is not None
    assert log.last_failure.message == "hiccup"
    assert not state.problems


def test_the_journal_tells_the_story_in_order_across_epochs(store: LocalStore) -> None:
    for _ in range(2):
        ledger = _ledger(store)
        for attempt in range(11):
            _begin(ledger, "text-1", attempt)
    story = [(entry.epoch, entry.attempt) for _, entry in Ledger(store).history()]  # type: ignore[union-attr]
    assert story == [(epoch, attempt) for epoch in (1, 2) for attempt in range(11)]


def test_a_torn_journal_file_is_reported_and_the_rest_is_read(store: LocalStore) -> None:
    ledger = _ledger(store)
    _begin(ledger, "text-1")
    _begin(ledger, "text-2")
    _damage(store, "journal/00000001-00000001.json", _cut)
    state = Ledger(store).load()
    assert set(state.logs) == {"text-2"}
    assert "journal/00000001-00000001.json" in state.problems[0]


def test_attempts_of_which_nobody_wrote_the_end_stay_charged() -> None:
    log = TaskLog()
    for epoch in range(1, 4):
        log.apply(AttemptStarted("segment-1", epoch, epoch, "w1", "n1"))
    assert log.deaths == 3
    log.apply(PartialSaved("segment-1", 3, 3, 8, FILE))
    assert log.deaths == 0
    log.apply(AttemptStarted("segment-1", 4, 4, "w1", "n1"))
    log.apply(AttemptFailed("segment-1", 4, 4, "lost", "node gone", "n1"))
    assert log.deaths == 0
    assert log.transient == 0


def test_records_of_a_later_version_are_not_taken_for_damaged_ones(store: LocalStore) -> None:
    ledger = _ledger(store)
    record = _commit(ledger, "text-1")
    path = "commits/text-1.json"
    store.put_replace(path, seal({**commit_to_json(record), "later": 1}))
    for look in (Ledger(store).load, Ledger(store).verify):
        with pytest.raises(SettingError, match="another version of longtake"):
            look()
    store.put_replace(path, seal(commit_to_json(record)))
    assert set(Ledger(store).load().commits) == {"text-1"}
    store.create_if_absent("journal/00000001-00000099.json", seal({"at_s": 1.0, "entries": [{"entry": "later"}]}))
    with pytest.raises(SettingError, match="another version of longtake"):
        Ledger(store).load()


def test_a_render_whose_folder_has_gone_stops_writing(store: LocalStore) -> None:
    ledger = _ledger(store)
    ledger.renew_lease()
    shutil.rmtree(store.root)
    with pytest.raises(LeaseLost, match="not the folder it was"):
        ledger.renew_lease()
    assert not store.root.exists(), "and does not make another one"


# Commits


def test_a_commit_happens_once_and_the_first_record_stands(store: LocalStore) -> None:
    now_s = [5.0]
    ledger = _ledger(store, clock=lambda: now_s[0])
    first = _commit(ledger, "text-1")
    assert first.committed_at_s == 5.0
    now_s[0] = 6.0
    assert ledger.commit(_produce(ledger, "text-1", b"text-1")) == first
    assert Ledger(store).load().commits == {"text-1": first}


def test_a_late_attempt_is_refused(store: LocalStore) -> None:
    ledger = _ledger(store)
    _begin(ledger, "text-1", 1)
    late = _produce(ledger, "text-1", attempt=1)
    _begin(ledger, "text-1", 2)
    with pytest.raises(WorkerLost, match="not the one under way"):
        ledger.commit(late)
    with pytest.raises(WorkerLost):
        ledger.commit(_produce(ledger, "text-2"))
    ledger.commit(_produce(ledger, "text-1", attempt=2))


@pytest.mark.parametrize("damage", ["short", "gone"])
def test_short_and_missing_files_are_not_committed(store: LocalStore, damage: str) -> None:
    ledger = _ledger(store)
    _begin(ledger, "text-1")
    record = _produce(ledger, "text-1", b"twenty bytes or more.")
    if damage == "short":
        _damage(store, record.files[0].path, _cut)
    else:
        store.delete(record.files[0].path)
    with pytest.raises(CorruptArtifact):
        ledger.commit(record)
    assert Ledger(store).load().commits == {}


def test_a_commit_that_landed_while_its_driver_was_taken_over_is_kept(store: LocalStore) -> None:
    first = _ledger(store, "first")
    _begin(first, "text-1")
    landed = _produce(first, "text-1")
    second = _ledger(store, "second")
    assert second.load().commits == {}
    store.create_if_absent("commits/text-1.json", seal(commit_to_json(landed)))
    _begin(second, "text-1", 2)
    assert second.commit(_produce(second, "text-1", attempt=2)) == landed


def test_a_standing_commit_on_other_inputs_is_replaced(store: LocalStore) -> None:
    ledger = _ledger(store)
    text = _commit(ledger, "text-1")
    stale = CommitRecord("segment-1", 1, 0, (), {"text-1": "0" * 64})
    store.create_if_absent("commits/segment-1.json", seal(commit_to_json(stale)))
    mine = _commit(ledger, "segment-1", text)
    assert Ledger(store).load().commits["segment-1"] == mine


# Damage


def _film(ledger: Ledger) -> None:
    """text-1 -> segment-1 -> (window-1, window-2); text-2 on its own."""
    text = _commit(ledger, "text-1")
    segment = _commit(ledger, "segment-1", text)
    _commit(ledger, "window-1", segment)
    _commit(ledger, "window-2", segment)
    _commit(ledger, "text-2")


@pytest.mark.parametrize("change", [_flip, _cut, lambda data: b""], ids=["flipped", "short", "empty"])
def test_a_damaged_commit_record_takes_what_depends_on_it_along(
    store: LocalStore, change: Callable[[bytes], bytes]
) -> None:
    _film(_ledger(store))
    _damage(store, "commits/segment-1.json", change)
    reader = Ledger(store).load()
    assert set(reader.commits) == {"text-1", "text-2"}
    assert {entry.task_id for entry in reader.broken} == {"segment-1", "window-1", "window-2"}
    assert len(store.list("commits")) == 5, "reading changes nothing"
    ledger = _ledger(store, "next")
    state = ledger.load()
    assert len(state.problems) == 3
    segment = _commit(ledger, "segment-1", state.commits["text-1"])
    again = Ledger(store).load()
    assert set(again.commits) == {"text-1", "text-2", "segment-1"}
    assert again.commits["segment-1"] == segment
    assert not again.problems, "what was dealt with is not reported again"


@pytest.mark.parametrize("change", [_flip, _cut], ids=["flipped", "short"])
def test_verify_finds_damaged_bytes_and_applying_it_frees_them(
    store: LocalStore, change: Callable[[bytes], bytes]
) -> None:
    ledger = _ledger(store)
    _film(ledger)
    clean = ledger.verify()
    assert (clean.files, clean.problems, clean.invalid) == (5, (), ())
    path = ledger.load().commits["segment-1"].files[0].path
    _damage(store, path, change)
    seen: list[tuple[int, int]] = []
    found = ledger.verify(progress=lambda done, of: seen.append((done, of)))
    assert seen[-1] == (5, 5)
    assert [(problem.task_id, problem.path) for problem in found.problems] == [("segment-1", path)]
    assert {entry.task_id for entry in found.invalid} == {"segment-1", "window-1", "window-2"}
    assert set(ledger.load().commits) == {"text-1", "text-2", "segment-1", "window-1", "window-2"}
    ledger.apply_verification(found)
    assert set(Ledger(store).load().commits) == {"text-1", "text-2"}


def test_a_damaged_film_is_dropped_alone_and_for_good(store: LocalStore) -> None:
    ledger = _ledger(store)
    _film(ledger)
    state = ledger.load()
    ledger.drop_if_damaged(state, "window-1")
    assert len(state.commits) == 5, "its bytes are as recorded"
    _damage(store, state.commits["window-1"].files[0].path, _flip)
    ledger.drop_if_damaged(state, "window-1")
    assert state.commits.keys() == {"text-1", "text-2", "segment-1", "window-2"}
    assert Ledger(store).load().commits == state.commits


def test_verify_finds_a_missing_file(store: LocalStore) -> None:
    ledger = _ledger(store)
    store.delete(_commit(ledger, "text-1").files[0].path)
    assert [problem.what for problem in ledger.verify().problems] == ["the file is gone"]


def test_what_a_driver_knows_to_be_bad_cannot_hurt_what_its_successor_committed(store: LocalStore) -> None:
    """A driver is taken over between finding a record torn and writing that down, or right after."""
    _film(_ledger(store, "first"))
    _damage(store, "commits/segment-1.json", _cut)
    overtaken = _ledger(store, "second")
    overtaken.load()
    successor = _ledger(store, "third")
    state = successor.load()
    _commit(successor, "segment-1", state.commits["text-1"])
    with pytest.raises(LeaseLost):
        overtaken.journal([Invalidated("segment-1", 1, 3, "too late")])
    assert set(Ledger(store).load().commits) == {"text-1", "text-2", "segment-1"}


def test_no_operation_of_the_ledger_deletes_anything(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "delete", None)
    ledger = _ledger(store)
    _film(ledger)
    for generation in range(2, 5):
        bad = ledger.load().commits["text-1"]
        ledger.journal([Invalidated("text-1", bad.attempt, bad.epoch, "flipped")])
        assert set(ledger.load().commits) == {"text-2"}
        again = _commit(ledger, "text-1", attempt=generation)
        assert Ledger(store).load().commits["text-1"] == again
    assert [file.path for file in store.list("commits")][-2:] == ["commits/window-1.json", "commits/window-2.json"]
    assert store.head("commits/text-1.4.json") is not None


def test_a_commit_computed_from_other_bytes_than_those_committed_does_not_count(store: LocalStore) -> None:
    ledger = _ledger(store)
    text = _commit(ledger, "text-1")
    segment = _commit(ledger, "segment-1", text)
    _commit(ledger, "window-1", segment)
    ledger.journal([Invalidated("text-1", text.attempt, text.epoch, "flipped")])
    _begin(ledger, "text-1", 2)
    ledger.commit(_produce(ledger, "text-1", b"other bytes", attempt=2))
    state = Ledger(store).load()
    assert set(state.commits) == {"text-1"}
    assert "computed from other bytes of text-1" in state.problems[0]


# Starting over


def test_after_starting_over_nothing_older_counts_and_nothing_is_deleted(store: LocalStore) -> None:
    ledger = _ledger(store)
    _film(ledger)
    ledger.journal([RedoRequested("a/segment/0", 1, "grey"), TakePicked("a", 2)])
    ledger.pin_numerics({"torch": "1"})
    before = store.list()
    again = _ledger(store, "next", fresh=True)
    state = again.load()
    assert (state.commits, state.logs, state.redo, state.picked, state.problems) == ({}, {}, {}, {}, ())
    assert again.pin_numerics({"torch": "2"}) == (), "another record may be pinned"
    assert {file.path for file in before} <= {file.path for file in store.list()}
    text = _commit(again, "text-1")
    assert text.epoch == 2
    assert Ledger(store).load().commits == {"text-1": text}
    assert Ledger(store).verify().problems == ()


def test_starting_over_is_the_write_that_takes_the_lease_so_that_nobody_can_miss_it(store: LocalStore) -> None:
    _film(_ledger(store))
    starting_over = _ledger(store, "next", fresh=True)
    successor = _ledger(store, "its successor")
    assert successor.load().commits == {}, "though the one before wrote nothing else"
    with pytest.raises(LeaseLost):
        starting_over.journal([TaskReset("text-1")])
    text = _commit(successor, "text-1")
    assert Ledger(store).load().commits == {"text-1": text}
    for path in ("lease/00000003.json", "lease/00000002.json", "lease/00000002.released", "commits/text-1.2.json"):
        store.delete(path)
    assert len(Ledger(store).load().commits) == 5, "without that write all would be as before"


def test_who_was_taken_over_cannot_bring_back_what_was_forgotten(store: LocalStore) -> None:
    """Its commit lands under the first name just before, or just after, its successor commits the same task."""
    for landed_first in (True, False):
        task_id = f"text-{int(landed_first)}"
        late = _ledger(store, f"late{landed_first}")
        _begin(late, task_id)
        record = _produce(late, task_id, b"old bytes")
        successor = _ledger(store, f"successor{landed_first}", fresh=True)
        if landed_first:
            store.create_if_absent(f"commits/{task_id}.json", seal(commit_to_json(record)))
        mine = _commit(successor, task_id)
        if not landed_first:
            assert not store.create_if_absent(f"commits/{task_id}.json", seal(commit_to_json(record)))
        assert Ledger(store).load().commits[task_id] == mine


# Numerics


def test_numerics_are_pinned_once_and_differences_are_named(store: LocalStore) -> None:
    ledger = _ledger(store)
    assert ledger.pin_numerics({"torch": "2.12.1", "threads": 2}) == ()
    assert ledger.pin_numerics({"torch": "2.12.1", "threads": 2}) == ()
    with pytest.raises(NumericsMismatch, match=r"threads: 2, now 4; torch: 2\.12\.1, now 2\.13\.0"):
        ledger.pin_numerics({"torch": "2.13.0", "threads": 4})
    allowed = ledger.pin_numerics({"torch": "2.12.1", "threads": 4}, allow_mixed=True)
    assert allowed == ("threads: 2, now 4",)
    assert Ledger(store).load().mixed == allowed
    assert compare_numerics({"a": 1}, {"b": 2}) == ("a: 1, now nothing", "b: nothing, now 2")


def test_a_record_from_before_there_was_a_precision_means_weights_as_stored() -> None:
    assert compare_numerics({}, {"precision": "stored"}) == ()
    assert compare_numerics({}, {"precision": "int8"}) == ("precision: stored, now int8",)


def test_a_damaged_numerics_record_is_not_taken_for_equal(store: LocalStore) -> None:
    ledger = _ledger(store)
    ledger.pin_numerics({"torch": "2.12.1"})
    _damage(store, "numerics.json", _flip)
    with pytest.raises(NumericsMismatch, match="damaged"):
        ledger.pin_numerics({"torch": "2.12.1"})


# Outages


class Outage:
    """Makes a store's operation fail a number of times, before or after it took effect."""

    def __init__(self, store: LocalStore, name: str, times: int, *, effect: bool) -> None:
        self.original, self.times, self.effect = getattr(store, name), times, effect

    def __call__(self, *arguments: Any) -> Any:
        result = self.original(*arguments) if self.effect or not self.times else None
        if self.times:
            self.times -= 1
            raise StoreError("503 slow down")
        return result


@pytest.mark.parametrize("effect", [False, True], ids=["unheard", "unanswered"])
def test_outages_are_waited_out_and_told(store: LocalStore, monkeypatch: pytest.MonkeyPatch, effect: bool) -> None:
    slept: list[float] = []
    told: list[str] = []
    ledger = _ledger(store, sleep=slept.append, on_wait=told.append)
    _begin(ledger, "text-1")
    record = _produce(ledger, "text-1")
    monkeypatch.setattr(store, "create_if_absent", Outage(store, "create_if_absent", 3, effect=effect))
    committed = ledger.commit(record)
    assert committed.attempt == 1
    assert slept == [1.0, 2.0, 4.0]
    assert "503 slow down" in told[0]
    assert Ledger(store).load().commits == {"text-1": committed}


def test_leases_and_entries_that_nobody_confirmed_are_ours(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "create_if_absent", Outage(store, "create_if_absent", 1, effect=True))
    ledger = _ledger(store, sleep=lambda seconds: None)
    assert ledger.epoch == 1
    monkeypatch.setattr(store, "create_if_absent", Outage(store, "create_if_absent", 1, effect=True))
    _begin(ledger, "text-1")
    assert set(Ledger(store).load().logs) == {"text-1"}


def test_an_outage_beyond_all_patience_is_raised(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    ledger = _ledger(store, sleep=slept.append, outage_s=300.0)
    monkeypatch.setattr(store, "create_if_absent", Outage(store, "create_if_absent", 999, effect=False))
    with pytest.raises(StoreError):
        _begin(ledger, "text-1")
    assert 300 <= sum(slept) <= 400
    assert max(slept) == 60


# Size


def test_a_film_of_ten_thousand_tasks_loads_in_seconds(store: LocalStore) -> None:
    folder = store.root / "commits"
    folder.mkdir(parents=True)
    journal = store.root / "journal"
    journal.mkdir()
    before = ""
    for number in range(10_000):
        task_id = f"segment-{number:024d}"
        file = ArtifactFile("s.bin", f"attempts/{task_id}/0001-1/s.bin", 4, "0" * 64)
        inputs = {before: artifact_sha256((file,))} if before else {}
        record = CommitRecord(task_id, 1, 1, (file,), inputs)
        (folder / f"{task_id}.json").write_bytes(seal(commit_to_json(record)))
        started = entry_to_json(AttemptStarted(task_id, 1, 1, "w1", "n1"))
        name = f"00000001-{number:08d}.json"
        (journal / name).write_bytes(seal({"at_s": 0.0, "entries": [started]}))
        before = task_id
    began_s = time.process_time()
    state = Ledger(store).load()
    assert len(state.commits) == len(state.logs) == 10_000
    assert time.process_time() - began_s < 5
