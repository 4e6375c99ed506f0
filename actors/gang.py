"""A gang: processes that compute each segment together, each on a device of its own.

Every member runs the same order on the same inputs; the transformer's tokens and heads are shared out among them
(`model.sequence_parallel`). The first member alone writes to the store and reports, and what only it can know, such as
a request to stop, it tells the others after each step. A member that is missing leaves the others waiting, so whoever
made a gang ends it as a whole.

Members meet at a TCP store of the first one, then talk through NCCL on GPUs and gloo on CPUs. Neither asks who is
there: the network between members has to be private, as Ray's own has.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from model.dit import DiT
from model.sequence_parallel import split_sequence

SILENCE_LIMIT = timedelta(hours=1)
"""How long a member waits for the others. Longer than any outage of the store that the first one sits out; a gang
that stands still is noticed from outside, by its progress.
"""
MEETING_LIMIT = timedelta(minutes=5)


@dataclass(frozen=True)
class Gang:
    """What a member knows of its gang: its own number, from 0, and the process group."""

    rank: int
    size: int
    group: dist.ProcessGroup
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this is the member that writes and reports."""
        return self.rank == 0

    def agree(self, wanted: bool) -> bool:
        """What the first member wants, on every member. All have to ask."""
        told = torch.tensor([int(wanted)], device=self.device)
        dist.broadcast(told, src=0, group=self.group)
        return bool(told.item())

    def split(self, dit: DiT) -> None:
        """Share the network's work out among the members. Raises InputError where they do not divide its heads."""
        split_sequence(dit, self.group)


class MeetingPlace:
    """The first member's TCP store, on a free port of `host`; it lives as long as this object."""

    def __init__(self, host: str) -> None:
        self.store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=MEETING_LIMIT)
        self.address = f"{host} {self.store.port}"


def join_gang(rank: int, size: int, meeting: MeetingPlace | str, device: str) -> Gang:
    """Meet the other members: the first one at its own MeetingPlace, the others at its address. Returns when all are
    there; raises what torch.distributed raises if one stays away.
    """
    if isinstance(meeting, MeetingPlace):
        store = meeting.store
    else:
        host, port = meeting.rsplit(" ", 1)
        store = dist.TCPStore(host, int(port), is_master=False, timeout=MEETING_LIMIT)
    here = torch.device(device, 0) if device == "cuda" else torch.device(device)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=SILENCE_LIMIT,
        device_id=here if device == "cuda" else None,
    )
    gang = Gang(rank, size, dist.distributed_c10d._get_default_group(), here)
    gang.agree(True)
    return gang
