"""Takes: chains of shots that continue each other, laid out on one time line.

Contract: pure. `lay_out(spec, facts)` gives the takes of a storyboard, with the place of each shot, segment
and window on the take's time lines, or a list of problems. There are three time lines, all counted from the
take's frame 0:

    stage one   frames of the chain, at stage_one_fps
    native      frames of the take at the rate it is finished in: refined (ratio native frames for each
    stage-one frame; native frame g is stage-one time g / ratio), or stage one itself for an unrefined film
    output      frames of the film, counted from the first frame of the take that is shown

A take that continues a video begins with that video's last condition_frames frames, which are not shown. A
shot ends where the next shot of its take begins; the segments of that next shot are conditioned on the frames
just before, whichever segments they come from. The last shot of a take keeps its last segment whole.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from pipeline.arithmetic import Grid, conformed_frame
from pipeline.errors import SpecError
from pipeline.facts import Facts
from pipeline.spec import Shot, Storyboard, wrong
from pipeline.tasks import canonical_json


@dataclass(frozen=True)
class SegmentPlace:
    """One segment. `start` is the stage-one frame of its first frame, conditions included; [new, end) the stage-one
    frames that the take has from it; `prompt` the index of the prompt in force where its new frames begin."""

    shot: int
    index: int
    start: int
    new: int
    end: int
    conditions: int
    prompt: int


@dataclass(frozen=True)
class ShotPlace:
    """One shot of a take. Half-open ranges: `output` frames, `native` frames, `stage_one` frames."""

    position: int
    """In the storyboard's list."""
    id: str
    output: tuple[int, int]
    native: tuple[int, int]
    stage_one: tuple[int, int]


@dataclass(frozen=True)
class Take:
    """A chain of shots. `id` (that of its first shot) names its refinement noise."""

    id: str
    shots: tuple[ShotPlace, ...]
    segments: tuple[SegmentPlace, ...]
    lead_in: int
    """Stage-one frames in front that come from a video and are not shown."""
    available: int
    """Stage-one frames there are, lead-in included."""

    @property
    def native_end(self) -> int:
        return self.shots[-1].native[1]


@dataclass(frozen=True)
class Rates:
    """Frame rates of a film: `native` of what is decoded, `output` of what is shown."""

    native: Fraction
    output: Fraction
    stage_one: Fraction

    @property
    def conform(self) -> Fraction:
        return self.native / self.output

    @property
    def native_ratio(self) -> int:
        """Native frames for each stage-one frame."""
        return int(self.native / self.stage_one)


def rates_of(spec: Storyboard, facts: Facts) -> Rates:
    """The rates of the whole film (not of its stage-one preview)."""
    render = facts.checkpoint.render
    native = render.stage_one_fps if spec.refinement == "none" else render.refined_fps
    return Rates(Fraction(native), spec.output.fps or Fraction(native), Fraction(render.stage_one_fps))


def shot_ids(shots: Sequence[Shot], facts: Facts) -> list[str]:
    """An id for each shot: the written one, or one derived from how the shot opens (prompt, start, seed), never from
    its place or length. Shots that open alike are told apart by an ordinal: first by all their prompts, then the
    longer first, so that moving one costs nothing."""
    keys = [_opening(shot, facts) for shot in shots]
    groups: dict[str, list[int]] = {}
    for index, shot in enumerate(shots):
        if shot.id is None:
            groups.setdefault(_slug(shot.prompt[0].prompt, keys[index]), []).append(index)
    taken = {shot.id for shot in shots if shot.id is not None}
    ids = [shot.id or "" for shot in shots]
    for base, members in groups.items():
        ordinal = 0
        for index in sorted(members, key=lambda member: _rank(shots[member])):
            ordinal += 1
            while _numbered(base, ordinal) in taken:
                ordinal += 1
            ids[index] = _numbered(base, ordinal)
    return ids


def alike(ids: Sequence[str], shots: Sequence[Shot]) -> list[str]:
    """Derived ids that carry an ordinal: editing may exchange these shots."""
    derived = [name for name, shot in zip(ids, shots, strict=True) if shot.id is None]
    return [name for name in derived if re.fullmatch(r".*-[0-9a-f]{8}\.\d+", name)]


def _numbered(base: str, ordinal: int) -> str:
    return base if ordinal == 1 else f"{base}.{ordinal}"


def _opening(shot: Shot, facts: Facts) -> str:
    start: list[object] = []
    for path in (shot.image, shot.video):
        start.append(facts.media[path].sha256 if path and path in facts.media else path)
    start.append(shot.frame_of.model_dump(mode="json") if shot.frame_of else None)
    start.append(shot.continues)
    return canonical_json([joined(shot.prompt[0].prompt), shot.seed, start])


def _slug(prompt: str, key: str) -> str:
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    name = "-".join(words)[:32].strip("-") or "shot"
    return f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def _rank(shot: Shot) -> tuple[str, Fraction]:
    prompts = canonical_json([[str(item.at), joined(item.prompt)] for item in shot.prompt])
    return prompts, -(shot.duration.seconds + Fraction(shot.duration.frames or 0, 1000))


def joined(prompt: str, look: str = "") -> str:
    """A prompt with the film's look, white space collapsed."""
    prompt, look = " ".join(prompt.split()), " ".join(look.split())
    if not look:
        return prompt
    return f"{prompt} {look}" if prompt.endswith((".", "!", "?")) else f"{prompt}, {look}"


def lay_out(spec: Storyboard, facts: Facts, grid: Grid) -> tuple[list[Take], list[SpecError]]:
    """The takes in order, and what is wrong with them (then the takes are of no use)."""
    rates = rates_of(spec, facts)
    ids = shot_ids(spec.shots, facts)
    takes: list[Take] = []
    problems: list[SpecError] = []
    for members in _chains(spec.shots):
        named = [(position, ids[position], spec.shots[position]) for position in members]
        take, found = _lay_out_take(named, rates, grid)
        problems += found
        if take is not None:
            takes.append(take)
    return takes, problems


def _chains(shots: Sequence[Shot]) -> list[list[int]]:
    chains: list[list[int]] = []
    for position, shot in enumerate(shots):
        if shot.continues:
            chains[-1].append(position)
        else:
            chains.append([position])
    return chains


def _lay_out_take(
    members: list[tuple[int, str, Shot]], rates: Rates, grid: Grid
) -> tuple[Take | None, list[SpecError]]:
    lengths = [shot.duration.frames_at(rates.output) for _, _, shot in members]
    problems = [
        wrong(
            f"shots[{position}].duration", "is less than half a frame", "Make it longer.", str(shot.duration)
        )
        for (position, _, shot), length in zip(members, lengths, strict=True)
        if length == 0
    ]
    if problems:
        return None, problems
    lead_in = grid.condition_frames if members[0][2].video else 0
    places = _place_shots(members, lengths, lead_in, rates)
    segments: list[SegmentPlace] = []
    for (position, _, shot), place in zip(members, places, strict=True):
        if place is not places[0] and place.stage_one[0] < grid.condition_frames:
            least = f"{float(grid.condition_frames / rates.stage_one):.2f} s"
            remedy = f"Let at least {least} of the take come before it."
            problems.append(
                wrong(f"shots[{position}].continue", "has too little to continue", remedy, "previous")
            )
            continue
        is_last = place is places[-1]
        own = _place_segments(shot, place, grid, rates, is_last=is_last, has_video=bool(lead_in))
        problems += _prompt_problems(shot, place, own, rates)
        segments += own
    if problems:
        return None, problems
    available = segments[-1].end
    return Take(members[0][1], tuple(places), tuple(segments), lead_in, available), []


def _place_shots(
    members: list[tuple[int, str, Shot]], lengths: list[int], lead_in: int, rates: Rates
) -> list[ShotPlace]:
    ratio = rates.native_ratio
    places: list[ShotPlace] = []
    begin, total = 0, sum(lengths)
    for (position, name, _), length in zip(members, lengths, strict=True):
        end = begin + length
        first = lead_in * ratio + conformed_frame(begin, rates.conform)
        if end == total:
            stop = lead_in * ratio + conformed_frame(end - 1, rates.conform) + 1
        else:
            stop = lead_in * ratio + conformed_frame(end, rates.conform)
        stage_one = (-(-first // ratio), -(-stop // ratio))
        places.append(ShotPlace(position, name, (begin, end), (first, stop), stage_one))
        begin = end
    return places


def _place_segments(
    shot: Shot, place: ShotPlace, grid: Grid, rates: Rates, *, is_last: bool, has_video: bool
) -> list[SegmentPlace]:
    begin, end = place.stage_one
    if end <= begin:
        return []
    continues = bool(shot.continues) or has_video
    segments = []
    times = [item.at.seconds_at(rates.output) for item in shot.prompt]
    new, conditions = begin, grid.condition_frames
    if not continues:
        conditions = 1 if shot.image or shot.frame_of else 0
    for index in range(grid.segment_count(end - begin, continues=continues)):
        if index:
            conditions = grid.condition_frames
        fresh = index == 0 and not continues
        start = new if fresh else new - grid.condition_frames
        stop = start + grid.segment_frames
        prompt = _prompt_in_force(times, 0 if index == 0 else _seconds_into(new, place, rates))
        shown = stop if is_last else min(stop, end)
        segments.append(SegmentPlace(place.position, index, start, new, shown, conditions, prompt))
        new = stop
    return segments


def _seconds_into(stage_one_frame: int, place: ShotPlace, rates: Rates) -> Fraction:
    """When in its shot a stage-one frame is shown."""
    return (stage_one_frame * rates.native_ratio - place.native[0]) / rates.native


def _prompt_in_force(times: Sequence[Fraction], seconds: Fraction | int) -> int:
    return max((index for index, at in enumerate(times) if at <= seconds), default=0)


def _prompt_problems(
    shot: Shot, place: ShotPlace, own: Sequence[SegmentPlace], rates: Rates
) -> list[SpecError]:
    times = [item.at.seconds_at(rates.output) for item in shot.prompt]
    fields = [f"shots[{place.position}].prompt[{index}]" for index in range(len(times))]
    length = Fraction(place.output[1] - place.output[0]) / rates.output
    used = {segment.prompt for segment in own}
    is_ordered = all(earlier < later for earlier, later in pairwise(times))
    problems = []
    for index, at in enumerate(times):
        written = str(shot.prompt[index].at)
        if index and at <= times[index - 1]:
            remedy = "Write prompts in the order of their times."
            problems.append(wrong(f"{fields[index]}.at", "is not after the prompt before", remedy, written))
        elif index and at >= length:
            remedy = f"The shot ends after {float(length):g} s."
            problems.append(wrong(f"{fields[index]}.at", "is after the shot's end", remedy, written))
        elif is_ordered and index not in used:
            problems.append(_unused_prompt(shot, place, own, rates, index))
    return problems


def _unused_prompt(
    shot: Shot, place: ShotPlace, own: Sequence[SegmentPlace], rates: Rates, index: int
) -> SpecError:
    changes = ", ".join(f"{float(_seconds_into(item.new, place, rates)):.2f} s" for item in own[1:8])
    where = f"Prompts can change at {changes}" if changes else "The prompt cannot change within this shot"
    remedy = f"{where}; move this one, or take it out."
    field = f"shots[{place.position}].prompt[{index}].at"
    return wrong(field, "is a prompt that would never take effect", remedy, str(shot.prompt[index].at))


def seconds_in_shot(segment: SegmentPlace, place: ShotPlace, rates: Rates) -> Fraction:
    """When in its shot a segment's new frames begin."""
    return Fraction(0) if segment.index == 0 else _seconds_into(segment.new, place, rates)


def frame_taken(target: ShotPlace, at: Fraction | None, take: Take, rates: Rates) -> int:
    """The stage-one frame of `take` that `frame_of` means: the last one shown of the shot `target`, or the one on
    screen `at` seconds into it. It lies on both grids, so its refined twin is native frame ratio * frame."""
    ratio = rates.native_ratio
    last = (target.native[1] - 1) // ratio
    if at is None:
        return last
    output = target.output[0] + int(at * rates.output)
    native = take.lead_in * ratio + conformed_frame(output, rates.conform)
    return min(max(native // ratio, -(-target.native[0] // ratio)), last)


def places_by_id(takes: Sequence[Take]) -> Mapping[str, tuple[Take, ShotPlace]]:
    """Every shot's take and place, by its id."""
    return {place.id: (take, place) for take in takes for place in take.shots}
