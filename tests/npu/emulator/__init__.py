# SPDX-License-Identifier: Apache-2.0
"""Emulated NPU devices; `activate` turns the numbers on once torch_npu is imported."""

from __future__ import annotations

from typing import Any


def activate() -> None:
    """Compute on npu tensors of this thread, and run hccl groups over gloo."""
    import torch
    import torch.distributed as dist

    from .device import EmulatedDevice

    device = EmulatedDevice()
    device.emulate_graphs()
    device.__enter__()
    real_init = dist.init_process_group

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if backend in ("hccl", "lccl"):
            backend = f"cpu:gloo,npu:{backend}"
        return real_init(backend, *args, **kwargs)

    dist.init_process_group = init_process_group
    torch.npu.is_emulated = True
