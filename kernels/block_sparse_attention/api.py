"""The public calls of block-sparse attention.

`block_sparse_attention` takes tokens in (t, h, w) order; `attend_in_block_order` takes them in the order that
`block_order` gives, in which each block is a run of tokens: a model that puts its tokens into that order once
has nothing to repack in any layer. Which implementation a call takes is what `backend` says.

Shapes: B batch, H heads, N tokens, D head size, n blocks. Grids and chunks are (t, h, w) counts of tokens.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Literal

import torch
from torch import Tensor

from kernels.block_sparse_attention import reference

Grid = tuple[int, int, int]
Backend = Literal["triton_tma", "triton", "reference"]

_KERNEL_TYPES = (torch.float16, torch.bfloat16, torch.float32)
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
    chosen = backend(q, k, v, block_q=block_q, block_k=block_k)
    if chosen == "reference":
        return _attend_reference(q, k, v, sparsity, cdf_threshold, block_q, block_k)
    from kernels.block_sparse_attention import triton_impl

    with torch.no_grad():
        q_means = triton_impl.block_means(q, block_q) if q_means is None else q_means
        k_means = triton_impl.block_means(k, block_k) if k_means is None else k_means
        top = reference.blocks_to_keep(k_means.shape[2], sparsity)
        kept, counts = triton_impl.choose_blocks(q_means, k_means, top=top, cdf_threshold=cdf_threshold)
    out, _ = triton_impl.attend(
        q,
        k,
        v,
        kept,
        counts,
        block_q=block_q,
        block_k=block_k,
        logit_bound=logit_bound,
        descriptors=chosen == "triton_tma",
    )
    return out


def backend(q: Tensor, k: Tensor, v: Tensor, *, block_q: int = 64, block_k: int = 64) -> Backend:
    """What runs for these tensors: the Triton kernel with TMA descriptors, with pointers, or plain torch.

    Descriptors need compute capability 9.0, a head size that is a power of two and 16-byte aligned rows; the
    kernel needs CUDA, blocks of a power of two of at least 16 tokens, and one type of at most 32 bits.
    """
    blocks_fit = all(n >= _SMALLEST_KERNEL_BLOCK and n & (n - 1) == 0 for n in (block_q, block_k))
    types_fit = q.dtype in _KERNEL_TYPES and q.dtype == k.dtype == v.dtype
    if not (q.is_cuda and blocks_fit and types_fit and importlib.util.find_spec("triton")):
        return "reference"
    from kernels.block_sparse_attention import triton_impl

    modern = torch.cuda.get_device_capability(q.device) >= (9, 0)
    return "triton_tma" if modern and triton_impl.fits_descriptors(q, k, v) else "triton"


@functools.lru_cache(maxsize=16)
def block_order(grid: Grid, chunk: Grid = (4, 4, 4)) -> Tensor:
    """int64 [N] on the CPU: entry p is the (t,h,w)-order index of the token that stands at p in block order.

    `x[:, order]` puts tokens into block order and `order // (h*w)` is the frame of each. Do not write to it.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        index = torch.arange(math.prod(grid)).view(1, 1, -1, 1)
        return reference.to_blocks(index, grid, chunk).flatten()


def _attend_reference(
    q: Tensor, k: Tensor, v: Tensor, sparsity: float | None, cdf: float | None, block_q: int, block_k: int
) -> Tensor:
    q_blocks, k_blocks, v_blocks = (
        x.unflatten(2, (-1, block)) for x, block in ((q, block_q), (k, block_k), (v, block_k))
    )
    kept, valid = reference.choose_blocks(q_blocks, k_blocks, sparsity=sparsity, cdf_threshold=cdf)
    return reference.attend_to_blocks(q_blocks, k_blocks, v_blocks, kept, valid).flatten(2, 3)


def _check_grid(name: str, tokens: Tensor, grid: Grid, chunk: Grid) -> None:
    if tokens.shape[2] != grid[0] * grid[1] * grid[2]:
        raise ValueError(f"{name}: {tokens.shape[2]} tokens do not fill the grid {grid}")
    if any(size % step for size, step in zip(grid, chunk, strict=True)):
        raise ValueError(f"{name}: the grid {grid} (t, h, w tokens) does not divide into blocks of {chunk}")
