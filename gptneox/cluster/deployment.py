# SPDX-License-Identifier: Apache-2.0
"""The service as a deployment of Ray Serve: each replica is a service of ours, with all its ranks.

Ray places, restarts and scales the replicas, and takes the requests. A replica starts its service
by our launcher, passes bytes on to it and back, and ends with it. `build` is what `import_path` of
a YAML for `serve deploy` names.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import urllib.request
from collections.abc import AsyncIterator
from typing import Any
from weakref import WeakSet

import aiohttp
from ray import serve
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from yarl import URL

from gptneox.cluster.group import WATCH_S, HostProcess, Hosts, free_port, launcher
from gptneox.cluster.plan import ServicePlan, Shape

logger = logging.getLogger("ray.serve")

LAST_BYTES_S = 5.0  # after its service has gone, a replica passes on what has come
# Source: RFC 9110, section 7.6.1; the lengths of bodies are those of the next connection, too.
_HOP_BY_HOP = {b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade",
    b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"}  # fmt: skip


class Replica:
    """One service of ours, on the hosts of its placement group."""

    def __init__(self, shape: dict[str, Any], options: list[str], limits: dict[str, Any]) -> None:
        """Start it, and wait until it is ready.

        Args:
            shape: fields of `Shape`.
            options: main.py's.
            limits: grace_s, of its end; max_body_bytes, of a request; start_timeout_s.

        Raises:
            RuntimeError: it has ended, or is not ready in time.
        """
        self._limits, self._shape = limits, Shape(**shape)
        self._answers = WeakSet[aiohttp.ClientResponse]()  # that are being passed on
        self._is_stopping = False
        self._session: aiohttp.ClientSession | None = None
        grace_s = limits["grace_s"]
        self._hosts = Hosts(self._shape, options, grace_s)
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        words = ["serve", "serve", *options, "--host", "127.0.0.1", "--port", str(port)]
        words += ["--replicas", "1"]
        self._front = HostProcess(launcher(*words), self._hosts.environ, grace_s)
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        threading.Thread(target=self._watch, daemon=True).start()

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + self._limits["start_timeout_s"]
        while time.monotonic() < end:
            if lost := self._lost():
                raise RuntimeError(f"{lost} before it was ready; its log says why")
            try:
                with urllib.request.urlopen(f"{self._url}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except OSError:  # also of another status
                pass
            time.sleep(WATCH_S)
        raise RuntimeError(f"the service is not ready after {self._limits['start_timeout_s']} s")

    def _lost(self) -> str:
        """Why the service has gone, wholly or in part."""
        status = self._front.status()
        if status is not None:
            return f"the service has ended with status {status}"
        return self._hosts.lost()

    def _watch(self) -> None:
        """End this replica when its service has gone: Ray then starts another."""
        while not self._is_stopping:
            lost = self._lost()
            if lost and not self._is_stopping:
                logger.error("%s; this replica ends", lost)
                self._stop()
                end = time.monotonic() + LAST_BYTES_S
                while (
                    any(not each.closed for each in list(self._answers)) and time.monotonic() < end
                ):
                    time.sleep(WATCH_S)
                os._exit(1)
            time.sleep(WATCH_S)

    def _stop(self) -> None:
        self._is_stopping = True
        self._front.stop()
        self._hosts.stop()

    async def check_health(self) -> None:
        """For Ray, now and then.

        Raises:
            RuntimeError: the service gives no sign of life.
        """
        async with self._client().get(f"{self._url}/health") as answer:
            if answer.status != 200:
                raise RuntimeError(f"/health answers {answer.status}")

    async def __call__(self, request: Request) -> Response:
        """Pass a request on, and its answer back as it comes."""
        try:
            answer = await self._send(request)
        except (aiohttp.ClientError, ClientDisconnect, OSError) as error:
            logger.warning("a request was not passed on: %s", error)
            return unavailable()
        self._answers.add(answer)
        headers = [
            (name.lower(), value)
            for name, value in answer.raw_headers
            if name.lower() not in _HOP_BY_HOP
        ]
        response = StreamingResponse(self._relay(answer), answer.status)
        response.raw_headers = headers
        return response

    async def _send(self, request: Request) -> aiohttp.ClientResponse:
        scope = request.scope
        path = scope.get("raw_path") or scope["path"].encode()
        path = path.removeprefix(scope.get("root_path", "").encode()).decode("latin-1")
        query = scope["query_string"].decode("latin-1")
        headers = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in request.headers.raw
            if name.lower() not in _HOP_BY_HOP | {b"content-length"}
        ]
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._limits["max_body_bytes"]:  # the service refuses it by its length
                break
        return await self._client().request(
            scope["method"],
            URL(f"{self._url}{path}" + (f"?{query}" if query else ""), encoded=True),
            headers=headers,
            data=bytes(body) if body else None,
            allow_redirects=False,
            skip_auto_headers=("accept", "accept-encoding", "user-agent", "content-type"),
        )

    async def _relay(self, answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """The bytes of an answer. A reader that goes away cancels the request."""
        try:
            async for chunk in answer.content.iter_any():
                yield chunk
        finally:
            answer.close()

    def _client(self) -> aiohttp.ClientSession:
        """Connections to the service, made in the loop that uses them."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=None),  # the service has its own
                connector=aiohttp.TCPConnector(limit=0),
                auto_decompress=False,
            )
        return self._session

    async def close(self) -> None:
        """End the service, whose requests have all been answered."""
        if self._session:
            await self._session.close()
        await asyncio.get_running_loop().run_in_executor(None, self._stop)

    # Ray Serve awaits this when a replica has no request left, and before it ends the process.
    __del__ = close


def unavailable() -> Response:
    """The answer where there is no service: another replica, or a later time, may have one."""
    error = {"message": "this replica is ending; send the request again", "type": "server_error",
        "param": None, "code": "engine_lost"}  # fmt: skip
    return JSONResponse({"error": error}, 503, {"retry-after": "1"})


def application(plan: ServicePlan) -> serve.Application:
    """The application that a plan describes."""
    deployment = serve.deployment(Replica).options(name="Replica", **plan.deployment_options())
    return deployment.bind(*plan.replica_arguments())


def build(args: dict[str, Any]) -> serve.Application:
    """The application of a YAML's `args`, which are fields of `ServicePlan`.

    Raises:
        ConfigError: they are wrong.
    """
    return application(ServicePlan.read(args))
