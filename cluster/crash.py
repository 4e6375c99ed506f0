"""Where the traceback of an error nobody foresaw goes: a file, never the terminal."""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path


def record_crash(error: BaseException) -> str:
    """Write the traceback to the user's state folder; returns one line: the error and where the rest is."""
    first_line = (str(error).strip().splitlines() or ["no message"])[0]
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    path = Path(base) / "longtake" / time.strftime(f"crash-%Y%m%d-%H%M%S-{os.getpid()}.log")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)))
    except OSError as unwritable:
        return f"{first_line} (no log: {path}: {unwritable.strerror})"
    return f"{first_line} (details in {path})"
