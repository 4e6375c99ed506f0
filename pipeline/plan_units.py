"""From takes to the film: which unit shows which frames, the encode tasks and the film task.

Contract: pure. Every output frame of the film is shown by exactly one unit, in order; the units' frames add
up to the film's. A unit shows frames of one window (with the overlaps of its neighbours merged in) or of one
segment; a crossfade's units show two, and end wherever either side changes to its next window.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from pipeline.arithmetic import conformed_frame
from pipeline.params import (
    CodecParams,
    EncodeParams,
    FilmParams,
    LayerParams,
    MergeParams,
    compress_frames,
)
from pipeline.plan_tasks import Inputs, Studio, TakeTasks, handover, media_params
from pipeline.spec import CODECS
from pipeline.takes import ShotPlace, Take

PREVIEW_CRF = 20


@dataclass(frozen=True)
class Cut:
    """How takes become film: from refined windows or from stage-one segments, at which rate."""

    refined: bool
    native: Fraction
    """Rate of the frames that are decoded."""
    fps: Fraction
    is_preview: bool
    """The stage-one look at a film that is to be refined: native frames are stage-one frames, shown as they
    are.
    """

    @cached_property
    def conform(self) -> Fraction:
        return self.native / self.fps

    def span(self, take: Take, place: ShotPlace) -> tuple[int, int]:
        """Output frames of a shot, counted from the take's first shown one."""
        if not self.is_preview:
            return place.output
        return place.stage_one[0] - take.lead_in, place.stage_one[1] - take.lead_in


@dataclass(frozen=True)
class Span:
    """Output frames [begin, end) of a take, shown without a break; `fade` of them mixed with the end of the
    span before.
    """

    tasks: TakeTasks
    begin: int
    end: int
    fade: int = 0


@dataclass(frozen=True)
class Slice:
    """Output frames [begin, end) of a take that unit `unit` shows."""

    unit: int
    begin: int
    end: int


@dataclass(frozen=True)
class Joined:
    """What came out: the film task and its frames."""

    film_task_id: str
    frames: int
    starts: Mapping[int, int]
    """For each shown shot (by its place in the storyboard), its first film frame."""
    takes: tuple[tuple[str, int], ...]
    """Shots (by id) in the order shown, again for each further take, with their first film frames."""


def make_cut(studio: Studio, *, until_stage_one: bool) -> Cut:
    """The film's cut, or its stage-one preview's."""
    rates = studio.rates
    is_refined = studio.spec.refinement != "none"
    if until_stage_one and is_refined:
        return Cut(False, rates.stage_one, rates.stage_one, True)
    return Cut(is_refined, rates.native, rates.output, False)


def spans_of(
    cut: Cut, shown: Sequence[tuple[TakeTasks, ShotPlace]], fades: Sequence[int], output_fps: Fraction
) -> list[Span]:
    """The shots to show, in order; neighbours of one take become one span. A crossfade needs both its
    shots.
    """
    spans: list[Span] = []
    before: ShotPlace | None = None
    for tasks, place in shown:
        begin, end = cut.span(tasks.take, place)
        follows = before is not None and before.position + 1 == place.position
        last = spans[-1] if spans else None
        if last and follows and last.tasks is tasks:
            spans[-1] = Span(tasks, last.begin, end, last.fade)
        else:
            fade = fades[place.position] if follows else 0
            if cut.is_preview and last:
                fade = int(fade * cut.fps / output_fps)
                fade = min(fade, end - begin, last.end - last.begin - last.fade)
            spans.append(Span(tasks, begin, end, fade))
        before = place
    return [span for span in spans if span.end > span.begin]


def _native_frame(cut: Cut, take: Take, output: int) -> int:
    """The frame of the take that an output frame shows."""
    first = take.lead_in if cut.is_preview else take.shots[0].native[0]
    return first + conformed_frame(output, cut.conform)


def _native_frames(cut: Cut, take: Take, part: Slice) -> Sequence[int]:
    first = _native_frame(cut, take, part.begin)
    if cut.conform == 1:
        return range(first, first + part.end - part.begin)
    return [_native_frame(cut, take, output) for output in range(part.begin, part.end)]


def _unit_stops(studio: Studio, cut: Cut, tasks: TakeTasks) -> list[int]:
    """For each unit but the last, the native frame at which the next one takes over."""
    if not cut.refined:
        return [place.end for place in tasks.take.segments[:-1]]
    hop, shift = studio.grid.window_hop, handover(studio)
    return [hop * index + shift for index in range(1, len(tasks.windows))]


def slices_of(studio: Studio, cut: Cut, tasks: TakeTasks, begin: int, end: int) -> list[Slice]:
    """Output frames [begin, end) of a take by the unit that shows them."""
    stops = _unit_stops(studio, cut, tasks)
    slices: list[Slice] = []
    while begin < end:
        unit = bisect.bisect_right(stops, _native_frame(cut, tasks.take, begin))
        stop = end
        if unit < len(stops):
            stop = min(end, _first_output_at(cut, tasks.take, stops[unit], begin))
        slices.append(Slice(unit, begin, stop))
        begin = stop
    return slices


def _first_output_at(cut: Cut, take: Take, native: int, after: int) -> int:
    """The first output frame above `after` that shows native frame `native` or a later one."""
    output = max(after + 1, int((native - _native_frame(cut, take, 0)) / cut.conform) - 1)
    while output > after + 1 and _native_frame(cut, take, output - 1) >= native:
        output -= 1
    while _native_frame(cut, take, output) < native:
        output += 1
    return output


def _layer(studio: Studio, cut: Cut, tasks: TakeTasks, part: Slice, inputs: Inputs) -> LayerParams:
    frames = _native_frames(cut, tasks.take, part)
    if not cut.refined:
        place = tasks.take.segments[part.unit]
        shown = [frame - place.start for frame in frames]
        position = inputs.at(tasks.segments[part.unit])
        return {"input": position, "merges": [], "ranges": compress_frames(shown)}
    window = tasks.windows[part.unit]
    front = studio.grid.temporal * window.shape.front_latents
    shown = [front + min(frame - window.begin, window.shape.frames - 1) for frame in frames]
    position = inputs.at(window.task_id)
    merges = [] if studio.spec.refinement == "chained" else _merges(studio, tasks, part.unit, inputs)
    return {"input": position, "merges": merges, "ranges": compress_frames(shown)}


def _merges(studio: Studio, tasks: TakeTasks, unit: int, inputs: Inputs) -> list[MergeParams]:
    """The overlaps of a window with the windows beside it."""
    hop, count = studio.grid.window_hop_latents, studio.grid.merge_latents
    own = tasks.windows[unit].shape.front_latents
    merges: list[MergeParams] = []
    for beside, here, there in ((unit - 1, 1, hop + 1), (unit + 1, hop + 1, 1)):
        if 0 <= beside < len(tasks.windows):
            neighbour = tasks.windows[beside]
            merges.append(
                {
                    "input": inputs.at(neighbour.task_id),
                    "here": here + own,
                    "there": there + neighbour.shape.front_latents,
                    "count": count,
                    "earlier": beside < unit,
                }
            )
    return merges


def codec_params(studio: Studio, cut: Cut) -> CodecParams:
    """The codec of the film, or the plain one of a preview."""
    output = studio.spec.output
    if cut.is_preview:
        return {"codec": "h264", "pix_fmt": CODECS["h264"].pix_fmt, "crf": PREVIEW_CRF, "container": "mp4"}
    codec = CODECS[output.codec]
    crf = codec.crf if output.crf is None else output.crf
    return {"codec": output.codec, "pix_fmt": codec.pix_fmt, "crf": crf, "container": output.container}


def add_film(
    studio: Studio,
    cut: Cut,
    shown: Sequence[tuple[TakeTasks, ShotPlace]],
    fades: Sequence[int],
    recipe: str | None,
) -> Joined:
    """The encode tasks of the shots to show, and the film task."""
    spans = spans_of(cut, shown, fades, studio.rates.output)
    units: list[tuple[str, int]] = []
    for index, span in enumerate(spans):
        fade_out = spans[index + 1].fade if index + 1 < len(spans) else 0
        for part in slices_of(studio, cut, span.tasks, span.begin + span.fade, span.end - fade_out):
            units.append(_add_unit(studio, cut, [(span.tasks, part)], None, len(units)))
        if fade_out:
            for first, parts in _fade_parts(studio, cut, span, spans[index + 1]):
                units.append(_add_unit(studio, cut, parts, (first, fade_out), len(units)))
    return _join(studio, cut, units, spans, shown, recipe)


def _fade_parts(
    studio: Studio, cut: Cut, before: Span, after: Span
) -> list[tuple[int, list[tuple[TakeTasks, Slice]]]]:
    """A crossfade cut where either side changes its unit: (first frame of the fade, the two sides)."""
    fade = after.fade
    outgoing = slices_of(studio, cut, before.tasks, before.end - fade, before.end)
    incoming = slices_of(studio, cut, after.tasks, after.begin, after.begin + fade)
    parts: list[tuple[int, list[tuple[TakeTasks, Slice]]]] = []
    for left in outgoing:
        for right in incoming:
            begin = max(left.begin - (before.end - fade), right.begin - after.begin)
            end = min(left.end - (before.end - fade), right.end - after.begin)
            if begin < end:
                a = Slice(left.unit, before.end - fade + begin, before.end - fade + end)
                b = Slice(right.unit, after.begin + begin, after.begin + end)
                parts.append((begin, [(before.tasks, a), (after.tasks, b)]))
    return parts


def _add_unit(
    studio: Studio,
    cut: Cut,
    parts: Sequence[tuple[TakeTasks, Slice]],
    fade: tuple[int, int] | None,
    index: int,
) -> tuple[str, int]:
    inputs = Inputs()
    layers = [_layer(studio, cut, tasks, part, inputs) for tasks, part in parts]
    sizes, frames = studio.sizes, parts[0][1].end - parts[0][1].begin
    size = sizes.stage_one if cut.is_preview else sizes.output
    params: EncodeParams = {
        "checkpoint": studio.checkpoint,
        "layers": layers,
        "blend": {"first": fade[0], "total": fade[1]} if fade else None,
        "frames": frames,
        "fps": [cut.fps.numerator, cut.fps.denominator],
        "height_px": size.height_px,
        "width_px": size.width_px,
        "fit": None if cut.is_preview else sizes.fit,
        "codec": codec_params(studio, cut),
    }
    task_id = studio.tasks.add(
        "encode",
        "media",
        params,
        inputs.ids,
        label=f"unit/{index}",
        shot_id=parts[0][0].take.id,
        index=index,
        priority=index,
    )
    return task_id, frames


def _join(
    studio: Studio,
    cut: Cut,
    units: Sequence[tuple[str, int]],
    spans: Sequence[Span],
    shown: Sequence[tuple[TakeTasks, ShotPlace]],
    recipe: str | None,
) -> Joined:
    sound = studio.spec.output.soundtrack
    params: FilmParams = {
        "unit_frames": [frames for _, frames in units],
        "fps": [cut.fps.numerator, cut.fps.denominator],
        "codec": codec_params(studio, cut),
        "soundtrack": media_params(studio.facts.media[sound]) if sound else None,
        "title": studio.spec.title,
        "recipe": recipe,
    }
    film = studio.tasks.add("film", "media", params, [task_id for task_id, _ in units], label="film")
    places = _film_starts(cut, spans, shown)
    starts = {place.position: begin for place, begin in reversed(places)}
    return Joined(film, sum(params["unit_frames"]), starts, tuple((place.id, begin) for place, begin in places))


def _film_starts(
    cut: Cut, spans: Sequence[Span], shown: Sequence[tuple[TakeTasks, ShotPlace]]
) -> list[tuple[ShotPlace, int]]:
    starts: list[tuple[ShotPlace, int]] = []
    begin = 0
    for span in spans:
        begin -= span.fade
        for tasks, place in shown:
            first, last = cut.span(tasks.take, place)
            if tasks is span.tasks and span.begin <= first and last <= span.end:
                starts.append((place, begin + first - span.begin))
        begin += span.end - span.begin
    return starts
