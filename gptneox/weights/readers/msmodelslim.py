# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of msmodelslim, "ascendV1": a description beside the weights tags every tensor.

    quant_model_description.json    {"model_quant_type": "W8A8", "version": "1.0.0",
                                     "<tensor>": "W8A8", "W8A8_DYNAMIC", "W8A16" or "FLOAT", …}
    quant_model_weight_w8a8.safetensors    or quant_model_weights.safetensors, or shards
    config.json                     "quantize": "w8a8", in the form that MindIE reads

A tag stands for the tensors of a linear layer:

    W8A16, W8A8_DYNAMIC    weight int8 [N, K], weight_scale and weight_offset [N, 1]
    W8A8, W8A8S            weight int8 [N, K], input_scale and input_offset [1], quant_bias and
                           deq_scale [N]; W8A8S says that few of the weight's values differ
    W4A16                  weight_scale and weight_offset [N, G] for groups of `group_size` inputs;
                           integers from -8 to 7, in version 1.0.0 two to a byte: weight int8
                           [N / 2, K], the even row in the low half, or with one scale for a row
                           [N, K / 2], the even input in the low half; before a byte for each

Older files carry the scheme in the description's name too, and wrap the normalisations that they
smoothed (`….module.weight`).

Source: msmodelslim, pytorch/llm_ptq; MindIE-LLM, atb_llm/utils/quantize.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptneox.config.files import read_json
from gptneox.weights.files import IGNORED_SUFFIXES, CheckpointError, listed
from gptneox.weights.formats import (
    FLOATS,
    INT8_DYNAMIC,
    INT8_ROWS_WITH_OFFSET,
    INT8_STATIC,
    Formats,
    StoredTensor,
)
from gptneox.weights.groups import GroupFormat, Integers, unpack
from gptneox.weights.readers.stored import Reader, Stored

DESCRIPTION = "quant_model_description.json"
W8A16, W4A16, FLOAT_TAG = "W8A16", "W4A16", "FLOAT"
W8A8, W8A8_DYNAMIC, W8A8S = "W8A8", "W8A8_DYNAMIC", "W8A8S"
QUANTIZED_TAGS = (W8A16, W8A8, W8A8_DYNAMIC, W8A8S, W4A16)
_SERVED = f"{', '.join(QUANTIZED_TAGS)} and {FLOAT_TAG} are"
VERSION = "1.0.0"  # that packs weights of four bits
# Why a scheme is not served; others are just not known.
_REASONS = {
    "W8A8SC": ", whose weights a tool of CANN compressed for one chip; quantize again as W8A8S",
    "W8A8_MIX": ", which changes its scheme while it runs; quantize again as W8A8 or W8A8_DYNAMIC",
}
# Entries of a description that are not tensors; each but these must have a dot in its name.
_REFUSED = {
    "kv_quant_type": "a quantized KV cache",
    "kv_cache_type": "a quantized KV cache",
    "fa_quant_type": "quantized attention",
    "reduce_quant_type": "scales for each card (--tp_size)",
}


def descriptions(path: Path) -> list[Path]:
    """The description files of a directory."""
    return sorted(path.glob("quant_model_description*.json"))


def write_description(scheme: str, tags: Mapping[str, str], group_size: int = 0) -> dict[str, Any]:
    """The description of a scheme's weights, from the tag of every stored tensor.

    Args:
        scheme: one of `QUANTIZED_TAGS`.
        tags: by the names of the tensors.
        group_size: inputs that share a scale; 0: all of a row.
    """
    return {"model_quant_type": scheme, "version": VERSION, "group_size": group_size, **tags}


class AscendInt4Format(GroupFormat):
    """Weights with the tag W4A16; see the module."""

    def __init__(self, group_size: int, *, is_packed: bool = True) -> None:
        """As `GroupFormat`; packed ones have two values in a byte."""
        super().__init__(4, group_size)
        self.is_packed = is_packed
        self.outputs_per_word = 2 if is_packed and group_size else 1
        groups = 1 if group_size else None  # their dimension
        self.tensors = (
            StoredTensor("weight", (0, 1), (torch.int8,)),
            StoredTensor("weight_scale", (0, groups), FLOATS, per_group=True),
            StoredTensor("weight_offset", (0, groups), FLOATS, per_group=True),
        )

    def shapes(self, num_outputs: int, num_inputs: int) -> dict[str, tuple[int, ...]]:
        """See the module."""
        groups = self.num_groups(num_inputs)
        if num_outputs % self.outputs_per_word:
            raise ValueError(f"{num_outputs} outputs; an even number is expected")
        weight = (num_outputs // self.outputs_per_word, num_inputs)
        if self.is_packed and not self.group_size:
            weight = (num_outputs, num_inputs // 2)
        scales = (num_outputs, groups)
        return {"weight": weight, "weight_scale": scales, "weight_offset": scales}

    def integers(self, stored: Mapping[str, Tensor]) -> Integers:
        """See `GroupFormat`."""
        values, offset = stored["weight"], stored["weight_offset"]
        if self.is_packed:  # four bits of two's complement
            values = unpack(values.view(torch.uint8), 4, 0 if self.group_size else 1) ^ 8
        elif values.min() < -8 or values.max() > 7:
            raise ValueError("weight holds values outside -8 to 7")
        else:
            values = (values + 8).view(torch.uint8)
        if not torch.equal(offset, offset.round()):
            raise ValueError("weight_offset holds values that are not integers")
        return Integers(values, stored["weight_scale"], (offset.float() + 8).to(torch.int16))


class MsModelSlimReader(Reader):
    """Serves weights of eight bits, with inputs as floats or integers, mixed with float layers."""

    def describes(self, stored: Stored) -> bool:
        """A description that is not of floats alone, or a scheme of the tool in config.json.

        Settings that name another method are its reader's.
        """
        settings = stored.config.get("quantization_config")
        has_method = isinstance(settings, dict) and "quant_method" in settings
        scheme = str(stored.config.get("quantize") or "").upper()
        if not has_method and scheme in (*QUANTIZED_TAGS, *_REASONS):
            return True
        return any(
            read_json(file).get("model_quant_type") != FLOAT_TAG
            for file in descriptions(stored.path)
        )

    def formats(self, stored: Stored) -> Formats:
        """See `Reader`."""
        files = descriptions(stored.path)
        if len(files) != 1:
            found = listed([file.name for file in files]) or "none"
            scheme = stored.config.get("quantize") or "config.json does not say how"
            raise CheckpointError(
                f"{stored.path} is quantized ({scheme}) and needs one {DESCRIPTION}, which says "
                f"how each tensor is; found {found}"
            )
        [file] = files
        description = read_json(file)
        _check_header(description, file)
        quantize, scheme = stored.config.get("quantize"), description["model_quant_type"]
        if quantize and str(quantize).upper() != scheme:
            raise CheckpointError(
                f"{stored.path / 'config.json'} says quantize is {quantize!r}, but {file.name} "
                f"says {scheme}; one of them belongs to another checkpoint"
            )
        tags = {name: tag for name, tag in description.items() if "." in name}
        for name, tag in tags.items():
            if tag not in (*QUANTIZED_TAGS, FLOAT_TAG):
                raise CheckpointError(
                    f"{file}: {name} is {tag!r}, which is not served{_REASONS.get(tag, '')}; "
                    f"{_SERVED}"
                )
            if ".experts." in name:
                raise CheckpointError(f"{file} names {name}: GPT-NeoX models have no experts")
        _check_tensors(stored, tags, file)
        int4 = AscendInt4Format(
            description.get("group_size") or 0, is_packed=bool(description.get("version"))
        )
        by_tag = {W8A8_DYNAMIC: INT8_DYNAMIC, W4A16: int4}
        return {
            linear: by_tag.get(tags.get(stored.names.get(f"{linear}.weight", ""), ""), by_name)
            for linear, by_name in stored.formats.items()
        }


def _check_header(description: Mapping[str, Any], file: Path) -> None:
    """The entries for the model as a whole."""
    scheme = description.get("model_quant_type")
    if scheme not in QUANTIZED_TAGS:
        raise CheckpointError(
            f"{file.parent} is quantized ({scheme or 'ModelSlim'}, as {file.name} says), which is "
            f"not served{_REASONS.get(str(scheme), '')}; of msmodelslim's schemes "
            f"{', '.join(QUANTIZED_TAGS)} are"
        )
    group_size = description.get("group_size") or 0
    if not isinstance(group_size, int) or group_size < 0:
        raise CheckpointError(
            f"{file} says group_size is {group_size!r}; a number of inputs is expected"
        )
    if group_size and scheme != W4A16:
        raise CheckpointError(
            f"{file} says group_size is {group_size}; of {scheme}, one scale for each row, that is "
            "group_size 0, is served"
        )
    for key, what in _REFUSED.items():
        if value := description.get(key):
            raise CheckpointError(f"{file} says {key} is {value!r}: {what} is not served")


def _check_tensors(stored: Stored, tags: Mapping[str, str], file: Path) -> None:
    """Every tensor has a tag, every tag a tensor, and each is of its kind."""
    known = {n for n in stored.dtypes if not n.endswith(IGNORED_SUFFIXES)}
    if missing := sorted(tags.keys() - stored.dtypes.keys()):
        raise CheckpointError(f"{stored.path} lacks {listed(missing, 5)}, which {file.name} names")
    if untagged := sorted(known - tags.keys()):
        raise CheckpointError(f"{file} has no entry for {listed(untagged, 5)}")
    parameters = {tensor: name for name, tensor in stored.names.items()}
    for tensor, tag in tags.items():
        dtype = stored.dtypes[tensor]
        linear, _, part = parameters.get(tensor, tensor).rpartition(".")
        found = stored.format_of(linear)
        is_stored = found in INT8_STATIC if tag in (W8A8, W8A8S) else found is INT8_ROWS_WITH_OFFSET
        if tag == FLOAT_TAG:
            fits = dtype in FLOATS
        else:
            fits = part == "bias" or (is_stored and part in {t.suffix for t in found.tensors})
            fits = fits and (dtype == torch.int8 or part != "weight")
        if not fits:
            stated = str(dtype).removeprefix("torch.")
            beside = "input_scale, input_offset, quant_bias and deq_scale"
            if tag in (W8A16, W8A8_DYNAMIC, W4A16):
                beside = "weight_scale and weight_offset"
            raise CheckpointError(
                f"{file} says that {tensor} is {tag}, but {stored.path} stores it as {stated}"
                + ("" if is_stored or tag == FLOAT_TAG else f", without {beside}")
            )


READER = MsModelSlimReader()
