"""LoRA: the official file format, merging into weights, and trainable adapters that write it.

delta(x) = strength * alpha_scale * up(down(x)). A layer that fuses n projections (qkv: 3, kv: 2) has n up
matrices, each applied to its own chunk of the down projection. File keys: `lora___lorahyphen___` + module
path with dots as `___lorahyphen___`, then `.alpha_scale`, `.lora_down.weight` [n*r, in], and
`.lora_up.weight` [out, r] or `.lora_up.blocks.j.weight` [out/n, r].

A merged LoRA leaves by loading the weights again, never by subtraction, which would not restore them bit for
bit.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.errors import CheckpointError

_DOT = "___lorahyphen___"
_PREFIX = "lora" + _DOT
_BLOCK_KEY = re.compile(r"lora_up\.blocks\.(\d+)\.weight")
_FUSED_PARTS = {"qkv": 3, "kv_linear": 2}


@dataclasses.dataclass(frozen=True)
class LoraLayer:
    """Adapter of one Linear: down [n*r, in]; ups, n matrices [out/n, r]."""

    alpha_scale: float
    down: Tensor
    ups: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the adapted weight."""
        return sum(up.shape[0] for up in self.ups), self.down.shape[1]

    def delta(self) -> Tensor:
        """What strength 1 adds to the weight: fp32 [out, in], on the device of the factors."""
        downs = self.down.float().chunk(len(self.ups))
        products = [up.float() @ down for up, down in zip(self.ups, downs, strict=True)]
        return self.alpha_scale * torch.cat(products)


@dataclasses.dataclass(frozen=True)
class Lora:
    """A LoRA file: adapters by module path."""

    layers: Mapping[str, LoraLayer]


def load_lora(file: str | Path) -> Lora:
    """Read a LoRA file, split or plain. Raises CheckpointError that lists what does not fit the format."""
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: is not a readable safetensors file ({error})") from error
    groups: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, value in tensors.items():
        path, _, part = key.partition(".")
        if not path.startswith(_PREFIX) or not part:
            problems.append(f"{key}: is not a LoRA key")
            continue
        groups.setdefault(path.removeprefix(_PREFIX).replace(_DOT, "."), {})[part] = value
    layers = {}
    for path, parts in groups.items():
        layer = _read_layer(parts)
        if isinstance(layer, str):
            problems.append(f"{path}: {layer}")
        else:
            layers[path] = layer
    if problems or not layers:
        message = "is not a LoRA file as LongCat-Video has them; those of diffusers, PEFT and kohya are not read"
        raise CheckpointError(f"{file}: {message}", problems)
    return Lora(layers)


def merge_lora(model: nn.Module, lora: Lora, strength: float) -> None:
    """Add strength * delta to the weights in place, in fp32. All layers are checked before any changes."""
    modules = dict(model.named_modules())
    problems = []
    for path, layer in lora.layers.items():
        module = modules.get(path)
        if not isinstance(module, nn.Linear):
            found = "no such layer" if module is None else f"is a {type(module).__name__}"
            problems.append(f"{path}: {found}, a LoRA needs a Linear in floating point")
        elif tuple(module.weight.shape) != layer.shape:
            problems.append(f"{path}: weight is {tuple(module.weight.shape)}, the LoRA is for {layer.shape}")
    if problems:
        raise CheckpointError("the LoRA does not fit the model", problems)
    with torch.no_grad():
        for path, layer in lora.layers.items():
            weight = modules[path].get_parameter("weight")
            weight.copy_(weight.float() + strength * layer.delta().to(weight.device))


class TrainableLora(nn.Module):
    """A frozen Linear and its trainable adapter. Starts as the Linear alone (up matrices are zero)."""

    def __init__(self, base: nn.Linear, parts: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base
        self.alpha_scale = alpha / rank
        like = torch.empty(0, device=base.weight.device, dtype=torch.float32)
        self.down = nn.Parameter(like.new_empty(parts * rank, base.in_features))
        self.ups = nn.ParameterList(
            [nn.Parameter(like.new_zeros(base.out_features // parts, rank)) for _ in range(parts)]
        )
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        chunks = F.linear(x.float(), self.down).chunk(len(self.ups), dim=-1)
        update = torch.cat([F.linear(chunk, up) for chunk, up in zip(chunks, self.ups, strict=True)], dim=-1)
        out: Tensor = self.base(x)
        return out + (self.alpha_scale * update).to(out.dtype)


def attach_trainable_lora(
    model: nn.Module, targets: Sequence[str], rank: int, alpha: float
) -> list[nn.Parameter]:
    """Freeze `model` and put adapters on its Linears whose path ends in one of `targets` ("attn.qkv",
    "ffn.w1", ...).

    Returns the adapters' parameters, the only ones that still train. A target that matches nothing raises
    ValueError.
    """
    model.requires_grad_(False)
    added: list[nn.Parameter] = []
    used = set()
    for path, module in list(model.named_modules()):
        target = next((t for t in targets if path == t or path.endswith("." + t)), None)
        if target is None or not isinstance(module, nn.Linear):
            continue
        used.add(target)
        adapter = TrainableLora(module, _FUSED_PARTS.get(path.rpartition(".")[2], 1), rank, alpha)
        model.set_submodule(path, adapter)
        added += [adapter.down, *adapter.ups]
    if missing := sorted(set(targets) - used):
        raise ValueError(f"targets {missing} match no Linear of the model")
    return added


def detach_trainable_lora(model: nn.Module) -> None:
    """Take the adapters off again; the Linears were never changed. They stay frozen."""
    for path, module in list(model.named_modules()):
        if isinstance(module, TrainableLora):
            model.set_submodule(path, module.base)


def save_lora(model: nn.Module, file: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the adapters attached to `model` as a LoRA file."""
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if not isinstance(module, TrainableLora):
            continue
        prefix = _PREFIX + path.replace(".", _DOT)
        tensors[f"{prefix}.alpha_scale"] = torch.tensor(module.alpha_scale)
        tensors[f"{prefix}.lora_down.weight"] = _stored(module.down, dtype)
        for j, up in enumerate(module.ups):
            name = "weight" if len(module.ups) == 1 else f"blocks.{j}.weight"
            tensors[f"{prefix}.lora_up.{name}"] = _stored(up, dtype)
    if not tensors:
        raise ValueError("the model has no LoRA attached")
    save_file(tensors, file)


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to(device="cpu", dtype=dtype).contiguous()


def _read_layer(parts: Mapping[str, Tensor]) -> LoraLayer | str:
    """The adapter that these tensors make up, or what is wrong with them."""
    blocks = {int(match[1]): value for name, value in parts.items() if (match := _BLOCK_KEY.fullmatch(name))}
    known = {"alpha_scale", "lora_down.weight", "lora_up.weight"}
    if unknown := sorted(name for name in parts if name not in known and not _BLOCK_KEY.fullmatch(name)):
        return f"unknown parts {unknown}"
    if "alpha_scale" not in parts or "lora_down.weight" not in parts:
        return "alpha_scale or lora_down.weight is missing"
    if ("lora_up.weight" in parts) == bool(blocks) or sorted(blocks) != list(range(len(blocks))):
        return "wanted either lora_up.weight or lora_up.blocks.0, 1, ..."
    ups = tuple(blocks[j] for j in range(len(blocks))) if blocks else (parts["lora_up.weight"],)
    down = parts["lora_down.weight"]
    if any(tensor.ndim != 2 for tensor in (down, *ups)) or down.shape[0] != sum(up.shape[1] for up in ups):
        return f"down {tuple(down.shape)} and up {[tuple(up.shape) for up in ups]} do not fit"
    return LoraLayer(float(parts["alpha_scale"]), down, ups)
