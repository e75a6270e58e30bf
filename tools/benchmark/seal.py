# SPDX-License-Identifier: Apache-2.0
"""Folders that are built once and kept.

A build starts by writing a mark and ends by writing a seal with its recipe and all file sizes. A
folder without a matching seal is rebuilt. A folder with neither mark nor seal is not ours and is
never touched.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptneox import files

SEAL = "seal.json"
MARK = ".unfinished"


def make(
    folder: Path,
    recipe: Mapping[str, Any],
    build: Callable[[Path], None],
    say: Callable[[str], None],
    *,
    list_files: bool = True,
) -> Path:
    """Return the folder for `recipe`, built by `build` unless it is sealed already.

    Args:
        folder: its path.
        recipe: the inputs of the build, in JSON types; a seal with another recipe is out of date.
        build: fills an empty folder.
        say: takes notices for the user.
        list_files: check sizes of files at each use; False for a tree of many small files.

    Raises:
        RuntimeError: the folder exists and was not built here.
    """
    if is_sealed(folder, recipe):
        return folder
    with _locked(folder, say):
        if is_sealed(folder, recipe):  # another process was first
            return folder
        _clear(folder, say)
        folder.mkdir(parents=True)
        mark = folder / MARK
        mark.touch()
        build(folder)
        _seal(folder, recipe, list_files)
        mark.unlink()
    return folder


def is_sealed(folder: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether the folder was finished with this recipe and its files still have their sizes."""
    try:
        seal = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in seal["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(seal["recipe"] == dict(recipe) and seal["files"] == sizes)


def _seal(folder: Path, recipe: Mapping[str, Any], list_files: bool) -> None:
    files = {}
    for path in sorted(folder.rglob("*")) if list_files else []:
        if path.is_file() and path.name != MARK:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            files[path.relative_to(folder).as_posix()] = path.stat().st_size
    temporary = folder / f".{SEAL}"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"recipe": dict(recipe), "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / SEAL)


def _clear(folder: Path, say: Callable[[str], None]) -> None:
    """Remove what an interrupted or older build left; refuse anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        shutil.rmtree(folder, ignore_errors=True)
        return
    if not ((folder / MARK).is_file() or (folder / SEAL).is_file()):
        raise RuntimeError(
            f"{folder} is in the way: it was not made here, so it is not replaced; move it, or "
            "choose another --cache"
        )
    say(f"{folder} is unfinished or out of date; rebuilding it")
    shutil.rmtree(folder)


@contextmanager
def _locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One builder at a time; the lock file stays, because removing it would race."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        if not files.lock(lock):
            say(f"another process is building {folder}; waiting for it")
            files.lock(lock, wait=True)
        yield
