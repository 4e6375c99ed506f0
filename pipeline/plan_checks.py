"""What has to hold between a storyboard and the facts: picture sizes, media, LoRAs, crossfades; and what to
warn of.

Contract: pure; each check returns problems (or warnings, plain sentences) and raises nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import SpecError
from pipeline.facts import Facts, MediaFacts, RenderFacts
from pipeline.params import Fit
from pipeline.spec import Shot, Storyboard, wrong
from pipeline.spec_values import FrameSize
from pipeline.takes import Rates, ShotPlace, Take, alike, shot_ids

MOST_ASPECT_STEP = 0.1
"""Largest difference of log(height/width) between stage one and refinement: above it pictures look
stretched.
"""
MOST_ASPECT_MISS = 0.2
"""Largest difference of log(height/width) between the aspect asked for and the nearest there is."""


@dataclass(frozen=True)
class Sizes:
    """Picture sizes of a film. `native` is what its frames are decoded at: refined, or stage one without
    refinement.
    `fit` says how native becomes output; None where they are equal."""

    stage_one: FrameSize
    native: FrameSize
    output: FrameSize
    fit: Fit | None


def choose_sizes(spec: Storyboard, render: RenderFacts) -> tuple[Sizes, list[SpecError]]:
    """The checkpoint's sizes nearest to the aspect asked for, and what is wrong with that."""
    size, field = spec.output.size, "output.aspect"
    if size is not None:
        wanted, field = size.height_px / size.width_px, "output.size"
    else:
        width, height = map(int, (spec.output.aspect or render.default_aspect).split(":"))
        wanted = height / width
    stage_one = nearest_size(render.stage_one_sizes, wanted)
    native = stage_one
    problems = []
    if spec.refinement != "none":
        native = nearest_size(render.refined_sizes, _aspect(stage_one))
        if abs(math.log(_aspect(stage_one) / _aspect(native))) > MOST_ASPECT_STEP:
            message = f"has no refined size of its shape: stage one is {stage_one}, the nearest {native}"
            remedy = "Choose another aspect, or `refinement: none`."
            problems.append(wrong(field, message, remedy, str(size or spec.output.aspect)))
    if size is None and spec.output.aspect and abs(math.log(wanted / _aspect(native))) > MOST_ASPECT_MISS:
        message = f"is far from every size of the checkpoint; the nearest is {native}"
        problems.append(wrong(field, message, "Choose another aspect.", spec.output.aspect))
    output = size or native
    fit = spec.output.fit if output != native else None
    if output != native and fit is None:
        remedy = f"Add `fit: crop`, `fit: pad` or `fit: scale`, or write `size: {native}`."
        message = f"is not the size that the film is made in ({native})"
        problems.append(wrong(field, message, remedy, str(size)))
    return Sizes(stage_one, native, output, fit), problems


def nearest_size(table: Sequence[Sequence[int]], aspect: float) -> FrameSize:
    """The [height, width] of a table whose height / width is nearest to `aspect`."""
    height, width = min(table, key=lambda size: abs(size[0] / size[1] - aspect))
    return FrameSize(width, height)


def _aspect(size: FrameSize) -> float:
    return size.height_px / size.width_px


def media_problems(spec: Storyboard, facts: Facts) -> list[SpecError]:
    """Images, videos, the soundtrack and LoRAs against what was probed."""
    problems = []
    render = facts.checkpoint.render
    least_s = render.condition_frames / render.stage_one_fps
    for index, shot in enumerate(spec.shots):
        if shot.image:
            problems += _kind_problem(facts.media, f"shots[{index}].image", shot.image, "image")
        if shot.video:
            field = f"shots[{index}].video"
            found = _kind_problem(facts.media, field, shot.video, "video")
            if not found and facts.media[shot.video].duration_s < least_s:
                remedy = f"Name a video of at least {least_s:.2f} s."
                message = f"lasts only {facts.media[shot.video].duration_s:.2f} s"
                found = [wrong(field, message, remedy, shot.video)]
            problems += found
    sound = spec.output.soundtrack
    if sound and (sound not in facts.media or not facts.media[sound].has_audio):
        problems.append(
            wrong("output.soundtrack", "has no sound", "Name a file with an audio stream.", sound)
        )
    for index, lora in enumerate(spec.loras):
        if lora.file not in facts.loras:
            remedy = "Name a safetensors file."
            problems.append(wrong(f"loras[{index}].file", "was not found", remedy, lora.file))
    return problems


_A = {"image": "an image", "video": "a video", "audio": "sound alone"}


def _kind_problem(media: Mapping[str, MediaFacts], field: str, path: str, kind: str) -> list[SpecError]:
    if path not in media:
        return [wrong(field, "was not found", f"Name {_A[kind]}.", path)]
    if media[path].kind != kind:
        return [wrong(field, f"is {_A[media[path].kind]}", f"Name {_A[kind]}.", path)]
    return []


def frame_of_problems(
    spec: Storyboard, places: Mapping[str, tuple[Take, ShotPlace]], rates: Rates
) -> list[SpecError]:
    """Times in `frame_of` against the lengths of the shots they point into."""
    problems = []
    for index, shot in enumerate(spec.shots):
        if shot.frame_of is None or shot.frame_of.at is None:
            continue
        begin, end = places[shot.frame_of.shot][1].output
        if shot.frame_of.at.seconds_at(rates.output) * rates.output >= end - begin:
            remedy = (
                f"That shot ends after {float((end - begin) / rates.output):g} s; `frame: last` is its last."
            )
            problems.append(
                wrong(f"shots[{index}].frame_of.at", "is after its end", remedy, str(shot.frame_of.at))
            )
    return problems


def fades_of(spec: Storyboard, rates: Rates) -> tuple[list[int], list[SpecError]]:
    """Output frames that each shot overlaps with the one before, and the overlaps that cannot be."""
    lengths = [shot.duration.frames_at(rates.output) for shot in spec.shots]
    fades = [_fade_frames(shot, rates) for shot in spec.shots]
    problems = []
    for index, fade in enumerate(fades):
        field = f"shots[{index}].transition.crossfade"
        written = str(spec.shots[index].transition.crossfade)
        if fade is None:
            problems.append(wrong(field, "is less than half a frame", "Make it longer, or cut.", written))
        elif fade and fade > min(lengths[index - 1], lengths[index]):
            side = "the shot before" if lengths[index - 1] < lengths[index] else "the shot"
            problems.append(wrong(field, f"is longer than {side}", "Make it shorter.", written))
        elif fade and (fades[index - 1] or 0) + fade > lengths[index - 1]:
            message = f"and the crossfade into shots[{index - 1}] overlap"
            problems.append(wrong(field, message, "Make one of them shorter.", written))
    return [fade or 0 for fade in fades], problems


def _fade_frames(shot: Shot, rates: Rates) -> int | None:
    if shot.transition.crossfade is None:
        return 0
    return shot.transition.crossfade.frames_at(rates.output) or None


def find_warnings(spec: Storyboard, facts: Facts, sizes: Sizes, rates: Rates) -> list[str]:
    """What a person should know before the render, in sentences."""
    warnings = []
    quality = getattr(facts.checkpoint.render.quality, spec.quality)
    if quality.guidance == 1 and any(shot.negative_prompt is not None for shot in spec.shots):
        warnings.append(f"Quality {spec.quality} runs without guidance: negative prompts have no effect.")
    for name in alike(shot_ids(spec.shots, facts), spec.shots):
        warnings.append(
            f"Shot {name} opens like another one: write ids, or edits may exchange their pictures."
        )
    for index, shot in enumerate(spec.shots):
        path = shot.image or shot.video
        media = facts.media.get(path) if path else None
        if media and media.width_px and media.height_px:
            lost = _share_lost(media, sizes.native)
            if lost > 0.02:
                warnings.append(
                    f"shots[{index}]: {path} is cut to the film's shape, {lost:.0%} of it is lost."
                )
    if rates.output > rates.native:
        warnings.append(f"Frames repeat: the film is made at {rates.native} fps and shown at {rates.output}.")
    if sizes.output.width_px > sizes.native.width_px or sizes.output.height_px > sizes.native.height_px:
        warnings.append(
            f"Pictures are enlarged or padded: made in {sizes.native}, put out as {sizes.output}."
        )
    return warnings


def _share_lost(media: MediaFacts, size: FrameSize) -> float:
    ratio = (media.height_px / media.width_px) / _aspect(size)
    return 1 - min(ratio, 1 / ratio)
