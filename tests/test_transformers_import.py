"""The folder `kernels` shares its name with a Hugging Face package that transformers and diffusers look
for.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(code: str, *extra_path: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter from the project's root, with folders put behind it on the path."""
    lines = [f"import sys; sys.path += {[str(path) for path in extra_path]!r}", code]
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def fake_install(folder: Path) -> Path:
    """What `pip install kernels` leaves behind: a package and its metadata."""
    info = folder / "kernels-0.10.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.10.0\n")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text("__version__ = '0.10.0'\n")
    return folder


def test_transformers_imports_from_the_projects_root():
    result = run("from transformers import UMT5EncoderModel; import model, kernels; print(kernels.__file__)")
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == ROOT / "kernels" / "__init__.py"


def test_our_kernels_package_stays_empty():
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""


def test_installed_hugging_face_package_is_refused_with_the_remedy(tmp_path):
    result = run("import model", fake_install(tmp_path))
    assert result.returncode == 1
    assert "'kernels' 0.10.0 is installed; remedy: pip uninstall kernels" in result.stderr.splitlines()[-1]


def test_other_package_first_on_the_path_is_refused(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    result = run(f"sys.path.insert(0, {str(tmp_path)!r}); import model")
    assert result.returncode == 1
    assert f"remedy: put {ROOT} first on the Python path" in result.stderr.splitlines()[-1]
