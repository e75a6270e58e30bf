# SPDX-License-Identifier: Apache-2.0
"""Small question sets, and random checkpoints with a tokenizer that can answer them."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from support import checkpoints

SUBJECTS = ("anatomy", "college_physics", "world_religions")
NUM_DEV, NUM_VAL, NUM_BOOLQ = 3, 4, 12
WORDS = ("river", "stone", "lamp", "bridge", "cloud", "seven", "apple", "north", "quiet", "wheel")


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE in which " yes", " no" and " A" to " D" are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "yes no A B C D Question: Answer: yes no A B C D the following are multiple choice"
    tokenizer.train_from_iterator([f" {text} {' '.join(WORDS)}"] * 9, trainer)
    return tokenizer


def token_id(text: str) -> int:
    """The id of a text that is one token."""
    ids = make_tokenizer().encode(text).ids
    assert len(ids) == 1, (text, ids)
    return int(ids[0])


def write_model(
    directory: Path, name: str = "pythia-14m", seed: int = 0, positions: int = 512
) -> Path:
    """A random fp32 twin with that tokenizer."""
    config = checkpoints.FAMILY[name] | {"vocab_size": 352, "max_position_embeddings": positions}
    checkpoints.write_checkpoint(directory, config, seed)
    make_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPTNeoXTokenizer", "eos_token": "<|endoftext|>", '
        '"bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}',
        encoding="utf-8",
    )
    return directory


def edit_weights(
    source: Path, directory: Path, edit: Callable[[dict[str, torch.Tensor]], None]
) -> Path:
    """A copy of a checkpoint whose weights `edit` has changed."""
    directory.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (directory / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def always(favoured: str | None) -> Callable[[dict[str, torch.Tensor]], None]:
    """Edit weights so that the next token is always `favoured`; None: all tokens are equal."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["gpt_neox.final_layer_norm.weight"].zero_()
        tensors["gpt_neox.final_layer_norm.bias"].fill_(1.0)
        tensors["embed_out.weight"].zero_()
        if favoured:
            tensors["embed_out.weight"][token_id(favoured)] = 0.1

    return edit


def sentence(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randrange(1, most)))


def write_boolq(
    folder: Path, number: int = NUM_BOOLQ, longest: int = 12
) -> list[dict[str, object]]:
    """Write dev.jsonl to a folder; returns its rows."""
    rng = random.Random(1)
    rows = [
        {
            "title": sentence(rng, 3),
            "question": f"is it {sentence(rng, 5)}",
            "passage": sentence(rng, longest),
            "answer": rng.random() < 0.5,
        }
        for _ in range(number)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "dev.jsonl").write_text(text, encoding="utf-8")
    return rows


def choice_rows(rng: random.Random, number: int) -> list[list[str]]:
    return [
        [f"what is {sentence(rng, 4)}?", *(sentence(rng, 3) for _ in "ABCD"), rng.choice("ABCD")]
        for _ in range(number)
    ]


def write_rows(path: Path, rows: Seq[Seq[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def write_mmlu(folder: Path) -> None:
    """Write dev/ and val/ of three subjects."""
    rng = random.Random(2)
    for subject in SUBJECTS:
        write_rows(folder / "dev" / f"{subject}_dev.csv", choice_rows(rng, NUM_DEV))
        write_rows(folder / "val" / f"{subject}_val.csv", choice_rows(rng, NUM_VAL))
