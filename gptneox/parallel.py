# SPDX-License-Identifier: Apache-2.0
"""The tensor-parallel group: who am I, and the three collectives the model needs."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from gptneox.config.environment import Environment
from gptneox.config.errors import ConfigError

logger = logging.getLogger(__name__)

# After this long a rank that waits for the others says so.
WAIT_NOTICE_S = 10.0


@dataclass
class TensorParallelGroup:
    """All processes of a run; one process alone makes every collective a no-op."""

    rank: int = 0
    world_size: int = 1
    num_all_reduces: int = 0  # counted, so that a test can hold the model to one per layer

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place; returns x."""
        if self.world_size > 1:
            dist.all_reduce(x)
            self.num_all_reduces += 1
        return x

    def all_gather_columns(self, x: Tensor) -> Tensor:
        """x [T, F] on each rank; returns [T, world_size * F] on every rank, in rank order."""
        if self.world_size == 1:
            return x
        parts = torch.empty((self.world_size, *x.shape), dtype=x.dtype, device=x.device)
        dist.all_gather(list(parts.unbind(0)), x.contiguous())
        return parts.permute(1, 0, 2).flatten(1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x, in place on the others; returns x."""
        if self.world_size > 1:
            dist.broadcast(x, src=0)
        return x

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's picklable value on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()


def check_divides(world_size: int, num_heads: int, intermediate_size: int) -> None:
    """Raise ConfigError unless whole heads and equal MLP parts fall to each rank."""
    valid = [
        n for n in range(1, num_heads + 1) if num_heads % n == 0 and intermediate_size % n == 0
    ]
    if world_size not in valid:
        raise ConfigError(
            f"world_size {world_size} does not divide {num_heads} attention heads and "
            f"intermediate_size {intermediate_size}; use {', '.join(map(str, valid))}"
        )


# Longer than torchrun takes to notice that a rank has ended, and to end the others.
_FIRST_CAUSE_DELAY_S = 3.0


def report_failure(error: BaseException) -> None:
    """Tell torchrun why this rank ends, so that its closing report names the first cause.

    A collective fails when another rank has died, whose end torchrun may see later than ours, and
    it compares whole seconds; so this rank waits, and is ended with the rest.
    """
    if isinstance(error, RuntimeError) and dist.is_initialized() and dist.get_world_size() > 1:
        time.sleep(_FIRST_CAUSE_DELAY_S)
    handler = get_error_handler()
    handler.initialize()
    handler.record_exception(error)


def leave_group() -> None:
    """Part from the other ranks at the end of a run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def init_group(rank: int, world_size: int, dist_backend: str) -> TensorParallelGroup:
    """Join the processes that torchrun started; one process alone needs nothing."""
    if world_size > 1 and not dist.is_initialized():
        with _report_waiting(rank, world_size):
            dist.init_process_group(dist_backend, rank=rank, world_size=world_size)
    return TensorParallelGroup(rank, world_size)


@contextlib.contextmanager
def _report_waiting(rank: int, world_size: int) -> Iterator[None]:
    """Say after a while for whom this rank waits; Ctrl-C ends it, which torch's wait would not."""
    others = [str(i) for i in range(world_size) if i != rank]
    named = ", ".join(others if len(others) < 8 else [*others[:3], "…", others[-1]])
    environment = Environment.read()
    text = (
        f"has waited {WAIT_NOTICE_S:.0f} s at {environment.master_addr} port "
        f"{environment.master_port} for rank {named}; start all {world_size} with the same "
        "MASTER_ADDR and MASTER_PORT, or, for a run of one process, unset RANK, LOCAL_RANK and "
        "WORLD_SIZE"
    )
    # an error, which every rank shows: the one that is missing cannot
    watch = threading.Timer(WAIT_NOTICE_S, logger.error, [text])
    watch.daemon = True
    watch.start()
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL) if is_main else None
    try:
        yield
    finally:
        watch.cancel()
        if is_main:
            signal.signal(signal.SIGINT, handler)
