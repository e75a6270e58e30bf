# SPDX-License-Identifier: Apache-2.0
"""Answers on the terminal and in files, and the summary of a run."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, TextIO

from gptneox.cli import Settings
from gptneox.config.errors import ConfigError
from gptneox.engine.api import Completion, Engine, EngineStats
from gptneox.evaluation.report import share
from gptneox.evaluation.timing import read_limit
from gptneox.files import check_writable, lock, write_file
from gptneox.prompts import Prompt

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


def check_results(settings: Settings) -> None:
    """Refuse result files that cannot be written, before anything is computed.

    Raises:
        OSError: see `check_writable`.
    """
    environment = settings.environment
    if environment.rank == 0 and settings.args.output_file:
        check_writable(settings.args.output_file)
    if environment.rank == 0 and environment.benchmark_enabled:
        check_writable(_benchmark_file(environment.benchmark_path))


class Printer:
    """Prints answers in prompt order, complete or as a stream."""

    def __init__(
        self, prompts: Seq[Prompt], stream: bool, out: TextIO | None, *, go_on: bool = False
    ) -> None:
        """Set the prompts and where to print.

        Args:
            prompts: in the order of the answers.
            stream: print answers while they grow.
            out: None on ranks that print nothing.
            go_on: stop printing when writing fails, instead of raising: with --output_file a
                reader such as `| head` may close the pipe early.
        """
        self.prompts, self.stream, self.out, self.go_on = prompts, stream, out, go_on
        self._texts = [""] * len(prompts)
        self._finished: dict[int, Completion] = {}
        self._current, self._num_printed = 0, -1  # -1: the question is not printed yet

    def add(self, index: int, output: Completion, has_text: bool) -> None:
        """Add a step's output of prompt `index` and print as far as the order allows."""
        if has_text:
            self._texts[index] += output.new_text
        else:
            new = ",".join(map(str, output.new_token_ids))
            self._texts[index] += ("," if self._texts[index] and new else "") + new
        if output.finished:
            self._finished[index] = output
        try:
            while self.out and self._current < len(self.prompts) and self._print_current():
                self._current, self._num_printed = self._current + 1, -1
        except OSError:
            if not self.go_on:
                raise
            self.out = None

    def _print_current(self) -> bool:
        """Print the new part of the current answer; True when it is complete."""
        i = self._current
        completion = self._finished.get(i)
        if not (self.stream or completion) or self.out is None:
            return False
        if completion and completion.error and self._num_printed < 0:
            return True  # no answer to print; the run ends with the error
        if self._num_printed < 0:
            print(f"Question[{i}]: {self.prompts[i].display}", file=self.out)
            print(f"Answer[{i}]: ", end="", file=self.out)
            self._num_printed = 0
        print(self._texts[i][self._num_printed :], end="", file=self.out, flush=True)
        self._num_printed = len(self._texts[i])
        if completion:
            print(f"\nGenerate[{i}] token num: ({i}, {len(completion.token_ids)})", file=self.out)
        return completion is not None


def write_output_file(path: Path, prompts: Seq[Prompt], outputs: Seq[Completion]) -> None:
    """Write all completions as JSON lines; an existing file is replaced atomically.

    Raises:
        OSError: see `write_file`.
    """
    lines = []
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        record = {
            "index": i,
            "prompt": prompt.display,
            "prompt_ids": prompt.ids,
            "text": output.text,
            "token_ids": output.token_ids,
            "finish_reason": output.finish_reason,
        }
        if output.error:
            record["error"] = output.error
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_file(path, "".join(lines))


class KeptAnswers:
    """Answers of a run that may be interrupted, beside its --output_file, until that is written.

    The first line says of what run they are; each further one is an answer with its index.
    """

    _FIELDS = ("text", "token_ids", "finish_reason", "stop_reason")

    def __init__(self, output_file: Path | None, run: Any) -> None:
        """Read what an earlier run has left.

        Args:
            output_file: None: nothing is kept.
            run: what has to be alike, JSON: the model, the prompts and their parameters.

        Raises:
            ConfigError: the answers are of another run.
            RuntimeError: another run writes there now.
            OSError: the file cannot be written.
        """
        self.done: dict[int, Completion] = {}
        self._file: TextIO | None = None
        if output_file is None:
            return
        self.path = output_file.with_name(output_file.name + ".partial")
        self._file = self.path.open("a+", encoding="utf-8")
        if not lock(self._file):
            self._file.close()
            raise RuntimeError(f"another run writes {self.path} now; wait for it")
        head = json.dumps({"run": hashlib.sha256(json.dumps(run).encode()).hexdigest()}) + "\n"
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        if lines and lines[0] != head:
            self._file.close()
            raise ConfigError(
                f"{self.path} holds the answers of another run (model, prompts or parameters "
                "differ); remove it, or name another --output_file"
            )
        whole = [line for line in lines or [head] if line.endswith("\n")]
        self._file.truncate(0)  # without a last line that was cut off
        self._file.writelines(whole)
        self._file.flush()
        for record in map(json.loads, whole[1:]):
            index = record.pop("index")
            new = {"new_text": record["text"], "new_token_ids": record["token_ids"]}
            self.done[index] = Completion(index, **record, **new)

    def __enter__(self) -> KeptAnswers:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._file:
            self._file.close()

    def add(self, index: int, completion: Completion) -> None:
        """Keep an answer, unless it has failed: then it is computed again."""
        if self._file and not completion.error:
            record = {name: getattr(completion, name) for name in self._FIELDS}
            self._file.write(json.dumps({"index": index, **record}) + "\n")
            self._file.flush()

    def remove(self) -> None:
        """The run is complete."""
        if self._file:
            self.path.unlink(missing_ok=True)


def benchmark_row(
    stats: EngineStats, batch_size: int, prompts: Seq[Prompt], outputs: Seq[Completion]
) -> dict[str, str]:
    """A row of `BENCHMARK_COLUMNS`; lengths are those of the longest request."""
    assert stats.steps is not None, "step times were not kept"
    prefill = [s.seconds for s in stats.steps if s.num_prefill_tokens]
    decode = [s.seconds for s in stats.steps if not s.num_prefill_tokens]
    output_len = max(len(o.token_ids) for o in outputs)
    per_token = sum(decode) / len(decode) if decode else 0.0
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
    path: str, engine: Engine, prompts: Seq[Prompt], outputs: Seq[Completion]
) -> None:
    """Overwrite ATB_LLM_BENCHMARK_FILEPATH, or append to ./benchmark_result/benchmark.csv.

    All runs in a directory share the default file, so rows are appended under a lock.
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


def print_summary(engine: Engine) -> None:
    """Print prefill and decode speed, and decode's share of the memory bandwidth."""
    stats, size = engine.stats, engine.model.size
    if stats.prefill_s:
        rate = stats.num_prefill_tokens / stats.prefill_s
        print(
            f"prefill: {stats.num_prefill_tokens} tokens, {rate:.1f} tokens/s, "
            f"{stats.prefill_s * 1e3:.1f} ms"
        )
    if not stats.decode_s:
        return
    # Bytes that one rank reads: its weights once per step, and the cached K and V.
    read = stats.num_decode_steps * size.decode_weight_bytes
    read += stats.num_decode_context_tokens * size.token_bytes
    limit, name = read_limit(engine.model)
    achieved = read / stats.decode_s
    print(
        f"decode: {stats.num_decode_tokens} tokens, "
        f"{stats.num_decode_tokens / stats.decode_s:.1f} tokens/s, "
        f"{stats.decode_s / stats.num_decode_steps * 1e3:.2f} ms per step, "
        f"{achieved / 1e9:.1f} GB/s = {share(achieved / limit)} of the "
        f"{limit / 1e9:.1f} GB/s measured {name} bandwidth"
    )
