"""Where a render lies: its store, found by its storyboard, by its film or by its own folder or address; its ledger."""

from __future__ import annotations

import sys
from pathlib import Path

from cluster.probe import load_storyboard
from pipeline.ledger import Ledger
from pipeline.spec import Storyboard, name_of
from pipeline.store import Store, open_store

STORYBOARD_SUFFIXES = (".yaml", ".yml", ".json", ".mp4", ".mov", ".mkv")


def open_render(place: str, store: str | None) -> Store:
    """The store of a render, by its storyboard or by its own place. Raises SettingError."""
    path = Path(place)
    if store is None and "://" not in place and path.suffix.lower() in STORYBOARD_SUFFIXES:
        return open_film_store(load_storyboard(path), path, None)
    return open_store(place if store is None else store)


def open_film_store(spec: Storyboard, storyboard: Path, store: str | None) -> Store:
    """The store of a storyboard's render: the one that is named, else the default. Raises SettingError."""
    return open_store(default_store(spec, storyboard) if store is None else store)


def default_store(spec: Storyboard, storyboard: Path) -> str:
    """`renders/<slug>` of the title, or of the file's name where there is no title."""
    name = spec.title if spec.title != Storyboard.model_fields["title"].default else storyboard.stem
    return str(Path("renders") / name_of(name))


def open_ledger(store: Store) -> Ledger:
    """The render's ledger, for a command: a store that does not answer is waited for, and whoever waits is told why."""
    return Ledger(store, on_wait=lambda why: print(f"waiting: {why}", file=sys.stderr))
