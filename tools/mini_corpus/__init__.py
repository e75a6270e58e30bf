"""Generated training corpus of the small model: facts, prose, yes/no and four-choice questions.

Everything here is written for this project: the tables, the texts and the code that turns them
into documents. A document is made of pieces, each a text with its weight in the loss; the pieces
that decide an answer weigh more than the text around them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from . import prose
from .choice import Choice, arrange, header, make_drill, training_choices
from .knowledge import BOOKS, RELATIONS, SUBJECTS, Relation, sentence
from .town import Passage, passage

END = "<|endoftext|>"

TEXT_WEIGHT = 1.0
CONTEXT_WEIGHT = 0.2
VALUE_WEIGHT = 2.0
ANSWER_WEIGHT = 5.0
LETTER_WEIGHT = 4.0

Pieces = list[tuple[str, float]]
"""Consecutive pieces of text, each with its weight in the loss."""


@dataclass(frozen=True)
class Document:
    """A training document; the end mark is added by the reader.

    Attributes:
        stem: The text, or what all branches have in common.
        branches: Alternative continuations of the stem. None of them sees another one, so that
            many questions can be asked about one passage as if each were the only one.
    """

    stem: Pieces
    branches: list[Pieces] = field(default_factory=list)

    def texts(self) -> list[str]:
        """Return the text of the stem with each of its continuations."""
        stem = "".join(text for text, _ in self.stem)
        return [stem + "".join(text for text, _ in branch) for branch in self.branches or [[]]]

_SUBJECT_NAMES = tuple(SUBJECTS)
_LISTED = tuple(r for r in RELATIONS if r.name in {"capital", "author", "opposite", "young"})


@dataclass(frozen=True)
class Stage:
    """Difficulty of the documents at one point of the training.

    Attributes:
        facts: Largest number of statements in a yes/no passage.
        seek: Share of questions for a value among the questions to a passage.
        pick: Share of questions that offer values to choose from, among the same.
        options: Smallest number of options of a multiple-choice question.
        shots: Largest number of worked examples in front of a multiple-choice question.
        drill: Share of multiple-choice documents with many short questions on the same options.
        apart: Share of multiple-choice documents whose questions do not see each other.
        hint: Share of multiple-choice questions with a sentence that gives the answer away.
        many: Share of multiple-choice documents with far more examples than ``shots``.
    """

    facts: int
    seek: float
    pick: float
    options: int
    shots: int
    drill: float
    apart: float
    hint: float
    many: float = 0.0


def stage(progress: float) -> Stage:
    """Return the difficulty after a share ``progress`` (0 to 1) of the training."""
    if progress < 0.1:
        return Stage(
            facts=2, seek=0.4, pick=0.1, options=2, shots=1, drill=0.8, apart=0.8, hint=0.5
        )
    if progress < 0.35:
        return Stage(
            facts=4, seek=0.15, pick=0.2, options=3, shots=3, drill=0.7, apart=0.6, hint=0.3
        )
    if progress < 0.55:
        return Stage(
            facts=5, seek=0.1, pick=0.2, options=4, shots=4, drill=0.35, apart=0.5, hint=0.1
        )
    many = 0.06 if progress > 0.7 else 0.0
    return Stage(
        facts=5, seek=0.1, pick=0.1, options=4, shots=5, drill=0.1, apart=0.3, hint=0.05, many=many
    )


def _fact(rng: random.Random, relation: Relation) -> str:
    key, value = rng.choice(relation.rows)
    say = sentence(rng.choice(relation.statements).format(k=key, v=value))
    form = rng.random()
    if form < 0.4:
        return say
    question = sentence(rng.choice(relation.questions).format(k=key))
    if rng.random() < 0.2:
        question = question.replace("What is ", "What's ")
    if form < 0.75:
        say = sentence(relation.statements[0].format(k=key, v=value)).split("? ")[-1]
        return f"{question}\n{say}"
    return f"Question: {question}\nAnswer: {value}"


def _arrows(rng: random.Random) -> str:
    relation = rng.choice(_LISTED)
    rows = BOOKS if rng.random() < 0.5 else relation.rows
    lines = rng.sample(rows, 2 if rng.random() < 0.7 else rng.randint(3, 6))
    return "\n".join(f"{sentence(k)}->{v}" for k, v in lines)


def plain(rng: random.Random) -> str:
    """Return general text: a fact, an answer, a paragraph, a list or a story."""
    form = rng.random()
    if form < 0.48:
        weights = [len(r.rows) for r in RELATIONS]
        return _fact(rng, rng.choices(RELATIONS, weights)[0])
    if form < 0.56:
        return _arrows(rng)
    if form < 0.60:
        return rng.choice(prose.DEMOS)
    if form < 0.85:
        return "\n".join(prose.answer(rng))
    if form < 0.92:
        return "\n".join(prose.story(rng))
    return prose.paragraph(rng)


def _trainable(make: Callable[[], Passage]) -> Passage:
    item = make()
    while item.held_out():
        item = make()
    return item


def _asked(rng: random.Random, level: Stage, item: Passage, index: int) -> Pieces:
    question, truth = item.yes_no[index]
    form = rng.random() if item.seek else 1.0
    if form < level.pick:
        seek = item.seek[index]
        wrong = seek.wrong[: rng.randint(level.options, 4) - 1]
        choice = arrange(rng, f"Question: {seek.question}?", seek.value, wrong)
        return [(f"\n{choice.prompt()}", CONTEXT_WEIGHT), (f" {choice.letter()}", LETTER_WEIGHT)]
    if form < level.pick + level.seek:
        question, end, weight = item.seek[index].question, item.seek[index].value, VALUE_WEIGHT
    else:
        end, weight = ("yes" if truth else "no"), ANSWER_WEIGHT
    return [(f"\nQuestion: {question}?\nAnswer:", CONTEXT_WEIGHT), (f" {end}", weight)]


def yes_no(rng: random.Random, level: Stage) -> Document:
    """Return a passage with several questions, most of them answered by yes or no."""
    asked = rng.randint(5, 10)
    fewest = 1 if rng.random() < 0.2 else min(3, level.facts - 1)
    count = rng.randint(fewest, level.facts)
    item = _trainable(lambda: passage(rng, count, asked, fact_share=0.15))
    branches = [_asked(rng, level, item, index) for index in range(asked)]
    return Document([(f"{item.title} -- {item.text}", CONTEXT_WEIGHT)], branches)


def _solved(rng: random.Random, item: Choice, hint: float) -> Pieces:
    given = f"{item.hint}\n" if rng.random() < hint else ""
    return [(given + item.prompt(), CONTEXT_WEIGHT), (f" {item.letter()}", LETTER_WEIGHT)]


def _drill(rng: random.Random, subject: str, hint: float) -> Document:
    """Return a list of options with short questions that tie letters, options and facts."""
    items = make_drill(rng, subject)
    branches: list[Pieces] = []
    for item in items:
        letter, option = item.letter(), item.options[item.answer]
        given = f"\n{item.hint}" if rng.random() < hint else ""
        forms = (
            (f"\nOption {letter} is", option, VALUE_WEIGHT),
            (f"\n{option} is option", letter, LETTER_WEIGHT),
            (f"{given}\n{item.question}\nAnswer:", letter, LETTER_WEIGHT),
        )
        for asking, end, weight in rng.sample(forms, 2):
            branches.append([(asking, CONTEXT_WEIGHT), (f" {end}", weight)])
    return Document([(items[0].listed(), CONTEXT_WEIGHT)], branches)


def four_choice(rng: random.Random, level: Stage) -> Document:
    """Return multiple-choice questions of one subject, each with its letter."""
    subject = rng.choice(_SUBJECT_NAMES)
    if rng.random() < level.drill:
        return _drill(rng, subject, level.hint)
    options = rng.randint(level.options, 4)
    head: Pieces = [(header(subject, rng.choice((1, 2))), CONTEXT_WEIGHT)]
    if rng.random() < level.apart:
        items = training_choices(rng, subject, rng.randint(3, 5), options)
        return Document(head, [_solved(rng, item, level.hint) for item in items])
    shots = rng.randint(8, 16) if rng.random() < level.many else rng.randint(0, level.shots)
    pieces = head if rng.random() < 0.8 else []
    for index, item in enumerate(training_choices(rng, subject, shots + 1, options)):
        gap: Pieces = [("\n\n", CONTEXT_WEIGHT)] if index else []
        pieces = pieces + gap + _solved(rng, item, level.hint)
    return Document(pieces)


def document(rng: random.Random, progress: float) -> Document:
    """Return one training document.

    Args:
        rng: Source of randomness.
        progress: Share of the training that is done, which sets mix and difficulty.

    Returns:
        The document.
    """
    level = stage(progress)
    form = rng.random()
    if form < 0.24:
        return Document([(plain(rng), TEXT_WEIGHT)])
    if form < 0.58:
        return yes_no(rng, level)
    return four_choice(rng, level)


__all__ = ["END", "Document", "Pieces", "Stage", "document", "stage"]
