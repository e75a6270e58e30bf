# SPDX-License-Identifier: Apache-2.0
"""NVIDIA GPU as a device: the driver, memory, capture of graphs."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptneox.config.environment import Environment
from gptneox.config.settings import parse_device_ids
from gptneox.devices.cuda.operators import CudaOperators
from gptneox.devices.device import Device, Finding, Memory

logger = logging.getLogger(__name__)


def create() -> CudaDevice:
    """The GPU."""
    return CudaDevice()


class CudaDevice(Device):
    """The GPU that `setup` bound this process to."""

    name, dist_backend, device_type = "cuda", "nccl", "cuda"
    pins_memory = True

    def operators(self, graphs: str = "auto") -> CudaOperators:
        """See `Device.operators`."""
        return CudaOperators(self, graphs)

    def is_installed(self) -> bool:
        """Whether the driver is there, whatever torch was built for."""
        return Path("/proc/driver/nvidia/version").exists() or bool(shutil.which("nvidia-smi"))

    def why_unusable(self) -> str:
        """Asks nothing that would open a device: rank 3 must not take memory on device 0."""
        if torch.version.cuda is None:
            return (
                f"torch {torch.__version__} was built without CUDA; install the CUDA build "
                "(on Linux: pip install --force-reinstall torch, from the default index)"
            )
        if torch.cuda.device_count() < 1:
            return (
                "no GPU is visible; look at `nvidia-smi`, at CUDA_VISIBLE_DEVICES, and whether "
                "the container was given the GPUs (docker run --gpus all)"
            )
        if not torch.cuda.is_available():
            return (
                f"the driver does not serve CUDA {torch.version.cuda}; bring it up to date, or "
                "install a torch built for an older CUDA"
            )
        return ""

    def count(self) -> int:
        """See `Device`."""
        return len(self.devices())

    def devices(self) -> list[int]:
        """Numbers of this machine's GPUs in the order of local ranks.

        Those of ASCEND_RT_VISIBLE_DEVICES, which the launchers count ranks by, among those that
        CUDA_VISIBLE_DEVICES leaves visible.

        Raises:
            RuntimeError: a number that is not there.
        """
        count = torch.cuda.device_count()
        visible = Environment.read().visible_devices
        if not visible:
            return list(range(count))
        numbers = parse_device_ids(visible)
        if max(numbers) >= count:
            raise RuntimeError(
                f"ASCEND_RT_VISIBLE_DEVICES={visible} names a GPU that is not there: {count} "
                f"visible, numbered from 0 to {count - 1} (CUDA_VISIBLE_DEVICES renumbers them)"
            )
        return numbers

    def setup(self, local_rank: int, local_world_size: int = 1, num_threads: int = 0) -> None:
        """Take the GPU of `local_rank`; products accumulate in fp32 and fp32 ones stay fp32.

        Raises:
            RuntimeError: there are fewer GPUs than ranks, or `why_unusable` has a reason.
        """
        if reason := self.why_unusable():
            raise RuntimeError(reason)
        numbers = self.devices()
        if local_rank >= len(numbers):
            raise RuntimeError(
                f"rank {local_rank} has no GPU: {len(numbers)} for {local_world_size} ranks; list "
                f"{local_world_size} numbers of `nvidia-smi` in CUDA_VISIBLE_DEVICES"
            )
        self.torch_device = torch.device("cuda", numbers[local_rank])
        torch.cuda.set_device(self.torch_device)
        if num_threads:
            torch.set_num_threads(num_threads)
        torch.set_float32_matmul_precision("highest")
        products: Any = torch.backends.cuda.matmul
        products.allow_fp16_reduced_precision_reduction = False
        products.allow_bf16_reduced_precision_reduction = False

    def synchronize(self) -> None:
        """Wait for everything launched on the device."""
        torch.cuda.synchronize(self.torch_device)

    def memory(self) -> Memory:
        """As the driver counts, once torch has given back what it only keeps for later."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return Memory(free, total, torch.cuda.max_memory_allocated(self.torch_device))

    def describe(self) -> str:
        """Name of the GPU."""
        return torch.cuda.get_device_name(self.torch_device)

    @functools.cached_property
    def num_cores(self) -> int:
        """Streaming multiprocessors."""
        return int(torch.cuda.get_device_properties(self.torch_device).multi_processor_count)

    @functools.cached_property
    def capability(self) -> tuple[int, int]:
        """Compute capability."""
        return torch.cuda.get_device_capability(self.torch_device)

    def pci_addresses(self) -> list[str]:
        """In the order of local ranks; empty when this torch does not say."""
        addresses = []
        for number in self.devices():
            properties: Any = torch.cuda.get_device_properties(number)
            if not hasattr(properties, "pci_bus_id"):
                return []
            domain, bus = properties.pci_domain_id, properties.pci_bus_id
            addresses.append(f"{domain:04x}:{bus:02x}:{properties.pci_device_id:02x}.0")
        return addresses

    def resolve_dtype(self, file_dtype: str, requested: str) -> tuple[torch.dtype, str]:
        """Bfloat16 files run in float16 on a GPU that has no bfloat16 products."""
        if requested == "auto" and file_dtype == "bfloat16" and self.capability < (8, 0):
            notice = (
                f"bfloat16 weights run in float16: {self.describe()} has no bfloat16 products "
                "(--dtype float32 is exact)"
            )
            return torch.float16, notice
        return super().resolve_dtype(file_dtype, requested)

    def diagnose(self) -> list[Finding]:
        """Versions, devices and their memory."""
        if self.why_unusable():
            return []
        cuda: Any = torch.cuda
        has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
        nccl = ".".join(map(str, cuda.nccl.version())) if has_nccl else "missing"
        text = f"torch {torch.__version__} for CUDA {torch.version.cuda}, NCCL {nccl}, triton "
        text += "there" if importlib.util.find_spec("triton") else "missing"
        findings = [Finding(True, "software", text)]
        try:
            numbers = self.devices()
        except RuntimeError as error:
            return [*findings, Finding(False, "devices", str(error))]
        for number in numbers:
            free, total = torch.cuda.mem_get_info(number)
            major, minor = torch.cuda.get_device_capability(number)
            text = f"{torch.cuda.get_device_name(number)}, compute capability {major}.{minor}, "
            text += f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f} GiB"
            findings.append(Finding(True, f"device {number}", text))
        return findings

    def out_of_memory(self, what: str, remedy: str) -> RuntimeError:
        """The error to raise when the memory cannot hold `what`."""
        memory = self.memory()
        return RuntimeError(
            f"not enough GPU memory for {what}: {memory.free / 2**30:.2f} GiB free of "
            f"{memory.total / 2**30:.2f} GiB; use more GPUs (TP_WORLD_SIZE) or {remedy}, or end "
            "what else runs there (nvidia-smi)"
        )

    def record(
        self, run: Callable[[], Tensor], pools: list[Any]
    ) -> tuple[Callable[[], None], Tensor]:
        """Run twice on a stream of its own, so that everything lazy has happened, then capture.

        The graphs of one model share a pool of memory, kept in `pools` (none before the first,
        and no longer than they live): they replay one after the other, and what one returns is
        used up before the next.
        """
        cuda: Any = torch.cuda
        current, side = cuda.current_stream(), cuda.Stream()
        side.wait_stream(current)
        with cuda.stream(side):
            for _ in range(2):
                run()
        current.wait_stream(side)
        graph = cuda.CUDAGraph()
        # thread_local: NCCL's watchdog asks for events from a thread of its own meanwhile.
        with cuda.graph(
            graph,
            pool=pools[0] if pools else None,
            stream=side,
            capture_error_mode="thread_local",
        ):
            out = run()
        if not pools:
            pools.append(graph.pool())
        return graph.replay, out
