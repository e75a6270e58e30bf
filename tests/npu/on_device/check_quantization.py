# SPDX-License-Identifier: Apache-2.0
"""Weights of eight and four bits on the NPU: kernels of a layer, logits against Hugging Face.

The limit of an error is that of check_parity.py: what Hugging Face makes in half precision with
the same weights as floats.
"""

from __future__ import annotations

import copy

import pytest
import torch
from steps import Sequences
from support import checkpoints

from gptneox.config.errors import ConfigError
from gptneox.config.settings import QuantizeOptions
from gptneox.devices.cpu.device import CpuDevice
from gptneox.devices.device import Device
from gptneox.devices.npu.device import NpuDevice
from gptneox.devices.npu.operators import NpuInt4, has_graph_updates
from gptneox.devices.operators import InputRange, Operators
from gptneox.engine.sequence import SamplingParams
from gptneox.weights.quantize import dequantize_checkpoint, quantize_checkpoint

HALF = torch.float16


def write(name, folder, **options):
    """A twin, quantized, and the floats that it stands for in Hugging Face."""
    checkpoints.write_checkpoint(folder / "float", checkpoints.FAMILY[name], dtype=HALF)
    quantize_checkpoint(
        folder / "float", folder / "w8a16", QuantizeOptions(**options), lambda report: None
    )
    dequantize_checkpoint(folder / "w8a16", folder / "again")
    model = checkpoints.read_with_transformers(folder / "again")
    return folder / "w8a16", model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt-neox-20b", {}),
        ("gpt-neox-20b", {"disable_names": ("*.dense_4h_to_h",), "disable_last_linear": False}),
        ("redpajama-incite-3b", {}),
    ],
)
def test_logits_are_those_of_the_floats(name, options, npu, tmp_path):
    path, model = write(name, tmp_path, **options)
    engine = checkpoints.load_engine(path, npu, "auto", num_blocks=3)
    [ids] = checkpoints.prompts([140], 288)
    tokens = Sequences(engine, [ids])
    for count in (128, 4, 1, 1):
        tokens.step([count])
    actual = torch.cat(tokens.logits[0])
    with torch.inference_mode():
        exact = model(torch.tensor([ids[:134]])).logits[0]
        half = copy.deepcopy(model).to(HALF)(torch.tensor([ids[:134]])).logits[0].float()
    error, allowed = actual - exact, half - exact
    assert error.abs().max() <= 1.5 * allowed.abs().max()
    assert error.square().mean().sqrt() <= 1.25 * allowed.square().mean().sqrt()


def test_kernels_of_a_layer(npu, chip, trace, tmp_path):
    """Four products, each with its scale and its bias."""
    path, _ = write("gpt-neox-20b", tmp_path)
    engine = checkpoints.load_engine(path, npu, "auto", num_blocks=3)
    tokens = Sequences(engine, checkpoints.prompts([64, 64], 288))
    tokens.step([20, 9])
    layer, found = engine.model.gpt_neox.layers[1], []
    handles = [
        layer.register_forward_pre_hook(lambda *_: trace.clear()),
        layer.register_forward_hook(lambda *_: found.append(trace.kernels())),
    ]
    tokens.step([1, 1])
    for handle in handles:
        handle.remove()
    kernels = [kernel.removeprefix("aclnn") for kernel in found[0]]
    products = [kernel for kernel in kernels if kernel.startswith("WeightQuantBatchMatmul")]
    assert len(products) == 4, kernels
    assert not [kernel for kernel in kernels if "Addmm" in kernel or "MatmulWeightNz" in kernel]
    assert kernels.count("LayerNorm") == 2


def test_scales_that_half_precision_cannot_hold(npu):
    """They are a factor of the output; the operator itself gets normal numbers."""
    ops = npu.operators()
    device = npu.torch_device
    values = torch.tensor([[100, -128, 3], [7, 0, 127], [0, 0, 0]], dtype=torch.int8)
    scale = torch.tensor([2.0**-20, 0.01, 0.0])
    bias = torch.tensor([0.0, 1.0, 2.0], dtype=HALF)
    x = torch.tensor([[1.0, 2.0, -4.0], [50.0, 1.0, 0.5]], dtype=HALF)
    packed = ops.pack_int8(values.to(device), scale.to(device), bias.to(device), HALF)
    exact = x.double() @ (values.double() * scale.double()[:, None]).T + bias.double()
    actual = packed.multiply(ops, x.to(device)).cpu().double()
    torch.testing.assert_close(actual, exact, rtol=2e-3, atol=1e-7)


def test_a_matrix_that_the_operator_does_not_take(npu):
    values = torch.zeros(65536, 1, dtype=torch.int8, device=npu.torch_device)
    with pytest.raises(ConfigError, match=r"at most 65535 .* --disable_names"):
        npu.operators().pack_int8(values, values[:, 0].float(), None, HALF)


def test_graphs_answer_as_steps_do(npu, chip, tmp_path):
    if chip != "A2" or not has_graph_updates(npu.torch_npu):
        pytest.skip("of an A2 whose torch_npu updates captured operators")
    path, _ = write("gpt-neox-20b", tmp_path)
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    prompts = checkpoints.prompts([3, 120], 288)
    answers = []
    for graphs in ("off", "on"):
        device = NpuDevice()
        device.setup(0)
        settings = {"num_blocks": 6, "max_batch_size": 2, "graphs": graphs}
        engine = checkpoints.load_engine(path, device, "auto", **settings)
        answers.append([o.token_ids for o in engine.generate(prompts, params)])
    assert answers[0] == answers[1]


# -- weights of four bits ------------------------------------------------------------------------


def int4_weight(features, depth, num_groups, seed=0):
    """Values uint8 [F, K / 2], scales and zeros [F, G], a bias [F]."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(256, (features, depth // 2), generator=generator, dtype=torch.uint8)
    scale = torch.rand(features, num_groups, generator=generator) / 16 + 1e-3
    zero = torch.randint(16, (features, num_groups), generator=generator, dtype=torch.uint8)
    return values, scale, zero, torch.randn(features, generator=generator).to(HALF)


@pytest.mark.parametrize(("features", "num_groups"), [(40, 3), (40, 1), (36, 3), (40, 12)], ids=str)
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16], ids=str)
def test_products_of_four_bits(features, num_groups, dtype, npu, chip, caplog):
    """Against the specification in fp64: by the operator, and where it does not take the groups."""
    values, scale, zero, bias = int4_weight(features, 192, num_groups)
    scale[0], scale[1], scale[2, 0] = 0, 1e-5, 3e-6  # of rows and of a group: none, subnormal
    x = torch.randn(9, 192, generator=torch.Generator().manual_seed(1)).to(dtype)
    ops, plain, device = npu.operators(), Operators(Device()), npu.torch_device
    moved = [t.to(device) for t in (values, scale, zero, bias.to(dtype))]
    if chip != "A2":
        with pytest.raises(ConfigError, match=r"eight bits only on a 310P; .* w8a16"):
            ops.pack_int4(*moved, dtype)
        return
    packed = ops.pack_int4(*moved, dtype)
    taken = features % 8 == 0 and num_groups != 12
    assert isinstance(packed, NpuInt4) == taken
    assert ("widened for each product" in caplog.text) != taken
    wide = plain.pack_int4(values, scale, zero, bias.double(), torch.float64)
    exact = wide.multiply(plain, x.double())
    actual = packed.multiply(ops, x.to(device)).cpu().double()
    unit = torch.finfo(dtype).eps  # of scales and of weights, each rounded once
    torch.testing.assert_close(actual, exact, rtol=unit, atol=unit * exact.abs().max().item())
    assert (actual[:, 0] == bias[0].to(dtype)).all()


def test_a_model_of_four_bits(npu, chip, trace, tmp_path):
    """Logits of the floats that it stands for, and the kernels of a layer."""
    if chip != "A2":
        pytest.skip("of an A2")
    path, model = write("gpt-neox-20b", tmp_path, quant_type="w4a16", group_size=32)
    engine = checkpoints.load_engine(path, npu, "auto", num_blocks=3)
    [ids] = checkpoints.prompts([20], 288)
    tokens = Sequences(engine, [ids])
    tokens.step([16])
    trace.clear()
    tokens.step([1])
    kernels = [kernel.removeprefix("aclnn") for kernel in trace.kernels()]
    products = [kernel for kernel in kernels if kernel.startswith("WeightQuantBatchMatmul")]
    assert len(products) == 4 * len(engine.model.gpt_neox.layers), kernels
    actual = torch.cat(tokens.logits[0])
    with torch.inference_mode():
        exact = model(torch.tensor([ids[:17]])).logits[0]
    assert (actual - exact).norm() <= 0.01 * exact.norm()


# -- inputs that become integers -----------------------------------------------------------------

RANGE = InputRange(0.031, -7)


@pytest.mark.parametrize("inputs", [None, RANGE], ids=["dynamic", "static"])
def test_products_of_integers(inputs, npu, chip):
    """Against the specification; a static scale has 19 bits, and 1 / scale is of half precision."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-128, 128, (40, 96), generator=generator, dtype=torch.int8)
    scale = torch.rand(40, generator=generator) / 300
    bias = torch.randn(40, generator=generator).to(HALF)
    start = torch.randint(-4000, 4000, (40,), generator=generator, dtype=torch.int32)
    x = torch.randn(9, 96, generator=generator).to(HALF)
    ops, plain, device = npu.operators(), Operators(Device()), npu.torch_device
    given = (inputs, None if inputs is None else start)
    moved = [t.to(device) for t in (values, scale, bias)]
    if inputs is None and chip != "A2":
        with pytest.raises(ConfigError, match=r"no scale for each token on a 310P; .* w8a8 or"):
            ops.pack_integers(*moved, HALF)
        return
    packed = ops.pack_integers(
        *moved, HALF, inputs, None if given[1] is None else given[1].to(device)
    )
    actual = packed.multiply(ops, x.to(device)).cpu().float()
    expected = plain.linear_integers(x, plain.pack_integers(values, scale, bias, HALF, *given))
    limit = 2e-3 if inputs is None else 5e-3  # of inputs at the edge of a step, one step
    assert (actual - expected.float()).abs().max() <= limit * expected.float().abs().max()


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16], ids=str)
def test_what_the_inverse_of_a_scale_loses_is_made_up_for(dtype, npu, chip):
    """Slope and offset of outputs over exact ones; 1 / 0.0311 loses 0.3 % in bf16."""
    if chip != "A2" and dtype == torch.bfloat16:
        pytest.skip("of an A2")
    inputs, generator = InputRange(0.0311, -7), torch.Generator().manual_seed(0)
    values = torch.randint(-127, 128, (64, 512), generator=generator, dtype=torch.int8)
    scale = torch.rand(64, generator=generator) / 300 + 1e-3
    bias = 100 * torch.rand(64, generator=generator)
    start = (bias / scale - inputs.offset * values.sum(1)).round().to(torch.int32)
    x = torch.randn(400, 512, generator=generator).to(dtype)
    moved = [t.to(npu.torch_device) for t in (values, scale, start)]
    packed = npu.operators().pack_integers(moved[0], moved[1], None, dtype, inputs, moved[2])
    actual = packed.multiply(npu.operators(), x.to(npu.torch_device)).cpu().double()
    weight = scale.double()[:, None] / inputs.scale * values
    exact = x.double() @ weight.T
    around, about = actual - actual.mean(0), exact - exact.mean(0)
    gain = (around * about).sum() / about.square().sum()
    assert abs(gain - 1) < 1e-3  # above 2, every other bf16 number lies by the middle of two steps
    added = actual.mean(0) - exact.mean(0)
    assert abs((added / bias).median() - 1) < 1.5e-3


def test_static_scales_are_the_nearest_of_nineteen_bits(npu):
    scale = torch.tensor([0.1, 1 / 3, 1e-5])
    values = torch.full((3, 16), 100, dtype=torch.int8)
    ops, device = npu.operators(), npu.torch_device
    packed = ops.pack_integers(values.to(device), scale.to(device), None, HALF, RANGE, None)
    # The scale of inputs is what its inverse in fp16 stands for.
    scale = scale / (packed.factor.item() * RANGE.scale)
    low = (packed.scale.cpu() & 0xFFFFFFFF).to(torch.int32).view(torch.float32)
    assert not (low.view(torch.int32) & 0x1FFF).any()
    assert ((low - scale).abs() <= 2**-11 * scale).all()


def test_scales_of_inputs_that_half_precision_cannot_hold(npu):
    values = torch.zeros(3, 16, dtype=torch.int8, device=npu.torch_device)
    with pytest.raises(ConfigError, match="whose inverse"):
        npu.operators().pack_integers(values, values[:, 0].float(), None, HALF, InputRange(1e-6, 0))


@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w8a8"])
def test_a_model_of_integers(scheme, npu, chip, trace, tmp_path):
    """Logits near those of plain torch with the same file, and the kernels of a layer."""
    if scheme == "w8a8_dynamic" and chip != "A2":
        pytest.skip("of an A2")
    checkpoints.write_checkpoint(tmp_path / "float", checkpoints.FAMILY["gpt-neox-20b"], dtype=HALF)
    texts = checkpoints.prompts([200, 200], 288)
    options = QuantizeOptions(quant_type=scheme)
    quantize_checkpoint(tmp_path / "float", tmp_path / "q", options, lambda report: None, texts)
    [ids] = checkpoints.prompts([20], 288)
    logits = []
    for device in (npu, CpuDevice()):
        dtype = "auto" if device is npu else "float32"
        engine = checkpoints.load_engine(tmp_path / "q", device, dtype, num_blocks=3)
        tokens = Sequences(engine, [ids])
        tokens.step([16])
        layer, found = engine.model.gpt_neox.layers[1], []
        handles = [
            layer.register_forward_pre_hook(lambda *_: trace.clear()),
            layer.register_forward_hook(lambda *_, to=found: to.append(trace.kernels())),
        ]
        tokens.step([1])
        for handle in handles:
            handle.remove()
        logits.append(torch.cat(tokens.logits[0]).cpu().float())
        if device is npu:
            kernels = [kernel.removeprefix("aclnn") for kernel in found[0]]
            products = [k for k in kernels if k.startswith("QuantMatmul")]
            assert len(products) == 3, kernels
            assert kernels.count("LayerNorm") == 1, kernels
    error = logits[0] - logits[1]
    assert error.norm() <= 0.03 * logits[1].norm()
