# SPDX-License-Identifier: Apache-2.0
"""The checkpoint to measure: a directory of the user's, or random weights of a known shape."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark import seal
from benchmark.errors import UsageError
from gptneox.config.model import ModelConfig

if TYPE_CHECKING:
    from gptneox.weights.formats import Formats

SEED = 0
# Of vectors and of the embedding. Matrices have 1 / sqrt(inputs): activations keep their size
# through any number of layers, and attention is sharp enough for a wrong conversion to show.
VECTOR_STD = 0.02
MAX_SHARD_BYTES = 4 << 30
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    """Sizes of a published model, under the names of config.json."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int = 50304
    hidden_act: str = "gelu"
    max_position_embeddings: int = 2048

    def config(self, dtype: str) -> dict[str, Any]:
        """config.json, with the keys that the published checkpoints have."""
        return {
            "architectures": ["GPTNeoXForCausalLM"],
            "bos_token_id": 0,
            "eos_token_id": 0,
            "hidden_act": self.hidden_act,
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": 4 * self.hidden_size,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": "gpt_neox",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "rotary_emb_base": 10000,
            "rotary_pct": 0.25,
            "tie_word_embeddings": False,
            "torch_dtype": dtype,
            "use_cache": True,
            "use_parallel_residual": True,
            "vocab_size": self.vocab_size,
        }


# Source: config.json of EleutherAI/pythia-* and EleutherAI/gpt-neox-20b.
SHAPES = {
    "pythia-14m": Shape(6, 128, 4),
    "pythia-70m": Shape(6, 512, 8),
    "pythia-160m": Shape(12, 768, 12),
    "pythia-410m": Shape(24, 1024, 16),
    "pythia-1b": Shape(16, 2048, 8),
    "pythia-1.4b": Shape(24, 2048, 16),
    "pythia-2.8b": Shape(32, 2560, 32),
    "pythia-6.9b": Shape(32, 4096, 32, vocab_size=50432),
    "pythia-12b": Shape(36, 5120, 40, vocab_size=50688),
    "neox-20b": Shape(44, 6144, 64, vocab_size=50432, hidden_act="gelu_fast"),
}


@dataclass(frozen=True)
class Model:
    """A checkpoint to measure."""

    name: str
    path: Path
    config: ModelConfig
    identity: dict[str, Any]  # a converted copy is out of date when this changes

    @functools.cached_property
    def formats(self) -> Formats:
        """Of its linear layers, float or quantized."""
        from gptneox.weights.load import check_weights

        return check_weights(self.path, self.config)

    @property
    def key(self) -> str:
        """Names the folder of its conversions."""
        text = json.dumps(self.identity, sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def open_model(name: str, dtype: str, cache: Path, say: Callable[[str], None]) -> Model:
    """The model called `name`: one of `SHAPES`, made in `cache` if need be, else a directory.

    Raises:
        UsageError: it is neither.
        RuntimeError: no room to make it.
        ValueError: the directory's config.json cannot be run.
    """
    if shape := SHAPES.get(name):
        path = make_checkpoint(cache / "models" / f"{name}-{dtype}", shape, dtype, say)
        return Model(name, path, ModelConfig.from_pretrained(path), _recipe(shape, dtype))
    path = Path(name).expanduser().resolve()
    if not path.is_dir():
        raise UsageError(
            f"--model {name!r} is neither a directory nor one of {', '.join(SHAPES)}; give the "
            "directory of a checkpoint, or one of these names"
        )
    config = ModelConfig.from_pretrained(path)
    files = {
        file.name: [file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(path.iterdir())
        if file.suffix in (".safetensors", ".bin", ".json")
    }
    return Model(path.name, path, config, {"path": str(path), "files": files})


def _recipe(shape: Shape, dtype: str) -> dict[str, Any]:
    return {"format": 2, "seed": SEED, "vector_std": VECTOR_STD, "config": shape.config(dtype)}


def make_checkpoint(folder: Path, shape: Shape, dtype: str, say: Callable[[str], None]) -> Path:
    """Random weights as a Hugging Face directory: config.json and safetensors.

    Raises:
        RuntimeError: the disk has no room for it.
    """
    config = ModelConfig.from_dict(shape.config(dtype))
    num_bytes = config.num_parameters * _ITEM_BYTES[dtype]

    def build(target: Path) -> None:
        free = shutil.disk_usage(target).free
        if num_bytes > free:
            raise RuntimeError(
                f"{target} needs {num_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; "
                "make room, or choose another --cache"
            )
        say(f"making random weights, {num_bytes / 2**30:.2f} GiB, in {target}")
        _write_weights(target, config, dtype)
        text = json.dumps(shape.config(dtype), indent=2) + "\n"
        (target / "config.json").write_text(text, encoding="utf-8")

    return seal.make(folder, _recipe(shape, dtype), build, say)


def _write_weights(target: Path, config: ModelConfig, dtype_name: str) -> None:
    """One file, or shards with an index; a tensor's values depend on the seed and its place only.

    torch uses one thread here, because its threads would keep spinning during the measurement.
    """
    import torch

    from gptneox.weights.results import SafetensorsWriter
    from gptneox.weights.size import full_shapes

    dtype = getattr(torch, dtype_name)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    shards: list[dict[str, tuple[Any, tuple[int, ...]]]] = [{}]
    room = MAX_SHARD_BYTES
    for name, shape in full_shapes(config).items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = MAX_SHARD_BYTES
        shards[-1][name] = dtype, shape
        room -= size
    weight_map = {}
    for i, tensors in enumerate(shards):
        file_name = "model.safetensors"
        if len(shards) > 1:
            file_name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        writer = SafetensorsWriter(target / file_name, tensors, {"format": "pt"})
        for name, (_, shape) in tensors.items():
            is_matrix = len(shape) == 2 and "embed_in" not in name
            std = shape[1] ** -0.5 if is_matrix else VECTOR_STD
            x = torch.empty(shape).normal_(0, std, generator=generator)
            if name.endswith("norm.weight"):
                x += 1
            writer.write(name, x.to(dtype))
            weight_map[name] = file_name
        writer.close()
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        path = target / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
