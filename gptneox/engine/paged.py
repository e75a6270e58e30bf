# SPDX-License-Identifier: Apache-2.0
"""The paged engine: continuous batching over a paged KV cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from gptneox.config.model import ModelConfig
from gptneox.config.settings import EngineSection
from gptneox.engine.api import Completion, Engine, NextToken, StepStats, raise_failure
from gptneox.engine.block_manager import BlockManager
from gptneox.engine.detokenizer import Detokenizer, append_until_end, end_ids
from gptneox.engine.generation_config import NO_RULES
from gptneox.engine.runner import ModelRunner, StepResult
from gptneox.engine.scheduler import Scheduled, Scheduler
from gptneox.engine.sequence import InvalidParameter, SamplingParams, Sequence
from gptneox.kv_cache import PagedKVCache


@dataclass
class _Request:
    """A sequence with its detokenizer, the ids that end it, and what its completions report."""

    seq: Sequence
    detokenizer: Detokenizer | None
    ends: dict[int, int | None]
    arrival: float  # perf_counter
    start: float = 0.0  # perf_counter of its first step
    num_cached_tokens: int = 0  # found in the prefix cache at its first step
    prefill_s: float = 0.0  # 0 while the prompt is incomplete
    num_released: int = 0  # new tokens whose text was released


class PagedEngine(Engine):
    """Continuous batching over a paged KV cache.

    `add_request` checks and queues a request, `step` computes one step, `abort` cancels a request
    between steps. `complete` and `generate` run a list of prompts to the end.
    """

    name = "paged"

    def _set_up(self) -> None:
        """Make the KV cache, as large as the settings or the memory say, and what schedules it."""
        model, settings = self.model, self.settings
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
        self._requests: dict[int, _Request] = {}
        self._next_id = 0
        self._undelivered: list[Completion] = []  # of other requests, computed by `complete`

    # -- requests --------------------------------------------------------------------------------

    def check(self, prompt_ids: Seq[int], params: SamplingParams) -> None:
        """Raise InvalidParameter for a request that can never run or never fits the cache."""
        super().check(prompt_ids, params)
        check_fits_cache(len(prompt_ids), params, self.block_manager)

    def add_request(self, prompt_ids: Seq[int], params: SamplingParams) -> int:
        """Check and queue a request; returns its id.

        Raises:
            InvalidParameter: see `check`.
        """
        self.check(prompt_ids, params)
        return self._queue(prompt_ids, params)

    def _queue(self, prompt_ids: Seq[int], params: SamplingParams) -> int:
        """`add_request` for a request that is checked."""
        eos = () if params.ignore_eos else self.eos_token_ids
        rules = self.rules if params.obey_rules else NO_RULES
        seq = Sequence.create(self._next_id, prompt_ids, params, rules, eos)
        self._next_id += 1
        detokenizer = None
        if self.tokenizer and params.detokenize:
            stop = params.stop + rules.stop_strings
            detokenizer = Detokenizer(self.tokenizer, stop, include_stop=params.include_stop)
        ends = end_ids(eos, params.stop_token_ids)
        self._requests[seq.request_id] = _Request(seq, detokenizer, ends, time.perf_counter())
        self.scheduler.add(seq)
        return seq.request_id

    def abort(self, request_id: int) -> None:
        """Cancel a request in any state; unknown or finished requests are ignored."""
        self._undelivered = [c for c in self._undelivered if c.request_id != request_id]
        if request := self._requests.pop(request_id, None):
            self._end(request.seq, "abort")

    @property
    def has_work(self) -> bool:
        """Whether `step` would return or compute something."""
        return bool(self._undelivered) or self.scheduler.has_work

    def step(self) -> list[Completion]:
        """Compute one step; returns one completion per request that advanced.

        Completions that an interleaved `complete` computed for other requests come first.
        """
        computed = self._compute() if self.scheduler.has_work else []
        earlier, self._undelivered = self._undelivered, []
        return earlier + computed

    def stream(self) -> Iterator[Completion]:
        """Step until no request is left; yields each step's completions."""
        while self.has_work:
            yield from self.step()

    def _complete(
        self, prompts: Seq[Seq[int]], params: Seq[SamplingParams]
    ) -> Iterator[tuple[int, Completion]]:
        """See `Engine`. Other requests advance too; `step` returns their completions."""
        pairs = zip(prompts, params, strict=True)
        index = {self._queue(*pair): i for i, pair in enumerate(pairs)}
        waiting = set(index)
        try:
            while waiting:
                completions = self.step()
                self._undelivered = [c for c in completions if c.request_id not in index]
                for completion in completions:
                    if completion.request_id in index:
                        if completion.finished:
                            waiting.remove(completion.request_id)
                        yield index[completion.request_id], completion
                if not self.scheduler.has_work:  # the other requests were aborted
                    waiting.intersection_update(c.request_id for c in self._undelivered)
        finally:
            for request_id in waiting:
                self.abort(request_id)

    def score_next(self, prompts: Seq[Seq[int]], token_ids: Seq[int]) -> list[NextToken]:
        """See `Engine`."""
        return score_by(self.generate, prompts, token_ids)

    def check_batch(self, prompt_lens: Seq[int], num_new: int) -> None:
        """See `Engine`."""
        super().check_batch(prompt_lens, num_new)
        manager = self.block_manager
        needed = blocks_needed(prompt_lens, num_new, manager.block_size)
        if needed > manager.num_blocks:
            raise ValueError(
                f"out of memory: {len(prompt_lens)} rows of up to {max(prompt_lens)} + {num_new} "
                f"tokens need {needed} KV-cache blocks, {manager.num_blocks} are there"
            )

    def describe_cache(self) -> str:
        """See `Engine`."""
        manager = self.block_manager
        return (
            f", {manager.num_blocks} KV-cache blocks of {manager.block_size} tokens in "
            f"{self.model.size.kv_format.name}"
        )

    # -- inside a step ---------------------------------------------------------------------------

    def _compute(self) -> list[Completion]:
        scheduled = self.scheduler.schedule()
        start = time.perf_counter()
        for item in scheduled:
            request = self._requests[item.seq.request_id]
            if not request.start:
                request.start, request.num_cached_tokens = start, item.seq.num_computed_tokens
        result = self.runner.run(scheduled, measure=self.stats.measure)
        self.model.device.synchronize()
        self._account(scheduled, result, start)
        self.scheduler.mark_computed(scheduled)
        late = self._late(scheduled)
        completions = []
        for item, new in zip(scheduled, result.token_ids, strict=True):
            request = self._requests[item.seq.request_id]
            if error := result.failed.get(item.seq.request_id):
                completions.append(self._fail(request, error))
            elif new or item.seq.num_computed_tokens == len(item.seq.token_ids):
                completions.append(self._advance(request, new, late=item.seq.request_id in late))
        return completions

    def _late(self, scheduled: list[Scheduled]) -> set[int]:
        """Ids of the requests over the time limit; rank 0's clock decides, so that ranks agree."""
        limits = {
            item.seq.request_id: limit
            for item in scheduled
            if (limit := item.seq.rules.max_time) is not None
        }
        if not limits:
            return set()
        now = time.perf_counter()
        late = {i for i, limit in limits.items() if now - self._requests[i].start > limit}
        return set(self.model.group.broadcast_object(late))

    def _advance(self, request: _Request, new: list[int], *, late: bool) -> Completion:
        """Append new tokens to a request one by one, and finish it when it ends."""
        seq = request.seq
        room = seq.params.max_new_tokens - seq.num_output_tokens
        room = min(room, len(new)) if late else room
        appended = append_until_end(request.detokenizer, new, request.ends, room)
        new = new[: appended.num_tokens]
        seq.token_ids += new
        completion = self._completion(request, appended.text, new, appended.num_released)
        if appended.reason:
            completion.stop_reason = appended.stop_reason
            if isinstance(appended.stop_reason, str):
                completion.cut_ids = seq.output_ids[request.num_released :]
                completion.cut_logprobs = seq.logprobs[request.num_released :]
            self._finish(request, completion, appended.reason)
        return completion

    def _completion(
        self, request: _Request, text: str, new: list[int], num_released: int
    ) -> Completion:
        """The part of an answer that this step added."""
        seq, first = request.seq, request.num_released
        request.num_released = end = first + num_released
        completion = Completion(
            seq.request_id,
            text,
            new,
            released_ids=seq.token_ids[seq.num_prompt_tokens + first : seq.num_prompt_tokens + end],
            released_logprobs=seq.logprobs[first:end],
            num_cached_tokens=request.num_cached_tokens,
            queued_s=request.start - request.arrival,
        )
        if not request.prefill_s:
            request.prefill_s = time.perf_counter() - request.start
            completion.prompt_logprobs = seq.prompt_logprobs
        completion.prefill_s = request.prefill_s
        return completion

    def _fail(self, request: _Request, error: str) -> Completion:
        """Finish a request without a next token; what was generated before is kept."""
        text, num_released = "", request.seq.num_output_tokens - request.num_released
        if request.detokenizer:
            text = request.detokenizer.add([], last=True)
            num_released = request.detokenizer.num_released - request.num_released
        completion = self._completion(request, text, [], num_released)
        completion.error = error
        self._finish(request, completion, "error")
        return completion

    def _finish(self, request: _Request, completion: Completion, reason: str) -> None:
        seq = request.seq
        completion.finish_reason = reason
        completion.text = request.detokenizer.text if request.detokenizer else ""
        completion.token_ids = seq.output_ids
        completion.logprobs = seq.logprobs[: seq.num_output_tokens]
        completion.prompt_logprobs = seq.prompt_logprobs
        del self._requests[seq.request_id]
        self._end(seq, reason)

    def _end(self, seq: Sequence, reason: str) -> None:
        self.scheduler.finish(seq, reason)
        self.runner.sampler.forget(seq)

    def _account(self, scheduled: list[Scheduled], result: StepResult, start: float) -> None:
        prompt = [s for s in scheduled if s.seq.num_computed_tokens < s.seq.num_prompt_tokens]
        num_prefill = sum(s.num_tokens for s in prompt)
        step = StepStats(
            start=start,
            seconds=time.perf_counter() - start,
            num_prefill_tokens=num_prefill,
            num_decode_tokens=sum(s.num_tokens for s in scheduled) - num_prefill,
            num_context_tokens=sum(s.seq.num_computed_tokens + s.num_tokens for s in scheduled),
            prepare_s=result.prepare_s,
            forward_s=result.forward_s,
        )
        self.stats.add(step, sum(map(len, result.token_ids)))


def blocks_needed(prompt_lens: Seq[int], num_new: int, block_size: int) -> int:
    """KV-cache blocks that let all rows run in one batch."""
    spare = len(prompt_lens) - 1  # see Scheduler._admit
    return spare + sum(-(-(n + num_new) // block_size) for n in prompt_lens)


def affordable_blocks(settings: EngineSection, block_bytes: int, free: int) -> int:
    """KV-cache blocks that fit `free` bytes after the reserve; 0 or less if none fits."""
    room = free - int(settings.reserved_memory_gb * 2**30)
    return int(room * settings.memory_fraction) // block_bytes


def count_blocks(settings: EngineSection, config: ModelConfig, block_bytes: int, free: int) -> int:
    """KV-cache blocks: --num_blocks, else what fits the memory and the batch can use.

    Args:
        settings: the [engine] section.
        config: the architecture.
        block_bytes: bytes of K and V of one block on one rank, over all layers.
        free: free bytes after the weights are loaded.
    """
    if settings.num_blocks:
        return settings.num_blocks
    affordable = affordable_blocks(settings, block_bytes, free)
    positions = config.positions(settings.max_position_embeddings)
    per_request = -(-positions // settings.block_size)
    # Room for one extra request keeps finished prefixes in the cache for a while.
    return min(affordable, per_request * (settings.max_batch_size + 1))


def check_blocks(num_blocks: int, settings: EngineSection, block_bytes: int, free: int) -> None:
    """Raise RuntimeError if the KV cache has no block or does not fit the memory."""
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


def check_fits_cache(num_prompt: int, params: SamplingParams, blocks: BlockManager) -> None:
    """Raise InvalidParameter for a request that does not fit an empty cache."""
    needed = blocks.blocks_for(num_prompt + params.max_new_tokens)
    if needed > blocks.num_blocks:
        raise InvalidParameter(
            "prompt",
            f"{num_prompt} tokens + {params.max_new_tokens} new",
            f"a request of at most {blocks.num_blocks} KV-cache blocks, "
            f"not {needed}, (raise --num_blocks)",
        )


def score_by(
    generate: Callable[[Seq[Seq[int]], SamplingParams], list[Completion]],
    prompts: Seq[Seq[int]],
    token_ids: Seq[int],
) -> list[NextToken]:
    """`Engine.score_next` by the generation of one token each."""
    params = SamplingParams(
        max_new_tokens=1,
        ignore_eos=True,
        detokenize=False,
        obey_rules=False,
        logprobs=0,
        logprob_token_ids=tuple(token_ids),
    )
    completions = generate(prompts, params)
    raise_failure(completions)
    scores = []
    for completion in completions:
        top = [entry.top for entry in completion.logprobs]  # empty on ranks above 0
        scores.append(NextToken(completion.token_ids[0], [t[i] for t in top for i in token_ids]))
    return scores
