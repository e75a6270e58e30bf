# SPDX-License-Identifier: Apache-2.0
"""Logits of the paged engine step by step, random token ids, and the size of an error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptneox.engine.paged import PagedEngine
from gptneox.engine.scheduler import Scheduled
from gptneox.engine.sequence import SamplingParams, Sequence


@torch.inference_mode()
def paged_logits(engine: PagedEngine, token_ids: list[int], num_prefill: int) -> Tensor:
    """Logits [len(token_ids), V] fp32 of one prefill, followed by one step per token."""
    seq = Sequence.create(0, token_ids, SamplingParams())
    engine.block_manager.allocate(seq, [])
    rows = []
    for num_tokens in [num_prefill] + [1] * (len(token_ids) - num_prefill):
        hidden = engine.runner.step(engine.runner.prepare([Scheduled(seq, num_tokens)]))
        rows.append(engine.model.compute_logits(hidden).float().cpu())
        seq.num_computed_tokens += num_tokens
    engine.block_manager.release(seq)
    return torch.cat(rows)


def random_ids(config: dict[str, Any], num_tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config["vocab_size"], (num_tokens,), generator=generator).tolist()


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
