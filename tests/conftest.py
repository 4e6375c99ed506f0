"""Fixtures that several test files share: a tiny checkpoint, and renders of it by the real command."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_checkpoint import make_checkpoint


def pytest_configure(config: pytest.Config) -> None:
    """Clusters of the tests have a token of their own. Ray reads this once, when it is first imported."""
    folder = Path(tempfile.mkdtemp(prefix="longtake-token-"))
    (folder / "token").touch(0o600)
    (folder / "token").write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Whatever a test or a fixture draws without a generator of its own is the same in every run."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Caches and crash logs of tests stay out of the user's home."""
    folder = tmp_path_factory.mktemp("home")
    before = {name: os.environ.get(name) for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME")}
    os.environ |= {"XDG_CACHE_HOME": str(folder / "cache"), "XDG_STATE_HOME": str(folder / "state")}
    yield folder
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint folder, made once; do not write into it."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))
