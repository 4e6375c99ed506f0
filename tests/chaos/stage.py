"""Renders under test: the real command in a folder of its own, with faults written down for its processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import yaml

from cluster.cli import main
from cluster.recipe import load_recipe, make_plan
from pipeline.journal import AttemptFailed, AttemptStarted, JournalEntry
from pipeline.ledger import Ledger
from pipeline.store import Store, open_store

ROOT = Path(__file__).resolve().parent.parent.parent
HOOKS = Path(__file__).resolve().parent / "hooks"
LIMIT_S = 300.0
"""Of each wait, on a machine that does other things as well; what is waited for takes seconds."""
RENDER = "renders/chaos"
"""Where the render of `storyboard` lies."""
Event = dict[str, Any]


def storyboard(checkpoint: Path) -> dict[str, Any]:
    """A chain of two segments in two windows, and a shot that fades in: 7 s and 1.3 s at 30 fps, small and square."""
    return {
        "title": "Chaos",
        "seed": 5,
        "checkpoint": str(checkpoint),
        "shots": [
            {"id": "one", "duration": "210f", "prompt": "a red circle moves left"},
            {"id": "two", "duration": "40f", "prompt": "a blue star", "transition": {"crossfade": "10f"}},
        ],
        "output": {"path": "film.mp4", "crf": 45, "aspect": "1:1"},
    }


def until(there: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
    """Wait for something; what it gives. AssertionError if it does not come."""
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        if found := there():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {limit_s:.0f} s: {what}")


class Run:
    """A running `longtake render --json`: its events as they come."""

    def __init__(self, folder: Path, environment: dict[str, str], arguments: tuple[str, ...]) -> None:
        command = [sys.executable, "-m", "cluster.cli", "render", "film.yaml", *arguments, "--json"]
        self.events: list[Event] = []
        self._err = (folder / f"err-{time.monotonic_ns()}").open("w+")
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=self._err, text=True,
            start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.events.append(json.loads(line))

    @property
    def err(self) -> str:
        self._err.flush()
        return Path(self._err.name).read_text()

    def wait_for(self, event: str, match: str = "", limit_s: float = LIMIT_S) -> Event:
        """The first event of this kind whose text holds `match`."""

        def look() -> Event | None:
            ended = self.process.poll() is not None
            found = (e for e in list(self.events) if e["event"] == event and match in json.dumps(e))
            first = next(found, None)
            assert first or not ended, f"ended with {self.process.returncode}: {self.err}"
            return first

        return until(look, f"{event} {match}", limit_s)

    def finish(self, code: int = 0, limit_s: float = LIMIT_S) -> Run:
        """Wait for its end, which must be this exit code."""
        try:
            self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end within {limit_s:.0f} s: {self.err}") from None
        finally:
            self.end()
        self._reader.join(10)
        assert self.process.returncode == code, f"ended with {self.process.returncode}: {self.err}"
        assert "Traceback" not in self.err
        return self

    def end(self) -> None:
        """Kill it, if it still runs; what it started on the cluster ends with it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def story(self) -> str:
        """What was seen of it last, for whoever looks at a failed test."""
        lines = [json.dumps(event) for event in self.events if event["event"] != "progress"]
        return "\n".join([f"render, exit code {self.process.returncode}:", *lines[-40:], self.err])

    def labels(self) -> Counter[str]:
        """How often each task was sent."""
        return Counter(e["label"] for e in self.events if e["event"] == "dispatched")

    def count(self, event: str) -> int:
        """How many events of a kind there were so far."""
        return sum(e["event"] == event for e in list(self.events))


@dataclass
class Stage:
    """A folder with a storyboard, a render in it, and the faults that its processes meet."""

    folder: Path
    chaos: Path
    film_sha256: str = ""
    address: str = ""
    heads: set[str] = field(default_factory=set)
    """Ids of the nodes that drivers join."""
    store_url: str = ""
    runs: list[Run] = field(default_factory=list)

    def write(self, film: dict[str, Any]) -> None:
        (self.folder / "film.yaml").write_text(yaml.safe_dump(film))

    def copy(self, folder: Path) -> None:
        """Have the render, and the film if there is one, of another folder of the same storyboard."""
        shutil.rmtree(self.folder / RENDER, ignore_errors=True)
        shutil.copytree(folder / RENDER, self.folder / RENDER)
        if (folder / "film.mp4").exists():
            shutil.copy(folder / "film.mp4", self.folder)

    def faults(self, *points: dict[str, Any], **settings: Any) -> None:
        """What is to happen from now on; what was claimed and held before is forgotten."""
        for path in [*self.chaos.glob("claim-*"), *self.chaos.glob("held-*"), *self.chaos.glob("release")]:
            path.unlink(missing_ok=True)
        self.write_faults(points, settings)

    def write_faults(self, points: Sequence[dict[str, Any]], settings: dict[str, Any], clock_s: float = 0.0) -> None:
        """The same without forgetting anything."""
        content = {"points": points, "settings": settings, "clock_s": clock_s}
        partial = self.chaos / "faults.partial"
        partial.write_text(json.dumps(content))
        partial.replace(self.chaos / "faults.json")

    def start(self, *arguments: str, **environment: str) -> Run:
        own = {"PYTHONPATH": f"{HOOKS}:{ROOT}", "CHAOS": str(self.chaos), "OMP_NUM_THREADS": "1"}
        store = ("--store", self.store_url) if self.store_url else ()
        place = ("--address", self.address) if self.address else ()
        run = Run(self.folder, {**os.environ, **own, **environment}, (*arguments, *place, *store))
        self.runs.append(run)
        return run

    def render(self, *arguments: str, code: int = 0, **environment: str) -> Run:
        return self.start(*arguments, **environment).finish(code)

    def held(self, count: int = 1) -> list[dict[str, Any]]:
        """Wait until so many processes are held at a point."""

        def look() -> list[Path] | None:
            found = sorted(self.chaos.glob("held-*"))
            return found if len(found) >= count else None

        return [json.loads(path.read_text()) for path in until(look, f"{count} processes held")]

    def release(self) -> None:
        (self.chaos / "release").touch()

    def orchestrators_gone(self) -> None:
        """Wait until no orchestrator is left of a driver or a cluster that was killed: Ray ends it within seconds, or
        later on a busy machine, and until then the same command is refused.
        """
        processes = [int(path.name.partition("-")[2]) for path in self.chaos.glob("orchestrator-*")]
        until(lambda: not any(map(psutil.pid_exists, processes)), "the orchestrators have ended")

    # What the store says

    @property
    def store(self) -> Store:
        return open_store(self.store_url or str(self.folder / RENDER))

    @property
    def history(self) -> list[JournalEntry]:
        return [entry for _, entry in Ledger(self.store).history()]

    def task_of(self, label: str) -> str:
        plan = make_plan(load_recipe(self.store), Ledger(self.store).load().overrides)
        return next(task.id for task in plan.tasks.values() if task.label == label)

    def attempts(self, label: str) -> list[AttemptStarted]:
        task_id = self.task_of(label)
        return [e for e in self.history if isinstance(e, AttemptStarted) and e.task_id == task_id]

    def failures(self, label: str) -> list[AttemptFailed]:
        task_id = self.task_of(label)
        return [e for e in self.history if isinstance(e, AttemptFailed) and e.task_id == task_id]

    def committed(self) -> dict[str, bytes]:
        store = self.store
        return {file.path: store.read(file.path) for file in store.list("commits")}

    def tried_again(self) -> set[str]:
        """Labels of tasks that were sent more than once over all runs."""
        plan = make_plan(load_recipe(self.store), Ledger(self.store).load().overrides)
        sent = Counter(entry.task_id for entry in self.history if isinstance(entry, AttemptStarted))
        return {task.label for task in plan.tasks.values() if sent[task.id] > 1}

    def check(self) -> None:
        """The film is the fault-free one, every byte is as recorded, nothing was committed twice, and every
        orchestrator was on its driver's node.
        """
        self.check_film()
        assert not [path for path in self.committed() if path.count(".") > 1], "a second commit of one task"

    def check_film(self) -> None:
        """The same, of a render that had to commit some tasks once more because their bytes were damaged."""
        assert sha256((self.folder / "film.mp4").read_bytes()).hexdigest() == self.film_sha256
        assert main(["verify", self.store_url or str(self.folder / RENDER)]) == 0
        places = {path.read_text() for path in self.chaos.glob("orchestrator-*")}
        assert places and places <= self.heads, "an orchestrator ends with no other node than its driver's"

    def close(self) -> None:
        self.release()
        for run in self.runs:
            run.end()
            print(run.story())
        for path in self.chaos.glob("orchestrator-*"):
            path.unlink()
        shutil.rmtree(self.folder / "renders", ignore_errors=True)
