# SPDX-License-Identifier: Apache-2.0
"""The API of MindIE's service: its Triton routes, and the two dialects of its /generate.

A body with `inputs` is TGI's. One with `prompt` is that of vLLM's first server, whose answer is
{"text": [prompt and continuation]}.

Source: MindIE-LLM, its user guide and the sources of its endpoint; KServe's open inference protocol
for the descriptions below /v2; vLLM for the fields beside `prompt`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gptneox import __version__
from gptneox.server.asgi import EventStream, JsonAnswer, event, to_json, until_disconnect
from gptneox.server.dialects import tgi
from gptneox.server.dialects.base import Body, Dialect, body_of, error_headers
from gptneox.server.dialects.openai import PING, CompletionBody, best_deltas, plan_completion
from gptneox.server.dialects.openai import Plan as CompletionPlan
from gptneox.server.errors import Kind, ServiceError, invalid
from gptneox.server.service import Running

# Kind of error -> status, error_type.
_ERRORS: dict[Kind, tuple[int, str]] = {
    Kind.INVALID: (422, "Input Validation Error"),
    Kind.TOO_LONG: (422, "Input Validation Error"),
    Kind.NO_MODEL: (404, "NotFoundError"),
    Kind.BODY_TOO_LARGE: (413, "Input Validation Error"),
    Kind.SLOW_BODY: (408, "Input Validation Error"),
    Kind.UNAUTHORIZED: (401, "Unauthorized"),
    Kind.NO_ROUTE: (404, "NotFoundError"),
    Kind.NO_METHOD: (405, "Method Not Allowed"),
    Kind.OVERLOADED: (429, "Overloaded"),
    Kind.UNAVAILABLE: (503, "Service Unavailable"),
    Kind.ENGINE_LOST: (500, "Incomplete Generation"),
    Kind.TIMEOUT: (500, "Incomplete Generation"),
    Kind.FAILED: (424, "Generation Error"),
    Kind.INTERNAL: (500, "Internal Error"),
}
DEFAULT_MAX_NEW_TOKENS = 20
DEFAULT_MAX_TOKENS = 16  # of a body with `prompt`
# What follows each object of a stream that answers a body with `prompt`; it is no event stream.
END_OF_PIECE = b"\0"


class TritonParameters(Body):
    """How to generate."""

    max_new_tokens: int | None = Field(None, ge=1, description="Default 20.")
    do_sample: bool | None = None
    temperature: float | None = Field(None, gt=0)
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    details: bool | None = None
    # not built; see tgi
    typical_p: Any = None
    watermark: Any = None
    # Ignored: the order of requests, the width of batches and the deadline are the service's own.
    priority: Any = None
    batch_size: Any = None
    timeout: Any = None


class TritonBody(Body):
    """POST /v2/models/{model}/generate."""

    text_input: str
    # `id` is what the answer is known by
    id: str | None = Field(None, pattern="^[a-zA-Z0-9_-]{1,256}$")
    parameters: TritonParameters | None = None


class PromptBody(Body):
    """POST /generate with `prompt`."""

    prompt: str
    model: str | None = None
    stream: bool | None = None
    n: int | None = Field(None, ge=1)
    best_of: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1, description="Default 16.")
    min_tokens: int | None = None
    temperature: float | None = Field(
        None, description="Absent: always the likeliest token, unless top_k or top_p is given."
    )
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    # not built; see openai
    skip_special_tokens: Any = None
    spaces_between_special_tokens: Any = None
    use_beam_search: Any = None
    length_penalty: Any = None


class TokenizerBody(Body):
    """POST /v1/tokenizer."""

    inputs: str
    do_decode: bool | None = Field(None, description="false: the number alone. Default true.")


# -- answers, for the description ----------------------------------------------------------------


class TritonAnswer(BaseModel):
    """The answer of /v2/models/{model}/generate."""

    id: str
    model_name: str
    model_version: str | None
    text_output: str
    details: dict[str, Any] | None = None


class Texts(BaseModel):
    """The answer of /generate to a body with `prompt`."""

    text: list[str]


class TokenTexts(BaseModel):
    """The answer of /v1/tokenizer."""

    token_number: int
    tokens: list[str]


class ServerMetadata(BaseModel):
    """The answer of /v2."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """What a model takes or gives."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """The answer of /v2/models/{model}."""

    name: str
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelConfig(BaseModel):
    """The answer of /v2/models/{model}/config."""

    model_name: str
    max_seq_len: int
    max_batch_size: int
    cache_block_size: int
    world_size: int
    data_type: str
    device: str


# -- the routes ----------------------------------------------------------------------------------


class MindIe(Dialect):
    """The routes of MindIE that are no other server's, and those that it shares with TGI alone."""

    bodies = (TritonBody, PromptBody, TokenizerBody)

    def owns(self, path: str) -> bool:
        """See `Dialect`."""
        return path in ("/v2", "/v1/tokenizer") or path.startswith("/v2/")

    def answer_error(self, error: ServiceError) -> Response:
        """See `Dialect`."""
        return JsonAnswer(error_body(error), _ERRORS[error.kind][0], error_headers(error))

    def add_routes(self, app: FastAPI) -> None:
        """See `Dialect`."""
        model = "/v2/models/{model_name:path}"
        generate = body_of(tgi.GenerateBody, PromptBody)
        tgi.add_post(app, "/generate", self.generate, generate, tgi.Generated | Texts)
        stream = body_of(tgi.GenerateBody)
        tgi.add_post(app, "/generate_stream", self.generate_stream, stream, None)
        triton = body_of(TritonBody)
        tgi.add_post(app, model + "/generate", self.triton, triton, TritonAnswer)
        tgi.add_post(app, model + "/generate_stream", self.triton_stream, triton, None)
        tokenizer = body_of(TokenizerBody)
        tgi.add_post(app, "/v1/tokenizer", self.tokenizer, tokenizer, TokenTexts)
        tgi.add_get(app, "/v2/health/live", self.live, None)
        tgi.add_get(app, "/v2/health/ready", self.ready, None)
        tgi.add_get(app, "/v2", self.server, ServerMetadata)
        tgi.add_get(app, model + "/ready", self.model_ready, None)
        tgi.add_get(app, model + "/config", self.model_config, ModelConfig)
        tgi.add_get(app, model, self.model, ModelMetadata)

    # -- /generate -------------------------------------------------------------------------------

    async def generate(self, request: HttpRequest) -> Response:
        """Continue a text: `inputs` as TGI does, `prompt` as vLLM's first server did."""
        context = self.context
        content = await context.read_content(request)
        if tgi.the_key(content, ("inputs", "prompt")) == "inputs":
            body = context.check(content, tgi.GenerateBody)
            if body.stream:
                raise invalid("stream", "stream is true; /generate_stream and / answer in pieces")
            return await tgi.generate(context, request, body)
        try:
            return await self._continue(request, context.check(content, PromptBody))
        except ServiceError as error:
            return self.answer_error(error)

    async def generate_stream(self, request: HttpRequest) -> Response:
        """Continue a text, in pieces."""
        body = await self.context.read(request, tgi.GenerateBody)
        if body.stream is False:
            raise invalid("stream", "stream is false; /generate and / answer as a whole")
        return await tgi.generate_stream(self.context, request, body)

    async def _continue(self, http: HttpRequest, body: PromptBody) -> Response:
        context = self.context
        values = body.model_dump(exclude_none=True)
        if body.temperature is None and body.top_k is None and body.top_p is None:
            values["temperature"] = 0.0
        values.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
        request_id = http.scope["state"]["request_id"]
        made = plan_completion(context, CompletionBody(**values), request_id)
        plan = await until_disconnect(http, made)
        if not body.stream:
            deltas = best_deltas(plan, await context.gather(http, plan.request))
            return JsonAnswer({"text": [body.prompt + delta.text for delta in deltas]})
        running = await context.begin(http, plan.request)
        answered = EventStream(prompt_pieces(running, plan), running.deadline, running.close)
        answered.headers["content-type"] = "text/plain; charset=utf-8"
        return answered

    # -- Triton ----------------------------------------------------------------------------------

    async def triton(self, request: HttpRequest, model_name: str) -> Response:
        """Continue a text."""
        body, plan = await self._triton_plan(request, model_name, is_stream=False)
        (delta,) = await self.context.gather(request, plan.request)
        reason = plan.finish_reason(delta, delta.num_tokens)
        return JsonAnswer(
            {
                **self._head(request, body),
                "text_output": delta.text,
                **_triton_details(plan, reason, delta.num_tokens),
            }
        )

    async def triton_stream(self, request: HttpRequest, model_name: str) -> Response:
        """Continue a text, in pieces."""
        body, plan = await self._triton_plan(request, model_name, is_stream=True)
        running = await self.context.begin(request, plan.request)
        events = triton_events(running, plan, self._head(request, body))
        return EventStream(events, running.deadline, running.close)

    async def _triton_plan(
        self, http: HttpRequest, model_name: str, *, is_stream: bool
    ) -> tuple[TritonBody, tgi.Plan]:
        context = self.context
        context.check_model(model_name)
        body = await context.read(http, TritonBody)
        values = (body.parameters or TritonParameters.model_validate({})).model_dump(
            exclude_none=True
        )
        for ignored in ("priority", "batch_size", "timeout"):
            values.pop(ignored, None)
        parameters = tgi.Parameters(**values)
        made = tgi.make_plan(
            context,
            body.text_input,
            parameters,
            http.scope["state"]["request_id"],
            is_stream=is_stream,
            default_tokens=DEFAULT_MAX_NEW_TOKENS,
        )
        return body, await until_disconnect(http, made)

    def _head(self, http: HttpRequest, body: TritonBody) -> dict[str, Any]:
        return {
            "id": body.id or http.scope["state"]["request_id"],
            "model_name": self.context.model_name,
            "model_version": None,
        }

    # -- what is served --------------------------------------------------------------------------

    async def tokenizer(self, request: HttpRequest) -> Response:
        """The number of tokens of a text, and their texts."""
        body = await self.context.read(request, TokenizerBody)
        vocabulary = self.context.vocabulary
        ids = await vocabulary.encode(body.inputs, "inputs")
        tokens = [] if body.do_decode is False else [vocabulary.decode([i]) for i in ids]
        return JsonAnswer({"token_number": len(ids), "tokens": tokens})

    async def live(self) -> Response:
        """200 while the engine lives."""
        tgi.check_health(self.context.service.why_unready)
        return Response()

    async def ready(self) -> Response:
        """200 where a request would be admitted now."""
        tgi.check_health(self.context.service.why_refusing)
        return Response()

    async def model_ready(self, model_name: str) -> Response:
        """200 where a request to this model would be admitted now."""
        self.context.check_model(model_name)
        return await self.ready()

    async def server(self) -> Response:
        """The name and the version of the service."""
        return JsonAnswer({"name": "gptneox", "version": __version__, "extensions": ["generate"]})

    async def model(self, model_name: str) -> Response:
        """What a model takes and gives."""
        self.context.check_model(model_name)
        return JsonAnswer(
            {
                "name": model_name,
                "platform": "gptneox",
                "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1]}],
                "outputs": [{"name": "text_output", "datatype": "BYTES", "shape": [1]}],
            }
        )

    async def model_config(self, model_name: str) -> Response:
        """The limits of a model."""
        self.context.check_model(model_name)
        limits = self.context.service.limits()
        return JsonAnswer(
            {
                "model_name": model_name,
                "max_seq_len": limits.max_tokens,
                "max_batch_size": limits.max_batch_size,
                "cache_block_size": limits.block_size,
                "world_size": limits.world_size,
                "data_type": limits.dtype,
                "device": limits.device,
            }
        )


def error_body(error: ServiceError) -> dict[str, str]:
    """An error as a JSON object."""
    return {"error": error.message, "error_type": _ERRORS[error.kind][1]}


async def prompt_pieces(running: Running, plan: CompletionPlan) -> AsyncIterator[bytes]:
    """The pieces of an answer to a body with `prompt`: a text for each choice, empty for most."""
    n = plan.request.n
    try:
        async for batch in running.batches():
            parts = []
            for delta in batch:
                texts = [""] * n
                texts[delta.index] = delta.text
                parts.append(to_json({"text": texts}) + END_OF_PIECE)
            yield b"".join(parts)
    except ServiceError as error:
        yield to_json(error_body(error)) + END_OF_PIECE


async def triton_events(
    running: Running, plan: tgi.Plan, head: dict[str, Any]
) -> AsyncIterator[bytes]:
    """The events of a stream; their texts, joined, are the whole one."""
    num_tokens = 0
    try:
        async for batch in running.batches():
            parts = [] if batch else [PING]
            for delta in batch:
                num_tokens += delta.num_tokens
                reason = plan.finish_reason(delta, num_tokens) if delta.finish_reason else ""
                details = _triton_details(plan, reason, num_tokens)
                parts.append(event({**head, "text_output": delta.text, **details}))
            yield b"".join(parts)
    except ServiceError as error:
        yield event(error_body(error))


def _triton_details(plan: tgi.Plan, reason: str, num_tokens: int) -> dict[str, Any]:
    """The details, if the request asks for them."""
    if not plan.parameters.details:
        return {}
    details: dict[str, Any] = {"finish_reason": reason} if reason else {}
    return {"details": {**details, "generated_tokens": num_tokens, "seed": plan.seed}}
