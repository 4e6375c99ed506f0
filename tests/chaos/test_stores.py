"""Stores and bytes that go wrong: an S3 server in bad times, flipped bits, torn records, a film damaged at the end."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.cli import main
from pipeline.journal import Invalidated
from tests.chaos.flaky_server import FlakyServer
from tests.chaos.stage import RENDER, Stage

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_store_that_is_slow_refuses_loses_answers_and_falls_silent_is_waited_for(
    stage: Stage, s3: FlakyServer, bucket: str
) -> None:
    stage.store_url = bucket
    stage.faults({"point": "order", "match": "one/segment/0", "do": "hold"}, request_limit_s=5)
    s3.every_nth = {"lost": 13, "refused": 9, "slow": 17, "silent": 47}
    try:
        run = stage.start("--workers", "1")
        stage.held()
        s3.down = True
        stage.release()
        run.wait_for("waiting")
        s3.down = False
        run.finish()
    finally:
        s3.every_nth, s3.down = {}, False
    assert min(s3.struck.get(kind, 0) for kind in ("lost", "refused", "slow")) > 3 and "silent" in s3.struck
    assert stage.tried_again() <= {"one/segment/0"}, "an outage costs no other task"
    stage.check()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damaged_bytes_and_records_are_found_and_made_again(
    finished: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = finished
    monkeypatch.chdir(stage.folder)
    root = stage.folder / RENDER
    flip(next(root.glob(f"attempts/{stage.task_of('one/segment/1')}/*/*")))
    unit = next(root.glob(f"attempts/{stage.task_of('unit/0')}/*/*"))
    unit.write_bytes(unit.read_bytes()[:-100])
    record = root / f"commits/{stage.task_of('two/segment/0')}.json"
    record.write_bytes(record.read_bytes()[:40])
    assert main(["verify", "film.yaml"]) == 1
    told = capsys.readouterr().out
    assert "its bytes differ from their record" in told and "were recorded" in told and "torn" in told
    run = stage.render("--workers", "2")
    assert set(run.labels()) >= {"one/segment/1", "one/window/1", "unit/0", "two/segment/0", "two/window/0", "film"}
    assert not {"one/segment/0", "one/window/0"} & set(run.labels()), "what does not depend on them stays"
    stage.check_film()
    flip(max(root.glob(f"attempts/{stage.task_of('film')}/*/film.mp4")))
    again = stage.render("--workers", "1")
    assert set(again.labels()) == {"film"}, "found when it was to be handed over"
    stage.check_film()


def test_a_flipped_bit_is_found_where_it_is_used(stage: Stage) -> None:
    stage.faults({"point": "order", "match": "one/window/0", "do": "hold"})
    run = stage.start("--workers", "1")
    stage.held()
    root = stage.folder / RENDER
    flip(next(root.glob(f"attempts/{stage.task_of('one/segment/0')}/*/*")))
    stage.release()
    run.finish()
    ended = {entry.task_id for entry in stage.history if isinstance(entry, Invalidated)}
    assert {stage.task_of("one/segment/0"), stage.task_of("one/segment/1")} <= ended
    assert "two/segment/0" not in stage.tried_again()
    stage.check_film()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 120 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_fills_up_loses_nothing(stage: Stage, small_disk: Path) -> None:
    stage.store_url = str(small_disk / "chaos")
    stage.faults({"point": "order", "match": "one/segment/0", "do": "hold"})
    run = stage.start("--workers", "1")
    stage.held()
    before, filler = stage.committed(), small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(65536))
    stage.release()
    assert "no space left" in run.finish(1).err
    filler.unlink()
    stage.faults()
    stage.render("--workers", "1")
    assert before and before.items() <= stage.committed().items()
    stage.check()
