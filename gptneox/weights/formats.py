# SPDX-License-Identifier: Apache-2.0
"""How the weights of linear layers are stored, cut for tensor parallelism, measured and packed.

A format lists the tensors that a weight consists of in a file, and how each lies along the
layer's outputs and inputs. Cutting, joining, checking and measuring follow from that alone, so a
further format is a class here, a line in `FORMATS`, and a method of the operators of each device
that packs it. Everything that is not a linear layer's weight (biases, norms, embedding) is float.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gptneox.devices.operators import (
    FoldableWeight,
    InputRange,
    LinearWeight,
    Notice,
    Operators,
    PackedLinear,
)

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

OUTPUTS, INPUTS = 0, 1
# Linear layer (second last part of a tensor's name) -> what tensor parallelism shares out: its
# outputs (column-parallel) or its inputs (row-parallel).
CUT_AXES = {
    "query_key_value": OUTPUTS,
    "dense_h_to_4h": OUTPUTS,
    "embed_out": OUTPUTS,
    "dense": INPUTS,
    "dense_4h_to_h": INPUTS,
}


@dataclass(frozen=True)
class StoredTensor:
    """One of the tensors that a weight is stored as.

    `dims` are its dimensions along the layer's outputs and inputs; None where it has none. With
    `per_group` it has an entry for each group of inputs, and is whole on every rank where the
    number of ranks does not divide that of the groups.
    """

    suffix: str  # last part of its name
    dims: tuple[int | None, int | None]
    dtypes: tuple[torch.dtype, ...]
    per_group: bool = False


class WeightFormat(ABC):
    """One way to store the weight of a linear layer."""

    tensors: tuple[StoredTensor, ...]
    scheme: str = ""  # of quantization, as directories and messages name it
    order_suffix: str = ""  # of the tensor that tells the group of each input, if it has any order
    has_bias: ClassVar[bool] = False  # the layer's bias is among the tensors of the weight

    @abstractmethod
    def shapes(self, num_outputs: int, num_inputs: int) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor in an uncut file, by its suffix."""

    @abstractmethod
    def num_bytes(self, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> int:
        """Bytes of a loaded weight in a model that computes in `dtype`."""

    def of_part(self, part: int, num_parts: int) -> WeightFormat:
        """The format of one of `num_parts` equal parts of the inputs, whose tensors `load` takes.

        Its `num_bytes` is that of the largest part, `num_inputs` those of one.
        """
        return self

    def with_order(self, parts: Sequence[Tensor], num_parts: int) -> WeightFormat:
        """This format where inputs have an order, on which the bytes of a part depend.

        Args:
            parts: what is stored as `order_suffix`, of all `num_parts` parts or of one.
            num_parts: of the inputs.

        Raises:
            ValueError: there is no such order.
        """
        return self

    def why_not_cut(self, axis: int, num_outputs: int, num_inputs: int, world_size: int) -> str:
        """Why a weight cannot be shared out along OUTPUTS or INPUTS to ranks; "" where it can."""
        return ""

    @abstractmethod
    def load(
        self, stored: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> LinearWeight:
        """One rank's part on its device, from the stored tensors by suffix.

        These may alias a mapped file. So may the result: packing copies it.

        Raises:
            ValueError: a value cannot be computed with; the message names the tensor's suffix.
        """


@dataclass(frozen=True)
class FloatWeight(FoldableWeight):
    """A weight [F, K] of floating-point values."""

    values: Tensor
    notice: Notice | None = None

    @property
    def out_features(self) -> int:
        """F."""
        return self.values.shape[0]

    def pack(self, ops: Operators, bias: Tensor | None) -> PackedLinear:
        """By `Operators.pack_linear`."""
        return ops.pack_linear(self.values, bias)

    def floats(self) -> Tensor:
        """The values themselves."""
        return self.values

    def take_rows(self, order: Tensor) -> FloatWeight:
        """The rows `order` [F']."""
        return FloatWeight(self.values.index_select(0, order))


class FloatFormat(WeightFormat):
    """One tensor of floating-point values, loaded in the dtype that the model computes in."""

    tensors = (StoredTensor("weight", (0, 1), FLOATS),)

    def shapes(self, num_outputs: int, num_inputs: int) -> dict[str, tuple[int, ...]]:
        """[F, K]."""
        return {"weight": (num_outputs, num_inputs)}

    def num_bytes(self, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> int:
        """One value for each pair of output and input."""
        return num_outputs * num_inputs * dtype.itemsize

    def load(
        self, stored: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> FloatWeight:
        """Copies only where device or dtype differ."""
        return FloatWeight(stored["weight"].to(device=device, dtype=dtype))


@dataclass(frozen=True)
class Int8Weight(LinearWeight):
    """A weight of eight bits: scale[f] * values[f, k], for a model that computes in `dtype`."""

    values: Tensor  # int8 [F, K]
    scale: Tensor  # fp32 [F]
    dtype: torch.dtype

    @property
    def out_features(self) -> int:
        """F."""
        return self.values.shape[0]

    def pack(self, ops: Operators, bias: Tensor | None) -> PackedLinear:
        """By `Operators.pack_int8`."""
        return ops.pack_int8(self.values, self.scale, bias, self.dtype)

    def take_rows(self, order: Tensor) -> Int8Weight:
        """The rows `order` [F'] with their scales."""
        values = self.values.index_select(0, order)
        return Int8Weight(values, self.scale.index_select(0, order), self.dtype)


class Int8Rows(WeightFormat):
    """Integers of eight bits with a scale for each output, symmetric: no zero point.

    A row-parallel part has columns of the integers and the scales of the whole rows. Padded rows
    of a vocabulary are zeros, and so are their scales. -128 is a value like any other.

    Source: compressed-tensors, format int-quantized with the strategy channel.
    """

    scheme = "w8a16"
    tensors: tuple[StoredTensor, ...] = (
        StoredTensor("weight", (0, 1), (torch.int8,)),
        StoredTensor("weight_scale", (0, None), FLOATS),
    )

    def shapes(self, num_outputs: int, num_inputs: int) -> dict[str, tuple[int, ...]]:
        """[F, K], and [F, 1] for the scales."""
        shapes: dict[str, tuple[int, ...]] = {t.suffix: (num_outputs, 1) for t in self.tensors}
        return shapes | {"weight": (num_outputs, num_inputs)}

    def num_bytes(self, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> int:
        """A byte for each value, an fp32 scale for each row, whatever `dtype` is."""
        return num_outputs * (num_inputs + 4)

    def load(
        self, stored: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> Int8Weight:
        """Scales become fp32.

        Raises:
            ValueError: a scale is not finite.
        """
        scale = stored["weight_scale"].view(-1).to(torch.float32)
        if not torch.isfinite(scale).all():
            raise ValueError("weight_scale holds values that are not finite")
        return Int8Weight(stored["weight"].to(device), scale.to(device), dtype)


class Int8RowsWithOffset(Int8Rows):
    """`Int8Rows` with a third tensor of offsets, which are zero: (value - offset) * scale.

    Source: msmodelslim, tag W8A16 of its ascendV1 files.
    """

    tensors = (*Int8Rows.tensors, StoredTensor("weight_offset", (0, None), FLOATS))

    def load(
        self, stored: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> Int8Weight:
        """As `Int8Rows`.

        Raises:
            ValueError: an offset is not zero, or a scale is not finite.
        """
        if stored["weight_offset"].any():
            raise ValueError(
                "weight_offset is not zero; asymmetric quantization is not served, quantize again "
                "with symmetric weights (w_sym True)"
            )
        return super().load(stored, device, dtype)


@dataclass(frozen=True)
class IntegerWeight(Int8Weight):
    """A weight of eight bits whose inputs become integers.

    `inputs`, `start` and what `scale` belongs to: see `Operators.pack_integers`.
    """

    quantizes_inputs = True

    inputs: InputRange | None = None
    start: Tensor | None = None  # int32 [F]

    def pack(self, ops: Operators, bias: Tensor | None) -> PackedLinear:
        """By `Operators.pack_integers`."""
        return ops.pack_integers(self.values, self.scale, bias, self.dtype, self.inputs, self.start)

    def take_rows(self, order: Tensor) -> IntegerWeight:
        """The rows `order` [F'] with their scales and starts."""
        start = None if self.start is None else self.start.index_select(0, order)
        values, scale = (t.index_select(0, order) for t in (self.values, self.scale))
        return IntegerWeight(values, scale, self.dtype, self.inputs, start)

    def stack(self, below: LinearWeight) -> IntegerWeight | None:
        """Of rows whose inputs become the same integers."""
        if not isinstance(below, IntegerWeight) or self.inputs != below.inputs:
            return None
        start = None
        if self.start is not None and below.start is not None:
            start = torch.cat((self.start, below.start))
        return IntegerWeight(
            torch.cat((self.values, below.values)),
            torch.cat((self.scale, below.scale)),
            self.dtype,
            self.inputs,
            start,
        )


class Int8Dynamic(Int8RowsWithOffset):
    """The tensors of W8A16, for a product of integers: each row of inputs finds its own scale.

    A row-parallel part's inputs find theirs on each rank, from its own columns; sums of ranks are
    right, as each rank scales its own first, but they differ with the number of ranks.

    Source: msmodelslim, tag W8A8_DYNAMIC.
    """

    scheme = "w8a8_dynamic"

    def load(
        self, stored: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> IntegerWeight:
        """As `Int8RowsWithOffset`."""
        weight = super().load(stored, device, dtype)
        return IntegerWeight(weight.values, weight.scale, dtype)


# npu_trans_quant_param sets bit 46 beside the bits of a number.
_MARK = 1 << 14


class Int8Static(WeightFormat):
    """Integers whose inputs become integers by one scale and offset, found when it was written.

    With q = round(x / input_scale) + input_offset the output is
    (sum of q * weight + quant_bias) * deq_scale: quant_bias holds the layer's bias and what the
    offset adds. It belongs to whole rows, so under row-parallel cutting rank 0 alone has it.
    deq_scale is of fp32, or int64 that holds the bits of fp32 numbers, for models of fp16.

    Source: msmodelslim, tags W8A8 and W8A8S. Older files keep what these were made of, too:
    weight_scale, weight_offset and the bias, which is not added again.
    """

    scheme = "w8a8"
    has_bias = True
    _OWN: ClassVar[tuple[StoredTensor, ...]] = (
        StoredTensor("weight", (0, 1), (torch.int8,)),
        StoredTensor("input_scale", (None, None), FLOATS),
        StoredTensor("input_offset", (None, None), (*FLOATS, torch.int8, torch.int32)),
        StoredTensor("quant_bias", (0, None), (torch.int32,)),
        StoredTensor("deq_scale", (0, None), (torch.int64, torch.float32)),
    )
    _UNUSED: ClassVar[dict[str, StoredTensor]] = {
        "weight_scale": StoredTensor("weight_scale", (0, None), FLOATS),
        "weight_offset": StoredTensor("weight_offset", (0, None), FLOATS),
        "bias": StoredTensor("bias", (0, None), FLOATS),
    }

    def __init__(self, *unused: str) -> None:
        """Args: unused: suffixes of tensors that are stored, but not needed."""
        self.tensors = (*self._OWN, *(self._UNUSED[name] for name in unused))

    def shapes(self, num_outputs: int, num_inputs: int) -> dict[str, tuple[int, ...]]:
        """[F, K]; [1] for what inputs need; [F] for outputs; [F, 1] for a weight's scales."""
        shapes: dict[str, tuple[int, ...]] = {t.suffix: (num_outputs,) for t in self.tensors}
        for suffix in shapes:
            if suffix.startswith("weight_"):
                shapes[suffix] = (num_outputs, 1)
            elif suffix.startswith("input_"):
                shapes[suffix] = (1,)
        return shapes | {"weight": (num_outputs, num_inputs)}

    def num_bytes(self, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> int:
        """A byte for each value, an fp32 scale and an int32 start for each row."""
        return num_outputs * (num_inputs + 8)

    def load(
        self, stored: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> IntegerWeight:
        """Scales become fp32.

        Raises:
            ValueError: a scale is not finite, that of inputs not positive, or the offset is no
                integer of eight bits.
        """
        scale = stored["deq_scale"]
        if scale.dtype == torch.int64:
            high, low = scale >> 32, scale & 0x7FFFFFFF
            if (scale & 0x80000000).any() or ((high != 0) & (high != _MARK)).any():
                raise ValueError("deq_scale does not hold the bits of positive fp32 numbers")
            scale = low.to(torch.int32).view(torch.float32)
        if not torch.isfinite(scale).all():
            raise ValueError("deq_scale holds values that are not finite")
        step, offset = (stored[f"input_{part}"].item() for part in ("scale", "offset"))
        if not 0 < step < math.inf:
            raise ValueError(f"input_scale is {step}; a positive number is expected")
        if offset != round(offset) or not -128 <= offset <= 127:
            raise ValueError(f"input_offset is {offset}; an integer of eight bits is expected")
        return IntegerWeight(
            stored["weight"].to(device),
            scale.to(device, torch.float32),
            dtype,
            InputRange(step, round(offset)),
            stored["quant_bias"].to(device),
        )


FLOAT = FloatFormat()
INT8_ROWS, INT8_ROWS_WITH_OFFSET = Int8Rows(), Int8RowsWithOffset()
INT8_DYNAMIC = Int8Dynamic()
INT8_STATIC = (
    Int8Static("weight_scale", "weight_offset", "bias"),
    Int8Static("weight_scale", "weight_offset"),
    Int8Static("bias"),
    Int8Static(),
)
# The first whose tensors are all stored is taken. `INT8_DYNAMIC` has those of
# `INT8_ROWS_WITH_OFFSET`: the reader of the files tells one from the other.
FORMATS: tuple[WeightFormat, ...] = (*INT8_STATIC, INT8_ROWS_WITH_OFFSET, INT8_ROWS, FLOAT)

# Name of a linear layer -> its format.
Formats = Mapping[str, WeightFormat]


def find_formats(names: Iterable[str]) -> dict[str, WeightFormat]:
    """The format of every linear layer that tensors are stored of.

    Args:
        names: parameter names of all stored tensors.
    """
    suffixes: dict[str, set[str]] = {}
    for name in names:
        linear, suffix = split_name(name)
        if _module(linear) in CUT_AXES:
            suffixes.setdefault(linear, set()).add(suffix)
    return {
        linear: next((f for f in FORMATS if {t.suffix for t in f.tensors} <= stored), FLOAT)
        for linear, stored in suffixes.items()
    }


def scheme_of(formats: Formats) -> str:
    """The quantization of a model, such as "w8a16"; "" where every linear layer is float."""
    return "+".join(sorted({f.scheme for f in formats.values() if f.scheme}))


def split_name(name: str) -> tuple[str, str]:
    """The owner of a tensor, and what it is of it: "….mlp.dense_4h_to_h" and "weight".

    What belongs to a weight is of its owner, too, such as "weight.absmax".
    """
    owner, dot, suffix = name.partition(".weight.")
    if dot:
        return owner, f"weight.{suffix}"
    owner, _, suffix = name.rpartition(".")
    return owner, suffix


def _module(name: str) -> str:
    return name.rpartition(".")[2]


# -- one rank's part of a tensor -----------------------------------------------------------------


def cut_dimension(
    name: str, shape: tuple[int, ...], formats: Formats, world_size: int
) -> int | None:
    """Dimension along which tensor parallelism cuts a tensor; None: it is whole on each rank.

    Args:
        name: of a parameter.
        shape: of the whole tensor.
        formats: of the checkpoint's linear layers.
        world_size: number of ranks.
    """
    linear, suffix = split_name(name)
    axis = CUT_AXES.get(_module(linear))
    if axis is None:
        return None
    if suffix == "bias" and not formats.get(linear, FLOAT).has_bias:
        return 0 if axis == OUTPUTS else None
    tensors = {t.suffix: t for t in formats.get(linear, FLOAT).tensors}
    if suffix not in tensors:
        return None
    dim = tensors[suffix].dims[axis]
    if dim is not None and axis == INPUTS and tensors[suffix].per_group and shape[dim] % world_size:
        return None
    return dim


def rank_slice(
    dim: int | None, shape: tuple[int, ...], rank: int, world_size: int
) -> tuple[slice, ...]:
    """The part that `rank` holds of a tensor that is cut along `dim`; () means the whole tensor.

    A fused query_key_value is laid out per head (q, k, v), so equal row ranges are whole heads.
    A vocabulary that does not divide is padded: the last ranks hold fewer real rows.
    """
    if world_size == 1 or dim is None:
        return ()
    size = math.ceil(shape[dim] / world_size)
    start = min(rank * size, shape[dim])
    return (*(slice(None),) * dim, slice(start, min(start + size, shape[dim])))


def part_shape(dim: int | None, shape: tuple[int, ...], world_size: int) -> tuple[int, ...]:
    """Shape of one rank's part, with the padding of what does not divide."""
    if dim is None:
        return shape
    return (*shape[:dim], math.ceil(shape[dim] / world_size), *shape[dim + 1 :])


def pad_to(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`value` with zeros behind it up to `shape`, which differs in one dimension at most."""
    for dim, size in enumerate(shape):
        if missing := size - value.shape[dim]:
            padding = (*shape[:dim], missing, *shape[dim + 1 :])
            return torch.cat([value, value.new_zeros(padding)], dim)
    return value


def why_not_cut(linear: str, shape: tuple[int, ...], formats: Formats, world_size: int) -> str:
    """Why the weight [F, K] of a linear layer cannot be shared out to ranks; "" where it can."""
    axis = CUT_AXES.get(_module(linear))
    if axis is None or world_size == 1:
        return ""
    return formats.get(linear, FLOAT).why_not_cut(axis, shape[0], shape[1], world_size)


def is_partial_bias(name: str) -> bool:
    """Whether a tensor is the bias of a row-parallel layer: one rank adds it, the others zero."""
    linear, suffix = split_name(name)
    return suffix in ("bias", "quant_bias") and shares_inputs(linear)


def shares_inputs(linear: str) -> bool:
    """Whether a layer is row-parallel: each rank has a part of its inputs."""
    return CUT_AXES.get(_module(linear)) == INPUTS
