# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints as other tools write them, from the descriptions of their formats.

Integers are packed one by one, by shifts, so that this has nothing in common with what reads them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from support import checkpoints

LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


@dataclass
class Coded:
    """Integers of a weight: scale[f, g(k)] * (values[f, k] - zero[f, g(k)]), g(k) = groups[k]."""

    values: np.ndarray  # [N, K], 0 to 2^bits - 1
    scale: Tensor  # fp16 [N, G]
    zero: np.ndarray  # [N, G]
    groups: np.ndarray  # [K]
    bits: int

    def floats(self, dtype: torch.dtype = torch.float16) -> Tensor:
        """In fp64, then rounded once."""
        difference = torch.from_numpy(self.values - self.zero[:, self.groups]).double()
        return (difference * self.scale[:, self.groups].double()).to(dtype)


def coded(
    shape: tuple[int, int],
    bits: int = 4,
    group_size: int = 32,
    *,
    symmetric: bool = False,
    shuffled: bool = False,
    seed: int = 0,
) -> Coded:
    """Random integers; all of the range occurs. group_size 0: a scale for each row."""
    rng = np.random.default_rng(seed)
    n, k = shape
    size = group_size or k
    groups = np.arange(k) // size
    if shuffled:
        rng.shuffle(groups)
    num_groups, top = k // size, 1 << bits
    zero = np.full((n, num_groups), top // 2)
    if not symmetric:
        zero = rng.integers(0, top, (n, num_groups))
        zero[0, 0], zero[-1, -1] = 0, top - 1
    scale = torch.from_numpy(rng.uniform(0.5, 1.5, (n, num_groups)) / (top * k**0.5)).half()
    return Coded(rng.integers(0, top, (n, k)), scale, zero, groups, bits)


def pack_words(values: np.ndarray, bits: int, axis: int, order: tuple[int, ...] = ()) -> Tensor:
    """int32 words along `axis`; the value `order[i]` of each word is put at place i."""
    count = 32 // bits
    values = np.moveaxis(values.astype(np.int64), axis, 0)
    assert len(values) % count == 0
    words = np.zeros((len(values) // count, *values.shape[1:]), np.uint32)
    for i in range(count):
        chosen = values[(order[i] if order else i) :: count].astype(np.uint32)
        words |= chosen << np.uint32(bits * i)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words.view(np.int32), 0, axis)))


def gptq(weight: Coded, *, less_one: bool = True) -> dict[str, Tensor]:
    """AutoGPTQ; less_one: v1."""
    zero = (weight.zero - less_one) % (1 << weight.bits)
    return {
        "qweight": pack_words(weight.values.T, weight.bits, 0),
        "qzeros": pack_words(zero.T, weight.bits, 1),
        "scales": weight.scale.T.contiguous(),
        "g_idx": torch.from_numpy(weight.groups.astype(np.int32)),
    }


def awq(weight: Coded) -> dict[str, Tensor]:
    """AutoAWQ, gemm."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": pack_words(weight.values.T, 4, 1, order),
        "qzeros": pack_words(weight.zero.T, 4, 1, order),
        "scales": weight.scale.T.contiguous(),
    }


def packed(weight: Coded, *, symmetric: bool, g_idx: bool = False) -> dict[str, Tensor]:
    """compressed-tensors, pack-quantized."""
    tensors = {
        "weight_packed": pack_words(weight.values, weight.bits, 1),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.values.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack_words(weight.zero, weight.bits, 0)
    if g_idx:
        tensors["weight_g_idx"] = torch.from_numpy(weight.groups.astype(np.int32))
    return tensors


def modelslim(weight: Coded, *, version: bool = True) -> dict[str, Tensor]:
    """msmodelslim, W4A16."""
    signed = weight.values - 8
    if version and weight.scale.shape[1] > 1:
        stored = (signed[0::2] & 15) | (signed[1::2] << 4)  # along N
    elif version:
        stored = (signed[:, 0::2] & 15) | (signed[:, 1::2] << 4)  # along K
    else:
        stored = signed
    return {
        "weight": torch.from_numpy(stored.astype(np.int64)).to(torch.int8),
        "weight_scale": weight.scale.float(),
        "weight_offset": torch.from_numpy(weight.zero - 8).float(),
    }


def bitsandbytes(
    shape: tuple[int, int], kind: str, *, nested: bool, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of bitsandbytes ("nf4", "fp4" or "int8"), and what they stand for, fp32 [N, K]."""
    rng = np.random.default_rng(seed)
    n, k = shape
    if kind == "int8":
        values = rng.integers(-127, 128, (n, k)).astype(np.int8)
        scb = rng.uniform(0.5, 2.0, n).astype(np.float32) / k**0.5
        wide = torch.from_numpy(values.astype(np.float64) * scb.astype(np.float64)[:, None] / 127)
        form = torch.tensor(0, dtype=torch.uint8)
        stored = {"weight": torch.from_numpy(values), "SCB": torch.from_numpy(scb)}
        return stored | {"weight_format": form}, wide.float()
    block, outer = 64, 256
    table = np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
    codes = rng.integers(0, 16, n * k)
    packed = (codes[0::2] << 4 | codes[1::2]).astype(np.uint8)
    count = -(-n * k // block)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "float16"}
    state["shape"] = [n, k]
    stored = {
        "weight": torch.from_numpy(packed).unsqueeze(1),
        "weight.quant_map": torch.from_numpy(table),
    }
    if nested:
        index = rng.integers(0, 256, count).astype(np.uint8)
        inner = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        large = rng.uniform(0.1, 0.3, -(-count // outer)).astype(np.float32) / k**0.5
        offset = float(np.float32(1 / k**0.5))
        absmax = inner[index] * large[np.arange(count) // outer] + np.float32(offset)
        state |= {"nested_blocksize": outer, "nested_offset": offset, "nested_dtype": "float32"}
        stored |= {
            "weight.absmax": torch.from_numpy(index),
            "weight.nested_absmax": torch.from_numpy(large),
            "weight.nested_quant_map": torch.from_numpy(inner),
        }
    else:
        absmax = rng.uniform(0.5, 2.0, count).astype(np.float32) / k**0.5
        stored["weight.absmax"] = torch.from_numpy(absmax)
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    stored[f"weight.quant_state.bitsandbytes__{kind}"] = text
    wide = table[codes] * absmax[np.arange(n * k) // block]
    return stored, torch.from_numpy(wide.astype(np.float32)).view(n, k)


def write(
    directory: Path,
    config: dict[str, Any],
    store: Callable[[Coded], dict[str, Tensor]],
    settings: dict[str, Any],
    dtype: torch.dtype = torch.float16,
    **options: Any,
) -> dict[str, Tensor]:
    """Write a checkpoint whose linear layers, but the head, are `store`d; options: of `coded`.

    Returns:
        The weights that they stand for, in `dtype`, by the names of the layers.
    """
    checkpoints.write_checkpoint(directory, config, dtype=dtype)
    file = directory / "model.safetensors"
    tensors, expected = load_file(file), {}
    for seed, name in enumerate(sorted(n for n in tensors if n.endswith(".weight"))):
        linear = name.removesuffix(".weight")
        if linear.rpartition(".")[2] not in LINEARS:
            continue
        weight = coded(tuple(tensors.pop(name).shape), seed=seed, **options)
        tensors |= {f"{linear}.{part}": value for part, value in store(weight).items()}
        expected[linear] = weight.floats(dtype)
    save_file(tensors, file, {"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return expected


# -- GGUF ----------------------------------------------------------------------------------------

# Name -> number of ggml_type, values and bytes of a block, places of its fp16 numbers.
GGUF_TYPES: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "q4_0": (2, 32, 18, (0,)),
    "q4_1": (3, 32, 20, (0, 2)),
    "q5_0": (6, 32, 22, (0,)),
    "q5_1": (7, 32, 24, (0, 2)),
    "q8_0": (8, 32, 34, (0,)),
    "q4_k": (12, 256, 144, (0, 2)),
    "q5_k": (13, 256, 176, (0, 2)),
    "q6_k": (14, 256, 210, (208,)),
}


def blocks(shape: tuple[int, int], kind: str, seed: int) -> np.ndarray:
    """Random blocks of rows [N, bytes]; every bit pattern of integers occurs."""
    rng = np.random.default_rng(seed)
    n, k = shape
    _, size, num_bytes, halves = GGUF_TYPES[kind]
    data = rng.integers(0, 256, (n * k // size, num_bytes), dtype=np.uint8)
    for at in halves:
        small = 16 if kind.endswith("k") else 1  # these have scales of scales
        scale = rng.uniform(0.5, 1.5, len(data)) / (small * size * k**0.5)
        data[:, at : at + 2] = scale.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return data.reshape(n, -1)


def block_values(data: np.ndarray, kind: str) -> Tensor:
    """What rows of blocks stand for, fp32 [N, K], value by value as ggml's structures define it."""
    _, size, num_bytes, _ = GGUF_TYPES[kind]
    b = data.reshape(-1, num_bytes).astype(np.int64)

    def half(at: int) -> np.ndarray:
        return b[:, at : at + 2].astype(np.uint8).view(np.float16)[:, 0].astype(np.float32)

    def six_bits(j: int) -> tuple[np.ndarray, np.ndarray]:  # get_scale_min_k4
        q = b[:, 4:16]
        if j < 4:
            return q[:, j] & 63, q[:, j + 4] & 63
        scale = q[:, j + 4] & 15 | (q[:, j - 4] >> 6) << 4
        return scale, q[:, j + 4] >> 4 | (q[:, j] >> 6) << 4

    def float32(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32)

    def nibble(at: int, i: int) -> np.ndarray:  # the first half of a block's values is low
        return b[:, at + i % 16] >> 4 * (i // 16) & 15

    def five_bits(at: int, i: int) -> np.ndarray:
        return nibble(at + 4, i) | (b[:, at + i // 8] >> i % 8 & 1) << 4

    def of_eight(start: int, i: int, high: Callable[[int, int], np.ndarray]) -> np.ndarray:
        part, place = i // 32, i % 32
        scale, minimum = six_bits(part)
        q = b[:, start + 32 * (part // 2) + place] >> 4 * (part % 2) & 15 | high(part, place) << 4
        return half(0) * float32(scale) * float32(q) - half(2) * float32(minimum)

    def q6_k(i: int) -> np.ndarray:
        side, rest = divmod(i, 128)
        quarter, place = divmod(rest, 32)
        low = b[:, 64 * side + 32 * (quarter % 2) + place] >> 4 * (quarter // 2) & 15
        high = b[:, 128 + 32 * side + place] >> 2 * quarter & 3
        scale = float32(b[:, 192 + i // 16].astype(np.int8))
        return half(208) * scale * float32((low | high << 4) - 32)

    value = {
        "q4_0": lambda i: half(0) * float32(nibble(2, i) - 8),
        "q4_1": lambda i: half(0) * float32(nibble(4, i)) + half(2),
        "q5_0": lambda i: half(0) * float32(five_bits(2, i) - 16),
        "q5_1": lambda i: half(0) * float32(five_bits(4, i)) + half(2),
        "q8_0": lambda i: half(0) * float32(b[:, 2 + i].astype(np.int8)),
        "q4_k": lambda i: of_eight(16, i, lambda part, place: b[:, 0] * 0),
        "q5_k": lambda i: of_eight(48, i, lambda part, place: b[:, 16 + place] >> part & 1),
        "q6_k": q6_k,
    }[kind]
    columns = np.stack([value(i) for i in range(size)], 1)
    return torch.from_numpy(columns.astype(np.float32)).view(len(data), -1)


_GGUF_NAMES = {
    "embed_in": "token_embd",
    "final_layer_norm": "output_norm",
    "embed_out": "output",
    "input_layernorm": "attn_norm",
    "query_key_value": "attn_qkv",
    "dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "dense_h_to_4h": "ffn_up",
    "dense_4h_to_h": "ffn_down",
}


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _gguf_value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
    return struct.pack("<II", 4, value)


def write_gguf(
    directory: Path, config: dict[str, Any], kinds: Callable[[str], str], **keys: Any
) -> dict[str, Tensor]:
    """Write a checkpoint of one GGUF file, converted as llama.cpp's converter does.

    Args:
        directory: to make.
        config: of the model.
        kinds: from a name such as "attn_qkv" to the type of that weight: "f16" or of `GGUF_TYPES`.
        keys: that the file says instead of what is right; None leaves one out.

    Returns:
        All tensors that it stands for, fp32, by the names of the model.
    """
    checkpoints.write_checkpoint(directory, config)
    source = directory / "model.safetensors"
    tensors, expected = load_file(source), {}
    source.unlink()
    heads = config["num_attention_heads"]
    infos, data = [], b""
    for seed, (name, tensor) in enumerate(sorted(tensors.items())):
        owner, _, part = name.rpartition(".")
        bare = _GGUF_NAMES[owner.rpartition(".")[2]]
        kind = kinds(bare) if tensor.dim() == 2 else "f32"
        shape = tuple(tensor.shape)
        if kind in GGUF_TYPES:
            number = GGUF_TYPES[kind][0]
            rows = blocks((shape[0], shape[1]), kind, seed)
            values = block_values(rows, kind)
            raw = rows
        else:
            number, dtype = {"f32": (0, torch.float32), "f16": (1, torch.float16)}[kind]
            raw, values = tensor.to(dtype).numpy(), tensor.to(dtype).float()
            rows = raw
        if bare == "attn_qkv":  # the rows lie as [Q; K; V] in the file
            by_head = values.view(3, heads, -1, *shape[1:])
            values = by_head.transpose(0, 1).reshape(shape)
        expected[name] = values
        place = f"blk.{owner.split('.')[2]}.{bare}" if ".layers." in owner else bare
        infos.append((f"{place}.{part}", shape, number, len(data)))
        data += raw.tobytes()
        data += bytes(-len(data) % 32)
    described = {
        "general.architecture": "gptneox",
        "general.name": "twin",
        "gptneox.embedding_length": config["hidden_size"],
        "gptneox.block_count": config["num_hidden_layers"],
        "gptneox.feed_forward_length": config["intermediate_size"],
        "gptneox.attention.head_count": heads,
        "gptneox.attention.layer_norm_epsilon": config["layer_norm_eps"],
        "gptneox.use_parallel_residual": config["use_parallel_residual"],
        "tokenizer.ggml.tokens": ["a", "bc"],
    } | {key.replace("__", "."): value for key, value in keys.items()}
    described = {key: value for key, value in described.items() if value is not None}
    out = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(described))
    for key, value in described.items():
        out += _text(key) + _gguf_value(value)
    for place, shape, number, offset in infos:
        dims = tuple(reversed(shape))
        out += _text(place) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, number, offset)
    out += bytes(-len(out) % 32)
    (directory / "model.gguf").write_bytes(out + data)
    return expected
