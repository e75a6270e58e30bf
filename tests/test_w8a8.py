# SPDX-License-Identifier: Apache-2.0
"""W8A8: products of integers, the rewriting of normalisations, files, ranks, accuracy.

Bars of the quality gate, in nats as in test_quantization.py: 0.0015 for the embedded checkpoint
with a scale for each token, 0.002 for its twin with planted outliers. Without smoothing, and with
one scale for all inputs of a layer without it, the twin is far above: the bars mean something.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support import checkpoints
from support.checkpoints import copy_checkpoint, describe
from support.logits import divergence, gate_ids, gate_logits, paged_logits, plant_outliers
from torch import Tensor, nn
from transformers import GPTNeoXForCausalLM

from gptneox.__main__ import main
from gptneox.config.model import ModelConfig
from gptneox.config.settings import EMBEDDED_CHECKPOINT, QuantizeOptions
from gptneox.devices.device import Device, Memory
from gptneox.devices.operators import FourProducts, InputRange, Operators, PackedIntegers
from gptneox.engine.detokenizer import load_tokenizer
from gptneox.layers import Linear
from gptneox.model import GPTNeoX
from gptneox.parallel import TensorParallelGroup
from gptneox.tasks.quantize import sample_texts
from gptneox.weights import calibrate
from gptneox.weights.cut import cut_checkpoint, merge_checkpoint
from gptneox.weights.files import CheckpointError
from gptneox.weights.formats import INT8_DYNAMIC, INT8_STATIC, scheme_of
from gptneox.weights.load import check_weights, load_model, rank_directory
from gptneox.weights.quantize import (
    LinearReport,
    _static,
    dequantize_checkpoint,
    quantize_checkpoint,
    quantize_rows,
)

CONFIG = checkpoints.FAMILY["pythia-14m"] | {"vocab_size": 301}
DESCRIPTION = "quant_model_description.json"
LAYER = "gpt_neox.layers.1."
DOWN, DENSE, UP = (
    f"{LAYER}mlp.dense_4h_to_h",
    f"{LAYER}attention.dense",
    f"{LAYER}mlp.dense_h_to_4h",
)
TEXTS = checkpoints.prompts([200, 150], 301, seed=5)
RANGE = InputRange(0.03, -11)
Tensors = dict[str, Tensor]


def quantized(source: Path, target: Path, scheme: str, **options: Any) -> Path:
    """Of a checkpoint that is there, with random sample text."""
    vocab = ModelConfig.from_pretrained(source).vocab_size
    texts = checkpoints.prompts([200, 150], vocab, seed=5)
    made = QuantizeOptions(quant_type=scheme, **options)
    quantize_checkpoint(source, target, made, lambda report: None, texts)
    return target


@pytest.fixture
def source(tmp_path: Path) -> Path:
    checkpoints.write_checkpoint(tmp_path / "float", CONFIG, dtype=torch.float16)
    return tmp_path / "float"


class RoomyDevice(Device):
    """The base class with memory: weights stay readable after loading."""

    def memory(self) -> Memory:
        return Memory(1 << 40, 1 << 40, 0)


def loaded(path: Path, group: TensorParallelGroup | None = None) -> dict[str, Linear]:
    """The linear layers of a rank in plain torch."""
    model = GPTNeoX(ModelConfig.from_pretrained(path), RoomyDevice(), group)
    load_model(model, path, torch.float32)
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear)}


# -- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 8, 40])
@pytest.mark.parametrize(("left", "right"), [(-128, -128), (127, -128), (-128, 127), (127, 127)])
def test_nothing_saturates(left: int, right: int, rows: int, ops: Operators) -> None:
    """Sums of the largest products are exact, also where K and the rows are padded."""
    k = 1023
    start = torch.full((5,), 3, dtype=torch.int32)
    weight = torch.full((5, k), right, dtype=torch.int8)
    device = ops.torch_device
    packed = ops.pack_integers(
        weight.to(device), torch.ones(5, device=device), None, torch.float32, InputRange(1.0, 0),
        start.to(device),
    )  # fmt: skip
    y = packed.multiply(ops, torch.full((rows, k), float(left), device=device)).cpu()
    assert torch.equal(y, torch.full((rows, 5), float(left * right * k + 3)))


def test_the_deepest_sum_fits(ops: Operators) -> None:
    """65,535 products of 127 and -128, half of the range of int32."""
    k, device = 65535, ops.torch_device
    weight = torch.full((2, k), -128, dtype=torch.int8, device=device)
    packed = ops.pack_integers(weight, torch.ones(2, device=device), None, torch.float32)
    for rows in (1, 40):
        y = packed.multiply(ops, torch.ones(rows, k, device=device)).cpu()
        torch.testing.assert_close(y, torch.full((rows, 2), -128.0 * k), rtol=1e-6, atol=0)


@pytest.mark.parametrize("inputs", [None, RANGE], ids=["dynamic", "static"])
@pytest.mark.parametrize(("k", "f"), [(96, 288), (320, 77), (1, 5), (1100, 33)])
def test_products(k: int, f: int, inputs: InputRange | None, ops: Operators) -> None:
    """Against sums in int64; a row has the same answer alone and in company, bit for bit."""
    generator = torch.Generator().manual_seed(k)
    values = torch.randint(-128, 128, (f, k), generator=generator, dtype=torch.int8)
    scale = torch.rand(f, generator=generator) / 100
    scale[0], values[-1] = 0, -128
    bias = torch.randn(f, generator=generator)
    start = None if inputs is None else torch.randint(-9999, 9999, (f,), dtype=torch.int32)
    moved = [None if t is None else t.to(ops.torch_device) for t in (values, scale, bias, start)]
    layer = ops.pack_integers(moved[0], moved[1], moved[2], torch.float32, inputs, moved[3])
    assert (layer.in_features, layer.out_features) == (k, f)
    x = torch.randn(300, k, generator=generator)
    x[1], x[2, 0], x[3, k // 2] = 0, math.inf, math.nan
    if inputs is None:
        largest = x.double().abs().amax(1, keepdim=True) / 127
        step = torch.where(largest > 0, largest, 1.0)
        integers = (x / step.float()).round()
    else:
        step = torch.ones(300, 1).double()
        integers = (x / inputs.scale + inputs.offset).round().clamp(-128, 127)
    sums = integers.nan_to_num().to(torch.int64) @ values.to(torch.int64).T
    sums = sums if start is None else sums + start
    exact = sums.double() * step * scale.double() + bias.double()
    whole = layer.multiply(ops, x.to(ops.torch_device)).cpu()
    assert whole.isnan().any(1).nonzero().flatten().tolist() == [2, 3]
    assert whole[2:4].isnan().all(), "all of the row: none of it is to be trusted"
    sound = torch.tensor([i for i in range(300) if i not in (2, 3)])
    difference = (whole.double() - exact)[sound].abs()
    assert difference.max() <= 1e-6 * (exact[sound] - bias).abs().max() + 1e-6 * bias.abs().max()
    for rows in (1, 2, 5, 9, 13):
        part = layer.multiply(ops, x[:rows].to(ops.torch_device)).cpu()
        assert torch.equal(part.nan_to_num(), whole[:rows].nan_to_num()), rows


# -- a model -------------------------------------------------------------------------------------


def round_inputs(path: Path, model: GPTNeoXForCausalLM) -> None:
    """Make Hugging Face's linear layers round their inputs as the file's formats say."""
    formats = check_weights(path, ModelConfig.from_pretrained(path))
    stored = load_file(next(path.glob("*.safetensors")))
    for name, module in model.named_modules():
        weight_format = formats.get(name.replace("lm_head", "embed_out"))
        if not isinstance(module, nn.Linear) or weight_format is None:
            continue
        if weight_format is INT8_DYNAMIC:

            def by_row(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
                step = args[0].abs().amax(-1, keepdim=True) / 127
                return ((args[0] / step).round() * step,)

            module.register_forward_pre_hook(by_row)
        elif weight_format in INT8_STATIC:
            step, offset = (stored[f"{name}.input_{p}"].item() for p in ("scale", "offset"))

            def by_given(
                _: nn.Module, args: tuple[Tensor], step: float = step, offset: float = offset
            ) -> tuple[Tensor]:
                return (((args[0] / step + offset).round().clamp(-128, 127) - offset) * step,)

            module.register_forward_pre_hook(by_given)


@pytest.mark.parametrize("name", ["pythia-14m", "redpajama-incite-3b", "no-attention-bias"])
@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w8a8"])
def test_a_model_answers_as_its_integers(
    name: str, scheme: str, device: Device, tmp_path: Path
) -> None:
    """Logits against Hugging Face with the dequantized weights and rounded inputs.

    An input at the edge of a step may be rounded the other way, which later layers carry on, so
    the limit is a part of a step's effect, 1/127, and far below what a wrong scale or bias does.
    """
    config = checkpoints.FAMILY[name] | {"torch_dtype": "float32"}
    checkpoints.write_checkpoint(tmp_path / "float", config)
    path = quantized(tmp_path / "float", tmp_path / "q", scheme)
    dequantize_checkpoint(path, tmp_path / "again")
    hf = GPTNeoXForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    round_inputs(path, hf)
    engine = checkpoints.load_engine(path, device, num_blocks=9, block_size=16)
    assert engine.model.size.scheme == scheme
    ids = checkpoints.prompts([70], config["vocab_size"])[0]
    with torch.inference_mode():
        expected = hf(torch.tensor([ids])).logits[0]
    for num_prefill in (66, 5):
        actual = paged_logits(engine, ids[: num_prefill + 4], num_prefill)
        error = actual - expected[: num_prefill + 4]
        assert error.norm() <= 6e-3 * expected[: num_prefill + 4].norm()


@pytest.mark.parametrize("name", ["pythia-14m", "redpajama-incite-3b", "no-attention-bias"])
def test_rewriting_leaves_the_function(name: str, tmp_path: Path) -> None:
    """With every matrix float again, logits are those of the source, whatever its outliers are."""
    checkpoints.write_checkpoint(tmp_path / "float", checkpoints.FAMILY[name])
    config = json.loads((tmp_path / "float/config.json").read_text()) | {"torch_dtype": "float32"}
    (tmp_path / "float/config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "float/model.safetensors")
    for key in tensors:
        if "layernorm" in key:
            tensors[key][3:5] *= 10
            tensors[key][7] = 0
    save_file(tensors, tmp_path / "float/model.safetensors", {"format": "pt"})
    path = quantized(tmp_path / "float", tmp_path / "q", "w8a8_dynamic", disable_level="L99")
    after = load_file(next(path.glob("*.safetensors")))
    first, second = (f"{LAYER}{n}_layernorm." for n in ("input", "post_attention"))
    is_canonical = name == "pythia-14m"
    same = torch.equal(after[f"{first}weight"], after[f"{second}weight"])
    assert same == is_canonical
    assert after[f"{first}bias"].any() != is_canonical
    assert not torch.equal(after[f"{first}weight"], tensors[f"{first}weight"])
    ids = checkpoints.prompts([40], config["vocab_size"])[0]
    engines = [
        checkpoints.load_engine(p, RoomyDevice(), num_blocks=3) for p in (tmp_path / "float", path)
    ]
    logits = [paged_logits(engine, ids, 40) for engine in engines]
    torch.testing.assert_close(*logits, rtol=0, atol=2e-5 * logits[0].abs().max().item())


def test_one_product_behind_one_normalisation(source: Path, tmp_path: Path, device: Device) -> None:
    """A canonical layer quantizes its inputs once, for all rows; a mixed one has two products."""
    if not device.operators().fuses_layers:
        pytest.skip("layers are not fused here")
    path = quantized(source, tmp_path / "q", "w8a8_dynamic", disable_names=(f"{UP}",))
    engine = checkpoints.load_engine(path, device, num_blocks=3)
    layers = [layer.packed.front for layer in engine.model.gpt_neox.layers]
    assert isinstance(layers[1], FourProducts)
    assert layers[1].up is not None
    width = 3 * CONFIG["hidden_size"] + CONFIG["intermediate_size"]
    for layer in (layers[0], layers[2]):
        if isinstance(layer, FourProducts):
            assert layer.up is None
            assert layer.qkv.out_features == width
        else:
            assert layer.shares_inputs


# -- files ---------------------------------------------------------------------------------------


def write_like_msmodelslim(
    source: Path, target: Path, tags: dict[str, str], *, old: bool = False, deq: str = "int64"
) -> Path:
    """A file by the description of the format, with simple choices of scales.

    Args:
        source: a float checkpoint.
        target: folder to make.
        tags: of the linear layers whose names end so; others are float.
        old: names and tensors of earlier files: smoothed normalisations are wrapped, biases and
            scales of weights are there, too.
        deq: dtype of deq_scale.
    """
    copy_checkpoint(source, target)
    tensors = {n: t.float() for n, t in load_file(target / "model.safetensors").items()}
    (target / "model.safetensors").unlink()
    written: Tensors = {}
    described: dict[str, Any] = {"model_quant_type": next(iter(tags.values()))}
    if not old:
        described |= {"version": "1.0.0", "group_size": 0}
    for name, tensor in tensors.items():
        linear, _, part = name.rpartition(".")
        tag = next((t for end, t in tags.items() if linear.endswith(end)), "FLOAT")
        made: Tensors = {name: tensor.half()}
        if tag != "FLOAT" and part == "weight":
            scale = tensor.abs().amax(1, keepdim=True) / 127
            q = (tensor / scale).round()
            made = {name: q.to(torch.int8)}
            weight_scales = {f"{linear}.weight_scale": scale, f"{linear}.weight_offset": 0 * scale}
            if tag in ("W8A16", "W8A8_DYNAMIC") or old:
                made |= weight_scales
            if tag in ("W8A8", "W8A8S"):
                step, offset = 0.05, 13.0
                dequant = scale.flatten() * step
                start = (tensors[f"{linear}.bias"] / dequant - offset * q.sum(1)).round()
                bits = dequant.view(torch.int32).to(torch.int64)
                made |= {
                    f"{linear}.input_scale": torch.tensor([step]),
                    f"{linear}.input_offset": torch.tensor([offset]),
                    f"{linear}.quant_bias": start.to(torch.int32),
                    f"{linear}.deq_scale": bits if deq == "int64" else dequant,
                }
        elif tag in ("W8A8", "W8A8S") and not old:
            made = {}
        elif old and "layernorm" in linear:
            made = {f"{linear}.{part}": 9 * tensor.half(), f"{linear}.module.{part}": tensor.half()}
        written |= made
        described |= dict.fromkeys(made, tag)
    save_file(written, target / f"quant_model_weight{'_w8a8' if old else 's'}.safetensors")
    suffix = "_w8a8" if old else ""
    (target / f"quant_model_description{suffix}.json").write_text(json.dumps(described))
    if old:
        config = json.loads((target / "config.json").read_text())
        config["quantize"] = described["model_quant_type"].lower()
        (target / "config.json").write_text(json.dumps(config))
    return target


ALL = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


def test_floats_of_wrapped_norms_are_what_transformers_reads(source: Path, tmp_path: Path) -> None:
    tags = dict.fromkeys(ALL, "W8A8")
    path = write_like_msmodelslim(source, tmp_path / "q", tags, old=True)
    dequantize_checkpoint(path, tmp_path / "again")
    names = {*load_file(source / "model.safetensors")}
    assert {*load_file(tmp_path / "again/model.safetensors")} == names


def test_a_row_of_zeros_keeps_its_bias() -> None:
    weight = quantize_rows(torch.tensor([[0.0, 0.0], [1.0, -1.0]]), torch.float32)
    stored = _static(weight, torch.tensor([0.04, 0.0]), InputRange(0.1, 3), "linear")
    bias = stored["quant_bias"][0] * stored["deq_scale"][0]
    assert bias.item() == pytest.approx(0.04, rel=1e-5)


def test_sums_that_do_not_fit_their_integers_are_refused() -> None:
    weight = quantize_rows(torch.full((1, 4096), 1e-3), torch.float32)
    inputs = InputRange(0.02, 0)
    unit = weight.scale.item() * inputs.scale
    with pytest.raises(CheckpointError, match="disable_names"):
        _static(weight, torch.tensor([unit * (2**31 - 2e6)]), inputs, "linear")


@pytest.mark.parametrize("quant_type", ["w8a16", "w4a16"])
def test_levels_are_of_the_w8a8_types(quant_type: str, source: Path, tmp_path: Path) -> None:
    options = QuantizeOptions(quant_type=quant_type, disable_level="L3")
    with pytest.raises(ValueError, match="is of the w8a8 types"):
        quantize_checkpoint(source, tmp_path / "q", options, lambda report: None)


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize(
    ("tags", "scheme"),
    [
        (dict.fromkeys(ALL, "W8A8"), "w8a8"),
        (dict.fromkeys(ALL, "W8A8S"), "w8a8"),
        (dict.fromkeys(ALL, "W8A8_DYNAMIC"), "w8a8_dynamic"),
        ({"query_key_value": "W8A8", "dense_h_to_4h": "W8A16", "dense": "W8A8_DYNAMIC"},
         "w8a16+w8a8+w8a8_dynamic"),
    ],
    ids=["static", "sparse", "dynamic", "mixed"],
)  # fmt: skip
def test_files_of_msmodelslim(
    tags: dict[str, str], scheme: str, old: bool, source: Path, tmp_path: Path
) -> None:
    """Each layer against its float twin: offset, bias and scales have their signs and places."""
    path = write_like_msmodelslim(source, tmp_path / "q", tags, old=old)
    config = ModelConfig.from_pretrained(path)
    assert scheme_of(check_weights(path, config)) == scheme
    model = GPTNeoX(config, RoomyDevice())
    load_model(model, path, torch.float32)
    before = load_file(source / "model.safetensors")
    norm = model.gpt_neox.layers[1].input_layernorm
    assert torch.equal(norm.weight, before[f"{LAYER}input_layernorm.weight"].float())
    generator = torch.Generator().manual_seed(0)
    for name, linear in model.named_modules():
        if not isinstance(linear, Linear):
            continue
        weight, bias = (before.get(f"{name}.{part}") for part in ("weight", "bias"))
        x = torch.randn(8, linear.in_features, generator=generator)
        wanted = F.linear(x, weight.float(), None if bias is None else bias.float())
        assert (linear(x) - wanted).norm() <= 0.02 * wanted.norm(), name


@pytest.mark.parametrize("deq", ["int64", "float32"])
def test_both_types_of_deq_scale(deq: str, source: Path, tmp_path: Path) -> None:
    """The low word of int64 is the number; the mark torch_npu sets beside it does not count."""
    path = write_like_msmodelslim(source, tmp_path / "q", dict.fromkeys(ALL, "W8A8"), deq=deq)
    expected = loaded(write_like_msmodelslim(source, tmp_path / "b", dict.fromkeys(ALL, "W8A8")))
    if deq == "int64":
        edit(path, f"{DOWN}.deq_scale", lambda t: t | (1 << 46))
    found = loaded(path)[DOWN].packed
    assert isinstance(found, PackedIntegers)
    assert isinstance(expected[DOWN].packed, PackedIntegers)
    assert torch.equal(found.scale, expected[DOWN].packed.scale)


def test_an_offset_may_be_an_integer(source: Path, tmp_path: Path) -> None:
    path = write_like_msmodelslim(source, tmp_path / "q", dict.fromkeys(ALL, "W8A8"))
    edit(path, f"{DOWN}.input_offset", lambda t: t.to(torch.int8))
    found = loaded(path)[DOWN].packed
    assert isinstance(found, PackedIntegers)
    assert found.inputs == InputRange(pytest.approx(0.05), 13)


def edit(path: Path, name: str, make: Callable[[Tensor], Tensor | None]) -> None:
    file = path / "quant_model_weights.safetensors"
    tensors = load_file(file)
    made = make(tensors.pop(name, torch.zeros(1)))
    save_file(tensors | ({name: made} if made is not None else {}), file)


def stored(part: str, make: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    return lambda path: edit(path, f"{DOWN}.{part}", make)


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "compressed": (describe(model_quant_type="W8A8SC"), r"a tool of CANN compressed"),
    "one of it": (describe(**{f"{DOWN}.weight": "W8A8SC"}), r"'W8A8SC', which is not.*as W8A8S"),
    "a mix": (describe(model_quant_type="W8A8_MIX"), r"changes its scheme while it runs"),
    "cards": (describe(reduce_quant_type="per_channel"), r"scales for each card"),
    "absent": (stored("deq_scale", lambda t: None), r"lacks .*deq_scale, which quant_model"),
    "no tag": (describe(**{f"{DOWN}.quant_bias": None}), r"no entry for .*quant_bias"),
    "dynamic": (describe(**{f"{DOWN}.weight": "W8A8_DYNAMIC"}), r"without weight_scale and"),
    "types": (stored("quant_bias", lambda t: t.float()), r"quant_bias holds float32"),
    "shape": (stored("quant_bias", lambda t: t[1:]), r"\[127\], expected \[128\]"),
    "experts": (
        lambda p: (edit(p, "a.experts.b", lambda t: t), describe(**{"a.experts.b": "FLOAT"})(p)),
        r"have no experts",
    ),
    "a step of zero": (stored("input_scale", lambda t: 0 * t), r"input_scale is 0"),
    "an offset": (stored("input_offset", lambda t: t + 0.5), r"input_offset is 13\.5"),
    "bits": (stored("deq_scale", lambda t: t | (1 << 40)), r"does not hold the bits"),
    "infinite": (stored("deq_scale", lambda t: 0 * t + 0x7F800000), r"not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_files_and_their_description_agree(case: str, source: Path, tmp_path: Path) -> None:
    path = write_like_msmodelslim(source, tmp_path / "q", dict.fromkeys(ALL, "W8A8"))
    change, message = REFUSED[case]
    change(path)
    with pytest.raises(CheckpointError, match=message):
        loaded(path)


@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w8a8"])
def test_what_is_written(scheme: str, source: Path, tmp_path: Path) -> None:
    path = quantized(source, tmp_path / "q", scheme, disable_last_linear=False)
    described = json.loads((path / DESCRIPTION).read_text())
    assert described["model_quant_type"] == scheme.upper()
    assert json.loads((path / "config.json").read_text())["quantize"] == scheme
    tensors = load_file(path / f"quant_model_weight_{scheme}.safetensors")
    own = {n.rpartition(".")[2] for n in tensors if n.startswith(f"{DOWN}.")}
    if scheme == "w8a8":
        assert own == {"weight", "input_scale", "input_offset", "quant_bias", "deq_scale"}
        assert tensors[f"{DOWN}.deq_scale"].dtype == torch.int64
    else:
        assert own == {"weight", "weight_scale", "weight_offset", "bias"}
    assert {described[f"{DOWN}.{part}"] for part in own} == {scheme.upper()}
    assert described["embed_out.weight"] == "W8A16", "logits keep their inputs"


# -- ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w8a8"])
def test_ranks_add_up(scheme: str, world_size: int, source: Path, tmp_path: Path) -> None:
    """Slices of the whole, from whole files and from cut ones; a bias and an offset count once.

    With given scales the sum is the whole's. With a scale for each token a rank finds its own for
    its columns, at least as fine as that of the whole row.
    """
    path = quantized(source, tmp_path / "q", scheme)
    cut_checkpoint(path, tmp_path / "parts", world_size)
    whole, ranks = loaded(path), []
    for rank in range(world_size):
        group = TensorParallelGroup(rank, world_size)
        ranks.append(loaded(path, group))
        cut = loaded(rank_directory(tmp_path / "parts", group), group)
        for name, layer in ranks[-1].items():
            for part, value in vars(layer.packed).items():
                other = getattr(cut[name].packed, part)
                same = torch.equal(value, other) if isinstance(value, Tensor) else value == other
                assert same, (name, part)
    assert (
        not isinstance(ranks[1][DOWN].packed.start, Tensor) or not ranks[1][DOWN].packed.start.any()
    )
    for name in (DOWN, DENSE):
        layers = [rank[name] for rank in ranks]
        assert all(torch.equal(layer.packed.scale, whole[name].packed.scale) for layer in layers)
        x = torch.randn(6, whole[name].in_features, generator=torch.Generator().manual_seed(0))
        parts = x.chunk(world_size, 1)
        found = torch.stack([layer(p) for layer, p in zip(layers, parts, strict=True)]).sum(0)
        wanted = whole[name](x)
        limit = 1e-5 if scheme == "w8a8" else 0.02
        assert (found - wanted).norm() <= limit * wanted.norm()
    x = torch.randn(6, whole[UP].in_features, generator=torch.Generator().manual_seed(0))
    joined = torch.cat([rank[UP](x) for rank in ranks], 1)
    assert torch.equal(joined, whole[UP](x)), "column-parallel rows"


@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w8a8"])
def test_cut_and_join_keep_every_bit(scheme: str, source: Path, tmp_path: Path) -> None:
    path = quantized(source, tmp_path / "q", scheme)
    assert cut_checkpoint(path, tmp_path / "parts", 2).quantization == scheme
    merge_checkpoint(tmp_path / "parts", tmp_path / "joined")
    [before], [after] = (list(p.glob("*.safetensors")) for p in (path, tmp_path / "joined"))
    first, second = load_file(before), load_file(after)
    assert before.name == after.name
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)
    joined = tmp_path / "joined"
    assert scheme_of(check_weights(joined, ModelConfig.from_pretrained(joined))) == scheme


# -- the quantizer -------------------------------------------------------------------------------


def reports_of(source: Path, target: Path, **options: Any) -> dict[str, LinearReport]:
    reports: list[LinearReport] = []
    made = QuantizeOptions(**options)
    quantize_checkpoint(source, target, made, reports.append, TEXTS)
    return {report.name: report for report in reports}


def test_the_most_sensitive_layers_fall_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fifth of the MLPs' second matrices at most: to W8A16, or to floats if need be."""
    checkpoints.write_checkpoint(tmp_path / "float", CONFIG | {"num_hidden_layers": 5})
    first = reports_of(tmp_path / "float", tmp_path / "a", quant_type="w8a8_dynamic")
    assert {r.scheme for n, r in first.items() if n != "embed_out"} == {"w8a8_dynamic"}
    downs = {n: r.output_error for n, r in first.items() if n.endswith("4h_to_h")}
    worst = max(downs, key=lambda name: downs[name])
    for limit, scheme in ((0.0, "float"), (0.9 * downs[worst], "w8a16")):
        monkeypatch.setattr(calibrate, "MAX_ERROR", limit)
        found = reports_of(tmp_path / "float", tmp_path / "b", quant_type="w8a8_dynamic")
        changed = {n: r.scheme for n, r in found.items() if r.scheme != first[n].scheme}
        assert changed == {worst: scheme}
        path = tmp_path / "b"
        assert check_weights(path, ModelConfig.from_pretrained(path))[worst].scheme in scheme


def test_a_level_keeps_the_worst_layers_float(source: Path, tmp_path: Path) -> None:
    all_of_them = reports_of(source, tmp_path / "a", quant_type="w8a8")
    order = sorted(all_of_them.values(), key=lambda r: -r.output_error)
    found = reports_of(source, tmp_path / "b", quant_type="w8a8", disable_level="L3")
    kept = {n for n, r in found.items() if r.scheme == "float"} - {"embed_out"}
    assert kept == {r.name for r in order[:3]}


def write_lines(path: Path, *entries: Any) -> str:
    lines = (e if isinstance(e, str) else json.dumps(e) for e in entries)
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return str(path)


LINES: dict[str, tuple[tuple[Any, ...], str]] = {
    "no key": (({"text": "a"}, "", {"txt": "b"}), "line 3 has neither inputs_pretokenized"),
    "no JSON": (({"text": "a"}, "{"), "line 2 is not JSON"),
    "a number": (({"text": 5},), "line 1: text is not a text"),
    "too short": (({"text": "a few words"},), "has 5 tokens; at least 256"),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_sample_text_that_is_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries, message = LINES[case]
    file = write_lines(tmp_path / "calib.jsonl", *entries)
    arguments = ["--model_path", str(EMBEDDED_CHECKPOINT), "--save_directory", str(tmp_path / "q")]
    options = ["--quant_type", "w8a8_dynamic", "--calib_file", file]
    assert main(["quantize", *arguments, *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


def test_the_task_with_a_file_of_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    passages = sample_texts(None)
    file = write_lines(tmp_path / "c.jsonl", *({"inputs_pretokenized": t} for t in passages[:40]))
    arguments = ["--model_path", str(EMBEDDED_CHECKPOINT), "--save_directory", str(tmp_path / "q")]
    options = ["--quant_type", "w8a8_dynamic", "--calib_file", file]
    assert main(["quantize", *arguments, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        sum(": w8a8_dynamic, range " in line and ", of outputs 0.0" in line for line in lines) == 16
    )


def test_the_other_form_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is written for w8a16 and w4a16 only"):
        quantized(source, tmp_path / "q", "w8a8", form="compressed-tensors")


# -- accuracy ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample() -> list[list[int]]:
    """The default text, none of which is among the gate's."""
    tokenizer = load_tokenizer(EMBEDDED_CHECKPOINT, 1024)
    return [tokenizer.encode(text) for text in sample_texts(None)]


def test_the_quality_gate(tmp_path: Path, sample: list[list[int]]) -> None:
    ids, twin = gate_ids(), copy_checkpoint(EMBEDDED_CHECKPOINT, tmp_path / "twin")
    plant_outliers(twin)
    expected = gate_logits(EMBEDDED_CHECKPOINT, ids)
    found = {}
    for name, path, scheme, method in (
        ("embedded", EMBEDDED_CHECKPOINT, "w8a8_dynamic", "m1"),
        ("outliers", twin, "w8a8_dynamic", "m1"),
        ("static", twin, "w8a8", "m1"),
        ("without smoothing", twin, "w8a8_dynamic", "none"),
        ("one scale without smoothing", twin, "w8a8", "none"),
    ):
        options = QuantizeOptions(quant_type=scheme, anti_method=method)
        quantize_checkpoint(path, tmp_path / name, options, lambda report: None, sample)
        found[name] = divergence(expected, gate_logits(tmp_path / name, ids))
    assert 0 < found["embedded"][0] <= 0.0015
    assert found["outliers"][0] <= 0.002
    assert found["static"][0] <= 0.004
    assert min(found["embedded"][1], found["outliers"][1]) >= 0.97
    assert found["without smoothing"][0] > 0.05
    assert found["one scale without smoothing"][0] > 0.05
