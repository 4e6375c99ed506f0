"""A store that knows how long its callers have waited for it.

`MeteredStore` passes every call on and adds up the seconds; it changes nothing else. Several threads may call
at once, so the seconds may add up to more than the time that went by.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from pipeline.store import Store, StoredFile
from pipeline.tasks import ArtifactFile, CommitRecord

STORE_MEASURE = "store_s"
"""Name of the measure by which a worker reports how long an order has waited for the store."""


class Meter:
    """Seconds and calls so far."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0
        self._lock = Lock()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside as one call."""
        begun_s = time.perf_counter()
        try:
            yield
        finally:
            took_s = time.perf_counter() - begun_s
            with self._lock:
                self.seconds += took_s
                self.calls += 1


class MeteredStore(Store):
    """`store`, metered. A pickled one is the plain store again."""

    def __init__(self, store: Store, meter: Meter) -> None:
        self.url, self.meter, self._store = store.url, meter, store

    def point_at(self, store: Store) -> None:
        """From now on stand for another store; for a worker that goes on to another render."""
        self.url, self._store = store.url, store

    def write_attempt(self, path: str, source: bytes | Path) -> ArtifactFile:
        with self.meter.running():
            return self._store.write_attempt(path, source)

    def create_if_absent(self, path: str, data: bytes) -> bool:
        with self.meter.running():
            return self._store.create_if_absent(path, data)

    def put_replace(self, path: str, source: bytes | Path) -> None:
        with self.meter.running():
            self._store.put_replace(path, source)

    def copy(self, from_path: str, path: str) -> None:
        with self.meter.running():
            self._store.copy(from_path, path)

    def read(self, path: str) -> bytes:
        with self.meter.running():
            return self._store.read(path)

    def read_range(self, path: str, start: int, length: int) -> bytes:
        with self.meter.running():
            return self._store.read_range(path, start, length)

    def read_many(self, paths: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
        # As a whole: the reads go on side by side while one of them is taken up.
        with self.meter.running():
            found = list(self._store.read_many(paths))
        yield from found

    def open_local(self, artifact: ArtifactFile, scratch: Path) -> Path:
        with self.meter.running():
            return self._store.open_local(artifact, scratch)

    def digest(self, path: str) -> tuple[str, int]:
        with self.meter.running():
            return self._store.digest(path)

    def digest_many(self, paths: Iterable[str]) -> Iterator[tuple[str, int] | None]:
        # One by one: `verify` tells its progress. Only the waiting counts, not what the caller does between.
        digests = self._store.digest_many(paths)
        while True:
            with self.meter.running():
                try:
                    found = next(digests)
                except StopIteration:
                    return
            yield found

    def list(self, prefix: str = "") -> list[StoredFile]:
        with self.meter.running():
            return self._store.list(prefix)

    def head(self, path: str) -> StoredFile | None:
        with self.meter.running():
            return self._store.head(path)

    def delete(self, path: str) -> None:
        with self.meter.running():
            self._store.delete(path)

    def free_bytes(self) -> int | None:
        with self.meter.running():
            return self._store.free_bytes()


def tasks_use(records: Iterable[CommitRecord]) -> dict[str, float]:
    """Seconds that tasks have waited for the store, and their share of what the tasks took.

    Of the tasks whose workers have measured it.
    """
    metered = [record for record in records if STORE_MEASURE in record.measures]
    seconds = sum(record.measures[STORE_MEASURE] for record in metered)
    took_s = sum(record.seconds for record in metered)
    return {"seconds": round(seconds, 3), "share": round(seconds / took_s if took_s > 0 else 0.0, 5)}
