"""Kubernetes: KubeRay's RayCluster and RayJob, and a plain CronJob. For KubeRay 1.6 and later.

The RayCluster scales between nothing and `gpus` with Ray's autoscaler and is there for a farm of renders.
The RayJob is one render without a farm: its cluster has a fixed size, so that Kueue can admit, suspend and
evict it as a whole; each retry is a new cluster that goes on from the store. The CronJob renders one schedule in
a pod of its own and needs no KubeRay.

The operator itself talks to the cluster's dashboard, so the token is told to it (`authOptions.secretName`).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
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
    check_shared,
    drain_command,
    needed,
    plan_groups,
    ray_version,
)
from pipeline.errors import SettingError
from pipeline.recurring import Definition

KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"
KUEUE_PRIORITY = "kueue.x-k8s.io/priority-class"
KUEUE_ELASTIC = "kueue.x-k8s.io/elastic-job"
CLUSTER_RETRIES = 3
"""New clusters for one film, after a head that was lost or any error at all: KubeRay does not look at exit codes. Each
goes on from the store and costs its cold start. Workers that are lost and suspensions by Kueue are not counted.
"""
POD_RETRIES = 20
"""New pods for one run of a schedule, after an error that may pass. Evictions are not counted."""
FINAL_CODES = [1, 2, 4, 130]
"""Exit codes of `longtake schedule tick` that another pod would not change: the run failed, usage or storyboard, the
quality gate, `longtake cancel`. What is left: 75, and signals such as 137 where memory ran out.
"""
IDLE_S = 300
END_S = 5
"""From the end of the draining to that of the pod."""
POD_DISK_GIB = 10
"""Of a node's disk, for Ray's logs and the caches of CUDA and Triton. The checkpoint is on a volume or in the image."""
GPU_DISK_GIB = 2
"""For the inputs and LoRA files of the order that a worker has."""
_USER = {"runAsUser": USER_ID, "runAsGroup": USER_ID, "fsGroup": USER_ID}
"""The image's user; `fsGroup` lets it read the token, which others cannot."""


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


def ray_job(description: Description, storyboard: str) -> list[dict[str, Any]]:
    """One render, with the storyboard's text beside it. Raises SettingError."""
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
            "backoffLimit": CLUSTER_RETRIES,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 60,
            "submissionMode": "K8sJobMode",
            "rayClusterSpec": _cluster_spec(description, scaled=False, storyboard=_config_name(description)),
        },
    }
    return [_storyboard_map(description, storyboard), job]


def cron_job(description: Description, schedule: Definition, schedules: str) -> list[dict[str, Any]]:
    """A plain CronJob that renders what is due of one schedule in its own pod, without KubeRay.

    Which run is due, and that one is made once, the schedule's own log says; Kubernetes is its clock. A pod that
    is lost has claimed its run, and the next one goes on with it. Raises SettingError.
    """
    for field, place in (("--schedules", schedules), ("--renders of the schedule", schedule.renders)):
        check_shared(field, place)
    is_spot = plan_groups(description, ()).stable_nodes == 0
    container = {
        "name": "longtake",
        "image": description.image,
        "command": ["longtake", "schedule", "tick", schedule.id, "--schedules", schedules],
        "env": _values({"XDG_CACHE_HOME": CACHE_FOLDER, **LOGGING}),
        "volumeMounts": [*_mounts(description)[1:], {"name": "shm", "mountPath": "/dev/shm"}],
        # Twice as many: one pod is head and worker.
        "resources": _gpu_resources(description, description.gpus, films=4),
    }
    shared_memory = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": DRAIN_S[SPOT if is_spot else STABLE],
        "securityContext": _USER,
        "affinity": _affinity(description, spot=is_spot, product=description.hardware.product),
        "tolerations": _tolerations(description, spot=is_spot),
        "containers": [container],
        "volumes": [*_volumes(description)[1:], shared_memory],
    }
    spec = {
        "schedule": _kubernetes_cron(schedule.cron.expression),
        "timeZone": schedule.cron.time_zone,
        "concurrencyPolicy": "Replace" if schedule.overlap == "replace" else "Forbid",
        # One catch-up: of the ticks it missed Kubernetes makes up for the last, within this time.
        "startingDeadlineSeconds": 24 * 3600,
        "jobTemplate": {
            "spec": {"backoffLimit": POD_RETRIES, "podFailurePolicy": _failure_policy(), "template": {"spec": pod}}
        },
    }
    name = re.sub(r"[._]", "-", f"{description.name}-{schedule.id}")[:52].rstrip("-")
    metadata = {"name": name, "labels": _own_labels(description)}
    return [{"apiVersion": "batch/v1", "kind": "CronJob", "metadata": metadata, "spec": spec}]


def _failure_policy() -> dict[str, Any]:
    """What Kubernetes makes of a pod that failed: the first rule that holds; a pod that none holds for is counted."""
    evicted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    final = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": FINAL_CODES}}
    return {"rules": [evicted, final]}


def _kubernetes_cron(expression: str) -> str:
    """The expression, if Kubernetes means the same by it. Raises SettingError."""
    if re.search(r"L|#", re.sub(r"JUL", "", expression.upper())) or "7" in expression.split()[4]:
        remedy = "Write plain numbers, with 0 for Sunday."
        raise SettingError("is no cron expression of Kubernetes", field="--cron", value=expression, remedy=remedy)
    return expression


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
        # The film so far is joined there, and the film goes to its place from there.
        "resources": _resources(cpus=6, memory_gib=24, disk_gib=POD_DISK_GIB + 2 * description.film_gib),
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
    is_spot, left_s = market == SPOT, DRAIN_S[market]
    # Over at once where Ray itself took the node away, as its autoscaler does with idle ones.
    leave = f"{drain_command(left_s)} && sleep {left_s}"
    container = {
        "name": "ray-worker",
        "image": description.image,
        "env": _environment(),
        "volumeMounts": _mounts(description),
        "resources": _gpu_resources(description, gpus),
        "lifecycle": {"preStop": {"exec": {"command": ["/bin/bash", "-c", leave]}}},
    }
    pod = {
        "terminationGracePeriodSeconds": left_s + END_S,
        "securityContext": _USER,
        "affinity": _affinity(description, spot=is_spot, product=description.hardware.product),
        "tolerations": _tolerations(description, spot=is_spot),
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


def _tolerations(description: Description, *, spot: bool) -> list[dict[str, str]]:
    keys = ["nvidia.com/gpu", *([description.spot_label.partition("=")[0]] if spot else [])]
    return [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in keys]


def _gpu_resources(description: Description, gpus: int, *, films: int = 2) -> dict[str, Any]:
    """`films`: how often the film lies there; a worker that joins it has it as units and as film."""
    hardware = description.hardware
    return _resources(
        cpus=hardware.cpus_per_gpu * gpus,
        memory_gib=hardware.memory_gib(gpus),
        disk_gib=POD_DISK_GIB + GPU_DISK_GIB * gpus + films * description.film_gib,
        gpus=gpus,
    )


def _resources(*, cpus: int, memory_gib: int, disk_gib: int, gpus: int = 0) -> dict[str, Any]:
    """Of the disk at least so much: on a node that is short of it, pods that use more than they asked for go first."""
    amounts = {"cpu": str(cpus), "memory": f"{memory_gib}Gi"}
    if gpus:
        amounts["nvidia.com/gpu"] = str(gpus)
    return {"requests": {**amounts, "ephemeral-storage": f"{disk_gib}Gi"}, "limits": amounts}


def _environment() -> list[dict[str, str]]:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": TOKEN_PATH}
    return _values({**token, "XDG_CACHE_HOME": CACHE_FOLDER, **LOGGING})


def _values(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]


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


def _storyboard_map(description: Description, storyboard: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": _config_name(description), "labels": _own_labels(description)},
        "data": {Path(STORYBOARD_PATH).name: storyboard},
    }
