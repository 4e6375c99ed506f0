"""`longtake checkpoint convert|verify|pull`, and the checks of a checkpoint's structure and of LoRA files that a render
makes in a child process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from cluster.probe import hub_folder
from model.errors import CheckpointError, ModelError
from pipeline.errors import CheckpointFault
from pipeline.facts import load_render_facts


def convert_checkpoint(source: Path, target: Path, dtype: Literal["bf16", "int8"]) -> int:
    """Write one set of merged weights for each quality and for refinement."""
    from model.convert import convert

    try:
        manifest = convert(source, target, role_loras=role_loras(source), dtype=dtype, progress=_show)
    except ModelError as error:
        raise CheckpointFault(str(error)) from error
    print(f"{target}: {len(manifest.files)} files")
    return 0


def role_loras(folder: Path) -> dict[str, list[tuple[Path, float]]]:
    """The LoRAs (file, strength) that the checkpoint's render.json names for `full`, `draft` and `refine`; of
    equal lists the first alone. Whichever quality a storyboard asks for, its weights are there.
    """
    facts = load_render_facts(folder)
    chosen = {"full": facts.quality.full.loras, "draft": facts.quality.draft.loras, "refine": facts.refine.loras}
    roles: dict[str, list[tuple[Path, float]]] = {}
    for role, loras in chosen.items():
        files = [(folder / lora.file, lora.strength) for lora in loras]
        if files not in roles.values():
            roles[role] = files
    return roles


def verify_checkpoint(folder: Path) -> int:
    """Check structure, bytes against the manifest, and values."""
    from model.verify import verify

    try:
        found = verify(folder, values=True, progress=_show)
    except CheckpointError as error:
        raise CheckpointFault(str(error)) from error
    print(f"{folder}: {found.files} files, {found.total_bytes:,} bytes, all as they should be")
    if found.digest:
        print(f"digest {found.digest}")
    return 0


def pull_checkpoint(name: str, target: Path | None) -> int:
    """Fetch a checkpoint from the hub; the same command continues after an interruption."""
    from model.pull import pull

    folder = target or hub_folder(name)
    try:
        manifest = pull(name, folder, progress=_show)
    except CheckpointError as error:
        raise CheckpointFault(str(error)) from error
    print(f"{folder}: {len(manifest.files)} files")
    return 0


def _show(what: str, done_bytes: int, total_bytes: int) -> None:
    """One line that is written over, on a terminal only."""
    if sys.stderr.isatty():
        end = "\n" if done_bytes >= total_bytes else "\r"
        print(f"{100 * done_bytes / max(total_bytes, 1):5.1f} % {what[:60]:<60}", end=end, file=sys.stderr)


def check_structure(folder: Path) -> int:
    """Print every missing, unexpected or misshapen tensor; 0 if there is none, otherwise 2. Reads headers
    only.
    """
    from model.verify import structure_problems

    problems = [line.replace(f"{folder}/", "") for line in structure_problems(folder)]
    if problems:
        print("\n  ".join([f"{folder}: is damaged or incomplete", *problems]))
    return 2 if problems else 0


def check_lora(folder: Path, file: Path) -> int:
    """Print what is wrong with a LoRA file for the weights of a checkpoint folder; 0 if nothing is, otherwise 2."""
    from model.verify import lora_problems

    problems = [line.removeprefix(f"{file}: ") for line in lora_problems(folder, file)]
    if problems:
        print("\n  ".join(["cannot be used", *problems]))
    return 2 if problems else 0


if __name__ == "__main__":
    what, *paths = sys.argv[1:]
    sys.exit(check_lora(*map(Path, paths)) if what == "lora" else check_structure(*map(Path, paths)))
