# SPDX-License-Identifier: Apache-2.0
"""Incremental detokenization: never half a character, never text past a stop string."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptneox.config.errors import ConfigError, FileError
from gptneox.config.files import read_json
from gptneox.engine.sentencepiece_tokenizer import (
    MODEL_NAMES,
    SentencePieceTokenizer,
    read_settings,
)
from gptneox.file_faults import explain_first

logger = logging.getLogger(__name__)

_REPLACEMENT = "\ufffd"  # decoders show this for an incomplete or invalid character


def load_tokenizer(model_path: Path, vocab_size: int, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer: tokenizer.json, else vocab.json + merges.txt, else SentencePiece.

    tokenizer.json is used unchanged, whatever class tokenizer_config.json names; only added
    tokens of the checkpoint's other files are added to it.

    Args:
        model_path: checkpoint directory; nothing is downloaded.
        vocab_size: rows of the embedding.
        trust_remote_code: run a tokenizer's own Python code; GPT-NeoX models never need it.

    Raises:
        FileNotFoundError: the directory has no tokenizer files.
        FileError: the tokenizer cannot be loaded, or has more tokens than the embedding.
    """
    names = ("tokenizer.json", *MODEL_NAMES, "vocab.json", "merges.txt")
    try:
        tokenizer = _load(model_path, names, trust_remote_code)
    except (FileError, FileNotFoundError) as error:
        files = (*names, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        if reason := explain_first(model_path / name for name in files):
            raise type(error)(reason) from error
        raise
    _check_size(tokenizer, model_path, vocab_size)
    return tokenizer


def _load(model_path: Path, names: Seq[str], trust_remote_code: bool) -> Any:
    """Load whichever of the tokenizer files `names` exist."""
    present = {name for name in names if (model_path / name).is_file()}
    settings = read_settings(model_path)
    if trust_remote_code and "AutoTokenizer" in (settings.get("auto_map") or ()):
        return _load_with_own_code(model_path)
    if "tokenizer.json" in present or {"vocab.json", "merges.txt"} <= present:
        return _load_fast(model_path, settings, with_json="tokenizer.json" in present)
    if present & set(MODEL_NAMES):
        return SentencePieceTokenizer(model_path)
    if present:
        missing = "merges.txt" if "vocab.json" in present else "vocab.json"
        raise FileNotFoundError(
            f"the tokenizer in {model_path} is incomplete: {', '.join(present)} without {missing}; "
            f"copy {missing} there, or tokenizer.json, which is enough by itself"
        )
    raise FileNotFoundError(
        f"no tokenizer in {model_path}: none of {', '.join(names[:-1])}; copy the checkpoint's "
        "tokenizer files there, or use --input_ids with --load_tokenizer False"
    )


def _load_with_own_code(model_path: Path) -> Any:
    """Load the class that `auto_map` in tokenizer_config.json names, from the checkpoint's code."""
    from transformers import AutoTokenizer

    with _one_line_errors(model_path):
        return AutoTokenizer.from_pretrained(
            str(model_path),
            local_files_only=True,
            trust_remote_code=True,
            clean_up_tokenization_spaces=False,
        )


def _load_fast(model_path: Path, settings: dict[str, Any], *, with_json: bool) -> Any:
    """transformers' base class: its subclasses would rebuild parts of tokenizer.json."""
    from transformers import PreTrainedTokenizerFast  # slow to import, and only needed for text

    files = {
        name: read_json(model_path / name)  # its errors name the file
        for name in ("tokenizer.json", "added_tokens.json")
        if (model_path / name).is_file()
    }
    with _one_line_errors(model_path):
        built = _for_transformers_4(settings) if with_json else _byte_level(model_path, settings)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(model_path), local_files_only=True, clean_up_tokenization_spaces=False, **built
        )
    tokenizer.model_max_length = sys.maxsize  # the engines check lengths themselves
    # transformers' GPT-NeoX class applies this key too; the model was trained with it. Without it
    # transformers 4 sets False, whatever tokenizer.json says.
    splitter = tokenizer.backend_tokenizer.pre_tokenizer
    stored = (files.get("tokenizer.json") or {}).get("pre_tokenizer") or {}
    prefix = settings.get("add_prefix_space", stored.get("add_prefix_space"))
    if isinstance(prefix, bool) and getattr(splitter, "add_prefix_space", prefix) != prefix:
        splitter.add_prefix_space = prefix
        tokenizer.backend_tokenizer.pre_tokenizer = splitter
    return tokenizer


def _for_transformers_4(settings: dict[str, Any]) -> dict[str, Any]:
    """A list of extra special tokens, as transformers 5 writes it: 4 has another name for it."""
    import transformers

    extra = settings.get("extra_special_tokens")
    if not isinstance(extra, list) or not transformers.__version__.startswith("4."):
        return {}
    return {"extra_special_tokens": {}, "additional_special_tokens": extra}


def _byte_level(model_path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """A byte-level BPE tokenizer from vocab.json and merges.txt.

    Source: transformers GPTNeoXTokenizer, and GPT2Tokenizer, which does not normalise.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    files = [str(model_path / name) for name in ("vocab.json", "merges.txt")]
    tokenizer = Tokenizer(models.BPE.from_file(*files))
    if not str(settings.get("tokenizer_class")).startswith("GPT2"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t in ("<|endoftext|>", "<|padding|>") if tokenizer.token_to_id(t) is not None]
    tokenizer.add_special_tokens(special)
    built: dict[str, Any] = {"tokenizer_object": tokenizer}
    if "<|endoftext|>" in special and "eos_token" not in settings:
        built["eos_token"] = "<|endoftext|>"
    return built


@contextlib.contextmanager
def _one_line_errors(model_path: Path) -> Iterator[None]:
    """Reraise any error of a tokenizer library as one line that names the directory."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"the tokenizer in {model_path} needs a package: {error}") from error
    except Exception as error:
        first_line = f"{type(error).__name__}: {error}".split("\n", 1)[0]
        raise FileError(f"the tokenizer in {model_path} cannot be loaded: {first_line}") from error


def _check_size(tokenizer: Any, model_path: Path, vocab_size: int) -> None:
    """Refuse token ids beyond the embedding; for special tokens only, a warning is enough."""
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= vocab_size}
    if not beyond:
        return
    if beyond.keys() <= special_tokens(tokenizer).keys():
        logger.warning(
            "%s: the embedding has %d rows, so a prompt cannot hold the special token(s) %s",
            model_path,
            vocab_size,
            ", ".join(f"{token} ({i})" for i, token in sorted(beyond.items())[:10]),
        )
        return
    raise FileError(
        f"the tokenizer in {model_path} has {max(beyond) + 1} tokens, but config.json says "
        f"vocab_size {vocab_size}; they are of different models"
    )


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Id and text of the tokens that `decode` leaves out."""
    return {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}


def decode(tokenizer: Any, token_ids: Seq[int]) -> str:
    """Text of tokens without the special ones; vocabulary padding decodes to nothing."""
    # Slow tokenizers may raise for ids beyond their vocabulary; fast ones decode them to nothing.
    end = math.inf if tokenizer.is_fast else len(tokenizer)
    valid_ids = [t for t in token_ids if 0 <= t < end]
    text = tokenizer.decode(valid_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


class Detokenizer:
    """Text of one growing sequence.

    `text` holds what can be shown, in whole tokens. It lags behind the tokens while a character is
    incomplete or the end may still become a stop string that is left out. Stop strings are searched
    in the text including special tokens; `text` leaves special tokens out. Only a stop string may
    cut a token.
    """

    def __init__(self, tokenizer: Any, stop: Seq[str] = (), *, include_stop: bool = False) -> None:
        """Begin a text.

        Args:
            tokenizer: see `load_tokenizer`.
            stop: strings that end the text.
            include_stop: the text ends after the stop string, not before it, so that nothing has
                to wait for what may become one.
        """
        self.tokenizer, self.stop, self.include_stop = tokenizer, stop, include_stop
        self.text = ""
        self.num_released = 0  # tokens from the first one on that lie in `text` as a whole
        self.stop_string: str | None = None  # the one that was generated
        self._special = special_tokens(tokenizer) if stop else {}
        self._token_ids: list[int] = []
        self._context, self._next = 0, 0  # first token decoded as context; first undecoded token
        self._pending = ""  # decoded text that is not in `text` yet
        self._begun = ""  # the end of what is in `text`, where a stop string may have begun
        self._hidden: set[int] = set()  # indices into `_pending` that belong to special tokens
        self._ends: list[int] = []  # in `_pending`, of the decoded tokens that are not released

    @property
    def stopped(self) -> bool:
        """Whether a stop string was generated; `text` ends there."""
        return self.stop_string is not None

    def add(self, token_ids: Seq[int], *, last: bool = False) -> str:
        """Append new tokens; returns the text that can be shown now.

        Args:
            token_ids: tokens generated since the last call; they are released together.
            last: the sequence ends here, so nothing is held back.
        """
        if self.stopped:
            return ""
        first = 0
        for i, token_id in enumerate(token_ids):
            if name := self._special.get(token_id):
                self._decode(token_ids[first : i + 1], last=False)
                first, start = i + 1, len(self._pending)
                self._pending += name
                self._hidden.update(range(start, len(self._pending)))
                self._mark_ends()
        self._decode(token_ids[first:], last=last)
        self._mark_ends()
        return self._show(last=last)

    def _decode(self, token_ids: Seq[int], *, last: bool) -> None:
        """Append the text of new tokens to `_pending`, up to the last complete character."""
        self._token_ids += token_ids
        before = decode(self.tokenizer, self._token_ids[self._context : self._next])
        now = decode(self.tokenizer, self._token_ids[self._context :])
        if last or not now.endswith(_REPLACEMENT):
            # Tokenizers drop a space at the beginning of a text, so earlier tokens are decoded as
            # context. Tokens that decode to nothing cannot serve as context.
            self._pending += now[len(before) :]
            if len(now) > len(before):
                self._context = self._next
            self._next = len(self._token_ids)

    def _mark_ends(self) -> None:
        """Note that the text of the tokens decoded last ends here."""
        num_new = self._next - self.num_released - len(self._ends)
        self._ends += [len(self._pending)] * num_new

    def _show(self, *, last: bool) -> str:
        """Move the text that cannot become a stop string from `_pending` to `text`."""
        searched = self._begun + self._pending
        hits = [(i, len(s), s) for s in self.stop if (i := searched.find(s)) >= 0]
        if hits:
            cut, length, self.stop_string = min(hits)
            cut += length - len(self._begun) if self.include_stop else 0
        elif last or self.include_stop:
            cut = len(self._pending)
            self._begun = searched[len(searched) - _possible_stop(searched, self.stop) :]
        else:  # back to the end of a token
            cut = len(self._pending) - _possible_stop(self._pending, self.stop)
            cut = max((end for end in self._ends if end <= cut), default=0)
        shown = "".join(c for i, c in enumerate(self._pending[:cut]) if i not in self._hidden)
        self._pending = "" if hits else self._pending[cut:]
        self._hidden = {i - cut for i in self._hidden if i >= cut}
        released = sum(end <= cut for end in self._ends)
        self._ends = [end - cut for end in self._ends[released:]]
        self.num_released += released
        self.text += shown
        return shown


@dataclass(frozen=True)
class Appended:
    """What came of new tokens; see `append_until_end`."""

    num_tokens: int  # how many were appended
    text: str  # what can be shown now
    num_released: int  # tokens, oldest first, whose text is in `text`
    reason: str = ""  # why the sequence ends: "stop", "length" or "" (it continues)
    stop_reason: str | int | None = None  # of "stop": the stop string, or the value in `ends`


def end_ids(eos_token_ids: Iterable[int], stop_token_ids: Iterable[int]) -> dict[int, int | None]:
    """The ids that end a sequence, with `Completion.stop_reason`: None for end-of-text."""
    return {i: i for i in stop_token_ids} | dict.fromkeys(eos_token_ids)


def append_until_end(
    detokenizer: Detokenizer | None, new: Seq[int], ends: Mapping[int, int | None], room: int
) -> Appended:
    """Append new tokens to a sequence one by one, until it ends.

    Args:
        detokenizer: None if the sequence needs no text; every token is released at once then.
        new: the tokens.
        ends: the ids that end the sequence, which have no text; see `end_ids`.
        room: tokens left until the sequence reaches its maximum length.
    """
    released_before = detokenizer.num_released if detokenizer else 0
    text, num_tokens, num_released = "", 0, 0
    reason = "" if room > 0 else "length"
    stop_reason: str | int | None = None
    for token_id in new:
        num_tokens += 1
        is_end = token_id in ends
        reason = "stop" if is_end else "length" if num_tokens >= room else ""
        stop_reason = ends.get(token_id)
        num_released += not is_end
        if detokenizer:
            text += detokenizer.add([] if is_end else [token_id], last=bool(reason))
            num_released = detokenizer.num_released - released_before
            if detokenizer.stopped:
                reason, stop_reason = "stop", detokenizer.stop_string
        if reason:
            break
    return Appended(num_tokens, text, num_released, reason, stop_reason)


def _possible_stop(text: str, stop: Seq[str]) -> int:
    """Length of the longest suffix of `text` that is a prefix of a stop string."""
    longest = max((len(s) - 1 for s in stop), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-size:]) for s in stop):
            return size
    return 0
