# SPDX-License-Identifier: Apache-2.0
"""A SentencePiece model as a tokenizer, for checkpoints that have no other (rinna, LINE).

transformers 5 would convert such a model with an additional package. This module uses the
processor of the sentencepiece package, which tokenized the training data of these models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptneox.config.errors import ConfigError, FileError
from gptneox.config.files import read_json

MODEL_NAMES = ("tokenizer.model", "spiece.model")
# Appended to a serialized model, this sets normalizer_spec.add_dummy_prefix to false.
# Source: sentencepiece_model.proto; field 3 of ModelProto, and in it field 3 of NormalizerSpec.
_NO_DUMMY_PREFIX = bytes((3 << 3 | 2, 2, 3 << 3, 0))
TOKEN_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class AddedToken:
    """A token that is split off a text before the model tokenizes the rest."""

    content: str
    special: bool  # left out of decoded text
    lstrip: bool = False  # strips the spaces before it
    rstrip: bool = False  # strips the spaces after it


def read_settings(model_path: Path) -> dict[str, Any]:
    """The keys of tokenizer_config.json and special_tokens_map.json; {} without these files.

    Source: transformers PreTrainedTokenizerBase._from_pretrained, which ignores the map if
    tokenizer_config.json has the newer `added_tokens_decoder`.

    Raises:
        FileError: a file is not a JSON object.
    """
    path = model_path / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    path = model_path / "special_tokens_map.json"
    if path.is_file():
        special_map = read_json(path)
        settings = settings if "added_tokens_decoder" in settings else settings | special_map
    return settings


class SentencePieceTokenizer:
    """The part of transformers' tokenizer interface that the engines use.

    Added tokens come from tokenizer_config.json, special_tokens_map.json and added_tokens.json,
    in the order of transformers' slow tokenizers (SentencePieceBackend).
    """

    is_fast = True  # unknown ids decode to nothing

    def __init__(self, model_path: Path) -> None:
        """Load the checkpoint's SentencePiece model and its added tokens.

        Raises:
            ConfigError: the package sentencepiece is missing.
            FileError: a file is damaged.
        """
        file = next(model_path / name for name in MODEL_NAMES if (model_path / name).is_file())
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise ConfigError(
                f"the tokenizer {file} needs the package sentencepiece: pip install sentencepiece"
            ) from error
        try:
            self._processor = SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise FileError(f"{file} is not a SentencePiece model; download it again") from error
        settings = read_settings(model_path)
        self._without_prefix: Any = None
        if settings.get("legacy") is False:
            model = self._processor.serialized_model_proto() + _NO_DUMMY_PREFIX
            self._without_prefix = SentencePieceProcessor(model_proto=model)
        self._num_pieces = int(self._processor.GetPieceSize())
        self.added_tokens_decoder: dict[int, AddedToken] = {}
        self._ids: dict[str, int] = {}  # of the added tokens
        self.name_or_path = str(model_path)
        self._add_listed(model_path, settings)
        self._add_role_tokens(settings)
        self.bos_token_id = self._role_id("bos", settings)
        self.eos_token_id = self._role_id("eos", settings)
        for i in filter(self._processor.IsControl, range(self._num_pieces)):
            content = self._processor.IdToPiece(i)
            self.added_tokens_decoder.setdefault(i, AddedToken(content, special=True))
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._splitter = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def __len__(self) -> int:
        return max(self._num_pieces, *(i + 1 for i in self.added_tokens_decoder), 0)

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""
        pieces = {str(self._processor.IdToPiece(i)): i for i in range(self._num_pieces)}
        return pieces | self._ids

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text, without added special tokens."""
        token_ids: list[int] = []
        start = strip = 0
        for match in self._splitter.finditer(text):
            token_id = self._ids[match[0]]
            token = self.added_tokens_decoder[token_id]
            before = text[start : match.start()]
            before = before.lstrip() if strip else before
            before = before.rstrip() if token.lstrip else before
            token_ids += self._encode_part(before, first=start == 0)
            token_ids.append(token_id)
            start, strip = match.end(), token.rstrip
        rest = text[start:].lstrip() if strip else text[start:]
        return token_ids + self._encode_part(rest, first=start == 0)

    def _encode_part(self, text: str, *, first: bool) -> list[int]:
        """Ids of the text between added tokens; a legacy tokenizer prepends a space to each part.

        Source: transformers T5Tokenizer.tokenize and _tokenize, whose setting `legacy` is true by
        default. The processor drops a leading space, so "<unk>" is put before the text to keep it.
        """
        processor = self._without_prefix
        if processor is None:
            return list(self._processor.EncodeAsIds(text))
        text = f" {text}" if first and text else text
        guard = self._processor.IdToPiece(self._processor.unk_id()) if text[:1] == " " else ""
        num_guard = len(processor.EncodeAsIds(guard))
        return list(processor.EncodeAsIds(guard + text)[num_guard:])

    def decode(
        self,
        token_ids: Seq[int],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        """Text of token ids, with added tokens verbatim; vocabulary padding decodes to nothing."""
        text = ""
        pieces: list[int] = []
        for i in token_ids:
            token = self.added_tokens_decoder.get(i)
            if token and not (token.special and skip_special_tokens):
                text += self._processor.DecodeIds(pieces) + token.content
                pieces = []
            elif not token and 0 <= i < self._num_pieces:
                pieces.append(i)
        return str(text + self._processor.DecodeIds(pieces))

    # -- the added tokens --------------------------------------------------------------------------

    def _add(self, token: AddedToken, token_id: int) -> None:
        self._ids[token.content] = token_id
        self.added_tokens_decoder[token_id] = token

    def _piece_id(self, content: str) -> int | None:
        """The id of a piece of the model; None if there is no such piece."""
        token_id = int(self._processor.PieceToId(content))
        return token_id if self._processor.IdToPiece(token_id) == content else None

    def _add_listed(self, model_path: Path, settings: dict[str, Any]) -> None:
        """Add the tokens of `added_tokens_decoder`, or of the older added_tokens.json."""
        path = model_path / "added_tokens.json"
        listed = settings.get("added_tokens_decoder")
        special = {token.content for token in _role_tokens(settings)}
        if listed is None and path.is_file():
            for content, token_id in read_json(path).items():
                _check_listed(path, content, token_id)
                self._add(AddedToken(content, content in special), token_id)
            return
        path = model_path / "tokenizer_config.json"
        if not isinstance(listed or {}, dict):
            raise FileError(f"{path}: added_tokens_decoder is {listed!r}; an object is expected")
        for number, entry in (listed or {}).items():
            token = _token(entry, special=False)
            if token and token.content in special:
                token = replace(token, special=True)
            token_id = int(number) if number.isdecimal() else None
            _check_listed(path, token.content if token else entry, token_id)
            assert token is not None
            assert token_id is not None
            self._add(token, token_id)

    def _add_role_tokens(self, settings: dict[str, Any]) -> None:
        """Add the tokens with a role: pieces of the model, or new tokens after all others."""
        processor = self._processor
        ids = {"eos_token": processor.eos_id(), "unk_token": processor.unk_id()}  # -1: none
        defaults = {role: processor.IdToPiece(i) for role, i in ids.items() if i >= 0}
        for token in _role_tokens(defaults | settings):
            if token.content not in self._ids:
                token_id = self._piece_id(token.content)
                self._add(token, len(self) if token_id is None else token_id)

    def _role_id(self, role: str, settings: dict[str, Any]) -> int | None:
        """The id of a role's token as the checkpoint's settings name it, else the model's own."""
        token = _token(settings.get(f"{role}_token"), special=True)
        if token:
            return self._ids[token.content]
        token_id = int(getattr(self._processor, f"{role}_id")())  # -1: none
        return token_id if token_id >= 0 else None


def _token(entry: Any, *, special: bool) -> AddedToken | None:
    """A token from a settings entry, which is a string or an object; None for anything else."""
    if isinstance(entry, str):
        return AddedToken(entry, special) if entry else None
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        return None
    flags = {name: bool(entry.get(name)) for name in ("lstrip", "rstrip")}
    return AddedToken(entry["content"], special or bool(entry.get("special")), **flags)


def _role_tokens(settings: dict[str, Any]) -> list[AddedToken]:
    """The special tokens in the settings, in the order in which transformers adds them."""
    entries = [settings.get(f"{role}_token") for role in TOKEN_ROLES]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key)
        entries += (
            more.values() if isinstance(more, dict) else more if isinstance(more, list) else ()
        )
    tokens = (_token(entry, special=True) for entry in entries)
    return [token for token in tokens if token]


def _check_listed(path: Path, content: Any, token_id: Any) -> None:
    valid = isinstance(content, str) and content and type(token_id) is int and token_id >= 0
    if not valid:
        raise FileError(
            f"{path}: the added token {content!r} has the id {token_id!r}; a text and an integer "
            "from 0 are expected"
        )
