# SPDX-License-Identifier: Apache-2.0
"""Weights of four bits with a scale and a zero for each group of inputs, and files that hold them.

Tools pack the integers in different ways. The format of a tool unpacks them, and lives with the
tool's reader; what is common to all is here.
"""

from __future__ import annotations

import copy
import itertools
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptneox.devices.operators import LinearWeight, Notice, Operators, PackedAdjusted, PackedLinear
from gptneox.weights.formats import INPUTS, FloatWeight, Int8Weight, WeightFormat

# The compiled CPU kernels unroll their loops within a group.
GROUP_MULTIPLE = 16
# Groups of this multiple are fast on every device.
FAST_MULTIPLE = 32
# Of parts of the inputs; see `GroupFormat`.
FILLED_UP = "zeros that fill groups up, as ranks share groups of inputs"
HELD_AS_FLOATS = "floats, which take less than four bits here, as ranks share groups of inputs"
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


def dequantize_groups(
    values: Tensor,
    scale: Tensor,
    zero: Tensor,
    dtype: torch.dtype,
    groups: Tensor | None = None,
) -> Tensor:
    """scale * (values - zero), rounded once to `dtype`.

    Args:
        values: integers [F, K].
        scale: [F, G]; of 16 or 32 bits.
        zero: integers [F, G].
        dtype: of the result [F, K].
        groups: [K], the group of each input; None: K / G inputs each, in order.
    """
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    step = max(1, _CHUNK // max(1, values.shape[1]))
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        steps, zeros = scale[rows].float(), zero[rows].float()
        if groups is None:
            steps, zeros = steps.unsqueeze(2), zeros.unsqueeze(2)
            wide = values[rows].float().view(len(steps), scale.shape[1], -1)
        else:
            steps, zeros = steps[:, groups], zeros[:, groups]
            wide = values[rows].float()
        wide -= zeros
        wide *= steps
        out[rows] = wide.flatten(1).to(dtype)
    return out


# -- one rank's inputs ---------------------------------------------------------------------------


def lay_out(counts: Sequence[int], multiple: int) -> tuple[list[int], int]:
    """Equal groups for runs of inputs, each of which has a scale of its own.

    Args:
        counts: inputs of each run.
        multiple: of inputs that groups must have where there are several runs.

    Returns:
        The lengths that runs are filled up to, and the size of groups, which divides them all.
    """
    if len(counts) == 1:
        return [counts[0]], counts[0]
    lengths = [math.ceil(n / multiple) * multiple for n in counts]
    return lengths, math.gcd(*lengths)


def runs_of_part(part: int, size: int, group_size: int) -> list[int]:
    """How many inputs of each group are in [part * size, (part + 1) * size)."""
    ends = range((part * size // group_size + 1) * group_size, (part + 1) * size, group_size)
    bounds = [part * size, *ends, (part + 1) * size]
    return [end - start for start, end in itertools.pairwise(bounds)]


def fill_up(groups: Tensor, counts: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Inputs sorted by their groups, the last of a run repeated up to its length.

    What repeats an input has weights of zero, so of a token's largest inputs nothing changes.

    Args:
        groups: [K].
        counts: of the inputs of each group that there is.
        lengths: to fill up to; see `lay_out`.

    Returns:
        The inputs, int64, and which of them repeat another, bool; as long as all lengths.
    """
    runs = torch.argsort(groups, stable=True).split_with_sizes(list(counts))
    filled = [
        torch.cat((run, run[-1:].expand(length - len(run))))
        for run, length in zip(runs, lengths, strict=True)
    ]
    repeats = [torch.arange(length) >= n for n, length in zip(counts, lengths, strict=True)]
    return torch.cat(filled), torch.cat(repeats)


def row_bytes(lengths: Sequence[int], size: int) -> int:
    """Of a row of runs in groups of `size`: half a byte for a value, fp32 and a byte for each."""
    return sum(lengths) // 2 + 5 * (sum(lengths) // size)


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
    """A weight whose inputs are put in another order, or divided, before the product.

    Where `order` names an input more than once, its first column has the weight; the others are
    zeros, which fill a group up.
    """

    adjusts_inputs = True

    weight: LinearWeight
    order: Tensor | None = None  # the input that each column multiplies
    divisor: Tensor | None = None  # [K], of the inputs as they come
    notice: Notice | None = None

    @property
    def out_features(self) -> int:
        """F."""
        return self.weight.out_features

    def pack(self, ops: Operators, bias: Tensor | None) -> PackedLinear:
        """The weight itself in its own layout."""
        inner, columns = self.weight.pack(ops, bias), self.columns()
        num_inputs = inner.in_features if columns is None else len(columns)
        return PackedAdjusted(
            *(inner, None, num_inputs, inner.out_features), order=self.order, divisor=self.divisor
        )

    def columns(self) -> Tensor | None:
        """The column of each input [K]; None: they are in order."""
        if self.order is None:
            return None
        inputs, columns = self.order.sort(stable=True)
        is_first = torch.ones_like(inputs, dtype=torch.bool)
        is_first[1:] = inputs[1:] != inputs[:-1]
        return columns[is_first]

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
    groups: Tensor | None = None  # int64 [K], of each input; None: they are in order
    divisor: Tensor | None = None  # see `AdjustedWeight`


class GroupFormat(WeightFormat):
    """Integers of four or eight bits with a scale for each group of inputs.

    Eight bits are computed with as `Int8Rows` where they are the same thing, and else as floats.

    A rank's part of the inputs may begin and end within a group, and with an order it has inputs
    of any group. Then they are sorted by groups, smaller groups repeat the scales, and what is
    left over is filled up with weights of zero. Where floats take less than that, they are taken.
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
        self.part, self.num_parts = 0, 1
        self._runs: list[list[int]] = []  # inputs of each group in each part; see `with_order`

    def of_part(self, part: int, num_parts: int) -> GroupFormat:
        """See `WeightFormat`."""
        made = copy.copy(self)
        made.part, made.num_parts = part, num_parts
        return made

    def with_order(self, parts: Sequence[Tensor], num_parts: int) -> GroupFormat:
        """See `WeightFormat`."""
        made = copy.copy(self)
        num_groups = num_parts * len(parts[0]) // self.group_size
        counts = [self._count(groups, num_groups) for groups in parts]
        made._runs = [count[count > 0].tolist() for count in counts]
        return made

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
        if self.bits == 8 and not self.is_widened:
            return num_outputs * (num_inputs + 4)
        floats = num_outputs * num_inputs * dtype.itemsize
        return floats if self.is_widened else min(floats, num_outputs * self._row_bytes(num_inputs))

    def _row_bytes(self, num_inputs: int) -> int:
        """Of a row of the largest part."""
        size = self.group_size or num_inputs
        if self.num_parts == 1:
            return row_bytes([num_inputs], size)
        runs = self._runs
        if not self.has_order:
            runs = [runs_of_part(part, num_inputs, size) for part in range(self.num_parts)]
        assert runs, "the order of inputs was not read"
        return max(row_bytes(*lay_out(counts, self.multiple)) for counts in runs)

    @property
    def multiple(self) -> int:
        """What the inputs of a group in a part are filled up to a multiple of."""
        return math.gcd(self.group_size, FAST_MULTIPLE)

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
        size = num_inputs / world_size
        return (
            f"its inputs are stored by eights, and {size:g} fall to each rank" if size % 8 else ""
        )

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
        groups = self._groups(found)
        weight = (self._four_bits if self.bits == 4 else self._eight_bits)(
            found, groups, device, dtype
        )
        if found.divisor is None:
            return weight
        divisor = found.divisor.to(device, dtype, copy=True)
        if isinstance(weight, AdjustedWeight):
            return replace(weight, divisor=divisor)
        return AdjustedWeight(weight, divisor=divisor, notice=weight.notice)

    def in_order(self, num_inputs: int) -> Tensor:
        """The group of each input of this part, int64 [K], where groups are in order."""
        if not self.group_size:
            return torch.zeros(num_inputs, dtype=torch.int64)
        first = self.part * num_inputs
        return torch.arange(first, first + num_inputs) // self.group_size

    def _groups(self, found: Integers) -> Tensor:
        """The column of the scales that each input has, int64 [K].

        Raises:
            ValueError: groups are not of the size that the settings tell.
        """
        num_inputs, num_groups = found.values.shape[1], found.scale.shape[1]
        if found.groups is not None:
            self._count(found.groups, num_groups)
            return found.groups
        groups = self.in_order(num_inputs)
        # A part has the scales of its own groups where the number of parts divides them.
        return groups - groups[0] if num_groups * self.group_size <= num_inputs else groups

    def _count(self, groups: Tensor, num_groups: int) -> Tensor:
        """The inputs of each group [G] among `groups` [K], whole or of a part.

        Raises:
            ValueError: groups are not of the size that the settings tell.
        """
        if groups.min() >= 0 and groups.max() < num_groups:
            counts = groups.bincount(minlength=num_groups)
            if counts.max() <= self.group_size:
                return counts
        raise ValueError(
            f"g_idx does not put {self.group_size} inputs into each of {num_groups} groups"
        )

    def _four_bits(
        self, found: Integers, groups: Tensor, device: torch.device, dtype: torch.dtype
    ) -> LinearWeight:
        num_outputs, num_inputs = found.values.shape
        counts = groups.bincount()
        own = counts.nonzero().view(-1)
        runs = counts[own].tolist()
        lengths, size = lay_out(runs, self.multiple)
        if row_bytes(lengths, size) > num_inputs * dtype.itemsize:
            wide = dequantize_groups(found.values, found.scale, found.zero, dtype, groups)
            return FloatWeight(wide.to(device), Notice(HELD_AS_FLOATS, wide.nbytes))
        columns = own.repeat_interleave(torch.tensor(lengths) // size)
        scale, zero = found.scale.float()[:, columns], found.zero[:, columns].to(torch.uint8)
        values, order, notice = found.values, None, None
        if sum(lengths) > num_inputs or bool((groups[1:] < groups[:-1]).any()):
            order, is_filler = fill_up(groups, runs, lengths)
            values = values.index_select(1, order)
            values[:, is_filler] = found.zero[:, groups[order[is_filler]]].to(torch.uint8)
        if sum(lengths) > num_inputs:
            added = row_bytes(lengths, size) - row_bytes([num_inputs], size)
            notice = Notice(FILLED_UP, num_outputs * added)
        pairs = pack(values, 4, 1, torch.uint8).to(device)
        weight = Int4Weight(pairs, scale.to(device), zero.to(device), dtype)
        if order is None:
            return weight
        return AdjustedWeight(weight, order.to(device), notice=notice)

    def _eight_bits(
        self, found: Integers, groups: Tensor, device: torch.device, dtype: torch.dtype
    ) -> LinearWeight:
        if found.scale.shape[1] == 1 and bool((found.zero == 128).all()):
            values = (found.values.to(torch.int16) - 128).to(torch.int8)
            return Int8Weight(values.to(device), found.scale.float().view(-1).to(device), dtype)
        wide = dequantize_groups(found.values, found.scale, found.zero, dtype, groups)
        return FloatWeight(wide.to(device))
