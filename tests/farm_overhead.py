"""What a farm on real Ray costs beside computing: `python -m tests.farm_overhead [--renders 3] [--checkpoint FOLDER]`.

One worker on this machine renders films with a tiny checkpoint, first by `longtake render`, then as a farm. For each
task it prints the time from the commit before to its order (deciding, lending, journalling) and from its order to its
commit less what the worker computed (Ray's calls, the order's log, hashing, the commit record); orders that had to
wait for a role to be loaded are left out of the first. And the processor time of the farm's process for each task.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.farm_commands import Ask, Wishes, submission_of
from cluster.render import RenderRequest, prepare
from cluster.session import local_session
from tests.chaos.farm_place import TITLES, farm_process, write_film
from tests.tiny_checkpoint import make_checkpoint

Event = dict[str, Any]
LOOK_S = 1.0
"""Between two looks at what the farm tells of its renders: every look costs its process something."""


@dataclass(frozen=True)
class Overheads:
    """Seconds of each task. `idle_s`: before its order; `call_s`: beside computing, until its commit."""

    idle_s: Sequence[float]
    call_s: Sequence[float]
    computed_s: float

    @property
    def median_s(self) -> float:
        """Of a task, before its order and beside computing."""
        return statistics.median(self.idle_s) + statistics.median(self.call_s)

    def lines(self) -> list[str]:
        """For people."""
        total_s = sum(self.idle_s) + sum(self.call_s)
        share = total_s / (total_s + self.computed_s)
        return [
            f"  before an order: median {statistics.median(self.idle_s) * 1e3:.1f} ms ({len(self.idle_s)} orders)",
            f"  order to commit, less computing: median {statistics.median(self.call_s) * 1e3:.1f} ms "
            f"({len(self.call_s)} tasks)",
            f"  together {total_s:.2f} s beside {self.computed_s:.2f} s of computing: {100 * share:.1f} %",
        ]


def overheads(events: Sequence[Event]) -> Overheads:
    """From the events of everything that one worker did, in the order of time."""
    idle_s, call_s, computed_s = list[float](), list[float](), 0.0
    committed_at_s: float | None = None
    ordered_at_s: dict[str, float] = {}
    for event in sorted(events, key=lambda one: one["time"]):
        match event["event"]:
            case "role":
                committed_at_s = None
            case "dispatched":
                ordered_at_s[event["task"]] = event["time"]
                if committed_at_s is not None:
                    idle_s.append(event["time"] - committed_at_s)
            case "committed":
                committed_at_s = event["time"]
                call_s.append(event["time"] - ordered_at_s[event["task"]] - event["seconds"])
                computed_s += event["seconds"]
    return Overheads(idle_s, call_s, computed_s)


def alone(folder: Path, film: Path) -> list[Event]:
    """Events of `longtake render` with one worker."""
    command = [sys.executable, "-m", "cluster.cli", "render", str(film), "--workers", "1", "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def farmed(folder: Path, films: Sequence[Path]) -> tuple[list[Event], float]:
    """Events of a farm with one worker that is given all films at once, and its process's processor seconds."""
    with local_session(1):
        # Ray reads how to authenticate when it is first imported, which is what the session has settled by now.
        from cluster.farm import FarmSettings, farm_actor

        actor = farm_actor(FarmSettings(str(folder / "books"), most_workers=1))
        ask = Ask(actor)
        ask(actor.hello.remote())
        process = next(found for child in psutil.Process().children() if (found := farm_process(child.pid)))
        before_s = sum(process.cpu_times()[:2])
        for film in films:
            prepared = prepare(RenderRequest(film, str(folder / "farmed" / film.stem)))
            ask(actor.submit.remote(submission_of(prepared, Wishes(render_id=film.stem))))
        cursors, events = dict.fromkeys((film.stem for film in films), 0), list[Event]()
        while cursors:
            time.sleep(LOOK_S)
            for render_id in list(cursors):
                news = ask(actor.follow.remote(render_id, cursors[render_id]))
                events += news.events
                cursors[render_id] = news.cursor
                assert news.row.phase in ("queued", "running", "done"), news.row
                if news.row.phase == "done":
                    del cursors[render_id]
        spent_s = sum(process.cpu_times()[:2]) - before_s
        ask(actor.stop.remote())
    return events, spent_s


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--renders", type=int, default=3, help="how many the farm is given")
    parser.add_argument("--checkpoint", type=Path, help="another one, whose tasks take longer (tiny, 0.6 s a task)")
    options = parser.parse_args()
    renders = options.renders
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = options.checkpoint.resolve() if options.checkpoint else make_checkpoint(folder / "tiny")
        films = []
        for number in range(renders):
            film = write_film(folder, checkpoint, TITLES[number % len(TITLES)])
            films.append(film.rename(folder / f"film-{number}.yaml"))
        single = overheads(alone(folder, films[0]))
        print("\n".join(["longtake render, one film", *single.lines()]), flush=True)
        events, spent_s = farmed(folder, films)
        result = overheads(events)
        print(f"a farm, {renders} films")
        print("\n".join(result.lines()))
        print(f"  more than `longtake render`: {(result.median_s - single.median_s) * 1e3:.1f} ms a task")
        print(f"  processor time of its process: {spent_s / len(result.call_s) * 1e3:.1f} ms a task")


if __name__ == "__main__":
    main()
