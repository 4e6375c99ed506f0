"""How a farm's pool follows the cluster and its queue, with stand-ins for Ray's actors."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import pytest

from cluster.farm import FarmSettings
from cluster.farm_pool import Node, Pool
from cluster.job import Failed, Greeting
from pipeline.events import Fault

SPOT, STABLE, LEAVING, NODE = (digits * 28 for digits in ("01", "02", "03", "04"))
"""Node ids, as Ray has them."""


class Ray:
    """What the pool uses of Ray."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.started, self.killed, self.demands = list[Any](), list[Any](), list[int]()
        self.answer: Greeting | Failed = Greeting(NODE, "host", 1, {"device": "cpu"})
        patch.setattr("cluster.door.worker_class", lambda: self)
        patch.setattr("cluster.farm_pool.request_resources", lambda bundles: self.demands.append(len(bundles)))
        patch.setattr("cluster.door.ray.kill", self.killed.append)

    def options(self, **options: Any) -> Ray:
        self.started.append(options["scheduling_strategy"].node_id)
        return self

    def remote(self, *arguments: Any) -> Any:
        return self if arguments else self.greeting()

    @property
    def greet(self) -> Ray:
        return self

    async def greeting(self) -> Greeting | Failed:
        return self.answer


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    return Ray(monkeypatch)


async def grown(nodes: dict[str, Node], wanted: int, most: int | None = None, idle_s: float = 60.0) -> Pool:
    """A pool that has seen these nodes and started what is wanted."""
    tasks = list[asyncio.Task[None]]()

    def spawn(work: Coroutine[Any, Any, None]) -> None:
        tasks.append(asyncio.get_running_loop().create_task(work))

    settings: Any = None
    place = FarmSettings("books").placement
    pool = Pool(settings, place, slots="CPU", idle_s=idle_s, changed=lambda: None, spawn=spawn)
    pool.nodes = nodes
    pool.resize(wanted, most)
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
