"""Who may reach a cluster: Ray's token authentication, asked for wherever a cluster is reachable from elsewhere.

Anyone who reaches an open cluster can run code on it, so an address that is not loopback needs a token here
and a cluster that asks for it there. `--insecure` is the only way round, and it has to be spelled out.

Raises SettingError.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import socket
import sys
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path

from pipeline.errors import SettingError

ANSWER_S = 10.0
_REMEDY = "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with the cluster's token; or say --insecure."


def check_address(address: str, *, insecure: bool = False) -> None:
    """Refuse a cluster that is reachable from elsewhere and open, as far as that can be seen from here.

    A dashboard's address (http, https) is asked without a token, too: it must refuse that.
    """
    _check_form(address)
    if is_loopback(address):
        return
    if insecure:
        print(f"longtake: warning: whoever reaches {address} can run code there (--insecure)", file=sys.stderr)
        return
    if not has_token():
        message = "a cluster that is not loopback needs token authentication"
        raise SettingError(message, field="--address", value=address, remedy=_REMEDY)
    if re.match(r"https?://", address) and answers_anyone(address):
        message = "the cluster answers without a token: whoever reaches it can run code there"
        remedy = "Start it with RAY_AUTH_MODE=token on every node; or say --insecure."
        raise SettingError(message, field="--address", value=address, remedy=remedy)


def _check_form(address: str) -> None:
    place = re.sub(r"^[a-z]+://", "", address).split("/")[0]
    host, port = re.fullmatch(r"(.*?)(?::([^:\]]*))?", place, re.DOTALL).groups()  # type: ignore[union-attr]
    is_port = port is None or (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65536)
    if not host or not is_port or re.search(r"\s", address):
        remedy = "Write HOST:PORT, or http://HOST:PORT of its dashboard."
        raise SettingError("is no address of a cluster", field="--address", value=address, remedy=remedy)


def check_listens(address: str) -> None:
    """Raise SettingError where nobody listens at `host:port` or `ray://host:port`: Ray would try for minutes."""
    match = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address)
    if match is None:
        return
    try:
        socket.create_connection((match[1], int(match[2])), timeout=ANSWER_S).close()
    except (OSError, OverflowError) as error:
        remedy = "Check that the cluster runs and can be reached from here."
        raise SettingError(f"does not answer: {error}", field="--address", value=address, remedy=remedy) from error


def is_loopback(address: str) -> bool:
    """Whether `host:port`, `ray://host:port` or a URL can only be this machine. Unclear names count as reachable."""
    host = re.sub(r"^[a-z]+://", "", address).split("/")[0]
    host = host[1:].split("]")[0] if host.startswith("[") else host.rsplit(":", 1)[0]
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def has_token() -> bool:
    """Whether Ray will send a token. Raises SettingError for a token file that Ray would abort at."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return False
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        check_token_file(Path(path))
        return True
    return (Path.home() / ".ray" / "auth_token").exists()


def check_token_file(path: Path) -> None:
    """Raise SettingError unless there is a token in it."""
    try:
        found = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        message = f"cannot be read: {error}"
        raise SettingError(message, field="RAY_AUTH_TOKEN_PATH", value=str(path)) from error
    if not found:
        raise SettingError("holds no token", field="RAY_AUTH_TOKEN_PATH", value=str(path))


def write_token(path: Path) -> None:
    """This process's token in a new file that only its owner can read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(_new_token())


@cache
def _new_token() -> str:
    """One for all sessions of a process: Ray reads the token once, and would be refused by the next with another."""
    return secrets.token_hex(32)


def answers_anyone(url: str) -> bool:
    """Whether a dashboard lists its jobs to somebody without a token. Raises SettingError if it does not answer."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/api/jobs/", timeout=ANSWER_S):
            return True
    except urllib.error.HTTPError as error:
        return error.code not in (401, 403)
    except (OSError, ValueError) as error:
        remedy = "Check that the cluster runs and can be reached from here."
        raise SettingError(f"does not answer: {error}", field="--address", value=url, remedy=remedy) from error
