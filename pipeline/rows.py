"""Tables for schedules: a CSV or Parquet file as rows of texts and numbers.

In a CSV everything is text, so what reads as a number is taken for one there; write it as a Parquet text
where that is not meant. Empty cells are refused: a film cannot be made of them.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from datetime import date, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import InputFileError

Value = str | int | float
_INTEGER = re.compile(r"0|-?[1-9]\d{0,17}")
_DECIMAL = re.compile(r"-?\d{1,17}\.\d{1,17}")


def read_rows(path: Path) -> tuple[dict[str, Value], ...]:
    """The rows of a .csv or .parquet file, at least one. Raises InputFileError."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            found = _read_parquet(path)
        elif suffix == ".csv":
            found = _read_csv(path)
        else:
            raise InputFileError("is no table", field=str(path), remedy="Name a .csv or .parquet file.")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputFileError(f"cannot be read: {error}", field=str(path)) from error
    rows = tuple(_plain(row, number, path) for number, row in enumerate(found, 1))
    if not rows:
        raise InputFileError("has no rows", field=str(path), remedy="Add one for each run.")
    return rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return [{name: _typed(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise InputFileError(f"is no Parquet file: {error}", field=str(path)) from error
    return rows


def _typed(cell: Any) -> Any:
    if isinstance(cell, str) and _INTEGER.fullmatch(cell):
        return int(cell)
    if isinstance(cell, str) and _DECIMAL.fullmatch(cell):
        return float(cell)
    return cell


def _plain(row: Mapping[Any, Any], number: int, path: Path) -> dict[str, Value]:
    # csv puts surplus cells under None.
    if None in row:
        raise InputFileError(f"row {number} has more cells than the heading", field=str(path))
    return {name: _value(value, f"row {number}, {name}", path) for name, value in row.items()}


def _value(value: Any, place: str, path: Path) -> Value:
    if isinstance(value, datetime | date):
        return value.isoformat()
    if value is None or value == "" or isinstance(value, bool) or not isinstance(value, str | int | float):
        remedy = "Write a text or a number."
        raise InputFileError(f"{place} holds neither", field=str(path), value=value, remedy=remedy)
    return value
