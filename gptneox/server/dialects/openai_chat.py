# SPDX-License-Identifier: Apache-2.0
"""OpenAI's chat completions, for models with a chat template.

Source: OpenAI's API reference and its Python client.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gptneox.chat_templates import ChatTemplate, ChatTemplateError, render_chat
from gptneox.engine.sequence import TokenLogprobs
from gptneox.server.asgi import until_disconnect
from gptneox.server.dialects.base import MAX_LOGPROBS, Context
from gptneox.server.dialects.openai import (
    NAMES,
    UNBUILT,
    OpenAi,
    Plan,
    Sampling,
    Usage,
    Writer,
    answer,
    check_stream,
    clamped,
    make_plan,
    refuse_unbuilt,
    sampling_values,
    stop_strings,
)
from gptneox.server.errors import Kind, ServiceError, invalid
from gptneox.server.service import Delta, Request

ROLES = ("system", "developer", "user", "assistant")

# What is not built, with the values that ask for nothing.
UNBUILT_IN_CHAT: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"], []),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "moderation": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "echo": (False,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
}


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(
        description="Objects with role (system, developer, user or assistant) and content, a text "
        'or a list of {"type": "text", "text": …}.'
    )
    max_completion_tokens: int | None = Field(None, ge=1, description="Goes before max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    # not built; see UNBUILT_IN_CHAT
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    moderation: Any = None
    chat_template: Any = None
    chat_template_kwargs: Any = None
    documents: Any = None
    echo: Any = None
    continue_final_message: Any = None
    add_generation_prompt: Any = None
    # ignored: they are about tools and reasoning, which there are none of
    parallel_tool_calls: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None


class Message(BaseModel):
    """What the assistant says."""

    role: str
    content: str
    refusal: str | None


class TopLogprob(BaseModel):
    """A likely token at a position."""

    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of an answer."""

    content: list[TokenLogprob]
    refusal: list[TokenLogprob] | None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class OpenAiChat(OpenAi):
    """/v1/chat/completions; its errors are those of the other routes of OpenAI."""

    bodies = (ChatBody,)

    def owns(self, path: str) -> bool:
        """See `Dialect`."""
        return path.startswith("/v1/chat/")

    def add_routes(self, app: FastAPI) -> None:
        """See `Dialect`."""
        self.add_post(app, "/v1/chat/completions", self.chat, ChatBody, ChatCompletion)

    async def chat(self, request: HttpRequest) -> Response:
        """The assistant's next message."""
        body = await self.context.read(request, ChatBody)
        made = plan_chat(self.context, body, request.scope["state"]["request_id"])
        plan = await until_disconnect(request, made)
        return await answer(self.context, request, plan)


async def plan_chat(context: Context, body: ChatBody, request_id: str) -> Plan:
    """What a chat's body asks for.

    Raises:
        ServiceError: it asks for what is wrong, or not built.
    """
    context.check_named_model(body.model)
    refuse_unbuilt(body, {**UNBUILT, **UNBUILT_IN_CHAT})
    check_stream(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "top_logprobs needs logprobs: true")
    n = body.n or 1
    context.check_choices(n)
    context.service.limits()  # before the work of tokenizing
    template = template_of(context)
    text = await chat_text(context, body.messages)
    prompt = await context.vocabulary.encode(text, "messages")
    names, asked = NAMES, body.max_tokens
    if body.max_completion_tokens is not None:
        names, asked = (
            {**NAMES, "max_new_tokens": "max_completion_tokens"},
            body.max_completion_tokens,
        )
    params = context.make_params(
        names,
        max_new_tokens=context.room([prompt], asked, None),
        stop=(*stop_strings(context, body.stop), *template.stop),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        **sampling_values(body),
    )
    request = Request(request_id, [prompt], params, n)
    writer = ChatWriter(context, request, logprobs=bool(body.logprobs))
    return make_plan(body, request, writer, n)


def template_of(context: Context) -> ChatTemplate:
    """The chat template.

    Raises:
        ServiceError: there is none.
    """
    if context.chat_template is None:
        raise invalid("messages", context.why_no_chat)
    return context.chat_template


async def chat_text(context: Context, given: Seq[dict[str, Any]]) -> str:
    """The prompt that messages make.

    Raises:
        ServiceError: there is no template, or the messages do not suit it.
    """
    template = template_of(context)
    messages = plain_messages(given)
    num_chars = sum(len(message["content"]) for message in messages)
    if num_chars > context.vocabulary.max_chars:
        raise ServiceError(
            Kind.TOO_LONG,
            f"messages have {num_chars} characters; no text of more than "
            f"{context.vocabulary.max_chars} fits the context",
            param="messages",
        )
    try:
        return await context.vocabulary.in_thread(lambda: render_chat(messages, template))
    except ChatTemplateError as error:
        raise invalid("messages", str(error)) from error


def plain_messages(given: Seq[dict[str, Any]]) -> list[dict[str, str]]:
    """Messages with a text each.

    Raises:
        ServiceError: a message is none, or asks for what is not built.
    """
    if not given:
        raise invalid("messages", "messages is empty; at least one message is expected")
    messages = []
    for i, message in enumerate(given):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise invalid("messages", f"messages[{i}].role is not one of {', '.join(ROLES)}")
        for key, value in message.items():
            if key not in ("role", "content", "name") and value not in (None, [], {}):
                raise invalid("messages", f"messages[{i}].{key[:100]!a} is not supported")
        if isinstance(content, list):
            content = "".join(_part(i, part) for part in content)
        if not isinstance(content, str):
            raise invalid("messages", f"messages[{i}].content is no text and no list of parts")
        messages.append({"role": role, "content": content})
    return messages


def _part(index: int, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise invalid("messages", f"messages[{index}].content: parts of type text are supported")
    text = part.get("text")
    if not isinstance(text, str):
        raise invalid("messages", f"messages[{index}].content: a part has no text")
    return text


class ChatWriter(Writer):
    """/v1/chat/completions."""

    object_name, chunk_name = "chat.completion", "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def __init__(self, context: Context, request: Request, *, logprobs: bool) -> None:
        super().__init__(context, request)
        self._logprobs = logprobs
        self._begun: set[int] = set()

    def choice(self, delta: Delta) -> dict[str, Any]:
        """See `Writer`."""
        return {
            "index": delta.index,
            "message": {"role": "assistant", "content": delta.text, "refusal": None},
            "logprobs": self._tokens(delta),
            "finish_reason": delta.finish_reason or None,
            "stop_reason": delta.stop_reason,
        }

    def chunks(self, delta: Delta) -> Iterable[dict[str, Any]]:
        """See `Writer`. First the role, then the text, last why it ends."""
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            yield self._piece(delta, {"role": "assistant", "content": ""})
        self.count(delta)
        is_end_alone = delta.finish_reason and not delta.text and not delta.token_ids
        if not is_end_alone:
            yield self._piece(delta, {"content": delta.text}, self._tokens(delta))
        if delta.finish_reason:
            end = self._piece(delta, {})
            yield {**end, "finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}

    def _piece(self, delta: Delta, content: dict[str, Any], logprobs: Any = None) -> dict[str, Any]:
        return {
            "index": delta.index,
            "delta": content,
            "logprobs": logprobs,
            "finish_reason": None,
        }

    def _tokens(self, delta: Delta) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            {**self._token(entry.token_id, entry.logprob), "top_logprobs": self._top(entry)}
            for entry in delta.logprobs
        ]
        return {"content": content, "refusal": None}

    def _top(self, entry: TokenLogprobs) -> list[dict[str, Any]]:
        most = self.request.params.logprobs or 0
        return [self._token(i, logprob) for i, logprob in list(entry.top.items())[:most]]

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.vocabulary.token_text(token_id),
            "bytes": list(self.vocabulary.token_bytes(token_id)),
            "logprob": clamped(logprob),
        }
