# SPDX-License-Identifier: Apache-2.0
"""Times one `generate` on either path, and counts the least work that it needs.

The measured parts do not overlap and leave no gap, so they add up to the total.
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
from gptneox.model import GPTNeoX


@dataclass
class StepTime:
    """One step, in seconds.

    `total_s` is always measured; its parts only if the run synchronized with the device (`split`).
    """

    is_prefill: bool
    total_s: float
    pre_s: float = 0.0  # input preparation
    forward_s: float = 0.0  # the model, logits included
    post_s: float = 0.0  # sampling, stop checks, bookkeeping


@dataclass
class Timing:
    """One run: set-up, steps, detokenization."""

    set_up_s: float
    steps: list[StepTime]
    detokenize_s: float
    has_split: bool
    token_ids: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def generate_s(self) -> float:
        """Time without detokenization."""
        return self.set_up_s + sum(step.total_s for step in self.steps)

    @property
    def response_s(self) -> float:
        """Time from the prompts to the text."""
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
        """The parts of the response time; they add up to it."""
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
    """Runs a batch on an engine and times it. Every rank must make the same calls."""

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
            split: synchronize with the device around each forward pass, to time it separately.
            detokenize: decode the answers at the end, as part of the response time.
            ignore_eos: continue after the end-of-text token.

        Raises:
            ValueError: the prompts do not fit the model or the cache.
            RequestFailed: the model's output is NaN or infinite.
        """
        engine = self.engine
        engine.check_batch([len(prompt) for prompt in prompts], num_new)
        params = SamplingParams(
            max_new_tokens=num_new, ignore_eos=ignore_eos, detokenize=False, obey_rules=False
        )
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
    """Step times. A step lasts until the next one begins, the last one until `end`."""
    step_times = []
    for step, next_start in zip(stats, [*(s.start for s in stats[1:]), end], strict=True):
        step_time = StepTime(bool(step.num_prefill_tokens), next_start - step.start)
        if split:
            step_time.pre_s, step_time.forward_s = step.prepare_s, step.forward_s
            step_time.post_s = step_time.total_s - step.prepare_s - step.forward_s
        step_times.append(step_time)
    return step_times


def _texts(tokenizer: Any, token_ids: Seq[Seq[int]]) -> list[str]:
    return [decode(tokenizer, list(ids)) for ids in token_ids] if tokenizer else []


def random_prompts(
    stopwatch: Stopwatch, batch_size: int, input_len: int, seed: int = 1
) -> list[list[int]]:
    """Uniformly random ids of the tokenizer's vocabulary, the same on every rank."""
    high = stopwatch.config.vocab_size
    if stopwatch.tokenizer is not None:
        high = min(high, len(stopwatch.tokenizer))
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = torch.randint(
        high, (batch_size, input_len), generator=generator
    ).tolist()
    return rows


def max_over_ranks(stopwatch: Stopwatch, values: Seq[float]) -> list[float]:
    """The maximum of each value over the ranks."""
    if stopwatch.group.world_size == 1:
        return list(values)
    dtype = torch.float64 if stopwatch.device.torch_device.type == "cpu" else torch.float32
    tensor = torch.tensor(values, dtype=dtype, device=stopwatch.device.torch_device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [float(value) for value in tensor.tolist()]


# -- limits --------------------------------------------------------------------------------------


def read_limit(model: GPTNeoX) -> tuple[float, str]:
    """The measured bandwidth that bounds decoding, in bytes per second, and what it is of.

    Every step reads the same weights, which come from the last-level cache where they fit it.
    """
    if fits_cache(model):
        num_bytes = max(int(model.size.decode_weight_bytes), 1 << 22)
        return model.device.measure_bandwidth(num_bytes), "cache"
    return model.device.measure_bandwidth(), "memory"


def fits_cache(model: GPTNeoX) -> bool:
    """Whether the last-level cache holds what all ranks read for a decode step."""
    num_bytes = model.size.decode_weight_bytes * model.group.world_size
    return num_bytes <= model.device.cache_bytes()


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
