# SPDX-License-Identifier: Apache-2.0
"""A stopwatch around one `generate` on either path, and the least work that it can be.

Every moment between start and end belongs to exactly one part, so the parts add up to the whole.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from gptneox.config.model import ModelConfig
from gptneox.engine.api import Engine, StepStats, raise_failure
from gptneox.engine.detokenizer import decode
from gptneox.engine.sequence import SamplingParams


@dataclass
class StepTime:
    """One forward and what surrounds it, in seconds.

    A total is always measured; the split of it only when the device was waited for.
    """

    is_prefill: bool
    total_s: float
    pre_s: float = 0.0  # preparing the inputs
    forward_s: float = 0.0  # the model, logits included
    post_s: float = 0.0  # choosing the next token, stop checks, bookkeeping


@dataclass
class Timing:
    """One run: set-up, steps, detokenising."""

    set_up_s: float
    steps: list[StepTime]
    detokenize_s: float
    has_split: bool
    token_ids: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def generate_s(self) -> float:
        """Without detokenising."""
        return self.set_up_s + sum(step.total_s for step in self.steps)

    @property
    def response_s(self) -> float:
        """From the prompts to the text."""
        return self.generate_s + self.detokenize_s

    @property
    def prefill_steps(self) -> list[StepTime]:
        """Steps that computed prompt tokens."""
        return [step for step in self.steps if step.is_prefill]

    @property
    def decode_steps(self) -> list[StepTime]:
        """Steps that computed one new token per row."""
        return [step for step in self.steps if not step.is_prefill]

    def parts_ms(self) -> dict[str, float]:
        """Where the response time went; the values add up to it."""
        parts = {"set_up": self.set_up_s}
        for name, steps in (("prefill", self.prefill_steps), ("decode", self.decode_steps)):
            if self.has_split:
                parts[f"{name}_pre"] = sum(s.pre_s for s in steps)
                parts[f"{name}_forward"] = sum(s.forward_s for s in steps)
                parts[f"{name}_post"] = sum(s.post_s for s in steps)
            else:
                parts[name] = sum(s.total_s for s in steps)
        parts["detokenize"] = self.detokenize_s
        return {name: seconds * 1e3 for name, seconds in parts.items()}


class Stopwatch:
    """Runs a batch on an engine and times it. Every rank calls it alike."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.path, self.tokenizer = engine, engine.name, engine.tokenizer
        self.config, self.dtype, self.size = engine.model.config, engine.dtype, engine.model.size
        self.device, self.group = engine.device, engine.group
        self.max_positions = engine.max_positions

    def run(
        self,
        prompts: Seq[Seq[int]],
        num_new: int,
        *,
        split: bool = False,
        detokenize: bool = True,
        ignore_eos: bool = True,
    ) -> Timing:
        """Generate `num_new` greedy tokens for each prompt.

        Args:
            prompts: token ids.
            num_new: new tokens per prompt.
            split: wait for the device around each forward, to tell it from what surrounds it.
            detokenize: turn the answers into text, as part of the response time; at the end, in
                one go.
            ignore_eos: go on after the end-of-text token.

        Raises:
            ValueError: the prompts do not fit the model or the cache.
            RequestFailed: the model's output is NaN or infinite.
        """
        engine = self.engine
        engine.check_batch([len(prompt) for prompt in prompts], num_new)
        params = SamplingParams(max_new_tokens=num_new, ignore_eos=ignore_eos, detokenize=False)
        engine.reset_stats(keep_steps=True, measure=split)
        self.group.barrier()
        self.device.synchronize()
        start = time.perf_counter()
        completions = engine.generate(prompts, params)
        self.device.synchronize()
        end = time.perf_counter()
        raise_failure(completions)
        token_ids = [completion.token_ids for completion in completions]
        texts = _texts(self.tokenizer, token_ids) if detokenize else []
        detokenize_s = time.perf_counter() - end if detokenize else 0.0
        steps = _step_times(engine.stats.steps or [], end, split=split)
        set_up_s = end - start - sum(step.total_s for step in steps)
        return Timing(set_up_s, steps, detokenize_s, split, token_ids, texts)


def _step_times(stats: Seq[StepStats], end: float, *, split: bool) -> list[StepTime]:
    """Each step from its beginning to that of the next one; the last one to `end`."""
    times = []
    for step, next_start in zip(stats, [*(s.start for s in stats[1:]), end], strict=True):
        time_ = StepTime(bool(step.num_prefill_tokens), next_start - step.start)
        if split:
            time_.pre_s, time_.forward_s = step.prepare_s, step.forward_s
            time_.post_s = time_.total_s - step.prepare_s - step.forward_s
        times.append(time_)
    return times


def _texts(tokenizer: Any, token_ids: Seq[Seq[int]]) -> list[str]:
    return [decode(tokenizer, list(ids)) for ids in token_ids] if tokenizer else []


def random_prompts(
    stopwatch: Stopwatch, batch_size: int, input_len: int, seed: int = 1
) -> list[list[int]]:
    """Uniformly random ids that the tokenizer knows, the same on every rank."""
    high = stopwatch.config.vocab_size
    if stopwatch.tokenizer is not None:
        high = min(high, len(stopwatch.tokenizer))
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = torch.randint(
        high, (batch_size, input_len), generator=generator
    ).tolist()
    return rows


def max_over_ranks(stopwatch: Stopwatch, values: Seq[float]) -> list[float]:
    """Each value's maximum over the ranks; one rank's own values stay as they are."""
    if stopwatch.group.world_size == 1:
        return list(values)
    dtype = torch.float64 if stopwatch.device.torch_device.type == "cpu" else torch.float32
    tensor = torch.tensor(values, dtype=dtype, device=stopwatch.device.torch_device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [float(value) for value in tensor.tolist()]


# -- the least work ------------------------------------------------------------------------------
# B rows, S tokens of context, L layers, h hidden size, V vocabulary, P_d parameters that a decode
# step reads. One multiply-add is two operations. Bytes: `ModelSize`.


def prefill_flops(config: ModelConfig, batch_size: int, num_tokens: int) -> float:
    """(2 (P_d - V h) S + 2 L h S^2 + 2 V h) B: the head is needed for the last token only."""
    hidden, head = config.hidden_size, config.vocab_size * config.hidden_size
    body = 2 * (config.num_decode_parameters - head) * num_tokens
    attention = 2 * config.num_layers * hidden * num_tokens**2
    return float(batch_size * (body + attention + 2 * head))


def decode_flops(config: ModelConfig, batch_size: int, context_len: float) -> float:
    """(2 P_d + 4 L h S) B: one new token per row, which attends to S cached ones."""
    attention = 4 * config.num_layers * config.hidden_size * context_len
    return batch_size * (2 * config.num_decode_parameters + attention)
