# SPDX-License-Identifier: Apache-2.0
"""Mistakes that the host code of torch_npu lets pass are caught by the emulated device.

Each test makes a right call first, so that it fails for the mistake alone.
"""

from __future__ import annotations

import pytest
import torch

from gptneox.config.errors import ConfigError
from gptneox.devices.cache import CacheShape, FloatKV, Int8KV
from gptneox.devices.npu.attention import DuoAtbAttention, has_cache_write

emulator = pytest.importorskip("emulator.operators", reason="a real device has its own limits")
HEADS, D, BLOCK = 2, 96, 128
HALF = torch.float16


def limit(text):
    return pytest.raises(emulator.DeviceLimit, match=text)


@pytest.fixture
def ops(npu):
    return npu.torch_npu


@pytest.fixture
def x(npu):
    """Makes tensors on the device."""

    def make(*shape, dtype=HALF):
        return torch.ones(shape, dtype=dtype).to(npu.torch_device)

    return make


@pytest.fixture
def a2(chip):
    if chip != "A2":
        pytest.skip("of an A2")


@pytest.fixture
def duo(chip):
    if chip != "DUO":
        pytest.skip("of a 300I DUO with ATB")


def fia(ops, q, k, **options):
    return ops.npu_fused_infer_attention_score(
        q, k, k, num_heads=HEADS, num_key_value_heads=HEADS, scale=0.1, **options
    )[0]


def test_fia_in_tnd_layout(a2, ops, x):
    q = x(1, 4, HEADS * D)
    fia(ops, q, q, input_layout="BSH")
    q = x(4, HEADS, D)
    with limit(r"queryD\(96\)"):
        fia(ops, q, q, input_layout="TND", actual_seq_lengths=[4], actual_seq_lengths_kv=[4])


def test_fia_chunk_over_small_blocks(a2, npu, ops, x):
    def call(block_size):
        options = {"block_table": x(1, 2, dtype=torch.int32), "block_size": block_size}
        options |= {"actual_seq_lengths": [4], "actual_seq_lengths_kv": [block_size]}
        options |= {"atten_mask": (x(2048, 2048) > 2), "sparse_mode": 3}
        fia(ops, x(1, 4, HEADS * D), x(3, block_size, HEADS * D), **options)

    call(BLOCK)
    with limit("must be a multiple of 128"):
        call(64)


def test_cache_mode_is_given(a2, ops, x):
    if not has_cache_write(ops):
        pytest.skip("this torch_npu has no operator that writes an ND cache")
    k, cache = x(2, HEADS, D), x(1, BLOCK, HEADS, D)
    slots = torch.tensor([0, 1]).to(k.device)
    ops.npu_scatter_pa_kv_cache(k, k, cache, cache.clone(), slots, cache_mode="Norm")
    with limit("cache_mode PA_NZ"):
        ops.npu_scatter_pa_kv_cache(k, k, cache, cache.clone(), slots)


def paged(ops, q, cache, lengths, out):
    ops._npu_paged_attention(
        query=q,
        key_cache=cache,
        value_cache=cache,
        num_kv_heads=HEADS,
        num_heads=HEADS,
        scale_value=0.1,
        block_table=torch.zeros(1, 1, dtype=torch.int32).to(q.device),
        context_lens=lengths,
        out=out,
    )


def nz_cache(npu, ops):
    shape = (1, HEADS * D // 16, BLOCK, 16)
    return ops.empty_with_format(shape, dtype=HALF, device=npu.torch_device, acl_format=29).zero_()


def test_lengths_of_paged_attention_on_a2(a2, ops, x):
    q, cache, lengths = x(1, HEADS, D), x(1, BLOCK, HEADS, D), torch.ones(1, dtype=torch.int32)
    paged(ops, q, cache, lengths, q.clone())
    with limit("must be on the CPU"):
        paged(ops, q, cache, lengths.to(q.device), q.clone())


def test_lengths_of_paged_attention_on_duo(duo, npu, ops, x):
    q, cache, lengths = x(1, HEADS, D), nz_cache(npu, ops), torch.ones(1, dtype=torch.int32)
    paged(ops, q, cache, lengths.to(q.device), q.clone())
    with limit("must be on the device"):
        paged(ops, q, cache, lengths, q.clone())


def test_output_is_contiguous(duo, npu, ops, x):
    q, lengths = x(1, HEADS, D), x(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="contiguous"):
        paged(ops, q, nz_cache(npu, ops), lengths, x(1, HEADS, 2 * D)[..., ::2])


def test_cache_is_nz_on_duo(duo, npu, ops, x):
    q, lengths = x(1, HEADS, D), x(1, dtype=torch.int32)
    with limit("NZ format"):
        paged(ops, q, x(1, HEADS * D // 16, BLOCK, 16), lengths, q.clone())


def test_tokens_are_padded_on_duo(duo, npu, ops, x):
    mask = DuoAtbAttention(ops, npu.torch_device).square_mask(16)

    def call(n):
        q = x(n, HEADS, D)
        ops._npu_flash_attention(
            query=q,
            key=q,
            value=q,
            mask=mask,
            seq_len=torch.tensor([n], dtype=torch.int32),
            scale_value=0.1,
            num_heads=HEADS,
            num_kv_heads=HEADS,
            out=torch.empty_like(q),
        )

    call(16)
    with limit("multiple of 16"):
        call(15)


def test_bf16_on_duo(duo, npu, ops, x):
    q, lengths = x(1, HEADS, D, dtype=torch.bfloat16), x(1, dtype=torch.int32)
    with limit("bfloat16"):
        paged(ops, q, nz_cache(npu, ops), lengths, q.clone())
    with pytest.raises(ValueError, match="bfloat16 is not served on Ascend310P3; use float16"):
        npu.resolve_dtype("float16", "bfloat16")


def test_bf16_on_a2(a2, npu, x):
    assert npu.resolve_dtype("bfloat16", "auto") == (torch.bfloat16, "")
    with pytest.raises(ValueError, match="float32 is not served"):
        npu.resolve_dtype("float16", "float32")


def test_gelu_of_torch_is_always_tanh(npu):
    x = torch.linspace(-3, 3, 64)
    on_device = x.to(npu.torch_device)
    erf, tanh = torch.nn.functional.gelu(x), torch.nn.functional.gelu(x, approximate="tanh")
    assert torch.equal(torch.nn.functional.gelu(on_device).cpu(), tanh)
    assert torch.equal(npu.operators().activation("gelu_erf")(on_device).cpu(), erf)
    assert torch.equal(npu.operators().activation("gelu_tanh")(on_device).cpu(), tanh)


def paged_attention(table):
    (found,) = (choice for choice in table if choice.part == "paged attention")
    return found


@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_size", [16, 64, 128, 256])
def test_table_has_an_operator_for_every_shape(npu, head_dim, block_size):
    kv_format = FloatKV(HALF)
    table = npu.operators().operator_table(head_dim, 8, block_size, kv_format)
    assert all(c.operator and c.reason for c in table)
    assert "torch matmul" not in paged_attention(table).operator
    with pytest.raises(ValueError, match="multiple of 16"):
        npu.operators().operator_table(head_dim, 8, 24, kv_format)


@pytest.mark.parametrize("head_dim", [32, 48, 64, 80, 96, 128, 256])
def test_int8_caches_are_served_or_refused(npu, chip, head_dim):
    """By name, with the reason, before weights are read as when the cache is made."""
    ops, kv_format = npu.operators(), Int8KV(HALF)
    if chip != "A2" or head_dim % 32:
        word = f"head_dim is {head_dim}" if chip == "A2" else "300I DUO take scales"
        for call in (
            lambda: npu.check_kv_format(kv_format, head_dim),
            lambda: ops.allocate_kv_cache(CacheShape(2, 128, 2, head_dim), kv_format),
            lambda: ops.allocate_rows(CacheShape(2, 40, 2, head_dim), kv_format),
        ):
            with pytest.raises(ConfigError, match=f"kv_cache_dtype is int8, .*{word}.*use kv"):
                call()
        (finding,) = ops.describe_operators(head_dim, 8, 128, kv_format)
        assert finding.ok is False
        return
    npu.check_kv_format(kv_format, head_dim)
    assert "int8" in paged_attention(ops.operator_table(head_dim, 8, 128, kv_format)).operator
    layer = ops.allocate_kv_cache(CacheShape(3, 64, 2, head_dim), kv_format)
    assert [tuple(t.shape) for t in layer[1:3]] == [(3, 64, 2, head_dim), (3, 64, 2)]
    assert sum(t.untyped_storage().nbytes() for t in layer) >= (
        3 * 64 * kv_format.bytes_per_token(2, head_dim)
    )
    with pytest.raises(ConfigError, match="multiple of 32 on an NPU"):
        ops.allocate_kv_cache(CacheShape(2, 16, 2, head_dim), kv_format)


def test_int8_pages_take_one_query_and_their_mode(a2, npu, ops, x):
    def call(s=1, mode=5, block_size=BLOCK, dtype=torch.float32, heads=HEADS):
        cache = x(2, block_size, HEADS * D).to(torch.int8)
        scale = x(2, heads, block_size, dtype=dtype)
        options = {"block_table": x(1, 1, dtype=torch.int32), "block_size": block_size}
        options |= {f"{n}_antiquant_scale": scale for n in ("key", "value")}
        options |= {f"{n}_antiquant_mode": mode for n in ("key", "value")}
        fia(ops, x(1, s, HEADS * D), cache, actual_seq_lengths_kv=[7], **options)

    call()
    for wrong, text in (
        ({"s": 4}, "one query per row"),
        ({"mode": 3}, "5 is the one"),
        ({"block_size": 16}, "multiple of 32"),
        ({"dtype": HALF}, "fp32"),
        ({"heads": 1}, r"\[N, H, P\]"),
    ):
        with limit(text):
            call(**wrong)


def test_lccl(npu, chip):
    assert npu.collectives("hccl") == "hccl"
    if chip == "A2":
        assert npu.collectives("lccl") == "lccl"
    else:
        with pytest.raises(ValueError, match="300I DUO"):
            npu.collectives("lccl")
