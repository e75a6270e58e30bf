# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels against the base class and fp64, several at once, and how they are compiled.

Limits. A product of K terms in fp32, in any order, is off by about sqrt(K) roundings of 2^-24 of
the sum of absolute products; four times that is allowed. fp16 weights are widened, so the same
limit holds for them; for bf16 the activations may be rounded to bf16 first, as the oracle then
does too. Attention keeps to the 2e-5 of the largest value that holds for every backend; where a
prompt's queries and softmax weights are rounded to bf16, the oracle's queries are too, and for the
weights 2^-7 of the largest value is allowed, twice what rounding each of them can make.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import platform
import pwd
import shutil
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import checkpoints
from support.logits import paged_logits, random_ids, rms
from support.operators import (
    BASE,
    CACHE_DTYPES,
    DTYPES,
    assert_near,
    format_of,
    make_batch,
    make_cache,
    randn,
)
from torch import Tensor
from torch.utils import cpp_extension

from gptneox.config.environment import Environment
from gptneox.config.errors import ConfigError
from gptneox.devices import create
from gptneox.devices.cache import Int8Cache, LayerCache
from gptneox.devices.cpu import blocked
from gptneox.devices.cpu import build as cpu_build
from gptneox.devices.cpu import device as cpu_device
from gptneox.devices.cpu.compiled import ACTIVATION_IDS, CompiledCpuDevice, CompiledCpuOperators
from gptneox.devices.cpu.device import CpuDevice
from gptneox.devices.cpu.operators import CpuOperators
from gptneox.devices.device import Finding
from gptneox.devices.operators import FourProducts, InputRange, LayerWeights
from gptneox.devices.step import ForwardBatch, PagedStep, RotaryTables, Step
from gptneox.kv_cache import ContiguousKVCache
from gptneox.weights.formats import FloatWeight, IntegerWeight
from gptneox.weights.gptq import quantize_groups
from gptneox.weights.quantize import dequantize, quantize_rows

ROOT = Path(__file__).resolve().parents[1]
DTYPE = st.sampled_from(DTYPES)
CACHE_DTYPE = st.sampled_from(CACHE_DTYPES)
ROWS = st.one_of(st.sampled_from([1, 2, 12, 13, 24, 25, 300]), st.integers(1, 130))
WIDTH = st.one_of(st.sampled_from([1, 16, 17, 32, 256, 1025]), st.integers(1, 300))
# On an emulated processor, this many examples of each property are enough.
MOST_EXAMPLES = int(os.environ.get("MOST_EXAMPLES", "1000"))


def few(max_examples: int) -> settings:
    """The same examples in every run, no more than MOST_EXAMPLES."""
    number = min(max_examples, MOST_EXAMPLES)
    return settings(max_examples=number, deadline=None, derandomize=True, database=None)


# From how many rows on products are blocked: never, or from one row on.
METHODS = {"register tile": blocked.NEVER, "blocked": 1}


@pytest.fixture(scope="module", params=METHODS)
def cpu(request: pytest.FixtureRequest) -> Iterator[CompiledCpuOperators]:
    """With kernels, by each method, or the tests that need them are skipped."""
    made = create("cpu")
    if not isinstance(made, CompiledCpuDevice):
        pytest.skip("the CPU kernels are off, or cannot be compiled here")
    before = made.kernels.blocked_from()
    from_row = METHODS[request.param]
    made.kernels.set_blocked_from(**dict.fromkeys(blocked.FORMATS, from_row))
    ops = made.operators()
    try:
        ops.linear(torch.ones(1, 16), ops.pack_linear(torch.ones(1, 16), None))
    except RuntimeError as error:
        if platform.machine() == "x86_64":
            raise
        pytest.skip(f"torch has no blocked kernels for this processor: {error}")
    else:
        yield ops
    finally:
        made.kernels.set_blocked_from(*before)


@pytest.fixture(scope="module")
def plain() -> CpuOperators:
    """The same device without kernels."""
    return CpuDevice().operators()


def rounds(dtype: torch.dtype, cpu: CompiledCpuOperators) -> bool:
    """Whether what is multiplied with numbers of `dtype` is rounded to bf16 first."""
    return dtype in (torch.bfloat16, torch.int8) and "bf16" in cpu.kernels.describe()


def rounded(x: Tensor, dtype: torch.dtype, cpu: CompiledCpuOperators) -> Tensor:
    """Activations as a product with weights of `dtype` reads them, in fp64."""
    return (x.bfloat16() if rounds(dtype, cpu) else x).double()


# -- products ------------------------------------------------------------------------------------


@few(max_examples=60)
@given(ROWS, WIDTH, WIDTH, DTYPE, st.booleans(), st.sampled_from(["", *ACTIVATION_IDS]))
def test_products(
    cpu: CompiledCpuOperators,
    num_rows: int,
    k: int,
    f: int,
    dtype: torch.dtype,
    has_bias: bool,
    activation: str,
) -> None:
    x, weight = randn(num_rows, k, seed=1), randn(f, k, seed=2, dtype=dtype) / math.sqrt(k)
    bias = randn(f, seed=3, dtype=dtype) if has_bias else None
    packed = cpu.pack_linear(weight, bias)
    number = ACTIVATION_IDS.get(activation, 0)
    actual = cpu.kernels.linear(x, packed.weight, packed.bias, number)
    seen, added = rounded(x, dtype, cpu), 0 if bias is None else bias.double()
    exact = seen @ weight.double().T + added
    limit = 4 * math.sqrt(k) * 2**-24 * (seen.abs() @ weight.double().abs().T) + 2**-22
    if activation:
        exact = BASE.activation(activation)(exact)
        limit = 1.2 * limit + 1e-6  # the steepest slope, and the function's own error
    assert actual.dtype == torch.float32
    assert ((actual - exact).abs() <= limit + 2**-22 * exact.abs()).all()


@few(max_examples=60)
@given(
    ROWS,
    WIDTH,
    WIDTH,
    st.sampled_from([torch.float32, torch.float16]),
    st.booleans(),
    st.sampled_from(["", *ACTIVATION_IDS]),
)
def test_int8_products(
    cpu: CompiledCpuOperators,
    num_rows: int,
    k: int,
    f: int,
    dtype: torch.dtype,
    has_bias: bool,
    activation: str,
) -> None:
    """Integers are exact. Inputs are rounded to 24 bits of the largest in a row, or to 16."""
    generator = torch.Generator().manual_seed(k)
    values = torch.randint(-128, 128, (f, k), generator=generator, dtype=torch.int8)
    values[0] = -128
    scale = torch.rand(f, generator=generator) / (100 * math.sqrt(k))
    scale[-1] = 0
    x, bias = randn(num_rows, k, seed=1), randn(f, seed=3) if has_bias else None
    packed = cpu.pack_int8(values, scale, bias, dtype)
    assert packed.weight.nbytes < values.numel() + 64 * (k + f) + 2**14, "bytes, not floats"
    number = ACTIVATION_IDS.get(activation, 0)
    weight = values.double() * scale.double()[:, None]
    exact = x.double() @ weight.T + (0 if bias is None else bias.double())
    if isinstance(packed.weight, cpu.kernels.PackedIntegers):
        actual = cpu.kernels.linear_integers(x, packed.weight, packed.bias, number)
        step = 2.0 ** (-23 if dtype == torch.float32 else -15) * x.double().abs().amax(1, True)
        limit = (0.51 * step + 2**-22 * x.double().abs().amax(1, True)) * weight.abs().sum(1)
    else:
        actual = cpu.kernels.linear(x, packed.weight, packed.bias, number)
        limit = 4 * math.sqrt(k) * 2**-24 * (x.double().abs() @ weight.abs().T)
    limit = limit + 2**-22
    if activation:
        exact = BASE.activation(activation)(exact)
        limit = 1.2 * limit + 1e-6
    assert ((actual - exact).abs() <= limit + 2**-22 * exact.abs()).all()


@few(max_examples=60)
@given(ROWS, WIDTH, WIDTH, st.booleans(), st.sampled_from([None, InputRange(0.02, -9)]))
def test_products_of_integers(
    cpu: CompiledCpuOperators,
    num_rows: int,
    k: int,
    f: int,
    has_bias: bool,
    inputs: InputRange | None,
) -> None:
    """Those of the base class, but for the rounding of fp32: the sums are exact in both."""
    if "int8 dot products" not in cpu.kernels.describe() and cpu.kernels.blocked_from()[-1] == 1:
        pytest.skip("this processor has no blocked products that are exact")
    generator = torch.Generator().manual_seed(k)
    values = torch.randint(-128, 128, (f, k), generator=generator, dtype=torch.int8)
    values[0] = -128
    scale = torch.rand(f, generator=generator)
    x, bias = randn(num_rows, k, seed=1), randn(f, seed=3) if has_bias else None
    x[0, 0], x[-1] = math.inf, 0
    start = None if inputs is None else torch.arange(f, dtype=torch.int32)
    packed, right = (
        each.pack_integers(values, scale, bias, torch.float32, inputs, start)
        for each in (cpu, BASE)
    )
    assert packed.weight.nbytes < values.numel() + 64 * (k + f) + 2**14, "bytes, not floats"
    expected = right.multiply(BASE, x)
    torch.testing.assert_close(
        packed.multiply(cpu, x), expected, rtol=1e-6, atol=1e-6, equal_nan=True
    )


def test_integers_that_cannot_be_packed(cpu: CompiledCpuOperators) -> None:
    values = torch.zeros(1, 65536, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"65536 inputs; at most 65535 add up in 32 bits"):
        cpu.pack_integers(values, torch.ones(1), None, torch.float32)
    with pytest.raises(ValueError, match=r"scales have shape \[2\]; \[1\]"):
        cpu.pack_integers(values[:, :8], torch.ones(2), None, torch.float32)


def test_what_cannot_be_packed(cpu: CompiledCpuOperators) -> None:
    values = torch.zeros(5, 3, dtype=torch.int8)
    for weight, scales in ((values, None), (values.float(), torch.ones(5))):
        with pytest.raises(ValueError, match="int8 weights have scales, and no others"):
            cpu.kernels.pack(weight, scales)
    with pytest.raises(ValueError, match=r"scales have shape \[4\]; \[5\]"):
        cpu.kernels.pack(values, torch.ones(4))
    with pytest.raises(TypeError, match="is not served"):
        cpu.kernels.pack(values.int())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_where_the_method_changes(cpu: CompiledCpuOperators, dtype: torch.dtype) -> None:
    """One row more or less than the number from which on products are blocked."""
    before = cpu.kernels.blocked_from()
    weights = random_layer(256, 256, 300, has_bias=True, dtype=dtype, activation="silu")
    packed, x = cpu.pack_layer(weights), randn(14, 256, seed=1)
    try:
        outputs = []
        for num_rows in (12, 13, 14):
            cpu.kernels.set_blocked_from(**dict.fromkeys(blocked.FORMATS, 13))
            stream = x[:num_rows].clone()
            qkv, mlp = cpu.layer_front(stream, packed)
            outputs.append(cpu.layer_back(qkv[:, :256].contiguous(), mlp, packed, stream))
    finally:
        cpu.kernels.set_blocked_from(*before)
    limit = 2**-6 if dtype == torch.bfloat16 else 2e-5
    for out in outputs[:2]:
        largest = outputs[2].abs().max().item()
        torch.testing.assert_close(out, outputs[2][: len(out)], rtol=0, atol=limit * largest)


@few(max_examples=20)
@given(WIDTH, WIDTH, DTYPE)
def test_packing_keeps_every_weight(
    cpu: CompiledCpuOperators, k: int, f: int, dtype: torch.dtype
) -> None:
    """Rows of the identity pick them out again; a strided weight is read as it is indexed."""
    weight = randn(k, f, seed=k, dtype=dtype).T
    packed = cpu.pack_linear(weight, None)
    out = torch.cat([cpu.kernels.linear(r, packed.weight, None, 0) for r in torch.eye(k).split(7)])
    assert torch.equal(out, weight.T.float())
    assert packed.weight.nbytes >= weight.numel() * weight.element_size()


def random_layer(
    c: int, w: int, f: int, *, has_bias: bool, dtype: torch.dtype, activation: str
) -> LayerWeights:
    def make(seed: int, *shape: int) -> Tensor:
        return (randn(*shape, seed=seed) / math.sqrt(shape[-1])).to(dtype)

    def weight(seed: int, *shape: int) -> FloatWeight:
        return FloatWeight(make(seed, *shape))

    return LayerWeights(
        norm_attention=(1 + make(1, c), make(2, c)),
        norm_mlp=(1 + make(3, c), make(4, c)),
        query_key_value=(weight(5, 3 * w, c), make(6, 3 * w) if has_bias else None),
        dense_h_to_4h=(weight(7, f, c), make(8, f)),
        dense=(weight(9, c, w), make(10, c) if has_bias else None),
        dense_4h_to_h=(weight(11, c, f), make(12, c)),
        eps=1e-5,
        activation=activation,
    )


def layer_by_layer(x: Tensor, weights: LayerWeights, ops: CpuOperators) -> tuple[Tensor, Tensor]:
    """Unfused, in the dtype of x: qkv [T, 3W] and x + dense(q) + mlp, attention being its q."""

    def linear(x: Tensor, pair: tuple[FloatWeight, Tensor | None]) -> Tensor:
        weight, bias = (None if t is None else t.to(x.dtype) for t in (pair[0].values, pair[1]))
        return BASE.linear(x, BASE.pack_linear(weight, bias))

    norms = [
        ops.layer_norm(x, *(t.to(x.dtype) for t in pair), weights.eps)
        for pair in (weights.norm_attention, weights.norm_mlp)
    ]
    qkv = linear(norms[0], weights.query_key_value)
    mlp = ops.activation(weights.activation)(linear(norms[1], weights.dense_h_to_4h))
    attended = qkv[:, : weights.dense[0].values.shape[1]]
    return qkv, x + (linear(attended, weights.dense) + linear(mlp, weights.dense_4h_to_h))


@few(max_examples=60)
@given(
    st.one_of(st.sampled_from([1, 3, 12, 13, 24, 25]), st.integers(1, 130)),
    st.tuples(st.integers(2, 160), st.integers(1, 100), st.integers(1, 300)),
    DTYPE,
    st.booleans(),
    st.sampled_from(sorted(ACTIVATION_IDS)),
    st.sampled_from([1, 3]),
)
def test_a_layer_in_two_calls(
    cpu: CompiledCpuOperators,
    plain: CpuOperators,
    num_rows: int,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    has_bias: bool,
    activation: str,
    num_threads: int,
) -> None:
    """Against fp64; half precision may be no further off than plain torch, operator by operator."""
    torch.set_num_threads(num_threads)
    weights = random_layer(*sizes, has_bias=has_bias, dtype=dtype, activation=activation)
    x = (3 * randn(num_rows, sizes[0], seed=20) + 1).to(dtype)
    exact = layer_by_layer(x.double(), weights, plain)
    packed = cpu.pack_layer(weights)
    stream = x.float().clone()
    qkv, mlp = cpu.layer_front(stream, packed)
    attended = qkv[:, : sizes[1]].contiguous()
    partial = cpu.layer_back(attended, mlp, packed)
    out = cpu.layer_back(attended, mlp, packed, stream)
    assert out.data_ptr() == stream.data_ptr()
    torch.testing.assert_close(out, x.float() + partial, rtol=0, atol=4e-6 * out.abs().max().item())
    theirs = layer_by_layer(x, weights, plain)
    for actual, expected, other in zip((qkv, out), exact, theirs, strict=True):
        largest = max(1.0, expected.abs().max().item())
        error = actual - expected
        if dtype == torch.float32:
            assert error.abs().max() <= 2e-5 * largest
        else:
            # One entry may be lucky; half a unit in the last place of the largest is not a fault.
            luck = torch.finfo(dtype).eps * largest / math.sqrt(error.numel())
            assert rms(error) <= rms(other - expected) + luck
    if dtype == torch.float32:
        folded = BASE.pack_layer(weights)
        front = BASE.layer_front(x, folded)
        assert_near(qkv, front[0])
        assert_near(out, BASE.layer_back(front[0][:, : sizes[1]], front[1], folded, x))


def in_int8(
    weights: LayerWeights, *linears: str, dtype: torch.dtype = torch.float32
) -> tuple[LayerWeights, LayerWeights]:
    """A layer of `dtype` with some weights of eight bits, and with the floats they stand for."""
    small, floats = {}, {}
    for name in linears:
        weight, bias = getattr(weights, name)
        made = quantize_rows(weight.values, dtype)
        small[name] = made, bias
        floats[name] = FloatWeight(dequantize(made, torch.float64)), bias
    return replace(weights, **small), replace(weights, **floats)


LINEARS = ("query_key_value", "dense_h_to_4h", "dense", "dense_4h_to_h")


@few(max_examples=40)
@given(
    st.one_of(st.sampled_from([1, 3, 12, 13, 24, 25, 300]), st.integers(1, 130)),
    st.tuples(st.integers(2, 160), st.integers(1, 100), st.integers(1, 300)),
    st.one_of(st.just(LINEARS), st.lists(st.sampled_from(LINEARS), min_size=1, unique=True)),
    st.sampled_from([torch.float32, torch.float16]),
    st.sampled_from([1, 3]),
)
def test_layers_of_int8_weights(
    cpu: CompiledCpuOperators,
    plain: CpuOperators,
    num_rows: int,
    sizes: tuple[int, int, int],
    linears: list[str],
    dtype: torch.dtype,
    num_threads: int,
) -> None:
    """Against fp64, all four of eight bits in the kernels of a layer, or mixed with floats.

    The two products of `back` have scales of their own: rows of one are a hundred times as large.
    """
    torch.set_num_threads(num_threads)
    weights = random_layer(*sizes, has_bias=True, dtype=torch.float32, activation="gelu_erf")
    weights.dense[0].values.mul_(100)
    small, floats = in_int8(weights, *linears, dtype=dtype)
    x = 3 * randn(num_rows, sizes[0], seed=20) + 1
    exact = layer_by_layer(x.double(), floats, plain)
    packed, stream = cpu.pack_layer(small), x.clone()
    qkv, mlp = cpu.layer_front(stream, packed)
    attended = qkv.view(num_rows, -1)[:, : sizes[1]].contiguous()
    out = cpu.layer_back(attended, mlp, packed, stream)
    partial = cpu.layer_back(attended, mlp, packed)
    largest = max(1.0, exact[1].abs().max().item())
    torch.testing.assert_close(out, x + partial, rtol=0, atol=4e-6 * largest)
    limit = 2e-5 if dtype == torch.float32 else 4e-4
    for actual, expected in zip((qkv, out), exact, strict=True):
        assert (actual - expected).abs().max() <= limit * max(1.0, expected.abs().max().item())


@few(max_examples=30)
@given(
    st.one_of(st.sampled_from([1, 8, 9, 300]), st.integers(1, 130)),
    st.tuples(st.integers(2, 160), st.integers(1, 100), st.integers(1, 300)),
    st.sampled_from([None, InputRange(0.02, -9)]),
    st.booleans(),
)
def test_layers_of_integers(
    cpu: CompiledCpuOperators,
    num_rows: int,
    sizes: tuple[int, int, int],
    inputs: InputRange | None,
    shares_norm: bool,
) -> None:
    """The products one by one give the same integers; one weight may have inputs of two digits."""
    has_digits = "int8 dot products" in cpu.kernels.describe()  # else W8A16 takes floats
    if not has_digits and cpu.kernels.blocked_from()[-1] == 1:
        pytest.skip("this processor has no blocked products that are exact")
    weights = random_layer(*sizes, has_bias=True, dtype=torch.float32, activation="gelu_tanh")
    if shares_norm:
        weights = replace(weights, norm_mlp=weights.norm_attention)
    small = in_int8(weights, *LINEARS, dtype=torch.float16)[0]
    for name in LINEARS[:3] if has_digits else LINEARS:
        weight, bias = getattr(small, name)
        start = torch.arange(weight.out_features, dtype=torch.int32)
        integers = IntegerWeight(weight.values, weight.scale, torch.float16, inputs, start)
        small = replace(small, **{name: (integers, bias)})
    x = 3 * randn(num_rows, sizes[0], seed=20) + 1
    packed, stream = cpu.pack_layer(small), x.clone()
    assert not isinstance(packed.front, FourProducts)
    qkv, mlp = cpu.layer_front(stream, packed)
    attended = qkv.view(num_rows, -1)[:, : sizes[1]].contiguous()
    out = cpu.layer_back(attended, mlp, packed, stream)
    apart = cpu._pack_four(small)
    front = cpu.layer_front(x, apart)
    assert torch.equal(qkv, front[0])
    expected = cpu.layer_back(attended, front[1], apart, x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("group_size", [16, 32, 48])
def test_layers_of_four_bits_in_groups_of_any_size(
    cpu: CompiledCpuOperators, plain: CpuOperators, group_size: int
) -> None:
    """Some of its matrices have one group, of all their inputs, and others several."""
    weights = random_layer(48, 48, 192, has_bias=True, dtype=torch.float32, activation="silu")
    small, floats = weights, weights
    for name in LINEARS:
        weight, bias = getattr(weights, name)
        made = quantize_groups(
            weight.values, group_size if name == "dense_4h_to_h" else 48, torch.float16
        )
        small = replace(small, **{name: (made, bias)})
        floats = replace(floats, **{name: (FloatWeight(made.dequantize(torch.float64)), bias)})
    x = 3 * randn(5, 48, seed=20) + 1
    exact = layer_by_layer(x.double(), floats, plain)[1]
    packed, stream = cpu.pack_layer(small), x.clone()
    qkv, mlp = cpu.layer_front(stream, packed)
    out = cpu.layer_back(qkv.view(5, -1)[:, :48].contiguous(), mlp, packed, stream)
    assert (out - exact).abs().max() <= 4e-4 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", [48, 96, 384, 1152])
def test_four_bits_in_several_chunks(
    cpu: CompiledCpuOperators, group_size: int, dtype: torch.dtype
) -> None:
    """Chunks of K end within groups; zeros are 8, or differ."""
    for zero in (torch.full((40, 1152 // group_size), 8), torch.arange(40)[:, None] % 16):
        values = torch.randint(0, 256, (40, 576), dtype=torch.uint8)
        scale = 0.01 + 0.01 * torch.rand(40, 1152 // group_size)
        zeros = zero.expand(scale.shape).to(torch.uint8).contiguous()
        packed = cpu.pack_int4(values, scale, zeros, None, dtype)
        integers = torch.stack((values & 15, values >> 4), 2).flatten(1)
        steps = integers.double() - zeros.double().repeat_interleave(group_size, 1)
        exact = steps * scale.double().repeat_interleave(group_size, 1)
        x = randn(40, 1152, seed=group_size)
        error = (cpu.linear(x, packed) - x.double() @ exact.T).abs().max()
        share = 2**-8 if dtype == torch.bfloat16 else 2**-15
        assert error <= share * (x.double().norm(dim=1).max() * exact.norm(dim=1).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_layers_of_no_rows(cpu: CompiledCpuOperators, dtype: torch.dtype) -> None:
    weights = random_layer(32, 32, 64, has_bias=True, dtype=torch.float32, activation="silu")
    packed = cpu.pack_layer(in_int8(weights, *LINEARS)[0] if dtype == torch.int8 else weights)
    qkv, mlp = cpu.layer_front(torch.empty(0, 32), packed)
    assert qkv.shape[0] == 0
    assert cpu.layer_back(torch.empty(0, 32), mlp, packed).shape == (0, 32)


def test_half_precision_layers_err_less_than_plain_torch(
    cpu: CompiledCpuOperators, plain: CpuOperators
) -> None:
    """At a width where luck has no part."""
    for dtype in (torch.bfloat16, torch.float16):
        weights = random_layer(512, 256, 1024, has_bias=True, dtype=dtype, activation="gelu_erf")
        x = (3 * randn(40, 512, seed=1)).to(dtype)
        _, exact = layer_by_layer(x.double(), weights, plain)
        packed, stream = cpu.pack_layer(weights), x.float().clone()
        qkv, mlp = cpu.layer_front(stream, packed)
        out = cpu.layer_back(qkv[:, :256].contiguous(), mlp, packed, stream)
        assert rms(out - exact) < 0.8 * rms(layer_by_layer(x, weights, plain)[1] - exact)


def test_a_trial_doubts_slow_matrix_units(
    cpu: CompiledCpuOperators, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not where there are none, and not for fp32, which they do not multiply."""
    monkeypatch.setattr(blocked, "_seconds", lambda *arguments: (1.0, 1.2))
    before = cpu.kernels.blocked_from()
    try:
        for has_matrix_units, expected in ((True, blocked._MANY), (False, blocked.NEVER)):
            path = tmp_path / str(has_matrix_units)
            blocked.choose(cpu.kernels, path, has_matrix_units=has_matrix_units)
            numbers = json.loads(path.read_text())
            assert (numbers["bf16"], numbers["fp32"]) == (expected, blocked.NEVER)
    finally:
        cpu.kernels.set_blocked_from(*before)


def test_a_trial_is_kept_and_read(cpu: CompiledCpuOperators, tmp_path: Path) -> None:
    """The numbers are those of the file; one that is damaged is measured and written again."""
    path, before = tmp_path / "blocked.json", cpu.kernels.blocked_from()
    try:
        kept = {"bf16": 3, "fp16": 40, "fp32": blocked.NEVER, "int4": 17, "int4_rounded": 9}
        kept["integers"] = 5
        path.write_text(json.dumps(kept))
        blocked.choose(cpu.kernels, path, has_matrix_units=True)
        assert cpu.kernels.blocked_from() == tuple(kept.values())
        assert blocked.describe(cpu.kernels) == (
            "blocked products: bf16 from 3 rows, fp16 from 40 rows, int4 from 17 rows, "
            "int4_rounded from 9 rows, integers from 5 rows"
        )
        zero, of_an_older_version = (
            dict.fromkeys(kept, 1) | {"fp16": 0},
            dict(list(kept.items())[:3]),
        )
        for damaged in ("{", "[]", json.dumps(zero), json.dumps(of_an_older_version)):
            path.write_text(damaged)
            blocked.choose(cpu.kernels, path, has_matrix_units=True)
            numbers = json.loads(path.read_text())
            assert tuple(numbers.values()) == cpu.kernels.blocked_from()
            assert all(rows in (*blocked._ROWS, blocked.NEVER) for rows in numbers.values())
        absent = tmp_path / "absent" / "blocked.json"
        blocked.choose(cpu.kernels, absent, has_matrix_units=False)  # not kept, but used
    finally:
        cpu.kernels.set_blocked_from(*before)


@pytest.mark.slow
def test_kernels_are_nowhere_much_slower_than_plain_torch() -> None:
    """`tools/bench.py --guard` with a margin for a machine that others use."""
    command = [sys.executable, "tools/bench.py", "--guard", "--threads", "1"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    ratios = [float(line.split()[-1]) for line in done.stdout.splitlines()[2:-1]]
    assert len(ratios) == 51
    assert min(ratios) > 0.6, done.stdout
    assert statistics.median(ratios) > 1, done.stdout


def test_rows_without_variance(cpu: CompiledCpuOperators) -> None:
    """A constant row, however large, normalises to the shift."""
    scale, shift = randn(77, seed=1), randn(77, seed=2)
    for value in (0.0, 1.0, -12345.678, 3e6):
        out = cpu.layer_norm(torch.full((3, 77), value), scale, shift, 1e-5)
        torch.testing.assert_close(out, shift.expand(3, 77), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(dtype: torch.dtype, cpu: CompiledCpuOperators) -> None:
    weights = random_layer(40, 16, 24, has_bias=True, dtype=dtype, activation="relu")
    packed, x = cpu.pack_layer(weights), torch.empty(0, 40)
    qkv, mlp = cpu.layer_front(x, packed)
    assert qkv.shape == (0, 48)
    assert cpu.layer_back(qkv[:, :16], mlp, packed, x).shape == (0, 40)
    assert cpu.linear(x, weights.dense_h_to_4h[0].pack(cpu, None)).shape == (0, 24)
    assert cpu.layer_norm(x, *weights.norm_mlp, 1e-5).shape == (0, 40)


# -- attention -----------------------------------------------------------------------------------

# (cached tokens before this step, tokens of this step): those that decode come first.
SEQUENCES = st.tuples(
    st.lists(st.tuples(st.integers(0, 700), st.just(1)), max_size=4),
    st.lists(st.tuples(st.integers(0, 200), st.integers(2, 150)), max_size=3),
).map(lambda parts: [*parts[0], *parts[1]])


def laid_out(cache: LayerCache, layout: str) -> LayerCache:
    """A copy with the same values at other strides."""

    def copy(tensor: Tensor) -> Tensor:
        if layout == "heads inside":
            return tensor.clone(memory_format=torch.contiguous_format)
        if layout == "gaps":
            steps = [1, 1, 3][: tensor.dim() - 1]
            sizes = [n + step for n, step in zip(tensor.shape[1:], steps, strict=True)]
            filling = math.nan if tensor.is_floating_point() else 99
            wide = torch.full((len(tensor), *sizes), filling, dtype=tensor.dtype)
            view = wide[tuple(map(slice, tensor.shape))]
            view.copy_(tensor)
            return view
        return tensor.clone()

    return type(cache)(*map(copy, cache))


def assert_stored(actual: LayerCache, expected: LayerCache) -> None:
    """Values are equal; keys may be rounded once less before they are stored."""
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual.v, expected.v, rtol=0, atol=0, equal_nan=True)
    if isinstance(actual, Int8Cache):
        scales = (actual.v_scale, expected.v_scale)
        torch.testing.assert_close(*scales, rtol=0, atol=0, equal_nan=True)
        assert (actual.k.int() - expected.k.int()).abs().max() <= 1
        assert (actual.k != expected.k).float().mean() <= 1e-3
        scales = (actual.k_scale, expected.k_scale)
        torch.testing.assert_close(*scales, rtol=1e-6, atol=0, equal_nan=True)
    else:
        eps = torch.finfo(actual.k.dtype).eps
        torch.testing.assert_close(actual.k, expected.k, rtol=eps, atol=4e-6, equal_nan=True)


@few(max_examples=60)
@given(
    SEQUENCES.filter(len),
    st.sampled_from([1, 16, 16, 128]),
    st.one_of(st.sampled_from([8, 20, 24, 40, 48, 64, 72, 80, 96, 128, 256]), st.integers(2, 130)),
    st.integers(1, 3),
    DTYPE,
    CACHE_DTYPE,
    st.sampled_from(["own", "heads inside", "gaps"]),
    st.sampled_from([1, 2, 4]),
    st.floats(0, 1),
)
def test_attention(
    cpu: CompiledCpuOperators,
    lengths: list[tuple[int, int]],
    block_size: int,
    head_dim: int,
    heads: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    layout: str,
    num_threads: int,
    rotary_share: float,
) -> None:
    torch.set_num_threads(num_threads)
    batch = make_batch(lengths, block_size)
    wide = torch.cat([batch.block_tables, torch.full_like(batch.block_tables, 10**6)], 1)
    batch.block_tables = wide[:, : batch.block_tables.shape[1]]  # columns of a larger table
    cache = make_cache(cpu, batch, block_size, heads, head_dim, cache_dtype).layers[0]
    cache, stored = laid_out(cache, layout), laid_out(cache, "own")
    qkv = randn(sum(batch.q_lens_list), heads, 3, head_dim, dtype=dtype)
    angles = 7 * randn(1024, round(rotary_share * (head_dim // 2)), seed=1)
    tables = RotaryTables(angles.cos(), angles.sin())
    scale = 2 * head_dim**-0.5
    actual = cpu.begin(batch, [cache], tables, scale).attend(0, qkv)

    q, k = BASE.rotary(*qkv[:, :, :2].float().unbind(2), batch.positions, *tables)
    v = qkv[:, :, 2].float()
    plain_step = PagedStep(BASE, batch, [], tables, scale)
    kept = torch.float32 if cache_dtype == torch.int8 else cache_dtype
    plain_step.store(stored, k.to(kept), v.to(kept))
    assert_stored(cache, stored)
    n = batch.num_decodes
    if n:
        expected = plain_step.decode(cache, q[:n])
        if cache_dtype == torch.int8:  # floats become two digits of eight bits, beside such keys
            limit = 2**-12 * max(1.0, v.abs().max().item())
            rounding = torch.finfo(dtype).eps
            torch.testing.assert_close(actual[:n].float(), expected, rtol=rounding, atol=limit)
        else:
            assert_near(actual[:n], expected.to(dtype))
    if n < len(lengths):
        q = rounded(scale * q[n:], cache_dtype, cpu).float()
        expected = PagedStep(BASE, batch, [], tables, 1.0).prefill(cache, q, k[n:], v[n:])
        if rounds(cache_dtype, cpu):
            limit = 2**-7 * max(1.0, v.abs().max().item())
            assert (actual[n:].float() - expected).abs().max() <= limit
        else:
            assert_near(actual[n:], expected.to(dtype))


@pytest.mark.parametrize("sharpness", [0.3, 1, 3])
@pytest.mark.parametrize(("length", "head_dim"), [(64, 128), (300, 64), (300, 80), (1000, 64)])
def test_prompts_in_bf16_are_no_worse_than_torch(
    length: int, head_dim: int, sharpness: float, cpu: CompiledCpuOperators
) -> None:
    """Against fp64, beside torch's own attention in bf16."""
    batch = make_batch([(0, length)], 16)
    cache = make_cache(cpu, batch, 16, 4, head_dim, torch.bfloat16).layers[0]
    q, k, v = randn(3, 4, length, head_dim)
    k, v = k.bfloat16().float(), v.bfloat16().float()
    tables = RotaryTables(torch.ones(length, 0), torch.zeros(length, 0))
    scale = sharpness * head_dim**-0.5
    qkv = torch.stack([q, k, v]).permute(2, 1, 0, 3).contiguous()
    actual = cpu.begin(batch, [cache], tables, scale).attend(0, qkv).transpose(0, 1)
    attention = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, is_causal=True, scale=scale
    )
    exact = attention(q.double(), k.double(), v.double())
    try:
        torchs = attention(*(t[None].bfloat16() for t in (q, k, v)))[0]
    except RuntimeError as error:  # on an AMX processor that is told to use AVX2
        pytest.skip(f"torch's own attention fails here: {error}")
    assert rms(actual - exact) <= rms(torchs.double() - exact)


@few(max_examples=30)
@given(
    SEQUENCES.filter(len),
    st.integers(1, 3),
    st.tuples(st.integers(1, 3), st.sampled_from([8, 20, 64]), st.integers(1, 90)),
    DTYPE,
    CACHE_DTYPE,
    st.sampled_from([1, 2, 4, 16]),
    st.sampled_from([(), (), LINEARS, LINEARS[3:]]),
)
def test_all_layers_in_one_call(
    cpu: CompiledCpuOperators,
    lengths: list[tuple[int, int]],
    num_layers: int,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    num_threads: int,
    of_int8: tuple[str, ...],
) -> None:
    """The specification's loop over the same kernels, bit for bit, caches included."""
    torch.set_num_threads(num_threads)
    heads, head_dim, width = sizes
    c = heads * head_dim
    batch = make_batch(lengths, 16)
    layers = [
        cpu.pack_layer(
            in_int8(
                random_layer(c, c, width, has_bias=True, dtype=dtype, activation="gelu_erf"),
                *of_int8,
            )[0]
        )
        for _ in range(num_layers)
    ]
    ours, theirs = ([], [])
    for _ in layers:
        cache = make_cache(cpu, batch, 16, heads, head_dim, cache_dtype).layers[0]
        ours.append(cache)
        theirs.append(laid_out(cache, "heads inside"))
    angles = randn(1024, head_dim // 4, seed=1)
    tables = RotaryTables(angles.cos(), angles.sin())
    x = randn(sum(batch.q_lens_list), c)
    expected = Step.run(cpu.begin(batch, theirs, tables, 0.3), x.clone(), layers)
    actual = cpu.begin(batch, ours, tables, 0.3).run(x, layers)
    is_mixed = len(of_int8) == 1  # such layers run one by one
    assert (actual is x) or is_mixed  # no second copy of the residual stream
    assert torch.equal(actual, expected)
    for cache, other in zip(ours, theirs, strict=True):
        for tensor, same in zip(cache, other, strict=True):
            torch.testing.assert_close(tensor, same, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_repeats_bit_for_bit(
    dtype: torch.dtype, num_threads: int, cpu: CompiledCpuOperators
) -> None:
    """Whichever thread takes which panel, and though torch takes the matrix units in between."""
    torch.set_num_threads(num_threads)
    batch = make_batch([(40, 1), (3, 1), (5, 70), (0, 600)], 16)
    weights = [
        random_layer(256, 256, 512, has_bias=True, dtype=dtype, activation="relu") for _ in "ab"
    ]
    layers = [cpu.pack_layer(each) for each in weights]
    cache = make_cache(cpu, batch, 16, 4, 64, dtype).layers[0]
    angles = randn(1024, 16, seed=1)
    tables = RotaryTables(angles.cos(), angles.sin())
    x, other = randn(672, 256), randn(64, 256).bfloat16()
    product = torch.nn.functional.linear(other, other)
    first = cpu.begin(batch, [cache] * 2, tables, 0.125).run(x.clone(), layers)
    for _ in range(10):
        again = cpu.begin(batch, [cache] * 2, tables, 0.125).run(x.clone(), layers)
        assert torch.equal(again, first)
        assert torch.equal(torch.nn.functional.linear(other, other), product)


def test_layers_that_do_not_fit_are_refused(cpu: CompiledCpuOperators) -> None:
    batch = make_batch([(3, 1), (0, 5)], 16)
    weights = random_layer(16, 16, 24, has_bias=True, dtype=torch.float32, activation="relu")
    layers = [cpu.pack_layer(weights)]
    tables = RotaryTables(torch.ones(99, 1), torch.zeros(99, 1))
    cache = make_cache(cpu, batch, 16, 2, 8, torch.float32).layers[0]
    narrow = make_cache(cpu, batch, 16, 1, 8, torch.float32).layers[0]
    for rows, caches, message in (
        (6, [cache, cache], "1 layers have 2 caches"),
        (6, [narrow], "layer 0 makes 48 columns of qkv; 3 x 1 x 8"),
        (5, [cache], r"x has shape \[5, 16\]; \[6, C\]"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu.begin(batch, caches, tables, 0.3).run(torch.ones(rows, 16), layers)
    with pytest.raises(ValueError, match=r"qkv has shape \[6, 1, 3, 8\]; \[6, 2, 3, 8\]"):
        cpu.begin(batch, [cache], tables, 0.3).attend(0, torch.ones(6, 1, 3, 8))
    batch.slot_mapping = batch.slot_mapping[1:]
    with pytest.raises(ValueError, match="do not belong together"):
        cpu.begin(batch, [cache], tables, 0.3)


@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [40, 48])  # plain loops, and unrolled ones
def test_a_long_context_is_shared_by_threads(
    head_dim: int, dtype: torch.dtype, num_threads: int, cpu: CompiledCpuOperators
) -> None:
    torch.set_num_threads(num_threads)
    batch = make_batch([(2999, 1), (4, 1), (700, 1)], 16)
    results = []
    for ops in (BASE, cpu):
        cache = make_cache(ops, batch, 16, 1, head_dim, dtype)
        kept = torch.float32 if dtype == torch.int8 else dtype
        qkv = 2 * randn(3, 1, 3, head_dim, dtype=kept)
        tables = RotaryTables(torch.ones(3000, 1), torch.zeros(3000, 1))
        results.append(cache.begin(batch, tables).attend(0, qkv))
    if dtype == torch.int8 and head_dim == 48:  # see `test_attention`
        assert (results[1] - results[0]).abs().max() <= 2**-12 * qkv[:, :, 2].abs().max()
    else:
        assert_near(results[1], results[0])


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 96, 128, 160, 256, 512])
def test_decode_from_an_int8_cache(head_dim: int, cpu: CompiledCpuOperators) -> None:
    """Against fp64, for every number of rows that a tile may end with; NaN and inf are not lost."""
    scale = head_dim**-0.5
    for length in (1, 2, 3, 4, 15, 17, 127, 128, 129, 131, 300):
        batch = make_batch([(length - 1, 1)], 128)
        cache = make_cache(cpu, batch, 128, 2, head_dim, torch.int8).layers[0]
        assert isinstance(cache, Int8Cache)
        qkv = randn(1, 2, 3, head_dim, seed=length)
        tables = RotaryTables(torch.ones(length, 0), torch.zeros(length, 0))
        step = cpu.begin(batch, [cache], tables, scale)
        actual = step.attend(0, qkv)[0]
        blocks = batch.block_tables[0].long()
        keys, values = (
            (x.double() * y[..., None].double())[blocks].flatten(0, 1)[:length]
            for x, y in ((cache.k, cache.k_scale), (cache.v, cache.v_scale))
        )
        shares = (scale * torch.einsum("hd,lhd->hl", qkv[0, :, 0].double(), keys)).softmax(-1)
        expected = torch.einsum("hl,lhd->hd", shares, values)
        assert (actual - expected).abs().max() <= 2e-4 * values.abs().max()
        qkv[0, 0, 0, 3] = math.inf
        assert step.attend(0, qkv)[0].isnan().all(1).tolist() == [True, False]
        cache.v_scale[batch.block_tables[0].long()] = math.nan
        is_lost = step.attend(0, qkv)[0, 1].isnan()  # the step stores the last row anew
        assert is_lost.tolist() == [length > 1] * head_dim


@few(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.floats(0, 1)), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([1, 4]),
)
def test_hidden_first_positions(
    cpu: CompiledCpuOperators, rows: list[tuple[int, float]], decodes: bool, num_threads: int
) -> None:
    """`starts`: what lies before is not seen, and may never have been written."""
    torch.set_num_threads(num_threads)
    lengths = [(n, 1) if decodes else (n // 2, n - n // 2 + 1) for n, _ in rows]
    starts = [
        min(int(n * share), cached) for (n, share), (cached, _) in zip(rows, lengths, strict=True)
    ]
    batch = make_batch(lengths, 16, shares=False)
    k_cache, v_cache = cache = make_cache(cpu, batch, 16, 2, 24, torch.float32).layers[0]
    own = [t.tolist() for t in batch.block_tables]
    for table, start in zip(own, starts, strict=True):
        for p in range(start):
            k_cache[table[p // 16], p % 16] = v_cache[table[p // 16], p % 16] = math.nan
    qkv = randn(sum(batch.q_lens_list), 2, 3, 24)
    batch.starts = torch.tensor(starts, dtype=torch.int32)
    actual = attend(cpu, qkv, cache, batch)
    row = 0
    for b, ((cached, new), start) in enumerate(zip(lengths, starts, strict=True)):
        blocks = batch.block_tables[b].long()
        k, v = (x.flatten(0, 1)[start : cached + new] for x in cache.read(blocks))
        q = qkv[row : row + new, :, 0]
        assert_near(actual[row : row + new], BASE.causal_attention(q, k, v, 0.3))
        row += new


@pytest.mark.parametrize("padding", ["none", "in front", "behind", "in the middle"])
@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
def test_a_padded_batch_step_by_step(
    padding: str, dtype: torch.dtype, cpu: CompiledCpuOperators
) -> None:
    """The contiguous cache, growing and reordered, against the base class's."""
    steps = [7, 1, 1, 20, 1]
    mask = torch.ones(3, sum(steps), dtype=torch.bool)
    if padding == "in front":
        mask[1, :3] = mask[2, :6] = False
    elif padding == "behind":
        mask[1, 5:7] = False
    elif padding == "in the middle":
        mask[0, 2:4] = mask[2, 8] = False
    caches = [ContiguousKVCache(b, 1, 2, 20, format_of(dtype), 99) for b in (BASE, cpu)]
    kept = torch.float32 if dtype == torch.int8 else dtype
    angles = randn(99, 3, seed=5)
    tables = RotaryTables(angles.cos(), angles.sin())
    end = 0
    for seed, new in enumerate(steps):
        end += new
        seen = mask[:, :end]
        positions = (seen.long().cumsum(1) - 1).clamp(min=0)[:, end - new :]
        qkv = randn(3 * new, 2, 3, 20, seed=seed, dtype=kept)
        results = []
        for cache in caches:
            key_mask = None if padding == "none" else seen
            step = cache.begin(torch.zeros_like(positions), positions, key_mask, tables)
            results.append(step.attend(0, qkv))
            cache.advance(new)
        real = seen[:, end - new :].flatten()
        if dtype == torch.int8 and new > 1 and rounds(dtype, cpu):
            difference = (results[1][real] - results[0][real]).abs().max()
            assert difference <= 2**-7 * max(1.0, qkv[:, :, 2].abs().max().item())
        else:
            assert_near(results[1][real], results[0][real])
        assert torch.isfinite(results[1]).all()
        if seed == 2:
            rows = torch.tensor([2, 2, 0])
            mask = mask[rows]
            for cache in caches:
                cache.select_rows(rows)


def attend(
    cpu: CompiledCpuOperators, qkv: Tensor, cache: LayerCache, batch: ForwardBatch
) -> Tensor:
    """Rotated by no angle."""
    tables = RotaryTables(torch.ones(400, 1), torch.zeros(400, 1))
    return cpu.begin(batch, [cache], tables, 0.3).attend(0, qkv)


@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
def test_a_wrong_score_is_not_hidden(dtype: torch.dtype, cpu: CompiledCpuOperators) -> None:
    """NaN in what a query sees reaches its row, so that the engine can tell; no other row."""
    batch = make_batch([(40, 1), (40, 1), (10, 30), (0, 30)], 16, shares=False)
    cache = make_cache(cpu, batch, 16, 1, 32, dtype).layers[0]
    nan = torch.full((1, 32), math.nan)
    for sequence in (0, 2):
        cache.write((batch.block_tables[sequence, 0].long(), 3), nan, torch.zeros(1, 32))
    out = attend(cpu, randn(62, 1, 3, 32), cache, batch)
    bad = out.isnan().any(-1).any(-1)
    assert bad.tolist() == [True, False] + [True] * 30 + [False] * 30


def test_what_does_not_fit_is_refused(cpu: CompiledCpuOperators) -> None:
    """Nothing is read or written outside of a tensor, whatever a caller gets wrong."""
    weight = cpu.pack_linear(torch.ones(5, 8), None).weight
    with pytest.raises(ValueError, match=r"x has shape \[2, 7\]"):
        cpu.kernels.linear(torch.ones(2, 7), weight, None, 0)
    with pytest.raises(ValueError, match=r"bias has shape \[4\]"):
        cpu.kernels.linear(torch.ones(2, 8), weight, torch.ones(4), 0)
    with pytest.raises(TypeError, match="float32, float16 or bfloat16"):
        cpu.pack_linear(torch.ones(5, 8, dtype=torch.int16), None)
    with pytest.raises(ValueError, match="int8 weights have scales"):
        cpu.pack_linear(torch.ones(5, 8, dtype=torch.int8), None)
    with pytest.raises(ValueError, match="shift has 3"):
        cpu.layer_norm(torch.ones(2, 8), torch.ones(8), torch.ones(3), 1e-5)

    weights = random_layer(16, 16, 24, has_bias=True, dtype=torch.float32, activation="relu")
    packed = cpu.pack_layer(weights)
    _, mlp = cpu.layer_front(torch.ones(4, 16), packed)
    for attended, residual in ((torch.ones(5, 16), None), (torch.ones(4, 16), torch.ones(3, 16))):
        with pytest.raises(ValueError, match=r"expected|not what"):
            cpu.layer_back(attended, mlp, packed, residual)
    weights.dense_4h_to_h = (FloatWeight(torch.ones(15, 24)), torch.ones(16))
    with pytest.raises(ValueError, match="layer"):
        cpu.pack_layer(weights)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("slot_mapping", 16 * 99, "slot 1584"),
        ("slot_mapping", -1, "slot -1"),
        ("slot_mapping", 0, "sequence 0 has its last position in slot .* its new token in slot 0"),
        ("block_tables", 99, "block 99"),
        ("block_tables", -1, "block -1"),
        ("context_lens", 500, "sequence 0 has 1 new tokens of 500"),
        ("positions", 400, "position 400"),
        ("cu_seqlens_q", 3, "sequence 0 has 3|the sequences have"),
    ],
)
def test_indices_outside_are_refused(
    field: str, value: int, message: str, cpu: CompiledCpuOperators
) -> None:
    batch = make_batch([(40, 1), (0, 20)], 16)
    caches = make_cache(cpu, batch, 16, 1, 32, torch.float32).layers[0]
    getattr(batch, field).view(-1)[1 if field == "cu_seqlens_q" else 0] = value
    with pytest.raises(IndexError, match=message):
        attend(cpu, randn(21, 1, 3, 32), caches, batch)


# -- several at once -----------------------------------------------------------------------------


def test_results_in_use_are_not_written_over(cpu: CompiledCpuOperators) -> None:
    """Also where all that is left of one is a view."""
    weights = random_layer(32, 16, 24, has_bias=True, dtype=torch.float32, activation="relu")
    packed = cpu.pack_layer(weights)
    first, first_mlp = cpu.layer_front(randn(4, 32, seed=1), packed)
    copies = first.clone(), first_mlp.clone()
    view = first[1:, :5]
    del first
    second, _ = cpu.layer_front(randn(4, 32, seed=2), packed)
    assert torch.equal(view, copies[0][1:, :5])
    assert torch.equal(first_mlp, copies[1])
    assert not torch.equal(second, copies[0])
    del second
    with torch.inference_mode():
        cpu.layer_front(randn(4, 32, seed=3), packed)
    third, _ = cpu.layer_front(randn(4, 32, seed=1), packed)
    assert torch.equal(third, copies[0])
    third.add_(1)  # memory that was handed out in inference mode serves outside of it


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_two_models_in_two_threads(
    num_threads: int, tmp_path: Path, cpu: CompiledCpuOperators
) -> None:
    torch.set_num_threads(num_threads)
    work = []
    for name, dtype in (("pythia-14m", "float16"), ("gpt-neox-20b", "bfloat16")):
        config = checkpoints.FAMILY[name]
        checkpoints.write_checkpoint(tmp_path / name, config, dtype=getattr(torch, dtype))
        engine = checkpoints.load_engine(tmp_path / name, create("cpu"), dtype)
        work.append((engine, random_ids(config, 60)))
    alone = [paged_logits(engine, ids, 30) for engine, ids in work]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            together = pool.map(lambda job: paged_logits(*job, 30), work)
            for actual, expected in zip(together, alone, strict=True):
                assert torch.equal(actual, expected)


# -- how they are compiled -----------------------------------------------------------------------

# In place of a compiler: notes each call, "links" by copying a library that was made before.
FAKE_COMPILER = """#!/bin/sh
echo "$*" >>"{calls}"
[ "{fails}" = no ] || { echo "no good: $*" >&2; exit 1; }
case " $* " in *" -shared "*) source="{library}" ;; *) source=/dev/null ;; esac
while [ $# -gt 0 ]; do
  [ "$1" != -o ] || { sleep 0.5; cp "$source" "$2"; }
  shift
done
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads as a fresh process would, with an empty cache folder and the compiler named."""

    def load(cxx: str = "", kernels: str = "auto") -> Any:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("GPTNEOX_CPU_KERNELS", kernels)
        monkeypatch.setenv("CXX", cxx)
        return cpu_build.load.__wrapped__()

    return load


def fake_compiler(folder: Path, library: str = "/dev/null", fails: str = "no") -> str:
    calls, script = folder / "calls", folder / f"compiler-{fails}"
    text = FAKE_COMPILER.replace("{calls}", str(calls)).replace("{fails}", fails)
    script.write_text(text.replace("{library}", library), encoding="utf-8")
    script.chmod(0o755)
    return str(script)


def the_warning(caplog: pytest.LogCaptureFixture) -> str:
    """The one warning there is, apart from the notice that compiling takes a while."""
    found = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    caplog.clear()
    (text,) = (m for m in found if not m.startswith("compiling"))
    return text


def test_without_a_compiler(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert start("/nonexistent/c++ -pipe") is None
    text = the_warning(caplog)
    assert cpu_build.LOSS in text
    assert "no compiler '/nonexistent/c++ -pipe'; install one" in text
    with pytest.raises(ConfigError, match="GPTNEOX_CPU_KERNELS is on, but there is no compiler"):
        start("/nonexistent", "on")
    assert not caplog.records


def test_switched_off(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    assert start("/nonexistent", "off") is None
    assert not caplog.records


def test_on_without_a_compiler_ends_a_run(tmp_path: Path, tiny_checkpoint: Path) -> None:
    command = ["main.py", "--model_path", str(tiny_checkpoint), "--device", "cpu"]
    command += ["--load_tokenizer", "False", "--input_ids", "1,2"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ
        | {"GPTNEOX_CPU_KERNELS": "on", "CXX": "/nonexistent", "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    (line,) = (text for text in done.stderr.splitlines() if "GPTNEOX_CPU_KERNELS is on" in text)
    assert "there is no compiler '/nonexistent'" in line
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_a_compiler_that_fails_is_not_tried_again(
    start: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = fake_compiler(tmp_path, fails="yes")
    assert start(bad) is None
    text = the_warning(caplog)
    (log,) = tmp_path.glob("cache/gptneox-ascend/cpu_kernels/*/compiler.log")
    assert f"{bad} failed, see {log}" in text
    assert cpu_build.LOSS in text
    assert bad in log.read_text(encoding="utf-8").splitlines()[-1]
    calls = (tmp_path / "calls").read_text(encoding="utf-8")

    assert start(bad) is None
    text = the_warning(caplog)
    assert f"see {log}; delete it" in text
    assert (tmp_path / "calls").read_text(encoding="utf-8") == calls
    assert {p.name for p in log.parent.iterdir()} == {"lock", "compiler.log"}

    Path(bad).write_text("#!/bin/sh\nexit 3\n", encoding="utf-8")  # mended, in a way
    assert start(bad) is None
    assert f"{bad} failed" in the_warning(caplog)


def test_two_at_once_compile_once(
    start: Any, cpu: CompiledCpuOperators, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    compiler = fake_compiler(tmp_path, cpu.kernels.__file__)
    start(kernels="off")  # the environment is set before the threads start
    os.environ.update(CXX=compiler, GPTNEOX_CPU_KERNELS="auto")
    with ThreadPoolExecutor(2) as pool:
        modules = list(pool.map(lambda _: cpu_build.load.__wrapped__(), range(2)))
    assert all(m.describe() == cpu.kernels.describe() for m in modules)
    messages = [r.getMessage() for r in caplog.records]
    assert [m.split(",")[0] for m in messages if "once only" in m] == ["compiling the CPU kernels"]
    assert any("waiting for it" in m for m in messages)
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert sum(" -shared " in f" {line} " for line in calls) == 1
    before = len(calls)
    assert start(compiler) is not None
    assert len((tmp_path / "calls").read_text(encoding="utf-8").splitlines()) == before


def test_a_damaged_library_is_named(
    start: Any, cpu: CompiledCpuOperators, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert start("/nonexistent") is None
    caplog.clear()
    name = Path(cpu.kernels.__file__).name
    key = Path(cpu.kernels.__file__).parent.name
    library = tmp_path / "cache" / "gptneox-ascend" / "cpu_kernels" / key / name
    library.parent.mkdir(parents=True)
    library.write_bytes(b"half a library")
    assert start() is None
    assert f"delete {library} to compile it anew" in the_warning(caplog)


def test_a_cache_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()  # root may write to any folder, but not below a file
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("GPTNEOX_CPU_KERNELS", "auto")
    assert cpu_build.load.__wrapped__() is None
    text = the_warning(caplog)
    assert "cannot be written" in text
    assert "set XDG_CACHE_HOME" in text


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        (Environment(cache_home="/c", home="/h"), "/c"),
        (Environment(home="/h"), "/h/.cache"),
        (Environment(cache_home="cache", home="/h"), "/h/.cache"),
        (Environment(), "HOME OF USER/.cache"),
    ],
)
def test_where_they_are_kept(environment: Environment, folder: str, caplog) -> None:
    folder = folder.replace("HOME OF USER", pwd.getpwuid(os.getuid()).pw_dir)
    assert str(cpu_build._cache_folder(environment)) == folder
    assert ("not an absolute path" in caplog.text) == (environment.cache_home == "cache")


def test_a_user_without_a_name_and_a_home(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """As containers run that may be any user."""
    monkeypatch.setattr(os, "getuid", lambda: 987654321)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GPTNEOX_CPU_KERNELS", "auto")
    assert cpu_build.load.__wrapped__() is None
    assert "no folder to keep them in (HOME is ''); set XDG_CACHE_HOME" in the_warning(caplog)


@pytest.mark.parametrize("missing", ["Python.h", "setuptools"])
def test_what_the_compiler_needs_is_named(
    missing: str, start: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if missing == "Python.h":
        monkeypatch.setattr(cpu_build.sysconfig, "get_path", lambda _: "/nonexistent")
    else:
        monkeypatch.setattr(cpu_build.importlib.util, "find_spec", lambda _: None)
    assert start("sh") is None
    text = the_warning(caplog)
    assert missing in text
    assert "install" in text


def test_the_diagnosis_names_them(
    cpu: CompiledCpuOperators, plain: CpuOperators, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cpu.device.diagnose()[-1] == Finding(
        True, "CPU kernels", f"{cpu.kernels.describe()}; {blocked.describe(cpu.kernels)}"
    )
    assert (plain.device.diagnose()[-1].ok, plain.device.diagnose()[-1].topic) == (
        None,
        "CPU kernels",
    )
    load = cpu_build.load.__wrapped__
    for name, value in {"GPTNEOX_CPU_KERNELS": "on", "CXX": "/nonexistent"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_build, "load", load)
    with pytest.raises(ConfigError, match="there is no compiler"):
        create("cpu")


def test_a_processor_that_only_lscpu_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on aarch64."""
    monkeypatch.setattr(cpu_device, "_read", lambda _: "processor\t: 0\nCPU part\t: 0xd01\n")
    known = "Architecture: aarch64\nBIOS Model name: HUAWEI\nModel name:          Kunpeng-920\n"
    for printed, name in ((known, "Kunpeng-920"), ("Model name: -\n", ""), ("", "")):
        monkeypatch.setattr(cpu_device.binding, "run_tool", lambda *_, text=printed: text)
        assert CpuDevice().describe() == (name or platform.processor() or platform.machine())


def test_flags_follow_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with_dot = cpu_build.compile_flags("AVX512", "fma avx512f avx512_bf16")
    assert {"-mavx512f", "-mavx512bf16", "-DCPU_CAPABILITY_AVX512"} <= {*with_dot}
    assert "-mavx512bf16" not in cpu_build.compile_flags("AVX512", "fma avx512f")
    narrow = cpu_build.compile_flags("AVX2", "fma avx512f avx512_bf16")
    assert {"-mavx2", "-DCPU_CAPABILITY_AVX2"} <= {*narrow}
    assert not any("512" in flag for flag in narrow)
    portable = cpu_build.compile_flags("DEFAULT", "fma avx512f avx512_bf16")
    assert "-DCPU_CAPABILITY_DEFAULT" in portable
    assert not any(flag.startswith("-m") for flag in portable)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    arm = cpu_build.compile_flags("DEFAULT", "fp asimd atomics asimdhp asimddp")
    assert {"-march=armv8-a+lse", "-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"} <= {*arm}
    assert not any("avx" in flag for flag in arm)
    newer = cpu_build.compile_flags("SVE256", "fp asimd atomics asimdhp sve bf16 i8mm")
    assert {"-march=armv8.2-a+bf16", "-DCPU_CAPABILITY=DEFAULT"} <= {*newer}
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert not any(flag.startswith("-m") for flag in cpu_build.compile_flags("DEFAULT", ""))


# What must be among the instructions: widening fp16 and bf16, and bf16 dot products.
ARM = {"": ["fcvtl", "shll"], " bf16": ["fcvtl", "shll", "bfdot"]}


@pytest.mark.slow
@pytest.mark.parametrize("feature", ARM)
def test_they_compile_for_aarch64(
    feature: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a cross compiler, against this torch's headers, which are those of all processors."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no cross compiler (Debian: g++-aarch64-linux-gnu)")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    flags = cpu_build.compile_flags("DEFAULT", f"fp asimd atomics asimdhp{feature}")
    flags.remove("-mtune=native")  # of the machine that compiles
    headers = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    output = tmp_path / "kernels.s"
    command = [compiler, *flags, "-O1", "-S", "-DTORCH_EXTENSION_NAME=kernels"]
    command += [f"-I{path}" for path in headers]
    command += [str(cpu_build.SOURCES / "bindings.cpp"), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    text = output.read_text(encoding="utf-8")
    assert [name for name in ARM[feature] if f"\t{name}\t" not in text] == []
    assert ("\tbfdot\t" in text) == (feature == " bf16")


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names instruction sets of x86")
@pytest.mark.parametrize("capability", ["avx2", "default", "vectors of four"])
def test_narrower_instruction_sets(capability: str, tmp_path: Path) -> None:
    """Compiled anew, then every operator test; vectors of four floats are what aarch64 has."""
    compiler = shutil.which(Environment.read().cxx or "c++")
    if compiler is None:
        pytest.skip("no compiler")
    environment = os.environ | {
        "ATEN_CPU_CAPABILITY": capability,
        "XDG_CACHE_HOME": str(tmp_path),
        "GPTNEOX_CPU_KERNELS": "on",
    }
    if capability == "vectors of four":
        wrapper = tmp_path / "compiler"  # before the paths of torch, CPATH would come after them
        include = ROOT / "tests" / "vectors_of_four"
        wrapper.write_text(f'#!/bin/sh\nexec "{compiler}" -I"{include}" "$@"\n', encoding="utf-8")
        wrapper.chmod(0o755)
        environment |= {"ATEN_CPU_CAPABILITY": "default", "CXX": str(wrapper)}
    files = [f"tests/test_{name}.py" for name in ("operators", "cpu_kernels")]
    # Of torch itself, some attention in bf16 fails where it may not use what the processor has.
    ours = ["-k", "not cpu-plain"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *ours, *files],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert len(list(tmp_path.glob("gptneox-ascend/cpu_kernels/*/*.so"))) == 1
