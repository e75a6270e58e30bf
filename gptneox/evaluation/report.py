# SPDX-License-Identifier: Apache-2.0
"""Result files of the speed tests: CSV, JSON, tables, plots, and two results side by side."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import logging
import math
import sys
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from gptneox.cli import Settings
from gptneox.config.errors import ConfigError
from gptneox.config.files import read_text
from gptneox.files import check_writable, is_regular, write_file

logger = logging.getLogger(__name__)

FORMAT = "gptneox performance 1"
PREFIX = "performance_test_"
# Column of the CSV -> key of a case in the JSON. The names are the README's.
COLUMNS = {
    "batch_size": "batch_size",
    "input_seq_len(Encoding)": "input_len",
    "output_seq_len(Decoding)": "output_len",
    "ResponseTime(s)": "response_s",
    "forward_first_token_time(ms)": "first_ms",
    "forward_next_token_time(ms)": "next_ms",
    "pre_next_token_time(ms)": "pre_ms",
    "post_next_token_time_post(ms)": "post_ms",
}
SPEED_KEYS = (
    "prefill_tokens_per_s",
    "prefill_tflop_per_s",
    "prefill_share_of_matmul",
    "prefill_flop_per_byte",
    "decode_tokens_per_s",
    "decode_gb_per_s",
    "decode_share_of_bandwidth",
    "decode_tflop_per_s",
    "decode_flop_per_byte",
)


def say(text: str) -> None:
    """A result, on stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# -- figures -------------------------------------------------------------------------------------


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


def summarize(values: Seq[float]) -> dict[str, float] | None:
    """Mean, median, p90 and p99; None when nothing was measured."""
    if not values:
        return None
    return {
        "count": len(values),
        "mean": sum(values) / len(values),
        "median": percentile(values, 50),
        "p90": percentile(values, 90),
        "p99": percentile(values, 99),
    }


# -- tables --------------------------------------------------------------------------------------


def table(header: Seq[str], rows: Iterable[Seq[str]]) -> str:
    """Columns of equal width, numbers to the right, with a line under the header."""
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
    """As a percentage."""
    return "-" if value is None else f"{value:.0%}"


def result_table(result: Mapping[str, Any]) -> str:
    """The cases of one result, one per line, under a line that says what was measured."""
    header = ("batch", "in", "out", "response s", "first ms", "next ms", "pre ms", "post ms",
        "p99 ms", "prefill tok/s", "decode tok/s", "GB/s", "of bandwidth", "of matmul")  # fmt: skip
    rows = [
        (
            *(str(case[key]) for key in ("batch_size", "input_len", "output_len")),
            number(case["response_s"], 3),
            *(number(case[key]) for key in ("first_ms", "next_ms", "pre_ms", "post_ms")),
            number((case["inter_token_ms"] or {}).get("p99")),
            number(case["prefill_tokens_per_s"], 1),
            number(case["decode_tokens_per_s"], 1),
            number(case["decode_gb_per_s"], 1),
            share(case["decode_share_of_bandwidth"]),
            share(case["prefill_share_of_matmul"]),
        )
        for case in result["cases"]
    ]
    return f"{title(result)}\n{table(header, rows)}"


def title(result: Mapping[str, Any]) -> str:
    """Model, device, dtype, path and number of ranks in one line."""
    threads = result["threads"]
    return ", ".join(
        [
            f"{result['model_name']} on {result['device']}",
            *([counted(threads, "thread")] if threads else []),
            result["dtype"],
            f"{result['path']} path",
            counted(result["world_size"], "rank"),
            f"{result['mode']} mode",
        ]
    )


def counted(count: int, noun: str) -> str:
    """1 rank, 2 ranks."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


# -- files ---------------------------------------------------------------------------------------


def csv_text(columns: Seq[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A CSV with its header; commas and quotes in cells are quoted."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def check_result_files(path: Path) -> None:
    """Refuse before the measuring what `write_result` could not write, or should not.

    Raises:
        OSError: see `check_writable`.
        ConfigError: another file has the name that the JSON would have.
    """
    check_writable(path)
    if not is_regular(path):
        return
    data = json_path(path)
    check_writable(data)
    try:
        if data.is_file():
            _parse_json(data.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"the JSON beside {path} would replace {data}, which is no result of --task "
            "performance; choose another [performance] save_file_name"
        ) from error


def json_path(path: Path) -> Path:
    """The JSON beside a CSV, also beside one that is not called so."""
    is_csv = path.suffix.lower() == ".csv"
    return path.with_suffix(".json") if is_csv else path.with_name(f"{path.name}.json")


def write_result(path: Path, result: Mapping[str, Any]) -> list[Path]:
    """CSV, JSON and plots; returns the files. A device or a pipe takes the CSV alone."""
    rows = [
        {
            column: case[key] if isinstance(case[key], int) else f"{case[key]:.6f}"
            for column, key in COLUMNS.items()
        }
        for case in result["cases"]
    ]
    write_file(path, csv_text(list(COLUMNS), rows))
    if not is_regular(path):
        return [path]
    data = json_path(path)
    write_file(data, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    files = [path, data]
    if importlib.util.find_spec("matplotlib") is None:
        say("no plots: matplotlib is not installed; pip install .[plot] adds it")
        return files
    from gptneox.evaluation.plots import write_plots

    return files + write_plots(data, result)


def read_result(path: Path) -> dict[str, Any]:
    """A performance result: its JSON, its CSV, or the newest one in a directory.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: the file is something else.
    """
    if path.is_dir():
        found = [p for p in path.glob("*.json") if p.name.startswith(PREFIX)]
        found += [p for p in path.glob("*.csv") if p.name.startswith(PREFIX)]
        if not found:
            raise FileNotFoundError(
                f"no {PREFIX}*.json or .csv in {path}; run main.py --task performance there, or "
                "name a file"
            )
        path = max(found, key=lambda p: (p.stat().st_mtime_ns, p.suffix == ".json"))
    if not path.exists():
        raise FileNotFoundError(f"no performance result {path}; give a CSV, a JSON or a directory")
    if path.suffix != ".json" and json_path(path).is_file():
        path = json_path(path)
    try:
        text = read_text(path)
        is_json = path.suffix == ".json" or text.lstrip().startswith("{")
        result = _parse_json(text) if is_json else _parse_csv(text)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no result of --task performance: {error}; give its CSV or JSON"
        ) from error
    return result | {"file": str(path)}


def _parse_json(text: str) -> dict[str, Any]:
    result = json.loads(text)
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise ValueError(f'"format" is not {FORMAT!r}')
    for case in result["cases"]:
        if missing := {*COLUMNS.values(), *SPEED_KEYS} - set(case):
            raise ValueError(f"a case lacks {', '.join(sorted(missing))}")
    return result


def _parse_csv(text: str) -> dict[str, Any]:
    reader = csv.DictReader(io.StringIO(text))
    if reader.fieldnames is None or list(reader.fieldnames) != list(COLUMNS):
        raise ValueError("its header is another one")
    cases: list[dict[str, Any]] = []
    for row in reader:
        case: dict[str, Any] = {key: float(row[column]) for column, key in COLUMNS.items()}
        for key in ("batch_size", "input_len", "output_len"):
            case[key] = int(case[key])
        step_ms = case["next_ms"] + case["pre_ms"] + case["post_ms"]
        case["decode_tokens_per_s"] = case["batch_size"] / step_ms * 1e3 if step_ms > 0 else None
        cases.append(case)
    return {"cases": cases}


# -- two results ---------------------------------------------------------------------------------

COMPARED = (("response s", "response_s", 3), ("first ms", "first_ms", 2), ("next ms", "next_ms", 2),
    ("decode tok/s", "decode_tokens_per_s", 1))  # fmt: skip


def run_compare(settings: Settings) -> None:
    """`--task compare --against A [--with B]`: B is the newest result here unless it is named.

    Raises:
        ConfigError, FileNotFoundError: with a message for the user.
    """
    args = settings.args
    if args.against is None:
        raise ConfigError("--task compare needs --against FILE_OR_DIRECTORY, an earlier result")
    a = read_result(args.against)
    b = read_result(args.with_result or Path())
    if Path(a["file"]).resolve() == Path(b["file"]).resolve():
        raise ConfigError(
            f"both results are {a['file']}; name the other one with --with FILE_OR_DIRECTORY"
        )
    say(comparison(a, b))


def comparison(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """The cases that both results have, with the ratios B / A.

    Raises:
        ConfigError: there is no common case.
    """
    cases_a, cases_b = _by_shape(a), _by_shape(b)
    common = [shape for shape in cases_a if shape in cases_b]
    if not common:
        raise ConfigError(
            f"no case in common: {a['file']} has {_shapes(cases_a)}; {b['file']} has "
            f"{_shapes(cases_b)} (batch x [in,out])"
        )
    header = ["batch", "in", "out"]
    for name, _, _ in COMPARED:
        header += [f"A {name}", f"B {name}", "B/A"]
    rows = []
    for shape in common:
        row = [str(n) for n in shape]
        for _, key, digits in COMPARED:
            old, new = cases_a[shape][key], cases_b[shape][key]
            ratio = new / old if old and new else None
            row += [number(old or None, digits), number(new or None, digits), number(ratio, 3)]
        rows.append(row)
    lines = [f"A: {_origin(a)}", f"B: {_origin(b)}", table(header, rows)]
    lines.append("B/A below 1: B takes less time; for tok/s above 1: B is faster")
    for name, mine, other in (("A", cases_a, cases_b), ("B", cases_b, cases_a)):
        if alone := [shape for shape in mine if shape not in other]:
            lines.append(f"only in {name}: {_shapes(alone)}")
    return "\n".join(lines)


Shape = tuple[int, int, int]


def _by_shape(result: Mapping[str, Any]) -> dict[Shape, Mapping[str, Any]]:
    return {(c["batch_size"], c["input_len"], c["output_len"]): c for c in result["cases"]}


def _shapes(shapes: Iterable[Shape]) -> str:
    return ", ".join(f"{b} x [{i},{o}]" for b, i, o in shapes)


def _origin(result: Mapping[str, Any]) -> str:
    if "device" not in result:
        return f"{result['file']} (a CSV without its JSON: device and dtype are unknown)"
    return f"{result['file']} ({title(result)}, {result['date']})"
