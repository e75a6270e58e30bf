# SPDX-License-Identifier: Apache-2.0
"""Memory limit and CPU quota that control groups set for this process.

Containers, cluster jobs and services run in control groups, often nested ones, each with its own
limits. Version 1, version 2 and mixed hierarchies are supported.

Source: the kernel's Documentation/admin-guide/cgroup-v1/memory.rst, cgroup-v2.rst and
scheduler/sched-bwc.rst; proc(5) for mountinfo.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")


def folders(controller: str, proc: Path = PROC) -> Iterator[Path]:
    """The folder of each group that this process is in, the innermost first.

    Args:
        controller: "memory" or "cpu".
        proc: root of procfs.
    """
    mounts = list(_mounts(controller, proc))
    for line in _read(proc / "self/cgroup").splitlines():
        number, names, path = [*line.split(":", 2), "", ""][:3]
        version = 2 if number == "0" and not names else 1
        if version == 1 and controller not in names.split(","):
            continue
        for mounted_version, root, mount in mounts:
            if mounted_version == version:
                yield from _upwards(mount, root, path)
                break


def _upwards(mount: Path, root: str, path: str) -> Iterator[Path]:
    """Folders from the group at `path` up to the mount point, which shows the group `root`."""
    group = Path(path).parts[1:]
    top = Path(root).parts[1:]
    # In a container without a cgroup namespace, `path` is the path on the host.
    rest = group[len(top) :] if group[: len(top)] == top else ()
    if ".." in rest:
        rest = ()
    for length in range(len(rest), -1, -1):
        folder = mount.joinpath(*rest[:length])
        if folder.is_dir():
            yield folder


def _mounts(controller: str, proc: Path) -> Iterator[tuple[int, str, Path]]:
    """(version, mounted group, mount point) of the hierarchies that may have `controller`."""
    for line in _read(proc / "self/mountinfo").splitlines():
        first, _, last = line.partition(" - ")
        mount, kind = first.split(), last.split()
        if len(mount) < 5 or len(kind) < 3:
            continue
        mount_point = Path(mount[4].replace("\\040", " "))
        if kind[0] == "cgroup2":
            yield 2, mount[3], mount_point
        elif kind[0] == "cgroup" and controller in kind[2].split(","):
            yield 1, mount[3], mount_point


def memory(proc: Path = PROC) -> list[tuple[int, int]]:
    """(limit, free) in bytes of every group that has a limit.

    File pages count as free: the kernel reclaims them before it kills a process.
    """
    limits = []
    for folder in folders("memory", proc):
        limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current", folder / "memory.usage_in_bytes")
        if limit is not None:
            limits.append((limit, max(0, limit - (used or 0) + _reclaimable(folder))))
    return limits


def cpu_quota(proc: Path = PROC) -> float | None:
    """The lowest CPU quota of the groups, in processors; None without a quota."""
    quotas = []
    for folder in folders("cpu", proc):
        text = _read(folder / "cpu.max") or (
            f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
        )
        values = text.split()
        if len(values) == 2 and all(value.isdigit() for value in values) and int(values[1]):
            quotas.append(int(values[0]) / int(values[1]))
    return min(quotas, default=None)


def _number(*paths: Path) -> int | None:
    """The number in the first existing file; None for "max" or no file."""
    text = next(filter(None, map(_read, paths)), "")
    return int(text) if text.isdigit() else None


def _reclaimable(folder: Path) -> int:
    """File pages of a group and its subgroups; version 1 names these sums total_…"""
    entries = dict(
        line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line
    )
    names = ("inactive_file", "active_file")
    return sum(int(entries.get(f"total_{name}", entries.get(name, "0"))) for name in names)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
