# SPDX-License-Identifier: Apache-2.0
"""Scaled-down twins of the published GPT-NeoX checkpoints, with seeded random weights.

A twin keeps what makes its model special (head_dim, rotary share, activation, residual form,
padded or odd vocabulary, tied embeddings, the keys of its era's config.json) and is small in
everything else: layers, heads, vocabulary, positions.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from gptneox.config.settings import EngineSection
from gptneox.devices.device import Device
from gptneox.engine.paged import PagedEngine


def _old(head_dim: int, num_heads: int, vocab_size: int, **keys: Any) -> dict[str, Any]:
    """A config.json as transformers 4.x wrote it; a key given as None is absent from the file."""
    hidden_size = head_dim * num_heads
    config = {
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": 4 * hidden_size,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 160,
        "model_type": "gpt_neox",
        "num_attention_heads": num_heads,
        "num_hidden_layers": 2,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.24.0",
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": vocab_size,
    } | keys
    return {key: value for key, value in config.items() if value is not None}


_NEOX_20B = _old(
    96,
    2,
    288,
    num_hidden_layers=3,
    hidden_act="gelu_fast",
    attention_probs_dropout_prob=0,
    hidden_dropout_prob=0,
    use_parallel_residual=None,
    transformers_version="4.19.0.dev0",
)

# The keys come from each model's own config.json; sizes are scaled, but stay odd where they were.
FAMILY: dict[str, dict[str, Any]] = {
    "gpt-neox-20b": _NEOX_20B,
    "gpt-neoxt-chat-20b": _NEOX_20B
    | {
        "_name_or_path": "EleutherAI/gpt-neox-20b",
        "custom_pipelines": {"text-generation": {"impl": "instruct_pipeline.Pipeline"}},
        "num_hidden_layers": 2,
        "torch_dtype": "float32",
    },
    "pythia-14m": _old(32, 4, 304, num_hidden_layers=3, max_position_embeddings=128),
    "pythia-70m": _old(64, 2, 304),
    "pythia-1b": _old(256, 1, 304, torch_dtype="bfloat16"),
    "pythia-1.4b": _old(128, 1, 304, max_position_embeddings=2048),
    "pythia-2.8b": _old(80, 2, 304),
    "dolly-v2-3b": _old(80, 1, 280, num_hidden_layers=3, torch_dtype="bfloat16"),
    "dolly-v2-12b-tuned": _old(
        128,
        2,
        281,
        attention_dropout=0.0,
        classifier_dropout=0.1,
        hidden_dropout=0.0,
        torch_dtype="float32",
    )
    | {"rope_scaling": None},
    "oasst-sft-pythia-12b": _old(128, 1, 289, num_hidden_layers=3),
    "stablelm-base-alpha-7b": _old(128, 2, 302, max_position_embeddings=256),
    "redpajama-incite-3b": _old(80, 2, 302, rotary_pct=1.0, use_parallel_residual=False),
    "redpajama-incite-7b-instruct": _old(
        128, 1, 289, rotary_pct=1.0, use_parallel_residual=False, num_hidden_layers=3
    ),
    "polyglot-ko-1.3b": _old(
        128, 1, 280, rotary_pct=0.5, num_steps="global_step213000", tie_word_embeddings=None
    ),
    "polyglot-ko-5.8b": _old(
        256, 1, 305, rotary_pct=0.25, num_steps="global_step320000", use_parallel_residual=None
    ),
    "polyglot-ko-12.8b": _old(
        128, 2, 281, rotary_pct=0.5, num_steps="global_step301000", eos_token_id=2
    ),
    "open-calm-small": _old(64, 3, 296, rotary_pct=1.0, use_parallel_residual=False),
    "open-calm-7b": _old(128, 1, 297, rotary_pct=1.0, use_parallel_residual=False),
    "japanese-gpt-neox-3.6b": _old(  # 22 heads: shared by 1, 2, 11 or 22 ranks only
        16, 22, 320, rotary_pct=1.0, use_parallel_residual=False, bos_token_id=2, eos_token_id=3
    ),
    "japanese-large-lm-3.6b": _old(
        96,
        2,
        283,
        rotary_pct=1.0,
        use_parallel_residual=False,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        end_token_id=2,
        torch_dtype="float32",
    ),
    "no-attention-bias": _old(64, 2, 293, attention_bias=False, hidden_act="gelu_new"),
    "relu-serial": _old(32, 3, 291, hidden_act="relu", use_parallel_residual=False),
}

FORMS = ("safetensors", "sharded", "bin", "new_keys")


def write_checkpoint(
    directory: Path,
    config_dict: dict[str, Any],
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    form: str = "safetensors",
    sharpness: float = 1.0,
) -> GPTNeoXForCausalLM:
    """Write a checkpoint with random weights; returns the same model, in fp32, in evaluation mode.

    Args:
        directory: made when absent.
        config_dict: what config.json holds; its dtype key is set to `dtype`.
        seed: of the weights.
        dtype: of the files. The returned model holds the rounded values.
        form: "safetensors" (one file), "sharded" (several, with an index), "bin" (one pickle),
            "new_keys" (one safetensors file, config.json as transformers 5 writes it).
        sharpness: see `randomize`.
    """
    assert form in FORMS, form
    config_dict = config_dict | {"torch_dtype": str(dtype).removeprefix("torch.")}
    config = GPTNeoXConfig(**config_dict)
    model = GPTNeoXForCausalLM(config).float().eval().requires_grad_(False)
    randomize(model, seed, dtype, sharpness)
    # A copy, because the rotary frequencies of a model that was half precision once stay rounded.
    copy.deepcopy(model).to(dtype).save_pretrained(
        directory, max_shard_size="200KB" if form == "sharded" else "1GB"
    )
    names = stored_names(directory)
    assert "lm_head.weight" not in names, "a published checkpoint calls it embed_out.weight"
    assert config.tie_word_embeddings or "embed_out.weight" in names
    assert (form == "sharded") == (len(list(directory.glob("*.safetensors"))) > 1)
    if form == "bin":
        file = directory / "model.safetensors"
        torch.save(load_file(file), directory / "pytorch_model.bin")
        file.unlink()
    if form != "new_keys":
        (directory / "generation_config.json").unlink(missing_ok=True)
        text = json.dumps(config_dict, indent=2)
        (directory / "config.json").write_text(text, encoding="utf-8")
    return model


def stored_names(directory: Path) -> set[str]:
    """Names of all tensors in the safetensors files of a directory."""
    return {name for file in directory.glob("*.safetensors") for name in load_file(file)}


def randomize(
    model: GPTNeoXForCausalLM,
    seed: int,
    dtype: torch.dtype = torch.float32,
    sharpness: float = 1.0,
) -> None:
    """Fill every parameter, biases and normalisations too, so that none can be forgotten.

    Products keep the scale of their input roughly, so logits are spread (standard deviation
    near 3) and rounding is not amplified from layer to layer. A `sharpness` above 1 makes
    attention choosier: rounding grows, but greedy text does not run in circles any more.
    """
    generator = torch.Generator().manual_seed(seed)
    gains = {"query_key_value": 1.5 * sharpness, "attention.dense": 2.0, "mlp": 1.5}
    gains |= {"lm_head": 3.0, "embed_in": 3.0 if model.config.tie_word_embeddings else 0.5}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            noise = 0.2 * noise + (1 if name.endswith("weight") else 0)
        elif name.endswith("bias"):
            noise *= 0.3
        else:
            gain = next(gain for part, gain in gains.items() if part in name)
            noise *= gain / math.sqrt(parameter.shape[-1])
        parameter.data.copy_(noise.to(dtype))


def prompts(lengths: Seq[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def load_engine(
    directory: Path, device: Device, dtype: str = "float32", **settings: Any
) -> PagedEngine:
    """The paged engine over a checkpoint without a tokenizer; `settings` as in [engine]."""
    section = EngineSection(**settings)
    return PagedEngine.from_pretrained(
        directory, section, device, dtype=dtype, with_tokenizer=False
    )
