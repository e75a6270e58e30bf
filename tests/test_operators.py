# SPDX-License-Identifier: Apache-2.0
"""Every operator of every device that can be used here equals the base class, plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from support.operators import (
    BASE,
    CACHE_DTYPES,
    DTYPES,
    assert_near,
    batch_on,
    make_batch,
    make_cache,
    randn,
)

from gptneox.config.model import ACTIVATIONS
from gptneox.config.settings import DEVICES
from gptneox.devices import select
from gptneox.devices.cache import CacheShape, FloatCache, FloatKV
from gptneox.devices.device import Device
from gptneox.devices.operators import Operators, check_shape
from gptneox.devices.step import (
    ForwardBatch,
    PaddedBatch,
    PaddedStep,
    PagedStep,
    RotaryTables,
    Step,
)
from gptneox.kv_cache import PagedKVCache

HEAD_DIMS = [32, 64, 80, 96, 128, 256]
# (cached tokens before this step, tokens of this step); one token counts as decoding.
BATCHES = {
    "one token, nothing cached": [(0, 1)],
    "one prompt": [(0, 40)],
    "decode": [(0, 1), (15, 1), (16, 1), (127, 1), (128, 1), (300, 1)],
    "ragged prompts": [(0, 7), (0, 16), (0, 17), (0, 129), (0, 2)],
    "prompts after cached prefixes": [(128, 33), (16, 2), (256, 5), (5, 40)],
    "all together": [(31, 1), (0, 1), (200, 1), (0, 20), (128, 40), (17, 2)],
}


def begin(cache: PagedKVCache, batch: ForwardBatch, tables: RotaryTables | None = None) -> Step:
    """A step over `cache` that rotates by no angle unless told."""
    device = cache.ops.torch_device
    if tables is None:
        cos = torch.ones(1024, 1, device=device)
        tables = RotaryTables(cos, torch.zeros_like(cos))
    return cache.begin(batch_on(batch, device), tables)


# -- attention and cache -------------------------------------------------------------------------


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("name", BATCHES)
def test_paged_attention(
    name: str, block_size: int, cache_dtype: torch.dtype, ops: Operators
) -> None:
    dtype = torch.bfloat16 if cache_dtype == torch.int8 else cache_dtype
    batch = make_batch(BATCHES[name], block_size)
    num_tokens = sum(batch.q_lens_list)
    for head_dim in HEAD_DIMS:
        heads = 3 if head_dim < 128 else 1
        q, k, v = (randn(num_tokens, heads, head_dim, seed=i, dtype=dtype) for i in range(3))
        q = 2 * q  # scores with a standard deviation of 2: some keys matter more than others
        results = []
        for which in (BASE, ops):
            cache = make_cache(which, batch, block_size, heads, head_dim, cache_dtype)
            # As the model passes them: parts of one fused projection, not contiguous.
            fused = torch.stack([q, k, v], dim=2).to(which.torch_device)
            results.append((begin(cache, batch).attend(0, fused), *cache.layers[0]))
        (expected, *expected_cache), (actual, *actual_cache) = results
        assert_near(actual, expected)
        for ours, theirs in zip(actual_cache, expected_cache, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0, equal_nan=True)


def test_base_attention_against_fp64() -> None:
    """The specification itself: softmax of scaled products over what is visible, in fp64."""
    scale = 80**-0.5
    q, k, v = (2 * randn(37, 3, 80, seed=i) for i in range(3))
    q = q[-9:]
    expected = torch.empty(9, 3, 80, dtype=torch.float64)
    for i in range(9):
        for h in range(3):
            seen = 37 - 9 + i + 1
            scores = k[:seen, h].double() @ q[i, h].double() * scale
            expected[i, h] = scores.softmax(0) @ v[:seen, h].double()
    actual = BASE.causal_attention(q, k, v, scale)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_stay_finite(dtype: torch.dtype, ops: Operators) -> None:
    """Unscaled products of 128 * 128 * 64 = 2^20 are beyond fp16; equal keys share the weight.

    Powers of two, so that every product and sum is exact.
    """
    batch = make_batch([(20, 1), (0, 20)], 16)
    results = []
    for which in (BASE, ops):
        cache = make_cache(which, batch, 16, 2, 64, dtype)
        cache.layers[0][0].fill_(128)
        q, k = (torch.full((21, 2, 64), 128, dtype=dtype, device=which.torch_device) for _ in "qk")
        v = randn(21, 2, 64, seed=3, dtype=dtype).to(which.torch_device)
        results.append(begin(cache, batch).attend(0, torch.stack((q, k, v), 2)))
    mean = randn(21, 2, 64, seed=3, dtype=dtype)[1:].float().mean(0).to(dtype)
    assert_near(results[0][-1], mean)
    assert_near(results[1], results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 50), (33, 33), (20, 50)])
def test_dense_attention(
    num_queries: int, num_keys: int, padded: bool, dtype: torch.dtype, ops: Operators
) -> None:
    """Left padding of three rows; what a padding query gets must only be finite."""
    pads = [0, num_keys // 2, num_keys - 1] if padded else [0, 0, 0]
    mask = torch.arange(num_keys)[None] >= torch.tensor(pads)[:, None]
    for head_dim in HEAD_DIMS:
        q = 2 * randn(3, num_queries, 2, head_dim, seed=1, dtype=dtype)
        k, v = (randn(3, num_keys, 2, head_dim, seed=i, dtype=dtype) for i in (2, 3))
        arguments = (q, k, v, mask if padded else None)
        expected = BASE.dense_attention(*arguments, head_dim**-0.5)
        moved = [None if x is None else x.to(ops.torch_device) for x in arguments]
        actual = ops.dense_attention(*moved, head_dim**-0.5).cpu()
        real = mask[:, num_keys - num_queries :]
        assert_near(actual[real], expected[real])
        assert torch.isfinite(actual).all()
        stores = [torch.cat([x, x.new_full((3, 9, 2, head_dim), math.nan)], 1) for x in moved[1:3]]
        ids = torch.zeros(3 * num_queries, dtype=torch.int64, device=ops.torch_device)
        padded = PaddedBatch(ids, ids, 3, num_queries, num_keys, moved[3])
        tables = RotaryTables(torch.ones(1, 1), torch.zeros(1, 1))
        step = ops.begin_padded(padded, [FloatCache(*stores)], tables, head_dim**-0.5)
        again = actual
        if isinstance(step, PaddedStep):  # else its own tests try it
            again = step.attend_cached(FloatCache(*stores), moved[0])
        assert_near(again.cpu()[real], expected[real])
        for row, pad in enumerate(pads):  # a row equals the sequence alone, without its padding
            start = max(pad - (num_keys - num_queries), 0)
            alone = BASE.causal_attention(
                q[row, start:], k[row, pad:], v[row, pad:], head_dim**-0.5
            )
            assert_near(expected[row, start:], alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_store_kv_writes_its_slots_only(dtype: torch.dtype, ops: Operators) -> None:
    k_cache, v_cache = ops.allocate_kv_cache(CacheShape(5, 16, 2, 80), FloatKV(dtype))
    assert k_cache.shape == v_cache.shape == (5, 16, 2, 80)
    assert k_cache.dtype == v_cache.dtype == dtype
    assert k_cache.device.type == ops.torch_device.type
    assert k_cache.data_ptr() != v_cache.data_ptr()
    k_cache.fill_(7)
    v_cache.fill_(8)
    slots = torch.tensor([79, 0, 17, 16, 42])
    k, v = (randn(5, 2, 80, seed=i, dtype=dtype) for i in (1, 2))
    device = ops.torch_device
    batch = make_batch([(0, 1)] * 5, 16)
    batch.slot_mapping = slots
    cos = torch.ones(1, 1)
    step = PagedStep(ops, batch_on(batch, device), [], RotaryTables(cos, cos), 1.0)
    step.store(FloatCache(k_cache, v_cache), k.to(device), v.to(device))
    for cache, new, old in ((k_cache, k, 7), (v_cache, v, 8)):
        rows = cache.flatten(0, 1).cpu()
        assert torch.equal(rows[slots], new)
        others = torch.ones(80, dtype=torch.bool).index_fill(0, slots, False)
        assert (rows[others] == old).all()


# -- dense operators -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("k", "f"), [(96, 288), (320, 77), (1, 5), (130, 1)])
def test_linear(k: int, f: int, has_bias: bool, dtype: torch.dtype, ops: Operators) -> None:
    weight = randn(f, k, seed=1, dtype=dtype) / math.sqrt(k)
    bias = randn(f, seed=2, dtype=dtype) if has_bias else None
    device = ops.torch_device
    # `pack_linear` owns what it is given, so each gets a copy.
    packed = ops.pack_linear(
        weight.clone().to(device), None if bias is None else bias.clone().to(device)
    )
    assert (packed.in_features, packed.out_features) == (k, f)
    reference = BASE.pack_linear(weight.float(), None if bias is None else bias.float())
    for num_rows in (1, 2, 17, 64):
        x = randn(num_rows, k, seed=num_rows, dtype=dtype)
        expected = BASE.linear(x.float(), reference).to(dtype)
        assert_near(ops.linear(x.to(device), packed), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 5, 16, 77, 1000])
def test_greedy(width: int, dtype: torch.dtype, ops: Operators) -> None:
    """The first of equal logits, wherever it stands, and one flag for all rows."""
    wide = randn(6, width + 3, seed=width).round(decimals=1).to(dtype)
    logits = wide.to(ops.torch_device)[
        :, :width
    ]  # columns of padded rows, as the head returns them
    expected = [row.index(max(row)) for row in wide[:, :width].tolist()]
    assert ops.greedy(logits).tolist() == [*expected, 1]
    assert ops.greedy(logits[:0]).tolist() == [1]
    for bad in (math.nan, math.inf, -math.inf):
        logits[4, width // 2] = bad
        found = ops.greedy(logits).tolist()
        assert found[:4] == expected[:4]
        assert found[-1] == 0
        assert 0 <= found[4] < width


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_layer_norm(eps: float, dtype: torch.dtype, ops: Operators) -> None:
    for width in (32, 77, 704):
        # The mean is far from 0 and the rows differ in scale: fp32 statistics are needed.
        x = (randn(9, width, seed=1) * torch.logspace(-2, 1, 9)[:, None] + 3).to(dtype)
        weight, bias = 1 + randn(width, seed=2, dtype=dtype) / 4, randn(width, seed=3, dtype=dtype)
        centred = x.double() - x.double().mean(-1, keepdim=True)
        exact = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        exact = exact * weight.double() + bias.double()
        moved = [t.to(ops.torch_device) for t in (x, weight, bias)]
        expected = BASE.layer_norm(x, weight, bias, eps)
        assert_near(expected, exact.to(dtype))
        assert_near(ops.layer_norm(*moved, eps), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS.values())))
def test_activation(name: str, dtype: torch.dtype, ops: Operators) -> None:
    x = torch.linspace(-8, 8, 999, dtype=torch.float64)
    tanh_inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    exact = {
        "gelu_erf": 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_tanh": 0.5 * x * (1 + torch.tanh(tanh_inner)),
        "silu": x / (1 + torch.exp(-x)),
        "relu": x.clamp(min=0),
    }[name]
    expected = BASE.activation(name)(x.float())
    torch.testing.assert_close(expected.double(), exact, rtol=0, atol=2e-6)
    expected = BASE.activation(name)(x.to(dtype))
    actual = ops.activation(name)(x.to(dtype).to(ops.torch_device)).cpu()
    assert actual.dtype == dtype
    # Values differ in size by orders of magnitude, so the limit is relative to each.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=2 * eps, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"),
    [
        *((16, 2), (32, 8), (64, 16), (80, 20), (96, 24), (128, 32), (128, 64), (256, 64)),
        *((64, 64), (80, 80), (96, 96), (128, 128)),
    ],
)
def test_rotary(head_dim: int, rotary_dim: int, dtype: torch.dtype, ops: Operators) -> None:
    angles = 7 * randn(50, rotary_dim // 2, seed=1)
    positions = torch.tensor([0, 49, 3, 3, 17])
    q, k, v = (randn(5, 2, head_dim, seed=i, dtype=dtype) for i in (2, 3, 4))
    before = q.clone(), k.clone(), v.clone()
    expected = BASE.rotary(q, k, positions, angles.cos(), angles.sin())
    # As the model passes them: parts of one fused projection, not contiguous.
    fused = torch.stack([q, k, v], dim=2).to(ops.torch_device)
    rest = [t.to(ops.torch_device) for t in (positions, angles.cos(), angles.sin())]
    actual = ops.rotary(fused[:, :, 0], fused[:, :, 1], *rest)
    for ours, theirs, plain in zip(actual, expected, before[:2], strict=True):
        assert_near(ours, theirs)
        assert torch.equal(ours[..., rotary_dim:].cpu(), plain[..., rotary_dim:])
        first, second = plain[..., :rotary_dim].double().chunk(2, -1)
        cos, sin = (t[positions][:, None].double() for t in (angles.cos(), angles.sin()))
        exact = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        # fp32 arithmetic, rounded once: half a unit of each value. A table or a product in half
        # precision would take twice as much.
        rtol = 0.501 * torch.finfo(dtype).eps
        torch.testing.assert_close(theirs[..., :rotary_dim].double(), exact, rtol=rtol, atol=1e-6)
    assert torch.equal(fused[:, :, 2].cpu(), before[2]), "v is none of its business"


# -- the device ----------------------------------------------------------------------------------


def test_device_facts(device: Device) -> None:
    device.setup(0, 1, 1)
    device.synchronize()
    memory = device.memory()
    assert 0 < memory.free <= memory.total
    assert memory.peak > 0
    assert device.describe()
    assert device.name in DEVICES
    assert device.measure_bandwidth(1 << 20) > 1e7  # 0.01 GB/s
    assert device.measure_matmul(torch.float32) > 1e7


@pytest.mark.parametrize("requested", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("file_dtype", ["float32", "bfloat16", "float16"])
def test_a_requested_dtype_is_never_replaced(
    file_dtype: str, requested: str, device: Device
) -> None:
    assert device.resolve_dtype(file_dtype, requested) == (getattr(torch, requested), "")


@pytest.mark.parametrize("file_dtype", ["float32", "bfloat16", "float16"])
def test_another_dtype_than_the_file_is_said(file_dtype: str, device: Device) -> None:
    dtype, notice = device.resolve_dtype(file_dtype, "auto")
    assert (dtype == getattr(torch, file_dtype)) == (notice == "")
    if notice:
        assert file_dtype in notice
        assert str(dtype).removeprefix("torch.") in notice


def test_select_auto_takes_the_first_usable_device() -> None:
    usable = [name for name in DEVICES if select_or_reason(name)[0]]
    assert select().name == select("auto").name == usable[0]


def select_or_reason(name: str) -> tuple[Device | None, str]:
    try:
        return select(name), ""
    except RuntimeError as error:
        return None, str(error)


@pytest.mark.parametrize("name", ["cpu", "cuda", "npu"])
def test_a_named_device_is_that_one_or_an_error(name: str) -> None:
    device, reason = select_or_reason(name)
    assert device is not None or repr(name) in reason
    assert device is None or device.name == name
    assert device is not None or name != "cpu", reason


@pytest.mark.parametrize("name", ["tpu", "", "CPU", "base", "cpu:0"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"use one of auto, .*cpu") as error:
        select(name)
    assert repr(name) in str(error.value)


def test_check_shape() -> None:
    check_shape(torch.zeros(2, 3), (None, 3), "x")
    for shape in [(2, 4), (None, 3, 1), (6,)]:
        with pytest.raises(ValueError, match=r"x has shape \[2, 3\]"):
            check_shape(torch.zeros(2, 3), shape, "x")
