# SPDX-License-Identifier: Apache-2.0
"""Sampling: next token ids from logits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from gptneox.devices.device import Device
from gptneox.devices.operators import Operators
from gptneox.engine.sequence import SamplingParams, Sequence, TokenLogprobs


class Sampler:
    """Greedy or random sampling per sequence, independent of the rest of the batch.

    First `adjust`, then, unless the temperature is 0, `filtered_probs`; the order is that of
    transformers' `generate`. Each sequence has its own random generator, so a seed gives the same
    text in any batch.
    """

    def __init__(self, ops: Operators | None = None) -> None:
        self._ops = ops or Operators(Device())
        self._generators: dict[int, torch.Generator] = {}

    def choose(self, logits: Tensor, seqs: Seq[Sequence]) -> Tensor:
        """Sample one token for each row on the device, without waiting for it.

        Args:
            logits: [S, V], any float dtype.
            seqs: the sequence of each row; one sequence may have several rows.

        Returns:
            [S + 1] int64: S token ids (-1: every token is forbidden), and whether the sum of all
            logits is finite (if not, see `non_finite_rows`).
        """
        logits = logits.float()
        choice = self._ops.greedy(logits)
        for i, seq in enumerate(seqs):
            if not seq.params.is_plain or seq.rules.restricts:
                choice[i] = self._choose(logits[i], seq)
        return choice

    def forget(self, seq: Sequence) -> None:
        """Drop the generator of a finished sequence."""
        self._generators.pop(seq.request_id, None)

    def _choose(self, logits: Tensor, seq: Sequence) -> Tensor:
        logits = adjust(logits, seq)
        if seq.params.temperature == 0:
            choice = logits.argmax()
        else:
            probs = filtered_probs(logits, seq.params)
            # The method of torch.multinomial for one token, with the sequence's own generator.
            noise = torch.empty(probs.shape).exponential_(generator=self._generator(seq))
            choice = (probs / noise.to(probs.device, non_blocking=True)).argmax()
        if seq.is_limited:
            choice = choice.masked_fill(logits.max() == -math.inf, -1)
        return choice

    def _generator(self, seq: Sequence) -> torch.Generator:
        if seq.request_id not in self._generators:
            generator = torch.Generator()
            if seq.params.seed is None:
                generator.seed()
            else:
                generator.manual_seed(seq.params.seed)
            self._generators[seq.request_id] = generator
        return self._generators[seq.request_id]


def non_finite_rows(logits: Tensor) -> list[int]:
    """Rows of logits [S, V] that contain NaN or infinity."""
    if math.isfinite(logits.sum(dtype=torch.float32).item()):
        return []
    is_finite = torch.isfinite(logits).all(-1).tolist()  # all true if only the sum overflowed
    return [i for i, ok in enumerate(is_finite) if not ok]


NON_FINITE = (
    "the logits are not finite: the weights hold NaN or Inf, or the dtype overflows; try --dtype "
    "float32 and check the checkpoint"
)


def adjust(logits: Tensor, seq: Sequence) -> Tensor:
    """Logits [V] of a sequence's next token after its penalties, bias and limits.

    The order is that of transformers' `generate`: logit_bias (there `sequence_bias`), repetition
    penalty, allowed_token_ids (there `prefix_allowed_tokens_fn`), then min_new_tokens and the
    checkpoint's rules; a token that the checkpoint forces comes whatever the request says.
    frequency_penalty and presence_penalty, which transformers lacks, follow the repetition penalty
    as in vLLM. What is forbidden has -inf.
    """
    params = seq.params
    if params.logit_bias:
        ids, values = zip(*sorted(params.logit_bias), strict=True)
        logits = logits.index_add(0, _indices(ids, logits), _values(values, logits))
    if params.repetition_penalty != 1:
        logits = penalize_repetition(logits, seq.token_ids, params.repetition_penalty)
    if params.frequency_penalty or params.presence_penalty:
        logits = penalize_occurrence(
            logits, seq.output_ids, params.frequency_penalty, params.presence_penalty
        )
    if params.allowed_token_ids:
        logits = keep_only(logits, params.allowed_token_ids)
    if seq.rules.restricts or params.min_new_tokens:
        logits = restrict(logits, *seq.restrict())
    return logits


def penalize_repetition(logits: Tensor, token_ids: list[int], penalty: float) -> Tensor:
    """Divide the positive and multiply the negative logits [V] of `token_ids` by the penalty.

    Source: CTRL, arXiv:1909.05858; HF RepetitionPenaltyLogitsProcessor.
    """
    ids = torch.tensor(sorted(set(token_ids))).to(logits.device, non_blocking=True)
    values = logits[ids]
    values = torch.where(values < 0, values * penalty, values / penalty)
    return logits.index_copy(0, ids, values.nan_to_num())  # extreme penalties overflow


def penalize_occurrence(
    logits: Tensor, output_ids: Iterable[int], frequency: float, presence: float
) -> Tensor:
    """Subtract from the logits [V] of generated tokens `frequency` per occurrence, and `presence`.

    Source: OpenAI, "Frequency and presence penalties"; the prompt does not count.
    """
    counts = Counter(output_ids)
    values = [-frequency * counts[i] - presence for i in sorted(counts)]
    return logits.index_add(0, _indices(counts, logits), _values(values, logits))


def restrict(logits: Tensor, forced: Seq[int], banned: Iterable[int]) -> Tensor:
    """Logits [V] that allow only the tokens `forced` (if any), and none of `banned`.

    Source: HF ForcedEOSTokenLogitsProcessor, SuppressTokensLogitsProcessor.
    """
    if forced:
        return torch.full_like(logits, -math.inf).index_fill(0, _indices(forced, logits), 0)
    return logits.index_fill(0, _indices(banned, logits), -math.inf)


def keep_only(logits: Tensor, allowed: Seq[int]) -> Tensor:
    """Logits [V] with -inf for all tokens but `allowed`.

    Source: HF PrefixConstrainedLogitsProcessor.
    """
    kept = _indices(allowed, logits)
    return torch.full_like(logits, -math.inf).index_copy(0, kept, logits[kept])


def _indices(token_ids: Iterable[int], logits: Tensor) -> Tensor:
    """The ids within the vocabulary, sorted, as a tensor on the device of `logits`."""
    valid_ids = sorted(i for i in token_ids if 0 <= i < logits.shape[-1])
    return torch.tensor(valid_ids, dtype=torch.int64).to(logits.device, non_blocking=True)


def _values(values: Iterable[float], logits: Tensor) -> Tensor:
    """The values as a tensor of the dtype and on the device of `logits`."""
    return torch.tensor(list(values), dtype=logits.dtype).to(logits.device, non_blocking=True)


def filtered_probs(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [V] after temperature, top_k, top_p and min_p; excluded tokens get 0.

    The order is that of transformers' `generate`.
    """
    # Subtracting the maximum and bounding the divisor keep tiny and huge temperatures finite.
    logits = (logits - logits.max()) / min(max(params.temperature, 1e-30), 1e30)
    if 0 < params.top_k < logits.shape[-1]:
        smallest = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if params.top_p < 1:
        values, order = logits.sort(descending=True)
        probs = values.softmax(-1)
        outside = probs.cumsum(-1) - probs >= params.top_p  # higher-ranked tokens reach top_p
        logits = logits.masked_fill(outside.scatter(0, order, outside), -math.inf)
    probs = logits.softmax(-1)
    if params.min_p:
        # Source: arXiv:2407.01082; HF MinPLogitsWarper.
        logits = logits.masked_fill(probs < params.min_p * probs.max(), -math.inf)
        probs = logits.softmax(-1)
    return probs


def token_logprobs(
    logits: Tensor, token_ids: list[int], num_top: int, extra_ids: Seq[int] = ()
) -> list[TokenLogprobs]:
    """Log-probabilities of `token_ids`, of the `num_top` likeliest tokens and of `extra_ids`.

    Args:
        logits: [S, V]; the softmax is fp32 over the raw logits, before any filter.
        token_ids: S ids.
        num_top: number of likeliest tokens in `top`.
        extra_ids: tokens that are always in `top`.
    """
    logprobs = logits.float().log_softmax(-1)
    ids = torch.tensor(token_ids, device=logits.device).unsqueeze(-1)
    chosen = logprobs.gather(-1, ids).squeeze(-1).tolist()
    tops: list[dict[int, float]] = [{} for _ in token_ids]
    if num_top:
        values, indices = logprobs.topk(min(num_top, logprobs.shape[-1]))
        rows = zip(indices.tolist(), values.tolist(), strict=True)
        tops = [dict(zip(i, v, strict=True)) for i, v in rows]
    if extra_ids:
        for top, values in zip(tops, logprobs[:, list(extra_ids)].tolist(), strict=True):
            top.update(zip(extra_ids, values, strict=True))
    return [TokenLogprobs(t, p, top) for t, p, top in zip(token_ids, chosen, tops, strict=True)]
