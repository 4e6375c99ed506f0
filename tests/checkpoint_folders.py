"""Small random checkpoint folders in the official layout, for loading, converting and pulling."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.config import DiTConfig, VAEConfig
from model.dit import DiT
from model.vae import VAE

DIT_CONFIG = {"hidden_size": 64, "depth": 2, "num_heads": 2, "caption_channels": 32, "adaln_tembed_dim": 32}
VAE_CONFIG = {
    "base_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}
TEXT_CONFIG = {
    "model_type": "umt5",
    "vocab_size": 40,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
}


def random_state(module: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random fp32 values for every tensor of a module."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) * 0.1
        for name, tensor in module.state_dict().items()
    }


def write_weights(folder: Path, state: dict[str, torch.Tensor], config: dict, shards: int = 1) -> None:
    """A weights folder: config.json and `shards` files with the official names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "Anything", **config}))
    if shards == 1:
        save_file(state, folder / "diffusion_pytorch_model.safetensors")
        return
    weight_map = {}
    for i in range(shards):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(state.items())[i::shards])
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def write_dit(folder: Path, shards: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """<folder>/dit with random fp32 weights, which are returned."""
    with torch.device("meta"):
        network = DiT(DiTConfig.from_json(DIT_CONFIG))
    state = random_state(network, seed)
    write_weights(folder / "dit", state, DIT_CONFIG, shards)
    return state


def write_vae(folder: Path) -> dict[str, torch.Tensor]:
    """<folder>/vae with random fp32 weights, which are returned."""
    with torch.device("meta"):
        network = VAE(VAEConfig.from_json(VAE_CONFIG))
    state = random_state(network, 1)
    write_weights(folder / "vae", state, VAE_CONFIG)
    return state


def write_text_encoder(folder: Path) -> None:
    """<folder>/text_encoder and a tokenizer file. The tokenizer is for copying around, not for use."""
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(2)
    encoder = UMT5EncoderModel(UMT5Config(**{k: v for k, v in TEXT_CONFIG.items() if k != "model_type"}))
    encoder.save_pretrained(folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")


LORA_TARGETS = {
    "blocks.0.attn.qkv": 3,
    "blocks.1.cross_attn.kv_linear": 2,
    "blocks.1.ffn.w2": 1,
    "final_layer.linear": 1,
}


def write_lora(file: Path, state: dict[str, torch.Tensor], seed: int, rank: int = 4) -> None:
    """A LoRA file for a few layers of the DiT with these weights: fused layers split, the others plain."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, parts in LORA_TARGETS.items():
        out_size, in_size = state[path + ".weight"].shape
        key = "lora." + path
        key = key.replace(".", "___lorahyphen___")
        tensors[f"{key}.alpha_scale"] = torch.tensor(0.5)
        tensors[f"{key}.lora_down.weight"] = torch.randn(parts * rank, in_size, generator=generator)
        for j in range(parts):
            name = "weight" if parts == 1 else f"blocks.{j}.weight"
            up = torch.randn(out_size // parts, rank, generator=generator)
            tensors[f"{key}.lora_up.{name}"] = up
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)


def write_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """A whole folder with two LoRAs; returns the DiT's weights."""
    state = write_dit(folder)
    write_vae(folder)
    write_text_encoder(folder)
    write_lora(folder / "lora" / "cfg_step_lora.safetensors", state, 3)
    write_lora(folder / "lora" / "refinement_lora.safetensors", state, 4)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"shift": 12}')
    (folder / "render.json").write_text('{"frames": 93}')
    (folder / "LICENSE").write_text("MIT")
    return state
