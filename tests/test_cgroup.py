# SPDX-License-Identifier: Apache-2.0
"""Limits of control groups, on trees as machines have them: both versions, nested, mixed."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptneox.devices import binding, cgroup
from gptneox.devices.cpu import device as cpu

GIB = 1 << 30
NO_LIMIT = 9223372036854771712  # what version 1 says


class Tree:
    """A fake /proc and fake mounts below a folder."""

    def __init__(self, root: Path) -> None:
        """No group at all."""
        self.root, self.proc = root, root / "proc"
        (self.proc / "self").mkdir(parents=True)
        self.groups: list[str] = []
        self.mountinfo = ["23 1 0:28 / / rw - ext4 /dev/sda1 rw", "broken line"]

    def mount(self, name: str, path: str, inside: str = "/") -> Path:
        """Mount a hierarchy, "2" or the controllers of version 1; this process is in `path`."""
        folder = self.root / "sys fs" / name
        folder.mkdir(parents=True)
        kind = "cgroup2 cgroup2 rw" if name == "2" else f"cgroup cgroup rw,{name}"
        escaped = str(folder).replace(" ", "\\040")
        self.mountinfo.append(f"31 23 0:29 {inside} {escaped} rw,relatime shared:9 - {kind}")
        self.groups.append(f"0::{path}" if name == "2" else f"4:{name}:{path}")
        (self.proc / "self/cgroup").write_text("\n".join(self.groups) + "\n")
        (self.proc / "self/mountinfo").write_text("\n".join(self.mountinfo) + "\n")
        return folder


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_DOT_", ".")).write_text(f"{content}\n")


def write_memory(folder: Path, version: int, limit: object, used: int, file_pages: int = 0) -> None:
    if version == 2:
        stat = f"anon 5\ninactive_file {file_pages}\nactive_file 0"
        write(folder, memory_DOT_max=limit, memory_DOT_current=used, memory_DOT_stat=stat)
    else:
        stat = f"inactive_file 0\nactive_file 0\ntotal_inactive_file {file_pages}"
        names = {"memory_DOT_limit_in_bytes": limit, "memory_DOT_usage_in_bytes": used}
        write(folder, memory_DOT_stat=stat, **names)


NAMES = {1: "memory", 2: "2"}


@pytest.mark.parametrize("version", [1, 2])
def test_the_own_group_limits(tree: Tree, version: int) -> None:
    mount = tree.mount(NAMES[version], "/job")
    write_memory(mount / "job", version, 4 * GIB, 3 * GIB, file_pages=GIB)
    assert cgroup.memory(tree.proc) == [(4 * GIB, 2 * GIB)]


@pytest.mark.parametrize("version", [1, 2])
def test_a_group_further_out_limits_too(tree: Tree, version: int) -> None:
    """A service in a slice, a step in a job: the tightest may be any of them."""
    mount = tree.mount(NAMES[version], "/slice/job/step")
    unlimited = NO_LIMIT if version == 1 else "max"
    write_memory(mount / "slice", version, 8 * GIB, 7 * GIB)
    write_memory(mount / "slice/job", version, 4 * GIB, GIB)
    write_memory(mount / "slice/job/step", version, unlimited, GIB)
    found = [pair for pair in cgroup.memory(tree.proc) if pair[0] < NO_LIMIT]
    assert found == [(4 * GIB, 3 * GIB), (8 * GIB, GIB)]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("/", "/"),  # a namespace of its own
        ("/docker/4f2a", "/docker/4f2a"),  # the host's names, the group alone is mounted
        ("/docker/4f2a", "/"),  # the host's names, and nothing says what is mounted
        ("/../other", "/"),  # moved out of its namespace
    ],
)
def test_containers(tree: Tree, version: int, path: str, inside: str) -> None:
    mount = tree.mount(NAMES[version], path, inside)
    write_memory(mount, version, 2 * GIB, GIB)
    assert cgroup.memory(tree.proc) == [(2 * GIB, GIB)]


def test_a_group_inside_a_container_with_the_names_of_the_host(tree: Tree) -> None:
    mount = tree.mount("memory", "/docker/4f2a/inner", "/docker/4f2a")
    write_memory(mount, 1, 2 * GIB, GIB)
    write_memory(mount / "inner", 1, GIB, 0)
    assert cgroup.memory(tree.proc) == [(GIB, GIB), (2 * GIB, GIB)]


def test_a_machine_that_mixes_both(tree: Tree) -> None:
    """systemd's hybrid: the controllers in version 1, an empty version 2 beside them."""
    tree.mount("2", "/user.slice")
    tree.mount("name=systemd", "/user.slice")
    processors = tree.mount("cpu,cpuacct", "/job")
    write_memory(tree.mount("memory", "/job") / "job", 1, GIB, 0)
    write(processors / "job", cpu_DOT_cfs_quota_us=150000, cpu_DOT_cfs_period_us=100000)
    assert cgroup.memory(tree.proc) == [(GIB, GIB)]
    assert cgroup.cpu_quota(tree.proc) == 1.5


@pytest.mark.parametrize(
    ("inner", "outer", "quota"),
    [
        ("max 100000", "max 100000", None),
        ("200000 100000", "max 100000", 2.0),
        ("max 100000", "350000 100000", 3.5),
        ("50000 100000", "350000 100000", 0.5),
        ("", "", None),
        ("nonsense", "1 0", None),
    ],
)
def test_processor_time(tree: Tree, inner: str, outer: str, quota: float | None) -> None:
    mount = tree.mount("2", "/slice/job")
    write(mount / "slice", cpu_DOT_max=outer)
    write(mount / "slice/job", cpu_DOT_max=inner)
    assert cgroup.cpu_quota(tree.proc) == quota


def test_processor_time_of_version_1_without_a_limit(tree: Tree) -> None:
    mount = tree.mount("cpuacct,cpu", "/")
    write(mount, cpu_DOT_cfs_quota_us=-1, cpu_DOT_cfs_period_us=100000)
    assert cgroup.cpu_quota(tree.proc) is None


def test_without_groups(tmp_path: Path) -> None:
    assert cgroup.memory(tmp_path) == []
    assert cgroup.cpu_quota(tmp_path) is None


def test_this_machine_is_read_without_an_error() -> None:
    assert all(limit >= room for limit, room in cgroup.memory() if room)
    quota = cgroup.cpu_quota()
    assert quota is None or quota > 0


@pytest.mark.parametrize(
    ("quota", "num_ranks", "threads"),
    [
        ("max 100000", 1, 8),
        ("max 100000", 3, 2),
        ("200000 100000", 1, 2),
        ("350000 100000", 1, 3),
        ("50000 100000", 1, 1),
        ("400000 100000", 2, 2),  # the ranks share the group
        ("400000 100000", 8, 1),
        ("9900000 100000", 1, 8),
    ],
)
def test_threads(tree: Tree, monkeypatch, quota: str, num_ranks: int, threads: int) -> None:
    write(tree.mount("2", "/job") / "job", cpu_DOT_max=quota)
    monkeypatch.setattr(binding, "usable_cpus", lambda: list(range(8)))
    assert binding.threads_per_rank(num_ranks, tree.root / "no sysfs", tree.proc) == threads


def test_memory_of_the_cpu_backend(tree: Tree, monkeypatch) -> None:
    """The tightest group decides; one above the machine's memory does not."""
    monkeypatch.setattr(cpu, "_meminfo", lambda: {"MemTotal": 16 * GIB, "MemAvailable": 10 * GIB})
    pairs = [(NO_LIMIT, NO_LIMIT), (8 * GIB, 6 * GIB), (12 * GIB, 2 * GIB), (16 * GIB, 1)]
    monkeypatch.setattr(cgroup, "memory", lambda: pairs)
    found = cpu.CpuDevice().memory()
    assert (found.total, found.free) == (8 * GIB, 2 * GIB)
    monkeypatch.setattr(cgroup, "memory", list)
    found = cpu.CpuDevice().memory()
    assert (found.total, found.free) == (16 * GIB, 10 * GIB)
