# SPDX-License-Identifier: Apache-2.0
"""The benchmark's side of the protocol: an engine's process, which only runs during a request.

Between requests the process group is stopped (SIGSTOP), so that its spinning threads do not slow
down the engine that is being measured.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmark.errors import WorkerError

TOOLS = Path(__file__).resolve().parents[1]
ROOT = TOOLS.parent
_LOG_LINES = 12  # lines of a dead worker's log in the error message
_CHUNK = 1 << 20


class WorkerProcess:
    """One engine's process."""

    def __init__(
        self,
        name: str,
        python: Path,
        module: str,
        environment: Mapping[str, str],
        log: Path,
        timeout_s: float = 3600.0,
    ) -> None:
        """Start it.

        Args:
            name: for messages.
            python: the interpreter.
            module: what it runs, found below tools/ or on PYTHONPATH.
            environment: all of it.
            log: takes the standard error.
            timeout_s: for each answer.
        """
        self.name, self.log, self.timeout_s = name, log, timeout_s
        self._buffer = b""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(python), "-m", module],
                cwd=TOOLS,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # a group of its own, which Ctrl-C does not reach
            )

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Let the process run until it has answered.

        Raises:
            WorkerError: it failed, died, or took too long.
        """
        self._signal(signal.SIGCONT)
        line = json.dumps({"op": op} | arguments) + "\n"
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except OSError as error:
            raise self._dead(op) from error
        answer = json.loads(self._read_line(op))
        self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {op}: {answer['error']}", f"see {self.log}")
        assert isinstance(answer, dict)
        return answer

    def cpu_seconds(self) -> float:
        """Processor time that it has used so far. Source: proc(5), stat."""
        try:
            text = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii")
        except OSError:
            return 0.0
        fields = text.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End it, with everything that it has started."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):  # what was not sent any more
                    stream.close()

    def _read_line(self, op: str) -> bytes:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        end = time.monotonic() + self.timeout_s
        while b"\n" not in self._buffer:
            if not select.select([fd], [], [], max(0.0, end - time.monotonic()))[0]:
                raise WorkerError(
                    f"{self.name}: no answer to {op} within {self.timeout_s:g} s",
                    f"raise --timeout, or see {self.log}",
                )
            chunk = os.read(fd, _CHUNK)
            if not chunk:
                raise self._dead(op)
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _dead(self, op: str) -> WorkerError:
        status = self._process.wait()
        reason = f"signal {-status}" if status < 0 else f"status {status}"
        if status == -signal.SIGKILL:
            reason += " (killed: out of memory?)"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = "\n  ".join(lines[-_LOG_LINES:])
        what = f"{self.name}: ended with {reason} during {op}"
        return WorkerError(what, f"the end of {self.log}:\n  {tail}")

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def worker_environment(
    base: Mapping[str, str], extra: Mapping[str, str], threads: int, *, same_interpreter: bool
) -> dict[str, str]:
    """The environment of a worker.

    Args:
        base: the environment of the benchmark.
        extra: the engine's or the variant's own; it wins.
        threads: for the libraries that ask OpenMP.
        same_interpreter: keep the caller's PYTHON variables, which an engine's own virtual
            environment must not see.
    """
    environment = {k: v for k, v in base.items() if same_interpreter or not k.startswith("PYTHON")}
    paths = [str(ROOT)]
    if same_interpreter and base.get("PYTHONPATH"):
        paths.append(base["PYTHONPATH"])
    environment |= {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return environment | dict(extra)
