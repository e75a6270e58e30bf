# SPDX-License-Identifier: Apache-2.0
"""OpenAI's API: completions, chat, models; and the tokenizer routes of vLLM and lm-eval.

Source: OpenAI's API reference and its Python client; vLLM for the fields and routes beyond them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gptneox.engine.sequence import TokenLogprobs
from gptneox.server.asgi import EventStream, JsonAnswer, event, until_disconnect
from gptneox.server.dialects.base import (
    LEAST_LOGPROB,
    MAX_LOGPROBS,
    Body,
    Context,
    Dialect,
    body_of,
    error_headers,
    mean_logprob,
)
from gptneox.server.errors import Kind, ServiceError, invalid
from gptneox.server.service import Delta, Request, Running
from gptneox.server.vocabulary import Offsets, Vocabulary

DEFAULT_MAX_TOKENS = 16
DONE = b"data: [DONE]\n\n"
PING = b": still working\n\n"

# Kind of error -> status, type, code. The client repeats a request after 408, 409, 429 and 5xx.
_ERRORS: dict[Kind, tuple[int, str, str | None]] = {
    Kind.INVALID: (400, "invalid_request_error", None),
    Kind.TOO_LONG: (400, "invalid_request_error", "context_length_exceeded"),
    Kind.BODY_TOO_LARGE: (413, "invalid_request_error", "request_too_large"),
    Kind.SLOW_BODY: (408, "invalid_request_error", "request_timeout"),
    Kind.UNAUTHORIZED: (401, "authentication_error", "invalid_api_key"),
    Kind.NO_ROUTE: (404, "invalid_request_error", "unknown_url"),
    Kind.NO_METHOD: (405, "invalid_request_error", "method_not_supported"),
    Kind.NO_MODEL: (404, "invalid_request_error", "model_not_found"),
    Kind.OVERLOADED: (429, "rate_limit_error", "rate_limit_exceeded"),
    Kind.UNAVAILABLE: (503, "server_error", "unavailable"),
    Kind.ENGINE_LOST: (503, "server_error", "engine_lost"),
    Kind.TIMEOUT: (504, "server_error", "timeout"),
    Kind.FAILED: (500, "server_error", "request_failed"),
    Kind.INTERNAL: (500, "server_error", "internal_error"),
}

# What is not built, with the values that ask for nothing.
UNBUILT: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "bad_words": ([],),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "cache_salt": ("",),
    "priority": (0,),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "prompt_logprobs": (),
}


class StreamOptions(Body):
    """What a stream says beside its pieces."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class Sampling(Body):
    """The fields that completions and chat share."""

    model: str | None = Field(None, description="A name that /v1/models lists.")
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, description="0: always the likeliest token. Default 1.")
    top_p: float | None = None
    n: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(
        None,
        ge=-(2**63),
        le=2**63 - 1,
        description="Choice i has the seed + i; -1 is a seed as others.",
    )
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    allowed_token_ids: list[int] | None = None
    logprob_token_ids: list[int] | None = None
    add_special_tokens: bool | None = None
    # not built; see UNBUILT
    suffix: Any = None
    skip_special_tokens: Any = None
    spaces_between_special_tokens: Any = None
    truncate_prompt_tokens: Any = None
    bad_words: Any = None
    return_token_ids: Any = None
    return_tokens_as_token_ids: Any = None
    cache_salt: Any = None
    priority: Any = None
    response_format: Any = None
    structured_outputs: Any = None
    use_beam_search: Any = None
    length_penalty: Any = None
    prompt_logprobs: Any = None
    # ignored: what these say changes nothing in an answer
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    include_obfuscation: Any = None
    request_id: Any = None


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]] | None = Field(
        None, description="A text, its token ids, or a list of either."
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=0)


class TokenizeBody(Body):
    """POST /tokenize, whose route is TGI's too; see `gptneox.server.dialects.tgi`."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


# -- answers, for the description ----------------------------------------------------------------


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The answer to a request that failed."""

    error: ErrorDetail


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: str
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None


class ModelList(BaseModel):
    """The models that are served."""

    object: str
    data: list[Model]


class CachedTokens(BaseModel):
    """Where prompt tokens came from."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Logprobs(BaseModel):
    """Parallel lists with an entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: str | None
    stop_reason: str | int | None


class Completion(BaseModel):
    """The answer of /v1/completions."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TokenList(BaseModel):
    """The answer of /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int | None


class Text(BaseModel):
    """The answer of /detokenize."""

    prompt: str


# -- the routes ----------------------------------------------------------------------------------


class OpenAi(Dialect):
    """The routes below /v1, and the tokenizer's."""

    bodies: tuple[type[Body], ...] = (CompletionBody, TokenizeBody, DetokenizeBody)

    def owns(self, path: str) -> bool:
        """It is the default form of errors."""
        return True

    def answer_error(self, error: ServiceError) -> Response:
        """See `Dialect`."""
        status, _, _ = _ERRORS[error.kind]
        return JsonAnswer(error_body(error), status, error_headers(error))

    def add_routes(self, app: FastAPI) -> None:
        """See `Dialect`."""
        models: dict[int | str, dict[str, Any]] = {200: {"model": ModelList}}
        app.add_api_route("/v1/models", self.models, responses=models, response_model=None)
        model: dict[int | str, dict[str, Any]] = {
            200: {"model": Model},
            404: {"model": ErrorAnswer},
        }
        app.add_api_route(
            "/v1/models/{model_id:path}", self.model, responses=model, response_model=None
        )
        self.add_post(app, "/v1/completions", self.completions, CompletionBody, Completion)
        self.add_post(app, "/detokenize", self.detokenize, DetokenizeBody, Text)
        app.add_api_route("/tokenizer_info", self.tokenizer_info, response_model=None)

    def add_post(
        self, app: FastAPI, path: str, endpoint: Any, body: type[Body], answer: type[BaseModel]
    ) -> None:
        """Add a route that takes a body."""
        stream: dict[str, Any] = {"text/event-stream": {}} if "stream" in body.model_fields else {}
        responses: dict[int | str, dict[str, Any]] = {200: {"model": answer, "content": stream}}
        for status in (400, 404, 408, 413, 429, 500, 503, 504):
            responses[status] = {"model": ErrorAnswer}
        app.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            response_model=None,
            responses=responses,
            openapi_extra=body_of(body),
        )

    async def models(self) -> Response:
        """The models that are served."""
        context = self.context
        return JsonAnswer(
            {"object": "list", "data": [_model(context, n) for n in context.model_names]}
        )

    async def model(self, model_id: str) -> Response:
        """One of the models that are served."""
        self.context.check_model(model_id)
        return JsonAnswer(_model(self.context, model_id))

    async def detokenize(self, request: HttpRequest) -> Response:
        """The text of token ids."""
        body = await self.context.read(request, DetokenizeBody)
        self.context.check_named_model(body.model)
        size = self.context.vocabulary.size
        if wrong := [i for i in body.tokens if not 0 <= i < size]:
            raise invalid("tokens", f"tokens: {wrong[0]} is no id from 0 to {size - 1}")
        return JsonAnswer({"prompt": self.context.vocabulary.decode(body.tokens)})

    async def tokenizer_info(self) -> Response:
        """What tokenizer_config.json says."""
        return JsonAnswer(self.context.tokenizer_info)

    async def completions(self, request: HttpRequest) -> Response:
        """Continue one or several prompts."""
        body = await self.context.read(request, CompletionBody)
        made = plan_completion(self.context, body, request.scope["state"]["request_id"])
        plan = await until_disconnect(request, made)
        return await answer(self.context, request, plan)


def _model(context: Context, name: str) -> dict[str, Any]:
    limits = context.service.engines[0].limits
    return {
        "id": name,
        "object": "model",
        "created": context.created,
        "owned_by": "gptneox",
        "root": context.model_name,
        "parent": None,
        "max_model_len": limits.max_tokens if limits else None,
    }


async def tokenize(context: Context, body: TokenizeBody) -> Response:
    """The answer of /tokenize to a body of vLLM's.

    Raises:
        ServiceError: the body asks for what is wrong.
    """
    context.check_named_model(body.model)
    ids = await context.vocabulary.encode(
        body.prompt, "prompt", add_special_tokens=bool(body.add_special_tokens)
    )
    limits = context.service.engines[0].limits
    most = limits.max_tokens if limits else None
    return JsonAnswer({"tokens": ids, "count": len(ids), "max_model_len": most})


def error_body(error: ServiceError) -> dict[str, Any]:
    """An error as a JSON object."""
    _, kind, code = _ERRORS[error.kind]
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}


# -- from a body to a request --------------------------------------------------------------------


@dataclass
class Plan:
    """A request, and the form of its answer."""

    request: Request
    writer: Writer
    is_stream: bool
    include_usage: bool
    continuous_usage: bool
    num_best: int  # choices of a prompt that the answer holds; the others are left out


def refuse_unbuilt(body: Body, unbuilt: dict[str, tuple[Any, ...]]) -> None:
    """Raise ServiceError for a field that would change the answer and is not built."""
    for name, neutral in unbuilt.items():
        value = getattr(body, name)
        # 0 == False in Python, but not in JSON
        if value is not None and not any(
            value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral
        ):
            raise invalid(name, f"{name} is not supported; leave it out")


def sampling_values(body: Sampling) -> dict[str, Any]:
    """The fields of SamplingParams that the body sets, without those about length and scores."""
    values: dict[str, Any] = {"temperature": 1.0 if body.temperature is None else body.temperature}
    own = {
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "seed": None if body.seed is None else body.seed % 2**63,  # SamplingParams has no sign
        "ignore_eos": body.ignore_eos,
        "include_stop": body.include_stop_str_in_output,
        "min_new_tokens": body.min_tokens,
    }
    values |= {name: value for name, value in own.items() if value is not None}
    for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
        values[name] = tuple(getattr(body, name) or ())
    values["logit_bias"] = _bias(body.logit_bias or {})
    return values


def _bias(given: dict[str, float]) -> tuple[tuple[int, float], ...]:
    if wrong := [key for key in given if not (key.isascii() and key.isdigit() and len(key) < 10)]:
        raise invalid("logit_bias", f"logit_bias: {wrong[0][:50]!a} is no token id")
    return tuple((int(key), value) for key, value in given.items())


def stop_strings(context: Context, stop: str | list[str] | None) -> tuple[str, ...]:
    """The stop strings; an empty list stands for none."""
    return context.check_stop([stop] if isinstance(stop, str) else stop or [])


# What a body calls the fields of SamplingParams.
NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "include_stop": "include_stop_str_in_output",
    "prompt_logprobs": "logprobs",
}


def check_stream(body: Sampling) -> None:
    """Raise ServiceError for options of a stream without a stream."""
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "stream_options are for stream: true")


async def plan_completion(context: Context, body: CompletionBody, request_id: str) -> Plan:
    """What a completion's body asks for.

    Raises:
        ServiceError: it asks for what is wrong, or not built.
    """
    context.check_named_model(body.model)
    refuse_unbuilt(body, UNBUILT)
    check_stream(body)
    n = body.n or 1
    best_of = body.best_of or n
    if best_of < n:
        raise invalid("best_of", f"best_of is {best_of}; at least n, {n}, is expected")
    if best_of > n and body.stream:
        raise invalid("best_of", "best_of above n cannot be streamed")
    context.service.limits()  # before the work of tokenizing
    given = _prompt_list(body.prompt)
    context.check_choices(len(given) * best_of, "best_of" if best_of > n else "n")
    prompts, texts = [], []
    for each in given:
        is_text = isinstance(each, str)
        ids = (
            await context.vocabulary.encode(
                each, "prompt", add_special_tokens=bool(body.add_special_tokens)
            )
            if isinstance(each, str)
            else each
        )
        prompts.append(ids)
        texts.append(each if is_text else None)
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens", "max_tokens is 0, which needs echo: true")
    params = context.make_params(
        NAMES,
        max_new_tokens=context.room(prompts, body.max_tokens, DEFAULT_MAX_TOKENS),
        stop=stop_strings(context, body.stop),
        logprobs=0 if best_of > n and body.logprobs is None else body.logprobs,
        prompt_logprobs=_prompt_logprobs(body),
        **_limited(sampling_values(body), body.max_tokens),
    )
    request = Request(request_id, prompts, params, best_of)
    shown = [text if isinstance(text, str) else None for text in texts]
    writer = CompletionWriter(context, request, shown, echo=bool(body.echo), logprobs=body.logprobs)
    return make_plan(body, request, writer, n)


def _limited(values: dict[str, Any], max_tokens: int | None) -> dict[str, Any]:
    """Scoring alone needs no stop and no least length."""
    if max_tokens == 0:
        values.pop("min_new_tokens", None)
    return values


def make_plan(body: Sampling, request: Request, writer: Writer, num_best: int) -> Plan:
    """A plan from the fields about streams."""
    options = body.stream_options or StreamOptions()
    return Plan(
        request=request,
        writer=writer,
        is_stream=bool(body.stream),
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.include_usage and options.continuous_usage_stats),
        num_best=num_best,
    )


def _prompt_logprobs(body: CompletionBody) -> int | None:
    if not body.echo:
        return None
    return 0 if body.logprobs is None and body.max_tokens == 0 else body.logprobs


def _prompt_list(prompt: Any) -> list[str | list[int]]:
    """The prompts, each a text or ids; one that is empty is refused later, with its reason."""
    if prompt is None:
        raise invalid("prompt", "prompt is missing; a text or token ids are expected")
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid("prompt", "prompt is an empty list; at least one token is expected")
    if isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


# -- from deltas to an answer --------------------------------------------------------------------


class Writer:
    """Writes the choices of an answer, whole or piece by piece."""

    object_name = ""  # of a whole answer
    chunk_name = ""  # of a piece
    id_prefix = ""

    def __init__(self, context: Context, request: Request) -> None:
        self.context, self.request = context, request
        self.vocabulary: Vocabulary = context.vocabulary
        self.num_tokens = 0
        self._cached = [0] * len(request.prompts)
        self._head = {
            "id": self.id_prefix + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": context.model_name,
        }

    def choice(self, delta: Delta) -> dict[str, Any]:
        """A choice of a whole answer."""
        raise NotImplementedError

    def chunks(self, delta: Delta) -> Iterable[dict[str, Any]]:
        """The pieces of a stream that a delta makes; counts its tokens where they are shown."""
        raise NotImplementedError

    def count(self, delta: Delta) -> None:
        """Count the tokens of a delta."""
        self.num_tokens += delta.num_tokens
        prompt, i = divmod(delta.index, self.request.n)
        if i == 0:
            self._cached[prompt] = max(self._cached[prompt], delta.num_cached_tokens)

    def usage(self) -> dict[str, Any]:
        """Tokens up to now; a prompt counts once, however many choices it has."""
        num_prompt = sum(map(len, self.request.prompts))
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self.num_tokens,
            "total_tokens": num_prompt + self.num_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached)},
        }

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The whole answer."""
        return {"object": self.object_name, **self._head, "choices": choices, "usage": self.usage()}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A piece of a stream."""
        return {"object": self.chunk_name, **self._head, "choices": choices, **more}


@dataclass
class _ChoiceState:
    """What has been written of a choice."""

    offsets: Offsets
    is_echoed: bool = False
    held: Delta | None = None  # waits for the log-probabilities of the prompt


class CompletionWriter(Writer):
    """/v1/completions."""

    object_name = chunk_name = "text_completion"
    id_prefix = "cmpl-"

    def __init__(
        self,
        context: Context,
        request: Request,
        texts: Seq[str | None],
        *,
        echo: bool,
        logprobs: int | None,
    ) -> None:
        """Make a writer.

        Args:
            context: what is served.
            request: the request.
            texts: the prompts as they came; None: as ids.
            echo: whether answers begin with the prompt.
            logprobs: how many likeliest tokens are listed; None: no log-probabilities.
        """
        super().__init__(context, request)
        self._echo, self._logprobs = echo, logprobs
        self._texts = [
            self.vocabulary.decode(ids) if text is None else text
            for ids, text in zip(request.prompts, texts, strict=True)
        ]
        self._states: dict[int, _ChoiceState] = {}

    def choice(self, delta: Delta) -> dict[str, Any]:
        """See `Writer`."""
        prompt = delta.index // self.request.n
        state = self._states.get(delta.index)
        if state is None:
            start = 0 if self._echo else len(self._texts[prompt])
            state = self._states[delta.index] = _ChoiceState(Offsets(self.vocabulary, start))
        is_first = self._echo and not state.is_echoed
        state.is_echoed = True
        return {
            "index": delta.index,
            "text": (self._texts[prompt] if is_first else "") + delta.text,
            "logprobs": self._lists(delta, state.offsets, with_prompt=is_first),
            "finish_reason": delta.finish_reason or None,
            "stop_reason": delta.stop_reason,
        }

    def chunks(self, delta: Delta) -> Iterable[dict[str, Any]]:
        """See `Writer`. The first piece waits for the scores of the prompt that it echoes."""
        self.count(delta)
        state = self._states.get(delta.index)
        if self._echo and self._logprobs is not None and not (state and state.is_echoed):
            if state is None:
                state = _ChoiceState(Offsets(self.vocabulary))
                self._states[delta.index] = state
            if state.held:
                state.held.add(delta)
                delta = state.held
            num_scores = len(self.request.prompts[delta.index // self.request.n]) - 1
            if len(delta.prompt_logprobs) < num_scores and not delta.finish_reason:
                state.held = delta
                return
            state.held = None
        yield self.choice(delta)

    def _lists(self, delta: Delta, offsets: Offsets, *, with_prompt: bool) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        ids: list[int] = []
        entries: list[TokenLogprobs | None] = []
        if with_prompt:
            ids += self.request.prompts[delta.index // self.request.n]
            entries += [None, *delta.prompt_logprobs]
        offset_of = offsets.add(ids)
        ids += delta.token_ids
        entries += delta.logprobs
        if delta.end_id is not None:
            ids.append(delta.end_id)
            entries.append(delta.end_logprob)
        offset_of += offsets.add(ids[len(offset_of) :], shows_special=False)
        return {
            "tokens": [self.vocabulary.token_text(i) for i in ids],
            "token_logprobs": [e and clamped(e.logprob) for e in entries],
            "top_logprobs": [e and self._top(e) for e in entries],
            "text_offset": offset_of,
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens by their texts; of two with one text, the second by its id."""
        listed = {entry.token_id: entry.logprob, **entry.top}
        named: dict[str, float] = {}
        for token_id, logprob in listed.items():
            text = self.vocabulary.token_text(token_id)
            named[f"token_id:{token_id}" if text in named else text] = clamped(logprob)
        return named


def clamped(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, LEAST_LOGPROB)


async def answer(context: Context, request: HttpRequest, plan: Plan) -> Response:
    """Run a request; its answer, whole or as a stream.

    Raises:
        ServiceError: it failed before the first byte.
        ClientGone: the client went away.
    """
    if not plan.is_stream:
        return JsonAnswer(whole_answer(plan, await context.gather(request, plan.request)))
    running = await context.begin(request, plan.request)
    return EventStream(events(running, plan), running.deadline, running.close)


def whole_answer(plan: Plan, deltas: Seq[Delta]) -> dict[str, Any]:
    """The answer as one object."""
    for delta in deltas:
        plan.writer.count(delta)
    choices = [plan.writer.choice(delta) for delta in best_deltas(plan, deltas)]
    for index, choice in enumerate(choices):
        choice["index"] = index
    return plan.writer.whole(choices)


def best_deltas(plan: Plan, deltas: Seq[Delta]) -> list[Delta]:
    """The choices that the answer holds, prompt by prompt, the best ones first if some are left."""
    n = plan.request.n
    if plan.num_best == n:
        return list(deltas)
    kept: list[Delta] = []
    for first in range(0, len(deltas), n):
        best = sorted(deltas[first : first + n], key=mean_logprob, reverse=True)
        kept += best[: plan.num_best]
    return kept


async def events(running: Running, plan: Plan) -> AsyncIterator[bytes]:
    """The events of a stream; those of one step in one piece."""
    writer = plan.writer
    try:
        async for batch in running.batches():
            parts = [] if batch else [PING]
            for delta in batch:
                for choice in writer.chunks(delta):
                    more: dict[str, Any] = {"usage": None} if plan.include_usage else {}
                    if plan.continuous_usage:
                        more = {"usage": writer.usage()}
                    parts.append(event(writer.chunk([choice], **more)))
            yield b"".join(parts)
        if plan.include_usage:
            yield event(writer.chunk([], usage=writer.usage()))
    except ServiceError as error:
        yield event(error_body(error))
    yield DONE
