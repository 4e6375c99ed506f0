"""The page a person looks at: a contact sheet of the film, and report.json with counts, timings and measures.

Both are made anew from what is committed each time they are refreshed; nothing else reads them. The same
frames and captions give the same sheet.
"""

from __future__ import annotations

import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.media import Ffmpeg, Frames, probe, read_video_at
from pipeline.store_meter import Meter, tasks_use
from pipeline.tasks import CommitRecord, Task
from pipeline.times import timecode

REPORT_VERSION = 1
"""Of the layout of report.json."""

TILE_WIDTH_PX = 240
MOST_COLUMNS = 5
MOST_TILES = 60

_GAP_PX = 8
_LABEL_PX = 22
_FONT_PX = 14
_PAPER, _INK, _FAINT = (24, 24, 27), (240, 240, 240), (150, 150, 158)


@dataclass(frozen=True)
class Tile:
    """One picture of a contact sheet: a frame uint8 [h,w,3], its shot and its time in the film."""

    frame: Frames
    shot_id: str
    time_s: float


def thumbnails(film: Path, count: int, ffmpeg: Ffmpeg) -> list[tuple[float, Frames]]:
    """`count` frames of a film or unit, from the middles of equal parts of it, with their times in it (s)."""
    info = probe(film, ffmpeg)
    at_s = [info.duration_s * Fraction(2 * k + 1, 2 * count) for k in range(count)]
    frames = (frame for batch in read_video_at(film, at_s, ffmpeg, info=info) for frame in batch)
    return [(float(t), shrink(frame)) for t, frame in zip(at_s, frames, strict=True)]


def shrink(frame: Frames) -> Frames:
    """The frame uint8 [h,w,3] at the width of a tile."""
    height_px = max(1, round(frame.shape[0] * TILE_WIDTH_PX / frame.shape[1]))
    picture = Image.fromarray(frame).resize((TILE_WIDTH_PX, height_px), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def contact_sheet(title: str, tiles: Sequence[Tile]) -> bytes:
    """A JPEG with a labelled picture for each tile, at most MOST_TILES of them, evenly chosen."""
    if len(tiles) > MOST_TILES:
        tiles = [tiles[k * len(tiles) // MOST_TILES] for k in range(MOST_TILES)]
    pictures = [tile.frame if tile.frame.shape[1] == TILE_WIDTH_PX else shrink(tile.frame) for tile in tiles]
    columns = max(1, min(MOST_COLUMNS, len(tiles)))
    row_px = max((len(picture) for picture in pictures), default=0) + _LABEL_PX + _GAP_PX
    rows = -(-len(tiles) // columns)
    head_px = _LABEL_PX + 2 * _GAP_PX
    width_px = columns * (TILE_WIDTH_PX + _GAP_PX) + _GAP_PX
    sheet = Image.new("RGB", (width_px, head_px + rows * row_px), _PAPER)
    pen = ImageDraw.Draw(sheet)
    _write(pen, _GAP_PX, _GAP_PX, width_px - 2 * _GAP_PX, title, _INK, _FONT_PX + 4)
    for index, (tile, picture) in enumerate(zip(tiles, pictures, strict=True)):
        x = _GAP_PX + index % columns * (TILE_WIDTH_PX + _GAP_PX)
        y = head_px + index // columns * row_px
        sheet.paste(Image.fromarray(picture), (x, y))
        _label(pen, x, y + len(picture) + 3, tile)
    return jpeg(np.asarray(sheet))


def _label(pen: ImageDraw.ImageDraw, x: int, y: int, tile: Tile) -> None:
    """The shot on the left and the time code on the right below a picture."""
    code = timecode(tile.time_s)
    code_px = math.ceil(pen.textlength(code, font=_font(_FONT_PX)))
    _write(pen, x, y, TILE_WIDTH_PX - code_px - _GAP_PX, tile.shot_id, _INK, _FONT_PX)
    _write(pen, x + TILE_WIDTH_PX - code_px, y, code_px, code, _FAINT, _FONT_PX)


def _write(
    pen: ImageDraw.ImageDraw,
    x: int,
    y: int,
    width_px: int,
    text: str,
    ink: tuple[int, int, int],
    size_px: int,
) -> None:
    """One line of text, shortened with an ellipsis to the width."""
    font, line = _font(size_px), " ".join(text.split())
    while line and pen.textlength(line, font=font) > width_px:
        line = line.removesuffix("…")[:-1] + "…" if len(line) > 1 else ""
    pen.text((x, y), line, fill=ink, font=font)


def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, so that a sheet does not depend on what is installed."""
    return ImageFont.load_default(size_px)


def jpeg(picture: Frames) -> bytes:
    """A picture uint8 [h,w,3] as a JPEG."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=88)
    return file.getvalue()


# ------------------------------------------------------------------------------------------ report.json

RenderState = Literal["running", "done", "failed", "stopped"]


@dataclass(frozen=True)
class FilmFile:
    """Where the finished film is and what it is."""

    path: str
    sha256: str
    size_bytes: int
    frames: int
    fps: Fraction


def report_json(
    *,
    title: str,
    state: RenderState,
    tasks: Iterable[Task],
    commits: Mapping[str, CommitRecord],
    versions: Mapping[str, str],
    wall_s: float,
    film: FilmFile | None = None,
    message: str = "",
    warnings: Sequence[str] = (),
    store: Meter | None = None,
) -> bytes:
    """report.json as it is put into the store.

    `commits`: the records so far by task id. `wall_s`: seconds this run has taken. `message`: why it failed
    or stopped. `store`: what this run's orchestrator has waited for the store.
    """
    tasks = list(tasks)
    done = [(task, commits[task.id]) for task in tasks if task.id in commits]
    report = {
        "report": REPORT_VERSION,
        "title": title,
        "state": state,
        "message": message,
        "film": None if film is None else _film_entry(film),
        "counts": _counts(tasks, commits),
        "seconds": {"wall": round(wall_s, 3), "by_kind": _seconds_by_kind(done)},
        "store": {"orchestrator": _orchestrator_use(store, wall_s), "tasks": tasks_use(commits[t.id] for t, _ in done)},
        "measures": _measures(done),
        "tasks": [_task_entry(task, record) for task, record in done],
        "versions": dict(sorted(versions.items())),
        "warnings": list(warnings),
    }
    return (json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _orchestrator_use(store: Meter | None, wall_s: float) -> dict[str, float] | None:
    if store is None:
        return None
    share = store.seconds / wall_s if wall_s > 0 else 0.0
    return {"seconds": round(store.seconds, 3), "calls": store.calls, "share": round(share, 5)}


def _film_entry(film: FilmFile) -> dict[str, Any]:
    return {
        "path": film.path,
        "sha256": film.sha256,
        "size_bytes": film.size_bytes,
        "frames": film.frames,
        "fps": str(film.fps),
        "duration_s": round(float(film.frames / film.fps), 6),
    }


def _counts(tasks: Iterable[Task], commits: Mapping[str, CommitRecord]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = defaultdict(lambda: {"planned": 0, "done": 0})
    for task in tasks:
        counts[task.kind]["planned"] += 1
        counts[task.kind]["done"] += task.id in commits
    return dict(counts)


def _seconds_by_kind(done: Iterable[tuple[Task, CommitRecord]]) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    for task, record in done:
        seconds[task.kind] += record.seconds
    return {kind: round(total, 3) for kind, total in seconds.items()}


def _measures(done: Iterable[tuple[Task, CommitRecord]]) -> dict[str, dict[str, dict[str, float]]]:
    """For each kind of task and each measure the least, the mean and the greatest value."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for task, record in done:
        for name, value in record.measures.items():
            if math.isfinite(value):
                values[task.kind][name].append(value)
    return {
        kind: {name: {"least": min(v), "mean": fmean(v), "most": max(v)} for name, v in sorted(named.items())}
        for kind, named in values.items()
    }


def _task_entry(task: Task, record: CommitRecord) -> dict[str, Any]:
    return {
        "id": task.id,
        "kind": task.kind,
        "label": task.label,
        "shot": task.shot_id,
        "attempt": record.attempt,
        "host": record.host,
        "seconds": round(record.seconds, 3),
        "measures": {name: value for name, value in record.measures.items() if math.isfinite(value)},
    }
