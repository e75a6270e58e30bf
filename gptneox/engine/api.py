# SPDX-License-Identifier: Apache-2.0
"""The interface of all engines: prompts in, completions and step times out."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch

from gptneox.config.settings import EngineSection
from gptneox.devices.device import Device
from gptneox.engine.generation_config import NO_RULES, GenerationRules
from gptneox.engine.opening import open_checkpoint
from gptneox.engine.sequence import (
    InvalidParameter,
    SamplingParams,
    TokenLogprobs,
    check_vocabulary,
)
from gptneox.model import GPTNeoX
from gptneox.parallel import TensorParallelGroup
from gptneox.weights.load import load_model

logger = logging.getLogger(__name__)

_Engine = TypeVar("_Engine", bound="Engine")


class RequestFailed(RuntimeError):
    """A request ended without its answer; the message says why."""


@dataclass
class Completion:
    """The part of an answer that the last step added; the whole answer once it has finished."""

    request_id: int
    new_text: str = ""
    new_token_ids: list[int] = field(default_factory=list)
    # The tokens whose text is in `new_text`, which lags behind `new_token_ids`: text is held back
    # while a character is incomplete or a stop string possible. Over all completions these are
    # `token_ids` without the end-of-text id and the tokens that a stop string cut.
    released_ids: list[int] = field(default_factory=list)
    released_logprobs: list[TokenLogprobs] = field(default_factory=list)  # rank 0, if asked for
    # Set when finished: the tokens that a stop string cut. `text` has a part of theirs, or none.
    cut_ids: list[int] = field(default_factory=list)
    cut_logprobs: list[TokenLogprobs] = field(default_factory=list)  # rank 0, if asked for
    finish_reason: str = ""  # "stop" | "length" | "error"; "" while the request runs
    # With "stop": the stop string or the id of `stop_token_ids`; None for end-of-text.
    stop_reason: str | int | None = None
    error: str = ""  # why it failed; tokens generated before the failure are kept
    # Paged engine: set from the first completion on, each rank by its own clock.
    num_cached_tokens: int = 0  # prompt tokens that came from the prefix cache
    queued_s: float = 0.0  # from the request's addition to the engine to its first step
    prefill_s: float = 0.0  # from its first step to the end of the step that computed the prompt
    # Set when finished. `token_ids` includes the end-of-text id that ended the answer, if any.
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    # Of the raw logits, whatever penalties and limits apply; of all of `token_ids`. On rank 0.
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    # In the first and in the last completion: of the prompt tokens from `prompt_logprobs_start` on.
    # The first prompt token has none.
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether this is the request's last completion."""
        return bool(self.finish_reason)


@dataclass(frozen=True)
class NextToken:
    """The likeliest token after a prompt, and the log-probabilities of the requested tokens.

    `logprobs` is empty on ranks above 0 of the paged engine.
    """

    greedy_id: int
    logprobs: list[float]


@dataclass
class StepStats:
    """One step: when it began, what it computed, how long it took."""

    start: float  # perf_counter
    seconds: float
    num_prefill_tokens: int
    num_decode_tokens: int
    num_context_tokens: int  # cached tokens that attention read
    prepare_s: float = 0.0  # part of `seconds` before the forward pass; 0 unless measured
    forward_s: float = 0.0  # part of `seconds` in the model, logits included; 0 unless measured


@dataclass
class EngineStats:
    """Sums over all steps. A step with at least one prompt token counts as prefill."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_decode_steps: int = 0
    num_decode_context_tokens: int = 0
    num_output_tokens: int = 0
    steps: list[StepStats] | None = None  # each step, unless None
    measure: bool = False  # synchronize with the device around each forward pass to time it

    def add(self, step: StepStats, num_sampled: int) -> None:
        """Add one step to the sums."""
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


class Answering(Protocol):
    """What asking questions needs of an engine, which may be elsewhere; see `Engine`."""

    tokenizer: Any

    @property
    def group(self) -> TensorParallelGroup:
        """The ranks that call it alike."""

    @property
    def max_positions(self) -> int:
        """Maximum length of prompt and answer together."""

    def generate(
        self, prompts: Seq[Seq[int]], params: SamplingParams | Seq[SamplingParams]
    ) -> list[Completion]:
        """The finished completions in prompt order."""

    def score_next(self, prompts: Seq[Seq[int]], token_ids: Seq[int]) -> list[NextToken]:
        """Log-probability of each of `token_ids` as the next token of each prompt."""


class Engine(ABC):
    """A loaded model with its tokenizer.

    Every rank of a tensor-parallel run owns one and calls the same methods in the same order.
    """

    name: ClassVar[str]  # the value of --attention that selects it
    prefers_parts: ClassVar[bool] = False  # see `find_part`

    def __init__(
        self,
        model: GPTNeoX,
        settings: EngineSection,
        *,
        tokenizer: Any = None,
        rules: GenerationRules = NO_RULES,
    ) -> None:
        """Wrap a loaded model; `from_pretrained` also loads it.

        Args:
            model: the model with its weights and its size.
            settings: the [engine] section.
            tokenizer: None for requests and answers in token ids only.
            rules: what the checkpoint's generation_config.json asks for.

        Raises:
            RuntimeError: there is no memory for what the engine keeps beside the model.
        """
        self.model, self.settings = model, settings
        self.tokenizer, self.rules = tokenizer, rules
        self.eos_token_ids = end_of_text(rules, tokenizer)
        self.stats = EngineStats()
        self._set_up()

    @abstractmethod
    def _set_up(self) -> None:
        """Make what the engine keeps beside the model."""

    @classmethod
    def from_pretrained(
        cls: type[_Engine],
        model_path: Path,
        settings: EngineSection,
        device: Device,
        *,
        dtype: str = "auto",
        group: TensorParallelGroup | None = None,
        with_tokenizer: bool = True,
        trust_remote_code: bool = False,
        show_progress: bool = False,
    ) -> _Engine:
        """Load a checkpoint directory, or this rank's folder of a cut checkpoint.

        Raises:
            ValueError, FileNotFoundError: see `open_checkpoint`.
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
            prefer_parts=cls.prefers_parts,
        )
        for notice in opened.notices:
            logger.warning(notice)
        positions = settings.max_position_embeddings
        model = GPTNeoX(opened.config, device, group, positions, settings.graphs)
        load_model(
            model,
            opened.path,
            opened.dtype,
            kv_cache_dtype=settings.kv_cache_dtype,
            show_progress=show_progress,
        )
        return cls(model, settings, tokenizer=opened.tokenizer, rules=opened.rules)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        return self.model.size.dtype

    @property
    def device(self) -> Device:
        """The device that holds the model."""
        return self.model.device

    @property
    def group(self) -> TensorParallelGroup:
        """The ranks that share the model."""
        return self.model.group

    @property
    def max_positions(self) -> int:
        """Maximum length of prompt and answer together."""
        return self.model.num_positions

    def check(self, prompt_ids: Seq[int], params: SamplingParams) -> None:
        """Raise InvalidParameter for a request that can never run."""
        check_request(
            prompt_ids,
            params,
            self.model.config.vocab_size,
            self.max_positions,
            has_tokenizer=self.tokenizer is not None,
        )

    def complete(
        self, prompts: Seq[Seq[int]], params: SamplingParams | Seq[SamplingParams]
    ) -> Iterator[tuple[int, Completion]]:
        """Answer prompts; yields each step's completions with the index of their prompt.

        All prompts are checked before the first step. Closing the iterator aborts the requests
        that have not finished.

        Raises:
            InvalidParameter: see `check`.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        for prompt, p in zip(prompts, each, strict=True):
            self.check(prompt, p)
        return self._complete(prompts, each)

    @abstractmethod
    def _complete(
        self, prompts: Seq[Seq[int]], params: Seq[SamplingParams]
    ) -> Iterator[tuple[int, Completion]]:
        """`complete` for prompts that are checked, each with its parameters."""

    def generate(
        self, prompts: Seq[Seq[int]], params: SamplingParams | Seq[SamplingParams]
    ) -> list[Completion]:
        """The finished completions in prompt order; see `complete`."""
        done = {i: c for i, c in self.complete(prompts, params) if c.finished}
        return [done[i] for i in range(len(prompts))]

    @abstractmethod
    def score_next(self, prompts: Seq[Seq[int]], token_ids: Seq[int]) -> list[NextToken]:
        """Log-probability of each of `token_ids` as the next token of each prompt, in fp32.

        Raises:
            RequestFailed: the model's output is NaN or infinite.
            InvalidParameter: see `check`.
        """

    def check_batch(self, prompt_lens: Seq[int], num_new: int) -> None:
        """Raise ValueError unless all rows can run in one batch, as batch measurements need."""
        limit = self.settings.max_batch_size
        if len(prompt_lens) > limit:
            raise ValueError(
                f"{len(prompt_lens)} rows, but the engine runs {limit} at once; raise "
                "max_batch_size"
            )
        longest = max(prompt_lens) + num_new
        if longest > self.max_positions:
            raise ValueError(
                f"{longest} positions are needed, the model has {self.max_positions}; shorten the "
                "prompt or the output"
            )

    def describe_cache(self) -> str:
        """What the log says about the KV cache, starting with a comma."""
        return f", KV cache in {self.model.size.kv_format.name}"

    def reset_stats(self, *, keep_steps: bool = False, measure: bool = False) -> None:
        """Reset all sums to zero.

        Args:
            keep_steps: also record each step.
            measure: time each forward pass separately.
        """
        self.stats = EngineStats(steps=[] if keep_steps else None, measure=measure)


def is_alike_on_all_ranks(error: BaseException, group: TensorParallelGroup) -> bool:
    """Whether every rank has raised this error, so that all of them may go on after it.

    What is refused is refused alike. Out of memory, say, may be one rank, which would then be
    a batch ahead of the others.
    """
    return group.world_size == 1 or isinstance(error, (ValueError, RequestFailed))


def raise_failure(completions: Iterable[Completion]) -> None:
    """Raise RequestFailed for the first completion that has an error, with its place."""
    for i, completion in enumerate(completions):
        if completion.error:
            raise RequestFailed(f"request {i}: {completion.error}")


def check_request(
    prompt_ids: Seq[int],
    params: SamplingParams,
    vocab_size: int,
    max_positions: int,
    *,
    has_tokenizer: bool,
) -> None:
    """Raise InvalidParameter for a request that the model can never answer."""
    if not len(prompt_ids):
        raise InvalidParameter(
            "prompt", "", "at least one token (--input_ids 0 starts from nothing)"
        )
    check_vocabulary("prompt", prompt_ids, vocab_size)
    check_vocabulary("logprob_token_ids", params.logprob_token_ids, vocab_size)
    check_vocabulary("stop_token_ids", params.stop_token_ids, vocab_size)
    check_vocabulary("allowed_token_ids", params.allowed_token_ids, vocab_size)
    check_vocabulary("logit_bias", (token_id for token_id, _ in params.logit_bias), vocab_size)
    if len(prompt_ids) + params.max_new_tokens > max_positions:
        raise InvalidParameter(
            "max_new_tokens",
            params.max_new_tokens,
            f"prompt ({len(prompt_ids)} tokens) + new tokens within the model's "
            f"{max_positions} positions, so at most "
            f"{max(0, max_positions - len(prompt_ids))},",
        )
    if params.stop and not (has_tokenizer and params.detokenize):
        raise InvalidParameter("stop", list(params.stop), "no stop string without a tokenizer")


def end_of_text(rules: GenerationRules, tokenizer: Any) -> tuple[int, ...]:
    """End-of-text ids, chosen as transformers' `generate` does: the config files come first.

    The tokenizer's id is used only if neither generation_config.json nor config.json has one.
    """
    if rules.eos_token_ids is not None:
        return rules.eos_token_ids
    eos_token_id = None if tokenizer is None else tokenizer.eos_token_id
    return () if eos_token_id is None else (eos_token_id,)
