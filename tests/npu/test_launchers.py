# SPDX-License-Identifier: Apache-2.0
"""The launchers themselves on emulated machines: one rank and two over hccl, both paths.

And what a user is told when something is missing: one line with the remedy, exit status not 0.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
import twins

REPO = Path(__file__).resolve().parents[2]
PROMPTS = twins.prompts([17, 40], 288, seed=5)
NUM_NEW = 8


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The 20B twin in fp16, and what Hugging Face answers in fp32."""
    path = tmp_path_factory.mktemp("launchers") / "checkpoint"
    model = twins.write_checkpoint(path, twins.FAMILY["gpt-neox-20b"], dtype=torch.float16)
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


@pytest.mark.parametrize(("name", "devices"), [("910B4", "0"), ("910B4", "0,1"), ("310P3", "0,1")])
def test_run_pa(machines, checkpoint, tmp_path, name, devices):
    path, expected = checkpoint
    output = tmp_path / "answers.jsonl"
    done = machines[name].run(
        *("bash", "run_pa.sh", path, *options(output)),
        ASCEND_RT_VISIBLE_DEVICES=devices,
        MASTER_PORT=free_port(),
    )
    assert answers_of(done, output) == expected


@pytest.mark.parametrize("name", [pytest.param("910B4", marks=pytest.mark.slow), "310P3"])
def test_cut_model_and_run(machines, checkpoint, tmp_path, name):
    path, expected = checkpoint
    copy, output = tmp_path / "checkpoint", tmp_path / "answers.jsonl"
    shutil.copytree(path, copy)
    done = machines[name].run(
        *("bash", "cut_model_and_run.sh", "inference", *options(output)),
        input_dir=str(copy),
        world_size_="2",
        ASCEND_RT_VISIBLE_DEVICES="0,1",
        MASTER_PORT=free_port(),
    )
    assert answers_of(done, output) == expected


# -- what is said when something is missing ------------------------------------------------------

MAIN = (sys.executable, REPO / "main.py")
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


def test_short_of_memory(machines, checkpoint):
    run, path = machines["910B4"].run, checkpoint[0]
    command = (*MAIN, "--device", "npu", "--model_path", path, *PAGED)
    assert "not enough memory for the weights" in last_line(
        run(*command, FAKE_NPU_MEM=str(4 << 20))
    )
    small = str(64 << 20)
    assert "no memory for the KV cache" in last_line(run(*command, FAKE_NPU_MEM=small))
    many = run(*command, "--num_blocks", "1000", FAKE_NPU_MEM=small)
    assert "not enough NPU memory for the KV cache" in last_line(many)


def test_bf16_on_duo(machines, checkpoint):
    command = (*MAIN, "--device", "npu", "--model_path", checkpoint[0], *PAGED)
    done = machines["310P3"].run(*command, "--dtype", "bfloat16")
    assert "dtype bfloat16 is not served on Ascend310P3; use float16" in last_line(done)


def test_unknown_chip(machines, checkpoint):
    command = (*MAIN, "--device", "npu", "--model_path", checkpoint[0], *PAGED)
    done = machines["910B4"].run(*command, FAKE_NPU_SOC="Ascend910A")
    assert "is not supported" in last_line(done)


@pytest.mark.parametrize("name", ["910B4", "310P3", "310P3-without-ATB"])
def test_doctor(machines, checkpoint, name):
    done = machines[name].run(*MAIN, "doctor", "--model_path", checkpoint[0])
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "A run would start."
    assert sum(line.startswith("ok   device ") for line in lines) == 2
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
