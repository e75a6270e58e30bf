# SPDX-License-Identifier: Apache-2.0
"""config.json, config.ini, flags and environment: what is read and what is refused, by name."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from support import checkpoints
from support.processes import REPO
from transformers import GPTNeoXConfig

from gptneox.chat_templates import ChatTemplateError
from gptneox.cli import Settings, make_parser, read_settings
from gptneox.config import documents
from gptneox.config.arguments import Arguments, Generation
from gptneox.config.environment import Environment
from gptneox.config.errors import ConfigError, FileError, NoSuchPath, exit_status
from gptneox.config.files import read_json, read_text
from gptneox.config.model import ModelConfig
from gptneox.config.schema import settings_of
from gptneox.config.settings import (
    EMBEDDED_CHECKPOINT,
    SECTIONS,
    EngineSection,
    ModelSection,
    PerformanceSection,
    PrecisionSection,
    ServerSection,
    merge_section,
    parse_device_ids,
    read_ini,
)
from gptneox.engine.sequence import InvalidParameter, SamplingParams

BASE: dict[str, Any] = {
    "model_type": "gpt_neox",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "vocab_size": 300,
}


def config(**keys: Any) -> ModelConfig:
    return ModelConfig.from_dict(BASE | keys)


# -- config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", checkpoints.FAMILY)
def test_published_configurations_as_transformers_reads_them(name: str) -> None:
    raw = checkpoints.FAMILY[name]
    ours, theirs = ModelConfig.from_dict(raw), GPTNeoXConfig(**raw)
    rope = theirs.rope_parameters
    assert ours.rotary_dim == int(ours.head_dim * rope["partial_rotary_factor"])
    assert ours.rope_theta == rope["rope_theta"]
    assert ours.hidden_size == theirs.hidden_size
    assert ours.num_heads == theirs.num_attention_heads
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.intermediate_size == theirs.intermediate_size
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.vocab_size == theirs.vocab_size
    assert ours.layer_norm_eps == theirs.layer_norm_eps
    assert ours.use_parallel_residual == theirs.use_parallel_residual
    assert ours.attention_bias == theirs.attention_bias
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.dtype == str(theirs.dtype).removeprefix("torch.")
    # What transformers 5 writes after reading the old keys says the same.
    assert ModelConfig.from_dict(json.loads(theirs.to_json_string(use_diff=False))) == ours


def test_num_parameters_counts_every_tensor(tmp_path: Path) -> None:
    for name in ("pythia-14m", "no-attention-bias", "japanese-large-lm-3.6b"):
        model = checkpoints.write_checkpoint(tmp_path / name, checkpoints.FAMILY[name])
        ours = ModelConfig.from_pretrained(tmp_path / name)
        assert ours.num_parameters == model.num_parameters()


@pytest.mark.parametrize(
    ("keys", "rotary_dim", "theta", "factor"),
    [
        ({}, 4, 1e4, 1),
        ({"rotary_pct": 1.0}, 16, 1e4, 1),
        ({"rotary_pct": 0.5, "rotary_emb_base": 25000}, 8, 25000, 1),
        ({"rotary_pct": None, "rotary_emb_base": None, "rope_scaling": None}, 4, 1e4, 1),
        ({"rope_parameters": None}, 4, 1e4, 1),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, 4, 500, 1),
        ({"rope_parameters": {"partial_rotary_factor": 1.0}}, 16, 1e4, 1),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rotary_pct": 0.5}, 8, 1e4, 2),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 4, 1e4, 4),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 4, 1e4, 1),
    ],
)
def test_rotary_keys_of_both_eras(
    keys: dict[str, Any], rotary_dim: int, theta: float, factor: float
) -> None:
    read = config(**keys)
    assert (read.rotary_dim, read.rope_theta, read.rope_factor) == (rotary_dim, theta, factor)


def test_missing_keys_take_the_documented_defaults() -> None:
    read = config()
    assert read.max_position_embeddings == 2048
    assert read.layer_norm_eps == 1e-5
    assert read.use_parallel_residual
    assert read.attention_bias
    assert not read.tie_word_embeddings
    assert read.dtype == "float32"
    assert read.eos_token_ids == ()
    assert read.activation == "gelu_erf"
    nulls = dict.fromkeys(
        [
            "layer_norm_eps",
            "use_parallel_residual",
            "attention_bias",
            "tie_word_embeddings",
            "torch_dtype",
            "dtype",
            "eos_token_id",
            "quantize",
            "quantization_config",
            "world_size",
        ]
    )
    assert config(**nulls) == read


@pytest.mark.parametrize(
    ("keys", "method"),
    [
        ({"quantize": "w8a8"}, "w8a8"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}, "fp8"),
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"bits": 4}}, "by quantization_config, which names no method"),
        ({"compression_config": {"format": "pack-quantized"}}, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization_config": {"quant_algo": "FP8"}}, "FP8"),
        ({"quantization_config": {}, "quantize": "", "compression_config": None}, ""),
    ],
)
def test_the_method_that_weights_were_quantized_with(keys: dict[str, Any], method: str) -> None:
    assert config(**keys).quantize == method


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "bfloat16"),
    ],
)
def test_dtype_keys_of_both_eras(keys: dict[str, Any], expected: str) -> None:
    assert config(**keys).dtype == expected


@pytest.mark.parametrize(("value", "ids"), [(None, ()), (0, (0,)), ([0, 50277], (0, 50277))])
def test_eos_forms(value: Any, ids: tuple[int, ...]) -> None:
    assert config(eos_token_id=value).eos_token_ids == ids


REFUSED = [
    ("model_type", "llama"),
    ("model_type", "gpt_neox_japanese"),
    ("model_type", None),
    ("num_attention_heads", 0),
    ("num_attention_heads", -4),
    ("num_attention_heads", True),
    ("num_attention_heads", 4.0),
    ("num_attention_heads", "4"),
    ("num_attention_heads", None),
    ("num_attention_heads", [4]),
    ("hidden_size", 62),  # not a multiple of the heads
    ("hidden_size", 0),
    ("hidden_size", -64),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", False),
    ("intermediate_size", -1),
    ("vocab_size", 0),
    ("vocab_size", 1e3),
    ("vocab_size", 10**30),
    ("hidden_size", 4 * 10**400),
    ("num_hidden_layers", 10**9),
    ("max_position_embeddings", 10**12),
    ("max_position_embeddings", -2048),
    ("max_position_embeddings", True),
    ("hidden_act", "foo"),
    ("hidden_act", None),
    ("hidden_act", ["gelu"]),
    ("hidden_act", {"name": "gelu"}),
    ("layer_norm_eps", -1e-5),
    ("layer_norm_eps", 0),
    ("layer_norm_eps", "1e-5"),
    ("layer_norm_eps", float("nan")),
    ("layer_norm_eps", float("inf")),
    ("layer_norm_eps", 10**400),
    ("layer_norm_eps", True),
    ("use_parallel_residual", 1),
    ("use_parallel_residual", "true"),
    ("attention_bias", 0),
    ("tie_word_embeddings", "no"),
    ("rotary_pct", 0),
    ("rotary_pct", -0.25),
    ("rotary_pct", 1.5),
    ("rotary_pct", 0.01),  # no dimension left
    ("rotary_pct", 0.2),  # an odd number of them
    ("rotary_pct", "0.25"),
    ("rotary_emb_base", 0),
    ("rotary_emb_base", -1e4),
    ("rotary_emb_base", "1e4"),
    ("torch_dtype", "int8"),
    ("dtype", "float64"),
    ("dtype", ["float16"]),
    ("eos_token_id", "0"),
    ("eos_token_id", True),
    ("eos_token_id", [0, None]),
    ("eos_token_id", 0.0),
]


@pytest.mark.parametrize(("key", "value"), REFUSED, ids=lambda v: str(v)[:24])
def test_bad_values_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(FileError, match=rf"^here: .*{key.removeprefix('torch_')}"):
        ModelConfig.from_dict(BASE | {key: value}, "here")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"rope_type": "foo"}, "rope_type 'foo'"),
        ({"type": "yarn"}, "rope_type 'yarn'"),
        ({"rope_type": ["linear"]}, "rope_type"),
        ({"rope_type": "linear", "factor": -1}, "rope factor"),
        ({"rope_type": "linear", "factor": "2"}, "rope factor"),
        ({"rope_theta": -1}, "rotary_emb_base"),
        ({"partial_rotary_factor": 0.2}, "rotary"),
        ("linear", "rope_parameters"),
        ([1], "rope_parameters"),
        (3, "rope_parameters"),
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_bad_rope_settings_are_refused(key: str, value: Any, named: str) -> None:
    with pytest.raises(FileError, match=named):
        config(**{key: value})


@pytest.mark.parametrize("key", [k for k in BASE if k != "model_type"])
def test_missing_keys_are_named(key: str) -> None:
    with pytest.raises(FileError, match=key):
        ModelConfig.from_dict({k: v for k, v in BASE.items() if k != key})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"model_type": "gpt_neox",',
        b"[]",
        b"null",
        b'"gpt_neox"',
        b"\xff\xfe{}",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"[" * 200_000,
        b'{"vocab_size": ' + b"9" * 5000 + b"}",
        b"\0" * 100,
    ],
    ids=lambda content: repr(content[:16]),
)
def test_no_json_object_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(FileError, match=r"config\.json"):
        ModelConfig.from_pretrained(tmp_path)


def test_random_damage_of_config_json_is_refused_or_harmless(tmp_path: Path) -> None:
    """2 000 changed bytes and values: only FileError, never another exception."""
    rng = random.Random(2)
    path = tmp_path / "config.json"
    values = [None, True, -1, 0, 10**30, 1e308, "x", [], {}, [[1]], {"a": 1}, float("nan")]
    raw = checkpoints.FAMILY["gpt-neox-20b"] | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    messages = []
    for i in range(2000):
        if i % 2:
            key = rng.choice([*raw, "rope_parameters", "dtype", "quantize", "attention_bias"])
            path.write_text(json.dumps(raw | {key: rng.choice(values)}))
        else:
            data = bytearray(json.dumps(raw).encode())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        try:
            ModelConfig.from_pretrained(tmp_path)
        except FileError as error:
            messages.append(str(error))
    assert all("config.json" in message for message in messages)
    assert 500 < len(messages) < 2000


def test_no_config_json_says_where(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json in .*holds none"):
        read_json(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_json(tmp_path / "absent" / "config.json")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(FileNotFoundError, match="not a directory"):
        read_json(file / "config.json")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"hub's cache, which has it in .*snapshots/0123;"):
        read_json(tmp_path / "models--a--b" / "config.json")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-8"])
def test_a_byte_order_mark_is_passed_over(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(BASE | {"note": "重み"}, ensure_ascii=False), encoding=encoding)
    assert read_json(path)["note"] == "重み"
    assert ModelConfig.from_pretrained(tmp_path) == config()


def test_a_config_json_that_is_something_else(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.symlink_to("gone")
    with pytest.raises(OSError, match=r"config\.json is a link to gone, which does not exist"):
        read_json(path)
    path.unlink()
    path.symlink_to("config.json")
    with pytest.raises(OSError, match=r"is a link to config\.json that cannot be followed"):
        read_json(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match=r"config\.json is a folder"):
        read_json(path)
    path.rmdir()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(FileError, match=r"config\.json is a git-lfs pointer.*git lfs pull"):
        read_json(path)
    path.write_text("<!DOCTYPE html><html>Sign in</html>")
    with pytest.raises(FileError, match=r"config\.json is a web page"):
        read_json(path)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic"])
def test_a_scaled_rope_needs_its_factor(rope_type: str) -> None:
    """transformers refuses it, too."""
    with pytest.raises(FileError, match=f"'{rope_type}' needs a factor"):
        config(rope_scaling={"type": rope_type})


@pytest.mark.parametrize("rope_type", ["yarn", "longrope", "llama3", "ntk", "mrope"])
def test_a_rope_type_that_is_not_built_is_named(rope_type: str) -> None:
    parameters = {"rope_type": rope_type, "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(FileError, match=f"'{rope_type}' is not known; use one of default, lin"):
        config(rope_parameters=parameters)


def test_positions_of_a_dynamic_rope_cannot_be_raised() -> None:
    dynamic = config(rope_scaling={"type": "dynamic", "factor": 2.0})
    assert [dynamic.positions(n) for n in (0, 5, 2048)] == [2048, 5, 2048]
    with pytest.raises(ConfigError, match=r"2049 positions are wanted.*2048.*at most 2048"):
        dynamic.positions(2049)
    for scaling in (None, {"type": "linear", "factor": 2.0}):
        assert config(rope_scaling=scaling).positions(4096) == 4096


# -- config.ini ----------------------------------------------------------------------------------


def write_ini(directory: Path, text: str) -> Path:
    path = directory / "config.ini"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_file_lists_every_key_with_its_default() -> None:
    ini = read_ini(REPO / "config.ini")
    assert list(ini) == list(SECTIONS)
    for name, cls in SECTIONS.items():
        assert list(ini[name]) == [f.name for f in fields(cls)], f"keys of [{name}]"
        section, sources = merge_section(cls, {}, ini, {})
        assert section == cls()
        assert set(sources.values()) == {"default"}
        # `merge_section` takes an empty value for the default, so an empty line must mean that.
        for f in fields(cls):
            shown = ini[name][f.name]
            assert shown or f.default == "", f"[{name}] {f.name} is empty"


@pytest.mark.parametrize("name", documents.FILES)
def test_files_made_from_the_settings_are_up_to_date(name: str) -> None:
    text = (REPO / name).read_text(encoding="utf-8")
    assert text == documents.FILES[name](), f"{name} is stale; type: {documents.COMMAND}"


def test_documents_are_written_where_they_are_stale(tmp_path: Path) -> None:
    """In a copy of the package; a second call finds nothing to do."""
    shutil.copytree(REPO / "gptneox", tmp_path / "gptneox", ignore=lambda *_: ["__pycache__"])
    (tmp_path / "docs").mkdir()

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gptneox.config.documents"]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
        )

    assert "not a checkout" in run().stderr
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "config.ini").write_text("[model]\n")
    assert run().stdout == "config.ini is written\ndocs/settings.md is written\n"
    for name in documents.FILES:
        assert (tmp_path / name).read_bytes() == (REPO / name).read_bytes()
    assert run().stdout == ""


def test_every_key_has_its_comment_above_it() -> None:
    """Of lines short enough to read."""
    explained = {each.name: each for cls in SECTIONS.values() for each in settings_of(cls)}
    comment: list[str] = []
    for line in (REPO / "config.ini").read_text(encoding="utf-8").splitlines():
        assert len(line) <= 100
        if line.startswith("; "):
            comment.append(line[2:])
        else:
            if "=" in line:
                each, text = explained.pop(line.split(" =")[0]), " ".join(comment)
                assert each.help in text
                assert each.env in text
                assert all(str(choice) in text for choice in each.choices)
            comment.clear()
    assert not explained


def test_every_flag_and_variable_is_explained() -> None:
    for action in make_parser()._actions:
        assert action.help, action.option_strings
    rows = (REPO / "docs" / "settings.md").read_text(encoding="utf-8").splitlines()
    for cls in (*SECTIONS.values(), Arguments, Generation, Environment):
        for each in settings_of(cls):
            (row,) = [r for r in rows if each.help in r] if each.help else [""]
            assert bool(row) != each.is_hidden
            assert each.env in row
            assert f"`{each.flag}" in row or not each.flag or each.is_hidden
    declared = {each.env for each in settings_of(Environment)}
    assert len(declared - {""}) == len(fields(Environment))


def test_limits_hold_however_a_section_is_made() -> None:
    for key, value, words in (
        ("block_size", 513, "use 16 to 512"),
        ("num_blocks", -1, "at least 0 is expected"),
        ("graphs", "perhaps", "use one of auto, on, off"),
        ("reserved_memory_gb", float("nan"), "a finite number is expected"),
    ):
        with pytest.raises(ConfigError, match=rf"^\[engine\] {key} is .*{words}$"):
            EngineSection(**{key: value})


def test_flags_are_typed(tmp_path: Path) -> None:
    """What is not given has its default; what is given is known by name."""
    read = settings(tmp_path)
    assert (read.args, read.given) == (Arguments(), {})
    assert read.sampling == SamplingParams(), "defaults of the flags and of a request differ"
    argv = ["--stop", "a", "b", "--stop", "c", "--stop-token-ids", "1,2", "3", "--top_k", "5"]
    argv += [
        "--input-ids",
        "1,2",
        "3",
        "--load_tokenizer",
        "True",
        "--with",
        "b.csv",
        "--seed",
        "0",
    ]
    read = settings(tmp_path, *argv, "--enable_chunked_prefill", "--enable-prefix-caching", "false")
    assert (read.sampling.stop, read.sampling.stop_token_ids) == (("a", "b", "c"), (1, 2, 3))
    assert (read.sampling.top_k, read.sampling.seed, read.sampling.top_p) == (5, 0, 1.0)
    assert (read.args.input_ids, read.args.with_result) == ([[1, 2], [3]], Path("b.csv"))
    assert (read.engine.enable_chunked_prefill, read.engine.enable_prefix_caching) == (True, False)
    assert read.given.keys() == {
        *("stop", "stop_token_ids", "top_k", "input_ids", "load_tokenizer", "with_result", "seed"),
        *("enable_chunked_prefill", "enable_prefix_caching"),
    }


def test_comments_blanks_and_percent(tmp_path: Path) -> None:
    path = write_ini(
        tmp_path,
        "# a comment\n; another\n[model]\nmodel_path = /data/100%/a b  ; where they are\n"
        "device_ids = 0, 1 # two cards\n[engine]\nmax_batch_size=4;no blank: part of the value\n",
    )
    ini = read_ini(path)
    assert ini["model"]["model_path"] == "/data/100%/a b"
    assert ini["model"]["device_ids"] == "0, 1"
    assert ini["engine"]["max_batch_size"] == "4;no blank: part of the value"
    with pytest.raises(ConfigError, match=r"\[engine\] max_batch_size.*'4;no blank"):
        merge_section(EngineSection, {}, ini, {})
    section, _ = merge_section(ModelSection, {}, ini, {})
    assert parse_device_ids(section.device_ids) == [0, 1]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[modell]\n", "modell"),
        ("[DEFAULT]\nblock_size = 64\n", "DEFAULT"),
        ("[engine]\nblok_size = 64\n", "blok_size"),
        ("[engine]\nmodel_path = /x\n", "model_path"),
        ("[model]\nx = 1\ny = 2\n", "x, y"),
        ("[engine]\nblock_size = 64\nblock_size = 128\n", "block_size"),
        ("[engine]\n[engine]\n", "engine"),
        ("block_size = 64\n", "section header"),
        ("[engine\n", "header"),
        ("[engine]\nblock_size\n", "block_size"),
        ("[precision]\n[ceval]\n", "ceval"),
        ("[ceval]\n[precision]\n", "ceval"),
    ],
)
def test_anything_unknown_stops_the_run(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        read_ini(write_ini(tmp_path, text))
    assert "config.ini" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.ini"):
        read_ini(tmp_path / "absent.ini")
    (tmp_path / "binary.ini").write_bytes(b"[model]\nmodel_path = \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"binary\.ini"):
        read_ini(tmp_path / "binary.ini")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_as_windows_programs_save_it(tmp_path: Path, end: str) -> None:
    text = f"[model]{end}model_path = /重み{end}"
    path = tmp_path / "my.ini"
    path.write_bytes(text.encode("utf-8-sig"))
    assert read_ini(path) == {"model": {"model_path": "/重み"}}
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(ConfigError, match=r"my\.ini is UTF-16; .* iconv -f UTF-16"):
        read_ini(path)


def test_a_pipe_is_read_and_a_folder_is_no_settings_file(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"[engine]\nblock_size = 64\n")
    os.close(writer)
    assert read_ini(Path(f"/dev/fd/{reader}")) == {"engine": {"block_size": "64"}}
    os.close(reader)
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_ini(tmp_path)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("x"), 2), (NoSuchPath("x"), 2), (InvalidParameter("seed", 1, "2"), 2),
        (ChatTemplateError("x"), 2), (FileError("x"), 1), (FileNotFoundError("x"), 1),
        (ValueError("x"), 1), (RuntimeError("x"), 1),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_a_user_can_mend_in_the_command_has_status_2(error: Exception, status: int) -> None:
    assert exit_status(error) == status


def test_texts_keep_what_is_theirs(tmp_path: Path) -> None:
    """A mark inside a text, zeros and line ends; only what stands before the text goes."""
    path = tmp_path / "text"
    path.write_bytes("\ufeffa\ufeff\0b\r\nc\rd\n".encode())
    assert read_text(path) == "a\ufeff\0b\nc\nd\n"
    assert read_text(path, newline="") == "a\ufeff\0b\r\nc\rd\n"
    path.write_bytes(b"{\0}\0")
    with pytest.raises(FileError, match="UTF-16"):
        read_text(path)
    path.write_bytes(b"{\0}")
    assert read_text(path) == "{\0}"


def test_a_file_of_5_megabytes_is_refused_quickly(tmp_path: Path) -> None:
    lines = [f"k{i} = {'v' * 50_000}\n" for i in range(100)]
    with pytest.raises(ConfigError, match="unknown k0, k1, k10") as caught:
        read_ini(write_ini(tmp_path, "[model]\n" + "".join(lines)))
    assert len(str(caught.value)) < 1000


def test_the_old_section_name_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ini = read_ini(write_ini(tmp_path, "[ceval]\nmode = mmlu\nshot = 0\n"))
    assert "[ceval] is deprecated" in caplog.text
    section, _ = merge_section(PrecisionSection, {}, ini, {})
    assert (section.mode, section.shot) == ("mmlu", 0)


def test_device_num_is_accepted_and_has_no_effect(tmp_path: Path) -> None:
    assert read_ini(write_ini(tmp_path, "[model]\ndevice_num = 7\n")) == {"model": {}}


@pytest.mark.parametrize(
    ("text", "ids"), [("0", [0]), ("0,1", [0, 1]), ("0, 1", [0, 1]), (" 7 ,3", [7, 3])]
)
def test_device_lists(text: str, ids: list[int]) -> None:
    assert parse_device_ids(text) == ids


@pytest.mark.parametrize("text", ["", ",", "0,,1", "a", "0,a", "-1", "0.5", "0 1", "0,0", "0;1"])
def test_bad_device_lists(text: str) -> None:
    with pytest.raises(ConfigError, match="device list") as caught:
        parse_device_ids(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        (ModelSection, "device", "tpu"),
        (ModelSection, "dtype", "int8"),
        (ModelSection, "attention", "eager"),
        (ModelSection, "bind_cpu", "2"),
        (ModelSection, "bind_cpu", "yes"),
        (ModelSection, "device_ids", "0,,1"),
        (EngineSection, "block_size", "8"),
        (EngineSection, "block_size", "1024"),
        (EngineSection, "block_size", "64.0"),
        (EngineSection, "num_blocks", "-1"),
        (EngineSection, "max_batch_size", "0"),
        (EngineSection, "max_batch_size", "four"),
        (EngineSection, "max_prefill_batch_size", "-1"),
        (EngineSection, "max_input_length", "0"),
        (EngineSection, "max_output_length", "0"),
        (EngineSection, "max_position_embeddings", "-1"),
        (EngineSection, "max_position_embeddings", "1000000000000"),
        (EngineSection, "max_prefill_tokens", "0"),
        (EngineSection, "max_prefill_tokens", "-2"),
        (EngineSection, "enable_chunked_prefill", "perhaps"),
        (EngineSection, "enable_prefix_caching", "2"),
        (EngineSection, "memory_fraction", "0"),
        (EngineSection, "memory_fraction", "1.01"),
        (EngineSection, "memory_fraction", "nan"),
        (EngineSection, "memory_fraction", "inf"),
        (EngineSection, "reserved_memory_gb", "-0.1"),
        (EngineSection, "reserved_memory_gb", "nan"),
        (EngineSection, "reserved_memory_gb", "inf"),
        (PrecisionSection, "mode", "gsm8k"),
        (PrecisionSection, "batch", "0"),
        (PrecisionSection, "shot", "-1"),
        (PrecisionSection, "seq_len_out", "0"),
        (PerformanceSection, "batch_size", "0"),
        (PerformanceSection, "perf_mode", "fast"),
        (PerformanceSection, "skip_decode", "2"),
        (PerformanceSection, "max_len_exp", "-1"),
    ],
)
def test_bad_settings_are_refused_by_name(section: Any, key: str, value: str) -> None:
    name = next(n for n, cls in SECTIONS.items() if cls is section)
    with pytest.raises(ConfigError, match="device list" if key == "device_ids" else key):
        merge_section(section, {}, {name: {key: value}}, {})


@pytest.mark.parametrize(
    ("text", "cases"),
    [
        ("[[256,256],[512,128]]", [(256, 256), (512, 128)]),
        ("[[1, 2]]", [(1, 2)]),
        ("[(8,9)]", [(8, 9)]),
    ],
)
def test_case_pairs(text: str, cases: list[tuple[int, int]]) -> None:
    assert PerformanceSection(case_pair=text).cases() == cases


def test_cases_from_exponents() -> None:
    section = PerformanceSection(min_len_exp=5, max_len_exp=6)
    assert section.cases() == [(32, 32), (32, 64), (64, 32), (64, 64)]


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "[[1]]",
        "[[1,2,3]]",
        "[1,2]",
        "5",
        "[[0,1]]",
        "[[1,-2]]",
        "[[1.5,2]]",
        "[['1',2]]",
        "[[True,1]]",
        "[]",
        "[[1,2]",
        "None",
        "{1:2}",
        "__import__('os')",
    ],
)
def test_bad_case_pairs(text: str) -> None:
    with pytest.raises(ConfigError, match="case_pair"):
        PerformanceSection(case_pair=text)


def test_exponents_that_give_no_case() -> None:
    with pytest.raises(ConfigError, match="min_len_exp"):
        PerformanceSection(min_len_exp=7, max_len_exp=6)


# -- precedence ----------------------------------------------------------------------------------


def test_flag_over_environment_over_file_over_default() -> None:
    ini = {"engine": {"memory_fraction": "0.5", "max_batch_size": "4"}}
    environ = {"NPU_MEMORY_FRACTION": "0.6"}
    flags = {"memory_fraction": 0.7}
    section, sources = merge_section(EngineSection, flags, ini, environ)
    assert (section.memory_fraction, sources["memory_fraction"]) == (0.7, "flag")
    section, sources = merge_section(EngineSection, {"memory_fraction": None}, ini, environ)
    assert (section.memory_fraction, sources["memory_fraction"]) == (0.6, "NPU_MEMORY_FRACTION")
    section, sources = merge_section(EngineSection, {}, ini, {"NPU_MEMORY_FRACTION": ""})
    assert (section.memory_fraction, sources["memory_fraction"]) == (0.5, "config.ini")
    assert (section.max_batch_size, sources["max_batch_size"]) == (4, "config.ini")
    section, sources = merge_section(EngineSection, {}, {}, {})
    assert (section.memory_fraction, sources["memory_fraction"]) == (0.9, "default")


def test_a_flag_that_repeats_the_default_still_counts_as_asked_for() -> None:
    _, sources = merge_section(EngineSection, {"max_output_length": 20}, {}, {})
    assert sources["max_output_length"] == "flag"
    _, sources = merge_section(EngineSection, {}, {"engine": {"max_output_length": "20"}}, {})
    assert sources["max_output_length"] == "default"  # as the shipped config.ini does


def test_environment_values_are_checked_by_their_own_name() -> None:
    for text in ("a", "nan", "inf", "-1"):
        with pytest.raises(ConfigError, match=r"NPU_MEMORY_FRACTION|memory_fraction"):
            merge_section(EngineSection, {}, {}, {"NPU_MEMORY_FRACTION": text})
    with pytest.raises(ConfigError, match="BIND_CPU"):
        merge_section(ModelSection, {}, {}, {"BIND_CPU": "on"})
    section, sources = merge_section(ModelSection, {}, {}, {"BIND_CPU": "0"})
    assert (section.bind_cpu, sources["bind_cpu"]) == (0, "BIND_CPU")


@pytest.mark.parametrize("text", ["true", "True", "1", "yes", "on"])
def test_booleans(text: str) -> None:
    ini = {"engine": {"enable_chunked_prefill": text, "enable_prefix_caching": "off"}}
    section, _ = merge_section(EngineSection, {}, ini, {})
    assert (section.enable_chunked_prefill, section.enable_prefix_caching) == (True, False)


def test_prefill_budget() -> None:
    assert EngineSection().prefill_budget == 1044
    assert EngineSection(max_batch_size=4).prefill_budget == 4 * 1044
    assert EngineSection(max_batch_size=4, max_prefill_batch_size=2).prefill_budget == 2 * 1044
    assert EngineSection(max_batch_size=4, max_prefill_tokens=7).prefill_budget == 7


def settings(directory: Path, *argv: str) -> Settings:
    return read_settings(argv, directory / "config.ini")


def test_a_model_path_in_the_file_is_relative_to_the_file(tmp_path: Path) -> None:
    write_ini(tmp_path, "[model]\nmodel_path = weights/a b\n")
    assert settings(tmp_path).model_path == tmp_path / "weights" / "a b"
    assert settings(tmp_path, "--model_path", "c").model_path == Path("c")
    other = tmp_path / "other.ini"
    other.write_text("[engine]\nblock_size = 32\n")
    read = settings(tmp_path, "--config", str(other))
    assert read.engine.block_size == 32
    assert read.model_path.name == "neox-mini"
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ini"):
        settings(tmp_path, "--config", "nowhere.ini")


def test_every_engine_and_model_flag_is_a_key_and_has_both_spellings() -> None:
    flags = {o for action in make_parser()._actions for o in action.option_strings}
    for cls in SECTIONS.values():
        for f in fields(cls):
            in_file_only = f.name in (
                *("device_ids", "parallel_backend", "log_dir", "bind_cpu"),
                "api_key",  # every user of the host can read a command line
            )
            has_flag = cls in (ModelSection, EngineSection, ServerSection) and not in_file_only
            assert (f"--{f.name}" in flags) == has_flag
    for flag in [f for f in flags if "_" in f]:
        assert flag.replace("_", "-") in flags


def test_settings_are_shown_with_their_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESERVED_MEMORY_GB", "0.5")
    write_ini(tmp_path, "[engine]\nblock_size = 64\n")
    lines = "\n".join(settings(tmp_path, "--max-batch-size", "3").describe())
    assert "max_batch_size=3 (flag)" in lines
    assert "block_size=64 (config.ini)" in lines
    assert "reserved_memory_gb=0.5 (RESERVED_MEMORY_GB)" in lines
    assert "num_blocks=0," in lines


# -- environment ---------------------------------------------------------------------------------


def test_environment_defaults_and_values() -> None:
    assert Environment.read({}) == Environment()
    read = Environment.read(
        {
            "RANK": "1",
            "LOCAL_RANK": "1",
            "WORLD_SIZE": "2",
            "IS_QUANT": "1",
            "ATB_LLM_BENCHMARK_ENABLE": "1",
            "ATB_LLM_BENCHMARK_FILEPATH": "/tmp/x.csv",
            "MINDIE_LOG_LEVEL": "debug",
            "OMP_NUM_THREADS": "3",
        }
    )
    assert (read.rank, read.local_rank, read.world_size, read.omp_num_threads) == (1, 1, 2, 3)
    assert (read.is_quant, read.benchmark_enabled, read.log_level) == (True, True, "DEBUG")
    assert read.benchmark_path == "/tmp/x.csv"


@pytest.mark.parametrize(
    ("environ", "missing"),
    [
        ({"RANK": "0"}, "LOCAL_RANK, WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "LOCAL_RANK, RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK"),
        ({"RANK": "0", "LOCAL_RANK": "", "WORLD_SIZE": "2"}, "LOCAL_RANK"),
    ],
)
def test_half_set_torchrun_variables(environ: dict[str, str], missing: str) -> None:
    with pytest.raises(ConfigError, match=f"set without {missing};"):
        Environment.read(environ)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "a"),
        ("RANK", "-1"),
        ("RANK", "2"),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "1.5"),
        ("LOCAL_RANK", "x"),
        ("IS_QUANT", "true"),
        ("ATB_LLM_BENCHMARK_ENABLE", "on"),
        ("OMP_NUM_THREADS", "4,x"),
        ("OMP_NUM_THREADS", "4 2"),
        ("OMP_NUM_THREADS", ",2"),
        ("OMP_NUM_THREADS", "-1"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "3"),
        ("LOCAL_WORLD_SIZE", "0"),
        ("MINDIE_LOG_LEVEL", "LOUD"),
    ],
)
def test_bad_environment_is_refused_by_name(name: str, value: str) -> None:
    environ = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"} | {name: value}
    with pytest.raises(ConfigError, match=name):
        Environment.read(environ)


@pytest.mark.parametrize(
    ("text", "threads"),
    [("4,2", 4), ("4", 4), (" 4 , 2 ", 4), ("8,4,2", 8), ("", 0), (" ", 0), ("0", 0)],
)
def test_the_outermost_number_of_threads_counts(text: str, threads: int) -> None:
    assert Environment.read({"OMP_NUM_THREADS": text}).omp_num_threads == threads


def test_a_number_of_ranks_alone_says_nothing() -> None:
    """As a cluster's operator leaves it behind; only RANK and its like make a rank."""
    assert Environment.read({"LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "h"}).local_world_size == 1


@pytest.mark.parametrize("flag", ["--model_path", "--config", "--output_file", "--against"])
def test_an_empty_path_is_an_unset_variable_of_the_shell(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It never means the embedded checkpoint, nor the current folder."""
    with pytest.raises(SystemExit, match="2"):
        settings(tmp_path, flag, "")
    assert f"argument {flag}" in capsys.readouterr().err


def test_where_the_checkpoint_is_from(tmp_path: Path) -> None:
    """Flag, then config.ini, then the embedded one; --auto_attention is all a launcher adds."""
    launcher = ("--task", "inference", "--auto_attention", "paged")
    assert settings(tmp_path, *launcher).model_path == EMBEDDED_CHECKPOINT
    write_ini(tmp_path, "[model]\nmodel_path = weights\nbind_cpu = 0\n")
    read = settings(tmp_path, *launcher)
    assert (read.model_path, read.model.bind_cpu) == (tmp_path / "weights", 0)
    read = settings(tmp_path, *launcher, "--model_path", "x", "--model-path", "y")
    assert read.model_path == Path("y")
    write_ini(tmp_path, "[model]\nmodel_path =\n")
    assert settings(tmp_path, *launcher).model_path == EMBEDDED_CHECKPOINT
