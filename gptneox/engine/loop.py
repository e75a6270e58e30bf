# SPDX-License-Identifier: Apache-2.0
"""One engine loop for all ranks: rank 0 receives commands, all ranks apply them and step.

In each round rank 0 broadcasts the commands it received since the last round. Every rank applies
them in the same order to its own engine and computes one step, so the engines stay in lockstep.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from gptneox.engine.api import Completion, RequestFailed
from gptneox.engine.paged import PagedEngine
from gptneox.engine.sequence import SamplingParams

# Gloo gives up a wait after 30 minutes, so rank 0 sends earlier.
HEARTBEAT_S = 60.0


@dataclass(frozen=True)
class Add:
    """Queue a request."""

    number: int  # of the request, in the order of `EngineLoop.add`
    prompt_ids: list[int]
    params: SamplingParams


@dataclass(frozen=True)
class Abort:
    """Cancel a request."""

    number: int


@dataclass(frozen=True)
class Stop:
    """End the loop and cancel all unfinished requests."""


Command = Add | Abort | Stop


@dataclass(frozen=True)
class LoopStats:
    """The state of a loop between two rounds, and sums since its engine was made."""

    num_running: int  # requests
    num_waiting: int  # requests, those included that no round has seen yet
    num_blocks: int  # of the KV cache
    num_free_blocks: int  # without a user; they may still hold prefixes
    num_preemptions: int
    num_prefix_queries: int  # tokens looked for in the prefix cache
    num_prefix_hits: int  # tokens found there


class EngineLoop:
    """Runs the engines of all ranks in lockstep.

    Rank 0 calls `add`, `abort` and `round`; the other ranks call `follow`, which returns when rank
    0 calls `stop`. `add`, `abort`, `wait` and `stats` may be called from any thread. A service runs

        while not loop.is_stopped:
            loop.wait(HEARTBEAT_S)
            deliver(loop.round())

    where a round without work tells the other ranks that rank 0 is there.
    """

    def __init__(self, engine: PagedEngine) -> None:
        self.engine, self.group = engine, engine.group
        self._commands: list[Command] = []
        self._request_ids: dict[int, int] = {}  # number -> request id of the engine
        self._numbers: dict[int, int] = {}  # request id -> number
        self._next_number = 0
        self._commands_changed = threading.Condition()  # guards the commands
        self._round_lock = threading.Lock()  # rounds also come from the heartbeat thread
        self._stopped = False
        self._undelivered: list[tuple[int, Completion]] = []

    def add(self, prompt_ids: Seq[int], params: SamplingParams) -> int:
        """Check a request now and queue it in the next round; returns its number.

        Numbers count up from 0.

        Raises:
            InvalidParameter: see `PagedEngine.check`.
            RequestFailed: the loop has stopped.
        """
        self.engine.check(prompt_ids, params)
        return self._queue(prompt_ids, params)

    def _queue(self, prompt_ids: Seq[int], params: SamplingParams) -> int:
        """`add` for a request that is checked."""
        with self._commands_changed:
            if self._stopped:
                raise RequestFailed("the loop has stopped")
            number = self._next_number
            self._next_number += 1
            self._commands.append(Add(number, list(prompt_ids), params))
            self._commands_changed.notify_all()
        return number

    def abort(self, number: int) -> None:
        """Cancel a request in the next round; unknown or finished requests are ignored.

        Completions that were computed before may still be delivered; nothing follows them.
        """
        self._send(Abort(number))

    def stop(self) -> None:
        """End the loop on every rank."""
        if not self._stopped:
            self._send(Stop())
            self.round()

    def _send(self, command: Command) -> None:
        with self._commands_changed:
            self._commands.append(command)
            self._commands_changed.notify_all()

    @property
    def is_stopped(self) -> bool:
        """Whether the loop has ended, by `stop` or because a round failed."""
        return self._stopped

    def wait(self, timeout_s: float) -> bool:
        """Wait until a round has something to do, at most `timeout_s`; returns whether it has.

        Returns at once when the loop has stopped.
        """
        with self._commands_changed:
            self._commands_changed.wait_for(lambda: self.has_work or self._stopped, timeout_s)
            return self.has_work

    def stats(self) -> LoopStats:
        """Counts for a service's metrics; each is exact, but they may be of two rounds."""
        scheduler, blocks = self.engine.scheduler, self.engine.block_manager
        with self._commands_changed:
            num_queued = sum(isinstance(command, Add) for command in self._commands)
        return LoopStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + num_queued,
            num_blocks=blocks.num_blocks,
            num_free_blocks=len(blocks.free),
            num_preemptions=scheduler.num_preemptions,
            num_prefix_queries=blocks.num_queried_tokens,
            num_prefix_hits=blocks.num_hit_tokens,
        )

    @property
    def has_work(self) -> bool:
        """Whether there are commands or unfinished requests."""
        return bool(self._commands or self._undelivered) or self.engine.has_work

    def round(self) -> list[tuple[int, Completion]]:
        """Broadcast and apply the queued commands, then compute one step if there is work.

        Returns:
            The step's completions with the numbers of their requests. Those that a heartbeat or
            a `generate` of another caller computed come first.
        """
        with self._round_lock:
            return self._collect()

    def _collect(self) -> list[tuple[int, Completion]]:
        """`round`, for a caller that holds the lock of the rounds."""
        computed = self._round()
        kept, self._undelivered = self._undelivered, []
        return kept + computed

    def _round(self) -> list[tuple[int, Completion]]:
        if self._stopped:  # nobody would answer a collective
            return []
        with self._commands_changed:
            commands, self._commands = self._commands, []
        try:
            return self._advance(self._exchange(commands))
        except BaseException:
            self._end()  # the ranks may differ now: no further collective
            raise

    def follow(self) -> None:
        """On ranks above 0: run rank 0's rounds until it stops."""
        while not self._stopped:
            self._advance(self._exchange([]))

    def generate(self, prompts: Seq[Seq[int]], params: Seq[SamplingParams]) -> list[Completion]:
        """On rank 0: the finished completions of all prompts, in prompt order.

        All prompts are checked before the first step.

        Raises:
            InvalidParameter: see `PagedEngine.check`.
        """
        for prompt, p in zip(prompts, params, strict=True):
            self.engine.check(prompt, p)
        index = {self._queue(*pair): i for i, pair in enumerate(zip(prompts, params, strict=True))}
        done: dict[int, Completion] = {}
        while len(done) < len(index):
            with self._round_lock:  # a heartbeat between these lines would finish our requests
                completions = self._collect()
                self._undelivered = [each for each in completions if each[0] not in index]
                is_running = self._is_running(index)
            done |= {index[n]: c for n, c in completions if c.finished and n in index}
            if len(done) < len(index) and not is_running:
                raise RequestFailed("requests were aborted, or the loop was stopped")
        return [done[i] for i in range(len(prompts))]

    def _is_running(self, numbers: Iterable[int]) -> bool:
        """Whether one of the requests is queued or computed, so that something will come of it."""
        if self._stopped:
            return False
        queued = {c.number for c in self._commands if isinstance(c, Add)}
        return any(number in self._request_ids or number in queued for number in numbers)

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Send heartbeats while rank 0 waits for input, so that the other ranks do not time out."""
        over = threading.Event()

        def send_heartbeats() -> None:
            while not (over.wait(HEARTBEAT_S) or self._stopped):
                with self._round_lock:
                    self._undelivered += self._round()

        thread = threading.Thread(target=send_heartbeats, daemon=True)
        if self.group.world_size > 1:
            thread.start()
        try:
            yield
        finally:
            over.set()
            if thread.is_alive():
                thread.join()

    def _advance(self, commands: Seq[Command]) -> list[tuple[int, Completion]]:
        for command in commands:
            self._apply(command)
        if self._stopped or not self.engine.has_work:
            return []
        completions = [(self._numbers[c.request_id], c) for c in self.engine.step()]
        for number, completion in completions:
            if completion.finished:
                self._forget(number)
        return completions

    def _apply(self, command: Command) -> None:
        if isinstance(command, Add):
            request_id = self.engine.add_request(command.prompt_ids, command.params)
            self._request_ids[command.number] = request_id
            self._numbers[request_id] = command.number
        elif isinstance(command, Abort):
            if command.number in self._request_ids:
                self.engine.abort(self._request_ids[command.number])
                self._forget(command.number)
        else:
            for number in list(self._request_ids):
                self._apply(Abort(number))
            self._end()

    def _end(self) -> None:
        """Take no further command, and wake up who waits for one."""
        with self._commands_changed:
            self._stopped = True
            self._commands_changed.notify_all()

    def _forget(self, number: int) -> None:
        del self._numbers[self._request_ids.pop(number)]

    def _exchange(self, commands: Seq[Command]) -> Seq[Command]:
        """Rank 0's commands on every rank; an empty list costs one broadcast of one integer.

        Ranks without work wait here. Both collectives are the host's, so no device waits with them.
        """
        if self.group.world_size == 1:
            return commands
        if not int(self.group.broadcast(torch.tensor([len(commands)])).item()):
            return []
        received: Seq[Command] = self.group.broadcast_object(commands)
        return received
