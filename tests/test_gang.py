"""A gang without Ray: its members as plain processes, and what the door to it makes of their answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ray import exceptions as ray_errors
from safetensors.torch import load_file

from actors import make_actor
from actors.base import ActorContext
from actors.gang import MeetingPlace, join_gang
from actors.numerics import describe_numerics
from cluster import door
from cluster.door import answers_of
from cluster.job import Failed
from cluster.placement import place_workers
from cluster.preflight import check_gang
from cluster.render import count_chains
from pipeline.errors import Interrupted, SettingError
from pipeline.events import Fault
from pipeline.media import find_ffmpeg
from pipeline.store import open_store
from pipeline.tasks import ArtifactFile, Order, Produced
from tests.rendered import recipe_of
from tests.test_actors import SPEC, Studio
from tests.tiny_checkpoint import make_checkpoint

WORST_ERROR = 1e-4
Played = tuple[Studio, Produced, dict[int, tuple[Any, ...]]]
STOP_AFTER = 3


@pytest.fixture(scope="module")
def two_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("two-heads"), heads=2)


class Member:
    """One process of a gang, with what it was told by its actor."""

    def __init__(self, rank: int, studio: dict[str, Any], meeting: Any) -> None:
        torch.set_num_threads(1)
        place = MeetingPlace("127.0.0.1") if rank == 0 else None
        if place is not None:
            meeting.put(place.address)
        self.gang = join_gang(rank, 2, place or meeting.get(), "cpu")
        self.studio, self.saved, self.reported = studio, list[tuple[ArtifactFile, int]](), list[int]()

    def run(self, order: Order, *, stop_after: int = 0) -> Produced | None:
        """Compute a segment; None if it was interrupted. Only the first member hears of a stop."""
        stop = Event()

        def report(steps: int, frames: int) -> None:
            self.reported.append(steps)
            if steps == stop_after and self.gang.leads:
                stop.set()

        values = self.studio | {"store": open_store(self.studio["store"])}
        saved = lambda file, steps: self.saved.append((file, steps))  # noqa: E731
        context = ActorContext(
            **values, role="chain", device="cpu", dtype=torch.float32, ffmpeg=find_ffmpeg(), encoder_threads=1,
            gang=self.gang, stop=stop, report=report, saved=saved,
        )  # fmt: skip
        actor = make_actor("chain")
        actor.setup(context)
        try:
            return actor.run(order)
        except Interrupted:
            return None


def member(rank: int, studio: dict[str, Any], orders: list[Order], meeting: Any, told: Any) -> None:
    """Whole, stopped, and gone on with; what came of it goes back to the test."""
    this = Member(rank, studio, meeting)
    whole = this.run(orders[0])
    stopped = this.run(orders[1], stop_after=STOP_AFTER)
    # The partial's name is known to the first member alone, as it would come with an order.
    shared: list[Any] = [this.saved]
    dist.broadcast_object_list(shared, src=0)
    ((partial, steps),) = shared[0]
    reported = len(this.reported)
    resumed = this.run(Order(**(vars(orders[2]) | {"partial": partial})))
    told.put((rank, whole, stopped, steps, resumed, this.reported[reported:]))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, two_heads: Path) -> Played:
    """A continuation segment by one actor, and by a gang of two: what each member said."""
    studio = Studio(tmp_path_factory.mktemp("gang"), two_heads, SPEC)
    torch.set_num_threads(1)
    studio.run_all("text", "segment")
    task = studio.of("segment")[1]
    told = {
        "store": studio.store.url, "checkpoint_path": two_heads, "weights": studio.plan.weights.get("chain"),
        "scratch_path": studio.scratch,
    }  # fmt: skip
    start = mp.get_context("spawn")
    meeting, answers = start.SimpleQueue(), start.Queue()
    orders = [studio.order(task) for _ in range(3)]
    mp.spawn(member, (told, orders, meeting, answers), nprocs=2)
    return studio, studio.done[task.id], {answer[0]: answer[1:] for answer in (answers.get(), answers.get())}


def test_a_segment_of_a_gang_is_that_of_one_actor(played: Played) -> None:
    studio, alone, members = played
    one = load_file(studio.store.open_local(alone.files[0], studio.scratch))
    two = load_file(studio.store.open_local(members[0][0].files[0], studio.scratch))
    assert one.keys() == two.keys()
    assert one["latents"].std() > 0.1
    assert (one["latents"] - two["latents"]).abs().max() < WORST_ERROR


def test_the_first_member_alone_writes_and_reports(played: Played) -> None:
    _, _, members = played
    assert members[1][0].files == members[1][3].files == ()
    assert len(members[0][3].files) == 1
    assert members[0][4][0] == STOP_AFTER + 1
    assert members[1][4] == []


def test_a_gang_stops_at_one_step_and_goes_on_bit_for_bit(played: Played) -> None:
    _, _, members = played
    for whole, stopped, steps, resumed, _ in members.values():
        assert stopped is None, "interrupted, although only the first member was asked to stop"
        assert steps == STOP_AFTER
        assert [file.sha256 for file in resumed.files] == [file.sha256 for file in whole.files]


# The door


async def _soon(value: Any, after_s: float = 0.0) -> Any:
    await asyncio.sleep(after_s)
    if isinstance(value, Exception):
        raise value
    return value


def _answers(*calls: Awaitable[Any]) -> tuple[Any, bool]:
    async def ask() -> tuple[Any, bool]:
        return await asyncio.wait_for(answers_of([asyncio.ensure_future(call) for call in calls]), 60)

    return asyncio.run(ask())


FAILED, ALIKE = Failed(Fault("transient", "its own")), Failed(Fault("interrupted", "as all"))


def test_a_gang_answers_when_all_members_have() -> None:
    assert _answers(_soon("a", 0.05), _soon("b")) == (["a", "b"], False)


def test_members_that_fail_alike_are_one_failure_the_first_members() -> None:
    assert _answers(_soon(ALIKE, 0.05), _soon(FAILED)) == (ALIKE, False)
    assert _answers(_soon("a", 0.05), _soon(FAILED)) == (FAILED, False)


def test_a_member_that_fails_alone_breaks_the_gang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "GANG_GRACE_S", 0.05)
    assert _answers(_soon("a", 600), _soon(FAILED)) == (FAILED, True)


def test_a_lost_member_is_a_loss_even_if_the_others_fail_first() -> None:
    with pytest.raises(ray_errors.ActorDiedError):
        _answers(_soon(FAILED), _soon(ray_errors.ActorDiedError(), 0.05))
    with pytest.raises(ray_errors.ActorDiedError):
        _answers(_soon("a", 600), _soon(ray_errors.ActorDiedError(), 0.05))


# Placement


def test_each_chain_gets_a_gang_and_the_rest_works_alone() -> None:
    resources = {"CPU": 64.0, "GPU": 8.0}
    place = place_workers(resources, device="auto", workers=None, threads=None, useful=9, gang_size=2, chains=3)
    assert place.crews == [2, 2, 2, 1, 1]
    assert "chain" in place.roles_of(2)
    assert set(place.roles_of(2)) - set(place.roles_of(1)) == {"chain"}, "a segment's bytes depend on the gang"
    place = place_workers(resources, device="auto", workers=None, threads=None, useful=1, gang_size=4, chains=1)
    assert place.crews == [4, 1]


def test_without_a_gang_every_worker_takes_every_role() -> None:
    place = place_workers({"CPU": 2.0}, device="auto", workers=None, threads=None, useful=5)
    assert place.crews == [1, 1]
    assert "chain" in place.roles_of(1)


def test_a_gang_without_room_or_with_heads_left_over_is_refused(two_heads: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError) as refused:
        place_workers({"CPU": 2.0}, device="auto", workers=None, threads=None, useful=5, gang_size=4)
    assert refused.value.field == "--gang"
    check_gang(two_heads, 2)
    with pytest.raises(SettingError, match="2 attention heads") as refused:
        check_gang(two_heads, 3)
    assert "1, 2 are possible" in str(refused.value)
    converted = tmp_path / "roles/chain/dit"
    converted.mkdir(parents=True)
    (converted / "config.json").write_text(json.dumps({"num_heads": 4}))
    with pytest.raises(SettingError, match="4 attention heads"):
        check_gang(tmp_path, 8)


def test_shots_are_chains_that_run_side_by_side() -> None:
    from cluster.recipe import make_plan

    alone, chained = {"id": "a", "duration": "20s"}, {"id": "b", "duration": "20s", "continue": "previous"}
    assert count_chains(make_plan(recipe_of(alone, chained))) == 1
    assert count_chains(make_plan(recipe_of(alone, {"id": "b", "duration": "20s"}))) == 2


def test_the_numerics_record_holds_the_gang() -> None:
    assert describe_numerics("cpu", "float32", 1, None, 1, gang_size=4)["gang_size"] == 4
