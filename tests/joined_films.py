"""Films of the drawn world with joins at known frames, and how many of them a detector finds.

    python -m tests.joined_films --joins 120 --plain-minutes 10

prints the share of hard joins found, for each kind, and the false alarms in so many minutes without a join.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from model.world import ASPECT, DIRECTIONS, SPEEDS, Film, Mover, draw_film, frame_times, render
from pipeline.measure import FilmMeter
from pipeline.seams import find_joins, stand_out

JOIN_KINDS = ("scene", "same scene", "skip", "motion")
HEIGHT_PX, WIDTH_PX, FPS = 64, 96, 15


@dataclass(frozen=True)
class Piece:
    """`frames` frames of a film of the drawn world from `start_s` on; `join`: its kind of beginning."""

    film: Film
    start_s: float
    frames: int
    join: str | None


def joined_pieces(seed: int, joins: int, kinds: tuple[str, ...] = JOIN_KINDS) -> list[Piece]:
    """A film with `joins` joins of random kinds, 2.5 to 5 seconds apart."""
    rng = random.Random(seed)
    piece = Piece(draw_film(rng.randrange(1 << 30)), rng.uniform(0, 20), rng.randrange(38, 76), None)
    pieces = [piece]
    for _ in range(joins):
        piece = _after(rng, piece, rng.choice(kinds))
        pieces.append(piece)
    return pieces


def _after(rng: random.Random, before: Piece, kind: str) -> Piece:
    end_s, frames = before.start_s + before.frames / FPS, rng.randrange(38, 76)
    if kind == "scene":
        film = draw_film(rng.randrange(1 << 30))
        while film.scene.backdrop == before.film.scene.backdrop:
            film = draw_film(rng.randrange(1 << 30))
        return Piece(film, rng.uniform(0, 20), frames, kind)
    if kind == "same scene":
        movers = tuple(_elsewhere(rng, mover) for mover in before.film.scene.movers)
        film = replace(before.film, scene=replace(before.film.scene, movers=movers))
        return Piece(film, end_s, frames, kind)
    if kind == "skip":
        return Piece(before.film, end_s + rng.uniform(0.4, 1.2), frames, kind)
    movers = tuple(_turned(rng, mover, end_s) for mover in before.film.scene.movers)
    return Piece(replace(before.film, scene=replace(before.film.scene, movers=movers)), end_s, frames, kind)


def _elsewhere(rng: random.Random, mover: Mover) -> Mover:
    """The same shape a good way off."""
    x, y = (mover.x + rng.uniform(0.3, 1.2)) % ASPECT, (mover.y + rng.uniform(0.2, 0.8)) % 1.0
    return replace(mover, x=x, y=y)


def _turned(rng: random.Random, mover: Mover, at_s: float) -> Mover:
    """The shape at the same place at `at_s`, going another way from then on."""
    direction = rng.choice([name for name in DIRECTIONS if name != mover.direction])
    moved = replace(mover, direction=direction)
    here, there = _place(mover, at_s), _place(replace(moved, x=0.0, y=0.0), at_s)
    return replace(moved, x=here[0] - there[0], y=here[1] - there[1])


def _place(mover: Mover, at_s: float) -> tuple[float, float]:
    speed = SPEEDS[mover.speed]
    dx, dy = DIRECTIONS[mover.direction]
    return mover.x + dx * speed * at_s, mover.y + dy * speed * at_s


def draw(pieces: list[Piece], height_px: int = HEIGHT_PX, width_px: int = WIDTH_PX) -> Iterator[NDArray[np.uint8]]:
    """The frames uint8 [h,w,3], one by one."""
    for piece in pieces:
        times_s = frame_times(piece.frames, FPS, piece.start_s)
        for start in range(0, piece.frames, 32):
            pixels, _ = render(piece.film, times_s[start : start + 32], height_px, width_px)
            levels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            yield from levels.permute(0, 2, 3, 1).contiguous().numpy()


def joins_of(pieces: list[Piece]) -> dict[int, str]:
    """First frame after each join, and its kind."""
    joins, at = {}, 0
    for piece in pieces:
        if piece.join is not None:
            joins[at] = piece.join
        at += piece.frames
    return joins


@dataclass(frozen=True)
class Outcome:
    """Joins there were and joins found, by kind; alarms where there was none, in so many seconds of film."""

    joins: dict[str, int]
    found: dict[str, int]
    alarms: int
    seconds: float


TOLERANCE_FRAMES = 2


def detect(pieces: list[Piece]) -> Outcome:
    """Measure the film, find joins, and compare with the truth."""
    meter, frames = FilmMeter(), 0
    for frame in draw(pieces):
        meter.add(frame, frames / FPS)
        frames += 1
    table, truth = meter.table(), joins_of(pieces)
    joins = find_joins(table, meter.headings, stand_out(table))
    at = [join.frame for join in joins]
    found = [kind for t, kind in truth.items() if any(abs(t - j) <= TOLERANCE_FRAMES for j in at)]
    alarms = sum(all(abs(t - j) > TOLERANCE_FRAMES for t in truth) for j in at)
    return Outcome(dict(Counter(truth.values())), dict(Counter(found)), alarms, frames / FPS)


def plain_piece(seed: int, seconds: float) -> list[Piece]:
    """A film without a join."""
    rng = random.Random(seed)
    return [Piece(draw_film(rng.randrange(1 << 30)), rng.uniform(0, 20), round(seconds * FPS), None)]


def main() -> None:
    """Measure the detector and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--joins", type=int, default=120)
    parser.add_argument("--plain-minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    joins, found, alarms = Counter[str](), Counter[str](), 0
    for film in range(-(-options.joins // 10)):
        outcome = detect(joined_pieces(options.seed + film, 10))
        joins.update(outcome.joins)
        found.update(outcome.found)
        alarms += outcome.alarms
    for kind in JOIN_KINDS:
        print(f"{kind:<11} {found[kind]}/{joins[kind]}")
    print(f"all         {found.total()}/{joins.total()} = {found.total() / joins.total():.1%}")
    print(f"alarms between the joins of these films: {alarms}")
    plain = [detect(plain_piece(options.seed + k, 30.0)) for k in range(round(2 * options.plain_minutes))]
    minutes = sum(outcome.seconds for outcome in plain) / 60
    print(f"false alarms without a join: {sum(outcome.alarms for outcome in plain)} in {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
