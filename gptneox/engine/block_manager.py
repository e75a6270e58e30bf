# SPDX-License-Identifier: Apache-2.0
"""Who owns which KV-cache block, and which blocks hold a prefix that can be shared.

    free (in order of eviction)          used (num_users > 0)
    [empty … | cached, oldest first]     block_table of one or several sequences

A block becomes shareable once it is full and computed. Its key is the content id of the previous
block plus its own tokens. Python's dict hashes the key and compares it in full, so two different
prefixes never collide. A block without users keeps its content until it is allocated again.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import count

from gptneox.engine.sequence import Sequence

_ROOT = 0  # content before the first block
_Key = tuple[int, tuple[int, ...]]


class NoFreeBlocks(RuntimeError):
    """Not enough free blocks; nothing was allocated. Only the scheduler catches this."""


class BlockManager:
    """Reference-counted blocks with prefix sharing. Pure bookkeeping: no tensor is touched."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_users = [0] * num_blocks
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.cached: dict[_Key, int] = {}  # content -> block
        self.contents: dict[int, tuple[int, _Key]] = {}  # block -> (content id, its key)
        self._content_ids = count(_ROOT + 1)
        self.num_hit_tokens = 0
        self.num_queried_tokens = 0

    def blocks_for(self, num_tokens: int) -> int:
        """Number of blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, seq: Sequence) -> list[int]:
        """Cached blocks that hold the beginning of `seq`; always leaves a token to compute.

        Positions that still need prompt log-probabilities are never matched: only a forward pass
        gives their logits.
        """
        if not self.enable_prefix_caching:
            return []
        size, blocks, parent = self.block_size, [], _ROOT
        last = len(seq.token_ids) - 1
        if seq.params.prompt_logprobs is not None:
            last = min(last, seq.num_scored_tokens)
        for start in range(0, last // size * size, size):
            block = self.cached.get((parent, tuple(seq.token_ids[start : start + size])))
            if block is None:
                break
            blocks.append(block)
            parent = self.contents[block][0]
        return blocks

    def allocate(self, seq: Sequence, shared: list[int], *, keep_free: int = 0) -> None:
        """Allocate blocks for all tokens of a sequence.

        Args:
            seq: a sequence without blocks.
            shared: the result of `match_prefix` for `seq`, just computed.
            keep_free: blocks that must stay free for others.

        Raises:
            NoFreeBlocks: nothing was allocated.
        """
        assert not seq.block_table, f"request {seq.request_id} already has blocks"
        num_new = self.blocks_for(len(seq.token_ids)) - len(shared)
        num_unused_shared = sum(not self.num_users[block] for block in shared)
        available = len(self.free) - num_unused_shared
        if num_new + keep_free > available:
            raise NoFreeBlocks(f"need {num_new} blocks and {keep_free} spare, have {available}")
        for block in shared:
            self.free.pop(block, None)
            self.num_users[block] += 1
        seq.block_table = shared + [self._pop_free() for _ in range(num_new)]
        seq.num_cached_blocks = len(shared)
        seq.content_id = self.contents[shared[-1]][0] if shared else _ROOT
        seq.num_computed_tokens = len(shared) * self.block_size
        self.num_hit_tokens += seq.num_computed_tokens
        self.num_queried_tokens += len(seq.token_ids)

    def grow(self, seq: Sequence) -> None:
        """Allocate the blocks that a sequence's newest tokens need.

        Raises:
            NoFreeBlocks: nothing was allocated.
        """
        num_new = self.blocks_for(len(seq.token_ids)) - len(seq.block_table)
        if num_new > len(self.free):
            raise NoFreeBlocks(f"need {num_new} block(s), have {len(self.free)}")
        seq.block_table += [self._pop_free() for _ in range(num_new)]

    def cache_full_blocks(self, seq: Sequence) -> None:
        """Put the full, computed blocks of `seq` into the prefix cache."""
        num_full = seq.num_computed_tokens // self.block_size
        if not self.enable_prefix_caching or num_full == seq.num_cached_blocks:
            return
        for i in range(seq.num_cached_blocks, num_full):
            tokens = tuple(seq.token_ids[i * self.block_size : (i + 1) * self.block_size])
            key = (seq.content_id, tokens)
            if key not in self.cached:
                block = seq.block_table[i]
                self.cached[key] = block
                self.contents[block] = (next(self._content_ids), key)
            # Otherwise another block already holds this content; continue the chain from it.
            seq.content_id = self.contents[self.cached[key]][0]
        seq.num_cached_blocks = num_full

    def release(self, seq: Sequence) -> None:
        """Free all blocks of `seq`, deepest first, so that shared prefixes are evicted last."""
        for block in reversed(seq.block_table):
            self.num_users[block] -= 1
            assert self.num_users[block] >= 0, f"block {block} released twice"
            if self.num_users[block]:
                continue
            self.free[block] = None
            if block not in self.contents:
                self.free.move_to_end(block, last=False)  # not cached: reuse it first
        seq.block_table = []
        seq.num_computed_tokens = seq.num_cached_blocks = seq.content_id = 0

    def check(self, sequences: list[Sequence]) -> None:
        """Assert that the bookkeeping is consistent with `sequences`, all that hold blocks."""
        users = [0] * self.num_blocks
        for seq in sequences:
            assert len(set(seq.block_table)) == len(seq.block_table), "a block twice in one table"
            for block in seq.block_table:
                users[block] += 1
        assert users == self.num_users, "num_users differs from the block tables"
        assert {b for b, n in enumerate(users) if not n} == set(self.free), "free list is wrong"
        assert len(self.cached) == len(self.contents), "a block is cached twice"
        for block, (_, key) in self.contents.items():
            assert self.cached[key] == block, f"block {block} is not where its content points"

    def _pop_free(self) -> int:
        """Allocate one free block; its cached content is evicted."""
        block, _ = self.free.popitem(last=False)
        if content := self.contents.pop(block, None):
            del self.cached[content[1]]
        self.num_users[block] = 1
        return block
