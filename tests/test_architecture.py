"""The rules of the rooms, held by import-linter and by looking at what an import really loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("pipeline", "actors", "model", "kernels", "cluster")


def _loaded_by(code: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter has loaded after running `code`."""
    script = f"import sys\n{code}\nprint(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_rooms_import_only_what_stands_below_them() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_room_is_packaged() -> None:
    import tomllib

    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert tuple(wheel["packages"]) == ROOMS


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="what belongs to the project is asked of git")
def test_the_source_archive_holds_the_whole_project() -> None:
    import tomllib

    sdist = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["sdist"]
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {f"/{name.split('/')[0]}" for name in files.splitlines()}
    # These two hatchling takes along by itself.
    assert tracked - {"/pyproject.toml", "/.gitignore"} == set(sdist["include"])


def test_importing_pipeline_loads_neither_torch_nor_ray() -> None:
    modules = [
        f"pipeline.{path.stem}"
        for path in sorted((ROOT / "pipeline").glob("*.py"))
        if path.stem != "__init__"
    ]
    loaded = _loaded_by("\n".join(f"import {name}" for name in modules))
    assert not loaded & {"torch", "ray"}


@pytest.mark.parametrize("room", ["actors", "model", "kernels"])
def test_rooms_below_cluster_do_not_load_ray(room: str) -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / room).rglob("*.py"))
        if path.stem not in {"__init__", "__main__", "bench"}
    ]
    loaded = _loaded_by("\n".join(f"import {name}" for name in modules))
    assert "ray" not in loaded


def test_kernels_package_carries_nothing_that_others_look_for() -> None:
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""
