# SPDX-License-Identifier: Apache-2.0
"""How large a model is: the shapes of its tensors, and its bytes on one rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from gptneox.config.errors import one_of
from gptneox.config.model import ModelConfig
from gptneox.devices.cache import KV_FORMATS, KVFormat
from gptneox.weights.formats import (
    FLOAT,
    Formats,
    cut_dimension,
    part_shape,
    scheme_of,
    shares_inputs,
    split_name,
)

PREFIX = "gpt_neox."
EMBEDDING_NAME = "gpt_neox.embed_in.weight"
HEAD_NAME = "embed_out.weight"


def full_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an uncut floating-point checkpoint."""
    c, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING_NAME: (v, c)}
    for i in range(config.num_layers):
        layer = f"{PREFIX}layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = shapes[f"{layer}.{norm}.bias"] = (c,)
        for linear, out_in in (
            ("attention.query_key_value", (3 * c, c)),
            ("attention.dense", (c, c)),
            ("mlp.dense_h_to_4h", (f, c)),
            ("mlp.dense_4h_to_h", (c, f)),
        ):
            shapes[f"{layer}.{linear}.weight"] = out_in
            if config.attention_bias or linear.startswith("mlp"):
                shapes[f"{layer}.{linear}.bias"] = out_in[:1]
    shapes["gpt_neox.final_layer_norm.weight"] = shapes["gpt_neox.final_layer_norm.bias"] = (c,)
    shapes[HEAD_NAME] = (v, c)
    return shapes


def stored_shapes(config: ModelConfig, formats: Formats) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an uncut checkpoint whose linear layers have `formats`.

    Raises:
        ValueError: a format does not serve a weight of this shape.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in full_shapes(config).items():
        owner, suffix = split_name(name)
        if suffix == "weight" and owner in formats:
            try:
                stored = formats[owner].shapes(*shape)
            except ValueError as error:
                raise ValueError(f"{owner}: {error}") from error
            shapes |= {f"{owner}.{part}": size for part, size in stored.items()}
        elif not (suffix == "bias" and owner in formats and formats[owner].has_bias):
            shapes[name] = shape
    return shapes


def find_kv_format(requested: str, config: ModelConfig, dtype: torch.dtype) -> KVFormat:
    """The format of [engine] kv_cache_dtype for a model that computes in `dtype`.

    Raises:
        ConfigError: there is no such format.
    """
    one_of("engine", "kv_cache_dtype", requested, tuple(KV_FORMATS))
    name = config.kv_cache_dtype if requested == "auto" else requested
    return KV_FORMATS[name](dtype)


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a model: of its weights, of a cached token, of what a decode step reads.

    Linear layers that `formats` does not name have floating-point weights.
    """

    config: ModelConfig
    dtype: torch.dtype  # to compute in
    kv_format: KVFormat
    world_size: int = 1
    formats: Formats = field(default_factory=dict)

    @property
    def scheme(self) -> str:
        """How the weights are quantized, such as "w8a16"; "" for float ones."""
        return scheme_of(self.formats)

    @property
    def weight_bytes(self) -> int:
        """The weights of one rank as they are loaded, its share of the vocabulary padded."""
        return sum(size for _, size in self._tensors(self.world_size))

    @property
    def decode_weight_bytes(self) -> float:
        """What one rank reads of the weights in a decode step: an even share of all of them.

        Of the input embedding a few rows are gathered, which do not count.
        """
        whole = sum(size for name, size in self._tensors(1) if name != EMBEDDING_NAME)
        return whole / self.world_size

    @property
    def token_bytes(self) -> int:
        """What the cache holds of one token on one rank, over all layers."""
        num_heads = self.config.num_heads // self.world_size
        per_layer = self.kv_format.bytes_per_token(num_heads, self.config.head_dim)
        return self.config.num_layers * per_layer

    def decode_bytes(self, batch_size: float, context_len: float) -> float:
        """What one rank reads in a decode step of B rows: its weights and B * S cached tokens."""
        return self.decode_weight_bytes + batch_size * context_len * self.token_bytes

    def _tensors(self, world_size: int) -> Iterator[tuple[str, int]]:
        """Name and bytes of every tensor of one rank of `world_size`."""
        for name, whole in full_shapes(self.config).items():
            owner, suffix = split_name(name)
            shape = part_shape(cut_dimension(name, whole, {}, world_size), whole, world_size)
            if suffix == "weight" and len(shape) == 2 and name != EMBEDDING_NAME:
                stored = self.formats.get(owner, FLOAT)
                part = stored.of_part(0, world_size if shares_inputs(owner) else 1)
                yield name, part.num_bytes(*shape, self.dtype)
            else:
                yield name, math.prod(shape) * self.dtype.itemsize
