"""Schedules: storyboards that are rendered again and again, and what each of them has to do now.

A schedule is a log: entries numbered from 1, each created only if absent, never changed. What it is follows
from folding them; what it does next is a pure function of that and the time. Whoever wants to act appends
first: of two that see the same tick one gets the number, the other reads on and finds the tick taken. A
claimed run is submitted under a name made of schedule and tick, and the submission is repeated until the log
says that it was made, so a crash at any point neither loses a run nor makes two.

One run of a schedule at a time. A tick that comes while one is there is skipped, queued behind it, or replaces
it. Ticks that nobody looked at (nothing ran) are made up for by one run, for the last of them.

A film whose name has variables is kept: a later run that would give its film the same name (two runs on a day, where
the name has the date) gets the next number behind it. A name without variables is that of the latest film.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from pipeline.cron import Cron
from pipeline.errors import SettingError, SpecError
from pipeline.rows import Value
from pipeline.spec import Storyboard, name_of, parse_spec
from pipeline.tasks import NAME_PATTERN, canonical_json

Overlap = Literal["skip", "queue", "replace"]
LONGEST_ID = 40
MOST_ROWS = 10_000
_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_RESERVED = ("date", "time", "counter", "schedule")
_FILES = (("shots", "image"), ("shots", "video"), ("output", "soundtrack"), ("loras", "file"))
"""Where a storyboard names files that are read."""


@dataclass(frozen=True)
class Definition:
    """What a person ordered. `storyboard` is the template as data; `rows`: one for each run, none for no table."""

    id: str
    cron: Cron
    storyboard: Mapping[str, Any]
    renders: str
    """Folder or address; a run's store is a folder of its own there."""
    overlap: Overlap = "skip"
    rows: tuple[Mapping[str, Value], ...] = ()
    folder: str = ""
    """Where files that the storyboard names without a leading slash are looked up: whoever renders is elsewhere."""


@dataclass(frozen=True)
class Added:
    """The schedule begins, or begins again after it was removed."""

    at_s: float
    definition: Definition


@dataclass(frozen=True)
class Claimed:
    """A run will be made. `counter`: the how-manieth, from 1. `by_hand`: not for a tick."""

    at_s: float
    tick_s: float
    counter: int
    by_hand: bool = False


@dataclass(frozen=True)
class Skipped:
    """A tick passed without a run, because one was there."""

    at_s: float
    tick_s: float


@dataclass(frozen=True)
class Submitted:
    """The run is with whoever renders. `run` is the number of the entry that claimed it, here and below."""

    at_s: float
    run: int


@dataclass(frozen=True)
class CancelAsked:
    """Whoever renders was told to stop this run, to make room for the next."""

    at_s: float
    run: int


@dataclass(frozen=True)
class Ended:
    """The run is over, with the exit code of `longtake render`."""

    at_s: float
    run: int
    exit_code: int
    message: str


@dataclass(frozen=True)
class Removed:
    """No more ticks. A run that is there goes on."""

    at_s: float


Entry = Added | Claimed | Skipped | Submitted | CancelAsked | Ended | Removed
_KINDS: Mapping[str, type[Any]] = {
    kind.__name__.lower(): kind for kind in (Added, Claimed, Skipped, Submitted, CancelAsked, Ended, Removed)
}


@dataclass(frozen=True)
class Run:
    """One run and how far it is. `number`: of the entry that claimed it."""

    number: int
    definition: Definition
    claim: Claimed
    submitted: bool = False
    cancel_asked: bool = False
    ended: Ended | None = None
    film: str = ""
    """What its film would be called, if that differs from run to run."""
    same_name: int = 1
    """The number of its film among those of that name."""

    @property
    def id(self) -> str:
        """Its name everywhere: the store's folder, the submission."""
        moment = datetime.fromtimestamp(self.claim.tick_s, UTC).strftime("%Y%m%dt%H%M%Sz")
        return f"{self.definition.id}-{moment}-{self.claim.counter}"

    @property
    def store_url(self) -> str:
        """Where it keeps its state."""
        return f"{self.definition.renders.rstrip('/')}/{self.id}"

    def storyboard(self) -> Storyboard:
        """The film of this run. Raises SpecError."""
        spec = expand(self.definition, self.claim)
        if self.same_name == 1:
            return spec
        name, suffix = posixpath.splitext(spec.output.path or f"{name_of(spec.title)}.{spec.output.container}")
        path = f"{name}-{self.same_name}{suffix}"
        return spec.model_copy(update={"output": spec.output.model_copy(update={"path": path})})


@dataclass(frozen=True)
class State:
    """A schedule as its log has it."""

    definition: Definition | None = None
    """None: removed."""
    since_s: float = 0.0
    """Ticks up to here have been seen to."""
    counter: int = 0
    runs: Mapping[int, Run] = field(default_factory=dict)
    entries: int = 0

    @property
    def open_runs(self) -> list[Run]:
        """Claimed and not over, oldest first."""
        return [run for run in self.runs.values() if run.ended is None]

    @property
    def exhausted(self) -> bool:
        """Its table has no row left."""
        return bool(self.definition and self.definition.rows and self.counter >= len(self.definition.rows))


@dataclass(frozen=True)
class Submit:
    """Have it rendered; nothing happens if it is being rendered already. Then append `Submitted`."""

    run: Run


@dataclass(frozen=True)
class Cancel:
    """Stop it; what is committed is kept. Then append `CancelAsked`, or `Ended` for one that nobody has submitted."""

    run: Run


Step = Claimed | Skipped | Submit | Cancel


def apply_entry(state: State, entry: Entry) -> State:
    """The schedule after one more entry."""
    state = replace(state, entries=state.entries + 1)
    match entry:
        case Added(at_s, definition):
            return replace(state, definition=definition, since_s=at_s, counter=0)
        case Removed():
            return replace(state, definition=None)
        case Skipped(_, tick_s):
            return replace(state, since_s=max(state.since_s, tick_s))
        case Claimed(_, tick_s, counter, by_hand):
            assert state.definition is not None
            since_s = state.since_s if by_hand else max(state.since_s, tick_s)
            film = _film_name(state.definition, entry)
            run = Run(state.entries, state.definition, entry, film=film, same_name=_next_of_name(state, film))
            runs = {**state.runs, run.number: run}
            return replace(state, since_s=since_s, counter=counter, runs=runs)
        case Submitted(_, run):
            return _change(state, run, submitted=True)
        case CancelAsked(_, run):
            return _change(state, run, cancel_asked=True)
        case Ended(_, run):
            return _leave_film(_change(state, run, ended=entry), state.runs[run], entry.exit_code)


def _film_name(definition: Definition, claim: Claimed) -> str:
    """What the film of a run is called, without what tells two of one name apart; "" if all runs have one name."""
    board = definition.storyboard
    path = (board.get("output") or {}).get("path")
    template = str(board.get("title", "") if path is None else path)
    if set(_VARIABLE.findall(template)) <= {"schedule"}:
        return ""
    name = str(_fill(template, values_of(definition, claim)))
    return name_of(name) if path is None else name


def _next_of_name(state: State, film: str) -> int:
    """1, or the number after those of the runs that made a film of this name, or still may."""
    assert state.definition is not None
    replaces = state.definition.overlap == "replace"
    made = [
        run.same_name
        for run in state.runs.values()
        if film and run.film == film and (not replaces if run.ended is None else run.ended.exit_code == 0)
    ]
    return max(made, default=0) + 1


def _leave_film(state: State, run: Run, exit_code: int) -> State:
    """A run that was to be replaced has made its film after all: those that follow get the numbers behind it."""
    if not run.film or exit_code != 0:
        return state
    return replace(state, runs={
        number: replace(other, same_name=max(other.same_name, run.same_name + 1))
        if other.film == run.film and other.ended is None and not other.submitted and number > run.number
        else other
        for number, other in state.runs.items()
    })


def _change(state: State, run: int, **changes: Any) -> State:
    return replace(state, runs={**state.runs, run: replace(state.runs[run], **changes)})


def next_step(state: State, now_s: float) -> Step | None:
    """The one thing to do now. An entry is to be appended as it is; None: nothing, until time or a run goes on."""
    definition, open_runs = state.definition, state.open_runs
    tick_s = None
    if definition is not None and not state.exhausted:
        tick_s = definition.cron.last(state.since_s, now_s)
    if definition is not None and tick_s is not None:
        if open_runs and definition.overlap == "skip":
            return Skipped(now_s, tick_s)
        return Claimed(now_s, tick_s, state.counter + 1)
    if not open_runs:
        return None
    first, last = open_runs[0], open_runs[-1]
    if first is not last and last.definition.overlap == "replace":
        return None if first.cancel_asked else Cancel(first)
    return None if first.submitted else Submit(first)


def claim_by_hand(state: State, now_s: float) -> Claimed:
    """A run for now. Raises SettingError if there cannot be one."""
    if state.definition is None:
        raise SettingError("was removed from the schedule", field="schedule", remedy="Add it again.")
    name = state.definition.id
    if state.exhausted:
        raise SettingError(f"has made its {state.counter} runs: its table is used up", field="schedule", value=name)
    if state.open_runs and state.definition.overlap == "skip":
        remedy = f"{state.open_runs[0].id} is there; wait for its end."
        raise SettingError("has one run at a time", field="schedule", value=name, remedy=remedy)
    return Claimed(now_s, float(int(now_s)), state.counter + 1, by_hand=True)


def expand(definition: Definition, claim: Claimed) -> Storyboard:
    """The template with the values of one run. Raises SpecError."""
    try:
        filled = _fill(definition.storyboard, values_of(definition, claim))
        return parse_spec(canonical_json(_anchor(filled, definition.folder)))
    except SpecError as error:
        raise SpecError(str(error), field=f"{definition.id}, run {claim.counter}") from None


def values_of(definition: Definition, claim: Claimed) -> dict[str, Value]:
    """What `${...}` means in this run: date and time of its tick there, its number, its row."""
    moment = definition.cron.local(claim.tick_s)
    row = definition.rows[claim.counter - 1] if definition.rows else {}
    own: dict[str, Value] = {
        "date": moment.strftime("%Y-%m-%d"),
        "time": moment.strftime("%H%M"),
        "counter": claim.counter,
        "schedule": definition.id,
    }
    return {**row, **own}


def _fill(data: Any, values: Mapping[str, Value]) -> Any:
    """`data` with the variables in its texts filled in. A text that is one variable gets the value as it is."""
    if isinstance(data, Mapping):
        return {key: _fill(value, values) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_fill(value, values) for value in data]
    if not isinstance(data, str):
        return data
    if whole := _VARIABLE.fullmatch(data):
        return _value(whole[1], values)
    return _VARIABLE.sub(lambda found: str(_value(found[1], values)), data)


def _anchor(data: Any, folder: str, place: tuple[str, ...] = ()) -> Any:
    """`data` with the files that it names taken from `folder`."""
    if isinstance(data, Mapping):
        return {key: _anchor(value, folder, (*place, key)) for key, value in data.items()}
    if isinstance(data, list):
        return [_anchor(value, folder, place) for value in data]
    return posixpath.join(folder, data) if isinstance(data, str) and place in _FILES else data


def _value(name: str, values: Mapping[str, Value]) -> Value:
    if name not in values:
        remedy = f"There are {', '.join(sorted(values))}."
        raise SpecError("is not a variable", field="storyboard", value="${" + name + "}", remedy=remedy)
    return values[name]


def check_schedule_id(schedule_id: str) -> None:
    """Raise SettingError unless it can be a schedule's name."""
    if not NAME_PATTERN.fullmatch(schedule_id) or len(schedule_id) > LONGEST_ID:
        remedy = f"Write 1 to {LONGEST_ID} of a-z, 0-9, dot, underscore, hyphen, beginning with a letter or digit."
        raise SettingError("is not a name", field="schedule", value=schedule_id, remedy=remedy)


def check_definition(definition: Definition, now_s: float) -> list[Storyboard]:
    """Every film that the schedule will ever order. Raises SettingError, SpecError if one is none."""
    check_schedule_id(definition.id)
    if _VARIABLE.search(definition.renders):
        remedy = "Variables stand in the storyboard; each run has a folder of its own there anyway."
        raise SettingError("takes no variables", field="--renders", value=definition.renders, remedy=remedy)
    if len(definition.rows) > MOST_ROWS:
        raise SettingError("has too many rows", field="--rows", value=len(definition.rows), remedy=f"{MOST_ROWS} fit.")
    for column in definition.rows[0] if definition.rows else ():
        if column in _RESERVED:
            remedy = "Name the column otherwise."
            raise SettingError("is taken: a variable of every run", field="--rows", value=column, remedy=remedy)
    counters = range(1, max(1, len(definition.rows)) + 1)
    return [expand(definition, Claimed(now_s, now_s, counter)) for counter in counters]


def entry_to_json(entry: Entry) -> dict[str, Any]:
    """An entry as a JSON object."""
    return {"entry": type(entry).__name__.lower(), **asdict(entry)}


def entry_from_json(value: Mapping[str, Any]) -> Entry:
    """The entry that `entry_to_json` was given."""
    fields = {name: item for name, item in value.items() if name != "entry"}
    if value["entry"] == "added":
        written = fields["definition"]
        cron, rows = Cron(**written["cron"]), tuple(written["rows"])
        fields["definition"] = Definition(**{**written, "cron": cron, "rows": rows})
    entry: Entry = _KINDS[value["entry"]](**fields)
    return entry
