# SPDX-License-Identifier: Apache-2.0
"""Key/value caches behind one `attend`: the model does not know which one it writes to."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from gptneox.backends.base import Backend, ForwardBatch, check_shape


class KVCache(Protocol):
    """What the model asks of a cache."""

    def attend(self, layer_id: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k, v [T, H, D] and return the attention of q [T, H, D] over all visible tokens."""
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

    def attend(self, layer_id: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [T, H, D] of the current batch; returns [T, H, D]."""
        batch = self.batch
        assert batch is not None, "attend without a batch"
        check_shape(q, (None, self.num_heads, self.head_dim), "q")
        k_cache, v_cache = self.layers[layer_id]
        self.backend.store_kv(k, v, k_cache, v_cache, batch.slot_mapping)
        n = batch.num_decodes
        if n == len(batch.q_lens_list):
            return self.backend.decode_attention(q, k_cache, v_cache, batch, self.scale)
        prefilled = self.backend.prefill_attention(q[n:], k_cache, v_cache, batch, self.scale)
        if n == 0:
            return prefilled
        decoded = self.backend.decode_attention(q[:n], k_cache, v_cache, batch, self.scale)
        return torch.cat([decoded, prefilled])
