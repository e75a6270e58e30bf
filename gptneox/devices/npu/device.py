# SPDX-License-Identifier: Apache-2.0
"""Ascend NPUs as a device: Atlas 800I A2 (910B) and 300I DUO (310P), told apart by SoC version."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
from typing import Any

import torch

from gptneox.config.environment import Environment
from gptneox.config.errors import ConfigError
from gptneox.config.settings import parse_device_ids
from gptneox.devices import binding
from gptneox.devices.cache import Int8KV, KVFormat
from gptneox.devices.device import Device, Finding, Memory
from gptneox.devices.npu.attention import check_int8
from gptneox.devices.npu.operators import NpuOperators
from gptneox.devices.npu.setup import (
    NNAL_SCRIPT,
    cann_findings,
    explain_import_error,
    hccl_finding,
    release,
    version_conflict,
)

logger = logging.getLogger(__name__)

# Source: NpuVariables.h of Ascend/pytorch.
SOC_310P, SOC_910B = range(200, 206), range(220, 226)


@functools.cache
def load_torch_npu() -> Any:
    """torch_npu, set up for inference.

    Raises:
        ImportError: it is not there or does not work; the message has the remedy.
    """
    if importlib.util.find_spec("torch_npu") is None:
        torch_release = release(torch.__version__)
        raise ImportError(
            f"torch_npu is not installed; on an Ascend machine: pip install "
            f"torch_npu=={torch_release}"
        )
    try:
        conflict = version_conflict(torch.__version__, importlib.metadata.version("torch_npu"))
    except importlib.metadata.PackageNotFoundError:
        conflict = ""
    if conflict:
        raise ImportError(conflict)
    try:
        return importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(explain_import_error(error)) from error


def create() -> NpuDevice:
    """The NPU."""
    return NpuDevice()


class NpuDevice(Device):
    """The NPU that `setup` bound this process to."""

    name, dist_backend, device_type = "npu", "hccl", "npu"

    def __init__(self) -> None:
        # Not `super().__init__()`: torch knows the type only once torch_npu is there.
        pass

    def operators(self, graphs: str = "auto") -> NpuOperators:
        """See `Device.operators`."""
        return NpuOperators(self, graphs)

    @functools.cached_property
    def torch_device(self) -> torch.device:  # type: ignore[override]
        """The process's current NPU."""
        load_torch_npu()
        return torch.device("npu")

    @property
    def torch_npu(self) -> Any:
        """The package whose functions are the operators."""
        return load_torch_npu()

    def is_installed(self) -> bool:
        """Whether torch_npu is there, working or not."""
        return importlib.util.find_spec("torch_npu") is not None

    def why_unusable(self) -> str:
        """Asks nothing that would open a device: rank 3 must not take memory on device 0."""
        try:
            load_torch_npu()
        except ImportError as error:
            return str(error)
        if self.torch_npu.npu.device_count() < 1:
            return (
                "no NPU is visible; look at `npu-smi info`, at ASCEND_RT_VISIBLE_DEVICES, and "
                "whether the container was given /dev/davinci*"
            )
        return ""

    def count(self) -> int:
        """See `Device`."""
        return int(self.torch_npu.npu.device_count())

    def setup(self, local_rank: int, local_world_size: int = 1, num_threads: int = 0) -> None:
        """Take device `local_rank` of the visible ones.

        Raises:
            RuntimeError: there are fewer devices than ranks, or the chip is not known.
        """
        load_torch_npu()
        count = self.torch_npu.npu.device_count()
        if local_rank >= count:
            raise RuntimeError(
                f"rank {local_rank} has no NPU: {count} visible for {local_world_size} ranks; list "
                f"{local_world_size} devices of `npu-smi info` in ASCEND_RT_VISIBLE_DEVICES"
            )
        self.torch_npu.npu.set_device(local_rank)
        if num_threads:
            torch.set_num_threads(num_threads)
        _ = self.is_310p

    @functools.cached_property
    def is_310p(self) -> bool:
        """Atlas 300I DUO rather than A2; asking opens the device."""
        soc = int(self.torch_npu.npu.get_soc_version())
        if soc not in SOC_310P and soc not in SOC_910B:
            raise RuntimeError(
                f"{self.describe()} (SoC {soc}) is not supported; Atlas 800I A2 (910B) and 300I "
                "DUO (310P) are. Use --device cpu"
            )
        # With the default the 310P compiles basic operators one by one while it runs.
        self.torch_npu.npu.set_compile_mode(jit_compile=False)
        return soc in SOC_310P

    @functools.cached_property
    def has_atb(self) -> bool:
        """Whether NNAL's ATB operators are there. The functions of torch_npu always are.

        torch_npu 2.5 loads their library at the first call of such a function, others at once.
        """
        if not hasattr(torch.ops.atb, "_npu_paged_attention"):
            with contextlib.suppress(ImportError, OSError):
                loader = importlib.import_module("torch_npu.op_plugin.atb._atb_ops")
                loader._register_atb_extensions()
        return hasattr(torch.ops.atb, "_npu_paged_attention")

    def collectives(self, requested: str) -> str:
        """Hccl; lccl on request, where the chip has the links for it.

        Raises:
            ConfigError: lccl on a 300I DUO.
        """
        if requested != "lccl":
            return self.dist_backend
        if self.is_310p:
            raise ConfigError(
                "parallel_backend is lccl, which a 300I DUO has not; use hccl (unset BACKEND)"
            )
        return "lccl"

    def pci_addresses(self) -> list[str]:
        """Of the visible devices, in their order."""
        addresses = binding.npu_addresses()
        if visible := Environment.read().visible_devices:
            numbers = parse_device_ids(visible)
            return [addresses[n] if n < len(addresses) else "" for n in numbers]
        return addresses

    def synchronize(self) -> None:
        """Wait for the current stream."""
        self.torch_npu.npu.synchronize()

    def memory(self) -> Memory:
        """As the driver counts."""
        free, total = self.torch_npu.npu.mem_get_info()
        return Memory(free, total, self.torch_npu.npu.max_memory_allocated())

    def describe(self) -> str:
        """SoC name."""
        return str(self.torch_npu.npu.get_device_name(self.torch_npu.npu.current_device()))

    def resolve_dtype(self, file_dtype: str, requested: str) -> tuple[torch.dtype, str]:
        """Half precision only: the attention operators take no fp32, the 310P no bf16.

        Raises:
            ConfigError: a dtype was named that the chip cannot compute in.
        """
        allowed = ("float16",) if self.is_310p else ("float16", "bfloat16")
        if requested in allowed:
            return getattr(torch, requested), ""
        if requested != "auto":
            raise ConfigError(
                f"dtype {requested} is not served on {self.describe()}; use {' or '.join(allowed)}"
            )
        if file_dtype in allowed:
            return getattr(torch, file_dtype), ""
        return torch.float16, f"{file_dtype} weights run in float16 on {self.describe()}"

    def check_kv_format(self, kv_format: KVFormat, head_dim: int) -> None:
        """See `Device`."""
        if isinstance(kv_format, Int8KV):
            check_int8(self.is_310p, head_dim)

    def diagnose(self) -> list[Finding]:
        """Versions, devices and their memory."""
        try:
            npu_version = importlib.metadata.version("torch_npu")
        except importlib.metadata.PackageNotFoundError:
            return []
        environment = Environment.read()
        findings = cann_findings(npu_version, environment.ascend_home)
        if self.why_unusable():
            return findings
        count = self.torch_npu.npu.device_count()
        asked = len(parse_device_ids(environment.visible_devices or "0"))
        if asked > count:
            text = f"{asked} listed in ASCEND_RT_VISIBLE_DEVICES, {count} found; see `npu-smi info`"
            findings.append(Finding(False, "devices", text))
        addresses = self.pci_addresses()
        for i in range(count):
            self.torch_npu.npu.set_device(i)
            memory = self.memory()
            address = addresses[i] if i < len(addresses) else ""
            node = binding.numa_node(address) if address else None
            where = "NUMA node unknown" if node is None else f"NUMA node {node}"
            text = f"{self.describe()}, {memory.free / 2**30:.1f} GiB free of "
            text += f"{memory.total / 2**30:.1f} GiB, {where}"
            findings.append(Finding(True, f"device {i}", text))
        self.torch_npu.npu.set_device(0)
        atb = "there" if self.has_atb else "missing"
        if self.is_310p and not self.has_atb:
            atb += f": attention takes slower operators; type: source {NNAL_SCRIPT}"
        findings.append(Finding(True, "NNAL (ATB)", atb))
        if asked > 1 or environment.world_size > 1:
            findings.append(hccl_finding(environment.hccl_base_port, environment.hccl_port_range))
        return findings
