# SPDX-License-Identifier: Apache-2.0
"""What a reader of quantized checkpoints is given, and what it does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from gptneox.config.files import read_json
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


class SettingsReader(Reader):
    """Settings are in config.json's `quantization_config`, or in a file of their own."""

    method: ClassVar[str]  # what they call themselves; a file of their own may not
    settings_file: ClassVar[str]

    def settings(self, stored: Stored) -> tuple[Mapping[str, Any], str]:
        """The settings, and where they are."""
        settings = stored.config.get("quantization_config")
        if isinstance(settings, dict):
            return settings, f"{stored.path / 'config.json'}, quantization_config,"
        path = stored.path / self.settings_file
        return (read_json(path) if path.is_file() else {}), str(path)

    def describes(self, stored: Stored) -> bool:
        """See `Reader`."""
        settings, _ = self.settings(stored)
        return bool(settings) and settings.get("quant_method", self.method) == self.method
