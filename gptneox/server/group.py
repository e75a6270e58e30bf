# SPDX-License-Identifier: Apache-2.0
"""An engine as the front sees it: the ranks that it started, and the socket to rank 0."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import struct
import time
from asyncio.subprocess import DEVNULL
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

from gptneox.engine.sequence import SamplingParams
from gptneox.server import wire
from gptneox.server.metrics import EngineState
from gptneox.server.service import OnOutput
from gptneox.server.wire import Limits, Message, Stats

logger = logging.getLogger(__name__)

STOP_S = 10.0  # that the ranks get to end by command, and then by signal
NUM_KNOWN_PREFIXES = 64
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid of SO_PEERCRED


@dataclass
class _Choice:
    on_output: OnOutput
    num_outstanding: int  # tokens that are still to be computed, at most


class EngineGroup:
    """One engine: a process, or torchrun with several, and its choices.

    It is lost when its process ends, when rank 0 closes the connection, or when neither a step nor
    a sign of life has come for `heartbeat_timeout_s`; `on_lost` is then called once.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        *,
        heartbeat_timeout_s: float,
        on_lost: Callable[[EngineGroup], None],
        on_step: Callable[[int], None],
    ) -> None:
        """Make an engine that is not started yet.

        Args:
            name: for messages.
            path: the Unix socket to listen at, in a folder that only this user may enter.
            heartbeat_timeout_s: the longest silence once it is ready.
            on_lost: called when it has gone.
            on_step: called with the number of tokens that a step computed.
        """
        self.name, self.path = name, path
        self.limits: Limits | None = None  # None while the model is loaded
        self.stats = Stats()
        self.lost = ""  # why it has gone
        self.status: int | None = None  # of the process, once it has ended
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._on_lost, self._on_step = on_lost, on_step
        self._choices: dict[int, _Choice] = {}
        self._next_number = 0
        self._heard = time.monotonic()
        self._prefixes: deque[Seq[int]] = deque(maxlen=NUM_KNOWN_PREFIXES)
        self._pids: dict[int, int] = {}  # of the ranks -> pidfd, or -1 where there are none
        self._writers: list[asyncio.StreamWriter] = []
        self._to_rank_zero: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._server: asyncio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []

    # -- choices ---------------------------------------------------------------------------------

    def add(self, prompt: Seq[int], params: SamplingParams, on_output: OnOutput) -> int:
        """Start a choice; returns its number. Its outputs go to `on_output`."""
        message = self._admit(prompt, params, on_output)
        self._send(message)
        return int(message["number"])

    def add_together(self, choices: Iterable[tuple[Seq[int], SamplingParams, OnOutput]]) -> None:
        """Start choices, of which no step sees some without the others."""
        self._send({"type": "together", "messages": [self._admit(*choice) for choice in choices]})

    def _admit(self, prompt: Seq[int], params: SamplingParams, on_output: OnOutput) -> Message:
        """The message that starts a choice."""
        number, self._next_number = self._next_number, self._next_number + 1
        self._choices[number] = _Choice(on_output, len(prompt) + params.max_new_tokens)
        self._prefixes.append(prompt)
        packed = wire.pack_params(params)
        return {"type": "add", "number": number, "prompt": list(prompt), "params": packed}

    def abort(self, number: int) -> None:
        """Forget a choice in any state; one that has finished is ignored."""
        if self._choices.pop(number, None):
            self._send({"type": "abort", "number": number})

    def cost(self, prompt: Seq[int]) -> tuple[float, float]:
        """Outstanding tokens; among equals the longest known beginning of the prompt wins."""
        outstanding = sum(choice.num_outstanding for choice in self._choices.values())
        return outstanding, -max(
            (_num_common(prompt, known) for known in self._prefixes), default=0
        )

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the last message."""
        return time.monotonic() - self._heard

    def state(self) -> EngineState:
        """For the metrics."""
        assert self.limits is not None
        return EngineState(self.stats, self.limits.num_blocks, self.heartbeat_age_s)

    # -- its life --------------------------------------------------------------------------------

    async def start(
        self, command: Seq[str], environ: Mapping[str, str], *, stdin: int = DEVNULL
    ) -> None:
        """Listen, and start the ranks in a session of their own, which no Ctrl-C reaches.

        Args:
            command: starts them.
            environ: its whole environment.
            stdin: its standard input; PIPE: one that ends with this process.

        Raises:
            OSError: the socket or the process cannot be made.
        """
        self._server = await asyncio.start_unix_server(self._connected, str(self.path))
        self._process = await asyncio.create_subprocess_exec(
            *command,
            env=dict(environ),
            stdin=stdin,
            start_new_session=True,
        )
        self._tasks.append(asyncio.create_task(self._wait_for_process(self._process)))
        self._tasks.append(asyncio.create_task(self._watch_heartbeat()))

    async def stop(self) -> None:
        """End the ranks: by command, then by signal, at last by force. Leaves nothing behind."""
        if self._server:
            self._server.close()
        self._send({"type": "stop"})
        if self.limits is None or self.lost or not await self._has_ended(STOP_S):
            self._signal(signal.SIGTERM)
            if not await self._has_ended(STOP_S):
                logger.warning("engine %s does not end; it is killed", self.name)
        self.kill()
        await self._has_ended(STOP_S)
        for task in self._tasks:
            task.cancel()
        for writer in self._writers:
            writer.close()
        self._forget_pids()
        self.path.unlink(missing_ok=True)

    def kill(self) -> None:
        """End every process of the engine now."""
        for pid, descriptor in self._pids.items():
            with contextlib.suppress(OSError):
                if descriptor >= 0:
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                elif self.status is None:
                    os.kill(pid, signal.SIGKILL)
        if self._process and self.status is None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._process and self.status is None:
            with contextlib.suppress(OSError):
                self._process.send_signal(number)

    async def _has_ended(self, timeout_s: float) -> bool:
        """Wait for the process; whether it has ended."""
        if self._process is None or self.status is not None:
            return True
        try:
            await asyncio.wait_for(self._process.wait(), timeout_s)
        except (asyncio.TimeoutError, TimeoutError):
            return False
        return True

    def _lose(self, reason: str) -> None:
        if not self.lost:
            self.lost = reason
            self._choices.clear()
            self._on_lost(self)

    # -- its connections -------------------------------------------------------------------------

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A rank has connected."""
        self._writers.append(writer)
        hello = await wire.read(reader)
        if hello is None:
            return
        self._remember(writer.get_extra_info("socket"))
        if hello["rank"] == 0:
            self._to_rank_zero = writer
        while (message := await wire.read(reader)) is not None:
            self._heard = time.monotonic()
            self._take(message)
        self._lose(f"rank {hello['rank']} of engine {self.name} has gone")

    def _remember(self, connection: socket.socket) -> None:
        """The process at the other end, whatever it says of itself."""
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, *_ = _CREDENTIALS.unpack(raw)
        try:
            self._pids[pid] = os.pidfd_open(pid)
        except OSError:
            self._pids[pid] = -1

    def _forget_pids(self) -> None:
        for descriptor in self._pids.values():
            if descriptor >= 0:
                os.close(descriptor)
        self._pids.clear()

    def _take(self, message: Message) -> None:
        if message["type"] == "ready":
            self.limits = Limits(**message["limits"])
            logger.info(
                "engine %s is ready: %s on %s, %d rank(s), %d KV-cache blocks of %d tokens",
                self.name,
                self.limits.dtype,
                self.limits.device,
                self.limits.world_size,
                self.limits.num_blocks,
                self.limits.block_size,
            )
            return
        stats = Stats(**message["stats"])
        num_tokens = stats.num_computed_tokens - self.stats.num_computed_tokens
        self.stats = stats
        if num_tokens:
            self._on_step(num_tokens)
        for packed in message["outputs"]:
            output = wire.unpack_output(packed)
            choice = self._choices.get(output.number)
            if choice is None:  # aborted meanwhile
                continue
            choice.num_outstanding -= output.num_tokens
            if output.finish_reason:
                del self._choices[output.number]
            choice.on_output(output)

    def _send(self, message: Message) -> None:
        if self._to_rank_zero and not self.lost:
            self._to_rank_zero.write(wire.encode(message))

    async def _wait_for_process(self, process: asyncio.subprocess.Process) -> None:
        self.status = await process.wait()
        self._lose(f"engine {self.name} has ended with status {self.status}")

    async def _watch_heartbeat(self) -> None:
        while not self.lost:
            await asyncio.sleep(min(1.0, self._heartbeat_timeout_s / 4))
            if self.limits and self.heartbeat_age_s > self._heartbeat_timeout_s:
                self._lose(
                    f"engine {self.name} has been silent for {self.heartbeat_age_s:.0f} s "
                    f"(heartbeat_timeout_s is {self._heartbeat_timeout_s:g})"
                )


def _num_common(first: Seq[int], second: Seq[int]) -> int:
    """Length of the common beginning."""
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return min(len(first), len(second))
