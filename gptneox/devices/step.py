# SPDX-License-Identifier: Apache-2.0
"""A step of the model: its tensors, the caches it reads and writes, what its layers share.

Operators make one step object per forward pass (`Operators.begin`, `begin_padded`); the model
passes it down to the layers, and it ends with the pass. The classes here are plain torch: they
specify what every device's own must compute.

Shapes: T tokens of a step, B sequences or rows, S new positions of a row, L positions with these,
H heads on this rank, D head_dim, R rotary dims, N blocks, P block_size, M blocks per sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from gptneox.devices.cache import LayerCache

if TYPE_CHECKING:
    from gptneox.devices.operators import Operators, PackedLayer


class RotaryTables(NamedTuple):
    """cos and sin of every position, in the width that the device rotates by."""

    cos: Tensor  # base: [max_positions, R/2] fp32
    sin: Tensor


@dataclass
class ForwardBatch:
    """A batch of the paged path: sequences that decode one token first, then prompt chunks.

    Kernels read the device tensors; the lists hold the same lengths for operators that take them
    from the host.
    """

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slot_mapping: Tensor  # [T] int64: block * P + offset
    block_tables: Tensor  # [B, M] int32, padded with 0
    cu_seqlens_q: Tensor  # [B + 1] int32
    context_lens: Tensor  # [B] int32: cached tokens including this step's
    q_lens_list: list[int]
    context_lens_list: list[int]
    num_decodes: int  # leading sequences with exactly one token
    # [B] int32: first position of each sequence that is not padding; None: 0 for all.
    # Only steps made by `begin_padded` have it.
    starts: Tensor | None = None


@dataclass
class PaddedBatch:
    """A batch of the flash path: B rows of equal length, as Hugging Face's `generate` has them."""

    input_ids: Tensor  # [B * S] int64
    positions: Tensor  # [B * S] int64
    num_rows: int  # B
    num_new: int  # S
    end: int  # L, padding included
    key_mask: Tensor | None  # [B, L] bool, False at padding; None: no padding

    def as_paged(self, capacity: int) -> ForwardBatch | None:
        """The same batch over a cache whose blocks are whole rows of `capacity` positions.

        Returns None where padding is not only in front.
        """
        rows, starts = self.num_rows, None
        if self.key_mask is not None:
            first = self.key_mask.to(torch.int32).argmax(1)
            if not torch.equal(self.key_mask.sum(1), self.end - first):
                return None
            starts = first.to(torch.int32)
        ids = torch.arange(rows, dtype=torch.int64)
        slots = ids[:, None] * capacity + torch.arange(self.end - self.num_new, self.end)
        return ForwardBatch(
            input_ids=self.input_ids,
            positions=self.positions,
            slot_mapping=slots.flatten(),
            block_tables=ids.to(torch.int32)[:, None],
            cu_seqlens_q=torch.arange(rows + 1, dtype=torch.int32) * self.num_new,
            context_lens=torch.full((rows,), self.end, dtype=torch.int32),
            q_lens_list=[self.num_new] * rows,
            context_lens_list=[self.end] * rows,
            num_decodes=rows if self.num_new == 1 else 0,
            starts=starts,
        )


class Step:
    """One forward pass: what it computes, and the caches that its layers read and write."""

    # The step computes all layers in one call (`run`), on a rank that holds them whole.
    runs_all_layers: ClassVar[bool] = False
    batch: ForwardBatch | PaddedBatch

    def __init__(
        self,
        ops: Operators,
        batch: ForwardBatch | PaddedBatch,
        caches: Sequence[LayerCache],
        tables: RotaryTables,
        scale: float,
    ) -> None:
        """Begin a step.

        Args:
            ops: the model's operators.
            batch: what to compute.
            caches: the cache of every layer, in the device's layout.
            tables: what to rotate queries and keys by.
            scale: factor of the attention scores.
        """
        self.ops, self.batch, self.caches = ops, batch, caches
        self.tables, self.scale = tables, scale
        self.input_ids, self.positions = batch.input_ids, batch.positions  # [T]

    def attend(self, layer_id: int, qkv: Tensor) -> Tensor:
        """Rotate queries and keys, cache keys and values, attend.

        qkv: [T, H, 3, D], any strides. Returns [T, H, D].
        """
        raise NotImplementedError

    def run(self, x: Tensor, layers: Sequence[PackedLayer]) -> Tensor:
        """All parallel-residual layers of a model that this rank holds whole.

        x: [T, C], which may be overwritten. Returns [T, C].
        """
        head_dim = self.caches[0].k.shape[-1]
        for layer_id, layer in enumerate(layers):
            qkv, mlp = self.ops.layer_front(x, layer)
            attended = self.attend(layer_id, qkv.view(len(x), -1, 3, head_dim))
            x = self.ops.layer_back(attended.flatten(1), mlp, layer, x)
        return x

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q, k [T, H, D] turned by the angles of their positions."""
        return self.ops.rotary(q, k, self.positions, *self.tables)


class PagedStep(Step):
    """A step over blocks of P tokens, K and V [N, P, H, D].

    Keys and values of the step itself are read from the cache, too: a query sees what later ones
    will see, rounded if the format rounds, so that neither chunks nor a cached prefix change a
    result.
    """

    batch: ForwardBatch

    def attend(self, layer_id: int, qkv: Tensor) -> Tensor:
        """See `Step`."""
        q, k, v = qkv.unbind(2)
        q, k = self.rotate(q, k)
        return self.attend_rotated(self.caches[layer_id], q, k, v)

    def attend_rotated(self, layer: LayerCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k and v [T, H, D] to their slots, then attend; returns [T, H, D]."""
        self.store(layer, k, v)
        n = self.batch.num_decodes
        if n == len(self.batch.q_lens_list):
            return self.decode(layer, q)
        prefilled = self.prefill(layer, q[n:], k[n:], v[n:])
        return torch.cat((self.decode(layer, q[:n]), prefilled)) if n else prefilled

    def store(self, layer: LayerCache, k: Tensor, v: Tensor) -> None:
        """Write k, v [T, H, D] to the batch's slots [T]."""
        size, slots = layer.k.shape[1], self.batch.slot_mapping
        layer.write((slots // size, slots % size), k, v)

    def decode(self, layer: LayerCache, q: Tensor) -> Tensor:
        """Attention of one new token per sequence, q [B_decode, H, D], over its cached tokens."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for b in range(self.batch.num_decodes):
            out[b : b + 1] = self._attend_to(layer, b, q[b : b + 1])
        return out

    def prefill(self, layer: LayerCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of the prompt chunks, whose keys and values are cached already.

        q, k, v: [T_prefill, H, D], the rows after the decoding ones; k and v are for operators
        that do not read those of this step from the cache. Query i of a chunk of length n sees
        the first context_len - n + i + 1 cached tokens. Returns [T_prefill, H, D].
        """
        batch, start = self.batch, 0
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for b in range(batch.num_decodes, len(batch.q_lens_list)):
            end = start + batch.q_lens_list[b]
            out[start:end] = self._attend_to(layer, b, q[start:end])
            start = end
        return out

    def _attend_to(self, layer: LayerCache, sequence: int, q: Tensor) -> Tensor:
        """The last S positions of a sequence, q [S, H, D], over all its cached tokens."""
        k, v = self.gather(layer, sequence)
        return self.ops.causal_attention(q, k, v, self.scale)

    def gather(self, layer: LayerCache, sequence: int) -> tuple[Tensor, Tensor]:
        """The cached keys and values of one sequence, each [context_len, H, D]; see `read`."""
        assert self.batch.starts is None, "padding in front of a step that does not skip it"
        length = self.batch.context_lens_list[sequence]
        blocks = self.batch.block_tables[sequence, : -(-length // layer.k.shape[1])].long()
        k, v = layer.read(blocks)
        return k.flatten(0, 1)[:length], v.flatten(0, 1)[:length]


class PaddedStep(Step):
    """A step over contiguous stores, K and V [B, capacity, H, D]."""

    batch: PaddedBatch

    def attend(self, layer_id: int, qkv: Tensor) -> Tensor:
        """See `Step`."""
        q, k, v = qkv.unbind(2)
        q, k = self.rotate(q, k)
        batch, layer = self.batch, self.caches[layer_id]
        shape = (batch.num_rows, batch.num_new, *q.shape[1:])
        where = (slice(None), slice(batch.end - batch.num_new, batch.end))
        layer.write(where, k.view(shape), v.view(shape))
        return self.attend_cached(layer, q.view(shape)).reshape(q.shape)

    def attend_cached(self, layer: LayerCache, q: Tensor) -> Tensor:
        """`Operators.dense_attention` of q [B, S, H, D] over the first L positions."""
        k, v = layer.read((slice(None), slice(self.batch.end)))
        return self.ops.dense_attention(q, k, v, self.batch.key_mask, self.scale)
