"""`longtake submit`, `list`, `watch`, ...: what a person does with the renders of a farm, through its cluster.

Nothing here holds any state: each command connects, asks, prints and goes. Where a command takes the place of a
render, a farm's render is named by its id.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from cluster.download import download_film
from cluster.placement import device_for
from cluster.preflight import check_before_rendering
from cluster.progress import format_seconds, make_display
from cluster.render import Prepared, RenderRequest, prepare, put_media
from cluster.session import open_session
from pipeline.errors import LongtakeError, SettingError, TransientError, first_line
from pipeline.store import open_store
from pipeline.submissions import Adjusted, Hook, Occasion, Phase, Submission, check_priority, render_id_of

if TYPE_CHECKING:
    from cluster.farm import FarmSettings

T = TypeVar("T")
ANSWER_S = 120.0
START_S = 300.0
WATCH_S = 0.5
SILENCE_S = 600.0
OCCASIONS: tuple[Occasion, ...] = get_args(Occasion)
STORE_VARIABLE = "LONGTAKE_FARM"
"""Where a farm that has to be started keeps its books, if no option says so."""


@dataclass(frozen=True)
class Cluster:
    """Which cluster a command means."""

    address: str | None = None
    insecure: bool = False

    @property
    def found(self) -> str:
        """Its address, from Ray's own variables if none was given. Raises SettingError."""
        address = self.address or os.environ.get("RAY_ADDRESS")
        if not address:
            remedy = "Name the cluster, or set RAY_ADDRESS."
            raise SettingError("is missing", field="--address", remedy=remedy)
        return address


@dataclass(frozen=True)
class Wishes:
    """What `longtake submit` is told besides the storyboard. Times are Unix times."""

    owner: str | None = None
    priority: int = 50
    most_workers: int | None = None
    start_after_s: float = 0.0
    done_by_s: float | None = None
    deadline_s: float | None = None
    most_cost: float | None = None
    allow_mixed: bool = False
    on_event: Sequence[str] = ()
    render_id: str | None = None
    gang: int = 1


def start_farm(cluster: Cluster, **wishes: Any) -> int:
    """Start the cluster's farm, or say that it runs. (A session keeps stdout to itself: print after it.)"""
    with _connected(cluster):
        settings = _start_farm(**wishes)
    print(f"the farm runs on {settings.device}, its books are in {settings.store_url}; {price_of(settings)}")
    if other := _not_taken(settings, **wishes):
        print(f"it ran before, with another {', '.join(other)}; `longtake farm stop` first, its queue stays")
    return 0


def price_of(settings: FarmSettings) -> str:
    """What a farm that runs counts by."""
    if not settings.price_hour:
        return "no price is known: --max-cost is not taken"
    return f"a worker costs {settings.price_hour:g} an hour (--price, kept in its books)"


def _not_taken(settings: FarmSettings, store: str | None = None, device: str = "auto", **wishes: Any) -> list[str]:
    """The flags of `longtake farm start` that a farm which runs has otherwise."""
    flags = {"threads": "--threads", "most_workers": "--workers", "idle_s": "--idle", "price_hour": "--price"}
    other = [flag for name, flag in flags.items() if wishes.get(name) not in (None, getattr(settings, name))]
    if device not in ("auto", settings.device):
        other.append("--device")
    if store is not None and books_url(store) != settings.store_url:
        other.append("--farm-store")
    return other


def stop_farm(cluster: Cluster) -> int:
    """Save what runs, end the farm. Its queue stays, for the next farm on the same books."""
    import ray

    with _farm(cluster) as ask:
        actor = ask.actor
        ask(actor.stop.remote())
        ray.kill(actor, no_restart=True)
    print("the farm has stopped; what was queued or running goes on with the next one on the same books")
    return 0


def submit(film: RenderRequest, cluster: Cluster, wishes: Wishes, farm_store: str | None, *, watch_it: bool) -> int:
    """Check a storyboard, put what it names into its store, and have the farm render it."""
    cluster = replace(cluster, address=cluster.found)  # No cluster: said before the store is written to.
    prepared = prepare(film)
    check_before_rendering(prepared.recipe, prepared.plan, prepared.store, prepared.left, wishes.gang)
    submission = submission_of(prepared, wishes)
    with _connected(cluster):
        _start_farm(store=farm_store)
        put_media(prepared.plan, prepared.store)
        with _asking() as ask:
            row, was_there = ask(ask.actor.submit.remote(submission))
    if film.as_json:
        print(json.dumps({"attached": was_there, **asdict(row)}))
    else:
        words = {"done": "is done already", "queued": "is queued", "running": "is running"}
        words["approval"] = "waits for approval"
        print(f"{row.render_id} {words.get(row.phase, row.phase)}{' (it was submitted before)' if was_there else ''}")
        if was_there and row.message:
            print(row.message)
    return watch(row.render_id, cluster, as_json=film.as_json) if watch_it else 0


def submission_of(prepared: Prepared, wishes: Wishes) -> Submission:
    """The order for a planned render. Raises SettingError for wishes that cannot be."""
    if wishes.most_workers is not None and wishes.gang > wishes.most_workers:
        message = "is less than one gang"
        raise SettingError(message, field="--gpus", value=wishes.most_workers, remedy=f"--gang is {wishes.gang}.")
    title, store_url = prepared.recipe.spec.title, prepared.store.url
    return Submission(
        wishes.render_id or render_id_of(title, store_url),
        store_url,
        prepared.recipe.to_json(),
        title,
        wishes.owner or getpass.getuser(),
        check_priority(wishes.priority),
        wishes.start_after_s,
        wishes.done_by_s,
        wishes.most_workers,
        wishes.deadline_s,
        wishes.most_cost,
        wishes.allow_mixed,
        tuple(parse_hook(text) for text in wishes.on_event),
        wishes.gang,
    )


def parse_hook(text: str) -> Hook:
    """`[done,failed=]COMMAND` or `[...=]https://...`; without occasions, all. Raises SettingError."""
    names, found, target = text.partition("=")
    if found and re.fullmatch(r"[a-z]+(,[a-z]+)*", names) and (unknown := set(names.split(",")) - set(OCCASIONS)):
        remedy = f"Hooks are told of {', '.join(OCCASIONS)}."
        raise SettingError("is no occasion", field="--on-event", value=", ".join(sorted(unknown)), remedy=remedy)
    occasions = tuple(name for name in OCCASIONS if name in names.split(","))
    if not found or set(names.split(",")) - set(OCCASIONS):
        occasions, target = OCCASIONS, text
    if target.startswith(("http://", "https://")):
        return Hook(occasions, url=target)
    command = tuple(shlex.split(target))
    if shell := {">", ">>", "<", "|", "&&", "||", ";", "&"} & set(command):
        remedy = "No shell reads it: name a script, or write sh -c '...'."
        raise SettingError("is a word of a shell", field="--on-event", value=min(shell), remedy=remedy)
    if not command:
        remedy = f"COMMAND or URL, with {', '.join(OCCASIONS)} and = before it if only some matter."
        raise SettingError("names nothing to call", field="--on-event", value=text, remedy=remedy)
    return Hook(occasions, command=command)


def print_list(cluster: Cluster, *, as_json: bool) -> int:
    """All renders of the farm."""
    with _farm(cluster) as ask:
        rows, settings = ask(ask.actor.rows.remote()), ask(ask.actor.hello.remote())
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
        return 0
    lines = [("ID", "STATE", "PRIORITY", "OWNER", "WORKERS", "DONE", "LEFT", "SINCE", "")]
    for row in rows:
        done = f"{row.done}/{row.tasks}" if row.tasks else ""
        left = format_seconds(row.eta_s) if row.eta_s is not None else ""
        since = datetime.fromtimestamp(row.since_s).strftime("%d %b %H:%M")
        about = (str(row.priority), row.owner, str(row.workers or ""), done, left, since, row.message)
        lines.append((row.render_id, row.phase, *about))
    _print_table(lines)
    print(price_of(settings))
    return 0


def print_farm_status(render_id: str, cluster: Cluster, *, as_json: bool) -> int:
    """One render, as the farm sees it, and as its store does if that can be reached from here."""
    with _farm(cluster) as ask:
        row = ask(ask.actor.describe.remote(render_id))
    if as_json:
        print(json.dumps(asdict(row)))
        return 0
    message = f": {row.message}" if row.message else ""
    print(f"{row.render_id}: {row.phase}{message}, priority {row.priority}, {row.workers} worker(s)")
    if row.tasks:
        left = f", about {format_seconds(row.eta_s)} left" if row.eta_s is not None else ""
        print(f"  {row.done}/{row.tasks} tasks{left}")
    print(f"  store: {row.store_url}")
    return 0


def place_of(render_id: str, cluster: Cluster) -> str:
    """The store of a farm's render, for the commands that work from there."""
    with _farm(cluster) as ask:
        store_url: str = ask(ask.actor.describe.remote(render_id)).store_url
    return store_url


def watch(render_id: str, cluster: Cluster, *, as_json: bool) -> int:
    """Follow a render to its end; the exit code is the render's own. Being stopped stops nothing there."""
    display, cursor = make_display(as_json=as_json), 0
    with _farm(cluster) as ask, contextlib.closing(display):
        while True:
            news = ask(ask.actor.follow.remote(render_id, cursor))
            cursor = news.cursor
            for event in news.events:
                display.event(event)
            if news.summary is not None:
                display.progress(news.summary)
            if news.row.phase not in ("queued", "running"):
                break
            time.sleep(WATCH_S)
    row = news.row
    if not as_json:
        fetch = f"`longtake download {render_id}` fetches the film" if row.phase == "done" else ""
        message = "; ".join(part for part in (fetch, row.message) if part)
        print(f"{row.render_id}: {row.phase}{': ' + message if message else ''}")
    return int(row.exit_code if row.exit_code is not None else 1)


def change(render_id: str, phase: Phase, cluster: Cluster, *, as_json: bool) -> int:
    """Pause, resume (`queued`) or cancel."""
    with _farm(cluster) as ask:
        row = ask(ask.actor.change.remote(render_id, phase))
    return _say(row, as_json)


def adjust(
    render_id: str,
    cluster: Cluster,
    *,
    priority: int | None = None,
    most_cost: float | None = None,
    deadline_s: float | None = None,
    as_json: bool = False,
) -> int:
    """Give it another priority, budget or deadline."""
    if priority is not None:
        check_priority(priority)
    with _farm(cluster) as ask:
        row = ask(ask.actor.adjust.remote(render_id, Adjusted(time.time(), priority, most_cost, deadline_s)))
    return _say(row, as_json)


def resume(
    render_id: str, cluster: Cluster, *, most_cost: float | None, deadline_s: float | None, as_json: bool
) -> int:
    """Queue a render again that has paused, failed, was cancelled or waits for approval, perhaps with another
    budget."""
    if most_cost is not None or deadline_s is not None:
        entry = Adjusted(time.time(), None, most_cost, deadline_s)
        with _farm(cluster) as ask:
            ask(ask.actor.adjust.remote(render_id, entry))
    return change(render_id, "queued", cluster, as_json=as_json)


def print_usage(cluster: Cluster, by: str, *, as_json: bool) -> int:
    """Worker seconds by owner or by render."""
    with _farm(cluster) as ask:
        book = ask(ask.actor.usage.remote())
    found = book.by_owner() if by == "owner" else book.renders
    if as_json:
        print(json.dumps({name: asdict(usage) for name, usage in found.items()}))
        return 0
    lines: list[Sequence[str]] = [(by.upper(), "BUSY", "LOADING", "IDLE", "LOST", "COST")]
    for name, usage in sorted(found.items()):
        seconds = (usage.busy_s, usage.loading_s, usage.idle_s, usage.lost_s)
        lines.append((name or "(nobody)", *(format_seconds(value) for value in seconds), f"{usage.cost:.2f}"))
    _print_table(lines)
    return 0


def download(render_id: str, cluster: Cluster, to: Path | None) -> int:
    """Copy a finished film from its store to here; goes on with what is there already."""
    path = download_film(open_store(place_of(render_id, cluster)), to)
    print(path)
    return 0


# The farm


class Ask:
    """Calls a farm's methods: the answer, or the LongtakeError that it raised. Patient with one that restarts."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __call__(self, reference: Any) -> Any:
        import ray

        try:
            return ray.get(reference, timeout=SILENCE_S)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, LongtakeError) else error
            raise cause from None
        except ray.exceptions.RayError as error:
            raise TransientError(f"the farm does not answer: {first_line(error)}; try again") from error


@contextlib.contextmanager
def _connected(cluster: Cluster) -> Iterator[None]:
    with open_session(cluster.found, cpus=1, insecure=cluster.insecure):
        yield


@contextlib.contextmanager
def _asking() -> Iterator[Ask]:
    from cluster.farm import running_farm

    yield Ask(running_farm())


@contextlib.contextmanager
def _farm(cluster: Cluster) -> Iterator[Ask]:
    with _connected(cluster), _asking() as ask:
        yield ask


def _start_farm(store: str | None = None, device: str = "auto", **wishes: Any) -> Any:
    """Start the farm if none runs; the settings of the one that does."""
    import ray

    from cluster.farm import FarmSettings, farm_actor, running_farm

    there = None
    with contextlib.suppress(SettingError):
        there = running_farm()
    if there is not None:
        # Whatever is wrong with it now: it may have worked for days, and somebody's renders are in its queue.
        return Ask(there)(there.hello.remote())
    url = books_url(store)
    if device == "auto":
        device = device_for(ray.cluster_resources())
    slots = wishes.pop("slots", None) or ("GPU" if device == "cuda" else "CPU")
    given = {name: value for name, value in wishes.items() if value is not None}
    ffmpeg = os.environ.get("LONGTAKE_FFMPEG")
    actor = farm_actor(FarmSettings(url, device, slots, ffmpeg=ffmpeg, **given))
    try:
        return Ask(actor)(actor.hello.remote())
    except LongtakeError:
        # It never worked, and nobody may want it as it is: a wrong address, another farm's books.
        ray.kill(actor, no_restart=True)
        raise


def books_url(store: str | None) -> str:
    """Where a farm that is started keeps its books."""
    return open_store(store or os.environ.get(STORE_VARIABLE) or "renders/farm").url


def _say(row: Any, as_json: bool) -> int:
    if as_json:
        print(json.dumps(asdict(row)))
    else:
        print(f"{row.render_id}: {row.phase}, priority {row.priority}{': ' + row.message if row.message else ''}")
    return 0


def _print_table(lines: Sequence[Sequence[str]]) -> None:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


