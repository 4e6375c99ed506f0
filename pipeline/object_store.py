"""A render's folder in S3, Google Cloud Storage or Azure, through obstore.

A put is whole or absent there by itself; `create_if_absent` is a conditional put (`If-None-Match: *`).
Retries are made here and not inside obstore: a conditional put whose answer was lost must be told from
one that somebody else won: after a lost answer the object is read back and compared.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import SettingError, StoreError, StoreFull, first_line
from pipeline.store import FULL, Store, StoredFile, check_artifact, check_path, corrupt, hash_stream
from pipeline.tasks import ArtifactFile

REQUEST_LIMIT_S = 60
"""A request that is not answered by then has failed, and is repeated."""
RANGE_BYTES = 16 * 1024 * 1024
READERS = 32
LARGE_READERS = 8
_FULL = re.compile(r"status code: 507\b|StorageFull|QuotaExceeded|InsufficientStorage")
"""The status and the codes of a store without space; 507 alone may be part of a duration or an address."""
_NO_BUCKET_SIGNS = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist")
T = TypeVar("T")


class ObjectStore(Store):
    """`attempts` tries for each request, waiting 0.2, 0.4, ... s (at most 10) between them."""

    def __init__(
        self,
        url: str,
        *,
        client: Any = None,
        attempts: int = 6,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = url.rstrip("/")
        self._client = client
        self._attempts = attempts
        self._sleep = sleep

    @property
    def client(self) -> Any:
        """The obstore client, made on first use (so that a pickled store carries none)."""
        if self._client is None:
            self._client = _connect(self.url)
        return self._client

    def write_attempt(self, path: str, source: bytes | Path) -> ArtifactFile:
        check_path(path)
        sha256, size_bytes = _digest_of(source)
        self._put(path, source)
        return ArtifactFile(path.rsplit("/", 1)[-1], path, size_bytes, sha256)

    def create_if_absent(self, path: str, data: bytes) -> bool:
        check_path(path)
        unanswered = False
        for attempt in range(self._attempts):
            try:
                return self._create(path, data, unanswered)
            except StoreError:
                unanswered = True
                if attempt + 1 == self._attempts:
                    raise
                self._wait(attempt)
        raise AssertionError("unreachable")

    def _create(self, path: str, data: bytes, unanswered: bool) -> bool:
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        try:
            self.client.put(path, data, mode="create", use_multipart=False)
        except (AlreadyExistsError, PreconditionError):
            return unanswered and self.read(path) == data
        except Exception as error:
            raise _mapped(path, error) from error
        return True

    def put_replace(self, path: str, source: bytes | Path) -> None:
        self._put(check_path(path), source)

    def copy(self, from_path: str, path: str) -> None:
        self._try(path, lambda: self.client.copy(check_path(from_path), check_path(path)))

    def read(self, path: str) -> bytes:
        return bytes(self._try(path, lambda: self.client.get(check_path(path)).bytes()))

    def read_range(self, path: str, start: int, length: int) -> bytes:
        get = partial(self.client.get_range, check_path(path), start=start, end=start + length)
        return bytes(self._try(path, get))

    def read_many(self, paths: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
        def read(path: str) -> tuple[str, bytes | None]:
            try:
                return path, self.read(path)
            except FileNotFoundError:
                return path, None

        with ThreadPoolExecutor(READERS) as readers:
            yield from readers.map(read, paths)

    def open_local(self, artifact: ArtifactFile, scratch: Path) -> Path:
        scratch.mkdir(parents=True, exist_ok=True)
        local = scratch / f"{artifact.sha256[:32]}-{artifact.name}"
        if not _holds(local, artifact):
            self._download(artifact, local)
        return local

    def _download(self, artifact: ArtifactFile, local: Path) -> None:
        """Into a name of its own first: two orders on one host may want the same file."""
        temporary = local.with_name(f".{local.name}.{time.monotonic_ns()}")
        digest, size_bytes = hashlib.sha256(), 0
        try:
            with temporary.open("xb") as stream:
                for chunk in self._ranges(artifact.path):
                    digest.update(chunk)
                    stream.write(chunk)
                    size_bytes += len(chunk)
            check_artifact(artifact, digest.hexdigest(), size_bytes)
            temporary.replace(local)
        except FileNotFoundError:
            raise corrupt(artifact.path, "the file is gone") from None
        except OSError as error:
            # Of a disk that is broken the worker can tell; a full store would end the render.
            if error.errno not in FULL:
                raise
            raise StoreFull(f"no space for {artifact.name} in {local.parent}: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)

    def _ranges(self, path: str) -> Iterator[bytes]:
        """The bytes in pieces, each a request of its own: one timeout or lost connection costs one piece."""
        found = self.head(path)
        if found is None:
            raise FileNotFoundError(path)
        for start in range(0, found.size_bytes, RANGE_BYTES):
            end = min(start + RANGE_BYTES, found.size_bytes)
            yield bytes(self._try(path, partial(self.client.get_range, path, start=start, end=end)))

    def digest(self, path: str) -> tuple[str, int]:
        digest, size_bytes = hashlib.sha256(), 0
        for chunk in self._ranges(check_path(path)):
            digest.update(chunk)
            size_bytes += len(chunk)
        return digest.hexdigest(), size_bytes

    def digest_many(self, paths: Iterable[str]) -> Iterator[tuple[str, int] | None]:
        with ThreadPoolExecutor(LARGE_READERS) as readers:
            yield from readers.map(self._digest_or_none, paths)

    def list(self, prefix: str = "") -> list[StoredFile]:
        folder = check_path(prefix.rstrip("/")) if prefix else None
        found = self._try(prefix, lambda: self.client.list(folder, chunk_size=1000).collect())
        files = [StoredFile(f["path"], f["size"], f["last_modified"].timestamp()) for f in found]
        return sorted(files, key=lambda file: file.path)

    def head(self, path: str) -> StoredFile | None:
        try:
            found = self._try(path, lambda: self.client.head(check_path(path)))
        except FileNotFoundError:
            return None
        return StoredFile(path, found["size"], found["last_modified"].timestamp())

    def delete(self, path: str) -> None:
        try:
            self._try(path, lambda: self.client.delete(check_path(path)))
        except FileNotFoundError:
            return

    def free_bytes(self) -> None:
        return None

    def _put(self, path: str, source: bytes | Path) -> None:
        self._try(path, lambda: self.client.put(path, source))

    def _try(self, path: str, request: Callable[[], T]) -> T:
        for attempt in range(self._attempts):
            try:
                return request()
            except Exception as error:
                fault = _mapped(path, error)
                if not isinstance(fault, StoreError) or attempt + 1 == self._attempts:
                    raise fault from error
                self._wait(attempt)
        raise AssertionError("unreachable")

    def _wait(self, attempt: int) -> None:
        self._sleep(min(10.0, 0.2 * 2**attempt) * random.uniform(0.5, 1.0))


def _connect(url: str) -> Any:
    from obstore.store import from_url

    # Options given here replace those that obstore would take from the environment.
    allow_http = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")
    options = {"timeout": f"{REQUEST_LIMIT_S}s", "connect_timeout": "10s", "allow_http": allow_http}
    try:
        return from_url(url, client_options=options, retry_config={"max_retries": 0})
    except Exception as error:
        raise SettingError(f"cannot open the store: {error}", field="--store", value=url) from error


def _mapped(path: str, error: Exception) -> Exception:
    """obstore's errors as the project's; a missing object stays FileNotFoundError."""
    from obstore import exceptions

    if isinstance(error, StoreError | StoreFull | SettingError):
        return error
    text = first_line(error)[:300]
    if isinstance(error, FileNotFoundError):
        if any(sign in str(error) for sign in _NO_BUCKET_SIGNS):
            remedy = "Create it, or correct its name."
            return SettingError(f"there is no such bucket: {text}", field="--store", remedy=remedy)
        return FileNotFoundError(path)
    if _FULL.search(text):
        return StoreFull(f"no space left for {path}: {text}")
    if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
        remedy = "Check the credentials and the bucket's permissions."
        return SettingError(f"the store refuses access to {path}: {text}", field="--store", remedy=remedy)
    if isinstance(error, exceptions.NotSupportedError | exceptions.InvalidPathError):
        return SettingError(f"the store cannot do this for {path}: {text}", field="--store")
    return StoreError(f"{path}: {text}")


def _digest_of(source: bytes | Path) -> tuple[str, int]:
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest(), len(source)
    with source.open("rb") as stream:
        return hash_stream(stream)


def _holds(local: Path, artifact: ArtifactFile) -> bool:
    try:
        return _digest_of(local) == (artifact.sha256, artifact.size_bytes)
    except FileNotFoundError:
        return False
