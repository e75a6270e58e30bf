# SPDX-License-Identifier: Apache-2.0
"""`--task compare`: two results of `--task performance` side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from gptneox.cli import Settings
from gptneox.config.errors import ConfigError, FileError, NoSuchPath
from gptneox.config.files import read_text
from gptneox.evaluation.performance_result import (
    CaseResult,
    PerformanceResult,
    json_path,
    read_csv_cases,
)
from gptneox.evaluation.report import number, say, table

PREFIX = "performance_test_"  # of the result files that a directory stands for

# Heading, figure, digits.
_COMPARED: tuple[tuple[str, Callable[[CaseResult], float | None], int], ...] = (
    ("response s", lambda case: case.times.response_s, 3),
    ("first ms", lambda case: case.times.first_ms, 2),
    ("next ms", lambda case: case.times.next_ms, 2),
    ("decode tok/s", lambda case: case.rates.decode_tokens_per_s, 1),
)
_Shape = tuple[int, int, int]  # batch size, input length, output length


@dataclass(frozen=True)
class StoredResult:
    """A result with the file it was read from."""

    file: Path
    cases: list[CaseResult]
    origin: str  # what ran where, as far as the file says

    def by_shape(self) -> dict[_Shape, CaseResult]:
        """The cases by what both results must have in common."""
        return {(c.batch_size, c.input_len, c.output_len): c for c in self.cases}


def run(settings: Settings) -> None:
    """Print the comparison. Without --with it is with the newest result in this directory.

    Raises:
        ConfigError, FileError, FileNotFoundError: with a message for the user.
    """
    args = settings.args
    if args.against is None:
        raise ConfigError("--task compare needs --against FILE_OR_DIRECTORY, an earlier result")
    a = read_result(args.against)
    b = read_result(args.with_result or Path())
    if a.file.resolve() == b.file.resolve():
        raise ConfigError(
            f"both results are {a.file}; name the other one with --with FILE_OR_DIRECTORY"
        )
    say(comparison(a, b))


def read_result(path: Path) -> StoredResult:
    """Read a performance result: its JSON, its CSV, or the newest one in a directory.

    Raises:
        FileNotFoundError: the directory has none; if there is no such path, NoSuchPath.
        FileError: the file is something else.
    """
    if path.is_dir():
        results = [
            p for ext in ("json", "csv") for p in path.glob(f"*.{ext}") if p.name.startswith(PREFIX)
        ]
        if not results:
            raise FileNotFoundError(
                f"no {PREFIX}*.json or .csv in {path}; run main.py --task performance there, or "
                "name a file"
            )
        path = max(results, key=lambda p: (p.stat().st_mtime_ns, p.suffix == ".json"))
    if not path.exists():
        raise NoSuchPath(f"no performance result {path}; give a CSV, a JSON or a directory")
    if path.suffix != ".json" and json_path(path).is_file():
        path = json_path(path)
    try:
        text = read_text(path)
        if path.suffix == ".json" or text.lstrip().startswith("{"):
            result = PerformanceResult.from_json(text)
            return StoredResult(path, result.cases, f"{result.title}, {result.date}")
        origin = "a CSV without its JSON: device and dtype are unknown"
        return StoredResult(path, read_csv_cases(text), origin)
    except (ValueError, TypeError) as error:
        raise FileError(
            f"{path} is no result of --task performance: {error}; give its CSV or JSON"
        ) from error


def comparison(a: StoredResult, b: StoredResult) -> str:
    """The cases that both results have, with the ratios B / A.

    Raises:
        ConfigError: there is no common case.
    """
    cases_a, cases_b = a.by_shape(), b.by_shape()
    common = [shape for shape in cases_a if shape in cases_b]
    if not common:
        raise ConfigError(
            f"no case in common: {a.file} has {_shown(cases_a)}; {b.file} has "
            f"{_shown(cases_b)} (batch x [in,out])"
        )
    header = ["batch", "in", "out"]
    for name, _, _ in _COMPARED:
        header += [f"A {name}", f"B {name}", "B/A"]
    rows = []
    for shape in common:
        row = [str(n) for n in shape]
        for _, figure, digits in _COMPARED:
            old, new = figure(cases_a[shape]), figure(cases_b[shape])
            ratio = new / old if old and new else None
            row += [number(old or None, digits), number(new or None, digits), number(ratio, 3)]
        rows.append(row)
    lines = [f"A: {a.file} ({a.origin})", f"B: {b.file} ({b.origin})", table(header, rows)]
    lines.append("B/A below 1: B takes less time; for tok/s above 1: B is faster")
    for name, mine, other in (("A", cases_a, cases_b), ("B", cases_b, cases_a)):
        if alone := [shape for shape in mine if shape not in other]:
            lines.append(f"only in {name}: {_shown(alone)}")
    return "\n".join(lines)


def _shown(shapes: Iterable[_Shape]) -> str:
    return ", ".join(f"{b} x [{i},{o}]" for b, i, o in shapes)
