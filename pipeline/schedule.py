"""Who does what: which role a free worker takes, and which kinds of task a role runs in which order.

The chain is the critical path, so each chain that can move gets a worker before refinement gets any; text
embeddings come before both, because everything waits for them. A worker leaves its role only when nothing is
left there for it: one worker goes through text, the whole chain and one change of role. Machines that stay are asked
first, so that the critical path is theirs, and take a long chain over from a spot machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.tasks import Role, TaskKind

Staff = Mapping[Role | None, int]
"""How many other workers have each role."""

ROLES_FOR_KIND: dict[TaskKind, tuple[Role, ...]] = {
    "text": ("text",),
    "source": ("media", "chain", "refine"),
    "segment": ("chain",),
    "window": ("refine",),
    "encode": ("media", "chain", "refine"),
    "film": ("media", "chain", "refine"),
}
"""Which roles can run a kind of task. Chain and refine workers hold a VAE, so they do the media tasks too."""
LONG_CHAIN = 8
"""Segments ahead of each chain from which one is taken over from a spot machine: the new worker waits for the running
segment, about a minute at full size, and the end of a spot machine costs the chain as much. One that has loaded the
role for it waits for half as many: loading takes part of a minute, too.
"""


@dataclass(frozen=True)
class Demand:
    """How many workers each role can use now."""

    text: int
    chain: int
    refine: int
    media: int
    segments: int = 0
    """Those that nobody has begun."""

    def of(self, role: Role) -> int:
        """The number for one role."""
        return {"text": self.text, "chain": self.chain, "refine": self.refine, "media": self.media}[role]


def kinds_of(role: Role, peers: Staff) -> tuple[TaskKind, ...]:
    """The kinds a worker of this role runs, first choice first."""
    match role:
        case "text":
            return ("text",)
        case "chain" if _count(peers, "refine") or _count(peers, "media"):
            return ("source", "segment", "encode", "film")
        case "chain":
            # Nobody else will encode before the chain is done, and the film so far is to be playable.
            return ("source", "encode", "segment", "film")
        case "refine":
            return ("source", "encode", "window", "film")
        case "media":
            return ("source", "encode", "film")


def choose_role(current: Role | None, able: Sequence[Role], peers: Staff, demand: Demand) -> Role | None:
    """The role a worker with nothing to do should have: the first one that its peers leave short of workers.

    None, or the current role, means: stay as you are.
    """
    for role in ("text", "chain", "refine"):
        if role in able and demand.of(role) > _count(peers, role):
            return role
    if current in ROLES_FOR_KIND["encode"] or "media" not in able:
        return current
    return "media" if demand.media > _count(peers, "media") else current


def must_leave_for_chain(current: Role | None, able: Sequence[Role], peers: Staff, segment_ready: bool) -> bool:
    """Whether a free worker drops even ready refinement work: a segment is ready and nobody has the role."""
    return segment_ready and current in ("refine", "media") and "chain" in able and not _count(peers, "chain")


def _count(peers: Staff, role: Role) -> int:
    return peers.get(role, 0)
