"""Fetch a checkpoint from the Hugging Face hub into a plain folder.

Only what longtake reads is fetched (the official parts, render.json, the licence), never pickles. HF_ENDPOINT
names another hub, HF_TOKEN or a stored login gives access to gated repositories. Files come from one commit,
which the manifest records.

Resumable: run the same call again after any interruption. Finished files are checked and kept; an unfinished
one goes on from its last byte in `<file>.<hash>.partial`. A file gets its name only when its size and hash
are those the hub states (sha256 for large files, the git hash for small ones). The hub library's own download
starts a file over after an interruption, which hurts with files of 10 GB.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import quote

from model.digest import (
    LICENCES,
    PARTS,
    TOP_FILES,
    Meter,
    Progress,
    file_hashes,
    file_sha256,
    require_disk_space,
)
from model.errors import CheckpointError
from model.manifest import FileEntry, Manifest, read_manifest, write_manifest
from model.shards import commit, flush_to_disk

SUFFIXES = (".json", ".safetensors", ".model", ".txt")
# Pauses before each new attempt; one byte of progress starts the row over.
RETRY_WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)
TIMEOUT_S = 60.0


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """One file on the hub. `sha256` for large-file storage, else `git_sha1`, the hash of its git blob."""

    name: str
    size_bytes: int
    sha256: str | None
    git_sha1: str | None

    @property
    def key(self) -> str:
        return (self.sha256 or self.git_sha1 or "")[:16]


def pull(
    repo_id: str,
    target: str | Path,
    *,
    revision: str = "main",
    token: str | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Fetch `repo_id` ("owner/name") at `revision` into `target`, verify every file and write manifest.json
    there.

    Raises CheckpointError: unknown or gated repository, a repository without safetensors weights, no
    connection, a full disk, bytes that do not have the stated hash, or a target that holds something else.
    """
    target = Path(target)
    commit_id, files = list_files(repo_id, revision, token)
    source = {"repo_id": repo_id, "revision": commit_id}
    _check_target(target, source)
    meter = Meter(progress, sum(file.size_bytes for file in files))
    require_disk_space(target, sum(_missing_bytes(target, file) for file in files))
    try:
        for file in files:
            _fetch(_url(repo_id, commit_id, file.name), target, file, token, meter)
        hashes = file_hashes(target, [file.name for file in files])
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or target}: cannot be written ({error.strerror or error})"
        ) from error
    entries = {file.name: FileEntry(file.size_bytes, hashes[file.name]) for file in files}
    manifest = Manifest(source, None, {}, entries)
    write_manifest(target, manifest)
    return manifest


def list_files(repo_id: str, revision: str, token: str | None = None) -> tuple[str, list[RemoteFile]]:
    """The commit that `revision` means now, and the files of it that longtake needs."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    try:
        info = HfApi(endpoint=_endpoint(), token=token).model_info(
            repo_id, revision=revision, files_metadata=True, timeout=TIMEOUT_S
        )
    except HFValidationError as error:
        raise CheckpointError(f"{repo_id!r}: is no hub id, wanted owner/name ({error})") from error
    except (_http_error(), ConnectionError) as error:
        raise CheckpointError(_explain(repo_id, revision, error)) from error
    siblings = info.siblings or []
    files = [_remote_file(sibling) for sibling in siblings if is_needed(sibling.rfilename)]
    _check_listing(repo_id, [sibling.rfilename for sibling in siblings], files)
    return str(info.sha), files


def is_needed(name: str) -> bool:
    """Whether longtake reads this file of a repository."""
    path = PurePosixPath(name)
    if ".." in path.parts or path.is_absolute() or any(part.startswith(".") for part in path.parts):
        return False
    if len(path.parts) == 1:
        return name in TOP_FILES + LICENCES
    return path.parts[0] in PARTS and path.suffix in SUFFIXES


def _check_listing(repo_id: str, all_names: Iterable[str], files: list[RemoteFile]) -> None:
    """Before the first byte: the parts that every checkpoint needs must be there as safetensors."""
    weights = {file.name.split("/")[0] for file in files if file.name.endswith(".safetensors")}
    problems = [f"{part}/: no safetensors file" for part in ("text_encoder", "vae") if part not in weights]
    if not weights & {"dit", "base_model_int8", "roles"}:
        problems.append("dit/: no safetensors file")
    if problems:
        pickles = [name for name in all_names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        hint = f" (its {len(pickles)} pickles are never loaded)" if pickles else ""
        raise CheckpointError(
            f"{repo_id}: is no LongCat-Video checkpoint in safetensors files{hint}", problems
        )


def _remote_file(sibling: Any) -> RemoteFile:
    sha256 = sibling.lfs.sha256 if sibling.lfs else None
    if sibling.size is None or not (sha256 or sibling.blob_id):
        raise CheckpointError(
            f"{sibling.rfilename}: {_endpoint()} states no size or hash for it; use another HF_ENDPOINT"
        )
    return RemoteFile(sibling.rfilename, int(sibling.size), sha256, None if sha256 else sibling.blob_id)


def _check_target(target: Path, source: dict[str, Any]) -> None:
    manifest = read_manifest(target)
    if manifest is not None and manifest.source != source:
        raise CheckpointError(f"{target}: holds {manifest.source}, wanted {source}; choose another target")


def _missing_bytes(target: Path, file: RemoteFile) -> int:
    if (target / file.name).is_file():
        return 0
    partial = _partial(target, file)
    return file.size_bytes - (partial.stat().st_size if partial.exists() else 0)


def _partial(target: Path, file: RemoteFile) -> Path:
    # The hash in the name keeps the halves of two versions of a file apart.
    return target / f"{file.name}.{file.key}.partial"


def _fetch(url: str, target: Path, file: RemoteFile, token: str | None, meter: Meter) -> None:
    path, partial = target / file.name, _partial(target, file)
    if path.is_file() and path.stat().st_size == file.size_bytes and _is_intact(path, file):
        meter.add(file.name, file.size_bytes)
        return
    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "ab") as out:
        meter.add(file.name, out.tell())
        _download(url, out, file, token, meter)
        flush_to_disk(out)
    if not _is_intact(partial, file):
        partial.unlink()
        raise CheckpointError(
            f"{url}: the bytes received do not have the hash that the hub states; run again"
        )
    commit(partial, path)


def _is_intact(path: Path, file: RemoteFile) -> bool:
    if file.sha256:
        return file_sha256(path) == file.sha256
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == file.git_sha1


def _download(url: str, out: BinaryIO, file: RemoteFile, token: str | None, meter: Meter) -> None:
    """Append the missing bytes to `out`; go on after broken connections until RETRY_WAITS_S bring no byte."""
    failures = 0
    while out.tell() < file.size_bytes:
        before = out.tell()
        try:
            _receive(url, out, file, token, meter)
            problem: Exception | None = None
        except _http_error() as error:
            problem = error
        if out.tell() > before:
            failures = 0
        if out.tell() >= file.size_bytes:
            return
        if failures == len(RETRY_WAITS_S) or _is_refusal(problem):
            raise CheckpointError(
                f"{url}: stopped at byte {out.tell()} of {file.size_bytes} "
                f"({_first_line(problem)}); run again to go on from there"
            ) from problem
        time.sleep(RETRY_WAITS_S[failures])
        failures += 1


def _receive(url: str, out: BinaryIO, file: RemoteFile, token: str | None, meter: Meter) -> None:
    from huggingface_hub import get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(token=token) | {"Accept-Encoding": "identity"}
    if out.tell():
        headers["Range"] = f"bytes={out.tell()}-"
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_S) as response:
        hf_raise_for_status(response)
        if out.tell() and response.status_code != 206:
            # The server ignored the range and sends the file from its start.
            meter.add(file.name, -out.tell())
            out.seek(0)
            out.truncate()
        # As the bytes come: larger chunks would be lost when the connection breaks inside one.
        for chunk in response.iter_bytes():
            out.write(chunk)
            meter.add(file.name, len(chunk))
            if out.tell() > file.size_bytes:
                raise CheckpointError(
                    f"{url}: sends more than the {file.size_bytes} bytes that the hub states"
                )


def _http_error() -> type[Exception]:
    """Base of the errors of the hub library's HTTP client, which is another one in each of its versions."""
    from huggingface_hub import errors

    return errors.HTTPError


def _first_line(problem: Exception | None) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0] if problem else "connection closed"


def _is_refusal(problem: Exception | None) -> bool:
    """Whether the server said no in a way that asking again will not change."""
    status = getattr(getattr(problem, "response", None), "status_code", None)
    return status is not None and status < 500 and status not in (408, 429)


def _endpoint() -> str:
    # Read at each call: the hub library reads it only once, when it is imported.
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _url(repo_id: str, commit_id: str, name: str) -> str:
    return f"{_endpoint()}/{repo_id}/resolve/{commit_id}/{quote(name)}"


def _explain(repo_id: str, revision: str, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return f"{repo_id}: needs permission; ask for it on {_endpoint()}/{repo_id} and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id}: no such repository on {_endpoint()} (a private one needs HF_TOKEN)"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id}: has no revision {revision!r}"
    reason = f"{_endpoint()} does not answer as a hub ({_first_line(error)})"
    return f"{repo_id}: {reason}; check the connection and HF_ENDPOINT"
