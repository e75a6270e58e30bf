# SPDX-License-Identifier: Apache-2.0
"""Attention and cache writing on Ascend NPUs: one class per set of operators, chosen by
`choose_attention`.

Shapes as in base.py; W is H * D. Which operator takes which shapes is not checked by torch_npu
itself but only on the device, so the limits are decided here, at start-up. Their source is the
public code of CANN's operators: ops-transformer (FusedInferAttentionScore, IncreFlashAttention,
PromptFlashAttention, ScatterPaKvCache) and ascend-transformer-boost (ATB).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptneox.config.errors import ConfigError
from gptneox.devices.cache import CacheShape, FloatCache, Int8Cache, KVFormat, LayerCache
from gptneox.devices.operators import dense_visibility
from gptneox.devices.step import ForwardBatch, PaddedBatch

if TYPE_CHECKING:
    from gptneox.devices.npu.steps import NpuPaddedStep, NpuPagedStep

ACL_FORMAT_NZ = 29
# Additive masks stay finite: the 310P saturates and knows no infinity.
HIDDEN = -10000.0
COMPRESSED_MASK_SIZE = 2048  # of the triangle that FIA's sparse_mode 3 stands for
MAX_HEAD_DIM = 512  # of FIA, IncreFlashAttention and PromptFlashAttention
MAX_BATCH = 256  # rows of IncreFlashAttention; PromptFlashAttention takes 128
NO_WINDOW = 2**31 - 1


@dataclass(frozen=True)
class _Rows:
    """Prompt chunks that share one padded call: sequences first … last - 1 of the batch."""

    first: int
    last: int
    start: int  # their rows among the prompt rows
    end: int
    longest: int
    gather: Tensor | None  # [B * longest]: row of each padded place; None: nothing is padded
    keep: Tensor | None  # [rows]: padded place of each row


class PlainAttention:
    """Plain torch in the model's dtype, softmax in fp32: for shapes that no operator takes."""

    operator = "torch matmul and softmax"

    def __init__(self, torch_npu: Any, device: torch.device) -> None:
        self.ops, self.device = torch_npu, device

    def allocate(self, shape: CacheShape, kv_format: KVFormat) -> LayerCache:
        """ND caches [N, P, H, D]."""
        return kv_format.allocate(shape, self._zeros)

    def _zeros(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=self.device)

    def make_plan(self, batch: ForwardBatch) -> Any:
        """What all layers of a paged step share: `NpuPagedStep.plan`."""
        return None

    def make_mask(self, batch: PaddedBatch, capacity: int) -> Any:
        """What all layers of a padded step share: `NpuPaddedStep.mask`."""
        return dense_visibility(batch.num_new, batch.end, batch.key_mask, self.device)

    def store(self, step: NpuPagedStep, layer: LayerCache, k: Tensor, v: Tensor) -> None:
        """Write k, v [T, H, D] to their slots."""
        for cache, new in zip(layer, (k, v), strict=True):
            cache.view(-1, *new.shape[1:]).index_copy_(0, step.batch.slot_mapping, new)

    def decode(self, step: NpuPagedStep, layer: LayerCache, q: Tensor) -> Tensor:
        """q [B, H, D], one token per sequence."""
        return self._by_sequence(step, layer, q, range(step.batch.num_decodes))

    def prefill(
        self, step: NpuPagedStep, layer: LayerCache, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Prompt chunks, q, k and v [T, H, D] of this step; K and V are cached already."""
        batch = step.batch
        return self._by_sequence(step, layer, q, range(batch.num_decodes, len(batch.q_lens_list)))

    def _by_sequence(
        self, step: NpuPagedStep, layer: LayerCache, q: Tensor, sequences: range
    ) -> Tensor:
        out, start = torch.empty_like(q), 0
        for b in sequences:
            n = step.batch.q_lens_list[b]
            k, v = step.gather(layer, b)
            out[start : start + n] = self._causal(q[start : start + n], k, v, step.scale)
            start += n
        return out

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """One sequence: q [S, H, D] are the last S of the positions of k, v [L, H, D]."""
        visible = dense_visibility(q.shape[0], k.shape[0], None, q.device)
        return eager(q[None], k[None], v[None], visible, scale)[0]

    def dense(self, step: NpuPaddedStep, layer: LayerCache, q: Tensor) -> Tensor:
        """`PaddedStep.attend_cached`; the stores come whole: a slice of them is not contiguous."""
        k, v = (store[:, : step.batch.end] for store in (layer.k, layer.v))
        return eager(q, k, v, step.mask, step.scale)


@functools.cache
def has_cache_write(torch_npu: Any) -> bool:
    """Whether there is an operator that writes an ND cache.

    torch_npu 2.5 has none; those of 2.6 to 2.9.0 have no cache_mode: they write NZ alone.
    """
    if not hasattr(torch_npu, "npu_scatter_pa_kv_cache"):
        return False
    schema = torch.ops.npu.npu_scatter_pa_kv_cache.default._schema
    return "cache_mode" in [argument.name for argument in schema.arguments]


class A2Attention(PlainAttention):
    """Atlas 800I A2: FusedInferAttentionScore over an ND cache.

    The layout is BSH and never TND, which takes head_dim 64, 128 and 192 alone. With one query
    per row the operator is another kernel, which reads neither a mask mode nor query lengths.
    """

    operator = "npu_fused_infer_attention_score, BSH"

    def __init__(self, torch_npu: Any, device: torch.device) -> None:
        super().__init__(torch_npu, device)
        self._triangle: Tensor | None = None

    @property
    def triangle(self) -> Tensor:
        """The mask that sparse_mode 3 wants: True above the diagonal."""
        if self._triangle is None:
            ones = torch.ones(COMPRESSED_MASK_SIZE, COMPRESSED_MASK_SIZE, dtype=torch.bool)
            self._triangle = ones.triu(1).to(self.device)
        return self._triangle

    def _fia(self, q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, **kw: Any) -> Tensor:
        """q [B, S, W]; returns [B, S, W]."""
        return self.ops.npu_fused_infer_attention_score(
            q,
            k,
            v,
            num_heads=heads,
            num_key_value_heads=heads,
            scale=scale,
            input_layout="BSH",
            **kw,
        )[0]

    def store(self, step: NpuPagedStep, layer: LayerCache, k: Tensor, v: Tensor) -> None:
        """The default cache_mode is another layout."""
        self._scatter((k.contiguous(), v.contiguous()), (layer.k, layer.v), step)

    def _scatter(
        self, new: tuple[Tensor, Tensor], caches: tuple[Tensor, Tensor], step: NpuPagedStep
    ) -> None:
        """Write keys and values [T, H, D] to their slots."""
        slots = step.batch.slot_mapping
        if has_cache_write(self.ops):
            self.ops.npu_scatter_pa_kv_cache(*new, *caches, slots, cache_mode="Norm")
            return
        for cache, rows in zip(caches, new, strict=True):
            cache.view(-1, *rows.shape[1:]).index_copy_(0, slots, rows)

    def decode(self, step: NpuPagedStep, layer: LayerCache, q: Tensor) -> Tensor:
        """One call for all rows."""
        n, heads, _ = q.shape
        out = self._fia(
            q.contiguous().view(n, 1, -1),
            layer.k.flatten(2),
            layer.v.flatten(2),
            heads,
            step.scale,
            block_table=step.batch.block_tables[:n],
            actual_seq_lengths_kv=step.batch.context_lens_list[:n],
            block_size=layer.k.shape[1],
            **self._scales(layer, is_paged=True),
        )
        return out.view(q.shape)

    def _scales(self, layer: LayerCache, *, is_paged: bool) -> dict[str, Any]:
        """Options of `_fia` for one query per row over a cache that has scales."""
        return {}

    def make_plan(self, batch: ForwardBatch) -> list[_Rows]:
        """Prompt chunks in groups that waste less than half of their padded rows."""
        return [self._rows(batch, first, last) for first, last in groups(batch)]

    def _rows(self, batch: ForwardBatch, first: int, last: int) -> _Rows:
        lens = batch.q_lens_list
        start, count = sum(lens[batch.num_decodes : first]), sum(lens[first:last])
        longest = max(lens[first:last])
        gather = keep = None
        if count < longest * (last - first):
            rows: list[int] = []
            places: list[int] = []
            row = 0
            for i, n in enumerate(lens[first:last]):
                rows += [*range(row, row + n), *[row] * (longest - n)]
                places += range(i * longest, i * longest + n)
                row += n
            gather = torch.tensor(rows).to(self.device)
            keep = torch.tensor(places).to(self.device)
        return _Rows(first, last, start, start + count, longest, gather, keep)

    def prefill(
        self, step: NpuPagedStep, layer: LayerCache, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Keys and values come from the cache, whether a prefix was there before or not."""
        outs = []
        for rows in step.plan:
            x = q[rows.start : rows.end]
            if rows.gather is not None:
                x = x.index_select(0, rows.gather)
            x = x.contiguous().view(rows.last - rows.first, rows.longest, -1)
            out = self._prefill_rows(step, layer, x, rows, q.shape[1])
            out = out.view(-1, *q.shape[1:])
            outs.append(out if rows.keep is None else out.index_select(0, rows.keep))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _prefill_rows(
        self, step: NpuPagedStep, layer: LayerCache, q: Tensor, rows: _Rows, heads: int
    ) -> Tensor:
        batch, group = step.batch, slice(rows.first, rows.last)
        return self._fia(
            q,
            layer.k.flatten(2),
            layer.v.flatten(2),
            heads,
            step.scale,
            atten_mask=self.triangle,
            sparse_mode=3,
            block_table=batch.block_tables[group],
            actual_seq_lengths=batch.q_lens_list[group],
            actual_seq_lengths_kv=batch.context_lens_list[group],
            block_size=layer.k.shape[1],
        )

    def dense(self, step: NpuPaddedStep, layer: LayerCache, q: Tensor) -> Tensor:
        """The stores are read in place by one query per row, and as they are while full."""
        (b, s, heads, _), length = q.shape, step.batch.end
        options: dict[str, Any] = {}
        if s > 1:
            found = layer.read((slice(None), slice(length)))
            k, v = (x.to(q.dtype).contiguous() for x in found)
        else:
            k, v = layer.k, layer.v
            options["actual_seq_lengths_kv"] = [length] * b
            options |= self._scales(layer, is_paged=False)
        if step.mask is not None:
            options["atten_mask"] = step.mask
        elif s > 1:
            options |= {"atten_mask": self.triangle, "sparse_mode": 3}
        out = self._fia(
            q.contiguous().view(b, s, -1), k.flatten(2), v.flatten(2), heads, step.scale, **options
        )
        return out.view(q.shape)

    def make_mask(self, batch: PaddedBatch, capacity: int) -> Any:
        """True where a key is not seen, [B, 1, S, keys read]; None without padding."""
        if batch.key_mask is None:
            return None
        num_read = batch.end if batch.num_new > 1 else capacity
        hidden = ~super().make_mask(batch, capacity)
        return F.pad(hidden, (0, num_read - batch.end), value=True)


class A2SmallBlocks(A2Attention):
    """For block sizes that 128 does not divide: the keys of a chunk are gathered first."""

    operator = "npu_fused_infer_attention_score, BSH, keys gathered from their blocks"

    def make_plan(self, batch: ForwardBatch) -> list[_Rows]:
        """Each sequence alone."""
        return [
            self._rows(batch, b, b + 1) for b in range(batch.num_decodes, len(batch.q_lens_list))
        ]

    def _prefill_rows(
        self, step: NpuPagedStep, layer: LayerCache, q: Tensor, rows: _Rows, heads: int
    ) -> Tensor:
        found = step.gather(layer, rows.first)
        k, v = (x.to(q.dtype).flatten(1)[None].contiguous() for x in found)
        return self._fia(q, k, v, heads, step.scale, atten_mask=self.triangle, sparse_mode=3)


class A2Int8Attention(A2SmallBlocks):
    """An int8 cache with a scale for each token and head.

    The operator reads int8 only with one query per row, so the keys of a prompt are gathered and
    dequantized first. It wants scales as [N, H, P] of pages (antiquant mode 5), and as [B, H, P]
    of the flash path's rows (mode 3).

    Source: op-plugin, npu_fused_infer_attention_score (key_antiquant_mode, PageAttention) and
    npu_dynamic_quant.
    """

    operator = "npu_fused_infer_attention_score, BSH, int8 keys and values, dequantized for prompts"

    def _zeros(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """K and V as they are called; scales in the operator's order, transposed."""
        if len(size) == 4:
            return super()._zeros(size, dtype)
        n, p, h = size
        return super()._zeros((n, h, p), dtype).transpose(1, 2)

    def store(self, step: NpuPagedStep, layer: LayerCache, k: Tensor, v: Tensor) -> None:
        """Round both in one call, then write values and scales."""
        assert isinstance(layer, Int8Cache)
        values, scales = self.ops.npu_dynamic_quant(torch.stack((k, v)))  # [2, T, H, D], [2, T, H]
        self._scatter((values[0], values[1]), (layer.k, layer.v), step)
        for cache, new in ((layer.k_scale, scales[0]), (layer.v_scale, scales[1])):
            rows = cache.transpose(1, 2).view(-1, 1)
            self.ops.npu_scatter_nd_update_(rows, step.scale_slots, new.reshape(-1, 1))

    def _scales(self, layer: LayerCache, *, is_paged: bool) -> dict[str, Any]:
        """See `A2Attention`."""
        assert isinstance(layer, Int8Cache)
        mode = 5 if is_paged else 3
        return {
            "key_antiquant_scale": layer.k_scale.transpose(1, 2),
            "value_antiquant_scale": layer.v_scale.transpose(1, 2),
            "key_antiquant_mode": mode,
            "value_antiquant_mode": mode,
        }


class DuoAttention(PlainAttention):
    """Atlas 300I DUO without ATB: an ND cache, IncreFlashAttention and PromptFlashAttention.

    PromptFlashAttention takes no lengths there, so prompts run one by one, and a prompt with a
    cached prefix runs in plain torch.
    """

    operator = "npu_incre_flash_attention, npu_prompt_flash_attention"

    def __init__(self, torch_npu: Any, device: torch.device) -> None:
        super().__init__(torch_npu, device)
        self._triangle = torch.empty(0, 0)

    def triangle(self, size: int) -> Tensor:
        """True above the diagonal, [size, size]."""
        if self._triangle.shape[0] != size:
            ones = torch.ones(size, size, dtype=torch.bool)
            self._triangle = ones.triu(1).to(self.device)
        return self._triangle

    def make_plan(self, batch: ForwardBatch) -> Any:
        """Slots as scatter indices, [T, 1]."""
        return batch.slot_mapping[:, None]

    def store(self, step: NpuPagedStep, layer: LayerCache, k: Tensor, v: Tensor) -> None:
        """One scatter each."""
        for x, cache in zip((k, v), layer, strict=True):
            rows = cache.view(-1, x.shape[1] * x.shape[2])
            self.ops.npu_scatter_nd_update_(rows, step.plan, x.contiguous().flatten(1))

    def decode(self, step: NpuPagedStep, layer: LayerCache, q: Tensor) -> Tensor:
        """At most 256 rows in a call."""
        outs = []
        for i in range(0, q.shape[0], MAX_BATCH):
            rows = slice(i, min(i + MAX_BATCH, q.shape[0]))
            out = self._incre(
                q[rows].contiguous(),
                layer.k.flatten(2),
                layer.v.flatten(2),
                step.scale,
                block_table=step.batch.block_tables[rows],
                actual_seq_lengths=step.batch.context_lens_list[rows],
                block_size=layer.k.shape[1],
            )
            outs.append(out)
        return torch.cat(outs) if len(outs) > 1 else outs[0]

    def _incre(self, q: Tensor, k: Tensor, v: Tensor, scale: float, **kw: Any) -> Tensor:
        """q [B, H, D], k and v with W as last dimension; returns [B, H, D]."""
        b, heads, _ = q.shape
        out = self.ops.npu_incre_flash_attention(
            q.view(b, 1, -1),
            k,
            v,
            num_heads=heads,
            num_key_value_heads=heads,
            scale_value=scale,
            input_layout="BSH",
            **kw,
        )
        return out.view(q.shape)

    def prefill(
        self, step: NpuPagedStep, layer: LayerCache, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Prompt by prompt."""
        batch, out, start = step.batch, torch.empty_like(q), 0
        for b in range(batch.num_decodes, len(batch.q_lens_list)):
            n = batch.q_lens_list[b]
            rows = slice(start, start + n)
            if n == batch.context_lens_list[b]:
                part = self.whole(q[rows], k[rows], v[rows], [n], step.scale)
            else:
                part = self._causal(q[rows], *step.gather(layer, b), step.scale)
            out[rows] = part
            start += n
        return out

    def whole(self, q: Tensor, k: Tensor, v: Tensor, lens: list[int], scale: float) -> Tensor:
        """Whole prompts of equal length, q, k, v [T, H, D]."""
        b, s = len(lens), lens[0]
        outs = []
        for i in range(0, b, MAX_BATCH // 2):
            rows = slice(i * s, min(i + MAX_BATCH // 2, b) * s)
            out = self.ops.npu_prompt_flash_attention(
                *(x[rows].contiguous().view(-1, s, x.shape[1] * x.shape[2]) for x in (q, k, v)),
                atten_mask=self.triangle(s),
                num_heads=q.shape[1],
                scale_value=scale,
                next_tokens=NO_WINDOW,
                input_layout="BSH",
            )
            outs.append(out.view(-1, *q.shape[1:]))
        return torch.cat(outs) if len(outs) > 1 else outs[0]

    def dense(self, step: NpuPaddedStep, layer: LayerCache, q: Tensor) -> Tensor:
        """Rows without padding; padded ones in plain torch."""
        (b, s), batch = q.shape[:2], step.batch
        k, v = layer.k, layer.v
        if batch.key_mask is None and s == 1 and b <= MAX_BATCH:
            lens = [batch.end] * b
            out = self._incre(
                q[:, 0].contiguous(),
                k.flatten(2),
                v.flatten(2),
                step.scale,
                actual_seq_lengths=lens,
            )
            return out.view(q.shape)
        if batch.key_mask is None and s == batch.end:
            k, v = k[:, :s].flatten(0, 1), v[:, :s].flatten(0, 1)
            return self.whole(q.flatten(0, 1), k, v, [s] * b, step.scale).view(q.shape)
        return super().dense(step, layer, q)


@dataclass(frozen=True)
class _AtbPlan:
    """A step as ATB reads it. Prompts: either all new (`lens`), or some with a cached prefix."""

    slots: Tensor  # [T] int32
    lens: Tensor | None  # of the prompt chunks, int32 on the CPU, the last one padded
    padding: int  # rows added to reach a multiple of 16
    mask: Tensor | None  # NZ


class DuoAtbAttention(DuoAttention):
    """Atlas 300I DUO with ATB: an NZ cache, and lengths on the device for decoding."""

    operator = "ATB paged attention, NZ"

    def allocate(self, shape: CacheShape, kv_format: KVFormat) -> LayerCache:
        """NZ caches [N, W / 16, P, 16]."""

        def empty() -> Tensor:
            cache = self.ops.empty_with_format(
                (
                    shape.num_blocks,
                    shape.num_heads * shape.head_dim // 16,
                    shape.block_size,
                    16,
                ),
                dtype=kv_format.dtype,
                device=self.device,
                acl_format=ACL_FORMAT_NZ,
            )
            assert isinstance(cache, Tensor)
            return cache

        return FloatCache(empty(), empty())

    def make_plan(self, batch: ForwardBatch) -> _AtbPlan:
        """Lengths and masks of the prompt chunks."""
        slots = batch.slot_mapping.to(torch.int32)
        n = batch.num_decodes
        q_lens, context_lens = batch.q_lens_list[n:], batch.context_lens_list[n:]
        if not q_lens:
            return _AtbPlan(slots, None, 0, None)
        if q_lens == context_lens:
            lens, padding = padded_lens(q_lens)
            return _AtbPlan(slots, lens, padding, self.square_mask(int(lens.max())))
        positions = batch.positions[sum(batch.q_lens_list[:n]) :]
        mask = self.mask(positions, max(context_lens))
        return _AtbPlan(slots, torch.tensor(q_lens, dtype=torch.int32), 0, mask)

    def mask(self, positions: Tensor, num_keys: int) -> Tensor:
        """Additive NZ mask: the row of a query at position p hides the keys after p."""
        width = -(-num_keys // 16) * 16
        keys = torch.arange(width, device=self.device)
        hidden = (keys[None] > positions[:, None]).to(torch.float16) * HIDDEN  # [T, width]
        hidden = F.pad(hidden, (0, 0, 0, -hidden.shape[0] % 16))
        blocks = hidden.view(hidden.shape[0], width // 16, 16).transpose(0, 1).contiguous()
        cast = self.ops.npu_format_cast(blocks[None], ACL_FORMAT_NZ)
        assert isinstance(cast, Tensor)
        return cast

    def square_mask(self, size: int) -> Tensor:
        """Mask of whole prompts up to `size` tokens, kept for the next steps."""
        size = -(-size // 128) * 128
        if self._triangle.dim() != 4 or self._triangle.shape[2] < size:
            self._triangle = self.mask(torch.arange(size, device=self.device), size)
        return self._triangle

    def store(self, step: NpuPagedStep, layer: LayerCache, k: Tensor, v: Tensor) -> None:
        """One call for both."""
        self.ops._npu_reshape_and_cache(k.contiguous(), v.contiguous(), *layer, step.plan.slots)

    def decode(self, step: NpuPagedStep, layer: LayerCache, q: Tensor) -> Tensor:
        """One call for all rows."""
        n, heads, _ = q.shape
        q = q.contiguous()
        out = torch.empty_like(q)
        self.ops._npu_paged_attention(
            query=q,
            key_cache=layer.k,
            value_cache=layer.v,
            num_kv_heads=heads,
            num_heads=heads,
            scale_value=step.scale,
            block_table=step.batch.block_tables[:n],
            context_lens=step.batch.context_lens[:n],
            out=out,
        )
        return out

    def prefill(
        self, step: NpuPagedStep, layer: LayerCache, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """New prompts from this step's K and V; with cached prefixes, all from the cache."""
        batch, plan, n = step.batch, step.plan, step.batch.num_decodes
        if batch.q_lens_list[n:] == batch.context_lens_list[n:]:
            return self._packed(q, k, v, plan.lens, plan.padding, plan.mask, step.scale)
        q = q.contiguous()
        out = torch.empty_like(q)
        self.ops._npu_paged_attention_splitfuse(
            query=q,
            key_cache=layer.k,
            value_cache=layer.v,
            block_table=batch.block_tables[n:],
            context_lens=batch.context_lens[n:],
            mask=plan.mask,
            seq_len=plan.lens,
            num_kv_heads=q.shape[1],
            num_heads=q.shape[1],
            scale_value=step.scale,
            out=out,
        )
        return out

    def _packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lens: Tensor,
        padding: int,
        mask: Tensor,
        scale: float,
    ) -> Tensor:
        """Whole prompts behind one another; the rows that pad the last one are dropped."""
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padding)).contiguous() for x in (q, k, v))
        out = torch.empty_like(q)
        self.ops._npu_flash_attention(
            query=q,
            key=k,
            value=v,
            mask=mask,
            seq_len=lens,
            scale_value=scale,
            num_heads=q.shape[1],
            num_kv_heads=q.shape[1],
            out=out,
        )
        return out[: out.shape[0] - padding]

    def whole(self, q: Tensor, k: Tensor, v: Tensor, lens: list[int], scale: float) -> Tensor:
        """Whole prompts, q, k, v [T, H, D]."""
        seq_len, padding = padded_lens(lens)
        mask = self.square_mask(int(seq_len.max()))
        return self._packed(q, k, v, seq_len, padding, mask, scale)


def eager(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """q [B, S, H, D], k and v [B, L, H, D], visible [B or 1, 1, S, L]; returns [B, S, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.matmul(q * scale, k.transpose(2, 3)).float()
    probs = torch.where(visible, scores, HIDDEN).softmax(-1).to(v.dtype)
    return torch.matmul(probs, v).transpose(1, 2)


def groups(batch: ForwardBatch) -> Iterator[tuple[int, int]]:
    """Neighbouring prompt chunks whose padding takes no more rows than they have."""
    lens, first = batch.q_lens_list, batch.num_decodes
    while first < len(lens):
        last, total, longest = first, 0, 0
        while last < len(lens):
            total, longest = total + lens[last], max(longest, lens[last])
            if longest * (last + 1 - first) > 2 * total:
                break
            last += 1
        yield first, last
        first = last


def padded_lens(lens: list[int]) -> tuple[Tensor, int]:
    """Lengths whose sum is a multiple of 16, int32 on the CPU, and what the last one grew by."""
    padding = -sum(lens) % 16
    return torch.tensor([*lens[:-1], lens[-1] + padding], dtype=torch.int32), padding


# -- the table -----------------------------------------------------------------------------------


def check_int8(is_310p: bool, head_dim: int) -> None:
    """Raise ConfigError where no operator reads an int8 cache."""
    remedy = "use kv_cache_dtype auto"
    if is_310p:
        raise ConfigError(
            "[engine] kv_cache_dtype is int8, but the attention operators of a 300I DUO take "
            f"scales that were fixed beforehand, one for each channel, or no int8 at all; {remedy}"
        )
    if head_dim % 32 or head_dim > MAX_HEAD_DIM:
        raise ConfigError(
            f"[engine] kv_cache_dtype is int8, but the model's head_dim is {head_dim}; the "
            f"attention operator reads int8 for multiples of 32 up to {MAX_HEAD_DIM}; {remedy}"
        )


def choose_int8_attention(
    is_310p: bool, head_dim: int, block_size: int
) -> tuple[type[PlainAttention], str]:
    """`choose_attention` for an int8 cache.

    Raises:
        ConfigError: no operator takes the shapes.
    """
    check_int8(is_310p, head_dim)
    if block_size % 32:
        raise ConfigError(
            f"[engine] block_size is {block_size}; with an int8 KV cache it must be a multiple of "
            "32 on an NPU, best 128"
        )
    return A2Int8Attention, f"antiquant modes 3 and 5 take head_dim {head_dim}"


def choose_attention(
    is_310p: bool, has_atb: bool, head_dim: int, block_size: int
) -> tuple[type[PlainAttention], str]:
    """The operators for a model on a chip, and the reason.

    Raises:
        ConfigError: no operator takes the block size.
    """
    if block_size % 16:
        raise ConfigError(
            f"[engine] block_size is {block_size}; on an NPU it must be a multiple of 16, best 128"
        )
    if head_dim % 16 or head_dim > MAX_HEAD_DIM:
        return PlainAttention, f"head_dim {head_dim} is no multiple of 16 up to {MAX_HEAD_DIM}"
    if not is_310p:
        if block_size % 128:
            return A2SmallBlocks, f"block_size {block_size} is no multiple of 128"
        return A2Attention, f"BSH takes head_dim {head_dim}; TND only 64, 128 and 192"
    if not has_atb:
        return DuoAttention, "NNAL (ATB) is not there: slower"
    if head_dim > 256:
        return DuoAttention, f"ATB takes head_dim up to 256, not {head_dim}: slower"
    if block_size * head_dim > 16384:
        remedy = f"--block_size {16384 // head_dim // 16 * 16} would fit"
        return DuoAttention, (
            f"ATB takes block_size * head_dim up to 16384, not {block_size * head_dim}: slower; "
            f"{remedy}"
        )
    return DuoAtbAttention, f"ATB takes head_dim {head_dim} at block_size {block_size}"
