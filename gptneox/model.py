# SPDX-License-Identifier: Apache-2.0
"""The GPT-NeoX decoder, once, for every checkpoint, device and attention path.

Shapes: T tokens in the step (ragged sequences, concatenated), H heads on this rank, D head_dim,
C hidden size, F MLP width on this rank, V vocabulary. Module names are those of the checkpoints,
so a state dict loads without a map.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn

from gptneox.config.model import ModelConfig
from gptneox.devices.device import Device
from gptneox.devices.operators import LayerWeights, Operators, PackedLayer
from gptneox.devices.step import RotaryTables, Step
from gptneox.layers import (
    Embedding,
    LayerNorm,
    Linear,
    PackingUnit,
    VocabParallelHead,
    packing_units,
    rotary_tables,
)
from gptneox.parallel import TensorParallelGroup, check_divides
from gptneox.weights.size import ModelSize


class Attention(nn.Module):
    """Multi-head attention over the cache; returns this rank's partial sum."""

    def __init__(self, config: ModelConfig, layer_id: int, ops: Operators, ranks: int) -> None:
        super().__init__()
        self.layer_id, self.head_dim = layer_id, config.head_dim
        width, bias = config.hidden_size // ranks, config.attention_bias
        self.query_key_value = Linear(config.hidden_size, 3 * width, bias, ops)
        self.dense = Linear(width, config.hidden_size, bias, ops)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [T, C]; returns [T, C]."""
        return self.dense(self.attend(self.query_key_value(x), step))

    def attend(self, qkv: Tensor, step: Step) -> Tensor:
        """qkv [T, 3W], laid out per head as q, k, v, or as [T, H, 3, D]; returns [T, W]."""
        qkv = qkv.view(qkv.shape[0], -1, 3, self.head_dim)
        return step.attend(self.layer_id, qkv).flatten(1)


class MLP(nn.Module):
    """Two products around an activation; returns this rank's partial sum."""

    def __init__(self, config: ModelConfig, ops: Operators, ranks: int) -> None:
        super().__init__()
        width = config.intermediate_size // ranks
        self.dense_h_to_4h = Linear(config.hidden_size, width, True, ops)
        self.dense_4h_to_h = Linear(width, config.hidden_size, True, ops)
        self.act = ops.activation(config.activation)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, C]; returns [T, C]."""
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(x)))


class Layer(PackingUnit):
    """One decoder layer, parallel residual (GPT-NeoX-20B, Pythia) or serial (RedPajama, rinna).

    Parallel: x + attn(LN1(x)) + mlp(LN2(x)), one all-reduce for both partial sums; operators
    that `fuses_layers` compute it as one product before attention and one after it.
    Serial: y = x + attn(LN1(x)); y + mlp(LN2(y)). Source: arXiv:2204.06745, section 2.1.
    """

    def __init__(
        self, config: ModelConfig, layer_id: int, ops: Operators, group: TensorParallelGroup
    ) -> None:
        super().__init__()
        self.parallel_residual, self.group = config.use_parallel_residual, group
        self.ops, self.activation = ops, config.activation
        self.fused = self.packs_whole = self.parallel_residual and ops.fuses_layers
        self.packed: PackedLayer | None = None
        eps = config.layer_norm_eps
        self.input_layernorm = LayerNorm(config.hidden_size, eps, ops)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, eps, ops)
        self.attention = Attention(config, layer_id, ops, group.world_size)
        self.mlp = MLP(config, ops, group.world_size)

    def pack(self) -> None:
        """See `PackingUnit`; of a fused layer alone."""
        norms = (self.input_layernorm, self.post_attention_layernorm)
        up, down = self.mlp.dense_h_to_4h.unload(), self.mlp.dense_4h_to_h.unload()
        assert up[1] is not None
        assert down[1] is not None
        self.packed = self.ops.pack_layer(
            LayerWeights(
                norm_attention=(norms[0].weight.data, norms[0].bias.data),
                norm_mlp=(norms[1].weight.data, norms[1].bias.data),
                query_key_value=self.attention.query_key_value.unload(),
                dense_h_to_4h=(up[0], up[1]),
                dense=self.attention.dense.unload(),
                dense_4h_to_h=(down[0], down[1]),
                eps=norms[0].eps,
                activation=self.activation,
            )
        )

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [T, C]; returns [T, C], equal on every rank."""
        if self.fused:
            assert self.packed is not None, "forward before the weights were loaded"
            qkv, mlp = self.ops.layer_front(x, self.packed)
            attended = self.attention.attend(qkv, step)
            if self.group.world_size == 1:
                return self.ops.layer_back(attended, mlp, self.packed, x)
            partial = self.ops.layer_back(attended, mlp, self.packed)
            return x + self.group.all_reduce(partial)
        partial = self.attention(self.input_layernorm(x), step)
        if self.parallel_residual:
            partial = partial + self.mlp(self.post_attention_layernorm(x))
            return x + self.group.all_reduce(partial)
        x = x + self.group.all_reduce(partial)
        return x + self.group.all_reduce(self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Embedding, layers, final normalisation."""

    def __init__(self, config: ModelConfig, ops: Operators, group: TensorParallelGroup) -> None:
        super().__init__()
        self.embed_in = Embedding(config.vocab_size, config.hidden_size, ops)
        self.layers = nn.ModuleList(Layer(config, i, ops, group) for i in range(config.num_layers))
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, ops)
        self.is_whole_and_parallel = group.world_size == 1 and config.use_parallel_residual

    def forward(self, step: Step) -> Tensor:
        """Returns the step's hidden states before the final norm, [T, C]."""
        x = self.embed_in(step.input_ids)
        if step.runs_all_layers and self.is_whole_and_parallel:
            packed = [layer.packed for layer in self.layers]
            assert None not in packed, "forward before the weights were loaded"
            return step.run(x, cast("list[PackedLayer]", packed))
        for layer in self.layers:
            x = layer(x, step)
        return x


class GPTNeoX(nn.Module):
    """The language model of one rank."""

    size: ModelSize  # set by `weights.load.load_model`

    def __init__(
        self,
        config: ModelConfig,
        device: Device,
        group: TensorParallelGroup | None = None,
        num_positions: int = 0,
        graphs: str = "auto",
    ) -> None:
        """Build on the meta device; `weights.load.load_model` loads the weights.

        Args:
            config: the architecture.
            device: where to run; it makes operators for this model.
            group: ranks that share the model; one process by default.
            num_positions: rows of the rotary table; config.max_position_embeddings by default.
            graphs: see `Device.operators`.

        Raises:
            ConfigError: the heads cannot be shared evenly, or the model has no such positions.
        """
        super().__init__()
        group = group or TensorParallelGroup()
        check_divides(group.world_size, config.num_heads, config.intermediate_size)
        self.ops: Operators = device.operators(graphs)
        self.ops.prepare(config.head_dim, config.rotary_dim)
        self.config, self.device, self.group = config, device, group
        self.num_positions = config.positions(num_positions)
        self.gpt_neox = Decoder(config, self.ops, group)
        self.rotary: RotaryTables = rotary_tables(config, self.num_positions, self.ops)
        self.embed_out = VocabParallelHead(config.vocab_size, config.hidden_size, self.ops, group)

    def packing_units(self) -> Iterator[tuple[str, PackingUnit]]:
        """Names and modules to load and pack one after the other; together they are the model."""

        return packing_units(self)

    def forward(self, step: Step) -> Tensor:
        """Hidden states [T, C] of a step, for `compute_logits`."""
        hidden = self.gpt_neox(step)
        assert isinstance(hidden, Tensor)
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits [S, V] of selected rows of the hidden states, [S, C]."""
        logits = self.embed_out(self.gpt_neox.final_layer_norm(hidden))
        assert isinstance(logits, Tensor)
        return logits
