"""What a plan needs to know about the world: the checkpoint, the media, and what the ledger overrides.

Contract: values only. Other rooms probe (media with ffprobe, the checkpoint with its digest) and hand the
results in as `Facts`, so that `plan` stays a pure function. `RenderFacts` is the schema of the optional
`render.json` in a checkpoint folder; every field has the official value as its default, so a folder without
the file is the official checkpoint. No code asks which checkpoint it is: it asks these numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import CheckpointFault
from pipeline.pace import Pace, published

StageOneSchedule = Literal["base", "distilled", "enhance_hf"]
ScheduleName = StageOneSchedule | Literal["refinement"]
Attention = Literal["dense", "block_sparse"]
MediaKind = Literal["image", "video", "audio"]
Size = Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=2, max_length=2)]
"""[height_px, width_px]."""

DISTILLED_LEVELS = 50
"""Noise levels that the few-step weights know; a distilled schedule takes some of them."""

REFINE_GRANULARITY = 4
"""Latent frames in one block of the sparse attention: refinement pads to multiples of it."""

STAGE_ONE_SIZES = [
    [320, 1216], [352, 1120], [384, 1024], [416, 960], [448, 864], [480, 832], [512, 768], [544, 736],
    [576, 672], [608, 640], [640, 608], [672, 576], [704, 544], [736, 544], [768, 512], [800, 480],
    [832, 480], [896, 448], [960, 416], [992, 384], [1056, 384], [1088, 352], [1184, 320], [1216, 320],
    [1248, 320], [1280, 320],
]  # fmt: skip
"""The 480p class, [height_px, width_px]."""

REFINED_SIZES = [
    [448, 2048], [512, 1792], [576, 1600], [640, 1408], [704, 1280], [768, 1216], [832, 1088], [896, 1024],
    [960, 960], [1024, 896], [1088, 832], [1152, 768], [1216, 768], [1280, 704], [1344, 704], [1408, 640],
    [1472, 640], [1536, 576], [1664, 576], [1856, 512], [1920, 512],
]  # fmt: skip
"""The 720p class, [height_px, width_px]; multiples of 64, so that the refined token grid divides by 4."""

NEGATIVE_PROMPT = (
    "washed out or oversaturated colours, too bright, too dark, flat light, blurry, out of focus, noise, "
    "compression blocks, ghosting, flicker, a frozen picture, jerky motion, things that melt, split or pop, "
    "wrong anatomy, extra fingers or limbs, distorted faces, crowded background, subtitles, captions, logos, "
    "watermarks, borders"
)
"""What guidance steers away from when neither a shot nor its checkpoint's `render.json` says something else.

`model.text` has the same words for those who use the model alone or train it: a test holds the two together.
"""


class Frozen(BaseModel):
    """A value object: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraChoice(Frozen):
    """A LoRA file inside the checkpoint folder, merged into a role's weights."""

    file: str
    strength: float = 1.0


class QualityFacts(Frozen):
    """How stage one is sampled at one quality."""

    loras: list[LoraChoice] = []
    steps: int = Field(default=16, ge=1, le=1000)
    schedule: StageOneSchedule = "distilled"
    continuation_schedule: StageOneSchedule | None = None
    """Schedule of every segment with continuation conditions; `None`: the same as `schedule`."""
    guidance: float = Field(default=1.0, ge=1.0)
    """CFG-zero scale; 1 means no negative prompt and one forward a step."""

    @model_validator(mode="after")
    def _has_steps_for_its_schedules(self) -> QualityFacts:
        """As `model.sampling` wants them, which would say so when a worker has loaded its weights."""
        for name in {self.schedule, self.continuation_schedule} - {None}:
            least, most = (1, DISTILLED_LEVELS) if name == "distilled" else (2, 1000)
            if not least <= self.steps <= most:
                raise ValueError(f"steps must be {least} to {most} for the schedule {name}")
        return self


DRAFT = QualityFacts(loras=[LoraChoice(file="lora/cfg_step_lora.safetensors")])
FULL = QualityFacts(steps=50, schedule="base", continuation_schedule="enhance_hf", guidance=4.0)


class Qualities(Frozen):
    draft: QualityFacts = DRAFT
    full: QualityFacts = FULL


class RefineFacts(Frozen):
    """How stage two is sampled."""

    loras: list[LoraChoice] = [LoraChoice(file="lora/refinement_lora.safetensors")]
    steps: int = Field(default=50, ge=2, le=1000)
    t_thresh: float = Field(default=0.5, gt=0, lt=1)
    """Share of noise that refinement starts from."""
    attention: Attention = "block_sparse"


class RenderFacts(Frozen):
    """`render.json`: what differs between checkpoints beyond the weights' own configs. Sizes in px."""

    segment_frames: int = Field(default=93, ge=5)
    condition_frames: int = Field(default=13, ge=5)
    stage_one_fps: int = Field(default=15, ge=1)
    refined_fps: int = Field(default=30, ge=1)
    vae_spatial: int = Field(default=8, ge=1)
    vae_temporal: int = Field(default=4, ge=1)
    latent_channels: int = Field(default=16, ge=1)
    patch: int = Field(default=2, ge=1)
    stage_one_sizes: list[Size] = Field(default=STAGE_ONE_SIZES, min_length=1)
    refined_sizes: list[Size] = Field(default=REFINED_SIZES, min_length=1)
    default_aspect: str = Field(default="16:9", pattern=r"^[1-9]\d{0,4}:[1-9]\d{0,4}$")
    """Width to height of a film whose storyboard names no size and no aspect."""
    quality: Qualities = Qualities()
    refine: RefineFacts = RefineFacts()
    chain_attention: Attention = "dense"
    shift: float = Field(default=12.0, gt=0)
    negative_prompt: str = NEGATIVE_PROMPT
    task_seconds: dict[str, dict[str, float]] = {}
    """Measured seconds by device kind (`cpu`, `cuda`) and task kind, at draft quality and the default
    size."""

    @model_validator(mode="after")
    def _fits_together(self) -> RenderFacts:
        for name in ("segment_frames", "condition_frames"):
            if (getattr(self, name) - 1) % self.vae_temporal:
                raise ValueError(f"{name} must be 1 + a multiple of vae_temporal ({self.vae_temporal})")
        if self.condition_frames >= self.segment_frames:
            raise ValueError("condition_frames must be smaller than segment_frames")
        if self.refined_fps % self.stage_one_fps:
            raise ValueError("refined_fps must be a multiple of stage_one_fps")
        step_px = self.vae_spatial * self.patch
        for size in [*self.stage_one_sizes, *self.refined_sizes]:
            if size[0] % step_px or size[1] % step_px:
                raise ValueError(f"size {size} must be multiples of {step_px}")
        return self


@dataclass(frozen=True)
class CheckpointFacts:
    """A checkpoint folder. `digest` is the sha256 over its files: the identity that task ids carry."""

    path: str
    digest: str
    render: RenderFacts = field(default_factory=RenderFacts)


@dataclass(frozen=True)
class MediaFacts:
    """One probed image, video or soundtrack. Fields that its kind lacks are 0.

    `duration_s` of a video is the end of its last frame, counted from the time stamp of its first frame.
    """

    path: str
    sha256: str
    kind: MediaKind
    width_px: int = 0
    height_px: int = 0
    fps: float = 0.0
    duration_s: float = 0.0
    frame_count: int = 0
    has_audio: bool = False


@dataclass(frozen=True)
class ShotLock:
    """What stands for a locked shot. Fields as in `pipeline.journal.ShotLocked`."""

    tasks: Mapping[str, str]
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Overrides:
    """What people and the quality gate have changed about a plan since: the ledger's part of it.

    redo: for each slot (a task's `label`, such as `opening/segment/3`), how often it was sent back.
    picked: for each shot, which of its takes the film shows, counted from 1.
    locks: for each locked shot, the tasks that stand for it; only those that are committed.
    """

    redo: Mapping[str, int] = field(default_factory=dict)
    picked: Mapping[str, int] = field(default_factory=dict)
    locks: Mapping[str, ShotLock] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """Everything `plan_film` knows beyond the storyboard.

    media: for each path as the storyboard writes it (`Storyboard.media_paths`), what was probed.
    loras: for each LoRA path as the storyboard writes it, the file's sha256.
    redo, picked, locks: as in `Overrides`.
    pace: how fast the workers are expected to be, for the estimate only.
    """

    checkpoint: CheckpointFacts
    media: Mapping[str, MediaFacts] = field(default_factory=dict)
    loras: Mapping[str, str] = field(default_factory=dict)
    redo: Mapping[str, int] = field(default_factory=dict)
    pace: Pace = field(default_factory=published)
    picked: Mapping[str, int] = field(default_factory=dict)
    locks: Mapping[str, ShotLock] = field(default_factory=dict)


def load_render_facts(folder: str | Path) -> RenderFacts:
    """`<folder>/render.json`, or the official values where there is none. Raises CheckpointFault."""
    path = Path(folder) / "render.json"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return RenderFacts()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointFault(f"cannot be read: {error}", field=str(path)) from error
    return parse_render_facts(text, str(path))


def parse_render_facts(text: str, name: str = "render.json") -> RenderFacts:
    """The facts in a `render.json` text; every problem in one CheckpointFault that starts with `name`."""
    try:
        return RenderFacts.model_validate(json.loads(text))
    except json.JSONDecodeError as error:
        raise CheckpointFault(f"is not JSON: {error}", field=name, remedy="Correct or remove it.") from error
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'numbers'}: {item['msg']}" for item in error.errors()
        )
        raise CheckpointFault(problems, field=name, remedy="Correct the fields named.") from error
