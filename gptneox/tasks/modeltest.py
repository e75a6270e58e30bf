# SPDX-License-Identifier: Apache-2.0
"""`--task modeltest`: what tests/modeltest/run.sh runs, and the tree of files it leaves.

A case that fails is written down with its error, and the others go on; the run then ends with
exit status 1. Files appear whole, and nothing that other runs wrote is removed.
"""

from __future__ import annotations

import csv
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gptneox.cli import Settings
from gptneox.config.errors import ConfigError
from gptneox.config.model import ModelConfig
from gptneox.config.settings import PerformanceSection
from gptneox.devices.device import Device
from gptneox.evaluation import datasets
from gptneox.evaluation.datasets import SHIPPED_SETS, Dataset
from gptneox.evaluation.loading import load_stopwatch
from gptneox.evaluation.modeltest_plan import Plan, parse
from gptneox.evaluation.report import counted, csv_text, say, table, versions
from gptneox.evaluation.scoring import Result, evaluate
from gptneox.evaluation.timing import Stopwatch, Timing, max_over_ranks, random_prompts
from gptneox.files import check_writable, write_file
from gptneox.parallel import TensorParallelGroup
from gptneox.prompts import encode
from gptneox.session import load_engine, start
from gptneox.weights.load import rank_directory

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2] / "tests" / "modeltest"
BEIJING = timezone(timedelta(hours=8))  # of the time in file names, as the original's
DTYPE_TOKENS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
CASE_ERRORS = (ValueError, OSError, RuntimeError, MemoryError)

PERFORMANCE_COLUMNS = (
    "Model",
    "Batchsize",
    "In_seq",
    "Out_seq",
    "Total time(s)",
    "Prefill all time(ms)",
    "Prefill average time(ms)",
    "Non-first token time(ms)",
    "Non-first token Throughput(Tokens/s)",
    "Throughput(Tokens/s)",
    "Non-first token Throughput Average(Tokens/s)",
    "E2E Throughput Average(Tokens/s)",
)
SINGLE_COLUMNS = ("In_seq", "Out_seq", "Question", "Answer", "Token num")
FULL_COLUMNS = ("file_name", "value", "correct", "sum")
DEBUG_COLUMNS = (
    "key",
    "queries",
    "input_token_ids",
    "output_token_ids",
    "test_result",
    "golden_result",
    "pass",
)


class CasesFailed(RuntimeError):
    """Some cases could not be run; their errors are in the result files."""


def run(settings: Settings) -> None:
    """Do what the arguments of run.sh say.

    Raises:
        ConfigError: the arguments are wrong.
        CasesFailed: at least one case did not run.
    """
    plan = parse(settings.args.modeltest_arguments)
    ranks = settings.environment.world_size
    if plan.hosts.world_size != ranks:
        raise ConfigError(
            f"{plan.hosts.world_size} chips were asked for, {ranks} processes were started; start "
            "through tests/modeltest/run.sh"
        )
    settings = apply(settings, plan)
    data = read_data(settings, plan) if plan.dataset else None
    device, group = start(settings)
    test = ModelTest(settings, plan, device, group)
    with test.logging_to_file():
        if data:
            test.full(data)
        elif plan.mode == "performance":
            test.performance()
        elif plan.mode == "performance_maxbs":
            test.performance_maxbs()
        else:
            test.single()
    if group.rank == 0 and test.files:
        say("results:\n" + "\n".join(str(path) for path in test.files))
    if test.failures:
        more = f" (and {len(test.failures) - 1} more)" if len(test.failures) > 1 else ""
        raise CasesFailed(f"{counted(len(test.failures), 'case')} failed: {test.failures[0]}{more}")


def apply(settings: Settings, plan: Plan) -> Settings:
    """The settings with what the arguments override."""
    engine = settings.engine
    positions = plan.max_position_embeddings or engine.max_position_embeddings
    needed = max((i + o for i, o in plan.cases), default=0)
    limit = ModelConfig.from_pretrained(plan.model_path).max_position_embeddings
    extends = plan.mode.startswith("performance") and plan.attention == "paged" and not positions
    if extends and needed > limit:  # the text beyond means nothing, its speed does
        logger.warning(
            "the model has %d positions; %d are made for the longest case, for speed only",
            limit,
            needed,
        )
        positions = needed
    prefill = plan.prefill_batch_size or engine.max_prefill_batch_size
    if plan.prefill_length and not plan.prefill_batch_size:
        prefill = max(1, plan.prefill_length // max(i for i, _ in plan.cases))
    trusts = settings.args.trust_remote_code or plan.trust_remote_code
    return replace(
        settings,
        args=replace(settings.args, trust_remote_code=trusts),
        model=replace(settings.model, model_path=str(plan.model_path), attention=plan.attention),
        engine=replace(engine, max_position_embeddings=positions, max_prefill_batch_size=prefill),
        performance=PerformanceSection(),
    )


# -- question sets -------------------------------------------------------------------------------


def read_data(settings: Settings, plan: Plan) -> Dataset:
    """The questions below tests/modeltest/data, or else the small set that is shipped.

    Raises:
        FileNotFoundError: there are none; the message says where they belong.
        ConfigError: a file is malformed.
    """
    name = plan.dataset.lower()
    readers: dict[str, Callable[[Path], Dataset]] = {
        "boolq": datasets.read_boolq,
        "gsm8k": datasets.read_gsm8k,
        "mmlu": lambda folder: datasets.read_mmlu_generated(folder, shots=plan.shot),
        "ceval": lambda folder: datasets.read_ceval_generated(folder, shots=plan.shot),
        "cmmlu": lambda folder: datasets.read_cmmlu(folder, shots=plan.shot),
    }
    folder = Path(settings.environment.modeltest_data_dir or ROOT / "data") / name
    if not folder.is_dir() or not any(folder.iterdir()):
        shipped = SHIPPED_SETS / name
        if not shipped.is_dir():
            raise FileNotFoundError(
                f"no questions of {plan.dataset}: put its files into {folder} "
                "(tests/modeltest/README.md says which)"
            )
        logger.warning("%s is empty: the small set shipped in %s is used", folder, shipped)
        folder = shipped
    dataset = readers[name](folder)
    if dataset.missing:
        logger.warning(
            "%s without files in %s, left out: %s",
            counted(len(dataset.missing), "subject"),
            folder,
            ", ".join(dataset.missing),
        )
    return dataset


# -- the tests -----------------------------------------------------------------------------------


@dataclass
class ModelTest:
    """One run: its plan, the model, the files written so far."""

    settings: Settings
    plan: Plan
    device: Device
    group: TensorParallelGroup
    files: list[Path] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Say which dtype computes, remember how the results are called, and try their folder."""
        path = rank_directory(
            self.settings.model_path, self.group, prefer_parts=self.plan.attention == "flash"
        )
        self.config = ModelConfig.from_pretrained(path)
        dtype, notice = self.device.resolve_dtype(self.config.dtype, self.settings.model.dtype)
        self.compute_dtype = str(dtype).removeprefix("torch.")
        self.notes = [notice] if notice else []
        self.paged_or_flash = "fa" if self.plan.attention == "flash" else "pa"
        if self.group.rank == 0:
            check_writable(self.folder("results") / "result.csv")

    # -- files -----------------------------------------------------------------------------------

    def folder(self, kind: str) -> Path:
        """outputs/{kind}/{hardware}/{performance,precision}_test/{mode}/{dtype}/{model}."""
        plan = self.plan
        test = "performance_test" if plan.mode.startswith("performance") else "precision_test"
        dtype = DTYPE_TOKENS[self.config.dtype]
        dtype += f"_{self.config.quantize}" if self.config.quantize else ""
        mode = "full" if plan.dataset else plan.mode
        return self.outputs / kind / self.device.hardware / test / mode / dtype / plan.model_name

    @property
    def outputs(self) -> Path:
        """The root of everything that is written."""
        return Path(self.settings.environment.modeltest_output_dir or ROOT / "outputs")

    def suffix(self, batch_size: int) -> str:
        """Of file names: path, batch and ranks."""
        return f"{self.paged_or_flash}_batch{batch_size}_tp{self.group.world_size}"

    def write(
        self, name: str, columns: Seq[str], rows: Seq[dict[str, Any]], *, quiet: bool = False
    ) -> None:
        """A table in both forms, and beside it what it was measured with; on rank 0."""
        if self.group.rank > 0:
            return
        texts = {
            "result.csv": csv_text(columns, rows),
            "formatted_result.csv": formatted(columns, rows),
            "result.txt": self.origin(),
        }
        for form, text in texts.items():
            path = self.folder("results") / f"{name}_{form}"
            try:
                write_file(path, text)
            except OSError as error:  # what was measured is shown all the same
                self.fail(str(path), error)
                continue
            if not quiet and path not in self.files:
                self.files.append(path)

    def origin(self) -> str:
        """What a result must stand beside, one fact per line."""
        facts = {
            "arguments": " ".join(self.settings.args.modeltest_arguments),
            "model": self.plan.model_path,
            "device": self.device.describe(),
            "ranks": self.group.world_size,
            "path": self.plan.attention,
            "file dtype": self.config.dtype,
            "computed in": self.compute_dtype,
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            **versions(),
        }
        lines = [f"{name}: {value}" for name, value in facts.items()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)]) + "\n"

    def show(self, columns: Seq[str], rows: Seq[Seq[str]]) -> None:
        """The table at the end, on rank 0."""
        if self.group.rank > 0:
            return
        dtype = self.config.dtype
        computed = "" if dtype == self.compute_dtype else f" (computed in {self.compute_dtype})"
        say(
            f"{self.plan.model_name}, {self.plan.mode}, {dtype}{computed} on "
            f"{self.device.describe()}, {counted(self.group.world_size, 'rank')}"
        )
        say(table(columns, rows))

    @contextmanager
    def logging_to_file(self) -> Iterator[None]:
        """Within, log to outputs/logs too, where MODELTEST_LOG_TO_FILE asks for it."""
        if not self.settings.environment.modeltest_log_to_file or self.group.rank > 0:
            yield
            return
        folder = self.outputs / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.plan.mode}_{timestamp()}_{os.getpid()}.log"
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s [%(levelname)s] %(message)s"))
        root = logging.getLogger("gptneox")
        root.addHandler(handler)
        self.files.append(path)
        try:
            yield
        finally:
            root.removeHandler(handler)
            handler.close()

    def fail(self, what: str, error: BaseException) -> str:
        """Note a failed case; returns its text for the table."""
        text = " ".join(str(error).split()) or type(error).__name__
        self.failures.append(f"{what}: {text}")
        logger.error("%s failed: %s", what, text)
        return text

    def progress(self, total: float, unit: str) -> Any:
        """A bar with the time that is left, on a terminal."""
        hide = self.group.rank > 0 or not sys.stderr.isatty()
        return tqdm(total=round(total), desc=self.plan.mode, leave=False, disable=hide, unit=unit)

    # -- speed -----------------------------------------------------------------------------------

    def stopwatch(self, max_batch_size: int) -> Stopwatch:
        """The loaded model with room for every case."""
        cases = self.plan.cases
        return load_stopwatch(self.settings, self.device, self.group, cases, max_batch_size)

    def performance(self) -> None:
        """Every batch size over its cases: one table for each batch size."""
        plan = self.plan
        lists = plan.batch_sizes
        sizes = list(dict.fromkeys(size for sizes in lists for size in sizes))
        if len(set(lists)) > 1:
            sizes.sort()
        jobs = [
            (size, [case for case, own in zip(plan.cases, lists, strict=True) if size in own])
            for size in sizes
        ]
        stopwatch = self.stopwatch(max(sizes))
        self.warm_up(stopwatch, [(size, case) for size, cases in jobs for case in cases])
        all_rows = []
        work = sum(size * i / 16 + o for size, cases in jobs for i, o in cases)
        with self.progress(work, "tok") as bar:
            for size, cases in jobs:
                rows: list[dict[str, Any]] = []
                for input_len, output_len in cases:
                    prompts = random_prompts(stopwatch, size, input_len)
                    rows.append(self.measure(stopwatch, prompts, input_len, output_len)[0])
                    bar.update(round(size * input_len / 16 + output_len))
                    name = f"performance_{self.suffix(size)}"
                    self.write(name, PERFORMANCE_COLUMNS, with_averages(rows))
                all_rows += with_averages(rows)
        self.show(*speed_table(all_rows))

    def warm_up(self, stopwatch: Stopwatch, jobs: Seq[tuple[int, tuple[int, int]]]) -> None:
        """Two tokens of the largest case; one that does not fit fails by itself later."""
        size, (input_len, _) = max(jobs, key=lambda job: job[0] * sum(job[1]))
        try:
            stopwatch.run(random_prompts(stopwatch, size, input_len, seed=0), 2)
        except CASE_ERRORS as error:
            logger.warning("the warm-up did not run: %s", error)

    def measure(
        self, stopwatch: Stopwatch, prompts: Seq[Seq[int]], input_len: int, output_len: int
    ) -> tuple[dict[str, Any], Timing | None]:
        """A row of the performance table, and the run; on failure the row says why."""
        size = len(prompts)
        row: dict[str, Any] = dict.fromkeys(PERFORMANCE_COLUMNS, "")
        row |= {"Model": self.plan.model_name, "Batchsize": size}
        row |= {"In_seq": input_len, "Out_seq": output_len}
        try:
            # A device prepares for each shape once; that is not the case's own time.
            stopwatch.run(prompts, min(2, output_len), detokenize=False)
            timing = stopwatch.run(prompts, output_len, split=stopwatch.path == "flash")
        except CASE_ERRORS as error:
            what = f"batch {size} x [{input_len},{output_len}]"
            row["Total time(s)"] = self.fail(what, error)
            return row, None
        prefill = sum(step.total_s for step in timing.prefill_steps)
        decode = sum(step.total_s for step in timing.decode_steps) / max(1, output_len - 1)
        total, prefill, decode = max_over_ranks(stopwatch, [timing.response_s, prefill, decode])
        row |= {
            "Total time(s)": f"{total:.6f}",
            "Prefill all time(ms)": f"{prefill * 1e3:.4f}",
            "Prefill average time(ms)": f"{prefill / size * 1e3:.4f}",
            "Non-first token time(ms)": f"{decode * 1e3:.4f}",
            "Non-first token Throughput(Tokens/s)": f"{size / decode if decode else 0.0:.4f}",
            "Throughput(Tokens/s)": f"{size * output_len / total:.4f}",
        }
        return row, timing

    def performance_maxbs(self) -> None:
        """For each case the largest batch whose tokens keep the time limit, by bisection."""
        plan = self.plan
        stopwatch = self.stopwatch(max(high for _, high in plan.batch_ranges))
        first = [(low, case) for case, (low, _) in zip(plan.cases, plan.batch_ranges, strict=True)]
        self.warm_up(stopwatch, first)
        prefix = f"performance_maxbs_{self.paged_or_flash}"
        end = f"tp{self.group.world_size}"
        probes: list[dict[str, Any]] = []
        finals: list[dict[str, Any]] = []
        answers: list[str] = []
        for case, bounds in zip(plan.cases, plan.batch_ranges, strict=True):
            low, high = bounds
            best: dict[str, Any] = {}
            while low <= high:
                size = (low + high) // 2
                row = self.probe(stopwatch, case, size)
                probes.append(row)
                name = f"{prefix}_{case[0]}_{case[1]}_batch{size}_{end}"
                self.write(name, PERFORMANCE_COLUMNS, with_averages([row]), quiet=True)
                if self.within_limit(row):
                    best, low = row, size + 1
                else:
                    high = size - 1
            answers.append(f"[{case[0]},{case[1]}]: {best.get('Batchsize', 0)}")
            if best:
                finals.append(best)
            self.write(f"{prefix}_{end}_round", PERFORMANCE_COLUMNS, with_averages(probes))
            self.write(f"{prefix}_{end}_final", PERFORMANCE_COLUMNS, with_averages(finals))
        self.show(*speed_table(with_averages(probes)))
        if self.group.rank == 0:
            say("\n".join(answers))

    def probe(self, stopwatch: Stopwatch, case: tuple[int, int], size: int) -> dict[str, Any]:
        """One batch size of a case. Out of room ends the search there, any other error the case."""
        before = len(self.failures)
        row, _ = self.measure(stopwatch, random_prompts(stopwatch, size, case[0]), *case)
        if size > 1 and "memory" in str(row["Total time(s)"]):
            del self.failures[before:]
        return row

    def within_limit(self, row: dict[str, Any]) -> bool:
        """Whether a probe ran and was fast enough; the same on every rank."""
        time_ms = row["Non-first token time(ms)"]
        return bool(time_ms) and float(time_ms) <= self.plan.time_limit_ms

    # -- single prompts --------------------------------------------------------------------------

    def single(self) -> None:
        """The user's prompts: answers, and for performance_single the table of times."""
        plan, timed = self.plan, self.plan.mode == "performance_single"
        texts = list(plan.prompts)
        size = plan.batch_size
        if len(texts) > size:
            logger.warning("%d prompts: the batch is made %d", len(texts), len(texts))
            size = len(texts)
        if timed:  # a batch of that size is measured
            texts = [texts[i % len(texts)] for i in range(size)]
        stopwatch = self.stopwatch(size)
        prompts = [encode(stopwatch.tokenizer, t, f"prompt {i}") for i, t in enumerate(texts)]
        longest = max(len(ids) for ids in prompts)
        rows: list[dict[str, Any]] = []
        for _, output_len in plan.cases:
            if timed:
                row, timing = self.measure(stopwatch, prompts, longest, output_len)
                rows.append(row)
            else:
                timing = self.answer(stopwatch, prompts, longest, output_len)
            if timing and self.group.rank == 0:
                self.print_answers(texts, timing)
            if not timed:
                rows += single_rows(longest, output_len, texts, timing, self.failures)
        columns = PERFORMANCE_COLUMNS if timed else SINGLE_COLUMNS
        rows = with_averages(rows) if timed else rows
        self.write(f"{plan.mode}_{self.suffix(size)}", columns, rows)
        if timed:
            self.show(*speed_table(rows))

    def answer(
        self, stopwatch: Stopwatch, prompts: Seq[Seq[int]], longest: int, output_len: int
    ) -> Timing | None:
        """Continuations, ended by the end-of-text token; None when it failed."""
        try:
            return stopwatch.run(prompts, output_len, ignore_eos=False)
        except CASE_ERRORS as error:
            self.fail(f"[{longest},{output_len}]", error)
            return None

    def print_answers(self, texts: Seq[str], timing: Timing) -> None:
        """As run_pa.sh prints them."""
        for i, (text, ids, answer) in enumerate(
            zip(texts, timing.token_ids, timing.texts, strict=True)
        ):
            say(f"Question[{i}]: {text}\nAnswer[{i}]: {answer}")
            say(f"Generate[{i}] token num: ({i}, {len(ids)})")

    # -- question sets ---------------------------------------------------------------------------

    def full(self, dataset: Dataset) -> None:
        """Every question, for each batch size; a failed question counts as wrong."""
        plan = self.plan
        sizes = plan.batch_sizes[0]
        section = replace(self.settings.engine, max_batch_size=max(sizes))
        engine = load_engine(self.settings, self.device, self.group, section)
        self.notes.append(f"questions: {', '.join(str(path) for path in dataset.files[:3])} …")
        self.notes.append(f"scoring: {dataset.scorer.name}, shot {dataset.num_examples}")
        for size in sizes:
            book = DebugBook(self, size) if self.group.rank == 0 else None
            with self.progress(len(dataset.questions), "question") as bar:
                evaluate(
                    dataset.questions,
                    dataset.scorer,
                    engine,
                    size,
                    partial(_note, book, bar),
                    max_prompt_tokens=dataset.max_prompt_tokens,
                    go_on=True,
                )
            failures = self.group.broadcast_object(book.failures if book else [])
            self.failures += failures
            if book:
                book.finish(dataset)


def _note(book: DebugBook | None, bar: Any, results: list[Result]) -> None:
    assert book, "only rank 0 keeps the book"
    book.add(results)
    bar.update(len(results))


class DebugBook:
    """What became of each question, written as it comes, and the sums; on rank 0."""

    def __init__(self, test: ModelTest, batch_size: int) -> None:
        self.test, self.name = test, f"{test.plan.dataset}_{test.suffix(batch_size)}_full"
        folder = test.folder("debug")
        folder.mkdir(parents=True, exist_ok=True)
        # The number of the process keeps apart what starts in the same second.
        self.path = folder / f"{self.name}_{timestamp()}_{os.getpid()}_debug_info.csv"
        self.counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])  # subject: correct, all
        self.failures: list[str] = []
        self.num_too_long = self.num_asked = 0
        self._append([dict(zip(DEBUG_COLUMNS, DEBUG_COLUMNS, strict=True))])

    def add(self, results: Seq[Result]) -> None:
        """Write down a batch."""
        rows = []
        for result in results:
            question, prompt = result.question, result.prompt
            self.counts[question.subject][0] += result.correct
            self.counts[question.subject][1] += 1
            self.num_too_long += prompt is None
            given = result.error or ("too long" if prompt is None else result.prediction.value)
            cells = (
                self.num_asked,
                prompt.text if prompt else question.body,
                prompt.ids if prompt else [],
                result.prediction.token_ids,
                given,
                question.answer,
                result.correct,
            )
            self.num_asked += 1
            rows.append(dict(zip(DEBUG_COLUMNS, cells, strict=True)))
        self.failures += dict.fromkeys(result.error for result in results if result.error)
        self._append(rows)

    def _append(self, rows: Seq[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, DEBUG_COLUMNS, lineterminator="\n").writerows(rows)

    def finish(self, dataset: Dataset) -> None:
        """Write and show the table: the total first, then each file or subject."""
        names = {path.stem: path.name for path in dataset.files if path.suffix == ".jsonl"}
        counts = {names.get(subject, subject): tuple(n) for subject, n in self.counts.items()}
        total = (sum(c for c, _ in counts.values()), sum(n for _, n in counts.values()))
        rows = [
            dict(zip(FULL_COLUMNS, (name, f"{c / n:.6f}", str(c), str(n)), strict=True))
            for name, (c, n) in [("total", total), *counts.items()]
        ]
        widths = {k: max(len(k), *(len(row[k]) for row in rows)) for k in FULL_COLUMNS}
        padded = [{k: row[k].ljust(widths[k]) for k in FULL_COLUMNS} for row in rows]
        self.test.write(self.name, FULL_COLUMNS, padded)
        self.test.files.append(self.path)
        self.test.show(FULL_COLUMNS, [list(row.values()) for row in rows])
        if self.num_too_long:
            say(f"{self.num_too_long} of {self.num_asked} questions were too long; they are wrong")


def single_rows(
    longest: int, output_len: int, texts: Seq[str], timing: Timing | None, failures: Seq[str]
) -> list[dict[str, Any]]:
    """Rows of precision_single; one row with the error where the case failed."""
    if timing is None:
        return [dict(zip(SINGLE_COLUMNS, (longest, output_len, failures[-1], "", ""), strict=True))]
    answers = zip(texts, timing.texts, timing.token_ids, strict=True)
    return [
        dict(zip(SINGLE_COLUMNS, (longest, output_len, text, answer, len(ids)), strict=True))
        for text, answer, ids in answers
    ]


def with_averages(rows: Seq[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, the last one with the averages over those that ran."""
    ran = [row for row in rows if row["Throughput(Tokens/s)"]]
    if not ran:
        return [dict(row) for row in rows]
    averages = {
        "Non-first token Throughput Average(Tokens/s)": "Non-first token Throughput(Tokens/s)",
        "E2E Throughput Average(Tokens/s)": "Throughput(Tokens/s)",
    }
    last = {
        average: f"{sum(float(row[column]) for row in ran) / len(ran):.4f}"
        for average, column in averages.items()
    }
    return [*(dict(row) for row in rows[:-1]), dict(rows[-1]) | last]


def speed_table(rows: Seq[dict[str, Any]]) -> tuple[Seq[str], list[list[str]]]:
    """Short headings and rounded figures for a terminal."""
    shown = []
    for row in rows:
        cells = [str(row[column]) for column in PERFORMANCE_COLUMNS[1:]]
        if not row["Throughput(Tokens/s)"]:
            cells[3] = "failed"  # why is said below, and in the file
        shown.append([_rounded(cell) for cell in cells])
    return _SHORT_COLUMNS, shown


_SHORT_COLUMNS = ("batch", "in", "out", "total s", "prefill ms", "per prompt ms", "next ms",
    "next tok/s", "tok/s", "mean next tok/s", "mean tok/s")  # fmt: skip


def _rounded(cell: str) -> str:
    return f"{float(cell):.2f}" if "." in cell else cell


def formatted(columns: Seq[str], rows: Seq[dict[str, Any]]) -> str:
    """The table with `|` between cells of equal width."""
    names = {"Throughput(Tokens/s)": "E2E Throughput(Tokens/s)"}
    lines = [[names.get(c, c) for c in columns]]
    lines += [[" ".join(str(row[c]).split()) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "".join(
        "|".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + "\n"
        for line in lines
    )


def timestamp() -> str:
    """For file names."""
    return datetime.now(BEIJING).strftime("%Y_%m_%d_%H_%M_%S")
