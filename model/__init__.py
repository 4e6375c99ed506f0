"""LongCat-Video in torch: networks, samplers, checkpoints. Knows no cluster and no store; usable alone.

Importing any module of this package first checks that `kernels` is this project's folder. A Hugging Face
package of the same name exists, and transformers and diffusers look for it: with both installed, one of the
two programs would get the wrong one.
"""

from __future__ import annotations

from importlib import metadata, util
from pathlib import Path


def _check_kernels_package() -> None:
    """Raise ImportError where the Hugging Face package `kernels` is installed or found instead of ours."""
    try:
        version = metadata.version("kernels")
    except metadata.PackageNotFoundError:
        version = None
    ours = Path(__file__).resolve().parent.parent / "kernels"
    spec = util.find_spec("kernels")
    found = [Path(place).resolve() for place in (spec.submodule_search_locations or [])] if spec else []
    if version is None and ours in found:
        return
    if version is not None:
        reason = f"the Hugging Face package 'kernels' {version} is installed; remedy: pip uninstall kernels"
    else:
        place = found[0] if found else "nowhere"
        reason = f"it is found at {place}; remedy: put {ours.parent} first on the Python path"
    raise ImportError(f"the name 'kernels' must mean this project's folder {ours}, but {reason}")


_check_kernels_package()
