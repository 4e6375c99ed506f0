"""The storyboard: read strictly, every problem at once, with field, value and remedy."""

from __future__ import annotations

import json
import pickle
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import SpecError
from pipeline.spec import (
    CODECS,
    LARGEST_BYTES,
    StoryboardError,
    json_schema,
    load_spec,
    parse_spec,
    recipe_text,
)
from pipeline.spec_values import Duration, FrameSize, parse_duration, parse_frame_size, parse_rate

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.yaml"))
SHOT = {"duration": 5, "prompt": "a red circle"}


def problems_of(text: str) -> list[SpecError]:
    with pytest.raises(StoryboardError) as caught:
        parse_spec(text)
    return list(caught.value.problems)


def problem_with(**changes: Any) -> SpecError:
    """The one problem of a storyboard of one good shot with some fields changed."""
    problems = problems_of(json.dumps({"shots": [SHOT], **changes}))
    assert len(problems) == 1, problems
    return problems[0]


def problem_with_shot(*later: dict[str, Any], **changes: Any) -> SpecError:
    problems = problems_of(json.dumps({"shots": [{**SHOT, **changes}, *later]}))
    assert len(problems) == 1, problems
    return problems[0]


def test_the_least_storyboard_has_defaults() -> None:
    spec = parse_spec("shots: [{duration: 5, prompt: a red circle}]")
    assert (spec.checkpoint, spec.quality, spec.refinement, spec.seed) == ("pocket", "draft", "parallel", 0)
    assert spec.shots[0].prompt[0].prompt == "a red circle"
    assert spec.output.container == "mp4"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_valid_and_reads_back(path: Path) -> None:
    spec = load_spec(path)
    assert spec.checkpoint == "pocket"
    assert parse_spec(json.dumps(spec.as_written())) == spec


@pytest.mark.parametrize("indent", [None, "\t"])
def test_a_storyboard_may_be_json_with_any_character_and_tabs(indent: str | None) -> None:
    written = {"title": "Party 🎉", "shots": [{**SHOT, "prompt": "a 🎈 \x7f 𠮷"}]}
    loras = [{"file": "a.safetensors", "strength": 1e-5}]
    spec = parse_spec(json.dumps({**written, "loras": loras}, indent=indent))
    assert (spec.title, spec.shots[0].prompt[0].prompt) == ("Party 🎉", "a 🎈 \x7f 𠮷")
    assert spec.loras[0].strength == 1e-5
    assert parse_spec(json.dumps(spec.as_written())) == spec


def test_there_is_an_example_for_each_task() -> None:
    names = {path.stem for path in EXAMPLES}
    assert names >= {
        "text",
        "image",
        "continue_video",
        "prompts_over_time",
        "several_shots",
        "five_minutes",
        "demo",
    }


def test_every_problem_is_reported_at_once() -> None:
    problems = problems_of(
        """
titel: x
seed: -1
shots:
  - {duration: -3, prompt: a}
  - {prompt: b, transition: fade}
output: {size: 1281x720, codec: gif}
"""
    )
    assert [problem.field for problem in problems] == [
        "seed",
        "shots[0].duration",
        "shots[1].duration",
        "shots[1].transition",
        "output.size",
        "output.codec",
        "titel",
    ]
    assert all(problem.remedy for problem in problems)


def test_the_error_survives_pickling_with_all_its_problems() -> None:
    with pytest.raises(StoryboardError) as caught:
        parse_spec("{shots: [{duration: 5, prompt: a}], seed: -1, quality: best}")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert len(caught.value.problems) == 2
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"titel": "x"}, "titel", "Did you mean `title`"),
        ({"refinment": "none"}, "refinment", "Did you mean `refinement`"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": True}, "seed", "whole number"),
        ({"seed": 1.5}, "seed", "whole number"),
        ({"title": 2001}, "title", "quotes"),
        ({"quality": "best"}, "quality", "'draft' or 'full'"),
        ({"shots": []}, "shots", "at least one"),
        ({"shots": {"duration": 5}}, "shots", "list"),
        ({"loras": [{"file": "a.safetensors", "strength": "x"}]}, "loras[0].strength", "number"),
        ({"output": {"crf": 52}}, "output.crf", "0 (best) to 51"),
        ({"output": {"codec": "prores", "path": "a.mov", "crf": 10}}, "output.crf", "Remove"),
        ({"output": {"path": "a\0.mp4"}}, "output.path", "NUL"),
        ({"output": {"path": "a.gif"}}, "output.path", ".mp4 or .mov or .mkv"),
        ({"output": {"codec": "ffv1", "path": "a.mp4"}}, "output.path", ".mkv"),
        ({"output": {"codec": "prores", "path": "a.mkv"}}, "output.path", ".mov"),
        ({"output": {"fps": 0}}, "output.fps", "between 1 and 240"),
        ({"output": {"fps": "24/0"}}, "output.fps", "between 1 and 240"),
        ({"output": {"fps": 23.976024}}, "output.fps", "finer than a film can count"),
        ({"output": {"size": "1280"}}, "output.size", "1280x720"),
        ({"output": {"size": "1281x720"}}, "output.size", "even"),
        ({"output": {"fit": "crop"}}, "output.fit", "size"),
        ({"output": {"aspect": "16x9"}}, "output.aspect", "16:9"),
        ({"output": {"aspect": "16:9", "size": "1280x720"}}, "output.aspect", "Keep one"),
    ],
)
def test_a_wrong_field_is_named_with_a_remedy(changes: dict[str, Any], field: str, said: str) -> None:
    problem = problem_with(**changes)
    assert problem.field == field
    assert said in str(problem)


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"lenght": 5}, "shots[0].lenght", "Fields here"),
        ({"duration": -5}, "shots[0].duration", "is negative"),
        ({"duration": 0}, "shots[0].duration", "more than nothing"),
        ({"duration": "5 minutes"}, "shots[0].duration", "1m30s"),
        ({"duration": "25h"}, "shots[0].duration", "24h"),
        ({"duration": True}, "shots[0].duration", "not a duration"),
        ({"prompt": ""}, "shots[0].prompt[0].prompt", "Write some text"),
        ({"prompt": "  "}, "shots[0].prompt[0].prompt", "Write some text"),
        ({"prompt": []}, "shots[0].prompt", "at least one"),
        ({"prompt": False}, "shots[0].prompt", "in quotes"),
        ({"prompt": [{"at": "2s", "prompt": "a"}]}, "shots[0].prompt[0].at", "starts at 0"),
        ({"id": "Opening Shot"}, "shots[0].id", "a-z"),
        ({"id": "../x"}, "shots[0].id", "a-z"),
        ({"id": 1}, "shots[0].id", "in quotes"),
        ({"id": "a" * 64}, "shots[0].id", "63"),
        ({"image": "a.png", "video": "b.mp4"}, "shots[0]", "keep one"),
        ({"continue": "previous"}, "shots[0].continue", "no shot before"),
        ({"continue": "next"}, "shots[0].continue", "previous"),
        ({"transition": {"crossfade": 1}}, "shots[0].transition", "no shot to fade from"),
        ({"transition": "fade"}, "shots[0].transition", "crossfade: 0.5s"),
        ({"transition": {"crossfade": -1}}, "shots[0].transition.crossfade", "is negative"),
        ({"frame_of": {"shot": "x"}}, "shots[0].frame_of.shot", "no earlier shot"),
    ],
)
def test_a_wrong_field_of_a_shot_is_named_with_a_remedy(
    changes: dict[str, Any], field: str, said: str
) -> None:
    problem = problem_with_shot(**changes)
    assert problem.field == field
    assert said in str(problem)


def test_a_crossfade_into_a_continued_shot_is_refused() -> None:
    later = {**SHOT, "continue": "previous", "transition": {"crossfade": 1}}
    assert problem_with_shot(later).field == "shots[1].transition"


def test_an_id_is_given_once() -> None:
    problem = problem_with_shot({**SHOT, "id": "a"}, id="a")
    assert (problem.field, problem.value) == ("shots[1].id", "a")
    assert "shots[0]" in str(problem)


def test_a_frame_comes_from_a_shot_further_up() -> None:
    later = {**SHOT, "frame_of": {"shot": "b"}}
    assert "there: a" in str(problem_with_shot(later, {**SHOT, "id": "b"}, id="a"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2", "twice"),
        ("shots:\n  - {duration: 5, duration: 6, prompt: a}", "line 2"),
        ("a: [", "line 1"),
        ("[" * 1500, "nested too deeply"),
        ("x: &a [*a]", "too many values"),
        ("a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
         "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e]",
         "too many values"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: 2024-99-99", "not YAML"),
        ("? [1]\n: 2", "unhashable"),
        ("just text", "holds no storyboard"),
        ("", "holds no storyboard"),
    ],
)  # fmt: skip
def test_text_that_is_no_storyboard_gives_one_clear_message(text: str, said: str) -> None:
    problems = problems_of(text)
    assert len(problems) == 1
    assert said in str(problems[0])


def test_unreadable_files_are_spec_errors(tmp_path: Path) -> None:
    with pytest.raises(StoryboardError, match="No such file"):
        load_spec(tmp_path / "none.yaml")
    with pytest.raises(StoryboardError, match="cannot be read"):
        load_spec(tmp_path)
    (tmp_path / "big.yaml").write_bytes(b"#" * (LARGEST_BYTES + 1))
    with pytest.raises(StoryboardError, match="too large"):
        load_spec(tmp_path / "big.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StoryboardError, match="UTF-8"):
        load_spec(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        (5, 5),
        (2.5, Fraction(5, 2)),
        (0.1, Fraction(1, 10)),
        ("12s", 12),
        ("1m30s", 90),
        ("1h2m", 3720),
        ("1.5 s", Fraction(3, 2)),
        ("7", 7),
    ],
)
def test_durations_are_exact(written: object, seconds: Fraction) -> None:
    assert parse_duration(written) == Duration(Fraction(seconds))


def test_durations_count_frames_to_the_nearest() -> None:
    assert parse_duration("45f").frames_at(Fraction(24)) == 45
    assert parse_duration(0.1).frames_at(Fraction(30)) == 3
    assert parse_duration("1m30s").frames_at(Fraction(30000, 1001)) == 2697
    assert parse_duration("45f").seconds_at(Fraction(30)) == Fraction(3, 2)


@given(st.decimals(0, 80000, places=6))
def test_a_duration_reads_back_as_written(seconds: Decimal) -> None:
    duration = parse_duration(f"{seconds}s")
    assert duration.seconds == Fraction(seconds)
    assert parse_duration(str(duration)) == duration
    assert parse_duration("45f") == parse_duration(str(parse_duration("45f")))


def test_rates_and_sizes_are_exact() -> None:
    assert parse_rate(24) == 24
    assert parse_rate(29.97) == Fraction(30000, 1001)
    assert parse_rate(23.976) == Fraction(24000, 1001)
    assert parse_rate("24000/1001") == Fraction(24000, 1001)
    assert parse_rate(12.5) == Fraction(25, 2)
    assert parse_frame_size("1280 x 720") == parse_frame_size([1280, 720]) == FrameSize(1280, 720)


def test_every_codec_has_a_container_and_a_pixel_format() -> None:
    for name, codec in CODECS.items():
        container = codec.containers[0]
        output = parse_spec(json.dumps({"shots": [SHOT], "output": {"codec": name}})).output
        assert output.container == container
        assert (codec.crf is None) == (codec.crf_most is None)
    assert CODECS["h264"].pix_fmt == "yuv420p"
    assert CODECS["prores"].containers == ("mov",)


def test_the_schema_knows_every_way_to_write_a_field() -> None:
    schema = json_schema()
    json.dumps(schema)
    assert schema["additionalProperties"] is False
    shot = schema["$defs"]["Shot"]
    assert shot["required"] == ["duration", "prompt"]
    assert "continue" in shot["properties"]
    kinds = {option.get("type") for option in shot["properties"]["prompt"]["anyOf"]}
    assert kinds == {"string", "array"}
    assert all(not definition.get("additionalProperties", False) for definition in schema["$defs"].values())


def test_a_recipe_holds_the_storyboard_and_no_time() -> None:
    spec = parse_spec(json.dumps({"shots": [SHOT], "seed": 7}))
    recipe = json.loads(recipe_text(spec, {"longtake": "1"}))
    assert parse_spec(json.dumps(recipe["spec"])) == spec
    assert recipe["seed"] == 7
    assert recipe["versions"] == {"longtake": "1"}
    assert recipe_text(spec, {}) == recipe_text(spec, {})


def test_a_recipe_holds_of_memory_what_changes_the_film() -> None:
    shots = {"shots": [SHOT]}
    plain, in_turn, int8 = (
        recipe_text(parse_spec(json.dumps({**shots, "memory": memory})), {})
        for memory in ({}, {"networks": "in_turn", "condition_cache": "host"}, {"precision": "int8"})
    )
    assert in_turn == plain
    assert json.loads(int8)["spec"]["memory"] == {"precision": "int8"}


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        ({"precision": "int4"}, r"memory\.precision: is not a choice \(got 'int4'\)\. Write 'stored', 'weight_only'"),
        ({"network": "in_turn"}, r"memory\.network: .*Did you mean `networks`\?"),
        ("small", r"memory: .*Write `field: value` pairs"),
    ],
)
def test_memory_is_checked_like_any_field(memory: object, said: str) -> None:
    with pytest.raises(StoryboardError, match=said):
        parse_spec(json.dumps({"shots": [SHOT], "memory": memory}))


def test_media_paths_say_what_each_file_has_to_be() -> None:
    shots = [{**SHOT, "image": "a.png"}, {**SHOT, "video": "b.mp4"}, SHOT]
    spec = parse_spec(json.dumps({"shots": shots, "output": {"soundtrack": "c.wav"}}))
    assert spec.media_paths() == {"a.png": "image", "b.mp4": "video", "c.wav": "audio"}
