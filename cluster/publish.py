"""What a person looks at while a render runs and afterwards, kept up to date in its folder.

`contact_sheet.jpg`, `report.json`, `film_so_far.<ext>` and `films/<name>`: nothing is decided by them, and losing them
loses nothing. Runs in a thread of the orchestrator; a refresh that takes long makes the next one wait in proportion.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from threading import Lock

from cluster.recipe import Recipe
from cluster.scratch import scratch_folder
from pipeline.media import Unit, film_so_far, find_ffmpeg
from pipeline.plan import Plan
from pipeline.report import MOST_TILES, FilmFile, RenderState, Tile, contact_sheet, report_json, thumbnails
from pipeline.store_meter import MeteredStore
from pipeline.tasks import CommitRecord, Task

FILMS_FOLDER = "films"
REST_FACTOR = 20.0
"""A refresh may take at most one part in this many of the render's time."""
USUAL_TILES = 15
"""Tiles that even the shortest film gets."""


class Publisher:
    """One render's folder. `refresh` may be called from any thread, at any rate."""

    def __init__(self, store: MeteredStore, recipe: Recipe, plan: Plan, ffmpeg: str | None) -> None:
        self.plan = plan
        self._store, self._recipe = store, recipe
        self._ffmpeg = find_ffmpeg(ffmpeg)
        self._lock = Lock()
        self._started_s = time.monotonic()
        self._rest_until_s = 0.0
        self._shown_units = 0
        self._tiles: dict[str, list[Tile]] = {}

    def refresh(self, commits: Mapping[str, CommitRecord]) -> None:
        """Write what has changed. Skipped while another refresh runs or its rest lasts."""
        if time.monotonic() < self._rest_until_s or not self._lock.acquire(blocking=False):
            return
        try:
            started_s = time.monotonic()
            self._refresh(commits, "running", "")
            self._rest_until_s = time.monotonic() + REST_FACTOR * (time.monotonic() - started_s)
        finally:
            self._lock.release()

    def conclude(self, commits: Mapping[str, CommitRecord], state: RenderState, message: str) -> None:
        """The last refresh."""
        with self._lock:
            self._refresh(commits, state, message)
            film = commits.get(self.plan.film_task_id)
            if film is not None:
                self._store.copy(film.files[0].path, f"{FILMS_FOLDER}/{film.files[0].name}")

    def _refresh(self, commits: Mapping[str, CommitRecord], state: RenderState, message: str) -> None:
        film = self.plan.tasks[self.plan.film_task_id]
        frames: Sequence[int] = film.params["unit_frames"]
        with scratch_folder("lt-publish-") as folder:
            if film.id not in commits:
                self._put_film_so_far(film, commits, folder)
            self._put_contact_sheet(film, frames, commits, folder)
        report = report_json(
            title=self._recipe.spec.title,
            state=state,
            tasks=self.plan.tasks.values(),
            commits=commits,
            versions=self._recipe.versions,
            wall_s=time.monotonic() - self._started_s,
            film=self._film_file(commits),
            message=message,
            warnings=self.plan.warnings,
            store=self._store.meter,
        )
        self._store.put_replace("report.json", report)

    def _film_file(self, commits: Mapping[str, CommitRecord]) -> FilmFile | None:
        record = commits.get(self.plan.film_task_id)
        if record is None:
            return None
        file = record.files[0]
        return FilmFile(file.path, file.sha256, file.size_bytes, self.plan.film_frames, self.plan.fps)

    def _put_film_so_far(self, film: Task, commits: Mapping[str, CommitRecord], scratch: Path) -> None:
        """Join the units from the film's beginning as far as they are there."""
        ready = units_so_far(film, commits)
        if len(ready) <= self._shown_units:
            return
        units = [Unit(self._open(record, scratch), frames) for record, frames in ready]
        codec = film.params["codec"]
        out = scratch / f"film_so_far.{codec['container']}"
        film_so_far(units, out, fps=self.plan.fps, codec=codec, ffmpeg=self._ffmpeg)
        self._store.put_replace(out.name, out)
        self._shown_units = len(ready)

    def _put_contact_sheet(
        self, film: Task, frames: Sequence[int], commits: Mapping[str, CommitRecord], scratch: Path
    ) -> None:
        """Pictures of the units that are there; each unit is looked at once."""
        step = -(-len(film.inputs) // MOST_TILES)
        per_unit = -(-USUAL_TILES // len(film.inputs))
        starts = [0, *accumulate(frames)]
        fresh = False
        for index in range(0, len(film.inputs), step):
            task_id = film.inputs[index]
            if task_id in commits and task_id not in self._tiles:
                path, fresh = self._open(commits[task_id], scratch), True
                self._tiles[task_id] = self._unit_tiles(task_id, path, per_unit, starts[index] / self.plan.fps)
        if fresh:
            tiles = [tile for task_id in film.inputs for tile in self._tiles.get(task_id, [])]
            self._store.put_replace("contact_sheet.jpg", contact_sheet(self._recipe.spec.title, tiles))

    def _unit_tiles(self, task_id: str, path: Path, count: int, start_s: Fraction) -> list[Tile]:
        shot_id = self.plan.tasks[task_id].shot_id
        return [
            Tile(frame, shot_id, float(start_s) + time_s) for time_s, frame in thumbnails(path, count, self._ffmpeg)
        ]

    def _open(self, record: CommitRecord, scratch: Path) -> Path:
        """A unit's verified bytes; units have the same names, so each gets a folder of its own."""
        folder = scratch / record.task_id
        folder.mkdir(exist_ok=True)
        return self._store.open_local(record.files[0], folder)


def units_so_far(film: Task, commits: Mapping[str, CommitRecord]) -> list[tuple[CommitRecord, int]]:
    """The committed units from the first on without a gap, each with its number of frames."""
    ready = []
    for task_id, frames in zip(film.inputs, film.params["unit_frames"], strict=True):
        if task_id not in commits:
            break
        ready.append((commits[task_id], frames))
    return ready
