"""The diffusion transformer of LongCat-Video, with the official state-dict names.

The network predicts x0 - noise, the negative of the scheduler's velocity. One model serves text, image,
continuation and refinement: the first `num_cond_latents` latent frames are clean conditions with timestep 0,
whose tokens see only each other and no text. Nothing about them changes between steps, so `build_cond_cache`
runs them once.

Where attention is block-sparse the tokens are brought into block order once, after the patch embedding, and
back before the last reshape: each part (conditions, noise) that divides into blocks stands block after block, so
that no layer has anything to repack. `Layout` says where each token stands.

Legend: B batch, T/H/W latent frames/rows/columns, t/h/w token grid, S = h*w tokens of a latent frame, N
tokens in the order of the layout, C channels, D head size, L text tokens. The stream is in the type of the
weights; norms, modulation, timestep embedding and final layer are computed in fp32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.attention.api import attend
from kernels.block_sparse_attention.api import attend_in_block_order, block_order
from kernels.linear.api import Activations, QuantisedRows
from kernels.modulate.api import add_gated, add_gated_modulate, add_gated_norm, modulate
from kernels.norm_rope.api import norm_rope
from kernels.swiglu.api import swiglu, swiglu_quantised
from model.config import BlockSparseConfig, DiTConfig
from model.errors import InputError

Attention = Literal["dense", "block_sparse"]
Grid = tuple[int, int, int]

PART_TOKENS = 40_960
"""What is wider than the stream (queries, keys and values together, the rows of the feed-forward part) is made for so
many tokens at a time. Whole blocks, and enough rows for any GPU. Only where no gradient needs them all."""

_NORM_EPS = 1e-6
_MAX_TIMESTEP_PERIOD = 10_000
_ROTARY_BASE = 10_000.0
# Queries and keys are rounded to the type of the weights after the norm and after rotary.
_ROUNDING = 1.01


class Memory(NamedTuple):
    """What queries attend to: keys (after RMSNorm and rotary) and values [B,heads,N,D], and the fp32 means of the keys
    by block [B,heads,n,D] where the layout has them."""

    keys: Tensor
    values: Tensor
    means: Tensor | None

    def first(self, tokens: int, block: int | None) -> Memory:
        """The memory of the first `tokens` alone."""
        means = None if self.means is None or block is None else self.means[:, :, : tokens // block]
        return Memory(self.keys[:, :, :tokens], self.values[:, :, :tokens], means)

    def then(self, own: Memory) -> Memory:
        """This memory, of batch 1 or that of `own` and from whatever device, and `own` after it."""
        means = None
        if self.means is not None and own.means is not None:
            means = _beside(self.means, own.means)
        return Memory(_beside(self.keys, own.keys), _beside(self.values, own.values), means)

    def kept(self, *, on_host: bool) -> Memory:
        """A copy that holds these bytes alone: what a layer leaves are slices of all that it projected."""
        copy = _copy_to_host if on_host else _compact
        return Memory(copy(self.keys), copy(self.values), None if self.means is None else copy(self.means))


@dataclasses.dataclass(frozen=True)
class CondCache:
    """What noise tokens attend to of the conditions, for every layer, rotated once and for all.

    `grid`: the token grid (t, h, w) of the conditions; `attention`: the kind that it was made under, which settles
    the order of the tokens. A cache of batch 1 serves any batch. It may lie in host memory: each layer then brings
    its own part to the device.
    """

    layers: tuple[Memory, ...]
    grid: Grid
    attention: Attention


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the tokens of a call stand.

    `grid`: their token grid; `num_cond`: leading condition frames among them; `order`: the (t,h,w) index of each
    token, None for (t,h,w) order; `frame`: the latent frame of each, None for equal runs; `rotary` [N,D/2,2]: cosine
    and sine of each; `sparse`: how block-sparse attention is made, None for dense; `means_block`: tokens of a block
    where all of them stand in blocks.
    """

    grid: Grid
    num_cond: int
    order: Tensor | None
    frame: Tensor | None
    rotary: Tensor
    sparse: BlockSparseConfig | None
    means_block: int | None

    @property
    def num_cond_tokens(self) -> int:
        return self.num_cond * self.grid[1] * self.grid[2]


class DiT(nn.Module):
    """The network. `attention` picks dense or block-sparse self-attention, which goes with the weights' role.

    Can be built on the meta device: there are no buffers, rotary tables are made when first needed. Weights
    are left at torch's defaults; `init_weights` sets them for training from scratch.
    """

    def __init__(self, config: DiTConfig, attention: Attention = "dense") -> None:
        super().__init__()
        self.config = config
        self.attention: Attention = attention
        self.gradient_checkpointing = False
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config)
        self.y_embedder = TextEmbedder(config)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.final_layer = FinalLayer(config)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        text_mask: Tensor,
        *,
        num_cond_latents: int = 0,
        cond_cache: CondCache | None = None,
    ) -> Tensor:
        """Predict x0 - noise: latents [B,16,T,H,W] -> fp32 [B,16,T,H,W].

        timestep on 0..1000: [B] for all latent frames alike (conditions included), or [B,T]. text
        [B,1,L,caption], text_mask [B,L] with 1 for valid tokens. Conditions are either the first
        `num_cond_latents` frames of `latents`, or in `cond_cache` and then not in `latents`.
        """
        grid = self._check(latents, num_cond_latents, cond_cache)
        layout = self._layout(grid, num_cond_latents, 0 if cond_cache is None else cond_cache.grid[0], latents.device)
        x = self._embed(latents, layout)
        t = self.t_embedder(timestep)
        y, keep = self._embed_text(text, text_mask)
        for i, block in enumerate(self.blocks):
            memory = None if cond_cache is None else cond_cache.layers[i]
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, _ = checkpoint(block, x, t, y, keep, layout, memory, use_reentrant=False)
            else:
                x, _ = block(x, t, y, keep, layout, memory)
        return self._unpatchify(self.final_layer(x, t, layout), layout)

    @torch.no_grad()
    def build_cond_cache(self, cond_latents: Tensor, *, on_host: bool = False) -> CondCache:
        """Run clean condition latents [B,16,Tc,H,W] once, without text; keep what later steps attend to, on the device
        or in host memory.
        """
        frames = cond_latents.shape[2]
        grid = self._check(cond_latents, frames, None)
        layout = self._layout(grid, frames, 0, cond_latents.device)
        x = self._embed(cond_latents, layout)
        t = self.t_embedder(torch.zeros(cond_latents.shape[0], device=x.device))
        layers = []
        for block in self._layers():
            x, own = block(x, t, None, None, layout, None)
            layers.append(own.kept(on_host=on_host))
            del own
        return CondCache(tuple(layers), grid, self.attention)

    def bound_logits(self) -> None:
        """Let the kernels of attention do without a running maximum where the norms of queries and keys allow it.

        After RMSNorm no |q| exceeds D^1/2 max|w|, and rotary keeps lengths: |q.k| D^-1/2 <= D^1/2 max|w_q| max|w_k|.
        To be called again when the weights of these norms change.
        """
        for block in self._layers():
            heads = block.attn
            weights = (heads.q_norm.weight, heads.k_norm.weight)
            largest = [float(weight.detach().abs().max()) for weight in weights]
            heads.logit_bound = _ROUNDING * self.config.head_dim**0.5 * largest[0] * largest[1]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stream. Read from the patch embedding, which int8 leaves as it is."""
        return self.x_embedder.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.x_embedder.proj.weight.device

    def init_weights(self) -> None:
        """Start values for training: Xavier matrices; gates, text branch and output start at zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for index in (0, 2):
            nn.init.normal_(self.t_embedder.mlp[index].get_parameter("weight"), std=0.02)
        silent = [self.final_layer.linear, self.final_layer.adaLN_modulation[1]]
        for block in self._layers():
            silent += [block.adaLN_modulation[1], block.cross_attn.proj]
        for layer in silent:
            nn.init.zeros_(layer.get_parameter("weight"))

    def _layers(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def _embed_text(self, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Text tokens [B,L,C] and which of them are keys, [B,1,1,L] or None where all are by design."""
        y = self.y_embedder(text[:, 0].to(self.dtype))
        mask = text_mask.bool()
        if self.config.text_tokens_zero_pad:
            return y * mask[..., None], None
        return y, mask[:, None, None, :]

    def _layout(self, grid: Grid, num_cond: int, past: int, device: torch.device) -> Layout:
        rotary = rotary_table(past, *grid, self.config.head_dim, device)
        if self.attention == "dense":
            return Layout(grid, num_cond, None, None, rotary, None, None)
        sparse = self.config.bsa_params
        chunk, space = sparse.chunk_3d_shape_q, grid[1] * grid[2]
        parts = [frames for frames in (num_cond, grid[0] - num_cond) if frames]
        whole = [not any(n % step for n, step in zip((t, *grid[1:]), chunk, strict=True)) for t in parts]
        orders = [
            block_order((t, *grid[1:]), chunk, device) if fits else torch.arange(t * space, device=device)
            for t, fits in zip(parts, whole, strict=True)
        ]
        order = orders[0] if len(orders) == 1 else torch.cat([orders[0], orders[1] + num_cond * space])
        block = math.prod(chunk)
        # The kernels sum over blocks whose size is a power of two.
        means_block = block if all(whole) and block & (block - 1) == 0 else None
        return Layout(grid, num_cond, order, (order // space).int(), rotary[order], sparse, means_block)

    def _embed(self, latents: Tensor, layout: Layout) -> Tensor:
        """Latents -> tokens [B,N,C] in the order of the layout."""
        x: Tensor = self.x_embedder(latents)
        return x if layout.order is None else x.index_select(1, layout.order)

    def _unpatchify(self, x: Tensor, layout: Layout) -> Tensor:
        if layout.order is not None:
            x = x.index_select(1, layout.order.argsort())
        (t, h, w), (_, ph, pw) = layout.grid, self.config.patch_size
        x = x.view(x.shape[0], t, h, w, ph, pw, self.config.out_channels)
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(x.shape[0], self.config.out_channels, t, h * ph, w * pw)

    def _check(self, latents: Tensor, num_cond_latents: int, cond_cache: CondCache | None) -> Grid:
        _, ph, pw = self.config.patch_size
        _, channels, frames, rows, columns = latents.shape
        if channels != self.config.in_channels:
            raise InputError(f"latents: {channels} channels, wanted {self.config.in_channels}")
        if rows % ph or columns % pw:
            raise InputError(f"latents: {rows}x{columns} is no multiple of the patch {ph}x{pw}")
        if not 0 <= num_cond_latents <= frames:
            raise InputError(f"num_cond_latents: {num_cond_latents} is not in 0..{frames}")
        grid = (frames, rows // ph, columns // pw)
        if cond_cache is not None and (num_cond_latents or cond_cache.grid[1:] != grid[1:]):
            raise InputError(
                f"cond_cache: grid {cond_cache.grid} with {num_cond_latents} conditions does not fit {grid}"
            )
        if cond_cache is not None and cond_cache.attention != self.attention:
            raise InputError(f"cond_cache: was made for {cond_cache.attention} attention, wanted {self.attention}")
        if self.attention == "block_sparse":
            self._check_blocks(grid, num_cond_latents, 0 if cond_cache is None else cond_cache.grid[0])
        return grid

    def _check_blocks(self, grid: Grid, num_cond: int, cached: int) -> None:
        """Parts of more than one frame run block-sparse: they and their keys must divide into blocks."""
        chunk = self.config.bsa_params.chunk_3d_shape_q
        noisy = grid[0] - num_cond
        parts = [num_cond] if num_cond > 1 else []
        parts += [noisy, grid[0] + cached] if noisy > 1 else []
        if any(size % step for n in parts for size, step in zip((n, *grid[1:]), chunk, strict=True)):
            raise InputError(
                f"latents: token grid {grid} after {num_cond + cached} condition frames does not divide "
                f"into the blocks {chunk} of block-sparse attention"
            )


class Block(nn.Module):
    """Self-attention, cross-attention to the text, SwiGLU; the timestep modulates the first and last."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Fp32Linear(config.adaln_tembed_dim, 6 * width))
        self.attn = SelfAttention(config)
        self.pre_crs_attn_norm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.cross_attn = CrossAttention(config)
        self.ffn = SwiGLU(width, config.ffn_dim)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None, keep: Tensor | None, layout: Layout, memory: Memory | None
    ) -> tuple[Tensor, Memory | None]:
        """x [B,N,C], t [B,1 or T,adaln], y [B,L,C] or None for conditions alone -> the stream [B,N,C] and, of such
        conditions, what their tokens leave to attend to; `memory` comes before the tokens.
        """
        mod = self.adaLN_modulation(t).chunk(6, dim=-1)
        text = None if y is None or layout.num_cond_tokens == x.shape[1] else (y, keep)
        x, normed, own = self._attend(x, mod, text, layout, memory)
        return add_gated(x, mod[5], self.ffn(normed), index=layout.frame), own if y is None else None

    def _attend(
        self,
        x: Tensor,
        mod: tuple[Tensor, ...],
        text: tuple[Tensor, Tensor | None] | None,
        layout: Layout,
        memory: Memory | None,
    ) -> tuple[Tensor, Activations, Memory | None]:
        """The stream after attention to video and text, what the FFN reads of it, and keys and values where there is no
        text. At the sizes of real films each of these is more than 1 GB: names are given up as early as can be.
        """
        norm, frame, n = self.pre_crs_attn_norm, layout.frame, layout.num_cond_tokens
        wanted, wide = _activations_of(self.attn.qkv), _activations_of(self.ffn.w1)
        update, own = self.attn(
            modulate(x, mod[0], mod[1], index=frame, eps=_NORM_EPS, quantise=wanted), layout, memory
        )
        if text is None:
            return *add_gated_modulate(
                x, mod[2], update, mod[3], mod[4], index=frame, eps=_NORM_EPS, quantise=wide
            ), own
        del own
        # Conditions in the sequence see no text: the Linear quantises what is left of the rows itself.
        quantise = None if n else _activations_of(self.cross_attn.q_linear)
        x, normed = add_gated_norm(
            x, mod[2], update, norm.weight, norm.bias, index=frame, eps=_NORM_EPS, quantise=quantise
        )
        del update
        if isinstance(normed, Tensor) and n:
            x = torch.cat([x[:, :n], x[:, n:] + self.cross_attn(normed[:, n:], *text)], dim=1)
            return x, modulate(x, mod[3], mod[4], index=frame, eps=_NORM_EPS, quantise=wide), None
        update = self.cross_attn(normed, *text)
        del normed
        return *add_gated_modulate(x, None, update, mod[3], mod[4], index=frame, eps=_NORM_EPS, quantise=wide), None


class SelfAttention(nn.Module):
    """Attention over video tokens, rotary in 3-D. Condition queries see condition keys, others all keys."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.logit_bound: float | None = None  # no |q.k| D^-1/2 exceeds it; see DiT.bound_logits
        self.in_parts = True  # more than PART_TOKENS tokens are projected in parts
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.q_norm = HeadNorm(config.head_dim)
        self.k_norm = HeadNorm(config.head_dim)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Activations, layout: Layout, memory: Memory | None) -> tuple[Tensor, Memory]:
        """x [B,N,C] -> [B,N,C] after the output projection, and the keys and values of these tokens."""
        out, own = self._attend_all(x, layout, memory)
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected, own

    def _attend_all(self, x: Activations, layout: Layout, memory: Memory | None) -> tuple[Tensor, Memory]:
        """What attention gives [B,heads,N,D], and the keys and values of these tokens."""
        if self.in_parts and layout.rotary.shape[0] > PART_TOKENS and not torch.is_grad_enabled():
            q, q_means, own, seen = self._project_in_parts(x, layout, memory)
        else:
            q, q_means, own = self._project(x, layout.rotary, layout.means_block)
            seen = own if memory is None else memory.then(own)
        block, n = layout.means_block, layout.num_cond_tokens
        if 0 < n < q.shape[2]:
            means = (None, None) if q_means is None or block is None else q_means.split(
                (n // block, q_means.shape[2] - n // block), dim=2
            )
            conditions = self._attend(q[:, :, :n], means[0], own.first(n, block), layout.num_cond, layout.sparse)
            noisy = layout.grid[0] - layout.num_cond
            return torch.cat([conditions, self._attend(q[:, :, n:], means[1], seen, noisy, layout.sparse)], dim=2), own
        return self._attend(q, q_means, seen, layout.grid[0], layout.sparse), own

    def _project(self, x: Activations, rotary: Tensor, block: int | None) -> tuple[Tensor, Tensor | None, Memory]:
        """Queries with their block means, and keys and values, of tokens whose rotary table this is."""
        q, k, v = _split_heads(self.qkv(x), 3, self.num_heads)
        q, q_means = norm_rope(q, self.q_norm.weight, rotary, eps=_NORM_EPS, block=block)
        k, k_means = norm_rope(k, self.k_norm.weight, rotary, eps=_NORM_EPS, block=block)
        return q, q_means, Memory(k, v, k_means)

    def _project_in_parts(
        self, x: Activations, layout: Layout, memory: Memory | None
    ) -> tuple[Tensor, Tensor | None, Memory, Memory]:
        """Queries, their block means, own keys and values, and all that is seen, `memory` first.

        As many tokens at a time as keep the fused projection small; keys and values are written where attention reads
        them, behind those of `memory`: nothing is there twice.
        """
        tokens, past = layout.rotary.shape[0], 0 if memory is None else memory.keys.shape[2]
        q = k = v = torch.empty(0)
        means: tuple[list[Tensor], list[Tensor]] = ([], [])
        for start in range(0, tokens, PART_TOKENS):
            part = slice(start, min(start + PART_TOKENS, tokens))
            here = slice(past + part.start, past + part.stop)
            part_q, q_means, own = self._project(_rows(x, part), layout.rotary[part], layout.means_block)
            if start == 0:
                q, k, v = _room(part_q, tokens), _room(part_q, past + tokens), _room(part_q, past + tokens)
            q[:, :, part], k[:, :, here], v[:, :, here] = part_q, own.keys, own.values
            if q_means is not None and own.means is not None:
                means[0].append(q_means)
                means[1].append(own.means)
            del part_q, own
        own = Memory(k[:, :, past:], v[:, :, past:], torch.cat(means[1], dim=2) if means[1] else None)
        all_means = torch.cat(means[0], dim=2) if means[0] else None
        if memory is None:
            return q, all_means, own, own
        k[:, :, :past], v[:, :, :past] = memory.keys, memory.values
        seen_means = None
        if memory.means is not None and own.means is not None:
            seen_means = _beside(memory.means, own.means)
        return q, all_means, own, Memory(k, v, seen_means)

    def _attend(
        self, q: Tensor, q_means: Tensor | None, seen: Memory, frames: int, sparse: BlockSparseConfig | None
    ) -> Tensor:
        # A single latent frame has no blocks in time: the model was trained with dense attention there.
        if sparse is None or frames == 1:
            return attend(q, seen.keys, seen.values, logit_bound=self.logit_bound)
        return attend_in_block_order(
            q,
            seen.keys,
            seen.values,
            sparsity=sparse.sparsity,
            cdf_threshold=sparse.cdf_threshold,
            block_q=math.prod(sparse.chunk_3d_shape_q),
            block_k=math.prod(sparse.chunk_3d_shape_k),
            q_means=q_means,
            k_means=seen.means,
            logit_bound=self.logit_bound,
        )


class CrossAttention(nn.Module):
    """Attention from video tokens to text tokens, without positions."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_linear = nn.Linear(config.hidden_size, config.hidden_size)
        self.kv_linear = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.q_norm = HeadNorm(config.head_dim)
        self.k_norm = HeadNorm(config.head_dim)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Activations, y: Tensor, keep: Tensor | None) -> Tensor:
        """x [B,N,C], y [B,L,C], keep [B,1,1,L] or None -> [B,N,C]."""
        k, v = _split_heads(self.kv_linear(y), 2, self.num_heads)
        k, _ = norm_rope(k, self.k_norm.weight, None, eps=_NORM_EPS)
        return _in_parts(lambda part: self._attend(part, k, v, keep), x)

    def _attend(self, x: Activations, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        (q,) = _split_heads(self.q_linear(x), 1, self.num_heads)
        q, _ = norm_rope(q, self.q_norm.weight, None, eps=_NORM_EPS)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), without biases."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)

    def forward(self, x: Activations) -> Tensor:
        """x [B,N,C] -> [B,N,C]."""
        return _in_parts(self._widen, x)

    def _widen(self, x: Activations) -> Tensor:
        gate, value, wanted = self.w1(x), self.w3(x), _activations_of(self.w2)
        out: Tensor = self.w2(swiglu(gate, value) if wanted is None else swiglu_quantised(gate, value, wanted))
        return out


class FinalLayer(nn.Module):
    """LayerNorm, shift and scale by the timestep, Linear to the values of a patch; all fp32."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), Fp32Linear(config.adaln_tembed_dim, 2 * config.hidden_size)
        )
        self.linear = Fp32Linear(config.hidden_size, math.prod(config.patch_size) * config.out_channels)

    def forward(self, x: Tensor, t: Tensor, layout: Layout) -> Tensor:
        shift, scale = self.adaLN_modulation(t).chunk(2, dim=-1)
        out: Tensor = self.linear(modulate(x.float(), shift, scale, index=layout.frame, eps=_NORM_EPS))
        return out


class PatchEmbed(nn.Module):
    """Latents [B,16,T,H,W] -> tokens [B,N,C]. Patches do not overlap: it is one matrix product."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, self.patch, stride=self.patch)

    def forward(self, latents: Tensor) -> Tensor:
        b, c, t, rows, columns = latents.shape
        _, ph, pw = self.patch
        patches = latents.view(b, c, t, rows // ph, ph, columns // pw, pw).permute(0, 2, 3, 5, 1, 4, 6)
        flat = patches.reshape(b, -1, c * ph * pw).to(self.proj.weight.dtype)
        return F.linear(flat, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Timesteps on 0..1000, [B] or [B,T] -> fp32 vectors [B,1 or T,adaln]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.size, width = config.frequency_embedding_size, config.adaln_tembed_dim
        self.mlp = nn.Sequential(Fp32Linear(self.size, width), nn.SiLU(), Fp32Linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        # One vector for all frames where they share the timestep: modulation then costs next to nothing.
        timestep = timestep.float() if timestep.ndim == 2 else timestep.float()[:, None]
        half = self.size // 2
        exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
        angles = timestep[..., None] * torch.exp(-math.log(_MAX_TIMESTEP_PERIOD) * exponent)
        out: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))
        return out


class TextEmbedder(nn.Module):
    """Text encoder states [B,L,caption] -> [B,L,C]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.y_proj = nn.Sequential(
            nn.Linear(config.caption_channels, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )

    def forward(self, text: Tensor) -> Tensor:
        out: Tensor = self.y_proj(text)
        return out


class Fp32Linear(nn.Linear):
    """A Linear computed in fp32 whatever the type of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class HeadNorm(nn.Module):
    """The weight of an RMSNorm over the head size, shared by the heads; `norm_rope` computes it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


def rotary_table(first_frame: int, t: int, h: int, w: int, size: int, device: torch.device) -> Tensor:
    """Cosine and sine [N,size/2,2], fp32, for tokens in (t,h,w) order; positions in time start at `first_frame`, in
    space at 0.

    The axes get 2*(size//6) values each for rows and columns and the rest for time, in the order t, h, w.
    """
    spatial = 2 * (size // 6)
    axes = ((first_frame, t, size - 2 * spatial), (0, h, spatial), (0, w, spatial))
    turns = []
    for axis, (first, count, width) in enumerate(axes):
        frequencies = 1.0 / _ROTARY_BASE ** (torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
        angles = torch.arange(first, first + count, dtype=torch.float32, device=device)[:, None] * frequencies
        shape = [1, 1, 1, width // 2, 2]
        shape[axis] = count
        turns.append(torch.stack((angles.cos(), angles.sin()), dim=-1).view(shape).expand(t, h, w, -1, -1))
    return torch.cat(turns, dim=3).view(t * h * w, size // 2, 2)


def _split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """[B,N,parts*C] -> `parts` views [B,heads,N,D]."""
    return x.view(*x.shape[:2], parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _beside(first: Tensor, second: Tensor) -> Tensor:
    """Tokens [B or 1,heads,N,D] from whatever device and more [B,heads,M,D] -> [B,heads,N+M,D]."""
    return torch.cat([first.to(second.device).expand(second.shape[0], -1, -1, -1), second], dim=2)


def _in_parts(compute: Callable[[Activations], Tensor], x: Activations) -> Tensor:
    """What `compute` makes of the tokens of x [B,N,C], each by itself: of at most PART_TOKENS at a time, so that what
    it holds meanwhile is no larger. With gradients all at once, which need that anyway."""
    tokens = (x if isinstance(x, Tensor) else x.values).shape[1]
    if tokens <= PART_TOKENS or torch.is_grad_enabled():
        return compute(x)
    rows = compute(_rows(x, slice(0, PART_TOKENS)))
    out = rows.new_empty(rows.shape[0], tokens, rows.shape[2])
    out[:, :PART_TOKENS] = rows
    del rows
    for start in range(PART_TOKENS, tokens, PART_TOKENS):
        part = slice(start, start + PART_TOKENS)
        out[:, part] = compute(_rows(x, part))
    return out


def _rows(x: Activations, part: slice) -> Activations:
    """Some tokens of x [B,N,C]."""
    return x[:, part] if isinstance(x, Tensor) else QuantisedRows(x.values[:, part], x.scale[:, part], x.dtype)


def _room(like: Tensor, tokens: int) -> Tensor:
    """Memory [B,heads,`tokens`,D] in which the heads of a token lie side by side."""
    batch, heads, _, size = like.shape
    return like.new_empty(batch, tokens, heads, size).transpose(1, 2)


def _compact(x: Tensor) -> Tensor:
    return x.contiguous().clone() if x.untyped_storage().nbytes() > x.nbytes else x


def _copy_to_host(x: Tensor) -> Tensor:
    """A copy in host memory, page-locked where a GPU is going to read it."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x)


def _activations_of(layer: nn.Module) -> torch.dtype | None:
    """The type to which a quantised Linear rounds its input; None where it takes it as it is."""
    return getattr(layer, "activations", None)
