# SPDX-License-Identifier: Apache-2.0
"""Weights of four bits in groups on several ranks, whose parts of the inputs cut groups apart.

A part begins and ends within a group, or its inputs are of any group (desc_act). What it holds is
compared with the weights that the file stands for, value by value, and what ranks answer with
Hugging Face's answers of these weights as floats.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints, ranks
from support.foreign_files import write
from support.ranks import Team, Teams
from torch import Tensor
from transformers import GPTNeoXForCausalLM

from gptneox.config.model import ModelConfig
from gptneox.devices.cpu.device import CpuDevice
from gptneox.devices.device import Device, Memory
from gptneox.devices.operators import PackedAdjusted, PackedInt4, PackedLinear
from gptneox.layers import Linear
from gptneox.model import GPTNeoX
from gptneox.parallel import TensorParallelGroup
from gptneox.weights.cut import cut_checkpoint, merge_checkpoint
from gptneox.weights.files import CheckpointError
from gptneox.weights.groups import lay_out, runs_of_part
from gptneox.weights.load import check_weights, load_model, rank_directory
from gptneox.weights.quantize import dequantize_checkpoint

ROW_PARALLEL = ("attention.dense", "mlp.dense_4h_to_h")


def config_of(num_heads: int, head_dim: int, intermediate: int, **keys: Any) -> dict[str, Any]:
    """A twin of Pythia with one layer that is not fused, so that its weights stay apart."""
    sizes = {"num_attention_heads": num_heads, "hidden_size": num_heads * head_dim}
    return (
        checkpoints.FAMILY["pythia-14m"]
        | {"num_hidden_layers": 1, "intermediate_size": intermediate, "rotary_pct": 0.25}
        | {"use_parallel_residual": False}
        | sizes
        | keys
    )


EVEN = config_of(4, 32, 512)
ODD = config_of(4, 48, 576)
# What stores the weights, the model, inputs of a group, ranks.
CASES: list[tuple[str, dict[str, Any], int, int]] = [
    ("gptq", EVEN, 128, 2),  # a part is within one group
    ("gptq", EVEN, 64, 4),
    ("gptq", EVEN, 32, 4),  # groups are shared out
    ("gptq", ODD, 64, 4),  # parts of 48 and of 144 inputs: groups of 48, and of 16 and 32
    ("gptq v2", ODD, 192, 4),
    ("gptq", ODD, 96, 4),
    ("gptq", config_of(4, 24, 384), 32, 4),  # parts of 24 inputs: groups of 8 and 16
    ("gptq", config_of(4, 24, 384), 48, 4),
    ("gptq 8", ODD, 64, 4),
    ("gptq symmetric", ODD, 64, 4),
    ("gptq rows", ODD, 0, 4),
    ("awq", ODD, 64, 4),
    ("modelslim", EVEN, 64, 4),
    ("modelslim, a byte each", ODD, 64, 4),
    ("packed", ODD, 64, 4),
    ("packed symmetric", ODD, 64, 4),
    ("packed 8", ODD, 64, 4),
    ("gptq desc_act", EVEN, 128, 2),
    ("gptq desc_act", EVEN, 64, 4),
    ("gptq desc_act", ODD, 64, 4),
    ("gptq desc_act", ODD, 48, 2),
    ("gptq desc_act", config_of(4, 24, 384), 16, 2),
    ("gptq desc_act, sorted", ODD, 64, 4),
    ("packed by order", EVEN, 32, 2),
    ("packed by order", ODD, 192, 4),
]
NAMES = [f"{kind}, {c['hidden_size']}, {size}, {n} ranks" for kind, c, size, n in CASES]


def without_biases(path: Path) -> None:
    """Fill them with zeros."""
    [file] = path.glob("*.safetensors")
    tensors = load_file(file)
    made = {n: t.zero_() if n.endswith(".bias") else t for n, t in tensors.items()}
    save_file(made, file, {"format": "pt"})


def loaded(path: Path, device: Device, group: TensorParallelGroup, dtype: torch.dtype) -> GPTNeoX:
    path = rank_directory(path, group)
    model = GPTNeoX(ModelConfig.from_pretrained(path), device, group)
    load_model(model, path, dtype)
    return model


def linears(model: GPTNeoX) -> dict[str, Linear]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, Linear)}
    found.pop("embed_out")
    return found


def part_of(name: str, weight: Tensor, rank: int, world_size: int) -> Tensor:
    return weight.chunk(world_size, 1 if name.endswith(ROW_PARALLEL) else 0)[rank]


# -- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "config", "group_size", "world_size"), CASES, ids=NAMES)
def test_a_part_is_that_of_the_weights(
    kind: str,
    config: dict[str, Any],
    group_size: int,
    world_size: int,
    device: Device,
    tmp_path: Path,
) -> None:
    """Bit for bit in fp32: an identity matrix times a weight is the weight.

    From whole files and from cut ones, which joined are the file again.
    """
    path, parts = tmp_path / "made", tmp_path / "parts"
    expected = write(path, kind, config, group_size, torch.float32)
    without_biases(path)
    cut_checkpoint(path, parts, world_size)
    for rank in range(world_size):
        group = TensorParallelGroup(rank, world_size)
        for place in (path, parts):
            for name, layer in linears(loaded(place, device, group, torch.float32)).items():
                wanted = part_of(name, expected[name], rank, world_size)
                assert layer.packed is not None
                assert layer.packed.in_features == wanted.shape[1]
                found = layer(torch.eye(wanted.shape[1], device=device.torch_device)).cpu()
                assert torch.equal(found.T, wanted), (name, rank, place.name)
    merge_checkpoint(parts, tmp_path / "joined")
    file = next(path.glob("*.safetensors")).name
    before, after = load_file(path / file), load_file(tmp_path / "joined" / file)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("seed", range(12))
def test_random_groups_and_parts(seed: int, device: Device, tmp_path: Path) -> None:
    """Of any size that is served, in any order, on any number of ranks; products against fp64.

    The limit is that of one rank: the weight rounded to the dtype once, sums in fp32, inputs of
    four bits' kernels rounded to 16 bits.
    """
    chosen = random.Random(seed)
    head_dim, world_size = chosen.choice([16, 24, 32, 40]), chosen.choice([2, 4])
    hidden = 4 * head_dim
    intermediate = chosen.choice([2, 3, 4]) * hidden
    sizes = [n for n in range(16, hidden + 1, 16) if hidden % n == 0]
    group_size, dtype = chosen.choice(sizes), chosen.choice([torch.float16, torch.bfloat16])
    kind = chosen.choice(["gptq", "packed", "gptq desc_act", "packed by order"])
    config = config_of(4, head_dim, intermediate)
    expected = write(tmp_path / "made", kind, config, group_size, torch.float32)
    without_biases(tmp_path / "made")
    for rank in range(world_size):
        group = TensorParallelGroup(rank, world_size)
        model = loaded(tmp_path / "made", device, group, dtype)
        for name, layer in linears(model).items():
            weight = part_of(name, expected[name], rank, world_size).double()
            for rows in (1, 40):
                generator = torch.Generator().manual_seed(rows)
                x = torch.randn(rows, weight.shape[1], generator=generator).to(dtype)
                found = layer(x.to(device.torch_device)).cpu().double()
                size = x.double().abs() @ weight.abs().T
                limit = torch.finfo(dtype).eps * size + 1e-9
                assert ((found - x.double() @ weight.T).abs() <= limit).all(), (name, rank, rows)


@pytest.mark.parametrize("size", [8, 24, 40, 48, 64, 320])
@pytest.mark.parametrize("group_size", [16, 48, 64, 128])
def test_runs_of_a_part(size: int, group_size: int) -> None:
    """Against counting input by input; groups divide what runs are filled up to."""
    for part in range(4):
        inputs = [k // group_size for k in range(part * size, (part + 1) * size)]
        runs = runs_of_part(part, size, group_size)
        assert runs == [inputs.count(g) for g in sorted(set(inputs))]
        lengths, found = lay_out(runs, 16)
        assert all(0 <= length - n < 16 for n, length in zip(runs, lengths, strict=True))
        assert not any(length % found for length in lengths)
        assert found % 16 == 0 or len(runs) == 1


def test_a_token_is_rounded_as_without_filling(tmp_path: Path) -> None:
    """What fills a group up is an input of the same block, so that none is larger than its own."""
    path = tmp_path / "made"
    write(path, "gptq desc_act", EVEN, 64, torch.float16)
    for rank in range(2):
        model = loaded(path, PlainDevice(), TensorParallelGroup(rank, 2), torch.float16)
        packed = linears(model)["gpt_neox.layers.0.mlp.dense_4h_to_h"].packed
        assert isinstance(packed, PackedAdjusted)
        assert packed.order is not None
        tensors = load_file(path / "model.safetensors")
        groups = tensors["gpt_neox.layers.0.mlp.dense_4h_to_h.g_idx"].chunk(2)[rank]
        assert sorted(set(packed.order.tolist())) == list(range(256))
        for block in packed.order.split(32):
            assert len(set(groups[block].tolist())) == 1
        assert len(packed.order) > 256


# -- memory --------------------------------------------------------------------------------------


class PlainDevice(CpuDevice):
    """A CPU without kernels, so that weights are readable, with memory."""

    def memory(self) -> Memory:
        return Memory(1 << 40, 1 << 40, 0)


def held(packed: PackedLinear) -> int:
    """Bytes of the weight."""
    if isinstance(packed, PackedAdjusted):
        assert isinstance(packed.weight, PackedLinear)
        return held(packed.weight)
    tensors = [packed.weight]
    if isinstance(packed, PackedInt4):
        tensors += [packed.scale, packed.zero]
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("kind", "config", "group_size", "world_size"), CASES, ids=NAMES)
def test_bytes_of_a_part(
    kind: str,
    config: dict[str, Any],
    group_size: int,
    world_size: int,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    """The largest part takes what is counted; a cut one in any order knows its own."""
    path, parts = tmp_path / "made", tmp_path / "parts"
    write(path, kind, config, group_size, torch.float16)
    cut_checkpoint(path, parts, world_size)
    most: dict[str, int] = {}
    for rank in range(world_size):
        group = TensorParallelGroup(rank, world_size)
        cut, whole = (loaded(place, PlainDevice(), group, dtype) for place in (parts, path))
        counted = dict(cut.size._tensors(world_size))
        for name, layer in linears(whole).items():
            assert layer.packed is not None
            num_bytes = held(layer.packed)
            most[name] = max(most.get(name, 0), num_bytes)
            has_own = name.endswith(ROW_PARALLEL) and ("desc_act" in kind or "order" in kind)
            assert num_bytes <= counted[f"{name}.weight"], name
            assert num_bytes == counted[f"{name}.weight"] or not has_own, name
    counted = dict(whole.size._tensors(world_size))
    assert {f"{name}.weight": n for name, n in most.items()}.items() <= counted.items()


def test_floats_where_they_take_less(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Eight inputs of each group on a rank; the log names the weights and their bytes."""
    path, prefix = tmp_path / "made", "gpt_neox.layers.0."
    expected = write(path, "gptq desc_act", EVEN, 32, torch.float32)
    without_biases(path)
    for dtype, said in (
        (torch.float16, "0.04 MiB of weights are floats, which take less than four bits here"),
        (torch.float32, "0.04 MiB of weights are zeros that fill groups up"),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            model = loaded(path, PlainDevice(), TensorParallelGroup(1, 4), dtype)
        names = ", ".join(prefix + name for name in ROW_PARALLEL)
        assert f"{path}: {said}, as ranks share groups of inputs: {names}" in caplog.messages
        for name in ROW_PARALLEL:
            layer, whole = linears(model)[prefix + name], expected[prefix + name]
            wanted = part_of(name, whole, 1, 4).to(dtype)
            assert torch.equal(layer(torch.eye(wanted.shape[1], dtype=dtype)).T, wanted)
            assert isinstance(layer.packed, PackedAdjusted) == (dtype == torch.float32)


# -- answers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teams() -> Iterator[Teams]:
    with ranks.open_teams() as opened:
        yield opened


PARALLEL = {"use_parallel_residual": True, "num_hidden_layers": 2}
MODELS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "groups": ("gptq", EVEN | PARALLEL, 64, 4),
    "parts of 48": ("modelslim", ODD | PARALLEL, 64, 4),
    "order": ("gptq desc_act", EVEN | PARALLEL, 128, 2),
    "order on four": ("gptq desc_act", ODD | {"num_hidden_layers": 2}, 64, 4),
    "order, packed": ("packed by order", EVEN | PARALLEL, 64, 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_ranks_answer_as_the_floats(name: str, teams: Teams, tmp_path: Path) -> None:
    """Both paths, from whole files and from cut ones, in fp32."""
    kind, config, group_size, world_size = MODELS[name]
    path = tmp_path / "made"
    write(path, kind, config, group_size, torch.float32)
    answers_of(path, config, teams(world_size), tmp_path)


def test_what_an_activation_gives_is_divided_on_each_rank(teams: Teams, tmp_path: Path) -> None:
    """AWQ's scales, of inputs of which each rank has a part that begins within a group."""
    config, path = ODD | PARALLEL, tmp_path / "made"
    write(path, "awq", config, 64, torch.float32)
    tensors = load_file(path / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        scales = torch.linspace(0.5, 2.0, config["intermediate_size"])
        tensors[f"gpt_neox.layers.{layer}.mlp.act.scales"] = scales
    save_file(tensors, path / "model.safetensors")
    answers_of(path, config, teams(4), tmp_path)


def answers_of(path: Path, config: dict[str, Any], team: Team, tmp_path: Path) -> None:
    """Logits of ranks against Hugging Face's of the same weights as floats."""
    dequantize_checkpoint(path, tmp_path / "float")
    cut_checkpoint(path, tmp_path / "parts", team.world_size)
    hf = GPTNeoXForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32).eval()
    [prompt] = checkpoints.prompts([70], config["vocab_size"])
    with torch.inference_mode():
        expected = hf(torch.tensor([prompt])).logits[0]
    places = {"whole": path, "parts": tmp_path / "parts"}
    [first, *others] = team.run(ranks.both_paths, places, [prompt], 1)
    limit = 2e-5 * expected.abs().max().item()
    for place, answers in first.items():
        torch.testing.assert_close(
            answers.logits[0], expected[: len(answers.logits[0])], rtol=0, atol=limit
        )
        assert all(other[place].digest == answers.digest for other in others)
    for run in ranks.PATHS:  # cutting beforehand or while loading is the same
        assert first[f"{run} whole"].digest == first[f"{run} parts"].digest


# -- what is refused -----------------------------------------------------------------------------


def test_parts_that_words_do_not_hold(tmp_path: Path) -> None:
    """With both numbers, when it is loaded and when it is cut."""
    config = config_of(4, 12, 192) | {"rotary_pct": 1 / 3}
    write(tmp_path / "made", "packed symmetric", config, 16, torch.float16)
    message = r"4 ranks: of .*attention.dense, its inputs are stored by eights, and 12 fall"
    with pytest.raises(CheckpointError, match=message):
        cut_checkpoint(tmp_path / "made", tmp_path / "cut", 4)
    with pytest.raises(CheckpointError, match=message):
        check_weights(tmp_path / "made", ModelConfig.from_pretrained(tmp_path / "made"), 4)
    assert check_weights(tmp_path / "made", ModelConfig.from_pretrained(tmp_path / "made"), 2)


@pytest.mark.parametrize("group", [0, 4, -1])
def test_an_order_that_no_groups_have(group: int, tmp_path: Path) -> None:
    """More inputs of a group than it has, or of one that there is not, on the rank that sees it."""
    path = tmp_path / "made"
    write(path, "gptq desc_act", EVEN, 32, torch.float16)
    tensors = load_file(path / "model.safetensors")
    tensors["gpt_neox.layers.0.attention.dense.g_idx"][64:] = group
    save_file(tensors, path / "model.safetensors")
    message = r"attention.dense: g_idx does not put 32 inputs into each of 4 groups"
    with pytest.raises(CheckpointError, match=message):
        loaded(path, PlainDevice(), TensorParallelGroup(1, 2), torch.float16)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_order_where_none_is_expected(rank: int, tmp_path: Path) -> None:
    """Inputs of a part are of the groups at its own place."""
    path = tmp_path / "made"
    write(path, "gptq", EVEN, 64, torch.float16)
    tensors = load_file(path / "model.safetensors")
    name = "gpt_neox.layers.0.attention.dense.g_idx"
    tensors[name] = 1 - tensors[name]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"g_idx is not sorted, which desc_act False means"):
        loaded(path, PlainDevice(), TensorParallelGroup(rank, 2), torch.float16)
