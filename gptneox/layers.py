# SPDX-License-Identifier: Apache-2.0
"""Layers whose weights the device's operators pack, and the tensor-parallel cut of each.

Every layer is made on the meta device, takes its tensors one by one and hands them to the
operators as soon as they are complete, so a checkpoint is never in memory twice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gptneox.config.model import ModelConfig
from gptneox.devices.operators import Operators, PackedLinear, check_shape
from gptneox.devices.step import RotaryTables
from gptneox.parallel import TensorParallelGroup


class Linear(nn.Module):
    """A linear layer, or this rank's part of one; `packed` holds the weight once it is loaded.

    Column-parallel layers hold rows of the weight (each rank computes part of the features),
    row-parallel layers hold columns (each rank computes a partial sum of all features). A partial
    sum takes its bias on one rank only, or 1/world_size of it on each: the sum has it once.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, ops: Operators) -> None:
        super().__init__()
        self.in_features, self.out_features, self.ops = in_features, out_features, ops
        self.weight = nn.Parameter(_meta(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(_meta(out_features), requires_grad=False) if bias else None
        self.packed: PackedLinear | None = None

    def pack(self) -> None:
        """Hand the loaded weight and bias to the operators and let go of them."""
        self.packed = self.ops.pack_linear(*self.take())

    def take(self) -> tuple[Tensor, Tensor | None]:
        """The loaded weight and bias, of which the layer lets go."""
        assert not self.weight.is_meta, "pack before the weight was loaded"
        weight, bias = self.weight.data, None if self.bias is None else self.bias.data
        self.weight = nn.Parameter(_meta(self.out_features, self.in_features), requires_grad=False)
        return weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in_features]; returns [T, out_features]."""
        assert self.packed is not None, "forward before the weights were loaded"
        return self.ops.linear(x, self.packed)


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension."""

    def __init__(self, width: int, eps: float, ops: Operators) -> None:
        super().__init__()
        self.eps, self.ops = eps, ops
        self.weight = nn.Parameter(_meta(width), requires_grad=False)
        self.bias = nn.Parameter(_meta(width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, C]; returns [T, C]."""
        return self.ops.layer_norm(x, self.weight, self.bias, self.eps)


class Embedding(nn.Module):
    """Token embedding, whole on every rank."""

    def __init__(self, num_rows: int, width: int, ops: Operators) -> None:
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(_meta(num_rows, width), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [T]; returns [T, C]."""
        return self.ops.embedding(ids, self.weight)


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


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")
