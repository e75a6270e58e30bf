# SPDX-License-Identifier: Apache-2.0
"""The settings of a run: sections of config.ini, and where each value is from.

A setting is written once, as a field of a dataclass below: name, default, limits, help, variable.
`python -m gptneox.config.documents` makes config.ini and docs/settings.md from them. Precedence,
applied by `merge_section`: command-line flag > environment variable > config.ini > default.
"""

from __future__ import annotations

import ast
import configparser
import logging
import math
import re
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from gptneox.config.arguments import QUANTIZATION, boolean, given, given_path
from gptneox.config.environment import variables
from gptneox.config.errors import ConfigError, FileError, NoSuchPath, one_of
from gptneox.config.files import read_text
from gptneox.config.model import DTYPES, MAX_POSITIONS
from gptneox.config.places import shipped
from gptneox.config.schema import setting, settings_of
from gptneox.hub import is_model_id

logger = logging.getLogger(__name__)

EMBEDDED_CHECKPOINT = shipped("weights/neox-mini")
# In the order that "auto" tries; each is a package in `gptneox/devices`.
DEVICES = ("npu", "cuda", "cpu")

# The service's own defaults of [engine] max_batch_size and max_prefill_tokens.
SERVICE_BATCH_SIZE, SERVICE_PREFILL_TOKENS = 32, 2048


@dataclass(frozen=True)
class Section:
    """A section of config.ini; every key is also a setting of the class below."""

    name: ClassVar[str]
    group: ClassVar[str] = ""  # heading of --help; empty: the keys have no flags

    def __post_init__(self) -> None:
        """Check choices and limits.

        Raises:
            ConfigError: a value is not allowed.
        """
        for each in settings_of(type(self)):
            key, value = each.name, getattr(self, each.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"[{self.name}] {key} is {value}; a finite number is expected")
            if each.minimum is not None and value < each.minimum:
                expected = f"at least {each.minimum} is expected"
                raise ConfigError(f"[{self.name}] {key} is {value}; {expected}")
            if each.maximum is not None and value > each.maximum:
                expected = f"use {each.minimum} to {each.maximum}"
                raise ConfigError(f"[{self.name}] {key} is {value}; {expected}")
            if each.choices:
                one_of(self.name, key, value, each.choices)


@dataclass(frozen=True)
class ModelSection(Section):
    """The checkpoint, and the devices it runs on."""

    name = group = "model"

    model_path: str = setting(
        "",
        "Checkpoint directory, or OWNER/NAME on a hub; default: the embedded weights/neox-mini.",
        "A path in config.ini is relative to that file. For tensor parallelism on the flash path: "
        "the parent of part_model. A model that is not in the cache yet is downloaded.",
        parse=given,
        placeholder="DIR",
    )
    revision: str = setting("", "Branch, tag or commit of a model on a hub; empty: main.")
    device: str = setting(
        "auto",
        "Device to run on.",
        "A device that is named is never replaced by another.",
        choices=("auto", *DEVICES),
    )
    device_ids: str = setting("0", "Device numbers, joined by commas.", flag_name="")
    dtype: str = setting(
        "auto",
        "Number format; auto: as the checkpoint's config.json says.",
        choices=("auto", *DTYPES),
    )
    attention: str = setting(
        "auto",
        "Attention path; auto: paged in run_pa.sh, flash in cut_model_and_run.sh and main.py.",
        choices=("auto", "paged", "flash"),
    )
    parallel_backend: str = setting(
        "hccl",
        "Collectives: hccl, nccl, lccl or gloo; on a CPU always gloo.",
        env="BACKEND",
        flag_name="",
    )
    log_dir: str = setting("", "Directory for log files; empty: none are written.", flag_name="")
    bind_cpu: int = setting(
        1,
        "Bind each process to the cores near its device, on a CPU to its share of them.",
        choices=(0, 1),
        env="BIND_CPU",
        flag_name="",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_device_ids(self.device_ids)


@dataclass(frozen=True)
class EngineSection(Section):
    """The engine and its KV cache."""

    name = group = "engine"

    block_size: int = setting(128, "KV-cache tokens per block.", minimum=16, maximum=512)
    kv_cache_dtype: str = setting(
        "auto",
        "Number format of cached keys and values; int8 holds almost twice as many tokens.",
        "auto: as they are computed, or int8 where quantization_config of config.json has "
        "kv_quant_type C8.",
        choices=("auto", "int8"),
        env="GPTNEOX_KV_CACHE_DTYPE",
    )
    num_blocks: int = setting(
        0,
        "KV-cache blocks; 0: for one more request of full length than run at once, or what fits "
        "the memory.",
        minimum=0,
    )
    max_batch_size: int = setting(
        1, "Requests running at once.", f"The service's default is {SERVICE_BATCH_SIZE}.", minimum=1
    )
    max_prefill_batch_size: int = setting(
        0, "Prompts started in one step; 0: max_batch_size.", minimum=0
    )
    max_input_length: int = setting(
        1024,
        "Expected prompt tokens, for sizing only.",
        "Longer prompts are not cut.",
        minimum=1,
    )
    max_output_length: int = setting(20, "New tokens per request.", minimum=1, group="generation")
    max_position_embeddings: int = setting(
        0,
        "Positions per request; 0: as the checkpoint's config.json says.",
        minimum=0,
        maximum=MAX_POSITIONS,
    )
    max_prefill_tokens: int = setting(
        -1,
        "Prompt tokens per step; -1: max_prefill_batch_size * (max_input_length + "
        "max_output_length).",
        f"The service's default is {SERVICE_PREFILL_TOKENS}, so that a long prompt does not stop "
        "the other answers.",
    )
    enable_chunked_prefill: bool = setting(
        True, "Split prompts that are longer than max_prefill_tokens."
    )
    enable_prefix_caching: bool = setting(True, "Reuse the blocks of equal prompt beginnings.")
    graphs: str = setting(
        "auto",
        "Replay decode steps as captured graphs.",
        "auto: where the device has them, but not on an NPU, where they have not met a real card "
        "yet.",
        choices=("auto", "on", "off"),
        env="GPTNEOX_GRAPHS",
    )
    memory_fraction: float = setting(
        0.9,
        "Share of the free memory that the KV cache may take, above 0 up to 1.",
        env="NPU_MEMORY_FRACTION",
    )
    reserved_memory_gb: float = setting(
        1.0, "GiB kept free beside the KV cache.", minimum=0, env="RESERVED_MEMORY_GB"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_prefill_tokens != -1 and self.max_prefill_tokens < 1:
            raise ConfigError(
                f"[engine] max_prefill_tokens is {self.max_prefill_tokens}; use -1 or a "
                "positive number"
            )
        if not 0 < self.memory_fraction <= 1:
            raise ConfigError(
                f"[engine] memory_fraction is {self.memory_fraction}; use a number above 0, up to 1"
            )

    def for_service(self, sources: dict[str, str]) -> EngineSection:
        """The section with the service's defaults, which `sources` then names."""
        own: dict[str, Any] = {
            "max_batch_size": SERVICE_BATCH_SIZE,
            "max_prefill_tokens": SERVICE_PREFILL_TOKENS,
        }
        chosen = {key: value for key, value in own.items() if sources[key] == "default"}
        sources.update(dict.fromkeys(chosen, "service"))
        return replace(self, **chosen)

    @property
    def prefill_budget(self) -> int:
        """Prompt tokens that one step may compute."""
        if self.max_prefill_tokens > 0:
            return self.max_prefill_tokens
        batch = self.max_prefill_batch_size or self.max_batch_size
        return batch * (self.max_input_length + self.max_output_length)


@dataclass(frozen=True)
class PrecisionSection(Section):
    """The accuracy task. The section's old name, [ceval], is still read."""

    name = "precision"

    mode: str = setting("boolq", "Question set.", choices=("boolq", "mmlu", "ceval"))
    work_dir: str = setting(
        "",
        "Folder that holds data/ and receives test_result/; empty: the small sets shipped with "
        "weights/neox-mini.",
    )
    batch: int = setting(1, "Questions per batch.", minimum=1)
    shot: int = setting(
        5, "Examples before each question of mmlu and ceval; boolq has none.", minimum=0
    )
    seq_len_out: int = setting(
        32, "New tokens per question, where an answer is generated.", minimum=1
    )
    scoring: str = setting(
        "logits",
        "How mmlu and ceval are answered.",
        'logits: the likeliest of " A" to " D" as the next token, as lm-evaluation-harness does. '
        "first_letter: the first letter of the generated text.",
        choices=("logits", "first_letter"),
    )


@dataclass(frozen=True)
class PerformanceSection(Section):
    """The speed task."""

    name = "performance"

    model_name: str = setting("gpt_neox_20b", "Model name in the name of the result file.")
    batch_size: int = setting(1, "Rows per batch.", minimum=1)
    max_len_exp: int = setting(
        10,
        "Lengths of input and output are the powers of two from 2^min_len_exp to 2^max_len_exp; at "
        "most 24.",
        minimum=0,
    )
    min_len_exp: int = setting(5, "The exponent of the shortest length.", minimum=0)
    case_pair: str = setting("", "[[in,out],...]: when given, the exponents are ignored.")
    save_file_name: str = setting("", "Result file; empty: a name is made.")
    perf_mode: str = setting(
        "normal",
        "How a step is timed; detail splits it into its parts and needs TIMEIT=1.",
        choices=("normal", "detail"),
    )
    skip_decode: int = setting(0, "Leave detokenising out of the measured run.", choices=(0, 1))
    repeat: int = setting(
        1, "Measured runs of each case; the times in the result file are their means.", minimum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
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


@dataclass(frozen=True)
class ServerSection(Section):
    """The HTTP service (serve.sh)."""

    name = group = "server"

    host: str = setting(
        "127.0.0.1",
        "Address to listen at.",
        "0.0.0.0 takes requests from other hosts: set a key then.",
        parse=given,
        placeholder="ADDRESS",
    )
    port: int = setting(
        8000, "Port to listen at; 0: any free one, which is logged.", minimum=0, maximum=65535
    )
    api_key: str = setting(
        "",
        "Keys that clients may send, joined by commas; empty: no key is needed.",
        "There is no flag, for other users of the host see a command line.",
        env="GPTNEOX_API_KEY",
        flag_name="",
    )
    api_key_file: str = setting(
        "", "File with more keys, one a line.", parse=given, placeholder="FILE"
    )
    served_model_name: str = setting(
        "",
        "Names that requests may give as model, joined by commas; answers bear the first. Empty: "
        "the name of the checkpoint's folder.",
        parse=given,
        placeholder="NAMES",
    )
    max_concurrent_requests: int = setting(
        128,
        "Choices (prompts times n) that may run or wait at once; a request above that is answered "
        "429.",
        minimum=1,
    )
    max_choices: int = setting(128, "Choices (prompts times n) of one request.", minimum=1)
    max_body_bytes: int = setting(4 << 20, "Longest body of a request.", minimum=1024)
    request_timeout_s: float = setting(
        600.0, "Seconds from a request's arrival to the end of its answer.", minimum=0.001
    )
    queue_timeout_s: float = setting(
        0.0,
        "Seconds that a request may wait for its first token; 0: as long as request_timeout_s.",
        minimum=0,
    )
    shutdown_grace_s: float = setting(
        30.0, "Seconds that running requests get to finish after SIGTERM.", minimum=0
    )
    heartbeat_timeout_s: float = setting(
        60.0,
        "Seconds without a step or a sign of life after which the engine counts as hung and the "
        "service ends; more than the longest step takes.",
        minimum=3,
    )
    replicas: int = setting(
        1,
        "Engines on this host, each with its own weights and its share of the devices listed, on a "
        "CPU of the cores.",
        minimum=1,
    )
    ssl_certfile: str = setting(
        "", "TLS certificate with its chain; empty: plain HTTP.", parse=given, placeholder="FILE"
    )
    ssl_keyfile: str = setting("", "Key of the certificate.", parse=given, placeholder="FILE")
    ssl_ca_certs: str = setting(
        "",
        "Authorities of client certificates; clients then have to show one.",
        parse=given,
        placeholder="FILE",
    )
    cors_origins: str = setting(
        "",
        "Origins whose pages may call the service from a browser, joined by commas; empty: none.",
        parse=given,
        placeholder="ORIGINS",
    )
    root_path: str = setting(
        "",
        "Path that a proxy in front has taken off, such as /llm; it appears in /docs.",
        parse=given,
        placeholder="PATH",
    )
    metrics_prefix: str = setting(
        "gptneox",
        "First part of the names at /metrics; vllm suits dashboards of vLLM.",
        parse=given,
        placeholder="NAME",
    )
    log_prompts: bool = setting(False, "Log the beginning of every prompt.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.ssl_certfile) != bool(self.ssl_keyfile):
            raise ConfigError("[server] ssl_certfile and ssl_keyfile go together; set both")
        if self.ssl_ca_certs and not self.ssl_certfile:
            raise ConfigError("[server] ssl_ca_certs needs ssl_certfile and ssl_keyfile")
        if not re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", self.metrics_prefix):
            raise ConfigError(
                f"[server] metrics_prefix is {self.metrics_prefix!r}; letters, digits and _ are "
                "expected, a letter first"
            )
        if self.root_path and not re.fullmatch("(/[A-Za-z0-9._~-]+)+", self.root_path):
            raise ConfigError(
                f"[server] root_path is {self.root_path!r}; a path such as /llm is expected"
            )


SECTIONS: dict[str, type[Section]] = {
    cls.name: cls
    for cls in (ModelSection, EngineSection, ServerSection, PrecisionSection, PerformanceSection)
}

OneSection = TypeVar("OneSection", bound=Section)


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
    """config.ini's model_path, which is relative to the file; empty and OWNER/NAME stay."""
    path = ini.resolve().parent / Path(text).expanduser()
    return text if not text or (is_model_id(text) and not path.exists()) else str(path)


# Forms of quantized checkpoints that can be written.
MSMODELSLIM, COMPRESSED_TENSORS = "ascend", "compressed-tensors"
QUANT_TYPES = ("w8a16", "w8a8_dynamic", "w8a8", "w4a16")


def disable_level(text: str) -> str:
    """L and a number."""
    if not re.fullmatch(r"L\d+", text):
        raise ValueError(f"{text!r} is not L and a number, such as L5")
    return text


def part_size(text: str) -> float:
    """A number of gigabytes above 0."""
    value = float(text)
    if not 0 < value < 1 << 20:
        raise ValueError(f"{text} is not above 0")
    return value


@dataclass(frozen=True)
class QuantizeOptions:
    """Flags of the task quantize, called as those of msmodelslim."""

    group: ClassVar[str] = QUANTIZATION

    save_directory: Path | None = setting(
        None,
        "Folder to write; an earlier result of this task there is replaced, anything else is not.",
        parse=given_path,
        placeholder="DIR",
    )
    quant_type: str = setting(
        "w8a16",
        "Scheme: weights of eight bits with a scale for each output, and inputs as floats (w8a16), "
        "as integers with a scale for each token (w8a8_dynamic) or for each layer (w8a8); or "
        "weights of four bits with a scale for each group of inputs (w4a16).",
        choices=QUANT_TYPES,
    )
    form: str = setting(
        MSMODELSLIM,
        "Files of msmodelslim, or those that transformers and vLLM read.",
        flag_name="format",
        choices=(MSMODELSLIM, COMPRESSED_TENSORS),
    )
    disable_names: Seq[str] = setting(
        (),
        "Linear layers that stay float, such as gpt_neox.layers.0.mlp.dense_4h_to_h; * stands for "
        "any part of a name.",
    )
    disable_level: str = setting(
        "L0",
        "Ln: the n linear layers with the largest errors stay float; of the w8a8 types.",
        parse=disable_level,
        placeholder="Ln",
    )
    calib_file: Path | None = setting(
        None,
        "Sample text: lines of JSON with inputs_pretokenized or text. Default of the w8a8 types: "
        "English text that comes with the toolkit; w4a16 rounds by GPTQ with it, and without by a "
        "search of each group's range.",
        parse=given_path,
        placeholder="FILE",
    )
    group_size: int = setting(
        64,
        "Inputs that share a scale, of w4a16.",
        choices=(32, 64, 128),
    )
    anti_method: str = setting(
        "m1",
        "How the w8a8 types keep outliers of inputs small: SmoothQuant, with the best of several "
        "exponents for each layer (m1), or not at all.",
        choices=("m1", "none"),
    )
    disable_last_linear: bool = setting(True, "True: the output head stays float.", parse=boolean)
    part_file_size: float | None = setting(
        None,
        "Most gigabytes of a weight file. Default: one file.",
        parse=part_size,
        placeholder="X",
    )
    dequantize: bool = setting(
        False, "Write the float checkpoint that the quantized one at --model_path stands for."
    )

    @property
    def num_disabled(self) -> int:
        """The n of `disable_level`."""
        return int(self.disable_level[1:])

    @property
    def part_bytes(self) -> int:
        """Most bytes of a weight file; 0: no limit."""
        return int((self.part_file_size or 0) * 10**9)


def read_ini(path: Path) -> dict[str, dict[str, str]]:
    """Sections and keys of config.ini as text.

    Full-line and inline comments (`;` or `#` after a blank) are removed; `%` is literal.

    Raises:
        NoSuchPath: `path` does not exist.
        ConfigError: unreadable, or a section or key that no dataclass knows.
    """
    if path.is_dir() or not path.exists():
        state = "is a folder" if path.is_dir() else "does not exist"
        raise NoSuchPath(f"no settings file: {path} {state}; see config.ini in the repository")
    # No default section: [DEFAULT] is unknown like any other that no dataclass stands for.
    parser = configparser.ConfigParser(
        interpolation=None, inline_comment_prefixes=(";", "#"), default_section=""
    )
    try:
        parser.read_string(read_text(path), source=str(path))
    except configparser.Error as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    except FileError as error:  # here it is the settings that are wrong
        raise ConfigError(str(error)) from error
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


def _convert(kind: Any, text: str, origin: str) -> Any:
    """`text` as a value of the type `kind`."""
    try:
        if kind is bool:
            value: Any = configparser.ConfigParser.BOOLEAN_STATES[text.strip().lower()]
        else:
            value = kind(text.strip())
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{origin}: {text!r} is not a valid {kind.__name__}") from error
    return value


def merge_section(
    cls: type[OneSection],
    flags: Mapping[str, Any],
    ini: Mapping[str, Mapping[str, str]],
    environ: Mapping[str, str] | None = None,
) -> tuple[OneSection, dict[str, str]]:
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
    in_file = ini.get(cls.name, {})
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for each in settings_of(cls):
        key, variable, kind = each.name, each.env, type(each.default)
        if flags.get(key) is not None:
            value, source = flags[key], "flag"
        elif variable and environ.get(variable, "") != "":
            value, source = _convert(kind, environ[variable], variable), variable
        elif in_file.get(key, "") != "":
            value, source = _convert(kind, in_file[key], f"[{cls.name}] {key}"), "config.ini"
        else:
            value, source = each.default, "default"
        if value == each.default and source == "config.ini":
            source = "default"  # a shipped config.ini repeats the defaults
        values[key], sources[key] = value, source
    return cls(**values), sources
