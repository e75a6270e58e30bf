# SPDX-License-Identifier: Apache-2.0
"""The operators of a model in plain torch: the specification of every device's operators.

Shapes as in step.py; K features in, F features out.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gptneox.devices.cache import CacheShape, KVFormat, LayerCache, quantize
from gptneox.devices.device import Device, Finding
from gptneox.devices.step import (
    ForwardBatch,
    PaddedBatch,
    PaddedStep,
    PagedStep,
    RotaryTables,
    Step,
)

logger = logging.getLogger(__name__)


class Notice(NamedTuple):
    """What a user should know of how a weight is held, and the bytes that it is about."""

    text: str
    num_bytes: int


class LinearWeight(ABC):
    """The weight [F, K] of a linear layer on the device, in the format it was loaded in."""

    adjusts_inputs: ClassVar[bool] = False  # something is done to them before the product
    quantizes_inputs: ClassVar[bool] = False  # the product is one of integers
    notice: Notice | None = None

    @property
    @abstractmethod
    def out_features(self) -> int:
        """F."""

    @abstractmethod
    def pack(self, ops: Operators, bias: Tensor | None) -> PackedLinear:
        """Hand the tensors to the operators' method for this format; bias [F]."""

    @abstractmethod
    def take_rows(self, order: Tensor) -> LinearWeight:
        """The rows `order` [F'] of the weight, in the same format."""

    def stack(self, below: LinearWeight) -> LinearWeight | None:
        """One weight of these rows and those of `below`; None: they need two products."""
        return None


class FoldableWeight(LinearWeight):
    """A weight whose columns may be rescaled and joined with others.

    Integers with a scale for each row are none: scaling a column would round them again.
    """

    @abstractmethod
    def floats(self) -> Tensor:
        """The weight [F, K] in the dtype to compute in."""


@dataclass
class PackedLinear:
    """A linear layer's weight in the layout its device computes with."""

    weight: Any  # base: [F, K]
    bias: Tensor | None  # [F]
    in_features: int
    out_features: int

    def multiply(self, ops: Operators, x: Tensor) -> Tensor:
        """x [T, K]; returns [T, F], by the operators' product for this layout."""
        return ops.linear(x, self)


@dataclass
class PackedInt8(PackedLinear):
    """Weights of eight bits; `scale` belongs to each row."""

    scale: Tensor  # [F], base: fp32

    def multiply(self, ops: Operators, x: Tensor) -> Tensor:
        """By `Operators.linear_int8`."""
        return ops.linear_int8(x, self)


class InputRange(NamedTuple):
    """How all inputs of a layer become integers: round(x / scale + offset), -128 to 127."""

    scale: float
    offset: int


@dataclass
class PackedIntegers(PackedLinear):
    """Weights of eight bits whose inputs become integers, too: a product of integers."""

    scale: Tensor  # [F], base: fp32; of a weight, or with `inputs` of a product
    inputs: InputRange | None  # None: every row has a scale of its own
    start: Tensor | None  # int32 [F], what a sum begins with; None: 0

    def multiply(self, ops: Operators, x: Tensor) -> Tensor:
        """By `Operators.linear_integers`."""
        return ops.linear_integers(x, self)


@dataclass
class PackedInt4(PackedLinear):
    """Weights of four bits, uint8 [F, K / 2]; scales and zeros belong to groups of inputs."""

    scale: Tensor  # [F, G], base: fp32
    zero: Tensor  # [F, G], base: uint8

    def multiply(self, ops: Operators, x: Tensor) -> Tensor:
        """By `Operators.linear_int4`."""
        return ops.linear_int4(x, self)


@dataclass
class PackedAdjusted(PackedLinear):
    """A layer whose inputs are divided, and put in another order, before its own product.

    `weight` is the PackedLinear of that product, which has the bias. Of its columns some may
    repeat an input, with weights of zero.
    """

    order: Tensor | None  # the input of each column of the weight
    divisor: Tensor | None  # [K], of x as it comes

    def multiply(self, ops: Operators, x: Tensor) -> Tensor:
        """Of x [T, K]."""
        if self.divisor is not None:
            x = x / self.divisor.to(x.dtype)
        if self.order is not None:
            x = x.index_select(1, self.order)
        inner = self.weight
        assert isinstance(inner, PackedLinear)
        return inner.multiply(ops, x)


@dataclass
class LayerWeights:
    """One rank's weights of a parallel-residual layer, on the device, in the dtype to compute in.

    C hidden size, W = H * D attention width and F MLP width of the rank; `eps` and `activation`
    are the config's. A row-parallel bias is zero on every rank but the first.
    """

    norm_attention: tuple[Tensor, Tensor]  # scale and shift, [C] each
    norm_mlp: tuple[Tensor, Tensor]
    query_key_value: tuple[LinearWeight, Tensor | None]  # [3W, C], [3W]
    dense_h_to_4h: tuple[LinearWeight, Tensor]  # [F, C], [F]
    dense: tuple[LinearWeight, Tensor | None]  # [C, W], [C]
    dense_4h_to_h: tuple[LinearWeight, Tensor]  # [C, F], [C]
    eps: float
    activation: str

    def back_bias(self) -> Tensor:
        """The sum of both row-parallel biases, [C] in fp32."""
        bias, other = self.dense_4h_to_h[1].float(), self.dense[1]
        return bias if other is None else bias + other.float()

    def linears(self) -> tuple[tuple[LinearWeight, Tensor | None], ...]:
        """The four of them, in the order above."""
        return self.query_key_value, self.dense_h_to_4h, self.dense, self.dense_4h_to_h

    def folded(self) -> list[Tensor] | None:
        """The four matrices as floats, in the order above; None where one cannot be folded."""
        linears = self.linears()
        weights = [w for w, _ in linears if isinstance(w, FoldableWeight)]
        return [w.floats() for w in weights] if len(weights) == len(linears) else None


@dataclass
class PackedLayer:
    """A parallel-residual layer as two products: `Operators.layer_front` and `layer_back`."""

    front: Any  # base: PackedLinear [3W + F, C]
    back: Any  # base: PackedLinear [C, W + F]
    eps: float
    activation: Callable[[Tensor], Tensor]
    qkv_width: int  # 3W
    scale: Tensor | None = None  # [C], of the one normalisation
    shift: Tensor | None = None  # [C], likewise


@dataclass
class FourProducts:
    """A parallel-residual layer whose matrices stay apart: the `front` and `back` of a PackedLayer.

    Each has its own normalisation and its own format. Where both normalisations are one and the
    rows behind them may be stacked, `qkv` has those of both products.
    """

    norms: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]  # of qkv and up: scale, shift [C]
    qkv: PackedLinear  # [3W, C], or [3W + F, C]
    up: PackedLinear | None  # [F, C]; None: its rows are the last of `qkv`
    dense: PackedLinear  # [C, W], without a bias
    down: PackedLinear  # [C, F], with both biases


class ChosenOperator(NamedTuple):
    """How one part of a model is computed on a device, and why."""

    part: str
    operator: str
    reason: str


def check_shape(x: Tensor, shape: Sequence[int | None], name: str) -> None:
    """Raise ValueError unless `x` has `shape`; None stands for any size."""
    if x.dim() != len(shape) or any(
        s not in (None, n) for n, s in zip(x.shape, shape, strict=True)
    ):
        expected = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name} has shape {list(x.shape)}; [{expected}] is expected")


class Operators:
    """The operators of one model on any device, and the state that they keep for that model.

    Two models on a device have an object each and share no state.
    """

    fuses_layers = False  # give parallel-residual layers to `pack_layer`
    paged_step: type[PagedStep] = PagedStep  # of `begin`
    padded_step: type[PaddedStep] = PaddedStep  # of `begin_padded`

    def __init__(self, device: Device, graphs: str = "auto") -> None:
        self.device, self.graphs = device, graphs

    @property
    def torch_device(self) -> torch.device:
        """Where tensors are."""
        return self.device.torch_device

    def prepare(self, head_dim: int, rotary_dim: int) -> None:
        """Choose operators for a model's shapes before its weights are loaded."""

    def describe_operators(
        self, head_dim: int, rotary_dim: int, block_size: int, kv_format: KVFormat
    ) -> list[Finding]:
        """What was chosen for a model's shapes and its cache, where there is a choice."""
        return []

    # -- dense operators -------------------------------------------------------------------------

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Copy weight [F, K] into the layout `linear` wants, and keep bias [F].

        The weight may alias a mapped file, so the result must not share its memory.
        """
        return PackedLinear(weight.clone(), bias, weight.shape[1], weight.shape[0])

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """x [T, K]; returns x @ weight.T + bias, [T, F]."""
        return F.linear(x, packed.weight, packed.bias)

    def pack_int8(
        self, values: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> PackedLinear:
        """Copy the weight scale[f] * values[f, k] into the layout of its product.

        Args:
            values: int8 [F, K], from -128 to 127; they may alias a mapped file.
            scale: fp32 [F]; a row of zeros may have any, also 0.
            bias: [F].
            dtype: that the model computes in.
        """
        sizes = values.shape[1], values.shape[0]
        return PackedInt8(values.clone(), bias, *sizes, scale=scale.clone())

    def linear_int8(self, x: Tensor, packed: PackedInt8) -> Tensor:
        """x [T, K]; returns [T, F]. The weight is widened to the dtype of x, then multiplied.

        A device may apply the scale to the sum instead, which rounds less.
        """
        weight = (packed.weight.float() * packed.scale.unsqueeze(1)).to(x.dtype)
        return F.linear(x, weight, packed.bias)

    def pack_int4(
        self,
        values: Tensor,
        scale: Tensor,
        zero: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> PackedLinear:
        """Copy the weight scale[f, g] * (value[f, k] - zero[f, g]) into the layout of its product.

        Args:
            values: uint8 [F, K / 2]: the values from 0 to 15, the even k in the low half of a byte.
            scale: fp32 [F, G]; each belongs to K / G inputs.
            zero: uint8 [F, G], from 0 to 15.
            bias: [F].
            dtype: that the model computes in.
        """
        sizes = 2 * values.shape[1], values.shape[0]
        return PackedInt4(values.clone(), bias, *sizes, scale=scale.clone(), zero=zero.clone())

    def linear_int4(self, x: Tensor, packed: PackedInt4) -> Tensor:
        """x [T, K]; returns [T, F]. The weight is widened to the dtype of x, then multiplied.

        A device may apply scales to the sums of groups instead, which rounds less.
        """
        values = split_pairs(packed.weight).float()
        groups = values.view(len(values), packed.scale.shape[1], -1)
        weight = (groups - packed.zero.float().unsqueeze(2)) * packed.scale.unsqueeze(2)
        return F.linear(x, weight.flatten(1).to(x.dtype), packed.bias)

    def pack_integers(
        self,
        values: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        inputs: InputRange | None = None,
        start: Tensor | None = None,
    ) -> PackedLinear:
        """Copy a weight whose inputs become integers into the layout of its product.

        Args:
            values: int8 [F, K], from -128 to 127; they may alias a mapped file.
            scale: fp32 [F]; of the weight, or with `inputs` of the product: both scales in one.
            bias: [F].
            dtype: that the model computes in.
            inputs: how inputs become integers; None: each row by its own largest value.
            start: int32 [F], what the sums of integers begin with.
        """
        sizes = values.shape[1], values.shape[0]
        copied = None if start is None else start.clone()
        return PackedIntegers(
            values.clone(), bias, *sizes, scale=scale.clone(), inputs=inputs, start=copied
        )

    def linear_integers(self, x: Tensor, packed: PackedIntegers) -> Tensor:
        """x [T, K]; returns [T, F]. The sums of integers are exact, then scaled in fp32.

        A row that holds a value which is not finite gives NaN; no row depends on another.
        """
        if packed.inputs is None:
            values, row_scale = quantize(x)
        else:
            values, row_scale = quantize_by(x, packed.inputs)
        sums = self._multiply_integers(values, packed.weight)
        if packed.start is not None:
            sums += packed.start
        y = sums.float() * packed.scale * row_scale.unsqueeze(1)
        return (y if packed.bias is None else y + packed.bias.float()).to(x.dtype)

    def _multiply_integers(self, x: Tensor, weight: Tensor) -> Tensor:
        """x int8 [T, K] times weight int8 [F, K]: the exact sums, int32 [T, F].

        K is at most 65,535. fp32 products are the only fast ones on every device, and exact for
        few terms.
        """
        sums = torch.zeros(len(x), len(weight), dtype=torch.int32, device=x.device)
        for k in range(0, x.shape[1], _EXACT_TERMS):
            part = slice(k, k + _EXACT_TERMS)
            sums += torch.mm(x[:, part].float(), weight[:, part].float().T).to(torch.int32)
        return sums

    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        """Rows `ids` [T] of weight [V, C]: the residual stream, in the dtype this device keeps."""
        return F.embedding(ids, weight)

    def pack_layer(self, weights: LayerWeights) -> PackedLayer:
        """Make one of both normalisations and fold the difference into the products behind it.

        With the bare normalisation N and any s and h, LN(x) W.T + b is
        (s N(x) + h) (W diag(scale / s)).T + b + W (shift - h scale / s), so both products that
        read x become one of [3W + F, C]; both that write the partial sum are one of [C, W + F].
        s and h are those before attention, so that query_key_value is not rounded again, which
        would cost accuracy. A channel takes the other scale where the first is smaller than 1/64
        of it, and no shift where the shift would exceed the other normalisation's values. Folding
        is done in fp32. Where a weight cannot be folded, all four products stay apart.
        """
        folded = weights.folded()
        if folded is None:
            return self._pack_four(weights)
        query_key_value, dense_h_to_4h, dense, down = folded
        (first, shift), (second, other) = (
            (t[0].float(), t[1].float()) for t in (weights.norm_attention, weights.norm_mlp)
        )
        scale = torch.where(first.abs() * 64 >= second.abs(), first, second)
        scale = torch.where(scale == 0, 1.0, scale)  # where both are 0
        keeps = (shift * second / scale).abs() <= second.abs() + other.abs()
        shift = torch.where(keeps & (scale == first), shift, 0.0)

        def fold(
            norm: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            wide, ratio = weight.float(), norm[0].float() / scale
            # no matrix product: some devices round its operands
            added = (wide * (norm[1].float() - shift * ratio)).sum(1)
            wide *= ratio
            return wide.to(weight.dtype), added if bias is None else added + bias.float()

        qkv_bias, up_bias = weights.query_key_value[1], weights.dense_h_to_4h[1]
        qkv, qkv_bias = fold(weights.norm_attention, query_key_value, qkv_bias)
        up, up_bias = fold(weights.norm_mlp, dense_h_to_4h, up_bias)
        out_bias = weights.back_bias()
        return PackedLayer(
            self.pack_linear(torch.cat((qkv, up)), torch.cat((qkv_bias, up_bias)).to(qkv.dtype)),
            self.pack_linear(torch.cat((dense, down), 1), out_bias.to(down.dtype)),
            weights.eps,
            self.activation(weights.activation),
            qkv.shape[0],
            scale.to(qkv.dtype),
            shift.to(qkv.dtype),
        )

    def _pack_four(self, weights: LayerWeights) -> PackedLayer:
        """`pack_layer` without folding."""
        qkv, qkv_bias = weights.query_key_value
        up, up_bias = weights.dense_h_to_4h
        bias = weights.back_bias().to(up_bias.dtype)
        has_one_norm = all(map(torch.equal, weights.norm_attention, weights.norm_mlp))
        front = qkv.stack(up) if has_one_norm else None
        if front is not None:
            first = up_bias.new_zeros(qkv.out_features) if qkv_bias is None else qkv_bias
            qkv_bias = torch.cat((first, up_bias))
        return self._four_products(
            weights,
            (front or qkv).pack(self, qkv_bias),
            None if front else up.pack(self, up_bias),
            weights.dense[0].pack(self, None),
            weights.dense_4h_to_h[0].pack(self, bias),
        )

    def _four_products(
        self,
        weights: LayerWeights,
        qkv: PackedLinear,
        up: PackedLinear | None,
        dense: PackedLinear,
        down: PackedLinear,
    ) -> PackedLayer:
        """A layer of four packed weights; see `FourProducts`."""
        norms = weights.norm_attention, weights.norm_mlp
        four = FourProducts(norms, qkv, up, dense, down)
        activation = self.activation(weights.activation)
        width = weights.query_key_value[0].out_features
        return PackedLayer(four, four, weights.eps, activation, width)

    def layer_front(self, x: Tensor, packed: PackedLayer) -> tuple[Tensor, Tensor]:
        """Everything up to attention: x [T, C] to qkv [T, 3W] and the activated MLP [T, F].

        qkv may also come as a view [T, H, 3, D] of whatever layout suits the device.
        """
        front = packed.front
        if isinstance(front, FourProducts):
            n = packed.qkv_width
            y = front.qkv.multiply(self, self.layer_norm(x, *front.norms[0], packed.eps))
            if front.up is None:
                return y[:, :n], packed.activation(y[:, n:])
            up = front.up.multiply(self, self.layer_norm(x, *front.norms[1], packed.eps))
            return y, packed.activation(up)
        x = F.layer_norm(x, x.shape[-1:], packed.scale, packed.shift, packed.eps)
        y = self.linear(x, front)
        n = packed.qkv_width
        return y[:, :n], packed.activation(y[:, n:])

    def layer_back(
        self, attended: Tensor, mlp: Tensor, packed: PackedLayer, residual: Tensor | None = None
    ) -> Tensor:
        """attended [T, W] and mlp [T, F] to this rank's partial sum [T, C].

        With `residual` [T, C] the sum with it, which may be written over it.
        """
        back = packed.back
        if isinstance(back, FourProducts):
            partial = back.down.multiply(self, mlp) + back.dense.multiply(self, attended)
        else:
            partial = self.linear(torch.cat((attended, mlp), 1), back)
        return partial if residual is None else residual + partial

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """x [T, C]; statistics in fp32."""
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)

    def activation(self, name: str) -> Callable[[Tensor], Tensor]:
        """The operator behind a value of `config.ACTIVATIONS`."""
        return {
            "gelu_erf": F.gelu,
            "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
            "silu": F.silu,
            "relu": F.relu,
        }[name]

    def pack_rotary(self, cos: Tensor, sin: Tensor, head_dim: int, *, fused: bool) -> RotaryTables:
        """Tables [max_positions, R/2] as `rotary` wants them; `fused`: for `layer_front`'s q, k."""
        return RotaryTables(cos.to(self.torch_device), sin.to(self.torch_device))

    def rotary(
        self, q: Tensor, k: Tensor, positions: Tensor, cos_table: Tensor, sin_table: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotate the first R of D dimensions, pairing i with i + R/2 (half rotation).

        q, k: [T, H, D], any strides; positions [T]; tables [max_positions, R/2] fp32.
        Returns new q and k, [T, H, D]; the arithmetic is fp32. Source: HF apply_rotary_pos_emb.
        """
        cos = cos_table[positions].unsqueeze(1)  # [T, 1, R/2]
        sin = sin_table[positions].unsqueeze(1)
        half = cos.shape[-1]

        def rotate(x: Tensor) -> Tensor:
            first, second = x[..., :half].float(), x[..., half : 2 * half].float()
            out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            out[..., :half] = first * cos - second * sin
            out[..., half : 2 * half] = second * cos + first * sin
            out[..., 2 * half :] = x[..., 2 * half :]
            return out

        return rotate(q), rotate(k)

    def greedy(self, logits: Tensor) -> Tensor:
        """The largest of each row of logits [S, V], then 1 if all add up finite: [S + 1] int64."""
        finite = logits.sum(dtype=torch.float32).isfinite()
        return torch.cat((logits.argmax(-1), finite.view(1).to(torch.int64)))

    # -- steps and attention ---------------------------------------------------------------------

    def begin(
        self,
        batch: ForwardBatch,
        caches: Sequence[LayerCache],
        tables: RotaryTables,
        scale: float,
    ) -> Step:
        """A step over a paged cache, `caches` as `allocate_kv_cache` made them."""
        return self.paged_step(self, batch, caches, tables, scale)

    def begin_padded(
        self,
        batch: PaddedBatch,
        caches: Sequence[LayerCache],
        tables: RotaryTables,
        scale: float,
    ) -> Step:
        """A step over a contiguous cache, `caches` as `allocate_rows` made them."""
        return self.padded_step(self, batch, caches, tables, scale)

    def allocate_kv_cache(self, shape: CacheShape, kv_format: KVFormat) -> LayerCache:
        """The cache of one layer in blocks; the content is undefined."""
        return self.allocate_rows(shape, kv_format)

    def allocate_rows(self, shape: CacheShape, kv_format: KVFormat) -> LayerCache:
        """The cache of one layer for a padded batch, a block for each row; likewise."""
        return kv_format.allocate(
            shape, lambda size, dtype: torch.empty(size, dtype=dtype, device=self.torch_device)
        )

    def causal_attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """One sequence: q [S, H, D] are the last S of the L positions of k, v [L, H, D].

        As `dense_attention` here, whatever a device's own is; returns [S, H, D].
        """
        return Operators.dense_attention(self, q[None], k[None], v[None], None, scale)[0]

    def dense_attention(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
    ) -> Tensor:
        """Causal attention of a padded batch over contiguous keys and values.

        q [B, S, H, D] are the last S of the L positions of k, v [B, L, H, D]; key_mask [B, L] is
        False at padding, or None when there is none. A padding query sees itself, so that its
        row, which is not used, stays finite. Returns [B, S, H, D].

        The query is scaled before the product and everything up to the weighted sum is fp32, so
        fp16 scores cannot overflow. Source: HF eager_attention_forward, in higher precision.
        """
        scores = torch.einsum("bshd,blhd->bhsl", q.float() * scale, k.float())
        visible = dense_visibility(q.shape[1], k.shape[1], key_mask, q.device)
        probs = scores.masked_fill_(~visible, -math.inf).softmax(-1)
        return torch.einsum("bhsl,blhd->bshd", probs, v.float()).to(q.dtype)

    # -- graphs ----------------------------------------------------------------------------------

    def capture(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` of a batch, replayed as one launch where the device has graphs."""
        if self.graphs == "on":
            logger.warning(
                "graphs are on, but %s has none: steps run as they are", self.device.name
            )
        return forward


# -- integers ------------------------------------------------------------------------------------


def split_pairs(pairs: Tensor) -> Tensor:
    """Two values from 0 to 15 in each integer [F, K / 2], the even k in the low half: [F, K]."""
    return torch.stack((pairs & 15, pairs >> 4), 2).flatten(1)


# Products of int8 values that fp32 adds up exactly, in any order: 1024 * 128 * 128 = 2^24.
_EXACT_TERMS = 1024


def quantize_by(x: Tensor, inputs: InputRange) -> tuple[Tensor, Tensor]:
    """Round x [T, K] by a given scale and offset; what lies outside takes the nearest value.

    Returns:
        int8 [T, K], and fp32 [T]: 1, or NaN for a row that holds a value which is not finite.
    """
    wide = x.float()
    values = (wide / inputs.scale + inputs.offset).round_()
    values = torch.nan_to_num_(values, 0.0).clamp_(-128, 127).to(torch.int8)
    return values, torch.where(wide.isfinite().all(1), 1.0, math.nan)


def dense_visibility(
    num_queries: int, num_keys: int, key_mask: Tensor | None, device: torch.device
) -> Tensor:
    """Which key each query sees, bool [B or 1, 1, S, L]."""
    offset = num_keys - num_queries
    causal = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(offset)
    if key_mask is None:
        return causal[None, None]
    itself = causal.triu(offset)
    return (causal & key_mask[:, None, None, :]) | itself


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
) -> Tensor:
    """`Operators.dense_attention` by torch's fused kernels, which keep no matrix of scores."""
    s, length = q.shape[1], k.shape[1]
    mask = None
    if key_mask is not None or 1 < s < length:
        mask = dense_visibility(s, length, key_mask, q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and s > 1,
        scale=scale,
    )
    return out.transpose(1, 2)
