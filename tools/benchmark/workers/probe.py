# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at most, in a process of its own."""

from __future__ import annotations

import torch

from benchmark.workers.worker import Answer, Worker, serve
from gptneox.devices import select
from gptneox.devices.device import Device


class Probe(Worker):
    """Measures through the device that the engine would use."""

    device: Device

    def limits(self, device: str, threads: int) -> Answer:
        """Choose the device; its name and free memory."""
        self.device = select(device)
        self.device.setup(0, num_threads=threads)
        return {
            "device": self.device.name,
            "description": self.device.describe(),
            "free_bytes": self.device.memory().free,
        }

    def matmul(self, dtypes: list[str]) -> Answer:
        """FLOP per second of a large product in each dtype."""
        reached = {name: self.device.measure_matmul(getattr(torch, name)) for name in dtypes}
        return {"matmul": reached}

    def bandwidth(self, weights: int) -> Answer:
        """Bytes per second of reading so many bytes again and again, or memory if no cache does."""
        fits = weights <= self.device.cache_bytes()
        return {"bandwidth": self.device.measure_bandwidth(weights if fits else 0), "fits": fits}


if __name__ == "__main__":
    serve(Probe())
