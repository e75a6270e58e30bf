# SPDX-License-Identifier: Apache-2.0
"""This toolkit's paged engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from random import Random

from benchmark.engines import QUANTIZED
from benchmark.workers.worker import Answer, Load, SteppingWorker, serve
from gptneox.config.model import ModelConfig
from gptneox.config.settings import EngineSection, QuantizeOptions, merge_section
from gptneox.devices import select
from gptneox.devices.device import Device
from gptneox.engine.paged import PagedEngine
from gptneox.engine.sequence import SamplingParams

SAMPLE_TOKENS = 512  # random ones, for the schemes that look at inputs


class Ours(SteppingWorker):
    """The paged engine without a tokenizer and without the prefix cache."""

    packages = ("torch",)
    device: Device
    engine: PagedEngine

    def convert(self, model: Path, target: Path, dtype: str, weights: str) -> None:
        """See `Worker`; by the task quantize, whose result lies in a folder of its own."""
        from gptneox.weights.quantize import quantize_checkpoint

        config = ModelConfig.from_pretrained(model)
        length = min(SAMPLE_TOKENS, config.max_position_embeddings)
        random = Random(0)
        texts = [
            [random.randrange(1, config.vocab_size) for _ in range(length)]
            for _ in range(-(-SAMPLE_TOKENS // length))
        ]
        quantize_checkpoint(
            model,
            target / QUANTIZED,
            QuantizeOptions(quant_type=weights),
            lambda report: None,
            texts if weights.startswith("w8a8") else (),
        )

    def load(self, load: Load) -> Answer:
        """See `Worker`."""
        self.device = select(load.device)
        self.device.setup(0, num_threads=load.threads)
        self.engine = PagedEngine.from_pretrained(
            load.converted / QUANTIZED if load.converted else load.model,
            engine_section(load),
            self.device,
            dtype=load.dtype,
            with_tokenizer=False,
        )
        answer = {
            "dtype": str(self.engine.dtype).removeprefix("torch."),
            "kv_cache_dtype": self.engine.settings.kv_cache_dtype,
        }
        return answer | ({"weights": load.weights} if load.weights else {})

    def add(self, prompt: list[int], num_new: int) -> int:
        """See `SteppingWorker`."""
        params = SamplingParams(max_new_tokens=num_new, ignore_eos=True)
        return self.engine.add_request(prompt, params)

    def step(self) -> Sequence[tuple[int, list[int]]]:
        """See `SteppingWorker`."""
        return [(output.request_id, output.new_token_ids) for output in self.engine.step()]

    def peak_bytes(self) -> int:
        """Of the device where it has memory of its own."""
        if self.device.torch_device.type == "cpu":
            return super().peak_bytes()
        return self.device.memory().peak


def engine_section(load: Load) -> EngineSection:
    """[engine] with room for every case, all of its rows side by side, and what variables set.

    Blocks are counted here because the module that could do it loads transformers, whose memory
    would then be this engine's.
    """
    size = EngineSection().block_size
    # One spare block for each row but the first: so many does the scheduler keep.
    blocks = [batch * -(-(p + o) // size) + batch - 1 for batch, p, o in load.cases]
    values = {
        "max_batch_size": load.max_batch,
        "max_input_length": max(prompt for _, prompt, _ in load.cases),
        "max_output_length": max(output for _, _, output in load.cases),
        "max_prefill_tokens": load.prefill_tokens,
        "num_blocks": max(blocks),
        "enable_prefix_caching": False,
    }
    return merge_section(EngineSection, values, {})[0]


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    serve(Ours())
