# SPDX-License-Identifier: Apache-2.0
"""Weights of four bits with a scale and a zero for each group of inputs, and files that hold them.

Tools pack the integers in different ways. The format of a tool unpacks them, and lives with the
tool's reader; what is common to all is here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gptneox.devices.operators import LinearWeight, Operators, PackedAdjusted, PackedLinear
from gptneox.weights.formats import INPUTS, FloatWeight, Int8Weight, WeightFormat

# The compiled CPU kernels unroll their loops within a group.
GROUP_MULTIPLE = 16
_CHUNK = 1 << 20  # values that are widened at a time: larger pieces are new memory each time


# -- integers in words ---------------------------------------------------------------------------


def unpack(words: Tensor, bits: int, dim: int) -> Tensor:
    """The integers from 0 to 2^bits - 1 in `words`, the lowest bits first along `dim`; uint8."""
    count = words.element_size() * 8 // bits
    shape = [1] * (words.dim() + 1)
    shape[dim + 1] = count
    shifts = torch.arange(0, count * bits, bits, dtype=words.dtype).view(shape)
    spread = (words.unsqueeze(dim + 1) >> shifts.to(words.device)) & ((1 << bits) - 1)
    return spread.to(torch.uint8).flatten(dim, dim + 1)


def pack(values: Tensor, bits: int, dim: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Words of `dtype` whose `unpack` is `values`, which fill whole words along `dim`."""
    count = dtype.itemsize * 8 // bits
    chosen = (slice(None),) * dim
    wide = dtype if dtype == torch.uint8 else torch.int64
    words = torch.zeros_like(values[(*chosen, slice(0, None, count))], dtype=wide)
    for i in range(count):
        words |= values[(*chosen, slice(i, None, count))].to(wide) << (bits * i)
    if wide == dtype:
        return words
    limit = 1 << (dtype.itemsize * 8)
    return torch.where(words >= limit // 2, words - limit, words).to(dtype)


def dequantize_groups(values: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """scale * (values - zero), rounded once to `dtype`.

    Args:
        values: integers [F, K].
        scale: [F, G], of which each belongs to K / G inputs; of 16 or 32 bits.
        zero: integers [F, G].
        dtype: of the result [F, K].
    """
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    step = max(1, _CHUNK // max(1, values.shape[1]))
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        part = values[rows]
        wide = part.float().view(len(part), scale.shape[1], -1)
        wide -= zero[rows].float().unsqueeze(2)
        wide *= scale[rows].float().unsqueeze(2)
        out[rows] = wide.flatten(1).to(dtype)
    return out


def order_of_groups(groups: Tensor, num_groups: int) -> Tensor | None:
    """The inputs sorted by the groups that `groups` [K] puts them into; None where they are.

    Raises:
        ValueError: groups differ in size.
    """
    size = len(groups) // num_groups
    ascending = torch.arange(num_groups).repeat_interleave(size)
    if torch.equal(groups.long(), ascending):
        return None
    order = torch.argsort(groups, stable=True)
    if not torch.equal(groups[order].long(), ascending):
        raise ValueError(f"g_idx does not put {size} inputs into each of {num_groups} groups")
    return order


# -- loaded weights ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Int4Weight(LinearWeight):
    """A weight of four bits: scale[f, g] * (value[f, k] - zero[f, g]), g the group of k."""

    values: Tensor  # uint8 [F, K / 2], 0 to 15, the even k in the low half of a byte
    scale: Tensor  # fp32 [F, G]
    zero: Tensor  # uint8 [F, G], 0 to 15
    dtype: torch.dtype  # that the model computes in

    @property
    def out_features(self) -> int:
        """F."""
        return self.values.shape[0]

    def pack(self, ops: Operators, bias: Tensor | None) -> PackedLinear:
        """By `Operators.pack_int4`."""
        return ops.pack_int4(self.values, self.scale, self.zero, bias, self.dtype)

    def take_rows(self, order: Tensor) -> Int4Weight:
        """The rows `order` [F'] with their scales and zeros."""
        rows = [t.index_select(0, order) for t in (self.values, self.scale, self.zero)]
        return Int4Weight(rows[0], rows[1], rows[2], self.dtype)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [F, K], rounded once."""
        return dequantize_groups(unpack(self.values, 4, 1), self.scale, self.zero, dtype)


@dataclass(frozen=True)
class AdjustedWeight(LinearWeight):
    """A weight whose inputs are put in another order, or divided, before the product."""

    adjusts_inputs = True

    weight: LinearWeight
    order: Tensor | None = None  # [K], the input that each column multiplies
    divisor: Tensor | None = None  # [K], of the inputs as they come

    @property
    def out_features(self) -> int:
        """F."""
        return self.weight.out_features

    def pack(self, ops: Operators, bias: Tensor | None) -> PackedLinear:
        """The weight itself in its own layout."""
        inner = self.weight.pack(ops, bias)
        sizes = inner.in_features, inner.out_features
        return PackedAdjusted(inner, None, *sizes, order=self.order, divisor=self.divisor)

    def take_rows(self, order: Tensor) -> AdjustedWeight:
        """The rows `order` [F']; of all the inputs are the same."""
        return AdjustedWeight(self.weight.take_rows(order), self.order, self.divisor)


# -- files ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Integers:
    """A weight as a file tells it: scale[f, g] * (values[f, k] - zero[f, g])."""

    values: Tensor  # uint8 [F, K]
    scale: Tensor  # float [F, G]
    zero: Tensor  # integers [F, G]
    order: Tensor | None = None  # see `AdjustedWeight`
    divisor: Tensor | None = None


class GroupFormat(WeightFormat):
    """Integers of four or eight bits with a scale for each group of inputs.

    Eight bits are computed with as `Int8Rows` where they are the same thing, and else as floats.
    """

    outputs_per_word: int = 1  # of the tensors that pack outputs

    def __init__(self, bits: int, group_size: int, *, has_order: bool = False) -> None:
        """Take what the settings say.

        Args:
            bits: 4 or 8.
            group_size: inputs that share a scale; 0: all of a row.
            has_order: inputs are not grouped in their order.
        """
        self.bits, self.group_size, self.has_order = bits, group_size, has_order
        self.scheme = f"w{bits}a16"

    @property
    def is_widened(self) -> bool:
        """Whether it is computed with as floats."""
        return self.bits == 8 and self.group_size > 0

    def num_groups(self, num_inputs: int) -> int:
        """G.

        Raises:
            ValueError: groups do not divide the inputs, or words do not hold them.
        """
        if num_inputs % 8:
            raise ValueError(f"{num_inputs} inputs; a multiple of 8 is expected")
        if not self.group_size:
            return 1
        if num_inputs % self.group_size or self.group_size % GROUP_MULTIPLE:
            raise ValueError(
                f"groups of {self.group_size} for {num_inputs} inputs are not served; the group "
                f"size must divide the inputs and be a multiple of {GROUP_MULTIPLE}"
            )
        return num_inputs // self.group_size

    def num_bytes(self, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> int:
        """A half byte for each value, a scale of fp32 and a zero for each group."""
        if self.is_widened:
            return num_outputs * num_inputs * dtype.itemsize
        if self.bits == 8:
            return num_outputs * (num_inputs + 4)
        groups = num_inputs // self.group_size if self.group_size else 1
        return num_outputs * (num_inputs // 2 + 5 * groups)

    def why_not_cut(self, axis: int, num_outputs: int, num_inputs: int, world_size: int) -> str:
        """See `WeightFormat`."""
        if axis != INPUTS:
            size = num_outputs / world_size
            if self.outputs_per_word > 1 and size % self.outputs_per_word:
                return (
                    f"its {num_outputs} outputs are packed {self.outputs_per_word} to a word, and "
                    f"{size:g} fall to each rank"
                )
            return ""
        if self.has_order:
            return "its inputs are not grouped in their order (desc_act)"
        size = num_inputs / world_size
        if size % max(8, self.group_size):
            return f"its inputs are in groups of {self.group_size}, and {size:g} fall to each rank"
        return ""

    @abstractmethod
    def integers(self, stored: Mapping[str, Tensor]) -> Integers:
        """Unpack the stored tensors.

        Raises:
            ValueError: a value cannot be computed with; the message names the tensor's suffix.
        """

    def load(
        self, stored: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> LinearWeight:
        """See `WeightFormat`."""
        found = self.integers(stored)
        if not torch.isfinite(found.scale).all():
            raise ValueError("a scale is not finite")
        if found.zero.min() < 0 or found.zero.max() >= 1 << self.bits:
            raise ValueError(f"a zero point lies outside the range of {self.bits} bits")
        weight = self._weight(found, device, dtype)
        if found.order is None and found.divisor is None:
            return weight
        order = None if found.order is None else found.order.to(device)
        divisor = None if found.divisor is None else found.divisor.to(device, dtype, copy=True)
        return AdjustedWeight(weight, order, divisor)

    def _weight(self, found: Integers, device: torch.device, dtype: torch.dtype) -> LinearWeight:
        scale = found.scale.float().contiguous().to(device)
        if self.bits == 4:
            pairs = pack(found.values, 4, 1, torch.uint8).to(device)
            return Int4Weight(pairs, scale, found.zero.to(device, torch.uint8), dtype)
        if scale.shape[1] == 1 and bool((found.zero == 128).all()):
            values = (found.values.to(torch.int16) - 128).to(torch.int8)
            return Int8Weight(values.to(device), scale.view(-1), dtype)
        wide = dequantize_groups(found.values, found.scale, found.zero, dtype)
        return FloatWeight(wide.to(device))
