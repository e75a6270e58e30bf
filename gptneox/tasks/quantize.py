# SPDX-License-Identifier: Apache-2.0
"""`--task quantize`: write a checkpoint with weights of eight bits, or floats of one again.

The w8a8 types look at sample text: lines of JSON, each with `inputs_pretokenized` or `text`, as
msmodelslim's calibration sets have them.
"""

from __future__ import annotations

import json
from pathlib import Path

from gptneox.cli import Settings
from gptneox.config.errors import ConfigError, FileError
from gptneox.config.files import read_text
from gptneox.config.model import ModelConfig
from gptneox.config.settings import EMBEDDED_CHECKPOINT
from gptneox.engine.detokenizer import load_tokenizer
from gptneox.prompts import encode
from gptneox.weights.quantize import Outcome, dequantize_checkpoint, quantize_checkpoint
from gptneox.weights.report import LinearReport

KEYS = ("inputs_pretokenized", "text")  # of a line, in this order
# English passages, the last of which are the default sample.
DEFAULT_TEXT, NUM_DEFAULT = EMBEDDED_CHECKPOINT / "eval/boolq/dev.jsonl", 128


def run(settings: Settings) -> None:
    """Quantize; prints a line for each linear layer, and the bytes before and after.

    Raises:
        ConfigError: no --save_directory, or several ranks.
        ValueError, OSError, RuntimeError: see `quantize_checkpoint`.
    """
    options = settings.quantize
    if settings.environment.world_size > 1:
        raise ConfigError(
            "the task quantize runs in one process; start it without torchrun, and cut the result"
        )
    if options.save_directory is None:
        raise ConfigError("--task quantize needs --save_directory, the folder to write")
    source, target = settings.model_path, options.save_directory
    if options.dequantize:
        outcome = dequantize_checkpoint(source, target, options.part_bytes)
        _finish(outcome, target, "Float weights have been successfully saved.")
        return
    texts: list[list[int]] = []
    has_default = options.quant_type.startswith("w8a8")
    if has_default or (options.quant_type == "w4a16" and options.calib_file):
        tokenizer = load_tokenizer(source, ModelConfig.from_pretrained(source).vocab_size)
        texts = [encode(tokenizer, t, "sample text") for t in sample_texts(options.calib_file)]
    others: list[str] = []

    def report(linear: LinearReport) -> None:
        _print(linear)
        if linear.scheme not in (options.quant_type, "float"):
            others.append(f"{linear.name} ({linear.scheme})")

    outcome = quantize_checkpoint(source, target, options, report, texts)
    if others:
        print(f"not {options.quant_type}: {', '.join(others)}")
    _finish(outcome, target, "Quantized weights have been successfully saved.")


def sample_texts(path: Path | None) -> list[str]:
    """The texts of a file, or those that come with the toolkit; blank lines are left out.

    Raises:
        NoSuchPath: there is no such file.
        FileError: a line is not as described; the message has its number.
    """
    if path is None:
        lines = read_text(DEFAULT_TEXT).splitlines()[-NUM_DEFAULT:]
        return [json.loads(line)["passage"] for line in lines]
    texts = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise FileError(f"{where} is not JSON: {error}") from error
        key = next((k for k in KEYS if isinstance(entry, dict) and k in entry), None)
        if key is None:
            raise FileError(f"{where} has neither {' nor '.join(KEYS)}")
        if not isinstance(entry[key], str) or not entry[key]:
            raise FileError(f"{where}: {key} is not a text")
        texts.append(entry[key])
    return texts


def _print(report: LinearReport) -> None:
    error = f", relative error {report.error:.5f}" if report.scheme != "float" else ""
    if report.output_error:
        error += f", of outputs {report.output_error:.5f}"
    print(
        f"{report.name}: {report.scheme}, range {report.lowest:.4g} to {report.highest:.4g}{error}",
        flush=True,
    )


def _finish(outcome: Outcome, target: Path, text: str) -> None:
    share = outcome.bytes_after / max(1, outcome.bytes_before)
    print(f"bytes: {outcome.bytes_before} before, {outcome.bytes_after} after, {share:.1%}")
    print(f"{text} {target.resolve()}")
