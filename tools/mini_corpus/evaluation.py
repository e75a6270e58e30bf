# SPDX-License-Identifier: Apache-2.0
"""Held-out evaluation files of the small model, in the formats of BoolQ and MMLU."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from .choice import Choice, held_out_choices
from .knowledge import SUBJECTS
from .town import Passage, held_out_passages

SEED = 20_000
YES_NO_FILE_ROWS = 500
DEV_ROWS, VAL_ROWS, TEST_ROWS = 5, 20, 100


def yes_no_rows(number: int = YES_NO_FILE_ROWS) -> list[dict[str, object]]:
    """Return held-out yes/no questions as rows of a BoolQ file; longer lists extend shorter."""

    def row(item: Passage) -> dict[str, object]:
        question, truth = item.yes_no[0]
        return {
            "question": question,
            "title": item.title,
            "answer": truth,
            "passage": item.text,
        }

    return [row(item) for item in held_out_passages(SEED, number)]


def yes_no_prompt(row: dict[str, object]) -> str:
    """Return the prompt of a yes/no question, up to and with ``Answer:``."""
    return f"{row['title']} -- {row['passage']}\nQuestion: {row['question']}?\nAnswer:"


def choice_sets(subject: str) -> dict[str, list[Choice]]:
    """Return the held-out four-choice questions of a subject: ``dev``, ``val`` and ``test``."""
    items = held_out_choices(SEED, subject, DEV_ROWS + VAL_ROWS + TEST_ROWS)
    return {
        "dev": items[:DEV_ROWS],
        "val": items[DEV_ROWS : DEV_ROWS + VAL_ROWS],
        "test": items[DEV_ROWS + VAL_ROWS :],
    }


def write_files(folder: Path) -> None:
    """Write ``boolq/`` and ``mmlu/`` below ``folder``."""
    boolq = folder / "boolq"
    boolq.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in yes_no_rows()]
    (boolq / "dev.jsonl").write_text("".join(lines), encoding="utf-8")

    mmlu = folder / "mmlu"
    for subject in SUBJECTS:
        for split, items in choice_sets(subject).items():
            path = mmlu / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8", newline="") as stream:
                writer = csv.writer(stream, lineterminator="\n")
                writer.writerows(item.row() for item in items)
    words = {name: [name.replace("_", " "), group] for name, group in SUBJECTS.items()}
    mapping = json.dumps({"mmlu_all_sets": words}, indent=2)
    (mmlu / "subject_mapping.json").write_text(mapping + "\n", encoding="utf-8")
