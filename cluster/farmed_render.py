"""One render of a farm: the orchestrator as it is, with workers that the farm lends it for a task each.

The render's own store, lease, journal and machine are those of `longtake render`, so either can go on with what the
other has left. It starts no workers and ends none: what it does not need goes back through `Lender`, and what is lost
is reported there.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from cluster.farm_pool import numerics_name
from cluster.job import RenderJob
from cluster.orchestrator import Member, Orchestrator
from pipeline import events as ev
from pipeline.errors import LongtakeError
from pipeline.farm import Grant, Load, Needs
from pipeline.plan import Plan
from pipeline.tasks import CommitRecord, Order, Role, Task, TaskKind, canonical_json


class FarmSide(Protocol):
    """What a render tells its farm. None of these waits; all are called in the farm's event loop."""

    def needs_changed(self) -> None:
        """Somebody may be lent something now."""

    def loading(self, worker_id: str) -> None:
        """The worker lets go what it had loaded and loads what it was lent for."""

    def loaded(self, worker_id: str, load: Load, seconds: float) -> None:
        """The worker has it in memory."""

    def working(self, worker_id: str, kind: TaskKind, expected_s: float) -> None:
        """The worker has begun a task."""

    def worked(
        self, render_id: str, size: int, kind: TaskKind, expected_s: float, seconds: float, record: CommitRecord | None
    ) -> None:
        """A worker of so many processes has ended a task; without a record it came to nothing."""

    def returned(self, worker_id: str, render_id: str, used: bool) -> None:
        """The worker is free."""

    def lost(self, worker_id: str, reason: str) -> None:
        """The worker is gone, or of no use any more."""


class FarmedRender(Orchestrator):
    """`lend` gives it a worker for one task. The rest is `Orchestrator`'s."""

    def __init__(self, render_id: str, job: RenderJob, farm: FarmSide) -> None:
        super().__init__(job)
        self.render_id = render_id
        self._farm = farm
        self._coming: Counter[TaskKind] = Counter()
        self._grants: dict[str, Grant] = {}
        self._used: set[str] = set()
        self._loading: set[str] = set()
        self._begun: dict[str, tuple[Task, int, float]] = {}
        self._pinned: set[str] = set()
        self._loads: Mapping[Role, Load] = {}
        self.numerics: str | None = None
        """Names the record that the film is pinned to, as far as it is the workers'. None: nothing is pinned yet, or
        mixing was allowed.
        """

    # What the farm asks

    @property
    def needs(self) -> Needs:
        """What it could use beyond what is on its way to it."""
        if self._machine is None or self._finish is not None:
            return Needs()
        needs = self._machine.needs()
        return replace(needs, ready={kind: count - self._coming[kind] for kind, count in needs.ready.items()})

    @property
    def loads(self) -> Mapping[Role, Load]:
        """What a worker of each role has in memory; empty before the plan is there."""
        if self._machine is not None and not self._loads:
            # Once: the farm asks with every event of each of its renders.
            self._loads = {role: self._load_of(role) for role in ev.ALL_ROLES}
        return self._loads

    def grant_of(self, worker_id: str) -> Grant:
        """What a worker that is here was last lent for."""
        return self._grants[worker_id]

    def summary(self) -> ev.ProgressSummary | None:
        """How far it is; None before the plan is there."""
        return self._machine.progress(time.monotonic()) if self._machine else None

    def take_events(self, cursor: int) -> tuple[list[dict[str, Any]], int]:
        """Events since `cursor`, and the next one. What was seen is dropped."""
        return self._story.since(cursor)

    def lend(self, grant: Grant, member: Member, numerics: Mapping[str, Any], loaded: bool) -> None:
        """Have a worker for one task."""
        self._members[member.worker_id] = member
        self._grants[member.worker_id] = grant
        if grant.kind is not None:
            # What it could use does not say so before the machine has taken it in.
            self._coming[grant.kind] += 1
        self._spawn(self._borrow(grant, member, numerics, loaded))

    def drain(self, node_id: str, left_s: float | None) -> None:
        """A node will be taken away."""
        self._story.tell("node_draining", node=node_id, seconds_left=left_s)
        for place_id in self._places_on(node_id):
            self._put(ev.NodeDraining(time.monotonic(), place_id, left_s))

    # What differs from a render with workers of its own

    def _open(self) -> Plan:
        plan = super()._open()
        self._pinned_to(self._ledger.numerics())
        return plan

    def _pinned_to(self, record: Mapping[str, Any] | None) -> None:
        if record is not None and not self._job.allow_mixed:
            self.numerics = numerics_name(record)

    def _hire(self, plan: Plan) -> None:
        left = sum(task_id not in self._commits for task_id in plan.tasks)
        self._story.tell("opened", tasks=len(plan.tasks), left=left)

    async def _watch_nodes(self) -> None:
        """The farm does."""

    def _is_given_up(self, began_s: float) -> bool:
        """Never: the farm's process lives on, and a call that is left alone would hold on to the lease."""
        return False

    async def _borrow(self, grant: Grant, member: Member, numerics: Mapping[str, Any], loaded: bool) -> None:
        try:
            await self._pin_once(numerics)
        except LongtakeError as error:
            self._put(ev.LedgerFailed(time.monotonic(), ev.fault_of(error)))
            return
        about = (member.worker_id, member.door.node_id, grant.role)
        self._put(ev.WorkerLent(time.monotonic(), *about, loaded, member.host))

    async def _pin_once(self, numerics: Mapping[str, Any]) -> None:
        """Compare each kind of worker once with the record that the film is pinned to."""
        known = canonical_json(numerics)
        if known not in self._pinned:
            record = {**numerics, "gang_size": self._job.settings.gang_size}
            mixed = await self._io_call(lambda: self._pin(record))
            self._pinned.add(known)
            if self.numerics is None:
                self._pinned_to(numerics)
            for difference in sorted(mixed):
                self._story.tell("note", message=f"mixed numerics: {difference}", warning=True)

    async def _handle(self, event: ev.Event) -> None:
        if isinstance(event, ev.WorkerLent) and (kind := self._grants[event.worker_id].kind):
            self._coming[kind] -= 1
        await super()._handle(event)
        self._farm.needs_changed()

    def _tell_commit(self, event: ev.Event) -> None:
        super()._tell_commit(event)
        if isinstance(event, ev.Committed | ev.CommitRefused):
            record = event.record if isinstance(event, ev.Committed) else None
            self._end_task(record.task_id if record else event.task_id, record)  # type: ignore[union-attr]

    def return_worker(self, worker_id: str) -> None:
        self._later(lambda: self._return(worker_id))

    def _return(self, worker_id: str) -> None:
        if self._members.pop(worker_id, None) is not None:
            used = worker_id in self._used
            self._used.discard(worker_id)
            self._farm.returned(worker_id, self.render_id, used)

    async def _assign(self, member: Member, role: Role) -> None:
        self._farm.loading(member.worker_id)
        self._loading.add(member.worker_id)
        began_s = time.monotonic()
        await super()._assign(member, role)
        self._loading.discard(member.worker_id)
        if member.worker_id in self._members:
            self._farm.loaded(member.worker_id, self._load_of(role), time.monotonic() - began_s)

    async def _dispatch(self, member: Member, order: Order) -> None:
        self._used.add(member.worker_id)
        self._begun[order.task.id] = order.task, member.door.size, time.monotonic()
        self._farm.working(member.worker_id, order.task.kind, order.task.work)
        await super()._dispatch(member, order)
        if member.worker_id not in self._members:
            self._end_task(order.task.id, None)

    def _put(self, event: ev.Event) -> None:
        if isinstance(event, ev.TaskFailed):
            self._end_task(event.task_id, None)
        super()._put(event)

    def _replace(self, worker_id: str) -> None:
        """Whatever it was lent for came to nothing; the farm has it ended."""
        self._members.pop(worker_id, None)
        self._used.discard(worker_id)
        self._farm.lost(worker_id, "it was lost, or did not do what it should")

    async def _end_workers(self) -> None:
        for worker_id in list(self._members):
            if worker_id in self._used or worker_id in self._loading:
                self._replace(worker_id)
            else:
                self._return(worker_id)
        for task_id in list(self._begun):
            self._end_task(task_id, None)

    def _end_task(self, task_id: str, record: CommitRecord | None) -> None:
        if task_id in self._begun:
            task, size, began_s = self._begun.pop(task_id)
            self._farm.worked(self.render_id, size, task.kind, task.work, time.monotonic() - began_s, record)

    def _load_of(self, role: Role) -> Load:
        weights, gang = self._weights.get(role), self._job.settings.gang_size if role == "chain" else 1
        digest = self._job.recipe.facts.checkpoint.digest
        if weights is None:
            return Load(digest, role, gang=gang)
        return Load(digest, role, canonical_json([weights, self._memory.model_dump()]), gang)
