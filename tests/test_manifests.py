"""What `longtake manifest` prints: accepted by those who read it, and safe."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict

from cluster.cli import _parser, main
from cluster.manifests import description as shared
from cluster.manifests.kubernetes import cron_job
from cluster.manifests.machines import watch_command
from cluster.placement import place_workers
from cluster.schedules import AGAIN
from cluster.session import wait_for_gpus
from pipeline.crew import SAVE_S
from pipeline.cron import parse_cron
from pipeline.errors import Interrupted, LongtakeError, QualityError, SettingError, StoreFull
from pipeline.estimate import BITS_PER_PX
from pipeline.memory import LEAST, NUMBER_BYTES, NetworkSizes, page_locked_bytes, transformer_bytes
from pipeline.recurring import Added, Definition
from pipeline.schedule_log import ScheduleLog
from pipeline.store import LocalStore
from tests.kubernetes_shapes import RayCluster, RayJob, check_object

PROCESS_GIB = 2.0
"""Of a worker's process beside weights and cache: torch, CUDA's host side, frames on their way into ffmpeg."""
RAY_KILLS_ABOVE = 0.95
"""Share of a node's memory above which Ray kills workers."""
ROOT = Path(__file__).resolve().parent.parent
STORE = ["--store", "s3://films/one"]


@pytest.fixture
def film(tmp_path: Path) -> str:
    path = tmp_path / "film.yaml"
    path.write_text("title: One\nshots:\n  - {id: a, duration: 2s, prompt: a red circle}\n")
    return str(path)


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `longtake manifest ...` and give its YAML documents."""

    def run(*arguments: str) -> list[Any]:
        assert main(["manifest", *arguments]) == 0
        return list(yaml.safe_load_all(capsys.readouterr().out))

    return run


# Kubernetes


@pytest.mark.parametrize("flags", [[], ["--queue", "films", "--priority-class", "night"], ["--weights", "longcat"]])
@pytest.mark.parametrize("gpus", [["--gpus", "1"], ["--gpus", "64", "--gpus-per-node", "8"]])
def test_a_ray_cluster_is_what_kuberay_takes(show: Any, gpus: list[str], flags: list[str]) -> None:
    [cluster] = show("kuberay", *gpus, *flags)
    checked = RayCluster.model_validate(cluster)
    assert checked.spec.enableInTreeAutoscaling
    assert all(group.minReplicas == 0 for group in checked.spec.workerGroupSpecs), "idle means no workers"


def test_a_ray_job_is_what_kuberay_takes_and_its_storyboard_is_beside_it(show: Any, film: str) -> None:
    config, job = show("rayjob", film, "--gpus", "16", "--gpus-per-node", "8", "--queue", "films", *STORE)
    checked = RayJob.model_validate(job)
    assert not checked.spec.rayClusterSpec.enableInTreeAutoscaling, "Kueue admits one size"
    assert 0 < checked.spec.backoffLimit <= 3, "a user's error is tried as often, each time with new machines"
    assert checked.metadata.labels["kueue.x-k8s.io/queue-name"] == "films"
    check_object(config, "V1ConfigMap")
    pod = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    [volume] = [volume for volume in pod["volumes"] if "configMap" in volume]
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    [mount] = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == volume["name"]]
    [file] = config["data"]
    options = _parser().parse_args(shlex.split(job["spec"]["entrypoint"])[1:])
    assert str(options.storyboard) == f"{mount['mountPath']}/{file}"
    assert config["data"][file] == Path(film).read_text()


def test_a_render_as_a_job_waits_for_all_its_gpus_and_keeps_its_state_outside(show: Any, film: str) -> None:
    job = show("rayjob", film, "--gpus", "16", "--gpus-per-node", "8", *STORE)[-1]
    options = _parser().parse_args(shlex.split(job["spec"]["entrypoint"])[1:])
    assert (options.device, options.workers, options.store) == ("cuda", 16, "s3://films/one")
    counts, waits = iter([0.0, 8.0, 16.0, 99.0]), []
    resources = wait_for_gpus(16, lambda: {"GPU": next(counts)}, sleep=waits.append)
    assert resources == {"GPU": 16.0} and len(waits) == 2


def test_waiting_for_gpus_ends(show: Any) -> None:
    waits: list[float] = []
    assert wait_for_gpus(2, lambda: {"CPU": 4.0}, limit_s=60.0, sleep=waits.append) == {"CPU": 4.0}
    assert sum(waits) == 60.0


def test_a_render_begins_with_the_machines_that_came_where_others_cannot_be_had() -> None:
    """Of four spot machines three may be all that there is: they must not stand idle and be given up."""
    resources = wait_for_gpus(32, lambda: {"GPU": 24.0}, limit_s=60.0, sleep=lambda seconds: None)
    place = place_workers(resources, device="cuda", workers=32, threads=None, useful=57)
    assert place.workers == 32, "eight of them wait for a place"


@pytest.mark.parametrize("format_", ["kuberay", "rayjob"])
def test_the_head_computes_nothing_and_stays_off_spot_nodes(show: Any, film: str, format_: str) -> None:
    spec, _ = _cluster(show, film, format_)
    head = spec["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert head["labels"] == {"ray.io/market-type": "on-demand"}
    assert _spot_terms(head) == [("cloud.google.com/gke-spot", "NotIn")]


@pytest.mark.parametrize("format_", ["kuberay", "rayjob"])
def test_workers_say_whether_they_can_be_taken_away(show: Any, film: str, format_: str) -> None:
    _, groups = _cluster(show, film, format_)
    assert {name: group["labels"]["ray.io/market-type"] for name, group in groups.items()} == {
        "stable": "on-demand",
        "spot": "spot",
    }
    assert ("cloud.google.com/gke-spot", "NotIn") in _spot_terms(groups["stable"])
    assert ("cloud.google.com/gke-spot", "In") in _spot_terms(groups["spot"])
    assert [group["maxReplicas"] for group in groups.values()] == [1, 3]


def test_a_worker_that_has_to_go_has_longer_than_saving_takes(show: Any, film: str) -> None:
    _, groups = _cluster(show, film, "kuberay")
    for name, group in groups.items():
        pod = group["template"]["spec"]
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        drain, sleep = command[-1].split(" && ")
        left_s = drained_in_s(drain)
        assert SAVE_S < left_s == int(sleep.split()[1]) < pod["terminationGracePeriodSeconds"]
        assert name == "stable" or pod["terminationGracePeriodSeconds"] <= 30, "Google Cloud takes it then"


def drained_in_s(command: str) -> int:
    """The seconds left that a drain command tells Ray, which has to know all its flags."""
    from ray.scripts.scripts import drain_node

    given = drain_node.make_context("drain-node", shlex.split(command)[2:]).params
    assert given["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    return int(given["deadline_remaining_seconds"])


FAKE_WGET = """#!/bin/bash
echo "wget $*" >> "$CALLS"
[[ "$*" == *PUT* ]] && { echo session-token; exit 0; }
[[ $(grep -c "instance" "$CALLS") -lt 3 ]] && exit 8
echo '{"action": "terminate"} TRUE'
"""


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_a_machine_that_is_taken_away_is_drained_when_the_cloud_says_so(tmp_path: Path, cloud: Any) -> None:
    tools = {"wget": FAKE_WGET, "ray": '#!/bin/bash\necho "ray $*" >> "$CALLS"\n', "sleep": "#!/bin/bash\n"}
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    done = subprocess.run(["bash", "-c", watch_command(cloud)], env=environment, timeout=30, check=False)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert done.returncode == 0
    asked = [call for call in calls if "instance" in call]
    assert len(asked) == 3, "until there is a notice"
    assert cloud == "gcp" or all("session-token" in call for call in asked)
    assert [call.split()[1] for call in calls if call.startswith("ray")] == ["drain-node"]
    told_s = drained_in_s(watch_command(cloud).rpartition("done; ")[2])
    asked_every_s = int(watch_command(cloud).partition("sleep ")[2].partition(";")[0])
    # The clouds' own words: the notice comes so long before the end. What is not used of it is lost work.
    notice_s = {"aws": 120, "gcp": 30}[cloud]
    assert told_s >= SAVE_S and notice_s - 10 <= told_s + asked_every_s < notice_s


def test_workers_of_ray_up_watch_for_the_notice(show: Any) -> None:
    [config] = show("ray-up-aws", "--gpus", "8")
    last = config["worker_start_ray_commands"][-1]
    assert watch_command("aws") in shlex.split(last)
    assert last.endswith("&"), "or starting the node would wait for its end"


def disk_gib(pod: dict[str, Any]) -> int:
    """What a pod asks for of its node's disk. A limit would be a reason to evict it."""
    [container] = pod["containers"]
    assert "ephemeral-storage" not in container["resources"]["limits"]
    return int(container["resources"]["requests"]["ephemeral-storage"].removesuffix("Gi"))


def test_pods_ask_for_the_disk_that_their_films_take(show: Any, film: str) -> None:
    _, idle = _cluster(show, film, "kuberay")
    assert all(disk_gib(group["template"]["spec"]) > 0 for group in idle.values())
    usual, _ = _cluster(show, film, "rayjob")
    shot = "{id: a, duration: 10m, prompt: a red circle}"
    codec = "{codec: ffv1, path: films/one.mkv}"
    Path(film).write_text(f"checkpoint: /weights/longcat\nshots: [{shot}]\noutput: {codec}\n")
    large, groups = _cluster(show, film, "rayjob")
    film_gib = 10 * 60 * 30 * 704 * 1280 * BITS_PER_PX["ffv1"] / 8 / 2**30
    least, head = disk_gib(usual["headGroupSpec"]["template"]["spec"]), large["headGroupSpec"]["template"]["spec"]
    assert disk_gib(head) > 2 * film_gib > least, "units and film"
    assert all(disk_gib(group["template"]["spec"]) > 2 * film_gib for group in groups.values())
    [job] = cron_job(shared.describe(gpus=1).model_copy(update={"film_gib": 20}), scheduled(), "s3://films/schedules")
    assert disk_gib(job["spec"]["jobTemplate"]["spec"]["template"]["spec"]) > 80, "head and worker in one"


def test_pods_can_read_the_token_they_are_given(show: Any, film: str) -> None:
    spec, groups = _cluster(show, film, "kuberay")
    for group in (spec["headGroupSpec"], *groups.values()):
        pod = group["template"]["spec"]
        [volume] = [volume for volume in pod["volumes"] if "secret" in volume]
        assert volume["secret"] == {"secretName": spec["authOptions"]["secretName"], "defaultMode": 0o440}
        assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
        [mount] = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == volume["name"]]
        values = {row["name"]: row["value"] for row in pod["containers"][0]["env"]}
        assert values["RAY_AUTH_MODE"] == "token"
        assert values["RAY_AUTH_TOKEN_PATH"] == f"{mount['mountPath']}/auth_token"


def _cluster(show: Any, film: str, format_: str) -> tuple[dict[str, Any], dict[str, Any]]:
    sizes = ["--gpus", "32", "--gpus-per-node", "8"]
    if format_ == "kuberay":
        spec = show("kuberay", *sizes)[0]["spec"]
    else:
        spec = show("rayjob", film, *sizes, *STORE)[-1]["spec"]["rayClusterSpec"]
    return spec, {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def _spot_terms(group: dict[str, Any]) -> list[tuple[str, str]]:
    affinity = group["template"]["spec"]["affinity"]["nodeAffinity"]
    [selector] = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    return [(term["key"], term["operator"]) for term in selector["matchExpressions"] if "spot" in term["key"]]


def scheduled(cron: str = "30 2 * * *", **changes: Any) -> Definition:
    film = {"shots": [{"duration": "2s", "prompt": "a red circle"}]}
    return replace(Definition("news.v2", parse_cron(cron, "Europe/Berlin"), film, "s3://films/news"), **changes)


@pytest.mark.parametrize("stable_gpus", [None, 0])
def test_a_cron_job_renders_its_schedule_in_its_own_pod(stable_gpus: int | None) -> None:
    described = shared.describe(gpus=8, gpus_per_node=8, stable_gpus=stable_gpus, weights="longcat")
    [job] = cron_job(described, scheduled(), "s3://films/schedules")
    check_object(job, "V1CronJob")
    spec = job["spec"]
    assert (spec["schedule"], spec["timeZone"], spec["concurrencyPolicy"]) == ("30 2 * * *", "Europe/Berlin", "Forbid")
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,51}", job["metadata"]["name"])
    template = spec["jobTemplate"]["spec"]
    assert template["backoffLimit"] > 0, "a pod that is lost is followed by one that goes on"
    pod = template["template"]["spec"]
    [container] = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    options = _parser().parse_args(container["command"][1:])
    assert (options.name, options.schedules) == ("news.v2", "s3://films/schedules")
    assert not [volume for volume in pod["volumes"] if "secret" in volume], "its cluster is its own"
    assert pod["terminationGracePeriodSeconds"] > SAVE_S
    expected = "NotIn" if stable_gpus is None else "In"
    assert _spot_terms({"template": {"spec": pod}}) == [("cloud.google.com/gke-spot", expected)]


def on_failure(job: dict[str, Any], code: int, *conditions: str) -> str:
    """What Kubernetes does about a pod that ended like this: its first rule that holds, "Count" without any."""
    spec = job["spec"]["jobTemplate"]["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never", "Kubernetes takes no policy with another one"
    for rule in spec["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes", {"operator": "In", "values": []})
        assert codes["operator"] == "In" and codes["values"] == sorted(codes["values"]) and 0 not in codes["values"]
        if code in codes["values"] or {row["type"] for row in rule.get("onPodConditions", [])} & {*conditions}:
            return str(rule["action"])
    return "Count"


@pytest.mark.parametrize("error", [SettingError, QualityError, StoreFull])
def test_a_pod_whose_error_another_would_meet_too_ends_its_job(error: type[LongtakeError]) -> None:
    [job] = cron_job(shared.describe(gpus=1), scheduled(), "s3://films/schedules")
    assert on_failure(job, error("no").exit_code) == "FailJob"


def test_a_pod_that_was_stopped_or_evicted_is_followed_by_another() -> None:
    [job] = cron_job(shared.describe(gpus=1), scheduled(), "s3://films/schedules")
    assert on_failure(job, Interrupted().exit_code) == "Count"
    assert on_failure(job, AGAIN) == "Count"
    assert on_failure(job, 137) == "Count", "memory ran out"
    assert on_failure(job, Interrupted().exit_code, "DisruptionTarget") == "Ignore"


def test_a_schedule_that_replaces_its_run_replaces_its_pod() -> None:
    described = shared.describe(gpus=1)
    [job] = cron_job(described, scheduled(overlap="replace"), "s3://films/schedules")
    assert job["spec"]["concurrencyPolicy"] == "Replace"


@pytest.mark.parametrize(
    ("changes", "schedules", "word"),
    [
        ({"cron": "0 0 * * 7"}, "s3://films/schedules", "0 0 * * 7"),
        ({"cron": "0 0 L * *"}, "s3://films/schedules", "0 0 L * *"),
        ({"cron": "0 0 * * 1#2"}, "s3://films/schedules", "1#2"),
        ({"renders": "renders"}, "s3://films/schedules", "--renders"),
        ({}, "schedules", "--schedules"),
    ],
)
def test_what_a_pod_cannot_do_is_refused(changes: dict[str, Any], schedules: str, word: str) -> None:
    with pytest.raises(SettingError) as refused:
        cron_job(shared.describe(gpus=1), scheduled(**changes), schedules)
    assert word in str(refused.value)
    july = scheduled(cron="0 0 1 JUL *")
    assert cron_job(shared.describe(gpus=1), july, "s3://films/schedules")[0]["spec"]["schedule"] == "0 0 1 JUL *"


def test_the_cron_job_command_reads_the_schedule_from_its_store(
    show: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cluster.manifests.command.open_store", lambda url: LocalStore(tmp_path))
    flags = ["--schedules", "s3://films/schedules", "--gpus", "2"]
    assert main(["manifest", "cronjob", "news.v2", *flags]) == 2
    assert "news.v2" in capsys.readouterr().err
    ScheduleLog(LocalStore(tmp_path), "news.v2").append(Added(0.0, scheduled()))
    [job] = show("cronjob", "news.v2", *flags)
    assert job["metadata"]["name"] == "longtake-news-v2"
    rows = ({"length": "2s"}, {"length": "3h"}, {"length": "4s"})
    film = {"shots": [{"duration": "${length}", "prompt": "a red circle"}], "output": {"codec": "ffv1"}}
    ScheduleLog(LocalStore(tmp_path), "rows").append(Added(0.0, scheduled(id="rows", storyboard=film, rows=rows)))
    [varied] = show("cronjob", "rows", *flags)
    asked = [disk_gib(one["spec"]["jobTemplate"]["spec"]["template"]["spec"]) for one in (job, varied)]
    assert asked[0] < asked[1], "the longest film is not the first"


# ray up


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
@pytest.mark.parametrize("gpu_type", ["h200", "h100", "b200", "a100-80gb", "l4"])
def test_ray_takes_the_configuration_of_machines(show: Any, cloud: str, gpu_type: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    [config] = show(f"ray-up-{cloud}", "--gpus", "16", "--gpu-type", gpu_type, *_project(cloud))
    prepared = prepare_config(config)
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert sum(t["resources"].get("GPU", 0) * t["max_workers"] for t in types.values()) == 16
    markets = {name: kind["labels"]["ray.io/market-type"] for name, kind in types.items()}
    assert markets == {"head": "on-demand", "stable": "on-demand", "spot": "spot"}


def test_ec2_takes_every_node(show: Any) -> None:
    from botocore.session import Session
    from botocore.validate import ParamValidator

    shape = Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    [config] = show("ray-up-aws", "--gpus", "16", "--gpu-type", "h100", "--gpus-per-node", "8")
    for name, kind in config["available_node_types"].items():
        report = ParamValidator().validate({**kind["node_config"], "MinCount": 1, "MaxCount": 1}, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
    types = config["available_node_types"]
    assert [name for name in types if "InstanceMarketOptions" in types[name]["node_config"]] == ["spot"]


def test_ray_does_not_put_its_own_old_image_on_machines_of_aws(
    show: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """That one has CUDA 11.2, and the driver of its time."""
    from ray.autoscaler._private.aws.config import DEFAULT_AMI, _check_ami

    [config] = show("ray-up-aws", "--gpus", "8", "--region", "us-east-1")
    _check_ami(config)
    images = {kind["node_config"]["ImageId"] for kind in config["available_node_types"].values()}
    assert images.isdisjoint(DEFAULT_AMI.values())
    assert main(["manifest", "ray-up-aws", "--gpus", "8", "--region", "us-east-1"]) == 0
    comments = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]
    assert any(image in line for image in images for line in comments), "how to get an id is said"
    assert any("ssm get-parameter --region us-east-1" in line for line in comments)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class GcpDiskParams(Strict):
    sourceImage: str
    diskSizeGb: int
    diskType: str


class GcpDisk(Strict):
    boot: bool
    autoDelete: bool
    type: Literal["PERSISTENT", "SCRATCH"]
    initializeParams: GcpDiskParams


class GcpScheduling(Strict):
    onHostMaintenance: Literal["MIGRATE", "TERMINATE"]
    provisioningModel: Literal["SPOT", "STANDARD"] = "STANDARD"
    instanceTerminationAction: Literal["DELETE", "STOP"] | None = None
    automaticRestart: bool = True


class GcpNode(Strict):
    """The fields of Compute Engine's instances.insert that are used."""

    machineType: str
    disks: list[GcpDisk]
    scheduling: GcpScheduling
    metadata: dict[Literal["items"], list[dict[Literal["key", "value"], str]]] = {}


def test_compute_engine_takes_every_node(show: Any) -> None:
    [config] = show("ray-up-gcp", "--gpus", "16", "--project", "films-12345")
    nodes = {name: GcpNode.model_validate(t["node_config"]) for name, t in config["available_node_types"].items()}
    assert {name for name, node in nodes.items() if node.scheduling.provisioningModel == "SPOT"} == {"spot"}
    for name, node in nodes.items():
        if name != "head":
            assert node.scheduling.onHostMaintenance == "TERMINATE", "machines with GPUs cannot be moved"
    assert nodes["spot"].scheduling.automaticRestart is False, "refused for spot machines otherwise"
    for node in nodes.values():
        assert int(node.disks[0].initializeParams.sourceImage.rpartition("nvidia-")[2]) >= 580, "CUDA 13 wants that"


@pytest.mark.parametrize(
    ("gpu_type", "disk"), [("h200", "hyperdisk-balanced"), ("b200", "hyperdisk-balanced"), ("l4", "pd-balanced")]
)
def test_compute_engine_is_asked_for_a_disk_that_the_machine_takes(show: Any, gpu_type: str, disk: str) -> None:
    """Its own default is `pd-standard`, which G2 and A3 machines refuse; A3 Ultra and A4 take Hyperdisk alone."""
    flags = ["--gpu-type", gpu_type, "--project", "films-12345", "--region", "europe-west4"]
    [config] = show("ray-up-gcp", "--gpus", "8", *flags)
    kinds = config["available_node_types"]
    disks = {name: kind["node_config"]["disks"][0]["initializeParams"]["diskType"] for name, kind in kinds.items()}
    zone = config["provider"]["availability_zone"]
    assert disks["head"] == f"zones/{zone}/diskTypes/pd-balanced"
    assert disks["stable"] == f"zones/{zone}/diskTypes/{disk}"
    assert zone.startswith(f"{config['provider']['region']}-") and config["provider"]["region"] == "europe-west4"


def test_machines_read_the_token_from_a_file_and_show_no_dashboard(show: Any) -> None:
    [config] = show("ray-up-aws", "--gpus", "8")
    flags = [option.removeprefix("-e ") for option in config["docker"]["run_options"] if option.startswith("-e ")]
    options = dict(flag.split("=", 1) for flag in flags)
    assert options["RAY_AUTH_MODE"] == "token"
    assert str(Path(options["RAY_AUTH_TOKEN_PATH"]).parent) in config["file_mounts"]
    head, worker = config["head_start_ray_commands"][1], config["worker_start_ray_commands"][1]
    assert "--dashboard-host=127.0.0.1" in head and "--num-cpus=0" in head
    assert "dashboard-host" not in worker
    assert options["RAY_enable_autoscaler_v2"] == "1", "only that one starts nodes for a label"


@pytest.mark.parametrize("command", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_knows_the_flags_it_is_started_with(show: Any, command: str) -> None:
    from ray.scripts.scripts import start

    [config] = show("ray-up-aws", "--gpus", "8")
    words = shlex.split(config[command][1].rpartition("; ray start ")[2])
    start.make_context("start", words)


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("gpu_type", ["l4", "a10g"])
def test_nodes_with_small_cards_hold_what_a_chained_window_keeps_in_host_memory(
    show: Any, film: str, gpu_type: str, gpus: int
) -> None:
    sizes, kept = NetworkSizes(), 8 * 44 * 80
    one = transformer_bytes(sizes, LEAST) + sizes.vae_weights * NUMBER_BYTES + page_locked_bytes(sizes, kept)
    needed_gib = gpus * (one / 2**30 + PROCESS_GIB) / RAY_KILLS_ABOVE
    flags = ["--gpus", str(gpus), "--gpus-per-node", str(gpus), "--gpu-type", gpu_type]
    [group] = show("kuberay", *flags)[0]["spec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["memory"].removesuffix("Gi")) >= needed_gib
    resources = show("skypilot", film, *flags, *STORE)[0]["resources"]
    assert int(resources["memory"].removesuffix("+")) >= needed_gib, "or the cheapest machine with the card is taken"
    assert resources["cpus"] == f"{limits['cpu']}+"


# SkyPilot


class SkyResources(Strict):
    accelerators: dict[str, int]
    cpus: str
    memory: str
    use_spot: bool
    image_id: str
    disk_size: int
    job_recovery: dict[Literal["max_restarts_on_errors", "recover_on_exit_codes"], int | list[int]]


class SkyTask(Strict):
    """The fields of a SkyPilot task that are used."""

    name: str
    num_nodes: int
    resources: SkyResources
    envs: dict[str, str]
    secrets: dict[str, None]
    """No value: it is given on the command line."""
    file_mounts: dict[str, str]
    run: str


def test_a_skypilot_task_is_one_render_that_recovers(show: Any, film: str) -> None:
    [task] = show("skypilot", film, "--gpus", "16", "--gpus-per-node", "8", *STORE)
    checked = SkyTask.model_validate(task)
    assert (checked.num_nodes, checked.resources.accelerators) == (2, {"H200": 8})
    assert checked.resources.job_recovery["recover_on_exit_codes"] == [Interrupted().exit_code]
    [line] = [line for line in checked.run.splitlines() if "longtake render" in line]
    options = _parser().parse_args(shlex.split(line)[1:])
    assert str(options.storyboard) in checked.file_mounts


FAKE_RAY = """#!/bin/bash
echo "ray $*" >> "$CALLS"
[[ "$*" == *--block* && "$*" == *--head* ]] && exec sleep 60
[[ "$*" == *--block* ]] && exit 1
exit 0
"""


@pytest.mark.parametrize(("rank", "code"), [(0, 0), (0, 4), (0, 75), (1, 0)])
def test_the_task_ends_as_its_render_does_on_every_node(
    show: Any, film: str, tmp_path: Path, rank: int, code: int
) -> None:
    [task] = show("skypilot", film, "--gpus", "2", "--gpus-per-node", "1", *STORE)
    for name, text in (("ray", FAKE_RAY), ("longtake", f'#!/bin/bash\necho "longtake $*" >> "$CALLS"\nexit {code}\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "calls").touch()
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"),
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": str(rank),
    }  # fmt: skip
    done = subprocess.run(["bash", "-c", task["run"]], env=environment, timeout=30, check=False)
    assert done.returncode == code
    calls = (tmp_path / "calls").read_text()
    assert ("longtake render" in calls) == (rank == 0)
    assert rank == 0 or "--address=10.0.0.1:6379" in calls


SMALL = {
    "precision: weight_only, networks: in_turn, condition_cache: host": [],
    "precision: stored": ["chain does not fit", "refine does not fit", "which fits"],
}


@pytest.mark.parametrize("memory", SMALL)
@pytest.mark.parametrize("format_", ["rayjob", "skypilot", "cronjob"])
def test_a_card_that_is_too_small_for_the_film_is_named(
    film: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    format_: str, memory: str,
) -> None:  # fmt: skip
    shots = "shots:\n  - {id: a, duration: 6s, prompt: a circle, image: /weights/start.png}\n"
    shots += "  - {id: b, duration: 6s, prompt: it grows, video: /weights/begin.mp4}\n"
    written = f"checkpoint: /weights/longcat\n{shots}memory: {{{memory}}}\n"
    Path(film).write_text(written)
    arguments = [film, *STORE]
    if format_ == "cronjob":
        monkeypatch.setattr("cluster.manifests.command.open_store", lambda url: LocalStore(tmp_path))
        added = Added(0.0, scheduled(id="news", storyboard=yaml.safe_load(written)))
        ScheduleLog(LocalStore(tmp_path), "news").append(added)
        arguments = ["news", "--schedules", "s3://films/schedules"]
    assert main(["manifest", format_, *arguments, "--gpus", "8", "--gpu-type", "h200"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["manifest", format_, *arguments, "--gpus", "8", "--gpu-type", "l4"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert bool(lines) == bool(SMALL[memory])
    assert all(word in "".join(lines) for word in SMALL[memory])
    assert all("--gpu-type l4" in line and "/weights/longcat is not here" in line for line in lines)


def test_a_film_that_no_checkpoint_like_the_official_one_can_make_is_doubted(
    film: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = "[{at: 0s, prompt: a}, {at: 3.9s, prompt: b}]"
    Path(film).write_text(f"checkpoint: /weights/longcat\nshots:\n  - {{duration: 4s, prompt: {prompts}}}\n")
    assert main(["manifest", "rayjob", film, "--gpus", "8", *STORE]) == 0
    assert "shots[0].prompt" in (said := capsys.readouterr().err) and "/weights/longcat is not here" in said


# The image


@pytest.mark.parametrize("flags", [[], ["--cpu"]])
def test_the_image_holds_every_room_and_runs_as_nobody_special(
    capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert main(["manifest", "dockerfile", *flags]) == 0
    text = capsys.readouterr().out.replace("\\\n", "")
    words = [line.split() for line in text.splitlines()]
    assert {line[0] for line in words} <= {"FROM", "RUN", "USER", "COPY", "WORKDIR", "ENV", "CMD"}
    copied = [source for line in words if line[0] == "COPY" for source in line[1:-1]]
    assert all((ROOT / source).exists() for source in copied)
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(wheel["packages"]) <= set(copied)
    assert [line[1] for line in words if line[0] == "USER"] == [str(shared.USER_ID)]
    assert ("whl/cpu" in text) == bool(flags)


TRITON_OF_TORCH = {"2.13.0": "3.7.1"}
"""What PyPI's wheels for Linux say they require; the wheels for CPUs, which the checks run with, require none."""


def test_the_pinned_triton_is_the_one_that_torch_for_cuda_asks_for() -> None:
    """With any other pip finds no solution: neither for the image nor for `make demo` on a machine with a GPU."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert TRITON_OF_TORCH[pins["torch"]] == pins["triton"]


# All of them


def _project(cloud: str) -> list[str]:
    return ["--project", "films-12345"] if cloud == "gcp" else []


def test_no_manifest_holds_a_secret(
    film: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("hunter2hunter2")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hunter2hunter2")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    for arguments in (
        ["kuberay", "--gpus", "8"], ["rayjob", film, "--gpus", "8", *STORE], ["ray-up-aws", "--gpus", "8"],
        ["ray-up-gcp", "--gpus", "8", *_project("gcp")], ["skypilot", film, "--gpus", "8", *STORE], ["dockerfile"],
    ):  # fmt: skip
        assert main(["manifest", *arguments]) == 0
        text = re.sub(r"(?m)^#.*$", "", capsys.readouterr().out)
        assert "hunter2" not in text
        assert not re.search(r"RAY_AUTH_TOKEN(=|: *)(?!null)\S", text), "a value for the token"
        assert "runtime_env" not in text and "runtimeEnv" not in text


@pytest.mark.parametrize("address", ["s3://AKIA:hunter2@films/one", "az://films/one?sig=hunter2"])
@pytest.mark.parametrize("format_", ["rayjob", "skypilot", "cronjob"])
def test_an_address_with_a_key_in_it_is_written_nowhere(
    film: str, capsys: pytest.CaptureFixture[str], format_: str, address: str
) -> None:
    words = ["news", "--schedules", address] if format_ == "cronjob" else [film, "--store", address]
    assert main(["manifest", format_, *words, "--gpus", "8"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "hunter2" not in captured.err
    assert "credentials into the environment" in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["kuberay", "--gpus", "0"], ["--gpus", "0"]),
        (["kuberay", "--gpus", "8", "--name", "../../evil"], ["--name", "../../evil"]),
        (["kuberay", "--gpus", "8", "--image", "a b"], ["--image", "a b"]),
        (["kuberay", "--gpus", "8", "--spot-label", "spot"], ["--spot-label", "KEY=VALUE"]),
        (["kuberay", "--gpus", "12", "--gpus-per-node", "8"], ["--gpus", "12", "multiple of the 8"]),
        (["kuberay", "--gpus", "8", "--stable-gpus", "9"], ["--stable-gpus", "9"]),
        (["kuberay", "--gpus", "8", "--priority-class", "night"], ["--priority-class", "--queue"]),
        (["ray-up-aws", "--gpus", "8", "--gpus-per-node", "2"], ["--gpus-per-node", "2", "8"]),
        (["ray-up-gcp", "--gpus", "8", "--gpu-type", "a10g", "--project", "films-12345"], ["--gpu-type", "gcp"]),
        (["ray-up-gcp", "--gpus", "8", "--project", "-rf"], ["--project"]),
        (["rayjob", "FILM", "--gpus", "8", "--store", "renders/one"], ["--store", "renders/one", "s3://"]),
        (["rayjob", "no.yaml", "--gpus", "8", "--store", "s3://b/f"], ["no.yaml"]),
    ],
)
def test_what_no_cluster_can_be_is_refused_with_its_flag(
    film: str, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    try:
        code = main(["manifest", *(film if word == "FILM" else word for word in arguments)])
    except SystemExit as stopped:
        code = int(str(stopped.code))
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert all(word in captured.err for word in words), captured.err


@pytest.mark.parametrize("format_", ["rayjob", "skypilot"])
def test_a_storyboard_that_names_a_file_of_this_machine_is_refused(
    film: str, capsys: pytest.CaptureFixture[str], format_: str
) -> None:
    Path(film).write_text("shots:\n  - {duration: 2s, prompt: a circle, image: start.png}\n")
    assert main(["manifest", format_, film, "--gpus", "8", *STORE]) == 2
    assert "start.png" in capsys.readouterr().err
    Path(film).write_text("shots:\n  - {duration: 2s, prompt: a circle, image: /weights/start.png}\n")
    assert main(["manifest", format_, film, "--gpus", "8", *STORE]) == 0
