# SPDX-License-Identifier: Apache-2.0
"""Question sets on disk: BoolQ, MMLU, C-Eval, CMMLU and GSM8K in their published formats.

Cells are text: "None", "NA", "nan" and "1.0" are not converted.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptneox.config.errors import FileError, NoSuchPath
from gptneox.config.files import read_text
from gptneox.config.settings import EMBEDDED_CHECKPOINT
from gptneox.evaluation.scoring import (
    LETTERS,
    GenerationScorer,
    NextTokenScorer,
    Question,
    Scorer,
    choice_from_reasoning,
    first_character,
    first_letter,
    last_number,
    same_number,
)
from gptneox.evaluation.subjects import CEVAL_SUBJECTS, MMLU_SUBJECTS, Subject, read_mapping

SHIPPED_SETS = EMBEDDED_CHECKPOINT / "eval"  # one folder for each set
MAX_PROMPT_TOKENS = 2000  # of the multiple-choice protocol; examples beyond it are left out
CMMLU_MAX_PROMPT_TOKENS = 2048


@dataclass(frozen=True)
class Dataset:
    """Questions, their scorer, and the files they come from."""

    name: str
    questions: list[Question]
    scorer: Scorer
    files: list[Path]
    groups: dict[str, str] = field(default_factory=dict)  # subject -> class
    num_examples: int = 0  # requested before each question
    max_prompt_tokens: int | None = None  # the protocol's; the model's own limit applies besides
    missing: list[str] = field(default_factory=list)  # subjects without files

    def content_hash(self) -> str:
        """SHA-256 over all prompts and their answers, in order."""
        digest = hashlib.sha256()
        for q in self.questions:
            row = [q.subject, q.header, list(q.examples), q.body, q.answer]
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()


# -- BoolQ ---------------------------------------------------------------------------------------

# Of equal log-probabilities the first counts: True only where " yes" is strictly likelier.
_YES_NO = {
    "False": "How can we learning machine learning: no",
    "True": "How can we learning machine learning: yes",
}


def read_boolq(folder: Path) -> Dataset:
    """Every *.jsonl of a folder, zero-shot; log p of " yes" against " no" after the prompt.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: a line is not an object with title, question, passage and answer.
    """
    files = _files(folder, "*.jsonl", "BoolQ (such as dev.jsonl)")
    questions: list[Question] = []
    for path in files:
        for where, row in _json_lines(path):
            title, question, passage = (_text(row, k, where) for k in _BOOLQ_TEXTS)
            if not isinstance(row.get("answer"), bool):
                raise FileError(
                    f"{where}: answer is {row.get('answer')!r}; true or false is expected"
                )
            body = f"{title} -- {passage}\nQuestion: {question}?\nAnswer:"
            questions.append(Question(len(questions), path.stem, body, str(row["answer"])))
    groups = {path.stem: "boolq" for path in files}
    return Dataset("boolq", questions, NextTokenScorer(_YES_NO), files, groups)


_BOOLQ_TEXTS = ("title", "question", "passage")


# -- four choices --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChoiceRow:
    """One row of a multiple-choice file."""

    question: str
    options: tuple[str, ...]  # four
    answer: str  # A, B, C or D

    def text(self, lead: str = "", answer_lead: str = "Answer:") -> str:
        """Question and options, up to the answer."""
        lines = [f"{letter}. {o}" for letter, o in zip(LETTERS, self.options, strict=True)]
        return "\n".join([lead + self.question, *lines, answer_lead])


def read_choice_rows(path: Path, *, header: bool) -> list[ChoiceRow]:
    """Rows of question, A, B, C, D, answer.

    Args:
        path: a CSV file in UTF-8, with or without a byte-order mark.
        header: the first row is a header and the first column an id; columns after the answer
            (explanations) are ignored.

    Raises:
        FileError: a row is malformed; the message names file and line.
    """
    rows = []
    reader = csv.reader(io.StringIO(read_text(path, newline=""), newline=""), strict=True)
    try:
        for i, cells in enumerate(reader):
            if cells and not (header and i == 0):
                where = f"{path}, line {reader.line_num}"
                rows.append(_choice_row(cells[1:7] if header else cells, where))
    except csv.Error as error:
        raise FileError(f"{path}, after row {len(rows)}: {error}") from error
    return rows


def _choice_row(cells: list[str], where: str) -> ChoiceRow:
    if len(cells) != 6:
        raise FileError(
            f"{where}: {len(cells)} columns; question, A, B, C, D and answer are expected"
        )
    answer = cells[5].strip()
    if answer not in LETTERS:
        raise FileError(f"{where}: the answer is {cells[5]!r}; A, B, C or D is expected")
    return ChoiceRow(cells[0], tuple(cells[1:5]), answer)


def choice_header(subject: str) -> str:
    """The line before the examples; two blanks after "about", as in Hendrycks' code."""
    words = "".join(f" {part}" for part in subject.split("_"))
    return f"The following are multiple choice questions (with answers) about {words}.\n\n"


def choice_scorer(scoring: str, num_new_tokens: int) -> Scorer:
    """`logits`: the likeliest of " A" to " D"; `first_letter`: the first one generated."""
    if scoring == "first_letter":
        return GenerationScorer("first_letter", num_new_tokens, first_letter)
    return NextTokenScorer({letter: f"Answer: {letter}" for letter in LETTERS})


def read_mmlu(
    folder: Path, *, shots: int = 5, scoring: str = "logits", num_new_tokens: int = 32
) -> Dataset:
    """{folder}/dev/{subject}_dev.csv (examples) and {folder}/val/{subject}_val.csv.

    The subjects are those of {folder}/subject_mapping.json, or else the 57 of MMLU.

    Raises:
        FileNotFoundError: no subject has its files.
        FileError: a file is malformed.
    """
    scorer = choice_scorer(scoring, num_new_tokens)
    return _MMLU.read(folder, "val", _few_shot, scorer, shots, MAX_PROMPT_TOKENS)


def read_ceval(
    folder: Path, *, shots: int = 5, scoring: str = "logits", num_new_tokens: int = 32
) -> Dataset:
    """Like `read_mmlu`, for 52 subjects in files with a header row and an id column."""
    scorer = choice_scorer(scoring, num_new_tokens)
    return _CEVAL.read(folder, "val", _few_shot, scorer, shots, MAX_PROMPT_TOKENS)


def read_mmlu_generated(folder: Path, *, shots: int = 0) -> Dataset:
    """MMLU's test split as tests/modeltest asks it.

    Without examples the model reasons for 256 tokens, from which `choice_from_reasoning` takes
    a letter. With examples it generates 20 tokens, and their first character is the answer.
    """
    form = _few_shot if shots else _mmlu_zero_shot
    return _MMLU.read(folder, "test", form, generated_scorer(shots), shots)


def read_ceval_generated(folder: Path, *, shots: int = 0) -> Dataset:
    """C-Eval's val split, asked as `read_mmlu_generated` does, in Chinese without examples."""
    form = _few_shot if shots else _ceval_zero_shot
    return _CEVAL.read(folder, "val", form, generated_scorer(shots), shots)


def read_cmmlu(folder: Path, *, shots: int = 5) -> Dataset:
    """{folder}/dev/{subject}.csv and test/{subject}.csv: the likeliest of A to D.

    The longest examples of a prompt that is too long are dropped first. Without a
    subject_mapping.json the files of test/ give the subjects.
    """
    subjects = {path.stem: Subject("") for path in (folder / "test").glob("*.csv")}
    choices = _ChoiceSet("cmmlu", subjects, header=True, pattern="{split}/{subject}.csv")
    scorer = NextTokenScorer({letter: f"答案是：{letter}" for letter in LETTERS})
    return choices.read(folder, "test", _cmmlu, scorer, shots, CMMLU_MAX_PROMPT_TOKENS)


def generated_scorer(shots: int) -> Scorer:
    """The scorer of modeltest's multiple-choice sets."""
    if shots:
        return GenerationScorer("first_character", 20, first_character)
    return GenerationScorer("reasoning", 256, choice_from_reasoning)


# Subject, its entry, examples, row -> header, examples and body of the Question.
_Form = Callable[[str, Subject, Seq[ChoiceRow], ChoiceRow], dict[str, Any]]


def _few_shot(
    name: str, subject: Subject, examples: Seq[ChoiceRow], row: ChoiceRow
) -> dict[str, Any]:
    texts = tuple(f"{r.text()} {r.answer}\n\n" for r in examples)
    return {"header": choice_header(name), "examples": texts, "body": row.text()}


def _mmlu_zero_shot(
    name: str, subject: Subject, examples: Seq[ChoiceRow], row: ChoiceRow
) -> dict[str, Any]:
    lead = (
        f"\nThere is a single choice question about {name.replace('_', ' ')}. "
        "Answer the question by replying A, B, C or D.\nQ: "
    )
    return {"body": row.text(lead, "Let's think step by step. A: ")}


def _ceval_zero_shot(
    name: str, subject: Subject, examples: Seq[ChoiceRow], row: ChoiceRow
) -> dict[str, Any]:
    lead = f"以下是中国关于{subject.chinese or name}考试的单项选择题，请选出其中的正确答案。\n"
    return {"body": row.text(lead, "让我们一步一步思考。答案: ")}


def _cmmlu(name: str, subject: Subject, examples: Seq[ChoiceRow], row: ChoiceRow) -> dict[str, Any]:
    body, *texts = (r.text("题目：", "答案是：") for r in (row, *examples))
    header = f"以下是关于{subject.chinese or name}的单项选择题，请直接给出正确答案的选项。\n\n"
    answered = (f"{text}{r.answer}\n\n" for text, r in zip(texts, examples, strict=True))
    return {"header": header, "examples": tuple(answered), "body": body, "drop_longest": True}


@dataclass(frozen=True)
class _ChoiceSet:
    """A published multiple-choice set."""

    name: str
    subjects: Mapping[str, Subject]  # where a folder has no subject_mapping.json
    header: bool  # see `read_choice_rows`
    pattern: str = "{split}/{subject}_{split}.csv"

    def read(
        self,
        folder: Path,
        split: str,
        form: _Form,
        scorer: Scorer,
        shots: int,
        max_prompt_tokens: int | None = None,
    ) -> Dataset:
        """All subjects in sorted order; the examples are the first `shots` rows of dev."""
        splits = [split, "dev"] if shots else [split]

        def paths_of(subject: str) -> list[Path]:
            return [folder / self.pattern.format(split=s, subject=subject) for s in splits]

        subjects = self._subjects(folder)
        questions: list[Question] = []
        files, missing = [], []
        for subject in sorted(subjects):
            paths = paths_of(subject)
            if not all(path.is_file() for path in paths):
                missing.append(subject)
                continue
            files += paths
            rows, *dev = (read_choice_rows(path, header=self.header) for path in paths)
            examples = dev[0][:shots] if dev else []
            for row in rows:
                parts = form(subject, subjects[subject], examples, row)
                questions.append(Question(len(questions), subject, answer=row.answer, **parts))
        if not questions:
            expected = " and ".join(map(str, paths_of("SUBJECT")))
            raise FileNotFoundError(
                f"no questions of {self.name}: none of its {len(subjects)} subjects has {expected}"
            )
        groups = {s: subjects[s].group or self.name for s in subjects if s not in missing}
        return Dataset(
            self.name, questions, scorer, files, groups, shots, max_prompt_tokens, missing
        )

    def _subjects(self, folder: Path) -> Mapping[str, Subject]:
        """Those of subject_mapping.json, whose empty fields are filled; or else our own."""
        path = folder / "subject_mapping.json"
        if not path.is_file():
            return self.subjects
        subjects = {}
        for name, entry in read_mapping(path, f"{self.name}_all_sets").items():
            own = self.subjects.get(name, Subject(""))
            subjects[name] = Subject(entry.group or own.group, entry.chinese or own.chinese)
        return subjects


_MMLU = _ChoiceSet("mmlu", MMLU_SUBJECTS, header=False)
_CEVAL = _ChoiceSet("ceval", CEVAL_SUBJECTS, header=True)


# -- GSM8K ---------------------------------------------------------------------------------------


def read_gsm8k(folder: Path) -> Dataset:
    """Every *.jsonl of a folder, without examples: the last number of 512 new tokens counts.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: a line is not an object with question and answer, or holds no number.
    """
    files = _files(folder, "*.jsonl", "GSM8K (GSM8K.jsonl)")
    questions: list[Question] = []
    for path in files:
        for where, row in _json_lines(path):
            answer = last_number(_text(row, "answer", where))
            if not answer:
                raise FileError(f"{where}: the answer holds no number")
            body = _text(row, "question", where)
            questions.append(Question(len(questions), path.stem, body, answer))
    scorer = GenerationScorer("last_number", 512, last_number, same_number)
    return Dataset("gsm8k", questions, scorer, files, {path.stem: "gsm8k" for path in files})


# -- files ---------------------------------------------------------------------------------------


def _files(folder: Path, pattern: str, what: str) -> list[Path]:
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    if not files:
        is_there = folder.is_dir()
        state = "holds no such file" if is_there else "does not exist"
        error = FileNotFoundError if is_there else NoSuchPath
        raise error(f"no {pattern} of {what} in {folder}: the folder {state}")
    return files


def _json_lines(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """(where, object) of each line that is not blank."""
    is_empty = True
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FileError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise FileError(f"{where}: {type(row).__name__}; a JSON object is expected")
        is_empty = False
        yield where, row
    if is_empty:
        raise FileError(f"{path} holds no questions")


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise FileError(f"{where}: {key} is {value!r}; a text is expected")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise FileError(f"{where}: {key} holds half a surrogate pair, which is no character")
    return value
