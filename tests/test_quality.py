"""What is measured on frames: known pictures give known numbers, known joins are found, faults are named."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.drift import measure_drift
from pipeline.errors import QualityError
from pipeline.faults import find_faults, flicker
from pipeline.measure import FilmMeter, Floats, sharpness, similarity
from pipeline.quality import FrameGate
from pipeline.seams import Seam, quantile, score_seams, stand_out
from tests.joined_films import JOIN_KINDS, detect, draw, joined_pieces, plain_piece

FPS = 15
Frames = NDArray[np.uint8]


def meter_of(frames: Frames) -> FilmMeter:
    meter = FilmMeter()
    for index, frame in enumerate(frames):
        meter.add(frame, index / FPS)
    return meter


def table_of(frames: Frames) -> dict[str, Floats]:
    return meter_of(frames).table()


def grey(levels: Floats, height_px: int = 24, width_px: int = 32) -> Frames:
    """A film of one grey a frame."""
    film = np.empty((len(levels), height_px, width_px, 3), np.uint8)
    film[:] = np.rint(levels).astype(np.uint8)[:, None, None, None]
    return film


def texture(seed: int = 0, height_px: int = 48, width_px: int = 96) -> NDArray[np.float64]:
    """A smooth random picture [h,w], 40..215."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height_px, :width_px]
    waves = sum(np.sin(rng.uniform(0.1, 0.5) * x + rng.uniform(0.1, 0.5) * y + rng.uniform(0, 6)) for _ in range(6))
    return np.asarray(127.5 + 14 * waves)


def pan(shifts: Floats, height_px: int = 48, width_px: int = 72) -> Frames:
    """A film of the texture moved to the left by `shifts` pixels, with a little noise on every frame."""
    rng = np.random.default_rng(1)
    picture, columns = texture(0, height_px, width_px + int(shifts.max()) + 4), np.arange(width_px)
    film = []
    for shift in shifts:
        at = columns + shift
        left = np.floor(at).astype(int)
        moved = picture[:, left] * (1 - (at - left)) + picture[:, left + 1] * (at - left)
        noisy = moved[..., None] + rng.normal(0, 0.5, (height_px, width_px, 3))
        film.append(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))
    return np.stack(film)


# ---------------------------------------------------------------------------------------- single measures


def test_colours_are_those_of_cielab() -> None:
    red = np.zeros((1, 16, 16, 3), np.uint8)
    red[..., 0] = 255
    table = table_of(red)
    # sRGB red is L* 53.24, a* 80.09, b* 67.20 (D65).
    assert table["lightness_mean"][0] == pytest.approx(53.24, abs=0.1)
    assert table["a_mean"][0] == pytest.approx(80.09, abs=0.2)
    assert table["b_mean"][0] == pytest.approx(67.20, abs=0.2)
    assert table["saturation"][0] == pytest.approx(104.55 / np.hypot(104.55, 53.24), abs=0.002)


def test_blur_lowers_sharpness_and_a_flat_frame_has_none() -> None:
    sharp = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    soft = (sharp.astype(np.uint16)[:, 1:] + sharp[:, :-1]) // 2
    assert sharpness(sharp) > 1.3 * sharpness(soft.astype(np.uint8)) > 0
    assert sharpness(grey(np.array([90.0]))[0]) == 0.0


def test_similarity_is_ssim_over_uniform_windows() -> None:
    a, b = texture(1).astype(np.uint8), texture(2).astype(np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view
    x, y = windows(a.astype(float), (7, 7)), windows(b.astype(float), (7, 7))
    mean_x, mean_y = x.mean((-1, -2)), y.mean((-1, -2))
    both = (x * y).mean((-1, -2)) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    expected /= (mean_x**2 + mean_y**2 + c1) * (x.var((-1, -2)) + y.var((-1, -2)) + c2)
    # Borders differ: the windows there reach over the edge.
    assert similarity(a, b) == pytest.approx(expected.mean(), abs=0.03)
    assert similarity(a, a) == pytest.approx(1.0, abs=1e-6)


def test_colour_distance_is_how_far_the_lightness_moved() -> None:
    table = table_of(grey(np.concatenate([np.full(60, 80.0), np.full(10, 140.0)])))
    moved = table["lightness_mean"][-1] - table["lightness_mean"][0]
    assert table["colour_distance"][-1] == pytest.approx(moved, abs=100 / 64)
    assert table["colour"][60] == pytest.approx(moved, abs=100 / 64)
    assert table["colour"][1:60].max() == 0.0


def test_motion_is_how_fast_the_picture_moves() -> None:
    table = table_of(pan(np.arange(20.0)))
    assert np.median(table["motion"][1:]) == pytest.approx(FPS / 48, rel=0.15)


def test_motion_that_goes_on_is_expected_and_motion_that_turns_is_not() -> None:
    table = table_of(pan(10.0 + np.concatenate([np.arange(20.0), 18.0 - np.arange(15.0)])))
    assert table["flow"][20] > 3 * np.median(table["flow"][2:20])
    assert table["pixels"][20] < 1.5 * np.median(table["pixels"][2:20])


# ------------------------------------------------------------------------------------------------- drift


def test_drift_and_slope_of_a_steady_change_are_what_they_must_be() -> None:
    frames = 200
    table = table_of(grey(np.linspace(60, 180, frames)))
    lightness = table["lightness_mean"]
    drift = measure_drift(table)["lightness_mean"]
    assert drift.change == pytest.approx(lightness[-30:].mean() - lightness[:30].mean(), abs=1e-9)
    line = np.polyfit(table["time_s"], lightness, 1)
    assert drift.slope_per_minute == pytest.approx(60 * line[0], rel=1e-6)


def test_a_film_that_stays_does_not_drift() -> None:
    drift = measure_drift(table_of(pan(20 + 8 * np.sin(np.arange(120) / 3))))
    assert drift["lightness_mean"].change < 0.5
    assert drift["colour_distance"].last < 1.0
    assert abs(drift["saturation"].slope_per_minute) < 0.01


def test_drift_of_one_shot_leaves_the_others_out() -> None:
    table = table_of(grey(np.concatenate([np.full(40, 50.0), np.full(40, 200.0)])))
    assert measure_drift(table)["lightness_mean"].change > 40
    assert measure_drift(table, slice(40, 80))["lightness_mean"].change < 1e-6


# ------------------------------------------------------------------------------------------------ faults


def test_faulty_frames_are_named() -> None:
    frames = pan(np.arange(120.0))
    frames[10:13] = 0
    frames[20:22] = 200
    frames[40:70] = frames[40]
    frames[80:82] = np.random.default_rng(3).integers(0, 256, frames[80:82].shape, np.uint8)
    frames[100] = 255 - frames[100]
    found = [(f.kind, f.start, f.stop) for f in find_faults(table_of(frames))]
    assert ("black", 10, 13) in found
    assert ("flat", 20, 22) in found
    assert ("frozen", 41, 70) in found
    assert ("noise", 80, 82) in found
    assert ("flash", 100, 101) in found


def test_a_sound_film_has_no_fault() -> None:
    assert find_faults(table_of(pan(np.arange(90.0)))) == []


def test_a_film_of_fewer_frames_shown_twice_is_not_frozen() -> None:
    assert find_faults(table_of(np.repeat(pan(np.arange(30.0)), 3, axis=0))) == []


def test_flicker_counts_what_goes_up_and_down_again_but_not_a_fade() -> None:
    fade = np.linspace(60, 180, 60)
    assert flicker(table_of(grey(fade + 6 * (np.arange(60) % 2)))) > 10 * flicker(table_of(grey(fade)))


@pytest.mark.parametrize(
    ("frames", "words"),
    [(grey(np.zeros(5)), "black"), (grey(np.full(5, 90.0)), "one flat colour")],
)
def test_the_gate_refuses_a_unit_that_shows_nothing(frames: Frames, words: str) -> None:
    gate = FrameGate()
    gate.add(frames)
    with pytest.raises(QualityError, match=words):
        gate.check("unit/0")


def test_the_gate_refuses_a_unit_that_stands_still_and_lets_a_moving_one_pass() -> None:
    still, moving = FrameGate(), FrameGate()
    still.add(np.repeat(pan(np.array([0.0])), 30, axis=0))
    moving.add(pan(np.arange(30.0)))
    moving.check("unit/0")
    with pytest.raises(QualityError, match="stands still"):
        still.check("unit/1")


# ------------------------------------------------------------------------------------------------- seams


def test_a_seam_with_a_step_in_brightness_stands_out_and_one_without_does_not() -> None:
    frames = pan(np.arange(120.0)).astype(np.int16)
    frames[60:] += 6
    table = table_of(np.clip(frames, 0, 255).astype(np.uint8))
    seen, unseen = score_seams(table, [Seam(60, "window"), Seam(90, "window")], stand_out(table))
    assert (seen.verdict, seen.rank) == ("visible", 1.0)
    assert unseen.verdict == "unseen"


def test_a_small_step_that_stays_is_seen_in_the_lasting_colour() -> None:
    frames = pan(20 + 10 * np.sin(np.arange(160) / 5)).astype(np.int16)
    frames[80:, :, :, 2] += 4
    table = table_of(np.clip(frames, 0, 255).astype(np.uint8))
    (seam,) = score_seams(table, [Seam(80, "segment")], stand_out(table))
    assert seam.z["lasting_colour"] > 8


def test_seams_at_places_without_one_look_like_their_neighbours() -> None:
    table = table_of(np.stack(list(draw(plain_piece(5, 14.0)))))
    scores = score_seams(table, [Seam(t, "window") for t in range(20, 190, 10)], stand_out(table))
    assert np.median([score.score for score in scores]) < 3.5
    assert not [score for score in scores if score.verdict == "visible"]


def test_a_seam_outside_of_the_film_is_an_error() -> None:
    table = table_of(pan(np.arange(30.0)))
    with pytest.raises(ValueError, match="outside"):
        score_seams(table, [Seam(30, "given")], stand_out(table))


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_quantiles_of_a_neighbourhood_leave_out_what_is_not_there(share: float) -> None:
    rows = np.random.default_rng(3).gamma(1.0, 1.0, (40, 57))
    rows[:20, :20], rows[10:30, 30:] = np.nan, np.nan
    rows[35, 1:] = np.nan
    np.testing.assert_allclose(quantile(rows, share), np.nanpercentile(rows, 100 * share, axis=1), rtol=1e-14)


def test_hard_joins_of_every_kind_are_found_and_no_others() -> None:
    torch.set_num_threads(1)
    outcomes = [detect(joined_pieces(seed, 8)) for seed in (70, 71)]
    joins = sum((Counter(outcome.joins) for outcome in outcomes), Counter[str]())
    found = sum((Counter(outcome.found) for outcome in outcomes), Counter[str]())
    assert set(joins) == set(JOIN_KINDS)
    assert found.total() >= 0.95 * joins.total()
    assert sum(outcome.alarms for outcome in outcomes) == 0


def test_a_film_without_a_join_raises_no_alarm() -> None:
    assert [detect(plain_piece(seed, 15.0)).alarms for seed in (80, 81)] == [0, 0]


def test_one_frame_and_two_frames_are_films_too() -> None:
    for count in (1, 2):
        meter = meter_of(pan(np.arange(float(count))))
        table = meter.table()
        assert measure_drift(table)["motion"].change == 0.0
        assert all(np.isfinite(column).all() for column in table.values())
        assert np.isfinite(stand_out(table).score).all()


def test_a_film_of_few_pixels_is_measured() -> None:
    meter = FilmMeter()
    for index, frame in enumerate(np.random.default_rng(0).integers(0, 256, (3, 2, 8, 3), np.uint8)):
        meter.add(frame, index / FPS)
    assert all(np.isfinite(column).all() for column in meter.table().values())


def test_what_is_kept_of_a_frame_is_a_few_numbers() -> None:
    frames = pan(np.arange(20.0), 180, 320)
    meter = FilmMeter()
    tracemalloc.start()
    for index in range(120):
        meter.add(frames[index % 20], index / FPS)
        if index == 59:  # After the seconds that later ones are compared with.
            half, _ = tracemalloc.get_traced_memory()
    whole, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (whole - half) / 60 < 600, "an hour of 30 frames a second is 65 MB"
