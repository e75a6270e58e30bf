# SPDX-License-Identifier: Apache-2.0
"""Decode steps on an Atlas A2 as NPU graphs: captured once per batch size, then replayed.

FIA takes its key lengths from the host, where a graph has frozen them: torch_npu's automatic
dispatch keeps each call as a task whose arguments are updated before a replay. Source: op-plugin,
torch.npu.graph(auto_dispatch_capture=True), NPUGraph.update and graph_task_update_begin.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptneox.devices.step import ForwardBatch

logger = logging.getLogger(__name__)

# Sequences of a captured step; a batch takes the next larger one. Beyond the last: eager.
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
MAX_PADDING = 32  # rows that a size can have more than its batch

Step = Callable[[ForwardBatch], Tensor]


class DecodeGraphs:
    """A step that replays where every sequence adds one token, and runs as it is elsewhere.

    A captured step reads buffers that stay where they are. Rows beyond the batch write to slots of
    their own behind the cache's last block and read one key there: slots must differ, and none may
    be negative.
    """

    def __init__(
        self,
        step: Step,
        torch_npu: Any,
        *,
        scratch_block: int,
        block_size: int,
        table_width: int,
    ) -> None:
        """Capture nothing yet.

        Args:
            step: computes a batch.
            torch_npu: the package.
            scratch_block: first of the blocks behind the cache, `MAX_PADDING` slots in all.
            block_size: P.
            table_width: M of the longest sequence.
        """
        self.step, self.ops = step, torch_npu
        self.scratch_block, self.block_size = scratch_block, block_size
        self.table_width = table_width
        self._captured: dict[int, tuple[ForwardBatch, Any, Tensor]] = {}
        self._pool: Any = None

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """Hidden states [T, C]; a replayed result is overwritten by the next step.

        Raises:
            RuntimeError: the step cannot be captured.
        """
        n = batch.num_decodes
        if n < len(batch.q_lens_list) or n > SIZES[-1]:
            return self.step(batch)
        size = next(s for s in SIZES if s >= n)
        if size not in self._captured:
            self._captured[size] = self._capture(batch, size)
        static, graph, hidden = self._captured[size]
        self._fill(static, batch)
        # The last replay is over: its tokens have been read. An update during it would be lost.
        graph.update(cpu_update_input=[{"actual_seq_lengths_kv": static.context_lens_list}])
        graph.replay()
        return hidden[:n]

    def _capture(self, batch: ForwardBatch, size: int) -> tuple[ForwardBatch, Any, Tensor]:
        """Run the step once, so that everything lazy has happened, and once more to capture it.

        Both write the batch's keys and values to the batch's slots, as the replay will.
        """
        static = self._allocate(batch, size)
        self._fill(static, batch)
        self.step(static)
        npu = self.ops.npu
        graph = npu.NPUGraph()
        try:
            with npu.graph(graph, pool=self._pool, auto_dispatch_capture=True):
                hidden = self.step(static)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise RuntimeError(
                f"the decode step of {size} sequences cannot be captured as a graph ({reason}); "
                "use --graphs off"
            ) from error
        self._pool = self._pool or graph.pool()
        logger.info("captured the decode step of %d sequences", size)
        return static, graph, hidden

    def _allocate(self, batch: ForwardBatch, size: int) -> ForwardBatch:
        """Buffers of `size` rows; those beyond the batch are filled for good in `_fill`."""
        device = batch.input_ids.device

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return ForwardBatch(
            input_ids=zeros(size),
            positions=zeros(size),
            slot_mapping=zeros(size),
            block_tables=zeros(size, self.table_width, dtype=torch.int32),
            cu_seqlens_q=torch.arange(size + 1, dtype=torch.int32, device=device),
            context_lens=zeros(size, dtype=torch.int32),
            q_lens_list=[1] * size,
            context_lens_list=[1] * size,
            num_decodes=size,
        )

    def _fill(self, static: ForwardBatch, batch: ForwardBatch) -> None:
        """Put a batch into the buffers."""
        n, size = batch.num_decodes, static.num_decodes
        width = batch.block_tables.shape[1]
        static.input_ids[:n].copy_(batch.input_ids)
        static.positions[:n].copy_(batch.positions)
        static.slot_mapping[:n].copy_(batch.slot_mapping)
        static.context_lens[:n].copy_(batch.context_lens)
        static.block_tables[:n, :width].copy_(batch.block_tables)
        static.context_lens_list = [*batch.context_lens_list, *[1] * (size - n)]
        if n < size:
            first = self.scratch_block * self.block_size
            slots = torch.arange(first, first + size - n, device=batch.input_ids.device)
            static.slot_mapping[n:].copy_(slots)
            static.context_lens[n:].fill_(1)
            static.block_tables[n:].fill_(self.scratch_block)
