# SPDX-License-Identifier: Apache-2.0
"""gptneox/lifeline.py: nothing of a command outlives whoever wants it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.processes import REPO, clean_environ

from gptneox import lifeline

# A program that starts another one in a session of its own, and writes both numbers.
FAMILY = """
import os, subprocess, sys, signal, time
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
other = subprocess.Popen(sleep, start_new_session=True)
def end(number, frame):
    open({told!r}, "w").close()
    if {obeys}:
        sys.exit(5)
signal.signal(signal.SIGTERM, end)
with open({pids!r} + ".new", "w") as file:
    file.write(f"{{os.getpid()}} {{other.pid}}")
os.rename({pids!r} + ".new", {pids!r})
while True:
    time.sleep(0.05)
"""

# Orphans get less time than they have in earnest.
QUICK = """
import sys
from gptneox import lifeline
lifeline.PATIENCE_S = 0.3
sys.exit(lifeline.main(sys.argv[1:]))
"""


class Family:
    """A lifeline with such a program."""

    def __init__(self, folder: Path, *, obeys: bool = True, grace_s: float = 20) -> None:
        self.told, pids = folder / "told", folder / "pids"
        code = FAMILY.format(told=str(self.told), pids=str(pids), obeys=obeys)
        program = [sys.executable, "-c", QUICK, str(grace_s), sys.executable, "-c", code]
        self.process = subprocess.Popen(program, cwd=REPO, stdin=subprocess.PIPE)
        wait_for(pids.exists)
        self.pids = [int(pid) for pid in pids.read_text().split()]

    def runs(self) -> list[bool]:
        return [is_running(pid) for pid in self.pids]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(condition: object, timeout: float = 20) -> None:
    assert callable(condition)
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["end of input", "SIGTERM"])
def test_the_command_is_told_and_its_orphans_are_killed(how: str, tmp_path: Path) -> None:
    family = Family(tmp_path)
    assert family.runs() == [True, True]
    if how == "SIGTERM":
        family.process.send_signal(signal.SIGTERM)
    else:
        assert family.process.stdin
        family.process.stdin.close()
    assert family.process.wait(30) == 5
    assert family.told.exists()
    assert family.runs() == [False, False]


def test_one_that_does_not_obey_is_killed(tmp_path: Path) -> None:
    family = Family(tmp_path, obeys=False, grace_s=0.3)
    assert family.process.stdin
    family.process.stdin.close()
    assert family.process.wait(30) == 128 + signal.SIGKILL
    assert family.told.exists()
    assert family.runs() == [False, False]


def test_killing_what_waits_for_the_lifeline_ends_nothing(tmp_path: Path) -> None:
    """Ray does it to the children of a worker that ends; the worker's own end is what counts."""
    family = Family(tmp_path)
    family.process.kill()
    family.process.wait()
    time.sleep(0.3)
    assert family.runs() == [True, True]
    assert family.process.stdin
    family.process.stdin.close()
    wait_for(lambda: family.runs() == [False, False])


def test_a_lifeline_that_is_killed_still_tells(tmp_path: Path) -> None:
    family = Family(tmp_path)
    fields = Path(f"/proc/{family.pids[0]}/stat").read_text().rpartition(")")[2].split()
    os.kill(int(fields[1]), signal.SIGKILL)  # the parent
    assert family.process.wait(20) == 128 + signal.SIGKILL
    wait_for(family.told.exists)
    wait_for(lambda: not is_running(family.pids[0]))
    os.kill(family.pids[1], signal.SIGKILL)  # nobody is left to do it


@pytest.mark.parametrize(
    ("code", "status"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_the_status_is_the_commands(code: str, status: int) -> None:
    program = [str(REPO / "gptneox" / "lifeline.py"), "1", sys.executable, "-c", code]
    process = subprocess.Popen(
        [sys.executable, *program], env=clean_environ(), stdin=subprocess.PIPE
    )
    assert process.wait(30) == status


def test_its_folder_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    code = "import sys; open(sys.argv[1] + '/x', 'w').close()"
    command = ["1", "--remove", str(folder), sys.executable, "-c", code, str(tmp_path)]
    program = [sys.executable, str(REPO / "gptneox" / "lifeline.py"), *command]
    assert subprocess.Popen(program, stdin=subprocess.PIPE).wait(30) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert lifeline.main(["1"]) == 2
    assert "GRACE_S [--remove FOLDER] COMMAND" in capsys.readouterr().err
