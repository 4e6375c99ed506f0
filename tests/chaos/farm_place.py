"""A cluster with a farm under test, and a folder in which its commands are run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, TypeVar

import psutil
import yaml

from pipeline.journal import AttemptStarted
from pipeline.ledger import Ledger
from pipeline.store import LocalStore
from pipeline.submissions import SubmissionBook, SubmissionState
from tests.chaos.stage import LIMIT_S, ROOT, until

T = TypeVar("T")
PRICE = 3.6
"""Of a worker and hour: 0.001 a second."""
TITLES = ("late", "usual", "soon")

START = """
import sys, ray
from cluster.farm import FarmSettings, farm_actor
ray.init(address=sys.argv[1], namespace="longtake", log_to_driver=False)
settings = FarmSettings(sys.argv[2], "cpu", "GPU", price_hour=float(sys.argv[3]))
ray.get(farm_actor(settings).hello.remote())
"""
"""`longtake farm start` takes GPUs for GPUs; these are names only, so their workers compute on the CPU."""


def patiently(make: Callable[[], T]) -> T:
    """Have Ray make a node: it gives each of its own 30 s to start, however busy the machine, so perhaps again."""
    for _ in range(2):
        try:
            return make()
        except Exception as error:
            # Ray has no type of its own for this.
            if "timed out during startup" not in str(error):
                raise
    return make()


def write_film(folder: Path, checkpoint: Path, title: str) -> Path:
    """A storyboard: a take of two segments, two windows, two units and the film; 7 s at 30 fps."""
    shot = {"id": "one", "duration": "210f", "prompt": "a red circle moves left"}
    output = {"path": f"out/{title}.mp4", "crf": 45}
    film = {"title": title, "seed": TITLES.index(title), "checkpoint": str(checkpoint), "shots": [shot],
            "output": output}  # fmt: skip
    path = folder / f"{title}.yaml"
    path.write_text(yaml.safe_dump(film))
    return path


def render_alone(folder: Path, checkpoint: Path, address: str) -> dict[str, str]:
    """sha256 of each title's film, as `longtake render` makes it with one worker that nothing happens to."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for title in TITLES:
        film = write_film(folder, checkpoint, title)
        command = [sys.executable, "-m", "cluster.cli", "render", str(film), "--workers", "1", "--address", address]
        run = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        assert run.returncode == 0, f"{title}: {run.stderr}"
    return {title: sha256_of(folder / f"out/{title}.mp4") for title in TITLES}


def sha256_of(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


class FarmPlace:
    """`address`: of the cluster. What the farm and its renders have written is read from their stores."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.address = folder, address
        self.books = folder / "books"

    # Commands

    def start(self, *arguments: str, out: IO[str] | int = subprocess.PIPE) -> subprocess.Popen[str]:
        return self.start_words([*arguments, "--address", self.address], out)

    def start_words(self, words: Sequence[str], out: IO[str] | int = subprocess.PIPE) -> subprocess.Popen[str]:
        """Start `longtake` with exactly these words."""
        command = [sys.executable, "-m", "cluster.cli", *words]
        return subprocess.Popen(command, cwd=self.folder, text=True, stdout=out, stderr=subprocess.PIPE)

    def ask(self, *arguments: str, code: int = 0) -> str:
        """Run a command to its end, which must be this exit code; what it printed."""
        return finish(self.start(*arguments), code)

    def submit(self, title: str, store: str, *arguments: str) -> str:
        """The id of a title's render in a store of this name."""
        return self.ask("submit", f"{title}.yaml", "--store", f"renders/{store}", *arguments).split()[0]

    def start_farm(self) -> None:
        """The farm, on workers of one logical GPU each; nothing if it runs."""
        command = [sys.executable, "-c", START, self.address, str(self.books), str(PRICE)]
        subprocess.run(command, cwd=self.folder, check=True, timeout=LIMIT_S)

    # What the stores say

    def state(self, render_id: str) -> SubmissionState:
        book = SubmissionBook(LocalStore(self.books))
        book.load()
        return book.states[render_id]

    def rest(self, *render_ids: str, phase: str = "done") -> None:
        """Wait until the farm has nothing more to do with these, which must be in this phase then."""
        for render_id in render_ids:
            until(lambda one=render_id: not self.state(one).is_open, f"{render_id} rests")
            assert self.state(render_id).phase == phase, self.state(render_id)

    def store(self, name: str) -> LocalStore:
        return LocalStore(self.folder / "renders" / name)

    def commits(self, name: str) -> dict[str, bytes]:
        store = self.store(name)
        return {file.path: store.read(file.path) for file in store.list("commits")}

    def attempts(self, name: str) -> list[tuple[float, AttemptStarted]]:
        history = Ledger(self.store(name)).history()
        return [(at_s, entry) for at_s, entry in history if isinstance(entry, AttemptStarted)]

    def label_of(self, name: str, task_id: str) -> str:
        from cluster.recipe import load_recipe, make_plan

        return make_plan(load_recipe(self.store(name))).tasks[task_id].label

    def film_sha256(self, name: str) -> str:
        (film,) = (self.folder / "renders" / name / "films").iterdir()
        return sha256_of(film)

    def check_nothing_redone(self, name: str, before: dict[str, bytes], attempts: int) -> None:
        """What was committed when there had been so many attempts is as it was, and was not tried again."""
        assert before and before.items() <= self.commits(name).items()
        tried = {f"commits/{entry.task_id}.json" for _, entry in self.attempts(name)[attempts:]}
        assert not tried & before.keys()


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for a command's end; what it printed."""
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert process.returncode == code, f"{process.args}: {process.returncode}\n{out}\n{err}"
    return out


def farm_process(raylet_pid: int) -> psutil.Process | None:
    """The farm's process on the head, whose raylet this is."""
    for process in psutil.Process(raylet_pid).children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Farm"):
                return process
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return None


def events_of(path: Path, kind: str) -> list[dict[str, Any]]:
    """Events of a kind that a command with --json has written so far."""
    lines = [
        line for line in path.read_text().splitlines(keepends=True) if line.startswith("{") and line.endswith("\n")
    ]
    return [event for event in map(json.loads, lines) if event.get("event") == kind]
