# SPDX-License-Identifier: Apache-2.0
"""Three pictures of a performance result; only loaded where matplotlib is installed."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gptneox.config.files import read_text
from gptneox.evaluation.report import title
from gptneox.files import write_file

Case = Mapping[str, Any]
_MARKERS = "osD^vP*X"
_RC = {"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 1.6}


def write_plots(data: Path, result: Mapping[str, Any]) -> list[Path]:
    """Draw latency against length, throughput against batch, and the roofline.

    Args:
        data: the JSON file; pictures lie beside it, and so do the results of other batch sizes.
        result: its content.

    Returns:
        The pictures; one whose times were not measured (detail without TIMEIT=1) is left out.
    """
    if not any(case["first_ms"] for case in result["cases"]):
        return []
    files = []
    drawings: dict[str, Callable[[Any], None]] = {
        "latency": lambda figure: _latency(figure, result),
        "throughput": lambda figure: _throughput(figure, _same_model(data, result), result),
        "roofline": lambda figure: _roofline(figure, result),
    }
    with mpl.rc_context(_RC):
        for name, draw in drawings.items():
            figure = Figure(figsize=(11, 5.2), dpi=110, layout="constrained")
            draw(figure)
            path = data.with_name(f"{data.stem}_{name}.png")
            picture = io.BytesIO()
            figure.savefig(picture, format="png")
            write_file(path, picture.getvalue())
            files.append(path)
    return files


def _same_model(data: Path, result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """This result and others beside it that differ in nothing but batch size and cases."""
    same = ("format", "model_name", "device", "dtype", "path", "world_size", "mode", "threads")
    found: dict[int, Mapping[str, Any]] = {}
    for path in sorted(data.parent.glob("*.json"), key=lambda p: p.stat().st_mtime_ns):
        try:
            other = json.loads(read_text(path))
        except (ValueError, OSError):
            continue
        if isinstance(other, dict) and all(other.get(key) == result[key] for key in same):
            found[other["batch_size"]] = other  # the newest of each batch size
    found[result["batch_size"]] = result
    return [found[size] for size in sorted(found)]


def _head(figure: Figure, what: str, result: Mapping[str, Any]) -> None:
    figure.suptitle(f"{what}\n{title(result)}", fontsize=11)


def _length_axis(axes: Axes, lengths: Seq[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(lengths)), [str(n) for n in sorted(set(lengths))])
    axes.minorticks_off()
    axes.set_xlabel(label)


def _latency(figure: Figure, result: Mapping[str, Any]) -> None:
    """First token against input length; later tokens against input length, per output length."""
    first, later = figure.subplots(1, 2)
    cases: list[Case] = result["cases"]
    batch = f"batch {result['batch_size']}"
    _head(figure, f"Latency against length, {batch}", result)
    by_input: dict[int, list[float]] = defaultdict(list)
    for case in cases:
        by_input[case["input_len"]].append(case["first_ms"])
    lengths = sorted(by_input)
    means = [sum(by_input[n]) / len(by_input[n]) for n in lengths]
    first.plot(lengths, means, "o-", color="C0", label="mean over the cases")
    first.fill_between(
        lengths, [min(by_input[n]) for n in lengths], [max(by_input[n]) for n in lengths],
        color="C0", alpha=0.2, label="fastest to slowest case",
    )  # fmt: skip
    first.set_title("Time to the first token (prefill)")
    first.set_ylabel("milliseconds")
    _length_axis(first, lengths, "input length (tokens)")
    outputs = sorted({case["output_len"] for case in cases})
    for i, output_len in enumerate(outputs):
        line = sorted((c for c in cases if c["output_len"] == output_len), key=_input_len)
        timed = [c for c in line if c["inter_token_ms"]]
        marker = _MARKERS[i % len(_MARKERS)]
        later.plot(
            [c["input_len"] for c in timed],
            [c["inter_token_ms"]["median"] for c in timed],
            marker=marker, color=f"C{i}", label=f"median, {output_len} tokens out",
        )  # fmt: skip
        later.plot(
            [c["input_len"] for c in timed],
            [c["inter_token_ms"]["p99"] for c in timed],
            linestyle=":", marker="_", color=f"C{i}",
        )  # fmt: skip
    later.plot([], [], "k:", label="dotted: 99 % of the tokens are faster")
    later.set_title("Time of each later token (decode)")
    later.set_ylabel("milliseconds per token")
    _length_axis(later, [c["input_len"] for c in cases], "input length (tokens)")
    for axes in (first, later):
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)


def _input_len(case: Case) -> int:
    return int(case["input_len"])


def _throughput(figure: Figure, results: Seq[Mapping[str, Any]], result: Mapping[str, Any]) -> None:
    """Generated tokens per second against rows per batch, a line per case."""
    axes = figure.subplots()
    _head(figure, "Throughput against batch size", result)
    lines: dict[tuple[int, int], list[Case]] = defaultdict(list)
    for one in results:
        for case in one["cases"]:
            if case["decode_tokens_per_s"]:
                lines[case["input_len"], case["output_len"]].append(case)
    for i, ((input_len, output_len), cases) in enumerate(sorted(lines.items())):
        axes.plot(
            [c["batch_size"] for c in cases],
            [c["decode_tokens_per_s"] for c in cases],
            marker=_MARKERS[i % len(_MARKERS)],
            label=f"{input_len} in, {output_len} out",
        )
    sizes = [r["batch_size"] for r in results]
    _length_axis(axes, sizes, "batch size (rows generated side by side)")
    axes.set_ylabel("generated tokens per second, all rows")
    axes.set_ylim(bottom=0)
    if len(sizes) == 1:
        axes.set_title(
            "one batch size so far: results of others in this folder are drawn as lines", fontsize=9
        )
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)


def _roofline(figure: Figure, result: Mapping[str, Any]) -> None:
    """What each phase reaches, under the two limits measured on this device."""
    axes = figure.subplots()
    _head(figure, f"Roofline of one rank, batch {result['batch_size']}", result)
    peak = result["measured_matmul_tflop_per_s"]
    unit, factor = ("TFLOP/s", 1.0) if peak >= 1 else ("GFLOP/s", 1e3)
    peak *= factor
    bandwidth = result["measured_bandwidth_gb_per_s"] / 1e3 * factor  # TB/s x FLOP/B = TFLOP/s
    points: dict[str, list[tuple[float, float, str]]] = {"prefill": [], "decode": []}
    for case in result["cases"]:
        name = f"{case['input_len']}/{case['output_len']}"
        for phase, found in points.items():
            x, y = case[f"{phase}_flop_per_byte"], case[f"{phase}_tflop_per_s"]
            if x and y:
                found.append((x, y * factor, name))
    ridge = peak / bandwidth
    xs = [x for found in points.values() for x, _, _ in found]
    low, high = min([*xs, ridge]) / 3, max([*xs, ridge]) * 4
    axes.plot(
        [low, ridge], [low * bandwidth, peak], color="C3",
        label=f"memory bandwidth, measured: {bandwidth / factor * 1e3:.1f} GB/s",
    )  # fmt: skip
    axes.plot(
        [ridge, high], [peak, peak], color="C4",
        label=f"matrix products, measured: {peak:.3g} {unit}",
    )  # fmt: skip
    axes.axvline(ridge, color="grey", linestyle="--", linewidth=1)
    for i, (phase, found) in enumerate(points.items()):
        axes.plot(
            [x for x, _, _ in found], [y for _, y, _ in found],
            linestyle="", marker=_MARKERS[i], color=f"C{i}", markersize=7,
            label=f"{phase} of a case (lowest and highest named in/out)",
        )  # fmt: skip
        ordered = sorted(found, key=lambda point: point[1])
        for x, y, name in dict.fromkeys([*ordered[:1], *ordered[-1:]]):
            axes.annotate(name, (x, y), textcoords="offset points", xytext=(7, -3), fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_xlabel("operations per byte read from memory (FLOP/B)")
    axes.set_ylabel(f"operations per second ({unit})")
    axes.set_title(
        "left of the dashed line memory limits the speed, right of it arithmetic", fontsize=9
    )
    axes.legend(fontsize=8, loc="lower right")
