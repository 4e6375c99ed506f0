"""The parts of the top floor that decide something without Ray: placement, addresses, recipe, progress, publishing."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.door import Door
from cluster.job import Failed, Greeting, Outcome, RenderJob, Serves, Standing, WorkerSettings
from cluster.orchestrator import Member, Orchestrator, Story, fate_of, lost_worker, with_precision
from cluster.placement import device_for, place_workers
from cluster.places import default_store
from cluster.progress import JsonDisplay, PlainDisplay, Rates, event_text, format_seconds
from cluster.publish import units_so_far
from cluster.recipe import RECIPE_FILE, Recipe, load_recipe, make_plan
from cluster.render import deliver, put_media, useful_workers
from cluster.scratch import make_folder, scratch_folder
from cluster.session import MAX_TEMP_BYTES, usable_cores
from cluster.worker import Worker, worker_class
from model.digest import digest
from pipeline.errors import InputFileError, SettingError, StoreError, first_line
from pipeline.events import Fault, NodeDraining, PhaseProgress, ProgressSummary
from pipeline.facts import CheckpointFacts, Facts, Overrides, RenderFacts
from pipeline.ledger import Ledger
from pipeline.spec import Memory, parse_spec
from pipeline.store import LocalStore
from pipeline.store_meter import STORE_MEASURE, Meter, MeteredStore, tasks_use
from pipeline.tasks import ArtifactFile, CommitRecord, Order


def recipe(**changes: object) -> Recipe:
    shots = [{"id": name, "duration": "12s", "prompt": f"a {name}"} for name in ("star", "circle")]
    spec = parse_spec(json.dumps({"title": "Two", "shots": shots}))
    facts = Facts(checkpoint=CheckpointFacts("/somewhere", "0" * 64, RenderFacts(shift=7.0)))
    return replace(Recipe(spec, facts), **changes)  # type: ignore[arg-type]


# Placement


def test_one_worker_for_each_gpu_and_no_more_than_are_useful() -> None:
    resources = {"CPU": 64.0, "GPU": 8.0}
    place = place_workers(resources, device="auto", workers=None, threads=None, useful=5)
    assert (place.device, place.dtype, place.workers, place.num_gpus) == ("cuda", "bfloat16", 5, 1.0)
    assert place_workers(resources, device="auto", workers=8, threads=None, useful=5).workers == 8


def test_a_cluster_without_workers_is_not_taken_for_one_without_gpus() -> None:
    """An idle one that scales is nothing but its head, which has no processors for workers."""
    idle = {"memory": 1e9, "node:__internal_head__": 1.0}
    with pytest.raises(SettingError, match="no workers yet") as refused:
        place_workers(idle, device="auto", workers=None, threads=None, useful=5)
    assert "--device cuda" in refused.value.remedy
    assert place_workers(idle, device="cpu", workers=None, threads=None, useful=5).device == "cpu", "it was said"
    assert (device_for({"CPU": 8.0}), device_for({"CPU": 8.0, "GPU": 1.0})) == ("cpu", "cuda")


def test_cpu_workers_have_one_thread_each_whatever_the_machine() -> None:
    for cores in (2.0, 64.0):
        place = place_workers({"CPU": cores}, device="auto", workers=None, threads=None, useful=2)
        assert (place.device, place.dtype, place.workers, place.threads) == ("cpu", "float32", 2, 1)
    assert place_workers({"CPU": 8.0}, device="cpu", workers=None, threads=4, useful=9).workers == 2


@pytest.mark.parametrize(("device", "workers", "field"), [("cuda", None, "--device"), ("auto", 9, "--workers")])
def test_more_than_the_cluster_has_is_refused(device: str, workers: int | None, field: str) -> None:
    with pytest.raises(SettingError) as refused:
        place_workers({"CPU": 4.0}, device=device, workers=workers, threads=None, useful=9)
    assert refused.value.field == field


def test_a_plan_with_one_window_keeps_one_worker_busy() -> None:
    assert useful_workers(make_plan(recipe())) > 1
    short = make_plan(recipe(shots=("star",)))
    assert useful_workers(short) == max(short.count("window"), short.count("encode"))


def test_a_film_whose_folder_became_a_file_is_named_and_said_to_be_kept(tmp_path: Path) -> None:
    (tmp_path / "films").touch()
    film, store = SimpleNamespace(files=[None]), SimpleNamespace(url="renders/one")
    with pytest.raises(SettingError, match=r"cannot be written: (Not a directory|File exists)") as caught:
        deliver(film, store, tmp_path / "films" / "one.mp4")  # type: ignore[arg-type]
    assert "kept in renders/one" in str(caught.value)


def test_a_mac_s_gpu_is_none_though_ray_counts_it() -> None:
    mac = {"CPU": 8.0, "GPU": 1.0, "accelerator_type:M2-Pro": 1.0}
    assert device_for(mac) == device_for({**mac, "accelerator_type:M4": 1.0}) == "cpu"
    place = place_workers(mac, device="auto", workers=None, threads=None, useful=2)
    assert (place.device, place.num_gpus, place.workers) == ("cpu", 0.0, 2)
    with pytest.raises(SettingError, match="no GPU"):
        place_workers(mac, device="cuda", workers=None, threads=None, useful=2)
    for name in ("M60", "A100", "MI300X"):
        assert device_for({"CPU": 8.0, "GPU": 1.0, f"accelerator_type:{name}": 1.0}) == "cuda"


def test_a_system_that_cannot_bind_processes_to_cores_has_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert usable_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == os.cpu_count()


# Sessions


@pytest.mark.parametrize(("most_bytes", "pid"), [(107, 1 << 22), (103, 99_998)], ids=["Linux", "macOS"])
def test_sockets_of_a_session_have_short_enough_paths(most_bytes: int, pid: int) -> None:
    folder = "/" + "t" * (MAX_TEMP_BYTES - 1) + f"/lt-{pid}-abcdefgh"
    assert len(f"{folder}/session_2026-11-27_10-50-00_123456_{pid}/sockets/plasma_store") <= most_bytes


@pytest.mark.parametrize("prefix", ["lt-", "lt-work-node-7-"])
def test_folders_of_killed_processes_are_swept(tmp_path: Path, prefix: str) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    kept = {f"{prefix}{os.getpid()}-abc", f"{prefix}notes", f"other-{gone.pid}-abc", f"{prefix}x-{gone.pid}-abc"}
    for name in (*kept, f"{prefix}{gone.pid}-abc"):
        (tmp_path / name).mkdir()
    made = make_folder(tmp_path, prefix)
    assert {path.name for path in tmp_path.iterdir()} == kept | {made.name}


def test_copies_of_films_are_gone_afterwards_and_those_of_a_killed_process_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be as large as the film: where the store is elsewhere, everything is read through them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import os; from cluster.scratch import scratch_folder\nwith scratch_folder('lt-film-'): os._exit(9)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)})
    (left,) = tmp_path.iterdir()
    with scratch_folder("lt-film-") as folder:
        assert not left.exists() and folder.parent == tmp_path
    assert not list(tmp_path.iterdir())


# Recipe


def test_a_recipe_comes_back_from_the_store_with_the_same_plan(tmp_path: Path) -> None:
    store, written = LocalStore(tmp_path), recipe(shots=("star",), strip=True, versions={"longtake": "1"})
    written.put(store)
    read = load_recipe(store)
    assert read == written
    assert make_plan(read) == make_plan(written)


def test_redo_generations_change_what_they_name_and_nothing_else() -> None:
    before, after = make_plan(recipe()), make_plan(recipe(), Overrides(redo={"star/segment/0": 1}))
    kept = before.tasks.keys() & after.tasks.keys()
    assert {task.shot_id for task in before.tasks.values() if task.id in kept} >= {"circle"}
    assert not [
        task for task in after.tasks.values() if task.id in kept and task.kind == "segment" and task.shot_id == "star"
    ]


def test_strip_leaves_the_recipe_out_of_the_film() -> None:
    for strip in (False, True):
        plan = make_plan(recipe(strip=strip))
        assert (plan.tasks[plan.film_task_id].params["recipe"] is None) == strip


def test_the_default_store_is_named_after_the_title_or_the_file() -> None:
    assert default_store(recipe().spec, Path("x/film.yaml")) == "renders/two"
    untitled = parse_spec(json.dumps({"shots": [{"duration": "1s", "prompt": "a"}]}))
    assert default_store(untitled, Path("x/My Film!.yaml")) == "renders/my-film"


def test_films_titled_in_any_script_have_places_of_their_own() -> None:
    def names(title: str) -> tuple[str, str]:
        order = recipe(spec=recipe().spec.model_copy(update={"title": title}))
        return default_store(order.spec, Path("x.yaml")), make_plan(order).output_path

    assert names("\u65e5\u672c \u6620\u753b") == ("renders/\u65e5\u672c-\u6620\u753b", "\u65e5\u672c-\u6620\u753b.mp4")
    assert names("U\u0308ber_uns!") == ("renders/\u00fcber-uns", "\u00fcber-uns.mp4")
    assert names("../..") == ("renders/film", "film.mp4")


# Events and what is shown of them


def test_a_follower_misses_nothing_and_hears_nothing_twice() -> None:
    story = Story()
    story.tell("one")
    events, cursor = story.since(0)
    story.tell("two")
    assert [event["event"] for event in story.since(0)[0]] == ["one", "two"], "an answer that was lost"
    assert [event["event"] for event in events] == ["one"]
    assert [event["event"] for event in story.since(cursor)[0]] == ["two"]
    assert story.since(cursor + 1) == ([], 2)


def test_an_event_told_in_another_thread_while_others_are_read_is_heard_next() -> None:
    later = ["two"]

    class Interrupted(list):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[object]:
            seen = self[:]
            if later:
                story.tell(later.pop())
            return iter(seen)

    story = Story(events=Interrupted())
    story.tell("one")
    first, cursor = story.since(0)
    assert [event["event"] for event in (*first, *story.since(cursor)[0])] == ["one", "two"]


def test_plain_lines_come_when_a_phase_is_done() -> None:
    out = io.StringIO()
    display = PlainDisplay(out)
    summary = ProgressSummary(12.0, {"segment": PhaseProgress(total=4, done=1, running=2)}, {}, 90.0)
    display.progress(summary)
    display.progress(summary)
    last = PhaseProgress(total=4, done=4, frames=360)
    display.progress(replace(summary, elapsed_s=22.0, phases={"segment": last}))
    lines = out.getvalue().splitlines()
    assert lines == [
        "12s: segments 1/4, 2 running; about 1m30s left",
        "22s: segments 4/4, 36.0 frames/s; about 1m30s left",
    ]


def test_rates_are_those_of_the_phase_while_it_runs() -> None:
    rates = Rates()
    found = PhaseProgress(total=9, done=2, frames=200)
    assert rates.of("encode", found, 1.0) is None
    assert rates.of("encode", found, 50.0) is None, "committed before this run, and not running yet"
    assert rates.of("encode", replace(found, running=1), 51.0) is None
    assert rates.of("encode", replace(found, running=1, frames=300), 60.0) == 10.0
    assert rates.of("encode", replace(found, frames=300), 90.0) == 10.0, "idle time does not count"


def test_json_lines_are_events() -> None:
    out = io.StringIO()
    display = JsonDisplay(out)
    display.event({"event": "started"})
    display.progress(ProgressSummary(1.0))
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["started", "progress"]


def test_failures_name_task_host_and_reason() -> None:
    failed = {
        "event": "failed",
        "task": "t",
        "label": "one/segment/3",
        "host": "gpu7",
        "kind": "transient",
        "message": "no",
    }
    assert event_text(failed) == "one/segment/3 on gpu7: transient: no"
    assert event_text({"event": "committed"}) is None


@pytest.mark.parametrize(("seconds", "text"), [(7.6, "8s"), (185, "3m05s"), (7620, "2h07m")])
def test_times_are_short(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_the_film_so_far_ends_at_the_first_gap() -> None:
    plan = make_plan(recipe())
    film = plan.tasks[plan.film_task_id]
    record = CommitRecord("x", 1, 1, (ArtifactFile("unit.mp4", "p", 1, "0"),), {})
    have = {film.inputs[0]: record, film.inputs[2]: record}
    assert units_so_far(film, have) == [(record, film.params["unit_frames"][0])]


# The store's meter


def test_a_metered_store_is_the_store_and_counts_what_its_callers_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = Meter()
    store = MeteredStore(LocalStore(tmp_path), meter)
    file = store.write_attempt("attempts/a/x.bin", b"data")
    assert store.create_if_absent("commits/a.json", b"1") and not store.create_if_absent("commits/a.json", b"2")
    store.put_replace("report.json", b"{}")
    store.copy("report.json", "again.json")
    assert list(store.read_many(["commits/a.json", "none"])) == [("commits/a.json", b"1"), ("none", None)]
    assert list(store.digest_many(["attempts/a/x.bin", "none"])) == [(file.sha256, 4), None]
    assert store.open_local(file, tmp_path).read_bytes() == b"data"
    assert [found.path for found in store.list("commits")] == ["commits/a.json"]
    store.delete("again.json")
    assert store.head("again.json") is None
    assert meter.calls == 13
    assert isinstance(pickle.loads(pickle.dumps(store)), LocalStore)

    def slow(self: LocalStore, path: str) -> bytes:
        time.sleep(0.05)
        raise FileNotFoundError(path)

    before_s = meter.seconds
    monkeypatch.setattr(LocalStore, "read", slow)
    with pytest.raises(FileNotFoundError):
        store.read("x")
    assert 0.05 <= meter.seconds - before_s < 5, "a call that fails counts, too"


def test_the_share_of_store_time_is_that_of_the_tasks_that_measured_it() -> None:
    measured = CommitRecord("a", 1, 1, (), {}, {STORE_MEASURE: 0.5}, seconds=10.0)
    assert tasks_use([measured, CommitRecord("b", 1, 1, (), {}, seconds=90.0)]) == {"seconds": 0.5, "share": 0.05}
    assert tasks_use([]) == {"seconds": 0.0, "share": 0.0}


# Ray's errors


def door_on(*node_ids: str) -> Door:
    """A door to a worker whose processes are on these nodes, without the processes."""
    door = Door.__new__(Door)
    door.node_ids = node_ids
    return door


def test_ray_errors_become_lost_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import exceptions

    monkeypatch.setattr("ray.nodes", lambda: [{"NodeID": "n1", "Alive": True}, {"NodeID": "n2", "Alive": False}])
    member = Member("w1", door_on("n1"))
    assert not lost_worker(0.0, member, exceptions.ActorDiedError()).node_lost
    assert lost_worker(0.0, Member("w1", door_on("n2")), exceptions.ActorDiedError()).node_lost
    assert lost_worker(0.0, Member("w1", door_on("n1", "n2")), exceptions.ActorDiedError()).node_lost, "one of a gang's"
    assert lost_worker(0.0, member, exceptions.NodeDiedError("gone")).node_lost
    assert "memory" in lost_worker(0.0, member, exceptions.OutOfMemoryError("oom")).reason


@pytest.mark.parametrize("is_back", [False, True])
def test_a_worker_whose_connection_broke_is_asked_until_ray_knows_what_became_of_it(
    monkeypatch: pytest.MonkeyPatch, is_back: bool
) -> None:
    from ray import exceptions

    monkeypatch.setattr("cluster.orchestrator.FATE_LOOK_S", 0.0)
    broken, died = exceptions.ActorUnavailableError("socket closed", None), exceptions.ActorDiedError()
    later: list[BaseException | None] = [broken, TimeoutError(), broken, None if is_back else died]

    class Answering(Door):
        async def answers(self) -> None:
            if (now := later.pop(0)) is not None:
                raise now

    door = Answering.__new__(Answering)
    fate = asyncio.run(fate_of(door, broken))
    assert later == [] and fate is (broken if is_back else died)
    assert asyncio.run(fate_of(door, died)) is died, "known at once"


def test_a_preemption_notice_is_passed_on_once_and_a_silent_head_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import exceptions

    answers = [exceptions.RpcError("silent"), {}, {"n1": 30.0}, {"n1": 28.0, "n2": None}]

    def draining() -> dict[str, float | None]:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("cluster.orchestrator.draining_nodes", draining)
    monkeypatch.setattr("cluster.orchestrator.DRAIN_S", 0.0)
    place = place_workers({"CPU": 1.0}, device="cpu", workers=1, threads=None, useful=1)

    async def watch() -> list[tuple[str, float | None]]:
        orchestrator = Orchestrator(RenderJob(str(tmp_path), recipe(), place, settings=None))  # type: ignore[arg-type]
        watching = asyncio.create_task(orchestrator._watch_nodes())
        heard = [await asyncio.wait_for(orchestrator._queue.get(), 30) for _ in range(2)]
        for _ in range(5):
            await asyncio.sleep(0.01)
        assert orchestrator._queue.empty()
        watching.cancel()
        return [(event.node_id, event.deadline_s) for event in heard if isinstance(event, NodeDraining)]

    assert asyncio.run(watch()) == [("n1", 30.0), ("n2", None)]


class StandIn:
    """In the place of a Door: a worker's process on a cluster that is not there."""

    size, node_id, broken = 1, "n1", ""

    def __init__(self, *about: object) -> None:
        pass

    async def dismiss(self) -> None:
        pass

    def end(self) -> None:
        pass


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, kind: type[StandIn]) -> WorkerSettings:
    monkeypatch.setattr("cluster.orchestrator.DRAIN_S", 1e9)
    monkeypatch.setattr("cluster.orchestrator.draining_nodes", dict)
    monkeypatch.setattr("cluster.orchestrator.Door", kind)
    return WorkerSettings(str(folder), "/somewhere", "0", "cpu", "float32", 1, None, 1, "/tmp")


def greeting(torch_version: str) -> tuple[Greeting, ...]:
    return (Greeting("n1", "host", 1, {"torch": torch_version}),)


def test_a_render_that_is_refused_leaves_the_recipe_and_the_report_of_what_was_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_workers({"CPU": 1.0}, device="cpu", workers=1, threads=None, useful=1)
    library = {"torch": "1"}

    class Unreadable(StandIn):
        async def greet(self) -> tuple[Greeting, ...]:
            return greeting(library["torch"])

        async def assume(self, *about: object) -> Failed:
            return Failed(Fault("user", "a checkpoint that cannot be read"))

    settings = stand_in(monkeypatch, tmp_path, Unreadable)
    written, changed = recipe(), recipe(shots=("star",))

    def render(order: Recipe, allow_mixed: bool = False) -> str:
        job = RenderJob(str(tmp_path), order, place, settings, allow_mixed=allow_mixed)
        return asyncio.run(Orchestrator(job).run()).message

    store = LocalStore(tmp_path)
    assert "cannot be read" in render(written)
    before = store.read("report.json")
    library["torch"] = "2"
    assert "another numerics record" in render(changed)
    assert load_recipe(store) == written and store.read("report.json") == before
    assert "cannot be read" in render(changed, allow_mixed=True)
    assert load_recipe(store) == changed and store.read("report.json") != before


@pytest.mark.parametrize("others", [True, False])
@pytest.mark.parametrize("fault", ["broken", "other numerics"])
def test_a_gpu_that_cannot_take_part_ends_a_render_only_if_there_is_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: bool, fault: str
) -> None:
    monkeypatch.setattr("cluster.orchestrator.MOST_PAUSE_S", 0.0)
    place = place_workers({"CPU": 2.0}, device="cpu", workers=2, threads=None, useful=2)
    bad = Failed(Fault("transient", "RuntimeError: CUDA unknown error")) if fault == "broken" else greeting("2")
    said = "CUDA unknown error" if fault == "broken" else "another numerics record"
    many = 1100 if fault == "broken" else 20  # as often as in four days, or an hour and a half
    pinning = Ledger(LocalStore(tmp_path))
    pinning.take_lease()
    pinning.pin_numerics(with_precision(greeting("1")[0].numerics, Memory()))
    pinning.release_lease()
    made: list[StandIn] = []
    at_work = asyncio.Event()

    class OneOfThem(StandIn):
        def __init__(self, *about: object) -> None:
            made.append(self)
            self.good = others and len(made) == 1

        async def greet(self) -> tuple[Greeting, ...] | Failed:
            if others and not self.good:
                await at_work.wait()
            return greeting("1") if self.good else bad

        async def assume(self, *about: object) -> None:
            at_work.set()
            await asyncio.sleep(1e9)

    settings = stand_in(monkeypatch, tmp_path, OneOfThem)
    orchestrator = Orchestrator(RenderJob(str(tmp_path), recipe(), place, settings))

    async def render() -> Outcome:
        running = asyncio.create_task(orchestrator.run())
        while not running.done() and len(made) < many:
            await asyncio.sleep(0.01)
        await orchestrator.stop(75)
        return await running

    outcome = asyncio.run(render())
    code = 1 if fault == "broken" else 2
    assert (outcome.exit_code, len(made) >= many) == ((75, True) if others else (code, False))
    assert (said in outcome.message) is not others


def test_what_people_look_at_harms_no_render(tmp_path: Path) -> None:
    class Unwritable:
        def refresh(self, commits: object) -> None:
            raise OSError(28, "No space left on device")

    async def publish() -> list[str]:
        orchestrator = Orchestrator(RenderJob(str(tmp_path), recipe(), placement=None, settings=None))  # type: ignore[arg-type]
        orchestrator._publisher = Unwritable()  # type: ignore[assignment]
        await orchestrator._publish()
        return [event["message"] for event in orchestrator._story.since(0)[0]]

    assert asyncio.run(publish()) == ["not refreshed: [Errno 28] No space left on device"]


def test_nobody_asks_on_for_the_progress_of_an_order_that_was_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A farm's process carries many renders: what one of them leaves behind lives as long as the farm."""
    monkeypatch.setattr("cluster.orchestrator.POLL_S", 0.0)

    class AtWork(StandIn):
        asked = 0

        async def run(self, order: Order) -> None:
            await asyncio.sleep(1e9)

        async def progress(self) -> Standing:
            AtWork.asked += 1
            return Standing()

    async def abandon() -> int:
        orchestrator = Orchestrator(RenderJob(str(tmp_path), recipe(), placement=None, settings=None))  # type: ignore[arg-type]
        member = Member("w1", AtWork())  # type: ignore[arg-type]
        orchestrator._members["w1"] = member
        task = next(iter(make_plan(recipe()).tasks.values()))
        orchestrator._spawn(orchestrator._dispatch(member, Order(task, 1, 1, {}, "attempts/a/0001-1")))
        async with asyncio.timeout(30):
            while not AtWork.asked:
                await asyncio.sleep(0.0)
            await orchestrator._close()
        # How many turns of the loop a cancelled task takes to its end is Python's affair.
        for _ in range(10):
            await asyncio.sleep(0.0)
        asked = AtWork.asked
        for _ in range(10):
            await asyncio.sleep(0.0)
        assert AtWork.asked == asked
        return len(asyncio.all_tasks())

    assert asyncio.run(abandon()) == 1


def test_ray_restarts_and_repeats_nothing_of_a_render_by_itself() -> None:
    options = worker_class()._default_options
    assert (options["max_restarts"], options["max_task_retries"]) == (0, 0)


def test_a_file_that_changes_between_the_plan_and_its_copy_is_not_taken(tmp_path: Path) -> None:
    store, picture = LocalStore(tmp_path / "store"), tmp_path / "start.png"
    picture.write_bytes(b"planned")
    name = f"media/{hashlib.sha256(b'planned').hexdigest()}.png"
    plan = replace(make_plan(recipe()), media={name: str(picture)})
    picture.write_bytes(b"changed")
    with pytest.raises(InputFileError, match="changed while it was read"):
        put_media(plan, store)
    assert store.head(name) is None
    picture.write_bytes(b"planned")
    put_media(plan, store)
    assert store.read(name) == b"planned"


def test_a_worker_whose_machine_has_another_checkpoint_takes_no_role(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.worker._ignore_termination", lambda: None)
    planned = digest(tiny_checkpoint)
    settings = WorkerSettings(str(tmp_path), str(tiny_checkpoint), planned, "cpu", "float32", 1, None, 1, str(tmp_path))
    worker = Worker(settings)
    logging.getLogger().removeHandler(worker._log)
    logging.captureWarnings(False)
    assert worker.assume("media", None, Memory()) == "media"
    answer = worker.assume("media", None, Memory(), Serves(str(tmp_path), str(tiny_checkpoint), "0" * 64))
    assert isinstance(answer, Failed) and answer.fault.kind == "user"
    assert "another one than was planned with" in answer.fault.message and str(tiny_checkpoint) in answer.fault.message


def test_a_stop_does_not_wait_for_a_store_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.orchestrator.STORE_LIMIT_S", 0.2)
    place = place_workers({"CPU": 1.0}, device="cpu", workers=1, threads=None, useful=1)
    told: list[str] = []

    def silent(self: LocalStore, path: str) -> None:
        raise StoreError("no answer")

    async def run_and_stop() -> Outcome:
        orchestrator = Orchestrator(RenderJob(str(tmp_path), recipe(), place, settings=None))  # type: ignore[arg-type]
        running = asyncio.create_task(orchestrator.run())
        while not told:
            told.extend(event["message"] for event in orchestrator._story.events if event["event"] == "waiting")
            await asyncio.sleep(0.01)
        await orchestrator.stop(130)
        outcome = await asyncio.wait_for(running, 60)
        await asyncio.to_thread(orchestrator._io.shutdown)  # Nothing of it goes on in its thread.
        return outcome

    monkeypatch.setattr(LocalStore, "list", silent)
    outcome = asyncio.run(run_and_stop())
    assert outcome.exit_code == 130 and "the same command continues" in outcome.message
    assert "no answer" in told[0]


def test_a_recipe_that_cannot_be_read_is_told_with_what_to_do(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    recipe().put(store)
    whole = json.loads(store.read(RECIPE_FILE))
    later = {**whole, "checkpoint": {**whole["checkpoint"], "render": {**whole["checkpoint"]["render"], "later": 1}}}
    for damaged in (b'{"spec": ', b"[1]", json.dumps(later).encode(), json.dumps({**whole, "spec": {"a": 1}}).encode()):
        store.put_replace(RECIPE_FILE, damaged)
        with pytest.raises(SettingError, match="damaged, or another version") as raised:
            load_recipe(store)
        assert raised.value.value == store.url and "longtake render" in raised.value.remedy


def test_what_kernels_and_attention_are_computed_with_is_said(tmp_path: Path) -> None:
    place = place_workers({"CPU": 1.0}, device="cpu", workers=1, threads=None, useful=1)
    orchestrator = Orchestrator(RenderJob(str(tmp_path), recipe(), place, settings=None))  # type: ignore[arg-type]
    orchestrator._ledger.take_lease()
    numerics = {"device": "cuda H100", "attention_backend": "triton", "ffmpeg": "9.0.2"}
    numerics |= {"cuda": {"dense_attention": "cudnn"}}
    for _ in range(2):
        orchestrator._pin(numerics)
    lines = [text for event in orchestrator._story.events if (text := event_text(event))]
    kernels = "attention and other kernels: triton; dense attention: cudnn"
    assert lines == [f"computing on cuda H100; {kernels}; ffmpeg 9.0.2"]


def test_an_error_is_told_in_one_line() -> None:
    assert first_line(ValueError("a\nb")) == "a"
    assert first_line(ValueError()) == "ValueError"
