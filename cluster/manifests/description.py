"""The one description that every manifest is made of, and the values all of them share.

What holds in each format: the head is on demand and has 0 Ray CPUs, so that no task lands on the node whose
loss ends the cluster; workers say with Ray's label `ray.io/market-type` whether they can be taken away; the
token comes from a secret that exists before (a manifest names it and never holds it); a worker that has to
go is drained first, and has longer for that than saving a running segment takes.

Raises SettingError for a description that no cluster can have, naming the flag.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from cluster import json_log
from cluster.manifests.hardware import HARDWARE, Hardware
from pipeline.crew import SAVE_S
from pipeline.errors import SettingError
from pipeline.pace import GPUS, Gpu, GpuType
from pipeline.store import OBJECT_SCHEMES, open_store

MARKET_TYPE = "ray.io/market-type"
STABLE, SPOT = "on-demand", "spot"
TOKEN_FOLDER = "/etc/longtake/token"
TOKEN_PATH = f"{TOKEN_FOLDER}/auth_token"
"""Where every node finds the token. `auth_token` is also the key that KubeRay reads in a Kubernetes secret."""
WEIGHTS_FOLDER = "/weights"
STORYBOARD_PATH = "/film/storyboard.yaml"
CACHE_FOLDER = "/cache"
USER_ID = 1000
LOGGING = {json_log.VARIABLE: "json"}
RAY_PORT, DASHBOARD_PORT, OBJECT_PORT = 6379, 8265, 8076
DRAIN_S = {STABLE: 75, SPOT: 25}
"""How long a pod that was told to go still runs. SAVE_S before the end its running task saves its state, after the
step of the denoising that it is in. Spot machines are gone sooner: 30 s after the notice on Google Cloud, which
Kubernetes cuts to 25 s for pods."""
assert min(DRAIN_S.values()) > SAVE_S

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_IMAGE = re.compile(r"[a-z0-9][a-z0-9._/:@-]{0,254}")
_LABEL = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9./_-]{0,252}=[a-zA-Z0-9._-]{1,63}")


def _matching(pattern: re.Pattern[str], what: str) -> AfterValidator:
    def check(value: str) -> str:
        if not pattern.fullmatch(value):
            raise ValueError(what)
        return value

    return AfterValidator(check)


_NO_DISK = "nodes share no disk: write s3://, gs:// or az://"


def _is_shared(place: str) -> bool:
    return urlsplit(place).scheme in OBJECT_SCHEMES and bool(urlsplit(place).netloc)


def _store(value: str) -> str:
    if not _is_shared(value):
        raise ValueError(_NO_DISK)
    # Refuses an address with a key in it: manifests are kept in repositories, and commands are shown by `ps`.
    return open_store(value).url


def check_shared(field: str, place: str) -> None:
    """Raise SettingError unless every node can reach the place."""
    if not _is_shared(place):
        raise SettingError("is not usable here", field=field, value=place, remedy=f"{_NO_DISK}.")


Name = Annotated[str, _matching(_NAME, "write a-z, 0-9 and hyphens, at most 40, beginning with a letter")]
Image = Annotated[str, _matching(_IMAGE, "write a container image such as registry.example.com/longtake:1.0")]
NodeLabel = Annotated[str, _matching(_LABEL, "write KEY=VALUE")]
StoreUrl = Annotated[str, AfterValidator(_store)]


class Description(BaseModel):
    """A cluster, whatever makes it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    gpus: int = Field(ge=1, le=4096)
    """At most so many, spot and stable together."""
    gpu_type: GpuType = "h200"
    gpus_per_node: int | None = Field(default=None, ge=1, le=16)
    stable_gpus: int | None = Field(default=None, ge=0)
    """Of `gpus`, on nodes that are not taken away. Default: one node, for the chains."""
    name: Name = "longtake"
    image: Image = "longtake:latest"
    secret: Name = "longtake-token"
    store: StoreUrl | None = None
    weights: Name | None = None
    """Kubernetes: the claim of a volume with checkpoints, mounted read-only at WEIGHTS_FOLDER."""
    queue: Name | None = None
    """Kueue's local queue."""
    priority_class: Name | None = None
    spot_label: NodeLabel = "cloud.google.com/gke-spot=true"
    """Kubernetes: the label of nodes that can be taken away."""
    film_gib: int = Field(default=5, ge=0)
    """Kubernetes: the size of the largest film that is made there, for the disk that pods ask for. The default is three
    hours of h264 at 720p, or five minutes of ProRes.
    """
    region: str | None = Field(default=None, pattern=r"^[a-z0-9-]{3,40}$")
    project: str | None = Field(default=None, pattern=r"^[a-z][a-z0-9-]{4,62}$")

    @property
    def hardware(self) -> Hardware:
        """The machines with the GPU."""
        return HARDWARE[self.gpu_type]

    @property
    def gpu(self) -> Gpu:
        """The GPU itself."""
        return GPUS[self.gpu_type]


class Groups(BaseModel):
    """The nodes of a cluster: how many of each kind, with how many GPUs each."""

    model_config = ConfigDict(frozen=True)

    gpus_per_node: int
    stable_nodes: int
    spot_nodes: int

    def each(self) -> list[tuple[Literal["stable", "spot"], str, int]]:
        """(name, market type, nodes) of the groups that have any."""
        rows: list[tuple[Literal["stable", "spot"], str, int]] = [
            ("stable", STABLE, self.stable_nodes),
            ("spot", SPOT, self.spot_nodes),
        ]
        return [row for row in rows if row[2]]


def describe(**values: Any) -> Description:
    """The description of these values; None means the default. Raises SettingError."""
    try:
        return Description(**{name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        remedy = first["msg"].removeprefix("Value error, ")
        message = "is not usable here"
        raise SettingError(message, field=flag, value=first["input"], remedy=f"{remedy}.") from None


def plan_groups(description: Description, machines: tuple[int, ...]) -> Groups:
    """Split the GPUs over nodes; `machines`: with how many GPUs a node can be had, any number if empty."""
    if machines and description.gpus_per_node is None:
        per_node = min(machines)
    else:
        per_node = description.gpus_per_node or 1
    if machines and per_node not in machines:
        sizes = ", ".join(map(str, sorted(machines)))
        remedy = f"There are machines with {sizes}."
        raise SettingError("no machine has so many", field="--gpus-per-node", value=per_node, remedy=remedy)
    stable = min(per_node, description.gpus) if description.stable_gpus is None else description.stable_gpus
    if stable > description.gpus:
        raise SettingError("is more than --gpus", field="--stable-gpus", value=stable)
    for flag, gpus in (("--gpus", description.gpus), ("--stable-gpus", stable)):
        if gpus % per_node:
            remedy = f"Write a multiple of the {per_node} GPUs of a node."
            raise SettingError("no whole number of nodes", field=flag, value=gpus, remedy=remedy)
    return Groups(
        gpus_per_node=per_node,
        stable_nodes=stable // per_node,
        spot_nodes=(description.gpus - stable) // per_node,
    )


def cloud_machines(description: Description, cloud: Literal["aws", "gcp"]) -> dict[int, str]:
    """The machines of a cloud with these GPUs. Raises SettingError."""
    machines = dict(description.hardware.aws if cloud == "aws" else description.hardware.gcp)
    if not machines:
        have = ", ".join(name for name, row in HARDWARE.items() if (row.aws if cloud == "aws" else row.gcp))
        message = f"{cloud} has no machine with it"
        raise SettingError(message, field="--gpu-type", value=description.gpu_type, remedy=f"It has {have}.")
    return machines


def needed(value: str | None, flag: str, what: str) -> str:
    """A value that this format cannot do without. Raises SettingError."""
    if value is None:
        raise SettingError(f"is needed: {what}", field=flag)
    return value


def ray_version() -> str:
    """The Ray of this installation, which is the one in the image."""
    return version("ray")


def drain_command(seconds: int) -> str:
    """Shell: have this node drained, which has so many seconds left. Fails if its Ray is gone already."""
    return (
        "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'the machine is taken away' "
        f"--deadline-remaining-seconds {seconds}"
    )


class _Dumper(yaml.SafeDumper):
    """Long texts as blocks, no anchors: people read and edit the file."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def to_yaml(documents: list[dict[str, Any]], heading: str) -> str:
    """YAML of one file under comment lines."""
    comments = "".join(f"# {line}\n" for line in heading.splitlines())
    return comments + yaml.dump_all(
        documents, Dumper=_Dumper, sort_keys=False, width=110, explicit_start=len(documents) > 1
    )
