# SPDX-License-Identifier: Apache-2.0
"""server/dialects/openai.py over a scripted engine: fields, refusals, the form of answers."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import quote

import pytest
from support.service import NAME, Stub, ask, eventually, request, run_with, scored

from gptneox.engine.sequence import TokenLogprobs
from gptneox.server.service import OnOutput
from gptneox.server.wire import Output

PATH = "/v1/completions"


def complete(body: dict[str, Any], **settings: Any) -> Any:
    """The answer to a completion."""

    async def go(served: Stub) -> Any:
        return await ask(served, PATH, body)

    return run_with(go, **settings)


def params_of(body: dict[str, Any]) -> Any:
    """The parameters that reach the engine."""

    async def go(served: Stub) -> Any:
        answer = await ask(served, PATH, {"prompt": "hi", **body})
        assert answer.status == 200, answer.body
        return served.engine.added[0][1]

    return run_with(go)


@pytest.mark.parametrize(
    ("prompt", "num"),
    [("the cat", 1), (["the cat", "dog"], 2), ([5, 6, 7], 1), ([[5], [6, 7], [0]], 3)],
)
def test_all_four_forms_of_a_prompt(prompt: Any, num: int) -> None:
    answer = complete({"prompt": prompt, "max_tokens": 3, "n": 2}).json
    assert answer["object"] == "text_completion"
    assert answer["model"] == NAME
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * num))
    assert {choice["text"] for choice in answer["choices"]} == {"abc"}
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    usage = answer["usage"]
    assert usage["completion_tokens"] == 6 * num
    assert usage["total_tokens"] == usage["prompt_tokens"] + 6 * num


@pytest.mark.parametrize(
    "prompt", [None, "", [], [""], [[]], [[], [1]], [True, False], [[True]], [1, "a"], 5, {}, [-1],
               [336], [[1], [10**400]], [1.5], "x" * 200_000, "\ud800"]
)  # fmt: skip
def test_what_is_no_prompt_is_refused(prompt: Any) -> None:
    answer = complete({"prompt": prompt})
    assert answer.status == 400, answer.body
    error = answer.json["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == "prompt"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", v) for v in (-1, "hot", True, [1])),
        *(("top_p", v) for v in (0, 1.1, "1")),
        *(("top_k", v) for v in (-5, 2.5)),
        *(("max_tokens", v) for v in (0, -1, 1.5, "9", True)),
        *(("n", v) for v in (0, -1, 10**6, True)),
        *(("best_of", v) for v in (-1, 10**6, "2")),
        *(("stop", v) for v in ([""], "", ["x"] * 100, ["x" * 600], 5, [5])),
        *(("logprobs", v) for v in (-2, 21, 10**6, True, "2")),
        *(("seed", v) for v in (-(2**63) - 1, 2**63, 1.5)),
        *(("logit_bias", v) for v in ({"x": 1}, {"336": 1}, {"1": 101}, {"-1": 1}, [1])),
        *(("presence_penalty", v) for v in (-3, 3, "1")),
        *(("frequency_penalty", v) for v in (-3, 3)),
        *(("stop_token_ids", v) for v in ([336], [-1], ["a"], 3)),
        ("min_tokens", 99),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),  # without stream
        ("stream_options", {"what": 1}),
        ("suffix", "x"),
        ("response_format", {"type": "json_object"}),
        ("truncate_prompt_tokens", 5),
        ("skip_special_tokens", False),
        ("skip_special_tokens", 1),  # 1 == True in Python alone
        ("priority", 3),
        ("priority", False),
        ("bad_words", ["x"]),
        ("prompt_logprobs", 1),
        ("no_such_field", None),
        ("no such\nfield", 1),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_and_the_next_request_is_served(field: str, value: Any) -> None:
    async def go(served: Stub) -> None:
        answer = await ask(served, PATH, {"prompt": "hi", "max_tokens": 4, field: value})
        assert answer.status == 400, answer.body
        error = answer.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["param"] == field.replace("\n", "\\n")
        assert error["message"]
        assert "Traceback" not in error["message"]
        assert not served.engine.added
        assert (await ask(served, PATH, {"prompt": "hi"})).status == 200

    run_with(go)


EVERY_FIELD = {
    **dict.fromkeys(("max_tokens", "temperature", "top_p", "n", "stop", "seed", "suffix")),
    **dict.fromkeys(("logit_bias", "presence_penalty", "frequency_penalty", "stream")),
    **dict.fromkeys(("stream_options", "top_k", "min_p", "stop_token_ids", "best_of")),
    **dict.fromkeys(("ignore_eos", "min_tokens", "echo", "logprobs", "user", "model")),
    **dict.fromkeys(("response_format", "priority", "metadata", "request_id")),
    **dict.fromkeys(("repetition_penalty", "allowed_token_ids", "logprob_token_ids")),
}  # fmt: skip
NEUTRAL = {
    "model": NAME, "suffix": "", "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0,
    "stop": [], "top_k": 0, "min_p": 0, "repetition_penalty": 1, "stop_token_ids": [],
    "include_stop_str_in_output": False, "ignore_eos": False, "min_tokens": 0,
    "skip_special_tokens": True, "add_special_tokens": False, "truncate_prompt_tokens": None,
    "bad_words": [], "return_token_ids": False, "priority": 0, "response_format": {"type": "text"},
    "best_of": 1, "echo": False, "stream": False, "n": 1,
}  # fmt: skip
IGNORED = {
    "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto",
    "safety_identifier": "x", "prompt_cache_key": "k", "prompt_cache_retention": "24h",
    "include_obfuscation": True, "request_id": "mine",
}  # fmt: skip


@pytest.mark.parametrize(
    "fields", [EVERY_FIELD, NEUTRAL, IGNORED], ids=["null", "neutral", "ignored"]
)
def test_null_neutral_and_ignored_fields_change_nothing(fields: dict[str, Any]) -> None:
    answer = complete({"prompt": "hi", **fields})
    assert answer.status == 200, answer.body
    assert params_of(fields) == params_of({})


def test_the_fields_reach_the_engine() -> None:
    params = params_of(
        {
            "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 5,
            "stop": ["x", "yz"], "stop_token_ids": [4], "presence_penalty": 1,
            "frequency_penalty": -0.5, "repetition_penalty": 1.2, "logit_bias": {"3": -100, "9": 2},
            "logprobs": 4, "ignore_eos": True, "min_tokens": 2, "include_stop_str_in_output": True,
            "allowed_token_ids": [1, 2], "logprob_token_ids": [8],
        }
    )  # fmt: skip
    assert (params.max_new_tokens, params.temperature, params.top_p) == (7, 0.5, 0.9)
    assert (params.top_k, params.min_p, params.seed) == (3, 0.1, 5)
    assert (params.stop, params.stop_token_ids) == (("x", "yz"), (4,))
    assert (params.presence_penalty, params.frequency_penalty) == (1, -0.5)
    assert (params.repetition_penalty, params.logprobs) == (1.2, 4)
    assert params.logit_bias == ((3, -100), (9, 2))
    assert (params.ignore_eos, params.min_new_tokens, params.include_stop) == (True, 2, True)
    assert (params.allowed_token_ids, params.logprob_token_ids) == ((1, 2), (8,))
    defaults = params_of({})
    assert (defaults.max_new_tokens, defaults.temperature, defaults.seed) == (16, 1.0, None)
    assert params_of({"stop": "x"}).stop == ("x",)


@pytest.mark.parametrize(
    ("seed", "seeds"),
    [(2**63 - 2, [2**63 - 2, 2**63 - 1, 0]), (-1, [2**63 - 1, 0, 1]), (-(2**63), [0, 1, 2])],
)
def test_choices_have_seeds_of_their_own(seed: int, seeds: list[int]) -> None:
    """OpenAI's have a sign."""

    async def go(served: Stub) -> None:
        body = {"prompt": ["a", "b"], "n": 3, "seed": seed, "max_tokens": 1}
        await ask(served, PATH, body)
        assert [params.seed for _, params in served.engine.added] == seeds * 2

    run_with(go)


@pytest.mark.parametrize(("asked", "fits"), [(125, True), (126, False), (None, True)])
def test_the_context_is_a_limit_with_both_numbers(asked: int | None, fits: bool) -> None:
    """The scripted engine has 128 positions; a default that does not fit is made smaller."""
    prompt = [5] * (3 if asked else 120)
    answer = complete({"prompt": prompt, "max_tokens": asked})
    if fits:
        assert answer.status == 200
        assert answer.json["usage"]["completion_tokens"] == (asked or 8)
        return
    error = answer.json["error"]
    assert (answer.status, error["code"]) == (400, "context_length_exceeded")
    assert "128" in error["message"]
    assert "129" in error["message"]


@pytest.mark.parametrize("length", [127, 128, 129])
def test_a_prompt_up_to_the_context(length: int) -> None:
    answer = complete({"prompt": [5] * length})
    assert answer.status == (200 if length == 127 else 400)
    if length > 127:
        assert answer.json["error"]["code"] == "context_length_exceeded"
        assert answer.json["error"]["param"] == "prompt"


# -- log-probabilities ---------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("top", [0, 1])
def test_echo_scores_the_prompt(max_tokens: int, stream: bool, top: int) -> None:
    """What lm-evaluation-harness reads: an entry for each token of the prompt and of the answer."""
    prompt = [5, 6, 7]
    body = {"prompt": prompt, "max_tokens": max_tokens, "echo": True, "logprobs": top}
    answer = complete({**body, "stream": stream})
    assert answer.status == 200, answer.body
    if stream:
        chunks = [chunk["choices"][0] for chunk in answer.chunks]
        lists = [chunk["logprobs"] for chunk in chunks]
        logprobs = {name: [x for each in lists for x in each[name]] for name in lists[0]}
        text = "".join(chunk["text"] for chunk in chunks)
    else:
        (choice,) = answer.json["choices"]
        logprobs, text = choice["logprobs"], choice["text"]
    assert {len(entries) for entries in logprobs.values()} == {3 + max_tokens}
    assert logprobs["token_logprobs"] == [None] + [-0.5] * (2 + max_tokens)
    assert logprobs["top_logprobs"][0] is None
    assert "".join(logprobs["tokens"]) == text
    starts = [len("".join(logprobs["tokens"][:i])) for i in range(3 + max_tokens)]
    assert logprobs["text_offset"] == starts
    assert -9999.0 in logprobs["top_logprobs"][1].values()  # for -inf, which JSON has not
    assert b"Infinity" not in answer.body
    assert b"NaN" not in answer.body


@pytest.mark.parametrize("stream", [False, True])
def test_choices_without_new_tokens_are_copies_of_one(stream: bool) -> None:
    prompts = [[5, 6, 7], [8, 9]]
    body = {"prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 1, "n": 3}

    async def go(served: Stub) -> None:
        answer = await ask(served, PATH, {**body, "stream": stream})
        assert answer.status == 200, answer.body
        pieces = answer.chunks if stream else [answer.json]
        choices = sorted((c for p in pieces for c in p["choices"]), key=lambda c: c["index"])
        assert [choice["index"] for choice in choices] == list(range(6))
        for choice in choices:
            first = choices[choice["index"] // 3 * 3]
            assert choice == {**first, "index": choice["index"]}
            assert len(choice["logprobs"]["tokens"]) == len(prompts[choice["index"] // 3])
        assert [prompt for prompt, _ in served.engine.added] == prompts
        assert served.service.num_open == 0

    run_with(go)


def test_a_client_that_leaves_choices_without_new_tokens_frees_them() -> None:
    async def go(served: Stub) -> None:
        served.engine.is_held = True
        body = {"prompt": [5, 6], "max_tokens": 0, "echo": True, "n": 3}
        _, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(request(PATH, body))
        await eventually(lambda: served.service.num_open == 3)
        writer.transport.abort()
        await eventually(lambda: served.service.num_open == 0)
        assert served.engine.aborted == [0]

    run_with(go)


def test_offsets_count_from_the_prompt_without_echo() -> None:
    body = {"prompt": "the cat", "max_tokens": 3, "logprobs": 0, "stream": True}
    chunks = [chunk["choices"][0] for chunk in complete(body, step_s=0.005).chunks]
    assert [chunk["logprobs"]["text_offset"] for chunk in chunks] == [[7], [8], [9]]


def test_two_tokens_of_one_text_both_keep_their_value() -> None:
    """330 and 331 are padding of the vocabulary: both decode to nothing."""

    async def go(served: Stub) -> None:
        def script(number: int, on_output: OnOutput) -> None:
            entry = TokenLogprobs(331, -2.0, {330: -1.0, 331: -2.0, 30: -3.0})
            on_output(
                Output(
                    number, num_tokens=1, token_ids=[331], logprobs=[entry], finish_reason="length"
                )
            )

        served.engine.script = script
        answer = await ask(served, PATH, {"prompt": "hi", "logprobs": 3, "max_tokens": 1})
        logprobs = answer.json["choices"][0]["logprobs"]
        assert logprobs["tokens"] == [""]
        assert logprobs["token_logprobs"] == [-2.0]
        assert logprobs["top_logprobs"][0][""] == -2.0
        assert logprobs["top_logprobs"][0]["token_id:330"] == -1.0
        assert len(logprobs["top_logprobs"][0]) == 3

    run_with(go)


def test_a_token_that_ends_an_answer_has_an_entry_but_no_text() -> None:
    async def go(served: Stub) -> None:
        def script(number: int, on_output: OnOutput) -> None:
            on_output(
                Output(number, num_tokens=1, finish_reason="stop", end_id=0, end_logprob=scored(0))
            )

        served.engine.script = script
        answer = await ask(served, PATH, {"prompt": "hi", "logprobs": 1, "max_tokens": 1})
        (choice,) = answer.json["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("", "stop")
        assert choice["logprobs"]["tokens"] == ["<|endoftext|>"]
        assert choice["logprobs"]["token_logprobs"] == [-0.5]

    run_with(go)


def test_parts_of_a_character_are_named_by_their_bytes() -> None:
    async def go(served: Stub) -> None:
        vocabulary = served.application.context.vocabulary
        ids = await vocabulary.encode("\U0001f600", "prompt")
        assert len(ids) > 1
        answer = await ask(
            served, PATH, {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}
        )
        (choice,) = answer.json["choices"]
        assert choice["text"] == "\U0001f600"
        tokens = choice["logprobs"]["tokens"]
        assert all(token.startswith("bytes:\\x") for token in tokens)
        assert choice["logprobs"]["text_offset"] == [0] * len(ids)

    run_with(go)


def test_best_of_keeps_the_likeliest() -> None:
    async def go(served: Stub) -> None:
        def script(number: int, on_output: OnOutput) -> None:
            entry = TokenLogprobs(30 + number, -1.0 * ((number * 7) % 5), {})
            on_output(
                Output(
                    number,
                    text=str(number),
                    num_tokens=1,
                    token_ids=[30 + number],
                    logprobs=[entry],
                    finish_reason="length",
                )
            )

        served.engine.script = script
        body = {"prompt": ["a", "b"], "n": 2, "best_of": 5, "max_tokens": 1}
        answer = (await ask(served, PATH, body)).json
        # log-probabilities of the choices 0 to 9: 0 -2 -4 -1 -3 0 -2 -4 -1 -3
        assert [choice["text"] for choice in answer["choices"]] == ["0", "3", "5", "8"]
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert answer["usage"]["completion_tokens"] == 10  # all were generated
        assert answer["choices"][0]["logprobs"] is None

    run_with(go)


# -- streams -------------------------------------------------------------------------------------


def test_a_stream_has_a_chunk_for_each_token_and_the_usage_last() -> None:
    body = {"prompt": "the cat", "max_tokens": 30, "stream": True}
    answer = complete({**body, "stream_options": {"include_usage": True}}, step_s=0.001)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["cache-control"] == "no-cache"
    *chunks, last = answer.chunks
    assert len(chunks) == 30
    assert len({(chunk["id"], chunk["created"]) for chunk in [*chunks, last]}) == 1
    assert all(chunk["usage"] is None for chunk in chunks)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 29 + ["length"]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 30
    plain = complete({**body, "stream": False}).json["choices"][0]["text"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == plain
    assert all("usage" not in chunk for chunk in complete(body).chunks)


def test_the_usage_may_come_with_every_chunk() -> None:
    def chunks(**options: bool) -> list[Any]:
        body = {"prompt": "hi", "max_tokens": 3, "stream": True, "stream_options": options}
        return complete(body, step_s=0.005).chunks

    usages = [c["usage"] for c in chunks(include_usage=True, continuous_usage_stats=True)]
    assert [usage["completion_tokens"] for usage in usages] == [1, 2, 3, 3]
    assert all("usage" not in c for c in chunks(continuous_usage_stats=True))


def test_choices_of_a_stream_are_interleaved_and_all_finish() -> None:
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 4, "stream": True, "seed": 1}
    texts, reasons = [""] * 4, [None] * 4
    for chunk in complete(body, step_s=0.001).chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
            reasons[choice["index"]] = choice["finish_reason"]
    assert texts == ["abcd"] * 4
    assert reasons == ["length"] * 4


@pytest.mark.parametrize("first", [False, True])
def test_an_error_is_a_status_before_the_first_byte_and_an_event_after_it(first: bool) -> None:
    async def go(served: Stub) -> None:
        def script(number: int, on_output: OnOutput) -> None:
            loop = asyncio.get_running_loop()
            if first:
                on_output(Output(number, text="a", num_tokens=1, token_ids=[30]))
            loop.call_later(
                0.1, on_output, Output(number, finish_reason="error", error="NaN at 0x7fff")
            )

        served.engine.script = script
        answer = await ask(served, PATH, {"prompt": "hi", "stream": True})
        assert b"0x7fff" not in answer.body
        if not first:
            assert answer.status == 500
            assert answer.json["error"]["type"] == "server_error"
            assert answer.headers["x-should-retry"] == "false"
            return
        assert answer.status == 200
        text, error = answer.chunks
        assert text["choices"][0]["text"] == "a"
        assert error["error"]["code"] == "request_failed"
        assert served.service.num_open == 0

    run_with(go)


# -- other routes --------------------------------------------------------------------------------


def test_models_are_listed_and_found_by_names_with_slashes() -> None:
    async def go(served: Stub) -> None:
        listed = (await ask(served, "/v1/models")).json
        names = [model["id"] for model in listed["data"]]
        assert names == [NAME, "an/alias", "gr\u00f6\u00dfe/\u6a21\u578b"]
        for i, name in enumerate(names):
            assert (await ask(served, f"/v1/models/{quote(name)}")).json == listed["data"][i]
            assert (await ask(served, PATH, {"prompt": "hi", "model": name})).json["model"] == NAME
        for path in ("/v1/models/none", "/v1/models/%F0%9F%98%80", "/v1/models/.."):
            answer = await ask(served, path)
            assert answer.status == 404
            assert answer.json["error"]["code"] == "model_not_found"
        answer = await ask(served, PATH, {"prompt": "hi", "model": "\u212bngstr\ud800m"})
        assert (answer.status, answer.json["error"]["param"]) == (404, "model")

    run_with(go)


def test_the_routes_of_lm_eval_s_remote_tokenizer() -> None:
    async def go(served: Stub) -> None:
        info = (await ask(served, "/tokenizer_info")).json
        assert info == {"eos_token": "<|endoftext|>"}
        body = {"prompt": info["eos_token"], "add_special_tokens": False}
        assert (await ask(served, "/tokenize", body)).json["tokens"] == [0]
        text = "the cat \U0001f600"
        answer = (await ask(served, "/tokenize", {"prompt": text})).json
        assert answer["count"] == len(answer["tokens"])
        assert answer["max_model_len"] == 128
        back = await ask(served, "/detokenize", {"tokens": answer["tokens"]})
        assert back.json == {"prompt": text}
        for tokens in ([336], [-1], [True], "5"):
            answer = await ask(served, "/detokenize", {"tokens": tokens})
            assert (answer.status, answer.json["error"]["param"]) == (400, "tokens")

    run_with(go)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", PATH, 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/responses", 404),
        ("GET", "/nothing", 404),
        ("GET", "/v1/models/", 404),
    ],
)
def test_errors_of_the_router_have_the_form_too(method: str, path: str, status: int) -> None:
    async def go(served: Stub) -> None:
        answer = await ask(served, path, method=method)
        assert answer.status == status
        assert set(answer.json["error"]) == {"message", "type", "param", "code"}
        assert ("allow" in answer.headers) == (status == 405)
        if "responses" in path:
            assert "/v1/completions" in answer.json["error"]["message"]

    run_with(go)
