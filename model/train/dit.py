"""Training of the DiT and the text encoder on cached latents: flow matching over text, image and continuation
tasks.

x_s = (1-s) x0 + s noise; the network learns x0 - noise. A step takes clips of one length from a mix: single
images and short clips teach outlines and colours for a fraction of what whole segments cost. It has one task: 0,
1 or 4 clean condition latents, which get timestep 0 and a little noise, so that a later segment forgives what an
earlier one got wrong. Prompts are dropped now and then, for guidance. Films that change do so right after the four
condition latents and serve continuation alone, with the caption of what comes after.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.checkpoint import load_dit
from model.config import BlockSparseConfig, DiTConfig
from model.dit import DiT
from model.sampling import TextCondition, base_schedule, denoise
from model.text import NEGATIVE_PROMPT
from model.train.ahead import Ahead
from model.train.films import Cache
from model.train.graphs import Replayed
from model.train.loop import Plan, Training, load_average, share, train
from model.train.sheet import write_sheet
from model.train.text import WIDTH, Prompter, new_prompter
from model.vae import VAE

CONDITION_LATENTS = 4
DROPPED_PROMPTS = 0.12
CONDITION_NOISE = 0.12
SKIPPED_PAIRS = 0.5  # films of two shapes are harder; fewer of them leave more for what has to work first
SHIFT = 8.0
SHAPE_WEIGHT = 6.0  # shapes cover a twelfth of a picture and are what a prompt is about


class Generator(nn.Module):
    """What is trained together: the DiT and the text encoder."""

    def __init__(self, dit: DiT, prompter: Prompter) -> None:
        super().__init__()
        self.dit = dit
        self.prompter = prompter


def new_generator(width: int, depth: int, seed: int) -> Generator:
    """An untrained generator of the bundled checkpoint's shape, heads of 64."""
    config = DiTConfig(
        hidden_size=width,
        depth=depth,
        num_heads=width // 64,
        caption_channels=WIDTH,
        adaln_tembed_dim=128,
        frequency_embedding_size=128,
        text_tokens_zero_pad=False,
        bsa_params=BlockSparseConfig(sparsity=0.75),
    )
    prompter = new_prompter(seed)
    torch.manual_seed(seed)
    dit = DiT(config)
    dit.init_weights()
    return Generator(dit, prompter)


@dataclass(frozen=True)
class Batch:
    """Clean latents [B,16,T,H,W], how many lead as conditions, a prompt for each clip, and how much of each
    latent's place shapes cover, [B,1,T,H,W] in [0,1].
    """

    clean: Tensor
    num_cond: int
    prompts: list[str]
    cover: Tensor

    def to(self, device: torch.device) -> Batch:
        return replace(self, clean=self.clean.to(device), cover=self.cover.to(device))


def draw_batch(cache: Cache, rng: random.Random, clips: int, latent_frames: int) -> Batch:
    """A random task with clips that suit it."""
    tasks = {0: 0.5, 1: 0.15, CONDITION_LATENTS: 0.35}
    fitting = [n for n in tasks if n < latent_frames]
    num_cond = rng.choices(fitting, [tasks[n] for n in fitting])[0]
    chosen: list[int] = []
    while len(chosen) < clips:
        index = rng.randrange(len(cache))
        if num_cond != CONDITION_LATENTS and not cache.steady(index):
            continue
        if cache.shapes(index) > 1 and rng.random() < SKIPPED_PAIRS:
            continue
        chosen.append(index)
    return Batch(
        torch.stack([cache.clip(index, latent_frames) for index in chosen]),
        num_cond,
        [_worded(cache, index, rng) for index in chosen],
        torch.stack([cache.cover(index, latent_frames) for index in chosen]),
    )


def _worded(cache: Cache, index: int, rng: random.Random) -> str:
    if rng.random() < DROPPED_PROMPTS:
        return rng.choice(("", NEGATIVE_PROMPT))
    return cache.caption(index, rng)


def compile_blocks(dit: DiT) -> None:
    """Each block by itself: all of them share what is compiled, once for each shape and task of a batch."""
    torch._dynamo.config.recompile_limit = 32  # a mix has more than the usual eight
    for block in dit.blocks:
        block.compile(dynamic=False)


def draw_sigmas(clips: int, generator: torch.Generator, shift: float = SHIFT) -> Tensor:
    """[B] noise levels: even, three in four moved up as the sampler's schedule is.

    A few thousand numbers that all tell of one or two shapes can be read through much noise: where the
    shapes are is decided above level 0.85, and a model that sees little of that range paints the right
    colours in the wrong places.
    """
    device = generator.device
    even = (torch.arange(clips, device=device) + torch.rand(clips, generator=generator, device=device)) / clips
    even = even[torch.randperm(clips, generator=generator, device=device)].clamp(1e-3, 1 - 1e-3)
    moved = torch.rand(clips, generator=generator, device=device) < 0.75
    return torch.where(moved, shift * even / (1 + (shift - 1) * even), even)


def shift_for(latent_frames: int) -> float:
    """How far noise levels move up: by `SHIFT` for a whole segment of 24 latents, less for shorter clips, which
    noise hides sooner.
    """
    return max(2.0, SHIFT * (latent_frames / 24) ** 0.4)


def flow_loss(
    generator: Generator,
    batch: Batch,
    noise_source: torch.Generator,
    *,
    learn_text: bool = True,
    replayed: Replayed | None = None,
) -> Tensor:
    """Mean square error of the predicted x0 - noise over the noise frames, weighted towards the shapes where
    little noise is left: with much of it, the weight would teach shapes where there are none.

    `noise_source` is on the device of the batch. Without `learn_text` the text encoder stays as it is, which saves a
    third of a step of images.
    """
    clean, n = batch.clean, batch.num_cond
    noise = torch.randn(clean.shape, generator=noise_source, device=clean.device)
    levels = draw_sigmas(len(clean), noise_source, shift_for(clean.shape[2]))
    sigma = levels.view(-1, 1, 1, 1, 1)
    mixed = (1 - sigma) * clean + sigma * noise
    blur = CONDITION_NOISE * torch.rand(len(clean), 1, 1, 1, 1, generator=noise_source, device=clean.device)
    latents = torch.cat([clean[:, :, :n] + blur * noise[:, :, :n], mixed[:, :, n:]], 2)
    timesteps = 1000.0 * sigma.view(-1, 1).expand(-1, clean.shape[2]).clone()
    timesteps[:, :n] = 0.0
    with torch.set_grad_enabled(learn_text and torch.is_grad_enabled()):
        text, mask = generator.prompter(batch.prompts)
    weight = 1 + SHAPE_WEIGHT * (1 - sigma) * batch.cover[:, :, n:]
    inputs = latents, timesteps if n else timesteps[:, 0], text, mask, (clean - noise)[:, :, n:], weight
    return weighted_loss(generator.dit, n, *inputs) if replayed is None else replayed(n, *inputs)


def weighted_loss(
    dit: nn.Module, num_cond: int, latents: Tensor, timesteps: Tensor, text: Tensor, mask: Tensor, target: Tensor,
    weight: Tensor,
) -> Tensor:  # fmt: skip
    """Mean of `weight` times the square error of what `dit` predicts after its conditions; products in bf16."""
    assert isinstance(dit, DiT)
    # No weight is used twice, so there is nothing to gain from keeping what it was rounded to; a graph may not.
    with torch.autocast(latents.device.type, torch.bfloat16, cache_enabled=False), quick_attention(dit):
        out = dit(latents, timesteps, text, mask, num_cond_latents=num_cond)
    return (weight * (out[:, :, num_cond:] - target).square()).mean()


def quick_attention(dit: DiT) -> AbstractContextManager[None]:
    """For compiled blocks on a CPU: there the fused attention's backward takes longer than all products of a step.

    Not under gradient checkpointing, which repeats a block in the backward pass, outside of this block.
    """
    compiled = getattr(dit.blocks[0], "_compiled_call_impl", None) is not None
    if dit.device.type != "cpu" or not compiled or dit.gradient_checkpointing:
        return nullcontext()
    attention: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return attention


@dataclass(frozen=True)
class Shape:
    """The clips of a step."""

    clips: int
    latent_frames: int


@dataclass(frozen=True)
class Part:
    """A part of the mix that a run trains on: a cache of films, the clips of a step, how often it is drawn."""

    films: Path
    shape: Shape
    weight: float = 1.0


def train_dit(
    folder: Path,
    state: str,
    mix: list[Part],
    plan: Plan,
    *,
    width: int,
    depth: int,
    seed: int,
    start_from: str | None = None,
    device: str = "cpu",
    checkpointing: bool = False,
    compiled: bool = False,
    learn_text: bool = True,
    samples: Samples | None = None,
    log: Callable[[str], None] = print,
) -> Generator:
    """Train `state`.safetensors in `folder`; a new one takes the weights that `start_from` names: another state of
    the folder, or a checkpoint folder. `checkpointing` keeps the activations between blocks alone, which costs time
    and saves memory; `compiled` lets torch.compile fuse what a block does between its products.
    """
    generator = new_generator(width, depth, seed).to(device)
    generator.dit.gradient_checkpointing = checkpointing
    file = folder / f"{state}.safetensors"
    if start_from is not None and not file.exists():
        start(generator, folder, start_from)
    training = Training(generator, plan)
    if file.exists():
        training.load(file)
    if compiled:
        compile_blocks(generator.dit)
    caches = [Cache(part.films) for part in mix]
    millions = sum(p.numel() for p in generator.dit.parameters()) / 1e6
    log(f"{', '.join(str(len(cache)) for cache in caches)} clips, {millions:.2f} M parameters in the DiT")

    def draw(step: int) -> Batch:
        # All processes take clips of the same length, so that none waits for another.
        index = random.Random(seed * 5_000_011 + step).choices(range(len(mix)), [part.weight for part in mix])[0]
        shape = mix[index].shape
        return draw_batch(caches[index], random.Random(own_seed(step)), shape.clips, shape.latent_frames)

    def own_seed(step: int) -> int:
        return seed * 4_000_037 + share(step)

    batches = Ahead(draw, range(training.step, plan.steps), device)
    as_graphs = device.startswith("cuda") and not compiled and not checkpointing
    replayed = Replayed(generator.dit, weighted_loss) if as_graphs else None

    def loss_of(step: int) -> Tensor:
        batch, noise_source = batches.take(step).to(generator.dit.device), torch.Generator(device)
        noise_source.manual_seed(own_seed(step))
        return flow_loss(generator, batch, noise_source, learn_text=learn_text, replayed=replayed)

    train(training, loss_of, file, **sampling_of(samples, generator, caches[-1], file.stem), log=log)
    return generator


@dataclass(frozen=True)
class Samples:
    """A sheet of sample films every `every` steps, decoded by `vae` and written into `folder`."""

    every: int
    vae: VAE
    folder: Path
    guidance: float = 3.0
    rows: int = 4


def sampling_of(samples: Samples | None, generator: Generator, cache: Cache, name: str) -> dict[str, Any]:
    """What `train` needs to write sheets: films of the prompts of the cache's first clips, as long as these."""
    if samples is None:
        return {}
    prompts = [cache.caption(index) for index in range(min(samples.rows, len(cache)))]
    frames, rows, columns = cache.latents.shape[2:]

    def write(step: int) -> str:
        latents = sample(
            generator, prompts, frames, seed=0, steps=16, guidance=samples.guidance, rows=rows, columns=columns
        )
        videos = [samples.vae.decode(one)[0].float().cpu() for one in latents.split(1)]
        file = samples.folder / f"{name}_{step:06d}.png"
        write_sheet(videos, file, labels=prompts)
        return f"samples: {file}"

    return {"evaluate": write, "evaluate_every": samples.every}


def start(generator: Generator, folder: Path, name: str) -> None:
    """Take the averaged weights of the state `name` in `folder`, or those of the checkpoint folder `name`."""
    if (Path(name) / "dit").is_dir():
        dit = load_dit(Path(name), device="cpu", dtype=torch.float32)
        generator.dit.load_state_dict(dit.state_dict())
        encoder = type(generator.prompter.encoder).from_pretrained(Path(name) / "text_encoder", dtype=torch.float32)
        generator.prompter.encoder.load_state_dict(encoder.state_dict())
    else:
        load_average(generator, folder / f"{name}.safetensors")


@torch.no_grad()
def sample(
    generator: Generator,
    prompts: list[str],
    latent_frames: int,
    *,
    seed: int,
    steps: int = 24,
    guidance: float = 3.0,
    shift: float = SHIFT,
    conditions: Tensor | None = None,
    rows: int = 8,
    columns: int = 12,
) -> Tensor:
    """Latents [B,16,T,H,W] for the prompts, continuing `conditions` [B,16,Tc,H,W] where they are given."""
    noise = torch.randn(len(prompts), 16, latent_frames, rows, columns, generator=torch.Generator().manual_seed(seed))
    cond = 0 if conditions is None else conditions.shape[2]
    if conditions is not None:
        noise[:, :, :cond] = conditions
    states, mask = generator.prompter([NEGATIVE_PROMPT] * len(prompts) + prompts)
    negative, text = states.chunk(2)
    negative_mask, text_mask = mask.chunk(2)
    condition = TextCondition(text, text_mask, negative, negative_mask)
    return denoise(
        generator.dit,
        noise.to(generator.dit.device),
        base_schedule(steps, shift),
        condition,
        guidance=guidance,
        num_cond_latents=cond,
    )
