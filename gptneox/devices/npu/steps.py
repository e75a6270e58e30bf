# SPDX-License-Identifier: Apache-2.0
"""Steps on an Ascend NPU: the rotation is looked up once, attention plans once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptneox.devices.npu.attention import PlainAttention
from gptneox.devices.step import (
    ForwardBatch,
    LayerCache,
    PaddedBatch,
    PaddedStep,
    PagedStep,
    RotaryTables,
    Step,
)

if TYPE_CHECKING:
    from gptneox.devices.npu.operators import NpuOperators


class _Rotation(Step):
    """cos and sin of the step's positions, in the form that the chip rotates by."""

    ops: NpuOperators

    @functools.cached_property
    def angles(self) -> tuple[Tensor, Tensor]:
        """See `NpuOperators.look_up`."""
        return self.ops.look_up(self.positions, self.tables, self.layers[0][0].dtype)

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k together."""
        rotated = self.ops.rotate(torch.stack((q, k)), self.angles)
        return rotated[0], rotated[1]


class NpuPagedStep(_Rotation, PagedStep):
    """A step by the operators of `attention`."""

    def __init__(
        self,
        ops: NpuOperators,
        attention: PlainAttention,
        batch: ForwardBatch,
        layers: Sequence[LayerCache],
        tables: RotaryTables,
        scale: float,
    ) -> None:
        super().__init__(ops, batch, layers, tables, scale)
        self.attention = attention

    @functools.cached_property
    def plan(self) -> Any:
        """What the layers share: see `make_plan` of each attention."""
        return self.attention.make_plan(self.batch)

    def attend(self, layer_id: int, qkv: Tensor) -> Tensor:
        """One copy puts q, k and v behind one another: the operators take them as they are."""
        blocks = qkv.permute(2, 0, 1, 3).contiguous()  # [3, T, H, D]
        q, k = self.ops.rotate(blocks[:2], self.angles)
        return self.attend_rotated(self.layers[layer_id], q, k, blocks[2])

    def store(self, layer: LayerCache, k: Tensor, v: Tensor) -> None:
        """See `PagedStep`."""
        self.attention.store(self, layer, k, v)

    def decode(self, layer: LayerCache, q: Tensor) -> Tensor:
        """See `PagedStep`."""
        return self.attention.decode(self, layer, q)

    def prefill(self, layer: LayerCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `PagedStep`."""
        return self.attention.prefill(self, layer, q, k, v)


class NpuPaddedStep(_Rotation, PaddedStep):
    """A step of the flash path by the operators of `attention`."""

    def __init__(
        self,
        ops: NpuOperators,
        attention: PlainAttention,
        batch: PaddedBatch,
        layers: Sequence[LayerCache],
        tables: RotaryTables,
        scale: float,
    ) -> None:
        super().__init__(ops, batch, layers, tables, scale)
        self.attention = attention

    @functools.cached_property
    def mask(self) -> Any:
        """What the layers share: see `make_mask` of each attention."""
        return self.attention.make_mask(self.batch, self.layers[0][0].shape[1])

    def attend_cached(self, layer: LayerCache, q: Tensor) -> Tensor:
        """See `PaddedStep`."""
        return self.attention.dense(self, layer, q)
