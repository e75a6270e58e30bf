# SPDX-License-Identifier: Apache-2.0
"""Small trained tokenizers of the two kinds that GPT-NeoX checkpoints come with."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)


def byte_level_tokenizer() -> Tokenizer:
    """A small byte-level BPE like GPT-NeoX's: special tokens first, runs of spaces last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["the cat and the dog sat on the mat. the end of the the", "日本語 日本 naïve 日本 é"]
    tokenizer.train_from_iterator(text * 4, trainer)
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    return tokenizer


def sentence_piece_tokenizer() -> Tokenizer:
    """Like a converted SentencePiece model: spaces in the tokens, bytes for unknown characters.

    Its decoder drops the space at the beginning of a text, which makes streaming hard.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    text = ["the cat and the dog sat on the mat", "the end of the cat"]
    trained.train_from_iterator(text * 4, trainers.BpeTrainer(vocab_size=40, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *model["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(names)},
            [tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def write_tokenizer(directory: Path) -> int:
    """Save the byte-level tokenizer; returns its number of tokens."""
    tokenizer = byte_level_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPTNeoXTokenizer", "eos_token": "<|endoftext|>", '
        '"bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}',
        encoding="utf-8",
    )
    return tokenizer.get_vocab_size()
