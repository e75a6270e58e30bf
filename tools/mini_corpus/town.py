# SPDX-License-Identifier: Apache-2.0
"""Invented town stories with yes/no questions, in the form of the BoolQ data set.

A passage states a handful of facts about people of a town; a question asks whether one of them
holds. The answer is always in the passage, so a passage that was never seen can be answered.
Questions that ask for the value itself ("where is tom") are used in training only: they teach the
look-up that a yes/no answer is built on.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

from .knowledge import RELATIONS, Relation, sentence


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_NAMES = _words(
    "Tom Anna Ben Clara David Emma Frank Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul Rosa "
    "Sam Tina"
)
_THINGS = _words("ball book cup hat lamp kite drum coat boat bell chair key")
_COLORS = _words("red blue green yellow black white brown pink")
_PLACES = _words("garden kitchen park school market river forest station library church")
_PETS = _words("dog cat horse rabbit parrot turtle goat duck")
_FOODS = _words("apples bread cheese soup rice fish cake honey")
_JOBS = _words("teacher doctor baker farmer singer driver nurse painter")
_DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
COMMON = [*_NAMES, *_THINGS, *_COLORS, *_PLACES, *_PETS, *_FOODS, *_JOBS, *_DAYS]
"""Common words."""
_FILLERS = (
    "It is a sunny day.",
    "The town is quiet.",
    "It is a cold morning.",
    "Everyone is happy.",
)

HELD_OUT_SHARE = 16
"""One passage out of this many is kept for evaluation and never trained on."""


@dataclass(frozen=True)
class Kind:
    """A kind of statement about a person of the town.

    Attributes:
        says: Statements with ``{n}`` (name) and ``{v}`` (value).
        asks: Yes/no questions with ``{n}`` and ``{v}``.
        seeks: Question for the value itself.
        values: Possible values.
    """

    says: tuple[str, ...]
    asks: tuple[str, ...]
    seeks: str
    values: tuple[str, ...]


KINDS: dict[str, Kind] = {
    "thing": Kind(
        ("{n} has {v}.", "{n} bought {v}."),
        ("does {n} have {v}",),
        "what does {n} have",
        tuple(f"a {color} {thing}" for color in _COLORS for thing in _THINGS),
    ),
    "place": Kind(
        ("{n} is in the {v}.", "{n} went to the {v}."),
        ("is {n} in the {v}",),
        "where is {n}",
        _PLACES,
    ),
    "pet": Kind(
        ("{n} owns a {v}.", "{n} lives with a {v}."),
        ("does {n} own a {v}", "does {n} live with a {v}"),
        "what pet does {n} own",
        _PETS,
    ),
    "food": Kind(
        ("{n} likes {v}.", "{n} often eats {v}."),
        ("does {n} like {v}", "does {n} eat {v}"),
        "what does {n} like",
        _FOODS,
    ),
    "job": Kind(
        ("{n} works as a {v}.", "{n} is a {v}."),
        ("is {n} a {v}", "does {n} work as a {v}"),
        "what is the job of {n}",
        _JOBS,
    ),
    "day": Kind(
        ("{n} comes home on {v}.", "{n} will return on {v}."),
        ("does {n} come home on {v}", "will {n} return on {v}"),
        "when does {n} come home",
        _DAYS,
    ),
}


@dataclass(frozen=True)
class Seek:
    """A question for a value.

    Attributes:
        question: The question in lower case without its mark.
        value: The right value.
        wrong: Three other values.
    """

    question: str
    value: str
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Passage:
    """A passage with everything that can be asked about it.

    Attributes:
        title: Title in front of the passage.
        text: The passage.
        yes_no: ``(question, answer)`` pairs, question in lower case without its mark.
        seek: Questions for a value, for training only.
    """

    title: str
    text: str
    yes_no: tuple[tuple[str, bool], ...]
    seek: tuple[Seek, ...]

    def held_out(self) -> bool:
        """Tell whether the passage is kept for evaluation, by a checksum of its text."""
        return zlib.crc32(self.text.encode()) % HELD_OUT_SHARE == 0


def _title(rng: random.Random, people: list[str]) -> str:
    first = people[0]
    second = people[1] if len(people) > 1 else None
    options = [f"{first} and friends", f"The story of {first}", "A day in town"]
    if second:
        options.append(f"{first} and {second}")
    return rng.choice(options)


def _wrong_value(rng: random.Random, kind: str, value: str, facts: dict) -> str:
    """Pick a value that does not hold: one of another person, a near miss, or any other."""
    others = sorted({v for (_, k), v in facts.items() if k == kind and v != value})
    if others and rng.random() < 0.5:
        return rng.choice(others)
    if kind == "thing" and rng.random() < 0.5:
        noun = value.split()[-1]
        return rng.choice([v for v in KINDS[kind].values if v != value and v.endswith(noun)])
    return rng.choice([v for v in KINDS[kind].values if v != value])


def town_passage(rng: random.Random, count: int, questions: int) -> Passage:
    """Make a passage about people of the town.

    Args:
        rng: Source of randomness.
        count: Number of facts in the passage.
        questions: Number of questions of either sort.

    Returns:
        The passage with balanced yes/no questions.
    """
    people = rng.sample(_NAMES, min(len(_NAMES), rng.randint(2, 4)))[:count]
    slots = [(name, kind) for name in people for kind in KINDS]
    chosen = [(name, rng.choice(list(KINDS))) for name in people]
    rest = [slot for slot in slots if slot not in chosen]
    chosen += rng.sample(rest, max(0, min(count - len(chosen), len(rest))))
    rng.shuffle(chosen)
    facts = {slot: rng.choice(KINDS[slot[1]].values) for slot in chosen}
    lines = [rng.choice(KINDS[k].says).format(n=n, v=v) for (n, k), v in facts.items()]
    if rng.random() < 0.25:
        lines.insert(rng.randint(0, len(lines)), rng.choice(_FILLERS))
    yes_no, seek = [], []
    for _ in range(questions):
        name, kind = rng.choice(chosen)
        value, truth = facts[name, kind], rng.random() < 0.5
        asked = value if truth else _wrong_value(rng, kind, value, facts)
        yes_no.append((rng.choice(KINDS[kind].asks).format(n=name, v=asked).lower(), truth))
        name, kind = rng.choice(chosen)
        value = facts[name, kind]
        wrong = rng.sample([v for v in KINDS[kind].values if v != value], 3)
        seek.append(Seek(KINDS[kind].seeks.format(n=name).lower(), value, tuple(wrong)))
    return Passage(_title(rng, people), " ".join(lines), tuple(yes_no), tuple(seek))


_CHECKED = tuple(relation for relation in RELATIONS if relation.check)


def _fact_question(
    rng: random.Random, relation: Relation, key: str, value: str
) -> tuple[str, bool]:
    truth = rng.random() < 0.5
    if not truth:
        good = {v for k, v in relation.rows if k == key}
        value = rng.choice([v for v in relation.values() if v not in good])
    return relation.check.format(k=key, v=value).lower(), truth


def fact_passage(rng: random.Random, count: int, questions: int) -> Passage:
    """Make a passage out of true facts of one kind.

    Args:
        rng: Source of randomness.
        count: Number of facts in the passage.
        questions: Number of yes/no questions.

    Returns:
        The passage; it has no questions for values.
    """
    relation = rng.choice(_CHECKED)
    rows = rng.sample(relation.rows, min(count, len(relation.rows)))
    lines = [sentence(rng.choice(relation.statements).format(k=k, v=v)) for k, v in rows]
    asked = [_fact_question(rng, relation, *rng.choice(rows)) for _ in range(questions)]
    return Passage(sentence(rows[0][0]), " ".join(lines), tuple(asked), ())


def passage(rng: random.Random, count: int, questions: int, fact_share: float) -> Passage:
    """Make a passage of either sort; ``fact_share`` of them are true facts."""
    make = fact_passage if rng.random() < fact_share else town_passage
    return make(rng, count, questions)


def held_out_passages(seed: int, number: int) -> list[Passage]:
    """Return distinct held-out passages, each with one yes/no question, answers balanced.

    Args:
        seed: Seed of the evaluation set.
        number: How many passages.

    Returns:
        The passages in order; any leading part of even length is balanced as well.
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    found: list[Passage] = []
    while len(found) < number:
        item = passage(rng, rng.randint(3, 5), 1, fact_share=0.15)
        wanted = len(found) % 2 == 0
        if item.held_out() and item.text not in seen and item.yes_no[0][1] == wanted:
            seen.add(item.text)
            found.append(item)
    return found
