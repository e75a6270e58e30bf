# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint's safetensors with numpy alone, for environments that have no torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptneox.config.model import ModelConfig

Array = npt.NDArray[Any]
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


class Tensors:
    """Every tensor of a checkpoint by its name, widened to float32 as it is read.

    Source: the safetensors format (8 bytes header size, JSON header, contiguous data).
    """

    def __init__(self, model: Path) -> None:
        """Map the files of a checkpoint directory.

        Raises:
            FileNotFoundError: it has no safetensors.
        """
        files = sorted(model.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"no *.safetensors in {model}; only those can be converted")
        self._entries: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for path in files:
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size))
            for name, entry in header.items():
                if name != "__metadata__":
                    self._entries[name] = path, 8 + size, entry

    def __call__(self, name: str) -> Array:
        """One tensor, float32."""
        path, start, entry = self._entries[name]
        dtype = _DTYPES[entry["dtype"]]
        begin, end = entry["data_offsets"]
        count = (end - begin) // np.dtype(dtype).itemsize
        raw = np.fromfile(path, dtype, count, offset=start + begin).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""
        return tuple(self._entries[name][2]["shape"])

    def head(self) -> Array:
        """The output projection, which a tied model has not got."""
        names = ("embed_out.weight", "lm_head.weight", "gpt_neox.embed_in.weight")
        return self(next(name for name in names if name in self._entries))


def query_key_value(x: Array, config: ModelConfig) -> Array:
    """From q, k, v per head, as GPT-NeoX keeps them, to all of q, then all of k, then all of v.

    x: [H * 3 * D, C] or [H * 3 * D].
    """
    split = x.reshape(config.num_heads, 3, config.head_dim, *x.shape[1:])
    return np.ascontiguousarray(split.swapaxes(0, 1).reshape(x.shape))


def layers(config: ModelConfig) -> Iterator[tuple[int, str]]:
    """Number and prefix of every layer."""
    for i in range(config.num_layers):
        yield i, f"gpt_neox.layers.{i}."
