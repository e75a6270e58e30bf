# SPDX-License-Identifier: Apache-2.0
"""CTranslate2: greedy search over the whole batch, with the width it has nearest to the asked one.

Its converter for GPT-NeoX reads attributes that transformers 5 no longer has, so the model
specification is filled here, straight from the checkpoint's files.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ctranslate2
from ctranslate2.specs import common_spec, transformer_spec

from benchmark.workers.tensors import Tensors, layers, query_key_value
from benchmark.workers.worker import Answer, Load, Worker, serve
from gptneox.config.model import ModelConfig

_ACTIVATIONS = {
    "gelu_erf": common_spec.Activation.GELU,
    "gelu_tanh": common_spec.Activation.GELUTanh,
    "silu": common_spec.Activation.SWISH,
    "relu": common_spec.Activation.RELU,
}


class CTranslate2(Worker):
    """A Generator with one stream and all threads."""

    packages = ("ctranslate2",)
    generator: Any

    def convert(self, model: Path, target: Path, dtype: str, weights: str) -> None:
        """See `Worker`; float weights are narrowed, where that is possible, at loading."""
        config = ModelConfig.from_pretrained(model)
        spec = _specification(config, Tensors(model))
        spec.register_vocabulary([str(i) for i in range(config.vocab_size)])
        for name in ("unk_token", "bos_token", "eos_token"):
            setattr(spec.config, name, "0")
        spec.validate()
        if weights:
            spec.optimize(quantization=weights)
        spec.save(str(target))

    def load(self, load: Load) -> Answer:
        """See `Worker`."""
        supported = ctranslate2.get_supported_compute_types(load.device)
        dtype = load.weights or (load.dtype if load.dtype in supported else "float32")
        self.generator = ctranslate2.Generator(
            str(load.converted),
            device=load.device,
            compute_type=dtype,
            inter_threads=1,
            intra_threads=load.threads,
        )
        found = self.generator.compute_type
        if not load.weights:
            return {"dtype": found}
        if not found.startswith(load.weights):
            raise RuntimeError(f"CTranslate2 computes in {found}, not in {load.weights}")
        dtype = found.removeprefix(load.weights).removeprefix("_") or "float32"
        # Its head has eight bits, too. The scales of rows do not count.
        return {"dtype": dtype, "weights": load.weights, "bits": [8, 8]}

    def generate(
        self, prompts: list[list[int]], num_new: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """See `Worker`."""
        moments: list[list[float]] = [[] for _ in prompts]

        def note(result: Any) -> bool:
            moments[result.batch_id].append(time.perf_counter())
            return False

        results = self.generator.generate_batch(
            [[str(token_id) for token_id in prompt] for prompt in prompts],
            max_batch_size=0,
            beam_size=1,
            sampling_topk=1,
            max_length=num_new,
            min_length=num_new,
            include_prompt_in_result=False,
            callback=note,
        )
        return [list(result.sequences_ids[0]) for result in results], moments


def _specification(config: ModelConfig, tensors: Tensors) -> Any:
    """The checkpoint as CTranslate2 describes a decoder."""
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        config.num_layers,
        config.num_heads,
        pre_norm=True,
        activation=_ACTIVATIONS[config.activation],
        rotary_dim=config.rotary_dim,
        rotary_interleave=False,
        rotary_base=config.rope_theta,
        parallel_residual=config.use_parallel_residual,
        shared_layer_norm=False,
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = tensors("gpt_neox.embed_in.weight")
    _norm(decoder.layer_norm, tensors, "gpt_neox.final_layer_norm")
    decoder.projection.weight = tensors.head()
    for i, prefix in layers(config):
        layer = decoder.layer[i]
        attention, ffn = layer.self_attention, layer.ffn
        if config.use_parallel_residual:
            norms = layer.input_layer_norm, layer.post_attention_layer_norm
        else:
            norms = attention.layer_norm, ffn.layer_norm
        _norm(norms[0], tensors, prefix + "input_layernorm")
        _norm(norms[1], tensors, prefix + "post_attention_layernorm")
        qkv, dense = attention.linear
        name = prefix + "attention.query_key_value"
        qkv.weight = query_key_value(tensors(name + ".weight"), config)
        if config.attention_bias:
            qkv.bias = query_key_value(tensors(name + ".bias"), config)
        _linear(dense, tensors, prefix + "attention.dense", has_bias=config.attention_bias)
        _linear(ffn.linear_0, tensors, prefix + "mlp.dense_h_to_4h")
        _linear(ffn.linear_1, tensors, prefix + "mlp.dense_4h_to_h")
    return spec


def _norm(spec: Any, tensors: Tensors, name: str) -> None:
    spec.gamma, spec.beta = tensors(name + ".weight"), tensors(name + ".bias")


def _linear(spec: Any, tensors: Tensors, name: str, *, has_bias: bool = True) -> None:
    spec.weight = tensors(name + ".weight")
    if has_bias:
        spec.bias = tensors(name + ".bias")


if __name__ == "__main__":
    serve(CTranslate2())
