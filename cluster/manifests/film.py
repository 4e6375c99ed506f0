"""The storyboard of a manifest that renders one film."""

from __future__ import annotations

from pathlib import Path

from cluster.manifests.description import WEIGHTS_FOLDER
from pipeline.errors import SettingError
from pipeline.spec import load_spec


def read_portable(film: Path) -> str:
    """The storyboard's text, if everything it names can be where its nodes look. Raises SpecError, SettingError."""
    spec = load_spec(film)
    files = [*spec.media_paths(), *(lora.file for lora in spec.loras)]
    if spec.checkpoint != "pocket":
        files.append(spec.checkpoint)
    for path in files:
        if not path.startswith("/"):
            remedy = (
                "Put it into the image, or onto a volume that every node has, and write its whole path "
                f"({WEIGHTS_FOLDER}/...)."
            )
            raise SettingError("is not on the cluster's nodes", field=str(film), value=path, remedy=remedy)
    return film.read_text(encoding="utf-8-sig")
