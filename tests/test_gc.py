"""Deleting what nothing needs: exactly that, never beside a running render, safe against a crash half way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.recipe import make_plan
from pipeline.journal import AttemptStarted, PartialSaved
from pipeline.ledger import Ledger
from pipeline.store import LocalStore
from tests.rendered import recipe_of, render_into

ONE = {"id": "one", "duration": "12s"}
TWO = {"id": "two", "duration": "12s"}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "render")


def collect(store: LocalStore, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, object]:
    capsys.readouterr()
    assert main(["gc", store.url, "--json", *flags]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def leftovers(store: LocalStore) -> list[str]:
    """What a run leaves behind that nothing refers to: a failed attempt, an old saved state, an old request."""
    for path in ("attempts/segment-x/0001-1/out.bin", "partials/segment-x/0001-1-0008.bin"):
        store.write_attempt(path, b"left")
    store.put_replace("requests/00000001/0001.json", b"{}")
    return ["attempts/segment-x/0001-1/out.bin", "partials/segment-x/0001-1-0008.bin", "requests/00000001/0001.json"]


def test_only_what_nothing_refers_to_is_deleted(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    render_into(store, recipe_of(ONE, TWO))
    kept = {file.path for file in store.list()}
    left = leftovers(store)
    dry = collect(store, capsys, "--dry-run")
    assert dry["files"] == left
    assert {file.path for file in store.list()} == kept | set(left), "nothing was touched"
    assert collect(store, capsys)["files"] == left
    assert kept <= {file.path for file in store.list()}
    assert not set(left) & {file.path for file in store.list()}
    assert Ledger(store).verify().problems == ()


def test_what_verify_finds_is_rendered_again_with_all_that_came_of_it(
    store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = render_into(store, recipe_of(ONE))
    (first,) = (task.id for task in plan.tasks.values() if task.label == "one/segment/0")
    path = Ledger(store).load().commits[first].files[0].path
    store.put_replace(path, b"other bytes")
    assert main(["verify", store.url]) == 1
    assert "tasks will be rendered again" in capsys.readouterr().out
    left = Ledger(store).load().commits
    assert not {first, plan.film_task_id} & left.keys()
    assert {task.id for task in plan.tasks.values() if task.kind == "text"} <= left.keys()
    render_into(store, recipe_of(ONE))
    assert main(["verify", store.url]) == 0
    Ledger(store).take_lease()
    store.put_replace(Ledger(store).load().commits[first].files[0].path, b"other bytes again")
    assert main(["verify", store.url]) == 1
    assert "could not be noted: another render is writing here" in capsys.readouterr().out.replace("--store: ", "")


def test_a_state_to_go_on_from_is_kept(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    plan = render_into(store, recipe_of(ONE), only=lambda task: task.kind == "text")
    segment = next(task for task in plan.tasks.values() if task.kind == "segment")
    saved = store.write_attempt(f"partials/{segment.id}/0001-2-0008.bin", b"saved")
    older = store.write_attempt(f"partials/{segment.id}/0001-2-0004.bin", b"older")
    ledger = Ledger(store)
    ledger.take_lease()
    ledger.journal([AttemptStarted(segment.id, 1, 2, "w", "n"), PartialSaved(segment.id, 1, 2, 8, saved)])
    ledger.release_lease()
    assert collect(store, capsys)["files"] == [older.path]


def test_nothing_is_deleted_beside_a_running_render(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    render_into(store, recipe_of(ONE))
    left = leftovers(store)
    Ledger(store).take_lease()
    for flags in ([], ["--dry-run"]):
        assert main(["gc", store.url, *flags]) == 2
        assert "another render is writing here" in capsys.readouterr().err
    assert set(left) <= {file.path for file in store.list()}


def test_orphans_go_only_when_asked_for_and_are_named(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    render_into(store, recipe_of(ONE, TWO))
    render_into(store, recipe_of(ONE))
    assert collect(store, capsys)["files"] == []
    found = collect(store, capsys, "--orphans")
    before = make_plan(recipe_of(ONE, TWO))
    needed = make_plan(recipe_of(ONE)).tasks
    assert set(found["orphans"]) == before.tasks.keys() - needed.keys()  # type: ignore[call-overload]
    state = Ledger(store).load()
    assert needed.keys() <= state.commits.keys()
    assert not state.problems
    assert Ledger(store).verify().problems == ()
    render_into(store, recipe_of(ONE, TWO))
    assert before.film_task_id in Ledger(store).load().commits, "and can be rendered again"


def test_what_a_stage_one_look_or_a_lock_needs_is_no_orphan(
    store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    render_into(store, recipe_of(ONE, TWO))
    assert main(["lock", store.url, "two"]) == 0
    render_into(store, recipe_of(ONE))
    lock = Ledger(store).load().locks["two"]
    orphans = collect(store, capsys, "--orphans")["orphans"]
    state = Ledger(store).load()
    assert set(lock.tasks.values()) <= state.commits.keys()
    assert not set(lock.tasks.values()) & set(orphans)  # type: ignore[call-overload]


def test_after_starting_over_the_old_bytes_may_go(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    render_into(store, recipe_of(ONE))
    old = {file.path for file in store.list("attempts")}
    ledger = Ledger(store)
    ledger.take_lease(fresh=True)
    ledger.release_lease()
    render_into(store, recipe_of(ONE))
    assert set(collect(store, capsys)["files"]) == old  # type: ignore[call-overload]
    assert Ledger(store).verify().problems == ()


def test_a_crash_at_any_deletion_leaves_nothing_that_counts_without_its_bytes(
    store: LocalStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    render_into(store, recipe_of(ONE, TWO))
    render_into(store, recipe_of(ONE))
    delete, count = LocalStore.delete, 0

    def delete_and_die(self: LocalStore, path: str) -> None:
        nonlocal count
        count += 1
        if count % 5 == 0:
            raise KeyboardInterrupt
        delete(self, path)

    monkeypatch.setattr(LocalStore, "delete", delete_and_die)
    while main(["gc", store.url, "--orphans"]) == 130:
        assert Ledger(store).verify().problems == ()
    assert count > 5
    capsys.readouterr()
    assert collect(store, capsys, "--orphans")["files"] == []
