# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: find them, check them, and stream one rank's tensors into a model."""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gptneox.config.errors import FileError
from gptneox.config.files import read_json
from gptneox.config.model import ModelConfig
from gptneox.devices.device import Device
from gptneox.devices.operators import LinearWeight
from gptneox.files import is_unused
from gptneox.layers import Linear, as_parameter
from gptneox.model import GPTNeoX
from gptneox.parallel import TensorParallelGroup
from gptneox.weights.files import (
    IGNORED_SUFFIXES,
    CheckpointError,
    SafetensorsFile,
    WeightFile,
    find_weight_files,
    listed,
    open_weight_file,
)
from gptneox.weights.formats import (
    FLOATS,
    Formats,
    cut_dimension,
    find_formats,
    is_partial_bias,
    pad_to,
    part_shape,
    rank_slice,
    scheme_of,
    shares_inputs,
    split_name,
    why_not_cut,
)
from gptneox.weights.readers import check_quantization
from gptneox.weights.readers.gguf import GgufFile
from gptneox.weights.readers.stored import Stored
from gptneox.weights.results import MANIFEST_NAME
from gptneox.weights.size import (
    EMBEDDING_NAME,
    HEAD_NAME,
    PREFIX,
    ModelSize,
    find_kv_format,
    full_shapes,
    stored_shapes,
)

logger = logging.getLogger(__name__)

HEAD_OWNERS = ("embed_out", "lm_head")
# AWQ stores what the inputs of a layer are divided by beside the activation before it.
AWQ_SCALES = (".mlp.act.scales", ".mlp.dense_4h_to_h.act_scales")
# In the name of a normalisation that msmodelslim wrapped to smooth what it computes.
WRAPPED = "norm.module."
# A linear layer of which every rank's part differs from the whole in shape.
CUT_LINEAR = "gpt_neox.layers.0.attention.query_key_value"
PART_FILE = "model.safetensors"


class Checkpoint:
    """All tensors of a checkpoint directory by name, whichever files they are in."""

    def __init__(self, model_path: Path) -> None:
        """Map every name to its file.

        Raises:
            FileNotFoundError: no weight file, or one that the index names is absent.
            CheckpointError: a file is damaged, or a tensor is in two files with different values.
        """
        self.model_path = model_path
        paths, self.index = find_weight_files(model_path)
        self.files = [_open_file(path) for path in paths]
        self.where: dict[str, WeightFile] = {}
        self._last: WeightFile | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for file in self.files:
            for name, info in file.tensors().items():
                if name in self.where:
                    self._check_equal(name, file)
                    continue
                self.where[name] = file
                self.shapes[name], self.dtypes[name] = info.shape, info.dtype
            if not file.is_mapped and len(self.files) > 1:
                file.close()  # an unmapped file is held in memory
        if unmapped := [file.path.name for file in self.files if not file.is_mapped]:
            logger.info("%s: %s cannot be mapped and will be read", model_path, listed(unmapped, 3))

    def _check_equal(self, name: str, file: WeightFile) -> None:
        """Refuse a tensor that a second file holds with other values."""
        first = self.where[name]
        one, two = first.read(name), file.read(name)
        if one.dtype != two.dtype or not torch.equal(one, two):
            raise CheckpointError(
                f"tensor {name} is in both {first.path.name} and {file.path.name} of "
                f"{self.model_path}, with different values; remove the file that does not belong "
                "there"
            )

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """A tensor or a slice of it, in the file's dtype; only the file read last stays mapped."""
        file = self.where[name]
        if self._last is not None and self._last is not file:
            self._last.close()
        self._last = file
        return file.read(name, index)

    def close(self) -> None:
        """Unmap all files."""
        for file in self.files:
            file.close()


def _open_file(path: Path) -> WeightFile:
    return GgufFile(path) if path.suffix == ".gguf" else open_weight_file(path)


# -- names and parts of stored tensors -----------------------------------------------------------


def parameter_name(stored: str) -> str:
    """The parameter that a stored tensor fills, by the name that published checkpoints give it.

    The prefix of the base model may be missing, or be there once too often, the head has two
    names, and a normalisation may be wrapped. Source: transformers 5, core_model_loading.py,
    `rename_source_key`, and its mapping of `embed_out` to `lm_head` for GPT-NeoX.
    """
    bare = stored.removeprefix(PREFIX).replace(WRAPPED, "norm.").replace(*AWQ_SCALES)
    owner, part = split_name(bare)
    if owner in HEAD_OWNERS and (bare == stored or owner == HEAD_OWNERS[1]):
        return f"{HEAD_OWNERS[0]}.{part}"
    return bare if bare.startswith(PREFIX) else PREFIX + bare


def is_embedding(name: str, config: ModelConfig) -> bool:
    """Whether a stored tensor is the token embedding, which every rank needs whole.

    In a tied checkpoint it may be stored under the head's name.
    """
    parameter = parameter_name(name)
    return parameter == EMBEDDING_NAME or (config.tie_word_embeddings and parameter == HEAD_NAME)


def read_part(
    checkpoint: Checkpoint, stored: str, name: str, formats: Formats, rank: int, world_size: int
) -> Tensor:
    """A rank's part of the tensor `stored`, in the file's dtype.

    Args:
        checkpoint: an uncut one.
        stored: the tensor's name in the file.
        name: the parameter that it fills.
        formats: of the checkpoint's linear layers.
        rank: whose part.
        world_size: number of parts.
    """
    shape = checkpoint.shapes[stored]
    dim = cut_dimension(name, shape, formats, world_size)
    value = checkpoint.read(stored, rank_slice(dim, shape, rank, world_size))
    if is_partial_bias(name) and rank > 0:
        return torch.zeros_like(value)
    return pad_to(value, part_shape(dim, shape, world_size))


# -- cut checkpoints -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifest:
    """What `cut_model_util.py` wrote, sealed when it was complete.

    `cut_id` stands in the manifest and in every rank's file, so parts of two cuts cannot be mixed.
    `source` maps file names to {"size", "mtime_ns", "sha256"}; `tensors` maps names to
    {"shape", "dtype"} of the uncut checkpoint; `config` is its config.json. `files` are all that
    were written besides the manifest, as "0/config.json"; cuts of older versions do not list them.
    `quantization` is the scheme of the weights, "" for float ones.
    """

    cut_id: str
    world_size: int
    source_path: str
    source: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Any]]
    config: dict[str, Any]
    files: list[str] = field(default_factory=list)
    quantization: str = ""


def read_manifest(part_model: Path) -> Manifest:
    """The manifest of a complete cut.

    Raises:
        CheckpointError: there is none (a cut that was interrupted, or made by another tool), it
            is damaged, or a rank's folder is missing or belongs to another cut.
    """
    path = part_model / MANIFEST_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{part_model} has no {MANIFEST_NAME}, so it is no complete cut of this toolkit; move "
            "it away and cut the model again"
        )
    try:
        manifest = parse_manifest(path)
    except FileError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); move {part_model} away and cut the model again"
        ) from error
    for rank in range(manifest.world_size):
        file = part_model / str(rank) / PART_FILE
        if not file.is_file():
            raise CheckpointError(
                f"{part_model} was cut for {manifest.world_size} ranks, but {rank}/{PART_FILE} is "
                "missing; cut the model again"
            )
        if (cut_id := SafetensorsFile(file).metadata().get("cut_id")) != manifest.cut_id:
            raise CheckpointError(
                f"{file} is of another cut ({cut_id}) than {path} ({manifest.cut_id}); cut the "
                "model again"
            )
    return manifest


def parse_manifest(path: Path) -> Manifest:
    """Read the manifest; the folders of the ranks are not looked at.

    Raises:
        FileError: the file is not a manifest.
    """
    try:
        manifest = Manifest(**read_json(path))
    except TypeError as error:
        raise FileError(str(error)) from error
    if not isinstance(manifest.world_size, int):
        raise FileError(f"world_size is {manifest.world_size!r}, a number is expected")
    return manifest


def rank_directory(
    model_path: Path, group: TensorParallelGroup, *, prefer_parts: bool = False
) -> Path:
    """Where this rank's weights are: the checkpoint itself, or its folder of a cut one.

    Args:
        model_path: a checkpoint, a `part_model`, or one rank's folder of a `part_model`.
        group: this rank's place.
        prefer_parts: take `model_path/part_model` where there is one, and several ranks.

    Raises:
        CheckpointError: see `read_manifest`; or the cut is for another number of ranks.
    """
    parts = model_path
    if prefer_parts and group.world_size > 1 and not is_unused(model_path / "part_model"):
        parts = model_path / "part_model"
    elif not (model_path / MANIFEST_NAME).is_file():
        if not (model_path.parent / MANIFEST_NAME).is_file():
            return model_path
        parts = model_path.parent
        if model_path.name != str(group.rank):
            raise CheckpointError(f"{model_path} is not the part of rank {group.rank}")
    manifest = read_manifest(parts)
    if manifest.world_size != group.world_size:
        raise CheckpointError(
            f"{parts} was cut for {manifest.world_size} ranks, but {group.world_size} run; start "
            f"{manifest.world_size}, or cut again for {group.world_size}"
        )
    return parts / str(group.rank)


def find_part(
    model_path: Path, group: TensorParallelGroup, *, prefer_parts: bool = False
) -> tuple[Path, ModelConfig]:
    """This rank's folder and its config.json; see `rank_directory` and `ModelConfig`."""
    path = rank_directory(model_path, group, prefer_parts=prefer_parts)
    return path, ModelConfig.from_pretrained(path)


# -- checking ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a checkpoint stores the model.

    `names` maps each parameter to the stored tensor that fills it, `formats` each linear layer to
    the format of its weight. `num_parts` above 1: the files are one rank's part of a cut
    checkpoint.
    """

    names: dict[str, str]
    formats: Formats
    num_parts: int


def check_weights(model_path: Path, config: ModelConfig, world_size: int | None = None) -> Formats:
    """Check the weight files against config.json without reading the weights.

    Args:
        model_path: what `load_model` would be given.
        config: read from the same directory.
        world_size: ranks that would run; None: as many as the files are for.

    Returns:
        The formats of the linear layers.

    Raises:
        OSError, CheckpointError: exactly as `load_model` would raise.
    """
    checkpoint, layout = _open(model_path, config, world_size)
    checkpoint.close()
    return layout.formats


def _open(
    model_path: Path, config: ModelConfig, world_size: int | None
) -> tuple[Checkpoint, Layout]:
    """See `check_weights`."""
    checkpoint = Checkpoint(model_path)
    try:
        layout = find_layout(checkpoint, config)
        if world_size is not None and layout.num_parts not in (1, world_size):
            raise CheckpointError(
                f"{model_path} is one part of {layout.num_parts}, but {world_size} ranks run; "
                f"start {layout.num_parts} ranks, or give the uncut checkpoint"
            )
        if layout.num_parts == 1:
            check_cut(checkpoint.model_path, config, layout.formats, world_size or 1)
        layout = replace(layout, formats=_with_orders(checkpoint, layout, world_size or 1))
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint, layout


def _with_orders(checkpoint: Checkpoint, layout: Layout, world_size: int) -> Formats:
    """Formats that know how the inputs of groups fall to ranks; see `WeightFormat.with_order`.

    Raises:
        CheckpointError: an order is damaged.
    """
    formats = dict(layout.formats)
    for linear, weight_format in layout.formats.items():
        if world_size == 1 or not weight_format.order_suffix or not shares_inputs(linear):
            continue
        groups = checkpoint.read(layout.names[f"{linear}.{weight_format.order_suffix}"])
        parts = groups.chunk(world_size // layout.num_parts)
        try:
            formats[linear] = weight_format.with_order(parts, world_size)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.model_path}: {linear}: {error}") from error
    return formats


def check_cut(path: Path, config: ModelConfig, formats: Formats, world_size: int) -> None:
    """Raise CheckpointError where a weight cannot be shared out to ranks."""
    for name, shape in full_shapes(config).items():
        linear, suffix = split_name(name)
        if suffix != "weight" or len(shape) < 2:
            continue
        if reason := why_not_cut(linear, shape, formats, world_size):
            raise CheckpointError(
                f"{path} cannot be shared out to {world_size} ranks: of {linear}, {reason}; use "
                "fewer ranks, or make floats of it (--task quantize --dequantize)"
            )


def find_layout(checkpoint: Checkpoint, config: ModelConfig) -> Layout:
    """Which stored tensor fills which parameter, after checking that everything fits.

    Raises:
        CheckpointError: the weights are quantized in a way that is not served or not described,
            or tensors are missing (all are listed), of a wrong type or shape, or not understood.
    """
    path = checkpoint.model_path
    names = _find_names(checkpoint, config)
    raw = read_json(path / "config.json")
    formats = check_quantization(
        Stored(path, raw, names, checkpoint.dtypes, find_formats(names), checkpoint.shapes),
        config.quantize,
    )
    try:
        expected = stored_shapes(config, formats)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    names = {name: names[name] for name in expected if name in names}
    if missing := [name for name in expected if name not in names]:
        raise CheckpointError(f"{path} lacks {_describe_missing(missing, checkpoint, names)}")
    cut_name = f"{CUT_LINEAR}.{formats[CUT_LINEAR].tensors[0].suffix}"
    num_parts = config.part_world_size
    if checkpoint.shapes[names[cut_name]] == expected[cut_name]:
        num_parts = 1  # whole, whatever config.json kept of an earlier cut
    wrong = []
    for name, whole in expected.items():
        stored = names[name]
        if checkpoint.dtypes[stored] not in _dtypes(name, formats):
            raise CheckpointError(f"{path}: {_wrong_dtype(name, stored, checkpoint, formats)}")
        # The head of a tied checkpoint is the embedding, which is whole in every part.
        is_whole = is_embedding(stored, config)
        dim = None if is_whole else cut_dimension(name, whole, formats, num_parts)
        shape = part_shape(dim, whole, num_parts)
        if checkpoint.shapes[stored] != shape:
            wrong.append(f"{stored} is {list(checkpoint.shapes[stored])}, expected {list(shape)}")
    if wrong:
        raise CheckpointError(f"{path} does not fit its config.json: {listed(wrong, 5)}")
    if unknown := _unknown(checkpoint, names):
        _refuse_unread(checkpoint, unknown, quantized=bool(scheme_of(formats)))
        logger.warning("%s: ignored unknown %s", path, listed(unknown, 5))
    return Layout(names, formats, num_parts)


def _refuse_unread(checkpoint: Checkpoint, unknown: list[str], *, quantized: bool) -> None:
    """Raise CheckpointError for tensors that may be part of a weight which nothing puts together.

    Among float weights those are integers; a single one is a counter. Beside quantized weights it
    is any tensor.
    """
    refused = [
        name
        for name in unknown
        if quantized
        or (checkpoint.dtypes[name] not in FLOATS and math.prod(checkpoint.shapes[name]) > 1)
    ]
    if refused:
        kinds = {str(checkpoint.dtypes[name]).removeprefix("torch.") for name in refused}
        raise CheckpointError(
            f"{checkpoint.model_path} holds {listed(refused, 5)} ({', '.join(sorted(kinds))}), of "
            "which no weight format makes anything; remove what does not belong to the model"
        )


def _wrong_dtype(name: str, stored: str, checkpoint: Checkpoint, formats: Formats) -> str:
    """What a tensor holds, what it should, and what to do."""
    expected = _dtypes(name, formats)
    found, *names = (str(t).removeprefix("torch.") for t in (checkpoint.dtypes[stored], *expected))
    owner = split_name(name)[0]
    if owner in formats and formats[owner].scheme:
        remedy = "the file is damaged, or its settings are of other weights; quantize again"
    else:
        remedy = (
            "quantized weights need the settings of the tool that made them, in config.json or "
            "beside it"
        )
    return f"{stored} holds {found}; {' or '.join(names)} is expected; {remedy}"


def _dtypes(name: str, formats: Formats) -> tuple[torch.dtype, ...]:
    """The dtypes that a tensor may be stored in."""
    owner, suffix = split_name(name)
    tensors = formats[owner].tensors if owner in formats else ()
    return next((t.dtypes for t in tensors if t.suffix == suffix), FLOATS)


def _find_names(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, str]:
    """Parameter name -> stored tensor; of several that would fill one, the first by name.

    A wrapped normalisation is the one to compute with: the plain one beside it is what it was.
    A tied pair is stored once, under either name, or twice; then each keeps its own, as in
    transformers.
    """
    names: dict[str, str] = {}
    for stored in sorted(checkpoint.shapes, key=lambda name: (WRAPPED not in name, name)):
        names.setdefault(parameter_name(stored), stored)
    if config.tie_word_embeddings:
        for name, other in ((HEAD_NAME, EMBEDDING_NAME), (EMBEDDING_NAME, HEAD_NAME)):
            if other in names:
                names.setdefault(name, names[other])
    return names


def _unknown(checkpoint: Checkpoint, names: dict[str, str]) -> list[str]:
    """Stored tensors that are neither parameters nor ignored buffers."""
    wrapped = {parameter_name(name) for name in names.values() if WRAPPED in name}
    extra = checkpoint.shapes.keys() - set(names.values())
    extra = {name for name in extra if parameter_name(name) not in wrapped}
    return sorted(name for name in extra if not name.endswith(IGNORED_SUFFIXES))


def _describe_missing(missing: list[str], checkpoint: Checkpoint, names: dict[str, str]) -> str:
    """The missing tensors, and what the files or the index have instead."""
    text = f"{len(missing)} tensors: {listed(missing)}"
    unknown = _unknown(checkpoint, names)
    if unknown:
        text += f"; found {len(unknown)} others: {listed(unknown, 3)}"
    prefixes = {name.removesuffix(m) for name in unknown for m in missing if name.endswith(m)}
    if len(prefixes) == 1:
        text += f"; save the weights without the prefix {prefixes.pop()!r}"
    if promised := sorted({checkpoint.index[m] for m in missing if m in checkpoint.index}):
        text += f"; the index says they are in {listed(promised, 3)}: download the checkpoint again"
    return text


# -- loading -------------------------------------------------------------------------------------


def load_model(
    model: GPTNeoX,
    model_path: Path,
    dtype: torch.dtype,
    *,
    kv_cache_dtype: str = "auto",
    show_progress: bool = False,
) -> None:
    """Fill `model` with this rank's part of the checkpoint, tensor by tensor.

    Peak memory is the packed model plus one tensor and a bounded part of the mapped files.

    Args:
        model: built on the meta device.
        model_path: checkpoint directory (weights may be symlinks).
        dtype: the dtype to compute in.
        kv_cache_dtype: see `find_kv_format`.
        show_progress: draw a progress bar on stderr when it is a terminal.

    Raises:
        OSError, CheckpointError: see `check_weights`.
        ConfigError: see `find_kv_format` and `Device.check_kv_format`.
        RuntimeError: not enough memory; the message has both numbers.
    """
    checkpoint, layout = _open(model_path, model.config, model.group.world_size)
    model.size = size_of(model, layout.formats, dtype, kv_cache_dtype)
    check_memory(model.size, model.device)
    _warn_of_untied(checkpoint, layout, model.config)
    reader = _Reader(checkpoint, layout, model, dtype)
    disable = not (show_progress and model.group.rank == 0 and sys.stderr.isatty())
    units = list(model.packing_units())
    for name, unit in tqdm(units, desc="loading", unit="layer", leave=False, disable=disable):
        for owner, module in unit.named_modules(prefix=name):
            if isinstance(module, Linear):
                bias = None if module.bias is None else reader.read_bias(owner)
                module.load(reader.read_weight(owner), bias)
            else:
                for key, _ in list(module.named_parameters(recurse=False)):
                    module.register_parameter(key, as_parameter(reader.read(f"{owner}.{key}")))
        unit.pack()
    reader.log_notices()
    checkpoint.close()


@dataclass(frozen=True)
class _Reader:
    """Reads this rank's parts onto its device."""

    checkpoint: Checkpoint
    layout: Layout
    model: GPTNeoX
    dtype: torch.dtype
    notices: dict[str, dict[str, int]] = field(default_factory=dict)  # text -> layer -> bytes

    def read(self, name: str) -> Tensor:
        """Any parameter but a linear layer's weight, copied from the file."""
        device = self.model.device.torch_device
        return self._read_part(name).to(device=device, dtype=self.dtype, copy=True)

    def read_bias(self, linear: str) -> Tensor:
        """The bias of a linear layer; zeros where the weight's tensors hold it."""
        if not self.layout.formats[linear].has_bias:
            return self.read(f"{linear}.bias")
        rows = len(self._read_part(f"{linear}.weight"))
        return torch.zeros(rows, dtype=self.dtype, device=self.model.device.torch_device)

    def read_weight(self, linear: str) -> LinearWeight:
        """The weight of a linear layer, in the format it is stored in."""
        weight_format, group = self.layout.formats[linear], self.model.group
        if shares_inputs(linear):
            weight_format = weight_format.of_part(group.rank, group.world_size)
        stored = {t.suffix: self._read_part(f"{linear}.{t.suffix}") for t in weight_format.tensors}
        path = self.checkpoint.model_path
        try:
            weight = weight_format.load(stored, self.model.device.torch_device, self.dtype)
        except ValueError as error:
            raise CheckpointError(f"{path}: {linear}: {error}") from error
        if weight.notice is not None:
            self.notices.setdefault(weight.notice.text, {})[linear] = weight.notice.num_bytes
        return weight

    def log_notices(self) -> None:
        """What a user should know of how weights are held."""
        for text, sizes in self.notices.items():
            logger.info(
                "%s: %.2f MiB of weights are %s: %s",
                self.checkpoint.model_path,
                sum(sizes.values()) / 2**20,
                text,
                listed(list(sizes), 3),
            )

    def _read_part(self, name: str) -> Tensor:
        """In the file's dtype."""
        group, stored = self.model.group, self.layout.names[name]
        if self.layout.num_parts > 1 and not is_embedding(stored, self.model.config):
            return self.checkpoint.read(stored)  # cut when it was written
        rank, world_size, formats = group.rank, group.world_size, self.layout.formats
        return read_part(self.checkpoint, stored, name, formats, rank, world_size)


def _warn_of_untied(checkpoint: Checkpoint, layout: Layout, config: ModelConfig) -> None:
    """Say when a head is stored that the tied embedding it should be is not."""
    head, embedding = layout.names[HEAD_NAME], layout.names[EMBEDDING_NAME]
    if not config.tie_word_embeddings or head == embedding:
        return
    if not torch.equal(checkpoint.read(head), checkpoint.read(embedding)):
        logger.warning(
            "%s: config.json ties the embeddings, but %s and %s differ; both are used as stored. "
            "Set tie_word_embeddings to false to silence this",
            checkpoint.model_path,
            head,
            embedding,
        )


def size_of(
    model: GPTNeoX, formats: Formats, dtype: torch.dtype, kv_cache_dtype: str = "auto"
) -> ModelSize:
    """The size of a model that computes in `dtype`, as `load_model` gives it to the model.

    Raises:
        ConfigError: see `find_kv_format` and `Device.check_kv_format`.
    """
    kv_format = find_kv_format(kv_cache_dtype, model.config, dtype)
    model.device.check_kv_format(kv_format, model.config.head_dim)
    return ModelSize(model.config, dtype, kv_format, model.group.world_size, formats)


def check_memory(size: ModelSize, device: Device) -> None:
    """Raise RuntimeError when the weights of a rank do not fit; the message has both numbers."""
    needed, free = size.weight_bytes, device.memory().free
    if needed > free:
        raise RuntimeError(
            f"not enough memory for the weights: {needed / 2**30:.2f} GiB needed in "
            f"{str(size.dtype).removeprefix('torch.')}, {free / 2**30:.2f} GiB free on "
            f"{device.name}; use a smaller dtype, more devices or a smaller model"
        )
