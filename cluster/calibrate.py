"""`longtake calibrate`: how fast this hardware is with a checkpoint, measured by the real command on a short film.

The film has every kind of task a few times. What is measured is what a render waits for: from an order to its commit as
the orchestrator sees it, loading a role as the worker answers, starting and ending as the shell sees it. So contention
between workers counts, and a calibration holds for as many workers at once as it was made with.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cluster.paces import pace_file, short_name
from cluster.progress import format_seconds
from cluster.recipe import make_plan
from cluster.render import STOP_CODES, Prepared, RenderRequest, prepare
from pipeline.errors import Interrupted, PermanentError
from pipeline.facts import RenderFacts
from pipeline.ledger import Ledger
from pipeline.pace import PUBLISHED_SECONDS, Pace
from pipeline.plan import Plan

SEGMENTS = 2
"""Of each of the film's two shots."""
WARM = 1.5


@dataclass(frozen=True)
class CalibrateRequest:
    """The command line of `longtake calibrate`."""

    checkpoint: str = "pocket"
    device: str = "auto"
    workers: int | None = None
    threads: int | None = None
    as_json: bool = False


def print_calibration(request: CalibrateRequest) -> int:
    """Render the short film, measure, and keep the result where `longtake plan` finds it."""
    with tempfile.TemporaryDirectory(prefix="longtake-calibrate-") as folder:
        prepared = _prepare(request, Path(folder))
        began_s = time.time()
        events = _render(request, Path(folder))
        run = Run(began_s, time.time(), events, _page_start_s())
        numerics = Ledger(prepared.store).numerics() or {}
    kind = _kind_of(str(numerics.get("device", "cpu")))
    pace = pace_of(run, under_unit_pace(prepared), kind)
    path = pace_file(prepared.recipe.facts.checkpoint.digest, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"pace": pace.to_json()}, indent=1) + "\n")
    if request.as_json:
        print(json.dumps({"path": str(path), **pace.to_json()}))
        return 0
    print(f"{pace.basis}, in {format_seconds(run.ended_s - run.began_s)}")
    for name, seconds in pace.seconds.items():
        print(f"  {name:<8} {seconds:8.2f} s")
    for role, seconds in pace.load_s.items():
        print(f"  load {role:<8} {seconds:.2f} s")
    print(path)
    return 0


def _kind_of(device: str) -> str:
    """The kind of worker that a numerics record's device is: `cpu`, or a GPU's short name."""
    kind, _, name = device.partition(" ")
    return "cpu" if kind == "cpu" else short_name(name)


@dataclass(frozen=True)
class Run:
    """A render as its command told it. Times are Unix times."""

    began_s: float
    ended_s: float
    events: Sequence[Mapping[str, Any]]
    page_start_s: float = 0.0
    """Seconds from starting the process that makes the report page to its beginning."""


def film_of(render: RenderFacts, checkpoint: str, image: Path) -> dict[str, Any]:
    """The storyboard: two independent shots of a few full segments each, one of them from an image."""
    new = render.segment_frames - render.condition_frames
    duration = f"{(render.segment_frames - 1 + (SEGMENTS - 1) * new) / render.stage_one_fps:.3f}s"
    return {
        "title": "Calibration",
        "checkpoint": checkpoint,
        "quality": "draft",
        "shots": [
            {"id": "picture", "duration": duration, "image": str(image), "prompt": "a red circle moving to the right"},
            {"id": "words", "duration": duration, "prompt": "a yellow star moving to the left"},
        ],
        "output": {"path": str(image.with_name("calibration.mp4"))},
    }


def _prepare(request: CalibrateRequest, folder: Path) -> Prepared:
    from PIL import Image

    from cluster.probe import probe_checkpoint

    image, storyboard = folder / "image.png", folder / "film.yaml"
    Image.new("RGB", (192, 128), (120, 160, 200)).save(image)
    checkpoint = probe_checkpoint(request.checkpoint)
    storyboard.write_text(yaml.safe_dump(film_of(checkpoint.render, checkpoint.path, image)))
    return prepare(RenderRequest(storyboard, str(folder / "render"), device=request.device))


def _render(request: CalibrateRequest, folder: Path) -> list[dict[str, Any]]:
    """Run the real command to its end; its events."""
    command = [sys.executable, "-m", "cluster.cli", "render", str(folder / "film.yaml"), "--json"]
    command += ["--store", str(folder / "render"), "--device", request.device]
    for name, value in (("--workers", request.workers), ("--threads", request.threads)):
        command += [] if value is None else [name, str(value)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        # A Ctrl-C reaches the child by itself; a SIGTERM to this process alone would leave it behind.
        before = signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
        try:
            out, _ = child.communicate()
        finally:
            signal.signal(signal.SIGTERM, before)
    if child.returncode in STOP_CODES.values():
        raise Interrupted("stopped; nothing was measured", child.returncode)
    if child.returncode != 0:
        raise PermanentError(f"the calibration film was not rendered: exit code {child.returncode}")
    return [json.loads(line) for line in out.splitlines()]


def _page_start_s() -> float:
    """How long the report page takes whatever the film's length: a process with its libraries."""
    began_s = time.monotonic()
    subprocess.run([sys.executable, "-m", "cluster.film_page", "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - began_s


def under_unit_pace(prepared: Prepared) -> Plan:
    """The film's plan with, as each task's work, how many times its kind's base figure it is."""
    unit = Pace("", dict.fromkeys(PUBLISHED_SECONDS, 1.0), of_checkpoint=True)
    facts = replace(prepared.recipe.facts, pace=unit)
    return make_plan(replace(prepared.recipe, facts=facts))


def pace_of(run: Run, plan: Plan, kind: str) -> Pace:
    """What a run of the plan says about its workers. `plan`: under a unit pace."""
    at_s: dict[tuple[str, str], float] = {}
    for event in run.events:
        for name in ("task", "worker"):
            if name in event:
                at_s.setdefault((event["event"], event[name]), event["time"])
    started = next(event for event in run.events if event["event"] == "started")
    finished_s = next(event["time"] for event in run.events if event["event"] == "finished")
    joined_s = [event["time"] - started["time"] for event in run.events if event["event"] == "worker_joined"]
    seconds, warming_s = _task_seconds(run.events, plan, at_s)
    page_s = finished_s - at_s["committed", plan.film_task_id]
    load_s = _load_seconds(run.events)
    return Pace(
        f"calibrated on {kind}, {started['workers']} worker(s) at once, {time.strftime('%Y-%m-%d')}",
        seconds,
        of_checkpoint=True,
        start_s=started["time"] - run.began_s,
        join_s=_mean(joined_s),
        load_s={role: value + warming_s.get(role, 0.0) for role, value in load_s.items()},
        finish_s=run.ended_s - finished_s + min(page_s, run.page_start_s),
        finish_s_per_frame=max(0.0, page_s - run.page_start_s) / plan.film_frames,
    )


def _task_seconds(
    events: Iterable[Mapping[str, Any]], plan: Plan, at_s: Mapping[tuple[str, str], float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by kind for work 1, and by role what the first order of a worker in it took beyond that (compiling).

    A first order that takes less than WARM times the usual is an order like the others: so much their neighbours do.
    """
    spent: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    first: list[tuple[str, float, float]] = []
    seen: set[tuple[str, str]] = set()
    for event in (event for event in events if event["event"] == "dispatched"):
        task = plan.tasks[event["task"]]
        took_s = at_s["committed", task.id] - event["time"]
        if (event["worker"], task.kind) in seen:
            spent[task.kind].append((took_s, task.work))
        else:
            seen.add((event["worker"], task.kind))
            first.append((task.kind, took_s, task.work))
    for kind in {kind for kind, _, _ in first} - set(spent):
        spent[kind] = [(took_s, work) for its_kind, took_s, work in first if its_kind == kind]
        first = [one for one in first if one[0] != kind]
    later_s = {kind: _for_work_1(all_of) for kind, all_of in spent.items()}
    excess: defaultdict[str, list[float]] = defaultdict(list)
    for kind, took_s, work in first:
        usual_s, role = later_s[kind] * work, {"segment": "chain", "window": "refine"}.get(kind)
        if took_s < WARM * usual_s:
            spent[kind].append((took_s, work))
        elif role is not None:
            excess[role].append(took_s - usual_s)
    seconds = {kind: _for_work_1(all_of) for kind, all_of in spent.items()}
    return seconds, {role: _mean(values) for role, values in excess.items()}


def _for_work_1(all_of: Sequence[tuple[float, float]]) -> float:
    return sum(seconds for seconds, _ in all_of) / sum(work for _, work in all_of)


def _load_seconds(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    asked_s: dict[tuple[str, str], float] = {}
    took_s: defaultdict[str, list[float]] = defaultdict(list)
    for event in events:
        if event["event"] == "role":
            asked_s[event["worker"], event["role"]] = event["time"]
        elif event["event"] == "ready":
            took_s[event["role"]].append(event["time"] - asked_s[event["worker"], event["role"]])
    return {role: _mean(values) for role, values in took_s.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
