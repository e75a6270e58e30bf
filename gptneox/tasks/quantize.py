# SPDX-License-Identifier: Apache-2.0
"""`--task quantize`: write a checkpoint with weights of eight bits, or floats of one again."""

from __future__ import annotations

from pathlib import Path

from gptneox.cli import Settings
from gptneox.config.errors import ConfigError
from gptneox.weights.quantize import (
    LinearReport,
    Outcome,
    dequantize_checkpoint,
    quantize_checkpoint,
)


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
    outcome = quantize_checkpoint(source, target, options, _print)
    _finish(outcome, target, "Quantized weights have been successfully saved.")


def _print(report: LinearReport) -> None:
    error = f", relative error {report.error:.5f}" if report.scheme != "float" else ""
    print(
        f"{report.name}: {report.scheme}, range {report.lowest:.4g} to {report.highest:.4g}{error}",
        flush=True,
    )


def _finish(outcome: Outcome, target: Path, text: str) -> None:
    share = outcome.bytes_after / max(1, outcome.bytes_before)
    print(f"bytes: {outcome.bytes_before} before, {outcome.bytes_after} after, {share:.1%}")
    print(f"{text} {target.resolve()}")
