"""Configurations of the networks, as the checkpoint folders store them (config.json).

Unknown keys are ignored, since official files carry settings of other programs. A missing key without a
default or a value of the wrong kind raises CheckpointError that names the key.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from model.errors import CheckpointError

ConfigT = TypeVar("ConfigT")


@dataclasses.dataclass(frozen=True)
class BlockSparseConfig:
    """Which key blocks a query block sees. `sparsity`: share of key blocks left out; `cdf_threshold`: softmax
    mass kept.

    `chunk_3d_shape_q`, `chunk_3d_shape_k`: block sizes (t, h, w) in tokens.
    """

    sparsity: float | None = 0.9375
    cdf_threshold: float | None = None
    chunk_3d_shape_q: tuple[int, int, int] = (4, 4, 4)
    chunk_3d_shape_k: tuple[int, int, int] = (4, 4, 4)

    def __post_init__(self) -> None:
        if self.sparsity is None and self.cdf_threshold is None:
            raise CheckpointError("bsa_params: one of sparsity and cdf_threshold must be given")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise CheckpointError(f"bsa_params.sparsity: {self.sparsity} is not in [0, 1)")
        if self.chunk_3d_shape_q != self.chunk_3d_shape_k:
            # Tokens stand in one order, and are queries and keys in it.
            raise CheckpointError(
                f"bsa_params: chunk_3d_shape_q {self.chunk_3d_shape_q} and chunk_3d_shape_k "
                f"{self.chunk_3d_shape_k} must be the same"
            )


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """The diffusion transformer. Names as in the official dit/config.json; widths in channels."""

    hidden_size: int
    depth: int
    num_heads: int
    caption_channels: int
    in_channels: int = 16
    out_channels: int = 16
    mlp_ratio: int = 4
    adaln_tembed_dim: int = 512
    frequency_embedding_size: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_tokens_zero_pad: bool = True
    bsa_params: BlockSparseConfig = BlockSparseConfig()

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise CheckpointError(
                f"hidden_size: {self.hidden_size} is no multiple of num_heads {self.num_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"hidden_size / num_heads: {self.head_dim} must be even for the rotary embedding"
            )
        if self.patch_size[0] != 1:
            raise CheckpointError(f"patch_size: {list(self.patch_size)} must have 1 latent frame")
        if self.frequency_embedding_size % 2:
            raise CheckpointError(f"frequency_embedding_size: {self.frequency_embedding_size} must be even")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def ffn_dim(self) -> int:
        """SwiGLU width: 2/3 * mlp_ratio * hidden, rounded up to a multiple of 256 (11008 for 4096)."""
        width = int(2 * self.mlp_ratio * self.hidden_size / 3)
        return (width + 255) // 256 * 256

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any]) -> DiTConfig:
        """Read a config.json (path) or its parsed content."""
        values = read_json(source)
        if values.get("bsa_params") is not None:
            values["bsa_params"] = build_config(
                BlockSparseConfig, read_json(values["bsa_params"]), "bsa_params."
            )
        else:
            values.pop("bsa_params", None)
        return build_config(cls, values)

    def to_json(self) -> dict[str, Any]:
        """The content of a config.json that from_json reads back."""
        return dataclasses.asdict(self)


def read_json(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Content of a JSON object file, or a copy of a mapping. Raises CheckpointError with the path."""
    if isinstance(source, Mapping):
        return dict(source)
    try:
        values = json.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{source}: is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{source}: must hold a JSON object, not a {type(values).__name__}")
    return values


def build_config(cls: type[ConfigT], values: Mapping[str, Any], prefix: str = "") -> ConfigT:
    """Build the frozen dataclass `cls` from JSON values: known keys only, lists become tuples, kinds checked.

    Field kinds are read from the annotation text, so only plain kinds (int, float, bool, tuple[...], `|
    None`) are understood.
    """
    chosen: dict[str, Any] = {}
    problems: list[str] = []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name not in values:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                problems.append(f"{prefix}{field.name}: missing, wanted {field.type}")
            continue
        value = values[field.name]
        if not _is_kind(value, str(field.type)):
            problems.append(f"{prefix}{field.name}: {value!r} is not {field.type}")
        chosen[field.name] = tuple(value) if isinstance(value, list) else value
    if problems:
        raise CheckpointError("unusable configuration", problems)
    return cls(**chosen)


def _is_kind(value: Any, kind: str) -> bool:
    if value is None:
        return "None" in kind
    if kind.startswith("tuple["):
        parts = [part.strip() for part in kind.split("]")[0].removeprefix("tuple[").split(",")]
        if not isinstance(value, (list, tuple)):
            return False
        if parts[-1] == "...":
            return all(_is_kind(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(map(_is_kind, value, parts))
    if isinstance(value, bool):
        return kind.startswith("bool")
    if isinstance(value, int):
        return kind.startswith(("int", "float"))
    if isinstance(value, float):
        return kind.startswith("float")
    return not kind.startswith(("int", "float", "bool", "str")) or (
        kind.startswith("str") and isinstance(value, str)
    )


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The causal video VAE. Names as in diffusers' AutoencoderKLWan config.json (with its spelling of
    `temperal_downsample`).

    `latents_mean`, `latents_std`: one value for each of the `z_dim` latent channels.
    """

    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)

    def __post_init__(self) -> None:
        for name in ("latents_mean", "latents_std"):
            count = len(getattr(self, name))
            if count != self.z_dim:
                raise CheckpointError(f"{name}: has {count} values, wanted z_dim = {self.z_dim}")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            found, wanted = len(self.temperal_downsample), len(self.dim_mult) - 1
            raise CheckpointError(f"temperal_downsample: has {found} values, wanted {wanted}")

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any]) -> VAEConfig:
        """Read a config.json (path) or its parsed content."""
        return build_config(cls, read_json(source))

    def to_json(self) -> dict[str, Any]:
        """The content of a config.json that from_json reads back."""
        return dataclasses.asdict(self)
