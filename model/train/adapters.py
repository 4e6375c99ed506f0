"""The two LoRAs of the bundled checkpoint, trained on its frozen DiT.

`cfg_step`: the student without guidance learns what the teacher predicts with it, so a step is one forward
instead of two, then to take one long step where the teacher takes two. `refinement`: from half noised,
upsampled coarse latents to the latents of the same film drawn at twice the size and frame rate, with block-
sparse attention and an empty prompt.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from model import world
from model.dit import DiT
from model.lora import attach_trainable_lora, save_lora
from model.sampling import cfg_zero
from model.train.ahead import Ahead
from model.train.dit import (
    CONDITION_NOISE,
    SHIFT,
    Batch,
    Generator,
    Shape,
    compile_blocks,
    draw_batch,
    draw_sigmas,
    quick_attention,
)
from model.train.films import FPS, Cache, clip_film, missing_shards, write_shard
from model.train.loop import Plan, Training, averaged, load_average, processes, share, train
from model.vae import VAE

LAYERS = (
    "attn.qkv",
    "attn.proj",
    "cross_attn.q_linear",
    "cross_attn.kv_linear",
    "cross_attn.proj",
    "ffn.w1",
    "ffn.w2",
    "ffn.w3",
)
MODULATION = ("adaLN_modulation.1", "final_layer.linear")
START = 0.5  # share of noise that refinement starts from


def attach(dit: DiT, layers: tuple[str, ...], rank: int, seed: int) -> None:
    """Freeze the DiT and give it adapters; alpha is half the rank, as in the official files."""
    torch.manual_seed(seed)
    attach_trainable_lora(dit, layers, rank, rank / 2)


def _levels(batch: Batch, source: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noised latents with slightly noised conditions in front, timesteps [B,T] and the levels [B]."""
    clean, n = batch.clean, batch.num_cond
    noise = torch.randn(clean.shape, generator=source, device=clean.device)
    levels = draw_sigmas(len(clean), source)
    sigma = levels.view(-1, 1, 1, 1, 1)
    blur = CONDITION_NOISE * torch.rand(len(clean), 1, 1, 1, 1, generator=source, device=clean.device)
    mixed = (1 - sigma) * clean + sigma * noise
    latents = torch.cat([clean[:, :, :n] + blur * noise[:, :, :n], mixed[:, :, n:]], 2)
    return latents, _timesteps(levels, clean.shape[2], n), levels


def _timesteps(sigma: Tensor, frames: int, num_cond: int) -> Tensor:
    timesteps = 1000.0 * sigma.view(-1, 1).expand(-1, frames).clone()
    timesteps[:, :num_cond] = 0.0
    return timesteps


@torch.no_grad()
def _guided(
    teacher: Generator, latents: Tensor, timesteps: Tensor, prompts: list[str], num_cond: int, guidance: float
) -> Tensor:
    """The teacher's prediction with guidance away from the empty prompt; zero for the condition frames."""
    text, mask = teacher.prompter([""] * len(prompts) + prompts)
    twice = torch.cat([latents, latents])
    with torch.autocast(latents.device.type, torch.bfloat16), quick_attention(teacher.dit):
        out = teacher.dit(twice, torch.cat([timesteps] * 2), text, mask, num_cond_latents=num_cond)
    unconditional, conditional = out[:, :, num_cond:].chunk(2)
    return F.pad(cfg_zero(conditional, unconditional, guidance), (0, 0, 0, 0, num_cond, 0))


def distill_loss(
    student: Generator, teacher: Generator, batch: Batch, guidance: float, source: torch.Generator, jump: float
) -> Tensor:
    """Error of the student's prediction against the mean of two guided teacher predictions over a step of
    `jump` in unshifted noise level (0: against the prediction where the student stands).
    """
    n = batch.num_cond
    latents, timesteps, levels = _levels(batch, source)
    target = _guided(teacher, latents, timesteps, batch.prompts, n, guidance)
    if jump:
        middle, last = _lowered(levels, jump / 2), _lowered(levels, jump)
        first_leg, second_leg = (levels - middle).view(-1, 1, 1, 1, 1), (middle - last).view(-1, 1, 1, 1, 1)
        on_the_way = latents + first_leg * target
        then = _guided(teacher, on_the_way, _timesteps(middle, latents.shape[2], n), batch.prompts, n, guidance)
        target = (first_leg * target + second_leg * then) / (first_leg + second_leg).clamp_min(1e-6)
    with torch.no_grad():
        text, mask = student.prompter(batch.prompts)
    with torch.autocast(latents.device.type, torch.bfloat16), quick_attention(student.dit):
        out = student.dit(latents, timesteps, text, mask, num_cond_latents=n)
    return (out - target)[:, :, n:].square().mean()


def _lowered(sigma: Tensor, jump: float) -> Tensor:
    """Noise levels `jump` lower on the unshifted scale."""
    even = sigma / (SHIFT - (SHIFT - 1) * sigma)
    even = (even - jump).clamp_min(0.0)
    return SHIFT * even / (1 + (SHIFT - 1) * even)


def train_distilled(
    folder: Path,
    student: Generator,
    teacher: Generator,
    cache: Cache,
    plan: Plan,
    shape: Shape,
    *,
    guidance: float,
    jump: float,
    rank: int,
    seed: int,
    compiled: bool = False,
    log: Callable[[str], None] = print,
) -> None:
    """Train and write lora/cfg_step_lora.safetensors under `folder`: with `jump` 0 guidance (state cfg_step), with
    another fewer steps (state few_step), which goes on from the adapters that learnt guidance, where there are any.
    """
    attach(student.dit, LAYERS, rank, seed)
    student.prompter.requires_grad_(False)
    guided = folder / "cfg_step.safetensors"
    state = folder / "few_step.safetensors" if jump else guided
    if jump and guided.exists() and not state.exists():
        load_average(student.dit, guided)
    training = Training(student.dit, plan)
    if state.exists():
        training.load(state)
    if compiled:
        compile_blocks(student.dit)
        compile_blocks(teacher.dit)

    def own_seed(step: int) -> int:
        return seed * 6_000_011 + share(step)

    def draw(step: int) -> Batch:
        return draw_batch(cache, random.Random(own_seed(step)), shape.clips, shape.latent_frames)

    device = student.dit.device
    batches = Ahead(draw, range(training.step, plan.steps), device.type)

    def loss_of(step: int) -> Tensor:
        source = torch.Generator(device).manual_seed(own_seed(step))
        return distill_loss(student, teacher, batches.take(step).to(device), guidance, source, jump)

    train(training, loss_of, state, log=log)
    write_lora(training, student.dit, folder / "lora" / "cfg_step_lora.safetensors")


def write_lora(training: Training, dit: nn.Module, file: Path) -> None:
    """The averaged adapters as a LoRA file in half precision. The first process writes."""
    if processes()[0]:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with averaged(training):
        save_lora(dit, file, torch.float16)


def on_half_grid(coarse: Tensor, frames: int, size: tuple[int, int]) -> Tensor:
    """Coarse video [3,m,h,w] at refined frames g = 0,1,..: its time g/2, resized with aligned corners.
    [3,frames,h',w'].
    """
    wide = F.interpolate(coarse.transpose(0, 1), size, mode="bilinear", align_corners=True)
    times = (torch.arange(frames, device=coarse.device) / 2).clamp_max(coarse.shape[1] - 1)
    before = times.floor().long()
    after = (before + 1).clamp_max(coarse.shape[1] - 1)
    return torch.lerp(wide[before], wide[after], (times - before).view(-1, 1, 1, 1)).transpose(0, 1)


@torch.no_grad()
def build_pairs(vae: VAE, folder: Path, seed: int, clips: int, latent_frames: int, shard: int = 16) -> None:
    """Pairs of upsampled coarse and drawn fine latents. Coarse frames went through the autoencoder with noise
    on their latents, as what stage one hands over is never perfect.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = next(vae.parameters()).device
    frames = 4 * latent_frames - 3
    coarse_frames = (frames // 2 + 4) // 4 * 4 + 1

    def draw(index: int) -> tuple[Tensor, Tensor]:
        film, start_s = clip_film(seed, index)
        coarse, _ = world.render(film, world.frame_times(coarse_frames, FPS, start_s), 64, 96)
        fine, _ = world.render(film, world.frame_times(frames, 2 * FPS, start_s), 128, 192)
        return coarse.transpose(0, 1).unsqueeze(0), fine.transpose(0, 1).unsqueeze(0)

    missing = missing_shards(folder, clips, shard)
    films = Ahead(draw, list(itertools.chain(*missing.values())), device.type)
    for file, indices in missing.items():
        rough, fine = [], []
        for index in indices:
            coarse, wanted = (video.to(device) for video in films.take(index))
            source = torch.Generator().manual_seed(seed * 1009 + index)
            latents = vae.encode(coarse)
            amount = 0.4 * float(torch.rand(1, generator=source)) ** 2
            decoded = vae.decode(latents + amount * torch.randn(latents.shape, generator=source).to(device))[0]
            rough.append(vae.encode(on_half_grid(decoded, frames, (128, 192)).unsqueeze(0))[0].half().cpu())
            fine.append(vae.encode(wanted)[0].half().cpu())
        write_shard(file, {"rough": torch.stack(rough), "fine": torch.stack(fine)})


@dataclass(frozen=True)
class Pairs:
    """Latents [N,16,T,H,W] of upsampled coarse films and of the films as they should be."""

    rough: Tensor
    fine: Tensor

    @classmethod
    def load(cls, folder: Path) -> Pairs:
        shards = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
        return cls(torch.cat([s["rough"] for s in shards]), torch.cat([s["fine"] for s in shards]))


def refine_loss(generator: Generator, rough: Tensor, fine: Tensor, num_cond: int, source: torch.Generator) -> Tensor:
    """Error of the velocity along the straight way from 0.5 rough + 0.5 noise (level 0.5) to the fine latents
    (level 0).

    The first `num_cond` latents are fine ones, almost clean.
    """
    noise = torch.randn(fine.shape, generator=source, device=fine.device)
    begin = (1 - START) * rough + START * noise
    sigma = START * torch.rand(len(fine), 1, generator=source, device=fine.device).sqrt()
    sigma[::3] = START
    share = (sigma / START).view(-1, 1, 1, 1, 1)
    latents = torch.lerp(fine, begin, share)
    blur = 0.05 * torch.rand(len(fine), 1, 1, 1, 1, generator=source, device=fine.device)
    latents = torch.cat([(fine + blur * noise)[:, :, :num_cond], latents[:, :, num_cond:]], 2)
    timesteps = 1000.0 * sigma.expand(-1, fine.shape[2]).clone()
    timesteps[:, :num_cond] = 0.0
    with torch.no_grad():
        text, mask = generator.prompter([""] * len(fine))
    with torch.autocast(fine.device.type, torch.bfloat16):
        out = generator.dit(latents, timesteps, text, mask, num_cond_latents=num_cond)
    target = (fine - begin) / START
    return (out - target)[:, :, num_cond:].square().mean()


def train_refinement(
    folder: Path,
    generator: Generator,
    pairs: list[Path],
    plan: Plan,
    tokens: int,
    *,
    rank: int,
    seed: int,
    log: Callable[[str], None] = print,
) -> None:
    """Train and write lora/refinement_lora.safetensors under `folder`; a step takes one folder of pairs in
    turn.
    """
    generator.dit.attention = "block_sparse"
    attach(generator.dit, LAYERS + MODULATION, rank, seed)
    generator.prompter.requires_grad_(False)
    training = Training(generator.dit, plan)
    state = folder / "refinement.safetensors"
    if state.exists():
        training.load(state)
    sets, device = [Pairs.load(pair) for pair in pairs], generator.dit.device

    def loss_of(step: int) -> Tensor:
        rng = random.Random(seed * 7_000_003 + share(step))
        chosen = random.Random(seed * 7_000_003 + step).choice(sets)
        frames, rows, columns = chosen.fine.shape[2:]
        clips = max(1, tokens // (frames * rows * columns // 4))
        index = torch.tensor([rng.randrange(len(chosen.fine)) for _ in range(clips)])
        num_cond = rng.choices((0, 4, 8), (0.7, 0.1, 0.2))[0] if frames > 8 else 0
        source = torch.Generator(device).manual_seed(seed * 7_000_003 + share(step))
        rough, fine = (latents[index].float().to(device) for latents in (chosen.rough, chosen.fine))
        return refine_loss(generator, rough, fine, num_cond, source)

    train(training, loss_of, state, log=log)
    write_lora(training, generator.dit, folder / "lora" / "refinement_lora.safetensors")
