# SPDX-License-Identifier: Apache-2.0
"""Decides which sequences run in the next step, and how many of their tokens.

Scheduling is deterministic (no clock, no randomness, no set iteration), so every rank of a
tensor-parallel run makes the same decisions from the same requests without communication.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from gptneox.engine.block_manager import BlockManager, NoFreeBlocks
from gptneox.engine.sequence import Sequence, Status


@dataclass(frozen=True)
class Scheduled:
    """The next `num_tokens` uncomputed tokens of a sequence.

    `sample_rows` are the indices among them after which a token is sampled: normally only the
    last one, and none while the prompt is incomplete.
    """

    seq: Sequence
    num_tokens: int
    sample_rows: tuple[int, ...] = ()


def _scheduled(seq: Sequence, num_tokens: int, start: int) -> Scheduled:
    """The next `num_tokens` tokens of a sequence whose first `start` tokens are computed."""
    reaches_end = start + num_tokens == len(seq.token_ids)
    samples = reaches_end and seq.params.max_new_tokens > 0
    return Scheduled(seq, num_tokens, (num_tokens - 1,) if samples else ())


class Scheduler:
    """First come, first served, with continuous batching, chunked prefill and preemption."""

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_batch_size: int,
        prefill_budget: int,
        max_prefill_batch_size: int = 0,
        enable_chunked_prefill: bool = True,
    ) -> None:
        """The limits are those of `EngineSection`."""
        self.block_manager = block_manager
        self.max_batch_size, self.prefill_budget = max_batch_size, prefill_budget
        self.max_prefill_batch_size = max_prefill_batch_size or max_batch_size
        self.enable_chunked_prefill = enable_chunked_prefill
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.num_preemptions = 0

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. The caller must have checked that it fits an empty cache."""
        self.waiting.append(seq)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.waiting or self.running)

    def schedule(self) -> list[Scheduled]:
        """The next step: sequences with one token first, then longer chunks.

        Running sequences come before waiting ones. If a running sequence needs a block and none is
        free, the youngest is preempted and recomputed later. The oldest always progresses, because
        every request fits an empty cache, so scheduling never deadlocks.
        """
        budget = self.prefill_budget
        scheduled: list[Scheduled] = []
        position = 0
        while position < len(self.running):
            seq = self.running[position]
            num_left = len(seq.token_ids) - seq.num_computed_tokens
            if not self._grow(seq):
                break  # it was the youngest and has been preempted
            if num_left > 1:
                num_left = min(num_left, budget) if self.enable_chunked_prefill else num_left
                budget -= num_left
            position += 1
            if num_left > 0:
                scheduled.append(_scheduled(seq, num_left, seq.num_computed_tokens))
        scheduled += self._admit(budget, has_prefill=budget < self.prefill_budget)
        return sorted(scheduled, key=lambda s: s.num_tokens > 1)  # stable

    def _grow(self, seq: Sequence) -> bool:
        """Allocate blocks for all tokens of `seq`; False if `seq` itself was preempted."""
        while True:
            try:
                self.block_manager.grow(seq)
            except NoFreeBlocks:
                victim = self.running.pop()
                self._preempt(victim)
                if victim is seq:
                    return False
            else:
                return True

    def _preempt(self, seq: Sequence) -> None:
        self.block_manager.release(seq)
        seq.status = Status.WAITING
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def _admit(self, budget: int, *, has_prefill: bool) -> list[Scheduled]:
        """Start waiting sequences in order while batch size, budget and blocks allow it."""
        admitted: list[Scheduled] = []
        while self.waiting and len(self.running) < self.max_batch_size:
            seq = self.waiting[0]
            if len(admitted) == self.max_prefill_batch_size:
                break
            if budget <= 0 and (has_prefill or admitted):
                break
            shared = self.block_manager.match_prefix(seq)
            num_left = len(seq.token_ids) - len(shared) * self.block_manager.block_size
            if self.enable_chunked_prefill:
                num_left = min(num_left, budget)
            elif num_left > budget and (has_prefill or admitted):
                break  # a prompt longer than the budget needs a step without other prompts
            try:
                # Keep one block per running sequence, or the next step would preempt this one.
                self.block_manager.allocate(seq, shared, keep_free=len(self.running))
            except NoFreeBlocks:
                break
            self.waiting.popleft()
            seq.status = Status.RUNNING
            self.running.append(seq)
            admitted.append(_scheduled(seq, num_left, seq.num_computed_tokens))
            budget -= num_left
        return admitted

    def mark_computed(self, scheduled: list[Scheduled]) -> None:
        """Record that the K and V of a step's tokens are in the cache."""
        for item in scheduled:
            item.seq.num_computed_tokens += item.num_tokens
            self.block_manager.cache_full_blocks(item.seq)

    def finish(self, seq: Sequence, reason: str) -> None:
        """End a sequence between two steps and free its blocks."""
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
        elif seq.status is Status.WAITING:
            self.waiting.remove(seq)
        self.block_manager.release(seq)
        seq.status, seq.finish_reason = Status.FINISHED, reason
