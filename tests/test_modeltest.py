# SPDX-License-Identifier: Apache-2.0
"""tests/modeltest/run.sh: its grammar, what it starts, and the files it leaves."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support import checkpoints
from support.processes import REPO, clean_environ, clean_this_process, run_here
from support.tokenizers import write_tokenizer

from gptneox import launch as launcher
from gptneox.evaluation import modeltest_plan
from gptneox.evaluation.modeltest_plan import CASES, LM_EVAL_TASKS, MODES, Hosts, parse
from gptneox.evaluation.modeltest_results import PERFORMANCE_COLUMNS, formatted, with_averages

RUN = REPO / "tests" / "modeltest" / "run.sh"
BOOLQ = [
    {
        "title": "Cat",
        "question": f"is cat {i} on the mat",
        "passage": "it sat.",
        "answer": i % 2 == 0,
    }
    for i in range(5)
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random fp16 twin with a tokenizer and 128 positions; do not write into it."""
    directory = tmp_path_factory.mktemp("modeltest") / "my weights"
    config = checkpoints.FAMILY["pythia-14m"] | {"vocab_size": 336}
    checkpoints.write_checkpoint(directory, config, dtype=torch.float16)
    write_tokenizer(directory)
    return directory


# -- grammar -------------------------------------------------------------------------------------

MODEL = "gptneox_20b"
PAIRS = "[[2048,2048],[1024,1024],[512,512],[256,256]]"


def plan_of(command: str, weights: Path) -> modeltest_plan.Plan:
    """The words of a command line; W stands for the checkpoint."""
    return parse([str(weights) if word == "W" else word for word in shlex.split(command)])


def test_the_two_commands_of_the_readme(weights: Path) -> None:
    plan = plan_of("pa_fp16 full_BoolQ 1 gptneox_20b W 8", weights)
    assert (plan.mode, plan.dataset, plan.batch_size) == ("full_BoolQ", "BoolQ", 1)
    assert (plan.model_name, plan.model_path) == (MODEL, weights)
    assert plan.hosts == Hosts(8)
    assert plan.attention == "paged"
    plan = plan_of(f"pa_fp16 performance {PAIRS} 1 gptneox_20b W 8", weights)
    assert plan.cases == ((2048, 2048), (1024, 1024), (512, 512), (256, 256))
    assert plan.batch_sizes == ((1,),) * 4
    assert plan.hosts.world_size == 8


@pytest.mark.parametrize("chips", [1, 2, 8, 10, 16, 20, 100])
def test_chip_numbers(weights: Path, chips: int) -> None:
    assert plan_of(f"pa_fp16 full_GSM8K 1 {MODEL} W {chips}", weights).hosts == Hosts(chips)


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        ("8", ((8,), (8,))),
        ("[8]", ((8,), (8,))),
        ("1,4", ((1, 4), (1, 4))),
        ("[1,4]", ((1, 4), (1, 4))),
        ("[[1,4],[1,8]]", ((1, 4), (1, 8))),
        ("4,1,4", ((4, 1), (4, 1))),
    ],
)
def test_batch_forms(weights: Path, words: str, sizes: Any) -> None:
    plan = plan_of(f"pa_fp16 performance [[64,32],[32,16]] {words} {MODEL} W 2", weights)
    assert plan.cases == ((64, 32), (32, 16))
    assert plan.batch_sizes == sizes


def test_what_may_be_left_out(weights: Path) -> None:
    def values(command: str) -> dict[str, Any]:
        return vars(plan_of(command, weights))

    for empty in ("", "''", "[]"):
        plan = values(f"pa_fp16 performance {empty} 4 {MODEL} W 8")
        assert (plan["cases"], plan["batch_sizes"]) == (CASES, ((4,),) * 4)
    four = "[[1],[1,2],[2],[4]]"
    plan = values(f"pa_fp16 performance {four} {MODEL} W 8")  # no batch follows: these are batches
    assert (plan["cases"], plan["batch_sizes"]) == (CASES, ((1,), (1, 2), (2,), (4,)))
    plan = values(f"pa_fp16 full_MMLU 1 {MODEL} W 8")
    assert (plan["shot"], plan["batch_sizes"]) == (5, ((1,),))
    plan = values(f"pa_fp16 full_CEval 0 1,2 {MODEL} W 8")
    assert (plan["shot"], plan["batch_sizes"]) == (0, ((1, 2),))
    plan = values(f"fa performance_maxbs 50 {MODEL} W 8")
    assert plan["batch_ranges"] == ((1, 64),) * 4
    assert (plan["cases"], plan["time_limit_ms"]) == (CASES, 50)
    plan = values(f"fa performance_maxbs [[8,8]] [[2,9]] 12.5 {MODEL} W 8")
    assert plan["batch_ranges"] == ((2, 9),)
    assert (plan["cases"], plan["time_limit_ms"]) == (((8, 8),), 12.5)


def test_the_long_form(weights: Path, tmp_path: Path) -> None:
    table = tmp_path / "ranks.json"
    table.write_text("{}")
    plan = plan_of(
        f"pa_fp16 performance [[8,8]] 4 2 prefill_length 8192 {MODEL} base W trust_remote_code "
        f"{table} 16 2 8 10.0.0.1 [-1,16,-1,1,1,-1,1,1] 4096",
        weights,
    )
    assert (plan.prefill_batch_size, plan.prefill_length) == (2, 8192)
    assert plan.trust_remote_code
    assert plan.max_position_embeddings == 4096
    assert plan.hosts == Hosts(16, 2, 8, "10.0.0.1", str(table))
    assert (plan.hosts.local_world_size, plan.hosts.node_rank) == (8, 1)


def test_prompts(weights: Path, tmp_path: Path) -> None:
    plan = plan_of(f"""fa precision_single '["hello","a b"]' 1 {MODEL} W 1""", weights)
    assert plan.prompts == ("hello", "a b")
    assert plan.cases == ((256, 256),)
    file = tmp_path / "prompts.txt"
    file.write_bytes("one\r\ntwo words\r\n\r\n".encode("utf-8-sig"))  # as Windows saves it
    plan = plan_of(f"fa performance_single [[8,4]] {file} 2 {MODEL} W 1", weights)
    assert plan.prompts == ("one", "two words")
    assert (plan.cases, plan.batch_size) == (((8, 4),), 2)


END = f"{MODEL} W 8"
WRONG = [
    ("", "TYPE is missing"),
    ("pa_fp16", "MODE is missing"),
    (f"pa_int8 performance 1 {END}", "TYPE is 'pa_int8'; served: pa_fp16, pa_bf16, fa"),
    (f"basic performance 1 {END}", "TYPE"),
    (f"pa_fp16 full_Boolq 1 {END}", "MODE is 'full_Boolq'; served: performance,"),
    (f"pa_fp16 performance_prefixcache 1 {END}", "MODE"),
    (f"pa_fp16 simplified_GSM8K 1 {END}", "MODE"),
    (f"pa_fp16 edge_BoolQ 1 {END}", "MODE"),
    (f"pa_fp16 performance [[8,8]] {END}", "batch_size"),
    (f"pa_fp16 performance [[8,8]] x {END}", "batch_size"),
    (f"pa_fp16 performance [[8]] 1 {END}", "case_pair"),
    (f"pa_fp16 performance [[8,0]] 1 {END}", "case_pair"),
    (f"pa_fp16 performance [[8,8] 1 {END}", "case_pair"),
    (f"pa_fp16 performance [[8,__import__('os')]] 1 {END}", "case_pair"),
    (f"pa_fp16 performance [[8,8]] 0 {END}", "batch_size"),
    (f"pa_fp16 performance [[8,8]] [] {END}", "batch_size"),
    (f"pa_fp16 performance [[8,8]] [[1],[2]] {END}", "2 lists for 1 case;"),
    (f"pa_fp16 full_BoolQ {END}", "batch_size"),
    (f"pa_fp16 full_MMLU x 1 {END}", "shot"),
    (f"pa_fp16 full_MMLU [1] 1 {END}", "shot"),
    (f"pa_fp16 performance_maxbs [[8,8]] [[1,2],[1,2]] 5 {END}", "batch_range"),
    (f"pa_fp16 performance_maxbs [[8,8]] [[4,2]] 5 {END}", "batch_range"),
    (f"pa_fp16 performance_maxbs [[8,8]] [[1,2]] {END}", "time_limit"),
    (f"pa_fp16 performance_maxbs [[8,8]] [[1,2]] 0 {END}", "time_limit"),
    (f"pa_fp16 performance_single [[8,8]] nowhere.txt 1 {END}", "nowhere.txt"),
    (f"""pa_fp16 precision_single '["a",""]' 1 {END}""", "input_text_or_file"),
    (f"pa_fp16 precision_single [] 1 {END}", "input_text_or_file"),
    (f"pa_fp16 performance 1 dataset boolq {END}", "dataset"),
    ("pa_fp16 full_BoolQ 1", "MODEL_NAME is missing"),
    ("pa_fp16 full_BoolQ 1 ../x W 8", "MODEL_NAME"),
    (f"pa_fp16 full_BoolQ 1 {MODEL}", "WEIGHT_DIR is missing"),
    (f"pa_fp16 full_BoolQ 1 {MODEL} nowhere 8", "nowhere"),
    (f"pa_fp16 full_BoolQ 1 {MODEL} chat W 8", "chat"),
    (f"pa_fp16 full_BoolQ 1 {MODEL} lora a.jsonl W 8", "lora"),
    (f"pa_fp16 full_BoolQ 1 {MODEL} W encrypt=1 8", "encrypt"),
    (f"pa_fp16 full_BoolQ 1 {MODEL} W", "CHIP_NUM is missing"),
    (f"pa_fp16 full_BoolQ 1 {MODEL} W 0", "CHIP_NUM"),
    (f"pa_fp16 full_BoolQ 1 {MODEL} W -8", "CHIP_NUM"),
    (f"pa_fp16 full_BoolQ 1 {MODEL} W 8.0", "CHIP_NUM"),
    (f"pa_fp16 full_BoolQ 1 {MODEL} W no_table 16 2 0 host", "no_table"),
    (f"pa_fp16 full_BoolQ 1 {MODEL} W T 16 3 0 host", "NODE_NUM"),
    (f"pa_fp16 full_BoolQ 1 {MODEL} W T 16 2 3 host", "RANK_ID_START"),
    (f"pa_fp16 full_BoolQ 1 {MODEL} W T 16 2 8", "MASTER_ADDR is missing"),
    (f"pa_fp16 full_BoolQ 1 {END} [1,8]", "parallel degrees"),
    (f"pa_fp16 full_BoolQ 1 {END} [2,4,1,1,1,1,1,1]", "dp=2"),
    (f"pa_fp16 full_BoolQ 1 {END} 4096 more", "more"),
    (f"pa_bf16 full_BoolQ 1 {END}", "bfloat16 weights, but"),
    *((f"pa_fp16 {mode} 1 {END}", "lm_eval_model") for mode in LM_EVAL_TASKS),
]


@pytest.mark.parametrize(("command", "named"), WRONG)
def test_wrong_input(
    weights: Path, tmp_path: Path, command: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.json"
    table.write_text("{}")
    words = [{"W": str(weights), "T": str(table)}.get(w, w) for w in shlex.split(command)]
    assert launcher.main(["--check", "modeltest", "run.sh", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert named in err
    if "MODE is '" in err or "lm_eval" in err:
        assert all(mode in err for mode in MODES)


def test_the_parser_is_light() -> None:
    code = (
        "import sys, gptneox.evaluation.modeltest_plan\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True, timeout=60)


# -- tables --------------------------------------------------------------------------------------


def speed_row(size: int, next_rate: float | None, rate: float | None) -> dict[str, Any]:
    row = dict.fromkeys(PERFORMANCE_COLUMNS, "") | {"Model": "m", "Batchsize": size}
    if rate is None:
        return row | {"Total time(s)": "out of memory, really"}
    return row | {
        "Non-first token Throughput(Tokens/s)": str(next_rate),
        "Throughput(Tokens/s)": str(rate),
    }


def test_averages_are_over_what_ran_and_in_the_last_row() -> None:
    rows = [speed_row(1, 10.0, 4.0), speed_row(2, 30.0, 8.0), speed_row(4, None, None)]
    first, second, last = with_averages(rows)
    assert first["E2E Throughput Average(Tokens/s)"] == ""
    assert second["Non-first token Throughput Average(Tokens/s)"] == ""
    assert last["Non-first token Throughput Average(Tokens/s)"] == "20.0000"
    assert last["E2E Throughput Average(Tokens/s)"] == "6.0000"
    assert last["Total time(s)"] == "out of memory, really"
    assert with_averages([]) == []
    assert with_averages(rows[2:]) == rows[2:]
    lines = formatted(PERFORMANCE_COLUMNS, rows).splitlines()
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in lines}) == 1
    assert lines[0].split("|")[9].strip() == "E2E Throughput(Tokens/s)"


# -- the launcher --------------------------------------------------------------------------------

STUB = """#!/usr/bin/env bash
for word in "$@"; do
  if [[ $word == -c || $word == */launch.py ]]; then exec {python} "$@"; fi
done
exec {python} -c 'import json, os, sys
json.dump({{"program": sys.argv[1], "argv": sys.argv[2:], "env": dict(os.environ)}},
          open(os.environ["RECORD"], "w"))
sys.exit(7)' {name} "$@"
"""


class Call(NamedTuple):
    program: str
    argv: list[str]
    env: dict[str, str]
    status: int
    err: str


@pytest.fixture
def launch(tmp_path: Path, weights: Path) -> Callable[..., Call]:
    """run.sh with stubs in place of Python and torchrun, from its own folder."""
    folder, record = tmp_path / "bin", tmp_path / "record.json"
    folder.mkdir()
    for name in ("python", "torchrun"):
        (folder / name).write_text(STUB.format(python=shlex.quote(sys.executable), name=name))
        (folder / name).chmod(0o755)

    def run(command: str, *, npu: bool = False, **env: str) -> Call:
        (folder / "npu-smi").write_text(f"#!/usr/bin/env bash\nexit {0 if npu else 1}\n")
        (folder / "npu-smi").chmod(0o755)
        if not npu:
            (folder / "npu-smi").unlink()
        record.unlink(missing_ok=True)
        settings = re.compile(r"(ASCEND_|MASTER_|NNODES|NODE_RANK|TP_|TORCHRUN|CUDA_|HCCL|LCCL)")
        environ = {k: v for k, v in clean_environ().items() if not settings.match(k)}
        done = subprocess.run(
            ["bash", "run.sh", *(str(weights) if w == "W" else w for w in shlex.split(command))],
            cwd=RUN.parent,
            env=environ | {
                "PATH": f"{folder}:{os.environ['PATH']}",
                "PYTHON": str(folder / "python"),
                "RECORD": str(record),
                "TMPDIR": str(tmp_path),
            } | env,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )  # fmt: skip
        seen = {"program": "", "argv": [], "env": {}}
        if record.exists():
            seen = json.loads(record.read_text())
        return Call(**seen, status=done.returncode, err=done.stderr)

    return run


def test_one_chip_needs_no_torchrun(launch: Callable[..., Call], weights: Path) -> None:
    call = launch(f"pa_fp16 full_BoolQ 1 {MODEL} W 1")
    assert (call.program, call.status) == ("python", 7), call.err
    assert call.argv == [
        str(REPO / "main.py"), "--task", "modeltest", "--auto_attention", "paged",
        "--model_path", str(weights), "--modeltest_arguments",
        "pa_fp16", "full_BoolQ", "1", MODEL, str(weights), "1",
    ]  # fmt: skip
    assert "ASCEND_RT_VISIBLE_DEVICES" not in call.env
    assert call.env["HCCL_DETERMINISTIC"] == "true"


def test_chips_become_ranks(launch: Callable[..., Call]) -> None:
    call = launch(
        f"pa_fp16 performance {PAIRS} 1 {MODEL} W 8", ASCEND_RT_VISIBLE_DEVICES="0,1,2,3,4,5,6,7"
    )
    assert (call.program, call.status) == ("torchrun", 7), call.err
    assert call.argv[:2] == ["--nproc_per_node", "8"]
    assert PAIRS in call.argv
    assert "HCCL_DETERMINISTIC" not in call.env
    call = launch(f"fa full_BoolQ 1 {MODEL} W 16", npu=True)
    assert call.argv[:2] == ["--nproc_per_node", "16"]
    assert call.env["ASCEND_RT_VISIBLE_DEVICES"] == ",".join(map(str, range(16)))
    assert call.argv[call.argv.index("--auto_attention") + 1] == "flash"
    call = launch(f"pa_fp16 full_BoolQ 1 {MODEL} W 4", ASCEND_RT_VISIBLE_DEVICES="0,1")
    assert (call.program, call.status) == ("", 2)


def test_several_hosts(launch: Callable[..., Call], tmp_path: Path) -> None:
    table = tmp_path / "ranks.json"
    table.write_text("{}")
    call = launch(f"pa_fp16 full_BoolQ 1 {MODEL} W {table} 16 2 8 10.0.0.1")
    assert (call.program, call.status) == ("torchrun", 7), call.err
    assert call.argv[:10] == [
        "--nproc_per_node", "8", "--nnodes", "2", "--node_rank", "1", "--master_addr", "10.0.0.1",
        "--master_port", "12345",
    ]  # fmt: skip
    assert call.env["RANK_TABLE_FILE"] == str(table)


@pytest.mark.parametrize(
    "command",
    ["", f"pa_fp16 full_TruthfulQA 1 {MODEL} W 8", f"pa_fp16 full_BoolQ 1 {MODEL} W 0"],
)
def test_wrong_usage_starts_nothing(launch: Callable[..., Call], command: str) -> None:
    call = launch(command)
    assert (call.program, call.status) == ("", 2)


# -- end to end ----------------------------------------------------------------------------------


class Run(NamedTuple):
    status: int
    out: str
    err: str
    outputs: Path


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """Questions of BoolQ, and where the results go."""
    data = tmp_path / "data"
    (data / "boolq").mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in BOOLQ)
    (data / "boolq" / "dev.jsonl").write_text(lines)
    return {
        "MODELTEST_DATA_DIR": str(data),
        "MODELTEST_OUTPUT_DIR": str(tmp_path / "outputs"),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def modeltest(weights: Path, places: dict[str, str]) -> Callable[..., Run]:
    """run.sh itself, from its own folder."""

    def run(command: str) -> Run:
        words = [str(weights) if word == "W" else word for word in shlex.split(command)]
        done = subprocess.run(
            ["bash", "run.sh", *words],
            cwd=RUN.parent,
            env=clean_environ(PYTHON=sys.executable) | places,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        outputs = Path(places["MODELTEST_OUTPUT_DIR"])
        return Run(done.returncode, done.stdout, done.stderr, outputs)

    return run


@pytest.fixture
def task(
    weights: Path,
    places: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Callable[..., Run]:
    """What run.sh starts on one chip, in this process."""
    clean_this_process(monkeypatch, tmp_path)
    for name, value in places.items():
        monkeypatch.setenv(name, value)

    def run(command: str, **env: str) -> Run:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        words = [str(weights) if word == "W" else word for word in shlex.split(command)]
        status = run_here("--task", "modeltest", "--modeltest_arguments", *words)
        return Run(status, *capsys.readouterr(), Path(places["MODELTEST_OUTPUT_DIR"]))

    return run


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_performance_goes_on_after_a_failing_case(modeltest: Callable[..., Run]) -> None:
    done = modeltest(f"pa_fp16 performance [[16,4],[16,600],[8,4]] 1,2 {MODEL} W 1 128")
    assert done.status == 1, done.err
    folder = done.outputs / f"results/CPU/performance_test/performance/fp16/{MODEL}"
    for size in (1, 2):
        rows = rows_of(folder / f"performance_pa_batch{size}_tp1_result.csv")
        assert list(rows[0]) == list(PERFORMANCE_COLUMNS)
        assert [(r["Batchsize"], r["In_seq"], r["Out_seq"]) for r in rows] == [
            (str(size), "16", "4"), (str(size), "16", "600"), (str(size), "8", "4"),
        ]  # fmt: skip
        good, failed, last = rows
        assert "616 positions" in failed["Total time(s)"]
        assert failed["Throughput(Tokens/s)"] == ""
        total, rate = float(good["Total time(s)"]), float(good["Throughput(Tokens/s)"])
        assert rate == pytest.approx(size * 4 / total, rel=1e-3)
        step_ms = float(good["Non-first token time(ms)"])
        assert float(good["Non-first token Throughput(Tokens/s)"]) == pytest.approx(
            size / step_ms * 1e3, rel=1e-3
        )
        assert float(good["Prefill average time(ms)"]) == pytest.approx(
            float(good["Prefill all time(ms)"]) / size, abs=1e-3
        )
        assert float(last["E2E Throughput Average(Tokens/s)"]) == pytest.approx(
            (rate + float(last["Throughput(Tokens/s)"])) / 2, rel=1e-3
        )
        assert (folder / f"performance_pa_batch{size}_tp1_formatted_result.csv").is_file()
    assert "2 cases failed" in done.err
    assert "performance_pa_batch2_tp1_result.csv" in done.out
    assert not list(done.outputs.rglob(".*"))


def test_boolq_on_two_ranks(modeltest: Callable[..., Run], task: Callable[..., Run]) -> None:
    done = modeltest(f"pa_fp16 full_BoolQ 2 {MODEL} W 2")
    assert done.status == 0, done.err
    check_boolq(done, "tp2", num_runs=1)
    # Twice more in the same output folder: nothing of what is there is lost.
    for _ in range(2):
        again = task(f"pa_fp16 full_BoolQ 2 {MODEL} W 1")
        assert again.status == 0, again.err
        time.sleep(1.1)  # the same process: only the time tells the files apart
    check_boolq(again, "tp1", num_runs=2)
    check_boolq(done, "tp2", num_runs=1)


def check_boolq(done: Run, ranks: str, num_runs: int) -> None:
    tail = f"CPU/precision_test/full/fp16/{MODEL}"
    text = (
        done.outputs / "results" / tail / f"BoolQ_pa_batch2_{ranks}_full_result.csv"
    ).read_text()
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    assert rows[0] == ["file_name", "value", "correct", "sum"]
    assert [row[0] for row in rows[1:]] == ["total", "dev.jsonl"]
    debug = sorted((done.outputs / "debug" / tail).glob(f"*{ranks}*"))
    assert len(debug) == num_runs
    for path in debug:
        name = rf"BoolQ_pa_batch2_{ranks}_full_\d{{4}}(_\d\d){{5}}_\d+_debug_info\.csv"
        assert re.fullmatch(name, path.name)
        asked = rows_of(path)
        assert [row["key"] for row in asked] == list("01234")
        assert asked[0]["queries"] == "Cat -- it sat.\nQuestion: is cat 0 on the mat?\nAnswer:"
        assert [row["golden_result"] for row in asked] == ["True", "False", "True", "False", "True"]
        passed = sum(row["pass"] == "True" for row in asked)
        assert all(
            (row["test_result"] == row["golden_result"]) == (row["pass"] == "True") for row in asked
        )
        assert rows[1][2:] == rows[2][2:] == [str(passed), "5"]
        assert float(rows[1][1]) == pytest.approx(passed / 5)


def test_no_questions(task: Callable[..., Run]) -> None:
    done = task(f"pa_fp16 full_GSM8K 1 {MODEL} W 1")
    assert done.status == 1
    assert "gsm8k" in done.err.splitlines()[-1]


@pytest.mark.parametrize("kind", ["pa_fp16", "fa"])
def test_single_prompts(task: Callable[..., Run], kind: str) -> None:
    prompts = """'["the cat","a dog"]'"""
    done = task(f"{kind} performance_single [[8,4]] {prompts} 1 {MODEL} W 1")
    assert done.status == 0, done.err
    assert "Question[1]: a dog\nAnswer[1]: " in done.out
    assert "Generate[1] token num: (1, 4)" in done.out
    path = "fa" if kind == "fa" else "pa"
    folder = done.outputs / f"results/CPU/performance_test/performance_single/fp16/{MODEL}"
    row = rows_of(folder / f"performance_single_{path}_batch2_tp1_result.csv")[0]
    assert (row["Batchsize"], row["Out_seq"]) == ("2", "4")
    assert float(row["Non-first token time(ms)"]) > 0


def test_largest_batch_within_a_limit(task: Callable[..., Run]) -> None:
    done = task(f"pa_fp16 performance_maxbs [[8,3],[8,2]] [[1,4],[2,3]] 60000 {MODEL} W 1")
    assert done.status == 0, done.err
    assert "[8,3]: 4\n[8,2]: 3\n" in done.out
    folder = done.outputs / f"results/CPU/performance_test/performance_maxbs/fp16/{MODEL}"
    probes = rows_of(folder / "performance_maxbs_pa_tp1_round_result.csv")
    assert [row["Batchsize"] for row in probes] == ["2", "3", "4", "2", "3"]
    best = rows_of(folder / "performance_maxbs_pa_tp1_final_result.csv")
    assert [(row["Out_seq"], row["Batchsize"]) for row in best] == [("3", "4"), ("2", "3")]
    assert (folder / "performance_maxbs_pa_8_3_batch2_tp1_result.csv").is_file()


def test_answers_of_single_prompts_on_a_log(task: Callable[..., Run]) -> None:
    done = task(
        f"""pa_fp16 precision_single [[8,4]] '["the cat"]' 1 {MODEL} W 1""",
        MODELTEST_LOG_TO_FILE="1",
    )
    assert done.status == 0, done.err
    folder = done.outputs / f"results/CPU/precision_test/precision_single/fp16/{MODEL}"
    row = rows_of(folder / "precision_single_pa_batch1_tp1_result.csv")[0]
    assert (row["Question"], row["Out_seq"]) == ("the cat", "4")
    assert f"Answer[0]: {row['Answer']}" in done.out
    assert len(list((done.outputs / "logs").glob("precision_single_*.log"))) == 1


def test_outputs_that_cannot_be_written_are_found_first(task: Callable[..., Run]) -> None:
    done = task(f"pa_fp16 performance [[16,4]] 1 {MODEL} W 1", MODELTEST_OUTPUT_DIR="/proc/out")
    assert (done.status, done.out) == (1, "")
    assert "result file /proc/out/results" in done.err
    assert "loaded" not in done.err


def test_speeds_are_shown_when_the_writing_fails(
    task: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that has become full meanwhile."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("gptneox.evaluation.modeltest_results.write_file", full)
    done = task(f"pa_fp16 performance [[16,4]] 1 {MODEL} W 1")
    assert done.status == 1
    assert "mean next tok/s" in done.out
    assert "result.csv: [Errno 28] No space left on device" in done.err


def test_main_alone_cannot_have_two_chips(task: Callable[..., Run]) -> None:
    done = task(f"pa_fp16 full_BoolQ 1 {MODEL} W 2")
    assert done.status == 2
    assert "run.sh" in done.err.splitlines()[-1]
