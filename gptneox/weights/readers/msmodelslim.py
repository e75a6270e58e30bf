# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of msmodelslim, "ascendV1": a description beside the weights tags every tensor.

    quant_model_description.json    {"model_quant_type": "W8A16", "version": "1.0.0",
                                     "<tensor>": "W8A16" or "FLOAT", …}
    quant_model_weight_w8a16.safetensors    or quant_model_weights.safetensors, or shards
    config.json                     "quantize": "w8a16", in the form that MindIE reads

A linear layer with the tag W8A16 has `weight` int8 [N, K], `weight_scale` and `weight_offset`
[N, 1]. Older files carry the scheme in the description's name too.

Source: msmodelslim, pytorch/llm_ptq; MindIE-LLM, atb_llm/utils/quantize.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gptneox.config.files import read_json
from gptneox.weights.files import IGNORED_SUFFIXES, CheckpointError, listed
from gptneox.weights.formats import FLOATS, INT8_ROWS_WITH_OFFSET
from gptneox.weights.readers.stored import Reader, Stored

DESCRIPTION = "quant_model_description.json"
W8A16, FLOAT_TAG = "W8A16", "FLOAT"
# Entries of a description that are not tensors; each but these must have a dot in its name.
_REFUSED = {
    "kv_quant_type": "a quantized KV cache",
    "kv_cache_type": "a quantized KV cache",
    "fa_quant_type": "quantized attention",
    "reduce_quant_type": "scales for each card (--tp_size)",
}
_LAST_PARTS = ("weight", "weight_scale", "weight_offset")


def descriptions(path: Path) -> list[Path]:
    """The description files of a directory."""
    return sorted(path.glob("quant_model_description*.json"))


def write_description(tags: Mapping[str, str]) -> dict[str, Any]:
    """The description of W8A16 weights, from the tag of every stored tensor."""
    return {"model_quant_type": W8A16, "version": "1.0.0", "group_size": 0, **tags}


class MsModelSlimReader(Reader):
    """Serves W8A16, mixed with float layers."""

    def describes(self, stored: Stored) -> bool:
        """A description that is not of floats alone, or W8A16 in config.json."""
        if str(stored.config.get("quantize") or "").upper() == W8A16:
            return True
        return any(
            read_json(file).get("model_quant_type") != FLOAT_TAG
            for file in descriptions(stored.path)
        )

    def check(self, stored: Stored) -> None:
        """See `Reader`."""
        files = descriptions(stored.path)
        if len(files) != 1:
            found = listed([file.name for file in files]) or "none"
            raise CheckpointError(
                f"{stored.path} needs one {DESCRIPTION}, which says how each tensor is quantized; "
                f"found {found}"
            )
        [file] = files
        description = read_json(file)
        _check_header(description, file)
        quantize = stored.config.get("quantize")
        if quantize and str(quantize).upper() != W8A16:
            raise CheckpointError(
                f"{stored.path / 'config.json'} says quantize is {quantize!r}, but {file.name} "
                f"says {W8A16}; one of them belongs to another checkpoint"
            )
        tags = {name: tag for name, tag in description.items() if "." in name}
        for name, tag in tags.items():
            if tag not in (W8A16, FLOAT_TAG):
                raise CheckpointError(
                    f"{file}: {name} is {tag!r}, which is not served; {W8A16} and {FLOAT_TAG} are"
                )
        _check_tensors(stored, tags, file)


def _check_header(description: Mapping[str, Any], file: Path) -> None:
    """The entries for the model as a whole."""
    scheme = description.get("model_quant_type")
    if scheme != W8A16:
        raise CheckpointError(
            f"{file.parent} is quantized ({scheme or 'ModelSlim'}, as {file.name} says), which is "
            f"not served; of msmodelslim's schemes {W8A16} is"
        )
    if description.get("group_size"):
        raise CheckpointError(
            f"{file} says group_size is {description['group_size']}; one scale for each row, that "
            "is group_size 0, is served"
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
        is_quantized = part in _LAST_PARTS and stored.format_of(linear) is INT8_ROWS_WITH_OFFSET
        fits = is_quantized or part == "bias" if tag == W8A16 else dtype in FLOATS
        if part == "weight" and (tag == W8A16) != (dtype == torch.int8):
            fits = False
        if not fits:
            stated = str(dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{file} says that {tensor} is {tag}, but {stored.path} stores it as {stated}"
                + ("" if is_quantized else ", without weight_scale and weight_offset")
            )


READER = MsModelSlimReader()
