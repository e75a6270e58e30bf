# SPDX-License-Identifier: Apache-2.0
"""The engine's side of the protocol: one JSON object per line, a request in, an answer out.

Only the standard library is used here, because each engine runs in an environment of its own.
Requests name a method in "op", the other keys are its arguments; the answer is what the method
returns, or {"error": text}. Standard output belongs to the protocol: what libraries print goes to
standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

Answer = dict[str, Any]
OPS = (
    "convert",
    "load",
    "prepare",
    "run",
    "arrivals",
    "limits",
    "matmul",
    "bandwidth",
    "overhead",
    "queue",
)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Load:
    """What an engine has to get ready for."""

    model: Path
    converted: Path | None  # what `convert` has written
    dtype: str
    device: str
    threads: int
    cases: list[tuple[int, int, int]]  # batch, prompt and output length, of each
    prefill_tokens: int  # prompt tokens that one step may compute
    scratch: Path  # for what the engine keeps between runs
    weights: str = ""  # how they are quantized, as the engine calls it; "" for floats

    @property
    def max_batch(self) -> int:
        """Most rows."""
        return max(batch for batch, _, _ in self.cases)

    @property
    def max_len(self) -> int:
        """Most tokens of a row."""
        return max(prompt + output for _, prompt, output in self.cases)


class Worker:
    """What every engine does; only `load` and `generate` must be there."""

    packages: tuple[str, ...] = ()  # whose versions belong to the result

    def load(self, load: Load) -> Answer:
        """Load the model.

        Returns:
            At least "dtype", what is computed in. Of quantized weights "weights", how they are
            called, and "bits" of those of a layer and of the head, scales included, unless they
            are those of this toolkit's own checkpoint.
        """
        raise NotImplementedError

    def generate(
        self, prompts: list[list[int]], num_new: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Greedy, `num_new` tokens for each prompt, whatever they are.

        Returns:
            The new token ids of each row, and the moment (`time.perf_counter`) of each.
        """
        raise NotImplementedError

    def convert(self, model: Path, target: Path, dtype: str, weights: str) -> None:
        """Write the checkpoint in the engine's own format below `target`.

        Args:
            model: a Hugging Face directory.
            target: an empty folder.
            dtype: of floats.
            weights: see `Load`.
        """
        raise NotImplementedError

    def prepare(self, batch: int, prompt: int, output: int) -> None:
        """Get ready for a case; not timed."""

    def arrivals(self, requests: list[tuple[float, list[int], int]]) -> list[list[float]]:
        """Serve requests (seconds from the start, prompt, new tokens) that arrive over time.

        Returns:
            The moments of each request's tokens, in seconds from the start.
        """
        raise NotImplementedError

    def peak_bytes(self) -> int:
        """The most memory used since the last `reset_peak`."""
        return peak_resident()

    def reset_peak(self) -> None:
        """Start to look for the peak anew."""
        reset_peak_resident()


def serve(worker: Worker) -> None:
    """Answer requests until the input ends or says quit."""
    _die_with_parent()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        op = request.pop("op")
        if op == "quit":
            return
        try:
            answer = _answer(worker, op, request)
        except BaseException as error:  # noqa: BLE001  the outermost loop; the parent decides
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        _write(out, answer)


def _answer(worker: Worker, op: str, request: Answer) -> Answer:
    if op == "load":
        request["cases"] = [tuple(case) for case in request["cases"]]
        paths = {"converted": None} | {key: Path(request[key]) for key in ("model", "scratch")}
        if request["converted"]:
            paths["converted"] = Path(request["converted"])
        start = time.perf_counter()
        answer = worker.load(Load(**(request | paths)))
        return answer | {
            "seconds": time.perf_counter() - start,
            "peak_bytes": worker.peak_bytes(),
            "versions": versions(worker.packages),
        }
    if op == "convert":
        source, target = Path(request["model"]), Path(request["target"])
        worker.convert(source, target, request["dtype"], request["weights"])
        return {}
    if op == "run":
        return _run(worker, request["prompts"], request["num_new"])
    if op == "arrivals":
        worker.reset_peak()
        requests = [(at, prompt, num_new) for at, prompt, num_new in request["requests"]]
        times = worker.arrivals(requests)
        return {"times": times, "peak_bytes": worker.peak_bytes()}
    assert op in OPS, f"unknown op {op!r}"
    return getattr(worker, op)(**request) or {}


def _run(worker: Worker, prompts: list[list[int]], num_new: int) -> Answer:
    worker.reset_peak()
    start = time.perf_counter()
    token_ids, moments = worker.generate(prompts, num_new)
    seconds = time.perf_counter() - start
    counts = {len(row) for rows in (token_ids, moments) for row in rows}
    if counts != {num_new} or not len(token_ids) == len(moments) == len(prompts):
        raise RuntimeError(f"{num_new} new tokens were asked for, rows of {sorted(counts)} came")
    return {
        "token_ids": token_ids,
        "times": [[moment - start for moment in row] for row in moments],
        "seconds": seconds,
        "peak_bytes": worker.peak_bytes(),
    }


def _write(out: TextIO, answer: Answer) -> None:
    out.write(json.dumps(answer) + "\n")
    out.flush()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of Python and of the packages that are installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


# -- the process ---------------------------------------------------------------------------------


def _die_with_parent() -> None:
    """A worker is stopped most of the time, so it could not notice that its parent is gone."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def peak_resident() -> int:
    """Largest resident set of this process, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def reset_peak_resident() -> None:
    """Let the peak start from what is resident now, where the system can. Source: proc(5)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


# -- engines that take one step at a time --------------------------------------------------------


class SteppingWorker(Worker):
    """An engine with a queue: requests go in, each step gives new tokens."""

    def add(self, prompt: list[int], num_new: int) -> str | int:
        """Queue a request; returns its name."""
        raise NotImplementedError

    def step(self) -> Sequence[tuple[str | int, list[int]]]:
        """One step; returns the requests that got new tokens, with those."""
        raise NotImplementedError

    def generate(
        self, prompts: list[list[int]], num_new: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """See `Worker`."""
        rows = {self.add(prompt, num_new): i for i, prompt in enumerate(prompts)}
        token_ids: list[list[int]] = [[] for _ in prompts]
        moments: list[list[float]] = [[] for _ in prompts]
        missing = num_new * len(prompts)
        while missing > 0:
            outputs = self.step()
            now = time.perf_counter()
            for name, new in outputs:
                token_ids[rows[name]] += new
                moments[rows[name]] += [now] * len(new)
                missing -= len(new)
        return token_ids, moments

    def arrivals(self, requests: list[tuple[float, list[int], int]]) -> list[list[float]]:
        """See `Worker`."""
        rows: dict[str | int, int] = {}
        moments: list[list[float]] = [[] for _ in requests]
        missing = sum(num_new for _, _, num_new in requests)
        arrived = num_tokens = due = 0
        start = time.perf_counter()
        while missing > 0:
            now = time.perf_counter() - start
            while arrived < len(requests) and requests[arrived][0] <= now:
                _, prompt, num_new = requests[arrived]
                rows[self.add(prompt, num_new)] = arrived
                arrived += 1
                due += num_new
            if num_tokens == due:  # nobody is waiting for a token
                time.sleep(max(0.0, requests[arrived][0] - now))
                continue
            outputs = self.step()
            now = time.perf_counter() - start
            for name, new in outputs:
                moments[rows[name]] += [now] * len(new)
                num_tokens += len(new)
                missing -= len(new)
        return moments
