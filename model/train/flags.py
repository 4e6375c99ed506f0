"""The command line of `python -m model.train`: each stage knows its own flags and no others."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def height_and_width(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH in pixels."""
    height, width = text.lower().split("x")
    return int(height), int(width)


def part_of_mix(text: str) -> tuple[int, int, float]:
    """FRAMES:CLIPS:WEIGHT of one part of the mix."""
    frames, clips, weight = text.split(":")
    return int(frames), int(clips), float(weight)


FLAGS: Mapping[str, dict[str, Any]] = {
    "seed": {"type": int, "default": 1, "help": "of weights, order and noise"},
    "device": {"choices": ("auto", "cpu", "cuda"), "default": "auto", "help": "where the networks are"},
    "steps": {"type": int, "default": 1000, "help": "steps of training"},
    "rate": {"type": float, "default": 1e-3, "help": "learning rate after the warm-up"},
    "final-rate": {"type": float, "default": 1e-4, "help": "learning rate of the last step"},
    "minutes": {"type": float, "default": math.inf, "help": "save and stop after this long; the same command goes on"},
    "clips": {"type": int, "default": 16, "help": "clips in a batch"},
    "frames": {"type": int, "default": 33, "help": "frames of a clip"},
    "state": {"default": "dit", "help": "name of the transformer's state in RUN"},
    "start-from": {"default": None, "help": "state or checkpoint folder that a new state starts from"},
    "mix": {
        "type": part_of_mix,
        "nargs": "+",
        "default": [(33, 16, 1.0)],
        "metavar": "FRAMES:CLIPS:WEIGHT",
        "help": "batches of so many clips from RUN/films_<FRAMES>, drawn as often as WEIGHT says (33:16:1)",
    },
    "width": {"type": int, "default": 256, "help": "of the transformer"},
    "depth": {"type": int, "default": 6, "help": "blocks of the transformer"},
    "base-dim": {"type": int, "default": 16, "help": "channels of the autoencoder at full resolution"},
    "image-steps": {"type": int, "default": 2000, "help": "steps on single images, before clips"},
    "guidance": {"type": float, "default": 3.0, "help": "strength of classifier-free guidance"},
    "jump": {"type": float, "default": 0.0, "help": "length of a distilled step, 0 for guidance alone"},
    "rank": {"type": int, "default": 32, "help": "of the LoRA"},
    "tokens": {"type": int, "default": 6000, "help": "tokens in a batch"},
    "latent-frames": {"type": int, "default": 16, "help": "latents of a pair"},
    "to": {"type": Path, "default": None, "help": "folder to pack into, RUN/checkpoint by default"},
    "checkpointing": {"action": "store_true", "help": "compute activations again instead of keeping them"},
    "compile": {"action": "store_true", "help": "fuse with torch.compile (wants a C++ compiler)"},
    "keep-text": {"action": "store_true", "help": "leave the text encoder as it is"},
    "sheet-every": {"type": int, "default": 0, "metavar": "N", "help": "a sample sheet every N steps, 0 for none"},
    "checkpoint": {"type": Path, "default": None, "help": "checkpoint folder, RUN/checkpoint by default"},
    "videos": {"type": Path, "required": True, "help": "folder of videos"},
    "captions": {"type": Path, "default": None, "help": "Parquet table: file, caption (else a .txt beside each video)"},
    "size": {
        "type": height_and_width,
        "default": (64, 96),
        "metavar": "HEIGHTxWIDTH",
        "help": "of the clips, in pixels (64x96)",
    },
    "fps": {"type": float, "default": 15.0, "help": "frame rate of the clips"},
    "name": {"default": "style", "help": "name of the LoRA"},
    "held-out": {"action": "store_true", "help": "prompts that training never saw"},
}

TRAINS = ("steps", "rate", "final-rate", "minutes")
READS_STATE = ("state", "width", "depth")


@dataclass(frozen=True)
class Flags:
    """Of one stage: what it does in a line, its flags beside --folder, --seed and --device, and where one differs from
    FLAGS."""

    about: str
    names: tuple[str, ...]
    others: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def _defaults(**values: float) -> dict[str, dict[str, Any]]:
    return {name.replace("_", "-"): {"default": value} for name, value in values.items()}


def _in_all(clips: int) -> dict[str, dict[str, Any]]:
    return {"clips": {"default": clips, "help": "clips in all"}}


_GIVEN: dict[str, dict[str, Any]] = {"checkpoint": {"required": True, "help": "checkpoint folder"}}
_DRAWS: dict[str, dict[str, Any]] = {
    "steps": {"default": 24, "help": "steps of the sampler"},
    "frames": {"default": 93},
}

STAGES: Mapping[str, Flags] = {
    "vae": Flags(
        "the autoencoder",
        (*TRAINS, "image-steps", "clips", "base-dim", "start-from"),
        _defaults(steps=1100, rate=1.2e-3, final_rate=4e-5, clips=2),
    ),
    "films": Flags("drawn clips, encoded", ("clips", "frames", "checkpoint"), _in_all(2048)),
    "clips": Flags(
        "clips of your videos, encoded",
        ("checkpoint", "videos", "captions", "frames", "size", "fps"),
        {**_GIVEN, **_defaults(frames=93)},
    ),
    "dit": Flags(
        "the transformer and the text encoder",
        (
            *(*TRAINS, "mix", *READS_STATE, "start-from", "checkpointing", "compile", "keep-text"),
            *("sheet-every", "guidance", "checkpoint"),
        ),
        _defaults(steps=1600, rate=1.5e-3),
    ),
    "lora": Flags(
        "a LoRA of your clips",
        (*TRAINS, "checkpoint", "name", "rank", "clips", "frames", "checkpointing", "sheet-every", "guidance"),
        {**_GIVEN, **_defaults(steps=500, rate=1e-4, final_rate=1e-5, clips=1, frames=93)},
    ),
    "distill": Flags(
        "the LoRA of few steps",
        (
            *(*TRAINS, "checkpoint", *READS_STATE, "clips", "frames", "guidance", "jump", "rank"),
            *("checkpointing", "compile"),
        ),
        {
            "checkpoint": {"help": "checkpoint folder to distil, on RUN/clips_<frames>; else the state is"},
            **_defaults(steps=300, clips=6, frames=93),
        },
    ),
    "pairs": Flags("coarse and fine latents for refinement", ("clips", "latent-frames", "checkpoint"), _in_all(192)),
    "refine": Flags(
        "the refinement LoRA",
        (*TRAINS, *READS_STATE, "latent-frames", "tokens", "rank"),
        {**_defaults(steps=400), "latent-frames": {"nargs": "+", "default": [16], "help": "latents of the pairs"}},
    ),
    "decoder": Flags(
        "the autoencoder's decoder alone",
        (*TRAINS, "checkpoint", "compile"),
        _defaults(steps=600, rate=6e-4, final_rate=4e-5),
    ),
    "pack": Flags("a checkpoint folder of what there is", (*READS_STATE, "to")),
    "sheet": Flags(
        "samples to look at",
        ("checkpoint", *READS_STATE, "frames", "steps", "guidance", "held-out"),
        _DRAWS,
    ),
    "evaluate": Flags(
        "what a state draws, measured",
        ("checkpoint", *READS_STATE, "clips", "frames", "steps", "guidance"),
        {**_DRAWS, **_in_all(64)},
    ),
}


def parser(description: str | None) -> argparse.ArgumentParser:
    """Of all stages. A flag that a stage has no use for is an error there."""
    top = argparse.ArgumentParser(
        prog="python -m model.train", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = top.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, flags in STAGES.items():
        stage = stages.add_parser(name, help=flags.about, description=flags.about)
        stage.add_argument("--folder", type=Path, required=True, metavar="RUN", help="where all that is made lies")
        for flag in ("seed", "device", *flags.names):
            about = {**FLAGS[flag], **flags.others.get(flag, {})}
            if isinstance(about.get("default"), int | float | str) and about["default"] != math.inf:
                about["help"] += " (%(default)s)"
            stage.add_argument(f"--{flag}", **about)
    return top
