# SPDX-License-Identifier: Apache-2.0
"""The settings of a run: sections of config.ini, and where each value is from.

Defaults live in the dataclasses below and nowhere else. Precedence, applied by `layer`:
command-line flag > environment variable > config.ini > default.
"""

from __future__ import annotations

import ast
import configparser
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from gptneox.config.environment import variables
from gptneox.config.errors import ConfigError, one_of
from gptneox.config.files import read_text
from gptneox.config.model import DTYPES, MAX_POSITIONS
from gptneox.config.places import shipped

logger = logging.getLogger(__name__)

EMBEDDED_CHECKPOINT = shipped("weights/neox-mini")


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
        one_of("model", "device", self.device, ("auto", "npu", "cuda", "cpu"))
        one_of("model", "dtype", self.dtype, ("auto", *DTYPES))
        one_of("model", "attention", self.attention, ("auto", "paged", "flash"))
        one_of("model", "bind_cpu", self.bind_cpu, (0, 1))
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
        one_of("engine", "graphs", self.graphs, ("auto", "on", "off"))
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
        one_of("precision", "mode", self.mode, ("boolq", "mmlu", "ceval"))
        one_of("precision", "scoring", self.scoring, ("logits", "first_letter"))


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
        one_of("performance", "perf_mode", self.perf_mode, ("normal", "detail"))
        one_of("performance", "skip_decode", self.skip_decode, (0, 1))
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
        environ: the environment by default.

    Returns:
        The section and {key: "flag" | variable name | "config.ini" | "default"}.
    """
    environ = variables() if environ is None else environ
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
