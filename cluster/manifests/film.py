"""The storyboard of a manifest that renders one film, and what can be said of it before its nodes are there."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from cluster.manifests.description import WEIGHTS_FOLDER, Description
from cluster.probe import UNKNOWN_DIGEST, find_checkpoint, role_memory
from cluster.recipe import Recipe, make_plan
from pipeline.errors import CheckpointFault, SettingError, UserError
from pipeline.facts import CheckpointFacts, Facts, MediaFacts, load_render_facts
from pipeline.plan import Plan
from pipeline.spec import Storyboard, load_spec


def examine(spec: Storyboard, description: Description) -> tuple[Description, list[str]]:
    """The description with the film's size, and what `longtake plan --gpu-type` would say of its cards.

    What is not on this machine is assumed: of the checkpoint the official one's numbers, of images, videos and sounds
    that they fit. Raises SpecError for a film that the checkpoint here cannot make.
    """
    checkpoint = _checkpoint(spec)
    assumed = "" if checkpoint.path else f" (by the official checkpoint: {spec.checkpoint} is not here)"
    try:
        plan = _plan(spec, checkpoint)
    except UserError as error:
        if not assumed:
            raise
        return description, [f"{error}{assumed}"]
    film_gib = math.ceil(plan.estimate.bytes_by_task[plan.film_task_id] / 2**30)
    _, lines = role_memory(plan.tasks.values(), checkpoint, spec.memory, description.gpu.memory_gb)
    warnings = [f"--gpu-type {description.gpu_type}: {line}{assumed}" for line in lines]
    return description.model_copy(update={"film_gib": film_gib}), warnings


def _checkpoint(spec: Storyboard) -> CheckpointFacts:
    """Without its digest, which nothing here needs. `path` is "" if it is not here."""
    try:
        folder = find_checkpoint(spec.checkpoint)
    except CheckpointFault:
        return CheckpointFacts("", UNKNOWN_DIGEST)
    return CheckpointFacts(str(folder), UNKNOWN_DIGEST, load_render_facts(folder))


def _plan(spec: Storyboard, checkpoint: CheckpointFacts) -> Plan:
    fits = MediaFacts("", UNKNOWN_DIGEST, "video", 1280, 704, 30.0, 86_400.0, 86_400 * 30, has_audio=True)
    media = {path: replace(fits, path=path, kind=kind) for path, kind in spec.media_paths().items()}
    loras = {lora.file: UNKNOWN_DIGEST for lora in spec.loras}
    return make_plan(Recipe(spec, Facts(checkpoint, media, loras)))


def read_film(path: Path) -> tuple[Storyboard, str]:
    """The storyboard and its text, if everything it names can be where its nodes look. Raises SpecError,
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
    return spec, path.read_text(encoding="utf-8-sig")
