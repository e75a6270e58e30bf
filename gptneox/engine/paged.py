# SPDX-License-Identifier: Apache-2.0
"""The paged engine: requests in, text out, one step at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gptneox.config.model import ModelConfig
from gptneox.config.settings import EngineSection
from gptneox.devices.device import Device
from gptneox.engine.block_manager import BlockManager
from gptneox.engine.detokenizer import Detokenizer, extend
from gptneox.engine.generation_config import NO_RULES, GenerationRules
from gptneox.engine.opening import open_checkpoint
from gptneox.engine.runner import ModelRunner
from gptneox.engine.scheduler import Scheduled, Scheduler
from gptneox.engine.sequence import (
    InvalidParameter,
    SamplingParams,
    Sequence,
    TokenLogprobs,
    check_vocabulary,
)
from gptneox.kv_cache import PagedKVCache
from gptneox.model import GPTNeoX
from gptneox.parallel import TensorParallelGroup
from gptneox.weights.load import load_model

logger = logging.getLogger(__name__)


@dataclass
class RequestOutput:
    """What one step added to a request; when `finished`, everything there is."""

    request_id: int
    new_text: str
    new_token_ids: list[int]
    finished: bool = False
    finish_reason: str = ""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass
class StepStats:
    """One step: what it computed and how long it took."""

    seconds: float
    num_prefill_tokens: int
    num_decode_tokens: int
    num_context_tokens: int  # cached tokens that attention read
    prepare_s: float = 0.0  # of `seconds`: before the model; 0 unless the runner measures
    forward_s: float = 0.0  # of `seconds`: the model, logits included; 0 likewise


@dataclass
class EngineStats:
    """Sums over all steps. A step with any prompt token counts as prefill."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_decode_steps: int = 0
    num_decode_context_tokens: int = 0
    num_output_tokens: int = 0
    steps: list[StepStats] | None = None  # every single step, when a list is given

    def add(self, step: StepStats, num_sampled: int) -> None:
        """Account for one step."""
        self.num_output_tokens += num_sampled
        if step.num_prefill_tokens:
            self.prefill_s += step.seconds
            self.num_prefill_tokens += step.num_prefill_tokens
        else:
            self.decode_s += step.seconds
            self.num_decode_tokens += step.num_decode_tokens
            self.num_decode_steps += 1
            self.num_decode_context_tokens += step.num_context_tokens
        if self.steps is not None:
            self.steps.append(step)


@dataclass
class _Request:
    """A sequence with the text it becomes."""

    seq: Sequence
    detokenizer: Detokenizer | None
    stop_ids: frozenset[int]
    started: float = 0.0  # perf_counter of its first step


class PagedEngine:
    """Continuous batching over a paged cache.

    `add_request` checks and queues, `step` computes, `abort` cancels between steps. Every rank
    of a tensor-parallel run owns one and calls the same methods in the same order.
    """

    def __init__(
        self,
        model: GPTNeoX,
        settings: EngineSection,
        dtype: torch.dtype,
        *,
        tokenizer: Any = None,
        rules: GenerationRules = NO_RULES,
    ) -> None:
        """Make an engine around a loaded model; `from_pretrained` does all of it.

        Raises:
            RuntimeError: the memory holds not even one block.
        """
        self.model, self.settings, self.tokenizer = model, settings, tokenizer
        self.rules = rules
        self.eos_token_ids = end_of_text(self.rules, tokenizer)
        self.max_positions = model.num_positions
        self.dtype = dtype
        config, ranks = model.config, model.group.world_size
        free = model.device.memory().free
        block_bytes = model.size.token_bytes * settings.block_size
        num_blocks = int(
            model.group.broadcast_object(count_blocks(settings, config, block_bytes, free))
        )
        check_blocks(num_blocks, settings, block_bytes, free)
        cache = PagedKVCache(
            model.ops,
            config.num_layers,
            num_blocks,
            settings.block_size,
            config.num_heads // ranks,
            config.head_dim,
            model.size.kv_format,
        )
        self.block_manager = BlockManager(
            num_blocks, settings.block_size, settings.enable_prefix_caching
        )
        self.scheduler = Scheduler(
            self.block_manager,
            max_batch_size=settings.max_batch_size,
            prefill_budget=settings.prefill_budget,
            max_prefill_batch_size=settings.max_prefill_batch_size,
            enable_chunked_prefill=settings.enable_chunked_prefill,
        )
        self.runner = ModelRunner(model, cache)
        self.stats = EngineStats()
        self._requests: dict[int, _Request] = {}
        self._next_id = 0

    @classmethod
    def from_pretrained(
        cls,
        model_path: Path,
        settings: EngineSection,
        device: Device,
        *,
        dtype: str = "auto",
        group: TensorParallelGroup | None = None,
        with_tokenizer: bool = True,
        trust_remote_code: bool = False,
        show_progress: bool = False,
    ) -> PagedEngine:
        """Load a checkpoint directory.

        Raises:
            ValueError, FileNotFoundError: the files are wrong; see `ModelConfig`, `Checkpoint`
                and `load_tokenizer`.
            RuntimeError: not enough memory.
        """
        group = group or TensorParallelGroup()
        opened = open_checkpoint(
            model_path,
            device,
            group,
            dtype=dtype,
            with_tokenizer=with_tokenizer,
            trust_remote_code=trust_remote_code,
        )
        for notice in opened.notices:
            logger.warning(notice)
        positions = settings.max_position_embeddings
        model = GPTNeoX(opened.config, device, group, positions, settings.graphs)
        load_model(model, opened.path, opened.dtype, show_progress=show_progress)
        return cls(model, settings, opened.dtype, tokenizer=opened.tokenizer, rules=opened.rules)

    # -- requests --------------------------------------------------------------------------------

    def add_request(self, prompt_ids: Seq[int], params: SamplingParams) -> int:
        """Check and queue a request; returns its id.

        Raises:
            InvalidParameter: an empty prompt, an id out of the vocabulary, more tokens than
                positions or than the whole cache holds, a stop string without a tokenizer.
        """
        self._check(prompt_ids, params)
        eos = () if params.ignore_eos else self.eos_token_ids
        seq = Sequence.create(self._next_id, prompt_ids, params, self.rules, eos)
        self._next_id += 1
        detokenizer = None
        if self.tokenizer:
            detokenizer = Detokenizer(self.tokenizer, params.stop + self.rules.stop_strings)
        stop_ids = frozenset((*params.stop_token_ids, *eos))
        self._requests[seq.request_id] = _Request(seq, detokenizer, stop_ids)
        self.scheduler.add(seq)
        return seq.request_id

    def _check(self, prompt_ids: Seq[int], params: SamplingParams) -> None:
        check_request(prompt_ids, params, self.model.config.vocab_size, self.max_positions,
            self.block_manager, has_tokenizer=self.tokenizer is not None)  # fmt: skip

    def abort(self, request_id: int) -> None:
        """Forget a request, wherever it is; unknown and finished ones are fine."""
        if request := self._requests.pop(request_id, None):
            self._end(request.seq, "abort")

    @property
    def has_work(self) -> bool:
        """Whether `step` would compute something."""
        return self.scheduler.has_work

    def step(self) -> list[RequestOutput]:
        """Compute one step; returns what it added, one entry per request that moved on.

        Raises:
            NonFiniteLogits: see `Sampler`.
        """
        scheduled = self.scheduler.schedule()
        device = self.model.device
        start = time.perf_counter()
        token_ids = self.runner.run(scheduled)
        device.synchronize()
        self._account(scheduled, len(token_ids), time.perf_counter() - start)
        samples = [item.samples for item in scheduled]
        self.scheduler.computed(scheduled)
        late = self._late(scheduled, start)
        remaining = iter(token_ids)
        outputs = []
        for item, samples_now in zip(scheduled, samples, strict=True):
            if samples_now:
                wanted = item.seq.params.max_new_tokens > 0
                new = [next(remaining)] if wanted else []
                request = self._requests[item.seq.request_id]
                outputs.append(self._advance(request, new, late=item.seq.request_id in late))
        return outputs

    def _late(self, scheduled: list[Scheduled], now: float) -> set[int]:
        """Requests whose time is over; the clock of rank 0 counts."""
        if self.rules.max_time is None:
            return set()
        requests = [self._requests[item.seq.request_id] for item in scheduled]
        for request in requests:
            request.started = request.started or now
        now, limit = time.perf_counter(), self.rules.max_time
        late = {r.seq.request_id for r in requests if now - r.started > limit}
        return set(self.model.group.broadcast_object(late))

    def generate(
        self, prompts: Seq[Seq[int]], params: SamplingParams | Seq[SamplingParams]
    ) -> list[RequestOutput]:
        """Run prompts to their end; returns the finished outputs in the order of the prompts.

        All requests are checked before the first is computed.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        for prompt, p in zip(prompts, each, strict=True):
            self._check(prompt, p)
        ids = [self.add_request(prompt, p) for prompt, p in zip(prompts, each, strict=True)]
        try:
            finished = {out.request_id: out for out in self.stream() if out.finished}
        except BaseException:
            for request_id in ids:
                self.abort(request_id)
            raise
        return [finished[i] for i in ids]

    def stream(self) -> Iterator[RequestOutput]:
        """Step until nothing is left; yields every output as it comes."""
        while self.has_work:
            yield from self.step()

    def reset_stats(self, *, keep_steps: bool = False) -> None:
        """Start counting anew; `keep_steps` records every single step."""
        self.stats = EngineStats(steps=[] if keep_steps else None)

    # -- inside a step ---------------------------------------------------------------------------

    def _advance(self, request: _Request, new: list[int], *, late: bool) -> RequestOutput:
        """Add new tokens to a request and end it where it has to end."""
        seq = request.seq
        seq.token_ids += new
        full = late or seq.num_output_tokens >= seq.params.max_new_tokens
        text, reason = extend(request.detokenizer, new, request.stop_ids, full=full)
        output = RequestOutput(seq.request_id, text, new)
        if reason:
            output.finished, output.finish_reason = True, reason
            output.text = request.detokenizer.text if request.detokenizer else ""
            output.token_ids = seq.output_ids
            output.logprobs, output.prompt_logprobs = seq.logprobs, seq.prompt_logprobs
            del self._requests[seq.request_id]
            self._end(seq, reason)
        return output

    def _end(self, seq: Sequence, reason: str) -> None:
        self.scheduler.finish(seq, reason)
        self.runner.sampler.forget(seq)

    def _account(self, scheduled: list[Scheduled], num_sampled: int, seconds: float) -> None:
        prompt = [s for s in scheduled if s.seq.num_computed_tokens < s.seq.num_prompt_tokens]
        num_prefill = sum(s.num_tokens for s in prompt)
        num_tokens = sum(s.num_tokens for s in scheduled)
        context = sum(s.seq.num_computed_tokens + s.num_tokens for s in scheduled)
        step = StepStats(seconds, num_prefill, num_tokens - num_prefill, context)
        if self.runner.measure:
            step.prepare_s, step.forward_s = self.runner.prepare_s, self.runner.forward_s
        self.stats.add(step, num_sampled)


def affordable_blocks(settings: EngineSection, block_bytes: int, free: int) -> int:
    """Blocks of the KV cache that `free` bytes hold; below 1: not even one."""
    room = free - int(settings.reserved_memory_gb * 2**30)
    return int(room * settings.memory_fraction) // block_bytes


def count_blocks(settings: EngineSection, config: ModelConfig, block_bytes: int, free: int) -> int:
    """Blocks of the KV cache: as many as asked for, else what memory holds and the batch can use.

    Args:
        settings: of the engine.
        config: the architecture.
        block_bytes: of K and V of one block on one rank, over all layers.
        free: bytes that are free when the weights are loaded.
    """
    if settings.num_blocks:
        return settings.num_blocks
    affordable = affordable_blocks(settings, block_bytes, free)
    positions = config.positions(settings.max_position_embeddings)
    per_request = -(-positions // settings.block_size)
    # One request more than runs at once, so that finished prefixes stay for a while.
    return min(affordable, per_request * (settings.max_batch_size + 1))


def check_blocks(num_blocks: int, settings: EngineSection, block_bytes: int, free: int) -> None:
    """Raise RuntimeError for a KV cache without a block, or one that the memory cannot hold."""
    if num_blocks < 1:
        room = max(free - int(settings.reserved_memory_gb * 2**30), 0)
        raise RuntimeError(
            f"no memory for the KV cache: one block takes {block_bytes / 2**20:.1f} MiB, "
            f"{room / 2**20:.1f} MiB are free beyond the reserved "
            f"{settings.reserved_memory_gb} GiB; lower --reserved_memory_gb or --block_size"
        )
    if settings.num_blocks and num_blocks * block_bytes > free:
        raise RuntimeError(
            f"not enough memory for --num_blocks {num_blocks}: they take "
            f"{num_blocks * block_bytes / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; at most "
            f"{max(free, 0) // block_bytes} fit"
        )


def check_request(
    prompt_ids: Seq[int],
    params: SamplingParams,
    vocab_size: int,
    max_positions: int,
    blocks: BlockManager,
    *,
    has_tokenizer: bool,
) -> None:
    """Raise InvalidParameter for a request that can never run."""
    if not len(prompt_ids):
        raise InvalidParameter(
            "prompt", "", "at least one token (--input_ids 0 starts from nothing)"
        )
    check_vocabulary("prompt", prompt_ids, vocab_size)
    check_vocabulary("logprob_token_ids", params.logprob_token_ids, vocab_size)
    check_vocabulary("stop_token_ids", params.stop_token_ids, vocab_size)
    num_tokens = len(prompt_ids) + params.max_new_tokens
    if num_tokens > max_positions:
        raise InvalidParameter(
            "max_new_tokens",
            params.max_new_tokens,
            f"prompt ({len(prompt_ids)} tokens) + new tokens within the model's "
            f"{max_positions} positions, so at most "
            f"{max(0, max_positions - len(prompt_ids))},",
        )
    needed = blocks.blocks_for(num_tokens)
    if needed > blocks.num_blocks:
        raise InvalidParameter(
            "prompt",
            f"{len(prompt_ids)} tokens + {params.max_new_tokens} new",
            f"a request of at most {blocks.num_blocks} KV-cache blocks, "
            f"not {needed}, (raise --num_blocks)",
        )
    if params.stop and not has_tokenizer:
        raise InvalidParameter("stop", list(params.stop), "no stop string without a tokenizer")


def end_of_text(rules: GenerationRules, tokenizer: Any) -> tuple[int, ...]:
    """End-of-text ids as transformers' `generate` takes them, which does not ask the tokenizer.

    The tokenizer's counts only where generation_config.json is absent and config.json silent.
    """
    if rules.eos_token_ids is not None:
        return rules.eos_token_ids
    named = None if tokenizer is None else tokenizer.eos_token_id
    return () if named is None else (named,)
