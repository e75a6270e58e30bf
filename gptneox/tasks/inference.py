# SPDX-License-Identifier: Apache-2.0
"""`--task inference` on the paged path: prompts in, answers and a short summary out."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import os
import sys
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from gptneox.cli import Settings
from gptneox.engine.generate import FlashOutput
from gptneox.engine.paged import EngineStats, PagedEngine, RequestOutput
from gptneox.engine.sequence import SamplingParams
from gptneox.files import check_writable, lock, write_file
from gptneox.prompts import Prompt, encode, make_prompts, read_texts
from gptneox.session import load_engine, start
from gptneox.terminal import Interrupts, LineEditor

logger = logging.getLogger(__name__)

BENCHMARK_COLUMNS = (
    "batch_size",
    "input_seq_len",
    "output_seq_len",
    "e2e_time(ms)",
    "prefill_time(ms)",
    "decoder_token_time(ms)",
    "prefill_count",
    "prefill_token_times",
    "decode_token_times",
    "max_generate_batch_size",
    "prefill_average_time(ms)",
)


def run(settings: Settings) -> None:
    """Load the model on the paged path, answer every prompt, print the summary.

    Raises:
        ValueError, OSError, RuntimeError: with a message for the user.
    """
    environment = settings.environment
    check_results(settings)
    device, group = start(settings)
    texts = [] if settings.args.interactive else read_texts(settings, group)
    engine = load_engine(settings, device, group)
    if settings.args.interactive:
        interact(engine, settings)
        return
    prompts = make_prompts(settings, texts, engine.tokenizer)
    params = [fit_output_length(settings, engine.max_positions, p) for p in prompts]
    if environment.benchmark_enabled:
        engine.generate([p.ids for p in prompts], [replace(q, max_new_tokens=2) for q in params])
    engine.reset_stats(keep_steps=environment.benchmark_enabled)
    out = sys.stdout if group.rank == 0 else None
    printer = Printer(prompts, settings.args.stream, out, go_on=bool(settings.args.output_file))
    outputs = answer(engine, prompts, params, printer)
    if group.rank > 0:
        return
    with contextlib.ExitStack() as stack:  # each of them, whatever becomes of the others
        stack.callback(print_summary, engine)
        if environment.benchmark_enabled:
            stack.callback(write_benchmark, environment.benchmark_path, engine, prompts, outputs)
        if settings.args.output_file:
            write_output_file(settings.args.output_file, prompts, outputs)


def check_results(settings: Settings) -> None:
    """Refuse files that cannot be written before anything is computed; rank 0 writes them.

    Raises:
        OSError: see `check_writable`.
    """
    environment = settings.environment
    if environment.rank == 0 and settings.args.output_file:
        check_writable(settings.args.output_file)
    if environment.rank == 0 and environment.benchmark_enabled:
        check_writable(_benchmark_file(environment.benchmark_path))


def fit_output_length(settings: Settings, max_positions: int, prompt: Prompt) -> SamplingParams:
    """The request's parameters; a length nobody asked for is capped to the positions left."""
    params = settings.sampling
    left = max_positions - len(prompt.ids)
    if settings.sources["engine"]["max_output_length"] == "default" and left > 0:
        return replace(params, max_new_tokens=min(params.max_new_tokens, left))
    return params


class Printer:
    """Writes answers in the order of the prompts, whole or while they grow."""

    def __init__(
        self, prompts: Seq[Prompt], stream: bool, out: TextIO | None, *, go_on: bool = False
    ) -> None:
        """`out` is None on ranks that print nothing; `go_on` without it when it cannot be written.

        A file that takes the answers, too, must not be lost with the reader of `| head`.
        """
        self.prompts, self.stream, self.out, self.go_on = prompts, stream, out, go_on
        self._texts = [""] * len(prompts)
        self._finished: dict[int, RequestOutput] = {}
        self._current, self._num_shown = 0, -1  # -1: the question is not printed yet

    def add(self, index: int, output: RequestOutput, has_text: bool) -> None:
        """Take a step's output of prompt `index` and print what is due."""
        if has_text:
            self._texts[index] += output.new_text
        else:
            new = ",".join(map(str, output.new_token_ids))
            self._texts[index] += ("," if self._texts[index] and new else "") + new
        if output.finished:
            self._finished[index] = output
        try:
            while self.out and self._current < len(self.prompts) and self._print_current():
                self._current, self._num_shown = self._current + 1, -1
        except OSError:
            if not self.go_on:
                raise
            self.out = None

    def _print_current(self) -> bool:
        """Print the answer whose turn it is as far as possible; True when it is complete."""
        i = self._current
        done = self._finished.get(i)
        if not (self.stream or done) or self.out is None:
            return False
        if self._num_shown < 0:
            print(f"Question[{i}]: {self.prompts[i].shown}", file=self.out)
            print(f"Answer[{i}]: ", end="", file=self.out)
            self._num_shown = 0
        print(self._texts[i][self._num_shown :], end="", file=self.out, flush=True)
        self._num_shown = len(self._texts[i])
        if done:
            print(f"\nGenerate[{i}] token num: ({i}, {len(done.token_ids)})", file=self.out)
        return done is not None


def answer(
    engine: PagedEngine, prompts: Seq[Prompt], params: Seq[SamplingParams], printer: Printer
) -> list[RequestOutput]:
    """Run all prompts; the printer shows them, a progress bar counts them on a terminal."""
    ids = [engine.add_request(p.ids, q) for p, q in zip(prompts, params, strict=True)]
    index = {request_id: i for i, request_id in enumerate(ids)}
    outputs: dict[int, RequestOutput] = {}
    hide = len(prompts) < 4 or printer.out is None or printer.stream or not sys.stderr.isatty()
    with tqdm(total=len(prompts), desc="prompts", leave=False, disable=hide) as bar:
        for output in engine.stream():
            i = index[output.request_id]
            printer.add(i, output, engine.tokenizer is not None)
            if output.finished:
                outputs[i] = output
                bar.update()
    return [outputs[i] for i in range(len(prompts))]


# -- the prompt loop -----------------------------------------------------------------------------


def interact(engine: PagedEngine, settings: Settings) -> None:
    """Read a prompt, stream its continuation, again; every prompt stands alone.

    Ctrl-C stops the answer, not the program; /exit or Ctrl-D ends it.
    """
    group, params = engine.model.group, settings.sampling
    editor = None
    if group.rank == 0:
        editor = LineEditor(settings.environment.state_home)
        print("Each line is continued by the model. Ctrl-C stops an answer, /exit ends.")
    with Interrupts() as interrupts:
        while True:
            text = group.broadcast_object(interrupts.read_line(editor) if editor else None)
            if text is None or text.strip() in ("/exit", "/quit"):
                return
            if not text:
                continue
            try:
                prompt_ids = encode(engine.tokenizer, text, "the prompt")
                request_id = engine.add_request(prompt_ids, params)
            except ValueError as error:
                if group.rank == 0:
                    print(f"error: {error}")
                continue
            _stream_answer(engine, request_id, interrupts)


def _stream_answer(engine: PagedEngine, request_id: int, interrupts: Interrupts) -> None:
    group = engine.model.group
    stopped = False
    for output in engine.stream():
        if group.rank == 0:
            print(output.new_text, end="", flush=True)
        # Every rank must stop at the same step, so rank 0's finger decides.
        stopped = group.broadcast_object(interrupts.noted)
        if stopped:
            engine.abort(request_id)
    interrupts.noted = False
    if group.rank == 0:
        print(" [stopped]" if stopped else "")


# -- results -------------------------------------------------------------------------------------


def write_output_file(
    path: Path, prompts: Seq[Prompt], outputs: Seq[RequestOutput | FlashOutput]
) -> None:
    """JSON lines, complete or not there at all.

    Raises:
        OSError: see `write_file`.
    """
    lines = []
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        record = {
            "index": i,
            "prompt": prompt.shown,
            "prompt_ids": prompt.ids,
            "text": output.text,
            "token_ids": output.token_ids,
            "finish_reason": output.finish_reason,
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_file(path, "".join(lines))


def benchmark_row(
    stats: EngineStats, batch_size: int, prompts: Seq[Prompt], outputs: Seq[RequestOutput]
) -> dict[str, str]:
    """Times in ms with two decimals; lengths are those of the longest request."""
    assert stats.steps is not None, "step times were not kept"
    prefill = [s.seconds for s in stats.steps if s.num_prefill_tokens]
    decode = [s.seconds for s in stats.steps if not s.num_prefill_tokens]
    output_len = max(len(o.token_ids) for o in outputs)
    per_token = sum(decode) / (output_len - 1) if output_len > 1 else 0.0
    values = (
        str(len(prompts)),
        str(max(len(p.ids) for p in prompts)),
        str(output_len),
        f"{(sum(prefill) + sum(decode)) * 1e3:.2f}",
        f"{sum(prefill) * 1e3:.2f}",
        f"{per_token * 1e3:.2f}",
        str(len(prefill)),
        ",".join(f"{s:.6f}" for s in prefill),
        ",".join(f"{s:.6f}" for s in decode),
        str(batch_size),
        f"{sum(prefill) / len(prompts) * 1e3:.2f}",
    )
    return dict(zip(BENCHMARK_COLUMNS, values, strict=True))


def _benchmark_file(path: str) -> Path:
    return Path(path or "benchmark_result/benchmark.csv")


def write_benchmark(
    path: str, engine: PagedEngine, prompts: Seq[Prompt], outputs: Seq[RequestOutput]
) -> None:
    """Write ATB_LLM_BENCHMARK_FILEPATH anew, or add a row to ./benchmark_result/benchmark.csv.

    The default file is shared by all runs in a directory: rows are added under a lock, so that
    runs side by side lose nothing.
    """
    row = benchmark_row(engine.stats, engine.settings.max_batch_size, prompts, outputs)
    target, text = _benchmark_file(path), io.StringIO()
    writer = csv.DictWriter(text, BENCHMARK_COLUMNS)
    writer.writeheader()
    header = text.getvalue()
    writer.writerow(row)
    if path or (target.exists() and not target.is_file()):
        write_file(target, text.getvalue())
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a", encoding="utf-8", newline="") as file:
            lock(file, wait=True)
            is_new = file.seek(0, os.SEEK_END) == 0
            file.write(text.getvalue() if is_new else text.getvalue().removeprefix(header))
    logger.info("benchmark written to %s", target)


def print_summary(engine: PagedEngine) -> None:
    """Prefill and decode speed, and the share of the memory bandwidth that decoding reached."""
    stats, size = engine.stats, engine.model.size
    if stats.prefill_s:
        rate = stats.num_prefill_tokens / stats.prefill_s
        print(
            f"prefill: {stats.num_prefill_tokens} tokens, {rate:.1f} tokens/s, "
            f"{stats.prefill_s * 1e3:.1f} ms"
        )
    if not stats.decode_s:
        return
    # Bytes one rank reads: its part of the weights once per step, and the cached K and V.
    read = stats.num_decode_steps * size.decode_weight_bytes
    read += stats.num_decode_context_tokens * size.token_bytes
    achieved = read / stats.decode_s
    limit = engine.model.device.measure_bandwidth()
    print(
        f"decode: {stats.num_decode_tokens} tokens, "
        f"{stats.num_decode_tokens / stats.decode_s:.1f} tokens/s, "
        f"{stats.decode_s / stats.num_decode_steps * 1e3:.2f} ms per step, "
        f"{achieved / 1e9:.1f} GB/s = {achieved / limit:.0%} of the "
        f"{limit / 1e9:.1f} GB/s measured memory bandwidth"
    )
