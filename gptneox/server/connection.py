# SPDX-License-Identifier: Apache-2.0
"""uvicorn's connection with a deadline for the head of a request.

uvicorn waits for ever for one that trickles in, or never comes after the connection was made.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

HEAD_S = 10.0
READ_S = 60.0  # a whole answer has so long to be read


class Connection(H11Protocol):
    """A connection that is cut where no request has come for `HEAD_S` after it was expected."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, {**app_state, "abort": self.abort}, _loop)
        self._head_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None

    def abort(self) -> None:
        """Cut the connection, whatever has not been sent yet."""
        if self.transport is not None:
            self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_S, self.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._stop_timer()
        if self._read_timer is not None:  # it holds this connection and its last request
            self._read_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        before = self.cycle
        if self._head_timer is None and (before is None or before.response_complete):
            self._head_timer = self.loop.call_later(HEAD_S, self.abort)
        super().data_received(data)
        if self.cycle is not before:  # a whole head has come
            self._stop_timer()

    def on_response_complete(self) -> None:
        """See uvicorn's class; its close would wait for ever for a client that reads nothing."""
        if self._read_timer is not None:
            self._read_timer.cancel()
        self._read_timer = self.loop.call_later(READ_S, self._cut_unread)
        super().on_response_complete()

    def _cut_unread(self) -> None:
        if self.transport is not None and self.transport.is_closing():  # it is not used again
            self.abort()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
