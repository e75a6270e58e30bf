# SPDX-License-Identifier: Apache-2.0
"""`--task performance`: how fast a checkpoint runs on this device, case by case."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Sequence as Seq
from dataclasses import astuple, dataclass
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from gptneox.cli import Settings
from gptneox.config.errors import ConfigError
from gptneox.devices.device import Device
from gptneox.evaluation.loading import Case, load_stopwatch
from gptneox.evaluation.performance_result import (
    CaseResult,
    PerformanceResult,
    Rates,
    TokenTimes,
    json_path,
    summarize,
)
from gptneox.evaluation.report import say, versions
from gptneox.evaluation.timing import (
    Stopwatch,
    Timing,
    decode_flops,
    fits_cache,
    max_over_ranks,
    prefill_flops,
    random_prompts,
    read_limit,
)
from gptneox.files import check_writable, is_regular, safe_name, write_file
from gptneox.parallel import TensorParallelGroup
from gptneox.session import start
from gptneox.weights.load import find_part

logger = logging.getLogger(__name__)

# Flags that [performance] decides, or that would do nothing here.
_REFUSED_FLAGS = (
    "input_texts", "input_ids", "interactive", "stream", "output_file", "ignore_eos", "temperature",
    "top_k", "top_p", "repetition_penalty", "seed", "stop", "stop_token_ids", "max_output_length",
    "max_input_length", "max_batch_size", "enable_prefix_caching",
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What one rank reaches while all ranks measure."""

    bandwidth: float  # bytes per second
    matmul: float  # FLOP per second


@dataclass(frozen=True)
class Method:
    """How a case is measured."""

    # "normal": the first token's time is that of a run of one token; "detail": of its forward.
    mode: str
    split: bool  # detail only: time each forward by itself; else the times of a token stay 0
    repeat: int = 1  # measured runs
    detokenize: bool = True  # as part of the response time


def run(settings: Settings) -> None:
    """Measure every case, write the CSV, the JSON and the plots, print the table.

    Raises:
        ValueError, OSError, RuntimeError: with a message for the user.
    """
    for name in _REFUSED_FLAGS:
        if settings.given.get(name):
            raise ConfigError(f"--{name} does not go with --task performance; see [performance]")
    section = settings.performance
    cases = section.cases()
    check_cases(settings, cases)
    split = section.perf_mode == "detail" and settings.environment.timeit
    if section.perf_mode == "detail" and not split:
        logger.warning("perf_mode is detail, but TIMEIT is not 1: the times of a token stay 0")
    device, group = start(settings)
    target = Path(section.save_file_name or csv_name(settings, device))
    if group.rank == 0:
        check_result_files(target)
    stopwatch = load_stopwatch(settings, device, group, cases, section.batch_size)
    warm_up(stopwatch, section.batch_size, cases)
    limits = measure_limits(stopwatch)
    method = Method(section.perf_mode, split, section.repeat, not section.skip_decode)
    results = measure_cases(stopwatch, section.batch_size, cases, limits, method)
    if group.rank > 0:
        return
    result = make_result(settings, stopwatch, limits, results)
    say(result.table())
    for note in result.notes:
        say(f"note: {note}")
    say("files: " + ", ".join(str(path) for path in write_result(target, result)))


def check_cases(settings: Settings, cases: Seq[Case]) -> None:
    """Refuse what cannot be run or measured, before a weight is read.

    Raises:
        ConfigError: a case beyond the model's positions, or without a second token to time.
    """
    environment = settings.environment
    ranks = TensorParallelGroup(environment.rank, environment.world_size)
    is_flash = settings.attention == "flash"
    _, config = find_part(settings.model_path, ranks, prefer_parts=is_flash)
    limit = config.positions(settings.engine.max_position_embeddings)
    for input_len, output_len in cases:
        if input_len + output_len > limit:
            raise ConfigError(
                f"[performance] case [{input_len},{output_len}] needs {input_len + output_len} "
                f"positions, the model has {limit}; take it out of case_pair, or lower "
                "max_len_exp"
            )
        if output_len < 2 and settings.performance.perf_mode == "normal":
            raise ConfigError(
                f"[performance] case [{input_len},{output_len}]: perf_mode normal times the "
                "tokens after the first, so the output length must be at least 2"
            )


# -- measuring -----------------------------------------------------------------------------------


def warm_up(stopwatch: Stopwatch, batch_size: int, cases: Seq[Case]) -> None:
    """One run with the longest input and the longest output, as far as both fit together.

    Before each case it is done again with two tokens: a device prepares for each shape once.
    """
    input_len = max(i for i, _ in cases)
    room = max(i + o for i, o in cases) - input_len  # the cache is sized for the largest sum
    output_len = max(1, min(room, max(o for _, o in cases)))
    stopwatch.run(random_prompts(stopwatch, batch_size, input_len, seed=0), output_len)


def measure_limits(stopwatch: Stopwatch) -> Limits:
    """Bandwidth and matrix peak, measured by all ranks at once because they may share them."""
    device = stopwatch.device
    stopwatch.group.barrier()
    bandwidth, _ = read_limit(stopwatch.engine.model)
    stopwatch.group.barrier()
    return Limits(bandwidth, device.measure_matmul(stopwatch.dtype))


def measure_cases(
    stopwatch: Stopwatch, batch_size: int, cases: Seq[Case], limits: Limits, method: Method
) -> list[CaseResult]:
    """Every case, with a progress bar on a terminal of rank 0."""
    results = []
    hide = stopwatch.group.rank > 0 or not sys.stderr.isatty()
    # A prompt token takes about 1/16 of a new one, so the bar's remaining time is about right.
    work = [method.repeat * (i / 16 + o) for i, o in cases]
    with tqdm(total=round(sum(work)), desc="cases", leave=False, disable=hide, unit="tok") as bar:
        for (input_len, output_len), amount in zip(cases, work, strict=True):
            bar.set_postfix_str(f"[{input_len},{output_len}]")
            warm_up(stopwatch, batch_size, [(input_len, min(2, output_len))])
            results.append(
                measure_case(stopwatch, batch_size, (input_len, output_len), limits, method)
            )
            bar.update(round(amount))
    return results


def measure_case(
    stopwatch: Stopwatch, batch_size: int, case: Case, limits: Limits, method: Method
) -> CaseResult:
    """Run a case as often as `method` says; times are means over the runs, maxima over ranks."""
    input_len, output_len = case
    runs: list[TokenTimes] = []
    inter_token_ms: list[float] = []
    parts: list[dict[str, float]] = []
    for i in range(method.repeat):
        prompts = random_prompts(stopwatch, batch_size, input_len, seed=i + 1)
        if method.mode == "normal":
            single = stopwatch.run(prompts, 1, detokenize=False)
            timing = stopwatch.run(prompts, output_len, detokenize=method.detokenize)
            times = normal_times(single, timing, output_len)
        else:
            timing = stopwatch.run(
                prompts, output_len, split=method.split, detokenize=method.detokenize
            )
            times = detail_times(timing)
        runs.append(TokenTimes(*max_over_ranks(stopwatch, astuple(times))))
        if method.mode == "normal" or method.split:
            inter_token_ms += [step.total_s * 1e3 for step in timing.decode_steps]
        parts.append(timing.parts_ms())
    columns = zip(*map(astuple, runs), strict=True)
    means = TokenTimes(*(sum(column) / method.repeat for column in columns))
    first_ms = [times.first_ms for times in runs]
    return CaseResult(
        batch_size,
        input_len,
        output_len,
        means,
        rates(stopwatch, batch_size, case, means, limits),
        first_token_ms=summarize(first_ms if any(first_ms) else []),
        inter_token_ms=summarize(inter_token_ms),
        parts_ms={key: sum(part[key] for part in parts) / method.repeat for key in parts[0]},
    )


def normal_times(single: Timing, timing: Timing, output_len: int) -> TokenTimes:
    """T1 of a run of one token, and (Tn - T1) / (n - 1)."""
    first, whole = single.generate_s, timing.generate_s
    return TokenTimes(
        timing.response_s,
        first_ms=first * 1e3,
        next_ms=(whole - first) / (output_len - 1) * 1e3,
    )


def detail_times(timing: Timing) -> TokenTimes:
    """The first forward, and means over the later steps; zeros when nothing was split."""
    if not timing.has_split:
        return TokenTimes(timing.response_s)
    steps = timing.decode_steps
    count = max(1, len(steps))
    return TokenTimes(
        timing.response_s,
        first_ms=sum(s.forward_s for s in timing.prefill_steps) * 1e3,
        next_ms=sum(s.forward_s for s in steps) / count * 1e3,
        pre_ms=sum(s.pre_s for s in steps) / count * 1e3,
        post_ms=sum(s.post_s for s in steps) / count * 1e3,
    )


def rates(
    stopwatch: Stopwatch, batch_size: int, case: Case, times: TokenTimes, limits: Limits
) -> Rates:
    """Tokens, bytes and operations per second, and their share of what the device reaches.

    Rates of decoding count whole steps; bytes and operations are those of one rank.
    """
    config, size, ranks = stopwatch.config, stopwatch.size, stopwatch.group.world_size
    input_len, output_len = case
    prefill: dict[str, float] = {}
    decode: dict[str, float] = {}
    if first_s := times.first_ms / 1e3:
        flops = prefill_flops(config, batch_size, input_len) / ranks
        weights = size.decode_bytes(batch_size, input_len)
        prefill = {
            "prefill_tokens_per_s": batch_size * input_len / first_s,
            "prefill_tflop_per_s": flops / first_s / 1e12,
            "prefill_share_of_matmul": flops / first_s / limits.matmul,
            "prefill_flop_per_byte": flops / weights,
        }
    step_s = times.step_ms / 1e3
    if step_s > 0 and output_len > 1:
        context = input_len + output_len / 2  # mean over the steps that follow the first token
        num_bytes = size.decode_bytes(batch_size, context)
        flops = decode_flops(config, batch_size, context) / ranks
        decode = {
            "decode_tokens_per_s": batch_size / step_s,
            "decode_gb_per_s": num_bytes / step_s / 1e9,
            "decode_share_of_bandwidth": num_bytes / step_s / limits.bandwidth,
            "decode_tflop_per_s": flops / step_s / 1e12,
            "decode_flop_per_byte": flops / num_bytes,
        }
    return Rates(**prefill, **decode)


# -- results -------------------------------------------------------------------------------------


def make_result(
    settings: Settings, stopwatch: Stopwatch, limits: Limits, cases: list[CaseResult]
) -> PerformanceResult:
    """The cases with the provenance that is stored with every result."""
    section, device, config = settings.performance, stopwatch.device, stopwatch.config
    notes = make_notes(settings, stopwatch)
    if any(case.times.next_ms < 0 for case in cases):
        notes.append(
            "a run of one token took longer than the whole case, so the machine was disturbed: "
            "measure again, or raise [performance] repeat"
        )
    return PerformanceResult(
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        model_name=section.model_name,
        model_path=str(settings.model_path),
        path=stopwatch.path,
        mode=section.perf_mode,
        batch_size=section.batch_size,
        repeat=section.repeat,
        detokenized=not section.skip_decode,
        device=device.describe(),
        device_type=device.name,
        world_size=stopwatch.group.world_size,
        threads=torch.get_num_threads() if device.torch_device.type == "cpu" else None,
        dtype=str(stopwatch.dtype).removeprefix("torch."),
        file_dtype=config.dtype + (stopwatch.size.scheme and f"_{stopwatch.size.scheme}"),
        num_parameters=config.num_parameters,
        measured_bandwidth_gb_per_s=limits.bandwidth / 1e9,
        measured_matmul_tflop_per_s=limits.matmul / 1e12,
        versions=versions(),
        notes=notes,
        cases=cases,
    )


def make_notes(settings: Settings, stopwatch: Stopwatch) -> list[str]:
    """What a reader of the figures has to know."""
    section, config = settings.performance, stopwatch.config
    dtype = str(stopwatch.dtype).removeprefix("torch.")
    notes = []
    if config.dtype != dtype:
        notes.append(f"{config.dtype} weights were computed in {dtype}")
    if stopwatch.size.kv_format.name != dtype:
        notes.append(f"keys and values were cached in {stopwatch.size.kv_format.name}")
    if stopwatch.size.scheme:
        notes.append(f"the weights are {stopwatch.size.scheme}; GB/s counts their bytes")
    weights = stopwatch.size.decode_weight_bytes
    if fits_cache(stopwatch.engine.model):
        notes.append(
            f"the weights of a rank ({weights / 1e6:.0f} MB) fit the processor's cache "
            f"({stopwatch.device.cache_bytes() / 1e6:.0f} MB), so the bandwidth is the cache's"
        )
    if section.perf_mode == "detail" and not settings.environment.timeit:
        notes.append("TIMEIT was not 1, so no token was timed")
    if (
        stopwatch.path == "flash"
        and section.perf_mode == "normal"
        and stopwatch.device.cache_bytes() == 0
    ):
        notes.append("inter_token_ms is taken between loops of generate, without waiting")
    return notes


def csv_name(settings: Settings, device: Device) -> str:
    """Name of the result file, in the current directory."""
    section = settings.performance
    return safe_name(
        f"performance_test_npu_{section.model_name}_{device.describe()}_bs{section.batch_size}.csv"
    )


def check_result_files(path: Path) -> None:
    """Refuse before the measuring what `write_result` could not write, or should not.

    Raises:
        OSError: see `check_writable`.
        ConfigError: the JSON would replace a file that is not a result.
    """
    check_writable(path)
    if not is_regular(path):
        return
    data = json_path(path)
    check_writable(data)
    try:
        if data.is_file():
            PerformanceResult.from_json(data.read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"the JSON beside {path} would replace {data}, which is no result of --task "
            "performance; choose another [performance] save_file_name"
        ) from error


def write_result(path: Path, result: PerformanceResult) -> list[Path]:
    """Write CSV, JSON and plots; returns the files. A device or a pipe takes the CSV alone."""
    write_file(path, result.to_csv())
    if not is_regular(path):
        return [path]
    data = json_path(path)
    write_file(data, result.to_json())
    if importlib.util.find_spec("matplotlib") is None:
        say("no plots: matplotlib is not installed; pip install .[plot] adds it")
        return [path, data]
    from gptneox.evaluation.plots import write_plots

    return [path, data, *write_plots(data, result)]
