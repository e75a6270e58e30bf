# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of bitsandbytes, of eight bits, and of four in the types nf4 and fp4.

config.json's `quantization_config` has load_in_8bit or load_in_4bit. A linear layer has

    eight bits    weight int8 [N, K], SCB float32 [N], weight_format uint8 (0, rows as they are);
                  a weight is weight * SCB / 127
    four bits     weight uint8 [N K / 2, 1], the first of two values in the high half;
                  weight.absmax, of blocks of values, weight.quant_map float32 [16], and
                  weight.quant_state.bitsandbytes__nf4 (or fp4), JSON as bytes.
                  Nested: absmax is uint8, an index of weight.nested_quant_map float32 [256] times
                  weight.nested_absmax, of blocks, and the JSON has nested_offset, which is added

Eight bits are computed with as they are, four are widened when they are loaded.

Source: bitsandbytes, functional.py, `QuantState`; nn/modules.py, `Linear8bitLt`; transformers,
quantizers/quantizer_bnb_4bit.py.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gptneox.devices.operators import LinearWeight
from gptneox.weights.files import CheckpointError
from gptneox.weights.formats import (
    FLOATS,
    FloatWeight,
    Formats,
    Int8Weight,
    StoredTensor,
    WeightFormat,
)
from gptneox.weights.readers.stored import Reader, Stored

logger = logging.getLogger(__name__)

METHOD = "bitsandbytes"
_BYTES = (torch.uint8,)


class BnbInt8(WeightFormat):
    """Rows of eight bits; see the module."""

    scheme = "w8a16"
    tensors: tuple[StoredTensor, ...] = (
        StoredTensor("weight", (0, 1), (torch.int8,)),
        StoredTensor("SCB", (0, None), FLOATS),
        StoredTensor("weight_format", (None, None), _BYTES),
    )

    def shapes(self, num_outputs: int, num_inputs: int) -> dict[str, tuple[int, ...]]:
        """See the module."""
        return {"weight": (num_outputs, num_inputs), "SCB": (num_outputs,), "weight_format": ()}

    def num_bytes(self, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> int:
        """A byte for each value, an fp32 scale for each row."""
        return num_outputs * (num_inputs + 4)

    def load(
        self, stored: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> Int8Weight:
        """See `WeightFormat`."""
        if stored["weight_format"].any():
            raise ValueError("weight_format is not 0: its rows are rearranged for one GPU")
        scale = stored["SCB"].float() * (1 / 127)
        if not torch.isfinite(scale).all():
            raise ValueError("SCB holds values that are not finite")
        return Int8Weight(stored["weight"].to(device), scale.to(device), dtype)


class BnbFourBits(WeightFormat):
    """Blocks of four bits; see the module."""

    def __init__(self, kind: str, *, is_nested: bool, sizes: tuple[int, int, int]) -> None:
        """Take what is known of the stored tensors.

        Args:
            kind: "nf4" or "fp4".
            is_nested: the blocks' scales are quantized, too.
            sizes: of absmax, nested_absmax and the JSON.
        """
        self.scheme, self.sizes = kind, sizes
        state = f"weight.quant_state.bitsandbytes__{kind}"
        names = [("weight", _BYTES), ("weight.absmax", _BYTES if is_nested else FLOATS)]
        names += [("weight.quant_map", FLOATS), (state, _BYTES)]
        if is_nested:
            names += [("weight.nested_absmax", FLOATS), ("weight.nested_quant_map", FLOATS)]
        self.state = state
        self.tensors = tuple(StoredTensor(name, (None, None), dtypes) for name, dtypes in names)

    def shapes(self, num_outputs: int, num_inputs: int) -> dict[str, tuple[int, ...]]:
        """See the module."""
        shapes: dict[str, tuple[int, ...]] = {
            "weight": (math.ceil(num_outputs * num_inputs / 2), 1),
            "weight.absmax": self.sizes[:1],
            "weight.nested_absmax": self.sizes[1:2],
            "weight.quant_map": (16,),
            "weight.nested_quant_map": (256,),
            self.state: self.sizes[2:],
        }
        return {tensor.suffix: shapes[tensor.suffix] for tensor in self.tensors}

    def num_bytes(self, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> int:
        """As floats."""
        return num_outputs * num_inputs * dtype.itemsize

    def why_not_cut(self, axis: int, num_outputs: int, num_inputs: int, world_size: int) -> str:
        """See `WeightFormat`."""
        return f"blocks of {self.scheme} are not kept by rows"

    def load(
        self, stored: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> LinearWeight:
        """See `WeightFormat`."""
        state = json.loads(bytes(stored[self.state].tolist()))
        absmax = stored["weight.absmax"]
        if "weight.nested_absmax" in stored:
            table, outer = stored["weight.nested_quant_map"], stored["weight.nested_absmax"]
            scales = _scale(table[absmax.long()], outer, state["nested_blocksize"])
            absmax = scales + state["nested_offset"]
        packed = stored["weight"].view(-1)
        pairs = torch.stack((packed >> 4, packed & 15), 1).view(-1)
        wide = _scale(stored["weight.quant_map"][pairs.long()], absmax.float(), state["blocksize"])
        rows, columns = state["shape"]
        wide = wide[: rows * columns].view(rows, columns)
        if not torch.isfinite(wide).all():
            raise ValueError("weight.absmax holds values that are not finite")
        return FloatWeight(wide.to(device=device, dtype=dtype))


def _scale(values: Tensor, scales: Tensor, size: int) -> Tensor:
    """Blocks of `size` values, each times its scale."""
    missing = -len(values) % size
    padded = torch.cat((values, values.new_zeros(missing))) if missing else values
    return (padded.view(-1, size) * scales.unsqueeze(1)).view(-1)[: len(values)]


class BitsAndBytesReader(Reader):
    """Serves what is stored of it."""

    def describes(self, stored: Stored) -> bool:
        """By config.json."""
        settings = stored.config.get("quantization_config")
        return isinstance(settings, dict) and settings.get("quant_method") == METHOD

    def formats(self, stored: Stored) -> Formats:
        """See `Reader`."""
        formats = {
            linear: _find(stored, linear) or by_name for linear, by_name in stored.formats.items()
        }
        schemes = {f.scheme for f in formats.values() if f.scheme}
        if not schemes:
            raise CheckpointError(
                f"{stored.path / 'config.json'} asks for {METHOD}, but the weights are float; "
                "remove quantization_config"
            )
        if widened := sorted(schemes - {BnbInt8.scheme}):
            logger.info("%s: %s is computed with as floats", stored.path, ", ".join(widened))
        return formats


def _find(stored: Stored, linear: str) -> WeightFormat | None:
    """The format of a layer's tensors; None for a float layer."""
    names = stored.names
    if f"{linear}.SCB" in names:
        return BnbInt8()
    for kind in ("nf4", "fp4"):
        state = f"{linear}.weight.quant_state.bitsandbytes__{kind}"
        if state not in names:
            continue
        is_nested = f"{linear}.weight.nested_absmax" in names
        parts = (f"{linear}.weight.absmax", f"{linear}.weight.nested_absmax", state)
        sizes = [math.prod(stored.shapes[names[n]]) if n in names else 0 for n in parts]
        return BnbFourBits(kind, is_nested=is_nested, sizes=(sizes[0], sizes[1], sizes[2]))
    return None


READER = BitsAndBytesReader()
