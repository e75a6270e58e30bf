# SPDX-License-Identifier: Apache-2.0
"""Every setting, each read in one place: config.json, config.ini and the environment.

Defaults live in the dataclasses below and nowhere else. Precedence, applied by `layer`:
command-line flag > environment variable > config.ini > default.
"""

from __future__ import annotations

import ast
import codecs
import configparser
import io
import json
import logging
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from gptneox.file_faults import explain, explain_place

logger = logging.getLogger(__name__)

USER_FOLDER = "gptneox-ascend"  # in the folders where a user's programs keep their files
EMBEDDED_CHECKPOINT = Path(__file__).resolve().parent.parent / "weights" / "neox-mini"

# Activations that GPT-NeoX checkpoints name (as in transformers' ACT2FN) -> operator.
ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
ROPE_TYPES = ("default", "linear", "dynamic")
DTYPES = ("float32", "float16", "bfloat16")
# Above these a config.json is taken for damaged, before anything of that size is built.
MAX_LAYERS, MAX_POSITIONS = 4096, 2**22

# -- config.json ---------------------------------------------------------------------------------


class ConfigError(ValueError):
    """A setting is wrong; the message names the key, what was found and what is accepted."""


@dataclass(frozen=True)
class ModelConfig:
    """The architecture as config.json states it, old (4.x) and new (5.x) keys alike.

    Source: transformers GPTNeoXConfig 4.x (`rotary_pct`, `rotary_emb_base`, `rope_scaling`,
    `torch_dtype`) and 5.x (`rope_parameters`, `dtype`). A missing rotary share means 0.25 in both.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_position_embeddings: int
    activation: str = "gelu_erf"
    rotary_dim: int = 24
    rope_theta: float = 10000.0
    rope_factor: float = 1.0
    rope_is_dynamic: bool = False  # frequencies change with a text that exceeds the positions
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    attention_bias: bool = True
    tie_word_embeddings: bool = False
    dtype: str = "float32"
    eos_token_ids: tuple[int, ...] = ()
    quantize: str = ""  # the method by which the weights were quantized
    part_world_size: int = 1  # above 1: the files are one rank's part of a cut checkpoint

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        c, f = self.hidden_size, self.intermediate_size
        biases = f + c + (4 * c if self.attention_bias else 0)
        per_layer = 4 * c * c + 2 * c * f + biases + 4 * c
        embeddings = self.vocab_size * c * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * per_layer + embeddings + 2 * c

    @property
    def num_decode_parameters(self) -> int:
        """Parameters one decode step reads: all but the input embedding, which is only gathered."""
        if self.tie_word_embeddings:
            return self.num_parameters
        return self.num_parameters - self.vocab_size * self.hidden_size

    def positions(self, wanted: int) -> int:
        """Positions of a run: `wanted`; 0: max_position_embeddings.

        Raises:
            ConfigError: more than the rotary embedding can give.
        """
        if self.rope_is_dynamic and wanted > self.max_position_embeddings:
            raise ConfigError(
                f"{wanted} positions are wanted (--max_position_embeddings), but config.json says "
                f"{self.max_position_embeddings} with rope type 'dynamic': beyond that the "
                "frequencies change with the length of each text, which no cache of keys can "
                f"follow; use at most {self.max_position_embeddings}"
            )
        return wanted or self.max_position_embeddings

    def kv_bytes_per_token(self, itemsize: int, world_size: int = 1) -> int:
        """Bytes of K and V that one token takes on one rank, over all layers."""
        return 2 * self.num_layers * self.hidden_size * itemsize // world_size

    @classmethod
    def from_pretrained(cls, model_path: Path) -> ModelConfig:
        """Read `model_path/config.json`.

        Raises:
            FileNotFoundError: there is no config.json.
            ConfigError: it is not JSON, not GPT-NeoX, or a value cannot be served.
        """
        path = model_path / "config.json"
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], origin: str = "config.json") -> ModelConfig:
        """Build from the parsed config.json; `origin` is named in errors."""
        keys = _Keys(raw, origin)
        model_type = raw.get("model_type")
        if model_type != "gpt_neox":
            raise ConfigError(
                f"{origin}: model_type is {model_type!r}; this toolkit runs 'gpt_neox' only"
            )
        hidden_size = keys.positive_int("hidden_size")
        num_heads = keys.positive_int("num_attention_heads")
        if hidden_size % num_heads:
            raise ConfigError(
                f"{origin}: hidden_size {hidden_size} is not a multiple of "
                f"num_attention_heads {num_heads}"
            )
        act = raw.get("hidden_act", "gelu")
        if not isinstance(act, str) or act not in ACTIVATIONS:
            raise ConfigError(
                f"{origin}: hidden_act {act!r} is not known; use one of {', '.join(ACTIVATIONS)}"
            )
        rope = _rope(keys, hidden_size // num_heads)
        return cls(
            vocab_size=keys.positive_int("vocab_size"),
            hidden_size=hidden_size,
            num_layers=keys.positive_int("num_hidden_layers", most=MAX_LAYERS),
            num_heads=num_heads,
            intermediate_size=keys.positive_int("intermediate_size"),
            max_position_embeddings=keys.positive_int(
                "max_position_embeddings", 2048, most=MAX_POSITIONS
            ),
            activation=ACTIVATIONS[act],
            layer_norm_eps=keys.number("layer_norm_eps", 1e-5),
            use_parallel_residual=keys.boolean("use_parallel_residual", True),
            attention_bias=keys.boolean("attention_bias", True),
            tie_word_embeddings=keys.boolean("tie_word_embeddings", False),
            dtype=_file_dtype(raw, origin),
            eos_token_ids=token_ids(raw.get("eos_token_id"), f"{origin}: eos_token_id"),
            quantize=_quantization(raw),
            part_world_size=keys.positive_int("world_size", 1),
            **rope,
        )


class _Keys:
    """Typed access to config.json with errors that name the key."""

    def __init__(self, raw: Mapping[str, Any], origin: str) -> None:
        self.raw, self.origin = raw, origin

    def positive_int(self, key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self.origin}: key {key!r} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ConfigError(
                f"{self.origin}: {key} is {value!r}; an integer from 1 to {most} is expected"
            )
        return value

    def number(self, key: str, default: float) -> float:
        return _number(self.raw.get(key), default, f"{self.origin}: {key}")

    def boolean(self, key: str, default: bool) -> bool:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"{self.origin}: {key} is {value!r}; true or false is expected")
        return value


def _number(value: Any, default: float, what: str) -> float:
    if value is None:
        return default
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"{what} is {value!r}; a positive, finite number is expected")
    return float(value)


def _rope(keys: _Keys, head_dim: int) -> dict[str, Any]:
    """Rotary settings from either key era; the dictionaries of both may be null."""
    raw, origin = keys.raw, keys.origin
    params = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(params, dict):
        raise ConfigError(f"{origin}: rope_parameters is {params!r}; an object is expected")
    rope_type = params.get("rope_type", params.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ConfigError(
            f"{origin}: rope_type {rope_type!r} is not known; use one of {', '.join(ROPE_TYPES)}"
        )
    share = params.get("partial_rotary_factor", raw.get("rotary_pct"))
    if share is None:
        logger.debug("%s names no rotary share; 0.25, the class default, is used", origin)
    share = _number(share, 0.25, f"{origin}: rotary_pct")
    rotary_dim = int(head_dim * min(share, 1.0))
    if share > 1 or rotary_dim < 2 or rotary_dim % 2:
        raise ConfigError(
            f"{origin}: rotary_pct {share} of head_dim {head_dim} gives {rotary_dim} rotary "
            "dimensions; an even number from 2 to head_dim is needed"
        )
    theta = params.get("rope_theta", raw.get("rotary_emb_base"))
    if rope_type != "default" and params.get("factor") is None:
        raise ConfigError(f"{origin}: rope_type {rope_type!r} needs a factor; it is missing")
    factor = _number(params.get("factor"), 1.0, f"{origin}: rope factor")
    return {
        "rotary_dim": rotary_dim,
        "rope_theta": _number(theta, 10000.0, f"{origin}: rotary_emb_base"),
        # "dynamic" changes nothing up to max_position_embeddings, and `positions` allows no more.
        "rope_factor": factor if rope_type == "linear" else 1.0,
        "rope_is_dynamic": rope_type == "dynamic",
    }


def _file_dtype(raw: Mapping[str, Any], origin: str) -> str:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"{origin}: dtype {name!r} is not known; use one of {', '.join(DTYPES)}")
    return name


def _quantization(raw: Mapping[str, Any]) -> str:
    """The method by which config.json says that its weights were quantized; "" for none.

    Source: MindIE (`quantize`), transformers (`quantization_config`), compressed-tensors
    (`compression_config`, as it was called first), MLX (`quantization`).
    """
    names = {"compression_config": "compressed-tensors", "quantization": "MLX"}
    for key in ("quantize", "quantization_config", *names):
        entry = raw.get(key)
        if isinstance(entry, dict) and entry:
            method = entry.get("quant_method") or entry.get("quant_algo") or names.get(key)
            if not method:  # bitsandbytes named none at first
                is_known = any(str(k).startswith("load_in_") for k in entry)
                method = "bitsandbytes" if is_known else f"by {key}, which names no method"
            return str(method)
        if entry:
            return str(entry)
    return ""


def token_ids(value: Any, what: str) -> tuple[int, ...]:
    """An `eos_token_id` entry (missing, one id or a list of ids) as a tuple."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ConfigError(f"{what} is {value!r}; an integer or a list of integers is expected")
    return tuple(ids)


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object; errors name the file.

    A byte order mark at the start, as editors on Windows write it, is passed over.

    Raises:
        FileNotFoundError: the file or its directory does not exist.
        OSError: there is something of this name that is no readable file.
        ConfigError: the content is not a JSON object.
    """
    if reason := explain_place(path):
        raise OSError(f"{path} {reason}")
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path.name} in {path.parent}: the path {_without_json(path)}; give the directory "
            "of a GPT-NeoX checkpoint"
        )
    try:
        data = path.read_bytes()
        raw = json.loads(data.decode(json.detect_encoding(data)))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, too deep, too long numbers
        reason = explain(path) or f"is not valid JSON: {error}; download it again"
        raise ConfigError(f"{path} {reason}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {type(raw).__name__}; a JSON object is expected")
    return raw


def _without_json(path: Path) -> str:
    """What the directory is in which a JSON file was expected."""
    if path.parent.is_file():
        return "exists, but is not a directory"
    if not path.parent.exists():
        return "does not exist"
    if snapshots := sorted(path.parent.glob(f"snapshots/*/{path.name}")):
        return f"is a folder of the hub's cache, which has it in {snapshots[-1].parent}"
    return "holds none"


# -- text files ----------------------------------------------------------------------------------

# The marks that Windows programs put before a text; UTF-32's begins with UTF-16's.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: Path, *, newline: str | None = None) -> str:
    """A text file of the user's in UTF-8, without the byte-order mark that it may begin with.

    Args:
        path: anything that can be opened and read to its end; a pipe, too.
        newline: as of `open`: None makes every line end a line feed, "" keeps them.

    Raises:
        ConfigError: it is in another encoding, which is named where it can be told.
        OSError: it cannot be read.
    """
    return decode_text(path.read_bytes(), str(path), newline=newline)


def decode_text(data: bytes, origin: str, *, newline: str | None = None) -> str:
    """`read_text` of bytes that were read before; `origin` is named in errors."""
    name = next((n for mark, n in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), "")
    head = data[:4096]
    if len(data) % 2 == 0 and max(head[::2].count(0), head[1::2].count(0)) > len(head) / 5:
        name = name or "UTF-16"  # mostly of Latin letters: every second byte is zero
    if name:
        raise ConfigError(
            f"{origin} is {name}; UTF-8 is expected: save it as UTF-8, or convert it with "
            f"iconv -f {name} -t UTF-8"
        )
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{origin} is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8, or "
            "convert it with iconv -f ENCODING -t UTF-8 (such as LATIN1, GB18030 or SHIFT_JIS)"
        ) from error
    return io.StringIO(text, newline=newline).getvalue()


# -- config.ini, flags and environment -----------------------------------------------------------


def _setting(default: Any, comment: str, *, env: str = "", minimum: float | None = None) -> Any:
    """A field of a settings section. `env` is the variable that overrides config.ini."""
    metadata = {"comment": comment, "env": env, "minimum": minimum}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelSection:
    """[model]: which checkpoint, on which devices."""

    model_path: str = _setting("", "checkpoint directory; empty: the embedded weights/neox-mini")
    device: str = _setting("auto", "auto | npu | cuda | cpu; a named device is never replaced")
    device_ids: str = _setting("0", "device numbers, comma-separated")
    dtype: str = _setting("auto", "auto (as config.json says) | float16 | bfloat16 | float32")
    attention: str = _setting("auto", "auto | paged | flash; auto: what the launcher stands for")
    parallel_backend: str = _setting(
        "hccl", "hccl | nccl | lccl | gloo; on a CPU always gloo", env="BACKEND"
    )
    log_dir: str = _setting("", "directory for log files; empty: none are written")
    bind_cpu: int = _setting(1, "1: bind each process to the cores near its device", env="BIND_CPU")

    def __post_init__(self) -> None:
        _one_of("model", "device", self.device, ("auto", "npu", "cuda", "cpu"))
        _one_of("model", "dtype", self.dtype, ("auto", *DTYPES))
        _one_of("model", "attention", self.attention, ("auto", "paged", "flash"))
        _one_of("model", "bind_cpu", self.bind_cpu, (0, 1))
        parse_device_ids(self.device_ids)


@dataclass(frozen=True)
class EngineSection:
    """[engine]: the paged path."""

    block_size: int = _setting(128, "KV-cache tokens per block, 16 to 512", minimum=16)
    num_blocks: int = _setting(0, "KV-cache blocks; 0: from the memory that is free", minimum=0)
    max_batch_size: int = _setting(1, "requests running at once", minimum=1)
    max_prefill_batch_size: int = _setting(
        0, "prompts started in one step; 0: max_batch_size", minimum=0
    )
    max_input_length: int = _setting(1024, "expected prompt tokens; sizing only", minimum=1)
    max_output_length: int = _setting(20, "new tokens per request", minimum=1)
    max_position_embeddings: int = _setting(
        0, "positions per request; 0: as config.json says", minimum=0
    )
    max_prefill_tokens: int = _setting(
        -1, "prompt tokens per step; -1: max_prefill_batch_size * (max_input + max_output)"
    )
    enable_chunked_prefill: bool = _setting(True, "split prompts longer than max_prefill_tokens")
    enable_prefix_caching: bool = _setting(True, "reuse the blocks of equal prompt beginnings")
    graphs: str = _setting(
        "auto",
        "auto | on | off: replay decode steps as captured graphs; auto: not on an NPU",
        env="GPTNEOX_GRAPHS",
    )
    memory_fraction: float = _setting(
        0.9, "share of the free memory the KV cache may take", env="NPU_MEMORY_FRACTION"
    )
    reserved_memory_gb: float = _setting(
        1.0, "GiB kept free beside the KV cache", env="RESERVED_MEMORY_GB", minimum=0
    )

    def __post_init__(self) -> None:
        _one_of("engine", "graphs", self.graphs, ("auto", "on", "off"))
        if not 16 <= self.block_size <= 512:
            raise ConfigError(f"[engine] block_size is {self.block_size}; use 16 to 512")
        if self.max_prefill_tokens != -1 and self.max_prefill_tokens < 1:
            raise ConfigError(
                f"[engine] max_prefill_tokens is {self.max_prefill_tokens}; use -1 or a "
                "positive number"
            )
        if self.max_position_embeddings > MAX_POSITIONS:
            raise ConfigError(
                f"[engine] max_position_embeddings is {self.max_position_embeddings}; use 0 to "
                f"{MAX_POSITIONS}"
            )
        if not 0 < self.memory_fraction <= 1:
            raise ConfigError(
                f"[engine] memory_fraction is {self.memory_fraction}; use a number above 0, up to 1"
            )

    @property
    def prefill_budget(self) -> int:
        """Prompt tokens that one step may compute."""
        if self.max_prefill_tokens > 0:
            return self.max_prefill_tokens
        batch = self.max_prefill_batch_size or self.max_batch_size
        return batch * (self.max_input_length + self.max_output_length)


@dataclass(frozen=True)
class PrecisionSection:
    """[precision] (old name [ceval]): the accuracy task."""

    mode: str = _setting("boolq", "boolq | mmlu | ceval")
    work_dir: str = _setting("", "holds data/, receives test_result/; empty: the shipped sets")
    batch: int = _setting(1, "questions per batch", minimum=1)
    shot: int = _setting(5, "examples before each question", minimum=0)
    seq_len_out: int = _setting(32, "new tokens per question, for first_letter", minimum=1)
    scoring: str = _setting("logits", "logits | first_letter (as the original); mmlu and ceval")

    def __post_init__(self) -> None:
        _one_of("precision", "mode", self.mode, ("boolq", "mmlu", "ceval"))
        _one_of("precision", "scoring", self.scoring, ("logits", "first_letter"))


@dataclass(frozen=True)
class PerformanceSection:
    """[performance]: the speed task."""

    model_name: str = _setting("gpt_neox_20b", "used in the name of the result file")
    batch_size: int = _setting(1, "rows per batch", minimum=1)
    max_len_exp: int = _setting(10, "largest power of two", minimum=0)
    min_len_exp: int = _setting(5, "smallest power of two", minimum=0)
    case_pair: str = _setting("", "[[in,out],...]; when given, the exponents are ignored")
    save_file_name: str = _setting("", "result file; empty: a name is made")
    perf_mode: str = _setting("normal", "normal | detail")
    skip_decode: int = _setting(0, "1: leave detokenising out of the measured run")
    repeat: int = _setting(1, "measured runs per case; the times are their means", minimum=1)

    def __post_init__(self) -> None:
        _one_of("performance", "perf_mode", self.perf_mode, ("normal", "detail"))
        _one_of("performance", "skip_decode", self.skip_decode, (0, 1))
        if not self.min_len_exp <= self.max_len_exp <= 24:
            raise ConfigError(
                f"[performance] min_len_exp is {self.min_len_exp} and max_len_exp is "
                f"{self.max_len_exp}; min_len_exp <= max_len_exp <= 24 is expected"
            )
        self.cases()

    def cases(self) -> list[tuple[int, int]]:
        """(input length, output length) of each case, in order."""
        if not self.case_pair:
            lengths = [2**i for i in range(self.min_len_exp, self.max_len_exp + 1)]
            return [(i, o) for i in lengths for o in lengths]
        try:
            pairs = ast.literal_eval(self.case_pair)
            cases = [(i, o) for i, o in pairs]
        except (ValueError, SyntaxError, TypeError) as error:
            raise ConfigError(
                f"[performance] case_pair is {self.case_pair!r}; [[in,out],...] is expected"
            ) from error
        if not cases or any(type(n) is not int or n < 1 for case in cases for n in case):
            raise ConfigError(
                f"[performance] case_pair is {self.case_pair!r}; at least one pair of positive "
                "integers is expected"
            )
        return cases


SECTIONS: dict[str, type] = {
    "model": ModelSection,
    "engine": EngineSection,
    "precision": PrecisionSection,
    "performance": PerformanceSection,
}
Section = TypeVar("Section", ModelSection, EngineSection, PrecisionSection, PerformanceSection)


def _one_of(section: str, key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        choices = ", ".join(str(a) for a in allowed)
        raise ConfigError(f"[{section}] {key} is {value!r}; use one of {choices}")


def parse_device_ids(text: str) -> list[int]:
    """Device numbers of a comma-separated list; blanks around a number are allowed."""
    items = [item.strip() for item in text.split(",")]
    if not all(re.fullmatch(r"\d+", item) for item in items) or len(set(items)) < len(items):
        raise ConfigError(
            f"device list {text!r} is wrong; distinct numbers joined by commas are expected, "
            "such as 0,1"
        )
    return [int(item) for item in items]


def resolve_model_path(text: str, ini: Path) -> str:
    """config.ini's model_path, which is relative to the file; empty stays empty."""
    return str(ini.resolve().parent / Path(text).expanduser()) if text else ""


def read_ini(path: Path) -> dict[str, dict[str, str]]:
    """Sections and keys of config.ini as text.

    Full-line and inline comments (`;` or `#` after a blank) are removed; `%` is literal.

    Raises:
        FileNotFoundError: `path` does not exist.
        ConfigError: unreadable, or a section or key that no dataclass knows.
    """
    if path.is_dir() or not path.exists():
        state = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"no settings file: {path} {state}; see config.ini in the repository"
        )
    # No default section: [DEFAULT] is unknown like any other that no dataclass stands for.
    parser = configparser.ConfigParser(
        interpolation=None, inline_comment_prefixes=(";", "#"), default_section=""
    )
    try:
        parser.read_string(read_text(path), source=str(path))
    except configparser.Error as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    sections: dict[str, dict[str, str]] = {}
    for name in parser.sections():
        target = "precision" if name == "ceval" else name
        if target not in SECTIONS:
            raise ConfigError(f"{path}: unknown section [{name}]; known: {', '.join(SECTIONS)}")
        if target in sections:
            raise ConfigError(f"{path}: [ceval] is the old name of [precision]; keep one of them")
        if target != name:
            logger.warning("%s: section [ceval] is deprecated; rename it to [precision]", path)
        values = dict(parser[name])
        values.pop("device_num", None)  # derived from device_ids; accepted as the original did
        known = {f.name for f in fields(SECTIONS[target])}
        if unknown := sorted(values.keys() - known):
            raise ConfigError(
                f"{path} [{name}]: unknown {', '.join(unknown[:20])}; "
                f"known: {', '.join(sorted(known))}"
            )
        sections[target] = values
    return sections


def _convert(setting: Field[Any], text: str, origin: str) -> Any:
    """`text` as the type of the field's default."""
    kind: Any = type(setting.default)
    try:
        if kind is bool:
            value: Any = configparser.ConfigParser.BOOLEAN_STATES[text.strip().lower()]
        else:
            value = kind(text.strip())
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{origin}: {text!r} is not a valid {kind.__name__}") from error
    return value


def layer(
    cls: type[Section],
    flags: Mapping[str, Any],
    ini: Mapping[str, Mapping[str, str]],
    environ: Mapping[str, str] | None = None,
) -> tuple[Section, dict[str, str]]:
    """Build one section and say where each value came from.

    Args:
        cls: a class of `SECTIONS`.
        flags: parsed command-line values; None means not given. Other keys are ignored.
        ini: the result of `read_ini`, or {}.
        environ: os.environ by default.

    Returns:
        The section and {key: "flag" | variable name | "config.ini" | "default"}.
    """
    environ = os.environ if environ is None else environ
    name = next(n for n, c in SECTIONS.items() if c is cls)
    given = ini.get(name, {})
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for setting in fields(cls):
        key, variable = setting.name, setting.metadata["env"]
        default: Any = setting.default
        if flags.get(key) is not None:
            value, source = flags[key], "flag"
        elif variable and environ.get(variable, "") != "":
            value, source = _convert(setting, environ[variable], variable), variable
        elif given.get(key, "") != "":
            value, source = _convert(setting, given[key], f"[{name}] {key}"), "config.ini"
        else:
            value, source = default, "default"
        if value == default and source == "config.ini":
            source = "default"  # a shipped config.ini repeats the defaults
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"[{name}] {key} is {value}; a finite number is expected")
        minimum = setting.metadata["minimum"]
        if minimum is not None and value < minimum:
            raise ConfigError(f"[{name}] {key} is {value}; at least {minimum:g} is expected")
        values[key], sources[key] = value, source
    return cls(**values), sources


@dataclass(frozen=True)
class Environment:
    """The variables that are no config.ini keys: rank, benchmark file, debugging dumps."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1  # ranks on this machine, which share its cores
    is_quant: bool = False
    benchmark_enabled: bool = False
    benchmark_path: str = ""
    log_level: str = "INFO"
    omp_num_threads: int = 0
    cpu_binding_num: int = 0  # CPU_BINDING_NUM: cores per device; 0: an even share of the node
    visible_devices: str = ""  # ASCEND_RT_VISIBLE_DEVICES
    ascend_home: str = ""  # ASCEND_HOME_PATH, which CANN's set_env.sh sets
    master_addr: str = ""  # MASTER_ADDR: where the ranks meet
    master_port: int = 0  # MASTER_PORT; 0: the launcher's own
    hccl_base_port: int = 60000  # HCCL_IF_BASE_PORT: first of 16 host ports
    hccl_port_range: str = ""  # HCCL_HOST_SOCKET_PORT_RANGE, which goes before it
    timeit: bool = False  # TIMEIT: `perf_mode = detail` splits each step into its parts
    modeltest_data_dir: str = ""  # MODELTEST_DATA_DIR; empty: tests/modeltest/data
    modeltest_output_dir: str = ""  # MODELTEST_OUTPUT_DIR; empty: tests/modeltest/outputs
    modeltest_log_to_file: bool = False  # MODELTEST_LOG_TO_FILE: also log under outputs/logs
    cpu_kernels: str = "auto"  # GPTNEOX_CPU_KERNELS: on refuses to go without, off is plain torch
    cache_home: str = ""  # XDG_CACHE_HOME; empty: .cache in the home folder
    state_home: str = ""  # XDG_STATE_HOME; empty: .local/state in the home folder
    home: str = ""  # HOME; empty: as the system's list of users says
    cxx: str = ""  # CXX: the compiler of the CPU kernels

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> Environment:
        """Read os.environ.

        Raises:
            ConfigError: a value has the wrong form, or torchrun's set of variables is incomplete.
        """
        environ = os.environ if environ is None else environ

        def integer(name: str, default: int = 0) -> int:
            text = environ.get(name, "") or str(default)
            if not re.fullmatch(r"\d+", text):
                raise ConfigError(f"{name} is {text!r}; a non-negative integer is expected")
            return int(text)

        launched = [n for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if environ.get(n)]
        if launched and len(launched) < 3:
            missing = sorted({"RANK", "LOCAL_RANK", "WORLD_SIZE"} - set(launched))
            raise ConfigError(
                f"{', '.join(launched)} set without {', '.join(missing)}; "
                "start through run_pa.sh or torchrun, or unset them"
            )
        rank, world_size = integer("RANK"), integer("WORLD_SIZE", 1)
        if world_size < 1 or rank >= world_size:
            raise ConfigError(f"RANK {rank} is not below WORLD_SIZE {world_size}")
        local_rank = integer("LOCAL_RANK")
        local_world_size = integer("LOCAL_WORLD_SIZE", world_size) if launched else 1
        if not local_rank < local_world_size <= world_size or local_rank > rank:
            raise ConfigError(
                f"LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE {local_world_size} cannot be RANK "
                f"{rank} of WORLD_SIZE {world_size}; start through run_pa.sh or torchrun, or unset "
                "all four"
            )
        level = (environ.get("MINDIE_LOG_LEVEL") or "INFO").upper()
        _one_of("environment", "MINDIE_LOG_LEVEL", level, ("DEBUG", "INFO", "WARNING", "ERROR"))
        kernels = environ.get("GPTNEOX_CPU_KERNELS") or "auto"
        _one_of("environment", "GPTNEOX_CPU_KERNELS", kernels, ("auto", "on", "off"))
        return cls(
            rank=rank,
            local_rank=local_rank,
            world_size=world_size,
            local_world_size=local_world_size,
            is_quant=integer("IS_QUANT") == 1,
            benchmark_enabled=integer("ATB_LLM_BENCHMARK_ENABLE") == 1,
            benchmark_path=environ.get("ATB_LLM_BENCHMARK_FILEPATH", ""),
            log_level=level,
            omp_num_threads=_outer_threads(environ.get("OMP_NUM_THREADS", "")),
            cpu_binding_num=integer("CPU_BINDING_NUM"),
            visible_devices=environ.get("ASCEND_RT_VISIBLE_DEVICES", ""),
            ascend_home=environ.get("ASCEND_HOME_PATH", ""),
            master_addr=environ.get("MASTER_ADDR", ""),
            master_port=integer("MASTER_PORT"),
            hccl_base_port=integer("HCCL_IF_BASE_PORT", 60000),
            hccl_port_range=environ.get("HCCL_HOST_SOCKET_PORT_RANGE", ""),
            timeit=integer("TIMEIT") == 1,
            modeltest_data_dir=environ.get("MODELTEST_DATA_DIR", ""),
            modeltest_output_dir=environ.get("MODELTEST_OUTPUT_DIR", ""),
            modeltest_log_to_file=integer("MODELTEST_LOG_TO_FILE") == 1,
            cpu_kernels=kernels,
            cache_home=environ.get("XDG_CACHE_HOME", ""),
            home=environ.get("HOME", ""),
            state_home=environ.get("XDG_STATE_HOME", ""),
            cxx=environ.get("CXX", ""),
        )


def _outer_threads(text: str) -> int:
    """OMP_NUM_THREADS is a list, one number for each level of nesting; ours is the outermost.

    Source: OpenMP API 5.2, section 21.2.
    """
    if not re.fullmatch(r"\s*(\d+\s*(,\s*\d+\s*)*)?", text, re.ASCII):
        raise ConfigError(
            f"OMP_NUM_THREADS is {text!r}; a number, or a list such as 4,2, is expected"
        )
    return int(text.split(",")[0] or 0) if text.strip() else 0


def load_devices_by_hand() -> None:
    """Keep `import torch` from importing device packages, whose failure would end the program.

    Each device imports its own and can say what is missing.
    """
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
