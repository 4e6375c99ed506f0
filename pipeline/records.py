"""How records lie in the store: one line of canonical JSON and one line with its sha256.

A torn, shortened or bit-flipped record does not match its second line and is reported, never half believed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.tasks import ArtifactFile, CommitRecord, canonical_json


class TornRecord(ValueError):
    """The bytes are not a whole record."""


def seal(value: Any) -> bytes:
    """The bytes of a record."""
    body = canonical_json(value).encode()
    return body + b"\nsha256 " + hashlib.sha256(body).hexdigest().encode() + b"\n"


def unseal(data: bytes) -> Any:
    """The value that `seal` was given. Raises TornRecord."""
    body, _, last_line = data.partition(b"\n")
    if last_line != b"sha256 " + hashlib.sha256(body).hexdigest().encode() + b"\n":
        raise TornRecord(f"{len(data)} bytes that do not match their checksum")
    return json.loads(body)


def commit_to_json(record: CommitRecord) -> dict[str, Any]:
    """A commit record as a JSON object."""
    files = [vars(file) for file in record.files]
    return {**vars(record), "files": files, "measures": dict(record.measures)}


def commit_from_json(value: Mapping[str, Any]) -> CommitRecord:
    """The commit record that `commit_to_json` was given."""
    files = tuple(ArtifactFile(**file) for file in value["files"])
    return CommitRecord(**{**value, "files": files})


def artifact_sha256(files: Sequence[ArtifactFile]) -> str:
    """The sha256 over the files' sha256 digests, in order: how a commit record names each of its inputs."""
    return hashlib.sha256("\n".join(file.sha256 for file in files).encode()).hexdigest()
