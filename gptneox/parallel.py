# SPDX-License-Identifier: Apache-2.0
"""The tensor-parallel group: rank, world size and the collectives that the model needs."""

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

# A rank that waits longer than this for the others logs it.
WAIT_NOTICE_S = 10.0


@dataclass
class TensorParallelGroup:
    """All processes of a run; with one process every collective is a no-op.

    What lies in the host's memory travels by gloo, whatever the device has: a rank that waits for
    it sleeps, occupies no device, and meets no time limit of the device's collectives.
    """

    rank: int = 0
    world_size: int = 1
    num_all_reduces: int = 0  # tests check that the model needs one per layer
    host_group: dist.ProcessGroup | None = None  # None: the default group is one of gloo

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
        with torch.inference_mode(False):  # gloo of torch 2.5 writes none of inference mode's
            parts = torch.empty((self.world_size, *x.shape), dtype=x.dtype, device=x.device)
        dist.all_gather(list(parts.unbind(0)), x.contiguous())
        return parts.permute(1, 0, 2).flatten(1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x, of the device or the host, in place on the others; returns x."""
        if self.world_size > 1:
            dist.broadcast(x, src=0, group=self.host_group if x.device.type == "cpu" else None)
        return x

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's picklable value on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()


def check_divides(world_size: int, num_heads: int, intermediate_size: int) -> None:
    """Raise ConfigError unless each rank gets whole heads and an equal part of the MLP."""
    valid = [
        n for n in range(1, num_heads + 1) if num_heads % n == 0 and intermediate_size % n == 0
    ]
    if world_size not in valid:
        raise ConfigError(
            f"world_size {world_size} does not divide {num_heads} attention heads and "
            f"intermediate_size {intermediate_size}; use {', '.join(map(str, valid))}"
        )


# Longer than torchrun needs to notice a dead rank and to kill the others.
_FIRST_CAUSE_DELAY_S = 3.0


def report_failure(error: BaseException) -> None:
    """Tell torchrun why this rank ends, so that its final report names the first cause.

    A collective fails here when another rank has died. torchrun compares whole seconds and might
    take this rank for the first, so it waits until torchrun kills it.
    """
    if isinstance(error, RuntimeError) and dist.is_initialized() and dist.get_world_size() > 1:
        time.sleep(_FIRST_CAUSE_DELAY_S)
    handler = get_error_handler()
    handler.initialize()
    handler.record_exception(error)


def leave_group() -> None:
    """Destroy the process group at the end of a run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def init_group(rank: int, world_size: int, dist_backend: str) -> TensorParallelGroup:
    """Join the processes that torchrun started; a no-op for one process."""
    host_group = None
    if world_size > 1 and not dist.is_initialized():
        with _report_waiting(rank, world_size):
            dist.init_process_group(dist_backend, rank=rank, world_size=world_size)
    if world_size > 1 and dist_backend != "gloo":
        host_group = dist.new_group(backend="gloo")
    return TensorParallelGroup(rank, world_size, host_group=host_group)


@contextlib.contextmanager
def _report_waiting(rank: int, world_size: int) -> Iterator[None]:
    """Log which ranks this one waits for; let Ctrl-C end the wait, which torch would block."""
    others = [str(i) for i in range(world_size) if i != rank]
    ranks = ", ".join(others if len(others) < 8 else [*others[:3], "…", others[-1]])
    environment = Environment.read()
    text = (
        f"has waited {WAIT_NOTICE_S:.0f} s at {environment.master_addr} port "
        f"{environment.master_port} for rank {ranks}; start all {world_size} with the same "
        "MASTER_ADDR and MASTER_PORT, or, for a run of one process, unset RANK, LOCAL_RANK and "
        "WORLD_SIZE"
    )
    # logged as an error, because ranks above 0 log nothing less
    timer = threading.Timer(WAIT_NOTICE_S, logger.error, [text])
    timer.daemon = True
    timer.start()
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL) if is_main else None
    try:
        yield
    finally:
        timer.cancel()
        if is_main:
            signal.signal(signal.SIGINT, handler)
