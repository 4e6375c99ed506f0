"""What is counted, that Ray takes it, and that the dashboard shows what there is."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from typing import Any

import pytest

from cluster.cli import main
from cluster.metrics import METRICS, Meters, count_states, ray_instrument, stage_of
from cluster.orchestrator import Story
from pipeline.events import PhaseProgress, ProgressSummary
from pipeline.summary import activity
from pipeline.tasks import content_id


class Recorded:
    """An instrument that refuses labels its metric has not, and remembers the rest."""

    def __init__(self, name: str, into: dict[str, dict[str, float]]) -> None:
        self.name, self.into = name, into

    def _key(self, tags: dict[str, str]) -> str:
        assert set(tags) == set(METRICS[self.name].labels), f"{self.name} has other labels than {tags}"
        return ",".join(tags.values())

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert METRICS[self.name].kind == "counter" and value > 0
        self.into[self.name][self._key(tags)] += value

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert METRICS[self.name].kind == "gauge"
        self.into[self.name][self._key(tags)] = value

    def observe(self, value: float, tags: dict[str, str]) -> None:
        assert METRICS[self.name].kind == "histogram"
        self.into[self.name][self._key(tags)] += value


@pytest.fixture
def seen() -> dict[str, dict[str, float]]:
    return defaultdict(lambda: defaultdict(float))


@pytest.fixture
def meters(seen: dict[str, dict[str, float]]) -> Meters:
    return Meters(lambda name: Recorded(name, seen))


def test_events_of_a_render_are_counted_by_stage(meters: Meters, seen: Any) -> None:
    story = Story("s3://films/one", meters)
    segment, window = content_id("segment", 1), content_id("window", 2)
    story.tell("committed", task=segment, seconds=61.5, host="a")
    story.tell("committed", task=window, seconds=80.0, host="a")
    story.tell("failed", task=window, label="", host="a", kind="transient", message="")
    story.tell("worker_lost", worker="w1", host="a", reason="")
    story.tell("note", message="", warning=False)
    assert seen["longtake_task_seconds"] == {"segment,committed": 61.5, "window,committed": 80.0}
    assert seen["longtake_retries_total"] == {"window": 1}
    assert seen["longtake_workers_lost_total"] == {"": 1}
    assert stage_of(segment) == "segment"


def test_looks_tell_where_things_stand_and_add_up_what_passed(meters: Meters, seen: Any) -> None:
    def summary(done: int, frames: int) -> ProgressSummary:
        phase = PhaseProgress(total=9, done=done, running=2, failed=1, frames=frames)
        return ProgressSummary(1.0, {"segment": phase}, {"a": "one/segment/1", "b": "loading refine", "c": "idle"})

    meters.look(summary(1, 93), 100.0)
    meters.look(summary(2, 173), 110.0)
    meters.look(summary(2, 173), 115.0)
    assert seen["longtake_tasks_waiting"] == {"segment": 4}
    assert seen["longtake_tasks_running"] == {"segment": 2}
    assert seen["longtake_frames_total"] == {"segment": 173}
    assert seen["longtake_workers"] == {"busy": 1, "loading": 1, "idle": 1}
    assert seen["longtake_worker_seconds_total"] == {"busy": 15.0, "loading": 15.0, "idle": 15.0}


def test_states_are_read_from_what_the_machine_says_of_its_workers() -> None:
    from pipeline.crew import Worker

    loading = Worker("a", "n", (), "chain", loading_since_s=1.0)
    idle, fresh = Worker("b", "n", (), "refine"), Worker("c", "n", (), None)
    busy = Worker("d", "n", (), "chain", task_id="segment-1")
    said = {worker.worker_id: activity(worker, {}) for worker in (loading, idle, fresh, busy)}
    assert count_states(said) == {"busy": 1, "loading": 1, "idle": 2}


@pytest.mark.parametrize("name", METRICS)
def test_ray_takes_every_metric_with_its_labels(name: str) -> None:
    instrument, described = ray_instrument(name), METRICS[name]
    record = {"counter": "inc", "gauge": "set", "histogram": "observe"}[described.kind]
    getattr(instrument, record)(1.0, dict.fromkeys(described.labels, "x"))
    if described.labels:
        with pytest.raises(ValueError, match=described.labels[0]):
            getattr(instrument, record)(1.0, {})


def test_no_label_grows_with_what_is_rendered() -> None:
    assert {label for metric in METRICS.values() for label in metric.labels} == {"stage", "state", "outcome", "phase"}


# The dashboard


@pytest.fixture
def dashboard(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["manifest", "grafana"]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    return shown


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_the_dashboard_shows_every_metric_and_no_other(dashboard: dict[str, Any]) -> None:
    used = {name for text in expressions(dashboard) for name in re.findall(r"ray_(longtake_\w+)", text)}
    assert {name.removesuffix("_bucket") for name in used} == set(METRICS)
    assert all("_bucket" not in name or METRICS[name.removesuffix("_bucket")].kind == "histogram" for name in used)


def test_the_dashboard_asks_for_labels_that_there_are(dashboard: dict[str, Any]) -> None:
    for text in expressions(dashboard):
        for name in re.findall(r"ray_(longtake_\w+?)(?:_bucket)?[{\[)]", text):
            labels = {*METRICS[name].labels, "le"}
            grouped = {label.strip() for found in re.findall(r"by \(([^)]*)\)", text) for label in found.split(",")}
            filtered = set(re.findall(r"(\w+)=", text))
            assert grouped | filtered <= labels, text
        assert text.count("(") == text.count(")") and text.count("[") == text.count("]")
        counter = re.search(r"ray_(longtake_\w+_total)", text)
        assert not counter or re.search(r"(rate|increase)\(", text), "a counter says something by its change alone"


def test_the_panels_stand_beside_each_other(dashboard: dict[str, Any]) -> None:
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert {"datasource", "gpu_hour_price"} == variables
