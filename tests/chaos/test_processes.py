"""Processes that die, stop or come twice: workers, the orchestrator, the driver."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cluster.cli import main
from pipeline.journal import PartialSaved
from pipeline.lease import unreleased
from pipeline.ledger import Ledger
from tests.chaos.conftest import FaultFree
from tests.chaos.stage import HOOKS, LIMIT_S, RENDER, ROOT, Stage, until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
STOP_LIMIT_S = 10.0
"""From a signal to the end of the command. It takes about three."""


def test_a_worker_killed_between_writing_and_answering_costs_that_task_alone(stage: Stage) -> None:
    stage.faults({"point": "written", "match": "one/segment/0", "do": "kill"})
    run = stage.render("--workers", "1")
    assert stage.tried_again() == {"one/segment/0"}
    assert run.count("worker_lost") == 1
    stage.check()


def test_an_orchestrator_killed_around_a_commit_commits_once_and_redoes_nothing(stage: Stage) -> None:
    stage.faults({"point": "commit", "match": "segment", "do": "kill"})
    killed = stage.render("--workers", "1", code=1)
    assert "the same command continues" in killed.err
    assert not [path for path in stage.committed() if "segment" in path]
    stage.faults({"point": "committed", "match": "window", "do": "kill"})
    stage.render("--workers", "1", code=1)
    kept = stage.committed()
    assert any("window" in path for path in kept), "committed, and nobody was told"
    stage.faults()
    stage.render("--workers", "1")
    assert kept.items() <= stage.committed().items(), "what was committed stays as it is"
    sent = {e["task"] for e in stage.runs[-1].events if e["event"] == "dispatched"}
    assert not sent & {Path(path).stem for path in kept}
    stage.check()


TICK_THERE = """
import sys
from functools import partial
from cluster import cli, schedules
schedules.LOST_PAUSE_S = 1.0
schedules.RenderRequest = partial(schedules.RenderRequest, address=sys.argv[1], workers=1)
sys.exit(cli.main(["schedule", "tick"]))
"""
"""`longtake schedule tick` on the tests' cluster, where it has one of its own."""


def test_a_scheduled_run_goes_on_by_itself_when_its_orchestrator_is_killed(
    stage: Stage, fault_free: FaultFree, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stage.folder)
    assert main(["schedule", "add", "nightly", "film.yaml", "--cron", "0 2 * * *", "--time-zone", "UTC"]) == 0
    assert main(["schedule", "run-now", "nightly", "--farm"]) == 0, "claimed, for the tick to render"
    capsys.readouterr()
    assert main(["schedule", "list", "nightly", "--json"]) == 0
    [run] = json.loads(capsys.readouterr().out)
    stage.store_url = run["store"]
    shutil.copytree(fault_free.begun / RENDER, stage.store_url)
    stage.faults(
        {"point": "commit", "match": "segment", "do": "kill"}, {"point": "committed", "match": "window", "do": "kill"}
    )
    own = {"PYTHONPATH": f"{HOOKS}:{ROOT}", "CHAOS": str(stage.chaos), "OMP_NUM_THREADS": "1"}
    tick = subprocess.run(
        [sys.executable, "-c", TICK_THERE, stage.address], env={**os.environ, **own}, timeout=LIMIT_S,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert tick.returncode == 0, tick.stdout + tick.stderr
    assert tick.stdout.count("the orchestrator is gone") == 2
    assert len(unreleased(stage.store)) == 2
    stage.check()


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_saves_the_step_within_ten_seconds_and_the_render_goes_on_from_it(
    stage: Stage, number: signal.Signals
) -> None:
    stage.faults({"point": "step", "match": "one/window/0", "do": "until_stopped"})
    run = stage.start("--workers", "1")
    stage.held()
    os.killpg(run.process.pid, number)
    asked_s = time.monotonic()
    run.finish({signal.SIGTERM: 75, signal.SIGINT: 130}[number])
    took_s = time.monotonic() - asked_s
    print(f"stopped {took_s:.1f} s after the signal")
    assert took_s < STOP_LIMIT_S
    (saved,) = [entry for entry in stage.history if isinstance(entry, PartialSaved)]
    assert saved.partial is not None and saved.steps == 1
    stage.faults()
    stage.render("--workers", "1")
    log = b"".join(stage.store.read(f.path) for f in stage.store.list("logs") if saved.task_id in f.path)
    assert f"goes on from {saved.partial.path}".encode() in log
    stage.check()


def test_the_same_command_twice_at_once_gives_one_film(stage: Stage) -> None:
    first, second = stage.start("--workers", "1"), stage.start("--workers", "1")
    codes = [run.process.wait(LIMIT_S) for run in (first, second)]
    assert 0 in codes and set(codes) <= {0, 2}
    refused = [run for run in (first, second) if run.process.returncode == 2]
    assert all("another render" in run.err for run in refused)
    assert stage.tried_again() == set()
    stage.check()


def test_a_render_that_was_taken_over_can_write_nothing_more(stage: Stage) -> None:
    """Its host does not answer any more, another host takes the render over, and then it comes back."""
    stage.faults({"point": "commit", "match": "window", "do": "hold"}, host="first")
    lost = stage.start("--workers", "1")
    (held,) = stage.held()
    os.kill(held["pid"], signal.SIGSTOP)
    stage.write_faults([], {"host": "second", "watch_s": 3.0})
    stage.render("--workers", "1")
    after = stage.committed()
    stage.release()
    os.kill(held["pid"], signal.SIGCONT)
    lost.finish(1)
    assert "another orchestrator has taken over" in lost.err
    assert stage.committed() == after
    stage.check()


def test_a_render_whose_heartbeat_moves_is_not_taken_over(stage: Stage) -> None:
    stage.faults({"point": "order", "match": "one/segment/0", "do": "hold"}, host="first")
    first = stage.start("--workers", "1")
    stage.held()
    stage.write_faults([], {"host": "second"})
    refused = stage.render("--workers", "1", code=2)
    assert "another render is writing here" in refused.err
    stage.release()
    first.finish()
    stage.check()


def test_a_clock_that_jumps_by_an_hour_causes_no_timeout(stage: Stage) -> None:
    stage.faults({"point": "step", "match": "one/segment/0", "do": "hold"})
    run = stage.start("--workers", "1")
    stage.held()
    for clock_s in (3600.0, 0.0):
        stage.write_faults([], {}, clock_s)
        looks = run.count("progress") + 5
        until(lambda looks=looks: run.count("progress") >= looks, "the machine has looked at the clock")
    stage.release()
    run.finish()
    assert not [e for e in run.events if e["event"] in ("worker_recycled", "failed", "worker_lost")]
    assert stage.tried_again() == set()
    stage.check()


def test_cuda_out_of_memory_recycles_the_worker_and_is_tried_again(stage: Stage) -> None:
    stage.faults({"point": "predict", "match": "one/segment/0", "do": "oom"})
    run = stage.render("--workers", "1")
    recycled = [e for e in run.events if e["event"] == "worker_recycled"]
    assert len(recycled) == 1 and "out of memory" in recycled[0]["reason"]
    assert len({e["process"] for e in run.events if e["event"] == "worker_joined"}) == 2, "a fresh process"
    assert [entry.kind for entry in stage.failures("one/segment/0")] == ["memory"]
    stage.check()


def test_a_cuda_error_costs_the_process_in_which_every_later_call_fails_and_one_attempt(stage: Stage) -> None:
    stage.faults({"point": "predict", "match": "one/segment/0", "do": "cuda"})
    run = stage.render("--workers", "1")
    (recycled,) = [e for e in run.events if e["event"] == "worker_recycled"]
    assert "CUDA error" in recycled["reason"]
    assert len({e["process"] for e in run.events if e["event"] == "worker_joined"}) == 2, "a fresh process"
    assert [entry.kind for entry in stage.failures("one/segment/0")] == ["device"]
    assert stage.tried_again() == {"one/segment/0"}
    stage.check()


def test_output_that_is_no_number_is_made_again_with_a_recorded_seed(stage: Stage, fault_free: FaultFree) -> None:
    stage.faults({"point": "predict", "match": "two/segment/0", "do": "nan"})
    stage.render("--workers", "1")
    assert Ledger(stage.store).load().redo == {"two/segment/0": 1}
    made = (stage.folder / "film.mp4").read_bytes()
    stage.copy(fault_free.finished)
    stage.render("--workers", "1", "--redo", "0:07.5-0:08")
    assert Ledger(stage.store).load().redo == {"two/segment/0": 1}
    assert (stage.folder / "film.mp4").read_bytes() == made, "the film of the same seeds, without the fault"


def test_a_changed_prompt_redoes_what_plan_says_and_gives_the_film_of_that_prompt(
    finished: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = finished
    film = yaml.safe_load((stage.folder / "film.yaml").read_text())
    film["shots"][1]["prompt"] = "a green square"
    stage.write(film)
    monkeypatch.chdir(stage.folder)
    capsys.readouterr()
    assert main(["plan", "film.yaml", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["to_do"]
    assert any("prompt" in why for why in planned.values())
    run = stage.render("--workers", "1")
    assert {e["task"] for e in run.events if e["event"] == "dispatched"} == set(planned)
    assert not any(label.startswith("one/segment") for label in run.labels())
    made = (stage.folder / "film.mp4").read_bytes()
    stage.store_url = str(tmp_path / "fresh")
    stage.render("--workers", "1")
    assert (stage.folder / "film.mp4").read_bytes() == made


def test_other_libraries_are_refused_by_name_and_reported_where_allowed(
    stage: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.faults({"point": "committed", "match": "segment", "do": "kill"})
    stage.render("--workers", "1", code=1)
    stage.faults(versions={"torch": "9.9.9"})
    before = stage.store.read("recipe.json")
    refused = stage.render("--workers", "1", code=2)
    assert "'torch': '9.9.9'" in refused.err and "--allow-mixed" in refused.err
    assert stage.store.read("recipe.json") == before, "what is rendered here has not changed"
    allowed = stage.render("--workers", "1", "--allow-mixed")
    assert any("mixed numerics" in e.get("message", "") for e in allowed.events)
    monkeypatch.chdir(stage.folder)
    capsys.readouterr()
    assert main(["status", "film.yaml", "--json"]) == 0
    assert any("9.9.9" in difference for difference in json.loads(capsys.readouterr().out)["mixed"])
    stage.check()
