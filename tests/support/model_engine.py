# SPDX-License-Identifier: Apache-2.0
"""The engine of a checkpoint in this process, for a service under test."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import threading
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from gptneox.config.settings import EngineSection
from gptneox.devices import select
from gptneox.engine.loop import EngineLoop
from gptneox.engine.paged import PagedEngine
from gptneox.engine.sequence import SamplingParams
from gptneox.server import wire
from gptneox.server.service import OnOutput
from gptneox.server.worker import RankZero, limits_of
from support import checkpoints
from support.tokenizers import write_tokenizer


def write_model(path: Path) -> Path:
    """A random checkpoint with the tokenizer of `support.service`, whose greedy text varies."""
    config = checkpoints.FAMILY["pythia-14m"] | {"vocab_size": 336}
    checkpoints.write_checkpoint(path, config, seed=3, sharpness=4.0)
    write_tokenizer(path)
    return path


class ModelEngine:
    """Rank 0 in a thread, behind the messages that it exchanges with the front."""

    def __init__(self, path: Path) -> None:
        section = EngineSection(block_size=16, max_batch_size=8, num_blocks=64)
        engine = PagedEngine.from_pretrained(path, section, select("cpu"), dtype="float32")
        self.limits = limits_of(engine)
        self._commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outputs: list[OnOutput] = []
        self._loop = asyncio.get_running_loop()
        rank: Any = RankZero(EngineLoop(engine), self)  # type: ignore[arg-type]
        self._thread = threading.Thread(target=rank.run, daemon=True)
        self._thread.start()

    # -- the engine, for the service -------------------------------------------------------------

    def add(self, prompt: Seq[int], params: SamplingParams, on_output: OnOutput) -> int:
        number = len(self._outputs)
        self._outputs.append(on_output)
        message = {"type": "add", "number": number, "prompt": list(prompt)}
        self._commands.put(_sent({**message, "params": wire.pack_params(params)}))
        return number

    def abort(self, number: int) -> None:
        self._commands.put({"type": "abort", "number": number})

    def cost(self, prompt: Seq[int]) -> tuple[float, float]:
        return 0.0, 0.0

    def stop(self) -> None:
        self._commands.put({"type": "stop"})
        self._thread.join(timeout=10)

    # -- the connection, for the rank ------------------------------------------------------------

    def take(self, timeout_s: float) -> list[Any]:
        taken = []
        with contextlib.suppress(queue.Empty):
            taken.append(self._commands.get(timeout=timeout_s or 1e-6))
            while True:
                taken.append(self._commands.get_nowait())
        return taken

    def send(self, message: Any) -> None:
        for packed in _sent(message)["outputs"]:
            output = wire.unpack_output(packed)
            self._loop.call_soon_threadsafe(self._outputs[output.number], output)


def _sent(message: Any) -> Any:
    """What arrives of a message."""
    return json.loads(wire.encode(message)[4:])


@contextlib.contextmanager
def model_engine(path: Path) -> Iterator[ModelEngine]:
    """The engine of a checkpoint; it ends with the block."""
    engine = ModelEngine(path)
    try:
        yield engine
    finally:
        engine.stop()
