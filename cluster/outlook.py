"""What `longtake plan` says about time, cost and cluster sizes. Every figure comes from running the render's own
machine against a simulated clock (pipeline/forecast.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cluster.progress import PHASES
from pipeline.forecast import SIZES, Fleet, Forecast, forecast, smallest
from pipeline.pace import NODE_S, Pace
from pipeline.plan import Plan
from pipeline.prices import load_prices
from pipeline.tasks import CommitRecord
from pipeline.times import hms

LOCAL_SIZES = (1, 2, 4, 8, 16)
SPOT_LIFE_S = 6 * 3600.0
"""Our own assumption: it differs by cloud, region, GPU and hour."""
LEAST_SPOT_LIFE_S = 1200.0
"""Machines that are there for less hardly do more than start."""
NEARLY = 1.05
"""More GPUs that save less than this factor are not worth asking for."""


@dataclass(frozen=True)
class Cluster:
    """The command line of `longtake plan` about a cluster. `gpus` None: the size that suits best."""

    gpus: int | None
    gpu_type: str
    deadline_s: float | None = None
    prices: Path | None = None
    stable_gpus: int | None = None
    """Of the GPUs, those on nodes that are not taken away; None: all."""
    spot_life_s: float = SPOT_LIFE_S
    """After which a spot node is taken away, on average."""
    gpus_per_node: int = 8

    def fleet(self, size: int) -> Fleet:
        """A cluster of this kind with so many GPUs, of which nothing is there yet."""
        life_s = math.inf if self.stable_gpus is None else self.spot_life_s
        return Fleet(size, self.gpus_per_node, NODE_S, has_weights=False, stable=self.stable_gpus, life_s=life_s)


@dataclass(frozen=True)
class Outlook:
    """Forecasts of one render by number of workers, and which of them to choose."""

    basis: str
    forecasts: Mapping[int, Forecast]
    chosen: int
    """The size asked for; else the one for the deadline; else where more workers hardly help."""
    cluster: Cluster | None = None
    price_per_hour: float | None = None
    """Of one GPU in dollars; None where no price is known."""
    spot_price_per_hour: float | None = None
    """Of one on a spot node; None where no price is known: then it counts like the others."""
    fewest: int | None = None
    """The fewest GPUs that are done by the deadline (None: no number is) or, without one, hardly later than any."""

    def to_json(self) -> dict[str, Any]:
        """JSON-able: every size's time, cost and phases."""
        return {
            "basis": self.basis,
            "gpu_type": self.cluster.gpu_type if self.cluster else None,
            "price_per_gpu_hour": self.price_per_hour,
            "price_per_spot_gpu_hour": self.spot_price_per_hour,
            "stable_gpus": self.cluster.stable_gpus if self.cluster else None,
            "spot_life_s": self.cluster.spot_life_s if self.cluster and self._has_spot else None,
            "chosen": self.chosen,
            "deadline_s": self.cluster.deadline_s if self.cluster else None,
            "fewest": self.fewest,
            "sizes": [self._size_json(size, one) for size, one in self.forecasts.items()],
        }

    def _size_json(self, size: int, one: Forecast) -> dict[str, Any]:
        return {
            "workers": size,
            "seconds": one.makespan_s,
            "ready_s": one.ready_s,
            "finish_s": one.finish_s,
            "cost": self._cost(one),
            "nodes_lost": one.nodes_lost,
            "slowest_s": one.slowest_s,
            "draws": one.draws,
            "busy": one.busy,
            "workers_used": one.workers_used,
            "limit": one.limit(),
            "staff": one.staff(),
            "phases": [asdict(phase) for phase in one.phases],
        }

    def describe(self) -> list[str]:
        """In lines for a person."""
        if self.cluster is None:
            spans = ", ".join(f"{size}: {hms(one.makespan_s)}" for size, one in self.forecasts.items())
            return [f"time by number of workers: {spans}"]
        price = "no price is known, name one with --prices"
        if self.price_per_hour is not None:
            price = f"${self.price_per_hour:.2f} a GPU and hour"
        lines = [f"{self.chosen} x {self.cluster.gpu_type} ({self.basis}; {price})", *self._spot_lines()]
        lines += _phase_lines(self.forecasts[self.chosen])
        lines += self._size_lines()
        return lines + self._deadline_lines()

    @property
    def _has_spot(self) -> bool:
        return self.cluster is not None and self.cluster.stable_gpus is not None

    def _cost(self, one: Forecast) -> float | None:
        return None if self.price_per_hour is None else one.cost(self.price_per_hour, self.spot_price_per_hour)

    def _money(self, one: Forecast) -> str:
        cost = self._cost(one)
        return "-" if cost is None else f"${cost:,.2f}"

    def _spot_lines(self) -> list[str]:
        if self.cluster is None or not self._has_spot:
            return []
        chosen, spot_type = self.forecasts[self.chosen], f"{self.cluster.gpu_type}-spot"
        price = f"no price is known, name `{spot_type}` with --prices; counted like the others"
        if self.spot_price_per_hour is not None:
            price = f"${self.spot_price_per_hour:.2f} a GPU and hour"
        life = f"each node taken away after {hms(self.cluster.spot_life_s)} on average"
        drawn = f"{chosen.draws} course(s) drawn: time is the middle one, at most the longest"
        return [f"{chosen.fleet.spot} of them spot, {self.cluster.gpus_per_node} a node ({price}; {life}; {drawn})"]

    def _size_lines(self) -> list[str]:
        spot = ["at most", "nodes lost"] if self._has_spot else []
        rows = [["GPUs", "time", *spot, "cost", "busy", "used", "limited by"]]
        for size, one in self.forecasts.items():
            spot = [hms(one.slowest_s), f"{one.nodes_lost:.1f}"] if self._has_spot else []
            told = [self._money(one), f"{100 * one.busy:.0f} %", str(one.workers_used), one.limit()]
            rows.append([str(size), hms(one.makespan_s), *spot, *told])
        return _table(rows)

    def _deadline_lines(self) -> list[str]:
        assert self.cluster is not None
        if self.cluster.deadline_s is None:
            assert self.fewest is not None
            one = self.forecasts[self.fewest]
            return [f"more GPUs than {self.fewest} hardly help: {hms(one.makespan_s)}, {self._money(one)}"]
        wish = f"done by the deadline, {hms(self.cluster.deadline_s)}"
        if self.fewest is None:
            best = min(self.forecasts.values(), key=lambda one: one.slowest_s)
            return [f"{wish}: no number of GPUs is; at best {hms(best.slowest_s)} with {best.fleet.workers}"]
        one = self.forecasts[self.fewest]
        return [f"{wish}: {self.fewest} GPUs, {hms(one.slowest_s)}, {self._money(one)}"]


def look_ahead(plan: Plan, commits: Mapping[str, CommitRecord], pace: Pace, cluster: Cluster | None = None) -> Outlook:
    """Forecast what is left of a plan: on workers of this machine, or on clusters of several sizes."""

    ran: list[Forecast] = []

    @cache
    def on(size: int) -> Forecast:
        fleet = Fleet(size) if cluster is None else cluster.fleet(size)
        known = next((same for one in ran if (same := one.on(fleet))), None)
        if known is None:
            ran.append(forecast(plan.tasks, commits, pace, fleet, plan.film_frames))
        return known or ran[-1]

    if cluster is None:
        return Outlook(pace.basis, {size: on(size) for size in LOCAL_SIZES}, LOCAL_SIZES[0])
    prices = load_prices(cluster.prices)
    sizes = useful_sizes(plan)
    most = max(*sizes, cluster.gpus or 1)
    # The small ones first: the first in which somebody has nothing to do tells how all larger ones go.
    size = 1
    while size < most:
        on(size)
        size *= 2
    # All courses are to be in time.
    limit_s = NEARLY * on(most).slowest_s if cluster.deadline_s is None else cluster.deadline_s
    fewest = smallest(lambda size: on(size).slowest_s, limit_s, most)
    chosen = cluster.gpus or fewest or most
    shown = sorted({*sizes, chosen, fewest or most})
    price, spot_price = prices.get(cluster.gpu_type), prices.get(f"{cluster.gpu_type}-spot")
    return Outlook(pace.basis, {size: on(size) for size in shown}, chosen, cluster, price, spot_price, fewest)


def useful_sizes(plan: Plan) -> Sequence[int]:
    """Cluster sizes worth a look: doubling, up to the first that has a GPU for every task of the widest kind."""
    widest = max(plan.count("window"), plan.count("segment"), plan.count("encode"))
    return [size for place, size in enumerate(SIZES) if place == 0 or SIZES[place - 1] < widest]


def _phase_lines(one: Forecast) -> list[str]:
    rows = [["phase", "tasks", "work", "from", "to", "GPUs at most"]]
    rows.append(["start", "", "", hms(0), hms(one.ready_s), "nodes, weights, loading"])
    for phase in one.phases:
        times = [hms(phase.work_s), hms(phase.start_s), hms(phase.stop_s)]
        rows.append([PHASES[phase.kind], str(phase.tasks), *times, str(phase.most_workers)])
    if one.finish_s >= 1:
        rows.append(["report", "", "", hms(one.makespan_s - one.finish_s), hms(one.makespan_s), ""])
    staff = ", ".join(f"{role} {count:.1f}" for role, count in one.staff().items())
    return [*_table(rows), f"GPUs by role, on average while tasks run: {staff}"]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows in columns; the first and the last column left-aligned."""
    last = len(rows[0]) - 1
    widths = [max(len(row[place]) for row in rows) for place in range(last + 1)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if place in (0, last) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines
