"""Whole renders by the real command on a local cluster, with the tiny checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster.cli import main
from cluster.film_page import PAGE
from pipeline.media import AI_MARK, find_ffmpeg, read_recipe, read_tags, verify_video

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.ray, pytest.mark.slow]

LIMIT_S = 600.0
FRAMES = 90


def storyboard(checkpoint: Path) -> dict[str, Any]:
    """Two shots of one segment each, the second fades in; 2 s and 1.3 s at 30 fps."""
    return {
        "title": "Short",
        "seed": 5,
        "checkpoint": str(checkpoint),
        "shots": [
            {"id": "one", "duration": "60f", "prompt": "a red circle moves left"},
            {"id": "two", "duration": "40f", "prompt": "a blue star", "transition": {"crossfade": "10f"}},
        ],
        "output": {"path": "out/short.mp4", "crf": 45},
    }


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cluster.cli", "render", *arguments]


def environment(*arguments: str) -> dict[str, str]:
    """Of the command: as a user has it, without the tests' token unless it is to join the tests' cluster."""
    values = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    joins = "--address" in arguments
    return {name: value for name, value in values.items() if joins or not name.startswith("RAY_AUTH")}


@dataclass
class Done:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines() if line.startswith("{")]


def render(folder: Path, *arguments: str, **variables: str) -> Done:
    """Run `longtake render` in `folder` to its end, with more environment variables."""
    done = subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(*arguments) | variables,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start `longtake render --json` in a session of its own."""
    return subprocess.Popen(
        command(*arguments, "--json"), cwd=folder, env=environment(*arguments), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Read the process's events until one is wanted."""
    assert process.stdout is not None
    for line in process.stdout:
        event: dict[str, Any] = json.loads(line)
        if wanted(event):
            return event
    assert process.stderr is not None
    raise AssertionError(f"the render ended before that: {process.stderr.read()}")


@contextlib.contextmanager
def held_at_a_segment(process: subprocess.Popen[str]) -> Iterator[None]:
    """For as long as the block lasts, the render stands still in a segment: its workers are stopped."""
    workers: list[int] = []

    def is_segment(event: dict[str, Any]) -> bool:
        if event["event"] == "worker_joined":
            workers.append(event["process"])
        return event["event"] == "dispatched" and "segment" in event["label"]

    wait_for(process, is_segment)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGCONT)


def finish(process: subprocess.Popen[str]) -> Done:
    out, err = process.communicate(timeout=LIMIT_S)
    return Done(process.returncode, out, err)


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def commits(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("renders/short/commits/*.json")}


@dataclass
class Film:
    """A folder in which a film was rendered without any interruption, and what was left in its temporary folder."""

    folder: Path
    done: Done
    left: list[str]

    @property
    def path(self) -> Path:
        return self.folder / "out/short.mp4"


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Film:
    folder = tmp_path_factory.mktemp("film")
    (folder / "film.yaml").write_text(yaml.safe_dump(storyboard(tiny_checkpoint)))
    with tempfile.TemporaryDirectory(prefix="film-", dir="/tmp") as scratch:
        done = render(folder, "film.yaml", TMPDIR=scratch)
        left = os.listdir(scratch)
    assert done.code == 0, done.err
    return Film(folder, done, left)


def take_page(source: Path, target: Path) -> None:
    """Give a folder the report page of another one's film, so that a render which ends in that film, as it has to
    here, need not measure it again."""
    (target / "renders/short").mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "renders/short" / PAGE, target / "renders/short" / PAGE)


@pytest.fixture
def other(tmp_path: Path, film: Film) -> Path:
    """A fresh folder with the same storyboard."""
    (tmp_path / "film.yaml").write_bytes((film.folder / "film.yaml").read_bytes())
    take_page(film.folder, tmp_path)
    return tmp_path


def test_a_render_prints_where_the_film_is_and_nothing_else(film: Film) -> None:
    assert film.done.out == "out/short.mp4\n"
    assert "tasks to do" in film.done.err
    assert "Traceback" not in film.done.err


def test_the_film_is_frame_for_frame_as_planned(film: Film) -> None:
    verify_video(film.path, frames=FRAMES, size_px=(64, 128), fps=Fraction(30), ffmpeg=find_ffmpeg())


def test_the_film_carries_its_recipe_and_the_mark(film: Film) -> None:
    recipe = json.loads(read_recipe(film.path, find_ffmpeg()))
    assert recipe["spec"]["title"] == "Short"
    assert read_tags(film.path, find_ffmpeg())["comment"] == AI_MARK


def test_the_renders_folder_shows_the_film(film: Film) -> None:
    store = film.folder / "renders/short"
    assert (store / "contact_sheet.jpg").read_bytes()[:2] == b"\xff\xd8"
    report = json.loads((store / "report.json").read_text())
    assert report["state"] == "done"
    assert report["film"]["sha256"] == digest(film.path) == digest(store / "films/film.mp4")


def test_no_scratch_is_left_behind(film: Film) -> None:
    assert film.left == []


def test_status_and_verify_need_the_store_alone(
    film: Film, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(film.folder)
    assert main(["status", "film.yaml", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["state"] == "finished"
    assert status["committed"] == status["tasks"]
    assert main(["verify", "renders/short"]) == 0
    assert "all as recorded" in capsys.readouterr().out


def test_running_again_redoes_nothing_and_gives_the_film_back(film: Film, address: str) -> None:
    before, content = commits(film.folder), film.path.read_bytes()
    film.path.unlink()
    again = render(film.folder, "film.yaml", "--json", "--address", address)
    assert again.code == 0, again.err
    assert not {"dispatched", "worker_joined"} & {event["event"] for event in again.events}
    assert again.events[-1]["path"] == "out/short.mp4"
    assert commits(film.folder) == before
    assert film.path.read_bytes() == content


def test_a_film_renders_again_from_its_own_recipe(film: Film, address: str) -> None:
    before = commits(film.folder)
    again = render(film.folder, "out/short.mp4", "--address", address)
    assert again.code == 0, again.err
    assert commits(film.folder) == before


def test_a_stopped_render_says_so_and_the_same_command_goes_on(other: Path, film: Film, address: str) -> None:
    first = start(other, "film.yaml")
    with held_at_a_segment(first):
        second = render(other, "film.yaml", "--address", address)
    assert second.code == 2
    assert "another render is writing here" in second.err

    os.killpg(first.pid, signal.SIGTERM)
    stopped = finish(first)
    assert stopped.code == 75, stopped.err
    assert "Traceback" not in stopped.err

    mixed = render(other, "film.yaml", "--threads", "2", "--address", address)
    assert mixed.code == 2
    assert "threads" in mixed.err

    rest = render(other, "film.yaml", "--json", "--address", address)
    assert rest.code == 0, rest.err
    assert digest(other / "out/short.mp4") == digest(film.path)


def test_ctrl_c_exits_with_130(other: Path) -> None:
    process = start(other, "film.yaml")
    wait_for(process, lambda event: event["event"] == "started")
    os.killpg(process.pid, signal.SIGINT)
    stopped = finish(process)
    assert stopped.code == 130, stopped.err
    assert "Traceback" not in stopped.err


def test_stage_one_first_and_then_the_film_from_the_same_latents(other: Path, film: Film, address: str) -> None:
    preview = render(other, "film.yaml", "--until", "stage-one", "--address", address)
    assert preview.code == 0, preview.err
    assert preview.out == "out/short.stage-one.mp4\n"
    verify_video(other / "out/short.stage-one.mp4", frames=45, size_px=(32, 64), fps=Fraction(15), ffmpeg=find_ffmpeg())
    assert not any(name.startswith("window") for name in commits(other))
    rest = render(other, "film.yaml", "--address", address, "--json")
    assert rest.code == 0, rest.err
    labels = {event["label"] for event in rest.events if event["event"] == "dispatched"}
    assert not any("segment" in label for label in labels)
    assert digest(other / "out/short.mp4") == digest(film.path)


def test_a_killed_worker_costs_its_task_alone(other: Path, film: Film, address: str) -> None:
    process = start(other, "film.yaml", "--workers", "2", "--address", address)
    pids: dict[str, int] = {}

    def is_order(event: dict[str, Any]) -> bool:
        if event["event"] == "worker_joined":
            pids[event["worker"]] = event["process"]
        return event["event"] == "dispatched" and event["label"].partition("/")[2] != ""

    while True:
        order = wait_for(process, is_order)
        os.kill(pids[order["worker"]], signal.SIGSTOP)
        # A task that was done before that is committed by now, on a busy machine too.
        time.sleep(4.0)
        done_before = commits(other).keys()
        if f"{order['task']}.json" not in done_before:
            break
        os.kill(pids[order["worker"]], signal.SIGCONT)
    os.kill(pids[order["worker"]], signal.SIGKILL)
    lost = wait_for(process, lambda event: event["event"] == "worker_lost")
    assert lost["worker"] == order["worker"]
    done = finish(process)
    assert done.code == 0, done.err
    again = [event["task"] for event in done.events if event["event"] == "dispatched"]
    assert order["task"] in again
    assert not {f"{task}.json" for task in again} & done_before
    assert digest(other / "out/short.mp4") == digest(film.path)


def _end_of(process: subprocess.Popen[str]) -> None:
    """Kill the command and all it started: an orchestrator that outlived it for a moment would go on committing."""
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(30)


@pytest.mark.timeout(600)
def test_killed_three_times_the_film_is_the_same_bit_for_bit(other: Path, film: Film, address: str) -> None:
    moments: list[Callable[[dict[str, Any]], bool]] = [
        lambda event: event["event"] == "dispatched" and "segment" in event["label"],
        lambda event: event["event"] == "committed" and event["task"].startswith("window"),
        lambda event: event["event"] == "dispatched" and event["label"] == "film",
    ]
    kept: dict[str, bytes] = {}
    for moment in moments:
        process = start(other, "film.yaml")
        wait_for(process, moment)
        _end_of(process)
        now = commits(other)
        assert kept.items() <= now.items(), "what was committed stays as it is"
        kept = now
    last = render(other, "film.yaml", "--json", "--address", address)
    assert last.code == 0, last.err
    redone = {event["task"] for event in last.events if event["event"] == "dispatched"}
    assert not redone & {name.removesuffix(".json") for name in kept}
    assert digest(other / "out/short.mp4") == digest(film.path)


def test_a_film_of_twelve_shots_of_two_seconds(tmp_path: Path, tiny_checkpoint: Path, address: str) -> None:
    words = ("circle", "square", "star")
    shots = [{"duration": "2s", "prompt": f"a red {words[i % 3]} moves left over snow"} for i in range(12)]
    for shot in shots[3::4]:
        shot["transition"] = {"crossfade": "0.5s"}  # type: ignore[assignment]
    film = storyboard(tiny_checkpoint) | {"title": "Twelve", "shots": shots, "output": {"path": "twelve.mp4"}}
    (tmp_path / "film.yaml").write_text(yaml.safe_dump(film))
    done = render(tmp_path, "film.yaml", "--address", address)
    assert done.code == 0, done.err
    frames = 12 * 60 - 3 * 15
    verify_video(tmp_path / "twelve.mp4", frames=frames, size_px=(64, 128), fps=Fraction(30), ffmpeg=find_ffmpeg())
