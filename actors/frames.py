"""Frames out of latents and sources, for every actor that holds a VAE.

Legend: C channels, T latent frames, H, W latent rows and columns; n frames, h, w pixels. Latents are fp32
[C,T,H,W], frames uint8 [n,h,w,3].
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from model.generate import decode_frames
from model.vae import VAE
from pipeline.params import LatentsParams, LayerParams, MergeParams, PieceParams, expand_ranges, merge_weights


def gather_pieces(vae: VAE, inputs: Sequence[Mapping[str, Tensor]], pieces: Sequence[PieceParams]) -> Tensor:
    """The frames that `pieces` name, joined in order: uint8 [n,h,w,3]."""
    return torch.cat([piece_frames(vae, inputs[p["input"]], p["start"], p["stop"]) for p in pieces])


def piece_frames(vae: VAE, tensors: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
    """Frames [start, stop) of a source, or of what a segment's latents decode to; from its stored tail where
    that reaches.
    """
    if "frames" in tensors:
        return tensors["frames"][start:stop]
    latents, tail = tensors["latents"], tensors.get("tail")
    tail_start = video_frames(vae, latents.shape[1]) - (0 if tail is None else len(tail))
    if tail is not None and start >= tail_start:
        return tail[start - tail_start : stop - tail_start]
    return torch.cat(list(decode_range(vae, latents, start, stop)))


def gather_latents(inputs: Sequence[Mapping[str, Tensor]], parts: Sequence[LatentsParams]) -> Tensor:
    """The latents that `parts` name, as they are stored, joined in order."""
    return torch.cat([inputs[p["input"]]["latents"][:, p["start"] : p["stop"]] for p in parts], dim=1)


def video_frames(vae: VAE, latent_frames: int) -> int:
    """How many frames so many latents decode to: the first gives one, each later one `temporal_factor`."""
    return 1 + int(vae.temporal_factor) * (latent_frames - 1)


def decode_range(vae: VAE, latents: Tensor, start: int, stop: int) -> Iterator[Tensor]:
    """Frames [start, stop) of the decoded video in chunks, decoding no latent beyond the last one needed."""
    needed = 1 + -(-(stop - 1) // vae.temporal_factor)
    position = 0
    for chunk in decode_frames(vae, latents[:, :needed]):
        first, last = max(start - position, 0), min(stop - position, len(chunk))
        if first < last:
            yield chunk[first:last]
        position += len(chunk)


def layer_frames(vae: VAE, inputs: Sequence[Mapping[str, Tensor]], layer: LayerParams) -> Iterator[Tensor]:
    """The layer's output frames one by one, uint8 [h,w,3]; a frame that is shown several times comes several
    times.
    """
    shown = expand_ranges(layer["ranges"])
    start = min(first for first, _, _ in layer["ranges"])
    stop = max(last for _, last, _ in layer["ranges"])
    latents = merged_latents(inputs, layer["input"], layer["merges"])
    decoded = itertools.chain.from_iterable(decode_range(vae, latents, start, stop))
    position, frame = start, next(decoded)
    for wanted in shown:
        while position < wanted:
            position, frame = position + 1, next(decoded)
        yield frame


def merged_latents(inputs: Sequence[Mapping[str, Tensor]], own: int, merges: Sequence[MergeParams]) -> Tensor:
    """A window's latents with its overlaps merged. Both neighbours' units compute the same values, bit for
    bit.
    """
    latents = inputs[own]["latents"].float().clone()
    for merge in merges:
        here = slice(merge["here"], merge["here"] + merge["count"])
        mine = inputs[own]["latents"][:, here].float()
        there = slice(merge["there"], merge["there"] + merge["count"])
        theirs = inputs[merge["input"]]["latents"][:, there].float()
        first, second = (theirs, mine) if merge["earlier"] else (mine, theirs)
        v = torch.tensor(merge_weights(merge["count"]), dtype=torch.float32).view(1, -1, 1, 1)
        latents[:, here] = (1 - v) * first + v * second
    return latents


def blend(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """(1 - weight) * first + weight * second of two uint8 frames, rounded to the nearest level."""
    mixed = first.float() + (second.float() - first.float()) * weight
    return mixed.round().to(torch.uint8)
