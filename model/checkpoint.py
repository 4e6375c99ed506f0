"""Checkpoint folders: from files to networks.

The official layout, and what this project adds to it (`convert` writes it, `pull` fetches both):

    <folder>/tokenizer/  text_encoder/  vae/  dit/  lora/  scheduler/     the official parts
    <folder>/base_model_int8/       a DiT in int8, in the place of dit/
    <folder>/render.json            optional numbers for the renderer; not read here
    <folder>/manifest.json          sha256 and size of each file, and where they came from (model/manifest.py)
    <folder>/roles/<role>/dit/      a DiT with the LoRAs of a role merged in (or base_model_int8/);
                                    a folder with roles has no dit/ of its own

Weights are read tensor by tensor straight to the target device and type: the host needs the memory of one
tensor beyond the model (and of the LoRA files, where some are merged). Every missing, unexpected or misshapen
tensor is listed in one CheckpointError.

LoRAs are merged at load time, in fp32 before the cast to the target type, by the same code that `convert`
uses: loading a converted role gives the same weights, bit for bit, as merging at load time on the same
device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.config import DiTConfig, VAEConfig
from model.digest import digest, file_sha256
from model.dit import Attention, DiT
from model.errors import CheckpointError
from model.lora import Lora, LoraLayer, load_lora
from model.manifest import Manifest, read_manifest
from model.quantize import Products, check_products, choose_product_, quantize_
from model.shards import TensorInfo, open_folder, read_header
from model.text import TextEncoder
from model.vae import VAE
from model.weights import Transform, load_weights

__all__ = ["digest", "load_dit", "load_text", "load_vae", "load_weights"]

# (LoRA file, strength)
LoraFile = tuple[str | Path, float]


def load_dit(
    folder: str | Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    loras: Sequence[LoraFile] = (),
    attention: Attention = "dense",
    products: Products | None = None,
    role: str | None = None,
) -> DiT:
    """The diffusion transformer of a checkpoint folder with `loras` merged in, frozen, in evaluation mode.

    `loras` are all that the role needs, in order. A converted folder holds several DiTs with LoRAs merged in:
    the one whose LoRAs (known by their sha256) are the longest beginning of `loras` is read, the rest is
    merged on top; `role` says which to take where several fit alike. int8 weights take no LoRA: convert the
    original with its LoRAs instead. `products`: the type in which the large Linears multiply (model/quantize.py),
    None for what the files hold. They are changed as they arrive: the device never holds all weights as stored.
    """
    part, remaining = find_dit(Path(folder), loras, role)
    network = dit_on_meta(part, attention)
    if products is not None:
        check_products(products, torch.device(device))
    adapters = [(read_lora(file), strength) for file, strength in remaining]
    check_loras(adapters, open_folder(part), part)
    filled = None if products is None else lambda path: choose_product_(network, path, products)
    load_weights(network, part, device=device, dtype=dtype, transform=merging(adapters), filled=filled)
    network.bound_logits()
    return network.eval().requires_grad_(False)


def load_vae(folder: str | Path, *, device: torch.device | str, dtype: torch.dtype) -> VAE:
    """The VAE of a checkpoint folder, frozen, in evaluation mode."""
    part = Path(folder) / "vae"
    network = vae_on_meta(part)
    load_weights(network, part, device=device, dtype=dtype)
    return network.eval().requires_grad_(False)


def load_text(folder: str | Path, *, device: torch.device | str, dtype: torch.dtype) -> TextEncoder:
    """The text encoder and tokenizer of a checkpoint folder."""
    return TextEncoder.load(folder, device, dtype)


def dit_on_meta(part: Path, attention: Attention = "dense") -> DiT:
    """The network that a DiT folder describes, without memory for its weights; int8 where the files are."""
    config = DiTConfig.from_json(part / "config.json")
    with torch.device("meta"):
        network = DiT(config, attention)
        if any(name.endswith(".weight_int8") for name in open_folder(part)):
            quantize_(network)
    return network


def vae_on_meta(part: Path) -> VAE:
    """The network that a VAE folder describes, without memory for its weights."""
    with torch.device("meta"):
        return VAE(VAEConfig.from_json(part / "config.json"))


def find_dit(folder: Path, loras: Sequence[LoraFile], role: str | None = None) -> tuple[Path, list[LoraFile]]:
    """The weights folder to read, and the LoRAs that are not in these weights yet.

    In a converted folder that is the role whose merged LoRAs are the longest beginning of `loras`.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    if not (folder / "roles").is_dir():
        return _weights_folder(folder), list(loras)
    manifest = read_manifest(folder)
    if manifest is None:
        raise CheckpointError(
            f"{folder}: its conversion was not finished; run `longtake checkpoint convert` again"
        )
    wanted = [(lora_sha256(file), strength) for file, strength in loras]
    merged = {name: [(lora.sha256, lora.strength) for lora in of] for name, of in manifest.roles.items()}
    fitting = [name for name, of in merged.items() if wanted[: len(of)] == of]
    if not fitting:
        raise CheckpointError(_no_role(folder, manifest, loras))
    best = max(fitting, key=lambda name: (len(merged[name]), name == role))
    return _weights_folder(folder / "roles" / best), list(loras[len(merged[best]) :])


def _no_role(folder: Path, manifest: Manifest, loras: Sequence[LoraFile]) -> str:
    def names(of: Sequence[tuple[str, float]]) -> str:
        return ", ".join(f"{file} x {strength:g}" for file, strength in of) or "no LoRA"

    have = [f"{role} ({names([(x.file, x.strength) for x in of])})" for role, of in manifest.roles.items()]
    need = names([(str(file), strength) for file, strength in loras])
    return f"{folder}: was converted for {', '.join(sorted(have))}; these weights do not serve {need}"


def _weights_folder(folder: Path) -> Path:
    # Where both are there the full-precision weights are meant: int8 is the substitute.
    for part in ("dit", "base_model_int8"):
        if (folder / part).is_dir():
            return folder / part
    raise CheckpointError(f"{folder}: has neither dit/ nor base_model_int8/")


def lora_sha256(file: str | Path) -> str:
    """sha256 (hex) of a LoRA file. Raises CheckpointError if it cannot be read."""
    try:
        return file_sha256(Path(file))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error


def read_lora(file: str | Path) -> Lora:
    """A LoRA file, refused with a clear message if it is a pickle or damaged."""
    read_header(Path(file))
    return load_lora(file)


def check_loras(loras: Sequence[tuple[Lora, float]], stored: Mapping[str, TensorInfo], part: Path) -> None:
    """Raise one CheckpointError listing every LoRA layer that has no weight of its shape among `stored`."""
    problems = []
    for path, layer in (item for lora, _ in loras for item in lora.layers.items()):
        weight = stored.get(f"{path}.weight")
        if weight is None:
            int8 = f"{path}.weight_int8" in stored
            reason = "is int8, convert the original weights with this LoRA" if int8 else "no such weight"
            problems.append(f"{path}: {reason}")
        elif weight.shape != layer.shape:
            problems.append(f"{path}: weight is {list(weight.shape)}, the LoRA is for {list(layer.shape)}")
    if problems:
        raise CheckpointError(f"{part}: a LoRA does not fit these weights", sorted(problems))


def merging(loras: Sequence[tuple[Lora, float]]) -> Transform | None:
    """A transform that adds strength * delta of each LoRA, in order, in fp32, on the device of the weight."""

    def merge(name: str, tensor: Tensor) -> Tensor:
        path = name.removesuffix(".weight")
        for lora, strength in loras:
            if path != name and path in lora.layers:
                layer = lora.layers[path]
                ups = tuple(up.to(tensor.device) for up in layer.ups)
                delta = LoraLayer(layer.alpha_scale, layer.down.to(tensor.device), ups).delta()
                tensor = tensor.float() + strength * delta
        return tensor

    return merge if loras else None
