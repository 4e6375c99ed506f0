"""What Kubernetes and KubeRay 1.6 accept, as far as it can be known offline.

Kubernetes' own objects are compared with the models of its official client, field by field: unknown names,
missing required ones and wrong types are errors. KubeRay publishes no package with its schemas, so the fields
that are used are typed here, after its API reference, and its operator's rules for them are written out.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from kubernetes.client import models
from pydantic import BaseModel, ConfigDict, Field, model_validator

PRIMITIVES = {"str": str, "int": int, "bool": bool, "float": (int, float), "object": object, "datetime": str}


def check_object(value: Any, kind: str, path: str = "") -> None:
    """Raise AssertionError unless `value` is a `kind` as the official client knows it (`V1Pod`, `list[str]`)."""
    if match := re.fullmatch(r"list\[(.+)\]", kind):
        assert isinstance(value, list), f"{path}: {value!r} is no list"
        for index, item in enumerate(value):
            check_object(item, match[1], f"{path}[{index}]")
    elif match := re.fullmatch(r"dict\(str, (.+)\)", kind):
        assert isinstance(value, dict), f"{path}: {value!r} is no mapping"
        for key, item in value.items():
            check_object(item, match[1], f"{path}.{key}")
    elif kind in PRIMITIVES:
        assert isinstance(value, PRIMITIVES[kind]), f"{path}: {value!r} is no {kind}"
        assert not (kind == "int" and isinstance(value, bool)), path
    else:
        check_model(value, getattr(models, kind), path)


def check_model(value: Any, model: Any, path: str) -> None:
    names = {json_name: name for name, json_name in model.attribute_map.items()}
    assert isinstance(value, dict), f"{path}: {value!r} is no {model.__name__}"
    assert not value.keys() - names.keys(), f"{path}: {model.__name__} has no {value.keys() - names.keys()}"
    for key, item in value.items():
        check_object(item, model.openapi_types[names[key]], f"{path}.{key}")
    # The constructor refuses what is required and missing.
    model(**{names[key]: item for key, item in value.items()})


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]
    secretName: str


class AutoscalerOptions(Strict):
    version: Literal["v1", "v2"]
    idleTimeoutSeconds: int = Field(ge=0)
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]


class Group(Strict):
    rayStartParams: dict[str, str]
    labels: dict[str, str]
    template: dict[str, Any]

    @model_validator(mode="after")
    def operator_rules(self) -> Group:
        assert "labels" not in self.rayStartParams, "the operator takes labels from the group only"
        check_object(self.template, "V1PodTemplateSpec", "template")
        # With autoscaler v2 a pod that ended is not started again.
        assert self.template["spec"].get("restartPolicy", "Never") == "Never"
        return self


class WorkerGroup(Group):
    groupName: str
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=1)

    @model_validator(mode="after")
    def sizes(self) -> WorkerGroup:
        assert self.minReplicas <= self.replicas <= self.maxReplicas
        return self


class ClusterSpec(Strict):
    rayVersion: str = Field(pattern=r"^2\.(5[2-9]|[6-9]\d)\.\d+$")
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions | None = None
    headGroupSpec: Group
    workerGroupSpecs: list[WorkerGroup] = Field(min_length=1)

    @model_validator(mode="after")
    def fixed_size(self) -> ClusterSpec:
        if not self.enableInTreeAutoscaling:
            assert all(group.minReplicas == group.maxReplicas for group in self.workerGroupSpecs)
        return self


class Metadata(Strict):
    name: str = Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)
    labels: dict[str, str]
    annotations: dict[str, str] = {}


class RayCluster(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class JobSpec(Strict):
    entrypoint: str
    backoffLimit: int = Field(ge=0)
    shutdownAfterJobFinishes: Literal[True]
    """Kueue suspends no job that would keep its cluster."""
    ttlSecondsAfterFinished: int = Field(ge=0)
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]
    rayClusterSpec: ClusterSpec


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec
