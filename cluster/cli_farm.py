"""The commands for a farm: `longtake farm`, `submit`, `list`, `watch`, `resume`, `priority`, `download`, `usage`.
Like `cluster.cli`, parsers and thin functions.

`status`, `logs`, `pause` and `cancel` work on a farm's render where `--address` is given or RAY_ADDRESS is set and
what they are given looks like an id; without, on a render's place.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli_values import duration_s, moment, money, positive, seconds
from pipeline.tasks import NAME_PATTERN

if TYPE_CHECKING:
    from cluster.farm_commands import Cluster

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_farm_commands(commands: Commands) -> None:
    """All of them."""
    _add_farm(commands)
    _add_submit(commands)
    _add(commands, "list", "renders of the cluster's farm, those that run first").set_defaults(command=_list)
    watch = _add(commands, "watch", "follow a farm's render to its end; exits as it does", one=True)
    watch.set_defaults(command=_watch)
    resume = _add(commands, "resume", "have a farm go on with a render that stopped or waits for approval", one=True)
    _add_budget(resume)
    resume.set_defaults(command=_resume)
    priority = _add(commands, "priority", "change a farm's render's priority", one=True)
    priority.add_argument("priority", type=int, metavar="0-100", help="higher ones go first; usual: 50")
    priority.set_defaults(command=_priority)
    download = _add(commands, "download", "copy a farm's finished film here; goes on where it stopped", one=True)
    download.add_argument("--to", type=Path, default=None, metavar="PLACE", help="file or folder (default: here)")
    download.set_defaults(command=_download)
    usage = _add(commands, "usage", "worker seconds: busy, loading, idle, lost")
    usage.add_argument("--by", choices=("owner", "render"), default="owner", help="default: %(default)s")
    usage.set_defaults(command=_usage)


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """Where the farm is."""
    add = parser.add_argument
    add("--address", default=None, metavar="HOST:PORT|URL", help="the cluster, or its dashboard (default: RAY_ADDRESS)")
    add("--insecure", action="store_true", help="use it even if anyone who reaches it can run code there")


def dashboard_of(options: argparse.Namespace) -> str | None:
    """The dashboard of the cluster whose farm is meant, where the cluster is named by it; None for other addresses."""
    address = getattr(options, "address", None) or os.environ.get("RAY_ADDRESS") or ""
    if not address.startswith(("http://", "https://")):
        return None
    is_meant = options.command in OF_A_FARM or ("place" in options and "address" in options and is_farmed(options))
    return address if is_meant else None


def run_there(dashboard: str, options: argparse.Namespace, words: Sequence[str]) -> int:
    """Run the command, given in these words, as a job on the cluster."""
    from cluster import jobs
    from cluster.farm_commands import books_url
    from cluster.render import RenderRequest

    insecure = options.insecure
    if options.command is _download:
        return jobs.download_there(dashboard, options.id, options.to, insecure=insecure)
    if options.command in (_submit, _farm_start):
        words = [*words, "--farm-store", books_url(options.farm_store)]
    if options.command is _submit:
        return jobs.submit_there(dashboard, RenderRequest(options.storyboard, options.store), words, insecure=insecure)
    return jobs.run_there(dashboard, words, insecure=insecure)


def is_farmed(options: argparse.Namespace) -> bool:
    """Whether the place given is a farm's render: its id, and a cluster is named."""
    place = str(options.place)
    is_id = NAME_PATTERN.fullmatch(place) is not None and not Path(place).exists()
    return options.address is not None or (is_id and bool(os.environ.get("RAY_ADDRESS")))


def cluster_of(options: argparse.Namespace) -> Cluster:
    """The cluster that the options name."""
    from cluster.farm_commands import Cluster

    return Cluster(options.address, options.insecure)


def _add(commands: Commands, name: str, text: str, *, one: bool = False) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text)
    if one:
        parser.add_argument("id", metavar="ID", help="as `longtake submit` and `list` print it")
    add_cluster(parser)
    parser.add_argument("--json", action="store_true", help="machine-readable output on stdout")
    return parser


def _add_farm(commands: Commands) -> None:
    actions = commands.add_parser("farm", help="start or stop the farm of a cluster").add_subparsers(
        required=True, metavar="ACTION"
    )
    start = actions.add_parser("start", help="start it; it outlives this command")
    add_cluster(start)
    add = start.add_argument
    add("--farm-store", default=None, metavar="PLACE", help="of its books (default: $LONGTAKE_FARM, renders/farm)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what the workers compute on")
    add("--threads", type=positive, default=None, metavar="N", help="compute threads of a worker (CPU: 1)")
    add("--workers", dest="most_workers", type=positive, default=None, metavar="N", help="at most so many")
    add("--idle", dest="idle_s", type=duration_s, default=None, metavar="2m", help="end idle ones then (default: 2m)")
    add("--price", dest="price_hour", type=money, default=None, metavar="P", help="of one worker and hour")
    start.set_defaults(command=_farm_start)
    stop = actions.add_parser("stop", help="save what runs and end it; the queue stays in its books")
    add_cluster(stop)
    stop.set_defaults(command=_farm_stop)


def _add_submit(commands: Commands) -> None:
    parser = commands.add_parser("submit", help="have the cluster's farm render a storyboard, and go home")
    add = parser.add_argument
    add("storyboard", type=Path, metavar="FILM", help="a storyboard (.yaml) or a film longtake made")
    add("--store", default=None, metavar="PLACE", help="where the render lies: every node has to reach it")
    add("--until", choices=("film", "stage-one"), default="film", help="stage-one: wait there for `resume`")
    add_cluster(parser)
    add("--farm-store", default=None, metavar="PLACE", help="books of a farm that has to be started")
    add("--id", default=None, metavar="ID", help="the render's id (default: from its title and store)")
    add("--owner", default=None, metavar="NAME", help="who it is for (default: you)")
    add("--priority", type=int, default=50, metavar="0-100", help="higher ones go first (default: %(default)s)")
    add("--gpus", dest="most_workers", type=positive, default=None, metavar="N", help="at most so many workers at once")
    add("--gang", type=positive, default=1, metavar="N", help="workers that compute each segment together")
    add("--start-after", type=moment, default=0.0, metavar="TIME", help="2026-12-24T20:00, local unless it says")
    add("--done-by", type=moment, default=None, metavar="TIME", help="goes before its equals once that is in danger")
    _add_budget(parser)
    add("--allow-mixed", action="store_true", help="use workers with another numerics record, and report it")
    add(
        "--on-event", action="append", default=[], metavar="[done,failed,paused,approval=]COMMAND|URL",
        help="call that with a JSON object; may be given several times",
    )  # fmt: skip
    add("--watch", action="store_true", help="follow it to its end and exit as it does")
    add("--json", action="store_true", help="machine-readable output on stdout")
    parser.set_defaults(command=_submit)


def _add_budget(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--max-cost", type=money, default=None, metavar="COST", help="pause once so much is spent (farm's --price)")
    add("--deadline", type=seconds, default=None, metavar="8h", help="pause after that time of one run")


def _farm_start(options: argparse.Namespace) -> int:
    from cluster.farm_commands import start_farm

    names = ("device", "threads", "most_workers", "idle_s", "price_hour")
    wishes = {name: getattr(options, name) for name in names}
    return start_farm(cluster_of(options), store=options.farm_store, **wishes)


def _farm_stop(options: argparse.Namespace) -> int:
    from cluster.farm_commands import stop_farm

    return stop_farm(cluster_of(options))


def _submit(options: argparse.Namespace) -> int:
    from cluster.farm_commands import Wishes, submit
    from cluster.render import RenderRequest

    wishes = Wishes(
        owner=options.owner,
        priority=options.priority,
        most_workers=options.most_workers,
        start_after_s=options.start_after,
        done_by_s=options.done_by,
        deadline_s=options.deadline,
        most_cost=options.max_cost,
        allow_mixed=options.allow_mixed,
        on_event=options.on_event,
        render_id=options.id,
        gang=options.gang,
    )
    film = RenderRequest(options.storyboard, options.store, until=options.until, as_json=options.json)
    return submit(film, cluster_of(options), wishes, options.farm_store, watch_it=options.watch)


def _list(options: argparse.Namespace) -> int:
    from cluster.farm_commands import print_list

    return print_list(cluster_of(options), as_json=options.json)


def _watch(options: argparse.Namespace) -> int:
    from cluster.farm_commands import watch

    return watch(options.id, cluster_of(options), as_json=options.json)


def _resume(options: argparse.Namespace) -> int:
    from cluster.farm_commands import resume

    budget = {"most_cost": options.max_cost, "deadline_s": options.deadline}
    return resume(options.id, cluster_of(options), **budget, as_json=options.json)


def _priority(options: argparse.Namespace) -> int:
    from cluster.farm_commands import adjust

    return adjust(options.id, cluster_of(options), priority=options.priority, as_json=options.json)


def _download(options: argparse.Namespace) -> int:
    from cluster.farm_commands import download

    return download(options.id, cluster_of(options), options.to)


def _usage(options: argparse.Namespace) -> int:
    from cluster.farm_commands import print_usage

    return print_usage(cluster_of(options), options.by, as_json=options.json)


OF_A_FARM = frozenset((_farm_start, _farm_stop, _submit, _list, _watch, _resume, _priority, _download, _usage))
