# SPDX-License-Identifier: Apache-2.0
"""server/dialects/mindie.py over a scripted engine: /generate with a prompt, the Triton routes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import pytest
from support.service import NAME, Answer, Stub, ask, run_with, scored

from gptneox.engine.sequence import SamplingParams
from gptneox.server.service import OnOutput
from gptneox.server.wire import Output

GENERATE = "/generate"
TRITON, TRITON_STREAM = f"/v2/models/{NAME}/generate", f"/v2/models/{NAME}/generate_stream"


def answer_to(path: str, body: Any, **settings: Any) -> Any:
    async def go(served: Stub) -> Any:
        return await ask(served, path, body)

    return run_with(go, **settings)


def params_of(path: str, body: dict[str, Any]) -> SamplingParams:
    """The parameters that reach the engine."""

    async def go(served: Stub) -> Any:
        answer = await ask(served, path, body)
        assert answer.status == 200, answer.body
        return served.engine.added[0][1]

    params: SamplingParams = run_with(go)
    return params


def error_of(answer: Answer) -> tuple[int, str]:
    """Status and type of an error, which has this form and no other."""
    assert set(answer.json) == {"error", "error_type"}
    assert answer.json["error"]
    return answer.status, answer.json["error_type"]


def pieces_of(answer: Answer) -> list[Any]:
    """The objects of a stream that answers a prompt."""
    assert answer.status == 200, answer.body
    *pieces, rest = answer.body.split(b"\0")
    assert rest == b""
    return [json.loads(piece) for piece in pieces]


# -- /generate with a prompt ---------------------------------------------------------------------


def test_a_prompt_is_answered_with_itself_and_its_continuation() -> None:
    answer = answer_to(GENERATE, {"prompt": "hi", "max_tokens": 3})
    assert answer.json == {"text": ["hiabc"]}
    answer = answer_to(GENERATE, {"prompt": "hi"})
    assert answer.json == {"text": ["hiabcdefghijklmnop"]}  # 16 tokens
    body = {"prompt": "hi", "max_tokens": 2, "n": 2, "temperature": 1, "seed": 1}
    assert answer_to(GENERATE, body).json == {"text": ["hiab"] * 2}


@pytest.mark.parametrize(
    ("fields", "temperature"),
    [({}, 0.0), ({"temperature": 0.7}, 0.7), ({"top_p": 0.5}, 1.0), ({"top_k": 3}, 1.0)],
)
def test_a_prompt_is_continued_by_the_likeliest_tokens_unless_it_says_otherwise(
    fields: dict[str, Any], temperature: float
) -> None:
    assert params_of(GENERATE, {"prompt": "hi", **fields}).temperature == temperature


def test_the_fields_beside_a_prompt_reach_the_engine() -> None:
    params = params_of(
        GENERATE,
        {
            "prompt": "hi", "max_tokens": 7, "min_tokens": 2, "top_k": 3, "min_p": 0.1, "seed": 5,
            "stop": "x", "stop_token_ids": [4], "include_stop_str_in_output": True,
            "ignore_eos": True, "repetition_penalty": 1.2, "presence_penalty": 1,
            "frequency_penalty": -0.5, "model": NAME, "skip_special_tokens": True, "best_of": 1,
        },
    )  # fmt: skip
    assert (params.max_new_tokens, params.min_new_tokens, params.top_k) == (7, 2, 3)
    assert (params.min_p, params.seed, params.stop) == (0.1, 5, ("x",))
    assert (params.stop_token_ids, params.include_stop, params.ignore_eos) == ((4,), True, True)
    assert (params.repetition_penalty, params.presence_penalty) == (1.2, 1)
    assert params.frequency_penalty == -0.5


def test_best_of_keeps_the_likeliest() -> None:
    async def go(served: Stub) -> None:
        def script(number: int, on_output: OnOutput) -> None:
            entry = scored(66)
            entry.logprob = (-3.0, 0.0, -2.0)[number]
            on_output(Output(number, "abc"[number], 1, [66], [entry], finish_reason="length"))

        served.engine.script = script
        body = {"prompt": "hi", "n": 2, "best_of": 3, "temperature": 1}
        assert (await ask(served, GENERATE, body)).json == {"text": ["hib", "hic"]}

    run_with(go)


@pytest.mark.parametrize("n", [1, 2])
def test_the_pieces_of_a_continuation_are_its_whole(n: int) -> None:
    body = {"prompt": "hi", "max_tokens": 5, "n": n, "temperature": 1, "seed": 3}
    whole = answer_to(GENERATE, body).json["text"]
    answer = answer_to(GENERATE, {**body, "stream": True}, step_s=0.001)
    assert answer.headers["x-accel-buffering"] == "no"
    pieces = [piece["text"] for piece in pieces_of(answer)]
    assert len(pieces) == 5 * n
    assert ["hi" + "".join(texts) for texts in zip(*pieces, strict=True)] == whole


WRONG_BESIDE_A_PROMPT: Seq[dict[str, Any]] = [
    *({"max_tokens": v} for v in (0, -1, "9", 127)),
    *({"temperature": v} for v in (-1, "hot")),
    *({"stop": v} for v in ([""], 5, ["x"] * 100)),
    *({"n": v} for v in (0, 10**6)),
    *({"prompt": v} for v in ("", 5, ["a"], [1, 2])),
    *({"use_beam_search": True}, {"skip_special_tokens": False}, {"logprobs": 1}),
    *({"no_such_field": None}, {"n": 2, "best_of": 1}, {"n": 1, "best_of": 2, "stream": True}),
]


def test_what_is_wrong_beside_a_prompt_is_refused() -> None:
    async def go(served: Stub) -> None:
        for fields in WRONG_BESIDE_A_PROMPT:
            answer = await ask(served, GENERATE, {"prompt": "hi", "max_tokens": 4, **fields})
            assert error_of(answer) == (422, "Input Validation Error"), (fields, answer.body)
        assert not served.engine.added
        assert (await ask(served, GENERATE, {"prompt": "hi"})).status == 200

    run_with(go)


def test_the_keys_decide_which_dialect_generate_speaks() -> None:
    async def go(served: Stub) -> None:
        assert (await ask(served, GENERATE, {"inputs": "hi"})).json["generated_text"]
        assert (await ask(served, GENERATE, {"prompt": "hi", "inputs": None})).json["text"]
        for body in ({}, {"prompt": "hi", "inputs": "hi"}, {"text_input": "hi"}):
            assert error_of(await ask(served, GENERATE, body)) == (422, "validation")
        answer = await ask(served, GENERATE, {"prompt": "hi", "model": "none"})
        assert error_of(answer) == (404, "NotFoundError")

    run_with(go)


# -- Triton --------------------------------------------------------------------------------------


def test_a_text_input_is_answered_with_its_continuation() -> None:
    body = {"text_input": "hi", "id": "my-1", "parameters": {"max_new_tokens": 3, "details": True}}
    assert answer_to(TRITON, body).json == {
        "id": "my-1",
        "model_name": NAME,
        "model_version": None,
        "text_output": "abc",
        "details": {"finish_reason": "length", "generated_tokens": 3, "seed": None},
    }
    answer = answer_to("/v2/models/an/alias/generate", {"text_input": "hi"})
    assert answer.json["text_output"] == "abcdefghijklmnopqrst"  # 20 tokens
    assert "details" not in answer.json
    assert answer.json["id"] == answer.headers["x-request-id"]


def test_the_parameters_reach_the_engine() -> None:
    own = {
        "max_new_tokens": 7, "do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9,
        "repetition_penalty": 1.2, "seed": 5, "priority": 1, "batch_size": 9, "timeout": 60,
        "watermark": False, "typical_p": None,
    }  # fmt: skip
    params = params_of(TRITON, {"text_input": "hi", "parameters": own})
    assert (params.max_new_tokens, params.temperature, params.top_p) == (7, 0.5, 0.9)
    assert (params.top_k, params.repetition_penalty, params.seed) == (3, 1.2, 5)
    wishes = {"do_sample": False, "temperature": 0.9}
    assert params_of(TRITON, {"text_input": "hi", "parameters": wishes}).temperature == 0
    names = dict.fromkeys(own)
    assert params_of(TRITON, {"text_input": "hi", "parameters": names}) == params_of(
        TRITON, {"text_input": "hi"}
    )


def test_the_pieces_of_an_output_are_its_whole() -> None:
    body = {"text_input": "hi", "parameters": {"max_new_tokens": 5, "details": True}}
    whole = answer_to(TRITON, body).json
    answer = answer_to(TRITON_STREAM, body, step_s=0.001)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(event) for event in answer.events]
    assert "".join(event["text_output"] for event in events) == whole["text_output"]
    counts = [event["details"]["generated_tokens"] for event in events]
    assert counts == [1, 2, 3, 4, 5]
    assert ["finish_reason" in event["details"] for event in events] == [False] * 4 + [True]
    assert events[-1]["details"] == whole["details"]
    assert len({event["id"] for event in events}) == 1


WRONG_WITH_AN_INPUT: Seq[dict[str, Any]] = [
    *({"text_input": v} for v in (None, "", 5, ["a"], [{"type": "text", "text": "a"}])),
    *({"id": v} for v in ("", "a b", "x" * 257, 5)),
    *({"parameters": {"max_new_tokens": v}} for v in (0, "9", 127)),
    *({"parameters": {name: 1}} for name in ("no_such_field", "stop", "watermark", "top_p ")),
    *({"parameters": {"temperature": 0}}, {"parameters": {"typical_p": 0.5}}),
    {"no_such_field": 1},
]


@pytest.mark.parametrize("path", [TRITON, TRITON_STREAM])
def test_what_is_wrong_with_an_input_is_refused(path: str) -> None:
    async def go(served: Stub) -> None:
        for fields in WRONG_WITH_AN_INPUT:
            answer = await ask(served, path, {"text_input": "hi", **fields})
            assert error_of(answer) == (422, "Input Validation Error"), (fields, answer.body)
        assert not served.engine.added
        assert (await ask(served, path, {"text_input": "hi"})).status == 200

    run_with(go)


def scripted(*outputs: tuple[float, dict[str, Any]]) -> Callable[[int, OnOutput], None]:
    def script(number: int, on_output: OnOutput) -> None:
        for delay, fields in outputs:
            loop = asyncio.get_running_loop()
            loop.call_later(delay, on_output, Output(number, **fields))

    return script


def test_every_failure_has_the_status_of_its_kind() -> None:
    async def go(served: Stub) -> None:
        bodies = [(TRITON, {"text_input": "hi"}), (TRITON_STREAM, {"text_input": "hi"})]
        bodies += [(GENERATE, {"prompt": "hi", "stream": stream}) for stream in (False, True)]
        served.engine.script = scripted((0, {"finish_reason": "error", "error": "NaN"}))
        for path, body in bodies:
            assert error_of(await ask(served, path, body)) == (424, "Generation Error")
        text = {"text": "a", "num_tokens": 1, "token_ids": [66], "logprobs": [scored(66)]}
        failure = {"finish_reason": "error", "error": "NaN"}
        served.engine.script = scripted((0, text), (0.1, failure))
        *_, last = (await ask(served, TRITON_STREAM, {"text_input": "hi"})).events
        assert json.loads(last)["error_type"] == "Generation Error"
        *_, last = pieces_of(await ask(served, GENERATE, {"prompt": "hi", "stream": True}))
        assert last["error_type"] == "Generation Error"
        served.service.num_open = 128
        for path, body in bodies:
            assert error_of(await ask(served, path, body)) == (429, "Overloaded")
        assert (await ask(served, "/v2/health/live")).status == 200
        assert error_of(await ask(served, "/v2/health/ready")) == (503, "Service Unavailable")
        served.service.num_open = 0
        served.engine.script = scripted()
        for path, body in bodies[:1]:
            assert error_of(await ask(served, path, body)) == (500, "Incomplete Generation")
        served.engine.limits = None
        for path, body in bodies:
            assert error_of(await ask(served, path, body)) == (503, "Service Unavailable")
        for path in ("/v2/health/live", "/v2/health/ready", f"/v2/models/{NAME}/ready"):
            assert error_of(await ask(served, path)) == (503, "Service Unavailable")

    run_with(go, request_timeout_s=0.5)


# -- what is served ------------------------------------------------------------------------------


def test_the_model_is_described() -> None:
    async def go(served: Stub) -> None:
        assert (await ask(served, "/v2")).json["name"] == "gptneox"
        for name in (NAME, "an/alias"):
            model = (await ask(served, f"/v2/models/{name}")).json
            assert model["name"] == name
            assert [tensor["name"] for tensor in model["inputs"]] == ["text_input"]
            config = (await ask(served, f"/v2/models/{name}/config")).json
            assert (config["model_name"], config["max_seq_len"]) == (name, 128)
            assert (await ask(served, f"/v2/models/{name}/ready")).body == b""
        paths = ("none", "none/config", "none/ready", "dummy", "..", "%E2%84%ABngstr%C3%B6m")
        for path in paths:
            answer = await ask(served, f"/v2/models/{path}")
            assert error_of(answer) == (404, "NotFoundError")
        answer = await ask(served, "/v2/models/none/generate", {"text_input": "hi"})
        assert error_of(answer) == (404, "NotFoundError")
        assert error_of(await ask(served, "/v2/nothing")) == (404, "NotFoundError")
        assert error_of(await ask(served, TRITON)) == (404, "NotFoundError")  # GET: a model's name

    run_with(go)


def test_tokens_are_counted() -> None:
    async def go(served: Stub) -> None:
        answer = (await ask(served, "/v1/tokenizer", {"inputs": "the cat"})).json
        assert answer == {"token_number": 2, "tokens": ["the", " cat"]}
        answer = await ask(served, "/v1/tokenizer", {"inputs": "the cat", "do_decode": False})
        assert answer.json == {"token_number": 2, "tokens": []}
        answer = await ask(served, "/v1/tokenizer", {"inputs": ""})
        assert error_of(answer) == (422, "Input Validation Error")

    run_with(go)


def test_a_key_is_asked_for_in_the_form_of_the_path() -> None:
    async def go(served: Stub) -> None:
        for path in (TRITON, "/v2", "/v2/health/live", "/v1/tokenizer"):
            assert error_of(await ask(served, path)) == (401, "Unauthorized")

    run_with(go, keys=["secret"])
