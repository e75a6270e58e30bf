# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints, by the tool that wrote them: what its settings say must be what is stored.

The formats of linear layers follow from the names of their tensors (`formats.find_formats`), or
are those of a tool, which its reader has. A tool also writes down what it did; its reader compares
both, tells formats of the same names apart, and refuses what is not served. A further tool is a
module here and a line in `READERS`.
"""

from __future__ import annotations

from gptneox.weights.files import CheckpointError, find_quantization
from gptneox.weights.formats import Formats, scheme_of
from gptneox.weights.readers import awq, bitsandbytes, compressed_tensors, gguf, gptq, msmodelslim
from gptneox.weights.readers.stored import Reader, Stored

# The first that describes a checkpoint reads it.
READERS: tuple[Reader, ...] = (
    compressed_tensors.READER,
    gptq.READER,
    awq.READER,
    bitsandbytes.READER,
    msmodelslim.READER,
    gguf.READER,
)


def check_quantization(stored: Stored, method: str) -> Formats:
    """The formats of all linear layers: float, or quantized as their settings say.

    Args:
        stored: the checkpoint.
        method: of quantization, as config.json names it; "" for none.

    Raises:
        CheckpointError: settings and tensors disagree, or the scheme is not served.
    """
    for reader in READERS:
        if reader.describes(stored):
            return reader.formats(stored)
    if method := method or find_quantization(stored.path, stored.dtypes):
        raise CheckpointError(
            f"{stored.path} is quantized ({method}), which is not served; use the float "
            "checkpoint, which the task quantize quantizes"
        )
    if scheme := scheme_of(stored.formats):
        raise CheckpointError(
            f"{stored.path} holds {scheme} weights, but neither a quant_model_description.json nor "
            "quantization_config in config.json says what they are; add the file that the "
            "quantizer wrote"
        )
    return stored.formats
