# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels against plain torch, over numbers of rows: `tools/bench.py --guard`.

Kernels that are on by default must not be slower than plain torch anywhere. One small model runs
on both devices in one process, in turns; every point below 1.0 is named.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmark.errors import UsageError
from benchmark.models import Shape, make_checkpoint
from gptneox.config.model import DTYPES
from gptneox.config.settings import EngineSection
from gptneox.devices import create
from gptneox.devices.cpu.device import CpuDevice
from gptneox.devices.device import Device
from gptneox.engine.paged import PagedEngine
from gptneox.engine.sequence import SamplingParams
from gptneox.evaluation.report import table

# The layers of the 160m model, fewer of them, and a head that does not outweigh them.
SHAPE = Shape(2, 768, 12, vocab_size=2048)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
MAX_BATCH, CONTEXT, NUM_DECODES = 64, 64, 4
ROUNDS = 5


@dataclass(frozen=True)
class Point:
    """One number of rows in one phase, on both devices; medians over the rounds."""

    dtype: str
    phase: str  # "prefill" | "decode"
    rows: int
    ours_ms: float
    plain_ms: float

    @property
    def ratio(self) -> float:
        """Above 1: the kernels are faster."""
        return self.plain_ms / self.ours_ms


def measure_guard(
    threads: int, say: Callable[[str], None], dtypes: Sequence[str] = DTYPES
) -> list[Point]:
    """Measure every point.

    Args:
        threads: of both.
        say: takes notices.
        dtypes: of the weights.

    Raises:
        UsageError: there are no kernels on this machine.
    """
    ours = create("cpu")
    if type(ours) is CpuDevice:
        raise UsageError("there are no CPU kernels here that could be compared with plain torch")
    points: list[Point] = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in dtypes:
            path = make_checkpoint(Path(folder) / dtype, SHAPE, dtype, say)
            engines = [_engine(path, device) for device in (ours, CpuDevice())]
            torch.set_num_threads(threads)
            for phase, rows in (("prefill", ROWS), ("decode", [n for n in ROWS if n <= MAX_BATCH])):
                points += [_measure(engines, dtype, phase, n) for n in rows]
            say(f"guard: {dtype} is measured")
    return points


def show(points: Sequence[Point]) -> str:
    """A table of the points, and the names of those below 1.0."""
    cells = [
        [p.dtype, p.phase, str(p.rows), f"{p.ours_ms:.2f}", f"{p.plain_ms:.2f}", f"{p.ratio:.2f}"]
        for p in points
    ]
    text = table(["dtype", "phase", "rows", "ours ms", "plain ms", "ratio"], cells)
    slow = [f"{p.dtype} {p.phase} of {p.rows} rows ({p.ratio:.2f})" for p in points if p.ratio < 1]
    return f"{text}\n" + (f"slower than plain torch: {', '.join(slow)}" if slow else "none slower")


def _engine(path: Path, device: Device) -> PagedEngine:
    section = EngineSection(
        max_batch_size=MAX_BATCH,
        max_prefill_tokens=4096,
        enable_prefix_caching=False,
        num_blocks=2 * MAX_BATCH + max(ROWS) // 64,
        block_size=64,
    )
    dtype = path.name
    return PagedEngine.from_pretrained(path, section, device, dtype=dtype, with_tokenizer=False)


def _measure(engines: Sequence[PagedEngine], dtype: str, phase: str, rows: int) -> Point:
    generator = torch.Generator().manual_seed(rows)
    shape = (1, rows) if phase == "prefill" else (rows, CONTEXT)
    prompts = torch.randint(SHAPE.vocab_size, shape, generator=generator).tolist()
    num_new = 1 if phase == "prefill" else 1 + NUM_DECODES
    params = SamplingParams(max_new_tokens=num_new, ignore_eos=True)
    times: list[list[float]] = [[], []]
    for _ in range(ROUNDS + 1):
        for engine, taken in zip(engines, times, strict=True):
            engine.reset_stats()
            engine.generate(prompts, params)
            stats = engine.stats
            seconds = stats.prefill_s if phase == "prefill" else stats.decode_s / NUM_DECODES
            taken.append(seconds * 1e3)
    ours, plain = (statistics.median(taken[1:]) for taken in times)  # the first round warms up
    return Point(dtype, phase, rows, ours, plain)
