"""The command `python -m model.generate`: one clip from a prompt, without a pipeline around it.

Reads a checkpoint folder in the official layout and no render.json: numbers that are not given are those of
the official model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.errors import InputError, ModelError
from model.generate import (
    RefineRequest,
    SegmentRequest,
    generate_segment,
    load_models,
    refine_layout,
    refine_window,
)
from model.noise import named_seeds
from model.pixels import decode_frames
from model.sampling import base_schedule, distilled_schedule, refinement_schedule
from model.vae import VAE

_SHIFT = 12.0
_GUIDANCE = 4.0
_REFINE_STEPS, _REFINE_SIGMA = 50, 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: one clip from a prompt and perhaps an image, refined if asked. Returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        frames, fps = _make_clip(options)
        _write_video(options.out, frames, fps)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(options.out)
    return 0


def _make_clip(options: argparse.Namespace) -> tuple[Iterator[Tensor], int]:
    """Frames uint8 [f,h,w,3] in pieces, and frames per second."""
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    prompts = _encode_prompts(options, device, dtype)
    lora = options.checkpoint / "lora"
    loras = [] if options.full else [(lora / "cfg_step_lora.safetensors", 1.0)]
    models = load_models(options.checkpoint, role_loras=loras, device=device, dtype=dtype)
    latents = generate_segment(models, _segment_request(options, models.vae, prompts))
    if options.refine is None:
        return decode_frames(models.vae, latents), options.fps
    stage_one = torch.cat(list(decode_frames(models.vae, latents)))
    del models
    loras = [(lora / "refinement_lora.safetensors", 1.0)]
    models = load_models(
        options.checkpoint, role_loras=loras, attention="block_sparse", device=device, dtype=dtype
    )
    request = _refine_request(options, models.vae, stage_one, prompts)
    refined = refine_window(models, request)
    pieces = decode_frames(models.vae, refined.latents, drop_first=refined.front_frames)
    return _first_frames(pieces, len(request.times)), 2 * options.fps


def _encode_prompts(
    options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """States [2,1,L,C] and masks [2,L] of prompt and negative prompt. The encoder is gone afterwards."""
    from model.checkpoint import load_text

    return load_text(options.checkpoint, device=device, dtype=dtype).encode(
        [options.prompt, options.negative_prompt]
    )


def _segment_request(options: argparse.Namespace, vae: VAE, prompts: tuple[Tensor, Tensor]) -> SegmentRequest:
    (text, negative_text), (mask, negative_mask) = prompts
    image = None if options.image is None else _read_image(options.image, options.height, options.width)
    make = base_schedule if options.full else distilled_schedule
    return SegmentRequest(
        text=text,
        text_mask=mask,
        negative_text=negative_text,
        negative_mask=negative_mask,
        height_px=options.height,
        width_px=options.width,
        segment_frames=options.frames,
        noise_seeds=named_seeds(f"{options.seed}/stage one", 1 + (options.frames - 1) // vae.temporal_factor),
        schedule=make(options.steps or (50 if options.full else 16), _SHIFT),
        guidance=_GUIDANCE if options.full else 1.0,
        cond_frames=image,
    )


def _refine_request(
    options: argparse.Namespace, vae: VAE, stage_one: Tensor, prompts: tuple[Tensor, Tensor]
) -> RefineRequest:
    height, width = options.refine
    times = [min(frame / 2, len(stage_one) - 1.0) for frame in range(2 * len(stage_one))]
    image = None if options.image is None else _read_image(options.image, height, width)
    layout = refine_layout(len(times), 0 if image is None else 1, vae.temporal_factor)
    return RefineRequest(
        stage_one=stage_one,
        times=times,
        height_px=height,
        width_px=width,
        noise_seeds=named_seeds(f"{options.seed}/refinement", layout.latents),
        text=prompts[0][0],
        text_mask=prompts[1][0],
        schedule=refinement_schedule(_REFINE_STEPS, _REFINE_SIGMA, _SHIFT),
        cond_frames=image,
    )


def _read_image(file: Path, height_px: int, width_px: int) -> Tensor:
    """An image cut to the shape and scaled to the size: uint8 [1,h,w,3]."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (width_px, height_px))
    except OSError as error:
        raise InputError(f"image: {file} cannot be read ({error})") from error
    return torch.from_numpy(np.array(fitted))[None]


def _first_frames(pieces: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    for piece in pieces:
        if count > 0:
            yield piece[:count]
        count -= len(piece)


def _write_video(file: Path, pieces: Iterator[Tensor], fps: int) -> None:
    import imageio_ffmpeg

    first = next(pieces)
    writer = imageio_ffmpeg.write_frames(str(file), (first.shape[2], first.shape[1]), fps=fps, quality=8)
    writer.send(None)
    for piece in (first, *pieces):
        for frame in piece:
            writer.send(frame.numpy())
    writer.close()


def _size(text: str) -> tuple[int, int]:
    width, height = text.lower().split("x")
    return int(height), int(width)


def _parser() -> argparse.ArgumentParser:
    from model.text import NEGATIVE_PROMPT

    parser = argparse.ArgumentParser(prog="python -m model.generate", description="Generate one clip.")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="checkpoint folder in the official layout"
    )
    parser.add_argument("--prompt", required=True)
    parser.add_argument(
        "--negative-prompt", default=NEGATIVE_PROMPT, help="used with --full (default: %(default)s)"
    )
    parser.add_argument("--image", type=Path, help="start from this image")
    parser.add_argument("--out", type=Path, required=True, help="video file to write, e.g. clip.mp4")
    parser.add_argument("--height", type=int, default=480, help="pixels (default: %(default)s)")
    parser.add_argument("--width", type=int, default=832, help="pixels (default: %(default)s)")
    parser.add_argument(
        "--frames", type=int, default=93, help="1 plus a multiple of 4 (default: %(default)s)"
    )
    parser.add_argument("--fps", type=int, default=15, help="doubled by --refine (default: %(default)s)")
    parser.add_argument(
        "--full", action="store_true", help="base weights with guidance instead of the distilled LoRA"
    )
    parser.add_argument("--steps", type=int, help="denoising steps (default: 16, with --full 50)")
    parser.add_argument(
        "--refine", type=_size, metavar="WIDTHxHEIGHT", help="refine to this size, e.g. 1280x704"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser
