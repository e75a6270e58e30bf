# SPDX-License-Identifier: Apache-2.0
"""The block books under every order of operations that a scheduler could make."""

from __future__ import annotations

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.cache_oracle import CacheOracle, StoredTokens

from gptneox.engine.block_manager import BlockManager, NoFreeBlocks
from gptneox.engine.sequence import SamplingParams, Sequence

TOKENS = st.integers(0, 1)  # two letters, and often one alone: equal beginnings all the time
PROMPTS = st.lists(TOKENS, min_size=1, max_size=9) | st.integers(1, 9).map(lambda n: [1] * n)


def sequence(request_id: int, token_ids: list[int], **params: object) -> Sequence:
    return Sequence.create(request_id, token_ids, SamplingParams(**params))


class Books(RuleBasedStateMachine):
    """Sequences start, compute, grow and leave in any order; the oracle watches every slot."""

    def __init__(self) -> None:
        super().__init__()
        self.holding: list[Sequence] = []
        self.num_made = 0

    @initialize(
        num_blocks=st.integers(1, 6),
        block_size=st.integers(1, 3),
        caching=st.booleans(),
        stores=st.booleans(),
    )
    def open(self, num_blocks: int, block_size: int, caching: bool, stores: bool) -> None:
        self.manager = BlockManager(num_blocks, block_size, caching)
        stored = StoredTokens(num_blocks, block_size) if stores else None
        self.oracle = CacheOracle(self.manager, stored)

    def snapshot(self) -> tuple[object, ...]:
        m = self.manager
        return list(m.free), list(m.num_users), dict(m.cached), dict(m.contents)

    @rule(tokens=PROMPTS, keep_free=st.sampled_from([0, 0, 1, 2]))
    def start(self, tokens: list[int], keep_free: int) -> None:
        seq = sequence(self.num_made, tokens)
        self.num_made += 1
        shared = self.manager.match_prefix(seq)
        assert len(shared) * self.manager.block_size < len(tokens), "nothing left to compute"
        idle = [b for b in shared if not self.manager.num_users[b]]
        room = len(self.manager.free) - len(idle)
        needed = self.manager.blocks_for(len(tokens)) - len(shared) + keep_free
        before = self.snapshot()
        if needed > room:
            with pytest.raises(NoFreeBlocks):
                self.manager.allocate(seq, shared, keep_free=keep_free)
            assert self.snapshot() == before, "a refusal took something"
            assert not seq.block_table
            return
        self.manager.allocate(seq, shared, keep_free=keep_free)
        assert seq.block_table[: len(shared)] == shared
        assert len(seq.block_table) == self.manager.blocks_for(len(tokens))
        assert len(self.manager.free) >= keep_free
        self.oracle.read(seq, seq.num_computed_tokens)
        self.holding.append(seq)

    @precondition(lambda self: self.holding)
    @rule(data=st.data(), share=st.sampled_from([0.4, 0.8, 1, 1, 1]))
    def compute(self, data: st.DataObject, share: float) -> None:
        seq = data.draw(st.sampled_from(self.holding))
        room = min(len(seq.token_ids), len(seq.block_table) * self.manager.block_size)
        num_tokens = round(share * (room - seq.num_computed_tokens))
        self.oracle.write(seq, num_tokens)
        seq.num_computed_tokens += num_tokens
        self.manager.cache_full_blocks(seq)
        self.oracle.read(seq, seq.num_computed_tokens)

    @precondition(lambda self: self.holding)
    @rule(data=st.data(), token=TOKENS)
    def append(self, data: st.DataObject, token: int) -> None:
        seq = data.draw(st.sampled_from(self.holding))
        size = self.manager.block_size
        if len(seq.token_ids) > len(seq.block_table) * size:
            return  # it waits for a block
        seq.token_ids.append(token)
        table, before = list(seq.block_table), self.snapshot()
        if len(seq.token_ids) <= len(table) * size:
            self.manager.grow(seq)
            assert seq.block_table == table, "grown without need"
        elif self.manager.free:
            self.manager.grow(seq)
            assert seq.block_table[:-1] == table
        else:
            with pytest.raises(NoFreeBlocks):
                self.manager.grow(seq)
            assert self.snapshot() == before

    @precondition(lambda self: self.holding)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.holding))
        self.holding.remove(seq)
        self.manager.release(seq)
        self.manager.release(seq)  # has nothing any more: harmless
        assert (seq.block_table, seq.num_computed_tokens) == ([], 0)

    @invariant()
    def balanced(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check(self.holding)
        for seq in self.holding:
            self.oracle.read(seq, seq.num_computed_tokens)
        if not self.manager.enable_prefix_caching:
            assert not self.manager.cached

    def teardown(self) -> None:
        for seq in self.holding:
            self.manager.release(seq)
        if hasattr(self, "manager"):
            self.manager.check([])
            assert len(self.manager.free) == self.manager.num_blocks


# Without shrinking: 40 short steps can be read as they are, and making them fewer takes minutes.
QUICK = (Phase.explicit, Phase.reuse, Phase.generate)
Books.TestCase.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, phases=QUICK
)
TestBooks = Books.TestCase


def filled(manager: BlockManager, request_id: int, tokens: list[int]) -> Sequence:
    """A sequence whose tokens are all computed."""
    seq = sequence(request_id, tokens)
    manager.allocate(seq, manager.match_prefix(seq))
    seq.num_computed_tokens = len(tokens)
    manager.cache_full_blocks(seq)
    return seq


@given(
    first=st.lists(TOKENS, min_size=1, max_size=24),
    second=st.lists(TOKENS, min_size=1, max_size=24),
    size=st.integers(1, 5),
)
def test_match_is_the_longest_common_beginning_in_full_blocks(
    first: list[int], second: list[int], size: int
) -> None:
    manager = BlockManager(64, size, True)
    owner = filled(manager, 0, first)
    seq = sequence(1, second)
    common = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )
    expected = min(common // size, (len(second) - 1) // size)
    assert manager.match_prefix(seq) == owner.block_table[:expected]


def test_a_released_prefix_is_found_again_and_the_deepest_block_goes_first() -> None:
    manager = BlockManager(4, 2, True)
    seq = filled(manager, 0, [1, 2, 3, 4, 5, 6, 7])  # three full blocks and a partial one
    table = list(seq.block_table)
    manager.release(seq)
    again = sequence(1, [1, 2, 3, 4, 5, 6, 9])
    assert manager.match_prefix(again) == table[:3]
    assert list(manager.free) == [table[3], table[2], table[1], table[0]]
    other = sequence(2, [8] * 4)  # takes the partial block and the deepest full one
    manager.allocate(other, manager.match_prefix(other))
    assert manager.match_prefix(again) == table[:2]
    manager.check([other])


def test_the_books_see_an_error() -> None:
    """`check` is the oracle of the other tests, so it must notice each kind of damage."""

    def damaged(kind: str) -> tuple[BlockManager, list[Sequence]]:
        manager = BlockManager(4, 2, True)
        seq = filled(manager, 0, [1, 2, 3])
        if kind == "leak":
            manager.free.popitem()
        elif kind == "double use":
            manager.free[seq.block_table[0]] = None
        elif kind == "lost sequence":
            return manager, []
        elif kind == "twice in a table":
            seq.block_table.append(seq.block_table[0])
        elif kind == "stale content":
            manager.cached.clear()
        elif kind == "users":
            manager.num_users[seq.block_table[1]] += 1
        return manager, [seq]

    manager, seqs = damaged("")
    manager.check(seqs)
    kinds = ("leak", "double use", "lost sequence", "twice in a table", "stale content", "users")
    for kind in kinds:
        manager, seqs = damaged(kind)
        with pytest.raises(AssertionError):
            manager.check(seqs)


def test_prompt_scores_need_every_position() -> None:
    manager = BlockManager(8, 2, True)
    filled(manager, 0, [1, 2, 3, 4, 5])
    assert len(manager.match_prefix(sequence(1, [1, 2, 3, 4, 5]))) == 2
    assert manager.match_prefix(sequence(2, [1, 2, 3, 4, 5], prompt_logprobs=0)) == []


def test_hits_are_counted() -> None:
    manager = BlockManager(8, 2, True)
    filled(manager, 0, [1, 2, 3, 4, 5])
    filled(manager, 1, [1, 2, 3, 4, 6])
    assert (manager.num_queried_tokens, manager.num_hit_tokens) == (10, 4)
