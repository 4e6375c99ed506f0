"""The diffusion transformer of LongCat-Video, with the official state-dict names.

The network predicts x0 - noise, the negative of the scheduler's velocity. One model serves text, image,
continuation and refinement: the first `num_cond_latents` latent frames are clean conditions with timestep 0,
whose tokens see only each other and no text. Nothing about them changes between steps, so `build_cond_cache`
runs them once.

Legend: B batch, T/H/W latent frames/rows/columns, t/h/w token grid, S = h*w tokens of a latent frame, N
tokens in (t,h,w) order, C channels, D head size, L text tokens. The stream is in the type of the weights;
norms, modulation, timestep embedding and final layer are computed in fp32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.block_sparse_attention.api import block_sparse_attention
from model.config import DiTConfig
from model.errors import InputError

Attention = Literal["dense", "block_sparse"]
Grid = tuple[int, int, int]

_NORM_EPS = 1e-6
_MAX_TIMESTEP_PERIOD = 10_000
_ROTARY_BASE = 10_000.0


@dataclasses.dataclass(frozen=True)
class CondCache:
    """Keys (after RMSNorm, before rotary) and values of the condition tokens: one [B,heads,N,D] each for
    every layer.

    `grid`: the token grid (t, h, w) of the conditions. A cache of batch 1 serves any batch.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    grid: Grid


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
        x = self.x_embedder(latents)
        t = self.t_embedder(timestep)
        y, keep = self._embed_text(text, text_mask)
        for i, block in enumerate(self.blocks):
            memory = (
                None if cond_cache is None else (cond_cache.keys[i], cond_cache.values[i], cond_cache.grid[0])
            )
            place = Place(grid, num_cond_latents, memory, self.attention)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, t, y, keep, place, use_reentrant=False)
            else:
                x = block(x, t, y, keep, place)
        return self._unpatchify(self.final_layer(x, t, grid[0]), grid)

    @torch.no_grad()
    def build_cond_cache(self, cond_latents: Tensor) -> CondCache:
        """Run clean condition latents [B,16,Tc,H,W] once, without text; keep what later steps attend to."""
        frames = cond_latents.shape[2]
        grid = self._check(cond_latents, frames, None)
        x = self.x_embedder(cond_latents)
        t = self.t_embedder(torch.zeros(cond_latents.shape[0], device=x.device))
        keys, values = [], []
        for block in self._layers():
            x, k, v = block.run_conditions(x, t, Place(grid, frames, None, self.attention))
            keys.append(k)
            values.append(v)
        return CondCache(tuple(keys), tuple(values), grid)

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
        """Text tokens [B,L,C] and which of them are keys, [B,1,1,L] or None for all."""
        y = self.y_embedder(text[:, 0].to(self.dtype))
        mask = text_mask.bool()
        if self.config.text_tokens_zero_pad:
            return y * mask[..., None], None
        return y, None if bool(mask.all()) else mask[:, None, None, :]

    def _unpatchify(self, x: Tensor, grid: Grid) -> Tensor:
        (t, h, w), (_, ph, pw) = grid, self.config.patch_size
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


@dataclasses.dataclass(frozen=True)
class Place:
    """Where tokens stand: their grid, leading condition frames, and cached (k, v, frames) before them."""

    grid: Grid
    num_cond: int
    memory: tuple[Tensor, Tensor, int] | None
    attention: Attention

    @property
    def num_cond_tokens(self) -> int:
        return self.num_cond * self.grid[1] * self.grid[2]


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

    def forward(self, x: Tensor, t: Tensor, y: Tensor, keep: Tensor | None, place: Place) -> Tensor:
        """x [B,N,C], t [B,1 or T,adaln], y [B,L,C] -> [B,N,C]."""
        mod = self.adaLN_modulation(t).chunk(6, dim=-1)
        q, k, v = self.attn.project(modulate(x, mod[0], mod[1]))
        x = add_gated(x, mod[2], self.attn.attend(q, k, v, place))
        if place.num_cond_tokens < x.shape[1]:
            x = self._add_text(x, y, keep, place.num_cond_tokens)
        return add_gated(x, mod[5], self.ffn(modulate(x, mod[3], mod[4])))

    def run_conditions(self, x: Tensor, t: Tensor, place: Place) -> tuple[Tensor, Tensor, Tensor]:
        """The block over condition tokens alone: the stream, and k (before rotary) and v [B,heads,N,D]."""
        mod = self.adaLN_modulation(t).chunk(6, dim=-1)
        q, k, v = self.attn.project(modulate(x, mod[0], mod[1]))
        x = add_gated(x, mod[2], self.attn.attend(q, k, v, place))
        return add_gated(x, mod[5], self.ffn(modulate(x, mod[3], mod[4]))), k, v

    def _add_text(self, x: Tensor, y: Tensor, keep: Tensor | None, num_cond_tokens: int) -> Tensor:
        noisy = x[:, num_cond_tokens:]
        norm = self.pre_crs_attn_norm
        weight, bias = norm.weight.float(), norm.bias.float()
        normed = F.layer_norm(noisy.float(), (x.shape[-1],), weight, bias, norm.eps).to(x.dtype)
        noisy = noisy + self.cross_attn(normed, y, keep)
        return torch.cat([x[:, :num_cond_tokens], noisy], dim=1) if num_cond_tokens else noisy


class SelfAttention(nn.Module):
    """Attention over video tokens, rotary in 3-D. Condition queries see condition keys, others all keys."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads, self.bsa = config.num_heads, config.bsa_params
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.q_norm = HeadNorm(config.head_dim)
        self.k_norm = HeadNorm(config.head_dim)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,N,C] -> q, k (normalised, not rotated), v, each [B,heads,N,D]."""
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.q_norm(q), self.k_norm(k), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, place: Place) -> Tensor:
        """[B,heads,N,D] -> [B,N,C] after the output projection."""
        (frames, h, w), past = place.grid, 0
        if place.memory is not None:
            cached_k, cached_v, past = place.memory
            k = torch.cat([cached_k.expand(k.shape[0], -1, -1, -1), k], dim=2)
            v = torch.cat([cached_v.expand(v.shape[0], -1, -1, -1), v], dim=2)
        q = rotate(q, rotary_table(past, frames, h, w, q.shape[-1], q.device))
        k = rotate(k, rotary_table(0, past + frames, h, w, k.shape[-1], k.device))
        n, grid_k = place.num_cond_tokens, (past + frames, h, w)
        if 0 < n < q.shape[2]:
            grid_c, grid_n = (place.num_cond, h, w), (frames - place.num_cond, h, w)
            seen = self._attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], grid_c, grid_c, place.attention)
            out = torch.cat(
                [seen, self._attention(q[:, :, n:], k, v, grid_n, grid_k, place.attention)], dim=2
            )
        else:
            out = self._attention(q, k, v, place.grid, grid_k, place.attention)
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, grid_q: Grid, grid_k: Grid, how: Attention
    ) -> Tensor:
        # A single latent frame has no blocks in time: the model was trained with dense attention there.
        if how == "dense" or grid_q[0] == 1:
            return F.scaled_dot_product_attention(q, k, v)
        return block_sparse_attention(
            q,
            k,
            v,
            grid_q,
            grid_k,
            sparsity=self.bsa.sparsity,
            cdf_threshold=self.bsa.cdf_threshold,
            chunk_q=self.bsa.chunk_3d_shape_q,
            chunk_k=self.bsa.chunk_3d_shape_k,
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

    def forward(self, x: Tensor, y: Tensor, keep: Tensor | None) -> Tensor:
        """x [B,N,C], y [B,L,C], keep [B,1,1,L] or None -> [B,N,C]."""
        q = self.q_linear(x).view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
        k, v = self.kv_linear(y).view(*y.shape[:2], 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=keep)
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), without biases."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class FinalLayer(nn.Module):
    """LayerNorm, shift and scale by the timestep, Linear to the values of a patch; all fp32."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), Fp32Linear(config.adaln_tembed_dim, 2 * config.hidden_size)
        )
        self.linear = Fp32Linear(config.hidden_size, math.prod(config.patch_size) * config.out_channels)

    def forward(self, x: Tensor, t: Tensor, frames: int) -> Tensor:
        shift, scale = self.adaLN_modulation(t).chunk(2, dim=-1)
        out: Tensor = self.linear(modulate(x.float(), shift, scale))
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
    """RMSNorm over the head size, shared by the heads, in fp32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), _NORM_EPS).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm (no affine) of x [B,N,C], times (1 + scale), plus shift; both fp32 [B,1 or T,C]."""
    normed = F.layer_norm(x.float(), (x.shape[-1],), eps=_NORM_EPS)
    framed = normed.view(x.shape[0], shift.shape[1], -1, x.shape[-1])
    return torch.addcmul(shift[:, :, None], framed, 1 + scale[:, :, None]).view(x.shape).to(x.dtype)


def add_gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update in fp32, back in the type of x; gate [B,1 or T,C]."""
    framed = (x.shape[0], gate.shape[1], -1, x.shape[-1])
    out = torch.addcmul(x.float().view(framed), gate[:, :, None], update.float().view(framed))
    return out.view(x.shape).to(x.dtype)


@functools.lru_cache(maxsize=8)
def rotary_table(first_frame: int, t: int, h: int, w: int, size: int, device: torch.device) -> Tensor:
    """exp(i angle) [N,size/2] for tokens in (t,h,w) order; positions in time start at `first_frame`, in
    space at 0.

    The axes get 2*(size//6) values each for rows and columns and the rest for time, in the order t, h, w.
    """
    spatial = 2 * (size // 6)
    axes = ((first_frame, t, size - 2 * spatial), (0, h, spatial), (0, w, spatial))
    angles = []
    # Cached tables outlive the call: they must not become inference tensors, nor follow a default device.
    with torch.inference_mode(False), torch.device("cpu"):
        for axis, (first, count, width) in enumerate(axes):
            frequencies = 1.0 / _ROTARY_BASE ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
            shape = [1, 1, 1, -1]
            shape[axis] = count
            place = torch.arange(first, first + count, dtype=torch.float32)
            angles.append((place[:, None] * frequencies).view(shape).expand(t, h, w, -1))
        table = torch.cat(angles, dim=-1).view(t * h * w, size // 2)
        return torch.polar(torch.ones_like(table), table).to(device)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs (even, odd) of x [B,heads,N,D] by the angles of `table`, in fp32.

    As a product of complex numbers: several times faster on a CPU than with the pairs taken apart.
    """
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)
