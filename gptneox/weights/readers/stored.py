# SPDX-License-Identifier: Apache-2.0
"""What a reader of quantized checkpoints is given, and what it does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptneox.weights.formats import FLOAT, Formats, WeightFormat


@dataclass(frozen=True)
class Stored:
    """A checkpoint directory before its tensors are read.

    `names` maps parameters to stored tensors, `dtypes` and `shapes` every stored tensor to its
    own; `formats` are those that the names of the tensors imply.
    """

    path: Path
    config: Mapping[str, Any]  # config.json
    names: Mapping[str, str]
    dtypes: Mapping[str, torch.dtype]
    formats: Formats
    shapes: Mapping[str, tuple[int, ...]]

    def format_of(self, linear: str) -> WeightFormat:
        """Of a linear layer, such as "gpt_neox.layers.0.attention.dense"."""
        return self.formats.get(linear, FLOAT)


class Reader(ABC):
    """Reads the settings that one tool leaves beside quantized weights."""

    @abstractmethod
    def describes(self, stored: Stored) -> bool:
        """Whether the directory has settings of this tool that tell of quantized weights."""

    @abstractmethod
    def formats(self, stored: Stored) -> Formats:
        """The formats of all linear layers, after comparing settings and tensors.

        Raises:
            CheckpointError: they disagree, or ask for what is not served.
        """
