# SPDX-License-Identifier: Apache-2.0
"""The flash path: transformers' `generate` over whole or cut weights."""

from __future__ import annotations

import time
from collections.abc import Container, Iterator
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
from gptneox.engine.detokenizer import Detokenizer, append_until_end, decode
from gptneox.engine.generation_config import NO_RULES, GenerationRules
from gptneox.engine.sampler import describe_non_finite, non_finite_rows, restrict
from gptneox.engine.sequence import InvalidParameter, SamplingParams, check_vocabulary
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
        ends = frozenset((*eos, *params.stop_token_ids))
        tokenizer = self.tokenizer if params.detokenize else None
        rules = self.rules if params.obey_rules else NO_RULES
        stop = (*params.stop, *rules.stop_strings) if tokenizer else ()
        rows = [
            _Row(list(prompt), ends, params.max_new_tokens, tokenizer, stop) for prompt in prompts
        ]
        batch = _Batch(rows, rules, eos, self.group)
        with self._timed(len(prompts), input_ids.shape[1]):
            output = self.adapter.generate(
                input_ids,
                attention_mask=mask,
                eos_token_id=sorted(ends) or None,
                pad_token_id=0,
                logits_processor=[batch.restrict],
                stopping_criteria=[batch.check_ends],
                **_options(params),
            )
        new_ids = output[:, input_ids.shape[1] :].tolist()
        return [
            row.finish(first_id + i, ids)
            for i, (row, ids) in enumerate(zip(rows, new_ids, strict=True))
        ]

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
            raise RequestFailed(describe_non_finite(rows[0]))
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
    """The same parameters for transformers' `generate`."""
    options: dict[str, Any] = {
        "max_new_tokens": params.max_new_tokens,
        # Division by less makes the scores infinite; so small a temperature is greedy anyway.
        "do_sample": params.temperature > 1e-6,
        "repetition_penalty": params.repetition_penalty,
    }
    if options["do_sample"]:
        options |= {
            "temperature": params.temperature,
            "top_k": max(params.top_k, 0),
            "top_p": params.top_p,
        }
    return options


class _Row:
    """One prompt of a batch with its generated tokens."""

    def __init__(
        self, prompt: list[int], ends: Container[int], limit: int, tokenizer: Any, stop: Seq[str]
    ) -> None:
        self.prompt, self.ends, self.limit, self.tokenizer = prompt, ends, limit, tokenizer
        self.detokenizer = Detokenizer(tokenizer, stop) if stop else None
        self.token_ids: list[int] = []
        self.reason = ""  # why the row ended; "" while it runs

    def add(self, token_id: int, *, late: bool = False) -> None:
        """Append the next token, if the row has not ended."""
        if not self.reason:
            room = 1 if late else self.limit - len(self.token_ids)
            self.token_ids.append(token_id)
            _, _, self.reason = append_until_end(self.detokenizer, [token_id], self.ends, room)

    def finish(self, request_id: int, new_ids: Seq[int]) -> Completion:
        """The row's completion; `new_ids` may continue after its end."""
        for token_id in new_ids[len(self.token_ids) :]:
            self.add(token_id)
        text = ""
        if self.detokenizer:
            text = self.detokenizer.text
        elif self.tokenizer is not None:
            ended = self.token_ids and self.token_ids[-1] in self.ends
            text = decode(self.tokenizer, self.token_ids[:-1] if ended else self.token_ids)
        return Completion(
            request_id,
            new_text=text,
            new_token_ids=self.token_ids,
            finish_reason=self.reason,
            error=describe_non_finite(request_id) if self.reason == "error" else "",
            text=text,
            token_ids=self.token_ids,
        )


class _Batch:
    """Callbacks of `generate`: the logits processor and the stopping criterion of a batch."""

    def __init__(
        self,
        rows: list[_Row],
        rules: GenerationRules,
        eos: Seq[int],
        group: TensorParallelGroup,
    ) -> None:
        self.rows, self.rules, self.eos, self.group = rows, rules, eos, group
        self.width = max(len(row.prompt) for row in rows)
        self.start = time.perf_counter()

    def restrict(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits processor: input_ids [B, padded + new], scores [B, V].

        A row with non-finite scores ends with an error; the token sampled for it is ignored.
        """
        for i in non_finite_rows(scores):
            self.rows[i].reason = self.rows[i].reason or "error"
            scores = scores.index_fill(0, torch.tensor(i, device=scores.device), 0.0)
        if not self.rules.restricts:
            return scores
        scores = scores.clone()
        for i, row in enumerate(self.rows):
            num_prompt = len(row.prompt)
            token_ids = input_ids[i, self.width - num_prompt :].tolist()
            limits = self.rules.restrict(token_ids, num_prompt, num_prompt + row.limit, self.eos)
            scores[i] = restrict(scores[i], *limits)
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
