"""The vocabulary that plan, machine, store and actors share: tasks, orders, artifacts, commit records.

Everything here is a frozen, JSON-able value. A task id is the hash of what the task computes, never of where
or when it is computed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

TaskKind = Literal["text", "source", "segment", "window", "encode", "film"]
Role = Literal["text", "chain", "refine", "media"]

RECIPE_VERSION = 4
"""Raised when the same inputs would give other bytes because longtake itself computes differently."""

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
"""What an id that becomes a file name must match in full."""


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value that is hashed: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_id(kind: str, value: Any) -> str:
    """`<kind>-<24 hex digits>` of the SHA-256 of the canonical JSON of `value`."""
    digest = hashlib.sha256(canonical_json(value).encode()).hexdigest()
    return f"{kind}-{digest[:24]}"


@dataclass(frozen=True)
class Task:
    """One unit of scheduling.

    `params` holds everything that matters to the result and nothing else; it is hashed into `id` together with
    `kind`, `inputs` (upstream task ids, ordered, the actor refers to them by position) and the recipe version.
    `label`, `shot_id`, `index`, `priority` and `work` are for people and the scheduler and are not hashed.
    A `locked` task carries the id that its bytes were committed under, which need not be that of its params.
    """

    id: str
    kind: TaskKind
    role: Role
    params: Mapping[str, Any]
    inputs: tuple[str, ...] = ()
    label: str = ""
    shot_id: str = ""
    index: int = 0
    priority: int = 0
    """Lower runs first among ready tasks of the same role."""
    work: float = 0.0
    """Expected seconds on the reference worker of the plan."""
    locked: bool = False
    """Stands for what was committed once; never run: without its bytes the plan has another task instead."""

    @staticmethod
    def identify(kind: TaskKind, params: Mapping[str, Any], inputs: tuple[str, ...]) -> str:
        """The task's id from its content."""
        return content_id(kind, {"kind": kind, "recipe": RECIPE_VERSION, "params": params, "inputs": inputs})


@dataclass(frozen=True)
class ArtifactFile:
    """One file of an artifact. `path` is relative to the render's folder in the store."""

    name: str
    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Produced:
    """What a worker hands back: the files it wrote under its attempt name, and what it measured."""

    files: tuple[ArtifactFile, ...]
    measures: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    host: str = ""


@dataclass(frozen=True)
class CommitRecord:
    """The only thing that counts as done. Written once, created only if absent, by the orchestrator."""

    task_id: str
    attempt: int
    epoch: int
    files: tuple[ArtifactFile, ...]
    inputs_sha256: Mapping[str, str]
    """For each input task id, the sha256 over its commit record's files' sha256."""
    measures: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    host: str = ""
    committed_at_s: float = 0.0
    """Unix time, for people only."""


@dataclass(frozen=True)
class Order:
    """One attempt at a task, as it is sent to a worker."""

    task: Task
    attempt: int
    epoch: int
    inputs: Mapping[str, tuple[ArtifactFile, ...]]
    """For each input task id, its committed files."""
    attempt_path: str
    """Folder in the render's store folder that this attempt, and no other, writes into."""
    partial: ArtifactFile | None = None
    """A saved denoising state to go on from (this task, same numerics)."""
