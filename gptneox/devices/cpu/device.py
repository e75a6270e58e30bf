# SPDX-License-Identifier: Apache-2.0
"""The CPU as a device: memory, threads and cores."""

from __future__ import annotations

import platform
import re
import resource
from pathlib import Path

import torch

from gptneox.devices import binding, cgroup
from gptneox.devices.cpu import build
from gptneox.devices.cpu.operators import CpuOperators
from gptneox.devices.device import Device, Finding, Memory
from gptneox.devices.operators import Operators

_CACHES = "/sys/devices/system/cpu/cpu0/cache"


def create() -> CpuDevice:
    """The CPU, with kernels of our own where they can be had.

    Raises:
        ConfigError: GPTNEOX_CPU_KERNELS=on, and they cannot.
    """
    kernels = build.load()
    if kernels is None:
        return CpuDevice()
    from gptneox.devices.cpu.compiled import CompiledCpuDevice  # it builds on this module

    return CompiledCpuDevice(kernels)


class CpuDevice(Device):
    """Any CPU that torch runs on."""

    name, dist_backend, device_type = "cpu", "gloo", "cpu"

    def __init__(self) -> None:
        super().__init__()
        ops = torch.ops.mkldnn
        available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        self.has_onednn = available and hasattr(ops, "_linear_pointwise")
        self.fast_bf16 = self.has_onednn and bool(ops._is_mkldnn_bf16_supported())
        self.fast_fp16 = self.has_onednn and bool(ops._is_mkldnn_fp16_supported())

    def operators(self, graphs: str = "auto") -> Operators:
        """See `Device.operators`."""
        return CpuOperators(self, graphs)

    def setup(self, local_rank: int, local_world_size: int = 1, num_threads: int = 0) -> None:
        """One thread per physical core of this rank's share, unless the user set a number."""
        torch.set_num_threads(num_threads or binding.threads_per_rank(local_world_size))

    def choose_cores(self, local_rank: int, local_world_size: int, limit: int = 0) -> list[int]:
        """Its share of the physical cores, unless the user wants more threads than that.

        `limit` is for the hosts of other devices.
        """
        cores = binding.share_cores(local_rank, local_world_size, binding.usable_cpus())
        return cores if torch.get_num_threads() <= len(cores) else []

    def cache_bytes(self) -> int:
        """The last-level cache of the first processor."""
        sizes = [_read(path).strip() for path in Path(_CACHES).glob("index*/size")]
        units = {"K": 10, "M": 20}
        return max(
            (int(size[:-1]) << units[size[-1]] for size in sizes if size[-1:] in units), default=0
        )

    def memory(self) -> Memory:
        """From /proc/meminfo, lowered to the control groups' limits where there are any."""
        info = _meminfo()
        total, free = info.get("MemTotal", 0), info.get("MemAvailable", 0)
        groups = [(limit, room) for limit, room in cgroup.memory() if limit < total]
        total, free = map(min, zip((total, free), *groups, strict=True))
        return Memory(free, total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)

    def describe(self) -> str:
        """Processor name; on aarch64 /proc/cpuinfo has only numbers, which lscpu knows."""
        for line in _read("/proc/cpuinfo").splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
        match = re.search(r"^Model name:\s*(\w.*)$", binding.run_tool("lscpu"), re.M)
        return match[1].strip() if match else platform.processor() or platform.machine()

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


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes."""
    entries = (line.split() for line in _read("/proc/meminfo").splitlines())
    return {e[0].rstrip(":"): int(e[1]) << 10 for e in entries if len(e) > 1}
