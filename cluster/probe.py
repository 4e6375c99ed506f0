"""From a storyboard to the facts its plan needs: the media it names, the checkpoint, LoRA files. Loads
neither torch nor ray.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

import model
from cluster.paces import find_pace
from model.config import DiTConfig, VAEConfig
from model.digest import digest
from model.errors import CheckpointError
from pipeline.errors import CheckpointFault, InputFileError, SettingError
from pipeline.facts import CheckpointFacts, Facts, MediaFacts, load_render_facts
from pipeline.media_child import Ffmpeg, find_ffmpeg
from pipeline.media_film import check_soundtrack, read_recipe
from pipeline.media_read import probe
from pipeline.memory import LEAST, NetworkSizes, RoleMemory, needs, too_small
from pipeline.spec import Memory, Storyboard, load_spec, parse_spec
from pipeline.store import hash_stream
from pipeline.tasks import Task

OFFICIAL = "meituan-longcat/LongCat-Video"
UNKNOWN_DIGEST = "0" * 64
"""Of a checkpoint that is planned for without being here."""
DIT_FOLDERS = ("dit", "base_model_int8", "roles/*/dit", "roles/*/base_model_int8")
LARGEST_HEADER_BYTES = 1 << 26
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILM_SUFFIXES = (".mp4", ".mov", ".mkv")
_PATHS = ("image", "video", "soundtrack", "file", "path")
"""Fields of a storyboard that name files."""


def load_storyboard(path: Path) -> Storyboard:
    """The storyboard in a YAML file, or the one that a film made by longtake carries in its metadata.

    `~` at the beginning of its paths is written out.
    """
    if path.suffix.lower() not in FILM_SUFFIXES:
        written = load_spec(path).as_written()
        return parse_spec(json.dumps(with_home(written)), str(path))
    recipe = json.loads(read_recipe(path, find_ffmpeg()))
    if "spec" not in recipe:
        raise InputFileError("carries a recipe of another kind", field=str(path), remedy="Use its storyboard.")
    return parse_spec(json.dumps(recipe["spec"]), str(path))


def with_home(data: Any) -> Any:
    """A storyboard as data, with `~` at the beginning of the paths in it written out."""
    if isinstance(data, dict):
        return {
            key: os.path.expanduser(value) if key in _PATHS and isinstance(value, str) else with_home(value)
            for key, value in data.items()
        }
    return [with_home(value) for value in data] if isinstance(data, list) else data


def probe_facts(spec: Storyboard, *, device: str, gpu_type: str | None = None, absent_ok: bool = False) -> Facts:
    """Everything the plan needs. `gpu_type`: of the workers, if it is not this machine's `device`.

    With `absent_ok` the official checkpoint need not be here: its numbers are known, only its digest is not.
    Raises InputFileError, CheckpointFault, SettingError naming what cannot be used.
    """
    is_absent = absent_ok and spec.checkpoint == OFFICIAL and not hub_folder(OFFICIAL).is_dir()
    checkpoint = CheckpointFacts("", UNKNOWN_DIGEST) if is_absent else probe_checkpoint(spec.checkpoint)
    paths = spec.media_paths()
    ffmpeg = find_ffmpeg()
    found = {path: _probe_named(spec, path, kind, ffmpeg) for path, kind in paths.items()}
    loras = {lora.file: _lora_sha256(f"loras[{index}].file", lora.file) for index, lora in enumerate(spec.loras)}
    pace = find_pace(checkpoint, device, gpu_type)
    return Facts(checkpoint=checkpoint, media=found, loras=loras, pace=pace)


def probe_checkpoint(name: str) -> CheckpointFacts:
    """`pocket`, a folder, or the id of a checkpoint pulled from the hub."""
    folder = find_checkpoint(name)
    try:
        return CheckpointFacts(str(folder), digest(folder), load_render_facts(folder))
    except CheckpointError as error:
        raise CheckpointFault(str(error), field="checkpoint", value=name) from error


def find_checkpoint(name: str) -> Path:
    """The folder that a storyboard's `checkpoint` means. Raises CheckpointFault."""
    if name == "pocket":
        return Path(str(model.__file__)).parent / "pocket"
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if _HUB_ID.fullmatch(name) and hub_folder(name).is_dir():
        return hub_folder(name)
    remedy = "Name a checkpoint folder or `pocket`."
    if _HUB_ID.fullmatch(name):
        remedy = f"Name a checkpoint folder or `pocket`, or fetch it: longtake checkpoint pull {name}"
    raise CheckpointFault("no such folder", field="checkpoint", value=name, remedy=remedy)


def network_sizes(folder: str) -> NetworkSizes:
    """The sizes of a checkpoint's networks, from its config files and the headers of its weights; the official ones for
    a checkpoint that is not here ("")."""
    if not folder:
        return NetworkSizes()
    root = Path(folder)
    try:
        part = next(part for name in DIT_FOLDERS for part in sorted(root.glob(name)) if part.is_dir())
        dit, vae = DiTConfig.from_json(part / "config.json"), VAEConfig.from_json(root / "vae" / "config.json")
        return NetworkSizes(
            width=dit.hidden_size,
            depth=dit.depth,
            heads=dit.num_heads,
            ffn=dit.ffn_dim,
            caption=dit.caption_channels,
            timestep=dit.adaln_tembed_dim,
            frequencies=dit.frequency_embedding_size,
            channels=dit.out_channels,
            patch=dit.patch_size[1],
            is_int8=part.name == "base_model_int8",
            text_weights=_count_numbers(root / "text_encoder"),
            vae_weights=_count_numbers(root / "vae"),
            vae_width=vae.base_dim,
        )
    except (CheckpointError, OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        message = f"its networks have no readable sizes: {error}"
        raise CheckpointFault(message, field="checkpoint", value=folder) from error


def role_memory(
    tasks: Collection[Task], checkpoint: CheckpointFacts, memory: Memory, card_gb: float | None
) -> tuple[tuple[RoleMemory, ...], list[str]]:
    """What each role of a plan's tasks needs, and what to say of cards of `card_gb` on which that is too much."""
    sizes = network_sizes(checkpoint.path)
    found = needs(tasks, sizes, checkpoint.render, memory)
    if card_gb is None:
        return found, []
    least = {role.role: role for role in needs(tasks, sizes, checkpoint.render, LEAST)}
    return found, too_small(found, least, round(card_gb * 1e9))


def _count_numbers(part: Path) -> int:
    """How many numbers the safetensors files of a folder hold, by their headers."""
    count = 0
    for path in sorted(part.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST_HEADER_BYTES:
                raise ValueError(f"{path} is no safetensors file")
            header = json.loads(file.read(length))
        count += sum(math.prod(header[name]["shape"]) for name in header if name != "__metadata__")
    return count


def hub_folder(name: str) -> Path:
    """Where `checkpoint pull` puts a hub checkpoint by default."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "longtake" / "checkpoints" / name.replace("/", "--")


def _probe_named(spec: Storyboard, path: str, kind: str, ffmpeg: Ffmpeg) -> MediaFacts:
    """`probe_media`; what it refuses is told with the field of the storyboard that names the file."""
    try:
        facts = probe_media(path, kind, ffmpeg)
        if kind == "audio":
            check_soundtrack(Path(path), spec.output.container, ffmpeg)
        return facts
    except InputFileError as error:
        # The same file may be a shot's video; what is wanted of it here is sound.
        field = "output.soundtrack" if kind == "audio" else spec.media_field(path)
        message = f"{path} {error.message}"
        raise InputFileError(message, field=field, value=error.value, remedy=error.remedy) from error


def probe_media(path: str, kind: str, ffmpeg: Ffmpeg) -> MediaFacts:
    """One image, video or soundtrack. Raises InputFileError if it is something else or damaged."""
    info = probe(Path(path), ffmpeg)
    if info.kind != kind and not (kind == "audio" and info.has_audio):
        what = _article(kind)
        raise InputFileError(f"is not {what}", field=path, value=info.kind, remedy=f"Name {what} file.")
    return MediaFacts(
        path=path,
        sha256=file_sha256(Path(path)),
        kind=info.kind,
        width_px=info.width_px,
        height_px=info.height_px,
        fps=float(info.fps or 0),
        duration_s=float(info.duration_s),
        frame_count=info.frame_count,
        has_audio=info.has_audio,
    )


def _article(kind: str) -> str:
    return {"image": "an image", "video": "a video", "audio": "a sound"}[kind]


def _lora_sha256(field: str, path: str) -> str:
    if Path(path).suffix != ".safetensors":
        remedy = "Name a .safetensors file; pickles are never opened."
        raise SettingError("is no safetensors file", field=field, value=path, remedy=remedy)
    try:
        return file_sha256(Path(path))
    except InputFileError as error:
        raise InputFileError(error.message, field=field, value=path, remedy=error.remedy) from error


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a user's file. Raises InputFileError."""
    try:
        # Opening a pipe that nobody writes to would wait for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputFileError(
                "cannot be read: it is a folder, a pipe or a device", field=str(path), remedy="Name a file."
            )
        with path.open("rb") as file:
            return hash_stream(file)[0]
    except OSError as error:
        remedy = "Name a file that exists and is readable."
        raise InputFileError(f"cannot be read: {error.strerror}", field=str(path), remedy=remedy) from error
