# SPDX-License-Identifier: Apache-2.0
"""llama.cpp through the low-level calls of llama-cpp-python: one context, one sequence per row.

The next token is the largest logit, found by numpy. Contexts are made per case, before it is timed.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from benchmark.workers.tensors import Array, Tensors, layers, query_key_value
from benchmark.workers.worker import Answer, Load, Worker, serve
from gptneox.config.model import ModelConfig

_FILE = "model.gguf"
_QUANTIZATION = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
}
# Of the matrices of layers. Source: ggml, blocks of 32 values with a scale of 16 bits.
_BLOCKS = {
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
    "Q4_0": gguf.GGMLQuantizationType.Q4_0,
}
_FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}


def _survives(path: bytes, params: Any) -> bool:
    """Whether another process lives through 16 tokens with these parameters of a model.

    Kernels for repacked weights of few bits, as those for AMX of version 0.3.36, use instructions
    that end the process on some machines.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    status = 1
    try:
        model = llama_cpp.llama_model_load_from_file(path, params)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = 256
        context = llama_cpp.llama_init_from_model(model, options)
        tokens = (llama_cpp.llama_token * 16)(*range(16))
        status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, 16))
    finally:
        os._exit(1 if status else 0)


class LlamaCpp(Worker):
    """Weights in the asked dtype; keys and values in float32 or, its default, float16.

    Quantized are the matrices that this toolkit quantizes: embedding and head stay floats.
    """

    packages = ("llama-cpp-python", "gguf")
    model: Any
    context: Any = None

    def convert(self, model: Path, target: Path, dtype: str, weights: str) -> None:
        """See `Worker`."""
        write_gguf(model, target / _FILE, dtype, weights)

    def load(self, load: Load) -> Answer:
        """See `Worker`."""
        assert load.converted is not None, "there is nothing converted"
        llama_cpp.llama_backend_init()
        path = str(load.converted / _FILE).encode()
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = not load.weights or _survives(path, params)
        self.model = llama_cpp.llama_model_load_from_file(path, params)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {path.decode()}")
        self.threads, self.dtype = load.threads, load.dtype
        self.vocab_size = ModelConfig.from_pretrained(load.model).vocab_size
        info = llama_cpp.llama_print_system_info().decode().strip()
        answer: Answer = {"dtype": load.dtype, "about": info}
        if load.weights:
            count, size = gguf.GGML_QUANT_SIZES[_BLOCKS[load.weights]]
            head = 32 if load.dtype == "float32" else 16
            weights = load.weights if params.use_extra_bufts else f"{load.weights}, not repacked"
            answer |= {"weights": weights, "bits": [8 * size / count, head]}
        return answer

    def prepare(self, batch: int, prompt: int, output: int) -> None:
        """A context with room for the case."""
        if self.context:
            llama_cpp.llama_free(self.context)
        params = llama_cpp.llama_context_default_params()
        padded = -(-(prompt + output) // 256) * 256  # what llama.cpp rounds a sequence up to
        params.n_ctx = batch * padded
        params.n_batch = max(2048, batch * prompt)
        params.n_seq_max = batch
        params.n_threads = params.n_threads_batch = self.threads
        params.kv_unified = False
        if self.dtype == "float32":
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp has no room for {batch} x ({prompt} + {output}) tokens")

    def generate(
        self, prompts: list[list[int]], num_new: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """See `Worker`."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        batch = llama_cpp.llama_batch_init(sum(map(len, prompts)), 0, 1)
        try:
            return self._generate(batch, prompts, num_new)
        finally:
            llama_cpp.llama_batch_free(batch)

    def _generate(
        self, batch: Any, prompts: list[list[int]], num_new: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        ends = []
        batch.n_tokens = 0
        for row, prompt in enumerate(prompts):
            for position, token_id in enumerate(prompt):
                _put(batch, token_id, position, row, wanted=position == len(prompt) - 1)
            ends.append(batch.n_tokens - 1)
        token_ids: list[list[int]] = [[] for _ in prompts]
        moments: list[float] = []
        for step in range(num_new):
            if step:
                batch.n_tokens = 0
                for row, prompt in enumerate(prompts):
                    position = len(prompt) + step - 1
                    _put(batch, token_ids[row][-1], position, row, wanted=True)
                ends = list(range(len(prompts)))
            if status := llama_cpp.llama_decode(self.context, batch):
                raise RuntimeError(f"llama_decode ended with status {status}")
            for row, end in enumerate(ends):
                token_ids[row].append(self._largest(end))
            moments.append(time.perf_counter())
        return token_ids, [moments] * len(prompts)

    def _largest(self, index: int) -> int:
        """The token with the largest logit at a position of the batch."""
        logits = llama_cpp.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())


def _put(batch: Any, token_id: int, position: int, row: int, *, wanted: bool) -> None:
    """Append a token; `wanted`: its logits will be read."""
    i = batch.n_tokens
    batch.token[i], batch.pos[i] = token_id, position
    batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
    batch.logits[i] = wanted
    batch.n_tokens = i + 1


# -- conversion ----------------------------------------------------------------------------------


def write_gguf(model: Path, path: Path, dtype: str, weights: str = "") -> None:
    """The checkpoint as GGUF, architecture gptneox, without a vocabulary.

    Matrices are written in `dtype`, those of layers in blocks if `weights` names some; vectors in
    float32; one by one.

    Raises:
        ValueError: something that llama.cpp does not have for this architecture.
    """
    config = ModelConfig.from_pretrained(model)
    if not config.activation.startswith("gelu"):
        raise ValueError(f"llama.cpp runs GPT-NeoX with GELU only, not {config.activation}")
    if not config.attention_bias:
        raise ValueError("llama.cpp runs GPT-NeoX with attention biases only")
    names = _names(config)
    tensors = Tensors(model)
    writer = gguf.GGUFWriter(str(path), "gptneox")
    _write_keys(writer, config, weights or dtype)

    def quantization(name: str) -> Any:
        return _BLOCKS[weights] if weights and name.startswith("blk.") else _QUANTIZATION[dtype]

    for name, source in names.items():
        shape = tensors.shape(source) if source else (config.vocab_size, config.hidden_size)
        writer.add_tensor_info(name, *_layout(shape, quantization(name)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, source in names.items():
        writer.write_tensor_data(_narrow(_read(tensors, source, config), quantization(name)))
    writer.close()


def _write_keys(writer: Any, config: ModelConfig, file_type: str) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_head_count(config.num_heads)
    writer.add_parallel_residual(config.use_parallel_residual)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(_FILE_TYPES[file_type])


def _names(config: ModelConfig) -> dict[str, str]:
    """Name in the GGUF -> name in the checkpoint; "" is the output projection."""
    names = {"token_embd.weight": "gpt_neox.embed_in.weight", "output.weight": ""}
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_qkv": "attention.query_key_value",
        "attn_output": "attention.dense",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
    }
    for kind in ("weight", "bias"):
        names[f"output_norm.{kind}"] = f"gpt_neox.final_layer_norm.{kind}"
        for i, prefix in layers(config):
            names |= {f"blk.{i}.{a}.{kind}": f"{prefix}{b}.{kind}" for a, b in parts.items()}
    return names


def _read(tensors: Tensors, name: str, config: ModelConfig) -> Array:
    if not name:
        return tensors.head()
    x = tensors(name)
    return query_key_value(x, config) if "query_key_value" in name else x


def _layout(
    shape: tuple[int, ...], quantization: Any
) -> tuple[tuple[int, ...], Any, int, Any | None]:
    """Shape, dtype, number of bytes and GGUF type of what `_narrow` makes of such a tensor."""
    count = int(np.prod(shape))
    if len(shape) == 1 or quantization == gguf.GGMLQuantizationType.F32:
        return shape, np.dtype(np.float32), 4 * count, None
    if quantization == gguf.GGMLQuantizationType.F16:
        return shape, np.dtype(np.float16), 2 * count, None
    values, size = gguf.GGML_QUANT_SIZES[quantization]
    row = shape[-1] // values * size
    return (*shape[:-1], row), np.dtype(np.uint8), count // shape[-1] * row, quantization


def _narrow(x: Array, quantization: Any) -> Array:
    """Matrices in the file's dtype (bfloat16 and blocks as bytes); vectors stay float32."""
    if x.ndim == 1 or quantization == gguf.GGMLQuantizationType.F32:
        return x
    narrow: Array = gguf.quantize(x, quantization)
    return narrow


if __name__ == "__main__":
    serve(LlamaCpp())
