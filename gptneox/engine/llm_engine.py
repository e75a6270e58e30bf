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

from gptneox.backends.device import Device
from gptneox.checkpoint import load_model, rank_directory
from gptneox.config import (
    ConfigError,
    EngineSection,
    ModelConfig,
    read_json,
)
from gptneox.config import (
    token_ids as eos_ids,
)
from gptneox.engine.block_manager import BlockManager
from gptneox.engine.detokenizer import Detokenizer, load_tokenizer
from gptneox.engine.model_runner import ModelRunner
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


class LLMEngine:
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
        eos_token_ids: Seq[int] = (),
    ) -> None:
        """Make an engine around a loaded model; `from_pretrained` does all of it.

        Raises:
            RuntimeError: the memory holds not even one block.
        """
        self.model, self.settings, self.tokenizer = model, settings, tokenizer
        self.eos_token_ids = tuple(eos_token_ids)
        self.max_positions = model.num_positions
        self.dtype = dtype
        num_blocks = settings.num_blocks or self._fit_blocks()
        config, ranks = model.config, model.group.world_size
        cache = PagedKVCache(
            model.ops,
            config.num_layers,
            num_blocks,
            settings.block_size,
            config.num_heads // ranks,
            config.head_dim,
            dtype,
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
    ) -> LLMEngine:
        """Load a checkpoint directory.

        Raises:
            ValueError, FileNotFoundError: the files are wrong; see `ModelConfig`, `Checkpoint`
                and `load_tokenizer`.
            RuntimeError: not enough memory.
        """
        model_path = rank_directory(model_path, group or TensorParallelGroup())
        config = ModelConfig.from_pretrained(model_path)
        if config.quantize:
            raise ConfigError(
                f"{model_path} is quantized ({config.quantize}), which is not built yet; "
                "use the float checkpoint"
            )
        tokenizer = None
        if with_tokenizer:
            tokenizer = load_tokenizer(
                model_path, config.vocab_size, trust_remote_code=trust_remote_code
            )
        torch_dtype, notice = device.resolve_dtype(config.dtype, dtype)
        if notice:
            logger.warning(notice)
        model = GPTNeoX(config, device, group, settings.max_position_embeddings, settings.graphs)
        load_model(model, model_path, torch_dtype, show_progress=show_progress)
        eos = stop_token_ids(model_path, config, tokenizer)
        return cls(model, settings, torch_dtype, tokenizer=tokenizer, eos_token_ids=eos)

    # -- requests --------------------------------------------------------------------------------

    def add_request(self, prompt_ids: Seq[int], params: SamplingParams) -> int:
        """Check and queue a request; returns its id.

        Raises:
            InvalidParameter: an empty prompt, an id out of the vocabulary, more tokens than
                positions or than the whole cache holds, a stop string without a tokenizer.
        """
        self._check(prompt_ids, params)
        seq = Sequence.create(self._next_id, prompt_ids, params)
        self._next_id += 1
        detokenizer = Detokenizer(self.tokenizer, params.stop) if self.tokenizer else None
        stop_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids.update(self.eos_token_ids)
        self._requests[seq.request_id] = _Request(seq, detokenizer, frozenset(stop_ids))
        self.scheduler.add(seq)
        return seq.request_id

    def _check(self, prompt_ids: Seq[int], params: SamplingParams) -> None:
        if not len(prompt_ids):
            raise InvalidParameter(
                "prompt", "", "at least one token (--input_ids 0 starts from nothing)"
            )
        vocab_size = self.model.config.vocab_size
        check_vocabulary("prompt", prompt_ids, vocab_size)
        check_vocabulary("logprob_token_ids", params.logprob_token_ids, vocab_size)
        num_tokens = len(prompt_ids) + params.max_new_tokens
        if num_tokens > self.max_positions:
            raise InvalidParameter(
                "max_new_tokens",
                params.max_new_tokens,
                f"prompt ({len(prompt_ids)} tokens) + new tokens within the model's "
                f"{self.max_positions} positions, so at most "
                f"{max(0, self.max_positions - len(prompt_ids))},",
            )
        needed = self.block_manager.blocks_for(num_tokens)
        if needed > self.block_manager.num_blocks:
            raise InvalidParameter(
                "prompt",
                f"{len(prompt_ids)} tokens + {params.max_new_tokens} new",
                f"a request of at most {self.block_manager.num_blocks} KV-cache blocks, "
                f"not {needed}, (raise --num_blocks)",
            )
        if params.stop and not self.tokenizer:
            raise InvalidParameter("stop", list(params.stop), "no stop string without a tokenizer")

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
        remaining = iter(token_ids)
        outputs = []
        for item, samples_now in zip(scheduled, samples, strict=True):
            if samples_now:
                wanted = item.seq.params.max_new_tokens > 0
                new = [next(remaining)] if wanted else []
                outputs.append(self._advance(self._requests[item.seq.request_id], new))
        return outputs

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

    def _advance(self, request: _Request, new: list[int]) -> RequestOutput:
        """Add new tokens to a request and end it where it has to end."""
        seq = request.seq
        seq.token_ids += new
        reason = ""
        if new and new[-1] in request.stop_ids:
            reason = "stop"
        elif seq.num_output_tokens >= seq.params.max_new_tokens:
            reason = "length"
        output = RequestOutput(seq.request_id, "", new)
        if request.detokenizer:
            visible = new[:-1] if reason == "stop" else new
            output.new_text = request.detokenizer.add(visible, last=bool(reason))
            if request.detokenizer.stopped:
                reason = "stop"
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

    def _fit_blocks(self) -> int:
        """Blocks that the free memory holds, but no more than the batch can ever use."""
        settings, config, group = self.settings, self.model.config, self.model.group
        itemsize = torch.empty((), dtype=self.dtype).element_size()
        per_token = config.kv_bytes_per_token(itemsize, group.world_size)
        block_bytes = per_token * settings.block_size
        free = self.model.device.memory().free - int(settings.reserved_memory_gb * 2**30)
        affordable = int(free * settings.memory_fraction) // block_bytes
        per_request = -(-self.max_positions // settings.block_size)
        # One request more than runs at once, so that finished prefixes stay for a while.
        useful = per_request * (settings.max_batch_size + 1)
        num_blocks = group.broadcast_object(min(affordable, useful))
        if num_blocks < 1:
            raise RuntimeError(
                f"no memory for the KV cache: one block takes {block_bytes / 2**20:.1f} MiB, "
                f"{max(free, 0) / 2**20:.1f} MiB are free beyond the reserved "
                f"{settings.reserved_memory_gb} GiB; lower --reserved_memory_gb or --block_size"
            )
        return int(num_blocks)


def stop_token_ids(model_path: Path, config: ModelConfig, tokenizer: Any) -> tuple[int, ...]:
    """End-of-text ids: generation_config.json, else the tokenizer, else config.json."""
    path = model_path / "generation_config.json"
    if path.is_file():
        ids = eos_ids(read_json(path).get("eos_token_id"), f"{path}: eos_token_id")
        if ids:
            return ids
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        return (tokenizer.eos_token_id,)
    return config.eos_token_ids
