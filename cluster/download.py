"""`longtake download`: a finished film from its store to this machine, verified, going on with a part that is there."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.places import open_ledger
from cluster.recipe import load_recipe, make_plan
from pipeline.errors import SettingError, TransientError
from pipeline.store import CHUNK_BYTES, Store, flush_to_disk, hash_stream
from pipeline.tasks import ArtifactFile

PIECE_BYTES = 4 * CHUNK_BYTES


def download_film(store: Store, to: Path | None) -> Path:
    """Copy the film; `to` is a file or a folder (default: here, under the film's own name). Where it is now.

    What has arrived lies beside it as `.<name>.<digest>.part`, so a film made again never goes on with the old one.
    """
    recipe, state = load_recipe(store), open_ledger(store).load()
    plan = make_plan(recipe, state.overrides)
    record = state.commits.get(plan.film_task_id)
    if record is None:
        raise SettingError("has no film yet", field="ID", value=store.url, remedy="`longtake watch` follows it.")
    film, name = record.files[0], Path(plan.output_path).name
    target = to or Path(name)
    target = target / name if target.is_dir() else target
    if target.is_file() and _digest(target) == film.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{film.sha256[:12]}.part")
    _fetch(store, film, part)
    os.replace(part, target)
    return target


def _fetch(store: Store, film: ArtifactFile, part: Path) -> None:
    """Append what is missing, then compare all of it with its record."""
    with part.open("ab") as stream:
        have = stream.tell()
        while have < film.size_bytes:
            piece = store.read_range(film.path, have, min(PIECE_BYTES, film.size_bytes - have))
            if not piece:
                remedy = "`longtake verify` notes it, and the next render makes it again."
                raise SettingError("is shorter than its record", field="ID", value=film.path, remedy=remedy)
            stream.write(piece)
            stream.flush()
            have += len(piece)
        flush_to_disk(stream.fileno())
    if _digest(part) != film.sha256:
        part.unlink()
        raise TransientError(f"{film.path}: what has arrived differs from its record; the same command starts over")


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hash_stream(stream)[0]
