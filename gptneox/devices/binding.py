# SPDX-License-Identifier: Apache-2.0
"""CPU binding: each rank runs on a share of the cores of its device's NUMA node.

A rank of CPU inference gets an even share of all cores, one thread per physical core. The topology
comes from sysfs, or from npu-smi, lspci and lscpu where sysfs lacks it (old containers). If it
remains unknown, the process is not bound.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from gptneox.config.environment import variables
from gptneox.devices import cgroup

logger = logging.getLogger(__name__)

SYSFS = Path("/sys")
HUAWEI, ACCELERATOR_CLASS = "0x19e5", "0x1200"
Runner = Callable[..., str]


def run_tool(*command: str) -> str:
    """Output of a program, in English; empty if it is missing, fails or times out."""
    environment = {**variables(), "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def parse_cpu_list(text: str) -> list[int]:
    """`0-3,64-67,70` as numbers; empty for any other text."""
    cpus: list[int] = []
    for item in text.strip().split(","):
        span = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", item)
        if not span:
            return []
        cpus += range(int(span[1]), int(span[2] or span[1]) + 1)
    return cpus


def parse_address(text: str) -> str:
    """The PCI address (`C1:00.0` or `0000:C1:00.0`) in sysfs form; empty if there is none."""
    match = re.search(r"\b(?:([0-9a-f]{4}):)?([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])\b", text, re.I)
    return f"{match[1] or '0000'}:{match[2]}".lower() if match else ""


def parse_chips(text: str) -> list[tuple[int, int]]:
    """(NPU ID, chip ID) in the order of the logic ids, from `npu-smi info -m`.

    Rows with the logic id "-" are management controllers and are skipped.
    """
    rows = re.findall(r"^\s*(\d+)\s+(\d+)\s+(\d+)\s+\S", text, re.M)
    return [(int(npu), int(chip)) for npu, chip, _ in sorted(rows, key=lambda r: int(r[2]))]


def parse_bus(text: str) -> str:
    """PCI address from `npu-smi info -t board -i NPU -c CHIP`."""
    match = re.search(r"PCIe Bus Info\s*:\s*(\S+)", text)
    return parse_address(match[1]) if match else ""


def accelerator_addresses(sysfs: Path) -> list[str]:
    """PCI addresses of Huawei's accelerators, in order."""
    addresses = []
    for device in sorted(sysfs.glob("bus/pci/devices/*")):
        is_huawei = _read(device / "vendor") == HUAWEI
        if is_huawei and _read(device / "class").startswith(ACCELERATOR_CLASS):
            addresses.append(device.name.lower())
    return addresses


def npu_addresses(sysfs: Path = SYSFS, run: Runner = run_tool) -> list[str]:
    """PCI address of every NPU, in the order of the device numbers; empty if unknown.

    The two chips of a card may share one PCI address, so sysfs is used only if it lists as many
    accelerators as there are device nodes.
    """
    addresses = accelerator_addresses(sysfs)
    num_nodes = len(list(sysfs.glob("class/devdrv-cdev/davinci[0-9]*")))
    if addresses and num_nodes == len(addresses):
        return addresses
    chips = parse_chips(run("npu-smi", "info", "-m"))
    addresses = [
        parse_bus(run("npu-smi", "info", "-t", "board", "-i", str(npu), "-c", str(chip)))
        for npu, chip in chips
    ]
    return addresses if all(addresses) else []


def numa_node(address: str, sysfs: Path = SYSFS, run: Runner = run_tool) -> int | None:
    """The NUMA node of a PCI device; None if unknown (-1)."""
    text = _read(sysfs / "bus/pci/devices" / address / "numa_node")
    if not text:
        match = re.search(r"NUMA node:\s*(-?\d+)", run("lspci", "-s", address, "-vvv"))
        text = match[1] if match else ""
    return int(text) if text.isdigit() else None


def node_cpus(node: int, sysfs: Path = SYSFS, run: Runner = run_tool) -> list[int]:
    """The cores of a NUMA node."""
    text = _read(sysfs / f"devices/system/node/node{node}/cpulist")
    if not text:
        match = re.search(rf"NUMA node{node} CPU\(s\):\s*(\S+)", run("lscpu"))
        text = match[1] if match else ""
    return parse_cpu_list(text)


def choose_cores(
    addresses: Sequence[str],
    index: int,
    cores_per_device: int = 0,
    *,
    sysfs: Path = SYSFS,
    run: Runner = run_tool,
) -> list[int]:
    """Cores for device `index`; empty if the process should not be bound.

    Devices on one node share its cores evenly, in the order of their numbers.

    Args:
        addresses: PCI address of each visible device.
        index: this process's device.
        cores_per_device: CPU_BINDING_NUM; 0 for the whole share.
        sysfs: root of sysfs.
        run: runs a program and returns its output.
    """
    if not 0 <= index < len(addresses):
        return []
    nodes = [numa_node(address, sysfs, run) if address else None for address in addresses]
    node = nodes[index]
    if node is None:
        return []
    cpus = node_cpus(node, sysfs, run)
    share = len(cpus) // nodes.count(node)
    first = nodes[:index].count(node) * share
    return cpus[first : first + min(share, cores_per_device or share)]


def physical_cores(usable: Iterable[int], sysfs: Path = SYSFS) -> list[list[int]]:
    """The usable logical processors of each physical core, in order.

    Without topology information each logical processor counts as a core.
    """
    cores: dict[int, list[int]] = {}
    for cpu in sorted(usable):
        topology = sysfs / f"devices/system/cpu/cpu{cpu}/topology"
        siblings = parse_cpu_list(_read(topology / "thread_siblings_list")) or [cpu]
        cores.setdefault(min(siblings), []).append(cpu)
    return list(cores.values())


def share_cores(
    index: int, num_ranks: int, usable: Iterable[int], sysfs: Path = SYSFS
) -> list[int]:
    """Rank `index`'s even share of the physical cores, one logical processor of each.

    Empty if there are more ranks than cores; the system schedules them then.
    """
    cores = [siblings[0] for siblings in physical_cores(usable, sysfs)]
    share = len(cores) // num_ranks
    return cores[index * share : (index + 1) * share]


def usable_cpus() -> list[int]:
    """The logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def threads_per_rank(num_ranks: int, sysfs: Path = SYSFS, proc: Path = cgroup.PROC) -> int:
    """One thread per physical core of a rank's even share, limited by the cgroups' CPU quota.

    A thread that the quota throttles would make all others wait.
    """
    cores = len(physical_cores(usable_cpus(), sysfs))
    quota = cgroup.cpu_quota(proc)
    if quota is not None:
        cores = min(cores, int(quota))
    return max(1, cores // num_ranks)


def bind(cores: Sequence[int]) -> None:
    """Bind this process to the usable ones of `cores`; does nothing if there are none.

    If the system refuses, as some sandboxes do, a warning is enough: the run is only slower.
    """
    usable = sorted(set(cores) & set(usable_cpus()))
    if not usable or not hasattr(os, "sched_setaffinity"):
        return
    try:
        os.sched_setaffinity(0, usable)
    except OSError as error:
        logger.warning("not bound to cores, which may be slower: %s (BIND_CPU=0)", error.strerror)
        return
    logger.info("bound to %d cores, %d to %d", len(usable), usable[0], usable[-1])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
