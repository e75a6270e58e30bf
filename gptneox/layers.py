# SPDX-License-Identifier: Apache-2.0
"""Layers whose weights the device's operators pack, each as wide as this rank needs.

Layers are made on the meta device. The loader fills and packs them unit by unit, so a checkpoint
is never in memory twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gptneox.config.model import ModelConfig
from gptneox.devices.operators import LinearWeight, Operators, PackedLinear, check_shape
from gptneox.devices.step import RotaryTables
from gptneox.parallel import TensorParallelGroup


class PackingUnit(nn.Module):
    """A module whose tensors are loaded together; `pack` follows as soon as they are there."""

    packs_whole = True  # False: the units within it are packed one by one

    def pack(self) -> None:
        """Hand the loaded tensors to the operators; here they are computed with as they are."""


class Linear(PackingUnit):
    """A linear layer, or this rank's part of one; `packed` holds the weight once it is loaded.

    Column-parallel layers hold rows of the weight (each rank computes part of the features),
    row-parallel layers hold columns (each rank computes a partial sum of all features). A partial
    sum takes its bias on one rank only: the sum has it once.

    `weight` and `bias` stay on the meta device: they say what a checkpoint must hold.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, ops: Operators) -> None:
        super().__init__()
        self.in_features, self.out_features, self.ops = in_features, out_features, ops
        self.weight = as_parameter(_meta(out_features, in_features))
        self.bias = as_parameter(_meta(out_features)) if bias else None
        self._loaded: tuple[LinearWeight, Tensor | None] | None = None
        self.packed: PackedLinear | None = None

    def load(self, weight: LinearWeight, bias: Tensor | None) -> None:
        """Keep weight and bias [F] until they are packed, by this layer or with others."""
        self._loaded = weight, bias

    def unload(self) -> tuple[LinearWeight, Tensor | None]:
        """The loaded weight and bias, which the layer no longer keeps."""
        assert self._loaded is not None, "pack before the weight was loaded"
        loaded, self._loaded = self._loaded, None
        return loaded

    def pack(self) -> None:
        """See `PackingUnit`."""
        weight, bias = self.unload()
        self.packed = weight.pack(self.ops, bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in_features]; returns [T, out_features]."""
        assert self.packed is not None, "forward before the weights were loaded"
        return self.packed.multiply(self.ops, x)


class LayerNorm(PackingUnit):
    """Layer normalisation over the last dimension."""

    def __init__(self, width: int, eps: float, ops: Operators) -> None:
        super().__init__()
        self.eps, self.ops = eps, ops
        self.weight, self.bias = as_parameter(_meta(width)), as_parameter(_meta(width))

    def forward(self, x: Tensor) -> Tensor:
        """x [T, C]; returns [T, C]."""
        return self.ops.layer_norm(x, self.weight, self.bias, self.eps)


class Embedding(PackingUnit):
    """Token embedding, whole on every rank."""

    def __init__(self, num_rows: int, width: int, ops: Operators) -> None:
        super().__init__()
        self.ops = ops
        self.weight = as_parameter(_meta(num_rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        """ids [T]; returns [T, C]."""
        return self.ops.embedding(ids, self.weight)


def packing_units(module: nn.Module, name: str = "") -> Iterator[tuple[str, PackingUnit]]:
    """The outermost units of a module, with their names."""
    if isinstance(module, PackingUnit) and module.packs_whole:
        yield name, module
        return
    for key, child in module.named_children():
        yield from packing_units(child, f"{name}.{key}" if name else key)


def rotary_tables(config: ModelConfig, num_positions: int, ops: Operators) -> RotaryTables:
    """cos and sin of every position, computed in fp64 and kept in fp32.

    Half-precision tables are wrong by up to 0.8 at late positions, so their dtype never follows
    the weights'. Source: RoFormer, arXiv:2104.09864; rotary share and half pairing as GPT-NeoX.
    """
    r = config.rotary_dim
    exponents = torch.arange(0, r, 2, dtype=torch.float64, device="cpu") / r
    frequencies = config.rope_theta**-exponents / config.rope_factor  # [R/2]
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float64), frequencies)
    fused = ops.fuses_layers and config.use_parallel_residual
    return ops.pack_rotary(angles.cos().float(), angles.sin().float(), config.head_dim, fused=fused)


class VocabParallelHead(Linear):
    """The output head; each rank computes the logits of its rows of a padded vocabulary."""

    def __init__(
        self, vocab_size: int, width: int, ops: Operators, group: TensorParallelGroup
    ) -> None:
        rows_per_rank = math.ceil(vocab_size / group.world_size)
        super().__init__(width, rows_per_rank, bias=False, ops=ops)
        self.vocab_size, self.group = vocab_size, group

    def forward(self, x: Tensor) -> Tensor:
        """x [T, C]; returns logits [T, V] on every rank, V the unpadded vocabulary."""
        check_shape(x, (None, self.in_features), "hidden")
        return self.group.all_gather_columns(super().forward(x))[:, : self.vocab_size]


def as_parameter(value: Tensor) -> nn.Parameter:
    """A parameter that is not trained."""
    return nn.Parameter(value, requires_grad=False)


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")
