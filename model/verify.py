"""Is a checkpoint folder complete and undamaged?

Always: every part is there, each shard is a whole safetensors file, and names and shapes are those of the
networks that the config files describe. Weights are not read for this but LoRAs are: seconds even for 83 GB.
With a manifest.json (`convert` and `pull` write one): every file has its size and sha256, read from the disk,
and none was added. On request: no value is NaN or infinite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from model.checkpoint import check_loras, dit_on_meta, read_lora, vae_on_meta
from model.digest import Meter, Progress, checkpoint_files, digest_of, file_hashes
from model.errors import CheckpointError
from model.manifest import FileEntry, Manifest, read_manifest
from model.shards import iter_tensors, open_folder, read_header
from model.weights import check_names


@dataclasses.dataclass(frozen=True)
class Verification:
    """What was found good. `digest` is the folder's (model/digest.py) if every byte was read, else None."""

    files: int
    total_bytes: int
    manifest: Manifest | None
    digest: str | None


def verify(folder: str | Path, *, values: bool = False, progress: Progress | None = None) -> Verification:
    """Check a folder; `values` also looks for NaN and infinity. One CheckpointError lists all findings."""
    folder = Path(folder)
    names = checkpoint_files(folder)
    problems = structure_problems(folder)
    manifest, hashes = read_manifest(folder), None
    if manifest is not None:
        problems += _differences(folder, names, manifest)
        present = [name for name in manifest.files if (folder / name).is_file()]
        hashes = file_hashes(folder, present, progress=progress, remembered=False)
        problems += [
            f"{name}: is damaged, its sha256 is not the manifest's"
            for name, entry in manifest.files.items()
            if name in hashes and hashes[name] != entry.sha256
        ]
    if values and not problems:
        problems = _unreal_values(folder, names, progress)
    if problems:
        lines = [line.replace(f"{folder}/", "") for line in problems]
        raise CheckpointError(f"{folder}: is damaged or incomplete", lines)
    total_bytes = sum((folder / name).stat().st_size for name in names)
    return Verification(len(names), total_bytes, manifest, digest_of(hashes) if hashes else None)


def structure_problems(folder: Path) -> list[str]:
    """Missing parts, and missing, unexpected or misshapen tensors, one line for each. Reads no weights."""
    problems = _missing_parts(folder)
    for check, part in _structure_checks(folder):
        problems += _findings(check, part)
    return problems


def _missing_parts(folder: Path) -> list[str]:
    problems = [
        f"{part}/: missing" for part in ("tokenizer", "text_encoder", "vae") if not (folder / part).is_dir()
    ]
    if not _dit_folders(folder):
        problems.append("dit/: missing, and neither base_model_int8/ nor a role is there")
    if (folder / "roles").is_dir() and read_manifest(folder) is None:
        problems.append("manifest.json: missing, the conversion was not finished; run it again")
    return problems


def _dit_folders(folder: Path) -> list[Path]:
    roles = sorted((folder / "roles").glob("*"))
    found = [base / part for base in (folder, *roles) for part in ("dit", "base_model_int8")]
    return [part for part in found if part.is_dir()]


def _structure_checks(folder: Path) -> list[tuple[Callable[[Path], None], Path]]:
    checks: list[tuple[Callable[[Path], None], Path]] = [(_check_dit, part) for part in _dit_folders(folder)]
    for part, check in (("vae", _check_vae), ("text_encoder", _check_text_encoder)):
        if (folder / part).is_dir():
            checks.append((check, folder / part))
    loras = sorted((folder / "lora").glob("*.safetensors"))
    return checks + [(lambda file: _check_lora(folder, file), file) for file in loras]


def lora_problems(folder: Path, file: Path) -> list[str]:
    """What is wrong with a LoRA file, by itself or for the weights of a checkpoint folder, one line for each."""
    return _findings(lambda file: _check_lora(folder, file), file)


def _findings(check: Callable[[Path], None], part: Path) -> list[str]:
    try:
        check(part)
    except CheckpointError as error:
        return [f"{part}: {line}" for line in error.problems] or [str(error)]
    return []


def _check_dit(part: Path) -> None:
    check_names(dit_on_meta(part), open_folder(part), part)


def _check_vae(part: Path) -> None:
    check_names(vae_on_meta(part), open_folder(part), part)


def _check_text_encoder(part: Path) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    stored = open_folder(part)
    try:
        config = UMT5Config.from_pretrained(part, local_files_only=True)
        with torch.device("meta"):
            network = UMT5EncoderModel(config)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{part / 'config.json'}: describes no UMT5 encoder ({error})") from error
    check_names(network, stored, part)


def _check_lora(folder: Path, file: Path) -> None:
    lora = read_lora(file)
    for part in _dit_folders(folder):
        if part.name == "dit" and not _findings(_check_dit, part):
            check_loras([(lora, 1.0)], open_folder(part), file)
            return


def _differences(folder: Path, names: Sequence[str], manifest: Manifest) -> list[str]:
    """Listed files that are missing or of another size, and files that the manifest does not list."""
    problems = [
        problem for name, entry in manifest.files.items() if (problem := _difference(folder / name, entry))
    ]
    return problems + [f"{name}: is not in the manifest" for name in names if name not in manifest.files]


def _difference(path: Path, entry: FileEntry) -> str | None:
    if not path.is_file():
        return f"{path}: missing"
    size_bytes = path.stat().st_size
    return (
        None
        if size_bytes == entry.size_bytes
        else f"{path}: has {size_bytes} bytes, wanted {entry.size_bytes}"
    )


def _unreal_values(folder: Path, names: Sequence[str], progress: Progress | None) -> list[str]:
    files = [folder / name for name in names if name.endswith(".safetensors")]
    meter = Meter(progress, sum(path.stat().st_size for path in files))
    problems = []
    for path in files:
        for info, tensor in iter_tensors(read_header(path).values()):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                problems.append(f"{path}: {info.name} holds NaN or infinity")
            meter.add(path.name, info.size_bytes)
    return problems
