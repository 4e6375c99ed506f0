"""Making a stretch of the film again, and why a task is still to do."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.probe import probe_facts
from cluster.recipe import Recipe, make_plan
from pipeline.changes import left_to_do, reasons
from pipeline.errors import SettingError
from pipeline.facts import Overrides
from pipeline.journal import AttemptFailed, AttemptStarted
from pipeline.ledger import Ledger, LedgerState
from pipeline.plan import Plan
from pipeline.redo import changed_ranges, choose_redo, describe_redo, parse_range, tasks_showing, with_redo
from pipeline.spec import parse_spec
from pipeline.store import LocalStore
from pipeline.tasks import RECIPE_VERSION
from tests.rendered import recipe_of, render_into, with_checkpoint

LONG = {"id": "one", "duration": "40s"}
SHORT = {"id": "two", "duration": "5s"}


def labels(plan: Plan, ids: set[str], kind: str) -> list[str]:
    return [task.label for task in plan.tasks.values() if task.id in ids and task.kind == kind]


# Which tasks show a stretch


@pytest.mark.parametrize(
    ("text", "frames"),
    [
        ("3:20-3:40", (6000, 6600)),
        ("1:00:00-1:00:01.5", (108000, 108045)),
        ("12s-14.5s", (360, 435)),
        ("300f-420f", (300, 420)),
        ("0:00-59:59:59", None),
        ("5:00-5:00", None),
        ("3:40-3:20", None),
        ("whenever", None),
        ("3:20", None),
        ("59:00:00-59:00:01", None),
    ],
)
def test_a_stretch_is_written_in_the_films_time(text: str, frames: tuple[int, int] | None) -> None:
    if frames is not None:
        assert parse_range(text, Fraction(30), 200_000) == frames
    elif text == "0:00-59:59:59":
        assert parse_range(text, Fraction(30), 600) == (0, 600), "cut at the film's end"
    else:
        with pytest.raises(SettingError) as refused:
            parse_range(text, Fraction(30), 200_000)
        assert refused.value.field == "--redo"
        assert refused.value.value == text


def test_every_frame_is_shown_by_the_segment_and_the_window_it_comes_from() -> None:
    """Refined frame g shows stage-one frame g // 2; windows change 13 frames after they begin, every 160."""
    plan = make_plan(recipe_of(LONG))
    for frame in range(plan.film_frames):
        shown = tasks_showing(plan, frame, frame + 1)
        stage_one = frame // 2
        segment = 0 if stage_one < 93 else 1 + (stage_one - 93) // 80
        assert labels(plan, shown, "segment") == [f"one/segment/{segment}"], frame
        window = min(max(0, (frame - 13) // 160), plan.count("window") - 1)
        windows = labels(plan, shown, "window")
        assert f"one/window/{window}" in windows, frame
        in_overlap = frame % 160 in range(1, 25) and frame >= 160 and frame < 160 * plan.count("window")
        assert len(windows) == 1 + in_overlap, frame


def test_without_refinement_units_show_segments() -> None:
    plan = make_plan(recipe_of(LONG, refinement="none"))
    for frame in range(plan.film_frames):
        segment = 0 if frame < 93 else 1 + (frame - 93) // 80
        assert labels(plan, tasks_showing(plan, frame, frame + 1), "segment") == [f"one/segment/{segment}"]


def test_a_stretch_of_a_crossfade_shows_both_shots() -> None:
    fading = {**SHORT, "transition": {"crossfade": "1s"}}
    plan = make_plan(recipe_of({**LONG, "duration": "5s"}, fading))
    assert labels(plan, tasks_showing(plan, 125, 126), "segment") == ["one/segment/0", "two/segment/0"]
    assert labels(plan, tasks_showing(plan, 119, 120), "segment") == ["one/segment/0"]


# What a redo means


def redone(recipe: Recipe, *texts: str, refine_only: bool = False) -> tuple[Plan, Plan, list[str]]:
    before = make_plan(recipe)
    redo = choose_redo(before, texts, refine_only=refine_only)
    after = make_plan(recipe, with_redo(Overrides(), redo.scopes))
    return before, after, describe_redo(redo, before, after)


def test_in_a_chain_everything_to_the_shots_end_follows_and_nothing_else() -> None:
    before, after, told = redone(recipe_of(LONG, SHORT), "0:20-0:22")
    again = {task.label for task in after.tasks.values() if task.id not in before.tasks}
    count = sum(task.kind == "segment" and task.shot_id == "one" for task in before.tasks.values())
    first = min(int(label.rpartition("/")[2]) for label in again if "segment" in label)
    assert first == 3
    assert {f"one/segment/{index}" for index in range(3, count)} == {label for label in again if "/segment/" in label}
    assert not any(label.startswith("two/") for label in again)
    assert told[0] == "redo 0:20.0-0:22.0: new noise for one/segment/3"
    assert "one/segment/4" in told[1]
    ((begin, end),) = changed_ranges(before, after)
    assert begin <= 600
    assert end == 1200, "to the shot's end"
    assert all(task_id in "\n".join(told) for task_id in after.tasks.keys() - before.tasks.keys())


def test_refine_only_leaves_the_chain_alone() -> None:
    before, after, _ = redone(recipe_of(LONG, SHORT), "0:20-0:22", refine_only=True)
    again = [task for task in after.tasks.values() if task.id not in before.tasks]
    assert {task.kind for task in again} == {"window", "encode", "film"}
    assert {task.params["noise"]["redo"] for task in again if task.kind == "window"} == {1}
    ((begin, end),) = changed_ranges(before, after)
    assert (begin, end) != (0, 1350)
    assert begin <= 600 < 660 <= end


def test_refine_only_needs_a_refinement() -> None:
    with pytest.raises(SettingError, match="no refinement"):
        choose_redo(make_plan(recipe_of(SHORT, refinement="none")), ["0:00-0:01"], refine_only=True)


def test_a_second_redo_takes_the_next_generation() -> None:
    once = with_redo(Overrides(), ["one/segment/3"])
    assert with_redo(once, ["one/segment/3"]).redo == {"one/segment/3": 2}


# Why


def told(recipe: Recipe, store: LocalStore, before: Recipe | None = None) -> dict[str, str]:
    """Reasons by label."""
    state = Ledger(store).load()
    plan = make_plan(recipe, state.overrides)
    old = None if before is None else make_plan(before, state.overrides).tasks
    return {plan.tasks[i].label: why for i, why in reasons(plan.tasks, state, old).items()}


def test_a_render_that_is_done_leaves_nothing_to_do(tmp_path: Path) -> None:
    recipe = recipe_of(SHORT)
    render_into(LocalStore(tmp_path), recipe)
    assert told(recipe, LocalStore(tmp_path), recipe) == {}


def test_a_changed_prompt_redoes_exactly_its_dependants_and_says_why(tmp_path: Path) -> None:
    store, before = LocalStore(tmp_path), recipe_of(LONG, SHORT)
    render_into(store, before)
    why = told(recipe_of(LONG, {**SHORT, "prompt": "a blue star"}), store, before)
    assert why["two/segment/0"] == "the prompt changed"
    assert why["two/window/0"].startswith("computed from two/segment/0, which is made again")
    assert not any(label.startswith("one/") for label in why)
    assert why["text 'a blue star'"] == "new"


def test_a_changed_checkpoint_is_named(tmp_path: Path) -> None:
    store, before = LocalStore(tmp_path), recipe_of(SHORT)
    render_into(store, before)
    why = told(with_checkpoint(before, "e"), store, before)
    assert set(why) == {task.label for task in make_plan(before).tasks.values()}
    assert why["two/segment/0"].startswith("the checkpoint changed")


def test_changed_code_is_named(tmp_path: Path) -> None:
    store, recipe = LocalStore(tmp_path), recipe_of(SHORT)
    plan = make_plan(recipe)
    why = reasons(plan.tasks, LedgerState(), plan.tasks, 0)
    assert set(why.values()) == {f"longtake computes differently now (recipe 0, now {RECIPE_VERSION})"}
    recipe.put(store)
    assert json.loads(store.read("recipe.json"))["recipe_version"] == RECIPE_VERSION


def test_a_plan_for_what_older_code_rendered_says_that_it_is_all_to_do_and_why(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = {"title": "Old", "checkpoint": str(tiny_checkpoint), "shots": [{"prompt": "a star", "duration": "7s"}]}
    film, store = tmp_path / "film.json", LocalStore(tmp_path / "render")
    film.write_text(json.dumps(written))
    spec = parse_spec(film.read_text())
    with monkeypatch.context() as older:
        for module in ("pipeline.tasks", "cluster.recipe"):
            older.setattr(f"{module}.RECIPE_VERSION", RECIPE_VERSION - 1)
        render_into(store, Recipe(spec, probe_facts(spec, device="cpu")))
    assert main(["plan", str(film), "--store", store.url]) == 0
    said = capsys.readouterr().out
    assert "0 of 9 tasks are committed" in said
    why = f"longtake computes differently now (recipe {RECIPE_VERSION - 1}, now {RECIPE_VERSION})"
    assert f"to do, {why}: text 'a star'" in said


def test_failures_and_interruptions_are_named(tmp_path: Path) -> None:
    store, recipe = LocalStore(tmp_path), recipe_of(SHORT)
    plan = render_into(store, recipe, only=lambda task: task.kind == "text")
    first, second = (task for task in plan.tasks.values() if task.kind in ("segment", "window"))
    ledger = Ledger(store)
    ledger.take_lease()
    ledger.journal([AttemptStarted(second.id, 1, ledger.epoch, "w", "n")])
    for attempt in range(1, 5):
        ledger.journal([AttemptStarted(first.id, attempt, ledger.epoch, "w", "n")])
        ledger.journal([AttemptFailed(first.id, attempt, ledger.epoch, "transient", "hiccup")])
    why = told(recipe, store, recipe)
    assert "given up: failed 4 times, last: hiccup; `longtake retry`" in why[first.label]
    assert why[second.label] == "begun, not finished"
    assert why["film"] == "not made yet"


def test_inputs_of_committed_tasks_are_not_to_do() -> None:
    recipe = recipe_of(SHORT)
    plan = make_plan(recipe)
    segment = next(task for task in plan.tasks.values() if task.kind == "segment")
    state = LedgerState({segment.id: None})  # type: ignore[dict-item]
    texts = {task.id for task in plan.tasks.values() if task.kind == "text" and task.params["prompt"]}
    assert texts.isdisjoint(task.id for task in left_to_do(plan.tasks, state))
    assert texts <= {task.id for task in left_to_do(plan.tasks, LedgerState())}
