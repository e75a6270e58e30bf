# SPDX-License-Identifier: Apache-2.0
"""`generate` of Hugging Face transformers: SDPA attention, dynamic cache, the whole batch at once.

Its own defaults; the only thing added is a stopping criterion that looks at the clock.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import GPTNeoXForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from benchmark.workers.worker import Answer, Load, Worker, serve


class _Clock(StoppingCriteria):
    """Notes the moment of each new token and never stops."""

    def __init__(self, device: str) -> None:
        self.moments: list[float] = []
        self.synchronize: Any = getattr(getattr(torch, device), "synchronize", None)
        self.never: torch.Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        if self.synchronize:
            self.synchronize()
        self.moments.append(time.perf_counter())
        if self.never is None:
            self.never = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return self.never


class HuggingFace(Worker):
    """GPTNeoXForCausalLM as transformers ships it."""

    packages = ("torch", "transformers")
    model: Any
    device: str

    def load(self, load: Load) -> Answer:
        """See `Worker`."""
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self.device = load.device
        if self.device == "cpu":
            torch.set_num_threads(load.threads)
        if self.device == "npu":
            import torch_npu  # noqa: F401  registers the device
        loader: Any = GPTNeoXForCausalLM
        model, info = loader.from_pretrained(
            load.model,
            dtype=getattr(torch, load.dtype),
            output_loading_info=True,
            local_files_only=True,
        )
        if missing := sorted(info["missing_keys"]):
            raise RuntimeError(f"transformers found no weights for {', '.join(missing[:5])}")
        self.model = model.eval().to(self.device)
        self.model.generation_config.eos_token_id = None  # nothing ends early
        self.model.generation_config.pad_token_id = 0  # never used: rows are of one length
        return {"dtype": load.dtype}

    @torch.inference_mode()
    def generate(
        self, prompts: list[list[int]], num_new: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """See `Worker`."""
        clock = _Clock(self.device)
        ids = torch.tensor(prompts, device=self.device)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_new,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return out[:, ids.shape[1] :].tolist(), [clock.moments] * len(prompts)

    def peak_bytes(self) -> int:
        """Of the device where it has memory of its own."""
        if self.device == "cpu":
            return super().peak_bytes()
        return int(getattr(torch, self.device).max_memory_allocated())

    def reset_peak(self) -> None:
        """See `Worker`."""
        if self.device == "cpu":
            super().reset_peak()
        else:
            getattr(torch, self.device).reset_peak_memory_stats()


if __name__ == "__main__":
    serve(HuggingFace())
