# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of llm-compressor and others in the form compressed-tensors, int-quantized.

config.json's `quantization_config` has groups of layers and what is ignored. Of weights, eight
bits with one scale for each output (strategy channel, symmetric) are served, without quantized
activations: `weight` int8 [N, K] and `weight_scale` [N, 1].

Source: compressed-tensors, QuantizationConfig and its compressor naive_quantized.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from gptneox.weights.files import CheckpointError
from gptneox.weights.formats import INT8_ROWS, Formats
from gptneox.weights.readers.stored import Reader, Stored

METHOD = "compressed-tensors"
FORMATS = ("int-quantized", "naive-quantized")
# The head has two names in configurations; its tensors have one here.
_OTHER_NAMES = {"embed_out": "lm_head"}
_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "num_bits": (8,),
    "type": ("int",),
    "symmetric": (True,),
    "strategy": ("channel",),
    "dynamic": (False, None),
    "group_size": (None,),
    "block_structure": (None,),
    "actorder": (None,),
}


def write_settings(ignored: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of W8A16 weights in all linear layers but the ignored ones.

    The head is named as transformers 5 names it.
    """
    return {
        "quant_method": METHOD,
        "format": FORMATS[0],
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "channel",
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
                "format": FORMATS[0],  # else the library takes bytes for packed words
            }
        },
        "ignore": [_OTHER_NAMES.get(name, name) for name in ignored],
        "kv_cache_scheme": None,
    }


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
        if (layout := settings.get("format")) not in FORMATS:
            raise CheckpointError(
                f"{where}: format {layout!r} is not served; {' and '.join(FORMATS)} are"
            )
        if settings.get("kv_cache_scheme"):
            raise CheckpointError(f"{where}: kv_cache_scheme: a quantized KV cache is not served")
        groups = settings.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise CheckpointError(f"{where} has no config_groups")
        targets: list[str] = []
        for name, group in groups.items():
            targets += _check_group(group, f"{where}: {name}")
        ignored = settings.get("ignore") or []
        for linear, weight_format in stored.formats.items():
            names = {linear, _OTHER_NAMES.get(linear, linear)}
            wanted = _matches(names, targets) and not _matches(names, ignored)
            is_stored = weight_format is INT8_ROWS
            is_shared = linear == "embed_out" and stored.names.get("embed_out.weight") not in (
                "embed_out.weight",
                "lm_head.weight",
            )
            if wanted != is_stored and not is_shared:
                states = ("float", "quantized")
                raise CheckpointError(
                    f"{where} says that {linear} is {states[wanted]}, but {stored.path} stores it "
                    f"{states[is_stored]}"
                )
        return stored.formats


def _settings(stored: Stored) -> Mapping[str, Any]:
    settings = stored.config.get("quantization_config")
    return settings if isinstance(settings, dict) else {}


def _check_group(group: Any, where: str) -> list[str]:
    """The targets of a group whose scheme is served."""
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise CheckpointError(f"{where} has no weights")
    for part in ("input_activations", "output_activations"):
        if group.get(part):
            raise CheckpointError(f"{where}: {part}: quantized activations are not served")
    for key, served in _WEIGHTS.items():
        default = {"symmetric": True, "type": "int", "num_bits": 8}.get(key)
        if (value := group["weights"].get(key, default)) not in served:
            raise CheckpointError(
                f"{where}: weights with {key} {value!r} are not served; "
                f"{' or '.join(map(repr, served))} is"
            )
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise CheckpointError(f"{where}: targets is {targets!r}; a list of names is expected")
    return targets


def _matches(names: set[str], patterns: Iterable[str]) -> bool:
    """Whether a layer is meant: by its class, its name, or an expression behind "re:"."""
    for pattern in patterns:
        if pattern == "Linear" or pattern in names:
            return True
        if pattern.startswith("re:") and any(re.match(pattern[3:], name) for name in names):
            return True
    return False


READER = CompressedTensorsReader()
