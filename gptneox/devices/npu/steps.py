# SPDX-License-Identifier: Apache-2.0
"""Steps on an Ascend NPU: the rotation is looked up once, attention plans once."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptneox.devices.cache import LayerCache
from gptneox.devices.npu.attention import PlainAttention
from gptneox.devices.step import PaddedStep, PagedStep, Step

if TYPE_CHECKING:
    from gptneox.devices.npu.operators import NpuOperators


class _NpuStep(Step):
    """What both kinds of step compute once: the operators, and cos and sin of the positions."""

    ops: NpuOperators
    _angles: tuple[Tensor, Tensor] | None = None

    @functools.cached_property
    def attention(self) -> PlainAttention:
        """See `NpuOperators.attention_for`."""
        return self.ops.attention_for(self.caches[0].k.shape[-1])

    def angles(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin in the form that the chip rotates by; see `NpuOperators.look_up`."""
        if self._angles is None:  # every layer has the same dtype
            self._angles = self.ops.look_up(self.positions, self.tables, dtype)
        return self._angles

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k together."""
        rotated = self.ops.rotate(torch.stack((q, k)), self.angles(q.dtype))
        return rotated[0], rotated[1]


class NpuPagedStep(_NpuStep, PagedStep):
    """A step by the operators that the cache was allocated for."""

    @functools.cached_property
    def plan(self) -> Any:
        """What the layers share: see `make_plan` of each attention."""
        return self.attention.make_plan(self.batch)

    @functools.cached_property
    def scale_slots(self) -> Tensor:
        """Where the scales of the step's tokens lie in [N, H, P], as scatter indices [T * H, 1]."""
        _, size, heads, _ = self.caches[0].k.shape
        slots = self.batch.slot_mapping[:, None]
        head = torch.arange(heads, device=slots.device)
        return ((slots // size * heads + head) * size + slots % size).view(-1, 1)

    def attend(self, layer_id: int, qkv: Tensor) -> Tensor:
        """One copy puts q, k and v behind one another: the operators take them as they are."""
        blocks = qkv.permute(2, 0, 1, 3).contiguous()  # [3, T, H, D]
        q, k = self.ops.rotate(blocks[:2], self.angles(qkv.dtype))
        return self.attend_rotated(self.caches[layer_id], q, k, blocks[2])

    def store(self, layer: LayerCache, k: Tensor, v: Tensor) -> None:
        """See `PagedStep`."""
        self.attention.store(self, layer, k, v)

    def decode(self, layer: LayerCache, q: Tensor) -> Tensor:
        """See `PagedStep`."""
        return self.attention.decode(self, layer, q)

    def prefill(self, layer: LayerCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `PagedStep`."""
        return self.attention.prefill(self, layer, q, k, v)


class NpuPaddedStep(_NpuStep, PaddedStep):
    """A step of the flash path by the operators for the head size."""

    @functools.cached_property
    def mask(self) -> Any:
        """What the layers share: see `make_mask` of each attention."""
        return self.attention.make_mask(self.batch, self.caches[0].k.shape[1])

    def attend_cached(self, layer: LayerCache, q: Tensor) -> Tensor:
        """See `PaddedStep`."""
        return self.attention.dense(self, layer, q)
