# SPDX-License-Identifier: Apache-2.0
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
from .choice import LETTERS, Choice, arrange, header, listing, make_quiz, training_choices
from .knowledge import BOOKS, RELATIONS, SUBJECTS, Relation, sentence
from .town import COMMON, Passage, passage

END = "<|endoftext|>"

TEXT_WEIGHT = 3.0
CONTEXT_WEIGHT = 0.2
VALUE_WEIGHT = 2.0
ANSWER_WEIGHT = 5.0
LETTER_WEIGHT = 16.0  # of a question, of which there are few among many tokens
NEXT_WEIGHT = 4.2  # a letter right after the option that is asked for
LATER_WEIGHT = 4.4  # a letter some tokens after it
FIND_WEIGHT = 4.6  # a letter after a list, where the option was named in front of the list

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
_VALUES = [r.values() for r in RELATIONS if len(r.values()) >= len(LETTERS)]
_LISTED = tuple(r for r in RELATIONS if r.name in {"capital", "author", "opposite", "young"})


@dataclass(frozen=True)
class Stage:
    """Mix and difficulty of the documents at one point of the training.

    Attributes:
        until: Share of the training at which the stage ends.
        text: Share of documents that are general text.
        yes_no: Share of documents that are passages with yes/no questions.
        letters: Share of documents that tie options to their letters, without any question.
        plain_letters: Share of the above with common words, the rest have values of facts.
        facts: Largest number of statements in a yes/no passage.
        seek: Share of questions for a value among the questions to a passage.
        pick: Share of questions that offer values to choose from, among the same.
        shots: Largest number of worked examples in front of a multiple-choice question.
        apart: Share of multiple-choice documents whose questions do not see each other.
        hint: Share of multiple-choice questions with a sentence that gives the answer away.
        spoken: Share of multiple-choice questions that name the answer before its letter.
        find: Share of the documents on letters that name an option before they list it.
        quiz: Share of multiple-choice documents with many questions on the same options.
        bare: Share of multiple-choice documents of a single question without the heading.
        many: Share of multiple-choice documents with far more examples than ``shots``.
    """

    until: float
    text: float
    yes_no: float
    letters: float
    plain_letters: float
    facts: int
    seek: float
    pick: float
    shots: int
    apart: float
    hint: float
    spoken: float
    find: float = 0.5
    quiz: float = 0.0
    bare: float = 0.0
    many: float = 0.0


_STAGES = (
    Stage(
        until=0.2,
        text=0.3,
        yes_no=0.4,
        letters=0.3,
        plain_letters=0.5,
        find=0.0,
        facts=3,
        seek=0.3,
        pick=0.1,
        shots=0,
        apart=1.0,
        hint=1.0,
        spoken=0.0,
    ),
    Stage(
        until=0.35,
        text=0.1,
        yes_no=0.2,
        letters=0.6,
        plain_letters=0.4,
        find=0.2,
        facts=4,
        seek=0.15,
        pick=0.2,
        shots=0,
        apart=0.0,
        hint=0.6,
        spoken=0.3,
        quiz=0.5,
        bare=1.0,
    ),
    Stage(
        until=0.45,
        text=0.06,
        yes_no=0.12,
        letters=0.45,
        plain_letters=0.5,
        find=0.75,
        facts=5,
        seek=0.1,
        pick=0.2,
        shots=0,
        apart=0.0,
        hint=0.6,
        spoken=0.2,
        quiz=0.25,
        bare=0.9,
    ),
    Stage(
        until=0.58,
        text=0.1,
        yes_no=0.2,
        letters=0.1,
        plain_letters=0.2,
        find=0.6,
        facts=5,
        seek=0.1,
        pick=0.2,
        shots=3,
        apart=0.3,
        hint=0.25,
        spoken=0.15,
        quiz=0.25,
        bare=0.6,
    ),
    Stage(
        until=0.75,
        text=0.2,
        yes_no=0.3,
        letters=0.03,
        plain_letters=0.2,
        facts=5,
        seek=0.1,
        pick=0.1,
        shots=5,
        apart=0.3,
        hint=0.05,
        spoken=0.03,
        quiz=0.15,
        bare=0.4,
        many=0.02,
    ),
    Stage(
        until=0.9,
        text=0.12,
        yes_no=0.62,
        letters=0.0,
        plain_letters=0.2,
        facts=5,
        seek=0.1,
        pick=0.1,
        shots=5,
        apart=0.3,
        hint=0.02,
        spoken=0.0,
        quiz=0.05,
        bare=0.2,
        many=0.03,
    ),
    Stage(
        until=1.0,
        text=0.08,
        yes_no=0.82,
        letters=0.0,
        plain_letters=0.2,
        facts=5,
        seek=0.1,
        pick=0.1,
        shots=5,
        apart=0.3,
        hint=0.02,
        spoken=0.0,
        quiz=0.05,
        bare=0.2,
        many=0.03,
    ),
)


def stage(progress: float) -> Stage:
    """Return the difficulty after a share ``progress`` (0 to 1) of the training."""
    return next((level for level in _STAGES if progress < level.until), _STAGES[-1])


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
        wrong = seek.wrong[:3]
        choice = arrange(rng, f"Question: {seek.question}?", seek.value, "", wrong)
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


def _solved(rng: random.Random, item: Choice, level: Stage) -> Pieces:
    given = f"{item.hint}\n" if rng.random() < level.hint else ""
    if rng.random() < level.spoken:
        return [
            (f"{given}{item.question}\n{item.listed()}\nIt is", CONTEXT_WEIGHT),
            (f" {item.options[item.answer]}", VALUE_WEIGHT),
            ("\nAnswer:", CONTEXT_WEIGHT),
            (f" {item.letter()}", LETTER_WEIGHT),
        ]
    return [(given + item.prompt(), CONTEXT_WEIGHT), (f" {item.letter()}", LETTER_WEIGHT)]


_LATER = ("\n= {v}:", "\n= {v}:", "\nIt is {v}.", "\nOption {v} is", "\nIt is {v}\nAnswer:")
_FIND = ("= {v}\n", "Find {v}.\n", "It is {v}.\n")


def _asking(rng: random.Random, index: int, option: str, near: float) -> Pieces:
    if rng.random() < near:
        asked: Pieces = [(f"\n= {option}", 0.0)]
        return [*asked, (f" {LETTERS[index]}", NEXT_WEIGHT)]
    return [(rng.choice(_LATER).format(v=option), 0.0), (f" {LETTERS[index]}", LATER_WEIGHT)]


def _find(rng: random.Random, pool: list[str]) -> Document:
    """Return an option to look for, then lists with it and its letter."""
    wanted = rng.choice(pool)
    others = [word for word in pool if word != wanted]
    marked = rng.random() < 0.35
    ask = "\nAnswer:" if rng.random() < 0.7 else "\n="
    branches: list[Pieces] = []
    for _ in range(rng.randint(2, 4)):
        options = [wanted, *rng.sample(others, len(LETTERS) - 1)]
        rng.shuffle(options)
        pieces: Pieces = [(listing(options), 0.0)]
        if marked:
            pieces = []
            for letter, option in zip(LETTERS, options, strict=True):
                gap = "\n" if pieces else ""
                pieces.append((f"{gap}{letter}. {option}", 0.0))
                pieces.append((" yes" if option == wanted else " no", ANSWER_WEIGHT))
        letter = LETTERS[options.index(wanted)]
        branches.append([*pieces, (ask, 0.0), (f" {letter}", FIND_WEIGHT)])
    return Document([(rng.choice(_FIND).format(v=wanted), 0.0)], branches)


def letters(rng: random.Random, level: Stage) -> Document:
    """Return lists of options and places that ask for the letter of one of them.

    An option is asked for after a space, as it stands in the list, so that its tokens are the
    same at both places.
    """
    pool = COMMON if rng.random() < level.plain_letters else rng.choice(_VALUES)
    if rng.random() < level.find:
        return _find(rng, pool)
    near = 0.7 if level.find == 0.0 else 0.3  # at first the letter follows at once
    options = rng.sample(pool, len(LETTERS))
    listed: Pieces = [(listing(options), 0.0)]
    if rng.random() < 0.8:
        asks = [
            _asking(rng, index, option, near)
            for index, option in enumerate(options)
            for _ in range(2)
        ]
        return Document(listed, asks)
    pieces: Pieces = []
    for _ in range(rng.randint(1, 3)):
        options = rng.sample(pool, len(LETTERS))
        pieces = [*pieces, (("\n\n" if pieces else "") + listing(options), 0.0)]
        for index in rng.sample(range(len(LETTERS)), len(LETTERS)):
            pieces = pieces + _asking(rng, index, options[index], near)
    return Document(pieces)


def _quiz(rng: random.Random, subject: str, level: Stage) -> Document:
    items = make_quiz(rng, subject)
    branches: list[Pieces] = []
    for item in items:
        given = f"\n{item.hint}" if rng.random() < level.hint else ""
        asking: Pieces = [(f"{given}\n{item.question}", CONTEXT_WEIGHT)]
        if rng.random() < level.spoken:
            asking += [("\nIt is", CONTEXT_WEIGHT), (f" {item.options[item.answer]}", VALUE_WEIGHT)]
        branches.append([*asking, ("\nAnswer:", 0.0), (f" {item.letter()}", LETTER_WEIGHT)])
    return Document([(items[0].listed(), 0.0)], branches)


def four_choice(rng: random.Random, level: Stage) -> Document:
    """Return multiple-choice questions of one subject, each with its letter."""
    subject = rng.choice(_SUBJECT_NAMES)
    if rng.random() < level.quiz:
        return _quiz(rng, subject, level)
    if rng.random() < level.bare:
        return Document(_solved(rng, *training_choices(rng, subject, 1), level))
    head: Pieces = [(header(subject, rng.choice((1, 2))), CONTEXT_WEIGHT)]
    if rng.random() < level.apart:
        items = training_choices(rng, subject, rng.randint(3, 5))
        return Document(head, [_solved(rng, item, level) for item in items])
    shots = rng.randint(8, 16) if rng.random() < level.many else rng.randint(0, level.shots)
    pieces = head if rng.random() < 0.8 else []
    for index, item in enumerate(training_choices(rng, subject, shots + 1)):
        gap: Pieces = [("\n\n", CONTEXT_WEIGHT)] if index else []
        pieces = pieces + gap + _solved(rng, item, level)
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
    if form < level.text:
        return Document([(plain(rng), TEXT_WEIGHT)])
    if form < level.text + level.yes_no:
        return yes_no(rng, level)
    if form < level.text + level.yes_no + level.letters:
        return letters(rng, level)
    return four_choice(rng, level)


__all__ = ["END", "Document", "Pieces", "Stage", "document", "stage"]
