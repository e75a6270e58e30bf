# SPDX-License-Identifier: Apache-2.0
"""HTTP below the dialects: bodies, event streams, keys, request ids, the log of requests."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from collections.abc import Sequence as Seq
from typing import Any, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptneox.server.errors import ClientGone, Kind, ServiceError
from gptneox.server.page import PATH as PAGE_PATH

logger = logging.getLogger(__name__)

# A body has so long to arrive, and a second more for so many bytes.
BODY_S, BODY_BYTES_PER_S = 10.0, 16 << 10
# What is too large is read and forgotten up to here, so that the client gets to see the answer.
MAX_DISCARDED_BYTES = 64 << 20
# After the deadline of its request, what is written may take so much longer to be read.
READ_GRACE_S = 10.0
MAX_HEAD_BYTES = 16 << 10
HEALTH_PATH = "/health"
EVENT_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_Result = TypeVar("_Result")


def to_json(content: Any) -> bytes:
    """Strict JSON: no NaN, and valid UTF-8 whatever the strings hold."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


class JsonAnswer(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """See `to_json`."""
        return to_json(content)


# -- what comes in -------------------------------------------------------------------------------


async def read_json(request: HttpRequest, max_bytes: int) -> dict[str, Any]:
    """The JSON object in the body.

    Raises:
        ServiceError: it is too large, comes too slowly, or is not a JSON object.
        ClientGone: the client went away.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ServiceError(
            Kind.INVALID,
            f"the content type is {content_type or 'not given'}; application/json is expected",
        )
    body = await _read_body(request, max_bytes)
    try:
        content = json.loads(
            body.decode("utf-8"),
            parse_int=_short_integer,
            parse_constant=_no_constant,
            object_pairs_hook=_distinct,
        )
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ServiceError(Kind.INVALID, f"the body is not valid JSON: {reason}") from error
    if not isinstance(content, dict):
        raise ServiceError(
            Kind.INVALID, f"the body is a JSON {type(content).__name__}; an object is expected"
        )
    return content


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _distinct(pairs: Seq[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name[:100]!a} is given twice")
            seen.add(name)
    return content


def _short_integer(text: str) -> int:
    if len(text) > 4000:  # Python refuses to write what is longer than 4300 digits
        raise ValueError(f"an integer of {len(text)} characters; 4000 are the most")
    return int(text)


async def _read_body(request: HttpRequest, max_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "")
    size = int(announced) if announced.isascii() and announced.isdigit() else 0
    too_large = ServiceError(
        Kind.BODY_TOO_LARGE, f"the body is too large; {max_bytes} bytes are the most"
    )
    is_waiting = request.headers.get("expect", "").lower() == "100-continue"
    if size > (max_bytes if is_waiting else max(max_bytes, MAX_DISCARDED_BYTES)):
        raise too_large
    start, parts, received = time.monotonic(), list[bytes](), 0
    while True:
        left = start + BODY_S + received / BODY_BYTES_PER_S - time.monotonic()
        try:
            message = await asyncio.wait_for(request.receive(), max(0.0, left))
        except (asyncio.TimeoutError, TimeoutError):
            raise ServiceError(Kind.SLOW_BODY, "the body did not arrive in time") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        received += len(part)
        if received <= max_bytes:
            parts.append(part)
        elif received > max(max_bytes, MAX_DISCARDED_BYTES):
            raise too_large
        if not message.get("more_body"):
            break
    if received > max_bytes:
        raise too_large
    return b"".join(parts)


async def until_disconnect(request: HttpRequest, work: Awaitable[_Result]) -> _Result:
    """The result of `work`, which is cancelled when the client goes away.

    Raises:
        ClientGone: it did.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        await _cancel(working, gone)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# -- what goes out -------------------------------------------------------------------------------


def no_answer() -> Response:
    """For a client that has gone; nginx' status for it is for the log alone."""
    return Response(status_code=499)


class EventStream(Response):
    """Server-sent events; ends when the events do, or when the client goes away."""

    def __init__(
        self, events: AsyncIterator[bytes], deadline: float, on_end: Callable[[], None]
    ) -> None:
        """Make the answer; its status is 200.

        Args:
            events: whole events, each with its empty line.
            deadline: by time.monotonic; a client that does not read is cut off soon after it.
            on_end: called once, whatever happens.
        """
        super().__init__(media_type="text/event-stream", headers=EVENT_HEADERS)
        del self.headers["content-length"]
        self._events, self._deadline, self._on_end = events, deadline, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the events, and watch for the client's end meanwhile."""
        writing = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({writing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        except (asyncio.TimeoutError, TimeoutError):
            logger.warning("a client did not read its answer; the connection is cut")
            if abort := scope.get("state", {}).get("abort"):
                abort()
        finally:
            self._on_end()
            await _cancel(writing, gone)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            await self._send(send, {"body": event, "more_body": True})
        await self._send(send, {"body": b""})

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        left = self._deadline + READ_GRACE_S - time.monotonic()
        await asyncio.wait_for(send({"type": "http.response.body", **message}), max(0.0, left))


def event(content: Any) -> bytes:
    """A server-sent event with a JSON object."""
    return b"data: " + to_json(content) + b"\n\n"


# -- around every request ------------------------------------------------------------------------


def escaped(text: str) -> str:
    """Text of a client for the log: no control characters, and not long."""
    shown = ascii(text)[1:-1]
    return shown if len(shown) <= 200 else f"{shown[:200]}…"


class Guard:
    """The outermost part: request ids, one log line for each request, faults of our own."""

    def __init__(
        self, app: ASGIApp, root_path: str, answer: Callable[[str, ServiceError], Response]
    ) -> None:
        """Wrap an application.

        Args:
            app: the application.
            root_path: what a proxy has taken off the path, or left there.
            answer: the answer to an error, for a path.
        """
        self._app, self._root_path, self._answer = app, root_path, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return
        scope["root_path"] = self._root_path
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        start, status, is_complete = time.monotonic(), 0, False

        async def send_with_id(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            elif message["type"] == "http.response.body":
                is_complete = not message.get("more_body")
            await send(message)

        try:
            if _head_bytes(scope) > MAX_HEAD_BYTES:
                error = ServiceError(
                    Kind.INVALID, f"the head is too large; {MAX_HEAD_BYTES} bytes are the most"
                )
                await self._answer(scope["path"], error)(scope, receive, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("%s: a fault of the service", escaped(request_id))
            if not is_complete:
                raise  # the connection is closed in the middle of the answer
        finally:
            logger.info(
                "%s %s %s %d %.0f ms",
                escaped(request_id),
                scope["method"],
                escaped(scope["path"]),
                status,
                1000 * (time.monotonic() - start),
            )


def _head_bytes(scope: Scope) -> int:
    size = len(scope["raw_path"]) + len(scope["query_string"])
    return size + sum(len(name) + len(value) + 4 for name, value in scope["headers"])


class KeyCheck:
    """All but /health and the page at / needs a key, paths that do not exist too."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Iterable[str],
        root_path: str,
        answer: Callable[[str, ServiceError], Response],
    ) -> None:
        """Wrap an application.

        Args:
            app: the application.
            keys: those that are accepted; none: every request is.
            root_path: what a proxy has taken off the path.
            answer: the answer to an error, for a path.
        """
        self._app, self._answer = app, answer
        self._keys = [key.encode() for key in keys]
        self._open_paths = (HEALTH_PATH, root_path + HEALTH_PATH)
        self._page_paths = (PAGE_PATH, root_path + PAGE_PATH)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        if self._keys and not self._is_open(scope) and not self._is_accepted(Headers(scope=scope)):
            error = ServiceError(
                Kind.UNAUTHORIZED, "a valid key is needed: Authorization: Bearer KEY"
            )
            await self._answer(scope["path"], error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            return True
        return scope["path"] in self._page_paths and scope["method"] == "GET"

    def _is_accepted(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        value = given.strip(" \t").encode("latin-1")  # the bytes that Starlette has read as Latin-1
        matches = [hmac.compare_digest(value, key) for key in self._keys]  # all are looked at
        return any(matches)
