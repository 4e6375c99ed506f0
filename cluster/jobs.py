"""Farm commands for a cluster that is named by its dashboard (`http://head:8265`, the usual form for Ray jobs): the
same command, run there as a Ray job, whose output and exit code are passed on.

What `submit` names goes along: storyboard and media as the job's working directory. Store, checkpoint and books are
under the same path there, as for every other node. Raises SettingError, TransientError.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import yaml

from cluster.access import check_address, has_token, is_loopback
from cluster.download import download_film
from cluster.places import open_film_store
from cluster.probe import load_storyboard
from cluster.render import RenderRequest
from pipeline.errors import SettingError, TransientError, first_line
from pipeline.store import open_store

START_S = 60.0
"""How long a cluster may say that it is not ready for jobs."""
END_S = 60.0
"""How long the exit code of a job may take after the end of its output."""
LOOK_S = 0.2
FILM = "film.yaml"
_ABOUT_ITSELF = "longtake: "
_RAYS_OWN = re.compile(r"\S+ \S+\s+INFO job_manager\.py|Running entrypoint for job ")
"""What Ray writes into a job's output before it begins."""


def run_there(
    address: str, words: Sequence[str], *, insecure: bool, folder: Path | None = None, out: IO[str] | None = None
) -> int:
    """Run `longtake` with these words on the cluster at `address`, in `folder` if there is one; its exit code.

    What it prints goes to `out`, or to stdout; Ray makes one stream of the job's two, so that what longtake says about
    itself is told by its beginning and goes to stderr. Interrupting this does not interrupt what runs there.
    """
    client = _client(address, insecure)
    command = [*words, "--address", "auto"]
    if insecure or (is_loopback(address) and not has_token()):
        command.append("--insecure")
    environment = {"working_dir": str(folder)} if folder is not None else {}
    job_id = _submitted(client, f"python -m cluster.cli {shlex.join(command)}", environment)
    return asyncio.run(_follow(client, job_id, out or sys.stdout))


def submit_there(address: str, film: RenderRequest, words: Sequence[str], *, insecure: bool) -> int:
    """Have a storyboard submitted there: `longtake` with these words, one of which is the storyboard's name here."""
    spec = load_storyboard(film.storyboard)
    store = open_film_store(spec, film.storyboard, film.store).url
    command = [FILM if Path(word) == film.storyboard else word for word in words]
    with tempfile.TemporaryDirectory(prefix="longtake-job-") as name:
        folder, written = Path(name), spec.as_written()
        for index, path in enumerate([*spec.media_paths(), *(lora.file for lora in spec.loras)]):
            _take_along(Path(path), folder / f"{index}{Path(path).suffix}")
            written = _renamed(written, path, f"{index}{Path(path).suffix}")
        (folder / FILM).write_text(yaml.safe_dump(written, allow_unicode=True, sort_keys=False))
        return run_there(address, [*command, "--store", store], insecure=insecure, folder=folder)


def download_there(address: str, render_id: str, to: Path | None, *, insecure: bool) -> int:
    """Copy the finished film of a render there to here."""
    told = io.StringIO()
    code = run_there(address, ["status", render_id, "--json"], insecure=insecure, out=told)
    rows = [line for line in told.getvalue().splitlines() if line.startswith("{")]
    if code or not rows:
        print(told.getvalue(), end="", file=sys.stderr)
        return code or 1
    print(download_film(open_store(json.loads(rows[-1])["store_url"]), to))
    return 0


def _take_along(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        remedy = "What a storyboard names has to be readable here: it goes along to the cluster."
        message = f"cannot be read: {error.strerror}"
        raise SettingError(message, field="storyboard", value=str(source), remedy=remedy) from error


def _renamed(data: Any, path: str, name: str) -> Any:
    """A storyboard with a file that it names under another name."""
    if isinstance(data, dict):
        files = {key: name for key in ("image", "video", "soundtrack", "file") if data.get(key) == path}
        return {key: _renamed(value, path, name) for key, value in data.items()} | files
    return [_renamed(value, path, name) for value in data] if isinstance(data, list) else data


def _client(address: str, insecure: bool) -> Any:
    check_address(address, insecure=insecure)
    from ray.job_submission import JobSubmissionClient

    # They tell of every package and connection on stderr.
    for name in ("ray", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        remedy = "It has to be the address of the cluster's dashboard."
        message = f"takes no jobs: {first_line(error)}"
        raise SettingError(message, field="--address", value=address, remedy=remedy) from error


def _submitted(client: Any, entrypoint: str, environment: dict[str, str]) -> str:
    """The id of a new job. A cluster that has just started may need a moment before it takes one."""
    until_s = time.monotonic() + START_S
    while True:
        try:
            return str(client.submit_job(entrypoint=entrypoint, runtime_env=environment))
        except (ConnectionError, RuntimeError) as error:
            if "No available agent" not in str(error):
                remedy = "look at the cluster's dashboard, and try again"
                raise TransientError(f"the cluster did not take the job: {first_line(error)}; {remedy}") from error
            if time.monotonic() >= until_s:
                raise TransientError("the cluster takes no jobs yet; try again later") from error
        time.sleep(LOOK_S)


async def _follow(client: Any, job_id: str, out: IO[str]) -> int:
    """Pass a job's output on to its end; its exit code."""
    from aiohttp import ClientError

    try:
        await _pass_on(client, job_id, out)
        return _exit_code(client, job_id)
    except BrokenPipeError:
        raise
    except (ClientError, OSError, RuntimeError) as error:
        goes_on = f"job {job_id} goes on there, `ray job logs --follow {job_id}` follows it"
        raise TransientError(f"the connection to the cluster is lost: {first_line(error)}; {goes_on}") from error


async def _pass_on(client: Any, job_id: str, out: IO[str]) -> None:
    rest = ""
    async for text in client.tail_job_logs(job_id):
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            _pass_line_on(line, out)
    if rest:
        _pass_line_on(rest, out)


def _pass_line_on(line: str, out: IO[str]) -> None:
    if not _RAYS_OWN.match(line):
        print(line, file=sys.stderr if line.startswith(_ABOUT_ITSELF) else out, flush=True)


def _exit_code(client: Any, job_id: str) -> int:
    until_s = time.monotonic() + END_S
    while time.monotonic() < until_s:
        job = client.get_job_info(job_id)
        if job.status.is_terminal():
            return int(job.driver_exit_code) if job.driver_exit_code is not None else 1
        time.sleep(LOOK_S)
    raise TransientError(f"the cluster does not say how job {job_id} ended; `ray job status {job_id}` asks again")
