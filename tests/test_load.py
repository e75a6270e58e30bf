# SPDX-License-Identifier: Apache-2.0
"""Weight files as they arrive: damaged, incomplete, hostile, linked, or larger than the memory."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import pickle
import random
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import checkpoints as twins
from support.checkpoints import copy_checkpoint
from support.processes import REPO, clean_environ
from transformers import GPTNeoXForCausalLM

from gptneox.config.model import ModelConfig
from gptneox.devices.device import Device, Memory
from gptneox.layers import Linear
from gptneox.model import GPTNeoX
from gptneox.weights.load import Checkpoint, CheckpointError, load_model
from gptneox.weights.size import full_shapes

NAME = "model.safetensors"
SMALL = twins.FAMILY["relu-serial"] | {"num_hidden_layers": 1}


class PlainDevice(Device):
    """The base class with the memory its test says: weights stay readable after loading."""

    def __init__(self, free: int = 1 << 40) -> None:
        super().__init__()
        self.free = free

    def memory(self) -> Memory:
        return Memory(self.free, self.free, 0)


def load(path: Path, free: int = 1 << 40, dtype: torch.dtype = torch.float32) -> GPTNeoX:
    model = GPTNeoX(ModelConfig.from_pretrained(path), PlainDevice(free))
    load_model(model, path, dtype)
    return model


def weights(model: GPTNeoX) -> dict[str, torch.Tensor]:
    """Every loaded tensor by its name in the files."""
    found = {}
    for owner, module in model.named_modules():
        for key, _ in module.named_parameters(recurse=False):
            holder = module.packed if isinstance(module, Linear) else module
            found[f"{owner}.{key}"] = getattr(holder, key).data
    return found


def assert_loads_like_transformers(path: Path) -> dict[str, torch.Tensor]:
    """Every parameter equals that of transformers' model; returns them."""
    theirs, info = GPTNeoXForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"], "transformers itself does not find these"
    found = weights(load(path))
    expected = dict(theirs.named_parameters(remove_duplicate=False))
    expected["embed_out.weight"] = expected.pop("lm_head.weight")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].float()), name
    return found


def assert_loads_equal(path: Path, original: dict[str, torch.Tensor]) -> None:
    loaded = weights(load(path))
    assert loaded.keys() == original.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, original[name]), name


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small checkpoint in one safetensors file; do not write into it."""
    directory = tmp_path_factory.mktemp("source") / "checkpoint"
    twins.write_checkpoint(directory, SMALL)
    return directory


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sharded") / "checkpoint"
    twins.write_checkpoint(directory, SMALL | {"num_hidden_layers": 3}, form="sharded")
    return directory


@pytest.fixture(scope="module")
def original(source: Path) -> dict[str, torch.Tensor]:
    return load_file(source / NAME)


@pytest.fixture
def copied(source: Path, tmp_path: Path) -> Path:
    return copy_checkpoint(source, tmp_path / "copied")


@pytest.fixture
def copied_shards(sharded: Path, tmp_path: Path) -> Path:
    return copy_checkpoint(sharded, tmp_path / "copied")


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def resident_mib(field: str = "VmHWM") -> float:
    """Peak (VmHWM) or present (VmRSS) memory of this process."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", text)[1]) / 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


# -- directories ---------------------------------------------------------------------------------


def test_loads_what_was_saved(source: Path, original: dict[str, torch.Tensor]) -> None:
    assert_loads_equal(source, original)
    assert set(original) == set(full_shapes(ModelConfig.from_pretrained(source)))


def test_no_weights(copied: Path) -> None:
    (copied / NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights in .*safetensors.*\.bin"):
        Checkpoint(copied)


@pytest.mark.parametrize("name", ["with blanks in it", "重み-ü", "a'b\"c$(x)", "100%"])
def test_any_directory_name(
    source: Path, original: dict[str, torch.Tensor], tmp_path: Path, name: str
) -> None:
    assert_loads_equal(copy_checkpoint(source, tmp_path / name), original)


def test_symlinked_weights(source: Path, original: dict[str, torch.Tensor], tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in source.iterdir():
        (linked / file.name).symlink_to(file)
    assert_loads_equal(linked, original)
    (tmp_path / "directory").symlink_to(source, target_is_directory=True)
    assert_loads_equal(tmp_path / "directory", original)


def test_dangling_symlink_is_a_missing_file(copied: Path) -> None:
    (copied / NAME).unlink()
    (copied / NAME).symlink_to(copied / "gone")
    with pytest.raises((FileNotFoundError, CheckpointError), match=NAME):
        load(copied)


def test_read_only_directory(copied: Path, original: dict[str, torch.Tensor]) -> None:
    before = sorted(copied.iterdir())
    for path in (*before, copied):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert_loads_equal(copied, original)
        assert sorted(copied.iterdir()) == before
    finally:
        copied.chmod(0o755)


# -- damaged safetensors -------------------------------------------------------------------------


def raw_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HOSTILE_FILES = {
    "empty": b"",
    "7 bytes": b"\0" * 7,
    "header length only": struct.pack("<Q", 100),
    "header length 2^63": raw_file({}, length=2**63),
    "header length 2^64-1": raw_file({}, length=2**64 - 1),
    "header length 2^40": raw_file({}, length=2**40),
    "header not UTF-8": raw_file(b"\xff\xfe\xfd" * 10),
    "header not JSON": raw_file(b"{model: 1}"),
    "header a list": raw_file([]),
    "header deep": raw_file(b"[" * 50_000),
    "overlap": raw_file({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12),
    "past the end": raw_file({"a": entry([1000], 0, 4000)}, b"\0" * 8),
    "hole": raw_file({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12),
    "unknown dtype": raw_file({"a": entry([1], 0, 4, "F33")}, b"\0" * 4),
    "bytes do not fit": raw_file({"a": entry([3], 0, 8)}, b"\0" * 8),
    "negative shape": raw_file({"a": entry([-1], 0, 4)}, b"\0" * 4),
    "shape overflows": raw_file({"a": entry([2**33, 2**33], 0, 4)}, b"\0" * 4),
    "huge shape": raw_file({"a": entry([2**40], 0, 2**42)}, b"\0" * 4),
    "backward offsets": raw_file({"a": entry([1], 4, 0)}, b"\0" * 4),
    "rest of a file": raw_file({"a": entry([1], 0, 4)}, b"\0" * 400),
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
}


@pytest.mark.parametrize("kind", HOSTILE_FILES)
def test_hostile_files_are_refused_before_any_big_allocation(copied: Path, kind: str) -> None:
    (copied / NAME).write_bytes(HOSTILE_FILES[kind])
    reset_peak()
    before = resident_mib("VmRSS")
    with pytest.raises(CheckpointError, match=NAME):
        load(copied)
    assert resident_mib() - before < 64


@pytest.mark.parametrize("size", [1 << 31, 1 << 40])
def test_a_sparse_file_is_refused_by_its_shape(copied: Path, size: int) -> None:
    """Sizes that are consistent, on a file that takes no room on the disk."""
    with (copied / NAME).open("wb") as file:
        file.write(raw_file({"gpt_neox.embed_in.weight": entry([size // 4], 0, size)}))
        file.truncate(file.tell() + size)
    reset_peak()
    before = resident_mib("VmRSS")
    # Where the kernel does not even map a terabyte, the file is named as well.
    with pytest.raises((CheckpointError, RuntimeError), match=rf"lacks|mmap.*{NAME}"):
        load(copied)
    assert resident_mib() - before < 64


def test_a_model_larger_than_memory_is_refused_with_both_numbers(copied: Path) -> None:
    needed = sum(math.prod(s) for s in full_shapes(ModelConfig.from_pretrained(copied)).values())
    load(copied, free=4 * needed)
    with pytest.raises(RuntimeError) as caught:
        load(copied, free=4 * needed - 1)
    assert re.search(r"[\d.]+ GiB needed in float32, [\d.]+ GiB free", str(caught.value))
    load(copied, free=2 * needed, dtype=torch.bfloat16)


def test_a_huge_consistent_checkpoint_is_refused_before_it_is_read(copied: Path) -> None:
    """config.json and header agree on 4 GB; nothing of that size may be allocated."""
    config = SMALL | {"vocab_size": 700_000, "hidden_size": 768, "torch_dtype": "float32"}
    (copied / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in full_shapes(ModelConfig.from_dict(config)).items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = entry(list(shape), start, end)
    with (copied / NAME).open("wb") as file:
        file.write(raw_file(header))
        file.truncate(file.tell() + end)
    reset_peak()
    before = resident_mib("VmRSS")
    with pytest.raises(RuntimeError, match=r"4\.\d\d GiB needed .* 2\.00 GiB free"):
        load(copied, free=1 << 31)
    assert resident_mib() - before < 64


def test_bit_flips_in_the_header(copied: Path, original: dict[str, torch.Tensor]) -> None:
    """Every flip is an error or leaves the weights as they are; nothing else, and no crash."""
    path, rng = copied / NAME, random.Random(12)
    data = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", data[:8])[0]
    places = [(byte, bit) for byte in range(8) for bit in range(8)]
    places += [(rng.randrange(header_end), rng.randrange(8)) for _ in range(436)]
    num_refused = 0
    for byte, bit in places:
        damaged = bytearray(data)
        damaged[byte] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            loaded = weights(load(copied))
        except (CheckpointError, FileNotFoundError):
            num_refused += 1
        else:
            assert all(torch.equal(loaded[name], original[name]) for name in original), (byte, bit)
    assert num_refused > 400


def test_swapped_offsets_of_equal_shapes_are_not_our_business_but_order_is(
    copied: Path, original: dict[str, torch.Tensor]
) -> None:
    """The order of tensors in the file has no meaning: names decide."""
    save_file(dict(sorted(original.items(), reverse=True)), copied / NAME)
    assert_loads_equal(copied, original)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.uint8])
def test_weights_that_are_no_floats_are_refused(copied: Path, dtype: torch.dtype) -> None:
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    rewrite(copied / NAME, lambda t: t.update({name: t[name].to(dtype)}))
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}.*{str(dtype)[6:]}"):
        load(copied)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_is_converted(
    copied: Path, original: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    rewrite(copied / NAME, halve)
    assert_loads_equal(copied, {name: t.to(dtype).float() for name, t in original.items()})


# -- incomplete checkpoints ----------------------------------------------------------------------


def test_last_shard_truncated_by_one_byte(copied_shards: Path) -> None:
    last = sorted(copied_shards.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{last.name} is damaged"):
        load(copied_shards)


def test_all_missing_shards_are_named_once(copied_shards: Path) -> None:
    shards = sorted(copied_shards.glob("*.safetensors"))
    assert len(shards) >= 3
    shards[0].unlink()
    shards[2].unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load(copied_shards)
    assert str(caught.value).count(shards[0].name) == 1
    assert str(caught.value).count(shards[2].name) == 1
    assert shards[1].name not in str(caught.value)


def edit_index(path: Path, change: Callable[[dict[str, str]], None]) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def test_an_index_that_names_more_than_the_files_hold(copied_shards: Path) -> None:
    """Old buffers and the tied head stay in an index that somebody edited by hand."""
    file = next(copied_shards.glob("*.safetensors")).name
    layer = "gpt_neox.layers.0.attention"
    for name in (f"{layer}.masked_bias", f"{layer}.rotary_emb.inv_freq", "ghost"):
        edit_index(copied_shards, lambda names, name=name: names.update({name: file}))
    assert_loads_like_transformers(copied_shards)


def test_a_tensor_that_the_index_promises_and_no_file_holds(copied_shards: Path) -> None:
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.bias"
    where = json.loads((copied_shards / "model.safetensors.index.json").read_text())
    file = where["weight_map"][name]
    rewrite(copied_shards / file, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"lacks 1 tensors: {re.escape(name)}; .*{file}"):
        load(copied_shards)


def test_an_index_that_names_the_wrong_shards(copied_shards: Path) -> None:
    def swap(names: dict[str, str]) -> None:
        first = next(iter(names))
        second = next(n for n in names if names[n] != names[first])
        names[first], names[second] = names[second], names[first]

    edit_index(copied_shards, swap)
    assert_loads_like_transformers(copied_shards)


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": ["x"]}}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": ""}}',
    ],
)
def test_broken_index(copied_shards: Path, index: str) -> None:
    (copied_shards / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index\.json"):
        load(copied_shards)


@pytest.mark.parametrize("with_index", [True, False])
def test_the_same_tensor_in_two_files(copied_shards: Path, with_index: bool) -> None:
    """Equal values are one tensor; of different ones nobody can say which is meant."""
    first, second = sorted(copied_shards.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    rewrite(second, lambda tensors: tensors.update({name: tensor}))
    assert_loads_like_transformers(copied_shards)
    if not with_index:
        (copied_shards / "model.safetensors.index.json").unlink()
        load(copied_shards)
    rewrite(second, lambda tensors: tensors.update({name: tensor + 1}))
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is in both {first.name} and"):
        load(copied_shards)
    rewrite(second, lambda tensors: tensors.update({name: tensor.half()}))
    with pytest.raises(CheckpointError, match="different values"):
        load(copied_shards)


def test_shards_without_an_index(copied_shards: Path, sharded: Path) -> None:
    (copied_shards / "model.safetensors.index.json").unlink()
    expected = weights(load(sharded))
    assert_loads_equal(copied_shards, expected)


def test_all_missing_tensors_are_named(copied: Path) -> None:
    gone = ["gpt_neox.layers.0.attention.dense.bias", "gpt_neox.final_layer_norm.weight"]
    rewrite(copied / NAME, lambda tensors: [tensors.pop(name) for name in gone])
    with pytest.raises(CheckpointError, match="lacks 2 tensors") as caught:
        load(copied)
    assert all(str(caught.value).count(name) == 1 for name in gone)


def test_wrong_shape_is_refused(copied: Path) -> None:
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    rewrite(copied / NAME, lambda t: t.update({name: t[name].T.contiguous()}))
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is \[96, 288\], expected \[288"):
        load(copied)


def test_fewer_layers_than_config_says(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text()) | {"num_hidden_layers": 3}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lacks 24 tensors: .*and 4 more"):
        load(copied)


def test_old_buffers_are_ignored_and_strangers_reported(
    copied: Path, original: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    layer = "gpt_neox.layers.0.attention"
    buffers = {
        f"{layer}.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        f"{layer}.masked_bias": torch.tensor(-1e9),
        f"{layer}.rotary_emb.inv_freq": torch.ones(4),
    }
    rewrite(copied / NAME, lambda tensors: tensors.update(buffers))
    with caplog.at_level(logging.WARNING):
        assert_loads_equal(copied, original)
    assert not caplog.records
    rewrite(copied / NAME, lambda tensors: tensors.update({"stranger": torch.ones(1)}))
    with caplog.at_level(logging.WARNING):
        assert_loads_equal(copied, original)
    assert "ignored unknown stranger" in caplog.text


def tie(path: Path) -> None:
    edit_config(path, tie_word_embeddings=True)


def edit_config(path: Path, **keys: Any) -> None:
    config = json.loads((path / "config.json").read_text()) | keys
    (path / "config.json").write_text(json.dumps(config))


HEAD, EMBEDDING = "embed_out.weight", "gpt_neox.embed_in.weight"


@pytest.mark.parametrize("kept", ["both", "embed_in", "embed_out", "lm_head"])
def test_tied_embeddings_under_any_name(
    copied: Path,
    original: dict[str, torch.Tensor],
    kept: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tie(copied)
    table = original[EMBEDDING]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD] = table.clone()
        if kept in ("embed_in",):
            del tensors[HEAD]
        if kept in ("embed_out", "lm_head"):
            del tensors[EMBEDDING]
        if kept == "lm_head":
            tensors["lm_head.weight"] = tensors.pop(HEAD)

    rewrite(copied / NAME, change)
    loaded = assert_loads_like_transformers(copied)
    assert torch.equal(loaded[EMBEDDING], table)
    assert torch.equal(loaded[HEAD], table)
    assert not caplog.records


@pytest.mark.parametrize("name", [HEAD, "lm_head.weight"])
def test_a_stored_head_that_differs_from_its_tied_embedding_is_kept(
    copied: Path,
    original: dict[str, torch.Tensor],
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tie(copied)
    rewrite(copied / NAME, lambda tensors: tensors.update({name: tensors.pop(HEAD)}))
    loaded = assert_loads_like_transformers(copied)
    assert torch.equal(loaded[HEAD], original[HEAD])
    assert f"{name} and {EMBEDDING} differ" in caplog.text


def test_tied_embeddings_that_are_both_absent(copied: Path) -> None:
    tie(copied)
    rewrite(copied / NAME, lambda tensors: [tensors.pop(HEAD), tensors.pop(EMBEDDING)])
    with pytest.raises(CheckpointError, match="lacks 2 tensors"):
        load(copied)


# -- names ---------------------------------------------------------------------------------------


RENAMED = {
    "without the prefix": lambda name: name.removeprefix("gpt_neox."),
    "prefix twice": lambda name: name if name == HEAD else f"gpt_neox.{name}",
    "prefix before the new head": lambda name: name.replace("embed_out", "gpt_neox.lm_head"),
}


@pytest.mark.parametrize("kind", RENAMED)
def test_names_that_transformers_understands(
    copied: Path, original: dict[str, torch.Tensor], kind: str
) -> None:
    save_file({RENAMED[kind](n): t for n, t in original.items()}, copied / NAME)
    assert_loads_like_transformers(copied)


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("lm_head.weight", HEAD),
        ("gpt_neox.lm_head.weight", HEAD),
        ("embed_in.weight", EMBEDDING),
        ("layers.0.attention.dense.bias", "gpt_neox.layers.0.attention.dense.bias"),
        ("final_layer_norm.bias", "gpt_neox.final_layer_norm.bias"),
    ],
)
def test_of_two_names_for_one_parameter_transformers_choice_is_loaded(
    copied: Path,
    original: dict[str, torch.Tensor],
    name: str,
    of: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save_file(original | {name: original[of] * 2}, copied / NAME)
    assert_loads_like_transformers(copied)
    assert "ignored unknown" in caplog.text


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "transformer.", "base_model.model.", "x"]
)
def test_other_prefixes_are_named(
    copied: Path, original: dict[str, torch.Tensor], prefix: str
) -> None:
    """transformers fills such a model at random."""
    save_file({prefix + name: tensor for name, tensor in original.items()}, copied / NAME)
    with pytest.raises(CheckpointError, match="lacks 16 tensors") as caught:
        load(copied)
    assert f"found 16 others: {prefix}embed_out.weight" in str(caught.value)
    assert f"without the prefix {prefix!r}" in str(caught.value)


def test_a_head_that_is_not_one(copied: Path, original: dict[str, torch.Tensor]) -> None:
    """A base model alone, or one with the head of another task."""
    for name in ("score.weight", "gpt_neox.embed_out.weight"):
        tensors = {n: t for n, t in original.items() if n != HEAD}
        save_file(tensors | {name: original[HEAD]}, copied / NAME)
        with pytest.raises(CheckpointError, match=rf"lacks 1 tensors: {HEAD}; found 1 .*{name}"):
            load(copied)


def test_the_world_size_of_an_earlier_cut_is_passed_over(
    copied: Path, original: dict[str, torch.Tensor]
) -> None:
    for world_size in (2, 3, None):
        edit_config(copied, world_size=world_size)
        assert_loads_equal(copied, original)


def test_head_under_its_new_name(copied: Path, original: dict[str, torch.Tensor]) -> None:
    rewrite(copied / NAME, lambda t: t.update({"lm_head.weight": t.pop("embed_out.weight")}))
    assert_loads_equal(copied, original)


def test_safetensors_are_preferred_to_bin(
    copied: Path, original: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({name: t + 1 for name, t in original.items()}, copied / "pytorch_model.bin")
    with caplog.at_level(logging.INFO):
        assert_loads_equal(copied, original)
    assert "model.safetensors is used, not pytorch_model.bin" in caplog.text


# -- pickles -------------------------------------------------------------------------------------


def as_bin(path: Path, content: Any, **keywords: Any) -> Path:
    (path / NAME).unlink(missing_ok=True)
    torch.save(content, path / "pytorch_model.bin", **keywords)
    return path / "pytorch_model.bin"


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_files_of_both_formats(
    copied: Path, original: dict[str, torch.Tensor], zipped: bool
) -> None:
    as_bin(copied, original, _use_new_zipfile_serialization=zipped)
    assert_loads_equal(copied, original)


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(
    copied: Path, original: dict[str, torch.Tensor], tmp_path: Path, zipped: bool
) -> None:
    marker = tmp_path / "executed"
    content = original | {"evil": Evil(marker)}
    file = as_bin(copied, content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="could run code; convert it to safetensors"):
        load(copied)
    file.write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load(copied)
    assert not marker.exists()
    pickle.loads(file.read_bytes())
    assert marker.exists(), "the test's own pickle does nothing"


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, {"state": {"a": torch.ones(1)}}, None, "x"])
def test_bin_that_is_no_state_dict(copied: Path, content: Any) -> None:
    as_bin(copied, content)
    with pytest.raises(CheckpointError, match="not a state dict"):
        load(copied)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"PK\3\4broken", b"\x80\x02", b"<html>\n"])
def test_bin_that_is_no_pickle(copied: Path, content: bytes) -> None:
    as_bin(copied, {})
    (copied / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load(copied)


@pytest.mark.parametrize("zipped", [True, False])
def test_random_damage_of_a_bin(
    copied: Path, original: dict[str, torch.Tensor], zipped: bool
) -> None:
    """Only our own error may come out of a damaged pickle."""
    small = {name: t[:1].clone() for name, t in list(original.items())[:4]}
    file = as_bin(copied, small, _use_new_zipfile_serialization=zipped)
    data, rng = file.read_bytes(), random.Random(5)
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.2:
            damaged = damaged[: rng.randrange(len(damaged))]
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load(copied)


# -- memory -------------------------------------------------------------------------------------

MEASURE = """
import re, sys
from pathlib import Path
import torch, transformers, tokenizers
from gptneox.devices.cpu.device import CpuDevice
from gptneox.weights.load import load_model
from gptneox.config.model import ModelConfig
from gptneox.model import GPTNeoX
torch.set_num_threads(1)
def mib(field):
    text = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\\s+(\\d+) kB", text)[1]) / 1024
path, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
before = mib("VmRSS")
model = GPTNeoX(ModelConfig.from_pretrained(path), CpuDevice())
load_model(model, path, dtype)
print(mib("VmHWM") - before, mib("VmRSS") - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 MB of fp32 weights, written without transformers: 75 million parameters in 8 layers."""
    directory = tmp_path_factory.mktemp("large")
    config = SMALL | {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "num_hidden_layers": 10,
        "vocab_size": 3000,
    }
    (directory / "config.json").write_text(json.dumps(config))
    shapes = full_shapes(ModelConfig.from_dict(config))
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, directory / NAME)
    return directory


@pytest.mark.parametrize("form", ["safetensors", pytest.param("bin", marks=pytest.mark.slow)])
def test_peak_memory_while_loading(large: Path, tmp_path: Path, form: str) -> None:
    path, size = large, (large / NAME).stat().st_size / 2**20
    assert 280 < size < 330
    if form == "bin":
        path = tmp_path
        (path / "config.json").write_bytes((large / "config.json").read_bytes())
        torch.save(load_file(large / NAME), path / "pytorch_model.bin")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), "float32"],
        env=clean_environ(PYTHONPATH=str(REPO)),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    peak, after = map(float, done.stdout.split())
    # Over the weights: the largest tensor twice, and the mapped pages that count as resident.
    assert after < size + 150
    assert peak < 1.2 * size + 150


def test_the_header_of_a_shard_is_read_without_its_data(large: Path) -> None:
    reset_peak()
    before = resident_mib("VmRSS")
    assert len(Checkpoint(large).shapes) == 124
    assert resident_mib() - before < 64


def test_nothing_stays_open_or_mapped(copied: Path) -> None:
    def mapped() -> bool:
        return str(copied) in Path("/proc/self/maps").read_text()

    with safe_open(copied / NAME, framework="pt") as handle:
        held = handle.get_tensor("embed_out.weight")
    assert mapped(), "what a kept tensor does"
    del held, handle
    model = load(copied)
    assert not mapped()
    assert not any(str(copied) in link for link in open_files())
    assert weights(model)


def open_files() -> list[str]:
    links = []
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists the directory
            links.append(str(file.readlink()))
    return links
