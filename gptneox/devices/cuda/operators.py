# SPDX-License-Identifier: Apache-2.0
"""A model on an NVIDIA GPU: Triton kernels around paged attention, decode steps as CUDA graphs."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptneox.devices.cache import CacheShape, KVFormat, LayerCache
from gptneox.devices.device import Finding
from gptneox.devices.graphs import DecodeGraphs
from gptneox.devices.operators import (
    ChosenOperator,
    InputRange,
    LayerWeights,
    Operators,
    PackedInt4,
    PackedInt8,
    PackedIntegers,
    PackedLayer,
    PackedLinear,
    fused_attention,
)
from gptneox.devices.step import ForwardBatch, PagedStep, RotaryTables

if TYPE_CHECKING:
    from gptneox.devices.cuda.device import CudaDevice

logger = logging.getLogger(__name__)

# Below it Triton has no tensor cores, and tiles do not fit the shared memory.
MIN_CAPABILITY = (8, 0)
# torch._int_mm takes more than 16.
MIN_INTEGER_ROWS = 32


class TritonStep(PagedStep):
    """Rotation and writing in one kernel, then attention."""

    ops: CudaOperators
    num_splits = 0  # programs that share one context; 0: as the kernels choose

    def attend(self, layer_id: int, qkv: Tensor) -> Tensor:
        """See `Step`."""
        kernels, batch, layer = load_kernels(), self.batch, self.caches[layer_id]
        rotary = (self.positions, *self.tables)
        q = kernels.rotate_and_store(qkv, rotary, layer, batch.slot_mapping)
        out = torch.empty_like(q)
        if batch.num_decodes:
            splits = self.num_splits or kernels.num_splits(
                batch.num_decodes, qkv.shape[1], self.ops.device.num_cores
            )
            kernels.decode(q, layer, batch, out, self.scale, splits)
        if batch.num_decodes < len(batch.q_lens_list):
            kernels.prefill(q, layer, batch, out, self.scale)
        assert isinstance(out, Tensor)
        return out


class CudaOperators(Operators):
    """Triton kernels and CUDA graphs, each used where its trial on the device succeeds."""

    fuses_layers = True
    device: CudaDevice

    def __init__(self, device: CudaDevice, graphs: str = "auto") -> None:
        super().__init__(device, graphs)
        self._chosen_for: tuple[Any, ...] | None = None  # the shapes `paged_step` is right for
        self._reason = ""  # for it
        self._why_no_graphs = ""  # or empty
        self._num_blocks = 0
        self._int8_fault: str | None = None  # in the kernel of int8 products; None: not tried
        self._int4_fault: str | None = None  # likewise of four bits
        self._slow_groups: set[int] = set()  # sizes that the kernel of four bits does not take

    # -- which operators -------------------------------------------------------------------------

    def operator_table(
        self, num_heads: int, head_dim: int, block_size: int, kv_format: KVFormat
    ) -> list[ChosenOperator]:
        """Every operator that there is a choice of, with the reason; tries the kernels out."""
        self._choose_step(num_heads, head_dim, block_size, kv_format)
        has_kernels, has_graphs = self.paged_step is TritonStep, not self._why_no_graphs
        rows = []
        if self._int8_fault is not None:
            operator = "torch, widened" if self._int8_fault else "Triton"
            reason = self._int8_fault or "agrees with torch on this device"
            rows = [ChosenOperator("W8A16 products", operator, reason)]
        if self._int4_fault is not None:
            operator = "torch, widened" if self._int4_fault else "Triton"
            reason = self._int4_fault or "agrees with torch on this device"
            rows.append(ChosenOperator("W4A16 products", operator, reason))
        if self._slow_groups and not self._int4_fault:
            what = f"W4A16 in groups of {', '.join(map(str, sorted(self._slow_groups)))}"
            rows.append(ChosenOperator(what, "torch, widened", "slow: 32 does not divide them"))
        return [
            ChosenOperator(
                "paged attention", "Triton" if has_kernels else "torch, fp32", self._reason
            ),
            ChosenOperator(
                "decode step",
                "CUDA graphs" if has_graphs else "eager",
                self._why_no_graphs or "captured for each batch size that is met",
            ),
            ChosenOperator(
                "flash attention", "scaled_dot_product_attention", "the cache is contiguous"
            ),
            ChosenOperator(
                "layer",
                "two products",
                "with a parallel residual and float weights; four with others",
            ),
            ChosenOperator("W8A8 products", "torch._int_mm", "for sizes that 8 divides")
            if self.device.capability >= MIN_CAPABILITY
            else ChosenOperator("W8A8 products", "torch, fp32", "compute capability below 8.0"),
            *rows,
        ]

    def describe_operators(
        self, head_dim: int, rotary_dim: int, block_size: int, kv_format: KVFormat
    ) -> list[Finding]:
        """The operator table of a model, in half precision."""
        kv_format = replace(kv_format, dtype=torch.float16)
        table = self.operator_table(2, head_dim, block_size, kv_format)
        slow = ("torch, fp32", "eager")
        return [
            Finding(None if c.operator in slow else True, c.part, f"{c.operator} ({c.reason})")
            for c in table
        ]

    def _choose_step(
        self, num_heads: int, head_dim: int, block_size: int, kv_format: KVFormat
    ) -> None:
        """Decide once for the shapes of a cache, before its first request."""
        shapes = (num_heads, head_dim, block_size, kv_format)
        if self._chosen_for == (*shapes, self.graphs):
            return
        self._chosen_for, self.paged_step = (*shapes, self.graphs), PagedStep
        reason = self._find_fault_in_kernels(*shapes)
        if reason:
            self._reason, self._why_no_graphs = reason, "attention takes lengths from the host"
            logger.warning("paged attention: torch, fp32, which is slow (%s)", reason)
            return
        self.paged_step = TritonStep
        self._reason = "agrees with torch on this device"
        self._why_no_graphs = (
            "--graphs off" if self.graphs == "off" else self._find_fault_in_graphs()
        )
        if self._why_no_graphs and self.graphs != "off":
            logger.warning("decode steps run without graphs: %s", self._why_no_graphs)

    def _find_fault_in_kernels(
        self, num_heads: int, head_dim: int, block_size: int, kv_format: KVFormat
    ) -> str:
        """Empty when attention works here, else what is wrong and what to do."""
        return self._find_fault(
            lambda: self._try_kernels(num_heads, head_dim, block_size, kv_format)
        )

    def _find_fault(self, trial: Callable[[], tuple[float, float]]) -> str:
        """Empty when the difference that `trial` finds is within its limit."""
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; it comes with torch's CUDA builds: pip install triton"
        if self.device.capability < MIN_CAPABILITY:
            major, minor = self.device.capability
            name = self.device.describe()
            return f"the kernels need compute capability 8.0, {name} has {major}.{minor}"
        try:
            load_kernels()
            difference, limit = trial()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001  whatever a compiler raises
            text = " ".join(str(error).split())[:300]
            return (
                f"the kernels do not work here: {type(error).__name__}: {text}; Triton needs a C "
                "compiler (gcc) and a home or TRITON_CACHE_DIR that it can write to"
            )
        if not difference <= limit:  # also where it is NaN
            return (
                f"the kernels differ from torch by {difference:.1e}, {limit:.1e} is allowed; "
                "please report it with the output of main.py doctor"
            )
        return ""

    def _try_kernels(
        self, num_heads: int, head_dim: int, block_size: int, kv_format: KVFormat
    ) -> tuple[float, float]:
        """The largest difference from the base class over a small mixed step, and its limit.

        Two sequences decode, one behind a full block; a prompt follows a cached prefix.
        """
        heads, dtype = min(num_heads, 4), kv_format.dtype
        generator = torch.Generator().manual_seed(0)
        cached, new = [block_size + 3, 0, 5], [1, 1, 70]
        lengths = [c + n for c, n in zip(cached, new, strict=True)]
        counts = [-(-n // block_size) for n in lengths]
        blocks = torch.randperm(sum(counts), generator=generator).tolist()
        tables = [[blocks.pop() for _ in range(n)] for n in counts]
        width = max(counts)
        spans = [range(c, n) for c, n in zip(cached, lengths, strict=True)]
        slots = [
            t[p // block_size] * block_size + p % block_size
            for t, span in zip(tables, spans, strict=True)
            for p in span
        ]
        starts = [sum(new[:i]) for i in range(len(new) + 1)]

        def tensor(values: Any, kind: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=kind).to(self.torch_device)

        batch = ForwardBatch(
            input_ids=tensor([0] * len(slots), torch.int64),
            positions=tensor([p for span in spans for p in span], torch.int64),
            slot_mapping=tensor(slots, torch.int64),
            block_tables=tensor([t + [0] * (width - len(t)) for t in tables], torch.int32),
            cu_seqlens_q=tensor(starts, torch.int32),
            context_lens=tensor(lengths, torch.int32),
            q_lens_list=new,
            context_lens_list=lengths,
            num_decodes=2,
        )
        angles = torch.rand(max(lengths), max(1, head_dim // 8), generator=generator)
        rotary = RotaryTables(
            angles.cos().to(self.torch_device), angles.sin().to(self.torch_device)
        )

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.torch_device, dtype)

        qkv = random(len(slots), heads, 3, head_dim)
        shape = CacheShape(sum(counts), block_size, heads, head_dim)
        pair = [random(*shape) for _ in "kv"]
        results = []
        for splits in (0, 1, 2):
            layer = Operators.allocate_kv_cache(self, shape, kv_format)
            layer.write(..., *pair)
            arguments = (self, batch, [layer], rotary, head_dim**-0.5)
            step = TritonStep(*arguments) if splits else PagedStep(*arguments)
            if isinstance(step, TritonStep):
                step.num_splits = splits
            out = step.attend(0, qkv)
            results.append([x.float() for x in (out, *layer.read(...))])
        worst = torch.stack([
            (ours - theirs).abs().max()
            for other in results[1:]
            for ours, theirs in zip(other, results[0], strict=True)
        ]).max()  # fmt: skip
        largest = max(x.abs().max().item() for x in results[0])
        unit = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        return float(worst), 2 * unit * max(1.0, largest)

    def _find_product_fault(self, scheme: str, trial: Callable[[], tuple[float, float]]) -> str:
        """`_find_fault` of the products with quantized weights; says what runs instead."""
        fault = self._find_fault(trial)
        if fault:
            logger.warning(
                "%s products: torch, which widens the weights each time and is slow (%s)",
                scheme,
                fault,
            )
        return fault

    def _find_fault_in_graphs(self) -> str:
        """Empty when this device captures and replays."""
        x = torch.zeros(8, device=self.torch_device)
        try:
            replay, out = self.device.record(lambda: x + 1, [])
            x.fill_(2)
            replay()
            if out.tolist() != [3.0] * 8:
                return "a replayed graph did not read its new input"
        except RuntimeError as error:
            return " ".join(str(error).split())[:300]
        return ""

    # -- dense operators -------------------------------------------------------------------------

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """The weight is on the device already.

        Raises:
            RuntimeError: not enough memory.
        """
        try:
            return PackedLinear(weight.contiguous(), bias, weight.shape[1], weight.shape[0])
        except torch.OutOfMemoryError as error:
            raise self.device.out_of_memory("the weights", "a smaller --dtype") from error

    def pack_int8(
        self, values: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> PackedLinear:
        """The weight is on the device already. The first one decides about the kernel.

        Raises:
            RuntimeError: not enough memory.
        """
        if self._int8_fault is None:
            self._int8_fault = self._find_product_fault("W8A16", lambda: self._try_int8(dtype))
        try:
            sizes = values.shape[1], values.shape[0]
            return PackedInt8(values.contiguous(), bias, *sizes, scale=scale.contiguous())
        except torch.OutOfMemoryError as error:
            raise self.device.out_of_memory("the weights", "quantize the head, too") from error

    def linear_int8(self, x: Tensor, packed: PackedInt8) -> Tensor:
        """By the Triton kernel where it works."""
        if self._int8_fault or not len(x):
            return super().linear_int8(x, packed)
        out = load_kernels().linear_int8(x, packed.weight, packed.scale, packed.bias)
        assert isinstance(out, Tensor)
        return out

    def pack_integers(
        self,
        values: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        inputs: InputRange | None = None,
        start: Tensor | None = None,
    ) -> PackedLinear:
        """The weight is on the device already.

        Raises:
            RuntimeError: not enough memory.
        """
        sizes = values.shape[1], values.shape[0]
        try:
            values, scale = values.contiguous(), scale.contiguous()
        except torch.OutOfMemoryError as error:
            raise self.device.out_of_memory("the weights", "more devices") from error
        return PackedIntegers(values, bias, *sizes, scale=scale, inputs=inputs, start=start)

    def _multiply_integers(self, x: Tensor, weight: Tensor) -> Tensor:
        """By cuBLAS, which takes more than 16 rows and sizes that are multiples of 8.

        Source: torch._int_mm, its checks.
        """
        num_rows, depth = x.shape
        fits = depth % 8 == 0 and len(weight) % 8 == 0 and num_rows > 0
        if not fits or self.device.capability < MIN_CAPABILITY:
            return super()._multiply_integers(x, weight)
        padding = max(0, MIN_INTEGER_ROWS - num_rows)
        return torch._int_mm(F.pad(x, (0, 0, 0, padding)), weight.t())[:num_rows]

    def pack_int4(
        self,
        values: Tensor,
        scale: Tensor,
        zero: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> PackedLinear:
        """The weight is on the device already. The first one decides about the kernel.

        Raises:
            RuntimeError: not enough memory.
        """
        if self._int4_fault is None:
            self._int4_fault = self._find_product_fault("W4A16", lambda: self._try_int4(dtype))
        if not self._int4_fault and not self._takes_groups(2 * values.shape[1], scale.shape[1]):
            self._note_slow_groups(2 * values.shape[1] // scale.shape[1])
        try:
            sizes = 2 * values.shape[1], values.shape[0]
            kept = scale.contiguous(), zero.contiguous()
            return PackedInt4(values.contiguous(), bias, *sizes, *kept)
        except torch.OutOfMemoryError as error:
            raise self.device.out_of_memory("the weights", "quantize the head, too") from error

    def linear_int4(self, x: Tensor, packed: PackedInt4) -> Tensor:
        """By the Triton kernel where it works and the groups suit it."""
        if self._int4_fault or not len(x):
            return super().linear_int4(x, packed)
        if not self._takes_groups(packed.in_features, packed.scale.shape[1]):
            return super().linear_int4(x, packed)
        out = load_kernels().linear_int4(x, packed.weight, packed.scale, packed.zero, packed.bias)
        assert isinstance(out, Tensor)
        return out

    def _takes_groups(self, in_features: int, num_groups: int) -> bool:
        """Whether the Triton kernel takes them: it multiplies by 16 bytes of a group at least."""
        return bool(load_kernels().int4_block(in_features, num_groups) >= 16)

    def _note_slow_groups(self, size: int) -> None:
        """Warn, once for each size."""
        if size not in self._slow_groups:
            logger.warning(
                "w4a16 in groups of %d: the Triton kernel takes groups that 32 divides, so torch "
                "widens these weights for each product, which is slow; quantize in groups of 32, "
                "64 or 128",
                size,
            )
            self._slow_groups.add(size)

    def _try_int4(self, dtype: torch.dtype) -> tuple[float, float]:
        """As `_try_int8`."""
        generator = torch.Generator().manual_seed(0)
        values = torch.randint(256, (70, 96), generator=generator, dtype=torch.uint8)
        scale = torch.rand(70, 6, generator=generator) / 16
        zero = torch.randint(16, (70, 6), generator=generator, dtype=torch.uint8)
        x = torch.randn(40, 192, generator=generator).to(dtype)
        bias = torch.randn(70, generator=generator).to(dtype)
        plain = PackedInt4(values, bias.double(), 192, 70, scale, zero)
        exact = Operators.linear_int4(self, x.double(), plain)
        moved = [t.to(self.torch_device) for t in (values, scale, zero, bias)]
        worst = 0.0
        for rows in (1, 40):
            ours = load_kernels().linear_int4(x[:rows].to(self.torch_device), *moved)
            worst = max(worst, (ours.cpu().double() - exact[:rows]).abs().max().item())
        unit = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        return worst, unit * max(1.0, exact.abs().max().item())

    def _try_int8(self, dtype: torch.dtype) -> tuple[float, float]:
        """As `_try_kernels`, for few rows and for many, and sizes that no tile divides."""
        generator = torch.Generator().manual_seed(0)
        values = torch.randint(-128, 128, (70, 150), generator=generator, dtype=torch.int8)
        scale = torch.rand(70, generator=generator) / 128
        x = torch.randn(40, 150, generator=generator).to(dtype)
        bias = torch.randn(70, generator=generator).to(dtype)
        exact = x.double() @ (values * scale.double()[:, None]).T + bias.double()
        moved = [t.to(self.torch_device) for t in (values, scale, bias)]
        worst = 0.0
        for rows in (1, 40):
            ours = load_kernels().linear_int8(x[:rows].to(self.torch_device), *moved)
            worst = max(worst, (ours.cpu().double() - exact[:rows]).abs().max().item())
        unit = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        return worst, unit * max(1.0, exact.abs().max().item())

    def pack_layer(self, weights: LayerWeights) -> PackedLayer:
        """As the base class.

        Raises:
            RuntimeError: not enough memory.
        """
        try:
            return super().pack_layer(weights)
        except torch.OutOfMemoryError as error:
            raise self.device.out_of_memory("the weights", "a smaller --dtype") from error

    # -- attention -------------------------------------------------------------------------------

    def allocate_kv_cache(self, shape: CacheShape, kv_format: KVFormat) -> LayerCache:
        """As the base class; the first one of a model decides about the operators.

        Raises:
            RuntimeError: not enough memory.
        """
        before, self._num_blocks = self._chosen_for, shape.num_blocks
        try:
            table = self.operator_table(
                shape.num_heads, shape.head_dim, shape.block_size, kv_format
            )
            if before != self._chosen_for:
                for row in table:
                    logger.debug("%s: %s (%s)", *row)
            return super().allocate_kv_cache(shape, kv_format)
        except torch.OutOfMemoryError as error:
            raise self.device.out_of_memory(
                f"the KV cache ({kv_format.layer_gib(shape):.2f} GiB per layer)",
                "lower --num_blocks or --memory_fraction",
            ) from error

    def dense_attention(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
    ) -> Tensor:
        """Torch's fused kernels: scores and sums in fp32 for every dtype, that of q."""
        return fused_attention(q, k.to(q.dtype), v.to(q.dtype), key_mask, scale)

    # -- graphs ----------------------------------------------------------------------------------

    def capture(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Replays decode steps where the table says so; elsewhere a warning has given the reason.

        Rows beyond a batch have slot -1 and context length 0, so that they write and read no block;
        their results are not used.
        """
        if self.paged_step is PagedStep or self._why_no_graphs:
            return forward
        pools: list[Any] = []

        def record(batch: ForwardBatch) -> tuple[Callable[[], None], Tensor]:
            logger.debug("capturing the decode step of %d sequences", batch.num_decodes)
            return self.device.record(lambda: forward(batch), pools)

        return DecodeGraphs(forward, record, self.torch_device, self._num_blocks)


@functools.cache
def load_kernels() -> Any:
    """The module of Triton kernels."""
    return importlib.import_module("gptneox.devices.cuda.kernels")
