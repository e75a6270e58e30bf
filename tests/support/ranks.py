# SPDX-License-Identifier: Apache-2.0
"""Tensor-parallel ranks for tests: processes in a gloo group, and the functions they run.

The processes are forked from a server that has imported everything once, so starting a team takes
milliseconds instead of the seconds that importing torch takes.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gptneox.adapter  # noqa: F401  # slow: imported once, before the ranks are forked
from gptneox.config.settings import EngineSection
from gptneox.devices import select
from gptneox.engine.generate import GenerateEngine
from gptneox.engine.paged import PagedEngine
from gptneox.engine.scheduler import Scheduled
from gptneox.engine.sequence import SamplingParams, Sequence
from gptneox.parallel import TensorParallelGroup, init_group
from support.processes import clean_environ

TIMEOUT_S = 120.0


class RankFailed(AssertionError):
    """A rank raised; its traceback is the message."""


def free_port() -> int:
    """A port without a listener."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start_process(function: Callable[..., None], *args: Any) -> multiprocessing.process.BaseProcess:
    """Run a function of a test module in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.ranks", "gptneox.weights.cut"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    try:
        forkserver.ensure_running()  # inherits PYTHONPATH; later calls do nothing
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
    process = context.Process(target=function, args=args, daemon=True)
    process.start()
    return process


class Team:
    """`world_size` ranks on the CPU, each with one thread; they live until `close`."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []
        port = free_port()
        for rank in range(world_size):
            ours, theirs = multiprocessing.Pipe()
            self._processes.append(start_process(_serve, rank, world_size, port, theirs))
            theirs.close()
            self._pipes.append(ours)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(group, *args)` on every rank; returns the results in rank order.

        Raises:
            RankFailed: a rank raised or died; the team is closed.
        """
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, args)))
        results: dict[int, Any] = {}
        end = time.monotonic() + TIMEOUT_S
        while len(results) < self.world_size:
            waiting = [pipe for i, pipe in enumerate(self._pipes) if i not in results]
            ready = wait(waiting, timeout=end - time.monotonic())
            if not ready:
                self.close()
                raise RankFailed(f"only ranks {sorted(results)} answered in {TIMEOUT_S} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    ok, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    ok, value = False, "it died"
                if not ok:
                    self.close()
                    raise RankFailed(f"rank {rank}: {value}")
                results[rank] = value
        return [results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    @property
    def is_alive(self) -> bool:
        """Whether `run` can be called."""
        return bool(self._processes)


class Teams:
    """One team per world size, created on first use."""

    def __init__(self) -> None:
        self._teams: dict[int, Team] = {}

    def __call__(self, world_size: int) -> Team:
        team = self._teams.get(world_size)
        if team is None or not team.is_alive:
            team = self._teams[world_size] = Team(world_size)
        return team

    def close(self) -> None:
        for team in self._teams.values():
            team.close()


@contextlib.contextmanager
def open_teams() -> Iterator[Teams]:
    """Teams that are closed at the end."""
    teams = Teams()
    try:
        yield teams
    finally:
        teams.close()


def _serve(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    group = init_group(rank, world_size, "gloo")
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the test is over
            return
        try:
            answer = (True, function(group, *args))
        except Exception:  # noqa: BLE001  # the test reports every error
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))


# -- functions that ranks run --------------------------------------------------------------------


@dataclass
class Answers:
    """One rank's results for some prompts."""

    token_ids: list[list[int]]
    logits: list[Tensor]  # of each prompt: [len(prompt), V]; on rank 0 only
    decode_logits: Tensor  # of the step after the first prompt: [1, V]
    all_reduces: tuple[int, int]  # in a prefill step, and in a decode step
    digest: str  # hash of all logits, to compare runs bit for bit


def paged(
    group: TensorParallelGroup, path: Path, prompts: Seq[list[int]], num_new: int, **settings: Any
) -> Answers:
    """Greedy answers and logits on the paged path."""
    engine = PagedEngine.from_pretrained(
        path,
        EngineSection(**{"max_batch_size": len(prompts), **settings}),
        select("cpu"),
        dtype="float32",
        group=group,
        with_tokenizer=False,
    )
    params = SamplingParams(max_new_tokens=num_new, ignore_eos=True)
    new_ids = [output.token_ids for output in engine.generate(prompts, params)]
    steps = [_paged_steps(engine, [*p, new[0]]) for p, new in zip(prompts, new_ids, strict=True)]
    return _answers(group, new_ids, steps)


Steps = list[tuple[Tensor, int]]  # of a prefill and a decode step: logits [T, V], all-reduces


def _answers(group: TensorParallelGroup, new_ids: list[list[int]], steps: list[Steps]) -> Answers:
    logits, (decode, decode_reduces) = [prefill[0] for prefill, _ in steps], steps[0][1]
    digest = hashlib.sha256()
    for tensor in (*logits, decode):
        digest.update(tensor.contiguous().numpy())
    all_reduces = (steps[0][0][1], decode_reduces)
    own_logits = logits if group.rank == 0 else []
    return Answers(new_ids, own_logits, decode, all_reduces, digest.hexdigest())


@torch.inference_mode()
def _paged_steps(engine: PagedEngine, token_ids: list[int]) -> Steps:
    seq = Sequence.create(0, token_ids, SamplingParams())
    engine.block_manager.allocate(seq, [])
    group, steps = engine.model.group, []
    for num_tokens in (len(token_ids) - 1, 1):
        before = group.num_all_reduces
        hidden = engine.runner.step(engine.runner.prepare([Scheduled(seq, num_tokens)]))
        steps.append((engine.model.compute_logits(hidden), group.num_all_reduces - before))
        seq.num_computed_tokens += num_tokens
    engine.block_manager.release(seq)
    return steps


def flash(group: TensorParallelGroup, path: Path, prompts: Seq[list[int]], num_new: int) -> Answers:
    """Greedy answers of the left-padded batch, and logits of each prompt alone."""
    engine = GenerateEngine.from_pretrained(
        path,
        EngineSection(max_batch_size=64),
        select("cpu"),
        group=group,
        dtype="float32",
        with_tokenizer=False,
    )
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=num_new, ignore_eos=True))
    new_ids = [output.token_ids for output in outputs]
    steps = [_flash_steps(engine, p, new[0]) for p, new in zip(prompts, new_ids, strict=True)]
    return _answers(group, new_ids, steps)


def _flash_steps(engine: GenerateEngine, prompt: list[int], token_id: int) -> Steps:
    group = engine.group
    cache, steps = None, []
    for token_ids in (prompt, [token_id]):
        before = group.num_all_reduces
        output = engine.adapter(torch.tensor([token_ids]), past_key_values=cache)
        cache = output.past_key_values
        steps.append((output.logits[0], group.num_all_reduces - before))
    return steps


PATHS = {"paged": paged, "flash": flash}


def both_paths(
    group: TensorParallelGroup, places: dict[str, Path], prompts: Seq[list[int]], num_new: int
) -> dict[str, Answers]:
    """Answers of every place on both paths; only one place per path generates all `num_new`."""
    answers = {}
    for i, (name, run) in enumerate(PATHS.items()):
        for j, (place, path) in enumerate(places.items()):
            num = num_new if i == j else 1
            answers[f"{name} {place}"] = run(group, path, prompts, num)
    return answers


# -- whole jobs, as users start them ---------------------------------------------------------------


class Job:
    """A launcher in its own session, with its output in files."""

    def __init__(
        self, folder: Path, *command: str | Path, prefix: Seq[str] = (), **env: str
    ) -> None:
        """Start `PREFIX… bash COMMAND…` in `folder`, which is created."""
        folder.mkdir(parents=True, exist_ok=True)
        self.out, self.err = folder / "stdout", folder / "stderr"
        environment = clean_environ(PYTHON=sys.executable, OMP_NUM_THREADS="1", **env)
        environment["TORCHRUN"] = ""
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        for name in ("MASTER_PORT", "MASTER_ADDR", "TORCHELASTIC_ERROR_FILE"):
            if name not in env:
                environment.pop(name, None)
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [*prefix, "bash", *map(str, command)],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def wait_for(self, condition: Callable[[], Any], what: str, timeout: float = TIMEOUT_S) -> Any:
        """The first true value of `condition`, while the job runs."""
        end = time.monotonic() + timeout
        while True:
            value = condition()
            if value:
                return value
            assert self.process.poll() is None, f"ended before {what}: {self.err.read_text()}"
            assert time.monotonic() < end, f"no {what} in {timeout} s: {self.err.read_text()}"
            time.sleep(0.005)

    def wait_for_text(self, text: str, file: Path | None = None) -> None:
        """Wait until stdout, or another file, contains `text`."""
        file = file or self.out
        self.wait_for(lambda: text in file.read_text(errors="replace"), text)

    def pid_of_rank(self, rank: int) -> int:
        """Wait for the process of a rank; returns its pid."""

        def find() -> int:
            for pid in self.processes():
                with contextlib.suppress(OSError):
                    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    if f"RANK={rank}".encode() in variables:
                        return pid
            return 0

        return int(self.wait_for(find, f"process of rank {rank}"))

    def processes(self) -> list[int]:
        """All processes of the job's session, and torchrun's children."""
        pids = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                words = (entry / "stat").read_text().rpartition(")")[2].split()
                # torchrun starts ranks in sessions of their own; their parent is in ours
                family = {int(words[1]), int(words[3])}
                if words[0] != "Z" and self.process.pid in family:
                    pids.append(int(entry.name))
        return pids

    def finish(self, timeout: float = TIMEOUT_S) -> int:
        """The exit status; a job that does not end in time is killed and the test fails."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running: {self.err.read_text()}") from None
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill all processes that are left."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
