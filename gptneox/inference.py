# SPDX-License-Identifier: Apache-2.0
"""`--task inference` on the paged path: prompts in, answers and a short summary out."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import logging
import os
import select as posix_select
import signal
import sys
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from gptneox.backends import select
from gptneox.backends.binding import bind
from gptneox.backends.device import Device
from gptneox.cli import DEFAULT_PROMPT, Settings
from gptneox.config import ConfigError
from gptneox.engine.flash_engine import FlashOutput
from gptneox.engine.llm_engine import EngineStats, LLMEngine, RequestOutput
from gptneox.engine.sequence import SamplingParams
from gptneox.parallel import TensorParallelGroup, init_group

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


@dataclass(frozen=True)
class Prompt:
    """One input: its ids, and how it is shown."""

    ids: list[int]
    shown: str


def start(settings: Settings) -> tuple[Device, TensorParallelGroup]:
    """Choose the device, join the other ranks, say the settings once."""
    device = select(settings.model.device)
    environment = settings.environment
    device.setup(environment.local_rank, environment.local_world_size, environment.omp_num_threads)
    if settings.model.bind_cpu:
        rank, ranks = environment.local_rank, environment.local_world_size
        bind(device.choose_cores(rank, ranks, environment.cpu_binding_num))
    collectives = device.collectives(settings.model.parallel_backend)
    group = init_group(environment.rank, environment.world_size, collectives)
    for line in settings.describe():
        logger.info(line)
    return device, group


def run(settings: Settings) -> None:
    """Load the model on the paged path, answer every prompt, print the summary.

    Raises:
        ValueError, OSError, RuntimeError: with a message for the user.
    """
    environment = settings.environment
    device, group = start(settings)
    engine = load_engine(settings, device, group)
    if settings.args.interactive:
        interact(engine, settings.sampling)
        return
    prompts = read_prompts(settings, engine.tokenizer)
    params = [fit_output_length(settings, engine, p) for p in prompts]
    if environment.benchmark_enabled:
        engine.generate([p.ids for p in prompts], [replace(q, max_new_tokens=2) for q in params])
    engine.reset_stats(keep_steps=environment.benchmark_enabled)
    printer = Printer(prompts, settings.args.stream, sys.stdout if group.rank == 0 else None)
    outputs = answer(engine, prompts, params, printer)
    if group.rank > 0:
        return
    if settings.args.output_file:
        write_output_file(settings.args.output_file, prompts, outputs)
    if environment.benchmark_enabled:
        path = write_benchmark(environment.benchmark_path, engine, prompts, outputs)
        logger.info("benchmark written to %s", path)
    print_summary(engine)


def load_engine(settings: Settings, device: Device, group: TensorParallelGroup) -> LLMEngine:
    """The engine of this rank, with its model loaded."""
    start = time.perf_counter()
    engine = LLMEngine.from_pretrained(
        settings.model_path,
        settings.engine,
        device,
        dtype=settings.model.dtype,
        group=group,
        with_tokenizer=settings.args.load_tokenizer,
        trust_remote_code=settings.args.trust_remote_code,
        show_progress=True,
    )
    logger.info(
        "loaded %s in %.1f s: %s on %s, %d KV-cache blocks of %d tokens",
        settings.model_path,
        time.perf_counter() - start,
        str(engine.dtype).removeprefix("torch."),
        device.describe(),
        engine.block_manager.num_blocks,
        engine.settings.block_size,
    )
    return engine


def read_prompts(settings: Settings, tokenizer: Any) -> list[Prompt]:
    """--input_ids if given, else --input_texts; a text that names a file stands for its content.

    Raises:
        ConfigError: a text is empty or not valid Unicode.
    """
    args = settings.args
    if args.input_ids:
        return [Prompt(ids, ",".join(map(str, ids))) for ids in args.input_ids]
    prompts = []
    for i, text in enumerate(args.input_texts or [DEFAULT_PROMPT]):
        content = _file_content(text)
        content = text if content is None else content
        prompts.append(Prompt(encode(tokenizer, content, f"prompt {i}"), content))
    return prompts


def _file_content(text: str) -> str | None:
    """What the file called `text` holds, None when there is none."""
    try:
        if not Path(text).is_file():
            return None
    except (OSError, ValueError):  # too long for a name, a NUL byte: an ordinary text
        return None
    try:
        return Path(text).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"file {text} is not UTF-8: {error.reason} at byte {error.start}; convert it first"
        ) from error


def encode(tokenizer: Any, text: str, what: str) -> list[int]:
    """Token ids of a prompt, without added special tokens.

    Raises:
        ConfigError: empty, or not valid Unicode.
    """
    if not text:
        raise ConfigError(f"{what} is empty; give a text, or --input_ids 0 to start from nothing")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{what} is not valid Unicode: {error.reason} at {error.start}"
        ) from error
    return list(tokenizer.encode(text, add_special_tokens=False))


def fit_output_length(settings: Settings, engine: LLMEngine, prompt: Prompt) -> SamplingParams:
    """The request's parameters; a length nobody asked for is capped to the positions left."""
    params = settings.sampling
    left = engine.max_positions - len(prompt.ids)
    if settings.sources["engine"]["max_output_length"] == "default" and left > 0:
        return replace(params, max_new_tokens=min(params.max_new_tokens, left))
    return params


class Printer:
    """Writes answers in the order of the prompts, whole or while they grow."""

    def __init__(self, prompts: Seq[Prompt], stream: bool, out: TextIO | None) -> None:
        """`out` is None on ranks that print nothing."""
        self.prompts, self.stream, self.out = prompts, stream, out
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
        while self.out and self._current < len(self.prompts) and self._print_current():
            self._current, self._num_shown = self._current + 1, -1

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
    engine: LLMEngine, prompts: Seq[Prompt], params: Seq[SamplingParams], printer: Printer
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


class Interrupts:
    """Ctrl-C during the prompt loop: it ends the reading of a line, anything else only notes it.

    So a step is never torn in the middle, and no moment of the loop lets it end the program.
    """

    def __init__(self) -> None:
        self.noted = False
        self._reading = False
        self._before: Any = None
        self._wake = self._woken = -1  # the two ends of a pipe that every signal writes to
        self._wake_before = -1

    def __enter__(self) -> Interrupts:
        self._woken, self._wake = os.pipe()
        for end in (self._woken, self._wake):
            os.set_blocking(end, False)
        self._wake_before = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)
        signal.set_wakeup_fd(self._wake_before)
        os.close(self._wake)
        os.close(self._woken)

    def _handle(self, *_: object) -> None:
        if self._reading:
            raise KeyboardInterrupt
        self.noted = True

    def _wait_for_line(self) -> None:
        """Return when a line is there, so that `input` need not wait.

        Python's handler of a signal that comes just before `input` waits would run only after
        the wait. Here such a signal has written to the pipe, and the wait ends at once.
        """
        if not sys.stdin.isatty():
            return
        while sys.stdin not in posix_select.select([sys.stdin, self._woken], [], [])[0]:
            with contextlib.suppress(BlockingIOError):
                os.read(self._woken, 4096)

    def read_line(self) -> str | None:
        """One line from the user; None at the end of the input."""
        while True:
            # input() itself would ask on stderr, among the log lines
            print("> ", end="", flush=True)
            try:
                self._reading = True
                if self.noted:
                    raise KeyboardInterrupt
                self._wait_for_line()
                return input()
            except UnicodeDecodeError as error:
                self._reading = False
                print(f"error: the line is not UTF-8: {error.reason} at byte {error.start}")
            except EOFError:
                self._reading = False
                print()
                return None
            except KeyboardInterrupt:
                self._reading = self.noted = False
                print("\n(/exit or Ctrl-D ends)")
            finally:
                self._reading = False


def interact(engine: LLMEngine, params: SamplingParams) -> None:
    """Read a prompt, stream its continuation, again; every prompt stands alone.

    Ctrl-C stops the answer, not the program; /exit or Ctrl-D ends it.
    """
    group = engine.model.group
    if group.rank == 0:
        print("Each line is continued by the model. Ctrl-C stops an answer, /exit ends.")
    with Interrupts() as interrupts:
        while True:
            text = group.broadcast_object(interrupts.read_line() if group.rank == 0 else None)
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


def _stream_answer(engine: LLMEngine, request_id: int, interrupts: Interrupts) -> None:
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
    """JSON lines, complete or not there at all."""
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
    replace_file(path, "".join(lines))


def replace_file(path: Path, text: str) -> None:
    """Write through a temporary sibling, so that a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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


def write_benchmark(
    path: str, engine: LLMEngine, prompts: Seq[Prompt], outputs: Seq[RequestOutput]
) -> Path:
    """Write ATB_LLM_BENCHMARK_FILEPATH anew, or add a row to ./benchmark_result/benchmark.csv.

    The default file is shared by all runs in a directory: rows are added under a lock, so that
    runs side by side lose nothing.
    """
    row = benchmark_row(engine.stats, engine.settings.max_batch_size, prompts, outputs)
    target = Path(path or "benchmark_result/benchmark.csv")
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a+", encoding="utf-8", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if path:
            file.truncate(0)
        writer = csv.DictWriter(file, BENCHMARK_COLUMNS)
        if file.seek(0, os.SEEK_END) == 0:
            writer.writeheader()
        writer.writerow(row)
    return target


def print_summary(engine: LLMEngine) -> None:
    """Prefill and decode speed, and the share of the memory bandwidth that decoding reached."""
    stats, config = engine.stats, engine.model.config
    if stats.prefill_s:
        rate = stats.num_prefill_tokens / stats.prefill_s
        print(
            f"prefill: {stats.num_prefill_tokens} tokens, {rate:.1f} tokens/s, "
            f"{stats.prefill_s * 1e3:.1f} ms"
        )
    if not stats.decode_s:
        return
    # Bytes one rank reads: its part of the weights once per step, and the cached K and V.
    ranks, itemsize = engine.model.group.world_size, engine.dtype.itemsize
    read = stats.num_decode_steps * config.num_decode_parameters * itemsize / ranks
    read += stats.num_decode_context_tokens * config.kv_bytes_per_token(itemsize, ranks)
    achieved = read / stats.decode_s
    limit = engine.model.device.measure_bandwidth()
    print(
        f"decode: {stats.num_decode_tokens} tokens, "
        f"{stats.num_decode_tokens / stats.decode_s:.1f} tokens/s, "
        f"{stats.decode_s / stats.num_decode_steps * 1e3:.2f} ms per step, "
        f"{achieved / 1e9:.1f} GB/s = {achieved / limit:.0%} of the "
        f"{limit / 1e9:.1f} GB/s measured memory bandwidth"
    )
