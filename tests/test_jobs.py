"""Farm commands where the cluster is named by its dashboard: what is sent there as a job, and what comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from aiohttp import ClientConnectionError

from cluster.cli import main

DASHBOARD = "http://127.0.0.1:8265"


class Jobs:
    """Ray's job client: keeps what is submitted, says and ends as it is told to."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.films: list[dict[str, Any]] = []
        self.files: list[dict[str, bytes]] = []
        self.says, self.exit_code = "", 0
        self.refusals: list[Exception] = []
        self.breaks: Exception | None = None

    def __call__(self, address: str) -> Jobs:
        assert address == DASHBOARD
        return self

    def submit_job(self, *, entrypoint: str, runtime_env: dict[str, str]) -> str:
        if self.refusals:
            raise self.refusals.pop(0)
        self.commands.append(entrypoint)
        if folder := runtime_env.get("working_dir"):
            self.films.append(yaml.safe_load((Path(folder) / "film.yaml").read_text()))
            self.files.append({path.name: path.read_bytes() for path in Path(folder).iterdir()})
        return "job"

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield self.says
        if self.breaks is not None:
            raise self.breaks

    def get_job_info(self, job_id: str) -> Any:
        return SimpleNamespace(status=SimpleNamespace(is_terminal=lambda: True), driver_exit_code=self.exit_code)


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    made = Jobs()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", made)
    return made


def test_a_command_is_run_there_and_its_output_and_exit_code_come_back(
    jobs: Jobs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rays_own = "2026-11-26 20:21:23,734\tINFO job_manager.py:581 -- Runtime env is setting up.\n"
    jobs.says = f"{rays_own}Running entrypoint for job a: python -m x\nID STATE\nlongtake: stopped"
    jobs.exit_code = 75
    assert main(["watch", "film-1", "--address", DASHBOARD]) == 75
    said = capsys.readouterr()
    assert (said.out, said.err) == ("ID STATE\n", "longtake: stopped\n")
    monkeypatch.setenv("RAY_ADDRESS", DASHBOARD)
    assert main(["status", "film-1"]) == 75
    assert [command.split(" -m cluster.cli ")[1] for command in jobs.commands] == [
        f"watch film-1 --address {DASHBOARD} --address auto",
        "status film-1 --address auto",
    ]


def test_a_job_without_an_exit_code_has_failed(jobs: Jobs) -> None:
    jobs.exit_code = None  # type: ignore[assignment]
    assert main(["list", "--address", DASHBOARD]) == 1


@pytest.mark.parametrize("broken", [RuntimeError("closed"), ClientConnectionError("reset"), OSError("reset")])
def test_a_connection_that_breaks_is_told_with_what_to_do(
    jobs: Jobs, capsys: pytest.CaptureFixture[str], broken: Exception
) -> None:
    jobs.breaks = broken
    assert main(["watch", "film-1", "--address", DASHBOARD]) == 1
    said = capsys.readouterr().err
    assert "connection to the cluster is lost" in said and "ray job logs --follow job" in said


def test_a_cluster_that_has_just_started_gets_a_moment(
    jobs: Jobs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    soon = RuntimeError("Request failed with status code 500: No available agent to submit job, please try again later")
    jobs.refusals = [soon, soon]
    assert main(["list", "--address", DASHBOARD]) == 0 and len(jobs.commands) == 1
    monkeypatch.setattr("cluster.jobs.START_S", 0.0)
    jobs.refusals = [soon]
    assert main(["list", "--address", DASHBOARD]) == 1
    assert "takes no jobs yet" in capsys.readouterr().err
    jobs.refusals = [ConnectionError("gone\nand more")]
    assert main(["list", "--address", DASHBOARD]) == 1
    assert "did not take the job: gone; look at" in capsys.readouterr().err


def test_a_storyboard_goes_along_with_what_it_names(jobs: Jobs, tmp_path: Path) -> None:
    Path("media").mkdir()
    Path("media/a.png").write_bytes(b"picture")
    Path("media/wind.wav").write_bytes(b"sound")
    shots = [{"duration": "2s", "prompt": "it's media/a.png", "image": "media/a.png"}]
    film = {"title": "News", "shots": shots, "output": {"path": "news.mp4", "soundtrack": "media/wind.wav"}}
    Path("film.yaml").write_text(yaml.safe_dump(film))
    assert main(["submit", "./film.yaml", "--priority", "90", "--address", DASHBOARD]) == 0
    [command], [sent], [files] = jobs.commands, jobs.films, jobs.files
    assert "submit film.yaml --priority 90" in command
    assert command.endswith(f"--store {tmp_path}/renders/news --address auto"), "not in the job's own folder"
    assert f"--farm-store {tmp_path}/renders/farm" in command
    assert files[sent["shots"][0]["image"]] == b"picture"
    assert files[sent["output"]["soundtrack"]] == b"sound"
    assert sent["shots"][0]["prompt"][0]["prompt"] == "it's media/a.png"


def test_what_cannot_go_along_is_named_before_anything_is_sent(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    Path("film.yaml").write_text(yaml.safe_dump({"shots": [{"duration": "2s", "prompt": "a", "image": "none.png"}]}))
    assert main(["submit", "film.yaml", "--address", DASHBOARD]) == 2
    assert "none.png" in capsys.readouterr().err and jobs.commands == []


def test_a_film_is_fetched_from_the_store_that_the_farm_names(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.says, jobs.exit_code = "no such render\n", 2
    assert main(["download", "film-1", "--address", DASHBOARD]) == 2
    assert "no such render" in capsys.readouterr().err
    jobs.says, jobs.exit_code = '{"store_url": "nowhere"}\n', 0
    assert main(["download", "film-1", "--address", DASHBOARD]) == 2
    assert "nowhere" in capsys.readouterr().err, "the store is looked into from here"


def test_an_open_dashboard_elsewhere_is_refused(
    jobs: Jobs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert main(["list", "--address", "http://head.example.org:8265"]) == 2
    assert "token" in capsys.readouterr().err and jobs.commands == []
