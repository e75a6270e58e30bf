# SPDX-License-Identifier: Apache-2.0
"""A request's parameters (SamplingParams) and its state (Sequence)."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from gptneox.config.errors import ConfigError
from gptneox.engine.generation_config import NO_RULES, GenerationRules

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 100
NO_TOKEN = (
    "no token is left to choose: allowed_token_ids, min_new_tokens and the checkpoint's "
    "generation_config.json together forbid all of them"
)
# Source: OpenAI's API reference, POST /v1/completions.
MAX_PENALTY, MAX_BIAS = 2.0, 100.0


class InvalidParameter(ConfigError):
    """A request field is out of range; `param` names it."""

    def __init__(self, param: str, value: object, expected: str) -> None:
        super().__init__(f"{param} is {value!r}; {expected} is expected")
        self.param = param


@dataclass(frozen=True)
class SamplingParams:
    """How a request generates. Temperature 0 is greedy; top_k 0 and top_p 1 are off.

    Raises:
        InvalidParameter: a field is out of range or of the wrong type.
    """

    max_new_tokens: int = 20
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0  # leave out tokens below this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # of prompt and answer
    presence_penalty: float = 0.0  # taken from the logit of each token of the answer
    frequency_penalty: float = 0.0  # the same, times the number of its occurrences there
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    allowed_token_ids: tuple[int, ...] = ()  # no other token is sampled; empty: all are allowed
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop: bool = False  # the stop string stays in the text, without its special tokens
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_new_tokens: int = 0  # neither end-of-text nor `stop_token_ids` come earlier
    detokenize: bool = True  # False: the completion has no text
    obey_rules: bool = True  # of the checkpoint's generation_config.json; scoring does not
    logprobs: int | None = None  # return each new token's log-probability and this many top tokens
    prompt_logprobs: int | None = None  # the same for the prompt tokens
    prompt_logprobs_start: int = 1  # first prompt position to score
    logprob_token_ids: tuple[int, ...] = ()  # with logprobs: tokens that are always in `top`

    def __post_init__(self) -> None:
        lowest = 0 if self.prompt_logprobs is not None else 1  # 0: score the prompt, no new token
        _integer("max_new_tokens", self.max_new_tokens, lowest)
        _real("temperature", self.temperature, 0.0, math.inf)
        _integer("top_k", self.top_k, -1)
        _real("top_p", self.top_p, 0.0, 1.0, above=True)
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("repetition_penalty", self.repetition_penalty, 0.0, math.inf, above=True)
        _real("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        _real("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        _integer("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**63 - 1)
        _integer("prompt_logprobs_start", self.prompt_logprobs_start, 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        if not isinstance(self.stop, tuple):  # a str would be iterated letter by letter
            raise InvalidParameter("stop", self.stop, "a tuple of strings")
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
            _token_ids(name, getattr(self, name))
        _bias(self.logit_bias)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidParameter("stop", len(self.stop), f"at most {MAX_STOP_STRINGS} strings")
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise InvalidParameter("stop", list(self.stop), "a list of non-empty strings")

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token of the raw logits is taken, if no other rule applies."""
        return not (
            self.temperature
            or self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.allowed_token_ids
            or self.min_new_tokens
        )


def _token_ids(name: str, value: Any) -> None:
    if not isinstance(value, tuple):
        raise InvalidParameter(name, value, "a tuple of token ids")
    for token_id in value:
        _integer(name, token_id, 0)


def _bias(value: Any) -> None:
    """Check `logit_bias`."""
    if not isinstance(value, tuple) or any(
        not isinstance(pair, tuple) or len(pair) != 2 for pair in value
    ):
        raise InvalidParameter("logit_bias", value, "a tuple of pairs (token id, number)")
    for token_id, bias in value:
        _integer("logit_bias", token_id, 0)
        _real("logit_bias", bias, -MAX_BIAS, MAX_BIAS)
    if len(dict(value)) < len(value):
        raise InvalidParameter("logit_bias", value, "one value for each token id")


def _integer(name: str, value: Any, lowest: int, highest: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        limit = f"from {lowest}" + ("" if highest == math.inf else f" to {highest}")
        raise InvalidParameter(name, value, f"an integer {limit}")


def _real(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    valid = isinstance(value, (int, float)) and not isinstance(value, bool)
    valid = valid and math.isfinite(value) and low <= value <= high
    if not valid or (above and value == low):
        limit = (f"above {low:g}" if above else f"from {low:g}") + (
            "" if high == math.inf else f" up to {high:g}"
        )
        raise InvalidParameter(name, value, f"a finite number {limit}")


def check_vocabulary(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Raise InvalidParameter for the first id outside the vocabulary."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            expected = f"an id of the vocabulary (0 to {vocab_size - 1})"
            raise InvalidParameter(name, token_id, expected)


class Status(enum.Enum):
    """State of a sequence."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass
class TokenLogprobs:
    """Log-probability of one token, and of the likeliest tokens at its position (id -> value)."""

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass(eq=False)
class Sequence:
    """State of one request: its tokens, its KV-cache blocks and its progress."""

    request_id: int
    token_ids: list[int]  # prompt, then generated tokens
    params: SamplingParams
    num_prompt_tokens: int
    status: Status = Status.WAITING
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0  # leading tokens whose K and V are in the cache
    num_cached_blocks: int = 0  # leading blocks that are in the prefix cache
    content_id: int = 0  # prefix-cache id of the content of these blocks
    num_scored_tokens: int = 0  # prompt tokens already scored, without the first
    finish_reason: str = ""  # "stop" | "length" | "abort" | "error"
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    rules: GenerationRules = NO_RULES  # of the checkpoint
    eos_token_ids: Seq[int] = ()  # empty with `ignore_eos`

    @classmethod
    def create(
        cls,
        request_id: int,
        prompt_ids: Iterable[int],
        params: SamplingParams,
        rules: GenerationRules = NO_RULES,
        eos_token_ids: Seq[int] = (),
    ) -> Sequence:
        """Make a waiting sequence."""
        seq = cls(request_id, list(prompt_ids), params, 0, rules=rules)
        seq.num_prompt_tokens = len(seq.token_ids)
        seq.num_scored_tokens = params.prompt_logprobs_start - 1
        seq.eos_token_ids = eos_token_ids
        return seq

    def restrict(self) -> tuple[Seq[int], set[int]]:
        """The forced and the forbidden next tokens.

        Those of the checkpoint (see `GenerationRules.restrict`), and of `min_new_tokens`.
        """
        forced, banned = self.rules.restrict(
            self.token_ids, self.num_prompt_tokens, self.max_tokens, self.eos_token_ids
        )
        if self.num_output_tokens < self.params.min_new_tokens:
            banned.update(self.eos_token_ids, self.params.stop_token_ids)
        return forced, banned

    @property
    def is_limited(self) -> bool:
        """Whether tokens may be forced or forbidden."""
        params = self.params
        return bool(self.rules.restricts or params.allowed_token_ids or params.min_new_tokens)

    @property
    def output_ids(self) -> list[int]:
        """Generated tokens."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        """Number of generated tokens."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def max_tokens(self) -> int:
        """Maximum length of prompt and answer."""
        return self.num_prompt_tokens + self.params.max_new_tokens
