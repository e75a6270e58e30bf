# SPDX-License-Identifier: Apache-2.0
"""Figures and tables as text, and the software versions that a result states."""

from __future__ import annotations

import csv
import io
import math
import platform
import sys
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from importlib.metadata import distributions
from typing import Any


def say(text: str) -> None:
    """Print a result on stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def percentile(values: Seq[float], percent: float) -> float:
    """Between the two nearest ranks, linearly (as numpy.percentile does).

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values to take a percentile of")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def table(header: Seq[str], rows: Iterable[Seq[str]]) -> str:
    """Columns of equal width, aligned to the right, with a line under the header."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    shown = [
        "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines
    ]
    return "\n".join([shown[0], "-" * len(shown[0]), *shown[1:]])


def number(value: float | None, digits: int = 2) -> str:
    """For a table; a dash where nothing was measured."""
    return "-" if value is None else f"{value:.{digits}f}"


def share(value: float | None) -> str:
    """A share of a measured limit, as a percentage.

    One that is passed by a tenth was measured while something else ran, which the text says.
    """
    if value is None:
        return "-"
    return f"{value:.0%}" if value <= 1.1 else f"{value:.0%} (limit wrong)"


def counted(count: int, noun: str) -> str:
    """1 rank, 2 ranks."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def csv_text(columns: Seq[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A CSV with its header; commas and quotes in cells are quoted."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that set the speed."""
    numbers = {"python": platform.python_version()}
    for package in distributions():
        name = package.metadata["Name"]
        if name and (name == "transformers" or name.split("_")[0].split("-")[0] == "torch"):
            numbers[name] = package.version
    return numbers
