# SPDX-License-Identifier: Apache-2.0
"""Cutting a checkpoint and joining it again: bit for bit, complete or not there, in little memory.

The rules that are expected here are written down once more, independently of the code: rows of
query_key_value, dense_h_to_4h and embed_out, columns of dense and dense_4h_to_h, all else whole.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import checkpoints, ranks
from support.checkpoints import write_large, write_tensors
from support.processes import REPO
from support.tokenizers import write_tokenizer
from torch import Tensor

import cut_model_util
from gptneox.config.errors import ConfigError
from gptneox.config.model import ModelConfig
from gptneox.devices.device import Device, Memory
from gptneox.files import UNFINISHED
from gptneox.layers import Linear
from gptneox.model import GPTNeoX
from gptneox.parallel import TensorParallelGroup
from gptneox.weights.cut import cut_checkpoint, describe_mismatch, merge_checkpoint
from gptneox.weights.formats import cut_dimension, part_shape, rank_slice
from gptneox.weights.load import (
    PART_FILE,
    CheckpointError,
    load_model,
    rank_directory,
    read_manifest,
)
from gptneox.weights.size import full_shapes

ROWS = ("query_key_value", "dense_h_to_4h", "embed_out", "lm_head")
COLUMNS = ("dense", "dense_4h_to_h")
FORMS = ("safetensors", "sharded", "bin", "sharded bin", "symlinks")
CONFIG_20B = checkpoints.FAMILY["gpt-neox-20b"] | {
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_attention_heads": 64,
    "num_hidden_layers": 44,
    "vocab_size": 50432,
}
# Eight heads, a vocabulary that no number of ranks divides, and keys that nobody knows.
CONFIG = checkpoints.FAMILY["polyglot-ko-1.3b"] | {
    "hidden_size": 64,
    "intermediate_size": 144,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "vocab_size": 37,
    "an_unknown_key": {"nested": ["日本", 1.5, None]},
}


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any bits at all: NaN with payloads, infinities, negative zero, subnormal numbers."""
    size = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(256, (size,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).view(shape)


def random_tensors(
    config: dict[str, Any], dtype: torch.dtype, *, buffers: bool = False
) -> dict[str, Tensor]:
    """Every tensor of a checkpoint; `buffers` adds what old ones hold besides."""
    generator = torch.Generator().manual_seed(3)
    shapes = full_shapes(ModelConfig.from_dict(config))
    if config.get("tie_word_embeddings"):
        del shapes["embed_out.weight"]
    tensors = {n: random_bits(s, dtype, generator) for n, s in shapes.items()}
    if buffers:
        for i in range(config["num_hidden_layers"]):
            attention = f"gpt_neox.layers.{i}.attention"
            tensors[f"{attention}.bias"] = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
            tensors[f"{attention}.masked_bias"] = torch.tensor(-1e9, dtype=dtype)
            tensors[f"{attention}.rotary_emb.inv_freq"] = torch.arange(3.0)
        tensors["training_step"] = torch.tensor(143000)
    return tensors


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        bits = [t.contiguous().view(-1).view(torch.uint8) for t in (actual[name], tensor)]
        assert torch.equal(*bits), name


def expected_part(name: str, tensor: Tensor, rank: int, world_size: int) -> Tensor:
    """By the rules at the top of this file."""
    module = (name.split(".")[-2:])[0]
    if module in ROWS and tensor.dim() in (1, 2):
        rows = math.ceil(tensor.shape[0] / world_size)
        padding = tensor.new_zeros(rows * world_size - tensor.shape[0], *tensor.shape[1:])
        return torch.cat([tensor, padding]).view(world_size, rows, *tensor.shape[1:])[rank]
    if module in COLUMNS and tensor.dim() == 2:
        return tensor.view(tensor.shape[0], world_size, -1)[:, rank].contiguous()
    if module in COLUMNS:
        return tensor if rank == 0 else torch.zeros_like(tensor)
    return tensor


def assert_cut_and_merge(source: Path, tensors: dict[str, Tensor], world_size: int) -> None:
    """Every part by the rules, and joined again what it was."""
    parts, joined = source.with_name("parts"), source.with_name("joined")
    cut_checkpoint(source, parts, world_size)
    for rank in range(world_size):
        actual = load_file(parts / str(rank) / "model.safetensors")
        expected = {n: expected_part(n, t, rank, world_size) for n, t in tensors.items()}
        assert_same_bits(actual, expected)
    assert describe_mismatch(parts, source, world_size) == ""
    merge_checkpoint(parts, joined)
    assert_same_bits(load_file(joined / "model.safetensors"), tensors)
    assert json.loads((joined / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    assert not (joined / "modeling_gpt_neox_ascend.py").exists()
    left = {p.name for p in source.parent.iterdir()} - {source.name, f"{source.name} blobs"}
    assert left == {"parts", "joined"}, "nothing temporary is left"
    shutil.rmtree(parts)
    shutil.rmtree(joined)


def divisors(config: dict[str, Any], world_sizes: tuple[int, ...]) -> list[int]:
    heads, width = config["num_attention_heads"], config["intermediate_size"]
    return [n for n in world_sizes if heads % n == width % n == 0]


# -- bit for bit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", checkpoints.FAMILY)
def test_the_family_is_joined_as_it_was(name: str, tmp_path: Path) -> None:
    """For every world size up to 22 that divides the twin's heads, in the dtype of its files."""
    config = checkpoints.FAMILY[name]
    dtype = getattr(torch, config["torch_dtype"])
    tensors = random_tensors(config, dtype, buffers=True)
    source = write_tensors(tmp_path / "model", tensors, config)
    for world_size in divisors(config, (1, 2, 3, 4, 8, 11, 22)):
        assert_cut_and_merge(source, tensors, world_size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_files(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG, dtype, buffers=True)
    source = write_tensors(tmp_path / "my model 权重", tensors, CONFIG, form)
    for world_size in (2, 8):
        assert_cut_and_merge(source, tensors, world_size)


@pytest.mark.parametrize("vocab_size", [1, 5, 9, 30005, 50281])
def test_vocabularies_that_do_not_divide(vocab_size: int, tmp_path: Path) -> None:
    """The last ranks may hold few real rows, or none."""
    config = CONFIG | {"vocab_size": vocab_size, "num_hidden_layers": 1}
    tensors = random_tensors(config, torch.float16)
    source = write_tensors(tmp_path / "model", tensors, config)
    for world_size in (2, 4, 8):
        assert_cut_and_merge(source, tensors, world_size)


def test_a_head_under_its_other_name(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG, torch.float32)
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    assert_cut_and_merge(write_tensors(tmp_path / "model", tensors, CONFIG), tensors, 4)


@pytest.mark.parametrize("stored", ["embed_in", "embed_out", "lm_head", "both"])
def test_a_tied_pair_under_either_name(stored: str, tmp_path: Path) -> None:
    """The embedding is needed whole on every rank, whatever it is called."""
    config = CONFIG | {"tie_word_embeddings": True}
    tensors = random_tensors(config, torch.float32)
    weight = tensors.pop("gpt_neox.embed_in.weight")
    if stored in ("embed_in", "both"):
        tensors["gpt_neox.embed_in.weight"] = weight
    if stored != "embed_in":
        tensors["lm_head.weight" if stored == "lm_head" else "embed_out.weight"] = weight.clone()
    source = write_tensors(tmp_path / "model", tensors, config)
    cut_checkpoint(source, tmp_path / "parts", 4)
    merge_checkpoint(tmp_path / "parts", tmp_path / "joined")
    assert_same_bits(load_file(tmp_path / "joined" / "model.safetensors"), tensors)
    names = {"embed_in": "gpt_neox.embed_in.weight", "both": "gpt_neox.embed_in.weight"}
    name = names.get(stored, f"{stored}.weight")
    part = load_file(tmp_path / "parts" / "3" / "model.safetensors")
    assert_same_bits({name: part[name]}, {name: weight})


def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("gpt_neox."): tensor for name, tensor in tensors.items()}


def parameters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As training code saves them: they want gradients, and some are transposed views."""
    return {
        name: torch.nn.Parameter(t.t().contiguous().t() if t.dim() == 2 else t)
        for name, t in tensors.items()
    }


# Kind -> config.json, what is stored, in which form.
ODD_SOURCES: dict[str, tuple[dict[str, Any], Callable[[Any], Any], str]] = {
    "names without the prefix": ({}, bare, "safetensors"),
    "the same, tied": ({"tie_word_embeddings": True}, bare, "safetensors"),
    "a head that differs from its tied embedding": (
        {"tie_word_embeddings": True},
        lambda t: t | {"embed_out.weight": t["gpt_neox.embed_in.weight"] + 1},
        "safetensors",
    ),
    "parameters": ({}, parameters, "bin"),
    "the world size of an earlier cut": ({"world_size": 4}, dict, "safetensors"),
    "an index of more than there is": ({}, dict, "sharded"),
}


@pytest.mark.parametrize("kind", ODD_SOURCES)
def test_parts_of_an_odd_source_load_as_it_does(kind: str, tmp_path: Path) -> None:
    keys, change, form = ODD_SOURCES[kind]
    config = CONFIG | keys
    tensors = {n: t.nan_to_num(0, 1, 1) for n, t in random_tensors(config, torch.float32).items()}
    stored = change(tensors)
    source = write_tensors(tmp_path / "model", stored, config, form)
    if form == "sharded":
        index = source / "model.safetensors.index.json"
        where = json.loads(index.read_text())
        where["weight_map"]["ghost.attention.bias"] = "model-00001-of-00002.safetensors"
        index.write_text(json.dumps(where))
        repeated = load_file(source / "model-00002-of-00002.safetensors")
        repeated["gpt_neox.embed_in.weight"] = tensors["gpt_neox.embed_in.weight"]
        save_file(repeated, source / "model-00002-of-00002.safetensors", {"format": "pt"})
    cut_checkpoint(source, tmp_path / "parts", 2)
    for rank in range(2):
        group = TensorParallelGroup(rank, 2)
        expected = loaded(source, group)
        assert_same_bits(loaded(tmp_path / "parts" / str(rank), group), expected)
    merge_checkpoint(tmp_path / "parts", tmp_path / "joined")
    expected = {name: t.detach() for name, t in stored.items()}
    assert_same_bits(load_file(tmp_path / "joined" / "model.safetensors"), expected)
    whole = TensorParallelGroup()
    assert_same_bits(loaded(tmp_path / "joined", whole), loaded(source, whole))


def loaded(path: Path, group: TensorParallelGroup) -> dict[str, Tensor]:
    """Every parameter that a rank holds after loading."""
    model = GPTNeoX(ModelConfig.from_pretrained(path), RoomyDevice(), group)
    load_model(model, path, torch.float32)
    found = {}
    for owner, module in model.named_modules():
        for key, _ in module.named_parameters(recurse=False):
            holder = module.packed if isinstance(module, Linear) else module
            found[f"{owner}.{key}"] = getattr(holder, key).data
    return found


class RoomyDevice(Device):
    """The base class with memory: weights stay readable after loading."""

    def memory(self) -> Memory:
        return Memory(1 << 40, 1 << 40, 0)


@pytest.mark.parametrize("keys", [{"quantize": "w8a8"}, {"num_hidden_layers": 3}])
def test_a_source_that_would_not_load_is_not_cut(keys: dict[str, Any], tmp_path: Path) -> None:
    source = write_tensors(tmp_path / "model", random_tensors(CONFIG, torch.float16), CONFIG | keys)
    with pytest.raises(CheckpointError, match=r"is quantized|lacks 12 tensors"):
        cut_checkpoint(source, tmp_path / "parts", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_row_parallel_biases_sum_exactly(
    dtype: torch.dtype, world_size: int, tmp_path: Path
) -> None:
    """Thirds and the smallest numbers, where 1/N of a bias on each rank would round."""
    tensors = random_tensors(CONFIG, dtype)
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # subnormal
    biases = {n: t for n, t in tensors.items() if re.search(r"\.dense(_4h_to_h)?\.bias$", n)}
    assert len(biases) == 4
    for name, tensor in biases.items():
        biases[name] = torch.linspace(-1 / 3, 1000 / 3, len(tensor), dtype=dtype)
        biases[name][::3] = smallest
    source = write_tensors(tmp_path / "model", tensors | biases, CONFIG)
    cut_checkpoint(source, tmp_path / "parts", world_size)
    files = [tmp_path / "parts" / str(r) / "model.safetensors" for r in range(world_size)]
    parts = [load_file(file) for file in files]
    for name, bias in biases.items():
        assert torch.equal(torch.stack([part[name] for part in parts]).sum(0), bias)


# Contract 2.2: the shapes of GPT-NeoX-20B.
TABLE = {
    "attention.query_key_value.weight": ([9216, 6144], [4608, 6144], [2304, 6144]),
    "attention.query_key_value.bias": ([9216], [4608], [2304]),
    "attention.dense.weight": ([6144, 3072], [6144, 1536], [6144, 768]),
    "attention.dense.bias": ([6144], [6144], [6144]),
    "mlp.dense_h_to_4h.weight": ([12288, 6144], [6144, 6144], [3072, 6144]),
    "mlp.dense_h_to_4h.bias": ([12288], [6144], [3072]),
    "mlp.dense_4h_to_h.weight": ([6144, 12288], [6144, 6144], [6144, 3072]),
    "mlp.dense_4h_to_h.bias": ([6144], [6144], [6144]),
    "input_layernorm.weight": ([6144], [6144], [6144]),
    "post_attention_layernorm.bias": ([6144], [6144], [6144]),
    "embed_out.weight": ([25216, 6144], [12608, 6144], [6304, 6144]),
    "gpt_neox.embed_in.weight": ([50432, 6144], [50432, 6144], [50432, 6144]),
}


def test_shapes_of_the_20b_model() -> None:
    full = full_shapes(ModelConfig.from_dict(CONFIG_20B))
    assert full["gpt_neox.layers.43.attention.query_key_value.weight"] == (18432, 6144)
    for short, by_size in TABLE.items():
        name = short if short in full else f"gpt_neox.layers.17.{short}"
        for world_size, expected in zip((2, 4, 8), by_size, strict=True):
            dim = cut_dimension(name, full[name], {}, world_size)
            assert list(part_shape(dim, full[name], world_size)) == expected
            for rank in range(world_size):
                index = rank_slice(dim, full[name], rank, world_size)
                if expected == list(full[name]):
                    assert index == ()
                    continue
                size = expected[dim]
                assert index[-1] == slice(rank * size, (rank + 1) * size)
                assert index[:-1] == (slice(None),) * dim


# -- what a part holds besides weights -----------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small checkpoint with everything that lies beside weights."""
    path = write_tensors(
        tmp_path / "model", random_tensors(CONFIG, torch.float16), CONFIG, "sharded"
    )
    write_tokenizer(path)
    for name in ("generation_config.json", "special_tokens_map.json"):
        (path / name).write_text('{"eos_token_id": 0}')
    (path / "merges.txt").write_text("a b\n")
    (path / "configuration_gpt_neox.py").write_text("# theirs\n")
    (path / "modeling_gpt_neox_ascend.py").write_text("raise SystemExit('of an older toolkit')\n")
    (path / "flax_model.msgpack").write_bytes(b"\0" * 100)
    (path / "runs").mkdir()
    return path


def test_each_part_is_complete_in_itself(source: Path, tmp_path: Path) -> None:
    manifest = cut_checkpoint(source, tmp_path / "parts", 4)
    assert manifest == read_manifest(tmp_path / "parts")
    assert manifest.source.keys() == {p.name for p in source.glob("*.safetensors")}
    for rank in range(4):
        part = tmp_path / "parts" / str(rank)
        assert {p.name for p in part.iterdir()} == {
            *("config.json", "model.safetensors", "modeling_gpt_neox_ascend.py"),
            *("tokenizer.json", "tokenizer_config.json", "merges.txt"),
            *("generation_config.json", "special_tokens_map.json", "configuration_gpt_neox.py"),
        }
        for name in ("tokenizer.json", "merges.txt", "generation_config.json"):
            assert (part / name).read_bytes() == (source / name).read_bytes()
        modeling = "modeling_gpt_neox_ascend.py"
        assert (part / modeling).read_bytes() == (REPO / modeling).read_bytes()
        config = json.loads((part / "config.json").read_text(encoding="utf-8"))
        auto_map = {"AutoModelForCausalLM": "modeling_gpt_neox_ascend.GPTNeoXForCausalLM"}
        assert config == CONFIG | {"world_size": 4, "auto_map": auto_map}
        assert ModelConfig.from_pretrained(part).part_world_size == 4
        with safe_open(part / "model.safetensors", "pt") as file:
            assert file.metadata()["cut_id"] == manifest.cut_id
            assert file.metadata()["format"] == "pt"


def test_a_source_that_nobody_may_write_to(source: Path, tmp_path: Path) -> None:
    for path in (*source.iterdir(), source):
        path.chmod(path.stat().st_mode & ~0o222)
    before = {path: path.stat() for path in source.iterdir()}
    cut_checkpoint(source, tmp_path / "parts", 2)
    assert {path: path.stat().st_mtime_ns for path in source.iterdir()} == {
        path: stat.st_mtime_ns for path, stat in before.items()
    }
    source.chmod(0o755)


# -- what is refused, and what it leaves ---------------------------------------------------------


def assert_nothing_written(tmp_path: Path) -> None:
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize(
    ("heads", "world_size", "valid"),
    [
        *((64, n, "1, 2, 4, 8, 16, 32, 64") for n in (3, 0, -2, 5, 128)),
        (22, 4, "1, 2, 11, 22"),
    ],
)
def test_world_sizes_are_refused_before_weights_are_read(
    heads: int, world_size: int, valid: str, tmp_path: Path, capsys
) -> None:
    """The folder holds no weights, but the message is about the world size."""
    path = tmp_path / "model"
    path.mkdir()
    keys = {"num_attention_heads": heads, "hidden_size": heads * 32}
    config = CONFIG_20B | keys | {"intermediate_size": heads * 128}
    (path / "config.json").write_text(json.dumps(config))
    named = f"world_size {world_size} does not divide {heads} attention heads .*; use {valid}"
    with pytest.raises(ConfigError, match=f"{named}$"):
        cut_checkpoint(path, tmp_path / "parts", world_size)
    argv = ["--input_path", path, "--output_path", tmp_path / "parts", "--world_size", world_size]
    assert cut_model_util.main([str(a) for a in argv]) == 2
    shown = capsys.readouterr()
    assert re.fullmatch(f"error: {named}\n", shown.err)
    assert shown.out == ""
    assert_nothing_written(tmp_path)


def test_a_cut_that_is_there_stays_unless_recut(source: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    first = cut_checkpoint(source, parts, 2)
    with pytest.raises(FileExistsError, match="--recut"):
        cut_checkpoint(source, parts, 4)
    with pytest.raises(ConfigError):
        cut_checkpoint(source, parts, 3, recut=True)
    (source / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError):
        cut_checkpoint(source, parts, 4, recut=True)
    assert read_manifest(parts) == first
    (tmp_path / "config.json").rename(source / "config.json")
    second = cut_checkpoint(source, parts, 4, recut=True)
    assert read_manifest(parts) == second
    assert second.cut_id != first.cut_id
    assert sorted(p.name for p in parts.iterdir()) == ["0", "1", "2", "3", "manifest.json"]


def test_a_part_is_not_cut_again(source: Path, tmp_path: Path) -> None:
    cut_checkpoint(source, tmp_path / "parts", 2)
    with pytest.raises(CheckpointError, match="is itself a part"):
        cut_checkpoint(tmp_path / "parts" / "0", tmp_path / "again", 2)


def test_command_line(source: Path, tmp_path: Path, capsys) -> None:
    """The words that users of the original wait for, on stdout; and the check of launchers."""
    parts, joined = str(tmp_path / "parts"), str(tmp_path / "joined")
    cut = ["--input_path", str(source), "--output_path", parts, "--world_size", "4"]
    assert cut_model_util.main([*cut, "--check"]) == 3
    assert "no complete cut" in capsys.readouterr().out
    assert cut_model_util.main(cut) == 0
    saved = "Tensor parallelism weights have been successfully saved."
    assert capsys.readouterr().out.splitlines() == [saved]
    assert cut_model_util.main([*cut, "--check"]) == 0
    assert capsys.readouterr().out == ""
    assert cut_model_util.main(cut) == 1
    assert "exists; --recut replaces it" in capsys.readouterr().err
    assert cut_model_util.main([*cut, "--recut"]) == 0
    merge = ["--merge", "--input_path", parts, "--output_path", joined]
    assert cut_model_util.main(merge) == 0
    assert "successfully joined" in capsys.readouterr().out
    assert cut_model_util.main(merge) == 1
    assert cut_model_util.main([*merge, "--recut"]) == 0
    for empty in ("--input_path", "--output_path"):
        with pytest.raises(SystemExit):
            cut_model_util.main([*cut, "--recut", empty, ""])
        assert f"argument {empty}: it is empty" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        cut_model_util.main(["--input_path", str(source)])
    assert usage.value.code == 2


# -- what is never replaced ----------------------------------------------------------------------


def contents(folder: Path) -> dict[str, Any]:
    """Everything below a folder: bytes of files, targets of links, names of folders."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        what = path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes()
        found[str(path.relative_to(folder))] = what
    return found


def a_foreign_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"name": "web app", "version": "1"}')
    (path / "index.html").write_text("<p>")


def the_tmp_of_somebody(path: Path) -> None:
    path.rmdir()
    for suffix in (".tmp", ".old"):
        path.with_name(path.name + suffix).mkdir()
        (path.with_name(path.name + suffix) / "thesis.tex").write_text("years of work")


def notes_in_a_cut(path: Path) -> None:
    cut_checkpoint(path.parent / "model", path, 2)
    (path / "0" / "notes.txt").write_text("which beam width was best")


def a_folder_in_a_cut(path: Path) -> None:
    cut_checkpoint(path.parent / "model", path, 2)
    (path / "lora").mkdir()


def a_joined_checkpoint(path: Path) -> None:
    cut_checkpoint(path.parent / "model", path.parent / "its parts", 2)
    merge_checkpoint(path.parent / "its parts", path)


def half_a_cut_of_another_tool(path: Path) -> None:
    (path / "0").mkdir()
    (path / "0" / "pytorch_model.bin").write_bytes(b"weights")


def a_checkpoint(path: Path) -> None:
    path.rmdir()
    write_tensors(path, random_tensors(CONFIG, torch.float32), CONFIG)


FOREIGN: dict[str, Callable[[Path], Any]] = {
    "a file in it": lambda path: (path / "thesis.tex").write_text("years of work"),
    "a hidden folder in it": lambda path: (path / ".git").mkdir(),
    "an empty folder in it": lambda path: (path / "0").mkdir(),
    "a link in it": lambda path: (path / "0").symlink_to(path.parent / "model"),
    "a dangling link in it": lambda path: (path / "manifest.json").symlink_to("nowhere"),
    "another checkpoint": a_checkpoint,
    "another tool's cut": half_a_cut_of_another_tool,
    "another manifest": a_foreign_manifest,
    "a joined checkpoint": a_joined_checkpoint,
    "notes in a part": notes_in_a_cut,
    "a folder in a cut": a_folder_in_a_cut,
    "a file": lambda path: (path.rmdir(), path.write_text("years of work")),
}


@pytest.mark.parametrize("recut", [False, True])
@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_not_ours_is_never_replaced(
    what: str, recut: bool, source: Path, tmp_path: Path, capsys
) -> None:
    """With --recut or without, nothing changes, and --recut is not recommended."""
    parts = tmp_path / "parts"
    parts.mkdir()
    FOREIGN[what](parts)
    before = contents(tmp_path)
    argv = ["--input_path", str(source), "--output_path", str(parts), *["--recut"] * recut]
    assert cut_model_util.main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {parts} ")
    assert "name a" in error
    assert "--recut" not in error
    assert contents(tmp_path) == before


@pytest.mark.parametrize("recut", [False, True])
@pytest.mark.parametrize("what", [*FOREIGN, "a cut"])
def test_joining_replaces_nothing_but_its_own(
    what: str, recut: bool, source: Path, tmp_path: Path
) -> None:
    joined, parts = tmp_path / "joined", tmp_path / "parts"
    if what == "a cut":
        cut_checkpoint(source, joined, 2)
    elif what == "a joined checkpoint":
        a_joined_checkpoint(joined)
        (joined / "model.safetensors").unlink()
        merge_again = load_file(source / sorted(p.name for p in source.glob("*.safetensors"))[0])
        save_file(merge_again, joined / "model.safetensors")  # trained on, and saved by others
    else:
        joined.mkdir()
        FOREIGN[what](joined)
    cut_checkpoint(source, parts, 2)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"never replaced|did not write|is a file"):
        merge_checkpoint(parts, joined, recut=recut)
    assert contents(tmp_path) == before


def test_files_beside_a_joined_checkpoint_are_kept(source: Path, tmp_path: Path) -> None:
    joined = tmp_path / "joined"
    a_joined_checkpoint(joined)
    (joined / "eval.csv").write_text("1")
    with pytest.raises(FileExistsError, match=r"also holds eval\.csv, which .* move"):
        merge_checkpoint(tmp_path / "its parts", joined, recut=True)
    (joined / "eval.csv").unlink()
    with pytest.raises(FileExistsError, match="exists; --recut replaces it"):
        merge_checkpoint(tmp_path / "its parts", joined)
    merge_checkpoint(tmp_path / "its parts", joined, recut=True)
    # what is joined can be cut again, and is the same checkpoint
    cut_checkpoint(joined, tmp_path / "again", 2)
    again, first = (load_file(tmp_path / n / "1" / PART_FILE) for n in ("again", "its parts"))
    assert_same_bits(again, first)


def test_siblings_are_left_alone(source: Path, tmp_path: Path) -> None:
    """parts.tmp and parts.old are somebody's folders, whatever earlier versions called so."""
    parts = tmp_path / "parts"
    parts.mkdir()
    the_tmp_of_somebody(parts)
    before = contents(tmp_path)
    cut_checkpoint(source, parts, 2)
    cut_checkpoint(source, parts, 4, recut=True)
    assert read_manifest(parts).world_size == 4
    shutil.rmtree(parts)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("recut", [False, True])
@pytest.mark.parametrize(
    "output",
    ["model", ".", "model/..", "link", "link to all", "model/../model/", "/", "joined files"],
)
def test_input_and_output_are_apart(
    output: str, recut: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also through links, and where the weights alone are links into the output."""
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "link to all").symlink_to(tmp_path)
    if output == "joined files":
        target = tmp_path / output
        target.mkdir()
        for file in source.glob("*.safetensors"):
            file.rename(target / file.name)
            file.symlink_to(target / file.name)
    monkeypatch.chdir(tmp_path)
    before = contents(source)
    with pytest.raises(ValueError, match=r"is or contains .*, which is read; name another folder"):
        cut_checkpoint(source, Path(output), 2, recut=recut)
    cut_checkpoint(source, source / "part_model", 2)
    for parts in (source / "part_model", tmp_path / "link" / "part_model"):
        if output != "joined files":
            with pytest.raises(ValueError, match="is read"):
                merge_checkpoint(parts, Path(output), recut=recut)
        for inside in ("part_model", "part_model/0", "part_model/joined"):
            with pytest.raises(ValueError, match="is read"):
                merge_checkpoint(parts, source / inside, recut=recut)
    shutil.rmtree(source / "part_model")
    assert contents(source) == before


@pytest.mark.parametrize("form", ["empty", "link", "link with a cut", "dangling link"])
def test_an_empty_folder_is_used_and_a_link_written_through(
    form: str, source: Path, tmp_path: Path
) -> None:
    parts, disk = source / "part_model", tmp_path / "big disk"
    if form == "empty":
        parts.mkdir(mode=0o750)
    else:
        parts.symlink_to(disk)
    if form in ("link", "link with a cut"):
        disk.mkdir(mode=0o750)
    before = parts.stat() if parts.exists() else None
    if form != "link with a cut":  # no parts, so the whole weights are run
        assert rank_directory(source, TensorParallelGroup(0, 2), prefer_parts=True) == source
    if form == "link with a cut":
        cut_checkpoint(source, disk, 4)
    manifest = cut_checkpoint(source, parts, 2, recut=form == "link with a cut")
    assert read_manifest(parts) == manifest
    assert sorted(p.name for p in parts.iterdir()) == ["0", "1", "manifest.json"]
    assert parts.is_symlink() == (form != "empty")
    assert rank_directory(source, TensorParallelGroup(1, 2), prefer_parts=True) == parts / "1"
    if before:  # as a mounted disk, which cannot be renamed
        assert parts.stat().st_ino == before.st_ino
        assert parts.stat().st_mode == before.st_mode


def test_a_cut_of_an_older_version_is_known(source: Path, tmp_path: Path) -> None:
    """Its manifest does not list the files."""
    parts = tmp_path / "parts"
    cut_checkpoint(source, parts, 4)
    manifest = json.loads((parts / "manifest.json").read_text(encoding="utf-8"))
    assert "0/model.safetensors" in manifest.pop("files")
    (parts / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert describe_mismatch(parts, source, 4) == ""
    (parts / "0" / "plot.png").touch()
    with pytest.raises(FileExistsError, match=r"also holds 0/plot\.png"):
        cut_checkpoint(source, parts, 2, recut=True)
    (parts / "0" / "plot.png").unlink()
    cut_checkpoint(source, parts, 2, recut=True)
    assert describe_mismatch(parts, source, 2) == ""


@pytest.mark.parametrize("num_moved", range(8))
def test_killed_while_files_are_moved(
    num_moved: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run knows what is ours by the list, also without --recut; notes stop it."""
    parts = tmp_path / "parts"
    cut_checkpoint(source, parts, 2)
    rename, moved = Path.rename, []

    def limited(self: Path, target: Path) -> Path:
        if len(moved) == num_moved:
            raise KeyboardInterrupt
        moved.append(self)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", limited)
    if num_moved < 6:  # three move out, three move in
        with pytest.raises(KeyboardInterrupt):
            cut_checkpoint(source, parts, 2, recut=True)
        with pytest.raises(CheckpointError) if num_moved else nullcontext():
            read_manifest(parts)
        monkeypatch.undo()
        (parts / "notes.txt").touch()
        with pytest.raises(FileExistsError, match=r"also holds notes\.txt"):
            cut_checkpoint(source, parts, 2, recut=True)
        (parts / "notes.txt").unlink()
    cut_checkpoint(source, parts, 2, recut=num_moved in (0, 6, 7))
    assert describe_mismatch(parts, source, 2) == ""
    assert sorted(p.name for p in parts.iterdir()) == ["0", "1", "manifest.json"]


def test_ctrl_c_leaves_nothing(source: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", interrupt)
    argv = ["--input_path", str(source), "--output_path", str(tmp_path / "parts")]
    assert cut_model_util.main(argv) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("output", ["file/parts", "loop"])
def test_a_folder_that_cannot_be_made(output: str, source: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    argv = ["--input_path", str(source), "--output_path", str(tmp_path / output)]
    assert cut_model_util.main(argv) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*/{output} cannot be written: .*; name another folder\n", error)


def test_without_file_locks_it_is_said_and_done(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    """A network file system without flock is not another process."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    cut_checkpoint(source, tmp_path / "parts", 2)
    assert describe_mismatch(tmp_path / "parts", source, 2) == ""
    assert [r.getMessage() for r in caplog.records if "no file locks" in r.getMessage()]


# -- is it complete, and of this model -----------------------------------------------------------


@pytest.fixture
def parts(source: Path, tmp_path: Path) -> Path:
    path = tmp_path / "parts"
    cut_checkpoint(source, path, 2)
    return path


def damage_no_manifest(parts: Path, _source: Path) -> None:
    (parts / "manifest.json").unlink()


def damage_half_a_manifest(parts: Path, _source: Path) -> None:
    text = (parts / "manifest.json").read_text()
    (parts / "manifest.json").write_text(text[: len(text) // 2])


def damage_a_manifest_of_something_else(parts: Path, _source: Path) -> None:
    (parts / "manifest.json").write_text('{"name": "web app"}')


def damage_rank_folder_missing(parts: Path, _source: Path) -> None:
    shutil.rmtree(parts / "1")


def damage_weights_missing(parts: Path, _source: Path) -> None:
    (parts / "0" / "model.safetensors").unlink()


def damage_truncated(parts: Path, _source: Path) -> None:
    file = parts / "1" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def damage_mixed(parts: Path, source: Path) -> None:
    """A part of the same model, from another cut."""
    other = parts.with_name("other")
    cut_checkpoint(source, other, 2)
    shutil.rmtree(parts / "1")
    (other / "1").rename(parts / "1")


DAMAGES: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "no manifest": (damage_no_manifest, "no complete cut"),
    "half a manifest": (damage_half_a_manifest, "manifest.json"),
    "another manifest": (damage_a_manifest_of_something_else, "manifest.json is damaged"),
    "folder missing": (damage_rank_folder_missing, "1/model.safetensors is missing"),
    "weights missing": (damage_weights_missing, "0/model.safetensors is missing"),
    "truncated": (damage_truncated, "1/model.safetensors is damaged"),
    "mixed": (damage_mixed, "1/model.safetensors is of another cut"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_cut_is_refused(name: str, parts: Path, source: Path, tmp_path: Path, capsys):
    """The loader, --merge and the launchers' check refuse it; --recut repairs what it knows."""
    damage, named = DAMAGES[name]
    damage(parts, source)
    with pytest.raises(CheckpointError, match=re.escape(named)):
        read_manifest(parts)
    assert named in describe_mismatch(parts, source, 2)
    with pytest.raises(CheckpointError, match=re.escape(named)):
        merge_checkpoint(parts, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()
    arguments = ["--input_path", str(source), "--output_path", str(parts), "--world_size", "2"]
    is_known = "manifest" not in name
    assert cut_model_util.main([*arguments, "--check"]) == (3 if is_known else 1)
    assert (named if is_known else "never replaced") in capsys.readouterr().out
    before = contents(parts)
    assert cut_model_util.main([*arguments, "--recut"]) == (0 if is_known else 1)
    if is_known:
        assert describe_mismatch(parts, source, 2) == ""
    else:
        assert contents(parts) == before


def test_a_cut_of_another_model_is_noticed(parts: Path, source: Path) -> None:
    """By content: the date of a file alone changes nothing."""
    assert "was cut for 2 ranks, not 4" in describe_mismatch(parts, source, 4)
    file = sorted(source.glob("*.safetensors"))[1]
    content = bytearray(file.read_bytes())
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))
    assert describe_mismatch(parts, source, 2) == ""
    content[-1] ^= 1
    file.write_bytes(content)
    assert f"cut from another {file.name}" in describe_mismatch(parts, source, 2)
    content[-1] ^= 1
    file.write_bytes(content)
    assert describe_mismatch(parts, source, 2) == ""
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(file.name, "more.safetensors"))
    file.rename(source / "more.safetensors")
    assert "cut from other files" in describe_mismatch(parts, source, 2)


def test_another_config_is_noticed(parts: Path, source: Path) -> None:
    """The parts hold a copy, so a change in the source would do nothing."""
    text = json.dumps(CONFIG | {"rotary_pct": 0.25}, ensure_ascii=False)
    (source / "config.json").write_text(text, encoding="utf-8")
    assert "config.json" in describe_mismatch(parts, source, 2)


# -- interrupted, crowded out, or at the same time -----------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents without what differs between two cuts: their id."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            found[str(path.relative_to(folder))] = re.sub(rb'"cut_id": ?"\w+"', b"", content)
    return found


@pytest.mark.parametrize("stage", ["hashing", "writing the last part"])
def test_a_killed_cut_is_never_taken_for_complete(stage: str, tmp_path: Path) -> None:
    """A cut ends by SIGKILL and is run again: the result is that of an undisturbed cut."""
    source, _ = write_large(tmp_path / "model", num_layers=4)
    parts = tmp_path / "parts"
    temporary = parts / UNFINISHED / "new"
    wanted = temporary if stage == "hashing" else temporary / "1" / "model.safetensors"
    process = ranks.start_process(cut_checkpoint, source, parts, 2)
    end = time.monotonic() + 60
    while not wanted.exists():
        assert process.is_alive(), "it finished before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode < 0, "it finished before it could be killed"
    assert temporary.exists(), "the kill came too late to test anything"
    for folder in (parts, temporary):
        assert "no complete cut" in describe_mismatch(folder, source, 2)
        with pytest.raises(CheckpointError, match="no complete cut"):
            merge_checkpoint(folder, tmp_path / "joined")

    cut_checkpoint(source, parts, 2)
    cut_checkpoint(source, tmp_path / "left alone", 2)
    assert files_of(parts) == files_of(tmp_path / "left alone")
    assert not temporary.exists()


def test_two_cuts_at_once(source: Path, tmp_path: Path) -> None:
    """The second steps back and leaves the first one's files alone."""
    half = tmp_path / "parts" / UNFINISHED / "new" / "0" / "half"
    half.mkdir(parents=True)
    with (tmp_path / "parts" / UNFINISHED / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match=r"another process is writing .*parts; wait"):
            cut_checkpoint(source, tmp_path / "parts", 2)
        assert half.exists()
    cut_checkpoint(source, tmp_path / "parts", 2)
    assert not half.exists()


def cut_with_little_room(source: Path, target: Path, result: Path) -> None:
    """In a process of its own: no file may grow beyond 1 MB, as on a disk that fills up."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    sys.stderr = result.open("w")
    arguments = ["--input_path", str(source), "--output_path", str(target), "--recut"]
    status = cut_model_util.main(arguments)
    sys.stderr.write(f"{status}\n")
    sys.stderr.flush()


def test_a_write_that_fails_half_way(source: Path, tmp_path: Path) -> None:
    """It says so in one line, ends with status 1, leaves no file and keeps the older cut whole."""
    large, _ = write_large(tmp_path / "large", num_layers=1)
    target = tmp_path / "parts"
    before = cut_checkpoint(source, target, 2)
    process = ranks.start_process(cut_with_little_room, large, target, tmp_path / "result")
    process.join(60)
    error, status = (tmp_path / "result").read_text().splitlines()
    assert status == "1"
    assert re.match(r"error: .*File too large", error)
    assert read_manifest(target) == before
    assert {p.name for p in tmp_path.iterdir()} == {"model", "large", "parts", "result"}


def write_sparse(path: Path, num_bytes: int) -> None:
    """A checkpoint whose embedding claims to take so many bytes, with a hole for data."""
    path.mkdir()
    config = CONFIG | {"hidden_size": 8192, "num_hidden_layers": 1}
    config["vocab_size"] = num_bytes // (4 * 8192)
    (path / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in full_shapes(ModelConfig.from_dict(config)).items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file = path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + end)


def test_a_disk_that_is_too_small(tmp_path: Path, capsys) -> None:
    """The message has both sizes and comes before anything is written."""
    free = shutil.disk_usage(tmp_path).free
    if free > 4 << 40:
        pytest.skip("more than 4 TiB are free here: no such checkpoint can be pretended")
    write_sparse(tmp_path / "model", free // 2)  # which two ranks hold twice, as it is not cut
    places = ["--input_path", str(tmp_path / "model"), "--output_path", str(tmp_path / "parts")]
    status = cut_model_util.main(places)
    error = capsys.readouterr().err
    assert status == 1
    found = re.fullmatch(
        r"error: not enough room in .*: (\d+) bytes \(.* GiB\) are needed, (\d+) \(.*\) are free\n",
        error,
    )
    assert found, error
    needed, seen = map(int, found.groups())
    assert needed > seen
    assert abs(seen - free) < 5 << 30  # others write here too
    assert_nothing_written(tmp_path)


MEASURE = """
import sys
from pathlib import Path
from gptneox.weights.cut import cut_checkpoint, merge_checkpoint

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(key))

before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # VmHWM starts anew
source, parts, joined = map(Path, sys.argv[1:])
cut_checkpoint(source, parts, 8)
print(status("VmHWM") - before)
merge_checkpoint(parts, joined)
print(status("VmHWM") - before)
"""


def test_memory_stays_near_one_tensor(tmp_path: Path) -> None:
    """The checkpoint has 300 MB; the mapped pages of all eight parts count together."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the kernel keeps no peak that can be reset")
    source, largest = write_large(tmp_path / "model", num_layers=12)
    assert sum(f.stat().st_size for f in source.glob("*.safetensors")) > 300_000_000
    places = [source, tmp_path / "parts", tmp_path / "joined"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *places],
        env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for peak in map(int, done.stdout.split()):
        assert peak <= 4 * largest + (150 << 20)
