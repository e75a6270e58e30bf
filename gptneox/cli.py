# SPDX-License-Identifier: Apache-2.0
"""The command line of main.py: flags, their merging with config.ini, and logging."""

from __future__ import annotations

import argparse
import logging
import logging.handlers
import sys
import time
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from gptneox import __version__
from gptneox.config.arguments import GROUPS, Arguments, Generation, boolean, from_flags
from gptneox.config.environment import Environment
from gptneox.config.errors import ConfigError
from gptneox.config.places import CHECKOUT
from gptneox.config.schema import Setting, settings_of
from gptneox.config.settings import (
    EMBEDDED_CHECKPOINT,
    SECTIONS,
    EngineSection,
    ModelSection,
    PerformanceSection,
    PrecisionSection,
    QuantizeOptions,
    ServerSection,
    merge_section,
    read_ini,
    resolve_model_path,
)
from gptneox.engine.sequence import SamplingParams
from gptneox.hub import find_checkpoint, is_model_id

logger = logging.getLogger(__name__)

# What the log says of sampling in any case.
_LOGGED = ("temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop", "ignore_eos")


@dataclass(frozen=True)
class Settings:
    """Everything a task needs to know, decided once."""

    args: Arguments
    environment: Environment
    model: ModelSection
    engine: EngineSection
    server: ServerSection
    precision: PrecisionSection
    performance: PerformanceSection
    sampling: SamplingParams
    quantize: QuantizeOptions
    argv: tuple[str, ...]  # the command line
    given: dict[str, Any]  # the flags on the command line and their values
    sources: dict[str, dict[str, str]]

    @property
    def attention(self) -> str:
        """paged or flash; "auto" is what the launcher stands for."""
        chosen = self.model.attention
        return self.args.auto_attention if chosen == "auto" else chosen

    @property
    def model_path(self) -> Path:
        """Checkpoint directory."""
        return (
            Path(self.model.model_path).expanduser()
            if self.model.model_path
            else EMBEDDED_CHECKPOINT
        )

    def describe(self) -> list[str]:
        """One line per section; a value that differs from the default names its source."""
        lines = []
        for name in ("model", "engine"):
            values = asdict(getattr(self, name))
            shown = []
            for key, value in values.items():
                source = self.sources[name][key]
                text = value if value != "" else "-"
                shown.append(f"{key}={text}" + ("" if source == "default" else f" ({source})"))
            lines.append(f"[{name}] " + ", ".join(shown))
        shown = [f"max_new_tokens={self.sampling.max_new_tokens}"]
        for each in settings_of(Generation):
            if each.name in _LOGGED or each.name in self.given:
                shown.append(f"{each.name}={getattr(self.sampling, each.name)}")
        return [*lines, "[sampling] " + ", ".join(shown)]


def _flag_options(each: Setting, *, in_file: bool) -> dict[str, Any]:
    """The arguments of `add_argument`. `in_file`: the flag is also a key of config.ini."""
    kind = type(each.default)
    options: dict[str, Any] = {"dest": each.name, "default": None}
    is_switch = kind is bool and not each.parse and not in_file
    if is_switch:
        options["action"] = "store_true"
    else:
        options["type"] = each.parse or {bool: boolean, tuple: str}.get(kind, kind)
        options["metavar"] = each.metavar
    if kind is bool and in_file:
        options |= {"nargs": "?", "const": True}
    if kind is tuple:
        options |= {"action": "extend", "nargs": each.nargs or "+"}
    if each.choices and not in_file:  # a section checks its choices by itself
        options |= {"choices": each.choices, "metavar": None}
    remarks = [f"default: {each.shown_default}"] if each.shown_default and not is_switch else []
    remarks += [f"environment: {each.env}"] if each.env else []
    sentences = [each.accepted if in_file else "", each.help]
    sentences += [f"({'; '.join(remarks)})"] if remarks else []
    text = " ".join(filter(None, sentences)).replace("%", "%%")
    return options | {"help": argparse.SUPPRESS if each.is_hidden else text}


def make_parser() -> argparse.ArgumentParser:
    """The parser of main.py. A flag that is not given is None, so that config.ini can speak."""
    parser = argparse.ArgumentParser(
        prog="main.py" if CHECKOUT else "gptneox",
        description="GPT-NeoX inference on Ascend NPU, CUDA and CPU.",
        epilog="Precedence: flag > environment > config.ini > default. "
        "Every flag may be written with - instead of _.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gptneox-ascend {__version__}")
    flags = [(each, True) for cls in SECTIONS.values() for each in settings_of(cls) if each.flag]
    only_flags = (Arguments, QuantizeOptions, Generation)
    flags += [(each, False) for cls in only_flags for each in settings_of(cls)]
    for name in GROUPS:
        group: Any = parser if name == "options" else parser.add_argument_group(name)
        for each, in_file in flags:
            if each.group == name:
                spellings = dict.fromkeys((each.flag, "--" + each.flag[2:].replace("_", "-")))
                group.add_argument(*spellings, **_flag_options(each, in_file=in_file))
    return parser


def read_model_section(
    args: argparse.Namespace, default_config: Path
) -> tuple[ModelSection, dict[str, str], dict[str, dict[str, str]]]:
    """Section [model], the sources of its values, and all of config.ini.

    A relative model_path in the file is resolved against the file's folder.
    """
    config = args.config or default_config
    ini = read_ini(config) if args.config or default_config.is_file() else {}
    model, sources = merge_section(ModelSection, vars(args), ini)
    if model.model_path and sources["model_path"] == "config.ini":
        model = replace(model, model_path=resolve_model_path(model.model_path, config))
    return model, sources, ini


def place_of(model: ModelSection, environment: Environment) -> str:
    """The checkpoint's folder, empty for the embedded one; a model on a hub is downloaded first.

    Raises:
        ConfigError, HubError: see `find_checkpoint`.
    """
    path, from_modelscope = model.model_path, environment.use_modelscope
    if not is_model_id(path) and not model.revision:
        return path
    return str(find_checkpoint(path, model.revision, from_modelscope=from_modelscope))


def with_checkpoint(settings: Settings) -> Settings:
    """The settings with the checkpoint's folder; see `place_of`."""
    path = place_of(settings.model, settings.environment)
    server, given = settings.server, settings.model.model_path
    if is_model_id(given) and not server.served_model_name:  # else its name would be a commit
        server = replace(server, served_model_name=given)
    return replace(settings, model=replace(settings.model, model_path=path), server=server)


def _sampling_params(max_new_tokens: int, chosen: Generation) -> SamplingParams:
    """The parameters of every request; a flag that takes several values gives tuples."""
    values = {f.name: getattr(chosen, f.name) for f in fields(Generation)}
    for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
        values[name] = tuple(chain.from_iterable(values[name]))
    values["stop"] = tuple(chosen.stop)
    return SamplingParams(max_new_tokens=max_new_tokens, **values)


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
    given = {name: value for name, value in vars(args).items() if value is not None}
    arguments, chosen = from_flags(Arguments, given), from_flags(Generation, given)
    quantize = from_flags(QuantizeOptions, given)
    engine, engine_sources = merge_section(EngineSection, given, ini)
    if arguments.task == "serve":
        engine = engine.for_service(engine_sources)
    server, server_sources = merge_section(ServerSection, given, ini)
    precision, _ = merge_section(PrecisionSection, {}, ini)
    performance, _ = merge_section(PerformanceSection, {}, ini)
    sampling = _sampling_params(engine.max_output_length, chosen)
    if arguments.ray:
        model = _for_cluster(arguments, environment, model)
    elif arguments.tp is not None and arguments.tp != environment.world_size:
        raise ConfigError(
            f"--tp is {arguments.tp}, but {environment.world_size} process(es) were started; "
            "list the devices in ASCEND_RT_VISIBLE_DEVICES (on a CPU: set TP_WORLD_SIZE) and use "
            "run_pa.sh"
        )
    if arguments.wants_chat and arguments.input_ids:
        raise ConfigError("--chat works on texts: give --input_texts, not --input_ids")
    gets_ids = arguments.input_ids or arguments.server_socket  # a rank gets them from its front
    lacks_ids = not gets_ids or arguments.interactive
    if not arguments.load_tokenizer and (lacks_ids or sampling.stop):
        raise ConfigError(
            "--load_tokenizer False works on ids alone: give --input_ids, and neither --stop nor "
            "--interactive"
        )
    return Settings(
        args=arguments,
        environment=environment,
        model=model,
        engine=engine,
        server=server,
        precision=precision,
        performance=performance,
        sampling=sampling,
        quantize=quantize,
        argv=tuple(argv),
        given=given,
        sources={"model": model_sources, "engine": engine_sources, "server": server_sources},
    )


def _for_cluster(
    arguments: Arguments, environment: Environment, model: ModelSection
) -> ModelSection:
    """Section [model] of a run that computes in a Ray cluster.

    Raises:
        ConfigError: the run is none that can be spread.
    """
    if arguments.ray < 0 or arguments.task not in ("inference", "precision"):
        raise ConfigError(
            f"--ray {arguments.ray} with --task {arguments.task}; 1 or more replicas, and "
            "inference or precision, are expected"
        )
    if environment.world_size > 1:
        raise ConfigError("--ray starts the ranks itself; start it without torchrun")
    if model.attention == "flash":
        raise ConfigError("--ray runs on the paged path alone; leave --attention out")
    if arguments.interactive or arguments.stream or environment.benchmark_enabled:
        raise ConfigError("--interactive, --stream and ATB_LLM_BENCHMARK_ENABLE are for runs here")
    return replace(model, attention="paged")


def setup_logging(settings: Settings) -> None:
    """Log to stderr, and to rotating files where [model] log_dir says so.

    Raises:
        ConfigError: no file can be written there.
    """
    environment = settings.environment
    level = logging.DEBUG if settings.args.debug else environment.log_level
    is_front = settings.args.task == "serve" and not settings.args.server_socket
    who = "front" if is_front else f"rank {environment.rank}"
    style = f"%(asctime)s [%(levelname)s] {who}: %(message)s"
    root = logging.getLogger("gptneox")
    root.setLevel(level)
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(logging.Formatter(style, "%H:%M:%S"))
    if environment.rank > 0:
        console.setLevel(logging.ERROR)  # rank 0 logs what all ranks see
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
