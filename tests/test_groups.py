# SPDX-License-Identifier: Apache-2.0
"""Weights of four bits in groups: their products, and the files that other tools write of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints, foreign
from support.foreign_files import FILES, awq, describe, gptq
from support.logits import paged_logits
from torch import Tensor
from transformers import GPTNeoXForCausalLM

from gptneox.config.model import ModelConfig
from gptneox.devices.device import Device
from gptneox.devices.operators import Operators
from gptneox.weights.cut import cut_checkpoint, merge_checkpoint
from gptneox.weights.files import CheckpointError
from gptneox.weights.groups import pack, unpack
from gptneox.weights.load import check_weights
from gptneox.weights.quantize import dequantize_checkpoint, floats_of
from gptneox.weights.readers.bitsandbytes import BnbFourBits
from gptneox.weights.readers.compressed_tensors import PackedFormat
from gptneox.weights.readers.gguf import BLOCK_TYPES

HALF_TYPES = [torch.float16, torch.bfloat16]
CONFIG = checkpoints.FAMILY["pythia-14m"]


# -- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_words(bits: int, dim: int) -> None:
    """As packed one by one, the highest bit included; and back."""
    values = torch.randint(1 << bits, (16, 24), generator=torch.Generator().manual_seed(0))
    values[:, 0] = values[0] = (1 << bits) - 1
    words = foreign.pack_words(values.numpy(), bits, dim)
    assert torch.equal(pack(values, bits, dim), words)
    assert torch.equal(unpack(words, bits, dim).long(), values)


# -- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=str)
@pytest.mark.parametrize(
    ("k", "f", "group_size"), [(96, 288, 32), (320, 77, 64), (8, 5, 0), (1152, 33, 128)]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_products(
    k: int, f: int, group_size: int, symmetric: bool, dtype: torch.dtype, ops: Operators
) -> None:
    """Against fp64, for few rows and for many; scales that fp16 holds, and others.

    The limit: the weight is rounded to the dtype once, as a float one is, then sums in fp32 of K
    terms and one rounding of the result; the device may round x to bf16 beside bf16 weights.
    """
    made = foreign.coded((f, k), 4, group_size, symmetric=symmetric, seed=k)
    scale = made.scale.float() * (1 if k == 96 else 1.001)
    values, zero = (torch.from_numpy(x).to(torch.uint8) for x in (made.values, made.zero))
    weight = (values - zero[:, made.groups].double()) * scale[:, made.groups].double()
    generator = torch.Generator().manual_seed(k)
    bias = torch.randn(f, generator=generator).to(dtype)
    moved = [t.to(ops.torch_device) for t in (pack(values, 4, 1, torch.uint8), scale, zero, bias)]
    layer = ops.pack_int4(moved[0], moved[1], moved[2], moved[3], dtype)
    assert (layer.in_features, layer.out_features) == (k, f)
    for rows in (1, 2, 5, 13, 40, 300):
        x = torch.randn(rows, k, generator=generator).to(dtype)
        exact = x.double() @ weight.T + bias.double()
        size = x.double().abs() @ weight.abs().T + bias.double().abs()
        actual = layer.multiply(ops, x.to(ops.torch_device)).cpu()
        assert actual.dtype == dtype
        unit = 5e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        assert ((actual.double() - exact).abs() <= unit * size + 1e-9).all(), rows


# -- files of other tools ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FILES)
def test_weights_are_those_of_the_tool(kind: str, tmp_path: Path) -> None:
    """Bit for bit in fp16, which a product of an integer and an fp16 scale is rounded to once."""
    store, settings, options = FILES[kind]
    expected = foreign.write(tmp_path / "made", CONFIG, store, settings, **options)
    describe(tmp_path / "made", kind)
    dequantize_checkpoint(tmp_path / "made", tmp_path / "float")
    found = load_file(tmp_path / "float/model.safetensors")
    assert len(expected) == 12
    for linear, weight in expected.items():
        assert torch.equal(found[f"{linear}.weight"], weight), linear
    config = json.loads((tmp_path / "float/config.json").read_text())
    assert not config.keys() & {"quantize", "quantization_config"}


def answers(path: Path, reference: Path, device: Device) -> None:
    """Logits of `path` against Hugging Face's of the float checkpoint `reference`."""
    hf = GPTNeoXForCausalLM.from_pretrained(reference, dtype=torch.float32).eval()
    engine = checkpoints.load_engine(path, device, num_blocks=9, block_size=16)
    ids = checkpoints.prompts([70], hf.config.vocab_size)[0]
    with torch.inference_mode():
        expected = hf(torch.tensor([ids])).logits[0]
    for num_prefill in (66, 5):
        actual = paged_logits(engine, ids[: num_prefill + 4], num_prefill)
        limit = 2e-5 * expected.abs().max().item()
        torch.testing.assert_close(actual, expected[: num_prefill + 4], rtol=0, atol=limit)


@pytest.mark.parametrize("name", ["pythia-14m", "redpajama-incite-3b"])
@pytest.mark.parametrize("kind", ["gptq", "gptq desc_act", "gptq 8", "packed symmetric"])
def test_a_model_answers_as_its_floats(
    kind: str, name: str, device: Device, tmp_path: Path
) -> None:
    """In fp32, fused layers and permuted inputs included."""
    store, settings, options = FILES[kind]
    config = checkpoints.FAMILY[name]
    foreign.write(tmp_path / "made", config, store, settings, torch.float32, **options)
    dequantize_checkpoint(tmp_path / "made", tmp_path / "float")
    answers(tmp_path / "made", tmp_path / "float", device)


@pytest.mark.parametrize("kind", FILES)
def test_cut_and_joined(kind: str, tmp_path: Path) -> None:
    """Parts are parts of the weights, and joined the same file again."""
    store, settings, options = FILES[kind]
    source = tmp_path / "made"
    foreign.write(source, CONFIG, store, settings, **options)
    describe(source, kind)
    cut_checkpoint(source, tmp_path / "cut", 2)
    merge_checkpoint(tmp_path / "cut", tmp_path / "joined")
    name = next(source.glob("*.safetensors")).name
    before, after = (load_file(tmp_path / n / name) for n in ("made", "joined"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    for rank in range(2):
        config = ModelConfig.from_pretrained(tmp_path / f"cut/{rank}")
        check_weights(tmp_path / f"cut/{rank}", config, 2)


def setting(**changes: Any) -> Callable[[Path], None]:
    """Change the quantization's settings."""

    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"] |= changes
        (path / "config.json").write_text(json.dumps(config))

    return change


def stored(name: str, make: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    """Change a tensor of layer 1's attention.dense."""

    def change(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        key = f"gpt_neox.layers.1.attention.dense.{name}"
        made = make(tensors.pop(key, torch.zeros(1)))
        tensors |= {key: made} if made is not None else {}
        save_file(tensors, path / "model.safetensors")

    return change


REFUSED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "3 bits": ("gptq", setting(bits=3), r"bits is 3; weights of 4 and 8 bits"),
    "kernel's": ("gptq", setting(checkpoint_format="marlin"), r"'marlin', the layout of one"),
    "dynamic": ("gptq", setting(dynamic={"+:.*": {"bits": 8}}), r"\(dynamic\), which are not"),
    "size 0": ("gptq", setting(group_size=0), r"group_size is 0; a number"),
    "size 24": ("gptq", setting(group_size=24), r"groups of 24 for 128 inputs"),
    "other size": ("gptq", setting(group_size=64), r"qzeros is \[4, \d+\], expected \[2, "),
    "not sorted": (
        "gptq", stored("g_idx", lambda t: torch.cat((t[:1], t[1:].flip(0)))),
        r"g_idx is not sorted, which desc_act False",
    ),
    "uneven": (
        "gptq desc_act", stored("g_idx", lambda t: torch.cat((t[:1], t[:-1]))), r"32 inputs into",
    ),
    "nan": ("gptq", stored("scales", lambda t: t * torch.nan), r"a scale is not finite"),
    "of integers": (
        "gptq", stored("scales", lambda t: t.to(torch.int32)),
        r"scales holds int32; float64 or float32 or .* is expected; the file is damaged",
    ),
    "wide words": (
        "gptq", stored("qweight", lambda t: t.long()), r"holds int64; int32 is expected; the file",
    ),
    "missing": ("gptq", stored("qzeros", lambda t: None), r"lacks 1 tensors: .*dense\.qzeros"),
    "unread": ("gptq", stored("other", lambda t: t), r"holds .*1\.attention\.dense\.other"),
    "method": ("gptq", setting(quant_method="hqq"), r"is quantized \(hqq"),
    "activations": ("packed", setting(
        config_groups={"g": {"weights": {}, "input_activations": {"num_bits": 8}}}
    ), r"quantized activations are not served"),
    "ignored": ("packed", setting(ignore=[]), r"says that embed_out is packed, but .* float"),
    "not ignored": (
        "packed", setting(ignore=["lm_head", "re:.*1.attention.dense$"]),
        r"says that gpt_neox.layers.1.attention.dense is float, but .* packed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    """With the name of what is not served or does not fit."""
    kind, change, message = REFUSED[case]
    store, settings, options = FILES[kind]
    foreign.write(tmp_path / "made", CONFIG, store, settings, **options)
    change(tmp_path / "made")
    with pytest.raises(ValueError, match=message):
        dequantize_checkpoint(tmp_path / "made", tmp_path / "float")


def test_settings_in_a_file_of_their_own(tmp_path: Path) -> None:
    """As AutoGPTQ wrote them first."""
    foreign.write(tmp_path / "made", CONFIG, foreign.gptq, {})
    settings = json.dumps(gptq()["quantization_config"] | {"quant_method": None})
    (tmp_path / "made/quantize_config.json").write_text(
        settings.replace('"quant_method": null, ', "")
    )
    formats = check_weights(tmp_path / "made", ModelConfig.from_pretrained(tmp_path / "made"))
    assert {f.scheme for f in formats.values()} == {"", "w4a16"}
    dequantize_checkpoint(tmp_path / "made", tmp_path / "float")
    assert not (tmp_path / "float/quantize_config.json").exists()


# -- GGUF ----------------------------------------------------------------------------------------

WIDE = checkpoints.FAMILY["pythia-1b"] | {"num_attention_heads": 4}


def is_same(found: Path, expected: dict[str, Tensor]) -> None:
    tensors = load_file(found / "model.safetensors")
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor.float(), expected[name]), name


@pytest.mark.parametrize("kind", foreign.GGUF_TYPES)
def test_gguf_blocks(kind: str, tmp_path: Path) -> None:
    """Every type, bit for bit in fp32, the embedding too; query_key_value's rows are per head."""
    expected = foreign.write_gguf(tmp_path / "made", WIDE, lambda name: kind)
    dequantize_checkpoint(tmp_path / "made", tmp_path / "float")
    is_same(tmp_path / "float", expected)


@pytest.mark.parametrize("name", ["pythia-14m", "redpajama-incite-3b"])
def test_awq_divides_what_the_activation_gives(name: str, device: Device, tmp_path: Path) -> None:
    """Against floats that are divided by the same; a loader that drops the scales is wrong."""
    config, path = checkpoints.FAMILY[name], tmp_path / "made"
    foreign.write(path, config, foreign.awq, awq(), torch.float32)
    tensors = load_file(path / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        scales = torch.linspace(0.5, 2.0, config["intermediate_size"])
        tensors[f"gpt_neox.layers.{layer}.mlp.act.scales"] = scales
    save_file(tensors, path / "model.safetensors")
    dequantize_checkpoint(path, tmp_path / "float")
    answers(path, tmp_path / "float", device)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_bitsandbytes(kind: str, nested: bool, tmp_path: Path) -> None:
    """By its description, value by value; eight bits to one rounding in fp32."""
    made, path = {}, tmp_path / "made"
    checkpoints.write_checkpoint(path, CONFIG)
    tensors = load_file(path / "model.safetensors")
    for seed, name in enumerate(sorted(tensors)):
        linear = name.removesuffix(".weight")
        if linear.rpartition(".")[2] in foreign.LINEARS and name.endswith(".weight"):
            shape = tuple(tensors.pop(name).shape)
            stored, made[name] = foreign.bitsandbytes(shape, kind, nested=nested, seed=seed)
            tensors |= {f"{linear}.{part}": value for part, value in stored.items()}
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": kind != "int8"}
    (path / "config.json").write_text(json.dumps(config))
    dequantize_checkpoint(path, tmp_path / "float")
    found = load_file(tmp_path / "float/model.safetensors")
    for name, expected in made.items():
        torch.testing.assert_close(found[name], expected, rtol=3e-7, atol=0)
    if kind != "int8":
        with pytest.raises(CheckpointError, match=r"blocks of .p?f4 are not kept by rows|fp4"):
            cut_checkpoint(path, tmp_path / "cut", 2)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gptneox__embedding_length": 512}, r"embedding_length is 512, but .* is 256"),
        ({"general__architecture": "llama"}, r"architecture 'llama'; gptneox is expected"),
        ({"split__count": 2}, r"one of 2 pieces"),
    ],
)
def test_gguf_that_does_not_fit(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    foreign.write_gguf(tmp_path, WIDE, lambda name: "f16", **keys)
    with pytest.raises(CheckpointError, match=message):
        check_weights(tmp_path, ModelConfig.from_pretrained(tmp_path))


def test_a_gguf_model_answers_as_its_floats(device: Device, tmp_path: Path) -> None:
    """Types mixed as llama.cpp mixes them; cut, too."""
    kinds = {"attn_qkv": "q6_k", "ffn_down": "q4_k", "token_embd": "q8_0", "output": "f16"}
    foreign.write_gguf(tmp_path / "made", WIDE, lambda name: kinds.get(name, "q4_0"))
    dequantize_checkpoint(tmp_path / "made", tmp_path / "float")
    answers(tmp_path / "made", tmp_path / "float", device)
    cut_checkpoint(tmp_path / "made", tmp_path / "cut", 2)
    check_weights(tmp_path / "cut/1", ModelConfig.from_pretrained(tmp_path / "cut/1"), 2)


def test_gguf_against_its_library(tmp_path: Path) -> None:
    """All types, bit for bit with the dequantizer of the package gguf."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    for number, block in BLOCK_TYPES.items():
        data = foreign.blocks((16, 512), block.name, seed=number)
        expected = gguf.dequantize(data, gguf.GGMLQuantizationType(number))
        assert torch.equal(block.rows(torch.from_numpy(data)), torch.from_numpy(expected))


@pytest.mark.parametrize("kind", ["asymmetric", "symmetric", "8 bits"])
def test_packed_against_its_library(kind: str) -> None:
    """Bit for bit with what compressed-tensors unpacks and dequantizes."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    symmetric, bits = kind == "symmetric", 8 if kind == "8 bits" else 4
    made = foreign.coded((64, 96), bits, 32, symmetric=symmetric)
    stored = foreign.packed(made, symmetric=symmetric)
    scale, zero = stored["weight_scale"], None
    values = unpack_from_int32(stored["weight_packed"], bits, torch.Size((64, 96)))
    if not symmetric:
        zero = unpack_from_int32(stored["weight_zero_point"], bits, scale.shape, packed_dim=0)
    scheme = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=32
    )
    expected = dequantize(values, scale, zero, args=scheme)
    found = PackedFormat(bits, 32, symmetric=symmetric).load(
        stored, torch.device("cpu"), torch.float16
    )
    assert torch.equal(floats_of(found, torch.float16), expected)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_against_its_library(kind: str, nested: bool) -> None:
    """Bit for bit in fp32, from the tensors that it saves."""
    library = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is missing")
    weight = 0.05 * torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    packed, state = library.quantize_4bit(
        weight, quant_type=kind, compress_statistics=nested, blocksize=64
    )
    saved = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    four_bits = BnbFourBits(kind, is_nested=nested, sizes=(0, 0, 0))
    assert {t.suffix for t in four_bits.tensors} == {"weight", *saved}
    found = four_bits.load({"weight": packed, **saved}, torch.device("cpu"), torch.float32)
    expected = library.dequantize_4bit(packed, state).float()
    assert torch.equal(floats_of(found, torch.float32), expected)
