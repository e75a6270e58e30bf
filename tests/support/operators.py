# SPDX-License-Identifier: Apache-2.0
"""Steps, caches, random tensors and the tolerances for operator tests.

Tolerances. The base computes in fp32 and rounds once, except for `linear`. fp32 results may differ
by the order of summation: 2e-5 of the largest value. In half precision a device may also round
intermediates (probabilities, partial sums), half a unit each, so results may differ by two units
(2 * eps) of the largest value, which bounds every result because attention averages its values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gptneox.devices.cache import FloatKV, Int8Cache, Int8KV, KVFormat
from gptneox.devices.device import Device
from gptneox.devices.operators import Operators
from gptneox.devices.step import ForwardBatch
from gptneox.kv_cache import PagedKVCache

BASE = Operators(Device())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CACHE_DTYPES = [*DTYPES, torch.int8]


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Compare two results on the CPU, with the tolerances above."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    eps = torch.finfo(expected.dtype).eps
    limit = 2e-5 if expected.dtype == torch.float32 else 2 * eps
    largest = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(
        actual.cpu().float(), expected.float(), rtol=0, atol=limit * largest, equal_nan=False
    )


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def make_batch(
    lengths: list[tuple[int, int]], block_size: int, seed: int = 0, *, shares: bool = True
) -> ForwardBatch:
    """A step over random blocks, one of them shared by two sequences; block 0 is unused."""
    context_lens = [cached + new for cached, new in lengths]
    counts = [-(-n // block_size) for n in context_lens]
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
    tables = [[ids.pop() for _ in range(n)] for n in counts]
    if shares and max(context_lens) > 2 * block_size and len(tables) > 1:
        longest, other = sorted(range(len(tables)), key=lambda b: -lengths[b][0])[:2]
        if min(lengths[longest][0], lengths[other][0]) >= block_size:
            tables[other][0] = tables[longest][0]
    positions = [range(cached, cached + new) for cached, new in lengths]
    slots = [
        table[p // block_size] * block_size + p % block_size
        for table, span in zip(tables, positions, strict=True)
        for p in span
    ]
    q_lens = [new for _, new in lengths]
    width = max(counts)
    cu_seqlens = [sum(q_lens[:i]) for i in range(len(q_lens) + 1)]
    return ForwardBatch(
        input_ids=torch.zeros(sum(q_lens), dtype=torch.int64),
        positions=torch.tensor([p for span in positions for p in span]),
        slot_mapping=torch.tensor(slots),
        block_tables=torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32),
        cu_seqlens_q=torch.tensor(cu_seqlens, dtype=torch.int32),
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        q_lens_list=q_lens,
        context_lens_list=context_lens,
        num_decodes=sum(n == 1 for n in q_lens),
    )


def batch_on(batch: ForwardBatch, device: torch.device) -> ForwardBatch:
    moved = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in vars(batch).items()
    }
    return ForwardBatch(**moved)


def format_of(dtype: torch.dtype) -> KVFormat:
    """The format of a cache whose K and V have `dtype`."""
    return Int8KV(torch.float32) if dtype == torch.int8 else FloatKV(dtype)


def make_cache(
    ops: Operators, batch: ForwardBatch, block_size: int, heads: int, d: int, dtype: torch.dtype
) -> PagedKVCache:
    """A cache of one layer: random K and V at the cached positions of `batch`, NaN elsewhere."""
    num_blocks = int(batch.block_tables.max()) + 1
    cache = PagedKVCache(ops, 1, num_blocks, block_size, heads, d, format_of(dtype))
    written = torch.zeros(num_blocks * block_size, dtype=torch.bool)
    cached_lens = [
        n - new for n, new in zip(batch.context_lens_list, batch.q_lens_list, strict=True)
    ]
    for table, cached_len in zip(batch.block_tables.tolist(), cached_lens, strict=True):
        for p in range(cached_len):
            written[table[p // block_size] * block_size + p % block_size] = True
    layer, contents = cache.layers[0], []
    for i in range(2):
        content = randn(num_blocks * block_size, heads, d, seed=10 + i)
        content[~written] = math.nan  # in int8: the scale
        contents.append(content.view(num_blocks, block_size, heads, d).to(layer.k.device))
    if not isinstance(layer, Int8Cache):
        contents = [content.to(dtype) for content in contents]
    layer.write(..., *contents)
    return cache
