# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at most, in a process of its own."""

from __future__ import annotations

import torch

from benchmark.workers.worker import Answer, Worker, serve
from gptneox.backends import select
from gptneox.backends.base import Backend


class Probe(Worker):
    """Measures through the backend that the engine would use."""

    backend: Backend

    def limits(self, device: str, threads: int) -> Answer:
        """Choose the device; its name and free memory."""
        self.backend = select(device)
        self.backend.setup(0, num_threads=threads)
        return {
            "device": self.backend.name,
            "description": self.backend.describe(),
            "free_bytes": self.backend.memory().free,
        }

    def matmul(self, dtypes: list[str]) -> Answer:
        """FLOP per second of a large product in each dtype."""
        reached = {name: self.backend.measure_matmul(getattr(torch, name)) for name in dtypes}
        return {"matmul": reached}

    def bandwidth(self) -> Answer:
        """Bytes per second of reading a large tensor."""
        return {"bandwidth": self.backend.measure_bandwidth()}


if __name__ == "__main__":
    serve(Probe())
