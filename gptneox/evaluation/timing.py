# SPDX-License-Identifier: Apache-2.0
"""A stopwatch around one `generate` on either path, and the least work that it can be.

Every moment between start and end belongs to exactly one part, so the parts add up to the whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Protocol

import torch
import torch.distributed as dist

from gptneox.config.model import ModelConfig
from gptneox.devices.device import Device
from gptneox.engine.detokenizer import decode
from gptneox.engine.generate import GenerateEngine
from gptneox.engine.paged import PagedEngine
from gptneox.engine.sequence import SamplingParams
from gptneox.parallel import TensorParallelGroup
from gptneox.weights.size import ModelSize


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


class Stopwatch(Protocol):
    """Runs a batch on one path and times it. Every rank calls it alike."""

    path: str  # "paged" | "flash"
    config: ModelConfig
    device: Device
    group: TensorParallelGroup
    dtype: torch.dtype
    size: ModelSize
    max_positions: int
    tokenizer: Any

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
            detokenize: turn the answers into text, as part of the response time.
            ignore_eos: go on after the end-of-text token.

        Raises:
            ValueError: the prompts do not fit the model or the cache.
        """
        ...


class PagedStopwatch:
    """Times the paged engine, step by step."""

    path = "paged"

    def __init__(self, engine: PagedEngine) -> None:
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.config, self.dtype, self.size = engine.model.config, engine.dtype, engine.model.size
        self.device, self.group = engine.model.device, engine.model.group
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
        """See `Stopwatch`."""
        self._check_room(prompts, num_new)
        engine, params = self.engine, SamplingParams(max_new_tokens=num_new, ignore_eos=ignore_eos)
        engine.reset_stats(keep_steps=True)
        ids: list[int] = []
        steps: list[StepTime] = []
        answers: dict[int, list[int]] = {}
        engine.tokenizer, engine.runner.measure = None, split  # text is made at the end, in one go
        try:
            self.group.barrier()
            self.device.synchronize()
            start = last = time.perf_counter()
            for prompt in prompts:
                ids.append(engine.add_request(prompt, params))
            set_up_s = -start + (last := time.perf_counter())
            while engine.has_work:
                outputs = engine.step()
                now = time.perf_counter()
                steps.append(self._step(now - last, split, sampled=bool(outputs)))
                last = now
                answers.update((o.request_id, o.token_ids) for o in outputs if o.finished)
        finally:
            engine.tokenizer, engine.runner.measure = self.tokenizer, False
            for request_id in ids:  # after an error nothing may stay behind
                engine.abort(request_id)
        token_ids = [answers[i] for i in ids]
        texts = _texts(self.tokenizer, token_ids) if detokenize else []
        detokenize_s = time.perf_counter() - last if detokenize else 0.0
        return Timing(set_up_s, steps, detokenize_s, split, token_ids, texts)

    def _step(self, total_s: float, split: bool, *, sampled: bool) -> StepTime:
        assert self.engine.stats.steps is not None, "step times were not kept"
        stats = self.engine.stats.steps[-1]
        step = StepTime(bool(stats.num_prefill_tokens), total_s)
        if split and sampled:
            step.pre_s, step.forward_s = stats.prepare_s, stats.forward_s
            step.post_s = total_s - step.pre_s - step.forward_s
        elif split:  # a part of a prompt, after which nothing is waited for
            step.forward_s = total_s
        return step

    def _check_room(self, prompts: Seq[Seq[int]], num_new: int) -> None:
        """All rows must run at once, or the figures would be those of a smaller batch."""
        manager, limit = self.engine.block_manager, self.engine.settings.max_batch_size
        if len(prompts) > limit:
            raise ValueError(
                f"{len(prompts)} rows, but the engine runs {limit} at once; raise max_batch_size"
            )
        longest = max(len(p) for p in prompts) + num_new
        if longest > self.max_positions:
            raise ValueError(
                f"{longest} positions are needed, the model has {self.max_positions}; shorten the "
                "prompt or the output"
            )
        needed = blocks_needed([len(p) for p in prompts], num_new, manager.block_size)
        if needed > manager.num_blocks:
            raise ValueError(
                f"out of memory: {len(prompts)} rows of up to {max(map(len, prompts))} + {num_new} "
                f"tokens need {needed} KV-cache blocks, {manager.num_blocks} are there"
            )


def blocks_needed(prompt_lens: Seq[int], num_new: int, block_size: int) -> int:
    """KV-cache blocks with which all rows run side by side; the scheduler keeps spare ones."""
    spare = len(prompt_lens) - 1
    return spare + sum(-(-(n + num_new) // block_size) for n in prompt_lens)


class FlashStopwatch:
    """Times `generate` of transformers through hooks on the model."""

    path = "flash"

    def __init__(self, engine: GenerateEngine) -> None:
        self.engine, self.tokenizer = engine, engine.tokenizer
        model = engine.model.model
        self.config, self.device, self.group = engine.config, model.device, model.group
        self.size = model.size
        self.dtype = model.gpt_neox.embed_in.weight.dtype
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
        """See `Stopwatch`."""
        engine = self.engine
        engine.tokenizer = None
        try:
            with self._stamps(split) as stamps:
                self.group.barrier()
                self.device.synchronize()
                start = time.perf_counter()
                outputs = engine.generate(
                    prompts, max_new_tokens=num_new, do_sample=False, ignore_eos=ignore_eos
                )
                self.device.synchronize()
                end = time.perf_counter()
        finally:
            engine.tokenizer = self.tokenizer
        token_ids = [output.token_ids for output in outputs]
        texts = _texts(self.tokenizer, token_ids) if detokenize else []
        detokenize_s = time.perf_counter() - end if detokenize else 0.0
        steps = []
        for i, stamp in enumerate(stamps):
            next_s = stamps[i + 1].prepare if i + 1 < len(stamps) else end
            step = StepTime(i == 0, next_s - stamp.prepare)
            if split:
                step.pre_s = stamp.begin - stamp.prepare
                step.forward_s = stamp.end - stamp.begin
                step.post_s = next_s - stamp.end
            steps.append(step)
        set_up_s = stamps[0].prepare - start
        return Timing(set_up_s, steps, detokenize_s, split, token_ids, texts)

    @contextmanager
    def _stamps(self, split: bool) -> Iterator[list[_Stamp]]:
        """Within, each loop of `generate` adds the moments it passes."""
        model, synchronize = self.engine.model, self.device.synchronize
        stamps: list[_Stamp] = []
        prepare_inputs = model.prepare_inputs_for_generation

        @wraps(prepare_inputs)  # transformers reads its signature
        def prepare(*args: Any, **kwargs: Any) -> Any:
            stamps.append(_Stamp(time.perf_counter()))
            return prepare_inputs(*args, **kwargs)

        def begin(*_: Any) -> None:
            synchronize()
            stamps[-1].begin = time.perf_counter()

        def end(*_: Any) -> None:
            synchronize()
            stamps[-1].end = time.perf_counter()

        model.prepare_inputs_for_generation = prepare  # hides the method of the class
        hooks = []
        if split:
            hooks = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
        try:
            yield stamps
        finally:
            del model.prepare_inputs_for_generation
            for hook in hooks:
                hook.remove()


@dataclass
class _Stamp:
    """Moments of one loop."""

    prepare: float
    begin: float = 0.0
    end: float = 0.0


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
