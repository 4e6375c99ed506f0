"""`longtake calibrate`: what is read from a run, and the real command on the tiny checkpoint."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.calibrate import CalibrateRequest, Run, film_of, pace_of, print_calibration
from cluster.cli import main
from cluster.paces import load_pace
from cluster.render import Prepared, RenderRequest, prepare
from pipeline.errors import Interrupted, PermanentError
from pipeline.facts import CheckpointFacts, Facts, RenderFacts
from pipeline.forecast import Fleet, forecast
from pipeline.pace import PUBLISHED_SECONDS, Pace
from pipeline.plan import Plan, plan_film
from pipeline.spec import parse_spec

UNIT = Pace("", dict.fromkeys(PUBLISHED_SECONDS, 1.0), of_checkpoint=True)
SECONDS = {"text": 1.0, "segment": 20.0, "window": 30.0, "encode": 5.0, "film": 2.0}
LOADS = {"text": 3.0, "chain": 4.0, "refine": 6.0}
ROLE_OF = {"text": "text", "segment": "chain", "window": "refine", "encode": "refine", "film": "refine"}


def small_plan() -> Plan:
    shots = [{"id": name, "duration": "12s", "prompt": name} for name in ("a", "b")]
    return plan_film(parse_spec(json.dumps({"shots": shots})), Facts(CheckpointFacts("", "d" * 64), pace=UNIT))


def told(plan: Plan, *, compiling_s: float = 0.0) -> Run:
    """What one worker's run of the plan tells, one thing after another; its first window also compiles."""
    events: list[dict[str, Any]] = [{"event": "started", "time": 105.0, "workers": 1}]
    events.append({"event": "worker_joined", "time": 112.0, "worker": "w1"})
    now_s, role, seen = 112.0, "", set[str]()
    for task in sorted(plan.tasks.values(), key=lambda task: list(ROLE_OF).index(task.kind)):
        if ROLE_OF[task.kind] != role:
            role = ROLE_OF[task.kind]
            events.append({"event": "role", "time": now_s, "worker": "w1", "role": role})
            now_s += LOADS[role]
            events.append({"event": "ready", "time": now_s, "worker": "w1", "role": role})
        events.append({"event": "dispatched", "time": now_s, "worker": "w1", "task": task.id})
        now_s += SECONDS[task.kind] * task.work
        if task.kind == "window" and task.kind not in seen:
            now_s += compiling_s
        seen.add(task.kind)
        events.append({"event": "committed", "time": now_s, "task": task.id})
        now_s += 0.01
    events.append({"event": "finished", "time": now_s - 0.01 + 0.002 * plan.film_frames, "exit_code": 0})
    return Run(100.0, now_s - 0.01 + 0.002 * plan.film_frames + 1.5, events)


def test_a_pace_is_read_from_what_a_run_told() -> None:
    plan = small_plan()
    pace = pace_of(told(plan), plan, "h200")
    assert pace.seconds == pytest.approx(SECONDS)
    assert pace.load_s == pytest.approx(LOADS)
    whole = (pace.start_s, pace.join_s, pace.finish_s, pace.finish_s_per_frame)
    assert whole == pytest.approx((5.0, 7.0, 1.5, 0.002))
    assert pace.basis.startswith("calibrated on h200, 1 worker(s) at once")


def test_what_only_a_workers_first_order_takes_counts_as_loading() -> None:
    plan = small_plan()
    pace = pace_of(told(plan, compiling_s=60.0), plan, "h200")
    assert pace.seconds["window"] == pytest.approx(SECONDS["window"])
    assert pace.load_s["refine"] == pytest.approx(LOADS["refine"] + 60.0)


def test_a_first_order_that_is_hardly_slower_is_an_order_like_the_others() -> None:
    plan = small_plan()
    windows = [task for task in plan.tasks.values() if task.kind == "window"]
    pace = pace_of(told(plan, compiling_s=6.0), plan, "h200")
    assert pace.seconds["window"] == pytest.approx(SECONDS["window"] + 6.0 / len(windows))
    assert pace.load_s["refine"] == pytest.approx(LOADS["refine"])


def test_what_the_page_takes_whatever_the_films_length_is_counted_once() -> None:
    plan = small_plan()
    pace = pace_of(replace(told(plan), page_start_s=1.0), plan, "h200")
    assert pace.finish_s == pytest.approx(2.5)
    assert pace.finish_s_per_frame == pytest.approx(0.002 - 1.0 / plan.film_frames)
    slow = pace_of(replace(told(plan), page_start_s=1e6), plan, "h200")
    assert (slow.finish_s, slow.finish_s_per_frame) == (pytest.approx(1.5 + 0.002 * plan.film_frames), 0.0)


def test_a_forecast_under_the_pace_read_gives_the_run_it_was_read_from() -> None:
    plan = small_plan()
    run = told(plan)
    pace = pace_of(run, plan, "h200")
    again = plan_film(
        parse_spec(json.dumps({"shots": [{"id": n, "duration": "12s", "prompt": n} for n in ("a", "b")]})),
        Facts(CheckpointFacts("", "d" * 64), pace=pace),
    )
    predicted = forecast(again.tasks, {}, pace, Fleet(1), again.film_frames)
    assert predicted.makespan_s == pytest.approx(run.ended_s - run.began_s, rel=0.02)


def test_the_film_has_every_kind_of_task_a_few_times() -> None:
    spec = parse_spec(json.dumps(film_of(RenderFacts(), "pocket", Path("image.png"))))
    words = spec.model_copy(update={"shots": spec.shots[1:]})
    plan = plan_film(words, Facts(CheckpointFacts("", "d" * 64)))
    assert plan.count("segment") == plan.count("window") == plan.count("encode") == 2
    assert not plan.warnings


def test_a_film_that_fails_leaves_no_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("cluster.calibrate.sys.executable", "/bin/false")
    with pytest.raises(PermanentError, match="not rendered"):
        print_calibration(CalibrateRequest(workers=1, device="cpu"))
    assert not list((tmp_path / "cache").rglob("cpu.json"))


def test_a_stop_reaches_the_render_and_leaves_no_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = tmp_path / "python"
    command.write_text("#!/bin/sh\ntrap 'kill $!; exit 75' TERM\nsleep 60 & wait\n")
    command.chmod(0o700)
    monkeypatch.setattr("cluster.calibrate.sys.executable", str(command))
    before = signal.getsignal(signal.SIGTERM)
    stop = threading.Timer(3.0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    # Were it not passed on, it would end the test's own process.
    monkeypatch.setattr("cluster.calibrate.prepare", _then(stop.start))
    with pytest.raises(Interrupted) as caught:
        print_calibration(CalibrateRequest(workers=1, device="cpu"))
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert not list((tmp_path / "cache").rglob("cpu.json"))


def _then(action: Callable[[], None]) -> Callable[[RenderRequest], Prepared]:
    def prepared(request: RenderRequest) -> Prepared:
        found = prepare(request)
        action()
        return found

    return prepared


@pytest.fixture
def calibrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # As a user has it: the session's cluster is its own.
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache" / "longtake" / "calibrations"


@pytest.mark.ray
@pytest.mark.slow
def test_the_real_command_measures_every_kind_and_plan_reads_it(
    tiny_checkpoint: Path, calibrations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["calibrate", "--checkpoint", str(tiny_checkpoint), "--workers", "1", "--device", "cpu", "--json"]
    assert main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["seconds"]) == set(PUBLISHED_SECONDS)
    assert set(found["load_s"]) >= {"text", "chain", "refine"}
    assert all(value > 0 for name in ("seconds", "load_s") for value in found[name].values())
    path = Path(found["path"])
    assert path.parent.parent == calibrations
    assert load_pace(path.parent.name, "cpu") is not None
    film = tmp_path / "film.yaml"
    film.write_text(json.dumps({"checkpoint": str(tiny_checkpoint), "shots": [{"duration": "2s", "prompt": "a"}]}))
    assert main(["plan", str(film), "--store", str(tmp_path / "render")]) == 0
    assert "expected (calibrated on cpu, 1 worker(s) at once" in capsys.readouterr().out
