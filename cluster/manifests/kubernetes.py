"""Kubernetes: KubeRay's RayCluster and RayJob, and a plain CronJob. For KubeRay 1.6 and later.

The RayCluster scales between nothing and `gpus` with Ray's autoscaler and is there for a farm of renders.
The RayJob is one render without a farm: its cluster has a fixed size, so that Kueue can admit, suspend and
evict it as a whole; each retry is a new cluster that goes on from the store. The CronJob gives a schedule
its clock: its pod computes nothing and asks the cluster.

The operator itself talks to the cluster's dashboard, so the token is told to it (`authOptions.secretName`).
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from cluster.manifests.description import (
    CACHE_FOLDER,
    DASHBOARD_PORT,
    DRAIN_S,
    LOGGING,
    MARKET_TYPE,
    RAY_PORT,
    SPOT,
    STABLE,
    STORYBOARD_PATH,
    TOKEN_FOLDER,
    TOKEN_PATH,
    USER_ID,
    WEIGHTS_FOLDER,
    Description,
    drain_command,
    needed,
    plan_groups,
    ray_version,
)
from cluster.manifests.film import read_portable
from pipeline.errors import SettingError

KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"
KUEUE_PRIORITY = "kueue.x-k8s.io/priority-class"
KUEUE_ELASTIC = "kueue.x-k8s.io/elastic-job"
JOB_RETRIES = 20
"""New clusters for one film. Each goes on from the store, so a retry costs its cold start and nothing else."""
IDLE_S = 300
END_S = 5
"""From the end of the draining to that of the pod."""
_USER = {"runAsUser": USER_ID, "runAsGroup": USER_ID, "fsGroup": USER_ID}
"""The image's user; `fsGroup` lets it read the token, which others cannot."""
_CONCURRENCY = {"skip": "Forbid", "replace": "Replace", "queue": "Allow"}


def ray_cluster(description: Description) -> list[dict[str, Any]]:
    """A farm's cluster: no workers while nothing is to do."""
    metadata = _metadata(description)
    if description.queue is not None:
        # Without it Kueue admits a cluster of one size only.
        metadata["annotations"] = {KUEUE_ELASTIC: "true"}
    return [
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayCluster",
            "metadata": metadata,
            "spec": _cluster_spec(description, scaled=True),
        }
    ]


def ray_job(description: Description, film: Path) -> list[dict[str, Any]]:
    """One render, with the storyboard beside it. Raises SpecError, SettingError."""
    store = needed(description.store, "--store", "the film's state outlives the cluster there")
    command = [
        "longtake", "render", STORYBOARD_PATH, "--store", store,
        "--address", "auto", "--device", "cuda", "--workers", str(description.gpus),
    ]  # fmt: skip
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(description),
        "spec": {
            "entrypoint": shlex.join(command),
            "backoffLimit": JOB_RETRIES,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 60,
            "submissionMode": "K8sJobMode",
            "rayClusterSpec": _cluster_spec(description, scaled=False, storyboard=_config_name(description)),
        },
    }
    return [_storyboard_map(description, film), job]


def cron_job(
    description: Description, *, cron: str, time_zone: str, overlap: str, command: list[str]
) -> dict[str, Any]:
    """A plain CronJob that runs `command` (a longtake command line) against the cluster of this name."""
    container = {
        "name": "longtake",
        "image": description.image,
        "command": command,
        "env": [*_token_environment(), {"name": "RAY_API_SERVER_ADDRESS", "value": head_url(description)}],
        "volumeMounts": [_token_mount()],
        "resources": _resources(cpus=1, memory_gib=2),
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": description.name, "labels": _own_labels(description)},
        "spec": {
            "schedule": cron,
            "timeZone": time_zone,
            "concurrencyPolicy": _CONCURRENCY[overlap],
            # One catch-up: Kubernetes starts the last tick it missed within this time, and only that.
            "startingDeadlineSeconds": 24 * 3600,
            "jobTemplate": {
                "spec": {
                    "backoffLimit": 5,
                    "template": {
                        "spec": {
                            "restartPolicy": "Never",
                            "securityContext": _USER,
                            "containers": [container],
                            "volumes": [_token_volume(description)],
                        }
                    },
                }
            },
        },
    }


def head_url(description: Description) -> str:
    """Where Ray's job API answers inside the Kubernetes cluster."""
    return f"http://{description.name}-head-svc:{DASHBOARD_PORT}"


def _cluster_spec(description: Description, *, scaled: bool, storyboard: str | None = None) -> dict[str, Any]:
    groups = plan_groups(description, ())
    workers = [
        _worker_group(description, name, market, groups.gpus_per_node, nodes, scaled=scaled)
        for name, market, nodes in groups.each()
    ]
    spec: dict[str, Any] = {
        "rayVersion": ray_version(),
        "authOptions": {"mode": "token", "secretName": description.secret},
        "enableInTreeAutoscaling": scaled,
    }
    if scaled:
        spec["autoscalerOptions"] = {"version": "v2", "idleTimeoutSeconds": IDLE_S, "upscalingMode": "Default"}
    return spec | {"headGroupSpec": _head_group(description, storyboard), "workerGroupSpecs": workers}


def _head_group(description: Description, storyboard: str | None) -> dict[str, Any]:
    container = {
        "name": "ray-head",
        "image": description.image,
        "ports": [
            {"name": "gcs", "containerPort": RAY_PORT},
            {"name": "dashboard", "containerPort": DASHBOARD_PORT},
        ],
        "env": _environment(),
        "volumeMounts": _mounts(description),
        "resources": _resources(cpus=6, memory_gib=24),
    }
    volumes = _volumes(description)
    if storyboard is not None:
        container["volumeMounts"] = [
            *_mounts(description),
            {"name": "film", "mountPath": str(Path(STORYBOARD_PATH).parent), "readOnly": True},
        ]
        volumes = [*volumes, {"name": "film", "configMap": {"name": storyboard}}]
    pod = {
        "terminationGracePeriodSeconds": DRAIN_S[STABLE],
        "securityContext": _USER,
        "affinity": _affinity(description, spot=False),
        "containers": [container],
        "volumes": volumes,
    }
    start = {"num-cpus": "0", "dashboard-host": "0.0.0.0"}
    return {"rayStartParams": start, "labels": {MARKET_TYPE: STABLE}, "template": {"spec": pod}}


def _worker_group(
    description: Description, name: str, market: str, gpus: int, nodes: int, *, scaled: bool
) -> dict[str, Any]:
    hardware, is_spot, left_s = description.hardware, market == SPOT, DRAIN_S[market]
    # Over at once where Ray itself took the node away, as its autoscaler does with idle ones.
    leave = f"{drain_command(left_s)} && sleep {left_s}"
    container = {
        "name": "ray-worker",
        "image": description.image,
        "env": _environment(),
        "volumeMounts": _mounts(description),
        "resources": _resources(
            cpus=hardware.cpus_per_gpu * gpus, memory_gib=hardware.memory_gib_per_gpu * gpus, gpus=gpus
        ),
        "lifecycle": {"preStop": {"exec": {"command": ["/bin/bash", "-c", leave]}}},
    }
    tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if is_spot:
        key = description.spot_label.partition("=")[0]
        tolerations.append({"key": key, "operator": "Exists", "effect": "NoSchedule"})
    pod = {
        "terminationGracePeriodSeconds": left_s + END_S,
        "securityContext": _USER,
        "affinity": _affinity(description, spot=is_spot, product=hardware.product),
        "tolerations": tolerations,
        "containers": [container],
        "volumes": _volumes(description),
    }
    return {
        "groupName": name,
        "replicas": 0 if scaled else nodes,
        "minReplicas": 0 if scaled else nodes,
        "maxReplicas": nodes,
        "rayStartParams": {},
        "labels": {MARKET_TYPE: market},
        "template": {"spec": pod},
    }


def _affinity(description: Description, *, spot: bool, product: str | None = None) -> dict[str, Any]:
    """Which nodes: spot ones, or any but those; and with the right GPU."""
    key, _, value = description.spot_label.partition("=")
    terms: list[dict[str, Any]] = [{"key": key, "operator": "In" if spot else "NotIn", "values": [value]}]
    if product is not None:
        terms.append({"key": "nvidia.com/gpu.product", "operator": "In", "values": [product]})
    required = {"nodeSelectorTerms": [{"matchExpressions": terms}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}


def _resources(*, cpus: int, memory_gib: int, gpus: int = 0) -> dict[str, Any]:
    amounts = {"cpu": str(cpus), "memory": f"{memory_gib}Gi"}
    if gpus:
        amounts["nvidia.com/gpu"] = str(gpus)
    return {"requests": amounts, "limits": amounts}


def _environment() -> list[dict[str, str]]:
    values = {"XDG_CACHE_HOME": CACHE_FOLDER, **LOGGING}
    return [*_token_environment(), *({"name": name, "value": value} for name, value in values.items())]


def _token_environment() -> list[dict[str, str]]:
    return [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN_PATH", "value": TOKEN_PATH}]


def _mounts(description: Description) -> list[dict[str, Any]]:
    mounts: list[dict[str, Any]] = [_token_mount(), {"name": "cache", "mountPath": CACHE_FOLDER}]
    if description.weights is not None:
        mounts.append({"name": "weights", "mountPath": WEIGHTS_FOLDER, "readOnly": True})
    return mounts


def _volumes(description: Description) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = [_token_volume(description), {"name": "cache", "emptyDir": {}}]
    if description.weights is not None:
        claim = {"claimName": description.weights, "readOnly": True}
        volumes.append({"name": "weights", "persistentVolumeClaim": claim})
    return volumes


def _token_mount() -> dict[str, Any]:
    return {"name": "token", "mountPath": TOKEN_FOLDER, "readOnly": True}


def _token_volume(description: Description) -> dict[str, Any]:
    return {"name": "token", "secret": {"secretName": description.secret, "defaultMode": 0o440}}


def _metadata(description: Description) -> dict[str, Any]:
    labels = _own_labels(description)
    if description.queue is not None:
        labels[KUEUE_QUEUE] = description.queue
    if description.priority_class is not None:
        if description.queue is None:
            raise SettingError("goes with --queue", field="--priority-class", value=description.priority_class)
        labels[KUEUE_PRIORITY] = description.priority_class
    metadata: dict[str, Any] = {"name": description.name, "labels": labels}
    return metadata


def _own_labels(description: Description) -> dict[str, str]:
    return {"app.kubernetes.io/name": "longtake", "app.kubernetes.io/instance": description.name}


def _config_name(description: Description) -> str:
    return f"{description.name}-storyboard"


def _storyboard_map(description: Description, film: Path) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": _config_name(description), "labels": _own_labels(description)},
        "data": {Path(STORYBOARD_PATH).name: read_portable(film)},
    }
