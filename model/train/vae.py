"""Training of the autoencoder: first images, then clips.

What makes it work in minutes: temporal kernels start on the newest frame alone and temporal resampling
starts as holding the last frame, so that clips begin where images ended; the loss counts the inside of
shapes more, whose colours otherwise wash out while the average error looks fine.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from model import world
from model.checkpoint import load_vae
from model.config import VAEConfig
from model.train.ahead import Ahead
from model.train.loop import Plan, Training, load_average, train
from model.vae import VAE, CausalConv3d

KL_WEIGHT = 5e-5  # for each latent channel; enough to keep the latents smooth, too little to cost sharpness
SHAPE_WEIGHT = 4.0  # a pixel inside a shape counts 1 + this


@torch.no_grad()
def start_as_image_model(vae: VAE) -> None:
    """Temporal kernels look at the newest frame only; temporal resampling holds the last frame."""
    for module in vae.modules():
        if isinstance(module, CausalConv3d) and module.weight.shape[2] > 1:
            newest = module.weight[:, :, -1].clone()
            module.weight.zero_()
            if module.weight.shape[3] > 1:
                # The default scale counts three frames of inputs, of which one is left.
                module.weight[:, :, -1] = newest * module.weight.shape[2] ** 0.5
            else:
                channels = module.weight.shape[1]
                copies = module.weight.shape[0] // channels
                module.weight[:, :, -1, 0, 0] = torch.eye(channels).repeat(copies, 1)
                module.bias.zero_()


def draw_batch(seed: int, count: int, frames: int, height_px: int, width_px: int, fps: float) -> tuple[Tensor, Tensor]:
    """Clips [B,3,F,h,w] of random films at random times, and their masks [B,1,F,h,w]."""
    rng = random.Random(seed)
    clips, masks = [], []
    for _ in range(count):
        change_s = rng.uniform(0.0, 3.0) if rng.random() < 0.3 else None
        film = world.draw_film(rng.randrange(1 << 40), two_shapes=0.5, change_s=change_s)
        times_s = world.frame_times(frames, fps, rng.uniform(0.0, 4.0))
        video, mask = world.render(film, times_s, height_px, width_px)
        clips.append(video.transpose(0, 1))
        masks.append(mask.unsqueeze(0))
    return torch.stack(clips), torch.stack(masks)


def device_of(vae: VAE) -> torch.device:
    return next(vae.parameters()).device


def reconstruction_loss(vae: VAE, video: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Weighted error of a sampled reconstruction plus the KL divergence of the posterior."""
    mean, logvar = (part.float() for part in vae.encode_moments(video))
    logvar = logvar.clamp(-12.0, 4.0)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    z = mean + noise * (0.5 * logvar).exp()
    error = weighted_error(vae.decode(vae.normalise(z)).float() - video, mask)
    divergence = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(1).mean()
    return error + KL_WEIGHT * divergence


def weighted_error(error: Tensor, mask: Tensor) -> Tensor:
    """Absolute and square error, more inside the shapes. Squares, which edges make large, are what PSNR counts."""
    weight = (1.0 + SHAPE_WEIGHT * mask) / (1.0 + SHAPE_WEIGHT * mask.mean())
    return (weight * (0.5 * error.abs() + 8.0 * error.square())).mean()


def psnr_db(a: Tensor, b: Tensor, mask: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio of videos in [-1,1], inside the mask where one is given."""
    square = (a - b).square()
    if mask is None:
        mean = square.mean()
    else:
        mean = (square * mask).sum() / (mask.sum() * square.shape[1])
    return float(10.0 * torch.log10(4.0 / mean.clamp_min(1e-12)))


def measure(vae: VAE, frames: int = 93, count: int = 4, size: tuple[int, int] = (64, 96), fps: float = 15.0) -> str:
    """PSNR over unseen films: all pixels, inside shapes, and the first, middle and last third of the frames."""
    video, mask = (drawn.to(device_of(vae)) for drawn in draw_batch(7_000_001, count, frames, *size, fps))
    decoded = torch.cat([vae.decode(vae.encode(clip)) for clip in video.split(1)])
    thirds = zip(decoded.chunk(3, 2), video.chunk(3, 2), strict=True)
    parts = " ".join(f"{psnr_db(a, b):.1f}" for a, b in thirds)
    return (
        f"{frames} frames {size[0]}x{size[1]}: {psnr_db(decoded, video):.2f} dB, "
        f"inside shapes {psnr_db(decoded, video, mask):.2f} dB, thirds {parts}"
    )


@torch.no_grad()
def with_measured_latents(vae: VAE, films: int = 24) -> VAE:
    """The same network with latents_mean and latents_std measured on films of both sizes."""
    device = device_of(vae)
    videos = (draw_batch(8_000_000 + i, 1, 33, 64, 96, 15.0)[0].to(device) for i in range(films))
    means = [vae.encode_moments(video)[0] for video in videos]
    values = torch.cat([m.transpose(0, 1).flatten(1) for m in means], 1)
    config = dataclasses.replace(
        vae.config,
        latents_mean=tuple(round(v, 5) for v in values.mean(1).tolist()),
        latents_std=tuple(round(v, 5) for v in values.std(1).clamp_min(1e-4).tolist()),
    )
    measured = VAE(config).to(device)
    measured.load_state_dict(vae.state_dict())
    return measured


def new_vae(base_dim: int, seed: int) -> VAE:
    """An untrained autoencoder of the bundled checkpoint's shape, ready for images."""
    torch.manual_seed(seed)
    vae = VAE(VAEConfig(base_dim=base_dim, num_res_blocks=1, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16))
    start_as_image_model(vae)
    return vae


def train_images(
    folder: Path,
    plan: Plan,
    base_dim: int,
    seed: int,
    log: Callable[[str], None] = print,
    measured: bool = True,
    device: str = "cpu",
) -> VAE:
    """Stage one: single frames of both sizes. State: folder/vae_images.safetensors."""
    vae = new_vae(base_dim, seed).to(device)

    def draw(step: int) -> list[Sample]:
        large = step % 4 == 3
        count, size = (4, (128, 192)) if large else (16, (64, 96))
        return [draw_batch(seed * 1_000_003 + step, count, 1, *size, 15.0)]

    def loss(samples: list[Sample], generator: torch.Generator) -> Tensor:
        return reconstruction_loss(vae, *samples[0], generator)

    both = lambda step: measure(vae, frames=1, count=48) + "; " + measure(vae)  # noqa: E731
    run = Run(folder / "vae_images.safetensors", plan, draw, loss, seed * 1_000_003, both if measured else None)
    train_samples(vae, run, log)
    return vae


def train_clips(
    folder: Path,
    plan: Plan,
    base_dim: int,
    seed: int,
    log: Callable[[str], None] = print,
    measured: bool = True,
    device: str = "cpu",
    *,
    clips: int = 2,
    start_from: Path | None = None,
) -> VAE:
    """Stage two: `clips` clips of 17 frames (at times half as many of 37, or of the large size) mixed with images,
    from stage one's average or the weights of the checkpoint folder `start_from`. State: folder/vae.safetensors.
    """
    vae = new_vae(base_dim, seed).to(device)
    if start_from is None:
        load_average(vae, folder / "vae_images.safetensors")
    else:
        vae.load_state_dict(load_vae(start_from, device=device, dtype=torch.float32).state_dict())

    def draw(step: int) -> list[Sample]:
        kind = ("coarse", "coarse", "coarse", "large", "coarse", "coarse", "coarse", "long")[step % 8]
        count, frames, size, fps = {
            "coarse": (clips, 17, (64, 96), 15.0),
            "large": (max(1, clips // 2), 13, (128, 192), 30.0),
            "long": (max(1, clips // 2), 37, (64, 96), 15.0),
        }[kind]
        films = draw_batch(seed * 2_000_003 + step, count, frames, *size, fps)
        return [films, draw_batch(seed * 3_000_017 + step, 2 * clips, 1, 64, 96, 15.0)]

    def loss(samples: list[Sample], generator: torch.Generator) -> Tensor:
        films, images = samples
        with torch.autocast(device, torch.bfloat16, enabled=device.startswith("cuda")):
            return reconstruction_loss(vae, *films, generator) + 0.3 * reconstruction_loss(vae, *images, generator)

    run = Run(folder / "vae.safetensors", plan, draw, loss, seed * 2_000_003, clip_measures(vae) if measured else None)
    train_samples(vae, run, log)
    return vae


def train_decoder(
    folder: Path, vae: VAE, plan: Plan, seed: int, log: Callable[[str], None] = print, compiled: bool = False
) -> VAE:
    """Goes on with the decoder of a finished autoencoder on clips, latents slightly disturbed, products in bf16.
    State: folder/decoder.safetensors. `compiled`: torch.compile fuses what stands between the convolutions.
    """
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    decode = torch.compile(vae.decode, dynamic=False) if compiled else vae.decode

    def draw(step: int) -> list[Sample]:
        large = step % 3 == 2
        count, frames, size, fps = (1, 17, (128, 192), 30.0) if large else (2, 25, (64, 96), 15.0)
        return [draw_batch(seed * 5_000_011 + step, count, frames, *size, fps)]

    def loss(samples: list[Sample], generator: torch.Generator) -> Tensor:
        ((video, mask),) = samples
        with torch.no_grad():
            latents = vae.encode(video)
            amount = 0.1 * torch.rand(1, generator=generator, device=latents.device)
            latents += amount * torch.randn(latents.shape, generator=generator, device=latents.device)
        with torch.autocast(video.device.type, torch.bfloat16):
            decoded = decode(latents)
        return weighted_error(decoded.float() - video, mask)

    train_samples(vae, Run(folder / "decoder.safetensors", plan, draw, loss, seed * 5_000_011, clip_measures(vae)), log)
    return vae


Sample = tuple[Tensor, Tensor]
"""Videos [B,3,F,h,w] and their masks [B,1,F,h,w]."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: its state, what is drawn for a step and the loss of that; `seed` + step seeds the loss's noise."""

    state: Path
    plan: Plan
    draw: Callable[[int], list[Sample]]
    loss: Callable[[list[Sample], torch.Generator], Tensor]
    seed: int
    evaluate: Callable[[int], str] | None


def train_samples(vae: VAE, run: Run, log: Callable[[str], None]) -> None:
    """Train the parameters of `vae` that want a gradient, from the run's state where there is one."""
    training, device = Training(vae, run.plan), device_of(vae)
    if run.state.exists():
        training.load(run.state)
    batches = Ahead(run.draw, range(training.step, run.plan.steps), device.type)

    def loss_of(step: int) -> Tensor:
        samples = [(video.to(device), mask.to(device)) for video, mask in batches.take(step)]
        return run.loss(samples, torch.Generator(device).manual_seed(run.seed + step))

    train(training, loss_of, run.state, run.evaluate, evaluate_every=300, log=log)


def clip_measures(vae: VAE) -> Callable[[int], str]:
    """What is printed now and then: clips of both sizes."""
    return lambda step: measure(vae) + "; " + measure(vae, count=1, size=(128, 192), fps=30.0)
