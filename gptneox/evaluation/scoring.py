# SPDX-License-Identifier: Apache-2.0
"""Questions, the ways to answer them (scorers), and the loop over all of them (`evaluate`)."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from gptneox.config.errors import ConfigError
from gptneox.engine.api import Answering, is_alike_on_all_ranks, raise_failure
from gptneox.engine.sequence import SamplingParams

NO_ANSWER = "-1"
LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class Question:
    """One question, with worked examples for the prompt.

    The prompt is `header`, then some of `examples`, then `body`.
    """

    index: int  # running number in its dataset
    subject: str
    body: str
    answer: str  # the correct label, or the reference text for the scorer
    header: str = ""
    examples: tuple[str, ...] = ()
    drop_longest: bool = False  # from a prompt that is too long; else the last example is dropped

    def prompts(self) -> Iterable[str]:
        """The prompt with all examples, then with one fewer each time, down to none."""
        examples = list(self.examples)
        while True:
            yield self.header + "".join(examples) + self.body
            if not examples:
                return
            longest = max(range(len(examples)), key=lambda i: len(examples[i]))
            examples.pop(longest if self.drop_longest else -1)

    def fit(self, tokenizer: Any, max_tokens: int) -> Prompt | None:
        """The prompt with as many examples as fit `max_tokens`; None: too long without any."""
        for i, text in enumerate(self.prompts()):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) <= max_tokens:
                return Prompt(text, list(ids), len(self.examples) - i)
        return None


@dataclass(frozen=True)
class Prompt:
    """The text of a question with its examples, and its tokens."""

    text: str
    ids: list[int]
    num_examples: int


@dataclass(frozen=True)
class Prediction:
    """The answer of the model."""

    value: str  # a label or a text; NO_ANSWER when there is none
    token_ids: list[int]  # generated; one greedy token where labels are compared
    text: str  # of token_ids
    logprobs: dict[str, float] = field(default_factory=dict)  # label -> log p; empty for text


class Scorer(ABC):
    """Turns prompts into predictions and compares them with the answers."""

    name: str  # for the protocol in the result files
    num_new_tokens: int  # positions that must be free after a prompt

    def check(self, tokenizer: Any) -> None:  # noqa: B027 - any tokenizer, by default
        """Raise ConfigError if questions cannot be answered this way with `tokenizer`."""

    @abstractmethod
    def predict(self, engine: Answering, prompts: Seq[Seq[int]]) -> list[Prediction]:
        """One prediction per prompt; on ranks above 0 their values are not valid."""

    def is_correct(self, value: str, answer: str) -> bool:
        """Whether a predicted value is correct."""
        return value == answer


class NextTokenScorer(Scorer):
    """The label whose token is the likeliest next one; of equal ones the first.

    Log-probabilities come from an fp32 softmax over the whole vocabulary.
    """

    name, num_new_tokens = "logits", 1

    def __init__(self, texts: dict[str, str]) -> None:
        """`texts`: label -> a text whose last token (special tokens left out) is the label's."""
        self.texts = texts

    def token_ids(self, tokenizer: Any) -> list[int]:
        """The token of each label.

        Raises:
            ConfigError: two labels have the same token.
        """
        ids = [tokenizer.encode(t, add_special_tokens=False)[-1] for t in self.texts.values()]
        if len(set(ids)) < len(ids):
            raise ConfigError(
                f"the tokenizer gives {', '.join(self.texts)} the last tokens "
                f"{', '.join(map(str, ids))}, which are not distinct; this scoring needs one "
                "token for each"
            )
        return ids

    def check(self, tokenizer: Any) -> None:
        """See `Scorer`."""
        self.token_ids(tokenizer)

    def predict(self, engine: Answering, prompts: Seq[Seq[int]]) -> list[Prediction]:
        """See `Scorer`."""
        rows = engine.score_next(prompts, self.token_ids(engine.tokenizer))
        predictions = []
        for row in rows:
            logprobs = dict(zip(self.texts, row.logprobs, strict=False))  # rank > 0: empty
            value = max(logprobs, key=logprobs.__getitem__) if logprobs else NO_ANSWER
            text = engine.tokenizer.decode([row.greedy_id])
            predictions.append(Prediction(value, [row.greedy_id], text, logprobs))
        return predictions


class GenerationScorer(Scorer):
    """The answer is read from greedily generated text, without the end-of-text token."""

    def __init__(
        self,
        name: str,
        num_new_tokens: int,
        extract: Callable[[str], str],
        matches: Callable[[str, str], bool] = str.__eq__,
    ) -> None:
        """`extract` makes the value from the text, `matches` compares value and answer."""
        self.name, self.num_new_tokens = name, num_new_tokens
        self._extract, self._matches = extract, matches

    def predict(self, engine: Answering, prompts: Seq[Seq[int]]) -> list[Prediction]:
        """See `Scorer`."""
        completions = engine.generate(prompts, SamplingParams(max_new_tokens=self.num_new_tokens))
        raise_failure(completions)
        return [Prediction(self._extract(c.text), c.token_ids, c.text) for c in completions]

    def is_correct(self, value: str, answer: str) -> bool:
        """See `Scorer`."""
        return self._matches(value, answer)


# -- values from text ----------------------------------------------------------------------------


def first_letter(text: str) -> str:
    """The first ASCII letter anywhere, in upper case; NO_ANSWER without one."""
    letter = re.search(r"[A-Za-z]", text)
    return letter.group().upper() if letter else NO_ANSWER


def first_character(text: str) -> str:
    """The first character that is not blank; NO_ANSWER without one."""
    return text.lstrip()[:1] or NO_ANSWER


# The first pattern with a match anywhere in the text decides.
CHOICE_PATTERNS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"答案(?:应该|应)?(?:是|为|选|选择)?\s*[:：]?\s*(?:选项?)?\s*[(（]?\s*([A-D])(?![A-Za-z])",
        r"(?:应该|应|因此|所以|故)(?:选择|选)\s*[(（]?\s*([A-D])(?![A-Za-z])",
        r"(?:选择|选项|选)\s*[(（]?\s*([A-D])(?![A-Za-z])",
        r"[(（]?([A-D])[)）]?\s*(?:是|为)?正确",
        r"[Tt]he (?:correct )?answer is:?\s*(?:option )?[(（]?([A-D])(?![A-Za-z])",
        r"[Tt]he correct (?:option|choice) is:?\s*[(（]?([A-D])(?![A-Za-z])",
        r"^\s*[(（]?([A-D])(?:[.。,，:：)）]|\s*$)",
        r"(?<![A-Za-z])([A-D])(?![A-Za-z])",
        r"([A-D])[:：]",
        r"([A-D])",
    )
)


def choice_from_reasoning(text: str) -> str:
    """The letter chosen in a free answer, by `CHOICE_PATTERNS`; '' without a match."""
    for pattern in CHOICE_PATTERNS:
        if match := pattern.search(text):
            return match.group(1)
    return ""


_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def last_number(text: str) -> str:
    """The last number as text, thousands commas removed; '' without one (-1 is a number)."""
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else ""


def same_number(value: str, answer: str) -> bool:
    """Whether two texts of `last_number` differ by 1e-4 at most."""
    return bool(value and answer) and abs(float(value) - float(answer)) <= 1e-4


# -- asking --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """A question with its outcome."""

    question: Question
    prompt: Prompt | None  # None: too long even without examples; counts as wrong
    prediction: Prediction
    correct: bool
    error: str = ""  # why the batch failed; only with `go_on`


class QuestionFailed(RuntimeError):
    """A batch could not be computed; the message names its questions."""


def evaluate(
    questions: Seq[Question],
    scorer: Scorer,
    engine: Answering,
    batch_size: int,
    on_result: Callable[[list[Result]], None],
    *,
    max_prompt_tokens: int | None = None,
    go_on: bool = False,
) -> None:
    """Ask all questions in their order, `batch_size` at a time. Every rank calls it alike.

    Args:
        questions: those to ask; a batch is a run of consecutive ones.
        scorer: how they are answered and judged.
        engine: the loaded model.
        batch_size: questions per batch.
        on_result: called on rank 0 after each batch, with one result per question in order.
        max_prompt_tokens: the protocol's own limit, such as 2000; the model's applies besides.
        go_on: count a batch that fails as wrong, and continue; an error that may be one rank's
            alone ends the run even so.

    Raises:
        ConfigError: the tokenizer does not fit the scorer.
        QuestionFailed: a batch failed and `go_on` is False.
    """
    scorer.check(engine.tokenizer)
    limit = engine.max_positions - scorer.num_new_tokens
    limit = min(limit, limit if max_prompt_tokens is None else max_prompt_tokens)
    for first in range(0, len(questions), batch_size):
        batch = questions[first : first + batch_size]
        results = _ask(batch, scorer, engine, limit, go_on=go_on)
        if engine.group.rank == 0:
            on_result(results)


def _ask(
    batch: Seq[Question], scorer: Scorer, engine: Answering, limit: int, *, go_on: bool
) -> list[Result]:
    prompts = [question.fit(engine.tokenizer, limit) for question in batch]
    fitting = [prompt.ids for prompt in prompts if prompt]
    error = ""
    try:
        predictions = iter(scorer.predict(engine, fitting) if fitting else [])
    except (ValueError, RuntimeError) as failure:
        where = f"question {batch[0].index}" + (
            f" to {batch[-1].index}" if len(batch) > 1 else f" ({batch[0].subject})"
        )
        if not (go_on and is_alike_on_all_ranks(failure, engine.group)):
            raise QuestionFailed(f"{where}: {failure}") from failure
        error = f"{where}: {failure}"
        predictions = iter([Prediction(NO_ANSWER, [], "") for _ in fitting])
    results = []
    for question, prompt in zip(batch, prompts, strict=True):
        prediction = next(predictions) if prompt else Prediction(NO_ANSWER, [], "")
        correct = not error and scorer.is_correct(prediction.value, question.answer)
        correct = correct and prompt is not None
        results.append(Result(question, prompt, prediction, correct, error))
    return results
