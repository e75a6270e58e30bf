# SPDX-License-Identifier: Apache-2.0
"""The paged engine against Hugging Face, one prompt at a time there, all together here.

Everything is greedy and fp32 unless it says otherwise, so token ids must be equal, not similar:
the reference's smallest gap between its two best logits is asserted to be far above fp32 noise.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints
from support.pairs import pairs_first
from torch import Tensor
from transformers import GPTNeoXForCausalLM

from gptneox.devices.device import Device
from gptneox.engine.api import Completion
from gptneox.engine.generation_config import GenerationRules
from gptneox.engine.paged import PagedEngine
from gptneox.engine.sequence import InvalidParameter, SamplingParams, TokenLogprobs

CONFIG = checkpoints.FAMILY["gpt-neox-20b"] | {"max_position_embeddings": 512}
VOCAB = CONFIG["vocab_size"]
NUM_NEW = 24
# Of the prompts, mixed: a single token, whole blocks of 16 and 128 and one token around them, and
# two groups that cross the end of a block while they decode, next to each other in the queue.
LENGTHS = (
    *(1, 2, 300, 282, 115, 68, 286, 271),
    *(14, 13, 15, 12, 16, 15, 14, 13),
    *(119, 127, 128, 126, 121, 120, 129, 124),
    *(71, 293, 234, 17, 5, 80, 151, 19),
)
SHARED = {3: (270, 12), 7: (270, 1), 25: (130, 9), 29: (50, 30), 27: (16, 1)}  # of the beginning
# Log-probabilities: the limit of the logits in test_model.py (2e-5 of the largest, about 13).
LOGPROB_LIMIT = 2e-4
GREEDY = SamplingParams(max_new_tokens=NUM_NEW, ignore_eos=True)
# With these a batch of the prompts below cannot hold its blocks to the end.
SCARCE = {16: 28, 128: 3}


@dataclass
class Reference:
    """Prompts and what Hugging Face makes of each of them alone."""

    path: Path
    model: GPTNeoXForCausalLM
    prompts: list[list[int]]
    new_ids: list[list[int]]

    def greedy(self, prompt: list[int], num_new: int, eos: Any = None) -> list[int]:
        ids = torch.tensor([prompt])
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_new,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
        )
        return output[0, len(prompt) :].tolist()

    def assert_sure(self, prompts: Seq[list[int]], outputs: Seq[list[int]]) -> None:
        """The best token leads by several times what fp32 may differ (2e-5 of a logit of 13)."""
        for prompt, new_ids in zip(prompts, outputs, strict=True):
            best = self.logprobs(prompt + new_ids)[len(prompt) - 1 : -1].topk(2).values
            margin = (best[:, 0] - best[:, 1]).min().item()
            assert margin > 1e-3, "choose another seed: HF itself is unsure"

    @torch.inference_mode()
    def logprobs(self, token_ids: list[int]) -> Tensor:
        """Row p holds the log-probabilities of what may follow position p."""
        return self.model(torch.tensor([token_ids])).logits[0].double().log_softmax(-1)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    path = tmp_path_factory.mktemp("reference")
    model = checkpoints.write_checkpoint(path, CONFIG, seed=2, sharpness=1.4)
    prompts = checkpoints.prompts(LENGTHS, VOCAB, seed=5)
    beginning = checkpoints.prompts([270], VOCAB, seed=6)[0]
    for i, (num_shared, num_own) in SHARED.items():
        prompts[i] = beginning[:num_shared] + prompts[i][:num_own]
    prompts[31] = list(prompts[3])  # the same prompt twice
    reference = Reference(path, model, prompts, [])
    reference.new_ids = [reference.greedy(prompt, NUM_NEW) for prompt in prompts]
    reference.assert_sure(prompts, reference.new_ids)
    return reference


@pytest.fixture(scope="module")
def long_new_ids(reference: Reference) -> list[list[int]]:
    """100 new tokens for each of the prompts 8 to 19."""
    prompts = reference.prompts[8:20]
    outputs = [reference.greedy(prompt, 100) for prompt in prompts]
    reference.assert_sure(prompts, outputs)
    return outputs


def engine_of(reference: Reference, device: Device, **settings: Any) -> PagedEngine:
    return checkpoints.load_engine(reference.path, device, **({"max_batch_size": 32} | settings))


def assert_tokens(outputs: Seq[Completion], expected: Seq[list[int]]) -> None:
    for i, (output, new_ids) in enumerate(zip(outputs, expected, strict=True)):
        assert output.finished
        assert output.token_ids == new_ids, f"prompt {i}"


def assert_all_blocks_free(engine: PagedEngine) -> None:
    assert not engine.has_work
    assert not engine._requests, "a finished request is remembered for ever"
    engine.block_manager.check([])
    assert len(engine.block_manager.free) == engine.block_manager.num_blocks


# -- continuous batching equals one at a time ----------------------------------------------------


PREFIX = [pytest.param(True, id="prefix"), pytest.param(False, id="no-prefix")]


def budgets(*sizes: int) -> list[Any]:
    """Of prompt tokens in a step; 0: whole prompts."""
    return [pytest.param(n, id=f"chunk-{n}" if n else "whole") for n in sizes]


@pytest.mark.parametrize(
    ("block_size", "budget", "prefix_caching"), pairs_first([16, 128], budgets(64, 256, 0), PREFIX)
)
def test_batch_equals_hf_one_by_one(
    block_size: int, budget: int, prefix_caching: bool, reference: Reference, device: Device
) -> None:
    engine = engine_of(
        reference,
        device,
        block_size=block_size,
        max_prefill_tokens=budget or 64,
        enable_chunked_prefill=budget > 0,
        enable_prefix_caching=prefix_caching,
    )
    engine.reset_stats(keep_steps=True)
    assert_tokens(engine.generate(reference.prompts, GREEDY), reference.new_ids)
    steps = engine.stats.steps
    assert steps
    longest = max(step.num_prefill_tokens for step in steps)
    # Whole prompts run above the budget. A last single token of a prompt counts as decoding.
    assert (longest < budget + 32) if budget else (longest == max(map(len, reference.prompts)))
    assert engine.scheduler.num_preemptions == 0
    hits_before = engine.block_manager.num_hit_tokens
    assert_tokens(engine.generate(reference.prompts, GREEDY), reference.new_ids)
    hits = engine.block_manager.num_hit_tokens - hits_before
    num_whole = sum((len(p) - 1) // block_size * block_size for p in reference.prompts)
    assert hits == (num_whole if prefix_caching else 0), "in round two every full block is known"
    assert_all_blocks_free(engine)


@pytest.mark.parametrize(
    ("block_size", "budget", "prefix_caching"), pairs_first([16, 128], budgets(64, 0), PREFIX)
)
def test_preemption_changes_nothing(
    block_size: int, budget: int, prefix_caching: bool, reference: Reference, device: Device
) -> None:
    """Requests queue because blocks are few, are preempted for lack of blocks, and all finish."""
    engine = engine_of(
        reference,
        device,
        block_size=block_size,
        num_blocks=SCARCE[block_size],
        max_prefill_tokens=budget or 64,
        enable_chunked_prefill=budget > 0,
        enable_prefix_caching=prefix_caching,
    )
    for prompt in reference.prompts:
        engine.add_request(prompt, GREEDY)
    engine.step()
    assert engine.scheduler.waiting, "the cache is too large for this test"
    outputs = {output.request_id: output for output in engine.stream() if output.finished}
    assert_tokens([outputs[i] for i in range(32)], reference.new_ids)
    assert engine.scheduler.num_preemptions > 0
    assert_all_blocks_free(engine)


@pytest.mark.parametrize("prefix_caching", [True, False], ids=["prefix", "no-prefix"])
@pytest.mark.parametrize("budget", [24, 0], ids=["chunk-24", "whole"])
def test_many_preemptions_of_long_outputs(
    budget: int,
    prefix_caching: bool,
    reference: Reference,
    long_new_ids: list[list[int]],
    device: Device,
) -> None:
    """Half-written outputs are thrown out again and again, and computed anew as if prompts."""
    prompts = reference.prompts[8:20]
    engine = engine_of(
        reference,
        device,
        block_size=16,
        num_blocks=24,
        max_prefill_tokens=budget or 24,
        enable_chunked_prefill=budget > 0,
        enable_prefix_caching=prefix_caching,
    )
    params = SamplingParams(max_new_tokens=100, ignore_eos=True)
    assert_tokens(engine.generate(prompts, params), long_new_ids)
    assert engine.scheduler.num_preemptions >= 5
    assert_all_blocks_free(engine)


def test_batch_limits_are_kept(reference: Reference, device: Device) -> None:
    engine = engine_of(reference, device, max_batch_size=5, max_prefill_batch_size=2)
    engine.reset_stats(keep_steps=True)
    for prompt in reference.prompts:
        engine.add_request(prompt, GREEDY)
    outputs, widest = {}, 0
    while engine.has_work:
        before = len(engine.scheduler.waiting)
        moved = engine.step()
        assert before - len(engine.scheduler.waiting) <= 2
        widest = max(widest, len(moved))
        outputs.update({output.request_id: output for output in moved if output.finished})
    assert widest == 5
    assert_tokens([outputs[i] for i in range(32)], reference.new_ids)


def test_streamed_tokens_are_the_final_ones(reference: Reference, device: Device) -> None:
    engine = engine_of(reference, device)
    ids = [engine.add_request(prompt, GREEDY) for prompt in reference.prompts[:6]]
    streamed: dict[int, list[int]] = {i: [] for i in ids}
    for output in engine.stream():
        streamed[output.request_id] += output.new_token_ids
    assert list(streamed.values()) == reference.new_ids[:6]


def test_undefined_cache_content_is_never_read(reference: Reference, device: Device) -> None:
    engine = engine_of(reference, device, block_size=16, max_prefill_tokens=64)
    for k_cache, v_cache in engine.runner.cache.layers:
        k_cache.fill_(float("nan"))
        v_cache.fill_(float("nan"))
    assert_tokens(engine.generate(reference.prompts, GREEDY), reference.new_ids)


def test_alone_equals_batch(reference: Reference, device: Device) -> None:
    """In fp32, one request after the other without a shared prefix gives the same tokens."""
    engine = engine_of(reference, device, max_batch_size=1, enable_prefix_caching=False)
    for prompt, new_ids in zip(reference.prompts, reference.new_ids, strict=True):
        assert_tokens(engine.generate([prompt], GREEDY), [new_ids])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_alone_is_near_batch_in_half_precision(
    dtype: str, reference: Reference, device: Device
) -> None:
    """Requests beside it move a log-probability by no more than the rounding of the dtype does."""
    params = SamplingParams(max_new_tokens=0, prompt_logprobs=0)
    prompts = [p for p in reference.prompts if len(p) > 1]

    def scores(dtype: str, **settings: Any) -> Tensor:
        engine = checkpoints.load_engine(reference.path, device, dtype, **settings)
        outputs = engine.generate(prompts, params)
        return torch.tensor([t.logprob for output in outputs for t in output.prompt_logprobs])

    exact = scores("float32")
    alone = scores(dtype)
    batch = scores(dtype, max_batch_size=32, block_size=16, max_prefill_tokens=100)
    noise = (alone - exact).square().mean().sqrt()
    assert noise > 1e-4
    assert (batch - alone).square().mean().sqrt() <= noise
    assert (batch - exact).square().mean().sqrt() <= 1.1 * noise


def test_sampling_draws_from_hf_probabilities(reference: Reference, device: Device) -> None:
    """One generator per request: torch's own draws from HF's probabilities, one after another."""
    prompt = reference.prompts[7]
    params = SamplingParams(max_new_tokens=60, temperature=0.8, seed=11, ignore_eos=True)
    token_ids = engine_of(reference, device).generate([prompt], params)[0].token_ids
    rows = reference.logprobs(prompt + token_ids)[len(prompt) - 1 : -1]
    probs = (rows / 0.8).softmax(-1).float()
    generator = torch.Generator().manual_seed(11)
    assert token_ids == [int(torch.multinomial(p, 1, generator=generator)) for p in probs]


def test_seed_decides_whatever_the_batch_mates(reference: Reference, device: Device) -> None:
    prompt = reference.prompts[7]

    def sampled(seed: int, mates: Seq[list[int]], **settings: Any) -> list[int]:
        engine = engine_of(reference, device, **settings)
        own = SamplingParams(max_new_tokens=60, temperature=1.0, seed=seed, ignore_eos=True)
        other = SamplingParams(max_new_tokens=30, temperature=0.7, seed=99, ignore_eos=True)
        outputs = engine.generate([*mates, prompt], [other] * len(mates) + [own])
        assert (engine.scheduler.num_preemptions > 0) == ("num_blocks" in settings)
        return outputs[-1].token_ids

    alone = sampled(11, [])
    assert sampled(11, []) == alone
    assert sampled(11, reference.prompts[:6]) == alone
    assert sampled(11, reference.prompts[10:17], block_size=16, max_prefill_tokens=32) == alone
    assert sampled(11, reference.prompts[8:16], block_size=16, num_blocks=22) == alone
    assert sampled(12, []) != alone


# -- log-probabilities ---------------------------------------------------------------------------


def assert_logprobs(
    actual: Seq[TokenLogprobs], expected: Tensor, token_ids: list[int], num_top: int
) -> None:
    """actual[i] scores token_ids[i] under expected[i], [n, V]."""
    assert [t.token_id for t in actual] == token_ids
    for entry, row in zip(actual, expected, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=LOGPROB_LIMIT)
        values = row.topk(num_top).values.tolist() if num_top else []
        assert list(entry.top.values()) == pytest.approx(values, abs=LOGPROB_LIMIT)
        of_ids = [row[i].item() for i in entry.top]
        assert of_ids == pytest.approx(values, abs=LOGPROB_LIMIT)
        assert len(entry.top) == num_top


@pytest.mark.parametrize(
    ("settings", "preempts"),
    [
        ({}, False),
        ({"max_prefill_tokens": 48, "block_size": 16}, False),
        ({"enable_chunked_prefill": False}, False),
        ({"max_prefill_tokens": 48, "block_size": 16, "num_blocks": SCARCE[16]}, True),
    ],
    ids=["plain", "chunked", "whole", "preempted"],
)
def test_logprobs_equal_hf(
    settings: dict[str, Any], preempts: bool, reference: Reference, device: Device
) -> None:
    engine = engine_of(reference, device, **settings)
    engine.generate(reference.prompts[:8], GREEDY)  # something to hit in the prefix cache
    engine.scheduler.num_preemptions = 0
    params = [
        SamplingParams(
            max_new_tokens=NUM_NEW,
            ignore_eos=True,
            logprobs=3 if i % 2 else 0,
            prompt_logprobs=4 if i % 3 else None,
        )
        for i in range(32)
    ]
    outputs = engine.generate(reference.prompts, params)
    assert_tokens(outputs, reference.new_ids)
    assert (engine.scheduler.num_preemptions > 0) == preempts
    assert engine.block_manager.num_hit_tokens > 0
    for prompt, asked, output in zip(reference.prompts, params, outputs, strict=True):
        expected = reference.logprobs(prompt + output.token_ids)
        new = expected[len(prompt) - 1 : -1]
        assert_logprobs(output.logprobs, new, output.token_ids, asked.logprobs or 0)
        if asked.prompt_logprobs is None:
            assert output.prompt_logprobs == []
        else:
            rows = expected[: len(prompt) - 1]
            assert_logprobs(output.prompt_logprobs, rows, prompt[1:], asked.prompt_logprobs)


@pytest.mark.parametrize("start", [1, 2, 128, 129, 200, 281, 282, 400])
def test_prompt_logprobs_from_a_position_on(
    start: int, reference: Reference, device: Device
) -> None:
    """What lies before may come from the prefix cache; what is asked for is the same as ever."""
    engine = engine_of(reference, device, block_size=16, max_prefill_tokens=100)
    prompt = reference.prompts[3]
    assert len(prompt) == 282
    engine.generate([prompt], GREEDY)
    params = SamplingParams(
        max_new_tokens=NUM_NEW, ignore_eos=True, prompt_logprobs=2, prompt_logprobs_start=start
    )
    output = engine.generate([prompt], params)[0]
    assert engine.block_manager.num_hit_tokens == min(start - 1, 281) // 16 * 16
    assert output.token_ids == reference.new_ids[3]
    rows = reference.logprobs(prompt)[start - 1 : -1]
    assert_logprobs(output.prompt_logprobs, rows, prompt[start:], 2)


def test_logprobs_of_chosen_tokens(reference: Reference, device: Device) -> None:
    wanted = (7, VOCAB - 1, 0)
    params = SamplingParams(max_new_tokens=3, ignore_eos=True, logprobs=0, logprob_token_ids=wanted)
    output = engine_of(reference, device).generate(reference.prompts[5:6], params)[0]
    expected = reference.logprobs(reference.prompts[5] + output.token_ids)
    assert output.token_ids == reference.new_ids[5][:3]
    for entry, row in zip(output.logprobs, expected[len(reference.prompts[5]) - 1 :], strict=False):
        assert tuple(entry.top) == wanted
        values = [row[i].item() for i in wanted]
        assert list(entry.top.values()) == pytest.approx(values, abs=LOGPROB_LIMIT)


def test_logprobs_nobody_asked_for_are_not_made(reference: Reference, device: Device) -> None:
    output = engine_of(reference, device).generate(reference.prompts[3:4], GREEDY)[0]
    assert output.logprobs == output.prompt_logprobs == []


@pytest.mark.parametrize("settings", [{}, {"max_prefill_tokens": 40}], ids=["whole", "chunked"])
def test_scoring_without_new_tokens(
    settings: dict[str, Any], reference: Reference, device: Device
) -> None:
    engine = engine_of(reference, device, **settings)
    whole_context = checkpoints.prompts([512], VOCAB, seed=8)[0]
    prompts = [*reference.prompts[:12], whole_context]
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=0, prompt_logprobs=2))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert (output.token_ids, output.logprobs, output.finish_reason) == ([], [], "length")
        rows = reference.logprobs(prompt)[:-1]
        assert_logprobs(output.prompt_logprobs, rows, prompt[1:], 2)
    assert engine.stats.num_output_tokens == 0
    assert_all_blocks_free(engine)


# -- abort ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_abort_at_any_step(seed: int, reference: Reference, device: Device) -> None:
    """Waiting, half prefilled, decoding and preempted requests are aborted; others do not change.

    Asserts after every step that the blocks in use are those of the running sequences.
    """
    rng = random.Random(seed)
    engine = engine_of(
        reference, device, block_size=16, num_blocks=SCARCE[16], max_prefill_tokens=48
    )
    ids = [engine.add_request(prompt, GREEDY) for prompt in reference.prompts]
    alive, outputs = set(ids), {}
    while engine.has_work:
        for output in engine.step():
            assert output.request_id in alive
            if output.finished:
                outputs[output.request_id] = output
                alive.remove(output.request_id)
        engine.block_manager.check(engine.scheduler.running)
        if alive and rng.random() < 0.2:
            victim = rng.choice(sorted(alive))
            alive.remove(victim)
            engine.abort(victim)
            engine.abort(victim)  # a second time is fine
            engine.block_manager.check(engine.scheduler.running)
    assert 0 < len(outputs) < 32
    assert_tokens(list(outputs.values()), [reference.new_ids[ids.index(i)] for i in outputs])
    engine.abort(ids[0])
    engine.abort(10**6)
    assert_all_blocks_free(engine)
    assert_tokens(engine.generate(reference.prompts[:5], GREEDY), reference.new_ids[:5])


def test_abort_in_mid_prefill_shares_nothing_uncomputed(
    reference: Reference, device: Device
) -> None:
    """Only blocks that were computed may serve the same prompt later; the others hold NaN here."""
    engine = engine_of(reference, device, block_size=16, max_prefill_tokens=40)
    for k_cache, v_cache in engine.runner.cache.layers:
        k_cache.fill_(float("nan"))
        v_cache.fill_(float("nan"))
    prompt = reference.prompts[2]
    request_id = engine.add_request(prompt, GREEDY)
    assert engine.step() == engine.step() == []  # 80 of 300 tokens
    engine.abort(request_id)
    assert_all_blocks_free(engine)
    assert_tokens(engine.generate([prompt], GREEDY), [reference.new_ids[2]])
    assert engine.block_manager.num_hit_tokens == 80


# -- what a request may ask ----------------------------------------------------------------------


def numbers(error: pytest.ExceptionInfo[InvalidParameter]) -> set[int]:
    return {int(n) for n in re.findall(r"-?\d+", str(error.value))}


def test_position_limit(tmp_path: Path, device: Device) -> None:
    """Prompt and new tokens together may fill all positions, but not exceed them."""
    config = checkpoints.FAMILY["pythia-1.4b"]
    model = checkpoints.write_checkpoint(tmp_path, config)
    engine = checkpoints.load_engine(tmp_path, device, num_blocks=17)
    assert engine.max_positions == 2048
    prompt = checkpoints.prompts([2049], config["vocab_size"])[0]
    for num_prompt, num_new in [(2048, 1), (2049, 1), (2047, 2), (1, 2048)]:
        with pytest.raises(InvalidParameter) as error:
            engine.add_request(prompt[:num_prompt], SamplingParams(max_new_tokens=num_new))
        assert error.value.param == "max_new_tokens"
        assert {num_prompt, num_new, 2048, max(0, 2048 - num_prompt)} <= numbers(error)
    assert not engine.has_work
    score = SamplingParams(max_new_tokens=0, prompt_logprobs=0)
    with pytest.raises(InvalidParameter):
        engine.add_request(prompt, score)
    scored = engine.generate([prompt[:2048]], score)[0]
    assert len(scored.prompt_logprobs) == 2047
    last = engine.generate([prompt[:2047]], SamplingParams(max_new_tokens=1))[0]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt[:2047]])).logits[0, -1]
    assert last.token_ids == [int(logits.argmax())]
    assert_all_blocks_free(engine)


def test_position_limit_from_the_settings(reference: Reference, device: Device) -> None:
    engine = engine_of(reference, device, max_position_embeddings=64)
    with pytest.raises(InvalidParameter, match="64 positions"):
        engine.add_request([5] * 60, SamplingParams(max_new_tokens=5))
    fitting = SamplingParams(max_new_tokens=4, ignore_eos=True)
    prompt = reference.prompts[2][:60]
    assert_tokens(engine.generate([prompt], fitting), [reference.greedy(prompt, 4)])


@pytest.mark.parametrize("token_id", [-1, VOCAB, 10**9])
def test_ids_out_of_the_vocabulary_are_refused(
    token_id: int, reference: Reference, device: Device
) -> None:
    engine = engine_of(reference, device)
    with pytest.raises(InvalidParameter) as error:
        engine.add_request([1, token_id, 2], GREEDY)
    assert error.value.param == "prompt"
    assert {token_id, VOCAB - 1} <= numbers(error)
    assert not engine.has_work


def test_padding_ids_are_accepted(reference: Reference, device: Device) -> None:
    prompt = [VOCAB - 1, 3, VOCAB - 1]
    new_ids = reference.greedy(prompt, NUM_NEW)
    assert_tokens(engine_of(reference, device).generate([prompt], GREEDY), [new_ids])


def test_empty_prompt_is_refused(reference: Reference, device: Device) -> None:
    with pytest.raises(InvalidParameter, match="at least one token") as error:
        engine_of(reference, device).add_request([], GREEDY)
    assert error.value.param == "prompt"


def test_stop_string_needs_a_tokenizer(reference: Reference, device: Device) -> None:
    with pytest.raises(InvalidParameter) as error:
        engine_of(reference, device).add_request([1], SamplingParams(stop=("x",)))
    assert error.value.param == "stop"


def test_one_bad_prompt_starts_nothing(reference: Reference, device: Device) -> None:
    engine = engine_of(reference, device)
    with pytest.raises(InvalidParameter):
        engine.generate([[1, 2], [3], []], GREEDY)
    assert_all_blocks_free(engine)


def test_request_larger_than_the_cache_is_refused(reference: Reference, device: Device) -> None:
    """It is refused when it is added, with both numbers; one that just fits runs."""
    engine = engine_of(reference, device, block_size=16, num_blocks=7)
    prompt = reference.prompts[2]
    with pytest.raises(InvalidParameter) as error:
        engine.add_request(prompt[:89], GREEDY)  # 113 tokens
    assert {7, 8} <= numbers(error)
    assert not engine.has_work
    new_ids = reference.greedy(prompt[:88], NUM_NEW)
    assert_tokens(engine.generate([prompt[:88]] * 2, GREEDY), [new_ids] * 2)


# -- where a request ends ------------------------------------------------------------------------


def first_at(token_ids: list[int], earliest: int) -> int:
    """A position from `earliest` on whose token did not occur before."""
    return next(i for i in range(earliest, len(token_ids)) if token_ids[i] not in token_ids[:i])


def test_stop_token_ids(reference: Reference, device: Device) -> None:
    new_ids = reference.new_ids[5]
    end = first_at(new_ids, 6)
    unused = next(t for t in range(VOCAB) if t not in new_ids)
    params = SamplingParams(
        max_new_tokens=NUM_NEW, ignore_eos=True, stop_token_ids=(unused, new_ids[end]), logprobs=0
    )
    output = engine_of(reference, device).generate([reference.prompts[5]], params)[0]
    assert output.finish_reason == "stop"
    assert output.token_ids == new_ids[: end + 1]
    assert len(output.logprobs) == end + 1


def test_stop_token_in_the_prompt_does_not_stop(reference: Reference, device: Device) -> None:
    pairs = zip(reference.prompts, reference.new_ids, strict=True)
    prompt, new_ids = next((p, n) for p, n in pairs if len(p) > 1 and not set(p) & set(n))
    params = SamplingParams(
        max_new_tokens=NUM_NEW, ignore_eos=True, stop_token_ids=(prompt[0], prompt[-1])
    )
    output = engine_of(reference, device).generate([prompt], params)[0]
    assert (output.token_ids, output.finish_reason) == (new_ids, "length")


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("as_list", [True, False], ids=["list", "number"])
def test_end_of_text(
    where: str, as_list: bool, reference: Reference, device: Device, tmp_path: Path
) -> None:
    """As HF with the same id; generation_config.json comes before config.json."""
    new_ids = reference.new_ids[9]
    eos = new_ids[first_at(new_ids, 4)]
    value = [VOCAB - 2, eos] if as_list else eos
    shutil.copytree(reference.path, tmp_path, dirs_exist_ok=True)
    config = CONFIG | {"eos_token_id": value if where == "config.json" else new_ids[0]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if where == "generation_config.json":
        (tmp_path / where).write_text(json.dumps({"eos_token_id": value}), encoding="utf-8")
    engine = checkpoints.load_engine(tmp_path, device, max_batch_size=2)
    prompt = reference.prompts[9]
    stops, ignores = engine.generate(
        [prompt, prompt], [SamplingParams(max_new_tokens=NUM_NEW), GREEDY]
    )
    assert stops.finish_reason == "stop"
    assert stops.token_ids == reference.greedy(prompt, NUM_NEW, eos=value)
    assert (ignores.token_ids, ignores.finish_reason) == (new_ids, "length")


# -- broken weights ------------------------------------------------------------------------------


@pytest.fixture
def nan_checkpoint(reference: Reference, tmp_path: Path) -> Path:
    """The embedding of token 7 is NaN, so only requests that hold it come to harm."""
    shutil.copytree(reference.path, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["gpt_neox.embed_in.weight"][7] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def test_a_request_with_nan_fails_alone(nan_checkpoint: Path, device: Device) -> None:
    """Its neighbours answer as they do without it."""
    engine = checkpoints.load_engine(nan_checkpoint, device, max_batch_size=3)
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    first, third = engine.generate([[5, 6], [8]], params)
    outputs = engine.generate([[5, 6], [4, 7], [8]], params)
    assert [o.token_ids for o in outputs] == [first.token_ids, [], third.token_ids]
    assert [o.finish_reason for o in outputs] == ["length", "error", "length"]
    assert [bool(o.error) for o in outputs] == [False, True, False]
    assert "the logits are not finite" in outputs[1].error
    assert_all_blocks_free(engine)


def test_what_a_failed_request_had_is_kept(nan_checkpoint: Path, device: Device) -> None:
    """The token with the broken row comes up in the middle of an answer."""
    engine = checkpoints.load_engine(nan_checkpoint, device, max_batch_size=2)
    params = SamplingParams(max_new_tokens=3, ignore_eos=True, logprobs=0)
    engine.rules = GenerationRules(forced_bos_token_ids=(7,))  # follows a prompt of one token
    [failed] = engine.generate([[5]], params)
    assert (failed.finish_reason, failed.token_ids) == ("error", [7])
    assert [entry.token_id for entry in failed.logprobs] == [7]


def test_nan_does_not_reach_batch_mates(nan_checkpoint: Path, device: Device) -> None:
    engine = checkpoints.load_engine(nan_checkpoint, device, max_batch_size=3, block_size=16)
    params = SamplingParams(max_new_tokens=1, ignore_eos=True)
    expected = [o.token_ids for o in engine.generate([[5, 6], [8, 9, 10]], params)]
    [failed] = engine.generate([[4] * 20 + [7]], params)  # its blocks hold NaN from here on
    assert failed.error
    for _ in range(engine.block_manager.num_blocks):
        assert_tokens(engine.generate([[5, 6], [8, 9, 10]], params), expected)


def test_nan_in_a_scored_prompt_is_not_returned(nan_checkpoint: Path, device: Device) -> None:
    engine = checkpoints.load_engine(nan_checkpoint, device, max_batch_size=3)
    params = SamplingParams(max_new_tokens=0, prompt_logprobs=0)
    outputs = engine.generate([[5, 6, 8], [4, 7, 5], [8, 9]], params)
    assert [o.finish_reason for o in outputs] == ["length", "error", "length"]
    assert len(outputs[0].prompt_logprobs) == 2


def test_two_models_on_one_device(tmp_path: Path, device: Device) -> None:
    """Of different shapes, taking turns step by step: each answers as alone."""
    names = ("gpt-neox-20b", "relu-serial", "pythia-1b")
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    alone, engines = [], []
    for name in names:
        config = checkpoints.FAMILY[name]
        checkpoints.write_checkpoint(tmp_path / name, config, sharpness=2.0)
        prompts = checkpoints.prompts([20, 3, 40], config["vocab_size"], seed=5)
        engine = checkpoints.load_engine(tmp_path / name, device, num_blocks=9)
        alone.append([o.token_ids for o in engine.generate(prompts, params)])
        engines.append((checkpoints.load_engine(tmp_path / name, device, num_blocks=9), prompts))
    for engine, prompts in engines:
        for prompt in prompts:
            engine.add_request(prompt, params)
    answers: list[dict[int, list[int]]] = [{} for _ in engines]
    while any(engine.scheduler.has_work for engine, _ in engines):
        for (engine, _), found in zip(engines, answers, strict=True):
            if engine.scheduler.has_work:
                found |= {o.request_id: o.token_ids for o in engine.step() if o.finished}
    assert [[found[i] for i in sorted(found)] for found in answers] == alone


# -- several callers -------------------------------------------------------------------------------


def test_generate_hands_other_requests_their_completions(
    reference: Reference, device: Device
) -> None:
    engine = engine_of(reference, device, max_batch_size=8)
    prompts, expected = reference.prompts, reference.new_ids
    first = engine.add_request(prompts[0], GREEDY)
    second = engine.add_request(prompts[1], GREEDY)
    assert_tokens(engine.generate(prompts[2:4], GREEDY), expected[2:4])
    assert engine.has_work
    done = {c.request_id: c for c in engine.stream() if c.finished}
    assert_tokens([done[first], done[second]], expected[:2])
    assert_all_blocks_free(engine)


def test_two_iterators_take_turns(reference: Reference, device: Device) -> None:
    """One may be abandoned half-way; the other gets all of its completions."""
    engine = engine_of(reference, device, max_batch_size=8)
    prompts, expected = reference.prompts, reference.new_ids
    left, right = engine.complete(prompts[:2], GREEDY), engine.complete(prompts[2:4], GREEDY)
    done: dict[int, Completion] = {}
    for _, (i, completion) in zip(range(3), left, strict=False):
        next(right)
        done |= {i: completion} if completion.finished else {}
    right.close()
    done |= {i: c for i, c in left if c.finished}
    assert_tokens([done[0], done[1]], expected[:2])
    assert not engine.has_work
    assert_all_blocks_free(engine)


def test_a_failed_step_loses_no_completion(
    reference: Reference, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(reference, device, max_batch_size=8)
    queued = engine.add_request(reference.prompts[0], replace(GREEDY, max_new_tokens=2))
    engine.generate(reference.prompts[1:2], GREEDY)
    engine.add_request(reference.prompts[2], GREEDY)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(engine.runner, "run", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.step()
    assert any(c.request_id == queued and c.finished for c in engine.step())


def test_scoring_does_not_obey_the_rules(reference: Reference, device: Device) -> None:
    """The likeliest next token, whatever the checkpoint forces or forbids in an answer."""
    engine = engine_of(reference, device)
    prompts = reference.prompts[:3]
    before = [scored.greedy_id for scored in engine.score_next(prompts, [1])]
    engine.rules = GenerationRules(forced_eos_token_ids=(7,), suppress_tokens=tuple(before))
    assert [scored.greedy_id for scored in engine.score_next(prompts, [1])] == before
    assert engine.generate(prompts[:1], replace(GREEDY, max_new_tokens=1))[0].token_ids == [7]


def test_several_rows_of_a_sequence_are_sampled(reference: Reference, device: Device) -> None:
    """Each row of a prompt gives the token that greedy choice would put after it."""
    engine = engine_of(reference, device)
    prompt, num_new = reference.prompts[2], 4
    text = prompt + reference.new_ids[2][:num_new]
    engine.add_request(text, GREEDY)
    [item] = engine.scheduler.schedule()
    rows = tuple(range(len(prompt) - 1, len(text) - 1))
    result = engine.runner.run([replace(item, sample_rows=rows)])
    assert result.token_ids == [reference.new_ids[2][:num_new]]
    assert result.failed == {}


def test_log_probabilities_end_with_the_answer(reference: Reference, device: Device) -> None:
    """Of several tokens of a step, those past the end leave none behind."""
    engine = engine_of(reference, device)
    prompt, new_ids = reference.prompts[2], reference.new_ids[2]
    params = SamplingParams(max_new_tokens=9, logprobs=0, stop_token_ids=(new_ids[1],))
    engine.add_request(prompt + new_ids[:3], params)
    [item] = engine.scheduler.schedule()
    seq, start = item.seq, len(prompt) - 1
    result = engine.runner.run([replace(item, sample_rows=tuple(range(start, start + 4)))])
    engine.scheduler.mark_computed([item])
    del seq.token_ids[len(prompt) :]  # as a draft that was checked and is now taken
    seq.num_prompt_tokens = len(prompt)
    completion = engine._advance(engine._requests[seq.request_id], result.token_ids[0], late=False)
    first_end = new_ids.index(new_ids[1]) + 1
    assert (completion.token_ids, completion.finish_reason) == (new_ids[:first_end], "stop")
    assert [entry.token_id for entry in completion.logprobs] == new_ids[:first_end]
    assert_all_blocks_free(engine)
