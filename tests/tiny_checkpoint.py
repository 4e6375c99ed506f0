"""A random checkpoint in the official layout, small enough to render a film in seconds. It draws noise, but
obeys every rule of the real one.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

WIDTH = 64
CAPTION_CHANNELS = 32
WORDS = (
    "red",
    "blue",
    "green",
    "circle",
    "square",
    "star",
    "moves",
    "left",
    "right",
    "over",
    "snow",
    "sunset",
    "a",
    "the",
)

RENDER = {
    "segment_frames": 93,
    "condition_frames": 13,
    "stage_one_sizes": [[32, 32], [32, 64], [64, 32]],
    "refined_sizes": [[64, 64], [64, 128], [128, 64]],
}


def make_checkpoint(folder: Path, *, seed: int = 0, heads: int = 1) -> Path:
    """Write the folder; the same seed gives the same bytes."""
    torch.manual_seed(seed)
    _make_text(folder)
    _make_vae(folder / "vae")
    _make_dit(folder / "dit", heads)
    for name in ("cfg_step_lora", "refinement_lora"):
        _save(_lora_tensors(), folder / "lora" / f"{name}.safetensors")
    (folder / "render.json").write_text(json.dumps(RENDER))
    return folder


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
        path,
        metadata={"format": "pt"},
    )


def _randomise(module: nn.Module, scale: float) -> dict[str, Tensor]:
    """Zero-initialised layers would make a model that ignores its input."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            fan_in = parameter[0].numel()
            nn.init.normal_(parameter, std=scale / fan_in**0.5)
        elif "bias" in name:
            nn.init.normal_(parameter, std=0.02)
    return module.state_dict()


def _make_text(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    vocabulary = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )
    fast.save_pretrained(folder / "tokenizer")
    config = UMT5Config(
        vocab_size=len(vocabulary),
        d_model=CAPTION_CHANNELS,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")


def _make_vae(folder: Path) -> None:
    from model.config import VAEConfig
    from model.vae import VAE

    config = VAEConfig(
        latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16, base_dim=8, dim_mult=(1, 1, 1, 1), num_res_blocks=1
    )
    _save(_randomise(VAE(config), 1.5), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_json()))


def _make_dit(folder: Path, heads: int) -> None:
    from model.config import DiTConfig
    from model.dit import DiT

    config = DiTConfig(
        hidden_size=WIDTH, depth=1, num_heads=heads, caption_channels=CAPTION_CHANNELS, adaln_tembed_dim=32,
        frequency_embedding_size=64,
    )  # fmt: skip
    _save(_randomise(DiT(config), 0.7), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_json()))


def _lora_tensors(rank: int = 2) -> dict[str, Tensor]:
    prefix = "lora___lorahyphen___blocks___lorahyphen___0___lorahyphen___attn___lorahyphen___"
    return {
        f"{prefix}proj.alpha_scale": torch.tensor(0.5),
        f"{prefix}proj.lora_down.weight": torch.randn(rank, WIDTH) / WIDTH**0.5,
        f"{prefix}proj.lora_up.weight": torch.randn(WIDTH, rank) * 0.1,
    }
