# SPDX-License-Identifier: Apache-2.0
"""Set-up of a run: the device, the group of ranks, the engine with its model."""

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
from gptneox.weights.formats import Formats, scheme_of
from gptneox.weights.load import check_weights, find_part

logger = logging.getLogger(__name__)


def start(settings: Settings) -> tuple[Device, TensorParallelGroup]:
    """Set up the device, join the other ranks and log the settings."""
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
    """Raise ConfigError for an option that only the paged path serves, in a run on another path."""
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


def refuse_float(settings: Settings, formats: Formats) -> None:
    """Raise ConfigError where IS_QUANT=1 asks for quantized weights and these are float.

    Args:
        settings: of the run.
        formats: of the checkpoint's linear layers.
    """
    if settings.environment.is_quant and not scheme_of(formats):
        raise ConfigError(
            f"IS_QUANT=1, but the weights in {settings.model_path} are not quantized; quantize "
            "them (python main.py --task quantize --model_path DIR --save_directory NEW) and give "
            "that folder, or unset IS_QUANT"
        )


def load_engine(
    settings: Settings,
    device: Device,
    group: TensorParallelGroup,
    section: EngineSection | None = None,
    *,
    with_tokenizer: bool = True,
) -> Engine:
    """Load the model into this rank's engine, on the path that the settings choose.

    Args:
        settings: of the run.
        device: after `start`.
        group: the ranks.
        section: the [engine] section to use instead of the run's own.
        with_tokenizer: False for token ids only, whatever --load_tokenizer says.

    Raises:
        ValueError, OSError, RuntimeError: with a message for the user.
    """
    start_s = time.perf_counter()
    kind: type[Engine] = PagedEngine if settings.attention == "paged" else GenerateEngine
    if settings.environment.is_quant:
        path, config = find_part(settings.model_path, group, prefer_parts=kind.prefers_parts)
        refuse_float(settings, check_weights(path, config, group.world_size))
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
        "loaded %s in %.1f s: %s%s on %s%s",
        settings.model_path,
        time.perf_counter() - start_s,
        str(engine.dtype).removeprefix("torch."),
        engine.model.size.scheme and f" with {engine.model.size.scheme} weights",
        device.describe(),
        engine.describe_cache(),
    )
    return engine
