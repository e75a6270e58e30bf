# SPDX-License-Identifier: Apache-2.0
"""`main.py --task inference --attention paged` as users and their scripts see it."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import PADDING_ID, copy_checkpoint, write_chain_checkpoint
from support.processes import MAIN, Terminal, clean_environ, clean_this_process, run_here, run_main
from support.tokenizers import byte_level_tokenizer, write_tokenizer
from transformers import GPTNeoXForCausalLM

from gptneox.cli import read_settings
from gptneox.config.errors import ConfigError
from gptneox.config.settings import EngineSection
from gptneox.engine.api import Completion, EngineStats, StepStats
from gptneox.engine.sequence import SamplingParams
from gptneox.evaluation.performance_result import COLUMNS
from gptneox.output import BENCHMARK_COLUMNS, KeptAnswers, write_benchmark
from gptneox.prompts import Prompt

# What the model says: after each letter the next one, then end-of-text.
CHAINS = ("123456789", "abca", "!👍.", "z~y", "{\0}")
PAGED = ("--attention", "paged")

# torch's reporter of failing ranks wants a real stderr, which a test in this process has not.
pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")


class Result(NamedTuple):
    status: int
    out: str
    err: str

    def answers(self) -> list[tuple[str, str, int]]:
        """(question, answer, token count) of each request, in order."""
        pattern = (
            r"Question\[(\d+)\]: (.*?)\nAnswer\[\1\]: (.*?)\n"
            r"Generate\[\1\] token num: \(\1, (\d+)\)\n"
        )
        found = re.findall(pattern, self.out, flags=re.DOTALL)
        assert [int(i) for i, *_ in found] == list(range(len(found)))
        return [(question, answer, int(count)) for _, question, answer, count in found]

    def assert_failed(self, status: int, *named: str) -> None:
        """One line on stderr says it all."""
        assert self.status == status, self.err
        errors = [line for line in self.err.splitlines() if "error: " in line]
        assert len(errors) == 1, self.err
        for text in named:
            assert text in errors[0]
        assert "Traceback" not in self.out + self.err
        assert "Answer[" not in self.out


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose text is known; do not write into it."""
    return write_chain_checkpoint(tmp_path_factory.mktemp("chain") / "checkpoint", *CHAINS)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 64 positions."""
    directory = tmp_path_factory.mktemp("short") / "checkpoint"
    return write_chain_checkpoint(directory, *CHAINS, max_position_embeddings=64)


@pytest.fixture
def cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """main.py in this process, in an empty directory and a clean environment."""
    clean_this_process(monkeypatch, tmp_path)

    def run(*argv: str) -> Result:
        capsys.readouterr()
        return Result(run_here(*argv), *capsys.readouterr())

    return run


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def paged(path: Path, *argv: str) -> tuple[str, ...]:
    return (*PAGED, "--model_path", str(path), *argv)


# -- answers -------------------------------------------------------------------------------------


def test_as_users_start_it(chain: Path, tmp_path: Path) -> None:
    """A process of its own: several prompts, a file as prompt, both spellings, the output file."""
    (tmp_path / "question.txt").write_text("count: 1", encoding="utf-8")
    done = run_main(
        *paged(chain, "--input-texts", "1", "question.txt", "a", "hello 日本 !"),
        *("--max-batch-size", "2", "--max_output_length", "11", "--stream"),
        *("--output-file", "deep/er/answers.jsonl"),
        cwd=tmp_path,
    )
    result = Result(done.returncode, done.stdout, done.stderr)
    assert result.status == 0, result.err
    assert result.answers() == [
        ("1", "23456789", 9),  # with end-of-text, each request its own count
        ("count: 1", "23456789", 9),
        ("a", "bcabcabcabc", 11),
        ("hello 日本 !", "👍.", 6),
    ]
    assert re.search(r"^prefill: \d+ tokens, [\d.]+ tokens/s", result.out, re.MULTILINE)
    assert re.search(
        r"^decode: \d+ tokens, .* measured (memory|cache) bandwidth$", result.out, re.M
    )
    assert re.search(r"rank 0: loaded .* KV-cache blocks of 128 tokens", result.err)
    assert "Answer[" not in result.err
    lines = (tmp_path / "deep/er/answers.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["text"] for r in records] == [answer for _, answer, _ in result.answers()]
    assert [r["prompt"] for r in records] == ["1", "count: 1", "a", "hello 日本 !"]
    assert [len(r["token_ids"]) for r in records] == [9, 9, 11, 6]
    assert [r["finish_reason"] for r in records] == ["stop", "stop", "length", "stop"]
    assert [r["index"] for r in records] == [0, 1, 2, 3]
    assert [len(r["prompt_ids"]) for r in records][::2] == [1, 1]
    assert names(tmp_path / "deep/er") == ["answers.jsonl"], "a temporary file is left"


def test_stream_and_batch_size_change_nothing(cli: Callable[..., Result], chain: Path) -> None:
    texts = ("1", "!", "a", "{", "z", "x", "ab 7")
    argv = paged(chain, "--input_texts", *texts, "--max_output_length", "9")
    expected = cli(*argv).answers()
    assert expected == [
        ("1", "23456789", 9),
        ("!", "👍.", 6),
        ("a", "bcabcabca", 9),
        ("{", "\0}", 3),
        ("z", "y", 3),
        ("x", "", 1),
        ("ab 7", "89", 3),
    ]
    for extra in (
        ("--stream",),
        ("--max_batch_size", "4"),
        ("--stream", "--max_batch_size", "7", "--block_size", "16", "--num_blocks", "2"),
        ("--enable_prefix_caching", "False", "--enable-chunked-prefill", "False"),
        ("--max_batch_size", "3", "--max_prefill_tokens", "1"),
    ):
        assert cli(*argv, *extra).answers() == expected, extra


def test_ids_in_ids_out_as_transformers_generates(
    cli: Callable[..., Result], chain: Path, tmp_path: Path
) -> None:
    """--load_tokenizer False needs no tokenizer at all; a model with real layers this time."""
    path = copy_checkpoint(chain, tmp_path / "copied")
    for file in path.glob("tokenizer*"):
        file.unlink()
    generator = torch.Generator().manual_seed(4)
    tensors = load_file(path / "model.safetensors")
    for tensor in tensors.values():
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    prompts = ["1,2,3", "300", "5,5,5,5,5,5,5,5"]
    argv = ("--load-tokenizer", "False", "--ignore_eos", "--max_output_length", "12")
    result = cli(*paged(path, "--input_ids", *prompts, *argv))
    model = GPTNeoXForCausalLM.from_pretrained(path)
    for (question, answer, count), prompt in zip(result.answers(), prompts, strict=True):
        ids = torch.tensor([[int(i) for i in prompt.split(",")]])
        expected = model.generate(
            ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=-1
        )
        assert question == prompt
        assert answer == ",".join(map(str, expected[0, ids.shape[1] :].tolist()))
        assert count == 12
    assert cli(*paged(path, "--input_ids", *prompts, *argv, "--stream")).answers() == (
        result.answers()
    )


def test_stop_strings_and_ignore_eos(cli: Callable[..., Result], chain: Path) -> None:
    argv = paged(chain, "--input_texts", "1", "ab 1", "--max_output_length", "30")
    for stream in ((), ("--stream",)):
        stopped = cli(*argv, "--stop", "56", "x", *stream)
        assert [a[1] for a in stopped.answers()] == ["234", "234"]
        tail = cli(*argv, "--stop", "1", *stream)  # the prompt's own end does not count
        assert [a[1:] for a in tail.answers()] == [("23456789", 9)] * 2
    ignoring = cli(*argv, "--ignore_eos")
    assert [a[1:] for a in ignoring.answers()] == [("23456789", 30)] * 2


def test_the_default_prompt(cli: Callable[..., Result], chain: Path) -> None:
    assert cli(*paged(chain)).answers() == [("What's deep learning?", "", 1)]


def test_ids_win_over_texts_and_padding_ids_are_silent(
    cli: Callable[..., Result], chain: Path
) -> None:
    ids = f"{PADDING_ID},0"
    result = cli(*paged(chain, "--input_texts", "1", "--input_ids", ids, "0"))
    assert result.answers() == [(ids, "", 1), ("0", "", 1)]


def test_a_seed_repeats_a_sampled_text(cli: Callable[..., Result], chain: Path) -> None:
    argv = paged(chain, "--input_texts", "1", "a", "--temperature", "30", "--ignore_eos")
    first = cli(*argv, "--seed", "5").answers()
    assert cli(*argv, "--seed", "5", "--max_batch_size", "2", "--stream").answers() == first
    assert cli(*argv, "--seed", "6").answers() != first
    assert first[0][1] != "23456789"


def test_prompts_that_look_like_paths(
    cli: Callable[..., Result], chain: Path, tmp_path: Path
) -> None:
    """Only what exists stands for its content; anything else is a text."""
    texts = ("directory", "no/such/file", "x" * 300 + "1", "/" + "y" * 5000 + "1", "~", "...")
    positions = ("--max_output_length", "1")
    result = cli(*paged(chain, *positions, "--input_texts", *texts[:3], *texts[4:]))
    assert [a[0] for a in result.answers()] == [*texts[:3], *texts[4:]]
    assert result.answers()[2][1:] == ("2", 1)
    cli(*paged(chain, "--input_texts", texts[3])).assert_failed(2, "5002 tokens", "2048")


@pytest.mark.parametrize("path", ["paged", "flash"])
def test_an_output_file_that_cannot_be_written_is_found_first(
    path: str, cli: Callable[..., Result], chain: Path, tmp_path: Path
) -> None:
    """Before the weights are read, and with nothing left behind."""
    (tmp_path / "folder").mkdir()
    argv = ("--attention", path, "--model_path", str(chain), "--input_texts", "1")
    for name, reason in (("folder", "folder"), ("/proc/out", "cannot be written")):
        result = cli(*argv, "--output_file", name)
        result.assert_failed(1, name, reason, "name another one")
        assert "loaded" not in result.err
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("path", ["paged", "flash"])
def test_a_terminal_that_cannot_encode_an_answer(
    path: str, cli: Callable[..., Result], chain: Path, tmp_path: Path, monkeypatch
) -> None:
    """It is shown with escapes; the other answers and the file are complete."""
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    texts = ("--input_texts", "!", "日1", "--max_output_length", "6", "--output_file", "out.jsonl")
    cli("--attention", path, "--model_path", str(chain), *texts)
    shown = screen.buffer.getvalue().decode("ascii")
    assert r"\U0001f44d." in shown
    assert r"Question[1]: \u65e51" in shown
    assert "Answer[1]: 234567" in shown
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["text"] for record in records] == ["👍.", "234567"]


@pytest.mark.parametrize("with_file", [True, False])
@pytest.mark.parametrize("path", ["paged", "flash"])
def test_the_reader_of_the_output_has_gone(
    path: str, with_file: bool, cli: Callable[..., Result], chain: Path, tmp_path: Path, monkeypatch
) -> None:
    """As in `| head -1`: no traceback; a file still gets every answer."""

    reading, writing = os.pipe()
    os.close(reading)
    broken = os.fdopen(writing, "w")
    monkeypatch.setattr(sys, "stdout", broken)
    argv = ("--input_texts", "1", "2", *("--output_file", "out.jsonl") * with_file)
    result = cli("--attention", path, "--model_path", str(chain), *argv)
    with contextlib.suppress(BrokenPipeError):
        broken.close()
    assert result.status == 1
    assert "Traceback" not in result.err
    if with_file:
        records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert [record["text"] for record in records] == ["23456789", "3456789"]
    assert names(tmp_path) == ["out.jsonl"] * with_file


def test_a_full_disk_behind_the_output(chain: Path, tmp_path: Path) -> None:
    """One line and status 1; not Python's own words at its end, and 120."""
    argv = [sys.executable, MAIN, "--task", "compare", "--against", "a.csv", "--with", "b.csv"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for name in ("a.csv", "b.csv"):
        row = "1,8,4,1.0,1.0,1.0,0,0\n"
        (tmp_path / name).write_text(",".join(COLUMNS) + f"\n{row}")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            argv, cwd=tmp_path, env=env, stdout=full, stderr=-1, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "error: standard output cannot be written: No space left on device\n"


def test_a_closed_output_is_refused_before_the_work(
    cli: Callable[..., Result], chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # what Python makes of `>&-`
    result = cli(*paged(chain, "--input_texts", "1"))
    result.assert_failed(2, "standard output is closed; send it to a file or to /dev/null")
    assert "loaded" not in result.err


def test_a_log_folder_that_cannot_be_made(
    cli: Callable[..., Result], chain: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "log.ini").write_text("[model]\nlog_dir = file/logs\n")
    result = cli(*paged(chain, "--config", "log.ini", "--input_texts", "1"))
    result.assert_failed(2, "log_dir file/logs", "Not a directory", "name another folder")


@pytest.mark.parametrize("path", ["", "new.csv", "/proc/rows.csv", "folder"])
def test_where_a_benchmark_goes(
    path: str, cli: Callable[..., Result], chain: Path, tmp_path: Path, monkeypatch
) -> None:
    """A file of the user's is replaced whole, the default one takes a row of each run."""
    (tmp_path / "folder").mkdir()
    monkeypatch.setenv("ATB_LLM_BENCHMARK_ENABLE", "1")
    monkeypatch.setenv("ATB_LLM_BENCHMARK_FILEPATH", path)
    argv = paged(chain, "--input_texts", "1", "--max_output_length", "2")
    if path.startswith("/") or path == "folder":
        cli(*argv).assert_failed(1, path, "cannot be written")
        return
    for count in (1, 2):
        assert cli(*argv).status == 0
        found = rows(tmp_path / (path or "benchmark_result/benchmark.csv"))
        assert len(found) == (1 if path else count)


# -- what is refused -----------------------------------------------------------------------------


def test_bad_prompts(cli: Callable[..., Result], chain: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    cli(*paged(chain, "--input_texts", "1", "")).assert_failed(
        2, "prompt 1 is empty", "--input_ids"
    )
    cli(*paged(chain, "--input_texts", "empty")).assert_failed(2, "prompt 0 is empty")
    cli(*paged(chain, "--input_texts", "latin")).assert_failed(1, "latin", "UTF-8")
    cli(*paged(chain, "--input_texts", "\ud800")).assert_failed(2, "prompt 0", "Unicode")
    cli(*paged(chain, "--input_ids", "")).assert_failed(2, "prompt", "at least one token")
    cli(*paged(chain, "--input_ids", "336")).assert_failed(2, "336", "0 to 335")
    cli(*paged(chain, "--input_ids", "3", "-1")).assert_failed(2, "-1", "0 to 335")
    cli(*paged(chain, "--input_ids", "1,a")).assert_failed(2, "--input_ids", "1,a")
    cli(*paged(chain, "--input_ids", "1,,2")).assert_failed(2, "--input_ids", "1,,2")
    cli(*paged(chain, "--input_texts")).assert_failed(2, "--input_texts")


def test_lengths_and_positions(cli: Callable[..., Result], short: Path) -> None:
    """64 positions: prompt and new tokens must fit, unless the length was nobody's wish."""

    def ids(count: int) -> tuple[str, str]:
        return "--input_ids", ",".join(["5"] * count)

    one = ("--max_output_length", "1", "--ignore_eos")
    assert [cli(*paged(short, *ids(n), *one)).answers()[0][2] for n in (62, 63)] == [1, 1]
    cli(*paged(short, *ids(64), *one)).assert_failed(2, "64", "at most 0")
    cli(*paged(short, *ids(65), *one)).assert_failed(2, "65 tokens", "64 positions")
    # Not asked for: capped to what is left, unless nothing is.
    assert cli(*paged(short, *ids(60), "--ignore_eos")).answers()[0][2] == 4
    assert cli(*paged(short, *ids(44), "--ignore_eos")).answers()[0][2] == 20
    cli(*paged(short, *ids(64))).assert_failed(2, "64 positions")
    # Asked for: refused, the default's own value, too.
    for length in ("20", "5"):
        asked = cli(*paged(short, *ids(60), "--max_output_length", length))
        asked.assert_failed(2, f"max_new_tokens is {length}", "60 tokens", "64", "at most 4")
    more = ("--max_position_embeddings", "80", "--ignore_eos")
    assert cli(*paged(short, *ids(64), *more)).answers()[0][2] == 16


def test_a_request_larger_than_the_cache(cli: Callable[..., Result], chain: Path) -> None:
    small = ("--num_blocks", "2", "--block_size", "16", "--input_ids", ",".join(["5"] * 30))
    assert cli(*paged(chain, *small, "--max_output_length", "2")).status == 0
    result = cli(*paged(chain, *small, "--max_output_length", "3"))
    result.assert_failed(2, "at most 2 KV-cache blocks", "not 3", "--num_blocks")


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--temperature", ["-1", "nan", "inf", "hot"]),
        ("--top_p", ["0", "1.1", "nan"]),
        ("--top_k", ["-5", "2.5"]),
        ("--max_output_length", ["0", "-3", "1.5"]),
        ("--repetition_penalty", ["0", "-1", "inf"]),
        ("--seed", ["-1", "x", str(2**63)]),
        ("--stop", ["", None]),
        ("--block_size", ["8", "0", "600"]),
        ("--num_blocks", ["-1", "many"]),
        ("--max_batch_size", ["0", "-1"]),
        ("--max_prefill_tokens", ["0", "-2"]),
        ("--max_input_length", ["0"]),
        ("--memory_fraction", ["0", "1.5", "nan"]),
        ("--reserved_memory_gb", ["-1", "inf", "nan"]),
        ("--enable_prefix_caching", ["maybe"]),
        ("--device", ["tpu"]),
        ("--dtype", ["int4"]),
        ("--attention", ["slow"]),
        ("--task", ["dance"]),
        ("--load_tokenizer", ["False", "perhaps"]),
        ("--tp", ["2"]),
        ("--blok_size", ["16"]),
        ("--max_batch", ["1"]),  # no abbreviations: they would change meaning with a new flag
    ],
)
def test_bad_flags_are_usage_errors(
    cli: Callable[..., Result], tmp_path: Path, flag: str, values: list[str | None]
) -> None:
    """Refused before anything is loaded: the checkpoint does not exist."""
    field = {"--max_output_length": "max_", "--device": "device"}.get(flag, flag.strip("-"))
    for value in values:
        argv = (flag,) if value is None else (flag, value)
        cli(*paged(tmp_path / "none"), *argv).assert_failed(2, field)
    too_many = [str(i) for i in range(17)]
    cli(*paged(tmp_path / "none"), "--stop", *too_many).assert_failed(2, "stop", "16")


def test_bad_directories(
    cli: Callable[..., Result], chain: Path, short: Path, tmp_path: Path
) -> None:
    """Each message says what was looked for; a path with blanks and non-ASCII letters works."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, status, state in (
        *(("none", 2, "does not exist"), ("file", 2, "directory")),
        ("empty", 1, "holds none"),
    ):
        result = cli(*paged(tmp_path / name, "--input_texts", "1"))
        result.assert_failed(status, "no config.json in", name, state)
    path = copy_checkpoint(short, tmp_path / "mit Blank – 重み")
    assert cli(*paged(path, "--input_texts", "1")).answers() == [("1", "23456789", 9)]
    (path / "tokenizer.json").unlink()
    cli(*paged(path, "--input_texts", "1")).assert_failed(1, "no tokenizer in", "--load_tokenizer")
    assert cli(*paged(path, "--input_ids", "1", "--load_tokenizer", "False")).status == 0


def test_bad_files(cli: Callable[..., Result], short: Path, tmp_path: Path) -> None:
    path = copy_checkpoint(short, tmp_path / "copied")
    config = json.loads((path / "config.json").read_text())

    def refused(*named: str, **keys: Any) -> None:
        (path / "config.json").write_text(json.dumps(config | keys))
        cli(*paged(path, "--input_texts", "1")).assert_failed(1, *named)

    refused("model_type", "llama", model_type="llama")
    refused("num_attention_heads", num_attention_heads=0)
    refused("hidden_act", "foo", hidden_act="foo")
    refused("tokenizer", "313 tokens", "vocab_size 300", vocab_size=300)
    refused("w8a8", "quantized", quantize="w8a8")
    refused("lacks 12 tensors", num_hidden_layers=3)
    (path / "config.json").write_text(json.dumps(config))
    weights = path / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    cli(*paged(path, "--input_texts", "1")).assert_failed(1, "model.safetensors", "damaged")
    weights.unlink()
    cli(*paged(path, "--input_texts", "1")).assert_failed(1, "no weights in")


def test_weights_with_nan_stop_at_the_first_logits(
    cli: Callable[..., Result], short: Path, tmp_path: Path
) -> None:
    path = copy_checkpoint(short, tmp_path / "copied")
    tensors = load_file(path / "model.safetensors")
    tensors["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"][3] = float("nan")
    save_file(tensors, path / "model.safetensors")
    result = cli(*paged(path, "--input_texts", "1"))
    result.assert_failed(1, "request 0", "not finite", "--dtype float32")


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_a_prompt_that_fails_leaves_the_others_their_answers(
    attention: str, cli: Callable[..., Result], short: Path, tmp_path: Path
) -> None:
    """The row of one token holds NaN: the run answers the rest, then ends with the error."""
    path = copy_checkpoint(short, tmp_path / "copied")
    tensors = load_file(path / "model.safetensors")
    tensors["gpt_neox.embed_in.weight"][byte_level_tokenizer().encode("z").ids[0]] = float("nan")
    save_file(tensors, path / "model.safetensors")
    file = tmp_path / "answers.jsonl"
    argv = (*paged(path, "--input_texts", "1", "z", "5"), "--attention", attention)
    result = cli(*argv, "--max_batch_size", "3", "--output_file", str(file))
    assert result.status == 1
    assert "request 1: the logits are not finite" in result.err
    assert re.findall(r"^Answer\[(\d)\]: (\d+)", result.out, re.MULTILINE) == [
        ("0", "23456789"),
        ("2", "6789"),
    ]
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["finish_reason"] for record in records] == ["stop", "error", "stop"]
    assert ["error" in record for record in records] == [False, True, False]


def test_planted_code_is_not_run(cli: Callable[..., Result], short: Path, tmp_path: Path) -> None:
    """`auto_map` is not followed; the checkpoint works with our own classes."""
    path = copy_checkpoint(short, tmp_path / "copied")
    marker = tmp_path / "executed"
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Evil: pass\n"
    (path / "evil.py").write_text(code)
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    auto_map["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(content | {"auto_map": auto_map}))
    assert cli(*paged(path, "--input_texts", "1")).answers() == [("1", "23456789", 9)]
    assert not marker.exists()


def test_settings_file_and_environment(
    cli: Callable[..., Result], short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ini = tmp_path / "my.ini"
    ini.write_text(f"[model]\nmodel_path = {short}\nattention = paged\n[engine]\nblock_size = 16\n")
    result = cli("--config", "my.ini", "--input_texts", "1")
    assert result.answers() == [("1", "23456789", 9)]
    assert "block_size=16 (config.ini)" in result.err
    ini.write_text("[engine]\nblok_size = 16\n")
    cli("--config", "my.ini").assert_failed(2, "my.ini", "blok_size")
    cli("--config", "gone.ini").assert_failed(2, "gone.ini")
    monkeypatch.setenv("RANK", "0")
    cli(*paged(short)).assert_failed(2, "RANK", "LOCAL_RANK, WORLD_SIZE")
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("NPU_MEMORY_FRACTION", "2")
    cli(*paged(short)).assert_failed(2, "memory_fraction")


def test_not_enough_memory_for_the_cache(cli: Callable[..., Result], short: Path) -> None:
    result = cli(*paged(short, "--reserved_memory_gb", "1000000", "--input_texts", "1"))
    result.assert_failed(1, "KV cache", "--reserved_memory_gb")


def test_a_device_that_is_named_is_never_replaced(cli: Callable[..., Result], short: Path) -> None:
    if not torch.cuda.is_available():
        cli(*paged(short, "--device", "cuda", "--input_texts", "1")).assert_failed(1, "cuda")
    cli(*paged(short, "--device", "npu", "--input_texts", "1")).assert_failed(1, "npu")


def test_debug_shows_the_traceback(cli: Callable[..., Result], tmp_path: Path) -> None:
    result = cli(*paged(tmp_path / "none"), "--debug")
    assert result.status == 2
    assert "Traceback (most recent call last)" in result.err
    assert result.err.count("\nerror: ") == 1
    done = run_main("--temperature", "-1", "--debug", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.count("\nerror: ") == 1


def test_version_and_help(cli: Callable[..., Result]) -> None:
    result = cli("--version")
    assert result.status == 0
    assert re.fullmatch(r"gptneox-ascend \d+\.\d+\.\d+\n", result.out)
    result = cli("--help")
    assert result.status == 0
    assert "--max_output_length" in result.out


# -- the benchmark file --------------------------------------------------------------------------


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames) == BENCHMARK_COLUMNS
        found = list(reader)
    assert all(None not in row and None not in row.values() for row in found)
    return found


def test_benchmark_file(
    cli: Callable[..., Result], chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATB_LLM_BENCHMARK_ENABLE", "1")
    monkeypatch.setenv("ATB_LLM_BENCHMARK_FILEPATH", "a dir/own.csv")
    argv = paged(chain, "--ignore_eos", "--max_output_length", "6", "--max_batch_size", "2")
    for _ in range(2):  # the named file holds the last run only
        assert cli(*argv, "--input_ids", "1,2,3", "4,5").answers()[0][2] == 6
    (row,) = rows(tmp_path / "a dir/own.csv")
    assert (row["batch_size"], row["max_generate_batch_size"]) == ("2", "2")
    assert (row["input_seq_len"], row["output_seq_len"]) == ("3", "6")
    prefill = [float(s) for s in row["prefill_token_times"].split(",")]
    decode = [float(s) for s in row["decode_token_times"].split(",")]
    assert len(prefill) == int(row["prefill_count"]) == 1
    assert len(decode) == 5
    times = {name: float(row[name]) for name in BENCHMARK_COLUMNS if name.endswith("(ms)")}
    assert times["prefill_time(ms)"] == pytest.approx(1e3 * sum(prefill), abs=0.02)
    assert times["decoder_token_time(ms)"] == pytest.approx(1e3 * sum(decode) / 5, abs=0.02)
    assert times["e2e_time(ms)"] == pytest.approx(1e3 * sum(prefill + decode), abs=0.03)
    assert times["prefill_average_time(ms)"] == pytest.approx(1e3 * sum(prefill) / 2, abs=0.02)
    assert all(re.fullmatch(r"\d+\.\d\d", row[name]) for name in times)


def test_many_writers_lose_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The lock belongs to the open file, so threads stand for processes; the header comes once."""
    stats = EngineStats(steps=[StepStats(0.0, 0.5, 3, 0, 3), StepStats(0.5, 0.25, 0, 1, 4)])
    engine = SimpleNamespace(stats=stats, settings=EngineSection())
    output = Completion(0, "", [], token_ids=[1, 2])
    num_writers = 8

    def write(writer: int, together: threading.Barrier) -> None:
        together.wait()
        write_benchmark("", engine, [Prompt([1] * (writer + 1), "")], [output])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads interrupt each other wherever they can
    request.addfinalizer(lambda: sys.setswitchinterval(interval))
    for i in range(40):
        (tmp_path / str(i)).mkdir()
        monkeypatch.chdir(tmp_path / str(i))
        together = threading.Barrier(num_writers)
        threads = [threading.Thread(target=write, args=(w, together)) for w in range(num_writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = rows(Path("benchmark_result/benchmark.csv"))
        assert sorted(row["input_seq_len"] for row in found) == list("12345678")


@pytest.mark.slow
def test_parallel_runs_lose_no_row(chain: Path, tmp_path: Path) -> None:
    """Two processes in one directory, without a file name of their own."""
    results: list[subprocess.CompletedProcess[str]] = []

    def run(count: int) -> None:
        texts = ["1"] * count
        argv = paged(chain, "--input_texts", *texts, "--max_output_length", "2")
        results.append(run_main(*argv, cwd=tmp_path, ATB_LLM_BENCHMARK_ENABLE="1"))

    threads = [threading.Thread(target=run, args=(i + 1,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r.returncode for r in results] == [0, 0], results[0].stderr
    found = rows(tmp_path / "benchmark_result" / "benchmark.csv")
    assert sorted(row["batch_size"] for row in found) == ["1", "2"]


# -- pipes and terminals -------------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["", pytest.param("--stream", marks=pytest.mark.slow)])
def test_a_reader_that_leaves_causes_no_traceback(chain: Path, tmp_path: Path, stream: str) -> None:
    script = (
        '"$1" "$2" --attention paged --model_path "$3" --input_texts a '
        f'--max_output_length 400 {stream} 2>err | head -n 1; echo "${{PIPESTATUS[0]}}"'
    )
    done = subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, str(MAIN), str(chain)],
        cwd=tmp_path,
        env=clean_environ(),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    first, status = done.stdout.splitlines()
    assert first == "Question[0]: a"
    assert status in ("1", "141"), "a failure, but no usage error"
    err = (tmp_path / "err").read_text()
    assert "Traceback" not in err
    assert "BrokenPipe" not in err
    assert "Exception ignored" not in err


def test_the_prompt_loop(chain: Path, tmp_path: Path) -> None:
    argv = paged(chain, "--interactive", "--max_output_length", "1900")
    terminal = Terminal(MAIN, *argv, cwd=tmp_path)
    try:
        terminal.wait_for("\r\n> ")
        terminal.type("count: 1\n")
        assert terminal.wait_for("\r\n> ") == "count: 1\r\n23456789"
        terminal.type("\n")  # nothing typed, nothing asked
        terminal.wait_for("> ")
        terminal.type("!\n")
        assert terminal.wait_for("\r\n> ") == "!\r\n👍."
        terminal.type("a\n")  # goes round until it is stopped
        terminal.wait_for("bcabcabcabca")
        terminal.type(b"\x03")
        stopped = terminal.wait_for(" [stopped]\r\n> ")
        assert set(stopped) <= set("abc^C")
        terminal.type("x" * 200 + "\n")  # too long together with 1900 new tokens
        assert "error: max_new_tokens is 1900" in terminal.wait_for("\r\n> ")
        terminal.type(b"caf\xff\n")  # not UTF-8
        assert "error: " in terminal.wait_for("\r\n> ")
        terminal.type(b"\x03")  # at the prompt: no end
        assert "/exit or Ctrl-D ends" in terminal.wait_for("\r\n> ")
        terminal.type("1\n")
        assert terminal.wait_for("\r\n> ") == "1\r\n23456789"
        terminal.type("/exit\n")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.close()


def test_no_interrupt_at_the_prompt_is_lost(chain: Path, tmp_path: Path) -> None:
    # Each comes while the program is about to wait for a line, or already waits.
    terminal = Terminal(MAIN, *paged(chain, "--interactive"), cwd=tmp_path)
    try:
        terminal.wait_for("\r\n> ")
        for _ in range(300):
            terminal.type(b"\x03")
            assert "/exit or Ctrl-D ends" in terminal.wait_for("\r\n> ")
        terminal.type(b"\x04")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.close()


def test_interrupt_while_answering_prompts_ends_the_program(chain: Path, tmp_path: Path) -> None:
    # Far more than is done before the signal comes, however busy the machine is. Tests that run in
    # the background of a shell inherit a SIGINT that is ignored.
    texts = ["a"] * 50
    argv = paged(chain, "--input_texts", *texts, "--stream", "--max_output_length", "1900")
    process = subprocess.Popen(
        ["env", "--default-signal=INT", sys.executable, str(MAIN), *argv],
        cwd=tmp_path,
        env=clean_environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "Question[0]: a\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err


# -- chat ----------------------------------------------------------------------------------------

# The first message; later the last letter of the answer before, to see that it was kept.
FOLLOWS = "{{ messages[-2].content[-1] if messages | length > 1 else messages[0].content }}"


def test_a_conversation(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(FOLLOWS, encoding="utf-8")
    options = ("--interactive", "--chat-template", "chat.jinja", "--max_output_length", "3")
    terminal = Terminal(MAIN, *paged(chain, *options), cwd=tmp_path)
    try:
        assert "Each line is answered" in terminal.wait_for("\r\n> ")
        for line, answer in (("1", "234"), ("go on", "567"), ("and on", "89")):
            terminal.type(f"{line}\n")
            assert terminal.wait_for("\r\n> ") == f"{line}\r\n{answer}"
        terminal.type("/new\n")
        terminal.wait_for("> ")
        terminal.type("a\n")
        assert terminal.wait_for("\r\n> ") == "a\r\nbca"
        terminal.type(b"\x04")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.close()


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_prompts_as_messages(
    attention: str, cli: Callable[..., Result], chain: Path, tmp_path: Path
) -> None:
    """A named template, with its stop strings besides one's own."""
    options = ("--chat_template", "gpt-neoxt-chat", "--stop", "x", "--output_file", "out.jsonl")
    result = cli(*paged(chain, "--input_texts", "1", *options), "--attention", attention)
    assert result.status == 0, result.err
    record = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    assert record["prompt"] == "1"
    expected = byte_level_tokenizer().encode("<human>: 1\n<bot>:").ids
    assert record["prompt_ids"] == expected


def test_the_template_of_the_model(cli: Callable[..., Result], chain: Path, tmp_path: Path) -> None:
    copied = copy_checkpoint(chain, tmp_path / "with template")
    (copied / "chat_template.jinja").write_text("x{{ messages[0].content }}1", encoding="utf-8")
    result = cli(*paged(copied, "--chat", "--input_texts", "y"))
    assert "Question[0]: y\nAnswer[0]: 23456789\n" in result.out
    without = cli(*paged(copied, "--input_texts", "1"))
    assert "Answer[0]: 23456789\n" in without.out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--chat",), "no chat template; name one with --chat_template: one of dolly-v2"),
        (("--chat", "--interactive"), "no chat template"),
        (("--chat_template", "doly"), "--chat_template doly is neither a name nor a file"),
        (("--chat_template", ""), "it is empty"),
        (("--chat", "--input_ids", "1"), "--chat works on texts"),
    ],
)
def test_chat_that_is_refused(
    options: tuple[str, ...], named: str, cli: Callable[..., Result], chain: Path
) -> None:
    result = cli(*paged(chain, *options))
    assert result.status == 2, result.err
    assert named in result.err
    doctor = cli("--task", "doctor", "--attention", "paged", "--model_path", str(chain), *options)
    is_on_page = named in doctor.out
    assert is_on_page or named in doctor.err
    assert doctor.status == (1 if is_on_page else 2)


# -- how tokens are chosen -----------------------------------------------------------------------


def test_every_flag_of_sampling_reaches_the_request() -> None:
    flags = "--temperature .5 --top_k 4 --top_p .9 --min_p .1 --repetition_penalty 1.2 --seed 3"
    flags += " --presence-penalty -1 --frequency_penalty .5 --logit_bias 7:-100 9:1.5,8:2"
    flags += (
        " --allowed_token_ids 7,8 9 --stop a b --include_stop --stop_token_ids 5,6 --ignore_eos"
    )
    flags += " --min_new_tokens 2 --max_output_length 12"
    settings = read_settings(flags.split(), Path("none.ini"))
    assert settings.sampling == SamplingParams(
        max_new_tokens=12,
        temperature=0.5,
        top_k=4,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=-1.0,
        frequency_penalty=0.5,
        logit_bias=((7, -100.0), (9, 1.5), (8, 2.0)),
        allowed_token_ids=(7, 8, 9),
        seed=3,
        stop=("a", "b"),
        include_stop=True,
        stop_token_ids=(5, 6),
        ignore_eos=True,
        min_new_tokens=2,
    )
    assert "logit_bias=((7, -100.0)" in settings.describe()[-1]
    plain = read_settings([], Path("none.ini"))
    assert plain.sampling == SamplingParams(max_new_tokens=20)
    assert "bias" not in plain.describe()[-1]


@pytest.mark.parametrize("value", ["7", "7:x", "x:7", "7:1:2", ""])
def test_a_bias_is_a_pair(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_settings(["--logit_bias", value], Path("none.ini"))
    assert "no list of ID:VALUE" in capsys.readouterr().err


# -- what is asked for and not there -------------------------------------------------------------


def test_float_weights_are_not_quantized_on_the_way(
    cli: Callable[..., Result], short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IS_QUANT", "1")
    cli(*paged(short)).assert_failed(2, "IS_QUANT", "are not quantized")


def test_the_helper_tokenizer_leaves_padding_rows(tmp_path: Path) -> None:
    assert write_tokenizer(tmp_path) < PADDING_ID


# -- answers of a run that was interrupted -------------------------------------------------------


def test_kept_answers_are_those_of_the_same_run(tmp_path: Path) -> None:
    file, path = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.partial"
    run = ["float32", [[1, 2], "params"]]
    first = Completion(0, text="ä\n", token_ids=[1, 2], finish_reason="stop", stop_reason="x")
    failed = Completion(1, finish_reason="error", error="not finite")
    with KeptAnswers(file, run) as kept:
        assert kept.done == {}
        kept.add(3, first)
        kept.add(1, failed)
        with pytest.raises(RuntimeError, match="another run writes"):
            KeptAnswers(file, run)
    with path.open("a") as cut_off:
        cut_off.write('{"index": 4, "te')
    with KeptAnswers(file, run) as kept:
        assert list(kept.done) == [3], "neither the failed one nor half an answer"
        again = kept.done[3]
        assert (again.text, again.new_text, again.token_ids) == ("ä\n", "ä\n", [1, 2])
        assert (again.finish_reason, again.stop_reason) == ("stop", "x")
        kept.add(4, first)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="answers of another run"):
        KeptAnswers(file, ["float16", run[1]])
    assert path.read_bytes() == before
    with KeptAnswers(file, run) as kept:
        assert list(kept.done) == [3, 4]
        kept.remove()
    assert not path.exists()
    with KeptAnswers(None, run) as kept:
        kept.add(0, first)
        kept.remove()
    assert list(tmp_path.iterdir()) == []
