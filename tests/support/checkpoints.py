# SPDX-License-Identifier: Apache-2.0
"""Twins of the published GPT-NeoX checkpoints: scaled down, with seeded random weights.

A twin keeps the model's properties that matter to the code (head_dim, rotary share, activation,
residual form, padded or odd vocabulary, tied embeddings, the config.json keys of its time), with
fewer layers and heads, a smaller vocabulary and fewer positions.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import shutil
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from gptneox.config.model import ModelConfig
from gptneox.config.settings import EngineSection
from gptneox.devices.device import Device
from gptneox.engine.paged import PagedEngine
from gptneox.weights.readers.msmodelslim import DESCRIPTION
from gptneox.weights.size import full_shapes
from support.tokenizers import byte_level_tokenizer, write_tokenizer


def _old(head_dim: int, num_heads: int, vocab_size: int, **keys: Any) -> dict[str, Any]:
    """A config.json as transformers 4.x wrote it, without the keys whose value is None."""
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

# Keys from each model's config.json. Sizes are scaled down; odd ones stay odd.
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


def read_with_transformers(path: Path, dtype: torch.dtype = torch.float32) -> GPTNeoXForCausalLM:
    """transformers' own model of a checkpoint, in evaluation mode."""
    release = tuple(int(n) for n in transformers.__version__.split(".")[:2])
    keyword = "dtype" if release >= (4, 56) else "torch_dtype"
    return GPTNeoXForCausalLM.from_pretrained(path, **{keyword: dtype}).eval()


def write_checkpoint(
    directory: Path,
    config_dict: dict[str, Any],
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    form: str = "safetensors",
    sharpness: float = 1.0,
) -> GPTNeoXForCausalLM:
    """Write a checkpoint with random weights; returns the same model in fp32, in evaluation mode.

    Args:
        directory: created if absent.
        config_dict: content of config.json; its dtype key is set to `dtype`.
        seed: of the weights.
        dtype: of the files. The returned model has the rounded values.
        form: "safetensors" (one file), "sharded" (several, with an index), "bin" (one pickle),
            "new_keys" (one safetensors file, config.json as transformers 5 writes it).
        sharpness: see `randomize`.
    """
    assert form in FORMS, form
    config_dict = config_dict | {"torch_dtype": str(dtype).removeprefix("torch.")}
    config = GPTNeoXConfig(**config_dict)
    model = GPTNeoXForCausalLM(config).float().eval().requires_grad_(False)
    randomize(model, seed, dtype, sharpness)
    # Convert a copy: converting back to fp32 would leave the rotary frequencies rounded.
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
    """Fill every parameter, biases and norms included, so that a test notices a missing one.

    Layers roughly keep the scale of their input, so rounding is not amplified from layer to layer,
    and logits have a standard deviation near 3. A `sharpness` above 1 sharpens attention: rounding
    errors grow, but greedy text no longer repeats itself.
    """
    generator = torch.Generator().manual_seed(seed)
    gains = {"query_key_value": 1.5 * sharpness, "attention.dense": 2.0, "mlp": 1.5}
    gains |= {"lm_head": 3.0, "embed_out": 3.0}  # the head in transformers 5, and in 4
    gains |= {"embed_in": 3.0 if model.config.tie_word_embeddings else 0.5}
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
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def load_engine(
    directory: Path, device: Device, dtype: str = "float32", **settings: Any
) -> PagedEngine:
    """A paged engine without a tokenizer; `settings` as in [engine]."""
    section = EngineSection(**settings)
    return PagedEngine.from_pretrained(
        directory, section, device, dtype=dtype, with_tokenizer=False
    )


EOS_ID, PADDING_ID = 0, 335
CHAIN_CONFIG = FAMILY["pythia-14m"] | {
    "vocab_size": 336,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 2,
    "torch_dtype": "float32",
}


def write_chain_checkpoint(directory: Path, *texts: str, **keys: object) -> Path:
    """A checkpoint whose next token depends only on the last one, so that its text is predictable.

    Each letter of a text is followed by the next one, and the last one by end-of-text; a text that
    ends with its first letter repeats forever. "~" stands for a padding id, which decodes to
    nothing. Layers add nothing; a token's embedding is the head's row of its successor.
    """
    directory.mkdir(parents=True, exist_ok=True)
    assert write_tokenizer(directory) < PADDING_ID
    tokenizer = byte_level_tokenizer()
    config = CHAIN_CONFIG | keys
    successor = [EOS_ID] * config["vocab_size"]
    for text in texts:
        ids = [PADDING_ID if c == "~" else i for c in text for i in tokenizer.encode(c).ids]
        for first, second in itertools.pairwise(ids):
            assert successor[first] in (EOS_ID, second), "one letter, two successors"
            successor[first] = second
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = full_shapes(ModelConfig.from_dict(config))
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if "norm" in name and name.endswith("weight"):
            tensor.fill_(1)
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(shapes["embed_out.weight"], generator=generator)
    head -= head.mean(-1, keepdim=True)
    tensors["embed_out.weight"] = head
    tensors["gpt_neox.embed_in.weight"] = head[successor]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def copy_checkpoint(source: Path, target: Path) -> Path:
    """Copy a checkpoint for a test that changes it."""
    shutil.copytree(source, target)
    return target


def describe(**changes: Any) -> Callable[[Path], None]:
    """What changes the description of msmodelslim in a folder; None takes an entry away."""

    def change(path: Path) -> None:
        described = json.loads((path / DESCRIPTION).read_text()) | changes
        described = {key: value for key, value in described.items() if value is not None}
        (path / DESCRIPTION).write_text(json.dumps(described))

    return change


def write_tensors(
    path: Path, tensors: dict[str, Tensor], config: dict[str, Any], form: str = "safetensors"
) -> Path:
    """Write a checkpoint with these tensors; returns `path`.

    Args:
        path: created here.
        tensors: by name, written unchanged.
        config: content of config.json.
        form: "safetensors", "sharded", "bin", "sharded bin", or "symlinks" (to files elsewhere).
    """
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    names = list(tensors)
    halves = {"1": names[: len(names) // 2], "2": names[len(names) // 2 :]}
    is_bin = form.endswith("bin")
    suffix, stem = (".bin", "pytorch_model") if is_bin else (".safetensors", "model")
    files = {f"{stem}{suffix}": names}
    if "sharded" in form:
        files = {f"{stem}-0000{i}-of-00002{suffix}": part for i, part in halves.items()}
        where = {name: file for file, part in files.items() for name in part}
        index = path / f"{stem}{suffix}.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for file, part in files.items():
        shard = {name: tensors[name] for name in part}
        if is_bin:
            torch.save(shard, path / file)
        else:
            save_file(shard, path / file, {"format": "pt"})
    if form == "symlinks":
        blobs = path.with_name(f"{path.name} blobs")
        blobs.mkdir()
        for file in files:
            (path / file).rename(blobs / file)
            (path / file).symlink_to(blobs / file)
    return path


def write_large(path: Path, num_layers: int, **keys: Any) -> tuple[Path, int]:
    """A checkpoint of zeros, 25 MB (bf16) per layer; also returns its largest tensor's bytes."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": num_layers}
    sizes |= {"num_attention_heads": 8, "vocab_size": 37}
    config = FAMILY["polyglot-ko-1.3b"] | sizes | keys
    shapes = full_shapes(ModelConfig.from_dict(config))
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    tensors["embed_out.weight"] += torch.arange(37, dtype=torch.bfloat16)[:, None]
    write_tensors(path, tensors, config)
    return path, max(t.numel() * t.element_size() for t in tensors.values())
