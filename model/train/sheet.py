"""Sample sheets: a row of frames for each film, as a PNG to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_LABEL_PX = 14


def write_sheet(
    videos: Sequence[Tensor], file: Path, frames: int = 8, scale: int = 1, labels: Sequence[str] = ()
) -> None:
    """`frames` evenly chosen frames of each video [3,F,h,w] in [-1,1], one film a row, each under its label where there
    are `labels`.
    """
    rows = []
    for video in videos:
        chosen = torch.linspace(0, video.shape[1] - 1, min(frames, video.shape[1])).round().long()
        rows.append(torch.cat(list(video[:, chosen].permute(1, 2, 3, 0)), 1))
    pictures = [((row + 1) * 127.5).round().clamp(0, 255).byte().numpy() for row in rows]
    images = [Image.fromarray(picture) for picture in pictures]
    strip_px = _LABEL_PX if labels else 0
    places = [sum(image.height * scale + strip_px for image in images[:i]) for i in range(len(images) + 1)]
    sheet = Image.new("RGB", (max(image.width for image in images) * scale, places[-1]))
    pen = ImageDraw.Draw(sheet)
    for top, image in zip(places, images, strict=False):
        sheet.paste(image.resize((image.width * scale, image.height * scale)), (0, top + strip_px))
    for top, label in zip(places, labels, strict=False):
        pen.text((2, top), label, fill=(240, 240, 240), font=ImageFont.load_default(11))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
