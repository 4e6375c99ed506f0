"""The storyboard: what a person writes to order a film, read and checked.

Contract: `load_spec(path)` returns a `Storyboard` or raises one `StoryboardError` (a SpecError) that lists
every problem that can be seen in the text alone, each with its field, value and remedy. What needs facts
(media, the checkpoint's numbers, frame counts) is checked by `pipeline.plan.plan_film` in the same way.
Nothing here opens a file other than the storyboard. Paths in a storyboard are relative to the folder the
command runs in.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_serializer,
)
from pydantic_core import ErrorDetails

from pipeline.errors import SpecError
from pipeline.spec_values import (
    Duration,
    FrameSize,
    parse_aspect,
    parse_duration,
    parse_frame_size,
    parse_id,
    parse_length,
    parse_rate,
    refuse,
)

LARGEST_BYTES = 1 << 20
"""A storyboard file above this is refused unread."""
MOST_VALUES = 200_000
"""Values in a storyboard once its aliases are written out."""
_NO_STORYBOARD = "Write `title:`, `shots:` and so on; see examples/."


@dataclass(frozen=True)
class Codec:
    """A row of the codec table: what the codec can go into and how its pixels are stored.

    `containers` are extensions without the dot, the usual one first. `crf_most` and `crf` (the default) are
    None where the codec has no constant-quality factor.
    """

    containers: tuple[str, ...]
    pix_fmt: str
    crf_most: int | None = None
    crf: int | None = None


CODECS: Mapping[str, Codec] = {
    "h264": Codec(("mp4", "mov", "mkv"), "yuv420p", 51, 18),
    "hevc": Codec(("mp4", "mov", "mkv"), "yuv420p", 51, 20),
    "av1": Codec(("mp4", "mkv"), "yuv420p", 63, 26),
    "prores": Codec(("mov",), "yuv422p10le"),
    "ffv1": Codec(("mkv",), "yuv444p"),
}


class StoryboardError(SpecError):
    """Every problem found, in `problems`; its text lists them all."""

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        value: object = None,
        remedy: str = "",
        problems: tuple[SpecError, ...] = (),
    ) -> None:
        super().__init__(message, field=field, value=value, remedy=remedy)
        self.problems = problems or (SpecError(message, field=field, value=value, remedy=remedy),)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        return "\n".join(
            [f"{len(self.problems)} problems:", *(f"  - {problem}" for problem in self.problems)]
        )

    def __reduce__(self) -> tuple[object, ...]:
        return (storyboard_error, (self.problems,))


def storyboard_error(problems: tuple[SpecError, ...] | list[SpecError]) -> StoryboardError:
    """One error for all `problems` (at least one); its own field, value and remedy are those of the first."""
    first = problems[0]
    return StoryboardError(
        first.message, field=first.field, value=first.value, remedy=first.remedy, problems=tuple(problems)
    )


def _prompt_list(value: object) -> object:
    if isinstance(value, bool | int | float):
        raise refuse("is not text", "Write it in quotes.")
    return [{"at": 0, "prompt": value}] if isinstance(value, str) else value


def _transition_fields(value: object) -> object:
    if value == "cut":
        return {}
    if isinstance(value, str):
        raise refuse("is not a transition", "Write `cut`, or `{crossfade: 0.5s}`.")
    return value


def _file_name(value: str) -> str:
    if "\0" in value:
        raise refuse("is no name of a file", "Take the NUL character out.")
    return value


_Text = Annotated[str, Field(max_length=20_000)]
_Written = PlainSerializer(str, return_type=str)
_Moment = Annotated[Duration, PlainValidator(parse_duration, json_schema_input_type=float | str), _Written]
_Length = Annotated[Duration, PlainValidator(parse_length, json_schema_input_type=float | str), _Written]
_Rate = Annotated[Fraction, PlainValidator(parse_rate, json_schema_input_type=float | str), _Written]
_PictureSize = Annotated[
    FrameSize, PlainValidator(parse_frame_size, json_schema_input_type=str | list[int]), _Written
]
_Id = Annotated[str, PlainValidator(parse_id, json_schema_input_type=str)]
_Path = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_file_name)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Lora(_Strict):
    """A LoRA file (safetensors, official key format) merged into the weights of both stages."""

    file: _Path
    strength: float = Field(default=1.0, ge=-10, le=10, allow_inf_nan=False)


class PromptAt(_Strict):
    """A prompt, and from when on in the shot it is wished for."""

    at: _Moment = Duration()
    prompt: Annotated[str, Field(min_length=1, max_length=20_000, pattern=r"\S")]


class FrameOf(_Strict):
    """A frame of an earlier shot to start from: at a time in that shot, or its last one."""

    shot: _Id
    at: _Moment | None = None
    frame: Literal["last"] | None = None


class Transition(_Strict):
    """How the shot begins: `cut` (nothing set) or a crossfade over `crossfade` with the shot before."""

    crossfade: _Length | None = None

    @model_serializer
    def _as_written(self) -> str | dict[str, str]:
        return "cut" if self.crossfade is None else {"crossfade": str(self.crossfade)}


class Shot(_Strict):
    """One shot. At most one of `image`, `video`, `frame_of` and `continue`; none of them: from text alone."""

    id: _Id | None = None
    duration: _Length
    prompt: Annotated[
        list[PromptAt],
        Field(min_length=1, max_length=10_000),
        BeforeValidator(_prompt_list, json_schema_input_type=str | list[PromptAt]),
    ]
    negative_prompt: _Text | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    image: _Path | None = None
    video: _Path | None = None
    """A video that the shot goes on from, where it ends."""
    frame_of: FrameOf | None = None
    continues: Literal["previous"] | None = Field(default=None, alias="continue")
    transition: Annotated[
        Transition,
        BeforeValidator(_transition_fields, json_schema_input_type=Literal["cut"] | Transition),
    ] = Transition()

    def starts(self) -> dict[str, object]:
        """What the shot starts from, by field name as written; None where not given."""
        return {
            "image": self.image,
            "video": self.video,
            "frame_of": self.frame_of,
            "continue": self.continues,
        }


class Output(_Strict):
    """The file to make. Without `size` the film has the checkpoint's size closest to `aspect`."""

    path: _Path | None = None
    size: _PictureSize | None = None
    aspect: Annotated[str, PlainValidator(parse_aspect, json_schema_input_type=str)] | None = None
    """Width to height, such as 16:9; said by `size` where that is given."""
    fit: Literal["crop", "pad", "scale"] | None = None
    """How a picture of another shape is brought to `size`."""
    fps: _Rate | None = None
    codec: Literal["h264", "hevc", "av1", "prores", "ffv1"] = "h264"
    crf: int | None = Field(default=None, ge=0)
    soundtrack: _Path | None = None

    @property
    def container(self) -> str:
        """Extension of the film's file, without the dot."""
        suffix = PurePosixPath(self.path or "").suffix.lstrip(".").lower()
        return suffix or CODECS[self.codec].containers[0]


class Memory(_Strict):
    """How much of a card's memory the transformer gets by with. Only `precision` changes the film, and it belongs to
    the numerics record; where things lie changes no bit.
    """

    precision: Literal["stored", "weight_only", "int8", "fp8"] = "stored"
    """Of the transformer's Linears. `stored`: as in the checkpoint. `weight_only`: weights in int8, products as before.
    `int8`, `fp8`: the large ones multiply in that type, too."""
    networks: Literal["together", "in_turn"] = "together"
    """Whether transformer and VAE are on the card together, or each waits in host memory while the other one works."""
    condition_cache: Literal["card", "host"] = "card"
    """Where keys and values of the given frames are kept between steps."""


class Storyboard(_Strict):
    """A film as ordered."""

    title: Annotated[str, Field(min_length=1, max_length=200)] = "Untitled"
    seed: int = Field(default=0, ge=0, lt=2**63)
    checkpoint: _Path = "pocket"
    """`pocket` (the bundled one), a folder, or a hub id."""
    quality: Literal["draft", "full"] = "draft"
    refinement: Literal["parallel", "chained", "none"] = "parallel"
    loras: list[Lora] = Field(default=[], max_length=16)
    look: _Text = ""
    """Text joined to each prompt."""
    memory: Memory = Memory()
    shots: list[Shot] = Field(min_length=1, max_length=10_000)
    output: Output = Output()

    def media_paths(self) -> dict[str, Literal["image", "video", "audio"]]:
        """Every image, video and soundtrack the storyboard names, and what it has to be."""
        paths: dict[str, Literal["image", "video", "audio"]] = {}
        for shot in self.shots:
            if shot.image:
                paths[shot.image] = "image"
            if shot.video:
                paths[shot.video] = "video"
        if self.output.soundtrack:
            paths[self.output.soundtrack] = "audio"
        return paths

    def media_field(self, path: str) -> str:
        """The first field that names this file, as errors write it: `shots[0].image`."""
        for index, shot in enumerate(self.shots):
            for name in ("image", "video"):
                if getattr(shot, name) == path:
                    return f"shots[{index}].{name}"
        return "output.soundtrack"

    def as_written(self) -> dict[str, Any]:
        """What `parse_spec` reads back into an equal storyboard: JSON-able, defaults left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)


def name_of(title: str) -> str:
    """What a title's folder and film are called: its letters and digits in whatever script, joined by dashes."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", title).lower())
    return "-".join(words)[:60] or "film"


def load_spec(path: str | Path) -> Storyboard:
    """The storyboard in a YAML (or JSON) file. Raises StoryboardError."""
    return parse_spec(_read_text(path), str(path))


def load_template(path: str | Path) -> dict[str, Any]:
    """What a YAML (or JSON) file holds that will be a storyboard once its variables are filled in: JSON-able.

    Raises StoryboardError.
    """
    data = _parse_yaml(_read_text(path), str(path))
    try:
        json.dumps(data, allow_nan=False)
    except (TypeError, ValueError) as error:
        remedy = "Write texts that look like dates in quotes."
        raise StoryboardError(f"holds no plain value: {error}", field=str(path), remedy=remedy) from None
    if not isinstance(data, dict):
        raise StoryboardError("holds no storyboard", field=str(path), remedy=_NO_STORYBOARD)
    return data


def _read_text(path: str | Path) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_BYTES + 1)
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise StoryboardError(message, field=str(path), remedy="Name a storyboard file.") from error
    if len(data) > LARGEST_BYTES:
        raise StoryboardError(
            "is too large for a storyboard", field=str(path), remedy=f"Stay below {LARGEST_BYTES} bytes."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StoryboardError("is not UTF-8 text", field=str(path), remedy="Save it as UTF-8.") from error


def parse_spec(text: str, name: str = "storyboard") -> Storyboard:
    """The storyboard in a YAML or JSON text; `name` names it in errors. Raises StoryboardError."""
    data = _parse_yaml(text, name)
    if not isinstance(data, dict):
        raise StoryboardError("holds no storyboard", field=name, remedy=_NO_STORYBOARD)
    try:
        spec = Storyboard.model_validate(data)
    except ValidationError as error:
        raise storyboard_error([_problem(item) for item in error.errors()]) from None
    problems = find_problems(spec)
    if problems:
        raise storyboard_error(problems)
    return spec


def json_schema() -> dict[str, Any]:
    """The storyboard's JSON schema, for editors."""
    schema = Storyboard.model_json_schema(by_alias=True, mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe subset without duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _json_fields(text: str) -> dict[str, Any] | None:
    """The fields of a text that is JSON; None for any other, and for what YAML's reader finds the place of.

    YAML's reader takes most of JSON, but not tabs, `1e-05`, or a character beyond U+FFFF, which JSON escapes as two.
    """
    if not text.lstrip().startswith("{"):
        return None
    try:
        return dict(json.loads(text, object_pairs_hook=_single_keys))
    except (ValueError, RecursionError):
        return None


def _single_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key is there twice")
    return fields


def _parse_yaml(text: str, name: str) -> Any:
    try:
        data = _json_fields(text) or yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}, line {mark.line + 1}, column {mark.column + 1}" if mark else name
        problem = error.problem or error.context or "not YAML"
        raise StoryboardError(problem, field=where, remedy="Correct the YAML there.") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise StoryboardError(f"is not YAML: {error}", field=name, remedy="Correct the YAML.") from None
    except RecursionError:
        raise StoryboardError("is nested too deeply", field=name, remedy="Write it flat.") from None
    if _count_values(data) > MOST_VALUES:
        raise StoryboardError("holds too many values", field=name, remedy="Use fewer aliases.")
    return data


def _count_values(data: Any) -> int:
    """Values in `data` with aliases written out; stops above MOST_VALUES (aliases can make them endless)."""
    count, pending = 0, [data]
    while pending and count <= MOST_VALUES:
        value = pending.pop()
        count += 1
        if isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value[: MOST_VALUES + 1])
    return count


_MODELS: Mapping[str, type[BaseModel]] = {
    "": Storyboard,
    "loras": Lora,
    "shots": Shot,
    "prompt": PromptAt,
    "frame_of": FrameOf,
    "transition": Transition,
    "memory": Memory,
    "output": Output,
}

_MESSAGES = {
    "missing": "is missing",
    "extra_forbidden": "is not a field",
    "literal_error": "is not a choice",
    "string_type": "is not text",
    "int_type": "is not a whole number",
    "float_type": "is not a number",
    "list_type": "is not a list",
    "model_type": "is not a set of fields",
    "model_attributes_type": "is not a set of fields",
    "string_too_short": "is empty",
    "string_pattern_mismatch": "is empty",
    "too_short": "is empty",
}

_REMEDIES = {
    "missing": "Add it.",
    "string_type": "Write text, in quotes if it looks like a number or a date.",
    "string_too_short": "Write some text.",
    "string_pattern_mismatch": "Write some text.",
    "string_too_long": "Write less.",
    "int_type": "Write a whole number.",
    "float_type": "Write a number.",
    "list_type": "Write a list, one `- ` for each item.",
    "model_type": "Write `field: value` pairs.",
    "model_attributes_type": "Write `field: value` pairs.",
    "too_short": "Add at least one.",
    "too_long": "Make it shorter.",
}


def _problem(item: ErrorDetails) -> SpecError:
    """One pydantic error in the project's words."""
    kind, place = item["type"], item["loc"]
    context = item.get("ctx") or {}
    value = None if kind == "missing" else item["input"]
    message = _MESSAGES.get(kind) or item["msg"][0].lower() + item["msg"][1:]
    remedy = str(context.get("remedy") or _REMEDIES.get(kind, ""))
    if kind == "extra_forbidden":
        remedy = _nearest_field(place)
    elif kind == "literal_error":
        remedy = f"Write {context.get('expected')}."
    elif not remedy:
        message, remedy = "is out of range", f"{item['msg']}."
    return SpecError(message, field=dotted(place), value=_short(value), remedy=remedy)


def _nearest_field(place: tuple[int | str, ...]) -> str:
    names = [part for part in place[:-1] if isinstance(part, str)]
    model = _MODELS.get(names[-1] if names else "", Storyboard)
    fields = [info.alias or name for name, info in model.model_fields.items()]
    close = difflib.get_close_matches(str(place[-1]), fields, 1)
    return f"Did you mean `{close[0]}`?" if close else f"Fields here: {', '.join(fields)}."


def _short(value: Any) -> Any:
    """A value fit for a message."""
    text = value if isinstance(value, str) else repr(value)
    return value if len(text) <= 80 else f"{text[:77]}..."


def dotted(place: tuple[int | str, ...] | list[int | str]) -> str:
    """`("shots", 2, "duration")` as `shots[2].duration`."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".")


def find_problems(spec: Storyboard) -> list[SpecError]:
    """What is wrong between the fields of a storyboard, facts left aside."""
    problems: list[SpecError] = []
    ids: dict[str, int] = {}
    for index, shot in enumerate(spec.shots):
        place = f"shots[{index}]"
        problems += _start_problems(shot, place, ids) + _order_problems(shot, place, index == 0)
        if shot.id is not None and shot.id in ids:
            message = f"is also the id of shots[{ids[shot.id]}]"
            problems.append(wrong(f"{place}.id", message, "Give each shot its own id.", shot.id))
        elif shot.id is not None:
            ids[shot.id] = index
    return problems + _output_problems(spec.output)


def wrong(field: str, message: str, remedy: str, value: object = None) -> SpecError:
    """A problem with one field."""
    return SpecError(message, field=field, value=value, remedy=remedy)


def _start_problems(shot: Shot, place: str, earlier: Mapping[str, int]) -> list[SpecError]:
    problems = []
    given = [name for name, value in shot.starts().items() if value is not None]
    if len(given) > 1:
        remedy = "A shot starts from one thing: keep one of them."
        problems.append(wrong(place, f"has {' and '.join(given)} at once", remedy))
    reference = shot.frame_of
    if reference and reference.shot not in earlier:
        remedy = f"Name the written id of a shot further up (there: {', '.join(earlier) or 'none'})."
        problems.append(wrong(f"{place}.frame_of.shot", "is no earlier shot", remedy, reference.shot))
    if reference and reference.at is not None and reference.frame is not None:
        problems.append(wrong(f"{place}.frame_of", "has at and frame at once", "Keep one of them."))
    return problems


def _order_problems(shot: Shot, place: str, is_first: bool) -> list[SpecError]:
    problems = []
    if is_first and shot.continues:
        remedy = "Remove it, or continue a file with `video:`."
        problems.append(wrong(f"{place}.continue", "has no shot before it", remedy, "previous"))
    start = shot.prompt[0].at
    if start.frames or start.seconds:
        remedy = "The first prompt starts at 0."
        problems.append(wrong(f"{place}.prompt[0].at", "leaves the beginning without", remedy, str(start)))
    fade = shot.transition.crossfade
    if fade is not None and is_first:
        remedy = "Start with `cut`."
        problems.append(wrong(f"{place}.transition", "has no shot to fade from", remedy, str(fade)))
    elif fade is not None and shot.continues:
        remedy = "Use `cut` (nothing is cut: the take goes on), or start the shot on its own."
        message = "cannot fade into a shot that continues the one before"
        problems.append(wrong(f"{place}.transition", message, remedy, str(fade)))
    return problems


def _output_problems(output: Output) -> list[SpecError]:
    problems = []
    name, codec = output.codec, CODECS[output.codec]
    if output.container not in codec.containers:
        remedy = f"Let the name end in {' or '.join('.' + ending for ending in codec.containers)}."
        problems.append(wrong("output.path", f"is no container for {name}", remedy, output.path))
    if output.crf is not None and codec.crf_most is None:
        problems.append(wrong("output.crf", f"means nothing to {name}", "Remove it.", output.crf))
    elif output.crf is not None and codec.crf_most is not None and output.crf > codec.crf_most:
        remedy = f"Write 0 (best) to {codec.crf_most}."
        problems.append(wrong("output.crf", f"is out of range for {name}", remedy, output.crf))
    if output.fit is not None and output.size is None:
        problems.append(wrong("output.fit", "has nothing to fit to", "Add `size:` or remove it.", output.fit))
    if output.aspect is not None and output.size is not None:
        remedy = "Keep one of them."
        problems.append(wrong("output.aspect", "is said by the size already", remedy, output.aspect))
    return problems


def recipe_text(spec: Storyboard, versions: Mapping[str, str]) -> str:
    """The recipe a film carries in its metadata, one line of JSON: `spec` (what `parse_spec` reads), `seed`
    and `versions` of the software. No times, and of `memory` only what the film depends on, so that the same film has
    the same bytes."""
    shown = spec.model_copy(update={"memory": Memory(precision=spec.memory.precision)})
    recipe = {"spec": shown.as_written(), "seed": spec.seed, "versions": dict(versions)}
    return json.dumps(recipe, sort_keys=True, ensure_ascii=False)
