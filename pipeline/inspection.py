"""Inspect a film: measure it frame by frame and say what was found.

Contract: any film, also one that longtake did not make. What is kept are some forty numbers for each frame
and the pictures of the contact sheet, never the film. Written by pipeline/inspection_files.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.drift import Drift, measure_drift
from pipeline.errors import InputFileError
from pipeline.faults import Fault, find_faults, flicker
from pipeline.measure import CHANGES, FilmMeter, Floats
from pipeline.media import Ffmpeg, MediaInfo, probe, read_video_at
from pipeline.report import Tile, shrink
from pipeline.seams import Join, Seam, SeamScore, StandOut, find_joins, score_seams, stand_out

INSPECTION_VERSION = 1
"""Of the layout of inspection.json and frames.parquet."""

TILES = 20


@dataclass(frozen=True)
class Shot:
    """Frames [start, stop) of the film that belong to one shot."""

    id: str
    start: int
    stop: int
    fade: int = 0
    """How many at its start it shares with the shot before. Its drift is measured after them."""


@dataclass(frozen=True)
class TaskTiming:
    """One committed task: when it ended (Unix time) and how long its work took."""

    kind: str
    label: str
    host: str
    seconds: float
    finished_at_s: float


@dataclass(frozen=True)
class Known:
    """What a render says about its film; nothing of it is known of a foreign file."""

    title: str = ""
    seams: Sequence[Seam] = ()
    shots: Sequence[Shot] = ()
    timings: Sequence[TaskTiming] = ()


@dataclass(frozen=True)
class Inspection:
    """Everything that was found. `table` has one value a frame for each measure."""

    film: str
    info: MediaInfo
    known: Known
    table: Mapping[str, Floats]
    found: StandOut
    drift: Mapping[str, Drift]
    shot_drift: Mapping[str, Mapping[str, Drift]]
    seams: Sequence[SeamScore]
    joins: Sequence[Join]
    faults: Sequence[Fault]
    flicker: float
    tiles: Sequence[Tile] = field(repr=False, default=())

    def to_json(self) -> dict[str, Any]:
        """What inspection.json holds."""
        info = self.info
        return {
            "inspection": INSPECTION_VERSION,
            "film": self.film,
            "title": self.known.title,
            "frames": info.frame_count,
            "fps": str(info.fps),
            "duration_s": round(float(info.duration_s), 6),
            "size_px": [info.height_px, info.width_px],
            "codec": info.codec,
            "drift": {name: asdict(drift) for name, drift in self.drift.items()},
            "shots": [
                {**asdict(shot), "drift": {k: asdict(v) for k, v in self.shot_drift[shot.id].items()}}
                for shot in self.known.shots
            ],
            "seams": [asdict(seam) for seam in self.seams],
            "joins": [asdict(join) for join in self.joins],
            "flicker": self.flicker,
            "faults": [asdict(fault) for fault in self.faults],
            "change_mean": {name: float(self.table[name][1:].mean()) for name in CHANGES}
            if info.frame_count > 1
            else {},
            "timings": [asdict(timing) for timing in self.known.timings],
        }


def inspect_film(film: Path, ffmpeg: Ffmpeg, known: Known | None = None) -> Inspection:
    """Measure a film. Raises InputFileError, ValueError for seams outside of it."""
    known = known or Known()
    info = probe(film, ffmpeg)
    if info.kind != "video":
        raise InputFileError(f"is no film but {info.kind}", field=str(film), remedy="Name a film.")
    meter, tiles = _measure(film, info, ffmpeg, known.shots)
    table = meter.table()
    found = stand_out(table)
    return Inspection(
        film=film.name,
        info=info,
        known=known,
        table=table,
        found=found,
        drift=measure_drift(table),
        shot_drift={shot.id: measure_drift(table, slice(shot.start + shot.fade, shot.stop)) for shot in known.shots},
        seams=score_seams(table, known.seams, found),
        joins=find_joins(table, meter.headings, found),
        faults=find_faults(table),
        flicker=flicker(table),
        tiles=tiles,
    )


def _measure(film: Path, info: MediaInfo, ffmpeg: Ffmpeg, shots: Sequence[Shot]) -> tuple[FilmMeter, list[Tile]]:
    """Every frame through the meter, and the middle frames of TILES equal parts."""
    count = min(TILES, info.frame_count)
    wanted = {(2 * k + 1) * info.frame_count // (2 * count) for k in range(count)}
    meter, tiles, index = FilmMeter(), [], 0
    for batch in read_video_at(film, info.times_s, ffmpeg, info=info):
        for frame in batch:
            time_s = float(info.times_s[index])
            meter.add(frame, time_s)
            if index in wanted:
                tiles.append(Tile(shrink(frame), _shot_at(shots, index), time_s))
            index += 1
    return meter, tiles


def _shot_at(shots: Sequence[Shot], frame: int) -> str:
    return next((shot.id for shot in shots if shot.start <= frame < shot.stop), "")
