# SPDX-License-Identifier: Apache-2.0
"""Cut a checkpoint for tensor parallelism, and join it again, tensor by tensor.

    part_model/
      manifest.json            written last: a folder without it is no complete cut
      0/ 1/ …                  each complete in itself: config.json, model.safetensors, tokenizer,
                               modeling_gpt_neox_ascend.py

A cut is written to `part_model.tmp` and renamed when it is sealed. Which tensor is cut along which
dimension stands in `checkpoint.CUT_DIMENSIONS`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import struct
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gptneox.checkpoint import (
    EMBEDDING_NAME,
    MANIFEST_NAME,
    PART_FILE,
    Checkpoint,
    Manifest,
    cut_dimension,
    find_layout,
    is_embedding,
    is_partial_bias,
    pad_rows,
    parameter_name,
    part_shape,
    rank_slice,
    read_manifest,
)
from gptneox.config import ModelConfig, read_json
from gptneox.parallel import check_divides
from gptneox.weight_files import DTYPES, REMAP_BYTES, CheckpointError

logger = logging.getLogger(__name__)

MODELING_FILE = Path(__file__).resolve().parent.parent / "modeling_gpt_neox_ascend.py"
AUTO_MAP = {"AutoModelForCausalLM": "modeling_gpt_neox_ascend.GPTNeoXForCausalLM"}

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsWriter:
    """Writes one safetensors file whose tensors come one by one, in the announced order.

    The library's own writer wants all tensors at once, which a large model's part is too big for.
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
        """End the file, and see it on the disk."""
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
        recut: replace what is at `output_path`.

    Raises:
        ValueError, FileNotFoundError: the checkpoint or world_size is wrong; nothing was written.
        FileExistsError: there is something at `output_path`, and `recut` is not set.
        RuntimeError: not enough room on the disk, or another cut to this place is running.
    """
    config = ModelConfig.from_pretrained(input_path)
    check_divides(world_size, config.num_heads, config.intermediate_size)
    if output_path.exists() and not recut:
        raise FileExistsError(f"{output_path} exists; --recut replaces it")
    checkpoint = Checkpoint(input_path)
    if find_layout(checkpoint, config).num_parts > 1:
        raise CheckpointError(f"{input_path} is itself a part; give the uncut checkpoint")
    tensors = {n: (checkpoint.dtypes[n], s) for n, s in checkpoint.shapes.items()}
    checkpoint.close()
    parts = {n: (d, part_shape(_rule(n, config), s, world_size)) for n, (d, s) in tensors.items()}
    with _temporary(output_path) as folder:
        _check_space(folder, world_size * sum(_num_bytes(d, s) for d, s in parts.values()))
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
        _write_parts(checkpoint, parts, folder, manifest)
        for rank in range(world_size):
            _copy_side_files(input_path, folder / str(rank))
            part_config = {**_own_config(manifest), "world_size": world_size, "auto_map": AUTO_MAP}
            _write_json(folder / str(rank) / "config.json", part_config)
            shutil.copyfile(MODELING_FILE, folder / str(rank) / MODELING_FILE.name)
        _write_json(folder / MANIFEST_NAME, asdict(manifest))
        _replace_directory(folder, output_path)
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
            writer.write(name, _cut(checkpoint, name, rule, rank, world_size))
    checkpoint.close()
    for writer in writers:
        writer.close()


def _cut(checkpoint: Checkpoint, name: str, rule: str, rank: int, world_size: int) -> Tensor:
    """Rank's part of tensor `name`, which is cut like `rule`."""
    shape = checkpoint.shapes[name]
    value = checkpoint.read(name, rank_slice(rule, shape, rank, world_size))
    if is_partial_bias(name, value) and rank > 0:
        return torch.zeros_like(value)
    expected = part_shape(rule, shape, world_size)
    return pad_rows(value, expected[0]) if expected else value


# -- merge ---------------------------------------------------------------------------------------


def merge_checkpoint(part_model: Path, output_path: Path, *, recut: bool = False) -> None:
    """Join the parts of a cut into one checkpoint, bit for bit what was cut.

    Raises:
        CheckpointError: the cut is not complete; see `read_manifest`.
        FileExistsError: there is something at `output_path`, and `recut` is not set.
    """
    manifest = read_manifest(part_model)
    if output_path.exists() and not recut:
        raise FileExistsError(f"{output_path} exists; --recut replaces it")
    config = ModelConfig.from_dict(manifest.config)
    parts = [Checkpoint(part_model / str(rank)) for rank in range(manifest.world_size)]
    tensors = {
        name: (DTYPES[entry["dtype"]], tuple(entry["shape"]))
        for name, entry in manifest.tensors.items()
    }
    with _temporary(output_path) as folder:
        _check_space(folder, sum(_num_bytes(d, s) for d, s in tensors.values()))
        writer = SafetensorsWriter(folder / PART_FILE, tensors, {"format": "pt"})
        num_mapped = 0
        for name, (_, shape) in tqdm(
            tensors.items(), desc="joining", unit="tensor", disable=not sys.stderr.isatty()
        ):
            dim = cut_dimension(_rule(name, config))
            writer.write(name, _join(parts, name, shape, dim))
            num_mapped += _num_bytes(*tensors[name])
            if num_mapped > REMAP_BYTES:  # of all parts together
                for part in parts:
                    part.close()
                num_mapped = 0
        writer.close()
        _copy_side_files(part_model / "0", folder)
        (folder / MODELING_FILE.name).unlink(missing_ok=True)
        _write_json(folder / "config.json", _own_config(manifest))
        _replace_directory(folder, output_path)


def _join(parts: list[Checkpoint], name: str, shape: tuple[int, ...], dim: int | None) -> Tensor:
    """The whole tensor from its parts along `dim`; what is not cut is the same in each."""
    if dim is None or len(shape) <= dim:
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


# -- files ---------------------------------------------------------------------------------------


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A fresh folder beside `target`, gone afterwards unless it was renamed.

    What an interrupted run left there is removed; a lock tells it from one that is still running.
    """
    folder = target.with_name(f"{target.name}.tmp")
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock_path = target.with_name(f".{target.name}.lock")
    with lock_path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError(f"another process is writing {target}; wait for it") from error
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock_path.unlink(missing_ok=True)


def _replace_directory(folder: Path, target: Path) -> None:
    """Put a finished folder in the place of an old one, which is removed only then."""
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    folder.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RuntimeError(
            f"not enough room in {folder.parent}: {needed} bytes ({needed / 2**30:.2f} GiB) are "
            f"needed, {free} ({free / 2**30:.2f} GiB) are free"
        )


def _copy_side_files(source: Path, target: Path) -> None:
    """Everything a checkpoint has besides weights: tokenizer, generation config, notes."""
    for path in sorted(source.iterdir()):
        small = path.suffix in (".json", ".txt", ".model", ".tiktoken", ".jinja", ".py")
        skipped = path.name.endswith(".index.json") or path.name in ("config.json", MANIFEST_NAME)
        if small and not skipped and path.is_file():
            shutil.copyfile(path, target / path.name)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
