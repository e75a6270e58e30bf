# SPDX-License-Identifier: Apache-2.0
"""The launchers, run with stubs in place of Python and torchrun: no model is loaded here."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

REPO = Path(__file__).resolve().parents[1]
PAGED = ["--task", "inference", "--auto_attention", "paged", "--model_path"]
STUB_STATUS = 7

# Writes what it was called with to $RECORD, and ends with a status of its own.
RECORDER = f"""
import json, os, sys
call = {{"program": sys.argv[1], "argv": sys.argv[2:], "env": dict(os.environ), "cwd": os.getcwd()}}
with open(os.environ["RECORD"], "w") as file:
    json.dump(call, file)
sys.exit({STUB_STATUS})
"""

# Settings of the machine the tests run on that would change what a launcher does.
SETTINGS = re.compile(
    r"(ASCEND_|MASTER_|HCCL_|LD_PRELOAD|OMP_|PYTHON|TORCHRUN|RANK|LOCAL_RANK|WORLD_SIZE|NNODES|NODE_RANK"
    r"|TP_WORLD_SIZE|BIND_CPU|IS_QUANT|INF_NAN|CUDA_VISIBLE)"
)


class Call(NamedTuple):
    """What a stub saw of its call, and how the launcher ended."""

    program: str  # "python", "torchrun"; "" when no stub was reached
    argv: list[str]
    env: dict[str, str]
    cwd: str
    status: int
    stderr: str


def write_program(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


def recording_stub(folder: Path, name: str) -> Path:
    """A program that records its call; asked to run a piece of Python (-c) it is a Python."""
    real, recorder = shlex.quote(sys.executable), folder / "recorder.py"
    folder.mkdir(parents=True, exist_ok=True)
    recorder.write_text(RECORDER)
    return write_program(
        folder / name,
        f'if [[ ${{1-}} == -c ]]; then exec {real} "$@"; fi\n'
        f'exec {real} -I {shlex.quote(str(recorder))} {name} "$@"',
    )


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not SETTINGS.match(name)}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A weight folder whose name has blanks and characters beyond ASCII."""
    folder = tmp_path / "my weights 权重 é"
    folder.mkdir()
    return folder


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    recording_stub(folder, "python")
    recording_stub(folder, "torchrun")
    write_program(folder / "npu-smi", "exit 1")  # not the machine's own
    return folder


@pytest.fixture
def launch(tmp_path: Path, stubs: Path) -> Callable[..., Call]:
    """Runs a launcher with `python` chosen by PYTHON and `torchrun` first on PATH."""

    def run(*arguments: Any, script: Path = REPO / "run_pa.sh", cwd: Path = tmp_path, **env: str):
        record = tmp_path / "record.json"
        record.unlink(missing_ok=True)
        environment = clean_environment() | {
            "PATH": f"{stubs}:{os.environ['PATH']}",
            "PYTHON": str(stubs / "python"),
            "TMPDIR": str(tmp_path),
            "RECORD": str(record),
        }
        done = subprocess.run(
            ["bash", script, *arguments],
            cwd=cwd,
            env=environment | env,
            capture_output=True,
            text=True,
            check=False,
        )
        seen = {"program": "", "argv": [], "env": {}, "cwd": ""}
        if record.exists():
            seen = json.loads(record.read_text())
        return Call(**seen, status=done.returncode, stderr=done.stderr)

    return run


@pytest.fixture
def busy_port() -> Iterator[int]:
    """Port 20014, taken, by us or by whoever had it already."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", 20014))
        except OSError:
            pass  # taken it is
        else:
            listener.listen()
        yield 20014


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Another checkout, whose weights/ is empty."""
    root = tmp_path / "a copy"
    shutil.copytree(REPO / "scripts", root / "scripts")
    for name in ["run_pa.sh", "constraints.txt", "pyproject.toml"]:
        shutil.copy(REPO / name, root / name)
    return root


def option(call: Call, name: str) -> str:
    return call.argv[call.argv.index(name) + 1]


# --- run_pa.sh: which weights, which options


@pytest.mark.parametrize("arguments", [[], ["--input_texts", "a b", "--ignore_eos"]])
def test_without_weight_path_the_embedded_checkpoint_runs(launch, copy: Path, arguments) -> None:
    embedded = copy / "weights" / "neox-mini"
    embedded.mkdir(parents=True)
    call = launch(*arguments, script=copy / "run_pa.sh")
    assert call.program == "python"
    assert call.argv == [str(copy / "main.py"), *PAGED, str(embedded), *arguments]


def test_a_checkout_without_the_embedded_checkpoint(launch, copy: Path) -> None:
    call = launch(script=copy / "run_pa.sh")
    assert (call.program, call.status) == ("", 1)
    assert "weights/neox-mini" in call.stderr


def test_weight_path_with_blanks_and_options_in_order(launch, weights: Path) -> None:
    options = ["--input_texts", "two words", "天 空", "", "--model_path", "the user's wins", "*"]
    call = launch(weights, *options)
    assert call.argv == [str(REPO / "main.py"), *PAGED, str(weights), *options]
    assert call.status == STUB_STATUS
    assert call.stderr == ""


def test_relative_paths_are_those_of_the_caller(launch, weights: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    call = launch(f"../{weights.name}/", "--output_file", "out.txt", cwd=elsewhere)
    assert option(call, "--model_path") == str(weights)
    assert call.cwd == str(elsewhere)
    assert call.argv[-1] == "out.txt"


def test_launcher_behind_a_link(launch, weights: Path, tmp_path: Path) -> None:
    link = tmp_path / "run"
    link.symlink_to(REPO / "run_pa.sh")
    assert launch(weights, script=link).argv[0] == str(REPO / "main.py")


@pytest.mark.parametrize("path", ["no such folder", "", "a file"])
def test_missing_weights_are_named_before_anything_starts(launch, tmp_path: Path, path: str):
    (tmp_path / "a file").touch()
    call = launch(path, PYTHON="/no/such/python", ASCEND_RT_VISIBLE_DEVICES="0,1")
    assert (call.program, call.status) == ("", 1)
    assert f"weight path '{path}'" in call.stderr
    assert "WEIGHT_DIR" in call.stderr
    assert call.stderr.count("\n") == 1


def test_help_is_that_of_main_py(launch) -> None:
    call = launch("--help", ASCEND_RT_VISIBLE_DEVICES="0,1")
    assert call.program == "python"
    assert call.argv == [str(REPO / "main.py"), "--help"]


# --- launch.sh: devices, ranks, ports


@pytest.mark.parametrize("devices", ["3", "0,1", "4,5,6,7"])
def test_one_rank_per_device(launch, weights: Path, devices: str) -> None:
    call = launch(weights, "--max_output_length", "5", ASCEND_RT_VISIBLE_DEVICES=devices)
    num_devices = devices.count(",") + 1
    assert call.status == STUB_STATUS
    assert call.env["ASCEND_RT_VISIBLE_DEVICES"] == devices
    if num_devices == 1:
        assert call.program == "python"
        assert "OMP_NUM_THREADS" not in call.env
    else:
        assert call.program == "torchrun"
        assert option(call, "--nproc_per_node") == str(num_devices)
        assert 20014 <= int(option(call, "--master_port")) <= 20050
        assert 1 <= int(call.env["OMP_NUM_THREADS"]) <= max(1, (os.cpu_count() or 1) // num_devices)
    main = call.argv.index(str(REPO / "main.py"))
    assert call.argv[main + 1 :] == [*PAGED, str(weights), "--max_output_length", "5"]


def test_no_device_list_is_invented(launch, weights: Path) -> None:
    call = launch(weights)
    assert call.program == "python"
    assert "ASCEND_RT_VISIBLE_DEVICES" not in call.env
    assert "INF_NAN_MODE_ENABLE" not in call.env
    assert (call.env["BIND_CPU"], call.env["IS_QUANT"]) == ("1", "0")
    assert 20014 <= int(call.env["MASTER_PORT"]) <= 20050


def test_what_the_user_exported_wins(launch, weights: Path) -> None:
    exported = {
        "ASCEND_RT_VISIBLE_DEVICES": "6,7",
        "MASTER_PORT": "20031",
        "BIND_CPU": "0",
        "IS_QUANT": "1",
        "INF_NAN_MODE_ENABLE": "1",
        "OMP_NUM_THREADS": "3",
        "TP_WORLD_SIZE": "2",
    }
    call = launch(weights, **exported)
    assert call.program == "torchrun"
    assert option(call, "--master_port") == "20031"
    assert {name: call.env[name] for name in exported} == exported


def test_tp_world_size_1_needs_no_torchrun(launch, weights: Path) -> None:
    call = launch(weights, TP_WORLD_SIZE="1", ASCEND_RT_VISIBLE_DEVICES="4,5")
    assert call.program == "python"


def test_tp_world_size_without_device_list(launch, weights: Path) -> None:
    call = launch(weights, TP_WORLD_SIZE="2")
    assert call.program == "torchrun"
    assert option(call, "--nproc_per_node") == "2"


@pytest.mark.parametrize(
    "devices", ["", "0,,1", "0,1,", ",0", "a", "0, 1", "0 1", "-1", "01", "1,1"]
)
def test_bad_device_list_is_shown(launch, weights: Path, devices: str) -> None:
    call = launch(weights, ASCEND_RT_VISIBLE_DEVICES=devices, PYTHON="/no/such/python")
    assert (call.program, call.status) == ("", 2)
    assert f"ASCEND_RT_VISIBLE_DEVICES='{devices}'" in call.stderr
    assert call.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"TP_WORLD_SIZE": "0"}, ["TP_WORLD_SIZE='0'"]),
        ({"TP_WORLD_SIZE": "two"}, ["TP_WORLD_SIZE='two'"]),
        (
            {"TP_WORLD_SIZE": "4", "ASCEND_RT_VISIBLE_DEVICES": "2,3"},
            ["TP_WORLD_SIZE=4", "ASCEND_RT_VISIBLE_DEVICES=2,3"],
        ),
        ({"MASTER_PORT": "0"}, ["MASTER_PORT='0'"]),
        ({"MASTER_PORT": "65536"}, ["MASTER_PORT='65536'"]),
        ({"NNODES": "x"}, ["NNODES='x'"]),
        ({"NNODES": "2", "NODE_RANK": "0"}, ["MASTER_ADDR"]),
        ({"NNODES": "2", "MASTER_ADDR": "h"}, ["NODE_RANK"]),
        ({"NNODES": "2", "MASTER_ADDR": "h", "NODE_RANK": "2"}, ["NODE_RANK", "'2'"]),
    ],
)
def test_wrong_settings(launch, weights: Path, env: dict[str, str], named: list[str]) -> None:
    call = launch(weights, **env)
    assert (call.program, call.status) == ("", 2)
    assert all(name in call.stderr for name in named), call.stderr
    assert call.stderr.count("\n") == 1


def test_several_hosts(launch, weights: Path) -> None:
    env = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host0", "TP_WORLD_SIZE": "1"}
    call = launch(weights, **env)
    assert call.program == "torchrun"
    assert [option(call, "--nnodes"), option(call, "--node_rank")] == ["2", "1"]
    assert option(call, "--master_addr") == "host0"
    assert option(call, "--master_port") == "20014"  # the same on every host, so not searched


def test_a_busy_port_is_passed_over(launch, weights: Path, busy_port: int) -> None:
    call = launch(weights, TP_WORLD_SIZE="2")
    assert busy_port < int(option(call, "--master_port")) <= 20050
    assert call.env["MASTER_PORT"] == option(call, "--master_port")


def test_two_jobs_started_at_once_get_two_ports(tmp_path: Path) -> None:
    take = f"source {shlex.quote(str(REPO / 'scripts/launch.sh'))}; read_launch_settings 20020; "
    nested = take + 'first=$MASTER_PORT; unset MASTER_PORT; exec bash -c "$1" - "$first"'
    second = take + 'echo "$1 $MASTER_PORT"'
    ports = subprocess.run(
        ["bash", "-euc", nested, "-", second],
        env=clean_environment() | {"TP_WORLD_SIZE": "2", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert len(set(ports)) == 2


@pytest.fixture
def hccl_base() -> Iterator[int]:
    """First of 16 ports, of which the fifth is listened on at an address that is not 127.0.0.1."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.2", 0))
        listener.listen()
        yield listener.getsockname()[1] - 4


def test_busy_hccl_ports_are_named(launch, weights: Path, hccl_base: int) -> None:
    base = str(hccl_base)
    call = launch(weights, ASCEND_RT_VISIBLE_DEVICES="0,1", HCCL_IF_BASE_PORT=base)
    assert call.status == 1
    assert f"port {hccl_base + 4}, one of HCCL's 16 from {base} on, is taken" in call.stderr
    assert "type: export HCCL_IF_BASE_PORT=" in call.stderr
    assert not call.program, "nothing has started"
    free = call.stderr.strip().rsplit("=", 1)[1]
    call = launch(weights, ASCEND_RT_VISIBLE_DEVICES="0,1", HCCL_IF_BASE_PORT=free)
    assert (call.program, call.env["HCCL_IF_BASE_PORT"]) == ("torchrun", free)
    span = {"HCCL_HOST_SOCKET_PORT_RANGE": "60000-60050", "HCCL_IF_BASE_PORT": base}
    assert launch(weights, ASCEND_RT_VISIBLE_DEVICES="0,1", **span).program == "torchrun"
    assert launch(weights, ASCEND_RT_VISIBLE_DEVICES="0", HCCL_IF_BASE_PORT=base).program
    wrong = launch(weights, ASCEND_RT_VISIBLE_DEVICES="0,1", HCCL_IF_BASE_PORT="80")
    assert wrong.status == 2
    assert "HCCL_IF_BASE_PORT='80'" in wrong.stderr


def test_default_hccl_ports_step_aside(launch, weights: Path) -> None:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.2", 60007))
            listener.listen()
        except OSError:
            pass  # taken it is
        call = launch(weights, ASCEND_RT_VISIBLE_DEVICES="0,1")
    assert call.program == "torchrun"
    assert int(call.env["HCCL_IF_BASE_PORT"]) % 16 == 60000 % 16
    assert int(call.env["HCCL_IF_BASE_PORT"]) > 60000


@pytest.fixture
def torch_folder(tmp_path: Path, stubs: Path) -> Path:
    """An aarch64 machine whose torch brings a libgomp of its own."""
    write_program(stubs / "uname", "echo aarch64")
    folder = tmp_path / "site"
    (folder / "torch").mkdir(parents=True)
    (folder / "torch/__init__.py").touch()
    (folder / "torch.libs").mkdir()
    (folder / "torch.libs/libgomp-d22c30c5.so.1.0.0").touch()
    return folder


def test_libgomp_of_torch_is_loaded_first_on_aarch64(launch, weights, stubs, torch_folder) -> None:
    library = str(torch_folder / "torch.libs/libgomp-d22c30c5.so.1.0.0")
    env = {"PYTHONPATH": str(torch_folder)}
    assert launch(weights, **env).env["LD_PRELOAD"] == library
    assert launch(weights, LD_PRELOAD="/x/other.so", **env).env["LD_PRELOAD"] == (
        f"{library}:/x/other.so"
    )
    mine = "/x/libgomp.so.1"
    assert launch(weights, LD_PRELOAD=mine, **env).env["LD_PRELOAD"] == mine
    (torch_folder / "torch.libs/libgomp-d22c30c5.so.1.0.0").unlink()
    write_program(stubs / "ldconfig", "echo '\tlibgomp.so.1 (libc6,AArch64) => /y/libgomp.so.1'")
    assert launch(weights, **env).env["LD_PRELOAD"] == "/y/libgomp.so.1"
    write_program(stubs / "uname", "echo x86_64")
    assert "LD_PRELOAD" not in launch(weights, **env).env


@pytest.mark.parametrize(("chip", "mode"), [("310P3", "0"), ("910B3", None)])
def test_overflow_mode_follows_the_chip(launch, weights: Path, stubs: Path, chip: str, mode):
    write_program(stubs / "npu-smi", f"echo '| 0       {chip}           | OK |'")
    assert launch(weights).env.get("INF_NAN_MODE_ENABLE") == mode
    assert launch(weights, INF_NAN_MODE_ENABLE="1").env["INF_NAN_MODE_ENABLE"] == "1"


# --- env.sh: which interpreter, which torchrun


def test_torchrun_variable_wins(launch, weights: Path, tmp_path: Path) -> None:
    mine = recording_stub(tmp_path / "mine", "my-torchrun")
    assert launch(weights, TP_WORLD_SIZE="2", TORCHRUN=str(mine)).program == "my-torchrun"


def test_torchrun_of_another_python_is_passed_over(launch, weights: Path, tmp_path: Path) -> None:
    write_program(tmp_path / "other" / "python3", "exit 1")
    write_program(tmp_path / "other" / "torchrun", "exit 99")
    python = recording_stub(tmp_path / "alone", "python")
    path = f"{tmp_path / 'other'}:{os.environ['PATH']}"
    call = launch(weights, TP_WORLD_SIZE="2", PYTHON=str(python), PATH=path)
    assert call.program == "python"
    assert call.argv[:2] == ["-m", "torch.distributed.run"]


def test_console_script_of_another_python_is_passed_over(launch, weights, stubs, tmp_path) -> None:
    script = write_program(tmp_path / "other" / "torchrun", "")
    script.write_text("#!/opt/other/bin/python3.11\nimport sys\n")
    python = recording_stub(tmp_path / "alone", "python")
    (stubs / "torchrun").unlink()
    path = f"{script.parent}:{stubs}:{os.environ['PATH']}"
    call = launch(weights, TP_WORLD_SIZE="2", PYTHON=str(python), PATH=path)
    assert call.argv[:2] == ["-m", "torch.distributed.run"]


def test_a_chosen_python_that_lacks_packages_is_refused(launch, weights, tmp_path) -> None:
    bare = write_program(tmp_path / "bare", f'exec {shlex.quote(sys.executable)} -S "$@"')
    call = launch(weights, PYTHON=str(bare))
    assert (call.program, call.status) == ("", 1)
    assert re.search(r"PYTHON=\S*bare lacks torch>=\S+ transformers>=5,<6", call.stderr)
    assert call.stderr.count("\n") == 1


class Checkout:
    """A copy of what env.sh needs, with an interpreter on PATH that lacks every package."""

    def __init__(self, root: Path) -> None:
        """Copy the files; .venv/bin/python is a stub whose pip only counts its calls."""
        self.root = root
        (root / "scripts").mkdir(parents=True)
        for name in ["scripts/env.sh", "constraints.txt", "pyproject.toml"]:
            shutil.copy(REPO / name, root / name)
        shutil.copy(REPO / "scripts" / "lock.sh", root / "scripts")
        self.real = shlex.quote(sys.executable)
        venv, made = shlex.quote(str(root / ".venv")), shlex.quote(str(root / "made"))
        write_program(
            root / "bin" / "python3",
            f'if [[ $* != "-m venv"* ]]; then exec {self.real} -S "$@"; fi\n'
            f"rm -rf {venv}; cp -r {made} {venv}",
        )
        write_program(root / "bin" / "python", "exit 1")
        self.note = root / ".venv" / ".gptneox-ascend"
        self.pip_calls = root / "pip-calls"
        self.pip_calls.touch()

    def add_venv(self, pip_status: int = 0, options: str = "") -> None:
        """A .venv that passes for complete, unless its note says otherwise."""
        self.set_made(pip_status, options)
        shutil.copytree(self.root / "made", self.root / ".venv", dirs_exist_ok=True)

    def set_made(self, pip_status: int = 0, options: str = "") -> None:
        """What `python3 -m venv` makes here."""
        calls = shlex.quote(str(self.pip_calls))
        write_program(
            self.root / "made" / "bin" / "python",
            f'if [[ $1 == -c ]]; then exec {self.real} {options} "$@"; fi\n'
            '[[ $2 != gptneox.* ]] || { echo "$PWD runs $2" >&2; exit 3; }\n'
            "[[ $3 == install ]] || exit 0\n"
            f'printf "%s " "$@" >>{calls}; printf "\\n" >>{calls}\n'
            f'echo "ERROR: no network"; exit {pip_status}',
        )

    def source(self, word: str = "runtime", **env: str) -> subprocess.CompletedProcess[str]:
        """Source env.sh as a launcher does; stdout is PYTHON."""
        path = f"{self.root / 'bin'}:{os.environ['PATH']}"
        script = f'set -euo pipefail; source "$0" {word}; echo "$PYTHON"'
        return subprocess.run(
            ["bash", "-c", script, self.root / "scripts" / "env.sh"],
            env=clean_environment() | {"PATH": path} | env,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "a checkout")


def test_the_active_interpreter_is_used_untouched(checkout: Checkout) -> None:
    python = recording_stub(checkout.root / "bin", "python3")
    checkout.add_venv()
    done = checkout.source()
    assert (done.stdout, done.stderr, done.returncode) == (f"{python}\n", "", 0)
    assert not checkout.pip_calls.read_text()
    assert not (checkout.root / ".venv.lock").exists()


def test_an_environment_made_by_the_user_is_used_untouched(checkout: Checkout) -> None:
    checkout.add_venv()
    assert checkout.source("dev").stdout == f"{checkout.root}/.venv/bin/python\n"
    assert not checkout.pip_calls.read_text()
    assert not checkout.note.exists()


@pytest.mark.parametrize("there_is", ["nothing", "an interrupted one", "a broken one"])
def test_an_environment_is_made_once(checkout: Checkout, there_is: str) -> None:
    checkout.set_made()
    left_over = checkout.root / ".venv" / "lib" / "left over"
    if there_is != "nothing":
        checkout.add_venv()
        left_over.parent.mkdir()
        left_over.touch()
        checkout.note.write_text("incomplete\n")
    if there_is == "a broken one":
        (checkout.root / ".venv" / "bin" / "python").unlink()
    done = checkout.source()
    assert done.returncode == 0, done.stderr
    assert "setting up" in done.stderr
    assert "transformers>=5,<6" in checkout.pip_calls.read_text()
    assert "ruff" not in checkout.pip_calls.read_text()
    assert not left_over.exists()
    # compiled ahead of the first run, which goes on without
    assert f"{checkout.root} runs gptneox.backends.cpu_build\n" in done.stderr

    assert checkout.source().stderr == ""
    assert len(checkout.pip_calls.read_text().splitlines()) == 1


@pytest.mark.parametrize("there_is", ["an unfinished one", "a broken one", "files", "a file"])
def test_an_environment_of_the_user_is_never_changed(checkout: Checkout, there_is: str) -> None:
    """Neither emptied nor filled: their versions are theirs."""
    venv = checkout.root / ".venv"
    if there_is == "a file":
        checkout.set_made()
        venv.write_text("see ~/envs\n")
    else:
        checkout.add_venv(options="-S")
        (venv / "notes.txt").write_text("mine")
        if there_is != "an unfinished one":
            (venv / "bin" / "python").unlink()
        if there_is == "files":
            (venv / "bin").rmdir()
    before = sorted(venv.rglob("*"))
    done = checkout.source()
    assert (done.stdout, done.returncode) == ("", 1)
    lacking = r"torch>=\S+ .*" if there_is == "an unfinished one" else "a working interpreter"
    assert re.search(rf"\.venv was not made by .* it lacks {lacking}; install", done.stderr)
    assert done.stderr.count("\n") == 1
    assert not checkout.pip_calls.read_text()
    assert sorted(venv.rglob("*")) == before
    assert not checkout.note.exists()


def test_an_empty_folder_becomes_the_environment(checkout: Checkout) -> None:
    checkout.set_made()
    (checkout.root / ".venv").mkdir()
    assert checkout.source().returncode == 0
    assert checkout.note.exists()


def test_an_environment_that_was_killed_while_it_was_made_is_ours(checkout: Checkout) -> None:
    """Before pip came to it."""
    checkout.set_made()
    python = checkout.root / "bin" / "python3"
    script = python.read_text()
    python.write_text(script.replace("rm -rf", "exit 137; rm -rf"))
    assert checkout.source().returncode == 1
    (checkout.root / ".venv" / "half").touch()
    python.write_text(script.replace("rm -rf", "[[ ! -e $4/half ]] || exit 9; rm -rf"))
    assert checkout.source().returncode == 0


# --- locks


@pytest.fixture
def without_locks(tmp_path: Path) -> str:
    """A PATH whose flock fails as on a network file system without locks."""
    folder = tmp_path / "no locks"
    write_program(folder / "flock", 'echo "flock: $2: Function not implemented" >&2; exit 71')
    return f"{folder}:{os.environ['PATH']}"


def test_without_locks_an_environment_is_made(checkout: Checkout, without_locks: str) -> None:
    """Not waited for in vain: there is no other launcher."""
    checkout.set_made()
    path = f"{checkout.root / 'bin'}:{without_locks}"
    done = checkout.source(PATH=path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no file locks in") == 1
    assert f"{checkout.root} (Function not implemented)" in done.stderr
    assert "waiting" not in done.stderr


def test_without_locks_the_first_port_is_taken(
    launch, weights: Path, stubs: Path, without_locks: str
) -> None:
    call = launch(weights, TP_WORLD_SIZE="2", PATH=f"{stubs}:{without_locks}")
    assert call.status == STUB_STATUS
    assert call.stderr.count("no file locks in") == 1
    assert 20014 <= int(option(call, "--master_port")) <= 20050
    assert "no file locks" not in launch(weights, TP_WORLD_SIZE="2").stderr


def note_of_today(checkout: Checkout) -> str:
    """What env.sh notes for a complete environment."""
    checkout.set_made()
    assert checkout.source().returncode == 0
    checkout.pip_calls.write_text("")
    return checkout.note.read_text()


def test_the_tools_of_a_developer_are_added(checkout: Checkout) -> None:
    note = note_of_today(checkout)
    assert checkout.source("dev").returncode == 0
    assert "ruff==" in checkout.pip_calls.read_text()
    assert checkout.note.read_text() == note.replace("runtime", "dev")
    assert checkout.source("runtime").stderr == ""  # dev includes it


def test_an_outdated_environment_is_brought_up_to_date(checkout: Checkout) -> None:
    note = note_of_today(checkout)
    with (checkout.root / "constraints.txt").open("a") as file:
        file.write("one-more==1.0\n")
    assert checkout.source().returncode == 0
    assert len(checkout.pip_calls.read_text().splitlines()) == 1
    assert checkout.note.read_text() != note


def test_a_note_is_not_trusted_when_packages_are_gone(checkout: Checkout) -> None:
    note = note_of_today(checkout)
    checkout.add_venv(options="-S")
    checkout.note.write_text(note)
    done = checkout.source()
    assert len(checkout.pip_calls.read_text().splitlines()) == 1
    assert done.returncode == 1  # this pip put nothing there
    assert "remove .venv" in done.stderr


def test_a_failed_installation_is_one_line_and_leaves_no_note(checkout: Checkout) -> None:
    checkout.set_made(pip_status=1)
    done = checkout.source()
    assert (done.stdout, done.returncode) == ("", 1)
    assert "no network" in done.stderr.splitlines()[-1]
    assert "set PYTHON" in done.stderr.splitlines()[-1]
    assert checkout.note.read_text() == "incomplete\n"


def test_a_container_with_torch_npu_gets_no_environment_beside_it(checkout: Checkout) -> None:
    packages = checkout.root / "packages"
    for name, version in {
        "torch_npu": "2.13.0",
        "torch": "2.13.0",
        "transformers": "4.30.2",
    }.items():
        (packages / name).mkdir(parents=True)
        (packages / name / "__init__.py").touch()
        info = packages / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    done = checkout.source(PYTHONPATH=str(packages))
    assert (done.stdout, done.returncode) == ("", 1)
    assert "pip install 'transformers>=5,<6' 'safetensors'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not checkout.pip_calls.read_text()


def test_requirements_are_read_as_pyproject_means_them() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    script = 'source "$0" runtime; env_requirements dependencies; echo; env_requirements dev'
    done = subprocess.run(
        ["bash", "-c", script, REPO / "scripts" / "env.sh"],
        env=clean_environment() | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )
    dependencies, dev = done.stdout.split("\n\n")
    assert dependencies.split() == project["dependencies"]
    assert dev.split() == project["optional-dependencies"]["dev"]


def test_every_requirement_is_pinned() -> None:
    pins = (REPO / "constraints.txt").read_text().lower().replace("-", "_")
    text = (REPO / "pyproject.toml").read_text()
    for exact in re.findall(r'"([\w.-]+==[\w.]+)"', text):
        assert f"\n{exact.lower().replace('-', '_')}\n" in pins
    for name in ["torch", "transformers", "safetensors", "sentencepiece", "hypothesis"]:
        assert f"\n{name}==" in pins


# --- run_tests.sh


@pytest.mark.parametrize("left", ["", "weights/mini/part_model/", "notes.txt", "config.ini"])
def test_what_the_tests_leave_is_a_failure(left: str, tmp_path: Path) -> None:
    """Also an empty folder and a changed file, whatever git ignores."""
    root = tmp_path / "a checkout"
    shutil.copytree(REPO / "scripts", root / "scripts")
    (root / "tests").mkdir()
    for name in ("tests/run_tests.sh", "constraints.txt", "pyproject.toml", "config.ini"):
        shutil.copy(REPO / name, root / name)
    (root / "gptneox").symlink_to(REPO / "gptneox")
    leave = f"mkdir -p {left}" if left.endswith("/") else f"echo >>{left or '/dev/null'}"
    write_program(tmp_path / "bin" / "shellcheck", "")
    python = write_program(
        tmp_path / "bin" / "python",
        'if [[ ${2-} == *get_path* ]]; then dirname "$0"; exit; fi\n'
        f'if [[ $1 == -c ]]; then exec {shlex.quote(sys.executable)} "$@"; fi\n'
        f"if [[ $2 == pytest ]]; then mkdir .pytest_cache; {leave}; fi",
    )
    done = subprocess.run(
        ["bash", root / "tests" / "run_tests.sh"],
        env=clean_environment() | {"PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (1 if left else 0), done.stdout + done.stderr
    verdict = next(line for line in done.stdout.splitlines() if line.startswith("tree "))
    assert ("FAILED" in verdict) == bool(left)
    assert f"> ./{left}" in done.stdout or not left
