# SPDX-License-Identifier: Apache-2.0
"""Cut a checkpoint for tensor parallelism, and join it again, tensor by tensor.

    part_model/
      manifest.json            written last: without it a cut is not complete
      0/ 1/ …                  each complete in itself: config.json, model.safetensors, tokenizer,
                               modeling_gpt_neox_ascend.py

`results.py` makes it whole or not at all; the manifest of a cut is its seal, that of a joined
checkpoint is in the metadata of its weight file. `formats.py` decides which tensor is cut along
which dimension.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
import uuid
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gptneox.config.files import read_json
from gptneox.config.model import ModelConfig
from gptneox.config.places import shipped
from gptneox.parallel import check_divides
from gptneox.weights.files import DTYPES, REMAP_BYTES, CheckpointError, SafetensorsFile
from gptneox.weights.formats import Formats, cut_dimension, part_shape, scheme_of
from gptneox.weights.load import (
    PART_FILE,
    Checkpoint,
    Manifest,
    check_cut,
    find_layout,
    is_embedding,
    parameter_name,
    parse_manifest,
    read_manifest,
    read_part,
)
from gptneox.weights.results import (
    DTYPE_NAMES,
    MANIFEST_NAME,
    SIDE_SUFFIXES,
    Kind,
    SafetensorsWriter,
    check_free,
    check_space,
    contains,
    copy_side_files,
    filling,
    find_target,
    fingerprint,
    names_below,
    num_bytes,
    write_json,
)
from gptneox.weights.size import EMBEDDING_NAME

logger = logging.getLogger(__name__)

MODELING_FILE = shipped("modeling_gpt_neox_ascend.py")
AUTO_MAP = {"AutoModelForCausalLM": "modeling_gpt_neox_ascend.GPTNeoXForCausalLM"}


def _files_of_cut(seal: Path) -> set[str]:
    """What the manifest lists; older ones do not, then what a cut consists of."""
    manifest, folder = parse_manifest(seal), seal.parent
    return set(manifest.files) or {
        f"{rank}/{path.name}"
        for rank in range(manifest.world_size)
        for path in (folder / str(rank)).glob("*")
        if path.name == PART_FILE or path.suffix in SIDE_SUFFIXES
    }


def _files_joined(seal: Path) -> set[str] | None:
    metadata = SafetensorsFile(seal).metadata()
    return set(json.loads(metadata["files"])) if "joined_from" in metadata else None


CUT = Kind("cut", MANIFEST_NAME, _files_of_cut, "--recut")
JOINED = Kind("joined checkpoint", PART_FILE, _files_joined, "--recut")


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
    check_cut(input_path, config, layout.formats, world_size)
    target = find_target(output_path, input_path, [f.path for f in checkpoint.files])
    check_free(target, CUT, replace=recut)
    tensors = {n: (checkpoint.dtypes[n], s) for n, s in checkpoint.shapes.items()}
    checkpoint.close()
    parts = {}
    for name, (dtype, shape) in tensors.items():
        dim = cut_dimension(_rule(name, config), shape, layout.formats, world_size)
        parts[name] = dtype, part_shape(dim, shape, world_size)
    with filling(target, CUT, replace=recut) as folder:
        check_space(target, world_size * sum(num_bytes(d, s) for d, s in parts.values()))
        manifest = Manifest(
            cut_id=uuid.uuid4().hex,
            world_size=world_size,
            source_path=str(input_path.resolve()),
            source={f.path.name: fingerprint(f.path) for f in checkpoint.files},
            tensors={
                n: {"shape": list(s), "dtype": DTYPE_NAMES[d]} for n, (d, s) in tensors.items()
            },
            config=read_json(input_path / "config.json"),
            quantization=scheme_of(layout.formats),
        )
        _write_parts(checkpoint, parts, layout.formats, folder, manifest)
        for rank in range(world_size):
            copy_side_files(input_path, folder / str(rank))
            part_config = {**_own_config(manifest), "world_size": world_size, "auto_map": AUTO_MAP}
            write_json(folder / str(rank) / "config.json", part_config)
            shutil.copyfile(MODELING_FILE, folder / str(rank) / MODELING_FILE.name)
        manifest = replace(manifest, files=sorted(names_below(folder)))
        write_json(folder / MANIFEST_NAME, asdict(manifest))
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
    target = find_target(output_path, part_model, [part_model / name for name in manifest.files])
    if contains(part_model, target):
        raise ValueError(f"{output_path} lies in {part_model}, which is read; name another folder")
    kind = replace(JOINED, seal=_joined_file(manifest))
    check_free(target, kind, replace=recut)
    config = ModelConfig.from_dict(manifest.config)
    parts = [Checkpoint(part_model / str(rank)) for rank in range(manifest.world_size)]
    tensors = {
        name: (DTYPES[entry["dtype"]], tuple(entry["shape"]))
        for name, entry in manifest.tensors.items()
    }
    formats = find_layout(parts[0], ModelConfig.from_pretrained(part_model / "0")).formats
    with filling(target, kind, replace=recut) as folder:
        check_space(target, sum(num_bytes(d, s) for d, s in tensors.values()))
        copy_side_files(part_model / "0", folder)
        (folder / MODELING_FILE.name).unlink(missing_ok=True)
        write_json(folder / "config.json", _own_config(manifest))
        names = json.dumps(sorted([*names_below(folder), kind.seal]))
        metadata = {"format": "pt", "joined_from": manifest.cut_id, "files": names}
        writer = SafetensorsWriter(folder / kind.seal, tensors, metadata)
        num_mapped = 0
        for name, (_, shape) in tqdm(
            tensors.items(), desc="joining", unit="tensor", disable=not sys.stderr.isatty()
        ):
            dim = cut_dimension(_rule(name, config), shape, formats, manifest.world_size)
            writer.write(name, _join(parts, name, shape, dim))
            num_mapped += num_bytes(*tensors[name])
            if num_mapped > REMAP_BYTES:  # of all parts together
                for part in parts:
                    part.close()
                num_mapped = 0
        writer.close()


def _joined_file(manifest: Manifest) -> str:
    """The weight file's name: that of the source where it was quantized under a name of its own.

    Programs that know nothing of the scheme would take model.safetensors for floats.
    """
    own = [name for name in manifest.source if name.startswith("quant_model_weight")]
    return re.sub(r"-\d+-of-\d+", "", own[0]) if own else PART_FILE


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
        if not same and fingerprint(files[name])["sha256"] != entry["sha256"]:
            return f"{part_model} was cut from another {name} than the one in {input_path}"
    return ""


# -- where the result goes -----------------------------------------------------------------------


def why_not_replaceable(output_path: Path) -> str:
    """Why no cut may be written to `output_path`, not even with --recut; empty when one may."""
    try:
        check_free(output_path.resolve(), CUT, replace=True)
    except OSError as error:
        return str(error)
    return ""
