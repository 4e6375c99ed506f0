"""What should a segment hand to the next one so that five minutes do not drift? Chains of the few-step weights.

    python -m tests.studies.handoff --films 5 --minutes 5

Prints the table of docs/handoff.md; can be stopped and started again. No Ray: segments, autoencoder, noise and metrics
are the renderer's own, only the ways of handing on live here (`latents` makes the renderer's film, a test shows).

Legend: video [1,3,n,h,w] in [-1,1]; frames uint8 [n,h,w,3]; latents [1,16,T,H,W].
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from cluster.probe import find_checkpoint
from model.evaluate import LAST_S, MEASURES, PIECE_S, Wanted
from model.generate import Models
from model.judge import look
from model.pixels import encode_frames, video_to_frames
from pipeline.measure import REFERENCE_S
from tests.studies.films import (
    DTYPES,
    Result,
    Studio,
    cached,
    chain_segment,
    drift_of,
    films,
    kept,
    markdown,
    mean_of,
    measure,
    open_studio,
    results_folder,
)


@dataclass(frozen=True)
class Ended:
    """The end of a segment: last latents, last decoded frames, and the colours of the shot's first seconds."""

    latents: Tensor
    video: Tensor
    colours: Colours


@dataclass(frozen=True)
class Colours:
    """Mean and spread [3] of L*, a*, b*."""

    mean: Tensor
    spread: Tensor


def colours_of(video: Tensor) -> Colours:
    lab = _to_lab(video)
    return Colours(lab.mean((0, 1, 2)), lab.std((0, 1, 2)))


def _to_lab(video: Tensor) -> Tensor:
    """CIELAB [n,h,w,3] of a video."""
    rgb = ((video[0].permute(1, 2, 3, 0) + 1) / 2).contiguous().numpy()
    return torch.from_numpy(np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2LAB) for frame in rgb]))


def pull_colours(video: Tensor, towards: Colours, strength: float) -> Tensor:
    """The video with the mean and spread of L*, a*, b* over all its pixels moved towards others; strength 0..1.

    OpenCV's way to Lab and back is not exact; only the difference that the move makes is added.
    """
    lab, own = _to_lab(video), colours_of(video)
    scale = 1 + strength * (towards.spread / own.spread.clamp(min=1e-3) - 1)
    shift = own.mean + strength * (towards.mean - own.mean)
    moved = _from_lab((lab - own.mean) * scale + shift) - _from_lab(lab)
    return (video + moved).clamp(-1, 1)


def _from_lab(lab: Tensor) -> Tensor:
    """The video of CIELAB [n,h,w,3]."""
    rgb = np.stack([cv2.cvtColor(frame, cv2.COLOR_LAB2RGB) for frame in lab.float().numpy()])
    return torch.from_numpy(rgb * 2 - 1).permute(3, 0, 1, 2)[None]


# ------------------------------------------------------------------------------------------------------ the variants

HandOff = Callable[[Models, Ended, int], Tensor]
"""The condition latents of the next segment, from the last `count` frames of the one that ended."""


def truncated(models: Models, ended: Ended, count: int) -> Tensor:
    """Levels of 8 bits cut off, as the official code does."""
    return encode_frames(models.vae, truncate(ended.video[:, :, -count:]))[None]


def truncate(video: Tensor) -> Tensor:
    """The frames uint8 of a video, each level cut off instead of rounded."""
    levels = ((video[0] + 1) / 2 * 255).to(torch.uint8)
    return levels.permute(1, 2, 3, 0).contiguous()


def pixels(models: Models, ended: Ended, count: int) -> Tensor:
    """Levels of 8 bits, rounded."""
    return encode_frames(models.vae, video_to_frames(ended.video[:, :, -count:]))[None]


def floats(models: Models, ended: Ended, count: int) -> Tensor:
    """The decoder's numbers as they are."""
    with torch.no_grad():
        return models.vae.encode(ended.video[:, :, -count:].to(models.dtype)).float()


def latents(models: Models, ended: Ended, count: int) -> Tensor:
    """The last latents as they are; only the first one, which holds a single frame, is made from pixels."""
    single = encode_frames(models.vae, video_to_frames(ended.video[:, :, -count:][:, :, :1]))
    kept = (count - 1) // models.vae.temporal_factor
    return torch.cat([single[None], ended.latents[:, :, -kept:]], dim=2)


def anchored(models: Models, ended: Ended, count: int, strength: float) -> Tensor:
    """As `pixels`, the colours pulled towards those of the shot's first seconds before they are rounded."""
    pulled = pull_colours(ended.video[:, :, -count:], ended.colours, strength)
    return encode_frames(models.vae, video_to_frames(pulled))[None]


VARIANTS: dict[str, HandOff] = {
    "truncated": truncated,
    "pixels": pixels,
    "float": floats,
    "latents": latents,
    "anchor 0.25": functools.partial(anchored, strength=0.25),
    "anchor 1": functools.partial(anchored, strength=1.0),
}


# --------------------------------------------------------------------------------------------------------- the study


def chain(
    studio: Studio, models: Models, prompt: str, name: str, frames: int, hand_on: HandOff, folder: Path
) -> Iterator[Tensor]:
    """The frames uint8 of a chain, segment by segment, `frames` in all; the same noise whatever is handed on.

    Segments are kept in `folder`: their new frames, and the latents and decoded frames that a hand-off reads.
    """
    condition, count = studio.condition(prompt), studio.grid.condition_frames
    reference_frames = round(REFERENCE_S * studio.facts.stage_one_fps)
    ended: Ended | None = None
    index = 0
    while frames > 0:

        def make(before: Ended | None = ended, index: int = index) -> dict[str, Tensor]:
            given = None if before is None else hand_on(models, before, count)
            begins_with = None if given is None else given[0]
            x = chain_segment(studio, models, condition, name, index, latents=begins_with)[None]
            video = decode(models, x)
            reference = before.colours if before else colours_of(video[:, :, :reference_frames])
            return {
                "new": video_to_frames(video)[count if index else 0 :],
                "latents": x[:, :, -count:].clone(),
                "video": video[:, :, -count:].clone(),
                "colours": torch.stack([reference.mean, reference.spread]),
            }

        done = kept(folder / f"segment {index}.safetensors", make)
        ended = Ended(done["latents"], done["video"], Colours(*done["colours"]))
        new = done["new"][:frames]
        yield new
        frames, index = frames - len(new), index + 1


def decode(models: Models, x: Tensor) -> Tensor:
    """The video of latents, before it is rounded to 8 bits."""
    with torch.no_grad():
        return models.vae.decode(x.to(models.dtype)).float()


def measured(
    studio: Studio, models: Models, wanted: Wanted, name: str, frames: int, variant: str, folder: Path
) -> Result:
    """Render a chain and measure it; `right` are the shares of six-second pieces of the last 30 s that show what the
    prompt says."""
    started_s, grid, fps = time.process_time(), studio.grid, studio.facts.stage_one_fps
    last: list[Tensor] = []

    def watched() -> Iterator[Tensor]:
        for new in chain(studio, models, wanted.prompt, name, frames, VARIANTS[variant], folder):
            last.append(new)
            while sum(len(part) for part in last[1:]) >= LAST_S * fps:
                last.pop(0)
            yield new

    seams = list(range(grid.segment_frames, frames, grid.new_frames))
    around = [slice(seam - 1, seam + 2) for seam in seams]
    result = measure(watched(), fps, seams, seams, around, grid.temporal)
    end = torch.cat(last)[-round(LAST_S * fps) :]
    return {"cpu_s": round(time.process_time() - started_s, 1), "right": _right(wanted, end, fps), **result}


def _right(wanted: Wanted, frames: Tensor, fps: int) -> dict[str, float]:
    seen = look(frames.numpy(), fps)
    pieces = max(1, round(len(frames) / (PIECE_S * fps)))
    bounds = np.linspace(0, len(frames), pieces + 1).round().astype(int).tolist()
    verdicts = [wanted.right(seen.verdict(a, b)) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    return {name: float(np.mean([verdict[name] for verdict in verdicts])) for name in MEASURES}


def run(studio: Studio, folder: Path, count: int, minutes: float, variants: list[str]) -> dict[str, list[Result]]:
    """All results, film by film; those in `folder` are not made again."""
    results: dict[str, list[Result]] = {variant: [] for variant in variants}
    frames = round(60 * minutes * studio.facts.stage_one_fps)

    @functools.cache
    def models() -> Models:
        return studio.load_chain()

    for number, wanted in enumerate(films(count)):
        for variant in variants:
            # The segments of a shorter chain are the first ones of a longer one.
            place = folder / f"film {number}" / variant

            def make(w: Wanted = wanted, n: str = f"handoff/{number}", v: str = variant, at: Path = place) -> Result:
                return measured(studio, models(), w, n, frames, v, at)

            results[variant].append(cached(place.parent / f"{variant}, {minutes:g} minutes.json", make))
            print(f"film {number + 1}/{count} {variant}: {_line(results[variant][-1])}", file=sys.stderr, flush=True)
    return results


def _line(result: Result) -> str:
    drift = ", ".join(f"{name} {result['drift'][name]['change']:.2f}" for name in ("lightness_mean", "colour_distance"))
    return f"{drift}, {result['cpu_s']} s"


def table(results: dict[str, list[Result]]) -> str:
    """The table of the docs. Intervals count films; those of a difference of seams count seams."""
    rows = []
    base = results.get("pixels")
    for variant, found in results.items():
        seams = [seam for result in found for seam in result["seams"]]
        ends = [result["ends"]["lightness_mean"] for result in found]
        names = ("colour_distance", "saturation", "sharpness", "contrast")
        against = ["", ""]
        if base is not None and variant != "pixels":
            others = [seam for result in base for seam in result["seams"]]
            pairs = [(a["drift"], b["drift"]) for a, b in zip(found, base, strict=True)]
            against[0] = str(mean_of([a[names[0]]["change"] - b[names[0]]["change"] for a, b in pairs]))
            against[1] = str(mean_of([a["score"] - b["score"] for a, b in zip(seams, others, strict=True)]))
        right = [f"{100 * mean_of([result['right'][name] for result in found]).value:.0f}" for name in MEASURES]
        rows.append(
            [
                variant,
                str(mean_of([last - first for first, last in ends])),
                *[str(drift_of(found, name)) for name in names],
                against[0],
                f"{sum(seam['verdict'] != 'unseen' for seam in seams)} of {len(seams)}",
                str(mean_of([seam["score"] - seam["inside"] for seam in seams])),
                against[1],
                " / ".join(right),
            ]
        )
    header = ["handed on", "L* end - begin", "colour drift", "saturation drift", "sharpness drift", "contrast drift"]
    header += ["colour drift - pixels", "faint or visible seams", "seam z - inside", "seam z - pixels"]
    return markdown([*header, "right at the end, %: colour / shape / direction"], rows)


def main(arguments: list[str] | None = None) -> int:
    """Run or go on with the study, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="pocket")
    parser.add_argument("--films", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="of the networks")
    parser.add_argument("--out", type=Path, default=Path("runs/handoff"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    checkpoint = find_checkpoint(options.checkpoint)
    folder = results_folder(options.out, checkpoint, options.dtype)
    results = run(open_studio(checkpoint, options.dtype), folder, options.films, options.minutes, options.variants)
    print(f"{options.films} films of {options.minutes:g} minutes, weights {folder.name}\n\n{table(results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
