"""From a storyboard and facts to every task of the render, with what a person wants to know before it runs.

Contract: pure: no clock, no file, no network; the same spec, facts and options give the same plan.
`plan_film` raises StoryboardError with every problem it finds. Task ids come from content: `Plan.tasks` holds
upstream before downstream. The TypedDicts of task parameters and the functions that read them
(pipeline.params) are part of this door.

Where what is computed: `arithmetic` the numbers of windows and segments, `takes` the time lines of shots that
continue each other, `plan_checks` spec against facts, `plan_tasks` the tasks that make pictures, `plan_units`
what the film shows of them, `estimate` time and space.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, Literal

from pipeline.arithmetic import grid_of
from pipeline.errors import SettingError
from pipeline.estimate import Estimate, estimate, with_work
from pipeline.facts import Facts
from pipeline.params import (
    BlendParams,
    CodecParams,
    EncodeParams,
    FilmParams,
    LatentsParams,
    LayerParams,
    LoraParams,
    MediaParams,
    MergeParams,
    NoiseParams,
    PieceParams,
    RefineConditionParams,
    ScheduleParams,
    SegmentParams,
    SourceParams,
    TextParams,
    WeightsParams,
    WindowParams,
    blend_weights,
    expand_ranges,
    media_file,
    merge_weights,
    noise_seed,
    noise_seeds,
    window_times,
)
from pipeline.plan_checks import (
    Sizes,
    choose_sizes,
    fades_of,
    find_warnings,
    frame_of_problems,
    media_problems,
)
from pipeline.plan_tasks import (
    Studio,
    TakeTasks,
    TaskList,
    add_chain,
    add_windows,
    chain_weights,
    media_params,
    refine_weights,
)
from pipeline.plan_units import Cut, Joined, add_film, make_cut
from pipeline.spec import Storyboard, name_of, storyboard_error
from pipeline.takes import ShotPlace, Take, lay_out, places_by_id, rates_of, seconds_in_shot
from pipeline.tasks import Task
from pipeline.times import format_bytes, hms, timecode

__all__ = [
    "BlendParams",
    "CodecParams",
    "EncodeParams",
    "Estimate",
    "FilmParams",
    "LatentsParams",
    "LayerParams",
    "LoraParams",
    "MediaParams",
    "MergeParams",
    "NoiseParams",
    "PieceParams",
    "Plan",
    "PromptEffect",
    "RefineConditionParams",
    "ScheduleParams",
    "SegmentParams",
    "ShotSummary",
    "SourceParams",
    "TextParams",
    "Until",
    "WeightsParams",
    "WindowParams",
    "blend_weights",
    "expand_ranges",
    "media_file",
    "merge_weights",
    "noise_seed",
    "noise_seeds",
    "plan_film",
    "window_times",
]

Until = Literal["film", "stage-one"]


@dataclass(frozen=True)
class PromptEffect:
    """When a prompt really takes effect, against when it was wished for."""

    shot_id: str
    prompt: str
    written_s: float
    """In the shot."""
    effect_s: float
    """In the shot; a segment takes the prompt in force where its new frames begin."""
    film_s: float | None
    """In this plan's film; None where the shot is not shown."""


@dataclass(frozen=True)
class ShotSummary:
    """One shot as planned."""

    id: str
    start: str
    """text, image, video, frame_of or continue."""
    goes_on_from: str
    """Of a shot that continues another: `latents`, or `frames` where those before it end within a latent; else ""."""
    frames: int
    """In this plan's film, crossfades included."""
    first_frame: int | None
    """In this plan's film; None where the shot is not shown."""
    fade_frames: int
    """Frames of the film as ordered that it shares with the shot before."""
    segments: int


@dataclass(frozen=True)
class ShownTake:
    """Where a preview of several takes shows one of them; takes are counted from 1."""

    shot_id: str
    take: int
    first_frame: int


@dataclass(frozen=True)
class Plan:
    """Everything `render` will do. `tasks` holds upstream before downstream; the last is the film."""

    tasks: Mapping[str, Task]
    film_task_id: str
    film_frames: int
    fps: Fraction
    until: Until
    is_preview: bool
    """Not the film as ordered: stage one only, or some of its shots."""
    output_path: str
    """Where the user wants the file."""
    takes: tuple[Take, ...]
    shots: tuple[ShotSummary, ...]
    shown_takes: tuple[ShownTake, ...]
    """Of a preview of several takes; empty otherwise."""
    prompts: tuple[PromptEffect, ...]
    warnings: tuple[str, ...]
    sizes: Sizes
    film_size: str
    """Of this plan's film, such as `1280x704`."""
    media: Mapping[str, str]
    """Files to put into the render's folder before the first task: `media/...` to the storyboard's path."""
    weights: Mapping[str, WeightsParams]
    """What the roles `chain` and `refine` load (for checks before the start; tasks carry it too)."""
    estimate: Estimate

    @property
    def film_s(self) -> float:
        """Length of this plan's film."""
        return float(self.film_frames / self.fps)

    def count(self, kind: str) -> int:
        """Tasks of a kind."""
        return sum(task.kind == kind for task in self.tasks.values())

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON: every task with its parameters, inputs and seconds."""
        return {
            "film": {
                "frames": self.film_frames,
                "fps": str(self.fps),
                "seconds": self.film_s,
                "size": self.film_size,
                "output": self.output_path,
                "preview": self.is_preview,
                "until": self.until,
                "task": self.film_task_id,
            },
            "shots": [asdict(shot) for shot in self.shots],
            "takes": [asdict(take) for take in self.shown_takes],
            "prompts": [asdict(prompt) for prompt in self.prompts],
            "warnings": list(self.warnings),
            "media": dict(self.media),
            "weights": dict(self.weights),
            "estimate": asdict(self.estimate),
            "tasks": [asdict(task) for task in self.tasks.values()],
        }

    def describe(self) -> str:
        """The plan in lines for a person: the film, its shots and prompts, the tasks, the expected time."""
        return "\n".join([*_film_lines(self), *_task_lines(self), *_estimate_lines(self)])


def plan_film(
    spec: Storyboard,
    facts: Facts,
    *,
    until: Until = "film",
    shots: Sequence[str] | None = None,
    recipe: str | None = None,
    takes: int = 1,
) -> Plan:
    """Every task of the film, of its stage-one preview, or of some `shots` of it (by id) and all they need.

    With several `takes` the preview shows the chosen shots again and again, each time under other noise.

    `recipe` is the text for the film's metadata (`pipeline.spec.recipe_text`), None to leave it out.
    Raises StoryboardError for what is wrong with the storyboard, SettingError for an unknown shot.
    """
    grid = grid_of(facts.checkpoint.render)
    rates = rates_of(spec, facts)
    sizes, problems = choose_sizes(spec, facts.checkpoint.render)
    lines, take_problems = lay_out(spec, facts, grid)
    fades, fade_problems = fades_of(spec, rates)
    problems += [*take_problems, *fade_problems, *media_problems(spec, facts)]
    problems += [] if take_problems else frame_of_problems(spec, places_by_id(lines), rates)
    if problems:
        raise storyboard_error(problems)
    studio = Studio(spec, facts, grid, rates, sizes, TaskList(locks=facts.locks))
    cut = make_cut(studio, until_stage_one=until == "stage-one")
    chosen = _chosen(lines, shots)
    if takes > 1 and shots is None:
        raise SettingError("goes with --shots: it shows takes of some shots", field="--takes", value=takes)
    shown: list[tuple[TakeTasks, ShotPlace]] = []
    for number in range(1, takes + 1):
        everything = _add_takes(studio if takes == 1 else _under_take(studio, lines, chosen, number), lines, cut)
        shown += [(made, place) for made in everything for place in made.take.shots if place.position in chosen]
    joined = add_film(studio, cut, shown, fades, recipe)
    return _finish(studio, cut, lines, joined, fades, until, takes)


def _under_take(studio: Studio, lines: Sequence[Take], chosen: set[int], number: int) -> Studio:
    """The studio in which the chosen shots are shown in their take `number`."""
    numbers = {place.id: number for line in lines for place in line.shots if place.position in chosen}
    return replace(studio, facts=replace(studio.facts, picked={**studio.facts.picked, **numbers}))


def _add_takes(studio: Studio, takes: Sequence[Take], cut: Cut) -> list[TakeTasks]:
    earlier: dict[str, TakeTasks] = {}
    everything: list[TakeTasks] = []
    windows = 0
    for take in takes:
        tasks = add_chain(studio, take, earlier)
        if cut.refined:
            tasks = add_windows(studio, tasks, earlier, windows)
            windows += len(tasks.windows)
        earlier.update({place.id: tasks for place in take.shots})
        everything.append(tasks)
    return everything


def _chosen(takes: Sequence[Take], shots: Sequence[str] | None) -> set[int]:
    """Places in the storyboard of the shots to show."""
    places = places_by_id(takes)
    if shots is None:
        return {place.position for _, place in places.values()}
    remedy = f"Shots are: {', '.join(places)}."
    unknown = [name for name in shots if name not in places]
    if unknown:
        raise SettingError(
            "is no shot of this storyboard", field="--shots", value=", ".join(unknown), remedy=remedy
        )
    if not shots:
        raise SettingError("names no shot", field="--shots", remedy=remedy)
    return {places[name][1].position for name in shots}


def _finish(
    studio: Studio,
    cut: Cut,
    takes: Sequence[Take],
    joined: Joined,
    fades: Sequence[int],
    until: Until,
    count: int,
) -> Plan:
    tasks = with_work(_needed(studio.tasks.tasks, joined.film_task_id), studio.facts)
    is_preview = cut.is_preview or len(joined.starts) < len(studio.spec.shots) or count > 1
    weights = {"chain": chain_weights(studio)}
    if cut.refined:
        weights["refine"] = refine_weights(studio)
    return Plan(
        tasks=tasks,
        film_task_id=joined.film_task_id,
        film_frames=joined.frames,
        fps=cut.fps,
        until=until,
        is_preview=is_preview,
        output_path=_output_path(studio.spec, cut, is_preview=is_preview),
        takes=tuple(takes),
        shots=tuple(_shot_summaries(studio, cut, takes, joined, fades)),
        shown_takes=_shown_takes(joined) if count > 1 else (),
        prompts=tuple(_prompt_effects(studio, cut, takes, joined)),
        warnings=tuple(find_warnings(studio.spec, studio.facts, studio.sizes, studio.rates)),
        sizes=studio.sizes,
        film_size=str(studio.sizes.stage_one if cut.is_preview else studio.sizes.output),
        media=_media_files(studio.spec, studio.facts),
        weights=weights,
        estimate=estimate(tasks, studio.facts),
    )


def _shown_takes(joined: Joined) -> tuple[ShownTake, ...]:
    seen: Counter[str] = Counter()
    found = []
    for shot_id, first_frame in joined.takes:
        seen[shot_id] += 1
        found.append(ShownTake(shot_id, seen[shot_id], first_frame))
    return tuple(found)


def _needed(tasks: Mapping[str, Task], film: str) -> dict[str, Task]:
    """The tasks that the film depends on, in their order."""
    needed: set[str] = set()
    pending = [film]
    while pending:
        task_id = pending.pop()
        if task_id not in needed:
            needed.add(task_id)
            pending.extend(tasks[task_id].inputs)
    return {name: task for name, task in tasks.items() if name in needed}


def _media_files(spec: Storyboard, facts: Facts) -> dict[str, str]:
    files = {media_file(media_params(facts.media[path])): path for path in spec.media_paths()}
    for lora in spec.loras:
        files[media_file({"sha256": facts.loras[lora.file], "suffix": ".safetensors"})] = lora.file
    return files


def _output_path(spec: Storyboard, cut: Cut, *, is_preview: bool) -> str:
    """Where the film goes; a preview never takes the film's own name."""
    path = spec.output.path or f"{name_of(spec.title)}.{spec.output.container}"
    if not is_preview:
        return path
    stem = path.rpartition(".")[0] if "." in path.rpartition("/")[2] else path
    return f"{stem}.stage-one.mp4" if cut.is_preview else f"{stem}.preview.{spec.output.container}"


def _shot_summaries(
    studio: Studio, cut: Cut, takes: Sequence[Take], joined: Joined, fades: Sequence[int]
) -> list[ShotSummary]:
    summaries = []
    segments_by_label = {task.label: task for task in studio.tasks.tasks.values() if task.kind == "segment"}
    for take in takes:
        counts = Counter(segment.shot for segment in take.segments)
        for place in take.shots:
            shot = studio.spec.shots[place.position]
            start = next((name for name, value in shot.starts().items() if value is not None), "text")
            opening = segments_by_label.get(f"{studio.name(place.id)}/segment/0")
            goes_on_from = ""
            if shot.continues and opening is not None:
                goes_on_from = "latents" if opening.params["condition_latents"] else "frames"
            begin, end = cut.span(take, place)
            first = joined.starts.get(place.position)
            fade = fades[place.position]
            segments = counts[place.position]
            summaries.append(ShotSummary(place.id, start, goes_on_from, end - begin, first, fade, segments))
    return summaries


def _prompt_effects(studio: Studio, cut: Cut, takes: Sequence[Take], joined: Joined) -> list[PromptEffect]:
    effects: dict[tuple[int, int], PromptEffect] = {}
    for take in takes:
        places = {place.position: place for place in take.shots}
        for segment in take.segments:
            key = (segment.shot, segment.prompt)
            if key in effects:
                continue
            place, prompt = places[segment.shot], studio.spec.shots[segment.shot].prompt[segment.prompt]
            effect = seconds_in_shot(segment, place, studio.rates)
            first = joined.starts.get(segment.shot)
            film_s = None if first is None else float(first / cut.fps + effect)
            written = float(prompt.at.seconds_at(studio.rates.output))
            effects[key] = PromptEffect(place.id, prompt.prompt, written, float(effect), film_s)
    return list(effects.values())


def _film_lines(plan: Plan) -> list[str]:
    what = "preview" if plan.is_preview else "film"
    lines = [
        f"{what}: {plan.film_frames} frames, {plan.film_s:.2f} s at {float(plan.fps):g} fps,"
        f" {plan.film_size} -> {plan.output_path}",
        f"made in {plan.sizes.stage_one}, finished in {plan.sizes.native}",
    ]
    for shot in plan.shots:
        where = "not shown" if shot.first_frame is None else f"from frame {shot.first_frame}"
        fade = f", crossfade of {shot.fade_frames} frames" if shot.fade_frames else ""
        begins = f"{shot.start} from {shot.goes_on_from}" if shot.goes_on_from else shot.start
        segments = "1 segment" if shot.segments == 1 else f"{shot.segments} segments"
        lines.append(f"shot {shot.id}: {begins}, {shot.frames} frames {where}, {segments}{fade}")
    for take in plan.shown_takes:
        lines.append(f"take {take.take} of {take.shot_id} from {timecode(float(take.first_frame / plan.fps))}")
    for item in plan.prompts:
        film = "" if item.film_s is None else f" (film {item.film_s:.2f} s)"
        wish = f", wished for at {item.written_s:.2f} s" if item.written_s != item.effect_s else ""
        lines.append(f"prompt in {item.shot_id} from {item.effect_s:.2f} s{film}{wish}: {item.prompt}")
    return lines + [f"warning: {text}" for text in plan.warnings]


def _task_lines(plan: Plan) -> list[str]:
    lines = [f"{len(plan.tasks)} tasks:"]
    for task in plan.tasks.values():
        inputs = ", ".join(plan.tasks[name].label for name in task.inputs)
        lines.append(f"  {task.id}  {task.label}  {task.work:.1f} s  <- {inputs or 'nothing'}")
    return lines


def _estimate_lines(plan: Plan) -> list[str]:
    guess = plan.estimate
    return [
        f"expected ({guess.basis}): {hms(guess.total_s)} of work, critical path"
        f" {hms(guess.critical_path_s)}, {format_bytes(guess.disk_bytes)} in the store",
    ]
