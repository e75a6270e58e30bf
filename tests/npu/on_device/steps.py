# SPDX-License-Identifier: Apache-2.0
"""Steps of a model whose batches are chosen by the test."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from gptneox.kv_cache import PagedKVCache

BLOCK = 128


class Sequences:
    """Prompts that are fed to a model in pieces, and the logits that came out."""

    def __init__(self, engine, ids):
        self.engine, self.ids = engine, ids
        self.done = [0] * len(ids)
        self.logits = [[] for _ in ids]
        blocks = iter(range(1, 1000))
        self.tables = [[next(blocks) for _ in range(-(-len(i) // BLOCK))] for i in ids]
        model = engine.model
        config = model.config
        self.cache = PagedKVCache(
            model.ops,
            config.num_layers,
            next(blocks),
            BLOCK,
            config.num_heads,
            config.head_dim,
            engine.model.size.kv_format,
        )
        engine.runner.cache = self.cache

    def step(self, counts):
        """Compute counts[i] further tokens of sequence i; single ones come first in the batch."""
        order = sorted((i for i, n in enumerate(counts) if n), key=lambda i: counts[i] > 1)
        scheduled = [
            SimpleNamespace(
                num_tokens=counts[i],
                seq=SimpleNamespace(
                    num_computed_tokens=self.done[i],
                    block_table=self.tables[i],
                    token_ids=self.ids[i],
                ),
            )
            for i in order
        ]
        runner = self.engine.runner
        with torch.inference_mode():
            hidden = runner.step(runner.prepare(scheduled))
            rows = self.engine.model.compute_logits(hidden).float().cpu()
        for i, part in zip(order, rows.split([counts[i] for i in order]), strict=True):
            self.logits[i].append(part)
            self.done[i] += counts[i]
