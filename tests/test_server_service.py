# SPDX-License-Identifier: Apache-2.0
"""server/service.py and metrics.py over a scripted engine: admission, and how requests end."""

from __future__ import annotations

import asyncio
import gc
import random
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from support.service import Stub, ask, eventually, request, run_with

from gptneox.server import service as service_module
from gptneox.server.service import OnOutput
from gptneox.server.wire import Output

PATH = "/v1/completions"
LONG = {"prompt": "hi", "max_tokens": 100, "ignore_eos": True}


async def counts(served: Stub) -> dict[str, float]:
    """All series of /metrics by name and labels, without the model's name."""
    text = (await ask(served, "/metrics")).body.decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    series = dict(line.rsplit(" ", 1) for line in lines)
    return {
        re.sub(r'model_name="neox",?|^gptneox:', "", name).replace("{}", ""): float(value)
        for name, value in series.items()
    }


def is_at_rest(served: Stub) -> bool:
    """Nothing of any request is left."""
    none = not any(engine.choices for engine in served.engines)
    return none and served.service.num_open == 0 and served.service.num_running == 0


# -- admission -----------------------------------------------------------------------------------


def test_what_is_too_much_is_refused_at_once() -> None:
    async def go(served: Stub) -> None:
        served.engine.is_held = True
        first = [asyncio.create_task(ask(served, PATH, {**LONG, "n": 2})) for _ in range(2)]
        await eventually(lambda: served.service.num_open == 4)
        start = time.monotonic()
        answers = await asyncio.gather(*(ask(served, PATH, LONG) for _ in range(20)))
        assert time.monotonic() - start < 2
        for answer in answers:
            assert answer.status == 429
            assert answer.json["error"]["code"] == "rate_limit_exceeded"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert (await ask(served, "/health")).status == 200
        served.engine.is_held = False
        assert [answer.status for answer in await asyncio.gather(*first)] == [200, 200]
        assert (await ask(served, PATH, LONG)).status == 200
        assert (await counts(served))['requests_rejected_total{reason="overloaded"}'] == 20
        # more than there is room for at any time: no repetition would help
        answer = await ask(served, PATH, {**LONG, "n": 5})
        assert (answer.status, answer.json["error"]["param"]) == (400, "n")

    run_with(go, max_concurrent_requests=4)


def test_a_client_that_repeats_succeeds_in_the_end() -> None:
    openai = pytest.importorskip("openai")

    async def go(served: Stub) -> None:
        served.engine.step_s = 0.01
        busy = asyncio.create_task(ask(served, PATH, {**LONG, "max_tokens": 40}))
        await eventually(lambda: served.service.num_open)
        async with openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{served.port}/v1", api_key="-"
        ) as c:
            made = await c.completions.create(model="neox", prompt="hi", max_tokens=2)
        assert made.choices[0].text == "ab"
        assert (await busy).status == 200

    run_with(go, max_concurrent_requests=1)


def test_the_engine_with_the_least_to_do_gets_a_request() -> None:
    async def go(served: Stub) -> None:
        for engine in served.engines:
            engine.is_held = True
        tasks = [asyncio.create_task(ask(served, PATH, {**LONG, "n": 2}))]
        await eventually(lambda: served.service.num_open == 2)
        tasks.append(asyncio.create_task(ask(served, PATH, LONG)))
        await eventually(lambda: served.service.num_open == 3)
        assert sorted(len(engine.choices) for engine in served.engines) == [1, 2]
        served.service.lose(served.engines[0], "gone")  # its requests fail, the others go on
        served.engines[1].is_held = False
        assert sorted([answer.status for answer in await asyncio.gather(*tasks)]) == [200, 503]
        await eventually(lambda: is_at_rest(served))

    run_with(go, num_engines=2)


# -- how requests end ----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["queued", "streaming"])
def test_a_client_that_goes_away_costs_nothing(stream: bool, when: str) -> None:
    async def go(served: Stub) -> None:
        served.engine.step_s = 0.01
        served.engine.is_held = when == "queued"
        for number in range(5):
            _, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(request(PATH, {**LONG, "n": 2, "stream": stream}))
            await eventually(lambda: len(served.engine.choices) == 2)
            if when == "streaming":
                await asyncio.sleep(0.05)
            writer.transport.abort() if number % 2 else writer.close()
            await eventually(lambda: is_at_rest(served), 1)
        assert len(served.engine.aborted) == 10
        series = await counts(served)
        assert series["requests_cancelled_total"] == series["requests_received_total"] == 5

    run_with(go)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["request_timeout_s", "queue_timeout_s"])
def test_deadlines(stream: bool, name: str) -> None:
    async def go(served: Stub) -> None:
        served.engine.is_held = True
        answer = await ask(served, PATH, {**LONG, "stream": stream})
        assert answer.status == 504
        assert answer.json["error"]["code"] == "timeout"
        assert answer.headers["x-should-retry"] == "false"
        assert is_at_rest(served)
        assert served.engine.aborted
        assert (await counts(served))['request_failure_total{reason="timeout"}'] == 1

    run_with(go, **{name: 0.2})


def test_a_deadline_in_a_stream_is_an_event() -> None:
    async def go(served: Stub) -> None:
        answer = await ask(served, PATH, {**LONG, "stream": True})
        assert answer.status == 200
        assert answer.chunks[0]["choices"][0]["text"] == "a"
        assert answer.chunks[-1]["error"]["code"] == "timeout"
        assert is_at_rest(served)

    run_with(go, step_s=0.05, request_timeout_s=0.3)


def test_the_wait_for_the_first_token_is_over_when_it_comes() -> None:
    body = {**LONG, "max_tokens": 10}
    answer = run_with(lambda served: ask(served, PATH, body), step_s=0.05, queue_timeout_s=0.2)
    assert answer.status == 200


def test_a_client_that_does_not_read_delays_nobody_and_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its tokens wait in one place, and its deadline ends it."""
    monkeypatch.setattr("gptneox.server.asgi.READ_GRACE_S", 0.2)

    async def go(served: Stub) -> None:
        filler = "x" * 100_000

        def script(number: int, on_output: OnOutput) -> None:
            async def flood() -> None:
                for _ in range(200):
                    on_output(Output(number, text=filler, num_tokens=1, token_ids=[30]))
                    await asyncio.sleep(0.001)

            served.flood = asyncio.create_task(flood())  # type: ignore[attr-defined]

        served.engine.script = script
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", served.port))
        slow.sendall(request(PATH, {**LONG, "stream": True}))
        await eventually(lambda: served.service.num_open == 1)
        served.engine.script = None
        start = time.monotonic()
        assert (await ask(served, PATH, LONG)).status == 200
        assert time.monotonic() - start < 0.9
        (running,) = served.service._running
        assert len(running._pending) <= 1
        await eventually(lambda: is_at_rest(served), 5)
        transports = served.connections
        await eventually(lambda: not transports())
        slow.close()

    run_with(go, request_timeout_s=1.0)


def test_abort_and_end_may_cross() -> None:
    """Outputs that come after the end, whatever it was, change nothing."""

    async def go(served: Stub) -> None:
        takers: list[OnOutput] = []
        served.engine.script = lambda number, on_output: takers.append(on_output)
        task = asyncio.create_task(ask(served, PATH, {**LONG, "n": 2}))
        await eventually(lambda: len(takers) == 2)
        takers[0](Output(0, text="a", num_tokens=1, token_ids=[30], finish_reason="stop"))
        assert served.service.num_open == 1
        takers[1](Output(1, finish_reason="error", error="not finite"))
        assert is_at_rest(served)
        for taker in takers:
            taker(Output(0, text="b", num_tokens=1, finish_reason="stop"))
            taker(Output(1, finish_reason="error", error="again"))
        assert (await task).status == 500
        series = await counts(served)
        assert series['request_failure_total{reason="failed"}'] == 1
        assert sum(v for n, v in series.items() if n.startswith("request_success")) == 0

    run_with(go)


def test_comments_keep_a_waiting_stream_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "PING_S", 0.1)
    monkeypatch.setattr("gptneox.server.dialects.openai.PING_S", 0.1)
    body = {**LONG, "max_tokens": 2, "stream": True}
    answer = run_with(lambda served: ask(served, PATH, body), step_s=0.35)
    assert answer.body.startswith(b": ")
    assert answer.body.count(b"\n\n: ") >= 3
    assert len(answer.chunks) == 2


# -- metrics -------------------------------------------------------------------------------------


def test_the_counts_are_those_of_the_clients() -> None:
    """Random requests, a third of which go away: every one is counted once."""

    async def go(served: Stub) -> None:
        choose = random.Random(3)
        seen = {"success": 0, "gone": 0, "refused": 0, "tokens": 0}

        async def one() -> None:
            num_tokens, stream = choose.randint(1, 6), choose.random() < 0.5
            body = {"prompt": "the cat", "max_tokens": num_tokens, "stream": stream}
            kind = choose.choice(["good", "good", "bad", "gone"])
            if kind == "bad":
                answer = await ask(served, PATH, {**body, "model": f"m{choose.random()}"})
                assert answer.status == 404
                seen["refused"] += 1
            elif kind == "gone":
                reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
                writer.write(request(PATH, {**body, "max_tokens": 100, "stream": True}))
                await reader.readexactly(1)
                writer.close()
                seen["gone"] += 1
            else:
                answer = await ask(served, PATH, body)
                assert answer.status == 200
                seen["success"] += 1
                seen["tokens"] += num_tokens

        for _ in range(10):
            await asyncio.gather(*(one() for _ in range(20)))
        await eventually(lambda: is_at_rest(served))
        series = await counts(served)
        success = sum(v for n, v in series.items() if n.startswith("request_success_total"))
        assert success == seen["success"]
        assert series["requests_cancelled_total"] == seen["gone"]
        assert series["requests_received_total"] == seen["success"] + seen["gone"]
        assert series["e2e_request_latency_seconds_count"] == seen["success"]
        assert series["request_generation_tokens_count"] == seen["success"]
        assert series["request_generation_tokens_sum"] == seen["tokens"]
        assert series["generation_tokens_total"] >= seen["tokens"]
        assert series["time_to_first_token_seconds_count"] >= seen["success"]
        gap = series["generation_tokens_total"] - series["time_to_first_token_seconds_count"]
        assert series["inter_token_latency_seconds_count"] == gap
        assert series["num_requests_running"] == series["num_requests_waiting"] == 0
        assert series["kv_cache_usage_perc"] == 0
        assert len(series) < 400  # whatever names clients make up

    run_with(go, step_s=0.005)


def test_the_names_of_vllm() -> None:
    async def go(served: Stub) -> None:
        text = (await ask(served, "/metrics")).body.decode()
        for name in (
            *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
            *("num_preemptions_total", "prefix_cache_queries_total", "prefix_cache_hits_total"),
            *(
                "prompt_tokens_total",
                "generation_tokens_total",
                "time_to_first_token_seconds_count",
            ),
        ):
            assert f'vllm:{name}{{model_name="neox"}}' in text, name

    run_with(go, metrics_prefix="vllm")


@pytest.mark.slow
def test_nothing_grows_over_many_requests() -> None:
    async def go(served: Stub) -> None:
        choose = random.Random(1)

        async def one() -> None:
            body = {"prompt": "hi", "max_tokens": 5, "stream": choose.random() < 0.5}
            if choose.random() < 0.3:
                _, writer = await asyncio.open_connection("127.0.0.1", served.port)
                writer.write(request(PATH, {**body, "max_tokens": 100}))
                await asyncio.sleep(0.01)
                writer.close()
            else:
                assert (await ask(served, PATH, body)).status == 200

        sizes = []
        for _ in range(4):
            for _ in range(25):
                await asyncio.gather(*(one() for _ in range(25)))
            await eventually(lambda: is_at_rest(served))
            await asyncio.sleep(0.2)
            gc.collect()
            num_descriptors = len(list(Path("/proc/self/fd").iterdir()))
            sizes.append((len(asyncio.all_tasks()), num_descriptors, rss_bytes()))
        tasks, descriptors, memory = zip(*sizes, strict=True)
        assert tasks[-1] == tasks[0]
        assert descriptors[-1] <= descriptors[0]
        assert memory[-1] - memory[1] < 8 << 20

    run_with(go, step_s=0.001)


def rss_bytes() -> int:
    fields: Any = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096
