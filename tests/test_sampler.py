# SPDX-License-Identifier: Apache-2.0
"""Sampling against transformers' own filters, statistics, and the refusal of bad parameters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gptneox.engine.generation_config import GenerationRules
from gptneox.engine.sampler import (
    Sampler,
    adjust,
    filtered_probs,
    non_finite_rows,
    token_logprobs,
)
from gptneox.engine.sequence import InvalidParameter, SamplingParams, Sequence

V = 50


def sequence(request_id: int = 0, tokens: tuple[int, ...] = (1, 2), **params: Any) -> Sequence:
    return Sequence.create(request_id, tokens, SamplingParams(**params))


def sample(logits: torch.Tensor, seqs: list[Sequence], sampler: Sampler | None = None) -> list[int]:
    """The token of each row."""
    token_ids: list[int] = (sampler or Sampler()).choose(logits, seqs)[:-1].tolist()
    return token_ids


def random_logits(rows: int, seed: int = 0, *, ties: bool = False) -> torch.Tensor:
    logits = 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))
    return logits.round() if ties else logits


def processed(logits: torch.Tensor, seq: Sequence) -> torch.Tensor:
    """Scores [V] as transformers' `generate` processes them, in its order.

    It has no presence and frequency penalty: those are OpenAI's formula, written out.
    """
    params, ids, scores = seq.params, torch.tensor([seq.token_ids]), logits[None].clone()
    if params.logit_bias:
        bias = {(token_id,): value for token_id, value in params.logit_bias if value}
        scores = SequenceBiasLogitsProcessor(bias)(ids, scores)
    if params.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    for token_id in range(V):
        count = seq.output_ids.count(token_id)
        scores[0, token_id] -= params.frequency_penalty * count
        scores[0, token_id] -= params.presence_penalty * (count > 0)
    if params.min_new_tokens:
        ends = [*seq.eos_token_ids, *params.stop_token_ids]
        scores = MinNewTokensLengthLogitsProcessor(
            seq.num_prompt_tokens, params.min_new_tokens, ends, device="cpu"
        )(ids, scores)
    if params.allowed_token_ids:
        allowed = list(params.allowed_token_ids)
        scores = PrefixConstrainedLogitsProcessor(lambda *_: allowed, 1)(ids, scores)
    if params.temperature:
        scores = TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k > 0:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(ids, scores)
    return scores[0]


FILTERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": V},
    {"top_k": V + 100},
    {"top_k": -1},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.5},
    {"repetition_penalty": 2.0, "temperature": 0.7, "top_k": 12, "top_p": 0.8},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 0.1, "top_p": 0.7, "top_k": 9, "temperature": 2.0},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.7},
    {"logit_bias": ((3, 5.0), (0, -100.0), (49, 0.0), (7, 2.5))},
    {"allowed_token_ids": (4, 49, 11, 3)},
    {"min_new_tokens": 5, "stop_token_ids": (3, 11)},
    {"min_new_tokens": 4, "stop_token_ids": (3, 11)},
    {
        "logit_bias": ((3, 9.0), (11, 4.0)),
        "repetition_penalty": 1.7,
        "min_p": 0.02,
        "presence_penalty": -1.0,
        "frequency_penalty": 0.8,
        "temperature": 0.9,
        "top_p": 0.95,
        "allowed_token_ids": (*range(0, 50, 2), 3, 11, 49),
        "min_new_tokens": 9,
    },
]
PROMPT, NEW = (3, 3, 20, 49, 0), (11, 3, 11, 49)  # the penalties of the answer skip the prompt


def chosen_by(given_params: dict[str, Any], temperature: float = 1.0) -> Sequence:
    params = SamplingParams(**({"temperature": temperature} | given_params))
    seq = Sequence.create(0, PROMPT, params, eos_token_ids=(0,))
    seq.token_ids += NEW
    return seq


@pytest.mark.parametrize("given_params", FILTERS, ids=str)
def test_filters_are_those_of_transformers(given_params: dict[str, Any]) -> None:
    seq = chosen_by(given_params)
    for row in random_logits(40):
        expected = processed(row, seq).softmax(-1)
        probs = filtered_probs(adjust(row, seq), seq.params)
        torch.testing.assert_close(probs, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("given_params", FILTERS, ids=str)
def test_greedy_rows_are_adjusted_too(given_params: dict[str, Any]) -> None:
    seq = chosen_by(given_params | {"temperature": 0.0})
    logits = random_logits(40)
    expected = [processed(row, seq).argmax().item() for row in logits.clone()]
    assert sample(logits, [seq] * 40) == expected


@pytest.mark.parametrize("given_params", FILTERS, ids=str)
def test_ties_keep_the_same_probabilities(given_params: dict[str, Any]) -> None:
    """With equal logits at the border of top_p it is free which are kept, but not how many."""
    seq = chosen_by(given_params)
    for row in random_logits(40, seed=1, ties=True):
        expected = processed(row, seq).softmax(-1).sort().values
        actual = filtered_probs(adjust(row, seq), seq.params).sort().values
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_what_the_checkpoint_forces_comes_whatever_the_request_says() -> None:
    params = SamplingParams(allowed_token_ids=(4,), min_new_tokens=2, logit_bias=((7, -100.0),))
    rules = GenerationRules(forced_bos_token_ids=(7,))
    assert sample(random_logits(1), [Sequence.create(0, (1,), params, rules, (7,))]) == [7]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_is_left(temperature: float) -> None:
    """A row of which every token is forbidden says so; its neighbours do not notice."""
    params = SamplingParams(allowed_token_ids=(4,), min_new_tokens=1, temperature=temperature)
    empty = Sequence.create(0, (1,), params, eos_token_ids=(4,))
    logits = random_logits(3)
    seqs = [sequence(1), empty, sequence(2)]
    assert sample(logits, seqs) == [int(logits[0].argmax()), -1, int(logits[2].argmax())]


def test_a_row_without_any_wish_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neutral values cost nothing: such rows take the likeliest token of the whole batch."""
    monkeypatch.setattr(Sampler, "_choose", None)
    neutral = {"min_p": 0.0, "presence_penalty": 0.0, "logit_bias": (), "top_k": 5, "top_p": 0.5}
    assert sample(random_logits(1), [sequence(**neutral)]) == [int(random_logits(1)[0].argmax())]
    for name, value in ADJUSTING.items():
        with pytest.raises(TypeError):
            sample(random_logits(1), [sequence(**{name: value})])


ADJUSTING: dict[str, Any] = {
    "temperature": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": -0.1,
    "logit_bias": ((1, 1.0),),
    "allowed_token_ids": (1,),
    "min_new_tokens": 1,
}


def test_equal_logits_and_top_k_keep_all_ties() -> None:
    probs = filtered_probs(torch.zeros(V), SamplingParams(temperature=1.0, top_k=3))
    torch.testing.assert_close(probs, torch.full((V,), 1 / V))


@given(
    seed=st.integers(0, 1000),
    top_p=st.floats(1e-9, 1.0),
    top_k=st.integers(-1, V + 1),
    temperature=st.floats(1e-3, 1e3),
)
@settings(max_examples=150, deadline=None)
def test_some_token_is_always_left(seed: int, top_p: float, top_k: int, temperature: float) -> None:
    logits = random_logits(1, seed)[0]
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k)
    probs = filtered_probs(logits, params)
    assert probs.sum().item() == pytest.approx(1, abs=1e-5)
    assert probs[logits.argmax()] > 0
    smallest_kept = logits[probs > 0].min()
    assert smallest_kept >= logits.topk(int((probs > 0).sum())).values[-1]


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = random_logits(8, seed=3) * 100
    seqs = [sequence(i, temperature=temperature, seed=i) for i in range(8)]
    assert sample(logits, seqs) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("penalty", [5e-324, 1e-40, 1e-20, 1e20, 1e40, 1.7e308])
def test_extreme_penalties_still_choose_a_token(penalty: float, temperature: float) -> None:
    logits = random_logits(1, seed=6)
    logits[0, 1] = 0.0
    seq = sequence(tokens=tuple(range(V)), repetition_penalty=penalty, temperature=temperature)
    assert 0 <= sample(logits, [seq])[0] < V


def test_greedy_is_argmax_and_mixes_with_sampling() -> None:
    logits = random_logits(6)
    seqs = [sequence(i, temperature=float(i % 2), seed=i) for i in range(6)]
    token_ids = sample(logits, seqs)
    assert token_ids[::2] == logits[::2].argmax(-1).tolist()


def test_greedy_takes_the_penalty_into_account() -> None:
    logits = torch.zeros(1, V)
    logits[0, 4], logits[0, 9] = 3.0, 2.0
    assert sample(logits, [sequence(tokens=(4,))]) == [4]
    assert sample(logits, [sequence(tokens=(4,), repetition_penalty=2.0)]) == [9]
    logits = torch.full((1, V), -8.0)
    logits[0, 4], logits[0, 9] = -3.0, -4.0  # a penalty makes a negative logit more negative
    assert sample(logits, [sequence(tokens=(4,), repetition_penalty=2.0)]) == [9]


def draws(seed: int | None, num_mates: int, request_id: int, count: int = 12) -> list[int]:
    """Tokens of one sampled request that runs among `num_mates` others."""
    sampler, logits = Sampler(), random_logits(count, seed=8)
    seq = sequence(request_id, temperature=1.5, seed=seed)
    mates = [sequence(100 + i, temperature=2.0, seed=seed) for i in range(num_mates)]
    tokens = []
    for step in range(count):
        seqs = [*mates[:step], seq, *mates[step:]]  # its place in the batch changes, too
        batch = random_logits(len(seqs), seed=50 + step)
        batch[seqs.index(seq)] = logits[step]
        tokens.append(sample(batch, seqs, sampler)[seqs.index(seq)])
    return tokens


def test_a_seed_gives_the_same_text_whatever_the_batch() -> None:
    alone = draws(7, num_mates=0, request_id=0)
    assert draws(7, num_mates=0, request_id=0) == alone
    assert draws(7, num_mates=3, request_id=5) == alone
    assert draws(8, num_mates=0, request_id=0) != alone
    torch.manual_seed(0)
    first = draws(None, num_mates=0, request_id=0)
    torch.manual_seed(0)  # without a seed, even the global one does not repeat a text
    assert draws(None, num_mates=0, request_id=0) != first


def test_a_finished_request_leaves_nothing_behind() -> None:
    sampler, seq = Sampler(), sequence(3, temperature=1.0, seed=1)
    first = sample(random_logits(1), [seq], sampler)
    sampler.forget(seq)
    assert sample(random_logits(1), [seq], sampler) == first  # a new generator
    sampler.forget(seq)
    sampler.forget(seq)
    assert not sampler._generators


@pytest.mark.parametrize("given_params", [{}, {"top_k": 5}, {"top_p": 0.7, "temperature": 1.6}])
def test_empirical_distribution(given_params: dict[str, Any]) -> None:
    """Chi-square of 20 000 draws; the bound is passed by chance once in 10^5 seeds."""
    params = {"temperature": 1.0, "seed": 11} | given_params
    logits = random_logits(1, seed=5) / 2
    seq, sampler, num_draws = sequence(**params), Sampler(), 20_000
    counts = torch.zeros(V, dtype=torch.float64)
    for _ in range(num_draws):
        counts[sample(logits, [seq], sampler)[0]] += 1
    probs = filtered_probs(logits[0], seq.params).double()
    assert counts[probs == 0].sum() == 0
    expected = probs * num_draws
    common = expected >= 5
    assert common.sum() >= 3
    chi_square = ((counts - expected)[common] ** 2 / expected[common]).sum().item()
    freedom = int(common.sum()) - 1
    # Wilson and Hilferty's approximation of the quantile at 1 - 1e-5 (z = 4.265).
    bound = freedom * (1 - 2 / (9 * freedom) + 4.265 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < bound


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_are_not_finite(value: float, dtype: torch.dtype) -> None:
    logits = random_logits(4).to(dtype)
    logits[1, 7] = value
    logits[3, 0] = value
    seqs = [sequence(i + 40, temperature=float(i % 2)) for i in range(4)]
    assert not Sampler().choose(logits, seqs)[-1]
    assert non_finite_rows(logits) == [1, 3]


def test_opposite_infinities_do_not_cancel() -> None:
    logits = random_logits(1)
    logits[0, 0], logits[0, 1] = math.inf, -math.inf
    assert not Sampler().choose(logits, [sequence(9)])[-1]
    assert non_finite_rows(logits) == [0]


def test_huge_but_finite_logits_are_no_error() -> None:
    logits = torch.full((2, V), 3e38)
    logits[0, 5] = logits[1, 6] = 3.2e38
    seqs = [sequence(0), sequence(1, temperature=1.0)]
    assert sample(logits, seqs) == [5, 6]
    assert non_finite_rows(logits) == []


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits(3).to(torch.bfloat16)
    rows = token_logprobs(logits, [4, 0, 49], 3)
    reference = logits.double().log_softmax(-1)
    for row, expected, token_id in zip(rows, reference, (4, 0, 49), strict=True):
        assert row.token_id == token_id
        assert row.logprob == pytest.approx(expected[token_id].item(), abs=1e-5)
        assert set(row.top) == set(expected.topk(3).indices.tolist())
        assert list(row.top.values()) == sorted(row.top.values(), reverse=True)
    assert [row.top for row in token_logprobs(logits, [1, 2, 3], 0)] == [{}, {}, {}]
    assert len(token_logprobs(logits[:1], [0], 100)[0].top) == V


# -- parameters ----------------------------------------------------------------------------------

REFUSED = {
    "temperature": [-1.0, -1e-9, math.nan, math.inf, -math.inf, "hot", None, True, [1.0]],
    "top_p": [0, 0.0, -0.5, 1.1, math.nan, math.inf, "0.5", None, False],
    "top_k": [-5, -2, 2.5, "3", None, True, math.nan],
    "max_new_tokens": [0, -1, 1.5, "20", None, True, math.inf],
    "repetition_penalty": [0, 0.0, -1.0, math.nan, math.inf, "1", None],
    "min_p": [-0.1, 1.1, math.nan, "0.1", None, True],
    "presence_penalty": [-2.1, 2.1, math.nan, "0", None],
    "frequency_penalty": [-2.1, 2.1, math.inf, "0", None],
    "logit_bias": [
        *({5: 1.0}, [(5, 1.0)], ((5,),), ((5, 1.0, 2.0),), ((-1, 1.0),), ((5, 100.1),), (5, 1)),
        *(((5, math.nan),), (("5", 1.0),), ((5, 1.0), (5, 2.0)), ((True, 1.0),), None),
    ],
    "allowed_token_ids": [[1], (-1,), (1.0,), ("1",), (True,), None],
    "stop_token_ids": [[1], (-1,), (0.5,), None],
    "min_new_tokens": [-1, 21, 1.5, None, True],
    "seed": [-1, 2**63, 1.5, "0", True],
    "stop": [("",), ("a", ""), (1,), (None,), ("x",) * 100],
    "logprobs": [-2, -1, 10**6, 1.0, "5", True],
    "prompt_logprobs": [-2, 10**6, 0.5, "5", True],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in REFUSED.items() for value in values],
    ids=lambda value: str(value)[:30],
)
def test_bad_parameters_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidParameter) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    message = str(caught.value)
    assert message.startswith(f"{field} is ")
    assert message.endswith(" is expected")
    assert "\n" not in message


ACCEPTED = {
    "temperature": [0, 0.0, 1, 1e-9, 1e9],
    "top_p": [1, 1.0, 1e-9],
    "top_k": [-1, 0, 1, 10**9],
    "max_new_tokens": [1, 10**9],
    "repetition_penalty": [1e-3, 1, 2.0],
    "min_p": [0, 0.0, 0.5, 1],
    "presence_penalty": [-2, 0, 2.0],
    "frequency_penalty": [-2, 0, 2.0],
    "logit_bias": [(), ((0, -100), (7, 100.0))],
    "allowed_token_ids": [(), (0,), (9, 3)],
    "min_new_tokens": [0, 20],
    "seed": [None, 0, 2**63 - 1],
    "stop": [(), ("a",), ("x",) * 16, ("\0", "\n", "日本")],
    "logprobs": [None, 0, 100],
    "prompt_logprobs": [None, 0, 100],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in ACCEPTED.items() for value in values],
    ids=lambda value: str(value)[:30],
)
def test_good_parameters_are_taken(field: str, value: Any) -> None:
    assert getattr(SamplingParams(**{field: value}), field) == value


def test_no_new_token_only_to_score_a_prompt() -> None:
    assert SamplingParams(max_new_tokens=0, prompt_logprobs=0).max_new_tokens == 0


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_every_accepted_seed_works(seed: int) -> None:
    assert 0 <= sample(random_logits(1), [sequence(temperature=1.0, seed=seed)])[0] < V
