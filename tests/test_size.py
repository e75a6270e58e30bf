# SPDX-License-Identifier: Apache-2.0
"""The bytes that a model is said to take are those that its tensors have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import checkpoints

from gptneox.config.model import ModelConfig
from gptneox.config.settings import EngineSection
from gptneox.devices.cache import CacheShape, FloatKV, Int8KV, KVFormat
from gptneox.devices.device import Device, Memory
from gptneox.devices.operators import Operators
from gptneox.engine.paged import count_blocks
from gptneox.kv_cache import ContiguousKVCache, PagedKVCache
from gptneox.layers import Linear
from gptneox.model import GPTNeoX
from gptneox.parallel import TensorParallelGroup
from gptneox.weights.load import check_memory, load_model
from gptneox.weights.size import ModelSize

NEOX_20B = ModelConfig(
    vocab_size=50432,
    hidden_size=6144,
    num_layers=44,
    num_heads=64,
    intermediate_size=24576,
    max_position_embeddings=2048,
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class PlainDevice(Device):
    """The base class with the memory its test says."""

    free = 1 << 40

    def memory(self) -> Memory:
        return Memory(self.free, self.free, 0)


def held_bytes(model: GPTNeoX) -> int:
    """Of every tensor that a rank keeps after loading."""
    total = 0
    for module in model.modules():
        holder = module
        if isinstance(module, Linear):
            assert module.packed is not None
            holder = module.packed
        for key in dict(module.named_parameters(recurse=False)):
            total += getattr(holder, key).nbytes
    return total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(checkpoints.FAMILY))
def test_weights_of_a_rank(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Serial and parallel, tied and not, with and without biases, odd vocabularies."""
    config = checkpoints.FAMILY[name] | {"num_hidden_layers": 1}
    checkpoints.write_checkpoint(tmp_path / name, config)
    num_heads = config["num_attention_heads"]
    for world_size in (n for n in (1, 2, 4) if num_heads % n == 0):
        for rank in {0, world_size - 1}:
            group = TensorParallelGroup(rank, world_size)
            model = GPTNeoX(ModelConfig.from_pretrained(tmp_path / name), PlainDevice(), group)
            load_model(model, tmp_path / name, dtype)
            assert model.size.weight_bytes == held_bytes(model), (world_size, rank)
            assert model.size.world_size == world_size


@pytest.mark.parametrize("name", sorted(checkpoints.FAMILY))
def test_decoding_reads_all_parameters_but_the_embedding(name: str) -> None:
    config = ModelConfig.from_dict(checkpoints.FAMILY[name])
    for dtype in DTYPES:
        size = ModelSize(config, dtype, FloatKV(dtype))
        assert size.decode_weight_bytes == config.num_decode_parameters * dtype.itemsize
        halves = ModelSize(config, dtype, FloatKV(dtype), 2)
        assert 2 * halves.decode_weight_bytes == size.decode_weight_bytes
        assert size.decode_bytes(3, 7.5) == size.decode_weight_bytes + 22.5 * size.token_bytes


@pytest.mark.parametrize(
    "kv_format", [*map(FloatKV, DTYPES), Int8KV(torch.float16)], ids=lambda f: f.name
)
def test_a_cached_token(kv_format: KVFormat, ops: Operators) -> None:
    """Of a paged cache and of a padded batch; a rank of two holds half of the heads."""
    config = ModelConfig.from_dict(checkpoints.FAMILY["gpt-neox-20b"])
    for world_size in (1, 2):
        size = ModelSize(config, kv_format.dtype, kv_format, world_size)
        num_heads = config.num_heads // world_size
        paged = PagedKVCache(
            ops, config.num_layers, 5, 16, num_heads, config.head_dim, size.kv_format
        )
        assert sum(t.nbytes for layer in paged.layers for t in layer) == 5 * 16 * size.token_bytes
        padded = ContiguousKVCache(
            ops, config.num_layers, num_heads, config.head_dim, size.kv_format, 40
        )
        padded.batch_size = 3
        padded._grow(8)
        assert sum(t.nbytes for layer in padded.layers for t in layer) == 24 * size.token_bytes
        gib = size.kv_format.layer_gib(CacheShape(5, 16, num_heads, config.head_dim))
        assert gib * 2**30 * config.num_layers == 5 * 16 * size.token_bytes


def test_a_cached_token_of_gpt_neox_20b() -> None:
    """In bytes: 44 layers, 64 heads of 96, and 4 bytes more for each scale."""
    half, config = torch.float16, NEOX_20B
    assert ModelSize(config, half, FloatKV(half)).token_bytes == 44 * 2 * 64 * 96 * 2 == 1_081_344
    size = ModelSize(config, half, Int8KV(half))
    assert size.token_bytes == 44 * 2 * 64 * (96 + 4) == 563_200
    assert size.decode_bytes(2, 10) == size.decode_weight_bytes + 20 * 563_200
    settings = EngineSection(reserved_memory_gb=0, memory_fraction=1.0, max_batch_size=999)
    assert count_blocks(settings, config, 128 * size.token_bytes, 1 << 30) == 14
    assert count_blocks(settings, config, 128 * 1_081_344, 1 << 30) == 7


def test_weights_that_do_not_fit_are_refused() -> None:
    config = ModelConfig.from_dict(checkpoints.FAMILY["gpt-neox-20b"])
    size = ModelSize(config, torch.float16, FloatKV(torch.float16))
    device = PlainDevice()
    device.free = size.weight_bytes
    check_memory(size, device)
    device.free -= 1
    with pytest.raises(RuntimeError, match=r"GiB needed in float16, .* use a smaller dtype"):
        check_memory(size, device)
