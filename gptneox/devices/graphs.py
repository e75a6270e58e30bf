# SPDX-License-Identifier: Apache-2.0
"""Decode steps that are captured once for each of a few batch sizes and then replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gptneox.devices.step import ForwardBatch

# Rows of a captured step; a batch takes the next larger one.
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
MAX_PADDING = 32  # more than any size has beyond the one before it

Forward = Callable[[ForwardBatch], Tensor]
# Runs the step of a batch until it may be captured and captures it. Returns what replays it, from
# the tensors and lists that the batch then holds, and its output.
Recorder = Callable[[ForwardBatch], tuple[Callable[[], None], Tensor]]
# Fills the rows of a batch of `len(q_lens_list)` sequences from row n on, which stand for none.
Padding = Callable[[ForwardBatch, int], None]


class DecodeGraphs:
    """Replays a step in which every sequence adds one token; any other step runs eagerly.

    A captured step reads its input from buffers that stay where they are, so one set of buffers
    serves every size. The width of its block tables is that of the longest sequence. What stands
    in the rows between the batch and the size is the device's to say.

    A size is captured by the first step that needs it, from that step's own batch: running it
    before the capture writes the same keys and values to the same slots.
    """

    def __init__(
        self,
        forward: Forward,
        record: Recorder,
        device: torch.device,
        table_width: int,
        *,
        pad: Padding | None = None,
        max_rows: int = SIZES[-1],
    ) -> None:
        """Capture nothing yet.

        Args:
            forward: computes a batch.
            record: see `Recorder`.
            device: where batches are.
            table_width: M of the longest sequence.
            pad: see `Padding`; by default slot -1 and no context.
            max_rows: larger batches run eagerly.
        """
        self.forward, self.record, self.pad = forward, record, pad or pad_with_nothing
        self.device, self.table_width = device, table_width
        self.sizes = [size for size in SIZES if size <= max_rows]
        self._captured: dict[int, tuple[ForwardBatch, Callable[[], None], Tensor]] = {}
        self._buffers: ForwardBatch | None = None  # of the largest size

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """Hidden states [T, C]; a replayed result is overwritten by the next step.

        Raises:
            RuntimeError: the step cannot be captured.
        """
        num_rows = batch.num_decodes
        if num_rows < len(batch.q_lens_list) or num_rows > self.sizes[-1]:
            return self.forward(batch)
        size = next(n for n in self.sizes if n >= num_rows)
        if size in self._captured:
            static, replay, hidden = self._captured[size]
            self._fill(static, batch)
        else:
            static = self._first(size)
            self._fill(static, batch)
            replay, hidden = self._capture(static)
            self._captured[size] = static, replay, hidden
        replay()
        return hidden[:num_rows]

    def _capture(self, static: ForwardBatch) -> tuple[Callable[[], None], Tensor]:
        try:
            return self.record(static)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise RuntimeError(
                f"the decode step of {static.num_decodes} sequences cannot be captured as a graph "
                f"({reason}); start again with --graphs off"
            ) from error

    def _fill(self, static: ForwardBatch, batch: ForwardBatch) -> None:
        """Copy a batch into the buffers."""
        n = batch.num_decodes
        static.input_ids[:n].copy_(batch.input_ids)
        static.positions[:n].copy_(batch.positions)
        static.slot_mapping[:n].copy_(batch.slot_mapping)
        static.context_lens[:n].copy_(batch.context_lens)
        static.block_tables[:n, : batch.block_tables.shape[1]].copy_(batch.block_tables)
        static.context_lens_list[:n] = batch.context_lens_list
        if n < static.num_decodes:
            self.pad(static, n)

    def _first(self, size: int) -> ForwardBatch:
        """The first `size` rows of the buffers."""
        if self._buffers is None:
            self._buffers = self._allocate()
        all_rows = self._buffers
        return ForwardBatch(
            input_ids=all_rows.input_ids[:size],
            positions=all_rows.positions[:size],
            slot_mapping=all_rows.slot_mapping[:size],
            block_tables=all_rows.block_tables[:size],
            cu_seqlens_q=all_rows.cu_seqlens_q[: size + 1],
            context_lens=all_rows.context_lens[:size],
            q_lens_list=[1] * size,
            context_lens_list=[0] * size,
            num_decodes=size,
        )

    def _allocate(self) -> ForwardBatch:
        """Buffers of the largest size. Ids and positions of unused rows are valid, too."""
        rows = self.sizes[-1]

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


def pad_with_nothing(batch: ForwardBatch, num_rows: int) -> None:
    """Rows that write no key and read no block."""
    batch.slot_mapping[num_rows:].fill_(-1)
    batch.context_lens[num_rows:].zero_()
    batch.context_lens_list[num_rows:] = [0] * (batch.num_decodes - num_rows)
