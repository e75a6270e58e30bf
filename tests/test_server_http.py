# SPDX-License-Identifier: Apache-2.0
"""server/asgi.py, connection.py and app.py: bodies, keys, framing, slow clients, the log."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import importlib
import json
import logging
import resource
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from support.service import JSON, Stub, ask, eventually, exchange, parse, request, run_with

from gptneox.server import asgi, connection
from gptneox.server.errors import Kind, ServiceError

PATH = "/v1/completions"
SMALL = {"prompt": "hi", "max_tokens": 2}


# -- bodies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b'"x"', b"5", b"null", b'{"prompt": "x"', b'\xef\xbb\xbf{"prompt": "x"}',
        b'{"prompt": "x", "prompt": "y"}', b'{"prompt": "\xff"}', b'{"prompt": "x", "top_p": NaN}',
        b'{"prompt": "x", "temperature": Infinity}', b'{"prompt": "x"} {}',
        b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b'{"prompt": "x", "seed": ' + b"9" * 400 + b"}",
        b'{"prompt": "x", "temperature": ' + b"9" * 400 + b"}",
        b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": "x", "temperature": 1e999}', b'{"prompt": "x", "stop": "\\ud800"}\x00',
        gzip.compress(b'{"prompt": "x"}', mtime=0),
    ],
)  # fmt: skip
def test_what_is_no_body_is_refused_in_the_form_of_the_route(body: bytes) -> None:
    async def go(served: Stub) -> None:
        answer = await ask(served, PATH, body)
        assert answer.status == 400, answer.body
        assert set(answer.json["error"]) == {"message", "type", "param", "code"}
        assert (await ask(served, PATH, SMALL)).status == 200

    run_with(go)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "x" * 99])
def test_another_content_type_is_refused(kind: str) -> None:
    """A page of another origin can send these without asking, but not JSON."""

    async def go(served: Stub) -> None:
        answer = await ask(served, PATH, SMALL, headers={"content-type": kind})
        assert answer.status == 400
        good = {"content-type": "Application/JSON; charset=utf-8"}
        assert (await ask(served, PATH, SMALL, headers=good)).status == 200

    run_with(go)


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_that_is_too_large_is_refused(is_announced: bool) -> None:
    """Announced or not; the client sees the answer, though it writes before it reads."""
    body = json.dumps({"prompt": "x" * 3_000_000}).encode()

    async def go(served: Stub) -> None:
        data = request(PATH, body)
        if not is_announced:
            head = request(PATH, b"", headers={"transfer-encoding": "chunked"})
            head = head.replace(b"content-length: 0\r\n", b"")
            data = head + f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
        answer = await exchange(served.port, data)
        assert answer.status == 413
        assert answer.json["error"]["code"] == "request_too_large"

    run_with(go, max_body_bytes=1 << 20)


def test_expect_continue_is_answered_before_the_body() -> None:
    async def go(served: Stub) -> None:
        body = json.dumps(SMALL).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        head, _, _ = request(PATH, body, headers={"expect": "100-continue"}).partition(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        writer.write(body)
        assert parse(await reader.read()).status == 200
        writer.close()
        large = {"expect": "100-continue", "content-length": "99999999"}
        answer = await exchange(served.port, request(PATH, b"", headers=large))
        assert answer.status == 413  # and nothing was read

    run_with(go)


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Room for a thousand connections, both ends of which are in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"a process may open {hard} files, {wanted} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_body_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "BODY_S", 0.2)

    async def go(served: Stub) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(request(PATH, b"{", headers={"content-length": "50"}))
        answer = parse(await asyncio.wait_for(reader.read(), 5))
        assert answer.status == 408
        assert answer.headers["connection"] == "close"
        writer.close()

    run_with(go)


def test_a_head_that_trickles_or_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.3)

    async def trickle(port: int, data: bytes) -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        start = time.monotonic()

        async def write() -> None:
            for byte in data:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.05)

        writing = asyncio.create_task(write())
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writing.cancel()
        writer.close()
        return time.monotonic() - start

    async def go(served: Stub) -> None:
        idle = [trickle(served.port, b"") for _ in range(5)]
        slow = trickle(served.port, b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 99)
        waiting = asyncio.gather(slow, *idle)
        assert (await ask(served, PATH, SMALL)).status == 200
        assert max(await waiting) < 5
        assert min(await asyncio.gather(slow_again(served))) > 0.3

    async def slow_again(served: Stub) -> float:
        """A stream that takes longer than a head may is not cut."""
        start = time.monotonic()
        served.engine.step_s = 0.1
        answer = await ask(served, PATH, {**SMALL, "max_tokens": 5, "stream": True})
        assert answer.chunks[-1]["choices"][0]["finish_reason"] == "length"
        return time.monotonic() - start

    run_with(go)


def test_a_thousand_idle_connections_delay_nobody_and_are_closed(
    monkeypatch: pytest.MonkeyPatch, many_descriptors: None
) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 2.0)

    async def go(served: Stub) -> None:
        opened = [asyncio.open_connection("127.0.0.1", served.port) for _ in range(1000)]
        idle = await asyncio.gather(*opened)
        await eventually(lambda: len(served.connections()) == 1000)
        assert (await ask(served, PATH, SMALL)).status == 200
        assert len(served.connections()) >= 1000, "the answer came while all of them were open"
        for reader, writer in idle:
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.wait_for(reader.read(), 10) == b""
            writer.close()
        await eventually(lambda: not served.connections())
        assert (await ask(served, PATH, SMALL)).status == 200

    run_with(go)


def test_large_heads_are_refused() -> None:
    async def go(served: Stub) -> None:
        for head in ({"x": "y" * 20_000}, {f"x{i}": "y" * 100 for i in range(200)}):
            answer = await exchange(served.port, request(PATH, SMALL, headers=head))
            assert answer.status in (400, 431)
        assert (await ask(served, PATH, SMALL)).status == 200

    run_with(go)


# -- framing -------------------------------------------------------------------------------------


def test_old_pipelined_and_closing_requests() -> None:
    async def go(served: Stub) -> None:
        body = json.dumps({**SMALL, "stream": True}).encode()
        old = f"POST {PATH} HTTP/1.0\r\ncontent-type: application/json\r\n"
        raw = f"{old}content-length: {len(body)}\r\n\r\n".encode() + body
        answer = await exchange(served.port, raw)
        assert "transfer-encoding" not in answer.headers  # HTTP/1.0 knows no chunks
        assert answer.events[-1] == "[DONE]"
        two = request("/v1/models", headers={"connection": "keep-alive"}) + request("/health")
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(two)
        raw = await reader.read()
        writer.close()
        assert raw.count(b"HTTP/1.1 200 OK") == 2
        assert raw.index(b'"data"') < raw.index(b'"status"')

    run_with(go)


# -- keys ----------------------------------------------------------------------------------------

KEYS = ("secret-1", "pässwörd")


@pytest.mark.parametrize("stream", [False, True])
def test_a_connection_that_has_ended_is_let_go(stream: bool) -> None:
    """No timer holds it; at many requests in a second that would be much memory."""

    async def go(served: Stub) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        body = {**SMALL, "stream": stream}
        for _ in range(3):
            writer.write(request(PATH, body, headers={"connection": "keep-alive"}))
            await reader.readuntil(b"0\r\n\r\n" if stream else b"}}}")
        (made,) = served.connections()
        reference = weakref.ref(made)
        del made
        writer.close()
        await eventually(lambda: not served.connections())
        await asyncio.sleep(0.05)
        gc.collect()
        assert reference() is None

    run_with(go)


def test_tokenizing_delays_no_other_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go(served: Stub) -> None:
        tokenizer = served.application.context.vocabulary.tokenizer
        encode = tokenizer.encode

        def encode_slowly(text: str, **options: Any) -> Any:
            time.sleep(1.0)
            return encode(text, **options)

        monkeypatch.setattr(tokenizer, "encode", encode_slowly)
        slow = asyncio.create_task(ask(served, PATH, SMALL))
        await asyncio.sleep(0.05)
        for _ in range(5):
            answer = await ask(served, PATH, {"prompt": [66], "max_tokens": 5})
            assert answer.json["choices"][0]["text"] == "abcde"
        assert not slow.done()
        assert (await slow).status == 200

    run_with(go)


def test_every_route_but_health_and_the_page_needs_a_key() -> None:
    async def go(served: Stub) -> None:
        routes = [r for r in served.application.fastapi.routes if hasattr(r, "methods")]
        paths = {route.path.replace("{model_id:path}", "neox") for route in routes}
        assert {"/health", "/metrics", "/openapi.json", "/tokenize", "/v1/models"} <= paths
        for path in [*paths, "/nothing", "/health/", "//health", "/v1/../health", "/%68ealth/x"]:
            for method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE"):
                answer = await ask(served, path, method=method)
                if path == "/health":
                    assert answer.status in (200, 405)
                    continue
                if (method, path) == ("GET", "/"):  # the page, which asks for the key
                    assert answer.headers["content-type"].startswith("text/html")
                    continue
                assert answer.status == 401, (method, path)
                assert answer.headers["www-authenticate"] == "Bearer"
        assert (await ask(served, "/metrics", headers={"host": "x/health"})).status == 401
        raw = b"GET http://x/health?/metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        assert (await exchange(served.port, raw)).status == 401

    run_with(go, keys=KEYS)


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        ({"authorization": "Bearer secret-1"}, True),
        ({"authorization": "bearer  secret-1 "}, True),
        ({"authorization": "Bearer pässwörd"}, True),
        ({"x-api-key": "secret-1"}, True),
        ({"authorization": "Bearer Secret-1"}, False),
        ({"authorization": "Bearer "}, False),
        ({"authorization": "Bearer"}, False),
        ({"authorization": "secret-1"}, False),
        ({"authorization": "Basic secret-1"}, False),
        ({"authorization": "Bearer secret-1x"}, False),
        ({"authorization": "Bearer secret"}, False),
        ({}, False),
    ],
)
def test_keys(header: dict[str, str], accepted: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def go(served: Stub) -> None:
        answer = await ask(served, PATH, SMALL, headers=header)
        assert answer.status == (200 if accepted else 401)
        if not accepted:
            error = answer.json["error"]
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")

    with caplog.at_level(logging.DEBUG):
        run_with(go, keys=KEYS)
    assert "secret" not in caplog.text


def test_no_key_is_needed_where_none_is_set() -> None:
    async def go(served: Stub) -> None:
        assert (await ask(served, PATH, SMALL)).status == 200
        empty = {"authorization": "Bearer "}  # some clients send it
        assert (await ask(served, PATH, SMALL, headers=empty)).status == 200

    run_with(go)


def test_pages_of_listed_origins_alone_may_ask() -> None:
    async def go(served: Stub) -> None:
        for origin, is_listed in (("http://a.example", True), ("http://b.example", False)):
            ask_first = {"origin": origin, "access-control-request-method": "POST"}
            answer = await ask(served, PATH, method="OPTIONS", headers=ask_first)
            assert (answer.status == 200) == is_listed
            allowed = answer.headers.get("access-control-allow-origin")
            assert (allowed == origin) == is_listed
            assert "access-control-allow-credentials" not in answer.headers

    run_with(go, keys=KEYS, cors_origins="http://a.example, http://c.example")


def test_without_origins_no_page_may() -> None:
    async def go(served: Stub) -> None:
        answer = await ask(served, "/v1/models", headers={"origin": "http://a.example"})
        assert not [name for name in answer.headers if name.startswith("access-control")]

    run_with(go)


def test_the_path_of_a_proxy() -> None:
    """A proxy may take the prefix off or leave it there."""

    async def go(served: Stub) -> None:
        for prefix in ("", "/llm"):
            assert (await ask(served, f"{prefix}/health")).status == 200
            assert (await ask(served, f"{prefix}/v1/models")).status == 401
            header = {"authorization": "Bearer secret-1"}
            assert (await ask(served, f"{prefix}/v1/models", headers=header)).status == 200

    run_with(go, keys=KEYS, root_path="/llm")


# -- ids and the log -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kept"), [("my-id:1", True), ("x" * 128, True), ("x" * 129, False), ("a b", False)]
)
def test_request_ids(given: str, kept: bool) -> None:
    async def go(served: Stub) -> None:
        for path, body in ((PATH, SMALL), ("/nothing", None), (PATH, {"prompt": ""})):
            answer = await ask(served, path, body, headers={"x-request-id": given})
            assert (answer.headers["x-request-id"] == given) == kept
            assert answer.headers["x-request-id"].isprintable()

    run_with(go)


def test_the_log_holds_no_control_characters_and_no_prompts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def go(served: Stub) -> None:
        evil = "\x1b[31mred\r\nERROR forged\u2028"
        await ask(served, PATH, {"prompt": evil, "model": evil, "user": evil})
        await ask(served, PATH, {"prompt": evil, "max_tokens": 2})
        await ask(served, "/%1b%5b31m%0aforged%E2%80%A8")
        await ask(served, "/x", headers={"x-request-id": "a\x1bb"})
        await ask(served, "/" + "y" * 5000)

    with caplog.at_level(logging.DEBUG, logger="gptneox"):
        run_with(go)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) >= 4
    assert all(message.isprintable() for message in messages), messages
    assert all(len(message) < 400 for message in messages)
    assert not any("red" in message for message in messages)


def test_prompts_are_logged_where_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    async def go(served: Stub) -> None:
        await ask(served, PATH, {"prompt": "red\x1b[31m", "max_tokens": 2})

    with caplog.at_level(logging.INFO, logger="gptneox"):
        run_with(go, log_prompts=True)
    assert "prompt: red\\x1b[31m" in caplog.text


def test_a_fault_of_our_own_is_logged_and_says_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def go(served: Stub) -> None:
        def fail(*_: Any) -> None:
            raise KeyError("internal 0x7f")

        monkeypatch.setattr(served.service, "open", fail)
        answer = await ask(served, PATH, SMALL)
        assert answer.status == 500
        assert answer.json["error"]["code"] == "internal_error"
        assert b"0x7f" not in answer.body

    run_with(go)
    assert "internal 0x7f" in caplog.text
    assert caplog.text.count("Traceback") == 1


# -- health, readiness, metrics, the description -------------------------------------------------


def test_health_and_readiness() -> None:
    async def go(served: Stub) -> None:
        async def states() -> tuple[int, int]:
            answers = [await ask(served, path) for path in ("/health", "/ready")]
            return answers[0].status, answers[1].status

        assert await states() == (200, 200)
        served.engine.is_held = True
        held = asyncio.create_task(ask(served, PATH, {**SMALL, "n": 4}))
        await eventually(lambda: served.service.num_open == 4)
        assert await states() == (200, 503)  # full: no reason to restart it
        served.engine.is_held = False
        await held
        served.service.is_draining = True
        assert await states() == (200, 503)
        answer = await ask(served, PATH, SMALL)
        assert (answer.status, answer.headers["retry-after"]) == (503, "30")
        served.service.is_draining = False
        limits, served.engine.limits = served.engine.limits, None
        assert await states() == (503, 503)
        answer = await ask(served, PATH, SMALL)
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        served.engine.limits = limits
        served.service.lose(served.engine, "engine 0 has gone")
        assert await states() == (503, 503)
        assert (await ask(served, PATH, SMALL)).status == 503

    run_with(go, max_concurrent_requests=4)


def test_the_description_names_every_body() -> None:
    async def go(served: Stub) -> None:
        description = (await ask(served, "/openapi.json")).json
        schemas = description["components"]["schemas"]
        for path, name in ((PATH, "CompletionBody"), ("/v1/chat/completions", "ChatBody")):
            body = description["paths"][path]["post"]["requestBody"]["content"]
            assert body["application/json"]["schema"]["$ref"].endswith(f"/{name}")
            assert "model" in schemas[name]["properties"]
        text = json.dumps(description)
        names = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
        assert names <= schemas.keys()

    run_with(go)


class Recorder:
    """Stands for the providers, tracers, meters and loggers of an SDK: notes every call."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        def called(*args: Any, **named: Any) -> Recorder:
            self._calls.append(name)
            return self

        return called


def test_nothing_is_told_to_an_sdk_for_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    """FastAPI sends spans, metrics and logs by itself where one is installed."""
    pytest.importorskip("fastapi.telemetry", reason="this FastAPI has no telemetry")
    calls: list[str] = []
    for module, kind in (("trace", "tracer"), ("metrics", "meter"), ("_logs", "logger")):
        found = importlib.import_module(f"opentelemetry.{module}")
        monkeypatch.setattr(found, f"get_{kind}_provider", lambda: Recorder(calls))
        monkeypatch.setattr(found, f"get_{kind}", lambda *args, **named: Recorder(calls))
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")

    async def go(served: Stub) -> None:
        assert (await ask(served, PATH, SMALL)).status == 200
        assert (await ask(served, PATH, b"{")).status == 400
        assert (await ask(served, "/nowhere")).status == 404

    run_with(go)
    assert calls == []


def test_every_dialect_has_an_answer_to_every_error() -> None:
    async def go(served: Stub) -> None:
        for dialect in served.application.dialects:
            for kind in Kind:
                answer = dialect.answer_error(ServiceError(kind, "x", retry_after_s=7))
                assert 400 <= answer.status_code < 600
                assert answer.headers["retry-after"] == "7"
                assert answer.headers["content-type"] == JSON["content-type"]

    run_with(go)
