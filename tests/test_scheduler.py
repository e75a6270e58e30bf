# SPDX-License-Identifier: Apache-2.0
"""The schedule under random load: no request starves, no budget is passed, no slot is wrong."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.cache_oracle import CacheOracle

from gptneox.engine.block_manager import BlockManager
from gptneox.engine.scheduler import Scheduled, Scheduler
from gptneox.engine.sequence import SamplingParams, Sequence, Status

NUM_STEPS = 100_000  # of the walk, over all its settings


@dataclass(frozen=True)
class Limits:
    """One set of scheduler settings."""

    num_blocks: int = 6
    block_size: int = 2
    prefix_caching: bool = True
    chunked: bool = True
    prefill_budget: int = 8
    max_batch_size: int = 3
    max_prefill_batch_size: int = 0

    def make(self) -> Scheduler:
        manager = BlockManager(self.num_blocks, self.block_size, self.prefix_caching)
        return Scheduler(
            manager,
            max_batch_size=self.max_batch_size,
            prefill_budget=self.prefill_budget,
            max_prefill_batch_size=self.max_prefill_batch_size,
            enable_chunked_prefill=self.chunked,
        )


class Load:
    """Drives a scheduler as the engine does, and checks after each action all it promises."""

    def __init__(self, limits: Limits, rng: random.Random) -> None:
        self.limits, self.rng = limits, rng
        self.scheduler = limits.make()
        self.manager = self.scheduler.block_manager
        self.oracle = CacheOracle(self.manager)
        self.live: dict[int, Sequence] = {}
        self.num_made = self.num_finished = self.num_aborted = 0

    def add(self, prompt: list[int] | None = None, max_new: int = 0) -> None:
        capacity = self.limits.num_blocks * self.limits.block_size
        if prompt is None:
            length = self.rng.randint(1, min(capacity - 1, 14))
            prompt = [self.rng.randint(0, 1) for _ in range(length)]
        room = capacity - len(prompt)
        max_new = max_new or self.rng.randint(1, min(room, 12))
        seq = Sequence.create(self.num_made, prompt, SamplingParams(max_new_tokens=max_new))
        self.num_made += 1
        self.live[seq.request_id] = seq
        self.scheduler.add(seq)

    def abort(self, seq: Sequence) -> None:
        self.scheduler.finish(seq, "abort")
        assert seq.status is Status.FINISHED
        assert seq.finish_reason == "abort"
        assert not seq.block_table
        del self.live[seq.request_id]
        self.num_aborted += 1

    def step(self) -> None:
        oldest = min(self.live)
        running_before = list(self.scheduler.running)
        scheduled = self.scheduler.schedule()
        self.check_schedule(scheduled, running_before)
        assert scheduled, "work, but nothing scheduled"
        # The oldest request always moves on, and nothing overtakes it: so nothing starves.
        assert oldest in [item.seq.request_id for item in scheduled]
        samples = []
        for item in scheduled:
            seq = item.seq
            assert len(seq.token_ids) <= len(seq.block_table) * self.limits.block_size
            self.oracle.write(seq, item.num_tokens)
        for item in scheduled:
            self.oracle.read(item.seq, item.seq.num_computed_tokens + item.num_tokens)
            samples.append(item.sample_rows)
        self.scheduler.mark_computed(scheduled)
        for item, sampled in zip(scheduled, samples, strict=True):
            seq = item.seq
            reaches_end = seq.num_computed_tokens == len(seq.token_ids)
            assert sampled == ((item.num_tokens - 1,) if reaches_end else ())
            if not sampled:
                continue
            # Several tokens may follow from one step; the next one computes all of them.
            most = min(3 if self.limits.chunked else 1, seq.max_tokens - len(seq.token_ids))
            seq.token_ids += self.rng.choices((0, 1), k=self.rng.randint(1, most))
            if len(seq.token_ids) == seq.max_tokens or self.rng.random() < 0.05:
                self.scheduler.finish(seq, "length")
                del self.live[seq.request_id]
                self.num_finished += 1

    def check_schedule(self, scheduled: list[Scheduled], running_before: list[Sequence]) -> None:
        limits, running = self.limits, self.scheduler.running
        assert len(running) <= limits.max_batch_size
        ids = [item.seq.request_id for item in scheduled]
        assert len(set(ids)) == len(ids), "a sequence twice in a step"
        assert {*ids} <= {seq.request_id for seq in running}, "scheduled, but not running"
        assert all(item.num_tokens >= 1 for item in scheduled)
        lengths = [item.num_tokens for item in scheduled]
        num_single = sum(n == 1 for n in lengths)
        assert all(n == 1 for n in lengths[:num_single]), "single tokens come first"
        before = {seq.request_id for seq in running_before}
        started = [item for item in scheduled if item.seq.request_id not in before]
        most_started = limits.max_prefill_batch_size or limits.max_batch_size
        # A preempted sequence that starts again at once counts as started as well, so this is a
        # lower bound of what the scheduler counted.
        assert len(started) <= most_started
        prompts = [item for item in scheduled if item.num_tokens > 1 or item in started]
        total = sum(item.num_tokens for item in prompts)
        if total > limits.prefill_budget:
            assert not limits.chunked, "a chunk above the budget"
            assert len(prompts) == 1, "an oversized prompt beside other prompts"

    def check(self) -> None:
        running, waiting = self.scheduler.running, list(self.scheduler.waiting)
        self.manager.check(running)
        ids = [seq.request_id for seq in running + waiting]
        assert ids == sorted(self.live), "order of arrival is lost, or a request is"
        assert all(seq.status is Status.RUNNING for seq in running)
        assert all(seq.status is Status.WAITING and not seq.block_table for seq in waiting)
        assert self.scheduler.has_work == bool(self.live)

    def drain(self) -> None:
        """Everything ends within as many steps as there are tokens left to compute."""
        most = sum(seq.max_tokens for seq in self.live.values()) + len(self.live)
        while self.live:
            assert most > 0, "no end"
            most -= 1
            self.step()
            self.check()
        assert len(self.manager.free) == self.limits.num_blocks
        assert not any(self.manager.num_users)


WALKS = [
    Limits(prefix_caching=caching, chunked=chunked, **sizes)
    for caching in (True, False)
    for chunked in (True, False)
    for sizes in (
        {"num_blocks": 4, "block_size": 4, "max_batch_size": 4, "prefill_budget": 5},
        {"num_blocks": 9, "block_size": 2, "max_batch_size": 3, "prefill_budget": 1},
        {"num_blocks": 16, "block_size": 1, "max_batch_size": 5, "prefill_budget": 1000},
        {"num_blocks": 12, "block_size": 3, "max_batch_size": 6, "max_prefill_batch_size": 2},
        {"num_blocks": 3, "block_size": 5, "max_batch_size": 1, "prefill_budget": 3},
    )
]


@pytest.mark.parametrize("limits", WALKS, ids=str)
def test_random_walk(limits: Limits) -> None:
    load = Load(limits, random.Random(str(limits)))
    for _ in range(NUM_STEPS // len(WALKS)):
        action = load.rng.random()
        if not load.live or (action < 0.25 and len(load.live) < 12):
            load.add()
        elif action < 0.29:
            load.abort(load.rng.choice(list(load.live.values())))
        else:
            load.step()
        load.check()
    load.drain()
    assert load.num_finished + load.num_aborted == load.num_made
    # The walk was worth its time: blocks ran out, prefixes were shared.
    assert load.num_finished > 100
    if limits.max_batch_size > 1:
        assert load.scheduler.num_preemptions > 10
    assert (load.manager.num_hit_tokens > 50) == limits.prefix_caching


@given(
    limits=st.builds(
        Limits,
        num_blocks=st.integers(2, 10),
        block_size=st.integers(1, 4),
        prefix_caching=st.booleans(),
        chunked=st.booleans(),
        prefill_budget=st.integers(1, 20),
        max_batch_size=st.integers(1, 5),
        max_prefill_batch_size=st.integers(0, 3),
    ),
    actions=st.lists(st.sampled_from(["add", "abort", "step", "step"]), max_size=60),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=80, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_any_load_ends_with_all_blocks_free(limits: Limits, actions: list[str], seed: int) -> None:
    load = Load(limits, random.Random(seed))
    for action in actions:
        if action == "add" or not load.live:
            load.add()
        elif action == "abort":
            load.abort(load.rng.choice(list(load.live.values())))
        else:
            load.step()
        load.check()
    load.drain()


def test_cancel_of_1000_requests_at_random_steps_leaves_nothing() -> None:
    rng = random.Random(4)
    load = Load(Limits(num_blocks=10, max_batch_size=4), rng)
    while load.num_aborted < 1000:
        for _ in range(rng.randint(1, 5)):
            load.add()
        for _ in range(rng.randint(0, 8)):
            if load.live:
                load.step()
        for seq in rng.sample(list(load.live.values()), rng.randint(0, len(load.live))):
            load.abort(seq)
            load.check()
    for seq in list(load.live.values()):
        load.abort(seq)
    load.check()
    assert len(load.manager.free) == 10
    assert not load.scheduler.has_work


def test_oversized_prompt_without_chunks_runs_alone() -> None:
    limits = Limits(num_blocks=50, prefill_budget=4, max_batch_size=8, chunked=False)
    load = Load(limits, random.Random(0))
    for length in (3, 9, 2, 2):
        load.add([length] * length, max_new=5)
    steps = []
    for _ in range(3):
        scheduled = load.scheduler.schedule()
        steps.append([(s.seq.request_id, s.num_tokens) for s in scheduled])
        load.scheduler.mark_computed(scheduled)
        for item in scheduled:
            item.seq.token_ids.append(0)
    assert steps == [[(0, 3)], [(0, 1), (1, 9)], [(0, 1), (1, 1), (2, 2), (3, 2)]]


def test_a_long_prompt_goes_in_chunks_beside_decoding() -> None:
    limits = Limits(num_blocks=50, prefill_budget=4, max_batch_size=8)
    load = Load(limits, random.Random(0))
    load.add([5, 5, 5], max_new=9)
    load.add([7] * 10, max_new=9)
    steps = []
    for _ in range(5):
        scheduled = load.scheduler.schedule()
        steps.append([(s.seq.request_id, s.num_tokens) for s in scheduled])
        sampled = [s.seq for s in scheduled if s.sample_rows]
        load.scheduler.mark_computed(scheduled)
        for seq in sampled:
            seq.token_ids.append(0)
    # A step has 4 prompt tokens at most; a last chunk of one token counts as a decode.
    assert steps[0] == [(1, 1), (0, 3)]
    assert steps[1] == [(0, 1), (1, 4)]
    assert steps[2] == [(0, 1), (1, 4)]
    assert steps[3] == [(0, 1), (1, 1)]
    assert steps[4] == [(0, 1), (1, 1)]


def lines_executed(function: Callable[[], None]) -> int:
    """Python lines that a call runs: a measure of work that no busy machine can disturb."""
    count = 0

    def trace(_frame: object, event: str, _arg: object) -> object:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def run_queue(num_requests: int) -> None:
    scheduler = Limits(num_blocks=64, block_size=4, max_batch_size=8, prefill_budget=64).make()
    for i in range(num_requests):
        scheduler.add(Sequence.create(i, [i % 7, 1, 2], SamplingParams(max_new_tokens=2)))
    while scheduler.has_work:
        scheduled = scheduler.schedule()
        scheduler.mark_computed(scheduled)
        for item in scheduled:
            item.seq.token_ids.append(3)
            if item.seq.num_output_tokens == 2:
                scheduler.finish(item.seq, "length")


def test_a_long_queue_takes_linear_time() -> None:
    small, large = (lines_executed(lambda n=n: run_queue(n)) for n in (300, 3000))
    assert large < 11 * small
    run_queue(10_000)
