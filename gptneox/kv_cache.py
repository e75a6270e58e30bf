# SPDX-License-Identifier: Apache-2.0
"""The key/value caches of a model, and how a step over one begins."""

from __future__ import annotations

from torch import Tensor

from gptneox.devices.cache import CacheShape, KVFormat, LayerCache
from gptneox.devices.operators import Operators
from gptneox.devices.step import ForwardBatch, PaddedBatch, RotaryTables, Step


class PagedKVCache:
    """K and V of every layer in blocks of P tokens; the block manager knows who owns which."""

    def __init__(
        self,
        ops: Operators,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_heads: int,
        head_dim: int,
        kv_format: KVFormat,
    ) -> None:
        self.ops = ops
        self.block_size, self.num_blocks = block_size, num_blocks
        self.scale = head_dim**-0.5
        shape = CacheShape(num_blocks, block_size, num_heads, head_dim)
        self.layers = [ops.allocate_kv_cache(shape, kv_format) for _ in range(num_layers)]

    def begin(self, batch: ForwardBatch, tables: RotaryTables) -> Step:
        """A step that computes `batch`, which names the slots to write and the blocks to read."""
        return self.ops.begin(batch, self.layers, tables, self.scale)


class ContiguousKVCache:
    """K and V of every layer for a padded batch, as Hugging Face's `generate` works with it.

    The memory grows by doubling, so most decode steps copy nothing. `begin` starts a step;
    `advance` ends it.
    """

    def __init__(
        self,
        ops: Operators,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        kv_format: KVFormat,
        max_positions: int,
    ) -> None:
        self.ops, self.kv_format, self.max_positions = ops, kv_format, max_positions
        self.num_layers, self.num_heads, self.head_dim = num_layers, num_heads, head_dim
        self.scale = head_dim**-0.5
        self.length = 0  # cached positions, padding included
        self.batch_size = self._capacity = 0
        self.layers: list[LayerCache] = []

    def begin(
        self,
        input_ids: Tensor,
        positions: Tensor,
        key_mask: Tensor | None,
        tables: RotaryTables,
    ) -> Step:
        """A step that appends `input_ids`; makes room for it.

        Args:
            input_ids: [B, S]; B is the same until the cache is empty again.
            positions: [B, S], a token's number among the unpadded ones of its row.
            key_mask: bool [B, length + S], False at padding; None when nothing is padded.
            tables: cos and sin of every position.

        Raises:
            ValueError: another batch size, or more positions than the model has.
        """
        num_rows, num_new = input_ids.shape
        if self.length and num_rows != self.batch_size:
            raise ValueError(
                f"the cache holds {self.batch_size} rows, the input has {num_rows}; "
                "start with a new cache"
            )
        end = self.length + num_new
        if end > self.max_positions:
            raise ValueError(
                f"{end} positions are needed, the model has {self.max_positions}; shorten the "
                "prompt or max_new_tokens"
            )
        self.batch_size = num_rows
        if end > self._capacity or self.length == 0:
            self._grow(min(self.max_positions, max(end, 2 * self._capacity)))
        batch = PaddedBatch(
            input_ids=input_ids.flatten(),
            positions=positions.flatten(),
            num_rows=num_rows,
            num_new=num_new,
            end=end,
            key_mask=key_mask,
        )
        return self.ops.begin_padded(batch, self.layers, tables, self.scale)

    def _grow(self, capacity: int) -> None:
        """Allocate `capacity` positions for each row, and copy what is cached."""
        shape = CacheShape(self.batch_size, capacity, self.num_heads, self.head_dim)
        if not self.length:
            self.layers = []  # frees them before others are made
            self.layers = [
                self.ops.allocate_rows(shape, self.kv_format) for _ in range(self.num_layers)
            ]
        else:
            for i, old in enumerate(self.layers):  # one at a time: the others' memory is free again
                self.layers[i] = self.ops.allocate_rows(shape, self.kv_format)
                for target, source in zip(self.layers[i], old, strict=True):
                    target[:, : self.length] = source[:, : self.length]
        self._capacity = capacity

    def advance(self, num_new: int) -> None:
        """Count `num_new` further positions as cached, after every layer has attended."""
        self.length += num_new

    def select_rows(self, rows: Tensor) -> None:
        """Keep, repeat or reorder rows of the batch; rows [B'] are indices (beam search)."""
        self.batch_size = len(rows)
        self.layers = [
            type(layer)(*(tensor.index_select(0, rows) for tensor in layer))
            for layer in self.layers
        ]

    def truncate(self, length: int) -> None:
        """Forget positions from `length` on."""
        self.length = min(length, self.length)
