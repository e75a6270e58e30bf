# SPDX-License-Identifier: Apache-2.0
"""What a run opens: the device, the group of ranks, the engine with its model."""

from __future__ import annotations

import logging
import time

from gptneox.cli import Settings
from gptneox.devices import select
from gptneox.devices.binding import bind
from gptneox.devices.device import Device
from gptneox.engine.paged import PagedEngine
from gptneox.parallel import TensorParallelGroup, init_group

logger = logging.getLogger(__name__)


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


def load_engine(settings: Settings, device: Device, group: TensorParallelGroup) -> PagedEngine:
    """The engine of this rank, with its model loaded."""
    start = time.perf_counter()
    engine = PagedEngine.from_pretrained(
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
