# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the base class, through Triton's interpreter, on CPU tensors.

Run by test_cuda.py in a process of its own, with TRITON_INTERPRET=1 and triton on the path.
"""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import checkpoints
from support.operators import BASE, assert_near, make_batch, make_cache, randn
from triton.runtime import interpreter

from gptneox.devices.cache import FloatKV
from gptneox.devices.cuda import device as cuda
from gptneox.devices.cuda import kernels as cuda_kernels
from gptneox.devices.cuda.operators import TritonStep
from gptneox.devices.device import Device, Memory
from gptneox.devices.graphs import DecodeGraphs
from gptneox.devices.operators import InputRange, Operators
from gptneox.devices.step import RotaryTables
from gptneox.engine.sequence import SamplingParams

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FAMILY = (16, 32, 48, 64, 80, 96, 128, 256)


def widen_bfloat16_products() -> None:
    """The interpreter keeps bfloat16 as integers, and multiplies those."""
    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *rest):
        if a.dtype.scalar.is_bf16():
            a, b = (self.create_fp_ext(x, interpreter.tl.float32) for x in (a, b))
        return plain(self, a, b, d, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


widen_bfloat16_products()


class EmulatedCuda(cuda.CudaDevice):
    """A CPU in place of the GPU, and graphs that run their step again."""

    device_type, dist_backend, pins_memory = "cpu", "gloo", False
    num_cores, capability = 1, (8, 0)

    def __init__(self):
        super().__init__()
        self.num_captured = self.num_replayed = 0

    def setup(self, local_rank, local_world_size=1, num_threads=0):
        pass

    def synchronize(self):
        pass

    def memory(self):
        return Memory(1 << 33, 1 << 33, 1)

    def describe(self):
        return "emulated"

    def record(self, run, pools):
        out = run()
        self.num_captured += 1

        def replay():
            self.num_replayed += 1
            out.copy_(run())

        return replay, out


def attend(qkv, tables, layer, batch, scale, splits):
    """By the kernels, with a fixed number of programs per context."""
    step = TritonStep(EmulatedCuda().operators(), batch, [layer], tables, scale)
    step.num_splits = splits
    return step.attend(0, qkv)


def check(lengths, block_size, heads, head_dim, half, cache_dtype, splits, seed, dtype=None):
    """One step through kernels and base class: attention and what is in the caches."""
    dtype = dtype or cache_dtype
    batch = make_batch(lengths, block_size, seed)
    num_tokens = sum(batch.q_lens_list)
    qkv = torch.stack([(2 - i % 2) * randn(num_tokens, heads, head_dim, seed=seed + i, dtype=dtype)
                       for i in range(3)], 2)  # fmt: skip
    angles = 7 * randn(max(batch.context_lens_list), half, seed=seed + 3)
    tables = RotaryTables(angles.cos(), angles.sin())
    shape = (block_size, heads, head_dim, cache_dtype)
    expected, actual = (make_cache(BASE, batch, *shape) for _ in "12")
    result = expected.begin(batch, tables).attend(0, qkv)
    # As `layer_front` hands it over: columns of a wider product.
    wide = torch.cat((qkv.flatten(1), torch.ones(num_tokens, 7, dtype=dtype)), 1)
    view = wide[:, :-7].view(qkv.shape)
    layer, wanted = actual.layers[0], expected.layers[0]
    out = attend(view, tables, layer, batch, head_dim**-0.5, splits)
    assert_near(out, result)
    if cache_dtype == torch.int8:
        # Rotated keys differ by a fused product, and by half a unit more where the interpreter
        # cuts bf16 off instead of rounding.
        assert (layer.k.int() - wanted.k.int()).abs().max() <= 1
        assert (layer.k != wanted.k).float().mean() <= (0.05 if dtype == torch.bfloat16 else 1e-3)
        scales, eps = (layer.k_scale, wanted.k_scale), torch.finfo(dtype).eps
        torch.testing.assert_close(*scales, rtol=eps, atol=0, equal_nan=True)
        assert torch.equal(layer.v, wanted.v)
        layer, wanted = layer[3:], wanted[3:]
    for ours, theirs in zip(layer, wanted, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan()), "a foreign slot was written"
        assert_near(ours.nan_to_num(), theirs.nan_to_num())


@pytest.mark.parametrize("head_dim", FAMILY)
def test_every_head_dim(head_dim):
    dtype = DTYPES[FAMILY.index(head_dim) % 3]
    lengths = [(20, 1), (16, 17), (0, 5)]
    check(lengths, 16, 1, head_dim, max(1, head_dim // 8), dtype, splits=2, seed=head_dim)


@pytest.mark.parametrize("splits", [1, 2, 4, 16])
def test_a_context_shared_by_programs(splits):
    """Tiles are 64 tokens wide: 200 tokens make four parts, the last of them short."""
    check([(199, 1), (70, 1)], 16, 1, 128, 16, torch.float16, splits, seed=splits)


@pytest.mark.parametrize(("head_dim", "dtype", "splits"), [
    (32, torch.float32, 1), (80, torch.bfloat16, 2), (128, torch.float16, 1),
])  # fmt: skip
def test_int8_caches(head_dim, dtype, splits):
    """Decoding and prompts; three heads do not fill a tile."""
    lengths = [(20, 1), (100, 1), (16, 17), (0, 20)]
    shape = (16, 3, head_dim, head_dim // 8)
    check(lengths, *shape, torch.int8, splits, seed=head_dim, dtype=dtype)


def test_rows_that_int8_cannot_hold():
    """Zeros, denormal numbers, halves between two steps, NaN and infinity: as the base class."""
    qkv = torch.zeros(6, 1, 3, 16)
    qkv[1] = 1e-42
    qkv[2, ..., :5] = torch.tensor([127.0, 0.5, 1.5, 2.5, -126.5])
    qkv[3, ..., 2], qkv[4, ..., 3] = math.nan, math.inf
    qkv[5, ..., 0] = 3e38
    batch = make_batch([(0, 6)], 16)
    tables = RotaryTables(torch.ones(32, 0), torch.zeros(32, 0))
    layers = []
    for step in (BASE.begin, lambda *rest: TritonStep(EmulatedCuda().operators(), *rest)):
        layer = make_cache(BASE, batch, 16, 1, 16, torch.int8).layers[0]
        step(batch, [layer], tables, 1.0).attend(0, qkv)
        layers.append([t.flatten(0, 1)[batch.slot_mapping] for t in layer.read(...)])
    for ours, theirs in zip(*reversed(layers), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(ours[:2], torch.zeros(2, 1, 16))
        assert ours[2, 0, :5].tolist() == [127.0, 0.0, 2.0, 2.0, -126.0]
        assert ours.isnan().any(-1).flatten().tolist() == [False] * 3 + [True] * 2 + [False]


@given(
    decodes=st.lists(st.integers(0, 150), max_size=2),
    prompts=st.lists(st.tuples(st.integers(0, 40), st.integers(2, 40)), max_size=1),
    block_size=st.sampled_from((5, 16, 128)),
    heads=st.sampled_from((1, 2, 5)),
    head_dim=st.sampled_from((32, 80, 96)),
    share=st.sampled_from((8, 4, 2)),
    dtype=st.sampled_from(DTYPES),
    splits=st.sampled_from((1, 2, 8)),
    seed=st.integers(0, 99),
)
@settings(max_examples=8, deadline=None, derandomize=True,
          suppress_health_check=list(HealthCheck))  # fmt: skip
def test_random_shapes(
    decodes, prompts, block_size, heads, head_dim, share, dtype, splits, seed
):  # fmt: skip
    lengths = [(n, 1) for n in decodes] + prompts
    if lengths:
        check(lengths, block_size, heads, head_dim, head_dim // share, dtype, splits, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_stay_finite(dtype):
    """Products of 128 * 128 * 64 = 2^20 are beyond fp16; equal keys share the weight."""
    batch = make_batch([(20, 1), (0, 4)], 16)
    cache = make_cache(BASE, batch, 16, 1, 64, dtype)
    cache.layers[0][0].fill_(128)
    qkv = torch.full((5, 1, 3, 64), 128, dtype=dtype)
    qkv[:, :, 2] = randn(5, 1, 64, dtype=dtype)
    tables = RotaryTables(torch.ones(32, 1), torch.zeros(32, 1))
    for splits in (1, 4):
        out = attend(qkv, tables, cache.layers[0], batch, 64**-0.5, splits)
        assert_near(out[1:], torch.stack([qkv[1 : i + 2, :, 2].float().mean(0)
                                          for i in range(4)]).to(dtype))  # fmt: skip
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("splits", [1, 2])
def test_rows_of_padding_touch_nothing(splits, cache_dtype):
    batch = make_batch([(3, 1), (0, 1)], 16)
    batch.slot_mapping[1], batch.context_lens[1] = -1, 0
    batch.block_tables[1] = 0
    cache = make_cache(BASE, batch, 16, 1, 32, cache_dtype)
    before = [x.clone() for x in cache.layers[0]]
    tables = RotaryTables(torch.ones(32, 1), torch.zeros(32, 1))
    out = attend(randn(2, 1, 3, 32), tables, cache.layers[0], batch, 1.0, splits)
    assert torch.equal(out[1], torch.zeros(1, 32))
    written = int(batch.slot_mapping[0])
    for cached, previous in zip(cache.layers[0], before, strict=True):
        ours, old = cached.flatten(0, 1), previous.flatten(0, 1)
        assert torch.isfinite(ours[written]).all()
        ours[written] = old[written]
        assert torch.equal(ours.isnan(), old.isnan())
        assert torch.equal(ours.nan_to_num(), old.nan_to_num())


# -- products of int8 weights -------------------------------------------------------------------


@given(
    rows=st.sampled_from((1, 16, 17, 65)),
    features=st.sampled_from((1, 32, 70)),
    depth=st.sampled_from((1, 64, 130)),
    has_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=6, deadline=None, derandomize=True,
          suppress_health_check=list(HealthCheck))  # fmt: skip
def test_int8_products(rows, features, depth, has_bias, dtype, seed):
    """Against fp64: one rounding of the result, and fp32 sums."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-128, 128, (features, depth), generator=generator, dtype=torch.int8)
    scale = torch.rand(features, generator=generator) / 64
    scale[0] = 0
    bias = randn(features, seed=seed, dtype=dtype) if has_bias else None
    x = randn(rows, depth + 3, seed=seed, dtype=dtype)[:, :depth]  # rows apart
    ops = EmulatedCuda().operators()
    packed = ops.pack_int8(values, scale, bias, dtype)
    assert not ops._int8_fault
    exact = x.double() @ (values.double() * scale.double()[:, None]).T
    exact = exact if bias is None else exact + bias.double()
    assert_near(packed.multiply(ops, x), exact.to(dtype))
    assert packed.multiply(ops, x[:0]).shape == (0, features)


@pytest.mark.parametrize("inputs", [None, InputRange(0.03, -5)], ids=["dynamic", "static"])
@pytest.mark.parametrize(("depth", "features"), [(64, 40), (64, 33), (70, 40)])
def test_products_of_integers(depth, features, inputs):
    """Bit for bit those of plain torch, whether cuBLAS takes the sizes or not."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-128, 128, (features, depth), generator=generator, dtype=torch.int8)
    scale, bias = torch.rand(features, generator=generator), randn(features, seed=1)
    start = None if inputs is None else torch.arange(features, dtype=torch.int32)
    x = randn(40, depth, seed=2)
    ops, plain = EmulatedCuda().operators(), Operators(EmulatedCuda())
    packed, right = (
        each.pack_integers(values, scale, bias, torch.float32, inputs, start)
        for each in (ops, plain)
    )
    for rows in (0, 1, 16, 17, 40):
        expected = right.multiply(plain, x[:rows])
        assert torch.equal(packed.multiply(ops, x[:rows]), expected)
        assert expected.shape == (rows, features)


@given(
    rows=st.sampled_from((1, 17, 65)),
    features=st.sampled_from((1, 70)),
    shape=st.sampled_from(((64, 32), (192, 64), (256, 128), (96, 96), (48, 16))),
    has_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=6, deadline=None, derandomize=True,
          suppress_health_check=list(HealthCheck))  # fmt: skip
def test_int4_products(rows, features, shape, has_bias, dtype, seed):
    """Against fp64: one rounding of the result, and fp32 sums. The last shapes suit no tile."""
    depth, group = shape
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(16, (features, depth), generator=generator, dtype=torch.uint8)
    sizes = features, depth // group
    scale = torch.rand(sizes, generator=generator) / 32
    zero = torch.randint(16, sizes, generator=generator, dtype=torch.uint8)
    bias = randn(features, seed=seed, dtype=dtype) if has_bias else None
    x = randn(rows, depth + 3, seed=seed, dtype=dtype)[:, :depth]  # rows apart
    ops = EmulatedCuda().operators()
    packed = ops.pack_int4(values[:, ::2] | values[:, 1::2] << 4, scale, zero, bias, dtype)
    assert not ops._int4_fault
    spread = [t.double().repeat_interleave(group, 1) for t in (scale, zero)]
    exact = x.double() @ ((values.double() - spread[1]) * spread[0]).T
    exact = exact if bias is None else exact + bias.double()
    assert_near(packed.multiply(ops, x), exact.to(dtype))
    assert packed.multiply(ops, x[:0]).shape == (0, features)


def test_groups_that_the_int4_kernel_does_not_take_are_named_once(caplog):
    ops, zeros = EmulatedCuda().operators(), torch.zeros(4, 24, dtype=torch.uint8)
    for num_groups in (1, 3, 3):  # of 48 and 16
        scale = torch.ones(4, num_groups)
        ops.pack_int4(zeros, scale, scale.to(torch.uint8), None, torch.float16)
    warned = re.findall(r"w4a16 in groups of (\d+): .* quantize in groups of 32", caplog.text)
    assert warned == ["48", "16"]
    rows = ops.operator_table(4, 64, 128, FloatKV(torch.float16))
    assert [row.operator for row in rows if row.part == "W4A16 in groups of 16, 48"] == [
        "torch, widened"
    ]


def test_an_int8_kernel_that_is_wrong_is_not_used(monkeypatch, caplog):
    right = cuda_kernels.linear_int8
    monkeypatch.setattr(cuda_kernels, "linear_int8", lambda *a: right(*a) + 0.5)
    ops = EmulatedCuda().operators()
    values, x = torch.full((4, 8), 2, dtype=torch.int8), torch.ones(3, 8)
    packed = ops.pack_int8(values, torch.full((4,), 0.5), None, torch.float32)
    assert "differ from torch by 5.0e-01" in ops._int8_fault
    assert "W8A16 products: torch" in caplog.text
    assert torch.equal(packed.multiply(ops, x), torch.full((3, 4), 8.0))


# -- a whole engine -------------------------------------------------------------------------------


PROMPTS = checkpoints.prompts([20, 3, 1], 304, seed=1)
NUM_NEW = (5, 4, 6)  # batches of three, two and one sequence decode


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """A checkpoint, and what Hugging Face answers to PROMPTS."""
    directory = tmp_path_factory.mktemp("twin") / "checkpoint"
    config = checkpoints.FAMILY["pythia-1.4b"] | {"max_position_embeddings": 64}
    model = checkpoints.write_checkpoint(directory, config, sharpness=2.0)
    answers = []
    for prompt, num_new in zip(PROMPTS, NUM_NEW, strict=True):
        ids = list(prompt)
        for _ in range(num_new):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    return SimpleNamespace(path=directory, answers=answers)


def generate(twin, device, **options):
    sizes = {"num_blocks": 12, "block_size": 16, "max_batch_size": 3, "max_prefill_tokens": 16}
    engine = checkpoints.load_engine(twin.path, device, **sizes, **options)
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in NUM_NEW]
    return engine, [o.token_ids for o in engine.generate(PROMPTS, params)]


def test_engine_with_graphs_and_without(twin):
    device = EmulatedCuda()
    engine, actual = generate(twin, device)
    assert actual == twin.answers
    assert isinstance(engine.runner.step, DecodeGraphs)
    assert sorted(engine.runner.step._captured) == [1, 2, 4]
    assert device.num_captured == 1 + 3  # the first one is the start-up's
    assert device.num_replayed > 5
    [paged, *_] = engine.model.ops.operator_table(1, 128, 16, FloatKV(torch.float32))
    assert paged.operator == "Triton", paged.reason


def test_engine_with_an_int8_cache(twin):
    """The kernels, with graphs, answer as the base class does over the same format."""
    device = EmulatedCuda()
    engine, actual = generate(twin, device, kv_cache_dtype="int8")
    assert isinstance(engine.runner.step, DecodeGraphs)
    assert all(layer.k.dtype == torch.int8 for layer in engine.runner.cache.layers)
    [paged, *_] = engine.model.ops.operator_table(1, 128, 16, engine.model.size.kv_format)
    assert paged.operator == "Triton", paged.reason
    plain = Device()
    plain.memory = device.memory
    assert actual == generate(twin, plain, kv_cache_dtype="int8")[1]


def test_graphs_can_be_off_or_not_work(twin, caplog):
    device = EmulatedCuda()
    engine, actual = generate(twin, device, graphs="off")
    assert not isinstance(engine.runner.step, DecodeGraphs)
    assert actual == twin.answers
    assert (
        engine.model.ops.operator_table(1, 128, 16, FloatKV(torch.float32))[1].reason
        == "--graphs off"
    )
    assert "graphs" not in caplog.text
    ops = engine.model.ops
    ops.graphs, ops._find_fault_in_graphs = "auto", lambda: "not here"
    [_, steps, *_] = engine.model.ops.operator_table(1, 128, 16, FloatKV(torch.float32))
    assert (steps.operator, steps.reason) == ("eager", "not here")
    assert "without graphs: not here" in caplog.text


@pytest.mark.parametrize("fault", ["wrong", "nan", "raises"])
def test_kernels_that_do_not_work_are_not_used(fault, twin, monkeypatch, caplog):
    plain = cuda_kernels.decode

    def decode(q, layer, batch, out, scale, splits):
        if fault == "raises":
            raise OSError("no C compiler")
        plain(q, layer, batch, out, scale, splits)
        out[1] += math.nan if fault == "nan" else 0.1

    monkeypatch.setattr(cuda_kernels, "decode", decode)
    device = EmulatedCuda()
    engine, actual = generate(twin, device)
    assert actual == twin.answers
    assert not isinstance(engine.runner.step, DecodeGraphs)
    [table, steps, *_] = engine.model.ops.operator_table(1, 128, 16, FloatKV(torch.float32))
    assert table.operator == "torch, fp32"
    assert steps.operator == "eager"
    words = {"wrong": "differ from torch by 1.0e-01", "nan": "differ", "raises": "no C compiler"}
    assert words[fault] in table.reason
    assert words[fault] in caplog.text
