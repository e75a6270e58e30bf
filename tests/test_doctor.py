# SPDX-License-Identifier: Apache-2.0
"""`main.py doctor` on this machine, and the remedies it gives for Ascend software that is not here.

The emulated devices of tests/npu/test_launchers.py run it with torch_npu present.
"""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys

import pytest
from hostile import REPO

from gptneox import doctor
from gptneox.backends import npu_setup


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, REPO / "main.py", "doctor", *map(str, arguments)],
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
        [*command, "--model_path", tiny_checkpoint],
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


def test_an_old_package(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "2.1.0+cpu" if name == "torch" else "9.9")
    found = {f.topic: f for f in doctor.software()}
    assert found["torch"].ok is False
    assert "2.1.0+cpu is older than 2.7; type: pip install -U torch" in found["torch"].text
    assert found["transformers"].ok


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


@pytest.mark.parametrize("situation", BROKEN_NPU)
def test_a_torch_npu_that_does_not_work(situation, tmp_path, tiny_checkpoint):
    """From the command line to the exit status: one line with the remedy, and on the page too."""
    version, code, remedy = BROKEN_NPU[situation]
    version = version or npu_setup.release(npu_setup.torch.__version__)
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu/__init__.py").write_text(code)
    info = tmp_path / f"torch_npu-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n")
    page = run("--device", "npu", "--model_path", tiny_checkpoint, PYTHONPATH=str(tmp_path))
    assert page.returncode == 1
    assert "FAIL npu:" in page.stdout
    assert remedy in page.stdout
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
