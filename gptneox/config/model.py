# SPDX-License-Identifier: Apache-2.0
"""The architecture of a checkpoint, as its config.json states it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptneox.config.errors import ConfigError, FileError
from gptneox.config.files import read_json

logger = logging.getLogger(__name__)

KV_QUANT_TYPE = "kv_quant_type"  # key of quantization_config

# Activations that GPT-NeoX checkpoints name (as in transformers' ACT2FN) -> operator.
ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}

ROPE_TYPES = ("default", "linear", "dynamic")

DTYPES = ("float32", "float16", "bfloat16")

# A config.json with larger values is refused as damaged, before anything is allocated.
MAX_LAYERS, MAX_POSITIONS = 4096, 2**22


@dataclass(frozen=True)
class ModelConfig:
    """The architecture as config.json states it, old (4.x) and new (5.x) keys alike.

    Source: transformers GPTNeoXConfig 4.x (`rotary_pct`, `rotary_emb_base`, `rope_scaling`,
    `torch_dtype`) and 5.x (`rope_parameters`, `dtype`). A missing rotary share means 0.25 in both.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_position_embeddings: int
    activation: str = "gelu_erf"
    rotary_dim: int = 24
    rope_theta: float = 10000.0
    rope_factor: float = 1.0
    rope_is_dynamic: bool = False  # beyond the positions, frequencies depend on the length
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    attention_bias: bool = True
    tie_word_embeddings: bool = False
    dtype: str = "float32"
    eos_token_ids: tuple[int, ...] = ()
    quantize: str = ""  # quantization method of the weights; empty: none
    kv_cache_dtype: str = "auto"  # as [engine] kv_cache_dtype, which goes before it
    part_world_size: int = 1  # above 1: the files are one rank's part of a cut checkpoint

    def has_bias(self, linear: str) -> bool:
        """Whether a linear layer has one, by its full name."""
        return ".mlp." in linear or (self.attention_bias and ".attention." in linear)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        c, f = self.hidden_size, self.intermediate_size
        biases = f + c + (4 * c if self.attention_bias else 0)
        per_layer = 4 * c * c + 2 * c * f + biases + 4 * c
        embeddings = self.vocab_size * c * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * per_layer + embeddings + 2 * c

    @property
    def num_decode_parameters(self) -> int:
        """Parameters that a decode step reads: all but the input embedding, of which it gathers."""
        if self.tie_word_embeddings:
            return self.num_parameters
        return self.num_parameters - self.vocab_size * self.hidden_size

    def positions(self, requested: int) -> int:
        """Positions of a run: `requested`, or for 0 max_position_embeddings.

        Raises:
            ConfigError: more than the rotary embedding can give.
        """
        if self.rope_is_dynamic and requested > self.max_position_embeddings:
            raise ConfigError(
                f"{requested} positions are wanted (--max_position_embeddings), but config.json "
                f"says {self.max_position_embeddings} with rope type 'dynamic': beyond that the "
                "frequencies change with the length of each text, which no cache of keys can "
                f"follow; use at most {self.max_position_embeddings}"
            )
        return requested or self.max_position_embeddings

    @classmethod
    def from_pretrained(cls, model_path: Path) -> ModelConfig:
        """Read `model_path/config.json`.

        Raises:
            FileNotFoundError: there is no config.json.
            FileError: it is not JSON, not GPT-NeoX, or a value cannot be served.
        """
        path = model_path / "config.json"
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], origin: str = "config.json") -> ModelConfig:
        """Build from the parsed config.json; `origin` is named in errors."""
        keys = _Keys(raw, origin)
        model_type = raw.get("model_type")
        if model_type != "gpt_neox":
            raise FileError(
                f"{origin}: model_type is {model_type!r}; this toolkit runs 'gpt_neox' only"
            )
        hidden_size = keys.positive_int("hidden_size")
        num_heads = keys.positive_int("num_attention_heads")
        if hidden_size % num_heads:
            raise FileError(
                f"{origin}: hidden_size {hidden_size} is not a multiple of "
                f"num_attention_heads {num_heads}"
            )
        act = raw.get("hidden_act", "gelu")
        if not isinstance(act, str) or act not in ACTIVATIONS:
            raise FileError(
                f"{origin}: hidden_act {act!r} is not known; use one of {', '.join(ACTIVATIONS)}"
            )
        rope = _rope(keys, hidden_size // num_heads)
        return cls(
            vocab_size=keys.positive_int("vocab_size"),
            hidden_size=hidden_size,
            num_layers=keys.positive_int("num_hidden_layers", most=MAX_LAYERS),
            num_heads=num_heads,
            intermediate_size=keys.positive_int("intermediate_size"),
            max_position_embeddings=keys.positive_int(
                "max_position_embeddings", 2048, most=MAX_POSITIONS
            ),
            activation=ACTIVATIONS[act],
            layer_norm_eps=keys.number("layer_norm_eps", 1e-5),
            use_parallel_residual=keys.boolean("use_parallel_residual", True),
            attention_bias=keys.boolean("attention_bias", True),
            tie_word_embeddings=keys.boolean("tie_word_embeddings", False),
            dtype=_file_dtype(raw, origin),
            eos_token_ids=token_ids(raw.get("eos_token_id"), f"{origin}: eos_token_id"),
            quantize=_quantization(raw),
            kv_cache_dtype=_kv_cache_dtype(raw, origin),
            part_world_size=keys.positive_int("world_size", 1),
            **rope,
        )


class _Keys:
    """Typed access to config.json with errors that name the key."""

    def __init__(self, raw: Mapping[str, Any], origin: str) -> None:
        self.raw, self.origin = raw, origin

    def positive_int(self, key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise FileError(f"{self.origin}: key {key!r} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise FileError(
                f"{self.origin}: {key} is {value!r}; an integer from 1 to {most} is expected"
            )
        return value

    def number(self, key: str, default: float) -> float:
        return _number(self.raw.get(key), default, f"{self.origin}: {key}")

    def boolean(self, key: str, default: bool) -> bool:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise FileError(f"{self.origin}: {key} is {value!r}; true or false is expected")
        return value


def _number(value: Any, default: float, what: str) -> float:
    if value is None:
        return default
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= sys.float_info.max:
        raise FileError(f"{what} is {value!r}; a positive, finite number is expected")
    return float(value)


def _rope(keys: _Keys, head_dim: int) -> dict[str, Any]:
    """Rotary settings from either key era; the dictionaries of both may be null."""
    raw, origin = keys.raw, keys.origin
    params = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(params, dict):
        raise FileError(f"{origin}: rope_parameters is {params!r}; an object is expected")
    rope_type = params.get("rope_type", params.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise FileError(
            f"{origin}: rope_type {rope_type!r} is not known; use one of {', '.join(ROPE_TYPES)}"
        )
    share = params.get("partial_rotary_factor", raw.get("rotary_pct"))
    if share is None:
        logger.debug("%s names no rotary share; 0.25, the class default, is used", origin)
    share = _number(share, 0.25, f"{origin}: rotary_pct")
    rotary_dim = int(head_dim * min(share, 1.0))
    if share > 1 or rotary_dim < 2 or rotary_dim % 2:
        raise FileError(
            f"{origin}: rotary_pct {share} of head_dim {head_dim} gives {rotary_dim} rotary "
            "dimensions; an even number from 2 to head_dim is needed"
        )
    theta = params.get("rope_theta", raw.get("rotary_emb_base"))
    if rope_type != "default" and params.get("factor") is None:
        raise FileError(f"{origin}: rope_type {rope_type!r} needs a factor; it is missing")
    factor = _number(params.get("factor"), 1.0, f"{origin}: rope factor")
    return {
        "rotary_dim": rotary_dim,
        "rope_theta": _number(theta, 10000.0, f"{origin}: rotary_emb_base"),
        # "dynamic" changes nothing up to max_position_embeddings, and `positions` allows no more.
        "rope_factor": factor if rope_type == "linear" else 1.0,
        "rope_is_dynamic": rope_type == "dynamic",
    }


def _file_dtype(raw: Mapping[str, Any], origin: str) -> str:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise FileError(f"{origin}: dtype {name!r} is not known; use one of {', '.join(DTYPES)}")
    return name


def _kv_cache_dtype(raw: Mapping[str, Any], origin: str) -> str:
    """What config.json says about the KV cache: "auto", or "int8".

    Source: MindIE, whose checkpoints with an int8 KV cache have `kv_quant_type` C8.
    """
    entry = raw.get("quantization_config")
    value = entry.get(KV_QUANT_TYPE) if isinstance(entry, dict) else None
    if value not in (None, "", "C8"):
        raise FileError(
            f"{origin}: {KV_QUANT_TYPE} is {value!r}, which is not built; C8 (int8) is, or leave "
            "it out"
        )
    return "int8" if value else "auto"


def _quantization(raw: Mapping[str, Any]) -> str:
    """The quantization method that config.json names; "" for none.

    Source: MindIE (`quantize`), transformers (`quantization_config`), compressed-tensors
    (`compression_config`, as it was called first), MLX (`quantization`).
    """
    names = {"compression_config": "compressed-tensors", "quantization": "MLX"}
    for key in ("quantize", "quantization_config", *names):
        entry = raw.get(key)
        if isinstance(entry, dict) and KV_QUANT_TYPE in entry:  # not about weights
            entry = {k: v for k, v in entry.items() if k not in (KV_QUANT_TYPE, "group_size")}
        if isinstance(entry, dict) and entry:
            method = entry.get("quant_method") or entry.get("quant_algo") or names.get(key)
            if not method:  # bitsandbytes named none at first
                is_known = any(str(k).startswith("load_in_") for k in entry)
                method = "bitsandbytes" if is_known else f"by {key}, which names no method"
            return str(method)
        if entry:
            return str(entry)
    return ""


def token_ids(value: Any, what: str) -> tuple[int, ...]:
    """An `eos_token_id` entry (missing, one id or a list of ids) as a tuple."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise FileError(f"{what} is {value!r}; an integer or a list of integers is expected")
    return tuple(ids)
