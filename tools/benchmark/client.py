# SPDX-License-Identifier: Apache-2.0
"""Clients of an OpenAI-compatible service: many streamed completions at once, in one thread.

Each request has a connection of its own. A moment is taken when the bytes of a piece are read from
the socket, before anything is made of them. What the client itself costs is measured with it.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from benchmark.errors import UsageError, WorkerError

LAG_EVERY_S = 0.05  # rare, for its own cost is the client's
_LINE_BYTES = 1 << 20
_DONE = b"[DONE]"
# What is wrong with an answer that does not follow HTTP, or is no JSON of a completion.
_FAULTS = (ValueError, LookupError, TypeError, AttributeError)


class Refused(Exception):
    """A request ends without its answer."""

    def __init__(self, kind: str, detail: str = "") -> None:
        """`kind` is one of few, to count by; `detail` is what the service said."""
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.detail = kind, detail


@dataclass(frozen=True)
class Service:
    """Where a service is, and what every request needs."""

    host: str
    port: int
    path: str = ""  # before /v1
    is_tls: bool = False
    key: str = ""
    timeout_s: float = 600.0  # of a request

    @classmethod
    def of(cls, url: str, key: str, timeout_s: float) -> Service:
        """The service at a URL, which may end with /v1.

        Raises:
            UsageError: it is no URL of a service.
        """
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise UsageError(
                f"--url {url!r} is no URL of a service; one such as http://127.0.0.1:8000 is "
                "expected"
            )
        is_tls = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if is_tls else 80), path, is_tls, key, timeout_s)

    @property
    def url(self) -> str:
        """Its URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.is_tls else ''}://{host}:{self.port}{self.path}"

    def head(self, method: str, path: str, num_bytes: int = 0) -> bytes:
        """The head of a request."""
        lines = [
            f"{method} {self.path}{path} HTTP/1.1",
            f"host: {self.host}:{self.port}",
            "connection: close",
        ]
        if self.key:
            lines.append(f"authorization: Bearer {self.key}")
        if method == "POST":
            lines += ["content-type: application/json", f"content-length: {num_bytes}"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


@dataclass
class Request:
    """A request to be sent."""

    at_s: float  # from the start, with arrivals
    body: bytes  # JSON
    num_new: int  # tokens that are asked for


@dataclass
class Outcome:
    """What became of a request. Moments are in seconds from the start of the run."""

    at_s: float  # when it arrived: its latencies count from here
    sent_s: float = 0.0
    pieces_s: list[float] = field(default_factory=list)  # with tokens
    num_prompt: int = 0
    num_tokens: int = 0
    error: str = ""  # its kind
    detail: str = ""


@dataclass
class Cost:
    """What the client itself took."""

    cpu_s: float = 0.0
    lags_s: list[float] = field(default_factory=list)  # how late its event loop was


# -- one request -----------------------------------------------------------------------------------


class _Exchange:
    """One request on a connection of its own."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._writer: asyncio.StreamWriter | None = None

    async def open(self, head: bytes, body: bytes) -> tuple[int, AsyncIterator[bytes]]:
        """Send; the status and the pieces of the answer's body.

        Raises:
            Refused: nothing listens there.
            OSError, ValueError, EOFError: the connection broke, or what came is no HTTP.
        """
        service = self._service
        tls = ssl.create_default_context() if service.is_tls else None
        try:
            reader, writer = await asyncio.open_connection(
                service.host, service.port, ssl=tls, limit=_LINE_BYTES
            )
        except OSError as error:
            raise Refused("no connection", error.strerror or str(error)) from error
        self._writer = writer
        writer.write(head + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        if not lines[0].startswith("HTTP/"):
            raise ValueError("the answer is no HTTP")
        status = int(lines[0].split()[1])
        pairs = (line.partition(":") for line in lines[1:])
        headers = {name.strip().lower(): value.strip().lower() for name, _, value in pairs}
        return status, _body(reader, headers)

    def close(self) -> None:
        """Close the connection."""
        if self._writer is not None:
            self._writer.close()


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The body, piece by piece. Source: RFC 9112, sections 6 and 7."""
    if headers.get("transfer-encoding") == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while piece := await reader.read(_LINE_BYTES):
            yield piece


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[tuple[float, bytes]]:
    """Server-sent events: when the piece with the event's end was read, and the data."""
    rest = b""
    async for piece in pieces:
        now = time.perf_counter()
        *whole, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in whole:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    yield now, line[5:].strip()


def _message(content: bytes) -> str:
    """What a service says in an error, on one line."""
    try:
        error = json.loads(content)["error"]
        text = error["message"] if isinstance(error, dict) else error
    except _FAULTS:
        text = content.decode("utf-8", "replace")
    return " ".join(str(text).split())[:200]


async def get_json(service: Service, path: str) -> Any:
    """The JSON at a path.

    Raises:
        Refused: there is none.
    """
    exchange = _Exchange(service)

    async def get() -> Any:
        status, pieces = await exchange.open(service.head("GET", path), b"")
        content = b"".join([piece async for piece in pieces])
        if status != 200:
            raise Refused(f"HTTP {status}", _message(content))
        return json.loads(content)

    return await _guarded(exchange, get(), service.timeout_s)


async def _guarded(exchange: _Exchange, work: Any, timeout_s: float) -> Any:
    """The result of `work`, with every way to fail as `Refused`; the connection is closed."""
    try:
        return await asyncio.wait_for(work, timeout_s)
    except (asyncio.TimeoutError, TimeoutError) as error:
        raise Refused("timeout", f"no end within {timeout_s:g} s") from error
    except (OSError, EOFError) as error:
        raise Refused("connection broken", str(error)) from error
    except (*_FAULTS, asyncio.LimitOverrunError) as error:
        raise Refused("answer not understood", str(error)) from error
    finally:
        exchange.close()


async def _complete(service: Service, request: Request, outcome: Outcome, start: float) -> None:
    """Send a completion and note when its tokens come.

    Raises:
        Refused: it failed.
    """
    exchange = _Exchange(service)

    async def post() -> None:
        head = service.head("POST", "/v1/completions", len(request.body))
        status, pieces = await exchange.open(head, request.body)
        if status != 200:
            content = b"".join([piece async for piece in pieces])
            raise Refused(f"HTTP {status}", _message(content))
        async for now, data in _events(pieces):
            if data == _DONE:
                return
            _note(outcome, json.loads(data), now - start)
        raise Refused("connection broken", "the stream has no [DONE]")

    outcome.sent_s = time.perf_counter() - start
    await _guarded(exchange, post(), service.timeout_s)
    outcome.num_tokens = outcome.num_tokens or len(outcome.pieces_s)
    if not outcome.pieces_s:
        raise Refused("no token")


def _note(outcome: Outcome, chunk: dict[str, Any], now_s: float) -> None:
    """A chunk of a stream: tokens, the count of tokens, or an error."""
    if "error" in chunk:
        raise Refused("error in the stream", _message(json.dumps(chunk).encode()))
    for choice in chunk["choices"]:
        # The end of a stream may come alone, without a token.
        if choice["text"] or choice.get("finish_reason") is None:
            outcome.pieces_s.append(now_s)
    if usage := chunk.get("usage"):
        outcome.num_prompt = usage["prompt_tokens"]
        outcome.num_tokens = usage["completion_tokens"]


# -- many ------------------------------------------------------------------------------------------


async def find_model(service: Service) -> str:
    """The first model that a service lists.

    Raises:
        WorkerError: it cannot be asked, or lists none.
    """
    try:
        listed = await get_json(service, "/v1/models")
        return str(listed["data"][0]["id"])
    except Refused as refused:
        hint = "is the service there? See --url"
        if refused.kind in ("HTTP 401", "HTTP 403"):
            hint = "put its key into OPENAI_API_KEY"
        raise WorkerError(f"{service.url}/v1/models: {refused}", hint) from refused
    except _FAULTS as error:
        raise WorkerError(f"{service.url}/v1/models lists no model", "see --url") from error


async def send_all(
    service: Service, requests: Sequence[Request], concurrency: int | None
) -> tuple[list[Outcome], Cost]:
    """Send all requests, and wait for their ends.

    Args:
        service: takes them.
        requests: in the order in which they are sent.
        concurrency: so many are under way at any time; None: each is sent at its moment.

    Returns:
        An outcome for each request, and what the client took.
    """
    cost = Cost()
    start, cpu_before = time.perf_counter(), time.process_time()
    outcomes = [Outcome(request.at_s) for request in requests]
    watching = asyncio.create_task(_watch(cost))

    async def one(i: int) -> None:
        try:
            await _complete(service, requests[i], outcomes[i], start)
        except Refused as refused:
            outcomes[i].error, outcomes[i].detail = refused.kind, refused.detail

    if concurrency is None:
        tasks = []
        for i, request in enumerate(requests):
            await asyncio.sleep(start + request.at_s - time.perf_counter())
            tasks.append(asyncio.create_task(one(i)))
        await asyncio.gather(*tasks)
    else:
        waiting = iter(range(len(requests)))

        async def work() -> None:
            for i in waiting:
                outcomes[i].at_s = time.perf_counter() - start
                await one(i)

        await asyncio.gather(*(work() for _ in range(concurrency)))
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    cost.cpu_s = time.process_time() - cpu_before
    return outcomes, cost


async def _watch(cost: Cost) -> None:
    """Note how much later than asked for the event loop comes back."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(LAG_EVERY_S)
        cost.lags_s.append(time.perf_counter() - before - LAG_EVERY_S)
