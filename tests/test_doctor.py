# SPDX-License-Identifier: Apache-2.0
"""`main.py doctor` on this machine, and the remedies it gives for Ascend software that is not here.

The emulated devices of tests/npu/test_launchers.py run it with torch_npu present.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import write_chain_checkpoint
from support.processes import REPO, clean_this_process, run_here

from gptneox.devices.npu import setup as npu_setup
from gptneox.tasks import doctor
from gptneox.weights.cut import cut_checkpoint

# torch's reporter of failing ranks wants a real stderr, which a test in this process has not.
pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")

# The tiny checkpoint has no tokenizer.
IDS = ("--load_tokenizer", "False", "--input_ids", "1")


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, REPO / "main.py", "doctor", *IDS, *map(str, arguments)],
        # without CPU kernels, which would be compiled below HOME
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "GPTNEOX_CPU_KERNELS": "off"}
        | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_run_would_start(tiny_checkpoint):
    done = run("--model_path", tiny_checkpoint, "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "A run would start."
    assert len(lines) < 40, "one page"
    page = done.stdout
    assert "4 heads of 32, 8 of them rotated" in page
    assert "room for a KV cache of" in page
    assert "port 20014" in page


def test_the_task_flag_is_the_same(tiny_checkpoint):
    command = [sys.executable, REPO / "main.py", "--task", "doctor", "--device", "cpu"]
    done = subprocess.run(
        [*command, *IDS, "--model_path", tiny_checkpoint],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "A run would start.")


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="torch_npu is here")
def test_a_named_device_that_is_missing(tmp_path):
    done = run("--device", "npu", "--model_path", tmp_path / "none")
    assert done.returncode == 1
    assert "FAIL npu:               torch_npu is not installed" in done.stdout
    assert done.stdout.splitlines()[-1] == "1 of these stop a run."


def test_a_checkpoint_that_is_missing(tmp_path):
    done = run("--device", "cpu", "--model_path", tmp_path)
    assert done.returncode == 1
    assert f"FAIL checkpoint:        no config.json in {tmp_path}" in done.stdout


def test_a_port_that_is_taken(tiny_checkpoint):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = str(server.getsockname()[1])
        arguments = ("--device", "cpu", "--model_path", tiny_checkpoint)
        alone = run(*arguments, MASTER_PORT=port)
        several = run(*arguments, MASTER_PORT=port, ASCEND_RT_VISIBLE_DEVICES="0,1")
    assert alone.returncode == 0
    assert f"note port {port}:" in alone.stdout
    assert several.returncode == 1
    assert f"FAIL port {port}:" in several.stdout
    assert "export another MASTER_PORT" in several.stdout


# -- the page and the run say the same ----------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A checkpoint with a tokenizer, whose text is known."""
    return write_chain_checkpoint(tmp_path_factory.mktemp("sound") / "checkpoint", "123456789")


@pytest.fixture
def both(tmp_path, monkeypatch, capsys):
    """Runs doctor, then the run, in this process; returns the failures of the page, and the run's
    error."""
    clean_this_process(monkeypatch, tmp_path)

    def status_of(*argv):
        capsys.readouterr()
        status = run_here(*argv)
        return status, *capsys.readouterr()

    def compare(path, *argv, attention="paged", length="2"):
        argv = ("--attention", attention, "--device", "cpu", "--model_path", path, *argv)
        argv = ("--max_output_length", length, *argv)
        page, out, _ = status_of("doctor", *argv)
        status, _, err = status_of(*argv)
        assert (page == 0) == (status == 0), (out, err)
        assert (out.splitlines()[-1] == "A run would start.") == (page == 0)
        # free memory changes between the two
        failures = re.sub(r"\d+\.\d+|(?<=most )\d+", "#", out)
        errors = [line.removeprefix("error: ") for line in err.splitlines() if "error: " in line]
        for error in errors:
            assert re.sub(r"\d+\.\d+|(?<=most )\d+", "#", error) in failures
        return " ".join(errors)

    compare.page = lambda *argv: status_of("doctor", *argv)[1]
    return compare


def edit(**keys):
    def change(path):
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))

    return change


def write(name, content):
    def change(path):
        (path / name).write_text(content)

    return change


def remove(*names):
    def change(path):
        for name in names:
            (path / name).unlink()

    return change


def tensors(change_tensors):
    def change(path):
        found = load_file(path / "model.safetensors")
        change_tensors(found)
        save_file(found, path / "model.safetensors", {"format": "pt"})

    return change


def cast(name, dtype):
    return tensors(lambda found: found.update({name: found[name].to(dtype)}))


def cut_rows(found):
    found["embed_out.weight"] = found["embed_out.weight"][:300].clone()


QKV, DENSE = (f"gpt_neox.layers.0.attention.{n}.weight" for n in ("query_key_value", "dense"))
NO_ROPE = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64}
# state -> (what is done to a sound checkpoint, further arguments, what the one line says)
BROKEN = {
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), (), "no tokenizer in"),
    "broken tokenizer": (write("tokenizer.json", "{"), (), "tokenizer"),
    "pointer for a tokenizer": (
        write("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n"), (), "git-lfs",
    ),
    "tokenizer too large": (edit(vocab_size=300), (), "vocab_size 300"),
    "broken generation_config": (write("generation_config.json", "{"), (), "not valid JSON"),
    "array for a generation_config": (write("generation_config.json", "[]"), (), "JSON object"),
    "wrong end of text": (
        write("generation_config.json", '{"eos_token_id": "x"}'), (), "eos_token_id is 'x'",
    ),
    "tensor missing": (tensors(lambda t: t.pop(QKV)), (), "lacks"),
    "tensor of a wrong shape": (tensors(cut_rows), (), "embed_out.weight is [300"),
    "int8 tensor": (cast(DENSE, torch.int8), (), "int8"),
    "damaged weights": (write("model.safetensors", "x" * 99), (), "model.safetensors"),
    "no weights": (remove("model.safetensors"), (), "no weights in"),
    "no config": (remove("config.json"), (), "no config.json in"),
    "another family": (edit(model_type="llama"), (), "model_type"),
    "quantized": (edit(quantize="w8a8"), (), "w8a8"),
    "more layers": (edit(num_hidden_layers=3), (), "lacks"),
    "odd rotary share": (edit(rotary_pct=0.1), (), "rotary"),
    "no memory": (None, ("--reserved_memory_gb", "1000000"), "no memory for the KV cache"),
    "too many blocks": (None, ("--num_blocks", "1000000000"), "at most"),
    "too few blocks": (None, ("--num_blocks", "1", "--input_ids", ",".join(["1"] * 200)), "block"),
    "rope beyond its end": (
        edit(**NO_ROPE), ("--max_position_embeddings", "128"), "'dynamic'",
    ),
    "prompt too long": (edit(max_position_embeddings=16), ("--input_ids", ",".join("1" * 40)),
        "16 positions"),
    "id beyond the rows": (None, ("--input_ids", "999"), "999"),
    "stop id beyond the rows": (None, ("--stop_token_ids", "999"), "999"),
    "empty prompt": (None, ("--input_texts", "1", ""), "prompt 1 is empty"),
    "folder as a prompt": (None, ("--input_texts", "."), "is a folder"),
    "folder for the answers": (None, ("--output_file", "."), "folder"),
}  # fmt: skip


@pytest.mark.parametrize("state", BROKEN)
def test_what_ends_a_run_is_on_the_page(state, sound, tmp_path, both):
    change, arguments, named = BROKEN[state]
    path = shutil.copytree(sound, tmp_path / "checkpoint")
    if change:
        change(path)
    assert named in both(path, *arguments)


@pytest.mark.parametrize("state", ["no tokenizer", "tensor missing", "prompt too long"])
def test_what_ends_a_run_of_the_flash_path(state, sound, tmp_path, both):
    change, arguments, _ = BROKEN[state]
    path = shutil.copytree(sound, tmp_path / "checkpoint")
    change(path)
    assert both(path, *arguments, attention="flash")


SOUND = {
    "as it is": (None, ()),
    "other sampling": (write("generation_config.json", '{"num_beams": 4, "top_k": 5}'), ()),
    "half precision": (cast(DENSE, torch.float16), ()),
    "needless files": (write("adapter_model.safetensors", "x"), ()),
    "without a tokenizer": (
        remove("tokenizer.json", "tokenizer_config.json"),
        ("--load_tokenizer", "False", "--input_ids", "5"),
    ),
    "one block": (None, ("--num_blocks", "1", "--block_size", "32")),
    "a missing file as prompt": (None, ("--input_texts", "gone.txt")),
    "few positions": (edit(max_position_embeddings=24), ("--input_texts", "1")),
    "an old cut in config.json": (edit(world_size=2), ()),
}


@pytest.mark.parametrize("attention", ["paged", "flash"])
@pytest.mark.parametrize("state", SOUND)
def test_what_runs_is_not_refused(state, attention, sound, tmp_path, both):
    change, arguments = SOUND[state]
    path = shutil.copytree(sound, tmp_path / "checkpoint")
    if change:
        change(path)
    assert both(path, *arguments, attention=attention) == ""


def test_options_and_variables(sound, both, monkeypatch):
    assert "--stream" in both(sound, "--stream", attention="flash")
    monkeypatch.setenv("IS_QUANT", "1")
    assert "IS_QUANT=1" in both(sound)


def test_a_pipe_is_left_to_the_run(sound, both):
    reader, writer = os.pipe()
    os.write(writer, b"1")
    os.close(writer)
    assert both(sound, "--input_texts", f"/dev/fd/{reader}") == "", "the run finds it full"
    os.close(reader)


def test_ranks_are_those_of_the_launcher(sound, both, monkeypatch):
    """run_pa.sh itself is asked; a count that does not divide ends every rank."""
    argv = ("--device", "cpu", "--model_path", sound)
    for count, named in (
        ("3", "world_size 3 does not divide 4 attention heads"),
        ("2", "on each of 2 rank(s)"),
        ("many", "FAIL run_pa.sh:         TP_WORLD_SIZE='many' is not a whole number"),
    ):
        monkeypatch.setenv("TP_WORLD_SIZE", count)
        page = both.page(*argv)
        assert named in page
        assert (page.splitlines()[-1] == "A run would start.") == (count == "2")


def test_parts_of_a_cut(sound, tmp_path, both, monkeypatch):
    parts = tmp_path / "parts"
    cut_checkpoint(sound, parts, 2)
    assert "was cut for 2 ranks, but 1 run" in both(parts)
    assert "was cut for 2 ranks, but 1 run" in both(parts / "0")
    alone = shutil.copytree(parts / "0", tmp_path / "alone")
    assert "is one part of 2, but 1 ranks run" in both(alone)
    monkeypatch.setenv("TP_WORLD_SIZE", "2")
    argv = ("--device", "cpu", "--model_path", parts)
    assert both.page(*argv).splitlines()[-1] == "A run would start."
    (parts / "1" / "model.safetensors").unlink()
    assert "1/model.safetensors is missing" in both.page(*argv)


def test_demonstrations_have_to_fit(sound, tmp_path, both):
    path = shutil.copytree(sound, tmp_path / "checkpoint")
    edit(max_position_embeddings=24)(path)
    assert "24 positions" in both(path, attention="flash")


def test_a_length_that_was_asked_for_has_to_fit(sound, both):
    assert "max_new_tokens is 3000" in both(sound, "--input_texts", "1", length="3000")


def test_an_old_package(monkeypatch):
    there = {"torch": "2.1.0+cpu", "transformers": "6.0"}
    monkeypatch.setattr("importlib.metadata.version", lambda name: there.get(name, "9.9"))
    monkeypatch.setattr("importlib.metadata.requires", lambda name: [])
    found = {f.topic: f for f in doctor.software()}
    assert [found[name].ok for name in (*there, "safetensors")] == [False, False, True]
    line = f"is needed; type: {sys.executable} -m pip install"
    assert found["torch"].text == f"torch>=2.5 (2.1.0+cpu is there) {line} 'torch>=2.5'"
    assert "(6.0 is there) is needed" in found["transformers"].text
    assert "numpy" not in found, "what is as it should be is shown for three packages alone"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            "libhccl.so: cannot open shared object file: No such file or directory",
            "CANN's libhccl.so is not found; type: source /usr/local/Ascend/",
        ),
        (
            "libatb.so: cannot open shared object file: No such file or directory",
            "type: source /usr/local/Ascend/nnal/atb/set_env.sh",
        ),
        (
            "/lib/torch.libs/libgomp-d22c.so.1.0.0: cannot allocate memory in static TLS block",
            "type: export LD_PRELOAD=/lib/torch.libs/libgomp-d22c.so.1.0.0",
        ),
        ("libtorch_npu.so: undefined symbol: _ZN2at4npu", "does not fit CANN or torch"),
        ("something\nelse", "import torch_npu failed: something else"),
    ],
)
def test_why_the_import_failed(error, remedy):
    text = npu_setup.explain_import_error(ImportError(error))
    assert remedy in text
    assert "\n" not in text


BROKEN_NPU = {
    "another version": ("2.1.0", "", "is made for torch 2.1.0, but torch is"),
    "libgomp too late": (
        None,
        "raise ImportError('/x/libgomp-d2.so.1: cannot allocate memory in static TLS block')",
        "type: export LD_PRELOAD=/x/libgomp-d2.so.1",
    ),
    "no NNAL": (
        None,
        "raise OSError('libatb.so: cannot open shared object file: No such file or directory')",
        "type: source /usr/local/Ascend/nnal/atb/set_env.sh",
    ),
}


def break_torch_npu(situation, tmp_path):
    """Put it there, for a PYTHONPATH; returns the remedy that is to be named."""
    version, code, remedy = BROKEN_NPU[situation]
    version = version or npu_setup.release(npu_setup.torch.__version__)
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu/__init__.py").write_text(code)
    info = tmp_path / f"torch_npu-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n")
    return remedy


@pytest.mark.parametrize("situation", BROKEN_NPU)
def test_a_torch_npu_that_does_not_work(situation, tmp_path, tiny_checkpoint):
    remedy = break_torch_npu(situation, tmp_path)
    page = run("--device", "npu", "--model_path", tiny_checkpoint, PYTHONPATH=str(tmp_path))
    assert page.returncode == 1
    assert "FAIL npu:" in page.stdout
    assert remedy in page.stdout


def test_a_run_with_a_torch_npu_that_does_not_work(tmp_path, tiny_checkpoint):
    """From the command line to the exit status: one line with the remedy."""
    remedy = break_torch_npu("another version", tmp_path)
    done = subprocess.run(
        [sys.executable, REPO / "main.py", "--device", "npu", "--model_path", tiny_checkpoint],
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": "/nonexistent",
            "PYTHONPATH": str(tmp_path),
            "GPTNEOX_CPU_KERNELS": "off",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "device 'npu' cannot be used: " in errors[0]
    assert remedy in errors[0]
    assert "Traceback" not in done.stderr


def test_versions_that_do_not_fit():
    assert npu_setup.version_conflict("2.13.0+cpu", "2.13.0") == ""
    assert npu_setup.version_conflict("2.7.1", "2.7.1.post2") == ""
    assert "pip install torch_npu==2.9.0" in npu_setup.version_conflict("2.9.0+cpu", "2.8.0")


def test_hccl_ports():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        base = min(port - 3, 65520)
        found = npu_setup.hccl_finding(base, "")
        assert found.ok is None
        assert f"{port} is taken" in found.text
        assert "type: export HCCL_IF_BASE_PORT=" in found.text
        assert npu_setup.hccl_finding(base, "60000-60050").ok
        free = int(found.text.rsplit("=", 1)[1])
        assert npu_setup.hccl_finding(free, "").ok


def test_cann_versions(tmp_path):
    keys = [npu_setup.version_key(v) for v in ("8.1.RC1", "8.2.RC1", "8.2.0", "8.3.RC1", "9.0.0")]
    assert keys == sorted(keys)
    assert npu_setup.cann_version(tmp_path) == ""
    folder = tmp_path / "aarch64-linux"
    folder.mkdir()
    (folder / "ascend_toolkit_install.info").write_text(
        "package_name=Ascend-cann-toolkit\nversion=8.2.RC1\ninnerversion=V100R001C22\n"
    )
    assert npu_setup.cann_version(tmp_path) == "8.2.RC1"


def test_cann_against_torch_npu(tmp_path, monkeypatch):
    monkeypatch.setattr(npu_setup.torch, "__version__", "2.9.0+cpu")
    (tmp_path / "version.cfg").write_text("runtime_running_version=[7.6.0.1.220:8.2.RC1]\n")

    def cann(home):
        return {f.topic: f for f in npu_setup.cann_findings("2.9.0", home)}["CANN"]

    assert "older than 8.5.0" in cann(str(tmp_path)).text
    assert "type: source /" in cann("").text
    assert cann(str(tmp_path)).ok is None
