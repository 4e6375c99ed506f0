"""What a render was ordered with: storyboard and facts, enough to plan it again anywhere, from the store
alone.

`recipe.json` in the render's folder. The orchestrator plans from it, and so does `longtake status`: both see
the same tasks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline.errors import SettingError, SpecError, first_line
from pipeline.facts import CheckpointFacts, Facts, MediaFacts, Overrides, RenderFacts
from pipeline.pace import Pace, published
from pipeline.plan import Plan, Until, plan_film
from pipeline.spec import Storyboard, parse_spec, recipe_text
from pipeline.store import Store
from pipeline.tasks import RECIPE_VERSION

RECIPE_FILE = "recipe.json"


@dataclass(frozen=True)
class Recipe:
    """An order for a film. The overrides in `facts` are left empty here: the ledger knows them."""

    spec: Storyboard
    facts: Facts
    until: Until = "film"
    shots: tuple[str, ...] | None = None
    strip: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the software, for the film's metadata."""
    recipe_version: int = RECIPE_VERSION
    """What longtake computed like when this was written."""
    takes: int = 1
    """How many takes of `shots` a preview shows."""

    def put(self, store: Store) -> None:
        """Write `recipe.json`."""
        store.put_replace(RECIPE_FILE, json.dumps(self.to_json(), indent=1, ensure_ascii=False).encode())

    def to_json(self) -> dict[str, Any]:
        """JSON-able; `from_json` reads it back."""
        checkpoint = self.facts.checkpoint
        return {
            "spec": self.spec.as_written(),
            "checkpoint": {
                "path": checkpoint.path,
                "digest": checkpoint.digest,
                "render": checkpoint.render.model_dump(),
            },
            "media": {path: asdict(media) for path, media in self.facts.media.items()},
            "loras": dict(self.facts.loras),
            "pace": self.facts.pace.to_json(),
            "until": self.until,
            "shots": list(self.shots) if self.shots is not None else None,
            "strip": self.strip,
            "takes": self.takes,
            "versions": dict(self.versions),
            "recipe_version": RECIPE_VERSION,
            "written_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Recipe:
        """What `to_json` wrote."""
        checkpoint = value["checkpoint"]
        facts = Facts(
            checkpoint=CheckpointFacts(
                checkpoint["path"], checkpoint["digest"], RenderFacts.model_validate(checkpoint["render"])
            ),
            media={path: MediaFacts(**media) for path, media in value["media"].items()},
            loras=value["loras"],
            pace=Pace.from_json(value["pace"]) if "pace" in value else published(),
        )
        shots = None if value["shots"] is None else tuple(value["shots"])
        spec = parse_spec(json.dumps(value["spec"]), RECIPE_FILE)
        version = value.get("recipe_version", 1)
        takes = value.get("takes", 1)
        return cls(spec, facts, value["until"], shots, value["strip"], value["versions"], version, takes)


def load_recipe(store: Store) -> Recipe:
    """The recipe of the render in this store. Raises SettingError if there is none, or none that can be read."""
    try:
        data = store.read(RECIPE_FILE)
    except FileNotFoundError:
        remedy = "Name the folder of a render, or its storyboard."
        raise SettingError("no render here", field="--store", value=store.url, remedy=remedy) from None
    try:
        return Recipe.from_json(json.loads(data))
    except (ValueError, KeyError, TypeError, SpecError) as error:
        message = f"its {RECIPE_FILE} is damaged, or another version of longtake wrote it ({first_line(error)})"
        remedy = "Use that version, or `longtake render` its storyboard: that writes a new one, and goes on."
        raise SettingError(message, field="--store", value=store.url, remedy=remedy) from error


def make_plan(recipe: Recipe, overrides: Overrides | None = None) -> Plan:
    """The render's plan under what the ledger overrides (`LedgerState.overrides`)."""
    facts = replace(recipe.facts, **vars(overrides or Overrides()))
    text = None if recipe.strip else recipe_text(recipe.spec, recipe.versions)
    return plan_film(recipe.spec, facts, until=recipe.until, shots=recipe.shots, recipe=text, takes=recipe.takes)
