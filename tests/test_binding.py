# SPDX-License-Identifier: Apache-2.0
"""CPU binding on texts and sysfs trees as machines give them, the awkward ones included."""

from __future__ import annotations

import os

import pytest
import torch

from gptneox.devices import binding
from gptneox.devices.cpu.device import CpuDevice

CHIPS_A2 = """\
        NPU ID                         Chip ID                        Chip Logic ID                  Chip Name
        0                              0                              0                              Ascend 910B4
        0                              1                              -                              Mcu
        1                              0                              1                              Ascend 910B4
        1                              1                              -                              Mcu
"""  # noqa: E501
CHIPS_DUO = """\
\tNPU ID            Chip ID           Chip Logic ID     Chip Name
\t2                 0                 0                 Ascend 310P3
\t2                 1                 1                 Ascend 310P3
\t2                 2                 -                 Mcu
\t5                 0                 2                 Ascend 310P3
\t5                 1                 3                 Ascend 310P3
"""
BOARD = """\
        NPU ID                         : {npu}
        Product Name                   : IT21DMDA
        Software Version               : 23.0.0
        PCIe Bus Info                  : {bus}
        Slot ID                        : 5
"""
LSCPU = """\
CPU(s):                          128
NUMA node(s):                    2
NUMA node0 CPU(s):               0-31,64-95
NUMA node1 CPU(s):               32-63,96-127
"""
LSPCI = (
    "{bus} Processing accelerators: Huawei Technologies Co., Ltd. Device d802\n\tNUMA node: {n}\n"
)


def make_sysfs(root, devices, nodes, num_nodes_in_dev=None):
    """devices: address -> NUMA node or None (no file); nodes: node -> cpulist."""
    for address, node in devices.items():
        folder = root / "bus/pci/devices" / address
        folder.mkdir(parents=True)
        (folder / "vendor").write_text("0x19e5\n")
        (folder / "class").write_text("0x120000\n")
        if node is not None:
            (folder / "numa_node").write_text(f"{node}\n")
    for node, cpulist in nodes.items():
        folder = root / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpulist + "\n")
    count = len(devices) if num_nodes_in_dev is None else num_nodes_in_dev
    for i in range(count):
        (root / f"class/devdrv-cdev/davinci{i}").mkdir(parents=True)
    return root


def tools(**texts):
    """A runner that answers by the first words of a command."""

    def run(*command):
        key = " ".join(command)
        return next((text for start, text in texts.items() if key.startswith(start)), "")

    return run


def silent(*_command):
    return ""


def refuse(*command):
    raise AssertionError(f"{command} was run although sysfs answers")


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0-3", [0, 1, 2, 3]),
        ("0-1,64-65\n", [0, 1, 64, 65]),
        ("7", [7]),
        ("0, 2-3 ,9", [0, 2, 3, 9]),
        ("", []),
        ("0-", []),
        ("all", []),
    ],
)
def test_cpu_lists(text, cpus):
    assert binding.parse_cpu_list(text) == cpus


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0000:C1:00.0", "0000:c1:00.0"),
        ("C1:00.0", "0000:c1:00.0"),
        ("0001:81:00.1", "0001:81:00.1"),
        ("NA", ""),
        ("", ""),
    ],
)
def test_addresses(text, address):
    assert binding.parse_address(text) == address


def test_chips_come_in_the_order_of_their_logic_ids():
    assert binding.parse_chips(CHIPS_A2) == [(0, 0), (1, 0)]
    assert binding.parse_chips(CHIPS_DUO) == [(2, 0), (2, 1), (5, 0), (5, 1)]
    turned = "\n".join(reversed(CHIPS_DUO.splitlines()))
    assert binding.parse_chips(turned) == [(2, 0), (2, 1), (5, 0), (5, 1)]
    assert binding.parse_chips("") == []


def test_sysfs_alone(tmp_path):
    devices = {"0000:01:00.0": 1, "0000:81:00.0": 0, "0000:c1:00.0": 0}
    sysfs = make_sysfs(tmp_path, devices, {0: "0-3,8-11", 1: "4-7,12-15"})
    addresses = binding.npu_addresses(sysfs, refuse)
    assert addresses == sorted(devices)

    def cores(i, n=0):
        return binding.choose_cores(addresses, i, n, sysfs=sysfs, run=refuse)

    assert cores(0) == [4, 5, 6, 7, 12, 13, 14, 15]
    assert cores(1) == [0, 1, 2, 3]  # two devices share node 0
    assert cores(2) == [8, 9, 10, 11]
    assert cores(2, 2) == [8, 9]  # CPU_BINDING_NUM
    assert cores(2, 99) == [8, 9, 10, 11]  # never a neighbour's
    assert cores(3) == []


def test_two_chips_of_a_card_share_an_address(tmp_path):
    """300I DUO: sysfs has one function for two devices, so npu-smi decides."""
    sysfs = make_sysfs(tmp_path, {"0000:81:00.0": 1}, {1: "4-7"}, num_nodes_in_dev=2)
    chips = "\n".join(CHIPS_DUO.splitlines()[:4])
    run = tools(
        **{"npu-smi info -m": chips, "npu-smi info -t board": BOARD.format(npu=2, bus="81:00.0")}
    )
    addresses = binding.npu_addresses(sysfs, run)
    assert addresses == ["0000:81:00.0"] * 2
    assert binding.choose_cores(addresses, 0, sysfs=sysfs, run=silent) == [4, 5]
    assert binding.choose_cores(addresses, 1, sysfs=sysfs, run=silent) == [6, 7]


def test_tools_where_sysfs_is_empty(tmp_path):
    bus = "0000:c1:00.0"
    run = tools(
        **{
            "npu-smi info -m": CHIPS_A2,
            "npu-smi info -t board -i 0": BOARD.format(npu=0, bus="0000:C1:00.0"),
            "npu-smi info -t board -i 1": BOARD.format(npu=1, bus="0000:01:00.0"),
            f"lspci -s {bus}": LSPCI.format(bus=bus, n=1),
            "lspci -s 0000:01:00.0": LSPCI.format(bus="01:00.0", n=-1),
            "lscpu": LSCPU,
        }
    )
    addresses = binding.npu_addresses(tmp_path, run)
    assert addresses == [bus, "0000:01:00.0"]
    cores = binding.choose_cores(addresses, 0, sysfs=tmp_path, run=run)
    assert cores == [*range(32, 64), *range(96, 128)]
    assert binding.choose_cores(addresses, 1, sysfs=tmp_path, run=run) == []  # node -1


def test_unknown_stays_unbound(tmp_path):
    assert binding.npu_addresses(tmp_path, silent) == []
    assert binding.choose_cores([], 0, sysfs=tmp_path, run=silent) == []
    assert binding.choose_cores([""], 0, sysfs=tmp_path, run=silent) == []
    assert binding.choose_cores(["0000:81:00.0"], 0, sysfs=tmp_path, run=silent) == []
    sysfs = make_sysfs(tmp_path / "s", {"0000:81:00.0": -1}, {0: "0-3"})
    assert binding.choose_cores(["0000:81:00.0"], 0, sysfs=sysfs, run=silent) == []


def test_more_devices_than_cores(tmp_path):
    devices = {f"0000:0{i}:00.0": 0 for i in range(4)}
    sysfs = make_sysfs(tmp_path, devices, {0: "0-1"})
    assert binding.choose_cores(sorted(devices), 0, sysfs=sysfs, run=silent) == []


def test_a_missing_tool_answers_nothing():
    assert binding.run_tool("no-such-program-here") == ""
    assert binding.run_tool("false") == ""
    assert binding.run_tool("sh", "-c", "echo $LC_ALL") == "C\n"  # what is printed is parsed


def test_binding_keeps_to_the_cores_one_may_use(monkeypatch):
    mine = sorted(os.sched_getaffinity(0))
    bound = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda _pid, cpus: bound.append(list(cpus)))
    binding.bind([mine[0], 10**6])
    assert bound == [[mine[0]]]
    binding.bind([10**6])
    binding.bind([])
    assert bound == [[mine[0]]]


@pytest.mark.parametrize("error", [PermissionError(1, "Operation not permitted"), OSError(22, "?")])
def test_a_system_that_refuses_binding_ends_no_run(monkeypatch, caplog, error):
    def refuse_all(*_):
        raise error

    monkeypatch.setattr(os, "sched_setaffinity", refuse_all)
    binding.bind(sorted(os.sched_getaffinity(0)))
    assert f"not bound to cores, which may be slower: {error.strerror}" in caplog.text


def make_topology(folder, siblings):
    for group in siblings:
        for cpu in group:
            path = folder / f"devices/system/cpu/cpu{cpu}/topology"
            path.mkdir(parents=True)
            (path / "thread_siblings_list").write_text(",".join(map(str, group)) + "\n")
    return folder


def test_ranks_share_physical_cores(tmp_path):
    sysfs = make_topology(tmp_path, [(0, 4), (1, 5), (2, 6), (3, 7)])

    def share(index, ranks, usable=range(8)):
        return binding.share_cores(index, ranks, usable, sysfs)

    assert share(0, 1) == [0, 1, 2, 3]  # one thread of each
    assert [share(i, 2) for i in range(2)] == [[0, 1], [2, 3]]
    assert [share(i, 3) for i in range(3)] == [[0], [1], [2]]
    assert [share(i, 5) for i in range(5)] == [[]] * 5
    assert share(1, 2, {0, 4, 6, 7}) == [6]  # of the three cores that may be used
    assert binding.physical_cores([3, 0, 4, 7], sysfs) == [[0, 4], [3, 7]]
    assert binding.physical_cores([1, 0], tmp_path / "silent") == [[0], [1]]


def test_the_cpu_backend_binds_as_many_threads_as_it_runs(monkeypatch):
    monkeypatch.setattr(binding, "usable_cpus", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(binding, "physical_cores", lambda usable, _="": [[c] for c in usable])
    monkeypatch.setattr(binding.cgroup, "cpu_quota", lambda _="": None)
    device = CpuDevice()
    before = torch.get_num_threads()
    try:
        device.setup(1, 2)
        assert torch.get_num_threads() == 2
        assert device.choose_cores(1, 2) == [2, 3]
        device.setup(1, 2, num_threads=1)  # the user's number, not more than the share
        assert device.choose_cores(1, 2) == [2, 3]
        device.setup(1, 2, num_threads=3)  # more than the share: these need room
        assert device.choose_cores(1, 2) == []
    finally:
        torch.set_num_threads(before)
