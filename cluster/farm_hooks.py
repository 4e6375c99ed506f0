"""Hooks of a submission: a command or a web address that is told when its render is done, failed, paused or
waits for approval.

A hook runs where the farm runs. It gets one JSON object: on its standard input, or as the body of a POST. What it
answers or breaks is logged and harms nothing; a web address that does not answer is asked three times.
"""

from __future__ import annotations

import json
import logging
import subprocess
import time
import urllib.error
import urllib.request
from typing import Any

from pipeline.submissions import Hook, SubmissionState

log = logging.getLogger("longtake.farm")
LIMIT_S = 60.0
ATTEMPTS = 3
PAUSE_S = 2.0


def call_hooks(state: SubmissionState) -> None:
    """Call those that want to know of this."""
    for hook in state.submission.hooks:
        if state.phase in hook.occasions:
            try:
                _call(hook, message_of(state))
            except (OSError, subprocess.SubprocessError, ValueError) as error:
                log.warning("a hook of %s failed: %s", state.submission.render_id, error)


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
