# SPDX-License-Identifier: Apache-2.0
"""--task performance and --task compare: the figures, the files, what is refused."""

from __future__ import annotations

import csv
import errno
import functools
import json
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support import checkpoints
from support.processes import clean_this_process, run_here
from support.tokenizers import write_tokenizer
from transformers import GenerationMixin

from gptneox.config.errors import FileError
from gptneox.config.model import ModelConfig
from gptneox.config.settings import EngineSection, PerformanceSection
from gptneox.devices import create, select
from gptneox.devices.cache import FloatKV
from gptneox.devices.device import Device
from gptneox.engine.generate import GenerateEngine
from gptneox.engine.paged import blocks_needed
from gptneox.evaluation.performance_result import (
    COLUMNS,
    FORMAT,
    PerformanceResult,
    Summary,
    summarize,
)
from gptneox.evaluation.report import percentile, share
from gptneox.evaluation.timing import (
    StepTime,
    Stopwatch,
    Timing,
    decode_flops,
    prefill_flops,
    random_prompts,
    read_limit,
)
from gptneox.parallel import TensorParallelGroup
from gptneox.tasks import performance
from gptneox.tasks.compare import comparison, read_result
from gptneox.tasks.performance import Limits, Method, detail_times, measure_case
from gptneox.weights.size import ModelSize

HEADER = (
    "batch_size,input_seq_len(Encoding),output_seq_len(Decoding),ResponseTime(s),"
    "forward_first_token_time(ms),forward_next_token_time(ms),pre_next_token_time(ms),"
    "post_next_token_time_post(ms)"
)


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random twin with a tokenizer and 128 positions; do not write into it."""
    directory = tmp_path_factory.mktemp("performance") / "checkpoint"
    checkpoints.write_checkpoint(directory, checkpoints.FAMILY["pythia-14m"] | {"vocab_size": 336})
    write_tokenizer(directory)
    return directory


@pytest.fixture
def cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """main.py in this process, in an empty directory; keywords are keys of [performance]."""
    clean_this_process(monkeypatch, tmp_path)
    monkeypatch.setattr(Device, "measure_bandwidth", lambda self, *_: 1e10)  # takes a second each
    monkeypatch.setattr(Device, "measure_matmul", lambda self, dtype: 1e11)

    def run(*argv: Any, **performance: Any) -> Result:
        capsys.readouterr()
        text = "[performance]\n" + "".join(f"{k} = {v}\n" for k, v in performance.items())
        (tmp_path / "test.ini").write_text(text, encoding="utf-8")
        return Result(run_here("--config", "test.ini", *argv), *capsys.readouterr())

    return run


def stopwatch_of(path: str, checkpoint: Path, **settings: Any) -> Stopwatch:
    if path == "paged":
        settings = {"enable_prefix_caching": False, "max_batch_size": 2} | settings
        return Stopwatch(checkpoints.load_engine(checkpoint, select("cpu"), **settings))
    group = TensorParallelGroup()
    engine = GenerateEngine.from_pretrained(
        checkpoint,
        EngineSection(max_batch_size=64),
        select("cpu"),
        group=group,
        dtype="float32",
        with_tokenizer=False,
    )
    return Stopwatch(engine)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# -- formulas ------------------------------------------------------------------------------------

NEOX_20B = ModelConfig(
    vocab_size=50432,
    hidden_size=6144,
    num_layers=44,
    num_heads=64,
    intermediate_size=24576,
    max_position_embeddings=2048,
)


def test_bytes_and_operations_of_neox_20b() -> None:
    """Against figures worked out by hand from the published architecture."""
    assert NEOX_20B.num_decode_parameters == 20_244_713_472
    size = ModelSize(NEOX_20B, torch.float16, FloatKV(torch.float16))
    assert size.token_bytes == 1_081_344
    body = 20_244_713_472 - 50432 * 6144
    per_token = prefill_flops(NEOX_20B, 1, 2) - prefill_flops(NEOX_20B, 1, 1)
    assert per_token == pytest.approx(39.87e9, rel=1e-3)
    assert per_token == 2 * body + 2 * 44 * 6144 * (4 - 1)
    assert prefill_flops(NEOX_20B, 1, 2048) == pytest.approx(83.9e12, rel=1e-3)
    assert prefill_flops(NEOX_20B, 3, 2048) == 3 * prefill_flops(NEOX_20B, 1, 2048)
    # milliseconds of a step on 2.04 TB/s
    assert size.decode_bytes(1, 0) == 2 * 20_244_713_472
    assert size.decode_bytes(1, 0) / 2.04e9 == pytest.approx(19.9, abs=0.06)
    assert size.decode_bytes(1, 2048) / 2.04e9 == pytest.approx(20.9, abs=0.06)
    assert replace(size, world_size=2).decode_bytes(8, 1024) * 2 == size.decode_bytes(8, 1024)
    extra = size.decode_bytes(8, 1024) - size.decode_bytes(0, 0)
    assert extra == 8 * 1024 * 1_081_344
    assert decode_flops(NEOX_20B, 1, 0) == 2 * 20_244_713_472
    # One token after S cached ones costs what the prompt of S + 1 costs more than that of S,
    # but for the head, which a prompt needs once, and for seeing itself.
    more = prefill_flops(NEOX_20B, 1, 1001) - prefill_flops(NEOX_20B, 1, 1000)
    head = 2 * 50432 * 6144
    assert decode_flops(NEOX_20B, 1, 1000) == pytest.approx(more + head, rel=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_percentile_is_numpys(count: int) -> None:
    values = np.random.default_rng(count).exponential(size=count)
    for percent in (0, 1, 50, 90, 99, 100):
        ours = percentile(values.tolist(), percent)
        assert ours == pytest.approx(float(np.percentile(values, percent)), rel=1e-12)
    summary = summarize(values.tolist())
    assert summary.mean == pytest.approx(values.mean())
    assert summary.median == pytest.approx(np.median(values))
    assert (summary.count, summary.p99) == (count, percentile(values.tolist(), 99))
    assert summarize([]) is None
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_a_share_that_cannot_be_is_named() -> None:
    assert [share(value) for value in (None, 0.5, 1.1)] == ["-", "50%", "110%"]
    assert share(1.11) == "111% (limit wrong)"


def test_the_limit_is_that_of_the_cache_that_holds_the_weights(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stopwatch_of("paged", checkpoint).engine.model
    asked = []
    monkeypatch.setattr(Device, "measure_bandwidth", lambda self, n=0: asked.append(n) or 1e10)
    monkeypatch.setattr(type(model.device), "cache_bytes", lambda self: 1 << 30)
    assert read_limit(model) == (1e10, "cache")
    monkeypatch.setattr(type(model.device), "cache_bytes", lambda self: 0)
    assert read_limit(model) == (1e10, "memory")
    assert asked[0] >= model.size.decode_weight_bytes
    assert asked[1] == 0


def test_memory_is_read_past_every_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    device = select("cpu")
    sizes = []

    def ones(count: int, **_: Any) -> torch.Tensor:
        sizes.append(count * 4)
        return torch.zeros(8)

    monkeypatch.setattr(torch, "ones", ones)
    for cache in (1 << 20, 1 << 29):
        monkeypatch.setattr(type(device), "cache_bytes", lambda self, cache=cache: cache)
        device.measure_bandwidth()
    assert sizes == [1 << 28, 1 << 30]


def test_cases_from_exponents() -> None:
    cases = PerformanceSection(min_len_exp=5, max_len_exp=6).cases()
    assert cases == [(32, 32), (32, 64), (64, 32), (64, 64)]


def test_blocks_for_all_rows_at_once() -> None:
    assert blocks_needed([1024], 20, 128) == 9
    assert blocks_needed([2048], 2048, 128) == 32
    assert blocks_needed([1], 1, 128) == 1
    assert blocks_needed([100] * 4, 28, 128) == 4 + 3


def test_matmul_rate(device: Device) -> None:
    assert device.measure_matmul(torch.float32) > 1e8


# -- the stopwatch -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["paged", "flash"])
@pytest.mark.parametrize("split", [True, False])
def test_every_moment_belongs_to_one_part(path: str, split: bool, checkpoint: Path) -> None:
    stopwatch = stopwatch_of(path, checkpoint)
    prompts = random_prompts(stopwatch, 2, 20)
    stopwatch.run(prompts, 2)
    start = time.perf_counter()
    timing = stopwatch.run(prompts, 12, split=split)
    wall = time.perf_counter() - start
    assert len(timing.prefill_steps) == 1
    assert len(timing.decode_steps) == 11
    assert [len(row) for row in timing.token_ids] == [12, 12]
    assert sum(timing.parts_ms().values()) == pytest.approx(timing.response_s * 1e3, rel=1e-9)
    for step in timing.steps:
        if split:
            assert step.pre_s + step.forward_s + step.post_s == pytest.approx(step.total_s)
            assert min(step.pre_s, step.forward_s, step.post_s) > 0
        else:
            assert (step.pre_s, step.forward_s, step.post_s) == (0, 0, 0)
    # An independent stopwatch around it sees little more: checks and padding.
    assert 0.2 * wall < timing.response_s <= wall


def test_both_paths_generate_the_same(checkpoint: Path) -> None:
    runs = {}
    for path in ("paged", "flash"):
        stopwatch = stopwatch_of(path, checkpoint)
        prompts = random_prompts(stopwatch, 2, 20)
        runs[path] = stopwatch.run(prompts, 6, split=True).token_ids
    assert runs["paged"] == runs["flash"]


@pytest.mark.parametrize("path", ["paged", "flash"])
def test_time_is_booked_where_it_is_spent(
    path: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only moves 20 ms before, 40 in and 60 after the model."""
    now = [0.0]

    def delayed(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        @functools.wraps(function)  # transformers reads signatures
        def slow(*args: Any, **kwargs: Any) -> Any:
            now[0] += seconds
            return function(*args, **kwargs)

        return slow

    stopwatch = stopwatch_of(path, checkpoint)
    engine = stopwatch.engine
    if path == "paged":
        runner = engine.runner
        monkeypatch.setattr(runner, "prepare", delayed(runner.prepare, 0.02))
        monkeypatch.setattr(runner, "step", delayed(runner.step, 0.04))
        monkeypatch.setattr(runner, "_sample", delayed(runner._sample, 0.06))
    else:
        model = type(engine.adapter)
        prepare = GenerationMixin.prepare_inputs_for_generation
        monkeypatch.setattr(
            GenerationMixin, "prepare_inputs_for_generation", delayed(prepare, 0.02)
        )
        monkeypatch.setattr(model, "forward", delayed(model.forward, 0.04))
        update = model._update_model_kwargs_for_generation
        monkeypatch.setattr(model, "_update_model_kwargs_for_generation", delayed(update, 0.06))
    with monkeypatch.context() as patched:
        patched.setattr(time, "perf_counter", lambda: now[0])
        timing = stopwatch.run(random_prompts(stopwatch, 1, 8), 4, split=True)
    times = vars(detail_times(timing))
    expected = {"response_s": 0.48, "first_ms": 40, "next_ms": 40, "pre_ms": 20, "post_ms": 60}
    assert times == pytest.approx(expected)


def test_an_error_leaves_nothing_behind(checkpoint: Path) -> None:
    stopwatch = stopwatch_of("paged", checkpoint)
    with pytest.raises(ValueError, match="positions"):
        stopwatch.run([[1] * 10, [1] * 120], 20)
    assert not stopwatch.engine.has_work
    assert stopwatch.run([[1] * 10], 3).token_ids[0]
    with pytest.raises(ValueError, match="3 rows, but the engine runs 2"):
        stopwatch.run([[1]] * 3, 2)
    small = stopwatch_of("paged", checkpoint, num_blocks=2, block_size=16)
    with pytest.raises(ValueError, match=r"need 5 KV-cache blocks, 2 are there"):
        small.run([[1] * 20] * 2, 2)


def test_chunked_prompts_are_prefill(checkpoint: Path) -> None:
    stopwatch = stopwatch_of("paged", checkpoint, max_prefill_tokens=8, block_size=16)
    timing = stopwatch.run(random_prompts(stopwatch, 1, 20), 4, split=True)
    assert (len(timing.prefill_steps), len(timing.decode_steps)) == (3, 3)
    assert sum(timing.parts_ms().values()) == pytest.approx(timing.response_s * 1e3)


def test_random_prompts_are_known_tokens_and_equal_on_every_call(checkpoint: Path) -> None:
    stopwatch = stopwatch_of("paged", checkpoint)
    first, second = random_prompts(stopwatch, 3, 500), random_prompts(stopwatch, 3, 500)
    assert first == second != random_prompts(stopwatch, 3, 500, seed=2)
    stopwatch.tokenizer = range(290)
    ids = {i for row in random_prompts(stopwatch, 8, 500) for i in row}
    assert max(ids) == 289
    assert len(ids) == 290


class StubStopwatch:
    """Runs that take as long as they are told."""

    path, dtype, config = "paged", torch.float16, NEOX_20B
    size = ModelSize(NEOX_20B, torch.float16, FloatKV(torch.float16))
    tokenizer, max_positions = None, 2048
    group = TensorParallelGroup()
    device = create("cpu")

    def __init__(self, *timings: Timing) -> None:
        self.timings = list(timings)

    def run(self, prompts: Any, num_new: int, **options: Any) -> Timing:
        del prompts, options
        timing = self.timings.pop(0)
        assert len(timing.steps) == num_new
        return timing


def timing_of(first_s: float, *next_s: float, split: bool = False) -> Timing:
    steps = [
        StepTime(i == 0, t, 0.1 * t, 0.7 * t, 0.2 * t) for i, t in enumerate([first_s, *next_s])
    ]
    return Timing(0.5, steps, 0.25, split)


def test_normal_mode_subtracts_a_run_of_one_token() -> None:
    """T1 = 0.5 + 1.0, Tn = 0.5 + 1.1 + 4 * 0.1, so that the next token takes (2.0 - 1.5) / 4."""
    stub = StubStopwatch(timing_of(1.0), timing_of(1.1, 0.1, 0.1, 0.1, 0.1))
    limits = Limits(bandwidth=1e12, matmul=1e14)
    case = measure_case(stub, 2, (16, 5), limits, Method("normal", split=False))
    assert case.times.first_ms == pytest.approx(1500)
    assert case.times.next_ms == pytest.approx(125)
    assert (case.times.pre_ms, case.times.post_ms) == (0, 0)
    assert case.times.response_s == pytest.approx(2.25)  # of the long run alone, text included
    assert case.inter_token_ms.median == pytest.approx(100)
    assert case.rates.decode_tokens_per_s == pytest.approx(2 / 0.125)
    assert case.rates.prefill_tokens_per_s == pytest.approx(32 / 1.5)
    read = stub.size.decode_bytes(2, 16 + 2.5)
    assert case.rates.decode_gb_per_s == pytest.approx(read / 0.125 / 1e9)
    assert case.rates.decode_share_of_bandwidth == pytest.approx(read / 0.125 / 1e12)
    flops = prefill_flops(NEOX_20B, 2, 16)
    assert case.rates.prefill_share_of_matmul == pytest.approx(flops / 1.5 / 1e14)


def test_detail_mode_and_repeats_take_means() -> None:
    runs = [timing_of(1.0, 0.1, 0.1, split=True), timing_of(3.0, 0.3, 0.3, split=True)]
    stub = StubStopwatch(*runs)
    limits = Limits(1e12, 1e14)
    case = measure_case(stub, 1, (16, 3), limits, Method("detail", split=True, repeat=2))
    assert case.times.first_ms == pytest.approx(1400)
    assert case.times.next_ms == pytest.approx(140)
    assert case.times.pre_ms == pytest.approx(20)
    assert case.times.post_ms == pytest.approx(40)
    assert case.first_token_ms.count == 2
    assert case.first_token_ms.p90 == pytest.approx(700 + 0.9 * 1400)
    assert case.inter_token_ms.count == 4


# -- the task ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["paged", "flash"])
def test_normal_mode_writes_its_files(
    cli: Callable[..., Result], checkpoint: Path, tmp_path: Path, path: str
) -> None:
    argv = ("--task", "performance", "--model_path", checkpoint, "--attention", path)
    done = cli(*argv, case_pair="[[16,8],[32,4]]", batch_size=2, model_name="tiny")
    assert done.status == 0, done.err
    device = re.sub(r"[^\w.-]+", "_", select("cpu").describe())
    file = tmp_path / f"performance_test_npu_tiny_{device}_bs2.csv"
    assert file.read_text().splitlines()[0] == HEADER == ",".join(COLUMNS)
    rows = rows_of(file)
    assert [(r["batch_size"], r["input_seq_len(Encoding)"]) for r in rows] == [
        ("2", "16"),
        ("2", "32"),
    ]
    for row in rows:
        assert float(row["ResponseTime(s)"]) > 0
        assert float(row["forward_first_token_time(ms)"]) > 0
        assert float(row["pre_next_token_time(ms)"]) == 0
    result = json.loads(file.with_suffix(".json").read_text())
    assert (result["dtype"], result["path"], result["world_size"]) == ("float32", path, 1)
    assert {"python", "torch", "transformers"} <= set(result["versions"])
    assert set(result["cases"][0]["inter_token_ms"]) == {"count", "mean", "median", "p90", "p99"}
    assert result["cases"][0]["inter_token_ms"]["count"] == 7
    assert str(file.name) in done.out
    assert "decode tok/s" in done.out
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("path", ["paged", "flash"])
def test_detail_mode_needs_timeit(
    cli: Callable[..., Result], checkpoint: Path, tmp_path: Path, path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    argv = ("--task", "performance", "--model_path", checkpoint, "--attention", path)
    keys = {"case_pair": "[[16,8]]", "perf_mode": "detail", "save_file_name": "sub/result.csv"}
    times = list(COLUMNS)[4:]
    done = cli(*argv, **keys)
    assert done.status == 0, done.err
    assert "TIMEIT" in done.err
    row = rows_of(tmp_path / "sub/result.csv")[0]
    assert [float(row[column]) for column in times] == [0] * 4
    assert float(row["ResponseTime(s)"]) > 0
    monkeypatch.setenv("TIMEIT", "1")
    done = cli(*argv, **keys)
    assert done.status == 0, done.err
    row = rows_of(tmp_path / "sub/result.csv")[0]
    assert all(float(row[column]) > 0 for column in times), row
    case = json.loads((tmp_path / "sub/result.json").read_text())["cases"][0]
    parts = case["parts_ms"]
    assert sum(parts.values()) == pytest.approx(case["response_s"] * 1e3, rel=1e-6)
    per_token = [float(row[column]) for column in times[1:]]
    decode = parts["decode_pre"] + parts["decode_forward"] + parts["decode_post"]
    assert 7 * sum(per_token) == pytest.approx(decode, rel=0.02)
    assert float(row[times[0]]) == pytest.approx(parts["prefill_forward"], rel=0.02)


def test_skip_decode_needs_no_tokenizer(
    cli: Callable[..., Result], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    argv = ("--task", "performance", "--model_path", tiny_checkpoint)
    done = cli(*argv, case_pair="[[8,4]]", skip_decode=1, save_file_name="x.csv")
    assert done.status == 0, done.err
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["cases"][0]["parts_ms"]["detokenize"] == 0
    assert not result["detokenized"]


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"case_pair": "[[16,8],[100,29]]"}, ("[100,29]", "129", "128")),
        ({"min_len_exp": 5, "max_len_exp": 7}, ("[32,128]", "160", "128")),
        ({"case_pair": "[[16,1]]"}, ("[16,1]", "at least 2")),
        ({"case_pair": "[[16]]"}, ("case_pair",)),
        ({"perf_mode": "fast"}, ("perf_mode",)),
        ({"repeat": 0}, ("repeat",)),
    ],
)
@pytest.mark.parametrize("path", ["paged", "flash"])
def test_refused_before_anything_runs(
    cli: Callable[..., Result], checkpoint: Path, tmp_path: Path, path: str,
    keys: dict[str, Any], named: tuple[str, ...],
) -> None:  # fmt: skip
    argv = ("--task", "performance", "--model_path", checkpoint, "--attention", path)
    done = cli(*argv, **keys)
    assert done.status in (1, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["test.ini"]
    line = done.err.splitlines()[-1]
    assert line.startswith("error: ")
    for text in named:
        assert text in line
    assert "[model]" not in done.err, "the device was set up"


def test_flags_that_would_do_nothing_are_refused(
    cli: Callable[..., Result], checkpoint: Path
) -> None:
    done = cli("--task", "performance", "--model_path", checkpoint, "--max_batch_size", 4)
    assert done.status == 2
    assert "--max_batch_size does not go with --task performance" in done.err


# -- comparison ----------------------------------------------------------------------------------


def write_csv(path: Path, *rows: tuple[float, ...]) -> Path:
    path.write_text(HEADER + "\n" + "".join(",".join(map(str, r)) + "\n" for r in rows))
    return path


def test_compare_shows_ratios(cli: Callable[..., Result], tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    write_csv(
        old / "performance_test_npu_x_bs1.csv",
        (1, 16, 8, 2.0, 40.0, 10.0, 0, 0),
        (1, 8, 8, 1, 1, 1, 0, 0),
    )
    write_csv(tmp_path / "performance_test_npu_y_bs1.csv", (1, 16, 8, 1.0, 30.0, 2.5, 0, 0))
    for argv in (("--against", "old"), ("--against", "old", "--with", ".")):
        done = cli("--task", "compare", *argv)
        assert done.status == 0, done.err
        row = next(line for line in done.out.splitlines() if line.split()[:3] == ["1", "16", "8"])
        assert row.split()[3:] == [
            "2.000", "1.000", "0.500", "40.00", "30.00", "0.750", "10.00", "2.50", "0.250",
            "100.0", "400.0", "4.000",
        ]  # fmt: skip
        assert "only in A: 1 x [8,8]" in done.out


def test_compare_reads_what_a_spreadsheet_or_a_pipe_gives(tmp_path: Path) -> None:
    expected = read_result(write_csv(tmp_path / "a.csv", (1, 16, 8, 2.0, 40.0, 10.0, 0, 0)))
    text = (tmp_path / "a.csv").read_text()
    saved = tmp_path / "saved.csv"
    saved.write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    assert read_result(saved).cases == expected.cases
    reader, writer = os.pipe()
    os.write(writer, text.encode())
    os.close(writer)
    assert read_result(Path(f"/dev/fd/{reader}")).cases == expected.cases
    os.close(reader)
    saved.write_bytes(text.encode("utf-16"))
    with pytest.raises(FileError, match="is UTF-16"):
        read_result(saved)


def test_compare_says_what_is_wrong(cli: Callable[..., Result], tmp_path: Path) -> None:
    mine = write_csv(tmp_path / "performance_test_a.csv", (1, 16, 8, 2.0, 40.0, 10.0, 0, 0))
    other = write_csv(tmp_path / "other.csv", (4, 16, 8, 2.0, 40.0, 10.0, 0, 0))
    (tmp_path / "empty").mkdir()
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
    (tmp_path / "bad.json").write_text("[1]")
    write_csv(tmp_path / "text.csv", (1, 16, 8, "out of memory", 40.0, 10.0, 0, 0))
    for status, argv, named in (
        (2, (), ("--against",)),
        (2, ("--against", "nowhere"), ("nowhere",)),
        (1, ("--against", "empty"), ("empty", "performance")),
        (1, ("--against", "wrong.csv"), ("wrong.csv", "header")),
        (1, ("--against", "bad.json"), ("bad.json", "format")),
        (1, ("--against", "text.csv"), ("text.csv", "out of memory")),
        (2, ("--against", mine), (mine.name, "--with")),
        (2, ("--against", mine, "--with", other), ("1 x [16,8]", "4 x [16,8]")),
    ):
        done = cli("--task", "compare", *argv)
        assert done.status == status, argv
        line = done.err.splitlines()[-1]
        for text in named:
            assert text in line, (argv, line)


def test_results_are_read_back(
    cli: Callable[..., Result], checkpoint: Path, tmp_path: Path
) -> None:
    argv = ("--task", "performance", "--model_path", checkpoint)
    assert cli(*argv, case_pair="[[8,4]]", save_file_name="performance_test_1.csv").status == 0
    result = read_result(tmp_path)
    assert result == read_result(tmp_path / "performance_test_1.csv")  # its JSON knows more
    text = comparison(result, result)
    assert text.count("1.000") >= 3
    assert "float32" in text


# As the first version wrote it.
WRITTEN_EARLIER = """{
 "format": "gptneox performance 1",
 "date": "2026-11-28T14:55:44+00:00",
 "model_name": "tiny",
 "model_path": "weights/neox-mini",
 "path": "paged",
 "mode": "normal",
 "batch_size": 1,
 "repeat": 2,
 "detokenized": true,
 "device": "Some Processor",
 "device_type": "cpu",
 "world_size": 1,
 "threads": 2,
 "dtype": "float16",
 "file_dtype": "float16",
 "num_parameters": 5522688,
 "measured_bandwidth_gb_per_s": 9.928008735063642,
 "measured_matmul_tflop_per_s": 0.09217176346686755,
 "versions": {
  "python": "3.11.7",
  "torch": "2.13.0+cpu"
 },
 "notes": [
  "a note"
 ],
 "cases": [
  {
   "batch_size": 1,
   "input_len": 16,
   "output_len": 4,
   "response_s": 0.008162745500158053,
   "first_ms": 3.701444999933301,
   "next_ms": 1.460289833327503,
   "pre_ms": 0.0,
   "post_ms": 0.0,
   "first_token_ms": {
    "count": 2,
    "mean": 3.701444999933301,
    "median": 3.701444999933301,
    "p90": 3.8782442004958284,
    "p99": 3.918024020622397
   },
   "inter_token_ms": null,
   "parts_ms": {
    "set_up": 0.07404299958579941,
    "prefill": 3.5519460006980808,
    "decode": 4.45632549963193,
    "detokenize": 0.08043100024224259
   },
   "prefill_tokens_per_s": 4322.636159739863,
   "prefill_tflop_per_s": 0.04137115531981683,
   "prefill_share_of_matmul": 0.4488484733688347,
   "prefill_flop_per_byte": 14.785110484947353,
   "decode_tokens_per_s": 684.7955639883767,
   "decode_gb_per_s": 7.101012253417776,
   "decode_share_of_bandwidth": null,
   "decode_tflop_per_s": 0.007101012253417776,
   "decode_flop_per_byte": 1.0
  }
 ]
}
"""


def test_a_result_of_an_earlier_version_is_read(cli: Callable[..., Result], tmp_path: Path) -> None:
    """And written again without a change: the format is that of the first version."""
    result = PerformanceResult.from_json(WRITTEN_EARLIER)
    assert result.to_json() == WRITTEN_EARLIER
    case = result.cases[0]
    mean = 3.701444999933301
    assert case.first_token_ms == Summary(2, mean, mean, 3.8782442004958284, 3.918024020622397)
    assert (case.inter_token_ms, case.rates.decode_share_of_bandwidth) == (None, None)
    title = "tiny on Some Processor, 2 threads, float16, paged path, 1 rank, normal mode"
    assert result.title == title
    (tmp_path / "old.json").write_text(WRITTEN_EARLIER)
    new = write_csv(tmp_path / "new.csv", (1, 16, 4, 0.0040813727500790265, 3, 1, 0, 0))
    done = cli("--task", "compare", "--against", "old.json", "--with", new)
    assert done.status == 0, done.err
    assert "0.008 0.004 0.500" in " ".join(done.out.split())
    assert f"A: old.json ({title}, 2026-11-28T14:55:44+00:00)" in done.out


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"next_ms": 1.460289833327503,', "", "a case lacks next_ms"),
        ('"dtype": "float16",', "", "it lacks dtype"),
        ('"next_ms": 1.460289833327503', '"next_ms": "fast"', "'fast'"),
        ("performance 1", "performance 2", '"format" is not'),
    ],
)
def test_a_damaged_result_is_named(tmp_path: Path, old: str, new: str, named: str) -> None:
    assert old in WRITTEN_EARLIER
    (tmp_path / "b.json").write_text(WRITTEN_EARLIER.replace(old, new, 1))
    with pytest.raises(FileError, match=rf"b\.json is no result .*{named}"):
        read_result(tmp_path / "b.json")


# -- where the results go ------------------------------------------------------------------------


@pytest.fixture
def measure(cli: Callable[..., Result], checkpoint: Path) -> Callable[..., Result]:
    """--task performance with one short case; keywords are keys of [performance]."""
    argv = ("--task", "performance", "--model_path", checkpoint, "--attention", "paged")
    return functools.partial(cli, *argv, case_pair="[[8,2]]")


def files_of(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix not in (".png", ".ini"))


def test_a_name_of_a_model_is_no_path(measure: Callable[..., Result], tmp_path: Path) -> None:
    done = measure(model_name="EleutherAI/pythia (R)")
    assert done.status == 0, done.err
    assert len(files_of(tmp_path)) == 2
    for name in files_of(tmp_path):
        assert re.fullmatch(
            r"performance_test_npu_EleutherAI_pythia_R_[\w.-]+_bs1\.(csv|json)", name
        )


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", "a.json"),
        ("A.CSV", "A.json"),
        ("sub/out", "sub/out.json"),
        ("pythia-2.8b", "pythia-2.8b.json"),  # .8b is no suffix: pythia-2.7b keeps its own
        ("out.json", "out.json.json"),
    ],
)
def test_the_json_lies_beside_the_csv(
    name: str, data: str, measure: Callable[..., Result], tmp_path: Path
) -> None:
    done = measure(save_file_name=name)
    assert done.status == 0, done.err
    assert rows_of(tmp_path / name)[0]["batch_size"] == "1"
    assert json.loads((tmp_path / data).read_text())["format"] == FORMAT
    assert read_result(tmp_path / data).cases
    assert measure(save_file_name=name).status == 0, "its own files are replaced"


def test_a_json_that_is_no_result_is_kept(measure: Callable[..., Result], tmp_path: Path) -> None:
    """save_file_name config.csv in a model's folder must not cost the model its config.json."""
    for content in ('{"model_type": "gpt_neox"}', "[1]", "not JSON"):
        (tmp_path / "config.json").write_text(content)
        done = measure(save_file_name="config.csv")
        assert (done.status, done.out) == (2, "")
        assert "would replace config.json, which is no result" in done.err
        assert "loaded" not in done.err
        assert (tmp_path / "config.json").read_text() == content
        assert files_of(tmp_path) == ["config.json"]


def test_a_pipe_takes_the_csv_alone(measure: Callable[..., Result], tmp_path: Path) -> None:
    path, seen = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: seen.append(path.read_text()))
    reader.start()
    done = measure(save_file_name="pipe")
    reader.join()
    assert done.status == 0, done.err
    assert seen[0].splitlines()[0] == HEADER
    assert done.out.splitlines()[-1] == "files: pipe"
    assert files_of(tmp_path) == ["pipe"]


@pytest.mark.parametrize("name", ["/proc/x.csv", ".", "test.ini/x.csv"])
def test_a_result_that_cannot_be_written_is_found_first(
    name: str, measure: Callable[..., Result], tmp_path: Path
) -> None:
    done = measure(save_file_name=name)
    assert (done.status, done.out) == (1, "")
    assert f"result file {name} cannot be written" in done.err
    assert "loaded" not in done.err
    assert files_of(tmp_path) == []


def test_what_was_measured_is_shown_when_the_writing_fails(
    measure: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that has become full meanwhile."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(performance, "write_file", full)
    done = measure(save_file_name="a.csv")
    assert done.status == 1
    assert "decode tok/s" in done.out
    assert "No space left on device" in done.err


# -- plots ---------------------------------------------------------------------------------------


def test_without_matplotlib_one_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(performance.importlib.util, "find_spec", lambda name: None)
    files = performance.write_result(
        tmp_path / "r.csv", PerformanceResult.from_json(WRITTEN_EARLIER)
    )
    assert [f.name for f in files] == ["r.csv", "r.json"]
    assert capsys.readouterr().out.count("pip install .[plot]") == 1


def test_plots(cli: Callable[..., Result], checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="extra `plot` is not installed")
    argv = ("--task", "performance", "--model_path", checkpoint)
    for batch_size in (1, 2):
        done = cli(*argv, case_pair="[[8,4],[16,8]]", batch_size=batch_size)
        assert done.status == 0, done.err
        for name in ("latency", "throughput", "roofline"):
            assert f"_bs{batch_size}_{name}.png" in done.out
    pictures = list(tmp_path.glob("*.png"))
    assert len(pictures) == 6
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    assert not list(tmp_path.glob(".*"))
