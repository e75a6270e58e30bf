# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of AutoGPTQ, GPTQModel and others in the form of GPTQ, of four or eight bits.

Settings are in config.json's `quantization_config`, or in quantize_config.json. A linear layer has

    qweight    int32 [K / 8, N] (four bits) or [K / 4, N] (eight), packed along K
    qzeros     int32 [G, N / 8] or [G, N / 4], packed along N; less 1 in checkpoint_format gptq,
               as it is in gptq_v2
    scales     float [G, N]
    g_idx      int32 [K], the group of each input; sorted unless desc_act

A weight is scales * (qweight - qzeros). With desc_act it is sorted by groups when it is loaded, and
the inputs are for each product; see `groups.GroupFormat`.

Source: AutoGPTQ, nn_modules/qlinear; GPTQModel, its conversion from gptq to gptq_v2.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gptneox.weights.files import CheckpointError
from gptneox.weights.formats import FLOATS, Formats, StoredTensor, WeightFormat
from gptneox.weights.groups import GroupFormat, Integers, unpack
from gptneox.weights.readers.stored import SettingsReader, Stored

logger = logging.getLogger(__name__)

METHOD = "gptq"
SETTINGS_FILE = "quantize_config.json"
_INTEGERS = (torch.int32,)


class GptqFormat(GroupFormat):
    """See the module."""

    def __init__(
        self, bits: int, group_size: int, *, has_order: bool = False, less_one: bool = True
    ) -> None:
        """As `GroupFormat`; less_one: zeros are stored less 1."""
        super().__init__(bits, group_size, has_order=has_order)
        self.less_one = less_one
        self.outputs_per_word = 32 // bits
        self.order_suffix = "g_idx" if has_order else ""
        groups = 0 if group_size and not has_order else None  # their dimension
        self.tensors = (
            StoredTensor("qweight", (1, 0), _INTEGERS),
            StoredTensor("qzeros", (1, groups), _INTEGERS, per_group=True),
            StoredTensor("scales", (1, groups), FLOATS, per_group=True),
            StoredTensor("g_idx", (None, 0), _INTEGERS),
        )

    def shapes(self, num_outputs: int, num_inputs: int) -> dict[str, tuple[int, ...]]:
        """See the module."""
        groups, count = self.num_groups(num_inputs), self.outputs_per_word
        if num_outputs % count:
            raise ValueError(f"{num_outputs} outputs; a multiple of {count} is expected")
        return {
            "qweight": (num_inputs // count, num_outputs),
            "qzeros": (groups, num_outputs // count),
            "scales": (groups, num_outputs),
            "g_idx": (num_inputs,),
        }

    def integers(self, stored: Mapping[str, Tensor]) -> Integers:
        """See `GroupFormat`."""
        values = unpack(stored["qweight"], self.bits, 0).T  # [N, K]
        zero = unpack(stored["qzeros"], self.bits, 1).T.to(torch.int16)
        if self.less_one:
            zero = (zero + 1) & ((1 << self.bits) - 1)
        groups = stored["g_idx"].long()
        if not self.has_order and not torch.equal(groups, self.in_order(len(groups))):
            raise ValueError("g_idx is not sorted, which desc_act False means")
        return Integers(values, stored["scales"].T, zero, groups if self.has_order else None)


class GptqReader(SettingsReader):
    """Serves four and eight bits."""

    method, settings_file = METHOD, SETTINGS_FILE

    def formats(self, stored: Stored) -> Formats:
        """See `Reader`."""
        settings, where = self.settings(stored)
        weight_format = _format(settings, where)
        if weight_format.is_widened:
            logger.info("%s: eight bits in groups are computed with as floats", stored.path)
        formats: dict[str, WeightFormat] = {
            linear: weight_format if f"{linear}.qweight" in stored.names else by_name
            for linear, by_name in stored.formats.items()
        }
        if weight_format not in formats.values():
            raise CheckpointError(f"{where} is of {METHOD}, but no weight is stored as qweight")
        return formats


def _format(settings: Mapping[str, Any], where: str) -> GptqFormat:
    """The format of all quantized layers.

    Raises:
        CheckpointError: it is not served.
    """
    bits, group_size = settings.get("bits"), settings.get("group_size", -1)
    if bits not in (4, 8):
        raise CheckpointError(f"{where} says bits is {bits!r}; weights of 4 and 8 bits are served")
    if not isinstance(group_size, int) or group_size == 0 or group_size < -1:
        raise CheckpointError(
            f"{where} says group_size is {group_size!r}; a number of inputs, or -1 for all of a "
            "row, is expected"
        )
    stored_as = settings.get("checkpoint_format") or METHOD
    if stored_as not in (METHOD, "gptq_v2"):
        raise CheckpointError(
            f"{where} says checkpoint_format is {stored_as!r}, the layout of one kernel; gptq and "
            "gptq_v2 are served"
        )
    if settings.get("dynamic"):
        raise CheckpointError(
            f"{where} has settings of their own for some layers (dynamic), which are not served"
        )
    return GptqFormat(
        bits,
        max(0, group_size),
        has_order=bool(settings.get("desc_act")) and group_size > 0,  # one group has no order
        less_one=stored_as == METHOD,
    )


READER = GptqReader()
