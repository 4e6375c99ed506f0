"""Logs for machines: one JSON object a line on stdout, where LONGTAKE_LOG=json. Ray keeps it in its log files.

Every line has time (Unix seconds), level, host and pid, and, where they are known, the render (its store's
address), the task's id and the attempt. A traceback is part of its line.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from typing import Any

VARIABLE = "LONGTAKE_LOG"
_HOST = socket.gethostname()


def is_json_wanted() -> bool:
    """Whether this process logs for machines."""
    return os.environ.get(VARIABLE) == "json"


def log_record(record: logging.LogRecord, message: str, about: dict[str, Any]) -> None:
    """A line of Python's logging. `message` is formatted, traceback included."""
    _write({"time": record.created, "level": record.levelname, "logger": record.name, "message": message, **about})


def log_event(event: dict[str, Any], render: str) -> None:
    """An event of a render, as `longtake render --json` prints it."""
    level = "WARNING" if event["event"] in ("failed", "worker_lost", "commit_refused") else "INFO"
    _write({"time": time.time(), "level": level, "logger": "longtake.render", "render": render, **event})


def _write(line: dict[str, Any]) -> None:
    line = {**line, "time": round(line["time"], 3), "host": line.get("host", _HOST), "pid": os.getpid()}
    sys.stdout.write(json.dumps(line, default=str) + "\n")
    sys.stdout.flush()
