"""The commands for deployments: `longtake manifest ...`. Parsers and thin functions, like `cluster.cli`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

    from cluster.manifests.description import Description

GPU_TYPES = ("h200", "h100", "a100-80gb", "l40s", "l4", "a10g")
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
    for cloud in ("aws", "gcp"):
        machines = formats.add_parser(f"ray-up-{cloud}", help=f"machines of {cloud.upper()} by `ray up`")
        _add_cluster(machines)
        machines.add_argument("--region", default=None, metavar="NAME")
        if cloud == "gcp":
            machines.add_argument("--project", required=True, metavar="ID", help="Google Cloud project")
        machines.set_defaults(command=_ray_up, cloud=cloud)
    sky = formats.add_parser("skypilot", help="a SkyPilot task that renders one storyboard")
    _add_film(sky)
    _add_cluster(sky)
    sky.set_defaults(command=_skypilot)
    docker = formats.add_parser("dockerfile", help="the image that every node runs")
    docker.add_argument("--cpu", action="store_true", help="without CUDA, for clusters without GPUs")
    docker.set_defaults(command=_dockerfile)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--name", default=None, metavar="NAME", help="of the cluster (default: longtake)")
    add("--gpus", type=int, required=True, metavar="N", help="at most so many in all")
    add("--gpu-type", choices=GPU_TYPES, default=None, help="default: h200")
    add("--gpus-per-node", type=int, default=None, metavar="N", help="default: the smallest machine there is")
    add(
        "--stable-gpus", type=int, default=None, metavar="N",
        help="of them on nodes that are not taken away, for the chains (default: one node; the rest is spot)",
    )  # fmt: skip
    add("--image", default=None, metavar="IMAGE", help="default: longtake:latest")


def _add_kubernetes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--secret", default=None, metavar="NAME", help="secret with the token (default: longtake-token)")
    add("--weights", default=None, metavar="CLAIM", help="volume with checkpoints, read-only at /weights")
    add("--queue", default=None, metavar="NAME", help="Kueue's local queue")
    add("--priority-class", default=None, metavar="NAME", help="Kueue's, with --queue")
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


def _ray_up(options: argparse.Namespace) -> int:
    from cluster.manifests.command import print_ray_up

    names = ("region", "project") if options.cloud == "gcp" else ("region",)
    return print_ray_up(_described(options, *names), options.cloud)


def _skypilot(options: argparse.Namespace) -> int:
    from cluster.manifests.command import print_skypilot

    return print_skypilot(_described(options, "store"), options.film)


def _dockerfile(options: argparse.Namespace) -> int:
    from cluster.manifests.command import print_dockerfile

    return print_dockerfile("cpu" if options.cpu else "cuda")
