"""Computes. Plain classes with setup, run and close; see `actors.base`. Importing this package loads no model
code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actors.base import Actor
    from pipeline.tasks import Role


def make_actor(role: Role) -> Actor:
    """A fresh actor for a role, not set up yet."""
    match role:
        case "text":
            from actors.text import TextActor

            return TextActor()
        case "chain":
            from actors.chain import run_segment
            from actors.denoising import DenoisingActor

            return DenoisingActor("segment", run_segment)
        case "refine":
            from actors.denoising import DenoisingActor
            from actors.refine import run_window

            return DenoisingActor("window", run_window)
        case "media":
            from actors.media import MediaActor

            return MediaActor()
