"""The door to a worker: what an orchestrator holds of it, whether it is one process or a gang of several.

A gang is n worker processes in a Ray placement group, on one node where they fit. They compute segments together
and live and die as one: whichever member is lost, the calls under way raise what Ray raised for it, once, and
`end` ends all of them and gives their places back. In every other role the first member works alone, exactly as
a single worker does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import ray
from ray import exceptions as ray_errors
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.job import Failed, Greeting, Serves, Standing, WorkerSettings
from cluster.placement import Placement
from cluster.worker import SIDE_GROUP, worker_class
from pipeline.params import WeightsParams
from pipeline.spec import Memory
from pipeline.tasks import Order, Produced, Role

RAY_LOSSES = (ray_errors.RayError,)
GANG_GRACE_S = 30.0
"""How long the other members of a gang may still answer once one has failed: it may be that all fail alike, or that
one is lost and the others notice it first.
"""


class Door:
    """One worker of `size` processes. Methods that return Failed do so for what went wrong inside the worker; they
    raise what Ray raises if it is gone.
    """

    def __init__(
        self, settings: WorkerSettings, place: Placement, size: int = 1, *, on_node: str | None = None
    ) -> None:
        """Asks for the processes, on a node if one is named; they are there when `greet` returns."""
        self.size = size
        self.node_ids: tuple[str, ...] = ()
        """Of its members, once they have greeted."""
        self.broken = ""
        """Why the worker is of no use any more although nobody is lost; "" if it is."""
        self.serves: Serves | None = None
        """The render it works for from its next call on; None: the one of its settings."""
        self._bundles = _reserve(place, size) if size > 1 else None
        self._members = [_start(settings, place, self._bundles, rank, on_node) for rank in range(size)]

    async def greet(self) -> tuple[Greeting, ...] | Failed:
        """Every member's greeting; a gang has met when it returns."""
        answers = await self._all([member.greet.remote() for member in self._members])
        if isinstance(answers, Failed):
            return answers
        self.node_ids = tuple(answer.node_id for answer in answers)
        if self.size > 1 and isinstance(failed := await self._meet(), Failed):
            return failed
        return tuple(answers)

    @property
    def node_id(self) -> str:
        """The node it is on. A gang that spans several is in a place of its own: all of them."""
        return "+".join(sorted(set(self.node_ids)))

    async def assume(self, role: Role, weights: WeightsParams | None, memory: Memory) -> Role | Failed:
        """Have the role's models loaded, by all members for the role of segments."""
        working = self._working(role == "chain")
        answers = await self._all([member.assume.remote(role, weights, memory, self.serves) for member in working])
        return answers if isinstance(answers, Failed) else role

    async def run(self, order: Order) -> Produced | Failed:
        """Have an order computed, by all members if it is a segment. The first one has the files."""
        members = self._working(order.task.kind == "segment")
        answers = await self._all([member.run.remote(order, self.serves) for member in members])
        if isinstance(answers, Failed):
            return answers
        produced: Produced = answers[0]
        return produced

    async def progress(self) -> Standing:
        """How far the running order is. Does not wait for it."""
        standing: Standing = await _value(self._aside(self._members[0], "progress"))
        return standing

    async def answers(self) -> None:
        """Returns if every process still answers; does not wait for the running order."""
        await asyncio.gather(*(_value(self._aside(member, "progress")) for member in self._members))

    def stop(self) -> None:
        """Ask the running order to save its state and end."""
        self._aside(self._members[0], "stop")

    async def dismiss(self) -> None:
        """Have the processes clean up; they are about to be ended."""
        await asyncio.gather(*(_value(self._aside(member, "dismiss")) for member in self._members))

    def end(self) -> None:
        """End the processes. Whatever they still answer is lost."""
        for member in self._members:
            with contextlib.suppress(*RAY_LOSSES):
                ray.kill(member)
        if self._bundles is not None:
            with contextlib.suppress(*RAY_LOSSES):
                remove_placement_group(self._bundles)

    def _working(self, together: bool) -> Sequence[Any]:
        return self._members if together else self._members[:1]

    def _aside(self, member: Any, method: str) -> Any:
        """Call a method that does not wait for the running order."""
        return getattr(member, method).options(concurrency_group=SIDE_GROUP).remote()

    async def _meet(self) -> Failed | None:
        """Bring the members of a gang together at the first one's address."""
        address = await _value(self._members[0].open_meeting.remote())
        if isinstance(address, Failed):
            return address
        joins = [member.join_gang.remote(rank, address) for rank, member in enumerate(self._members)]
        answers = await self._all(joins)
        return answers if isinstance(answers, Failed) else None

    async def _all(self, references: Sequence[Any]) -> list[Any] | Failed:
        calls = [asyncio.ensure_future(_value(reference)) for reference in references]
        try:
            answers, waited = await answers_of(calls)
        finally:
            for call in calls:
                call.cancel()
        if waited and isinstance(answers, Failed):
            self.broken = f"a member of the gang failed and the others waited for it: {answers.fault.message}"
        return answers


async def answers_of(calls: Sequence[asyncio.Future[Any]]) -> tuple[list[Any] | Failed, bool]:
    """What all members answer, or the failure: the first member's own if it has one.

    A member that fails while the others go on leaves them waiting for it: True then, after GANG_GRACE_S. Raises as soon
    as one of the calls does.
    """
    waiting, failed = set(calls), list[Failed]()
    while waiting:
        limit_s = GANG_GRACE_S if failed else None
        done, waiting = await asyncio.wait(waiting, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            return failed[0], True
        failed += [answer for answer in (call.result() for call in done) if isinstance(answer, Failed)]
    answers = [call.result() for call in calls]
    if failed:
        return answers[0] if isinstance(answers[0], Failed) else failed[0], False
    return answers, False


def _reserve(place: Placement, size: int) -> PlacementGroup:
    bundle = {"CPU": place.num_cpus} | ({"GPU": place.num_gpus} if place.num_gpus else {})
    return placement_group([dict(bundle) for _ in range(size)], strategy="PACK")


def _start(
    settings: WorkerSettings, place: Placement, bundles: PlacementGroup | None, index: int, on_node: str | None
) -> Any:
    options: dict[str, Any] = {"num_cpus": place.num_cpus, "num_gpus": place.num_gpus}
    if on_node is not None:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(on_node, soft=False)
    if bundles is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(bundles, index)
    return worker_class().options(**options).remote(settings)


async def _value(reference: Any) -> Any:
    return await reference
