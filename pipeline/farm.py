"""Which worker of a farm goes to which render next, in which role. Pure: no I/O, no clock but the `now_s` it is given.

A farm lends its workers to renders, one task at a time: `lend` is asked whenever a worker is free or a render's
needs have changed, and what it says is all that decides who gets what. Inside a render its machine decides which task
of the role runs. The rules, first one first:

1. Higher priority first, whatever has to be loaded for it.
2. Among equals, a chain that would itself decide when all of them are done goes first, then renders that would miss
   their "done by", the earliest first.
3. Fair shares among equals: whoever's owner has the fewest workers, then the render with the fewest.
4. Inside a render: texts and sources (all wait for them), the chain (the critical path), units of the film whose
   windows are there, then refinement, whose order is that of the film: the earliest playable minute first.
5. A worker stays with what it has loaded where that costs nothing. It is not loaded anew for an equal that has its
   share or has waited less than `PATIENCE` times the loading, nor for anybody while a worker that has the right
   weights will be free before the loading would be done.
6. Chains go to stable machines when one is free, refinement leaves those to them: spot machines first.
7. A worker that nobody needs now loads ahead what a render will need.
8. Segments of a render that wants a gang go to gangs of its size, which do nothing for others. A gang is formed while
   such a render has segments left and no render of higher priority has anything left; it counts as its members.

The caller keeps the values up to date; `lend` changes none of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from pipeline.events import ALL_ROLES
from pipeline.schedule import ROLES_FOR_KIND
from pipeline.tasks import Role, TaskKind

PATIENCE = 10.0
"""How many times the loading a render waits before an equal's worker is loaded anew for it: a tenth is lost at most."""
AHEAD = 2
"""Renders that are open for each worker."""
KINDS: tuple[TaskKind, ...] = ("text", "source", "segment", "film", "encode", "window")
"""In the order in which a render's needs are served."""
CHAIN_KINDS = frozenset[TaskKind]({"text", "source", "segment"})


@dataclass(frozen=True)
class Load:
    """What a worker has in memory: a role's models of a checkpoint."""

    checkpoint: str
    """Digest of the checkpoint folder."""
    role: Role
    weights: str = ""
    """What is merged into the weights, how they attend and how they are kept, in one string; empty for roles without
    a DiT."""
    gang: int = 1
    """How many processes have it together."""


@dataclass(frozen=True)
class Needs:
    """What a render could use now, as its machine says. Seconds are those of the plan's reference worker."""

    ready: Mapping[TaskKind, int] = field(default_factory=dict)
    """Tasks that could be run now and that no worker has."""
    ahead: Mapping[Role, int] = field(default_factory=dict)
    """How many workers each role may still use until the render is over."""
    path_s: float = 0.0
    """The longest chain of tasks left that wait for each other."""
    work_s: float = 0.0
    """All tasks left."""


@dataclass
class Lender:
    """One worker of the farm, as far as lending goes. Times are the caller's clock."""

    worker_id: str
    node_id: str
    size: int = 1
    """Of a gang: how many processes it is."""
    spot: bool = False
    draining: bool = False
    numerics: str = ""
    """Names the numerics record that it computes under."""
    roles: tuple[Role, ...] = ALL_ROLES
    load: Load | None = None
    render_id: str = ""
    """Who has it, "" if it is free."""
    until_s: float = 0.0
    """When it is expected to come back."""


@dataclass
class Borrower:
    """One render that is open: planned, its lease taken, its machine running."""

    render_id: str
    owner: str = ""
    priority: int = 50
    """0 to 100."""
    submitted_s: float = 0.0
    done_by_s: float | None = None
    most_workers: int | None = None
    gang: int = 1
    """How many processes compute each of its segments together."""
    paused: bool = False
    """Gets no worker: paused, over its budget, or about to end."""
    numerics: str | None = None
    """The numerics record its film is pinned to; None: any."""
    loads: Mapping[Role, Load] = field(default_factory=dict)
    needs: Needs = field(default_factory=Needs)
    served_s: float = 0.0
    """When it last got a worker; before that, when it was opened."""
    not_before_s: Mapping[str, float] = field(default_factory=dict)
    """By worker id: it came back from this render without having been used, so it is not offered again until then."""


@dataclass(frozen=True)
class Grant:
    """Lend the worker to the render, in this role, for one task: of this kind, or with luck another that its role
    runs. None: only to load the role ahead, there is no task yet.
    """

    worker_id: str
    render_id: str
    role: Role
    kind: TaskKind | None = None


@dataclass(frozen=True)
class Queued:
    """A submission that is not open yet. Times are the caller's clock."""

    render_id: str
    owner: str = ""
    priority: int = 50
    submitted_s: float = 0.0
    start_after_s: float = 0.0


@dataclass(frozen=True)
class _Offer:
    """A need and the free worker that would serve it best. `load_s`: what has to be loaded first, 0 if nothing."""

    need: _Need
    worker: Lender
    role: Role
    load_s: float


@dataclass(frozen=True)
class _Need:
    borrower: Borrower
    kind: TaskKind
    count: int


def open_next(now_s: float, queue: Iterable[Queued], open_renders: Iterable[Borrower], workers: int, idle: int) -> str:
    """The id of the render to open next, "" for none. Ask again until it says so.

    `AHEAD` times as many renders are open as there are workers, those of higher priority first, then of owners with
    fewer of them open, then by submission; one more where workers are idle. With only one for each worker, a chain
    would begin when another render's refinement is done, and the last ones' chains would decide when all are done.
    """
    active = [render for render in open_renders if not render.paused]
    open_of = Counter(render.owner for render in active)
    due = [entry for entry in queue if entry.start_after_s <= now_s]
    first = min(due, key=lambda one: (-one.priority, open_of[one.owner], one.submitted_s, one.render_id), default=None)
    if first is None:
        return ""
    before = sum(render.priority >= first.priority for render in active)
    return first.render_id if idle > 0 or before < max(1, AHEAD * workers) else ""


def lend(
    now_s: float,
    workers: Sequence[Lender],
    renders: Sequence[Borrower],
    load_s: Callable[[Load], float],
) -> list[Grant]:
    """Who gets which worker now. `load_s`: expected seconds to load something."""
    free = [worker for worker in workers if not worker.render_id and not worker.draining]
    if not free:
        return []
    asking = [render for render in renders if not render.paused]
    return _Round(now_s, workers, asking, load_s, free).run()


class _Round:
    """One answer of `lend`: counts that change with every grant, so that a grant is seen by the next."""

    def __init__(
        self,
        now_s: float,
        workers: Sequence[Lender],
        renders: Sequence[Borrower],
        load_s: Callable[[Load], float],
        free: list[Lender],
    ) -> None:
        self._now_s, self._workers, self._renders, self._load_s = now_s, workers, renders, load_s
        self._free = free
        owner_of = {render.render_id: render.owner for render in renders}
        self._held: Counter[str] = Counter()
        self._held_by: Counter[str] = Counter()
        for worker in workers:
            if worker.render_id in owner_of:
                self._held[worker.render_id] += worker.size
                self._held_by[owner_of[worker.render_id]] += worker.size
        self._given: Counter[tuple[str, TaskKind]] = Counter()
        self._missed = {load for render in renders if render.needs.work_s > 0 for load in render.loads.values()}
        self._awaited: set[str] = set()
        self._shares = self._entitled()
        self._due = self._late()
        self._critical = self._deciding()
        self._grants: list[Grant] = []

    def run(self) -> list[Grant]:
        while self._free:
            offer = self._best_offer()
            if offer is None:
                break
            self._give(offer.worker, offer.need.borrower, offer.role, offer.need.kind)
        if self._free:
            self._load_ahead()
        return self._grants

    def _give(self, worker: Lender, render: Borrower, role: Role, kind: TaskKind) -> None:
        self._free.remove(worker)
        self._held[render.render_id] += worker.size
        self._held_by[render.owner] += worker.size
        self._given[render.render_id, kind] += 1
        self._grants.append(Grant(worker.worker_id, render.render_id, role, kind))

    # Whose turn it is

    def _best_offer(self) -> _Offer | None:
        """The first need in order that a free worker can serve. One that costs loading gives way to a later one of
        the same priority that the same worker serves for nothing, unless it has a claim.
        """
        needs = sorted(self._needs(), key=self._turn)
        self._awaited = set()
        deferred: _Offer | None = None
        for need in needs:
            if deferred is not None and need.borrower.priority < deferred.need.borrower.priority:
                return deferred
            offer = self._offer(need)
            if offer is None:
                continue
            if deferred is None:
                if offer.load_s == 0 or self._has_claim(need.borrower, offer.load_s):
                    return offer
                deferred = offer
            elif offer.load_s == 0 and offer.worker is deferred.worker and need.borrower is not deferred.need.borrower:
                return offer
        return deferred

    def _needs(self) -> Iterator[_Need]:
        for render in self._renders:
            for kind in KINDS:
                count = render.needs.ready.get(kind, 0) - self._given[render.render_id, kind]
                if count > 0 and self._may_have(render, render.gang if kind == "segment" else 1):
                    yield _Need(render, kind, count)

    def _may_have(self, render: Borrower, more: int) -> bool:
        return render.most_workers is None or self._held[render.render_id] + more <= render.most_workers

    def _turn(self, need: _Need) -> tuple[object, ...]:
        render = need.borrower
        deciding = render.render_id in self._critical and need.kind in CHAIN_KINDS
        return (
            -render.priority,
            not deciding,
            self._due.get(render.render_id, inf),
            self._held_by[render.owner],
            self._held[render.render_id],
            render.served_s,
            render.submitted_s,
            render.render_id,
            KINDS.index(need.kind),
        )

    def _has_claim(self, render: Borrower, load_s: float) -> bool:
        """Whether a worker is loaded anew for it although an equal could use it as it is."""
        held = self._held[render.render_id]
        if render.render_id in self._critical or held + 1 <= self._shares[render.render_id]:
            return True
        return held == 0 and self._now_s - render.served_s >= PATIENCE * load_s

    def _equals(self) -> Iterable[list[Borrower]]:
        """The renders that have something left to do, by priority."""
        by_priority: dict[int, list[Borrower]] = {}
        for render in self._renders:
            if render.needs.work_s > 0:
                by_priority.setdefault(render.priority, []).append(render)
        return by_priority.values()

    def _entitled(self) -> Mapping[str, float]:
        """Workers each render is entitled to: those of its priority and the free ones, split by owner, then render."""
        shares: dict[str, float] = {}
        for equals in self._equals():
            free = sum(worker.size for worker in self._free)
            workers = free + sum(self._held[render.render_id] for render in equals)
            renders_of = Counter(render.owner for render in equals)
            for render in equals:
                shares[render.render_id] = workers / len(renders_of) / renders_of[render.owner]
        for render in self._renders:
            shares.setdefault(render.render_id, 0.0)
        return shares

    def _late(self) -> Mapping[str, float]:
        """When the renders that would miss their "done by" with their share should be done."""
        due: dict[str, float] = {}
        for render in self._renders:
            if render.done_by_s is not None:
                share = max(1.0, self._shares[render.render_id])
                rest_s = max(render.needs.path_s, render.needs.work_s / share)
                if self._now_s + rest_s > render.done_by_s:
                    due[render.render_id] = render.done_by_s
        return due

    def _deciding(self) -> set[str]:
        """Renders whose longest chain alone takes as long as all their equals' work on all workers."""
        found: set[str] = set()
        for equals in self._equals():
            even_s = sum(render.needs.work_s for render in equals) / len(self._workers)
            found |= {render.render_id for render in equals if render.needs.path_s >= even_s}
        return found

    # Which worker

    def _offer(self, need: _Need) -> _Offer | None:
        """The best free worker for the need, None if there is none or one that has the weights is about to come."""
        loads = {role: need.borrower.loads[role] for role in ROLES_FOR_KIND[need.kind] if role in need.borrower.loads}
        role = _role_to_load(need, loads)
        fitting = [worker for worker in self._free if self._fits(worker, need.borrower)]
        if need.kind == "segment" and (stable := [worker for worker in fitting if not worker.spot]):
            # A chain pays once for a stable machine with a loading: it stays there from then on.
            fitting = stable
        if ready := [worker for worker in fitting if worker.load in loads.values()]:
            worker = min(ready, key=lambda one: self._liking(one, need.kind))
            assert worker.load is not None
            return _Offer(need, worker, worker.load.role, 0.0)
        others = [worker for worker in fitting if role is not None and _can(worker, need.borrower, role)]
        if role is None or not others:
            return None
        cost_s = self._load_s(loads[role])
        if self._will_come(need, loads.values(), cost_s):
            return None
        return _Offer(need, min(others, key=lambda one: self._liking(one, need.kind)), role, cost_s)

    def _fits(self, worker: Lender, render: Borrower) -> bool:
        if (render.numerics is not None and worker.numerics != render.numerics) or worker.size not in (1, render.gang):
            return False
        return render.not_before_s.get(worker.worker_id, -inf) <= self._now_s

    def _liking(self, worker: Lender, kind: TaskKind) -> tuple[object, ...]:
        """Sorts workers that cost the same: no gang for what one process does, the fitting kind of machine, then one
        whose memory nobody misses.
        """
        wrong_machine = worker.spot if kind == "segment" else not worker.spot
        return (worker.size if kind != "segment" else 0, wrong_machine, worker.load in self._missed, worker.worker_id)

    def _will_come(self, need: _Need, loads: Iterable[Load], cost_s: float) -> bool:
        """Whether busy workers with the right weights are back, for all tasks of the need, before a loading is over.

        One that is overdue by more than that is not waited for, and each one is waited for by one task.
        """
        wanted = set(loads)
        coming = [
            worker.worker_id
            for worker in self._workers
            if worker.render_id
            and not worker.draining
            and worker.load in wanted
            and worker.worker_id not in self._awaited
            and self._fits(worker, need.borrower)
            and abs(worker.until_s - self._now_s) <= cost_s
        ]
        self._awaited.update(coming[: need.count])
        return len(coming) >= need.count

    # Loading ahead

    def _load_ahead(self) -> None:
        staff = Counter(worker.load for worker in self._workers if worker.load is not None and not worker.draining)
        wanted: Counter[Load] = Counter()
        for render in self._renders:
            for role, load in render.loads.items():
                wanted[load] += render.needs.ahead.get(role, 0)
        lent = {grant.worker_id for grant in self._grants}
        order = sorted(self._renders, key=lambda one: (-one.priority, one.submitted_s, one.render_id))
        for role in ("chain", "refine"):
            for render in order:
                self._load_role_ahead(render, role, staff, wanted, lent)

    def _load_role_ahead(
        self, render: Borrower, role: Role, staff: Counter[Load], wanted: Counter[Load], lent: set[str]
    ) -> None:
        load = render.loads.get(role)
        if load is None:
            return
        while staff[load] < min(wanted[load], len(self._workers)):
            if not self._may_have(render, load.gang):
                return
            idle = [
                worker
                for worker in self._free
                if _can(worker, render, role)
                and self._fits(worker, render)
                and (worker.load is None or staff[worker.load] > wanted[worker.load])
            ]
            if not idle:
                return
            kind: TaskKind = "segment" if role == "chain" else "window"
            worker = min(idle, key=lambda one: self._liking(one, kind))
            self._free.remove(worker)
            self._held[render.render_id] += worker.size
            if worker.load is not None:
                staff[worker.load] -= 1
            staff[load] += 1
            self._grants.append(Grant(worker.worker_id, render.render_id, role))


def _can(worker: Lender, render: Borrower, role: Role) -> bool:
    """Whether it may take the role for this render: segments are for its gangs where it wants any."""
    return role in worker.roles and (role != "chain" or worker.size == render.gang)


def _role_to_load(need: _Need, loads: Mapping[Role, Load]) -> Role | None:
    """For what several roles can do: the one that the render will need anyway."""
    order: tuple[Role, ...] = ("chain", "refine") if need.kind == "source" else ("refine", "chain")
    ahead = need.borrower.needs.ahead
    useful = [role for role in order if role in loads and ahead.get(role, 0) > 0]
    return next(iter(useful), None) or next((role for role in ROLES_FOR_KIND[need.kind] if role in loads), None)


def workers_wanted(queue: int, renders: Iterable[Borrower]) -> int:
    """How many workers could be used before all is done: one for each queued submission, and what open renders may
    still use.
    """
    wanted = queue
    for render in renders:
        if render.paused:
            continue
        now = sum(render.needs.ready.values())
        chains = render.needs.ahead.get("chain", 0) * (render.gang - 1)
        useful = max(now, sum(render.needs.ahead.values()) + chains, 1 if render.needs.work_s > 0 else 0)
        wanted += useful if render.most_workers is None else min(useful, render.most_workers)
    return wanted


def gangs_wanted(renders: Iterable[Borrower]) -> Mapping[int, int]:
    """How many gangs of which size there should be now."""
    active = [render for render in renders if not render.paused and render.needs.work_s > 0]
    highest = max((render.priority for render in active), default=0)
    wanted: Counter[int] = Counter()
    for render in active:
        if render.gang > 1 and render.priority == highest:
            most = inf if render.most_workers is None else render.most_workers // render.gang
            wanted[render.gang] += int(min(render.needs.ahead.get("chain", 0), most))
    return +wanted


GROW_S = 15.0
"""So long an autoscaler that has not moved is waited for: three of its looks."""


@dataclass
class Growth:
    """How many workers an autoscaler is asked for at a time.

    Ray's takes what it is asked for as one wish: if not all of it can ever be had, it starts nothing, and it does not
    tell how far it may grow. So all is asked for; when nothing has come, for half as much more at a time; when that has
    come, for twice as much more.
    """

    asked: int = 0
    """All told; 0: nothing that is not there."""
    more: int = 0
    """At most so many beyond those that were there. 0: any number, nothing has been refused yet."""
    slots: int = 0
    since_s: float = 0.0
    """Of the caller's clock: since when nothing has moved."""

    def ask(self, now_s: float, wanted: int, slots: int) -> int:
        """How many to ask for, all told, of the `wanted` ones while `slots` could be had now."""
        if wanted <= slots:
            self.asked = self.more = 0
            return wanted
        if not self.asked or slots > self.slots:
            self.since_s = now_s
        self.slots = slots
        if now_s - self.since_s >= GROW_S:
            self._limit(now_s, max(1, (self.more or wanted - slots) // 2))
        elif not self.more:
            self.asked = wanted
        elif slots >= self.asked:
            self._limit(now_s, self.more * 2)
        return min(self.asked, wanted)

    def _limit(self, now_s: float, more: int) -> None:
        self.more, self.asked, self.since_s = more, self.slots + more, now_s
