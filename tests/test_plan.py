"""The plan: which frames are made from what, what the film shows, and what an edit costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import SettingError
from pipeline.facts import CheckpointFacts, Facts, MediaFacts, RenderFacts, load_render_facts
from pipeline.graph import TaskGraph
from pipeline.pace import measured
from pipeline.plan import (
    Plan,
    blend_weights,
    expand_ranges,
    merge_weights,
    noise_seed,
    noise_seeds,
    plan_film,
    window_times,
)
from pipeline.plan_tasks import Inputs, Stretch, latents_of_line, pieces_of
from pipeline.spec import Storyboard, StoryboardError, load_spec, parse_spec
from pipeline.tasks import NAME_PATTERN, Task, canonical_json

ROOT = Path(__file__).parent.parent
IMAGE = MediaFacts("a.png", "a" * 64, "image", 1280, 704)
VIDEO = MediaFacts("v.mp4", "b" * 64, "video", 1280, 704, 24.0, 5.0, 120)
SOUND = MediaFacts("s.wav", "c" * 64, "audio", duration_s=9.0, has_audio=True)
MEDIA = {"a.png": IMAGE, "v.mp4": VIDEO, "s.wav": SOUND}
OFFICIAL = Facts(CheckpointFacts("/checkpoint", "d" * 64), MEDIA, {"style.safetensors": "e" * 64})


def film(*shots: dict[str, Any], **fields: Any) -> Storyboard:
    return parse_spec(json.dumps({"shots": list(shots), **fields}))


def shot(duration: object, prompt: object = "a red circle", **fields: Any) -> dict[str, Any]:
    return {"duration": duration, "prompt": prompt, **fields}


def plan(*shots: dict[str, Any], facts: Facts = OFFICIAL, **fields: Any) -> Plan:
    return plan_film(film(*shots, **fields), facts)


def tasks_of(planned: Plan, kind: str) -> list[Task]:
    return [task for task in planned.tasks.values() if task.kind == kind]


def gpu_ids(planned: Plan) -> set[str]:
    return {task.id for task in planned.tasks.values() if task.kind in ("segment", "window")}


def named(planned: Plan, label: str) -> Task:
    return next(task for task in planned.tasks.values() if task.label == label)


def problem(*shots: dict[str, Any], facts: Facts = OFFICIAL, **fields: Any) -> str:
    with pytest.raises(StoryboardError) as caught:
        plan(*shots, facts=facts, **fields)
    assert len(caught.value.problems) == 1, str(caught.value)
    return str(caught.value)


# --- the oracle: what each frame of the film must show, worked out frame by frame


def nearest_native(output: int, native: Fraction, fps: Fraction) -> int:
    """The native frame nearest in time to an output frame, the earlier of two, by looking at all around."""
    time = output / fps
    around = range(max(0, int(time * native) - 2), int(time * native) + 3)
    return min(around, key=lambda frame: (abs(frame / native - time), frame))


def expected_film(
    spec: Storyboard, native: Fraction, fps: Fraction, lead_in: int
) -> list[list[tuple[str, int]]]:
    """For each film frame, the (take, native frame) it shows: one, or two in a crossfade. Shots have written
    ids.
    """
    frames: list[list[tuple[str, int]]] = []
    take, position, offset = "", 0, 0
    for item in spec.shots:
        if not item.continues:
            take, position, offset = item.id or "", 0, lead_in if item.video else 0
        length = item.duration.frames_at(fps)
        own = [(take, offset + nearest_native(position + k, native, fps)) for k in range(length)]
        position += length
        fade = item.transition.crossfade.frames_at(fps) if item.transition.crossfade else 0
        for k in range(fade):
            frames[len(frames) - fade + k].append(own[k])
        frames += [[frame] for frame in own[fade:]]
    return frames


def shown_frames(planned: Plan, facts: RenderFacts) -> list[list[tuple[str, int]]]:
    """What the plan's units show, in film order, read from the parameters of the encode tasks."""
    frames: list[list[tuple[str, int]]] = []
    for task_id in planned.tasks[planned.film_task_id].inputs:
        unit = planned.tasks[task_id]
        layers = []
        for layer in unit.params["layers"]:
            made = planned.tasks[unit.inputs[layer["input"]]]
            decoded = list(expand_ranges(layer["ranges"]))
            assert len(decoded) == unit.params["frames"]
            layers.append([take_frame(planned, made, frame, facts) for frame in decoded])
        assert (unit.params["blend"] is not None) == (len(layers) == 2)
        frames += [list(pair) for pair in zip(*layers, strict=True)]
    return frames


def take_frame(planned: Plan, made: Task, decoded: int, facts: RenderFacts) -> tuple[str, int]:
    """(take, native frame) of a decoded frame of a segment or window."""
    if made.kind == "window":
        frame = decoded - facts.vae_temporal * made.params["front_latents"]
        assert 0 <= frame < made.params["frames"]
        hop = (facts.segment_frames - facts.condition_frames) * facts.refined_fps // facts.stage_one_fps
        return made.shot_id, made.index * hop + frame
    assert decoded < facts.segment_frames
    take = next(take for take in planned.takes if any(place.id == made.shot_id for place in take.shots))
    return take.id, segment_starts(planned)[made.id] + decoded


def segment_starts(planned: Plan) -> dict[str, int]:
    """For each segment, the stage-one frame of its take at which it begins, followed from hand-off to
    hand-off.
    """
    starts: dict[str, int] = {}
    for task in tasks_of(planned, "segment"):
        conditions = task.params["conditions"]
        starts[task.id] = 0
        if conditions:
            before = task.inputs[conditions[0]["input"]]
            starts[task.id] = starts.get(before, 0) + conditions[0]["start"]
    return starts


def piece_frames(
    planned: Plan, task: Task, pieces: list[dict[str, int]], starts: Mapping[str, int]
) -> list[int]:
    """The stage-one frames of the take that pieces name."""
    frames: list[int] = []
    for piece in pieces:
        source = planned.tasks[task.inputs[piece["input"]]]
        assert piece["start"] < piece["stop"]
        if source.kind == "segment":
            assert (
                piece["start"] >= source.params["condition_frames"] or source.params["condition_frames"] <= 1
            )
            assert piece["stop"] <= source.params["segment_frames"]
        start = starts.get(source.id, 0)
        frames += range(start + piece["start"], start + piece["stop"])
    return frames


def check_plan(planned: Plan, spec: Storyboard, facts: RenderFacts) -> None:
    """Everything that holds for every plan of a whole film."""
    native = facts.stage_one_fps if spec.refinement == "none" else facts.refined_fps
    lead_in = facts.condition_frames * native // facts.stage_one_fps
    expected = expected_film(spec, Fraction(native), planned.fps, lead_in)
    shown = shown_frames(planned, facts)
    assert len(shown) == len(expected) == planned.film_frames
    for got, wanted in zip(shown, expected, strict=True):
        assert got == wanted or is_held_last_frame(planned, got, wanted, facts)
    check_graph(planned)
    check_hand_offs(planned, facts)
    check_merges(planned, facts)


def is_held_last_frame(
    planned: Plan, got: list[tuple[str, int]], wanted: list[tuple[str, int]], facts: RenderFacts
) -> bool:
    """Beyond the last stage-one time of a take's last window its last frame is held."""
    ratio = facts.refined_fps // facts.stage_one_fps
    ends = {take.id: ratio * take.available for take in planned.takes}
    return all(
        mine == theirs
        or (theirs[1] - ratio < mine[1] < theirs[1] and theirs[1] >= ends[theirs[0]] - ratio + 1)
        for mine, theirs in zip(got, wanted, strict=True)
    )


def check_graph(planned: Plan) -> None:
    seen: set[str] = set()
    for name, task in planned.tasks.items():
        assert name == task.id == Task.identify(task.kind, task.params, task.inputs)
        assert set(task.inputs) <= seen
        assert json.loads(canonical_json(task.params)) == task.params
        assert task.work > 0
        seen.add(name)
    assert list(planned.tasks)[-1] == planned.film_task_id


def check_hand_offs(planned: Plan, facts: RenderFacts) -> None:
    starts = segment_starts(planned)
    for task in tasks_of(planned, "segment"):
        if task.params["condition_frames"] == facts.condition_frames:
            frames = piece_frames(planned, task, task.params["conditions"], starts)
            assert frames == list(range(starts[task.id], starts[task.id] + facts.condition_frames))
            check_latents(planned, task, facts)
        else:
            assert not task.params["condition_latents"]
        assert len(noise_seeds(task.params["noise"])) == (facts.segment_frames - 1) // facts.vae_temporal + 1
    available = {take.id: take.available for take in planned.takes}
    hop = facts.segment_frames - facts.condition_frames
    for task in tasks_of(planned, "window"):
        frames = piece_frames(planned, task, task.params["stage_one"], starts)
        end = min(hop * task.index + facts.segment_frames, available[task.shot_id])
        assert frames == list(range(hop * task.index, end))
        padded = facts.vae_temporal * (task.params["latents"] - 1) + 1
        assert padded == task.params["frames"] + facts.vae_temporal * task.params["front_latents"]
        assert task.params["latents"] % 4 == 0
        times = window_times(task.params)
        assert times[0] == 0
        assert times[-1] <= len(frames) - 1


def check_latents(planned: Plan, task: Task, facts: RenderFacts) -> None:
    """Latents are handed on exactly where latents hold the condition frames after the first, each in one segment."""
    owners = [
        (task.inputs[piece["input"]], frame)
        for piece in task.params["conditions"]
        for frame in range(piece["start"], piece["stop"])
    ]
    wanted = []
    for first in range(1, facts.condition_frames, facts.vae_temporal):
        (owner, frame), group = owners[first], owners[first : first + facts.vae_temporal]
        latent = (frame + facts.vae_temporal - 1) // facts.vae_temporal
        held = [(owner, facts.vae_temporal * (latent - 1) + 1 + k) for k in range(facts.vae_temporal)]
        wanted.append((owner, latent) if held == group and planned.tasks[owner].kind == "segment" else None)
    got = [
        (task.inputs[part["input"]], latent)
        for part in task.params["condition_latents"]
        for latent in range(part["start"], part["stop"])
    ]
    assert got == ([] if None in wanted else wanted)


def check_merges(planned: Plan, facts: RenderFacts) -> None:
    """Merged latents are the same frames, drawn from the same noise, and both neighbours say so."""
    pairs: dict[tuple[str, str], set[tuple[int, int, int]]] = {}
    hop = facts.refined_fps // facts.stage_one_fps * (facts.segment_frames - facts.condition_frames)
    for unit in tasks_of(planned, "encode"):
        for layer in unit.params["layers"]:
            own = planned.tasks[unit.inputs[layer["input"]]]
            for merge in layer["merges"]:
                other = planned.tasks[unit.inputs[merge["input"]]]
                assert merge["earlier"] == (other.index < own.index)
                here = slice(merge["here"], merge["here"] + merge["count"])
                there = slice(merge["there"], merge["there"] + merge["count"])
                assert own.params["latents"] >= here.stop
                assert noise_seeds(own.params["noise"])[here] == noise_seeds(other.params["noise"])[there]
                assert first_frame(own, merge["here"], hop) == first_frame(other, merge["there"], hop)
                ordered = sorted([(own.index, own.id, here.start), (other.index, other.id, there.start)])
                key = (ordered[0][1], ordered[1][1])
                pairs.setdefault(key, set()).add((ordered[0][2], ordered[1][2], merge["count"]))
    assert all(len(said) == 1 for said in pairs.values())


def first_frame(window: Task, latent: int, hop: int) -> int:
    """First refined frame of the take in a latent (not the first) of a window."""
    return window.index * hop + 4 * (latent - window.params["front_latents"]) - 3


# --- random storyboards

CHECKPOINTS = [
    RenderFacts(),
    RenderFacts(segment_frames=33, condition_frames=5, stage_one_fps=8, refined_fps=16),
    RenderFacts(segment_frames=33, condition_frames=9, stage_one_fps=12, refined_fps=12),
    RenderFacts(segment_frames=49, condition_frames=13, stage_one_fps=10, refined_fps=30),
]


@st.composite
def storyboards(draw: st.DrawFn) -> dict[str, Any]:
    count = draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(120, 600), min_size=count, max_size=count))
    shots: list[dict[str, Any]] = []
    for index, length in enumerate(lengths):
        starts = ["text", "image", "video", "frame_of", "continue"] if index else ["text", "image", "video"]
        start = draw(st.sampled_from(starts))
        item: dict[str, Any] = {"id": f"s{index}", **shot(f"{length}f", f"prompt {index}")}
        item |= {
            "text": {},
            "image": {"image": "a.png"},
            "video": {"video": "v.mp4"},
            "frame_of": {"frame_of": {"shot": "s0", "at": f"{lengths[0] // 2}f"}},
            "continue": {"continue": "previous"},
        }[start]
        if index and start != "continue" and draw(st.booleans()):
            most = min(lengths[index - 1], length) // 2
            item["transition"] = {"crossfade": f"{draw(st.integers(1, most))}f"}
        shots.append(item)
    fps = draw(st.sampled_from([None, 24, 25, 60, "24000/1001"]))
    fields: dict[str, Any] = {
        "shots": shots,
        "refinement": draw(st.sampled_from(["parallel", "chained", "none"])),
    }
    return fields | ({"output": {"fps": fps}} if fps else {})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(fields=storyboards(), render=st.sampled_from(CHECKPOINTS))
def test_every_frame_is_shown_once_in_order_and_made_from_the_right_frames(
    fields: dict[str, Any], render: RenderFacts
) -> None:
    spec = parse_spec(json.dumps(fields))
    facts = replace(OFFICIAL, checkpoint=CheckpointFacts("/c", "d" * 64, render))
    planned = plan_film(spec, facts)
    check_plan(planned, spec, render)
    assert plan_film(spec, facts) == planned
    preview = plan_film(spec, facts, until="stage-one")
    assert {task.id for task in tasks_of(preview, "segment")} == {
        task.id for task in tasks_of(planned, "segment")
    }
    check_graph(preview)


def test_a_take_that_ends_exactly_with_a_segment_needs_no_further_one() -> None:
    for mode in ("parallel", "chained"):
        for continued in ({}, {"video": "v.mp4"}):
            frames = 160 if continued else 186
            planned = plan(shot(f"{frames}f", id="a", **continued), refinement=mode)
            assert (planned.count("segment"), planned.count("window")) == (1, 1)
            longer = plan(shot(f"{frames + 1}f", id="a", **continued), refinement=mode)
            assert (longer.count("segment"), longer.count("window")) == (2, 2)


def test_sixty_shots_of_five_seconds() -> None:
    planned = plan(*[shot(5, f"shot number {index}") for index in range(60)])
    assert planned.film_frames == 60 * 150
    assert [planned.count(kind) for kind in ("segment", "window", "encode", "text")] == [60, 60, 60, 61]
    assert all(len(task.inputs) == 1 for task in tasks_of(planned, "segment"))
    assert len({item.id for item in planned.shots}) == 60


def test_one_take_of_five_minutes() -> None:
    spec = load_spec(ROOT / "examples" / "five_minutes.yaml")
    render = load_render_facts(ROOT / "model" / "pocket")
    planned = plan_film(spec, replace(OFFICIAL, checkpoint=CheckpointFacts("/c", "d" * 64, render)))
    assert (planned.film_frames, planned.fps, planned.film_s) == (9000, 30, 300)
    assert [planned.count(kind) for kind in ("segment", "window", "encode")] == [57, 57, 57]
    check_plan(planned, spec, render)


def latents_before(planned: Plan, label: str) -> list[tuple[str, int, int]]:
    """(label, first latent, end) of what a segment begins with."""
    task = named(planned, label)
    parts = task.params["condition_latents"]
    return [(planned.tasks[task.inputs[part["input"]]].label, part["start"], part["stop"]) for part in parts]


def test_a_segment_begins_with_the_last_latents_of_the_one_before() -> None:
    planned = plan(shot("20s", id="a", image="a.png"), shot("20s", id="b", video="v.mp4"))
    for name in ("a", "b"):
        assert latents_before(planned, f"{name}/segment/0") == [], "an image and a video have no latents"
        assert latents_before(planned, f"{name}/segment/1") == [(f"{name}/segment/0", 21, 24)]
        assert latents_before(planned, f"{name}/segment/3") == [(f"{name}/segment/2", 21, 24)]


@pytest.mark.parametrize(
    ("stage_one_frames", "handed"),
    [
        (61, [("a/segment/0", 13, 16)]),
        (97, [("a/segment/0", 22, 24), ("a/segment/1", 4, 5)]),
        (60, []),
        (62, []),
        (98, []),
    ],
)
def test_a_shot_goes_on_from_the_latents_before_a_trimmed_end_unless_it_cuts_one(
    stage_one_frames: int, handed: list[tuple[str, int, int]]
) -> None:
    planned = plan(shot(f"{2 * stage_one_frames}f", id="a"), shot("5s", id="b", **{"continue": "previous"}))
    assert latents_before(planned, "b/segment/0") == handed
    assert [item.goes_on_from for item in planned.shots] == ["", "latents" if handed else "frames"]
    assert f"shot b: continue from {'latents' if handed else 'frames'}, 150 frames" in planned.describe()


def test_a_shot_that_reaches_back_into_a_video_goes_on_from_frames() -> None:
    planned = plan(shot("16f", id="a", video="v.mp4"), shot("5s", id="b", **{"continue": "previous"}))
    pieces = named(planned, "b/segment/0").params["conditions"]
    assert [(piece["start"], piece["stop"]) for piece in pieces] == [(8, 13), (13, 21)]
    assert latents_before(planned, "b/segment/0") == []


def test_a_picked_take_hands_its_own_latents_on() -> None:
    spec = film(shot("122f", id="a"), shot("5s", id="b", **{"continue": "previous"}))
    planned = plan_film(spec, replace(OFFICIAL, picked={"a": 2}))
    assert latents_before(planned, "b/segment/0") == [("a#2/segment/0", 13, 16)]


def test_windows_need_no_window_and_no_later_segment_in_parallel() -> None:
    planned = plan(shot("1m", id="a"))
    for task in tasks_of(planned, "window"):
        kinds = [planned.tasks[name].kind for name in task.inputs]
        assert "window" not in kinds
        indices = [planned.tasks[name].index for name in task.inputs if planned.tasks[name].kind == "segment"]
        assert indices == ([task.index - 1, task.index] if task.index else [0])
        assert task.params["condition"] is None
        assert (task.params["latents"], task.params["frames"]) == (48, 189)
    depth: dict[str, int] = {}
    for task in planned.tasks.values():
        depth[task.id] = max((depth[name] for name in task.inputs), default=0) + (task.kind == "window")
    assert depth[planned.film_task_id] == 1


def test_units_change_where_the_last_latent_of_a_merged_overlap_begins() -> None:
    planned = plan(shot("20s", id="a"))
    units = [task.params for task in tasks_of(planned, "encode")]
    assert [unit["frames"] for unit in units] == [181, 160, 160, 99]
    (layer,) = units[1]["layers"]
    assert layer["ranges"] == [[21, 181, 1]]
    merges = [(merge["earlier"], merge["here"], merge["there"], merge["count"]) for merge in layer["merges"]]
    assert merges == [(True, 1, 41, 6), (False, 41, 1, 6)]


def test_chained_windows_go_on_from_the_refined_tail_before() -> None:
    planned = plan(shot("20s", id="a"), refinement="chained")
    windows = tasks_of(planned, "window")
    assert [task.params["latents"] for task in windows] == [48] * len(windows)
    for before, task in pairwise(windows):
        condition = task.params["condition"]
        assert task.inputs[condition["input"]] == before.id
        assert (condition["name"], condition["frames"]) == ("tail", 25)
        first, last = before.params["tail"]
        assert last - first == 25
        assert first - 4 * before.params["front_latents"] == 160
        assert (task.params["front_latents"], task.params["noise"]["first_latent"]) == (
            1,
            40 * task.index - 1,
        )
    assert all(not layer["merges"] for task in tasks_of(planned, "encode") for layer in task.params["layers"])


def test_an_image_shot_is_refined_with_the_full_size_image() -> None:
    planned = plan(shot("8s", image="a.png", id="a"))
    segment, window = named(planned, "a/segment/0"), named(planned, "a/window/0")
    assert segment.params["condition_frames"] == 1
    source = planned.tasks[segment.inputs[segment.params["conditions"][0]["input"]]]
    assert (source.params["height_px"], source.params["width_px"]) == (480, 832)
    condition = window.params["condition"]
    refined = planned.tasks[window.inputs[condition["input"]]]
    assert (refined.params["height_px"], refined.params["width_px"]) == (704, 1280)
    assert (condition["name"], condition["frames"]) == ("frames", 1)
    assert (window.params["latents"], window.params["front_latents"]) == (52, 3)
    assert window.params["noise"]["first_latent"] == -3
    assert named(planned, "a/window/1").params["condition"] is None


def test_films_that_are_read_otherwise_than_before_are_read_again_and_nothing_else_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shots = shot("2s", video="v.mp4", id="a"), shot("2s", image="a.png", id="b")
    before = plan(*shots)
    monkeypatch.setattr("pipeline.plan_tasks.FILM_READER", 99)
    after = plan(*shots)
    assert named(before, "a/source").id != named(after, "a/source").id
    for label in ("b/source", "b/segment/0"):
        assert named(before, label).id == named(after, label).id


def test_a_continued_video_is_read_by_time_and_not_shown() -> None:
    planned = plan(shot("8s", video="v.mp4", id="a"))
    source, refined = named(planned, "a/source"), named(planned, "a/refined source")
    times = source.params["times_s"]
    assert len(times) == 13
    assert times[-1] == pytest.approx(5 - 1 / 15, abs=0.002)
    assert [b - a for a, b in pairwise(times)] == pytest.approx([1 / 15] * 12, abs=1e-5)
    assert len(refined.params["times_s"]) == 25
    assert refined.params["times_s"][::2] == pytest.approx(times, abs=1e-5)
    window = named(planned, "a/window/0")
    assert (window.params["latents"], window.params["front_latents"]) == (48, 1)
    assert window.params["condition"]["frames"] == 25
    assert shown_frames(planned, RenderFacts())[0] == [("a", 26)]


def test_a_shot_may_start_from_a_frame_of_an_earlier_one() -> None:
    planned = plan(shot("5s", id="a"), shot("5s", id="b", frame_of={"shot": "a"}))
    chain = planned.tasks[named(planned, "b/segment/0").inputs[1]]
    assert planned.tasks[chain.inputs[0]].label == "a/segment/0"
    assert chain.params["frame"] == 74
    window = named(planned, "b/window/0")
    refined = planned.tasks[window.inputs[window.params["condition"]["input"]]]
    assert planned.tasks[refined.inputs[0]].label == "a/window/0"
    assert refined.params["frame"] == 148
    at = plan(shot("8s", id="a"), shot("5s", id="b", frame_of={"shot": "a", "at": "7s"}))
    chain = planned = at.tasks[named(at, "b/segment/0").inputs[1]]
    assert at.tasks[chain.inputs[0]].label == "a/segment/1"
    assert chain.params["frame"] == 105 - 80


def test_a_chain_never_waits_for_refinement() -> None:
    planned = plan(shot("5s", id="a"), shot("5s", id="b", frame_of={"shot": "a"}))
    pending, seen = [task.id for task in tasks_of(planned, "segment")], set()
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending += planned.tasks[name].inputs
    assert all(planned.tasks[name].kind != "window" for name in seen)


def test_a_continued_shot_goes_on_from_the_frames_before_a_trimmed_end() -> None:
    planned = plan(shot("95f", id="a"), shot("95f", id="b", **{"continue": "previous"}))
    assert planned.film_frames == 190
    conditions = named(planned, "b/segment/0").params["conditions"]
    assert [(piece["start"], piece["stop"]) for piece in conditions] == [(48 - 13, 48)]
    window = named(planned, "a/window/0")
    pieces = [(piece["start"], piece["stop"]) for piece in window.params["stage_one"]]
    assert pieces == [(0, 48), (13, 13 + 45)]
    assert len(planned.takes) == 1


def test_conditions_may_come_from_two_segments() -> None:
    planned = plan(shot("190f", id="a"), shot("95f", id="b", **{"continue": "previous"}))
    task = named(planned, "b/segment/0")
    pieces = [
        (planned.tasks[task.inputs[piece["input"]]].label, piece["start"], piece["stop"])
        for piece in task.params["conditions"]
    ]
    assert pieces == [("a/segment/0", 82, 93), ("a/segment/1", 13, 15)]


def test_too_little_to_continue_is_an_error() -> None:
    text = problem(shot("20f"), shot("5s", **{"continue": "previous"}))
    assert "shots[1].continue" in text
    assert "0.87 s" in text


# --- prompts


def test_prompts_take_effect_where_a_segment_begins() -> None:
    prompts = [{"prompt": "a"}, {"at": "6s", "prompt": "b"}, {"at": "11.4s", "prompt": "c"}]
    planned = plan(shot("2s"), shot("20s", prompts))
    effects = [(item.prompt, item.written_s, item.effect_s, item.film_s) for item in planned.prompts[1:]]
    assert effects == [
        ("a", 0, 0, 2),
        ("b", 6, pytest.approx(6.2), pytest.approx(8.2)),
        ("c", pytest.approx(11.4), pytest.approx(93 / 15 + 80 / 15), pytest.approx(2 + 173 / 15)),
    ]
    used = [
        planned.tasks[task.inputs[task.params["text"]]].params["prompt"]
        for task in tasks_of(planned, "segment")
        if task.shot_id == planned.shots[1].id
    ]
    assert used == ["a", "b", "c", "c"]


def test_a_prompt_that_never_takes_effect_is_an_error() -> None:
    text = problem(shot("20s", [{"prompt": "a"}, {"at": "7s", "prompt": "b"}, {"at": "8s", "prompt": "c"}]))
    assert "shots[0].prompt[1].at" in text
    assert "never take effect" in text
    assert "6.20 s, 11.53 s" in text
    assert "cannot change within" in problem(shot("5s", [{"prompt": "a"}, {"at": "2s", "prompt": "b"}]))
    late = problem(shot("5s", [{"prompt": "a"}, {"at": "5s", "prompt": "b"}]))
    assert "after the shot's end" in late
    twice = problem(shot("20s", [{"prompt": "a"}, {"at": "6s", "prompt": "b"}, {"at": "6s", "prompt": "c"}]))
    assert "not after the prompt before" in twice


def test_the_look_is_joined_to_each_prompt_but_not_to_the_negative() -> None:
    planned = plan(shot(5, "a  red circle", negative_prompt="blur"), look="on film", quality="full")
    prompts = {task.params["prompt"] for task in tasks_of(planned, "text")}
    assert prompts == {"a red circle, on film", "blur", ""}


def test_long_prompts_are_told_apart_by_their_ends() -> None:
    way = "a red circle moving slowly to the right"
    later = [{"at": "6s", "prompt": f"{way} at sunset"}, {"at": "11s", "prompt": "x" * 90}]
    prompts = [{"prompt": f"{way} on a clear day"}, *later]
    labels = [task.label for task in tasks_of(plan(shot("20s", prompts), refinement="none"), "text")]
    assert labels == [
        "text 'a red circle moving ... right on a clear day'",
        "text 'a red circle moving slowly to the right at sunset'",
        f"text '{'x' * 22} ... {'x' * 22}'",
    ]


# --- crossfades, output


def test_a_crossfade_overlaps_two_shots() -> None:
    planned = plan(shot("5s"), shot("5s", "b", transition={"crossfade": "1s"}))
    assert planned.film_frames == 270
    mixed = [task for task in tasks_of(planned, "encode") if task.params["blend"]]
    assert [task.params["frames"] for task in mixed] == [30]
    weights = blend_weights(mixed[0].params["blend"], 30)
    assert weights[0] == pytest.approx(1 / 31)
    assert weights[-1] == pytest.approx(30 / 31)
    assert planned.shots[1].first_frame == 120


def test_a_crossfade_is_cut_where_either_side_changes_its_window() -> None:
    planned = plan(shot("200f", id="a"), shot("400f", "b", id="b", transition={"crossfade": "190f"}))
    mixed = [task for task in tasks_of(planned, "encode") if task.params["blend"]]
    assert [(task.params["blend"]["first"], task.params["frames"]) for task in mixed] == [
        (0, 171),
        (171, 10),
        (181, 9),
    ]


@pytest.mark.parametrize(
    ("lengths", "fades", "said"),
    [
        ((30, 150), (0, 31), "longer than the shot before"),
        ((150, 30), (0, 31), "longer than the shot"),
        ((60, 60, 60), (0, 40, 30), "overlap"),
    ],
)
def test_a_crossfade_that_does_not_fit_is_an_error(
    lengths: tuple[int, ...], fades: tuple[int, ...], said: str
) -> None:
    shots = [
        shot(f"{length}f", **({"transition": {"crossfade": f"{fade}f"}} if fade else {}))
        for length, fade in zip(lengths, fades, strict=True)
    ]
    assert said in problem(*shots)


def test_a_crossfade_may_take_all_of_a_shot() -> None:
    fade = {"crossfade": "60f"}
    planned = plan(shot("90f"), shot("60f", "b", transition=fade), shot("90f", "c"))
    assert planned.film_frames == 180


def test_durations_are_honoured_to_the_frame_at_every_rate() -> None:
    for fps, frames in ((24, 121), (25, 126), (60, 302), ("24000/1001", 121)):
        planned = plan(*[shot(5.03, f"p{index}") for index in range(7)], output={"fps": fps})
        assert planned.film_frames == 7 * frames
        assert [item.frames for item in planned.shots] == [frames] * 7


def test_a_film_at_another_rate_shows_the_nearest_frames() -> None:
    planned = plan(shot("10f", id="a"), output={"fps": 24})
    shown = [frame for [(_, frame)] in shown_frames(planned, RenderFacts())]
    assert shown == [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]
    doubled = plan(shot("6f", id="a"), output={"fps": 60})
    assert [frame for [(_, frame)] in shown_frames(doubled, RenderFacts())] == [0, 0, 1, 1, 2, 2]
    assert any("repeat" in text for text in doubled.warnings)


def test_sizes_are_exact_and_fitting_is_said() -> None:
    native = plan(shot(5))
    assert (native.film_size, native.sizes.fit) == ("1280x704", None)
    assert "Add `fit: crop`" in problem(shot(5), output={"size": "1280x720"})
    padded = plan(shot(5), output={"size": "1280x720", "fit": "pad"})
    unit = tasks_of(padded, "encode")[0].params
    assert (unit["width_px"], unit["height_px"], unit["fit"]) == (1280, 720, "pad")
    assert gpu_ids(padded) == gpu_ids(native)
    exact = plan(shot(5), output={"size": "1280x704", "fit": "pad"})
    assert exact.sizes.fit is None


@pytest.mark.parametrize(
    ("aspect", "stage_one", "refined"),
    [("16:9", "832x480", "1280x704"), ("9:16", "480x832", "704x1280"), ("4:3", "736x544", "1088x832")],
)
def test_the_nearest_sizes_of_a_shape_are_chosen(aspect: str, stage_one: str, refined: str) -> None:
    planned = plan(shot(5), output={"aspect": aspect})
    assert (str(planned.sizes.stage_one), str(planned.sizes.native)) == (stage_one, refined)


def test_a_shape_the_checkpoint_lacks_is_an_error() -> None:
    assert "far from every size" in problem(shot(5), output={"aspect": "10:1"})
    odd = RenderFacts(stage_one_sizes=[[64, 96]], refined_sizes=[[128, 256]], default_aspect="3:2")
    facts = replace(OFFICIAL, checkpoint=CheckpointFacts("/c", "d" * 64, odd))
    assert "no refined size" in problem(shot(5), facts=facts)


def test_media_that_cannot_serve_are_errors_with_their_field() -> None:
    assert "shots[0].image" in problem(shot(5, image="none.png"))
    assert "is a video (got 'v.mp4'). Name an image." in problem(shot(5, image="v.mp4"))
    assert "is an image (got 'a.png'). Name a video." in problem(shot(5, video="a.png"))
    short = replace(OFFICIAL, media={"v.mp4": replace(VIDEO, duration_s=0.5)})
    assert "0.87 s" in problem(shot(5, video="v.mp4"), facts=short)
    assert "output.soundtrack" in problem(shot(5), output={"soundtrack": "a.png"})
    assert "loras[0].file" in problem(shot(5), loras=[{"file": "x.safetensors"}])
    assert "shots[1].frame_of.at" in problem(shot(5, id="a"), shot(5, frame_of={"shot": "a", "at": 5}))


def test_problems_of_different_kinds_come_together() -> None:
    with pytest.raises(StoryboardError) as caught:
        plan(
            shot(5, image="none.png"),
            shot("10f", transition={"crossfade": "1s"}),
            output={"size": "640x360"},
        )
    assert {item.field for item in caught.value.problems} == {
        "output.size",
        "shots[0].image",
        "shots[1].transition.crossfade",
    }


def test_media_are_addressed_by_content() -> None:
    planned = plan(
        shot(5, image="a.png"), output={"soundtrack": "s.wav"}, loras=[{"file": "style.safetensors"}]
    )
    assert planned.media == {
        f"media/{'a' * 64}.png": "a.png",
        f"media/{'c' * 64}.wav": "s.wav",
        f"media/{'e' * 64}.safetensors": "style.safetensors",
    }
    moved = {"b/other.png": replace(IMAGE, path="b/other.png")}
    elsewhere = plan(shot(5, image="b/other.png"), facts=replace(OFFICIAL, media=moved))
    assert gpu_ids(elsewhere) == gpu_ids(plan(shot(5, image="a.png")))


# --- quality, roles, noise


def test_draft_is_distilled_and_full_is_guided() -> None:
    draft = [task.params for task in tasks_of(plan(shot("10s")), "segment")]
    assert [(item["schedule"]["name"], item["guidance"], item["negative_text"]) for item in draft] == [
        ("distilled", 1, None)
    ] * 2
    full = [task.params for task in tasks_of(plan(shot("10s"), quality="full"), "segment")]
    assert [item["schedule"]["name"] for item in full] == ["base", "enhance_hf"]
    assert full[0]["guidance"] == 4
    assert full[0]["negative_text"] is not None
    assert any("no effect" in text for text in plan(shot(5, negative_prompt="x")).warnings)


def test_a_role_has_one_set_of_weights() -> None:
    planned = plan(
        shot("10s"), shot("5s", image="a.png"), loras=[{"file": "style.safetensors", "strength": 0.5}]
    )
    for kind, role in (("segment", "chain"), ("window", "refine")):
        said = {canonical_json(task.params["weights"]) for task in tasks_of(planned, kind)}
        assert said == {canonical_json(planned.weights[role])}
    assert [lora["strength"] for lora in planned.weights["chain"]["loras"]] == [1.0, 0.5]
    assert planned.weights["refine"]["attention"] == "block_sparse"


def test_noise_is_named_and_a_redo_draws_another() -> None:
    assert noise_seed(1, "a", "one", 0, 0) == noise_seed(1, "a", "one", 0, 0)
    names = [(1, "a", "one", 0, 0), (2, "a", "one", 0, 0), (1, "b", "one", 0, 0), (1, "a", "two", 0, 0),
             (1, "a", "one", -1, 0), (1, "a", "one", 0, 1)]  # fmt: skip
    seeds = {noise_seed(*name) for name in names}  # type: ignore[arg-type]
    assert len(seeds) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)
    before = plan(shot("20s", id="a"))
    after = plan(shot("20s", id="a"), facts=replace(OFFICIAL, redo={"a/segment/2": 1}))
    kept = {task.label for task in after.tasks.values() if task.id in before.tasks}
    assert {"a/segment/0", "a/segment/1", "a/window/0", "a/window/1"} <= kept
    assert not {"a/segment/2", "a/segment/3", "a/window/2", "a/window/3"} & kept


def test_merge_weights_rise_from_one_window_to_the_other() -> None:
    weights = merge_weights(6)
    assert weights == pytest.approx([k / 7 for k in range(1, 7)])
    assert [a + b for a, b in zip(weights, reversed(weights), strict=True)] == pytest.approx([1] * 6)


# --- edits are cheap

BASE = [shot("8s", "one"), shot("12s", "two", image="a.png"), shot("6s", "three")]


def costs(before: list[dict[str, Any]], after: list[dict[str, Any]], **fields: Any) -> set[str]:
    """Labels of the segments and windows that `after` makes and `before` had not."""
    first, second = plan(*before), plan(*after, **fields)
    return {second.tasks[name].label for name in gpu_ids(second) - gpu_ids(first)}


def test_inserting_a_shot_redoes_nothing_of_the_others() -> None:
    for place in range(4):
        new = costs(BASE, [*BASE[:place], shot("5s", "new", id="new"), *BASE[place:]])
        assert new == {"new/segment/0", "new/window/0"}


def test_reordering_and_removing_shots_costs_nothing() -> None:
    assert costs(BASE, [BASE[2], BASE[0], BASE[1]]) == set()
    assert costs(BASE, [BASE[1]]) == set()


def test_reordering_equal_shots_costs_nothing() -> None:
    twins = [shot("8s"), shot("4s"), shot("12s")]
    ids = {item.id for item in plan(*twins).shots}
    assert len(ids) == 3
    assert all(NAME_PATTERN.fullmatch(name) for name in ids)
    assert costs(twins, [twins[2], twins[0], twins[1]]) == set()
    assert any("opens like another" in text for text in plan(*twins).warnings)


def test_shortening_a_shot_costs_nothing() -> None:
    for duration in ("11s", "7s", "1s"):
        assert costs(BASE, [BASE[0], {**BASE[1], "duration": duration}, BASE[2]]) == set()


def test_lengthening_a_shot_makes_only_what_is_added() -> None:
    first = plan(shot("8s", "one", id="a"))
    longer = plan(shot("17s", "one", id="a"))
    assert gpu_ids(first) < gpu_ids(longer)
    added = {longer.tasks[name].label for name in gpu_ids(longer) - gpu_ids(first)}
    assert added == {"a/segment/2", "a/segment/3", "a/window/2", "a/window/3"}


def test_a_transition_costs_no_gpu_time() -> None:
    faded = [BASE[0], {**BASE[1], "transition": {"crossfade": "1s"}}, BASE[2]]
    assert costs(BASE, faded) == set()
    before, after = plan(*BASE), plan(*faded)
    kept = {task.id for task in tasks_of(before, "encode")} & set(after.tasks)
    assert len(kept) >= 3


def test_output_settings_cost_no_gpu_time() -> None:
    output = {"crf": 30, "codec": "hevc", "soundtrack": "s.wav", "fps": 24, "path": "x.mkv"}
    assert costs(BASE, BASE, output=output, title="Another") == set()


def test_a_soundtrack_or_title_joins_the_same_units_again() -> None:
    before = plan(*BASE)
    after = plan(*BASE, output={"soundtrack": "s.wav"}, title="Another")
    assert set(after.tasks) - set(before.tasks) == {after.film_task_id}


def test_refining_later_keeps_the_chain() -> None:
    chain = {task.id for task in tasks_of(plan(*BASE, refinement="none"), "segment")}
    for mode in ("parallel", "chained"):
        assert {task.id for task in tasks_of(plan(*BASE, refinement=mode), "segment")} == chain


def test_a_prompt_late_in_a_take_redoes_only_what_follows() -> None:
    def take(last: str) -> Plan:
        return plan(shot("30s", [{"prompt": "a"}, {"at": "16s", "prompt": last}]))

    before, after = take("b"), take("c")
    changed = sorted(
        after.tasks[name].index for name in gpu_ids(after) - gpu_ids(before) if name.startswith("segment")
    )
    effect = before.prompts[1].effect_s
    assert changed == list(range(3, 6))
    assert effect == pytest.approx((93 + 2 * 80) / 15)
    windows = {
        after.tasks[name].index for name in gpu_ids(after) - gpu_ids(before) if name.startswith("window")
    }
    assert windows == {3, 4, 5}


def test_changing_the_checkpoint_redoes_everything() -> None:
    other = replace(OFFICIAL, checkpoint=CheckpointFacts("/checkpoint", "f" * 64))
    assert not gpu_ids(plan(*BASE)) & gpu_ids(plan(*BASE, facts=other))
    moved = replace(OFFICIAL, checkpoint=CheckpointFacts("/elsewhere", "d" * 64))
    assert plan(*BASE).tasks == plan(*BASE, facts=moved).tasks


# --- parts of a film, estimates, words


def test_until_stage_one_is_the_chain_and_a_preview() -> None:
    spec = film(*BASE)
    planned, preview = plan_film(spec, OFFICIAL), plan_film(spec, OFFICIAL, until="stage-one")
    assert preview.count("window") == 0
    assert {task.id for task in tasks_of(preview, "segment")} <= set(planned.tasks)
    assert (preview.fps, preview.film_size, preview.is_preview) == (15, "832x480", True)
    assert preview.film_s == planned.film_s
    assert preview.output_path.endswith(".stage-one.mp4")
    assert planned.output_path == "untitled.mp4"


def test_some_shots_are_a_preview_of_those_and_what_they_need() -> None:
    spec = film(
        shot("8s", "one", id="a"),
        shot("4s", "two", id="b", **{"continue": "previous"}),
        shot("6s", "three", id="c", transition={"crossfade": "1s"}),
    )
    planned = plan_film(spec, OFFICIAL)
    part = plan_film(spec, OFFICIAL, shots=["b"])
    assert part.is_preview
    assert part.film_frames == 120
    assert part.output_path.endswith(".preview.mp4")
    assert gpu_ids(part) < gpu_ids(planned)
    labels = {task.label for task in part.tasks.values()}
    assert {"a/segment/0", "a/segment/1", "b/segment/0"} <= labels
    assert "c/segment/0" not in labels
    assert plan_film(spec, OFFICIAL, shots=["b", "c"]).film_frames == 120 + 180 - 30
    assert plan_film(spec, OFFICIAL, shots=["a", "c"]).film_frames == 240 + 180
    assert [item.first_frame for item in part.shots] == [None, 0, None]


def test_an_unknown_shot_is_a_wrong_flag() -> None:
    with pytest.raises(SettingError, match="--shots") as caught:
        plan_film(film(shot(5, id="a")), OFFICIAL, shots=["b"])
    assert "Shots are: a" in str(caught.value)


def test_estimates_follow_the_published_figures() -> None:
    spec = load_spec(ROOT / "examples" / "five_minutes.yaml")
    guess = plan_film(spec, OFFICIAL).estimate
    assert guess.basis.startswith("published")
    assert guess.total_s / 3600 == pytest.approx(2.25, rel=0.15)
    assert guess.critical_path_s / 60 == pytest.approx(60, rel=0.1)
    assert guess.disk_bytes > 9000 * 1000


def test_measured_seconds_replace_the_published_ones() -> None:
    pace = measured({"cpu": {"segment": 10, "window": 20, "encode": 3}}, "cpu")
    facts = replace(OFFICIAL, pace=pace)
    planned = plan(shot("8s"), facts=facts)
    assert {round(task.work, 6) for task in tasks_of(planned, "segment")} == {10}
    assert {round(task.work, 6) for task in tasks_of(planned, "window")} == {20}
    assert planned.estimate.basis == "measured on cpu"


def test_the_plan_says_every_task_its_inputs_and_seconds() -> None:
    planned = plan(*BASE)
    text = planned.describe()
    for task in planned.tasks.values():
        assert f"{task.id}  {task.label}  {task.work:.1f} s" in text
    told = json.loads(json.dumps(planned.to_json()))
    assert [item["id"] for item in told["tasks"]] == list(planned.tasks)
    assert told["film"]["frames"] == planned.film_frames


class _CountedLine(Sequence[Stretch]):
    """A take's line that counts how often one of its stretches is looked at."""

    def __init__(self, stretches: list[Stretch]) -> None:
        self.stretches, self.looks = stretches, 0

    def __len__(self) -> int:
        return len(self.stretches)

    def __getitem__(self, place: Any) -> Any:
        self.looks += 1
        return self.stretches[place]


def test_frames_are_looked_up_in_a_day_of_film_not_searched_for_through_all_of_it():
    line = _CountedLine([Stretch(80 * n, 80 * n + 80, f"segment-{n}", 80 * n - 13) for n in range(16_000)])
    inputs = Inputs()
    pieces = pieces_of(inputs, line, 80 * 9_000 - 13, 80 * 9_000 + 5)
    latents = latents_of_line(inputs, line, 80 * 9_000 - 12, 80 * 9_000, 4)
    assert inputs.ids == ["segment-8999", "segment-9000"]
    assert [(piece["start"], piece["stop"]) for piece in pieces] == [(80, 93), (13, 18)]
    assert [(part["input"], part["start"], part["stop"]) for part in latents] == [(0, 21, 24)]
    assert line.looks < 60


class _CountedSet(set[str]):
    """A set that counts how often somebody asks whether something is in it."""

    looks = 0

    def __contains__(self, item: object) -> bool:
        self.looks += 1
        return super().__contains__(item)


def test_asking_for_chains_that_can_move_does_not_walk_through_the_segments_that_are_done():
    tasks: dict[str, Task] = {}
    for n in range(1000):
        tasks[f"s{n}"] = Task(f"s{n}", "segment", "chain", {}, (f"s{n - 1}",) if n else ())
    graph = TaskGraph(tasks, ())
    for n in range(900):
        graph.finish(f"s{n}")
    assert graph.live_chains(2) == 1
    graph.wanted = _CountedSet(graph.wanted)
    for n in range(900, 910):
        graph.finish(f"s{n}")
        assert graph.live_chains(2) == 1
    assert graph.wanted.looks < 100
    graph.undo({"s5"})
    assert graph.live_chains(2) == 1
