# SPDX-License-Identifier: Apache-2.0
"""The part of loading that comes before the weights; `main.py doctor` runs only this part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptneox.config.model import ModelConfig
from gptneox.config.settings import EngineSection
from gptneox.devices.device import Device
from gptneox.engine.detokenizer import load_tokenizer
from gptneox.engine.generation_config import (
    GenerationRules,
    describe_unserved,
    read_generation_config,
)
from gptneox.model import GPTNeoX
from gptneox.parallel import TensorParallelGroup
from gptneox.weights.load import check_memory, check_weights, find_part, size_of


@dataclass(frozen=True)
class Opened:
    """A checkpoint without its weights."""

    path: Path  # the directory of this rank
    config: ModelConfig
    tokenizer: Any  # None if none was requested
    rules: GenerationRules
    dtype: torch.dtype  # compute dtype
    notices: tuple[str, ...]  # for the user


def open_checkpoint(
    model_path: Path,
    device: Device,
    group: TensorParallelGroup,
    *,
    dtype: str = "auto",
    with_tokenizer: bool = True,
    trust_remote_code: bool = False,
    prefer_parts: bool = False,
) -> Opened:
    """Read and check everything but the weights.

    Args:
        model_path: a checkpoint directory, whole or cut.
        device: after `setup`.
        group: the ranks; nothing is sent.
        dtype: a dtype, or "auto" for the one in config.json.
        with_tokenizer: False for requests and answers in token ids only.
        trust_remote_code: see `load_tokenizer`.
        prefer_parts: see `find_part`.

    Raises:
        ValueError, OSError: the files are wrong; see `find_part`, `ModelConfig`,
            `load_tokenizer` and `read_generation_config`; or the device cannot compute in `dtype`.
    """
    path, config = find_part(model_path, group, prefer_parts=prefer_parts)
    tokenizer = None
    if with_tokenizer:
        tokenizer = load_tokenizer(path, config.vocab_size, trust_remote_code=trust_remote_code)
    rules = read_generation_config(path, config.vocab_size)
    torch_dtype, notice = device.resolve_dtype(config.dtype, dtype)
    notices = describe_unserved(rules, with_text=with_tokenizer)
    if notice:
        notices = (*notices, notice)
    return Opened(path, config, tokenizer, rules, torch_dtype, notices)


def check_loading(
    opened: Opened, device: Device, group: TensorParallelGroup, settings: EngineSection
) -> GPTNeoX:
    """Run the checks of `load_model` without reading the weights.

    Returns:
        The model of this rank, empty, with its size.

    Raises:
        ValueError, OSError, RuntimeError: as `GPTNeoX` and `load_model`.
    """
    model = GPTNeoX(opened.config, device, group, settings.max_position_embeddings)
    formats = check_weights(opened.path, opened.config, group.world_size)
    model.size = size_of(model, formats, opened.dtype, settings.kv_cache_dtype)
    check_memory(model.size, device)
    return model
