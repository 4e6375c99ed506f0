"""What words of the command line mean: counts, times, money, sizes.

One that means nothing is an ArgumentTypeError, which argparse tells with the option's name.
"""

from __future__ import annotations

import argparse
import re
from datetime import datetime

MOST_THINGS = 4096
"""As in `longtake manifest`. A plan for a billion GPUs would never be printed."""
MOST = 1e9
"""Dollars, GB, minutes."""


def name_list(text: str) -> list[str]:
    """`A,B`."""
    return [name.strip() for name in text.split(",") if name.strip()]


def positive(text: str) -> int:
    """How many: GPUs, workers, threads, takes."""
    return _whole(text, 1)


def count(text: str) -> int:
    """How many, 0 included."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    # The length first: int() refuses thousands of digits in words of its own.
    if not text.isdecimal() or len(text) > 20 or not least <= int(text) <= MOST_THINGS:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} to {MOST_THINGS}")
    return int(text)


def duration_s(text: str) -> float:
    """`8h`, `1m30s`; nothing, too."""
    from pipeline.spec_values import parse_duration

    try:
        duration = parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not a duration such as 8h or 90m") from error
    if duration.frames is not None:
        raise argparse.ArgumentTypeError(f"{text} are frames, wanted is a duration such as 8h or 90m")
    return float(duration.seconds)


def seconds(text: str) -> float:
    """The same, but more than nothing."""
    number = duration_s(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is no time at all")
    return number


def moment(text: str) -> float:
    """`2026-12-24T20:00`, local unless it says; Unix time."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not a time such as 2026-12-24T20:00") from error


def money(text: str) -> float:
    """An amount, 0 included."""
    return 0.0 if text == "0" else _above_zero(text, "amount of money such as 4.59")


def gigabytes(text: str) -> float:
    """The size of a card."""
    return _above_zero(text, "size of a card in GB, such as 24")


def minutes(text: str) -> float:
    """A length in minutes."""
    return _above_zero(text, "number of minutes, such as 5 or 0.5")


def gpu_type(text: str) -> str:
    """`H200`, `NVIDIA H200`, `A100-80GB`; not one of the same name with another memory than the one that is known."""
    from cluster.paces import short_name
    from pipeline.pace import GPUS

    if not any(character.isascii() and character.isalnum() for character in text):
        raise argparse.ArgumentTypeError(f"{text!r} is no GPU type, such as h200")
    name, size = short_name(text), re.search(r"(\d+) ?gb", text.lower())
    if size is not None and name in GPUS and int(size[1]) != GPUS[name].memory_gb:
        raise argparse.ArgumentTypeError(f"{text} is not known, {name} is the one of {GPUS[name].memory_gb} GB")
    return name


def _above_zero(text: str, wanted: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < MOST:
        raise argparse.ArgumentTypeError(f"{text} is no {wanted}")
    return number
