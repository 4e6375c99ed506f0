"""Takes of a shot, picking one, and locked shots that survive changes of code and checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from cluster.recipe import Recipe, load_recipe, make_plan
from pipeline.errors import SettingError
from pipeline.facts import Overrides
from pipeline.journal import Invalidated
from pipeline.ledger import Ledger
from pipeline.locks import order_digest
from pipeline.plan import Plan
from pipeline.store import LocalStore
from pipeline.tasks import RECIPE_VERSION
from tests.rendered import recipe_of, render_into, with_checkpoint

ONE: dict[str, Any] = {"id": "one", "duration": "12s"}
TWO: dict[str, Any] = {"id": "two", "duration": "12s"}


def gpu(plan: Plan, shot_id: str = "") -> dict[str, str]:
    """Label -> id of segments and windows."""
    tasks = (task for task in plan.tasks.values() if task.kind in ("segment", "window"))
    return {task.label: task.id for task in tasks if task.shot_id == shot_id or not shot_id}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "render")


# Takes


def test_several_takes_are_shown_one_after_another_in_one_preview() -> None:
    film = recipe_of(ONE, TWO)
    preview = make_plan(replace(film, shots=("one",), takes=3))
    assert preview.is_preview
    assert preview.film_frames == 3 * 360
    assert [(take.shot_id, take.take, take.first_frame) for take in preview.shown_takes] == [
        ("one", 1, 0), ("one", 2, 360), ("one", 3, 720)
    ]  # fmt: skip
    assert "take 2 of one from 0:12.0" in preview.describe()
    segments = [task for task in preview.tasks.values() if task.kind == "segment"]
    assert {task.params["noise"]["noise_id"] for task in segments} == {"one", "one#2", "one#3"}
    assert len({task.id for task in segments}) == len(segments)


def test_the_first_take_is_the_film_as_it_was_and_a_picked_one_costs_nothing_again() -> None:
    film = recipe_of(ONE, TWO)
    preview = set(gpu(make_plan(replace(film, shots=("one",), takes=3))).values())
    assert set(gpu(make_plan(film), "one").values()) <= preview
    picked = make_plan(film, Overrides(picked={"one": 2}))
    assert set(gpu(picked, "one").values()) <= preview
    assert gpu(picked, "two") == gpu(make_plan(film), "two")
    assert not set(gpu(picked, "one").values()) & set(gpu(make_plan(film), "one").values())


def test_takes_of_shots_that_belong_together_keep_their_order() -> None:
    film = recipe_of(ONE, {**TWO, "continue": "previous"})
    preview = make_plan(replace(film, shots=("one", "two"), takes=2))
    assert [(take.shot_id, take.take, take.first_frame) for take in preview.shown_takes] == [
        ("one", 1, 0), ("two", 1, 360), ("one", 2, 720), ("two", 2, 1080)
    ]  # fmt: skip


def test_takes_need_shots() -> None:
    with pytest.raises(SettingError) as refused:
        make_plan(replace(recipe_of(ONE), takes=2))
    assert refused.value.field == "--takes"


def test_a_take_is_picked_through_the_store(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    film = recipe_of(ONE, TWO)
    render_into(store, replace(film, shots=("one",), takes=2))
    assert main(["pick", store.url, "one", "2"]) == 0
    said = capsys.readouterr().out
    assert "shows take 2 of one" in said
    assert "3 of its 3 segments are there" in said or "2 of its 2 segments are there" in said
    state = Ledger(store).load()
    assert state.picked == {"one": 2}
    plan = make_plan(film, state.overrides)
    assert set(gpu(plan, "one").values()) <= set(state.commits)
    assert main(["pick", store.url, "three", "1"]) == 2
    assert "three" in capsys.readouterr().err


def test_a_recipe_with_takes_comes_back_from_the_store(store: LocalStore) -> None:
    written = replace(recipe_of(ONE), shots=("one",), takes=2)
    written.put(store)
    assert load_recipe(store) == written


# Locks


def locked(store: LocalStore, recipe: Recipe, *shots: str) -> None:
    render_into(store, recipe)
    for shot in shots:
        assert main(["lock", store.url, shot]) == 0


def test_a_locked_shot_survives_another_checkpoint_and_the_others_do_not(store: LocalStore) -> None:
    film = recipe_of(ONE, TWO)
    locked(store, film, "one")
    before, after = make_plan(film), make_plan(with_checkpoint(film, "e"), Ledger(store).load().overrides)
    assert gpu(after, "one") == gpu(before, "one")
    assert not set(gpu(after, "two").values()) & set(gpu(before, "two").values())
    units = [task for task in after.tasks.values() if task.kind == "encode"]
    kept = [unit for unit in units if unit.id in before.tasks]
    assert {unit.shot_id for unit in kept} == {"one"}, "nor is it decoded by another checkpoint"
    assert {task.locked for task in kept} == {True}
    render_into(store, with_checkpoint(film, "e"))
    assert after.film_task_id in Ledger(store).load().commits


def test_a_locked_shot_survives_changed_code(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    film = recipe_of(ONE, TWO)
    locked(store, film, "one")
    before = make_plan(film)
    monkeypatch.setattr("pipeline.tasks.RECIPE_VERSION", RECIPE_VERSION + 1)
    after = make_plan(film, Ledger(store).load().overrides)
    assert gpu(after, "one") == gpu(before, "one")
    assert not set(gpu(after, "two").values()) & set(gpu(before, "two").values())


def test_a_locked_shot_survives_another_quality(store: LocalStore) -> None:
    film = recipe_of(ONE, TWO)
    locked(store, film, "one")
    full = Recipe(film.spec.model_copy(update={"quality": "full"}), film.facts)
    after = make_plan(full, Ledger(store).load().overrides)
    assert gpu(after, "one") == gpu(make_plan(film), "one")


@pytest.mark.parametrize("change", [{"prompt": "something else"}, {"seed": 9}])
def test_a_locked_shot_that_is_ordered_otherwise_is_an_error_and_unlocking_helps(
    store: LocalStore, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    locked(store, recipe_of(ONE, TWO), "one")
    changed = recipe_of({**ONE, **change}, TWO)
    with pytest.raises(SettingError, match="one/segment/0 is locked"):
        make_plan(changed, Ledger(store).load().overrides)
    assert main(["unlock", store.url, "one"]) == 0
    assert gpu(make_plan(changed, Ledger(store).load().overrides), "one")
    capsys.readouterr()
    assert main(["unlock", store.url, "one"]) == 2
    assert "is not locked" in capsys.readouterr().err


def test_a_locked_shot_may_be_lengthened_and_moved(store: LocalStore) -> None:
    film = recipe_of(ONE, TWO)
    locked(store, film, "one")
    longer = recipe_of(TWO, {**ONE, "duration": "30s"})
    after = gpu(make_plan(with_checkpoint(longer, "e"), Ledger(store).load().overrides), "one")
    segments = {label: made for label, made in gpu(make_plan(film), "one").items() if "segment" in label}
    assert segments.items() <= after.items()


def test_a_shot_that_is_not_finished_cannot_be_locked(
    store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    render_into(store, recipe_of(ONE), only=lambda task: task.kind != "window")
    assert main(["lock", store.url, "one"]) == 2
    assert "one/window/0" in capsys.readouterr().err


def test_a_lock_whose_bytes_are_gone_is_planned_anew(store: LocalStore) -> None:
    film = recipe_of(ONE, TWO)
    locked(store, film, "one")
    ledger = Ledger(store)
    ledger.take_lease()
    state = ledger.load()
    bad = gpu(make_plan(film), "one")["one/window/0"]
    ledger.journal([Invalidated(bad, state.commits[bad].attempt, state.commits[bad].epoch, "flipped")])
    after = make_plan(with_checkpoint(film, "e"), ledger.load().overrides)
    assert bad not in after.tasks, "an old name for what new code would make"
    window = next(task for task in after.tasks.values() if task.label == "one/window/0")
    assert not window.locked
    assert after.tasks[gpu(make_plan(film), "one")["one/segment/0"]].locked


def test_a_locked_shot_is_not_redone_and_not_picked(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.redo import choose_redo

    film = recipe_of(ONE, TWO)
    locked(store, film, "one")
    plan = make_plan(film, Ledger(store).load().overrides)
    with pytest.raises(SettingError, match="locked"):
        choose_redo(plan, ["0:01-0:02"], refine_only=False)
    assert main(["pick", store.url, "one", "2"]) == 2
    assert "unlock" in capsys.readouterr().err


def test_the_digest_of_an_order_knows_its_inputs_by_what_they_are_not_by_position() -> None:
    params = {"text": 0, "conditions": [{"input": 1, "start": 0, "stop": 1}], "guidance": 1.0}
    moved = {"text": 1, "conditions": [{"input": 2, "start": 0, "stop": 1}], "guidance": 4.0}
    assert order_digest("segment", params, ["a", "b"]) == order_digest("segment", moved, ["x", "a", "b"])
    assert order_digest("segment", params, ["a", "b"]) != order_digest("segment", params, ["b", "a"])


def test_how_frames_are_handed_on_is_no_part_of_an_order_but_which_ones_are() -> None:
    """A lock from before latents were handed on still holds."""
    params = {"text": 0, "conditions": [{"input": 1, "start": 80, "stop": 93}]}
    latents = {**params, "condition_latents": [{"input": 1, "start": 21, "stop": 24}]}
    other = {**latents, "conditions": [{"input": 1, "start": 76, "stop": 89}]}
    assert order_digest("segment", params, ["a", "b"]) == order_digest("segment", latents, ["a", "b"])
    assert order_digest("segment", params, ["a", "b"]) != order_digest("segment", other, ["a", "b"])


def test_a_lock_is_written_down_in_a_form_that_survives(store: LocalStore) -> None:
    film = recipe_of(ONE)
    locked(store, film, "one")
    lock = Ledger(store).load().locks["one"]
    assert json.loads(json.dumps(dict(lock.tasks))) == lock.tasks
    assert set(lock.labels) == set(gpu(make_plan(film), "one"))
