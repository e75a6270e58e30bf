# SPDX-License-Identifier: Apache-2.0
"""Tokens to text, piece by piece, never half a character and never past a stop string."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from gptneox.config import ConfigError
from gptneox.engine.sentencepiece_tokenizer import MODEL_NAMES, SentencePieceTokenizer
from gptneox.files import explain_first

logger = logging.getLogger(__name__)

_REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are no character (yet)


def load_tokenizer(model_path: Path, vocab_size: int, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer, byte-level BPE or SentencePiece.

    Args:
        model_path: checkpoint directory; nothing is fetched.
        vocab_size: rows of the embedding.
        trust_remote_code: run a tokenizer's own Python code; never needed by the GPT-NeoX family.

    Raises:
        FileNotFoundError: the directory has no tokenizer files.
        ConfigError: a tokenizer that cannot be loaded, or has more tokens than the embedding.
    """
    names = ("tokenizer.json", *MODEL_NAMES, "vocab.json")
    if not any((model_path / name).is_file() for name in names):
        raise FileNotFoundError(
            explain_first(model_path / name for name in names)
            or f"no tokenizer in {model_path}: none of {', '.join(names)}; copy the checkpoint's "
            "tokenizer files there, or use --input_ids with --load_tokenizer False"
        )
    try:
        if any((model_path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            tokenizer = _load_with_transformers(model_path, trust_remote_code)
        else:
            tokenizer = SentencePieceTokenizer(model_path)
    except ConfigError as error:
        files = (*names, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        if reason := explain_first(model_path / name for name in files):
            raise ConfigError(reason) from error
        raise
    _check_size(tokenizer, model_path, vocab_size)
    return tokenizer


def _check_size(tokenizer: Any, model_path: Path, vocab_size: int) -> None:
    """Refuse a tokenizer of another model.

    Special tokens that were added to it alone, such as one for padding, may lie beyond the rows
    of the embedding: no answer holds them.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    beyond = [t.content for i, t in sorted(added.items()) if i >= vocab_size and t.special]
    if len(tokenizer) - len(beyond) > vocab_size:
        raise ConfigError(
            f"the tokenizer in {model_path} has {len(tokenizer)} tokens, but config.json says "
            f"vocab_size {vocab_size}; they are of different models"
        )
    if beyond:
        logger.warning(
            "%s: the model has no rows for the special tokens %s; a prompt with one is refused",
            model_path,
            ", ".join(beyond),
        )


def _load_with_transformers(model_path: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer  # slow to import, and not needed without text

    try:
        return AutoTokenizer.from_pretrained(
            str(model_path),
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            clean_up_tokenization_spaces=False,
        )
    except ImportError as error:
        raise ConfigError(f"the tokenizer in {model_path} needs a package: {error}") from error
    except Exception as error:
        first_line = str(error).strip().split("\n", 1)[0]
        raise ConfigError(
            f"the tokenizer in {model_path} cannot be loaded: {first_line}"
        ) from error


def decode(tokenizer: Any, token_ids: Seq[int]) -> str:
    """Text of tokens without special ones; padding rows of the vocabulary decode to nothing."""
    known = [t for t in token_ids if 0 <= t < len(tokenizer)]
    text = tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


class Detokenizer:
    """Text of one growing sequence.

    `text` is what may be shown. Bytes that end inside a character are held back until it is
    complete, and an ending that could still become a stop string until it cannot.
    """

    def __init__(self, tokenizer: Any, stop: Seq[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.text = ""
        self.stopped = False  # a stop string was met; text ends before it
        self._token_ids: list[int] = []
        self._context, self._next = 0, 0  # tokens decoded before, and first token to decode
        self._pending = ""  # decoded, but perhaps the beginning of a stop string

    def add(self, token_ids: Seq[int], *, last: bool = False) -> str:
        """Take new tokens; returns the text that can be shown now.

        Args:
            token_ids: what was generated since the last call.
            last: the sequence ends here, so nothing is held back any more.
        """
        if self.stopped:
            return ""
        self._token_ids += token_ids
        before = decode(self.tokenizer, self._token_ids[self._context : self._next])
        now = decode(self.tokenizer, self._token_ids[self._context :])
        if last or not now.endswith(_REPLACEMENT):
            # Decoding a few earlier tokens along keeps the blanks that a tokenizer drops at the
            # beginning of a text; tokens without a text of their own cannot stand for them.
            self._pending += now[len(before) :]
            if len(now) > len(before):
                self._context = self._next
            self._next = len(self._token_ids)
        return self._show(last=last)

    def _show(self, *, last: bool) -> str:
        """Move what is safe from pending to text."""
        hits = [i for i in (self._pending.find(s) for s in self.stop) if i >= 0]
        if hits:
            shown, self.stopped = self._pending[: min(hits)], True
            self._pending = ""
        else:
            keep = 0 if last else _possible_stop(self._pending, self.stop)
            cut = len(self._pending) - keep
            shown, self._pending = self._pending[:cut], self._pending[cut:]
        self.text += shown
        return shown


def _possible_stop(text: str, stop: Seq[str]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    longest = max((len(s) - 1 for s in stop), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-size:]) for s in stop):
            return size
    return 0
