# SPDX-License-Identifier: Apache-2.0
"""One face for both paths: what an accuracy task asks of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from gptneox.cli import Settings
from gptneox.devices.device import Device
from gptneox.engine.generate import GenerateEngine
from gptneox.engine.paged import PagedEngine
from gptneox.engine.sampler import check_finite
from gptneox.engine.sequence import SamplingParams
from gptneox.parallel import TensorParallelGroup
from gptneox.session import load_engine

_NUM_BLOCKS, _BLOCK_BYTES = 64, 1 << 20  # what is read of each large weight file


@dataclass(frozen=True)
class Answer:
    """Text generated for one prompt, without special tokens."""

    text: str
    token_ids: list[int]


@dataclass(frozen=True)
class NextToken:
    """The distribution after one prompt: its likeliest token, and log p of the tokens asked for.

    On ranks above 0 of the paged path `logprobs` is empty: rank 0 keeps the books.
    """

    greedy_id: int
    logprobs: list[float]


class Runner(Protocol):
    """A loaded model with its tokenizer. Every rank calls the same methods in the same order."""

    tokenizer: Any
    max_positions: int
    group: TensorParallelGroup
    device: Device

    def score_next(self, prompts: Seq[Seq[int]], token_ids: Seq[int]) -> list[NextToken]:
        """log p of each of `token_ids` as the token after each prompt; fp32 softmax.

        Raises:
            NonFiniteLogits: the model's output is NaN or infinite.
        """
        ...

    def generate(self, prompts: Seq[Seq[int]], max_new_tokens: int) -> list[Answer]:
        """Greedy continuations, ended by the end-of-text token."""
        ...


class PagedRunner:
    """The paged engine; a batch is what runs at once."""

    def __init__(self, engine: PagedEngine) -> None:
        self.engine = engine
        self.tokenizer, self.max_positions = engine.tokenizer, engine.max_positions
        self.group, self.device = engine.model.group, engine.model.device

    def score_next(self, prompts: Seq[Seq[int]], token_ids: Seq[int]) -> list[NextToken]:
        """See `Runner`."""
        params = SamplingParams(
            max_new_tokens=1, ignore_eos=True, logprobs=0, logprob_token_ids=tuple(token_ids)
        )
        outputs = self.engine.generate(prompts, params)
        return [
            NextToken(
                o.token_ids[0], [o.logprobs[0].top[t] for t in token_ids] if o.logprobs else []
            )
            for o in outputs
        ]

    def generate(self, prompts: Seq[Seq[int]], max_new_tokens: int) -> list[Answer]:
        """See `Runner`."""
        outputs = self.engine.generate(prompts, SamplingParams(max_new_tokens=max_new_tokens))
        return [Answer(o.text, o.token_ids) for o in outputs]


class FlashRunner:
    """The flash engine; a call is one padded batch."""

    def __init__(self, engine: GenerateEngine) -> None:
        self.engine = engine
        self.tokenizer, self.max_positions = engine.tokenizer, engine.max_positions
        model = engine.model.model
        self.group, self.device = model.group, model.device

    @torch.inference_mode()
    def score_next(self, prompts: Seq[Seq[int]], token_ids: Seq[int]) -> list[NextToken]:
        """See `Runner`."""
        logits = self.engine.next_logits(prompts).float()  # [B, V]
        check_finite(logits, range(len(prompts)))
        rows = logits.log_softmax(-1)[:, list(token_ids)].tolist()
        greedy_ids = logits.argmax(-1).tolist()
        return [NextToken(i, row) for i, row in zip(greedy_ids, rows, strict=True)]

    def generate(self, prompts: Seq[Seq[int]], max_new_tokens: int) -> list[Answer]:
        """See `Runner`."""
        outputs = self.engine.generate(prompts, max_new_tokens=max_new_tokens, do_sample=False)
        return [Answer(o.text, o.token_ids) for o in outputs]


def load_runner(
    settings: Settings, device: Device, group: TensorParallelGroup, batch_size: int
) -> Runner:
    """Load the model on the path that `settings` choose.

    Raises:
        ValueError, OSError, RuntimeError: see `PagedEngine` and `GenerateEngine`.
    """
    if settings.attention == "flash":
        engine = GenerateEngine.from_pretrained(
            settings.model_path,
            device,
            group,
            dtype=settings.model.dtype,
            max_position_embeddings=settings.engine.max_position_embeddings,
        )
        return FlashRunner(engine)
    section = replace(settings.engine, max_batch_size=batch_size)
    return PagedRunner(load_engine(replace(settings, engine=section), device, group))


def model_files(model_path: Path) -> list[Path]:
    """config.json and the weight files: what makes a checkpoint the one it is."""
    patterns = ("config.json", "*.safetensors", "pytorch_model*.bin", "tokenizer*")
    return sorted({path for pattern in patterns for path in model_path.glob(pattern)})


def content_hash(files: Iterable[Path]) -> str:
    """SHA-256 over names, sizes and contents; of large files over blocks spread evenly."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= _NUM_BLOCKS * _BLOCK_BYTES:
                digest.update(file.read())
                continue
            for i in range(_NUM_BLOCKS):
                file.seek(i * (size - _BLOCK_BYTES) // (_NUM_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()
