"""Hooks of a submission: a command or a web address that is told when its render is done, failed, paused or
waits for approval.

A hook runs where the farm runs. It gets one JSON object: on its standard input, or as the body of a POST. What it
answers is dropped; that it failed is logged, said to whoever asks for the render, and harms nothing. A web address that
does not answer is asked three times.
"""

from __future__ import annotations

import json
import logging
import re
import subprocess
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

from pipeline.errors import first_line
from pipeline.submissions import Hook, SubmissionState

log = logging.getLogger("longtake.farm")
LIMIT_S = 60.0
ATTEMPTS = 3
PAUSE_S = 2.0
LINE = 200
"""Characters of a reason that are shown."""


def call_hooks(state: SubmissionState) -> str:
    """Call those that want to know of this. One line of which failed and why; "" if none did."""
    failed = []
    for hook in state.submission.hooks:
        if state.phase in hook.occasions:
            try:
                _call(hook, message_of(state))
            except (OSError, subprocess.SubprocessError, HTTPException, ValueError) as error:
                log.warning("a hook of %s failed: %s", state.submission.render_id, error)
                failed.append(f"{_name_of(hook)}: {_why(error)}")
    return "; ".join(failed)


def _name_of(hook: Hook) -> str:
    """Its program or host: arguments and paths may hold keys."""
    return hook.command[0] if hook.command else re.split("[/?#]", hook.url)[2].rpartition("@")[2]


def _why(error: Exception) -> str:
    # These two name the whole command.
    if isinstance(error, subprocess.TimeoutExpired):
        return f"it had not ended after {LIMIT_S:.0f} s"
    if isinstance(error, subprocess.CalledProcessError):
        said = error.stderr.decode(errors="replace").strip().splitlines()
        return f"exit status {error.returncode}" + (f", {said[-1][:LINE]}" if said else "")
    return first_line(error)[:LINE]


def message_of(state: SubmissionState) -> dict[str, Any]:
    """What a hook is told."""
    submission = state.submission
    return {
        "event": state.phase,
        "render": submission.render_id,
        "title": submission.title,
        "owner": submission.owner,
        "store": submission.store_url,
        "message": state.message,
        "exit_code": state.exit_code,
        "time": round(state.since_s, 3),
    }


def _call(hook: Hook, message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    if hook.command:
        subprocess.run(hook.command, input=body, timeout=LIMIT_S, check=True, capture_output=True)
        return
    request = urllib.request.Request(hook.url, body, {"Content-Type": "application/json"}, method="POST")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with urllib.request.urlopen(request, timeout=LIMIT_S):
                return
        except (urllib.error.URLError, TimeoutError):
            if attempt == ATTEMPTS:
                raise
            time.sleep(PAUSE_S * attempt)
