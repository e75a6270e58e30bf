# SPDX-License-Identifier: Apache-2.0
"""`--task precision`: accuracy on BoolQ, MMLU or C-Eval, resumable at any question."""

from __future__ import annotations

import csv
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from gptneox.cli import Settings
from gptneox.config.errors import ConfigError
from gptneox.config.model import ModelConfig
from gptneox.config.settings import PrecisionSection
from gptneox.engine.api import Engine
from gptneox.engine.detokenizer import load_tokenizer
from gptneox.evaluation.datasets import SHIPPED_SETS, Dataset, read_boolq, read_ceval, read_mmlu
from gptneox.evaluation.fingerprint import content_hash, model_files
from gptneox.evaluation.scoring import NO_ANSWER, Question, QuestionFailed, Result, evaluate
from gptneox.evaluation.subjects import HARD_SUBJECTS
from gptneox.files import check_writable, lock, write_file
from gptneox.session import load_engine, start
from gptneox.weights.load import rank_directory

logger = logging.getLogger(__name__)

LOG_NAME, CACHE_NAME, FINGERPRINT_NAME = "device0.log", "cache0.csv", "cache0.json"
CLASSES_NAME, SUBJECTS_NAME = "result_0_classes_acc.json", "result_0_subject_acc.json"

# Flags of --task inference that would have to change an accuracy, or do nothing here.
_REFUSED_FLAGS = (
    "input_texts", "input_ids", "interactive", "stream", "output_file", "ignore_eos", "temperature",
    "top_k", "top_p", "repetition_penalty", "seed", "stop", "stop_token_ids", "max_output_length",
)  # fmt: skip


def run(settings: Settings) -> None:
    """Answer the configured questions and write the results into test_result/.

    Raises:
        ValueError, OSError, RuntimeError: with a message for the user.
    """
    for name in _REFUSED_FLAGS:
        if settings.given.get(name):
            raise ConfigError(f"--{name} does not go with --task precision; see [precision]")
    section = settings.precision
    dataset = read_dataset(section)
    device, group = start(settings)
    path = rank_directory(settings.model_path, group, prefer_parts=settings.attention == "flash")
    config = ModelConfig.from_pretrained(path)
    positions = config.positions(settings.engine.max_position_embeddings)
    dtype, _ = device.resolve_dtype(config.dtype, settings.model.dtype)
    protocol = describe_protocol(dataset, prompt_limit(dataset, positions))
    protocol |= {
        "dtype": str(dtype).removeprefix("torch."),
        "attention": settings.attention,
        "model_path": str(settings.model_path),
    }
    books: Books | None = None
    num_done = 0
    if group.rank == 0:
        fingerprint = make_fingerprint(protocol, dataset, path)
        books = Books(result_folder(section), dataset, protocol, fingerprint)
        num_done = books.resume(section.batch)
        books.log_settings({**asdict(section), "device": device.describe()})
    num_done = group.broadcast_object(num_done)

    engine: Engine | None = None

    def tokenizer() -> Any:
        if engine is not None:
            return engine.tokenizer
        return load_tokenizer(path, config.vocab_size)

    try:
        if num_done < len(dataset.questions):
            batch = replace(settings.engine, max_batch_size=section.batch)
            engine = load_engine(settings, device, group, batch)
            ask(dataset, engine, section.batch, num_done, books)
        if books:
            report(books, books.count_too_long(tokenizer, prompt_limit(dataset, positions)))
    finally:
        if books:
            books.close()


# -- what is asked -------------------------------------------------------------------------------


def read_dataset(section: PrecisionSection) -> Dataset:
    """The questions of [precision]: below work_dir/data, or the shipped ones.

    Raises:
        FileNotFoundError: there are none.
        ConfigError: a file is malformed, or nothing is shipped for the mode.
    """
    folder = data_folder(section)
    if section.mode == "boolq":
        logger.info("boolq compares two tokens without examples: shot and scoring do not apply")
        return read_boolq(folder)
    read = read_mmlu if section.mode == "mmlu" else read_ceval
    return read(
        folder,
        shots=section.shot,
        scoring=section.scoring,
        num_new_tokens=section.seq_len_out,
    )


def data_folder(section: PrecisionSection) -> Path:
    """work_dir/data/{mode}, or for mmlu and ceval work_dir/data itself; see `read_dataset`."""
    mode = section.mode
    if section.work_dir:
        data = Path(section.work_dir).expanduser() / "data"
        return data / mode if mode == "boolq" or (data / mode).is_dir() else data
    if mode == "ceval":
        raise ConfigError(
            "no C-Eval questions are shipped (the models read English); set [precision] work_dir "
            "to a folder with data/dev and data/val"
        )
    folder = SHIPPED_SETS / mode
    logger.info("[precision] work_dir is empty: the questions shipped in %s are asked", folder)
    return folder


def result_folder(section: PrecisionSection) -> Path:
    """work_dir/test_result; without a work_dir that of the current directory."""
    return Path(section.work_dir or ".").expanduser() / "test_result"


def prompt_limit(dataset: Dataset, max_positions: int) -> int:
    """The longest prompt, in tokens, that is asked."""
    limit = max_positions - dataset.scorer.num_new_tokens
    return limit if dataset.max_prompt_tokens is None else min(limit, dataset.max_prompt_tokens)


def describe_protocol(dataset: Dataset, max_prompt_tokens: int) -> dict[str, Any]:
    """How the questions are asked, as every result file states it."""
    return {
        "mode": dataset.name,
        "shot": dataset.num_examples,
        "scoring": dataset.scorer.name,
        "seq_len_out": dataset.scorer.num_new_tokens,
        "max_prompt_tokens": max_prompt_tokens,
        "questions": len(dataset.questions),
        "data": str(dataset.files[0].parent),
    }


def make_fingerprint(
    protocol: dict[str, Any], dataset: Dataset, checkpoint: Path
) -> dict[str, Any]:
    """What must be equal for cached answers to be the answers of this run.

    Args:
        protocol: see `describe_protocol`; where files lie does not count, what they hold does.
        dataset: the questions.
        checkpoint: the directory of the model, or of rank 0 in a cut one.
    """
    files = model_files(checkpoint)
    if (checkpoint.parent / "manifest.json").is_file():  # a cut model: the other ranks' parts, too
        ranks = sorted(p for p in checkpoint.parent.iterdir() if p.is_dir() and p != checkpoint)
        files += [file for rank in ranks for file in model_files(rank)]
    kept = {k: v for k, v in protocol.items() if k not in ("data", "model_path", "questions")}
    return {"model": content_hash(files), "data": dataset.content_hash(), **kept}


def ask(
    dataset: Dataset, engine: Engine, batch_size: int, num_done: int, books: Books | None
) -> None:
    """Ask what is left; rank 0 writes down each batch before the next one is computed.

    Raises:
        RuntimeError: a batch failed; everything before it is kept.
    """
    hide = None if books else True  # None: hidden unless stderr is a terminal
    with tqdm(
        total=len(dataset.questions), initial=num_done, desc=dataset.name, unit="q", disable=hide
    ) as bar:

        def on_result(results: list[Result]) -> None:
            assert books, "only rank 0 keeps books"
            books.add(results)
            bar.update(len(results))

        try:
            evaluate(
                dataset.questions[num_done:],
                dataset.scorer,
                engine,
                batch_size,
                on_result,
                max_prompt_tokens=dataset.max_prompt_tokens,
            )
        except QuestionFailed as error:
            kept = f"; {books.num_done} answers are kept in {books.cache_path}" if books else ""
            raise RuntimeError(f"{error}{kept}; run again to go on there") from error


# -- what is kept --------------------------------------------------------------------------------


class Books:
    """The files of test_result/: one run at a time, on rank 0.

    cache0.csv has one row `question_id,task_name,truth,predict` per question, in order, and
    cache0.json beside it says what the rows are answers to.
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
        """Take over the answers of an earlier run; returns how many questions are answered.

        A last row that was torn, and the batch it belongs to, are dropped, so that batches are
        what they would have been in one go.

        Raises:
            ConfigError: the cache is of another model, protocol or question set.
        """
        try:
            if self.cache_path.stat().st_size:
                self._check_fingerprint()
            kept, complete_bytes = self._read_cache(batch_size)
        except BaseException:
            self.close()
            raise
        if complete_bytes < self.cache_path.stat().st_size:
            self._cache.truncate(complete_bytes)
        self._cache.seek(0, os.SEEK_END)
        _write_json(self.folder / FINGERPRINT_NAME, self._fingerprint)
        self.predictions = kept
        if kept:
            logger.info(
                "%d of %d answers are taken over from %s",
                len(kept),
                len(self.dataset.questions),
                self.cache_path,
            )
        return len(kept)

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
                raise ConfigError(
                    f"{self.cache_path}, line {number} is damaged: {line[:80]!r}; {self._remedy}"
                )
            predictions.append(row[3])
        if len(lines) > len(self.dataset.questions):
            raise ConfigError(f"{self.cache_path} has too many rows; {self._remedy}")
        return predictions, sum(len(line) + 1 for line in lines)

    @property
    def _remedy(self) -> str:
        return f"move {self.folder} away, or set another work_dir"

    def _check_fingerprint(self) -> None:
        path = self.folder / FINGERPRINT_NAME
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            raise ConfigError(
                f"{self.cache_path} holds answers, but {path.name} beside it, which says of what, "
                f"is missing or damaged; {self._remedy}"
            )
        differences = [
            key if key in ("model", "data") else f"{key} ({found.get(key)} there, {value} now)"
            for key, value in self._fingerprint.items()
            if found.get(key) != value
        ]
        if differences:
            raise ConfigError(
                f"{self.cache_path} holds the answers of another run; different are: "
                f"{', '.join(differences)}; {self._remedy}"
            )

    def log_settings(self, values: dict[str, Any]) -> None:
        """Head the log with the protocol and all settings."""
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
        """Write down a batch."""
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

    def count_too_long(self, tokenizer: Callable[[], Any], limit: int) -> int:
        """Questions that could not be asked, counted anew, as a resumed run did not see them all.

        Args:
            tokenizer: gives the tokenizer; called only where it is needed.
            limit: tokens of the longest prompt.
        """
        open_ = [
            question
            for question, value in zip(self.dataset.questions, self.predictions, strict=True)
            if value == NO_ANSWER
        ]
        loaded = tokenizer() if open_ else None
        return sum(question.fit(loaded, limit) is None for question in open_)

    def scores(self) -> list[Score]:
        """One score per subject, in sorted order."""
        total, correct = Counter[str](), Counter[str]()
        for question, value in zip(self.dataset.questions, self.predictions, strict=True):
            total[question.subject] += 1
            correct[question.subject] += self._is_correct(question, value)
        groups = self.dataset.groups
        return [Score(s, groups[s], correct[s], total[s]) for s in sorted(total)]

    def close(self) -> None:
        """Close the files, and let other runs in."""
        self._cache.close()
        self._log.close()


def _write_json(path: Path, value: Any) -> None:
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# -- what comes out ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """Questions of one subject."""

    subject: str
    group: str
    correct: int
    total: int


def accuracy(scores: Seq[Score]) -> float | None:
    """Share of right answers from 0 to 1; None of no questions."""
    total = sum(s.total for s in scores)
    return sum(s.correct for s in scores) / total if total else None


def report(books: Books, num_too_long: int) -> None:
    """Print the table and where the result files are, and write both of them."""
    scores = books.scores()
    protocol = {**books.protocol, "questions_too_long": num_too_long}
    classes: dict[str, Any] = {
        group: accuracy([s for s in scores if s.group == group])
        for group in sorted({s.group for s in scores})
    }
    classes["Avg"] = accuracy(scores)
    classes["Avg(Hard)"] = accuracy([s for s in scores if s.subject in HARD_SUBJECTS])
    books.log(f"[+] Avg acc: {classes['Avg']}")
    if books.num_shortened:
        logger.warning("%d prompts hold fewer examples, to fit", books.num_shortened)
    if num_too_long:
        text = f"{num_too_long} questions too long for {protocol['max_prompt_tokens']} tokens"
        books.log(f"[!] {text}")
        logger.warning("%s; they count as wrong", text)
    print_table(scores, protocol, books.folder, sys.stdout)
    _write_json(books.folder / CLASSES_NAME, {**classes, "protocol": protocol})
    subjects: dict[str, Any] = {s.subject: accuracy([s]) for s in scores}
    _write_json(books.folder / SUBJECTS_NAME, {**subjects, "protocol": protocol})


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
