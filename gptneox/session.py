# SPDX-License-Identifier: Apache-2.0
"""What a run opens: the device, the group of ranks, the engine with its model."""

from __future__ import annotations

import logging
import time

from gptneox.cli import Settings
from gptneox.config.errors import ConfigError
from gptneox.config.settings import EngineSection
from gptneox.devices import select
from gptneox.devices.binding import bind
from gptneox.devices.device import Device
from gptneox.engine.api import Engine
from gptneox.engine.generate import GenerateEngine
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


def refuse_paged_only(settings: Settings) -> None:
    """Raise ConfigError for an option of the paged path in a run on the other."""
    if settings.attention == "paged":
        return
    options = {
        "--interactive": settings.args.interactive,
        "--stream": settings.args.stream,
        "ATB_LLM_BENCHMARK_ENABLE": settings.environment.benchmark_enabled,
    }
    for name, is_set in options.items():
        if is_set:
            raise ConfigError(f"{name} is not served by the flash path; use --attention paged")


def load_engine(
    settings: Settings,
    device: Device,
    group: TensorParallelGroup,
    section: EngineSection | None = None,
    *,
    with_tokenizer: bool = True,
) -> Engine:
    """The engine of this rank on the path that the settings choose, with its model loaded.

    Args:
        settings: of the run.
        device: after `start`.
        group: the ranks.
        section: [engine] of this task; the run's own by default.
        with_tokenizer: False: ids in, ids out, whatever --load_tokenizer says.

    Raises:
        ValueError, OSError, RuntimeError: with a message for the user.
    """
    start = time.perf_counter()
    kind: type[Engine] = PagedEngine if settings.attention == "paged" else GenerateEngine
    engine = kind.from_pretrained(
        settings.model_path,
        section or settings.engine,
        device,
        dtype=settings.model.dtype,
        group=group,
        with_tokenizer=with_tokenizer and settings.args.load_tokenizer,
        trust_remote_code=settings.args.trust_remote_code,
        show_progress=True,
    )
    logger.info(
        "loaded %s in %.1f s: %s on %s%s",
        settings.model_path,
        time.perf_counter() - start,
        str(engine.dtype).removeprefix("torch."),
        device.describe(),
        engine.describe_cache(),
    )
    return engine
