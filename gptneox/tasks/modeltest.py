# SPDX-License-Identifier: Apache-2.0
"""`--task modeltest`: the tests that tests/modeltest/run.sh starts.

The error of a case that fails is written to the results, and the other cases go on; the run then
ends with exit status 1.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gptneox.cli import Settings
from gptneox.config.errors import ConfigError
from gptneox.config.model import ModelConfig
from gptneox.config.settings import PerformanceSection
from gptneox.devices.device import Device
from gptneox.engine.api import Engine, is_alike_on_all_ranks
from gptneox.evaluation import datasets
from gptneox.evaluation.datasets import SHIPPED_SETS, Dataset
from gptneox.evaluation.loading import Case, load_stopwatch
from gptneox.evaluation.modeltest_plan import Plan, parse
from gptneox.evaluation.modeltest_results import (
    PERFORMANCE_COLUMNS,
    ROOT,
    SINGLE_COLUMNS,
    QuestionLog,
    ResultFiles,
    Row,
    speed_table,
    with_averages,
)
from gptneox.evaluation.report import counted, say
from gptneox.evaluation.scoring import Result, evaluate
from gptneox.evaluation.timing import Stopwatch, Timing, max_over_ranks, random_prompts
from gptneox.parallel import TensorParallelGroup
from gptneox.prompts import encode
from gptneox.session import load_engine, start

logger = logging.getLogger(__name__)

CASE_ERRORS = (ValueError, OSError, RuntimeError, MemoryError)


class CasesFailed(RuntimeError):
    """Some cases could not be run; their errors are in the result files."""


def run(settings: Settings) -> None:
    """Run the mode that the arguments of run.sh name.

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
    dataset = read_dataset(settings, plan) if plan.dataset else None
    device, group = start(settings)
    test = ModelTest(settings, plan, device, group)
    results = test.results
    with results.logging_to_file():
        if dataset:
            test.full(dataset)
        elif plan.mode == "performance":
            test.performance()
        elif plan.mode == "performance_maxbs":
            test.performance_maxbs()
        elif plan.mode == "performance_single":
            test.performance_single()
        else:
            test.precision_single()
    if group.rank == 0 and results.paths:
        say("results:\n" + "\n".join(str(path) for path in results.paths))
    if failures := results.failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise CasesFailed(f"{counted(len(failures), 'case')} failed: {failures[0]}{more}")


def apply(settings: Settings, plan: Plan) -> Settings:
    """The settings, with the values that the arguments give."""
    engine = settings.engine
    positions = plan.max_position_embeddings or engine.max_position_embeddings
    needed = max((i + o for i, o in plan.cases), default=0)
    limit = ModelConfig.from_pretrained(plan.model_path).max_position_embeddings
    extends = plan.mode.startswith("performance") and plan.attention == "paged" and not positions
    if extends and needed > limit:  # text beyond the limit is meaningless, its speed is not
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


def read_dataset(settings: Settings, plan: Plan) -> Dataset:
    """Read the questions below tests/modeltest/data; without any, the small set that is shipped.

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


class ModelTest:
    """One run: its plan, the device, and the files of its results."""

    def __init__(
        self, settings: Settings, plan: Plan, device: Device, group: TensorParallelGroup
    ) -> None:
        self.settings, self.plan, self.device, self.group = settings, plan, device, group
        self.results = ResultFiles(settings, plan, device, group)

    def progress(self, total: float, unit: str) -> Any:
        """A bar with the remaining time, on a terminal."""
        hide = self.group.rank > 0 or not sys.stderr.isatty()
        return tqdm(total=round(total), desc=self.plan.mode, leave=False, disable=hide, unit=unit)

    # -- speed -----------------------------------------------------------------------------------

    def stopwatch(self, max_batch_size: int) -> Stopwatch:
        """Load the model, with room for every case."""
        cases = self.plan.cases
        return load_stopwatch(self.settings, self.device, self.group, cases, max_batch_size)

    def performance(self) -> None:
        """Every batch size with its cases: one table for each batch size."""
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
                rows: list[Row] = []
                for input_len, output_len in cases:
                    prompts = random_prompts(stopwatch, size, input_len)
                    rows.append(self.measure(stopwatch, prompts, input_len, output_len)[0])
                    bar.update(round(size * input_len / 16 + output_len))
                    name = f"performance_{self.results.suffix(size)}"
                    self.results.write(name, PERFORMANCE_COLUMNS, with_averages(rows))
                all_rows += with_averages(rows)
        self.results.show(*speed_table(all_rows))

    def warm_up(self, stopwatch: Stopwatch, jobs: Seq[tuple[int, Case]]) -> None:
        """Run two tokens of the largest case; one that does not fit fails by itself later."""
        size, (input_len, _) = max(jobs, key=lambda job: job[0] * sum(job[1]))
        try:
            stopwatch.run(random_prompts(stopwatch, size, input_len, seed=0), 2)
        except CASE_ERRORS as error:
            self.raise_unless_alike(error)
            logger.warning("the warm-up did not run: %s", error)

    def raise_unless_alike(self, error: BaseException) -> None:
        """Raise an error that may be one rank's alone; after the others the next case is run."""
        if not is_alike_on_all_ranks(error, self.group):
            raise error

    def measure(
        self, stopwatch: Stopwatch, prompts: Seq[Seq[int]], input_len: int, output_len: int
    ) -> tuple[Row, Timing | None]:
        """A row of the performance table, and the run; on failure the row states the reason."""
        size = len(prompts)
        row: Row = dict.fromkeys(PERFORMANCE_COLUMNS, "")
        row |= {"Model": self.plan.model_name, "Batchsize": size}
        row |= {"In_seq": input_len, "Out_seq": output_len}
        try:
            # A device prepares for each shape once, which must not count as time of the case.
            stopwatch.run(prompts, min(2, output_len), detokenize=False)
            timing = stopwatch.run(prompts, output_len, split=stopwatch.path == "flash")
        except CASE_ERRORS as error:
            self.raise_unless_alike(error)
            case = f"batch {size} x [{input_len},{output_len}]"
            row["Total time(s)"] = self.results.fail(case, error)
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
        """For each case the largest batch within the time limit per token, by bisection."""
        plan, results = self.plan, self.results
        stopwatch = self.stopwatch(max(high for _, high in plan.batch_ranges))
        first = [(low, case) for case, (low, _) in zip(plan.cases, plan.batch_ranges, strict=True)]
        self.warm_up(stopwatch, first)
        prefix = f"performance_maxbs_{results.short_path}"
        end = f"tp{self.group.world_size}"
        probes: list[Row] = []
        finals: list[Row] = []
        answers: list[str] = []
        for (input_len, output_len), bounds in zip(plan.cases, plan.batch_ranges, strict=True):
            low, high = bounds
            best: Row = {}
            while low <= high:
                size = (low + high) // 2
                row = self.probe(stopwatch, (input_len, output_len), size)
                probes.append(row)
                name = f"{prefix}_{input_len}_{output_len}_batch{size}_{end}"
                results.write(name, PERFORMANCE_COLUMNS, with_averages([row]), quiet=True)
                if self.within_limit(row):
                    best, low = row, size + 1
                else:
                    high = size - 1
            answers.append(f"[{input_len},{output_len}]: {best.get('Batchsize', 0)}")
            if best:
                finals.append(best)
            results.write(f"{prefix}_{end}_round", PERFORMANCE_COLUMNS, with_averages(probes))
            results.write(f"{prefix}_{end}_final", PERFORMANCE_COLUMNS, with_averages(finals))
        results.show(*speed_table(with_averages(probes)))
        if self.group.rank == 0:
            say("\n".join(answers))

    def probe(self, stopwatch: Stopwatch, case: Case, size: int) -> Row:
        """Measure one batch size. Too little memory is an answer, any other error a failure."""
        before = len(self.results.failures)
        row, _ = self.measure(stopwatch, random_prompts(stopwatch, size, case[0]), *case)
        if size > 1 and "memory" in str(row["Total time(s)"]):
            del self.results.failures[before:]
        return row

    def within_limit(self, row: Row) -> bool:
        """Whether a probe ran and was fast enough; the same on every rank."""
        time_ms = row["Non-first token time(ms)"]
        return bool(time_ms) and float(time_ms) <= self.plan.time_limit_ms

    # -- single prompts --------------------------------------------------------------------------

    def performance_single(self) -> None:
        """The user's prompts, repeated to fill the batch: answers and the table of times."""
        size = self.single_batch_size()
        texts = [self.plan.prompts[i % len(self.plan.prompts)] for i in range(size)]
        stopwatch, prompts, longest = self.load_prompts(texts, size)
        rows = []
        for _, output_len in self.plan.cases:
            row, timing = self.measure(stopwatch, prompts, longest, output_len)
            rows.append(row)
            if timing:
                self.print_answers(texts, timing)
        rows = with_averages(rows)
        name = f"{self.plan.mode}_{self.results.suffix(size)}"
        self.results.write(name, PERFORMANCE_COLUMNS, rows)
        self.results.show(*speed_table(rows))

    def precision_single(self) -> None:
        """The user's prompts: their answers, each ended by the end-of-text token."""
        size, texts, results = self.single_batch_size(), self.plan.prompts, self.results
        stopwatch, prompts, longest = self.load_prompts(texts, size)
        rows: list[tuple[int | str, ...]] = []
        for _, output_len in self.plan.cases:
            try:
                timing = stopwatch.run(prompts, output_len, ignore_eos=False)
            except CASE_ERRORS as error:
                self.raise_unless_alike(error)
                results.fail(f"[{longest},{output_len}]", error)
                rows.append((longest, output_len, results.failures[-1], "", ""))
                continue
            self.print_answers(texts, timing)
            for text, answer, ids in zip(texts, timing.texts, timing.token_ids, strict=True):
                rows.append((longest, output_len, text, answer, len(ids)))
        table = [dict(zip(SINGLE_COLUMNS, row, strict=True)) for row in rows]
        results.write(f"{self.plan.mode}_{results.suffix(size)}", SINGLE_COLUMNS, table)

    def single_batch_size(self) -> int:
        """The batch size of the arguments, or the number of prompts where that is larger."""
        size, num_prompts = self.plan.batch_size, len(self.plan.prompts)
        if num_prompts > size:
            logger.warning("%d prompts: the batch is made %d", num_prompts, num_prompts)
        return max(size, num_prompts)

    def load_prompts(
        self, texts: Seq[str], max_batch_size: int
    ) -> tuple[Stopwatch, list[list[int]], int]:
        """The model, the token ids of `texts`, and the length of the longest."""
        stopwatch = self.stopwatch(max_batch_size)
        prompts = [encode(stopwatch.tokenizer, t, f"prompt {i}") for i, t in enumerate(texts)]
        return stopwatch, prompts, max(len(ids) for ids in prompts)

    def print_answers(self, texts: Seq[str], timing: Timing) -> None:
        """Print answers as run_pa.sh does."""
        if self.group.rank > 0:
            return
        answers = zip(texts, timing.token_ids, timing.texts, strict=True)
        for i, (text, ids, answer) in enumerate(answers):
            say(f"Question[{i}]: {text}\nAnswer[{i}]: {answer}")
            say(f"Generate[{i}] token num: ({i}, {len(ids)})")

    # -- question sets ---------------------------------------------------------------------------

    def full(self, dataset: Dataset) -> None:
        """Every question, for each batch size; a failed question counts as wrong."""
        sizes, results = self.plan.batch_sizes[0], self.results
        section = replace(self.settings.engine, max_batch_size=max(sizes))
        engine = load_engine(self.settings, self.device, self.group, section)
        results.notes.append(f"questions: {', '.join(str(path) for path in dataset.files[:3])} …")
        results.notes.append(f"scoring: {dataset.scorer.name}, shot {dataset.num_examples}")
        for size in sizes:
            self.ask(engine, dataset, size)

    def ask(self, engine: Engine, dataset: Dataset, batch_size: int) -> None:
        """Every question in batches of one size."""
        log = QuestionLog(self.results, batch_size) if self.group.rank == 0 else None
        with self.progress(len(dataset.questions), "question") as bar:

            def on_result(results: list[Result]) -> None:
                assert log, "results are delivered on rank 0 only"
                log.add(results)
                bar.update(len(results))

            evaluate(
                dataset.questions,
                dataset.scorer,
                engine,
                batch_size,
                on_result,
                max_prompt_tokens=dataset.max_prompt_tokens,
                go_on=True,
            )
        self.results.failures += self.group.broadcast_object(log.failures if log else [])
        if log:
            log.finish(dataset)
