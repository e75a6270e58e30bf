# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: find them, check them, and stream one rank's tensors into a model."""

from __future__ import annotations

import logging
import math
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from gptneox.config import ConfigError, ModelConfig, read_json
from gptneox.layers import Linear
from gptneox.model import GPTNeoX, Layer
from gptneox.parallel import TensorParallelGroup

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
EMBEDDING_NAME = "gpt_neox.embed_in.weight"
MANIFEST_NAME = "manifest.json"
PART_FILE = "model.safetensors"

# A mapped file keeps the pages that were read resident; it is mapped anew after this many bytes.
REMAP_BYTES = 64 << 20


class CheckpointError(ValueError):
    """Weight files are missing, damaged or do not fit config.json."""


class WeightFile:
    """One file of tensors, mapped into memory; reading a slice copies nothing but the slice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: Any = None
        self._bytes_read = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, from the header alone where the format has one."""
        raise NotImplementedError

    def _open(self) -> Any:
        raise NotImplementedError

    def _slice(self, handle: Any, name: str, index: tuple[slice, ...]) -> Tensor:
        raise NotImplementedError

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """A tensor, or a slice of it; it may alias the file, so copy it before `close`."""
        if self._handle is None or self._bytes_read > REMAP_BYTES:
            self.close()
            self._handle = self._open()
        tensor = self._slice(self._handle, name, index)
        self._bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def close(self) -> None:
        """Unmap the file."""
        self._handle, self._bytes_read = None, 0


class SafetensorsFile(WeightFile):
    """`*.safetensors`; the library refuses damaged headers and truncated data."""

    def _open(self) -> Any:
        try:
            return safe_open(self.path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path} is damaged: {error}; download it again") from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """From the header."""
        handle = self._open()
        return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118

    def metadata(self) -> dict[str, str]:
        """The free text that the header carries."""
        return self._open().metadata() or {}

    def _slice(self, handle: Any, name: str, index: tuple[slice, ...]) -> Tensor:
        if not index:
            return handle.get_tensor(name)
        return handle.get_slice(name)[index]


class PickleFile(WeightFile):
    """`pytorch_model*.bin`, read with weights_only: a pickle that runs code is refused."""

    def _open(self) -> Any:
        try:
            return self._load(mmap=True)
        except RuntimeError:  # written before torch 1.6: not a zip archive, cannot be mapped
            return self._load(mmap=False)

    def _load(self, mmap: bool) -> Any:
        try:
            state = torch.load(self.path, map_location="cpu", mmap=mmap, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{self.path} holds more than tensors and was not opened, because unpickling it "
                "could run code; convert it to safetensors where you trust it"
            ) from error
        except Exception as error:  # a damaged pickle can raise anything
            if mmap and isinstance(error, RuntimeError):
                raise
            raise CheckpointError(f"{self.path} is damaged: {error}; download it again") from error
        if not isinstance(state, dict) or not all(
            isinstance(n, str) and isinstance(t, Tensor) for n, t in state.items()
        ):
            raise CheckpointError(f"{self.path} is not a state dict (name -> tensor)")
        return state

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """From the state dict."""
        if self._handle is None:
            self._handle = self._open()
        return {name: tuple(tensor.shape) for name, tensor in self._handle.items()}

    def _slice(self, handle: Any, name: str, index: tuple[slice, ...]) -> Tensor:
        return handle[name][index] if index else handle[name]


class Checkpoint:
    """All tensors of a checkpoint directory by name, whichever files they are in."""

    def __init__(self, model_path: Path) -> None:
        """Map every name to its file.

        Raises:
            FileNotFoundError: no weight file, or one that the index names is absent.
            CheckpointError: a file is damaged, or a tensor is in two files or in none.
        """
        self.model_path = model_path
        self.files, index = _find_files(model_path)
        self.where: dict[str, WeightFile] = {}
        self._last: WeightFile | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in self.files:
            for name, shape in file.shapes().items():
                if name in self.where:
                    raise CheckpointError(
                        f"tensor {name} is in both {self.where[name].path.name} and "
                        f"{file.path.name} of {model_path}; remove one"
                    )
                self.where[name], self.shapes[name] = file, shape
        if absent := sorted(index.keys() - self.where.keys()):
            raise CheckpointError(
                f"{model_path}: {_listed(absent)} named by the index, but in no file; "
                "download the checkpoint again"
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


def _find_files(model_path: Path) -> tuple[list[WeightFile], Mapping[str, str]]:
    """Weight files, safetensors preferred, and the index's weight map ({} without an index)."""
    kinds: list[tuple[str, type[WeightFile], str]] = [
        ("*.safetensors", SafetensorsFile, "model.safetensors.index.json"),
        ("pytorch_model*.bin", PickleFile, "pytorch_model.bin.index.json"),
    ]
    found = {pattern: sorted(model_path.glob(pattern)) for pattern, _, _ in kinds}
    if all(found.values()):
        logger.info("%s has both .safetensors and .bin weights; safetensors are used", model_path)
    for pattern, kind, index_name in kinds:
        index_path = model_path / index_name
        if index_path.is_file():
            weight_map = read_json(index_path).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(n, str) and n for n in weight_map.values()
            ):
                raise CheckpointError(f"{index_path} has no valid weight_map; download it again")
            names = sorted(set(weight_map.values()))
            if missing := [n for n in names if not (model_path / n).is_file()]:
                raise FileNotFoundError(
                    f"{model_path} lacks {_listed(missing)}, which {index_name} names; "
                    "download the missing files"
                )
            return [kind(model_path / n) for n in names], weight_map
        if found[pattern]:
            return [kind(path) for path in found[pattern]], {}
    raise FileNotFoundError(
        f"no weights in {model_path}: neither *.safetensors nor pytorch_model*.bin"
    )


def _listed(names: list[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


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


def is_embedding(name: str, config: ModelConfig) -> bool:
    """Whether a tensor is the token embedding, which every rank needs whole.

    In a tied checkpoint it may be stored under the head's name.
    """
    return name == EMBEDDING_NAME or (config.tie_word_embeddings and name in HEAD_NAMES)


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
    {"shape", "dtype"} of the uncut checkpoint; `config` is its config.json.
    """

    cut_id: str
    world_size: int
    source_path: str
    source: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Any]]
    config: dict[str, Any]


def read_manifest(part_model: Path) -> Manifest:
    """The manifest of a complete cut.

    Raises:
        CheckpointError: there is none (a cut that was interrupted, or made by another tool), it
            is damaged, or a rank's folder is missing or belongs to another cut.
    """
    path = part_model / MANIFEST_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{part_model} has no {MANIFEST_NAME}, so it is no complete cut of this toolkit; "
            "cut the model again with cut_model_util.py --recut"
        )
    try:
        manifest = Manifest(**read_json(path))
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); cut the model again") from error
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


def rank_directory(
    model_path: Path, group: TensorParallelGroup, *, prefer_parts: bool = False
) -> Path:
    """Where this rank's weights are: the checkpoint itself, or its folder of a cut one.

    Args:
        model_path: a checkpoint, a `part_model`, or one rank's folder of a `part_model`.
        group: this rank's place.
        prefer_parts: take `model_path/part_model` where it exists and there are several ranks.

    Raises:
        CheckpointError: see `read_manifest`; or the cut is for another number of ranks.
    """
    parts = model_path
    if prefer_parts and group.world_size > 1 and (model_path / "part_model").is_dir():
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
        FileNotFoundError, CheckpointError: see `Checkpoint`; also missing or misshapen tensors.
        RuntimeError: not enough memory; the message has both numbers.
    """
    if model.config.part_world_size not in (1, model.group.world_size):
        raise CheckpointError(
            f"{model_path} is one part of {model.config.part_world_size}, but "
            f"{model.group.world_size} ranks run; start {model.config.part_world_size} ranks, or "
            "give the uncut checkpoint"
        )
    checkpoint = Checkpoint(model_path)
    names = _map_names(model, checkpoint)
    _check_memory(model, dtype)
    modules = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    disable = not (show_progress and model.group.rank == 0 and sys.stderr.isatty())
    owner = {id(m): n for n, m in model.named_modules()}
    layers = [m for m in model.modules() if isinstance(m, Layer) and m.fused]
    fused = {id(m): layer for layer in layers for m in layer.modules()}
    last = {id(layer): [m for m in modules if fused.get(id(m)) is layer][-1] for layer in layers}
    for module in tqdm(modules, desc="loading", unit="layer", leave=False, disable=disable):
        for key, parameter in list(module.named_parameters(recurse=False)):
            name = f"{owner[id(module)]}.{key}"
            value = _read_part(checkpoint, name, names[name], parameter, model)
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
    checkpoint: Checkpoint, name: str, source: str, parameter: Tensor, model: GPTNeoX
) -> Tensor:
    """This rank's part of parameter `name`, stored as `source`, in the file's dtype."""
    group = model.group
    if model.config.part_world_size > 1 and not is_embedding(source, model.config):
        return checkpoint.read(source)  # cut when it was written
    index = rank_slice(name, checkpoint.shapes[source], group.rank, group.world_size)
    value = checkpoint.read(source, index)
    if not value.is_floating_point():
        raise CheckpointError(
            f"{checkpoint.model_path}: {source} holds {str(value.dtype).removeprefix('torch.')}; "
            "a checkpoint of floating-point weights is expected"
        )
    if is_partial_bias(name, value) and group.rank > 0:
        return torch.zeros_like(value)  # a row-parallel bias is added on rank 0 only
    return pad_rows(value, parameter.shape[0])


def _map_names(model: GPTNeoX, checkpoint: Checkpoint) -> dict[str, str]:
    """Parameter name -> tensor name in the files, after checking that everything fits.

    Raises:
        CheckpointError: tensors missing (all are listed) or of a wrong shape.
    """
    config = model.config
    expected = full_shapes(config)
    names, missing, wrong = {}, [], []
    for name, whole in expected.items():
        found = _find_name(name, checkpoint, config)
        if found is None:
            missing.append(name)
            continue
        names[name] = found
        # The head of a tied checkpoint is the embedding, which is whole in every part.
        cut = config.part_world_size > 1 and not is_embedding(found, config)
        shape = part_shape(name, whole, config.part_world_size) if cut else whole
        if checkpoint.shapes[found] != shape:
            wrong.append(f"{found} is {list(checkpoint.shapes[found])}, expected {list(shape)}")
    if missing:
        raise CheckpointError(
            f"{checkpoint.model_path} lacks {len(missing)} tensors: {_listed(missing)}"
        )
    if wrong:
        raise CheckpointError(
            f"{checkpoint.model_path} does not fit its config.json: {_listed(wrong, 5)}"
        )
    extra = set(checkpoint.shapes) - set(names.values()) - set(HEAD_NAMES) - {EMBEDDING_NAME}
    if unknown := sorted(n for n in extra if not n.endswith(IGNORED_SUFFIXES)):
        logger.warning("%s: ignored unknown %s", checkpoint.model_path, _listed(unknown, 5))
    return names


def _find_name(name: str, checkpoint: Checkpoint, config: ModelConfig) -> str | None:
    """The tensor that fills parameter `name`; a tied pair may be stored under either name."""
    candidates: tuple[str, ...] = (name,)
    if name in HEAD_NAMES:
        candidates = HEAD_NAMES
        if config.tie_word_embeddings:
            candidates = (EMBEDDING_NAME, *HEAD_NAMES)
    elif name == EMBEDDING_NAME and config.tie_word_embeddings:
        candidates = (EMBEDDING_NAME, *HEAD_NAMES)
    return next((c for c in candidates if c in checkpoint.shapes), None)


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


def _check_memory(model: GPTNeoX, dtype: torch.dtype) -> None:
    itemsize = torch.empty((), dtype=dtype).element_size()
    needed = sum(p.numel() for p in model.parameters()) * itemsize
    free = model.device.memory().free
    if needed > free:
        raise RuntimeError(
            f"not enough memory for the weights: {needed / 2**30:.2f} GiB needed in "
            f"{str(dtype).removeprefix('torch.')}, {free / 2**30:.2f} GiB free on "
            f"{model.device.name}; use a smaller dtype, more devices or a smaller model"
        )
