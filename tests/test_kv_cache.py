# SPDX-License-Identifier: Apache-2.0
"""The formats of the KV cache: how int8 rounds, what it costs in quality, and that an engine's
answers depend on the prompt alone whatever the format is.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import checkpoints
from support.logits import paged_logits
from support.ranks import open_teams
from torch import Tensor

from gptneox.adapter import GPTNeoXForCausalLM
from gptneox.config.errors import ConfigError, FileError
from gptneox.config.model import ModelConfig
from gptneox.config.schema import settings_of
from gptneox.config.settings import EMBEDDED_CHECKPOINT, EngineSection
from gptneox.devices import select
from gptneox.devices.cache import KV_FORMATS, FloatKV, Int8KV, dequantize, quantize
from gptneox.devices.device import Device
from gptneox.engine.detokenizer import load_tokenizer
from gptneox.engine.generate import GenerateEngine
from gptneox.engine.paged import PagedEngine
from gptneox.engine.sequence import SamplingParams
from gptneox.parallel import TensorParallelGroup
from gptneox.weights.size import find_kv_format

# -- rounding ------------------------------------------------------------------------------------


def test_int8_by_hand() -> None:
    rows = [
        [127.0, 0.5, 1.5, -2.5],  # halves to even
        [-254.0, 3.0, 1.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
        [1e-40, 0.0, 0.0, -1e-41],  # a scale that would be no normal number
        [3e38, -3e38, 1e38, 0.0],
    ]
    values, scales = quantize(torch.tensor(rows))
    assert values.tolist() == [
        [127, 0, 2, -2],
        [-127, 2, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [127, -127, 42, 0],
    ]
    assert scales[:4].tolist() == [1.0, 2.0, 1.0, 1.0]
    assert torch.isfinite(dequantize(values, scales)).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_is_not_hidden(bad: float) -> None:
    x = torch.ones(3, 8)
    x[1, 4] = bad
    restored = dequantize(*quantize(x))
    assert restored[1].isnan().any()
    assert torch.equal(restored[[0, 2]], x[[0, 2]])


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(
    st.integers(1, 130),
    st.integers(-30, 12),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 999),
)
def test_int8_is_half_a_step_off_at_most(
    width: int, exponent: int, dtype: torch.dtype, seed: int
) -> None:
    """Against fp64; whatever the size of the numbers, and alike for both signs."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(5, width, generator=generator) * 2.0**exponent).to(dtype)
    values, scales = quantize(x)
    assert (values.dtype, scales.dtype) == (torch.int8, torch.float32)
    exact, most = x.double(), x.double().abs().amax(-1)
    if dtype != torch.float16 or exponent > -10:  # below, fp16 has nothing but zeros and steps
        torch.testing.assert_close(scales.double(), most / 127, rtol=2**-23, atol=0)
    error = (dequantize(values, scales).double() - exact).abs()
    assert (error <= (0.5 + 127 * 2**-22) * scales.double()[:, None]).all()
    negative, same = quantize(-x)
    assert torch.equal(negative, -values)
    assert torch.equal(same, scales)


# -- what is asked for ---------------------------------------------------------------------------


def model_config(**keys: Any) -> ModelConfig:
    return ModelConfig.from_dict(checkpoints.FAMILY["pythia-14m"] | keys)


def test_the_format_that_is_asked_for() -> None:
    (key,) = (s for s in settings_of(EngineSection) if s.name == "kv_cache_dtype")
    assert key.choices == tuple(KV_FORMATS)
    plain = model_config()
    c8 = model_config(quantization_config={"group_size": 0, "kv_quant_type": "C8"})
    assert (plain.quantize, c8.quantize) == ("", "")
    half = torch.float16
    assert find_kv_format("auto", plain, half) == FloatKV(half)
    assert find_kv_format("auto", c8, half) == find_kv_format("int8", plain, half) == Int8KV(half)
    without = model_config(quantization_config={"group_size": 0, "kv_quant_type": None})
    assert (without.quantize, without.kv_cache_dtype) == ("", "auto")
    both = model_config(quantize="w8a8", quantization_config={"kv_quant_type": "C8"})
    assert (both.quantize, both.kv_cache_dtype) == ("w8a8", "int8")


def test_other_formats_are_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype is 'int4'; use one of auto, int8"):
        EngineSection(kv_cache_dtype="int4")
    with pytest.raises(ConfigError, match=r"kv_cache_dtype is 'fp8'; use one of auto, int8"):
        GPTNeoXForCausalLM.from_pretrained(
            str(tiny_checkpoint), device_map="cpu", kv_cache_dtype="fp8"
        )
    with pytest.raises(FileError, match="kv_quant_type is 'C4', which is not built; C8"):
        model_config(quantization_config={"kv_quant_type": "C4"})


# -- quality -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    """Passages that the embedded checkpoint can read, 250 tokens each."""
    tokenizer = load_tokenizer(EMBEDDED_CHECKPOINT, 1 << 20)
    lines = (EMBEDDED_CHECKPOINT / "eval/boolq/dev.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    words = " ".join(f"{row['passage']} {row['question']}?" for row in rows)
    ids = tokenizer.encode(words)
    return [ids[i : i + 250] for i in range(0, 1000, 250)]


def test_int8_costs_next_to_nothing(texts: list[list[int]], device: Device) -> None:
    """Mean KL to the float cache over 1000 tokens, read as prompts and one by one."""
    rows = []
    for kv_cache_dtype in ("auto", "int8"):
        engine = checkpoints.load_engine(
            EMBEDDED_CHECKPOINT, device, num_blocks=4, kv_cache_dtype=kv_cache_dtype
        )
        logits = [
            paged_logits(engine, ids, n) for ids, n in zip(texts, (250, 250, 250, 120), strict=True)
        ]
        rows.append(torch.cat(logits).double().log_softmax(-1))
    exact, ours = rows
    divergence = (exact.exp() * (exact - ours)).sum(-1).mean().item()
    agreement = (exact.argmax(-1) == ours.argmax(-1)).double().mean().item()
    assert 0 < divergence <= 3e-4
    assert agreement >= 0.985


# -- answers depend on the prompt alone ----------------------------------------------------------

CONFIG = checkpoints.FAMILY["gpt-neox-20b"] | {"max_position_embeddings": 256}
NUM_NEW = 28


def limit_of(device: Device) -> float:
    """What two ways to the same log-probabilities may differ by.

    A hidden state that is 1e-6 off may move a value over the edge between two steps of int8, so it
    is more than fp32 noise: up to 5e-4 here. Where a processor has bf16 dot products, the queries
    of prompts are rounded to bf16, but not that of a token that comes alone: up to 9e-3.
    """
    kernels = getattr(device, "kernels", None)
    return 0.015 if kernels and "bf16" in kernels.describe() else 2e-3


@dataclass
class Twin:
    """A checkpoint and prompts for it, of which two begin alike."""

    path: Path
    prompts: list[list[int]]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Twin:
    path = tmp_path_factory.mktemp("twin")
    checkpoints.write_checkpoint(path, CONFIG, seed=12)
    prompts = checkpoints.prompts([70, 33, 47, 1], CONFIG["vocab_size"], seed=4)
    prompts.append(prompts[0][:64] + prompts[1][:6])
    return Twin(path, prompts)


def load(twin: Twin, device: Device, **options: Any) -> PagedEngine:
    options = {"block_size": 16, "kv_cache_dtype": "int8", "max_batch_size": 6} | options
    return checkpoints.load_engine(twin.path, device, **options)


def answer(engine: PagedEngine, prompts: list[list[int]]) -> tuple[list[list[int]], Tensor]:
    """Tokens, and the log-probabilities [N, 2] of the two best at each of them."""
    params = SamplingParams(max_new_tokens=NUM_NEW, ignore_eos=True, logprobs=2)
    outputs = engine.generate(prompts, params)
    best = [sorted(step.top.values())[-2:] for o in outputs for step in o.logprobs]
    return [o.token_ids for o in outputs], torch.tensor(best)


@pytest.fixture
def alone(twin: Twin, device: Device) -> tuple[list[list[int]], Tensor]:
    """Each prompt by itself, in one step, without a prefix cache."""
    engine = load(twin, device, enable_prefix_caching=False, max_prefill_tokens=256)
    parts = [answer(engine, [prompt]) for prompt in twin.prompts]
    token_ids, scores = [ids for part in parts for ids in part[0]], torch.cat([p[1] for p in parts])
    assert (scores[:, 1] - scores[:, 0]).min() > 0.02, "choose another seed: the model is unsure"
    return token_ids, scores


SITUATIONS = {
    "together": {"enable_prefix_caching": False, "max_prefill_tokens": 512},
    "in chunks": {"enable_prefix_caching": False, "max_prefill_tokens": 19},
    "behind prefixes": {"max_prefill_tokens": 64},
    "preempted": {"num_blocks": 9, "max_prefill_tokens": 64},
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_answers_depend_on_the_prompt_alone(
    situation: str, twin: Twin, device: Device, alone: tuple[list[list[int]], Tensor]
) -> None:
    token_ids, scores = alone
    engine = load(twin, device, **SITUATIONS[situation])
    for _ in range(2):  # the second time over what the first has left
        found, ours = answer(engine, twin.prompts)
        assert found == token_ids
        assert (ours - scores).abs().max() <= limit_of(device)
    engine.block_manager.check([])
    assert (engine.scheduler.num_preemptions > 0) == (situation == "preempted")
    caches = "prefix" in situation or situation == "preempted"
    assert (engine.block_manager.num_hit_tokens > 0) == caches


def test_the_flash_path_answers_as_the_paged_one(
    twin: Twin, device: Device, alone: tuple[list[list[int]], Tensor]
) -> None:
    """Rows padded in front; the cache grows on the way."""
    section = EngineSection(kv_cache_dtype="int8", max_batch_size=6)
    engine = GenerateEngine.from_pretrained(
        twin.path, section, device, dtype="float32", with_tokenizer=False
    )
    params = SamplingParams(max_new_tokens=NUM_NEW, ignore_eos=True)
    outputs = engine.generate(twin.prompts, params)
    assert [o.token_ids for o in outputs] == alone[0]
    assert "KV cache in int8" in engine.describe_cache()


def test_reordered_rows_keep_their_scales(twin: Twin, device: Device) -> None:
    """As beam search does between two steps; the cache grows on the way."""
    model = GPTNeoXForCausalLM.from_pretrained(
        str(twin.path), dtype="float32", device_map=device.name, kv_cache_dtype="int8"
    )
    ids = torch.tensor([prompt[:33] for prompt in twin.prompts[:3]]).to(device.torch_device)
    rows = torch.tensor([2, 2, 0])
    cache, other = model.new_cache(), model.new_cache()
    model(ids[:, :20], past_key_values=cache)
    cache.reorder_cache(rows)
    ids = ids[rows]
    model(ids[:, :20], past_key_values=other)
    for end in (21, 22, 33):
        start = cache.get_seq_length()
        found, expected = (
            model(ids[:, start:end], past_key_values=c).logits for c in (cache, other)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_two_formats_side_by_side(
    twin: Twin, device: Device, alone: tuple[list[list[int]], Tensor]
) -> None:
    """Two models of a process share nothing, and the formats do not give the same numbers."""
    settings_ = {"enable_prefix_caching": False, "max_prefill_tokens": 256}
    engines = {name: load(twin, device, kv_cache_dtype=name, **settings_) for name in KV_FORMATS}
    scores: dict[str, list[Tensor]] = {name: [] for name in engines}
    for prompt, (name, engine) in itertools.product(twin.prompts, engines.items()):
        scores[name].append(answer(engine, [prompt])[1])
    floats, ours = (torch.cat(scores[name]) for name in ("auto", "int8"))
    assert torch.equal(ours, alone[1])
    first = slice(0, None, NUM_NEW)  # after the same tokens, whatever follows them
    assert (ours[first] - floats[first]).abs().max() > limit_of(device)
    assert engines["int8"].describe_cache().endswith("tokens in int8")
    assert engines["auto"].describe_cache().endswith("tokens in float32")


def answers_of_rank(
    group: TensorParallelGroup, path: Path, prompts: list[list[int]]
) -> list[list[int]]:
    """Each prompt by itself."""
    section = EngineSection(kv_cache_dtype="int8", block_size=16)
    engine = PagedEngine.from_pretrained(
        path, section, select("cpu"), dtype="float32", group=group, with_tokenizer=False
    )
    params = SamplingParams(max_new_tokens=NUM_NEW, ignore_eos=True)
    return [engine.generate([prompt], params)[0].token_ids for prompt in prompts]


def test_ranks_round_as_one_process(twin: Twin) -> None:
    """A scale belongs to one head, so that sharing the heads changes nothing."""
    expected = answers_of_rank(TensorParallelGroup(), twin.path, twin.prompts)
    with open_teams() as teams:
        found = teams(2).run(answers_of_rank, twin.path, twin.prompts)
    assert found == [expected, expected]
