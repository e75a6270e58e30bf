# SPDX-License-Identifier: Apache-2.0
"""CPU without kernels of our own: oneDNN's products and torch's attention."""

from __future__ import annotations

import platform
import resource
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gptneox.backends import binding, cpu_build
from gptneox.backends.base import Backend, Finding, Memory, PackedLinear, dense_visibility
from gptneox.backends.step import ForwardBatch, LayerCache, PagedStep, RotaryTables, Step

_CGROUP = Path("/sys/fs/cgroup")


def create() -> CpuBackend:
    """The CPU, with kernels of our own where they can be had.

    Raises:
        ConfigError: GPTNEOX_CPU_KERNELS=on, and they cannot.
    """
    kernels = cpu_build.load()
    if kernels is None:
        return CpuBackend()
    from gptneox.backends.cpu_compiled import CompiledCpuBackend  # it builds on this module

    return CompiledCpuBackend(kernels)


class CpuPagedStep(PagedStep):
    """Decodes with two products per sequence."""

    def decode(self, layer: LayerCache, q: Tensor) -> Tensor:
        """Two fp32 products per sequence, over blocks widened as they are gathered.

        For one query torch's fused kernel takes twice as long (measured at 8 x 280 tokens, 16
        heads of 128, bf16).
        """
        num_heads, head_dim = q.shape[1:]
        out = torch.empty(q.shape, dtype=q.dtype)
        q = (q.float() * self.scale).unsqueeze(-1)  # [B, H, D, 1]
        size = layer[0].shape[1]
        for b in range(self.batch.num_decodes):
            length = self.batch.context_lens_list[b]
            blocks = self.batch.block_tables[b, : -(-length // size)]
            k, v = (
                cache.index_select(0, blocks).float().view(-1, num_heads, head_dim)[:length]
                for cache in layer
            )
            probs = torch.matmul(k.transpose(0, 1), q[b]).softmax(1)  # [H, L, 1]
            out[b] = torch.matmul(probs.transpose(1, 2), v.transpose(0, 1)).squeeze(1)
        return out


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

    def setup(self, local_rank: int, local_world_size: int = 1, num_threads: int = 0) -> None:
        """One thread per physical core of this rank's share, unless the user set a number."""
        cores = len(binding.physical_cores(binding.usable_cpus()))
        torch.set_num_threads(num_threads or max(1, cores // local_world_size))

    def choose_cores(self, local_rank: int, local_world_size: int, limit: int = 0) -> list[int]:
        """Its share of the physical cores, unless the user wants more threads than that.

        `limit` is for the hosts of other devices.
        """
        cores = binding.share_cores(local_rank, local_world_size, binding.usable_cpus())
        return cores if torch.get_num_threads() <= len(cores) else []

    def memory(self) -> Memory:
        """From /proc/meminfo, lowered to the container's limit where there is one."""
        info = _meminfo()
        total, free = info.get("MemTotal", 0), info.get("MemAvailable", 0)
        limit, used = _cgroup("memory.max"), _cgroup("memory.current")
        if limit and limit < total:
            reclaimable = _cgroup_reclaimable()
            total, free = limit, min(free, limit - (used or 0) + reclaimable)
        return Memory(free, total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)

    def describe(self) -> str:
        """Processor name."""
        for line in _read("/proc/cpuinfo").splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
        return platform.processor() or platform.machine()

    def diagnose(self) -> list[Finding]:
        """The processor, and that it runs without kernels."""
        text = "none: switched off, or the warning says why"
        return [*super().diagnose(), Finding(None, "CPU kernels", text)]

    def resolve_dtype(self, file_dtype: str, requested: str) -> tuple[torch.dtype, str]:
        """Half-precision files run in the fastest dtype that this processor has."""
        if requested != "auto" or file_dtype == "float32":
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

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """In oneDNN's blocked layout, where it has fast products of the dtype."""
        fast = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and self.fast_bf16)
        if not (self.has_onednn and fast):
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

    def begin(
        self,
        batch: ForwardBatch,
        layers: Sequence[LayerCache],
        tables: RotaryTables,
        scale: float,
    ) -> Step:
        """See `Backend.begin`."""
        return CpuPagedStep(self, batch, layers, tables, scale)

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

    def dense_attention(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
    ) -> Tensor:
        """As `causal_attention`, for a padded batch."""
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


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes."""
    entries = (line.split() for line in _read("/proc/meminfo").splitlines())
    return {e[0].rstrip(":"): int(e[1]) << 10 for e in entries if len(e) > 1}


def _cgroup(name: str) -> int | None:
    """A number of the container's memory controller (version 2), None when unlimited."""
    text = _read(_CGROUP / name).strip()
    return int(text) if text.isdigit() else None


def _cgroup_reclaimable() -> int:
    """File pages the kernel gives back under pressure."""
    entries = (line.split() for line in _read(_CGROUP / "memory.stat").splitlines())
    return sum(int(e[1]) for e in entries if e[0] in ("inactive_file", "active_file"))
