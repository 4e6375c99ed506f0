"""The commands for production: `longtake manifest ...` and `longtake schedule ...`. Like `cluster.cli`, parsers and
thin functions.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli_values import gpu_type
from pipeline.pace import GPUS

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

    from cluster.manifests.description import Description

_CLUSTER = ("name", "gpus", "gpu_type", "gpus_per_node", "stable_gpus", "image")
_KUBERNETES = ("secret", "weights", "queue", "priority_class", "spot_label")


def add_manifest(commands: Commands) -> None:
    """`longtake manifest FORMAT`."""
    parser = commands.add_parser("manifest", help="print a deployment's files: KubeRay, ray up, SkyPilot, Docker")
    formats = parser.add_subparsers(required=True, metavar="FORMAT")
    kuberay = formats.add_parser("kuberay", help="a RayCluster for a farm of renders")
    _add_cluster(kuberay)
    _add_kubernetes(kuberay)
    kuberay.set_defaults(command=_kuberay)
    rayjob = formats.add_parser("rayjob", help="a RayJob that renders one storyboard, with or without Kueue")
    _add_film(rayjob)
    _add_cluster(rayjob)
    _add_kubernetes(rayjob)
    rayjob.set_defaults(command=_rayjob)
    cronjob = formats.add_parser("cronjob", help="a CronJob that renders a schedule in its own pod, without KubeRay")
    cronjob.add_argument("schedule", metavar="NAME", help="as given to `longtake schedule add`")
    cronjob.add_argument("--schedules", required=True, metavar="PLACE", help="s3://, gs:// or az:// address")
    _add_cluster(cronjob)
    _add_nodes(cronjob)
    cronjob.set_defaults(command=_cronjob)
    for cloud in ("aws", "gcp"):
        machines = formats.add_parser(f"ray-up-{cloud}", help=f"machines of {cloud.upper()} by `ray up`")
        _add_cluster(machines)
        region = "default: us-west-2" if cloud == "aws" else "default: us-central1"
        machines.add_argument("--region", default=None, metavar="NAME", help=region)
        if cloud == "gcp":
            machines.add_argument("--project", required=True, metavar="ID", help="Google Cloud project")
        machines.set_defaults(command=_ray_up, cloud=cloud)
    sky = formats.add_parser("skypilot", help="a SkyPilot task that renders one storyboard")
    _add_film(sky)
    _add_cluster(sky)
    sky.set_defaults(command=_skypilot)
    grafana = formats.add_parser("grafana", help="the dashboard for the metrics that orchestrators export")
    grafana.set_defaults(command=_grafana)
    docker = formats.add_parser("dockerfile", help="the image that every node runs")
    docker.add_argument("--cpu", action="store_true", help="without CUDA, for clusters without GPUs")
    docker.set_defaults(command=_dockerfile)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--name", default=None, metavar="NAME", help="of the cluster (default: longtake)")
    add("--gpus", type=int, required=True, metavar="N", help="at most so many in all")
    add("--gpu-type", type=gpu_type, choices=tuple(GPUS), default=None, help="default: h200")
    add("--gpus-per-node", type=int, default=None, metavar="N", help="default: the smallest machine there is")
    add(
        "--stable-gpus", type=int, default=None, metavar="N",
        help="of them on nodes that are not taken away, for the chains (default: one node; the rest is spot)",
    )  # fmt: skip
    add("--image", default=None, metavar="IMAGE", help="default: longtake:latest")


def _add_kubernetes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--secret", default=None, metavar="NAME", help="secret with the token (default: longtake-token)")
    add("--queue", default=None, metavar="NAME", help="Kueue's local queue")
    add("--priority-class", default=None, metavar="NAME", help="Kueue's, with --queue")
    _add_nodes(parser)


def _add_nodes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--weights", default=None, metavar="CLAIM", help="volume with checkpoints, read-only at /weights")
    add("--spot-label", default=None, metavar="KEY=VALUE", help="label of spot nodes (default: GKE's)")


def _add_film(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("film", type=Path, metavar="FILM", help="the storyboard")
    parser.add_argument("--store", required=True, metavar="PLACE", help="s3://, gs:// or az:// address of the render")


def _described(options: argparse.Namespace, *names: str) -> Description:
    from cluster.manifests.description import describe

    return describe(**{name: getattr(options, name) for name in (*_CLUSTER, *names)})


def _kuberay(options: argparse.Namespace) -> int:
    from cluster.manifests.command import print_kuberay

    return print_kuberay(_described(options, *_KUBERNETES))


def _rayjob(options: argparse.Namespace) -> int:
    from cluster.manifests.command import print_rayjob

    return print_rayjob(_described(options, *_KUBERNETES, "store"), options.film)


def _cronjob(options: argparse.Namespace) -> int:
    from cluster.manifests.command import print_cronjob

    return print_cronjob(_described(options, "weights", "spot_label"), options.schedule, options.schedules)


def _ray_up(options: argparse.Namespace) -> int:
    from cluster.manifests.command import print_ray_up

    names = ("region", "project") if options.cloud == "gcp" else ("region",)
    return print_ray_up(_described(options, *names), options.cloud)


def _skypilot(options: argparse.Namespace) -> int:
    from cluster.manifests.command import print_skypilot

    return print_skypilot(_described(options, "store"), options.film)


def _grafana(options: argparse.Namespace) -> int:
    from cluster.manifests.command import print_grafana

    return print_grafana()


def _dockerfile(options: argparse.Namespace) -> int:
    from cluster.manifests.command import print_dockerfile

    return print_dockerfile("cpu" if options.cpu else "cuda")


def add_schedule_commands(commands: Commands) -> None:
    """`longtake schedule add|list|remove|run-now|tick`."""
    parser = commands.add_parser("schedule", help="renders that come again: nightly, weekly, a table's rows")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    adding = actions.add_parser("add", help="put a storyboard on the schedule")
    adding.add_argument("name", metavar="NAME", help="of the schedule")
    adding.add_argument("film", type=Path, metavar="FILM", help="storyboard, with ${date}, ${counter}, ${column} ...")
    adding.add_argument("--cron", required=True, metavar="'30 2 * * *'", help="minute hour day month weekday")
    adding.add_argument("--time-zone", required=True, metavar="ZONE", help="such as Europe/Berlin")
    adding.add_argument(
        "--overlap", choices=("skip", "queue", "replace"), default="skip",
        help="a tick while a run is there: skip it, queue behind it, replace it (default: %(default)s)",
    )  # fmt: skip
    adding.add_argument("--rows", type=Path, default=None, metavar="TABLE", help=".csv or .parquet: a row for each run")
    adding.add_argument(
        "--renders", default="renders", metavar="PLACE",
        help="each run's store is a folder there (default: %(default)s)",
    )  # fmt: skip
    _add_schedules_place(adding)
    adding.set_defaults(command=_schedule_add)
    listing = actions.add_parser("list", help="all schedules, or the history of one")
    listing.add_argument("name", nargs="?", default=None, metavar="NAME", help="of one; its history")
    listing.add_argument("--json", action="store_true", help="machine-readable output on stdout")
    _add_schedules_place(listing)
    listing.set_defaults(command=_schedule_list)
    for name, command, text, optional in (
        ("remove", _schedule_remove, "take it off the schedule; its history stays", None),
        ("run-now", _schedule_run_now, "one run outside the schedule, here", None),
        ("tick", _schedule_tick, "render what is due, here: for a clock without a farm", "?"),
    ):
        action = actions.add_parser(name, help=text)
        which = "of the schedule; else all that are due" if optional else "of the schedule"
        action.add_argument("name", nargs=optional, metavar="NAME", help=which)
        if name == "run-now":
            action.add_argument("--farm", action="store_true", help="leave it to the farm that keeps these schedules")
        _add_schedules_place(action)
        action.set_defaults(command=command)


def _add_schedules_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--schedules", default="schedules", metavar="PLACE",
        help="folder or address where schedules are kept (default: %(default)s)",
    )  # fmt: skip


def _schedule_add(options: argparse.Namespace) -> int:
    from cluster.schedules import add_schedule

    names = ("cron", "time_zone", "overlap", "rows", "renders")
    values = {name: getattr(options, name) for name in names}
    return add_schedule(options.schedules, options.name, options.film, **values)


def _schedule_list(options: argparse.Namespace) -> int:
    from cluster.schedules import print_schedules

    return print_schedules(options.schedules, options.name, as_json=options.json)


def _schedule_remove(options: argparse.Namespace) -> int:
    from cluster.schedules import remove_schedule

    return remove_schedule(options.schedules, options.name)


def _schedule_run_now(options: argparse.Namespace) -> int:
    from cluster.schedules import HereRunner, run_now

    return run_now(options.schedules, options.name, None if options.farm else HereRunner())


def _schedule_tick(options: argparse.Namespace) -> int:
    from cluster.schedules import HereRunner, tick

    return tick(options.schedules, options.name, HereRunner())
