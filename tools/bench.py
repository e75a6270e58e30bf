# SPDX-License-Identifier: Apache-2.0
"""Benchmark of GPT-NeoX on this machine: alone, over sizes, against other engines, or as a service.

See docs/benchmarks.md, or `python tools/bench.py --help`. Exit status: 0 done, 1 something failed
(what could be measured is written), 2 wrong usage.
"""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # this toolkit itself

from benchmark import arguments, engines
from benchmark.errors import UsageError, WorkerError

from gptneox.files import prepare_streams

REQUIRED = ("torch", "transformers", "safetensors")


def say(text: str) -> None:
    """A notice; standard output is for the result."""
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    """Do what the flags say; returns the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that engines are ended, too
    try:
        return run(argv)
    except KeyboardInterrupt:
        say("bench.py: interrupted")
        return 130
    except (UsageError, WorkerError, ValueError, OSError, RuntimeError) as error:
        say(f"bench.py: error: {error}")
        is_usage = isinstance(error, (UsageError, ValueError, FileNotFoundError))
        return 2 if is_usage else 1


def run(argv: Sequence[str]) -> int:
    """As `main`, with errors as exceptions.

    Raises:
        ValueError, OSError, RuntimeError: with a message for the user.
    """
    prepare_streams()
    if argv[:1] == ["serve"]:
        return run_serve(argv[1:])
    args = arguments.parse(argv)
    if missing := [name for name in REQUIRED if importlib.util.find_spec(name) is None]:
        raise UsageError(
            f"{sys.executable} has no {', '.join(missing)}; run this with the Python of the "
            "environment that the launchers use (.venv/bin/python)"
        )
    check_plot(args.plot)
    if args.write_docs:
        from benchmark.results import write_docs

        write_docs(args.write_docs, args.sources)
        return 0
    if args.guard:
        from benchmark.guard import measure_guard, show

        points = measure_guard(args.threads, say)
        print(show(points))
        return int(any(point.ratio < 1 for point in points))
    if args.install or args.install_only:
        for name in args.against or engines.PEERS:
            engines.install(engines.ENGINES[name], args.cache, say)
        if args.install_only:
            return 0
    for name in args.against:  # report a missing engine before building anything
        engines.interpreter(engines.ENGINES[name], args.cache)
    from benchmark.tasks import measure  # imports torch, so only after the flags are checked

    return measure(args, list(argv), say)


def run_serve(argv: Sequence[str]) -> int:
    """`bench.py serve`; against a URL it needs no torch."""
    args = arguments.parse_service(argv)
    check_plot(args.plot)
    from benchmark.serving import measure_service

    return measure_service(args, argv, say)


def check_plot(is_wanted: bool) -> None:
    """Raise UsageError where pictures cannot be drawn."""
    if is_wanted and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib; pip install .[plot] adds it")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
