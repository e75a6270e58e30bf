# SPDX-License-Identifier: Apache-2.0
"""The files of `--task precision`: cached answers, log, accuracies; and its table."""

from __future__ import annotations

import csv
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from gptneox.config.errors import ConfigError, FileError
from gptneox.evaluation.datasets import Dataset
from gptneox.evaluation.scoring import NO_ANSWER, Question, Result
from gptneox.evaluation.subjects import HARD_SUBJECTS
from gptneox.files import check_writable, lock, write_file

logger = logging.getLogger(__name__)

LOG_NAME, CACHE_NAME, FINGERPRINT_NAME = "device0.log", "cache0.csv", "cache0.json"
CLASSES_NAME, SUBJECTS_NAME = "result_0_classes_acc.json", "result_0_subject_acc.json"


@dataclass(frozen=True)
class Score:
    """Correct answers to the questions of one subject."""

    subject: str
    group: str
    correct: int
    total: int


def accuracy(scores: Seq[Score]) -> float | None:
    """Share of correct answers from 0 to 1; None without questions."""
    total = sum(s.total for s in scores)
    return sum(s.correct for s in scores) / total if total else None


class ResultFolder:
    """The files of test_result/, which one run at a time writes, on rank 0.

    cache0.csv has one row `question_id,task_name,truth,predict` per question, in order.
    cache0.json has the fingerprint: model, questions and protocol that the rows belong to.
    """

    def __init__(
        self,
        folder: Path,
        dataset: Dataset,
        protocol: dict[str, Any],
        fingerprint: dict[str, Any],
    ) -> None:
        """Open the folder; `resume` must be called next.

        Raises:
            RuntimeError: another run writes into it now.
            OSError: a result could not be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CACHE_NAME, LOG_NAME, FINGERPRINT_NAME, CLASSES_NAME, SUBJECTS_NAME):
            check_writable(folder / name)
        self.folder, self.dataset, self.protocol = folder, dataset, protocol
        self.cache_path = folder / CACHE_NAME
        self._fingerprint = fingerprint
        self.predictions: list[str] = []
        self._cache = self.cache_path.open("a+", encoding="utf-8", newline="")
        if not lock(self._cache):
            self._cache.close()
            raise RuntimeError(
                f"another run writes into {folder} now; wait for it, or set another work_dir"
            )
        self._log = (folder / LOG_NAME).open("a", encoding="utf-8", errors="backslashreplace")
        self.num_shortened = 0

    @property
    def num_done(self) -> int:
        """Questions answered so far."""
        return len(self.predictions)

    def resume(self, batch_size: int) -> int:
        """Use the answers of an earlier run; returns how many questions are answered.

        An incomplete last row is dropped with its batch, so that the batches are those of an
        uninterrupted run.

        Raises:
            ConfigError: the cache is of another model, protocol or question set.
            FileError: it is damaged.
        """
        try:
            if self.cache_path.stat().st_size:
                self._check_fingerprint()
            predictions, complete_bytes = self._read_cache(batch_size)
        except BaseException:
            self.close()
            raise
        if complete_bytes < self.cache_path.stat().st_size:
            self._cache.truncate(complete_bytes)
        self._cache.seek(0, os.SEEK_END)
        _write_json(self.folder / FINGERPRINT_NAME, self._fingerprint)
        self.predictions = predictions
        if predictions:
            logger.info(
                "%d of %d answers are taken over from %s",
                len(predictions),
                len(self.dataset.questions),
                self.cache_path,
            )
        return len(predictions)

    def _read_cache(self, batch_size: int) -> tuple[list[str], int]:
        """Predictions of complete batches, and the bytes that they take in the file."""
        data = self.cache_path.read_bytes()
        lines = data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]
        if len(lines) < len(self.dataset.questions) or data[-1:] not in (b"", b"\n"):
            lines = lines[: len(lines) - len(lines) % batch_size]
        predictions = []
        for number, (line, question) in enumerate(
            zip(lines, self.dataset.questions, strict=False), start=1
        ):
            row = next(csv.reader([line.decode("utf-8", "replace")]), [])
            if row[:3] != [str(question.index), question.subject, question.answer] or len(row) != 4:
                raise FileError(
                    f"{self.cache_path}, line {number} is damaged: {line[:80]!r}; {self._remedy}"
                )
            predictions.append(row[3])
        if len(lines) > len(self.dataset.questions):
            raise FileError(f"{self.cache_path} has too many rows; {self._remedy}")
        return predictions, sum(len(line) + 1 for line in lines)

    @property
    def _remedy(self) -> str:
        return f"move {self.folder} away, or set another work_dir"

    def _check_fingerprint(self) -> None:
        path = self.folder / FINGERPRINT_NAME
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            stored = None
        if not isinstance(stored, dict):
            raise FileError(
                f"{self.cache_path} holds answers, but {path.name} beside it, which says of what, "
                f"is missing or damaged; {self._remedy}"
            )
        differences = [
            key if key in ("model", "data") else f"{key} ({stored.get(key)} there, {value} now)"
            for key, value in self._fingerprint.items()
            if stored.get(key) != value
        ]
        if differences:
            raise ConfigError(
                f"{self.cache_path} holds the answers of another run; different are: "
                f"{', '.join(differences)}; {self._remedy}"
            )

    def log_settings(self, values: dict[str, Any]) -> None:
        """Write the protocol and all settings at the start of the log."""
        self.log(f"[+] protocol: {json.dumps(self.protocol, ensure_ascii=False)}")
        for key, value in values.items():
            self.log(f"[+] set {key} to {value}")
        missing = self.dataset.missing
        for subject in missing:
            self.log(f"[~] Skip Task: {subject}")
        if missing:
            logger.warning(
                "%d of %d subjects have no files in %s and are left out: %s",
                len(missing),
                len(missing) + len(self.dataset.groups),
                self.protocol["data"],
                ", ".join(missing),
            )
        if self.num_done:
            self.log(f"[+] {self.num_done} answers are taken over from {CACHE_NAME}")

    def log(self, text: str) -> None:
        """Append a line to device0.log."""
        self._log.write(text + "\n")

    def add(self, results: Seq[Result]) -> None:
        """Write a batch."""
        writer = csv.writer(self._cache, lineterminator="\n")
        for result in results:
            question, value = result.question, result.prediction.value
            self._log_result(result)
            writer.writerow((question.index, question.subject, question.answer, value))
            self.predictions.append(value)
        self._log.flush()
        self._cache.flush()

    def _log_result(self, result: Result) -> None:
        if result.prompt is None:
            self.log(f"[!] question {result.question.index} is too long, even with no examples")
        else:
            if result.prompt.num_examples < len(result.question.examples):
                self.num_shortened += 1
            self.log(f"========== prompt start ==========\n{result.prompt.text}")
            self.log("==========  prompt end  ==========")
            self.log(f"[+] prompt length: {len(result.prompt.ids)}")
            self.log(f"========== answer start ==========\n{result.prediction.text}")
            self.log("==========  answer end  ==========")
            if result.prediction.logprobs:
                shown = ", ".join(f"{k} {v:.6f}" for k, v in result.prediction.logprobs.items())
                self.log(f"[+] log p: {shown}")
        verdict = "Correct" if result.correct else "Wrong"
        self.log(f"[{verdict}] predict: {result.prediction.value}, label: {result.question.answer}")

    def _is_correct(self, question: Question, value: str) -> bool:
        return value != NO_ANSWER and self.dataset.scorer.is_correct(value, question.answer)

    def unanswered(self) -> list[Question]:
        """Questions that could not be asked, or whose generated text holds no answer."""
        pairs = zip(self.dataset.questions, self.predictions, strict=True)
        return [question for question, value in pairs if value == NO_ANSWER]

    def scores(self) -> list[Score]:
        """One score per subject, in sorted order."""
        total, correct = Counter[str](), Counter[str]()
        for question, value in zip(self.dataset.questions, self.predictions, strict=True):
            total[question.subject] += 1
            correct[question.subject] += self._is_correct(question, value)
        groups = self.dataset.groups
        return [Score(s, groups[s], correct[s], total[s]) for s in sorted(total)]

    def finish(self, num_too_long: int) -> None:
        """Print the table with the names of the files, and write the accuracies.

        Args:
            num_too_long: questions that could not be asked.
        """
        scores = self.scores()
        protocol = {**self.protocol, "questions_too_long": num_too_long}
        classes: dict[str, Any] = {
            group: accuracy([s for s in scores if s.group == group])
            for group in sorted({s.group for s in scores})
        }
        classes["Avg"] = accuracy(scores)
        classes["Avg(Hard)"] = accuracy([s for s in scores if s.subject in HARD_SUBJECTS])
        self.log(f"[+] Avg acc: {classes['Avg']}")
        if self.num_shortened:
            logger.warning("%d prompts hold fewer examples, to fit", self.num_shortened)
        if num_too_long:
            text = f"{num_too_long} questions too long for {protocol['max_prompt_tokens']} tokens"
            self.log(f"[!] {text}")
            logger.warning("%s; they count as wrong", text)
        print_table(scores, protocol, self.folder, sys.stdout)
        _write_json(self.folder / CLASSES_NAME, {**classes, "protocol": protocol})
        subjects: dict[str, Any] = {s.subject: accuracy([s]) for s in scores}
        _write_json(self.folder / SUBJECTS_NAME, {**subjects, "protocol": protocol})

    def close(self) -> None:
        """Close the files, which unlocks the folder."""
        self._cache.close()
        self._log.close()


def print_table(scores: Seq[Score], protocol: dict[str, Any], folder: Path, out: TextIO) -> None:
    """Subject, class, correct, total and accuracy; then the protocol and the folder."""
    total = Score("total", "", sum(s.correct for s in scores), sum(s.total for s in scores))
    rows = [("subject", "class", "correct", "total", "accuracy")]
    for s in [*scores, total]:
        rows.append((s.subject, s.group, str(s.correct), str(s.total), f"{accuracy([s]):.4f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        print("  ".join(left + right).rstrip(), file=out)
    hard = accuracy([s for s in scores if s.subject in HARD_SUBJECTS])
    if hard is not None:
        print(f"Avg(Hard): {hard:.4f}", file=out)
    print("protocol: " + ", ".join(f"{k}={v}" for k, v in protocol.items()), file=out)
    print(f"results: {folder.resolve()}", file=out, flush=True)


def _write_json(path: Path, value: Any) -> None:
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
