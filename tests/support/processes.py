# SPDX-License-Identifier: Apache-2.0
"""main.py in this process or as one of its own, launchers, stub programs, a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import pty
import re
import select
import shlex
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptneox.__main__ import main

REPO = Path(__file__).resolve().parents[2]
MAIN = REPO / "main.py"
STUB_STATUS = 7

# Writes its arguments and environment to $RECORD, and exits with STUB_STATUS.
RECORDER = f"""
import json, os, sys
call = {{"program": sys.argv[1], "argv": sys.argv[2:], "env": dict(os.environ), "cwd": os.getcwd()}}
with open(os.environ["RECORD"], "w") as file:
    json.dump(call, file)
sys.exit({STUB_STATUS})
"""

# Environment variables of the test machine that would change what a launcher does.
SETTINGS = re.compile(
    r"(ASCEND_|MASTER_|HCCL_|LD_PRELOAD|OMP_|PYTHON|TORCHRUN|RANK|LOCAL_RANK|WORLD_SIZE|NNODES|NODE_RANK"
    r"|TP_WORLD_SIZE|BIND_CPU|IS_QUANT|INF_NAN|CUDA_VISIBLE|LOCAL_WORLD_SIZE|PET_|GPTNEOX_WENT_ON)"
)


def clean_environ(**extra: str) -> dict[str, str]:
    """The environment without anything that main.py reads."""
    prefixes = ("ATB_", "MINDIE_", "NPU_", "RESERVED_", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    names = ("IS_QUANT", "BIND_CPU", "TIMEIT")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(prefixes) and k not in names}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""} | extra


def run_main(*argv: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run main.py as a user does; line endings are not translated."""
    done = subprocess.run(
        [sys.executable, str(MAIN), *argv],
        cwd=cwd,
        env=clean_environ(**environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        check=False,
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


@contextlib.contextmanager
def without_new_handlers() -> Iterator[None]:
    """In the end, handlers of the log that came inside go: their streams are those of one test."""
    root = logging.getLogger("gptneox")
    before, level = list(root.handlers), root.level
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(before):
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)


def clean_this_process(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """For `run_here`: the environment of `clean_environ`, and an own current folder."""
    for name in set(os.environ) - set(clean_environ()):
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(folder)


def run_here(*argv: Any) -> Any:
    """main.py in this process, without the start of an interpreter; returns the exit status."""
    with without_new_handlers():
        try:
            return main([str(word) for word in argv])
        except SystemExit as error:  # argparse
            return error.code


class Terminal:
    """A Python program in its own pseudo-terminal."""

    def __init__(self, *argv: str | Path, cwd: Path, **environ: str) -> None:
        self.main_fd, terminal = pty.openpty()

        def take_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, *map(str, argv)],
            cwd=cwd,
            env=clean_environ(**({"TERM": "dumb", "XDG_STATE_HOME": str(cwd)} | environ)),
            stdin=terminal,
            stdout=terminal,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=take_terminal,  # noqa: PLW1509
        )
        os.close(terminal)
        self.seen = ""
        self._raw = b""

    def type(self, text: str | bytes) -> None:
        os.write(self.main_fd, text if isinstance(text, bytes) else text.encode())

    def wait_for(self, text: str, timeout: float = 60) -> str:
        """Wait for `text`; returns the output before it."""
        end = time.monotonic() + timeout
        while text not in self.seen:
            left = end - time.monotonic()
            assert left > 0, f"{text!r} did not come; seen: {self.seen[-500:]!r}"
            if select.select([self.main_fd], [], [], left)[0]:
                self._raw += os.read(self.main_fd, 65536)
                self.seen, self._raw = self.seen + self._raw.decode(errors="ignore"), b""
        before, _, self.seen = self.seen.partition(text)
        return before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=10)
        os.close(self.main_fd)


def write_program(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


def recording_stub(folder: Path, name: str) -> Path:
    """A program that records its call; with -c or launch.py it runs Python instead."""
    real, recorder = shlex.quote(sys.executable), folder / "recorder.py"
    folder.mkdir(parents=True, exist_ok=True)
    recorder.write_text(RECORDER)
    return write_program(
        folder / name,
        f'if [[ ${{1-}} == -c || ${{1-}} == */launch.py ]]; then exec {real} "$@"; fi\n'
        f'exec {real} -I {shlex.quote(str(recorder))} {name} "$@"',
    )


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not SETTINGS.match(name)}
