# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of AutoAWQ, layout gemm, of four bits.

Settings are in config.json's `quantization_config`, or in quant_config.json. A linear layer has

    qweight    int32 [K, N / 8], packed along N, the outputs of a word in the order 0 2 4 6 1 3 5 7
    qzeros     int32 [G, N / 8], likewise
    scales     float [G, N]

A weight is scales * (qweight - qzeros). What dense_4h_to_h reads is divided by `mlp.act.scales` [F]
first, where the file has it: AWQ cannot fold that into a GELU.

Source: AutoAWQ, awq/modules/linear/gemm.py and awq/utils/packing_utils.py; transformers,
integrations/awq.py, `AWQ_SCALES_MAPPINGS`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gptneox.weights.files import CheckpointError
from gptneox.weights.formats import FLOATS, Formats, StoredTensor, WeightFormat
from gptneox.weights.groups import GroupFormat, Integers, unpack
from gptneox.weights.readers.stored import SettingsReader, Stored

METHOD = "awq"
SETTINGS_FILE = "quant_config.json"
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of the outputs of a word
_WORDS = 8  # outputs of a word
_SCALES = "act_scales"  # what load.parameter_name calls mlp.act.scales


class AwqFormat(GroupFormat):
    """See the module."""

    outputs_per_word = _WORDS

    def __init__(self, group_size: int, *, divides: bool = False) -> None:
        """As `GroupFormat`; divides: the inputs are divided first."""
        super().__init__(4, group_size)
        self.divides = divides
        groups = 0 if group_size else None  # their dimension
        self.tensors = (
            StoredTensor("qweight", (1, 0), (torch.int32,)),
            StoredTensor("qzeros", (1, groups), (torch.int32,), per_group=True),
            StoredTensor("scales", (1, groups), FLOATS, per_group=True),
        )
        if divides:
            self.tensors = (*self.tensors, StoredTensor(_SCALES, (None, 0), FLOATS))

    def shapes(self, num_outputs: int, num_inputs: int) -> dict[str, tuple[int, ...]]:
        """See the module."""
        groups = self.num_groups(num_inputs)
        if num_outputs % _WORDS:
            raise ValueError(f"{num_outputs} outputs; a multiple of {_WORDS} is expected")
        shapes: dict[str, tuple[int, ...]] = {
            "qweight": (num_inputs, num_outputs // _WORDS),
            "qzeros": (groups, num_outputs // _WORDS),
            "scales": (groups, num_outputs),
            _SCALES: (num_inputs,),
        }
        return {tensor.suffix: shapes[tensor.suffix] for tensor in self.tensors}

    def integers(self, stored: Mapping[str, Tensor]) -> Integers:
        """See `GroupFormat`."""
        values, zero = (_in_order(stored[name]).T for name in ("qweight", "qzeros"))
        divisor = stored.get(_SCALES)
        if divisor is not None and not (divisor.isfinite() & (divisor != 0)).all():
            raise ValueError("mlp.act.scales holds values that nothing can be divided by")
        return Integers(values, stored["scales"].T, zero.to(torch.int16), divisor=divisor)


def _in_order(words: Tensor) -> Tensor:
    """The integers of words [rows, N / 8], [rows, N]."""
    values = unpack(words, 4, 1)
    return values.view(len(words), -1, _WORDS)[:, :, _PLACES].flatten(1)


class AwqReader(SettingsReader):
    """Serves four bits in the layout gemm."""

    method, settings_file = METHOD, SETTINGS_FILE

    def formats(self, stored: Stored) -> Formats:
        """See `Reader`."""
        settings, where = self.settings(stored)
        bits = settings.get("bits", settings.get("w_bit"))
        if bits != 4:
            raise CheckpointError(f"{where} says bits is {bits!r}; weights of 4 bits are served")
        layout = str(settings.get("version") or "gemm").lower()
        if layout != "gemm":
            raise CheckpointError(f"{where} says version is {layout!r}; gemm is served")
        if settings.get("zero_point") is False:
            raise CheckpointError(f"{where} says zero_point is False; files with zeros are served")
        size = settings.get("group_size", settings.get("q_group_size"))
        if not isinstance(size, int) or size == 0 or size < -1:
            raise CheckpointError(f"{where} says group_size is {size!r}; a number is expected")
        formats: dict[str, WeightFormat] = {}
        for linear, by_name in stored.formats.items():
            divides = f"{linear}.{_SCALES}" in stored.names
            is_quantized = f"{linear}.qweight" in stored.names
            if divides and not is_quantized:
                raise CheckpointError(
                    f"{stored.path} has {stored.names[f'{linear}.{_SCALES}']}, but {linear} is not "
                    "quantized, which is not served"
                )
            formats[linear] = AwqFormat(max(0, size), divides=divides) if is_quantized else by_name
        if not any(isinstance(f, AwqFormat) for f in formats.values()):
            raise CheckpointError(f"{where} is of {METHOD}, but no weight is stored as qweight")
        return formats


READER = AwqReader()
