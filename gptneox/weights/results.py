# SPDX-License-Identifier: Apache-2.0
"""Folders of weights that this toolkit writes: whole or not at all, and never over another's files.

A result is written into `TARGET/.gptneox-unfinished` and moved up when it is complete. Only a
result of ours is ever replaced, which its seal proves: a file that lists all the others, moved
away first and put in place last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptneox.files import FILES_NAME, UNFINISHED, is_unused, lock
from gptneox.weights.files import DTYPES

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Seals, which say of one folder what it holds and are not copied to another.
MANIFEST_NAME = "manifest.json"
QUANTIZATION_MANIFEST = "quantization_manifest.json"


@dataclass(frozen=True)
class Kind:
    """What a result is, and how it is known again."""

    what: str  # for messages
    seal: str  # name of the file
    own_files: Callable[[Path], Iterable[str] | None]  # listed by the seal; raises or None: no seal
    option: str = ""  # that replaces an earlier result; empty: it is replaced without one


class SafetensorsWriter:
    """Writes one safetensors file whose tensors come one by one, in the announced order.

    The library's own writer takes all tensors at once; a large model's part may not fit in memory.
    Source: the safetensors format (8 bytes header size, JSON header, contiguous data).
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: dict[str, str],
    ) -> None:
        header: dict[str, Any] = {"__metadata__": metadata}
        offset = 0
        for name, (dtype, shape) in tensors.items():
            size = num_bytes(dtype, shape)
            header[name] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._expected = iter(tensors.items())
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor."""
        expected, (dtype, shape) = next(self._expected)
        assert (expected, dtype, shape) == (name, tensor.dtype, tuple(tensor.shape)), name
        self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """End the file and flush it to the disk."""
        assert next(self._expected, None) is None, "tensors are missing"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


def fingerprint(path: Path) -> dict[str, Any]:
    """Size, time and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(8 << 20):
            digest.update(block)
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest.hexdigest()}


# -- where the result goes -----------------------------------------------------------------------


def find_target(output_path: Path, input_path: Path, input_files: Iterable[Path]) -> Path:
    """The folder that `output_path` names, links followed.

    Raises:
        ValueError: it is what is read, or contains it.
    """
    target = Path(os.path.realpath(output_path))
    for path in (input_path, *input_files):
        if contains(target, path):
            raise ValueError(
                f"{output_path} is or contains {path}, which is read; name another folder"
            )
    return target


def contains(folder: Path, path: Path) -> bool:
    """Whether `path`, links followed, is `folder` or lies in it."""
    path = Path(os.path.realpath(path))
    return folder.exists() and any(
        parent.exists() and parent.samefile(folder) for parent in (path, *path.parents)
    )


def check_free(target: Path, kind: Kind, *, replace: bool) -> None:
    """Make sure that nothing is lost when `target` is filled.

    Raises:
        FileExistsError: there is a result like ours and `replace` is not set, or anything else.
    """
    if is_unused(target):
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; name a folder")
    own = _own_files(target, kind)
    unfinished = _interrupted_files(target)
    if own is None and unfinished is None:
        raise FileExistsError(
            f"{target} is not empty, and it is not a {kind.what} that this toolkit wrote "
            f"({kind.seal} would prove it), so it is never replaced; name another folder, or move "
            "it away"
        )
    if others := sorted(_others(target, (own or set()) | (unfinished or set()))):
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise FileExistsError(
            f"{target} also holds {', '.join(others[:3])}{more}, which this toolkit did not "
            "write, so it is not replaced; move that away, or name another folder"
        )
    if own is not None and not replace:
        raise FileExistsError(f"{target} exists; {kind.option} replaces it")


def _own_files(folder: Path, kind: Kind) -> set[str] | None:
    """The files of the result in `folder`, as its seal lists them; None where no seal proves it."""
    try:
        files = kind.own_files(folder / kind.seal)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if files is None else {kind.seal, *files}


def _interrupted_files(folder: Path) -> set[str] | None:
    """What a run listed before it began to move files, and could not finish; else None."""
    try:
        return set(json.loads((folder / UNFINISHED / FILES_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def names_below(folder: Path) -> set[str]:
    """All files below `folder`."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def _others(folder: Path, own: set[str]) -> Iterator[str]:
    """What lies in `folder` besides the files `own` and the folders that hold them."""
    own_folders = {parent.as_posix() for name in own for parent in Path(name).parents}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        is_folder = path.is_dir() and not path.is_symlink()
        known = name in own_folders if is_folder else name in own
        if not known and Path(name).parts[0] != UNFINISHED:
            yield name


@contextmanager
def filling(target: Path, kind: Kind, *, replace: bool) -> Iterator[Path]:
    """A fresh folder on the disk of `target`, whose content is moved there at the end.

    What an interrupted run left there is removed; a lock tells it from one that is still running.
    A failure leaves `target` as it was.
    """
    is_new = not target.exists()
    work = target / UNFINISHED
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(
            f"{target} cannot be written: {error.strerror}; name another folder"
        ) from error
    lock_path = work / "lock"
    with lock_path.open("a") as file:
        # If another process has removed the file meanwhile, its lock protects nothing.
        if not (lock(file) and os.fstat(file.fileno()).st_nlink):
            raise RuntimeError(f"another process is writing {target}; wait for it")
        try:
            check_free(target, kind, replace=replace)  # again: another process may have finished
            old = _own_files(target, kind) or _interrupted_files(target) or set()
            new = _fresh(work / "new")
            _fresh(work / "old")
            yield new
        except BaseException:
            if _interrupted_files(target) is None:
                shutil.rmtree(work, ignore_errors=True)
                if is_new:
                    with suppress(OSError):
                        target.rmdir()
            raise
        _move_up(target, kind.seal, old)
        shutil.rmtree(work)


def _fresh(folder: Path) -> Path:
    """An empty folder of our own."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    return folder


def _move_up(target: Path, seal: str, old: set[str]) -> None:
    """Put the new files in the place of the old ones: the old seal goes first, the new comes last.

    Killed in the middle it leaves the list of both, by which the next run knows them.
    """
    work = target / UNFINISHED
    new = work / "new"
    write_json(work / FILES_NAME, sorted(old | names_below(new)))
    for source, goal, names in ((target, work / "old", old), (new, target, names_below(new))):
        tops = {Path(name).parts[0] for name in names} - {seal}
        order = [seal, *sorted(tops)] if source is target else [*sorted(tops), seal]
        for name in order:
            if os.path.lexists(source / name):
                (source / name).rename(goal / name)


# -- files ---------------------------------------------------------------------------------------

SIDE_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".py")
_NOT_COPIED = ("config.json", MANIFEST_NAME, QUANTIZATION_MANIFEST)


def check_space(target: Path, needed: int) -> None:
    """Raise RuntimeError unless `needed` bytes are free on the disk of `target`."""
    free = shutil.disk_usage(target).free
    if needed > free:
        raise RuntimeError(
            f"not enough room in {target}: {needed} bytes ({needed / 2**30:.2f} GiB) are "
            f"needed, {free} ({free / 2**30:.2f} GiB) are free"
        )


def copy_side_files(source: Path, target: Path) -> None:
    """Everything a checkpoint has besides weights: tokenizer, generation config, notes."""
    for path in sorted(source.iterdir()):
        small = path.suffix in SIDE_SUFFIXES
        skipped = path.name.endswith(".index.json") or path.name in _NOT_COPIED
        if small and not skipped and path.is_file():
            shutil.copyfile(path, target / path.name)


def write_json(path: Path, value: Mapping[str, Any] | list[str]) -> None:
    """Write a value and flush it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
