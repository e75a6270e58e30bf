# SPDX-License-Identifier: Apache-2.0
"""Quantize a checkpoint, tensor by tensor, and make floats of a quantized one again.

W8A16: the weights of linear layers become integers of eight bits with one scale for each output,
rounded to nearest, without calibration. Peak memory is a few times the largest tensor.

    quantization_manifest.json      what it was made of; written last, it seals the result
    config.json, tokenizer, …       as in the source, with the entry that names the scheme
    quant_model_weight_w8a16.safetensors, quant_model_description.json    or, in the other form,
    model.safetensors               for compressed-tensors, which config.json describes
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptneox import __version__
from gptneox.config.files import read_json
from gptneox.config.model import ModelConfig
from gptneox.config.settings import COMPRESSED_TENSORS, QuantizeOptions
from gptneox.weights.files import CheckpointError, listed
from gptneox.weights.formats import FLOATS, INT8_ROWS, Int8Weight, scheme_of, split_name
from gptneox.weights.load import (
    PART_FILE,
    Checkpoint,
    Layout,
    check_weights,
    find_layout,
    parameter_name,
)
from gptneox.weights.readers import compressed_tensors, msmodelslim
from gptneox.weights.results import (
    QUANTIZATION_MANIFEST,
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
from gptneox.weights.size import EMBEDDING_NAME, HEAD_NAME

logger = logging.getLogger(__name__)

HEAD = split_name(HEAD_NAME)[0]
LARGEST = 127  # of a quantized value; -128 is left out, so that ranges are symmetric
_CHUNK = 1 << 24  # values that are widened at a time

# Name of a stored tensor -> its dtype and shape.
Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]


# -- numbers -------------------------------------------------------------------------------------


def row_scales(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale of each row of weight [F, K]: its largest magnitude over 127, [F] fp32.

    The scale is rounded to `dtype`, in which some devices apply it, before anything is divided by
    it. Where that would leave the largest value outside the range, as among the subnormal numbers
    of fp16, the next larger one is taken. A row of zeros has the scale 1.
    """
    largest = weight.abs().amax(1).float() if weight.shape[1] else weight.new_zeros(len(weight))
    largest = largest.float()
    exact = largest / LARGEST
    if dtype == torch.float32:
        rounded = exact
    else:
        narrow = exact.to(dtype)
        larger = (narrow.view(torch.int16) + 1).view(dtype)  # the next one: none is negative
        clips = narrow.float() * (LARGEST + 0.5) < largest
        rounded = torch.where(clips, larger, narrow).float()
    return torch.where(largest == 0, 1.0, rounded.clamp_min(torch.finfo(torch.float32).tiny))


def quantize_rows(weight: Tensor, dtype: torch.dtype) -> Int8Weight:
    """Round weight [F, K] to the nearest multiples of its rows' scales.

    Args:
        weight: of any float type, finite.
        dtype: the checkpoint's, which scales are rounded to.
    """
    scale = row_scales(weight, dtype)
    values = torch.empty(weight.shape, dtype=torch.int8)
    for rows in _chunks(weight):
        exact = weight[rows].float() / scale[rows, None]
        values[rows] = exact.round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return Int8Weight(values, scale, dtype)


def dequantize(weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    """values * scale, rounded once to `dtype`, [F, K]."""
    out = torch.empty(weight.values.shape, dtype=dtype)
    for rows in _chunks(weight.values):
        out[rows] = (weight.values[rows].float() * weight.scale[rows, None]).to(dtype)
    return out


def relative_error(weight: Tensor, quantized: Int8Weight) -> float:
    """Norm of the rounding error over the norm of the weight.

    For inputs without a preferred direction it is also the error of the layer's output.
    """
    error = total = 0.0
    for rows in _chunks(weight):
        wide = weight[rows].double()
        back = quantized.values[rows].double() * quantized.scale[rows, None].double()
        error += (wide - back).square().sum().item()
        total += wide.square().sum().item()
    return math.sqrt(error / total) if total else 0.0


def _chunks(weight: Tensor) -> Iterator[slice]:
    """Ranges of rows, so that little of a matrix is widened at a time."""
    step = max(1, _CHUNK // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        yield slice(start, start + step)


# -- what a run does -----------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearReport:
    """What became of a linear layer's weight."""

    name: str
    scheme: str  # "w8a16" or "float"
    lowest: float
    highest: float
    error: float  # see `relative_error`


@dataclass
class Outcome:
    """Bytes of all tensors before and after."""

    bytes_before: int = 0
    bytes_after: int = 0
    left_out: list[str] = field(default_factory=list)  # tensors that the model does not read


Report = Callable[[LinearReport], None]


def quantize_checkpoint(
    input_path: Path, output_path: Path, options: QuantizeOptions, report: Report
) -> Outcome:
    """Write a W8A16 checkpoint.

    Args:
        input_path: a float checkpoint, not cut.
        output_path: the folder to make; an earlier result of this function is replaced.
        options: which layers, and in which form.
        report: called for every linear layer.

    Raises:
        ValueError, FileNotFoundError: the checkpoint or an option is wrong; nothing was written.
        FileExistsError: `output_path` holds anything that this function did not write.
        RuntimeError: not enough room on the disk, or another run writes there.
    """
    source = _Source.open(input_path)
    if scheme := scheme_of(source.layout.formats):
        raise CheckpointError(
            f"{input_path} is quantized already ({scheme}); give the float checkpoint"
        )
    plan = _Plan(source, _choose(source, options), options.form == COMPRESSED_TENSORS, report)
    groups = [plan.tensors(name) for name in source.stored]
    config = {k: v for k, v in source.config.items() if k != "transformers_weights"}
    with _result(source, output_path, "quantize", config | plan.settings()) as folder:
        if not plan.is_compressed_tensors:
            write_json(folder / msmodelslim.DESCRIPTION, plan.description(groups))
        stem = PART_FILE if plan.is_compressed_tensors else "quant_model_weight_w8a16.safetensors"
        return _write(source, folder, stem, groups, plan.convert, options.part_bytes)


@dataclass(frozen=True)
class _Plan:
    """What a quantized checkpoint consists of."""

    source: _Source
    chosen: set[str]  # linear layers
    is_compressed_tensors: bool  # which form
    report: Report

    def settings(self) -> dict[str, Any]:
        """For config.json."""
        if not self.is_compressed_tensors:
            return {"quantize": INT8_ROWS.scheme}
        ignored = [n for n in self.source.layout.formats if n not in self.chosen]
        return {"quantization_config": compressed_tensors.write_settings(ignored)}

    def description(self, groups: list[Tensors]) -> dict[str, Any]:
        """The file that tags every tensor."""
        tags = {}
        for name in (name for group in groups for name in group):
            is_quantized = _linear(name) in self.chosen
            tags[name] = msmodelslim.W8A16 if is_quantized else msmodelslim.FLOAT_TAG
        return msmodelslim.write_description(tags)

    @property
    def scales(self) -> dict[str, torch.dtype]:
        """The tensors beside a quantized weight, by their suffixes.

        The scales have been rounded to the checkpoint's dtype, in which compressed-tensors keeps
        them.
        """
        if self.is_compressed_tensors:
            return {"weight_scale": self.source.dtype}
        return {"weight_scale": torch.float32, "weight_offset": torch.float32}

    def _is_quantized(self, name: str) -> bool:
        return _linear(name) in self.chosen and split_name(name)[1] == "weight"

    def tensors(self, name: str) -> Tensors:
        """What the tensor `name` of the source becomes."""
        shape = self.source.checkpoint.shapes[name]
        if not self._is_quantized(name):
            return {name: (self.source.checkpoint.dtypes[name], shape)}
        owner, rows = split_name(name)[0], (shape[0], 1)
        scales: Tensors = {f"{owner}.{part}": (kind, rows) for part, kind in self.scales.items()}
        return {name: (torch.int8, shape), **scales}

    def convert(self, name: str) -> Iterator[Tensor]:
        """The values of `tensors`, in order."""
        value, linear = self.source.read_finite(name), _linear(name)
        if not self._is_quantized(name):
            if linear in self.source.layout.formats and split_name(name)[1] == "weight":
                self.report(_describe(linear, value, None))
            yield value
            return
        quantized = quantize_rows(value, self.source.dtype)
        self.report(_describe(linear, value, quantized))
        yield quantized.values
        scale = quantized.scale.unsqueeze(1)
        values = {"weight_scale": scale, "weight_offset": torch.zeros_like(scale)}
        for part, dtype in self.scales.items():
            yield values[part].to(dtype)


def dequantize_checkpoint(input_path: Path, output_path: Path, part_bytes: int = 0) -> Outcome:
    """Write the float checkpoint that a quantized one stands for, in config.json's dtype.

    Args:
        input_path: a quantized checkpoint, not cut.
        output_path: the folder to make; an earlier result of this function is replaced.
        part_bytes: most bytes of a file; 0: one file.

    Raises:
        ValueError, OSError, RuntimeError: as `quantize_checkpoint`.
    """
    source = _Source.open(input_path)
    formats = source.layout.formats
    if not scheme_of(formats):
        raise CheckpointError(f"{input_path} is not quantized; there is nothing to make floats of")
    quantized = {linear for linear, found in formats.items() if found.scheme}
    groups: list[Tensors] = []
    for name in source.stored:
        dtype, shape = source.checkpoint.dtypes[name], source.checkpoint.shapes[name]
        if dtype == torch.int8:
            groups.append({name: (source.dtype, shape)})
        elif _linear(name) not in quantized or split_name(name)[1] == "bias":
            groups.append({name: (dtype, shape)})

    def convert(name: str) -> Iterator[Tensor]:
        if source.checkpoint.dtypes[name] != torch.int8:
            yield source.checkpoint.read(name)
            return
        linear, owner = _linear(name), split_name(name)[0]
        stored = {
            t.suffix: source.checkpoint.read(f"{owner}.{t.suffix}") for t in formats[linear].tensors
        }
        try:
            weight = formats[linear].load(stored, torch.device("cpu"), source.dtype)
        except ValueError as error:
            raise CheckpointError(f"{input_path}: {linear}: {error}") from error
        assert isinstance(weight, Int8Weight)
        yield dequantize(weight, source.dtype)

    dropped = ("transformers_weights", "quantize", "quantization_config")
    config = {key: value for key, value in source.config.items() if key not in dropped}
    with _result(source, output_path, "dequantize", config) as folder:
        for path in msmodelslim.descriptions(folder):
            path.unlink()
        return _write(source, folder, PART_FILE, groups, convert, part_bytes)


# -- the source ----------------------------------------------------------------------------------


def _linear(stored: str) -> str:
    """The linear layer or other module that a stored tensor belongs to."""
    return split_name(parameter_name(stored))[0]


@dataclass(frozen=True)
class _Source:
    """The checkpoint that is read."""

    path: Path
    checkpoint: Checkpoint
    layout: Layout
    config: Mapping[str, Any]  # config.json
    dtype: torch.dtype  # that it names
    is_tied: bool

    @classmethod
    def open(cls, path: Path) -> _Source:
        """Find and check the files.

        Raises:
            ValueError, OSError: see `find_layout`; or the files are a part of a cut.
        """
        model_config = ModelConfig.from_pretrained(path)
        checkpoint = Checkpoint(path)
        layout = find_layout(checkpoint, model_config)
        if layout.num_parts > 1:
            raise CheckpointError(
                f"{path} is a part of a cut; give the uncut checkpoint, and cut the result"
            )
        dtype = getattr(torch, model_config.dtype)
        is_tied = model_config.tie_word_embeddings
        return cls(path, checkpoint, layout, read_json(path / "config.json"), dtype, is_tied)

    @property
    def stored(self) -> list[str]:
        """The tensors that the model reads, in the order of the files."""
        read = set(self.layout.names.values())
        return [name for name in self.checkpoint.shapes if name in read]

    def read_finite(self, name: str) -> Tensor:
        """A tensor, all of whose values are finite.

        Raises:
            CheckpointError: they are not.
        """
        value = self.checkpoint.read(name)
        if value.dtype in FLOATS and not torch.isfinite(value).all():
            raise CheckpointError(
                f"{self.path}: {name} holds values that are not finite, which no scale can be "
                "chosen for; the checkpoint is damaged"
            )
        return value


def _choose(source: _Source, options: QuantizeOptions) -> set[str]:
    """The linear layers to quantize.

    Raises:
        ValueError: a name of --disable_names is none of a layer, or no layer is left.
    """
    layers = list(source.layout.formats)
    names = source.layout.names
    shares_embedding = source.is_tied or names[HEAD_NAME] == names[EMBEDDING_NAME]
    disabled = {HEAD} if options.disable_last_linear or shares_embedding else set()
    if shares_embedding and not options.disable_last_linear:
        raise CheckpointError(
            f"{source.path} ties the head to the input embedding, which stays float; leave out "
            "--disable_last_linear False"
        )
    for pattern in options.disable_names:
        wanted = HEAD if pattern == "lm_head" else pattern
        found = {name for name in layers if fnmatchcase(name, wanted)}
        if not found:
            raise ValueError(
                f"--disable_names: no linear layer is called {pattern!r}; they are called as "
                f"{layers[0]}, and * stands for any part of a name"
            )
        disabled |= found
    chosen = set(layers) - disabled
    if not chosen:
        raise ValueError("--disable_names leaves no layer to quantize")
    return chosen


def _describe(linear: str, weight: Tensor, quantized: Int8Weight | None) -> LinearReport:
    error = relative_error(weight, quantized) if quantized else 0.0
    lowest, highest = (x.item() for x in weight.aminmax())
    return LinearReport(linear, "w8a16" if quantized else "float", lowest, highest, error)


# -- the result ----------------------------------------------------------------------------------


def _kind(task: str) -> Kind:
    """A result of the task "quantize" or "dequantize"."""

    def own_files(seal: Path) -> Iterable[str] | None:
        manifest = read_json(seal)
        return set(manifest["files"]) if manifest["task"] == task else None

    what = "quantized checkpoint" if task == "quantize" else "dequantized checkpoint"
    return Kind(what, QUANTIZATION_MANIFEST, own_files)


@contextmanager
def _result(
    source: _Source, output_path: Path, task: str, config: Mapping[str, Any]
) -> Iterator[Path]:
    """The folder to fill with weights; it gets everything else, and is checked and sealed."""
    files = [file.path for file in source.checkpoint.files]
    target = find_target(output_path, source.path, files)
    if contains(source.path, target):
        raise ValueError(f"{output_path} lies in {source.path}, which is read; name another folder")
    kind = _kind(task)
    check_free(target, kind, replace=True)
    with filling(target, kind, replace=True) as folder:
        copy_side_files(source.path, folder)
        write_json(folder / "config.json", config)
        yield folder
        source.checkpoint.close()
        written = ModelConfig.from_pretrained(folder)
        scheme = scheme_of(check_weights(folder, written, 1))
        manifest = {
            "task": task,
            "quantization": scheme,
            "version": __version__,
            "source_path": str(source.path.resolve()),
            "source": {path.name: fingerprint(path) for path in files},
            "files": sorted(names_below(folder)),
        }
        write_json(folder / QUANTIZATION_MANIFEST, manifest)


def _write(
    source: _Source,
    folder: Path,
    stem: str,
    groups: list[Tensors],
    convert: Callable[[str], Iterator[Tensor]],
    part_bytes: int,
) -> Outcome:
    """Write the tensors of each group, which `convert` makes of the group's first name.

    A group is never shared by two files.
    """
    shards = _split(groups, part_bytes)
    sizes = [num_bytes(*entry) for group in groups for entry in group.values()]
    check_space(folder, sum(sizes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = stem
        if len(shards) > 1:
            name = f"{stem.removesuffix('.safetensors')}-{number:05}-of-{len(shards):05}"
            name += ".safetensors"
        tensors = {key: entry for group in shard for key, entry in group.items()}
        writer = SafetensorsWriter(folder / name, tensors, {"format": "pt"})
        for group in shard:
            first = next(iter(group))
            for key, value in zip(group, convert(first), strict=True):
                writer.write(key, value)
        writer.close()
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        write_json(folder / f"{stem}.index.json", index)
    checkpoint = source.checkpoint
    before = sum(num_bytes(checkpoint.dtypes[n], checkpoint.shapes[n]) for n in source.stored)
    left_out = sorted(checkpoint.shapes.keys() - set(source.stored))
    if left_out:
        logger.info("left out, as the model does not read it: %s", listed(left_out, 5))
    return Outcome(before, sum(sizes), left_out)


def _split(groups: list[Tensors], part_bytes: int) -> list[list[Tensors]]:
    """Groups for each file, in order; a file has at least one."""
    shards: list[list[Tensors]] = [[]]
    used = 0
    for group in groups:
        size = sum(num_bytes(*entry) for entry in group.values())
        if part_bytes and shards[-1] and used + size > part_bytes:
            shards.append([])
            used = 0
        shards[-1].append(group)
        used += size
    return shards
