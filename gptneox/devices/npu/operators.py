# SPDX-License-Identifier: Apache-2.0
"""A model on an Ascend NPU: the operators that its shapes allow, and their layouts."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptneox.config.errors import ConfigError
from gptneox.devices.cache import CacheShape, FloatKV, Int8KV, KVFormat, LayerCache
from gptneox.devices.device import Finding
from gptneox.devices.graphs import MAX_PADDING, DecodeGraphs
from gptneox.devices.npu.attention import (
    ACL_FORMAT_NZ,
    MAX_HEAD_DIM,
    A2Attention,
    PlainAttention,
    choose_attention,
    choose_int8_attention,
    has_cache_write,
)
from gptneox.devices.npu.steps import NpuPaddedStep, NpuPagedStep
from gptneox.devices.operators import (
    ChosenOperator,
    FourProducts,
    InputRange,
    LayerWeights,
    Operators,
    PackedInt4,
    PackedInt8,
    PackedIntegers,
    PackedLayer,
    PackedLinear,
    split_pairs,
)
from gptneox.devices.step import ForwardBatch, RotaryTables

if TYPE_CHECKING:
    from gptneox.devices.npu.device import NpuDevice

logger = logging.getLogger(__name__)

MAX_GRAPH_ROWS = 128  # of a captured step
# npu_weight_quant_batchmatmul and npu_quant_matmul take at most this many inputs and outputs.
MAX_QUANT_SIZE = 65535
# Groups of weights of four bits are multiples of this many inputs, and outputs of this many.
INT4_GROUP, INT4_COLUMNS = 32, 8
# At most this factor lifts scales of groups that float16 cannot hold: sums must not overflow.
MAX_LIFT = 64.0


def has_graph_updates(torch_npu: Any) -> bool:
    """Whether captured operators can be given new arguments; torch_npu 2.5 cannot do that."""
    return "auto_dispatch_capture" in inspect.signature(torch_npu.npu.graph).parameters


@dataclass
class NpuInt8(PackedInt8):
    """int8 [F, K], passed transposed, and scales [F] in the dtype of x.

    `factor` [F] lifts the outputs of rows whose scale the dtype cannot hold to full accuracy; None
    where there are none. The bias is then added behind it.
    """

    factor: Tensor | None = None

    def multiply(self, ops: Operators, x: Tensor) -> Tensor:
        """By npu_weight_quant_batchmatmul, which adds its offset: symmetric weights have none.

        Source: op-plugin, npu_weight_quant_batchmatmul, per channel with a transposed weight.
        """
        assert isinstance(ops, NpuOperators)
        product = ops.torch_npu.npu_weight_quant_batchmatmul
        return with_factor(
            functools.partial(product, x, self.weight.t(), self.scale), self.factor, self.bias
        )


@dataclass
class NpuInt4(PackedInt4):
    """As npu_convert_weight_to_int4pack lays out int4 [K, F]: int32 [K, F / 8].

    Scales and zeros are [G, F] in the dtype of x. Zeros are what the operator adds to a value from
    -8 to 7. `factor` is as that of `NpuInt8`.
    """

    factor: Tensor | None = None

    def multiply(self, ops: Operators, x: Tensor) -> Tensor:
        """By npu_weight_quant_batchmatmul.

        Source: op-plugin, npu_weight_quant_batchmatmul, per group; a single one is per channel.
        """
        assert isinstance(ops, NpuOperators)
        num_groups = len(self.scale)
        product = functools.partial(
            ops.torch_npu.npu_weight_quant_batchmatmul,
            *(x, self.weight, self.scale, self.zero),
            antiquant_group_size=0 if num_groups == 1 else self.in_features // num_groups,
        )
        return with_factor(product, self.factor, self.bias)


def bias_to_add(bias: Tensor | None, factor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As `with_factor` takes it: the operator itself adds a bias of fp32 to bf16 products."""
    if bias is not None and factor is None and dtype == torch.bfloat16:
        return bias.float()
    return bias


def with_factor(
    product: Callable[..., Tensor], factor: Tensor | None, bias: Tensor | None
) -> Tensor:
    """A product that adds its bias itself, or one whose outputs take a factor before the bias."""
    if factor is None:
        return product(bias=bias)
    y = product().mul_(factor)
    return y if bias is None else y.add_(bias)


@dataclass
class NpuStatic(PackedIntegers):
    """int8 [F, K], passed transposed, and what npu_quantize takes, [1] in the dtype of x each."""

    factor: Tensor  # of inputs: one over their scale
    offset: Tensor


@dataclass
class NpuLayer(PackedLayer):
    """The front product gives q, k and v of all heads as three blocks, in `head_order`."""

    head_dim: int = 0


class NpuOperators(Operators):
    """Chosen for the chip and the model's shapes."""

    fuses_layers = True
    paged_step, padded_step = NpuPagedStep, NpuPaddedStep
    device: NpuDevice

    def __init__(self, device: NpuDevice, graphs: str = "auto") -> None:
        super().__init__(device, graphs)
        self.torch_npu = device.torch_npu
        self._attention: PlainAttention | None = None  # of the cache, once there is one
        self._head_dim = self._rotary_dim = 0
        self._cache_shape = CacheShape(0, 0, 0, 0)  # as asked for
        self._num_positions = 0
        self._has_warned = False  # of weights of four bits that are widened

    def prepare(self, head_dim: int, rotary_dim: int) -> None:
        """Keep the sizes by which the rows of the front product are ordered."""
        self._head_dim, self._rotary_dim = head_dim, rotary_dim

    def operator_table(
        self, head_dim: int, rotary_dim: int, block_size: int, kv_format: KVFormat
    ) -> list[ChosenOperator]:
        """Every operator of a layer that this chip gives a choice of, with the reason."""
        paged, paged_reason = self._choose_paged(head_dim, block_size, kv_format)
        dense, dense_reason = self._choose_dense(head_dim, kv_format)
        rotary = ChosenOperator(
            "rotary", "npu_rotary_mul", f"{rotary_dim} of {head_dim} dimensions are rotated"
        )
        if self.device.is_310p:
            reason = "npu_rotary_mul falls apart into six kernels; ATB's keeps its first table"
            rotary = ChosenOperator("rotary", "torch, fp32", reason)
        is_written_plainly = not self.device.is_310p and not has_cache_write(self.torch_npu)
        cache_write = ChosenOperator(
            "cache write",
            "index_copy_",
            "slower: npu_scatter_pa_kv_cache of this torch_npu has no cache_mode, later ones have",
        )
        weights = ChosenOperator("weights", "ND", "NZ is off by default on A2")
        if self.device.is_310p:
            weights = ChosenOperator("weights", "NZ", "the chip's own layout for products")
        return [
            *([cache_write] if is_written_plainly else []),
            ChosenOperator("paged attention", paged.operator, paged_reason),
            ChosenOperator("flash attention", dense.operator, dense_reason),
            rotary,
            ChosenOperator("gelu", "npu_gelu", "F.gelu is the tanh form whatever it is asked for"),
            ChosenOperator(
                "layer",
                "two products",
                "with a parallel residual and float weights; four with others",
            ),
            ChosenOperator(
                "W8A16 weights",
                "npu_weight_quant_batchmatmul",
                "int8 [F, K] in ND; the scales are in the dtype of the activations",
            ),
            ChosenOperator("W4A16 weights", "none", "the operator takes eight bits only on a 310P")
            if self.device.is_310p
            else ChosenOperator(
                "W4A16 weights",
                "npu_weight_quant_batchmatmul",
                f"int4 [K, F]; groups that {INT4_GROUP} does not divide: torch, widened",
            ),
            ChosenOperator(
                "W8A8 weights",
                "npu_quant_matmul",
                "inputs by one scale for each layer; a scale for each token is of A2"
                if self.device.is_310p
                else "int8 [F, K] in ND; inputs by npu_dynamic_quant or npu_quantize",
            ),
            ChosenOperator("decode steps", "as they are", self._about_graphs()),
            weights,
        ]

    def _choose_paged(
        self, head_dim: int, block_size: int, kv_format: KVFormat
    ) -> tuple[type[PlainAttention], str]:
        if isinstance(kv_format, Int8KV):
            return choose_int8_attention(self.device.is_310p, head_dim, block_size)
        return choose_attention(self.device.is_310p, self.device.has_atb, head_dim, block_size)

    def _choose_dense(self, head_dim: int, kv_format: KVFormat) -> tuple[type[PlainAttention], str]:
        """For the flash path, which has no blocks: with a block size that sets no limit."""
        return self._choose_paged(head_dim, 16 if self.device.is_310p else 128, kv_format)

    def describe_operators(
        self, head_dim: int, rotary_dim: int, block_size: int, kv_format: KVFormat
    ) -> list[Finding]:
        """The operator table of a model."""
        try:
            table = self.operator_table(head_dim, rotary_dim, block_size, kv_format)
        except ConfigError as error:
            return [Finding(False, "operators", str(error))]
        return [Finding(True, c.part, f"{c.operator} ({c.reason})") for c in table]

    # -- dense operators -------------------------------------------------------------------------

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """On a 310P in NZ, the last step after slicing; `weight` is on the device already."""
        out_features, in_features = weight.shape
        weight = weight.contiguous()
        if self.device.is_310p:
            weight = self.torch_npu.npu_format_cast(weight, ACL_FORMAT_NZ)
        return PackedLinear(weight, bias, in_features, out_features)

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """With an NZ weight the bias is added apart: torch_npu would first scale it by one."""
        if not self.device.is_310p or packed.bias is None:
            return super().linear(x, packed)
        return F.linear(x, packed.weight).add_(packed.bias)

    def pack_int8(
        self, values: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> PackedLinear:
        """int8 [F, K] as it is: the operator's NZ form is for graphs of another kind.

        Scales that are subnormal in `dtype` would lose accuracy, or be flushed to zero: the
        operator gets the smallest normal number instead, and the rest is a factor of the output.

        Raises:
            ConfigError: the operator does not take a matrix of this size.
        """
        out_features, in_features = check_quant_size(values, "npu_weight_quant_batchmatmul")
        factor, lifted = None, scale.clamp_min(torch.finfo(dtype).tiny)
        if ((scale != lifted) & (scale != 0)).any():
            factor, scale = (scale / lifted).to(dtype), lifted
        bias = bias_to_add(bias, factor, dtype)
        return NpuInt8(
            values.contiguous(), bias, in_features, out_features, scale.to(dtype), factor
        )

    def pack_int4(
        self,
        values: Tensor,
        scale: Tensor,
        zero: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> PackedLinear:
        """int4 [K, F], where the operator takes the groups; else as the base class, with a warning.

        The operator adds a zero to a value and multiplies by a scale, all in `dtype`. A row of
        float16 that has subnormal scales is lifted by a power of two, up to `MAX_LIFT`; what is
        subnormal even then, weights below 1e-5, becomes zero.

        Raises:
            ConfigError: on a 310P.
        """
        if self.device.is_310p:
            raise ConfigError(
                "w4a16: npu_weight_quant_batchmatmul takes weights of eight bits only on a 310P; "
                "quantize with --quant_type w8a16 for it"
            )
        (out_features, half), num_groups = values.shape, scale.shape[1]
        if fault := int4_fault(2 * half, out_features, num_groups):
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "w4a16: %s, so such weights are widened for each product, which is slow", fault
                )
            return super().pack_int4(values, scale, zero, bias, dtype)
        numbers = split_pairs(values.to(torch.int32)).sub_(8)  # [F, K]
        packed = self.torch_npu.npu_convert_weight_to_int4pack(numbers.t().contiguous())
        tiny = torch.finfo(dtype).tiny
        smallest = scale.masked_fill(scale == 0, 1.0).amin(1)
        lift = torch.exp2(torch.ceil(torch.log2(tiny / smallest))).clamp(1.0, MAX_LIFT)  # [F]
        factor = None
        if (lift > 1).any():
            factor, scale = (1 / lift).to(dtype), scale * lift.unsqueeze(1)
            scale = scale.masked_fill(scale < tiny, 0.0)
        return NpuInt4(
            *(packed, bias_to_add(bias, factor, dtype), 2 * half, out_features),
            scale=scale.t().to(dtype).contiguous(),
            zero=(8 - zero.to(dtype)).t().contiguous(),
            factor=factor,
        )

    def pack_integers(
        self,
        values: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        inputs: InputRange | None = None,
        start: Tensor | None = None,
    ) -> PackedLinear:
        """int8 [F, K] in ND, passed transposed.

        npu_quantize takes the inverse of the inputs' scale in the dtype of x. What it loses there
        (up to 0.4 % in bf16) the scale of the product makes up for, and the start, as far as it is
        a bias. Only what is cut off at the range's ends differs by half a step.

        With given inputs the scale of the product is one of 19 bits for models of fp16, as
        npu_trans_quant_param makes it: it cuts, so it is given the nearest. A bias apart from the
        start is zero where the start holds it, and then it is not added.

        Source: op-plugin, npu_quantize: with div_mode False the scales have the type of the input.

        Raises:
            ConfigError: the chip has no such product, or not of this size, or the inputs' scale
                does not fit the dtype.
        """
        out_features, in_features = check_quant_size(values, "npu_quant_matmul")
        if inputs is None:
            if self.device.is_310p:
                raise ConfigError(
                    "w8a8_dynamic: npu_quant_matmul takes no scale for each token on a 310P; "
                    "quantize with --quant_type w8a8 or w8a16 for it"
                )
            bias = None if bias is None else bias.float()
            return PackedIntegers(
                values.contiguous(), bias, in_features, out_features, scale, None, None
            )
        if not torch.finfo(dtype).tiny <= 1 / inputs.scale <= torch.finfo(dtype).max:
            raise ConfigError(
                f"w8a8: the inputs of a layer have the scale {inputs.scale}, whose inverse {dtype} "
                "cannot hold; quantize again with this layer in --disable_names"
            )
        if bias is not None and not bias.any():
            bias = None
        given = (torch.tensor([v], dtype=dtype) for v in (1 / inputs.scale, inputs.offset))
        factor, offset = (t.to(self.torch_device) for t in given)
        kept = factor.item() * inputs.scale  # about 1
        scale = scale / kept
        start = values.new_zeros(out_features, dtype=torch.int32) if start is None else start
        sums = start + inputs.offset * values.sum(1, dtype=torch.int32)  # of the bias alone
        start = start + (sums.float() * (kept - 1)).round().to(torch.int32)
        if dtype == torch.float16:
            nearest = (scale.view(torch.int32) + 0x1000) & ~0x1FFF
            scale = self.torch_npu.npu_trans_quant_param(nearest.view(torch.float32))
        return NpuStatic(
            *(values.contiguous(), bias, in_features, out_features, scale, inputs, start),
            factor=factor,
            offset=offset,
        )

    def linear_integers(self, x: Tensor, packed: PackedIntegers) -> Tensor:
        """By npu_quant_matmul, behind npu_dynamic_quant or npu_quantize, which multiplies.

        Source: op-plugin, npu_quant_matmul, its tables of types for both chips.
        """
        product = functools.partial(
            self.torch_npu.npu_quant_matmul, x2=packed.weight.t(), output_dtype=x.dtype
        )
        if not isinstance(packed, NpuStatic):
            values, steps = self.torch_npu.npu_dynamic_quant(x)
            return product(values, scale=packed.scale, pertoken_scale=steps, bias=packed.bias)
        values = self.torch_npu.npu_quantize(
            x, packed.factor, packed.offset, torch.qint8, -1, False
        )
        y = product(values, scale=packed.scale, bias=packed.start)
        return y if packed.bias is None else y.add_(packed.bias)

    def activation(self, name: str) -> Callable[[Tensor], Tensor]:
        """F.gelu is always the tanh form on an NPU."""
        forms = {"gelu_erf": "none", "gelu_tanh": "tanh"}
        if name not in forms:
            return super().activation(name)
        approximate = forms[name]
        return lambda x: self.torch_npu.npu_gelu(x, approximate=approximate)

    def pack_layer(self, weights: LayerWeights) -> NpuLayer:
        """Rows of the front product in the order in which attention reads them; NZ comes last."""
        weight, bias = weights.query_key_value
        d, r = self._head_dim, self._rotary_dim
        rows = torch.arange(weight.out_features).view(-1, 3, d).transpose(0, 1)  # [3, H, D]
        if self._rotates_whole_heads(d):
            rows = torch.cat((rows[:2, :, head_order(d, r)], rows[2:]))
        order = rows.flatten().to(self.torch_device)
        weight = weight.take_rows(order)
        bias = None if bias is None else bias.index_select(0, order)
        packed = super().pack_layer(replace(weights, query_key_value=(weight, bias)))
        return NpuLayer(**vars(packed), head_dim=d)

    def layer_front(self, x: Tensor, packed: PackedLayer) -> tuple[Tensor, Tensor]:
        """Qkv as [T, H, 3, D]; the blocks of q, k and v are not copied here."""
        assert isinstance(packed, NpuLayer)
        if isinstance(packed.front, FourProducts):
            qkv, mlp = super().layer_front(x, packed)
            return self._split_heads(qkv, packed), mlp
        x = F.layer_norm(x, x.shape[-1:], packed.scale, packed.shift, packed.eps)
        y = self.linear(x, packed.front)
        n = packed.qkv_width
        return self._split_heads(y[:, :n], packed), packed.activation(y[:, n:])

    def _split_heads(self, qkv: Tensor, packed: NpuLayer) -> Tensor:
        return qkv.view(len(qkv), 3, -1, packed.head_dim).transpose(1, 2)

    def _rotates_whole_heads(self, head_dim: int) -> bool:
        """Whether q and k of fused layers lie in `head_order`: npu_rotary_mul then takes them as
        they are, with tables that leave the dimensions beyond R alone (cos 1, sin 0)."""
        return not self.device.is_310p and head_dim % 2 == 0 and head_dim <= MAX_HEAD_DIM

    def pack_rotary(self, cos: Tensor, sin: Tensor, head_dim: int, *, fused: bool) -> RotaryTables:
        """D/2 wide for q and k in `head_order`, else R/2."""
        self._num_positions = len(cos)
        if fused and self._rotates_whole_heads(head_dim):
            rest = head_dim // 2 - cos.shape[1]
            cos, sin = F.pad(cos, (0, rest), value=1.0), F.pad(sin, (0, rest))
        return super().pack_rotary(cos, sin, head_dim, fused=fused)

    def rotary(
        self, q: Tensor, k: Tensor, positions: Tensor, cos_table: Tensor, sin_table: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Q and k together."""
        angles = self.look_up(positions, RotaryTables(cos_table, sin_table), q.dtype)
        rotated = self.rotate(torch.stack((q, k)), angles)
        return rotated[0], rotated[1]

    def rotate(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """x [2, T, H, D], contiguous, which may be overwritten, by what `look_up` returned."""
        cos, sin = angles
        part = x[..., : cos.shape[-1]]
        if self.device.is_310p:
            wide = part.float()
            first, second = wide.chunk(2, -1)
            rotated = (wide * cos).addcmul_(torch.cat((second, first), -1), sin)
        else:
            rotated = self.torch_npu.npu_rotary_mul(part.contiguous(), cos, sin)
        if part.shape == x.shape:
            return rotated.to(x.dtype)
        part.copy_(rotated)
        return x

    def look_up(
        self, positions: Tensor, tables: RotaryTables, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """[1, T, 1, R]; on a 310P in fp32, sin with the sign of its half, else in `dtype`."""
        cos, sin = (t[positions][None, :, None] for t in tables)
        if self.device.is_310p:
            return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((sin, sin), -1).to(dtype)

    # -- attention -------------------------------------------------------------------------------

    def allocate_kv_cache(self, shape: CacheShape, kv_format: KVFormat) -> LayerCache:
        """In the layout of the chosen operators.

        Raises:
            ConfigError: no operator takes the block size.
            RuntimeError: not enough memory.
        """
        self._use(
            "paged attention", *self._choose_paged(shape.head_dim, shape.block_size, kv_format)
        )
        self._cache_shape = shape
        if not self._why_no_graphs():
            num_padding = -(-MAX_PADDING // shape.block_size)
            shape = shape._replace(num_blocks=shape.num_blocks + num_padding)
        try:
            assert self._attention is not None
            return self._attention.allocate(shape, kv_format)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"not enough NPU memory for the KV cache: {kv_format.layer_gib(shape):.2f} GiB per "
                f"layer asked, {self.device.memory().free / 2**30:.2f} GiB free; lower "
                "--num_blocks or --memory_fraction"
            ) from error

    def allocate_rows(self, shape: CacheShape, kv_format: KVFormat) -> LayerCache:
        """For the flash path: ND, with the scales of an int8 cache as its operators want them."""
        self._use("flash attention", *self._choose_dense(shape.head_dim, kv_format))
        if isinstance(kv_format, Int8KV):
            assert self._attention is not None
            return self._attention.allocate(shape, kv_format)
        return super().allocate_rows(shape, kv_format)

    def _use(self, what: str, kind: type[PlainAttention], reason: str) -> None:
        """Attention by operators of `kind`, which is said once."""
        if type(self._attention) is kind:
            return
        self._attention = kind(self.torch_npu, self.torch_device)
        level = logging.WARNING if "slower" in reason else logging.INFO
        logger.log(level, "%s: %s (%s)", what, kind.operator, reason)

    def attention_for(self, head_dim: int) -> PlainAttention:
        """The operators that the cache was allocated for; on the flash path those of the heads."""
        if self._attention is None:
            kv_format = FloatKV(torch.float16)
            self._use("flash attention", *self._choose_dense(head_dim, kv_format))
        assert self._attention is not None
        return self._attention

    # -- graphs ----------------------------------------------------------------------------------

    def _graph_limit(self) -> str:
        """Why steps cannot be captured here at all; "" where they can."""
        if self.device.is_310p:
            return "the update of a captured operator is documented for Atlas A2 only"
        if not has_graph_updates(self.torch_npu):
            return "this torch_npu has no update of captured operators, later ones have"
        return ""

    def _about_graphs(self) -> str:
        return f"graphs: {self._graph_limit() or '--graphs on, untried on a card'}"

    def _why_no_graphs(self) -> str:
        """Empty when decode steps are captured."""
        if self.graphs != "on":
            return "graphs are off until a card has confirmed them; --graphs on"
        if limit := self._graph_limit():
            return limit
        if not isinstance(self._attention, A2Attention):
            return "attention in plain torch takes its lengths from the host"
        return ""

    def capture(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Graphs where they were asked for; where there are none, that is said.

        FIA takes its key lengths from the host, where a graph has frozen them: torch_npu's
        automatic dispatch keeps each call as a task whose arguments are updated before a replay.
        Rows beyond a batch write to slots of their own behind the cache's last block and read one
        key there: slots must differ, and none may be negative.

        Source: op-plugin, torch.npu.graph(auto_dispatch_capture=True), NPUGraph.update and
        graph_task_update_begin.
        """
        if reason := self._why_no_graphs():
            if self.graphs == "on":
                logger.warning("graphs are on, but decode steps run as they are: %s", reason)
            return forward
        scratch_block, block_size = self._cache_shape[:2]
        first = scratch_block * block_size
        scratch_slots = torch.arange(first, first + MAX_PADDING, device=self.torch_device)
        pools: list[Any] = []

        def record(batch: ForwardBatch) -> tuple[Callable[[], None], Tensor]:
            forward(batch)  # so that everything lazy has happened
            npu = self.torch_npu.npu
            graph = npu.NPUGraph()
            with npu.graph(graph, pool=pools[0] if pools else None, auto_dispatch_capture=True):
                hidden = forward(batch)
            if not pools:
                pools.append(graph.pool())
            logger.info("captured the decode step of %d sequences", batch.num_decodes)

            return functools.partial(replay, graph, batch), hidden

        def pad(batch: ForwardBatch, num_rows: int) -> None:
            num_padding = batch.num_decodes - num_rows
            batch.slot_mapping[num_rows:].copy_(scratch_slots[:num_padding])
            batch.context_lens[num_rows:].fill_(1)
            batch.block_tables[num_rows:].fill_(scratch_block)
            batch.context_lens_list[num_rows:] = [1] * num_padding

        return DecodeGraphs(
            forward,
            record,
            self.torch_device,
            min(scratch_block, -(-self._num_positions // block_size)),
            pad=pad,
            max_rows=MAX_GRAPH_ROWS,
        )


def check_quant_size(values: Tensor, operator: str) -> tuple[int, int]:
    """The shape of a weight [F, K].

    Raises:
        ConfigError: the operator does not take a matrix of this size.
    """
    out_features, in_features = values.shape
    if max(out_features, in_features) > MAX_QUANT_SIZE:
        raise ConfigError(
            f"{operator} takes at most {MAX_QUANT_SIZE} inputs and outputs; "
            f"a weight is [{out_features}, {in_features}]: quantize again with this layer in "
            "--disable_names, or use more ranks"
        )
    return out_features, in_features


def int4_fault(in_features: int, out_features: int, num_groups: int) -> str:
    """Why npu_weight_quant_batchmatmul does not take such a weight of four bits; or empty."""
    if max(in_features, out_features) > MAX_QUANT_SIZE:
        return f"a weight is [{out_features}, {in_features}], and at most {MAX_QUANT_SIZE} fit"
    if out_features % INT4_COLUMNS:
        return f"a weight has {out_features} outputs, no multiple of {INT4_COLUMNS}"
    if num_groups > 1 and in_features // num_groups % INT4_GROUP:
        return f"groups have {in_features // num_groups} inputs, no multiple of {INT4_GROUP}"
    return ""


def replay(graph: Any, batch: ForwardBatch) -> None:
    """Run a captured step with the context lengths that its batch holds now.

    The replay before it is over, since its tokens have been read; an update during one is lost.
    """
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": batch.context_lens_list}])
    graph.replay()


def head_order(head_dim: int, rotary_dim: int) -> list[int]:
    """Dimensions of q and k in an order that makes the rotation of R of D one of all D.

    Pair i of the half rotation is (i, i + R/2); it moves to (i, i + D/2), and what is not rotated
    fills the rest of both halves. q and k are permuted alike, so their products stay what they are.
    """
    half, rest = rotary_dim // 2, (head_dim - rotary_dim) // 2
    ends = (half, rotary_dim, rotary_dim + rest, head_dim)
    first, second, third, fourth = (
        list(range(a, b)) for a, b in zip((0, *ends[:3]), ends, strict=True)
    )
    return first + third + second + fourth
