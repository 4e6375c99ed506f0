"""Measures a checkpoint on the drawn world: does it draw what an unseen prompt says, keep a given object, hold a long
chain, and what does its autoencoder lose?

The 64 prompts are the combinations of shape, colour and direction that no training film shows
(`world.is_held_out`), each over the four backdrops. What a film shows is judged by `model.judge`, which knows nothing
of how films are drawn.
Everything is seeded by names: the same call gives the same films under the same numerics, and film i does not depend
on how many are asked for.

A chain hands its last latents on, and in 8 bits the one frame before them, as a render does. It is judged in pieces of
six seconds; intervals for chains count chains, not pieces, because the pieces of one chain stand or fall together.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import world
from model.generate import Models, SegmentRequest, generate_segment
from model.judge import Sightings, Verdict, look
from model.noise import named_seeds
from model.pixels import decode_frames, encode_frames, video_to_frames
from model.sampling import Schedule
from model.text import TextEncoder
from model.train.sheet import write_sheet
from model.train.vae import psnr_db

MEASURES = ("colour", "shape", "direction")
PIECE_S = 6.0
LAST_S = 30.0
SHEET_ROWS = 16

BARS: dict[str, dict[str, float]] = {
    "text": {"colour": 0.95, "shape": 0.85, "direction": 0.90},
    "image": {"kept": 0.95},
    "chain": {"colour": 0.90, "shape": 0.80, "direction": 0.85},
    "vae": {"all_db": 32.0, "inside_db": 26.0},
}
"""What the bundled checkpoint is to reach: shares, and decibels."""

Log = Callable[[str], None]


@dataclass(frozen=True)
class Sampling:
    """How segments are sampled: what `render.json` says of stage one."""

    schedule: Schedule
    guidance: float
    height_px: int = 64
    width_px: int = 96
    segment_frames: int = 93
    condition_frames: int = 13
    fps: int = 15
    negative_prompt: str = ""


@dataclass(frozen=True)
class Renderer:
    """A checkpoint ready to render segments."""

    models: Models
    text: TextEncoder
    sampling: Sampling

    def segment(self, prompt: str, name: str, conditions: Tensor | None = None) -> Tensor:
        """Frames uint8 [F,h,w,3] of one segment that begins with `conditions`; noise is drawn from `name`."""
        return self._decoded(self._latents(prompt, name, conditions))

    def _latents(self, prompt: str, name: str, frames: Tensor | None = None, latents: Tensor | None = None) -> Tensor:
        """Latents [16,T,H,W] of one segment that begins with `frames` and after them `latents`."""
        states, mask = self.text.encode([prompt, self.sampling.negative_prompt])
        factor = self.models.vae.temporal_factor
        request = SegmentRequest(
            text=states[0],
            text_mask=mask[0],
            negative_text=states[1],
            negative_mask=mask[1],
            height_px=self.sampling.height_px,
            width_px=self.sampling.width_px,
            segment_frames=self.sampling.segment_frames,
            noise_seeds=named_seeds(name, 1 + (self.sampling.segment_frames - 1) // factor),
            schedule=self.sampling.schedule,
            guidance=self.sampling.guidance,
            cond_frames=frames,
            cond_latents=latents,
        )
        return generate_segment(self.models, request)

    def _decoded(self, latents: Tensor) -> Tensor:
        return torch.cat(list(decode_frames(self.models.vae, latents)))

    def chain(self, prompt: str, name: str, frames: int) -> Tensor:
        """`frames` frames of a chain of segments, each beginning with the last latents of the one before."""
        latents = self._latents(prompt, f"{name}/0")
        film, number, shared = self._decoded(latents), 1, self.sampling.condition_frames
        kept = (shared - 1) // self.models.vae.temporal_factor
        while len(film) < frames:
            first = film[-shared : len(film) - shared + 1]
            latents = self._latents(prompt, f"{name}/{number}", first, latents[:, -kept:])
            film, number = torch.cat([film, self._decoded(latents)[shared:]]), number + 1
        return film[:frames]


@dataclass(frozen=True)
class Share:
    """`right` of `total`, with the 95 % interval. `right` may be a sum of shares."""

    right: float
    total: int

    @property
    def share(self) -> float:
        return self.right / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """E. B. Wilson's score interval (1927)."""
        if not self.total:
            return 0.0, 1.0
        z, n, p = 1.959964, self.total, self.share
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)

    def to_json(self) -> dict[str, float]:
        low, high = self.interval
        return {"right": self.right, "total": self.total, "share": self.share, "low": low, "high": high}


@dataclass(frozen=True)
class Decibels:
    """Values of several clips: their mean, with the 95 % interval of the mean."""

    values: tuple[float, ...]

    def to_json(self) -> dict[str, float]:
        mean = float(np.mean(self.values))
        spread = float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.inf
        half = 1.959964 * spread / math.sqrt(len(self.values))
        return {"total": len(self.values), "value": mean, "low": mean - half, "high": mean + half}


@dataclass(frozen=True)
class Wanted:
    """A prompt of the drawn world and the film it describes."""

    film: world.Film

    @property
    def mover(self) -> world.Mover:
        return self.film.scene.movers[0]

    @property
    def prompt(self) -> str:
        return world.caption(self.film.scene)

    def right(self, verdict: Verdict) -> dict[str, bool]:
        """Which of the measures a verdict meets."""
        mover = self.mover
        return {
            "colour": verdict.colour == mover.colour,
            "shape": verdict.shape == mover.kind,
            "direction": verdict.direction == mover.direction,
        }


def wanted_films(count: int, seed: int) -> list[Wanted]:
    """`count` of the unseen combinations in a seeded order; after 64 they come again with other films."""
    movers = [
        world.Mover(kind, colour, direction, "slowly", 0.2, 0.0, 0.0)
        for kind in world.KINDS
        for colour in world.COLOURS
        for direction in world.DIRECTIONS
    ]
    combinations = [(m, backdrop) for m in movers if world.is_held_out(m) for backdrop in world.BACKDROPS]
    random.Random(seed).shuffle(combinations)
    return [_wanted(*combinations[i % len(combinations)], random.Random(f"{seed}/{i}")) for i in range(count)]


def _wanted(mover: world.Mover, backdrop: str, rng: random.Random) -> Wanted:
    """Speed, size and place are drawn; a film that has the combination says how."""
    drawn = world.draw_mover(rng, held_out=True)
    x, y = (0.75, drawn.y) if mover.direction in ("up", "down") else (drawn.x, 0.5)
    mover = dataclasses.replace(mover, speed=drawn.speed, radius=drawn.radius, x=x, y=y)
    return Wanted(world.Film(world.Scene(backdrop, (mover,)), rng.randrange(1 << 30)))


def drawn_frames(film: world.Film, sampling: Sampling, frames: int) -> tuple[Tensor, Tensor]:
    """The film as the world draws it: uint8 [F,h,w,3] and masks [F,h,w]."""
    times_s = world.frame_times(frames, sampling.fps)
    video, mask = world.render(film, times_s, sampling.height_px, sampling.width_px)
    return video_to_frames(video.transpose(0, 1)[None]), mask


# ------------------------------------------------------------------------------------------------ the measurements


def measure_text(renderer: Renderer, count: int, seed: int, folder: Path | None, log: Log = print) -> dict[str, Any]:
    """Text to video: colour, shape and direction of `count` prompts."""
    films, right = [], []
    for index, wanted in enumerate(wanted_films(count, seed)):
        frames = renderer.segment(wanted.prompt, f"{seed}/text/{index}")
        verdict = look(frames.numpy(), renderer.sampling.fps).verdict()
        right.append(wanted.right(verdict))
        films.append(_shown(wanted, verdict, frames))
        log(f"text {index + 1}/{count} {films[-1].label}")
    _write_sheets(films, folder, "text")
    shares = _shares(right)
    shares["all three"] = Share(sum(all(r.values()) for r in right), len(right))
    return {
        **{name: share.to_json() for name, share in shares.items()},
        "shape of": _by(films, right, "shape", lambda w: w.mover.kind),
        "colour of": _by(films, right, "colour", lambda w: w.mover.colour),
        "direction of": _by(films, right, "direction", lambda w: w.mover.direction),
        "films": [film.to_json() for film in films],
    }


def measure_image(renderer: Renderer, count: int, seed: int, folder: Path | None, log: Log = print) -> dict[str, Any]:
    """Image to video from the first frame of a drawn film. `kept`: colour and shape are right in the second half."""
    films, right = [], []
    for index, wanted in enumerate(wanted_films(count, seed)):
        image, _ = drawn_frames(wanted.film, renderer.sampling, 1)
        frames = renderer.segment(wanted.prompt, f"{seed}/image/{index}", image)
        verdict = look(frames.numpy(), renderer.sampling.fps).verdict(len(frames) // 2)
        right.append(wanted.right(verdict))
        films.append(_shown(wanted, verdict, frames))
        log(f"image {index + 1}/{count} {films[-1].label}")
    _write_sheets(films, folder, "image")
    kept = Share(sum(r["colour"] and r["shape"] for r in right), len(right))
    shares = {"kept": kept, **_shares(right)}
    return {
        **{name: share.to_json() for name, share in shares.items()},
        "films": [film.to_json() for film in films],
    }


def measure_chains(
    renderer: Renderer, count: int, minutes: float, seed: int, folder: Path | None, log: Log = print
) -> dict[str, Any]:
    """Chains of `minutes` minutes: the three measures in their last 30 s and in each minute."""
    fps, films, last = renderer.sampling.fps, [], []
    by_minute: list[list[dict[str, float]]] = [[] for _ in range(math.ceil(minutes))]
    for index, wanted in enumerate(wanted_films(count, seed)):
        frames = renderer.chain(wanted.prompt, f"{seed}/chain/{index}", round(60 * minutes * fps))
        seen = look(frames.numpy(), fps)
        last.append(_pieces_right(wanted, seen, len(frames) - round(LAST_S * fps), len(frames)))
        for minute, found in enumerate(by_minute):
            found.append(_pieces_right(wanted, seen, round(60 * minute * fps), round(60 * (minute + 1) * fps)))
        films.append(_shown(wanted, seen.verdict(len(frames) - round(LAST_S * fps)), frames))
        log(f"chain {index + 1}/{count} {films[-1].label}")
    _write_sheets(films, folder, "chain")
    return {
        "minutes": minutes,
        **{name: share.to_json() for name, share in _shares(last).items()},
        "by minute": [{name: share.to_json() for name, share in _shares(found).items()} for found in by_minute],
        "films": [film.to_json() for film in films],
    }


def _pieces_right(wanted: Wanted, seen: Sightings, start: int, stop: int) -> dict[str, float]:
    """For each measure the share of pieces of six seconds within frames [start, stop) that are right."""
    start, stop = max(0, start), min(stop, len(seen.colours))
    pieces = max(1, round((stop - start) / (PIECE_S * seen.fps)))
    bounds = np.linspace(start, stop, pieces + 1).round().astype(int)
    right = [wanted.right(seen.verdict(a, b)) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    return {name: float(np.mean([r[name] for r in right])) for name in MEASURES}


def measure_vae(renderer: Renderer, count: int, seed: int, folder: Path | None, log: Log = print) -> dict[str, Any]:
    """Peak signal-to-noise ratio of drawn films in 8 bits after encoding and decoding: all pixels, inside shapes."""
    vae, films, everywhere, inside = renderer.models.vae, [], [], []
    for index, wanted in enumerate(wanted_films(count, seed)):
        frames, mask = drawn_frames(wanted.film, renderer.sampling, renderer.sampling.segment_frames)
        decoded = torch.cat(list(decode_frames(vae, encode_frames(vae, frames))))
        a, b = _centred(frames), _centred(decoded)
        everywhere.append(psnr_db(b, a))
        inside.append(psnr_db(b, a, mask[None, None]))
        verdict = look(decoded.numpy(), renderer.sampling.fps).verdict()
        films.append(_shown(wanted, verdict, decoded))
        log(f"vae {index + 1}/{count} {everywhere[-1]:.2f} dB, inside {inside[-1]:.2f} dB, {films[-1].label}")
    _write_sheets(films, folder, "vae")
    return {
        "all_db": Decibels(tuple(everywhere)).to_json(),
        "inside_db": Decibels(tuple(inside)).to_json(),
        "films": [film.to_json() for film in films],
    }


def _centred(frames: Tensor) -> Tensor:
    """uint8 [F,h,w,3] -> fp32 [1,3,F,h,w] in [-1,1]."""
    return (frames.float() / 127.5 - 1).permute(3, 0, 1, 2)[None]


def evaluate(
    renderer: Renderer,
    *,
    clips: int = 64,
    chains: int = 4,
    minutes: float = 5.0,
    seed: int = 0,
    folder: Path | None = None,
    log: Log = print,
) -> dict[str, Any]:
    """All measurements; 0 chains leaves the chain out. Sample sheets go into `folder`. Values are JSON."""
    started_s = time.monotonic()
    result: dict[str, Any] = {"seed": seed, "text": measure_text(renderer, clips, seed, folder, log)}
    result["image"] = measure_image(renderer, clips, seed, folder, log)
    if chains:
        result["chain"] = measure_chains(renderer, chains, minutes, seed, folder, log)
    result["vae"] = measure_vae(renderer, clips, seed, folder, log)
    result["seconds"] = round(time.monotonic() - started_s, 1)
    return result


# ------------------------------------------------------------------------------------------------------ what is shown


@dataclass(frozen=True)
class _Film:
    """One judged film: a few of its frames [n,h,w,3] for the sheet."""

    wanted: Wanted
    verdict: Verdict
    few: Tensor

    @property
    def label(self) -> str:
        """The prompt and what was seen instead."""
        wrong = [name for name, right in self.wanted.right(self.verdict).items() if not right]
        seen = ", ".join(f"{name} {getattr(self.verdict, name) or 'unclear'}" for name in wrong)
        return f"{self.wanted.prompt}: {seen or 'right'}"

    def to_json(self) -> dict[str, Any]:
        right = self.wanted.right(self.verdict)
        return {"prompt": self.wanted.prompt, **dataclasses.asdict(self.verdict), "right": right}


def _shown(wanted: Wanted, verdict: Verdict, frames: Tensor, few: int = 8) -> _Film:
    chosen = torch.linspace(0, len(frames) - 1, min(few, len(frames))).round().long()
    return _Film(wanted, verdict, frames[chosen])


def _write_sheets(films: Sequence[_Film], folder: Path | None, name: str) -> None:
    for first in range(0, len(films) if folder else 0, SHEET_ROWS):
        rows = films[first : first + SHEET_ROWS]
        assert folder is not None
        file = folder / f"{name}_{first // SHEET_ROWS + 1}.png"
        write_sheet([_centred(film.few)[0] for film in rows], file, labels=[film.label for film in rows])


def _shares(right: Sequence[dict[str, Any]]) -> dict[str, Share]:
    return {name: Share(sum(r[name] for r in right), len(right)) for name in MEASURES}


def _by(
    films: Sequence[_Film], right: Sequence[dict[str, bool]], name: str, group: Callable[[Wanted], str]
) -> dict[str, dict[str, float]]:
    """The share of one measure within each group of films."""
    groups: dict[str, list[bool]] = {}
    for film, found in zip(films, right, strict=True):
        groups.setdefault(group(film.wanted), []).append(found[name])
    return {key: Share(sum(found), len(found)).to_json() for key, found in sorted(groups.items())}


def table(result: dict[str, Any]) -> str:
    """The result as lines of text, with the bars."""
    lines = [f"{'':24}{'measured':>10}   {'95 % interval':18}{'wanted':>8}"]
    for part, title in (("text", "text to video"), ("image", "image to video"), ("chain", "last 30 s of a chain")):
        if part in result:
            lines.append(f"{title}, {next(iter(_rows(result[part])))[1]['total']} films")
            lines += [_share_line(name, value, BARS[part].get(name)) for name, value in _rows(result[part])]
    for minute, shares in enumerate(result.get("chain", {}).get("by minute", []), 1):
        values = ", ".join(f"{name} {100 * shares[name]['share']:.0f} %" for name in MEASURES)
        lines.append(f"  minute {minute}: {values}")
    if "vae" in result:
        lines.append(f"autoencoder, {result['vae']['all_db']['total']} films")
        lines += [_decibel_line(name, result["vae"][name], BARS["vae"][name]) for name in BARS["vae"]]
    return "\n".join(lines)


def _decibel_line(name: str, value: dict[str, float], bar: float) -> str:
    title = {"all_db": "all pixels", "inside_db": "inside shapes"}[name]
    interval = f"{value['low']:.2f} to {value['high']:.2f}"
    met = "met" if value["value"] >= bar else "short"
    return f"  {title:22}{value['value']:>7.2f} dB   {interval:18}{bar:>5g} dB  {met}"


def _rows(part: dict[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    names = ("kept", *MEASURES, "all three")
    return ((name, part[name]) for name in names if name in part)


def _share_line(name: str, value: dict[str, float], bar: float | None) -> str:
    interval = f"{100 * value['low']:.1f} to {100 * value['high']:.1f}"
    line = f"  {name:22}{100 * value['share']:>8.1f} %   {interval:18}"
    if bar is None:
        return line.rstrip()
    return line + f"{100 * bar:>6g} %  {'met' if value['share'] >= bar else 'short'}"
