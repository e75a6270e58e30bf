# SPDX-License-Identifier: Apache-2.0
"""The weight files of a checkpoint directory: which they are, and how they are read."""

from __future__ import annotations

import json
import logging
import math
import pickle
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptneox.config.files import read_json
from gptneox.file_faults import explain, explain_place, is_there
from gptneox.files import FILES_NAME, UNFINISHED

logger = logging.getLogger(__name__)

# Pages read from a mapped file stay resident; it is remapped after this many bytes to free them.
REMAP_BYTES = 64 << 20
# Buffers that old checkpoints hold and the model recomputes.
IGNORED_SUFFIXES = (".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")
# A longer header is a damaged one. Source: the safetensors format.
MAX_HEADER_BYTES = 100 << 20

# The safetensors format's names of data types.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class CheckpointError(ValueError):
    """Weight files are missing, damaged or do not fit config.json."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor, as the header gives them."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightFile:
    """One file of tensors, mapped into memory; reading a slice copies nothing but the slice.

    On a file system that maps no files (`is_mapped` turns false), what is asked for is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_mapped = True
        self._handle: Any = None
        self._bytes_read = 0

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by its name, from the header alone where the format has one."""
        raise NotImplementedError

    def _open(self) -> Any:
        raise NotImplementedError

    def _slice(self, handle: Any, name: str, index: tuple[slice, ...]) -> Tensor:
        raise NotImplementedError

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """A tensor, or a slice of it; it may alias the file, so copy it before `close`."""
        if self._handle is None or (self.is_mapped and self._bytes_read > REMAP_BYTES):
            self.close()
            self._handle = self._open()
        tensor = self._slice(self._handle, name, index)
        self._bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def close(self) -> None:
        """Unmap the file, or free what was read of it."""
        self._handle, self._bytes_read = None, 0

    def damage(self, error: BaseException) -> CheckpointError:
        """What to raise for a file that cannot be read."""
        reason = explain(self.path) or f"is damaged: {error}; download it again"
        return CheckpointError(f"{self.path} {reason}")


class SafetensorsFile(WeightFile):
    """`*.safetensors`; the library refuses damaged headers and truncated data."""

    def _open(self) -> Any:
        if self.is_mapped:
            try:
                return safe_open(self.path, framework="pt", device="cpu")
            except SafetensorError as error:
                raise self.damage(error) from error
            except (OSError, RuntimeError) as error:
                if reason := explain_place(self.path):
                    raise CheckpointError(f"{self.path} {reason}") from error
                logger.info("%s cannot be mapped (%s); it is read instead", self.path, error)
                self.is_mapped = False
        try:
            return _UnmappedSafetensors(self.path)
        except (OSError, ValueError, TypeError, KeyError, struct.error, RecursionError) as error:
            raise self.damage(error) from error

    def tensors(self) -> dict[str, TensorInfo]:
        """From the header."""
        handle, tensors = self._open(), {}
        for name in handle.keys():  # noqa: SIM118
            entry = handle.get_slice(name)
            dtype = entry.get_dtype()
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"{self.path}: {name} holds {dtype}, which is quantized; use a checkpoint of "
                    "floating-point weights"
                )
            tensors[name] = TensorInfo(tuple(entry.get_shape()), DTYPES[dtype])
        return tensors

    def metadata(self) -> dict[str, str]:
        """The free text that the header carries."""
        return self._open().metadata() or {}

    def _slice(self, handle: Any, name: str, index: tuple[slice, ...]) -> Tensor:
        if not index:
            return handle.get_tensor(name)
        return handle.get_slice(name)[index]


class _UnmappedSafetensors:
    """What `safe_open` offers, by reading; for file systems that map no files.

    Source: the safetensors format (8 bytes header size, JSON header, contiguous data).
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header; what is wrong with it is raised as it comes."""
        self._path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        self._start = 8 + length
        self._metadata = header.pop("__metadata__", None)
        self._entries: dict[str, _UnmappedSlice] = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end <= size - self._start:
                raise ValueError(f"{name} lies outside the file")
            self._entries[name] = _UnmappedSlice(path, self._start + begin, end - begin, entry)

    def keys(self) -> Iterable[str]:
        return self._entries.keys()

    def metadata(self) -> Any:
        return self._metadata

    def get_slice(self, name: str) -> _UnmappedSlice:
        return self._entries[name]

    def get_tensor(self, name: str) -> Tensor:
        return self._entries[name][()]


class _UnmappedSlice:
    """One tensor of an `_UnmappedSafetensors`; indexing reads the rows it needs."""

    def __init__(self, path: Path, offset: int, num_bytes: int, entry: Mapping[str, Any]) -> None:
        self._path, self._offset, self._dtype = path, offset, entry["dtype"]
        self._shape = tuple(entry["shape"])
        itemsize = DTYPES[self._dtype].itemsize if self._dtype in DTYPES else 0
        if itemsize and math.prod(self._shape) * itemsize != num_bytes:
            raise ValueError(f"{num_bytes} bytes for the shape {list(self._shape)}")

    def get_shape(self) -> tuple[int, ...]:
        return self._shape

    def get_dtype(self) -> str:
        return self._dtype

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        dtype, shape = DTYPES[self._dtype], self._shape
        rows = range(shape[0])[index[0]] if index else range(shape[0] if shape else 1)
        row_elements = math.prod(shape[1:])
        out = torch.empty(len(rows) * row_elements, dtype=dtype)
        view = memoryview(out.view(torch.uint8).numpy().data)
        with self._path.open("rb") as file:
            file.seek(self._offset + rows.start * row_elements * dtype.itemsize)
            if file.readinto(view) != len(view):
                raise CheckpointError(f"{self._path} became shorter while it was read")
        return out.view(len(rows), *shape[1:])[(slice(None), *index[1:])] if shape else out[0]


class PickleFile(WeightFile):
    """`pytorch_model*.bin`, read with weights_only: a pickle that runs code is refused."""

    def _open(self) -> Any:
        if self.is_mapped:
            try:
                return self._load(mmap=True)
            except RuntimeError:  # from before torch 1.6: no zip archive; or nothing can be mapped
                self.is_mapped = False
        return self._load(mmap=False)

    def _load(self, mmap: bool) -> dict[str, Tensor]:
        try:
            state = torch.load(self.path, map_location="cpu", mmap=mmap, weights_only=True)
        except pickle.UnpicklingError as error:
            no_pickle = ("invalid load key", "Unsupported operand", "truncated")
            if explain(self.path) or any(text in str(error) for text in no_pickle):
                raise self.damage(error) from error
            raise CheckpointError(
                f"{self.path} holds more than tensors and was not opened, because unpickling it "
                "could run code; convert it to safetensors where you trust it"
            ) from error
        except Exception as error:  # a damaged pickle can raise anything
            if mmap and isinstance(error, RuntimeError):
                raise
            raise self.damage(error) from error
        return self._tensors_of(state)

    def _tensors_of(self, state: Any) -> dict[str, Tensor]:
        """The tensors of a state dict; what else lies between them is left out."""
        if not isinstance(state, dict) or not any(isinstance(t, Tensor) for t in state.values()):
            kind = type(state).__name__
            if isinstance(state, dict):
                kind += f" of {', '.join(map(str, list(state)[:5])) or 'nothing'}"
            raise CheckpointError(
                f"{self.path} is not a state dict (name -> tensor) but a {kind}; save the state "
                "dict itself"
            )
        tensors = {str(n): t.detach() for n, t in state.items() if isinstance(t, Tensor)}
        for name, tensor in tensors.items():
            if tensor.is_meta or tensor.layout != torch.strided:
                kind = "no data" if tensor.is_meta else f"a {tensor.layout} tensor"
                raise CheckpointError(f"{self.path}: {name} holds {kind}; save the weights again")
        return tensors

    def tensors(self) -> dict[str, TensorInfo]:
        """From the state dict."""
        if self._handle is None:
            self._handle = self._open()
        return {n: TensorInfo(tuple(t.shape), t.dtype) for n, t in self._handle.items()}

    def _slice(self, handle: Any, name: str, index: tuple[slice, ...]) -> Tensor:
        return handle[name][index] if index else handle[name]


def open_weight_file(path: Path) -> WeightFile:
    """The reader for a file of safetensors or a pickle, by its ending."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)


# -- which files ---------------------------------------------------------------------------------

# What transformers looks for, in this order. Source: transformers 5, modeling_utils.py,
# `_get_resolved_checkpoint_files`.
WEIGHT_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SHARD = re.compile(r"(model|pytorch_model)-(\d+)-of-(\d+)\.(safetensors|bin)")
# Quantized weights of msmodelslim, whole or by an index.
_QUANTIZED = re.compile(r"quant_model_weights?(_[a-z0-9_]+)?\.safetensors(\.index\.json)?")
# Endings of files that may be meant as weights, named in the error where there are none.
_WEIGHT_ENDINGS = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".npz"),
    *(".onnx", ".part", ".incomplete", ".crdownload", ".aria2", ".gz", ".zip", ".tar"),
}


def find_weight_files(model_path: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of the base model, and the index's weight map ({} without an index).

    The choice is that of transformers; adapters, optimizer states, variants and leftover shards
    are not part of the model. In addition, a complete set of shards needs no index, and an index
    is passed over where none of its files exists.

    Raises:
        FileNotFoundError: no weight file, or one that the index names is absent; what is there
            instead is said.
        CheckpointError: an index is damaged, or absent where there are several sets of shards; or
            a run of this toolkit was interrupted while it moved files here.
    """
    if (model_path / UNFINISHED / FILES_NAME).exists():
        raise CheckpointError(
            f"{model_path} is not complete: what wrote it was interrupted; run that again"
        )
    problems = []
    named = _named_in_config(model_path)
    names = named or (*WEIGHT_NAMES, *_quantized_names(model_path))
    for name in names:
        path = model_path / name
        if not path.is_file():
            if is_there(path):
                problems.append(f"{name} {explain_place(path)}")
        elif path.suffix != ".json":
            return _chosen(model_path, [path], name, names, problems), {}
        else:
            weight_map = _read_index(path)
            files = sorted({model_path / shard for shard in weight_map.values()})
            absent = [file for file in files if not file.is_file()]
            if not absent:
                return _chosen(model_path, files, name, names, problems), weight_map
            problem = f"lacks {_absent(absent)}, which {name} names; download the missing files"
            if len(absent) < len(files):
                raise FileNotFoundError(f"{model_path} {problem}")
            problems.append(f"it {problem}")
    shards = [] if named else _shards_without_index(model_path, problems)
    if shards:
        return _chosen(model_path, shards, "a set of shards without an index", (), problems), {}
    if not named and not problems and (file := _only_gguf(model_path)):
        return _chosen(model_path, [file], file.name, (), problems), {}
    raise FileNotFoundError(_describe_nothing(model_path, named, problems))


def _only_gguf(model_path: Path) -> Path | None:
    """The GGUF file of a directory that has nothing else.

    Raises:
        CheckpointError: there are several.
    """
    files = sorted(model_path.glob("*.gguf"))
    if len(files) > 1:
        raise CheckpointError(
            f"{model_path} has several models: {listed([p.name for p in files])}; keep one"
        )
    return files[0] if files else None


def _chosen(
    model_path: Path, files: list[Path], name: str, names: Iterable[str], problems: list[str]
) -> list[Path]:
    """The chosen files; logs what was passed over."""
    for problem in problems:
        logger.warning("%s: %s; %s is used", model_path, problem, name)
    if others := [n for n in names if n != name and (model_path / n).is_file()]:
        logger.info("%s: %s is used, not %s", model_path, name, ", ".join(others))
    return files


def _named_in_config(model_path: Path) -> tuple[str, ...]:
    """The file that config.json's `transformers_weights` names instead of the usual ones."""
    path = model_path / "config.json"
    name = read_json(path).get("transformers_weights") if path.is_file() else None
    if name is None:
        return ()
    endings = (".safetensors", ".safetensors.index.json")
    is_name = isinstance(name, str) and name.endswith(endings)
    if not is_name or ".." in Path(name).parts or Path(name).is_absolute():
        raise CheckpointError(
            f"{path}: transformers_weights is {name!r}; a safetensors file of the directory, or an "
            "index of such, is expected"
        )
    return (name,)


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(n, str) and n for n in weight_map.values())
    ):
        raise CheckpointError(f"{path} has no valid weight_map; download it again")
    return weight_map


def _absent(paths: list[Path]) -> str:
    """Names of files that are not there, and what is there instead."""
    return listed(
        [f"{p.name} (it {explain_place(p)})" if is_there(p) else p.name for p in sorted(paths)]
    )


def _shards_without_index(model_path: Path, problems: list[str]) -> list[Path]:
    """A complete set of shards, safetensors preferred; adds what is missing to `problems`."""
    found: dict[tuple[str, str, str], dict[int, Path]] = defaultdict(dict)
    for path in model_path.iterdir():
        if match := _SHARD.fullmatch(path.name):
            stem, number, total, ending = match.groups()
            found[ending, stem, total][int(number)] = path
    complete = []
    for (ending, _, total), shards in sorted(found.items(), reverse=True):
        present = {number for number, path in shards.items() if path.is_file()}
        wanted = set(range(1, int(total) + 1))
        if wanted and wanted == present:
            complete.append((ending, [shards[number] for number in sorted(wanted)]))
            continue
        example = next(iter(shards.values())).name
        missing = [str(number) for number in sorted(wanted - present)]
        problems.append(
            f"of the {total} shards like {example} it lacks number {listed(missing, 5)}"
        )
    chosen = [paths for ending, paths in complete if ending == complete[0][0]]
    if len(chosen) > 1:
        raise CheckpointError(
            f"{model_path} has several sets of shards and no index that says which is the model: "
            f"those of {listed([paths[0].name for paths in chosen])}; remove the others"
        )
    return chosen[0] if chosen else []


def _quantized_names(model_path: Path) -> list[str]:
    """Files of quantized weights; one set of them can be the model.

    Raises:
        CheckpointError: there are several.
    """
    found = sorted(p.name for p in model_path.iterdir() if _QUANTIZED.fullmatch(p.name))
    if len({name.removesuffix(".index.json") for name in found}) > 1:
        raise CheckpointError(
            f"{model_path} has several sets of quantized weights: {listed(found)}; keep one"
        )
    return found


def _describe_nothing(model_path: Path, named: tuple[str, ...], problems: list[str]) -> str:
    """`named`: by config.json."""
    if problems:
        return f"no weights in {model_path}: {'; '.join(problems)}"
    text = f"no weights in {model_path}: none of {', '.join(named or WEIGHT_NAMES)}"
    found = sorted(p.name for p in model_path.iterdir() if p.suffix in _WEIGHT_ENDINGS)
    if named:
        return f"{text}, which config.json names as transformers_weights"
    if is_there(model_path / "adapter_config.json"):
        return f"{text}; it holds an adapter: merge it, or give the directory of its base model"
    if found:
        return (
            f"{text}; found {listed(found)}, which is not what a GPT-NeoX model's weights are "
            "called; give such a file the first of these names if it holds the model"
        )
    return f"{text}; download the weights, or give their directory"


def listed(names: list[str], most: int = 20) -> str:
    """Names for a message, cut short."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# -- quantized by others -------------------------------------------------------------------------

# Files that a quantizer leaves beside the weights.
_QUANTIZER_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
    "quant_model_description*.json": "ModelSlim",
}
# Last part of a tensor's name -> the method that stores it.
_QUANTIZED_PARTS = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "SCB": "bitsandbytes, 8 bits",
    "absmax": "bitsandbytes, 4 bits",
    "quant_map": "bitsandbytes, 4 bits",
    "weight_scale_inv": "FP8 in blocks",
    "weight_packed": "compressed-tensors",
    "weight_zero_point": "compressed-tensors",
    "weight_scale": "compressed-tensors, FP8 or ModelSlim",
    "input_scale": "compressed-tensors, FP8 or ModelSlim",
    "weight_offset": "ModelSlim",
    "input_offset": "ModelSlim",
    "deq_scale": "ModelSlim",
    "quant_bias": "ModelSlim",
    "W_q": "HQQ",
    "_data": "quanto",
    "scales": "scales of quantized groups",
}


def find_quantization(model_path: Path, names: Iterable[str]) -> str:
    """The method by which weights were quantized, and the evidence; "" for float weights.

    Args:
        model_path: the directory, where a quantizer may have left its settings.
        names: of all stored tensors.
    """
    for pattern, method in _QUANTIZER_FILES.items():
        for path in sorted(model_path.glob(pattern)):
            settings = read_json(path)
            if settings.get("model_quant_type") != "FLOAT":
                found = settings.get("quant_method") or settings.get("model_quant_type") or method
                return f"{found}, as {path.name} says"
    for name in sorted(names):
        if method := _QUANTIZED_PARTS.get(name.rsplit(".", 1)[-1], ""):
            return f"{method}, as it holds {name}"
    return ""
