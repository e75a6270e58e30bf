# SPDX-License-Identifier: Apache-2.0
"""Computes rates, percentiles, shares of the machine's limits and ratios from token times.

Every engine returns the time of each token of each row, so all figures are computed alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from benchmark.arguments import Case
from gptneox.config.model import ModelConfig
from gptneox.evaluation.report import percentile
from gptneox.evaluation.timing import prefill_flops
from gptneox.weights.formats import FloatFormat, Formats, split_name
from gptneox.weights.size import HEAD_NAME, ModelSize, find_kv_format, full_shapes

# Metrics of a run, of which summary and ratios are made.
RATES = ("prefill_tokens_per_s", "decode_tokens_per_s")
COMPARED = (*RATES, "peak_bytes")
SUMMARIZED = (*COMPARED, "first_token_ms", "share_of_bandwidth", "share_of_matmul")
Numbers = dict[str, float]
_MS_DIGITS = 4


def run_figures(answer: Mapping[str, Any], case: Case) -> dict[str, Any]:
    """One run.

    Prefill ends when the last row has its first token. The decode rate counts the tokens after
    that moment, over the time from it to the end.
    """
    times: list[list[float]] = answer["times"]
    prefill_s = max(row[0] for row in times)
    end_s = max(row[-1] for row in times)
    num_decoded = sum(t > prefill_s for row in times for t in row)
    return {
        "first_token_ms": median(row[0] for row in times) * 1e3,
        "prefill_s": prefill_s,
        "seconds": end_s,
        "prefill_tokens_per_s": case.batch * case.prompt / prefill_s,
        "decode_tokens_per_s": num_decoded / (end_s - prefill_s),
        "inter_token_ms": intervals_ms(times),
        "peak_bytes": answer["peak_bytes"],
        "first_token_ids": [row[0] for row in answer["token_ids"]],
    }


def intervals_ms(times: Sequence[Sequence[float]]) -> list[float]:
    """Times between a row's tokens; rows with equal times count once."""
    rows = {tuple(row) for row in times}
    return [round((b - a) * 1e3, _MS_DIGITS) for row in sorted(rows) for a, b in pairwise(row)]


class StoredBits(FloatFormat):
    """Weights of so many bits each, their scales included."""

    def __init__(self, bits: float) -> None:
        self.bits = bits

    def num_bytes(self, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> int:
        """Whatever `dtype` is."""
        return round(num_outputs * num_inputs * self.bits / 8)


def stored_bits(config: ModelConfig, layers: float, head: float) -> Formats:
    """Formats of a model whose linear layers, and whose head, have so many bits for a weight."""
    linear = [split_name(name)[0] for name, shape in full_shapes(config).items() if len(shape) == 2]
    sizes = {name: StoredBits(layers) for name in linear if ".layers." in name}
    return sizes | {split_name(HEAD_NAME)[0]: StoredBits(head)}


def size_of(
    config: ModelConfig,
    dtype: str,
    kv_cache_dtype: str = "auto",
    formats: Formats | None = None,
) -> ModelSize:
    """Bytes of a model whose weights are in `dtype`, as its cache is, unless told otherwise."""
    torch_dtype = getattr(torch, dtype)
    kv_format = find_kv_format(kv_cache_dtype, config, torch_dtype)
    return ModelSize(config, torch_dtype, kv_format, formats=formats or {})


def shares(
    run: Mapping[str, Any], case: Case, size: ModelSize, limits: Mapping[str, float]
) -> Numbers:
    """Decode's share of the memory bandwidth, and prefill's share of the matmul peak.

    Args:
        run: its figures.
        case: its shape.
        size: the bytes that the engine reads.
        limits: "bandwidth" in bytes per second, "matmul" in FLOP per second.
    """
    context = case.prompt + case.output / 2
    num_bytes = size.decode_bytes(case.batch, context)
    step_s = case.batch / run["decode_tokens_per_s"]
    flops = prefill_flops(size.config, case.batch, case.prompt)
    return {
        "share_of_bandwidth": num_bytes / step_s / limits["bandwidth"],
        "share_of_matmul": flops / run["prefill_s"] / limits["matmul"],
    }


def spread(values: Sequence[float]) -> Numbers:
    """Median, least and largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def summarize(runs: Sequence[Mapping[str, Any]]) -> dict[str, Numbers]:
    """All runs of one engine in one case; percentiles of the intervals are over all of them."""
    summary = {name: spread([run[name] for run in runs]) for name in SUMMARIZED}
    intervals = [ms for run in runs for ms in run["inter_token_ms"]]
    summary["inter_token_ms"] = {
        "p50": percentile(intervals, 50),
        "p99": percentile(intervals, 99),
    }
    return summary


def ratios(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> dict[str, Numbers]:
    """Ours / theirs, of runs of the same round, which ran one after the other."""
    return {
        name: spread([a[name] / b[name] for a, b in zip(ours, theirs, strict=True)])
        for name in COMPARED
    }


def agreement(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> float:
    """Share of the rows for which both chose the same first token: is it the same model?"""
    same = [
        x == y
        for a, b in zip(ours, theirs, strict=True)
        for x, y in zip(a["first_token_ids"], b["first_token_ids"], strict=True)
    ]
    return same.count(True) / len(same)


def arrival_figures(
    answer: Mapping[str, Any], requests: Sequence[tuple[float, list[int], int]]
) -> dict[str, Any]:
    """One run of requests that arrived over time; their first token counts from their arrival."""
    times: list[list[float]] = answer["times"]
    firsts = [row[0] - at for row, (at, _, _) in zip(times, requests, strict=True)]
    waits = intervals_ms(times) or [0.0]
    seconds = max(row[-1] for row in times) - requests[0][0]
    return {
        "seconds": seconds,
        "output_tokens_per_s": sum(map(len, times)) / seconds,
        "prompt_tokens_per_s": sum(len(prompt) for _, prompt, _ in requests) / seconds,
        "first_token_ms": {f"p{p}": percentile(firsts, p) * 1e3 for p in (50, 99)},
        "inter_token_ms": {f"p{p}": percentile(waits, p) for p in (50, 99)},
        "peak_bytes": answer["peak_bytes"],
    }
