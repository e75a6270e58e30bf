# SPDX-License-Identifier: Apache-2.0
"""The API of Text Generation Inference (TGI), which huggingface_hub's InferenceClient speaks.

Source: TGI's API description, router and server; huggingface_hub's client.
"""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gptneox import __version__
from gptneox.engine.sequence import MAX_STOP_STRINGS, TokenLogprobs
from gptneox.server.asgi import EventStream, JsonAnswer, event, until_disconnect
from gptneox.server.dialects.base import (
    MAX_LOGPROBS,
    Body,
    Context,
    Dialect,
    body_of,
    error_headers,
    mean_logprob,
)
from gptneox.server.dialects.openai import (
    PING,
    Completion,
    CompletionBody,
    ErrorAnswer,
    TokenizeBody,
    TokenList,
    answer,
    clamped,
    plan_completion,
    refuse_unbuilt,
    tokenize,
)
from gptneox.server.dialects.openai_chat import ChatBody, ChatCompletion, chat_text, plan_chat
from gptneox.server.errors import Kind, ServiceError, invalid
from gptneox.server.service import LOADING_RETRY_S, Delta, Request, Running
from gptneox.server.vocabulary import Vocabulary

# Kind of error -> status, error_type. The client makes exceptions of the types; it takes a status
# of 400 as a hint to leave parameters out and try again, so there is none.
_ERRORS: dict[Kind, tuple[int, str]] = {
    Kind.INVALID: (422, "validation"),
    Kind.TOO_LONG: (422, "validation"),
    Kind.NO_MODEL: (422, "validation"),
    Kind.BODY_TOO_LARGE: (413, "validation"),
    Kind.SLOW_BODY: (408, "validation"),
    Kind.UNAUTHORIZED: (401, "unauthorized"),
    Kind.NO_ROUTE: (404, "not_found"),
    Kind.NO_METHOD: (405, "method_not_allowed"),
    Kind.OVERLOADED: (429, "overloaded"),
    Kind.UNAVAILABLE: (503, "healthcheck"),
    Kind.ENGINE_LOST: (500, "incomplete_generation"),
    Kind.TIMEOUT: (500, "incomplete_generation"),
    Kind.FAILED: (424, "generation"),
    Kind.INTERNAL: (500, "internal"),
}

# The statuses of errors, for the description.
_GET, _POST = (404, 503), (400, 404, 408, 413, 422, 424, 429, 500, 503)
_NO_JSON: dict[str, Any] = {"response_class": Response}  # what is described is all there is

# What is not built, with the values that ask for nothing.
_UNBUILT: dict[str, tuple[Any, ...]] = {
    "adapter_id": ("",),
    "grammar": (),
    "typical_p": (1.0,),
    "watermark": (False,),
}


class Parameters(Body):
    """How to generate."""

    max_new_tokens: int | None = Field(
        None, ge=1, description="Absent: as many as the context has room for."
    )
    do_sample: bool | None = Field(
        None,
        description="false: always the likeliest token. Absent: the same, unless temperature, "
        "top_k or top_p is given.",
    )
    temperature: float | None = Field(None, gt=0)
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | None = Field(None, description="The one that ends a text stays in it.")
    best_of: int | None = Field(None, ge=1)
    truncate: int | None = Field(None, ge=1, description="Keep so many tokens of the end.")
    return_full_text: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    top_n_tokens: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    # not built; see _UNBUILT
    adapter_id: Any = None
    grammar: Any = None
    typical_p: Any = None
    watermark: Any = None


class GenerateBody(Body):
    """POST / and /generate."""

    inputs: str
    parameters: Parameters | None = None
    stream: bool | None = None


class ChatTokenizeBody(Body):
    """POST /chat_tokenize."""

    messages: list[dict[str, Any]]
    model: str | None = None


# -- answers, for the description ----------------------------------------------------------------


class TgiError(BaseModel):
    """The answer to a request that failed."""

    error: str
    error_type: str


class PrefillToken(BaseModel):
    """A token of the prompt."""

    id: int
    text: str
    logprob: float | None


class TgiToken(BaseModel):
    """A token of the answer."""

    id: int
    text: str
    logprob: float | None
    special: bool


class Sequence(BaseModel):
    """How a text came about."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[TgiToken]
    top_tokens: list[list[TgiToken]] = []


class OtherSequence(Sequence):
    """A text that was not the best."""

    generated_text: str


class Details(Sequence):
    """How the best text came about."""

    prompt_tokens: int
    best_of_sequences: list[OtherSequence] = []


class Generated(BaseModel):
    """The answer of /generate."""

    generated_text: str
    details: Details | None = None


class SimpleToken(BaseModel):
    """A token of a text, and where it lies there, in characters."""

    id: int
    text: str
    start: int
    stop: int


class ChatTokens(BaseModel):
    """The answer of /chat_tokenize."""

    tokenize_response: list[SimpleToken]
    templated_text: str


class Info(BaseModel):
    """The answer of /info."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None


# -- the routes ----------------------------------------------------------------------------------


class Tgi(Dialect):
    """The routes of TGI, without /generate and /generate_stream, which MindIE has too."""

    bodies = (GenerateBody, ChatTokenizeBody)
    paths = frozenset(
        ("/", "/generate", "/generate_stream", "/invocations", "/chat_tokenize", "/info", "/ping")
    )

    def owns(self, path: str) -> bool:
        """See `Dialect`."""
        return path in self.paths

    def answer_error(self, error: ServiceError) -> Response:
        """See `Dialect`."""
        return JsonAnswer(error_body(error), _ERRORS[error.kind][0], error_headers(error))

    def add_routes(self, app: FastAPI) -> None:
        """See `Dialect`."""
        add_post(app, "/", self.compat, body_of(GenerateBody), list[Generated])
        add_post(
            app,
            "/invocations",
            self.invocations,
            body_of(GenerateBody, ChatBody, CompletionBody),
            list[Generated] | ChatCompletion | Completion,
        )
        add_post(
            app,
            "/tokenize",
            self.tokenize,
            body_of(GenerateBody, TokenizeBody),
            list[SimpleToken] | TokenList,
            TgiError | ErrorAnswer,
        )
        add_post(app, "/chat_tokenize", self.chat_tokenize, body_of(ChatTokenizeBody), ChatTokens)
        add_get(app, "/info", self.info, Info)
        add_get(app, "/ping", self.health, None)  # GET / is the page

    async def compat(self, request: HttpRequest) -> Response:
        """Continue a text; the answer is a list of one object, or a stream."""
        return await self._compat(request, await self.context.read_content(request))

    async def _compat(self, request: HttpRequest, content: dict[str, Any]) -> Response:
        body = self.context.check(content, GenerateBody)
        if body.stream:
            return await generate_stream(self.context, request, body)
        return await generate(self.context, request, body, form=lambda generated: [generated])

    async def invocations(self, request: HttpRequest) -> Response:
        """The same as /, /v1/chat/completions or /v1/completions, by the keys of the body."""
        context = self.context
        content = await context.read_content(request)
        key = the_key(content, ("inputs", "messages", "prompt"))
        if key == "inputs":
            return await self._compat(request, content)
        request_id = request.scope["state"]["request_id"]
        if key == "messages":
            made = plan_chat(context, context.check(content, ChatBody), request_id)
        else:
            made = plan_completion(context, context.check(content, CompletionBody), request_id)
        return await answer(context, request, await until_disconnect(request, made))

    async def tokenize(self, request: HttpRequest) -> Response:
        """The tokens of a text: of `inputs` as TGI lists them, of `prompt` as vLLM does.

        Errors about the keys have vLLM's form, as the path has.
        """
        content = await self.context.read_content(request)
        if the_key(content, ("inputs", "prompt")) == "prompt":
            return await tokenize(self.context, self.context.check(content, TokenizeBody))
        try:
            body = self.context.check(content, GenerateBody)
            return JsonAnswer(await simple_tokens(self.context.vocabulary, body.inputs))
        except ServiceError as error:
            return self.answer_error(error)

    async def chat_tokenize(self, request: HttpRequest) -> Response:
        """The prompt that a chat makes, and its tokens."""
        body = await self.context.read(request, ChatTokenizeBody)
        self.context.check_named_model(body.model)
        text = await chat_text(self.context, body.messages)
        tokens = await simple_tokens(self.context.vocabulary, text)
        return JsonAnswer({"tokenize_response": tokens, "templated_text": text})

    async def info(self) -> Response:
        """What is served, and its limits."""
        service = self.context.service
        limits = service.limits()
        return JsonAnswer(
            {
                "model_id": self.context.model_name,
                "model_sha": None,
                "model_dtype": limits.dtype,
                "model_device_type": limits.device,
                "model_pipeline_tag": "text-generation",
                "max_concurrent_requests": service.settings.max_concurrent_requests,
                "max_best_of": service.most_choices,
                "max_stop_sequences": MAX_STOP_STRINGS,
                "max_input_tokens": limits.max_tokens - 1,
                "max_total_tokens": limits.max_tokens,
                "validation_workers": 1,
                "max_client_batch_size": service.most_choices,
                "router": "gptneox",
                "version": __version__,
                "sha": None,
                "docker_label": None,
            }
        )

    async def health(self) -> Response:
        """200 while the engine lives."""
        check_health(self.context.service.why_unready)
        return Response()


def check_health(reason: str) -> None:
    """Raise ServiceError if there is a reason why the service is not well."""
    if reason:
        raise ServiceError(Kind.UNAVAILABLE, reason, retry_after_s=LOADING_RETRY_S)


def add_get(
    app: FastAPI, path: str, endpoint: Callable[..., Any], model: type[BaseModel] | None
) -> None:
    """Add a route whose answer has a model, or else is empty."""
    responses: dict[int | str, dict[str, Any]] = {status: {"model": TgiError} for status in _GET}
    if model:
        responses[200] = {"model": model}
    app.add_api_route(
        path, endpoint, response_model=None, responses=responses, **({} if model else _NO_JSON)
    )


def add_post(
    app: FastAPI,
    path: str,
    endpoint: Callable[..., Any],
    body: dict[str, Any],
    model: Any,
    error: Any = TgiError,
) -> None:
    """Add a route that takes a body.

    Args:
        app: the application.
        path: of the route.
        endpoint: what answers.
        body: see `body_of`.
        model: of a whole answer; None: the answer is an event stream.
        error: the model of errors.
    """
    responses: dict[int | str, dict[str, Any]] = {status: {"model": error} for status in _POST}
    responses[200] = {"content": {"text/event-stream": {}}}
    if model is not None:
        responses[200]["model"] = model
    app.add_api_route(
        path,
        endpoint,
        methods=["POST"],
        response_model=None,
        responses=responses,
        openapi_extra=body,
        **(_NO_JSON if model is None else {}),
    )


def error_body(error: ServiceError) -> dict[str, str]:
    """An error as a JSON object."""
    return {"error": error.message, "error_type": _ERRORS[error.kind][1]}


def the_key(content: dict[str, Any], keys: tuple[str, ...]) -> str:
    """The one of the keys that a body has; it decides which dialect is spoken.

    Those that are null are taken out, for the other dialects know no such field.

    Raises:
        ServiceError: the body has none of them, or several.
    """
    for key in keys:
        if content.get(key, key) is None:
            del content[key]
    found = [key for key in keys if key in content]
    if len(found) != 1:
        wanted = " or ".join(keys)
        given = f"; both {' and '.join(found)} are given" if found else ""
        raise invalid(keys[0], f"{wanted} is expected, and decides the form of the answer{given}")
    return found[0]


async def simple_tokens(vocabulary: Vocabulary, text: str) -> list[dict[str, Any]]:
    """The tokens of a text with their places; a tokenizer that knows no places leaves them 0."""
    ids = await vocabulary.encode(text, "inputs")
    spans = [(0, 0)] * len(ids)
    if getattr(vocabulary.tokenizer, "is_fast", False):

        def locate() -> Any:
            encoded = vocabulary.tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True
            )
            return encoded["offset_mapping"]

        spans = await vocabulary.in_thread(locate)
    return [
        {"id": token_id, "text": text[start:stop], "start": start, "stop": stop}
        for token_id, (start, stop) in zip(ids, spans, strict=True)
    ]


# -- from a body to a request --------------------------------------------------------------------


@dataclass
class Plan:
    """A request, and the form of its answer."""

    request: Request
    inputs: str
    parameters: Parameters
    seed: int | None  # that of a sampled answer
    device: str
    start: float = field(default_factory=time.monotonic)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompts[0])

    def text(self, generated: str) -> str:
        """The text of the answer."""
        return self.inputs + generated if self.parameters.return_full_text else generated

    def finish_reason(self, delta: Delta, num_tokens: int) -> str:
        """Why an answer of so many tokens ended.

        Source: TGI's StoppingCriteria, which looks at the length first.
        """
        limit = self.request.params.max_new_tokens
        if delta.finish_reason == "length" or num_tokens >= limit:
            return "length"
        return "stop_sequence" if isinstance(delta.stop_reason, str) else "eos_token"


def is_sampled(parameters: Parameters) -> bool:
    """Whether tokens are sampled; do_sample decides, if it is given."""
    if parameters.do_sample is not None:
        return parameters.do_sample
    given = (parameters.temperature, parameters.top_k, parameters.top_p)
    return any(value is not None for value in given)


async def make_plan(
    context: Context,
    inputs: str,
    parameters: Parameters,
    request_id: str,
    *,
    is_stream: bool = False,
    default_tokens: int | None = None,
) -> Plan:
    """What a body asks for.

    Args:
        context: what is served.
        inputs: the prompt.
        parameters: of the body.
        request_id: of the request.
        is_stream: whether the answer comes in pieces.
        default_tokens: for a body that says nothing of its length; None: all that has room.

    Raises:
        ServiceError: it asks for what is wrong, or not built.
    """
    start = time.monotonic()
    refuse_unbuilt(parameters, _UNBUILT)
    best_of, sampled = parameters.best_of or 1, is_sampled(parameters)
    context.check_choices(best_of, "best_of")
    if best_of > 1 and not sampled:
        raise invalid("best_of", "best_of above 1 needs do_sample: true; all would be alike")
    if is_stream and best_of > 1:
        raise invalid("best_of", "best_of above 1 cannot be streamed")
    if is_stream and parameters.decoder_input_details:
        raise invalid("decoder_input_details", "decoder_input_details cannot be streamed")
    limits = context.service.limits()  # before the work of tokenizing
    prompt = await context.vocabulary.encode(inputs, "inputs")
    if parameters.truncate:
        prompt = prompt[-parameters.truncate :]
    shows_seed = sampled and (parameters.details or parameters.decoder_input_details)
    seed = parameters.seed
    if seed is None and shows_seed:
        seed = secrets.randbits(63)  # so that the client can repeat the answer
    shows_tokens = parameters.details or parameters.decoder_input_details or is_stream
    params = context.make_params(
        {},
        max_new_tokens=context.room([prompt], parameters.max_new_tokens, default_tokens),
        **_sampling_values(parameters, sampled=sampled),
        seed=seed,
        stop=context.check_stop(parameters.stop or ()),
        include_stop=True,
        logprobs=(parameters.top_n_tokens or 0) if shows_tokens or best_of > 1 else None,
        prompt_logprobs=0 if parameters.decoder_input_details else None,
    )
    request = Request(request_id, [prompt], params, best_of)
    return Plan(request, inputs, parameters, seed if sampled else None, limits.device, start)


def _sampling_values(parameters: Parameters, *, sampled: bool) -> dict[str, Any]:
    """The fields of SamplingParams that say how a token is chosen."""
    temperature = 1.0 if parameters.temperature is None else parameters.temperature
    own = {
        "top_k": parameters.top_k,
        "top_p": parameters.top_p,
        "repetition_penalty": parameters.repetition_penalty,
        "frequency_penalty": parameters.frequency_penalty,
    }
    values = {name: value for name, value in own.items() if value is not None}
    return {"temperature": temperature if sampled else 0.0, **values}


# -- from deltas to an answer --------------------------------------------------------------------


class TokenWriter:
    """Lists the tokens of an answer, each with its share of the text.

    The shares of the tokens that are not special, joined, are the text. Of a character that several
    tokens make, the last of them has all.
    """

    def __init__(self, vocabulary: Vocabulary, top_n: int) -> None:
        """Begin an answer; `top_n` likeliest tokens are listed at each place."""
        self._vocabulary, self._top_n = vocabulary, top_n
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, delta: Delta) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """The next tokens, each with the likeliest ones of its place."""
        ids = [*delta.token_ids, *delta.cut_ids]
        entries: list[TokenLogprobs | None] = [*delta.logprobs, *delta.cut_logprobs]
        texts = self._share(delta.text, ids)
        if delta.end_id is not None:
            ids.append(delta.end_id)
            texts.append(self._vocabulary.decode([delta.end_id]))
            entries.append(delta.end_logprob)
        for token_id, text, entry in zip(ids, texts, entries, strict=True):
            logprob = entry.logprob if entry else None
            yield self._token(token_id, text, logprob), self._top(entry)

    def _share(self, text: str, ids: list[int]) -> list[str]:
        """The text in one piece for each of the tokens; the last one gets what is left."""
        special = self._vocabulary.special
        plain = [i for i, token_id in enumerate(ids) if token_id not in special]
        pieces = []
        for i, token_id in enumerate(ids):
            if token_id in special:
                pieces.append(special[token_id])
                continue
            piece = self._decoder.decode(self._vocabulary.token_bytes(token_id))
            if i == plain[-1]:
                piece = text
            elif not text.startswith(piece):  # a blank that is left out where a text begins
                piece = text[: len(piece.lstrip(" "))]
            pieces.append(piece)
            text = text[len(piece) :]
        return pieces

    def _top(self, entry: TokenLogprobs | None) -> list[dict[str, Any]]:
        if not (self._top_n and entry):
            return []
        likeliest = sorted(entry.top.items(), key=lambda item: -item[1])[: self._top_n]
        return [self._token(i, self._vocabulary.decode([i]), value) for i, value in likeliest]

    def _token(self, token_id: int, text: str, logprob: float | None) -> dict[str, Any]:
        return {
            "id": token_id,
            "text": text,
            "logprob": None if logprob is None else clamped(logprob),
            "special": token_id in self._vocabulary.special,
        }


async def generate(
    context: Context,
    http: HttpRequest,
    body: GenerateBody,
    *,
    form: Callable[[dict[str, Any]], Any] = lambda generated: generated,
) -> Response:
    """The whole answer to a body; `form` is what is made of the object.

    Raises:
        ServiceError: it failed.
        ClientGone: the client went away.
    """
    request_id = http.scope["state"]["request_id"]
    parameters = body.parameters or Parameters.model_validate({})
    made = make_plan(context, body.inputs, parameters, request_id)
    plan = await until_disconnect(http, made)
    validated = time.monotonic()
    deltas = await context.gather(http, plan.request)
    if len(deltas) > 1:
        deltas = sorted(deltas, key=mean_logprob, reverse=True)
    best, *others = deltas
    generated: dict[str, Any] = {"generated_text": plan.text(best.text)}
    if parameters.details or parameters.decoder_input_details:
        generated["details"] = {
            **_details(context, plan, best),
            "prompt_tokens": plan.num_prompt_tokens,
        }
        if others:
            generated["details"]["best_of_sequences"] = [
                {"generated_text": plan.text(other.text), **_details(context, plan, other)}
                for other in others
            ]
    return JsonAnswer(form(generated), 200, _headers(plan, best, validated))


def _details(context: Context, plan: Plan, delta: Delta) -> dict[str, Any]:
    """How a text came about."""
    top_n = plan.parameters.top_n_tokens or 0
    listed = list(TokenWriter(context.vocabulary, top_n).add(delta))
    details: dict[str, Any] = {
        "finish_reason": plan.finish_reason(delta, delta.num_tokens),
        "generated_tokens": delta.num_tokens,
        "seed": plan.seed,
        "prefill": [],
        "tokens": [token for token, _ in listed],
    }
    if plan.seed is not None:
        details["seed"] = plan.request.choice(delta.index)[1].seed
    if plan.parameters.decoder_input_details:
        logprobs = [None, *(clamped(entry.logprob) for entry in delta.prompt_logprobs)]
        details["prefill"] = [
            {"id": token_id, "text": context.vocabulary.decode([token_id]), "logprob": logprob}
            for token_id, logprob in zip(plan.request.prompts[0], logprobs, strict=True)
        ]
    if top_n:
        details["top_tokens"] = [top for _, top in listed]
    return details


def _headers(plan: Plan, delta: Delta, validated: float) -> dict[str, str]:
    """What TGI says of the work; times are in milliseconds, but x-compute-time in seconds."""
    end = time.monotonic()
    total, validation, queue = end - plan.start, validated - plan.start, delta.queued_s
    inference = max(0.0, total - validation - queue)
    return {
        **_stream_headers(plan),
        "x-compute-time": f"{total:.6f}",
        "x-total-time": f"{1000 * total:.0f}",
        "x-validation-time": f"{1000 * validation:.0f}",
        "x-queue-time": f"{1000 * queue:.0f}",
        "x-inference-time": f"{1000 * inference:.0f}",
        "x-time-per-token": f"{1000 * inference / max(1, delta.num_tokens):.0f}",
        "x-prompt-tokens": str(plan.num_prompt_tokens),
        "x-generated-tokens": str(delta.num_tokens),
    }


def _stream_headers(plan: Plan) -> dict[str, str]:
    return {"x-compute-type": plan.device, "x-compute-characters": str(len(plan.inputs))}


async def generate_stream(context: Context, http: HttpRequest, body: GenerateBody) -> Response:
    """The answer to a body as a stream of tokens.

    Raises:
        ServiceError: it failed before the first byte.
        ClientGone: the client went away.
    """
    request_id = http.scope["state"]["request_id"]
    parameters = body.parameters or Parameters.model_validate({})
    made = make_plan(context, body.inputs, parameters, request_id, is_stream=True)
    plan = await until_disconnect(http, made)
    running = await context.begin(http, plan.request)
    answered = EventStream(events(context, running, plan), running.deadline, running.close)
    answered.headers.update(_stream_headers(plan))
    return answered


async def events(context: Context, running: Running, plan: Plan) -> AsyncIterator[bytes]:
    """The events of a stream, one for each token; those of one step in one piece."""
    top_n = plan.parameters.top_n_tokens or 0
    writer = TokenWriter(context.vocabulary, top_n)
    index, num_tokens, text = 0, 0, ""
    try:
        async for batch in running.batches():
            parts = [] if batch else [PING]
            for delta in batch:
                num_tokens += delta.num_tokens
                text += delta.text
                listed = list(writer.add(delta))
                if delta.finish_reason and not listed:  # the time of the checkpoint's rules is up
                    listed = [({"id": 0, "text": "", "logprob": None, "special": True}, [])]
                for i, (token, top) in enumerate(listed):
                    index += 1
                    is_last = bool(delta.finish_reason) and i + 1 == len(listed)
                    sent = {"index": index, "token": token, "generated_text": None, "details": None}
                    if top_n:
                        sent["top_tokens"] = top
                    if is_last:
                        sent["generated_text"] = plan.text(text)
                        sent["details"] = _stream_details(plan, delta, num_tokens)
                    parts.append(event(sent))
            yield b"".join(parts)
    except ServiceError as error:
        yield event(error_body(error))


def _stream_details(plan: Plan, delta: Delta, num_tokens: int) -> dict[str, Any] | None:
    if not plan.parameters.details:
        return None
    return {
        "finish_reason": plan.finish_reason(delta, num_tokens),
        "generated_tokens": num_tokens,
        "seed": plan.seed,
        "input_length": plan.num_prompt_tokens,
        "prompt_tokens": plan.num_prompt_tokens,
    }
