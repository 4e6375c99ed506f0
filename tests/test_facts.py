"""render.json: official values by default, every problem named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.denoising import make_schedule
from model.errors import InputError
from pipeline.errors import CheckpointFault
from pipeline.facts import RenderFacts, ScheduleName, load_render_facts, parse_render_facts


def test_a_folder_without_render_json_is_the_official_checkpoint(tmp_path: Path) -> None:
    facts = load_render_facts(tmp_path)
    assert facts == RenderFacts()
    assert (facts.segment_frames, facts.condition_frames, facts.refined_fps) == (93, 13, 30)
    assert facts.quality.draft.steps == 16
    assert facts.quality.draft.guidance == 1
    assert facts.quality.full.steps == 50
    assert facts.quality.full.continuation_schedule == "enhance_hf"


def test_size_tables_are_multiples_of_what_the_model_needs() -> None:
    facts = RenderFacts()
    assert all(side % 32 == 0 for size in facts.stage_one_sizes for side in size)
    assert all(side % 64 == 0 for size in facts.refined_sizes for side in size)


def test_render_json_overrides_only_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "render.json").write_text(json.dumps({"stage_one_sizes": [[64, 96]], "shift": 3}))
    facts = load_render_facts(tmp_path)
    assert facts.stage_one_sizes == [[64, 96]]
    assert facts.refined_sizes == RenderFacts().refined_sizes


def test_the_bundled_render_json_is_valid() -> None:
    folder = Path(__file__).parent.parent / "model" / "pocket"
    assert (folder / "render.json").exists()
    load_render_facts(folder)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"segmentframes": 93}, "segmentframes"),
        ({"segment_frames": 94}, "segment_frames"),
        ({"condition_frames": 14}, "condition_frames"),
        ({"condition_frames": 93}, "condition_frames"),
        ({"refined_fps": 31}, "refined_fps"),
        ({"stage_one_sizes": []}, "stage_one_sizes"),
        ({"stage_one_sizes": [[64, 100]]}, "[64, 100]"),
        ({"quality": {"draft": {"steps": 0}}}, "quality.draft.steps"),
        ({"quality": {"full": {"schedule": "refinement"}}}, "quality.full.schedule"),
        ({"refine": {"attention": "sparse"}}, "refine.attention"),
        ({"default_aspect": "16/9"}, "default_aspect"),
        ([], "render.json"),
    ],
)
def test_a_wrong_render_json_names_the_field(value: object, named: str) -> None:
    with pytest.raises(CheckpointFault) as caught:
        parse_render_facts(json.dumps(value))
    assert named in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["base", "distilled", "enhance_hf", "refinement"])
@pytest.mark.parametrize("steps", [1, 2, 50, 51])
@pytest.mark.parametrize("t_thresh", [0.5, 1.0])
def test_steps_that_the_sampler_would_refuse_are_refused_before_anything_is_loaded(
    name: ScheduleName, steps: int, t_thresh: float
) -> None:
    value = {"quality": {"draft": {"schedule": name, "steps": steps}}}
    if name == "refinement":
        value = {"refine": {"steps": steps, "t_thresh": t_thresh}}
    try:
        make_schedule({"name": name, "steps": steps, "shift": 12.0, "t_thresh": t_thresh})
    except InputError:
        with pytest.raises(CheckpointFault, match=r"steps|t_thresh"):
            parse_render_facts(json.dumps(value))
    else:
        parse_render_facts(json.dumps(value))


def test_render_json_that_is_not_json_says_so() -> None:
    with pytest.raises(CheckpointFault, match="not JSON"):
        parse_render_facts("{")
