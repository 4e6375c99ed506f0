"""What a GPU costs for an hour. A small table of public list prices, and the user's own in its place.

The list is an example of one provider's on-demand prices, not an offer and not a market survey: `longtake plan
--prices` takes a YAML file of the same form with the prices that really hold, those of spot machines as `h200-spot`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from pipeline.errors import SettingError, first_line

# US dollars for a GPU and hour, on demand, RunPod "Secure Cloud" pods, https://www.runpod.io/pricing: h200, h100 (SXM)
# and b200 as transcribed from that page on 2026-10-07, a100 (SXM) on 2026-11-09. Cloud prices change often.
# The H800 is not on public offer; of the others no price has been looked up.
LIST_PRICES: Mapping[str, float] = {"h200": 4.59, "h100": 3.49, "b200": 6.79, "a100": 1.79}


def load_prices(path: Path | None) -> dict[str, float]:
    """Dollars for a GPU and hour by GPU type: the list's, replaced by those in the file. Raises SettingError."""
    return {**LIST_PRICES, **({} if path is None else _read(path))}


def _read(path: Path) -> dict[str, float]:
    remedy = "Write one line a GPU type, such as `h200: 2.95` (dollars for a GPU and hour)."
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        message = f"cannot be read: {first_line(error)}"
        raise SettingError(message, field="--prices", value=str(path), remedy=remedy) from error
    if not isinstance(content, dict):
        raise SettingError("is no table of prices", field="--prices", value=str(path), remedy=remedy)
    for name, price in content.items():
        is_number = isinstance(price, int | float) and not isinstance(price, bool)
        if not isinstance(name, str) or not is_number or not 0 <= price < float("inf"):
            raise SettingError("is no price", field=f"--prices {path}: {name}", value=price, remedy=remedy)
    return {name.lower(): float(price) for name, price in content.items()}
