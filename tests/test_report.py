"""The contact sheet, report.json and the gate on broken frames."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import media, report
from pipeline.errors import QualityError
from pipeline.quality import FrameGate
from pipeline.tasks import ArtifactFile, CommitRecord, Task
from pipeline.times import format_bytes, timecode


def tiles(count: int, height: int = 80, width: int = 120) -> list[report.Tile]:
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[..., 0] = 200
    return [report.Tile(frame, f"shot-{i}", i * 2.5) for i, frame in enumerate(frames)]


def opened(sheet: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sheet), formats=["JPEG"])).astype(int)


def test_a_contact_sheet_shows_every_tile_with_a_label() -> None:
    sheet = opened(report.contact_sheet("A film", tiles(7)))
    picture_px = 80 * report.TILE_WIDTH_PX // 120
    assert sheet.shape[1] > 5 * report.TILE_WIDTH_PX
    assert 2 * picture_px < sheet.shape[0] < 3 * picture_px
    red = (sheet[..., 0] > 150) & (sheet[..., 1] < 60)
    assert red.sum() == pytest.approx(7 * picture_px * report.TILE_WIDTH_PX, rel=0.02)
    # Light writing below the first picture: the shot at its left end, the time at its right.
    below = sheet[38 + picture_px : 38 + picture_px + 20].min(axis=2) > 130
    assert below[:, :80].any()
    assert below[:, 200:248].any()
    assert not below[:, 100:190].any()


def test_the_same_tiles_give_the_same_sheet_and_a_long_film_a_bounded_one() -> None:
    assert report.contact_sheet("x", tiles(5)) == report.contact_sheet("x", tiles(5))
    many = opened(report.contact_sheet("x" * 400, tiles(500, 20, 60)))
    assert many.shape == opened(report.contact_sheet("y", tiles(report.MOST_TILES, 20, 60))).shape


def test_an_empty_sheet_and_a_long_name_are_no_error() -> None:
    assert opened(report.contact_sheet("nothing yet", [])).size
    long = report.Tile(
        np.zeros((40, 60, 3), np.uint8), "a-shot-with-a-very-long-name-indeed-and-more", 7261.25
    )
    assert opened(report.contact_sheet("", [long])).size


def test_sizes_are_told_in_units_that_say_something() -> None:
    sizes = (0, 1, 999_499, 999_500, 97_400_000, 999_500_000, 38_240_000_000)
    assert [format_bytes(size) for size in sizes] == ["0 kB", "1 kB", "999 kB", "1 MB", "97 MB", "1.0 GB", "38.2 GB"]


def test_timecodes_count_minutes_seconds_and_tenths() -> None:
    assert [timecode(t) for t in (0, 0.1, 59.99, 60, 3723.5)] == [
        "0:00.0",
        "0:00.1",
        "0:59.9",
        "1:00.0",
        "62:03.5",
    ]


def test_thumbnails_come_from_the_middles_of_equal_parts(tmp_path: Path) -> None:
    ff = media.find_ffmpeg()
    grey = (np.arange(40, dtype=np.uint8) * 6)[:, None, None, None] + np.zeros((40, 64, 96, 3), np.uint8)
    codec = {"codec": "h264", "pix_fmt": "yuv420p", "crf": 12, "container": "mp4"}
    with media.FrameEncoder(
        tmp_path / "a.mp4", height_px=64, width_px=96, fps=Fraction(10), codec=codec, ffmpeg=ff
    ) as encoder:
        encoder.write(grey)
        encoder.close()
    found = report.thumbnails(tmp_path / "a.mp4", 4, ff)
    assert [time_s for time_s, _ in found] == [0.5, 1.5, 2.5, 3.5]
    assert [frame.shape for _, frame in found] == [(160, report.TILE_WIDTH_PX, 3)] * 4
    np.testing.assert_allclose([frame.mean() for _, frame in found], [30, 90, 150, 210], atol=3)


def test_the_report_counts_what_is_done_and_sums_what_it_took() -> None:
    planned = [
        Task(f"segment-{i}", "segment", "chain", {}, label=f"a/segment/{i}", shot_id="a") for i in range(3)
    ]
    planned.append(Task("film-1", "film", "media", {}))
    commits = {
        f"segment-{i}": CommitRecord(
            f"segment-{i}",
            attempt=i,
            epoch=1,
            files=(ArtifactFile("x", "x", 1, "00"),),
            inputs_sha256={},
            measures={"level_mean": 10.0 * i, "broken": float("nan")},
            seconds=1.5,
            host="h",
        )
        for i in range(2)
    }
    film = report.FilmFile("out/film.mp4", "ab" * 32, 1234, 300, Fraction(30000, 1001))
    got = json.loads(
        report.report_json(
            title="T",
            state="running",
            tasks=planned,
            commits=commits,
            versions={"torch": "2", "longtake": "1"},
            wall_s=9.0,
            film=film,
            warnings=["w"],
        )
    )
    assert got["counts"] == {"segment": {"planned": 3, "done": 2}, "film": {"planned": 1, "done": 0}}
    assert got["seconds"] == {"wall": 9.0, "by_kind": {"segment": 3.0}}
    assert got["measures"] == {"segment": {"level_mean": {"least": 0.0, "mean": 5.0, "most": 10.0}}}
    assert [entry["attempt"] for entry in got["tasks"]] == [0, 1]
    assert got["film"]["duration_s"] == 10.01
    assert got["film"]["path"] == "out/film.mp4"
    assert (got["state"], got["warnings"], got["versions"]["torch"]) == ("running", ["w"], "2")


# ----------------------------------------------------------------------------------------------- the gate


def moving(count: int) -> np.ndarray:
    frames = np.full((count, 32, 48, 3), 90, np.uint8)
    for index in range(count):
        frames[index, 8:24, index % 32 : index % 32 + 8] = 200
    return frames


def gate(*batches: np.ndarray) -> FrameGate:
    made = FrameGate()
    for batch in batches:
        made.add(batch)
    return made


def test_moving_frames_pass_and_are_measured_alike_in_any_batches() -> None:
    frames = moving(60)
    whole, parts = gate(frames), gate(frames[:7], frames[7:8], frames[8:])
    whole.check("unit")
    assert whole.measures() == parts.measures()
    assert whole.measures()["still_share"] == 0
    assert whole.measures()["change_mean"] > 0.5


def test_black_flat_and_frozen_units_are_refused() -> None:
    with pytest.raises(QualityError, match="unit 3: all 5 frames are black"):
        gate(np.zeros((5, 32, 48, 3), np.uint8)).check("unit 3")
    with pytest.raises(QualityError, match="one flat colour"):
        gate(np.full((5, 32, 48, 3), (90, 120, 200), np.uint8)).check("unit")
    with pytest.raises(QualityError, match="stands still for all 40"):
        gate(moving(1).repeat(40, axis=0)).check("unit")


def test_a_short_hold_and_a_moment_of_black_pass() -> None:
    gate(moving(1).repeat(10, axis=0)).check("a short unit")
    gate(np.zeros((20, 32, 48, 3), np.uint8), moving(40)).check("a fade from black")
    gate(moving(30).repeat(2, axis=0)).check("doubled frames")
