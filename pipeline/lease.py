"""Who may write a render's ledger: one orchestrator at a time, numbered by epochs.

`lease/<epoch>.json` is created only if absent, and creating it takes the lease from whoever had an earlier
epoch. The holder of epoch n has lost it as soon as n+1 exists. Whether a holder lives is never judged by
clocks: on this host by its process, elsewhere by watching whether its heartbeat moves.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import SettingError
from pipeline.records import TornRecord, seal, unseal
from pipeline.store import Store

WATCH_STEP_S = 1.0
PROC = Path("/proc")
"""Not there on macOS."""


@dataclass(frozen=True)
class Owner:
    """A process that takes leases. `host` changes with every boot (not on macOS), `mark` tells a reused pid apart."""

    host: str
    pid: int
    mark: str = ""


@dataclass(frozen=True)
class LeaseHolder:
    """Who took the last lease. `released` if the render ended in order."""

    epoch: int
    owner: Owner
    taken_at_s: float
    """Unix time by the holder's clock, for people only."""
    released: bool


class LeaseHeld(SettingError):
    """Whoever took the lease last still lives."""


def place_of(holder: LeaseHolder) -> str:
    """Where it is, in words."""
    return f"process {holder.owner.pid} on {holder.owner.host.split('/')[0]}"


def this_process() -> Owner:
    """The owner that this process is."""
    boot = _text(PROC / "sys/kernel/random/boot_id")[:8]
    space = _link(PROC / "self/ns/pid")
    return Owner(f"{socket.gethostname()}/{boot}/{space}", os.getpid(), _process_mark(os.getpid()))


def lease_path(epoch: int) -> str:
    """Where the lease of an epoch lies."""
    return f"lease/{epoch:08d}.json"


def last_holder(store: Store) -> LeaseHolder | None:
    """Who took the last lease, None if nobody ever did. One that cannot be read counts as released."""
    epochs = _epochs(store)
    if not epochs:
        return None
    epoch = max(epochs)
    released = epochs[epoch]
    try:
        value = unseal(store.read(lease_path(epoch)))
    except TornRecord:
        return LeaseHolder(epoch, Owner("unknown", 0), 0.0, True)
    return LeaseHolder(epoch, Owner(**value["owner"]), value["taken_at_s"], released)


def unreleased(store: Store) -> list[int]:
    """Epochs that no holder has ended in order: each was lost, but for the last one if its holder lives."""
    return sorted(epoch for epoch, released in _epochs(store).items() if not released)


def lease_record(epoch: int, owner: Owner, nonce: str, taken_at_s: float, *, fresh: bool = False) -> bytes:
    """The bytes of a lease. The nonce makes two attempts at the same lease differ."""
    content = {"epoch": epoch, "owner": asdict(owner), "nonce": nonce, "taken_at_s": taken_at_s}
    return seal(content | ({"fresh": True} if fresh else {}))


def cuts(store: Store) -> list[tuple[int, float]]:
    """(epoch, Unix time) of each lease that started over, in order. One that cannot be read did not."""
    paths = [file.path for file in store.list("lease") if file.path.endswith(".json")]
    found = []
    for _, data in store.read_many(paths):
        try:
            value = unseal(data or b"")
        except TornRecord:
            continue
        if value.get("fresh"):
            found.append((value["epoch"], value["taken_at_s"]))
    return found


def lives(holder: LeaseHolder, me: Owner) -> bool | None:
    """Whether the holder still renders; None for one on another host, whose heartbeat would have to be watched."""
    if holder.released:
        return False
    if holder.owner.host == me.host:
        return _process_mark(holder.owner.pid) == holder.owner.mark != ""
    return None


def refuse_if_live(
    store: Store, holder: LeaseHolder, me: Owner, *, watch_s: float, sleep: Callable[[float], None]
) -> None:
    """Raise LeaseHeld if the holder still lives; watches its heartbeat if it is on another host."""
    live = lives(holder, me)
    if live is None:
        live = _beats(store, holder.epoch, watch_s, sleep)
    if live:
        raise LeaseHeld(
            f"another render is writing here ({place_of(holder)})",
            field="--store",
            value=store.url,
            remedy="Wait for it, follow it with `longtake status`, or stop it.",
        )


def beat_path(epoch: int) -> str:
    """Where the holder's heartbeat lies."""
    return f"lease/{epoch:08d}.beat"


def _epochs(store: Store) -> dict[int, bool]:
    """Whether each was released."""
    names = {file.path.removeprefix("lease/") for file in store.list("lease")}
    epochs = [name[:8] for name in names if re.fullmatch(r"[0-9]{8}\.json", name)]
    return {int(epoch): f"{epoch}.released" in names for epoch in epochs}


def _beats(store: Store, epoch: int, watch_s: float, sleep: Callable[[float], None]) -> bool:
    first, waited_s = _beat(store, epoch), 0.0
    while waited_s < watch_s:
        sleep(WATCH_STEP_S)
        waited_s += WATCH_STEP_S
        if _beat(store, epoch) != first:
            return True
    return False


def _beat(store: Store, epoch: int) -> bytes:
    try:
        return store.read(beat_path(epoch))
    except FileNotFoundError:
        return b""


def _process_mark(pid: int) -> str:
    """When a live process started, "" if there is none: in clock ticks since boot; without /proc as `ps` says it."""
    if not (PROC / "self").exists():
        return _mark_by_ps(pid)
    fields = _text(PROC / f"{pid}/stat").rpartition(")")[2].split()
    # Field 3 (state) is fields[0]: a zombie has ended; field 22 is the start time.
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def _mark_by_ps(pid: int) -> str:
    command = ["ps", "-o", "stat=", "-o", "lstart=", "-p", str(pid)]
    # Local time in words, so whoever asks must ask in the same zone and language.
    environment = {**os.environ, "TZ": "UTC0", "LC_ALL": "C"}
    said = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
    state, *started = said.split() or [""]
    return "" if state[:1] in ("Z", "X") else " ".join(started)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
