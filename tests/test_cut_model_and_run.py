# SPDX-License-Identifier: Apache-2.0
"""cut_model_and_run.sh with stubs in place of Python and torchrun: nothing is cut or loaded."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.processes import REPO, STUB_STATUS, clean_environment, recording_stub, write_program

from gptneox.config.settings import ModelSection
from gptneox.files import UNFINISHED
from gptneox.launch import Cut

SCRIPT = REPO / "cut_model_and_run.sh"
CUT = "The gpt-neox-20b part model is not exists, Now begin to cut ..."
RUN = f"{'*' * 22}The gpt-neox-20b part model exists, Now begin to run ...{'*' * 22}"
OURS = ("input_dir", "output_dir", "world_size_")
# What the launcher sets off a 310P; None: 0 in a container, else 1.
SWITCHES = {
    "PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:2048",
    "ATB_LAUNCH_KERNEL_WITH_TILING": "1",
    "ATB_LAYER_INTERNAL_TENSOR_REUSE": "1",
    "ATB_OPERATION_EXECUTE_ASYNC": None,
    "TASK_QUEUE_ENABLE": None,
    "HCCL_OP_BASE_FFTS_MODE_ENABLE": "1",
    "HCCL_BUFFSIZE": "110",
    "ATB_USE_TILING_COPY_STREAM": "0",
}
IN_CONTAINER = Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()


@dataclass
class Run:
    """What the launcher started, and how it ended."""

    program: str  # that main.py was started with; "" when it was not
    argv: list[str]
    env: dict[str, str]
    cwd: str
    cuts: list[list[str]]  # the arguments of each call of cut_model_util.py, in order
    status: int
    out: str
    err: str

    @property
    def main_arguments(self) -> list[str]:
        return self.argv[[Path(a).name for a in self.argv].index("main.py") + 1 :]

    def option(self, name: str) -> str:
        return self.argv[self.argv.index(name) + 1]


def python_stub(folder: Path) -> Path:
    """A Python that records main.py, answers for the cut, and really runs launch.py."""
    recorder = recording_stub(folder, "python-recorder")
    real = shlex.quote(sys.executable)
    return write_program(
        folder / "python",
        f'if [[ ${{1-}} == -c || ${{1-}} == */launch.py ]]; then exec {real} "$@"; fi\n'
        "if [[ ${1-} == */cut_model_util.py ]]; then\n"
        '  printf "%s\\0" "${@:2}" "" >>"$CUTS"\n'
        '  printf "%s" "${CUT_SAYS-}"\n'
        '  if [[ ${CUT_STATUS-0} == 0 && " $* " != *" --check "* ]]; then\n'
        '    mkdir -p "$5" && touch "$5/manifest.json"\n'
        "  fi\n"
        '  exit "${CUT_STATUS-0}"\n'
        "fi\n"
        f'exec {shlex.quote(str(recorder))} "$@"',
    )


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    python_stub(folder)
    recording_stub(folder, "torchrun")
    write_program(folder / "npu-smi", "exit 1")  # not the machine's own
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A weight folder whose name has blanks and characters beyond ASCII; there is no cut yet."""
    folder = tmp_path / "my weights 权重 é"
    folder.mkdir()
    return folder


@pytest.fixture
def start(tmp_path: Path, stubs: Path, model: Path) -> Callable[..., Run]:
    """Runs the launcher for `model`, unless input_dir says otherwise (None: is not set)."""

    def run(*arguments: str, script: Path = SCRIPT, cwd: Path = tmp_path, **env: str | None) -> Run:
        record, cuts = tmp_path / "record.json", tmp_path / "cuts"
        record.unlink(missing_ok=True)
        cuts.write_bytes(b"")
        environment = {
            name: value
            for name, value in clean_environment().items()
            if name not in (*SWITCHES, *OURS, "BACKEND")
        }
        environment |= {
            "PATH": f"{stubs}:{os.environ['PATH']}",
            "PYTHON": str(stubs / "python"),
            "TMPDIR": str(tmp_path),
            "RECORD": str(record),
            "CUTS": str(cuts),
            "input_dir": str(model),
        }
        given = {k: v for k, v in (environment | env).items() if v is not None}
        done = subprocess.run(
            ["bash", script, *arguments],
            cwd=cwd,
            env=given,
            capture_output=True,
            text=True,
            check=False,
        )
        seen: dict[str, Any] = {"program": "", "argv": [], "env": {}, "cwd": ""}
        if record.exists():
            seen = json.loads(record.read_text())
        calls = cuts.read_text().split("\0\0")[:-1]
        return Run(
            **seen,
            cuts=[call.split("\0") for call in calls],
            status=done.returncode,
            out=done.stdout,
            err=done.stderr,
        )

    return run


def cut_arguments(model: Path, *more: str, world_size: int = 2, parts: Path | None = None):
    output = str(parts or model / "part_model")
    sizes = ["--world_size", str(world_size)]
    return ["--input_path", str(model), "--output_path", output, *sizes, *more]


def with_parts(model: Path) -> Path:
    (model / "part_model").mkdir()
    (model / "part_model" / "manifest.json").touch()
    return model


# -- cut, then run -------------------------------------------------------------------------------


def test_first_call_only_cuts(start: Callable[..., Run], model: Path) -> None:
    """As upstream: the first call cuts and stops, the second runs."""
    first = start()
    assert (first.program, first.status) == ("", 0)
    assert first.cuts == [cut_arguments(model)]
    assert first.out.splitlines() == [CUT, f"Next: bash {SCRIPT} inference"]
    second = start()
    assert second.cuts == [cut_arguments(model, "--check")]
    assert second.out.splitlines() == [RUN]
    assert second.program == "torchrun"
    assert second.main_arguments[:2] == ["--task", "inference"]
    assert second.status == STUB_STATUS


@pytest.mark.parametrize("task", ["inference", "precision", "performance"])
def test_a_task_cuts_and_runs(task: str, start: Callable[..., Run], model: Path) -> None:
    """One call is enough; options are passed on as they are, and so is the exit status."""
    options = ["--input_texts", "two words", "", "*", "日本 $HOME", "--debug"]
    call = start(task, *options)
    assert call.cuts == [cut_arguments(model)]
    assert call.out.splitlines() == [CUT, RUN]
    assert call.program == "torchrun"
    assert call.option("--nproc_per_node") == "2"
    assert 20001 <= int(call.option("--master_port")) <= 20050
    assert call.main_arguments == [
        *("--task", task, "--auto_attention", "flash"),
        *(*options, "--model_path", str(model)),
    ]
    assert call.status == STUB_STATUS
    assert call.err == ""


def test_a_complete_cut_is_used(start: Callable[..., Run], model: Path, tmp_path: Path) -> None:
    call = start("inference", cwd=with_parts(model))
    assert call.cuts == [cut_arguments(model, "--check")]
    assert call.out.splitlines() == [RUN]
    assert (call.program, call.status) == ("torchrun", STUB_STATUS)
    assert call.cwd == str(model)


@pytest.mark.parametrize("task", [(), ("inference",)])
def test_a_cut_that_does_not_fit_is_never_run(
    task: tuple[str, ...], start: Callable[..., Run], model: Path
) -> None:
    """Half of one, or one of another model: the reason, the remedy, and nothing else."""
    with_parts(model)
    call = start(*task, CUT_STATUS="3", CUT_SAYS="it is half a cut")
    assert (call.program, call.status) == ("", 1)
    assert call.cuts == [cut_arguments(model, "--check")]
    remedy = f"to replace it: bash {SCRIPT} --recut {' '.join(task)}"
    assert call.err.strip() == f"cut_model_and_run.sh: it is half a cut; {remedy}".strip()
    assert call.out == ""
    silent = start(*task, CUT_STATUS="1")
    assert (silent.program, silent.status) == ("", 1)
    assert f"{model}/part_model cannot be checked" in silent.err
    foreign = start(*task, CUT_STATUS="1", CUT_SAYS="it is somebody's folder")
    assert foreign.err == "cut_model_and_run.sh: it is somebody's folder\n"


@pytest.mark.parametrize("left", ["an empty folder", "an interrupted cut", "an empty disk"])
def test_where_nothing_is_yet_a_cut_is_made(
    left: str, start: Callable[..., Run], model: Path, tmp_path: Path
) -> None:
    parts = model / "part_model"
    if left == "an empty disk":
        (tmp_path / "-a disk").mkdir()
        parts.symlink_to(tmp_path / "-a disk")
    else:
        parts.mkdir()
    if left == "an interrupted cut":
        (parts / UNFINISHED / "new" / "0").mkdir(parents=True)
    call = start("inference")
    assert call.cuts == [cut_arguments(model)]
    assert call.out.splitlines() == [CUT, RUN]
    assert call.option("--model_path") == str(model)
    (parts / "notes.txt").touch()
    assert start("inference").cuts == [cut_arguments(model, "--check")]


def test_recut(start: Callable[..., Run], model: Path) -> None:
    with_parts(model)
    call = start("--recut")
    assert call.cuts == [cut_arguments(model, "--recut")]
    assert (call.program, call.status) == ("", 0)
    call = start("--recut", "precision", "--debug")
    assert call.cuts == [cut_arguments(model, "--recut")]
    assert call.out.splitlines() == [CUT, RUN]
    assert call.main_arguments[1] == "precision"
    assert "--debug" in call.main_arguments


@pytest.mark.parametrize("arguments", [(), ("inference",), ("--recut", "inference")])
def test_a_cut_that_fails_is_the_end(arguments: tuple[str, ...], start: Callable[..., Run]) -> None:
    call = start(*arguments, CUT_STATUS="5")
    assert (call.program, call.status) == ("", 5)
    assert RUN not in call.out
    assert "Next:" not in call.out


def test_ctrl_c_ends_the_cut_with_its_own_words(stubs: Path, model: Path, tmp_path: Path) -> None:
    """The launcher waits for the end of the cut, which removes what it has written."""
    cut = (
        "import pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1], 'cutting').touch()\n"
        "try:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(1)\n    sys.exit(print('removed') or 130)\n"
    )
    real, code = shlex.quote(sys.executable), shlex.quote(cut)
    python = write_program(
        stubs / "python",
        f"if [[ ${{1-}} == */cut_model_util.py ]]; then exec {real} -c {code} {tmp_path}; fi\n"
        f'exec {real} "$@"',
    )
    process = subprocess.Popen(
        ["bash", SCRIPT, "inference"],
        env=clean_environment() | {"PYTHON": str(python), "input_dir": str(model)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "cutting").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30)[0].splitlines() == [CUT, "removed"]
    assert process.returncode == 130


@pytest.mark.parametrize("word", ["infer", "--max_output_length", "performance2", "2"])
def test_what_is_no_task(word: str, start: Callable[..., Run]) -> None:
    call = start(word, PYTHON="/no/such/python")
    assert (call.program, call.status, call.cuts) == ("", 2, [])
    assert f"'{word}' is no task; use inference, precision or performance" in call.err
    assert call.err.count("\n") == 1


def test_help(start: Callable[..., Run]) -> None:
    for word in ("--help", "-h"):
        call = start(word, PYTHON="/no/such/python")
        assert (call.status, call.cuts, call.err) == (0, [], "")
        assert "bash cut_model_and_run.sh TASK [options]" in call.out
        assert "\n  world_size_: parts; else" in call.out
        assert "pipefail" not in call.out


# -- which weights, where, in how many parts -----------------------------------------------------


def test_part_model_itself_may_be_named(start: Callable[..., Run], model: Path) -> None:
    call = start("inference", input_dir=str(with_parts(model) / "part_model"))
    assert call.cuts == [cut_arguments(model, "--check")]
    assert call.option("--model_path") == str(model)


def test_parts_elsewhere_are_what_runs(
    start: Callable[..., Run], model: Path, tmp_path: Path
) -> None:
    """Not the parts beside the weights, which may be of another number of ranks."""
    with_parts(model)
    parts = tmp_path / "else where" / "parts é"
    call = start("inference", output_dir=str(parts))
    assert call.cuts == [cut_arguments(model, parts=parts)]
    assert call.option("--model_path") == str(parts)
    relative = start("inference", output_dir=parts.name, cwd=parts.parent)
    assert relative.cuts == [cut_arguments(model, "--check", parts=Path(parts.name))]
    assert relative.option("--model_path") == str(parts)


def test_relative_paths_are_those_of_the_caller(start: Callable[..., Run], model: Path) -> None:
    call = start("inference", input_dir=f"../{model.name}/", cwd=model)
    assert call.cuts == [cut_arguments(model)]


@pytest.mark.parametrize(("named", "added"), [("owner/name", ["--revision", ""]), ("", [])])
def test_a_revision_is_for_an_id_on_a_hub_alone(
    named: str, added: list[str], tmp_path: Path
) -> None:
    """The run gets a folder, for which main.py refuses a revision."""
    model = ModelSection(model_path=named or str(tmp_path), revision="v1")
    cut = Cut(str(tmp_path), str(tmp_path / "parts"), 2, False, {}, model)
    assert cut.model_options == ["--model_path", str(tmp_path / "parts"), *added]


@pytest.mark.parametrize("path", ["no such folder", "a file"])
def test_missing_weights_are_named(path: str, start: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    call = start("inference", input_dir=path)
    assert (call.program, call.status, call.cuts) == ("", 2, [])
    assert f"input_dir '{path}' is not a folder that exists" in call.err
    assert "config.ini" in call.err
    assert call.err.count("\n") == 1


def test_world_size(start: Callable[..., Run], model: Path) -> None:
    call = start("inference", world_size_="4")
    assert call.cuts == [cut_arguments(model, world_size=4)]
    assert call.option("--nproc_per_node") == "4"
    call = start("--recut", "inference", world_size_="1")
    assert call.program == "python-recorder"
    assert call.main_arguments[-2:] == ["--model_path", str(model)]


@pytest.mark.parametrize("world_size", ["0", "-2", "two", "2 ", "02", "99999"])
def test_world_size_that_is_none(world_size: str, start: Callable[..., Run]) -> None:
    call = start("inference", world_size_=world_size)
    assert (call.program, call.status, call.cuts) == ("", 2, [])
    assert f"world_size_='{world_size}'" in call.err
    assert call.err.count("\n") == 1


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"ASCEND_RT_VISIBLE_DEVICES": "3"}, "ASCEND_RT_VISIBLE_DEVICES=3"),
        ({"ASCEND_RT_VISIBLE_DEVICES": "0,1,2"}, "ASCEND_RT_VISIBLE_DEVICES=0,1,2"),
        ({"ASCEND_RT_VISIBLE_DEVICES": "0,,1"}, "ASCEND_RT_VISIBLE_DEVICES='0,,1'"),
        ({"ASCEND_RT_VISIBLE_DEVICES": "a"}, "ASCEND_RT_VISIBLE_DEVICES='a'"),
        ({"ASCEND_RT_VISIBLE_DEVICES": ""}, "ASCEND_RT_VISIBLE_DEVICES=''"),
        ({"TP_WORLD_SIZE": "4"}, "world_size_ is 2, but 4 ranks would start"),
        ({"TP_WORLD_SIZE": "x"}, "TP_WORLD_SIZE='x'"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT='x'"),
        ({"NNODES": "x"}, "NNODES='x'"),
        ({"NNODES": "0"}, "NNODES='0'"),
        ({"NNODES": "2"}, "MASTER_ADDR"),
        (
            {"NNODES": "2", "MASTER_ADDR": "h", "NODE_RANK": "0", "world_size_": "3"},
            "world_size_ is 3, but 2 ranks would start",
        ),
    ],
)
@pytest.mark.parametrize("is_cut", [True, False])
def test_wrong_settings_are_found_before_the_cut(
    env: dict[str, str], named: str, is_cut: bool, start: Callable[..., Run], model: Path
) -> None:
    """The message is one line and holds the list that was given."""
    if is_cut:
        with_parts(model)
    call = start("inference", **env)
    assert (call.program, call.status, call.cuts) == ("", 2, [])
    assert named in call.err
    assert call.err.count("\n") == 1


def test_cutting_alone_needs_no_devices(start: Callable[..., Run], model: Path) -> None:
    call = start(world_size_="8", ASCEND_RT_VISIBLE_DEVICES="0")
    assert call.status == 0
    assert call.cuts == [cut_arguments(model, world_size=8)]


def test_devices_that_agree(start: Callable[..., Run], model: Path) -> None:
    call = start("inference", ASCEND_RT_VISIBLE_DEVICES="4,5", MASTER_PORT="20033")
    assert call.option("--nproc_per_node") == "2"
    assert call.option("--master_port") == "20033"
    assert call.env["ASCEND_RT_VISIBLE_DEVICES"] == "4,5"


def test_several_hosts(start: Callable[..., Run], model: Path) -> None:
    """Each host starts its share of the ranks, on one port that all of them know."""
    env = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host0", "world_size_": "4"}
    call = start("inference", **env)
    assert call.cuts == [cut_arguments(model, world_size=4)]
    assert [call.option("--nnodes"), call.option("--node_rank")] == ["2", "1"]
    assert call.option("--nproc_per_node") == "2"
    assert call.option("--master_addr") == "host0"
    assert call.option("--master_port") == "20001"


# -- config.ini ----------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy whose config.ini a test may write."""
    root = tmp_path / "a checkout"
    shutil.copytree(REPO / "scripts", root / "scripts")
    shutil.copytree(
        REPO / "gptneox", root / "gptneox", ignore=shutil.ignore_patterns("__pycache__")
    )
    (root / "weights").symlink_to(REPO / "weights")
    names = ("cut_model_and_run.sh", "cut_model_util.py", "constraints.txt", "pyproject.toml")
    for name in names:
        shutil.copy(REPO / name, root / name)
    return root


def test_config_ini_says_what_and_how_many(start: Callable[..., Run], checkout: Path) -> None:
    """model_path is relative to the file; every device gets a part."""
    model = checkout / "my models" / "neox"
    model.mkdir(parents=True)
    ini = "[model]\nmodel_path = my models/neox ; ours\ndevice_ids = 0, 1, 2, 3\n"
    (checkout / "config.ini").write_text(ini)
    script = checkout / "cut_model_and_run.sh"
    call = start("inference", script=script, input_dir=None)
    assert call.cuts == [cut_arguments(model, world_size=4)]
    assert call.argv[-1] == str(model)
    other = start("inference", script=script, world_size_="2")
    assert other.cuts[0][1] != str(model)
    assert other.option("--nproc_per_node") == "2"


def test_without_config_ini_the_embedded_checkpoint(
    start: Callable[..., Run], checkout: Path
) -> None:
    # a cut that fails leaves nothing beside the weights of the repository
    call = start(script=checkout / "cut_model_and_run.sh", input_dir=None, CUT_STATUS="5")
    embedded = REPO / "weights" / "neox-mini"
    if embedded.is_dir():
        assert call.cuts == [cut_arguments(embedded, parts=embedded / "part_model")] or (
            call.cuts == [cut_arguments(embedded, "--check")]
        )
    else:
        assert call.status == 1
        assert f"input_dir '{embedded}' is not a folder" in call.err


def test_config_ini_that_cannot_be_read(start: Callable[..., Run], checkout: Path) -> None:
    (checkout / "config.ini").write_text("[model]\nmodel_pth = x\n")
    call = start("inference", script=checkout / "cut_model_and_run.sh")
    assert (call.program, call.status, call.cuts) == ("", 2, [])
    first, second = call.err.splitlines()
    assert "unknown model_pth" in first
    assert "config.ini cannot be read" in second


@pytest.mark.parametrize("spelling", ["--model_path MODEL", "--model-path=MODEL"])
def test_a_model_path_among_the_options_is_what_is_cut(
    spelling: str, start: Callable[..., Run], model: Path, tmp_path: Path
) -> None:
    """Flag before environment before config.ini; a relative one is the caller's."""
    other = tmp_path / "other"
    other.mkdir()
    options = [word.replace("MODEL", "other") for word in spelling.split()]
    call = start("inference", *options, cwd=tmp_path, input_dir=str(model))
    assert call.cuts == [cut_arguments(other)]
    assert call.main_arguments[-2:] == ["--model_path", str(other)]
    parts = tmp_path / "elsewhere"
    call = start("inference", *options, cwd=tmp_path, output_dir=str(parts))
    assert call.cuts == [cut_arguments(other, parts=parts)]
    assert call.main_arguments[-2:] == ["--model_path", str(parts)]


def test_a_config_among_the_options_is_read(
    start: Callable[..., Run], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.ini").write_text(
        f"[model]\nmodel_path = {model.name}\ndevice_ids = 0,1,2,3\n"
    )
    options = ("--config", "mine.ini")
    call = start("inference", *options, cwd=tmp_path, input_dir=None)
    assert call.cuts == [cut_arguments(model, world_size=4)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--max_output_lenght", "3"), "--max_output_lenght"),
        (("--model_path", ""), "it is empty; name one"),
        (("--config", "nowhere.ini"), "nowhere.ini does not exist"),
    ],
)
def test_wrong_options_are_found_before_the_cut(
    options: tuple[str, ...], named: str, start: Callable[..., Run]
) -> None:
    call = start("inference", *options)
    assert (call.program, call.status, call.cuts) == ("", 2, [])
    assert named in call.err


def test_help_among_the_options_cuts_nothing(start: Callable[..., Run]) -> None:
    call = start("inference", "--max_output_length", "3", "--help")
    assert (call.program, call.cuts) == ("python-recorder", [])
    assert call.main_arguments == ["--help"]


def test_settings_edited_in_the_script(
    start: Callable[..., Run], checkout: Path, model: Path
) -> None:
    """As upstream users do it; exported ones still win."""
    script = checkout / "cut_model_and_run.sh"
    text = script.read_text()
    edited = text.replace("world_size_:-}", "world_size_:-4}")
    edited = edited.replace("input_dir:-}", f"input_dir:-{model}}}", 1)
    assert edited.count("world_size_:-4") == 1
    script.write_text(edited)
    call = start("inference", script=script, input_dir=None)
    assert call.cuts == [cut_arguments(model, world_size=4)]
    call = start("--recut", "inference", script=script, world_size_="2", input_dir=None)
    assert call.cuts == [cut_arguments(model, "--recut")]


# -- switches of CANN and ATB --------------------------------------------------------------------


def expected_switches() -> dict[str, str]:
    queue = "0" if IN_CONTAINER else "1"
    return {name: queue if value is None else value for name, value in SWITCHES.items()}


@pytest.mark.parametrize(("chip", "stream"), [("310P3", "1"), ("910B4", "0"), ("", "0")])
def test_switches_follow_the_chip(
    chip: str, stream: str, start: Callable[..., Run], stubs: Path
) -> None:
    if chip:
        write_program(stubs / "npu-smi", f"echo '| 0       {chip}           | OK |'")
    env = start("inference").env
    expected = expected_switches() | {"ATB_USE_TILING_COPY_STREAM": stream}
    assert {name: env.get(name) for name in SWITCHES} == expected
    assert env.get("INF_NAN_MODE_ENABLE") == ("0" if chip == "310P3" else None)
    assert "BACKEND" not in env


@pytest.mark.parametrize("value", ["user", ""])
def test_switches_that_the_user_exported_win(
    value: str, start: Callable[..., Run], stubs: Path
) -> None:
    write_program(stubs / "npu-smi", "echo '| 0       310P3           | OK |'")
    env = start("inference", **dict.fromkeys(SWITCHES, value)).env
    assert {name: env[name] for name in SWITCHES} == dict.fromkeys(SWITCHES, value)


def test_lccl_is_refused_where_it_does_not_work(start: Callable[..., Run], stubs: Path) -> None:
    assert start("inference", BACKEND="lccl").env["BACKEND"] == "lccl"
    write_program(stubs / "npu-smi", "echo '| 0       310P3           | OK |'")
    call = start("inference", BACKEND="lccl")
    assert (call.program, call.status) == ("", 2)
    assert "BACKEND=lccl does not work on 300I DUO" in call.err


def test_the_paged_launcher_sets_none_of_them(start: Callable[..., Run], model: Path) -> None:
    call = start(str(model), script=REPO / "run_pa.sh")
    assert call.main_arguments[3] == "paged"
    assert not SWITCHES.keys() & call.env.keys()
