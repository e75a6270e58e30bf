# SPDX-License-Identifier: Apache-2.0
"""Quantize a checkpoint, tensor by tensor, and make floats of a quantized one again.

The weights of linear layers become integers of eight bits with one scale for each output, rounded
to nearest. W8A16 needs nothing else. With the W8A8 schemes inputs become integers, too, when the
model runs; `calibrate.py` decides with sample text how. Peak memory is a few times the largest
tensor, or with sample text that of a layer in fp32.

    quantization_manifest.json      what it was made of; written last, it seals the result
    config.json, tokenizer, …       as in the source, with the entry that names the scheme
    quant_model_weight_w8a16.safetensors, quant_model_description.json    or, of W8A16 only,
    model.safetensors               for compressed-tensors, which config.json describes
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptneox import __version__
from gptneox.config.files import read_json
from gptneox.config.model import ModelConfig
from gptneox.config.settings import COMPRESSED_TENSORS, QuantizeOptions
from gptneox.devices.operators import FoldableWeight, InputRange, LinearWeight
from gptneox.weights import calibrate
from gptneox.weights.calibrate import STATIC, W8A16, Scheme
from gptneox.weights.files import CheckpointError, listed
from gptneox.weights.formats import (
    FLOATS,
    INT8_ROWS,
    Int8Weight,
    IntegerWeight,
    scheme_of,
    split_name,
)
from gptneox.weights.groups import AdjustedWeight, Int4Weight
from gptneox.weights.load import (
    PART_FILE,
    WRAPPED,
    Checkpoint,
    Layout,
    check_weights,
    find_layout,
    parameter_name,
)
from gptneox.weights.quantize_int4 import W4A16, Int4Plan
from gptneox.weights.readers import awq, compressed_tensors, gptq, msmodelslim
from gptneox.weights.report import LinearReport, Report, Tensors
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
from gptneox.weights.size import EMBEDDING_NAME, HEAD_NAME, full_shapes

logger = logging.getLogger(__name__)

HEAD = split_name(HEAD_NAME)[0]
LARGEST = 127  # of a quantized value; -128 is left out, so that ranges are symmetric
_CHUNK = 1 << 20  # values that are widened at a time: larger pieces are new memory each time

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


def floats_of(weight: LinearWeight, dtype: torch.dtype) -> Tensor:
    """The matrix [F, K] that a loaded weight stands for, rounded once to `dtype`."""
    if isinstance(weight, AdjustedWeight):
        inner = floats_of(weight.weight, dtype)
        if (columns := weight.columns()) is not None:
            inner = inner[:, columns]
        return inner if weight.divisor is None else (inner / weight.divisor).to(dtype)
    if isinstance(weight, Int4Weight):
        return weight.dequantize(dtype)
    if isinstance(weight, Int8Weight | IntegerWeight):
        return dequantize(weight, dtype)
    assert isinstance(weight, FoldableWeight)
    return weight.floats()


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


@dataclass
class Outcome:
    """Bytes of all tensors before and after."""

    bytes_before: int = 0
    bytes_after: int = 0
    left_out: list[str] = field(default_factory=list)  # tensors that the model does not read


def quantize_checkpoint(
    input_path: Path,
    output_path: Path,
    options: QuantizeOptions,
    report: Report,
    texts: Sequence[Sequence[int]] = (),
) -> Outcome:
    """Write a quantized checkpoint.

    Args:
        input_path: a float checkpoint, not cut.
        output_path: the folder to make; an earlier result of this function is replaced.
        options: the scheme, which layers, and in which form.
        report: called for every linear layer.
        texts: token ids of sample text, for the schemes whose inputs become integers, and for
            GPTQ of weights of four bits.

    Raises:
        ValueError, FileNotFoundError: the checkpoint or an option is wrong; nothing was written.
        FileExistsError: `output_path` holds anything that this function did not write.
        RuntimeError: not enough room on the disk, or another run writes there.
    """
    source = Source.open(input_path)
    if found := scheme_of(source.layout.formats):
        raise CheckpointError(
            f"{input_path} is quantized already ({found}); give the float checkpoint"
        )
    form = options.form
    if form == COMPRESSED_TENSORS and options.quant_type not in (W8A16, W4A16):
        raise ValueError(
            f"--format {form} is written for {W8A16} and {W4A16} only; leave it out for "
            f"{options.quant_type}"
        )
    if options.num_disabled and options.quant_type in (W8A16, W4A16):
        raise ValueError(
            f"--disable_level {options.disable_level} is of the w8a8 types; name the layers that "
            f"stay float in --disable_names for {options.quant_type}"
        )
    chosen = _choose(source, options)
    plan = _plan(source, chosen, options, report, texts)
    groups = [tensors for name in plan.stored if (tensors := plan.tensors(name))]
    config = {k: v for k, v in source.config.items() if k != "transformers_weights"}
    with _result(source, output_path, "quantize", config | plan.settings()) as folder:
        if not plan.is_compressed_tensors:
            write_json(folder / msmodelslim.DESCRIPTION, plan.description(groups))
        stem = f"quant_model_weight_{options.quant_type}.safetensors"
        stem = PART_FILE if plan.is_compressed_tensors else stem
        return _write(source, folder, stem, groups, plan.convert, options.part_bytes)


def _plan(
    source: Source,
    chosen: set[str],
    options: QuantizeOptions,
    report: Report,
    texts: Sequence[Sequence[int]],
) -> _Plan | Int4Plan:
    """For the scheme that is asked for; see `quantize_checkpoint`."""
    is_compressed_tensors = options.form == COMPRESSED_TENSORS
    if options.quant_type == W4A16:
        return Int4Plan(
            source,
            chosen,
            options.group_size,
            report,
            texts,
            is_compressed_tensors=is_compressed_tensors,
        )
    scheme = Scheme(dict.fromkeys(chosen, W8A16))
    if options.quant_type != W8A16:
        wish = calibrate.Wish(
            options.quant_type,
            chosen,
            smooth=options.anti_method != "none",
            num_floats=options.num_disabled,
            dtype=source.dtype,
        )
        scheme = calibrate.calibrate(source.model, source.read, texts, wish, quantize_rows)
    return _Plan(source, scheme, options.quant_type, is_compressed_tensors, report)


@dataclass(frozen=True)
class _Plan:
    """What a quantized checkpoint consists of."""

    source: Source
    scheme: Scheme
    quant_type: str
    is_compressed_tensors: bool  # which form
    report: Report

    @property
    def stored(self) -> list[str]:
        """The tensors of the source, in the order of its files."""
        return self.source.stored

    def settings(self) -> dict[str, Any]:
        """For config.json."""
        if not self.is_compressed_tensors:
            return {"quantize": self.quant_type}
        ignored = [n for n in self.source.layout.formats if n not in self.scheme.linears]
        return {"quantization_config": compressed_tensors.write_settings(INT8_ROWS, ignored)}

    def description(self, groups: list[Tensors]) -> dict[str, Any]:
        """The file that tags every tensor."""
        tags = {}
        for name in (name for group in groups for name in group):
            scheme = self.scheme.linears.get(_linear(name))
            tags[name] = scheme.upper() if scheme else msmodelslim.FLOAT_TAG
        return msmodelslim.write_description(self.quant_type.upper(), tags)

    def _beside(self, linear: str, rows: int) -> Tensors:
        """The tensors beside a quantized weight, by their suffixes.

        The scales of weights have been rounded to the checkpoint's dtype, in which
        compressed-tensors keeps them. Of static inputs, that of products has a type of its own for
        models of fp16.
        """
        if self.is_compressed_tensors:
            return {"weight_scale": (self.source.dtype, (rows, 1))}
        if self.scheme.linears[linear] == STATIC:
            is_fp16 = self.source.dtype == torch.float16
            return {
                "input_scale": (torch.float32, (1,)),
                "input_offset": (torch.float32, (1,)),
                "quant_bias": (torch.int32, (rows,)),
                "deq_scale": (torch.int64 if is_fp16 else torch.float32, (rows,)),
            }
        return dict.fromkeys(("weight_scale", "weight_offset"), (torch.float32, (rows, 1)))

    def tensors(self, name: str) -> Tensors:
        """What the tensor `name` of the source becomes; nothing where another holds it."""
        shape, linear = self.source.checkpoint.shapes[name], _linear(name)
        owner, suffix = split_name(name)
        scheme = self.scheme.linears.get(linear)
        if scheme is None or suffix != "weight":
            if scheme == STATIC:
                return {}
            return {name: (self.source.checkpoint.dtypes[name], shape)}
        beside = self._beside(linear, shape[0])
        return {name: (torch.int8, shape)} | {f"{owner}.{k}": v for k, v in beside.items()}

    def convert(self, name: str) -> Iterator[Tensor]:
        """The values of `tensors`, in order."""
        linear, suffix = _linear(name), split_name(name)[1]
        value = self._rewritten(name)
        is_weight = linear in self.source.layout.formats and suffix == "weight"
        scheme = self.scheme.linears.get(linear)
        if not is_weight or scheme is None:
            if is_weight:
                self.report(self._describe(linear, value, None))
            yield value.to(self.source.checkpoint.dtypes[name])
            return
        quantized = quantize_rows(value, self.source.dtype)
        self.report(self._describe(linear, value, quantized))
        yield quantized.values
        rows, scale = len(value), quantized.scale.unsqueeze(1)
        values = {"weight_scale": scale, "weight_offset": torch.zeros_like(scale)}
        if scheme == STATIC:
            bias_name = self.source.layout.names.get(f"{linear}.bias")
            bias = None if bias_name is None else self._rewritten(bias_name)
            values = _static(quantized, bias, self.scheme.ranges[linear], linear)
        for part, (dtype, shape) in self._beside(linear, rows).items():
            found = values[part]
            if dtype == torch.int64:
                found = found.view(torch.int32)
            yield found.to(dtype).view(shape)

    def _rewritten(self, name: str) -> Tensor:
        """A tensor of the source, as the normalisations' rewriting changes it."""
        value, (owner, suffix) = self.source.read_finite(name), split_name(parameter_name(name))
        if owner in self.scheme.norms:
            scale, shift = self.scheme.norms[owner]
            return scale if suffix == "weight" else shift
        if suffix == "weight" and owner in self.scheme.columns:
            return value.float() * self.scheme.columns[owner]
        if suffix == "bias" and owner in self.scheme.added:
            return value.float() + self.scheme.added[owner]
        return value

    def _describe(self, linear: str, weight: Tensor, quantized: Int8Weight | None) -> LinearReport:
        error = relative_error(weight, quantized) if quantized else 0.0
        lowest, highest = (x.item() for x in weight.aminmax())
        scheme = self.scheme.linears.get(linear, "float")
        output_error = self.scheme.errors.get(linear, 0.0)
        if scheme == W8A16:
            output_error = self.scheme.weight_errors.get(linear, 0.0)
        return LinearReport(
            linear, scheme, lowest, highest, error, output_error if quantized else 0.0
        )


def _static(
    weight: Int8Weight, bias: Tensor | None, inputs: InputRange, linear: str
) -> dict[str, Tensor]:
    """The tensors beside a weight whose inputs become integers by `inputs`; see `Int8Static`.

    Raises:
        CheckpointError: the bias does not fit the integers.
    """
    scale = weight.scale.double() * inputs.scale
    if bias is not None:  # a row of zeros has the scale of its bias alone
        is_empty = ~weight.values.any(1) & (bias != 0)
        scale = torch.where(is_empty, bias.double().abs() / 2**20, scale)
    start = -inputs.offset * weight.values.sum(1, dtype=torch.int64).double()
    if bias is not None:
        start += bias.double() / scale
    largest = 128 * weight.values.abs().sum(1, dtype=torch.int64)  # that is added to it
    if (start.abs() + largest).max() >= 2**31 - 1:
        raise CheckpointError(
            f"{linear}: a bias is too large for integers beside its small weights; name the layer "
            "in --disable_names"
        )
    return {
        "input_scale": torch.tensor([inputs.scale]),
        "input_offset": torch.tensor([float(inputs.offset)]),
        "quant_bias": start.round(),
        "deq_scale": scale.float(),
    }


def dequantize_checkpoint(input_path: Path, output_path: Path, part_bytes: int = 0) -> Outcome:
    """Write the float checkpoint that a quantized one stands for, in config.json's dtype.

    Args:
        input_path: a quantized checkpoint, not cut.
        output_path: the folder to make; an earlier result of this function is replaced.
        part_bytes: most bytes of a file; 0: one file.

    Raises:
        ValueError, OSError, RuntimeError: as `quantize_checkpoint`.
    """
    source = Source.open(input_path)
    formats, names = source.layout.formats, source.layout.names
    if not scheme_of(formats):
        raise CheckpointError(f"{input_path} is not quantized; there is nothing to make floats of")
    groups = [g for name in source.stored if (g := _float_tensors(source, name))]

    def convert(name: str) -> Iterator[Tensor]:
        linear = _linear(name)
        if not _is_integers(source, name):
            yield source.checkpoint.read(names[parameter_name(name)])
            return
        stored = {
            t.suffix: source.checkpoint.read(names[f"{linear}.{t.suffix}"])
            for t in formats[linear].tensors
        }
        try:
            weight = formats[linear].load(stored, torch.device("cpu"), source.dtype)
        except ValueError as error:
            raise CheckpointError(f"{input_path}: {linear}: {error}") from error
        yield from _floats(weight, source, linear)

    dropped = ("transformers_weights", "quantize", "quantization_config")
    config = {key: value for key, value in source.config.items() if key not in dropped}
    with _result(source, output_path, "dequantize", config) as folder:
        settings = [folder / reader.SETTINGS_FILE for reader in (gptq, awq)]
        for path in (*msmodelslim.descriptions(folder), *settings):
            path.unlink(missing_ok=True)
        return _write(source, folder, PART_FILE, groups, convert, part_bytes)


def _is_integers(source: Source, name: str) -> bool:
    """Whether a stored tensor is the weight of a quantized layer."""
    is_quantized = _linear(name) in source.layout.formats
    is_quantized = is_quantized and bool(source.layout.formats[_linear(name)].scheme)
    return is_quantized and split_name(name)[1] == "weight"


def _float_tensors(source: Source, name: str) -> Tensors:
    """What the tensor `name` of a quantized checkpoint becomes; nothing where another holds it."""
    dtype, shape = source.checkpoint.dtypes[name], source.checkpoint.shapes[name]
    linear, (owner, suffix) = _linear(name), split_name(name)
    found = source.layout.formats.get(linear)
    if found is None or not found.scheme or (suffix == "bias" and not found.has_bias):
        return {name.replace(WRAPPED, "norm."): (dtype, shape)}  # as transformers calls it
    if suffix != found.tensors[0].suffix:
        return {}
    whole = full_shapes(source.model)[f"{linear}.weight"]
    bias: Tensors = {}
    if found.has_bias and source.model.has_bias(linear):
        bias = {f"{owner}.bias": (source.dtype, whole[:1])}
    return {f"{owner}.weight": (source.dtype, whole)} | bias


def _floats(weight: LinearWeight, source: Source, linear: str) -> Iterator[Tensor]:
    """The values of `_float_tensors` of a weight."""
    inputs = weight.inputs if isinstance(weight, IntegerWeight) else None
    if inputs is None:
        yield floats_of(weight, source.dtype)
        return
    assert isinstance(weight, IntegerWeight)
    assert weight.start is not None
    yield dequantize(replace(weight, scale=weight.scale / inputs.scale), source.dtype)
    if source.model.has_bias(linear):
        added = weight.start + inputs.offset * weight.values.sum(1, dtype=torch.int64)
        yield (added.double() * weight.scale.double()).to(source.dtype)


# -- the source ----------------------------------------------------------------------------------


def _linear(stored: str) -> str:
    """The linear layer or other module that a stored tensor belongs to."""
    return split_name(parameter_name(stored))[0]


@dataclass(frozen=True)
class Source:
    """The checkpoint that is read."""

    path: Path
    checkpoint: Checkpoint
    layout: Layout
    model: ModelConfig
    config: Mapping[str, Any]  # config.json
    dtype: torch.dtype  # that it names

    @classmethod
    def open(cls, path: Path) -> Source:
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
        raw = read_json(path / "config.json")
        return cls(path, checkpoint, layout, model_config, raw, dtype)

    @property
    def stored(self) -> list[str]:
        """The tensors that the model reads, in the order of the files."""
        read = set(self.layout.names.values())
        return [name for name in self.checkpoint.shapes if name in read]

    def read(self, parameter: str) -> Tensor:
        """A parameter, as `read_finite`."""
        return self.read_finite(self.layout.names[parameter])

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


def _choose(source: Source, options: QuantizeOptions) -> set[str]:
    """The linear layers to quantize.

    Raises:
        ValueError: a name of --disable_names is none of a layer, or no layer is left.
    """
    layers = list(source.layout.formats)
    names = source.layout.names
    shares_embedding = source.model.tie_word_embeddings or names[HEAD_NAME] == names[EMBEDDING_NAME]
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
    source: Source, output_path: Path, task: str, config: Mapping[str, Any]
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
    source: Source,
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
