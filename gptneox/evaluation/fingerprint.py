# SPDX-License-Identifier: Apache-2.0
"""The files that identify a checkpoint, and a hash of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_NUM_BLOCKS, _BLOCK_BYTES = 64, 1 << 20  # sampled from each large weight file


def model_files(model_path: Path) -> list[Path]:
    """config.json, the weight files and the tokenizer files."""
    patterns = ("config.json", "*.safetensors", "pytorch_model*.bin", "tokenizer*")
    return sorted({path for pattern in patterns for path in model_path.glob(pattern)})


def content_hash(files: Iterable[Path]) -> str:
    """SHA-256 over names, sizes and contents; large files are sampled in evenly spread blocks."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= _NUM_BLOCKS * _BLOCK_BYTES:
                digest.update(file.read())
                continue
            for i in range(_NUM_BLOCKS):
                file.seek(i * (size - _BLOCK_BYTES) // (_NUM_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()
