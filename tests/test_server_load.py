# SPDX-License-Identifier: Apache-2.0
"""The service under much of everything: a soak, clients that go away, bodies at random.

The soaks run for SOAK_S seconds, if that is in the environment:

    SOAK_S=1800 python -m pytest -m slow tests/test_server_load.py -k soak --log-cli-level INFO
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support import checkpoints
from support.service import (
    Answer,
    EngineThread,
    Stub,
    eventually,
    exchange,
    program,
    request,
    stub,
)

from gptneox.config.settings import EngineSection
from gptneox.devices import select
from gptneox.engine.paged import PagedEngine

OPENAI, CHAT, TGI, STREAM = (
    *("/v1/completions", "/v1/chat/completions"),
    *("/generate", "/generate_stream"),
)
SMALL = {"prompt": "a", "max_tokens": 2, "temperature": 0}
MIB = 1 << 20
SOAK_S, NUM_ROUNDS = float(os.environ.get("SOAK_S", "60")), 8

logger = logging.getLogger(__name__)  # --log-cli-level INFO shows what was measured


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> PagedEngine:
    """It writes abcabc…, or xyz and an end; few requests and few blocks fit."""
    path = checkpoints.write_chain_checkpoint(tmp_path_factory.mktemp("x") / "chain", "abca", "xyz")
    section = EngineSection(max_batch_size=4, num_blocks=48, block_size=16, max_prefill_tokens=32)
    return PagedEngine.from_pretrained(path, section, select("cpu"), dtype="float32")


@contextlib.asynccontextmanager
async def real_service(engine: PagedEngine, **settings: Any) -> AsyncIterator[Stub]:
    """A service over the engine; when it ends, every block is free."""
    async with EngineThread(engine) as thread, stub(real=thread, **settings) as served:
        yield served
        await eventually(lambda: is_at_rest(served), 20)
    engine.block_manager.check([])


def is_at_rest(served: Stub) -> bool:
    """Nothing of any request is left, in the front or in the engine."""
    (thread,) = served.service.engines
    assert isinstance(thread, EngineThread)
    engine = thread.engine
    blocks = engine.block_manager
    return (
        served.service.num_open == served.service.num_running == 0
        and not thread._choices
        and not engine.has_work
        and len(blocks.free) == blocks.num_blocks
    )


# -- clients that go away ------------------------------------------------------------------------


async def go_away(port: int, when: str, choose: random.Random) -> None:
    """Ask, and close the connection."""
    long = {"ignore_eos": True, "max_tokens": 300, "prompt": "a" * choose.randint(1, 200)}
    body = {**long, "stream": when != "whole", "n": choose.randint(1, 2)}
    if when == "after the end":
        body["max_tokens"] = 3
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request(OPENAI, body))
    if when == "at once":
        await writer.drain()
    elif when == "whole":
        await asyncio.sleep(choose.random() * 0.05)
    elif when == "in the stream":
        await reader.readuntil(b"data: ")
        await asyncio.sleep(choose.random() * 0.02)
    elif when == "after the end":
        await reader.readuntil(b"[DONE]")
    writer.transport.abort() if choose.random() < 0.5 else writer.close()


@pytest.mark.parametrize("number", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_clients_that_go_away_leave_nothing(number: int, engine: PagedEngine) -> None:
    """While they wait, in a prefill, in a stream, in a whole answer, after the end."""
    choose = random.Random(5)
    whens = ["at once", "whole", "in the stream", "in the stream", "after the end"]

    async def go() -> None:
        async with real_service(engine) as served:
            for first in range(0, number, 10):
                every = [whens[(first + i) % len(whens)] for i in range(10)]
                await asyncio.gather(*(go_away(served.port, when, choose) for when in every))
                await eventually(lambda: is_at_rest(served), 10)
            answer = await exchange(served.port, request(OPENAI, SMALL))
            assert answer.json["choices"][0]["text"] == "bc"
            await eventually(lambda: not served.connections())
            text = served.service.metrics.text().decode()
            received = re.search(r"requests_received_total\{[^}]*} (\d+)", text)
            cancelled = re.search(r"requests_cancelled_total\{[^}]*} (\d+)", text)
            assert received
            assert cancelled
            assert number // 2 < int(cancelled[1]) < int(received[1]) <= number + 1

    asyncio.run(go())


def test_a_client_that_goes_away_is_forgotten_within_a_step_or_two(engine: PagedEngine) -> None:
    async def go() -> None:
        async with real_service(engine) as served:
            for _ in range(5):
                reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
                body = {**SMALL, "max_tokens": 700, "ignore_eos": True, "stream": True}
                writer.write(request(OPENAI, body))
                await reader.readuntil(b"data: ")
                engine.stats.steps = []
                writer.transport.abort()
                await eventually(lambda: is_at_rest(served))
                # the loop of the front sees it, the next round begins with the command
                assert len(engine.stats.steps) < 30
            engine.stats.steps = None

    asyncio.run(go())


# -- bodies at random ----------------------------------------------------------------------------

ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 5, 0.5, 1.0, 1e308, -1e-9, 2**31, 2**63, -(2**63), 10**30),
    *("", "a", "abc", "\ud800", "\U0001f600", "\0", "x" * 3000, "-1", "1", "NaN", "<|endoftext|>"),
    *([], {}, [[]], [{}], [None], ["a"], [1, 2], [[1], [2, 3]], [1, "a"], [1.5], [True], [-1]),
    *([335], [336], [10**20], {"a": 1}, {"1": 5}, {"1": 500}, {"type": "text"}, ["a"] * 200),
]
FIELDS = {
    OPENAI: (
        *("model", "prompt", "max_tokens", "temperature", "top_p", "n", "best_of", "stop", "seed"),
        *("logprobs", "echo", "logit_bias", "presence_penalty", "frequency_penalty", "suffix"),
        *("stream", "stream_options", "user", "metadata", "top_k", "min_p", "repetition_penalty"),
        *("stop_token_ids", "ignore_eos", "min_tokens", "allowed_token_ids", "prompt_logprobs"),
        *("logprob_token_ids", "response_format", "include_stop_str_in_output", "what"),
    ),
    CHAT: (
        *("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "n", "stop"),
        *("logprobs", "top_logprobs", "tools", "tool_choice", "response_format", "stream", "seed"),
    ),
    TGI: ("inputs", "parameters", "stream", "prompt", "max_tokens", "model"),
    STREAM: ("inputs", "parameters", "stream"),
    "/": ("inputs", "parameters", "stream"),
    "/tokenize": ("prompt", "inputs", "add_special_tokens", "model", "messages"),
    "/detokenize": ("tokens", "model"),
    "/v2/models/neox/generate": ("id", "text_input", "parameters"),
}
PARAMETERS = (
    *("best_of", "decoder_input_details", "details", "do_sample", "frequency_penalty", "grammar"),
    *("max_new_tokens", "repetition_penalty", "return_full_text", "seed", "stop", "temperature"),
    *("top_k", "top_n_tokens", "top_p", "truncate", "typical_p", "watermark", "adapter_id", "what"),
)
GOOD: dict[str, dict[str, Any]] = {
    OPENAI: SMALL,
    CHAT: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    TGI: {"inputs": "a", "parameters": {"max_new_tokens": 2}},
    STREAM: {"inputs": "a", "parameters": {"max_new_tokens": 2}},
    "/": {"inputs": "a", "parameters": {"max_new_tokens": 2}},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [70]},
    "/v2/models/neox/generate": {"text_input": "a", "parameters": {"max_new_tokens": 2}},
}


def random_body(path: str, choose: random.Random) -> bytes:
    """Mostly a good body with one or two odd fields; sometimes its bytes are damaged."""
    body = json.loads(json.dumps(GOOD[path]))
    for _ in range(choose.choice((0, 1, 1, 1, 2, 3))):
        value: Any = choose.choice(ODD)
        if choose.random() < 0.1:
            value = [value, choose.choice(ODD)]
        inner = body.get("parameters")
        if isinstance(inner, dict) and choose.random() < 0.7:
            inner[choose.choice(PARAMETERS)] = value
        else:
            body[choose.choice(FIELDS[path])] = value
    data = bytearray(json.dumps(body).encode())
    if choose.random() < 0.15:
        for _ in range(choose.randint(1, 4)):
            where = choose.randrange(len(data))
            kind = choose.random()
            if kind < 0.4:
                data[where] = choose.randrange(256)
            elif kind < 0.7:
                del data[where : where + choose.randint(1, 9)]
            else:
                data[where:where] = bytes([choose.randrange(256)])
            data = data or bytearray(b" ")
    return bytes(data)


def check_answer(path: str, body: bytes, answer: Answer) -> None:
    """A good answer or a refusal, each in its form."""
    assert answer.status < 500, (path, body, answer)
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        assert answer.status == 200
        for event in answer.events:
            assert event == "[DONE]" or "error" not in json.loads(event), (path, body, event)
        return
    content = answer.json
    if answer.status == 200:
        assert "error" not in content, (path, body, content)
    else:
        assert answer.status in (400, 404, 413, 422), (path, body, answer)
        assert content["error"], (path, body, content)


@pytest.mark.parametrize("number", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_body_is_a_fault_of_the_service(number: int, engine: PagedEngine) -> None:
    """Only 200 and 4xx, the engine goes on, and nothing of a request is left."""
    statuses: dict[int, int] = {}

    async def go() -> None:
        async with real_service(engine, template="dolly-v2") as served:

            async def client(seed: int) -> None:
                choose = random.Random(seed)
                for _ in range(number // 4):
                    path = choose.choice(list(FIELDS))
                    body = random_body(path, choose)
                    answer = await exchange(served.port, request(path, body), 60)
                    check_answer(path, body, answer)
                    statuses[answer.status] = statuses.get(answer.status, 0) + 1

            await asyncio.gather(*(client(seed) for seed in range(4)))
            answer = await exchange(served.port, request(OPENAI, SMALL))
            assert answer.json["choices"][0]["text"] == "bc"

    asyncio.run(go())
    logger.info("%s", statuses)
    assert sum(statuses.values()) == number
    assert min(statuses[200], statuses[400], statuses[422]) > number // 20


# -- a soak --------------------------------------------------------------------------------------


@dataclass
class Load:
    """Clients of every kind, one request after the other each."""

    port: int
    pause_s: float  # between two requests of a client, on average
    num_done: int = 0
    seconds: list[float] = field(default_factory=list)  # of whole answers
    counts: dict[str, int] = field(default_factory=dict)

    async def run(self, seconds: float, seed: int, num_clients: int = 3) -> None:
        """Until the time is over."""
        end = time.monotonic() + seconds
        await asyncio.gather(*(self._client(end, 100 * seed + i) for i in range(num_clients)))

    async def _client(self, end: float, seed: int) -> None:
        choose = random.Random(seed)
        kinds: list[Callable[[random.Random], Any]] = [
            *(self._whole, self._whole, self._stream, self._stream, self._tgi, self._cancel),
            *(self._cancel, self._wrong, self._look),
        ]
        while time.monotonic() < end:
            kind = choose.choice(kinds)
            await kind(choose)
            self.counts[kind.__name__] = self.counts.get(kind.__name__, 0) + 1
            await asyncio.sleep(choose.random() * 2 * self.pause_s)

    async def _ask(self, path: str, body: Any = None, status: int = 200) -> Answer:
        answer = await exchange(self.port, request(path, body), 60)
        assert answer.status == status, answer
        return answer

    def _body(self, choose: random.Random) -> dict[str, Any]:
        body: dict[str, Any] = {
            "prompt": "abc "[: choose.randint(1, 4)] * choose.randint(1, 30),
            "max_tokens": choose.randint(1, 24),
            "temperature": choose.choice((0, 1)),
        }
        more: list[dict[str, Any]] = [
            *({}, {"n": 2}, {"logprobs": 3, "echo": True}, {"stop": ["c", "zz"]}, {"seed": 4}),
            *({"presence_penalty": 0.5}, {"logit_bias": {"70": 3}}, {"best_of": 2}),
        ]
        return body | choose.choice(more)

    async def _whole(self, choose: random.Random) -> None:
        start = time.monotonic()
        answer = await self._ask(OPENAI, self._body(choose))
        assert answer.json["choices"][0]["finish_reason"]
        self.seconds.append(time.monotonic() - start)

    async def _stream(self, choose: random.Random) -> None:
        body = self._body(choose)
        body.pop("best_of", None)
        answer = await self._ask(OPENAI, {**body, "stream": True})
        assert answer.chunks[-1]["choices"][0]["finish_reason"]

    async def _tgi(self, choose: random.Random) -> None:
        parameters = {"max_new_tokens": choose.randint(1, 16), "details": True, "stop": ["ca"]}
        path = choose.choice((TGI, STREAM, "/"))
        await self._ask(path, {"inputs": "ab" * choose.randint(1, 20), "parameters": parameters})

    async def _cancel(self, choose: random.Random) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        body = {**self._body(choose), "max_tokens": 200, "ignore_eos": True, "stream": True}
        body.pop("best_of", None)
        data = request(OPENAI, body)
        writer.write(data[: choose.choice((20, len(data), len(data), len(data)))])
        if choose.random() < 0.6:
            with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
                await asyncio.wait_for(reader.read(choose.randint(1, 2000)), 0.2)
        writer.transport.abort() if choose.random() < 0.5 else writer.close()

    async def _wrong(self, choose: random.Random) -> None:
        body: Any = choose.choice(({"prompt": ""}, {"prompt": "a", "n": 0}, b"{", [1]))
        await self._ask(OPENAI, body, 400)
        await self._ask(OPENAI, {"prompt": "a", "model": f"m{choose.random()}"}, 404)
        await self._ask(TGI, {"inputs": "a", "parameters": {"top_p": 7}}, 422)
        await self._ask(OPENAI, {"prompt": "abc" * 3000, "max_tokens": 1}, 400)

    async def _look(self, choose: random.Random) -> None:
        for path in ("/health", "/metrics", "/v1/models", "/info"):
            await self._ask(path)
        await self._ask("/tokenize", {"prompt": "abc"})


def descriptors(pid: int | str) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def rss_bytes(pid: int | str) -> int:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGESIZE")


def assert_flat(rows: Seq[dict[str, float]], name: str, room: float = 0.0) -> None:
    """A quantity is no larger at the end than after a quarter of the time."""
    values = [row[name] for row in rows]
    assert values[-1] <= values[len(values) // 4] + room, (name, values)


def report(load: Load, rows: Seq[dict[str, float]]) -> None:
    logger.info("%s", load.counts)
    for row in rows:
        logger.info("%s", row)


@pytest.mark.parametrize("seconds", [3, pytest.param(SOAK_S, marks=pytest.mark.slow)])
def test_a_soak_leaves_memory_tasks_descriptors_and_blocks_as_they_were(
    seconds: float, engine: PagedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "gptneox.server")  # every record would be kept
    rows: list[dict[str, float]] = []

    async def go() -> Load:
        async with real_service(engine) as served:
            load = Load(served.port, 0.01 if seconds <= 60 else 0.2)
            await load.run(1.0, 99)
            for number in range(NUM_ROUNDS):
                await load.run(seconds / NUM_ROUNDS, number)
                await eventually(lambda: is_at_rest(served) and not served.connections(), 20)
                gc.collect()
                rows.append(
                    {
                        "rss": rss_bytes("self"),
                        "descriptors": descriptors("self"),
                        "tasks": len(asyncio.all_tasks()),
                        "blocks": len(engine.block_manager.free),
                        "objects": len(gc.get_objects()),
                    }
                )
            return load

    load = asyncio.run(go())
    report(load, rows)
    assert len(load.counts) == 6
    for name in ("tasks", "descriptors"):
        assert_flat(rows, name)
    assert {row["blocks"] for row in rows} == {engine.block_manager.num_blocks}
    assert_flat(rows, "rss", 12 * MIB)
    assert_flat(rows, "objects", 1000)


@pytest.mark.slow
def test_a_soak_of_the_program(tmp_path: Path) -> None:
    rows: list[dict[str, float]] = []
    # a small KV cache: memory is taken when a block is written for the first time
    options = ("--max_batch_size", "4", "--block_size", "16", "--num_blocks", "200")
    with program(*options, cwd=tmp_path) as served:
        front = served.process.pid
        (engine,) = children(front)

        def value(name: str) -> float:
            match = re.search(rf"^gptneox:{name}\{{[^}}]*}} (.*)$", text, re.M)
            assert match
            return float(match[1])

        load = Load(served.port, 0.02 if SOAK_S <= 60 else 0.3)
        asyncio.run(load.run(2.0, 99))
        for number in range(NUM_ROUNDS):
            first = len(load.seconds)
            asyncio.run(load.run(SOAK_S / NUM_ROUNDS, number))
            time.sleep(1.5)  # the next sign of life of rank 0 brings its state
            text = served.get("/metrics").body.decode()
            rows.append(
                {
                    "rss of the front": rss_bytes(front),
                    "rss of the engine": rss_bytes(engine),
                    "descriptors of the front": descriptors(front),
                    "descriptors of the engine": descriptors(engine),
                    **{
                        name: value(name)
                        for name in (
                            *("num_requests_running", "num_requests_waiting"),
                            "kv_cache_usage_perc",
                        )
                    },
                }
            )
            seconds = sorted(load.seconds[first:])
            rows[-1]["p99 s"] = seconds[int(0.99 * len(seconds))]
    report(load, rows)
    for name in ("front", "engine"):
        assert_flat(rows, f"descriptors of the {name}", 1)  # of the look at /metrics
        assert_flat(rows, f"rss of the {name}", 12 * MIB)
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert {row[name] for row in rows} == {0}
    assert not [line for line in served.lines if "Traceback" in line or " 500 " in line]


def children(pid: int) -> Iterator[int]:
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == pid:
                yield int(entry.name)
