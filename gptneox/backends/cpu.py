# SPDX-License-Identifier: Apache-2.0
"""CPU: kernels of our own where they compile, else oneDNN's products and torch's attention."""

from __future__ import annotations

import functools
import platform
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptneox.backends import binding, cgroup, cpu_build
from gptneox.backends.base import (
    Backend,
    Finding,
    ForwardBatch,
    LayerWeights,
    Memory,
    PackedLayer,
    PackedLinear,
    dense_visibility,
)
from gptneox.config import ConfigError

# The numbers that the kernels know activations by.
ACTIVATION_IDS = {"gelu_erf": 1, "gelu_tanh": 2, "silu": 3, "relu": 4}


class CpuBackend(Backend):
    """Any CPU that torch runs on."""

    name, dist_backend, device_type = "cpu", "gloo", "cpu"

    def __init__(self) -> None:
        super().__init__()
        ops = torch.ops.mkldnn
        available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        self.has_onednn = available and hasattr(ops, "_linear_pointwise")
        self.fast_bf16 = self.has_onednn and bool(ops._is_mkldnn_bf16_supported())
        self.fast_fp16 = self.has_onednn and bool(ops._is_mkldnn_fp16_supported())

    @functools.cached_property
    def kernels(self) -> Any:
        """The compiled kernels, None without them."""
        return cpu_build.load()

    @property
    def fuses_layers(self) -> bool:  # type: ignore[override]
        """With the kernels a layer is two calls around attention."""
        return self.kernels is not None

    @property
    def attends_padded(self) -> bool:  # type: ignore[override]
        """The kernels do."""
        return self.kernels is not None

    @property
    def runs_all_layers(self) -> bool:  # type: ignore[override]
        """With the kernels a step is one call."""
        return self.kernels is not None

    def setup(self, local_rank: int, local_world_size: int = 1, num_threads: int = 0) -> None:
        """One thread per physical core of this rank's share, unless the user set a number."""
        torch.set_num_threads(num_threads or binding.threads_per_rank(local_world_size))

    def choose_cores(self, local_rank: int, local_world_size: int, limit: int = 0) -> list[int]:
        """Its share of the physical cores, unless the user wants more threads than that.

        `limit` is for the hosts of other devices.
        """
        cores = binding.share_cores(local_rank, local_world_size, binding.usable_cpus())
        return cores if torch.get_num_threads() <= len(cores) else []

    def memory(self) -> Memory:
        """From /proc/meminfo, lowered to the control groups' limits where there are any."""
        info = _meminfo()
        total, free = info.get("MemTotal", 0), info.get("MemAvailable", 0)
        groups = [(limit, room) for limit, room in cgroup.memory() if limit < total]
        total, free = map(min, zip((total, free), *groups, strict=True))
        return Memory(free, total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)

    def describe(self) -> str:
        """Processor name."""
        for line in _read("/proc/cpuinfo").splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
        return platform.processor() or platform.machine()

    def diagnose(self) -> list[Finding]:
        """The processor, and what its kernels were compiled for."""
        try:
            kernels, text = self.kernels, "none: switched off, or the warning says why"
        except ConfigError as error:
            return [*super().diagnose(), Finding(False, "CPU kernels", str(error))]
        if kernels is not None:
            text = kernels.describe()
        return [*super().diagnose(), Finding(kernels is not None or None, "CPU kernels", text)]

    def resolve_dtype(self, file_dtype: str, requested: str) -> tuple[torch.dtype, str]:
        """Half-precision files run in the fastest dtype that this processor has."""
        if requested != "auto" or file_dtype == "float32" or self.kernels:
            return super().resolve_dtype(file_dtype, requested)
        fast = {"bfloat16": self.fast_bf16, "float16": self.fast_fp16}
        if fast[file_dtype]:
            return getattr(torch, file_dtype), ""
        name = "bfloat16" if self.fast_bf16 else "float32"
        notice = (
            f"{file_dtype} weights run in {name}: this CPU has no fast {file_dtype} products "
            f"(--dtype float32 is exact, --dtype {file_dtype} is slow)"
        )
        return getattr(torch, name), notice

    # -- operators -------------------------------------------------------------------------------

    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        """With the kernels activations are fp32 between the products, whatever the weights are."""
        rows = F.embedding(ids, weight)
        return rows.float() if self.kernels else rows

    def pack_layer(self, weights: LayerWeights) -> PackedLayer:
        """Weights stay as they are: with the kernels a second normalisation costs nothing."""
        if self.kernels is None:
            return super().pack_layer(weights)
        named = (
            weights.query_key_value,
            weights.dense_h_to_4h,
            weights.dense,
            weights.dense_4h_to_h,
        )
        dense_bias, out_bias = weights.dense[1], weights.dense_4h_to_h[1].float().contiguous()
        if dense_bias is not None:
            out_bias = out_bias + dense_bias.float()
        qkv_bias = weights.query_key_value[1]
        layer = self.kernels.Layer(
            [t.float().contiguous() for t in (*weights.norm_attention, *weights.norm_mlp)],
            [self.kernels.pack(weight) for weight, _ in named],
            [
                None if qkv_bias is None else qkv_bias.float().contiguous(),
                weights.dense_h_to_4h[1].float().contiguous(),
                out_bias,
            ],
            weights.eps,
            ACTIVATION_IDS[weights.activation],
        )
        act = self.activation(weights.activation)
        return PackedLayer(layer, layer, weights.eps, act, len(weights.query_key_value[0]))

    def layer_front(self, x: Tensor, packed: PackedLayer) -> tuple[Tensor, Tensor]:
        """x [T, C]; returns qkv [T, 3W] and the activated MLP as `layer_back` reads it."""
        if self.kernels is None:
            return super().layer_front(x, packed)
        qkv, mlp = packed.front.front(x)
        return qkv, mlp

    def layer_back(
        self, attended: Tensor, mlp: Tensor, packed: PackedLayer, residual: Tensor | None = None
    ) -> Tensor:
        """attended [T, W] and `layer_front`'s MLP; the partial sum [T, C], or added in place."""
        if self.kernels is None:
            return super().layer_back(attended, mlp, packed, residual)
        partial = packed.back.back(attended, mlp, residual)
        assert isinstance(partial, Tensor)
        return partial

    def run_layers(
        self,
        x: Tensor,
        layers: Sequence[PackedLayer],
        rotary: tuple[Tensor, Tensor, Tensor],
        caches: Sequence[tuple[Tensor, Tensor]],
        batch: ForwardBatch,
        scale: float,
    ) -> Tensor:
        """One call for all of them; x is written over."""
        if self.kernels is None:
            return super().run_layers(x, layers, rotary, caches, batch, scale)
        self.kernels.run_layers(
            x,
            [layer.front for layer in layers],
            [cache for pair in caches for cache in pair],
            *rotary,
            batch.slot_mapping,
            batch.block_tables,
            batch.cu_seqlens_q,
            batch.context_lens,
            batch.num_decodes,
            scale,
            batch.starts,
        )
        return x

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """x [T, C]; statistics in fp32."""
        if self.kernels is None or x.dtype != torch.float32:
            return super().layer_norm(x, weight, bias, eps)
        out = self.kernels.layer_norm(x, weight, bias, eps)
        assert isinstance(out, Tensor)
        return out

    def greedy(self, logits: Tensor) -> Tensor:
        """One pass over the logits."""
        if self.kernels is None or logits.dtype != torch.float32:
            return super().greedy(logits)
        out = self.kernels.greedy(logits)
        assert isinstance(out, Tensor)
        return out

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """In panels for the kernels, else in oneDNN's blocked layout."""
        if self.kernels is not None:
            wide = None if bias is None else bias.float().contiguous()
            return PackedLinear(self.kernels.pack(weight), wide, weight.shape[1], weight.shape[0])
        fast = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and self.fast_bf16)
        if not (self.has_onednn and fast):
            return super().pack_linear(weight, bias)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        return PackedLinear(packed, bias, weight.shape[1], weight.shape[0])

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """x [T, K]; returns [T, F]."""
        if self.kernels is not None:
            return self.kernels.linear(x, packed.weight, packed.bias, 0).to(x.dtype)
        if not packed.weight.is_mkldnn:
            return super().linear(x, packed)
        out = torch.ops.mkldnn._linear_pointwise(x, packed.weight, packed.bias, "none", [], "")
        assert isinstance(out, Tensor)
        return out

    def allocate_kv_cache(
        self, num_blocks: int, block_size: int, num_heads: int, head_dim: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """For the kernels all tokens of a head lie together in a block: [N, H, P, D] transposed."""
        if self.kernels is None:
            return super().allocate_kv_cache(num_blocks, block_size, num_heads, head_dim, dtype)
        shape = (num_blocks, num_heads, block_size, head_dim)
        like = torch.empty(0, dtype=dtype)
        k, v = self.kernels.allocate(shape, like), self.kernels.allocate(shape, like)
        return k.transpose(1, 2), v.transpose(1, 2)

    def rotary_paged_attention(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor, Tensor],
        k_cache: Tensor,
        v_cache: Tensor,
        batch: ForwardBatch,
        scale: float,
    ) -> Tensor:
        """One call; the cache is read in place."""
        if self.kernels is None:
            return super().rotary_paged_attention(qkv, rotary, k_cache, v_cache, batch, scale)
        out = self.kernels.attention(
            qkv,
            *rotary,
            k_cache,
            v_cache,
            batch.slot_mapping,
            batch.block_tables,
            batch.cu_seqlens_q,
            batch.context_lens,
            batch.num_decodes,
            scale,
            batch.starts,
        )
        assert isinstance(out, Tensor)
        return out

    def causal_attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Torch's fused kernel: scores and sums in fp32 for every dtype, no score matrix kept."""
        s, length = q.shape[0], k.shape[0]
        mask = None
        if 1 < s < length:
            mask = torch.ones(s, length, dtype=torch.bool).tril(length - s)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=s == length and s > 1,
            scale=scale,
        )
        return out[0].transpose(0, 1)

    def decode_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: ForwardBatch, scale: float
    ) -> Tensor:
        """Two fp32 products per sequence, over blocks widened as they are gathered.

        For one query torch's fused kernel takes twice as long (measured at 8 x 280 tokens, 16
        heads of 128, bf16).
        """
        num_heads, head_dim = q.shape[1:]
        out = torch.empty(q.shape, dtype=q.dtype)
        q = (q.float() * scale).unsqueeze(-1)  # [B, H, D, 1]
        size = k_cache.shape[1]
        for b in range(batch.num_decodes):
            length = batch.context_lens_list[b]
            blocks = batch.block_tables[b, : -(-length // size)]
            k, v = (
                cache.index_select(0, blocks).float().view(-1, num_heads, head_dim)[:length]
                for cache in (k_cache, v_cache)
            )
            probs = torch.matmul(k.transpose(0, 1), q[b]).softmax(1)  # [H, L, 1]
            out[b] = torch.matmul(probs.transpose(1, 2), v.transpose(0, 1)).squeeze(1)
        return out

    def dense_attention(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
    ) -> Tensor:
        """As `causal_attention`, for a padded batch."""
        s, length = q.shape[1], k.shape[1]
        out_dtype, q = q.dtype, q.to(k.dtype)  # the kernels' activations are fp32
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
        return out.transpose(1, 2).to(out_dtype)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes."""
    entries = (line.split() for line in _read("/proc/meminfo").splitlines())
    return {e[0].rstrip(":"): int(e[1]) << 10 for e in entries if len(e) > 1}
