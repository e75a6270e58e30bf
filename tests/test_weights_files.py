# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder are the model, against transformers' choice; and how they are read."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints
from support.checkpoints import copy_checkpoint
from support.processes import REPO, clean_environ
from transformers import GPTNeoXForCausalLM

from gptneox.config.model import ModelConfig
from gptneox.weights.cut import cut_checkpoint, merge_checkpoint
from gptneox.weights.files import SafetensorsFile, _UnmappedSafetensors
from gptneox.weights.load import Checkpoint, CheckpointError, check_weights

NAME, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SMALL = checkpoints.FAMILY["relu-serial"] | {"num_hidden_layers": 1, "torch_dtype": "float32"}
BIAS = "gpt_neox.final_layer_norm.bias"

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small checkpoint; do not write into it."""
    directory = tmp_path_factory.mktemp("source") / "checkpoint"
    checkpoints.write_checkpoint(directory, SMALL)
    return directory


@pytest.fixture
def model(source: Path, tmp_path: Path) -> Path:
    return copy_checkpoint(source, tmp_path / "model")


@pytest.fixture(scope="module")
def original(source: Path) -> Tensors:
    return load_file(source / NAME)


def numbered(tensors: Tensors, number: int) -> Tensors:
    """The same weights, told apart by one bias."""
    return tensors | {BIAS: torch.full_like(tensors[BIAS], number)}


def write(path: Path, tensors: Tensors) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, {"format": "pt"})


def write_shards(directory: Path, tensors: Tensors, names: tuple[str, ...] = SHARDS) -> None:
    for i, name in enumerate(names):
        part = {n: t for j, (n, t) in enumerate(tensors.items()) if j % len(names) == i}
        write(directory / name, part)


def write_index(directory: Path, tensors: Tensors, names: tuple[str, ...] = SHARDS) -> None:
    ending = INDEX if names[0].endswith("safetensors") else BIN_INDEX
    where = {n: names[j % len(names)] for j, n in enumerate(tensors)}
    (directory / ending).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def chosen(directory: Path) -> int:
    """The number of the weights that would be loaded, after checking them all."""
    check_weights(directory, ModelConfig.from_pretrained(directory))
    return int(Checkpoint(directory).read(BIAS)[0])


def theirs(directory: Path) -> int:
    """The number of the weights that transformers loads."""
    loaded = GPTNeoXForCausalLM.from_pretrained(directory)
    return int(loaded.gpt_neox.final_layer_norm.bias[0])


def refuse(directory: Path, *named: str, error: type[Exception] = FileNotFoundError) -> None:
    with pytest.raises(error) as caught:
        check_weights(directory, ModelConfig.from_pretrained(directory))
    assert all(text in str(caught.value) for text in named), caught.value


# -- which file ----------------------------------------------------------------------------------

BIN_SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


@pytest.mark.parametrize("num_absent", range(4))
def test_the_order_of_preference_is_that_of_transformers(
    model: Path, original: Tensors, num_absent: int
) -> None:
    """All four forms side by side, with different weights; one after the other is taken away."""
    write(model / NAME, numbered(original, 0))
    for number, shards in ((1, SHARDS), (3, BIN_SHARDS)):
        write_shards(model, numbered(original, number), shards)
        write_index(model, original, shards)
    write(model / BIN, numbered(original, 2))
    for name in (NAME, INDEX, BIN)[:num_absent]:
        (model / name).unlink()
    assert chosen(model) == theirs(model) == num_absent


def stray(path: Path, name: str, tensors: Tensors) -> None:
    write(path / name, tensors)


BESIDE: dict[str, Callable[[Path, Tensors], None]] = {
    "adapter": lambda d, t: stray(d, "adapter_model.safetensors", {"x.lora_A.weight": t[BIAS]}),
    "adapter in .bin": lambda d, t: stray(d, "adapter_model.bin", {"x.lora_A.weight": t[BIAS]}),
    "optimizer": lambda d, t: stray(d, "optimizer.safetensors", {"exp_avg": t[BIAS]}),
    "optimizer in .bin": lambda d, _: torch.save({"a": 1}, d / "pytorch_model_optim.bin"),
    "optimizer.pt": lambda d, _: torch.save({"a": 1}, d / "optimizer.pt"),
    "scheduler": lambda d, _: torch.save({"a": 1}, d / "scheduler.bin"),
    "training arguments": lambda d, _: torch.save({"a": 1}, d / "training_args.bin"),
    "consolidated": lambda d, t: stray(d, "consolidated.safetensors", numbered(t, 9)),
    "variant": lambda d, t: stray(d, "model.fp16.safetensors", numbered(t, 9)),
    "variant in .bin": lambda d, t: stray(d, "pytorch_model.fp16.bin", numbered(t, 9)),
    "variant index": lambda d, _: (d / "model.safetensors.index.fp16.json").write_text("{"),
    "one leftover shard": lambda d, t: stray(d, SHARDS[0], numbered(t, 9)),
    "leftover shards": lambda d, t: write_shards(d, numbered(t, 9)),
    "stale index": write_index,
    "stale .bin index": lambda d, t: write_index(d, t, BIN_SHARDS),
    "broken index": lambda d, _: (d / INDEX).write_text("{"),
    "a copy": lambda d, t: stray(d, "model (1).safetensors", numbered(t, 9)),
    "a backup": lambda d, t: shutil.copyfile(d / NAME, d / "model.safetensors.bak"),
    "a value head": lambda d, t: stray(d, "value_head.safetensors", {"v": t[BIAS]}),
    "a hidden part": lambda d, t: stray(d, "._model.safetensors", {"v": t[BIAS]}),
    "another framework": lambda d, _: (d / "flax_model.msgpack").write_bytes(b"x"),
    "a folder of shards": lambda d, t: (d / "original").mkdir() or stray(d / "original", NAME, t),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_lies_beside_the_model_is_no_part_of_it(
    model: Path, original: Tensors, kind: str
) -> None:
    write(model / NAME, numbered(original, 1))
    BESIDE[kind](model, original)
    assert chosen(model) == theirs(model) == 1


@pytest.mark.parametrize("kind", [k for k in BESIDE if k not in ("broken index", "a backup")])
def test_what_lies_beside_a_bin_is_no_part_of_it(model: Path, original: Tensors, kind: str) -> None:
    """A stale index of safetensors stops transformers; the complete file beside it is meant."""
    (model / NAME).unlink()
    write(model / BIN, numbered(original, 1))
    BESIDE[kind](model, original)
    assert chosen(model) == 1
    if kind != "stale index":
        assert theirs(model) == 1


def test_a_file_that_config_json_names(model: Path, original: Tensors, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())

    def name(value: Any) -> None:
        text = json.dumps(config | {"transformers_weights": value})
        (model / "config.json").write_text(text)

    write(model / "special.safetensors", numbered(original, 5))
    name("special.safetensors")
    assert chosen(model) == theirs(model) == 5
    cut_checkpoint(model, tmp_path / "parts", 1)
    assert chosen(tmp_path / "parts" / "0") == 5
    merge_checkpoint(tmp_path / "parts", tmp_path / "merged")
    assert chosen(tmp_path / "merged") == theirs(tmp_path / "merged") == 5
    name("absent.safetensors")
    refuse(model, "no weights in", "absent.safetensors")
    for wrong in ("../model/special.safetensors", "/special.safetensors", "x.bin", 3):
        name(wrong)
        refuse(model, "transformers_weights", error=CheckpointError)


@pytest.mark.parametrize("shards", [SHARDS, BIN_SHARDS])
def test_shards_without_an_index_must_be_complete(
    model: Path, original: Tensors, shards: tuple[str, ...]
) -> None:
    (model / NAME).unlink()
    write_shards(model, numbered(original, 4), shards)
    assert chosen(model) == 4
    (model / shards[1]).unlink()
    refuse(model, "no weights in", f"of the 00002 shards like {shards[0]} it lacks number 2")


def test_of_two_sets_of_shards_none_is_guessed(model: Path, original: Tensors) -> None:
    (model / NAME).unlink()
    write_shards(model, numbered(original, 1), BIN_SHARDS)
    write_shards(model, numbered(original, 4))
    assert chosen(model) == 4, "of both kinds, safetensors"
    single = "model-00001-of-00001.safetensors"
    write(model / single, original)
    refuse(model, "several sets of shards", single, SHARDS[0], error=CheckpointError)
    write_index(model, original)
    assert chosen(model) == theirs(model) == 4


def test_an_index_without_any_of_its_files(model: Path, original: Tensors) -> None:
    (model / NAME).unlink()
    write_index(model, original)
    refuse(model, f"lacks {SHARDS[0]}, {SHARDS[1]}, which {INDEX} names")
    (model / SHARDS[0]).symlink_to("gone")
    refuse(model, f"{SHARDS[0]} (it is a link to gone, which does not exist")


def test_an_index_with_some_of_its_files(model: Path, original: Tensors) -> None:
    """The rest of them was wanted, whatever else is there."""
    (model / NAME).unlink()
    write_shards(model, original)
    write_index(model, original)
    (model / SHARDS[1]).unlink()
    write(model / BIN, original)
    refuse(model, f"lacks {SHARDS[1]}, which {INDEX} names; download the missing files")


@pytest.mark.parametrize("place", ["link", "loop", "folder"])
def test_a_name_without_a_file_gives_way_to_the_next_one(
    model: Path, original: Tensors, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As in transformers, but it is said."""
    (model / NAME).unlink()
    write(model / BIN, numbered(original, 6))
    put(model / NAME, place)
    with caplog.at_level(logging.WARNING):
        assert chosen(model) == theirs(model) == 6
    assert f"{NAME} is a " in caplog.text
    assert f"{BIN} is used" in caplog.text


FOUND_INSTEAD = {
    "adapter_model.safetensors": "no weights in",
    "model.fp16.safetensors": "found model.fp16.safetensors",
    "consolidated.00.pth": "found consolidated.00.pth",
    "tf_model.h5": "found tf_model.h5",
    "model.safetensors.part": "found model.safetensors.part",
    "model.safetensors.incomplete": "found model.safetensors.incomplete",
    "pytorch_model.bin.zip": "found pytorch_model.bin.zip",
    "gpt-neox-20b.safetensors": "give such a file the first of these names",
}


@pytest.mark.parametrize("name", FOUND_INSTEAD)
def test_without_weights_what_was_found_is_named(model: Path, name: str) -> None:
    (model / NAME).rename(model / name)
    refuse(model, "none of model.safetensors", FOUND_INSTEAD[name])


def test_an_adapter_alone_is_no_model(model: Path) -> None:
    (model / NAME).rename(model / "adapter_model.safetensors")
    (model / "adapter_config.json").write_text("{}")
    refuse(model, "it holds an adapter: merge it, or give the directory of its base")


# -- what is no file -----------------------------------------------------------------------------


def put(path: Path, place: str) -> None:
    if place == "folder":
        path.mkdir()
    else:
        path.symlink_to("gone" if place == "link" else path.name)


PLACES = {
    "link": "is a link to gone, which does not exist",
    "loop": "that cannot be followed",
    "folder": "is a folder",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [NAME, BIN, INDEX, BIN_INDEX])
def test_what_is_no_file_is_named(model: Path, name: str, place: str) -> None:
    (model / NAME).unlink()
    put(model / name, place)
    refuse(model, name, PLACES[place])


TEXTS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 138\n": "git-lfs pointer",
    b"<!DOCTYPE html><html><body>404</body></html>": "web page",
    b"": "is empty",
    bytes(5000): "zeros only",
    b"Entry not found": "server's answer",
}


@pytest.mark.parametrize("text", TEXTS, ids=TEXTS.values())
@pytest.mark.parametrize("name", [NAME, BIN, INDEX, "config.json"])
def test_a_text_instead_of_a_file_is_named(model: Path, name: str, text: bytes) -> None:
    if name != "config.json":
        (model / NAME).unlink()
    (model / name).write_bytes(text)
    refuse(model, str(model / name), TEXTS[text], error=ValueError)


def test_weights_under_the_other_ending(model: Path, original: Tensors) -> None:
    (model / NAME).rename(model / BIN)
    refuse(model, "is a safetensors file; name it model.safetensors", error=CheckpointError)
    torch.save(original, model / NAME)
    refuse(model, "is a PyTorch file, not safetensors", error=CheckpointError)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"model": {"a": torch.ones(1)}, "iteration": 3}, "a dict of model, iteration"),
        ({"state_dict": {}}, "a dict of state_dict"),
        ({}, "a dict of nothing"),
        ([1], "a list"),
    ],
)
def test_a_pickle_that_is_no_state_dict(model: Path, content: Any, found: str) -> None:
    (model / NAME).unlink()
    torch.save(content, model / BIN)
    refuse(model, f"not a state dict (name -> tensor) but {found}", error=CheckpointError)


def test_numbers_between_the_tensors_of_a_pickle(model: Path, original: Tensors) -> None:
    (model / NAME).unlink()
    torch.save(numbered(original, 7) | {"epoch": 3, "best": "x"}, model / BIN)
    assert chosen(model) == theirs(model) == 7


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda t: t.to("meta"), "holds no data"),
        (lambda t: t.to_sparse(), "sparse"),
        (lambda t: t[:0], "expected"),  # what DeepSpeed's stage 3 leaves
    ],
)
def test_tensors_without_their_data(
    model: Path,
    original: Tensors,
    change: Callable[[torch.Tensor], torch.Tensor],
    found: str,
) -> None:
    (model / NAME).unlink()
    torch.save({name: change(tensor) for name, tensor in original.items()}, model / BIN)
    refuse(model, found, error=CheckpointError)


# -- quantized by others -------------------------------------------------------------------------

WEIGHT = "gpt_neox.layers.0.mlp.dense_h_to_4h"


@pytest.mark.parametrize(
    "name",
    [
        *("qweight", "g_idx", "SCB", "weight.absmax", "weight_scale_inv", "weight_packed", "W_q"),
        *("weight_scale", "deq_scale", "scales", "input_offset"),
    ],
)
def test_tensors_of_a_quantizer_are_refused_by_name(
    model: Path, original: Tensors, name: str
) -> None:
    write(model / NAME, original | {f"{WEIGHT}.{name}": torch.ones(3)})
    refuse(model, "is quantized (", f"as it holds {WEIGHT}.{name}", error=CheckpointError)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32]
)
@pytest.mark.parametrize("name", [NAME, BIN])
def test_types_that_are_no_weights_are_refused(
    model: Path, original: Tensors, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """transformers would compute with such numbers as they are, without their scales."""
    (model / NAME).unlink()
    write(model / name, original | {f"{WEIGHT}.weight": original[f"{WEIGHT}.weight"].to(dtype)})
    refuse(model, f"{WEIGHT}.weight holds {str(dtype)[6:]};", error=CheckpointError)
    with pytest.raises(CheckpointError, match="holds"):
        cut_checkpoint(model, tmp_path / "parts", 1)


def test_types_that_nobody_knows_are_refused(model: Path) -> None:
    header = b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}   '
    (model / NAME).write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    refuse(model, "a holds F4, which is quantized", error=CheckpointError)


SETTINGS = {
    "quantize_config.json": ('{"bits": 4}', "is of gptq, but no weight is stored as qweight"),
    "quant_config.json": (
        '{"w_bit": 4, "q_group_size": 64}',
        "is of awq, but no weight is stored as qweight",
    ),
    "hf_quant_config.json": ('{"quantization": {}}', "is quantized (ModelOpt"),
    "quant_model_description.json": ('{"model_quant_type": "W8A8SC"}', "is quantized (W8A8SC"),
    "quant_model_description_w8a16.json": (
        "{}",
        "is quantized (ModelSlim, as quant_model_description_w8a16",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_a_quantizer_are_refused(model: Path, name: str) -> None:
    text, message = SETTINGS[name]
    (model / name).write_text(text)
    refuse(model, message, error=CheckpointError)


def test_a_description_of_floats_is_no_quantization(model: Path) -> None:
    (model / "quant_model_description.json").write_text('{"model_quant_type": "FLOAT"}')
    check_weights(model, ModelConfig.from_pretrained(model))


# -- without a map of the file -------------------------------------------------------------------


def test_reading_equals_mapping(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.arange(35.0).view(5, 7),
        "half": torch.arange(12).view(3, 4).bfloat16(),
        "vector": torch.arange(6, dtype=torch.int64),
        "scalar": torch.tensor(3.5),
        "none": torch.zeros(0, 4),
        "bytes": torch.ones(3, dtype=torch.bool),
    }
    save_file(tensors, tmp_path / NAME, {"format": "pt"})
    read, mapped = _UnmappedSafetensors(tmp_path / NAME), SafetensorsFile(tmp_path / NAME)
    assert read.metadata() == {"format": "pt"}
    assert set(read.keys()) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(read.get_tensor(name), tensor), name
        assert read.get_tensor(name).dtype == tensor.dtype
    indices = [
        (slice(1, 3),),
        (slice(None), slice(2, 5)),
        (slice(4, 9),),
        (slice(3, 3),),
        (slice(0, 5), slice(0, 7)),
    ]
    for index in indices:
        assert torch.equal(read.get_slice("matrix")[index], mapped.read("matrix", index)), index


NO_MAP = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
static int refused(int fd) {
  char name[64], target[4096];
  const char *folder = getenv("NO_MAP_FOLDER");
  if (fd < 0 || !folder) return 0;
  snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(name, target, sizeof target - 1);
  if (n <= 0) return 0;
  target[n] = 0;
  return !strncmp(target, folder, strlen(folder));
}
#define MAP(NAME) void *NAME(void *a, size_t l, int p, int f, int fd, off_t o) { \\
  static void *(*real)(void *, size_t, int, int, int, off_t); \\
  if (!real) real = dlsym(RTLD_NEXT, #NAME); \\
  if (refused(fd)) { errno = ENODEV; return MAP_FAILED; } \\
  return real(a, l, p, f, fd, o); }
MAP(mmap)
MAP(mmap64)
"""

LOAD = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from gptneox.weights.load import Checkpoint
from gptneox.weights import files
files.REMAP_BYTES = 1000
for path in map(Path, sys.argv[1:]):
    checkpoint = Checkpoint(path)
    assert not any(file.is_mapped for file in checkpoint.files)
    found = {name: checkpoint.read(name).clone() for name in checkpoint.shapes}
    save_file(found, path.parent / f"{path.name}.read")
"""


def test_a_file_system_that_maps_no_files(source: Path, tmp_path: Path) -> None:
    """As on mergerfs, or FUSE with direct_io: the same tensors, read."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to make a stand-in for such a file system")
    (tmp_path / "nomap.c").write_text(NO_MAP)
    library, folder = tmp_path / "nomap.so", tmp_path / "no-map"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", library, tmp_path / "nomap.c", "-ldl"], check=True
    )
    tensors = load_file(source / NAME)
    folder.mkdir()
    shutil.copytree(source, folder / "safetensors")
    for form in ("shards", "bin"):
        (folder / form).mkdir()
    write_shards(folder / "shards", tensors)
    write(folder / "bin" / BIN, tensors)
    environ = clean_environ(
        PYTHONPATH=str(REPO), LD_PRELOAD=str(library), NO_MAP_FOLDER=str(folder.resolve())
    )
    names = ("safetensors", "shards", "bin")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *(str(folder / name) for name in names)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in names:
        found = load_file(folder / f"{name}.read")
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[n], tensors[n]) for n in tensors)
