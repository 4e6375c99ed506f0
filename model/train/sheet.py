"""Sample sheets: a row of frames for each film, as a PNG to look at."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def write_sheet(videos: list[Tensor], file: Path, frames: int = 8, scale: int = 1) -> None:
    """`frames` evenly chosen frames of each video [3,F,h,w] in [-1,1], one film a row."""
    rows = []
    for video in videos:
        chosen = torch.linspace(0, video.shape[1] - 1, min(frames, video.shape[1])).round().long()
        rows.append(torch.cat(list(video[:, chosen].permute(1, 2, 3, 0)), 1))
    picture = ((torch.cat(rows) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    image = Image.fromarray(picture)
    file.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * scale, image.height * scale)).save(file)
