# SPDX-License-Identifier: Apache-2.0
"""CPU with kernels of our own, which `build` compiles from `src/`.

Activations are fp32 between the products, whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gptneox.devices.cache import CacheShape, KVFormat, LayerCache
from gptneox.devices.cpu import blocked
from gptneox.devices.cpu.device import CpuDevice
from gptneox.devices.cpu.operators import CpuOperators
from gptneox.devices.device import Device, Finding
from gptneox.devices.operators import (
    FourProducts,
    InputRange,
    LayerWeights,
    PackedIntegers,
    PackedLayer,
    PackedLinear,
)
from gptneox.devices.step import ForwardBatch, PaddedBatch, PagedStep, RotaryTables, Step

# The most inputs whose products add up in 32 bits.
MAX_INTEGER_INPUTS = 65535
# The numbers that the kernels know activations by.
ACTIVATION_IDS = {"gelu_erf": 1, "gelu_tanh": 2, "silu": 3, "relu": 4}


class CompiledStep(PagedStep):
    """The cache is read in place; a step's tensors are checked once."""

    runs_all_layers = True

    def __init__(
        self,
        ops: CompiledCpuOperators,
        batch: ForwardBatch,
        caches: Sequence[LayerCache],
        tables: RotaryTables,
        scale: float,
    ) -> None:
        super().__init__(ops, batch, caches, tables, scale)
        self._step: Any = ops.kernels.Step(
            cache=caches[0].k,
            positions=batch.positions,
            cos=tables.cos,
            sin=tables.sin,
            slots=batch.slot_mapping,
            block_tables=batch.block_tables,
            cu_seqlens=batch.cu_seqlens_q,
            context_lens=batch.context_lens,
            num_decodes=batch.num_decodes,
            scale=scale,
            starts=batch.starts,
        )

    def attend(self, layer_id: int, qkv: Tensor) -> Tensor:
        """One call."""
        out = self._step.attend(qkv, self.caches[layer_id])
        assert isinstance(out, Tensor)
        return out

    def run(self, x: Tensor, layers: Sequence[PackedLayer]) -> Tensor:
        """One call for all layers, where each has its kernels; x is overwritten."""
        if any(isinstance(layer.front, FourProducts) for layer in layers):
            return super().run(x, layers)
        self._step.run(x, [layer.front for layer in layers], self.caches)
        return x


class CompiledCpuDevice(CpuDevice):
    """Any CPU that the kernels compile for: AVX-512, AVX2, or vectors of four floats."""

    def __init__(self, kernels: ModuleType) -> None:
        """Take what `build.load` returned."""
        super().__init__()
        self.kernels: Any = kernels

    def operators(self, graphs: str = "auto") -> CompiledCpuOperators:
        """See `Device.operators`."""
        return CompiledCpuOperators(self, graphs)

    def measure_matmul(self, dtype: torch.dtype) -> float:
        """The best that this processor gives: by the kernels, or by plain torch."""
        return max(super().measure_matmul(dtype), CpuDevice().measure_matmul(dtype))

    def diagnose(self) -> list[Finding]:
        """The processor, and what its kernels were compiled for."""
        findings = Device.diagnose(self)
        text = f"{self.kernels.describe()}; {blocked.describe(self.kernels)}"
        return [*findings, Finding(True, "CPU kernels", text)]

    def resolve_dtype(self, file_dtype: str, requested: str) -> tuple[torch.dtype, str]:
        """Every dtype runs as it is."""
        return Device.resolve_dtype(self, file_dtype, requested)


class CompiledCpuOperators(CpuOperators):
    """Products, layers and attention by the kernels."""

    fuses_layers = True
    paged_step = CompiledStep

    def __init__(self, device: CompiledCpuDevice, graphs: str = "auto") -> None:
        super().__init__(device, graphs)
        self.kernels = device.kernels

    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        """Rows in fp32."""
        return F.embedding(ids, weight).float()

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """In panels."""
        return PackedLinear(
            self.kernels.pack(weight), _wide(bias), weight.shape[1], weight.shape[0]
        )

    def pack_int8(
        self, values: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> PackedLinear:
        """For a product of integers, with inputs of two digits, or three in a model of fp32.

        Without instructions for it, and for more inputs than it can add, in panels of bytes.
        """
        sizes = values.shape[1], values.shape[0]
        if "int8 dot products" not in self.kernels.describe() or sizes[0] > MAX_INTEGER_INPUTS:
            return PackedLinear(self.kernels.pack(values, scale), _wide(bias), *sizes)
        digits = 3 if dtype == torch.float32 else 2
        panels = self.kernels.pack_integers(values, scale, None, None, 0, digits)
        return PackedIntegers(panels, _wide(bias), *sizes, scale=scale, inputs=None, start=None)

    def pack_int4(
        self,
        values: Tensor,
        scale: Tensor,
        zero: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> PackedLinear:
        """In panels of half bytes, with scales and zeros; `linear` multiplies by them."""
        rounds, digits = dtype == torch.bfloat16, dtype != torch.float32
        packed = self.kernels.pack_int4(values, scale, zero, rounds, digits)
        return PackedLinear(packed, _wide(bias), 2 * values.shape[1], values.shape[0])

    def pack_integers(
        self,
        values: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        inputs: InputRange | None = None,
        start: Tensor | None = None,
    ) -> PackedLinear:
        """In panels of four neighbours, with scales and starts."""
        step, offset = inputs or (None, 0)
        panels = self.kernels.pack_integers(values, scale, start, step, offset, digits=1)
        sizes = values.shape[1], values.shape[0]
        return PackedIntegers(panels, _wide(bias), *sizes, scale=scale, inputs=inputs, start=None)

    def linear_integers(self, x: Tensor, packed: PackedIntegers) -> Tensor:
        """x [T, K]; returns [T, F], in fp32 until the end."""
        return self.kernels.linear_integers(x, packed.weight, packed.bias, 0).to(x.dtype)

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """x [T, K]; returns [T, F]."""
        return self.kernels.linear(x, packed.weight, packed.bias, 0).to(x.dtype)

    def pack_layer(self, weights: LayerWeights) -> PackedLayer:
        """Weights stay as they are: a second normalisation costs nothing here.

        The kernels for a layer take four weights whose inputs are all floats, of one format, or
        all integers; others are multiplied one by one.
        """
        linears = weights.linears()
        if any(weight.adjusts_inputs for weight, _ in linears):
            return self._pack_four(weights)
        packed = [weight.pack(self, None) for weight, _ in linears]
        make = self._layer_of([linear.weight for linear in packed])
        biases = _wide(weights.query_key_value[1]), _wide(weights.dense_h_to_4h[1])
        out_bias = weights.back_bias().contiguous()
        if make is None:
            qkv, up, _, down = packed
            qkv.bias, up.bias, down.bias = *biases, out_bias
            return self._four_products(weights, *packed)
        norms = weights.norm_attention, weights.norm_mlp
        layer = make(
            norms=[t.float().contiguous() for norm in norms for t in norm],
            weights=[linear.weight for linear in packed],
            biases=[*biases, out_bias],
            eps=weights.eps,
            activation=ACTIVATION_IDS[weights.activation],
        )
        act = self.activation(weights.activation)
        return PackedLayer(layer, layer, weights.eps, act, packed[0].out_features)

    def _layer_of(self, panels: Sequence[Any]) -> Callable[..., Any] | None:
        """What makes a layer of four packed weights; None where there is no such kind."""
        if all(isinstance(each, self.kernels.PackedIntegers) for each in panels):
            make = self.kernels.IntegerLayer
        elif all(isinstance(each, self.kernels.Packed) for each in panels):
            make = self.kernels.FloatLayer if len({each.format for each in panels}) == 1 else None
        else:
            make = None
        return cast("Callable[..., Any] | None", make)

    def layer_front(self, x: Tensor, packed: PackedLayer) -> tuple[Tensor, Tensor]:
        """x [T, C]; returns qkv [T, 3W] and the activated MLP as `layer_back` reads it."""
        if isinstance(packed.front, FourProducts):
            return super().layer_front(x, packed)
        qkv, mlp = packed.front.front(x)
        return qkv, mlp

    def layer_back(
        self, attended: Tensor, mlp: Tensor, packed: PackedLayer, residual: Tensor | None = None
    ) -> Tensor:
        """attended [T, W] and `layer_front`'s MLP; the partial sum [T, C], or added in place."""
        if isinstance(packed.back, FourProducts):
            return super().layer_back(attended, mlp, packed, residual)
        partial = packed.back.back(attended, mlp, residual)
        assert isinstance(partial, Tensor)
        return partial

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """x [T, C]; statistics in fp32."""
        if x.dtype != torch.float32:
            return super().layer_norm(x, weight, bias, eps)
        out = self.kernels.layer_norm(x, weight, bias, eps)
        assert isinstance(out, Tensor)
        return out

    def greedy(self, logits: Tensor) -> Tensor:
        """One pass over the logits."""
        if logits.dtype != torch.float32:
            return super().greedy(logits)
        out = self.kernels.greedy(logits)
        assert isinstance(out, Tensor)
        return out

    # -- steps and attention ---------------------------------------------------------------------

    def begin_padded(
        self,
        batch: PaddedBatch,
        caches: Sequence[LayerCache],
        tables: RotaryTables,
        scale: float,
    ) -> Step:
        """Padding in front is skipped, other padding masked by torch."""
        paged = batch.as_paged(capacity=caches[0].k.shape[1])
        if paged is None:
            return super().begin_padded(batch, caches, tables, scale)
        return CompiledStep(self, paged, caches, tables, scale)

    def allocate_rows(self, shape: CacheShape, kv_format: KVFormat) -> LayerCache:
        """All tokens of a head lie together in a block: [N, H, P, …] transposed."""

        def empty(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            n, p, h, *rest = size
            tensor = self.kernels.allocate((n, h, p, *rest), torch.empty(0, dtype=dtype))
            assert isinstance(tensor, Tensor)
            return tensor.transpose(1, 2)

        return kv_format.allocate(shape, empty)


def _wide(bias: Tensor | None) -> Tensor | None:
    """A bias as the kernels add it."""
    return None if bias is None else bias.float().contiguous()
