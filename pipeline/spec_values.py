"""The values a storyboard is written in: durations, frame rates, picture sizes, aspects, ids.

Contract: each `parse_` takes what YAML gives, or the value itself, and returns an exact value that `str`
turns back into what it can parse. Anything else is a ValueError with a message and a remedy, which pydantic
collects.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from pydantic_core import PydanticCustomError

from pipeline.tasks import NAME_PATTERN

LONGEST_S = 24 * 3600
"""Longest shot."""

AUDIO_RATE_HZ = 48_000
MOST_TICKS = 2**31 - 1
"""A film's file counts frames and samples in common ticks, at most so many a second."""


def refuse(message: str, remedy: str) -> PydanticCustomError:
    """The ValueError that pydantic turns into a problem with a remedy."""
    return PydanticCustomError("storyboard", "{text}", {"text": message, "remedy": remedy})


def round_half_up(value: Fraction) -> int:
    """The nearest whole number; halves go up."""
    return math.floor(value + Fraction(1, 2))


@dataclass(frozen=True)
class Duration:
    """A length of time, in seconds (exact) or in frames of the output."""

    seconds: Fraction = Fraction(0)
    frames: int | None = None

    def frames_at(self, fps: Fraction) -> int:
        """How many output frames it is, to the nearest."""
        return self.frames if self.frames is not None else round_half_up(self.seconds * fps)

    def seconds_at(self, fps: Fraction) -> Fraction:
        """How many seconds it is: exact, not rounded to a frame."""
        return Fraction(self.frames) / fps if self.frames is not None else self.seconds

    def __str__(self) -> str:
        if self.frames is not None:
            return f"{self.frames}f"
        return f"{Decimal(self.seconds.numerator) / Decimal(self.seconds.denominator):f}s"


_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d{1,9})?)s)?")
_DURATION_REMEDY = "Write seconds (5 or 2.5), 12s, 1m30s, or frames as 45f."


def parse_duration(value: object) -> Duration:
    """`5`, `2.5`, `"12s"`, `"1m30s"`, `"1h2m"` or `"45f"`; not negative. Raises ValueError."""
    if isinstance(value, Duration):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise refuse("is not a duration", _DURATION_REMEDY)
    text = str(value).strip().lower().replace(" ", "")
    if text.startswith("-"):
        raise refuse("is negative", _DURATION_REMEDY)
    if re.fullmatch(r"\d{1,9}f", text):
        return Duration(frames=int(text[:-1]))
    seconds = _plain_seconds(text)
    if seconds is None:
        match = _DURATION.fullmatch(text)
        if not match or not text:
            raise refuse("is not a duration", _DURATION_REMEDY)
        hours, minutes, rest = (Fraction(part or 0) for part in match.groups())
        seconds = hours * 3600 + minutes * 60 + rest
    if seconds > LONGEST_S:
        raise refuse("is longer than a day", "Write at most 24h.")
    return Duration(seconds)


def _plain_seconds(text: str) -> Fraction | None:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return Fraction(round(number, 9)) if number.is_finite() and abs(number) < 10**9 else None


def parse_length(value: object) -> Duration:
    """A duration of more than nothing. Raises ValueError."""
    duration = parse_duration(value)
    if not (duration.frames if duration.frames is not None else duration.seconds):
        raise refuse("must be more than nothing", _DURATION_REMEDY)
    return duration


_NTSC = {Decimal("23.976"): 24, Decimal("23.98"): 24, Decimal("29.97"): 30, Decimal("59.94"): 60}


def parse_rate(value: object) -> Fraction:
    """Frames per second: `24`, `29.97` (taken as 30000/1001) or `"24000/1001"`. Raises ValueError."""
    remedy = "Write frames per second between 1 and 240, such as 24, 29.97 or 30000/1001."
    if isinstance(value, Fraction):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise refuse("is not a frame rate", remedy)
    text = str(value).strip()
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?|\d{1,6}/[1-9]\d{0,5}", text):
        raise refuse("is not a frame rate", remedy)
    nominal = None if "/" in text else _NTSC.get(Decimal(text))
    rate = Fraction(nominal * 1000, 1001) if nominal else Fraction(text)
    if not 1 <= rate <= 240:
        raise refuse("is out of range", remedy)
    if math.lcm(rate.numerator, AUDIO_RATE_HZ) > MOST_TICKS:
        raise refuse("is finer than a film can count", remedy)
    return rate


@dataclass(frozen=True)
class FrameSize:
    """A picture size, written `1280x720`."""

    width_px: int
    height_px: int

    def __str__(self) -> str:
        return f"{self.width_px}x{self.height_px}"


def parse_frame_size(value: object) -> FrameSize:
    """`"1280x720"` or `[1280, 720]`: width first, even, 16 to 8192. Raises ValueError."""
    if isinstance(value, FrameSize):
        return value
    text = "x".join(map(str, value)) if isinstance(value, list) else str(value)
    match = re.fullmatch(r"(\d{1,5})\s*x\s*(\d{1,5})", text.strip().lower())
    if not match:
        raise refuse("is not a picture size", "Write width x height, such as 1280x720.")
    size = FrameSize(int(match[1]), int(match[2]))
    if any(side % 2 or not 16 <= side <= 8192 for side in (size.width_px, size.height_px)):
        raise refuse("cannot be encoded", "Width and height must be even numbers from 16 to 8192.")
    return size


def parse_id(value: object) -> str:
    """An id that can become a file name (NAME_PATTERN). Raises ValueError."""
    if not isinstance(value, str):
        raise refuse("is not text", "Write it in quotes.")
    if not NAME_PATTERN.fullmatch(value):
        raise refuse("is not an id", "Use at most 63 of a-z, 0-9, dot, dash, underscore; a-z or 0-9 first.")
    return value


def parse_aspect(value: object) -> str:
    """`"16:9"`. Raises ValueError."""
    if not isinstance(value, str) or not re.fullmatch(r"[1-9]\d{0,4}:[1-9]\d{0,4}", value):
        raise refuse("is not an aspect", 'Write width to height in quotes, such as "16:9" or "9:16".')
    return value
