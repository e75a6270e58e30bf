# SPDX-License-Identifier: Apache-2.0
"""What every engine promises of a request and of its completions, step by step.

A model with random weights and a byte-level vocabulary generates what is hard to stream: single
bytes, runs of blanks, special tokens and padding.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints
from support.tokenizers import write_tokenizer
from transformers import GPTNeoXForCausalLM

from gptneox.config.settings import EngineSection
from gptneox.devices import select
from gptneox.engine.api import Completion, Engine, RequestFailed, raise_failure
from gptneox.engine.detokenizer import decode
from gptneox.engine.generate import GenerateEngine
from gptneox.engine.generation_config import GenerationRules
from gptneox.engine.paged import PagedEngine
from gptneox.engine.sequence import InvalidParameter, SamplingParams

VOCAB, EOS, NUM_NEW = 336, 0, 24
CONFIG = checkpoints.FAMILY["pythia-14m"] | {"vocab_size": VOCAB, "max_position_embeddings": 256}
PROMPTS = checkpoints.prompts((5, 40, 33, 1), VOCAB, seed=4)
ENGINES = [PagedEngine, GenerateEngine]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("api") / "checkpoint"
    path.mkdir()
    checkpoints.write_checkpoint(path, CONFIG, seed=3, sharpness=2.0)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def model(path: Path) -> GPTNeoXForCausalLM:
    return GPTNeoXForCausalLM.from_pretrained(path).float().eval()


def open_engine(path: Path, kind: type[Engine], **settings: Any) -> Any:
    section = EngineSection(**{"max_batch_size": 32, "block_size": 16} | settings)
    return kind.from_pretrained(path, section, select("cpu"), dtype="float32")


# -- parameters of a request ----------------------------------------------------------------------

# The same for transformers' `generate`.
WISHES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {"logit_bias": ((7, 9.0), (60, 20.0)), "repetition_penalty": 1.3},
        {"sequence_bias": {(7,): 9.0, (60,): 20.0}, "repetition_penalty": 1.3},
    ),
    (
        {"allowed_token_ids": tuple(range(0, VOCAB, 7))},
        {"prefix_allowed_tokens_fn": lambda *_: list(range(0, VOCAB, 7))},
    ),
    (
        {"allowed_token_ids": (EOS, 40, 41), "min_new_tokens": 6, "repetition_penalty": 1.2},
        {
            "prefix_allowed_tokens_fn": lambda *_: [EOS, 40, 41],
            "min_new_tokens": 6,
            "repetition_penalty": 1.2,
        },
    ),
]


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize(("wishes", "options"), WISHES, ids=["bias", "allowed", "late end"])
def test_answers_are_those_of_transformers(
    kind: type[Engine],
    wishes: dict[str, Any],
    options: dict[str, Any],
    path: Path,
    model: GPTNeoXForCausalLM,
) -> None:
    """One prompt after the other there, so that no padding is in the way."""
    params = SamplingParams(max_new_tokens=NUM_NEW, **wishes)
    outputs = open_engine(path, kind).generate(PROMPTS, params)
    plain = open_engine(path, kind).generate(PROMPTS, SamplingParams(max_new_tokens=NUM_NEW))
    for prompt, output, without in zip(PROMPTS, outputs, plain, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            **{"max_new_tokens": NUM_NEW, "do_sample": False, "eos_token_id": EOS} | options,
            pad_token_id=0,
        )
        assert output.token_ids == expected[0, len(prompt) :].tolist()
        assert output.token_ids != without.token_ids, "the wishes change nothing: test others"


@pytest.mark.parametrize("kind", ENGINES)
def test_penalties_of_the_answer(kind: type[Engine], path: Path, model: GPTNeoXForCausalLM) -> None:
    """OpenAI's formula over the generated tokens, with the logits of transformers."""
    params = SamplingParams(
        max_new_tokens=NUM_NEW, ignore_eos=True, presence_penalty=1.5, frequency_penalty=0.75
    )
    outputs = open_engine(path, kind).generate(PROMPTS, params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output.token_ids])).logits[0]
        logits = logits[len(prompt) - 1 :].clone()
        for i, token_id in enumerate(output.token_ids):
            for seen in set(output.token_ids[:i]):
                logits[i, seen] -= 1.5 + 0.75 * output.token_ids[:i].count(seen)
            assert token_id == int(logits[i].argmax())


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_without_any_token_left_fails_alone(
    kind: type[Engine], temperature: float, path: Path
) -> None:
    engine = open_engine(path, kind)
    engine.rules = GenerationRules(suppress_tokens=(9,), eos_token_ids=(EOS,))
    params = SamplingParams(max_new_tokens=3, allowed_token_ids=(9,), temperature=temperature)
    outputs = engine.generate(PROMPTS[:2], params)
    assert [(o.finish_reason, o.stop_reason) for o in outputs] == [("error", None)] * 2
    assert "forbid all of them" in outputs[0].error
    with pytest.raises(RequestFailed, match="request 1: no token is left"):
        raise_failure([Completion(0), outputs[1]])
    [after] = engine.generate(PROMPTS[:1], replace(params, allowed_token_ids=(9, 10)))
    assert after.token_ids == [10] * 3


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize(
    ("name", "value"), [("logit_bias", ((VOCAB, 1.0),)), ("allowed_token_ids", (5, VOCAB))]
)
def test_ids_of_the_parameters_are_of_the_vocabulary(
    kind: type[Engine], name: str, value: Any, path: Path
) -> None:
    with pytest.raises(InvalidParameter, match=f"{name} is {VOCAB}; .*0 to {VOCAB - 1}") as error:
        open_engine(path, kind).generate(PROMPTS[:1], SamplingParams(**{name: value}))
    assert error.value.param == name


# -- how an answer ends ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ENGINES)
def test_why_an_answer_ended(kind: type[Engine], tmp_path: Path) -> None:
    path = checkpoints.write_chain_checkpoint(tmp_path / "chain", "123456789")
    engine = open_engine(path, kind)
    one, seven = (engine.tokenizer.encode(c)[0] for c in "17")

    def run(**wishes: Any) -> tuple[str, str, Any, str]:
        params = SamplingParams(max_new_tokens=12, **wishes)
        [c] = engine.generate([[one]], params)
        return c.text, c.finish_reason, c.stop_reason, decode(engine.tokenizer, c.token_ids)

    whole = "23456789"
    assert run() == (whole, "stop", None, whole)
    assert run(stop_token_ids=(seven,)) == ("23456", "stop", seven, "234567")
    assert run(stop_token_ids=(EOS,)) == (whole, "stop", None, whole)
    assert run(stop_token_ids=(EOS,), ignore_eos=True) == (whole, "stop", EOS, whole)
    assert run(stop=("x", "56")) == ("234", "stop", "56", "23456")
    assert run(stop=("x", "56"), include_stop=True) == ("23456", "stop", "56", "23456")
    assert run(stop=("9x",)) == (whole, "stop", None, whole)
    assert run(min_new_tokens=8) == (whole, "stop", None, whole)
    text, *why, _ = run(min_new_tokens=12)
    assert (text[:8], *why) == (whole, "length", None)
    text, *_ = run(stop_token_ids=(seven,), min_new_tokens=6)
    assert (text[:5], text[5] == "7") == ("23456", False)


# -- completions, step by step --------------------------------------------------------------------

HOT = SamplingParams(max_new_tokens=40, temperature=1.4, logprobs=1)


def stream(engine: PagedEngine, params: Seq[SamplingParams]) -> list[list[Completion]]:
    """All completions of each request; checks after each step that tokens and text agree."""
    ids = [engine.add_request(PROMPTS[i % 4], p) for i, p in enumerate(params)]
    steps: dict[int, list[Completion]] = {i: [] for i in ids}
    for completion in engine.stream():
        steps[completion.request_id].append(completion)
    for completions, p in zip(steps.values(), params, strict=True):
        released: list[int] = []
        text = ""
        for c in completions:
            released += c.released_ids
            text += c.new_text
            assert [entry.token_id for entry in c.released_logprobs] == c.released_ids
            if not isinstance(c.stop_reason, str):
                assert decode(engine.tokenizer, released) == text
        last = completions[-1]
        assert [c.finished for c in completions] == [False] * (len(completions) - 1) + [True]
        assert text == last.text
        assert released == last.token_ids[: len(released)]
        assert [t.token_id for t in last.logprobs] == last.token_ids
        released_logprobs = [t for c in completions for t in c.released_logprobs]
        assert released_logprobs == last.logprobs[: len(released)]
        if not isinstance(last.stop_reason, str):
            ended = last.finish_reason == "stop"
            assert len(released) == len(last.token_ids) - ended >= p.min_new_tokens
        else:
            assert text.startswith(decode(engine.tokenizer, released))
    return list(steps.values())


@pytest.mark.parametrize("include_stop", [False, True])
def test_pieces_and_tokens_of_a_stream_agree(include_stop: bool, path: Path) -> None:
    """With stop strings taken from the texts themselves, inside and across tokens."""
    engine = open_engine(path, PagedEngine)
    free = [replace(HOT, seed=seed, min_new_tokens=seed % 9) for seed in range(32)]
    texts = [steps[-1].text for steps in stream(engine, free)]
    assert sum("\ufffd" in text for text in texts) > 5
    assert sum("  " in text for text in texts) > 2
    stops = [(text[2 + i % 5 :][: 1 + i % 3] or "never", "never") for i, text in enumerate(texts)]
    params = [
        replace(p, stop=stop, include_stop=include_stop)
        for p, stop in zip(free, stops, strict=True)
    ]
    num_stopped = 0
    for text, (stop, _), steps in zip(texts, stops, stream(engine, params), strict=True):
        last, end = steps[-1], text.find(stop)
        if last.stop_reason == stop:
            num_stopped += 1
            assert end >= 0
            end += len(stop) if include_stop else 0
            released = [token_id for step in steps for token_id in step.released_ids]
            assert [*released, *last.cut_ids] == last.token_ids
        assert last.text == (text if end < 0 else text[:end])
    assert num_stopped > 16


def test_text_waits_for_its_token(tmp_path: Path) -> None:
    """What may become a stop string is held back with its whole token, and then let go."""
    path = checkpoints.write_chain_checkpoint(tmp_path / "chain", "123👍456789")
    engine = open_engine(path, PagedEngine)
    engine.add_request(engine.tokenizer.encode("1"), SamplingParams(stop=("3👍5", "89!")))
    steps = [(c.new_text, len(c.released_ids), len(c.new_token_ids)) for c in engine.stream()]
    held = [("", 0, 1)] * 5  # "3" and the bytes of the emoji
    rest = [("5", 1, 1), ("6", 1, 1), ("7", 1, 1), ("", 0, 1), ("", 0, 1)]
    assert steps == [("2", 1, 1), *held, ("3👍4", 6, 1), *rest, ("89", 2, 1)]


def test_without_text_every_token_is_released_at_once(path: Path) -> None:
    engine = open_engine(path, PagedEngine)
    engine.add_request(PROMPTS[0], SamplingParams(detokenize=False, logprobs=0))
    for completion in engine.stream():
        ended = completion.finish_reason == "stop"
        assert completion.released_ids == completion.new_token_ids[: 1 - ended]
        assert len(completion.released_logprobs) == len(completion.released_ids)
        assert completion.new_text == completion.text == ""


def test_a_failed_request_lets_its_text_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine(path, PagedEngine)
    run, num_steps = engine.runner.run, 0

    def fail_late(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        result = run(*args, **kwargs)
        if num_steps == 6:
            result.failed = {0: "a reason"}
        return result

    monkeypatch.setattr(engine.runner, "run", fail_late)
    engine.add_request(PROMPTS[0], replace(HOT, seed=1, ignore_eos=True, stop=("never",)))
    steps = list(engine.stream())
    last = steps[-1]
    assert (last.error, len(last.token_ids)) == ("a reason", 5)
    assert [i for c in steps for i in c.released_ids] == last.token_ids
    assert (
        "".join(c.new_text for c in steps) == last.text == decode(engine.tokenizer, last.token_ids)
    )


# -- what a service measures ----------------------------------------------------------------------


def test_cached_tokens_and_times_of_a_request(path: Path) -> None:
    """From the first completion on, and the same in every later one, also after a preemption."""
    engine = open_engine(path, PagedEngine, max_batch_size=2, num_blocks=7, max_prefill_tokens=16)
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    [first] = engine.generate([PROMPTS[1]], params)
    assert (first.num_cached_tokens, first.queued_s > 0, first.prefill_s > 0) == (0, True, True)
    ids = [engine.add_request(PROMPTS[i], params) for i in (1, 2, 1)]
    steps: dict[int, list[Completion]] = {i: [] for i in ids}
    for completion in engine.stream():
        steps[completion.request_id].append(completion)
    assert engine.scheduler.num_preemptions > 0, "the cache is too large for this test"
    reports = [{(c.num_cached_tokens, c.queued_s, c.prefill_s) for c in steps[i]} for i in ids]
    assert [len(report) for report in reports] == [1, 1, 1]
    (cached, queued, prefill), (other_cached, *_), (again_cached, again_queued, _) = (
        report.pop() for report in reports
    )
    assert (cached, other_cached, again_cached) == (32, 0, 32), "whole blocks of 40 tokens"
    assert 0 < queued < again_queued, "the third one had to wait for the first two"
    assert prefill > 0


@pytest.mark.parametrize("settings", [{}, {"max_prefill_tokens": 12}], ids=["whole", "chunked"])
@pytest.mark.parametrize("num_new", [0, 1, 3])
def test_scores_of_a_prompt_cost_no_second_pass(
    num_new: int, settings: dict[str, Any], path: Path, model: GPTNeoXForCausalLM
) -> None:
    """`echo` of the completions API: with the prompt's scores come as many steps as without."""
    params = SamplingParams(max_new_tokens=num_new, ignore_eos=True, logprobs=1, prompt_logprobs=2)
    engine = open_engine(path, PagedEngine, **settings)
    for _ in range(2):  # the second time the prompt is in the prefix cache
        engine.reset_stats(keep_steps=True)
        engine.add_request(PROMPTS[1], params)
        completions = list(engine.stream())
        stats = engine.stats
        assert len(stats.steps) == (40 // settings.get("max_prefill_tokens", 40) or 1) + (
            len(settings) > 0
        ) + max(num_new - 1, 0)
        assert stats.num_prefill_tokens + stats.num_decode_tokens == 40 + max(num_new - 1, 0)
        assert completions[0].prompt_logprobs == completions[-1].prompt_logprobs
        assert all(not c.prompt_logprobs for c in completions[1:-1])
        scores = completions[-1].prompt_logprobs
        with torch.inference_mode():
            rows = model(torch.tensor([PROMPTS[1]])).logits[0].double().log_softmax(-1)
        assert [s.token_id for s in scores] == PROMPTS[1][1:], "the first token has no score"
        for score, row in zip(scores, rows, strict=False):
            assert score.logprob == pytest.approx(row[score.token_id].item(), abs=2e-4)
            assert list(score.top) == row.topk(2).indices.tolist()
        assert len(completions[-1].logprobs) == num_new
        assert completions[-1].num_cached_tokens == 0


def test_a_prompt_of_one_token_has_no_scores(path: Path) -> None:
    engine = open_engine(path, PagedEngine)
    [output] = engine.generate([[5]], SamplingParams(max_new_tokens=0, prompt_logprobs=1))
    assert (output.prompt_logprobs, output.finish_reason, output.text) == ([], "length", "")
