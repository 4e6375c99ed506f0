"""Simulated renders in the test run: a fixed set of seeds, and one film crashed at every store boundary."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.simulate import PLOTS, every_boundary, main
from tests.simulated import SECOND_ACTS, Plot, Violation, World

SEEDS = 200


def test_renders_in_trouble_end_with_the_fault_free_film() -> None:
    happened: Counter[str] = Counter()
    for seed in range(SEEDS):
        happened += World(seed).run().happened
    missing = set(vars(World(0).troubles)) - {"left"} - set(happened)
    assert not missing, "every kind of trouble must have happened"


def test_a_crash_at_any_store_boundary_loses_and_doubles_nothing() -> None:
    worlds = every_boundary(1)
    assert len(worlds) > 50
    for world in worlds:
        world.run()
    restarts = sum(len(world.drivers) == 2 for world in worlds)
    assert restarts > len(worlds) / 2, "the others are crashes of a worker"


@pytest.mark.parametrize("plot", PLOTS)
def test_a_crash_at_any_boundary_around_a_persons_request_loses_and_doubles_nothing(plot: Plot) -> None:
    worlds = every_boundary(2, plot)
    assert len(worlds) > 50
    # Of the long plots a part; `python -m tests.simulate --every-boundary --plot lock` does them all.
    for world in worlds[:: len(worlds) // 50 if plot in SECOND_ACTS else 1]:
        world.run()
        assert world.requests or world.collected, "somebody must have asked"


def test_a_violation_is_reported_with_a_way_to_see_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(world: World) -> World:
        raise Violation("the film differs")

    monkeypatch.setattr(World, "run", fail)
    assert main(["--seeds", "1", "--first-seed", "17"]) == 1
    told = capsys.readouterr().err
    assert "seed 17: Violation: the film differs" in told
    assert "--first-seed 17 --trace" in told
