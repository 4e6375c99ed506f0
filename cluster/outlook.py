"""What `longtake plan` says about time, cost and cluster sizes. Every figure comes from running the render's own
machine against a simulated clock (pipeline/forecast.py).
"""

from __future__ import annotations

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
NEARLY = 1.05
"""More GPUs that save less than this factor are not worth asking for."""


@dataclass(frozen=True)
class Cluster:
    """The command line of `longtake plan` about a cluster. `gpus` None: the size that suits best."""

    gpus: int | None
    gpu_type: str
    deadline_s: float | None = None
    prices: Path | None = None


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
    fewest: int | None = None
    """The fewest GPUs that are done by the deadline (None: no number is) or, without one, hardly later than any."""

    def to_json(self) -> dict[str, Any]:
        """JSON-able: every size's time, cost and phases."""
        return {
            "basis": self.basis,
            "gpu_type": self.cluster.gpu_type if self.cluster else None,
            "price_per_gpu_hour": self.price_per_hour,
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
            "cost": None if self.price_per_hour is None else one.cost(self.price_per_hour),
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
        lines = [f"{self.chosen} x {self.cluster.gpu_type} ({self.basis}; {price})"]
        lines += _phase_lines(self.forecasts[self.chosen])
        lines += self._size_lines()
        return lines + self._deadline_lines()

    def _money(self, one: Forecast) -> str:
        return "-" if self.price_per_hour is None else f"${one.cost(self.price_per_hour):,.2f}"

    def _size_lines(self) -> list[str]:
        rows = [["GPUs", "time", "cost", "busy", "used", "limited by"]]
        for size, one in self.forecasts.items():
            busy = f"{100 * one.busy:.0f} %"
            rows.append([str(size), hms(one.makespan_s), self._money(one), busy, str(one.workers_used), one.limit()])
        return _table(rows)

    def _deadline_lines(self) -> list[str]:
        assert self.cluster is not None
        if self.cluster.deadline_s is None:
            assert self.fewest is not None
            one = self.forecasts[self.fewest]
            return [f"more than {self.fewest} GPUs hardly help: {hms(one.makespan_s)}, {self._money(one)}"]
        wish = f"done by the deadline, {hms(self.cluster.deadline_s)}"
        if self.fewest is None:
            best = min(self.forecasts.values(), key=lambda one: one.makespan_s)
            return [f"{wish}: no number of GPUs is; at best {hms(best.makespan_s)} with {best.fleet.workers}"]
        one = self.forecasts[self.fewest]
        return [f"{wish}: {self.fewest} GPUs, {hms(one.makespan_s)}, {self._money(one)}"]


def look_ahead(plan: Plan, commits: Mapping[str, CommitRecord], pace: Pace, cluster: Cluster | None = None) -> Outlook:
    """Forecast what is left of a plan: on workers of this machine, or on clusters of several sizes."""

    @cache
    def on(size: int) -> Forecast:
        fleet = Fleet(size) if cluster is None else Fleet(size, node_s=NODE_S, has_weights=False)
        return forecast(plan.tasks, commits, pace, fleet, plan.film_frames)

    if cluster is None:
        return Outlook(pace.basis, {size: on(size) for size in LOCAL_SIZES}, LOCAL_SIZES[0])
    prices = load_prices(cluster.prices)
    sizes = useful_sizes(plan)
    most = max(*sizes, cluster.gpus or 1)
    limit_s = NEARLY * on(most).makespan_s if cluster.deadline_s is None else cluster.deadline_s
    fewest = smallest(lambda size: on(size).makespan_s, limit_s, most)
    chosen = cluster.gpus or fewest or most
    shown = sorted({*sizes, chosen, fewest or most})
    price = prices.get(cluster.gpu_type)
    return Outlook(pace.basis, {size: on(size) for size in shown}, chosen, cluster, price, fewest)


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
