"""Temporary folders that carry the number of their process, so that whoever comes next on a machine can remove those
of processes that were killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path


def make_folder(root: str | Path, prefix: str) -> Path:
    """A folder of this process in `root`; those of the same prefix whose processes are gone are removed."""
    sweep(root, prefix)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=root))


def own_prefix(prefix: str) -> str:
    """Pods may share a machine's temporary folder, but not the numbers of their processes."""
    return f"{prefix}{socket.gethostname()}-"


@contextlib.contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A temporary folder for copies of films. Gone afterwards; if this process is killed, the next one removes it."""
    folder = make_folder(tempfile.gettempdir(), own_prefix(prefix))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(root: str | Path, prefix: str) -> None:
    """Remove this user's folders of that prefix in `root` whose processes are gone."""
    for folder in Path(root).glob(f"{prefix}*"):
        match = re.fullmatch(rf"{re.escape(prefix)}(\d{{1,9}})-[^-]+", folder.name)
        try:
            if match and folder.stat().st_uid == os.getuid() and _is_gone(int(match[1])):
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:
            continue  # Somebody else was faster.


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # asks, and sends nothing
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # It is there, and another user's.
    return False
