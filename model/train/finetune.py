"""LoRA fine-tuning of a checkpoint folder on a cache of clips.

The weights are frozen, in bf16 on a GPU and fp32 on a CPU; adapters and their moments are fp32. Prompts are encoded
once, and the text encoder, which for the large model is half as heavy as the transformer, is let go before training
begins. The result is a LoRA file in the official format: a storyboard names it under `loras`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from model.checkpoint import load_dit, load_text
from model.errors import InputError
from model.text import NEGATIVE_PROMPT, TextEncoder
from model.train.adapters import LAYERS, attach, write_lora
from model.train.dit import Generator, Samples, Shape, draw_batch, flow_loss, sampling_of
from model.train.films import Cache
from model.train.loop import Plan, Training, share, train
from model.train.text import Prompter


class PreparedPrompts(nn.Module):
    """Encoded prompts in the place of a text encoder: known prompts -> states [B,1,L,C] and mask [B,L]."""

    def __init__(self, encoder: TextEncoder, prompts: Sequence[str], device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._encoded = {prompt: tuple(t.cpu() for t in encoder.encode([prompt])) for prompt in set(prompts)}

    def forward(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        states, masks = zip(*(self._encoded[prompt] for prompt in prompts), strict=True)
        return torch.cat(states).to(self._device), torch.cat(masks).to(self._device)


def checkpoint_generator(checkpoint: Path, prompts: Sequence[str], device: str) -> Generator:
    """The frozen transformer of a checkpoint folder with these prompts, the empty and the negative one, encoded."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    encoder = load_text(checkpoint, device=device, dtype=dtype)
    prompter = PreparedPrompts(encoder, [*prompts, "", NEGATIVE_PROMPT], torch.device(device))
    del encoder
    # Whoever calls a Generator's prompter calls this one alike.
    return Generator(load_dit(checkpoint, device=device, dtype=dtype), cast(Prompter, prompter))


def captions_of(cache: Cache) -> list[str]:
    """All captions of a cache of videos. Raises InputError for drawn films, whose captions are without number."""
    if any(not isinstance(text, str) for text in cache.texts):
        raise InputError("films: a checkpoint folder is fine-tuned on a cache that `clips` made")
    return [cache.caption(index) for index in range(len(cache))]


def train_lora(
    folder: Path,
    checkpoint: Path,
    cache: Cache,
    plan: Plan,
    shape: Shape,
    *,
    name: str,
    rank: int,
    seed: int,
    device: str = "cpu",
    checkpointing: bool = False,
    samples: Samples | None = None,
    log: Callable[[str], None] = print,
) -> Path:
    """Train lora/`name`.safetensors under `folder`, resuming from `name`.safetensors there. Returns the LoRA file."""
    generator = checkpoint_generator(checkpoint, captions_of(cache), device)
    generator.dit.gradient_checkpointing = checkpointing
    attach(generator.dit, LAYERS, rank, seed)
    training = Training(generator.dit, plan)
    state = folder / f"{name}.safetensors"
    if state.exists():
        training.load(state)
    log(f"{len(cache)} clips, {sum(w.numel() for w in training.weights.values()) / 1e6:.2f} M parameters in the LoRA")

    def loss_of(step: int) -> Tensor:
        own_seed = seed * 8_000_009 + share(step)
        batch = draw_batch(cache, random.Random(own_seed), shape.clips, shape.latent_frames)
        return flow_loss(generator, batch.to(generator.dit.device), torch.Generator(device).manual_seed(own_seed))

    train(training, loss_of, state, **sampling_of(samples, generator, cache, name), log=log)
    file = folder / "lora" / f"{name}.safetensors"
    write_lora(training, generator.dit, file)
    return file
