# SPDX-License-Identifier: Apache-2.0
"""CPU without kernels of our own: oneDNN's products and torch's attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptneox.devices.cache import LayerCache
from gptneox.devices.operators import Operators, PackedLinear, fused_attention
from gptneox.devices.step import PagedStep

if TYPE_CHECKING:
    from gptneox.devices.cpu.device import CpuDevice


class CpuPagedStep(PagedStep):
    """Decodes with two products per sequence."""

    def decode(self, layer: LayerCache, q: Tensor) -> Tensor:
        """Two fp32 products per sequence, over blocks widened as they are gathered.

        For one query torch's fused kernel takes twice as long (measured at 8 x 280 tokens, 16
        heads of 128, bf16).
        """
        out = torch.empty(q.shape, dtype=q.dtype)
        q = (q.float() * self.scale).unsqueeze(-1)  # [B, H, D, 1]
        for b in range(self.batch.num_decodes):
            k, v = (x.float() for x in self.gather(layer, b))  # [L, H, D]
            probs = torch.matmul(k.transpose(0, 1), q[b]).softmax(1)  # [H, L, 1]
            out[b] = torch.matmul(probs.transpose(1, 2), v.transpose(0, 1)).squeeze(1)
        return out


class CpuOperators(Operators):
    """Any CPU that torch runs on."""

    device: CpuDevice
    paged_step: type[PagedStep] = CpuPagedStep

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """In oneDNN's blocked layout, where it has fast products of the dtype."""
        is_fast = {torch.float32: True, torch.bfloat16: self.device.fast_bf16}
        if not (self.device.has_onednn and is_fast.get(weight.dtype)):
            return super().pack_linear(weight, bias)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        return PackedLinear(packed, bias, weight.shape[1], weight.shape[0])

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """x [T, K]; returns [T, F]."""
        if not packed.weight.is_mkldnn:
            return super().linear(x, packed)
        out = torch.ops.mkldnn._linear_pointwise(x, packed.weight, packed.bias, "none", [], "")
        assert isinstance(out, Tensor)
        return out

    def causal_attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Torch's fused kernel: scores and sums in fp32 for every dtype, no score matrix kept."""
        return self.dense_attention(q[None], k[None], v[None], None, scale)[0]

    def dense_attention(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
    ) -> Tensor:
        """As `causal_attention`, for a padded batch, in the dtype of k."""
        return fused_attention(q.to(k.dtype), k, v, key_mask, scale).to(q.dtype)
