# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism on real gloo ranks against Hugging Face, which knows of no ranks at all.

fp32 throughout: only the order of sums may differ, so logits agree within 2e-5 of the largest
one, and greedy tokens are equal wherever the best logit leads by more than that, which the
prompts are chosen for.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints, ranks
from support.checkpoints import write_large
from support.processes import REPO
from support.ranks import TIMEOUT_S, Answers, Job, RankFailed, Team, Teams
from torch import Tensor
from transformers import GPTNeoXForCausalLM

from gptneox import parallel
from gptneox.adapter import GPTNeoXForCausalLM as Adapter
from gptneox.config.errors import ConfigError
from gptneox.config.model import ModelConfig
from gptneox.config.settings import EngineSection
from gptneox.devices import select
from gptneox.engine.generate import GenerateEngine
from gptneox.engine.paged import PagedEngine
from gptneox.engine.sequence import SamplingParams
from gptneox.model import GPTNeoX
from gptneox.parallel import TensorParallelGroup, check_divides, report_failure
from gptneox.weights.cut import cut_checkpoint
from gptneox.weights.load import CheckpointError, rank_directory

LIMIT = 2e-5  # of the largest logit
NUM_NEW = 64
LENGTHS = (1, 127, 128, 129)
ALONE = TensorParallelGroup()


def with_heads(name: str, num_heads: int, head_dim: int = 0, **keys: Any) -> dict[str, Any]:
    """A twin with another number of heads (and their width), room for 64 new tokens."""
    config = checkpoints.FAMILY[name]
    width = head_dim or config["hidden_size"] // config["num_attention_heads"]
    hidden_size = width * num_heads
    return config | {
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_attention_heads": num_heads,
        "num_hidden_layers": 2,
        "max_position_embeddings": 256,
        **keys,
    }


# What a cut can get wrong: parallel or serial residual, biases, a vocabulary that does not divide
# (rows are padded), one head per rank, tied embeddings, several heads per rank.
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt-neox-20b": with_heads("gpt-neox-20b", 4, num_hidden_layers=3),
    "serial, 8 heads, odd vocabulary": with_heads("open-calm-small", 8, 16, vocab_size=3005),
    "rinna, 22 heads": with_heads("japanese-gpt-neox-3.6b", 22),
    "tied, odd vocabulary": with_heads("japanese-large-lm-3.6b", 4, 32),
    "no attention bias, odd vocabulary": with_heads("no-attention-bias", 4, 32),
    "mlp of its own width": with_heads("pythia-14m", 4, intermediate_size=200),
    "50281 tokens": with_heads("dolly-v2-12b-tuned", 2, 32, vocab_size=50281),
}
CASES = [
    ("gpt-neox-20b", 2),
    ("gpt-neox-20b", 4),
    ("serial, 8 heads, odd vocabulary", 2),
    ("rinna, 22 heads", 2),
    ("tied, odd vocabulary", 2),
    ("no attention bias, odd vocabulary", 2),
    ("mlp of its own width", 2),
    ("50281 tokens", 2),
    *(
        pytest.param(name, world_size, marks=pytest.mark.slow)
        for name, world_size in [
            ("serial, 8 heads, odd vocabulary", 4),
            ("serial, 8 heads, odd vocabulary", 8),
            ("rinna, 22 heads", 11),
            ("tied, odd vocabulary", 4),
            ("mlp of its own width", 4),
        ]
    ),
]


@pytest.fixture(scope="module")
def teams() -> Iterator[Teams]:
    with ranks.open_teams() as opened:
        yield opened


@dataclass
class Reference:
    """Prompts, and what Hugging Face makes of each of them alone."""

    path: Path
    prompts: list[list[int]]
    new_ids: list[list[int]]
    logits: list[Tensor]  # of each prompt
    decode_logits: Tensor


@torch.inference_mode()
def greedy(model: GPTNeoXForCausalLM, prompt: list[int], num_new: int) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=num_new, do_sample=False, eos_token_id=None
    )
    return output[0, len(prompt) :].tolist()


@torch.inference_mode()
def make_reference(
    path: Path, config: dict[str, Any], lengths: Seq[int] = LENGTHS, num_new: int = NUM_NEW
) -> Reference:
    """Random prompts whose greedy continuation is not a matter of rounding."""
    model = checkpoints.write_checkpoint(path, config)
    found = Reference(path, [], [], [], torch.empty(0))
    seed = 0
    for length in lengths:
        for _ in range(30):
            seed += 1
            prompt = checkpoints.prompts([length], config["vocab_size"], seed)[0]
            new_ids = greedy(model, prompt, num_new)
            logits = model(torch.tensor([prompt + new_ids])).logits[0]
            best = logits[length - 1 : -1].topk(2).values
            if (best[:, 0] - best[:, 1]).min() > 10 * LIMIT * logits.abs().max():
                break
        else:
            raise AssertionError("Hugging Face itself is unsure of all prompts")
        if not found.prompts:
            found.decode_logits = logits[length : length + 1].clone()
        found.prompts.append(prompt)
        found.new_ids.append(new_ids)
        found.logits.append(logits[:length].clone())
    return found


def assert_close(actual: Tensor, expected: Tensor) -> None:
    limit = LIMIT * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit)


def assert_equals_reference(answers: Answers, reference: Reference) -> None:
    for logits, expected in zip(answers.logits, reference.logits, strict=True):
        assert_close(logits, expected)
    assert_close(answers.decode_logits, reference.decode_logits)


COMPLETE = ("paged whole", "flash parts")  # where `both_paths` makes all new tokens


def assert_tokens(answers: Answers, reference: Reference, *, complete: bool) -> None:
    for i, (actual, new_ids) in enumerate(zip(answers.token_ids, reference.new_ids, strict=True)):
        assert actual == new_ids[: len(actual)], f"prompt {i}"
        assert len(actual) == (len(new_ids) if complete else 1)


def assert_ranks_agree(by_rank: Seq[Answers]) -> None:
    """Bit for bit: otherwise one rank could stop where another goes on."""
    for answers in by_rank[1:]:
        assert answers.token_ids == by_rank[0].token_ids
        assert answers.digest == by_rank[0].digest


def assert_all_places(
    by_rank: list[dict[str, Answers]], reference: Reference, config: dict[str, Any]
) -> None:
    """Every path over whole and cut weights, and one all-reduce per residual sum."""
    sums = 1 if config.get("use_parallel_residual", True) else 2
    num_all_reduces = sums * config["num_hidden_layers"]
    for place, answers in by_rank[0].items():
        assert_equals_reference(answers, reference)
        assert_tokens(answers, reference, complete=place in COMPLETE)
        assert_ranks_agree([each[place] for each in by_rank])
        assert answers.all_reduces == (num_all_reduces, num_all_reduces), place
    for path in ranks.PATHS:  # cutting beforehand or while loading is the same
        assert by_rank[0][f"{path} whole"].digest == by_rank[0][f"{path} parts"].digest


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """Filled by `reference_of`."""
    return {}


@pytest.fixture
def reference_of(references: dict[str, Reference], tmp_path_factory: pytest.TempPathFactory):
    def get(name: str) -> Reference:
        if name not in references:
            path = tmp_path_factory.mktemp("reference") / "whole"
            lengths = (1, 20) if CONFIGS[name]["vocab_size"] > 50000 else LENGTHS
            references[name] = make_reference(path, CONFIGS[name], lengths)
        return references[name]

    return get


@pytest.mark.parametrize(("name", "world_size"), CASES)
def test_ranks_equal_hf(
    name: str, world_size: int, reference_of, teams: Teams, tmp_path: Path
) -> None:
    """Holds for uncut and cut weights, on both paths, with prompts around the end of a block."""
    reference = reference_of(name)
    parts = tmp_path / "parts"
    cut_checkpoint(reference.path, parts, world_size)
    places = {"whole": reference.path, "parts": parts}
    answers = teams(world_size).run(ranks.both_paths, places, reference.prompts, NUM_NEW)
    assert_all_places(answers, reference, CONFIGS[name])


@pytest.mark.parametrize("name", ["gpt-neox-20b", "tied, odd vocabulary"])
def test_one_process_equals_hf(name: str, reference_of, tmp_path: Path) -> None:
    """Alone, whole or cut into one part, without a single collective."""
    reference = reference_of(name)
    cut_checkpoint(reference.path, tmp_path / "parts", 1)
    places = {"whole": reference.path, "parts": tmp_path / "parts"}
    for place, answers in ranks.both_paths(ALONE, places, reference.prompts, NUM_NEW).items():
        assert_equals_reference(answers, reference)
        assert_tokens(answers, reference, complete=place in COMPLETE)
        assert answers.all_reduces == (0, 0), place


@pytest.mark.slow
@pytest.mark.parametrize(("length", "num_new"), [(1023, NUM_NEW), (2047, 1)])
def test_long_prompts(length: int, num_new: int, teams: Teams, tmp_path: Path) -> None:
    """Prompt and new tokens reach the last of 2048 positions."""
    config = with_heads("pythia-1.4b", 4, 32, max_position_embeddings=2048)
    reference = make_reference(tmp_path / "whole", config, [length], num_new)
    for world_size in (2, 4):
        parts = tmp_path / f"parts {world_size}"
        cut_checkpoint(reference.path, parts, world_size)
        places = {"whole": reference.path, "parts": parts}
        answers = teams(world_size).run(ranks.both_paths, places, reference.prompts, num_new)
        assert_all_places(answers, reference, config)


# -- ranks in lockstep ---------------------------------------------------------------------------


def scarce(group: TensorParallelGroup, path: Path, prompts: list[list[int]]) -> tuple[Any, int]:
    """Greedy tokens, prompts in chunks, too few blocks for all; and how often they ran out."""
    section = EngineSection(block_size=16, num_blocks=22, max_batch_size=8, max_prefill_tokens=40)
    engine = PagedEngine.from_pretrained(
        path, section, select("cpu"), dtype="float32", group=group, with_tokenizer=False
    )
    params = SamplingParams(max_new_tokens=NUM_NEW, ignore_eos=True)
    outputs = engine.generate(prompts, params)
    return [output.token_ids for output in outputs], engine.scheduler.num_preemptions


def test_scheduler_stays_in_step(reference_of, teams: Teams) -> None:
    """Chunked prompts, preemption and prefix hits on two ranks."""
    reference = reference_of("gpt-neox-20b")
    prompts, expected = reference.prompts * 2, reference.new_ids * 2
    (tokens, num_preemptions), second = teams(2).run(scarce, reference.path, prompts)
    assert tokens == expected
    assert num_preemptions > 0
    assert second == (tokens, num_preemptions)


def sampled(group: TensorParallelGroup, path: Path, prompts: list[list[int]]) -> tuple[Any, Any]:
    """Tokens drawn at temperature 1 on both paths."""
    section = EngineSection(max_batch_size=len(prompts))
    engine = PagedEngine.from_pretrained(
        path, section, select("cpu"), dtype="float32", group=group, with_tokenizer=False
    )
    params = SamplingParams(max_new_tokens=24, temperature=1.0, seed=5, ignore_eos=True)
    paged = [output.token_ids for output in engine.generate(prompts, params)]
    flash_engine = GenerateEngine.from_pretrained(
        path,
        EngineSection(max_batch_size=64),
        select("cpu"),
        group=group,
        dtype="float32",
        with_tokenizer=False,
    )
    torch.manual_seed(1)
    outputs = flash_engine.generate(prompts, replace(params, seed=None))
    return paged, [output.token_ids for output in outputs]


def test_sampling_is_the_same_on_every_rank(reference_of, teams: Teams) -> None:
    reference = reference_of("gpt-neox-20b")
    first, second = teams(2).run(sampled, reference.path, reference.prompts[:2])
    assert first == second
    assert first == sampled(ALONE, reference.path, reference.prompts[:2])
    greedy_ids = [new_ids[:24] for new_ids in reference.new_ids[:2]]
    assert greedy_ids not in first


def num_threads(group: TensorParallelGroup, path: Path) -> tuple[int, int]:
    """Threads in use after the engine, and after transformers' loader, has loaded a model."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "3"
    try:
        GenerateEngine.from_pretrained(
            path, EngineSection(), select("cpu"), group=group, with_tokenizer=False
        )
        after_engine = torch.get_num_threads()
        Adapter.from_pretrained(str(path), device_map="cpu")
        return after_engine, torch.get_num_threads()
    finally:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def test_threads_that_the_user_chose_stay(tiny_checkpoint: Path, teams: Teams) -> None:
    """An engine takes the device as it is; the loader for others sets it up by itself."""
    assert teams(2).run(num_threads, tiny_checkpoint) == [(1, 3), (1, 3)]


# -- what is refused -----------------------------------------------------------------------------

HEADS_64 = "world_size {} does not divide 64 attention heads .*; use 1, 2, 4, 8, 16, 32, 64$"


@pytest.mark.parametrize("world_size", [0, -2, 3, 5, 128])
def test_world_size_that_does_not_divide(world_size: int) -> None:
    """The message names the sizes that do."""
    with pytest.raises(ConfigError, match=HEADS_64.format(world_size)):
        check_divides(world_size, 64, 24576)


def test_the_mlp_has_to_divide_too() -> None:
    with pytest.raises(ConfigError, match=r"4 does not divide 8 .*intermediate_size 70; use 1, 2$"):
        check_divides(4, 8, 70)
    with pytest.raises(ConfigError, match=r"4 does not divide 22 attention .*; use 1, 2, 11, 22$"):
        check_divides(4, 22, 88 * 16 * 11)
    check_divides(2, 8, 70)


@pytest.mark.parametrize("world_size", [3, 8])
def test_too_many_ranks_are_refused_before_weights_are_read(world_size: int, tmp_path: Path):
    """The folder holds no weights, but the message is about the number of ranks."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["gpt-neox-20b"]))
    config = ModelConfig.from_pretrained(tmp_path)
    group = TensorParallelGroup(1, world_size)
    named = f"world_size {world_size} does not divide 4 attention heads .*; use 1, 2, 4$"
    with pytest.raises(ConfigError, match=named):
        GPTNeoX(config, select("cpu"), group)
    with pytest.raises(ConfigError, match=named):
        PagedEngine.from_pretrained(
            tmp_path, EngineSection(), select("cpu"), group=group, with_tokenizer=False
        )


@pytest.fixture(scope="module")
def parts_of_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint with a cut for four ranks in it; do not write into it."""
    path = tmp_path_factory.mktemp("parts") / "model"
    checkpoints.write_checkpoint(path, checkpoints.FAMILY["pythia-14m"])
    cut_checkpoint(path, path / "part_model", 4)
    return path


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_parts_of_another_number_of_ranks(parts_of_4: Path, world_size: int) -> None:
    """They are refused as part_model, as one folder of it, and beside the whole weights."""
    group = TensorParallelGroup(0, world_size)
    named = f"cut for 4 ranks, but {world_size} run"
    for path in (parts_of_4 / "part_model", parts_of_4 / "part_model" / "0"):
        with pytest.raises(CheckpointError, match=named):
            rank_directory(path, group)
        with pytest.raises(CheckpointError, match=named):
            GenerateEngine.from_pretrained(
                path,
                EngineSection(max_batch_size=64),
                select("cpu"),
                group=group,
                with_tokenizer=False,
            )
        with pytest.raises(CheckpointError, match=named):
            PagedEngine.from_pretrained(
                path, EngineSection(), select("cpu"), group=group, with_tokenizer=False
            )
    if world_size > 1:
        with pytest.raises(CheckpointError, match=named):
            rank_directory(parts_of_4, group, prefer_parts=True)


def test_where_a_rank_finds_its_weights(parts_of_4: Path) -> None:
    parts = parts_of_4 / "part_model"
    for rank in range(4):
        group = TensorParallelGroup(rank, 4)
        assert rank_directory(parts, group) == parts / str(rank)
        assert rank_directory(parts / str(rank), group) == parts / str(rank)
        assert rank_directory(parts_of_4, group, prefer_parts=True) == parts / str(rank)
        assert rank_directory(parts_of_4, group) == parts_of_4  # cut while it is read
    assert rank_directory(parts_of_4, ALONE, prefer_parts=True) == parts_of_4
    with pytest.raises(CheckpointError, match="is not the part of rank 1"):
        rank_directory(parts / "0", TensorParallelGroup(1, 4))


def load_flash(group: TensorParallelGroup, path: Path) -> str:
    """Where the flash path loads from, or why it does not."""
    try:
        GenerateEngine.from_pretrained(
            path, EngineSection(max_batch_size=64), select("cpu"), group=group, with_tokenizer=False
        )
    except ValueError as error:
        return str(error)
    return ""


def test_every_rank_refuses_a_wrong_cut(parts_of_4: Path, teams: Teams) -> None:
    """None is left waiting for another."""
    assert teams(4).run(load_flash, parts_of_4) == [""] * 4
    for reason in teams(2).run(load_flash, parts_of_4):
        assert "was cut for 4 ranks, but 2 run" in reason


def test_a_part_is_not_a_model_of_its_own(parts_of_4: Path, tmp_path: Path) -> None:
    """The folder of one rank is recognized outside part_model too."""
    lone = tmp_path / "lone"
    lone.symlink_to(parts_of_4 / "part_model" / "0")
    with pytest.raises(CheckpointError, match=r"one part of 4, but 1 ranks run"):
        PagedEngine.from_pretrained(lone, EngineSection(), select("cpu"), with_tokenizer=False)
    with pytest.raises(CheckpointError, match=r"one part of 4, but 1 ranks run"):
        GenerateEngine.from_pretrained(
            lone, EngineSection(max_batch_size=64), select("cpu"), group=ALONE, with_tokenizer=False
        )


def fail_on_rank_1(group: TensorParallelGroup) -> None:
    """One rank raises while the others wait for it."""
    if group.rank == 1:
        raise ValueError("rank 1 has had enough")
    group.barrier()


def test_helper_reports_a_rank_that_fails() -> None:
    team = Team(2)
    with pytest.raises(RankFailed, match=r"(?s)rank 1.*has had enough"):
        team.run(fail_on_rank_1)
    assert not team.is_alive


def report(group: TensorParallelGroup, folder: Path) -> int:
    """Rank 1 fails by itself, rank 0 because of that; when each says that it did."""
    file = folder / str(group.rank)
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(file)
    group.barrier()
    report_failure(ValueError("mine") if group.rank == 1 else RuntimeError("connection reset"))
    del os.environ["TORCHELASTIC_ERROR_FILE"]
    return int(json.loads(file.read_text())["message"]["extraInfo"]["timestamp"])


def test_a_broken_collective_is_not_the_first_cause(teams: Teams, tmp_path: Path) -> None:
    """torchrun takes the failure with the earliest second for the root cause."""
    first, second = teams(2).run(report, tmp_path)
    assert second < first - 1


@pytest.mark.parametrize(
    ("rank", "world_size", "named"),
    [(0, 2, "for rank 1;"), (1, 2, "for rank 0;"), (2, 4, "for rank 0, 1, 3;"),
     (0, 64, "for rank 1, 2, 3, …, 63;")],
)  # fmt: skip
def test_a_rank_that_waits_says_for_whom(rank, world_size, named, monkeypatch, caplog) -> None:
    """And may be interrupted meanwhile: torch waits without looking."""
    monkeypatch.setattr(parallel, "WAIT_NOTICE_S", 0.05)
    monkeypatch.setenv("MASTER_ADDR", "host0")
    monkeypatch.setenv("MASTER_PORT", "1234")
    before = signal.getsignal(signal.SIGINT)
    with parallel._report_waiting(rank, world_size):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        time.sleep(0.2)
    assert signal.getsignal(signal.SIGINT) is before
    assert named in caplog.text
    assert "at host0 port 1234" in caplog.text
    caplog.clear()
    with parallel._report_waiting(rank, world_size):
        pass
    time.sleep(0.1)
    assert not caplog.text


# -- whole jobs, as users start them ---------------------------------------------------------------

IDS = ("--load_tokenizer", "False", "--dtype", "float32", "--device", "cpu", "--ignore_eos")


def as_ids(prompt: Seq[int]) -> str:
    return ",".join(map(str, prompt))


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Slow enough to be killed in every phase."""
    keys = {"max_position_embeddings": 4096}
    return write_large(tmp_path / "model", num_layers=4, **keys)[0]


@pytest.fixture
def job_of(tmp_path: Path) -> Iterator[Any]:
    """Starts launchers, and ends whatever they leave behind."""
    jobs: list[Job] = []

    def start(*command: Any, **options: Any) -> Job:
        jobs.append(Job(tmp_path / f"job {len(jobs)}", *command, **options))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


def is_reading_weights(job: Job, rank: int) -> bool:
    try:
        maps = Path(f"/proc/{job.pid_of_rank(rank)}/maps").read_text()
    except OSError:
        return False
    return "model.safetensors" in maps


def wait_for_phase(job: Job, phase: str) -> None:
    if phase == "load":
        job.wait_for(lambda: is_reading_weights(job, 1), "reading of weights")
    elif phase == "prefill":
        job.wait_for_text("loaded ", job.err)
        time.sleep(0.2)
        assert "Answer[0]: 0" not in job.out.read_text()
    else:
        job.wait_for_text("Answer[0]: 0,")


def assert_port_is_free(port: int) -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", port))
        listener.listen()


def processes_that_name(path: Path) -> list[str]:
    """Command lines in which a path stands."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if str(path) in line:
                    found.append(line)
    return found


@pytest.mark.parametrize(
    "phase",
    [
        pytest.param("load", marks=pytest.mark.slow),
        pytest.param("prefill", marks=pytest.mark.slow),
        "decode",
    ],
)
def test_a_killed_rank_takes_the_job_with_it(phase: str, large: Path, job_of: Any) -> None:
    """The job ends within 30 s, names the rank on its last line, and leaves no process.

    The kill comes at the end of a second: torchrun compares whole seconds, and the other rank,
    whose collective fails because of this, must not pass for the first.
    """
    prompt = [5] * (3000 if phase == "prefill" else 3)
    port = ranks.free_port()
    job = job_of(
        *(REPO / "run_pa.sh", large, *IDS, "--stream"),
        *("--input_ids", as_ids(prompt), "--max_output_length", "900"),
        TP_WORLD_SIZE="2",
        MASTER_PORT=str(port),
    )
    wait_for_phase(job, phase)
    victim = job.pid_of_rank(1)
    if phase == "decode":
        time.sleep(0.97 - time.time() % 1 + (time.time() % 1 > 0.97))
    os.kill(victim, signal.SIGKILL)
    assert job.process.wait(30) != 0
    assert job.processes() == []
    assert processes_that_name(large) == []
    assert_port_is_free(port)
    *_, last = job.err.read_text().rstrip().splitlines()
    assert last == "rank 1 was ended by SIGKILL", job.err.read_text()


def test_ctrl_c_ends_all_ranks_with_one_line(large: Path, job_of: Any) -> None:
    """What a terminal does: the signal goes to the whole group of the launcher."""
    job = job_of(
        *(REPO / "run_pa.sh", large, *IDS, "--stream"),
        *("--input_ids", "1,2,3", "--max_output_length", "3000"),
        TP_WORLD_SIZE="2",
    )
    job.wait_for_text("Answer[0]: 0,")
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.process.wait(30) == 130
    assert job.processes() == []
    said = [line for line in job.err.read_text().splitlines() if "[INFO]" not in line]
    assert said[-1] == "interrupted"
    assert len([line for line in said if "interrupted" in line or "rror" in line]) == 1, said


@pytest.mark.slow
def test_a_rank_that_raises_takes_the_job_with_it(parts_of_4: Path, job_of: Any, tmp_path: Path):
    """It raises at load, while the others wait for it; its own message is the last line."""
    parts = tmp_path / "part_model"
    shutil.copytree(parts_of_4 / "part_model", parts)
    (parts / "2" / "config.json").write_text("{")
    options = (*IDS, "--input_ids", "1,2")
    job = job_of(REPO / "run_pa.sh", parts, *options, TP_WORLD_SIZE="4")
    assert job.process.wait(TIMEOUT_S) == 1
    assert job.processes() == []
    text = job.err.read_text()
    assert "Traceback" not in text
    last = text.rstrip().splitlines()[-1]
    assert re.match(r"rank 2 failed first: .*2/config\.json is not valid JSON", last), text


def test_two_jobs_at_once_beside_a_taken_port(reference_of, job_of: Any) -> None:
    """Each job gets a port of its own and finishes."""
    reference = reference_of("gpt-neox-20b")
    options = (*IDS, "--max_output_length", "12", "--max_batch_size", "2")
    prompts = ["--input_ids", *map(as_ids, reference.prompts[:2])]
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # taken by somebody else: just as well
            listener.bind(("127.0.0.1", 20014))
            listener.listen()
        jobs = [
            job_of(REPO / "run_pa.sh", reference.path, *options, *prompts, TP_WORLD_SIZE="2")
            for _ in range(2)
        ]
        ports = {variable_of(job.pid_of_rank(0), "MASTER_PORT") for job in jobs}
        assert len(ports) == 2
        assert "20014" not in ports
        for job in jobs:
            assert job.finish() == 0, job.err.read_text()
            assert answers_of(job) == [as_ids(ids[:12]) for ids in reference.new_ids[:2]]


def variable_of(pid: int, name: str) -> str:
    """A variable in the environment of a process."""
    for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        key, _, value = entry.decode().partition("=")
        if key == name:
            return value
    raise AssertionError(f"process {pid} has no {name}")


def answers_of(job: Job) -> list[str]:
    return re.findall(r"^Answer\[\d+\]: (.*)$", job.out.read_text(), re.MULTILINE)


@pytest.mark.slow
def test_cut_and_run(reference_of, job_of: Any, tmp_path: Path) -> None:
    """The flash launcher with nothing in the place of anything: it cuts, runs, and runs again."""
    reference = reference_of("tied, odd vocabulary")
    model = tmp_path / "my model 权重"
    shutil.copytree(reference.path, model)
    options = (*IDS, "--max_output_length", "12", "--input_ids", as_ids(reference.prompts[1]))
    for marker in ("is not exists, Now begin to cut", "exists, Now begin to run"):
        job = job_of(REPO / "cut_model_and_run.sh", "inference", *options, input_dir=str(model))
        assert job.finish() == 0, job.err.read_text()
        assert marker in job.out.read_text().splitlines()[0]
        assert answers_of(job) == [as_ids(reference.new_ids[1][:12])]
    (model / "part_model" / "1" / "model.safetensors").unlink()
    job = job_of(REPO / "cut_model_and_run.sh", "inference", *options, input_dir=str(model))
    assert job.finish() == 1
    last = job.err.read_text().rstrip().splitlines()[-1]
    assert "1/model.safetensors is missing" in last
    assert "--recut inference" in last


# -- several machines ------------------------------------------------------------------------------


@pytest.fixture
def two_hosts() -> Iterator[list[tuple[list[str], str]]]:
    """Two network namespaces joined by a cable: the words before a command, and an interface."""
    if not shutil.which("ip"):
        pytest.skip("there is no ip (iproute2)")
    names = [f"neox{os.getpid()}{side}" for side in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "neoxa", "netns", names[0], "type", "veth", "peer", "neoxb",
           "netns", names[1])  # fmt: skip
        for i, name in enumerate(names):
            interface = f"neox{'ab'[i]}"
            ip("-n", name, "addr", "add", f"10.213.77.{i + 1}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [(["ip", "netns", "exec", n], f"neox{'ab'[i]}") for i, n in enumerate(names)]
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces can be made here: {error.stderr.decode().strip()}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["run_pa.sh", "cut_model_and_run.sh"])
def test_two_hosts(
    launcher: str, two_hosts: list[tuple[list[str], str]], reference_of, job_of: Any, tmp_path: Path
) -> None:
    """One rank on each; the same tokens as without any."""
    reference = reference_of("gpt-neox-20b")
    model = tmp_path / "model"
    shutil.copytree(reference.path, model)
    options = [*IDS, "--max_output_length", "12", "--max_batch_size", "2"]
    options += ["--input_ids", *map(as_ids, reference.prompts[:2])]
    command = [REPO / launcher, model, *options]
    if launcher == "cut_model_and_run.sh":
        cut_checkpoint(model, model / "part_model", 2)
        command = [REPO / launcher, "inference", *options]
    jobs = [
        job_of(
            *command,
            prefix=prefix,
            NNODES="2",
            NODE_RANK=str(i),
            MASTER_ADDR="10.213.77.1",
            GLOO_SOCKET_IFNAME=interface,
            input_dir=str(model),
            world_size_="2",
            **({"TP_WORLD_SIZE": "1"} if launcher == "run_pa.sh" else {}),
        )
        for i, (prefix, interface) in enumerate(two_hosts)
    ]
    for job in jobs:
        assert job.finish() == 0, job.err.read_text()
    assert answers_of(jobs[0]) == [as_ids(ids[:12]) for ids in reference.new_ids[:2]]
    assert answers_of(jobs[1]) == [], "rank 0 alone speaks"
