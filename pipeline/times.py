"""How times and sizes are written for people."""

from __future__ import annotations

import math


def timecode(time_s: float) -> str:
    """`m:ss.t`, minutes without a limit."""
    tenths = math.floor(time_s * 10 + 1e-6)
    return f"{tenths // 600}:{tenths // 10 % 60:02d}.{tenths % 10}"


def hms(seconds: float) -> str:
    """`h:mm:ss`, to the nearest second."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def format_bytes(size_bytes: int) -> str:
    """`3 kB`, `12 MB`, `1.2 GB`, to the nearest; what is not nothing is at least 1 kB."""
    if size_bytes < 999_500:
        return f"{max(round(size_bytes / 1e3), min(size_bytes, 1))} kB"
    if size_bytes < 999_500_000:
        return f"{size_bytes / 1e6:.0f} MB"
    return f"{size_bytes / 1e9:,.1f} GB"
