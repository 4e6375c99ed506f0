"""Convert a checkpoint once, so that workers read role-merged bf16 or int8 weights instead of fp32 ones plus
LoRAs.

    <target>/roles/<role>/dit/          one DiT for each role, its LoRAs merged in; base_model_int8/ for int8
    <target>/tokenizer/ text_encoder/ vae/ scheduler/ lora/ render.json     hard links to the source, or copies
    <target>/manifest.json              written last: sha256 of each file, the roles, the source's digest

The source is read once for all roles, tensor by tensor; the host needs the LoRA files and a few tensors, not
a shard. Merging is in fp32 by the code that load_dit uses, so a converted role holds exactly what merging at
load time (on a CPU) gives.

Every file appears under its name only when it is complete and on the disk. An interrupted conversion goes on
after the last finished shard when it is started again with the same arguments: `.convert.json` in the target
lists what is finished until the manifest replaces it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from model.checkpoint import LoraFile, check_loras, dit_on_meta, lora_sha256, merging, read_lora
from model.config import DiTConfig, read_json
from model.digest import (
    LICENCES,
    Meter,
    Progress,
    checkpoint_files,
    digest,
    file_hashes,
    file_sha256,
    require_disk_space,
)
from model.dit import DiT
from model.errors import CheckpointError, InputError
from model.manifest import (
    FileEntry,
    Manifest,
    MergedLora,
    file_entries,
    read_manifest,
    write_manifest,
)
from model.quantize import quantize_, quantize_weight
from model.shards import (
    INDEX_SUFFIX,
    PARTIAL_SUFFIX,
    ShardWriter,
    TensorInfo,
    commit,
    flush_to_disk,
    iter_tensors,
    open_folder,
    write_text,
)
from model.weights import Transform, check_names

DType = Literal["bf16", "fp16", "fp32", "int8"]
# In int8 the matrices of the Linears are integers; what stays in floating point is bf16.
FLOAT_OF = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.bfloat16}
JOURNAL_FILE = ".convert.json"
ROLE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclasses.dataclass(frozen=True)
class Job:
    """What becomes what. `roles`: the LoRAs of each role; `source_digest` pins the source's bytes."""

    source: Path
    target: Path
    dtype: DType
    roles: dict[str, tuple[MergedLora, ...]]
    source_digest: str

    def role_folder(self, role: str) -> Path:
        return self.target / "roles" / role / ("base_model_int8" if self.dtype == "int8" else "dit")

    def identity(self) -> dict[str, Any]:
        """What must be the same for an interrupted conversion to go on."""
        return _identity(self.source_digest, self.dtype, self.roles)


def _identity(
    source_digest: str | None, dtype: str | None, roles: Mapping[str, Sequence[MergedLora]]
) -> dict[str, Any]:
    loras = {role: [[lora.sha256, lora.strength] for lora in merged] for role, merged in roles.items()}
    return {"source": source_digest, "dtype": dtype, "roles": loras}


def convert(
    source: str | Path,
    target: str | Path,
    *,
    role_loras: Mapping[str, Sequence[LoraFile]],
    dtype: DType = "bf16",
    progress: Progress | None = None,
) -> Manifest:
    """Write the roles' merged weights and all else that a render needs into `target`; returns its manifest.

    `role_loras`: role -> (LoRA file, strength) in merge order; an empty list for the plain weights. Goes on
    with an interrupted conversion that had the same arguments, and returns at once if it is finished. Raises
    InputError for a bad role or dtype, CheckpointError for an unusable source or LoRA, a target that holds
    something else, or a disk that is too small.
    """
    source, target = Path(source), Path(target)
    _check_arguments(source, target, role_loras, dtype)
    plan = _outputs(source / "dit", dtype)
    stored = open_folder(source / "dit")
    merges = _merges(source / "dit", stored, role_loras)
    try:
        _check_space(source, target, plan, sorted(role_loras))
        job = Job(source, target, dtype, _describe(source, role_loras), digest(source, progress=progress))
        finished = _resume(job)
        if finished is None:
            return _finished_manifest(target)
        _write_shards(job, stored, plan, merges, finished, progress)
        _link_rest(job)
        return _seal(job, finished)
    except OSError as error:
        name = error.filename or target
        raise CheckpointError(f"{name}: cannot be written ({error.strerror or error}); run again") from error


def _check_arguments(
    source: Path, target: Path, role_loras: Mapping[str, Sequence[LoraFile]], dtype: str
) -> None:
    if dtype not in get_args(DType):
        raise InputError(f"dtype: {dtype!r} is none of {', '.join(get_args(DType))}")
    if not role_loras:
        raise InputError("role_loras: no role given")
    for role in role_loras:
        if not ROLE_NAME.fullmatch(role):
            raise InputError(f"role_loras: {role!r} is no role name, wanted {ROLE_NAME.pattern}")
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such checkpoint folder")
    if (source / "roles").is_dir() or not (source / "dit").is_dir():
        raise CheckpointError(f"{source}: is converted already or has no dit/; convert the original folder")
    if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
        raise InputError(f"target: {target} lies in the source {source}; choose a folder outside it")


# Tensor name in the source -> what becomes of it: (name, type, shape), two entries for an int8 matrix.
Outputs = dict[str, list[tuple[str, torch.dtype, tuple[int, ...]]]]


def _outputs(part: Path, dtype: DType) -> Outputs:
    """What to write for each tensor of the network that `part` describes, whose tensors must all be there."""
    config = DiTConfig.from_json(part / "config.json")
    network = dit_on_meta(part)
    check_names(network, open_folder(part), part)
    plain = network.state_dict()
    if dtype != "int8":
        return {name: [(name, FLOAT_OF[dtype], tuple(tensor.shape))] for name, tensor in plain.items()}
    with torch.device("meta"):
        network = DiT(config)
        quantize_(network)
    outputs: Outputs = {name: [] for name in plain}
    for name, tensor in network.state_dict().items():
        origin = re.sub(r"\.weight_(int8|scale)$", ".weight", name)
        kept = tensor.dtype if origin != name else FLOAT_OF[dtype]
        outputs[origin].append((name, kept, tuple(tensor.shape)))
    return outputs


def _merges(
    part: Path, stored: Mapping[str, TensorInfo], role_loras: Mapping[str, Sequence[LoraFile]]
) -> dict[str, Transform | None]:
    merges = {}
    for role, files in role_loras.items():
        loras = [(read_lora(file), strength) for file, strength in files]
        check_loras(loras, stored, part)
        merges[role] = merging(loras)
    return merges


def _describe(
    source: Path, role_loras: Mapping[str, Sequence[LoraFile]]
) -> dict[str, tuple[MergedLora, ...]]:
    def name(file: str | Path) -> str:
        path = Path(file).resolve()
        inside = path.is_relative_to(source.resolve())
        return path.relative_to(source.resolve()).as_posix() if inside else path.name

    return {
        role: tuple(MergedLora(name(file), lora_sha256(file), float(strength)) for file, strength in files)
        for role, files in role_loras.items()
    }


def _check_space(source: Path, target: Path, plan: Outputs, roles: Sequence[str]) -> None:
    sizes = (math.prod(shape) * dtype.itemsize for outputs in plan.values() for _, dtype, shape in outputs)
    wanted = sum(sizes) * len(roles)
    place = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    if os.stat(place).st_dev != os.stat(source).st_dev:
        wanted += sum((source / name).stat().st_size for name in _rest(source))
    present = sum(path.stat().st_size for path in target.rglob("*.safetensors") if path.stat().st_nlink == 1)
    require_disk_space(target, max(0, wanted - present))


def _resume(job: Job) -> dict[str, FileEntry] | None:
    """The finished shards of an interrupted conversion (none at first), or None where all is finished."""
    manifest, journal = read_manifest(job.target), job.target / JOURNAL_FILE
    if manifest is not None:
        if _identity(manifest.source.get("digest"), manifest.dtype, manifest.roles) != job.identity():
            raise CheckpointError(
                f"{job.target}: holds another conversion; remove it or choose another target"
            )
        return None
    if journal.exists():
        content = read_json(journal)
        if content.get("job") != job.identity():
            raise CheckpointError(
                f"{job.target}: holds an unfinished conversion with other arguments; "
                "remove it or choose another target"
            )
        entries = file_entries(content["files"])
        return {name: entry for name, entry in entries.items() if _has_size(job.target / name, entry)}
    if job.target.is_dir() and any(job.target.iterdir()):
        raise CheckpointError(f"{job.target}: is not empty and holds no conversion; choose another target")
    job.target.mkdir(parents=True, exist_ok=True)
    _write_journal(job, {})
    return {}


def _has_size(path: Path, entry: FileEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.size_bytes


def _write_journal(job: Job, finished: Mapping[str, FileEntry]) -> None:
    files = {name: dataclasses.asdict(entry) for name, entry in finished.items()}
    write_text(job.target / JOURNAL_FILE, json.dumps({"job": job.identity(), "files": files}))


def _finished_manifest(target: Path) -> Manifest:
    manifest = read_manifest(target)
    assert manifest is not None
    broken = [name for name, entry in manifest.files.items() if not _has_size(target / name, entry)]
    if broken:
        raise CheckpointError(
            f"{target}: was converted, but files are damaged; remove it and convert again", broken
        )
    return manifest


def _write_shards(
    job: Job,
    stored: Mapping[str, TensorInfo],
    plan: Outputs,
    merges: Mapping[str, Transform | None],
    finished: dict[str, FileEntry],
    progress: Progress | None,
) -> None:
    """Write every role's shards, one source shard after the other, and each role's config.json and index."""
    shards: dict[str, list[TensorInfo]] = {}
    for info in stored.values():
        shards.setdefault(info.path.name, []).append(info)
    meter = Meter(progress, sum(info.size_bytes for info in stored.values()))
    for shard, infos in sorted(shards.items()):
        pending = {role: job.role_folder(role) / shard for role in job.roles}
        pending = {r: path for r, path in pending.items() if _relative(job, path) not in finished}
        _write_shard(infos, plan, {path: merges[role] for role, path in pending.items()}, job.dtype, meter)
        for path in pending.values():
            finished[_relative(job, path)] = FileEntry(path.stat().st_size, file_sha256(path))
        _write_journal(job, finished)
    for role in job.roles:
        config = (job.source / "dit" / "config.json").read_text(encoding="utf-8")
        write_text(job.role_folder(role) / "config.json", config)
        if len(shards) > 1:
            _write_index(job.role_folder(role), shards, plan)


def _relative(job: Job, path: Path) -> str:
    return path.relative_to(job.target).as_posix()


def _write_shard(
    infos: Sequence[TensorInfo],
    plan: Outputs,
    merges: Mapping[Path, Transform | None],
    dtype: DType,
    meter: Meter,
) -> None:
    """Write one source shard's tensors to one file for each role: output path -> merge."""
    layout = {name: (kind, shape) for info in infos for name, kind, shape in plan[info.name]}
    with contextlib.ExitStack() as stack:
        writers = {}
        for path in merges:
            path.parent.mkdir(parents=True, exist_ok=True)
            writers[path] = stack.enter_context(ShardWriter(path, layout))
        if not writers:
            meter.add(infos[0].path.name, sum(info.size_bytes for info in infos))
            return
        for info, tensor in iter_tensors(infos):
            for path, writer in writers.items():
                merge = merges[path]
                merged = merge(info.name, tensor) if merge else tensor
                for name, value in _stored_form(merged, plan[info.name], dtype):
                    writer.write(name, value)
            meter.add(info.path.name, info.size_bytes)


def _stored_form(
    tensor: Tensor, outputs: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], dtype: DType
) -> Iterator[tuple[str, Tensor]]:
    if len(outputs) == 1:
        yield outputs[0][0], tensor.to(outputs[0][1])
        return
    values, scale = quantize_weight(tensor.float())
    for name, kind, _ in outputs:
        yield name, (values if name.endswith(".weight_int8") else scale).to(kind)


def _write_index(folder: Path, shards: Mapping[str, Sequence[TensorInfo]], plan: Outputs) -> None:
    weight_map, total_bytes = {}, 0
    for shard, infos in shards.items():
        for name, dtype, shape in (output for info in infos for output in plan[info.name]):
            weight_map[name] = shard
            total_bytes += math.prod(shape) * dtype.itemsize
    content = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    stem = re.sub(r"-\d+-of-\d+\.safetensors$", "", min(shards))
    write_text(folder / (stem + INDEX_SUFFIX), json.dumps(content, indent=1, sort_keys=True) + "\n")


def _rest(source: Path) -> list[str]:
    """What a converted folder takes over unchanged."""
    replaced = ("dit", "base_model_int8", "roles")
    names = [name for name in checkpoint_files(source) if name.split("/")[0] not in replaced]
    return names + [name for name in LICENCES if (source / name).is_file()]


def _link_rest(job: Job) -> None:
    for name in _rest(job.source):
        path = job.target / name
        partial = path.with_name(path.name + PARTIAL_SUFFIX)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        try:
            os.link(os.path.realpath(job.source / name), partial)
        except OSError:
            # Another disk, or a file system without hard links.
            shutil.copyfile(job.source / name, partial)
            with open(partial, "rb+") as file:
                flush_to_disk(file)
        commit(partial, path)


def _seal(job: Job, finished: Mapping[str, FileEntry]) -> Manifest:
    """Write the manifest over all files of the target, which makes it complete."""
    names = [*checkpoint_files(job.target), *(name for name in LICENCES if (job.target / name).is_file())]
    unknown = [name for name in names if name not in finished]
    entries = dict(finished)
    for name, sha256 in file_hashes(job.target, unknown).items():
        entries[name] = FileEntry((job.target / name).stat().st_size, sha256)
    origin = read_manifest(job.source)
    source: dict[str, Any] = {"digest": job.source_digest, "folder": job.source.resolve().name}
    if origin is not None:
        source["origin"] = origin.source
    manifest = Manifest(source, job.dtype, job.roles, entries)
    write_manifest(job.target, manifest)
    (job.target / JOURNAL_FILE).unlink()
    return manifest
