"""The Wan 2.1 causal video autoencoder: frames in, 16-channel latents out, and back.

Loads the state dict that diffusers' `AutoencoderKLWan` writes. There are two equal ways through it:
`encode` and `decode` take a whole clip (training, short clips), `encode_stream` and `decode_stream` take it
piece by piece, carrying the last frames that each causal layer saw, so that memory does not depend on the
clip's length.

A causal 3-D convolution is computed as a 2-D convolution over the channels of the current and the preceding
frames ("time folded"). Activations are kept as [B,T,H,W,C], which is what a channels-last `conv2d` wants.

Shapes: B batch, F frames, h/w pixels, T/H/W latent frames, rows, columns, C channels. F = 1 + 4(T-1), h =
8H, w = 8W.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import VAEConfig
from model.errors import InputError

_PIECE_PX = 2**17

Memory = dict[nn.Module, Tensor]
"""What each causal layer must remember of the frames before, while a clip streams through."""


class CausalConv3d(nn.Module):
    """Convolution over time and space that never looks ahead. [B,T,H,W,C_in] -> [B,T,H,W,C_out].

    A clip starts behind frames of zeros; with a `memory`, a piece of it behind the frames of the piece before.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor, memory: Memory | None) -> Tensor:
        reach = self.weight.shape[2] - 1
        if reach and x.shape[1] == 1 and memory is None:
            # A single image has nothing before it: only the kernel's newest frame meets anything but zeros.
            return per_frame(x, self.weight[:, :, -1], self.bias, padding=self.weight.shape[-1] // 2)
        if reach:
            x = self.with_past(x, reach, memory)
        return self.valid_in_time(x)

    def with_past(self, x: Tensor, reach: int, memory: Memory | None) -> Tensor:
        """x with `reach` frames in front: those remembered, or zeros where the clip begins."""
        if memory is None or self not in memory:
            x = F.pad(x, (0, 0, 0, 0, 0, 0, reach, 0))
        else:
            x = torch.cat([memory[self], x], 1)
        if memory is not None:
            memory[self] = x[:, -reach:].clone()
        return x

    def valid_in_time(self, x: Tensor, stride: int = 1) -> Tensor:
        """The convolution over time without padding, every `stride` frames."""
        out_channels, in_channels, depth, rows, cols = self.weight.shape
        if depth > 1:
            frames = (x.shape[1] - depth) // stride + 1
            x = torch.cat([x[:, k : k + (frames - 1) * stride + 1 : stride] for k in range(depth)], -1)
        weight = self.weight.permute(0, 2, 1, 3, 4).reshape(out_channels, depth * in_channels, rows, cols)
        return per_frame(x, weight, self.bias, padding=rows // 2)


def per_frame(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 0, stride: int = 1) -> Tensor:
    """conv2d on every frame of [B,T,H,W,C], in the channels-last layout."""
    if weight.shape[-2:] == (1, 1) and stride == 1:
        return F.linear(x, weight[:, :, 0, 0], bias)
    folded = x.flatten(0, 1).permute(0, 3, 1, 2)
    weight = weight.contiguous(memory_format=torch.channels_last)
    out = F.conv2d(folded, weight, bias, stride, padding).permute(0, 2, 3, 1)
    return out.unflatten(0, x.shape[:2])


class ChannelNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over the channels. `ones` trailing dimensions only fit the file's layout."""

    def __init__(self, channels: int, ones: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * ones))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).clamp_min(1e-12)
        return (x / length).to(x.dtype) * (self.gamma.flatten() * x.shape[-1] ** 0.5)


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, (3, 3, 3))
        self.norm2 = ChannelNorm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, (3, 3, 3))
        self.conv_shortcut: CausalConv3d | None = None
        if in_channels != out_channels:
            self.conv_shortcut = CausalConv3d(in_channels, out_channels, (1, 1, 1))

    def forward(self, x: Tensor, memory: Memory | None) -> Tensor:
        skip = x if self.conv_shortcut is None else self.conv_shortcut(x, memory)
        x = self.conv1(F.silu(self.norm1(x)), memory)
        return self.conv2(F.silu(self.norm2(x)), memory) + skip


class SpatialAttention(nn.Module):
    """Single-head attention among the positions of one frame, with a residual path."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, ones=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.norm(x).flatten(2, 3).flatten(0, 1)
        qkv = F.linear(frames, self.to_qkv.weight[:, :, 0, 0], self.to_qkv.bias)
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        out = F.linear(mixed, self.proj.weight[:, :, 0, 0], self.proj.bias)
        return x + out.view_as(x)


class MiddleBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialAttention(channels)])

    def forward(self, x: Tensor, memory: Memory | None) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, memory))
        return self.resnets[1](x, memory)


class Downsample(nn.Module):
    """Half the rows and columns and, if `temporal`, half the frames; the clip's first frame stays by itself."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        # The files number the convolution 1: before it stands the padding, which has no weights.
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, memory: Memory | None) -> Tensor:
        conv = self.resample[1]
        x = per_frame(F.pad(x, (0, 0, 0, 1, 0, 1)), conv.get_parameter("weight"), conv.get_parameter("bias"), stride=2)
        return x if self.time_conv is None else self._halve_frames(x, self.time_conv, memory)

    @staticmethod
    def _halve_frames(x: Tensor, time_conv: CausalConv3d, memory: Memory | None) -> Tensor:
        starts_clip = memory is None or time_conv not in memory
        past = x[:, :1] if starts_clip else memory[time_conv]  # type: ignore[index]
        if memory is not None:
            memory[time_conv] = x[:, -1:].clone()
        rest = x[:, 1:] if starts_clip else x
        pieces = [x[:, :1]] if starts_clip else []
        if rest.shape[1]:
            pieces.append(time_conv.valid_in_time(torch.cat([past, rest], 1), stride=2))
        return torch.cat(pieces, 1)


class Upsample(nn.Module):
    """Twice the rows and columns and, if `temporal`, twice the frames except the clip's first."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(channels, channels // 2, 3, padding=1))
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, memory: Memory | None) -> Tensor:
        if self.time_conv is not None:
            x = self._double_frames(x, self.time_conv, memory)
        return self._double_size(x)

    def _double_frames(self, x: Tensor, time_conv: CausalConv3d, memory: Memory | None) -> Tensor:
        # The first frame is neither doubled nor seen by the temporal convolution: what follows it starts from zeros.
        starts_clip = memory is None or self not in memory
        if memory is not None:
            memory[self] = x.new_empty(0)
        rest = x[:, 1:] if starts_clip else x
        pieces = [x[:, :1]] if starts_clip else []
        if rest.shape[1]:
            pairs = time_conv(rest, memory).unflatten(-1, (2, x.shape[-1]))
            pieces.append(pairs.movedim(-2, 2).flatten(1, 2))
        return torch.cat(pieces, 1)

    def _double_size(self, x: Tensor) -> Tensor:
        conv = self.resample[1]
        wide = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return per_frame(wide, conv.get_parameter("weight"), conv.get_parameter("bias"), padding=1)


class Encoder(nn.Module):
    """[B,F,h,w,3] -> [B,T,H,W,2*z_dim]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d(3, widths[0], (3, 3, 3))
        self.down_blocks = nn.ModuleList()
        for level, (width_in, width) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            for _ in range(config.num_res_blocks):
                self.down_blocks.append(ResidualBlock(width_in, width))
                width_in = width
            if level < len(config.temperal_downsample):
                self.down_blocks.append(Downsample(width, config.temperal_downsample[level]))
        self.mid_block = MiddleBlock(widths[-1])
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_dim, (3, 3, 3))

    def forward(self, x: Tensor, memory: Memory | None) -> Tensor:
        x = self.conv_in(x, memory)
        for block in self.down_blocks:
            x = block(x, memory)
        x = self.mid_block(x, memory)
        return self.conv_out(F.silu(self.norm_out(x)), memory)


class UpBlock(nn.Module):
    def __init__(self, width_in: int, width: int, num_res_blocks: int, upsample: Upsample | None) -> None:
        super().__init__()
        widths = [width_in] + [width] * (num_res_blocks + 1)
        self.resnets = nn.ModuleList(map(ResidualBlock, widths[:-1], widths[1:]))
        self.upsamplers = None if upsample is None else nn.ModuleList([upsample])

    def forward(self, x: Tensor, memory: Memory | None) -> Tensor:
        for block in self.resnets:
            x = block(x, memory)
        return x if self.upsamplers is None else self.upsamplers[0](x, memory)


class Decoder(nn.Module):
    """[B,T,H,W,z_dim] -> [B,F,h,w,3]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_dim * m for m in (config.dim_mult[-1], *config.dim_mult[::-1])]
        temporal = config.temperal_downsample[::-1]
        self.conv_in = CausalConv3d(config.z_dim, widths[0], (3, 3, 3))
        self.mid_block = MiddleBlock(widths[0])
        self.up_blocks = nn.ModuleList()
        for level, (width_in, width) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            upsample = Upsample(width, temporal[level]) if level < len(temporal) else None
            # Every upsampling halves the channels it hands on.
            self.up_blocks.append(
                UpBlock(width_in if level == 0 else width_in // 2, width, config.num_res_blocks, upsample)
            )
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 3, (3, 3, 3))

    def forward(self, x: Tensor, memory: Memory | None) -> Tensor:
        x = self.mid_block(self.conv_in(x, memory), memory)
        for block in self.up_blocks:
            x = block(x, memory)
        return self.conv_out(F.silu(self.norm_out(x)), memory)


class VAE(nn.Module):
    """Frames to normalised latents and back. Parameter names are those of diffusers' `AutoencoderKLWan`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.spatial_factor = 2 ** len(config.temperal_downsample)
        self.temporal_factor = 2 ** sum(config.temperal_downsample)
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config)

    def _statistic(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, device=like.device, dtype=like.dtype).view(-1, 1, 1, 1)

    def normalise(self, z: Tensor) -> Tensor:
        """(z - mean) / std for each channel of [B,C,T,H,W] or [C,T,H,W]."""
        return (z - self._statistic(self.config.latents_mean, z)) / self._statistic(self.config.latents_std, z)

    def denormalise(self, z: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return z * self._statistic(self.config.latents_std, z) + self._statistic(self.config.latents_mean, z)

    def encode_moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, not normalised. video [B,3,F,h,w] in [-1,1] -> 2 x
        [B,C,T,H,W].

        Raises InputError where the size does not divide by the factors.
        """
        self._check_video(video, starts_clip=True)
        if torch.is_grad_enabled():
            return self._moments(video, None)
        size = self.temporal_factor * self._latents_at_once(video.shape[-2] * video.shape[-1])
        pieces = [video[:, :, :1], *video[:, :, 1:].split(size, dim=2)] if video.shape[2] > 1 else [video]
        memory: Memory = {}
        moments = [self._moments(piece, memory) for piece in pieces]
        return torch.cat([mean for mean, _ in moments], 2), torch.cat([logvar for _, logvar in moments], 2)

    def _moments(self, video: Tensor, memory: Memory | None) -> tuple[Tensor, Tensor]:
        moments = self.quant_conv(self.encoder(channels_last(video), memory), memory)
        mean, logvar = channels_first(moments).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, video: Tensor) -> Tensor:
        """Normalised latents [B,C,T,H,W] (the posterior's mean) of video [B,3,F,h,w] in [-1,1]."""
        return self.normalise(self.encode_moments(video)[0])

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """As `encode`, for a clip that comes in chunks: the first of 1 + 4k frames, every later one of 4k."""
        memory: Memory = {}
        for i, chunk in enumerate(chunks):
            self._check_video(chunk, starts_clip=i == 0)
            yield self.normalise(self._moments(chunk, memory)[0])

    def _check_video(self, video: Tensor, starts_clip: bool) -> None:
        if video.ndim != 5 or video.shape[1] != 3:
            raise InputError(f"video: expected [B,3,F,h,w], found {list(video.shape)}")
        if (video.shape[2] - starts_clip) % self.temporal_factor or not video.shape[2]:
            rule = f"{'1 + ' if starts_clip else ''}{self.temporal_factor}k"
            raise InputError(f"video: {video.shape[2]} frames; the count must be {rule}")
        if video.shape[3] % self.spatial_factor or video.shape[4] % self.spatial_factor:
            raise InputError(f"video: {video.shape[3]}x{video.shape[4]} px do not divide by {self.spatial_factor}")

    def decode(self, latents: Tensor) -> Tensor:
        """Video [B,3,F,h,w], clamped to [-1,1], of normalised latents [B,C,T,H,W]. Differentiable."""
        if torch.is_grad_enabled():
            return self._decode(latents, None)
        size = self._latents_at_once(latents.shape[-2] * latents.shape[-1] * self.spatial_factor**2)
        return torch.cat(list(self.decode_stream(latents.split(size, dim=2))), 2)

    def _latents_at_once(self, frame_px: int) -> int:
        """Latent frames to run together where no gradient needs them all: what fits the processor's cache."""
        return max(1, _PIECE_PX // (self.temporal_factor * frame_px))

    def decode_stream(self, latents: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        """As `decode`, yielding [B,3,f,h,w] for each latent frame, or for each piece where pieces are given."""
        pieces = latents.split(1, dim=2) if isinstance(latents, Tensor) else latents
        memory: Memory = {}
        for piece in pieces:
            yield self._decode(piece, memory)

    def _decode(self, latents: Tensor, memory: Memory | None) -> Tensor:
        if latents.ndim != 5 or latents.shape[1] != self.config.z_dim:
            raise InputError(f"latents: expected [B,{self.config.z_dim},T,H,W], found {list(latents.shape)}")
        z = channels_last(self.denormalise(latents))
        return channels_first(self.decoder(self.post_quant_conv(z, memory), memory)).clamp(-1.0, 1.0)


def channels_last(x: Tensor) -> Tensor:
    """[B,C,T,H,W] -> contiguous [B,T,H,W,C]."""
    return x.permute(0, 2, 3, 4, 1).contiguous()


def channels_first(x: Tensor) -> Tensor:
    """[B,T,H,W,C] -> [B,C,T,H,W]."""
    return x.permute(0, 4, 1, 2, 3)
