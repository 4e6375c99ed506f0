"""`longtake render`: plan, check, start the orchestrator, follow it, put the film in its place.

The driver holds no state of the render: it may be killed at any moment, and the same command goes on from
what is committed.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType

from cluster.ask import Taken, ask, new_request, running
from cluster.job import News, Outcome, RenderJob, WorkerSettings
from cluster.placement import place_workers
from cluster.places import open_film_store, open_ledger
from cluster.preflight import check_before_rendering
from cluster.probe import load_storyboard, probe_facts
from cluster.progress import Display, format_seconds, make_display
from cluster.recipe import Recipe, make_plan
from cluster.scratch import scratch_folder
from pipeline.changes import left_to_do
from pipeline.errors import InputFileError, Interrupted, OrchestratorLost, SettingError, TransientError, first_line
from pipeline.journal import RedoRequested
from pipeline.lease import refuse_if_live, this_process
from pipeline.ledger import LedgerState
from pipeline.media_encode import ENCODER_THREADS
from pipeline.plan import Plan, Until
from pipeline.redo import Redo, choose_redo, with_redo
from pipeline.store import Store, flush_to_disk
from pipeline.tasks import CommitRecord, Task

FOLLOW_S = 0.5
ANSWER_LIMIT_S = 30.0
SILENCE_LIMIT_S = 600.0
"""A machine short of memory or processors may let an orchestrator wait for minutes."""
ORPHAN_WAIT_S = 5.0
STOP_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


@dataclass(frozen=True)
class RenderRequest:
    """The command line of `longtake render`."""

    storyboard: Path
    store: str | None = None
    until: Until = "film"
    shots: list[str] | None = None
    fresh: bool = False
    strip: bool = False
    allow_mixed: bool = False
    workers: int | None = None
    threads: int | None = None
    gang: int = 1
    """How many processes compute each segment together."""
    device: str = "auto"
    address: str | None = None
    insecure: bool = False
    as_json: bool = False
    redo: tuple[str, ...] = ()
    """Stretches of the film to make again, as written."""
    refine_only: bool = False
    takes: int = 1
    deadline_s: float | None = None
    checkpoint: str | None = None
    """In the place of the storyboard's."""
    memory: Mapping[str, str] = field(default_factory=dict)
    """Fields of the storyboard's `memory` to put in the place of its own."""
    gpu_type: str | None = None
    """Of the workers that the plan's times are for; None: this machine's."""
    plan_only: bool = False
    """Nothing is going to be rendered, so the official checkpoint need not be here."""


@dataclass
class Stop:
    """Signals that asked for a stop. Until `deferred` is set, one ends the command at once by Interrupted."""

    codes: list[int] = field(default_factory=list)
    deferred: bool = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.codes.append(STOP_CODES[signal.Signals(number)])
        if not self.deferred:
            raise Interrupted("stopped before rendering began", self.codes[-1])

    def install(self) -> None:
        """Ray puts a handler of its own over ours when it starts, so this is called again afterwards."""
        for number in STOP_CODES:
            signal.signal(number, self)


@dataclass(frozen=True)
class Prepared:
    """A render that has been planned: what `longtake plan` prints and `longtake render` runs."""

    recipe: Recipe
    store: Store
    plan: Plan
    state: LedgerState
    """What the store's ledger says; empty for a fresh start."""
    redo: Redo | None = None
    before_redo: Plan | None = None
    """The plan without the redo."""

    @property
    def left(self) -> list[Task]:
        """Tasks that will be run."""
        return left_to_do(self.plan.tasks, self.state)


def prepare(request: RenderRequest) -> Prepared:
    """Read the storyboard, probe what it names, plan under what the store's ledger says. Runs nothing."""
    spec = load_storyboard(request.storyboard)
    if request.checkpoint is not None:
        spec = spec.model_copy(update={"checkpoint": request.checkpoint})
    spec = spec.model_copy(update={"memory": spec.memory.model_copy(update=dict(request.memory))})
    device = guess_device(request.device)
    store = open_film_store(spec, request.storyboard, request.store)
    recipe = Recipe(
        spec,
        probe_facts(spec, device=device, gpu_type=request.gpu_type, absent_ok=request.plan_only),
        until=request.until,
        shots=None if request.shots is None else tuple(request.shots),
        strip=request.strip,
        takes=request.takes,
        versions=software_versions(),
    )
    state = LedgerState() if request.fresh else open_ledger(store).load()
    plan = make_plan(recipe, state.overrides)
    if not request.redo:
        if request.refine_only:
            raise SettingError("goes with --redo", field="--refine-only")
        return Prepared(recipe, store, plan, state)
    if request.fresh:
        raise SettingError("starts over, so there is nothing to make again", field="--fresh")
    redo = choose_redo(plan, request.redo, refine_only=request.refine_only)
    again = make_plan(recipe, with_redo(state.overrides, redo.scopes))
    return Prepared(recipe, store, again, state, redo, plan)


def render(request: RenderRequest) -> int:
    """Render; returns the exit code. Raises LongtakeError for what the command line reports in one line, of that
    OrchestratorLost if the same again goes on.
    """
    started_s = time.monotonic()
    with stopping() as stop:
        prepared = prepare(request)
        target = Path(prepared.plan.output_path)
        if prepared.redo is not None and running(prepared.store) is not None:
            return _redo_in_running(prepared)
        _refuse_second(prepared.store)
        check_before_rendering(prepared.recipe, prepared.plan, prepared.store, prepared.left, request.gang)
        if prepared.redo is not None:
            ask_redo(prepared)
        display = make_display(as_json=request.as_json)
        try:
            outcome = _run(request, prepared, display, stop)
        finally:
            display.close()
        return _conclude(outcome, prepared.store, target, display, request, time.monotonic() - started_s)


def ask_redo(prepared: Prepared) -> Taken:
    """Have the redo journalled, by the render that runs or here, before anything is made again."""
    assert prepared.redo is not None
    reason = "asked for: " + ", ".join(prepared.redo.scopes)
    entries = [RedoRequested(scope, 1, reason, asked=True) for scope in prepared.redo.scopes]
    return ask(prepared.store, new_request("redo", entries), prepared.plan)


def _redo_in_running(prepared: Prepared) -> int:
    """A render that runs takes the redo in; this command does not wait for its film."""
    taken = ask_redo(prepared)
    if taken.by == "here":
        raise TransientError("the render that ran has just ended; the redo is noted, `longtake render` goes on with it")
    print("the render that runs makes it again; `longtake status` follows it", file=sys.stderr)
    return 0


def software_versions() -> dict[str, str]:
    """What the film's metadata names besides the storyboard."""
    found = {}
    for name in ("longtake", "torch"):
        # An uninstalled checkout has no version of its own.
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def guess_device(choice: str) -> str:
    """What the plan's estimate assumes before the cluster is known; Ray's resources decide in the end."""
    if choice != "auto":
        return choice
    return "cuda" if Path("/dev/nvidia0").exists() else "cpu"


def _refuse_second(store: Store) -> None:
    """Raise SettingError if a render on this machine writes here.

    Waits a little first: an orchestrator whose driver was killed ends within seconds. Elsewhere only a
    holder's heartbeat tells; taking the lease watches that.
    """
    until_s = time.monotonic() + ORPHAN_WAIT_S
    while (holder := open_ledger(store).holder()) is not None:
        try:
            refuse_if_live(store, holder, this_process(), watch_s=0.0, sleep=time.sleep)
            return
        except SettingError:
            if time.monotonic() >= until_s:
                raise
            time.sleep(0.2)


@contextmanager
def stopping() -> Iterator[Stop]:
    """SIGTERM and Ctrl-C stop in order: running denoising saves its state first."""
    before = {number: signal.getsignal(number) for number in STOP_CODES}
    stop = Stop()
    stop.install()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(request: RenderRequest, prepared: Prepared, display: Display, stop: Stop) -> Outcome:
    """Start a session and an orchestrator in it, and follow that to its end."""
    from cluster.session import open_session, usable_cores

    recipe, store, plan = prepared.recipe, prepared.store, prepared.plan
    put_media(plan, store)
    if request.address is None and os.environ.get("RAY_ADDRESS"):
        display.line("rendering on this machine; --address joins a cluster, RAY_ADDRESS alone does not")
    cpus = max(usable_cores(), (request.workers or request.gang) * (request.threads or 1))
    # Who names a number of GPU workers means them: a cluster that is starting gets the time for it.
    gpus = (request.workers or 0) if request.device == "cuda" else 0
    with open_session(request.address, cpus=cpus, gpus=gpus, insecure=request.insecure) as session:
        placement = place_workers(
            session.resources,
            device=request.device,
            workers=request.workers,
            threads=request.threads,
            useful=useful_workers(plan),
            gang_size=request.gang,
            chains=count_chains(plan),
        )
        settings = WorkerSettings(
            store_url=store.url,
            checkpoint_path=recipe.facts.checkpoint.path,
            checkpoint_digest=recipe.facts.checkpoint.digest,
            device=placement.device,
            dtype=placement.dtype,
            threads=placement.threads,
            ffmpeg=os.environ.get("LONGTAKE_FFMPEG"),
            encoder_threads=ENCODER_THREADS,
            scratch_root=session.scratch_path,
            gang_size=placement.gang_size,
        )
        job = RenderJob(
            store.url, recipe, placement, settings, request.fresh, request.allow_mixed, request.deadline_s
        )
        stop.deferred = True
        stop.install()
        return _follow(job, display, stop)


def _follow(job: RenderJob, display: Display, stop: Stop) -> Outcome:
    """Show what the orchestrator tells until it is over; pass on requests to stop."""
    import ray

    from cluster.orchestrator import orchestrator_class

    orchestrator = orchestrator_class().remote(job)
    orchestrator.run.remote()
    cursor, passed_on, heard_s = 0, 0, time.monotonic()
    while True:
        for code in stop.codes[passed_on:]:
            orchestrator.stop.remote(code)
            display.line("stopping: running work is being saved; once more does not wait for it")
            passed_on += 1
        try:
            news: News = ray.get(orchestrator.follow.remote(cursor, FOLLOW_S), timeout=ANSWER_LIMIT_S)
        except ray.exceptions.RayError as error:
            is_slow = isinstance(error, ray.exceptions.GetTimeoutError)
            if is_slow and time.monotonic() - heard_s < SILENCE_LIMIT_S:
                continue
            return _lost(error, stop)
        cursor, heard_s = news.cursor, time.monotonic()
        for event in news.events:
            display.event(event)
        if news.summary is not None:
            display.progress(news.summary)
        if news.outcome is not None:
            # At once: a call to a store that does not answer may still hold its process.
            ray.kill(orchestrator)
            return news.outcome


def _lost(error: Exception, stop: Stop) -> Outcome:
    """The orchestrator's process is gone. After a request to stop that is how some systems carry it out; otherwise
    raises OrchestratorLost.
    """
    if stop.codes:
        return Outcome(stop.codes[-1], "stopped; the same command continues")
    raise OrchestratorLost(f"the orchestrator is gone ({first_line(error)}); the same command continues") from error


def put_media(plan: Plan, store: Store) -> None:
    """Copy the user's files that the plan uses into the store, under names made of their content."""
    for name, path in plan.media.items():
        if store.head(name) is None:
            written = store.write_attempt(name, Path(path))
            if written.sha256 != Path(name).stem:
                store.delete(name)
                remedy = "Run the same command again."
                raise InputFileError("changed while it was read", field=path, remedy=remedy)


def useful_workers(plan: Plan) -> int:
    """How many workers the plan can keep busy at its widest."""
    kinds = [task.kind for task in plan.tasks.values()]
    return max(1, kinds.count("window"), kinds.count("encode"))


def count_chains(plan: Plan) -> int:
    """How many chains the plan can run side by side: those that wait for no other segment."""
    segments = {task.id for task in plan.tasks.values() if task.kind == "segment"}
    return max(1, sum(segments.isdisjoint(plan.tasks[task_id].inputs) for task_id in segments))


def _conclude(
    outcome: Outcome,
    store: Store,
    target: Path,
    display: Display,
    request: RenderRequest,
    elapsed_s: float,
) -> int:
    """Put the film in its place and say how it went; the exit code."""
    if outcome.exit_code != 0 or outcome.film is None:
        print(f"longtake: {outcome.message}", file=sys.stderr)
        return outcome.exit_code
    path = deliver(outcome.film, store, target)
    if request.as_json:
        now_s, seconds = round(time.time(), 3), round(elapsed_s, 3)
        display.event({"event": "film", "time": now_s, "path": path, "seconds": seconds})
    else:
        print(f"done in {format_seconds(elapsed_s)}", file=sys.stderr)
        print(path)
    return 0


def deliver(film: CommitRecord, store: Store, target: Path) -> str:
    """Copy the verified film to `target`, all or nothing; returns where it is."""
    artifact = film.files[0]
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder("lt-film-") as scratch:
            shutil.copyfile(store.open_local(artifact, scratch), partial)
        with partial.open("rb+") as file:
            flush_to_disk(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        remedy = f"The film is kept in {store.url}; make room or name another place and run the same command."
        raise SettingError(
            f"cannot be written: {error.strerror}", field="output.path", value=str(target), remedy=remedy
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()
    return str(target)
