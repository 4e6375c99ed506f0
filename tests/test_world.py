"""The drawn world: the same film at any size, rate and time; captions that say what is drawn; the held-out
split.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from model import world

MOVER = world.Mover("circle", "red", "right", "slowly", 0.2, 0.6, 0.5)


def film(*movers: world.Mover, backdrop: str = "day") -> world.Film:
    return world.Film(world.Scene(backdrop, movers), detail=5)


def draw(of: world.Film, frames: int = 4, fps: float = 15.0, size: tuple[int, int] = (64, 96), start_s: float = 0.0):
    return world.render(of, world.frame_times(frames, fps, start_s), *size)


def centre_x(mask: torch.Tensor) -> float:
    """In picture heights; the shape must not touch the edge."""
    columns = (torch.arange(mask.shape[-1]) + 0.5) / mask.shape[-2]
    return float((mask.sum(-2) * columns).sum() / mask.sum())


def test_a_seed_names_a_film() -> None:
    assert world.draw_film(4) == world.draw_film(4)
    assert len({world.draw_film(i) for i in range(50)}) == 50


def test_frames_are_bounded_and_masks_are_shares() -> None:
    frames, mask = draw(world.draw_film(1), 3)
    assert frames.shape == (3, 3, 64, 96)
    assert mask.shape == (3, 64, 96)
    assert float(frames.abs().max()) <= 1.0
    assert float(mask.min()) >= 0.0
    assert float(mask.max()) == 1.0


@pytest.mark.parametrize("kind", world.KINDS)
def test_shapes_are_of_about_the_same_size(kind: str) -> None:
    _, mask = draw(film(replace(MOVER, kind=kind)), 1, size=(128, 192))
    area = float(mask.mean()) * world.ASPECT / (3.1416 * 0.2**2)
    assert 0.5 < area < 1.15


@pytest.mark.parametrize("colour", world.COLOURS)
def test_the_middle_of_a_shape_has_its_colour(colour: str) -> None:
    frames, _ = draw(film(replace(MOVER, colour=colour)), 1, size=(128, 192))
    x = int(MOVER.x * 128)
    assert frames[0, :, 64, x].add(1).div(2).tolist() == pytest.approx(world.COLOURS[colour], abs=0.01)


@pytest.mark.parametrize("speed", world.SPEEDS)
def test_speed_is_in_heights_per_second(speed: str) -> None:
    mover = replace(MOVER, speed=speed)
    _, mask = draw(film(mover), 2, fps=2.0)
    assert centre_x(mask[1]) - centre_x(mask[0]) == pytest.approx(world.SPEEDS[speed] / 2, abs=0.01)


def test_a_shape_that_leaves_comes_back_on_the_other_side() -> None:
    around_s = world.ASPECT / world.SPEEDS["slowly"]
    start, mask = draw(film(MOVER), 1)
    later, later_mask = draw(film(MOVER), 1, start_s=around_s * 100)
    torch.testing.assert_close(later_mask, mask, atol=1e-4, rtol=0)
    torch.testing.assert_close(later, start, atol=1e-4, rtol=0)


@pytest.mark.parametrize("backdrop", world.BACKDROPS)
def test_the_same_film_at_another_size_and_rate(backdrop: str) -> None:
    drawn = film(MOVER, backdrop=backdrop)
    coarse, _ = draw(drawn, 3, 15.0, (64, 96))
    fine, _ = draw(drawn, 5, 30.0, (128, 192))
    shrunk = torch.nn.functional.avg_pool2d(fine[::2], 2)
    assert float((shrunk - coarse).abs().mean()) < 0.01


def test_a_change_turns_the_shape_without_a_jump() -> None:
    after = world.Scene("day", (replace(MOVER, direction="left"),))
    changing = replace(film(MOVER), change_s=1.0, after=after)
    _, mask = draw(changing, 31)
    path = [centre_x(m) for m in mask]
    assert path[15] - path[0] == pytest.approx(0.16, abs=0.005)
    assert path[30] == pytest.approx(path[0], abs=0.005)
    assert max(abs(b - a) for a, b in zip(path, path[1:], strict=False)) < 0.013


def test_a_change_of_backdrop_fades() -> None:
    changing = replace(film(MOVER), change_s=0.0, after=world.Scene("night", (MOVER,)))
    frames, _ = draw(changing, 16)
    brightness = frames.mean((1, 2, 3))
    assert bool((brightness.diff() < 0).all())


def test_captions_name_everything() -> None:
    rng = random.Random(0)
    for seed in range(60):
        scene = world.draw_film(seed).scene
        for words in (world.caption(scene), world.caption(scene, rng)):
            for mover in scene.movers:
                assert f"{mover.colour} {mover.kind}" in words
                assert mover.direction in words
            assert words.isascii()


def test_held_out_combinations_stay_out_of_training_films() -> None:
    combinations = [
        replace(MOVER, kind=k, colour=c, direction=d)
        for k in world.KINDS
        for c in world.COLOURS
        for d in world.DIRECTIONS
    ]
    held_out = [m for m in combinations if world.is_held_out(m)]
    assert len(held_out) == 16
    assert {m.colour for m in held_out} == set(world.COLOURS)
    for seed in range(100):
        training, measuring = world.draw_film(seed, change_s=1.0), world.draw_film(seed, held_out=True)
        scenes = (training.scene, training.after or training.scene)
        assert not any(world.is_held_out(m) for scene in scenes for m in scene.movers)
        assert all(world.is_held_out(m) for m in measuring.scene.movers)
