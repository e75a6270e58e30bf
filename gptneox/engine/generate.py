# SPDX-License-Identifier: Apache-2.0
"""The flash path: transformers' `generate` over whole or cut weights."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gptneox.engine.api import (
    Completion,
    Engine,
    NextToken,
    RequestFailed,
    StepStats,
    check_request,
)
from gptneox.engine.detokenizer import Detokenizer, append_until_end, decode, end_ids
from gptneox.engine.generation_config import NO_RULES, GenerationRules
from gptneox.engine.sampler import NON_FINITE, adjust, non_finite_rows
from gptneox.engine.sequence import (
    NO_TOKEN,
    InvalidParameter,
    SamplingParams,
    Sequence,
    check_vocabulary,
)
from gptneox.parallel import TensorParallelGroup


class GenerateEngine(Engine):
    """Left-padded batches of `settings.max_batch_size` rows, one after another."""

    name = "flash"
    prefers_parts = True

    def _set_up(self) -> None:
        """Put the adapter for transformers' `generate` around the model."""
        from gptneox.adapter import GPTNeoXForCausalLM  # transformers' generate is slow to import

        self.adapter: Any = GPTNeoXForCausalLM.around(self.model)
        torch.manual_seed(1)  # every rank must draw the same random numbers

    def check(self, prompt_ids: Seq[int], params: SamplingParams) -> None:
        """Raise InvalidParameter for a request that can never run on this path."""
        super().check(prompt_ids, params)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(params, name) is not None:
                raise InvalidParameter(name, getattr(params, name), "None with --attention flash")

    def _complete(
        self, prompts: Seq[Seq[int]], params: Seq[SamplingParams]
    ) -> Iterator[tuple[int, Completion]]:
        """See `Engine`. All prompts of a call must have the same parameters.

        A seed is set once per call, before its first batch; without one, the random state carries
        over from the last call.
        """
        if any(p != params[0] for p in params):
            raise InvalidParameter("params", "not alike", "the same for every row of a batch")
        return self._batches(prompts, params[0]) if params else iter(())

    def _batches(
        self, prompts: Seq[Seq[int]], params: SamplingParams
    ) -> Iterator[tuple[int, Completion]]:
        if params.temperature > 0 and params.seed is not None:
            torch.manual_seed(params.seed)
        for first in range(0, len(prompts), self.settings.max_batch_size):
            batch = prompts[first : first + self.settings.max_batch_size]
            yield from enumerate(self._generate(batch, params, first), start=first)

    def _generate(
        self, prompts: Seq[Seq[int]], params: SamplingParams, first_id: int
    ) -> list[Completion]:
        """Run one padded batch."""
        input_ids, mask = self._pad(prompts)
        eos = () if params.ignore_eos else self.eos_token_ids
        tokenizer = self.tokenizer if params.detokenize else None
        rules = self.rules if params.obey_rules else NO_RULES
        rows = [
            _Row(Sequence.create(first_id + i, prompt, params, rules, eos), tokenizer)
            for i, prompt in enumerate(prompts)
        ]
        batch = _Batch(rows, rules, self.group)
        with self._timed(len(prompts), input_ids.shape[1]):
            output = self.adapter.generate(
                input_ids,
                attention_mask=mask,
                eos_token_id=sorted({*eos, *params.stop_token_ids}) or None,
                pad_token_id=0,
                logits_processor=[batch.adjust],
                stopping_criteria=[batch.check_ends],
                **_options(params),
            )
        new_ids = output[:, input_ids.shape[1] :].tolist()
        return [row.finish(ids) for row, ids in zip(rows, new_ids, strict=True)]

    @contextmanager
    def _timed(self, num_rows: int, num_prompt: int) -> Iterator[None]:
        """Add the steps of one `generate` to the stats; a step lasts until the next one begins."""
        stats, device = self.stats, self.device
        forwards: list[float] = []  # start, end, start, … of the forward passes

        def record_time(*_: Any) -> None:
            device.synchronize()
            forwards.append(time.perf_counter())

        starts = self.adapter.starts = []
        hooks = []
        if stats.measure:
            hooks = [
                self.adapter.register_forward_pre_hook(record_time),
                self.adapter.register_forward_hook(record_time),
            ]
        try:
            yield
        finally:
            self.adapter.starts = None
            for hook in hooks:
                hook.remove()
        device.synchronize()
        for i, end in enumerate([*starts[1:], time.perf_counter()]):
            step = StepStats(
                start=starts[i],
                seconds=end - starts[i],
                num_prefill_tokens=0 if i else num_rows * num_prompt,
                num_decode_tokens=num_rows if i else 0,
                num_context_tokens=num_rows * (num_prompt + i),
            )
            if stats.measure:
                step.prepare_s = forwards[2 * i] - starts[i]
                step.forward_s = forwards[2 * i + 1] - forwards[2 * i]
            stats.add(step, num_rows)

    @torch.inference_mode()
    def score_next(self, prompts: Seq[Seq[int]], token_ids: Seq[int]) -> list[NextToken]:
        """See `Engine`; each call is one padded batch."""
        check_vocabulary("token_ids", token_ids, self.model.config.vocab_size)
        logits = self.next_logits(prompts).float()  # [B, V]
        if rows := non_finite_rows(logits):
            raise RequestFailed(f"request {rows[0]}: {NON_FINITE}")
        scores = logits.log_softmax(-1)[:, list(token_ids)].tolist()
        greedy_ids = logits.argmax(-1).tolist()
        return [NextToken(i, row) for i, row in zip(greedy_ids, scores, strict=True)]

    def next_logits(self, prompts: Seq[Seq[int]]) -> Tensor:
        """Logits [B, V] of the token after each prompt, in one padded batch.

        Raises:
            InvalidParameter: see `check`.
        """
        for prompt in prompts:
            vocab_size, params = self.model.config.vocab_size, SamplingParams(max_new_tokens=1)
            # One position more than the model has: the next token is predicted, never fed.
            check_request(prompt, params, vocab_size, self.max_positions + 1, has_tokenizer=True)
        input_ids, mask = self._pad(prompts)
        out = self.adapter(input_ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        logits = out.logits[:, -1]
        assert isinstance(logits, Tensor)
        return logits

    def _pad(self, prompts: Seq[Seq[int]]) -> tuple[Tensor, Tensor]:
        """input_ids and attention_mask [B, S], padded on the left."""
        longest = max(len(p) for p in prompts)
        ids = [[0] * (longest - len(p)) + list(p) for p in prompts]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        device = self.device.torch_device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _options(params: SamplingParams) -> dict[str, Any]:
    """What is left of the parameters for transformers' `generate`; see `_Batch.adjust`."""
    options: dict[str, Any] = {
        "max_new_tokens": params.max_new_tokens,
        # Division by less makes the scores infinite; so small a temperature is greedy anyway.
        "do_sample": params.temperature > 1e-6,
    }
    if options["do_sample"]:
        options |= {
            "temperature": params.temperature,
            "top_k": max(params.top_k, 0),
            "top_p": params.top_p,
            "min_p": params.min_p or None,
        }
    return options


class _Row:
    """One prompt of a batch with its generated tokens."""

    def __init__(self, seq: Sequence, tokenizer: Any) -> None:
        params = seq.params
        self.seq, self.tokenizer = seq, tokenizer
        self.ends = end_ids(seq.eos_token_ids, params.stop_token_ids)
        self.detokenizer = None
        if tokenizer and (stop := (*params.stop, *seq.rules.stop_strings)):
            self.detokenizer = Detokenizer(tokenizer, stop, include_stop=params.include_stop)
        self.reason = self.error = ""  # why the row ended; "" while it runs
        self.stop_reason: str | int | None = None
        self.num_released = 0

    def add(self, token_id: int, *, late: bool = False) -> None:
        """Append the next token, if the row has not ended."""
        if not self.reason:
            seq = self.seq
            room = 1 if late else seq.params.max_new_tokens - seq.num_output_tokens
            seq.token_ids.append(token_id)
            appended = append_until_end(self.detokenizer, [token_id], self.ends, room)
            self.num_released += appended.num_released
            self.reason, self.stop_reason = appended.reason, appended.stop_reason

    def fail(self, error: str) -> None:
        """End the row with an error, if it has not ended."""
        if not self.reason:
            self.reason, self.error = "error", error

    def finish(self, new_ids: Seq[int]) -> Completion:
        """The row's completion; `new_ids` may continue after its end."""
        for token_id in new_ids[self.seq.num_output_tokens :]:
            self.add(token_id)
        token_ids = self.seq.output_ids
        text = ""
        if self.detokenizer:
            self.detokenizer.add([], last=True)  # after an error something may be held back
            self.num_released, text = self.detokenizer.num_released, self.detokenizer.text
        elif self.tokenizer is not None:
            text = decode(self.tokenizer, token_ids[: self.num_released])
        return Completion(
            self.seq.request_id,
            new_text=text,
            new_token_ids=token_ids,
            released_ids=token_ids[: self.num_released],
            cut_ids=token_ids[self.num_released :] if isinstance(self.stop_reason, str) else [],
            finish_reason=self.reason,
            stop_reason=self.stop_reason,
            error=self.error,
            text=text,
            token_ids=token_ids,
        )


class _Batch:
    """Callbacks of `generate`: the logits processor and the stopping criterion of a batch."""

    def __init__(
        self, rows: list[_Row], rules: GenerationRules, group: TensorParallelGroup
    ) -> None:
        self.rows, self.rules, self.group = rows, rules, group
        self.start = time.perf_counter()

    def adjust(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits processor: scores [B, V], after the model and before the temperature.

        A row with non-finite scores, or without an allowed token, ends with an error; the token
        sampled for it is ignored. transformers' own repetition penalty would count the padding.
        """
        for i in non_finite_rows(scores):
            self.rows[i].fail(NON_FINITE)
            scores = scores.index_fill(0, torch.tensor(i, device=scores.device), 0.0)
        if self.rows[0].seq.params.is_plain and not self.rules.restricts:
            return scores
        scores = scores.clone()
        for i, row in enumerate(self.rows):
            if row.reason:
                continue
            adjusted = adjust(scores[i], row.seq)
            if adjusted.max() == -math.inf:
                row.fail(NO_TOKEN)
            else:
                scores[i] = adjusted
        return scores

    def check_ends(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """The stopping criterion; returns [B], true where a row has ended."""
        late = False
        if self.rules.max_time is not None:  # rank 0's clock decides, so that ranks agree
            seconds = time.perf_counter() - self.start
            late = bool(self.group.broadcast_object(seconds > self.rules.max_time))
        for row, token_id in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            row.add(token_id, late=late)
        return torch.tensor([bool(row.reason) for row in self.rows], device=input_ids.device)
