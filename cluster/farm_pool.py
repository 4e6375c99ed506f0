"""The workers of a farm: one process for each GPU (or slot of a machine without), started where nodes are, ended when
nobody has needed them for a while.

Nodes that join are found by looking every two seconds; nodes that Ray is about to take away get nothing new and no
process. How many workers are wanted is told to Ray's autoscaler as well, and taken back when the queue is empty.

A gang is a worker of several processes (`cluster.door`), in a Ray placement group. For one that is wanted single
workers end, the free ones at once and others as soon as they are; so does a gang that is not wanted any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources

from cluster.door import RAY_LOSSES, Door
from cluster.drain import draining_nodes, is_spot
from cluster.job import Failed, WorkerSettings
from cluster.orchestrator import START_LIMIT_S, Member, start_pause_s, workers_part
from cluster.placement import Placement
from pipeline.errors import first_line
from pipeline.farm import Growth, Lender
from pipeline.tasks import content_id

log = logging.getLogger("longtake.farm")
LOOK_S = 2.0
GANG = ""
"""The node of a gang that is not there yet: Ray has the choice."""


@dataclass
class Hand:
    """One worker process. `lender.render_id` says who has it; until it has greeted nobody may."""

    lender: Lender
    member: Member
    numerics: Mapping[str, Any] = field(default_factory=dict)
    greeted: bool = False
    leaving: bool = False
    """It is ended as soon as nobody has it, to make place."""
    since_s: float = 0.0
    """Since when it is free; of the monotonic clock."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster. `slots`: how many workers fit; `left_s`: for one being drained, if it is known."""

    slots: int
    spot: bool = False
    draining: bool = False
    left_s: float | None = None


class Pool:
    """`changed` is called when a worker has come or gone. All methods belong to one event loop."""

    def __init__(
        self,
        settings: WorkerSettings,
        place: Placement,
        *,
        slots: str,
        idle_s: float,
        changed: Callable[[], None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        """`place`: what one worker reserves. `slots`: the resource that is counted, GPU or CPU."""
        self._settings, self._place, self._slots, self._idle_s = settings, place, slots, idle_s
        self._changed, self._spawn = changed, spawn
        self.hands: dict[str, Hand] = {}
        self.nodes: dict[str, Node] = {}
        self._started = 0
        self._growth, self._demand = Growth(), 0
        self.problem = ""
        """Why the last worker that was started did not come; "" once one has."""
        self._failures: Counter[str] = Counter()
        self._not_before_s: dict[str, float] = {}

    def lenders(self) -> list[Lender]:
        """Workers that can be lent, or are."""
        return [hand.lender for hand in self.hands.values() if hand.greeted]

    async def watch(self) -> None:
        """Look at the nodes, for ever."""
        while True:
            with contextlib.suppress(*RAY_LOSSES):
                before, self.nodes = self.nodes, await asyncio.to_thread(self._look)
                self._mark(before)
            await asyncio.sleep(LOOK_S)

    def _look(self) -> dict[str, Node]:
        draining = draining_nodes()
        per_worker = self._place.num_gpus if self._slots == "GPU" else self._place.num_cpus
        found = {}
        for node in ray.nodes():
            node_id = node["NodeID"]
            slots = int(node["Resources"].get(self._slots, 0) / (per_worker or 1)) if node["Alive"] else 0
            if slots:
                found[node_id] = Node(slots, is_spot(node), node_id in draining, draining.get(node_id))
        return found

    def _mark(self, before: Mapping[str, Node]) -> None:
        for hand in list(self.hands.values()):
            nodes = [self.nodes.get(place) for place in _places(hand) if place != GANG]
            hand.lender.draining = hand.leaving or any(node is None or node.draining for node in nodes)
            self.end_if_leaving(hand)
        if before != self.nodes:
            self._changed()

    def end_if_leaving(self, hand: Hand) -> None:
        """End a worker that is to go, if nobody has it."""
        if hand.lender.draining and not hand.lender.render_id:
            self.end(hand.lender.worker_id)

    def form(self, gangs: Mapping[int, int]) -> None:
        """Have so many gangs of each size, as far as there is room; called before anything is lent."""
        for hand in [hand for hand in self.hands.values() if hand.lender.size > 1]:
            if self._count(hand.lender.size) > gangs.get(hand.lender.size, 0):
                self._let_go(hand)
        for size, count in gangs.items():
            while self._count(size) < count and self._form_one(size):
                pass

    def _form_one(self, size: int) -> bool:
        """Start a gang if there is room, else make room for it; whether it was started."""
        if size > self.places() or self._not_before_s.get(GANG, 0.0) > time.monotonic():
            return False
        missing = size - self._room()
        leaving = sum(hand.lender.size for hand in self.hands.values() if hand.leaving)
        singles = [hand for hand in self.hands.values() if hand.lender.size == 1 and not hand.lender.draining]
        for hand in sorted(singles, key=lambda one: bool(one.lender.render_id))[: max(0, missing - leaving)]:
            self._let_go(hand)
        if size > self._room():
            return False
        self._start(GANG, False, size)
        return True

    def _let_go(self, hand: Hand) -> None:
        hand.leaving = hand.lender.draining = True
        self.end_if_leaving(hand)

    def _count(self, size: int) -> int:
        return sum(hand.lender.size == size and not hand.lender.draining for hand in self.hands.values())

    def places(self) -> int:
        """For how many workers there is room, whoever has it."""
        return sum(node.slots for node in self.nodes.values() if not node.draining)

    def _room(self) -> int:
        """Places that nobody has."""
        gone = {node_id for node_id, node in self.nodes.items() if node.draining}
        return self.places() - sum(place not in gone for hand in self.hands.values() for place in _places(hand))

    def resize(self, wanted: int, most: int | None) -> None:
        """Have about `wanted` workers, at most `most`, gangs counted as their members: start missing ones, end those
        idle for long.
        """
        wanted = wanted if most is None else min(wanted, most)
        self._tell_autoscaler(self._growth.ask(time.monotonic(), wanted, self.places()))
        staying = sum(hand.lender.size for hand in self.hands.values() if not hand.lender.draining)
        for _ in range(wanted - staying):
            if not self._start_one():
                break
        self._end_idle(staying - wanted)

    def _tell_autoscaler(self, wanted: int) -> None:
        if wanted != self._demand:
            bundle = {"CPU": self._place.num_cpus} | ({"GPU": self._place.num_gpus} if self._place.num_gpus else {})
            with contextlib.suppress(*RAY_LOSSES):
                request_resources(bundles=[bundle] * wanted)
                self._demand = wanted

    def _start_one(self) -> bool:
        """Start a worker where there is room, on stable nodes first; whether there was."""
        now_s = time.monotonic()
        if any(hand.leaving or GANG in _places(hand) for hand in self.hands.values()):
            return False  # A gang is about to take its places, nobody knows yet which.
        used = Counter(place for hand in self.hands.values() for place in _places(hand))
        room = [
            (node.spot, used[node_id] / node.slots, node_id)
            for node_id, node in self.nodes.items()
            if not node.draining and used[node_id] < node.slots and self._not_before_s.get(node_id, 0.0) <= now_s
        ]
        if not room:
            return False
        spot, _, node_id = min(room)
        self._start(node_id, spot)
        return True

    def _start(self, node_id: str, spot: bool, size: int = 1) -> None:
        self._started += 1
        worker_id = f"w{self._started}"
        settings = replace(self._settings, gang_size=size)
        door = Door(settings, self._place, size, on_node=node_id if size == 1 else None)
        self.hands[worker_id] = Hand(Lender(worker_id, node_id, size, spot=spot), Member(worker_id, door))
        self._spawn(self._greet(self.hands[worker_id]))

    async def _greet(self, hand: Hand) -> None:
        lender = hand.lender
        try:
            greetings = await asyncio.wait_for(hand.member.door.greet(), START_LIMIT_S)
        except (TimeoutError, *RAY_LOSSES) as error:
            self._did_not_start(hand, first_line(error))
            return
        if isinstance(greetings, Failed):
            self._did_not_start(hand, greetings.fault.message)
            return
        greeting = greetings[0]
        self._failures[lender.node_id], self.problem = 0, ""
        hand.member.host, hand.numerics = greeting.host, greeting.numerics
        lender.numerics = numerics_name(greeting.numerics)
        if lender.size > 1:
            lender.node_id = hand.member.door.node_id
            lender.spot = any(self.nodes[place].spot for place in _places(hand) if place in self.nodes)
        hand.greeted, hand.since_s = True, time.monotonic()
        log.info("worker %s on %s, process %d", lender.worker_id, greeting.host, greeting.pid)
        self._changed()

    def _did_not_start(self, hand: Hand, reason: str) -> None:
        if hand.lender.worker_id not in self.hands:
            return  # Ended meanwhile, with its node.
        node_id, self.problem = hand.lender.node_id, reason
        self._failures[node_id] += 1
        pause_s = start_pause_s(self._failures[node_id])
        self._not_before_s[node_id] = time.monotonic() + pause_s
        log.warning("no worker on node %s, trying again in %.0f s: %s", node_id[:8], pause_s, reason)
        self.end(hand.lender.worker_id)

    def _end_idle(self, surplus: int) -> None:
        now_s = time.monotonic()
        idle = [hand for hand in self.hands.values() if hand.greeted and not hand.lender.render_id]
        # Spot machines cost less to keep, but what is loaded there may be gone at any moment.
        for hand in sorted(idle, key=lambda one: (not one.lender.spot, one.since_s))[: max(0, surplus)]:
            if now_s - hand.since_s >= self._idle_s:
                self.end(hand.lender.worker_id)

    def end(self, worker_id: str) -> None:
        """End a worker's process; nothing happens if that was done."""
        hand = self.hands.pop(worker_id, None)
        if hand is not None:
            hand.member.door.end()
            self._changed()

    def close(self) -> None:
        """End all, and want nothing any more."""
        for worker_id in list(self.hands):
            self.end(worker_id)
        self._tell_autoscaler(0)


def _places(hand: Hand) -> Sequence[str]:
    """The node of each of its processes; GANG for those of a gang that is not there yet."""
    return hand.member.door.node_ids or (hand.lender.node_id,) * hand.lender.size


def numerics_name(numerics: Mapping[str, Any]) -> str:
    """A short name for a worker's part of a numerics record; equal ones have the same."""
    return content_id("numerics", workers_part(numerics))
