# SPDX-License-Identifier: Apache-2.0
"""generation_config.json: what both engines obey of it, and what they say of the rest.

The flags decide how tokens are chosen, so that a run without flags is greedy whatever the file
says, and both paths give the same answer. What forbids or forces tokens, or ends a text, is obeyed.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptneox.config.errors import ConfigError
from gptneox.config.files import read_json
from gptneox.config.model import token_ids as read_token_ids

# How tokens are chosen: the flags' business. `repetition_penalty` counts by itself, the others
# where the file says do_sample. Source: transformers GenerationConfig, for all names here.
SAMPLING_KEYS = (
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff"),
)
# What would change the answer and neither path does, and the values that change nothing.
UNSERVED_KEYS: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "force_words_ids": (),
    "constraints": (),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "sequence_bias": (),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
}


@dataclass(frozen=True)
class GenerationRules:
    """What a checkpoint forbids, forces and ends with, for every request alike."""

    eos_token_ids: tuple[int, ...] | None = None  # None: no file says
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    no_repeat_ngram_size: int = 0
    min_length: int = 0  # of prompt and answer
    min_new_tokens: int = 0
    forced_bos_token_ids: tuple[int, ...] = ()
    forced_eos_token_ids: tuple[int, ...] = ()
    max_time: float | None = None  # seconds per request
    stop_strings: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()  # for the user: what is not obeyed

    @property
    def restricts(self) -> bool:
        """Whether `restrict` would ever return something."""
        return bool(
            self.suppress_tokens
            or self.begin_suppress_tokens
            or self.bad_words_ids
            or self.no_repeat_ngram_size
            or self.min_length
            or self.min_new_tokens
            or self.forced_bos_token_ids
            or self.forced_eos_token_ids
        )

    def restrict(
        self, token_ids: Seq[int], num_prompt: int, max_tokens: int, eos: Seq[int]
    ) -> tuple[Seq[int], set[int]]:
        """What the next token must be one of (empty: anything), and what it must not be.

        Args:
            token_ids: prompt and what was generated.
            num_prompt: how many of them are the prompt.
            max_tokens: what prompt and answer can grow to.
            eos: the end-of-text ids that this request ends with.

        Source: the processors of transformers' `generate` for the same keys, in its order.
        """
        length = len(token_ids)
        if length == max_tokens - 1 and self.forced_eos_token_ids:
            return self.forced_eos_token_ids, set()
        if length == 1 and self.forced_bos_token_ids:
            return self.forced_bos_token_ids, set()
        banned = set(self.suppress_tokens)
        # A single forced first token is not what is suppressed at the beginning.
        begin = num_prompt + (num_prompt == 1 and bool(self.forced_bos_token_ids))
        if length == begin:
            banned.update(self.begin_suppress_tokens)
        if length < self.min_length or length - num_prompt < self.min_new_tokens:
            banned.update(eos)
        for *before, last in self.bad_words_ids:
            alone = not before and last in eos
            if not alone and list(token_ids[length - len(before) :]) == before:
                banned.add(last)
        return (), banned | self._repeated(token_ids)

    def _repeated(self, token_ids: Seq[int]) -> set[int]:
        """Tokens that would complete a run of `no_repeat_ngram_size` tokens a second time."""
        n = self.no_repeat_ngram_size
        if not n or len(token_ids) < n:
            return set()
        end = list(token_ids[len(token_ids) - n + 1 :])
        starts = range(len(token_ids) - n + 1)
        return {token_ids[i + n - 1] for i in starts if token_ids[i : i + n - 1] == end}


NO_RULES = GenerationRules()


def describe_unserved(rules: GenerationRules, *, with_text: bool) -> tuple[str, ...]:
    """What is not obeyed; `with_text`: there is a tokenizer, so stop strings are."""
    if with_text or not rules.stop_strings:
        return rules.notices
    stop = list(rules.stop_strings)
    return (
        *rules.notices,
        f"stop_strings {stop} of the checkpoint: not obeyed without a tokenizer",
    )


def read_generation_config(model_path: Path, vocab_size: int) -> GenerationRules:
    """Read and check `model_path/generation_config.json`; without one, config.json's old keys.

    Args:
        model_path: checkpoint directory.
        vocab_size: ids from here on are refused where transformers refuses them.

    Raises:
        ConfigError: the file is no JSON object, or an obeyed key has a value of the wrong form.
    """
    path = model_path / "generation_config.json"
    has_file = path.is_file()
    path = path if has_file else model_path / "config.json"
    raw = read_json(path)
    read = _Reader(raw, str(path), vocab_size)
    eos = None
    if has_file or "eos_token_id" in raw:
        eos = read_token_ids(raw.get("eos_token_id"), f"{path}: eos_token_id")
    return GenerationRules(
        eos_token_ids=eos,
        suppress_tokens=read.ids("suppress_tokens"),
        begin_suppress_tokens=read.ids("begin_suppress_tokens"),
        bad_words_ids=read.bad_words(),
        no_repeat_ngram_size=read.count("no_repeat_ngram_size"),
        min_length=read.count("min_length"),
        min_new_tokens=read.count("min_new_tokens"),
        forced_bos_token_ids=read.forced("forced_bos_token_id"),
        forced_eos_token_ids=read.forced("forced_eos_token_id"),
        max_time=read.seconds("max_time"),
        stop_strings=read.texts("stop_strings"),
        notices=(*_notices(raw, path), *_missing_end(eos, model_path)),
    )


class _Reader:
    """Typed access to the file, with errors that name the key."""

    def __init__(self, raw: Mapping[str, Any], origin: str, vocab_size: int) -> None:
        self.raw, self.origin, self.vocab_size = raw, origin, vocab_size

    def _refuse(self, key: str, expected: str) -> ConfigError:
        value = repr(self.raw[key])
        shown = value if len(value) < 80 else f"{value[:77]}..."
        return ConfigError(f"{self.origin}: {key} is {shown}; {expected} is expected")

    def count(self, key: str) -> int:
        value = self.raw.get(key)
        if value is None:
            return 0
        if type(value) is not int or value < 0:
            raise self._refuse(key, "an integer from 0")
        return value

    def seconds(self, key: str) -> float | None:
        value = self.raw.get(key)
        if value is None:
            return None
        if type(value) not in (int, float) or not value > 0:
            raise self._refuse(key, "a positive number of seconds")
        return float(value)

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.raw.get(key)
        texts = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts):
            raise self._refuse(key, "a list of non-empty strings")
        return tuple(texts)

    def ids(self, key: str) -> tuple[int, ...]:
        """Tokens to suppress; those without a row are suppressed already."""
        value = self.raw.get(key)
        value = [] if value is None else value
        if not isinstance(value, list) or any(type(i) is not int for i in value):
            raise self._refuse(key, "a list of token ids")
        return tuple(i for i in value if 0 <= i < self.vocab_size)

    def forced(self, key: str) -> tuple[int, ...]:
        ids = read_token_ids(self.raw.get(key), f"{self.origin}: {key}")
        if any(not 0 <= i < self.vocab_size for i in ids):
            raise self._refuse(key, f"an id of the vocabulary (0 to {self.vocab_size - 1})")
        return ids

    def bad_words(self) -> tuple[tuple[int, ...], ...]:
        words = self.raw.get("bad_words_ids")
        words = [] if words is None else words
        if not isinstance(words, list) or not all(self._is_word(word) for word in words):
            raise self._refuse(
                "bad_words_ids", f"a list of lists of token ids from 0 to {self.vocab_size - 1}"
            )
        return tuple(tuple(word) for word in words)

    def _is_word(self, word: Any) -> bool:
        if not isinstance(word, list) or not word:
            return False
        return all(type(i) is int and 0 <= i < self.vocab_size for i in word)


def _notices(raw: Mapping[str, Any], path: Path) -> list[str]:
    """What the file asks for and a run does not do, each by its name."""
    notices = []
    sampling = ["do_sample", *SAMPLING_KEYS] if raw.get("do_sample") is True else []
    if raw.get("repetition_penalty") != 1:
        sampling.append("repetition_penalty")
    if unused := [f"{key} {raw[key]}" for key in sampling if raw.get(key) is not None]:
        notices.append(
            f"{path}: not used: {', '.join(unused)}; the flags decide how tokens are chosen "
            "(--temperature, --top_k, --top_p, --repetition_penalty), and without them the "
            "likeliest token is"
        )
    unserved = [
        f"{key} {raw[key]}"
        for key, neutral in UNSERVED_KEYS.items()
        if raw.get(key) not in (None, False, [], {}, *neutral)
    ]
    if unserved:
        notices.append(
            f"{path}: not served and left out: {', '.join(unserved)}; an answer can differ from "
            "that of transformers' generate"
        )
    return notices


def _missing_end(eos: tuple[int, ...] | None, model_path: Path) -> list[str]:
    """A generation_config.json without an end-of-text id beside a config.json that has one."""
    path = model_path / "config.json"
    if eos != () or not path.is_file() or read_json(path).get("eos_token_id") is None:
        return []
    own = model_path / "generation_config.json"
    return [f"{own} names no eos_token_id, so no text ends early: {path} does not count beside it"]
