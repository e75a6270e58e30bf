# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of the front: prompts to ids, and the text and the bytes of single tokens.

Prompts are tokenized in a thread, after a look at their length, so a long one delays nobody.
"""

from __future__ import annotations

import asyncio
import codecs
import re
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from gptneox.engine.detokenizer import special_tokens
from gptneox.server.errors import Kind, ServiceError, invalid

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_Result = TypeVar("_Result")
_BLANK = "\u2581"  # SentencePiece writes a space like this


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in a byte-level vocabulary.

    Source: Radford et al. 2019 (GPT-2), bytes_to_unicode: printable bytes stand for themselves, the
    others for the characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {chr(b): b for b in printable}
    return alphabet | {chr(256 + i): b for i, b in enumerate(others)}


class Vocabulary:
    """A tokenizer, and what each of its tokens stands for."""

    def __init__(self, tokenizer: Any, vocab_size: int, max_positions: int) -> None:
        """Wrap a tokenizer of `gptneox.engine.detokenizer.load_tokenizer`.

        Args:
            tokenizer: of the checkpoint.
            vocab_size: rows of the embedding; ids without a token stand for nothing.
            max_positions: the longest text that can be a prompt has as many tokens.
        """
        self.tokenizer = tokenizer
        self.special = special_tokens(tokenizer)
        added = {i: t.content for i, t in tokenizer.added_tokens_decoder.items()}
        pieces = {i: piece for piece, i in tokenizer.get_vocab().items() if i not in added}
        alphabet = _byte_alphabet()
        is_byte_level = all(c in alphabet for piece in pieces.values() for c in piece)
        self._bytes = [b""] * vocab_size
        for i, piece in pieces.items():
            if 0 <= i < vocab_size:
                plain = bytes(alphabet[c] for c in piece) if is_byte_level else _plain(piece)
                self._bytes[i] = plain
        for i, content in added.items():
            if 0 <= i < vocab_size:
                self._bytes[i] = content.encode("utf-8", "replace")
        longest = max([len(piece) for piece in (*pieces.values(), *added.values())], default=1)
        self.max_chars = max_positions * longest
        # one thread, for a tokenizer of the tokenizers package cannot be used by two at once
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    @property
    def size(self) -> int:
        """Number of ids that a prompt may hold."""
        return len(self._bytes)

    def close(self) -> None:
        """End the thread."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def encode(self, text: str, param: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text.

        Raises:
            ServiceError: the text is empty, not valid Unicode, or longer than any prompt.
        """
        if not text:
            raise invalid(param, f"{param} is empty; at least one token is expected")
        if len(text) > self.max_chars:
            raise ServiceError(
                Kind.TOO_LONG,
                f"{param} has {len(text)} characters; no text of more than {self.max_chars} fits "
                "the context",
                param=param,
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise invalid(
                param, f"{param} is not valid Unicode: {error.reason} at {error.start}"
            ) from error

        def tokenize() -> list[int]:
            return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

        token_ids = await self.in_thread(tokenize)
        if not token_ids:
            raise invalid(param, f"{param} has no token; at least one is expected")
        return token_ids

    async def in_thread(self, work: Callable[[], _Result]) -> _Result:
        """The result of work that takes time, from the tokenizer's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; none for padding of the vocabulary."""
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """A token as a text: itself, or "bytes:\\xe2\\x80" for a part of a character.

        Source: OpenAI's completions, whose logprobs name such tokens like this.
        """
        raw = self._bytes[token_id]
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of tokens, special ones included."""
        return b"".join(self._bytes[i] for i in token_ids).decode("utf-8", "replace")


def _plain(piece: str) -> bytes:
    """The bytes of a piece that is not byte-level."""
    if match := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace(_BLANK, " ").encode("utf-8", "replace")


class Offsets:
    """Where tokens begin in a growing text, in characters."""

    def __init__(self, vocabulary: Vocabulary, start: int = 0) -> None:
        self._vocabulary, self._position = vocabulary, start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_ids: Seq[int], *, shows_special: bool = True) -> list[int]:
        """The offsets of the next tokens; a generated text leaves the special ones out."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._position)
            if not shows_special and token_id in self._vocabulary.special:
                continue
            self._position += len(self._decoder.decode(self._vocabulary.token_bytes(token_id)))
        return offsets
