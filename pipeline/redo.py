"""Which parts of a plan show a stretch of the film, and so what making it again means.

Contract: pure. A stretch is film frames [begin, end). Made again with new noise are the segments that show it,
or, with `refine_only`, the windows that show it (both windows where an overlap that they share is shown). What
depends on them follows by itself: in a chain, everything after the first of these segments.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

from pipeline.errors import SettingError
from pipeline.facts import Overrides
from pipeline.params import expand_ranges, front_frames, latent_of
from pipeline.plan import Plan
from pipeline.spec_values import parse_duration
from pipeline.tasks import Task
from pipeline.times import timecode

_CLOCK = re.compile(r"(?:(\d{1,2}):)?(\d{1,3}):(\d{1,2}(?:\.\d{1,9})?)")
_REMEDY = "Write FROM-TO in the film's time, such as 3:20-3:40, 12s-14.5s or 300f-420f."


@dataclass(frozen=True)
class Redo:
    """What is asked for. `ranges`: film frames; `scopes`: labels of the tasks that get new noise."""

    ranges: tuple[tuple[int, int], ...]
    scopes: tuple[str, ...]
    refine_only: bool


def choose_redo(plan: Plan, texts: Sequence[str], *, refine_only: bool) -> Redo:
    """From what a person wrote to what is made again. Raises SettingError, naming the range."""
    ranges = tuple(parse_range(text, plan.fps, plan.film_frames) for text in texts)
    if refine_only and not plan.count("window"):
        remedy = "Leave --refine-only out."
        raise SettingError("there is no refinement in this plan", field="--refine-only", remedy=remedy)
    kind = "window" if refine_only else "segment"
    shown = {task_id for span in ranges for task_id in tasks_showing(plan, *span)}
    chosen = [task for task in plan.tasks.values() if task.id in shown and task.kind == kind]
    if locked := sorted({task.shot_id for task in chosen if task.locked}):
        remedy = f"`longtake unlock` it first: {', '.join(locked)}."
        raise SettingError("shows a locked shot", field="--redo", value=", ".join(texts), remedy=remedy)
    return Redo(ranges, tuple(dict.fromkeys(task.label for task in chosen)), refine_only)


def parse_range(text: str, fps: Fraction, frames: int) -> tuple[int, int]:
    """Film frames [begin, end) of `FROM-TO`; times as `3:20`, `1:02:03.5`, `12s` or `300f`."""
    begin_text, dash, end_text = text.partition("-")
    if not dash:
        raise SettingError("is not a stretch of time", field="--redo", value=text, remedy=_REMEDY)
    begin, end = (_frame(part.strip(), text, fps) for part in (begin_text, end_text))
    if not begin < end:
        raise SettingError("ends before it begins", field="--redo", value=text, remedy=_REMEDY)
    if begin >= frames:
        remedy = f"The film lasts {timecode(float(frames / fps))}."
        raise SettingError("begins after the film's end", field="--redo", value=text, remedy=remedy)
    return begin, min(end, frames)


def _frame(part: str, text: str, fps: Fraction) -> int:
    match = _CLOCK.fullmatch(part)
    if match:
        hours, minutes, seconds = (Fraction(group or 0) for group in match.groups())
        return int((hours * 3600 + minutes * 60 + seconds) * fps)
    try:
        return parse_duration(part).frames_at(fps)
    except ValueError as error:
        raise SettingError("is not a stretch of time", field="--redo", value=text, remedy=_REMEDY) from error


def tasks_showing(plan: Plan, begin: int, end: int) -> set[str]:
    """Segments and windows whose frames are shown in film frames [begin, end)."""
    film, found = plan.tasks[plan.film_task_id], set[str]()
    starts = [0, *accumulate(film.params["unit_frames"])]
    for start, frames, unit_id in zip(starts, film.params["unit_frames"], film.inputs, strict=False):
        first, stop = max(begin - start, 0), min(end - start, frames)
        if first < stop:
            found |= _shown_by_unit(plan.tasks[unit_id], plan.tasks, first, stop)
    return found


def _shown_by_unit(unit: Task, tasks: Mapping[str, Task], first: int, stop: int) -> set[str]:
    found = set[str]()
    for layer in unit.params["layers"]:
        decoded = list(expand_ranges(layer["ranges"]))[first:stop]
        shown = tasks[unit.inputs[layer["input"]]]
        found.add(shown.id)
        if shown.kind != "window":
            continue
        found |= _segments_under(shown, decoded)
        latents = {latent_of(shown.params, frame) for frame in decoded}
        for merge in layer["merges"]:
            if latents & set(range(merge["here"], merge["here"] + merge["count"])):
                found.add(unit.inputs[merge["input"]])
    return found


def _segments_under(window: Task, decoded: Iterable[int]) -> set[str]:
    """The inputs of a window whose stage-one frames its decoded frames show."""
    params = window.params
    owners = [
        window.inputs[piece["input"]] for piece in params["stage_one"] for _ in range(piece["stop"] - piece["start"])
    ]
    front = front_frames(params)
    stage_one = {min(max(frame - front, 0) // params["frames_ratio"], len(owners) - 1) for frame in decoded}
    return {owners[frame] for frame in stage_one}


def with_redo(overrides: Overrides, scopes: Iterable[str]) -> Overrides:
    """The overrides after the redo: the next generation of each scope."""
    redo = {**overrides.redo, **{scope: overrides.redo.get(scope, 0) + 1 for scope in scopes}}
    return Overrides(redo, overrides.picked, overrides.locks)


def changed_ranges(before: Plan, after: Plan) -> list[tuple[int, int]]:
    """Film frames whose unit is another one. Both plans are of the same film."""
    old, new = before.tasks[before.film_task_id], after.tasks[after.film_task_id]
    ranges: list[tuple[int, int]] = []
    start = 0
    for old_id, new_id, frames in zip(old.inputs, new.inputs, new.params["unit_frames"], strict=True):
        if old_id != new_id:
            begin = ranges.pop()[0] if ranges and ranges[-1][1] == start else start
            ranges.append((begin, start + frames))
        start += frames
    return ranges


def describe_redo(redo: Redo, before: Plan, after: Plan) -> list[str]:
    """What the redo means, in lines for a person."""

    def clock(frame: int) -> str:
        return timecode(float(frame / after.fps))

    asked = ", ".join(f"{clock(begin)}-{clock(end)}" for begin, end in redo.ranges)
    changed = ", ".join(f"{clock(begin)}-{clock(end)}" for begin, end in changed_ranges(before, after))
    again = [task for task in after.tasks.values() if task.id not in before.tasks]
    lines = [f"redo {asked}: new noise for {', '.join(redo.scopes)}"]
    follow = [task.label for task in again if task.kind == "segment" and task.label not in redo.scopes]
    if follow:
        lines.append(f"the chain goes on from there, so these are made again, too: {', '.join(follow)}")
    lines.append(f"the film changes at {changed}")
    lines.append(f"made again: {len(again)} tasks, {sum(task.work for task in again):.1f} s of work")
    return lines + [f"  {task.id}  {task.label}  {task.work:.1f} s" for task in again]
