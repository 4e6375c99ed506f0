"""A cache of encoded films on disk, so that a DiT step is only the DiT.

Shards of 256 clips: safetensors with `latents` [N,16,T,H,W] in half precision (normalised) and `cover`
[N,T,H,W], how much of a latent's place shapes cover, on 0..255; and a JSON file with the scenes that captions
are worded from. Clip i of a cache depends on the cache's seed and i alone, so a cache grows and resumes.

A cache of videos that somebody brought (model/train/clips.py) has a caption in the place of a clip's scenes, and no
`cover`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from model import world
from model.train.ahead import Ahead
from model.vae import VAE

SHARD = 256
CONDITION_FRAMES = 13
FPS = 15.0
_FRAMES_TOGETHER = 512  # frames that are encoded at once: of one segment, or of many images


def clip_film(seed: int, index: int) -> tuple[world.Film, float]:
    """The film of clip `index` and the time it starts at. One in five changes right after the condition
    frames.
    """
    rng = random.Random(seed * 9_000_011 + index)
    change_s = None
    start_s = rng.uniform(0.0, 6.0)
    if index % 5 == 4:
        change_s = start_s + (CONDITION_FRAMES - 0.5) / FPS
    return world.draw_film(rng.randrange(1 << 40), two_shapes=0.3, change_s=change_s), start_s


@torch.no_grad()
def build_cache(vae: VAE, folder: Path, seed: int, clips: int, frames: int, size: tuple[int, int] = (64, 96)) -> None:
    """Encode films until the cache in `folder` holds `clips` clips of `frames` frames."""
    folder.mkdir(parents=True, exist_ok=True)
    device = next(vae.parameters()).device

    together = max(1, _FRAMES_TOGETHER // frames)

    def draw(first: int) -> tuple[Tensor, Tensor]:
        videos, covers = [], []
        for index in range(first, min(first + together, first // SHARD * SHARD + SHARD, clips)):
            film, start_s = clip_film(seed, index)
            video, mask = world.render(film, world.frame_times(frames, FPS, start_s), *size)
            videos.append(video.transpose(0, 1))
            covers.append(latent_cover(mask))
        return torch.stack(videos), torch.stack(covers)

    missing = missing_shards(folder, clips, SHARD)
    starts = {file: range(indices.start, indices.stop, together) for file, indices in missing.items()}
    films = Ahead(draw, list(itertools.chain(*starts.values())), device.type)
    for file, indices in missing.items():
        latents, covers, scenes = [], [], []
        for first in starts[file]:
            videos, cover = films.take(first)
            latents.append(vae.encode(videos.to(device)).half().cpu())
            covers.append(cover)
        for index in indices:
            film, _ = clip_film(seed, index)
            scenes.append([dataclasses.asdict(s) for s in (film.scene, film.after or film.scene)])
        file.with_suffix(".json").write_text(json.dumps(scenes))
        write_shard(file, {"latents": torch.cat(latents).contiguous(), "cover": torch.cat(covers)})


def missing_shards(folder: Path, clips: int, size: int) -> dict[Path, range]:
    """The files of a cache of `clips` clips that are not there yet, and the clips that each is to hold."""
    shards = {
        folder / f"{first:06d}.safetensors": range(first, min(first + size, clips)) for first in range(0, clips, size)
    }
    return {file: indices for file, indices in shards.items() if not file.exists()}


def write_shard(file: Path, tensors: dict[str, Tensor]) -> None:
    """All or nothing, so that an interrupted cache goes on where it stopped."""
    part = file.with_suffix(".part")
    save_file(tensors, part)
    os.replace(part, file)


def latent_cover(mask: Tensor) -> Tensor:
    """Masks of frames [F,h,w] in [0,1] -> [T,h/8,w/8] bytes: the mean over each latent's pixels and frames."""
    places = F.avg_pool2d(mask, 8)
    frames = [places[:1], *places[1:].split(4)]
    return torch.stack([255.0 * group.mean(0) for group in frames]).round().to(torch.uint8)


def _no_cover(latents: Tensor) -> Tensor:
    """Every place of latents [N,16,T,H,W] counts alike: bytes [N,T,H,W]."""
    return torch.zeros(latents[:, 0].shape, dtype=torch.uint8)


def _scene(values: dict[str, Any]) -> world.Scene:
    return world.Scene(values["backdrop"], tuple(world.Mover(**m) for m in values["movers"]))


class Cache:
    """The clips of one or several folders of equal frame count in memory."""

    def __init__(self, *folders: Path) -> None:
        shards = sorted(file for folder in folders for file in folder.glob("*.safetensors"))
        loaded = [load_file(file) for file in shards]
        self.latents = torch.cat([tensors["latents"] for tensors in loaded])
        self.covers = torch.cat([tensors.get("cover", _no_cover(tensors["latents"])) for tensors in loaded])
        texts = [text for file in shards for text in json.loads(file.with_suffix(".json").read_text())]
        self.texts = [text if isinstance(text, str) else (_scene(text[0]), _scene(text[1])) for text in texts]

    def __len__(self) -> int:
        return len(self.texts)

    def caption(self, index: int, rng: random.Random | None = None) -> str:
        """What the clip shows at its end, in one of many wordings where a generator chooses."""
        text = self.texts[index]
        return text if isinstance(text, str) else world.caption(text[1], rng)

    def shapes(self, index: int) -> int:
        """How many shapes are drawn; a clip that nobody drew counts as one."""
        text = self.texts[index]
        return 1 if isinstance(text, str) else len(text[1].movers)

    def clip(self, index: int, latent_frames: int) -> Tensor:
        """The clip's first latent frames [16,T,H,W]: a causal code, so this is the code of the shorter clip."""
        return self.latents[index, :, :latent_frames].float()

    def cover(self, index: int, latent_frames: int) -> Tensor:
        """How much of each latent's place shapes cover, [1,T,H,W] in [0,1]."""
        return self.covers[index, :latent_frames].unsqueeze(0).float() / 255.0

    def steady(self, index: int) -> bool:
        """Whether the clip's film does not change."""
        text = self.texts[index]
        return isinstance(text, str) or text[0] == text[1]
