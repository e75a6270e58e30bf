# SPDX-License-Identifier: Apache-2.0
"""Requests over time: when each comes, its prompt, and the length of its answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmark.errors import UsageError

REQUEST_SEED = 2


@dataclass(frozen=True)
class Lengths:
    """How long prompts and answers are."""

    prompt: int  # in tokens, or in words of a text
    output: int  # in tokens
    is_uniform: bool = True  # every length from 1 to 2 n - 1 is equally likely; else always n

    def draw(self, generator: random.Random) -> tuple[int, int]:
        """Lengths of a prompt and of its answer."""
        if not self.is_uniform:
            return self.prompt, self.output
        return generator.randint(1, 2 * self.prompt - 1), generator.randint(1, 2 * self.output - 1)


def draw_requests(
    count: int, per_second: float, lengths: Lengths, vocab_size: int
) -> list[tuple[float, list[int], int]]:
    """Requests of a Poisson process: moment in seconds, prompt, new tokens."""
    moments = draw_arrivals(count, per_second, REQUEST_SEED)
    prompts = draw_prompts(count, lengths, REQUEST_SEED, vocab_size)
    return [(at, ids, num_new) for at, (ids, num_new) in zip(moments, prompts, strict=True)]


def draw_arrivals(count: int, per_second: float, seed: object) -> list[float]:
    """Moments of a Poisson process in seconds; the first is 0."""
    generator = random.Random(f"arrivals {seed}")
    moments = [0.0]
    while len(moments) < count:
        moments.append(moments[-1] + generator.expovariate(per_second))
    return moments


def draw_prompts(
    count: int, lengths: Lengths, seed: object, vocab_size: int
) -> list[tuple[list[int], int]]:
    """Prompts of random ids, never 0 (end of text), each with the length of its answer."""
    generator = random.Random(f"prompts {seed}")
    drawn = []
    for _ in range(count):
        length, num_new = lengths.draw(generator)
        drawn.append(([generator.randrange(1, vocab_size) for _ in range(length)], num_new))
    return drawn


def draw_texts(
    count: int, lengths: Lengths, seed: object, words: Sequence[str]
) -> list[tuple[str, int]]:
    """Prompts that are pieces of a text, from random places on, each with its answer's length.

    Raises:
        UsageError: the text is shorter than a prompt.
    """
    generator = random.Random(f"prompts {seed}")
    drawn = []
    for _ in range(count):
        length, num_new = lengths.draw(generator)
        if length > len(words):
            raise UsageError(
                f"--text has {len(words)} words, a prompt of {length} is asked for; lower "
                "--prompt, or give a longer text"
            )
        start = generator.randint(0, len(words) - length)
        drawn.append((" ".join(words[start : start + length]), num_new))
    return drawn
