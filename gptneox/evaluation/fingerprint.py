# SPDX-License-Identifier: Apache-2.0
"""Which files make a checkpoint the one it is, and a hash of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_NUM_BLOCKS, _BLOCK_BYTES = 64, 1 << 20  # what is read of each large weight file


def model_files(model_path: Path) -> list[Path]:
    """config.json and the weight files: what makes a checkpoint the one it is."""
    patterns = ("config.json", "*.safetensors", "pytorch_model*.bin", "tokenizer*")
    return sorted({path for pattern in patterns for path in model_path.glob(pattern)})


def content_hash(files: Iterable[Path]) -> str:
    """SHA-256 over names, sizes and contents; of large files over blocks spread evenly."""
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
