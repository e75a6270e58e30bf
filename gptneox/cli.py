# SPDX-License-Identifier: Apache-2.0
"""The command line of main.py: flags, their merging with config.ini, and logging."""

from __future__ import annotations

import argparse
import logging
import logging.handlers
import sys
import time
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gptneox import __version__
from gptneox.config.environment import Environment
from gptneox.config.errors import ConfigError
from gptneox.config.settings import (
    EMBEDDED_CHECKPOINT,
    EngineSection,
    ModelSection,
    PerformanceSection,
    PrecisionSection,
    layer,
    read_ini,
    resolve_model_path,
)
from gptneox.engine.sequence import SamplingParams

logger = logging.getLogger(__name__)

DEFAULT_PROMPT = "What's deep learning?"


@dataclass(frozen=True)
class Settings:
    """Everything a task needs to know, decided once."""

    args: argparse.Namespace
    environment: Environment
    model: ModelSection
    engine: EngineSection
    precision: PrecisionSection
    performance: PerformanceSection
    sampling: SamplingParams
    sources: dict[str, dict[str, str]]

    @property
    def attention(self) -> str:
        """paged or flash; "auto" is what the launcher stands for."""
        chosen = self.model.attention
        return str(self.args.auto_attention) if chosen == "auto" else chosen

    @property
    def model_path(self) -> Path:
        """Checkpoint directory."""
        return (
            Path(self.model.model_path).expanduser()
            if self.model.model_path
            else EMBEDDED_CHECKPOINT
        )

    def describe(self) -> list[str]:
        """One line per section; values that are no default carry their source."""
        lines = []
        for name in ("model", "engine"):
            values = asdict(getattr(self, name))
            shown = []
            for key, value in values.items():
                source = self.sources[name][key]
                text = value if value != "" else "-"
                shown.append(f"{key}={text}" + ("" if source == "default" else f" ({source})"))
            lines.append(f"[{name}] " + ", ".join(shown))
        asked = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
        ends = ("stop", "stop_token_ids", "ignore_eos")
        sampling = [f"{k}={getattr(self.sampling, k)}" for k in (*asked, *ends)]
        return [*lines, "[sampling] " + ", ".join(sampling)]


class _Parser(argparse.ArgumentParser):
    """Accepts each flag with `_` and with `-`."""

    def flag(self, name: str, **kwargs: Any) -> None:
        names = [name] + ([name[:2] + name[2:].replace("_", "-")] if "_" in name else [])
        self.add_argument(*names, **kwargs)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "1")


def _ids(text: str) -> list[int]:
    try:
        return [int(item) for item in text.split(",")] if text.strip() else []
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of token ids joined by commas"
        ) from error


def _add_generation_flags(parser: argparse.ArgumentParser) -> None:
    group: Any = parser.add_argument_group("generation")

    def add(name: str, **kwargs: Any) -> None:
        _Parser.flag(group, name, **kwargs)

    add("--max_output_length", type=int, metavar="N", help="new tokens per request; default 20")
    add("--ignore_eos", action="store_true", help="go on after the end-of-text token")
    add("--temperature", type=float, help="0 (default): always the likeliest token")
    add("--top_k", type=int, help="keep the k likeliest tokens; 0: all")
    add("--top_p", type=float, help="keep the likeliest tokens up to this probability")
    add("--repetition_penalty", type=float, help="above 1: avoid repeating")
    add("--seed", type=int, help="same seed, same text")
    add("--stop", nargs="+", action="extend", default=[], metavar="TEXT",
        help="end before any of these strings")  # fmt: skip
    add("--stop_token_ids", nargs="+", action="extend", type=_ids, default=[], metavar="IDS",
        help="end with any of these ids, as with end-of-text: 187 0, or 187,0")  # fmt: skip


def given(text: str) -> str:
    """A word that is not empty: an empty one is a shell variable that is not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; name one, or leave the flag out")
    return text


def given_path(text: str) -> Path:
    """A path that is not empty."""
    return Path(given(text))


def make_parser() -> argparse.ArgumentParser:
    """The parser of main.py. A flag that is not given is None, so that config.ini can speak."""
    parser = _Parser(
        prog="main.py",
        description="GPT-NeoX inference on Ascend NPU, CUDA and CPU.",
        epilog="Precedence: flag > environment > config.ini > default. "
        "Every flag may be written with - instead of _.",
        allow_abbrev=False,
    )
    add = parser.flag
    add("--version", action="version", version=f"gptneox-ascend {__version__}")
    tasks = ("inference", "precision", "performance", "compare", "modeltest", "doctor")
    add("--task", choices=tasks, default="inference",
        help="default: inference; modeltest is started by tests/modeltest/run.sh")  # fmt: skip
    add("--config", type=given_path, help="settings file; default: config.ini beside main.py")
    add("--debug", action="store_true", help="log more, and show tracebacks")

    group: Any = parser.add_argument_group("model")
    _, add = add, lambda name, **kw: _Parser.flag(group, name, **kw)
    add("--model_path", type=given, metavar="DIR",
        help="checkpoint; default: config.ini's, else the embedded weights/neox-mini")  # fmt: skip
    add("--device", metavar="NAME", help="auto, npu, cuda or cpu")
    add("--dtype", metavar="NAME", help="auto, float16, bfloat16 or float32")
    add("--attention", metavar="NAME", help="auto, paged or flash")
    add("--auto_attention", choices=("paged", "flash"), default="flash", help=argparse.SUPPRESS)
    add("--tp", type=int, metavar="N", help="must equal the number of processes started")
    add("--trust_remote_code", action="store_true", help="run a tokenizer's own code; not needed")

    group = parser.add_argument_group("input and output")
    add("--input_texts", nargs="+", action="extend", metavar="TEXT",
        help="prompts; the name of a file or pipe stands for its content, - for stdin")  # fmt: skip
    add("--input_ids", nargs="+", action="extend", type=_ids, metavar="IDS",
        help="prompts as ids: 12092,13 510")  # fmt: skip
    add("--load_tokenizer", type=_boolean, default=True, metavar="BOOL",
        help="False: --input_ids in, ids out")  # fmt: skip
    add("--interactive", action="store_true", help="read prompts from the terminal")
    add("--stream", action="store_true", help="print answers while they grow")
    add(
        "--output_file",
        type=given_path,
        metavar="FILE",
        help="also write the answers as JSON lines",
    )

    group = parser.add_argument_group("comparison of two performance results (--task compare)")
    add(
        "--against",
        type=given_path,
        metavar="PATH",
        help="the earlier result: CSV, JSON or a directory",
    )
    add("--with", type=given_path, dest="with_result", metavar="PATH",
        help="the later one; default: the newest in the current directory")  # fmt: skip
    add("--modeltest_arguments", nargs=argparse.REMAINDER, default=[], help=argparse.SUPPRESS)

    _add_generation_flags(parser)

    group = parser.add_argument_group("engine")
    add("--max_batch_size", type=int, metavar="N", help="requests running at once; default 1")
    add("--max_prefill_batch_size", type=int, metavar="N", help="prompts started in one step")
    add("--max_input_length", type=int, metavar="N", help="expected prompt length; sizing only")
    add("--max_prefill_tokens", type=int, metavar="N", help="prompt tokens per step")
    add("--max_position_embeddings", type=int, metavar="N", help="override config.json's limit")
    add("--block_size", type=int, metavar="N", help="KV-cache tokens per block; default 128")
    add("--num_blocks", type=int, metavar="N", help="KV-cache blocks; default: from free memory")
    add("--enable_prefix_caching", type=_boolean, nargs="?", const=True, metavar="BOOL")
    add("--enable_chunked_prefill", type=_boolean, nargs="?", const=True, metavar="BOOL")
    add("--graphs", metavar="NAME", help="auto, on or off: replay decode steps as graphs")
    add("--memory_fraction", type=float, metavar="X", help="share of free memory for the cache")
    add("--reserved_memory_gb", type=float, metavar="X", help="GiB kept free beside the cache")
    return parser


def read_model_section(
    args: argparse.Namespace, default_config: Path
) -> tuple[ModelSection, dict[str, str], dict[str, dict[str, str]]]:
    """[model], where its values are from, and all of config.ini.

    A model_path of the file becomes right from the current folder.
    """
    config = args.config or default_config
    ini = read_ini(config) if args.config or default_config.is_file() else {}
    model, sources = layer(ModelSection, vars(args), ini)
    if model.model_path and sources["model_path"] == "config.ini":
        model = replace(model, model_path=resolve_model_path(model.model_path, config))
    return model, sources, ini


def read_settings(argv: Seq[str], default_config: Path) -> Settings:
    """Merge flags, environment and config.ini.

    Args:
        argv: the command line without the program's name.
        default_config: config.ini to read when --config is not given; it may be absent then.

    Raises:
        SystemExit: argparse refuses a flag (status 2).
        ValueError, FileNotFoundError: a setting is wrong.
    """
    args = make_parser().parse_args(argv)
    environment = Environment.read()
    model, model_sources, ini = read_model_section(args, default_config)
    flags = vars(args)
    engine, engine_sources = layer(EngineSection, flags, ini)
    precision, _ = layer(PrecisionSection, {}, ini)
    performance, _ = layer(PerformanceSection, {}, ini)
    chosen = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    sampling = SamplingParams(
        max_new_tokens=engine.max_output_length,
        stop=tuple(args.stop),
        stop_token_ids=tuple(token_id for ids in args.stop_token_ids for token_id in ids),
        ignore_eos=args.ignore_eos,
        **{name: flags[name] for name in chosen if flags[name] is not None},
    )
    if args.tp is not None and args.tp != environment.world_size:
        raise ConfigError(
            f"--tp is {args.tp}, but {environment.world_size} process(es) were started; "
            "list the devices in ASCEND_RT_VISIBLE_DEVICES (on a CPU: set TP_WORLD_SIZE) and use "
            "run_pa.sh"
        )
    if not args.load_tokenizer and (not args.input_ids or args.stop or args.interactive):
        raise ConfigError(
            "--load_tokenizer False works on ids alone: give --input_ids, and neither --stop nor "
            "--interactive"
        )
    sources = {"model": model_sources, "engine": engine_sources}
    return Settings(args, environment, model, engine, precision, performance, sampling, sources)


def refuse_unbuilt(settings: Settings) -> None:
    """Raise ConfigError for what the environment asks of a run and this version does not have."""
    if settings.environment.is_quant:
        raise ConfigError(
            "IS_QUANT=1, but quantization is not built yet; unset IS_QUANT or set it to 0"
        )


def setup_logging(settings: Settings) -> None:
    """Log to stderr, and to rotating files where [model] log_dir says so.

    Raises:
        ConfigError: no file can be written there.
    """
    environment = settings.environment
    level = logging.DEBUG if settings.args.debug else environment.log_level
    style = f"%(asctime)s [%(levelname)s] rank {environment.rank}: %(message)s"
    root = logging.getLogger("gptneox")
    root.setLevel(level)
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(logging.Formatter(style, "%H:%M:%S"))
    if environment.rank > 0:
        console.setLevel(logging.ERROR)  # what every rank sees is said once
    root.addHandler(console)
    if settings.model.log_dir:
        folder = Path(settings.model.log_dir)
        name = f"device{environment.rank}_{environment.world_size}_{int(time.time())}.log"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = logging.handlers.RotatingFileHandler(
                folder / name, maxBytes=10 << 20, backupCount=10, encoding="utf-8"
            )
        except OSError as error:
            raise ConfigError(
                f"[model] log_dir {folder} cannot be written: {error.strerror}; name another "
                "folder, or leave it empty to log to the terminal alone"
            ) from error
        file.setFormatter(
            logging.Formatter(
                "%(asctime)s [%(levelname)s] pid: %(process)d %(filename)s-%(lineno)d: %(message)s"
            )
        )
        root.addHandler(file)
