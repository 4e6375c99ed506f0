"""What a farm's renders have told lately, for whoever watches them."""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

KEPT_EVENTS = 200
KEPT_RENDERS = 100


@dataclass
class Events:
    """The last events of a render."""

    first: int = 0
    kept: deque[dict[str, Any]] = field(default_factory=deque)

    def add(self, events: list[dict[str, Any]]) -> None:
        self.kept.extend(events)
        while len(self.kept) > KEPT_EVENTS:
            self.kept.popleft()
            self.first += 1

    def since(self, cursor: int) -> tuple[list[dict[str, Any]], int]:
        return list(self.kept)[max(0, cursor - self.first) :], self.first + len(self.kept)


def forget_ended(events: dict[str, Events], still_open: Container[str]) -> None:
    """Keep what was told of open renders, and of the last KEPT_RENDERS others: a farm lives for months."""
    ended = [render_id for render_id in events if render_id not in still_open]
    for render_id in ended[:-KEPT_RENDERS]:
        del events[render_id]
