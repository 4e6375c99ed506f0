"""The tasks that make pictures: texts, sources, segments and refinement windows of each take.

Contract: pure. `TaskList` collects tasks by id (equal content, one task). `add_chain` adds a take's texts,
sources and segments, `add_windows` its refinement; both return where the take's frames come from.

A shot that starts from a frame of an earlier shot gets two sources: the stage-one frame, decoded from that
shot's segment, for the chain; and its refined twin, decoded from that shot's window before any merge with its
neighbours, for the first window. So the chain never waits for refinement.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import PurePosixPath

from pipeline.arithmetic import Grid, WindowShape
from pipeline.errors import SettingError
from pipeline.facts import Attention, Facts, LoraChoice, MediaFacts, QualityFacts, ShotLock
from pipeline.locks import LOCKABLE, order_digest
from pipeline.params import (
    FILM_READER,
    LatentsParams,
    LoraParams,
    MediaParams,
    PieceParams,
    ScheduleParams,
    SegmentParams,
    SourceParams,
    TextParams,
    WeightsParams,
    WindowParams,
)
from pipeline.plan_checks import Sizes
from pipeline.spec import Shot, Storyboard
from pipeline.spec_values import FrameSize
from pipeline.takes import Rates, SegmentPlace, Take, frame_taken, joined
from pipeline.tasks import Role, Task, TaskKind

SOURCE_BIAS_S = 0.001
"""Added to the times at which a video is read, so that a time stamp a hair late still counts."""


@dataclass
class TaskList:
    """Tasks by id, upstream before downstream. What a lock of `locks` (by shot) holds stands for its order."""

    tasks: dict[str, Task] = field(default_factory=dict)
    locks: Mapping[str, ShotLock] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    """What was ordered, by task id; kept only where there are locks."""

    def add(
        self,
        kind: TaskKind,
        role: Role,
        params: Mapping[str, object],
        inputs: Sequence[str] = (),
        *,
        label: str,
        shot_id: str = "",
        index: int = 0,
        priority: int = 0,
    ) -> str:
        """The id of the task; it is added unless its like is there already.

        Raises SettingError for a part of a locked shot that was ordered otherwise since.
        """
        task_id = Task.identify(kind, params, tuple(inputs))
        locked_id = self._locked(task_id, kind, params, inputs, label) if self.locks else None
        task_id = locked_id or task_id
        if task_id not in self.tasks:
            self.tasks[task_id] = Task(
                task_id, kind, role, params, tuple(inputs), label, shot_id, index, priority, locked=bool(locked_id)
            )
        return task_id

    def _locked(
        self, task_id: str, kind: TaskKind, params: Mapping[str, object], inputs: Sequence[str], label: str
    ) -> str | None:
        """The id of the task that a lock holds for this order, None if none does."""
        digest = order_digest(kind, params, [self.digests[name] for name in inputs])
        self.digests[task_id] = digest
        for shot_id, lock in self.locks.items():
            if kind in LOCKABLE and digest in lock.tasks:
                self.digests[lock.tasks[digest]] = digest
                return lock.tasks[digest]
            if lock.labels.get(label, digest) != digest:
                remedy = f"Undo the change, or `longtake unlock` {shot_id}."
                raise SettingError(f"{label} is locked and was ordered otherwise", field=shot_id, remedy=remedy)
        return None


@dataclass
class Inputs:
    """The inputs of a task that is being put together, each once."""

    ids: list[str] = field(default_factory=list)

    def at(self, task_id: str) -> int:
        """The input's position."""
        if task_id not in self.ids:
            self.ids.append(task_id)
        return self.ids.index(task_id)


@dataclass(frozen=True)
class Stretch:
    """Stage-one frames [begin, end) of a take: frames begin - offset ... of what `task_id` decodes to, or, with
    `is_source`, of a source's frames.
    """

    begin: int
    end: int
    task_id: str
    offset: int
    is_source: bool = False


@dataclass(frozen=True)
class Window:
    """A window that is planned, from refined frame `begin` of its take."""

    task_id: str
    begin: int
    shape: WindowShape


@dataclass(frozen=True)
class TakeTasks:
    """Where a take's frames come from."""

    take: Take
    line: tuple[Stretch, ...]
    segments: tuple[str, ...]
    windows: tuple[Window, ...] = ()


@dataclass(frozen=True)
class Studio:
    """What all tasks of a film share."""

    spec: Storyboard
    facts: Facts
    grid: Grid
    rates: Rates
    sizes: Sizes
    tasks: TaskList

    @property
    def quality(self) -> QualityFacts:
        qualities = self.facts.checkpoint.render.quality
        return qualities.full if self.spec.quality == "full" else qualities.draft

    @property
    def checkpoint(self) -> str:
        return self.facts.checkpoint.digest

    def redo(self, label: str) -> int:
        return self.facts.redo.get(label, 0)

    def name(self, shot_id: str) -> str:
        """What a shot's noise and tasks are named after: the shot and, from the second on, its take."""
        number = self.facts.picked.get(shot_id, 1)
        return shot_id if number == 1 else f"{shot_id}#{number}"


def media_params(media: MediaFacts) -> MediaParams:
    """A user's file by content."""
    return {"sha256": media.sha256, "suffix": PurePosixPath(media.path).suffix.lower()}


def weights_of(
    spec: Storyboard, facts: Facts, loras: Sequence[LoraChoice], attention: Attention
) -> WeightsParams:
    """A role's weights: the checkpoint's own LoRAs for it, then the storyboard's."""
    merged: list[LoraParams] = [
        {"file": lora.file, "media": None, "strength": lora.strength} for lora in loras
    ]
    for lora in spec.loras:
        media: MediaParams = {"sha256": facts.loras[lora.file], "suffix": ".safetensors"}
        merged.append({"file": None, "media": media, "strength": lora.strength})
    return {"checkpoint": facts.checkpoint.digest, "loras": merged, "attention": attention}


def chain_weights(studio: Studio) -> WeightsParams:
    """The weights of every segment."""
    attention = studio.facts.checkpoint.render.chain_attention
    return weights_of(studio.spec, studio.facts, studio.quality.loras, attention)


def refine_weights(studio: Studio) -> WeightsParams:
    """The weights of every window."""
    refine = studio.facts.checkpoint.render.refine
    return weights_of(studio.spec, studio.facts, refine.loras, refine.attention)


def add_text(studio: Studio, prompt: str) -> str:
    """The task that encodes a prompt, white space collapsed."""
    params: TextParams = {"checkpoint": studio.checkpoint, "prompt": joined(prompt)}
    return studio.tasks.add("text", "text", params, label=f"text {_in_brief(joined(prompt))!r}", priority=-2)


def _in_brief(prompt: str) -> str:
    """At most 49 characters: the beginning and the end, which is where the prompts of a take differ."""
    if len(prompt) <= 49:
        return prompt
    begin, end = prompt[:22].rpartition(" ")[0] or prompt[:22], prompt[-22:].partition(" ")[2] or prompt[-22:]
    return f"{begin} ... {end}"


def add_chain(studio: Studio, take: Take, earlier: Mapping[str, TakeTasks]) -> TakeTasks:
    """A take's texts, its stage-one source and its segments. `earlier` maps shot ids to their takes'
    tasks.
    """
    first = studio.spec.shots[take.shots[0].position]
    source = _add_source(studio, first, take, earlier, refined=False)
    line: list[Stretch] = []
    if take.lead_in and source:
        line.append(Stretch(0, take.lead_in, source, 0, is_source=True))
    ids: list[str] = []
    for order, place in enumerate(take.segments):
        task_id = _add_segment(studio, take, place, line, source, len(take.segments) - order)
        line.append(Stretch(place.new, place.end, task_id, place.start))
        ids.append(task_id)
    return TakeTasks(take, tuple(line), tuple(ids))


def _add_segment(
    studio: Studio, take: Take, place: SegmentPlace, line: Sequence[Stretch], source: str | None, left: int
) -> str:
    shot = studio.spec.shots[place.shot]
    shot_id = next(item.id for item in take.shots if item.position == place.shot)
    name = studio.name(shot_id)
    label = f"{name}/segment/{place.index}"
    inputs = Inputs()
    text = inputs.at(add_text(studio, joined(shot.prompt[place.prompt].prompt, studio.spec.look)))
    negative = None
    if studio.quality.guidance > 1:
        default = studio.facts.checkpoint.render.negative_prompt
        wanted = default if shot.negative_prompt is None else shot.negative_prompt
        negative = inputs.at(add_text(studio, wanted))
    if place.conditions == 1 and source:
        conditions = [_piece(inputs, source, 0, 1)]
    else:
        conditions = pieces_of(inputs, line, place.start, place.start + place.conditions)
    latents = latents_of_line(inputs, line, place.start + 1, place.start + place.conditions, studio.grid.temporal)
    grid, size = studio.grid, studio.sizes.stage_one
    params: SegmentParams = {
        "weights": chain_weights(studio),
        "schedule": _chain_schedule(studio, is_continuation=place.conditions == grid.condition_frames),
        "guidance": studio.quality.guidance,
        "text": text,
        "negative_text": negative,
        "height_px": size.height_px,
        "width_px": size.width_px,
        "segment_frames": grid.segment_frames,
        "condition_frames": place.conditions,
        "conditions": conditions,
        "condition_latents": latents,
        "tail_frames": grid.condition_frames,
        "noise": {
            "seed": studio.spec.seed if shot.seed is None else shot.seed,
            "noise_id": name,
            "stage": "one",
            "first_latent": place.index * grid.new_latents,
            "count": grid.segment_latents,
            "redo": studio.redo(label),
        },
    }
    return studio.tasks.add(
        "segment",
        "chain",
        params,
        inputs.ids,
        label=label,
        shot_id=shot_id,
        index=place.index,
        priority=-left,
    )


def _chain_schedule(studio: Studio, *, is_continuation: bool) -> ScheduleParams:
    quality = studio.quality
    name = (quality.continuation_schedule if is_continuation else None) or quality.schedule
    shift = studio.facts.checkpoint.render.shift
    return {"name": name, "steps": quality.steps, "shift": shift, "t_thresh": 1.0}


def _piece(inputs: Inputs, task_id: str, start: int, stop: int) -> PieceParams:
    return {"input": inputs.at(task_id), "start": start, "stop": stop}


def pieces_of(inputs: Inputs, line: Sequence[Stretch], begin: int, end: int) -> list[PieceParams]:
    """Stage-one frames [begin, end) of a take's line as pieces of its inputs."""
    return [
        _piece(
            inputs,
            part.task_id,
            max(begin, part.begin) - part.offset,
            min(end, part.end) - part.offset,
        )
        for part in _overlapping(line, begin, end)
    ]


def _overlapping(line: Sequence[Stretch], begin: int, end: int) -> Iterator[Stretch]:
    """The stretches of a take's line that hold any of frames [begin, end). Looked up, not searched for: a day of film
    has so many segments that each of them cannot look at all others.
    """
    for place in range(bisect_right(line, begin, key=lambda part: part.end), len(line)):
        if line[place].begin >= end:
            return
        yield line[place]


def latents_of_line(
    inputs: Inputs, line: Sequence[Stretch], begin: int, end: int, temporal: int
) -> list[LatentsParams]:
    """The latents of segments that hold stage-one frames [begin, end) of a take's line.

    Empty where not all of them are whole latents: a source has none, and a shot may end within one.
    """
    found: list[LatentsParams] = []
    for part in _overlapping(line, begin, end):
        # Latent k of a segment holds its frames temporal * (k - 1) + 1 .. temporal * k.
        before, last = max(begin, part.begin) - part.offset - 1, min(end, part.end) - part.offset - 1
        if part.is_source or before % temporal or last % temporal:
            return []
        found.append(
            {"input": inputs.at(part.task_id), "start": before // temporal + 1, "stop": last // temporal + 1}
        )
    return found


def _add_source(
    studio: Studio, shot: Shot, take: Take, earlier: Mapping[str, TakeTasks], *, refined: bool
) -> str | None:
    """The source of a take's first shot at stage-one or refined size; None for a shot from text."""
    size = studio.sizes.native if refined else studio.sizes.stage_one
    if shot.frame_of:
        return _add_shot_frame(studio, shot, size, earlier, refined=refined)
    path = shot.image or shot.video
    if path is None:
        return None
    media = studio.facts.media[path]
    params: SourceParams = {
        "kind": "image" if shot.image else "video",
        "media": media_params(media),
        "times_s": [] if shot.image else _tail_times(studio, media, refined=refined),
        "frame": None,
        "checkpoint": None,
        "height_px": size.height_px,
        "width_px": size.width_px,
    }
    if shot.video:
        params["reader"] = FILM_READER
    name = "refined source" if refined else "source"
    return studio.tasks.add(
        "source", "media", params, label=f"{take.id}/{name}", shot_id=take.id, priority=-1
    )


def _tail_times(studio: Studio, media: MediaFacts, *, refined: bool) -> list[float]:
    """When to look at a video for its last frames, so that the take's own first new frame comes right after
    its end.
    """
    grid, rates = studio.grid, studio.rates
    rate = rates.native if refined else rates.stage_one
    count = grid.refined_condition if refined else grid.condition_frames
    begin = Fraction(media.duration_s).limit_denominator(10**6) - grid.condition_frames / rates.stage_one
    return [round(max(0.0, float(begin + k / rate)) + SOURCE_BIAS_S, 6) for k in range(count)]


def _add_shot_frame(
    studio: Studio, shot: Shot, size: FrameSize, earlier: Mapping[str, TakeTasks], *, refined: bool
) -> str:
    assert shot.frame_of is not None
    origin = earlier[shot.frame_of.shot]
    target = next(place for place in origin.take.shots if place.id == shot.frame_of.shot)
    at = shot.frame_of.at.seconds_at(studio.rates.output) if shot.frame_of.at else None
    frame = frame_taken(target, at, origin.take, studio.rates)
    if refined:
        native = frame * studio.grid.ratio
        window = origin.windows[window_showing(origin, native, studio)]
        task_id = window.task_id
        decoded = native - window.begin + studio.grid.temporal * window.shape.front_latents
    else:
        part = next(_overlapping(origin.line, frame, frame + 1))
        task_id, decoded = part.task_id, frame - part.offset
    params: SourceParams = {
        "kind": "shot",
        "media": None,
        "times_s": [],
        "frame": decoded,
        "checkpoint": studio.checkpoint,
        "height_px": size.height_px,
        "width_px": size.width_px,
    }
    name = "refined frame" if refined else "frame"
    label = f"{name} of {shot.frame_of.shot}"
    return studio.tasks.add("source", "media", params, [task_id], label=label, priority=-1)


def handover(studio: Studio) -> int:
    """From which of its frames on a window is shown instead of the one before it: from the last latent of the merged
    overlap, or, chained, right after the frames it was conditioned on."""
    is_chained = studio.spec.refinement == "chained"
    return studio.grid.refined_condition if is_chained else studio.grid.merged_handover


def window_showing(tasks: TakeTasks, native: int, studio: Studio) -> int:
    """Which window's unit shows a refined frame of the take."""
    index = (native - handover(studio)) // studio.grid.window_hop
    return min(max(index, 0), len(tasks.windows) - 1)


def add_windows(studio: Studio, tasks: TakeTasks, earlier: Mapping[str, TakeTasks], first: int) -> TakeTasks:
    """The refinement windows of a take; `first` is the place of its first window in the film."""
    take, grid = tasks.take, studio.grid
    shot = studio.spec.shots[take.shots[0].position]
    condition = _add_source(studio, shot, take, earlier, refined=True)
    given = 0
    if condition:
        given = grid.refined_condition if shot.video else 1
    windows: list[Window] = []
    for index in range(grid.window_count(take.native_end)):
        window = _add_window(studio, tasks, index, condition, given, first + index)
        windows.append(window)
        is_chained = studio.spec.refinement == "chained"
        condition = window.task_id if is_chained else None
        given = grid.refined_condition if is_chained else 0
    return TakeTasks(take, tasks.line, tasks.segments, tuple(windows))


def _add_window(
    studio: Studio, tasks: TakeTasks, index: int, condition: str | None, given: int, priority: int
) -> Window:
    take, grid, size = tasks.take, studio.grid, studio.sizes.native
    render = studio.facts.checkpoint.render
    shape = grid.window_shape(given)
    label = f"{studio.name(take.id)}/window/{index}"
    inputs = Inputs()
    text = inputs.at(add_text(studio, ""))
    begin = index * grid.new_frames
    end = min(begin + grid.segment_frames, take.available)
    front_frames = grid.temporal * shape.front_latents
    tail = [front_frames + grid.window_hop, front_frames + grid.window_hop + grid.refined_condition]
    params: WindowParams = {
        "weights": refine_weights(studio),
        "schedule": {
            "name": "refinement",
            "steps": render.refine.steps,
            "shift": render.shift,
            "t_thresh": render.refine.t_thresh,
        },
        "text": text,
        "height_px": size.height_px,
        "width_px": size.width_px,
        "stage_one": pieces_of(inputs, tasks.line, begin, end),
        "frames": shape.frames,
        "frames_ratio": grid.ratio,
        "latents": shape.latents,
        "front_latents": shape.front_latents,
        "spatial_only": grid.ratio == 1,
        "condition": None
        if condition is None
        else {"input": inputs.at(condition), "name": "tail" if index else "frames", "frames": given},
        "noise": {
            "seed": _take_seed(studio, take),
            "noise_id": take.id,
            "stage": "two",
            "first_latent": index * grid.window_hop_latents - shape.front_latents,
            "count": shape.latents,
            "redo": studio.redo(label),
        },
        "tail": tail if studio.spec.refinement == "chained" else None,
    }
    task_id = studio.tasks.add(
        "window", "refine", params, inputs.ids, label=label, shot_id=take.id, index=index, priority=priority
    )
    return Window(task_id, index * grid.window_hop, shape)


def _take_seed(studio: Studio, take: Take) -> int:
    seed = studio.spec.shots[take.shots[0].position].seed
    return studio.spec.seed if seed is None else seed
