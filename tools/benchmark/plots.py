# SPDX-License-Identifier: Apache-2.0
"""The picture of a result; only loaded where matplotlib is installed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmark.results import label, median_run, title
from gptneox.files import write_file

_RC = {
    "font.size": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.6,
}
_AXES = {
    "batch": "batch size",
    "context": "context length (tokens)",
    "prompt": "prompt length (tokens)",
}
_MARKERS = "osD^vP*X"
Result = Mapping[str, Any]


def write_plot(data: Path, result: Result) -> list[Path]:
    """Draw a result beside its JSON file; returns the files."""
    draw = {
        "cases": _cases,
        "requests": _requests,
        "overhead": _overhead,
        "serve": _serve,
    }[result["kind"]]
    if result.get("curve") in ("batch", "context", "prompt"):
        draw = _curve
    path = data.with_suffix(".png")
    picture = io.BytesIO()
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(11, 5.2), dpi=110, layout="constrained")
        figure.suptitle(title(dict(result)), fontsize=11)
        draw(figure, result)
        figure.savefig(picture, format="png")
    write_file(path, picture.getvalue())
    return [path]


def _cases(figure: Figure, result: Result) -> None:
    """Bars: prompt and new tokens per second of each engine, a group per case."""
    metrics = (("prefill_tokens_per_s", "prompt tokens"), ("decode_tokens_per_s", "new tokens"))
    for axes, (key, what) in zip(figure.subplots(1, 2), metrics, strict=True):
        names = list(result["engines"])
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            summaries = [case["summary"].get(name) for case in result["cases"]]
            places = [x + i * width for x, summary in enumerate(summaries) if summary]
            values = [summary[key] for summary in summaries if summary]
            middle = [value["median"] for value in values]
            errors = [
                [m - v["min"] for m, v in zip(middle, values, strict=True)],
                [v["max"] - m for m, v in zip(middle, values, strict=True)],
            ]
            axes.bar(places, middle, width, yerr=errors, capsize=3, label=label(dict(result), name))
        ticks = [x + 0.4 - width / 2 for x in range(len(result["cases"]))]
        names_of_cases = [f"{c['batch']} x [{c['prompt']},{c['output']}]" for c in result["cases"]]
        axes.set_xticks(ticks, names_of_cases)
        axes.set_title(f"{what} per second, median, least and largest")
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(names), fontsize=8
    )


def _curve(figure: Figure, result: Result) -> None:
    """Lines over what the curve runs along, one per engine and batch size."""
    first, second = figure.subplots(1, 2)
    curve = result["curve"]
    if curve == "prompt":
        panels = (
            (first, "prefill_tokens_per_s", "prompt tokens per second"),
            (second, "first_token_ms", "time to the first token (ms)"),
        )
    else:
        panels = (
            (first, "decode_tokens_per_s", "new tokens per second, all rows"),
            (second, "share_of_bandwidth", "share of the memory bandwidth"),
        )
    batches = [None] if curve == "batch" else sorted({c["batch"] for c in result["cases"]})
    lines = [(name, batch) for name in result["engines"] for batch in batches]
    for axes, key, what in panels:
        for i, (name, batch) in enumerate(lines):
            cases = [c for c in result["cases"] if name in c["summary"]]
            cases = [c for c in cases if batch in (None, c["batch"])]
            xs = [_along(curve, c) for c in cases]
            values = [c["summary"][name][key] for c in cases]
            text = label(dict(result), name) + (f", batch {batch}" if batch else "")
            middle = [v["median"] for v in values]
            axes.plot(xs, middle, marker=_MARKERS[i % len(_MARKERS)], color=f"C{i}", label=text)
            low, high = [v["min"] for v in values], [v["max"] for v in values]
            axes.fill_between(xs, low, high, color=f"C{i}", alpha=0.2)
        _power_axis(axes, sorted({_along(curve, c) for c in result["cases"]}), _AXES[curve])
        axes.set_title(what)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)


def _along(curve: str, case: Mapping[str, Any]) -> int:
    """Where a case lies on its curve."""
    if curve == "context":
        return int(case["prompt"] + case["output"])
    return int(case[curve])


def _power_axis(axes: Axes, values: Sequence[int], what: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()
    axes.set_xlabel(what)


def _requests(figure: Figure, result: Result) -> None:
    """Rate and waiting times over the number of requests."""
    first, second = figure.subplots(1, 2)
    for i, name in enumerate(result["engines"]):
        cases = [case for case in result["cases"] if name in case["runs"]]
        xs = [case["requests"] for case in cases]
        runs = [median_run(case["runs"][name]) for case in cases]
        marker, text = _MARKERS[i % len(_MARKERS)], label(dict(result), name)
        rates = [run["output_tokens_per_s"] for run in runs]
        first.plot(xs, rates, marker=marker, color=f"C{i}", label=text)
        for style, p in (("-", "p50"), (":", "p99")):
            second.plot(
                xs, [run["first_token_ms"][p] for run in runs],
                style, marker=marker, color=f"C{i}", label=f"{text}, {p}",
            )  # fmt: skip
    first.set_title("new tokens per second")
    second.set_title("arrival to first token (ms)")
    for axes in (first, second):
        axes.set_xscale("log")
        axes.set_xlabel(f"requests, {result['arrivals_per_s']:g} per second")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)


def _serve(figure: Figure, result: Result) -> None:
    """Throughput, time to the first token and time between tokens over the load."""
    axes = figure.subplots(1, 3)
    (kind,) = {name for case in result["cases"] for name in case["load"]}
    for i, name in enumerate(result["engines"]):
        cases = [case for case in result["cases"] if case["runs"][name]["answered"]]
        xs = [case["load"][kind] for case in cases]
        runs = [case["runs"][name] for case in cases]
        marker, text = _MARKERS[i % len(_MARKERS)], label(dict(result), name)
        rates = [run["output_tokens_per_s"] for run in runs]
        axes[0].plot(xs, rates, marker=marker, color=f"C{i}", label=text)
        for panel, key in ((axes[1], "first_token_ms"), (axes[2], "inter_token_ms")):
            for style, p in (("-", "p50"), ("--", "p90"), (":", "p99")):
                ys = [run[key][p] if run[key] else 0.0 for run in runs]
                panel.plot(xs, ys, style, marker=marker, color=f"C{i}", label=f"{text}, {p}")
    titles = ("new tokens per second", "time to the first token (ms)", "time between tokens (ms)")
    what = {"arrivals_per_s": "requests per second", "concurrency": "requests at a time"}[kind]
    for panel, text in zip(axes, titles, strict=True):
        panel.set_title(text)
        panel.set_xlabel(what)
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=8)


def _overhead(figure: Figure, result: Result) -> None:
    """Parts of a step; time per request of two queues."""
    first, second = figure.subplots(1, 2)
    parts = {k: v for k, v in result["step"]["parts_ms"].items() if k != "model"}
    total = result["step"]["total_ms"]
    first.barh(list(parts), list(parts.values()))
    first.set_title(f"beside the model (ms of {total:.1f} ms per step)")
    queue = result["queue"]
    for key, what in (("add_s", "queueing"), ("steps_s", "steps")):
        values = [size[key] / size["requests"] * 1e6 for size in queue]
        second.plot([size["requests"] for size in queue], values, "o-", label=what)
    second.set_title("µs per request of a queue")
    second.set_xscale("log")
    second.set_xlabel("requests queued at once")
    second.set_ylim(bottom=0)
    second.legend(fontsize=8)
