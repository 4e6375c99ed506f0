"""One forward pass over several processes: each holds the whole network and a share of the tokens.

Ulysses' way (https://arxiv.org/abs/2309.14509): everything that looks at tokens one by one runs on the process's own
tokens. Around self-attention the processes exchange: behind the projection to queries, keys and values each gets all
tokens of its share of the heads, before the output projection each gets its own tokens back with all heads. So
attention itself, dense or block-sparse, the order of tokens and the condition cache are those of a network with
fewer heads; the cache holds the process's own heads. Nothing is summed across processes.

Parallelism is put on from outside: `split_sequence` adds hooks, the network's code does not know of it. Every process
makes the same calls with the same arguments and gets the whole, same result.

Legend: n processes, B batch, N tokens, Ni tokens of this process, C channels, c = C/n.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.dit import Block, DiT, Layout
from model.errors import InputError


def split_sequence(dit: DiT, group: dist.ProcessGroup) -> None:
    """Let `dit` run over the processes of `group`, for inference. Raises InputError if they do not divide its heads.

    Cannot be undone. Weights keep their names. From then on a call that one of the processes does not make waits for
    it, for as long as the group's time limit.
    """
    size, heads = group.size(), dit.config.num_heads
    if heads % size:
        raise InputError(f"gang: {size} processes do not divide {heads} heads; wanted one of {_divisors(heads)}")
    exchange = Exchange(group)
    for index, layer in enumerate(dit.blocks):
        block = cast(Block, layer)
        block.register_forward_pre_hook(exchange.enter_first if index == 0 else exchange.enter)
        block.attn.register_forward_pre_hook(_see_all)
        block.attn.num_heads = heads // size
        block.attn.in_parts = False  # the exchange is of all tokens
        block.attn.qkv.register_forward_hook(exchange.to_heads)
        block.attn.proj.register_forward_pre_hook(exchange.to_tokens)
    dit.final_layer.register_forward_pre_hook(exchange.enter_last)
    dit.final_layer.register_forward_hook(exchange.gather)


def _divisors(heads: int) -> list[int]:
    return [size for size in range(1, heads + 1) if heads % size == 0]


@dataclass(frozen=True)
class Share(Layout):
    """The layout of this process's tokens: `frame` [Ni] and `num_cond_tokens` are theirs, all else is the whole's."""

    whole: Layout
    cond_tokens: int

    @property
    def num_cond_tokens(self) -> int:
        return self.cond_tokens


class Exchange:
    """The hooks of one network. Shares follow from the number of tokens: process i holds [N*i/n, N*(i+1)/n)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._rank, self._size = group, group.rank(), group.size()
        self._share: Share | None = None
        """That of the call under way; hooks of Linears see no layout."""

    # Hooks

    def enter_first(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The first block takes this process's tokens out of the stream."""
        x, *rest = self.enter(block, args)
        _check(x, self._size)
        start, stop = self._bounds(rest[3].whole)[self._rank :][:2]
        return x[:, start:stop], *rest

    def enter(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A block works on its tokens' layout."""
        x, t, y, keep, layout, memory = args
        return x, t, y, keep, self._share_of(layout), memory

    def enter_last(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The final layer, too."""
        x, t, layout = args
        return x, t, self._share_of(layout)

    def to_heads(self, layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Queries, keys and values [B,Ni,3C] of all heads -> [B,N,3c] of this process's."""
        b, own, width = out.shape
        parts = out.view(b, own, 3, self._size, -1).permute(3, 1, 0, 2, 4)
        sent = parts.reshape(self._size * own, b, width // self._size)
        received = sent.new_empty(sum(self._counts()), *sent.shape[1:])
        self._swap(received, sent, self._counts(), [own] * self._size)
        return received.transpose(0, 1)

    def to_tokens(self, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        """What attention gives [B,N,c] for this process's heads -> [B,Ni,C] for its tokens."""
        sent = args[0].transpose(0, 1).contiguous()
        own = self._counts()[self._rank]
        received = sent.new_empty(self._size * own, *sent.shape[1:])
        self._swap(received, sent, [own] * self._size, self._counts())
        return (received.view(self._size, own, *sent.shape[1:]).permute(2, 1, 0, 3).flatten(2),)

    def gather(self, layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """The result's rows [B,Ni,...] of all processes, [B,N,...]."""
        counts = self._counts()
        padded = out.new_zeros(max(counts), out.shape[0], *out.shape[2:])
        padded[: out.shape[1]] = out.transpose(0, 1)
        everyone = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(everyone, padded, group=self._group)
        return torch.cat([rows[:count] for rows, count in zip(everyone, counts, strict=True)]).transpose(0, 1)

    # Shares

    def _bounds(self, layout: Layout) -> list[int]:
        tokens = math.prod(layout.grid)
        return [tokens * i // self._size for i in range(self._size + 1)]

    def _counts(self) -> list[int]:
        assert self._share is not None
        return [stop - start for start, stop in itertools.pairwise(self._bounds(self._share.whole))]

    def _share_of(self, layout: Layout) -> Share:
        """Made once for each call: all blocks are handed the same layout."""
        if self._share is None or self._share.whole is not layout:
            self._share = self._make_share(layout)
        return self._share

    def _make_share(self, layout: Layout) -> Share:
        space = layout.grid[1] * layout.grid[2]
        start, stop = self._bounds(layout)[self._rank :][:2]
        device = layout.rotary.device
        frame = torch.arange(start, stop, device=device) // space if layout.frame is None else layout.frame[start:stop]
        values = {field.name: getattr(layout, field.name) for field in fields(layout)} | {"frame": frame.int()}
        return Share(**values, whole=layout, cond_tokens=min(max(layout.num_cond_tokens - start, 0), stop - start))

    def _swap(self, received: Tensor, sent: Tensor, counts: list[int], sent_counts: list[int]) -> None:
        dist.all_to_all_single(received, sent, counts, sent_counts, group=self._group)


def _see_all(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Attention sees all tokens (of its heads)."""
    x, layout, memory = args
    return x, layout.whole, memory


def _check(x: Tensor, size: int) -> None:
    if x.requires_grad:
        raise InputError("gang: a network that is split over processes is for inference; use torch.no_grad()")
    if x.shape[1] < size:
        raise InputError(f"gang: {x.shape[1]} tokens are too few for {size} processes")
