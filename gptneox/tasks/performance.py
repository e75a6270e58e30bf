# SPDX-License-Identifier: Apache-2.0
"""`--task performance`: how fast a checkpoint runs on this device, case by case."""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gptneox.cli import Settings
from gptneox.config.errors import ConfigError
from gptneox.config.settings import EngineSection
from gptneox.devices.cache import FloatKV
from gptneox.devices.device import Device
from gptneox.engine.generation_config import NO_RULES
from gptneox.engine.paged import affordable_blocks, blocks_needed
from gptneox.evaluation import report
from gptneox.evaluation.timing import (
    Stopwatch,
    Timing,
    decode_flops,
    max_over_ranks,
    prefill_flops,
    random_prompts,
)
from gptneox.files import safe_name
from gptneox.parallel import TensorParallelGroup
from gptneox.session import load_engine, start
from gptneox.weights.load import find_part
from gptneox.weights.size import ModelSize

logger = logging.getLogger(__name__)

Case = tuple[int, int]  # input length, output length

# Flags that [performance] decides, or that would do nothing here.
_REFUSED_FLAGS = (
    "input_texts", "input_ids", "interactive", "stream", "output_file", "ignore_eos", "temperature",
    "top_k", "top_p", "repetition_penalty", "seed", "stop", "stop_token_ids", "max_output_length",
    "max_input_length", "max_batch_size", "enable_prefix_caching",
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What the device reaches, measured on all ranks at the same time; of one rank."""

    bandwidth: float  # bytes per second
    matmul: float  # FLOP per second


def run(settings: Settings) -> None:
    """Measure every case, write the CSV, the JSON and the plots, print the table.

    Raises:
        ValueError, OSError, RuntimeError: with a message for the user.
    """
    for name in _REFUSED_FLAGS:
        if settings.given.get(name):
            raise ConfigError(f"--{name} does not go with --task performance; see [performance]")
    section, environment = settings.performance, settings.environment
    cases = section.cases()
    check_cases(settings, cases)
    split = section.perf_mode == "detail" and environment.timeit
    if section.perf_mode == "detail" and not split:
        logger.warning("perf_mode is detail, but TIMEIT is not 1: the times of a token stay 0")
    device, group = start(settings)
    target = Path(section.save_file_name or csv_name(settings, device))
    if group.rank == 0:
        report.check_result_files(target)
    stopwatch = load(settings, device, group, cases, section.batch_size)
    is_first = group.rank == 0
    warm_up(stopwatch, section.batch_size, cases)
    limits = measure_limits(stopwatch)
    results: list[dict[str, Any]] = []
    hide = not (is_first and sys.stderr.isatty())
    work = [section.repeat * (i / 16 + o) for i, o in cases]  # so that the time left is about right
    with tqdm(total=round(sum(work)), desc="cases", leave=False, disable=hide, unit="tok") as bar:
        for case, amount in zip(cases, work, strict=True):
            bar.set_postfix_str(f"[{case[0]},{case[1]}]")
            warm_up(stopwatch, section.batch_size, [(case[0], min(2, case[1]))])
            results.append(
                measure_case(
                    stopwatch,
                    section.batch_size,
                    case,
                    limits,
                    mode=section.perf_mode,
                    split=split,
                    repeat=section.repeat,
                    detokenize=not section.skip_decode,
                )
            )
            bar.update(round(amount))
    if not is_first:
        return
    result = describe_run(settings, stopwatch, limits) | {"cases": results}
    if any(case["next_ms"] < 0 for case in results):
        result["notes"].append(
            "a run of one token took longer than the whole case, so the machine was disturbed: "
            "measure again, or raise [performance] repeat"
        )
    report.say(report.result_table(result))
    for note in result["notes"]:
        report.say(f"note: {note}")
    files = report.write_result(target, result)
    report.say("files: " + ", ".join(str(path) for path in files))


def csv_name(settings: Settings, device: Device) -> str:
    """Name of the result file, in the current directory."""
    section = settings.performance
    return safe_name(
        f"performance_test_npu_{section.model_name}_{device.describe()}_bs{section.batch_size}.csv"
    )


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


# -- loading and measuring -----------------------------------------------------------------------


def load(
    settings: Settings,
    device: Device,
    group: TensorParallelGroup,
    cases: Seq[Case],
    batch_size: int,
) -> Stopwatch:
    """The engine of the chosen path, with room for the largest case."""
    section = engine_section(settings, device, group, cases, batch_size)
    engine = load_engine(
        settings, device, group, section, with_tokenizer=not settings.performance.skip_decode
    )
    engine.rules = NO_RULES  # nothing may end a row of the length to measure
    return Stopwatch(engine)


def engine_section(
    settings: Settings,
    device: Device,
    group: TensorParallelGroup,
    cases: Seq[Case],
    batch_size: int,
) -> EngineSection:
    """[engine] with the batch and the lengths of the cases; no prompt may find itself cached."""
    section = replace(
        settings.engine,
        max_batch_size=batch_size,
        max_input_length=max(i for i, _ in cases),
        max_output_length=max(o for _, o in cases),
        enable_prefix_caching=False,
    )
    if section.num_blocks or settings.attention == "flash":
        return section
    # Exactly the blocks that are needed, where they fit; else the engine takes what there is.
    needed = max(blocks_needed([i] * batch_size, o, section.block_size) for i, o in cases)
    _, config = find_part(settings.model_path, group)
    dtype, _ = device.resolve_dtype(config.dtype, settings.model.dtype)
    size = ModelSize(config, dtype, FloatKV(dtype), group.world_size)
    free = device.memory().free - size.weight_bytes
    fits = needed <= affordable_blocks(section, size.token_bytes * section.block_size, free)
    return replace(section, num_blocks=needed if group.broadcast_object(fits) else 0)


def warm_up(stopwatch: Stopwatch, batch_size: int, cases: Seq[Case]) -> None:
    """One run with the longest input and the longest output, as far as both fit together.

    Before each case it is done again with two tokens: a device prepares for each shape once.
    """
    input_len = max(i for i, _ in cases)
    room = max(i + o for i, o in cases) - input_len  # what the cache has been made for
    output_len = max(1, min(room, max(o for _, o in cases)))
    stopwatch.run(random_prompts(stopwatch, batch_size, input_len, seed=0), output_len)


def measure_limits(stopwatch: Stopwatch) -> Limits:
    """Bandwidth and matrix peak, measured by all ranks at once because they may share them."""
    device = stopwatch.device
    stopwatch.group.barrier()
    bandwidth = device.measure_bandwidth()
    stopwatch.group.barrier()
    return Limits(bandwidth, device.measure_matmul(stopwatch.dtype))


def measure_case(
    stopwatch: Stopwatch,
    batch_size: int,
    case: Case,
    limits: Limits,
    *,
    mode: str,
    split: bool,
    repeat: int = 1,
    detokenize: bool = True,
) -> dict[str, Any]:
    """Run a case `repeat` times.

    Args:
        stopwatch: the loaded model.
        batch_size: rows.
        case: input and output length.
        limits: of the device.
        mode: "normal": the first token's time is that of a run of its own;
            "detail": it is that of the first forward.
        split: tell the forwards from what surrounds them (detail only; else times stay 0).
        repeat: measured runs.
        detokenize: as part of the response time.
    """
    input_len, output_len = case
    runs: list[dict[str, float]] = []
    first_ms: list[float] = []
    inter_token_ms: list[float] = []
    parts: list[dict[str, float]] = []
    for i in range(repeat):
        prompts = random_prompts(stopwatch, batch_size, input_len, seed=i + 1)
        if mode == "normal":
            single = stopwatch.run(prompts, 1, detokenize=False)
            timing = stopwatch.run(prompts, output_len, detokenize=detokenize)
            times = normal_times(single, timing, output_len)
        else:
            timing = stopwatch.run(prompts, output_len, split=split, detokenize=detokenize)
            times = detail_times(timing)
        values = max_over_ranks(stopwatch, list(times.values()))
        runs.append(dict(zip(times, values, strict=True)))
        first_ms.append(runs[-1]["first_ms"])
        if mode == "normal" or split:
            inter_token_ms += [step.total_s * 1e3 for step in timing.decode_steps]
        parts.append(timing.parts_ms())
    means = {key: sum(run[key] for run in runs) / repeat for key in runs[0]}
    return {
        "batch_size": batch_size,
        "input_len": input_len,
        "output_len": output_len,
        **means,
        "first_token_ms": report.summarize(first_ms if any(first_ms) else []),
        "inter_token_ms": report.summarize(inter_token_ms),
        "parts_ms": {key: sum(part[key] for part in parts) / repeat for key in parts[0]},
        **speed(stopwatch, batch_size, case, means, limits),
    }


def normal_times(single: Timing, timing: Timing, output_len: int) -> dict[str, float]:
    """T1 of a run of one token, and (Tn - T1) / (n - 1)."""
    first, whole = single.generate_s, timing.generate_s
    return {
        "response_s": timing.response_s,
        "first_ms": first * 1e3,
        "next_ms": (whole - first) / (output_len - 1) * 1e3,
        "pre_ms": 0.0,
        "post_ms": 0.0,
    }


def detail_times(timing: Timing) -> dict[str, float]:
    """The first forward, and means over the later steps; zeros when nothing was split."""
    steps = timing.decode_steps if timing.has_split else []
    count = max(1, len(steps))
    return {
        "response_s": timing.response_s,
        "first_ms": sum(s.forward_s for s in timing.prefill_steps) * 1e3,
        "next_ms": sum(s.forward_s for s in steps) / count * 1e3,
        "pre_ms": sum(s.pre_s for s in steps) / count * 1e3,
        "post_ms": sum(s.post_s for s in steps) / count * 1e3,
    }


def speed(
    stopwatch: Stopwatch, batch_size: int, case: Case, times: dict[str, float], limits: Limits
) -> dict[str, float | None]:
    """Tokens, bytes and operations per second, and their share of what the device reaches.

    Rates of decoding count whole steps; bytes and operations are those of one rank.
    """
    config, size, ranks = stopwatch.config, stopwatch.size, stopwatch.group.world_size
    input_len, output_len = case
    speeds: dict[str, float | None] = dict.fromkeys(report.SPEED_KEYS)
    if first_s := times["first_ms"] / 1e3:
        flops = prefill_flops(config, batch_size, input_len) / ranks
        weights = size.decode_bytes(batch_size, input_len)
        speeds["prefill_tokens_per_s"] = batch_size * input_len / first_s
        speeds["prefill_tflop_per_s"] = flops / first_s / 1e12
        speeds["prefill_share_of_matmul"] = flops / first_s / limits.matmul
        speeds["prefill_flop_per_byte"] = flops / weights
    step_s = (times["next_ms"] + times["pre_ms"] + times["post_ms"]) / 1e3
    if step_s > 0 and output_len > 1:
        context = input_len + output_len / 2  # mean over the steps that follow the first token
        num_bytes = size.decode_bytes(batch_size, context)
        flops = decode_flops(config, batch_size, context) / ranks
        speeds["decode_tokens_per_s"] = batch_size / step_s
        speeds["decode_gb_per_s"] = num_bytes / step_s / 1e9
        speeds["decode_share_of_bandwidth"] = num_bytes / step_s / limits.bandwidth
        speeds["decode_tflop_per_s"] = flops / step_s / 1e12
        speeds["decode_flop_per_byte"] = flops / num_bytes
    return speeds


# -- what the result says about itself -----------------------------------------------------------


def describe_run(settings: Settings, stopwatch: Stopwatch, limits: Limits) -> dict[str, Any]:
    """Everything that a figure must stand beside."""
    section, device = settings.performance, stopwatch.device
    dtype = str(stopwatch.dtype).removeprefix("torch.")
    config = stopwatch.config
    notes = []
    if config.dtype != dtype:
        notes.append(f"{config.dtype} weights were computed in {dtype}")
    weights = stopwatch.size.decode_weight_bytes
    cache = cache_bytes() if device.torch_device.type == "cpu" else 0
    if weights < cache:
        notes.append(
            f"the weights of a rank ({weights / 1e6:.0f} MB) fit the processor's cache "
            f"({cache / 1e6:.0f} MB), so decoding may exceed the memory bandwidth"
        )
    if section.perf_mode == "detail" and not settings.environment.timeit:
        notes.append("TIMEIT was not 1, so no token was timed")
    if stopwatch.path == "flash" and section.perf_mode == "normal" and not cache:
        notes.append("inter_token_ms is taken between loops of generate, without waiting")
    return {
        "format": report.FORMAT,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "model_name": section.model_name,
        "model_path": str(settings.model_path),
        "path": stopwatch.path,
        "mode": section.perf_mode,
        "batch_size": section.batch_size,
        "repeat": section.repeat,
        "detokenized": not section.skip_decode,
        "device": device.describe(),
        "device_type": device.name,
        "world_size": stopwatch.group.world_size,
        "threads": torch.get_num_threads() if device.torch_device.type == "cpu" else None,
        "dtype": dtype,
        "file_dtype": config.dtype,
        "num_parameters": config.num_parameters,
        "measured_bandwidth_gb_per_s": limits.bandwidth / 1e9,
        "measured_matmul_tflop_per_s": limits.matmul / 1e12,
        "versions": versions(),
        "notes": notes,
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that set the speed."""
    found = {"python": platform.python_version()}
    for package in distributions():
        name = package.metadata["Name"]
        if name and (name == "transformers" or name.split("_")[0].split("-")[0] == "torch"):
            found[name] = package.version
    return found


def cache_bytes() -> int:
    """The processor's last-level cache; 0 when the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
    return max(sizes)
