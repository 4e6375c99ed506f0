"""The judge of the drawn world: right on films the world draws, also through the autoencoder, and not taken in by
anything else. All 512 combinations are judged by `python -m tests.test_judge`.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import model
from model import world
from model.checkpoint import load_vae
from model.judge import Verdict, look
from model.pixels import decode_frames, encode_frames, video_to_frames

POCKET = Path(model.__file__).parent / "pocket"
RED_CIRCLE = world.Mover("circle", "red", "right", "slowly", 0.2, 0.6, 0.5)
Combination = tuple[str, str, str, str]


def combinations(count: int, seed: int) -> list[Combination]:
    """Kind, colour, direction and backdrop; in every `count` of them each name turns up about equally often."""
    every = list(itertools.product(world.KINDS, world.COLOURS, world.DIRECTIONS, world.BACKDROPS))
    random.Random(seed).shuffle(every)
    return every[:count]


def film_of(kind: str, colour: str, direction: str, backdrop: str, rng: random.Random) -> world.Film:
    x, y = rng.uniform(0.3, 1.2), rng.uniform(0.25, 0.75)
    mover = world.Mover(kind, colour, direction, rng.choice(list(world.SPEEDS)), rng.uniform(0.15, 0.25), x, y)
    return world.Film(world.Scene(backdrop, (mover,)), rng.randrange(1 << 30))


def frames_of(film: world.Film, frames: int = 93) -> torch.Tensor:
    video, _ = world.render(film, world.frame_times(frames, 15.0), 64, 96)
    return video_to_frames(video.transpose(0, 1)[None])


def through_autoencoder(vae, frames: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(decode_frames(vae, encode_frames(vae, frames))))


def misjudged(chosen: Sequence[Combination], seed: int, vae=None) -> list[tuple[Combination, Verdict]]:
    """The films whose colour, outline or direction is told wrong."""
    wrong = []
    for index, (kind, colour, direction, backdrop) in enumerate(chosen):
        frames = frames_of(film_of(kind, colour, direction, backdrop, random.Random(f"{seed}/{index}")))
        verdict = look((frames if vae is None else through_autoencoder(vae, frames)).numpy()).verdict()
        if told(verdict) != (colour, kind, direction):
            wrong.append(((kind, colour, direction, backdrop), verdict))
    return wrong


def verdict_of(film: world.Film) -> Verdict:
    return look(frames_of(film).numpy()).verdict()


def told(verdict: Verdict) -> tuple[str | None, str | None, str | None]:
    return verdict.colour, verdict.shape, verdict.direction


def film(mover: world.Mover, backdrop: str = "day", **changes) -> world.Film:
    return replace(world.Film(world.Scene(backdrop, (mover,)), detail=5), **changes)


def test_drawn_films_are_told_right() -> None:
    assert misjudged(combinations(50, seed=21), seed=21) == []


@pytest.mark.slow
def test_films_are_told_right_through_the_autoencoder() -> None:
    vae = load_vae(POCKET, device="cpu", dtype=torch.float32)
    assert misjudged(combinations(10, seed=22), seed=22, vae=vae) == []


@pytest.mark.parametrize("part", ["kind", "colour", "direction"])
def test_another_prompt_than_the_film_shows_is_wrong(part: str) -> None:
    names = {"kind": world.KINDS, "colour": tuple(world.COLOURS), "direction": tuple(world.DIRECTIONS)}[part]
    seen = {}
    for name in names:
        verdict = verdict_of(film(replace(RED_CIRCLE, **{part: name}), "snow"))
        seen[name] = {"kind": verdict.shape, "colour": verdict.colour, "direction": verdict.direction}[part]
    assert seen == {name: name for name in names}


def test_a_shape_that_stands_still_has_no_direction() -> None:
    frames = frames_of(film(RED_CIRCLE)).numpy()
    assert look(frames[:1].repeat(93, axis=0)).verdict().direction is None


def test_a_shape_that_goes_to_and_fro_has_no_direction() -> None:
    there = frames_of(film(replace(RED_CIRCLE, speed="quickly")), 47).numpy()
    assert look(np.concatenate([there, there[-2::-1]])).verdict().direction is None


def test_noise_and_an_empty_scene_show_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (93, 64, 96, 3), np.uint8)
    assert told(look(noise).verdict()) == (None, None, None)
    empty = frames_of(world.Film(world.Scene("snow", ()), detail=3)).numpy()
    assert told(look(empty).verdict()) == (None, None, None)


def test_a_turned_film_shows_another_direction() -> None:
    frames = frames_of(film(replace(RED_CIRCLE, kind="triangle"))).numpy()
    assert look(frames[::-1]).verdict().direction == "left"
    assert look(frames[:, :, ::-1]).verdict().direction == "left"


def test_a_film_whose_shape_changes_is_told_by_what_lasts() -> None:
    square = frames_of(film(replace(RED_CIRCLE, kind="square", colour="blue"))).numpy()
    circle = frames_of(film(RED_CIRCLE)).numpy()
    seen = look(np.concatenate([square[:60], circle[60:]]))
    assert (seen.verdict().shape, seen.verdict().colour) == ("square", "blue")
    assert (seen.verdict(70).shape, seen.verdict(70).colour) == ("circle", "red")


@pytest.mark.parametrize("changes_every", [1, 6])
def test_a_blot_that_keeps_changing_its_outline_has_none(changes_every: int) -> None:
    backdrop = frames_of(world.Film(world.Scene("day", ()), detail=5)).numpy()
    frames, rng = np.ascontiguousarray(backdrop), np.random.default_rng(2)
    angles = np.arange(48) * 2 * np.pi / 48
    for index, frame in enumerate(frames):
        if index % changes_every == 0:
            turns = rng.uniform(0, 2 * np.pi, 3)
            radii = 11 * (1 + 0.15 * sum(np.cos(k * angles + turn) for k, turn in zip((2, 3, 4), turns, strict=True)))
        outline = np.stack([20 + index / 2 + radii * np.cos(angles), 30 + radii * np.sin(angles)], 1)
        cv2.fillPoly(frame, [outline.round().astype(np.int32)], (220, 25, 30))
    verdict = look(frames).verdict()
    assert told(verdict) == ("red", None, "right")


def test_a_shape_seen_in_too_few_frames_is_not_named() -> None:
    frames = frames_of(film(replace(RED_CIRCLE, speed="quickly"))).numpy()
    empty = frames_of(world.Film(world.Scene("day", ()), detail=5)).numpy()
    frames[25:] = empty[25:]
    assert told(look(frames).verdict()) == (None, None, None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--films", type=int, default=512)
    parser.add_argument("--autoencoder", action="store_true", help="judge what the bundled autoencoder makes of them")
    args = parser.parse_args()
    vae = load_vae(POCKET, device="cpu", dtype=torch.float32) if args.autoencoder else None
    wrong = misjudged(combinations(args.films, seed=1), seed=1, vae=vae)
    for combination, verdict in wrong:
        print(combination, verdict)
    print(f"{args.films - len(wrong)} of {args.films} right")


if __name__ == "__main__":
    main()
