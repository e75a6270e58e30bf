# SPDX-License-Identifier: Apache-2.0
"""What control groups leave to this process: memory, and shares of the processors.

A container, a job of a cluster and a service run in such groups, often in several, one inside the
other; each of them limits. Both versions are read, and a machine that mixes them.

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
        proc: where the kernel's files are.
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
    """From the group at `path` to the mount, whose own group is `root`."""
    inside = Path(path).parts[1:]
    above = Path(root).parts[1:]
    # A container without a namespace of its own sees its group's name on the host.
    rest = inside[len(above) :] if inside[: len(above)] == above else ()
    if ".." in rest:
        rest = ()
    for length in range(len(rest), -1, -1):
        folder = mount.joinpath(*rest[:length])
        if folder.is_dir():
            yield folder


def _mounts(controller: str, proc: Path) -> Iterator[tuple[int, str, Path]]:
    """(version, the group that is mounted, where) of the hierarchies that may hold `controller`."""
    for line in _read(proc / "self/mountinfo").splitlines():
        first, _, last = line.partition(" - ")
        place, kind = first.split(), last.split()
        if len(place) < 5 or len(kind) < 3:
            continue
        where = Path(place[4].replace("\\040", " "))
        if kind[0] == "cgroup2":
            yield 2, place[3], where
        elif kind[0] == "cgroup" and controller in kind[2].split(","):
            yield 1, place[3], where


def memory(proc: Path = PROC) -> list[tuple[int, int]]:
    """(limit, free) in bytes of every group that has a limit.

    File pages count as free: the kernel gives them back before it kills.
    """
    limits = []
    for folder in folders("memory", proc):
        limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current", folder / "memory.usage_in_bytes")
        if limit is not None:
            limits.append((limit, max(0, limit - (used or 0) + _reclaimable(folder))))
    return limits


def cpu_quota(proc: Path = PROC) -> float | None:
    """How many processors' time the tightest group leaves; None where none limits."""
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
    """What the first file that is there holds; None for "max" or no file."""
    text = next(filter(None, map(_read, paths)), "")
    return int(text) if text.isdigit() else None


def _reclaimable(folder: Path) -> int:
    """File pages of a group and those inside it. Version 1 calls such sums total_…"""
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
