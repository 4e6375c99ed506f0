"""How a farm's pool follows the cluster and its queue, with stand-ins for Ray's actors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from cluster.farm import FarmSettings
from cluster.farm_pool import GANG, Node, Pool
from cluster.job import Failed, Greeting, WorkerSettings
from pipeline.events import Fault

SPOT, STABLE, LEAVING, NODE = (digits * 28 for digits in ("01", "02", "03", "04"))
"""Node ids, as Ray has them."""
Turn = Callable[[Pool], None]


class Ray:
    """What the pool uses of Ray."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.started, self.killed, self.demands = list[Any](), list[Any](), list[int]()
        self.groups: list[Any] = []
        """Placement groups that are there."""
        self.answer: Greeting | Failed = Greeting(NODE, "host", 1, {"device": "cpu"})
        patch.setattr("cluster.door.worker_class", lambda: self)
        patch.setattr("cluster.farm_pool.request_resources", lambda bundles: self.demands.append(len(bundles)))
        patch.setattr("cluster.door.ray.kill", self.killed.append)
        patch.setattr("cluster.door.placement_group", self.reserve)
        patch.setattr("cluster.door.PlacementGroupSchedulingStrategy", lambda group, index: group)
        patch.setattr("cluster.door.remove_placement_group", self.groups.remove)

    def options(self, **options: Any) -> Ray:
        self.started.append(getattr(options["scheduling_strategy"], "node_id", GANG))
        return self

    def remote(self, settings: Any) -> Actor:
        return Actor(self)

    def reserve(self, bundles: list[dict[str, float]], strategy: str) -> tuple[int, int]:
        self.groups.append((len(self.groups), len(bundles)))
        return self.groups[-1]  # type: ignore[no-any-return]


class Actor:
    """A worker's process: every method's answer is the one that was ordered."""

    def __init__(self, ray: Ray) -> None:
        self._ray = ray

    def __getattr__(self, method: str) -> Actor:
        return self

    async def remote(self, *arguments: Any) -> Greeting | Failed:
        return self._ray.answer


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    return Ray(monkeypatch)


async def grown(
    nodes: dict[str, Node], wanted: int, most: int | None = None, idle_s: float = 60.0, then: Turn = lambda pool: None
) -> Pool:
    """A pool that has seen these nodes, started what is wanted, and done what comes `then`."""
    tasks = list[asyncio.Task[None]]()

    def spawn(work: Coroutine[Any, Any, None]) -> None:
        tasks.append(asyncio.get_running_loop().create_task(work))

    settings = WorkerSettings("books", "pocket", "0", "cpu", "float32", 1, None, 1, None)
    place = FarmSettings("books").placement
    pool = Pool(settings, place, slots="CPU", idle_s=idle_s, changed=lambda: None, spawn=spawn)
    pool.nodes = nodes
    pool.resize(wanted, most)
    await asyncio.gather(*tasks)
    then(pool)
    await asyncio.gather(*tasks)
    return pool


def test_workers_start_where_there_is_room_on_stable_machines_first(ray: Ray) -> None:
    nodes = {SPOT: Node(2, spot=True), STABLE: Node(1), LEAVING: Node(9, draining=True)}
    pool = asyncio.run(grown(nodes, wanted=2))
    assert ray.started == [STABLE, SPOT]
    assert [worker.spot for worker in pool.lenders()] == [False, True]
    pool.hands.clear()
    assert len(asyncio.run(grown(nodes, wanted=9)).hands) == 3, "no more than fit, and none where machines leave"
    assert len(asyncio.run(grown(nodes, wanted=9, most=2)).hands) == 2


def test_demand_is_told_once_and_taken_back(ray: Ray) -> None:
    pool = asyncio.run(grown({}, wanted=5))
    pool.resize(5, None)
    pool.resize(7, 6)
    pool.resize(0, None)
    assert ray.demands == [5, 6, 0]


def test_workers_that_nobody_has_needed_for_long_are_ended_and_no_others(ray: Ray) -> None:
    pool = asyncio.run(grown({NODE: Node(3)}, wanted=3, idle_s=60.0))
    first, second, third = pool.hands.values()
    pool.resize(1, None)
    assert len(pool.hands) == 3, "not at once"
    first.since_s -= 61.0
    second.since_s -= 61.0
    second.lender.render_id = "a"
    pool.resize(0, None)
    assert list(pool.hands.values()) == [second, third]


def test_an_idle_worker_leaves_a_draining_node_and_a_lent_one_may_finish(ray: Ray) -> None:
    pool = asyncio.run(grown({NODE: Node(2)}, wanted=2))
    _, lent = pool.hands.values()
    lent.lender.render_id = "a"
    before, pool.nodes = pool.nodes, {NODE: replace(pool.nodes[NODE], draining=True)}
    pool._mark(before)
    assert list(pool.hands.values()) == [lent] and lent.lender.draining
    assert len(ray.killed) == 1


def test_a_worker_that_does_not_start_is_said_and_tried_again_later(ray: Ray) -> None:
    ray.answer = Failed(Fault("permanent", "no CUDA here"))
    pool = asyncio.run(grown({NODE: Node(1)}, wanted=1))
    assert not pool.hands and pool.problem == "no CUDA here"
    pool.resize(1, None)
    assert len(ray.started) == 1, "not at once"
    pool._not_before_s[NODE] = 0.0
    ray.answer = Greeting(NODE, "host", 1, {})
    again = asyncio.run(grown({NODE: Node(1)}, wanted=1))
    assert again.problem == "" and len(again.lenders()) == 1


def test_a_node_where_workers_have_failed_for_days_is_tried_again_all_the_same(ray: Ray) -> None:
    ray.answer = Failed(Fault("permanent", "no CUDA here"))

    def after_days(pool: Pool) -> None:
        pool._failures[NODE] = 5000
        pool.resize(1, None)

    pool = asyncio.run(grown({NODE: Node(1)}, wanted=0, then=after_days))
    assert pool._failures[NODE] == 5001 and len(ray.started) == 1


# Gangs


def turn(pool: Pool, gangs: dict[int, int], wanted: int) -> None:
    """What the farm does at each of its turns."""
    pool.form(gangs)
    pool.resize(wanted, None)


def test_a_gang_takes_the_places_of_idle_workers_at_once_and_gives_them_back(ray: Ray) -> None:
    pool = asyncio.run(grown({NODE: Node(3)}, wanted=3, then=lambda pool: turn(pool, {2: 1}, 3)))
    assert len(ray.killed) == 2 and len(ray.groups) == 1
    assert sorted(worker.size for worker in pool.lenders()) == [1, 2]
    (gang,) = [hand for hand in pool.hands.values() if hand.lender.size == 2]
    gang.lender.render_id = "a"
    turn(pool, {}, 3)
    assert gang.lender.draining and len(pool.hands) == 2, "whoever has it keeps it, and its places"
    gang.lender.render_id = ""
    pool.end_if_leaving(gang)
    assert ray.groups == [] and len(ray.killed) == 4
    assert [worker.size for worker in pool.lenders()] == [1]


def test_a_gang_waits_for_busy_workers_and_no_others_are_started_meanwhile(ray: Ray) -> None:
    pool = asyncio.run(grown({NODE: Node(2)}, wanted=2))
    busy, idle = pool.hands.values()
    busy.lender.render_id = "a"
    for _ in range(2):
        turn(pool, {2: 1}, 2)
    assert list(pool.hands.values()) == [busy] and busy.lender.draining
    assert ray.groups == [] and len(ray.started) == 2
    assert ray.killed == [idle.member.door._members[0]]


def test_a_gang_that_no_cluster_holds_takes_nobodys_place(ray: Ray) -> None:
    pool = asyncio.run(grown({NODE: Node(2)}, wanted=2, then=lambda pool: turn(pool, {3: 1}, 2)))
    assert len(pool.lenders()) == 2 and ray.killed == []


def test_a_gang_leaves_with_any_of_its_nodes(ray: Ray) -> None:
    nodes = {NODE: Node(1), STABLE: Node(1)}
    pool = asyncio.run(grown(nodes, wanted=0, then=lambda pool: turn(pool, {2: 1}, 2)))
    (gang,) = pool.hands.values()
    node_id, gang.lender.node_id, gang.member.door.node_ids = gang.lender.node_id, GANG, ()
    pool._mark(pool.nodes)
    assert not gang.lender.draining, "nobody knows yet where it will be"
    gang.lender.node_id = node_id
    gang.member.door.node_ids, gang.lender.render_id = (NODE, STABLE), "a"
    pool._mark(pool.nodes)
    assert not gang.lender.draining
    pool.nodes = {**nodes, STABLE: Node(1, draining=True)}
    pool._mark(nodes)
    assert gang.lender.draining
