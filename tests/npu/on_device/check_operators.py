# SPDX-License-Identifier: Apache-2.0
"""Which kernels a layer reaches, how often, and that every operator's shape rule agrees."""

from __future__ import annotations

import re

import pytest
import torch
from steps import Sequences
from support import checkpoints
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from gptneox.devices.npu.attention import has_cache_write

# A layer of the 20B twin: parallel residual, head_dim 96, 24 of them rotated; and one of a twin
# with a serial residual, head_dim 80, all rotated. "attention" differs from step to step.
DUO_TURN = "InplaceCopy InplaceCopy Mul Cat InplaceAddcmul InplaceCopy"
DUO_STORE = {"DUO": "atbReshapeAndCache", "DUO without ATB": "ScatterNdUpdate ScatterNdUpdate"}
LAYER = {
    "A2": (
        "LayerNorm Addmm Gelu InplaceCopy RotaryPositionEmbedding ScatterPaKvCache attention "
        "Cat Addmm Add"
    )
}
SERIAL = {
    "A2": (
        "LayerNorm Addmm InplaceCopy RotaryPositionEmbedding ScatterPaKvCache attention Addmm "
        "Add LayerNorm Addmm Gelu Addmm Add"
    )
}
for chip_, store in DUO_STORE.items():
    LAYER[chip_] = (
        f"LayerNorm MatmulWeightNz InplaceAdd Gelu {DUO_TURN} {store} attention "
        "Cat MatmulWeightNz InplaceAdd Add"
    )
    SERIAL[chip_] = (
        f"LayerNorm MatmulWeightNz InplaceAdd {DUO_TURN} {store} attention "
        "MatmulWeightNz InplaceAdd Add "
        "LayerNorm MatmulWeightNz InplaceAdd Gelu MatmulWeightNz InplaceAdd Add"
    )
PADDED_FIA = "IndexSelect FusedInferAttentionScore IndexSelect"
EAGER = (
    "InplaceCopy InplaceOne Tril Muls Matmul InplaceCopy InplaceFillScalar SWhere Softmax "
    "InplaceCopy Matmul InplaceCopy"
)
ATTENTION = {
    ("A2", "prefill"): PADDED_FIA,
    ("A2", "decode"): "FusedInferAttentionScore",
    ("A2", "chunk behind a prefix"): PADDED_FIA,
    ("DUO", "prefill"): "ConstantPadNd ConstantPadNd ConstantPadNd atbSelfAttention",
    ("DUO", "decode"): "atbPagedAttention",
    ("DUO", "chunk behind a prefix"): "atbPagedAttention",
    ("DUO without ATB", "prefill"): (
        "PromptFlashAttention InplaceCopy PromptFlashAttention InplaceCopy"
    ),
    ("DUO without ATB", "decode"): "IncreFlashAttention",
    ("DUO without ATB", "chunk behind a prefix"): f"{EAGER} {EAGER}",
}


def make_engine(name, npu, tmp_path_factory, **settings):
    directory = tmp_path_factory.mktemp("operators") / "checkpoint"
    checkpoints.write_checkpoint(directory, checkpoints.FAMILY[name], dtype=torch.float16)
    return checkpoints.load_engine(directory, npu, "auto", num_blocks=2, **settings)


@pytest.fixture(scope="module")
def engine(npu, tmp_path_factory):
    return make_engine("gpt-neox-20b", npu, tmp_path_factory)


@pytest.fixture(scope="module")
def int8_engine(npu, chip, tmp_path_factory):
    if chip != "A2":
        pytest.skip("of an A2")
    return make_engine("gpt-neox-20b", npu, tmp_path_factory, kv_cache_dtype="int8")


@pytest.fixture(scope="module")
def serial_engine(npu, tmp_path_factory):
    return make_engine("redpajama-incite-3b", npu, tmp_path_factory)


STEPS = {
    "prefill": ([], [20, 9]),
    "decode": ([20, 9], [1, 1]),
    "chunk behind a prefix": ([20, 9], [8, 7]),
}


def layer_of(table, npu, chip):
    """Of a table above; where torch_npu has no operator that writes the cache, torch's does."""
    if chip != "A2" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip("the table is of torch_npu 2.13; 2.9 multiplies NZ weights by aclopMatMul")
    if chip == "A2" and not has_cache_write(npu.torch_npu):
        return table[chip].replace("ScatterPaKvCache", "InplaceIndexCopy InplaceIndexCopy")
    return table[chip]


def plain(kernels):
    """Names without the prefix and the number of their form, which releases of torch_npu change."""
    return [re.sub(r"V\d+$", "", kernel.removeprefix("aclnn")) for kernel in kernels]


def kernels_of_layer(engine, trace, before, counts):
    """Of layer 1: what all layers share is made in layer 0."""
    tokens = Sequences(engine, checkpoints.prompts([64] * len(counts), 288))
    if before:
        tokens.step(before)
    layer, found = engine.model.gpt_neox.layers[1], []
    handles = [
        layer.register_forward_pre_hook(lambda *_: trace.clear()),
        layer.register_forward_hook(lambda *_: found.append(trace.kernels())),
    ]
    tokens.step(counts)
    for handle in handles:
        handle.remove()
    return found[0]


def check_kernels(engine, trace, layer, attention, steps):
    expected = layer.replace("attention", attention).split()
    found = plain(kernels_of_layer(engine, trace, *steps))
    # a repeated `aclop…` would be compiled while the program runs
    assert found == expected
    return len(found)


@pytest.mark.parametrize("step", STEPS)
def test_kernels_of_a_layer(engine, npu, chip, trace, step):
    check_kernels(engine, trace, layer_of(LAYER, npu, chip), ATTENTION[chip, step], STEPS[step])


def test_kernels_of_a_layer_decoding_one_sequence(engine, npu, chip, trace):
    """One row of the wide product holds q, k and v as they are wanted."""
    layer = layer_of(LAYER, npu, chip).replace("InplaceCopy ", "", 1)
    count = check_kernels(engine, trace, layer, ATTENTION[chip, "decode"], ([20], [1]))
    counts = {"A2": 9 if has_cache_write(npu.torch_npu) else 10, "DUO": 15, "DUO without ATB": 16}
    assert count == counts[chip]


@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_kernels_of_a_layer_with_an_int8_cache(int8_engine, npu, chip, trace, step):
    """Keys and values are rounded in one launch; a decode step dequantizes nothing itself."""
    layer = layer_of(LAYER, npu, chip).replace("Embedding ", "Embedding Stack DynamicQuant ")
    layer = layer.replace("attention", "ScatterNdUpdate ScatterNdUpdate attention")
    found = plain(kernels_of_layer(int8_engine, trace, *STEPS[step]))
    if step == "decode":
        assert found == layer.replace("attention", ATTENTION[chip, step]).split()
    else:  # each prompt by itself, its keys gathered and multiplied by their scales
        start = layer.split().index("attention")
        assert found[:start] == layer.split()[:start]
        assert found.count(ATTENTION[chip, "decode"]) == len(STEPS[step][1])


def test_kernels_of_a_serial_layer(serial_engine, npu, chip, trace):
    layer = layer_of(SERIAL, npu, chip)
    check_kernels(serial_engine, trace, layer, ATTENTION[chip, "decode"], STEPS["decode"])


class Recorder(TorchDispatchMode):
    """Keeps every operator call on npu tensors: the function, its arguments and its result."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name.startswith(("npu::", "atb::")):
            self.calls.append((func, args, kwargs or {}, out))
        return out


def shapes(value):
    return tree_map(lambda x: (x.shape, x.dtype) if isinstance(x, torch.Tensor) else None, value)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("cache", ["float", "int8"])
def test_shape_rules_agree(request, chip, step, cache):
    """Every call again on FakeTensors: the meta kernels check what the host kernels leave out."""
    engine = request.getfixturevalue("engine" if cache == "float" else "int8_engine")
    tokens = Sequences(engine, checkpoints.prompts([64, 64], 288))
    before, counts = STEPS[step]
    if before:
        tokens.step(before)
    with Recorder() as recorder:
        tokens.step(counts)
    without_meta = ("npu::npu_format_cast", "npu::empty_with_format", "npu::get_npu_format")
    calls = [c for c in recorder.calls if c[0]._schema.name not in without_meta]
    assert len(calls) >= 3 * 3  # at least store, attention and GELU in each layer
    for func, args, kwargs, out in calls:
        with FakeTensorMode():
            fake_args, fake_kwargs = tree_map(
                lambda x: (
                    torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
                    if isinstance(x, torch.Tensor)
                    else x
                ),
                (args, kwargs),
            )
            again = func(*fake_args, **fake_kwargs)
        if func._schema.name != "npu::npu_fused_infer_attention_score":  # returns an unused tensor
            assert shapes(again) == shapes(out), func
        elif isinstance(again, tuple):
            assert shapes(again[0]) == shapes(out[0])
