"""When a cron expression ticks, in a time zone.

Five fields as cron has them. Clock changes are handled as Debian's cron does: a fixed time that the clock
jumps over ticks right after the jump, one that it shows twice ticks once, and expressions with `*` for the
minute or hour go by elapsed time. All times that go in and come out are Unix seconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from pipeline.errors import SettingError

_FIELDS = re.compile(r"[0-9A-Za-z*,/#-]+( [0-9A-Za-z*,/#-]+){4}")
_WINDOWS_S = tuple(days * 86400.0 for days in (1, 8, 63, 800, 18_000))
"""How far back the last tick is looked for, step by step: most expressions are found in the first day."""


@dataclass(frozen=True)
class Cron:
    """A checked expression. Make it with `parse_cron`."""

    expression: str
    time_zone: str

    def after(self, time_s: float) -> Iterator[float]:
        """The ticks after `time_s`, in order; endless but for expressions that stop matching."""
        start = datetime.fromtimestamp(time_s, ZoneInfo(self.time_zone))
        for tick in CronSim(self.expression, start):
            yield tick.timestamp()

    def last(self, after_s: float, until_s: float) -> float | None:
        """The last tick that is after `after_s` and not after `until_s`."""
        for window_s in _WINDOWS_S:
            found = None
            for tick_s in self.after(max(after_s, until_s - window_s)):
                if tick_s > until_s:
                    break
                found = tick_s
            if found is not None or until_s - window_s <= after_s:
                return found
        return None

    def local(self, time_s: float) -> datetime:
        """A time as the clock there shows it."""
        return datetime.fromtimestamp(time_s, ZoneInfo(self.time_zone))


def parse_cron(expression: str, time_zone: str) -> Cron:
    """The expression, if it ticks at all. Raises SettingError."""
    zone = _zone(time_zone)
    words = " ".join(expression.split())
    remedy = "Write minute, hour, day of month, month and day of week, such as '30 2 * * *'."
    if not _FIELDS.fullmatch(words):
        raise SettingError("is not a cron expression of five fields", field="--cron", value=expression, remedy=remedy)
    try:
        # The third of February 2000 begins a stretch in which every date that exists comes up.
        next(CronSim(words, datetime(2000, 2, 3, tzinfo=UTC).astimezone(zone)))
    except CronSimError as error:
        message = f"is not a cron expression: {str(error)[0].lower()}{str(error)[1:]}"
        raise SettingError(message, field="--cron", value=expression, remedy=remedy) from None
    except StopIteration:
        raise SettingError("never comes up", field="--cron", value=expression, remedy="No month has it.") from None
    return Cron(words, time_zone)


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        remedy = "Write a name of the IANA database, such as Europe/Berlin, or UTC."
        raise SettingError("is not a time zone", field="--time-zone", value=name, remedy=remedy) from None
