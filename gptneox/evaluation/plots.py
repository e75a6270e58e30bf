# SPDX-License-Identifier: Apache-2.0
"""Three pictures of a performance result; only loaded where matplotlib is installed."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gptneox.config.files import read_text
from gptneox.evaluation.performance_result import CaseResult, PerformanceResult
from gptneox.files import write_file

_MARKERS = "osD^vP*X"
_RC = {"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 1.6}


def write_plots(data: Path, result: PerformanceResult) -> list[Path]:
    """Draw latency against length, throughput against batch size, and the roofline.

    Args:
        data: the JSON file of `result`. The pictures are written to its folder, where results of
            other batch sizes are looked for.
        result: what is drawn.

    Returns:
        The pictures; none where no times were measured (detail without TIMEIT=1).
    """
    if not any(case.times.first_ms for case in result.cases):
        return []
    files = []
    drawings: dict[str, Callable[[Any], None]] = {
        "latency": lambda figure: _latency(figure, result),
        "throughput": lambda figure: _throughput(figure, _other_batches(data, result), result),
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


def _other_batches(data: Path, result: PerformanceResult) -> list[PerformanceResult]:
    """This result and those in its folder that differ only in batch size and cases."""
    same = ("model_name", "device", "dtype", "path", "world_size", "mode", "threads")
    newest: dict[int, PerformanceResult] = {}  # of each batch size
    for path in sorted(data.parent.glob("*.json"), key=lambda p: p.stat().st_mtime_ns):
        try:
            other = PerformanceResult.from_json(read_text(path))
        except (ValueError, TypeError, OSError):  # some other JSON file
            continue
        if all(getattr(other, name) == getattr(result, name) for name in same):
            newest[other.batch_size] = other
    newest[result.batch_size] = result
    return [newest[size] for size in sorted(newest)]


def _head(figure: Figure, what: str, result: PerformanceResult) -> None:
    figure.suptitle(f"{what}\n{result.title}", fontsize=11)


def _length_axis(axes: Axes, lengths: Seq[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(lengths)), [str(n) for n in sorted(set(lengths))])
    axes.minorticks_off()
    axes.set_xlabel(label)


def _latency(figure: Figure, result: PerformanceResult) -> None:
    """First token against input length; later tokens against input length, per output length."""
    _head(figure, f"Latency against length, batch {result.batch_size}", result)
    first, later = figure.subplots(1, 2)
    _first_token(first, result.cases)
    _later_tokens(later, result.cases)
    for axes in (first, later):
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)


def _first_token(axes: Axes, cases: Seq[CaseResult]) -> None:
    by_input: dict[int, list[float]] = defaultdict(list)
    for case in cases:
        by_input[case.input_len].append(case.times.first_ms)
    lengths = sorted(by_input)
    means = [sum(by_input[n]) / len(by_input[n]) for n in lengths]
    axes.plot(lengths, means, "o-", color="C0", label="mean over the cases")
    axes.fill_between(
        lengths, [min(by_input[n]) for n in lengths], [max(by_input[n]) for n in lengths],
        color="C0", alpha=0.2, label="fastest to slowest case",
    )  # fmt: skip
    axes.set_title("Time to the first token (prefill)")
    axes.set_ylabel("milliseconds")
    _length_axis(axes, lengths, "input length (tokens)")


def _later_tokens(axes: Axes, cases: Seq[CaseResult]) -> None:
    for i, output_len in enumerate(sorted({case.output_len for case in cases})):
        line = sorted(
            (case.input_len, case.inter_token_ms.median, case.inter_token_ms.p99)
            for case in cases
            if case.output_len == output_len and case.inter_token_ms
        )
        lengths = [n for n, _, _ in line]
        axes.plot(
            lengths, [median for _, median, _ in line],
            marker=_MARKERS[i % len(_MARKERS)], color=f"C{i}",
            label=f"median, {output_len} tokens out",
        )  # fmt: skip
        axes.plot(lengths, [p99 for _, _, p99 in line], linestyle=":", marker="_", color=f"C{i}")
    axes.plot([], [], "k:", label="dotted: 99 % of the tokens are faster")
    axes.set_title("Time of each later token (decode)")
    axes.set_ylabel("milliseconds per token")
    _length_axis(axes, [case.input_len for case in cases], "input length (tokens)")


def _throughput(figure: Figure, results: Seq[PerformanceResult], result: PerformanceResult) -> None:
    """Generated tokens per second against rows per batch, a line per case."""
    axes = figure.subplots()
    _head(figure, "Throughput against batch size", result)
    lines: dict[tuple[int, int], list[tuple[int, float]]] = defaultdict(list)
    for one in results:
        for case in one.cases:
            if rate := case.rates.decode_tokens_per_s:
                lines[case.input_len, case.output_len].append((case.batch_size, rate))
    for i, ((input_len, output_len), points) in enumerate(sorted(lines.items())):
        axes.plot(
            [size for size, _ in points],
            [rate for _, rate in points],
            marker=_MARKERS[i % len(_MARKERS)],
            label=f"{input_len} in, {output_len} out",
        )
    sizes = [r.batch_size for r in results]
    _length_axis(axes, sizes, "batch size (rows generated side by side)")
    axes.set_ylabel("generated tokens per second, all rows")
    axes.set_ylim(bottom=0)
    if len(sizes) == 1:
        axes.set_title(
            "one batch size so far: results of others in this folder are drawn as lines", fontsize=9
        )
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)


def _roofline(figure: Figure, result: PerformanceResult) -> None:
    """What each phase reaches, under the two limits measured on this device."""
    axes = figure.subplots()
    _head(figure, f"Roofline of one rank, batch {result.batch_size}", result)
    peak = result.measured_matmul_tflop_per_s
    unit, factor = ("TFLOP/s", 1.0) if peak >= 1 else ("GFLOP/s", 1e3)
    peak *= factor
    bandwidth = result.measured_bandwidth_gb_per_s / 1e3 * factor  # TB/s x FLOP/B = TFLOP/s
    phases = _roofline_points(result.cases, factor)
    ridge = peak / bandwidth
    xs = [x for points in phases.values() for x, _, _ in points]
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
    for i, (phase, points) in enumerate(phases.items()):
        axes.plot(
            [x for x, _, _ in points], [y for _, y, _ in points],
            linestyle="", marker=_MARKERS[i], color=f"C{i}", markersize=7,
            label=f"{phase} of a case (lowest and highest named in/out)",
        )  # fmt: skip
        ordered = sorted(points, key=lambda point: point[1])
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


def _roofline_points(
    cases: Seq[CaseResult], factor: float
) -> dict[str, list[tuple[float, float, str]]]:
    """FLOP per byte, `factor` x TFLOP per second, and in/out of each case, by phase."""
    phases: dict[str, list[tuple[float, float, str]]] = {"prefill": [], "decode": []}
    for case in cases:
        name, rates = f"{case.input_len}/{case.output_len}", case.rates
        if rates.prefill_flop_per_byte and rates.prefill_tflop_per_s:
            y = rates.prefill_tflop_per_s * factor
            phases["prefill"].append((rates.prefill_flop_per_byte, y, name))
        if rates.decode_flop_per_byte and rates.decode_tflop_per_s:
            y = rates.decode_tflop_per_s * factor
            phases["decode"].append((rates.decode_flop_per_byte, y, name))
    return phases
