# SPDX-License-Identifier: Apache-2.0
"""An NPU for the checks of this folder: a real one, or an emulated one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from gptneox.devices import select
from gptneox.devices.npu.device import NpuDevice


@pytest.fixture(scope="session")
def npu() -> NpuDevice:
    """The backend, bound to device 0."""
    made = select("npu")
    assert isinstance(made, NpuDevice)
    made.setup(0)
    return made


@pytest.fixture(scope="session")
def chip(npu: NpuDevice) -> str:
    if not npu.is_310p:
        return "A2"
    return "DUO" if npu.has_atb else "DUO without ATB"


@pytest.fixture
def trace() -> Trace:
    path = os.environ.get("FAKE_NPU_TRACE")
    if not path:
        pytest.skip("only an emulated device writes down its kernels")
    return Trace(Path(path))


class Trace:
    """Kernel names since the last `clear`."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, 0
        self.clear()

    def clear(self) -> None:
        self.start = self.path.stat().st_size if self.path.exists() else 0

    def kernels(self) -> list[str]:
        with self.path.open(encoding="ascii") as file:
            file.seek(self.start)
            return [line.split()[0] for line in file]


torch.set_num_threads(1)
