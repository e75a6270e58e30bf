# SPDX-License-Identifier: Apache-2.0
"""The key/value cache of one layer: its shape, the formats it is stored in, its tensors.

A format is what decides how large a cached token is. A device decides how the tensors lie in
memory (`Operators.allocate_kv_cache`), and its steps read and write them.

Whoever copies, reorders or grows a cache handles all tensors of the tuple alike, by their leading
dimensions [N, P]: the scales of a quantized token move with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor


class CacheShape(NamedTuple):
    """Tokens and heads of one layer's cache: N blocks of P tokens, or B rows of P positions."""

    num_blocks: int
    block_size: int
    num_heads: int
    head_dim: int


class FloatCache(NamedTuple):
    """Keys and values of one layer, each [N, P, H, D] unless the device lays them out otherwise."""

    k: Tensor
    v: Tensor

    def write(self, where: Any, k: Tensor, v: Tensor) -> None:
        """Store k and v [..., H, D] at the tokens `where`, an index of the dimensions [N, P]."""
        self.k[where] = k
        self.v[where] = v

    def read(self, where: Any) -> tuple[Tensor, Tensor]:
        """The keys and values [..., H, D] of the tokens `where`, in the cache's dtype."""
        return self.k[where], self.v[where]


class Int8Cache(NamedTuple):
    """Keys and values of one layer in int8, with a scale for each token and head."""

    k: Tensor  # [N, P, H, D] int8
    v: Tensor
    k_scale: Tensor  # [N, P, H] fp32
    v_scale: Tensor

    def write(self, where: Any, k: Tensor, v: Tensor) -> None:
        """As `FloatCache.write`; k and v are rounded by `quantize`."""
        self.k[where], self.k_scale[where] = quantize(k)
        self.v[where], self.v_scale[where] = quantize(v)

    def read(self, where: Any) -> tuple[Tensor, Tensor]:
        """As `FloatCache.read`, in fp32."""
        return (
            dequantize(self.k[where], self.k_scale[where]),
            dequantize(self.v[where], self.v_scale[where]),
        )


LayerCache: TypeAlias = FloatCache | Int8Cache

INT8_MAX = 127  # -128 is left out, so that a value and its negative are rounded alike
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale per row: x [..., D] to int8 [..., D] and fp32 [...].

    scale = max|x| / 127 and q = x / scale, rounded to the nearest, halves to even, all in fp32; so
    |x - q scale| is at most scale / 2, but for the rounding of fp32. A row of zeros, or so small
    that its scale would not be a normal number, becomes zeros with scale 1. A NaN or an infinity
    makes the scale NaN or infinite, so that whoever reads the row gets NaN.
    """
    wide = x.float()
    scale = wide.abs().amax(-1) / INT8_MAX
    scale = torch.where(scale < SMALLEST_SCALE, 1.0, scale)
    q = (wide / scale.unsqueeze(-1)).round_()
    return torch.nan_to_num_(q, 0.0).clamp_(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """q [..., D] int8 times scale [...]: fp32 [..., D]."""
    return q.float() * scale.unsqueeze(-1)


Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]


@dataclass(frozen=True)
class KVFormat(ABC):
    """How keys and values are stored."""

    dtype: torch.dtype  # that keys and values are computed in

    @property
    @abstractmethod
    def name(self) -> str:
        """The number format of keys and values, for messages."""

    @abstractmethod
    def bytes_per_token(self, num_heads: int, head_dim: int) -> int:
        """Bytes of one token in one layer."""

    def layer_gib(self, shape: CacheShape) -> float:
        """GiB of one layer's cache, for messages."""
        num_tokens = shape.num_blocks * shape.block_size
        return num_tokens * self.bytes_per_token(shape.num_heads, shape.head_dim) / 2**30

    @abstractmethod
    def allocate(self, shape: CacheShape, empty: Empty) -> LayerCache:
        """The tensors of one layer, each made by `empty` of its shape [N, P, H, …] and dtype."""


@dataclass(frozen=True)
class FloatKV(KVFormat):
    """Keys and values as they were computed."""

    @property
    def name(self) -> str:
        """The dtype."""
        return str(self.dtype).removeprefix("torch.")

    def bytes_per_token(self, num_heads: int, head_dim: int) -> int:
        """K and V."""
        return 2 * num_heads * head_dim * self.dtype.itemsize

    def allocate(self, shape: CacheShape, empty: Empty) -> FloatCache:
        """K and V."""
        return FloatCache(empty(shape, self.dtype), empty(shape, self.dtype))


@dataclass(frozen=True)
class Int8KV(KVFormat):
    """Keys and values in int8, each row of D with a scale in fp32; see `quantize`."""

    @property
    def name(self) -> str:
        """As it is asked for."""
        return "int8"

    def bytes_per_token(self, num_heads: int, head_dim: int) -> int:
        """K and V with their scales."""
        return 2 * num_heads * (head_dim + torch.float32.itemsize)

    def allocate(self, shape: CacheShape, empty: Empty) -> Int8Cache:
        """K and V, then their scales."""
        k, v = empty(shape, torch.int8), empty(shape, torch.int8)
        scales = shape[:3]
        return Int8Cache(k, v, empty(scales, torch.float32), empty(scales, torch.float32))


# What [engine] kv_cache_dtype may name.
KV_FORMATS: dict[str, type[KVFormat]] = {"auto": FloatKV, "int8": Int8KV}
