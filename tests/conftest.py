"""What several test files share: a tiny checkpoint, a cluster that commands can join, and the order of the files."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_checkpoint import make_checkpoint

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Clusters of the tests have a token of their own. Ray reads this once, when it is first imported."""
    folder = Path(tempfile.mkdtemp(prefix="longtake-token-"))
    (folder / "token").touch(0o600)
    (folder / "token").write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files shared out among processes: those that start clusters first, then other slow ones, so that none is left
    with a long file at the end."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    ranks = {"ray": 0, "slow": 1}
    files: dict[Path, int] = {}
    for item in items:
        marks = [ranks[mark.name] for mark in item.iter_markers() if mark.name in ranks]
        files[item.path] = min([files.get(item.path, 2), *marks])
    items.sort(key=lambda item: files[item.path])


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


# A session sends what is printed within it nowhere, since Ray prints there, too.
_CLUSTER = """
import sys
import ray
from cluster.session import local_session
with local_session(2):
    print(ray.get_runtime_context().gcs_address, file=sys.__stdout__, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """Of a running cluster that commands can join: for renders whose own session is not what is tested.

    A process of its own holds it, so that this one can join others.
    """
    command = [sys.executable, "-c", _CLUSTER]
    holder = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert holder.stdout is not None
    try:
        found = holder.stdout.readline().strip()
        assert found, "the cluster did not start"
        yield found
    finally:
        holder.communicate(timeout=120)
