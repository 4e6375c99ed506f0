"""The one place that persists bytes: write, flush, verify, commit.

A store is one render's folder, on a local file system or in an object store (`s3://`, `gs://`, `az://`).
Paths are relative, `/`-separated, and every part matches `PART_PATTERN`. Whatever is visible under a path is
whole: bytes are written under a temporary name that no listing shows and get their name only when they are
flushed, so a crash, a full disk or a lost connection never leaves a short file behind.

Errors: `StoreError` (try again later; bounded attempts with backoff lie behind it), `StoreFull` (no space),
`SettingError` (no permission, no such bucket, no hard links), `CorruptArtifact` (bytes differ from their
record; `.path` names them), `FileNotFoundError` (nothing under that path).

A store holds no open connection while it is pickled; a worker gets the same one from `open_store(store.url)`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from pipeline.errors import CorruptArtifact, SettingError, StoreError, StoreFull
from pipeline.tasks import ArtifactFile

CHUNK_BYTES = 4 * 1024 * 1024
PART_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
"""Twice what an id may have: a file named by its sha256 and suffix fits, and so does a temporary name."""
READERS = 4
OBJECT_SCHEMES = ("s3", "gs", "az")


@dataclass(frozen=True)
class StoredFile:
    """What a listing says about a file. `modified_s` is Unix time by the store's clock."""

    path: str
    size_bytes: int
    modified_s: float


class Store(ABC):
    """One render's folder."""

    url: str

    @abstractmethod
    def write_attempt(self, path: str, source: bytes | Path) -> ArtifactFile:
        """Write bytes or a local file of any size (streamed) under `path`; durable and hashed on return."""

    @abstractmethod
    def create_if_absent(self, path: str, data: bytes) -> bool:
        """Create `path` holding `data`, durable on return. False if it exists; nothing is changed then."""

    @abstractmethod
    def put_replace(self, path: str, source: bytes | Path) -> None:
        """Write or overwrite. Only for what nothing is decided by (contact sheet, report, film so far)."""

    @abstractmethod
    def copy(self, from_path: str, path: str) -> None:
        """Give `path` the bytes of `from_path`, as a file of its own. Same caution as `put_replace`."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The whole file. For records; artifacts are opened with `open_local`."""

    @abstractmethod
    def read_range(self, path: str, start: int, length: int) -> bytes:
        """Bytes `start` to `start + length` of a file, fewer where it ends before. Nothing is verified."""

    def read_many(self, paths: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
        """Many small files, in the order asked, side by side where that is faster; None for a missing one."""
        for path in paths:
            try:
                yield path, self.read(path)
            except FileNotFoundError:
                yield path, None

    @abstractmethod
    def open_local(self, artifact: ArtifactFile, scratch: Path) -> Path:
        """A local file with exactly the recorded bytes: size and sha256 are checked here, each time.

        A local store gives the file itself (do not write to it), others a copy in `scratch`. Raises
        CorruptArtifact if the bytes differ or are gone.
        """

    @abstractmethod
    def digest(self, path: str) -> tuple[str, int]:
        """(sha256, size_bytes) of the bytes as they are now."""

    def digest_many(self, paths: Iterable[str]) -> Iterator[tuple[str, int] | None]:
        """`digest` of many files, in the order asked, side by side where that is faster; None if missing."""
        return map(self._digest_or_none, paths)

    def _digest_or_none(self, path: str) -> tuple[str, int] | None:
        try:
            return self.digest(path)
        except FileNotFoundError:
            return None

    @abstractmethod
    def list(self, prefix: str = "") -> list[StoredFile]:
        """All files in the folder `prefix` and below it, sorted by path. Empty if there is no such folder."""

    @abstractmethod
    def head(self, path: str) -> StoredFile | None:
        """What is known about one file, or None."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove a file; nothing happens if it is not there."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Space left, None where that is not known (object stores)."""

    def __reduce__(self) -> tuple[object, ...]:
        return (open_store, (self.url,))


def open_store(url: str | Path) -> Store:
    """The store at a local path, a `file://` URL or an `s3://`, `gs://`, `az://` URL. Nothing is written yet.

    Object stores take credentials and endpoints from the usual environment variables (AWS_*, GOOGLE_*,
    AZURE_*).
    """
    text = os.path.expanduser(str(url))
    scheme = urlsplit(text).scheme if "://" in text else ""
    if scheme in OBJECT_SCHEMES:
        parts, remedy = urlsplit(text), f"Write {scheme}://BUCKET/FOLDER"
        if not parts.netloc:
            raise SettingError("names no bucket", field="--store", value=text, remedy=f"{remedy}.")
        if "@" in parts.netloc or parts.query:
            # Not repeated in the error either: addresses are logged and kept in books.
            remedy += ", and put credentials into the environment (AWS_..., GOOGLE_..., AZURE_...)."
            raise SettingError("carries more than a place", field="--store", remedy=remedy)
        from pipeline.object_store import ObjectStore

        return ObjectStore(text)
    if scheme == "file" and not urlsplit(text).netloc:
        text, scheme = unquote(urlsplit(text).path), ""
    if scheme:
        raise SettingError(
            "unknown kind of store", field="--store", value=text, remedy="Use a path, s3://, gs:// or az://."
        )
    if not text:
        # Not this folder: `--renders "$PLACE"` of a variable that is not set.
        raise SettingError("is empty", field="--store", value=str(url), remedy="Name a folder or an address.")
    return LocalStore(Path(text))


def check_path(path: str) -> str:
    """`path` if every part of it may be a file name in a store; SettingError otherwise."""
    if all(PART_PATTERN.fullmatch(part) for part in path.split("/")):
        return path
    raise SettingError(
        "not a name inside the render's folder",
        field="path",
        value=path,
        remedy="Parts are 1 to 128 of a-z, 0-9, dot, underscore, hyphen, and begin with a letter or digit.",
    )


def corrupt(path: str, what: str) -> CorruptArtifact:
    """The error for a file that differs from its record; `.path` names it for the machine."""
    return CorruptArtifact(f"{path}: {what}", path)


def hash_stream(stream: BinaryIO) -> tuple[str, int]:
    """(sha256, size_bytes) of what is left in an open file."""
    digest, size_bytes = hashlib.sha256(), 0
    while chunk := stream.read(CHUNK_BYTES):
        digest.update(chunk)
        size_bytes += len(chunk)
    return digest.hexdigest(), size_bytes


def check_artifact(artifact: ArtifactFile, sha256: str, size_bytes: int) -> None:
    """Raise CorruptArtifact unless the bytes found are those recorded."""
    if size_bytes != artifact.size_bytes:
        raise corrupt(artifact.path, f"{size_bytes} bytes, {artifact.size_bytes} were recorded")
    if sha256 != artifact.sha256:
        raise corrupt(artifact.path, f"sha256 {sha256[:12]}..., {artifact.sha256[:12]}... was recorded")


class LocalStore(Store):
    """A folder of a file system with hard links (any local one, NFS)."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.url = str(self.root)

    def write_attempt(self, path: str, source: bytes | Path) -> ArtifactFile:
        target = self._target(path)
        with self._mapped(path), self._temporary(target) as temporary:
            sha256, size_bytes = _write_durably(temporary, source)
            os.replace(temporary, target)
            _sync_folder(target.parent)
        return ArtifactFile(target.name, path, size_bytes, sha256)

    def create_if_absent(self, path: str, data: bytes) -> bool:
        target = self._target(path)
        with self._mapped(path), self._temporary(target) as temporary:
            _write_durably(temporary, data)
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
            _sync_folder(target.parent)
        return True

    def put_replace(self, path: str, source: bytes | Path) -> None:
        target = self._target(path)
        with self._mapped(path), self._temporary(target) as temporary:
            _write_durably(temporary, source)
            os.replace(temporary, target)

    def copy(self, from_path: str, path: str) -> None:
        self.put_replace(path, self._local(from_path))

    def read(self, path: str) -> bytes:
        with self._mapped(path):
            return self._local(path).read_bytes()

    def read_range(self, path: str, start: int, length: int) -> bytes:
        with self._mapped(path), self._local(path).open("rb") as stream:
            stream.seek(start)
            return stream.read(length)

    def open_local(self, artifact: ArtifactFile, scratch: Path) -> Path:
        try:
            check_artifact(artifact, *self.digest(artifact.path))
        except FileNotFoundError:
            raise corrupt(artifact.path, "the file is gone") from None
        return self._local(artifact.path)

    def digest(self, path: str) -> tuple[str, int]:
        with self._mapped(path), self._local(path).open("rb") as stream:
            return hash_stream(stream)

    def digest_many(self, paths: Iterable[str]) -> Iterator[tuple[str, int] | None]:
        with ThreadPoolExecutor(READERS) as readers:
            yield from readers.map(self._digest_or_none, paths)

    def list(self, prefix: str = "") -> list[StoredFile]:
        folder = self._local(prefix.rstrip("/")) if prefix else self.root
        with self._mapped(prefix):
            return sorted(_walk(folder, prefix.rstrip("/")), key=lambda file: file.path)

    def head(self, path: str) -> StoredFile | None:
        with self._mapped(path):
            try:
                info = self._local(path).stat()
            except FileNotFoundError:
                return None
        return StoredFile(path, info.st_size, info.st_mtime)

    def delete(self, path: str) -> None:
        target = self._local(path)
        with self._mapped(path):
            try:
                target.unlink()
            except FileNotFoundError:
                return
            _sync_folder(target.parent)

    def free_bytes(self) -> int:
        folder = next(folder for folder in (self.root, *self.root.parents) if folder.is_dir())
        return shutil.disk_usage(folder).free

    def _local(self, path: str) -> Path:
        return self.root / check_path(path)

    @contextmanager
    def _mapped(self, path: str) -> Iterator[None]:
        """Operating system errors as the project's own; a missing file stays FileNotFoundError."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in FULL:
                raise StoreFull(f"no space left for {path}: free some and run the same command again") from error
            if error.errno in _FORBIDDEN:
                raise SettingError(
                    f"cannot use {path} in the render's folder: {error.strerror}",
                    field="--store",
                    value=self.url,
                    remedy=_REMEDY,
                ) from error
            raise StoreError(f"{path}: {error.strerror or error}") from error

    def _target(self, path: str) -> Path:
        target = self._local(path)
        with self._mapped(path):
            try:
                _make_folder(target.parent)
            except FileNotFoundError as error:
                # As below /proc. Who writes is not to take it for a file that is not there.
                message = "no folder can be made here"
                raise SettingError(message, field="--store", value=self.url, remedy=_REMEDY) from error
        return target

    @contextmanager
    def _temporary(self, target: Path) -> Iterator[Path]:
        """A name beside `target` that begins with a dot, so that no listing shows it; removed at the end."""
        temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}")
        try:
            yield temporary
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _write_durably(temporary: Path, source: bytes | Path) -> tuple[str, int]:
    digest, size_bytes = hashlib.sha256(), 0
    with temporary.open("xb") as stream:
        for chunk in _chunks(source):
            digest.update(chunk)
            stream.write(chunk)
            size_bytes += len(chunk)
        stream.flush()
        flush_to_disk(stream.fileno())
    return digest.hexdigest(), size_bytes


def flush_to_disk(handle: int) -> None:
    """Return when what was written to an open file or folder outlasts a loss of power.

    On macOS fsync leaves it in the drive's own cache. A file system that knows nothing better (SMB) gets that.
    """
    if sys.platform == "darwin":
        try:
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    os.fsync(handle)


def _chunks(source: bytes | Path) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _make_folder(folder: Path) -> None:
    """mkdir -p in which every new name is flushed, so that a file's path survives as surely as its bytes."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir()
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        flush_to_disk(handle)
    finally:
        os.close(handle)


def _walk(folder: Path, prefix: str) -> Iterator[StoredFile]:
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if not PART_PATTERN.fullmatch(entry.name):
            continue
        path = f"{prefix}/{entry.name}" if prefix else entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), path)
            continue
        with suppress(FileNotFoundError):
            info = entry.stat()
            yield StoredFile(path, info.st_size, info.st_mtime)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The first two are one number on Linux, and two on macOS.
_UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL)
_FORBIDDEN = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG),
    *(errno.ENOTSUP, errno.EOPNOTSUPP),
)


_REMEDY = "It must be a writable folder of a file system with hard links."
