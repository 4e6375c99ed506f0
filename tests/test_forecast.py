"""Forecasts: the real machine against a simulated clock, what they say, and where paces and prices come from."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import pytest

from cluster.cli import main
from cluster.manifests.hardware import HARDWARE
from cluster.outlook import Cluster, look_ahead
from cluster.paces import find_pace, pace_file, short_name
from pipeline.errors import SettingError
from pipeline.facts import CheckpointFacts, Facts
from pipeline.forecast import Fleet, Forecast, forecast, smallest
from pipeline.machine import Machine
from pipeline.pace import GPUS, PUBLISHED_SECONDS, GpuType, Pace, measured, published, role_bytes
from pipeline.plan import Plan, plan_film
from pipeline.prices import LIST_PRICES, load_prices
from pipeline.spec import load_spec, parse_spec
from pipeline.tasks import CommitRecord

ROOT = Path(__file__).resolve().parent.parent
AT_ONCE = Pace("at once", dict(PUBLISHED_SECONDS), start_s=0.0, join_s=0.0)
"""Published task times; nothing else takes time."""


@lru_cache
def five_minutes() -> Plan:
    spec = load_spec(ROOT / "examples" / "five_minutes.yaml")
    return plan_film(spec, Facts(CheckpointFacts("", "d" * 64)))


@lru_cache
def shots(count: int) -> Plan:
    many = [{"id": f"s{number}", "duration": "6s", "prompt": "a circle"} for number in range(count)]
    return plan_film(parse_spec(json.dumps({"shots": many})), Facts(CheckpointFacts("", "d" * 64)))


def on(plan: Plan, workers: int, pace: Pace = AT_ONCE, **fleet: float | bool | int) -> Forecast:
    return forecast(plan.tasks, {}, pace, Fleet(workers, **fleet), plan.film_frames)  # type: ignore[arg-type]


def test_one_worker_takes_all_the_work_one_after_another() -> None:
    one = on(five_minutes(), 1)
    assert one.makespan_s == pytest.approx(five_minutes().estimate.total_s)
    assert one.busy == pytest.approx(1.0)
    assert sum(phase.tasks for phase in one.phases) == len(five_minutes().tasks)


def test_more_workers_are_never_slower_than_the_longest_chain_and_end_there() -> None:
    plan = five_minutes()
    times_s = [on(plan, size).makespan_s for size in (1, 2, 3, 8, 64)]
    assert times_s == sorted(times_s, reverse=True)
    assert times_s[-1] == pytest.approx(plan.estimate.critical_path_s)
    assert "the chain" in on(plan, 64).limit()
    assert "number of workers" in on(plan, 1).limit()


def test_a_worker_does_one_thing_at_a_time_and_tasks_wait_for_their_inputs() -> None:
    plan, one = shots(5), on(shots(5), 4, published())
    ends = {stretch.task_id: stretch.stop_s for stretch in one.stretches if stretch.task_id}
    assert set(ends) == set(plan.tasks)
    for worker in range(4):
        mine = sorted((s.start_s, s.stop_s) for s in one.stretches if s.worker == worker)
        assert all(before[1] <= after[0] + 1e-9 for before, after in zip(mine, mine[1:], strict=False))
    for stretch in one.stretches:
        if stretch.task_id:
            assert all(ends[name] <= stretch.start_s + 1e-9 for name in plan.tasks[stretch.task_id].inputs)


def test_what_is_committed_is_not_forecast_again() -> None:
    plan = five_minutes()
    done = [task for task in plan.tasks.values() if task.kind in ("text", "segment")]
    commits = {task.id: CommitRecord(task.id, 1, 1, (), {}) for task in done}
    rest = forecast(plan.tasks, commits, AT_ONCE, Fleet(1), plan.film_frames)
    spent_s = sum(task.work for task in done)
    assert rest.makespan_s == pytest.approx(plan.estimate.total_s - spent_s)
    everything = dict.fromkeys(plan.tasks, next(iter(commits.values())))
    assert forecast(plan.tasks, everything, AT_ONCE, Fleet(1)).makespan_s == 0.0


def test_weights_come_to_a_node_once_and_loading_is_paid_by_each_worker() -> None:
    pace = replace(
        AT_ONCE, load_s=dict.fromkeys(("text", "chain", "refine"), 10.0), fetch_s={"refine": 1000.0, "chain": 50.0}
    )
    warm = on(five_minutes(), 8, pace)
    one_node = on(five_minutes(), 8, pace, has_weights=False)
    loads = [s for s in one_node.stretches if not s.task_id and s.role == "refine"]
    assert len(loads) > 1
    first_s = min(load.start_s for load in loads)
    assert max(load.stop_s for load in loads if load.start_s < first_s + 1000) == pytest.approx(first_s + 1010)
    assert one_node.makespan_s > warm.makespan_s
    two_nodes = on(five_minutes(), 8, pace, has_weights=False, per_node=4)
    for node in range(2):
        own = [s for s in two_nodes.stretches if s.worker // 4 == node and s.role == "refine" and not s.task_id]
        assert max(load.stop_s - load.start_s for load in own) == pytest.approx(1010.0), "each node fetches once"


def test_start_node_and_report_are_part_of_the_time_and_the_cost() -> None:
    pace = replace(AT_ONCE, start_s=5.0, join_s=7.0, finish_s=11.0, finish_s_per_frame=0.01)
    plain, whole = on(five_minutes(), 4), on(five_minutes(), 4, pace, node_s=300.0)
    assert whole.ready_s == pytest.approx(312.0)
    assert whole.makespan_s == pytest.approx(plain.makespan_s + 312 + 11 + 90)
    assert whole.cost(2.0) == pytest.approx(4 * whole.makespan_s / 3600 * 2.0)


def test_the_smallest_size_is_found_exactly() -> None:
    def done_in(size: int) -> float:
        return 100 / size

    assert [smallest(done_in, limit_s, 64) for limit_s in (100, 34, 33, 1.5)] == [1, 3, 4, None]


def test_five_hundred_workers_are_forecast_in_moments() -> None:
    one = on(shots(60), 512)
    assert one.workers_used >= 60
    assert one.makespan_s < 1.5 * shots(60).estimate.critical_path_s


class AsksEveryone(Machine):
    """Asks each free worker after each event, whatever those like it found."""

    asked = 0

    def _schedule(self) -> None:
        if self._replanning or self._ending is not None:
            return
        usable = self._crew.usable()
        self._demand = None
        for worker in usable:
            if worker.free:
                others = [other for other in usable if other is not worker]
                staff = Counter(other.role for other in others)
                stable = Counter(other.role for other in others if not other.spot)
                self._employ(worker, staff, stable, usable)

    def _employ(self, *arguments: Any) -> None:
        type(self).asked += 1
        super()._employ(*arguments)


@pytest.mark.parametrize(
    ("film", "workers", "fleet"),
    [
        ("five_minutes", 16, {}),
        ("five_minutes", 5, {"stable": 1, "life_s": 1800.0, "per_node": 1, "node_s": 300.0}),
        ("shots", 3, {"per_node": 1}),
        ("shots", 40, {"has_weights": False}),
        ("shots", 24, {"stable": 4, "life_s": 1500.0, "per_node": 2, "node_s": 300.0, "has_weights": False}),
    ],
)
def test_workers_that_would_find_nothing_are_not_asked_and_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch, film: str, workers: int, fleet: dict[str, Any]
) -> None:
    class Counts(Machine):
        asked = 0

        def _employ(self, *arguments: Any) -> None:
            type(self).asked += 1
            super()._employ(*arguments)

    plan = five_minutes() if film == "five_minutes" else shots(12)
    monkeypatch.setattr("pipeline.forecast.Machine", Counts)
    quick = on(plan, workers, published(), **fleet)
    monkeypatch.setattr("pipeline.forecast.Machine", AsksEveryone)
    monkeypatch.setattr(AsksEveryone, "asked", 0)
    assert on(plan, workers, published(), **fleet) == quick
    if workers > 10:
        assert Counts.asked < AsksEveryone.asked / 3


@pytest.mark.parametrize("pace", [AT_ONCE, published()], ids=["at_once", "published"])
def test_larger_clusters_go_as_the_first_in_which_somebody_has_nothing_to_do(pace: Pace) -> None:
    for plan, first in ((five_minutes(), 130), (shots(1), 9), (shots(3), 20)):
        for has_weights in (True, False):
            one = on(plan, first, pace, has_weights=has_weights)
            assert max(stretch.worker for stretch in one.stretches) < first - 1, "some have nothing to do"
            for size in (first - 1, first + 1, 2 * first + 3):
                fleet = Fleet(size, has_weights=has_weights)
                assert one.on(fleet) == forecast(plan.tasks, {}, pace, fleet, plan.film_frames)
            assert one.on(Fleet(4 * first, has_weights=has_weights)).cost(1.0) == pytest.approx(4 * one.cost(1.0))
            assert one.on(Fleet(1, has_weights=has_weights)) is None
            assert one.on(Fleet(first, per_node=3, has_weights=has_weights)) is None
            assert one.on(Fleet(2 * first, has_weights=has_weights, stable=1, life_s=3600.0)) is None
    busy = on(five_minutes(), 2, pace)
    assert busy.on(Fleet(3)) is None, "another one would have something to do"


def test_a_cluster_far_too_large_is_not_forecast_in_all_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def counted(*arguments: Any) -> Forecast:
        ran.append(arguments[3].workers)
        return forecast(*arguments)

    monkeypatch.setattr("cluster.outlook.forecast", counted)
    told = look_ahead(shots(3), {}, published("h200"), Cluster(4096, "h200"))
    assert 4096 in told.forecasts and max(ran) < 64
    assert told.forecasts[4096].fleet.workers == 4096


def test_the_outlook_names_the_fewest_gpus_for_a_deadline_and_their_cost(tmp_path: Path) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("h200: 2\nh100: 1.5\n")
    plan = five_minutes()
    told = look_ahead(plan, {}, published("h200"), Cluster(None, "h200", 2 * 3600.0, prices))
    assert told.price_per_hour == 2
    assert told.chosen == told.fewest
    assert told.fewest is not None
    assert told.forecasts[told.fewest].makespan_s <= 2 * 3600
    assert told.forecasts[told.fewest - 1].makespan_s > 2 * 3600
    text = "\n".join(told.describe())
    assert f"done by the deadline, 2:00:00: {told.fewest} GPUs" in text
    late = look_ahead(plan, {}, published("h200"), Cluster(8, "h200", 60.0, prices))
    assert (late.chosen, late.fewest) == (8, None)
    assert "no number of GPUs is" in "\n".join(late.describe())
    open_ended = look_ahead(plan, {}, published("h800"), Cluster(None, "h800"))
    assert open_ended.price_per_hour is None
    assert open_ended.chosen == 3, "the chain, and two refiners that keep up with it"


def test_spot_nodes_that_go_cost_time_and_what_they_denoised_is_kept() -> None:
    plan, pace = five_minutes(), published()
    kept = on(plan, 4, pace, per_node=1, node_s=300.0)
    assert (kept.nodes_lost, kept.slowest_s) == (0, kept.makespan_s)
    spot = on(plan, 4, pace, per_node=1, node_s=300.0, stable=0, life_s=3600.0)
    assert spot.nodes_lost > 2
    assert kept.makespan_s < spot.makespan_s <= spot.slowest_s < 2 * kept.makespan_s
    assert sorted((phase.kind, phase.tasks) for phase in spot.phases) == sorted(
        (phase.kind, phase.tasks) for phase in kept.phases
    )
    ran = [stretch for stretch in spot.stretches if stretch.task_id]
    spent_s = {name: sum(one.stop_s - one.start_s for one in ran if one.task_id == name) for name in plan.tasks}
    again = [name for name in plan.tasks if sum(one.task_id == name for one in ran) > 1]
    assert again, "some were under way when their node went"
    for name, task in plan.tasks.items():
        saved = task.kind in ("segment", "window")
        assert spent_s[name] == pytest.approx(task.work) if saved or name not in again else spent_s[name] > task.work


def test_one_stable_gpu_keeps_the_chain_from_the_losses_of_spot_nodes() -> None:
    plan, pace = five_minutes(), published()
    fleet = {"per_node": 1, "node_s": 300.0, "life_s": 1800.0}
    mixed, alone = on(plan, 3, pace, stable=1, **fleet), on(plan, 3, pace, stable=0, **fleet)
    last = max(plan.tasks.values(), key=lambda task: task.kind == "segment" and task.index)
    assert last.kind == "segment"
    assert [one.worker for one in mixed.stretches if one.task_id == last.id] == [0]
    assert mixed.slowest_s < alone.slowest_s
    assert on(plan, 3, pace, stable=3, **fleet).nodes_lost == 0


def test_plan_says_what_spot_nodes_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    film, official = str(ROOT / "examples" / "five_minutes.yaml"), "meituan-longcat/LongCat-Video"
    asked = ["plan", film, "--checkpoint", official, "--gpus", "3", "--gpus-per-node", "1", "--stable-gpus", "1"]
    asked += ["--spot-life", "1h"]
    assert main(asked) == 0
    told = capsys.readouterr().out
    assert "2 of them spot, 1 a node (no price is known, name `h200-spot` with --prices" in told
    assert "taken away after 1:00:00 on average" in told and "nodes lost" in told
    (tmp_path / "prices.yaml").write_text("h200: 4\nh200-spot: 1\n")
    assert main([*asked, "--prices", "prices.yaml", "--json"]) == 0
    outlook = json.loads(capsys.readouterr().out)["outlook"]
    assert (outlook["price_per_spot_gpu_hour"], outlook["stable_gpus"], outlook["spot_life_s"]) == (1.0, 1, 3600.0)
    three = next(size for size in outlook["sizes"] if size["workers"] == 3)
    assert three["cost"] == pytest.approx((4 + 2 * 1) * three["seconds"] / 3600)
    assert three["nodes_lost"] > 0 and three["slowest_s"] >= three["seconds"]


def test_prices_are_the_lists_with_the_users_own_in_their_place(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text("H200: 1.25\nmine: 9\n")
    assert load_prices(path) == {**LIST_PRICES, "h200": 1.25, "mine": 9.0}
    for wrong in ("h200: cheap", "- 3", "h200: -1", "h200: true", "h200: .inf", "{"):
        path.write_text(wrong)
        with pytest.raises(SettingError, match="--prices"):
            load_prices(path)
    with pytest.raises(SettingError, match="cannot be read"):
        load_prices(tmp_path / "absent.yaml")


def test_a_gpu_is_as_fast_as_its_arithmetic_and_an_unknown_one_is_refused() -> None:
    assert published("h200").seconds == published("h800").seconds
    assert published("a100").seconds["segment"] == pytest.approx(61.3 * 989 / 312)
    with pytest.raises(SettingError, match="longtake calibrate"):
        published("gtx9")


def test_plans_and_manifests_know_the_same_gpus_and_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(GPUS) == get_args(GpuType) and set(HARDWARE) == set(GPUS) and set(LIST_PRICES) < set(GPUS)
    for name in GPUS:
        assert short_name(HARDWARE[name].product) == name, "as the driver's name is shortened"  # type: ignore[index]
        assert published(name).of("segment")[0] == pytest.approx(61.3 * 989 / GPUS[name].bf16_tflops)
    with pytest.raises(SettingError, match=", ".join(GPUS)):
        published("gtx9")
    with pytest.raises(SystemExit):
        main(["manifest", "kuberay", "--gpus", "8", "--gpu-type", "gtx9"])
    assert ", ".join(GPUS) in capsys.readouterr().err.replace("'", "")
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert ", ".join(GPUS) in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", [["plan", "film.yaml"], ["manifest", "kuberay", "--gpus", "8"]])
def test_a_card_with_another_memory_than_the_known_one_is_not_taken_for_it(
    capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*command, "--gpu-type", "A100-40GB"])
    assert "--gpu-type: A100-40GB is not known, a100 is the one of 80 GB" in capsys.readouterr().err


@pytest.mark.parametrize("gpu_type", GPUS)
def test_plan_says_of_each_gpu_type_whether_the_film_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gpu_type: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "film.yaml").write_text('shots: [{"duration": "6s", "prompt": "a circle"}]\n')
    asked = ["plan", "film.yaml", "--checkpoint", "meituan-longcat/LongCat-Video", "--gpus", "2"]
    assert main([*asked, "--gpu-type", gpu_type]) == 0
    told = capsys.readouterr().out
    assert f"2 x {gpu_type} (published for one H800" in told
    small = gpu_type in ("l4", "a10g")
    assert (f"warning: --gpu-type {gpu_type}: chain does not fit on a card of 24 GB" in told) == small
    assert ("does not fit" in told) == small
    assert main([*asked, "--gpu-type", gpu_type, "--card-gb", "30"]) == 0
    assert "warning: chain does not fit on a card of 30 GB" in capsys.readouterr().out


def test_measured_kinds_come_from_the_checkpoint_and_the_rest_from_the_report() -> None:
    pace = measured({"cuda": {"segment": 10.0}}, "cuda", "a100")
    assert pace.of("segment") == (10.0, True)
    assert pace.of("window") == (pytest.approx(80.7 * 989 / 312), False)
    assert measured({"cuda": {"segment": 10.0}}, "cpu").of("segment") == (61.3, False)


def test_a_calibration_goes_before_everything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checkpoint = CheckpointFacts("", "e" * 64)
    assert find_pace(checkpoint, "cpu", "h200").basis.startswith("published")
    monkeypatch.setattr("cluster.paces.local_gpu", lambda: "rtx4090")
    assert "nothing is known of rtx4090" in find_pace(checkpoint, "cuda").basis, "no card is taken for an H800 unsaid"
    monkeypatch.setattr("cluster.paces.local_gpu", lambda: "h200")
    assert "nothing is known" not in find_pace(checkpoint, "cuda").basis
    path = pace_file(checkpoint.digest, "NVIDIA H200")
    assert path.name == "h200.json"
    path.parent.mkdir(parents=True)
    calibrated = Pace("calibrated", {"segment": 50.0}, of_checkpoint=True, load_s={"chain": 3.0})
    path.write_text(json.dumps({"pace": calibrated.to_json()}))
    assert find_pace(checkpoint, "cpu", "h200") == calibrated
    assert find_pace(replace(checkpoint, digest="f" * 64), "cpu", "h200") != calibrated, "another checkpoint"
    assert find_pace(checkpoint, "cpu") != calibrated, "another device"
    path.write_text("{")
    with pytest.raises(SettingError, match=r"h200\.json"):
        find_pace(checkpoint, "cpu", "h200")


def test_gpu_names_are_short() -> None:
    names = ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090", "Tesla T4")
    assert [short_name(name) for name in names] == ["h200", "h100", "a100", "rtx4090", "t4"]


def test_the_weights_of_a_role_are_what_it_reads() -> None:
    found = role_bytes(ROOT / "model" / "pocket")
    files = {path: path.stat().st_size for path in (ROOT / "model" / "pocket").rglob("*.safetensors")}
    assert found["text"] + found["chain"] == sum(files.values())
    assert found["media"] < found["chain"] == found["refine"]


def test_plan_says_time_cost_and_the_size_for_a_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    film, official = str(ROOT / "examples" / "five_minutes.yaml"), "meituan-longcat/LongCat-Video"
    asked = ["plan", film, "--checkpoint", official, "--gpus", "8", "--gpu-type", "H200", "--deadline", "2h"]
    assert main(asked) == 0
    text = capsys.readouterr().out
    assert "8 x h200 (published for one H800" in text
    assert "done by the deadline, 2:00:00: 2 GPUs" in text
    assert f"{official} is not here" in text
    assert main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["outlook"]
    assert (told["fewest"], told["chosen"], told["gpu_type"]) == (2, 8, "h200")
    eight = next(size for size in told["sizes"] if size["workers"] == 8)
    assert eight["cost"] == pytest.approx(8 * eight["seconds"] / 3600 * LIST_PRICES["h200"])
    assert {phase["kind"] for phase in eight["phases"]} == {"text", "segment", "window", "encode", "film"}


def test_plan_without_a_cluster_counts_workers_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(ROOT / "examples" / "five_minutes.yaml")]) == 0
    text = capsys.readouterr().out
    assert "time by number of workers: 1: " in text
    assert "measured on cpu" in text
    assert "GPUs" not in text


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--gpu-type", "gtx9"], "--gpu-type"),
        (["--prices", "absent.yaml"], "--prices"),
        (["--checkpoint", "someone/else"], "checkpoint"),
        (["--spot-life", "1h"], "--spot-life"),
        (["--stable-gpus", "1", "--spot-life", "60s"], "--spot-life"),
        (["--gpus", "4", "--stable-gpus", "9"], "--stable-gpus"),
    ],
)
def test_plan_refuses_what_it_knows_nothing_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    field: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(ROOT / "examples" / "five_minutes.yaml"), *flags]) == 2
    assert field in capsys.readouterr().err


def test_a_unit_is_as_much_work_as_frames_are_decoded_for_it() -> None:
    shot = [{"id": "a", "duration": "12s", "prompt": "a"}]
    plan = plan_film(parse_spec(json.dumps({"shots": shot})), Facts(CheckpointFacts("", "d" * 64), pace=AT_ONCE))
    units = [task for task in plan.tasks.values() if task.kind == "encode"]
    assert [task.params["frames"] for task in units] == [181, 160, 19]
    assert [task.work / units[0].work for task in units] == pytest.approx([1.0, 1.0, 40 / 181])
