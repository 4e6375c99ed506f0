"""What a farm remembers of each render that was submitted to it: a log of entries, and the state that they add up to.

`submissions/<render id>/<number>.json` in the farm's own store, each created only if absent, so the queue survives the
farm, its cluster and whoever submitted. What was used, and the price of it, lie beside them. The renders' own work is
not in here: their ledgers have it.

Raises StoreError, SettingError as the store does, CorruptArtifact for an entry that is not whole.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pipeline.errors import LeaseLost, SettingError
from pipeline.records import TornRecord, seal, unseal
from pipeline.store import Store, corrupt
from pipeline.tasks import NAME_PATTERN

Phase = Literal["queued", "running", "approval", "paused", "done", "failed", "cancelled"]
"""queued: to be rendered when its turn comes. running: it has begun. approval: stage one is there to be looked at,
resuming refines it. The others wait for a person, too.
"""
Occasion = Literal["done", "failed", "paused", "approval"]
"""What hooks are told of."""


@dataclass(frozen=True)
class Hook:
    """What is called when a render is done, failed, paused or to be approved: a command (a list of arguments) or a
    web address.
    """

    occasions: tuple[Occasion, ...]
    command: tuple[str, ...] = ()
    url: str = ""


@dataclass(frozen=True)
class Submission:
    """An order for a render. Times are Unix times, money is in the currency of the farm's prices."""

    render_id: str
    store_url: str
    recipe: Mapping[str, Any]
    """As `recipe.json` holds it."""
    title: str = ""
    owner: str = ""
    priority: int = 50
    start_after_s: float = 0.0
    done_by_s: float | None = None
    most_workers: int | None = None
    deadline_s: float | None = None
    """Pause after so many seconds of one run."""
    most_cost: float | None = None
    allow_mixed: bool = False
    hooks: tuple[Hook, ...] = ()
    gang: int = 1
    """How many processes compute each segment together."""

    def __post_init__(self) -> None:
        check_render_id(self.render_id)
        check_priority(self.priority)

    @property
    def ends_for_approval(self) -> bool:
        """Whether somebody wants to look at stage one before it is refined."""
        return self.recipe.get("until") == "stage-one"

    def approved(self) -> Submission:
        """The same order with what comes after stage one; what is committed stays."""
        return replace(self, recipe={**self.recipe, "until": "film"}) if self.ends_for_approval else self


@dataclass(frozen=True)
class Submitted:
    """It was submitted, for the first time or again after it had ended."""

    at_s: float
    submission: Submission


@dataclass(frozen=True)
class Changed:
    """A person, or the farm, changed where it stands. `message` says why."""

    at_s: float
    phase: Phase
    message: str = ""
    exit_code: int | None = None
    """Of a render that has ended; that of `longtake render`."""
    hook_failed: str = ""
    """The first line of why a hook failed that was told of this."""


@dataclass(frozen=True)
class Adjusted:
    """A person gave it another priority, budget or deadline; what is None stays."""

    at_s: float
    priority: int | None = None
    most_cost: float | None = None
    deadline_s: float | None = None


Entry = Submitted | Changed | Adjusted
_KINDS: dict[str, type[Any]] = {"submitted": Submitted, "changed": Changed, "adjusted": Adjusted}


@dataclass(frozen=True)
class SubmissionState:
    """Where a submission stands: the fold of its log."""

    submission: Submission
    submitted_at_s: float
    phase: Phase = "queued"
    since_s: float = 0.0
    message: str = ""
    exit_code: int | None = None
    hook_failed: str = ""

    @property
    def is_open(self) -> bool:
        """Whether the farm has anything to do with it of its own accord."""
        return self.phase in ("queued", "running")

    @property
    def note(self) -> str:
        """What a person should know of it: why it is there, and that a hook failed."""
        failed = self.hook_failed and f"its hook failed: {self.hook_failed}"
        return "; ".join(part for part in (self.message, failed) if part)

    def with_failed_hook(self, why: str) -> Changed:
        """The entry that says so and changes nothing else."""
        return Changed(self.since_s, self.phase, self.message, self.exit_code, why)


def apply_entry(state: SubmissionState | None, entry: Entry) -> SubmissionState:
    """The state after an entry. Raises ValueError for a log that does not begin with a submission."""
    if isinstance(entry, Submitted):
        return SubmissionState(entry.submission, entry.at_s, since_s=entry.at_s)
    if state is None:
        raise ValueError("the log does not begin with a submission")
    if isinstance(entry, Changed):
        about = {name: value for name, value in vars(entry).items() if name != "at_s"}
        return replace(state, since_s=entry.at_s, **about)
    changes = {name: value for name, value in vars(entry).items() if name != "at_s" and value is not None}
    return replace(state, submission=replace(state.submission, **changes))


class SubmissionBook:
    """All submissions of a farm. One process writes; entries of another one are refused, never overwritten.

    `states` is replaced, never changed: it may be walked through while another thread adds an entry.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lengths: dict[str, int] = {}
        self.states: dict[str, SubmissionState] = {}

    def load(self) -> None:
        """Read everything."""
        paths = [file.path for file in self._store.list("submissions")]
        for path, data in self._store.read_many(paths):
            _, render_id, _ = path.split("/")
            try:
                entry = entry_from_json(unseal(data or b""))
            except TornRecord as error:
                raise corrupt(path, str(error)) from error
            self._take(render_id, entry)

    def add(self, render_id: str, entry: Entry) -> SubmissionState:
        """Write the next entry of a submission; its new state. Durable on return. LeaseLost if another farm did."""
        state = apply_entry(self.states.get(render_id), entry)
        number = self._lengths.get(render_id, 0) + 1
        path = f"submissions/{render_id}/{number:06d}.json"
        data = seal(entry_to_json(entry))
        if not self._store.create_if_absent(path, data) and self._store.read(path) != data:
            raise LeaseLost(f"{path} was written by another farm")
        self._lengths[render_id] = number
        self.states = {**self.states, render_id: state}
        return state

    def _take(self, render_id: str, entry: Entry) -> None:
        self.states[render_id] = apply_entry(self.states.get(render_id), entry)
        self._lengths[render_id] = self._lengths.get(render_id, 0) + 1


def entry_to_json(entry: Entry) -> dict[str, Any]:
    """JSON-able; `entry` names its type."""
    name = next(name for name, kind in _KINDS.items() if isinstance(entry, kind))
    return {"entry": name, **asdict(entry)}


def entry_from_json(value: Mapping[str, Any]) -> Entry:
    """What `entry_to_json` wrote."""
    fields = {name: content for name, content in value.items() if name != "entry"}
    if value["entry"] == "submitted":
        fields["submission"] = submission_from_json(fields["submission"])
    entry: Entry = _KINDS[value["entry"]](**fields)
    return entry


def submission_from_json(value: Mapping[str, Any]) -> Submission:
    """What `dataclasses.asdict` made of a submission."""
    hooks = tuple(
        Hook(tuple(hook["occasions"]), tuple(hook["command"]), hook["url"]) for hook in value["hooks"]
    )
    return Submission(**{**value, "hooks": hooks})


def same_order(one: Submission, other: Submission) -> bool:
    """Whether two submissions ask for the same film in the same place; when it was written does not matter."""
    return _order(one) == _order(other)


def wishes_that_differ(one: Submission, other: Submission) -> list[str]:
    """The flags of `longtake submit` in which two orders of the same film differ."""
    flags = {
        "priority": "--priority",
        "most_workers": "--gpus",
        "start_after_s": "--start-after",
        "done_by_s": "--done-by",
        "deadline_s": "--deadline",
        "most_cost": "--max-cost",
        "allow_mixed": "--allow-mixed",
        "hooks": "--on-event",
    }
    return [flag for name, flag in flags.items() if getattr(one, name) != getattr(other, name)]


def _order(submission: Submission) -> tuple[str, int, dict[str, Any]]:
    recipe = {name: part for name, part in submission.recipe.items() if name != "written_at"}
    return submission.store_url, submission.gang, recipe


def render_id_of(title: str, store_url: str) -> str:
    """The id of the render in a store: one store has one render, so submitting it again finds it."""
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:40].strip("-") or "film"
    return f"{slug}-{hashlib.sha256(store_url.encode()).hexdigest()[:8]}"


def check_render_id(render_id: str) -> str:
    """The id, if it may be one. Raises SettingError."""
    if not NAME_PATTERN.fullmatch(render_id):
        remedy = "Ids are 1 to 63 of a-z, 0-9, dot, underscore and hyphen, and begin with a letter or a digit."
        raise SettingError("is not a render's id", field="ID", value=render_id, remedy=remedy)
    return render_id


def check_priority(priority: int) -> int:
    """The priority, if it may be one. Raises SettingError."""
    if not 0 <= priority <= 100:
        raise SettingError("is not a priority", field="--priority", value=priority, remedy="From 0 to 100; usual: 50.")
    return priority


# What was used


@dataclass
class Usage:
    """Worker seconds of one render, or of nobody: a worker is one GPU, or one slot of a machine without."""

    owner: str = ""
    busy_s: float = 0.0
    """Tasks that were committed."""
    loading_s: float = 0.0
    idle_s: float = 0.0
    """Ready for work that was not there. Belongs to nobody."""
    lost_s: float = 0.0
    """Tasks that came to nothing: failed, stopped, or their worker was lost."""
    cost: float = 0.0

    def add(self, other: Usage) -> None:
        """Add the numbers of another one."""
        for name in ("busy_s", "loading_s", "idle_s", "lost_s", "cost"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


PRICE_FILE = "price.json"


def put_price(store: Store, price_hour: float) -> None:
    """Write what a worker costs in an hour; 0 where no price is known."""
    store.put_replace(PRICE_FILE, seal({"price_hour": price_hour}))


def load_price(store: Store) -> float:
    """What `put_price` wrote; 0 if nothing was, CorruptArtifact if it is not whole."""
    try:
        return float(unseal(store.read(PRICE_FILE))["price_hour"])
    except FileNotFoundError:
        return 0.0
    except TornRecord as error:
        raise corrupt(PRICE_FILE, str(error)) from error


@dataclass
class UsageBook:
    """Usage by render id; "" stands for nobody. Kept as one sealed file, `usage.json`."""

    renders: dict[str, Usage] = field(default_factory=dict)

    def of(self, render_id: str, owner: str = "") -> Usage:
        """Of one render, to be added to."""
        return self.renders.setdefault(render_id, Usage(owner))

    def by_owner(self) -> dict[str, Usage]:
        """Added up; "" stands for nobody."""
        owners: dict[str, Usage] = {}
        for usage in self.renders.values():
            owners.setdefault(usage.owner, Usage(usage.owner)).add(usage)
        return owners

    def copied(self) -> UsageBook:
        """As it is now: another thread may use it while this one goes on."""
        return UsageBook({name: replace(usage) for name, usage in self.renders.items()})

    def put(self, store: Store) -> None:
        """Write it."""
        store.put_replace("usage.json", seal({name: asdict(usage) for name, usage in self.renders.items()}))

    @classmethod
    def load(cls, store: Store) -> UsageBook:
        """Read it; empty if there is none, CorruptArtifact if it is not whole."""
        try:
            value = unseal(store.read("usage.json"))
        except FileNotFoundError:
            return cls()
        except TornRecord as error:
            raise corrupt("usage.json", str(error)) from error
        return cls({name: Usage(**usage) for name, usage in value.items()})
