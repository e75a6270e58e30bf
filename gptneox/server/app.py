# SPDX-License-Identifier: Apache-2.0
"""The application: the dialects, health, metrics, and what is around every request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from gptneox import __version__
from gptneox.server.asgi import HEALTH_PATH, Guard, JsonAnswer, KeyCheck, escaped, no_answer
from gptneox.server.dialects.base import Context, Dialect
from gptneox.server.dialects.mindie import MindIe
from gptneox.server.dialects.openai import OpenAi
from gptneox.server.dialects.openai_chat import OpenAiChat
from gptneox.server.dialects.tgi import Tgi
from gptneox.server.errors import ClientGone, Kind, ServiceError
from gptneox.server.page import PATH as PAGE_PATH
from gptneox.server.page import Page
from gptneox.server.service import LOADING_RETRY_S

logger = logging.getLogger(__name__)

# FastAPI from 0.163 on sends spans and logs where an SDK is installed; older ones do not know this.
NO_TELEMETRY: Any = dict.fromkeys(
    ("tracing", "metrics", "logs", "operation_spans", "auto_configure"), False
)
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# The first that owns a path gives its errors their form; the last owns every path.
DIALECTS: tuple[type[Dialect], ...] = (Tgi, MindIe, OpenAiChat, OpenAi)


class Application:
    """The ASGI application of the service."""

    def __init__(self, context: Context, keys: Iterable[str]) -> None:
        """Put it together.

        Args:
            context: what is served.
            keys: those that clients may send; none: no key is needed.
        """
        self.context = context
        if context.settings.log_prompts:
            context.service.log_prompt = self._log_prompt
        self.dialects: Seq[Dialect] = [dialect(context) for dialect in DIALECTS]
        self.fastapi = FastAPI(
            title="gptneox",
            version=__version__,
            description="GPT-NeoX models over HTTP.",
            redirect_slashes=False,
            docs_url=None,  # its page would load scripts from elsewhere
            redoc_url=None,
            telemetry=NO_TELEMETRY,
        )
        self.fastapi.openapi = self._describe  # type: ignore[method-assign]
        for dialect in self.dialects:
            dialect.add_routes(self.fastapi)
        self._add_own_routes()
        self.fastapi.add_exception_handler(ServiceError, self._on_service_error)
        self.fastapi.add_exception_handler(Exception, self._on_fault)
        self.fastapi.add_exception_handler(ClientGone, self._on_client_gone)
        self.fastapi.add_exception_handler(HTTPException, self._on_http_error)
        inner: ASGIApp = KeyCheck(self.fastapi, keys, context.settings.root_path, self.answer_error)
        origins = [o.strip() for o in context.settings.cors_origins.split(",") if o.strip()]
        if origins:
            inner = CORSMiddleware(
                inner,
                allow_origins=origins,
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type", "x-api-key", "x-request-id"],
                expose_headers=["x-request-id", "retry-after"],
            )
        self.asgi: ASGIApp = Guard(inner, context.settings.root_path, self.answer_error)

    def answer_error(self, path: str, error: ServiceError) -> Response:
        """The answer to an error at a path, in the form of its dialect."""
        path = path.removeprefix(self.context.settings.root_path)
        owner = next(dialect for dialect in self.dialects if dialect.owns(path))
        return owner.answer_error(error)

    def _log_prompt(self, request_id: str, prompt: Seq[int]) -> None:
        text = self.context.vocabulary.decode(prompt)
        logger.info("%s prompt: %s", escaped(request_id), escaped(text))

    # -- routes of no dialect --------------------------------------------------------------------

    def _add_own_routes(self) -> None:
        def add(path: str, endpoint: Callable[..., Any], **options: Any) -> None:
            self.fastapi.add_api_route(
                path, endpoint, methods=["GET"], response_model=None, **options
            )

        states: dict[int | str, dict[str, Any]] = {503: {"description": "and why, in error"}}
        add(HEALTH_PATH, self.health, responses=states)
        add("/ready", self.ready, responses=states)
        add("/metrics", self.metrics, response_class=PlainTextResponse)
        page = Page(has_chat=bool(self.context.chat_template))
        add(PAGE_PATH, page.show, response_class=HTMLResponse)

    async def health(self) -> Response:
        """200 while the engine lives; 503 while it loads, hangs or has gone. Needs no key."""
        reason = self.context.service.why_unready
        return self._state(reason)

    async def ready(self) -> Response:
        """200 where a request would be admitted now."""
        return self._state(self.context.service.why_refusing)

    def _state(self, reason: str) -> Response:
        if reason:
            headers = {"retry-after": str(LOADING_RETRY_S)}
            content = {"status": "unavailable", "error": reason, "error_type": "healthcheck"}
            return JsonAnswer(content, 503, headers)
        return JsonAnswer({"status": "ok"})

    async def metrics(self) -> Response:
        """All counters, in Prometheus' text format."""
        return Response(self.context.service.metrics.text(), media_type=METRICS_TYPE)

    # -- errors ----------------------------------------------------------------------------------

    async def _on_service_error(self, request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, ServiceError)
        return self.answer_error(request.scope["path"], error)

    async def _on_fault(self, request: HttpRequest, error: Exception) -> Response:
        """The error goes on to `Guard`, which logs it."""
        own = ServiceError(Kind.INTERNAL, "the service has made a mistake; its log says more")
        return self.answer_error(request.scope["path"], own)

    async def _on_client_gone(self, request: HttpRequest, error: Exception) -> Response:
        return no_answer()

    async def _on_http_error(self, request: HttpRequest, error: Exception) -> Response:
        """The router's own: no such path, or another method."""
        assert isinstance(error, HTTPException)
        method, path = request.scope["method"], request.scope["path"]
        if error.status_code == 405:
            own = ServiceError(Kind.NO_METHOD, f"{method} is not allowed here")
        elif error.status_code == 404:
            hint = "; a completion model answers at /v1/completions" if "responses" in path else ""
            own = ServiceError(Kind.NO_ROUTE, f"there is no such path{hint}")
        else:
            own = ServiceError(Kind.INVALID, str(error.detail))
        answer = self.answer_error(path, own)
        answer.headers.update(error.headers or {})
        return answer

    def _describe(self) -> dict[str, Any]:
        """The description at /openapi.json; bodies are read by our own code, so they are added."""
        if self.fastapi.openapi_schema is None:
            description = get_openapi(
                title=self.fastapi.title,
                version=self.fastapi.version,
                description=self.fastapi.description,
                routes=self.fastapi.routes,
                servers=[{"url": self.context.settings.root_path or "/"}],
            )
            schemas = description.setdefault("components", {}).setdefault("schemas", {})
            for body in (body for dialect in self.dialects for body in dialect.bodies):
                own = body.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas |= own.pop("$defs", {})
                schemas[body.__name__] = own
            self.fastapi.openapi_schema = description
        return self.fastapi.openapi_schema
