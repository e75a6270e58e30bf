# SPDX-License-Identifier: Apache-2.0
"""A SentencePiece model as a tokenizer, for checkpoints that have nothing else (rinna, LINE).

transformers 5 would convert such a model, for which it needs a further package; the processor of
the sentencepiece package itself is what these models were trained with.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path

from gptneox.config import ConfigError, read_json

MODEL_NAMES = ("tokenizer.model", "spiece.model")


class SentencePieceTokenizer:
    """The part of transformers' tokenizer interface that the engines use."""

    def __init__(self, model_path: Path) -> None:
        """Load the checkpoint's SentencePiece model.

        Raises:
            ConfigError: the package sentencepiece is missing, or the file is damaged.
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
            raise ConfigError(f"{file} is no SentencePiece model; download it again") from error
        self.eos_token_id = self._find_eos(model_path)
        bos = int(self._processor.bos_id())  # -1: the model has none
        self.bos_token_id = bos if bos >= 0 else None
        processor = self._processor
        self._special = {i for i in range(len(self)) if processor.IsControl(i)}

    def __len__(self) -> int:
        return int(self._processor.GetPieceSize())

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; no special token is ever added."""
        return list(self._processor.EncodeAsIds(text))

    def decode(
        self,
        token_ids: Seq[int],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        """Text of token ids; control tokens have none, whether they are skipped or not."""
        return str(self._processor.DecodeIds([i for i in token_ids if i not in self._special]))

    def _find_eos(self, model_path: Path) -> int | None:
        """The end-of-text token: as the checkpoint names it, else as the model does."""
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if not (model_path / name).is_file():
                continue
            entry = read_json(model_path / name).get("eos_token")
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str):
                token_id = int(self._processor.PieceToId(text))
                if token_id != self._processor.unk_id():
                    return token_id
        token_id = int(self._processor.eos_id())
        return token_id if token_id >= 0 else None
