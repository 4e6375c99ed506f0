"""The record of what was committed, and of every attempt before it was made.

Lies in the render's folder and is rebuilt from it alone:

    lease/<epoch>.json, .beat, .released   who may write (pipeline/lease.py)
    journal/<epoch>-<seq>.json             entries (pipeline/journal.py), written before what they speak of
    commits/<task id>[.<n>].json           CommitRecord, created only if absent; nothing else counts as done
    numerics.json, numerics-<epoch>.json   the numerics record that the render was (in that epoch) started under

Every record carries its own checksum (pipeline/records.py). A commit counts if it is whole, nobody
invalidated it, and the digests it names for its inputs are those of the inputs' own commits. Of several
generations n of a task's record the last one is meant; a new one begins only when the one before does not
count. Nothing is ever deleted or overwritten: an orchestrator that has been taken over without knowing it yet
could otherwise destroy what its successor has just committed.

Store outages are waited out here; `StoreError` comes out only after `outage_s`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from pipeline.errors import LeaseLost, NumericsMismatch, SettingError, StoreError, WorkerLost
from pipeline.facts import Overrides, ShotLock
from pipeline.journal import (
    AttemptStarted,
    Invalidated,
    JournalEntry,
    NumericsMixed,
    RedoRequested,
    RequestTaken,
    ShotLocked,
    ShotUnlocked,
    StartedOver,
    TakePicked,
    TaskLog,
    TaskReset,
    entry_from_json,
    entry_to_json,
)
from pipeline.lease import (
    LeaseHolder,
    Owner,
    beat_path,
    cuts,
    last_holder,
    lease_path,
    lease_record,
    refuse_if_live,
    this_process,
)
from pipeline.records import TornRecord, artifact_sha256, commit_from_json, commit_to_json, seal, unseal
from pipeline.store import Store, corrupt
from pipeline.tasks import ArtifactFile, CommitRecord

MAX_PAUSE_S = 60.0
MOST_GENERATIONS = 1000
_NO_TRY = 0, b""
"""The epoch and the bytes of a lease that was asked for."""
T = TypeVar("T")


@dataclass
class LedgerState:
    """What the store says: rebuilt from it alone."""

    commits: dict[str, CommitRecord] = field(default_factory=dict)
    logs: dict[str, TaskLog] = field(default_factory=dict)
    redo: dict[str, int] = field(default_factory=dict)
    """Redo generations by scope, as in `RedoRequested`: an override of the plan."""
    refusals: dict[str, int] = field(default_factory=dict)
    """By scope, how many of them the quality gate asked for since a person last did or forgave it."""
    picked: dict[str, int] = field(default_factory=dict)
    """Takes by shot, as in `TakePicked`."""
    locks: dict[str, ShotLock] = field(default_factory=dict)
    """By shot, as in `ShotLocked`."""
    requests: dict[str, str] = field(default_factory=dict)
    """Kinds of the requests that were taken in, by id."""
    stopped: tuple[int, str] = (0, "")
    """The epoch that a pause or cancel ended, and which of them; (0, "") if work has gone on since."""
    cut: int = 0
    """The epoch in which a person last started over; what is older does not count."""
    mixed: tuple[str, ...] = ()
    """Numerics differences under which parts of the film were rendered."""
    broken: tuple[Invalidated, ...] = ()
    """Commits found not to count while loading (torn records, broken chains). They are not in `commits`."""
    problems: tuple[str, ...] = ()
    """The same in words, and journal files that could not be read."""

    def apply(self, entry: JournalEntry) -> None:
        """Take one journal entry in, in order."""
        match entry:
            case RedoRequested():
                self.redo[entry.scope] = entry.generation
                self.refusals[entry.scope] = 0 if entry.asked else self.refusals.get(entry.scope, 0) + 1
            case RequestTaken():
                self.requests[entry.request_id] = entry.kind
                if entry.kind in ("pause", "cancel"):
                    self.stopped = (entry.epoch, entry.kind)
            case TakePicked():
                self.picked[entry.shot_id] = entry.take
            case ShotLocked():
                self.locks[entry.shot_id] = ShotLock(entry.tasks, entry.labels)
            case ShotUnlocked():
                self.locks.pop(entry.shot_id, None)
            case StartedOver():
                requests, stopped = self.requests, self.stopped
                vars(self).update(vars(LedgerState(requests=requests, stopped=stopped, cut=entry.epoch)))
            case NumericsMixed():
                self.mixed = tuple(dict.fromkeys((*self.mixed, *entry.differences)))
            case _:
                self.logs.setdefault(entry.task_id, TaskLog()).apply(entry)
                if isinstance(entry, TaskReset):
                    self.refusals.pop(entry.scope, None)
                if isinstance(entry, AttemptStarted) and entry.epoch > self.stopped[0]:
                    self.stopped = (0, "")

    @property
    def overrides(self) -> Overrides:
        """What the journal has changed about the plan. A lock holds only what is still committed."""
        locks = {shot_id: self._still_held(lock) for shot_id, lock in self.locks.items()}
        return Overrides(dict(self.redo), dict(self.picked), locks)

    def _still_held(self, lock: ShotLock) -> ShotLock:
        tasks = {digest: task_id for digest, task_id in lock.tasks.items() if task_id in self.commits}
        return ShotLock(tasks, {label: digest for label, digest in lock.labels.items() if digest in tasks})


@dataclass(frozen=True)
class Problem:
    """One finding of `verify`."""

    task_id: str
    path: str
    what: str


@dataclass(frozen=True)
class Verification:
    """The outcome of comparing all bytes with their records."""

    files: int
    size_bytes: int
    problems: tuple[Problem, ...]
    invalid: tuple[Invalidated, ...]
    """Commits that do not count because of them, what depends on them included."""


_UNSAID = {"precision": "stored"}
"""What a record means that was written before it had the field."""


def compare_numerics(pinned: Mapping[str, Any], current: Mapping[str, Any]) -> tuple[str, ...]:
    """The differences in words, `torch: 2.12.1, now 2.13.0`; empty if there are none."""
    differences = []
    for name in sorted({*pinned, *current}):
        unsaid = _UNSAID.get(name, "nothing")
        was, now = pinned.get(name, unsaid), current.get(name, unsaid)
        if was != now:
            differences.append(f"{name}: {was}, now {now}")
    return tuple(differences)


def commit_path(task_id: str, generation: int = 1) -> str:
    """Where a commit record of a task lies."""
    return f"commits/{task_id}.json" if generation == 1 else f"commits/{task_id}.{generation}.json"


def dependants_of(bad: Mapping[str, str], commits: Mapping[str, CommitRecord]) -> dict[str, str]:
    """`bad` (task id -> reason) and every commit that was computed from it, directly or not, with reasons."""
    users: dict[str, list[str]] = {}
    for task_id, record in commits.items():
        for input_id in record.inputs_sha256:
            users.setdefault(input_id, []).append(task_id)
    found, queue = dict(bad), list(bad)
    while queue:
        input_id = queue.pop()
        for task_id in users.get(input_id, ()):
            if task_id not in found:
                found[task_id] = f"computed from {input_id}, which does not count any more"
                queue.append(task_id)
    return found


class Ledger:
    """The ledger of one render. Writing needs the lease; reading does not.

    `on_wait` is told why and how long an outage is waited out.
    """

    def __init__(
        self,
        store: Store,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        outage_s: float = 3600.0,
        on_wait: Callable[[str], None] = lambda message: None,
        owner: Owner | None = None,
    ) -> None:
        self.store = store
        self.epoch = 0
        self._tried = _NO_TRY
        self._clock, self._sleep = clock, sleep
        self._outage_s, self._on_wait = outage_s, on_wait
        self._owner = owner or this_process()
        self._sequence = 0
        self._beats = 0
        self._latest: dict[str, tuple[int, int]] = {}
        self._invalidated: dict[str, set[tuple[int, int]]] = {}
        self._cut = 0

    # The lease

    def holder(self) -> LeaseHolder | None:
        """The last one who took the lease, None if nobody ever did."""
        return self._patiently(lambda: last_holder(self.store))

    def take_lease(self, *, watch_s: float = 30.0, fresh: bool = False) -> int:
        """Take the next epoch, which every later write carries. SettingError if a live orchestrator holds it.

        With `fresh`, nothing counts that was committed or journalled before: all or nothing, in the same write.
        A holder on another host is watched for `watch_s`: it is live if its heartbeat moves.
        """
        before = self.holder()
        epoch = before.epoch + 1 if before else 1
        if before is not None and before.epoch == self._tried[0]:
            # Our own last try: its answer was lost.
            epoch = before.epoch
        elif before is not None:
            watch = partial(refuse_if_live, self.store, before, self._owner, watch_s=watch_s, sleep=self._sleep)
            self._patiently(watch)
        if epoch != self._tried[0]:
            self._tried = epoch, lease_record(epoch, self._owner, secrets.token_hex(8), self._clock(), fresh=fresh)
        if not self._create(lease_path(epoch), self._tried[1]):
            self._tried = _NO_TRY
            raise SettingError("another render was started here just now", field="--store", value=self.store.url)
        if self._patiently(lambda: self.store.create_if_absent(lease_path(epoch), b"")):
            raise SettingError(
                "the store overwrites where it should only create",
                field="--store",
                value=self.store.url,
                remedy="It must support conditional writes (If-None-Match).",
            )
        self.epoch, self._tried = epoch, _NO_TRY
        if fresh:
            self._cut = epoch
        return epoch

    def renew_lease(self) -> None:
        """Heartbeat, wanted every 10 s. Raises LeaseLost if somebody else has taken over, or nothing of it is left: its
        folder was removed, or is no longer the one that is seen there (a file system that was unmounted).
        """
        self.check_lease()
        if self._patiently(lambda: self.store.head(lease_path(self.epoch))) is None:
            raise LeaseLost(f"{self.store.url} is not the folder it was: the render's own lease is not there any more")
        self._beats += 1
        beat = str(self._beats).encode()
        self._patiently(lambda: self.store.put_replace(beat_path(self.epoch), beat))

    def release_lease(self) -> None:
        """Say that the render ended in order, so that the next one need not watch."""
        self._create(f"lease/{self.epoch:08d}.released", b"")

    def check_lease(self) -> None:
        """Raise LeaseLost unless the lease is held and still ours."""
        if not self.epoch:
            raise LeaseLost("no lease is held")
        if self._patiently(lambda: self.store.head(lease_path(self.epoch + 1))) is not None:
            raise LeaseLost(f"epoch {self.epoch} is over: another orchestrator has taken over")

    # The journal

    def journal(self, entries: Sequence[JournalEntry]) -> None:
        """Make the entries durable, in order."""
        self.check_lease()
        # A number is used once even if the write fails: it may have taken effect unseen.
        self._sequence += 1
        path = f"journal/{self.epoch:08d}-{self._sequence:08d}.json"
        body = {"at_s": self._clock(), "entries": [entry_to_json(entry) for entry in entries]}
        if not self._create(path, seal(body)):
            raise LeaseLost(f"{path} was written by somebody else")
        for entry in entries:
            self._remember(entry)

    def _remember(self, entry: JournalEntry) -> None:
        if isinstance(entry, AttemptStarted):
            self._latest[entry.task_id] = (entry.attempt, entry.epoch)
        if isinstance(entry, Invalidated):
            self._invalidated.setdefault(entry.task_id, set()).add((entry.attempt, entry.epoch))

    def history(self, problems: list[str] | None = None) -> Iterator[tuple[float, JournalEntry]]:
        """(Unix time, entry) of the whole journal, in order. Files that cannot be read go to `problems`.

        Where a lease started over, `StartedOver` stands before the first entry that counts.
        """
        paths = [file.path for file in self._patiently(lambda: self.store.list("journal"))]
        ahead = self._patiently(lambda: cuts(self.store))
        for path, data in self.store.read_many(paths):
            while ahead and ahead[0][0] <= _epoch_of(path):
                epoch, at_s = ahead.pop(0)
                yield at_s, StartedOver(epoch)
            try:
                body = unseal(data or b"")
            except TornRecord as error:
                if problems is not None:
                    problems.append(f"{path}: {error}")
                continue
            for value in body["entries"]:
                try:
                    entry = entry_from_json(value)
                except (KeyError, TypeError) as error:
                    raise _foreign(path) from error
                yield body["at_s"], entry
        for epoch, at_s in ahead:
            yield at_s, StartedOver(epoch)

    # The state

    def load(self) -> LedgerState:
        """The state as the store has it. Under the lease, what is found broken is journalled as such, too."""
        state = self._patiently(self._load)
        self._cut = state.cut
        for task_id, log in state.logs.items():
            self._invalidated[task_id] = set(log.invalidated)
        if self.epoch and state.broken:
            self.journal(state.broken)
            for entry in state.broken:
                state.apply(entry)
        return state

    def _load(self) -> LedgerState:
        state, problems = LedgerState(), list[str]()
        for _, entry in self.history(problems):
            state.apply(entry)
        newest = {i: record for i, record in self._read_commits().items() if not _is_older(record, state.cut)}
        dead = {task_id: _invalidated(state.logs.get(task_id)) for task_id in newest}
        records = {i: record for i, record in newest.items() if record and _attempt(record) not in dead[i]}
        bad = {task_id: "its record is torn" for task_id, record in newest.items() if record is None}
        bad |= {i: "it was invalidated before" for i in newest if i not in records and i not in bad}
        for task_id, record in records.items():
            if changed := _changed_input(record, records):
                bad[task_id] = f"computed from other bytes of {changed} than those committed"
        bad = dependants_of(bad, records)
        state.commits = {task_id: record for task_id, record in records.items() if task_id not in bad}
        found = (_invalidation(task_id, newest[task_id], reason) for task_id, reason in bad.items())
        state.broken = tuple(entry for entry in found if _attempt(entry) not in dead[entry.task_id])
        state.problems = (*problems, *(f"{entry.task_id}: {entry.reason}" for entry in state.broken))
        return state

    def _read_commits(self) -> dict[str, CommitRecord | None]:
        """For each task its record of the last generation; None if that is torn."""
        newest: dict[str, tuple[int, str]] = {}
        for file in self.store.list("commits"):
            task_id, _, number = file.path.removeprefix("commits/").removesuffix(".json").partition(".")
            newest[task_id] = max(newest.get(task_id, (0, "")), (int(number or 1), file.path))
        paths = {path: task_id for task_id, (_, path) in newest.items()}
        return {
            paths[path]: _parse_commit(data, paths[path])
            for path, data in self.store.read_many(paths)
            if data is not None
        }

    # Commits

    def commit(self, record: CommitRecord) -> CommitRecord:
        """Commit, once; the record that stands is returned: this one, or one that was there before.

        `committed_at_s` is filled in here. Raises LeaseLost; WorkerLost for an attempt that is not the last
        one journalled; CorruptArtifact if a file is missing or short; StoreFull, StoreError.
        """
        self.check_lease()
        self._refuse_stale(record)
        self._check_files(record)
        record = replace(record, committed_at_s=self._clock())
        data = seal(commit_to_json(record))
        for generation in range(1, MOST_GENERATIONS):
            path = commit_path(record.task_id, generation)
            if self._create(path, data):
                return record
            standing = _parse_commit(self._patiently(partial(self.store.read, path)), record.task_id)
            if standing is None or _is_older(standing, self._cut):
                continue
            if _attempt(standing) in self._invalidated.get(record.task_id, ()):
                continue
            if standing.inputs_sha256 == record.inputs_sha256:
                return standing
            self.journal([_invalidation(record.task_id, standing, "computed from other inputs")])
        raise StoreError(f"{record.task_id} has been committed and invalidated {MOST_GENERATIONS} times")

    def _refuse_stale(self, record: CommitRecord) -> None:
        latest = self._latest.get(record.task_id)
        if latest != (record.attempt, record.epoch):
            raise WorkerLost(f"attempt {record.attempt} of {record.task_id} is not the one under way")

    def _check_files(self, record: CommitRecord) -> None:
        for file in record.files:
            found = self._patiently(partial(self.store.head, file.path))
            if found is None:
                raise corrupt(file.path, "the worker reported it, but it is not there")
            if found.size_bytes != file.size_bytes:
                raise corrupt(file.path, f"{found.size_bytes} bytes, {file.size_bytes} were reported")

    def drop_if_damaged(self, state: LedgerState, task_id: str) -> None:
        """Read a commit's bytes again; what differs from its record is journalled as such and leaves `state`.

        What depends on it stays: only for a task on which nothing depends. Needs the lease.
        """
        files = state.commits[task_id].files if task_id in state.commits else ()
        digests = self._patiently(lambda: list(self.store.digest_many(file.path for file in files)))
        for file, found in zip(files, digests, strict=True):
            if what := _difference(file, found):
                entry = _invalidation(task_id, state.commits[task_id], f"{file.path}: {what}")
                self.journal([entry])
                state.apply(entry)
                del state.commits[task_id]
                state.problems = (*state.problems, f"{task_id}: {entry.reason}")
                return

    # Verification

    def verify(self, *, progress: Callable[[int, int], None] = lambda done, of: None) -> Verification:
        """Read all committed bytes and compare. `progress(files_done, files)`. Changes nothing."""
        state = self._patiently(self._load)
        broken = {entry.task_id: entry for entry in state.broken}
        reasons = {task_id: entry.reason for task_id, entry in broken.items()}
        problems = [Problem(task_id, commit_path(task_id), reason) for task_id, reason in reasons.items()]
        files = [(task_id, file) for task_id, record in state.commits.items() for file in record.files]
        size_bytes = 0
        digests = self.store.digest_many(file.path for _, file in files)
        for done, ((task_id, file), found_digest) in enumerate(zip(files, digests, strict=True), 1):
            size_bytes += found_digest[1] if found_digest else 0
            progress(done, len(files))
            if what := _difference(file, found_digest):
                problems.append(Problem(task_id, file.path, what))
                reasons.setdefault(task_id, f"{file.path}: {what}")
        found = dependants_of(reasons, state.commits)
        invalid = (
            broken.get(task_id) or _invalidation(task_id, state.commits[task_id], reason)
            for task_id, reason in found.items()
        )
        return Verification(len(files), size_bytes, tuple(problems), tuple(invalid))

    def apply_verification(self, found: Verification) -> None:
        """Journal what `verify` found invalid, so that the next render does it again. Needs the lease."""
        if found.invalid:
            self.journal(found.invalid)

    # Numerics

    def pin_numerics(self, record: Mapping[str, Any], *, allow_mixed: bool = False) -> tuple[str, ...]:
        """Pin the record if none is; otherwise compare with it. Needs the lease.

        Raises NumericsMismatch naming the differences; with `allow_mixed` journals and returns them.
        """
        self.check_lease()
        if self._create(_numerics_path(self._cut), seal(record)):
            return ()
        differences = compare_numerics(self.numerics() or {}, record)
        if differences and not allow_mixed:
            raise NumericsMismatch(
                "the render was started under another numerics record: " + "; ".join(differences),
                remedy="Use the same versions and settings, or --allow-mixed to go on and have it reported.",
            )
        if differences:
            self.journal([NumericsMixed(differences)])
        return differences

    def numerics(self) -> Mapping[str, Any] | None:
        """The pinned numerics record, None if nothing is pinned. Raises NumericsMismatch if it is torn.

        Of the time since the last start over that `load` has found.
        """
        path = _numerics_path(self._cut)
        try:
            value: Mapping[str, Any] = unseal(self._patiently(lambda: self.store.read(path)))
        except FileNotFoundError:
            return None
        except TornRecord as error:
            remedy = "Delete it to pin this machine's record, if you know that it is the same."
            raise NumericsMismatch(f"{path} is damaged: {error}", remedy=remedy) from error
        return value

    # Patience

    def _create(self, path: str, data: bytes) -> bool:
        """create_if_absent through outages. What was created by a request nobody answered is ours as well."""
        if self._patiently(lambda: self.store.create_if_absent(path, data)):
            return True
        try:
            return self._patiently(lambda: self.store.read(path)) == data
        except FileNotFoundError:
            return False

    def _patiently(self, action: Callable[[], T]) -> T:
        waited_s, pause_s = 0.0, 1.0
        while True:
            try:
                return action()
            except StoreError as error:
                if waited_s >= self._outage_s:
                    raise
                self._on_wait(f"the store does not answer ({error}); trying again in {pause_s:.0f} s")
            self._sleep(pause_s)
            waited_s += pause_s
            pause_s = min(MAX_PAUSE_S, 2 * pause_s)


def _epoch_of(journal_path: str) -> int:
    return int(journal_path.removeprefix("journal/").partition("-")[0])


def _numerics_path(cut: int) -> str:
    return f"numerics-{cut:08d}.json" if cut else "numerics.json"


def _parse_commit(data: bytes, task_id: str) -> CommitRecord | None:
    """The task's commit record, None if it is torn. Raises SettingError for a whole one that is not understood."""
    try:
        record = commit_from_json(unseal(data))
    except TornRecord:
        return None
    except (KeyError, TypeError) as error:
        raise _foreign(commit_path(task_id)) from error
    return record if record.task_id == task_id else None


def _foreign(path: str) -> SettingError:
    """The error for a record that is whole and of a later version: to take it for torn would do its work again."""
    remedy = "Go on with that version, or name another --store."
    return SettingError("was written by another version of longtake", field=path, remedy=remedy)


def _is_older(record: CommitRecord | None, cut: int) -> bool:
    """Whether the record was made before a person started over."""
    return record is not None and record.epoch < cut


def _attempt(of: CommitRecord | Invalidated) -> tuple[int, int]:
    return of.attempt, of.epoch


def _difference(file: ArtifactFile, found: tuple[str, int] | None) -> str:
    """How the bytes found differ from their record, in words, or ""."""
    if found is None:
        return "the file is gone"
    if found[1] != file.size_bytes:
        return f"{found[1]} bytes, {file.size_bytes} were recorded"
    return "" if found[0] == file.sha256 else "its bytes differ from their record"


def _invalidated(log: TaskLog | None) -> set[tuple[int, int]]:
    return log.invalidated if log else set()


def _changed_input(record: CommitRecord, records: Mapping[str, CommitRecord]) -> str:
    """The first input whose own commit has other bytes than this record was computed from, or ""."""
    for input_id, sha256 in record.inputs_sha256.items():
        if input_id in records and artifact_sha256(records[input_id].files) != sha256:
            return input_id
    return ""


def _invalidation(task_id: str, record: CommitRecord | None, reason: str) -> Invalidated:
    """The entry that ends a commit; a torn record has no attempt to name."""
    if record is None:
        return Invalidated(task_id, 0, 0, reason)
    return Invalidated(task_id, record.attempt, record.epoch, reason)
