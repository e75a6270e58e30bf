# SPDX-License-Identifier: Apache-2.0
"""The flash-attention path: `generate` of transformers over whole or cut weights."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptneox.backends.device import Device
from gptneox.checkpoint import rank_directory
from gptneox.config import ModelConfig
from gptneox.engine.detokenizer import decode, load_tokenizer
from gptneox.engine.llm_engine import stop_token_ids
from gptneox.engine.sequence import InvalidParameter, check_vocabulary
from gptneox.parallel import TensorParallelGroup


@dataclass
class FlashOutput:
    """What one row of a batch became; `token_ids` ends with the end-of-text id, if it came."""

    token_ids: list[int]
    text: str  # of the new tokens
    full_text: str  # of prompt and new tokens
    finish_reason: str  # "stop" | "length"


class FlashEngine:
    """A model, its tokenizer and `generate` for left-padded batches."""

    def __init__(
        self, model: Any, config: ModelConfig, tokenizer: Any, eos_token_ids: Seq[int]
    ) -> None:
        """`from_pretrained` makes one."""
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self.eos_token_ids = list(eos_token_ids)

    @classmethod
    def from_pretrained(
        cls,
        model_path: Path,
        device: Device,
        group: TensorParallelGroup,
        *,
        dtype: str = "auto",
        with_tokenizer: bool = True,
    ) -> FlashEngine:
        """Load a checkpoint, or this rank's folder of `model_path/part_model` on several ranks.

        Raises:
            ValueError, FileNotFoundError, RuntimeError: the files are wrong, or memory is short.
        """
        # The adapter itself, not a copy of it beside the weights: nothing there is executed.
        from modeling_gpt_neox_ascend import GPTNeoXForCausalLM

        path = rank_directory(model_path, group, prefer_parts=True)
        config = ModelConfig.from_pretrained(path)
        tokenizer = load_tokenizer(path, config.vocab_size) if with_tokenizer else None
        model = GPTNeoXForCausalLM.from_pretrained(str(path), dtype=dtype, device_map=device.name)
        return cls(model, config, tokenizer, stop_token_ids(path, config, tokenizer))

    @property
    def max_positions(self) -> int:
        """Positions of prompt and answer together."""
        return int(self.model.model.num_positions)

    def generate(
        self, prompts: Seq[Seq[int]], *, ignore_eos: bool = False, **options: Any
    ) -> list[FlashOutput]:
        """One padded batch.

        Args:
            prompts: token ids.
            ignore_eos: go on after the end-of-text token.
            options: of transformers' `generate`; `max_new_tokens` is required.

        Raises:
            InvalidParameter: an empty prompt, an id out of the vocabulary, too many tokens.
        """
        new = options["max_new_tokens"]
        for prompt in prompts:
            self._check(prompt, new)
        input_ids, mask = self._pad(prompts)
        eos = None if ignore_eos or not self.eos_token_ids else self.eos_token_ids
        rows = self.model.generate(
            input_ids, attention_mask=mask, eos_token_id=eos, pad_token_id=0, **options
        )
        outputs = []
        for prompt, row in zip(prompts, rows[:, input_ids.shape[1] :].tolist(), strict=True):
            outputs.append(self._output(list(prompt), row, eos, options.get("stop_strings")))
        return outputs

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
            self._check(prompt, 0)
        input_ids, mask = self._pad(prompts)
        out = self.model(input_ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        logits = out.logits[:, -1]
        assert isinstance(logits, Tensor)
        return logits

    def _check(self, prompt: Seq[int], max_new_tokens: int) -> None:
        if not prompt:
            raise InvalidParameter("prompt", "", "at least one token")
        check_vocabulary("prompt", prompt, self.config.vocab_size)
        if len(prompt) + max_new_tokens > self.max_positions:
            raise InvalidParameter(
                "max_new_tokens",
                max_new_tokens,
                f"prompt ({len(prompt)} tokens) + new tokens within the model's "
                f"{self.max_positions} positions",
            )

    def _pad(self, prompts: Seq[Seq[int]]) -> tuple[Tensor, Tensor]:
        """input_ids and attention_mask [B, S], padded on the left."""
        longest = max(len(p) for p in prompts)
        ids = [[0] * (longest - len(p)) + list(p) for p in prompts]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        device = self.model.model.device.torch_device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _output(
        self, prompt: list[int], row: list[int], eos: list[int] | None, stop: list[str] | None
    ) -> FlashOutput:
        """Cut a row after its first end-of-text id, and its text before a stop string."""
        ends = [i for i, token in enumerate(row) if eos and token in eos]
        new = row[: ends[0] + 1] if ends else row
        reason = "stop" if ends else "length"
        if self.tokenizer is None:
            return FlashOutput(new, "", "", reason)
        text, full_text = decode(self.tokenizer, new), decode(self.tokenizer, prompt + new)
        hits = [i for i in (text.find(s) for s in stop or []) if i >= 0]
        if hits:
            full_text = full_text[: len(full_text) - len(text) + min(hits)]
            text, reason = text[: min(hits)], "stop"
        return FlashOutput(new, text, full_text, reason)
