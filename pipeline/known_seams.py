"""Where a planned film has its seams: the frames at which segments, windows or shots meet.

Contract: pure. A crossfade is not a seam: it is meant to be seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from pipeline.params import expand_ranges, front_frames
from pipeline.seams import Seam, SeamKind
from pipeline.tasks import Task


def seams_of(tasks: Mapping[str, Task], film_task_id: str) -> list[Seam]:
    """The seams of a plan's film, in order; where a shot's cut and another seam meet, the cut stands.

    Between two units: a `window` (in the overlap that both refined), a `segment` of an unrefined
    film, or a `cut` to another shot. Inside a unit of windows: each `segment` that begins there.
    """
    film = tasks[film_task_id]
    units = [tasks[task_id] for task_id in film.inputs]
    starts = [0, *accumulate(film.params["unit_frames"])]
    seams: dict[int, SeamKind] = {}
    for start, unit in zip(starts, units, strict=False):
        for offset in _segment_starts(unit, tasks):
            seams[start + offset] = "segment"
    for start, (before, after) in zip(starts[1:], pairwise(units), strict=False):
        if not (before.params["blend"] or after.params["blend"]):
            seams[start] = _kind_between(before, after, tasks)
    return [Seam(frame, kind) for frame, kind in sorted(seams.items())]


def _shown(unit: Task, tasks: Mapping[str, Task]) -> Task:
    """The segment or window that a unit of one layer shows."""
    return tasks[unit.inputs[unit.params["layers"][0]["input"]]]


def _kind_between(before: Task, after: Task, tasks: Mapping[str, Task]) -> SeamKind:
    first, second = _shown(before, tasks), _shown(after, tasks)
    if second.kind == "window":
        follows = before.shot_id == after.shot_id and second.index == first.index + 1
        return "window" if follows else "cut"
    return "segment" if first.id in second.inputs else "cut"


def _segment_starts(unit: Task, tasks: Mapping[str, Task]) -> list[int]:
    """Frames of a unit of one window at which the stage-one frames behind it change to another segment."""
    shown = _shown(unit, tasks)
    if unit.params["blend"] or shown.kind != "window":
        return []
    params = shown.params
    front = front_frames(params)
    decoded = list(expand_ranges(unit.params["layers"][0]["ranges"]))
    bounds = [front + params["frames_ratio"] * n for n in _piece_bounds(params["stage_one"])]
    return [k for bound in bounds for k in range(1, len(decoded)) if decoded[k - 1] < bound <= decoded[k]]


def _piece_bounds(pieces: Sequence[Mapping[str, Any]]) -> list[int]:
    """Where each piece but the first begins, in stage-one frames of the window."""
    return list(accumulate(piece["stop"] - piece["start"] for piece in pieces))[:-1]
