"""The values that driver, orchestrator and workers hand each other. No ray here: everybody may import it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.placement import Placement
from cluster.recipe import Recipe
from pipeline.events import Fault, ProgressSummary
from pipeline.tasks import ArtifactFile, CommitRecord


@dataclass(frozen=True)
class WorkerSettings:
    """What every worker of a render is told once."""

    store_url: str
    checkpoint_path: str
    checkpoint_digest: str
    """Of what has to lie there, on the worker's machine as on the one that planned."""
    device: str
    dtype: str
    threads: int
    ffmpeg: str | None
    """Path of the ffmpeg binary; None for the one that the worker's machine has."""
    encoder_threads: int
    scratch_root: str | None
    """A folder that is cleaned up with the session; None for the machine's own temporary folder."""
    gang_size: int = 1
    """How many processes compute each segment of the render together."""


@dataclass(frozen=True)
class Serves:
    """Which render a worker of a farm works for; told with every call, so that changing over costs no call."""

    store_url: str
    checkpoint_path: str
    checkpoint_digest: str


@dataclass(frozen=True)
class RenderJob:
    """Everything a render needs besides what its store holds."""

    store_url: str
    recipe: Recipe
    placement: Placement
    settings: WorkerSettings
    fresh: bool = False
    """Forget everything committed before."""
    allow_mixed: bool = False
    deadline_s: float | None = None
    """After so many seconds the run saves and stops."""


@dataclass(frozen=True)
class Outcome:
    """How the render ended. `film` is the film task's commit if it is there."""

    exit_code: int
    message: str
    film: CommitRecord | None = None


@dataclass(frozen=True)
class News:
    """What happened since a cursor: events in order, where things stand, and the outcome if it is over."""

    events: list[dict[str, Any]]
    cursor: int
    summary: ProgressSummary | None
    outcome: Outcome | None


@dataclass(frozen=True)
class Greeting:
    """What a worker says of itself when it has started."""

    node_id: str
    host: str
    pid: int
    numerics: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """An order or a change of role that came to nothing."""

    fault: Fault
    partial: ArtifactFile | None = None
    steps: int = 0


@dataclass(frozen=True)
class Standing:
    """What a worker is doing now. `task_id` is empty between orders."""

    task_id: str = ""
    attempt: int = 0
    steps: int = 0
    frames: int = 0
    partial: ArtifactFile | None = None
    partial_steps: int = 0
