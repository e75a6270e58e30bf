# SPDX-License-Identifier: Apache-2.0
"""GGUF files of llama.cpp, architecture gptneox.

    header       "GGUF", version, keys with values, and of each tensor name, shape, type and place
    data         rows of blocks; a block is 32 or 256 values of K with scales of its own

The converter sorts the rows of query_key_value into [Q; K; V]; here they are as the model has them,
per head. Blocks lie along K, so this changes no value. What the file does not tell, the activation
and the base of the rotary embedding among it, config.json beside it does.

A linear layer's weight of blocks becomes a tensor of bytes that is called by the type, such as
"….attention.dense.q4_k" [N, bytes of a row]; everything else becomes floats. Q4_0 is computed with
as it is, other types are widened when they are loaded.

Source: ggml, docs/gguf.md, ggml-common.h and ggml-quants.c; llama.cpp, convert_hf_to_gguf.py.
"""

from __future__ import annotations

import logging
import math
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptneox.config.files import read_json
from gptneox.devices.operators import LinearWeight
from gptneox.weights.files import CheckpointError, TensorInfo, WeightFile
from gptneox.weights.formats import (
    INPUTS,
    FloatWeight,
    Formats,
    StoredTensor,
    WeightFormat,
)
from gptneox.weights.groups import Int4Weight, pack
from gptneox.weights.readers.stored import Reader, Stored

logger = logging.getLogger(__name__)

ARCHITECTURE = "gptneox"
_OLD_MAGICS = {b"lmgg", b"fmgg", b"tjgg", b"algg"}  # files of before 2023-08
_MAX_HEADER_BYTES = 256 << 20

# -- blocks --------------------------------------------------------------------------------------


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at a byte of each block [B, bytes], as fp32 [B, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """Bytes [B, n] to [B, 2n]: all low halves, then all high ones."""
    return torch.cat((packed & 15, packed >> 4), 1)


def _bits(words: Tensor) -> Tensor:
    """The 32 bits of four bytes [B, 4], lowest first: [B, 32]."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return (words.unsqueeze(2) >> shifts & 1).flatten(1)


def _q4_0(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b[:, 2:]).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b, 0) * _nibbles(b[:, 4:]).float() + _half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    return _half(b, 0) * ((_nibbles(b[:, 6:]) | _bits(b[:, 2:6]) << 4).float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b[:, 8:]) | _bits(b[:, 4:8]) << 4).float() + _half(b, 2)


def _q8_0(b: Tensor) -> Tensor:
    return _half(b, 0) * b[:, 2:].contiguous().view(torch.int8).float()


def _scales_of_eight(b: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima, six bits each, of the 8 parts of a block; [B, 8, 1], multiplied."""
    packed = b[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), 1)
    minima = torch.cat((second & 63, third >> 4 | second >> 6 << 4), 1)
    return (
        (_half(b, 0) * scales.float()).unsqueeze(2),
        (_half(b, 2) * minima.float()).unsqueeze(2),
    )


def _q4_k(b: Tensor) -> Tensor:
    scale, minimum = _scales_of_eight(b)
    halves = b[:, 16:].reshape(-1, 4, 1, 32)  # 32 bytes hold two parts
    values = torch.cat((halves & 15, halves >> 4), 2).flatten(1, 2)  # [B, 8, 32]
    return (scale * values.float() - minimum).flatten(1)


def _q5_k(b: Tensor) -> Tensor:
    scale, minimum = _scales_of_eight(b)
    halves = b[:, 48:].reshape(-1, 4, 1, 32)
    values = torch.cat((halves & 15, halves >> 4), 2).flatten(1, 2)
    shifts = torch.arange(8, dtype=torch.uint8).view(8, 1)
    high = b[:, 16:48].unsqueeze(1) >> shifts & 1  # [B, 8, 32]
    return (scale * (values | high << 4).float() - minimum).flatten(1)


def _q6_k(b: Tensor) -> Tensor:
    low, high = b[:, :128].reshape(-1, 2, 1, 64), b[:, 128:192].reshape(-1, 2, 1, 32)
    low = torch.cat((low & 15, low >> 4), 2).view(-1, 2, 4, 32)
    high = high >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1) & 3
    values = (low | high << 4).float() - 32
    scales = b[:, 192:208].contiguous().view(torch.int8).float()
    scale = (_half(b, 208) * scales).unsqueeze(2)  # [B, 16, 1]
    return (scale * values.view(-1, 16, 16)).flatten(1)


class BlockType(NamedTuple):
    """A type of blocks."""

    name: str
    size: int  # values of a block
    num_bytes: int
    dequantize: Callable[[Tensor], Tensor]  # uint8 [B, bytes] to fp32 [B, size]

    def rows(self, data: Tensor) -> Tensor:
        """The rows of data, uint8 [N, bytes of a row], as fp32 [N, K]."""
        return self.dequantize(data.reshape(-1, self.num_bytes)).view(len(data), -1)


# By the numbers of ggml_type.
BLOCK_TYPES = {
    2: BlockType("q4_0", 32, 18, _q4_0),
    3: BlockType("q4_1", 32, 20, _q4_1),
    6: BlockType("q5_0", 32, 22, _q5_0),
    7: BlockType("q5_1", 32, 24, _q5_1),
    8: BlockType("q8_0", 32, 34, _q8_0),
    12: BlockType("q4_k", 256, 144, _q4_k),
    13: BlockType("q5_k", 256, 176, _q5_k),
    14: BlockType("q6_k", 256, 210, _q6_k),
}
FLOAT_TYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}


class GgufFormat(WeightFormat):
    """Rows of blocks of one type."""

    def __init__(self, block: BlockType) -> None:
        self.block, self.scheme = block, block.name
        self.tensors = (StoredTensor(block.name, (0, 1), (torch.uint8,)),)

    def shapes(self, num_outputs: int, num_inputs: int) -> dict[str, tuple[int, ...]]:
        """[N, bytes of a row].

        Raises:
            ValueError: blocks do not divide the inputs.
        """
        count, rest = divmod(num_inputs, self.block.size)
        if rest:
            raise ValueError(f"{num_inputs} inputs in blocks of {self.block.size}")
        return {self.block.name: (num_outputs, count * self.block.num_bytes)}

    def num_bytes(self, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> int:
        """Of Q4_0 half a byte for each value and five for each block, else floats."""
        values = num_outputs * num_inputs
        if self.block.name == "q4_0":
            return values // 2 + 5 * (values // 32)
        return values * dtype.itemsize

    def why_not_cut(self, axis: int, num_outputs: int, num_inputs: int, world_size: int) -> str:
        """See `WeightFormat`."""
        size = num_inputs / world_size
        if axis == INPUTS and size % self.block.size:
            return f"its inputs are in blocks of {self.block.size}, and {size:g} fall to each rank"
        return ""

    def load(
        self, stored: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> LinearWeight:
        """See `WeightFormat`."""
        data = stored[self.block.name]
        if self.block.name != "q4_0":
            wide = self.block.rows(data)
            if not torch.isfinite(wide).all():
                raise ValueError(f"{self.block.name} holds values that are not finite")
            return FloatWeight(wide.to(device=device, dtype=dtype))
        blocks = data.reshape(len(data), -1, self.block.num_bytes)
        scale = blocks[:, :, :2].contiguous().view(torch.float16)[:, :, 0].float()
        if not torch.isfinite(scale).all():
            raise ValueError("q4_0 holds scales that are not finite")
        values = torch.cat((blocks[:, :, 2:] & 15, blocks[:, :, 2:] >> 4), 2).flatten(1)
        zero = torch.full(scale.shape, 8, dtype=torch.uint8, device=device)
        pairs = pack(values, 4, 1, torch.uint8)
        return Int4Weight(pairs.to(device), scale.to(device), zero, dtype)


_FORMATS = {block.name: GgufFormat(block) for block in BLOCK_TYPES.values()}


class GgufReader(Reader):
    """Serves the types above, mixed with floats."""

    def describes(self, stored: Stored) -> bool:
        """By the names that `GgufFile` gives, which parts of a cut keep."""
        return any(name.rpartition(".")[2] in _FORMATS for name in stored.names)

    def formats(self, stored: Stored) -> Formats:
        """See `Reader`."""
        formats = dict(stored.formats)
        for name in stored.names:
            linear, _, suffix = name.rpartition(".")
            if suffix in _FORMATS and linear in formats:
                formats[linear] = _FORMATS[suffix]
        widened = sorted({f.scheme for f in formats.values() if f.scheme} - {"q4_0"})
        if widened:
            logger.info("%s: %s are computed with as floats", stored.path, ", ".join(widened))
        return formats


# -- the file ------------------------------------------------------------------------------------

_NAMES = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_LINEAR = ("attn_qkv", "attn_output", "ffn_up", "ffn_down", "output")
# Key of the file, behind the architecture's name -> that of config.json.
_KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "use_parallel_residual": "use_parallel_residual",
}


class _Entry(NamedTuple):
    """A tensor: where its rows are, and what they become."""

    kind: int  # ggml_type
    shape: tuple[int, ...]
    offset: int  # in the file
    is_blocks: bool  # it stays bytes
    is_qkv: bool

    @property
    def row_bytes(self) -> int:
        """Of a row, or of all of a vector."""
        return _row_bytes(self.kind, self.shape[-1])


def _row_bytes(kind: int, width: int) -> int:
    if kind in FLOAT_TYPES:
        return width * FLOAT_TYPES[kind].itemsize
    return width // BLOCK_TYPES[kind].size * BLOCK_TYPES[kind].num_bytes


# Type of a value -> its form in `struct`.
_FORMS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}


class _Cursor:
    """Reads the numbers of a header one after another."""

    STRING, ARRAY = 8, 9

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return value

    def text(self) -> str:
        length = self.number("Q")
        if length > len(self.data) - self.at:
            raise ValueError(f"a text of {length} bytes")
        self.at += length
        return bytes(self.data[self.at - length : self.at]).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == self.STRING:
            return self.text()
        if kind == self.ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner not in (self.STRING, self.ARRAY):
                self.at += count * struct.calcsize(f"<{_FORMS[inner]}")
                return None  # of no use here: the tokenizer's
            for _ in range(count):
                self.value(inner)
            return None
        return self.number(_FORMS[kind])


class GgufFile(WeightFile):
    """`*.gguf`, mapped; tensors have the names and the order of rows that the model knows."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._entries: dict[str, _Entry] | None = None
        self._num_heads = 0

    def tensors(self) -> dict[str, TensorInfo]:
        """From the header.

        Raises:
            CheckpointError: the file is damaged, of another architecture or kind, or does not fit
                config.json.
        """
        if self._entries is None:
            self._entries = self._read_header()
        return {name: TensorInfo(*self._info(entry)) for name, entry in self._entries.items()}

    @staticmethod
    def _info(entry: _Entry) -> tuple[tuple[int, ...], torch.dtype]:
        if entry.is_blocks:
            return (*entry.shape[:-1], entry.row_bytes), torch.uint8
        return entry.shape, FLOAT_TYPES.get(entry.kind, torch.float32)

    def _open(self) -> Tensor:
        size = self.path.stat().st_size
        try:
            return torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            raise self.damage(error) from error

    def _slice(self, handle: Tensor, name: str, index: tuple[slice, ...]) -> Tensor:
        assert self._entries is not None
        entry = self._entries[name]
        num_rows = math.prod(entry.shape[:-1])
        data = handle[entry.offset : entry.offset + num_rows * entry.row_bytes]
        if entry.is_qkv:
            # [3, H, D] rows to [H, 3, D]
            rows = data.view(3, self._num_heads, -1)
            data = rows.transpose(0, 1).reshape(-1)
        shape, dtype = self._info(entry)
        if entry.kind in BLOCK_TYPES and not entry.is_blocks:
            data = BLOCK_TYPES[entry.kind].rows(data.view(num_rows, -1)).view(-1)
        elif entry.offset % 8 or entry.is_blocks:
            data = data.clone()
        value = data.view(dtype).view(shape)
        return value[index] if index else value

    def _read_header(self) -> dict[str, _Entry]:
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            data = memoryview(file.read(min(size, _MAX_HEADER_BYTES)))
        magic = bytes(data[:4])
        if magic in _OLD_MAGICS:
            raise CheckpointError(
                f"{self.path} is a file of ggml from before GGUF, which is not served; convert the "
                "original checkpoint"
            )
        try:
            if magic != b"GGUF":
                raise ValueError(f"it begins with {magic!r}, not with GGUF")
            cursor = _Cursor(data[4:])
            version = cursor.number("I")
            if version not in (2, 3):
                raise ValueError(f"version {version}; 2 and 3 are known")
            num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
            keys = {}
            for _ in range(num_keys):
                key = cursor.text()
                keys[key] = cursor.value(cursor.number("I"))
            infos = []
            for _ in range(num_tensors):
                name, num_dims = cursor.text(), cursor.number("I")
                dims = [cursor.number("Q") for _ in range(num_dims)]
                infos.append((name, tuple(reversed(dims)), cursor.number("I"), cursor.number("Q")))
            alignment = keys.get("general.alignment", 32)
            start = -(-(cursor.at + 4) // alignment) * alignment
        except (ValueError, KeyError, struct.error, ZeroDivisionError, TypeError) as error:
            raise self.damage(error) from error
        self._check_keys(keys)
        self._num_heads = keys.get(f"{ARCHITECTURE}.attention.head_count", 0)
        entries = {}
        for name, shape, kind, offset in infos:
            new, entry = self._entry(name, shape, kind, start + offset)
            if entry.offset + math.prod(shape[:-1]) * entry.row_bytes > size:
                raise CheckpointError(
                    f"{self.path} ends before its tensor {name}; download it again"
                )
            entries[new] = entry
        return entries

    def _entry(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int
    ) -> tuple[str, _Entry]:
        """The name that the model knows a tensor by, and what it is.

        Raises:
            CheckpointError: neither is known.
        """
        owner, _, part = name.rpartition(".")
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", owner)
        last = match[2] if match else owner
        known = _LAYER_NAMES.get(last) if match else _NAMES.get(last)
        if known is None or part not in ("weight", "bias"):
            raise CheckpointError(
                f"{self.path} holds {name}, which no part of a GPT-NeoX model is called"
            )
        if kind not in FLOAT_TYPES and kind not in BLOCK_TYPES:
            types = ", ".join(block.name.upper() for block in BLOCK_TYPES.values())
            raise CheckpointError(
                f"{self.path}: {name} is of the ggml type {kind}, which is not served; F32, F16, "
                f"BF16, {types} are"
            )
        if kind in BLOCK_TYPES and shape[-1] % BLOCK_TYPES[kind].size:
            raise CheckpointError(
                f"{self.path}: {name} {list(shape)} is {BLOCK_TYPES[kind].name.upper()}, whose "
                f"blocks of {BLOCK_TYPES[kind].size} do not divide its rows"
            )
        full = f"gpt_neox.layers.{match[1]}.{known}" if match else known
        is_blocks = kind in BLOCK_TYPES and last in _LINEAR and part == "weight"
        suffix = BLOCK_TYPES[kind].name if is_blocks else part
        return f"{full}.{suffix}", _Entry(kind, shape, offset, is_blocks, last == "attn_qkv")

    def _check_keys(self, keys: Mapping[str, Any]) -> None:
        """Raise CheckpointError unless the file is whole, of this family and fits config.json."""
        if (found := keys.get("general.architecture")) != ARCHITECTURE:
            raise CheckpointError(
                f"{self.path} is of the architecture {found!r}; {ARCHITECTURE} is expected"
            )
        if (count := keys.get("split.count", 1)) > 1:
            raise CheckpointError(
                f"{self.path} is one of {count} pieces; merge them with llama-gguf-split --merge"
            )
        config_path = self.path.parent / "config.json"
        if not config_path.is_file():
            raise CheckpointError(
                f"{self.path} needs a config.json beside it, as it does not tell the model's "
                "activation; take the one of the original checkpoint"
            )
        config = read_json(config_path)
        for key, name in _KEYS.items():
            value, expected = keys.get(f"{ARCHITECTURE}.{key}"), config.get(name)
            if not isinstance(value, int | float) or not isinstance(expected, int | float):
                continue
            if not math.isclose(value, expected, rel_tol=1e-6):
                raise CheckpointError(
                    f"{self.path} says {key} is {value}, but {config_path} says {name} is "
                    f"{expected}; one of them belongs to another model"
                )


READER = GgufReader()
