# SPDX-License-Identifier: Apache-2.0
"""What this toolkit's engine spends beside the model: in a decode step, and on a long queue."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from benchmark.workers.ours import Ours
from benchmark.workers.worker import Answer, Load, serve
from gptneox.config.model import ModelConfig
from gptneox.config.settings import EngineSection
from gptneox.engine.detokenizer import Detokenizer
from gptneox.engine.paged import PagedEngine
from gptneox.engine.runner import StepResult
from gptneox.engine.scheduler import Scheduled, Scheduler
from gptneox.engine.sequence import SamplingParams
from gptneox.model import GPTNeoX
from gptneox.weights.load import size_of

# A model as small as can be: it is never run.
_FAKE = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    num_layers=1,
    num_heads=1,
    intermediate_size=16,
    max_position_embeddings=512,
    rotary_dim=4,
)


class Overhead(Ours):
    """The engine with stopwatches around its parts."""

    def load(self, load: Load) -> Answer:
        """See `Worker`; with a tokenizer, since text is made in every step."""
        answer = super().load(load)
        self.engine.tokenizer = word_tokenizer(self.engine.model.config.vocab_size)
        return answer

    def overhead(self, batch: int, prompt: int, output: int) -> Answer:
        """Median of each part over the decode steps of two runs, after one to warm up."""
        generator = random.Random(0)
        vocab_size = self.engine.model.config.vocab_size
        steps: list[dict[str, float]] = []
        with _stopwatches() as taken:
            for is_measured in (False, True, True):
                for _ in range(batch):
                    self.add([generator.randrange(1, vocab_size) for _ in range(prompt)], output)
                found = self._time_steps(taken)
                steps += found if is_measured else []
        parts_ms = {name: median(step[name] for step in steps) * 1e3 for name in steps[0]}
        return {
            "batch": batch,
            "context": prompt + output // 2,
            "steps": len(steps),
            "total_ms": sum(parts_ms.values()),
            "parts_ms": parts_ms,
        }

    def _time_steps(self, taken: dict[str, float]) -> list[dict[str, float]]:
        """Every decode step, in seconds by part."""
        engine, steps = self.engine, []
        engine.reset_stats(keep_steps=True, measure=True)  # waits for the device after the model
        assert engine.stats.steps is not None, "steps are kept"
        while engine.has_work:
            taken.update(dict.fromkeys(taken, 0.0))
            start = time.perf_counter()
            engine.step()
            total = time.perf_counter() - start
            stats = engine.stats.steps[-1]
            if not stats.num_prefill_tokens:
                parts = {"schedule": taken["schedule"], "prepare": stats.prepare_s}
                parts["model"] = stats.forward_s
                parts["sample"] = stats.seconds - stats.prepare_s - stats.forward_s
                parts["detokenize"] = taken["detokenize"]
                parts["rest"] = total - sum(parts.values())
                steps.append(parts)
        return steps

    def queue(self, sizes: list[int]) -> Answer:
        """Queue many requests at once and run them to their end, with a model that does nothing."""
        self.queue_once(sizes[0] // 10)  # warm up
        return {"queue": [self.queue_once(size) for size in sizes]}

    def queue_once(self, count: int) -> dict[str, float]:
        """Prompts of 16 to 128 tokens, answers of 4 to 16, 32 at once; in processor time."""
        section = EngineSection(max_batch_size=32, max_prefill_tokens=2048, num_blocks=128)
        model, dtype = GPTNeoX(_FAKE, self.device), self.engine.dtype
        model.size = size_of(model, {}, dtype)
        engine = PagedEngine(model, section)

        def pretend(scheduled: list[Scheduled], **_: bool) -> StepResult:
            return StepResult([[1] * len(item.sample_rows) for item in scheduled], {})

        generator = random.Random(0)
        requests = []
        for _ in range(count):
            length, num_new = generator.randint(16, 128), generator.randint(4, 16)
            prompt = [generator.randrange(1, _FAKE.vocab_size) for _ in range(length)]
            requests.append((prompt, SamplingParams(max_new_tokens=num_new, ignore_eos=True)))
        engine.runner.run = pretend  # type: ignore[method-assign]
        start = time.process_time()
        for prompt, params in requests:
            engine.add_request(prompt, params)
        queued = time.process_time()
        for _ in engine.stream():
            pass
        end = time.process_time()
        return {"requests": count, "add_s": queued - start, "steps_s": end - queued}


@contextmanager
def _stopwatches() -> Iterator[dict[str, float]]:
    """Seconds that parts of a step take add up in what is yielded."""
    taken = dict.fromkeys(("schedule", "detokenize"), 0.0)

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                taken[name] += time.perf_counter() - start

        return run

    places: tuple[tuple[str, type, str], ...] = (
        ("schedule", Scheduler, "schedule"),
        ("detokenize", Detokenizer, "add"),
    )
    originals = [getattr(place, method) for _, place, method in places]
    try:
        for (name, place, method), original in zip(places, originals, strict=True):
            setattr(place, method, timed(name, original))
        yield taken
    finally:
        for (_, place, method), original in zip(places, originals, strict=True):
            setattr(place, method, original)


def word_tokenizer(vocab_size: int) -> Any:
    """A tokenizer in which every id is a short word."""
    vocabulary = {f"t{i} ": i for i in range(vocab_size)}
    model = models.WordLevel(vocabulary, unk_token="t0 ")
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=Tokenizer(model))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    serve(Overhead())
