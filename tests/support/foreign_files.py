# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints of every tool: what stores their weights, and their settings."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from support import foreign


def gptq(**changes: Any) -> dict[str, Any]:
    """config.json of GPTQ."""
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    return {"quantization_config": settings | changes}


def compressed(**changes: Any) -> dict[str, Any]:
    """config.json of compressed-tensors, pack-quantized."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": 32,
        "dynamic": False,
        "actorder": None,
    }
    group = {"targets": ["Linear"], "weights": weights | changes, "input_activations": None}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }
    }


def awq(**changes: Any) -> dict[str, Any]:
    """config.json of AWQ."""
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    return {"quantization_config": settings | {"zero_point": True} | changes}


_packed = functools.partial(foreign.packed, symmetric=False)
_ordered = functools.partial(foreign.packed, symmetric=False, g_idx=True)
_even = functools.partial(foreign.packed, symmetric=True)
_v2 = functools.partial(foreign.gptq, less_one=False)
# What stores the weights, config.json, options of `foreign.coded`.
FILES: dict[str, tuple[Callable[..., dict[str, Tensor]], dict[str, Any], dict[str, Any]]] = {
    "gptq": (foreign.gptq, gptq(), {}),
    "gptq v2": (_v2, gptq(checkpoint_format="gptq_v2"), {}),
    "gptq symmetric": (foreign.gptq, gptq(sym=True), {"symmetric": True}),
    "gptq rows": (foreign.gptq, gptq(group_size=-1), {"group_size": 0}),
    "gptq desc_act": (foreign.gptq, gptq(desc_act=True), {"shuffled": True}),
    "gptq desc_act, sorted": (foreign.gptq, gptq(desc_act=True), {}),
    "gptq 8": (foreign.gptq, gptq(bits=8), {"bits": 8}),
    "gptq 8 rows": (
        foreign.gptq,
        gptq(bits=8, group_size=-1),
        {"bits": 8, "group_size": 0, "symmetric": True},
    ),
    "awq": (foreign.awq, awq(), {}),
    "awq rows": (foreign.awq, awq(group_size=-1), {"group_size": 0}),
    "modelslim": (foreign.modelslim, {"quantize": "w4a16"}, {}),
    "modelslim rows": (foreign.modelslim, {"quantize": "w4a16"}, {"group_size": 0}),
    "modelslim, a byte each": (
        functools.partial(foreign.modelslim, version=False),
        {"quantize": "w4a16"},
        {},
    ),
    "packed": (_packed, compressed(), {}),
    "packed symmetric": (_even, compressed(symmetric=True), {"symmetric": True}),
    "packed rows": (_packed, compressed(strategy="channel", group_size=None), {"group_size": 0}),
    "packed by order": (_ordered, compressed(actorder="group"), {"shuffled": True}),
    "packed 8": (_even, compressed(num_bits=8, symmetric=True), {"bits": 8, "symmetric": True}),
}


def write(
    path: Path, kind: str, config: dict[str, Any], group_size: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A checkpoint of `FILES` with another size of groups; see `foreign.write`."""
    store, settings, options = FILES[kind]
    changed = copy.deepcopy(settings)
    if found := changed.get("quantization_config"):
        if "config_groups" in found:
            found["config_groups"]["group_0"]["weights"]["group_size"] = group_size
        else:
            found["group_size"] = group_size or -1
    options = options | {"group_size": group_size}
    expected = foreign.write(path, config, store, changed, dtype, **options)
    describe(path, kind, group_size)
    return expected


def describe(path: Path, kind: str, group_size: int = 32) -> None:
    """Write the description of msmodelslim's files, and call the weights as it does."""
    if not kind.startswith("modelslim"):
        return
    tensors = load_file(path / "model.safetensors")
    scaled = {name.removesuffix("_scale") for name in tensors if name.endswith("weight_scale")}
    tags = {
        n: "W4A16" if n.partition("_scale")[0].partition("_offset")[0] in scaled else "FLOAT"
        for n in tensors
    }
    group = 0 if kind.endswith("rows") else group_size
    version = {} if kind.endswith("each") else {"version": "1.0.0"}
    described = {"model_quant_type": "W4A16", "group_size": group, **version, **tags}
    (path / "quant_model_description.json").write_text(json.dumps(described))
    (path / "model.safetensors").rename(path / "quant_model_weight_w4a16.safetensors")
