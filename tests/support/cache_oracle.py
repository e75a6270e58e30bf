# SPDX-License-Identifier: Apache-2.0
"""A model of the KV cache that detects a slot with the K and V of another prefix."""

from __future__ import annotations

import torch
from torch import Tensor

from gptneox.devices.cache import CacheShape, Int8KV
from gptneox.engine.block_manager import BlockManager
from gptneox.engine.sequence import Sequence


class StoredTokens:
    """Real keys and values in one layer of an int8 cache, whose scales must stay with them.

    Those of a prefix are drawn from its id, and their size grows with it, so that the values of one
    prefix under the scales of another are far off. What was never written is NaN.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        def empty(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.full(size, 99 if dtype == torch.int8 else torch.nan, dtype=dtype)

        shape = CacheShape(num_blocks, block_size, 2, 4)
        self.layer = Int8KV(torch.float32).allocate(shape, empty)
        self._contents: dict[int, Tensor] = {}

    def content(self, identity: int) -> Tensor:
        """Key and value [2, H, D] of a prefix."""
        if identity not in self._contents:
            generator = torch.Generator().manual_seed(identity)
            self._contents[identity] = 1.5**identity * torch.randn(2, 2, 4, generator=generator)
        return self._contents[identity]

    def write(self, slot: tuple[int, int], identity: int) -> None:
        self.layer.write(slot, *self.content(identity))

    def check(self, slots: list[tuple[int, int]], identities: list[int]) -> None:
        """All slots at once, to half a step of their own scales."""
        if not slots:
            return
        where = tuple(torch.tensor(slots).T)
        contents = torch.stack([self.content(i) for i in identities], 1)  # [2, T, H, D]
        scales = (self.layer.k_scale[where], self.layer.v_scale[where])
        for found, content, scale in zip(self.layer.read(where), contents, scales, strict=True):
            expected = content.abs().amax(-1) / 127
            torch.testing.assert_close(scale, expected, rtol=1e-6, atol=0)
            error = (found - content).abs()
            assert (error <= 0.501 * scale.unsqueeze(-1)).all(), "values of another prefix"


class CacheOracle:
    """Tracks the content of each slot of a KV cache.

    K and V at a position depend on all tokens up to it, so a slot's content is modelled as the id
    of that prefix. A wrongly shared block, a stale block or a lost write shows as a wrong id.
    `stored` holds real tokens besides.
    """

    def __init__(self, manager: BlockManager, stored: StoredTokens | None = None) -> None:
        self.manager, self.stored = manager, stored
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
            if self.stored:
                self.stored.write((block, p % size), identities[p])

    def read(self, seq: Sequence, end: int) -> None:
        """The first `end` positions of `seq` must hold the K and V of its own tokens."""
        size, identities = self.manager.block_size, self.prefixes(seq)
        slots = [(seq.block_table[p // size], p % size) for p in range(end)]
        for p, slot in enumerate(slots):
            assert self.slots.get(slot) == identities[p], f"position {p} holds another prefix"
        if self.stored:
            self.stored.check(slots, identities[:end])
