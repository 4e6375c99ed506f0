"""The storyboard of a manifest that renders one film, and what can be said of it before its nodes are there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from cluster.manifests.description import WEIGHTS_FOLDER, Description
from cluster.probe import UNKNOWN_DIGEST, find_checkpoint, role_memory
from cluster.recipe import Recipe, make_plan
from pipeline.errors import CheckpointFault, SettingError, UserError
from pipeline.facts import CheckpointFacts, Facts, MediaFacts, load_render_facts
from pipeline.plan import Plan
from pipeline.spec import Storyboard, load_spec


@dataclass(frozen=True)
class Film:
    """A film that is rendered elsewhere. What is not on this machine is assumed: of the checkpoint the official one's
    numbers, of images, videos and sounds that they fit.
    """

    spec: Storyboard

    @cached_property
    def checkpoint(self) -> CheckpointFacts:
        """Without its digest, which nothing here needs. `path` is "" if it is not here."""
        try:
            folder = find_checkpoint(self.spec.checkpoint)
        except CheckpointFault:
            return CheckpointFacts("", UNKNOWN_DIGEST)
        return CheckpointFacts(str(folder), UNKNOWN_DIGEST, load_render_facts(folder))

    @cached_property
    def plan(self) -> Plan:
        """Raises SpecError."""
        any_length = MediaFacts("", UNKNOWN_DIGEST, "video", 1280, 704, 30.0, 86_400.0, 86_400 * 30, has_audio=True)
        media = {path: replace(any_length, path=path, kind=kind) for path, kind in self.spec.media_paths().items()}
        loras = {lora.file: UNKNOWN_DIGEST for lora in self.spec.loras}
        return make_plan(Recipe(self.spec, Facts(self.checkpoint, media, loras)))

    def warnings(self, description: Description) -> list[str]:
        """What `longtake plan --card-gb` would say of the description's cards. Raises SpecError."""
        assumed = "" if self.checkpoint.path else f" (by the official checkpoint: {self.spec.checkpoint} is not here)"
        try:
            tasks = self.plan.tasks.values()
        except UserError as error:
            if not assumed:
                raise
            return [f"{error}{assumed}"]
        _, lines = role_memory(tasks, self.checkpoint, self.spec.memory, description.hardware.card_gb)
        return [f"--gpu-type {description.gpu_type}: {line}{assumed}" for line in lines]


def read_film(path: Path) -> tuple[Film, str]:
    """The film and its storyboard's text, if everything it names can be where its nodes look. Raises SpecError,
    SettingError.
    """
    spec = load_spec(path)
    files = [*spec.media_paths(), *(lora.file for lora in spec.loras)]
    if spec.checkpoint != "pocket":
        files.append(spec.checkpoint)
    for file in files:
        if not file.startswith("/"):
            remedy = (
                "Put it into the image, or onto a volume that every node has, and write its whole path "
                f"({WEIGHTS_FOLDER}/...)."
            )
            raise SettingError("is not on the cluster's nodes", field=str(path), value=file, remedy=remedy)
    return Film(spec), path.read_text(encoding="utf-8-sig")
