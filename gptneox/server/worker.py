# SPDX-License-Identifier: Apache-2.0
"""The ranks of the service: rank 0 takes requests from the front, all ranks compute them."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shutil
import socket
import threading
import time
from dataclasses import asdict
from pathlib import Path

from gptneox.engine.api import Completion
from gptneox.engine.loop import EngineLoop
from gptneox.engine.paged import PagedEngine
from gptneox.engine.sequence import InvalidParameter
from gptneox.server import wire
from gptneox.server.wire import Limits, Message, Output, Stats

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
# After the front has gone, a rank that is still there ends itself.
EXIT_GRACE_S = 10.0


class FrontLink:
    """A rank's connection to the front.

    Every rank of the front's host holds one, so each of them notices when the front has gone.
    """

    def __init__(self, path: str, rank: int) -> None:
        """Connect, and watch the connection from now on.

        Raises:
            OSError: the front is not there.
        """
        self._path = Path(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(path)
        except OSError:
            self._remove_path()
            raise
        self._received: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self.send({"type": "hello", "rank": rank, "pid": os.getpid()})
        threading.Thread(target=self._watch, name="front", daemon=True).start()

    def send(self, message: Message) -> None:
        """Send a message; one that the front no longer takes is dropped."""
        try:
            self._socket.sendall(wire.encode(message))
        except OSError:
            logger.debug("the front has gone")

    def take(self, timeout_s: float) -> list[Message | None]:
        """The messages that have come; waits for the first. None: the front has gone."""
        taken: list[Message | None] = []
        try:
            taken.append(self._received.get(timeout=timeout_s) if timeout_s else self._next())
            while True:
                taken.append(self._next())
        except queue.Empty:
            return taken

    def _next(self) -> Message | None:
        return self._received.get_nowait()

    def _watch(self) -> None:
        while (message := wire.receive(self._socket)) is not None:
            self._received.put(message)
        self._received.put(None)
        self._remove_path()  # the front, if it was killed, could not
        time.sleep(EXIT_GRACE_S)  # this process has ended by now, unless it hangs
        logger.error("the front has gone, and this rank did not end by itself")
        os._exit(1)

    def _remove_path(self) -> None:
        """Remove the socket and what is beside it, and their folder if they were the last."""
        shutil.rmtree(wire.log_dir(self._path), ignore_errors=True)
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
            self._path.parent.rmdir()


def serve(engine: PagedEngine, link: FrontLink | None) -> None:
    """Answer requests until the front says stop, or has gone.

    Args:
        engine: of this rank.
        link: to the front; ranks above 0 only need it to notice its end.
    """
    loop = EngineLoop(engine)
    if engine.group.rank > 0:
        loop.follow()
        return
    assert link is not None, "rank 0 runs on the front's host"
    link.send({"type": "ready", "limits": asdict(limits_of(engine))})
    RankZero(loop, link).run()


def limits_of(engine: PagedEngine) -> Limits:
    """The engine's limits."""
    return Limits(
        max_positions=engine.max_positions,
        vocab_size=engine.model.config.vocab_size,
        num_blocks=engine.block_manager.num_blocks,
        block_size=engine.block_manager.block_size,
        max_batch_size=engine.settings.max_batch_size,
        world_size=engine.group.world_size,
        dtype=str(engine.dtype).removeprefix("torch."),
        device=engine.device.name,
        enable_prefix_caching=engine.block_manager.enable_prefix_caching,
    )


class RankZero:
    """Passes the front's commands to the engine loop, and what it computed back."""

    def __init__(self, loop: EngineLoop, link: FrontLink) -> None:
        self.loop, self.link = loop, link
        self._front_numbers: dict[int, int] = {}  # the loop's number -> the front's
        self._loop_numbers: dict[int, int] = {}  # and back
        self._begun: set[int] = set()  # the loop's numbers whose first completion has come
        self._is_over = False

    def run(self) -> None:
        """Until the front says stop, or has gone."""
        while not self._is_over:
            refused: list[Output] = []
            for message in self.link.take(0 if self.loop.has_work else HEARTBEAT_S):
                refused += self._apply(message)
            if self._is_over:
                break
            computed = [
                self._output(number, c)
                for number, c in self.loop.round()
                if number in self._front_numbers  # else the front has aborted it
            ]
            outputs = [wire.pack_output(output) for output in refused + computed]
            self.link.send({"type": "step", "outputs": outputs, "stats": asdict(self._stats())})
        self.loop.stop()

    def _apply(self, message: Message | None) -> list[Output]:
        """Returns the ending of a request that the engine refuses."""
        if message is None or message["type"] == "stop":
            self._is_over = True
        elif message["type"] == "add":
            return self._add(message)
        elif message["type"] == "together":
            return [output for each in message["messages"] for output in self._apply(each)]
        elif message["number"] in self._loop_numbers:  # abort
            number = self._loop_numbers[message["number"]]
            self._forget(number, message["number"])
            self.loop.abort(number)
        return []

    def _add(self, message: Message) -> list[Output]:
        own = message["number"]
        try:
            number = self.loop.add(message["prompt"], wire.unpack_params(message["params"]))
        except InvalidParameter as error:  # the front checks the same before
            return [Output(own, finish_reason="error", error=str(error))]
        self._front_numbers[number], self._loop_numbers[own] = own, number
        return []

    def _output(self, number: int, completion: Completion) -> Output:
        own = self._front_numbers[number]
        output = make_output(own, completion)
        if number in self._begun:  # the last completion repeats the scores of the prompt
            output.prompt_logprobs = ()
        self._begun.add(number)
        if completion.finished:
            self._forget(number, own)
        return output

    def _forget(self, number: int, own: int) -> None:
        del self._front_numbers[number], self._loop_numbers[own]
        self._begun.discard(number)

    def _stats(self) -> Stats:
        counts, steps = self.loop.stats(), self.loop.engine.stats
        return Stats(
            num_running=counts.num_running,
            num_waiting=counts.num_waiting,
            num_free_blocks=counts.num_free_blocks,
            num_preemptions=counts.num_preemptions,
            num_prefix_queries=counts.num_prefix_queries,
            num_prefix_hits=counts.num_prefix_hits,
            num_computed_tokens=steps.num_prefill_tokens + steps.num_decode_tokens,
        )


def make_output(number: int, completion: Completion) -> Output:
    """A completion as the front gets it."""
    output = Output(
        number,
        text=completion.new_text,
        num_tokens=len(completion.new_token_ids),
        token_ids=completion.released_ids,
        logprobs=completion.released_logprobs,
        prompt_logprobs=completion.prompt_logprobs,
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        cut_ids=completion.cut_ids,
        cut_logprobs=completion.cut_logprobs,
        error=completion.error,
        num_cached_tokens=completion.num_cached_tokens,
        queued_s=completion.queued_s,
        prefill_s=completion.prefill_s,
    )
    ended_by_id = completion.finish_reason == "stop" and not isinstance(completion.stop_reason, str)
    if ended_by_id and completion.token_ids:
        output.end_id = completion.token_ids[-1]
        output.end_logprob = completion.logprobs[-1] if completion.logprobs else None
    return output
