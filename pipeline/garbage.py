"""What lies in a render's folder that nothing needs: decided here, deleted elsewhere.

Contract: pure. Nobody may write meanwhile (the lease is held), and only what earlier epochs have left is named,
so that what a later render writes can never be in the list. Records (journal, commits, leases), logs and what a
person looks at are never garbage. A file that a commit refers to is garbage only with `orphans`, and then only
if neither a present plan nor a lock needs the commit, nor anything computed from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.journal import Invalidated
from pipeline.ledger import LedgerState
from pipeline.store import StoredFile
from pipeline.tasks import CommitRecord


@dataclass(frozen=True)
class Garbage:
    """What may be deleted, and the commits that have to be ended before that."""

    files: tuple[StoredFile, ...]
    orphans: tuple[Invalidated, ...]

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(file.size_bytes for file in self.files)


def find_garbage(
    files: Iterable[StoredFile],
    state: LedgerState,
    needed: Iterable[str],
    media: Iterable[str],
    epoch: int,
    *,
    orphans: bool,
) -> Garbage:
    """`needed`: ids of all tasks of the present plans; `media`: paths of the files they use; `epoch`: ours."""
    kept = keep_with_inputs(needed, state)
    ended = [record for task_id, record in state.commits.items() if orphans and task_id not in kept]
    gone = {record.task_id for record in ended}
    standing = {
        file.path for task_id, record in state.commits.items() if task_id not in gone for file in record.files
    }
    saved = {log.partial.path for task_id, log in state.logs.items() if log.partial and task_id not in state.commits}
    wanted = standing | saved | (set(media) if orphans else set())
    return Garbage(
        tuple(file for file in files if file.path not in wanted and _is_ours(file.path, epoch, orphans=orphans)),
        tuple(Invalidated(one.task_id, one.attempt, one.epoch, "deleted: no present plan needs it") for one in ended),
    )


def keep_with_inputs(needed: Iterable[str], state: LedgerState) -> set[str]:
    """The commits that plans and locks need, with all that they were computed from."""
    locked = (task_id for lock in state.locks.values() for task_id in lock.tasks.values())
    queue: list[str] = [*needed, *locked]
    kept: set[str] = set()
    commits: Mapping[str, CommitRecord] = state.commits
    while queue:
        task_id = queue.pop()
        if task_id in commits and task_id not in kept:
            kept.add(task_id)
            queue.extend(commits[task_id].inputs_sha256)
    return kept


def _is_ours(path: str, epoch: int, *, orphans: bool) -> bool:
    """Whether a file that nothing refers to may go: what attempts and requests of earlier epochs have left."""
    parts = path.split("/")
    if parts[0] == "media":
        return orphans
    if parts[0] == "requests":
        return int(parts[1]) < epoch
    if parts[0] == "attempts" and len(parts) > 3:
        return _epoch_of(parts[2]) < epoch
    return parts[0] == "partials" and len(parts) > 2 and _epoch_of(parts[2]) < epoch


def _epoch_of(name: str) -> int:
    """Attempt folders and saved states are called `<attempt>-<epoch>...`; anything else is not touched."""
    number = name.partition(".")[0].split("-")
    return int(number[1]) if len(number) > 1 and number[1].isdigit() else 1 << 62


def by_folder(files: Sequence[StoredFile]) -> dict[str, tuple[int, int]]:
    """(files, bytes) of each top folder."""
    found: dict[str, tuple[int, int]] = {}
    for file in files:
        folder = file.path.partition("/")[0]
        count, size_bytes = found.get(folder, (0, 0))
        found[folder] = count + 1, size_bytes + file.size_bytes
    return found
