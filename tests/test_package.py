# SPDX-License-Identifier: Apache-2.0
"""The wheel, installed into an empty folder and used from / with nothing of the checkout."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import REPO, clean_environment

# Folders that a build does not read.
LEFT_OUT = ("tests/", "tools/", "docs/")
PROMPT = "What's deep learning?"

Run = Callable[..., subprocess.CompletedProcess[str]]


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below `folder`: its size and when it was written."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed package. It is built in a copy, for a build leaves folders behind."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if not name.startswith(LEFT_OUT) and (REPO / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPO / name).read_bytes())
    (source / "weights/neox-mini/part_model").mkdir()
    (source / "weights/neox-mini/part_model/manifest.json").touch()
    wheels = tmp_path_factory.mktemp("wheels")
    offline = ("--no-deps", "--no-index", "--quiet")
    pip("wheel", *offline, "--no-build-isolation", "--wheel-dir", wheels, source)
    folder = tmp_path_factory.mktemp("target")
    pip("install", *offline, "--target", folder, *wheels.glob("*.whl"))
    return folder


@pytest.fixture
def run(target: Path, tmp_path: Path) -> Run:
    """Runs Python with the package and its dependencies alone; nothing is written into it."""

    def start(*arguments: str | Path, cwd: Path = Path("/"), **environ: str):
        before = tree(target)
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env=clean_environment()
            | {
                "PYTHONPATH": str(target),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "HF_HOME": str(tmp_path / "hub"),
                "TMPDIR": str(tmp_path),
            }
            | environ,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert tree(target) == before
        return done

    return start


def answers(done: subprocess.CompletedProcess[str], output: Path) -> list[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line)["text"] for line in output.read_text().splitlines()]


def test_the_package_is_the_installed_one(run: Run, target: Path) -> None:
    code = (
        "import os, sys, gptneox, gptneox.config.places\n"
        "print(gptneox.__file__, gptneox.config.places.CHECKOUT)\n"
        "print([p for p in sys.path if os.path.isdir(os.path.join(p, 'gptneox'))])\n"
    )
    done = run("-c", code)
    assert done.stdout == f"{target}/gptneox/__init__.py None\n{[str(target)]}\n", done.stderr
    shipped = target / "gptneox/shipped"
    for name in ("config.ini", "weights/neox-mini/model.safetensors"):
        assert (shipped / name).read_bytes() == (REPO / name).read_bytes()
    assert not (shipped / "weights/neox-mini/part_model").exists()
    assert (shipped / "weights/neox-mini/eval/boolq/dev.jsonl").is_file()
    assert (target / "gptneox/server/page.html").is_file()


def test_the_command_runs_both_paths(run: Run, target: Path, tmp_path: Path) -> None:
    """The command that pip makes."""
    command = target / "bin/gptneox"
    texts = []
    for attention in ("paged", "flash"):
        output = tmp_path / f"{attention}.jsonl"
        options = ("--input_texts", PROMPT, "--max_output_length", "8", "--device", "cpu")
        flags = (*options, "--attention", attention, "--output_file", output)
        texts += answers(run(command, "inference", *flags), output)
    assert len(texts) == 2
    assert len(set(texts)) == 1
    assert run(command, "--help").stdout.startswith("usage: gptneox ")


def test_doctor(run: Run) -> None:
    done = run("-m", "gptneox", "doctor", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("A run would start.\n")


LOAD = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__module__, model.dtype)
"""


def test_a_part_is_cut_and_loaded(run: Run, target: Path, tmp_path: Path) -> None:
    checkpoint, parts = target / "gptneox/shipped/weights/neox-mini", tmp_path / "parts"
    places = ("--input_path", checkpoint, "--output_path", parts, "--world_size", "1")
    done = run("-m", "gptneox", "cut", *places)
    assert done.returncode == 0, done.stderr
    assert (parts / "0/modeling_gpt_neox_ascend.py").is_file()
    done = run("-c", LOAD, parts / "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("transformers_modules.")


def test_two_ranks_cut_and_run_in_the_current_folder(run: Run, tmp_path: Path) -> None:
    """The launcher, by its module. The parts of the embedded checkpoint lie beside the results."""
    output = tmp_path / "two.jsonl"
    options = ("--input_texts", PROMPT, "--max_output_length", "8", "--device", "cpu")
    done = run(
        *("-m", "gptneox.launch", "flash", "launch", "", "", "2", "inference", *options),
        *("--output_file", output),
        cwd=tmp_path,
    )
    assert len(answers(done, output)) == 1
    assert (tmp_path / "part_model/manifest.json").is_file()


def test_modeltest_writes_into_the_current_folder(run: Run, target: Path, tmp_path: Path) -> None:
    checkpoint = target / "gptneox/shipped/weights/neox-mini"
    config = json.loads((checkpoint / "config.json").read_text())
    kind = {"float16": "pa_fp16", "bfloat16": "pa_bf16"}.get(
        config.get("dtype", config.get("torch_dtype")), "fa"
    )
    words = (kind, "performance", "[[8,2]]", "1", "mini", checkpoint, "1")
    done = run("-m", "gptneox", "modeltest", *words, cwd=tmp_path, GPTNEOX_CPU_KERNELS="off")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "outputs").rglob("*.csv"))
