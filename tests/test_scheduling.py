"""The farm's makespans stay within their bound, and deciding costs next to nothing. The whole table comes from
`python -m tests.scheduling`.
"""

from __future__ import annotations

import pytest

from tests.scheduling import LOAD_S, LOADS, bound_s, films_of, scheduled
from tests.test_farm import film


@pytest.mark.parametrize(
    ("load", "workers"),
    [
        ("1 take of 5 min", 2),
        ("1 film of 60 shots", 64),
        ("a take and 60 shots", 4),
        ("5 films of 12 shots", 16),
        ("10 takes of 1 min", 9),
        ("20 mixed", 8),
        ("20 mixed", 12),
    ],
)
def test_the_makespan_of_a_queue_is_within_its_bound(load: str, workers: int) -> None:
    films = films_of(load)
    farm = scheduled(films, workers)
    assert farm.now_s <= bound_s(films, workers)
    assert farm.tasks == sum(map(len, films))


def test_loading_roles_costs_a_few_percent_of_a_full_farm() -> None:
    films = films_of("20 mixed")
    farm = scheduled(films, 6, LOAD_S)
    assert farm.now_s <= 1.06 * bound_s(films, 6)
    assert farm.loadings > 6, "otherwise this measures nothing"


def test_a_hundred_renders_are_decided_in_little_time() -> None:
    """The bars are 5 ms a task and 2 % of the makespan on a quiet machine; processor time, four times as much here."""
    farm = scheduled([film(1, 12)] * 100, 64)
    assert len(farm.done) == 100
    assert farm.decided_s / farm.tasks < 0.02
    assert farm.decided_s < 0.02 * farm.now_s


def test_what_workers_did_is_drawn_one_thing_at_a_time() -> None:
    farm = scheduled(films_of("5 films of 12 shots"), 3, LOAD_S, draw=True)
    assert farm.bars is not None
    assert {bar.row for bar in farm.bars} == {"w00", "w01", "w02"}
    for name in ("w00", "w01", "w02"):
        mine = sorted((bar.start_s, bar.stop_s) for bar in farm.bars if bar.row == name)
        assert all(before[1] <= after[0] + 1e-6 for before, after in zip(mine, mine[1:], strict=False))
    drawn_s = sum(bar.stop_s - bar.start_s for bar in farm.bars)
    assert drawn_s == pytest.approx(
        sum(t.work for f in films_of("5 films of 12 shots") for t in f.values()) + LOAD_S * farm.loadings
    )


def test_the_tables_loads_go_from_one_render_to_twenty() -> None:
    assert {len(films) for films in LOADS.values()} >= {1, 20}
