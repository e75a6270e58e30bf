# SPDX-License-Identifier: Apache-2.0
"""Runs the model for one step: batch tensors, forward pass, sampling."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptneox.devices.step import ForwardBatch
from gptneox.engine.sampler import NON_FINITE, Sampler, non_finite_rows, token_logprobs
from gptneox.engine.scheduler import Scheduled
from gptneox.engine.sequence import NO_TOKEN, Sequence
from gptneox.kv_cache import PagedKVCache
from gptneox.model import GPTNeoX

# Rows of prompt logits computed at once: 51 MB for V = 50432 in fp32.
_LOGIT_ROWS = 256


@dataclass
class StepResult:
    """The sampled tokens of one step; the same on every rank."""

    token_ids: list[list[int]]  # per scheduled item, one for each of its `sample_rows`
    failed: dict[int, str]  # id of a request without a token -> why
    prepare_s: float = 0.0  # time before the forward pass, if measured
    forward_s: float = 0.0  # time of the forward pass, logits included, if measured


class ModelRunner:
    """One rank's model and cache."""

    def __init__(self, model: GPTNeoX, cache: PagedKVCache) -> None:
        self.model, self.cache = model, cache
        self.group, self.device = model.group, model.device.torch_device
        self.sampler = Sampler(model.ops)
        self.step = model.ops.capture(self._forward)

    @torch.inference_mode()
    def run(self, scheduled: list[Scheduled], *, measure: bool = False) -> StepResult:
        """Compute one step.

        Rank 0 appends log-probabilities to the sequences whose parameters ask for them.

        Args:
            scheduled: the tokens to compute.
            measure: synchronize with the device after the forward pass, to time it separately.
        """
        start = time.perf_counter()
        batch = self.prepare(scheduled)
        prepare_end = time.perf_counter()
        hidden = self.step(batch)  # [T, C]
        failed = self._score_prompts(scheduled, hidden)
        rows, seqs, first = [], [], 0
        for item in scheduled:
            rows += [first + row for row in item.sample_rows]
            seqs += [item.seq] * len(item.sample_rows)
            first += item.num_tokens
        logits = None
        if rows:
            if len(rows) < hidden.shape[0]:
                hidden = hidden[self._upload([rows], np.int64)[0]]
            logits = self.model.compute_logits(hidden)
        result = StepResult([[] for _ in scheduled], failed)
        if measure:
            self.model.device.synchronize()
            result.prepare_s = prepare_end - start
            result.forward_s = time.perf_counter() - prepare_end
        if logits is not None:
            token_ids = iter(self._sample(logits, seqs, failed))
            result.token_ids = [[next(token_ids) for _ in item.sample_rows] for item in scheduled]
        return result

    def prepare(self, scheduled: list[Scheduled]) -> ForwardBatch:
        """The step's tensors; the scheduler has put sequences with a single token first."""
        size = self.cache.block_size
        input_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        q_lens, context_lens, cu_seqlens_q = [], [], [0]
        widest = max(len(item.seq.block_table) for item in scheduled)
        block_tables: list[int] = []  # [B, widest], row by row
        for item in scheduled:
            seq, start = item.seq, item.seq.num_computed_tokens
            end = start + item.num_tokens
            table = seq.block_table
            input_ids += seq.token_ids[start:end]
            positions += range(start, end)
            slots += [table[p // size] * size + p % size for p in range(start, end)]
            q_lens.append(item.num_tokens)
            context_lens.append(end)
            cu_seqlens_q.append(len(input_ids))
            block_tables += table + [0] * (widest - len(table))

        ids, places, slot_mapping = self._upload((input_ids, positions, slots), np.int64)
        tables, cu_seqlens, contexts = self._upload(
            (block_tables, cu_seqlens_q, context_lens), np.int32
        )
        return ForwardBatch(
            input_ids=ids,
            positions=places,
            slot_mapping=slot_mapping,
            block_tables=tables.view(len(scheduled), widest),
            cu_seqlens_q=cu_seqlens,
            context_lens=contexts,
            q_lens_list=q_lens,
            context_lens_list=context_lens,
            num_decodes=sum(n == 1 for n in q_lens),
        )

    def _upload(self, lists: Seq[list[int]], dtype: type[np.integer[Any]]) -> list[Tensor]:
        """The lists as views of one tensor, copied to the device in one go.

        Each view starts at a multiple of 16 bytes, the alignment that kernels are compiled for.
        """
        unit = 16 // np.dtype(dtype).itemsize
        values: list[int] = []
        starts = []
        for each in lists:
            starts.append(len(values))
            values += each
            values += [0] * (-len(values) % unit)
        block = torch.from_numpy(np.array(values, dtype=dtype))
        if self.device.type != "cpu":
            if self.model.device.pins_memory:
                block = block.pin_memory()
            block = block.to(self.device, non_blocking=True)
        return [block[i : i + len(each)] for i, each in zip(starts, lists, strict=True)]

    def _forward(self, batch: ForwardBatch) -> Tensor:
        hidden = self.model(self.cache.begin(batch, self.model.rotary))
        assert isinstance(hidden, Tensor)
        return hidden

    def _sample(self, logits: Tensor, seqs: list[Sequence], failed: dict[int, str]) -> list[int]:
        """Sample on rank 0 and broadcast the tokens; adds to `failed`.

        logits: [S, V], one row per entry of `seqs`.
        """
        if self.group.rank == 0:
            choice = self.sampler.choose(logits, seqs)
        else:
            choice = torch.empty(len(seqs) + 1, dtype=torch.int64, device=self.device)
        # The only point of a step that waits for the device.
        *token_ids, is_finite = self.group.broadcast(choice).tolist()
        if not is_finite:
            rows = self.group.broadcast_object(non_finite_rows(logits))
            failed |= {seqs[row].request_id: NON_FINITE for row in rows}
        for seq, token_id in zip(seqs, token_ids, strict=True):
            if token_id < 0:
                failed.setdefault(seq.request_id, NO_TOKEN)
        if self.group.rank == 0:
            for i, seq in enumerate(seqs):
                if seq.params.logprobs is not None and token_ids[i] >= 0:
                    seq.logprobs += token_logprobs(
                        logits[i : i + 1],
                        [token_ids[i]],
                        seq.params.logprobs,
                        seq.params.logprob_token_ids,
                    )
        return token_ids

    def _score_prompts(self, scheduled: list[Scheduled], hidden: Tensor) -> dict[int, str]:
        """Compute the prompt log-probabilities that requests asked for, `_LOGIT_ROWS` at a time.

        Returns the requests whose logits are not finite, as `StepResult.failed`.
        """
        first = 0
        failed: dict[int, str] = {}
        for item in scheduled:
            seq, start = item.seq, item.seq.num_computed_tokens
            num_top = seq.params.prompt_logprobs
            if num_top is not None:
                # The hidden state at position p scores the token at p + 1. A preempted sequence
                # recomputes positions that are already scored; these are skipped.
                end = min(start + item.num_tokens, seq.num_prompt_tokens - 1)
                for p in range(max(start, seq.num_scored_tokens), end, _LOGIT_ROWS):
                    targets = seq.token_ids[p + 1 : min(p + _LOGIT_ROWS, end) + 1]
                    rows = hidden[first + p - start : first + p - start + len(targets)]
                    logits = self.model.compute_logits(rows)
                    if self.group.broadcast_object(bool(non_finite_rows(logits))):
                        failed[seq.request_id] = NON_FINITE
                    if self.group.rank == 0:
                        seq.prompt_logprobs += token_logprobs(logits, targets, num_top)
                    seq.num_scored_tokens = p + len(targets)
            first += item.num_tokens
        return failed
