# SPDX-License-Identifier: Apache-2.0
"""A result: what it says about itself, its file, and its tables as text or Markdown."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmark.engines import OURS
from benchmark.errors import UsageError
from benchmark.models import Model
from benchmark.process import ROOT
from gptneox.evaluation.report import counted, number, share, table
from gptneox.files import write_file

FORMAT = "gptneox benchmark 1"
Result = dict[str, Any]
Row = Sequence[str]
Summary = Mapping[str, Any]
# Takes a header and rows, gives a table.
Draw = Callable[[Row, Sequence[Row]], str]


def describe(model: Model, command: Sequence[str]) -> Result:
    """What every result of a model begins with."""
    return head(command, model.name) | {"model": about_model(model)}


def head(command: Sequence[str], model_name: str) -> Result:
    """When, how and on what a result was made."""
    return {
        "format": FORMAT,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shareable(command, model_name),
        "revision": revision(),
        "machine": machine(),
    }


def about_model(model: Model) -> dict[str, Any]:
    """A model's name and size."""
    return {
        "name": model.name,
        "num_parameters": model.config.num_parameters,
        "num_layers": model.config.num_layers,
        "hidden_size": model.config.hidden_size,
    }


# What is shown of a flag whose value is of one machine; "" stands for the model's name.
_STANDS_FOR = {"--model": "", "--url": "URL", "--text": "FILE"}


def shareable(command: Sequence[str], model_name: str) -> str:
    """The flags that matter to a figure, without paths of the machine it was made on."""
    shown: list[str] = []
    rest = iter(command)
    for item in rest:
        flag, sign, _ = item.partition("=")
        if flag in ("--plot", "--install"):
            continue
        if flag in ("--model", "--output-dir", "--cache", "--timeout", "--url", "--text"):
            if not sign:
                next(rest, None)
            if flag in _STANDS_FOR:
                shown += [flag, _STANDS_FOR[flag] or model_name]
            continue
        shown.append(item)
    return shlex.join(shown)


def machine() -> dict[str, Any]:
    """The computer, as far as the system tells."""
    memory = 0
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
    }


def revision() -> str:
    """The commit that is measured, with a + when files differ from it; empty outside git."""
    git = ("git", "-C", str(ROOT))
    try:
        done = subprocess.run(
            [*git, "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:
        return ""
    return done.stdout.strip()


def write(result: Result, path: Path) -> None:
    """Write the JSON file atomically."""
    write_file(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> Result:
    """A JSON file that `write` has written.

    Raises:
        UsageError: it is missing, or something else.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a result of this benchmark: {error}") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise UsageError(f'{path} is not a result of this benchmark: "format" is not {FORMAT!r}')
    return result


_RATIOS = (
    "Ratios of one round, median (least to largest); above 1 this toolkit is faster, for memory "
    "below 1 it is smaller."
)
_QUEUE = (
    "Requests queued at once and run to their end by a model that takes no time, in seconds of one "
    "processor."
)

# -- tables --------------------------------------------------------------------------------------


def markdown_table(header: Row, rows: Sequence[Row]) -> str:
    """As `gptneox.evaluation.report.table`, for a document."""
    ruler = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ruler, *rows))


def title(result: Result) -> str:
    """Model, machine, device and how it was run."""
    if not result["device"]:
        return f"{result['model']['name']}, served at a URL"
    return (
        f"{result['model']['name']} in {_dtype(result)} on {result['description']} "
        f"({result['device']}, {counted(result['threads'], 'thread')})"
    )


def _dtype(result: Result) -> str:
    return ", ".join(filter(None, (result["dtype"], result.get("scheme"))))


def as_text(result: Result) -> str:
    """For the terminal."""
    return "\n".join(_blocks(result, table))


def as_markdown(result: Result) -> str:
    """For a document."""
    return "\n\n".join(_blocks(result, markdown_table))


def present(result: Result, path: Path, *, with_plot: bool) -> None:
    """Print a result that lies at `path`, and draw it beside that."""
    files = [path]
    if with_plot:
        from benchmark.plots import write_plot

        files += write_plot(path, result)
    print(title(result))
    print(as_text(result))
    print("Files: " + ", ".join(map(str, files)))


def _blocks(result: Result, draw: Draw) -> list[str]:
    blocks = {
        "cases": _cases,
        "requests": _requests,
        "overhead": _overhead,
        "serve": _serve,
    }[result["kind"]]
    lines = [*blocks(result, draw)]
    lines += [f"Note: {note}." for note in result["notes"]]
    return lines


def _middle(key: str, digits: int, divisor: float = 1.0) -> Callable[[Summary], str]:
    """A column with the median of a metric."""
    return lambda summary: number(summary[key]["median"] / divisor, digits)


def _of_products(summary: Summary) -> str:
    """A share of what products of floats reach, which those of integers may well pass."""
    reached = summary["share_of_matmul"]["median"]
    return f"{reached:.0%}" if summary["weights"] else share(reached)


_PREFILL_COLUMNS: dict[str, Callable[[Summary], str]] = {
    "prefill tok/s": _middle("prefill_tokens_per_s", 1),
    "first ms": _middle("first_token_ms", 1),
    "of products": _of_products,
    "peak GiB": _middle("peak_bytes", 2, 2**30),
}
_COLUMNS = {
    "prefill tok/s": _PREFILL_COLUMNS["prefill tok/s"],
    "decode tok/s": _middle("decode_tokens_per_s", 1),
    "first ms": _PREFILL_COLUMNS["first ms"],
    "token p50 ms": lambda summary: number(summary["inter_token_ms"]["p50"]),
    "p99 ms": lambda summary: number(summary["inter_token_ms"]["p99"]),
    "of bandwidth": lambda summary: share(summary["share_of_bandwidth"]["median"]),
    "of products": _PREFILL_COLUMNS["of products"],
    "peak GiB": _PREFILL_COLUMNS["peak GiB"],
}


def limits_line(result: Result) -> str:
    """The machine's measured limits over the whole run."""
    values = [case["bandwidth"] for case in result["cases"]]
    low = min(value["min"] for value in values) / 1e9
    high = max(value["max"] for value in values) / 1e9
    products = ", ".join(
        f"{value / 1e9:.0f} GFLOP/s in {dtype}" for dtype, value in result["matmul"].items()
    )
    foreign = max(case["foreign_share"] for case in result["cases"])
    return (
        f"Reading memory reached {low:.1f} to {high:.1f} GB/s, large products {products}; other "
        f"programs took up to {foreign:.0%} of the processors during a case."
    )


def label(result: Result, name: str) -> str:
    """An engine's name, with its weights if quantized, and its dtype if not the requested one."""
    about = result["engines"][name]
    other = about["dtype"] if about["dtype"] != result["dtype"] else ""
    facts = ", ".join(filter(None, (about.get("weights"), other)))
    return f"{name} ({facts})" if facts else name


def _shape(case: Mapping[str, Any]) -> list[str]:
    return [str(case[key]) for key in ("batch", "prompt", "output")]


def _cases(result: Result, draw: Draw) -> list[str]:
    columns = _PREFILL_COLUMNS if result["curve"] == "prompt" else _COLUMNS
    weights = {name: about.get("weights", "") for name, about in result["engines"].items()}
    rows = [
        [
            label(result, name),
            *_shape(case),
            *(show(summary | {"weights": weights[name]}) for show in columns.values()),
        ]
        for case in result["cases"]
        for name, summary in case["summary"].items()
    ]
    parts = [limits_line(result), draw(("engine", "batch", "prompt", "new", *columns), rows)]
    if ratios := _ratio_rows(result):
        header = (f"{OURS} /", "batch", "prompt", "new", "prefill", "decode", "memory",
            "same first token")  # fmt: skip
        parts += [_RATIOS, draw(header, ratios)]
    return parts


def _ratio_rows(result: Result) -> list[list[str]]:
    rows = []
    for case in result["cases"]:
        for name, ratio in case["ratios"].items():
            rows.append(
                [
                    label(result, name),
                    *_shape(case),
                    spread(ratio["prefill_tokens_per_s"]),
                    spread(ratio["decode_tokens_per_s"]),
                    spread(ratio["peak_bytes"]),
                    share(case["agreement"][name]),
                ]
            )
    return rows


def spread(value: Mapping[str, float]) -> str:
    """Median (least to largest)."""
    return f"{value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})"


def median_run(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The run with the median p99 time to the first token."""
    return sorted(runs, key=lambda run: run["first_token_ms"]["p99"])[(len(runs) - 1) // 2]


def _requests(result: Result, draw: Draw) -> list[str]:
    header = ("engine", "requests", "seconds", "prompt tok/s", "new tok/s", "first p50 ms",
        "first p99 ms", "token p50 ms", "p99 ms", "peak GiB")  # fmt: skip
    rows = []
    for case in result["cases"]:
        for name, runs in case["runs"].items():
            run = median_run(runs)
            rows.append(
                [
                    label(result, name),
                    str(case["requests"]),
                    number(run["seconds"], 1),
                    number(run["prompt_tokens_per_s"], 1),
                    number(run["output_tokens_per_s"], 1),
                    *(number(run["first_token_ms"][p], 1) for p in ("p50", "p99")),
                    *(number(run["inter_token_ms"][p]) for p in ("p50", "p99")),
                    number(run["peak_bytes"] / 2**30),
                ]
            )
    prompt, output = result["mean_lengths"]
    what = (
        f"{result['arrivals_per_s']:g} requests per second on average, up to "
        f"{result['max_batch']} at once; prompts of {prompt} and answers of {output} tokens on "
        "average, every length up to twice that equally likely."
    )
    return [what, draw(header, rows)]


def _overhead(result: Result, draw: Draw) -> list[str]:
    step, queue = result["step"], result["queue"]
    rows = [
        [name, number(ms, 3), share(ms / step["total_ms"])] for name, ms in step["parts_ms"].items()
    ]
    rows.append(["total", number(step["total_ms"], 3), "100%"])
    queue_rows = [
        [
            str(size["requests"]),
            number(size["add_s"], 3),
            number(size["steps_s"], 3),
            number((size["add_s"] + size["steps_s"]) / size["requests"] * 1e6, 1),
        ]
        for size in queue
    ]
    outside = 1 - step["parts_ms"]["model"] / step["total_ms"]
    what = (
        f"A decode step of {step['batch']} rows at {step['context']} tokens, medians of "
        f"{step['steps']} steps; {outside:.1%} of it is spent beside the model."
    )
    return [
        what,
        draw(("part", "ms", "share"), rows),
        _QUEUE,
        draw(("requests", "queueing s", "steps s", "µs per request"), queue_rows),
    ]


def load_text(load: Mapping[str, float]) -> str:
    """A load in words."""
    if "arrivals_per_s" in load:
        return f"{load['arrivals_per_s']:g} per second"
    return f"{load['concurrency']:g} at a time"


def _serve(result: Result, draw: Draw) -> list[str]:
    lengths, limits = result["lengths"], result["limits"]
    spread = "of exactly" if not lengths["is_uniform"] else "of up to twice"
    what = (
        f"{counted(result['requests'], 'request')} for each row, prompts {spread} "
        f"{lengths['prompt']} {lengths['unit']} and answers {spread} {lengths['output']} tokens."
    )
    bounds = [
        f"{text} {limits[key]:g} ms"
        for key, text in (
            ("first_token_ms", "the first token within"),
            ("inter_token_ms", "the others on average within"),
        )
        if limits[key]
    ]
    if bounds:
        what += f" Good: {', '.join(bounds)}."
    rates, times, notes = [], [], []
    for case in result["cases"]:
        for name, run in case["runs"].items():
            row = [label(result, name), load_text(case["load"])]
            rates.append([*row, *_rate_cells(run)])
            times.append([*row, *_time_cells(run)])
            if run["errors"]:
                counts = ", ".join(f"{kind} ({n})" for kind, n in run["errors"].items())
                notes.append(f"Failed, {row[0]} at {row[1]}: {counts}.")
    rate_header = ("service", "load", "answered", "failed", "seconds", "requests/s", "prompt tok/s",
        "new tok/s", "good/s")  # fmt: skip
    shown = [f"{what} {p}" for what in ("first", "token", "whole") for p in ("p50", "p90", "p99")]
    header = ("service", "load", *shown)
    return [what, draw(rate_header, rates), "In milliseconds:", draw(header, times), *notes,
        _client_line(result)]  # fmt: skip


def _rate_cells(run: Mapping[str, Any]) -> list[str]:
    failed = sum(run["errors"].values())
    keys = ("seconds", "requests_per_s", "prompt_tokens_per_s", "output_tokens_per_s")
    cells = [number(run[key], 1 if key != "requests_per_s" else 2) for key in keys]
    return [str(run["answered"]), str(failed), *cells, number(run["goodput_per_s"])]


def _time_cells(run: Mapping[str, Any]) -> list[str]:
    keys = ("first_token_ms", "inter_token_ms", "whole_ms")
    return [number(run[key] and run[key][p], 1) for key in keys for p in ("p50", "p90", "p99")]


def _client_line(result: Result) -> str:
    """What the client itself took, at most."""
    clients = [run["client"] for case in result["cases"] for run in case["runs"].values()]

    def most(key: str) -> float:
        return max((each[key] or {}).get("p99", 0.0) for each in clients)

    return (
        f"The client itself used up to {max(each['cpu_share'] for each in clients):.0%} of a core, "
        f"{max(each['us_per_token'] for each in clients):.0f} µs per token; 99% of its moments are "
        f"less than {most('lag_ms'):.1f} ms late, and so many requests were sent within "
        f"{most('late_ms'):.1f} ms of their arrival."
    )


# -- the document --------------------------------------------------------------------------------

BEGIN = "<!-- results: begin (made by tools/bench.py --write-docs) -->"
END = "<!-- results: end -->"


def write_docs(document: Path, sources: Sequence[Path]) -> None:
    """Put the results between the two marks of a document.

    A result takes the place of an earlier one of the same command on the same processor; the
    others stay. New ones follow in the order given.

    Raises:
        UsageError: a source is not a result, or the document does not have both marks once.
    """
    results = [read(path) for path in sources]
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--write-docs {document}: {error}") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UsageError(
            f"--write-docs {document}: the lines {BEGIN!r} and {END!r} must stand there once, in "
            "this order"
        )
    before, rest = text.split(BEGIN)
    kept, after = rest.split(END)
    sections = {_what_and_where(s): s for s in re.split(r"^(?=### )", kept, flags=re.M)[1:]}
    sections |= {_what_and_where(s): s for s in map(_section, results)}
    body = "\n\n".join(section.strip() for section in sections.values())
    write_file(document, f"{before}{BEGIN}\n\n{body}\n\n{END}{after}")


def _what_and_where(section: str) -> tuple[str, str, str]:
    """The heading of a section, the processor and threads below it, and the command."""
    heading, facts, command = [*section.strip().split("\n\n"), "", ""][:3]
    return heading, facts.partition(";")[0], command


def _section(result: Result) -> str:
    """One result under a heading, with the command that reproduces it."""
    kind = {"cases": "speed", "requests": "requests over time", "overhead": "time beside the model",
        "serve": "a service under load"}  # fmt: skip
    what = f"{result['curve']} curve" if result.get("curve") else kind[result["kind"]]
    versions = "; ".join(
        f"{name} ({', '.join(f'{k} {v}' for k, v in about['versions'].items()) or 'unknown'})"
        for name, about in result["engines"].items()
    )
    facts = [f"{result['date'][:10]}, commit {result['revision'] or 'unknown'}", versions]
    if result["kind"] in ("cases", "requests"):
        facts.insert(1, f"{counted(result['runs'], 'round')}")
    dtype = ""
    if result["device"]:
        threads = counted(result["threads"], "thread")
        facts.insert(0, f"{result['description']}, {result['device']}, {threads}")
        dtype = f", {_dtype(result)}"
    return "\n\n".join(
        [
            f"### {result['model']['name']}{dtype}: {what}",
            f"{'; '.join(facts)}.",
            f"```shell\npython tools/bench.py {result['command']}\n```",
            as_markdown(result),
        ]
    )
