"""Which way of refining windows side by side leaves no seam? Compared on the same stage-one films.

    python -m tests.studies.refinement --films 5 --windows 10

Prints the tables of docs/refinement.md; can be stopped and started again. No Ray: networks, samplers, noise, geometry
and metrics are the renderer's own, only the ways that windows can be joined live here.

Window i has latents of its own time grid: latent 0 is refined frame i * hop, latent m holds the next four frames.
Windows i and i+1 share the frames of latents hop+1 .. hop+count of the one and 1 .. count of the other. A window that
goes on from refined frames has one latent of padding in front.

Legend: x latents [1,16,L,H,W]; frames uint8 [n,h,w,3].
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from cluster.probe import find_checkpoint
from model.generate import Models, decode_frames, mix_noise
from model.noise import draw_noise
from model.pixels import encode_frames, encode_resampled
from model.sampling import Schedule, denoise
from pipeline.arithmetic import Grid
from pipeline.params import merge_weights, noise_seeds
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

Unit = tuple[Tensor, int, int]
"""Decoded frames of a window, padding cut off, and which of them the film shows."""


class Refinery:
    """One stage-one film and its windows, each refined at most once for all the variants that want it."""

    def __init__(
        self, studio: Studio, models: Models, stage_one: Tensor, name: str, windows: int, folder: Path
    ) -> None:
        self.studio, self.models, self.name, self.windows, self._folder = studio, models, name, windows, folder
        self.grid, self.schedule = studio.grid, studio.refine_schedule
        self.stage_one = stage_one
        self._text = studio.condition("")

    def _kept(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A tensor from this film's folder; made where it is missing."""
        return kept(self._folder / f"{name}.safetensors", lambda: {"x": make()})["x"]

    # ------------------------------------------------------------------------------------------ starting states

    def noise(self, index: int, front: int, *, own: bool = False) -> Tensor:
        """The noise of a window with `front` latents of padding; `own`: shared with no neighbour."""
        first = index * self.grid.window_hop_latents - front
        name = f"{self.name}/{index}" if own else self.name
        seeds = noise_seeds(
            {"seed": 0, "noise_id": name, "stage": "two", "first_latent": first, "count": self.latents, "redo": 0}
        )
        return draw_noise(seeds, self.studio.facts.latent_channels, *self.studio.latent_px(self.studio.refined_px))

    @property
    def latents(self) -> int:
        return self.grid.window_shape(0).latents

    def clean(self, index: int, given: int) -> Tensor:
        """The encoded stage-one frames of a window that begins with `given` refined frames."""
        return self._kept(f"clean {index} after {given}", lambda: self._encode(index, given))

    def _encode(self, index: int, given: int) -> Tensor:
        shape = self.grid.window_shape(given)
        begin = index * self.grid.new_frames
        piece = self.stage_one[begin : begin + self.grid.segment_frames]
        times = [min(j / self.grid.ratio, float(len(piece) - 1)) for j in range(shape.frames)]
        padding = [0.0] * self.padding(given)
        return encode_resampled(self.models.vae, piece, padding + times, *self.studio.refined_px)[None]

    def start(self, index: int, *, own: bool = False) -> Tensor:
        """The state before the first step of a window without conditions."""
        return mix_noise(self.clean(index, 0), self.noise(index, 0, own=own), self.schedule.sigmas[0])

    def start_after(self, index: int, tail: Tensor) -> tuple[Tensor, int]:
        """The state before the first step of a window that goes on from refined frames, and its condition latents."""
        shape = self.grid.window_shape(len(tail))
        x = mix_noise(
            self.clean(index, len(tail)), self.noise(index, shape.front_latents), self.schedule.sigmas[0]
        )
        padding = tail[:1].expand(self.padding(len(tail)), -1, -1, -1)
        given = encode_frames(self.models.vae, torch.cat([padding, tail]))
        x[0, :, : given.shape[1]] = given
        return x, given.shape[1]

    # ------------------------------------------------------------------------------------------ denoising

    def refine(self, x: Tensor, given: int = 0) -> Tensor:
        """All steps at once."""
        return denoise(self.models.dit, x, self.schedule, self._text, guidance=1, num_cond_latents=given)

    def step(self, x: Tensor, number: int, given: int = 0) -> Tensor:
        """Step `number` alone."""
        levels = self.schedule.sigmas[number : number + 2]
        one = Schedule(levels, self.schedule.timesteps[number : number + 1])
        return denoise(self.models.dit, x, one, self._text, guidance=1, num_cond_latents=given)

    def shared(self, index: int) -> Tensor:
        """The window by itself, its noise shared with its neighbours."""
        return self._kept(f"shared {index}", lambda: self.refine(self.start(index)))

    def independent(self, index: int) -> Tensor:
        """The window by itself, with noise of its own."""
        return self._kept(f"independent {index}", lambda: self.refine(self.start(index, own=True)))

    def shared_frames(self, index: int) -> Tensor:
        return self._kept(f"frames {index}", lambda: self.decode(self.shared(index)))

    def merged_frames(self, index: int) -> Tensor:
        return self._kept(f"merged frames {index}", lambda: self.decode(self._merged[index]))

    @functools.cached_property
    def _merged(self) -> list[Tensor]:
        return self.merge_all([self.shared(i) for i in range(self.windows)])

    def apart(self) -> list[float]:
        """For each frame of a merged overlap, how far the pictures that both windows decode of it are apart: mean
        difference in levels of 8 bits."""
        hop, reach = self.grid.window_hop, self.grid.window_reach
        total = torch.zeros(reach - hop)
        for i in range(self.windows - 1):
            left, right = self.merged_frames(i)[hop + 1 : reach + 1], self.merged_frames(i + 1)[1 : reach - hop + 1]
            total += (left.float() - right.float()).abs().mean(dim=(1, 2, 3))
        return [round(value, 3) for value in (total / (self.windows - 1)).tolist()]

    def after(self, index: int, tail: Tensor, way: str, right: Tensor | None = None) -> Tensor:
        """`between`, kept under the name of the way."""
        return self._kept(f"{way} {index}", lambda: self.between(index, tail, right))

    def between(self, index: int, tail: Tensor, right: Tensor | None) -> Tensor:
        """The window that goes on from refined frames, padding included. `right` [1,16,count,H,W]: what the window on
        the right has where they overlap, held at every step."""
        x, given = self.start_after(index, tail)
        if right is None:
            return self.refine(x, given)
        front = self.grid.window_shape(len(tail)).front_latents
        at = front + 1 + self.grid.window_hop_latents
        held = slice(at, at + right.shape[2])
        noise = self.noise(index, front)[:, :, held]
        for number in range(self.schedule.steps):
            x[:, :, held] = mix_noise(right, noise, self.schedule.sigmas[number])
            x = self.step(x, number, given)
        x[:, :, held] = right
        return x

    def lockstep(self) -> list[Tensor]:
        """All windows step by step, one beside the other; what they share is averaged after every step."""
        states = self.merge_all([self.start(i) for i in range(self.windows)])
        for number in range(self.schedule.steps):
            stepped = [
                self._kept(f"lockstep {i} step {number}", functools.partial(self.step, x, number))
                for i, x in enumerate(states)
            ]
            states = self.merge_all(stepped)
        return states

    # ------------------------------------------------------------------------------------------ joining

    def merge_all(self, windows: list[Tensor]) -> list[Tensor]:
        """Windows with every overlap merged: neighbours hold the same there."""
        merged = [window.clone() for window in windows]
        for index in range(len(windows) - 1):
            self.merge(merged, windows, index)
        return merged

    def merge(self, merged: list[Tensor], windows: list[Tensor], index: int) -> None:
        """Merge the overlap of windows `index` and `index` + 1, as the renderer does."""
        count, hop = self.grid.merge_latents, self.grid.window_hop_latents
        v = torch.tensor(merge_weights(count)).view(1, 1, -1, 1, 1)
        left, right = windows[index][:, :, hop + 1 : hop + 1 + count], windows[index + 1][:, :, 1 : 1 + count]
        both = (1 - v) * left + v * right
        merged[index][:, :, hop + 1 : hop + 1 + count] = both
        merged[index + 1][:, :, 1 : 1 + count] = both

    def decode(self, x: Tensor) -> Tensor:
        return torch.cat(list(decode_frames(self.models.vae, x[0])))

    def units(self, handovers: list[int], frames: Callable[[int], Tensor]) -> Iterator[Unit]:
        """What each window shows: from its own handover (a frame of the window) to the next window's."""
        for index in range(self.windows):
            yield frames(index), handovers[index], self.stop(index, (*handovers, 0)[index + 1])

    def stop(self, index: int, handover: int) -> int:
        """The frame of window `index` at which the next one takes over, or the film ends."""
        is_last = index + 1 == self.windows
        return self.grid.window_reach + 1 if is_last else self.grid.window_hop + handover

    def padding(self, given: int) -> int:
        """Decoded frames before a window's own where it goes on from `given` frames."""
        return self.grid.temporal * self.grid.window_shape(given).front_latents

    @property
    def tail(self) -> slice:
        """Frames of a window that the next one goes on from."""
        return slice(self.grid.window_hop, self.grid.window_hop + self.grid.refined_condition)


# ------------------------------------------------------------------------------------------------------ the variants


def chained(refinery: Refinery) -> Iterator[Unit]:
    """The official way: every window goes on from the refined end of the one before."""
    given = refinery.grid.refined_condition
    frames = refinery.shared_frames(0)
    yield frames, 0, refinery.stop(0, given)
    for index in range(1, refinery.windows):
        x = refinery.after(index, frames[refinery.tail], "chained")
        frames = refinery.decode(x)[refinery.padding(given) :]
        yield frames, given, refinery.stop(index, given)


def _middle(grid: Grid) -> int:
    """The frame of a window in the middle of the overlap, where a latent begins."""
    return grid.temporal * (grid.merge_latents // 2) + 1


def _from(refinery: Refinery, frame: int) -> list[int]:
    """Every window but the first is shown from the same frame of its own on."""
    return [0, *[frame] * (refinery.windows - 1)]


def independent(refinery: Refinery) -> Iterator[Unit]:
    """Noise of its own for each window, a hard change in the middle of the overlap."""
    frames = _from(refinery, _middle(refinery.grid))
    return refinery.units(frames, lambda i: refinery.decode(refinery.independent(i)))


def shared(refinery: Refinery) -> Iterator[Unit]:
    """Shared noise, a hard change in the middle of the overlap."""
    return refinery.units(_from(refinery, _middle(refinery.grid)), refinery.shared_frames)


def shared_pixels(refinery: Refinery) -> Iterator[Unit]:
    """Shared noise, the overlap's decoded frames mixed."""
    hop, reach = refinery.grid.window_hop, refinery.grid.window_reach
    count = reach - hop

    def mixed(index: int) -> Tensor:
        frames = refinery.shared_frames(index).clone()
        if index:
            v = torch.tensor(merge_weights(count)).view(-1, 1, 1, 1)
            left = refinery.shared_frames(index - 1)[hop + 1 : reach + 1].float()
            both = (1 - v) * left + v * frames[1 : count + 1].float()
            frames[1 : count + 1] = both.round().to(torch.uint8)
        return frames

    # The later window shows the whole mixed overlap.
    return refinery.units(_from(refinery, 1), mixed)


def shared_latents(refinery: Refinery) -> Iterator[Unit]:
    """Shared noise, the overlap merged in latents."""
    return _merged(refinery, refinery.grid.merged_handover)


def mid_overlap(refinery: Refinery) -> Iterator[Unit]:
    """The same, the later window shown from the middle of the overlap on."""
    return _merged(refinery, _middle(refinery.grid))


def after_overlap(refinery: Refinery) -> Iterator[Unit]:
    """The same, the later window shown only after the overlap."""
    return _merged(refinery, refinery.grid.temporal * refinery.grid.merge_latents + 1)


def _merged(refinery: Refinery, frame: int) -> Iterator[Unit]:
    return refinery.units(_from(refinery, frame), refinery.merged_frames)


def lockstep(refinery: Refinery) -> Iterator[Unit]:
    """All windows side by side, the predicted velocity averaged over each overlap after every step."""
    states = refinery.lockstep()
    frames = _from(refinery, refinery.grid.merged_handover)
    return refinery.units(frames, lambda i: refinery.decode(states[i]))


def _anchors(refinery: Refinery, way: str, *, fixed: bool) -> Iterator[Unit]:
    """Even windows first, by themselves; odd ones go on from the refined window on their left."""
    grid, windows, given = refinery.grid, refinery.windows, refinery.grid.refined_condition
    front = grid.window_shape(given).front_latents
    latents, fronts = [], []
    for i in range(windows):
        if i % 2 == 0:
            x, cut = refinery.shared(i), 0
        else:
            right = refinery.shared(i + 1)[:, :, 1 : 1 + grid.merge_latents] if fixed and i + 1 < windows else None
            x, cut = refinery.after(i, refinery.shared_frames(i - 1)[refinery.tail], way, right), front
        latents.append(x[:, :, cut:])
        fronts.append(x[:, :, :cut])
    merged = [x.clone() for x in latents]
    for i in range(1, windows - 1, 2):
        refinery.merge(merged, latents, i)
    handovers = [0 if i == 0 else given if i % 2 else grid.merged_handover for i in range(windows)]

    def frames(i: int) -> Tensor:
        return refinery.decode(torch.cat([fronts[i], merged[i]], dim=2))[refinery.padding(given if i % 2 else 0) :]

    return refinery.units(handovers, frames)


def anchored(refinery: Refinery) -> Iterator[Unit]:
    """Even windows first; odd ones go on from the one on their left and are merged with the one on their right."""
    return _anchors(refinery, "anchored", fixed=False)


def anchored_both(refinery: Refinery) -> Iterator[Unit]:
    """Even windows first; odd ones go on from the one on their left, the latents they share on the right held."""
    return _anchors(refinery, "anchored both", fixed=True)


VARIANTS: dict[str, tuple[Callable[[Refinery], Iterator[Unit]], str]] = {
    "chained": (chained, "n windows"),
    "shared, latents": (shared_latents, "1 window"),
    "mid-overlap": (mid_overlap, "1 window"),
    "after overlap": (after_overlap, "1 window"),
    "lockstep": (lockstep, "1 window, 4 exchanges"),
    "anchored": (anchored, "2 windows"),
    "anchored, both": (anchored_both, "2 windows"),
    "shared": (shared, "1 window"),
    "shared, pixels": (shared_pixels, "1 window"),
    "independent": (independent, "1 window"),
}
"""Each with the longest path through its dependency graph for a film of n windows."""


# --------------------------------------------------------------------------------------------------------- the study


def stage_one_film(studio: Studio, models: Models, prompt: str, name: str, segments: int) -> Tensor:
    """A chain of segments as a render makes it: frames uint8 [n,h,w,3]."""
    condition, grid = studio.condition(prompt), studio.grid
    kept_latents = (grid.condition_frames - 1) // grid.temporal
    film: list[Tensor] = []
    latents: Tensor | None = None
    for index in range(segments):
        first = film[-1][-grid.condition_frames :][:1] if film else None
        before = None if latents is None else latents[:, -kept_latents:]
        latents = chain_segment(studio, models, condition, name, index, first, before)
        frames = torch.cat(list(decode_frames(models.vae, latents)))
        film.append(frames if index == 0 else frames[grid.condition_frames :])
    return torch.cat(film)


def measured(refinery: Refinery, variant: str) -> Result:
    """Render the film in this way and measure it. Seams are scored where the windows change.

    The chain's own joins lie near by, one frame after the handover of `chained`; so the largest score around each
    change of window is kept as well, over the same frames whatever the variant.
    """
    started_s, grid = time.process_time(), refinery.grid
    seams = list(seams_of(refinery, variant))
    hops = [index * grid.window_hop for index in range(1, refinery.windows)]
    places = (1, _middle(grid), grid.merged_handover, grid.refined_condition + 1)
    around = [slice(hop, hop + grid.refined_condition + 4) for hop in hops]
    parts = (frames[start:stop] for frames, start, stop in VARIANTS[variant][0](refinery))
    joins = [hop + place for hop in hops for place in places]
    result = measure(parts, refinery.studio.facts.refined_fps, seams, joins, around, grid.temporal)
    if variant == "shared, latents":
        result["apart"] = refinery.apart()
    return {"cpu_s": round(time.process_time() - started_s, 1), **result}


def seams_of(refinery: Refinery, variant: str) -> Iterator[int]:
    """First film frame of each window but the first; of a mixed overlap its middle."""
    grid = refinery.grid
    places = {name: _middle(grid) for name in ("independent", "shared", "shared, pixels", "mid-overlap")}
    places["after overlap"] = grid.temporal * grid.merge_latents + 1
    for index in range(1, refinery.windows):
        is_after = variant == "chained" or (variant.startswith("anchored") and index % 2)
        place = grid.refined_condition if is_after else places.get(variant, grid.merged_handover)
        yield index * grid.window_hop + place


def run(studio: Studio, folder: Path, count: int, windows: int, variants: list[str]) -> dict[str, list[Result]]:
    """All results, film by film; those in `folder` are not made again."""
    results: dict[str, list[Result]] = {variant: [] for variant in variants}
    for number, wanted in enumerate(films(count)):
        place = folder / f"{windows} windows" / f"film {number}"

        @functools.cache
        def refinery(
            prompt: str = wanted.prompt, name: str = f"refinement/{number}", tensors: Path = place / "tensors"
        ) -> Refinery:
            models = studio.load_chain()
            film = kept(
                tensors / "stage one.safetensors",
                lambda: {"frames": stage_one_film(studio, models, prompt, name, windows)},
            )
            return Refinery(studio, studio.load_refine(), film["frames"], name, windows, tensors)

        for variant in variants:
            file = place / f"{variant}.json"
            found = cached(file, lambda v=variant, r=refinery: measured(r(), v))  # type: ignore[misc]
            results[variant].append(found)
            print(f"film {number + 1}/{count} {variant}: {_line(found)}", file=sys.stderr, flush=True)
    return results


def _line(result: Result) -> str:
    scores = [seam["score"] for seam in result["seams"]]
    return f"seam z {mean_of(scores).value:.2f}, sharpness {result['sharpness']:.2f}, {result['cpu_s']} s"


def table(results: dict[str, list[Result]]) -> str:
    """The table of the docs. Intervals count seams; those of `films` count films."""
    rows = []
    base = results.get("chained")
    for variant, found in results.items():
        seams = [seam for result in found for seam in result["seams"]]
        inside = [seam["score"] - seam["inside"] for seam in seams]
        by_film = [mean_of([s["score"] - s["inside"] for s in result["seams"]]).value for result in found]
        against, around, detail = "", "", ""
        if base is not None and variant != "chained":
            others = [seam for result in base for seam in result["seams"]]
            against = str(mean_of([a["score"] - b["score"] for a, b in zip(seams, others, strict=True)]))
            around = str(mean_of([a["around"] - b["around"] for a, b in zip(seams, others, strict=True)]))
            detail = f"{mean_of([a['sharpness'] / b['sharpness'] for a, b in zip(found, base, strict=True)])}"
        seen = sum(seam["verdict"] != "unseen" for seam in seams)
        rows.append(
            [
                variant,
                VARIANTS[variant][1],
                f"{mean_of([seam['score'] for seam in seams])}",
                f"{seen} of {len(seams)}",
                against,
                around,
                str(mean_of(inside)),
                str(mean_of(by_film)),
                detail,
                str(drift_of(found, "colour_distance")),
                str(drift_of(found, "sharpness")),
            ]
        )
    header = ["variant", "depth", "seam z", "faint or visible", "z - chained", "around - chained", "z - inside"]
    header += ["the same, by film", "sharpness / chained", "colour drift", "sharpness drift"]
    return markdown(header, rows)


def z_table(results: dict[str, list[Result]]) -> str:
    """Mean z at the seams by measure, less that inside."""
    rows = []
    for variant, found in results.items():
        seams = [seam for result in found for seam in result["seams"]]
        names = list(seams[0]["z"])
        rows.append([variant, *(f"{mean_of([s['z'][n] - s['inside_z'][n] for s in seams])}" for n in names)])
    return markdown(["z - inside", *names], rows)


def apart_table(results: dict[str, list[Result]]) -> str:
    """How far two windows' pictures of the same merged frame are apart, for some frames of the overlap."""
    apart = [result["apart"] for result in results.get("shared, latents", [])]
    if not apart:
        return ""
    places = [*range(1, len(apart[0]), 4), len(apart[0])]
    levels = [f"{mean_of([levels[place - 1] for levels in apart]).value:.3f}" for place in places]
    return markdown(["frame of the overlap", *map(str, places)], [["levels of 8 bits apart", *levels]])


def main(arguments: list[str] | None = None) -> int:
    """Run or go on with the study, and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="pocket")
    parser.add_argument("--films", type=int, default=5)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="of the networks")
    parser.add_argument("--out", type=Path, default=Path("runs/refinement"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    checkpoint = find_checkpoint(options.checkpoint)
    folder = results_folder(options.out, checkpoint, options.dtype)
    results = run(open_studio(checkpoint, options.dtype), folder, options.films, options.windows, options.variants)
    print(f"{options.films} films of {options.windows} windows, weights {folder.name}\n")
    print(f"{table(results)}\n\n{z_table(results)}\n\n{apart_table(results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
