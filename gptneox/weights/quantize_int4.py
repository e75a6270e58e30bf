# SPDX-License-Identifier: Apache-2.0
"""W4A16 checkpoints: weights of four bits in groups, rounded one by one or by GPTQ.

With sample text the model runs over it layer by layer in fp32. Each layer is rounded for the
inputs that it really has, behind layers that are rounded already, and is written before the next
one is read: one layer is in memory, with the Hessian of one matrix.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptneox.weights.calibrate import DOWN, FRONT, FloatModel, limit_texts
from gptneox.weights.files import CheckpointError
from gptneox.weights.formats import split_name
from gptneox.weights.gptq import output_error, quantize_groups
from gptneox.weights.groups import Int4Weight, pack, unpack
from gptneox.weights.load import parameter_name
from gptneox.weights.readers import compressed_tensors, msmodelslim
from gptneox.weights.report import LinearReport, Report, Tensors
from gptneox.weights.size import PREFIX

if TYPE_CHECKING:
    from gptneox.weights.quantize import Source

logger = logging.getLogger(__name__)

W4A16 = "w4a16"
# Of all texts, of one. 12,700 tokens gave 0.0046 nats for the embedded checkpoint, 4,096 0.0053.
MAX_TOKENS, MAX_TEXT = 16384, 2048
SMALL = 10**9  # parameters; smaller models lose much in four bits


class Int4Plan:
    """What a W4A16 checkpoint consists of."""

    def __init__(
        self,
        source: Source,
        chosen: set[str],
        group_size: int,
        report: Report,
        texts: Sequence[Sequence[int]] = (),
        *,
        is_compressed_tensors: bool = False,
    ) -> None:
        """Check that all layers can be rounded.

        Args:
            source: the float checkpoint.
            chosen: linear layers to quantize.
            group_size: inputs that share a scale.
            report: called for every linear layer.
            texts: token ids of sample text; without them each value is rounded by itself.
            is_compressed_tensors: the form of the files.

        Raises:
            CheckpointError: a group does not divide the inputs of a layer.
            ValueError: too little text.
        """
        self.source, self.chosen, self.report = source, chosen, report
        self.is_compressed_tensors = is_compressed_tensors
        self.format: compressed_tensors.PackedFormat | msmodelslim.AscendInt4Format
        if is_compressed_tensors:
            self.format = compressed_tensors.PackedFormat(4, group_size, symmetric=False)
        else:
            self.format = msmodelslim.AscendInt4Format(group_size)
        for name in self.stored:
            self.tensors(name)
        self._model: FloatModel | None = None
        self._next_layer = 0
        self._ready: dict[str, tuple[Int4Weight, float]] = {}  # not written yet
        if texts:
            longest = min(MAX_TEXT, source.model.max_position_embeddings)
            rows = limit_texts(texts, source.model.vocab_size, MAX_TOKENS, longest)
            self._model = FloatModel(source.model, source.read, rows)
            self._x = self._model.embed()
        self._warn()

    def _warn(self) -> None:
        """Of what costs accuracy."""
        total = sum(math.prod(shape) for shape in self.source.checkpoint.shapes.values())
        if total < SMALL:
            logger.warning(
                "models of less than %.0e parameters lose much in four bits, and this one has "
                "%.1e; w8a16 loses almost nothing",
                SMALL,
                total,
            )
        if self._model is None:
            logger.info(
                "without --calib_file each group's range is searched; GPTQ, with text, is more "
                "accurate"
            )

    @property
    def stored(self) -> list[str]:
        """The tensors of the source in the order of the layers."""

        def place(name: str) -> int:
            found = re.search(r"layers\.(\d+)\.", name)
            parameter = parameter_name(name)
            return int(found[1]) if found else -1 if "embed_in" in parameter else 1 << 30

        return sorted(self.source.stored, key=place)

    def settings(self) -> dict[str, Any]:
        """For config.json."""
        if not self.is_compressed_tensors:
            return {"quantize": W4A16}
        ignored = [n for n in self.source.layout.formats if n not in self.chosen]
        return {"quantization_config": compressed_tensors.write_settings(self.format, ignored)}

    def description(self, groups: list[Tensors]) -> dict[str, Any]:
        """The file that tags every tensor."""
        tags = {}
        for name in (name for group in groups for name in group):
            linear, suffix = split_name(parameter_name(name))
            is_quantized = linear in self.chosen and suffix != "bias"
            tags[name] = msmodelslim.W4A16 if is_quantized else msmodelslim.FLOAT_TAG
        return msmodelslim.write_description(msmodelslim.W4A16, tags, self.format.group_size)

    def _is_quantized(self, name: str) -> bool:
        linear, suffix = split_name(parameter_name(name))
        return linear in self.chosen and suffix == "weight"

    def tensors(self, name: str) -> Tensors:
        """What the tensor `name` of the source becomes.

        Raises:
            CheckpointError: groups or words do not divide it.
        """
        shape = self.source.checkpoint.shapes[name]
        if not self._is_quantized(name):
            return {name: (self.source.checkpoint.dtypes[name], shape)}
        try:
            shapes = self.format.shapes(*shape)
        except ValueError as error:
            raise CheckpointError(
                f"{self.source.path}: {name}: {error}; choose another --group_size, or name the "
                "layer in --disable_names"
            ) from error
        types = {t.suffix: t.dtypes[0] for t in self.format.tensors}
        scales = self.source.dtype if self.is_compressed_tensors else torch.float32
        types |= dict.fromkeys(types.keys() & {"weight_scale", "weight_offset"}, scales)
        owner = split_name(name)[0]
        return {f"{owner}.{part}": (types[part], size) for part, size in shapes.items()}

    def convert(self, name: str) -> Iterator[Tensor]:
        """The values of `tensors`, in order; `name` is the first of them."""
        linear, suffix = split_name(parameter_name(name))
        is_weight = linear in self.source.layout.formats and suffix != "bias"
        if not is_weight or linear not in self.chosen:
            value = self.source.read_finite(name)
            if is_weight:
                self._report(linear, value, None, 0.0)
            yield value
            return
        weight = self.source.read(f"{linear}.weight")
        while self._model and linear not in self._ready and linear.startswith(PREFIX):
            self._round_layer(self._model)
        found = self._ready.pop(linear, None)
        if found is None:
            quantized = quantize_groups(weight, self.format.group_size, self.source.dtype)
            found = quantized, 0.0
        self._report(linear, weight, *found)
        parts = self._parts(found[0], weight.shape)
        for key, (dtype, _) in self.tensors(self.source.layout.names[f"{linear}.weight"]).items():
            yield parts[split_name(key)[1]].to(dtype)

    def _parts(self, weight: Int4Weight, shape: torch.Size) -> dict[str, Tensor]:
        """The stored tensors, by their suffixes."""
        values = unpack(weight.values, 4, 1)
        if self.is_compressed_tensors:
            return {
                "weight_packed": pack(values, 4, 1),
                "weight_scale": weight.scale,
                "weight_shape": torch.tensor(shape),
                "weight_zero_point": pack(weight.zero, 4, 0),
            }
        return {
            "weight": pack(values ^ 8, 4, 0, torch.uint8).view(torch.int8),
            "weight_scale": weight.scale,
            "weight_offset": weight.zero.float() - 8,
        }

    @torch.inference_mode()
    def _round_layer(self, model: FloatModel) -> None:
        """Round the weights of the next layer, and pass what it makes of its inputs."""
        prefix = f"{PREFIX}layers.{self._next_layer}."
        weights = model.layer(self._next_layer)
        inputs, _ = model.run(weights, self._x)
        for name in (*FRONT, "attention.dense", DOWN):
            if prefix + name not in self.chosen:
                continue
            if norm := FRONT.get(name):
                x = inputs.norms[norm] * weights[f"{norm}.weight"] + weights[f"{norm}.bias"]
            else:
                x = inputs.down if name == DOWN else inputs.dense
            weight, hessian = weights[f"{name}.weight"], x.T @ x
            rounded = quantize_groups(weight, self.format.group_size, self.source.dtype, hessian)
            self._ready[prefix + name] = rounded, output_error(weight, rounded, hessian)
            weights[f"{name}.weight"] = rounded.dequantize(torch.float32)
        _, self._x = model.run(weights, self._x)
        self._next_layer += 1

    def _report(
        self, linear: str, weight: Tensor, rounded: Int4Weight | None, output: float
    ) -> None:
        lowest, highest = (x.item() for x in weight.aminmax())
        error = 0.0 if rounded is None else output_error(weight, rounded, None)
        scheme = "float" if rounded is None else W4A16
        self.report(LinearReport(linear, scheme, lowest, highest, error, output))
