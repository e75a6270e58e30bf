# SPDX-License-Identifier: Apache-2.0
"""Logits of the paged engine step by step, random token ids, and the size of an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from gptneox.config.settings import EMBEDDED_CHECKPOINT, EngineSection
from gptneox.devices import create
from gptneox.engine.paged import PagedEngine
from gptneox.engine.scheduler import Scheduled
from gptneox.engine.sequence import SamplingParams, Sequence


@torch.inference_mode()
def paged_logits(engine: PagedEngine, token_ids: list[int], num_prefill: int) -> Tensor:
    """Logits [len(token_ids), V] fp32 of one prefill, followed by one step per token."""
    seq = Sequence.create(0, token_ids, SamplingParams())
    engine.block_manager.allocate(seq, [])
    rows = []
    for num_tokens in [num_prefill] + [1] * (len(token_ids) - num_prefill):
        hidden = engine.runner.step(engine.runner.prepare([Scheduled(seq, num_tokens)]))
        rows.append(engine.model.compute_logits(hidden).float().cpu())
        seq.num_computed_tokens += num_tokens
    engine.block_manager.release(seq)
    return torch.cat(rows)


def random_ids(config: dict[str, Any], num_tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config["vocab_size"], (num_tokens,), generator=generator).tolist()


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


# -- how much a scheme changes answers ------------------------------------------------------------

NUM_OUTLIERS, FACTOR = 3, 100.0


def gate_ids() -> list[int]:
    """A thousand tokens of the embedded checkpoint's language."""
    lines = (EMBEDDED_CHECKPOINT / "eval/boolq/dev.jsonl").read_text("utf-8").splitlines()
    passages = "\n".join(json.loads(line)["passage"] for line in lines[:60])
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_CHECKPOINT)
    ids = tokenizer.encode(passages)[:1024]
    assert len(ids) == 1024
    return ids


def gate_logits(path: Path, ids: list[int]) -> Tensor:
    settings = EngineSection(num_blocks=9)
    engine = PagedEngine.from_pretrained(
        path, settings, create("cpu"), dtype="float32", with_tokenizer=False
    )
    return paged_logits(engine, ids, len(ids)).double()


def divergence(expected: Tensor, actual: Tensor) -> tuple[float, float]:
    """Mean KL(expected || actual) in nats, and how often the likeliest token is the same."""
    p, q = expected.log_softmax(-1), actual.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    return kl, (p.argmax(-1) == q.argmax(-1)).double().mean().item()


def plant_outliers(path: Path) -> None:
    """Make three channels of each normalisation a hundred times as large, in the same function.

    Scale and shift are multiplied, and the columns of the weight behind them divided, in fp32.
    """
    tensors = {n: t.float() for n, t in load_file(path / "model.safetensors").items()}
    config = json.loads((path / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    for layer in range(config["num_hidden_layers"]):
        for norm, linear in (
            ("input_layernorm", "attention.query_key_value"),
            ("post_attention_layernorm", "mlp.dense_h_to_4h"),
        ):
            channels = torch.randperm(config["hidden_size"], generator=generator)[:NUM_OUTLIERS]
            prefix = f"gpt_neox.layers.{layer}."
            for part in ("weight", "bias"):
                tensors[f"{prefix}{norm}.{part}"][channels] *= FACTOR
            tensors[f"{prefix}{linear}.weight"][:, channels] /= FACTOR
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config["torch_dtype"] = config["dtype"] = "float32"
    (path / "config.json").write_text(json.dumps(config))
