# SPDX-License-Identifier: Apache-2.0
"""The model against transformers' GPTNeoXForCausalLM, logits of every position.

Limits. fp32: 2e-5 of the largest logit; only the order of sums and the rounding of the rotary
table (fp64 here, fp32 there) differ, which is 1e-6 to 5e-6 in practice, while a wrong activation,
epsilon or rotary share shows up above 1e-4. Half precision: our distance from fp32 may be no more
than HF's own, with a margin for the luck of single roundings (RMS 1.25, largest 1.5 times).
"""

from __future__ import annotations

import cmath
import copy
import json
import logging
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints
from support.logits import paged_logits, random_ids, rms
from torch import Tensor
from transformers import GPTNeoXForCausalLM

from gptneox.config.model import ModelConfig
from gptneox.config.settings import EngineSection
from gptneox.devices.device import Device, Memory
from gptneox.devices.operators import Operators
from gptneox.engine.paged import PagedEngine
from gptneox.layers import rotary_tables
from gptneox.parallel import TensorParallelGroup

FP32_LIMIT = 2e-5
NUM_DECODES = 64

# What no published checkpoint of the table has, but config.json can say.
VARIATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear scaling, old keys": (
        "safetensors",
        checkpoints.FAMILY["pythia-70m"] | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    "linear scaling, rope_type in old keys": (
        "safetensors",
        checkpoints.FAMILY["pythia-70m"] | {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    ),
    "linear scaling, new keys": (
        "new_keys",
        checkpoints.FAMILY["pythia-70m"] | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "rotary base, old keys": (
        "safetensors",
        checkpoints.FAMILY["polyglot-ko-1.3b"] | {"rotary_emb_base": 500},
    ),
    "rotary base, new keys": (
        "new_keys",
        checkpoints.FAMILY["polyglot-ko-1.3b"] | {"rotary_emb_base": 500},
    ),
    "layer_norm_eps": ("safetensors", checkpoints.FAMILY["pythia-70m"] | {"layer_norm_eps": 0.05}),
    "silu": ("safetensors", checkpoints.FAMILY["pythia-70m"] | {"hidden_act": "silu"}),
    "gelu_pytorch_tanh": (
        "safetensors",
        checkpoints.FAMILY["pythia-70m"] | {"hidden_act": "gelu_pytorch_tanh"},
    ),
    "mlp of its own width": (
        "safetensors",
        checkpoints.FAMILY["pythia-70m"] | {"intermediate_size": 77},
    ),
}


@torch.inference_mode()
def hf_logits(model: GPTNeoXForCausalLM, token_ids: list[int]) -> Tensor:
    """Logits [len(token_ids), V] fp32."""
    return model(torch.tensor([token_ids])).logits[0].float()


def greedy_to_the_last_position(model: GPTNeoXForCausalLM, config: dict[str, Any]) -> list[int]:
    """A random prompt and HF's greedy continuation, as many tokens as there are positions."""
    prompt = random_ids(config, config["max_position_embeddings"] - NUM_DECODES)
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_DECODES,
        do_sample=False,
        eos_token_id=None,
    )
    return output[0].tolist()


def assert_logits_equal(actual: Tensor, expected: Tensor) -> None:
    limit = FP32_LIMIT * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit)


def assert_parity(
    directory: Path, config: dict[str, Any], device: Device, form: str = "safetensors"
) -> None:
    model = checkpoints.write_checkpoint(directory, config, form=form)
    engine = checkpoints.load_engine(directory, device)
    assert engine.model.config.num_parameters == model.num_parameters()
    token_ids = greedy_to_the_last_position(model, config)
    assert len(token_ids) == config["max_position_embeddings"] == engine.max_positions
    actual = paged_logits(engine, token_ids, len(token_ids) - NUM_DECODES)
    assert_logits_equal(actual, hf_logits(model, token_ids))


@pytest.mark.parametrize("name", checkpoints.FAMILY)
def test_prefill_and_decode_logits_equal_hf(name: str, tmp_path: Path, device: Device) -> None:
    assert_parity(tmp_path, checkpoints.FAMILY[name], device)


@pytest.mark.parametrize("name", VARIATIONS)
def test_settings_of_config_json_act_as_in_hf(name: str, tmp_path: Path, device: Device) -> None:
    form, config = VARIATIONS[name]
    assert_parity(tmp_path, config, device, form)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert ("rope_parameters" in written) == (form == "new_keys")
    assert ("rotary_pct" in written) == (form != "new_keys")


@pytest.mark.parametrize("name", ["polyglot-ko-12.8b", "japanese-large-lm-3.6b"])
def test_all_file_forms_give_the_same_model(name: str, tmp_path: Path, device: Device) -> None:
    config = checkpoints.FAMILY[name]
    token_ids = random_ids(config, 20)
    logits = {}
    for form in checkpoints.FORMS:
        model = checkpoints.write_checkpoint(tmp_path / form, config, form=form)
        engine = checkpoints.load_engine(tmp_path / form, device)
        logits[form] = paged_logits(engine, token_ids, 12)
        assert engine.eos_token_ids == (config["eos_token_id"],)
        assert_logits_equal(logits[form], hf_logits(model, token_ids))
    for form in checkpoints.FORMS:
        assert torch.equal(logits[form], logits["safetensors"]), form


@pytest.mark.parametrize("stored", ["embed_in", "embed_out", "lm_head", "both"])
def test_tied_embeddings_under_either_name(stored: str, tmp_path: Path, device: Device) -> None:
    config = checkpoints.FAMILY["japanese-large-lm-3.6b"]
    model = checkpoints.write_checkpoint(tmp_path, config)
    tensors = load_file(tmp_path / "model.safetensors")
    weight = tensors.pop("gpt_neox.embed_in.weight")
    assert not {"embed_out.weight", "lm_head.weight"} & tensors.keys()
    if stored in ("embed_in", "both"):
        tensors["gpt_neox.embed_in.weight"] = weight
    if stored in ("embed_out", "both"):
        tensors["embed_out.weight"] = weight.clone()
    if stored == "lm_head":
        tensors["lm_head.weight"] = weight
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    token_ids = random_ids(config, 20)
    actual = paged_logits(checkpoints.load_engine(tmp_path, device), token_ids, 12)
    assert_logits_equal(actual, hf_logits(model, token_ids))


def test_untied_head_does_not_take_the_embedding(tmp_path: Path, device: Device) -> None:
    config = checkpoints.FAMILY["pythia-14m"]
    checkpoints.write_checkpoint(tmp_path, config)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["embed_out.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors: embed_out\.weight"):
        checkpoints.load_engine(tmp_path, device)


def test_buffers_of_old_checkpoints_are_ignored(
    tmp_path: Path, device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    config = checkpoints.FAMILY["gpt-neox-20b"]
    checkpoints.write_checkpoint(tmp_path, config)
    token_ids = random_ids(config, 20)
    expected = paged_logits(checkpoints.load_engine(tmp_path, device), token_ids, 12)
    tensors = load_file(tmp_path / "model.safetensors")
    for i in range(config["num_hidden_layers"]):
        attention = f"gpt_neox.layers.{i}.attention"
        tensors[f"{attention}.bias"] = torch.zeros(1, 1, 160, 160, dtype=torch.uint8)
        tensors[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{attention}.rotary_emb.inv_freq"] = torch.full((12,), 7.0)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING):
        engine = checkpoints.load_engine(tmp_path, device)
    assert not caplog.records
    assert torch.equal(paged_logits(engine, token_ids, 12), expected)


# -- half precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gpt-neox-20b", "pythia-1b", "redpajama-incite-3b"])
def test_half_precision_is_as_close_to_fp32_as_hf_is(
    name: str, dtype: str, tmp_path: Path, device: Device
) -> None:
    config = checkpoints.FAMILY[name]
    model = checkpoints.write_checkpoint(tmp_path, config, dtype=getattr(torch, dtype))
    token_ids = random_ids(config, config["max_position_embeddings"])
    exact = hf_logits(model, token_ids)
    half = checkpoints.read_with_transformers(tmp_path, getattr(torch, dtype))
    hf_error = hf_logits(half, token_ids) - exact
    engine = checkpoints.load_engine(tmp_path, device, dtype)
    error = paged_logits(engine, token_ids, len(token_ids) - 32) - exact
    assert rms(hf_error) > 1e-3, "HF must round, or there is nothing to compare with"
    assert rms(error) <= 1.25 * rms(hf_error)
    assert error.abs().max() <= 1.5 * hf_error.abs().max()


# -- a layer as two products ---------------------------------------------------------------------

PARALLEL = [n for n, c in checkpoints.FAMILY.items() if c.get("use_parallel_residual", True)]


class Specification(Device):
    """The base class on host tensors, folding or not."""

    def __init__(self, fuses_layers: bool) -> None:
        super().__init__()
        self.fuses_layers = fuses_layers

    def operators(self, graphs: str = "auto") -> Operators:
        made = super().operators(graphs)
        made.fuses_layers = self.fuses_layers
        return made

    def memory(self) -> Memory:
        return Memory(1 << 40, 1 << 40, 0)


@pytest.mark.parametrize("name", PARALLEL)
def test_folded_layers_equal_hf(name: str, tmp_path: Path) -> None:
    assert_parity(tmp_path, checkpoints.FAMILY[name], Specification(True))


def test_serial_layers_are_not_folded(tmp_path: Path) -> None:
    checkpoints.write_checkpoint(tmp_path, checkpoints.FAMILY["relu-serial"])
    engine = checkpoints.load_engine(tmp_path, Specification(True))
    assert all(layer.packed is None for layer in engine.model.gpt_neox.layers)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_folding_adds_no_error(dtype: str, tmp_path: Path) -> None:
    """Weights are rounded anew, partial sums less often: over all twins the error is no larger."""
    ratios = []
    for name in PARALLEL:
        config = checkpoints.FAMILY[name]
        model = checkpoints.write_checkpoint(tmp_path / name, config, dtype=getattr(torch, dtype))
        token_ids = random_ids(config, 60)
        exact = hf_logits(model, token_ids)
        plain, folded = (
            rms(
                paged_logits(checkpoints.load_engine(tmp_path / name, b, dtype), token_ids, 50)
                - exact
            )
            for b in (Specification(False), Specification(True))
        )
        assert folded <= 1.15 * plain, f"{name}: {folded} folded, {plain} layer by layer"
        ratios.append(folded / plain)
    assert sum(ratios) / len(ratios) <= 1.0, ratios


@pytest.mark.parametrize("part", ["input", "post_attention", "both"])
def test_folding_around_scales_of_zero(part: str, tmp_path: Path) -> None:
    config = checkpoints.FAMILY["pythia-14m"]
    checkpoints.write_checkpoint(tmp_path, config)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight") and (part in name or part == "both"):
            tensor[::7], tensor[1::7] = 0, 1e-6
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = checkpoints.read_with_transformers(tmp_path)
    token_ids = random_ids(config, 40)
    actual = paged_logits(checkpoints.load_engine(tmp_path, Specification(True)), token_ids, 38)
    assert_logits_equal(actual, hf_logits(model, token_ids))


class Threads(TensorParallelGroup):
    """Ranks as threads of this process."""

    def __init__(self, rank: int, slots: list[Tensor], barrier: threading.Barrier) -> None:
        super().__init__(rank, len(slots))
        self.slots, self.barrier = slots, barrier

    def everyones(self, x: Tensor) -> list[Tensor]:
        self.slots[self.rank] = x.clone()
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found

    def all_reduce(self, x: Tensor) -> Tensor:
        self.num_all_reduces += 1
        return sum(self.everyones(x))

    def all_gather_columns(self, x: Tensor) -> Tensor:
        return torch.cat(self.everyones(x), 1)

    def broadcast_object(self, value: Any) -> Any:
        return value  # the number of blocks, which is the same on both


@pytest.mark.parametrize("name", ["gpt-neox-20b", "no-attention-bias"])
def test_folded_layers_on_two_ranks(name: str, tmp_path: Path) -> None:
    config = checkpoints.FAMILY[name]
    model = checkpoints.write_checkpoint(tmp_path, config)
    token_ids = random_ids(config, 40)
    slots, barrier = [torch.empty(0)] * 2, threading.Barrier(2)

    def logits(rank: int) -> Tensor:
        group = Threads(rank, slots, barrier)
        engine = PagedEngine.from_pretrained(
            tmp_path,
            EngineSection(num_blocks=2),
            Specification(True),
            dtype="float32",
            group=group,
            with_tokenizer=False,
        )
        found = paged_logits(engine, token_ids, 38)
        assert group.num_all_reduces == 3 * config["num_hidden_layers"]  # one per layer and step
        return found

    with ThreadPoolExecutor(2) as pool:
        for actual in pool.map(logits, range(2)):
            assert_logits_equal(actual, hf_logits(model, token_ids))


def test_fp16_scores_beyond_its_range_stay_finite(tmp_path: Path, device: Device) -> None:
    """q·k reaches 90000 in every score; the softmax does not see a constant, so nothing changes.

    The constant sits in a dimension that is not rotated and that nothing else writes to. In fp32 a
    score of 90000 / sqrt(96) still has a step of 1e-3, below fp16's own error, so the error may
    grow by little.
    """
    config = checkpoints.FAMILY["gpt-neox-20b"]
    directories = {name: tmp_path / name for name in ("plain", "large")}
    errors, logits = {}, {}
    for name, directory in directories.items():
        model = checkpoints.write_checkpoint(directory, config, dtype=torch.float16)
        tensors = load_file(directory / "model.safetensors")
        for i in range(config["num_hidden_layers"]):
            prefix = f"gpt_neox.layers.{i}.attention.query_key_value."
            for row in qk_rows_of_last_dim(config):
                tensors[prefix + "weight"][row] = 0
                tensors[prefix + "bias"][row] = 300 if name == "large" else 0
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        model = checkpoints.read_with_transformers(directory)
        token_ids = random_ids(config, 100)
        exact = copy.deepcopy(model).double()
        logits[name] = hf_logits(exact, token_ids)
        engine = checkpoints.load_engine(directory, device, "float16")
        actual = paged_logits(engine, token_ids, 80)
        assert torch.isfinite(actual).all()
        errors[name] = rms(actual - logits[name])
    assert torch.finfo(torch.float16).max < 300 * 300
    torch.testing.assert_close(logits["large"], logits["plain"], rtol=0, atol=1e-4)
    assert errors["large"] <= 1.5 * errors["plain"]


def qk_rows_of_last_dim(config: dict[str, Any]) -> list[int]:
    """Rows of the fused projection, per head (q, k, v), that make the last dim of q and of k."""
    d = config["hidden_size"] // config["num_attention_heads"]
    heads = range(config["num_attention_heads"])
    return [(3 * h + part + 1) * d - 1 for h in heads for part in (0, 1)]


# -- rotary --------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 2047, 16383])
@pytest.mark.parametrize(("head_dim", "share"), [(96, 0.25), (128, 0.5), (80, 1.0)])
def test_rotary_against_fp64(head_dim: int, share: float, position: int, ops: Operators) -> None:
    """The rotation as multiplication of complex numbers x[i] + i*x[i + R/2], in double precision.

    The table is the rounded fp64 value: half a unit in the last place of fp32, 6e-8. A table
    computed in fp32 is off by 1e-3 at position 16383.
    """
    config = ModelConfig.from_dict(
        checkpoints.FAMILY["pythia-14m"]
        | {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "rotary_pct": share}
    )
    r = round(head_dim * share)
    tables = rotary_tables(config, 16384, ops)
    angles = [position * math.exp(-math.log(10000.0) * 2 * i / r) for i in range(r // 2)]
    turn = torch.tensor([cmath.exp(1j * a) for a in angles], dtype=torch.complex128)
    cos, sin = tables.cos[position].double().cpu(), tables.sin[position].double().cpu()
    torch.testing.assert_close(cos, turn.real, rtol=0, atol=1e-6)
    torch.testing.assert_close(sin, turn.imag, rtol=0, atol=1e-6)

    qk = torch.randn(2, 1, 2, head_dim, generator=torch.Generator().manual_seed(2))
    positions = torch.tensor([position], device=ops.torch_device)
    moved = qk.to(ops.torch_device)
    rotated = ops.rotary(moved[0], moved[1], positions, *tables)
    for x, actual in zip(qk.double(), rotated, strict=True):
        turned = torch.complex(x[..., : r // 2], x[..., r // 2 : r]) * turn
        expected = torch.cat([turned.real, turned.imag, x[..., r:]], -1)
        torch.testing.assert_close(actual.double().cpu(), expected, rtol=0, atol=1e-5)
