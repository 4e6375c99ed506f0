"""What each kind of task is told: the parameters of its `Task`, and the few pure functions that read them.

Contract: a task's `params` is one of the TypedDicts below, JSON-able, and holds all that matters to the
result. An actor needs these, the input artifacts (by position in `Task.inputs`) and the checkpoint; nothing
else.

Frames are counted from 0; every range is half open. `L`, `T` latent frames, `n` video frames, `h`, `w`
pixels.

Files of each artifact:

    text     text.safetensors     text [1,L,C], mask [L]
    source   source.safetensors   frames uint8 [n,h,w,3]
    segment  segment.safetensors  latents fp32 [16,T,h/8,w/8], tail uint8 [condition_frames,h,w,3]
    window   window.safetensors   latents fp32 [16,L,h/8,w/8], padding included; tail uint8 [n,h,w,3] if asked
    encode   unit.<container>     one closed, concatenable piece of the film
    film     film.<container>

Files a user named (images, videos, soundtracks, LoRAs) are read from `media_file(...)` in the render's
folder, where the driver puts them before the first task runs: a worker never sees the user's paths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict

from pipeline.facts import Attention, ScheduleName
from pipeline.tasks import canonical_json

Stage = Literal["one", "two"]
Fit = Literal["crop", "pad", "scale"]


class MediaParams(TypedDict):
    """A user's file by content; `suffix` is lower case with its dot (`.png`) and may be empty."""

    sha256: str
    suffix: str


def media_file(media: MediaParams) -> str:
    """Where the file lies, relative to the render's folder in the store."""
    return f"media/{media['sha256']}{media['suffix']}"


class LoraParams(TypedDict):
    """One LoRA to merge. Either `file` (relative to the checkpoint folder) or `media` (a user's file) is
    set."""

    file: str | None
    media: MediaParams | None
    strength: float


class WeightsParams(TypedDict):
    """The weights a DiT task runs with; equal for all tasks of a role in a plan. Merged in the order
    given."""

    checkpoint: str
    """Digest of the checkpoint folder."""
    loras: list[LoraParams]
    attention: Attention


class ScheduleParams(TypedDict):
    """Which sigmas: `base_schedule(steps, shift)`, `distilled_...`, `enhance_hf_...`,
    `refinement_schedule(steps, t_thresh, shift)`; `t_thresh` is 1.0 where it means nothing."""

    name: ScheduleName
    steps: int
    shift: float
    t_thresh: float


class NoiseParams(TypedDict):
    """The noise of latent frames [first_latent, first_latent + count); see `noise_seeds`. Indices may be
    negative (front padding of a window)."""

    seed: int
    noise_id: str
    stage: Stage
    first_latent: int
    count: int
    redo: int


class PieceParams(TypedDict):
    """Frames [start, stop) of one input: of a source's `frames`, or of the video that a segment's latents
    decode to (all segment_frames of them, conditions included). A piece of a segment that lies within its
    last condition_frames frames is in its `tail` and needs no decoding."""

    input: int
    """Position in the task's inputs."""
    start: int
    stop: int


class LatentsParams(TypedDict):
    """Latents [start, stop) of an input segment, as they are stored."""

    input: int
    """Position in the task's inputs."""
    start: int
    stop: int


class TextParams(TypedDict):
    """Encode one prompt. Role `text`, no inputs."""

    checkpoint: str
    prompt: str


FILM_READER = 2
"""Raised when `pipeline.media_read` gives other frames of the same film than before: 2 since HDR, interlaced, untagged
and anamorphic films are read as players show them."""


class SourceParams(TypedDict):
    """Make condition frames ready: uint8 [n, height_px, width_px, 3]. Role `media`.

    `kind`:
    image  the picture in `media`, one frame.
    video  the frames on screen at `times_s` (seconds after the time stamp of the first frame; the frame with the
           greatest time stamp not above the time), one for each time, from `media`.
    shot   frame `frame` of the video that the latents of input 0 (a segment or a window) decode to, padding
           included; already has the right size.

    Images and videos are scaled to cover the size and cut around the centre (fit `crop`).
    """

    kind: Literal["image", "video", "shot"]
    media: MediaParams | None
    times_s: list[float]
    frame: int | None
    checkpoint: str | None
    """Digest of the checkpoint whose VAE decodes; only for `shot`."""
    height_px: int
    width_px: int
    reader: NotRequired[int]
    """FILM_READER; only for `video`."""


class SegmentParams(TypedDict):
    """One step of a chain: segment_frames frames, the first `condition_frames` of them given. Role `chain`.

    condition_frames is 0 (text), 1 (image) or the checkpoint's number (continuation). `conditions` lists
    where those frames come from, in order; joined they are exactly condition_frames frames.
    `condition_latents`: the latents of earlier segments that hold all of these frames but the first. They are taken as
    they are, and only the first frame is encoded. Empty where there are none (a source; a shot that ended within
    a latent): then all the frames are encoded.
    `tail_frames`: how many last decoded frames to store as `tail` (uint8, rounded).
    `noise` covers all latents of the segment, those of the conditions included (those are overwritten).
    """

    weights: WeightsParams
    schedule: ScheduleParams
    guidance: float
    text: int
    """Position of the prompt's text task in the inputs."""
    negative_text: int | None
    """Position of the negative prompt's; None without guidance."""
    height_px: int
    width_px: int
    segment_frames: int
    condition_frames: int
    conditions: list[PieceParams]
    condition_latents: list[LatentsParams]
    tail_frames: int
    noise: NoiseParams


class RefineConditionParams(TypedDict):
    """Refined frames a window is conditioned on: all `frames` of the input's tensor `name`."""

    input: int
    name: Literal["frames", "tail"]
    """`frames` of a source, `tail` of the window before."""
    frames: int


class WindowParams(TypedDict):
    """One refinement window. Role `refine`. Input `text` is the empty prompt.

    stage_one: pieces that, joined, give the window's m stage-one frames, in order.
    Refined frame j of `frames` (conditions first, padding not counted) shows stage-one time
    min(j / frames_ratio, m - 1) of those m frames (`window_times`).
    latents = front_latents + what `frames` frames need: the video is padded in front with
    vae_temporal * front_latents repeats of its first frame, so that padded frame count =
    vae_temporal*(latents-1) + 1. Latent j of the window is latent `noise.first_latent + j` of the take.
    spatial_only: the refined rate is the stage-one rate.
    tail: frames [a, b) of the decoded window, padding counted, to store as `tail` uint8 [b-a,h,w,3]; or None.
    """

    weights: WeightsParams
    schedule: ScheduleParams
    text: int
    height_px: int
    width_px: int
    stage_one: list[PieceParams]
    frames: int
    frames_ratio: int
    latents: int
    front_latents: int
    spatial_only: bool
    condition: RefineConditionParams | None
    noise: NoiseParams
    tail: list[int] | None


class MergeParams(TypedDict):
    """An overlap of this layer's window with a neighbour: latents [here, here+count) of the layer's own input
    and [there, there+count) of the neighbour's are the same frames. `earlier` says that the neighbour comes
    first in time.

    Latent k of the overlap becomes (1 - v) * first + v * second in fp32, `first` being the latent of the
    window that comes first in time and v = merge_weights(count)[k]: both neighbours' units compute the same
    values.
    """

    input: int
    here: int
    there: int
    count: int
    earlier: bool


class LayerParams(TypedDict):
    """Frames out of the decoded latents of one segment or window.

    Decode the latents of input `input` from latent 0 (after the merges), as far as the last frame needs, and
    show `ranges`: a list of [start, stop, times]: decoded frames start..stop-1 in order, each `times` times
    in a row. `expand_ranges` lists them. Frame numbers count the decoded video from its first frame, padding
    included.
    """

    input: int
    merges: list[MergeParams]
    ranges: list[list[int]]


class BlendParams(TypedDict):
    """Output frame k of the unit mixes two layers: weight of the second = (first + k + 1) / (total + 1)."""

    first: int
    total: int


class CodecParams(TypedDict):
    """How a unit is encoded; `crf` is None for codecs without it. Rows of `pipeline.spec.CODECS`."""

    codec: str
    pix_fmt: str
    crf: int | None
    container: str
    """Extension without the dot."""


class EncodeParams(TypedDict):
    """One unit of the film: exactly `frames` frames, encoded once, closed GOPs. Roles `media`, `chain` or
    `refine` (whatever holds a VAE). One layer, or two of equal length with `blend`. The picture is brought
    from the decoded size to height_px x width_px by `fit` (None: it has that size already)."""

    checkpoint: str
    layers: list[LayerParams]
    blend: BlendParams | None
    frames: int
    fps: list[int]
    """[numerator, denominator]."""
    height_px: int
    width_px: int
    fit: Fit | None
    codec: CodecParams


class FilmParams(TypedDict):
    """Join the units (all inputs, in order, `frames` each) by stream copy. Role `media`.

    The soundtrack is padded with silence or cut at the film's end: sum(unit_frames) / fps seconds.
    `title` and `recipe` (a JSON text, None with --strip) go into the file's metadata beside the AI-generated
    mark.
    """

    unit_frames: list[int]
    fps: list[int]
    codec: CodecParams
    soundtrack: MediaParams | None
    title: str
    recipe: str | None


def noise_seed(seed: int, noise_id: str, stage: Stage, latent_index: int, redo: int) -> int:
    """Seed (63 bits) of the generator that draws one absolute latent frame."""
    name = canonical_json([seed, noise_id, stage, latent_index, redo])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def noise_seeds(noise: NoiseParams | Mapping[str, Any]) -> list[int]:
    """One seed for each latent frame that `noise` covers, in order."""
    first, count = noise["first_latent"], noise["count"]
    return [
        noise_seed(noise["seed"], noise["noise_id"], noise["stage"], index, noise["redo"])
        for index in range(first, first + count)
    ]


def window_times(params: WindowParams | Mapping[str, Any]) -> list[float]:
    """For each refined frame of the window (padding left out), its time in stage-one frames of the window."""
    last = sum(piece["stop"] - piece["start"] for piece in params["stage_one"]) - 1
    ratio = params["frames_ratio"]
    return [min(frame / ratio, float(last)) for frame in range(params["frames"])]


def merge_weights(count: int) -> list[float]:
    """Weight of the later window at each latent of an overlap: a line from 0 to 1 that reaches neither."""
    return [(k + 1) / (count + 1) for k in range(count)]


def blend_weights(blend: BlendParams | Mapping[str, Any], frames: int) -> list[float]:
    """Weight of the second layer at each output frame of a crossfade unit."""
    return [(blend["first"] + k + 1) / (blend["total"] + 1) for k in range(frames)]


def expand_ranges(ranges: Sequence[Sequence[int]]) -> Iterator[int]:
    """The decoded frame behind each output frame of a layer, in order (never decreasing)."""
    for start, stop, times in ranges:
        for frame in range(start, stop):
            for _ in range(times):
                yield frame


def compress_frames(frames: Sequence[int]) -> list[list[int]]:
    """The shortest `ranges` that `expand_ranges` turns back into `frames` (never decreasing)."""
    ranges: list[list[int]] = []
    position = 0
    while position < len(frames):
        frame, times = frames[position], 1
        while position + times < len(frames) and frames[position + times] == frame:
            times += 1
        if ranges and ranges[-1][1] == frame and ranges[-1][2] == times:
            ranges[-1][1] = frame + 1
        else:
            ranges.append([frame, frame + 1, times])
        position += times
    return ranges


def front_frames(window: WindowParams | Mapping[str, Any]) -> int:
    """Decoded frames of a window that are padding: its frames are counted after them."""
    return int(window["front_latents"]) * _temporal(window)


def latent_of(window: WindowParams | Mapping[str, Any], decoded: int) -> int:
    """The latent of a window that holds a decoded frame, padding counted: latent 0 holds one frame."""
    return -(-decoded // _temporal(window))


def _temporal(window: WindowParams | Mapping[str, Any]) -> int:
    """Frames in one latent, from the numbers of a window's frames and latents."""
    latents: int = window["latents"] - window["front_latents"]
    return int(window["frames"] - 1) // (latents - 1)
