"""Cloud machines by Ray's own launcher: the YAML of `ray up` for AWS and GCP.

Spot nodes are thrown away rather than stopped, and the dashboard listens on the head's loopback alone:
`ray dashboard` and `ray submit` reach it through SSH. Workers watch for the cloud's notice that they are taken away.
"""

from __future__ import annotations

import shlex
from functools import partial
from typing import Any, Literal

from cluster.manifests.description import (
    CACHE_FOLDER,
    DASHBOARD_PORT,
    LOGGING,
    MARKET_TYPE,
    OBJECT_PORT,
    RAY_PORT,
    SPOT,
    STABLE,
    TOKEN_FOLDER,
    TOKEN_PATH,
    Description,
    cloud_machines,
    drain_command,
    needed,
    plan_groups,
)
from cluster.manifests.hardware import HEAD_MACHINES
from pipeline.crew import SAVE_S

Cloud = Literal["aws", "gcp"]
IDLE_MINUTES = 5
NOTICE_S: dict[Cloud, int] = {"aws": 120, "gcp": 30}
"""How long before the end a cloud says that it takes a spot machine away."""
ASK_S = 5
"""How often a machine asks whether that is so."""
SPARE_S = 5
"""Between the end that Ray is told and the real one."""
assert min(NOTICE_S.values()) - ASK_S - SPARE_S >= SAVE_S
DISK_GB = 500
"""A role's weights in bf16 are 27 GB, the image about 10 GB; the rest is for what is being encoded."""
LOCAL_TOKEN_FOLDER = "~/.longtake/{name}"
# torch's wheels on PyPI are for CUDA 13, which wants NVIDIA's driver 580 or later on the host.
_GCP_IMAGE = "projects/deeplearning-platform-release/global/images/family/common-cu129-ubuntu-2204-nvidia-580"
AWS_IMAGE = "ami-TO-BE-WRITTEN"
"""Images have another id in every region. Without any Ray takes one of 2022, on whose driver torch finds no GPU."""
AWS_IMAGE_NAME = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id"
"""The name under which AWS keeps the id of its newest image with driver and container toolkit."""
_START = "ulimit -n 65536; ray start"


def ray_up(description: Description, cloud: Cloud) -> dict[str, Any]:
    """The configuration that `ray up` takes. Raises SettingError."""
    machines = cloud_machines(description, cloud)
    groups = plan_groups(description, tuple(machines))
    node = _aws_node if cloud == "aws" else partial(_gcp_node, zone=_gcp_zone(description))
    hardware = description.hardware
    types: dict[str, Any] = {
        "head": {
            "resources": {"CPU": 0},
            "labels": {MARKET_TYPE: STABLE},
            "min_workers": 0,
            "max_workers": 0,
            "node_config": node(HEAD_MACHINES[cloud], market=STABLE, gpus=0),
        }
    }
    for name, market, nodes in groups.each():
        cpus = hardware.cpus_per_gpu * groups.gpus_per_node
        types[name] = {
            "resources": {"CPU": cpus, "GPU": groups.gpus_per_node},
            "labels": {MARKET_TYPE: market},
            "min_workers": 0,
            "max_workers": nodes,
            "node_config": node(machines[groups.gpus_per_node], market=market, gpus=groups.gpus_per_node),
        }
    return {
        "cluster_name": description.name,
        "provider": _provider(description, cloud),
        "auth": {"ssh_user": "ubuntu"},
        "max_workers": groups.stable_nodes + groups.spot_nodes,
        "upscaling_speed": float(max(1, groups.stable_nodes + groups.spot_nodes)),
        "idle_timeout_minutes": IDLE_MINUTES,
        "docker": _docker(description),
        "file_mounts": {TOKEN_FOLDER: LOCAL_TOKEN_FOLDER.format(name=description.name)},
        "head_node_type": "head",
        "available_node_types": types,
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [
            "ray stop",
            f"{_START} --head --port={RAY_PORT} --object-manager-port={OBJECT_PORT} --num-cpus=0 "
            f"--dashboard-host=127.0.0.1 --dashboard-port={DASHBOARD_PORT} "
            "--autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            "ray stop",
            f"{_START} --address=$RAY_HEAD_IP:{RAY_PORT} --object-manager-port={OBJECT_PORT}",
            f"setsid nohup bash -c {shlex.quote(watch_command(cloud))} > /tmp/notice.log 2>&1 &",
        ],
    }


def watch_command(cloud: Cloud) -> str:
    """Shell: wait until the cloud says that it takes this machine away, then have it drained.

    Ray is told the time that is left at least. Machines on demand never get the notice.
    """
    if cloud == "aws":
        metadata = "http://169.254.169.254/latest"
        token = f'wget -qO- --method=PUT --header="X-aws-ec2-metadata-token-ttl-seconds: 60" {metadata}/api/token'
        notice = (
            f'wget -qO- --header="X-aws-ec2-metadata-token: $({token})" {metadata}/meta-data/spot/instance-action '
            "| grep -q action"
        )
    else:
        metadata = "http://metadata.google.internal/computeMetadata/v1/instance/preempted"
        notice = f'wget -qO- --header="Metadata-Flavor: Google" {metadata} | grep -q TRUE'
    left_s = NOTICE_S[cloud] - ASK_S - SPARE_S
    return f"until {notice}; do sleep {ASK_S}; done; {drain_command(left_s)}"


def aws_region(description: Description) -> str:
    """Where in AWS."""
    return description.region or "us-west-2"


def _provider(description: Description, cloud: Cloud) -> dict[str, Any]:
    if cloud == "aws":
        return {"type": "aws", "region": aws_region(description), "cache_stopped_nodes": False}
    zone = _gcp_zone(description)
    project = needed(description.project, "--project", "the id of the Google Cloud project")
    return {"type": "gcp", "region": zone.rpartition("-")[0], "availability_zone": zone, "project_id": project}


def _gcp_zone(description: Description) -> str:
    return f"{description.region or 'us-central1'}-a"


def _docker(description: Description) -> dict[str, Any]:
    """Everything runs in the image. Ray adds the GPUs and the shared memory by itself."""
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": TOKEN_PATH,
        "RAY_enable_autoscaler_v2": "1",
        "XDG_CACHE_HOME": CACHE_FOLDER,
        **LOGGING,
    }
    options = [f"-e {name}={value}" for name, value in environment.items()]
    return {
        "image": description.image,
        "container_name": "longtake",
        "pull_before_run": True,
        "run_options": ["--ulimit nofile=65536:65536", *options],
    }


def _aws_node(machine: str, *, market: str, gpus: int) -> dict[str, Any]:
    """What EC2's RunInstances is asked for. Ray fills in network, key and security group."""
    disk = {"VolumeSize": DISK_GB if gpus else 100, "VolumeType": "gp3"}
    node: dict[str, Any] = {
        "InstanceType": machine,
        "ImageId": AWS_IMAGE,
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        # Containers are one hop further from the metadata service, and credentials come from there.
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
    }
    if market == SPOT:
        node["InstanceMarketOptions"] = {
            "MarketType": "spot",
            "SpotOptions": {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"},
        }
    return node


def _gcp_node(machine: str, *, market: str, gpus: int, zone: str) -> dict[str, Any]:
    """What Compute Engine's instances.insert is asked for. Ray fills in network, key and service account."""
    scheduling: dict[str, Any] = {"onHostMaintenance": "TERMINATE" if gpus else "MIGRATE"}
    if market == SPOT:
        scheduling |= {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE", "automaticRestart": False}
    # Without a type it would be a magnetic one, which machines with newer GPUs do not take.
    kind = "hyperdisk-balanced" if machine.startswith(("a3-ultragpu", "a4-")) else "pd-balanced"
    disk = {
        "sourceImage": _GCP_IMAGE,
        "diskSizeGb": DISK_GB if gpus else 100,
        "diskType": f"zones/{zone}/diskTypes/{kind}",
    }
    node: dict[str, Any] = {
        "machineType": machine,
        "disks": [{"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": disk}],
        "scheduling": scheduling,
    }
    if gpus:
        node["metadata"] = {"items": [{"key": "install-nvidia-driver", "value": "True"}]}
    return node
