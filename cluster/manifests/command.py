"""`longtake manifest`: print one of the files that a deployment starts from."""

from __future__ import annotations

import sys
import time
from fractions import Fraction
from pathlib import Path

from cluster.manifests.description import TOKEN_PATH, Description, check_shared, to_yaml
from cluster.manifests.dockerfile import Flavour, dockerfile
from cluster.manifests.film import examine, read_film
from cluster.manifests.kubernetes import cron_job, ray_cluster, ray_job
from cluster.manifests.machines import AWS_IMAGE, AWS_IMAGE_NAME, LOCAL_TOKEN_FOLDER, Cloud, aws_region, ray_up
from cluster.manifests.skypilot import sky_task
from pipeline.errors import SettingError
from pipeline.recurring import check_definition
from pipeline.schedule_log import ScheduleLog
from pipeline.spec import Storyboard
from pipeline.store import open_store


def print_kuberay(description: Description) -> int:
    """A RayCluster for a farm of renders."""
    heading = f"A farm for up to {description.gpus} GPUs, for KubeRay 1.6 or later.\n{_secret(description)}"
    print(to_yaml(ray_cluster(description), heading), end="")
    return 0


def print_rayjob(description: Description, path: Path) -> int:
    """A RayJob that renders one storyboard. Raises SpecError, SettingError."""
    film, storyboard = read_film(path)
    description = _examined(film, description)
    heading = f"One render on {description.gpus} GPUs, for KubeRay 1.6 or later.\n{_secret(description)}"
    print(to_yaml(ray_job(description, storyboard), heading), end="")
    return 0


def print_cronjob(description: Description, name: str, schedules: str) -> int:
    """A CronJob for one schedule. Raises SettingError."""
    check_shared("--schedules", schedules)
    definition = ScheduleLog(open_store(schedules), name).refresh().definition
    if definition is None:
        remedy = f"`longtake schedule add {name} ... --schedules {schedules}` first."
        raise SettingError("is not on the schedule", field="schedule", value=name, remedy=remedy)
    films = check_definition(definition, time.time())
    longest = max(films, key=lambda film: sum(shot.duration.frames_at(Fraction(30)) for shot in film.shots))
    description = _examined(longest, description)
    heading = "Its pod needs the right to use the store: a service account, or credentials in its environment."
    print(to_yaml(cron_job(description, definition, schedules), heading), end="")
    return 0


def print_ray_up(description: Description, cloud: Cloud) -> int:
    """What `ray up` takes."""
    folder = LOCAL_TOKEN_FOLDER.format(name=description.name)
    heading = (
        f"Start: ray up FILE. Before that the token has to be in {folder}/auth_token, readable by you alone:\n"
        f"(umask 077; mkdir -p {folder}; openssl rand -hex 32 > {folder}/auth_token)"
    )
    if cloud == "aws":
        heading += (
            f"\nAnd {AWS_IMAGE} has to become the id of an image with NVIDIA's driver 580 or later; this prints one:\n"
            f"aws ssm get-parameter --region {aws_region(description)} --query Parameter.Value --output text "
            f"--name {AWS_IMAGE_NAME}"
        )
    print(to_yaml([ray_up(description, cloud)], heading), end="")
    return 0


def print_skypilot(description: Description, path: Path) -> int:
    """A SkyPilot task that renders one storyboard. Raises SpecError, SettingError."""
    film, _ = read_film(path)
    description = _examined(film, description)
    heading = (
        'Start: RAY_AUTH_TOKEN="$(openssl rand -hex 32)" sky jobs launch FILE --secret RAY_AUTH_TOKEN\n'
        "The token is one run's own and need not be kept."
    )
    print(to_yaml([sky_task(description, path)], heading), end="")
    return 0


def print_dockerfile(flavour: Flavour) -> int:
    """The image's Dockerfile."""
    print(dockerfile(flavour), end="")
    return 0


def print_grafana() -> int:
    """The dashboard, as Grafana imports it."""
    print(Path(__file__).with_name("grafana.json").read_text(), end="")
    return 0


def _examined(film: Storyboard, description: Description) -> Description:
    described, warnings = examine(film, description)
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)
    return described


def _secret(description: Description) -> str:
    return (
        f"The secret {description.secret} has to exist, with the key {Path(TOKEN_PATH).name}:\n"
        f"kubectl create secret generic {description.secret} "
        f'--from-literal={Path(TOKEN_PATH).name}="$(openssl rand -hex 32)"'
    )
