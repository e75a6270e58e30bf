# SPDX-License-Identifier: Apache-2.0
"""Helpers of the property and robustness tests: a cache oracle, tiny files, running commands."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import termios
import time
from pathlib import Path

import torch
import twins
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from gptneox.config.model import ModelConfig
from gptneox.engine.block_manager import BlockManager
from gptneox.engine.sequence import Sequence
from gptneox.weights.size import full_shapes

REPO = Path(__file__).resolve().parents[1]
MAIN = REPO / "main.py"


class CacheOracle:
    """What the slots of a real cache would hold.

    K and V at a position depend on every token up to it, so a slot is modelled by the identity of
    that whole prefix. A wrong share, a stale block or a lost write shows as a wrong identity.
    """

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.slots: dict[tuple[int, int], int] = {}
        self._identities: dict[tuple[int, int], int] = {}
        self._prefixes: dict[int, list[int]] = {}  # request -> identity of each of its prefixes

    def prefixes(self, seq: Sequence) -> list[int]:
        known = self._prefixes.setdefault(seq.request_id, [])
        for token_id in seq.token_ids[len(known) :]:
            key = (known[-1] if known else 0, token_id)
            known.append(self._identities.setdefault(key, len(self._identities) + 1))
        return known

    def write(self, seq: Sequence, num_tokens: int) -> None:
        """Fill the slots of the next `num_tokens`; none of them may be visible to anyone else."""
        size, identities = self.manager.block_size, self.prefixes(seq)
        for p in range(seq.num_computed_tokens, seq.num_computed_tokens + num_tokens):
            block = seq.block_table[p // size]
            assert self.manager.num_users[block] == 1, f"write to shared block {block}"
            assert block not in self.manager.contents, f"write to published block {block}"
            self.slots[block, p % size] = identities[p]

    def read(self, seq: Sequence, end: int) -> None:
        """The first `end` positions of `seq` must hold what was computed from its own tokens."""
        size, identities = self.manager.block_size, self.prefixes(seq)
        for p in range(end):
            slot = (seq.block_table[p // size], p % size)
            assert self.slots.get(slot) == identities[p], f"position {p} holds another prefix"


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level BPE of a few hundred tokens, as GPT-NeoX's: specials first, blank runs last."""
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
    """As a SentencePiece model becomes one: blanks in the tokens, bytes for unknown characters.

    Its decoder drops the blank at the beginning of a text, which is what makes streaming hard.
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
    """Save the byte-level tokenizer there; returns its number of tokens."""
    tokenizer = byte_level_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPTNeoXTokenizer", "eos_token": "<|endoftext|>", '
        '"bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}',
        encoding="utf-8",
    )
    return tokenizer.get_vocab_size()


EOS_ID, PADDING_ID = 0, 335
CHAIN_CONFIG = twins.FAMILY["pythia-14m"] | {
    "vocab_size": 336,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 2,
    "torch_dtype": "float32",
}


def write_chain_checkpoint(directory: Path, *texts: str, **keys: object) -> Path:
    """A checkpoint whose next token depends on the last one only, so that its text is known.

    After each letter of a text comes the next one, and end-of-text after the last; a text that
    ends with its first letter goes round for ever. "~" stands for a padding id, which shows
    nothing. Layers add nothing, and a token is embedded as the head's row of its successor.
    """
    directory.mkdir(parents=True, exist_ok=True)
    assert write_tokenizer(directory) < PADDING_ID
    tokenizer = byte_level_tokenizer()
    config = CHAIN_CONFIG | keys
    successor = [EOS_ID] * config["vocab_size"]
    for text in texts:
        ids = [PADDING_ID if c == "~" else i for c in text for i in tokenizer.encode(c).ids]
        for first, second in itertools.pairwise(ids):
            assert successor[first] in (EOS_ID, second), "one letter, two successors"
            successor[first] = second
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = full_shapes(ModelConfig.from_dict(config))
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if "norm" in name and name.endswith("weight"):
            tensor.fill_(1)
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(shapes["embed_out.weight"], generator=generator)
    head -= head.mean(-1, keepdim=True)
    tensors["embed_out.weight"] = head
    tensors["gpt_neox.embed_in.weight"] = head[successor]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def copy_checkpoint(source: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(source, target)
    return target


def clean_environ(**extra: str) -> dict[str, str]:
    """The environment without anything that main.py reads."""
    prefixes = ("ATB_", "MINDIE_", "NPU_", "RESERVED_", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    names = ("IS_QUANT", "BIND_CPU", "TIMEIT")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(prefixes) and k not in names}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""} | extra


def run_main(*argv: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """main.py as a user starts it; line ends are not translated."""
    done = subprocess.run(
        [sys.executable, str(MAIN), *argv],
        cwd=cwd,
        env=clean_environ(**environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        check=False,
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


class Terminal:
    """A Python program on a terminal of its own, whose output is what the terminal shows."""

    def __init__(self, *argv: str | Path, cwd: Path, **environ: str) -> None:
        self.main_fd, terminal = pty.openpty()

        def take_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, *map(str, argv)],
            cwd=cwd,
            env=clean_environ(**({"TERM": "dumb", "XDG_STATE_HOME": str(cwd)} | environ)),
            stdin=terminal,
            stdout=terminal,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=take_terminal,  # noqa: PLW1509
        )
        os.close(terminal)
        self.seen = ""
        self._raw = b""

    def type(self, text: str | bytes) -> None:
        os.write(self.main_fd, text if isinstance(text, bytes) else text.encode())

    def wait_for(self, text: str, timeout: float = 60) -> str:
        """Everything up to the next `text`."""
        end = time.monotonic() + timeout
        while text not in self.seen:
            left = end - time.monotonic()
            assert left > 0, f"{text!r} did not come; seen: {self.seen[-500:]!r}"
            if select.select([self.main_fd], [], [], left)[0]:
                self._raw += os.read(self.main_fd, 65536)
                self.seen, self._raw = self.seen + self._raw.decode(errors="ignore"), b""
        before, _, self.seen = self.seen.partition(text)
        return before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=10)
        os.close(self.main_fd)
