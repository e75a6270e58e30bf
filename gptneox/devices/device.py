# SPDX-License-Identifier: Apache-2.0
"""A device lives as long as the process: memory, cores, limits, diagnosis, collectives.

It knows no model. What computes with a model's weights are the `Operators` that it makes.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from gptneox.devices import binding

if TYPE_CHECKING:
    from gptneox.devices.cache import KVFormat
    from gptneox.devices.operators import Operators

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Memory:
    """Bytes of the device this process computes on."""

    free: int
    total: int
    peak: int


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis; `ok` False: a run would not start, None: a warning."""

    ok: bool | None
    topic: str
    text: str


class Device:
    """The device of a process; subclasses override what differs on theirs."""

    name: ClassVar[str] = "base"
    dist_backend: ClassVar[str] = "gloo"
    device_type: ClassVar[str] = "cpu"
    pins_memory: ClassVar[bool] = False  # copies overlap when they start in page-locked memory

    def __init__(self) -> None:
        self.torch_device = torch.device(self.device_type)

    def operators(self, graphs: str = "auto") -> Operators:
        """Operators for one model, whose state they keep.

        Args:
            graphs: [engine] graphs, "on", "off", or "auto" as the device thinks best.
        """
        from gptneox.devices.operators import Operators  # it needs this module

        return Operators(self, graphs)

    def why_unusable(self) -> str:
        """Empty when this device can be used here, else the reason and the remedy."""
        return ""

    def count(self) -> int:
        """How many of this kind this process sees; 0: the host itself computes."""
        return 0

    def setup(self, local_rank: int, local_world_size: int = 1, num_threads: int = 0) -> None:
        """Bind this process to its device."""

    def is_installed(self) -> bool:
        """Whether the device's software is present: falling back from it is worth a warning."""
        return False

    def collectives(self, requested: str) -> str:
        """The torch.distributed backend to use; `requested` is [model] parallel_backend."""
        return self.dist_backend

    def pci_addresses(self) -> list[str]:
        """Where the visible devices sit, as 0000:c1:00.0; empty when unknown."""
        return []

    def choose_cores(self, local_rank: int, local_world_size: int, limit: int = 0) -> list[int]:
        """Logical processors for this process, after `setup`; empty: any.

        `limit` is CPU_BINDING_NUM, the most it takes; 0 means its whole share.
        """
        cores = binding.choose_cores(self.pci_addresses(), local_rank, limit)
        if not cores and self.pci_addresses():
            logger.debug("no CPU binding: the NUMA node of device %d is not known", local_rank)
        return cores

    def diagnose(self) -> list[Finding]:
        """Software and devices, also where `why_unusable` has a reason."""
        if self.why_unusable():
            return []
        memory = self.memory()
        text = f"{self.describe()}, {memory.free / 2**30:.1f} GiB free of "
        return [Finding(True, "device", f"{text}{memory.total / 2**30:.1f} GiB")]

    def synchronize(self) -> None:
        """Wait until everything launched so far is done."""

    def memory(self) -> Memory:
        """Free, total and peak bytes."""
        raise NotImplementedError

    def describe(self) -> str:
        """Device name for logs and result files."""
        return self.name

    @property
    def hardware(self) -> str:
        """NPU, GPU or CPU: the folder of result files."""
        return {"cuda": "GPU"}.get(self.name, self.name.upper())

    def resolve_dtype(self, file_dtype: str, requested: str) -> tuple[torch.dtype, str]:
        """The dtype to compute in, and a one-line notice when it is not what the file holds."""
        name = file_dtype if requested == "auto" else requested
        return getattr(torch, name), ""

    def check_kv_format(self, kv_format: KVFormat, head_dim: int) -> None:
        """Refuse a KV cache that no operator of this device reads.

        Raises:
            ConfigError: with the reason.
        """

    def cache_bytes(self) -> int:
        """Size of the largest cache before the memory; 0: not known, or too small to matter."""
        return 0

    def measure_bandwidth(self, num_bytes: int = 0) -> float:
        """Bytes per second that reading a tensor reaches; best of a few passes.

        Args:
            num_bytes: size of the tensor; 0: larger than every cache, so that memory is read.
        """
        if not num_bytes:
            num_bytes = max(1 << 28, 2 * self.cache_bytes())
            num_bytes = min(num_bytes, max(1 << 26, self.memory().free // 4)) // 4 * 4
        data = torch.ones(num_bytes // 4, dtype=torch.float32, device=self.torch_device)
        seconds = []
        for _ in range(5):
            self.synchronize()
            start = time.perf_counter()
            data.sum()
            self.synchronize()
            seconds.append(time.perf_counter() - start)
        return num_bytes / min(seconds)

    def measure_matmul(self, dtype: torch.dtype) -> float:
        """FLOP per second of a large square product by `Operators.linear`; best of a few passes.

        The matrices double in size until one product takes 20 ms, or 8192 rows.
        """
        rows, ops = 256, self.operators()
        while True:
            x = torch.ones(rows, rows, dtype=dtype, device=self.torch_device)
            packed = ops.pack_linear(x, None)
            seconds = []
            for _ in range(4):  # the first one warms up
                self.synchronize()
                start = time.perf_counter()
                ops.linear(x, packed)
                self.synchronize()
                seconds.append(time.perf_counter() - start)
            if min(seconds) >= 0.02 or rows >= 8192:
                return 2 * rows**3 / min(seconds)
            rows *= 2
