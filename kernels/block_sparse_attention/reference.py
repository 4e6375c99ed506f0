"""Block-sparse attention in plain torch: the meaning of the operation, and its CPU implementation.

Legend: B batch, H heads, D head size, n blocks of c tokens (nq, nk for queries and keys), m kept key blocks.
All functions are differentiable in the token values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int, int]

# Keys and values of a few query blocks are gathered at a time: they are still in the processor's cache when
# used.
_GATHER_BYTES = 4 * 2**20


def to_blocks(tokens: Tensor, grid: Grid, chunk: Grid) -> Tensor:
    """[B,H,N,D] in (t,h,w) order -> [B,H,n,c,D], each block a box of `chunk` tokens."""
    b, heads, _, d = tokens.shape
    (t, h, w), (ct, ch, cw) = grid, chunk
    boxes = tokens.view(b, heads, t // ct, ct, h // ch, ch, w // cw, cw, d)
    return boxes.permute(0, 1, 2, 4, 6, 3, 5, 7, 8).reshape(b, heads, -1, ct * ch * cw, d)


def from_blocks(blocks: Tensor, grid: Grid, chunk: Grid) -> Tensor:
    """Inverse of to_blocks: [B,H,n,c,D] -> [B,H,N,D]."""
    b, heads, _, _, d = blocks.shape
    (t, h, w), (ct, ch, cw) = grid, chunk
    boxes = blocks.view(b, heads, t // ct, h // ch, w // cw, ct, ch, cw, d)
    return boxes.permute(0, 1, 2, 5, 3, 6, 4, 7, 8).reshape(b, heads, t * h * w, d)


def blocks_to_keep(n_k: int, sparsity: float | None) -> int:
    """How many of n_k key blocks a share of `sparsity` left out keeps for each query block; at least one."""
    # int() as in the official code: the number of blocks is part of the model. It gives 0 for few blocks.
    return 1 if sparsity is None else max(1, int((1 - sparsity) * n_k))


def block_means(blocks: Tensor) -> Tensor:
    """[B,H,n,c,D] -> fp32 means [B,H,n,D]."""
    return blocks.to(torch.promote_types(blocks.dtype, torch.float32)).mean(3)


@torch.no_grad()
def choose_blocks(
    q_means: Tensor, k_means: Tensor, *, sparsity: float | None, cdf_threshold: float | None
) -> tuple[Tensor, Tensor | None]:
    """Kept key blocks from block means [B,H,n,D]: indices [B,H,nq,m], and valid [B,H,nq,m] if some rows keep fewer
    than m."""
    nk, d = k_means.shape[2:]
    scores = q_means @ k_means.transpose(-1, -2)
    top = blocks_to_keep(nk, sparsity)
    if cdf_threshold is None:
        return scores.topk(top, dim=-1).indices, None
    mass, order = (scores * d**-0.5).softmax(-1).sort(dim=-1, descending=True)
    count = (mass.cumsum(-1) <= cdf_threshold).sum(-1).clamp(min=top)
    # A compiled graph has no place for a length that depends on the data: there the lists keep their full width.
    m = nk if torch.compiler.is_compiling() else int(count.max())
    valid = torch.arange(m, device=count.device) < count[..., None]
    return order[..., :m], valid


def attend_to_blocks(
    q_blocks: Tensor, k_blocks: Tensor, v_blocks: Tensor, kept: Tensor, valid: Tensor | None
) -> Tensor:
    """Exact softmax attention of each query block over its kept key blocks: [B,H,nq,cq,D]."""
    b, heads, nq, cq, d = q_blocks.shape
    nk, ck, m = k_blocks.shape[2], k_blocks.shape[3], kept.shape[-1]
    first_row = torch.arange(b * heads, device=kept.device).view(b, heads, 1, 1) * nk
    rows = (kept + first_row).view(-1, m)
    bias = None if valid is None else _padding_bias(valid.view(-1, m), ck, q_blocks.dtype)
    queries = q_blocks.reshape(-1, 1, cq, d)
    keys, values = k_blocks.reshape(-1, ck * d), v_blocks.reshape(-1, ck * d)
    step = max(1, _GATHER_BYTES // (m * ck * d * keys.element_size()))
    outputs = []
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        index = rows[part].reshape(-1)
        near_k = keys.index_select(0, index).view(-1, 1, m * ck, d)
        near_v = values.index_select(0, index).view(-1, 1, m * ck, d)
        near_bias = None if bias is None else bias[part]
        outputs.append(F.scaled_dot_product_attention(queries[part], near_k, near_v, attn_mask=near_bias))
    return torch.cat(outputs).view(b, heads, nq, cq, d)


def _padding_bias(valid: Tensor, ck: int, dtype: torch.dtype) -> Tensor:
    """[rows,m] of kept-or-padding -> additive bias [rows,1,1,m*ck]."""
    bias = torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill_(~valid, float("-inf"))
    return bias.repeat_interleave(ck, dim=-1)[:, None, None, :]
