# SPDX-License-Identifier: Apache-2.0
"""Four-choice questions about the known facts, in the form of the MMLU data set."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from .knowledge import RELATIONS, SUBJECTS, Relation, sentence

LETTERS = "ABCD"
HELD_OUT_SHARE = 8
"""One set of options out of this many is kept for evaluation and never trained on."""


def listing(options: Sequence[str]) -> str:
    """Return options with their letters, one per line."""
    pairs = zip(LETTERS, options, strict=False)
    return "\n".join(f"{letter}. {text}" for letter, text in pairs)


_BY_SUBJECT: dict[str, tuple[Relation, ...]] = {
    subject: tuple(
        relation
        for relation in RELATIONS
        if relation.subject == subject and len(relation.values()) >= len(LETTERS)
    )
    for subject in SUBJECTS
}


@dataclass(frozen=True)
class Choice:
    """A question with four options.

    Attributes:
        question: The question.
        options: Four options.
        answer: Index of the right option.
        hint: Sentence that gives the answer away, for training.
    """

    question: str
    options: tuple[str, ...]
    answer: int
    hint: str

    def held_out(self) -> bool:
        """Tell whether this fact with this set of options is kept for evaluation.

        The checksum ignores the order of the options and takes the right answer in, so that a
        held-out set is unseen in every order.
        """
        key = "|".join([self.question, self.options[self.answer], *sorted(self.options)])
        return zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0

    def prompt(self) -> str:
        """Return the question with its options up to ``Answer:``."""
        return f"{self.question}\n{self.listed()}\nAnswer:"

    def listed(self) -> str:
        """Return the options with their letters, one per line."""
        return listing(self.options)

    def letter(self) -> str:
        """Return the letter of the right option."""
        return LETTERS[self.answer]

    def row(self) -> list[str]:
        """Return the question as a row of an evaluation file."""
        return [self.question, *self.options, self.letter()]


def arrange(
    rng: random.Random, question: str, value: str, hint: str, wrong: Sequence[str]
) -> Choice:
    """Return a question with its options in random order."""
    shown = [*wrong, value]
    rng.shuffle(shown)
    return Choice(question, tuple(shown), shown.index(value), hint)


def _ask(rng: random.Random, relation: Relation, key: str, value: str) -> tuple[str, str, str]:
    """Return question, answer and hint for a fact; in the hint a space precedes the answer."""
    question = sentence(rng.choice(relation.questions).format(k=key))
    return question, value, f"Hint: {relation.statements[0].format(k=key, v=value)}"


def make_choice(rng: random.Random, subject: str) -> Choice:
    """Make a question of a subject.

    Args:
        rng: Source of randomness.
        subject: One of :data:`~mini_corpus.knowledge.SUBJECTS`.

    Returns:
        The question.
    """
    pool = _BY_SUBJECT[subject]
    relation = rng.choices(pool, [len(r.rows) ** 0.5 for r in pool])[0]
    key, value = rng.choice(relation.rows)
    good = {v for k, v in relation.rows if k == key}
    wrong = rng.sample([v for v in relation.values() if v not in good], len(LETTERS) - 1)
    return arrange(rng, *_ask(rng, relation, key, value), wrong=wrong)


def header(subject: str, blanks: int = 2) -> str:
    """Return the line that introduces a subject."""
    words = subject.replace("_", " ")
    return (
        "The following are multiple choice questions (with answers) about"
        f"{' ' * blanks}{words}.\n\n"
    )


def make_quiz(rng: random.Random, subject: str) -> list[Choice]:
    """Return questions that share their options, two for each option where there are so many.

    Args:
        rng: Source of randomness.
        subject: One of :data:`~mini_corpus.knowledge.SUBJECTS`.

    Returns:
        The questions that are not held out.
    """
    relation = rng.choice(_BY_SUBJECT[subject])
    options = tuple(rng.sample(relation.values(), len(LETTERS)))
    found: list[Choice] = []
    for index, value in enumerate(options):
        keys = [k for k, v in relation.rows if v == value]
        for key in rng.sample(keys, min(2, len(keys))):
            if any((key, other) in relation.rows for other in options if other != value):
                continue
            question, _, hint = _ask(rng, relation, key, value)
            found.append(Choice(question, options, index, hint))
    kept = [item for item in found if not item.held_out()]
    return kept or make_quiz(rng, subject)


def training_choices(rng: random.Random, subject: str, number: int) -> list[Choice]:
    """Make questions of which none is held out."""
    found: list[Choice] = []
    while len(found) < number:
        item = make_choice(rng, subject)
        if not item.held_out():
            found.append(item)
    return found


def held_out_choices(seed: int, subject: str, number: int) -> list[Choice]:
    """Return distinct held-out questions of a subject."""
    rng = random.Random(f"{seed}-{subject}")
    found: dict[tuple[str, tuple[str, ...]], Choice] = {}
    while len(found) < number:
        item = make_choice(rng, subject)
        if item.held_out():
            found.setdefault((item.question, tuple(sorted(item.options))), item)
    return list(found.values())
