"""What is checked before any worker starts: the output's place, the encoder, the disk, the checkpoint's
tensors.

Every check raises one error that names the field, the value and the remedy. The checkpoint's structure is
compared with the networks it describes in a child process, so that the driver itself never loads torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.recipe import Recipe
from pipeline.errors import CheckpointFault, SettingError, StoreFull
from pipeline.facts import CheckpointFacts
from pipeline.media_child import find_ffmpeg
from pipeline.media_encode import choose_encoder
from pipeline.plan import Plan
from pipeline.spec import Memory
from pipeline.store import Store
from pipeline.tasks import RECIPE_VERSION, Task
from pipeline.times import format_bytes

CHECK_LIMIT_S = 600.0
PROBE_FILE = "logs/probe"


def check_before_rendering(recipe: Recipe, plan: Plan, store: Store, left: Sequence[Task], gang_size: int) -> None:
    """Raise the first problem that would stop the render later. `left`: tasks that will be run."""
    check_gang(Path(recipe.facts.checkpoint.path), gang_size)
    check_precision(Path(recipe.facts.checkpoint.path), recipe.spec.memory)
    choose_encoder(recipe.spec.output.codec, find_ffmpeg(os.environ.get("LONGTAKE_FFMPEG")))
    check_writable(Path(plan.output_path))
    check_inputs_stay(recipe, Path(plan.output_path))
    check_store(store)
    check_space(plan, store, left)
    check_checkpoint(recipe.facts.checkpoint)
    check_loras(recipe)


def check_writable(target: Path, field: str = "output.path") -> None:
    """Whether a file can be put at `target`, which `field` names. Raises SettingError."""
    try:
        if target.is_dir():
            raise IsADirectoryError(None, "is a folder")
        # Nothing is left behind by a command that is refused after this, for another reason.
        there = next(place for place in target.absolute().parents if place.exists())
        # As long as the name that a film has while it is copied.
        probe = there / f".{target.name}.{secrets.token_hex(4)}.partial"
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise SettingError(
            f"cannot be written: {error.strerror}",
            field=field,
            value=str(target),
            remedy="Name a place that can be written to.",
        ) from error


def check_inputs_stay(recipe: Recipe, target: Path) -> None:
    """Whether the film takes the place of none of the files it is made from. Raises SettingError."""
    for path in recipe.facts.media:
        if target.exists() and Path(path).exists() and target.samefile(path):
            message, remedy = "is a file that the film is made from", "Name another file."
            raise SettingError(message, field="output.path", value=str(target), remedy=remedy)


def check_store(store: Store) -> None:
    """Whether files can be put into the store. Raises SettingError, StoreError."""
    try:
        store.put_replace(PROBE_FILE, b"")
        store.delete(PROBE_FILE)
    except SettingError as error:
        raise SettingError(error.message, field="--store", value=store.url, remedy=error.remedy) from error
    except FileNotFoundError as error:
        remedy = "Name a writable folder."
        raise SettingError("no folder can be made there", field="--store", value=store.url, remedy=remedy) from error


def check_gang(folder: Path, size: int) -> None:
    """Whether so many processes can share the attention heads of the checkpoint's network. Raises SettingError."""
    for heads in _attention_heads(folder):
        if heads % size:
            fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            remedy = f"Its members share them out evenly: {fitting} are possible."
            message = f"does not divide the checkpoint's {heads} attention heads"
            raise SettingError(message, field="--gang", value=size, remedy=remedy)


def check_precision(folder: Path, memory: Memory) -> None:
    """Whether the checkpoint's weights can become what is asked for. Raises SettingError."""
    roles = [folder, *folder.glob("roles/*")]
    is_int8 = any((part / "base_model_int8").is_dir() and not (part / "dit").is_dir() for part in roles)
    if memory.precision == "fp8" and is_int8:
        remedy = "Write stored or int8, or name the checkpoint that was not converted to int8."
        raise SettingError("the weights are int8 already", field="memory.precision", value="fp8", remedy=remedy)


def _attention_heads(folder: Path) -> list[int]:
    """Of each transformer in the folder; what cannot be read is for the checkpoint's own check to say."""
    found = []
    for pattern in ("dit", "base_model_int8", "roles/*/dit", "roles/*/base_model_int8"):
        for path in sorted(folder.glob(f"{pattern}/config.json")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found.append(int(json.loads(path.read_text())["num_heads"]))
    return found


def check_space(plan: Plan, store: Store, left: Sequence[Task]) -> None:
    """Whether what is still to be made fits. Raises StoreFull."""
    free_bytes, needed_bytes = store.free_bytes(), plan.estimate.needed_bytes(left)
    if left and free_bytes is not None and free_bytes < needed_bytes:
        raise StoreFull(
            f"{store.url}: {format_bytes(needed_bytes)} are needed, {format_bytes(free_bytes)} are free; "
            "make room (`longtake gc`) or name another --store. What is committed is kept."
        )


def check_checkpoint(checkpoint: CheckpointFacts) -> None:
    """Compare every tensor's name and shape with the networks. Raises CheckpointFault with all findings.

    Done once for each digest: what has this digest and was found good stays good.
    """
    if wrong := _findings(checkpoint.digest[:32], "structure", checkpoint.path):
        remedy = "Get the files again, or name another checkpoint."
        raise CheckpointFault(wrong, field="checkpoint", remedy=remedy)


def check_loras(recipe: Recipe) -> None:
    """Whether the storyboard's LoRA files are whole and fit the checkpoint's weights. Raises SettingError."""
    checkpoint = recipe.facts.checkpoint
    for index, lora in enumerate(recipe.spec.loras):
        both = f"{checkpoint.digest[:32]}-{recipe.facts.loras[lora.file][:32]}"
        if wrong := _findings(both, "lora", checkpoint.path, lora.file):
            remedy = "Get the file again, or name another one."
            raise SettingError(f"{lora.file} {wrong}", field=f"loras[{index}].file", remedy=remedy)


def _findings(name: str, *check: str) -> str:
    """What a check of `cluster.checkpoints` finds, "" if nothing; what was found good under this name is not looked
    at again. Raises CheckpointFault, SettingError where the check itself fails."""
    passed = _cache_folder() / f"{name}-{RECIPE_VERSION}"
    if passed.exists():
        return ""
    found = _run_check(*check)
    if not found:
        with contextlib.suppress(OSError):
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()
    return found


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "longtake" / "checked"


def _run_check(*check: str) -> str:
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "cluster.checkpoints", *check],
            capture_output=True,
            text=True,
            timeout=CHECK_LIMIT_S,
            env=os.environ | {"PYTHONPATH": path},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        message = f"its files could not be read within {CHECK_LIMIT_S:.0f} s"
        raise CheckpointFault(message, field="checkpoint", value=check[1]) from error
    if done.returncode not in (0, 2):
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SettingError(f"its check did not run: {last_line}", field="checkpoint", value=check[1])
    return done.stdout.strip()
