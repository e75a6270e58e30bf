# SPDX-License-Identifier: Apache-2.0
"""server/dialects/tgi.py: over a scripted engine, over a model, and by its own client."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import GenerationError, OverloadedError, ValidationError
from support.model_engine import model_engine, write_model
from support.service import LIMITS, NAME, Answer, Stub, ask, run_with, scored, stub

from gptneox.engine.detokenizer import special_tokens
from gptneox.engine.sequence import SamplingParams
from gptneox.server.service import OnOutput
from gptneox.server.wire import Output

ROOT, WHOLE, STREAM = "/", "/generate", "/generate_stream"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def generate(parameters: dict[str, Any] | None = None, path: str = WHOLE, **settings: Any) -> Any:
    async def go(served: Stub) -> Any:
        return await ask(served, path, {"inputs": "hi", "parameters": parameters})

    return run_with(go, **settings)


def params_of(parameters: dict[str, Any], path: str = WHOLE) -> SamplingParams:
    """The parameters that reach the engine."""

    async def go(served: Stub) -> Any:
        answer = await ask(served, path, {"inputs": "hi", "parameters": parameters})
        assert answer.status == 200, answer.body
        return served.engine.added[0][1]

    params: SamplingParams = run_with(go)
    return params


def events_of(answer: Answer) -> list[Any]:
    """The events of a stream, which ends without [DONE]."""
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
    return [json.loads(event) for event in answer.events]


def error_of(answer: Answer) -> tuple[int, str]:
    """Status and type of an error, which has this form and no other."""
    assert set(answer.json) == {"error", "error_type"}
    assert answer.json["error"]
    assert "Traceback" not in answer.json["error"]
    return answer.status, answer.json["error_type"]


# -- whole answers -------------------------------------------------------------------------------


def test_the_root_answers_a_list_and_generate_an_object() -> None:
    parameters = {"max_new_tokens": 3}
    assert generate(parameters, ROOT).json == [{"generated_text": "abc"}]
    assert generate(parameters).json == {"generated_text": "abc"}
    full = generate({**parameters, "return_full_text": True})
    assert full.json == {"generated_text": "hiabc"}
    assert generate().json["generated_text"] == (5 * LETTERS)[:126]  # the context's room
    assert full.headers["x-prompt-tokens"] == "2"
    assert full.headers["x-generated-tokens"] == "3"
    assert full.headers["x-compute-type"] == "cpu"
    assert full.headers["x-compute-characters"] == "2"
    names = ("total-time", "validation-time", "queue-time", "inference-time", "time-per-token")
    times = [float(full.headers[f"x-{name}"]) for name in names]
    assert all(value >= 0 for value in times)
    assert float(full.headers["x-compute-time"]) > 0


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": False, "temperature": 0.9, "top_k": 5, "top_p": 0.5, "seed": 3}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.9}, 0.9),
        ({"temperature": 0.9}, 0.9),  # as TGI and MindIE have it
        ({"top_p": 0.5}, 1.0),
        ({"top_k": 5}, 1.0),
        ({"repetition_penalty": 1.5, "seed": 3}, 0.0),
    ],
)
def test_tokens_are_sampled_where_do_sample_or_what_it_needs_is_given(
    parameters: dict[str, Any], temperature: float
) -> None:
    assert params_of(parameters).temperature == temperature


def test_the_fields_reach_the_engine() -> None:
    params = params_of(
        {
            "max_new_tokens": 7, "do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9,
            "repetition_penalty": 1.2, "frequency_penalty": -0.5, "seed": 5, "stop": ["x", "yz"],
            "top_n_tokens": 4, "details": True, "decoder_input_details": True, "truncate": 1,
        }
    )  # fmt: skip
    assert (params.max_new_tokens, params.temperature, params.top_p) == (7, 0.5, 0.9)
    assert (params.top_k, params.repetition_penalty, params.frequency_penalty) == (3, 1.2, -0.5)
    assert (params.seed, params.stop, params.include_stop) == (5, ("x", "yz"), True)
    assert (params.logprobs, params.prompt_logprobs) == (4, 0)
    plain = params_of({})
    assert (plain.logprobs, plain.prompt_logprobs, plain.seed) == (None, None, None)


NEUTRAL = {"watermark": False, "stop": [], "best_of": 1, "details": False, "top_n_tokens": 0}


@pytest.mark.parametrize("value", [None, NEUTRAL])
def test_null_and_neutral_fields_change_nothing(value: Any) -> None:
    names = (
        *("adapter_id", "best_of", "decoder_input_details", "details", "do_sample", "grammar"),
        *("frequency_penalty", "max_new_tokens", "repetition_penalty", "return_full_text", "seed"),
        *("stop", "temperature", "top_k", "top_n_tokens", "top_p", "truncate", "typical_p"),
        "watermark",
    )
    assert params_of(value or dict.fromkeys(names)) == params_of({})


def test_truncate_keeps_the_end_of_the_prompt() -> None:
    async def go(served: Stub) -> None:
        body = {"inputs": "the cat", "parameters": {"truncate": 1, "details": True}}
        answer = (await ask(served, WHOLE, body)).json
        assert served.application.context.vocabulary.decode(served.engine.added[0][0]) == " cat"
        assert answer["details"]["prompt_tokens"] == 1

    run_with(go)


def test_details_list_the_tokens_of_prompt_and_answer() -> None:
    parameters = {"max_new_tokens": 2, "details": True, "decoder_input_details": True}
    details = generate({**parameters, "top_n_tokens": 1}).json["details"]
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == 2
    assert details["seed"] is None
    assert [(t["text"], t["logprob"]) for t in details["prefill"]] == [("h", None), ("i", -0.5)]
    assert [set(token) for token in details["tokens"]] == [{"id", "text", "logprob", "special"}] * 2
    assert [token["text"] for token in details["tokens"]] == ["a", "b"]
    assert details["top_tokens"] == [[token] for token in details["tokens"]]
    plain = generate({"max_new_tokens": 2, "details": True}).json["details"]
    assert (plain["prefill"], plain["tokens"]) == ([], details["tokens"])
    assert "top_tokens" not in plain


def test_a_seed_that_was_drawn_is_told() -> None:
    async def go(served: Stub) -> None:
        parameters = {"max_new_tokens": 2, "details": True, "do_sample": True}
        answer = await ask(served, WHOLE, {"inputs": "hi", "parameters": parameters})
        assert answer.json["details"]["seed"] == served.engine.added[0][1].seed is not None
        answer = await ask(served, WHOLE, {"inputs": "hi", "parameters": {**parameters, "seed": 9}})
        assert answer.json["details"]["seed"] == 9

    run_with(go)


def test_best_of_tells_the_others_too() -> None:
    async def go(served: Stub) -> None:
        def script(number: int, on_output: OnOutput) -> None:
            entry = replace(scored(A), logprob=(-3.0, 0.0, -2.0)[number % 3])
            text = LETTERS[number % 3]
            on_output(Output(number, text, 1, [A], [entry], finish_reason="stop", end_id=0))

        served.engine.script = script
        parameters = {"best_of": 3, "do_sample": True, "seed": 7, "details": True}
        answer = (await ask(served, WHOLE, {"inputs": "hi", "parameters": parameters})).json
        assert answer["generated_text"] == "b"  # log-probabilities -3, -0, -2
        assert answer["details"]["seed"] == 8
        others = answer["details"]["best_of_sequences"]
        assert [other["generated_text"] for other in others] == ["c", "a"]
        assert [other["seed"] for other in others] == [9, 7]
        body = {"inputs": "hi", "parameters": {**parameters, "details": False}}
        assert (await ask(served, WHOLE, body)).json == {"generated_text": "b"}

    run_with(go)


def scripted(*outputs: Output) -> Callable[[int, OnOutput], None]:
    def script(number: int, on_output: OnOutput) -> None:
        for output in outputs:
            on_output(replace(output, number=number))

    return script


def both_ways(script: Callable[[int, OnOutput], None], **parameters: Any) -> tuple[Any, list[Any]]:
    """The object of a whole answer and the events of a stream, one after the other."""

    async def go(served: Stub) -> Any:
        served.engine.script = script
        body = {"inputs": "hi", "parameters": {"details": True, **parameters}}
        whole, streamed = await ask(served, WHOLE, body), await ask(served, STREAM, body)
        assert whole.status == 200, whole.body
        return whole.json, events_of(streamed)

    result: tuple[Any, list[Any]] = run_with(go)
    whole, events = result
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))
    assert [event["token"] for event in events] == whole["details"]["tokens"]
    assert [event["generated_text"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert [event["details"] for event in events[:-1]] == [None] * (len(events) - 1)
    last = events[-1]
    assert last["generated_text"] == whole["generated_text"]
    for name in ("finish_reason", "generated_tokens", "seed"):
        assert last["details"][name] == whole["details"][name]
    assert last["details"]["input_length"] == 2
    shown = "".join(event["token"]["text"] for event in events if not event["token"]["special"])
    assert shown == whole["generated_text"]
    return whole, events


A, B, C = (66, 67, 68)
END = {"finish_reason": "stop", "end_id": 0, "end_logprob": scored(0)}


@pytest.mark.parametrize(
    ("outputs", "text", "tokens", "reason"),
    [
        pytest.param(
            [Output(0, "a", 1, [A], [scored(A)]), Output(0, "", 1, **END)],
            "a", ["a", "<|endoftext|>"], "eos_token", id="end of text",
        ),
        pytest.param(
            [Output(0, "a" * 9, 9, [A] * 9, [scored(A)] * 9), Output(0, "", 1, **END)],
            "a" * 9, [*"a" * 9, "<|endoftext|>"], "length", id="length first",
        ),
        pytest.param(
            [Output(0, "abc", 3, [A, B, C], [scored(A)] * 3, finish_reason="length")],
            "abc", ["a", "b", "c"], "length", id="three in one step",
        ),
        pytest.param(
            [
                Output(0, "", 2),
                Output(0, "ab", 1, [A, B, C], [scored(A)] * 3, finish_reason="stop",
                       stop_reason="b"),
            ],
            "ab", ["a", "b", ""], "stop_sequence", id="held back",
        ),
        pytest.param(
            [
                Output(0, "a", 1, [A], [scored(A)]),
                Output(0, "th", 1, finish_reason="stop", stop_reason="th", cut_ids=[259],
                       cut_logprobs=[scored(259)]),
            ],
            "ath", ["a", "th"], "stop_sequence", id="a stop string inside a token",
        ),
    ],
)  # fmt: skip
def test_every_token_is_an_event_and_the_last_one_has_the_text(
    outputs: Seq[Output], text: str, tokens: list[str], reason: str
) -> None:
    whole, _ = both_ways(scripted(*outputs), max_new_tokens=10)
    assert whole["generated_text"] == text
    assert whole["details"]["finish_reason"] == reason
    assert [token["text"] for token in whole["details"]["tokens"]] == tokens
    assert whole["details"]["generated_tokens"] == sum(output.num_tokens for output in outputs)
    specials = [token["special"] for token in whole["details"]["tokens"]]
    assert specials == [text.startswith("<|") for text in tokens]


def test_of_a_character_the_last_token_has_all() -> None:
    async def go(served: Stub) -> list[int]:
        return await served.application.context.vocabulary.encode("\U0001f600", "inputs")

    ids = run_with(go)
    entries = [scored(i) for i in ids]
    output = Output(0, "\U0001f600", len(ids), ids, entries, finish_reason="length")
    whole, _ = both_ways(scripted(output))
    assert [t["text"] for t in whole["details"]["tokens"]] == ["", "", "", "\U0001f600"]


def test_a_stream_tells_its_details_and_likeliest_tokens_where_they_are_asked_for() -> None:
    events = events_of(generate({"max_new_tokens": 2}, STREAM, step_s=0.001))
    assert [event["token"]["logprob"] for event in events] == [-0.5, -0.5]
    assert events[-1]["details"] is None
    assert events[-1]["generated_text"] == "ab"
    assert "top_tokens" not in events[0]
    answer = generate({"max_new_tokens": 2, "top_n_tokens": 1, "return_full_text": True}, STREAM)
    events = events_of(answer)
    assert [event["top_tokens"] for event in events] == [[event["token"]] for event in events]
    assert events[-1]["generated_text"] == "hiab"
    assert answer.headers["x-compute-characters"] == "2"


def test_the_root_streams_too() -> None:
    async def go(served: Stub) -> None:
        body = {"inputs": "hi", "parameters": {"max_new_tokens": 2}, "stream": True}
        assert [e["token"]["text"] for e in events_of(await ask(served, ROOT, body))] == ["a", "b"]

    run_with(go)


# -- what is refused -----------------------------------------------------------------------------


WRONG: dict[str, Seq[Any]] = {
    "max_new_tokens": (0, -1, 1.5, "9", True, 127),
    "temperature": (0, -1, "hot", True),
    "top_p": (0, 1.1),
    "top_k": (-5, 2.5),
    "repetition_penalty": (0, "1"),
    "frequency_penalty": (-3, 3),
    "stop": ([""], "x", ["x"] * 100, ["x" * 600], [5]),
    "seed": (-1, 2**63, 1.5),
    "best_of": (0, 2, 10**6, "2"),
    "truncate": (0, -1),
    "top_n_tokens": (-1, 21),
    "details": (1, "yes"),
    "typical_p": (0.5,),
    "watermark": (True,),
    "adapter_id": ("a",),
    "grammar": ({"type": "json", "value": {}},),
    "no_such_field": (None,),
    "no such\nfield": (1,),
}


def test_a_wrong_field_is_named_and_the_next_request_is_served() -> None:
    shown = {"127": "prompt has 2, and 127 more", "1000000": "1000000 choices"}

    async def go(served: Stub) -> None:
        for field, values in WRONG.items():
            for value, path in itertools.product(values, (ROOT, WHOLE, STREAM)):
                parameters = {"max_new_tokens": 4, field: value}
                answer = await ask(served, path, {"inputs": "hi", "parameters": parameters})
                assert error_of(answer) == (422, "validation"), (field, value, answer.body)
                named = shown.get(str(value)) or field.replace("\n", "\\n")
                assert named in answer.json["error"], (field, value)
        assert not served.engine.added
        assert (await ask(served, WHOLE, {"inputs": "hi"})).status == 200

    run_with(go)


NO_BODIES: Seq[Any] = [
    *({"inputs": value} for value in (None, "", 5, ["a"], "x" * 200_000, "\ud800")),
    *({"inputs": "hi", "parameters": value} for value in (5, [], "x")),
    *({"inputs": "hi", name: 1} for name in ("stream", "model", "options")),
    *({}, [], "text", 5, b'{"inputs": "hi"', b'{"inputs": NaN}', b"[" * 10_000),
]


def test_what_is_no_body_is_refused_in_the_form_of_the_path() -> None:
    async def go(served: Stub) -> None:
        for body, path in itertools.product(NO_BODIES, (ROOT, WHOLE, STREAM)):
            assert error_of(await ask(served, path, body)) == (422, "validation"), (path, body)
        assert not served.engine.added

    run_with(go)


@pytest.mark.parametrize("path", [WHOLE, STREAM])
def test_a_path_that_says_how_it_answers_is_not_contradicted(path: str) -> None:
    async def go(served: Stub) -> None:
        for stream in (True, False, None):
            answer = await ask(served, path, {"inputs": "hi", "stream": stream})
            assert answer.status == (422 if stream == (path == WHOLE) else 200)

    run_with(go)


@pytest.mark.parametrize(
    ("parameters", "word"),
    [({"best_of": 2, "do_sample": True}, "best_of"), ({"decoder_input_details": True}, "decoder")],
)
def test_what_cannot_be_streamed_is_refused(parameters: dict[str, Any], word: str) -> None:
    assert generate(parameters).status == 200
    answer = generate(parameters, STREAM)
    assert error_of(answer) == (422, "validation")
    assert word in answer.json["error"]


def test_every_failure_has_the_status_of_its_kind() -> None:
    async def go(served: Stub) -> None:
        assert error_of(await ask(served, WHOLE)) == (405, "method_not_allowed")
        huge = await ask(served, WHOLE, b"x" * 5000)
        assert error_of(huge) == (413, "validation")
        served.engine.script = scripted(Output(0, finish_reason="error", error="NaN at 0x7fff"))
        for path in (ROOT, WHOLE, STREAM):
            answer = await ask(served, path, {"inputs": "hi"})
            assert error_of(answer) == (424, "generation")
            assert b"0x7fff" not in answer.body
        served.engine.script = scripted()
        tasks = [asyncio.create_task(ask(served, WHOLE, {"inputs": "hi"})) for _ in range(3)]
        answers = [await task for task in tasks]
        kinds = sorted(error_of(answer) for answer in answers)
        assert kinds == [(429, "overloaded")] + [(500, "incomplete_generation")] * 2
        assert all("retry-after" in a.headers for a in answers if a.status == 429)
        served.engine.limits = None
        for path, body in ((WHOLE, {"inputs": "hi"}), ("/info", None), ("/ping", None)):
            assert error_of(await ask(served, path, body)) == (503, "healthcheck")

    run_with(go, max_concurrent_requests=2, request_timeout_s=0.5, max_body_bytes=4096)


def test_a_key_is_asked_for_in_the_form_of_the_path() -> None:
    async def go(served: Stub) -> None:
        for path in (ROOT, WHOLE, "/info", "/chat_tokenize"):
            assert error_of(await ask(served, path, {"inputs": "hi"})) == (401, "unauthorized")
        headers = {"authorization": "Bearer secret"}
        assert (await ask(served, WHOLE, {"inputs": "hi"}, headers=headers)).status == 200

    run_with(go, keys=["secret"])


def test_after_the_first_byte_an_error_is_an_event() -> None:
    async def go(served: Stub) -> None:
        def script(number: int, on_output: OnOutput) -> None:
            on_output(Output(number, "a", 1, [A], [scored(A)]))
            failed = Output(number, finish_reason="error", error="NaN")
            asyncio.get_running_loop().call_later(0.1, on_output, failed)

        served.engine.script = script
        first, last = events_of(await ask(served, STREAM, {"inputs": "hi"}))
        assert first["token"]["text"] == "a"
        assert set(last) == {"error", "error_type"}
        assert last["error_type"] == "generation"

    run_with(go)


# -- other routes --------------------------------------------------------------------------------


def test_tokenize_answers_by_the_key() -> None:
    async def go(served: Stub) -> None:
        text = "the \U0001f600 cat"
        tokens = (await ask(served, "/tokenize", {"inputs": text})).json
        assert [token["id"] for token in tokens] == [
            *(await ask(served, "/tokenize", {"prompt": text})).json["tokens"]
        ]
        assert tokens[0] == {"id": tokens[0]["id"], "text": "the", "start": 0, "stop": 3}
        assert all(text[t["start"] : t["stop"]] == t["text"] for t in tokens)
        assert tokens[-1]["stop"] == len(text)
        for body in ({"inputs": "a", "prompt": "a"}, {}):
            answer = await ask(served, "/tokenize", body)
            assert (answer.status, answer.json["error"]["param"]) == (400, "inputs")
        assert error_of(await ask(served, "/tokenize", {"inputs": ""})) == (422, "validation")
        answer = await ask(served, "/tokenize", {"prompt": ""})
        assert (answer.status, answer.json["error"]["param"]) == (400, "prompt")

    run_with(go)


def test_a_chat_can_be_seen_as_a_prompt() -> None:
    async def go(served: Stub) -> None:
        messages = [{"role": "user", "content": "the cat"}]
        answer = (await ask(served, "/chat_tokenize", {"messages": messages})).json
        text = answer["templated_text"]
        assert "the cat" in text
        assert "".join(token["text"] for token in answer["tokenize_response"]) == text
        await ask(served, "/v1/chat/completions", {"messages": messages})
        ids = [token["id"] for token in answer["tokenize_response"]]
        assert ids == served.engine.added[0][0]
        answer = await ask(served, "/chat_tokenize", {"messages": [{"role": "nobody"}]})
        assert error_of(answer) == (422, "validation")

    run_with(go, template="gpt-neoxt-chat")


def test_invocations_answer_by_the_key() -> None:
    async def go(served: Stub) -> None:
        path = "/invocations"
        body = {"inputs": "hi", "parameters": {"max_new_tokens": 2}}
        assert (await ask(served, path, body)).json == [{"generated_text": "ab"}]
        answer = (await ask(served, path, {"prompt": "hi", "max_tokens": 2})).json
        assert answer["choices"][0]["text"] == "ab"
        messages = [{"role": "user", "content": "hi"}]
        answer = (await ask(served, path, {"messages": messages, "max_tokens": 2})).json
        assert answer["choices"][0]["message"]["content"] == "ab"
        for wrong in ({}, {"inputs": "hi", "prompt": "hi"}, {"prompt": ""}, {"messages": []}):
            assert error_of(await ask(served, path, wrong)) == (422, "validation")

    run_with(go, template="gpt-neoxt-chat")


def test_info_tells_the_limits() -> None:
    async def go(served: Stub) -> None:
        info = (await ask(served, "/info")).json
        assert (info["model_id"], info["model_device_type"]) == (NAME, "cpu")
        assert (info["max_total_tokens"], info["max_input_tokens"]) == (128, 127)
        answer = await ask(served, "/ping")
        assert (answer.status, answer.body) == (200, b"")
        assert (await ask(served, "/")).status == 200  # the page

    run_with(go)


# -- over a model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tgi") / "model")


async def ask_everywhere(
    served: Stub, prompt: str, own: dict[str, Any], shared: dict[str, Any]
) -> Any:
    parameters = {"max_new_tokens": 24, "details": True, **shared, **own}
    body = {"inputs": prompt, "parameters": parameters}
    whole, streamed = await ask(served, WHOLE, body), await ask(served, STREAM, body)
    assert whole.status == 200, whole.body
    details, text = whole.json["details"], whole.json["generated_text"]
    events = events_of(streamed)
    assert [event["token"] for event in events] == details["tokens"]
    assert events[-1]["generated_text"] == text
    assert details["generated_tokens"] == len(events)
    plain = [event["token"]["text"] for event in events if not event["token"]["special"]]
    assert "".join(plain) == text
    legacy = {"prompt": prompt, "max_tokens": 24, "include_stop_str_in_output": True, **shared}
    openai = {"temperature": 0, "logprobs": 0, **legacy}
    choice = (await ask(served, "/v1/completions", openai)).json["choices"][0]
    assert choice["text"] == text
    assert choice["finish_reason"] == ("length" if len(events) == 24 else "stop")
    whole_tokens = len(choice["logprobs"]["token_logprobs"])
    tokens = details["tokens"][:whole_tokens]
    expected = pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-5)
    assert [token["logprob"] for token in tokens] == expected
    assert (await ask(served, WHOLE, legacy)).json["text"] == [prompt + text]
    *pieces, _ = (await ask(served, WHOLE, {**legacy, "stream": True})).body.split(b"\0")
    assert "".join(json.loads(piece)["text"][0] for piece in pieces) == text
    if not shared.get("stop"):
        body = {"text_input": prompt, "parameters": parameters}
        triton = (await ask(served, f"/v2/models/{NAME}/generate", body)).json
        assert triton["text_output"] == text
        events = events_of(await ask(served, f"/v2/models/{NAME}/generate_stream", body))
        assert "".join(event["text_output"] for event in events) == text
    return text, details


def test_every_way_to_ask_a_model_gives_the_same_text(model_path: Path) -> None:
    """Greedy and seeded, with stop strings from the texts, whole and in pieces, in each dialect."""

    async def go(served: Stub) -> None:
        with model_engine(model_path) as engine:
            served.service.engines = [engine]
            special = special_tokens(served.application.context.vocabulary.tokenizer)
            reasons, num_parts = set(), 0
            for i in range(5):
                prompt = f"the cat {'abcde'[i]}"
                own = {"do_sample": False, "temperature": 0.9} if i % 2 else {}
                shared = {} if i % 2 else {"temperature": 0.8, "seed": i}
                text, details = await ask_everywhere(served, prompt, own, {**shared})
                reasons.add(details["finish_reason"])
                flags = [token["id"] in special for token in details["tokens"]]
                assert [token["special"] for token in details["tokens"]] == flags
                num_parts += sum(not token["text"] for token in details["tokens"])
                stop = text[3:5] or text[:1]
                stopped, details = await ask_everywhere(
                    served, prompt, own, {**shared, "stop": [stop]}
                )
                assert stopped == text[: text.find(stop) + len(stop)]
                reasons.add(details["finish_reason"])
            assert {"length", "stop_sequence"} <= reasons
            assert num_parts > 5, "parts of characters are tokens too"

    run_with(go)


# -- its own client ------------------------------------------------------------------------------


@pytest.fixture
def _online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The client sends nothing otherwise; it sends to this process alone."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return


@pytest.mark.usefixtures("_online")
def test_huggingface_hub_s_client() -> None:
    async def go(served: Stub) -> None:
        url = f"http://127.0.0.1:{served.port}"
        client = InferenceClient(url, provider="hf-inference")
        await asyncio.to_thread(use, client)
        served.engine.script = scripted(Output(0, finish_reason="error", error="NaN"))
        with pytest.raises(GenerationError):
            await asyncio.to_thread(client.text_generation, "hi")
        served.service.num_open = 128
        with pytest.raises(OverloadedError):
            await asyncio.to_thread(client.text_generation, "hi")
        served.service.num_open = 0

    def use(client: InferenceClient) -> None:
        assert client.health_check()
        assert client.get_endpoint_info()["max_total_tokens"] == LIMITS.max_tokens
        assert client.text_generation("hi", max_new_tokens=3) == "abc"
        options: dict[str, Any] = {"max_new_tokens": 3, "details": True, "top_n_tokens": 2}
        whole = client.text_generation("hi", **options, decoder_input_details=True)
        assert (whole.generated_text, whole.details.finish_reason) == ("abc", "length")
        assert [token.text for token in whole.details.prefill] == ["h", "i"]
        assert [len(top) for top in whole.details.top_tokens] == [2, 2, 2]
        best = client.text_generation("hi", **options, best_of=2, do_sample=True)
        assert len(best.details.best_of_sequences) == 1
        assert list(client.text_generation("hi", max_new_tokens=3, stream=True)) == [*"abc"]
        events = list(client.text_generation("hi", **options, stream=True))
        ids = [(token.id, token.text) for token in whole.details.tokens]
        assert [(event.token.id, event.token.text) for event in events] == ids
        assert events[-1].generated_text == "abc"
        assert events[-1].details.generated_tokens == 3
        with pytest.raises(ValidationError, match="watermark is not supported"):
            client.text_generation("hi", watermark=True)
        messages = [{"role": "user", "content": "hi"}]
        chat = client.chat_completion(messages, max_tokens=3)
        assert chat.choices[0].message.content == "abc"
        chunks = client.chat_completion(messages, max_tokens=3, stream=True)
        pieces = [chunk.choices[0].delta.content for chunk in chunks]
        assert "".join(piece or "" for piece in pieces) == "abc"

    run_with(go, template="gpt-neoxt-chat")


# -- its own description -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    "GPTNEOX_TGI_DESCRIPTION" not in os.environ,
    reason="GPTNEOX_TGI_DESCRIPTION names no file (docs/openapi.json of TGI's repository)",
)
def test_tgi_s_own_description(tmp_path: Path) -> None:
    """Answers to generated requests, right and wrong ones, have the schemas that TGI describes."""
    description = json.loads(Path(os.environ["GPTNEOX_TGI_DESCRIPTION"]).read_text("utf-8"))
    events = description["components"]["schemas"]["StreamResponse"]
    description = repaired({**description, "openapi": "3.1.0"})
    path = tmp_path / "description.json"
    path.write_text(json.dumps(description), encoding="utf-8")

    async def check(served: Stub) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "schemathesis.cli", "run", str(path)),
            *("--url", f"http://127.0.0.1:{served.port}", "--max-examples", "50"),
            *("--include-path-regex", "^/(|generate|tokenize|info|health|metrics)$"),
            *("--phases", "examples,coverage,fuzzing", "--generation-deterministic"),
            *("--checks", "not_a_server_error,response_schema_conformance"),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()
        assert "6 passed" in output.decode() or "Tested: 6" in output.decode(), output.decode()
        jsonschema_rs = pytest.importorskip("jsonschema_rs")  # which schemathesis brings
        validator = jsonschema_rs.validator_for(
            {**repaired(events), "components": description["components"]}
        )
        parameters = {"max_new_tokens": 3, "details": True, "top_n_tokens": 2}
        streamed = await ask(served, STREAM, {"inputs": "hi", "parameters": parameters})
        for event in events_of(streamed):
            validator.validate(event)

    async def main() -> None:
        async with stub(max_concurrent_requests=1000) as served:
            await check(served)

    asyncio.run(main())


def repaired(schema: Any) -> Any:
    """A schema of the description as JSON Schema of 2020, without defaults, which are strings.

    It says `nullable`, as OpenAPI 3.0 has it, but numbers for exclusiveMinimum, as 3.1 does. Event
    streams are left out: the tool takes them for objects with the fields of an event.
    """
    if isinstance(schema, list):
        return [repaired(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        key: repaired(value)
        for key, value in schema.items()
        if key not in ("default", "nullable", "text/event-stream")
    }
    return {"anyOf": [kept, {"type": "null"}]} if schema.get("nullable") is True else kept
