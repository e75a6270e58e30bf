# SPDX-License-Identifier: Apache-2.0
"""server/dialects/openai_chat.py over a scripted engine."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from support.service import Stub, ask, run_with

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "the cat"}]
TEMPLATE = "gpt-neoxt-chat"


def chat(body: dict[str, Any], *, template: str = TEMPLATE, **settings: Any) -> Any:
    async def go(served: Stub) -> Any:
        return await ask(served, PATH, {"messages": HELLO, **body})

    return run_with(go, template=template, **settings)


def test_the_prompt_is_what_the_template_makes_of_the_messages() -> None:
    async def go(served: Stub) -> None:
        messages = [
            {"role": "developer", "content": "be brief", "name": "boss"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}],
            },
            {"role": "assistant", "content": "the dog", "refusal": None, "tool_calls": []},
            {"role": "user", "content": "the end"},
        ]
        answer = (await ask(served, PATH, {"messages": messages, "max_tokens": 4})).json
        prompt, params = served.engine.added[0]
        vocabulary = served.application.context.vocabulary
        expected = "<human>: be brief\n<human>: the cat\n<bot>: the dog\n<human>: the end\n<bot>:"
        assert vocabulary.decode(prompt) == expected
        assert params.stop == ("\n<human>:", "<human>:")
        assert params.max_new_tokens == 4
        assert answer["object"] == "chat.completion"
        assert answer["id"].startswith("chatcmpl-")
        (choice,) = answer["choices"]
        assert choice["message"] == {"role": "assistant", "content": "abcd", "refusal": None}
        assert choice["finish_reason"] == "length"
        assert choice["logprobs"] is None

    run_with(go, template=TEMPLATE)


def test_answers_may_fill_the_context_unless_a_limit_is_given() -> None:
    answer = chat({}).json
    assert answer["usage"]["total_tokens"] == 128
    answer = chat({"max_tokens": 9, "max_completion_tokens": 2}).json
    assert answer["usage"]["completion_tokens"] == 2


def test_a_stream_begins_with_the_role_and_ends_with_the_reason() -> None:
    body = {"max_tokens": 3, "stream": True, "n": 2, "stream_options": {"include_usage": True}}
    *chunks, last = chat(body, step_s=0.005).chunks
    assert {chunk["object"] for chunk in [*chunks, last]} == {"chat.completion.chunk"}
    for index in range(2):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert [c["delta"] for c in own[1:-1]] == [{"content": c} for c in "abc"]
        assert own[-1]["delta"] == {}
        assert [c["finish_reason"] for c in own] == [None] * 4 + ["length"]
    assert last["usage"]["completion_tokens"] == 6
    options = {"include_usage": True, "continuous_usage_stats": True}
    counted = chat({**body, "n": 1, "stream_options": options}, step_s=0.005).chunks
    assert [c["usage"]["completion_tokens"] for c in counted] == [0, 1, 2, 3, 3, 3]


def test_logprobs_have_the_bytes_of_each_token() -> None:
    answer = chat({"max_tokens": 2, "logprobs": True, "top_logprobs": 2}).json
    first, second = answer["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["bytes"], first["logprob"]) == ("a", [97], -0.5)
    assert [top["logprob"] for top in second["top_logprobs"]] == [-0.5, -9999.0]
    answer = chat({"max_tokens": 2, "logprobs": True}).json
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("messages", v) for v in ([], None, "x", [1], [{}], [{"role": "user"}])),
        ("messages", [{"role": "tool", "content": "x"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
        ("messages", [{"role": "user", "content": ["x"]}]),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}]),
        ("messages", [{"role": "assistant", "content": "x", "tool_calls": [1]}]),
        ("messages", [{"role": "user", "content": "x" * 100_000}]),
        ("messages", [{"role": "user", "content": "\ud800"}]),
        ("tools", [{"type": "function"}]),
        ("functions", [1]),
        ("modalities", ["audio"]),
        ("response_format", {"type": "json_object", "value": {}}),
        ("chat_template", "{{ messages }}"),
        ("top_logprobs", 3),
        ("top_logprobs", 30),
        ("logprobs", 3),
        ("max_completion_tokens", 0),
        ("max_tokens", 0),
        ("best_of", 2),
    ],
)
def test_a_wrong_field_is_named(field: str, value: Any) -> None:
    answer = chat({field: value})
    assert answer.status == 400, answer.body
    assert answer.json["error"]["param"] == field


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "response_format": None},
        {"reasoning_effort": "low", "verbosity": "low", "user": "me", "modalities": ["text"]},
        dict.fromkeys(("logprobs", "top_logprobs", "max_completion_tokens", "functions", "stop")),
    ],
)
def test_neutral_and_ignored_fields_change_nothing(fields: dict[str, Any]) -> None:
    assert chat({"max_tokens": 2, **fields}).status == 200


def test_without_a_template_the_remedy_is_named() -> None:
    answer = chat({}, template="")
    assert answer.status == 400
    assert "template" in answer.json["error"]["message"]


@pytest.mark.parametrize(
    "source", ["{{ messages[9].x.y }}", "{{ raise_exception('no') }}", "{{ [].__class__.__mro__ }}"]
)
def test_a_template_that_fails_is_a_bad_request(source: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(source)
    answer = chat({}, template=str(path))
    assert answer.status == 400, answer.body
    assert answer.json["error"]["param"] == "messages"


def test_a_template_without_end_is_ended_and_delays_nobody(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(
        "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"
    )

    async def go(served: Stub) -> None:
        slow = asyncio.create_task(ask(served, PATH, {"messages": HELLO}))
        await asyncio.sleep(0.1)
        start = time.monotonic()
        assert (await ask(served, "/v1/models")).status == 200
        assert time.monotonic() - start < 1.5  # the template runs for two seconds
        assert not slow.done()
        assert (await slow).status == 400

    run_with(go, template=str(path))
