# SPDX-License-Identifier: Apache-2.0
"""Weight formats: from the file through cut and join to what a device packs.

Float is the format that exists. A second one, made up here, shows that a format needs nothing but
its own class: bytes of eight bits, a scale for each output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints
from support.checkpoints import copy_checkpoint
from torch import Tensor

from gptneox.config.model import ModelConfig
from gptneox.devices.cache import FloatKV
from gptneox.devices.device import Device, Memory
from gptneox.devices.operators import FoldableWeight, Operators, PackedLinear
from gptneox.layers import Linear
from gptneox.model import GPTNeoX
from gptneox.parallel import TensorParallelGroup
from gptneox.weights import formats
from gptneox.weights.cut import cut_checkpoint, merge_checkpoint
from gptneox.weights.formats import FLOAT, FLOATS, StoredTensor, WeightFormat, find_formats
from gptneox.weights.load import Checkpoint, CheckpointError, find_layout, load_model, read_part
from gptneox.weights.size import ModelSize, full_shapes

CONFIG = checkpoints.FAMILY["pythia-14m"] | {"vocab_size": 301}
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class ByteWeight(FoldableWeight):
    """Values [F, K] of eight bits, times a scale [F, 1]."""

    values: Tensor
    scale: Tensor

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    def pack(self, ops: Operators, bias: Tensor | None) -> PackedLinear:
        return ops.pack_linear(self.floats(), bias)

    def floats(self) -> Tensor:
        return self.values * self.scale

    def take_rows(self, order: Tensor) -> ByteWeight:
        return ByteWeight(self.values[order], self.scale[order])


class ByteFormat(WeightFormat):
    """The scale follows the outputs and is whole for every part of the inputs."""

    tensors = (
        StoredTensor("bytes", (0, 1), (torch.int8,)),
        StoredTensor("row_scale", (0, None), FLOATS),
    )

    def shapes(self, num_outputs: int, num_inputs: int) -> dict[str, tuple[int, ...]]:
        return {"bytes": (num_outputs, num_inputs), "row_scale": (num_outputs, 1)}

    def num_bytes(self, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> int:
        return num_outputs * (num_inputs + dtype.itemsize)

    def load(
        self, stored: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> ByteWeight:
        values = stored["bytes"].to(device, copy=True)
        return ByteWeight(values, stored["row_scale"].to(device, dtype, copy=True))


class RoomyDevice(Device):
    """The base class with memory: weights stay readable after loading."""

    def memory(self) -> Memory:
        return Memory(1 << 40, 1 << 40, 0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A vocabulary that no number of ranks divides."""
    checkpoints.write_checkpoint(tmp_path / "float", CONFIG)
    return tmp_path / "float"


@pytest.fixture
def in_bytes(source: Path, tmp_path: Path, monkeypatch) -> tuple[Path, Path]:
    """A checkpoint whose layers hold bytes and whose head is float, and the same as floats."""
    monkeypatch.setattr(formats, "FORMATS", (FLOAT, ByteFormat()))
    folder, rounded = tmp_path / "bytes", tmp_path / "rounded"
    tensors = load_file(source / WEIGHTS)
    stored, floats = {}, {}
    for name, tensor in tensors.items():
        linear = name.removesuffix(".weight")
        if name == linear or linear.rpartition(".")[2] not in formats.CUT_AXES or "out" in linear:
            stored[name] = floats[name] = tensor
            continue
        scale = tensor.float().abs().amax(1, keepdim=True) / 127
        values = (tensor.float() / scale).round().to(torch.int8)
        stored |= {f"{linear}.bytes": values, f"{linear}.row_scale": scale}
        floats[name] = values * scale
    for path, content in ((folder, stored), (rounded, floats)):
        copy_checkpoint(source, path)
        (path / WEIGHTS).unlink()
        save_file(content, path / WEIGHTS, {"format": "pt"})
    return folder, rounded


def loaded(path: Path, group: TensorParallelGroup, device: Device) -> GPTNeoX:
    model = GPTNeoX(ModelConfig.from_pretrained(path), device, group)
    load_model(model, path, torch.float32)
    return model


def packed(model: GPTNeoX) -> dict[str, Any]:
    """Every linear layer's weight and bias."""
    return {
        name: (module.packed.weight, module.packed.bias)
        for name, module in model.named_modules()
        if isinstance(module, Linear)
    }


def logits(model: GPTNeoX) -> Tensor:
    """Of one prompt on a paged cache."""
    from support.logits import paged_logits

    from gptneox.engine.paged import PagedEngine

    settings = checkpoints.EngineSection(num_blocks=8, block_size=16)
    return paged_logits(PagedEngine(model, settings), [*range(1, 24)], 20)


def assert_equal(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, pair in actual.items():
        for ours, theirs in zip(pair, expected[name], strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs), name


# -- files ---------------------------------------------------------------------------------------


def test_every_linear_layer_has_the_format_of_its_tensors(in_bytes) -> None:
    path, rounded = in_bytes
    for folder, expected in ((path, ByteFormat), (rounded, type(FLOAT))):
        checkpoint = Checkpoint(folder)
        found = find_layout(checkpoint, ModelConfig.from_pretrained(folder)).formats
        assert len(found) == 4 * CONFIG["num_hidden_layers"] + 1
        assert type(found.pop("embed_out")) is type(FLOAT)
        assert {type(one) for one in found.values()} == {expected}
        checkpoint.close()
    assert find_formats(["gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm.bias"]) == {}


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("bytes", lambda t: t.float(), r"mlp\.dense_4h_to_h\.bytes holds float32"),
        ("row_scale", lambda t: t[1:], r"row_scale is \[127, 1\], expected \[128, 1\]"),
        ("row_scale", None, r"lacks 1 tensors: .*dense_4h_to_h\.weight"),
    ],
)
def test_a_tensor_of_a_format_is_checked(in_bytes, part, change, message) -> None:
    path, _ = in_bytes
    tensors = load_file(path / WEIGHTS)
    name = f"gpt_neox.layers.1.mlp.dense_4h_to_h.{part}"
    tensor = tensors.pop(name)
    if change:
        tensors[name] = change(tensor).contiguous()
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        find_layout(Checkpoint(path), ModelConfig.from_pretrained(path))


@pytest.mark.parametrize("form", ["float", "bytes"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_parts_make_up_the_whole(form, world_size, in_bytes, source) -> None:
    """Slices of all ranks, joined along the dimension that the format names."""
    path = source if form == "float" else in_bytes[0]
    checkpoint = Checkpoint(path)
    layout = find_layout(checkpoint, ModelConfig.from_pretrained(path))
    for name, stored in layout.names.items():
        whole = checkpoint.read(stored)
        parts = [
            read_part(checkpoint, stored, name, layout.formats, rank, world_size)
            for rank in range(world_size)
        ]
        assert len({part.shape for part in parts}) == 1, "every rank holds equally much"
        dim = formats.cut_dimension(name, whole.shape, layout.formats, world_size)
        if formats.is_partial_bias(name):
            assert torch.equal(torch.stack(parts).sum(0), whole), name
        elif dim is None:
            assert all(torch.equal(part, whole) for part in parts), name
        else:
            joined = torch.cat(parts, dim)
            assert torch.equal(joined.narrow(dim, 0, whole.shape[dim]), whole), name
            assert not joined.narrow(
                dim, whole.shape[dim], joined.shape[dim] - whole.shape[dim]
            ).any()
    checkpoint.close()


def test_cut_and_join_keep_every_bit(in_bytes, tmp_path: Path) -> None:
    path, _ = in_bytes
    cut_checkpoint(path, tmp_path / "parts", 2)
    part = load_file(tmp_path / "parts" / "1" / WEIGHTS)
    assert part["gpt_neox.layers.0.mlp.dense_h_to_4h.row_scale"].shape == (256, 1)
    assert part["gpt_neox.layers.0.mlp.dense_4h_to_h.row_scale"].shape == (128, 1)
    merge_checkpoint(tmp_path / "parts", tmp_path / "joined")
    before, after = load_file(path / WEIGHTS), load_file(tmp_path / "joined" / WEIGHTS)
    assert_equal({n: (t,) for n, t in after.items()}, {n: (t,) for n, t in before.items()})
    for rank in range(2):
        group = TensorParallelGroup(rank, 2)
        ours = packed(loaded(tmp_path / "parts" / str(rank), group, RoomyDevice()))
        assert_equal(ours, packed(loaded(path, group, RoomyDevice())))


# -- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loaded_part_is_that_of_the_floats(world_size, in_bytes) -> None:
    path, rounded = in_bytes
    for rank in range(world_size):
        group = TensorParallelGroup(rank, world_size)
        ours = packed(loaded(path, group, RoomyDevice()))
        assert_equal(ours, packed(loaded(rounded, group, RoomyDevice())))


def test_a_model_answers_as_with_floats(device: Device, in_bytes) -> None:
    """Fused layers included, where the device has them."""
    path, rounded = in_bytes
    group = TensorParallelGroup()
    expected = logits(loaded(rounded, group, device))
    assert torch.equal(logits(loaded(path, group, device)), expected)


def test_bytes_are_those_of_the_formats(in_bytes) -> None:
    path, rounded = in_bytes
    sizes = [loaded(p, TensorParallelGroup(), RoomyDevice()).size for p in in_bytes]
    shapes = full_shapes(ModelConfig.from_pretrained(path))
    saved = 0
    for name, shape in shapes.items():
        if ".layers." in name and name.endswith(".weight") and len(shape) == 2:
            saved += 3 * shape[0] * shape[1] - 4 * shape[0]
    assert sizes[1].weight_bytes - sizes[0].weight_bytes == saved > 0
    assert sizes[1].decode_weight_bytes - sizes[0].decode_weight_bytes == saved
    assert sizes[1] == ModelSize(
        ModelConfig.from_pretrained(rounded),
        torch.float32,
        FloatKV(torch.float32),
        formats=sizes[1].formats,
    )


def test_a_layer_keeps_nothing_of_what_it_packed(source: Path) -> None:
    for name, module in loaded(source, TensorParallelGroup(), RoomyDevice()).named_modules():
        if isinstance(module, Linear):
            assert module.weight.is_meta, name
            assert module.bias is None or module.bias.is_meta, name
            with pytest.raises(AssertionError, match="before the weight was loaded"):
                module.unload()
