"""Writes trained states as a checkpoint folder in the official layout.

Weights are stored in half precision; they are loaded in whatever type is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.train.dit import SHIFT, Generator
from model.vae import VAE

SHARD_BYTES = 10_000_000


def _half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().to(torch.float16).contiguous() for name, t in tensors.items()}


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_vae(vae: VAE, folder: Path) -> None:
    """vae/: config.json and one weights file."""
    config = {"_class_name": "AutoencoderKLWan", **vae.config.to_json()}
    _write_json(folder / "vae" / "config.json", config)
    save_file(_half(vae.state_dict()), folder / "vae" / "diffusion_pytorch_model.safetensors")


def write_dit(generator: Generator, folder: Path) -> None:
    """dit/: config.json, numbered shards and their index; tokenizer/ and text_encoder/ beside it."""
    part = folder / "dit"
    _write_json(
        part / "config.json", {"_class_name": "LongCatVideoTransformer3DModel", **generator.dit.config.to_json()}
    )
    for old in part.glob("*.safetensors"):
        old.unlink()
    shards = _shards(_half(generator.dit.state_dict()))
    where = {}
    for number, shard in enumerate(shards, 1):
        name = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, part / name)
        where.update(dict.fromkeys(shard, name))
    total = sum(t.nbytes for shard in shards for t in shard.values())
    _write_json(
        part / "diffusion_pytorch_model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": where},
    )
    generator.prompter.save(folder)


def _shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def write_scheduler(folder: Path) -> None:
    """scheduler/scheduler_config.json with the shift that training used."""
    config = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": SHIFT,
        "use_dynamic_shifting": False,
    }
    _write_json(folder / "scheduler" / "scheduler_config.json", config)
