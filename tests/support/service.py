# SPDX-License-Identifier: Apache-2.0
"""The service under test: in this process over a scripted engine, or as the program it is."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import queue
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from transformers import PreTrainedTokenizerFast

from gptneox.chat_templates import find_template
from gptneox.config.settings import ServerSection
from gptneox.engine.loop import EngineLoop
from gptneox.engine.paged import PagedEngine
from gptneox.engine.sequence import SamplingParams, TokenLogprobs
from gptneox.server.app import Application
from gptneox.server.connection import Connection
from gptneox.server.dialects.base import Context
from gptneox.server.group import EngineGroup
from gptneox.server.metrics import EngineState, Metrics
from gptneox.server.service import OnOutput, Service
from gptneox.server.vocabulary import Vocabulary
from gptneox.server.wire import Limits, Message, Output, Stats
from gptneox.server.worker import RankZero, limits_of
from support.processes import MAIN, clean_environ
from support.tokenizers import byte_level_tokenizer

NAME = "neox"
LIMITS = Limits(
    max_positions=128,
    vocab_size=336,
    num_blocks=64,
    block_size=16,
    max_batch_size=8,
    world_size=1,
    dtype="float32",
    device="cpu",
    enable_prefix_caching=True,
)
JSON = {"content-type": "application/json"}


_backend = functools.cache(byte_level_tokenizer)


class ScriptedEngine:
    """An engine that answers every prompt with the letters a, b, c, …, without a model.

    `step_s` passes between two tokens. `script`, if set, sees every choice that starts, and may
    answer it otherwise. What runs is in `choices`, what was cancelled in `aborted`.
    """

    def __init__(self, step_s: float = 0.0) -> None:
        self.limits: Limits | None = LIMITS
        self.step_s = step_s
        self.is_held = False  # no token comes
        self.script: Callable[[int, OnOutput], None] | None = None
        self.choices: dict[int, asyncio.Task[None]] = {}
        self.added: list[tuple[list[int], SamplingParams]] = []
        self.aborted: list[int] = []
        tokenizer = _backend()
        self._letters = [tokenizer.encode(c).ids[0] for c in "abcdefghijklmnopqrstuvwxyz"]

    def add(self, prompt: Seq[int], params: SamplingParams, on_output: OnOutput) -> int:
        number = len(self.added)
        self.added.append((list(prompt), params))
        if self.script:
            asyncio.get_running_loop().call_soon(self.script, number, on_output)
        else:
            work = self._run(number, len(prompt), params, on_output)
            self.choices[number] = asyncio.get_running_loop().create_task(work)
        return number

    def abort(self, number: int) -> None:
        if number in self.choices:
            self.aborted.append(number)
            self.choices.pop(number).cancel()

    def cost(self, prompt: Seq[int]) -> tuple[float, float]:
        return len(self.choices), 0.0

    async def _run(
        self, number: int, num_prompt: int, params: SamplingParams, on_output: OnOutput
    ) -> None:
        scores = params.prompt_logprobs is not None
        for i in range(max(1, params.max_new_tokens)):
            await asyncio.sleep(self.step_s)
            for _ in range(20 if self.step_s else 0):  # a busy machine may oversleep: the service
                await asyncio.sleep(0)  # sends the last token before the next one comes
            while self.is_held:
                await asyncio.sleep(0.01)
            is_last = i + 1 >= params.max_new_tokens
            if is_last:
                del self.choices[number]
            token_ids = [self._letters[i % 26]][: params.max_new_tokens]
            on_output(
                Output(
                    number,
                    text="abcdefghijklmnopqrstuvwxyz"[i % 26] if token_ids else "",
                    num_tokens=len(token_ids),
                    token_ids=token_ids,
                    logprobs=[scored(t) for t in token_ids] if params.logprobs is not None else [],
                    prompt_logprobs=[scored(1)] * (num_prompt - 1) if scores and not i else [],
                    finish_reason="length" if is_last else "",
                )
            )


def scored(token_id: int) -> TokenLogprobs:
    """A token of the scripted engine with its log-probabilities, one of them infinite."""
    return TokenLogprobs(token_id, -0.5, {token_id: -0.5, token_id + 1: -float("inf")})


class EngineThread(EngineGroup):
    """A real engine behind the code of front and rank 0: a thread instead of socket and process."""

    def __init__(self, engine: PagedEngine) -> None:
        super().__init__(
            *("0", Path("none")),
            heartbeat_timeout_s=60,
            on_lost=lambda group: None,
            on_step=lambda num_tokens: None,
        )
        self.engine, self.limits = engine, limits_of(engine)
        self._commands: queue.SimpleQueue[Message] = queue.SimpleQueue()

    async def __aenter__(self) -> EngineThread:
        loop = asyncio.get_running_loop()

        def send(message: Message) -> None:
            loop.call_soon_threadsafe(self._take, json.loads(json.dumps(message)))

        self.send = send
        rank = RankZero(EngineLoop(self.engine), self)  # type: ignore[arg-type]
        self._thread = threading.Thread(target=rank.run)
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._send({"type": "stop"})
        await asyncio.to_thread(self._thread.join, 30)
        assert not self._thread.is_alive()

    def _send(self, message: Message) -> None:
        self._commands.put(json.loads(json.dumps(message)))

    def take(self, timeout_s: float) -> list[Message]:
        """As `FrontLink`."""
        taken = []
        with contextlib.suppress(queue.Empty):
            taken.append(self._commands.get(timeout=timeout_s or 1e-9))
            while True:
                taken.append(self._commands.get_nowait())
        return taken


@dataclass
class Stub:
    """A service over scripted engines, at a port of this process."""

    port: int
    service: Service
    engines: list[ScriptedEngine]
    application: Application
    connections: Callable[[], set[Any]]  # that are open

    @property
    def engine(self) -> ScriptedEngine:
        return self.engines[0]


@contextlib.asynccontextmanager
async def stub(
    *,
    keys: Seq[str] = (),
    num_engines: int = 1,
    step_s: float = 0.0,
    template: str = "",
    real: EngineThread | None = None,
    **settings: Any,
) -> AsyncIterator[Stub]:
    """A service over scripted engines; `template` as --chat_template, `settings` as in [server].

    `real` takes their place: an engine with a checkpoint of `write_chain_checkpoint`.
    """
    own = ServerSection(**settings)
    engines: list[Any] = [real] if real else [ScriptedEngine(step_s) for _ in range(num_engines)]
    state = EngineState(Stats(num_free_blocks=64), 64, 0.0)
    metrics = Metrics(own.metrics_prefix, NAME, lambda: [real.state() if real else state])
    service = Service(own, engines, metrics)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_backend(), eos_token="<|endoftext|>")
    vocabulary = Vocabulary(tokenizer, LIMITS.vocab_size, engines[0].limits.max_positions)
    info = {"eos_token": "<|endoftext|>"}
    chat = find_template(template, tokenizer) if template else None
    context = Context(
        service, vocabulary, own, (NAME, "an/alias", "gr\u00f6\u00dfe/\u6a21\u578b"), 1, info, chat
    )
    application = Application(context, keys)
    config = uvicorn.Config(
        application.asgi,
        port=0,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        h11_max_incomplete_event_size=16 << 10,
        timeout_graceful_shutdown=1,
    )
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup()  # without its main loop, which looks around ten times a second only
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Stub(port, service, engines, application, lambda: server.server_state.connections)
    finally:
        for listener in server.servers:
            listener.close()
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        vocabulary.close()


def run_with(function: Callable[[Stub], Any], **settings: Any) -> Any:
    """Run an async test function with a stub."""

    async def main() -> Any:
        async with stub(**settings) as served:
            return await asyncio.wait_for(function(served), 60)

    return asyncio.run(main())


# -- a plain client ------------------------------------------------------------------------------


@dataclass
class Answer:
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body, parse_constant=_refuse)

    @property
    def events(self) -> list[str]:
        """What the events of a stream hold; every one ends with an empty line."""
        text = self.body.decode()
        assert text.endswith("\n\n")
        events = [event for event in text[:-2].split("\n\n") if not event.startswith(":")]
        assert all(event.startswith("data: ") and "\n" not in event for event in events)
        return [event.removeprefix("data: ") for event in events]

    @property
    def chunks(self) -> list[Any]:
        """The JSON objects of a stream, which ends with one [DONE]."""
        *chunks, done = self.events
        assert done == "[DONE]"
        return [json.loads(chunk, parse_constant=_refuse) for chunk in chunks]


def _refuse(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def request(
    path: str, body: Any = None, *, method: str = "", headers: dict[str, str] | None = None
) -> bytes:
    """The bytes of a request; a body that is not bytes is sent as JSON."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = {"host": "localhost", "connection": "close"}
    if body is not None:
        lines |= {"content-length": str(len(data))} | JSON
    lines |= headers or {}
    head = [f"{method or ('GET' if body is None else 'POST')} {path} HTTP/1.1"]
    head += [f"{name}: {value}" for name, value in lines.items()]
    return "\r\n".join(head).encode("utf-8") + b"\r\n\r\n" + data


async def exchange(port: int, data: bytes, timeout: float = 20) -> Answer:
    """Send bytes; the answer, when the connection has been closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        raw = await asyncio.wait_for(reader.read(), timeout)
    finally:
        writer.close()
    return parse(raw)


async def ask(
    served: Stub,
    path: str,
    body: Any = None,
    *,
    method: str = "",
    headers: dict[str, str] | None = None,
) -> Answer:
    """One request to a stub."""
    return await exchange(served.port, request(path, body, method=method, headers=headers))


def parse(raw: bytes) -> Answer:
    """An answer from its bytes."""
    head, _, body = raw.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = _unchunked(body)
    return Answer(int(status.split()[1]), headers, body)


def _unchunked(raw: bytes) -> bytes:
    body = b""
    while raw:
        size, _, raw = raw.partition(b"\r\n")
        body += raw[: int(size, 16)]
        raw = raw[int(size, 16) + 2 :]
    return body


async def eventually(condition: Callable[[], Any], timeout: float = 5) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        await asyncio.sleep(0.005)


# -- the program ---------------------------------------------------------------------------------


@dataclass
class Program:
    """`main.py --task serve` with its log."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    port: int = 0
    key: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_for(self, pattern: str, timeout: float = 60) -> re.Match[str]:
        """Wait for a line of the log."""
        end, seen = time.monotonic() + timeout, 0
        while True:
            while seen < len(self.lines):
                if match := re.search(pattern, self.lines[seen]):
                    return match
                seen += 1
            ended = self.process.poll() is not None and not self._reader.is_alive()
            if ended or time.monotonic() > end:
                raise AssertionError(f"no {pattern!r} in {self.lines}")
            time.sleep(0.02)

    def watch(self) -> None:
        """Read the log in a thread."""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line)

    def get(self, path: str) -> Answer:
        headers = {"authorization": f"Bearer {self.key}"}
        return self.send(urllib.request.Request(self.url + path, headers=headers))

    def post(self, path: str, body: Any) -> Answer:
        headers = {"authorization": f"Bearer {self.key}", **JSON}
        data = json.dumps(body).encode()
        return self.send(urllib.request.Request(self.url + path, data, headers))

    def send(self, made: urllib.request.Request) -> Answer:
        try:
            with urllib.request.urlopen(made, timeout=60) as answer:
                return Answer(answer.status, dict(answer.headers.items()), answer.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, dict(error.headers.items()), error.read())


@contextlib.contextmanager
def program(*argv: str | Path, cwd: Path, wait: bool = True, **environ: str) -> Iterator[Program]:
    """The service as a user starts it, on a free port."""
    process = subprocess.Popen(
        [sys.executable, str(MAIN), "--task", "serve", "--port", "0", *map(str, argv)],
        cwd=cwd,
        env=clean_environ(TMPDIR=str(cwd), **environ),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    served = Program(process)
    served.watch()
    try:
        if wait:
            served.port = int(served.wait_for(r"at https?://.*:(\d+)")[1])
            served.wait_for("engine .* is ready")
        yield served
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
