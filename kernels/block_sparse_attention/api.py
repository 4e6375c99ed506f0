"""The public calls of block-sparse attention.

`block_sparse_attention` takes tokens in (t, h, w) order; `attend_in_block_order` takes them in the order that
`block_order` gives, in which each block is a run of tokens: a model that puts its tokens into that order once
has nothing to repack in any layer. Which implementation a call takes is what `backend` says.

Shapes: B batch, H heads, N tokens, D head size, n blocks. Grids and chunks are (t, h, w) counts of tokens.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.block_sparse_attention import reference
from kernels.dispatch import capability, has_descriptors, has_gluon, takes_kernel

Grid = tuple[int, int, int]
Backend = Literal["gluon", "triton_tma", "triton", "reference"]

_SMALLEST_KERNEL_BLOCK = 16


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_grid: Grid,
    k_grid: Grid,
    *,
    sparsity: float | None,
    cdf_threshold: float | None = None,
    chunk_q: Grid = (4, 4, 4),
    chunk_k: Grid = (4, 4, 4),
) -> Tensor:
    """Softmax attention in which each block of queries sees only the key blocks that matter to it.

    q [B,H,Nq,D] on `q_grid`, k and v [B,H,Nk,D] on `k_grid`; returns [B,H,Nq,D] in the same token order.
    Queries and keys are averaged over blocks of `chunk_q` and `chunk_k` tokens; for each head and query block
    the key blocks with the largest product are kept:

    - `sparsity`: the top int((1 - sparsity) * number of key blocks), at least one;
    - `cdf_threshold`: those whose cumulative softmax mass, largest first, stays at or below it, at least one;
    - both: the union. Neither raises ValueError, as do grids that the chunks do not divide.

    Attention over the kept blocks is exact, with scale D^-1/2, and differentiable in q, k and v (the choice
    of blocks is not).
    """
    if sparsity is None and cdf_threshold is None:
        raise ValueError("one of sparsity and cdf_threshold must be given")
    _check_grid("q", q, q_grid, chunk_q)
    _check_grid("k", k, k_grid, chunk_k)
    q_blocks = reference.to_blocks(q, q_grid, chunk_q)
    k_blocks = reference.to_blocks(k, k_grid, chunk_k)
    v_blocks = reference.to_blocks(v, k_grid, chunk_k)
    out = attend_in_block_order(
        q_blocks.flatten(2, 3),
        k_blocks.flatten(2, 3),
        v_blocks.flatten(2, 3),
        sparsity=sparsity,
        cdf_threshold=cdf_threshold,
        block_q=math.prod(chunk_q),
        block_k=math.prod(chunk_k),
    )
    return reference.from_blocks(out.unflatten(2, q_blocks.shape[2:4]), q_grid, chunk_q)


def attend_in_block_order(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sparsity: float | None,
    cdf_threshold: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    q_means: Tensor | None = None,
    k_means: Tensor | None = None,
    logit_bound: float | None = None,
) -> Tensor:
    """The same over tokens in block order: q [B,H,Nq,D], k and v [B,H,Nk,D] -> [B,H,Nq,D].

    Any strides with D innermost, such as slices of a fused projection [B,N,3,H,D], are read where they lie.
    `q_means` and `k_means` are fp32 block means [B,H,n,D], made here if not given. `logit_bound` is a promise
    that no |q.k| D^-1/2 exceeds it (after RMSNorm: D^1/2 max|w_q| max|w_k|) and lets the kernel do
    without a running maximum; the reference needs no such promise. ValueError on counts that do not divide.
    """
    if sparsity is None and cdf_threshold is None:
        raise ValueError("one of sparsity and cdf_threshold must be given")
    for name, tokens, block in (("q", q, block_q), ("k", k, block_k)):
        if tokens.shape[2] % block:
            raise ValueError(f"{name}: {tokens.shape[2]} tokens do not divide into blocks of {block}")
    if not _fits_kernel(q, k, v, block_q, block_k):
        return _attend_reference(q, k, v, sparsity, cdf_threshold, block_q, block_k, q_means, k_means)
    top = reference.blocks_to_keep(k.shape[2] // block_k, sparsity)
    means = (None if m is None else m.detach() for m in (q_means, k_means))
    return _attend(q, k, v, *means, top, cdf_threshold, block_q, block_k, logit_bound)[0]


def backend(
    q: Tensor, k: Tensor, v: Tensor, *, block_q: int = 64, block_k: int = 64, cdf_threshold: float | None = None
) -> Backend:
    """What runs for these tensors: the kernel for Hopper in Gluon, the Triton kernel with TMA descriptors or with
    pointers, or plain torch.

    Gluon makes the forward pass (gradients are the Triton kernels') of lists of one length: it needs no mass threshold,
    bf16, blocks of 64 x 64, heads of 64 or 128, compute capability 9.0 and descriptors. Descriptors need compute
    capability 9.0, a head size that is a power of two and 16-byte aligned rows; the kernels need a place where Triton
    runs, blocks of a power of two of at least 16 tokens, and one type of at most 32 bits.
    """
    if not _fits_kernel(q, k, v, block_q, block_k):
        return "reference"
    if not _uses_descriptors(q, k, v):
        return "triton"
    even = cdf_threshold is None and block_q == block_k == 64
    fits = even and q.dtype == torch.bfloat16 and q.shape[3] in (64, 128)
    return "gluon" if fits and has_gluon(capability(q)) else "triton_tma"


def block_order(grid: Grid, chunk: Grid = (4, 4, 4), device: torch.device | None = None) -> Tensor:
    """int64 [N]: entry p is the (t,h,w)-order index of the token that stands at p in block order.

    `x[:, order]` puts tokens into block order and `order // (h*w)` is the frame of each.
    """
    index = torch.arange(math.prod(grid), device=device).view(1, 1, -1, 1)
    return reference.to_blocks(index, grid, chunk).flatten()


def _fits_kernel(q: Tensor, k: Tensor, v: Tensor, block_q: int, block_k: int) -> bool:
    blocks_fit = all(n >= _SMALLEST_KERNEL_BLOCK and n & (n - 1) == 0 for n in (block_q, block_k))
    return blocks_fit and q.dtype == k.dtype == v.dtype and takes_kernel(q, k, v)


def _uses_descriptors(q: Tensor, k: Tensor, v: Tensor) -> bool:
    from kernels.block_sparse_attention import triton_impl

    return has_descriptors(q) and triton_impl.fits_descriptors(q, k, v)


@torch.library.custom_op("longtake::block_sparse_attention", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_means: Tensor | None,
    k_means: Tensor | None,
    top: int,
    cdf_threshold: float | None,
    block_q: int,
    block_k: int,
    logit_bound: float | None,
) -> tuple[Tensor, Tensor]:
    """Gating and attention as one operator of torch.compile, since a mass threshold makes lists whose length depends
    on the data: out [B,H,Nq,D] and the base-2 logarithm of the sums of exponentials [B,H,Nq]."""
    from kernels.block_sparse_attention import triton_impl

    kept, counts = _choose(q, k, q_means, k_means, top, cdf_threshold, block_q, block_k)
    chosen = backend(q, k, v, block_q=block_q, block_k=block_k, cdf_threshold=cdf_threshold)
    if chosen == "gluon":
        from kernels.block_sparse_attention import gluon_impl

        return gluon_impl.launch_forward(q, k, v, kept, counts, logit_bound)
    tiles = triton_impl.Tiles(block_q, block_k, chosen != "triton")
    return triton_impl.launch_forward(q, k, v, kept, counts, tiles, logit_bound)


@_attend.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    b, h, n, d = q.shape
    return q.new_empty(b, n, h, d).transpose(1, 2), q.new_empty(b, h, n, dtype=torch.float32)


@torch.library.custom_op("longtake::block_sparse_attention_backward", mutates_args=())
def _attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_means: Tensor | None,
    k_means: Tensor | None,
    out: Tensor,
    lse2: Tensor,
    d_out: Tensor,
    top: int,
    cdf_threshold: float | None,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous. The blocks are chosen again, from the same means and so alike."""
    from kernels.block_sparse_attention import triton_impl

    kept, counts = _choose(q, k, q_means, k_means, top, cdf_threshold, block_q, block_k)
    tiles = triton_impl.Tiles(block_q, block_k, _uses_descriptors(q, k, v))
    return triton_impl.launch_backward(q, k, v, kept, counts, out, lse2, d_out, tiles)


@_attend_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _choose(
    q: Tensor,
    k: Tensor,
    q_means: Tensor | None,
    k_means: Tensor | None,
    top: int,
    cdf_threshold: float | None,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor]:
    from kernels.block_sparse_attention import triton_impl

    q_means = triton_impl.block_means(q, block_q) if q_means is None else q_means
    k_means = triton_impl.block_means(k, block_k) if k_means is None else k_means
    return triton_impl.choose_blocks(q_means, k_means, top=top, cdf_threshold=cdf_threshold)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, top, cdf_threshold, block_q, block_k, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.numbers = top, cdf_threshold, block_q, block_k


def _backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _attend_backward(*ctx.saved_tensors, d_out, *ctx.numbers)
    return (*gradients, *[None] * 7)


_attend.register_autograd(_backward, setup_context=_save_for_backward)


def _attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sparsity: float | None,
    cdf: float | None,
    block_q: int,
    block_k: int,
    q_means: Tensor | None,
    k_means: Tensor | None,
) -> Tensor:
    q_blocks, k_blocks, v_blocks = (
        x.unflatten(2, (-1, block)) for x, block in ((q, block_q), (k, block_k), (v, block_k))
    )
    q_means = reference.block_means(q_blocks) if q_means is None else q_means
    k_means = reference.block_means(k_blocks) if k_means is None else k_means
    kept, valid = reference.choose_blocks(q_means, k_means, sparsity=sparsity, cdf_threshold=cdf)
    return reference.attend_to_blocks(q_blocks, k_blocks, v_blocks, kept, valid).flatten(2, 3)


def _check_grid(name: str, tokens: Tensor, grid: Grid, chunk: Grid) -> None:
    if tokens.shape[2] != grid[0] * grid[1] * grid[2]:
        raise ValueError(f"{name}: {tokens.shape[2]} tokens do not fill the grid {grid}")
    if any(size % step for size, step in zip(grid, chunk, strict=True)):
        raise ValueError(f"{name}: the grid {grid} (t, h, w tokens) does not divide into blocks of {chunk}")
