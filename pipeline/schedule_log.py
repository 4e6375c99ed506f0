"""Where schedules lie: `<id>/<number>.json` in a store of their own, one entry a file, created only if absent.

Raises StoreError, SettingError as the store does, CorruptArtifact for an entry that is not whole.
"""

from __future__ import annotations

from pipeline.records import TornRecord, seal, unseal
from pipeline.recurring import Entry, State, apply_entry, check_schedule_id, entry_from_json, entry_to_json
from pipeline.store import Store, corrupt


class ScheduleLog:
    """One schedule's log; `state` is as of the last `refresh` or `append`."""

    def __init__(self, store: Store, schedule_id: str) -> None:
        check_schedule_id(schedule_id)
        self.id = schedule_id
        self.state = State()
        self.entries: list[Entry] = []
        self.store = store

    def refresh(self) -> State:
        """Read on to the end."""
        if not self.entries:
            # Many at once; what was written since is read one by one.
            numbers = range(1, len(self.store.list(self.id)) + 1)
            for path, data in self.store.read_many(self._path(number) for number in numbers):
                if data is None:
                    break
                self._take(self._whole(path, data))
        while (entry := self._read(len(self.entries) + 1)) is not None:
            self._take(entry)
        return self.state

    def append(self, entry: Entry) -> bool:
        """Write the next entry. False if somebody else was first; what they wrote has been read then."""
        if self.store.create_if_absent(self._path(len(self.entries) + 1), seal(entry_to_json(entry))):
            self._take(entry)
            return True
        self.refresh()
        return False

    def _take(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.state = apply_entry(self.state, entry)

    def _read(self, number: int) -> Entry | None:
        path = self._path(number)
        try:
            return self._whole(path, self.store.read(path))
        except FileNotFoundError:
            return None

    def _whole(self, path: str, data: bytes) -> Entry:
        try:
            return entry_from_json(unseal(data))
        except (TornRecord, KeyError, TypeError) as error:
            remedy = "Check that --schedules names the folder of schedules, and no other."
            raise corrupt(path, f"holds no entry of a schedule ({error}). {remedy}") from error

    def _path(self, number: int) -> str:
        return f"{self.id}/{number:08d}.json"


def schedule_ids(store: Store) -> list[str]:
    """All schedules that ever were, removed ones too."""
    return sorted({file.path.split("/")[0] for file in store.list() if file.path.endswith("/00000001.json")})
