"""The loss of a run over its steps: numbers in a CSV file, a picture beside it.

A run that goes on from a state forgets what was written after that state.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_SIZE_PX = (900, 420)
_MARGIN_PX = 56
_PAPER, _INK, _FAINT, _CURVE = (255, 255, 255), (40, 40, 46), (222, 222, 228), (52, 88, 168)


class Curve:
    """Losses in `<file>.csv`, drawn in `<file>.png`. `step`: where the run goes on."""

    def __init__(self, file: Path, step: int) -> None:
        self._numbers = file.with_name(file.name + ".csv")
        self._picture = file.with_name(file.name + ".png")
        self.points = [point for point in read_points(self._numbers) if point[0] <= step]

    def add(self, step: int, loss: float) -> None:
        """One more point; both files are written."""
        self.points.append((step, loss))
        self._numbers.parent.mkdir(parents=True, exist_ok=True)
        with self._numbers.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("step", "loss"), *self.points])
        draw_curve(self.points).save(self._picture)


def read_points(file: Path) -> list[tuple[int, float]]:
    """The (step, loss) of a file that `Curve` wrote; none where there is no file."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(lines)]


def draw_curve(points: list[tuple[int, float]]) -> Image.Image:
    """The losses over the steps, on a logarithmic scale; what is not finite is left out."""
    picture = Image.new("RGB", _SIZE_PX, _PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    shown = [(step, math.log(loss)) for step, loss in points if math.isfinite(loss) and loss > 0]
    if not shown:
        return picture
    steps, logs = [step for step, _ in shown], [value for _, value in shown]
    low, high = min(logs) - 0.02, max(logs) + 0.02
    right, bottom = _SIZE_PX[0] - 20, _SIZE_PX[1] - _MARGIN_PX + 20

    def place(step: float, value: float) -> tuple[float, float]:
        across = (step - steps[0]) / max(1, steps[-1] - steps[0])
        return _MARGIN_PX + across * (right - _MARGIN_PX), bottom - (value - low) / (high - low) * (bottom - 20)

    for k in range(5):
        value = low + (high - low) * k / 4
        level = place(0, value)[1]
        pen.line([(_MARGIN_PX, level), (right, level)], fill=_FAINT)
        pen.text((4, level - 8), f"{math.exp(value):.4g}", fill=_INK, font=font)
    pen.line([place(step, value) for step, value in shown], fill=_CURVE, width=2)
    pen.text((_MARGIN_PX, bottom + 8), f"step {steps[0]}", fill=_INK, font=font)
    pen.text((right - 80, bottom + 8), f"step {steps[-1]}", fill=_INK, font=font)
    return picture
