# SPDX-License-Identifier: Apache-2.0
"""How weights and inputs of a float model become integers of eight bits, found with sample text.

The model runs over the text layer by layer in fp32, so one layer's weights are held at a time. In
each layer the normalisations are rewritten, so that no channel of their outputs is much larger
than the others (SmoothQuant): what a channel is divided by, the columns of the weights behind it
are multiplied by. With a parallel residual both normalisations become the same one without a
shift: one normalisation, one rounding and one product of all rows behind it. Both rewrites leave
the function as it is. A matrix whose output suffers too much from rounded inputs keeps its inputs,
or stays float.

Sources: SmoothQuant, arXiv:2211.10438; the search of its exponent as AWQ's, arXiv:2306.00978.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from gptneox.config.model import ModelConfig
from gptneox.devices import cache
from gptneox.devices.device import Device
from gptneox.devices.operators import InputRange, Operators, quantize_by
from gptneox.layers import rotary_tables
from gptneox.weights.formats import INT8_DYNAMIC, INT8_ROWS, INT8_STATIC, Int8Weight
from gptneox.weights.size import EMBEDDING_NAME, PREFIX

logger = logging.getLogger(__name__)

W8A16, DYNAMIC, STATIC = INT8_ROWS.scheme, INT8_DYNAMIC.scheme, INT8_STATIC[0].scheme

MIN_TOKENS = 256  # fewer say too little of a channel's range
MAX_TOKENS, MAX_TEXT = 4096, 512  # of all texts, of one
# Of SmoothQuant; 0 moves all of the difference between channels into the weights' rows.
EXPONENTS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8)
_TRIAL_ROWS = 512  # of the tokens, spread evenly, by which choices are made
# A product whose relative error is larger keeps its inputs as floats, within the share below.
MAX_ERROR = 0.03
MAX_SHARE = 0.2

DOWN = "mlp.dense_4h_to_h"
FRONT = {  # linear layer -> the normalisation before it
    "attention.query_key_value": "input_layernorm",
    "mlp.dense_h_to_4h": "post_attention_layernorm",
}

Quantize = Callable[[Tensor, torch.dtype], Int8Weight]


@dataclass
class Scheme:
    """What becomes of every linear layer and normalisation; keys are their full names."""

    linears: dict[str, str] = field(default_factory=dict)  # scheme; one that is missing is float
    norms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # scale and shift [C]
    columns: dict[str, Tensor] = field(default_factory=dict)  # factors of a weight's, fp32 [K]
    added: dict[str, Tensor] = field(default_factory=dict)  # to a bias, fp32 [F]
    ranges: dict[str, InputRange] = field(default_factory=dict)  # of static inputs
    errors: dict[str, float] = field(default_factory=dict)  # relative, of outputs
    weight_errors: dict[str, float] = field(default_factory=dict)  # with inputs as floats
    exponents: dict[str, float] = field(default_factory=dict)  # of a normalisation


@dataclass(frozen=True)
class Wish:
    """What is asked for."""

    scheme: str  # DYNAMIC or STATIC
    chosen: set[str]  # linear layers
    smooth: bool = True  # rewrite normalisations
    num_floats: int = 0  # linear layers with the largest errors that stay float
    dtype: torch.dtype = torch.float32  # of the checkpoint


def calibrate(
    config: ModelConfig,
    read: Callable[[str], Tensor],
    texts: Sequence[Sequence[int]],
    wish: Wish,
    quantize: Quantize,
) -> Scheme:
    """Decide about all linear layers.

    Args:
        config: the architecture.
        read: a parameter by its name, in any float type.
        texts: token ids; the first `MAX_TEXT` of each are used, `MAX_TOKENS` in all.
        wish: what is asked for.
        quantize: rounds a weight for a model of a dtype.

    Raises:
        ValueError: too little text, or an id that the vocabulary lacks.
    """
    model = FloatModel(config, read, limit_texts(texts, config.vocab_size))
    scheme = Scheme()
    head = {name for name in wish.chosen if not name.startswith(PREFIX)}
    scheme.linears |= dict.fromkeys(head, W8A16)  # the logits' inputs stay floats
    x = model.embed()
    for index in range(config.num_layers):
        weights = model.layer(index)
        inputs, x = model.run(weights, x)
        _Layer(f"{PREFIX}layers.{index}.", weights, inputs, wish, quantize).decide(scheme, config)
    _fall_back(scheme, wish)
    return scheme


def limit_texts(
    texts: Sequence[Sequence[int]],
    vocab_size: int,
    most: int = MAX_TOKENS,
    longest: int = MAX_TEXT,
) -> list[Tensor]:
    """The ids that are used: at most `longest` of a text, `most` of all.

    Raises:
        ValueError: see `calibrate`.
    """
    used: list[Tensor] = []
    total = 0
    for ids in texts:
        part = list(ids[: min(longest, most - total)])
        if wrong := [i for i in part if not 0 <= i < vocab_size]:
            raise ValueError(f"token {wrong[0]} is not among the {vocab_size} of the vocabulary")
        if part:
            used.append(torch.tensor(part))
        total += len(part)
    if total < MIN_TOKENS:
        raise ValueError(
            f"the calibration text has {total} tokens; at least {MIN_TOKENS} are needed, and "
            f"{most} are used where there are as many"
        )
    return used


# -- the float model -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Inputs:
    """What the linear layers of a layer read, [T, …] fp32.

    Of both normalisations it is the value before scale and shift.
    """

    norms: dict[str, Tensor]  # by the normalisation
    dense: Tensor
    down: Tensor


class FloatModel:
    """The model in fp32, one layer at a time, over texts that stay apart."""

    def __init__(
        self, config: ModelConfig, read: Callable[[str], Tensor], texts: list[Tensor]
    ) -> None:
        self.config, self.texts, self._read = config, texts, read
        self.ops = Operators(Device())
        self.tables = rotary_tables(config, max(map(len, texts)), self.ops)
        self.activation = self.ops.activation(config.activation)

    def embed(self) -> Tensor:
        """[T, C]; all texts, one behind the other."""
        return F.embedding(torch.cat(self.texts), self._read(EMBEDDING_NAME).float())

    def layer(self, index: int) -> dict[str, Tensor]:
        """Its parameters by their names within it."""
        names = [f"{norm}.{part}" for norm in FRONT.values() for part in ("weight", "bias")]
        for linear in (*FRONT, "attention.dense", DOWN):
            names.append(f"{linear}.weight")
            if self.config.attention_bias or linear.startswith("mlp"):
                names.append(f"{linear}.bias")
        return {n: self._read(f"{PREFIX}layers.{index}.{n}").float() for n in names}

    def run(self, weights: Mapping[str, Tensor], x: Tensor) -> tuple[_Inputs, Tensor]:
        """What the linear layers read, and the layer's output [T, C]."""

        def linear(name: str, value: Tensor) -> Tensor:
            return F.linear(value, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

        def normed(name: str, value: Tensor) -> Tensor:
            return value * weights[f"{name}.weight"] + weights[f"{name}.bias"]

        first, second = FRONT.values()
        norms = {first: self._normalise(x)}
        qkv = linear("attention.query_key_value", normed(first, norms[first]))
        attended = self._attend(qkv)
        after = linear("attention.dense", attended)
        serial = not self.config.use_parallel_residual
        norms[second] = self._normalise(x + after) if serial else norms[first]
        up = self.activation(linear("mlp.dense_h_to_4h", normed(second, norms[second])))
        return _Inputs(norms, attended, up), x + after + linear(DOWN, up)

    def _normalise(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.config.layer_norm_eps)

    def _attend(self, qkv: Tensor) -> Tensor:
        head_dim = self.config.head_dim
        outputs = []
        for part in qkv.split_with_sizes([len(ids) for ids in self.texts]):
            q, k, v = part.view(len(part), -1, 3, head_dim).unbind(2)
            q, k = self.ops.rotary(q, k, torch.arange(len(part)), *self.tables)
            outputs.append(self.ops.causal_attention(q, k, v, head_dim**-0.5).flatten(1))
        return torch.cat(outputs)


# -- one layer -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """A layer about which is decided."""

    prefix: str
    weights: Mapping[str, Tensor]
    inputs: _Inputs
    wish: Wish
    quantize: Quantize

    def decide(self, scheme: Scheme, config: ModelConfig) -> None:
        """Add the layer's part to `scheme`."""
        front = [name for name in FRONT if self.prefix + name in self.wish.chosen]
        if self.wish.smooth and front:
            both = len(front) == 2 and config.use_parallel_residual and config.attention_bias
            groups = [front] if both else [[name] for name in front]
            for group in groups:
                self._smooth(group, scheme, is_one=both)
        for name in (*FRONT, "attention.dense", DOWN):
            if self.prefix + name in self.wish.chosen:
                self._measure(name, scheme)

    def _read_by(self, name: str, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """What a linear layer reads and its weight, as they are rewritten, [T, K] and [F, K]."""
        weight = self.weights[f"{name}.weight"]
        if name not in FRONT:
            return (self.inputs.dense if name == "attention.dense" else self.inputs.down), weight
        norm = FRONT[name]
        scale, shift = self._norm(norm)
        if self.prefix + norm in scheme.norms:
            scale, shift = (t.float() for t in scheme.norms[self.prefix + norm])
        if self.prefix + name in scheme.columns:
            weight = weight * scheme.columns[self.prefix + name]
        return self.inputs.norms[norm] * scale + shift, weight

    def _norm(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def _smooth(self, group: list[str], scheme: Scheme, *, is_one: bool) -> None:
        """Rewrite the normalisation before the linear layers of `group`.

        is_one: both normalisations become one, without a shift.
        """
        norm = FRONT[group[0]]
        if is_one:
            bare = self.inputs.norms[norm]
            effective = [self.weights[f"{n}.weight"] * self._norm(FRONT[n])[0] for n in group]
        else:
            scale, shift = self._norm(norm)
            bare = self.inputs.norms[norm] * scale + shift
            effective = [self.weights[f"{name}.weight"] for name in group]
        exponent, factors = self._search(bare, effective)
        # Rounded as the file holds it, so that the columns match exactly what is multiplied.
        for name in group:
            full, norm = self.prefix + name, FRONT[name]
            scale, shift = self._norm(norm)
            if is_one:
                new = (1 / factors).to(self.wish.dtype), torch.zeros_like(shift)
                scheme.columns[full] = scale / new[0].float()
                scheme.added[full] = self.weights[f"{name}.weight"] @ shift
            else:
                new = (scale / factors).to(self.wish.dtype), shift / factors
                moved = new[0].float()
                scheme.columns[full] = torch.where(moved == 0, factors, scale / moved)
            scheme.norms[self.prefix + norm] = new
            scheme.exponents[self.prefix + norm] = exponent

    def _search(self, x: Tensor, weights: list[Tensor]) -> tuple[float, Tensor]:
        """The exponent of the smallest error of all outputs, and what channels are divided by."""
        rows, largest = _spread(x), x.abs().amax(0)
        column = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
        exact = [rows @ w.T for w in weights]
        best = math.inf, EXPONENTS[0], torch.ones_like(largest)
        for exponent in EXPONENTS:
            factors = largest**exponent / column ** (1 - exponent)
            usable = factors.isfinite() & (factors > 0)
            factors = torch.where(usable, factors, 1.0).clamp(1e-3, 1e3)
            error = 0.0
            for weight, wanted in zip(weights, exact, strict=True):
                found = self._product(rows / factors, weight * factors)
                error += _relative(found, wanted) ** 2
            if error < best[0]:
                best = error, exponent, factors
        return best[1:]

    def _product(self, x: Tensor, weight: Tensor, inputs: InputRange | None = None) -> Tensor:
        """Of integers, [T, F]; without given inputs each row finds its own scale."""
        return _rounded(x, inputs) @ self._round_weight(weight).T

    def _round_weight(self, weight: Tensor) -> Tensor:
        """What a weight is after it was rounded to integers."""
        quantized = self.quantize(weight, self.wish.dtype)
        return quantized.values.float() * quantized.scale[:, None]

    def _measure(self, name: str, scheme: Scheme) -> None:
        """The error of a linear layer, and with static inputs their range."""
        x, weight = self._read_by(name, scheme)
        rows, full = _spread(x), self.prefix + name
        inputs = None
        if self.wish.scheme == STATIC:
            inputs = scheme.ranges[full] = _find_range(x)
        wanted = rows @ weight.T
        scheme.errors[full] = _relative(self._product(rows, weight, inputs), wanted)
        scheme.weight_errors[full] = _relative(rows @ self._round_weight(weight).T, wanted)
        scheme.linears[full] = self.wish.scheme


def _relative(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over that of what is wanted; 0 where that is 0."""
    size = wanted.norm().item()
    return (found - wanted).norm().item() / size if size else 0.0


def _spread(x: Tensor) -> Tensor:
    """Some of the rows, from the first to the last."""
    return x[:: -(-len(x) // _TRIAL_ROWS)]


def _rounded(x: Tensor, inputs: InputRange | None) -> Tensor:
    """What x [T, K] is after it was rounded to integers."""
    if inputs is None:
        values, step = cache.quantize(x)
        return values.float() * step.unsqueeze(1)
    values, _ = quantize_by(x, inputs)
    return (values.float() - inputs.offset) * inputs.scale


def _find_range(x: Tensor) -> InputRange:
    """The scale and offset of integers that hold all of x [T, K].

    A smaller range has smaller rounding errors, but what it cuts off costs more: 0.003 instead of
    0.002 nats for the embedded checkpoint, with the part of the range chosen by the sum of squares.
    """
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    scale = max((high - low) / 255, torch.finfo(torch.float32).tiny)
    return InputRange(scale, max(-128, min(127, round(-128 - low / scale))))


def _fall_back(scheme: Scheme, wish: Wish) -> None:
    """Leave the most sensitive linear layers with float inputs, or float."""
    worst = sorted(scheme.errors, key=lambda name: -scheme.errors[name])
    for name in worst[: wish.num_floats]:
        del scheme.linears[name]
    candidates = [n for n in worst if n in scheme.linears]
    if wish.scheme == DYNAMIC:
        candidates = [n for n in candidates if n.endswith(DOWN)]
    for name in candidates[: int(MAX_SHARE * len(candidates))]:
        if not scheme.errors[name] <= MAX_ERROR:
            scheme.linears[name] = W8A16
            if not scheme.weight_errors[name] <= MAX_ERROR:
                del scheme.linears[name]
    for name in [n for n in scheme.ranges if scheme.linears.get(n) != STATIC]:
        del scheme.ranges[name]
