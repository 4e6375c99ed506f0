"""`longtake inspect`: any film, its results as files; and where a render's film has its seams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from numpy.typing import NDArray

from cluster.cli import main
from cluster.inspect import known_of
from pipeline import media
from pipeline.errors import InputFileError
from pipeline.facts import CheckpointFacts, Facts
from pipeline.inspection import Inspection, Known, Shot, inspect_film
from pipeline.inspection_files import frame_table, write_inspection
from pipeline.known_seams import seams_of
from pipeline.ledger import LedgerState
from pipeline.plan import Plan, plan_film
from pipeline.seams import Seam
from pipeline.spec import parse_spec
from pipeline.tasks import ArtifactFile, CommitRecord
from tests.joined_films import FPS, draw, joined_pieces, joins_of

OFFICIAL = Facts(CheckpointFacts("/checkpoint", "d" * 64), {}, {})
PIECES = joined_pieces(3, 3, ("scene",))


def encode(frames: Iterator[NDArray[np.uint8]], out: Path, fps: int = FPS) -> Path:
    codec: Any = {"codec": "h264", "pix_fmt": "yuv420p", "crf": 18, "container": "mp4"}
    film = np.stack(list(frames))
    height_px, width_px = film.shape[1:3]
    with media.FrameEncoder(
        out,
        height_px=height_px,
        width_px=width_px,
        fps=Fraction(fps),
        codec=codec,
        ffmpeg=media.find_ffmpeg(),
    ) as encoder:
        encoder.write(film)
        encoder.close()
    return out


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(draw(PIECES), tmp_path_factory.mktemp("inspect") / "foreign film.mp4")


@pytest.fixture(scope="module")
def inspection(film: Path) -> Inspection:
    return inspect_film(film, media.find_ffmpeg())


def test_cuts_of_a_foreign_film_are_found_through_its_compression(inspection: Inspection) -> None:
    assert [join.frame for join in inspection.joins if join.kind == "cut"] == sorted(joins_of(PIECES))
    assert inspection.seams == []


def test_results_are_json_parquet_and_a_page(inspection: Inspection, tmp_path: Path) -> None:
    files = write_inspection(inspection, tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "frames.parquet",
        "inspection.html",
        "inspection.json",
    ]
    found = json.loads(files["json"].read_text())
    frames = sum(piece.frames for piece in PIECES)
    assert (found["frames"], found["fps"], found["size_px"]) == (frames, str(FPS), [64, 96])
    assert len(found["joins"]) == len(inspection.joins)
    assert set(found["drift"]["sharpness"]) == {"first", "last", "change", "slope_per_minute"}
    table = pyarrow.parquet.read_table(files["parquet"])
    assert table.num_rows == frames
    assert table["frame"].to_pylist() == list(range(frames))
    assert table["time_s"][-1].as_py() == pytest.approx((frames - 1) / FPS, abs=1e-6)
    assert {"lightness_mean", "z_pixels", "z_lasting_colour", "flash"} <= set(table.column_names)


def test_the_same_film_gives_the_same_results(film: Path, inspection: Inspection) -> None:
    again = inspect_film(film, media.find_ffmpeg())
    assert frame_table(again).equals(frame_table(inspection))
    assert again.to_json() == inspection.to_json()


def test_the_command_writes_beside_and_prints_what_it_found(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", str(film), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert Path(said["files"]["page"]) == Path("foreign film.inspection/inspection.html")
    assert (tmp_path / said["files"]["parquet"]).stat().st_size > 1000


@pytest.mark.parametrize("content", [b"", b"no film at all", b"\x00\x00\x00\x20ftypisom" + bytes(600)])
def test_a_file_that_is_no_film_is_refused(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(content)
    assert main(["inspect", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "x.mp4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_no_folder_is_named_before_measuring(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cluster.inspect.inspect_film", lambda *_: pytest.fail("it was measured"))
    (tmp_path / "page").touch()
    for out in (tmp_path / "page", tmp_path / "page" / "folder", Path("/proc/pages")):
        assert main(["inspect", str(film), "--out", str(out)]) == 2
        assert f"--out: cannot be written (got '{out}')" in capsys.readouterr().err


def test_where_the_current_folder_cannot_be_written_to_out_is_named(
    film: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir("/proc")
    assert main(["inspect", str(film)]) == 2
    said = capsys.readouterr().err
    assert "'/proc/foreign film.inspection'" in said
    assert "--out FOLDER" in said


def test_a_film_that_was_cut_off_is_refused(film: Path, tmp_path: Path) -> None:
    path = tmp_path / "torn.mp4"
    path.write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    with pytest.raises(InputFileError):
        inspect_film(path, media.find_ffmpeg())


# --------------------------------------------------------------------------------------- seams of a plan


def plan(*shots: dict[str, Any], **fields: Any) -> Plan:
    return plan_film(parse_spec(json.dumps({"shots": list(shots), **fields})), OFFICIAL)


def seams(planned: Plan) -> list[tuple[int, str]]:
    return [(seam.frame, seam.kind) for seam in seams_of(planned.tasks, planned.film_task_id)]


def test_a_refined_shot_has_seams_where_windows_and_where_segments_meet() -> None:
    planned = plan({"duration": "400f", "prompt": "a red circle"}, refinement="parallel")
    # Window i+1 takes over at 160(i+1)+21; new frames of segment i+1 begin at stage-one frame 93+80i.
    assert seams(planned) == [(181, "window"), (186, "segment"), (341, "window"), (346, "segment")]


def test_an_unrefined_shot_has_seams_where_segments_meet() -> None:
    planned = plan({"duration": "200f", "prompt": "a red circle"}, refinement="none")
    assert seams(planned) == [(93, "segment"), (173, "segment")]


def test_another_shot_begins_with_a_cut_and_a_crossfade_is_no_seam() -> None:
    first, second = {"duration": "60f", "prompt": "a"}, {"duration": "70f", "prompt": "b"}
    assert seams(plan(first, second, refinement="none")) == [(60, "cut")]
    faded = plan(first, {**second, "transition": {"crossfade": "10f"}}, refinement="none")
    assert faded.film_frames == 120
    assert seams(faded) == []


def test_a_shot_that_continues_the_one_before_meets_it_in_a_seam_and_not_a_cut() -> None:
    first = {"duration": "60f", "prompt": "a"}
    planned = plan(first, {"duration": "70f", "prompt": "b", "continue": "previous"}, refinement="none")
    assert seams(planned) == [(60, "segment")]


def test_what_is_known_of_a_render_are_its_seams_shots_and_timings() -> None:
    planned = plan(
        {"id": "one", "duration": "60f", "prompt": "a"},
        {"id": "two", "duration": "70f", "prompt": "b"},
        refinement="none",
    )
    task = planned.tasks[planned.film_task_id]
    record = CommitRecord(
        task.id, 1, 1, (ArtifactFile("film.mp4", "x/film.mp4", 1, "0" * 64),), {}, {}, 2.5, "host", 100.0
    )
    known = known_of(planned, LedgerState(commits={task.id: record}), "Title")
    assert known.seams == [Seam(60, "cut")]
    assert [(shot.id, shot.start, shot.stop) for shot in known.shots] == [("one", 0, 60), ("two", 60, 130)]
    assert [(t.kind, t.seconds, t.finished_at_s) for t in known.timings] == [("film", 2.5, 100.0)]


def test_a_crossfade_is_no_drift_of_the_shot_that_it_leads_to(tmp_path: Path) -> None:
    levels = [*np.linspace(40, 200, 12), *[200] * 48]
    path = encode((np.full((64, 96, 3), level, np.uint8) for level in levels), tmp_path / "faded.mp4")
    shots = [Shot("cut", 0, 60), Shot("faded", 0, 60, 12)]
    found = inspect_film(path, media.find_ffmpeg(), Known("", [], shots, []))
    cut, faded = (found.shot_drift[name]["lightness_mean"].change for name in ("cut", "faded"))
    assert cut > 20 and faded < 1
    planned = plan(
        {"id": "one", "duration": "60f", "prompt": "a"},
        {"id": "two", "duration": "70f", "prompt": "b", "transition": {"crossfade": "10f"}},
        refinement="none",
    )
    assert known_of(planned, LedgerState(), "").shots == [Shot("one", 0, 50), Shot("two", 50, 120, 10)]
