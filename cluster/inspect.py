"""`longtake inspect`: measure a film, or the film of a render together with what its store knows of it."""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path

from cluster.places import open_ledger, open_render
from cluster.recipe import load_recipe, make_plan
from cluster.scratch import scratch_folder
from pipeline.errors import SettingError
from pipeline.inspection import Inspection, Known, Shot, TaskTiming, inspect_film
from pipeline.inspection_files import write_inspection
from pipeline.known_seams import seams_of
from pipeline.ledger import LedgerState
from pipeline.media import Ffmpeg, find_ffmpeg
from pipeline.plan import Plan
from pipeline.store import Store
from pipeline.tasks import CommitRecord

STORYBOARDS = (".yaml", ".yml", ".json")


def print_inspection(place: str, store: str | None, out: Path | None, *, as_json: bool) -> int:
    """Inspect a film file, or a render named by its storyboard, folder or address."""
    path = Path(place)
    is_film = store is None and path.is_file() and path.suffix.lower() not in STORYBOARDS
    folder = out or Path(f"{path.stem if is_film else path.name}.inspection")
    _check_folder(folder)
    if is_film:
        inspection = inspect_film(path, find_ffmpeg())
    else:
        render = open_render(place, store)
        inspection, _ = inspect_render(render, open_ledger(render).load(), find_ffmpeg())
    files = write_inspection(inspection, folder)
    if as_json:
        print(json.dumps({**inspection.to_json(), "files": {k: str(v) for k, v in files.items()}}))
        return 0
    print(_summary(inspection))
    print(f"  page: {files['page']}")
    return 0


def _check_folder(folder: Path) -> None:
    """Whether files can be put there, before minutes are spent on measuring. Raises SettingError."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        # Permissions do not tell it of every place: /proc grants them, and keeps no files.
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        remedy = "Name a folder that can be written to: --out FOLDER."
        raise SettingError("cannot be written", field="--out", value=str(folder.absolute()), remedy=remedy) from error


def inspect_render(store: Store, state: LedgerState, ffmpeg: Ffmpeg) -> tuple[Inspection, CommitRecord]:
    """Measure the film of the render in a store; also which film that is. Raises SettingError where there is none."""
    recipe = load_recipe(store)
    plan = make_plan(recipe, state.overrides)
    film = state.commits.get(plan.film_task_id)
    if film is None:
        remedy = "Let the render finish, or inspect its film_so_far."
        raise SettingError("this render has no film yet", field="RENDER", value=store.url, remedy=remedy)
    with scratch_folder("lt-inspect-") as folder:
        path = store.open_local(film.files[0], folder)
        return inspect_film(path, ffmpeg, known_of(plan, state, recipe.spec.title)), film


def known_of(plan: Plan, state: LedgerState, title: str) -> Known:
    """What a render's plan and ledger tell about its film."""
    timings = [
        TaskTiming(task.kind, task.label or task.id, record.host, record.seconds, record.committed_at_s)
        for task in plan.tasks.values()
        if (record := state.commits.get(task.id)) is not None
    ]
    return Known(title, seams_of(plan.tasks, plan.film_task_id), _shots(plan), timings)


def _shots(plan: Plan) -> list[Shot]:
    shown = [(shot.first_frame, shot.id) for shot in plan.shots if shot.first_frame is not None]
    bounds = [*sorted(shown), (plan.film_frames, "")]
    fades = {shot.id: shot.fade_frames for shot in plan.shots}
    return [
        Shot(name, start, stop, min(fades[name], stop - start - 1))
        for (start, name), (stop, _) in pairwise(bounds)
        if start < stop
    ]


def _summary(inspection: Inspection) -> str:
    seams = [seam for seam in inspection.seams if seam.kind != "cut"]
    visible = sum(seam.verdict == "visible" for seam in seams)
    known = f"{len(seams)} seams, {visible} stand out; " if seams else ""
    faults = ", ".join(sorted({fault.kind for fault in inspection.faults})) or "none"
    return (
        f"{inspection.known.title or inspection.film}: {inspection.info.frame_count} frames\n"
        f"  {known}{len(inspection.joins)} hard joins found; faults: {faults}\n"
        f"  flicker {inspection.flicker:.3f} L*, lightness drift "
        f"{inspection.drift['lightness_mean'].change:.2f} L*, colour distance to the first seconds "
        f"{inspection.drift['colour_distance'].last:.2f}"
    )
