# SPDX-License-Identifier: Apache-2.0
"""One face for both paths: what an accuracy task asks of a model."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from gptneox.backends.base import Backend
from gptneox.engine.flash_engine import FlashEngine
from gptneox.engine.llm_engine import LLMEngine
from gptneox.engine.sequence import SamplingParams
from gptneox.parallel import TensorParallelGroup


@dataclass(frozen=True)
class Answer:
    """Text generated for one prompt, without special tokens."""

    text: str
    token_ids: list[int]


class Runner(Protocol):
    """A loaded model with its tokenizer. Every rank calls the same methods in the same order."""

    tokenizer: Any
    max_positions: int
    group: TensorParallelGroup
    backend: Backend

    def score_next(self, prompts: Seq[Seq[int]], token_ids: Seq[int]) -> list[list[float]]:
        """log p of each of `token_ids` as the token after each prompt; fp32 softmax.

        On ranks above 0 the paged path returns empty rows: rank 0 keeps the books.
        """
        ...

    def generate(self, prompts: Seq[Seq[int]], max_new_tokens: int) -> list[Answer]:
        """Greedy continuations, ended by the end-of-text token."""
        ...


class PagedRunner:
    """The paged engine; a batch is what runs at once."""

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self.tokenizer, self.max_positions = engine.tokenizer, engine.max_positions
        self.group, self.backend = engine.model.group, engine.model.backend

    def score_next(self, prompts: Seq[Seq[int]], token_ids: Seq[int]) -> list[list[float]]:
        """See `Runner`."""
        params = SamplingParams(
            max_new_tokens=1, ignore_eos=True, logprobs=0, logprob_token_ids=tuple(token_ids)
        )
        outputs = self.engine.generate(prompts, params)
        return [[o.logprobs[0].top[t] for t in token_ids] if o.logprobs else [] for o in outputs]

    def generate(self, prompts: Seq[Seq[int]], max_new_tokens: int) -> list[Answer]:
        """See `Runner`."""
        outputs = self.engine.generate(prompts, SamplingParams(max_new_tokens=max_new_tokens))
        return [Answer(o.text, o.token_ids) for o in outputs]


class FlashRunner:
    """The flash engine; a call is one padded batch."""

    def __init__(self, engine: FlashEngine) -> None:
        self.engine = engine
        self.tokenizer, self.max_positions = engine.tokenizer, engine.max_positions
        model = engine.model.model
        self.group, self.backend = model.group, model.backend

    @torch.inference_mode()
    def score_next(self, prompts: Seq[Seq[int]], token_ids: Seq[int]) -> list[list[float]]:
        """See `Runner`."""
        logits = self.engine.next_logits(prompts)
        logprobs = logits.float().log_softmax(-1)
        rows = logprobs[:, list(token_ids)].tolist()
        assert isinstance(rows, list)
        return rows

    def generate(self, prompts: Seq[Seq[int]], max_new_tokens: int) -> list[Answer]:
        """See `Runner`."""
        outputs = self.engine.generate(prompts, max_new_tokens=max_new_tokens, do_sample=False)
        return [Answer(o.text, o.token_ids) for o in outputs]


def model_files(model_path: Path) -> list[Path]:
    """config.json and the weight files: what makes a checkpoint the one it is."""
    patterns = ("config.json", "*.safetensors", "pytorch_model*.bin", "tokenizer.json")
    return sorted(path for pattern in patterns for path in model_path.glob(pattern))
