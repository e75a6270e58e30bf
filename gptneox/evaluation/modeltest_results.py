# SPDX-License-Identifier: Apache-2.0
"""The tables of tests/modeltest and the tree of files they are written to, on rank 0.

Files appear whole, and no file of another run is removed.
"""

from __future__ import annotations

import csv
import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from gptneox.cli import Settings
from gptneox.config.places import CHECKOUT
from gptneox.devices.device import Device
from gptneox.evaluation.datasets import Dataset
from gptneox.evaluation.modeltest_plan import Plan
from gptneox.evaluation.report import counted, csv_text, say, table, versions
from gptneox.evaluation.scoring import Result
from gptneox.files import check_writable, write_file
from gptneox.parallel import TensorParallelGroup
from gptneox.weights.formats import scheme_of
from gptneox.weights.load import check_weights, find_part

logger = logging.getLogger(__name__)

# Holds data/ and receives outputs/; for an installed package the current folder does.
ROOT = CHECKOUT / "tests" / "modeltest" if CHECKOUT else Path()
BEIJING = timezone(timedelta(hours=8))  # time zone of the file names, as in the original
DTYPE_TOKENS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}

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
# Headings of `speed_table`, which leaves out the model.
_SHORT_COLUMNS = ("batch", "in", "out", "total s", "prefill ms", "per prompt ms", "next ms",
    "next tok/s", "tok/s", "mean next tok/s", "mean tok/s")  # fmt: skip

Row = dict[str, Any]  # column -> cell


# -- tables --------------------------------------------------------------------------------------


def with_averages(rows: Seq[Row]) -> list[Row]:
    """The rows; the last one also states the averages over the rows that have a speed."""
    measured = [row for row in rows if row["Throughput(Tokens/s)"]]
    if not measured:
        return [dict(row) for row in rows]
    averages = {
        "Non-first token Throughput Average(Tokens/s)": "Non-first token Throughput(Tokens/s)",
        "E2E Throughput Average(Tokens/s)": "Throughput(Tokens/s)",
    }
    last = {
        average: f"{sum(float(row[column]) for row in measured) / len(measured):.4f}"
        for average, column in averages.items()
    }
    return [*(dict(row) for row in rows[:-1]), dict(rows[-1]) | last]


def speed_table(rows: Seq[Row]) -> tuple[Seq[str], list[list[str]]]:
    """Short headings and rounded figures for a terminal."""
    shown = []
    for row in rows:
        cells = [str(row[column]) for column in PERFORMANCE_COLUMNS[1:]]
        if not row["Throughput(Tokens/s)"]:
            cells[3] = "failed"  # the reason is logged, and stands in the file
        shown.append([f"{float(cell):.2f}" if "." in cell else cell for cell in cells])
    return _SHORT_COLUMNS, shown


def formatted(columns: Seq[str], rows: Seq[Row]) -> str:
    """The table with `|` between cells of equal width."""
    names = {"Throughput(Tokens/s)": "E2E Throughput(Tokens/s)"}
    lines = [[names.get(c, c) for c in columns]]
    lines += [[" ".join(str(row[c]).split()) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "".join(
        "|".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + "\n"
        for line in lines
    )


def _timestamp() -> str:
    """The time for a file name, with the number of the process.

    The number tells apart runs that start in the same second.
    """
    return f"{datetime.now(BEIJING).strftime('%Y_%m_%d_%H_%M_%S')}_{os.getpid()}"


# -- files ---------------------------------------------------------------------------------------


class ResultFiles:
    """The files of one run, and the cases that failed in it.

    Attributes:
        paths: written so far.
        failures: "case: reason".
        notes: on the run, for every result file.
    """

    def __init__(
        self, settings: Settings, plan: Plan, device: Device, group: TensorParallelGroup
    ) -> None:
        """Find out what the files are called, and whether they can be written.

        Raises:
            OSError: they cannot.
        """
        self.settings, self.plan, self.device, self.group = settings, plan, device, group
        is_flash = plan.attention == "flash"
        path, self.config = find_part(settings.model_path, group, prefer_parts=is_flash)
        self.scheme = scheme_of(check_weights(path, self.config, group.world_size))
        dtype, notice = device.resolve_dtype(self.config.dtype, settings.model.dtype)
        self.compute_dtype = str(dtype).removeprefix("torch.")
        self.notes = [notice] if notice else []
        self.short_path = "fa" if is_flash else "pa"
        self.root = Path(settings.environment.modeltest_output_dir or ROOT / "outputs")
        self.paths: list[Path] = []
        self.failures: list[str] = []
        if group.rank == 0:
            check_writable(self.folder("results") / "result.csv")

    def folder(self, kind: str) -> Path:
        """{root}/{kind}/{hardware}/{performance,precision}_test/{mode}/{dtype}/{model}."""
        plan = self.plan
        test = "performance_test" if plan.mode.startswith("performance") else "precision_test"
        dtype = DTYPE_TOKENS[self.config.dtype]
        dtype += f"_{self.scheme}" if self.scheme else ""
        mode = "full" if plan.dataset else plan.mode
        return self.root / kind / self.device.hardware / test / mode / dtype / plan.model_name

    def suffix(self, batch_size: int) -> str:
        """Path, batch size and number of ranks, for a file name."""
        return f"{self.short_path}_batch{batch_size}_tp{self.group.world_size}"

    def write(self, name: str, columns: Seq[str], rows: Seq[Row], *, quiet: bool = False) -> None:
        """Write a table in both forms, and its provenance; `quiet`: not named at the end."""
        if self.group.rank > 0:
            return
        texts = {
            "result.csv": csv_text(columns, rows),
            "formatted_result.csv": formatted(columns, rows),
            "result.txt": self._provenance(),
        }
        for form, text in texts.items():
            path = self.folder("results") / f"{name}_{form}"
            try:
                write_file(path, text)
            except OSError as error:  # the table is shown all the same
                self.fail(str(path), error)
                continue
            if not quiet and path not in self.paths:
                self.paths.append(path)

    def _provenance(self) -> str:
        """How and where the figures were measured, one fact per line."""
        facts = {
            "arguments": " ".join(self.settings.args.modeltest_arguments),
            "model": self.plan.model_path,
            "device": self.device.describe(),
            "ranks": self.group.world_size,
            "path": self.plan.attention,
            "file dtype": self.config.dtype,
            "weights": self.scheme or "float",
            "computed in": self.compute_dtype,
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            **versions(),
        }
        lines = [f"{name}: {value}" for name, value in facts.items()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)]) + "\n"

    def show(self, columns: Seq[str], rows: Seq[Seq[str]]) -> None:
        """Print the table under a line that says what was run."""
        if self.group.rank > 0:
            return
        dtype = self.config.dtype
        computed = "" if dtype == self.compute_dtype else f" (computed in {self.compute_dtype})"
        say(
            f"{self.plan.model_name}, {self.plan.mode}, {dtype}{computed} on "
            f"{self.device.describe()}, {counted(self.group.world_size, 'rank')}"
        )
        say(table(columns, rows))

    def fail(self, case: str, error: BaseException) -> str:
        """Note a failed case; returns the reason for the table."""
        text = " ".join(str(error).split()) or type(error).__name__
        self.failures.append(f"{case}: {text}")
        logger.error("%s failed: %s", case, text)
        return text

    @contextmanager
    def logging_to_file(self) -> Iterator[None]:
        """Within, log to {root}/logs too, where MODELTEST_LOG_TO_FILE asks for it."""
        if not self.settings.environment.modeltest_log_to_file or self.group.rank > 0:
            yield
            return
        folder = self.root / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.plan.mode}_{_timestamp()}.log"
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s [%(levelname)s] %(message)s"))
        root = logging.getLogger("gptneox")
        root.addHandler(handler)
        self.paths.append(path)
        try:
            yield
        finally:
            root.removeHandler(handler)
            handler.close()


class QuestionLog:
    """Writes the outcome of each question as it comes, and sums up; on rank 0 only."""

    def __init__(self, results: ResultFiles, batch_size: int) -> None:
        self.results = results
        self.name = f"{results.plan.dataset}_{results.suffix(batch_size)}_full"
        folder = results.folder("debug")
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{self.name}_{_timestamp()}_debug_info.csv"
        self.counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])  # subject: correct, all
        self.failures: list[str] = []
        self.num_too_long = self.num_asked = 0
        self._append([DEBUG_COLUMNS])

    def add(self, results: Seq[Result]) -> None:
        """Write a batch."""
        rows = []
        for result in results:
            question, prompt = result.question, result.prompt
            self.counts[question.subject][0] += result.correct
            self.counts[question.subject][1] += 1
            self.num_too_long += prompt is None
            rows.append(
                (
                    self.num_asked,
                    prompt.text if prompt else question.body,
                    prompt.ids if prompt else [],
                    result.prediction.token_ids,
                    result.error or ("too long" if prompt is None else result.prediction.value),
                    question.answer,
                    result.correct,
                )
            )
            self.num_asked += 1
        self.failures += dict.fromkeys(result.error for result in results if result.error)
        self._append(rows)

    def _append(self, rows: Seq[Seq[Any]]) -> None:
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)

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
        self.results.write(self.name, FULL_COLUMNS, padded)
        self.results.paths.append(self.path)
        self.results.show(FULL_COLUMNS, [list(row.values()) for row in rows])
        if self.num_too_long:
            say(f"{self.num_too_long} of {self.num_asked} questions were too long; they are wrong")
