# SPDX-License-Identifier: Apache-2.0
"""Decode steps that are captured once for each of a few batch sizes and then replayed."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from gptneox.devices.step import ForwardBatch

logger = logging.getLogger(__name__)

# Sequences of a captured step; a batch takes the next larger one. Beyond the last: eager.
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)

Step = Callable[[ForwardBatch], Tensor]
# Runs a step until it may be captured, captures it; returns what replays it and its output.
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


class DecodeGraphs:
    """A step that replays where every sequence adds one token, and runs as it is elsewhere.

    A captured step reads its input from buffers that stay where they are, so one set of buffers
    serves every size. Rows beyond the batch have slot -1 and context length 0: they write no key,
    read no block, and nobody reads what they return. The width of the block tables is that of the
    whole cache, which no sequence can exceed.

    A size is captured by the first step that needs it, from that step's own batch: running it
    before the capture writes the same keys and values to the same slots.
    """

    def __init__(
        self, step: Step, record: Recorder, device: torch.device, table_width: int
    ) -> None:
        self.step, self.record, self.device = step, record, device
        self.table_width = table_width
        self._captured: dict[int, tuple[Callable[[], None], Tensor]] = {}
        self._buffers: ForwardBatch | None = None  # of the largest size

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """Hidden states [T, C]; a replayed result is overwritten by the next step.

        Raises:
            RuntimeError: the step cannot be captured.
        """
        num_rows = batch.num_decodes
        if num_rows < len(batch.q_lens_list) or num_rows > SIZES[-1]:
            return self.step(batch)
        size = next(n for n in SIZES if n >= num_rows)
        static = self._fill(size, batch)
        if size not in self._captured:
            self._captured[size] = self._capture(static)
        replay, hidden = self._captured[size]
        replay()
        return hidden[:num_rows]

    def _capture(self, static: ForwardBatch) -> tuple[Callable[[], None], Tensor]:
        logger.debug("capturing the decode step of %d sequences", static.num_decodes)
        try:
            return self.record(lambda: self.step(static))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise RuntimeError(
                f"the decode step of {static.num_decodes} sequences cannot be captured as a graph "
                f"({reason}); start again with --graphs off"
            ) from error

    def _fill(self, size: int, batch: ForwardBatch) -> ForwardBatch:
        """The static batch of `size` sequences, holding `batch`."""
        if self._buffers is None:
            self._buffers = self._allocate()
        static, n = self._buffers, batch.num_decodes
        static.input_ids[:n].copy_(batch.input_ids)
        static.positions[:n].copy_(batch.positions)
        static.slot_mapping[:n].copy_(batch.slot_mapping)
        static.context_lens[:n].copy_(batch.context_lens)
        static.block_tables[:n, : batch.block_tables.shape[1]].copy_(batch.block_tables)
        if n < size:
            static.slot_mapping[n:size].fill_(-1)
            static.context_lens[n:size].zero_()
        return ForwardBatch(
            input_ids=static.input_ids[:size],
            positions=static.positions[:size],
            slot_mapping=static.slot_mapping[:size],
            block_tables=static.block_tables[:size],
            cu_seqlens_q=static.cu_seqlens_q[: size + 1],
            context_lens=static.context_lens[:size],
            q_lens_list=[1] * size,
            context_lens_list=[],  # a captured step must not depend on lengths of the host
            num_decodes=size,
        )

    def _allocate(self) -> ForwardBatch:
        """Buffers of the largest size. Ids and positions of rows nobody uses are valid, too."""
        rows = SIZES[-1]

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        return ForwardBatch(
            input_ids=zeros(rows),
            positions=zeros(rows),
            slot_mapping=zeros(rows),
            block_tables=zeros(rows, self.table_width, dtype=torch.int32),
            cu_seqlens_q=torch.arange(rows + 1, dtype=torch.int32, device=self.device),
            context_lens=zeros(rows, dtype=torch.int32),
            q_lens_list=[],
            context_lens_list=[],
            num_decodes=rows,
        )
