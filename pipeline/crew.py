"""The workers of a render and their nodes: who is there, what each one does, where nothing is sent to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.tasks import Order, Role

SAVE_S = 20.0
"""How long before a draining node's deadline its orders are asked to save and stop: a denoising step at full size takes
up to 13 s, and what it saves has to reach the store. Spot machines give 25 to 30 s in all.
"""


@dataclass
class Job:
    """An order under way. Times are the machine's own."""

    order: Order
    worker_id: str
    node_id: str
    alive_s: float
    """When it last moved on."""
    steps: int = 0
    frames: int = 0
    asked_to_stop: bool = False


@dataclass
class Worker:
    """One worker, loading a role, running a task, waiting for its commit, or free."""

    worker_id: str
    node_id: str
    roles: tuple[Role, ...]
    role: Role | None
    host: str = ""
    spot: bool = False
    """On a machine that may be taken away."""
    loading_since_s: float | None = None
    task_id: str | None = None
    """Running, or produced and waiting for its commit."""
    lent: bool = False
    """By a farm, for one task."""
    used: bool = False
    """It has had that task."""

    @property
    def steady(self) -> bool:
        """Whether it can do a chain where nobody takes the machine away."""
        return not self.spot and "chain" in self.roles

    @property
    def free(self) -> bool:
        """Whether it can be given something to do."""
        return self.loading_since_s is None and self.task_id is None


class Crew:
    """`patience`: failures in a row on a node before it is avoided."""

    def __init__(self, patience: int) -> None:
        self.workers: dict[str, Worker] = {}
        self._gone: set[str] = set()
        self._patience = patience
        self._failures: Counter[str] = Counter()
        self._draining: dict[str, float | None] = {}

    def join(self, worker: Worker) -> None:
        """Add a worker, unless it is there or was: an id names one incarnation."""
        if worker.worker_id not in self._gone:
            self.workers.setdefault(worker.worker_id, worker)

    def give_back(self, worker_id: str) -> None:
        """A lent worker goes back to its farm, from where it may come again."""
        del self.workers[worker_id]

    def remove(self, worker_id: str) -> Worker | None:
        """The worker, which is gone from now on; None if it was not there."""
        self._gone.add(worker_id)
        return self.workers.pop(worker_id, None)

    def release(self, task_id: str) -> str:
        """Whoever is busy with the task is free; the node it is on, "" if nobody is."""
        node_id = ""
        for worker in self.workers.values():
            if worker.task_id == task_id:
                worker.task_id, node_id = None, worker.node_id
        return node_id

    def succeeded(self, node_id: str) -> None:
        """Something went well there: it is trusted again."""
        self._failures[node_id] = 0

    def failed(self, node_id: str) -> bool:
        """Something failed there; whether the node is avoided from now on."""
        self._failures[node_id] += 1
        return self._failures[node_id] == self._patience

    def drain(self, node_id: str, until_s: float | None) -> None:
        """The node will be taken away: at `until_s`, if that is known."""
        self._draining.setdefault(node_id, until_s)

    def is_draining(self, node_id: str) -> bool:
        """Whether the node will be taken away."""
        return node_id in self._draining

    def ending_nodes(self, clock_s: float) -> set[str]:
        """Nodes with so little time left that what runs there has to be saved now."""
        return {node for node, until_s in self._draining.items() if until_s is not None and clock_s >= until_s - SAVE_S}

    def usable(self) -> Sequence[Worker]:
        """Workers on nodes that stay, those who can do least first, so that they do not find it taken, and of equals
        those on stable machines.

        Nodes that failed again and again are left out as long as there are others.
        """
        there = [worker for worker in self.workers.values() if worker.node_id not in self._draining]
        trusted = [worker for worker in there if self._failures[worker.node_id] < self._patience]
        return sorted(trusted or there, key=lambda worker: (len(worker.roles), worker.spot))
