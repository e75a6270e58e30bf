# SPDX-License-Identifier: Apache-2.0
"""`--task inference`: prompts in, answers and a short summary out."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import TextIO

from tqdm import tqdm

from gptneox import chat
from gptneox.cli import Settings
from gptneox.cluster.plan import need_ray
from gptneox.engine.api import Completion, Engine, check_request, raise_failure
from gptneox.engine.detokenizer import decode, load_tokenizer
from gptneox.engine.paged import PagedEngine
from gptneox.engine.sequence import SamplingParams
from gptneox.evaluation.fingerprint import content_hash, model_files
from gptneox.output import (
    KeptAnswers,
    Printer,
    check_results,
    print_summary,
    write_benchmark,
    write_output_file,
)
from gptneox.parallel import TensorParallelGroup
from gptneox.prompts import (
    DEMO_PROMPTS,
    WARM_UP_PROMPT,
    Prompt,
    demo_params,
    encode,
    fit_output_length,
    is_demonstration,
    make_prompts,
    read_texts,
)
from gptneox.session import load_engine, refuse_float, refuse_paged_only, start
from gptneox.weights.load import check_weights, find_part


def run(settings: Settings) -> None:
    """Load the model, answer every prompt, print the summary; or the prompt loop.

    The flash path without prompts of the user gives three demonstrations.

    Raises:
        ValueError, OSError, RuntimeError: with a message for the user.
    """
    args, environment = settings.args, settings.environment
    is_demo = is_demonstration(settings)
    refuse_paged_only(settings)
    check_results(settings)
    if args.ray:
        _run_in_cluster(settings)
        return
    device, group = start(settings)
    texts = [] if args.interactive or is_demo else read_texts(settings, group)
    section = settings.engine
    if is_demo:
        section = replace(section, max_batch_size=len(DEMO_PROMPTS))
    if environment.benchmark_enabled:  # the warm-up must not have computed the prompts
        section = replace(section, enable_prefix_caching=False)
    engine = load_engine(settings, device, group, section)
    if args.interactive:
        assert isinstance(engine, PagedEngine)
        chat.run(engine, settings)
        return
    out = sys.stdout if group.rank == 0 else None
    if is_demo:
        demonstrate(engine, demo_params(settings), out)
        return
    prompts, wishes = make_prompts(settings, texts, engine.tokenizer)
    params = [fit_output_length(settings, engine.max_positions, p, wishes) for p in prompts]
    if environment.benchmark_enabled:
        first = [
            replace(q, max_new_tokens=min(2, q.max_new_tokens), min_new_tokens=0) for q in params
        ]
        engine.generate([p.ids for p in prompts], first)
    engine.reset_stats(keep_steps=environment.benchmark_enabled)
    printer = Printer(prompts, args.stream, out, go_on=bool(args.output_file))
    completions = answer(engine, prompts, params, printer)
    with contextlib.ExitStack() as stack:  # each of them, whatever becomes of the others
        stack.callback(group.barrier)  # a rank that ended with an error would end the writing one
        if group.rank == 0 and isinstance(engine, PagedEngine):
            stack.callback(print_summary, engine)
        if group.rank == 0 and environment.benchmark_enabled:
            stack.callback(
                write_benchmark, environment.benchmark_path, engine, prompts, completions
            )
        if group.rank == 0 and args.output_file:
            write_output_file(args.output_file, prompts, completions)
    raise_failure(completions)


def answer(
    engine: Engine, prompts: Seq[Prompt], params: Seq[SamplingParams], printer: Printer
) -> list[Completion]:
    """Run all prompts; the printer shows them, a progress bar counts them on a terminal."""
    done: dict[int, Completion] = {}
    hide = len(prompts) < 4 or printer.out is None or printer.stream or not sys.stderr.isatty()
    with tqdm(total=len(prompts), desc="prompts", leave=False, disable=hide) as bar:
        for i, completion in engine.complete([p.ids for p in prompts], params):
            printer.add(i, completion, engine.tokenizer is not None)
            if completion.finished:
                done[i] = completion
                bar.update()
    return [done[i] for i in range(len(prompts))]


# -- in a cluster --------------------------------------------------------------------------------


def _run_in_cluster(settings: Settings) -> None:
    """The same prompts, each computed by one of several replicas.

    With --output_file an interrupted run goes on where it was.
    """
    need_ray()
    from gptneox.cluster.offline import ModelPlace, answer_prompts, first_rank, spread

    args, started = settings.args, time.perf_counter()
    group = TensorParallelGroup()
    path, config = find_part(settings.model_path, first_rank(args.tp))
    place = ModelPlace.of(settings, config)
    if settings.environment.is_quant:
        refuse_float(settings, check_weights(path, config))
    positions = config.positions(place.positions)
    tokenizer = None
    if args.load_tokenizer:
        tokenizer = load_tokenizer(
            path, config.vocab_size, trust_remote_code=args.trust_remote_code
        )
    prompts, wishes = make_prompts(settings, read_texts(settings, group), tokenizer)
    params = [fit_output_length(settings, positions, p, wishes) for p in prompts]
    requests = [(prompt.ids, each) for prompt, each in zip(prompts, params, strict=True)]
    has_tokenizer = tokenizer is not None
    for ids, each in requests:
        check_request(ids, each, config.vocab_size, positions, has_tokenizer=has_tokenizer)
    run = [
        place.dtype,
        content_hash(model_files(path)),
        [(ids, str(each)) for ids, each in requests],
    ]
    with KeptAnswers(args.output_file, run) as kept:
        done = dict(kept.done)
        printer = Printer(prompts, False, sys.stdout, go_on=bool(args.output_file))
        for i, completion in done.items():
            printer.add(i, completion, has_tokenizer)
        todo = [i for i in range(len(prompts)) if i not in done]
        size = settings.engine.max_batch_size
        pieces = [(i, todo[i : i + size]) for i in range(0, len(todo), size)]
        work = [(key, [requests[i] for i in indices]) for key, indices in pieces]
        places = dict(pieces)
        hide = not sys.stderr.isatty()
        with tqdm(total=len(prompts), initial=len(done), desc="prompts", disable=hide) as bar:
            for key, completions in spread(settings, place, answer_prompts, work):
                for i, completion in zip(places[key], completions, strict=True):
                    done[i] = completion
                    kept.add(i, completion)
                    printer.add(i, completion, has_tokenizer)
                    bar.update()
        completions = [done[i] for i in range(len(prompts))]
        seconds, num_new = time.perf_counter() - started, sum(len(done[i].token_ids) for i in todo)
        print(f"{len(todo)} prompts, {num_new} tokens in {seconds:.1f} s by {args.ray} replica(s)")
        if args.output_file:
            write_output_file(args.output_file, prompts, completions)
        raise_failure(completions)
        kept.remove()


# -- the demonstrations of the flash path --------------------------------------------------------


def demonstrate(engine: Engine, params: SamplingParams, out: TextIO | None) -> None:
    """A warm-up, one prompt, and two prompts as a padded batch.

    Raises:
        RequestFailed: the model's output is NaN or infinite.
    """

    def say(text: str) -> None:
        if out:
            print(text, file=out, flush=True)

    def run_batch(title: str, texts: Seq[str], params: SamplingParams) -> None:
        say(f"---------------{title}---------------")
        prompts = [encode(engine.tokenizer, text, "the prompt") for text in texts]
        engine.device.synchronize()
        started = time.perf_counter()
        completions = engine.generate(prompts, params)
        engine.device.synchronize()
        seconds = time.perf_counter() - started
        raise_failure(completions)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if len(texts) > 1:
                say(f"###### batch {i}")
            say(_with_prompt(engine, prompt, completion, params))
        say(f"cost {seconds:.2f} s")
        for i, completion in enumerate(completions):
            count = len(completion.token_ids)
            row = f"batch {i}: " if len(texts) > 1 else ""
            say(f"{row}generate {count} new tokens，({count / seconds:.2f} tokens/s)")
        if len(texts) > 1:
            total = sum(len(completion.token_ids) for completion in completions)
            say(f"all: generate {total} new tokens，({total / seconds:.2f} tokens/s)")

    run_batch("warm-up", [WARM_UP_PROMPT], params)
    params = replace(params, seed=None)  # the random numbers go on
    run_batch("inference", DEMO_PROMPTS[:1], params)
    run_batch("batch", DEMO_PROMPTS, params)


def _with_prompt(
    engine: Engine, prompt: list[int], completion: Completion, params: SamplingParams
) -> str:
    """Prompt and answer decoded together, so that no blank between them is lost."""
    new = completion.token_ids
    if new and new[-1] in (*engine.eos_token_ids, *params.stop_token_ids):
        new = new[:-1]
    both, alone = (decode(engine.tokenizer, ids) for ids in (prompt + new, new))
    # A stop string may have cut the end off.
    return both[: len(both) - len(alone) + len(completion.text)]
