"""The identity of a checkpoint folder, computed from its bytes.

digest(folder) = sha256 over the lines "<relative path>\\0<sha256 of the file>\\n", sorted by path, of the
files that decide what the models compute: everything below the folders of PARTS but hidden files, *.md and
*.partial, and render.json at the top. The name and place of the folder, its manifest.json and its licence do
not matter.

Hashing 83 GB takes minutes, so each file's sha256 is remembered in $XDG_CACHE_HOME/longtake/digests (~/.cache
by default), valid while the file's size, modification and change times stay what they were; of several processes
that want it at one time one reads the file. Nothing is ever written into the checkpoint folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from model.errors import CheckpointError

PARTS = ("tokenizer", "text_encoder", "vae", "dit", "base_model_int8", "lora", "scheduler", "roles")
TOP_FILES = ("render.json",)
# Kept with the weights, but no part of their identity.
LICENCES = ("LICENSE", "LICENSE.md", "LICENSE.txt")
CHUNK_BYTES = 4 << 20
# File times tick every few milliseconds on many systems: a file this young could change again without its
# times showing it.
SETTLED_S = 2.0
# How long a process waits for another that reads the same file: this, and what that takes at the pace of a slow disk.
WAIT_S, SLOW_BYTES_PER_S = 30.0, 50e6

# progress(what, done_bytes, total_bytes), called often and from one thread at a time
Progress = Callable[[str, int, int], None]


class Meter:
    """Adds up bytes from several threads and passes them on to a progress callback."""

    def __init__(self, progress: Progress | None, total_bytes: int) -> None:
        self._progress = progress
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._lock = Lock()

    def add(self, what: str, count_bytes: int) -> None:
        with self._lock:
            self._done_bytes += count_bytes
            if self._progress:
                self._progress(what, self._done_bytes, self._total_bytes)


def checkpoint_files(folder: Path) -> list[str]:
    """Relative paths ("/"-separated, sorted) of the files that matter; CheckpointError if there are none."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    found = [name for name in TOP_FILES if (folder / name).is_file()]
    for part in PARTS:
        for path in (folder / part).rglob("*"):
            relative = path.relative_to(folder)
            if path.is_file() and matters(relative.as_posix()):
                found.append(relative.as_posix())
    if not any("/" in name for name in found):
        raise CheckpointError(f"{folder}: is no checkpoint folder, it has none of {', '.join(PARTS)}")
    return sorted(found)


def matters(relative: str) -> bool:
    """Whether a file at this relative path counts towards the digest."""
    parts = relative.split("/")
    if any(part.startswith(".") for part in parts) or relative.endswith((".md", ".partial")):
        return False
    return relative in TOP_FILES if len(parts) == 1 else parts[0] in PARTS


def digest(folder: str | Path, *, progress: Progress | None = None) -> str:
    """sha256 (hex) that identifies the checkpoint's content. Raises CheckpointError if it cannot be read."""
    folder = Path(folder)
    hashes = file_hashes(folder, checkpoint_files(folder), progress=progress)
    return digest_of(hashes)


def digest_of(hashes: dict[str, str]) -> str:
    """The folder's digest from its files' sha256 by relative path."""
    lines = "".join(f"{name}\0{hashes[name]}\n" for name in sorted(hashes) if matters(name))
    return hashlib.sha256(lines.encode()).hexdigest()


def file_hashes(
    folder: Path, names: Iterable[str], *, progress: Progress | None = None, remembered: bool = True
) -> dict[str, str]:
    """sha256 (hex) of each file, several at a time. `remembered=False` reads every byte again."""
    names = list(names)
    try:
        meter = Meter(progress, sum((folder / name).stat().st_size for name in names))
        # Hashing holds no interpreter lock; more than four readers would only make a disk seek.
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            hashes = pool.map(
                lambda name: file_sha256(folder / name, meter=meter, remembered=remembered), names
            )
            return dict(zip(names, hashes, strict=True))
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from error


def file_sha256(path: Path, *, meter: Meter | None = None, remembered: bool = True) -> str:
    """sha256 (hex) of one file, from memory if it is unchanged since it was last read. Raises OSError."""
    stamp = _stamp(path)
    entry = _entry(path)
    if not remembered:
        return _read_and_remember(path, meter, entry, stamp)
    known = _recall(entry, stamp)
    if known is None:
        # The workers of a machine start at one time: one reads, the others wait for what it finds.
        with _turn(entry, stamp[0]):
            known = _recall(entry, stamp)
            if known is None:
                return _read_and_remember(path, meter, entry, stamp)
    if meter:
        meter.add(path.name, stamp[0])
    return known


def _read_and_remember(path: Path, meter: Meter | None, entry: Path, stamp: list[int]) -> str:
    value = _read_sha256(path, meter)
    if _stamp(path) == stamp and time.time_ns() - max(stamp[1:3]) > SETTLED_S * 1e9:
        _remember(entry, stamp, value)
    return value


@contextmanager
def _turn(entry: Path, size_bytes: int) -> Iterator[None]:
    """Have one process at a time here for a file. Whoever has waited longer than reading takes goes on beside it."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        # Each machine for itself: under a home that many share, their checkpoints need not be one.
        name = entry.with_suffix(f".{socket.gethostname()}.lock")
        lock = os.open(name, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError:
        yield  # a read-only home: each reads for itself
        return
    give_up_s = time.monotonic() + WAIT_S + size_bytes / SLOW_BYTES_PER_S
    try:
        while not _is_ours(lock) and time.monotonic() < give_up_s:
            time.sleep(0.2)
        yield
    finally:
        os.close(lock)


def _is_ours(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def _read_sha256(path: Path, meter: Meter | None) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            sha256.update(chunk)
            if meter:
                meter.add(path.name, len(chunk))
    return sha256.hexdigest()


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _memory_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "longtake" / "digests"


def _entry(path: Path) -> Path:
    return _memory_folder() / (hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:40] + ".json")


def _recall(entry: Path, stamp: list[int]) -> str | None:
    try:
        content = json.loads(entry.read_text())
        return str(content["sha256"]) if content["stamp"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(entry: Path, stamp: list[int], value: str) -> None:
    # Only a saving of time: a read-only home costs the next run its minutes and nothing else.
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial = entry.with_suffix(f".{os.getpid()}.{time.monotonic_ns()}")
        partial.write_text(json.dumps({"stamp": stamp, "sha256": value}))
        os.replace(partial, entry)
    except OSError:
        pass


def require_disk_space(folder: Path, needed_bytes: int) -> None:
    """Raise CheckpointError unless the disk of `folder` (or of where it will be) has `needed_bytes` free."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free_bytes = shutil.disk_usage(place).free
    if needed_bytes * 1.01 > free_bytes:
        raise CheckpointError(
            f"{folder}: needs {needed_bytes / 1e9:.1f} GB, its disk has {free_bytes / 1e9:.1f} GB free; "
            "free some or choose another target"
        )
