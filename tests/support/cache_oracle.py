# SPDX-License-Identifier: Apache-2.0
"""A model of the KV cache that detects a slot with the K and V of another prefix."""

from __future__ import annotations

from gptneox.engine.block_manager import BlockManager
from gptneox.engine.sequence import Sequence


class CacheOracle:
    """Tracks the content of each slot of a KV cache.

    K and V at a position depend on all tokens up to it, so a slot's content is modelled as the id
    of that prefix. A wrongly shared block, a stale block or a lost write shows as a wrong id.
    """

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.slots: dict[tuple[int, int], int] = {}
        self._identities: dict[tuple[int, int], int] = {}
        self._prefixes: dict[int, list[int]] = {}  # request -> identity of each of its prefixes

    def prefixes(self, seq: Sequence) -> list[int]:
        prefixes = self._prefixes.setdefault(seq.request_id, [])
        for token_id in seq.token_ids[len(prefixes) :]:
            key = (prefixes[-1] if prefixes else 0, token_id)
            prefixes.append(self._identities.setdefault(key, len(self._identities) + 1))
        return prefixes

    def write(self, seq: Sequence, num_tokens: int) -> None:
        """Fill the slots of the next `num_tokens`; they must not be shared with other sequences."""
        size, identities = self.manager.block_size, self.prefixes(seq)
        for p in range(seq.num_computed_tokens, seq.num_computed_tokens + num_tokens):
            block = seq.block_table[p // size]
            assert self.manager.num_users[block] == 1, f"write to shared block {block}"
            assert block not in self.manager.contents, f"write to published block {block}"
            self.slots[block, p % size] = identities[p]

    def read(self, seq: Sequence, end: int) -> None:
        """The first `end` positions of `seq` must hold the K and V of its own tokens."""
        size, identities = self.manager.block_size, self.prefixes(seq)
        for p in range(end):
            slot = (seq.block_table[p // size], p % size)
            assert self.slots.get(slot) == identities[p], f"position {p} holds another prefix"
