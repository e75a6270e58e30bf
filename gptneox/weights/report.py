# SPDX-License-Identifier: Apache-2.0
"""What quantizers tell of the tensors that they write, and of each linear layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Name of a stored tensor -> its dtype and shape.
Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class LinearReport:
    """What became of a linear layer's weight."""

    name: str
    scheme: str  # "w8a16", "w8a8_dynamic", "w8a8", "w4a16" or "float"
    lowest: float
    highest: float
    error: float  # see `relative_error`
    output_error: float = 0.0  # with sample text, that of the layer's outputs


Report = Callable[[LinearReport], None]
