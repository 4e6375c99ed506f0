"""manifest.json: what a folder made by `convert` or `pull` holds and where it came from.

    {"format": 1,
     "source": {...}             convert: digest and name of the source folder; pull: repository and revision
     "dtype": "bf16" | "fp16" | "fp32" | "int8" | null         null: as it came from the hub
     "roles": {"<role>": [{"file": "lora/x.safetensors", "sha256": "...", "strength": 1.0}, ...], ...}
     "files": {"<relative path>": {"size_bytes": 0, "sha256": "..."}, ...}}

It is written last: a folder with a manifest is complete.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.config import read_json
from model.digest import checkpoint_files, digest, digest_of, file_hashes
from model.errors import CheckpointError
from model.shards import write_text

MANIFEST_FILE = "manifest.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """A file's size and sha256 (hex)."""

    size_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class MergedLora:
    """A LoRA that is part of a role's weights. `file` is its name for people, `sha256` is what counts."""

    file: str
    sha256: str
    strength: float


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of manifest.json. `roles` is empty in a folder that was not converted."""

    source: dict[str, Any]
    dtype: str | None
    roles: dict[str, tuple[MergedLora, ...]]
    files: dict[str, FileEntry]


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, or None where there is none. Raises CheckpointError if it is damaged."""
    path = folder / MANIFEST_FILE
    if not path.exists():
        return None
    content = read_json(path)
    if content.get("format") != FORMAT:
        found = content.get("format")
        raise CheckpointError(f"{path}: has format {found!r}, this version of longtake reads {FORMAT}")
    try:
        return Manifest(
            source=dict(content["source"]),
            dtype=content["dtype"],
            roles={
                role: tuple(MergedLora(**lora) for lora in loras) for role, loras in content["roles"].items()
            },
            files=file_entries(content["files"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: is damaged ({error!r}); make the folder again") from error


def is_checkpoint(folder: Path, expected: str) -> bool:
    """Whether the folder's digest (model/digest.py) is `expected`, for whoever is about to load it.

    What a manifest says of a file that has the size it names, and is not younger than the manifest itself, is believed.

    Raises CheckpointError if the folder cannot be read.
    """
    manifest = read_manifest(folder)
    if manifest is not None and digest_of(_told_hashes(folder, manifest)) == expected:
        return True
    return digest(folder) == expected


def _told_hashes(folder: Path, manifest: Manifest) -> dict[str, str]:
    """sha256 of each file that matters, read only where the manifest cannot be believed."""
    written_ns, told, names = (folder / MANIFEST_FILE).stat().st_mtime_ns, dict[str, str](), checkpoint_files(folder)
    for name in names:
        status, entry = (folder / name).stat(), manifest.files.get(name)
        if entry is not None and status.st_size == entry.size_bytes and status.st_mtime_ns <= written_ns:
            told[name] = entry.sha256
    return told | file_hashes(folder, [name for name in names if name not in told])


def file_entries(content: Mapping[str, Mapping[str, Any]]) -> dict[str, FileEntry]:
    """Parse the "files" object of a manifest."""
    return {
        name: FileEntry(int(entry["size_bytes"]), str(entry["sha256"])) for name, entry in content.items()
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json: flushed to the disk, then renamed into place."""
    content = {"format": FORMAT, **dataclasses.asdict(manifest)}
    write_text(folder / MANIFEST_FILE, json.dumps(content, indent=1, sort_keys=True) + "\n")
