# SPDX-License-Identifier: Apache-2.0
"""The engine of a speed test, with room for exactly what the test runs."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

from gptneox.cli import Settings
from gptneox.config.settings import EngineSection
from gptneox.devices.device import Device
from gptneox.engine.paged import affordable_blocks, blocks_needed
from gptneox.evaluation.timing import Stopwatch
from gptneox.parallel import TensorParallelGroup
from gptneox.session import load_engine
from gptneox.weights.load import check_weights, find_part
from gptneox.weights.size import ModelSize, find_kv_format

Case = tuple[int, int]  # input length, output length


def load_stopwatch(
    settings: Settings,
    device: Device,
    group: TensorParallelGroup,
    cases: Seq[Case],
    batch_size: int,
) -> Stopwatch:
    """Load the engine that the settings choose, with room for the largest case.

    Raises:
        ValueError, OSError, RuntimeError: see `load_engine`.
    """
    section = _engine_section(settings, device, group, cases, batch_size)
    engine = load_engine(
        settings, device, group, section, with_tokenizer=not settings.performance.skip_decode
    )
    return Stopwatch(engine)


def _engine_section(
    settings: Settings,
    device: Device,
    group: TensorParallelGroup,
    cases: Seq[Case],
    batch_size: int,
) -> EngineSection:
    """[engine] for the batch and the lengths of the cases, without the prefix cache."""
    section = replace(
        settings.engine,
        max_batch_size=batch_size,
        max_input_length=max(i for i, _ in cases),
        max_output_length=max(o for _, o in cases),
        enable_prefix_caching=False,
    )
    if section.num_blocks or settings.attention == "flash":
        return section
    # Exactly the blocks that are needed, where they fit; else the engine sizes its cache itself.
    needed = max(blocks_needed([i] * batch_size, o, section.block_size) for i, o in cases)
    path, config = find_part(settings.model_path, group)
    dtype, _ = device.resolve_dtype(config.dtype, settings.model.dtype)
    kv_format = find_kv_format(section.kv_cache_dtype, config, dtype)
    formats = check_weights(path, config, group.world_size)
    size = ModelSize(config, dtype, kv_format, group.world_size, formats)
    free = device.memory().free - size.weight_bytes
    fits = needed <= affordable_blocks(section, size.token_bytes * section.block_size, free)
    return replace(section, num_blocks=needed if group.broadcast_object(fits) else 0)
