# SPDX-License-Identifier: Apache-2.0
"""generation_config.json: the keys that both engines obey, and notices for the others.

Keys that forbid or force tokens, or end a text, are obeyed. Sampling keys are not: the flags decide
how tokens are sampled, so a run without flags is greedy on both paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptneox.config.errors import FileError
from gptneox.config.files import read_json
from gptneox.config.model import token_ids as read_token_ids

# Sampling keys, reported as unused if the file says do_sample.
# Source: transformers GenerationConfig, for all names here.
SAMPLING_KEYS = (
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff"),
)
# Keys that would change the answer but are not supported, with their neutral values.
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
    """The rules of a checkpoint's generation_config.json; they apply to every request."""

    eos_token_ids: tuple[int, ...] | None = None  # None: no file has the key
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    no_repeat_ngram_size: int = 0
    min_length: int = 0  # prompt and answer together
    min_new_tokens: int = 0
    forced_bos_token_ids: tuple[int, ...] = ()
    forced_eos_token_ids: tuple[int, ...] = ()
    max_time: float | None = None  # seconds per request
    stop_strings: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()  # for the user: keys that are not obeyed

    @property
    def restricts(self) -> bool:
        """Whether any rule limits the next token."""
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
        """The allowed next tokens (empty: all), and the forbidden ones.

        Args:
            token_ids: prompt and generated tokens.
            num_prompt: length of the prompt.
            max_tokens: maximum length of prompt and answer.
            eos: the end-of-text ids of this request.

        Source: the processors of transformers' `generate` for the same keys, in its order.
        """
        length = len(token_ids)
        if length == max_tokens - 1 and self.forced_eos_token_ids:
            return self.forced_eos_token_ids, set()
        if length == 1 and self.forced_bos_token_ids:
            return self.forced_bos_token_ids, set()
        banned = set(self.suppress_tokens)
        # A forced first token comes before the position where begin_suppress_tokens applies.
        begin = num_prompt + (num_prompt == 1 and bool(self.forced_bos_token_ids))
        if length == begin:
            banned.update(self.begin_suppress_tokens)
        if length < self.min_length or length - num_prompt < self.min_new_tokens:
            banned.update(eos)
        for *before, last in self.bad_words_ids:
            is_eos = not before and last in eos
            if not is_eos and list(token_ids[length - len(before) :]) == before:
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
    """Notices about keys that are not obeyed; stop strings need a tokenizer (`with_text`)."""
    if with_text or not rules.stop_strings:
        return rules.notices
    stop = list(rules.stop_strings)
    return (
        *rules.notices,
        f"stop_strings {stop} of the checkpoint: not obeyed without a tokenizer",
    )


def read_generation_config(model_path: Path, vocab_size: int) -> GenerationRules:
    """Read and check generation_config.json, or the same keys of an older config.json.

    Args:
        model_path: checkpoint directory.
        vocab_size: ids beyond it are refused where transformers refuses them.

    Raises:
        FileError: the file is not a JSON object, or an obeyed key has an invalid value.
    """
    path = model_path / "generation_config.json"
    has_file = path.is_file()
    path = path if has_file else model_path / "config.json"
    raw = read_json(path)
    reader = _Reader(raw, str(path), vocab_size)
    eos = None
    if has_file or "eos_token_id" in raw:
        eos = read_token_ids(raw.get("eos_token_id"), f"{path}: eos_token_id")
    return GenerationRules(
        eos_token_ids=eos,
        suppress_tokens=reader.ids("suppress_tokens"),
        begin_suppress_tokens=reader.ids("begin_suppress_tokens"),
        bad_words_ids=reader.bad_words(),
        no_repeat_ngram_size=reader.count("no_repeat_ngram_size"),
        min_length=reader.count("min_length"),
        min_new_tokens=reader.count("min_new_tokens"),
        forced_bos_token_ids=reader.forced("forced_bos_token_id"),
        forced_eos_token_ids=reader.forced("forced_eos_token_id"),
        max_time=reader.seconds("max_time"),
        stop_strings=reader.texts("stop_strings"),
        notices=(*_notices(raw, path), *_missing_end(eos, model_path)),
    )


class _Reader:
    """Typed access to the file, with errors that name the key."""

    def __init__(self, raw: Mapping[str, Any], origin: str, vocab_size: int) -> None:
        self.raw, self.origin, self.vocab_size = raw, origin, vocab_size

    def _refuse(self, key: str, expected: str) -> FileError:
        value = repr(self.raw[key])
        shown = value if len(value) < 80 else f"{value[:77]}..."
        return FileError(f"{self.origin}: {key} is {shown}; {expected} is expected")

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
        """Ids to suppress, without those beyond the vocabulary: they are never sampled."""
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
    """Notices that name the file's keys that a run does not obey."""
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
    """A notice if only config.json has an end-of-text id, which transformers ignores then."""
    path = model_path / "config.json"
    if eos != () or not path.is_file() or read_json(path).get("eos_token_id") is None:
        return []
    own = model_path / "generation_config.json"
    return [f"{own} names no eos_token_id, so no text ends early; the one in {path} is not used"]
