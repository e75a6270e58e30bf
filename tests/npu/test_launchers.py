# SPDX-License-Identifier: Apache-2.0
"""The launchers themselves on emulated machines: one rank and two over hccl, both paths.

neox-mini has to give the text that it gives on the CPU; a random twin of the 20B model, the ids
that Hugging Face finds.

And what a user is told when something is missing: one line with the remedy, exit status not 0.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import checkpoints
from support.processes import run_here
from support.service import program

REPO = Path(__file__).resolve().parents[2]
MAIN = (sys.executable, REPO / "main.py")
PROMPTS = checkpoints.prompts([17, 40], 288, seed=5)
NUM_NEW = 8


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The 20B twin in fp16, and what Hugging Face answers in fp32."""
    path = tmp_path_factory.mktemp("launchers") / "checkpoint"
    model = checkpoints.write_checkpoint(
        path, checkpoints.FAMILY["gpt-neox-20b"], dtype=torch.float16
    )
    answers = []
    for prompt in PROMPTS:
        rows = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(rows[0, len(prompt) :].tolist())
    return path, answers


def options(output):
    ids = [",".join(map(str, prompt)) for prompt in PROMPTS]
    return (
        *("--load_tokenizer", "False", "--input_ids", *ids, "--ignore_eos"),
        *("--max_output_length", str(NUM_NEW), "--max_batch_size", "2", "--output_file", output),
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def answers_of(done, output):
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(line)["token_ids"] for line in output.read_text().splitlines()]


def matrix(*quick):
    """Both chips with one device and two; what is not `quick` runs with -m slow."""
    return [
        pytest.param(name, devices, marks=() if (name, devices) in quick else pytest.mark.slow)
        for name in ("910B4", "310P3")
        for devices in ("0", "0,1")
    ]


@pytest.mark.parametrize(("name", "devices"), matrix(("910B4", "0,1")))
def test_run_pa(machines, checkpoint, tmp_path, name, devices):
    path, expected = checkpoint
    output, trace = tmp_path / "answers.jsonl", tmp_path / "trace"
    done = machines[name].run(
        *("bash", "run_pa.sh", path, *options(output)),
        ASCEND_RT_VISIBLE_DEVICES=devices,
        MASTER_PORT=free_port(),
        FAKE_NPU_TRACE=str(trace),
    )
    assert answers_of(done, output) == expected
    if devices == "0,1":
        for rank in range(2):
            check_reductions(Path(f"{trace}.{rank}").read_text(encoding="ascii").split(), name)


def check_reductions(kernels, name):
    """One all-reduce per layer and step, after the one product that makes the partial sum."""
    last = ["Cat", "Addmm"] if name == "910B4" else ["Cat", "MatmulWeightNz", "InplaceAdd"]
    places = [i for i, kernel in enumerate(kernels) if kernel == "c10d::allreduce_"]
    assert len(places) == checkpoints.FAMILY["gpt-neox-20b"]["num_hidden_layers"] * NUM_NEW
    for i in places:
        around = [k.removeprefix("aclnn") for k in kernels[i - len(last) : i + 2]]
        assert around == [*last, "c10d::allreduce_", "Add"]


@pytest.mark.parametrize(("name", "devices"), matrix())
def test_cut_model_and_run(machines, checkpoint, tmp_path, name, devices):
    path, expected = checkpoint
    copy, output = tmp_path / "checkpoint", tmp_path / "answers.jsonl"
    shutil.copytree(path, copy)
    done = machines[name].run(
        *("bash", "cut_model_and_run.sh", "inference", *options(output)),
        input_dir=str(copy),
        world_size_=str(len(devices.split(","))),
        ASCEND_RT_VISIBLE_DEVICES=devices,
        MASTER_PORT=free_port(),
    )
    assert answers_of(done, output) == expected


# -- the embedded checkpoint ---------------------------------------------------------------------

MINI = REPO / "weights/neox-mini"
TEXTS = ("What's deep learning?", "Once upon a time there was", "The sea")
ASK = ("--input_texts", *TEXTS, "--max_batch_size", "2", "--max_output_length", "32")


def printed(done):
    """Questions, answers and token counts, less the two lines of speeds."""
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = done.stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("Question[0]"))
    found = [x for x in lines[first:] if not x.startswith(("prefill: ", "decode: ", "total: "))]
    assert sum(line.startswith("Generate[") for line in found) == len(TEXTS)
    return found


@functools.cache
def text_of_cpu(attention):
    """What a path prints on the CPU, in fp32."""
    output = io.StringIO()
    options = ("--device", "cpu", "--dtype", "float32", "--attention", attention)
    with contextlib.redirect_stdout(output):
        status = run_here(*options, *ASK)
    return printed(subprocess.CompletedProcess(ASK, status, output.getvalue(), ""))


@pytest.mark.parametrize(("name", "devices"), matrix(("910B4", "0")))
def test_neox_mini_through_run_pa(machines, name, devices):
    done = machines[name].run(
        *("bash", "run_pa.sh", *ASK), ASCEND_RT_VISIBLE_DEVICES=devices, MASTER_PORT=free_port()
    )
    assert f"on Ascend{name}" in done.stderr
    assert printed(done) == text_of_cpu("paged")


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["0", "0,1"])
def test_neox_mini_with_graphs(machines, devices):
    """Collectives are captured, too."""
    done = machines["910B4"].run(
        *("bash", "run_pa.sh", *ASK, "--graphs", "on"),
        ASCEND_RT_VISIBLE_DEVICES=devices,
        MASTER_PORT=free_port(),
    )
    assert "captured the decode step of 2 sequences" in done.stderr
    assert printed(done) == text_of_cpu("paged")


@pytest.mark.parametrize(("name", "devices"), matrix(("310P3", "0,1")))
def test_neox_mini_through_cut_model_and_run(machines, tmp_path, name, devices):
    copy = tmp_path / "checkpoint"
    shutil.copytree(MINI, copy, ignore=shutil.ignore_patterns("part_model"))
    done = machines[name].run(
        *("bash", "cut_model_and_run.sh", "inference", *ASK),
        input_dir=str(copy),
        world_size_=str(len(devices.split(","))),
        ASCEND_RT_VISIBLE_DEVICES=devices,
        MASTER_PORT=free_port(),
    )
    assert printed(done) == text_of_cpu("flash")


# -- what is said when something is missing ------------------------------------------------------

ONE_PROMPT = ("--load_tokenizer", "False", "--input_ids", "1,2,3")
PAGED = ("--auto_attention", "paged", *ONE_PROMPT)


def last_line(done):
    assert done.returncode != 0, done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return errors[-1]


def test_missing_cann(machines, checkpoint):
    run, path = machines["910B4"].run, checkpoint[0]
    done = run(*MAIN, "--device", "npu", "--model_path", path, *PAGED, LD_LIBRARY_PATH="")
    assert "type: source /usr/local/Ascend/" in last_line(done)
    done = run(*MAIN, "doctor", "--device", "npu", LD_LIBRARY_PATH="")
    assert done.returncode == 1
    assert "FAIL npu:" in done.stdout
    assert "type: source /usr/local/Ascend/ascend-toolkit/set_env.sh" in done.stdout


def test_too_many_devices(machines, checkpoint):
    done = machines["910B4"].run(
        *MAIN,
        *("--device", "npu", "--model_path", checkpoint[0], *PAGED),
        RANK="2",
        LOCAL_RANK="2",
        WORLD_SIZE="3",
    )
    assert "rank 2 has no NPU: 2 visible for 3 ranks" in last_line(done)


@pytest.mark.parametrize(
    ("mebibytes", "options", "text"),
    [
        (64, (), "no memory for the KV cache"),
        pytest.param(4, (), "not enough memory for the weights", marks=pytest.mark.slow),
        pytest.param(
            *(64, ("--num_blocks", "1000"), "not enough memory for --num_blocks 1000"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_short_of_memory(machines, checkpoint, mebibytes, options, text):
    command = (*MAIN, "--device", "npu", "--model_path", checkpoint[0], *PAGED, *options)
    done = machines["910B4"].run(*command, FAKE_NPU_MEM=str(mebibytes << 20))
    assert text in last_line(done)


def test_bf16_on_duo(machines, checkpoint):
    command = (*MAIN, "--device", "npu", "--model_path", checkpoint[0], *PAGED)
    done = machines["310P3"].run(*command, "--dtype", "bfloat16")
    assert "dtype bfloat16 is not served on Ascend310P3; use float16" in last_line(done)


@pytest.mark.slow
def test_quantized_weights_are_refused(machines, checkpoint, tmp_path):
    run = machines["910B4"].run
    done = run("bash", "run_pa.sh", checkpoint[0], *ONE_PROMPT, "--device", "npu", IS_QUANT="1")
    assert "IS_QUANT=1, but the weights in" in last_line(done)
    config = json.loads((checkpoint[0] / "config.json").read_text(encoding="utf-8"))
    for entry in checkpoint[0].iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantize": "w8a8"}))
    done = run(*MAIN, "--device", "npu", "--model_path", tmp_path, *PAGED)
    assert "is quantized (w8a8) and needs one quant_model_description.json" in last_line(done)


def test_unknown_chip(machines, checkpoint):
    command = (*MAIN, "--device", "npu", "--model_path", checkpoint[0], *PAGED)
    done = machines["910B4"].run(*command, FAKE_NPU_SOC="Ascend910A")
    assert "is not supported" in last_line(done)


@pytest.mark.parametrize(
    "name", ["910B4", pytest.param("310P3", marks=pytest.mark.slow), "310P3-without-ATB"]
)
def test_doctor(machines, checkpoint, name):
    done = machines[name].run(*MAIN, "doctor", "--model_path", checkpoint[0], *ONE_PROMPT)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "A run would start."
    assert sum(line.startswith("ok   device ") for line in lines) == 2
    assert "HCCL" not in done.stdout
    assert any("3 layers, 2 heads of 96, 24 of them rotated" in line for line in lines)
    table = done.stdout[done.stdout.index("paged attention:") :]
    expected = {
        "910B4": ("npu_fused_infer_attention_score, BSH", "npu_rotary_mul"),
        "310P3": ("ATB paged attention, NZ", "torch, fp32"),
        "310P3-without-ATB": ("slower", "npu_incre_flash_attention"),
    }
    assert all(text in table for text in expected[name])
    if name == "310P3-without-ATB":
        assert "type: source /usr/local/Ascend/nnal/atb/set_env.sh" in done.stdout


def test_doctor_where_something_is_short(machines, checkpoint):
    run, command = (
        machines["910B4"].run,
        (*MAIN, "doctor", "--model_path", checkpoint[0], *ONE_PROMPT),
    )
    busy = free_port()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", int(busy)))
        listener.listen()
        done = run(*command, ASCEND_RT_VISIBLE_DEVICES="0,1,2", HCCL_IF_BASE_PORT=busy)
    assert f"note HCCL ports:        {busy} is taken" in done.stdout
    assert "type: export HCCL_IF_BASE_PORT=" in done.stdout
    assert done.returncode == 1
    assert "FAIL devices:           3 listed in ASCEND_RT_VISIBLE_DEVICES, 2 found" in done.stdout


@pytest.mark.slow
def test_doctor_where_memory_is_short(machines, checkpoint):
    command = (*MAIN, "doctor", "--model_path", checkpoint[0], *ONE_PROMPT)
    done = machines["910B4"].run(*command, FAKE_NPU_MEM=str(64 << 20))
    assert done.returncode == 1
    assert "no memory for the KV cache: one block takes" in done.stdout


# -- the service ---------------------------------------------------------------------------------


def visible_devices(pid):
    """What a process was told of its devices."""
    for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        if entry.startswith(b"ASCEND_RT_VISIBLE_DEVICES="):
            return entry.partition(b"=")[2].decode()
    return None


def children(pid):
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "devices"), [((), {"ASCEND_RT_VISIBLE_DEVICES": "0,1"}), (("--replicas", "2"), {})]
)
def test_serve(machines, tmp_path, options, devices):
    """Two ranks wait for work on the host; two engines divide the devices that there are."""
    trace = tmp_path / "trace"
    environ = machines["910B4"].environment(FAKE_NPU_TRACE=str(trace), **devices)
    environ.pop("TMPDIR", None)
    body = {"prompt": TEXTS[1], "max_tokens": 12, "temperature": 0}
    with program("--device", "cpu", "--dtype", "float32", cwd=tmp_path) as served:
        expected = served.post("/v1/completions", body).json["choices"][0]["text"]
    with program(*options, cwd=tmp_path, wait=False, **environ) as served:
        served.port = int(served.wait_for(r"at http://.*:(\d+)", 120)[1])
        for index in range(2 if options else 1):
            served.wait_for(f"engine {index} is ready", 240)
        answer = served.post("/v1/completions", body)
        assert answer.json["choices"][0]["text"] == expected
        if options:
            engines = children(served.process.pid)
            assert sorted(map(visible_devices, engines)) == ["0", "1"]
            return
        traces = [Path(f"{trace}.{rank}") for rank in range(2)]
        kernels = traces[0].read_text(encoding="ascii").split()
        assert kernels.count("c10d::broadcast_") == 12, "the tokens, and nothing else"
        sizes = [path.stat().st_size for path in traces]
        time.sleep(3.0)  # some signs of life
        assert [path.stat().st_size for path in traces] == sizes
        assert served.post("/v1/completions", body).json["choices"][0]["text"] == expected
