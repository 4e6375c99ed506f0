"""What the studies share: a checkpoint ready to render, films to render, what is measured on them, results on disk.

A result is one JSON file for each film and variant below `<out>/<digest of the checkpoint>-<dtype>/`, written when it
is whole; beside it lie the tensors that are dear to make, so that a study that is started again goes on where it was.
Noise comes from names: a film is the same whichever variants are asked for.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.denoising import make_schedule
from model.checkpoint import load_text
from model.digest import digest
from model.evaluate import Wanted, wanted_films
from model.generate import Models, SegmentRequest, generate_segment, load_models
from model.sampling import Schedule, TextCondition
from model.text import TextEncoder
from pipeline.arithmetic import Grid, grid_of
from pipeline.drift import measure_drift
from pipeline.facts import Attention, LoraChoice, RenderFacts, load_render_facts
from pipeline.measure import FilmMeter
from pipeline.params import noise_seeds
from pipeline.seams import Seam, score_seams, stand_out

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
APART_S = 0.75
"""Frames at least this far from every join are the inside of a window: no measure of theirs reaches a join."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Studio:
    """A checkpoint folder; networks are loaded by `load_role`."""

    folder: Path
    facts: RenderFacts
    text: TextEncoder
    dtype: torch.dtype

    @property
    def grid(self) -> Grid:
        return grid_of(self.facts)

    @property
    def stage_one_px(self) -> tuple[int, int]:
        return self.facts.stage_one_sizes[0]

    @property
    def refined_px(self) -> tuple[int, int]:
        return self.facts.refined_sizes[0]

    @property
    def chain_schedule(self) -> Schedule:
        draft = self.facts.quality.draft
        return make_schedule(
            {"name": draft.schedule, "steps": draft.steps, "shift": self.facts.shift, "t_thresh": 1.0}
        )

    @property
    def refine_schedule(self) -> Schedule:
        refine = self.facts.refine
        return make_schedule(
            {"name": "refinement", "steps": refine.steps, "shift": self.facts.shift, "t_thresh": refine.t_thresh}
        )

    def condition(self, prompt: str) -> TextCondition:
        """The encoded prompt of a batch of one."""
        states, mask = self.text.encode([prompt])
        return TextCondition(states, mask)

    def latent_px(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of latents."""
        return size[0] // self.facts.vae_spatial, size[1] // self.facts.vae_spatial

    def load_chain(self) -> Models:
        """The few-step weights of stage one."""
        return self._load(self.facts.quality.draft.loras, self.facts.chain_attention)

    def load_refine(self) -> Models:
        """The weights of refinement."""
        return self._load(self.facts.refine.loras, self.facts.refine.attention)

    def _load(self, loras: Sequence[LoraChoice], attention: Attention) -> Models:
        files = [(self.folder / lora.file, lora.strength) for lora in loras]
        return load_models(self.folder, role_loras=files, attention=attention, device="cpu", dtype=self.dtype)


def open_studio(folder: Path, dtype: str) -> Studio:
    """The checkpoint in `folder`, its networks in `dtype`."""
    text = load_text(folder, device="cpu", dtype=torch.float32)
    return Studio(folder, load_render_facts(folder), text, DTYPES[dtype])


def chain_segment(
    studio: Studio,
    models: Models,
    condition: TextCondition,
    name: str,
    index: int,
    frames: Tensor | None = None,
    latents: Tensor | None = None,
) -> Tensor:
    """Latents [16,T,H,W] of segment `index` of the chain `name`, as a render makes it: begun with `frames`, encoded,
    and after them `latents` as they are.
    """
    grid = studio.grid
    noise = {"seed": 0, "noise_id": name, "stage": "one", "first_latent": index * grid.new_latents, "redo": 0}
    request = SegmentRequest(
        text=condition.text[0],
        text_mask=condition.mask[0],
        height_px=studio.stage_one_px[0],
        width_px=studio.stage_one_px[1],
        segment_frames=grid.segment_frames,
        noise_seeds=noise_seeds({**noise, "count": grid.segment_latents}),
        schedule=studio.chain_schedule,
        guidance=1.0,
        cond_frames=frames,
        cond_latents=latents,
    )
    return generate_segment(models, request)


def films(count: int) -> list[Wanted]:
    """The films of a study: unseen prompts of the drawn world."""
    return wanted_films(count, seed=11)


# ---------------------------------------------------------------------------------------------------------- results


def results_folder(out: Path, checkpoint: Path, dtype: str) -> Path:
    """Where the results of these weights lie."""
    return out / f"{digest(checkpoint).removeprefix('sha256:')[:12]}-{dtype}"


def cached(file: Path, compute: Callable[[], Result]) -> Result:
    """The result in `file`; computed and written, whole or not at all, where there is none."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(compute()), encoding="utf-8")
        os.replace(part, file)
    loaded: Result = json.loads(file.read_text(encoding="utf-8"))
    return loaded


def kept(file: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in `file` (.safetensors); computed and written, whole or not at all, where there is none."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        save_file({name: tensor.contiguous() for name, tensor in compute().items()}, part)
        os.replace(part, file)
    return load_file(file)


# ------------------------------------------------------------------------------------------------------- measurement


def measure(
    frames: Iterable[Tensor],
    fps: int,
    seams: Sequence[int],
    joins: Sequence[int],
    around: Sequence[slice],
    frames_per_latent: int,
) -> Result:
    """Drift, detail and seams of a film that comes as frames uint8 [n,h,w,3].

    `seams`: first frames after the seams that are scored, within one window and the next. `joins`: those and all
    other places where something meets; frames APART_S away from all of them are the inside. Of each seam: its z by
    measure, the largest as `score`, the largest score within its `around`, and `inside`, the mean score of the inside
    frames nearer to it than to others which, as it does, begin a latent: where the decoder goes on to another latent
    the picture changes a little more in any film. `inside_any` is the mean over all inside frames.
    """
    meter, count = FilmMeter(), 0
    for chunk in frames:
        for frame in chunk.numpy():
            meter.add(frame, count / fps)
            count += 1
    table = meter.table()
    found = stand_out(table)
    inside = _inside(count, joins, round(APART_S * fps))
    places = np.arange(count)
    nearest = np.abs(places[:, None] - np.array(seams)[None]).argmin(axis=1)
    scored = score_seams(table, [Seam(frame, "window") for frame in seams], found)
    rows = []
    for number, seam in enumerate(scored):
        near = inside & (nearest == number)
        alike = near & ((places - seam.frame) % frames_per_latent == 0)
        rows.append(
            {
                "frame": seam.frame,
                "score": seam.score,
                "around": float(found.score[around[number]].max()),
                "verdict": seam.verdict,
                "z": dict(seam.z),
                "inside": float(found.score[alike].mean()),
                "inside_any": float(found.score[near].mean()),
                "inside_z": {name: float(z[alike].mean()) for name, z in found.z.items()},
            }
        )
    drift = {name: {"change": d.change, "slope": d.slope_per_minute} for name, d in measure_drift(table).items()}
    ends = {name: [d.first, d.last] for name, d in measure_drift(table).items()}
    return {
        "frames": count,
        "seams": rows,
        "drift": drift,
        "ends": ends,
        "sharpness": float(table["sharpness"].mean()),
    }


def _inside(count: int, joins: Sequence[int], apart: int) -> np.ndarray:
    """Frames [count] at least `apart` from every join and from the film's ends."""
    inside = np.ones(count, bool)
    for join in (0, count, *joins):
        inside[max(0, join - apart) : join + apart] = False
    return inside


# ------------------------------------------------------------------------------------------------------------ figures


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        interval = f" [{self.low:.2f}, {self.high:.2f}]" if math.isfinite(self.low) else ""
        return f"{self.value:.2f}{interval}"


# Student's t for 95 %, two-sided, by degrees of freedom (W. S. Gosset 1908); between two entries the smaller counts.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
_T |= {12: 2.179, 15: 2.131, 20: 2.086, 25: 2.060, 30: 2.042, 40: 2.021, 60: 2.000, 120: 1.980}


def mean_of(values: Sequence[float]) -> Mean:
    """Of independent values, by Student's t; of a single one the interval is infinite."""
    n = len(values)
    value = float(np.mean(values)) if n else math.nan
    if n < 2:
        return Mean(value, -math.inf, math.inf)
    t = _T[max(df for df in _T if df <= n - 1)]
    half = t * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Mean(value, value - half, value + half)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table for the docs."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def drift_of(results: Sequence[Mapping[str, Any]], name: str) -> Mean:
    """The mean change of a measure from the beginning of a film to its end."""
    return mean_of([result["drift"][name]["change"] for result in results])
