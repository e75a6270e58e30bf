# SPDX-License-Identifier: Apache-2.0
"""A program, and all that it starts, tied to the process that wants it.

    python gptneox/lifeline.py GRACE_S [--remove FOLDER] COMMAND [ARGUMENT …]

Standard input is the tie. When it ends, because whoever holds its other end says so or has died,
COMMAND gets SIGTERM and GRACE_S seconds, and then nothing of it is left, not even what it started
in sessions of its own, nor FOLDER. SIGTERM and Ctrl-C do the same. When COMMAND ends by itself,
what it left behind gets `PATIENCE_S` to end, too.

Ray kills the children of a worker that ends. So this process only waits for another one, which
does the work; killed, it ends nothing.

Exit status: COMMAND's, as a shell gives it; 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

PATIENCE_S = 5.0
POLL_S = 0.1
# Source: prctl(2), linux/prctl.h.
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main(argv: list[str]) -> int:
    """Run a command as long as standard input is open; returns its exit status."""
    folder = argv[2] if argv[1:2] == ["--remove"] else ""
    command = argv[3:] if folder else argv[1:]
    if not command:
        sys.stderr.write(f"{__doc__}")
        return 2
    worker = os.fork()
    if worker:
        return _wait_for(worker)
    os.setsid()
    status = _run(command, float(argv[0]))
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    return status


def _wait_for(worker: int) -> int:
    def pass_on(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            os.kill(worker, signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    return status if status >= 0 else 128 - status


def _run(command: list[str], grace_s: float) -> int:
    is_told = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal is_told
        is_told = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    _prctl(_PR_SET_CHILD_SUBREAPER)  # orphans of the command become children of this process
    child = subprocess.Popen(  # this process has one thread, so code may run before exec
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_end_with_parent,  # noqa: PLW1509
    )
    while child.poll() is None and not (is_told or _has_ended(POLL_S)):
        pass
    patience_s = PATIENCE_S
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(grace_s)
        except subprocess.TimeoutExpired:
            child.kill()
            patience_s = 0.0
    status = child.wait()
    _clear(patience_s)
    return status if status >= 0 else 128 - status


def _prctl(option: int, argument: int = 1) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0)


def _end_with_parent() -> None:
    """Should this process be killed, the command is told to end."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _has_ended(timeout_s: float) -> bool:
    """Whether standard input has ended; waits for that."""
    readable, _, _ = select.select([0], [], [], timeout_s)
    return bool(readable) and not os.read(0, 4096)


def _clear(patience_s: float) -> None:
    """Wait until there is no child; from `patience_s` on they are killed."""
    end = time.monotonic() + patience_s
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:  # one that has ended
                pass
        except ChildProcessError:
            return
        if time.monotonic() > end:
            for pid in children():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S / 5)


def children() -> list[int]:
    """The processes that this one has started, or has become the parent of."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if fields[1:2] == [str(os.getpid())]:
                found.append(int(entry.name))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
