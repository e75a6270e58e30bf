# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: find them, check them, and stream one rank's tensors into a model."""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gptneox.config.errors import ConfigError
from gptneox.config.files import read_json
from gptneox.config.model import ModelConfig
from gptneox.files import is_unused
from gptneox.layers import Linear
from gptneox.model import GPTNeoX, Layer
from gptneox.parallel import TensorParallelGroup
from gptneox.weights.files import (
    CheckpointError,
    SafetensorsFile,
    WeightFile,
    find_quantization,
    find_weight_files,
    listed,
)

logger = logging.getLogger(__name__)

# Module name (second last part of a tensor's name) -> dimension its weight is cut along.
CUT_DIMENSIONS = {
    "query_key_value": 0,
    "dense_h_to_4h": 0,
    "embed_out": 0,
    "dense": 1,
    "dense_4h_to_h": 1,
}
# Buffers that old checkpoints hold and the model recomputes.
IGNORED_SUFFIXES = (".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")
HEAD_NAMES = ("embed_out.weight", "lm_head.weight")
PREFIX = "gpt_neox."
EMBEDDING_NAME = "gpt_neox.embed_in.weight"
# A tensor of which every rank's part differs from the whole in shape.
CUT_NAME = "gpt_neox.layers.0.attention.query_key_value.weight"
MANIFEST_NAME = "manifest.json"
PART_FILE = "model.safetensors"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Checkpoint:
    """All tensors of a checkpoint directory by name, whichever files they are in."""

    def __init__(self, model_path: Path) -> None:
        """Map every name to its file.

        Raises:
            FileNotFoundError: no weight file, or one that the index names is absent.
            CheckpointError: a file is damaged, or a tensor is in two files with different values.
        """
        self.model_path = model_path
        self.files, self.index = find_weight_files(model_path)
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
                file.close()  # what is not mapped takes memory
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


# -- one rank's part of a tensor -----------------------------------------------------------------


def cut_dimension(name: str) -> int | None:
    """Dimension along which tensor parallelism cuts a tensor's weight; None: whole on each rank."""
    return CUT_DIMENSIONS.get(name.split(".")[-2:][0])


def rank_slice(name: str, shape: tuple[int, ...], rank: int, world_size: int) -> tuple[slice, ...]:
    """The part of tensor `name` that `rank` holds; () means the whole tensor.

    A fused query_key_value is laid out per head (q, k, v), so equal row ranges are whole heads.
    Rows of a vocabulary that does not divide are padded: the last ranks hold fewer real ones.
    A row-parallel bias is whole here; the caller decides who adds it.
    """
    dim = cut_dimension(name)
    if world_size == 1 or dim is None or len(shape) <= dim:
        return ()
    size = math.ceil(shape[dim] / world_size)
    start = min(rank * size, shape[dim])
    part = slice(start, min(start + size, shape[dim]))
    return (slice(None),) * dim + (part,)


def part_shape(name: str, shape: tuple[int, ...], world_size: int) -> tuple[int, ...]:
    """Shape of one rank's part; a vocabulary that does not divide is padded."""
    dim = cut_dimension(name)
    if dim is None or len(shape) <= dim:
        return shape
    return (*shape[:dim], math.ceil(shape[dim] / world_size), *shape[dim + 1 :])


def parameter_name(stored: str) -> str:
    """The parameter that a stored tensor fills, by the name that published checkpoints give it.

    The prefix of the base model may be missing, or be there once too often, and the head has two
    names. Source: transformers 5, core_model_loading.py, `rename_source_key`, and its mapping of
    `embed_out` to `lm_head` for GPT-NeoX.
    """
    bare = stored.removeprefix(PREFIX)
    if stored in HEAD_NAMES or bare == HEAD_NAMES[1]:
        return HEAD_NAMES[0]
    return bare if bare.startswith(PREFIX) else PREFIX + bare


def is_embedding(name: str, config: ModelConfig) -> bool:
    """Whether a stored tensor is the token embedding, which every rank needs whole.

    In a tied checkpoint it may be stored under the head's name.
    """
    parameter = parameter_name(name)
    return parameter == EMBEDDING_NAME or (
        config.tie_word_embeddings and parameter == HEAD_NAMES[0]
    )


def is_partial_bias(name: str, value: Tensor) -> bool:
    """Whether a tensor is the bias of a row-parallel layer, which only one rank may add."""
    return value.dim() == 1 and cut_dimension(name) == 1


def pad_rows(value: Tensor, num_rows: int) -> Tensor:
    """Rows of zeros up to `num_rows`: the padded end of a vocabulary."""
    missing = num_rows - value.shape[0]
    if value.dim() < 2 or missing <= 0:
        return value
    return torch.cat([value, value.new_zeros(missing, *value.shape[1:])])


# -- cut checkpoints -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifest:
    """What `cut_model_util.py` wrote, sealed when it was complete.

    `cut_id` stands in the manifest and in every rank's file, so parts of two cuts cannot be mixed.
    `source` maps file names to {"size", "mtime_ns", "sha256"}; `tensors` maps names to
    {"shape", "dtype"} of the uncut checkpoint; `config` is its config.json. `files` are all that
    were written besides the manifest, as "0/config.json"; cuts of older versions do not list them.
    """

    cut_id: str
    world_size: int
    source_path: str
    source: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Any]]
    config: dict[str, Any]
    files: list[str] = field(default_factory=list)


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
    except ConfigError as error:
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
        if (found := SafetensorsFile(file).metadata().get("cut_id")) != manifest.cut_id:
            raise CheckpointError(
                f"{file} is of another cut ({found}) than {path} ({manifest.cut_id}); cut the "
                "model again"
            )
    return manifest


def parse_manifest(path: Path) -> Manifest:
    """The manifest alone, whatever lies beside it.

    Raises:
        ConfigError: it is none.
    """
    try:
        manifest = Manifest(**read_json(path))
    except TypeError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(manifest.world_size, int):
        raise ConfigError(f"world_size is {manifest.world_size!r}, a number is expected")
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


# -- checking ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a checkpoint stores the model.

    `names` maps each parameter to the stored tensor that fills it. `num_parts` above 1: the files
    are one rank's part of a cut checkpoint.
    """

    names: dict[str, str]
    num_parts: int


def check_weights(model_path: Path, config: ModelConfig, world_size: int | None = None) -> None:
    """Check the weight files against config.json without reading their data.

    Args:
        model_path: what `load_model` would be given.
        config: read from the same directory.
        world_size: ranks that would run; None: as many as the files are for.

    Raises:
        OSError, CheckpointError: exactly as `load_model` would raise.
    """
    _open(model_path, config, world_size)[0].close()


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
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint, layout


def find_layout(checkpoint: Checkpoint, config: ModelConfig) -> Layout:
    """Which stored tensor fills which parameter, after checking that everything fits.

    Raises:
        CheckpointError: the weights are quantized, or tensors are missing (all are listed) or of
            a wrong type or shape.
    """
    path = checkpoint.model_path
    if method := config.quantize or find_quantization(path, checkpoint.shapes):
        raise CheckpointError(
            f"{path} is quantized ({method}), which is not built yet; use the float checkpoint"
        )
    names = _find_names(checkpoint, config)
    expected = full_shapes(config)
    if missing := [name for name in expected if name not in names]:
        raise CheckpointError(f"{path} lacks {_describe_missing(missing, checkpoint, names)}")
    num_parts = config.part_world_size
    if checkpoint.shapes[names[CUT_NAME]] == expected[CUT_NAME]:
        num_parts = 1  # whole, whatever config.json kept of an earlier cut
    wrong = []
    for name, whole in expected.items():
        found = names[name]
        if checkpoint.dtypes[found] not in FLOATS:
            raise CheckpointError(
                f"{path}: {found} holds {str(checkpoint.dtypes[found]).removeprefix('torch.')}; "
                "a checkpoint of floating-point weights is expected"
            )
        # The head of a tied checkpoint is the embedding, which is whole in every part.
        shape = whole if is_embedding(found, config) else part_shape(name, whole, num_parts)
        if checkpoint.shapes[found] != shape:
            wrong.append(f"{found} is {list(checkpoint.shapes[found])}, expected {list(shape)}")
    if wrong:
        raise CheckpointError(f"{path} does not fit its config.json: {listed(wrong, 5)}")
    if unknown := _unknown(checkpoint, names):
        logger.warning("%s: ignored unknown %s", path, listed(unknown, 5))
    return Layout(names, num_parts)


def _find_names(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, str]:
    """Parameter name -> stored tensor; of several that would fill one, the first by name.

    A tied pair is stored once, under either name, or twice; then each keeps its own, as in
    transformers.
    """
    names: dict[str, str] = {}
    for stored in sorted(checkpoint.shapes):
        names.setdefault(parameter_name(stored), stored)
    if config.tie_word_embeddings:
        for name, other in ((HEAD_NAMES[0], EMBEDDING_NAME), (EMBEDDING_NAME, HEAD_NAMES[0])):
            if other in names:
                names.setdefault(name, names[other])
    return {name: names[name] for name in full_shapes(config) if name in names}


def _unknown(checkpoint: Checkpoint, names: dict[str, str]) -> list[str]:
    """Stored tensors that fill no parameter and are no buffers."""
    extra = checkpoint.shapes.keys() - set(names.values())
    return sorted(name for name in extra if not name.endswith(IGNORED_SUFFIXES))


def _describe_missing(missing: list[str], checkpoint: Checkpoint, names: dict[str, str]) -> str:
    """The missing tensors, beside what was found or promised instead of them."""
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
    model: GPTNeoX, model_path: Path, dtype: torch.dtype, *, show_progress: bool = False
) -> None:
    """Fill `model` with this rank's part of the checkpoint, tensor by tensor.

    Peak memory is the packed model plus one tensor and a bounded part of the mapped files.

    Args:
        model: built on the meta device.
        model_path: checkpoint directory (weights may be symlinks).
        dtype: the dtype to compute in.
        show_progress: draw a progress bar on stderr when it is a terminal.

    Raises:
        OSError, CheckpointError: see `check_weights`.
        RuntimeError: not enough memory; the message has both numbers.
    """
    checkpoint, layout = _open(model_path, model.config, model.group.world_size)
    check_memory(model, dtype)
    _warn_of_untied(checkpoint, layout, model.config)
    modules = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    disable = not (show_progress and model.group.rank == 0 and sys.stderr.isatty())
    owner = {id(m): n for n, m in model.named_modules()}
    layers = [m for m in model.modules() if isinstance(m, Layer) and m.fused]
    fused = {id(m): layer for layer in layers for m in layer.modules()}
    last = {id(layer): [m for m in modules if fused.get(id(m)) is layer][-1] for layer in layers}
    for module in tqdm(modules, desc="loading", unit="layer", leave=False, disable=disable):
        for key, parameter in list(module.named_parameters(recurse=False)):
            name = f"{owner[id(module)]}.{key}"
            value = _read_part(checkpoint, layout, name, parameter, model)
            # What was read may alias the mapped file: copy it, unless `pack` copies it at once.
            copy = not isinstance(module, Linear) or key != "weight"
            value = value.to(device=model.device.torch_device, dtype=dtype, copy=copy)
            module.register_parameter(key, nn.Parameter(value, requires_grad=False))
        layer = fused.get(id(module))
        if layer is None and isinstance(module, Linear):
            module.pack()
        elif layer is not None and module is last[id(layer)]:
            layer.pack()
    checkpoint.close()


def _read_part(
    checkpoint: Checkpoint, layout: Layout, name: str, parameter: Tensor, model: GPTNeoX
) -> Tensor:
    """This rank's part of parameter `name`, in the file's dtype."""
    group, source = model.group, layout.names[name]
    if layout.num_parts > 1 and not is_embedding(source, model.config):
        return checkpoint.read(source)  # cut when it was written
    index = rank_slice(name, checkpoint.shapes[source], group.rank, group.world_size)
    value = checkpoint.read(source, index)
    if is_partial_bias(name, value) and group.rank > 0:
        return torch.zeros_like(value)  # a row-parallel bias is added on rank 0 only
    return pad_rows(value, parameter.shape[0])


def _warn_of_untied(checkpoint: Checkpoint, layout: Layout, config: ModelConfig) -> None:
    """Say when a head is stored that the tied embedding it should be is not."""
    head, embedding = layout.names[HEAD_NAMES[0]], layout.names[EMBEDDING_NAME]
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


def full_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an uncut checkpoint."""
    c, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING_NAME: (v, c)}
    for i in range(config.num_layers):
        layer = f"gpt_neox.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = shapes[f"{layer}.{norm}.bias"] = (c,)
        for linear, out_in in (
            ("attention.query_key_value", (3 * c, c)),
            ("attention.dense", (c, c)),
            ("mlp.dense_h_to_4h", (f, c)),
            ("mlp.dense_4h_to_h", (c, f)),
        ):
            shapes[f"{layer}.{linear}.weight"] = out_in
            if config.attention_bias or linear.startswith("mlp"):
                shapes[f"{layer}.{linear}.bias"] = out_in[:1]
    shapes["gpt_neox.final_layer_norm.weight"] = shapes["gpt_neox.final_layer_norm.bias"] = (c,)
    shapes["embed_out.weight"] = (v, c)
    return shapes


def weight_bytes(model: GPTNeoX, dtype: torch.dtype) -> int:
    """Bytes of this rank's weights."""
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize


def check_memory(model: GPTNeoX, dtype: torch.dtype) -> None:
    """Raise RuntimeError when the weights of this rank do not fit; the message has both numbers."""
    needed = weight_bytes(model, dtype)
    free = model.device.memory().free
    if needed > free:
        raise RuntimeError(
            f"not enough memory for the weights: {needed / 2**30:.2f} GiB needed in "
            f"{str(dtype).removeprefix('torch.')}, {free / 2**30:.2f} GiB free on "
            f"{model.device.name}; use a smaller dtype, more devices or a smaller model"
        )
