# SPDX-License-Identifier: Apache-2.0
"""The flash-attention path: `generate` of transformers over whole or cut weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Container
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptneox.config.model import ModelConfig
from gptneox.devices.device import Device
from gptneox.engine.detokenizer import Detokenizer, decode, extend
from gptneox.engine.generation_config import NO_RULES, GenerationRules
from gptneox.engine.opening import open_checkpoint
from gptneox.engine.paged import end_of_text
from gptneox.engine.sampler import restrict
from gptneox.engine.sequence import InvalidParameter, check_vocabulary
from gptneox.parallel import TensorParallelGroup

logger = logging.getLogger(__name__)


@dataclass
class FlashOutput:
    """What one row of a batch became; `token_ids` ends with the end-of-text id, if it came."""

    token_ids: list[int]
    text: str  # of the new tokens
    full_text: str  # of prompt and new tokens
    finish_reason: str  # "stop" | "length"


class GenerateEngine:
    """A model, its tokenizer and `generate` for left-padded batches."""

    def __init__(
        self,
        model: Any,
        config: ModelConfig,
        tokenizer: Any,
        rules: GenerationRules = NO_RULES,
    ) -> None:
        """`from_pretrained` makes one."""
        self.model, self.config, self.tokenizer, self.rules = model, config, tokenizer, rules
        self.eos_token_ids = end_of_text(rules, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        model_path: Path,
        device: Device,
        group: TensorParallelGroup,
        *,
        dtype: str = "auto",
        with_tokenizer: bool = True,
        max_position_embeddings: int = 0,
    ) -> GenerateEngine:
        """Load a checkpoint, or this rank's folder of `model_path/part_model` on several ranks.

        Raises:
            ValueError, FileNotFoundError, RuntimeError: the files are wrong, or memory is short.
        """
        from transformers import GenerationConfig, GPTNeoXConfig

        # The adapter itself, not a copy of it beside the weights: nothing there is executed.
        from modeling_gpt_neox_ascend import GPTNeoXForCausalLM

        opened = open_checkpoint(
            model_path,
            device,
            group,
            dtype=dtype,
            with_tokenizer=with_tokenizer,
            prefer_parts=True,
        )
        for notice in opened.notices:
            logger.warning(notice)
        config = opened.config
        model = GPTNeoXForCausalLM.from_pretrained(
            str(opened.path),
            # What `generate` looks at; config.json's further keys are no business of a run.
            config=GPTNeoXConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                max_position_embeddings=config.positions(max_position_embeddings),
            ),
            dtype=opened.dtype,
            device_map=device.name,
            # Nothing of the file but the rules, which are the same code on both paths.
            generation_config=GenerationConfig(),  # type: ignore[no-untyped-call]
            max_position_embeddings=max_position_embeddings,
        )
        return cls(model, config, opened.tokenizer, opened.rules)

    @property
    def max_positions(self) -> int:
        """Positions of prompt and answer together."""
        return int(self.model.model.num_positions)

    def generate(
        self,
        prompts: Seq[Seq[int]],
        *,
        ignore_eos: bool = False,
        stop: Seq[str] = (),
        stop_token_ids: Seq[int] = (),
        **options: Any,
    ) -> list[FlashOutput]:
        """One padded batch.

        Args:
            prompts: token ids.
            ignore_eos: go on after the end-of-text token.
            stop: end before any of these strings; special tokens are part of the text.
            stop_token_ids: ids that end a row, as end-of-text does.
            options: of transformers' `generate`; `max_new_tokens` is required.

        Raises:
            InvalidParameter: an empty prompt, an id out of the vocabulary, too many tokens, a
                stop string without a tokenizer.
        """
        new = options["max_new_tokens"]
        for prompt in prompts:
            check_prompt(prompt, new, self.config.vocab_size, self.max_positions)
        check_vocabulary("stop_token_ids", stop_token_ids, self.config.vocab_size)
        if stop and not self.tokenizer:
            raise InvalidParameter("stop", list(stop), "no stop string without a tokenizer")
        input_ids, mask = self._pad(prompts)
        eos = () if ignore_eos else self.eos_token_ids
        ends = frozenset((*eos, *stop_token_ids))
        stop = (*stop, *self.rules.stop_strings) if self.tokenizer else ()
        rows = [_Row(list(prompt), ends, new, self.tokenizer, stop) for prompt in prompts]
        batch = _Batch(rows, self.rules, eos, self.model.model.group)
        output = self.model.generate(
            input_ids,
            attention_mask=mask,
            eos_token_id=sorted(ends) or None,
            pad_token_id=0,
            logits_processor=[batch.restrict] if self.rules.restricts else [],
            stopping_criteria=[batch.ended] if stop or self.rules.max_time else [],
            **options,
        )
        new_ids = output[:, input_ids.shape[1] :].tolist()
        return [row.finish(ids) for row, ids in zip(rows, new_ids, strict=True)]

    def timed(self, prompts: Seq[Seq[int]], **options: Any) -> tuple[list[FlashOutput], float]:
        """`generate`, and the seconds it took until the device was done."""
        device = self.model.model.device
        device.synchronize()
        start = time.perf_counter()
        outputs = self.generate(prompts, **options)
        device.synchronize()
        return outputs, time.perf_counter() - start

    def next_logits(self, prompts: Seq[Seq[int]]) -> Tensor:
        """Logits [B, V] of the token after each prompt, in one padded batch.

        Raises:
            InvalidParameter: as `generate`.
        """
        for prompt in prompts:
            check_prompt(prompt, 0, self.config.vocab_size, self.max_positions)
        input_ids, mask = self._pad(prompts)
        out = self.model(input_ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        logits = out.logits[:, -1]
        assert isinstance(logits, Tensor)
        return logits

    def _pad(self, prompts: Seq[Seq[int]]) -> tuple[Tensor, Tensor]:
        """input_ids and attention_mask [B, S], padded on the left."""
        longest = max(len(p) for p in prompts)
        ids = [[0] * (longest - len(p)) + list(p) for p in prompts]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        device = self.model.model.device.torch_device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class _Row:
    """One prompt and what it becomes, up to where it ends."""

    def __init__(
        self, prompt: list[int], ends: Container[int], limit: int, tokenizer: Any, stop: Seq[str]
    ) -> None:
        self.prompt, self.ends, self.limit, self.tokenizer = prompt, ends, limit, tokenizer
        self.detokenizer = Detokenizer(tokenizer, stop) if stop else None
        self.token_ids: list[int] = []
        self.reason = ""  # "": it goes on

    def add(self, token_id: int, *, late: bool = False) -> None:
        """Take the next token, if the row has not ended."""
        if not self.reason:
            self.token_ids.append(token_id)
            full = late or len(self.token_ids) >= self.limit
            _, self.reason = extend(self.detokenizer, [token_id], self.ends, full=full)

    def finish(self, new_ids: Seq[int]) -> FlashOutput:
        """What the row became; `new_ids` may go on after its end."""
        for token_id in new_ids[len(self.token_ids) :]:
            self.add(token_id)
        if self.tokenizer is None:
            return FlashOutput(self.token_ids, "", "", self.reason)
        shown = self.token_ids[:-1] if self.token_ids[-1] in self.ends else self.token_ids
        text, full_text = (decode(self.tokenizer, i) for i in (shown, self.prompt + shown))
        if self.detokenizer:  # a stop string may have cut the end off
            full_text = full_text[: len(full_text) - len(text) + len(self.detokenizer.text)]
            text = self.detokenizer.text
        return FlashOutput(self.token_ids, text, full_text, self.reason)


class _Batch:
    """What `generate` calls at each step: the rules before a choice, the ends after it."""

    def __init__(
        self,
        rows: list[_Row],
        rules: GenerationRules,
        eos: Seq[int],
        group: TensorParallelGroup,
    ) -> None:
        self.rows, self.rules, self.eos, self.group = rows, rules, eos, group
        self.width = max(len(row.prompt) for row in rows)
        self.started = time.perf_counter()

    def restrict(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """A logits processor: input_ids [B, padded + new], scores [B, V]."""
        scores = scores.clone()
        for i, row in enumerate(self.rows):
            num_prompt = len(row.prompt)
            token_ids = input_ids[i, self.width - num_prompt :].tolist()
            wanted = self.rules.restrict(token_ids, num_prompt, num_prompt + row.limit, self.eos)
            scores[i] = restrict(scores[i], *wanted)
        return scores

    def ended(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """A stopping criterion; returns [B], true where a row has ended."""
        late = False
        if self.rules.max_time is not None:  # the clock of rank 0 counts
            seconds = time.perf_counter() - self.started
            late = bool(self.group.broadcast_object(seconds > self.rules.max_time))
        for row, token_id in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            row.add(token_id, late=late)
        return torch.tensor([bool(row.reason) for row in self.rows], device=input_ids.device)


def check_prompt(
    prompt: Seq[int], max_new_tokens: int, vocab_size: int, max_positions: int
) -> None:
    """Raise InvalidParameter for a prompt that a batch cannot take."""
    if not prompt:
        raise InvalidParameter("prompt", "", "at least one token")
    check_vocabulary("prompt", prompt, vocab_size)
    if len(prompt) + max_new_tokens > max_positions:
        raise InvalidParameter(
            "max_new_tokens",
            max_new_tokens,
            f"prompt ({len(prompt)} tokens) + new tokens within the model's {max_positions} "
            "positions",
        )
