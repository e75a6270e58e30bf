# SPDX-License-Identifier: Apache-2.0
"""Key/value caches behind one `attend`: the model does not know which one it writes to."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from gptneox.backends.base import Backend, ForwardBatch, PackedLayer, check_shape


class KVCache(Protocol):
    """What the model asks of a cache."""

    def attend(self, layer_id: int, qkv: Tensor, rotary: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Write the keys and values of qkv [T, H, 3, D], return its attention [T, H, D].

        Queries and keys are rotated first, by (positions [T], cos, sin); see `Backend.rotary`.
        """
        ...

    def run_layers(
        self, x: Tensor, layers: list[PackedLayer], rotary: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor | None:
        """The result [T, C] of all `layers` on x [T, C], in one call; None: take them one by one.

        They are all of the model's, and this rank holds them whole.
        """
        ...


class PagedKVCache:
    """K and V of every layer in blocks of P tokens; who owns which block is not its business.

    The caller hands over the step's `batch` before the model runs; it holds the slots to write
    and the blocks to read.
    """

    def __init__(
        self,
        backend: Backend,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        self.backend = backend
        self.block_size, self.num_blocks = block_size, num_blocks
        self.num_heads, self.head_dim = num_heads, head_dim
        self.scale = head_dim**-0.5
        self.layers = [
            backend.allocate_kv_cache(num_blocks, block_size, num_heads, head_dim, dtype)
            for _ in range(num_layers)
        ]
        self.batch: ForwardBatch | None = None

    def attend(self, layer_id: int, qkv: Tensor, rotary: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """qkv [T, H, 3, D] of the current batch; returns [T, H, D]."""
        batch = self.batch
        assert batch is not None, "attend without a batch"
        check_shape(qkv, (None, self.num_heads, 3, self.head_dim), "qkv")
        k_cache, v_cache = self.layers[layer_id]
        return self.backend.rotary_paged_attention(qkv, rotary, k_cache, v_cache, batch, self.scale)

    def run_layers(
        self, x: Tensor, layers: list[PackedLayer], rotary: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """See `KVCache`."""
        assert self.batch is not None, "run_layers without a batch"
        return self.backend.run_layers(x, layers, rotary, self.layers, self.batch, self.scale)


class ContiguousKVCache:
    """K and V of every layer for a padded batch, as Hugging Face's `generate` works with it.

    Tensors are [B, capacity, H, D] and grow by doubling, so a decode step copies nothing. Where
    the backend `attends_padded`, each row is one block of a paged cache.
    `prepare` opens a step, `attend` serves its layers, `advance` closes it.
    """

    def __init__(
        self,
        backend: Backend,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        max_positions: int,
    ) -> None:
        self.backend, self.dtype, self.max_positions = backend, dtype, max_positions
        self.num_heads, self.head_dim = num_heads, head_dim
        self.scale = head_dim**-0.5
        self.length = 0  # cached positions, padding included
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self.batch_size = self._num_new = self._capacity = 0
        self._key_mask: Tensor | None = None
        self._batch: ForwardBatch | None = None  # the step, where it can go the paged way

    def prepare(self, batch_size: int, num_new: int, key_mask: Tensor | None) -> None:
        """Make room for `num_new` positions.

        Args:
            batch_size: B, the same until `reset`.
            num_new: S of this step.
            key_mask: bool [B, length + S], False at padding; None when nothing is padded.

        Raises:
            ValueError: another batch size, or more positions than the model has.
        """
        if self.length and batch_size != self.batch_size:
            raise ValueError(
                f"the cache holds {self.batch_size} rows, the input has {batch_size}; "
                "start with a new cache"
            )
        end = self.length + num_new
        if end > self.max_positions:
            raise ValueError(
                f"{end} positions are needed, the model has {self.max_positions}; shorten the "
                "prompt or max_new_tokens"
            )
        self.batch_size, self._num_new, self._key_mask = batch_size, num_new, key_mask
        if end > self._capacity or self.length == 0:
            self._capacity = min(self.max_positions, max(end, 2 * self._capacity))
            self.layers = [self._grown(layer) for layer in self.layers]
        self._batch = self._as_paged(end) if self.backend.attends_padded else None

    def _as_paged(self, end: int) -> ForwardBatch | None:
        """The step as blocks of `capacity` tokens; None for padding that is not in front."""
        rows, new = self.batch_size, self._num_new
        starts = None
        if self._key_mask is not None:
            first = self._key_mask.to(torch.int32).argmax(1)
            if not torch.equal(self._key_mask.sum(1), end - first):
                return None
            starts = first.to(torch.int32)
        ids = torch.arange(rows, dtype=torch.int64)
        slots = ids[:, None] * self._capacity + torch.arange(self.length, end)
        return ForwardBatch(
            input_ids=ids[:0],  # the model has them, and the positions
            positions=ids[:0],
            slot_mapping=slots.flatten(),
            block_tables=ids.to(torch.int32)[:, None],
            cu_seqlens_q=torch.arange(rows + 1, dtype=torch.int32) * new,
            context_lens=torch.full((rows,), end, dtype=torch.int32),
            q_lens_list=[new] * rows,
            context_lens_list=[end] * rows,
            num_decodes=rows if new == 1 else 0,
            starts=starts,
        )

    def _grown(self, layer: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        shape = (self.batch_size, self._capacity, self.num_heads, self.head_dim)
        if self.backend.attends_padded:
            new = self.backend.allocate_kv_cache(*shape, self.dtype)
        else:
            k = torch.empty(shape, dtype=self.dtype, device=self.backend.device)
            new = k, torch.empty_like(k)
        if layer is not None and self.length:
            for target, source in zip(new, layer, strict=True):
                target[:, : self.length] = source[:, : self.length]
        return new

    def attend(self, layer_id: int, qkv: Tensor, rotary: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """qkv [B * S, H, 3, D]; returns [B * S, H, D]."""
        layer = self.layers[layer_id]
        assert layer is not None, "attend before prepare"
        if self._batch is not None:
            return self.backend.rotary_paged_attention(qkv, rotary, *layer, self._batch, self.scale)
        q, k, v = qkv.unbind(2)
        q, k = self.backend.rotary(q, k, *rotary)
        shape = (self.batch_size, self._num_new, self.num_heads, self.head_dim)
        end = self.length + self._num_new
        layer[0][:, self.length : end] = k.view(shape)
        layer[1][:, self.length : end] = v.view(shape)
        out = self.backend.cached_attention(
            q.view(shape), layer[0], layer[1], end, self._key_mask, self.scale
        )
        return out.reshape(q.shape)

    def run_layers(
        self, x: Tensor, layers: list[PackedLayer], rotary: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor | None:
        """See `KVCache`."""
        caches = [layer for layer in self.layers if layer is not None]
        if self._batch is None:
            return None
        return self.backend.run_layers(x, layers, rotary, caches, self._batch, self.scale)

    def advance(self) -> None:
        """Every layer has attended: the new positions are cached."""
        self.length += self._num_new

    def select_rows(self, rows: Tensor) -> None:
        """Keep, repeat or reorder rows of the batch; rows [B'] are indices (beam search)."""
        self.batch_size = len(rows)
        self.layers = [
            None if kv is None else (kv[0].index_select(0, rows), kv[1].index_select(0, rows))
            for kv in self.layers
        ]

    def truncate(self, length: int) -> None:
        """Forget positions from `length` on."""
        self.length = min(length, self.length)
