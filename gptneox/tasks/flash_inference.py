# SPDX-License-Identifier: Apache-2.0
"""`--task inference` on the flash path: three demonstrations, or the user's own prompts."""

from __future__ import annotations

import sys
from collections.abc import Sequence as Seq
from typing import Any, TextIO

import torch

from gptneox.cli import Settings
from gptneox.config.errors import ConfigError
from gptneox.engine.generate import FlashOutput, GenerateEngine
from gptneox.engine.paged import RequestOutput
from gptneox.prompts import encode, make_prompts, read_texts
from gptneox.session import start
from gptneox.tasks.inference import Printer, check_results, write_output_file

WARM_UP_PROMPT = "Hamlet->Shakespeare\nOne Hundred Years of Solitude->"
DEMO_PROMPTS = ("How to learn a new language?", "The CEO of Google is")
DEMO_MAX_NEW_TOKENS, DEMO_REPETITION_PENALTY = 64, 1.1


def run(settings: Settings) -> None:
    """Answer the user's prompts in padded batches, or run the three demonstrations.

    Raises:
        ValueError, OSError, RuntimeError: with a message for the user.
    """
    args = settings.args
    refuse_paged_only(settings)
    check_results(settings)
    device, group = start(settings)
    is_demo = not (args.input_texts or args.input_ids)
    texts = [] if is_demo else read_texts(settings, group)
    engine = GenerateEngine.from_pretrained(
        settings.model_path,
        device,
        group,
        dtype=settings.model.dtype,
        with_tokenizer=args.load_tokenizer,
        max_position_embeddings=settings.engine.max_position_embeddings,
    )
    out = sys.stdout if group.rank == 0 else None
    if is_demo:
        demonstrate(engine, generate_options(settings, engine, demo=True), out)
        return
    prompts = make_prompts(settings, texts, engine.tokenizer)
    options = generate_options(settings, engine, demo=False)
    size = settings.engine.max_batch_size
    outputs: list[FlashOutput] = []
    printer = Printer(prompts, stream=False, out=out, go_on=bool(args.output_file))
    for first in range(0, len(prompts), size):
        batch = [p.ids for p in prompts[first : first + size]]
        for i, done in enumerate(engine.generate(batch, **options), start=first):
            output = RequestOutput(i, done.text, done.token_ids, finished=True)
            output.token_ids = done.token_ids
            printer.add(i, output, engine.tokenizer is not None)
            outputs.append(done)
    if args.output_file and group.rank == 0:
        write_output_file(args.output_file, prompts, outputs)


def refuse_paged_only(settings: Settings) -> None:
    """Raise ConfigError for an option of the paged path."""
    options = {
        "--interactive": settings.args.interactive,
        "--stream": settings.args.stream,
        "ATB_LLM_BENCHMARK_ENABLE": settings.environment.benchmark_enabled,
    }
    for name, given in options.items():
        if given:
            raise ConfigError(f"{name} is not served by the flash path; use --attention paged")


def num_new_tokens(settings: Settings, *, demo: bool) -> int:
    """New tokens per prompt; the demonstrations have a default of their own."""
    if demo and settings.sources["engine"]["max_output_length"] == "default":
        return DEMO_MAX_NEW_TOKENS
    return settings.sampling.max_new_tokens


def generate_options(settings: Settings, engine: GenerateEngine, *, demo: bool) -> dict[str, Any]:
    """Options of transformers' `generate`; every rank draws the same random numbers."""
    params = settings.sampling
    options: dict[str, Any] = {
        "max_new_tokens": num_new_tokens(settings, demo=demo),
        "do_sample": params.temperature > 0,
        "repetition_penalty": params.repetition_penalty,
        "ignore_eos": params.ignore_eos,
        "stop": params.stop,
        "stop_token_ids": params.stop_token_ids,
    }
    if demo and "repetition_penalty" not in settings.given:
        options["repetition_penalty"] = DEMO_REPETITION_PENALTY
    if params.temperature > 0:
        options |= {
            "temperature": params.temperature,
            "top_k": max(params.top_k, 0),
            "top_p": params.top_p,
        }
    torch.manual_seed(1 if params.seed is None else params.seed)
    return options


def demonstrate(engine: GenerateEngine, options: dict[str, Any], out: TextIO | None) -> None:
    """A warm-up, one prompt, and two prompts as a padded batch."""

    def say(text: str) -> None:
        if out:
            print(text, file=out, flush=True)

    def run_batch(title: str, texts: Seq[str]) -> None:
        say(f"---------------{title}---------------")
        prompts = [encode(engine.tokenizer, text, "the prompt") for text in texts]
        outputs, seconds = engine.timed(prompts, **options)
        for i, output in enumerate(outputs):
            if len(texts) > 1:
                say(f"###### batch {i}")
            say(output.full_text)
        say(f"cost {seconds:.2f} s")
        for i, output in enumerate(outputs):
            count = len(output.token_ids)
            row = f"batch {i}: " if len(texts) > 1 else ""
            say(f"{row}generate {count} new tokens，({count / seconds:.2f} tokens/s)")
        if len(texts) > 1:
            total = sum(len(output.token_ids) for output in outputs)
            say(f"all: generate {total} new tokens，({total / seconds:.2f} tokens/s)")

    run_batch("warm-up", [WARM_UP_PROMPT])
    run_batch("inference", DEMO_PROMPTS[:1])
    run_batch("batch", DEMO_PROMPTS)
