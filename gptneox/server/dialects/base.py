# SPDX-License-Identifier: Apache-2.0
"""What every dialect shares: what it serves, and how it reads a request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gptneox.chat_templates import ChatTemplate
from gptneox.config.settings import ServerSection
from gptneox.engine.sequence import InvalidParameter, SamplingParams, check_vocabulary
from gptneox.server.asgi import read_json
from gptneox.server.errors import Kind, ServiceError, invalid
from gptneox.server.service import Service
from gptneox.server.vocabulary import Vocabulary

MAX_STOP_CHARS = 512
MAX_LOGPROBS = 20  # likeliest tokens at a position; Source: OpenAI's API reference
LEAST_LOGPROB = -9999.0  # JSON has no infinity; Source: OpenAI's own answers


class Body(BaseModel):
    """A JSON body. A field that is null counts as absent; a field that is not here is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


OneBody = TypeVar("OneBody", bound=Body)


@dataclass(frozen=True)
class Context:
    """What the service serves."""

    service: Service
    vocabulary: Vocabulary
    settings: ServerSection
    model_names: tuple[str, ...]  # the first is that of answers
    created: int  # seconds since 1970: when the service started
    tokenizer_info: Mapping[str, Any]  # of tokenizer_config.json
    chat_template: ChatTemplate | None = None
    why_no_chat: str = "the model has no chat template"  # where there is none

    @property
    def model_name(self) -> str:
        """The name in answers."""
        return self.model_names[0]

    async def read(self, request: HttpRequest, kind: type[OneBody]) -> OneBody:
        """The body of a request.

        Raises:
            ServiceError: it is no such body.
        """
        content = await read_json(request, self.settings.max_body_bytes)
        try:
            return kind.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False, include_context=False)[0]
            param = str(first["loc"][0]) if first["loc"] else None
            text = first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                text = "there is no such field"
            shown = param if param is None else ascii(param)[1:-1][:100]
            raise ServiceError(Kind.INVALID, f"{shown}: {text}", param=shown) from error

    def check_model(self, name: str | None) -> None:
        """Raise ServiceError for a model that is not served."""
        if name is not None and name not in self.model_names:
            raise ServiceError(
                Kind.NO_MODEL,
                f"the model {name[:100]!r} does not exist; {', '.join(self.model_names)} is served",
                param="model",
            )

    def room(self, prompts: Seq[Seq[int]], asked: int | None, default: int | None) -> int:
        """How many tokens to generate for each of the prompts.

        Args:
            prompts: token ids; they are checked too.
            asked: by the client; None: not at all.
            default: what counts then, as far as the context has room; None: all of its room.

        Raises:
            ServiceError: a prompt is no prompt, or does not fit with its answer.
        """
        limits = self.service.limits()
        longest = 0
        for prompt in prompts:
            if not prompt:
                raise invalid("prompt", "prompt is empty; at least one token is expected")
            longest = max(longest, len(prompt))
        left = limits.max_tokens - longest
        least = 0 if asked == 0 else 1
        wanted = asked if asked is not None else min(left, default or left)
        if left < max(least, wanted):
            raise ServiceError(
                Kind.TOO_LONG,
                f"the context holds {limits.max_tokens} tokens; the prompt has {longest}, and "
                f"{max(least, wanted)} more are to be generated: {longest + max(least, wanted)}",
                param="prompt" if left < least else "max_tokens",
            )
        try:
            for prompt in prompts:
                check_vocabulary("prompt", prompt, limits.vocab_size)
        except InvalidParameter as error:
            raise invalid("prompt", str(error)) from error
        return wanted

    def make_params(self, names: Mapping[str, str], **values: Any) -> SamplingParams:
        """Parameters of a request.

        Args:
            names: what the dialect calls the fields, where it has other names.
            values: the fields.

        Raises:
            ServiceError: a value is out of range; it names the dialect's field.
        """
        try:
            params = SamplingParams(**values)
            size = self.service.limits().vocab_size
            check_vocabulary("stop_token_ids", params.stop_token_ids, size)
            check_vocabulary("logprob_token_ids", params.logprob_token_ids, size)
            check_vocabulary("allowed_token_ids", params.allowed_token_ids, size)
            check_vocabulary("logit_bias", (i for i, _ in params.logit_bias), size)
        except InvalidParameter as error:
            own = names.get(error.param, error.param)
            raise invalid(own, f"{own}{str(error).removeprefix(error.param)}") from error
        return params

    def check_stop(self, stop: Seq[str], name: str = "stop") -> tuple[str, ...]:
        """Stop strings, which must not be long; their number is checked with the parameters."""
        if any(len(text) > MAX_STOP_CHARS for text in stop):
            raise invalid(name, f"{name}: at most {MAX_STOP_CHARS} characters each are expected")
        return tuple(stop)

    def check_choices(self, num_choices: int, param: str = "n") -> None:
        """Raise ServiceError for more choices than a request may have."""
        most = self.service.most_choices
        if num_choices > most:
            raise invalid(
                param, f"{num_choices} choices (prompts times n) are asked for; {most} are the most"
            )


class Dialect(ABC):
    """An API: its routes, and the form of its errors."""

    bodies: tuple[type[Body], ...] = ()  # those that its routes take, for the description

    def __init__(self, context: Context) -> None:
        self.context = context

    @abstractmethod
    def owns(self, path: str) -> bool:
        """Whether errors at this path have this dialect's form."""

    @abstractmethod
    def add_routes(self, app: FastAPI) -> None:
        """Add the routes to the application."""

    @abstractmethod
    def answer_error(self, error: ServiceError) -> Response:
        """The answer to a request that failed before its first byte."""


def body_of(kind: type[Body]) -> dict[str, Any]:
    """The description of a route's body, for `openapi_extra`; see `app.describe`."""
    reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}
    }
