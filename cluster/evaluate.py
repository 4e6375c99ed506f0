"""`longtake evaluate`: what a checkpoint draws, measured on the drawn world. Needs no cluster: one process renders.

What is measured and how stands in model/evaluate.py; here the checkpoint's own numbers are read, and the result is
printed and written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from actors.denoising import make_schedule
from cluster.preflight import check_writable
from cluster.probe import find_checkpoint
from model.checkpoint import load_text
from model.errors import ModelError
from model.evaluate import Renderer, Sampling, evaluate, table
from model.generate import load_models
from pipeline.errors import CheckpointFault
from pipeline.facts import RenderFacts, load_render_facts

RESULT = "evaluation.json"


def print_evaluation(
    checkpoint: str,
    *,
    clips: int,
    chains: int,
    minutes: float,
    seed: int,
    out: Path | None,
    device: str,
    as_json: bool,
) -> int:
    """Measure with the draft quality's weights; the table or JSON on stdout, progress on stderr, sheets in `out`."""
    folder = find_checkpoint(checkpoint)
    out = out or Path(f"{folder.name}.evaluation")
    check_writable(out / RESULT, "--out")
    try:
        renderer = load_renderer(folder, load_render_facts(folder), device)
        result = evaluate(
            renderer,
            clips=clips,
            chains=chains,
            minutes=minutes,
            seed=seed,
            folder=out,
            log=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except ModelError as error:
        raise CheckpointFault(str(error), field="checkpoint", value=checkpoint) from error
    text = json.dumps({"checkpoint": str(folder), **result}, indent=1)
    (out / RESULT).write_text(text + "\n", encoding="utf-8")
    print(text if as_json else f"{table(result)}\nsheets and {RESULT}: {out}")
    return 0


def load_renderer(folder: Path, facts: RenderFacts, device: str) -> Renderer:
    """The checkpoint with its few-step LoRAs merged in, sampled as a draft at its first size."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    draft = facts.quality.draft
    height_px, width_px = facts.stage_one_sizes[0]
    sampling = Sampling(
        schedule=make_schedule({"name": draft.schedule, "steps": draft.steps, "shift": facts.shift, "t_thresh": 1.0}),
        guidance=draft.guidance,
        height_px=height_px,
        width_px=width_px,
        segment_frames=facts.segment_frames,
        condition_frames=facts.condition_frames,
        fps=facts.stage_one_fps,
        negative_prompt=facts.negative_prompt,
    )
    loras = [(folder / lora.file, lora.strength) for lora in draft.loras]
    models = load_models(folder, role_loras=loras, attention=facts.chain_attention, device=device, dtype=dtype)
    return Renderer(models, load_text(folder, device=device, dtype=dtype), sampling)
