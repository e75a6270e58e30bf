# SPDX-License-Identifier: Apache-2.0
"""The positional grammar of tests/modeltest/run.sh.

    run.sh TYPE MODE
        [case_pair]                                MODE = performance* | precision_single
        [shot]                                     MODE = full_MMLU | full_CEval | full_CMMLU
        [batch_range] time_limit                   MODE = performance_maxbs
        input_text_or_file batch_size              MODE = *_single
        batch_size                                 every other MODE
        [prefill_batch_size] [prefill_length N]    MODE = performance
        MODEL_NAME [base] WEIGHT_DIR [trust_remote_code]
        CHIP_NUM | RANK_TABLE WORLD_SIZE NODE_NUM RANK_ID_START MASTER_ADDR
        [[dp,tp,sp,moe_tp,moe_ep,pp,microbatch,cp]] [max_position_embedding]

The launcher reads it too, so nothing heavy is imported here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptneox.config.environment import Environment
from gptneox.config.errors import ConfigError, FileError
from gptneox.config.files import read_text
from gptneox.config.model import ModelConfig
from gptneox.hub import find_checkpoint

TYPES = {"pa_fp16": "float16", "pa_bf16": "bfloat16", "fa": ""}
DATASETS = ("BoolQ", "MMLU", "CEval", "CMMLU", "GSM8K")
WITH_SHOT = ("full_MMLU", "full_CEval", "full_CMMLU")
MODES = (
    "performance",
    "performance_maxbs",
    "performance_single",
    "precision_single",
    *(f"full_{name}" for name in DATASETS),
)
# Modes that lm-evaluation-harness evaluates: mode -> its tasks.
LM_EVAL_TASKS = {
    "full_TruthfulQA": "truthfulqa_mc1,truthfulqa_mc2,truthfulqa_gen",
    "full_HumanEval": "humaneval --confirm_run_unsafe_code",
    "full_LongBench": "longbench",
    "full_LongBench-E": "longbench_e",
    "full_NeedleBench": "niah_single_1,niah_single_2,niah_single_3",
    "full_GPQA": "gpqa_main_zeroshot",
    "full_AIME2024": "aime24",
    "full_LAMBADA": "lambada_openai",
    "full_PIQA": "piqa",
    "full_HellaSwag": "hellaswag",
    "full_WinoGrande": "winogrande",
    "full_ARC": "arc_easy,arc_challenge",
}
CASES = ((256, 256), (512, 512), (1024, 1024), (2048, 2048))
SINGLE_CASES = ((256, 256),)
BATCH_RANGE = (1, 64)
SHOT = 5
_DEGREES = ("dp", "tp", "sp", "moe_tp", "moe_ep", "pp", "microbatch", "cp")


@dataclass(frozen=True)
class Hosts:
    """The ranks of a run and the hosts they run on."""

    world_size: int
    num_nodes: int = 1
    rank_id_start: int = 0
    master_addr: str = ""
    rank_table: str = ""

    @property
    def local_world_size(self) -> int:
        """Ranks on this host."""
        return self.world_size // self.num_nodes

    @property
    def node_rank(self) -> int:
        """Number of this host."""
        return self.rank_id_start // self.local_world_size


@dataclass(frozen=True)
class Plan:
    """One call of run.sh."""

    kind: str  # TYPE
    mode: str
    model_name: str
    model_path: Path
    hosts: Hosts
    cases: tuple[tuple[int, int], ...] = ()
    batch_sizes: tuple[tuple[int, ...], ...] = ()  # for each case
    batch_ranges: tuple[tuple[int, int], ...] = ()  # for each case, closed
    time_limit_ms: float = 0.0
    prompts: tuple[str, ...] = ()
    shot: int = SHOT
    prefill_batch_size: int = 0
    prefill_length: int = 0
    trust_remote_code: bool = False
    max_position_embeddings: int = 0

    @property
    def attention(self) -> str:
        """paged or flash."""
        return "flash" if self.kind == "fa" else "paged"

    @property
    def batch_size(self) -> int:
        """The batch size of a mode that has one only."""
        return self.batch_sizes[0][0]

    @property
    def dataset(self) -> str:
        """Question set of a full_* mode; empty for others."""
        return self.mode.removeprefix("full_") if self.mode.startswith("full_") else ""


def parse(arguments: Seq[str]) -> Plan:
    """Parse the arguments of run.sh.

    Raises:
        ConfigError: they are wrong, or name something that is not served.
        FileNotFoundError: the checkpoint has no config.json.
    """
    reader = _Reader(arguments)
    kind, mode = _kind_and_mode(reader)
    values = _cases_and_batches(reader, mode)
    if mode == "performance":
        values |= _prefill(reader)
    model_name = _model_name(reader)
    model_path = _model_path(reader.take("WEIGHT_DIR"), kind)
    values["trust_remote_code"] = reader.skip("trust_remote_code")
    if reader.next_is(lambda word: "encrypt" in word):
        raise ConfigError("encrypted weights are not served; leave that argument out")
    hosts = _hosts(reader)
    _check_degrees(reader, hosts.world_size)
    if reader.next_is(_is_count):
        values["max_position_embeddings"] = reader.count("max_position_embedding")
    if reader.words:
        raise ConfigError(f"{' '.join(reader.words)!r}: nothing more is expected after the chips")
    return Plan(kind, mode, model_name, model_path, hosts, **values)


# -- words ---------------------------------------------------------------------------------------


class _Reader:
    """The arguments that are not parsed yet."""

    def __init__(self, words: Seq[str]) -> None:
        self.words = list(words)

    def take(self, what: str) -> str:
        if not self.words:
            raise ConfigError(f"{what} is missing; see tests/modeltest/README.md")
        return self.words.pop(0)

    def next_is(self, test: Any) -> bool:
        return bool(self.words) and bool(test(self.words[0]))

    def skip(self, word: str) -> bool:
        """Take the word if it comes next."""
        is_next = self.next_is(lambda next_word: next_word == word)
        if is_next:
            self.words.pop(0)
        return is_next

    def count(self, what: str) -> int:
        word = self.take(what)
        if not _is_count(word):
            raise ConfigError(f"{what} is {word!r}; a whole number from 1 on is expected")
        return int(word)


def _is_count(word: str) -> bool:
    return re.fullmatch(r"[1-9]\d{0,8}", word) is not None


def _is_pairs(word: str) -> bool:
    return word.startswith("[[") or word in ("", "[]")


def _is_batch(word: str) -> bool:
    return re.fullmatch(r"\d+(,\d+)*|\[.*\]", word) is not None


def _kind_and_mode(reader: _Reader) -> tuple[str, str]:
    kind, mode = reader.take("TYPE"), reader.take("MODE")
    if kind not in TYPES:
        raise ConfigError(f"TYPE is {kind!r}; served: {', '.join(TYPES)}")
    if mode in LM_EVAL_TASKS:
        raise ConfigError(
            f"MODE {mode} is evaluated by lm-evaluation-harness: python -m "
            "gptneox.evaluation.lm_eval_model --model gptneox --model_args pretrained=WEIGHT_DIR "
            f"--tasks {LM_EVAL_TASKS[mode]}; served here: {', '.join(MODES)}"
        )
    if mode not in MODES:
        raise ConfigError(f"MODE is {mode!r}; served: {', '.join(MODES)}")
    return kind, mode


# -- cases and batches ---------------------------------------------------------------------------


def _cases_and_batches(reader: _Reader, mode: str) -> dict[str, Any]:
    """The arguments between MODE and the model, as fields of Plan."""
    if mode in WITH_SHOT:
        shot = SHOT
        if len(reader.words) > 1 and _is_batch(reader.words[1]):  # two numbers: shot, batch
            word = reader.take("shot")
            if not re.fullmatch(r"\d{1,3}", word):
                raise ConfigError(f"shot is {word!r}; a whole number from 0 on is expected")
            shot = int(word)
        return {"shot": shot, "batch_sizes": (_batches(reader.take("batch_size"), 1)[0],)}
    if mode.startswith("full_"):
        return {"batch_sizes": (_batches(reader.take("batch_size"), 1)[0],)}
    if mode.endswith("_single"):
        cases = _cases(reader, SINGLE_CASES, lambda _: True)
        prompts = _prompts(reader.take("input_text_or_file"))
        batch_size = reader.count("batch_size")
        return {"cases": cases, "prompts": prompts, "batch_sizes": ((batch_size,),)}
    if mode == "performance_maxbs":
        cases = _cases(reader, CASES, lambda _: True)
        ranges = (BATCH_RANGE,) * len(cases)
        if reader.next_is(_is_pairs):
            ranges = _pairs(reader.take(""), "batch_range", "[[lowest,highest],...]") or ranges
        if len(ranges) != len(cases) or any(low > high for low, high in ranges):
            raise ConfigError(
                f"batch_range is {_shown(ranges)}; one [lowest,highest] for each of the "
                f"{len(cases)} cases is expected"
            )
        return {"cases": cases, "batch_ranges": ranges, "time_limit_ms": _time_limit(reader)}
    # A list of lists is the cases if a batch size follows it, else the batch sizes.
    cases = _cases(reader, CASES, _is_batch)
    return {"cases": cases, "batch_sizes": _batches(reader.take("batch_size"), len(cases))}


def _cases(
    reader: _Reader, default: tuple[tuple[int, int], ...], next_may_be: Any
) -> tuple[tuple[int, int], ...]:
    if not reader.next_is(_is_pairs):
        return default
    if len(reader.words) > 1 and not next_may_be(reader.words[1]):
        return default
    return _pairs(reader.take(""), "case_pair", "[[in,out],...]") or default


def _literal(word: str, what: str, form: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ConfigError(f"{what} is {word!r}; {form} without blanks is expected") from error


def _pairs(word: str, what: str, form: str) -> tuple[tuple[int, int], ...]:
    """A list of pairs of positive integers; empty for an empty word."""
    pairs = _literal(word, what, form) if word else []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(_positive(n) for n in pair)
        for pair in pairs
    ):
        raise ConfigError(f"{what} is {word!r}; {form} of positive integers is expected")
    return tuple((first, second) for first, second in pairs)


def _positive(value: Any) -> bool:
    return type(value) is int and value > 0


def _shown(pairs: Seq[Seq[int]]) -> str:
    return "[" + ",".join(f"[{a},{b}]" for a, b in pairs) + "]"


def _batches(word: str, num_cases: int) -> tuple[tuple[int, ...], ...]:
    """Batch sizes of each case; `1,4` and `[1,4]` stand for all cases."""
    form = "8, [8], 1,4, [1,4] or one list per case"
    sizes = _literal(word if word.startswith("[") else f"[{word}]", "batch_size", form)
    if sizes and all(isinstance(item, list) for item in sizes):
        lists = sizes
        if len(lists) != num_cases:
            raise ConfigError(
                f"batch_size is {word!r}: {len(lists)} lists for {num_cases} case"
                f"{'' if num_cases == 1 else 's'}; give one list per case"
            )
    else:
        lists = [sizes] * num_cases
    if not all(sizes and all(_positive(size) for size in sizes) for sizes in lists):
        raise ConfigError(f"batch_size is {word!r}; {form} of positive integers is expected")
    return tuple(tuple(dict.fromkeys(sizes)) for sizes in lists)


def _time_limit(reader: _Reader) -> float:
    word = reader.take("time_limit")
    if not re.fullmatch(r"\d+(\.\d+)?", word) or float(word) <= 0:
        raise ConfigError(f"time_limit is {word!r}; milliseconds per token are expected")
    return float(word)


def _prompts(word: str) -> tuple[str, ...]:
    """A literal list of texts, or the lines of a file."""
    if not word.startswith("["):
        try:
            lines = read_text(Path(word)).splitlines()
        except (OSError, FileError) as error:
            raise ConfigError(
                f'input_text_or_file {word!r} is neither a list like ["hello","hi"] nor a text '
                f"file that can be read: {error}"
            ) from error
        texts: Any = [line for line in lines if line]
    else:
        texts = _literal(word, "input_text_or_file", '["hello","hi"]')
    valid = isinstance(texts, list) and texts
    if not valid or not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(f"input_text_or_file {word!r} holds no texts, or an empty one")
    return tuple(texts)


def _prefill(reader: _Reader) -> dict[str, Any]:
    """The arguments of MODE performance after the batch size."""
    values = {}
    if reader.next_is(_is_count):
        values["prefill_batch_size"] = reader.count("prefill_batch_size")
    if reader.skip("prefill_length"):
        values["prefill_length"] = reader.count("prefill_length")
    if reader.next_is(lambda word: word == "dataset"):
        raise ConfigError(
            "performance over a dataset's questions is not served; leave 'dataset …' out, or "
            "give questions to performance_single"
        )
    return values


# -- model and chips -----------------------------------------------------------------------------


def _model_name(reader: _Reader) -> str:
    """MODEL_NAME, and the words that may follow it."""
    name = reader.take("MODEL_NAME")
    if not re.fullmatch(r"[A-Za-z][\w.-]*", name):
        raise ConfigError(f"MODEL_NAME is {name!r}; a name like gptneox_20b is expected")
    if reader.next_is(lambda word: word in ("chat", "instruct")):
        raise ConfigError(f"{reader.take('')}: GPT-NeoX has no chat template; use base")
    reader.skip("base")
    if reader.next_is(lambda word: word == "lora"):
        raise ConfigError("lora is not served; leave 'lora FILE' out")
    return name


def _model_path(word: str, kind: str) -> Path:
    path = find_checkpoint(word, from_modelscope=Environment.read().use_modelscope).resolve()
    config = ModelConfig.from_pretrained(path)
    dtype = TYPES[kind]
    if dtype and config.dtype != dtype:
        names = {value: name for name, value in TYPES.items() if value}
        remedy = f"use {names[config.dtype]}" if config.dtype in names else "use fa"
        raise ConfigError(
            f"TYPE {kind} needs {dtype} weights, but {path}/config.json says {config.dtype}; "
            f"{remedy}"
        )
    return path


def _hosts(reader: _Reader) -> Hosts:
    word = reader.take("CHIP_NUM")
    if _is_count(word):
        return Hosts(int(word))
    if re.fullmatch(r"[\d.+-]+", word):
        raise ConfigError(f"CHIP_NUM is {word!r}; a whole number from 1 on is expected")
    if not Path(word).is_file():
        raise ConfigError(
            f"CHIP_NUM is {word!r}, which is neither a number nor a rank table file; give the "
            "number of chips, or RANK_TABLE WORLD_SIZE NODE_NUM RANK_ID_START MASTER_ADDR"
        )
    world_size, num_nodes = reader.count("WORLD_SIZE"), reader.count("NODE_NUM")
    first = reader.take("RANK_ID_START")
    address = reader.take("MASTER_ADDR")
    if world_size % num_nodes:
        raise ConfigError(f"WORLD_SIZE {world_size} is not a multiple of NODE_NUM {num_nodes}")
    local = world_size // num_nodes
    if not re.fullmatch(r"\d{1,6}", first) or int(first) % local or int(first) >= world_size:
        raise ConfigError(
            f"RANK_ID_START is {first!r}; a multiple of {local} below {world_size} is expected"
        )
    if not re.fullmatch(r"[\w.:-]+", address):
        raise ConfigError(f"MASTER_ADDR is {address!r}; an address of host 0 is expected")
    return Hosts(world_size, num_nodes, int(first), address, str(Path(word).resolve()))


def _check_degrees(reader: _Reader, world_size: int) -> None:
    """Refuse parallel degrees other than tensor parallelism; 1 and -1 (unset) are accepted."""
    if not reader.next_is(lambda word: word.startswith("[")):
        return
    word = reader.take("")
    degrees = _literal(word, "parallel degrees", f"[{','.join(_DEGREES)}]")
    if (
        not isinstance(degrees, list)
        or len(degrees) != 8
        or not all(type(n) is int for n in degrees)
    ):
        raise ConfigError(f"parallel degrees are {word!r}; [{','.join(_DEGREES)}] is expected")
    for name, degree in zip(_DEGREES, degrees, strict=True):
        if degree != -1 and degree != (world_size if name == "tp" else 1):
            raise ConfigError(
                f"{name}={degree} is not served with {world_size} chips: there is tensor "
                f"parallelism only, tp={world_size} and 1 or -1 for the others"
            )
