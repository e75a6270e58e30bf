# SPDX-License-Identifier: Apache-2.0
"""Cut a checkpoint for tensor parallelism, and join it again, tensor by tensor.

    part_model/
      manifest.json            written last: without it a cut is not complete
      0/ 1/ …                  each complete in itself: config.json, model.safetensors, tokenizer,
                               modeling_gpt_neox_ascend.py

A cut is written into `part_model/.gptneox-unfinished` and moved up when it is complete. Only a
result of this module is ever replaced, which a seal proves: the manifest of a cut, or the metadata
of a joined checkpoint's model.safetensors. `formats.py` decides which tensor is cut along which
dimension.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import struct
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gptneox.config.files import read_json
from gptneox.config.model import ModelConfig
from gptneox.config.places import shipped
from gptneox.files import UNFINISHED, is_unused, lock
from gptneox.parallel import check_divides
from gptneox.weights.files import DTYPES, REMAP_BYTES, CheckpointError, SafetensorsFile
from gptneox.weights.formats import Formats, cut_dimension, find_formats, part_shape
from gptneox.weights.load import (
    MANIFEST_NAME,
    PART_FILE,
    Checkpoint,
    Manifest,
    find_layout,
    is_embedding,
    parameter_name,
    parse_manifest,
    read_manifest,
    read_part,
)
from gptneox.weights.size import EMBEDDING_NAME

logger = logging.getLogger(__name__)

MODELING_FILE = shipped("modeling_gpt_neox_ascend.py")
AUTO_MAP = {"AutoModelForCausalLM": "modeling_gpt_neox_ascend.GPTNeoXForCausalLM"}

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
            size = _num_bytes(dtype, shape)
            header[name] = {
                "dtype": _DTYPE_NAMES[dtype],
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


def _num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


# -- cut -----------------------------------------------------------------------------------------


def cut_checkpoint(
    input_path: Path, output_path: Path, world_size: int, *, recut: bool = False
) -> Manifest:
    """Cut a checkpoint into `world_size` parts.

    Peak memory is a few times the largest tensor. The dtype is kept; row-parallel biases are
    whole on rank 0 and zero elsewhere, so that the parts' sum is exact and can be joined again.

    Args:
        input_path: an uncut checkpoint directory; its files may be symlinks.
        output_path: the `part_model` to make.
        world_size: number of parts.
        recut: replace the cut that is at `output_path`.

    Raises:
        ValueError, FileNotFoundError: the checkpoint or world_size is wrong; nothing was written.
        FileExistsError: `output_path` holds a cut and `recut` is not set, or anything else.
        RuntimeError: not enough room on the disk, or another cut to this place is running.
    """
    config = ModelConfig.from_pretrained(input_path)
    check_divides(world_size, config.num_heads, config.intermediate_size)
    checkpoint = Checkpoint(input_path)
    layout = find_layout(checkpoint, config)
    if layout.num_parts > 1:
        raise CheckpointError(f"{input_path} is itself a part; give the uncut checkpoint")
    target = _target(output_path, input_path, [f.path for f in checkpoint.files])
    _check_free(target, MANIFEST_NAME, recut=recut)
    tensors = {n: (checkpoint.dtypes[n], s) for n, s in checkpoint.shapes.items()}
    checkpoint.close()
    dims = {n: cut_dimension(_rule(n, config), layout.formats) for n in tensors}
    parts = {n: (d, part_shape(dims[n], s, world_size)) for n, (d, s) in tensors.items()}
    with _filling(target, MANIFEST_NAME, recut=recut) as folder:
        _check_space(target, world_size * sum(_num_bytes(d, s) for d, s in parts.values()))
        manifest = Manifest(
            cut_id=uuid.uuid4().hex,
            world_size=world_size,
            source_path=str(input_path.resolve()),
            source={f.path.name: _fingerprint(f.path) for f in checkpoint.files},
            tensors={
                n: {"shape": list(s), "dtype": _DTYPE_NAMES[d]} for n, (d, s) in tensors.items()
            },
            config=read_json(input_path / "config.json"),
        )
        _write_parts(checkpoint, parts, layout.formats, folder, manifest)
        for rank in range(world_size):
            _copy_side_files(input_path, folder / str(rank))
            part_config = {**_own_config(manifest), "world_size": world_size, "auto_map": AUTO_MAP}
            _write_json(folder / str(rank) / "config.json", part_config)
            shutil.copyfile(MODELING_FILE, folder / str(rank) / MODELING_FILE.name)
        manifest = replace(manifest, files=sorted(_names(folder)))
        _write_json(folder / MANIFEST_NAME, asdict(manifest))
    return manifest


def _own_config(manifest: Manifest) -> dict[str, Any]:
    """The source's config.json, less the name of its weight file: ours has the usual one."""
    return {k: v for k, v in manifest.config.items() if k != "transformers_weights"}


def _rule(name: str, config: ModelConfig) -> str:
    """The name whose rule a tensor follows: it may be stored under another."""
    return EMBEDDING_NAME if is_embedding(name, config) else parameter_name(name)


def _write_parts(
    checkpoint: Checkpoint,
    parts: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    formats: Formats,
    folder: Path,
    manifest: Manifest,
) -> None:
    world_size = manifest.world_size
    writers = []
    for rank in range(world_size):
        (folder / str(rank)).mkdir()
        metadata = {"format": "pt", "cut_id": manifest.cut_id, "rank": str(rank)}
        writers.append(SafetensorsWriter(folder / str(rank) / PART_FILE, parts, metadata))
    config = ModelConfig.from_dict(manifest.config)
    for name in tqdm(parts, desc="cutting", unit="tensor", disable=not sys.stderr.isatty()):
        rule = _rule(name, config)
        for rank, writer in enumerate(writers):
            writer.write(name, read_part(checkpoint, name, rule, formats, rank, world_size))
    checkpoint.close()
    for writer in writers:
        writer.close()


# -- merge ---------------------------------------------------------------------------------------


def merge_checkpoint(part_model: Path, output_path: Path, *, recut: bool = False) -> None:
    """Join the parts of a cut into one checkpoint, bit for bit what was cut.

    Raises:
        CheckpointError: the cut is not complete; see `read_manifest`.
        FileExistsError: `output_path` holds a joined checkpoint and `recut` is not set, or
            anything else.
    """
    manifest = read_manifest(part_model)
    target = _target(output_path, part_model, [part_model / name for name in manifest.files])
    if _contains(part_model, target):
        raise ValueError(f"{output_path} lies in {part_model}, which is read; name another folder")
    _check_free(target, PART_FILE, recut=recut)
    config = ModelConfig.from_dict(manifest.config)
    parts = [Checkpoint(part_model / str(rank)) for rank in range(manifest.world_size)]
    tensors = {
        name: (DTYPES[entry["dtype"]], tuple(entry["shape"]))
        for name, entry in manifest.tensors.items()
    }
    formats = find_formats(parameter_name(name) for name in tensors)
    with _filling(target, PART_FILE, recut=recut) as folder:
        _check_space(target, sum(_num_bytes(d, s) for d, s in tensors.values()))
        _copy_side_files(part_model / "0", folder)
        (folder / MODELING_FILE.name).unlink(missing_ok=True)
        _write_json(folder / "config.json", _own_config(manifest))
        names = json.dumps(sorted([*_names(folder), PART_FILE]))
        metadata = {"format": "pt", "joined_from": manifest.cut_id, "files": names}
        writer = SafetensorsWriter(folder / PART_FILE, tensors, metadata)
        num_mapped = 0
        for name, (_, shape) in tqdm(
            tensors.items(), desc="joining", unit="tensor", disable=not sys.stderr.isatty()
        ):
            dim = cut_dimension(_rule(name, config), formats)
            writer.write(name, _join(parts, name, shape, dim))
            num_mapped += _num_bytes(*tensors[name])
            if num_mapped > REMAP_BYTES:  # of all parts together
                for part in parts:
                    part.close()
                num_mapped = 0
        writer.close()


def _join(parts: list[Checkpoint], name: str, shape: tuple[int, ...], dim: int | None) -> Tensor:
    """The whole tensor from its parts along `dim`; what is not cut is the same in each."""
    if dim is None:
        return parts[0].read(name)
    whole = torch.cat([part.read(name) for part in parts], dim)
    return whole.narrow(dim, 0, shape[dim])


# -- is it still the same ------------------------------------------------------------------------


def describe_mismatch(part_model: Path, input_path: Path, world_size: int) -> str:
    """Why `part_model` is not a complete cut of `input_path` for `world_size`; empty when it is.

    Files whose size and time are those of the cut count as unchanged; others are hashed.
    """
    try:
        manifest = read_manifest(part_model)
    except CheckpointError as error:
        return str(error)
    if manifest.world_size != world_size:
        return f"{part_model} was cut for {manifest.world_size} ranks, not {world_size}"
    if read_json(input_path / "config.json") != manifest.config:
        return f"{part_model} was cut with another config.json than the one in {input_path}"
    files = {f.path.name: f.path for f in Checkpoint(input_path).files}
    if files.keys() != manifest.source.keys():
        return f"{part_model} was cut from other files than those in {input_path}"
    for name, entry in manifest.source.items():
        stat = files[name].stat()
        same = (stat.st_size, stat.st_mtime_ns) == (entry["size"], entry["mtime_ns"])
        if not same and _fingerprint(files[name])["sha256"] != entry["sha256"]:
            return f"{part_model} was cut from another {name} than the one in {input_path}"
    return ""


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(8 << 20):
            digest.update(block)
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest.hexdigest()}


# -- where the result goes -----------------------------------------------------------------------


def why_not_replaceable(output_path: Path) -> str:
    """Why no cut may be written to `output_path`, not even with --recut; empty when one may."""
    try:
        _check_free(Path(os.path.realpath(output_path)), MANIFEST_NAME, recut=True)
    except OSError as error:
        return str(error)
    return ""


def _target(output_path: Path, input_path: Path, input_files: Iterable[Path]) -> Path:
    """The folder that `output_path` names, links followed.

    Raises:
        ValueError: it is what is read, or contains it.
    """
    target = Path(os.path.realpath(output_path))
    for path in (input_path, *input_files):
        if _contains(target, path):
            raise ValueError(
                f"{output_path} is or contains {path}, which is read; name another folder"
            )
    return target


def _contains(folder: Path, path: Path) -> bool:
    """Whether `path`, links followed, is `folder` or lies in it."""
    path = Path(os.path.realpath(path))
    return folder.exists() and any(
        parent.exists() and parent.samefile(folder) for parent in (path, *path.parents)
    )


def _check_free(target: Path, seal: str, *, recut: bool) -> None:
    """Make sure that nothing is lost when `target` is filled.

    Raises:
        FileExistsError: there is a result like ours and `recut` is not set, or anything else.
    """
    if is_unused(target):
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; name a folder")
    own = _own_files(target, seal)
    unfinished = _interrupted_files(target)
    if own is None and unfinished is None:
        what = "cut" if seal == MANIFEST_NAME else "joined checkpoint"
        raise FileExistsError(
            f"{target} is not empty, and it is not a {what} that this toolkit wrote ({seal} would "
            "prove it), so it is never replaced; name another folder, or move it away"
        )
    if others := sorted(_others(target, (own or set()) | (unfinished or set()))):
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise FileExistsError(
            f"{target} also holds {', '.join(others[:3])}{more}, which this toolkit did not "
            "write, so it is not replaced; move that away, or name another folder"
        )
    if own is not None and not recut:
        raise FileExistsError(f"{target} exists; --recut replaces it")


def _own_files(folder: Path, seal: str) -> set[str] | None:
    """The files of the result in `folder`, as its seal lists them; None where no seal proves it."""
    path = folder / seal
    try:
        if seal == MANIFEST_NAME:
            manifest = parse_manifest(path)
            files = manifest.files or _files_by_rule(folder, manifest.world_size)
            return {MANIFEST_NAME, *files}
        metadata = SafetensorsFile(path).metadata()
        return set(json.loads(metadata["files"])) if "joined_from" in metadata else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _files_by_rule(folder: Path, world_size: int) -> set[str]:
    """The files of a cut whose manifest does not list them yet."""
    return {
        f"{rank}/{path.name}"
        for rank in range(world_size)
        for path in (folder / str(rank)).glob("*")
        if path.name == PART_FILE or path.suffix in _SIDE_SUFFIXES
    }


def _interrupted_files(folder: Path) -> set[str] | None:
    """What a run listed before it began to move files, and could not finish; else None."""
    try:
        return set(json.loads((folder / UNFINISHED / "files.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _names(folder: Path) -> set[str]:
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
def _filling(target: Path, seal: str, *, recut: bool) -> Iterator[Path]:
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
            _check_free(target, seal, recut=recut)  # again: another process may have finished
            old = _own_files(target, seal) or _interrupted_files(target) or set()
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
        _move_up(target, seal, old)
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
    _write_json(work / "files.json", sorted(old | _names(new)))
    for source, goal, names in ((target, work / "old", old), (new, target, _names(new))):
        tops = {Path(name).parts[0] for name in names} - {seal}
        order = [seal, *sorted(tops)] if source is target else [*sorted(tops), seal]
        for name in order:
            if os.path.lexists(source / name):
                (source / name).rename(goal / name)


# -- files ---------------------------------------------------------------------------------------

_SIDE_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".py")


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target).free
    if needed > free:
        raise RuntimeError(
            f"not enough room in {target}: {needed} bytes ({needed / 2**30:.2f} GiB) are "
            f"needed, {free} ({free / 2**30:.2f} GiB) are free"
        )


def _copy_side_files(source: Path, target: Path) -> None:
    """Everything a checkpoint has besides weights: tokenizer, generation config, notes."""
    for path in sorted(source.iterdir()):
        small = path.suffix in _SIDE_SUFFIXES
        skipped = path.name.endswith(".index.json") or path.name in ("config.json", MANIFEST_NAME)
        if small and not skipped and path.is_file():
            shutil.copyfile(path, target / path.name)


def _write_json(path: Path, value: Mapping[str, Any] | list[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
