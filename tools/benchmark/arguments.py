# SPDX-License-Identifier: Apache-2.0
"""Flags of tools/bench.py, checked before anything heavy is loaded."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from benchmark.engines import ENGINES, NOT_QUANTIZED, OURS, PEERS, SCHEMES, float_name
from benchmark.errors import UsageError
from benchmark.models import SHAPES
from gptneox.config.model import DTYPES

DEVICES = ("auto", "cpu", "cuda", "npu")
CURVES = {
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "context": (128, 256, 512, 1024, 2048),
    "prompt": (16, 32, 64, 128, 256, 512, 1024, 2048),
    "requests": (1, 10, 100, 1000),
}
EXAMPLES = """\
examples:
  python tools/bench.py --model pythia-160m
  python tools/bench.py --install-only
  python tools/bench.py --model pythia-1.4b --against transformers,llama.cpp --batch 1,8
  python tools/bench.py --model DIRECTORY --dtype float32 --curve batch --plot
  python tools/bench.py --variant "torch only:GPTNEOX_CPU_KERNELS=off" --batch 8
  python tools/bench.py --overhead
  python tools/bench.py --guard
  python tools/bench.py --write-docs docs/benchmarks.md --from benchmark_result/*.json
  python tools/bench.py serve --help
"""
SERVICE_EXAMPLES = """\
examples:
  python tools/bench.py serve --url http://127.0.0.1:8000 --arrivals 1,2,4
  python tools/bench.py serve --model pythia-160m --concurrency 1,8,32 --plot
  python tools/bench.py serve --model pythia-160m --against vllm --arrivals 2
"""


@dataclass(frozen=True)
class Case:
    """One shape of work."""

    batch: int
    prompt: int
    output: int

    def __str__(self) -> str:
        return f"{self.batch} x [{self.prompt},{self.output}]"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def parser() -> argparse.ArgumentParser:
    """Every flag with its default."""
    flags = _Parser(
        prog="bench.py",
        description="How fast GPT-NeoX runs here: measured against the machine's own limits, and, "
        "with --against, against other engines on the same weights and the same tokens.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = flags.add_argument_group("what is measured").add_argument
    add("--model", default="pythia-160m", help=f"a directory, or a shape: {', '.join(SHAPES)}")
    add("--dtype", default="bfloat16", choices=DTYPES)
    add("--device", default="auto", choices=DEVICES)
    add("--batch", type=_numbers, help="rows of each case (1,8,32; with --curve: 1)")
    add("--prompt", default=256, type=_number, help="prompt tokens of a row (256)")
    add("--output", type=_number, help="new tokens of a row (64; with --curve prompt: 2)")
    add("--threads", default=usable_cores(), type=_number, help="of each engine (%(default)s)")
    add("--runs", type=_number, help="measured rounds of a case (5; with --curve requests: 1)")
    add = flags.add_argument_group("compared with").add_argument
    add("--against", default=[], type=_engines, help=f"any of {','.join(PEERS)}")
    add("--variant", default=[], type=_variant, action="append", metavar="NAME:KEY=VALUE,...",
        help="this engine once more, with environment variables; repeatable")  # fmt: skip
    add("--scheme", choices=tuple(SCHEMES), default="",
        help="quantized weights, made of those of --model for each engine; this engine's float "
        "weights are measured beside them")  # fmt: skip
    add("--install", action="store_true", help="first install what --against lacks")
    add("--install-only", action="store_true", help="install --against (default: all), and end")
    add = flags.add_argument_group("other measurements").add_argument
    add("--curve", choices=tuple(CURVES), help="speed over the batch size, the context length, the "
        "prompt length, or the number of requests that arrive one after another")  # fmt: skip
    add("--points", type=_numbers, help="of the curve, instead of its usual ones")
    add("--arrivals", default=4.0, type=_positive, help="requests per second of --curve requests")
    add("--max-batch", default=32, type=_number, help="rows at once in --curve requests (32)")
    add("--overhead", action="store_true", help="parts of a decode step beside the model, and the "
        "cost of a long queue")  # fmt: skip
    add("--guard", action="store_true", help="the CPU kernels against plain torch over numbers of "
        "rows; exit status 1 if a point is slower")  # fmt: skip
    add = _add_file_flags(flags)
    add("--timeout", default=3600.0, type=_positive, help="seconds for each answer of an engine")
    add("--write-docs", type=Path, metavar="FILE", help="replace the results in a document")
    add("--from", dest="sources", nargs="+", default=[], type=Path, metavar="JSON",
        help="the results that --write-docs puts there")  # fmt: skip
    return flags


def service_parser() -> argparse.ArgumentParser:
    """Every flag of `bench.py serve` with its default."""
    flags = _Parser(
        prog="bench.py serve",
        description="How a service does under load: many clients that stream completions from an "
        "OpenAI-compatible URL, or from a service that is started for the run.",
        epilog=SERVICE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = flags.add_argument_group("which service").add_argument
    add("--url", help="of a running one, with or without /v1; its key comes from OPENAI_API_KEY")
    add("--served-model", metavar="NAME", help="that requests name (the first of /v1/models)")
    add("--model", help="start this toolkit's service with a directory, or a shape: "
        f"{', '.join(SHAPES)}")  # fmt: skip
    add("--against", choices=("vllm",), help="with --model: then vLLM's service, too")
    add("--dtype", default="bfloat16", choices=DTYPES, help="with --model")
    add("--device", default="auto", choices=DEVICES, help="with --model")
    add("--threads", default=usable_cores(), type=_number, help="with --model (%(default)s)")
    add = flags.add_argument_group("load").add_argument
    add("--arrivals", type=_rates, metavar="RATES", help="requests per second of Poisson arrivals; "
        "several are measured one after another")  # fmt: skip
    add("--concurrency", type=_numbers, help="requests under way at any time, instead (8)")
    add("--requests", default=100, type=_number, help="of each measurement (%(default)s)")
    add("--warmup", default=2, type=_number, help="requests before the first one (%(default)s)")
    add("--prompt", default=256, type=_number, help="tokens of a prompt (%(default)s)")
    add("--output", default=64, type=_number, help="tokens of an answer (%(default)s)")
    add("--lengths", default="fixed", choices=("fixed", "uniform"), help="uniform: from 1 to twice "
        "that (%(default)s)")  # fmt: skip
    add("--text", type=Path, metavar="FILE", help="take prompts from a text, in words, instead of "
        "random token ids")  # fmt: skip
    add("--vocab-size", type=_number, help="random ids are below it (50254; with --model: its own)")
    add("--stop-at-eos", action="store_true", help="answers end at end-of-text; the field "
        "ignore_eos, which other services may not know, is not sent")  # fmt: skip
    add("--seed", default=0, type=_whole, help="of prompts and arrivals (%(default)s)")
    add = flags.add_argument_group("what counts").add_argument
    add("--ttft-limit", type=_positive, metavar="MS", help="a good answer's first token comes in "
        "time")  # fmt: skip
    add("--itl-limit", type=_positive, metavar="MS", help="and its others, on average, after each "
        "other")  # fmt: skip
    add("--timeout", default=600.0, type=_positive, help="seconds for a request (%(default)s)")
    _add_file_flags(flags)
    return flags


def _add_file_flags(flags: argparse.ArgumentParser) -> Callable[..., argparse.Action]:
    add = flags.add_argument_group("files").add_argument
    add("--output-dir", default=Path("benchmark_result"), type=Path, help="for the JSON and PNG")
    add("--plot", action="store_true", help="also draw a PNG (extra: plot)")
    add("--cache", default=default_cache(os.environ), type=Path, metavar="DIR",
        help="for weights and installed engines (%(default)s)")  # fmt: skip
    return add


def parse_service(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of `bench.py serve`, checked.

    Raises:
        UsageError: with a line for the user.
    """
    args = service_parser().parse_args(argv)
    _expand(args)
    if bool(args.url) == bool(args.model):
        raise UsageError("give --url of a running service, or --model to start one; see --help")
    if args.against and not args.model:
        raise UsageError("--against is for services that are started here; add --model, not --url")
    if args.against and args.served_model:
        raise UsageError("--served-model is for --url; services started here take any name")
    if args.arrivals and args.concurrency:
        raise UsageError("--arrivals and --concurrency are two kinds of load; give one of them")
    if args.text and args.vocab_size:
        raise UsageError("--vocab-size is for random token ids; leave --text or it out")
    if not args.arrivals:
        args.concurrency = args.concurrency or [8]
    return args


def _expand(args: argparse.Namespace) -> None:
    args.cache = args.cache.expanduser().resolve()
    args.output_dir = args.output_dir.expanduser().resolve()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, checked.

    Raises:
        UsageError: with a line for the user.
    """
    args = parser().parse_args(argv)
    _expand(args)
    if bool(args.write_docs) != bool(args.sources):
        raise UsageError("--write-docs FILE and --from JSON... only go together")
    if args.points and not args.curve:
        raise UsageError("--points are those of a curve; add --curve")
    if args.curve and args.overhead:
        raise UsageError("--curve and --overhead are two measurements; run them one by one")
    others = [*args.against, *(name for name, _ in args.variant)]
    if args.overhead and others:
        raise UsageError(f"--overhead looks at {OURS} alone; leave {others[0]} out")
    others += [float_name(args.dtype)] * bool(args.scheme)
    if len(set(others)) < len(others):
        raise UsageError(f"each engine and variant needs a name of its own; got {others}")
    args.batch = args.batch or ([1] if args.curve else [1, 8, 32])
    args.output = args.output or (2 if args.curve == "prompt" else 64)
    args.runs = args.runs or (1 if args.curve == "requests" else 5)
    if args.output < 2:
        raise UsageError("--output is 1; decoding is timed from the second token on, so give 2")
    _check_peers(args)
    return args


def _check_peers(args: argparse.Namespace) -> None:
    """Raise UsageError where an engine has no part in what is measured."""
    for name in args.against:
        if args.scheme and name not in SCHEMES[args.scheme].weights:
            able = ", ".join(n for n in PEERS if n in SCHEMES[args.scheme].weights)
            raise UsageError(
                f"--scheme {args.scheme} with --against {name}: {NOT_QUANTIZED[name]}; use {able}"
            )
        if args.curve == "requests" and not ENGINES[name].takes_arrivals:
            able = ", ".join(n for n in PEERS if ENGINES[n].takes_arrivals)
            raise UsageError(
                f"--curve requests with --against {name}: it takes no requests while others "
                f"run; use {able}"
            )


def cases(args: argparse.Namespace, max_positions: int) -> list[Case]:
    """The cases to measure, in order; a curve's lengths are capped to the model's positions.

    Raises:
        UsageError: a case needs more positions than the model has.
    """
    points = args.points or list(CURVES.get(args.curve, ()))
    prompt, output = args.prompt, args.output
    if args.curve == "batch":
        result = [Case(n, prompt, output) for n in points]
    elif args.curve == "context":
        short = [n for n in points if n <= output]
        if short:
            raise UsageError(
                f"--curve context: a context of {short[0]} tokens must be longer than "
                f"--output {output}"
            )
        result = [Case(n, c - output, output) for n in args.batch for c in points]
    elif args.curve == "prompt":
        most = max_positions - output
        lengths = list(dict.fromkeys(min(n, most) for n in points))
        result = [Case(n, length, output) for n in args.batch for length in lengths]
    else:
        result = [Case(n, prompt, output) for n in args.batch]
    return check_positions(result, max_positions)


def check_positions(cases: list[Case], max_positions: int) -> list[Case]:
    """Returns the cases.

    Raises:
        UsageError: the model has too few positions for one of them.
    """
    for case in cases:
        if case.prompt + case.output > max_positions or case.prompt < 1:
            raise UsageError(
                f"{case.prompt} prompt and {case.output} new tokens need "
                f"{case.prompt + case.output} positions, the model has {max_positions}; lower "
                "--prompt, --output or --points"
            )
    return cases


def default_cache(environment: os._Environ[str] | dict[str, str]) -> Path:
    """Below the user's cache directory. Source: XDG Base Directory Specification."""
    base = environment.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gptneox-bench"


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# -- values --------------------------------------------------------------------------------------


def _number(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _numbers(text: str) -> list[int]:
    numbers = [_number(item.strip()) for item in text.split(",")]
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} names a number twice")
    return numbers


def _whole(text: str) -> int:
    return 0 if text == "0" else _number(text)


def _rates(text: str) -> list[float]:
    return [_positive(item.strip()) for item in text.split(",")]


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _engines(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r} is not a known engine; use any of {', '.join(PEERS)}"
        )
    return names


def _variant(text: str) -> tuple[str, dict[str, str]]:
    name, colon, rest = text.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",")]
    if not name or not colon or any(not key or not sign for key, sign, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:KEY=VALUE,...")
    if name in ENGINES:
        raise argparse.ArgumentTypeError(f"{name!r} is the name of an engine; choose another one")
    return name, {key: value for key, _, value in pairs}
