# SPDX-License-Identifier: Apache-2.0
"""The key/value cache of one layer: its shape, the formats it is stored in, its tensors.

A format is what decides how large a cached token is. A device decides how the tensors lie in
memory (`Operators.allocate_kv_cache`), and its steps read and write them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class CacheShape(NamedTuple):
    """Tokens and heads of one layer's cache: N blocks of P tokens, or B rows of P positions."""

    num_blocks: int
    block_size: int
    num_heads: int
    head_dim: int


class LayerCache(NamedTuple):
    """Keys and values of one layer, each [N, P, H, D] unless the device lays them out otherwise.

    Whoever copies or reorders a cache handles all tensors of the tuple alike, by their leading
    dimensions; a format with further tensors has a tuple of its own.
    """

    k: Tensor
    v: Tensor


class KVFormat(ABC):
    """How keys and values are stored."""

    @abstractmethod
    def bytes_per_token(self, num_heads: int, head_dim: int) -> int:
        """Bytes of one token in one layer."""

    def layer_gib(self, shape: CacheShape) -> float:
        """GiB of one layer's cache, for messages."""
        num_tokens = shape.num_blocks * shape.block_size
        return num_tokens * self.bytes_per_token(shape.num_heads, shape.head_dim) / 2**30

    @abstractmethod
    def allocate(
        self, shape: CacheShape, empty: Callable[[tuple[int, ...], torch.dtype], Tensor]
    ) -> LayerCache:
        """The tensors of one layer, each made by `empty` of its shape [N, P, H, …] and dtype."""


@dataclass(frozen=True)
class FloatKV(KVFormat):
    """Keys and values as they were computed, in a floating-point dtype."""

    dtype: torch.dtype

    def bytes_per_token(self, num_heads: int, head_dim: int) -> int:
        """K and V."""
        return 2 * num_heads * head_dim * self.dtype.itemsize

    def allocate(
        self, shape: CacheShape, empty: Callable[[tuple[int, ...], torch.dtype], Tensor]
    ) -> LayerCache:
        """K and V."""
        return LayerCache(empty(shape, self.dtype), empty(shape, self.dtype))
