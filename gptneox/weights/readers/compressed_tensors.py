# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of llm-compressor and others in the form compressed-tensors.

config.json's `quantization_config` has groups of layers and what is ignored. Weights without
quantized activations are served, in two forms:

    int-quantized     eight bits with one scale for each output (strategy channel, symmetric):
                      `weight` int8 [N, K], `weight_scale` [N, 1]
    pack-quantized    four or eight bits, strategy channel or group (G groups of inputs), also
                      asymmetric: `weight_packed` int32 [N, K / 8] or [N, K / 4], `weight_scale`
                      [N, G], `weight_shape` [2]; asymmetric ones `weight_zero_point` int32
                      [N / 8, G] or [N / 4, G], packed along N; with actorder group
                      `weight_g_idx` int32 [K], the group of each input

Packed integers are stored plus half of their range, the lowest bits first.

Source: compressed-tensors, QuantizationConfig and its compressors naive_quantized and
pack_quantized.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptneox.weights.files import CheckpointError
from gptneox.weights.formats import (
    FLOAT,
    FLOATS,
    INT8_ROWS,
    Formats,
    StoredTensor,
    WeightFormat,
)
from gptneox.weights.groups import GroupFormat, Integers, unpack
from gptneox.weights.readers.stored import Reader, Stored

logger = logging.getLogger(__name__)

METHOD = "compressed-tensors"
INT_QUANTIZED = ("int-quantized", "naive-quantized")
PACK_QUANTIZED = "pack-quantized"
# The head has two names in configurations; its tensors have one here.
_OTHER_NAMES = {"embed_out": "lm_head"}
_DEFAULTS = {"num_bits": 8, "type": "int", "symmetric": True}
_COMMON: dict[str, tuple[Any, ...]] = {
    "type": ("int",),
    "dynamic": (False, None),
    "block_structure": (None,),
}
_HEAD_TENSORS = ("embed_out.weight", "lm_head.weight")
# What each form serves of the settings of weights.
_WEIGHTS: dict[str, dict[str, tuple[Any, ...]]] = {
    form: {
        "num_bits": (8,),
        **_COMMON,
        "symmetric": (True,),
        "strategy": ("channel",),
        "group_size": (None,),
        "actorder": (None,),
    }
    for form in INT_QUANTIZED
} | {
    PACK_QUANTIZED: {
        "num_bits": (4, 8),
        **_COMMON,
        "symmetric": (True, False),
        "strategy": ("channel", "group"),
        "actorder": (None, "weight", "static", "group", "dynamic"),
    }
}


class PackedFormat(GroupFormat):
    """Weights in the form pack-quantized; see the module."""

    def __init__(
        self, bits: int, group_size: int, *, symmetric: bool, has_order: bool = False
    ) -> None:
        """As `GroupFormat`; symmetric ones store no zeros."""
        super().__init__(bits, group_size, has_order=has_order)
        self.symmetric, self.words = symmetric, 32 // bits
        self.outputs_per_word = 1 if symmetric else self.words
        self.order_suffix = "weight_g_idx" if has_order else ""
        groups = 1 if group_size and not has_order else None  # their dimension
        self.tensors = (
            StoredTensor("weight_packed", (0, 1), (torch.int32,)),
            StoredTensor("weight_scale", (0, groups), FLOATS, per_group=True),
            StoredTensor("weight_shape", (None, None), (torch.int64, torch.int32)),
        )
        if not symmetric:
            zeros = StoredTensor("weight_zero_point", (0, groups), (torch.int32,), per_group=True)
            self.tensors = (*self.tensors, zeros)
        if has_order:
            self.tensors = (
                *self.tensors,
                StoredTensor(self.order_suffix, (None, 0), (torch.int32, torch.int64)),
            )

    def shapes(self, num_outputs: int, num_inputs: int) -> dict[str, tuple[int, ...]]:
        """See the module."""
        groups = self.num_groups(num_inputs)
        if num_outputs % self.outputs_per_word:
            raise ValueError(
                f"{num_outputs} outputs; a multiple of {self.outputs_per_word} is expected"
            )
        shapes: dict[str, tuple[int, ...]] = {
            "weight_packed": (num_outputs, num_inputs // self.words),
            "weight_scale": (num_outputs, groups),
            "weight_shape": (2,),
            "weight_zero_point": (num_outputs // self.words, groups),
            "weight_g_idx": (num_inputs,),
        }
        return {tensor.suffix: shapes[tensor.suffix] for tensor in self.tensors}

    def integers(self, stored: Mapping[str, Tensor]) -> Integers:
        """See `GroupFormat`."""
        values, scale = unpack(stored["weight_packed"], self.bits, 1), stored["weight_scale"]
        if self.symmetric:
            zero = torch.full(scale.shape, 1 << (self.bits - 1), dtype=torch.int16)
        else:
            zero = unpack(stored["weight_zero_point"], self.bits, 0).to(torch.int16)
        groups = stored["weight_g_idx"].long() if self.has_order else None
        return Integers(values, scale, zero, groups)


def write_settings(weight_format: WeightFormat, ignored: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of weights in all linear layers but the ignored ones.

    The head is named as transformers 5 names it.
    """
    weights: dict[str, Any] = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "dynamic": False,
    }
    if isinstance(weight_format, PackedFormat):
        weights |= {
            "num_bits": weight_format.bits,
            "symmetric": weight_format.symmetric,
            "strategy": "group",
            "group_size": weight_format.group_size,
        }
    form = PACK_QUANTIZED if isinstance(weight_format, PackedFormat) else INT_QUANTIZED[0]
    return {
        "quant_method": METHOD,
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
                "format": form,  # else the library takes bytes for packed words
            }
        },
        "ignore": [_OTHER_NAMES.get(name, name) for name in ignored],
        "kv_cache_scheme": None,
    }


@dataclass(frozen=True)
class _Group:
    """Layers of one scheme."""

    targets: list[str]
    weight_format: WeightFormat


class CompressedTensorsReader(Reader):
    """Serves int8 weights with a scale for each output."""

    def describes(self, stored: Stored) -> bool:
        """By config.json."""
        return _settings(stored).get("quant_method") == METHOD

    def formats(self, stored: Stored) -> Formats:
        """See `Reader`."""
        settings, where = _settings(stored), f"{stored.path / 'config.json'}, quantization_config"
        if settings.get("quantize") or stored.config.get("quantize"):
            raise CheckpointError(
                f"{stored.path / 'config.json'} names two quantizations, quantize "
                f"{stored.config.get('quantize')!r} and {METHOD}; keep the one of the weights"
            )
        if settings.get("kv_cache_scheme"):
            raise CheckpointError(f"{where}: kv_cache_scheme: a quantized KV cache is not served")
        entries = settings.get("config_groups")
        if not isinstance(entries, dict) or not entries:
            raise CheckpointError(f"{where} has no config_groups")
        groups = [
            _read_group(entry, settings.get("format"), f"{where}: {name}")
            for name, entry in entries.items()
        ]
        ignored, formats = settings.get("ignore") or [], {}
        for linear in stored.formats:
            names = {linear, _OTHER_NAMES.get(linear, linear)}
            meant = (g.weight_format for g in groups if _matches(names, g.targets))
            wanted = FLOAT if _matches(names, ignored) else next(meant, FLOAT)
            formats[linear] = _check_stored(stored, linear, wanted, where)
        if any(isinstance(f, GroupFormat) and f.is_widened for f in formats.values()):
            logger.info("%s: eight bits in groups are computed with as floats", stored.path)
        return formats


def _check_stored(stored: Stored, linear: str, wanted: WeightFormat, where: str) -> WeightFormat:
    """The format of a layer, which is stored as the settings say.

    Raises:
        CheckpointError: it is not.
    """
    by_name = stored.format_of(linear)
    found = PACK_QUANTIZED if f"{linear}.weight_packed" in stored.names else by_name.scheme
    expected = PACK_QUANTIZED if isinstance(wanted, PackedFormat) else wanted.scheme
    if found == expected:
        return wanted
    head = stored.names.get("embed_out.weight")
    if linear == "embed_out" and head is not None and head not in _HEAD_TENSORS:
        return by_name  # the embedding's
    raise CheckpointError(
        f"{where} says that {linear} is {_state(expected)}, but {stored.path} stores it "
        f"{_state(found)}"
    )


def _state(kind: str) -> str:
    states = {"": "float", PACK_QUANTIZED: "packed"}
    return states.get(kind, "quantized")


def _settings(stored: Stored) -> Mapping[str, Any]:
    settings = stored.config.get("quantization_config")
    return settings if isinstance(settings, dict) else {}


def _read_group(group: Any, form: Any, where: str) -> _Group:
    """A group of `config_groups`; `form` is that of all groups that name none.

    Raises:
        CheckpointError: its scheme is not served.
    """
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise CheckpointError(f"{where} has no weights")
    form = group.get("format") or form
    if form not in _WEIGHTS:
        raise CheckpointError(f"{where}: format {form!r} is not served; {', '.join(_WEIGHTS)} are")
    for part in ("input_activations", "output_activations"):
        if group.get(part):
            raise CheckpointError(f"{where}: {part}: quantized activations are not served")
    weights = _DEFAULTS | {k: v for k, v in group["weights"].items() if v is not None}
    for key, served in _WEIGHTS[form].items():
        if (value := weights.get(key)) not in served:
            raise CheckpointError(
                f"{where}: weights with {key} {value!r} are not served; "
                f"{' or '.join(map(repr, served))} is"
            )
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise CheckpointError(f"{where}: targets is {targets!r}; a list of names is expected")
    if form != PACK_QUANTIZED:
        return _Group(targets, INT8_ROWS)
    size = weights.get("group_size") if weights["strategy"] == "group" else 0
    if not isinstance(size, int) or (size < 1 and weights["strategy"] == "group"):
        raise CheckpointError(f"{where}: group_size is {size!r}; a number of inputs is expected")
    found = PackedFormat(
        weights["num_bits"],
        size,
        symmetric=weights["symmetric"],
        has_order=weights.get("actorder") in ("group", "dynamic"),
    )
    return _Group(targets, found)


def _matches(names: set[str], patterns: Iterable[str]) -> bool:
    """Whether a layer is meant: by its class, its name, or an expression behind "re:"."""
    for pattern in patterns:
        if pattern == "Linear" or pattern in names:
            return True
        if pattern.startswith("re:") and any(re.match(pattern[3:], name) for name in names):
            return True
    return False


READER = CompressedTensorsReader()
